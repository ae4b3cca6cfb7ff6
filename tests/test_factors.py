"Every argument of a run acts, is read back from the live model and optimizer, or is refused in one line."
import subprocess, sys
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from lora_study.config import BadInput, Run, Study, expand, run_id
from lora_study.data import collate, encode, load_splits
from lora_study.lora import add_adapter, adapter_layers, base_checksum, check_adapted, check_fits, count_parameters, make_trainable, planned_parameters, save_adapter
from lora_study.model import Unapplied, linear_layers, load_base, load_tokenizer, place, quantized_as
from lora_study.planner import preflight
from lora_study.train import Loop, check_applied, micro_batches, pack, summed_loss, train

CPU = torch.device('cpu')

def loop_of(examples, **how):
    run = Run(**{**dict(max_steps=4, eval_steps=2), **how})
    return Loop(run, make_trainable(load_base(run, CPU), run), examples, 0)

# --- placement, on architectures built from their configs

SHAPE = dict(vocab_size=48, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64, pad_token_id=0)
GATED, FC = ['mlp.down_proj', 'mlp.gate_proj', 'mlp.up_proj'], ['mlp.fc1', 'mlp.fc2']
SEPARATE, BERT = dict(q='self_attn.q_proj', k='self_attn.k_proj', v='self_attn.v_proj', o='self_attn.o_proj'), dict(q='attention.self.query', k='attention.self.key', v='attention.self.value', o='attention.output.dense')
ZOO = { # architecture → extra configuration, attention by role (qkv: fused), feed-forward, head
    'llama': ({}, SEPARATE, GATED, 'lm_head'), 'mistral': (dict(sliding_window=None), SEPARATE, GATED, 'lm_head'), 'qwen2': ({}, SEPARATE, GATED, 'lm_head'), 'qwen3': (dict(head_dim=8), SEPARATE, GATED, 'lm_head'),
    'gemma': (dict(head_dim=8), SEPARATE, GATED, 'lm_head'), 'phi': ({}, SEPARATE | dict(o='self_attn.dense'), FC, 'lm_head'),
    'opt': (dict(ffn_dim=24, word_embed_proj_dim=16), SEPARATE | dict(o='self_attn.out_proj'), ['fc1', 'fc2'], 'lm_head'),
    'gpt2': (dict(n_inner=24), dict(qkv='attn.c_attn', o='attn.c_proj'), ['mlp.c_fc', 'mlp.c_proj'], 'lm_head'),
    'gpt_neox': ({}, dict(qkv='attention.query_key_value', o='attention.dense'), ['mlp.dense_4h_to_h', 'mlp.dense_h_to_4h'], None),
    'bert': (dict(is_decoder=True), BERT, ['intermediate.dense', 'output.dense'], 'cls.predictions.decoder'),
    'roberta': (dict(is_decoder=True), BERT, ['intermediate.dense', 'output.dense'], 'lm_head.decoder')}

def build(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | ZOO[kind][0])))

@pytest.mark.parametrize('kind', ZOO)
def test_a_placement_means_the_same_on_every_architecture(kind):
    _, roles, feed_forward, head = ZOO[kind]
    attention, qkv = sorted(roles.values()), sorted(roles[r] for r in roles if r in 'qkv' or r == 'qkv')
    want = {'q,k,v': qkv, 'q,k,v,o': attention, 'attention': attention, 'feed-forward': feed_forward, 'o': [roles['o']]} | ({'q,v': sorted([roles['q'], roles['v']])} if 'q' in roles else {})
    for words, insides in want.items():
        for layers, numbers in ((None, range(4)), ('last_half', (2, 3)), ([1], (1,))):
            run = Run(lora_r=2, lora_target_modules=words, layers_to_transform=layers)
            model = add_adapter(build(kind), run)
            assert {place(n) for n in adapter_layers(model)} == {(l, i) for l in numbers for i in insides}, (words, layers)
            check_adapted(model, run)
    if 'q' not in roles:
        with pytest.raises(BadInput, match='holds q, k and v together: ask for q,k,v'): check_fits(Run(lora_r=2, lora_target_modules='q,v'), build(kind))
    with pytest.raises(BadInput, match=r"\['nope'\] not in the base: it has attention: .*; feed-forward: .*; head: "): check_fits(Run(lora_r=2, lora_target_modules='attention,nope'), build(kind))
    whole = add_adapter(build(kind), Run(lora_r=2, lora_target_modules='all-linear,head', layers_to_transform='first_half'))
    inside = {place(n) for n in adapter_layers(whole)}
    assert {l for l, _ in inside} == {0, 1, None} and sum(l is None for l, _ in inside) == 1
    if head: assert (None, head) in inside

@pytest.mark.parametrize('kind', ZOO)
def test_planned_counts_are_pefts_counts(kind):
    with torch.device('meta'): shapes = build(kind)
    biased = any(l.bias for l in linear_layers(shapes) if l.layer is not None)
    for how in (dict(), dict(lora_target_modules='attention'), dict(lora_target_modules='all-linear,head'), dict(use_dora=True, layers_to_transform='every_2nd'),
                *([dict(bias='all'), dict(bias='lora_only', lora_target_modules='feed-forward' if kind != 'qwen2' else 'attention')] if biased else [])):
        run = Run(lora_r=3, **how)
        assert planned_parameters(run, shapes) == add_adapter(build(kind), run).get_nb_trainable_parameters()[0], how

@pytest.mark.parametrize('kind', ZOO)
def test_packed_and_unpacked_give_one_loss(kind):
    from lora_study.data import Example
    rows = [Example('', '', '', torch.randint(1, 48, (n,), generator=torch.Generator().manual_seed(n)).tolist(), n//3, 0, n) for n in (5, 9, 3, 12, 7)]
    model = build(kind).eval()
    if kind == 'roberta':
        with pytest.raises(BadInput, match='counts positions from its padding token on'): check_fits(Run(use_peft=False, packing=True, max_length=20), model)
        return
    check_fits(Run(use_peft=False, packing=True, max_length=20), model)
    for completion_only in (True, False):
        with torch.no_grad(): packed, plain = summed_loss(model, pack(rows, 0, 20, completion_only)), summed_loss(model, collate(rows, 0, completion_only))
        torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-4)
    assert len(pack(rows, 0, 20)['input_ids']) == 2

# --- each argument, on the embedded base

SETTINGS = [dict(lora_r=r) for r in (1, 64)] + [dict(lora_alpha=3), dict(use_rslora=True), dict(lora_dropout=.3), dict(init_lora_weights='gaussian', lora_r=24), dict(init_lora_weights='pissa'),
    dict(init_lora_weights='olora', use_rslora=True), dict(use_dora=True), dict(use_dora=True, load_in_4bit=True), dict(loraplus_lr_ratio=16.), dict(use_dora=True, loraplus_lr_ratio=.5),
    dict(weight_decay=.1), dict(optim='adamw_8bit'), dict(lora_target_modules='q,v', layers_to_transform='middle_half'), dict(lora_target_modules='all-linear,head'), dict(dtype='bfloat16'),
    dict(dtype='float16'), dict(load_in_8bit=True), dict(load_in_4bit=True, bnb_4bit_quant_type='fp4'), dict(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype='bfloat16'),
    dict(lr_scheduler_type='cosine_with_restarts', warmup_steps=.5), dict(lr_scheduler_type='inverse_sqrt', warmup_steps=2), dict(lr_scheduler_type='polynomial'), dict(gradient_checkpointing=True),
    dict(packing=True, gradient_accumulation_steps=2), dict(seed=3, init_seed=4, data_seed=5), dict(use_peft=False), dict(use_peft=False, gradient_checkpointing=True, optim='adamw_8bit', dtype='bfloat16')]

@pytest.mark.parametrize('how', SETTINGS, ids=str)
def test_a_setting_is_read_back_and_trains(how, examples):
    loop = loop_of(examples, max_steps=3, **how)
    with torch.no_grad(): loop.model(input_ids=torch.arange(20)[None]) # a run evaluates its base first
    live = check_applied(loop)
    for k, v in how.items():
        if k in live: assert str(live[k]) == str(v) or float(live[k]) == v, (k, live[k])
    frozen, before = base_checksum(loop.model), [p.detach().clone() for p in loop.params]
    train(loop)
    assert base_checksum(loop.model) == frozen
    assert sum(not torch.equal(a, b) for a, b in zip(loop.params, before)) > len(before)/2

def undo(loop, what): # what a library's fault or a forgotten line would leave
    layer = next(iter(adapter_layers(loop.model).values())) if loop.run.use_peft else None
    group = loop.optimizer.param_groups[-1]
    match what:
        case 'scaling': layer.scaling['default'] = 1.
        case 'lora_dropout': layer.lora_dropout['default'] = torch.nn.Identity()
        case 'use_dora': layer.lora_magnitude_vector.pop('default')
        case 'lora_r': layer.lora_A['default'].weight = torch.nn.Parameter(layer.lora_A['default'].weight[:-1].detach())
        case 'init_lora_weights': torch.nn.init.kaiming_uniform_(layer.lora_A['default'].weight, 0); torch.nn.init.ones_(layer.lora_B['default'].weight)
        case 'trainable_params': layer.lora_B['default'].weight.requires_grad_(False)
        case 'biases': layer.get_base_layer().bias.requires_grad_(False)
        case 'init_seed': loop.model.init_seed = 1
        case 'data_seed': loop.data_seed = 1
        case 'lr_ratio' | 'learning_rate': group['initial_lr'] *= 2
        case 'weight_decay': group['weight_decay'] = 0.
        case 'optim': loop.optimizer.__class__ = torch.optim.Adam
        case 'optimized': group['params'].pop()
        case 'schedule': loop.schedule.lr_lambdas = [lambda t: 1.]
        case 'gradient_checkpointing': next(m for m in reversed(list(loop.model.modules())) if hasattr(m, 'gradient_checkpointing')).gradient_checkpointing = False
        case 'base_dtype': loop.model.get_input_embeddings().to(torch.float64)
        case 'compute_dtype': next(m for m in loop.model.modules() if quantized_as(m)).compute_dtype = torch.float32

LOST = dict(scaling=dict(use_rslora=True), lora_dropout=dict(lora_dropout=.1), use_dora=dict(use_dora=True), lora_r={}, init_lora_weights={}, trainable_params={}, init_seed={}, data_seed=dict(data_seed=7),
            lr_ratio=dict(loraplus_lr_ratio=4.), learning_rate=dict(use_peft=False), weight_decay=dict(weight_decay=.1), optim={}, optimized={}, schedule={}, gradient_checkpointing=dict(gradient_checkpointing=True),
            base_dtype={}, compute_dtype=dict(load_in_4bit=True, bnb_4bit_compute_dtype='bfloat16'))

@pytest.mark.parametrize('what', LOST)
def test_an_argument_that_got_lost_is_caught(what, examples):
    loop = loop_of(examples, **LOST[what])
    check_applied(loop)
    undo(loop, what)
    with pytest.raises(Unapplied, match=f'^{what}: asked for .* the argument did not act'): check_applied(loop)

def test_packed_examples_that_see_each_other_are_caught(examples):
    loop = loop_of(examples, packing=True)
    forward = loop.model.base_model.model.forward
    loop.model.base_model.model.forward = lambda *a, attention_mask=None, **kw: forward(*a, **kw) # an architecture that ignores the mask it is given
    with pytest.raises(Unapplied, match='^packing: 3 examples'): check_applied(loop)

# --- what each argument does

def test_checkpointed_and_packed_training_learn_what_plain_training_does(examples):
    plain, again, packed = (train(loop_of(examples, lora_dropout=d, **how)) for d, how in ((.1, {}), (.1, dict(gradient_checkpointing=True)), (0., dict(packing=True))))
    assert plain.history['train'] == again.history['train'] # dropout's draws included
    bare = train(loop_of(examples))
    assert [a['loss'] for a in packed.history['train']] == pytest.approx([b['loss'] for b in bare.history['train']], rel=1e-4)
    assert sum(b['input_ids'].numel() for b in micro_batches(packed, 0)) < sum(b['input_ids'].numel() for b in micro_batches(bare, 0))

def test_checkpointing_computes_each_layer_twice(examples):
    for on, times in ((False, 1), (True, 2)):
        loop, calls = loop_of(examples, max_steps=1, gradient_checkpointing=on), []
        loop.model.get_submodule('base_model.model.model.layers.1.mlp').register_forward_pre_hook(lambda *_: calls.append(1))
        train(loop)
        assert len(calls) == times

def test_seeds_are_separate(examples):
    loops = [loop_of(examples, **s) for s in (dict(seed=1), dict(seed=2, init_seed=1), dict(seed=2, data_seed=1), dict(seed=2))]
    first = [next(iter(adapter_layers(l.model).values())).lora_A['default'].weight for l in loops]
    order = [micro_batches(l, 0)[0]['input_ids'].tolist() for l in loops]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3]) and not torch.equal(first[0], first[2])
    assert order[0] == order[2] != order[1] == order[3]

def test_lora_plus_moves_b_faster(examples):
    moved = {}
    for ratio in (1., 8.):
        loop = train(loop_of(examples, max_steps=1, lr_scheduler_type='constant', loraplus_lr_ratio=ratio))
        moved[ratio] = max(p.abs().max().item() for n, p in loop.model.named_parameters() if 'lora_B' in n) # B starts at zero, and Adam's first step is the learning rate
    assert moved[1.] == pytest.approx(2e-3, rel=1e-3) and moved[8.] == pytest.approx(8*2e-3, rel=1e-3)

def test_eight_bit_moments_are_eight_bit_and_resume(examples, tmp_path):
    how = dict(optim='adamw_8bit', lr_scheduler_type='cosine', max_steps=6)
    straight = train(loop_of(examples, **how))
    states = {s['state1'].dtype for p, s in straight.optimizer.state.items() if p.numel() >= 4096}
    assert states == {torch.uint8}
    train(loop_of(examples, **how), (), tmp_path, save_steps=1, stop_at=3)
    resumed = train(loop_of(examples, **how), (), tmp_path)
    assert resumed.resumed_at == 3 and resumed.history == straight.history and all(torch.equal(a, b) for a, b in zip(resumed.params, straight.params))

def test_weight_decay_shrinks(examples):
    plain, shrunk = (train(loop_of(examples, max_steps=1, lr_scheduler_type='constant', weight_decay=w)) for w in (0., 10.))
    a, b = (next(p for n, p in l.model.named_parameters() if 'lora_A' in n) for l in (plain, shrunk))
    start = next(p for n, p in loop_of(examples).model.named_parameters() if 'lora_A' in n)
    torch.testing.assert_close(a - b, 10*2e-3*start)

def test_biases_train_and_only_they_do():
    for how, some in ((dict(bias='all'), {'transformer.h.0.ln_1.bias', 'transformer.h.3.attn.c_attn.bias'}), (dict(bias='lora_only', lora_target_modules='o'), {'transformer.h.0.attn.c_proj.bias'})):
        run = Run(lora_r=2, **how)
        model = add_adapter(build('gpt2'), run)
        live = check_adapted(model, run)
        assert some <= set(live['biases'].split()) and ('ln_1' in live['biases']) == (run.bias == 'all')
        frozen = base_checksum(model)
        for n, p in model.named_parameters(): p.data += .1 if p.requires_grad else 0
        assert base_checksum(model) == frozen

@pytest.mark.parametrize('how', [dict(init_lora_weights='pissa'), dict(init_lora_weights='olora', use_rslora=True), dict(lora_target_modules='q,v,head'), dict(use_dora=True)], ids=str)
def test_a_saved_adapter_belongs_to_the_original_base(how, examples, tmp_path):
    from peft import PeftModel
    from safetensors import safe_open
    loop = train(loop_of(examples, **how))
    save_adapter(loop.model, tmp_path, loop.run)
    with safe_open(tmp_path/'adapter_model.safetensors', 'pt') as f: assert all('lora_' in k for k in f.keys()) # an adapted head does not take its base with it
    there = PeftModel.from_pretrained(load_base(loop.run, CPU), str(tmp_path)).eval()
    ids = torch.arange(20, 60)[None]
    with torch.no_grad(): here, there, base = loop.model(ids).logits, there(ids).logits, load_base(loop.run, CPU)(ids).logits
    torch.testing.assert_close(here, there, atol=2e-3, rtol=0)
    assert (here - base).abs().max() > .1

# --- study files

def test_alpha_follows_the_rank_and_budgets_choose_it():
    study = Study(name='s', shared=dict(lora_alpha='2r'), axes=dict(lora_r=[4, 8]))
    assert [(r.lora_r, r.lora_alpha) for r in expand(study)] == [(4, 8.), (8, 16.)]
    assert run_id(expand(study)[0]) == run_id(expand(Study(name='s', shared=dict(lora_r=4, lora_alpha=8)))[0])
    budget = lambda **how: expand(Study(name='s', shared=dict(lora_budget=110_000, lora_alpha='r') | how, axes=dict(lora_target_modules=['q,v', 'attention'] + ([] if how else ['feed-forward', 'all-linear']))))
    for run in budget() + budget(use_dora=True) + budget(layers_to_transform='last_half', lora_budget=60_000):
        assert run.lora_alpha == run.lora_r
        model = add_adapter(load_base(run, CPU), run)
        assert abs(count_parameters(model)['trainable_params']/(60_000 if run.layers_to_transform else 110_000) - 1) <= .03
    mixed = expand(Study(name='s', shared=dict(lora_budget=110_000), axes=dict(use_peft=[True, False])))
    assert [r.lora_r for r in mixed] == [8, Run().lora_r]

def test_planning_without_a_budget_imports_no_torch():
    code = "import sys; from lora_study.config import *; expand(Study(name='s', shared=dict(lora_alpha='2r'), axes=dict(lora_target_modules=['q,v']))); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'False\n'

REFUSED = {
    'rank above a side': (dict(lora_r=65), "lora_r = 65 exceeds k_proj's smaller side 64"),
    'budget too small': (dict(lora_budget=9000), "lora_budget = 9000: 'all-linear' has 13,568 parameters at rank 1"),
    'budget and rank': (dict(lora_budget=110_000, lora_r=8), 'lora_budget: chooses the rank, and lora_r is given too'),
    'alpha in words': (dict(lora_alpha='rr'), "lora_alpha = 'rr'"),
    'no such layers': (dict(layers_to_transform=[9]), 'the base has 4 layers, numbered 0 to 3'),
    'no such part': (dict(layers_to_transform='upper'), "layers_to_transform = 'upper': input should be 'first_half'"),
    'no such word': (dict(lora_target_modules='attention,experts'), "['experts'] not in the base: it has attention: k_proj"),
    'no bias': (dict(bias='all'), "bias = 'all': the base has no bias there"),
    'two precisions': (dict(load_in_4bit=True, load_in_8bit=True), 'load_in_4bit: true, and load_in_8bit too'),
    'whole and quantized': (dict(use_peft=False, load_in_4bit=True), 'use_peft: false on a quantized base'),
    'whole in float16': (dict(use_peft=False, dtype='float16'), 'use_peft: false with dtype float16'),
    'pissa on 4 bits': (dict(init_lora_weights='pissa', load_in_4bit=True), "init_lora_weights = 'pissa' with load_in_4bit"),
    'loftq on 8 bits': (dict(init_lora_weights='loftq', load_in_8bit=True), "init_lora_weights = 'loftq' with load_in_8bit"),
    'loftq without cuda': (dict(init_lora_weights='loftq'), "init_lora_weights = 'loftq': PEFT computes it on CUDA"),
    'pissa on a tied head': (dict(init_lora_weights='pissa', lora_target_modules='head'), 'changes the head, which is the input embeddings too'),
    'dora on 8 bits': (dict(use_dora=True, load_in_8bit=True), 'use_dora: true with load_in_8bit'),
    'dora with pissa': (dict(use_dora=True, init_lora_weights='pissa'), "use_dora: true with init_lora_weights = 'pissa'"),
    'paging without cuda': (dict(optim='paged_adamw_32bit'), "optim = 'paged_adamw_32bit': pages between the memories of a GPU"),
    'eight bits of nothing': (dict(optim='adamw_8bit', lora_r=4), 'keeps tensors below 4096 numbers in 32 bits'),
    'inverse root of nothing': (dict(lr_scheduler_type='inverse_sqrt'), "lr_scheduler_type = 'inverse_sqrt' counts in warm-up steps"),
    'constant with warm-up': (dict(lr_scheduler_type='constant', warmup_steps=5), "lr_scheduler_type = 'constant' has no warm-up"),
}

@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_is_refused_before_any_run(name):
    how, line = REFUSED[name]
    with pytest.raises(BadInput) as e: preflight(Study(name='s', shared=dict(train_size=16, test_size=8, validation_size=8) | how), 'cpu')
    assert line in str(e.value) and '\n' not in str(e.value)
