"""How long a report takes, and how large it is, by the number of runs.

    python benchmarks/report_time.py [RUNS …]      # 100 1000 10000 unless said; prints a table, writes benchmarks/report_time.json

Planted databases: settings of rank × alpha with ten seeds each and twenty test examples a run, in the shape real runs leave behind. Each step is timed once, in a database of its own.
"""
import json, resource, sqlite3, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np
from conditions import conditions, written
from lora_study import evidence, tracker
from lora_study.config import Run, Study, run_id
from lora_study.document import faults, to_html, to_markdown
from lora_study.report import Place, report_of

SEEDS, EXAMPLES = 10, 20

def plant(db:sqlite3.Connection, n:int, rng:np.random.Generator) -> Study:
    "A finished study of `n` runs: the loss falls with the rank, seeds and examples add noise"
    settings, tokens = n//SEEDS, rng.integers(3, 12, EXAMPLES)
    side = int(np.ceil(np.sqrt(settings))); hard = rng.gamma(2, .5, EXAMPLES)
    runs, metrics, scores = [], [], []
    for k in range(settings):
        r, alpha = 1 + k//side, float(1 + k % side)
        for s in range(SEEDS):
            run = Run(lora_r=r, lora_alpha=alpha, seed=s, base_hash='planted', data_hash='planted'); rid = run_id(run)
            nll = tokens*(hard*(.5 + 1/(r + 1)) + .02*abs(np.log(alpha/r)) + .03*rng.standard_normal() + .1*rng.random(EXAMPLES))
            found = dict(test_nll=nll.sum()/tokens.sum(), base_nll=4., test_exact_match=rng.random(), base_exact_match=0., trainable_params=1696.*r, step_s=.1 + .01*rng.random(), tok_s=3000., train_s=60 + rng.random(), probe_peak_rss_bytes=7e8, test_n_examples=float(EXAMPLES))
            runs.append(('planted', rid, f'r{r}_a{alpha:g}_s{s}', run.model_dump_json(), 'done', 1, '2026-01-01T00:00:00+00:00', '2026-01-01T00:01:00+00:00', f'planted/points/r{r}_a{alpha:g}_s{s}.ipynb',
                         json.dumps(dict(device='cpu', device_name='planted', threads=1, load_average=.5, torch_version='2', code_version='0', base_dtype='float32')), '[]', '[]', '[]'))
            metrics += [('planted', rid, name, -1, float(v)) for name, v in found.items()] + [('planted', rid, 'train.loss', i, 1.) for i in range(100)]
            scores += [('planted', rid, 'test', i, '', float(nll[i]), int(tokens[i]), 1, 10, 'a', 1, '{}') for i in range(EXAMPLES)]
    with tracker.change(db):
        db.executemany('insert into runs(study, run_id, label, config, status, attempt, started, ended, notebook, provenance, adapter, warnings, samples) values(?,?,?,?,?,?,?,?,?,?,?,?,?)', runs)
        db.executemany('insert into metrics values(?,?,?,?,?)', metrics); db.executemany('insert into scores values(?,?,?,?,?,?,?,?,?,?,?,?)', scores)
    return Study(name='planted', axes=dict(lora_r=[1], lora_alpha=[1.]))

@contextmanager
def clock(into:dict, name:str):
    "Wall and processor seconds"
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into[name] = dict(wall_s=round(time.perf_counter() - wall, 3), cpu_s=round(time.process_time() - cpu, 3))

def measure(n:int) -> dict:
    with tempfile.TemporaryDirectory() as d:
        db = tracker.open_db(Path(d)/'study.db'); study, out = plant(db, n, np.random.default_rng(n)), {}
        with clock(out, 'frame'): tracker.frame(db, 'planted')
        with clock(out, 'gather'): e = evidence.gather(db, 'planted')
        with clock(out, 'contrasts'): evidence.contrasts(e)
        with clock(out, 'report'): doc = report_of(db, [study], Place(Path(d)/'planted', Path(d)))
        with clock(out, 'html'): page = to_html(doc)
        with clock(out, 'markdown'): text = to_markdown(doc)
        with clock(out, 'records'): tracker.export_study(db, 'planted')
        found = faults(page)
        assert not found, found[:3]
    return dict(runs=n, settings=len(e), cpu_s=sum(v['cpu_s'] for k, v in out.items() if k in ('report', 'html', 'markdown', 'records')), **out, html_bytes=len(page.encode()), markdown_bytes=len(text.encode()), peak_rss_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024))

def main():
    rows, found = [], conditions()
    for n in [int(a) for a in sys.argv[1:]] or [100, 1000, 10_000]:
        rows.append(measure(n)); r = rows[-1]
        print(f"{n:6} runs: " + ', '.join(f"{k} {v['cpu_s']:.2f}" for k, v in r.items() if isinstance(v, dict)) + f" s of processor; {r['html_bytes']/2**20:.2f} MiB of HTML, {r['markdown_bytes']/2**20:.2f} MiB of markdown; {r['peak_rss_mib']} MiB peak; {1000*r['cpu_s']/n:.1f} s for 1,000 runs", flush=True)
    written(__file__, found | dict(rows=rows))

if __name__ == '__main__': main()
