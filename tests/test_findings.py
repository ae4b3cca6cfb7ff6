"Findings pages from records: executed, repeated, planted with a known truth, and shown without running what a dataset holds."
import json, re, shutil
import nbformat, numpy as np, pytest, yaml
from markdown_it import MarkdownIt
from conftest import ROOT, cli
from lora_study import answers, tracker
from lora_study.config import Loader, Run, expand, read_study, run_id
from lora_study.evidence import gather
from lora_study.findings import evidence_of, gaps, opening, questions, read, reservations, write_findings
from lora_study.stats import planted_pair

ASKED = [answers.rank_memory, answers.modules, answers.quantization, answers.memory_limit, answers.inference, answers.alpha_learning_rate, answers.layers_placement,
         answers.full_forgetting, answers.spectra, answers.engines]
NUMBER = re.compile(r'\d[\d.e−-]* .*(interval|\[)|n = \d+')

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "A results folder of a fresh clone: records, no database"
    root = tmp_path_factory.mktemp('clone')/'results'
    for s in ('quick', 'world_rank'): (root/s).mkdir(parents=True); shutil.copy(ROOT/'results'/s/'records.jsonl', root/s)
    return root

def planted(*settings): # (arguments, seeds × examples: NLL summed over 5 tokens)
    db = tracker.open_db(':memory:')
    for args, table in settings:
        for seed, row in enumerate(table):
            run = Run(**args, seed=seed, base_hash='b', data_hash='d'); rid = run_id(run)
            tracker.register(db, 'planted', {run: 'x'})
            db.execute("update runs set status='done', notebook=? where run_id=?", (f'planted/points/{rid}.ipynb', rid))
            for k, v in dict(base_nll=3., test_nll=row.sum()/(5*len(row)), trainable_params=1000.*run.lora_r, probe_peak_rss_bytes=2.**20*(500 + run.lora_r + seed)).items(): db.execute('insert into metrics values(?,?,?,-1,?)', ('planted', rid, k, float(v)))
            tracker.insert_scores(db, 'planted', rid, 'test', [dict(example=i, task='t', nll=float(x), tokens=5, correct_tokens=0, bytes=9, prediction=None, exact=None) for i, x in enumerate(row)])
    return gather(db, 'planted')

def pair(difference, seed=0): return planted_pair(np.random.default_rng(seed), difference, examples=60, tokens=[5]*60, seed_sd=.01, example_sd=.05, rest_sd=.05)

def test_every_page_of_a_study_answers_with_an_interval_or_says_what_would(results):
    pages = write_findings('quick', results, say=lambda line: None)
    assert [p.name for p in pages] == [p.name for p in questions()] and len(pages) == 10
    for p in pages:
        nb = nbformat.read(p, 4); nbformat.validate(nb)
        assert str(results) not in p.read_text() and str(ROOT) not in p.read_text()
        head = yaml.safe_load(nb.cells[0].source.strip('-\n'))
        assert head['title'].endswith('?') and head['categories'] == ['findings', 'quick']
        assert NUMBER.search(head['description']) or re.search(r'lora-study \w+ \w+', head['description']), (p.name, head['description'])
        assert not [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs if o.output_type == 'error' or o.get('name') == 'stderr']
        assert all(o.metadata['image/png']['alt'] for c in nb.cells if c.cell_type == 'code' for o in c.outputs if 'image/png' in o.get('data', {}))
        assert not re.search(r'\bnan\b', json.dumps([o.get('data', {}).get('text/markdown') for c in nb.cells if c.cell_type == 'code' for o in c.outputs]))

def test_the_same_records_give_the_same_bytes(results):
    first, second = ([p.read_bytes() for p in write_findings('world_rank', results, .04, only=['60', '68'], say=lambda line: None)] for _ in range(2))
    assert first == second and len(first) == 2
    assert not list((results/'world_rank'/'findings').glob('.*'))

def test_first_sentences_are_short(results):
    "One claim, one interval and n, to be read at once; an answer that is missing names what is"
    e = read(['world_rank'], results, .04)
    for f in (*ASKED, lambda e: answers.alpha_learning_rate(planted(*((dict(learning_rate=r), pair(0., k)[0] + 2*abs(k - 1)) for k, r in enumerate((1e-3, 3e-3, 1e-2)))))):
        a = f(e); first, *rest = re.split(r'(?<=[.?!]) ', a.sentence)
        assert len(first.split()) <= 30, first
        assert (a.verdict == 'missing' and 'cannot answer' in first) or (not rest and len(re.findall('interval', first)) == 1 and 'n = 6 seeds' in first), a.sentence

def test_what_is_missing_is_a_study_that_runs(results, folder):
    e = read(['quick'], results)
    blocks = [text for f in ASKED for _, text in f(e).missing]
    assert len(blocks) >= 5
    for text in blocks:
        name, body = re.match(r"cat > (\w+)\.yaml <<'END'\n(.*)\nEND\nlora-study run \1\.yaml\nlora-study findings quick \1$", text, re.S).groups()
        (folder/f'{name}.yaml').write_text(body)
        if 'lora_budget' in body: assert yaml.load(body, Loader)['lora_budget'] > 0; continue # its ranks need torch
        assert expand(read_study(folder/f'{name}.yaml'))
    more = read_study(folder/'quick_rate.yaml')
    assert {r.seed for r in expand(more)} == set(range(6)) and {r.train_size for r in expand(more)} == {8000} # as the study had it

def test_a_planted_winner_is_found():
    (worse, better), (worst, _) = pair(.3), pair(.6)
    a = answers.rank_memory(planted((dict(lora_r=2), worst), (dict(lora_r=8), better), (dict(lora_r=32), worse)))
    assert a.verdict == 'better' and a.sentence.startswith('lora_r=8 is better than each of the 2 other ranks')
    assert len(a.sentence.split()) <= 30 and re.search(r'by 0\.\d+ nats \(95% interval 0\.\d+ to 0\.\d+; n = 6 seeds\)\.$', a.sentence) and 'n = 6 seeds × 60 examples' in a.also[0]

def test_a_planted_tie_is_a_tie():
    same, also = pair(.002)
    a = answers.rank_memory(planted((dict(lora_r=8), same), (dict(lora_r=32), also)))
    assert a.verdict == 'equivalent' and a.sentence.startswith('A tie: both ranks')
    assert answers.memory_limit(planted((dict(lora_r=8), same), (dict(lora_r=32), also))).verdict == 'equivalent'

def test_few_seeds_decide_nothing():
    worse, better = pair(.6)
    a = answers.rank_memory(planted((dict(lora_r=8), worse[:1]), (dict(lora_r=32), better[:1])))
    assert a.verdict == 'undecided' and any('One seed describes' in c for c in a.caveats)
    assert any('seeds: [1, 2, 3, 4, 5]' in text for _, text in a.missing)

@pytest.mark.fault(66)
def test_text_of_a_dataset_is_shown_and_not_run(results, tmp_path):
    bad, lines = '<script>alert(1)</script>', (results/'quick'/'records.jsonl').read_text().splitlines()
    rows = [json.loads(l) for l in lines]
    for r in rows: r['config']['dataset_name'] = bad
    for r in rows[:2]: r['config']['lora_target_modules'] = [bad, '`q|v`', '![x](javascript:0)']
    rows[-1].update(status='failed', error_kind=bad, error_message=bad)
    (tmp_path/'quick').mkdir(); (tmp_path/'quick'/'records.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    e, shown = read(['quick'], tmp_path), 0
    for f in ASKED:
        a = f(e)
        for text in (opening(a), evidence_of(a), gaps(a), reservations(a, e)):
            html = MarkdownIt('commonmark', dict(html=True)).enable('table').render(text)
            assert '<script' not in html and '<img' not in html and 'javascript:0"' not in html
            shown += html.count('&lt;script&gt;')
    assert shown

def test_the_command_line_answers_from_records(results, folder, monkeypatch):
    monkeypatch.setenv('LORA_STUDY_WARM', '0') # one page: a warm parent would not pay
    (folder/'results').symlink_to(results)
    done = cli('findings', 'world_rank', '--only', '61')
    assert done.returncode == 0 and '61_modules: world_rank cannot answer this' in done.stdout, done.stderr
    failed = cli('findings', 'nothing')
    assert failed.returncode == 2 and 'nothing: no such study' in failed.stderr

def test_slices_whose_levels_share_names_keep_their_own_scores():
    (worse, better), (other, best) = pair(.3), pair(.3, 1)
    a = answers.rank_memory(planted((dict(lora_r=2, learning_rate=1e-3), worse), (dict(lora_r=8, learning_rate=1e-3), better), (dict(lora_r=2, learning_rate=1e-2), best), (dict(lora_r=8, learning_rate=1e-2), other)))
    assert a.sentence.startswith('lora_r=8 is better') and 'lora_r=2 is better' in a.tables[1][1]
