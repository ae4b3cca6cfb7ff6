"The fast engines against PEFT's own forward: same losses, same gradients, on every option they cover; where they do not cover one, they say so and step aside."
import pytest
import torch
from test_factors import SHAPE, ZOO, build
from conftest import TINY, shared
from lora_study import fast
from lora_study.config import BadInput, Run, sealed
from lora_study.data import collate, encode, load_splits
from lora_study.fast import Engine, Flat, find_engine, in_float64, layered
from lora_study.lora import add_adapter, make_trainable
from lora_study.model import Unapplied, load_base, load_tokenizer
from lora_study.packed import pack_runs, train_packed
from lora_study.sweep import run_point
from lora_study.train import Loop, check_applied, micro_batches, pack, summed_loss, train

CPU = torch.device('cpu')
FLAT = ('llama', 'mistral', 'qwen2', 'qwen3')

def loop_of(examples, **how):
    run = Run(**{**dict(max_steps=4, eval_steps=2, per_device_train_batch_size=4), **how})
    return Loop(run, make_trainable(load_base(run, CPU), run).train(), examples, 0)

def losses(loop): return [h['loss'] for h in loop.history['train']]
def adapter(loop): return torch.cat([p.detach().float().flatten() for p in loop.params])
def apart(a, b): return ((a - b).norm()/b.norm()).item()

def moved(model): # B off its zero, so that A has a gradient
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'lora_B' in n: p.normal_(std=.02)
    return model

def gradients(loop, batch, engine=None):
    loss = (engine or loop.engine).loss(loop.model, batch, summed_loss)
    return loss.item(), torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, loop.params)])

def peft(loop, batch): # the same parameters through PEFT's own forwards
    swapped = [m for m in loop.model.modules() if 'forward' in vars(m) and hasattr(m, 'lora_A')]
    kept = [vars(m).pop('forward') for m in swapped]
    try: return gradients(loop, batch, Engine('peft'))
    finally:
        for m, f in zip(swapped, kept): m.forward = f

def random_batch(seed=0, rows=3, longest=12, vocabulary=48):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([longest, longest//2, longest - 1][:rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(1, vocabulary, (rows, longest), generator=g)*mask
    labels = ids.masked_fill((mask == 0) | (torch.arange(longest) < 3), -100)
    return dict(input_ids=ids, labels=labels, attention_mask=mask)

# --- one run, against PEFT

def test_fifty_steps_lose_what_peft_loses(examples):
    how = dict(max_steps=50, learning_rate=1e-3, warmup_steps=5)
    plain, quick = (train(loop_of(examples, engine=e, **how)) for e in ('peft', 'fast'))
    assert quick.engine.kind == 'flat' and check_applied(quick)['engine'] == 'flat'
    assert losses(quick) == pytest.approx(losses(plain), rel=1e-5)
    assert apart(adapter(quick), adapter(plain)) < 1e-3 # Adam divides what rounding left of a gradient by its own size

def test_gradients_are_as_exact_as_peft_s(examples):
    loop = loop_of(examples, engine='fast')
    moved(loop.model)
    exact = type('Loop', (), dict(model=(model := in_float64(loop.model)), params=[p for p in model.parameters() if p.requires_grad]))
    ours, theirs = [], []
    for k in range(6):
        batch = micro_batches(loop, k)[0]
        (loss, quick), (same, plain), (_, truth) = gradients(loop, batch), peft(loop, batch), gradients(exact, batch, Engine('peft'))
        assert loss == pytest.approx(same, rel=1e-6) and apart(quick, plain) < 6e-6
        ours.append(apart(quick, truth)); theirs.append(apart(plain, truth))
    assert sum(ours) < 1.2*sum(theirs) # as near to the float64 gradient as PEFT's float32 is, a few millionths; which of the two is nearer changes with the batch and the machine

@pytest.mark.parametrize('kind', [*FLAT, 'gpt2', 'opt', 'gpt_neox', 'phi'])
def test_without_rounding_the_gradients_are_peft_s(kind):
    "In float64 a mistake of a billionth would show"
    base = build(kind).requires_grad_(False)
    for n, p in base.named_parameters():
        if 'norm' in n and 'weight' in n: p.uniform_(.5, 1.5) # each norm its own
    model = in_float64(moved(add_adapter(base, Run(lora_r=2))).eval())
    if kind in FLAT: engine = Engine('flat', flat=Flat([model]))
    else: engine = Engine('layers', logits=fast.scored_logits); assert layered(model)[0]
    loop = type('Loop', (), dict(model=model, engine=engine, params=[p for p in model.parameters() if p.requires_grad]))
    (a, quick), (b, plain) = gradients(loop, random_batch()), peft(loop, random_batch())
    assert a == pytest.approx(b, rel=1e-13) and apart(quick, plain) < 1e-13

@pytest.mark.parametrize('how', [dict(packing=True), dict(gradient_accumulation_steps=2), dict(gradient_checkpointing=True), dict(use_rslora=True, lora_target_modules='q,v'), dict(layers_to_transform='last_half'),
    dict(lora_target_modules='feed-forward', completion_only_loss=False), dict(init_lora_weights='pissa')], ids=str)
def test_options_on_the_flat_path(examples, how):
    plain, quick = (train(loop_of(examples, engine=e, **how)) for e in ('peft', 'fast'))
    assert quick.engine.kind == 'flat'
    assert losses(quick) == pytest.approx(losses(plain), rel=1e-5)

@pytest.mark.parametrize('how, kind', [(dict(lora_dropout=.2), 'layers'), (dict(lora_dropout=.2, gradient_checkpointing=True), 'layers'), (dict(lora_target_modules='q,head'), 'layers'), (dict(use_dora=True), 'peft'), (dict(use_peft=False), 'peft')], ids=str)
def test_options_beside_it_take_the_next_best_way_and_say_why(examples, how, kind):
    plain, quick = (train(loop_of(examples, engine=e, max_steps=2, **how)) for e in ('peft', 'auto'))
    assert quick.engine.kind == kind and quick.engine.note and check_applied(quick)['engine_note'] == quick.engine.note
    assert losses(quick) == pytest.approx(losses(plain), rel=1e-5) # dropout too: its masks are drawn in the same order
    if kind == 'peft':
        with pytest.raises(BadInput, match="engine = 'fast': not for this run"): loop_of(examples, engine='fast', **how)

@pytest.mark.parametrize('kind', [k for k in ZOO if k not in ('bert', 'roberta')])
def test_every_architecture_has_an_engine_that_gives_peft_s_gradients(kind):
    run, batch = Run(lora_r=2, engine='auto'), random_batch()
    model = moved(add_adapter(build(kind).requires_grad_(False), run)).train()
    engine = find_engine(run, model, random_batch(1), summed_loss)
    assert engine.kind == ('flat' if kind in FLAT else 'layers'), engine.note
    model.eval() # some have a dropout of their own
    loop = type('Loop', (), dict(model=model, engine=engine, params=[p for p in model.parameters() if p.requires_grad]))
    (a, quick), (b, plain) = gradients(loop, batch), peft(loop, batch)
    assert a == pytest.approx(b, rel=1e-6) and apart(quick, plain) < 1e-5

@pytest.mark.parametrize('how', [dict(load_in_4bit=True), dict(load_in_4bit=True, bnb_4bit_use_double_quant=True, lora_dropout=.1), dict(load_in_8bit=True), dict(load_in_8bit=True, lora_dropout=.1)], ids=str)
def test_a_quantized_base(examples, how):
    loop = loop_of(examples, engine='fast', **how)
    moved(loop.model).eval()
    assert loop.engine.kind == ('layers' if 'lora_dropout' in how or 'load_in_8bit' in how else 'flat'), loop.engine.note
    batch = micro_batches(loop, 0)[0]
    (a, quick), (b, plain) = gradients(loop, batch), peft(loop, batch)
    assert a == pytest.approx(b, rel=1e-5) and apart(quick, plain) < 1e-4

def test_bfloat16_stays_within_its_rounding(examples):
    exact = loop_of(examples, engine='peft')
    loop = loop_of(examples, engine='fast', dtype='bfloat16')
    for m in (exact, loop): moved(m.model)
    assert {p.dtype for p in loop.params} == {torch.float32} and loop.model.dtype == torch.bfloat16
    batch = micro_batches(loop, 0)[0]
    (_, truth), (_, quick), (_, plain) = gradients(exact, batch), gradients(loop, batch), peft(loop, batch)
    assert apart(quick, truth) < 1.5*apart(plain, truth) # no further from float32 than PEFT's bfloat16 is

def test_the_shared_model_takes_the_flat_path():
    run = Run(model_name_or_path=str(shared('models/stories260K')), train_size=8, engine='fast', max_length=200)
    rows = encode(load_splits(run).train, load_tokenizer(run), run.max_length)[0]
    loop = Loop(run, make_trainable(load_base(run, CPU), run), rows, 0)
    assert check_applied(loop)['engine'] == 'flat'

# --- the way it is found

def test_a_path_that_computes_something_else_is_not_taken(examples, monkeypatch):
    monkeypatch.setattr(fast, 'rotate', lambda *a, **k: None) # positions lost
    loop = loop_of(examples, engine='auto')
    assert loop.engine.kind == 'layers' and 'gradients by' in loop.engine.note

def test_an_engine_that_got_lost_is_an_error(examples):
    loop = loop_of(examples, engine='auto', lora_dropout=.1)
    for m in loop.model.modules(): vars(m).pop('forward', None)
    with pytest.raises(Unapplied, match='engine: asked for layers, found peft'): check_applied(loop)

def test_finding_it_leaves_no_trace(examples):
    plain, quick = loop_of(examples, engine='peft'), loop_of(examples, engine='auto')
    assert torch.equal(adapter(plain), adapter(quick)) and all(p.grad is None for p in quick.params)
    assert Loop(quick.run, quick.model, examples, 0).engine is quick.engine # a probe's loop asks again

def test_a_resumed_run_goes_on_to_the_same_bits(examples, tmp_path):
    straight = train(loop_of(examples, engine='fast'))
    train(loop_of(examples, engine='fast'), checkpoints=tmp_path, save_steps=2, stop_at=2)
    resumed = train(loop_of(examples, engine='fast'), checkpoints=tmp_path)
    assert resumed.resumed_at == 2 and resumed.history == straight.history and torch.equal(adapter(resumed), adapter(straight))

def test_a_point_records_what_computed_its_steps(folder):
    record, home = run_point(sealed(Run(**TINY, engine='fast', dtype='bfloat16')), 'a', 'fast', folder)
    assert record.provenance['applied_engine'] == 'flat' and record.provenance['applied_engine_note'] == ''
    assert (home/'adapter/adapter_model.safetensors').is_file()

# --- several runs on one base

@pytest.mark.parametrize('how', [dict(), dict(load_in_4bit=True), dict(gradient_checkpointing=True)], ids=str)
def test_runs_trained_together_end_as_they_would_alone(examples, how):
    base = dict(max_steps=3, per_device_train_batch_size=2, eval_steps=9, adam_epsilon=1e-5, **how) # Adam's own 1e-8 makes steps of what rounding left of a gradient that is zero
    runs = [Run(**base), Run(**base | dict(lora_r=3, lora_target_modules='q,v,o', seed=1, learning_rate=1e-3, max_steps=2)), Run(**base | dict(learning_rate=1e30, seed=2))]
    together = train_packed(pack_runs(runs, load_base(runs[0], CPU), [examples]*3, 0))
    assert list(together.failed) == [2] and 'lower learning_rate' in together.failed[2]
    for l, run in zip(together.loops, runs[:2]):
        alone = train(Loop(run, add_adapter(load_base(run, CPU), run), examples, 0))
        if how.get('gradient_checkpointing'): alone = train(loop_of(examples, **run.model_dump(exclude_defaults=True)))
        assert losses(l) == pytest.approx(losses(alone), rel=1e-5) and apart(adapter(l), adapter(alone)) < 1e-5
