"Real models and data beside the project, through the same commands."
import json
import pytest
from conftest import ROOT, cli, shared
from lora_study import tracker
from lora_study.config import Run
from lora_study.data import load_splits

SMALL = ['--set', 'train_size=64', '--set', 'validation_size=16', '--set', 'test_size=16', '--set', 'generate_size=4', '--set', 'max_steps=4', '--set', 'seeds=[0]']

def ends_in_a_report(name, results):
    done = cli('run', f'studies/{name}.yaml', '--results', results, *SMALL, '--set', 'axes={lora_r: [1]}', cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    df = tracker.frame(tracker.open_db(results/'study.db'), name)
    assert df.status.tolist() == ['done'] and df.test_nll[0] < df.base_nll[0]
    assert '1 of 1 runs finished' in (results/name/'RESULTS.md').read_text()

def test_e2e_on_stories260k_ends_in_a_report(folder):
    shared('models/stories260K'); shared('data/e2e')
    ends_in_a_report('e2e_stories', folder)

def test_alpaca_on_stories260k_ends_in_a_report(folder):
    shared('models/stories260K'); shared('data/alpaca/alpaca_5000.json')
    ends_in_a_report('alpaca_stories', folder)

def test_e2es_own_splits_are_kept():
    path = shared('data/e2e')
    s = load_splits(Run(dataset_name=str(path), train_size=None, validation_size=None, test_size=None))
    assert (len(s.train), len(s.validation), len(s.test)) == (42061, 4672, 4693)
    assert s.facts['split'] == 'as given'

def test_alpacas_cut_is_disjoint_and_empty_outputs_are_counted():
    path = shared('data/alpaca/alpaca_5000.json')
    rows = json.loads(path.read_text())
    s = load_splits(Run(dataset_name=str(path), train_size=None, validation_size=None, test_size=None))
    assert not {r['prompt'] for r in s.train} & {r['prompt'] for r in s.test}
    assert s.facts['rows_left_out'] == sum(not r['output'].strip() for r in rows)
    assert len(s.train) + len(s.validation) + len(s.test) + s.facts['rows_left_out'] == len(rows)

def test_prepared_data_is_the_data(folder):
    path = shared('data/e2e')
    done = cli('prepare-data', path, 'e2e.jsonl', '--train-size', '50', '--validation-size', '10', '--test-size', '10')
    assert done.returncode == 0 and '50 train, 10 validation, 10 test' in done.stdout
    sizes = dict(train_size=50, validation_size=10, test_size=10)
    a, b = load_splits(Run(dataset_name=str(path), **sizes)), load_splits(Run(dataset_name='e2e.jsonl', **sizes))
    for s in ('train', 'validation', 'test'): assert {r['prompt'] + r['completion'] for r in getattr(a, s)} == {r['prompt'] + r['completion'] for r in getattr(b, s)}

@pytest.mark.fault(16)
def test_the_hub_door_reads_a_dataset_and_offline_says_so_in_one_line(folder):
    from lora_study.config import BadInput
    from lora_study.data import pairs, read_hub
    (folder/'data').mkdir()
    for name, n in (('train', 5), ('test', 2)):
        (folder/'data'/f'{name}.jsonl').write_text(''.join(json.dumps(dict(instruction=f'say {i}', input='', output=str(i))) + '\n' for i in range(n)))
    rows = read_hub(Run(dataset_name=str(folder/'data'))) # datasets.load_dataset, as for a hub id
    assert {s: len(r) for s, r in rows.items()} == dict(train=5, test=2)
    assert pairs(rows['test'], 'auto', 'data')[0][1]['completion'] == '1'
    said = cli('prepare-data', 'no-such-owner/no-such-data', 'out.jsonl')
    assert said.returncode == 2 and len(said.stderr.strip().splitlines()) == 1 and 'go online' in said.stderr
    assert not (folder/'out.jsonl').exists()
