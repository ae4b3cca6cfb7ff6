"Whole studies with a truth planted in them, at the noise of world_rank: runs in a database, evidence, verdict. Each error must stay at the rate its test was made for."
import functools, json, math
import numpy as np
import pytest
from conftest import ROOT
from lora_study import tracker
from lora_study.config import Run, run_id
from lora_study.evidence import contrast, gather
from lora_study.stats import planted_pair, sources

DELTA, FAR = .04, .08 # nats a token: the margin of world_rank, and twice as much
TRUTH = {16: 0., 4: DELTA, 1: FAR} # rank → how much worse than rank 8 it truly is

@functools.cache
def noise() -> dict: # seed_sd, example_sd, rest_sd of a paired difference, tokens
    "What neighbouring ranks of world_rank differ by, from seed to seed and from example to example"
    rows = [json.loads(l) for l in (ROOT/'results/world_rank/records.jsonl').read_text().splitlines()]
    tables = {rank: np.array([r['scores']['test']['nll'] for r in sorted(rows, key=lambda r: r['config']['seed']) if r['config']['lora_r'] == rank]) for rank in (2, 4, 8, 16, 32)}
    tokens, parts = np.array(rows[0]['scores']['test']['tokens'], float), []
    for rank in (4, 8, 16, 32):
        d = tables[rank] - tables[rank//2]; (s, n), (mean, ((by_seed, _), (by_example, _))) = d.shape, sources(d, tokens)
        z = (d - mean*tokens)/tokens.mean(); rest = ((z - z.mean(1)[:, None] - z.mean(0))**2).sum()/((s - 1)*(n - 1))
        parts.append((max(by_seed*s - rest/n, 0), by_example*n, rest))
    return dict(zip(('seed_sd', 'example_sd', 'rest_sd'), np.sqrt(np.mean(parts, axis=0)))) | dict(tokens=tokens)

@functools.cache
def empty(): # a database of runs without results; run ids by rank
    "Four ranks, six seeds, registered and done; their scores are planted anew for each study"
    db, ids = tracker.open_db(':memory:'), {}
    for rank in (8, *TRUTH):
        runs = [Run(lora_r=rank, seed=s, base_hash='b', data_hash='d') for s in range(6)]; ids[rank] = [run_id(r) for r in runs]
        tracker.register(db, 'planted', {r: 'x' for r in runs})
    with tracker.change(db): db.execute("update runs set status='done'")
    return db, ids

def study(rng):
    "One whole study"
    (db, ids), how = empty(), noise(); tokens, n = how['tokens'], len(how['tokens'])
    home = planted_pair(rng, **how, examples=n)[1]
    tables = {8: home} | {rank: home + np.subtract(*planted_pair(rng, worse, **how, examples=n)) for rank, worse in TRUTH.items()}
    with tracker.change(db):
        for t in ('scores', 'metrics'): db.execute(f'delete from {t}')
        for rank, table in tables.items():
            for rid, row in zip(ids[rank], table):
                db.executemany("insert into scores(study, run_id, which, example, nll, tokens) values('planted', ?, 'test', ?, ?, ?)", [(rid, k, float(v), int(t)) for k, (v, t) in enumerate(zip(row, tokens))])
                db.execute("insert into metrics values('planted', ?, 'test_nll', -1, ?)", (rid, row.sum()/tokens.sum()))
    return gather(db, 'planted', margin=DELTA)

def rates(studies:int) -> dict: # what came out → its share
    "Verdicts of many studies"
    count, covered, rng = {}, {r: 0 for r in TRUTH}, np.random.default_rng(0)
    for _ in range(studies):
        e = study(rng)
        found = {f'{rank} within δ': contrast(e, f'lora_r={rank}', 'lora_r=8') for rank in TRUTH} | {'16 at all': contrast(e, 'lora_r=16', 'lora_r=8', margin=None)}
        for asked, v in found.items(): count[asked, v.verdict] = count.get((asked, v.verdict), 0) + 1/studies
        for rank, worse in TRUTH.items(): c = found[f'{rank} within δ'].comparison.effect; covered[rank] += (c.low <= worse <= c.high)/studies
    return count | {('interval holds', r): v for r, v in covered.items()}

def check(studies:int):
    seen, slack = rates(studies), 3*math.sqrt(.05*.95/studies) # three standard errors of a rate of 5 %
    share = lambda asked, *verdicts: sum(seen.get((asked, v), 0.) for v in verdicts)
    print({' '.join(map(str, k)): round(v, 4) for k, v in sorted(seen.items(), key=str)})
    assert share('16 at all', 'better', 'worse') <= .05 + slack        # a difference that is not there
    assert share('16 within δ', 'better', 'worse') <= .05 + slack
    assert share('4 within δ', 'equivalent') <= .05 + slack            # a difference of δ called none
    assert share('1 within δ', 'equivalent', 'better') == 0            # one of twice δ turned round
    assert share('1 within δ', 'worse') >= .9 and share('16 within δ', 'equivalent') >= .8 # and both are found
    for rank in TRUTH: assert seen['interval holds', rank] >= .95 - slack

def test_planted_pairs_of_forty_studies_come_out_right(): check(40)

@pytest.mark.slow
def test_planted_pairs_of_a_thousand_studies_come_out_at_their_nominal_rates(): check(1000)
