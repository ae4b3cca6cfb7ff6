"Invented outcomes for the very runs that the studies on claims ask for: what each rule needs to read, with every claim true but those it is told to make false."
import functools, math
import numpy as np
from conftest import ROOT
from lora_study.claims import placement, planted
from lora_study.config import expand, read_study
from lora_study.shapes import shape_of, trainable

STUDIES = ('world_rank', 'world_lr', 'world_placement', 'world_quantized', 'world_full', 'claims_control', 'claims_rates', 'claims_knobs', 'claims_judge', 'claims_grid')
RANKS, PLACES = {1: .25, 2: .12, 4: .03}, {'attention': .1, 'q,v': .15, 'q': .3, 'v': .3, 'o': .2} # added to the loss

@functools.cache
def runs() -> dict: # study → list of Run
    "What the planned studies ask for"
    return {s: expand(read_study(ROOT/'studies'/f'{s}.yaml')) for s in STUDIES}

@functools.cache
def size_of(run) -> int: return trainable(run, shape_of(run))

def added(run, false:set) -> float: # nats
    "What a setting costs at its best learning rate"
    where, r = placement(run.lora_target_modules), run.lora_r
    place = PLACES | ({'feed-forward': .1, 'attention': 0.} if 'C1' in false else {}) | ({'feed-forward': .15} if 'C2' in false else {}) | ({'o': .3} if 'C5' in false else {}) | ({'q': .1, 'v': .1, 'o': .1} if 'C4' in false else {})
    rank = .1*math.log2(32/r) if {'A1', 'A2'} & false else RANKS.get(r, 0.)
    if where != 'all-linear': rank = 0.
    elif 'H3' not in false and run.learning_rate < 3e-3: rank *= .05
    double, four = run.bnb_4bit_use_double_quant, run.load_in_4bit
    bits = .1*(four and run.bnb_4bit_quant_type == 'fp4' and 'F2' not in false) + .1*(four and double and bool({'F1', 'F3'} & false)) + .1*(run.load_in_8bit and 'F4' in false)
    return place.get(where, 0.) + rank + bits + 2.*(run.per_device_train_batch_size == 8 and 'H2' in false)

def best_rate(run, false:set) -> float:
    "Where a setting's loss is least"
    if not run.use_peft: return 1.6e-3 if 'B1' in false else 8e-4
    return 3e-3 if 'B1' in false else 4.5e-3*(run.lora_r/8)**.3 if 'B3' in false else 8e-3

def outcome(run, false:set, rng:np.random.Generator, shift:float, batches, sd:float) -> dict: # shift: of the seed; batches: what its first ones add; sd: of a single run
    "Metrics of a run"
    off, q = math.log(run.learning_rate/best_rate(run, false)), run.load_in_4bit or run.load_in_8bit
    loss = (.13 + added(run, false) if run.use_peft else .03 if {'C3', 'D1'} & false else .13) + .15*off**2 + shift + rng.normal(0, sd)
    more = (run.use_peft == ('D3' in false))*.4
    m = dict(test_nll=loss, **{'validation.nll': [loss + rng.normal(0, sd)]}, trainable_params=size_of(run) if run.use_peft else 1.8e6, forgetting=.6 + more + .2*off + .1*math.cos(7*run.lora_r + 3*off) + rng.normal(0, .02),
             test_exact_match=.8 + rng.normal(0, .001 if 'H1' in false else .05), base_exact_match=0., base_weight_bytes=(2.2e6 if run.bnb_4bit_use_double_quant else 2.3e6) if run.load_in_4bit else 7e6)
    apart = -.05*math.log2(run.lora_r) if 'A6' in false else .3*math.log2(run.lora_alpha/16) if run.lora_alpha/run.lora_r == 2 else 0.
    m |= dict(adapter_relative_norm=.3 + .1*off + rng.normal(0, .02), adapter_intruders=6 + (-1 if 'D6' in false else 1)*(3*(m['forgetting'] - .2*off) + off)) if run.use_peft else {}
    m |= dict(adapter_intruders_random=m['adapter_intruders'] + rng.normal(0, .1) if 'D5' in false else 3.) if run.use_peft else {}
    m['train.loss'] = [7 - .1*k + v + apart + rng.normal(0, sd) for k, v in enumerate(batches)]
    if not run.use_peft: return m
    for n in (1, 8):
        for t in ('prefill', 'token'): m |= {f'{who}_batch_{n}_{t}_s': .01*k*math.exp(rng.normal(0, .02)) for who, k in dict(base=1., merged=1.1 if 'G3' in false else 1., adapter=1.5).items()}
    return m | dict(merge_base_logit_relative=1e-2 if q or 'G4' in false else 1e-6, merge_base_logit_max_abs=1e-5, merge_base_nll_change=rng.normal(0, 1e-6))

def fill(db, false=(), sd:float=.004, seed_sd:float=.015, seed:int=0, studies=STUDIES):
    "A database in which the planned studies are done"
    rng, false = np.random.default_rng(seed), set(false); shift, batches = rng.normal(0, seed_sd, 6), rng.normal(0, 5*seed_sd, (6, 40))
    for study in studies: planted(db, study, [(run.model_dump() | dict(base_hash='invented', data_hash='invented'), outcome(run, false, rng, shift[run.seed], batches[run.seed], sd)) for run in runs()[study]], base=8.)

def leave_weights(results, full:int|None): # full: rank of what full fine-tuning changed; None: noise
    "Two matrices of every full fine-tuning at the best rate, as a run leaves them"
    import torch
    from safetensors.torch import load_file, save_file
    from lora_study.config import EMBEDDED, run_id
    base = {n: t.float() for n, t in load_file(EMBEDDED/'model.safetensors').items() if 'layers.0.mlp.up' in n or 'layers.0.self_attn.q' in n}
    for run in (r for r in runs()['world_full'] if r.learning_rate == 1e-3):
        g, where = torch.Generator().manual_seed(run.seed), results/'world_full'/'runs'/run_id(run.model_copy(update=dict(base_hash='invented', data_hash='invented')))/'final'/'adapter'
        change = lambda rows, columns: torch.randn(rows, full, generator=g) @ torch.randn(full, columns, generator=g) if full else torch.randn(rows, columns, generator=g)
        where.mkdir(parents=True); save_file({n: t + change(*t.shape) for n, t in base.items()}, where/'model.safetensors')
