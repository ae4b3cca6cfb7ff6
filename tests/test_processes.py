"What happens to a point's processes: whatever goes wrong is recorded and none is left. Real kernels on a point of milliseconds."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import nbformat, psutil, pytest
from conftest import ROOT
from short_point import short_point
from test_kill import heard, until
from lora_study import sweep, tracker
from lora_study.config import BadInput, Study, expand, run_id

LIGHT = 'ipykernel.kernelapp,lora_study.config'
CHILD = "\nimport subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'], start_new_session=True)\nopen('child', 'w').write(str(child.pid))\n"
silent = lambda line: None

@pytest.fixture
def light(folder, monkeypatch):
    "Kernels that start with little imported"
    from lora_study import warm
    if warm.PARENT: warm.PARENT.pop().close()
    monkeypatch.setenv('LORA_STUDY_WARM', LIGHT)
    yield folder
    if warm.PARENT: warm.PARENT.pop().close()

def rows(study): return tracker.frame(tracker.open_db('results/study.db'), study).set_index('seed')

def gone(pid):
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True

WRONG = CHILD.replace("'child'", "f'child{seed}'") + '''
import os, signal
class Diverged(Exception): pass
if seed == 1: x = bytearray(150 << 20); time.sleep(1.5); os.kill(os.getpid(), signal.SIGKILL)
if seed == 2: time.sleep(900)
if seed == 3 and not micro_batch: raise MemoryError('all of it')
if seed == 4: raise Diverged('loss = nan')
if seed == 5: raise RuntimeError('CUDA error: out of memory')
'''

@pytest.mark.fault(28, 29, 34)
def test_what_goes_wrong_in_a_point_is_recorded_and_the_others_go_on(light):
    said, study = [], Study(name='wrong', seeds=[0, 1, 2, 3, 4, 5])
    attempts = lambda *cells, **how: sweep.sweep(study, say=said.append, template=short_point('point.ipynb', *cells), timeout=6, **how)
    assert list(attempts(WRONG, retry_smaller=True).values()) == [True, False, False, True, False, False]
    df = rows('wrong')
    assert df.error_kind.loc[[1, 2, 4, 5]].tolist() == ['kernel_died', 'timeout', 'diverged', 'out_of_memory']
    assert 'SIGKILL' in df.error_message[1] and int(df.error_message[1].split(' MiB')[0].split()[-1]) > 200 # what it held, with the interpreter's own
    for s in (1, 2, 4, 5): assert '(cell 4 of 5: `import subprocess, sys, time`' in df.error_message[s]
    assert all(gone(int(Path(f'child{s}').read_text())) for s in range(6)) # in sessions of their own, of good runs and of bad ones
    # out of memory: the same run in smaller parts, and marked; or a failure with advice
    assert (df.run_id[3], df.per_device_train_batch_size[3], df.micro_batch[3], df.attempt[3]) == (run_id(expand(study)[3]), 16, 8, 1)
    assert 'with all 16 rows at once and with 8' in df.error_message[5] and 'max_length' in said[-1] and 'per_device_train_batch_size' in said[-1]
    # what the machine did is tried again; what the run did is data, until it is asked for
    assert list(attempts(WRONG)) == [df.label[1]]
    assert attempts(retry_failed=True) == {df.label[s]: True for s in (1, 2, 4, 5)}
    assert rows('wrong').attempt.tolist() == [1, 3, 2, 1, 2, 2]

STUDY = 'train_size: 32\nseeds: [0, 1]\n'

def driver(template, *args, **env): # the command line on a short point
    return subprocess.Popen([sys.executable, str(ROOT/'tests/short_point.py'), str(template), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            preexec_fn=heard, env=os.environ | dict(LORA_STUDY_WARM=LIGHT, PYTHONPATH=str(ROOT)) | env)

def begun(d, path='child'): # a point's cell has come so far
    until(lambda: Path(path).exists() and Path(path).read_text() or d.poll() is not None, 120)
    assert d.poll() is None, d.communicate()[0]

@pytest.mark.fault(32)
@pytest.mark.parametrize('warm', [LIGHT, '0'])
def test_processes_of_a_killed_driver_are_ended_and_only_those(light, warm):
    Path('left.yaml').write_text(STUDY)
    d = driver(short_point('hangs.ipynb', CHILD + 'time.sleep(900)'), 'run', 'left.yaml', LORA_STUDY_WARM=warm)
    begun(d)
    child, notes = int(Path('child').read_text()), lambda: list(Path('results/left/runs').glob('*/attempt-1/process.json'))
    until(lambda: notes() and child in [p for p, _ in json.loads(notes()[0].read_text())['processes']])
    d.kill(); d.wait()
    if warm == LIGHT: until(lambda: gone(child), 20) # the parent of the kernels ends what they started
    else:
        time.sleep(.5); assert not gone(child)
        told, other = json.loads(notes()[0].read_text()), subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'])
        told['processes'].append([other.pid, psutil.Process(other.pid).create_time() - 5]) # a number that has passed to another program
        notes()[0].write_text(json.dumps(told))
    said = []
    assert list(sweep.sweep(Study(name='left', shared=dict(train_size=32), seeds=[0, 1]), say=said.append, template=short_point('point.ipynb')).values()) == [True, True]
    assert gone(child)
    if warm == '0':
        assert 'left over' in said[0] and other.poll() is None
        other.kill(); other.wait()

TRAINING = CHILD + '''
from pathlib import Path
from lora_study.processes import can_be_asked, is_asked
can_be_asked(checkpoint_dir)
while not is_asked(checkpoint_dir): time.sleep(.05)
time.sleep(.5); Path(checkpoint_dir, 'saved').touch(); can_be_asked(checkpoint_dir, False)
time.sleep(900)
'''

@pytest.mark.fault(31)
def test_sigterm_waits_for_a_checkpoint_and_leaves_no_process(light):
    Path('left.yaml').write_text(STUDY)
    d = driver(short_point('trains.ipynb', TRAINING), 'run', 'left.yaml', '--save-steps', 1)
    begun(d)
    until(lambda: list(Path('results/left/runs').glob('*/checkpoints/training')))
    family = [psutil.Process(d.pid), *psutil.Process(d.pid).children(recursive=True)]
    d.terminate()
    said = d.communicate(timeout=60)[0]
    assert d.returncode == 143 and 'go on with `lora-study run left.yaml`' in said and 'last checkpoint' in said
    assert list(Path('results/left/runs').glob('*/checkpoints/saved'))
    until(lambda: all(gone(p.pid) for p in family), 20)
    assert rows('left').status.tolist() == ['waiting', 'waiting'] # the second was never claimed
    assert not list(Path('results').rglob('process.json'))

@pytest.mark.fault(31)
def test_a_second_signal_does_not_wait(light):
    Path('left.yaml').write_text(STUDY)
    deaf = CHILD + 'import signal\nfor s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n' + TRAINING.replace(CHILD, '').replace("time.sleep(.5); Path(checkpoint_dir, 'saved').touch(); can_be_asked(checkpoint_dir, False)", '')
    d = driver(short_point('deaf.ipynb', deaf), 'run', 'left.yaml', '--save-steps', 1)
    begun(d)
    until(lambda: list(Path('results/left/runs').glob('*/checkpoints/training')))
    family = [psutil.Process(d.pid), *psutil.Process(d.pid).children(recursive=True)]
    d.send_signal(signal.SIGINT); time.sleep(1) # it waits for a checkpoint that never comes
    assert d.poll() is None
    start = time.time(); d.terminate(); d.wait(15)
    assert d.returncode == 143 and time.time() - start < 10
    until(lambda: all(gone(p.pid) for p in family), 20)
    db = tracker.open_db('results/study.db')
    assert db.execute('pragma integrity_check').fetchone()[0] == 'ok'
    assert list(sweep.sweep(Study(name='left', shared=dict(train_size=32), seeds=[0, 1]), say=silent, template=short_point('point.ipynb')).values()) == [True, True]

@pytest.mark.fault(39)
def test_a_missing_kernel_is_named_before_anything_runs(light):
    Path('left.yaml').write_text(STUDY)
    nowhere = "import sys; sys.prefix, sys.modules['ipykernel.kernelspec'] = '/nowhere', None\nimport jupyter_core.paths as p; p.SYSTEM_JUPYTER_PATH = []\n" \
              "from types import SimpleNamespace as N; sys.modules['lora_study.planner'] = N(looked_at=lambda study, device: [])\nfrom lora_study import cli; cli.main()"
    r = subprocess.run([sys.executable, '-c', nowhere, 'run', 'left.yaml'], capture_output=True, text=True, timeout=120, env=os.environ | dict(JUPYTER_DATA_DIR='/nowhere', JUPYTER_PATH=''))
    assert r.returncode == 2 and 'kernel python3' in r.stderr and 'ipykernel install --sys-prefix --name python3' in r.stderr, r.stderr
    assert not Path('results/left').exists()

@pytest.mark.fault(40)
def test_a_template_that_is_not_a_point_is_refused_before_anything_runs(folder):
    nb = nbformat.read(short_point('point.ipynb'), 4)
    cell = next(c for c in nb.cells if 'lora_r' in c.source)
    cell.source = cell.source.replace('lora_r = 8\n', 'rank = 8\n')
    nbformat.write(nb, 'renamed.ipynb')
    with pytest.raises(BadInput, match=r"missing \['lora_r'\], unknown \['rank'\]"): sweep.sweep(Study(name='t', seeds=[0]), template='renamed.ipynb')
    cell.metadata.tags = []
    nbformat.write(nb, 'untagged.ipynb')
    with pytest.raises(BadInput, match='no cell is tagged parameters'): sweep.sweep(Study(name='t', seeds=[0]), template='untagged.ipynb')
    assert not Path('results').exists()

SLUGGISH = '''
import os, sys, time
from pathlib import Path
tries = Path('tries')
with tries.open('a') as f: f.write('x')
do = dict(enumerate(os.environ['KERNEL_STARTS'].split(','), 1)).get(len(tries.read_text()), 'starts')
if do == 'dies': sys.exit(3)
if do == 'hangs': time.sleep(900)
os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', *sys.argv[1:]])
'''

@pytest.mark.fault(41)
def test_a_kernel_that_does_not_start_is_tried_twice_more_and_costs_its_run_alone(folder, monkeypatch):
    spec = folder/'jupyter/kernels/python3/kernel.json'
    spec.parent.mkdir(parents=True)
    (folder/'start.py').write_text(SLUGGISH)
    spec.write_text(json.dumps(dict(argv=[sys.executable, str(folder/'start.py'), '-f', '{connection_file}'], display_name='sluggish', language='python')))
    for k, v in dict(JUPYTER_PATH=str(folder/'jupyter'), LORA_STUDY_WARM='0', KERNEL_STARTS='dies,dies,dies,dies').items(): monkeypatch.setenv(k, v)
    tried = sweep.sweep(Study(name='slow', seeds=[0, 1]), say=silent, template=short_point('point.ipynb'))
    assert list(tried.values()) == [False, True] and Path('tries').read_text() == 'x'*5
    row = rows('slow').loc[0]
    assert row.error_kind == 'no_kernel' and '3 tries' in row.error_message
    Path('tries').unlink(); monkeypatch.setenv('KERNEL_STARTS', 'hangs')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('6*7')], metadata=dict(kernelspec=dict(name='python3', display_name='', language='python')))
    sweep.execute(nb, folder/'out.ipynb', {}, start_timeout=5)
    assert Path('tries').read_text() in ('xx', 'xxx') and '42' in (folder/'out.ipynb').read_text()

KILLED = "import time; time.sleep({:.2f})"
DRIVER = "import sys\nfrom lora_study.config import Study\nfrom lora_study.sweep import sweep\nsweep(Study(name='kills', seeds=list(range(int(sys.argv[2])))), template=sys.argv[1])"

def of(d): # a driver's processes: all, kernels
    try: p = psutil.Process(d.pid); near, below = p.children(), p.children(recursive=True)
    except psutil.NoSuchProcess: return [], []
    return [p, *below], [k for k in below if k not in near]

@pytest.mark.slow
@pytest.mark.fault(30)
def test_fifty_kills_of_driver_kernel_or_both_lose_nothing_and_repeat_nothing(light):
    rng, kills, seen, hit = random.Random(1), 0, set(), 0
    template = short_point('point.ipynb', KILLED.format(.2))
    db = tracker.open_db('results/study.db')
    db.execute('create table finishes(run_id text)') # each time a run becomes done, whoever does it
    db.execute("create trigger finish after update of status on runs when new.status='done' begin insert into finishes values(new.run_id); end")
    while kills < 50:
        d = subprocess.Popen([sys.executable, '-c', DRIVER, template, str(10 + kills)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | dict(PYTHONPATH=str(ROOT)))
        until(lambda: db.execute("select count(*) from runs where status='running' and owner like ?", (f'%:{d.pid}:%',)).fetchone()[0] or d.poll() is not None, 120)
        while d.poll() is None: # kernels may die several times under one driver
            if rng.random() < .7: until(lambda: of(d)[1] or d.poll() is not None, 120) # sometimes before there is one
            time.sleep(rng.uniform(0, .8))
            family, kernels = of(d)
            seen |= set(family)
            for p in {'driver': family[:1], 'kernel': kernels, 'both': family[:1] + kernels, 'all': family}[rng.choice(['driver', 'kernel', 'both', 'all'])]:
                try: p.kill(); hit += p in kernels
                except psutil.NoSuchProcess: pass
            kills += bool(family)
        assert db.execute('pragma integrity_check').fetchone()[0] == 'ok'
    for _ in range(3): # a kernel killed under the last driver is taken up by the next
        if sweep.sweep(Study(name='kills', seeds=list(range(10 + kills))), say=silent, template=template) == {}: break
    df = rows('kills')
    assert set(df.status) == {'done'} and hit > 5
    assert [n for _, n in db.execute('select run_id, count(*) from finishes group by run_id')] == [1]*len(df)
    for row in df.itertuples(): assert not json.loads((Path('results')/row.notebook).read_text())['metadata']['papermill'].get('exception')
    until(lambda: all(gone(p.pid) or not p.is_running() for p in seen), 20)
    assert not list(Path('results').rglob('process.json')) and not list(Path('results').rglob('attempt-*'))
