"Reports on studies that are not the simple case: grids, failures, several bases, several studies, hostile records. Nothing is trained."
import json
import pytest
from typer.testing import CliRunner
from conftest import ROOT, cli
from lora_study import evidence, tracker
from lora_study.cli import app
from lora_study.config import BadInput, Run, Study, run_id
from lora_study.document import Table, faults, plain, to_html, to_markdown
from lora_study.report import Place, report_of, study_of, write_joint, write_report

RECORDS = [json.loads(l) for l in (ROOT/'results/quick/records.jsonl').read_text().splitlines()] # three ranks, two seeds

def changed(record, scale=1., study='grid', **arguments): # a real record as if it had been another run
    config = record['config'] | arguments
    rid = run_id(Run(**config))
    metrics = [[n, s, v*scale if n == 'test_nll' else v] for n, s, v in record['metrics']]
    scores = record['scores'] | dict(test=record['scores']['test'] | dict(nll=[v*scale for v in record['scores']['test']['nll']]))
    return record | dict(study=study, run_id=rid, label=rid, config=config, metrics=metrics, scores=scores, notebook=f'{study}/points/{rid}.ipynb')

def database(folder, records):
    path = folder/'records.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(r) + '\n' for r in records))
    db = tracker.open_db(folder/'results/study.db')
    tracker.import_records(db, path)
    return db

def page_of(db, folder, *names):
    studies = [study_of(tracker.frame(db, n)) for n in names]
    return report_of(db, studies, Place(folder/'results'/'+'.join(names), folder/'results'))

def titles(pieces): return [p.title for p in pieces if hasattr(p, 'title')]

def test_a_grid_asks_one_question_for_each_argument(folder):
    grid = [changed(r, f, learning_rate=lr) for lr, f in ((5e-3, 1.), (1e-3, 2.)) for r in RECORDS]
    db = database(folder, grid)
    doc = page_of(db, folder, 'grid')
    found = next(p for p in doc.pieces if p.title == 'Findings')
    assert set(titles(found.pieces)) == {'Rank', 'Learning rate'}
    assert faults(to_html(doc)) == []
    e = evidence.gather(db, 'grid'); top = evidence.best(e)
    rate = next(s for s in found.pieces if s.title == 'Learning rate')
    assert [plain(r.cells[0]) for t in rate.pieces if isinstance(t, Table) for r in t.rows] == [top.replace('0.005', '0.001')]

def test_a_divergence_counts_and_other_failures_are_told(folder):
    lost = dict(status='failed', metrics=[], scores={})
    runs = [changed(r) for r in RECORDS]
    runs[0] |= lost | dict(error_kind='diverged', error_message='loss is nan at step 3: lower learning_rate')
    runs[3] |= lost | dict(error_kind='out_of_memory', error_message='tried <b>2 GiB</b> in /home/me/lib/x.py')
    db = database(folder, runs)
    doc = page_of(db, folder, 'grid'); page, text = to_html(doc), to_markdown(doc)
    assert faults(page) == []
    assert '4 of 6 runs finished' in text and '2 failed' in text and '1 diverged' in text
    assert 'gradient_checkpointing' in text and '/home/me' not in text + page and '<b>' not in text + page

def test_runs_tested_on_other_rows_are_never_in_one_table(folder):
    db = database(folder, [changed(r) for r in RECORDS] + [changed(r, test_size=200) for r in RECORDS])
    doc = page_of(db, folder, 'grid')
    assert [t for t in titles(doc.pieces) if 'test_size' in t] == ['test_size=300', 'test_size=200']
    assert faults(to_html(doc)) == []

def test_a_study_without_a_finished_run_still_has_a_page(folder):
    db = database(folder, [changed(r) | dict(status='failed', metrics=[], scores={}, error_kind='error', error_message='no') for r in RECORDS])
    doc = page_of(db, folder, 'grid')
    assert faults(to_html(doc)) == [] and 'No run finished' in to_markdown(doc)

def test_published_records_that_the_database_lacks_are_never_overwritten(folder):
    study = study_of(tracker.frame(database(folder, RECORDS), 'quick'))
    published = folder/'results/quick/records.jsonl'
    published.parent.mkdir(parents=True)
    published.write_text(text := (ROOT/'results/quick/records.jsonl').read_text())
    for missing in (tracker.open_db(folder/'empty.db'), database(folder/'part', RECORDS[:4])):
        with pytest.raises(BadInput, match='lora-study import .*quick/records.jsonl'): write_report(missing, study, folder/'results')
        assert published.read_text() == text
    assert write_report(tracker.open_db(folder/'results/study.db'), study, folder/'results').is_file()

def test_a_setting_alone_is_no_comparison(folder):
    db = database(folder, [changed(r) for r in RECORDS[:2]])
    doc = page_of(db, folder, 'grid')
    assert faults(to_html(doc)) == [] and 'reaches a held-out NLL' in to_markdown(doc) and 'Findings' not in titles(doc.pieces)

def test_studies_together_by_name_from_the_command_line(folder):
    database(folder, [changed(r, study='one') for r in RECORDS] + [changed(r, 2., 'two', learning_rate=1e-3) for r in RECORDS])
    done = cli('report', 'one', 'two')
    assert done.returncode == 0, done.stderr
    page = folder/'results/one+two/report.html'
    assert str(page.relative_to(folder)) in done.stdout and faults(page.read_text()) == []
    assert 'href="../one/points/' in page.read_text() and 'learning_rate=0.001' in page.read_text() # one body of evidence
    assert cli('report', 'one', '--out', 'elsewhere').returncode == 0 and (folder/'elsewhere/RESULTS.md').is_file()
    missing = cli('report', 'three')
    assert missing.returncode == 2 and 'neither a study file nor a study' in missing.stderr

@pytest.mark.fault(66)
def test_what_a_record_says_is_text(folder):
    sly = '<script>alert(1)</script> [x](javascript:1) {{< include x >}} `|$ \u202e ' + 'w'*200
    db = database(folder, [changed(r, dataset_name=sly) | dict(provenance=r['provenance'] | dict(device_name=sly)) for r in RECORDS])
    db.execute("update runs set notebook='javascript:alert(1)'") # which an import would refuse
    doc = page_of(db, folder, 'grid'); page, text = to_html(doc), to_markdown(doc)
    assert faults(page) == []
    assert '<script' not in page + text and '{{<' not in text and '](javascript' not in text and '\u202e' not in page + text

@pytest.mark.parametrize('name', ['quick', 'world_rank'])
def test_the_published_reports_keep_their_promises(folder, name):
    db = tracker.open_db(folder/'results/study.db')
    tracker.import_records(db, ROOT/f'results/{name}/records.jsonl')
    text = (ROOT/f'results/{name}/report.html').read_text()
    assert faults(text, ROOT/f'results/{name}') == []
    for rid in tracker.frame(db, name).run_id: assert f'id="run-{rid}"' in text
    assert len(text) < 2**20

def test_a_record_from_before_an_argument_existed_has_its_default(folder):
    old = [r | dict(config={k: v for k, v in r['config'].items() if k not in ('dataset_path', 'optim')}) for r in RECORDS]
    db = database(folder, old)
    assert tracker.frame(db, 'quick').optim.eq('adamw_torch').all()
    assert len(evidence.gather(db, 'quick')) == 3

def test_what_moved_between_two_studies_is_in_their_report_and_at_the_gate(folder):
    six = lambda study, f=1., **more: [changed(r, f*(1 + .002*s), study, seed=s, **more) for r in RECORDS[::2] for s in range(6)]
    database(folder, six('before') + six('same') + six('worse', 1.5) + six('other', max_steps=99))
    report = lambda *args: CliRunner().invoke(app, ['report', *args])
    fine, bad, open_ = report('before', 'same', '--gate'), report('before', 'worse', '--gate'), report('before', 'worse')
    assert (fine.exit_code, bad.exit_code, open_.exit_code) == (0, 1, 0), fine.output + bad.output + open_.output
    assert 'worse against before' in bad.output
    text, page = ((folder/'results/before+worse'/n).read_text() for n in ('RESULTS.md', 'report.html'))
    assert '## What moved from before to worse' in text and faults(page) == [] and 'href="../before/points/' in page and 'href="../worse/points/' in page
    apart, alone = report('before', 'other', '--gate'), report('before', '--gate')
    assert apart.exit_code == 2 and 'no setting in common' in apart.output and alone.exit_code == 2

def test_imported_rows_stand_beside_our_own(folder):
    from lora_study.elsewhere import import_table
    from lora_study.tables import settings_table, where_it_ran
    db = database(folder, RECORDS)
    (folder/'paper.csv').write_text('rank,seed,loss,base_loss,parameters\n' + ''.join(f'{r},{s},{1 + .1/r + .001*s},3.0,{1000*r}\n' for r in (1, 4, 16) for s in (0, 1)))
    import_table(db, folder/'paper.csv', 'paper')
    alone = tracker.frame(db, 'paper')
    assert settings_table(alone, ['lora_r']).count('imported') == 3 and 'paper.csv' in where_it_ran(alone)
    mixed = settings_table(tracker.frame(db), ['study', 'lora_r'])
    assert mixed.count('imported') == 3 and mixed.count('.ipynb)') == 6
    for names in (('paper',), ('quick', 'paper')):
        doc = page_of(db, folder, *names); page, text = to_html(doc), to_markdown(doc)
        assert faults(page) == [] and 'imported from paper.csv' in text and '(imported)' in text
    assert all(f'beside_{k}.svg' in text for k in ('rank', 'frontier', 'forest')), text[-3000:]
