"Claims from the command line to the page, what their tests do when nothing is there, and results from elsewhere."
import json
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, cli
from lora_study import ledger, tracker
from lora_study.claims import Arm, bodies, planted, testify, tuned, valley
from lora_study.config import BadInput, expand, read_study
from lora_study.register import CLAIMS

RATES, SIX = (1e-3, 3e-3, 1e-2, 3e-2), range(6)

def body_of(folder, rows, margin=None):
    "A body of evidence from invented runs"
    db = tracker.open_db(folder/'study.db')
    planted(db, 'invented', rows)
    return bodies(db, margins=dict(invented=margin))[0]

def test_every_listed_claim_has_a_rule():
    from lora_study import rules
    asked = 'A1 A2 A6 B1 B3 B6 C1 C2 C4 D3 D8 F1 F2 F3 F4 G1 G3 G4 H1 H2 H3'.split()
    assert set(asked) <= rules.rule.__globals__['RULES'].keys() <= CLAIMS.keys()

def test_choosing_a_rate_does_not_flatter_it():
    "Two rates are as good as each other: the better of both on six seeds looks better than it is, the seeds judged by others do not"
    rng, judged, naive = np.random.default_rng(0), [], []
    for _ in range(150):
        y = np.array([1.5, 1., 1., 1.5]) + rng.normal(0, .1, (6, 4))
        rows = pd.DataFrame([dict(rep=s, learning_rate=r, status='done', test_nll=v, validation_nll=v, run_id=f'{s}/{r}') for s, line in enumerate(y) for r, v in zip(RATES, line)])
        judged.append(tuned(Arm('home', {}, rows)).rows.test_nll.mean()); naive.append(y.mean(0).min())
    error = np.std(judged)/np.sqrt(len(judged))
    assert abs(np.mean(judged) - 1) < 3.5*error and np.mean(naive) < 1 - 3.5*error

def test_a_difference_that_is_not_there_is_seldom_confirmed(tmp_path):
    kinds = [dict(load_in_4bit=True, bnb_4bit_quant_type=k) for k in ('nf4', 'fp4')]
    found = []
    for k in range(40):
        rng = np.random.default_rng(k)
        found.append(testify(body_of(tmp_path/str(k), [r for a in kinds for r in valley(rng, RATES[1:], SIX, 1., 1e-2, .05, **a)], margin=1e-6), 'F2').verdict)
    assert found.count('CONFIRMED') <= 5 and found.count('INCONCLUSIVE') >= 30 # one in forty is due

def test_a_difference_of_delta_is_seldom_called_none(tmp_path):
    found = []
    for k in range(40):
        rng = np.random.default_rng(k)
        found.append(testify(body_of(tmp_path/str(k), valley(rng, RATES[1:], SIX, 1., 1e-2, .05) + valley(rng, RATES[1:], SIX, 1.05, 1e-2, .05, load_in_8bit=True), margin=.05), 'F4').verdict)
    assert found.count('EQUIVALENT') <= 6 # two in forty are due

def test_a_study_may_ask_for_claims(folder):
    (folder/'asked.yaml').write_text('claims: [A2, F4]\nrates: [1e-3, 5e-3, 2e-2]\nmax_steps: 4\n')
    runs = expand(read_study(folder/'asked.yaml'))
    assert len(runs) == (3 + 1)*3*2 and {r.max_steps for r in runs} == {4} and sum(r.load_in_8bit for r in runs) == 6 # home is rank 8: one setting, run once
    for text, message in (('claims: [Z1]\n', 'Z1: no such claim'), ('claims: A1\n', 'expected a list'), ('claims: [A1]\nstage: later\n', 'expected one of noise'), ('claims: [A1]\nrates: [fast]\n', 'list of learning rates')):
        (folder/'bad.yaml').write_text(text)
        with pytest.raises(BadInput, match=message): read_study(folder/'bad.yaml')

@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT/'studies').glob('claims_*.yaml')))
def test_the_studies_for_claims_expand(name):
    assert 0 < len(expand(read_study(ROOT/'studies'/f'{name}.yaml'))) <= 64

def test_from_a_table_to_the_page(folder):
    rng = np.random.default_rng(0)
    rows = [(a['lora_r'], a['learning_rate'], a['seed'], m['test_nll']) for r in (8, 16, 32) for a, m in valley(rng, RATES, SIX, 1., 5e-3, lora_r=r)]
    (folder/'paper.csv').write_text('rank,lr,seed,loss,base_loss,gpu\n' + ''.join(f'{r},{lr},{s},{v},3.0,A100\n' for r, lr, s, v in rows))
    taken = cli('import', 'paper.csv', '--study', 'paper')
    assert taken.returncode == 0 and '72 runs taken in as paper, marked as measured elsewhere; kept as extra: gpu' in taken.stdout, taken.stderr
    assert cli('import', 'paper.csv').returncode == 2
    listed = cli('claims', '--write')
    assert listed.returncode == 0, listed.stderr
    lines = {l.split()[0]: l for l in listed.stdout.splitlines()}
    assert 'EQUIVALENT' in lines['A2'] and 'NOT-TESTABLE' in lines['C1'] and 'CONFIRMED' in lines['B6']
    page, verdicts = (folder/'results/claims/CLAIMS.md').read_text(), json.loads((folder/'results/claims/verdicts.json').read_text())
    assert 'elsewhere' in page and '.ipynb' not in page
    assert {v['claim'] for v in verdicts} == CLAIMS.keys()
    designed = cli('design', 'C1,F4', '--out', 'next.yaml')
    assert designed.returncode == 0 and len(expand(read_study(folder/'next.yaml'))) == 6*3*2, designed.stderr
