"The walk from a study file to a report, through real papermill runs."
import json, re
import pytest
from conftest import ROOT, STUDY, TINY, cli, shared
from lora_study import evidence, tracker
from lora_study.config import Run, expand, read_study, run_id, sealed
from lora_study.document import faults
from lora_study.pages import broken_links
from lora_study.sweep import read_template, run_point

def timeless(rec): # what must repeat exactly: everything but clocks, memory and the machine's load
    clocks = ('_s', '_bytes')
    metrics = {k: v for k, v in rec.metrics.items() if not k.endswith(clocks)} | dict(adapter_bytes=rec.metrics['adapter_bytes'])
    return rec.run_id, rec.config, metrics, rec.curves, rec.adapter, rec.scores

def test_the_same_run_twice_gives_the_same_record_to_the_bit(folder):
    run = sealed(Run(**TINY, lora_dropout=.1))
    first, second = (run_point(run, 'a', 'twice', folder/name)[0] for name in ('one', 'two'))
    assert timeless(first) == timeless(second)
    assert first.provenance['applied_lora_dropout'] == .1 and first.provenance['applied_trainable_params'] == first.metrics['trainable_params'] # read back from the model
    assert len(first.curves['train']) == 4 and [p['step'] for p in first.curves['validation']] == [0, 2, 4]

@pytest.mark.slow
@pytest.mark.fault(34)
def test_fewer_rows_at_a_time_make_the_same_steps_and_are_said(folder):
    run = sealed(Run(**TINY))
    whole, parts = (run_point(run, 'a', 'parts', folder/name, micro_batch=m)[0] for name, m in (('one', None), ('two', 5)))
    assert parts.run_id == whole.run_id == run_id(run) and parts.config == whole.config
    assert (parts.provenance['micro_batch'], whole.provenance.get('micro_batch')) == (5, None)
    assert 'out of memory with 16 rows at once' in parts.warnings[-1]
    losses = lambda rec: [p['loss'] for p in rec.curves['train']]
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4) and parts.metrics['test_nll'] == pytest.approx(whole.metrics['test_nll'], rel=1e-4)

def linked(page): # the notebooks a page leads to, each once: every number of a run is a link now
    return re.findall(r'^\[\d+\]: (points/\S+\.ipynb)$', page.read_text(), re.M)

def test_a_saved_adapter_loads_with_plain_peft_and_scores_the_same(folder):
    import torch
    from peft import PeftModel
    from lora_study.data import encode, load_splits
    from lora_study.evaluation import token_scores
    from lora_study.model import load_base, load_tokenizer
    run = sealed(Run(**TINY))
    rec, home = run_point(run, 'a', 'peft', folder)
    tokenizer = load_tokenizer(run)
    model = PeftModel.from_pretrained(load_base(run, torch.device('cpu')), str(home/'adapter')).eval()
    rows = token_scores(model, encode(load_splits(run).test, tokenizer, run.max_length)[0], tokenizer.pad_token_id)
    assert [r['nll'] for r in rows] == [s['nll'] for s in rec.scores['test']]

def test_a_study_ends_in_a_report_whose_numbers_and_links_hold(study_file):
    done = cli('run', study_file)
    assert done.returncode == 0, done.stderr
    db = tracker.open_db('results/study.db')
    df = tracker.frame(db, 'tiny')
    assert df.status.tolist() == ['done']*4 and df.attempt.tolist() == [1]*4
    page = study_file.parent/'results/tiny/RESULTS.md'
    text = page.read_text()
    assert broken_links(page) == []
    assert len(linked(page)) == 4
    assert faults((page.parent/'report.html').read_text(), page.parent) == []
    for point in page.parent.glob('points/*.ipynb'): # papermill stores a whole template as the path it came from
        assert json.loads(point.read_text())['metadata']['papermill']['input_path'] == '50_point.ipynb'
    known = evidence.gather(db, 'tiny')
    for name in known: # the mean of each setting with its interval over seeds
        m = evidence.mean(known, name)
        assert re.search(rf'\[{m.estimate:.3f}\]\[\d+\] {max(m.low, 0):.3f} to {m.high:.3f}', text), (name, m)
    for _, row in df.iterrows(): # stored per-example scores add up to what is reported
        for which in ('base', 'test'):
            s = tracker.example_scores(db, 'tiny', row.run_id, which)
            assert s.nll.sum()/s.tokens.sum() == pytest.approx(row[f'{which}_nll'], rel=1e-12)
            assert s.exact.dropna().mean() == row[f'{which}_exact_match']

    again = cli('run', study_file)
    assert again.returncode == 3 and 'nothing left to do' in again.stdout
    listed = cli('plan', study_file)
    assert '4 runs, 4 done, 0 to do' in listed.stdout
    shown = cli('show', df.run_id[0])
    assert shown.returncode == 0 and f'{df.test_nll[0]:.3f}' in shown.stdout and f'applied_engine = {df.applied_engine[0]}' in shown.stdout and 'relative_norm' not in shown.stdout and 'relative norm' in shown.stdout
    exported = cli('export', 'tiny')
    assert [json.loads(l)['run_id'] for l in exported.stdout.splitlines()] == df.run_id.tolist()
    adapter = study_file.parent/'results/tiny/runs'/df.label[3]/'final/adapter'
    judged = cli('evaluate', adapter, '--test-size', 8, '--generate-size', 2, '--max-new-tokens', 4)
    assert judged.returncode == 0 and f'| {df.base_nll[3]:.3f} | {df.test_nll[3]:.3f} |' in judged.stdout, judged.stdout + judged.stderr
    asked = cli('runs', '--where', 'lora_r=4', '--where', 'seed=1')
    assert asked.stdout.splitlines()[-1] == '1 run'
    assert cli('report', study_file, '--set', 'axes={lora_r: [2]}').returncode == 0 # what a study no longer asks for leaves its page and its records
    assert len(linked(page)) == (page.parent/'records.jsonl').read_text().count('\n') == 2

def test_what_failed_is_recorded_and_done_again_when_asked(study_file):
    from unittest.mock import patch
    from lora_study import sweep
    study_file.write_text(STUDY.replace('[2, 4]', '[2]').replace('[0, 1]', '[0]'))
    study = read_study(study_file)
    with patch.object(sweep, 'read_template', lambda path=None: broken(read_template(path))):
        assert list(sweep.sweep(study, 'results', say=lambda l: None).values()) == [False]
    db = tracker.open_db('results/study.db')
    row = tracker.frame(db, 'tiny').iloc[0]
    assert (row.status, row.error_kind) == ('failed', 'error') and 'planted' in row.error_message
    assert (study_file.parent/'results'/row.notebook).is_file() and 'failed' in row.notebook
    assert cli('report', study_file).returncode == 0
    assert 'planted' in (study_file.parent/'results/tiny/RESULTS.md').read_text()
    left = cli('run', study_file)
    assert left.returncode == 1 and '1 failed earlier (error): `lora-study run tiny.yaml --retry-failed` tries again' in left.stdout.replace(f'{study_file.parent}/', '')
    assert tracker.frame(db, 'tiny').attempt.tolist() == [1]
    assert cli('run', study_file, '--retry-failed').returncode == 0
    row = tracker.frame(db, 'tiny').iloc[0]
    assert (row.status, row.attempt) == ('done', 2)
    assert not (study_file.parent/'results/tiny/failed').exists() or not list((study_file.parent/'results/tiny/failed').iterdir())

def broken(nb): # the real template with a cell that fails half-way
    next(c for c in nb.cells if 'train(loop' in c.source).source = 'raise RuntimeError("planted")'
    return nb

def test_a_study_may_generate_nothing(study_file):
    study_file.write_text(STUDY.replace('[2, 4]', '[2]').replace('[0, 1]', '[0]').replace('generate_size: 2', 'generate_size: 0'))
    done = cli('run', study_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'exact match' not in (study_file.parent/'results/tiny/RESULTS.md').read_text().partition('## Methods')[0]

@pytest.mark.fault(35)
def test_a_run_that_diverges_is_data(study_file):
    study_file.write_text(STUDY.replace('[2, 4]', '[2]').replace('[0, 1]', '[0]') + 'learning_rate: 1e30\n')
    done = cli('run', study_file)
    assert done.returncode == 1
    row = tracker.frame(tracker.open_db('results/study.db'), 'tiny').iloc[0]
    assert (row.status, row.error_kind) == ('failed', 'diverged') and 'lower learning_rate' in row.error_message

def test_the_templates_parameters_are_runs_fields_with_their_defaults():
    from papermill.inspection import inspect_notebook
    from lora_study.sweep import HOW
    found = {k: eval(v['default']) for k, v in inspect_notebook(str(ROOT/'nbs/50_point.ipynb')).items()}
    assert {k: v for k, v in found.items() if k not in HOW} == {k: f.default for k, f in Run.model_fields.items()}

def test_ids_do_not_move_between_versions(): # a moved id would orphan every finished run; a moved default would give an old id a new meaning
    import hashlib
    assert hashlib.sha256(json.dumps(Run().model_dump(), sort_keys=True).encode()).hexdigest()[:12] == '6ac02f034e6c'
    assert run_id(Run()) == 'b4b8bf78e9ad'
    assert run_id(Run(lora_r=16, seed=3, learning_rate=1e-4, base_hash='b', data_hash='d')) == '9e8d60bd46f7'

@pytest.mark.parametrize('name', ['quick', 'e2e_stories', 'alpaca_stories'])
def test_the_studies_that_ship_expand(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    if name != 'quick': shared('models/stories260K')
    assert len(expand(read_study(ROOT/f'studies/{name}.yaml'))) >= 6
