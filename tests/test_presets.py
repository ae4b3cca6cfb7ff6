"The studies that ship: each can be planned, and its first two settings really run."
import pytest
from conftest import ROOT
from lora_study.config import read_study, run_id
from lora_study.sweep import labels, run_point

SHORT = dict(max_steps=2, train_size=64, validation_size=8, test_size=8, generate_size=4, max_new_tokens=4, per_device_train_batch_size=4)
PRESETS = ['rank', 'alpha', 'modules', 'placement', 'quantization', 'learning_rate', 'search', 'full', 'baseline']

@pytest.mark.parametrize('preset', PRESETS)
def test_the_first_two_settings_of_a_preset_run(preset, folder):
    study = read_study(ROOT/'studies'/f'{preset}.yaml', SHORT)
    runs = list(labels(study).items())
    for run, name in (runs[0], runs[min(len(study.seeds), len(runs) - 1)]):
        record, _ = run_point(run, name, preset, folder/'results', device='cpu')
        assert record.run_id == run_id(run) and record.metrics['train_steps'] == 2
        seen = {k.removeprefix('applied_'): v for k, v in record.provenance.items()} # read back from the model and the optimizer
        if run.use_peft: assert seen['lora_r'] == run.lora_r and seen['scaling'] == run.lora_alpha/run.lora_r
        assert seen['quantization'] == ('int8' if run.load_in_8bit else 'nf4' if run.load_in_4bit else 'none') and seen['learning_rate'] == run.learning_rate

def test_every_shipped_study_says_what_it_asks():
    for path in (ROOT/'studies').glob('*.yaml'):
        if path.stem != 'models': assert read_study(path).description, path.name
