"What a plan says: exact counts, memory that moves the right way and agrees with what was measured, mistakes in one line."
import json
from dataclasses import replace
from statistics import median
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from conftest import ROOT, cli
from lora_study import tracker
from lora_study.config import BadInput, Run, expand, read_study
from lora_study.forecast import calibration, finished, timed
from lora_study.lora import adapter_config, chosen_layers
from lora_study.memory import LEVELS, activations, adapter_kept, against_published, at_peak, card, constants, devices, layer_kept, predicted, step_of, verdict, weights
from lora_study.model import linear_layers, load_base, weight_bytes
from lora_study.shapes import FAMILIES, adapted, built_shape, config_of, presets, shape, shape_of, trainable

SHAPE = dict(vocab_size=96, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXTRA = dict(gemma=dict(head_dim=32), gemma2=dict(head_dim=32), gemma3_text=dict(head_dim=32), qwen3=dict(head_dim=32), gpt2=dict(n_inner=160, num_key_value_heads=4), gpt_neox=dict(num_key_value_heads=4))

def config(kind): return AutoConfig.for_model(kind, **(SHAPE | EXTRA.get(kind, {})))

def skeleton_of(kind):
    with torch.device('meta'): return AutoModelForCausalLM.from_config(config(kind))

# --- counts

@pytest.mark.parametrize('kind', FAMILIES)
def test_the_arithmetic_gives_the_model_transformers_builds(kind):
    model, base = skeleton_of(kind), shape(config(kind).to_dict())
    assert base.parameters == sum(p.numel() for p in model.parameters())
    same = lambda layers: [(l.name, l.layer, l.inside, l.inputs, l.outputs, l.bias, l.kind) for l in layers]
    assert sorted(same(base.linear), key=str) == sorted(same(linear_layers(model)), key=str)
    built = built_shape(model)
    assert (built.parameters, built.q, built.k, built.ffn, built.tied) == (base.parameters, base.q, base.k, base.ffn, base.tied)

@pytest.mark.parametrize('kind', FAMILIES)
def test_trainable_counts_are_pefts(kind):
    base, biased = shape(config(kind).to_dict()), any(l.bias for l in linear_layers(skeleton_of(kind)) if l.layer is not None)
    for how in (dict(), dict(lora_target_modules='attention'), dict(lora_target_modules='feed-forward', use_dora=True), dict(lora_target_modules='q,k,v', layers_to_transform='last_half'),
                dict(lora_target_modules='all-linear,head'), *([dict(bias='all'), dict(bias='lora_only', lora_target_modules='attention')] if biased else [])):
        run, model = Run(lora_r=3, **how), skeleton_of(kind)
        assert [l.name for l in chosen_layers(run, model)] == sorted([l.name for l in adapted(run, base)], key=[l.name for l in linear_layers(model)].index)
        peft = get_peft_model(model, adapter_config(run, model))
        assert trainable(run, base) == peft.get_nb_trainable_parameters()[0], how
    assert trainable(Run(use_peft=False), base) == base.parameters

def test_a_family_the_arithmetic_does_not_know_is_built(tmp_path):
    c = AutoConfig.for_model('opt', **(SHAPE | dict(ffn_dim=160, word_embed_proj_dim=64)))
    (tmp_path/'config.json').write_text(json.dumps(c.to_dict()))
    run = Run(model_name_or_path=str(tmp_path), lora_r=3, max_length=64)
    assert shape_of(run).parameters == sum(p.numel() for p in skeleton_of_config(c).parameters())
    assert trainable(run, shape_of(run)) == get_peft_model(skeleton_of_config(c), LoraConfig(r=3, target_modules='all-linear', task_type='CAUSAL_LM')).get_nb_trainable_parameters()[0]
    assert predicted(run)['predicted_peak_expected_bytes'] > 0

def skeleton_of_config(c):
    with torch.device('meta'): return AutoModelForCausalLM.from_config(c)

# --- memory

HOW = {'float32': dict(dtype='float32'), 'bfloat16': dict(dtype='bfloat16'), 'int8': dict(load_in_8bit=True), 'nf4': dict(load_in_4bit=True), 'double': dict(load_in_4bit=True, bnb_4bit_use_double_quant=True)}

@pytest.mark.parametrize('name', HOW)
def test_weights_and_constants_are_what_a_loaded_base_holds(name):
    run = Run(**HOW[name])
    step = step_of(run, device='cpu')
    assert weights(step) + constants(step) == pytest.approx(weight_bytes(load_base(run, torch.device('cpu'))), rel=1e-3) # the rest are buffers

def kept_bytes(model, rows, length):
    "What autograd holds after a forward pass, parameters left out"
    own, held = {p.untyped_storage()._cdata for p in model.parameters()}, {}
    def pack(t):
        s = t.untyped_storage()
        if s._cdata not in own: held[s._cdata] = s
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = model(input_ids=torch.randint(3, 96, (rows, length)), use_cache=False).logits
    return sum(s.nbytes() for s in held.values())

KEPT = ['llama', 'qwen3', 'phi3', 'gemma', 'gpt_neox', 'phi']

@pytest.mark.parametrize('kind', KEPT)
@pytest.mark.parametrize('how', ['q,k,v', 'feed-forward', 'whole'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_layer_keeps_what_the_formula_says(kind, how, dtype):
    rows, length, grow = 2, 32, []
    for layers in (2, 4): # the difference leaves out what is outside the stack
        c = config(kind); c.num_hidden_layers = layers; c.use_cache = False
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(c).to(getattr(torch, dtype))
        run = Run(lora_r=4, dtype=dtype, use_peft=how != 'whole', lora_target_modules=how if how != 'whole' else 'all-linear', per_device_train_batch_size=1, max_length=rows*length)
        if run.use_peft: model = get_peft_model(model, adapter_config(run, model))
        s = replace(step_of(run, shape(c.to_dict()), 'cpu'), adapter=4)
        grow.append((kept_bytes(model.train(), rows, length), activations(s)))
    measured, said = grow[1][0] - grow[0][0], grow[1][1] - grow[0][1]
    assert said == pytest.approx(measured, rel=.08)

BASES = ['meta-llama/Llama-3.2-1B', 'microsoft/phi-2', 'google/gemma-2-2b', 'openai-community/gpt2', 'Qwen/Qwen3-4B', 'EleutherAI/pythia-410m', 'microsoft/Phi-3-mini-4k-instruct']

@pytest.mark.parametrize('name', BASES)
def test_more_never_needs_less(name):
    base, common = shape_of(Run(model_name_or_path=name)), dict(model_name_or_path=name, max_length=512, per_device_train_batch_size=4)
    peaks = lambda device='cuda', **how: [at_peak(step_of(Run(**{**common, **how}), base, device), at)['peak'] for at in LEVELS]
    for device in ('cuda', 'cpu'):
        assert all(a < b for a, b in zip(*[iter(peaks(device))]*2))
        for argument, values in dict(lora_r=[2, 8, 64], per_device_train_batch_size=[1, 2, 16], max_length=[128, 512, 2048]).items():
            for how in (dict(), dict(gradient_checkpointing=True), dict(load_in_4bit=True), dict(lora_target_modules='attention'), dict(gradient_accumulation_steps=2)):
                each = [peaks(device, **how, **{argument: v}) for v in values]
                assert all(x <= y for a, b in zip(each, each[1:]) for x, y in zip(a, b)), (argument, how)
    for how in (dict(), dict(use_peft=False, dtype='bfloat16'), dict(load_in_4bit=True)):
        plain, again = (step_of(Run(**common, **how, gradient_checkpointing=g), base) for g in (False, True))
        assert all(activations(again, at) <= activations(plain, at) for at in LEVELS)
    sizes = [weights(s) + constants(s) for how in (dict(load_in_4bit=True, bnb_4bit_use_double_quant=True), dict(load_in_4bit=True), dict(load_in_8bit=True), dict(), dict(dtype='float32')) for s in [step_of(Run(**common, **how), base)]]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5
    assert peaks()[1] < peaks(use_peft=False, dtype='bfloat16')[1] < peaks(use_peft=False, dtype='float32')[1]

def test_errors_against_published_peaks_stay_within_bounds():
    rows = against_published()
    assert len(rows) == 19 and {r['source'] for r in rows} == {'PEFT', 'torchtune', 'litgpt', 'fitcheck-llm'}
    assert median(abs(r['error']) for r in rows) < .06
    assert median(r['calibrated'] for r in rows if r['calibrated'] is not None) < .04
    assert max(abs(r['error']) for r in rows if r['source'] != 'torchtune') < .08 # torchtune's rows also compile

def test_a_verdict_has_its_margins():
    assert [verdict(1, 2, h, 10) for h in (9.4, 9.6)] == ['fits', 'tight'] and verdict(1, 10.1, 11, 10) == 'does not fit'
    assert card('RTX 4090')[1] == devices()['RTX 4090'] and card('nvidia h100') == ('H100', devices()['H100']) and card('16GiB')[1] == 16*2**30
    for bad in ('A100', 'RTX 4900', '24', ''):
        with pytest.raises(BadInput, match='gpu = '): card(bad)

# --- the command

def test_the_quick_study_has_a_plan(folder):
    said = cli('plan', ROOT/'studies/quick.yaml', '--gpu', 'RTX 4090', '--price', 1, '--parts')
    assert said.returncode == 0, said.stderr
    first = next(l for l in said.stdout.splitlines() if l.startswith('lora_r=1 '))
    assert '13,568' in first and ' fits ' in first and 'activations' in said.stdout and 'no measured step' in said.stdout
    assert said.stdout.splitlines()[-1] == 'quick: 6 runs, 0 done, 6 to do'

def test_what_ran_calibrates_and_times_what_did_not(folder):
    assert cli('import', ROOT/'results/quick/records.jsonl').returncode == 0
    said = cli('plan', ROOT/'studies/quick.yaml', '--set', 'seeds=[0, 1, 2]', '--set', 'axes={lora_r: [1, 64]}', '--price', 10)
    assert said.returncode == 0, said.stderr
    cells = {l.split()[0]: l for l in said.stdout.splitlines() if l.startswith('lora_r=')}
    assert 'calibrated on 6 finished runs' in said.stdout and 'at 10 an hour' in said.stdout
    assert '2/3' in cells['lora_r=1'] and 'same setting' in cells['lora_r=1'] and '0/3' in cells['lora_r=64'] and 'scaled by tokens' in cells['lora_r=64']

def test_runs_made_with_fewer_rows_at_a_time_teach_what_they_are(folder):
    "A batch that did not fit was divided: its peak and its time are not those of the whole batch"
    study = read_study(ROOT/'studies/quick.yaml')
    made = [dict((name, value) for name, _, value in json.loads(l)['metrics']) for l in (ROOT/'results/quick/records.jsonl').read_text().splitlines()]
    run, expects = next(r for r in expand(study) if r.lora_r == 4), lambda r: predicted(r, device='cpu', length=int(made[0]['predicted_length']))['predicted_peak_expected_bytes']
    less = expects(run.model_copy(update=dict(per_device_train_batch_size=4, gradient_accumulation_steps=8)))/expects(run)
    def learnt(*divided): # ranks made with 4 rows at a time: as much less memory as is expected of them, a third of the speed
        lines, by = [json.loads(l) for l in (ROOT/'results/quick/records.jsonl').read_text().splitlines()], dict(probe_peak_rss_bytes=less, step_s=3, tok_s=1/3, train_s=3)
        for l in lines:
            if l['config']['lora_r'] in divided: l['provenance']['micro_batch'], l['metrics'] = 4, [(name, step, value*by.get(name, 1)) for name, step, value in l['metrics']]
        (folder/'records.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
        db = tracker.open_db(':memory:'); tracker.import_records(db, folder/'records.jsonl')
        rows = finished(db)
        return calibration(run, rows, 'cpu')[0], {r: timed(run.model_copy(update=dict(lora_r=r)), rows, '', 'cpu') for r in (4, 64)}
    (ratio, time), (_, one), (same, every) = learnt(), learnt(4), learnt(1, 4, 16)
    assert less < .95 and same == pytest.approx(ratio, rel=.01)
    assert one[64]['step_s'] == pytest.approx(time[64]['step_s'], rel=.1) and one[64]['how'] == 'scaled by tokens'
    assert one[4]['step_s'] == pytest.approx(3*time[4]['step_s']) and one[4]['how'] == 'same setting, fewer rows at a time'
    assert every[64]['how'] == 'scaled by tokens, fewer rows at a time'

def test_every_recommended_model_has_a_plan_by_name():
    import yaml
    for m in yaml.safe_load((ROOT/'studies/models.yaml').read_text()):
        base = shape_of(Run(model_name_or_path=m['model_name_or_path']))
        assert f'{base.parameters/1e9:.1f} B' == m['parameters'] or abs(base.parameters/1e9 - float(m['parameters'].split()[0])) < .06, m

@pytest.mark.parametrize('args, parts', [(['plan'], ['expected a study file, or --max-memory and --model together']), (['plan', ROOT/'studies/quick.yaml', '--gpu', 'RTX 4900'], ["gpu = 'RTX 4900'", 'RTX 4090']),
    (['plan', '--max-memory', '8GB', '--model', 'meta-llama/Llama-3.2-5B'], ["'meta-llama/Llama-3.2-5B'", 'nearest: ', 'Llama-3.2-']), (['plan', '--max-memory', 'eight', '--model', 'gpt2'], ["gpu = 'eight'"]),
    (['plan', ROOT/'studies/quick.yaml', '--set', 'model_name_or_path=Qwen/Qwen2.5-8B'], ['Qwen/Qwen2.5-7B'])])
def test_a_name_nobody_knows_is_one_line(folder, args, parts):
    said = cli(*args)
    assert said.returncode == 2 and len(said.stderr.splitlines()) == 1, said.stdout + said.stderr
    for p in parts: assert p in said.stderr
