"Tasks end to end: hub columns and local copies, conversations, labels, answers judged by independent arithmetic, and what is refused."
import json, math, random
from collections import Counter
from dataclasses import replace
import pytest
from conftest import TINY, cli, shared
from lora_study.catalogue import CATALOGUE, NO_ANSWER
from lora_study.config import BadInput, Run, read_study, run_id, sealed
from lora_study.data import encode, load_splits, targets
from lora_study.scores import corpus_scores, judge

ALL = dict(train_size=None, validation_size=None, test_size=None)

def hub_row(name, i): # the hub's columns, rows of our own
    turns = [dict(role='user', content=f'Question {i}?'), dict(role='assistant', content=f'Answer {i}.')]
    return {'alpaca': dict(instruction=f'Say {i}.', input='', output=f'{i}', text='…'), 'alpaca-cleaned': dict(instruction=f'Say {i}.', input='now', output=f'{i}'),
        'dolly-15k': dict(instruction=f'Say {i}.', context='', response=f'{i}', category='open_qa'), 'openassistant-guanaco': dict(text=f'### Human: Say {i}.### Assistant: {i}'),
        'no_robots': dict(prompt=f'Question {i}?', prompt_id=f'{i}', messages=turns, category='Chat'), 'ultrachat_200k': dict(prompt=f'Question {i}?', prompt_id=f'{i}', messages=turns),
        'samsum': dict(id=f'{i}', dialogue=f'A: I have {i}.\r\nB: Fine.', summary=f'A has {i}.'), 'e2e_nlg': dict(meaning_representation=f'name[The {i}]', human_reference=f'The {i} is open.'),
        'gsm8k': dict(question=f'What is {i} + 1?', answer=f'{i} + 1 = <<{i}+1={i+1}>>{i+1}\n#### {i+1}'),
        'squad_v2': dict(id=f'{i}', title='t', context=f'Passage {i}.', question='Which?', answers=dict(text=[f'{i}'] if i % 2 else [], answer_start=[8] if i % 2 else [])),
        'sst2': dict(sentence=f'a film of {i} hours ', label=i % 2, idx=i), 'mrpc': dict(sentence1=f'{i}.', sentence2='B.', label=i % 2, idx=i),
        'rte': dict(sentence1=f'{i}.', sentence2='B.', label=i % 2, idx=i), 'boolq': dict(question=f'is it {i}', answer=bool(i % 2), passage=f'It is {i}.')}[name]

@pytest.mark.parametrize('name', CATALOGUE)
def test_a_short_name_reads_the_hubs_columns_and_a_local_copy_alike(name, folder, monkeypatch):
    known = CATALOGUE[name]
    for k, split in enumerate({*known.splits.values(), *(('test',) if name in ('sst2', 'mrpc', 'rte') else ())}):
        rows = [hub_row(name, 1000*k + i) | (dict(label=-1) if split == 'test' and 'label' in hub_row(name, 0) else {}) for i in range(60)]
        (folder/'hub').mkdir(exist_ok=True)
        (folder/'hub'/f'{split}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    copy = load_splits(Run(dataset_name=name, dataset_path='hub', **ALL))
    monkeypatch.setitem(CATALOGUE, name, replace(known, hub=str(folder/'hub'), config=None)) # datasets.load_dataset itself, on a folder
    online = load_splits(Run(dataset_name=name, **ALL))
    for s in ('train', 'validation', 'test'): assert getattr(copy, s) == getattr(online, s) and getattr(copy, s)
    assert copy.facts['rows_left_out'] == 0 and copy.facts['shared_prompts'] == 0 # labels that are hidden were not even read
    kind = copy.test[0].get('score', 'labels' if 'choices' in copy.test[0] else 'text')
    assert kind == {'final answer': 'final_answer', 'accuracy, macro F1': 'labels', 'exact match and F1, official': 'qa'}.get(known.scores, 'text')

def test_gsm8k_and_its_final_answers_are_read_as_published():
    from lora_study.scores import final_answer
    path = shared('data/gsm8k')
    s = load_splits(Run(dataset_name='gsm8k', dataset_path=str(path), **ALL))
    assert (len(s.train) + len(s.validation), len(s.test), s.facts['rows_left_out']) == (7473, 1319, 0)
    assert all(final_answer(r['completion']) is not None for r in s.test)
    assert all(judge(r['completion'], [r['completion']], 'final_answer')['answer_correct'] for r in s.test)

def test_sst2_tests_on_dev_and_has_both_labels():
    path = shared('data/sst2')
    s = load_splits(Run(dataset_name='sst2', dataset_path=str(path), **ALL))
    assert len(s.test) == 872 and Counter(r['completion'] for r in s.test) == dict(positive=444, negative=428)
    assert len(s.train) + len(s.validation) == 67349 and s.facts['split'] == 'validation cut by hash'

def test_other_real_files_are_recognised():
    n = lambda s: len(s.train) + len(s.validation) + len(s.test)
    boolq = load_splits(Run(dataset_name='boolq', dataset_path=str(shared('data/llm_adapters/boolq')), **ALL))
    assert len(boolq.test) == 3270 and boolq.test[0]['choices'] == ['the correct answer is true', 'the correct answer is false']
    books = load_splits(Run(dataset_name=str(shared('data/llm_adapters/openbookqa')), **ALL))
    assert len(books.test) == 500 and len(books.test[0]['choices']) == 4
    tales = load_splits(Run(dataset_name=str(shared('data/tinystories/sample.txt')), dataset_format='text', **ALL))
    assert n(tales) > 2000 and all(r['prompt'] == '' for r in tales.test)
    play = load_splits(Run(dataset_name=str(shared('data/gpteacher/roleplay-simple-deduped-roleplay-instruct.json')), **ALL))
    assert n(play) + play.facts['rows_left_out'] == 1923 and play.test[0]['prompt'].startswith('### Instruction:')
    e2e = load_splits(Run(dataset_name='e2e_nlg', dataset_path=str(shared('data/e2e')), **ALL))
    assert sum(len(r['references']) > 1 for r in e2e.test if 'references' in r) > 4000 # several writers a restaurant

def test_squads_own_file_and_the_hubs_rows_are_the_same(folder):
    rows = [hub_row('squad_v2', i) for i in range(40)]
    (folder/'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    qas = lambda r: [dict(id=r['id'], question=r['question'], is_impossible=not r['answers']['text'], answers=[dict(text=t, answer_start=a) for t, a in zip(*r['answers'].values())])]
    (folder/'own.json').write_text(json.dumps(dict(version='v2.0', data=[dict(title='t', paragraphs=[dict(context=r['context'], qas=qas(r)) for r in rows])])))
    a, b = (load_splits(Run(dataset_name='squad_v2', dataset_path=p, **ALL)) for p in ('rows.jsonl', 'own.json'))
    assert a == b and {tuple(r['references']) for r in a.test} > {(NO_ANSWER,)}

def test_prepared_data_keeps_its_kind(folder):
    for name in ('gsm8k', 'sst2', 'openassistant-guanaco', 'no_robots', 'squad_v2'):
        (folder/f'{name}.jsonl').write_text('\n'.join(json.dumps(hub_row(name, i)) for i in range(60)))
        before = load_splits(Run(dataset_name=name, dataset_path=f'{name}.jsonl', **ALL))
        (folder/'out.jsonl').write_text(''.join(json.dumps(r | dict(split=s)) + '\n' for s in ('train', 'validation', 'test') for r in getattr(before, s))) # as prepare-data does
        after = load_splits(Run(dataset_name='out.jsonl', **ALL))
        for s in ('train', 'validation', 'test'): assert sorted(getattr(after, s), key=str) == sorted(getattr(before, s), key=str), name

# scores, against arithmetic that shares nothing with the library's

def grams(s, n): return Counter(tuple(s[i:i+n]) for i in range(len(s)-n+1))

def slow_bleu(pairs): # Papineni et al. 2002, words between spaces, one reference
    said, right = ([p[k].split() for p in pairs] for k in (0, 1))
    logs = [math.log(sum((grams(a, n) & grams(b, n)).total() for a, b in zip(said, right)) / sum(grams(a, n).total() for a in said)) for n in range(1, 5)]
    c, r = sum(map(len, said)), sum(map(len, right))
    return 100 * math.exp(min(0, 1 - r/c) + sum(logs)/4)

def slow_chrf(pairs): # Popović 2015: six orders, recall weighs double, spaces do not count
    fs = []
    for n in range(1, 7):
        hits = a = b = 0
        for said, right in pairs:
            x, y = grams(said.replace(' ', ''), n), grams(right.replace(' ', ''), n)
            hits += (x & y).total(); a += x.total(); b += y.total()
        fs.append((hits/a, hits/b))
    p, r = (sum(f[k] for f in fs)/6 for k in (0, 1))
    return 100 * 5*p*r/(4*p + r)

def test_bleu_and_chrf_are_what_their_papers_say():
    rng = random.Random(0)
    words = 'the cat dog sat lay on a mat rug and slept all day long'.split()
    right = [rng.choices(words, k=rng.randint(8, 14)) for _ in range(20)]
    pairs = [(' '.join(w if rng.random() < .7 else rng.choice(words) for w in r), ' '.join(r)) for r in right]
    got = corpus_scores([a for a, _ in pairs], [[b] for _, b in pairs])
    assert got['bleu'] == pytest.approx(slow_bleu(pairs), rel=1e-9)
    assert got['chrf'] == pytest.approx(slow_chrf(pairs), rel=1e-9)
    for a, b in pairs: assert judge(a, [b], 'text')['chrf'] == pytest.approx(slow_chrf([(a, b)]), rel=1e-9)
    short = [(' '.join(a.split()[:6]), b) for a, b in pairs] # the brevity penalty counts
    assert corpus_scores([a for a, _ in short], [[b] for _, b in short])['bleu'] == pytest.approx(slow_bleu(short), rel=1e-9)

# through real points

def point(run, folder):
    from lora_study.sweep import run_point
    return run_point(sealed(run), 'a', 'tasks', folder/'results')[0]

def test_labels_go_through_a_point_and_into_the_database(folder):
    from lora_study import tracker
    from lora_study.world import PEOPLE, PLACES
    asked = [dict(prompt=f'### {p} of {home} has a {pet}.\n### Which pet?\n### Answer:', completion=f' {pet}', choices=[' cat', ' dog']) for p in PEOPLE for home in PLACES[:3] for pet in ('cat', 'dog')]
    (folder/'rows.jsonl').write_text('\n'.join(map(json.dumps, asked)))
    rec = point(Run(**TINY | ALL | dict(max_steps=20, learning_rate=5e-3), dataset_name='rows.jsonl'), folder)
    rows = rec.scores['test']
    assert rec.metrics['test_accuracy'] == sum(r['correct'] for r in rows)/len(rows) > rec.metrics['base_accuracy']
    assert all(r['prediction'] == max(r['choices'], key=r['choices'].get) and set(r['choices']) == {' cat', ' dog'} for r in rows)
    assert 'test_exact_match' not in rec.metrics and rec.metrics['test_n_classified'] == len(rows) > 8
    db = tracker.open_db(folder/'results/study.db')
    tracker.register(db, 'tasks', {Run(**rec.config): 'a'})
    tracker.finish(db, 'tasks', rec, tracker.claim(db, 'tasks', rec.run_id, tracker.owner()), 'a.ipynb')
    assert tracker.example_scores(db, 'tasks', rec.run_id).correct.tolist() == [r['correct'] for r in rows]
    text = tracker.export_study(db, 'tasks')
    (folder/'records.jsonl').write_text(text)
    again = tracker.open_db(folder/'again.db')
    tracker.import_records(again, folder/'records.jsonl')
    assert tracker.export_study(again, 'tasks') == text

def test_generated_answers_are_judged_in_the_record(folder):
    rec = point(Run(**TINY), folder)
    said = [r for r in rec.scores['test'] if r['prediction'] is not None]
    assert len(said) == 2 and {'bleu', 'chrf', 'rouge_l', 'references', 'ended'} <= set(said[0])
    again = corpus_scores([r['prediction'] for r in said], [r['references'] for r in said]) # from the record alone
    assert {k: rec.metrics[f'test_{k}'] for k in again} == again
    assert rec.metrics['test_rouge_l'] == sum(r['rouge_l'] for r in said)/2

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"

def chat_base(folder): # the embedded base, its tokenizer given a chat template
    import shutil
    from lora_study.config import EMBEDDED
    shutil.copytree(str(EMBEDDED), folder/'chat')
    cfg = json.loads((folder/'chat/tokenizer_config.json').read_text())
    (folder/'chat/tokenizer_config.json').write_text(json.dumps(cfg | dict(chat_template=TEMPLATE)))
    return './chat'

def talks(folder):
    rows = [dict(conversations=[{'from': 'system', 'value': 'Be brief.'}] + [{'from': w, 'value': f'{w} {i} {k}'} for k in range(2) for w in ('human', 'gpt')]) for i in range(60)]
    (folder/'talks.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return 'talks.jsonl'

def test_conversations_learn_every_answer_and_nothing_that_was_asked(folder):
    from lora_study.model import load_tokenizer
    run = Run(model_name_or_path=chat_base(folder), dataset_name=talks(folder), **ALL)
    tokenizer = load_tokenizer(run)
    example = encode(load_splits(run).train, tokenizer, 256)[0][0]
    learnt = tokenizer.decode([t for t in targets(example) if t != -100])
    assert learnt.count('gpt') == 2 and 'human' not in learnt and 'assistant' not in learnt and learnt.endswith(tokenizer.eos_token)
    assert tokenizer.decode(example.ids[:example.prompt_len]).endswith('[assistant] ')
    asked = tokenizer.apply_chat_template([dict(role='user', content='x')], tokenize=False, add_generation_prompt=True)
    assert asked.endswith('[assistant] ') # what a model is prompted with later is what it was trained after

def test_a_study_of_conversations_trains(folder):
    rec = point(Run(**TINY | dict(max_steps=20), model_name_or_path=chat_base(folder), dataset_name=talks(folder)), folder)
    assert rec.metrics['test_nll'] < rec.metrics['base_nll']

def test_a_template_that_writes_earlier_answers_anew_still_ends_where_they_end(folder):
    from lora_study.model import load_tokenizer
    tokenizer = load_tokenizer(Run(model_name_or_path=chat_base(folder)))
    tokenizer.chat_template = TEMPLATE.replace("[{{ m.role }}] {{", "[{{ m.role }}] {% if loop.last and m.role == 'assistant' %}(thinks){% endif %}{{")
    said = [dict(role=r, content=c) for r, c in (('user', 'a'), ('assistant', 'Ada'), ('user', 'b'), ('assistant', 'Bram'))]
    example, = encode([dict(prompt='a', completion='Bram', task='', messages=said)], tokenizer, 256)[0]
    assert [tokenizer.decode(example.ids[a:b]) for a, b in example.turns] == ['Ada']
    assert tokenizer.decode(example.ids[example.prompt_len:]) == '(thinks)Bram' + tokenizer.eos_token

# lm-evaluation-harness

PETS = '''task: pets
dataset_path: json
dataset_kwargs: {data_files: {test: pets.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [cat, dog]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
'''

def pets(folder): # a task file of our own, and documents the embedded base can read
    rows = [dict(question=f'### {p} has a {w}.\n### Which pet?\n### Answer:', answer=k) for p in ('Ada', 'Bram', 'Cleo') for k, w in enumerate(('cat', 'dog'))]
    (folder/'pets.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder/'pets.yaml').write_text(PETS)
    return rows

@pytest.mark.fault(58, 59)
def test_the_harness_and_our_labels_agree_on_base_and_adapter(folder):
    pytest.importorskip('lm_eval', reason='the extra eval is not installed')
    import torch
    from lora_study.evaluation import evaluate, summarise
    from lora_study.harness import harness
    from lora_study.lora import make_trainable
    from lora_study.model import load_base, load_tokenizer
    from lora_study.train import Loop, train
    rows, run = pets(folder), Run(**TINY | dict(max_steps=3))
    tokenizer, model = load_tokenizer(run), load_base(run, torch.device('cpu'))
    examples, _ = encode([dict(prompt=r['question'], completion=(' cat', ' dog')[r['answer']], task='', choices=[' cat', ' dog']) for r in rows], tokenizer, 64)
    for adapted in (False, True):
        if adapted: model = make_trainable(model, run); train(Loop(run, model, examples, tokenizer.pad_token_id))
        state = torch.get_rng_state()
        metrics, notes = harness(model, tokenizer, ['pets.yaml'])
        assert notes == [] and list(metrics.values()) == [summarise(evaluate(model, tokenizer, examples))['accuracy']] and list(metrics)[0].startswith('lm_eval_pets_acc_v')
        assert torch.equal(state, torch.get_rng_state())
    assert list(harness(model, tokenizer, ['pets.yaml'], limit=2)[0])[0].startswith('lm_eval_pets_acc_first2_v')
    (folder/'pets.jsonl').write_text('not json')
    metrics, notes = harness(model, tokenizer, ['pets.yaml'], limit=3)
    assert metrics == {} and len(notes) == 1 and 'missing from the run' in notes[0]

def harness_stub(monkeypatch, result): # the harness's place, where it is not installed: what stands in it gives `result` or raises it
    import sys, types
    from lora_study import harness as room
    def simple_evaluate(*a, **kw):
        if isinstance(result, Exception): raise result
        return dict(results=result)
    class TaskManager:
        all_tasks = ['pets']
        def __init__(self, **kw): pass
    kinds = {'lm_eval': dict(simple_evaluate=simple_evaluate), 'lm_eval.tasks': dict(TaskManager=TaskManager), 'lm_eval.models': {}, 'lm_eval.models.huggingface': dict(HFLM=lambda **kw: None)}
    for name, holds in kinds.items():
        m = types.ModuleType(name); m.__dict__.update(holds); monkeypatch.setitem(sys.modules, name, m)
    monkeypatch.setattr(room, 'installed', lambda name: '0.4.13')
    return room.harness

@pytest.mark.fault(58)
@pytest.mark.parametrize('result', [RuntimeError('out of documents'), MemoryError(), {}, {'pets': {'acc,none': float('nan'), 'acc_stderr,none': .1}}, {'pets': {}}])
def test_a_benchmark_that_fails_takes_nothing_with_it(folder, monkeypatch, result):
    pets(folder)
    metrics, notes = harness_stub(monkeypatch, result)(None, None, ['pets.yaml'])
    assert metrics == {} and len(notes) == isinstance(result, Exception) and all('missing from the run' in n for n in notes)

@pytest.mark.fault(59)
def test_a_limit_or_another_version_of_the_harness_is_another_metric(folder, monkeypatch):
    from lora_study import harness as room
    pets(folder)
    ask = harness_stub(monkeypatch, {'pets': {'acc,none': .5}})
    names = [*ask(None, None, ['pets.yaml'])[0], *ask(None, None, ['pets.yaml'], limit=2)[0]]
    monkeypatch.setattr(room, 'installed', lambda name: '0.4.9')
    names += ask(None, None, ['pets.yaml'])[0]
    assert names == ['lm_eval_pets_acc_v0_4_13', 'lm_eval_pets_acc_first2_v0_4_13', 'lm_eval_pets_acc_v0_4_9']
    assert len({run_id(Run(lm_eval_tasks=['a'], lm_eval_limit=n)) for n in (None, 2, 3)}) == 3 # and another run

@pytest.mark.fault(61)
def test_a_task_file_that_brings_code_needs_the_flag(folder, monkeypatch):
    from lora_study.guards import TRUST
    pets(folder)
    (folder/'pets.yaml').write_text(PETS + 'process_results: !function harm.go\n')
    ask = harness_stub(monkeypatch, {'pets': {'acc,none': .5}})
    with pytest.raises(BadInput, match='!function.*--trust-remote-code'): ask(None, None, ['pets.yaml'])
    monkeypatch.setenv(TRUST, '1')
    assert ask(None, None, ['pets.yaml'])[1] == []

def test_without_the_package_one_line_says_what_to_install(folder, monkeypatch):
    import sys
    from lora_study.harness import find_tasks
    pets(folder)
    monkeypatch.setitem(sys.modules, 'lm_eval', None); monkeypatch.setitem(sys.modules, 'lm_eval.tasks', None)
    with pytest.raises(BadInput, match='lora_study.eval.'): find_tasks(['pets.yaml'])

def test_a_task_files_content_is_part_of_a_runs_id(folder):
    pets(folder)
    ids = {run_id(sealed(Run())), run_id(sealed(Run(lm_eval_tasks=['pets.yaml']))), run_id(sealed(Run(lm_eval_tasks=['arc_easy'])))}
    (folder/'two').mkdir(); (folder/'two/pets.yaml').write_text(PETS + 'num_fewshot: 2\n')
    (folder/'same').mkdir(); (folder/'same/pets.yaml').write_text(PETS)
    assert len(ids | {run_id(sealed(Run(lm_eval_tasks=[f'{where}/pets.yaml']))) for where in ('two', 'same')}) == 4

# what is refused

REFUSED = {'no template': (dict(dataset_name='talks.jsonl'), 'no chat template'), 'no such copy': (dict(dataset_name='gsm8k', dataset_path='no/such.jsonl'), "dataset_path = 'no/such.jsonl'"),
    'a path without a short name': (dict(dataset_name='talks.jsonl', dataset_path='talks.jsonl'), 'is no short name'), 'other columns': (dict(dataset_name='gsm8k', dataset_path='talks.jsonl'), 'expected gsm8k (question, answer)'),
    'unknown format': (dict(dataset_format='jeopardy'), 'dataset_format'), 'offline': (dict(dataset_name='mrpc'), 'name a local copy as dataset_path')}

def refused_study(name, folder):
    talks(folder)
    (folder/'s.yaml').write_text('\n'.join(f'{k}: {v}' for k, v in (TINY | REFUSED[name][0]).items()) + '\naxes:\n  lora_r: [2]\n')
    return folder/'s.yaml', REFUSED[name][1]

@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.fault(16, 20, 25)
def test_data_that_cannot_be_used_is_refused_before_any_run(name, folder):
    from lora_study.planner import preflight
    path, part = refused_study(name, folder)
    with pytest.raises(BadInput) as e: preflight(read_study(path))
    assert part in str(e.value) and '\n' not in str(e.value)

def test_the_command_line_says_it_in_one_line(folder):
    path, part = refused_study('no template', folder)
    said = cli('run', path.name)
    assert said.returncode == 2, said.stdout + said.stderr
    line, = [l for l in said.stderr.splitlines() if l.startswith('error: ')]
    assert part in line and 'Traceback' not in said.stderr and not (folder/'results/s/points').exists()
