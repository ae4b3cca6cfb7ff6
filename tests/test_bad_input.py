"Mistakes end in one clear line and exit code 2, before anything runs."
import json, os, shutil
from pathlib import Path
import pytest
from typer.testing import CliRunner
from conftest import STUDY, TINY, cli

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error') # as the console script has it
from lora_study.cli import app
from lora_study.config import EMBEDDED, BadInput, Run, expand, read_study, run_id

def ask(*args): # the command line, in this process
    return CliRunner().invoke(app, [str(a) for a in args])

def refused(*args): # the one line it says
    said = ask(*args)
    assert said.exit_code == 2, (said.exit_code, said.output, said.exception)
    line, = [l for l in said.stderr.splitlines() if l.startswith('error: ')]
    assert 'Traceback' not in said.output
    return line

def case(name, fault, text, *parts): return pytest.param(text, parts, id=name, marks=pytest.mark.fault(fault))

BOMB = 'a0: &a0 [1, 2]\n' + ''.join(f'a{i+1}: &a{i+1} [*a{i}, *a{i}, *a{i}]\n' for i in range(60))
READ = [ # what reading the file tells
    case('tab', 2, STUDY + 'x:\n\ty: 1\n', 'tiny.yaml:12:', 'cannot start any token'),
    case('broken', 2, STUDY + '  a: [1\n', 'tiny.yaml:'),
    case('not utf-8', 2, 'lora_r: caf\udce9\n', 'tiny.yaml: cannot be read as UTF-8', 'position 11'),
    case('empty', 3, '', 'got an empty file', 'expected a mapping'),
    case('a list', 3, '- 1\n', 'got list', 'expected a mapping'),
    case('a text', 3, 'lora_r\n', 'got str', 'expected a mapping'),
    case('a key twice', 4, STUDY + 'max_steps: 9\n', 'tiny.yaml:11:1: max_steps is given twice, first on line 6'),
    case('unknown key', 5, STUDY + 'lora_rank: 8\n', 'tiny.yaml:11: lora_rank', 'did you mean lora_r?'),
    case('unknown key on an axis', 5, STUDY.replace('lora_r:', 'learning_rte:'), 'tiny.yaml:9: axes.learning_rte', 'did you mean learning_rate?'),
    case('a key that is a number', 5, '1: 2\n', "tiny.yaml:1:1: a key is '1'", 'expected a name'),
    case('text for a number', 7, STUDY.replace('[2, 4]', '[2, "4"]'), 'tiny.yaml:9: axes.lora_r[1]', "'4'"),
    case('a half for a count', 7, STUDY + 'max_length: 8.5\n', 'max_length = 8.5'),
    case('true for a count', 7, STUDY + 'max_length: true\n', 'max_length = True'),
    case('rank zero', 8, STUDY.replace('[2, 4]', '[0]'), 'axes.lora_r[0] = 0', 'greater than or equal to 1'),
    case('a negative rate', 8, STUDY + 'learning_rate: -1\n', 'learning_rate = -1', 'greater than 0'),
    case('no rate at all', 8, STUDY + 'learning_rate: .nan\n', 'learning_rate = nan'),
    case('dropout one', 8, STUDY + 'lora_dropout: 1.0\n', 'lora_dropout = 1.0', 'less than 1'),
    case('alpha zero', 8, STUDY + 'lora_alpha: 0r\n', 'lora_alpha = 0.0', 'greater than 0'),
    case('no pattern', 9, STUDY + 'lora_target_modules: "(q_proj"\n', "lora_target_modules = '(q_proj'", 'expected names'),
    case('an empty axis', 10, STUDY.replace('[2, 4]', '[]'), 'axes.lora_r = []', 'at least 1 item'),
    case('no seed', 10, STUDY.replace('[0, 1]', '[]'), 'seeds = []', 'at least 1 item'),
    case('too many runs', 11, STUDY + 'max_runs: 3\n', '4 runs', 'max_runs = 3'),
    case('a huge product', 11, 'axes:\n' + ''.join(f'  {k}: [{", ".join(map(str, range(1, 1000)))}]\n' for k in ('lora_r', 'max_steps', 'max_length', 'eval_steps', 'train_size')), f'{999**5} runs', 'raise max_runs'),
    case('aliases of aliases', 11, BOMB, 'tiny.yaml: it stands for 222,553', 'at most 100,000'),
    case('a value that holds itself', 11, 'axes: &a {lora_r: *a}\n', 'a value holds itself'),
    case('lists without end', 11, 'a: ' + '['*1500 + ']'*1500 + '\n', 'inside one another'),
    case('4 and 8 bits', 13, STUDY + 'load_in_4bit: true\nload_in_8bit: true\n', 'load_in_4bit: true, and load_in_8bit too', 'remove the other'),
    case('for a later version', 15, "lora_study: '99.0'\nnew_argument: 1\n", "tiny.yaml:1: lora_study = '99.0'", 'this is 0.1.0', 'upgrade'),
    case('no version', 15, 'lora_study: 0.2\n' + STUDY, 'lora_study = 0.2', 'in quotes'),
    case('missing folder', 26, STUDY + 'model_name_or_path: ../no/such\n', "model_name_or_path = '../no/such'", 'not found', 'expected a folder'),
    case('no model in the folder', 26, STUDY + 'model_name_or_path: .\n', "model_name_or_path = '.'", 'no config.json'),
    case('missing data', 16, STUDY + 'dataset_name: ../no/such.jsonl\n', "dataset_name = '../no/such.jsonl'", 'not found', 'check the path'),
    case('no data in the folder', 16, STUDY + 'dataset_name: .\n', "dataset_name = '.'", 'a folder without data files'),
    case('neither file nor folder', 16, STUDY + 'dataset_name: /dev/null\n', "dataset_name = '/dev/null'", 'neither a file nor a folder'),
    case('a tag', 61, STUDY + 'description: !!python/object/apply:os.system ["touch harmed"]\n', 'tiny.yaml:11:14', 'could not determine a constructor'),
    case('code for its own sake', 62, STUDY + 'trust_remote_code: true\n', 'trust_remote_code = True', 'expected --trust-remote-code too'),
    case('a name that climbs', 64, 'name: ../../x\n' + STUDY, "name = '../../x'", 'letters, digits, - and _'),
    case('an absolute name', 64, 'name: /etc/x\n' + STUDY, "name = '/etc/x'"),
    case('a name with NUL', 64, 'name: "a\\0b"\n' + STUDY, r"name = 'a\x00b'"),
    case('a device for a name', 64, 'name: CON\n' + STUDY, "name = 'CON'", 'a system keeps for itself'),
    case('no name', 64, 'name: ""\n' + STUDY, "name = ''"),
    case('a name of 300 letters', 64, f'name: {"x"*300}\n' + STUDY, 'up to 64'),
    case('a name that turns around', 64, 'name: "a\\u202eb"\n' + STUDY, 'letters, digits'),
    case('an argument that is code', 65, STUDY + 'x=1; import os: 1\n', 'x=1; import os: no such argument'),
    case('an axis that is code', 65, STUDY.replace('lora_r:', '__import__("os"):'), 'no such argument'),
]

@pytest.mark.parametrize('text,parts', READ)
def test_a_bad_study_is_refused_in_one_line(text, parts, study_file):
    study_file.write_bytes(text.encode('utf-8', 'surrogateescape'))
    for command in ('run', 'plan'):
        line = refused(command, study_file.name)
        for p in parts: assert p in line, line
    assert [p.name for p in study_file.parent.iterdir()] == ['tiny.yaml'] # no database, no folder, no run

@pytest.mark.fault(1)
@pytest.mark.parametrize('name', ['no/such.yaml', '.'])
def test_a_study_file_that_cannot_be_read_is_named(name, folder):
    line = refused('run', name)
    assert line.startswith(f'error: {name}: ') and 'lora-study init' in line

@pytest.mark.fault(6)
def test_a_rate_may_be_written_without_a_point(study_file):
    study_file.write_text(STUDY + 'learning_rate: 1e-4\nweight_decay: 1E-2\nwarmup_steps: +1e1\n')
    run = expand(read_study(study_file))[0]
    assert (run.learning_rate, run.weight_decay, run.warmup_steps) == (1e-4, 1e-2, 10)

@pytest.mark.fault(61)
def test_nothing_in_a_study_file_is_filled_in(study_file, monkeypatch):
    monkeypatch.setenv('PLANTED', 'leaked')
    study_file.write_text(STUDY + 'description: ${PLANTED} ${oc.env:PLANTED} $PLANTED %PLANTED% {{PLANTED}}\n')
    assert 'leaked' not in repr(read_study(study_file))

BEFORE = [ # what the look before the first run tells
    case('a hub model offline', 26, 'model_name_or_path: no-such-owner/no-such-model\n', "model_name_or_path = 'no-such-owner/no-such-model'", 'go online'),
    case('hub data offline', 16, 'dataset_name: no-such-owner/no-such-data\n', "dataset_name = 'no-such-owner/no-such-data'", 'go online', 'prepare-data'),
    case('a missing target', 9, 'lora_target_modules: [q_proj, c_attn]\n', "['c_attn'] not in the base", 'q_proj'),
    case('a pattern that matches nothing', 9, 'lora_target_modules: ".*c_attn"\n', 'matches no layer', 'it has attention: k_proj'),
    case('a rank wider than the layer', 8, 'lora_r: 2000\n', 'lora_r = 2000 exceeds', 'smaller side'),
    case('too long for the base', 8, 'max_length: 4096\n', 'max_length = 4096', '256 positions'),
    case('too few facts', 18, 'dataset_config: memorise\ntrain_size: 9999\n', "dataset_config = 'memorise'", '2496 facts exist, n = 9999'),
    case('a world without end', 8, 'train_size: 1000000000\n', 'train_size = 1000000000', 'expected at most 1,000,000 rows'),
    case('paged memory without a GPU', 13, 'optim: paged_adamw_8bit\n', "optim = 'paged_adamw_8bit'", 'use adamw_8bit'),
    case('prompts only', 22, 'max_length: 4\n', 'max_length = 4', 'every one of', 'shortest prompt', 'raise max_length'),
    case('no data row', 18, 'dataset_name: empty.jsonl\n', 'empty.jsonl', 'has no rows'),
    case('no test row', 18, 'dataset_name: two.jsonl\n', 'two.jsonl', 'split has no rows', 'use a larger dataset'),
    case('a bad line', 17, 'dataset_name: broken.jsonl\n', 'broken.jsonl:2: not JSON', "at 'oops}'", 'repair or remove'),
    case('not utf-8', 19, 'dataset_name: latin.jsonl\n', 'latin.jsonl: not UTF-8 at byte 68 (line 2)'),
    case('columns nobody knows', 20, 'dataset_name: odd.jsonl\n', "columns ['a', 'b'] do not fit any known format", 'prompt, completion', 'alpaca'),
    case('rows without text', 21, 'dataset_name: nulls.jsonl\nbad_rows: error\n', 'bad_rows = error', '4 rows without a usable prompt or completion', 'train 2; train 3'),
    case('talks without a template', 25, 'dataset_name: talks.jsonl\n', 'no chat template', 'use a base that has one'),
]
ROW = dict(prompt='What is red?', completion=' A rose.')

@pytest.fixture
def datasets(folder):
    def write(name, *rows): (folder/name).write_bytes(b'\n'.join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    many = [dict(prompt=f'Say {i}.', completion=f' {i}') for i in range(80)]
    write('empty.jsonl'); write('two.jsonl', ROW); write('broken.jsonl', ROW, b'{"prompt": oops}'); write('latin.jsonl', ROW, b'{"prompt": "caf\xe9"}')
    write('odd.jsonl', *[dict(a=1, b=2)]*9); write('nulls.jsonl', many[0], dict(prompt=None, completion='x'), dict(prompt='y', completion=''), dict(prompt=3, completion='x'), dict(prompt='z', completion=float('nan')), *many[1:])
    write('talks.jsonl', *[dict(messages=[dict(role='user', content=f'Say {i}.'), dict(role='assistant', content=f'{i}')]) for i in range(80)])
    return folder

@pytest.mark.parametrize('text,parts', BEFORE)
def test_what_cannot_run_is_refused_before_the_first_run(text, parts, datasets):
    plain = ''.join(f'{k}: {v}\n' for k, v in TINY.items() if f'{k}:' not in text)
    (datasets/'tiny.yaml').write_text(plain + text)
    line = refused('run', 'tiny.yaml')
    for p in parts: assert p in line, line
    assert not (datasets/'results').exists()

@pytest.mark.fault(21, 23)
def test_rows_left_out_and_rows_in_both_splits_are_counted(datasets):
    from lora_study.planner import preflight
    (datasets/'both').mkdir()
    rows = [json.dumps(dict(prompt=f'Say {i}.', completion=f' {i}')) for i in range(40)]
    for name, some in dict(train=rows[:30], valid=rows[30:], test=rows[25:]).items(): (datasets/'both'/f'{name}.jsonl').write_text('\n'.join(some))
    (datasets/'s.yaml').write_text('\n'.join(f'{k}: {v}' for k, v in TINY.items()) + '\naxes:\n  dataset_name: [both, nulls.jsonl]\n')
    notes = preflight(read_study(datasets/'s.yaml'))
    assert 'both: 5 prompts stand in train and in test' in notes
    assert 'nulls.jsonl: 4 rows without a usable prompt or completion are left out: train 2; train 3' in notes

@pytest.mark.fault(24)
def test_special_tokens_in_a_text_are_text():
    from lora_study.data import encode
    from lora_study.model import load_tokenizer
    tokenizer = load_tokenizer(Run())
    special = tokenizer.eos_token
    example, = encode([dict(prompt=f'{special} ignore', completion=f' all {special} this', task='')], tokenizer, 256)[0]
    assert example.ids.count(tokenizer.eos_token_id) == 1 and example.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.ids).count(special) == 3

def copied_base(folder, **files):
    shutil.copytree(str(EMBEDDED), folder/'base')
    for name, change in files.items(): f = folder/'base'/name.replace('__', '.'); f.write_bytes(change(f.read_bytes()))
    return STUDY + 'model_name_or_path: ./base\n'

@pytest.mark.fault(25)
def test_a_base_without_a_pad_or_an_end_token(folder):
    from lora_study.model import load_tokenizer
    strip = lambda *names: lambda raw: json.dumps({k: v for k, v in json.loads(raw).items() if k not in names}).encode()
    copied_base(folder, tokenizer_config__json=strip('pad_token'))
    tokenizer = load_tokenizer(Run(model_name_or_path='./base'))
    assert tokenizer.pad_token == tokenizer.eos_token # the rule
    f = folder/'base/tokenizer_config.json'; f.write_bytes(strip('eos_token', 'pad_token')(f.read_bytes()))
    (folder/'base/special_tokens_map.json').unlink(missing_ok=True)
    with pytest.raises(BadInput, match='no end token.*tokenizer_config.json'): load_tokenizer(Run(model_name_or_path='./base'))

@pytest.mark.fault(26)
def test_a_truncated_model_is_refused_before_any_run(study_file):
    study_file.write_text(copied_base(study_file.parent, model__safetensors=lambda raw: raw[:-100]))
    line = refused('run', study_file.name)
    assert 'model.safetensors' in line and 'download it again' in line

@pytest.mark.fault(26)
@pytest.mark.parametrize('change', [lambda raw: b'{"model_type": "llama"}', lambda raw: raw[:40], lambda raw: b'[]', lambda raw: b'{"model_type": "no_such_family"}'])
def test_a_damaged_config_is_refused_before_any_run(change, study_file):
    study_file.write_text(copied_base(study_file.parent, config__json=change))
    assert "model_name_or_path = './base'" in refused('run', study_file.name)
    assert ask('plan', study_file.name).exit_code in (0, 2) # sizes a family fills in by itself may do for a plan

@pytest.mark.fault(63)
def test_pickled_weights_are_never_read(study_file):
    import pickle
    class Harm:
        def __reduce__(self): return Path('harmed').touch, ()
    study_file.write_text(copied_base(study_file.parent))
    (study_file.parent/'base/model.safetensors').unlink()
    (study_file.parent/'base/pytorch_model.bin').write_bytes(pickle.dumps(Harm()))
    assert 'pickled weights are not read' in refused('run', study_file.name)
    from lora_study.lora import load_adapter
    from lora_study.model import load_base
    import torch
    (study_file.parent/'adapter').mkdir()
    (study_file.parent/'adapter/adapter_config.json').write_text('{"base_model_name_or_path": "embedded", "peft_type": "LORA"}')
    (study_file.parent/'adapter/adapter_model.bin').write_bytes(pickle.dumps(Harm()))
    with pytest.raises(BadInput, match='pickled weights are not read'): load_adapter(study_file.parent/'adapter', load_base(Run(), torch.device('cpu')))
    with pytest.raises(BadInput): load_base(Run(model_name_or_path='./base'), torch.device('cpu'))
    assert not Path('harmed').exists()

@pytest.mark.fault(27)
def test_an_adapter_of_another_base_is_refused_with_both_names(folder):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from lora_study.lora import add_adapter, save_adapter
    from lora_study.model import load_base
    run = Run(lora_target_modules='q,v')
    save_adapter(add_adapter(load_base(run, torch.device('cpu')), run), folder/'adapter', run)
    copied_base(folder)
    c = AutoConfig.from_pretrained('./base'); c.hidden_size, c.intermediate_size = 2*c.hidden_size, 64; c.head_dim = c.hidden_size//c.num_attention_heads
    AutoModelForCausalLM.from_config(c).save_pretrained('./base')
    line = refused('evaluate', 'adapter', '--base', './base', '--test-size', 8, '--generate-size', 0, '--device', 'cpu')
    assert "does not fit the base 'base'" in line and "trained on 'embedded'" in line

@pytest.mark.fault(13)
def test_bits_without_their_package_are_refused_before_any_run(study_file, monkeypatch):
    import importlib.util
    found = importlib.util.find_spec
    monkeypatch.setenv('LORA_STUDY_WARM', '0') # the study is looked at in this process, which lacks the package
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'bitsandbytes' else found(name, *a))
    study_file.write_text(STUDY + 'load_in_4bit: true\n')
    assert 'pip install bitsandbytes' in refused('run', study_file.name)

@pytest.mark.fault(12)
def test_points_that_are_the_same_are_run_once_and_it_is_said(study_file):
    study_file.write_text('max_steps: 4\naxes:\n  lora_alpha: [16, 16.0, 2r]\nseeds: [0, 0]\n')
    said = ask('plan', study_file.name)
    assert said.exit_code == 0 and 'note: 5 of 6 points are the same as others' in said.stdout and '1 runs, 0 done, 1 to do' in said.stdout

@pytest.mark.fault(14)
def test_an_edited_study_says_what_is_new_and_keeps_what_is_finished(study_file):
    from lora_study import tracker
    from lora_study.config import label, varied
    old = read_study(study_file)
    db = tracker.open_db('results/study.db')
    tracker.register(db, 'tiny', {r: label(r, varied(old)) for r in expand(old)})
    done = expand(old)[0]
    rec = tracker.Record(run_id=run_id(done), config=done.model_dump(), provenance={}, metrics=dict(test_nll=1.), curves={}, adapter=[], scores={}, started=tracker.now(), ended=tracker.now())
    tracker.finish(db, 'tiny', rec, tracker.claim(db, 'tiny', rec.run_id, tracker.owner()), 'tiny/points/x.ipynb')
    assert 'edited' not in ask('plan', study_file.name).stdout
    study_file.write_text(STUDY.replace('[2, 4]', '[4, 8]'))
    said = ask('plan', study_file.name).stdout
    assert 'note: the study file was edited since it was begun: 2 runs are new (lora_r-8_seed-0_' in said
    assert '2 are no longer asked for (lora_r-2_seed-0_' in said and '1 of those are finished and stay' in said and '4 runs, 0 done, 4 to do' in said
    assert tracker.frame(db, 'tiny', 'done').run_id.tolist() == [rec.run_id]

def test_a_device_that_is_not_there_is_refused_before_any_run(study_file):
    assert "device = 'toaster'" in refused('run', study_file.name, '--device', 'toaster')

@pytest.mark.fault(1)
def test_the_command_itself_ends_in_one_line_and_exit_code_2(study_file): # all the above, once through a process of its own
    study_file.write_text(STUDY + 'lora_rank: 8\n')
    said = cli('run', study_file.name)
    assert said.returncode == 2 and said.stdout == '' and said.stderr.startswith('error: tiny.yaml:11: lora_rank') and said.stderr.count('\n') == 1

@pytest.mark.parametrize('text', ['a', 'lora_r=!!int ""', 'lora_r=' + '['*1500 + ']'*1500, 'lora_r=&a [*a]', 'x=1; import os=2', 'name=../x'])
def test_an_override_is_checked_like_the_file(text, study_file):
    assert refused('run', study_file.name, '--set', text)
