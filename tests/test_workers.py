"Several drivers over one database: what each may do, and what is left when one is lost."
import json, os, shutil, signal, sqlite3, subprocess, sys, threading, time
from pathlib import Path
import psutil
import pytest
from conftest import ROOT, cli, command
from fake_point import execute, record
from lora_study import sweep, tracker, workers
from lora_study.config import BadInput, Run, Study, run_id

STUDY = Study(name='demo', axes=dict(lora_r=[2, 4]), seeds=[0, 1, 2])
LABELS = {run_id(r): n for r, n in sweep.labels(STUDY).items()}
FIRST = next(iter(LABELS.values()))

@pytest.fixture
def befalls(folder, monkeypatch):
    "Workers find the fake point; what befalls it is told by label"
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(map(str, (ROOT, ROOT/'tests'))))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return lambda **what: monkeypatch.setenv('FAKE_POINT', json.dumps(what))

def drive(study=STUDY, n=2, **kw):
    "Workers over fake points, and all that was said"
    said = []
    done = workers.drive(study, 'results', [{}]*n, said.append, execute='fake_point:execute', **kw)
    return done, said, tracker.frame(tracker.open_db('results/study.db'), study.name)

def owner_of(label):
    "The process that has claimed a run"
    who = tracker.open_db('results/study.db').execute('select owner from runs where label=?', (label,)).fetchone()[0]
    return psutil.Process(int(who.split(':')[-2]))

def everything(db): return list(db.iterdump())

@pytest.mark.fault(50, 53)
def test_a_worker_lost_in_the_middle_loses_nothing(befalls):
    befalls(**{FIRST: dict(steps=8, torn=True, sleep=2)})
    hit = []
    def look(s):
        if not hit and (at_it := next((r for r in s.running if 'step' in r), None)): hit.append(at_it); owner_of(FIRST).kill()
    done, said, df = drive(look=look)
    assert set(done.values()) == {True} and len(done) == 6
    assert dict(zip(df.label, df.attempt)) == {n: 2 if n == FIRST else 1 for n in LABELS.values()} # the lost one again, no other
    line, = (s for s in said if 'died' in s)
    assert f'killed by SIGKILL) in {FIRST}, at step 8 of 8' in line and 'last line is half written: left out' in line and 'started anew' in line
    assert hit[0]['label'] == FIRST and hit[0]['step'] == 8
    assert tracker.open_db('results/study.db').execute('pragma integrity_check').fetchone()[0] == 'ok'
    assert all((Path('results')/p).is_file() for p in df.notebook)

def test_workers_that_keep_dying_are_given_up_and_the_runs_are_left(befalls):
    befalls(**{FIRST: dict(sleep=60)})
    def look(s):
        for r in s.running:
            if r['label'] == FIRST: owner_of(FIRST).kill()
    done, said, df = drive(Study(name='demo', axes=dict(lora_r=[2])), 1, look=look, restarts=1)
    assert done == {FIRST: False} and [('started anew' in s, 'not started again' in s) for s in said if 'died' in s] == [(True, False), (False, True)]
    assert said[-1] == '1 run is left, and no worker: give the same command again'
    befalls()
    assert drive(Study(name='demo', axes=dict(lora_r=[2])), 1)[0] == {FIRST: True}

def test_what_fails_is_tried_once_whatever_the_number_of_workers(befalls):
    befalls(**{FIRST: dict(fail='planted')})
    done, said, df = drive(n=3)
    assert done == {n: n != FIRST for n in LABELS.values()}
    assert df.attempt.tolist() == [1]*6 and df.set_index('label').status[FIRST] == 'failed'
    assert sum(' done in ' in s for s in said) == 5 and sum('planted' in s for s in said) == 1
    befalls()
    assert drive(n=2)[0] == {} # a failure stands ...
    again, _, df = drive(n=2, retry_failed=True) # ... until it is asked for, and nothing else is
    assert again == {FIRST: True} and df.set_index('label').attempt[FIRST] == 2

class Elsewhere(workers.LocalProcesses):
    "A place whose workers differ from the parent in what they are told, or in what they find"
    def __init__(self, **differs): self.differs = differs
    def start(self, job): return super().start(job.model_copy(update=self.differs))

class Unreachable(workers.LocalProcesses):
    "A place that does not answer"
    def start(self, job): raise TimeoutError('head-node:6379 did not answer in 5 s')

@pytest.mark.fault(51)
def test_a_place_that_does_not_answer_is_one_line_and_takes_no_run(befalls):
    befalls()
    with pytest.raises(BadInput, match=r'worker 1 could not be started: head-node:6379 did not answer in 5 s: look at where workers run'): drive(n=2, executor=Unreachable())
    df = tracker.frame(tracker.open_db('results/study.db'))
    assert df.status.tolist() == ['waiting']*6 and df.attempt.tolist() == [0]*6

@pytest.mark.fault(52)
def test_more_workers_than_devices_are_refused_with_what_there_is():
    with pytest.raises(BadInput, match=r'--workers 3: a worker has a GPU of its own, and 2 can be used: expected at most 2'): workers.how_many('3', 8, ['0', '1'], None)

@pytest.mark.fault(54)
def test_a_worker_of_another_version_is_refused_with_both(befalls):
    befalls()
    with pytest.raises(BadInput, match=r'worker 1 on \S+: lora_study \S+, and its parent 0\.0\.1: expected one version'): drive(n=1, executor=Elsewhere(version='0.0.1'))
    assert tracker.frame(tracker.open_db('results/study.db')).attempt.tolist() == [0]*6

@pytest.mark.fault(55)
@pytest.mark.parametrize('what, line', [('gone', r"model_name_or_path = '\./base': not found"), ('changed', r"model_name_or_path = '\./base' is missing or is not the parent's: 1 of 1 runs differ")])
def test_a_worker_without_the_parents_base_is_refused_before_its_first_run(befalls, what, line):
    befalls()
    from lora_study.config import EMBEDDED
    shutil.copytree(str(EMBEDDED), 'base')
    study = Study(name='demo', axes=dict(lora_r=[2]), shared=dict(model_name_or_path='./base'))
    class Other(workers.LocalProcesses):
        def start(self, job):
            if what == 'gone': shutil.rmtree('base')
            else: Path('base/config.json').write_text('{}')
            return super().start(job)
    with pytest.raises(BadInput, match=line): drive(study, 1, executor=Other())
    assert tracker.frame(tracker.open_db('results/study.db')).attempt.tolist() == [0]

@pytest.mark.fault(55)
def test_on_another_machine_the_study_is_checked_first():
    told = workers.Job(number=3, study=STUDY, results='r', before=dict.fromkeys(LABELS, 0), host='not this one', how=dict(device='cuda:77')).model_dump_json()
    with pytest.raises(BadInput, match=r"worker 3 on \S+: device = 'cuda:77'"): workers.check_job(told)

PARENT = '''
import signal, sys
from lora_study import workers
from lora_study.config import Study
from lora_study.processes import orderly
signal.signal(signal.SIGINT, signal.default_int_handler)
with orderly(): workers.drive(Study.model_validate_json(sys.argv[1]), 'results', [{}]*2, lambda line: print(line, flush=True), execute='fake_point:execute')
'''

@pytest.mark.fault(31)
@pytest.mark.parametrize('by, code', [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)])
def test_workers_leave_with_their_parent(befalls, by, code):
    befalls(**{'*': dict(sleep=120)})
    parent = subprocess.Popen([sys.executable, '-c', PARENT, STUDY.model_dump_json()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    until(lambda: Path('results/study.db').exists() and (tracker.frame(tracker.open_db('results/study.db')).status == 'running').sum() == 2, 120)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 2
    parent.send_signal(by)
    said = parent.communicate(timeout=60)[0]
    assert parent.returncode == code and ('stopping 2 workers' in said) == (by != signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=30)[1] == []
    df = tracker.frame(tracker.open_db('results/study.db'))
    assert df.status.tolist() == ['waiting']*6 and sorted(df.attempt) == [0]*4 + [1]*2 # given back, and no other taken meanwhile

DEAF = 'import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); subprocess.Popen(["sleep", "300"], start_new_session=True); print("{}", flush=True); time.sleep(300)'

@pytest.mark.fault(31)
def test_a_worker_that_does_not_listen_is_ended_with_all_it_started():
    deaf, said = workers.Local(subprocess.Popen([sys.executable, '-c', DEAF], stdout=subprocess.PIPE, text=True)), []
    until(lambda: deaf.heard)
    family = psutil.Process(deaf.process.pid).children()
    assert len(family) == 1
    workers.dismiss(workers.Crew(workers.LocalProcesses(), {}, said.append, None, 0, {1: deaf}), grace=.3)
    assert deaf.process.wait(10) == -signal.SIGKILL and psutil.wait_procs(family, timeout=10)[1] == []
    assert said == ['stopping 1 worker: what is in work is given back']

def until(true, seconds=60):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, 'waited too long'
        time.sleep(.1)

@pytest.mark.slow
@pytest.mark.fault(31, 42)
def test_workers_from_the_command_line(study_file):
    "Real points: stopped in the middle, taken up again, each done once"
    first = subprocess.Popen(command('run', study_file, '--workers', 2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    until(lambda: len(list(Path('results/tiny/runs').glob('*/attempt-*/progress.jsonl'))) >= 1, 300)
    family = psutil.Process(first.pid).children(recursive=True)
    first.terminate()
    said = first.communicate(timeout=90)[0]
    assert first.returncode == 143 and 'go on with' in said and '2 workers, 1 thread each' in said, said
    assert psutil.wait_procs(family, timeout=30)[1] == []
    second = cli('run', study_file, '--workers', 'auto')
    assert second.returncode == 0 and 'runs done, 0 failed' in second.stdout, second.stdout + second.stderr
    df = tracker.frame(tracker.open_db('results/study.db'), 'tiny')
    assert df.status.tolist() == ['done']*4 and df.threads.tolist() == [1]*4
    assert cli('run', study_file, '--workers', 3).returncode == 3

def test_a_number_of_workers_that_is_none(study_file):
    refused = cli('run', study_file, '--workers', 'many')
    assert refused.returncode == 2 and refused.stderr == 'error: --workers many: expected a number from 1 to 1024, or auto\n' and not Path('results').exists()

# The database, when others are at it

@pytest.fixture
def db(folder):
    db = tracker.open_db('results/study.db')
    tracker.register(db, 'demo', sweep.labels(STUDY))
    return db

@pytest.mark.fault(48)
def test_a_clock_set_forward_takes_no_run_from_who_lives(db, monkeypatch):
    rid, me = next(iter(LABELS)), tracker.owner()
    attempt = tracker.claim(db, 'demo', rid, me)
    boot, now = psutil.boot_time(), time.time
    for module in (psutil, psutil._psplatform): monkeypatch.setattr(module, 'boot_time', lambda: boot + 7200) # what the system says of its boot follows the clock
    monkeypatch.setattr(time, 'time', lambda: now() + 7200)
    assert psutil.Process().create_time() > now() + 3600 # so does what it says of a process
    assert not tracker.is_gone(me) and tracker.claim(db, 'demo', rid, 'another') is None
    assert tracker.renew(db, 'demo', rid, attempt)

@pytest.mark.fault(48)
def test_a_late_finisher_changes_nothing(db, monkeypatch):
    run = next(iter(sweep.labels(STUDY)))
    late = tracker.claim(db, 'demo', run_id(run), 'elsewhere:1:1.00')
    now = time.time
    with monkeypatch.context() as m:
        m.setattr(time, 'time', lambda: now() + 3600) # the clock jumps past the lease of a driver on another machine
        assert tracker.claim(db, 'demo', run_id(run), tracker.owner()) == late + 1
    before = everything(db)
    assert not tracker.renew(db, 'demo', run_id(run), late)
    assert not tracker.finish(db, 'demo', record(run, tracker.now()), late, 'a.ipynb')
    assert not tracker.fail(db, 'demo', run_id(run), late, 'error', 'late')
    tracker.release(db, 'demo', run_id(run), late)
    assert everything(db) == before

@pytest.mark.fault(48)
def test_a_late_finisher_publishes_nothing(db):
    run, said = next(iter(sweep.labels(STUDY))), []
    study = STUDY.model_copy(update=dict(axes=dict(lora_r=[2]), seeds=[0]))
    def overtaken(nb, out, parameters, timeout=None):
        execute(nb, out, parameters)
        db.execute("update runs set owner='elsewhere:1:1.00', lease=0 where run_id=?", (run_id(run),)) # as if it had been stopped for longer than the lease
        assert tracker.claim(db, 'demo', run_id(run), 'elsewhere:2:1.00') == 2
        states.append(everything(db))
    states = []
    sweep.sweep(study, 'results', said.append, execute=overtaken)
    assert said == [f'{FIRST}: taken over by another driver meanwhile'] and everything(db) == states[0]
    assert not Path('results/demo/points').exists()

@pytest.mark.fault(49)
def test_an_export_during_a_run_reads_one_state(db):
    runs = list(sweep.labels(STUDY))
    for r in runs[:2]: tracker.fail(db, 'demo', run_id(r), tracker.claim(db, 'demo', run_id(r), tracker.owner()), 'error', 'first time')
    before, other, went_on = tracker.export_study(db, 'demo'), tracker.open_db('results/study.db'), []
    def meanwhile(statement): # once the rows are read and before their metrics are, a failed run is done after all, and another one too
        if 'from metrics' not in statement or went_on: return
        for r in (runs[1], runs[5]): went_on.append(tracker.finish(other, 'demo', record(r, tracker.now()), tracker.claim(other, 'demo', run_id(r), tracker.owner()), 'a.ipynb'))
    db.set_trace_callback(meanwhile)
    during = tracker.export_study(db, 'demo')
    db.set_trace_callback(None)
    assert went_on == [True, True] and during == before # writers were not held up, and nothing of theirs is in it
    after = [json.loads(line) for line in tracker.export_study(db, 'demo').splitlines()]
    assert [d['status'] for d in after] == ['failed', 'done', 'done'] and [bool(d['metrics']) for d in after] == [False, True, True]

@pytest.mark.fault(49)
def test_a_backup_during_a_run_is_whole(db, folder):
    runs, stop = list(sweep.labels(STUDY)), threading.Event()
    def busy():
        mine, k = tracker.open_db('results/study.db'), 0
        while not stop.is_set():
            r = Run(lora_r=3 + k % 500, seed=k); k += 1
            tracker.register(mine, 'demo', {r: f'r{k}'})
            tracker.finish(mine, 'demo', record(r, tracker.now()), tracker.claim(mine, 'demo', run_id(r), tracker.owner()), 'a.ipynb')
    t = threading.Thread(target=busy); t.start()
    try:
        for k in range(3):
            time.sleep(.2); tracker.back_up(db, folder/f'copy{k}.db')
            copy = sqlite3.connect(folder/f'copy{k}.v{tracker.SCHEMA_VERSION}.db')
            assert copy.execute('pragma integrity_check').fetchone()[0] == 'ok'
            done, = copy.execute("select count(*) from runs where status='done'").fetchone()
            assert copy.execute('select count(*) from metrics').fetchone()[0] == 4*done # whole runs only
    finally: stop.set(); t.join()

@pytest.mark.fault(43)
def test_a_locked_database_is_waited_for(db):
    other, rid = sqlite3.connect('results/study.db', isolation_level=None, check_same_thread=False), next(iter(LABELS))
    other.execute('begin immediate')
    threading.Timer(1, other.rollback).start()
    start = time.perf_counter()
    assert tracker.claim(db, 'demo', rid, tracker.owner()) == 1 and time.perf_counter() - start > .8

@pytest.mark.fault(43)
def test_a_database_that_stays_locked_is_one_line_and_the_run_is_kept(db, monkeypatch):
    monkeypatch.setattr(tracker, 'BUSY', .3)
    study, other = STUDY.model_copy(update=dict(axes=dict(lora_r=[2]), seeds=[0])), sqlite3.connect('results/study.db', isolation_level=None)
    def then_locked(nb, out, parameters, timeout=None): execute(nb, out, parameters); other.execute('begin immediate')
    with pytest.raises(tracker.Busy, match=r'study\.db: another program has held it for 0\.3 s: close what writes to it'): sweep.sweep(study, 'results', execute=then_locked)
    other.rollback()
    assert tracker.frame(db).status[0] == 'running'
    db.execute("update runs set owner=replace(owner, ':', ':9')") # its driver has gone
    assert sweep.sweep(study, 'results', execute=None) == {FIRST: True} # taken in, not run again
