"A recommendation's snippet against the libraries it is for; its evidence when it is thin; and the gate between two studies."
import json, subprocess, sys
from dataclasses import replace
import pytest
from typer.testing import CliRunner
from conftest import ROOT, TINY
from lora_study import evidence, recommend as room, regress, tracker
from lora_study.cli import app
from lora_study.config import BadInput, Run, sealed

RECORDS = ROOT/'results'/'world_rank'/'records.jsonl'

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "A results folder with the study of ranks in its database"
    folder = tmp_path_factory.mktemp('results')
    tracker.import_records(tracker.open_db(folder/'study.db'), RECORDS)
    return folder

@pytest.fixture(scope='module')
def found(results): return room.recommend(evidence.gather(tracker.open_db(results/'study.db'), 'world_rank'))

def of(found, skeleton=None, dtype='float32', **arguments): # a recommendation of another run on the embedded base
    run = sealed(Run(**arguments))
    if skeleton is None or not run.use_peft: return replace(found, run=run, dtype=dtype)
    from lora_study.lora import chosen_layers, where
    return replace(found, run=run, dtype=dtype, adapted=where([(l.layer, l.inside) for l in chosen_layers(run, skeleton)]))

@pytest.fixture(scope='module')
def skeleton():
    from lora_study.model import skeleton
    return skeleton(Run())

def call(*args):
    done = CliRunner().invoke(app, [str(a) for a in args])
    return done.exit_code, done.output

def test_imports_bring_no_torch():
    code = 'import sys; from lora_study import recommend, regress; assert "torch" not in sys.modules and "transformers" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)

PLACED = {
    'everywhere': {}, 'q and v': dict(lora_target_modules='q,v'), 'names': dict(lora_target_modules=['gate_proj', 'o_proj']), 'the last layers': dict(lora_target_modules='feed-forward', layers_to_transform='last_half'),
    'all linear, some layers': dict(layers_to_transform=[0, 3]), 'the head too': dict(lora_target_modules=['q', 'head'], layers_to_transform=[1]), 'a pattern': dict(lora_target_modules=r'.*\.[02]\.self_attn\.q_proj'),
    'a pattern in some layers': dict(lora_target_modules=r'.*\.(0\.self_attn\.q_proj|1\.self_attn\.v_proj|2\.mlp\.up_proj)', layers_to_transform=[0, 1])}

@pytest.mark.parametrize('name', PLACED)
def test_the_snippets_adapter_is_where_the_runs_was(name, found, skeleton):
    import copy
    from peft import LoraConfig, get_peft_model
    from lora_study.lora import adapter_layers, chosen_layers
    rec = of(found, skeleton, **PLACED[name])
    config = eval(room.call('LoraConfig', room.adapter_arguments(rec.run, rec.adapted)), dict(LoraConfig=LoraConfig))
    adapted = get_peft_model(copy.deepcopy(skeleton), config)
    assert list(adapter_layers(adapted)) == [l.name for l in chosen_layers(rec.run, skeleton)]

ADAPTERS = [dict(), dict(lora_r=4, lora_alpha=2.5, lora_dropout=.1, use_rslora=True), dict(use_dora=True, init_lora_weights='gaussian'), dict(init_lora_weights='pissa', bias='none'), dict(init_lora_weights='loftq')]

@pytest.mark.parametrize('arguments', ADAPTERS, ids=str)
def test_the_snippets_adapter_has_the_runs_arguments(arguments, found, skeleton):
    from peft import LoftQConfig, LoraConfig
    from lora_study.lora import adapter_config
    rec = of(found, skeleton, lora_target_modules='q,v', **arguments)
    ours, theirs = adapter_config(rec.run, skeleton).to_dict(), eval(room.call('LoraConfig', room.adapter_arguments(rec.run, rec.adapted))).to_dict()
    places = ('target_modules',) # said another way; the test above holds the modules themselves against each other
    assert {k: v for k, v in ours.items() if k not in places} == {k: v for k, v in theirs.items() if k not in places}

@pytest.mark.parametrize('arguments', [dict(load_in_8bit=True), dict(load_in_4bit=True), dict(load_in_4bit=True, bnb_4bit_quant_type='fp4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype='float16')], ids=str)
def test_the_snippets_quantization_is_the_runs(arguments):
    import torch
    from transformers import BitsAndBytesConfig
    from lora_study.model import quantization
    run = Run(**arguments)
    assert eval(room.call('BitsAndBytesConfig', room.quantization_arguments(run, 'bfloat16'))).to_dict() == quantization(run, torch.bfloat16).to_dict()

TRAINED = [dict(), dict(max_steps=7, warmup_steps=.1, lr_scheduler_type='cosine_with_restarts', weight_decay=.01), dict(optim='paged_adamw_8bit', gradient_accumulation_steps=4, data_seed=3, seed=2, num_train_epochs=.5, adam_beta2=.95)]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('arguments', TRAINED, ids=str)
def test_the_snippets_training_arguments_are_the_runs(arguments):
    import torch
    from transformers import TrainingArguments, get_scheduler
    from lora_study.train import make_schedule
    run = Run(**arguments)
    given = eval(room.call('dict', room.training_arguments(run)))
    only_trl = {k: given.pop(k) for k in ('max_length', 'packing', 'completion_only_loss')}
    assert only_trl == {k: getattr(run, k) for k in only_trl}
    args = TrainingArguments(**given)
    for k in set(room.PASSED) - set(only_trl): assert getattr(args, k) == getattr(run, k), k
    assert not args.bf16 and not args.fp16
    curves = []
    for make in (lambda o: make_schedule(run, o, 20), lambda o: get_scheduler(args.lr_scheduler_type, o, args.get_warmup_steps(20), 20, args.lr_scheduler_kwargs)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], args.learning_rate); schedule, rates = make(optimizer), []
        for _ in range(20): rates.append(schedule.get_last_lr()[0]); optimizer.step(); schedule.step()
        curves.append(rates)
    assert curves[0] == pytest.approx(curves[1])

@pytest.mark.parametrize('name', ['revisions', 'local', 'quantized', 'full', 'loraplus'])
def test_every_kind_of_snippet_is_python_without_a_path_of_ours(name, found, skeleton):
    hub = dict(model_name_or_path='owner/model', model_revision='v1', base_hash='hub:owner/model@v1')
    rec = of(found, skeleton, **dict(quantized=dict(load_in_4bit=True), full=dict(use_peft=False), loraplus=dict(loraplus_lr_ratio=16., optim='adamw_8bit')).get(name, {}))
    if name == 'revisions': rec = replace(rec, run=rec.run.model_copy(update=hub))
    if name == 'local': rec = replace(rec, run=rec.run.model_copy(update=dict(model_name_or_path=str(ROOT/'base'), dataset_name=str(ROOT/'mine.jsonl'), data_hash='abc')))
    text = room.snippet(rec)
    compile(text, name, 'exec')
    assert str(ROOT) not in text
    has = dict(revisions=["base = 'owner/model'", "revision='v1'"], local=['PATH/TO/base', rec.run.base_hash, 'PATH/TO/mine.jsonl'], quantized=['quantization_config=quantization', 'p.data.float()'],
               full=[], loraplus=['create_loraplus_optimizer', 'loraplus_lr_ratio=16.0', 'bitsandbytes.optim.AdamW8bit', 'optimizers=(optimizer, None)'])[name]
    for part in has: assert part in text, text
    assert ('LoraConfig' in text) == (name != 'full') and ('peft_config' in text) == (name not in ('full', 'loraplus'))

def test_loraplus_in_the_snippet_is_loraplus_in_the_run(found, skeleton):
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from lora_study.model import load_base
    from lora_study.train import parameter_groups
    rec = of(found, skeleton, loraplus_lr_ratio=8., weight_decay=.1)
    model = get_peft_model(load_base(rec.run, torch.device('cpu')), eval(room.call('LoraConfig', room.adapter_arguments(rec.run, rec.adapted))))
    names = {id(p): n for n, p in model.named_parameters()}
    scope = dict(model=model, torch=torch, create_loraplus_optimizer=create_loraplus_optimizer)
    exec('\n'.join(room.loraplus(rec.run)), scope)
    rates = lambda groups: {names[id(p)]: (g['lr'], g.get('weight_decay', .1)) for g in groups for p in g['params']}
    assert rates(scope['optimizer'].param_groups) == rates(parameter_groups(rec.run, model))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('arguments', [dict(), dict(lora_target_modules='q,v', layers_to_transform='last_half', loraplus_lr_ratio=4.), dict(use_peft=False), dict(load_in_8bit=True)], ids=str)
def test_the_snippet_trains(arguments, found, skeleton, folder):
    pytest.importorskip('trl')
    tiny = {k: v for k, v in TINY.items() if k not in ('generate_size', 'eval_steps')} | dict(max_steps=2, per_device_train_batch_size=4)
    rec = of(found, skeleton, **tiny, **arguments)
    asked = room.snippet(rec).split('lora-study ')[1].split('\n')[0]
    assert call(*asked.split())[0] == 0
    scope = {}
    exec(room.snippet(rec), scope)
    trainer = scope['trainer']
    assert trainer.state.global_step == 2
    assert (folder/'adapter'/('adapter_model.safetensors' if rec.run.use_peft else 'model.safetensors')).is_file()
    from lora_study.data import encode, load_splits # TRL reads the rows as the run did
    own = {tuple(e.ids): e.prompt_len for e in encode(load_splits(rec.run).train, scope['tokenizer'], rec.run.max_length)[0]}
    for row in trainer.train_dataset: assert tuple(row['input_ids']) in own

def test_recommend_on_the_command_line(results):
    code, text = call('recommend', 'world_rank', '--results', results, '--limit', '24GB', '--goal', 'cheapest', '--by', 'parameters')
    assert code == 0, text
    shown, _, python = text.partition('\n\n')
    assert max(map(len, shown.splitlines())) <= 80
    for part in ('why:', 'costs:', 'gives up:', 'ties with:', 'regret:', 'not known:'): assert part in shown
    compile(python, 'snippet', 'exec')
    assert call('recommend', 'world_rank', '--results', results, '--limit', '50MB')[0] == 1
    for wrong in (['--goal', 'nicest'], ['--limit', 'H1000'], ['--by', 'beauty'], ['--metric', 'test_f2'], ['--where', 'lora_r=7']):
        code, text = call('recommend', 'world_rank', '--results', results, *wrong)
        assert code == 2 and text.startswith('error: ') and len(text.strip().splitlines()) == 1, text
    assert call('recommend', 'nothing', '--results', results)[0] == 2

@pytest.mark.fault(35)
def test_a_diverged_seed_and_thin_evidence_are_said(tmp_path):
    db = tracker.open_db(tmp_path/'study.db')
    tracker.import_records(db, RECORDS)
    best = room.recommend(evidence.gather(db, 'world_rank'))
    runs = tracker.frame(db)
    gone = runs[runs.lora_r == best.values['lora_r']].run_id.iloc[0]
    db.execute("update runs set status='failed', error_kind='diverged' where run_id=?", (gone,)); db.execute('delete from metrics where run_id=?', (gone,)); db.commit()
    for goal in room.GOALS:
        other = room.recommend(evidence.gather(db, 'world_rank'), goal=goal)
        assert other.setting != best.setting or goal != 'best'
        assert other.regret.estimate >= 0 and 'nan' not in room.page(other)
    one = room.recommend(evidence.gather(db, 'world_rank', where=dict(seed=3)))
    assert one.regret.estimate is None and 'at least four' in one.regret.note and not one.ties and 'fewer than 6 seeds' in ' '.join(one.missing)
    room.page(one)
    db.execute('delete from metrics where name like "%peak%"'); db.commit()
    unknown = room.recommend(evidence.gather(db, 'world_rank'), limit='24GB')
    assert unknown.setting is None and 'no memory was measured' in unknown.why

def later(path, change=lambda r: r): # two settings of the study of ranks, every record changed
    rows = [change(r) for r in map(json.loads, RECORDS.read_text().splitlines()) if r['config']['lora_r'] in (4, 8)]
    path.write_text('\n'.join(json.dumps(r) for r in rows))
    return path

def worse(by, rank): # nats a token
    def change(r):
        if r['config']['lora_r'] == rank:
            s = r['scores']['test']; s['nll'] = [n + by*(1 + .1*((i + r['config']['seed']) % 3))*t for i, (n, t) in enumerate(zip(s['nll'], s['tokens']))]
            r['metrics'] = [[k, step, sum(s['nll'])/sum(s['tokens']) if k == 'test_nll' else v] for k, step, v in r['metrics']]
        return r
    return change

def test_the_gate_passes_what_did_not_move_and_stops_what_got_worse(results, tmp_path):
    then, shifted = later(tmp_path/'then.jsonl'), later(tmp_path/'shifted.jsonl', worse(.03, 4))
    assert call('compare', 'world_rank', then, '--results', results, '--gate')[0] == 0
    code, text = call('compare', then, shifted, '--results', results)
    assert code == 0 and 'worse: lora_r=4, test_nll: +0.0' in text and ' 1 worse, 0 better' in ' '.join(text.split()), text
    assert call('compare', then, shifted, '--gate', '--results', results)[0] == 1
    assert call('compare', shifted, then, '--gate', '--results', results)[0] == 0 # better is no failure
    assert call('compare', then, shifted, '--gate', '--margin', .1, '--results', results)[0] == 0
    for wrong in (['world_rank', 'nothing'], [tmp_path/'none.jsonl', then], ['world_rank', 'world_rank', '--at', '1999'], [then, shifted, '--across', 'rank']):
        code, text = call('compare', *wrong, '--results', results)
        assert code == 2 and text.startswith('error: ') and len(text.strip().splitlines()) == 1, text

def test_records_from_before_an_argument_existed_can_be_compared(tmp_path):
    def older(r): del r['config']['lm_eval_tasks'], r['config']['answer_suite']; return r
    moved = regress.compare_studies(regress.side(later(tmp_path/'older.jsonl', older)), regress.side(later(tmp_path/'then.jsonl')))
    assert not moved.failed and moved.only == ([], []) and {v.verdict for v in moved.verdicts.values()} == {'equivalent'}

def test_two_times_of_one_study_and_seeds_that_do_not_meet(results):
    db = tracker.open_db(results/'study.db')
    ends = sorted(tracker.frame(db).ended)
    with pytest.raises(BadInput, match='no run ended'): regress.side('world_rank', db, since='2999')
    early, late = regress.side('world_rank', db, until=ends[18]), regress.side('world_rank', db, since=ends[18])
    assert len(early.runs) + len(late.runs) == 36
    ranks = regress.side('world_rank', db)
    odd, even = (replace(ranks, settings={n: t[[s % 2 == k for s in t.index]] for n, t in ranks.settings.items()}, runs=ranks.runs[ranks.runs.seed % 2 == k]) for k in (0, 1))
    moved = regress.compare_studies(odd, even)
    assert not moved.failed and all(v.verdict == 'undecided' and 'unpaired' in v.comparison.effect.method for v in moved.verdicts.values())
