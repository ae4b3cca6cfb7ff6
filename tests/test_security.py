"Nothing a study reads may act, nothing it holds may leave: code, names, tokens, homes."
import ast, json, os, re, shutil, subprocess
from pathlib import Path
import nbformat, pytest
from markdown_it import MarkdownIt
from conftest import ROOT, STUDY, command
from test_bad_input import ask, refused
from lora_study import tracker
from lora_study.config import EMBEDDED, BadInput, Run, Study, expand, label, read_study, run_id
from lora_study.guards import TRUST, before, within

# what the package itself may do

def sources(): # name → syntax tree, of the package and of the notebooks that runs and findings execute
    for p in sorted((ROOT/'lora_study').glob('*.py')): yield p.name, ast.parse(p.read_text())
    for p in sorted((ROOT/'lora_study'/'notebooks').glob('*.ipynb')):
        for c in nbformat.read(p, 4).cells:
            if c.cell_type == 'code': yield p.name, ast.parse(re.sub(r'^[%!].*$', '', c.source, flags=re.M))

def called(name, tree): # (function as written, call) of every call
    for n in ast.walk(tree):
        if isinstance(n, ast.Call): yield ast.unparse(n.func), n

def keyword(call, name): return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)

@pytest.mark.fault(67, 71, 72)
def test_no_shell_no_eval_no_archive_no_pickle_no_table_for_a_spreadsheet():
    seen = 0
    for name, tree in sources():
        for f, call in called(name, tree):
            seen += 1
            last = f.rpartition('.')[2]
            assert keyword(call, 'shell') in (None, 'False') and f not in ('os.system', 'os.popen', 'eval', 'exec', 'pd.eval', '__import__', 'subprocess.getoutput', 'subprocess.getstatusoutput'), (name, f)
            if f in ('subprocess.run', 'subprocess.Popen', 'subprocess.call', 'subprocess.check_call', 'subprocess.check_output'): assert isinstance(call.args[0], (ast.List, ast.Name)), (name, ast.unparse(call)) # a list of arguments
            assert last not in ('unpack_archive', 'extractall', 'ZipFile', 'TarFile') and not f.startswith(('tarfile.', 'zipfile.', 'pickle.', 'marshal.', 'shelve.')), (name, f)
            assert last not in ('to_csv', 'to_excel', 'DictWriter') and f != 'csv.writer', (name, f) # whoever writes one has to prefix cells that begin with = + - @
            if f == 'torch.load': assert keyword(call, 'weights_only') == 'True', (name, ast.unparse(call))
            if f in ('yaml.load', 'yaml.compose', 'yaml.full_load', 'yaml.unsafe_load', 'yaml.load_all'): assert ast.unparse(call.args[1]) == 'Loader', (name, ast.unparse(call))
            if keyword(call, 'trust_remote_code'): assert keyword(call, 'trust_remote_code') in ('run.trust_remote_code', 'point.trust_remote_code', 'trust'), (name, ast.unparse(call))
    assert seen > 2000

# names

@pytest.mark.fault(64)
def test_no_name_leads_out_of_a_study(folder):
    (folder/'results/s').mkdir(parents=True)
    (folder/'results/s/points').symlink_to(folder)
    with pytest.raises(BadInput, match='leads out of'): before(Study(name='s', axes=dict(lora_r=[2])), folder/'results')
    from lora_study import sweep
    with pytest.raises(BadInput, match='leads out of'): sweep.sweep(Study(name='s', axes=dict(lora_r=[2])), folder/'results', say=lambda l: None)
    for name in ('../../x', '/etc/passwd', 'a\0b', '..', '.', 'x/../../y'):
        with pytest.raises(BadInput, match='leads out of'): within(folder/'results/s', 'runs' if '/../' not in name else '.', name) if not name.startswith('..') and name != '.' else within(folder/'results/s', name)
    assert not (folder/'results/study.db').exists() and os.listdir(folder) == ['results']

@pytest.mark.fault(64)
def test_labels_are_file_names_and_different_runs_have_different_ones():
    asked = ['a/b', 'a-b', '../../x', 'CON', '\u202eb', 'x'*300, 'a b', 'a\0b', '*', '.*']
    labels = [label(Run(lora_target_modules=t), ['lora_target_modules']) for t in asked]
    assert len({l.lower() for l in labels}) == len(asked)
    for l in labels: assert re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9._-]{0,120}', l) and not l.startswith('.')

@pytest.mark.fault(64)
def test_an_export_from_elsewhere_cannot_name_a_folder(folder):
    line = (ROOT/'results/quick/records.jsonl').read_text().splitlines()[0]
    for field, value in dict(study='../../x', run_id='../x', label='a/b', notebook='../../x.ipynb').items():
        (folder/'r.jsonl').write_text(line + '\n' + json.dumps(json.loads(line) | {field: value}) + '\n')
        said = refused('import', 'r.jsonl')
        assert f'r.jsonl:2: {field} = ' in said and 'remove the line' in said

# tokens and homes

TOKENS = dict(HF_TOKEN='hf_PlantedPlantedPlanted42', WANDB_API_KEY='planted-wandb-key-0123', MY_PASSWORD='planted "quoted" \\ pass')
LOGIN, HOME = 'postgresql://ann:planted-url-pass@db.example/x', f'{Path.home()}/planted-folder'
LEAKY = '''
import json, os, sys
from pathlib import Path
from IPython.display import Markdown, display
from lora_study import tracker
from lora_study.config import Run, run_id
run = Run(**{name: globals()[name] for name in Run.model_fields})
all = ' '.join([os.environ['HF_TOKEN'], os.environ['WANDB_API_KEY'], os.environ['MY_PASSWORD'], LOGIN, HOME])
print(all); print(all, file=sys.stderr); display(Markdown(all)); display(dict(os.environ))
if run.lora_r == 2: raise RuntimeError(f'401 for {LOGIN}: {all}')
old = json.loads(Path(RECORD).read_text().splitlines()[0])
scores = {w: [dict(zip(s, row)) for row in zip(*s.values())] for w, s in old['scores'].items()}
for s in scores['test']: s['prediction'] = all
rec = tracker.Record(run_id=run_id(run), config=run.model_dump(), provenance=old['provenance'] | dict(device_name=all), metrics={n: v for n, step, v in old['metrics'] if step == -1}, curves={}, adapter=[], scores=scores,
                     samples=[dict(name='a', prompt=all, base=all, test=all)], warnings=[all], started=tracker.now(), ended=tracker.now())
tracker.write_whole(Path(work_dir)/'record.json', rec.model_dump_json())
'''

def leaky(template): # the parameters of the real point, then a point that tells everything it knows
    nb = nbformat.from_dict(template)
    cell = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    head, body = nb.cells[0], nbformat.v4.new_code_cell(f'LOGIN, HOME, RECORD = {LOGIN!r}, {HOME!r}, {str(ROOT/"results/quick/records.jsonl")!r}' + LEAKY)
    nb.cells = [head, cell, body]
    return nb

@pytest.mark.fault(68, 69)
def test_planted_tokens_and_homes_are_in_no_output(study_file, monkeypatch, capsys):
    from unittest.mock import patch
    from lora_study import sweep
    from lora_study.report import write_report
    for k, v in TOKENS.items(): monkeypatch.setenv(k, v)
    study_file.write_text(STUDY.replace('[0, 1]', '[0]') + f'description: asks {TOKENS["WANDB_API_KEY"]} of {LOGIN}\n')
    study, told = read_study(study_file), []
    real = sweep.read_template
    with patch.object(sweep, 'read_template', lambda path=None: leaky(real(path))):
        assert sorted(sweep.sweep(study, 'results', say=told.append).values()) == [False, True], told
    db = tracker.open_db('results/study.db')
    write_report(db, study, 'results')
    tracker.write_whole('results/out.jsonl', tracker.export_study(db, 'tiny'))
    row = tracker.frame(db, 'tiny', 'failed').iloc[0]
    assert '[HF_TOKEN]' in row.error_message and '[a login]' in row.error_message and '~/planted-folder' in row.error_message # what happened is still told
    db.close()
    shown = ask('runs').output + ask('show', row.run_id).output + ask('report', 'tiny').output + refused('run', 'no.yaml', '--set', f'x={TOKENS["HF_TOKEN"]}', '--device', TOKENS['HF_TOKEN'])
    outputs = {str(p): p.read_bytes() for p in Path('results').rglob('*') if p.is_file()} | {'told': '\n'.join(told).encode(), 'shown': shown.encode(), 'terminal': ''.join(capsys.readouterr()).encode()}
    assert {'point.ipynb', 'study.db', 'record.json', 'records.jsonl', 'RESULTS.md', 'report.html'} <= {Path(p).name for p in outputs} and len(outputs) > 10
    needles = [*TOKENS.values(), json.dumps(TOKENS['MY_PASSWORD'])[1:-1], json.dumps(json.dumps(TOKENS['MY_PASSWORD'])[1:-1])[1:-1], 'planted-url-pass', 'PlantedPlanted', HOME]
    for name, raw in outputs.items():
        for n in needles: assert n.encode() not in raw, (name, n, raw[max(0, raw.find(n.encode()) - 80):][:200])

@pytest.mark.fault(68)
def test_a_fault_of_our_own_is_told_without_tokens(folder): # an exception nobody foresaw, on its way to a terminal or a log
    code = 'import lora_study.cli as c, lora_study.config as g\ndef harm(*a): raise RuntimeError("unforeseen planted-wandb-key-0123")\ng.read_study = harm\nc.main()'
    import sys
    said = subprocess.run([sys.executable, '-c', code, 'run', 'x.yaml'], capture_output=True, text=True, env=os.environ | TOKENS)
    assert said.returncode == 1 and 'unforeseen [WANDB_API_KEY]' in said.stderr and 'planted' not in said.stderr + said.stdout

# a base's own code, and texts that act

@pytest.mark.fault(66)
def test_a_terminal_obeys_no_text(folder, monkeypatch, capsys):
    import sys
    from lora_study.cli import show_table
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    show_table([dict(found='[/red] [bold]x [link=http://x]y', do='[no such tag]')])
    assert '[/red] [bold]x [link=http://x]y' in ' '.join(capsys.readouterr().out.split())
    sly = '\x1b]0;owned\x07\u202e'
    (folder/f'a{sly}.yaml').write_text('lora_rank: 8\n')
    line = refused('run', f'a{sly}.yaml')
    assert 'expected up to 64' in line and line.isprintable()

OWN = {'configuration_own.py': 'import os\nfrom transformers import LlamaConfig\nopen(os.environ["PLANTED_MARK"], "a").write("config ")\nclass OwnConfig(LlamaConfig): model_type = "own_llama"\n',
       'modeling_own.py': 'import os\nfrom transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\nopen(os.environ["PLANTED_MARK"], "a").write("model ")\nclass OwnModel(LlamaForCausalLM): config_class = OwnConfig\n'}
SLY = ['<script>alert(1)</script>', '[x](javascript:alert(1))', '{{< include /etc/passwd >}}', '<img src=x onerror=alert(1)>', '```{python}\nopen("harmed", "w")\n```', '=HYPERLINK("http://x")', '\u202eevil | a | b']

@pytest.fixture
def own(folder, monkeypatch): # a study on a base that brings code
    shutil.copytree(str(EMBEDDED), folder/'base')
    f = folder/'base/config.json'
    f.write_text(json.dumps(json.loads(f.read_text()) | dict(model_type='own_llama', auto_map=dict(AutoConfig='configuration_own.OwnConfig', AutoModelForCausalLM='modeling_own.OwnModel'))))
    for name, text in OWN.items(): (folder/'base'/name).write_text(text)
    (folder/'rows.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'{i} {SLY[i%7]}', completion=f' {SLY[(i+1)%7]} {i}', task=SLY[i%7])) for i in range(200)))
    for k, v in dict(PLANTED_MARK=str(folder/'mark'), HF_MODULES_CACHE=str(folder/'modules')).items(): monkeypatch.setenv(k, v)
    monkeypatch.delenv(TRUST, raising=False)
    text = STUDY.replace('[2, 4]', '[2]').replace('[0, 1]', '[0]').replace('generate_size: 2', 'generate_size: 4') + 'model_name_or_path: ./base\ndataset_name: rows.jsonl\nmax_length: 128\n'
    (folder/'plain.yaml').write_text(text); (folder/'asks.yaml').write_text(text + 'trust_remote_code: true\n')
    return folder

@pytest.mark.fault(62)
def test_a_bases_own_code_needs_the_study_files_word_and_a_flag(own, monkeypatch):
    assert '--trust-remote-code' in refused('run', 'plain.yaml') # neither
    assert 'expected --trust-remote-code too' in refused('run', 'asks.yaml') # the file alone
    assert 'expected --trust-remote-code too' in refused('plan', 'asks.yaml')
    import torch
    from lora_study.model import load_base, load_tokenizer, skeleton
    for load in (load_tokenizer, skeleton, lambda r: load_base(r, torch.device('cpu'))):
        with pytest.raises(BadInput, match='trust_remote_code'): load(Run(model_name_or_path='./base', trust_remote_code=True))
    monkeypatch.setenv(TRUST, '1') # the flag alone
    assert '--trust-remote-code' in refused('run', 'plain.yaml', '--trust-remote-code')
    assert not (own/'mark').exists() and not (own/'results').exists()

@pytest.mark.fault(62, 66)
def test_with_both_it_runs_and_the_report_says_so(own):
    done = subprocess.run(command('run', 'asks.yaml', '--trust-remote-code'), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'note: the base may run code of its own' in done.stdout and 'model' in (own/'mark').read_text()
    row = tracker.frame(tracker.open_db('results/study.db'), 'asks').iloc[0]
    assert row.trust_remote_code and row.base_class.startswith('transformers_modules.') and row.base_class.endswith('.OwnModel')
    assert 'trust_remote_code: true' in (own/'results/asks/RESULTS.md').read_text()
    before = run_id(expand(read_study('asks.yaml'))[0])
    (own/'base/modeling_own.py').write_text(OWN['modeling_own.py'] + '# another model\n')
    from lora_study.config import fingerprint
    fingerprint.cache_clear()
    assert run_id(expand(read_study('asks.yaml'))[0]) != before # its code is part of what a base is
    # the same run's texts, wherever they are shown
    pages = [own/'results/asks/RESULTS.md', *(own/'results/asks/points').glob('*.ipynb')]
    shown = [pages[0].read_text(), *(''.join(o['data']['text/markdown']) for c in nbformat.read(pages[1], 4).cells if c.cell_type == 'code' for o in c.outputs if 'text/markdown' in o.get('data', {}))]
    assert any(re.search('alert|HYPERLINK|passwd|harmed|evil', t) for t in shown[1:]) # they are shown
    for t in shown:
        html = MarkdownIt('commonmark', dict(html=True)).enable('table').render(t)
        assert '<script' not in html and '<img src=x' not in html and 'href="javascript' not in html and '{{<' not in t and '```{python}' not in t and '\u202e' not in t
    assert not Path('harmed').exists()

LISTENING = """import psutil, socket
listening = lambda: [c.laddr.ip for c in psutil.Process().net_connections('inet') if c.status == psutil.CONN_LISTEN]
before, s = listening(), socket.create_server(('', 0))
print(sorted({*before} - {'127.0.0.1', '::1'}), {*listening()} - {*before})"""

@pytest.mark.fault(70)
def test_a_points_kernel_listens_to_this_machine_alone(tmp_path, monkeypatch):
    from lora_study import sweep
    monkeypatch.setenv('LORA_STUDY_WARM', '0')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LISTENING)], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    sweep.execute(nb, tmp_path/'point.ipynb', {})
    assert nbformat.read(tmp_path/'point.ipynb', 4).cells[-1].outputs[0].text == "[] {'0.0.0.0'}\n" # and one that did would be seen
