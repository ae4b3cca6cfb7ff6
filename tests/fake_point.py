"A point that takes milliseconds: leaves what the real one leaves. `FAKE_POINT` in the environment says what befalls it: JSON, label or * → steps (lines of progress), torn (half a line more), sleep (seconds), fail (text)."
import json, os, time
from pathlib import Path
import nbformat
from lora_study import tracker
from lora_study.config import Run, run_id

def record(run, started, **metrics):
    "A whole record of a run"
    row = dict(example=0, task='', nll=1., tokens=2, correct_tokens=1, bytes=3, prediction='4', exact=1)
    return tracker.Record(run_id=run_id(run), config=run.model_dump(), provenance=dict(device='cpu'), metrics=dict(base_nll=2., test_nll=1.) | metrics, adapter=[],
                          curves=dict(train=[dict(step=1, loss=2.)], validation=[dict(step=1, nll=2.)]), scores=dict(base=[row], test=[row]), started=started, ended=tracker.now())

def execute(nb, out, parameters, timeout=None):
    "Stands where `sweep.execute` does"
    told = json.loads(os.environ.get('FAKE_POINT', '{}'))
    do, work_dir, started = {**told.get('*', {}), **told.get(out.parents[1].name, {})}, Path(parameters['work_dir']), tracker.now()
    work_dir.mkdir(parents=True, exist_ok=True)
    for k in range(do.get('steps', 0)):
        with (work_dir/'progress.jsonl').open('a') as f: f.write(json.dumps(dict(step=k + 1, of=do['steps'], loss=3/(k + 1))) + '\n')
    if do.get('torn'):
        with (work_dir/'progress.jsonl').open('a') as f: f.write('{"step": 9')
    time.sleep(do.get('sleep', 0))
    if do.get('fail'): raise RuntimeError(do['fail'])
    run = Run(**{k: v for k, v in parameters.items() if k in Run.model_fields})
    nb.metadata.papermill = dict(end_time=tracker.now())
    tracker.write_whole(out, nbformat.writes(nb))
    tracker.write_whole(work_dir/'record.json', record(run, started, pid=float(os.getpid())).model_dump_json())
