"Every claim that the planned studies are to test reaches a verdict on exactly their runs, and the right one, whether it was planted true or false."
import functools, re
import pytest
import planned
from typer.testing import CliRunner
from lora_study import tracker
from lora_study.claims import bodies, testify
from lora_study.cli import app

SAYS = dict(A1='CONFIRMED', A2='EQUIVALENT', A6='EQUIVALENT', B1='CONFIRMED', B3='EQUIVALENT', C1='CONFIRMED', C2='EQUIVALENT', C3='INCONCLUSIVE', C4='CONFIRMED', C5='INCONCLUSIVE', D1='EQUIVALENT', D3='CONFIRMED', D5='CONFIRMED', D6='CONFIRMED', D8='CONFIRMED', F1='EQUIVALENT', F2='CONFIRMED', F3='EQUIVALENT', F4='EQUIVALENT',
            G3='EQUIVALENT', G4='EQUIVALENT', H1='CONFIRMED', H2='CONFIRMED', H3='CONFIRMED') # where it is true; C3 is about any rank and C5 about any matrix, and not all of them are planned
TOGETHER = (frozenset(SAYS) - {'B3', 'C2', 'C5'}, frozenset({'B3', 'C2', 'C5'})) # claims that can be false at once

def world(false, folder, **noise):
    "The planned studies, all done"
    db = tracker.open_db(':memory:')
    planned.fill(db, false, **noise)
    planned.leave_weights(folder, full=None if 'D8' not in false else 20)
    return bodies(db, None, {s: .04 for s in planned.STUDIES}, folder)[0]

@pytest.fixture(scope='module')
def worlds(tmp_path_factory):
    "Worlds by what is false in them, each made once"
    return functools.cache(lambda false: world(false, tmp_path_factory.mktemp('results')))

@pytest.mark.parametrize('claim', SAYS)
def test_a_claim_that_is_true_is_found_true(worlds, claim):
    found = testify(worlds(frozenset()), claim)
    assert found.verdict == SAYS[claim] and found.runs and found.n >= 6, found.sentence

@pytest.mark.parametrize('claim', SAYS)
def test_a_claim_that_is_false_is_refuted(worlds, claim):
    found = testify(worlds(next(f for f in TOGETHER if claim in f)), claim)
    assert found.verdict == 'REFUTED' and found.n >= 6, found.sentence

def test_at_the_noise_of_real_runs_all_are_tested_and_none_turned_round(tmp_path):
    b = world((), tmp_path, sd=.012)
    found = {c: testify(b, c).verdict for c in [*SAYS, 'D4']}
    assert set(found.values()) <= {'CONFIRMED', 'EQUIVALENT', 'REFUTED', 'INCONCLUSIVE'}, found
    assert all(found[c] in (v, 'INCONCLUSIVE') for c, v in SAYS.items()), found
    assert sum(found[c] == v for c, v in SAYS.items()) >= 13, found

def test_what_a_finished_study_alone_cannot_test_says_what_is_missing(tmp_path):
    "Of world_rank alone, one learning rate: claims that need a grid are not testable, and say so"
    db = tracker.open_db(':memory:')
    planned.fill(db, studies=('world_rank',))
    b = bodies(db, None, dict(world_rank=.04))[0]
    for c in ('A1', 'B1', 'B3', 'C1', 'F1', 'H2', 'H3'):
        found = testify(b, c)
        assert found.verdict == 'NOT-TESTABLE' and found.missing, (c, found.sentence)

def test_the_command_writes_the_page_with_more_than_twenty_claims_tested(tmp_path):
    planned.fill(tracker.open_db(tmp_path/'study.db'), sd=.012); planned.leave_weights(tmp_path, None)
    done = CliRunner().invoke(app, ['claims', '--studies', ','.join(planned.STUDIES), '--margin', '0.04', '--write', '--results', str(tmp_path)])
    assert done.exit_code == 0, done.output
    tested = int(re.search(r'^(\d+) of 49 claims tested', done.output, re.M)[1])
    assert tested == len(SAYS) + 3 and f'{tested} of 49 claims are tested' in (tmp_path/'claims/CLAIMS.md').read_text() # D4, and two that need no runs
