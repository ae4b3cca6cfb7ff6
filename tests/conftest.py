"What several tests share: a tiny study, the command line, and the real data beside the project."
import os, subprocess, sys
from pathlib import Path
import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent/'shared'
TINY = dict(train_size=32, validation_size=8, test_size=8, generate_size=2, max_new_tokens=4, max_steps=4, eval_steps=2)
STUDY = '\n'.join(f'{k}: {v}' for k, v in TINY.items()) + '\naxes:\n  lora_r: [2, 4]\nseeds: [0, 1]\n'

def pytest_configure(config):
    config.addinivalue_line('markers', 'fault(*numbers): the faults of the list a test shows to be survived (`tests/faults.yaml` names them)')
    config.addinivalue_line('markers', 'slow: takes minutes; runs with --slow')

def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='also run what takes minutes')

def pytest_collection_modifyitems(config, items):
    for i in items:
        if 'slow' in i.keywords and not config.getoption('--slow'): i.add_marker(pytest.mark.skip(reason='takes minutes: run with --slow'))

@pytest.fixture(scope='session')
def examples():
    "Rows of the embedded world, as tokens"
    from lora_study.config import Run
    from lora_study.data import encode, load_splits
    from lora_study.model import load_tokenizer
    run = Run(train_size=64)
    return encode(load_splits(run).train, load_tokenizer(run), run.max_length)[0]

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty working directory"
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def study_file(folder):
    "Four tiny runs"
    path = folder/'tiny.yaml'
    path.write_text(STUDY)
    return path

def command(*args): # argument list of the command line
    return [sys.executable, '-m', 'lora_study.cli', *map(str, args)]

def cli(*args, cwd=None, timeout=600):
    "Runs the command line to its end"
    return subprocess.run(command(*args), cwd=cwd, capture_output=True, text=True, timeout=timeout)

def shared(*parts):
    "A file or folder of the real data, or a skip that says what is missing"
    path = SHARED.joinpath(*parts)
    if not path.exists(): pytest.skip(f'{path.relative_to(SHARED.parent)} is not beside the project')
    return path
