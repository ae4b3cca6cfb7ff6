"""What a point of a study costs beyond its training and its evaluation.

    python benchmarks/point_overhead.py [--rounds 3] [--steps 12] [--quick]     # prints a table, writes benchmarks/point_overhead.json

Three notebooks: one of a dozen trivial cells, and the real template with the settings of benchmarks/makespan.py, as it comes and without diagnostics. Three ways to execute each, in turn: papermill with its own engine and a fresh kernel (the rival), our engine
with a fresh kernel, and our engine with a kernel forked from the warm parent, which holds imports, tokens and the base. The first round warms up and is not counted: it starts the parent and scores the base, as a study's
first point does. Processor seconds are those of this process, of kernels and of the warm parent. Of the real template, papermill's own cell times are summed by kind of cell, and the record's phases stand beside them.
"""
import argparse, os, re, sys, tempfile, time
from datetime import datetime
from pathlib import Path
from statistics import median
import nbformat, papermill, psutil
from conditions import conditions, written
from lora_study import sweep, tracker, warm

POINT = dict(train_size=8000, validation_size=100, test_size=300, per_device_train_batch_size=32, max_length=256, generate_size=0, lora_alpha=16, lora_r=8, learning_rate=5e-3)
TRIVIAL, STAMP = 12, 'import time; print(time.process_time())'
WAYS = {'papermill, fresh kernel': ('', False), 'lora_study, fresh kernel': ('0', True), 'lora_study, forked kernel': ('', True)} # LORA_STUDY_WARM, whether by our engine

# --- what kind a cell is: by what it calls, else by the heading it stands under

CALLS = dict(training=r'\btrain\(', probe=r'\bprobe_run\(', base=r'\b(prepared_base|scored_base)\(', evaluation=r'\bevaluate\(', writing=r'\b(write_whole|save_trained)\(',
             diagnostics=r'\b(adapter_spectra|foreign_directions|hidden_states|drift|merge_errors|latency|latency_table)\(', figures=r'\bplots\.\w+\(', setup=r'(?m)^(from|import) |\b(prepared|make_trainable|Run)\(')
HEADINGS = {'': 'setup', 'Data': 'setup', 'The base, before': 'base', 'What is trained': 'setup', 'Cost of a step': 'probe', 'Training': 'training', 'Quality': 'evaluation', 'What the adapter learnt': 'diagnostics', 'Costs, in all': 'writing'}

def kinds(cells:list) -> list: # of (kind, cell), code cells alone
    heading, out = '', []
    for c in cells:
        if c.cell_type == 'markdown': heading = (re.findall(r'(?m)^#+ (.+)', c.source) or [heading])[-1]
        if c.cell_type != 'code': continue
        tagged = set(c.metadata.get('tags', [])) & {'parameters', 'injected-parameters', 'stamp'}
        called = next((k for k, pattern in CALLS.items() if re.search(pattern, c.source)), None)
        out.append(('setup' if tagged else called or HEADINGS.get(heading, heading), c))
    return out

def by_kind(nb) -> dict: # kind → seconds
    out = {}
    for kind, c in kinds(nb.cells): out[kind] = out.get(kind, 0.) + (c.metadata.papermill.get('duration') or 0.)
    return out

# --- one execution

def stamped(nb):
    "The notebook with the kernel's own clock read in its first code cell and after its last"
    stamp = lambda: nbformat.v4.new_code_cell(STAMP, metadata=dict(tags=['stamp']))
    first = next(i for i, c in enumerate(nb.cells) if c.cell_type == 'code')
    nb.cells = [*nb.cells[:first], stamp(), *nb.cells[first:], stamp()]
    return nb

def trivial():
    cells = [nbformat.v4.new_code_cell('x = 1', metadata=dict(tags=['parameters'])), *(nbformat.v4.new_code_cell(f'x += {i}\nx') for i in range(TRIVIAL))]
    return nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))

def processor() -> float: # seconds: this process, its ended children, the warm parent and its ended kernels
    t, total = os.times(), 0.
    if warm.PARENT: p = psutil.Process(warm.PARENT[0].process.pid).cpu_times(); total = p.user + p.system + p.children_user + p.children_system
    return total + t.user + t.system + t.children_user + t.children_system

def executed(way:str, nb, folder:Path, parameters:dict) -> dict:
    "One point, on the clock"
    wanted, ours = WAYS[way]
    os.environ['LORA_STUDY_WARM'] = wanted
    folder.mkdir(parents=True); out = folder/'point.ipynb'
    cpu, begun, start = processor(), time.time(), time.perf_counter()
    if ours: sweep.execute(nb, out, parameters)
    else: papermill.execute_notebook(nb, str(out), parameters, kernel_name='python3', progress_bar=False)
    wall = time.perf_counter() - start
    time.sleep(.4) # the warm parent takes in its dead every tenth of a second
    cpu, done = processor() - cpu, nbformat.read(out, 4)
    stamps = [c for c in done.cells if 'stamp' in c.metadata.get('tags', [])]
    at = datetime.fromisoformat(stamps[0].metadata.papermill.end_time)
    at = at.timestamp() if at.tzinfo else (at - datetime(1970, 1, 1)).total_seconds() # papermill's clock is UTC
    said = [float(''.join(o.text for o in c.outputs if o.output_type == 'stream')) for c in stamps]
    found = dict(first_cell_s=at - begun, end_s=wall, first_cell_cpu_s=said[0], kernel_cpu_s=said[1], cpu_s=cpu, cells_s=sum(c.metadata.papermill.get('duration') or 0. for _, c in kinds(done.cells)))
    record = tracker.read_record(folder/'record.json')
    if record is None: return found
    m = record.metrics
    work = {k: m[k] for k in ('training_s', 'validation_s', 'test_eval_s') if k in m} # the base was scored in the first round
    return found | dict(kinds=by_kind(done), phases={k: m[k] for k in ('setup_s', 'probe_s', *work) if k in m}, work_s=sum(work.values()), beyond_s=wall - sum(work.values()))

def medians(rows:list) -> dict: # the same keys, nested or not
    return {k: medians([r[k] for r in rows]) if isinstance(rows[0][k], dict) else median(r[k] for r in rows) for k in rows[0] if all(k in r for r in rows)}

def measure(template:str, rounds:int, steps:int) -> list: # of rows
    times = {w: [] for w in WAYS}
    with tempfile.TemporaryDirectory() as d:
        for k in range(rounds + 1):
            for way in list(WAYS)[k % 3:] + list(WAYS)[:k % 3]:
                home = Path(d)/f'{k}-{len(times[way])}-{list(WAYS).index(way)}'
                real = POINT | ({} if template == 'point' else dict(diagnostics=False)) | dict(max_steps=steps, eval_steps=steps, work_dir=str(home), checkpoint_dir=str(home/'checkpoints'), shared_dir=str(Path(d)/'base'), device='cpu')
                (Path(d)/'base').mkdir(exist_ok=True)
                found = executed(way, stamped(trivial() if template == 'trivial' else sweep.read_template()), home, {} if template == 'trivial' else real)
                if k: times[way].append(found)
    rows = [dict(template=template, way=way, rounds=rounds, **(dict(steps=steps) if template != 'trivial' else {}), **medians(found)) for way, found in times.items()]
    for r in rows: r['ratios'] = {k: rows[0][k]/r[k] for k in ('first_cell_s', 'end_s', 'cpu_s', 'beyond_s') if k in r}
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rounds', type=int, default=3); p.add_argument('--steps', type=int, default=12); p.add_argument('--quick', action='store_true', help='one round, two steps, a small data set')
    a = p.parse_args()
    if a.quick: a.rounds, a.steps = 1, 2; POINT.update(train_size=200, test_size=40, validation_size=20, per_device_train_batch_size=8)
    found = conditions(); os.environ['HF_HUB_OFFLINE'] = '1'
    rows = [r for template in ('trivial', 'point', 'light') for r in measure(template, a.rounds, a.steps)]
    for r in rows:
        print(f"{r['template']:8} {r['way']:26} first cell {r['first_cell_s']:6.2f} s, end {r['end_s']:6.2f} s, {r['cpu_s']:6.2f} s of processor" + (f"; {r['beyond_s']:.2f} s beyond training and evaluation; " + ', '.join(f'{k} {v:.2f}' for k, v in r['kinds'].items()) if 'kinds' in r else ''), flush=True)
    written(__file__, found | dict(quick=a.quick, point=POINT, rows=rows))

if __name__ == '__main__': main()
