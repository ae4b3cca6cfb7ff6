"Runs that train together are the runs they would have been alone; whatever befalls the pack, each is done once and honestly."
import json, os, subprocess, threading, time
from pathlib import Path
import nbformat, psutil, pytest
from safetensors.torch import load_file, save_file
from conftest import ROOT, TINY, cli, command
from fake_point import execute as fake, record
from lora_study import forecast, sweep, together, tracker, workers
from lora_study.config import Run, Study, run_id

SHARED = {k: v for k, v in TINY.items() if k != 'max_steps'} | dict(per_device_train_batch_size=2, max_length=64, adam_epsilon=1e-3) # with a small one, Adam divides what rounding left of a small gradient by its own size
PAIRED = [dict(lora_r=[2, 8, 4, 4, 3], lora_target_modules=['all-linear', 'q,v', ['gate_proj', 'down_proj'], 'all-linear', 'q,v'], learning_rate=[1e-3, 5e-3, 2e-3, 1e30, 1e-3],
               data_seed=[1, 2, 3, 4, 5], max_steps=[4, 4, 3, 4, 4], engine=['auto', 'fast', 'auto', 'auto', 'peft'])]
STUDY = Study(name='five', shared=SHARED, paired=PAIRED)
NAMES = list(sweep.labels(STUDY).values()) # three that train, one that diverges, one of the reference

def in_place(nb, out, parameters, timeout=None):
    "A point without a kernel: trains as the real one does, from whatever checkpoint there is, and leaves adapter and record"
    import torch
    from lora_study.lora import make_trainable
    from lora_study.model import load_base
    from lora_study.preload import prepare
    from lora_study.train import Loop, train
    run, started, work = Run(**{k: v for k, v in parameters.items() if k in Run.model_fields}), tracker.now(), Path(parameters['work_dir'])
    tokenizer, _, encoded, _ = prepare(run)
    loop = Loop(run, make_trainable(load_base(run, torch.device('cpu')), run), encoded['train'][0], tokenizer.pad_token_id)
    train(loop, encoded['validation'][0], parameters['checkpoint_dir'], parameters['save_steps'], resume=parameters['resume'])
    work.mkdir(parents=True, exist_ok=True)
    save_file({n: p.detach() for n, p in loop.model.named_parameters() if p.requires_grad}, work/'adapter.safetensors')
    nb.metadata.papermill = dict(end_time=tracker.now())
    tracker.write_whole(out, nbformat.writes(nb))
    rec = record(run, started, seconds=loop.seconds, resumed=float(loop.resumed_at), steps=float(loop.step))
    tracker.write_whole(work/'record.json', rec.model_copy(update=dict(curves=loop.history, warnings=loop.notes, provenance=dict(device='cpu', packed_with=' '.join(loop.packed_with)))).model_dump_json())

def left(results, name, study='five'): # adapter, record of a finished run
    final = Path(results)/study/'runs'/name/'final'
    return load_file(final/'adapter.safetensors'), tracker.read_record(final/'record.json')

def same_training(one, two):
    import torch
    (a, r), (b, s) = one, two
    p, q = (torch.cat([t[k].flatten() for k in sorted(b)]) for t in (a, b))
    assert a.keys() == b.keys() and (p - q).norm() < 1e-5*q.norm()
    for curve, value in (('train', 'loss'), ('validation', 'nll')):
        assert [h['step'] for h in r.curves[curve]] == [h['step'] for h in s.curves[curve]]
        assert [h[value] for h in r.curves[curve]] == pytest.approx([h[value] for h in s.curves[curve]], rel=1e-5)
    assert r.curves['train'][-1]['learning_rate'] == s.curves['train'][-1]['learning_rate']

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "The five, each by itself"
    results = tmp_path_factory.mktemp('alone')
    assert list(sweep.sweep(STUDY, results, lambda line: None, execute=in_place, device='cpu').values()) == [True]*3 + [False, True]
    return results

def test_runs_that_train_together_are_the_runs_they_are_alone(folder, alone):
    said, steps = [], []
    done = sweep.sweep(STUDY, 'results', said.append, lambda *s: steps.append(s), pack='auto', execute=in_place, device='cpu')
    assert said[0] == "4 of 5 runs can train together; apart: 1 (engine = 'peft', the reference: set auto)"
    assert list(done) == NAMES and list(done.values()) == [True]*3 + [False, True] and (0, 5, '4 runs together') in steps
    ids = {n: run_id(r) for r, n in sweep.labels(STUDY).items()}
    for n in NAMES[:3]:
        together_, apart = left('results', n), left(alone, n)
        same_training(together_, apart)
        rec = together_[1]
        assert rec.provenance['packed_with'].split() == [ids[m] for m in NAMES[:4] if m != n]
        assert (rec.metrics['seconds'], rec.metrics['resumed']) == (0., rec.metrics['steps']) # the pack's time is nobody's, and no step was left
        assert len(rec.warnings) == 1 and rec.warnings[0].startswith('trained together with 3 other runs') # and nothing noted as changed
        assert (Path('results')/'five'/'points'/f'{n}.ipynb').is_file()
    same_training(left('results', NAMES[4]), left(alone, NAMES[4]))
    assert left('results', NAMES[4])[1].provenance['packed_with'] == '' and left('results', NAMES[4])[1].metrics['resumed'] == 0
    assert any(s.startswith(f'{NAMES[3]} left the others, who are untouched') for s in said) and any('3 runs trained together in ' in s and 'MiB of memory held at most' in s for s in said)
    rows = tracker.frame(tracker.open_db('results/study.db'), 'five').set_index('label')
    assert 'Diverged: loss = ' in rows.error_message[NAMES[3]] and rows.attempt.tolist() == [1]*5

LONG = Study(name='long', shared=SHARED | dict(max_steps=60, engine='auto', eval_steps=60), axes=dict(lora_r=[2, 4]))

def packs(): return [psutil.Process(pid) for note in Path('results').rglob('process.json') for pid, _ in json.loads(note.read_text())['processes']] # forked or started, the driver has noted them

def when(true, then):
    "Does a thing as soon as something holds, beside what goes on"
    def wait():
        end = time.time() + 120
        while not true() and time.time() < end: time.sleep(.02)
        then()
    t = threading.Thread(target=wait, daemon=True); t.start()
    return t

@pytest.mark.fault(30, 53)
def test_a_pack_killed_in_the_middle_loses_nothing(folder):
    said, at, killed = [], [], []
    begun = lambda: len(list(Path('results/long/runs').glob('*/checkpoints/checkpoint-*'))) >= 2
    def kill():
        for p in packs(): p.kill(); killed.append(p.pid)
    def goes_on(nb, out, parameters, timeout=None):
        at.append(max(Path(parameters['checkpoint_dir']).glob('checkpoint-*')).name)
        in_place(nb, out, parameters, timeout)
    watcher = when(begun, kill)
    assert list(sweep.sweep(LONG, 'results', said.append, pack='2', execute=goes_on, device='cpu', save_steps=5).values()) == [True, True]
    watcher.join()
    assert len(killed) == 1 and any('go on apart from their last checkpoints: it was killed by SIGKILL' in s for s in said)
    assert all('checkpoint-00000005' <= c < 'checkpoint-00000060' for c in at)
    assert not list(Path('results').rglob('process.json'))
    sweep.sweep(LONG, 'alone', lambda line: None, execute=in_place, device='cpu')
    for n in sweep.labels(LONG).values():
        same_training(left('results', n, 'long'), left('alone', n, 'long'))
        rec = left('results', n, 'long')[1]
        assert 0 < rec.metrics['resumed'] < 60 and rec.provenance['packed_with'] # part of it together: its seconds are still not a whole run's

# What the driver does, without a pack

SIX = Study(name='six', shared=dict(SHARED, engine='auto', max_steps=4), axes=dict(lora_r=[2, 4, 8]), seeds=[0, 1])

@pytest.fixture
def pretended(folder, monkeypatch):
    "Packs that are only noted"
    packs = []
    monkeypatch.setattr(sweep, 'train_together', lambda members, *a, **kw: packs.append([n for _, n, _, _ in members]))
    monkeypatch.setattr(sweep, 'room_for', lambda device, drivers: (64 << 30, 'cpu'))
    return packs

@pytest.mark.fault(42)
def test_what_another_driver_takes_meanwhile_is_made_up_for(pretended, monkeypatch):
    labels, claim = sweep.labels(SIX), tracker.claim
    second = run_id([*labels][1])
    def overtaken(db, study, rid, who, *a): # another was there between the choice and the claim
        if rid == second and not pretended: return None
        return claim(db, study, rid, who, *a)
    monkeypatch.setattr(tracker, 'claim', overtaken)
    assert set(sweep.sweep(SIX, 'results', lambda line: None, pack='3', execute=fake, device='cpu').values()) == {True}
    names = [*labels.values()]
    assert pretended == [[names[0], names[2], names[3]], [names[1], names[4], names[5]]]

def statuses(): return tracker.frame(tracker.open_db('results/study.db')).status.tolist()

@pytest.mark.parametrize('pack, drivers, sizes', [('auto', 1, [6]), ('4', 1, [4, 2]), ('auto', 2, [3, 2]), (None, 1, [])])
def test_packs_are_as_large_as_asked_and_a_driver_s_part(pretended, pack, drivers, sizes):
    done = sweep.sweep(SIX, 'results', lambda line: None, pack=pack, drivers=drivers, execute=fake, device='cpu')
    assert list(done) == list(sweep.labels(SIX).values()) and set(done.values()) == {True} and list(map(len, pretended)) == sizes

def test_packs_are_as_large_as_memory_is_predicted_to_hold(pretended, monkeypatch):
    runs = list(sweep.labels(SIX))
    three = together.together_bytes([together.parts_of(r, [], 'cpu') for r in runs[:3]])
    monkeypatch.setattr(sweep, 'room_for', lambda device, drivers: (three/.95 + 1, 'cpu'))
    sweep.sweep(SIX, 'results', lambda line: None, pack='auto', execute=fake, device='cpu')
    assert len(pretended[0]) == 3

@pytest.mark.fault(42)
def test_what_trains_together_is_nobody_else_s(pretended, monkeypatch):
    seen, labels = [], sweep.labels(SIX)
    theirs = next(n for n in labels.values() if 'seed-1' in n)
    def meanwhile(members, *a, **kw):
        db, names = tracker.open_db('results/study.db'), {n for _, n, _, _ in members}
        seen.append(names)
        assert theirs not in names
        assert [tracker.claim(db, 'six', run_id(r), 'elsewhere:1:1.00') for r, n in labels.items() if n in names] == [None]*len(names)
        tracker.release(db, 'six', other, 1)
    monkeypatch.setattr(sweep, 'train_together', meanwhile)
    db = tracker.open_db('results/study.db')
    tracker.register(db, 'six', labels)
    other = run_id(next(r for r, n in labels.items() if n == theirs))
    assert tracker.claim(db, 'six', other, tracker.owner()) == 1
    assert set(sweep.sweep(SIX, 'results', lambda line: None, pack='auto', execute=fake, device='cpu').values()) == {True}
    assert [len(s) for s in seen] == [5] # what another driver had was left out, and done when it was given back
    assert statuses() == ['done']*6

@pytest.mark.fault(31)
@pytest.mark.parametrize('where', ['in the pack', 'after two'])
def test_a_driver_that_leaves_gives_every_member_back(pretended, monkeypatch, where):
    done = []
    def stops(*a, **kw): raise KeyboardInterrupt
    def point(nb, out, parameters, timeout=None):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(fake(nb, out, parameters, timeout))
    if where == 'in the pack': monkeypatch.setattr(sweep, 'train_together', stops)
    with pytest.raises(KeyboardInterrupt): sweep.sweep(SIX, 'results', lambda line: None, pack='auto', execute=point, device='cpu')
    assert statuses() == (['waiting']*6 if where == 'in the pack' else ['done']*2 + ['waiting']*4)

def test_what_has_trained_already_is_in_no_pack(pretended):
    (run, name), *_ = sweep.labels(SIX).items()
    last = Path('results/six/runs')/name/'checkpoints'/'checkpoint-00000004'
    last.mkdir(parents=True); (last/'loop.json').write_text(json.dumps(dict(run_id=run_id(run), step=4, of=4)))
    sweep.sweep(SIX, 'results', lambda line: None, pack='auto', execute=fake, device='cpu')
    assert len(pretended) == 1 and len(pretended[0]) == 5 and name not in pretended[0]

def test_time_is_forecast_from_the_probe_where_training_was_not_timed():
    run = next(iter(sweep.labels(SIX)))
    row = dict(run=run, run_id=run_id(run), device='cpu', device_name='x', train_steps=4, step_s=.5, tok_s=100., started='2026-01-01T00:00:00+00:00', ended='2026-01-01T00:00:10+00:00')
    assert forecast.timed(run, [row], '', 'cpu') == dict(step_s=.5, total_s=12., how='same setting') # its ten seconds held no training
    assert forecast.timed(run, [row | dict(train_s=4.)], '', 'cpu') == dict(step_s=1., total_s=10., how='same setting')

def test_a_number_that_is_none_is_told_before_anything_starts(study_file):
    refused = cli('run', study_file, '--pack', 'many')
    assert refused.returncode == 2 and refused.stderr == 'error: --pack many: expected a number from 2 to 1024, or auto\n' and not Path('results').exists()

FILE = '\n'.join(f'{k}: {v}' for k, v in (SHARED | dict(engine='auto', eval_steps=400)).items()) + '\npaired:\n  - lora_r: [2, 4]\n    max_steps: [{0}, {0}]\nseeds: [0]\n'

@pytest.mark.slow
def test_packed_from_the_command_line(folder):
    "Real points: what was learnt is what is learnt alone, and what it cost is measured alone"
    Path('tiny.yaml').write_text(FILE.format(4))
    ran = [cli('run', 'tiny.yaml', '--results', where, *how) for where, how in (('together', ('--pack', 'auto')), ('apart', ()))]
    assert [r.returncode for r in ran] == [0, 0], [r.stdout + r.stderr for r in ran]
    assert '2 of 2 runs can train together' in ran[0].stdout and '2 runs trained together in' in ran[0].stdout
    packed, alone = (tracker.frame(tracker.open_db(f'{where}/study.db'), 'tiny').set_index('run_id') for where in ('together', 'apart'))
    assert packed.test_nll.tolist() == pytest.approx(alone.test_nll.tolist(), rel=1e-5) and packed.attempt.tolist() == [1, 1]
    assert packed.packed_with.tolist() == packed.index.tolist()[::-1] and 'train_s' not in packed and 'epoch_s' not in packed and not any(c.startswith('training_') for c in packed)
    assert packed.probe_train_s.tolist() == pytest.approx((packed.step_s*packed.train_steps).tolist()) and (packed.step_s > 0).all() and (packed.probe_peak_rss_bytes > 0).all()
    assert 'probe_train_s' not in alone and (alone.train_s > 0).all() and all((Path('together')/n).is_file() for n in packed.notebook)
    said = [w for f in Path('together').rglob('final/record.json') for w in tracker.read_record(f).warnings]
    assert len(said) == 2 and all('its training was not timed' in w for w in said)
    assert 'by the probe' in (Path('together')/packed.notebook.iloc[0]).read_text() and cli('plan', 'tiny.yaml', '--results', 'together').returncode == 0

@pytest.mark.slow
@pytest.mark.fault(30, 31, 32)
def test_a_pack_ends_with_its_driver_and_the_next_one_goes_on(folder):
    Path('tiny.yaml').write_text(FILE.format(600))
    steps = lambda: [int(c.name[-8:]) for c in Path('results/tiny/runs').glob('*/checkpoints/checkpoint-*')]
    def begun(beyond, *how): # a driver whose pack is beyond a step, and all that it started
        driver, end = subprocess.Popen(command('run', 'tiny.yaml', '--pack', 'auto', *how), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True), time.time() + 300
        far = lambda: [workers.latest(f)[0].get('step', 0) for f in Path('results/tiny/runs').glob('*/attempt-*/progress.jsonl')]
        while max(far(), default=0) <= beyond and driver.poll() is None and time.time() < end: time.sleep(.02)
        mine = psutil.Process(driver.pid).children(recursive=True)
        assert len(mine) == 2 # the warm parent, and the pack it forked
        return driver, mine
    driver, mine = begun(3)
    driver.terminate()
    assert driver.wait(60) == 143 and psutil.wait_procs(mine, timeout=20)[1] == []
    first = max(steps()) # it was asked to save, and did
    assert len(steps()) == 2 and 3 < first < 600 and tracker.frame(tracker.open_db('results/study.db'), 'tiny').status.tolist() == ['waiting']*2
    driver, mine = begun(first, '--save-steps', 20)
    driver.kill(); driver.wait()
    assert psutil.wait_procs(mine, timeout=20)[1] == []
    again = cli('run', 'tiny.yaml', '--pack', 'auto', timeout=1800)
    assert again.returncode == 0, again.stdout + again.stderr
    df = tracker.frame(tracker.open_db('results/study.db'), 'tiny')
    assert df.attempt.tolist() == [3, 3] and (df.resumed_at_step == 600).all() and df.packed_with.tolist() == df.run_id.tolist()[::-1]

@pytest.mark.slow
def test_workers_have_packs_of_their_own(folder, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(map(str, (ROOT, ROOT/'tests'))))
    said, study = [], SIX.model_copy(update=dict(axes=dict(lora_r=[2, 4])))
    assert set(workers.drive(study, 'results', [{}]*2, said.append, execute='fake_point:execute', pack='auto', device='cpu').values()) == {True}
    assert said[0] == '4 of 4 runs can train together' and sum('2 runs trained together in' in s for s in said) == 2
    assert tracker.frame(tracker.open_db('results/study.db')).attempt.tolist() == [1]*4

def test_runs_on_a_base_in_4_bits_share_its_constants():
    "They are neither parameters nor buffers"
    import torch
    from lora_study.model import load_base
    from lora_study.packed import sharing
    base = load_base(Run(load_in_4bit=True, dtype='bfloat16'), torch.device('cpu'))
    pairs = [(m, n) for m, n in zip(base.modules(), sharing(base).modules()) if getattr(m, 'quant_state', None) is not None]
    assert pairs and all(m is not n and n.quant_state is m.quant_state and n.weight is m.weight for m, n in pairs)
