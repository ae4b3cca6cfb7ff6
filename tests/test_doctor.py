"Every check of the doctor, with its failing side staged: real folders, files, packages and kernels wherever they can be."
import os, sqlite3, sys
from pathlib import Path
import pytest
from conftest import STUDY, TINY
from test_bad_input import ask
from lora_study import doctor as clinic, tracker
from lora_study.doctor import CHECKS, Patient, looked

def seen(name, folder, **how): return looked(name, Patient(folder/'results', **how))

def installed(folder, monkeypatch, name, version, *extra): # a distribution found before the real one
    d = folder/'site'/f'{name}-{version}.dist-info'
    d.mkdir(parents=True)
    (d/'METADATA').write_text('\n'.join([f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}', *extra]) + '\n')
    monkeypatch.syspath_prepend(str(folder/'site'))

def test_packages_below_their_floor_or_missing(folder, monkeypatch):
    assert seen('packages', folder).state == 'ok'
    installed(folder, monkeypatch, 'peft', '0.1')
    c = seen('packages', folder)
    assert c.state == 'bad' and 'peft 0.1 is not >=' in c.found and "pip install 'peft>=" in c.do
    installed(folder, monkeypatch, 'lora_study', '0.1.0', 'Requires-Python: >=3.10', 'Requires-Dist: no-such-package-anywhere>=1', 'Requires-Dist: wandb; extra == "wandb"')
    c = seen('packages', folder)
    assert c.state == 'bad' and c.found == 'no-such-package-anywhere is missing' and 'wandb' not in c.do

def test_a_python_that_is_too_old(folder, monkeypatch):
    assert seen('python', folder).state == 'ok'
    installed(folder, monkeypatch, 'lora_study', '0.1.0', 'Requires-Python: >=3.99', 'Requires-Dist: torch')
    assert (c := seen('python', folder)).state == 'bad' and '>=3.99' in c.found and c.do

@pytest.mark.fault(39)
def test_a_kernel_whose_python_is_gone_or_another(folder, monkeypatch):
    assert seen('kernel', folder).state == 'ok'
    spec = folder/'jupyter/kernels/python3/kernel.json'
    spec.parent.mkdir(parents=True)
    monkeypatch.setenv('JUPYTER_PATH', str(folder/'jupyter'))
    spec.write_text('{"argv": ["/no/such/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "x", "language": "python"}')
    assert (c := seen('kernel', folder)).state == 'bad' and '/no/such/python' in c.found and 'ipykernel install' in c.do
    other = folder/'python'; other.write_text('#!/bin/sh\n'); other.chmod(0o755)
    spec.write_text(spec.read_text().replace('/no/such/python', str(other)))
    assert (c := seen('kernel', folder)).state == 'warn' and 'another Python' in c.found
    from jupyter_client import kernelspec
    monkeypatch.setattr(kernelspec.KernelSpecManager, 'get_kernel_spec', lambda self, name: (_ for _ in ()).throw(kernelspec.NoSuchKernel(name)))
    assert (c := seen('kernel', folder)).state == 'bad' and 'no kernel is called python3' in c.found

def test_a_device_that_is_not_there(folder, monkeypatch):
    assert seen('device', folder, device='cpu').state == 'ok'
    assert (c := seen('device', folder, device='toaster')).state == 'bad' and c.do == 'use auto or cpu'
    tool = folder/'bin/nvidia-smi'; tool.parent.mkdir(); tool.write_text('#!/bin/sh\necho NVIDIA H200, 143771\n'); tool.chmod(0o755) # a card that torch does not see
    monkeypatch.setenv('PATH', f'{tool.parent}:{os.environ["PATH"]}')
    import torch
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert (c := seen('device', folder)).state == 'warn' and 'NVIDIA H200 is there' in c.found and 'pytorch.org' in c.do

@pytest.mark.fault(45)
def test_results_that_cannot_be_written_or_lie_elsewhere(folder, monkeypatch):
    assert seen('results folder', folder).state == 'ok'
    (folder/'results').write_text('')
    assert (c := seen('results folder', folder)).state == 'bad' and 'is a file' in c.found and '--results' in c.do
    assert looked('results folder', Patient(Path('/proc/self/nowhere'))).state == 'bad' # no disk at all
    (folder/'results').unlink()
    monkeypatch.setattr(tracker, 'network_mount', lambda path: 'nfs4 at /home', raising=False)
    assert (c := seen('results folder', folder)).state == 'warn' and 'nfs4 at /home' in c.found and 'local disk' in c.do

def test_temporary_files_that_have_no_place(folder, monkeypatch):
    assert seen('temporary files', folder).state == 'ok'
    monkeypatch.setenv('TMPDIR', str(folder/'none'))
    assert (c := seen('temporary files', folder)).state == 'warn' and 'TMPDIR' in c.do
    long = folder/('x'*100); long.mkdir()
    monkeypatch.setenv('TMPDIR', str(long))
    assert (c := seen('temporary files', folder)).state == 'bad' and 'socket' in c.found and c.do == 'set TMPDIR=/tmp'

@pytest.mark.fault(44, 47)
def test_a_database_that_is_damaged_or_of_another_schema(folder):
    assert seen('database', folder).found.endswith('is not there yet')
    path = folder/'results/study.db'
    tracker.open_db(path).close()
    assert seen('database', folder).found.endswith('is whole: 0 runs')
    def version(n): db = sqlite3.connect(path); db.execute(f'pragma user_version={n}'); db.commit(); db.close()
    version(tracker.SCHEMA_VERSION + 1)
    assert (c := seen('database', folder)).state == 'bad' and 'upgrade lora_study' in c.do
    version(tracker.SCHEMA_VERSION - 1)
    assert seen('database', folder).state == 'warn'
    version(tracker.SCHEMA_VERSION)
    for f in path.parent.glob('study.db-*'): f.unlink()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b'\xff'*(len(whole) - 4096)) # every page but the first
    assert (c := seen('database', folder)).state == 'bad' and 'lora-study import' in c.do
    path.write_bytes(b'no database at all, whatever it is called'*100)
    assert seen('database', folder).state == 'bad'

def test_a_busy_machine(folder, monkeypatch):
    monkeypatch.setattr(os, 'getloadavg', lambda: (0., 0., 0.))
    assert seen('load', folder).state == 'ok'
    monkeypatch.setattr(os, 'getloadavg', lambda: (500., 0., 0.))
    assert (c := seen('load', folder)).state == 'warn' and 'idle' in c.do

def with_study(folder, text):
    (folder/'tiny.yaml').write_text(text)
    p = Patient(folder/'results', folder/'tiny.yaml', 'cpu')
    return p, looked('study file', p)

def test_a_study_that_cannot_run_here(folder, monkeypatch):
    p, c = with_study(folder, STUDY + 'lora_rank: 8\n')
    assert c.state == 'bad' and c.do == 'did you mean lora_r?' and looked('base and data', p) is looked('memory', p) is None
    assert with_study(folder, STUDY + 'trust_remote_code: true\n')[1].state == 'bad'
    assert (c := with_study(folder, STUDY.replace('[0, 1]', '[0, 0]'))[1]).state == 'warn' and '2 of 4 points are the same' in c.found
    p, c = with_study(folder, STUDY)
    assert c.state == looked('base and data', p).state == looked('memory', p).state == looked('disk', p).state == 'ok'
    p, _ = with_study(folder, STUDY + 'lora_target_modules: [c_attn]\n')
    assert (c := looked('base and data', p)).state == 'bad' and 'c_attn' in c.found
    rows = ''.join(f'{{"prompt": "Say {i}.", "completion": " {i}"}}\n' for i in range(60))
    (folder/'rows.jsonl').write_text(rows + '{"prompt": "x", "completion": null}\n')
    p, _ = with_study(folder, STUDY + 'dataset_name: rows.jsonl\n')
    assert (c := looked('base and data', p)).state == 'warn' and '1 rows without' in c.found
    p, _ = with_study(folder, STUDY + 'per_device_train_batch_size: 4000000\n')
    assert (c := looked('memory', p)).state == 'bad' and 'per_device_train_batch_size' in c.do
    from collections import namedtuple
    monkeypatch.setattr(clinic.shutil, 'disk_usage', lambda path: namedtuple('usage', 'total used free')(10**12, 10**12 - 10**5, 10**5))
    assert (c := looked('disk', p)).state == 'bad' and 'make room' in c.do
    assert looked('disk', Patient(folder/'results')).state == 'warn'

def test_what_nobody_foresaw_is_a_finding_too(folder, monkeypatch):
    monkeypatch.setitem(CHECKS, 'load', lambda p: 1/0)
    assert (c := seen('load', folder)).state == 'bad' and c.found == 'ZeroDivisionError: division by zero'

def test_the_command_shows_a_table_and_its_exit_code_says_whether_to_go_on(study_file, monkeypatch):
    monkeypatch.setattr(os, 'getloadavg', lambda: (0., 0., 0.))
    said = ask('doctor', 'tiny.yaml', '--device', 'cpu')
    assert said.exit_code == 0 and '0 bad' in said.stdout and 'study file' in said.stdout and not Path('results').exists(), said.stdout
    study_file.write_text(STUDY + 'lora_rank: 8\n')
    said = ask('doctor', 'tiny.yaml', '--device', 'cpu')
    assert said.exit_code == 1 and '1 bad' in said.stdout and 'did you mean lora_r?' in said.stdout
    assert ask('doctor', '--device', 'cpu').exit_code == 0
