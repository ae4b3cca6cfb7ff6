"""What a sweep costs beside its runs: thousands of points that take milliseconds, through the real machinery.

    python benchmarks/sweep_load.py [RUNS [WORKERS]]     # 2000 runs, 8 workers; prints a line a way, writes benchmarks/sweep_load.json

Each point leaves what a real one leaves (the whole template as its notebook, a record), and nothing else: no kernel, no training. Three ways: one call after the other with no database and no study (the rival: what the
points themselves cost), one driver, and the workers. A run's overhead is what lies between the end of its point and the start of its process's next one: finishing, publishing, claiming, preparing. Its wall time grows
with whatever else the machine does; its processor time does not.
"""
import json, os, sys, tempfile, time
from collections import defaultdict
from pathlib import Path
from statistics import median
import nbformat
from conditions import conditions, written
from lora_study import sweep, tracker, workers
from lora_study.config import Run, Study, run_id

SEEDS, POINT_S = 20, .005 # seconds a point lasts at least

def point(nb, out, parameters, timeout=None):
    "In place of papermill"
    start, cpu_start, begun, work_dir = time.time(), time.process_time(), tracker.now(), Path(parameters['work_dir'])
    run = Run(**{k: v for k, v in parameters.items() if k in Run.model_fields})
    row = dict(example=0, task='', nll=1., tokens=2, correct_tokens=1, bytes=3, prediction='4', exact=1)
    nb.metadata.papermill = dict(end_time=tracker.now())
    tracker.write_whole(out, nbformat.writes(nb))
    time.sleep(max(0, start + POINT_S - time.time()))
    rec = tracker.Record(run_id=run_id(run), config=run.model_dump(), provenance=dict(device='cpu'), metrics=dict(base_nll=2., test_nll=1., pid=float(os.getpid()), start=start, cpu_start=cpu_start, end=time.time(), cpu_end=time.process_time()),
                         adapter=[], curves=dict(train=[dict(step=1, loss=2.)], validation=[dict(step=1, nll=2.)]), scores=dict(base=[row], test=[row]), started=begun, ended=tracker.now())
    tracker.write_whole(work_dir/'record.json', rec.model_dump_json())

def study_of(n:int) -> Study:
    return Study(name='load', axes=dict(lora_r=list(range(1, 1 + -(-n//SEEDS)))), seeds=list(range(min(n, SEEDS))), max_runs=n + SEEDS)

def overhead(points:list, start:str, end:str) -> dict: # median and 95th percentile, milliseconds
    "From the end of a point to the start of its process's next"
    by = defaultdict(list)
    for m in points: by[m['pid']].append((m[start], m[end]))
    between = sorted(1000*(b[0] - a[1]) for of in map(sorted, by.values()) for a, b in zip(of, of[1:]))
    return dict(median=round(median(between), 2), p95=round(between[int(.95*len(between))], 2))

def summary(way:str, points:list, wall:float, **more) -> dict: # points: what each measured of itself; wall: seconds, starting processes included
    busy = max(m['end'] for m in points) - min(m['start'] for m in points)
    return dict(way=way, runs=len(points), wall_s=round(wall, 2), runs_per_s=round(len(points)/busy, 1), overhead_ms=overhead(points, 'start', 'end'), overhead_cpu_ms=overhead(points, 'cpu_start', 'cpu_end'), **more)

def plain(n:int, root:Path) -> dict:
    points, start = [], time.perf_counter()
    for run, name in sweep.labels(study_of(n)).items():
        folder = root/'plain'/name
        point(sweep.read_template(), folder/'point.ipynb', run.model_dump(exclude_unset=True) | dict(work_dir=str(folder)))
        points.append(tracker.read_record(folder/'record.json').metrics)
    return summary('plain loop, no database', points, time.perf_counter() - start)

def swept(n:int, results:Path, k:int) -> dict: # k: workers; 0: this process drives
    study, start, said = study_of(n), time.perf_counter(), []
    if k: done = workers.drive(study, results, [dict.fromkeys(workers.THREADS, '1')]*k, said.append, execute='sweep_load:point')
    else: done = sweep.sweep(study, results, said.append, execute=point)
    wall = time.perf_counter() - start
    assert len(done) == len(sweep.labels(study)) and all(done.values()), said[-3:]
    db = tracker.open_db(results/'study.db')
    assert {r[0] for r in db.execute('select attempt from runs')} == {1} and db.execute("select count(distinct run_id) from runs where status='done'").fetchone()[0] == len(done)
    points = tracker.frame(db, 'load').to_dict('records')
    found = dict(integrity_check=db.execute('pragma integrity_check').fetchone()[0])
    db.execute('pragma wal_checkpoint(truncate)')
    return summary(f'{k} workers' if k else 'one driver', points, wall, processes=len({m['pid'] for m in points}), database_bytes=(results/'study.db').stat().st_size, **found)

def main():
    n, k = [int(a) for a in sys.argv[1:]] + [2000, 8][len(sys.argv) - 1:]
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')])) # where workers find `point`
    rows, found = [], conditions()
    with tempfile.TemporaryDirectory() as d:
        for way in (lambda: plain(n, Path(d)), lambda: swept(n, Path(d)/'one', 0), lambda: swept(n, Path(d)/'many', k)):
            before = os.getloadavg()[0]
            rows.append(way() | dict(load_average_before=round(before, 2), load_average_after=round(os.getloadavg()[0], 2))); r = rows[-1]
            print(f"{r['way']:24} {r['runs']} runs in {r['wall_s']:.1f} s, {r['runs_per_s']:.1f} a second; overhead {r['overhead_ms']['median']:.1f} ms a run (95 %: {r['overhead_ms']['p95']:.1f}), {r['overhead_cpu_ms']['median']:.1f} of the processor"
                  + (f"; {r['database_bytes']/2**20:.1f} MiB, {r['integrity_check']}" if 'database_bytes' in r else ''), flush=True)
    written(__file__, found | dict(cores=workers.usable_cores(), point_s=POINT_S, code_version=tracker.provenance()['code_version'], ways=rows))

if __name__ == '__main__': main()
