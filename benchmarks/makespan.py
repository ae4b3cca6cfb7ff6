"""How long a whole study takes, against what one would write instead: papermill over a notebook with PEFT and `Trainer`.

    python benchmarks/makespan.py [--points 16] [--steps 12] [--rounds 1] [--profile]     # prints a table, writes benchmarks/makespan.json

Both train the embedded base on the same rows with the same settings and seeds, and both end with a saved adapter for each point. Those are scored afterwards, outside the clock, by one function on the same
held-out rows. The plain loop reports the loss its Trainer measures and nothing else; ours measures the base, what each example costs and what memory each phase takes, and as it comes also a step's cost alone, spectra,
drift, merging and latency. The rivals: the loop one after another in fp32 with every core, and two at once in bf16 with half of the cores each. Sides take turns in each round; ratios are to the last.
One side is ours with one worker that has every core: whether `--workers auto` chose well shows beside it.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
import nbformat
from conditions import conditions, written
from lora_study.classify import encoded
from lora_study.config import Run
from lora_study.data import load_splits
from lora_study.evaluation import summarise, token_scores
from lora_study.lora import load_adapter
from lora_study.model import load_base, load_tokenizer, pick_device

RANKS, RATES, BATCH, LENGTH = [2, 4, 8, 16], [2e-3, 5e-3], 32, 256
SIZES = dict(train_size=8000, validation_size=100, test_size=300)

PLAIN = ["""r, learning_rate, seed, steps, bf16 = 8, 5e-3, 0, 12, False
base, data, out = '', '', ''""",
"""import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments""",
"""tokenizer = AutoTokenizer.from_pretrained(base)
def tokens(row):
    prompt, answer = tokenizer(row['prompt']).input_ids, tokenizer(row['completion'], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return dict(input_ids=prompt + answer, attention_mask=[1]*len(prompt + answer), labels=[-100]*len(prompt) + answer)
rows = load_dataset('json', data_files={s: f'{data}/{s}.jsonl' for s in ('train', 'validation', 'test')})
rows = rows.map(tokens, remove_columns=rows['train'].column_names)""",
"""model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=r, lora_alpha=16, target_modules='all-linear', task_type='CAUSAL_LM'))
model.print_trainable_parameters()""",
"""args = TrainingArguments(out, learning_rate=learning_rate, max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=64, lr_scheduler_type='linear', seed=seed, bf16=bf16, use_cpu=True,
                         weight_decay=0., logging_steps=5, save_strategy='no', report_to='none', dataloader_pin_memory=False, disable_tqdm=True)
trainer = Trainer(model, args, train_dataset=rows['train'], eval_dataset=rows['validation'], data_collator=DataCollatorForSeq2Seq(tokenizer))
trainer.train()""",
"""trainer.evaluate(rows['test'])""",
"""model.save_pretrained(out)"""]

def plain_notebook(path:Path):
    "The notebook one would write"
    cells = [nbformat.v4.new_code_cell(c, id=f'c{i}', metadata=dict(tags=['parameters'] if i == 0 else [])) for i, c in enumerate(PLAIN)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), path)

def points(n:int) -> list: # rank, learning rate, seed
    "Eight settings with as many seeds as make `n` points; fewer than eight points are settings with one seed"
    return [(r, lr, seed) for seed in range(max(1, n//8)) for lr in RATES for r in RANKS][:n]

def plain(todo:list, at:Path, steps:int, bf16:bool, at_once:int, cores:int) -> dict: # point → adapter folder
    "Every point by papermill's own command, each in a fresh kernel"
    env = os.environ | dict(OMP_NUM_THREADS=str(max(1, cores//at_once)), HF_HUB_OFFLINE='1', HF_HOME=str(at/'cache'))
    at.mkdir()
    def one(point):
        r, lr, seed = point; out = at/f'r{r}_lr{lr}_s{seed}'
        set_to = [x for k, v in dict(r=r, learning_rate=lr, seed=seed, steps=steps, bf16=bf16, base=str(at.parent/'base'), data=str(at.parent), out=str(out)).items() for x in ('-p', k, str(v))]
        done = subprocess.run([sys.executable, '-m', 'papermill', str(at.parent/'plain.ipynb'), str(at/f'{out.name}.ipynb'), '--no-progress-bar', *set_to], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return point, out
    with ThreadPoolExecutor(at_once) as pool: return dict(pool.map(one, todo))

def ours(todo:list, at:Path, steps:int, more:list, **keys) -> dict: # keys: more lines of the study file
    "The same points as a study"
    at.mkdir()
    lines = dict(keys, **SIZES, per_device_train_batch_size=BATCH, max_length=LENGTH, max_steps=steps, eval_steps=steps, generate_size=0, lora_alpha=16)
    settings, seeds = list(dict.fromkeys((r, lr) for r, lr, _ in todo)), sorted({s for *_, s in todo})
    (at/'study.yaml').write_text(''.join(f'{k}: {v}\n' for k, v in lines.items()) + f'paired:\n  - lora_r: {[r for r, _ in settings]}\n    learning_rate: {[lr for _, lr in settings]}\nseeds: {seeds}\n')
    begun = time.time()
    done = subprocess.run([sys.executable, '-m', 'lora_study.cli', 'run', 'study.yaml', *more], cwd=at, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (at/'took.json').write_text(json.dumps([begun, time.time()]))
    found = {}
    for record in at.glob('results/study/runs/*/final/record.json'):
        c = json.loads(record.read_text())['config']; found[c['lora_r'], c['learning_rate'], c['seed']] = record.parent/'adapter'
    return found

def where_it_goes(at:Path) -> dict: # seconds by the clock, and the share of each part in the time that points took
    "What a study of ours spent its time on, by its notebooks' own clock and its records"
    begun, ended = json.loads((at/'took.json').read_text())
    clock = lambda text: datetime.fromisoformat(text).timestamp()
    nbs = [nbformat.read(f, 4).metadata.papermill for f in at.glob('results/study/points/*.ipynb')]
    metrics = [json.loads(f.read_text())['metrics'] for f in at.glob('results/study/runs/*/final/record.json')]
    all_s = sum(nb.duration for nb in nbs)
    of = {name: sum(m.get(k, 0.) for m in metrics for k in keys)/all_s for name, keys in {'training': ['training_s'], 'evaluation': ['validation_s', 'test_eval_s'], 'probe': ['probe_s']}.items()}
    return dict(wall_s=ended - begun, before_first_s=min(clock(nb.start_time) for nb in nbs) - begun, after_last_s=ended - max(clock(nb.end_time) for nb in nbs), a_point_s=all_s/len(nbs), shares=of | dict(rest=1 - sum(of.values())))

def clocked(call) -> tuple: # wall seconds, processor seconds of every child, what it returned
    before, wall = os.times(), time.perf_counter()
    got = call()
    after = os.times()
    return time.perf_counter() - wall, after.children_user + after.children_system - before.children_user - before.children_system, got

def scored(adapters:dict) -> dict: # point → held-out NLL
    "Every adapter by the same function on the same rows"
    run, cpu = Run(**SIZES, max_length=LENGTH), pick_device('cpu')
    tokenizer = load_tokenizer(run); test, _ = encoded(run, load_splits(run).test, tokenizer)
    return {p: summarise(token_scores(load_adapter(folder, load_base(run, cpu)).eval(), test, tokenizer.pad_token_id))['nll'] for p, folder in adapters.items()}

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(points=16, steps=12, rounds=1).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--run', nargs='*', default=['--workers', 'auto'], help='arguments for `lora-study run`')
    p.add_argument('--profile', action='store_true', help='only the last of our sides once more, to note beside its time where that goes')
    a = p.parse_args()
    found = conditions() | dict(rounds=a.rounds)
    todo, cores = points(a.points), len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    sides = {'papermill + PEFT + Trainer, fp32, one at a time': lambda at: plain(todo, at, a.steps, False, 1, cores),
             'papermill + PEFT + Trainer, bf16, two at once': lambda at: plain(todo, at, a.steps, True, 2, cores),
             'lora-study run': lambda at: ours(todo, at, a.steps, a.run),
             'lora-study run, engine auto, no diagnostics, bf16': lambda at: ours(todo, at, a.steps, a.run, engine='auto', diagnostics='false', dtype='bfloat16'),
             'lora-study run, engine auto, no diagnostics, one worker with every core': lambda at: ours(todo, at, a.steps, ['--workers', '1'], engine='auto', diagnostics='false'),
             'lora-study run, engine auto, no diagnostics': lambda at: ours(todo, at, a.steps, a.run, engine='auto', diagnostics='false')}
    file, of = Path(__file__).with_suffix('.json'), lambda r: (r['points'], r['steps'], r.get('cpu'))
    there = json.loads(file.read_text())['rows'] if file.exists() else []
    if a.profile:
        with tempfile.TemporaryDirectory() as d: list(sides.values())[-1](Path(d)/'again'); goes = where_it_goes(Path(d)/'again')
        mine = next(r for r in reversed(there) if of(r) == (a.points, a.steps, found['cpu']))
        mine['goes'] = goes; print(goes)
        return written(__file__, dict(rows=there))
    times, nll = {s: [] for s in sides}, {}
    for k in range(a.rounds):
        for i, (side, call) in enumerate(sides.items()):
            with tempfile.TemporaryDirectory() as d:
                home = Path(d); run = Run(**SIZES, max_length=LENGTH); splits = load_splits(run)
                for s in ('train', 'validation', 'test'): (home/f'{s}.jsonl').write_text(''.join(json.dumps(dict(prompt=r['prompt'], completion=r['completion'])) + '\n' for r in getattr(splits, s)))
                load_base(run, pick_device('cpu')).save_pretrained(home/'base'); load_tokenizer(run).save_pretrained(home/'base')
                plain_notebook(home/'plain.ipynb')
                wall, cpu, adapters = clocked(lambda: call(home/f'side{i}'))
                assert set(adapters) == set(todo), (side, set(todo) - set(adapters))
                times[side].append((wall, cpu)); nll[side] = scored(adapters)
                print(f'{side}: {wall:.1f} s, {cpu:.1f} s of processor, NLL {statistics.mean(nll[side].values()):.4f}', flush=True)
    median = {s: [statistics.median(t[j] for t in ts) for j in (0, 1)] for s, ts in times.items()}
    us = list(sides)[-1]
    rows = [found | dict(side=s, points=a.points, steps=a.steps, wall_s=w, cpu_s=c, wall_ratio=w/median[us][0], cpu_ratio=c/median[us][1],
                         mean_nll=statistics.mean(nll[s].values()), largest_nll_difference=max(abs(nll[s][q] - nll[us][q]) for q in todo)) for s, (w, c) in median.items()]
    for r in rows: print(r)
    written(__file__, dict(rows=[r for r in there if of(r) != of(rows[0])] + rows))

if __name__ == '__main__': main()
