"Mistakes end in one clear line and exit code 2, before anything runs."
import pytest
from conftest import STUDY, cli, shared

BAD = {
    'unknown key':        (STUDY + 'lora_rank: 8\n', ['tiny.yaml:', 'lora_rank', 'did you mean lora_r?']),
    'wrong type':         (STUDY.replace('[2, 4]', '[2, "4"]'), ['tiny.yaml:9: axes.lora_r[1]', "'4'"]),
    'out of range':       (STUDY + 'learning_rate: -1\n', ['learning_rate = -1', 'greater than 0']),
    'not yaml':           (STUDY + '  a: [1\n', ['tiny.yaml:']),
    'a list':             ('- 1\n', ['got list', 'expected a mapping']),
    'missing folder':     (STUDY + 'model_name_or_path: ../no/such\n', ["model_name_or_path = '../no/such'", 'not found']),
    'hub model offline':  (STUDY + 'model_name_or_path: no-such-owner/no-such-model\n', ["model_name_or_path = 'no-such-owner/no-such-model'", 'go online']),
    'hub data offline':   (STUDY + 'dataset_name: no-such-owner/no-such-data\n', ["dataset_name = 'no-such-owner/no-such-data'", 'go online']),
    'missing target':     (STUDY + 'lora_target_modules: [q_proj, c_attn]\n', ["['c_attn'] not in the base", 'q_proj']),
    'too long':           (STUDY + 'max_length: 4096\n', ['max_length = 4096', '256 positions']),
    'too few facts':      ('dataset_config: memorise\ntrain_size: 9999\naxes:\n  lora_r: [2]\n', ["dataset_config = 'memorise'", '2496 facts exist, n = 9999']),
    'too many runs':      (STUDY + 'max_runs: 3\n', ['4 runs', 'max_runs = 3']),
}

@pytest.mark.parametrize('name', BAD)
def test_a_bad_study_is_refused_in_one_line(name, study_file):
    text, parts = BAD[name]
    study_file.write_text(text)
    said = cli('run', study_file.name)
    assert said.returncode == 2, said.stdout + said.stderr
    line = [l for l in said.stderr.splitlines() if l.startswith('error: ')]
    assert len(line) == 1 and 'Traceback' not in said.stderr
    for p in parts: assert p in line[0], line[0]
    assert not list(study_file.parent.rglob('points'))

def test_a_truncated_model_is_refused_before_any_run(study_file):
    import shutil
    from lora_study.config import EMBEDDED
    shutil.copytree(str(EMBEDDED), 'base')
    weights = study_file.parent/'base/model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    study_file.write_text(STUDY + 'model_name_or_path: ./base\n')
    said = cli('run', study_file.name)
    assert said.returncode == 2 and 'model.safetensors' in said.stderr and 'download it again' in said.stderr

def test_a_device_that_is_not_there_is_refused_before_any_run(study_file):
    said = cli('run', study_file.name, '--device', 'toaster')
    assert said.returncode == 2 and "device = 'toaster'" in said.stderr
