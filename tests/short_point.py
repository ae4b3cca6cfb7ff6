"A point of milliseconds for a real kernel: the real parameters, whatever a test wants to happen, and a valid record. As a program: the command line, with points made from such a template."
import os, sys
import nbformat

RECORD = '''
import json
from datetime import datetime, timezone
from pathlib import Path
from lora_study.config import Run, run_id
run = Run(**{name: globals()[name] for name in Run.model_fields})
now, row = datetime.now(timezone.utc).isoformat(timespec='seconds'), dict(task='', nll=1., tokens=2, correct_tokens=1, bytes=3, prediction='4', exact=1)
rows = [row | dict(example=i) for i in range(8)]
record = dict(run_id=run_id(run), config=run.model_dump(), provenance=dict(device='cpu') | (dict(micro_batch=micro_batch) if micro_batch else {}), metrics=dict(base_nll=2., test_nll=1. + seed/100), adapter=[],
              curves=dict(train=[dict(step=1, loss=2.)], validation=[dict(step=1, nll=2.)]), scores=dict(base=rows, test=rows), started=now, ended=now)
Path(work_dir, '.record').write_text(json.dumps(record)); Path(work_dir, '.record').replace(Path(work_dir, 'record.json'))'''

def short_point(path, *cells): # → path; cells: sources to run before the record is written
    "Writes the template"
    from lora_study.config import Run
    from lora_study.sweep import HOW
    parameters = '\n'.join([f'{k} = {f.default!r}' for k, f in Run.model_fields.items()] + [f'{h} = None' for h in sorted(HOW)])
    code = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell('---\ntitle: a point\n---'), code(parameters, metadata=dict(tags=['parameters'])), *map(code, cells), code(RECORD)])
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, path)
    return path

if __name__ == '__main__':
    template, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    os.environ.setdefault('LORA_STUDY_WARM', 'ipykernel.kernelapp,lora_study.config')
    from types import SimpleNamespace
    sys.modules['lora_study.planner'] = SimpleNamespace(looked_at=lambda study, device: []) # it looks at bases and data that a short point does not have, and imports torch for it
    from lora_study import cli, sweep
    read = sweep.read_template
    sweep.read_template = lambda path=None: read(template)
    cli.main()
