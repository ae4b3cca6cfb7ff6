"What a parent makes ready, and what the first point measures for all, changes no number."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from conftest import cli, command
from lora_study import tracker

STUDY = 'train_size: 64\nvalidation_size: 8\ntest_size: 8\ngenerate_size: 2\nmax_new_tokens: 4\nmax_steps: 3\neval_steps: 3\nlora_dropout: .1\nforgetting_dataset_name: embedded\nforgetting_size: 8\naxes:\n  lora_r: [2, 4]\nseeds: [0]\n'

def measured(folder, monkeypatch, warm, more=''): # run id → what no clock and no memory decides; each run's provenance
    folder.mkdir(); monkeypatch.chdir(folder); monkeypatch.setenv('LORA_STUDY_WARM', warm)
    Path('tiny.yaml').write_text(STUDY + more)
    done = cli('run', 'tiny.yaml')
    assert done.returncode == 0, done.stdout + done.stderr
    records = [tracker.read_record(f) for f in sorted(Path('results/tiny/runs').glob('*/final/record.json'))]
    timed = ('_s', '_bytes', 'tok_s', 'probe_', 'predicted_', 'time_')
    plain = {r.run_id: dict(metrics={k: v for k, v in r.metrics.items() if not k.endswith(timed) and not k.startswith(timed)}, curves=r.curves, scores=r.scores, adapter=r.adapter) for r in records}
    return plain, [r.provenance for r in records]

def test_points_of_a_warm_parent_measure_what_fresh_kernels_measure(tmp_path, monkeypatch):
    fresh, by_fresh = measured(tmp_path/'fresh', monkeypatch, '0')
    warm, by_warm = measured(tmp_path/'warm', monkeypatch, '')
    assert len(fresh) == 2 and json.dumps(warm, sort_keys=True) == json.dumps(fresh, sort_keys=True)
    assert len({p['base_scored_by'] for p in by_warm}) == 1 # the base was scored once
    assert [p['prepared_s'] > 0 for p in by_warm] == [True]*2 and [p['prepared_s'] for p in by_fresh] == [0]*2 # the parent had made it ready, and a fresh kernel had none
    assert len(list((tmp_path/'warm'/'results'/'tiny'/'base').glob('base-*.json'))) == 1

def test_without_diagnostics_a_point_measures_the_same_quality_and_the_report_says_so(tmp_path, monkeypatch):
    whole, _ = measured(tmp_path/'whole', monkeypatch, '')
    light, by = measured(tmp_path/'light', monkeypatch, '', 'diagnostics: false\n')
    for rid, r in light.items():
        assert (r['curves'], r['scores'], r['adapter']) == (whole[rid]['curves'], whole[rid]['scores'], [])
        assert r['metrics'] == {k: v for k, v in whole[rid]['metrics'].items() if k in r['metrics']}
        assert not [k for k in r['metrics'] if k.startswith(('drift_', 'merge', 'adapter_'))] and r['metrics']['test_nll'] > 0
    page = (tmp_path/'light'/'results'/'tiny'/'RESULTS.md').read_text()
    assert 'come from the training itself' in page and 'warm probe' not in page and 'the fastest inference' not in page and 'not measured for any of them: a generated token' in page
    assert [p['diagnostics'] for p in by] == [False]*2

DRIVER = "import atexit, sys; atexit.register(lambda: print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])); from lora_study import cli; sys.argv[1:] = ['run', 'tiny.yaml', '--workers', '2']; cli.main()"

def test_who_drives_a_study_imports_no_torch(tmp_path, monkeypatch):
    "The look at the study, the workers and the report are forked from the warm parent"
    monkeypatch.chdir(tmp_path)
    Path('tiny.yaml').write_text(STUDY)
    done = subprocess.run([sys.executable, '-c', DRIVER], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith('[]\n') and '2 runs done, 0 failed' in done.stdout, done.stdout + done.stderr
    assert 'Debugger' not in done.stderr and Path('results/tiny/report.html').is_file()

def test_a_run_that_starts_at_its_base_begins_with_the_base_s_loss_and_others_with_their_own(tmp_path, monkeypatch):
    measured(tmp_path/'begins', monkeypatch, '', 'init_lora_weights: pissa\n')
    records = [tracker.read_record(f) for f in Path('results/tiny/runs').glob('*/final/record.json')]
    ours, _ = measured(tmp_path/'plain', monkeypatch, '', 'diagnostics: false\n')
    begun = {r['curves']['validation'][0]['nll'] for r in ours.values()}
    assert len(begun) == 1 and all(r.curves['validation'][0]['nll'] not in begun for r in records) # PiSSA's base is rounded anew
    shared = json.loads(next(Path('results/tiny/base').glob('base-*.json')).read_text())
    assert begun == {shared['validation_nll']}

BESIDE_GPU = """import json, sys, torch
torch.backends.cuda.is_built, torch.cuda._device_count_nvml, touched = lambda: True, lambda: 1, []
torch._C._cuda_getDeviceCount = torch._C._cuda_init = lambda: touched.append(1) or 1
from lora_study import preload, warm
for name in warm.import_first(): warm.import_one(name)
for chore in warm.chores(dict(train_size=16, validation_size=4, test_size=4)): chore()
print(json.dumps([[what for what, _ in preload.KEPT], touched, [m for m in ('peft', 'bitsandbytes', 'lora_study.train') if m in sys.modules], 'lora_study.report' in sys.modules]))"""

def test_beside_a_gpu_the_parent_keeps_tokens_and_touches_no_cuda():
    "NVML and CUDA are stood in for: what has called either of CUDA's cannot be forked"
    done = subprocess.run([sys.executable, '-c', BESIDE_GPU], capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout or 'null') == [['data'], [], [], True], done.stdout + done.stderr

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize('after', [.6, 5, 6.5]) # seconds: at its imports, looked at, at its first points
def test_a_study_stopped_before_its_first_run_is_done_leaves_no_process(tmp_path, monkeypatch, how, after):
    monkeypatch.chdir(tmp_path)
    Path('tiny.yaml').write_text(STUDY.replace('max_steps: 3', 'max_steps: 100000')); Path('tmp').mkdir() # hours
    driver = subprocess.Popen(command('run', 'tiny.yaml', '--workers', 2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=os.environ | dict(TMPDIR=str(tmp_path/'tmp')))
    seen, end = {}, time.monotonic() + after
    while time.monotonic() < end:
        seen |= {p.pid: p for p in psutil.Process(driver.pid).children(recursive=True)}
        time.sleep(.05)
    driver.send_signal(how)
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode in {signal.SIGINT: (130, -2), signal.SIGTERM: (143, -15), signal.SIGKILL: (-9,)}[how] and 'Traceback' not in said, said # −2: `python -m` ends so where text it executed, such as an import's dataclass, was interrupted; −15: before it listened
    _, left = psutil.wait_procs(seen.values(), 30)
    assert not left, [(p.pid, p.cmdline()) for p in left]
    if how == signal.SIGINT: assert not list(Path('tmp').glob('lora-*'))
