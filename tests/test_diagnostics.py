"What validation finds, what a point says of its adapter, and what mirrors may not do."
import importlib.util, json, struct, sys, types
from contextlib import contextmanager
from pathlib import Path
import pytest
import torch
from conftest import TINY
from typer.testing import CliRunner
from lora_study import validate
from lora_study.config import Run, run_id, sealed


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

@pytest.mark.fault(60)
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

@pytest.mark.fault(60)
def test_without_a_card_or_its_library_telemetry_is_blank(monkeypatch):
    from lora_study import profiler
    monkeypatch.setitem(sys.modules, 'pynvml', None) # not installed
    for device in (torch.device('cpu'), torch.device('cuda')):
        assert profiler.nvml_device(device) is None or torch.cuda.is_available()
    phases = profiler.Phases(torch.device('cpu'))
    with profiler.phase(phases, 'probe'): pass
    assert not any('energy' in k or 'gpu' in k for k in phases.metrics) and phases.metrics['probe_s'] >= 0

@pytest.fixture(scope='module')
def record(): # of a run that could be anyone's: three curves, one layer
    from lora_study.tracker import Record
    run = Run(max_steps=2)
    return Record(run_id=run_id(run), config=run.model_dump(), provenance=dict(device='cpu', load_average=None), metrics=dict(test_nll=1.5, train_s=2., merge_base_logit_relative=1e-7),
                  curves=dict(train=[dict(step=1, loss=3., learning_rate=.1), dict(step=2, loss=2., learning_rate=.05)], validation=[dict(step=0, nll=4.), dict(step=2, nll=1.6)]),
                  adapter=[dict(module='layers.0.q_proj', norm=.5, entropy_rank=3., r90=2, rank=8)], scores=dict(test=[]), started='2026-01-01T00:00:00+00:00', ended='2026-01-01T00:01:00+00:00')

@pytest.mark.parametrize('where', ['start', 'log', 'finish'])
@pytest.mark.fault(56)
def test_a_mirror_that_fails_is_a_warning_and_no_more(record, where):
    from lora_study import trackers
    def fail(*args, **kw): raise OSError('disk full')
    mirror = type(f'Broken_{where}', (), dict.fromkeys(('start', 'log', 'finish'), lambda *a, **kw: None) | {where: fail})()
    with pytest.warns(UserWarning, match=f'Broken_{where}: OSError: disk full'): assert not trackers.feed(record, mirror)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error') # a second warning would raise
        assert not trackers.feed(record, mirror)

def test_tensorboard_reads_back_what_a_run_said(record, tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed: pip install "lora_study[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from lora_study import trackers
    assert trackers.feed(record, trackers.TensorBoard(tmp_path))
    seen = EventAccumulator(str(tmp_path/record.run_id)).Reload()
    expected = {}
    for step, metrics in trackers.events(record):
        for k, v in metrics.items(): expected.setdefault(k, []).append((step, pytest.approx(v, rel=1e-6)))
    assert {t: [(e.step, e.value) for e in seen.Scalars(t)] for t in seen.Tags()['scalars']} == expected

def test_a_study_is_shown_to_a_mirror_from_the_database(tmp_path):
    from lora_study.cli import app
    from lora_study import tracker
    ask = lambda *args: CliRunner().invoke(app, ['mirror', *args, '--out', str(tmp_path/'out'), '--results', str(tmp_path)])
    tracker.import_records(tracker.open_db(tmp_path/'study.db'), Path(__file__).parent.parent/'results/quick/records.jsonl')
    unknown, missing = ask('quick', '--to', 'mlflow'), ask('slow', '--to', 'wandb')
    assert (unknown.exit_code, missing.exit_code) == (2, 2) and 'expected wandb or tensorboard' in unknown.output and 'no finished run' in missing.output
    shown = ask('quick', '--to', 'tensorboard')
    if importlib.util.find_spec('tensorboard') is None: assert shown.exit_code == 2 and 'pip install "lora_study[tensorboard]"' in shown.output
    else: assert shown.exit_code == 0 and len(list((tmp_path/'out').glob('*/events*'))) == 6

def logged(data, block=32768): # the records in a LevelDB log, which is what a .wandb file is behind its seven bytes of header
    at, parts = 7, []
    while at + 7 <= len(data):
        if block - at % block < 7: at += block - at % block; continue
        _, size, kind = struct.unpack('<IHB', data[at:at+7])
        parts.append(data[at+7:at+7+size]); at += 7 + size
        if kind in (1, 4): yield b''.join(parts); parts = [] # whole, or the last part

def test_wandb_keeps_a_run_offline(record, tmp_path):
    pytest.importorskip('wandb', reason='wandb is not installed: pip install "lora_study[wandb]"')
    from wandb.proto import wandb_internal_pb2
    from lora_study import trackers
    assert trackers.feed(record, trackers.Wandb(tmp_path))
    file, = tmp_path.glob(f'wandb/offline-run-*-{record.run_id}/*.wandb')
    seen = {}
    for data in logged(file.read_bytes()):
        r = wandb_internal_pb2.Record()
        r.ParseFromString(data)
        if r.WhichOneof('record_type') != 'history': continue
        row = {i.key or '/'.join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        seen[row.get('_step', r.history.step.num)] = {k: v for k, v in row.items() if not k.startswith('_')}
    assert seen == dict(trackers.events(record))
