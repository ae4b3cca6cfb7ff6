"Random study files and datasets: read, or refused in one line; never a traceback, never a run from what is wrong."
import json, math, os, re
import pytest, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from lora_study import tracker
from lora_study.config import BadInput, Point, Run, Study, expand, read_study, read_yaml, run_id
from lora_study.data import FORMATS, load_splits
from lora_study.elsewhere import read_table
from lora_study.guards import exported

MANY = int(os.environ.get('LORA_STUDY_FUZZ', 1)) # times as many examples, and then random ones
QUICK = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=MANY == 1, database=None) # the same examples every time: a red suite is a bug, not luck

def one_line(f, *args): # what f gives, or None where it refused as it should
    try: return f(*args)
    except BadInput as e:
        assert str(e) and str(e).encode('utf-8', 'strict') and len(str(e)) < 2000
        return None

@pytest.fixture(scope='module')
def file(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')/'tiny.yaml'

odd = st.one_of(st.none(), st.booleans(), st.integers(-10**20, 10**20), st.floats(), st.text(max_size=8), st.sampled_from(['r', '2r', '0r', '9'*400 + 'r', '/', '.', '~nobody', '../x', '[', '(', 'embedded', 'hub/id', 'CON', '\0', '${HOME}', '1e-4']))
value = st.recursive(odd, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=2), max_leaves=4)
field = st.sampled_from([*Point.model_fields, *Study.model_fields, 'lora_study', 'claims', 'stage', 'rates', 'x=1; import os', 'lora_rank']) | st.text(max_size=6)
right = {k: f.default for k, f in Point.model_fields.items()}
study = st.dictionaries(field, value, max_size=3) | st.fixed_dictionaries({}, optional=dict(axes=st.dictionaries(field, st.lists(value, max_size=3) | value, max_size=2), seeds=st.lists(odd, max_size=3), paired=st.lists(st.dictionaries(field, st.lists(value, max_size=3), max_size=2), max_size=2) | value,
    lora_alpha=value, lora_r=value, name=value, max_runs=value, claims=st.lists(st.sampled_from(['A1', 'F4', 'G9', 'zzz']) | odd, max_size=2) | odd, stage=odd, rates=st.lists(odd, max_size=2), trust_remote_code=odd, bad_rows=odd))

@pytest.mark.fault(3, 5, 7, 8, 10, 65)
@settings(max_examples=120*MANY, **QUICK)
@given(study)
def test_a_study_of_random_values_is_read_or_refused(file, data):
    file.write_text(yaml.safe_dump(data, allow_unicode=False), encoding='utf-8')
    found = one_line(read_study, file)
    if found is None: return
    runs = expand(found) # what is read can be run: every value has its type and its range, every id is its own
    assert runs and len({run_id(r) for r in runs}) == len(runs) <= found.max_runs
    for r in runs: assert Run.model_validate(r.model_dump()) == r and 1 <= r.lora_r and 0 < r.learning_rate < math.inf and r.lora_alpha > 0

@pytest.mark.fault(2, 3, 61)
@settings(max_examples=120*MANY, **QUICK)
@given(st.text(st.sampled_from('ab01: -\n\t[]{}&*!<>|?#,"\'%@.~e+é\u2028\0\ufeff'), max_size=40) | st.lists(st.sampled_from(['lora_r', ': ', '\n', '  ', '- ', '&a ', '*a', '[', ']', '{', '}', '!!int ', '!!python/name:os.system ', '!!timestamp ', '!!float ', '!!set ', '!!omap ', '!!binary ', '<<', '1e-4', '""', '"\\ud800"', '0x_', '1:60', '2024-13-45', '\t', '? ', '| ', '---\n', '8']), max_size=12).map(''.join))
def test_random_text_is_read_or_refused_as_a_study_file(file, text):
    file.write_text(text, encoding='utf-8')
    data = one_line(read_yaml, file)
    assert data is None or all(isinstance(k, str) for k in data)
    one_line(read_study, file)

@pytest.mark.fault(2)
@settings(max_examples=60*MANY, **QUICK)
@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_read_as_a_study_file(file, raw):
    file.write_bytes(raw)
    one_line(read_study, file)

counts, names = st.sampled_from([1, 2, 3, 7, 64, 4096, 10**9, 2**53 - 1]), st.sampled_from(['embedded', 'gsm8k', 'memorise', 'sing', 'q,v', 'all-linear', 'head', '.*', 'q_proj', 'nope', 'lm_head', 'no/such', '', 'a' * 300])
allowed = dict(dtype=['float32', 'bfloat16', 'float16'], optim=['adamw_8bit', 'paged_adamw_8bit'], init_lora_weights=['gaussian', 'pissa', 'olora', 'loftq'], bias=['all', 'lora_only'], task_type=['SEQ_CLS'], dataset_format=[*FORMATS],
               lr_scheduler_type=['cosine', 'inverse_sqrt', 'constant'], layers_to_transform=['first_half', [0], [99], [0, 0], [10**9]], lora_target_modules=['q,v', 'head', '.*', ['lm_head'], ['q_proj', 'q_proj'], '(a+)+b', 'nope'], lora_budget=[1, 5000, 10**12], lora_alpha=['r', '1e-30', 1e308, 1e-320])
def fitting(field): # values of the right type, sensible or not
    f = Point.model_fields[field]
    if field in allowed: return st.sampled_from(allowed[field])
    return st.booleans() if f.annotation is bool else st.sampled_from([0., .5, 1e-30, 1e300]) if isinstance(f.default, float) else counts if isinstance(f.default, int) else names | counts
plausible = st.lists(st.sampled_from([k for k in Point.model_fields if not k.endswith('_hash') and k != 'seed']), min_size=1, max_size=3, unique=True).flatmap(lambda ks: st.fixed_dictionaries({k: fitting(k) for k in ks}))

@pytest.mark.slow
@pytest.mark.fault(8, 9, 13, 22)
@settings(max_examples=60*MANY, **QUICK)
@given(plausible)
def test_a_study_of_plausible_values_can_be_run_or_is_refused_before(file, data):
    from lora_study.forecast import forecast
    from lora_study.planner import preflight
    file.write_text(yaml.safe_dump(dict(train_size=16, validation_size=4, test_size=4) | data))
    found = one_line(read_study, file)
    if found is None or one_line(preflight, found, 'cpu') is None: return
    assert forecast(found, None, ('card', 24 << 30, 'cuda'))

cell = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None), max_size=6), st.just(''), st.sampled_from(['\ud800', '<|end|>', '=1+1', '</s>']))
cells = st.recursive(cell, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(['role', 'content', 'text', 'from', 'value', 'answer_start', 'a']), x, max_size=3), max_leaves=6)
columns = st.sampled_from(sorted({c for f in FORMATS.values() for names in f.columns for c in names} | {'split', 'task', 'group'}))
rows = st.lists(st.one_of(st.dictionaries(columns, cells, max_size=4), st.sampled_from(list(FORMATS.values())).flatmap(lambda f: st.sampled_from([*f.columns])).flatmap(lambda names: st.fixed_dictionaries({n: cells for n in names}, optional=dict(split=cell, task=cells))),
                          st.fixed_dictionaries(dict(prompt=st.text(min_size=1, max_size=4), completion=st.text(min_size=1, max_size=4)), optional=dict(task=cells, group=cells, split=cells, choices=cells, references=cells))), max_size=12)

def loaded(path, **how):
    from functools import partial
    s = one_line(partial(load_splits, Run(dataset_name=str(path), train_size=None, validation_size=None, test_size=None, **how)))
    for r in [] if s is None else [*s.train, *s.validation, *s.test]: # whatever is kept can be learnt from and stored
        assert r['prompt'].strip() or r['completion'].strip()
        json.dumps(r, ensure_ascii=False).encode('utf-8')
    return s

@pytest.mark.fault(17, 18, 20, 21)
@settings(max_examples=120*MANY, **QUICK)
@given(rows, st.sampled_from(['auto', *FORMATS]))
def test_random_rows_are_read_or_refused(file, rows, how):
    path = file.with_name('rows.jsonl')
    path.write_text('\n'.join(map(json.dumps, rows)))
    loaded(path, dataset_format=how)

@pytest.mark.fault(17, 19)
@settings(max_examples=80*MANY, **QUICK)
@given(st.sampled_from(['.jsonl', '.json', '.csv', '.tsv', '.txt', '.parquet']), st.binary(max_size=40) | st.text(st.sampled_from('{}[]":,\\nu18da \n\t\r\0"\'pé\ufeff'), max_size=60).map(str.encode) | st.lists(st.sampled_from(['prompt', 'completion', ',', '\t', '\n', '"', 'a', '', '{"prompt": "a", "completion": "b"}']), max_size=16).map(lambda x: ''.join(x).encode()))
def test_random_files_are_read_or_refused(file, suffix, raw):
    path = file.with_name('rows').with_suffix(suffix)
    path.write_bytes(raw)
    loaded(path)

@pytest.mark.fault(17)
@settings(max_examples=80*MANY, **QUICK)
@given(st.binary(max_size=40) | st.lists(st.lists(st.sampled_from(['rank', 'lr', 'test_nll', 'status', 'seed', 'note', '8', '1e-3', 'nan', '2.5', 'done', '=cmd', '', '"', '-1', 'é']), max_size=4).map(','.join), max_size=5).map(lambda x: '\n'.join(x).encode()))
def test_random_tables_from_elsewhere_are_read_or_refused(file, raw):
    path = file.with_name('elsewhere.csv')
    path.write_bytes(raw)
    one_line(read_table, path)

record = dict(study='s', run_id='0'*12, label='r-8', status='done', attempt=1, started=None, ended=None, error_kind=None, error_message=None, notebook='s/points/r-8.ipynb', config={}, provenance={}, adapter=[], warnings=[], samples=[], metrics=[('test_nll', -1, 1.)], scores={})

@pytest.mark.fault(17, 64)
@settings(max_examples=80*MANY, **QUICK)
@given(st.dictionaries(st.sampled_from([*record]), cells, max_size=3), st.sets(st.sampled_from([*record]), max_size=1))
def test_random_exports_are_taken_in_or_refused(file, changed, lost):
    path, db = file.with_name('records.jsonl'), tracker.open_db(':memory:')
    path.write_text(json.dumps({k: v for k, v in (record | changed).items() if k not in lost}) + '\n')
    n = one_line(tracker.import_records, db, path)
    names = [tuple(r) for r in db.execute('select study, label, run_id, notebook from runs')]
    assert len(names) == (n or 0) and all(re.fullmatch(r'[\w./-]*', x or '') and '..' not in (x or '') and not (x or '').startswith('/') for r in names for x in r)
    assert tracker.frame(db).shape[0] == len(names)
