"The package as others meet it: imported, installed from a wheel, read as a site."
import json, os, subprocess, sys, sysconfig, venv
from pathlib import Path
import pytest
from conftest import ROOT, STUDY, cli
from lora_study.pages import broken_links, directives, for_quarto

MODULES = sorted(p.stem for p in (ROOT/'lora_study').glob('*.py') if not p.stem.startswith('_'))

def test_importing_touches_no_device_no_seed_and_no_network():
    code = f'''
import random, socket, torch, numpy
def refuse(*a, **k): raise AssertionError('an import opened a connection')
socket.socket.connect = refuse
states = random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()
import {', '.join('lora_study.' + m for m in MODULES)}
assert states == (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist())
assert not torch.cuda.is_initialized()
'''
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | dict(CUDA_VISIBLE_DEVICES=''))

def test_planning_imports_no_torch(study_file):
    code = f'import sys; from lora_study.cli import app; app(["plan", "{study_file}"], standalone_mode=False); assert "torch" not in sys.modules'
    assert '4 to do' in subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout

def test_the_wheel_works_from_an_empty_folder(folder):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder/'dist', ROOT], check=True)
    wheel, = (folder/'dist').glob('lora_study-*.whl')
    assert wheel.stat().st_size < 10 * 2**20 # the embedded base and its tokenizer are most of it
    venv.create(folder/'env', with_pip=True)
    python = folder/'env/bin/python'
    subprocess.run([python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', wheel], check=True)
    # the dependencies are this environment's own; a plain path line does not bring its editable lora_study along
    site = next((folder/'env/lib').glob('python*/site-packages'))
    (site/'dependencies.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
    (folder/'tiny.yaml').write_text(STUDY.replace('[2, 4]', '[2]').replace('[0, 1]', '[0]'))
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    where = subprocess.run([python, '-c', 'import lora_study; print(lora_study.__file__)'], capture_output=True, text=True, check=True, env=env).stdout
    assert str(site) in where
    done = subprocess.run([folder/'env/bin/lora-study', 'run', 'tiny.yaml'], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '1 of 1 runs finished' in (folder/'results/tiny/RESULTS.md').read_text()

@pytest.mark.parametrize('page', ['README.md', 'CONTRIBUTING.md', *sorted(str(p.relative_to(ROOT)) for p in (ROOT/'results').glob('*/RESULTS.md'))])
def test_no_link_leads_nowhere(page):
    assert broken_links(ROOT/page) == []

@pytest.mark.parametrize('nb', sorted(str(p.relative_to(ROOT)) for p in [*(ROOT/'nbs').glob('*.ipynb'), *(ROOT/'results').glob('*/points/*.ipynb')]))
@pytest.mark.fault(69)
def test_the_site_shows_no_hidden_cell_no_html_and_no_home_path(nb):
    page = for_quarto(json.loads((ROOT/nb).read_text()))
    for c in page['cells']:
        if c['cell_type'] != 'code': continue
        ours, theirs, _ = directives(''.join(c['source']))
        assert not ours, ours
        assert not [o for o in c['outputs'] if 'text/html' in o.get('data', {})]
    shown = json.dumps(page)
    assert str(Path.home()) + '/' not in shown and str(ROOT.parent) + '/' not in shown

def test_the_filter_is_a_console_script(): # what _quarto.yml names
    page = (ROOT/'nbs/06_spectra.ipynb').read_text()
    filtered = subprocess.run([Path(sys.executable).with_name('lora-study-page')], input=page, capture_output=True, text=True, check=True).stdout
    assert json.loads(filtered) == for_quarto(json.loads(page))

def test_every_study_in_results_is_one_that_ships():
    assert {p.parent.name for p in (ROOT/'results').glob('*/RESULTS.md')} <= {p.stem for p in (ROOT/'studies').glob('*.yaml')}
