"What is kept on disk: full disks, read-only folders, damaged databases, torn checkpoints. The faults are real ones of the system, never a patched function that pretends."
import ast, json, os, re, shutil, sqlite3, subprocess, sys, time
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
import pytest
from conftest import ROOT, TINY, cli
from lora_study import rescue, sweep, tracker
from lora_study.config import BadInput, Run, Study, run_id

def mounted(*args): return os.geteuid() == 0 and subprocess.run(['mount', *map(str, args)], capture_output=True).returncode == 0

class Disk:
    "A file system of a few megabytes that can be filled to the last byte"
    def __init__(self, path): self.path, self.ballast = path, path/'ballast'
    def fill(self, leave=0): # bytes left
        with self.ballast.open('wb', buffering=0) as f:
            try:
                while True: f.write(bytes(4096))
            except OSError: f.truncate(f.tell() - leave)
    def free(self): self.ballast.unlink()

@pytest.fixture
def disk(tmp_path):
    (path := tmp_path/'disk').mkdir()
    if not mounted('-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', path): pytest.skip('no file system can be mounted here')
    try: yield Disk(path)
    finally: subprocess.run(['umount', '-l', str(path)])

@contextmanager
def sealed_off(folder): # nothing can be written below it, whoever asks
    if os.geteuid() != 0:
        folder.chmod(0o555)
        try: yield
        finally: folder.chmod(0o755)
        return
    if not (mounted('--bind', folder, folder) and mounted('-o', 'remount,bind,ro', folder)): pytest.skip('no folder can be made read-only here')
    try: yield
    finally: subprocess.run(['umount', '-l', str(folder)])

def record(run, rows=3, **config):
    row = dict(task='sort', nll=1., tokens=2, correct_tokens=1, bytes=3, prediction='x'*1000, exact=1)
    return tracker.Record(run_id=run_id(run), config=run.model_dump() | config, provenance={}, metrics=dict(base_nll=2., test_nll=1.), curves=dict(train=[dict(step=1, loss=2.)]), adapter=[],
                          scores=dict(base=[], test=[row | dict(example=i) for i in range(rows)]), started=tracker.now(), ended=tracker.now())

def nothing_cut(folder): # every file under a final name can be read whole; no other name is left
    for f in folder.rglob('*'):
        if f.suffix in ('.json', '.ipynb'): json.loads(f.read_text())
        assert not f.name.endswith('.part') and '.part-' not in f.name, f
    for f in folder.rglob('*.db'):
        with closing(sqlite3.connect(f)) as db: assert db.execute('pragma integrity_check').fetchone()[0] == 'ok'

# what a driver is, less the training: a real sweep of a point that writes a valid record in milliseconds
DRIVER = '''
import sys, nbformat, typer
from lora_study import sweep
from lora_study.cli import told
from lora_study.config import Run, Study
POINT = """
from pathlib import Path
from lora_study.config import Run, run_id
from lora_study.tracker import Record, now, write_whole
run = Run(**{k: v for k, v in globals().items() if k in Run.model_fields})
record = Record(run_id=run_id(run), config=run.model_dump(), provenance={}, metrics=dict(base_nll=2., test_nll=1.), curves={}, adapter=[], scores=dict(base=[], test=[]), started=now(), ended=now())
write_whole(Path(work_dir)/'record.json', record.model_dump_json())"""
given = {k: f.default for k, f in Run.model_fields.items()} | dict.fromkeys(sweep.HOW)
cells = [nbformat.v4.new_raw_cell(''), nbformat.v4.new_code_cell(chr(10).join(f'{k} = {v!r}' for k, v in given.items()), metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(sys.argv[2]), nbformat.v4.new_code_cell(POINT)]
nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), cells=cells)
sweep.read_template = lambda path=None: nbformat.from_dict(nb)
@told
def go(results): sweep.sweep(Study(name='small', axes=dict(lora_r=[2, 4])), results)
try: go(results=sys.argv[1])
except typer.Exit as e: sys.exit(e.exit_code)
'''

def drive(results, before='', **kw): # before: code of the point's first cell
    return subprocess.run([sys.executable, '-c', DRIVER, str(results), before], stderr=subprocess.PIPE, text=True, timeout=120, env=os.environ | dict(LORA_STUDY_WARM='0'), **dict(stdout=subprocess.PIPE) | kw)

def states(results):
    with closing(sqlite3.connect(results/'study.db')) as db: return db.execute('select status, error_kind from runs order by rowid').fetchall()

@pytest.mark.fault(33)
def test_a_database_on_a_full_disk_changes_whole_or_not_at_all(disk):
    db, run = tracker.open_db(disk.path/'study.db'), Run()
    tracker.register(db, 's', {run: 'a'})
    attempt = tracker.claim(db, 's', run_id(run), tracker.owner())
    disk.fill(leave=100_000)
    with pytest.raises(tracker.DiskFull, match='study.db: the disk is full, 0.* MiB left: free some space'): tracker.finish(db, 's', record(run, rows=1000), attempt, 'a.ipynb')
    assert db.execute('select status from runs').fetchone()[0] == 'running'
    assert [db.execute(f'select count(*) from {t}').fetchone()[0] for t in ('metrics', 'scores')] == [0, 0]
    disk.free(); disk.fill()
    with pytest.raises(BadInput, match='full'): tracker.open_db(disk.path/'other.db')
    (disk.path/'other.db').unlink(missing_ok=True)
    disk.free()
    nothing_cut(disk.path)
    assert tracker.finish(db, 's', record(run, rows=1000), attempt, 'a.ipynb')
    assert db.execute('select count(*) from scores').fetchone()[0] == 1000

@pytest.mark.fault(33)
def test_a_study_meets_a_full_disk_and_ends_when_there_is_room(disk):
    results = disk.path/'results'
    fill = f"f = open({str(disk.ballast)!r}, 'wb', buffering=0)\ntry:\n    while True: f.write(bytes(4096))\nexcept OSError: print(10_000*'something to keep ')"
    said = drive(results, fill)
    assert said.returncode == 2 and 'Traceback' not in said.stderr, said.stderr
    assert 'the disk is full' in said.stderr and 'free some space' in said.stderr
    assert states(results) == [('failed', 'disk_full'), ('waiting', None)] # what the attempt had left made room for that; the next run would have met the same
    assert not list(results.rglob('final')) and not list(results.rglob('attempt-*'))
    disk.free()
    assert not list(results.glob('small/points/*'))
    again = drive(results)
    assert again.returncode == 0, again.stderr
    assert states(results) == [('done', None)]*2
    nothing_cut(results)

@pytest.mark.fault(33)
@pytest.mark.parametrize('ename, text, kind', [('DiskFull', 'r/checkpoint-2: the disk is full', 'disk_full'), ('OSError', '[Errno 28] No space left on device', 'disk_full'),
    ('SafetensorError', 'Error while serializing: I/O error: No space left on device (os error 28)', 'disk_full'), ('OSError', '[Errno 2] No such file or directory', 'error')])
def test_a_cell_that_met_a_full_disk_is_told_apart(ename, text, kind): # the words are those that the libraries have
    from papermill.exceptions import PapermillExecutionError
    assert sweep.explain(PapermillExecutionError(1, 1, 'save()', ename, text, [f'{ename}: {text}']))[0] == kind

@pytest.mark.fault(33)
@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_a_log_on_a_full_disk_stops_the_driver_after_what_is_done(tmp_path):
    with open('/dev/full', 'w') as log: said = drive(tmp_path, stdout=log)
    own = [line for line in said.stderr.splitlines() if not line.startswith('[IPKernelApp]')] # an interrupted kernel that is about to leave may remark on it
    assert said.returncode == 2 and len(own) == 1 and 'the disk is full' in own[0], said.stderr
    assert states(tmp_path) == [('done', None), ('waiting', None)]
    nothing_cut(tmp_path)

LIMITED = '''
import resource, sys
from pathlib import Path
from lora_study import tracker
from lora_study.config import BadInput, Run, run_id
folder, run = Path(sys.argv[1]), Run()
tracker.write_whole(folder/'kept.txt', 'as it was')
db = tracker.open_db(folder/'study.db')
tracker.register(db, 's', {run: 'a'})
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
def said(f):
    try: f()
    except BadInput as e: print(type(e).__name__, e)
said(lambda: tracker.write_whole(folder/'kept.txt', 'x'*100_000))
said(lambda: tracker.register(db, 's', {Run(seed=i): 'x'*500 for i in range(200)}))
print(db.execute('select count(*) from runs').fetchone()[0], db.execute('pragma integrity_check').fetchone()[0])
'''

@pytest.mark.fault(33)
def test_a_limit_on_the_size_of_files_does_no_harm(tmp_path): # needs no privileges: EFBIG for what is written, an I/O error for SQLite
    said = subprocess.run([sys.executable, '-c', LIMITED, tmp_path], capture_output=True, text=True, timeout=120)
    lines = said.stdout.splitlines()
    assert lines[0].startswith('DiskFull') and 'kept.txt: the disk is full' in lines[0], said
    assert lines[1].startswith(('BadInput', 'DiskFull')) and 'study.db' in lines[1]
    assert lines[2] == '1 ok'
    assert (tmp_path/'kept.txt').read_text() == 'as it was'
    nothing_cut(tmp_path)

def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    writer = "import sys\nfrom lora_study.tracker import write_whole\ni = 0\nwhile True: i += 1; write_whole(sys.argv[1], str(i % 10)*3_000_000)"
    path = tmp_path/'f'
    for wait in (.05, .31):
        p = subprocess.Popen([sys.executable, '-c', writer, path])
        while not path.exists(): time.sleep(.01)
        time.sleep(wait); p.kill(); p.wait()
        text = path.read_text()
        assert len(text) == 3_000_000 and len(set(text)) == 1

def loop(folder=None, steps=0, size=256, ids=(1, 2)): # what checkpoints know of a run, without a base
    import torch
    from lora_study.train import Loop, save_checkpoint
    torch.manual_seed(0)
    l = Loop(Run(use_peft=False, max_steps=9), torch.nn.Linear(size, size), [SimpleNamespace(ids=list(ids), prompt_len=1)], 0)
    for _ in range(steps):
        l.model(torch.rand(2, size)).sum().backward()
        l.optimizer.step(); l.optimizer.zero_grad(); l.schedule.step()
        l.step += 1
        save_checkpoint(l, folder)
    return l

def taken_up(folder, resume='auto', **kw):
    from lora_study.train import take_up
    l = loop(**kw)
    take_up(l, folder, resume)
    return l

@pytest.mark.fault(33)
@pytest.mark.parametrize('leave', [0, 300_000]) # before the weights, and amid the optimizer's state
def test_a_checkpoint_that_meets_a_full_disk_leaves_the_one_before(disk, leave):
    from lora_study.train import lacks, save_checkpoint
    l = loop(disk.path/'c', steps=1)
    disk.fill(leave)
    l.step = 2
    with pytest.raises(tracker.DiskFull, match='checkpoint-00000002: the disk is full'): save_checkpoint(l, disk.path/'c')
    assert [p.name for p in (disk.path/'c').iterdir()] == ['checkpoint-00000001']
    assert lacks(disk.path/'c'/'checkpoint-00000001') is None
    disk.free()
    assert lacks(save_checkpoint(l, disk.path/'c')) is None

@pytest.mark.fault(36)
@pytest.mark.parametrize('part', ['adapter.safetensors', 'state.pt', 'loop.json', 'manifest.json'])
def test_the_newest_whole_checkpoint_is_taken(tmp_path, part):
    import torch
    written = loop(tmp_path, steps=2)
    state, bits = torch.load(tmp_path/'checkpoint-00000001/state.pt', weights_only=True), torch.get_rng_state()
    f = tmp_path/'checkpoint-00000002'/part
    os.truncate(f, f.stat().st_size//2)
    l = taken_up(tmp_path)
    assert l.resumed_at == 1 and len(l.notes) == 1 and l.notes[0].startswith('checkpoint-00000002 was passed over: '), l.notes
    assert torch.equal(torch.get_rng_state(), state['rng']['cpu']) and not torch.equal(bits, state['rng']['cpu'])
    assert torch.equal(l.optimizer.state_dict()['state'][0]['exp_avg'], state['optimizer']['state'][0]['exp_avg'])
    for i in (2, 3): # going on writes over the torn one, and keeps two
        l.step = i
        from lora_study.train import save_checkpoint
        save_checkpoint(l, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint-00000002', 'checkpoint-00000003'] and taken_up(tmp_path).resumed_at == 3

def without(checkpoint, key): # a checkpoint sealed as whole whose state was never all there
    import torch
    from lora_study.train import sealed_files
    if key:
        state = torch.load(checkpoint/'state.pt', weights_only=True); del state[key]
        torch.save(state, checkpoint/'state.pt')
    else: (checkpoint/'state.pt').unlink()
    (checkpoint/'manifest.json').write_text(json.dumps(sealed_files(checkpoint)))

@pytest.mark.fault(37)
@pytest.mark.parametrize('key', [None, 'optimizer', 'rng'])
def test_a_checkpoint_without_its_state_is_no_exact_resume(tmp_path, key):
    import torch
    written = loop(tmp_path, steps=2)
    without(tmp_path/'checkpoint-00000002', key)
    assert taken_up(tmp_path, 'inexact').resumed_at == 1 # an older whole one comes first
    shutil.rmtree(tmp_path/'checkpoint-00000001')
    l = taken_up(tmp_path)
    assert l.resumed_at == l.step == 0 and l.notes[-1].endswith('the run began again at its start')
    assert torch.equal(l.params[0], loop().params[0])
    l = taken_up(tmp_path, 'inexact')
    assert l.resumed_at == 2 and 'from weights alone' in l.notes[-1] and torch.equal(l.params[0], written.params[0])
    assert l.schedule.get_last_lr() == written.schedule.get_last_lr()

@pytest.mark.fault(38)
def test_a_resume_after_a_change_is_noted_or_refused(tmp_path):
    from lora_study import train
    written = loop(tmp_path, steps=1)
    assert taken_up(tmp_path, 'strict').notes == []
    l = taken_up(tmp_path, ids=(1, 3))
    assert l.resumed_at == 1 and l.notes[0].startswith('resumed at step 1 with data ') and 'bits may differ' in l.notes[0]
    with pytest.raises(BadInput, match='resumed at step 1 with data .* put back what it was'): taken_up(tmp_path, 'strict', ids=(1, 3))
    def rewritten(made): # as another version would have written it
        c = tmp_path/'checkpoint-00000001'
        about = json.loads((c/'loop.json').read_text())
        (c/'loop.json').write_text(json.dumps(about | dict(made_with=made(about['made_with']))))
        (c/'manifest.json').write_text(json.dumps(train.sealed_files(c)))
    rewritten(lambda made: made | dict(code='0'*12, torch_version='1.0'))
    assert 'code 000000000000 → ' in (note := taken_up(tmp_path).notes[0]) and 'torch 1.0 → ' in note
    with pytest.raises(BadInput, match='torch 1.0'): taken_up(tmp_path, 'strict')
    rewritten(lambda made: {})
    assert 'with nothing known of what wrote the checkpoint' in taken_up(tmp_path).notes[0]
    with pytest.raises(BadInput, match="resume = 'maybe': expected auto, strict, inexact"): taken_up(tmp_path, 'maybe')

@pytest.mark.slow
@pytest.mark.fault(37, 38)
def test_what_a_resume_met_is_in_the_record(tmp_path):
    from lora_study.config import sealed
    run = sealed(Run(**TINY))
    torn = tmp_path/'s/runs/a/checkpoints/checkpoint-00000003'
    torn.mkdir(parents=True)
    rec, _ = sweep.run_point(run, 'a', 's', tmp_path, save_steps=1)
    assert rec.warnings[-2:] == ['checkpoint-00000003 was passed over: its manifest cannot be read', 'no checkpoint could be gone on from exactly: the run began again at its start']

EXPORT = ROOT/'results/quick/records.jsonl'

def results_folder(folder): # six runs by their export, one by its folder
    results, run = folder/'results', Run(lora_r=3)
    (results/'quick').mkdir(parents=True); shutil.copy(EXPORT, results/'quick')
    final = results/'small/runs/a/final'
    tracker.write_whole(final/'record.json', record(run).model_dump_json())
    tracker.write_whole(final/'point.ipynb', json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(papermill=dict(end_time='now')), cells=[dict(cell_type='raw', id='a', metadata={}, source='---\ntitle: a\n---')])))
    with closing(tracker.open_db(results/'study.db')) as db:
        tracker.import_records(db, EXPORT)
        rescue.take_folder(db, results, final)
        tracker.register(db, 'small', {Run(lora_r=5): 'b'})
    return results

def content(results):
    with closing(tracker.open_db(results/'study.db')) as db: return [tracker.export_study(db, s) for s in ('quick', 'small')]

def noise(path):
    with path.open('r+b') as f: f.seek(4100); f.write(os.urandom(3000))

def foreign(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as db: db.execute('create table photos(name)')

DAMAGE = dict(empty=lambda p: (os.truncate(p, 0), os.utime(p, (0, 0))), text=lambda p: p.write_text('not a database\n'*900), noise=noise, half=lambda p: os.truncate(p, p.stat().st_size//2), foreign=foreign)

@pytest.mark.fault(44)
@pytest.mark.parametrize('way', DAMAGE)
def test_a_damaged_database_is_kept_and_built_again(tmp_path, way):
    results = results_folder(tmp_path)
    before = content(results)
    DAMAGE[way](results/'study.db')
    broken = (results/'study.db').read_bytes()
    with pytest.raises(BadInput, match=r'study.db: .*lora-study rebuild --results'):
        with closing(tracker.open_db(results/'study.db')) as db: tracker.check_whole(db)
    assert (results/'study.db').read_bytes() == broken # looked at, not touched
    said = []
    assert rescue.rebuild(results, said.append) == [dict(study='quick', from_exports=6, from_run_folders=0), dict(study='small', from_exports=0, from_run_folders=1)]
    assert content(results) == before
    kept, = results.glob('study.damaged-*.db')
    assert kept.read_bytes() == broken and kept.name in said[-1]
    assert sum(b['from_exports'] + b['from_run_folders'] for b in rescue.rebuild(results, said.append)) == 0 and len(list(results.glob('*.damaged-*.db'))) == 1 # a whole one is never replaced
    nothing_cut(results/'small')

@pytest.mark.fault(44)
def test_a_rebuild_names_what_did_not_come_back(tmp_path):
    results = results_folder(tmp_path)
    export = results/'quick/records.jsonl'
    os.truncate(export, export.stat().st_size - 9)
    os.truncate(results/'small/runs/a/final/record.json', 100)
    with closing(sqlite3.connect(results/'study.db')) as db: page = db.execute("select rootpage from sqlite_master where name='scores'").fetchone()[0]
    with (results/'study.db').open('r+b') as f: f.seek((page - 1)*4096); f.write(os.urandom(4096)) # the runs' own table is left
    said = []
    back = rescue.rebuild(results, said.append)
    assert [b['from_exports'] + b['from_run_folders'] for b in back] == [5, 0]
    assert any('records.jsonl:6: not a whole record' in s for s in said) and any('no whole record and notebook' in s for s in said)
    assert any(s.startswith('2 runs that the damaged file names left nothing else') and run_id(Run(lora_r=3)) in s for s in said), said

@pytest.mark.fault(44)
def test_a_log_without_its_database_is_not_read_into_the_next(tmp_path): # who deletes study.db after a kill leaves study.db-wal
    results = results_folder(tmp_path)
    before = content(results)
    subprocess.run([sys.executable, '-c', 'import os, sys\nfrom lora_study import tracker\nfrom lora_study.config import Run\n'
                    'tracker.register(tracker.open_db(sys.argv[1]), "other", {Run(seed=i): "a" for i in range(300)}); os._exit(9)', results/'study.db'])
    assert (results/'study.db-wal').stat().st_size > 100_000
    (results/'study.db').unlink()
    said = []
    assert sum(b['from_exports'] + b['from_run_folders'] for b in rescue.rebuild(results, said.append)) == 7
    assert content(results) == before and states(results) == [('done', None)]*7
    assert list(results.glob('study.damaged-*-wal'))

@pytest.mark.fault(44)
def test_the_command_line_says_how_a_damaged_database_comes_back(tmp_path):
    results = results_folder(tmp_path)
    noise(results/'study.db')
    read = cli('runs', '--results', results)
    assert read.returncode == 2 and read.stderr.count('\n') == 1 and f'lora-study rebuild --results {results}' in read.stderr, read.stderr
    done = cli('rebuild', '--results', results)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == '7 runs came back' and 'what was there is kept as' in done.stdout, done.stdout + done.stderr
    assert cli('runs', '--results', results, '--status', 'done').stdout.splitlines()[-1] == '7 runs'

@pytest.mark.fault(43)
def test_a_locked_database_is_one_line(tmp_path):
    db, other = (tracker.open_db(tmp_path/'study.db') for _ in range(2))
    db.execute('pragma busy_timeout=50')
    with tracker.change(other), pytest.raises(BadInput, match='study.db: another program has held it for'): tracker.register(db, 's', {Run(): 'a'})
    tracker.register(db, 's', {Run(): 'a'})

@pytest.mark.fault(45)
@pytest.mark.parametrize('what', ['', 'small']) # the database's folder, and the study's alone
def test_a_folder_that_cannot_be_written_is_refused_before_a_run(tmp_path, what):
    results = tmp_path/'results'
    tracker.open_db(results/'study.db').close()
    (results/'small').mkdir()
    with sealed_off(results/what):
        said = drive(results)
        assert said.returncode == 2 and said.stderr.count('\n') == 1 and 'use a writable folder' in said.stderr, said.stderr
    assert not list(results.rglob('attempt-*'))

MOUNTS = r"""22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw,errors=remount-ro
26 22 0:23 / /tmp rw,nosuid,nodev shared:2 - tmpfs tmpfs rw,size=8123456k
90 22 0:52 / /home rw,relatime shared:50 - nfs4 10.0.0.2:/export/home rw,vers=4.2,rsize=1048576,hard,proto=tcp
91 90 8:17 / /home/me/fast rw,noatime - xfs /dev/nvme0n1p1 rw
92 22 0:60 / /mnt/my\040share rw,relatime shared:61 - cifs //filer/share rw,vers=3.1.1
93 22 0:61 / /mnt/ssh rw,nosuid,nodev shared:62 - fuse.sshfs me@host:/data rw,user_id=1000
94 22 0:62 / /scratch rw,relatime shared:63 - lustre 10.0.0.9@o2ib:/scratch rw,flock
95 22 0:63 / /mnt/c rw,noatime - 9p drvfs rw,dirsync,aname=drvfs;path=C:\
96 22 0:64 / /mnt/over rw,relatime - overlay overlay rw,lowerdir=/nfs4,upperdir=/u
97 22 0:65 / /mnt/usb rw,nosuid - fuseblk /dev/sdc1 rw"""

@pytest.mark.fault(46)
@pytest.mark.parametrize('path, kind', [('/home/me/results', 'nfs4 at /home'), ('/home/me/fast/results', None), ('/mnt/my share/r', 'cifs at /mnt/my share'), ('/mnt/ssh', 'fuse.sshfs at /mnt/ssh'),
    ('/scratch/a/b', 'lustre at /scratch'), ('/mnt/c/Users', '9p at /mnt/c'), ('/mnt/over/r', None), ('/mnt/usb/r', None), ('/tmp/r', None), ('/homework', None)])
def test_a_network_file_system_is_known(path, kind): assert tracker.network_mount(path, MOUNTS) == kind

@pytest.mark.fault(46)
def test_a_study_on_a_network_file_system_is_warned(tmp_path, monkeypatch):
    study, said = Study(name='s', axes=dict(lora_r=[2])), []
    db = tracker.open_db(tmp_path/'study.db')
    for run, name in sweep.labels(study).items(): # all done: nothing is run
        tracker.register(db, 's', {run: name}); tracker.finish(db, 's', record(run), tracker.claim(db, 's', run_id(run), tracker.owner()), 'a.ipynb')
    real = tracker.network_mount
    monkeypatch.setattr(tracker, 'network_mount', lambda path: real(path, f'22 1 0:52 / {tmp_path} rw - nfs4 filer:/x rw'))
    assert sweep.sweep(study, tmp_path, said.append) == {}
    assert len(said) == 1 and f'lies on nfs4 at {tmp_path}' in said[0]

def old_db(path): # of version 1, with a run
    with closing(sqlite3.connect(path)) as db:
        for statement in tracker.SCHEMA.replace(' more text,', '').replace(' samples text,', '').split(';'): db.execute(statement)
        db.execute("insert into runs(study, run_id, label, config, status) values('s', 'r', 'a', '{}', 'done')"); db.execute('pragma user_version=1'); db.commit()

def version(path):
    with closing(sqlite3.connect(path)) as db: return db.execute('pragma user_version').fetchone()[0], [r[0] for r in db.execute('select label from runs')], 'samples' in [r[1] for r in db.execute('pragma table_info(runs)')]

@pytest.mark.fault(47)
def test_an_old_schema_is_copied_and_upgraded_at_once(tmp_path, monkeypatch):
    old_db(tmp_path/'study.db')
    with monkeypatch.context() as m:
        m.setattr(tracker, 'UPGRADES', {1: (*tracker.UPGRADES[1], 'no sql')}) # fails after its first steps
        with pytest.raises(sqlite3.OperationalError): tracker.open_db(tmp_path/'study.db')
    assert version(tmp_path/'study.db') == version(tmp_path/'study.v1.db') == (1, ['a'], False)
    tracker.open_db(tmp_path/'study.db').close()
    assert version(tmp_path/'study.db') == (tracker.SCHEMA_VERSION, ['a'], True)
    assert version(tmp_path/'study.v1.db') == (1, ['a'], False)

@pytest.mark.fault(33, 47)
def test_an_upgrade_on_a_full_disk_waits(disk):
    old_db(disk.path/'study.db')
    disk.fill(leave=40_000) # its log fits, the copy does not
    with pytest.raises(BadInput, match='full'): tracker.open_db(disk.path/'study.db')
    assert version(disk.path/'study.db') == (1, ['a'], False) and not (disk.path/'study.v1.db').exists()
    disk.free()
    tracker.open_db(disk.path/'study.db').close()
    assert version(disk.path/'study.v1.db') == (1, ['a'], False)
    nothing_cut(disk.path)

@pytest.mark.fault(47)
def test_a_newer_schema_is_refused_and_not_touched(tmp_path):
    tracker.open_db(tmp_path/'study.db').close()
    with closing(sqlite3.connect(tmp_path/'study.db')) as db: db.execute('pragma user_version=99')
    before = (tmp_path/'study.db').read_bytes()
    with pytest.raises(BadInput, match='schema 99, this version knows 2: upgrade lora_study'): tracker.open_db(tmp_path/'study.db')
    assert (tmp_path/'study.db').read_bytes() == before and rescue.damage(tmp_path/'study.db') is None

@cache
def calls(): # (module, function around it, what is called, its source) of the whole package
    found = []
    def walk(node, text, module, name):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call): found.append((module, name, called(child.func), '\n'.join(text[child.lineno-1:child.end_lineno])))
            walk(child, text, module, child.name if isinstance(child, ast.FunctionDef) else name)
    def called(f): return f.id if isinstance(f, ast.Name) else f'{called(f.value)}.{f.attr}' if isinstance(f, ast.Attribute) else ''
    for f in sorted((ROOT/'lora_study').glob('*.py')): walk(ast.parse(text := f.read_text()), text.splitlines(), f.stem, '')
    return found

@pytest.mark.fault(57)
def test_the_package_pushes_nothing_to_a_hub():
    assert not [s for *_, f, s in calls() if f.endswith(('push_to_hub', 'upload_folder', 'upload_file', 'create_repo', 'create_commit')) or re.search(r'push_to_hub\s*=\s*True', s)]

@pytest.mark.fault(63, 72)
def test_the_package_reads_no_pickle_and_no_archive():
    found = calls()
    assert [s for _, _, f, s in found if f == 'torch.load'] and all('weights_only=True' in s for _, _, f, s in found if f == 'torch.load')
    assert not [s for *_, f, s in found if f.split('.')[0] in ('pickle', 'tarfile', 'zipfile', 'joblib', 'dill', 'cloudpickle') or f.endswith(('unpack_archive', 'extractall', 'read_pickle')) or 'allow_pickle=True' in s]

# who may write under a name directly, and why
UNDER_WAY = {('train', 'save_checkpoint'), ('pretrain', 'save_base'), ('tracker', 'back_up')} # inside `whole`
NOT_KEPT = {('regress', 'side'), ('plots', 'save'), ('findings', 'png'), ('report', 'picture'), ('profiler', 'reset_peak'), ('tracker', 'write_whole'), ('warm', 'fork')} # a temporary folder; three pictures in memory; a switch of the system's; the writer itself; a pipe
OF_AN_ATTEMPT = {('lora', 'save_adapter'), ('lora', 'save_trained'), ('classify', 'save_classes'), ('train', '__call__')} # in a folder that gets its name when all is there; a log whose half lines are left out

def test_everything_with_a_final_name_is_written_whole():
    writes = lambda f, s: f.endswith(('write_text', 'write_bytes', 'save_file', 'save_pretrained', 'to_csv', 'to_json', 'to_parquet', 'torch.save', 'nbformat.write', 'copyfile', 'copytree', 'shutil.copy', 'shutil.move')) \
        or f.endswith('open') and any(w in s for w in ("'w'", "'wb'", "'a'", "'ab'", "'x'")) or f.endswith('savefig')
    found = {(m, name) for m, name, f, s in calls() if writes(f, s)}
    assert {('train', 'save_checkpoint'), ('lora', 'save_adapter')} < found
    assert found - UNDER_WAY - NOT_KEPT - OF_AN_ATTEMPT == set()

class Command: # unpickled, it would run
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)

@pytest.mark.fault(63)
def test_a_pickle_with_code_is_not_run(tmp_path):
    import torch
    from lora_study.train import sealed_files
    mark = tmp_path/'ran'
    written = loop(tmp_path/'c', steps=2)
    last = tmp_path/'c/checkpoint-00000002'
    torch.save(dict(optimizer=Command(mark), schedule={}, rng={}), last/'state.pt')
    (last/'manifest.json').write_text(json.dumps(sealed_files(last)))
    l = taken_up(tmp_path/'c')
    assert l.resumed_at == 1 and 'state.pt cannot be read' in l.notes[0] and not mark.exists()

@pytest.mark.fault(63)
def test_pickled_weights_are_refused(tmp_path):
    import torch
    from lora_study.config import EMBEDDED
    from lora_study.lora import load_adapter
    from lora_study.model import load_base
    from lora_study.planner import check_weights
    mark, base, adapter = tmp_path/'ran', tmp_path/'base', tmp_path/'adapter'
    shutil.copytree(str(EMBEDDED), base); (base/'model.safetensors').unlink()
    torch.save(Command(mark), base/'pytorch_model.bin')
    with pytest.raises(BadInput, match='pickled weights are not read'): check_weights(base, './base')
    with pytest.raises(BadInput, match='safetensors'): load_base(Run(model_name_or_path=str(base)), torch.device('cpu'))
    adapter.mkdir(); (adapter/'adapter_config.json').write_text('{}')
    torch.save(Command(mark), adapter/'adapter_model.bin')
    with pytest.raises(BadInput, match='pickled weights are not read'): load_adapter(adapter, torch.nn.Linear(2, 2))
    assert not mark.exists()

ASKING = "import sys; from lora_study import tracker\nfor _ in range(40): tracker.check_writable(sys.argv[1])"

def test_workers_ask_whether_a_folder_is_writable_at_the_same_time(tmp_path):
    asking = [subprocess.Popen([sys.executable, '-c', ASKING, str(tmp_path)], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate()[1] for p in asking] == ['', ''] and not list(tmp_path.iterdir())
