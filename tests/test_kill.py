"Real kills of real processes: nothing finished is lost, nothing is done twice."
import json, random, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from conftest import TINY, cli, command
from lora_study import tracker

def heard(): signal.signal(signal.SIGINT, signal.default_int_handler) # a test runner in the background of a shell hands on a SIGINT that is ignored

def start(*args):
    return subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=heard)

def finished_once(db, study, n):
    df = tracker.frame(db, study)
    assert df.status.tolist() == ['done']*n
    assert len(df.run_id.unique()) == n
    assert db.execute('pragma integrity_check').fetchone()[0] == 'ok'
    for row in df.itertuples():
        nb = json.loads((Path('results')/row.notebook).read_text())
        assert not nb['metadata']['papermill'].get('exception')
        assert db.execute("select count(*) from scores where run_id=? and which='test'", (row.run_id,)).fetchone()[0] == TINY['test_size']
    return df

@pytest.mark.fault(30)
def test_a_driver_killed_at_random_moments_finishes_every_run_exactly_once(study_file):
    rng, done_before, busy = random.Random(0), {}, 0
    growing = lambda: list(Path('results/tiny/runs').glob('*/attempt-*/point.ipynb'))
    for _ in range(5):
        driver = start('run', study_file)
        until(lambda: growing() or driver.poll() is not None, 120) # a point has begun ...
        time.sleep(rng.uniform(0, 8))                              # ... and is somewhere in its run, or the next one is
        driver.kill(); driver.wait()
        df = tracker.frame(tracker.open_db('results/study.db'), 'tiny')
        busy += (df.status == 'running').sum()
        now = dict(zip(df.run_id[df.status == 'done'], df.attempt[df.status == 'done']))
        assert done_before.items() <= now.items() # what was done stays done, and is not attempted again
        done_before = now
    assert busy >= 1 # some of the kills did hit a run
    last = cli('run', study_file)
    assert last.returncode in (0, 3), last.stdout + last.stderr
    finished_once(tracker.open_db('results/study.db'), 'tiny', 4)
    left = [p for p in Path('results').rglob('*') if p.name.startswith(('attempt-', '.')) and not p.name.endswith('.part')]
    assert left == []

@pytest.mark.fault(42)
def test_two_drivers_at_once_run_no_point_twice(study_file):
    drivers = [start('run', study_file) for _ in range(2)]
    said = [d.communicate(timeout=300)[0] for d in drivers]
    assert [d.returncode in (0, 3) for d in drivers] == [True, True], said
    df = finished_once(tracker.open_db('results/study.db'), 'tiny', 4)
    assert df.attempt.tolist() == [1]*4
    assert sum(s.count(' done in ') for s in said) == 4

@pytest.mark.fault(31)
def test_a_stopped_driver_leaves_no_process_and_says_how_to_go_on(study_file):
    driver = start('run', study_file)
    until(lambda: Path('results/tiny/runs').exists() and list(Path('results/tiny/runs').iterdir()), 180)
    time.sleep(3)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert family
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=60)[0]
    assert driver.returncode == 130 and 'go on with' in said
    psutil.wait_procs(family, timeout=20)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert 'running' not in tracker.frame(tracker.open_db('results/study.db'), 'tiny').status.tolist()

def until(true, seconds=60):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, 'waited too long'
        time.sleep(.05)

TRAIN = '''
import sys, torch
from lora_study.config import Run
from lora_study.data import encode, load_splits
from lora_study.lora import add_adapter
from lora_study.model import load_base, load_tokenizer
from lora_study.train import Loop, train
run = Run(train_size=64, max_steps=40, lora_dropout=.1, eval_steps=10, per_device_train_batch_size=4)
tokenizer = load_tokenizer(run)
examples = encode(load_splits(run).train, tokenizer, run.max_length)[0]
loop = Loop(run, add_adapter(load_base(run, torch.device('cpu')), run), examples, tokenizer.pad_token_id)
train(loop, examples[:8], sys.argv[1], save_steps=1)
torch.save(dict(history=loop.history, params=[p.detach() for p in loop.params]), sys.argv[2])
'''

def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(folder):
    import torch
    train = lambda where: subprocess.Popen([sys.executable, '-c', TRAIN, where, where + '.pt'], stderr=subprocess.DEVNULL)
    killed = train('broken')
    until(lambda: any(c.name >= 'checkpoint-00000015' for c in Path('broken').glob('checkpoint-*')), 180) # the last two are kept
    killed.kill(); killed.wait()
    assert not Path('broken.pt').exists()
    assert train('broken').wait() == 0 and train('whole').wait() == 0
    one, two = (torch.load(f, weights_only=True) for f in ('broken.pt', 'whole.pt'))
    assert one['history'] == two['history']
    assert all(torch.equal(a, b) for a, b in zip(one['params'], two['params']))
    assert len(one['history']['train']) == 40
