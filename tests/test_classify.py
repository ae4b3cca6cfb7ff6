"A classifying head end to end: trained and the base not, resumed, saved, read by plain PEFT, through a point and into the database, and what is refused."
import json
import pytest, torch
from conftest import shared
from lora_study.classify import check_classes, class_scores, encoded, head_parameters, labels_of
from lora_study.config import EMBEDDED, BadInput, Point, Run, check_together, run_id, sealed
from lora_study.data import collate, load_splits
from lora_study.evaluation import evaluate, summarise
from lora_study.lora import base_checksum, check_fits, count_parameters, load_adapter, make_trainable, merge_errors, parameter_table, planned_parameters, rank_for, save_adapter, save_trained
from lora_study.model import load_base, load_tokenizer, skeleton
from lora_study.train import Loop, check_applied, measure_adapter, train

CPU = torch.device('cpu')

@pytest.fixture
def reviews(folder): # a TSV of our own, three classes
    said = dict(bad=('a bore', 'simply awful'), fair=('all right', 'nothing new'), good=('a delight', 'truly lovely'))
    rows = [f'{what} was {how} {when}\t{label}' for what in ('the film', 'a dinner', 'her song', 'this book') for label, ways in said.items() for how in ways for when in ('today', 'again', 'for once')]
    (folder/'reviews.tsv').write_text('\n'.join(['text\tlabel', *rows]))
    return str(folder/'reviews.tsv')

def encoder(folder): # a BERT with a pooler and no head, untrained
    from transformers import BertConfig, BertModel, BertTokenizerFast
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz:', *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz')]
    (folder/'bert').mkdir()
    (folder/'bert/vocab.txt').write_text('\n'.join(words))
    BertTokenizerFast(vocab=str(folder/'bert/vocab.txt')).save_pretrained(folder/'bert')
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=128)).save_pretrained(folder/'bert')
    return str(folder/'bert')

def asked(reviews, **kw):
    small = dict(max_length=96, lora_r=4, lora_dropout=.1, per_device_train_batch_size=8, max_steps=6, eval_steps=3)
    return Run(task_type='SEQ_CLS', dataset_name=reviews, train_size=None, test_size=None, **small | kw)

def loop_of(run):
    tokenizer, splits = load_tokenizer(run), load_splits(run)
    parts = [encoded(run, rows, tokenizer)[0] for rows in (splits.train, splits.validation, splits.test)]
    return Loop(run, make_trainable(load_base(run, CPU), run), parts[0], tokenizer.pad_token_id), parts

@pytest.mark.parametrize('base, head', [('embedded', ['score.weight']), ('bert', ['classifier.bias', 'classifier.weight'])])
def test_a_head_trains_resumes_and_is_saved(base, head, reviews, folder):
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from safetensors.torch import load_file
    run = asked(reviews, model_name_or_path=str(EMBEDDED) if base == 'embedded' else encoder(folder))
    loop, (_, validation, test) = loop_of(run)
    start, frozen = {n: p.detach().clone() for n, p in loop.model.named_parameters()}, base_checksum(loop.model)
    read = check_applied(loop)
    assert (read['head'].split(), read['head_labels'], read['head_dtype']) == (head, 'bad, fair, good', 'float32')
    assert read['trainable_params'] == count_parameters(loop.model)['trainable_params'] == planned_parameters(run, skeleton(run))
    assert sum(r['trainable_params'] for r in parameter_table(loop.model)) == read['trainable_params']
    train(loop, validation)
    moved = {n for n, p in loop.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n, p in loop.model.named_parameters() if p.requires_grad} and sum('modules_to_save' in n for n in moved) == len(head)
    assert base_checksum(loop.model) == frozen and [h['step'] for h in loop.history['validation']] == [0, 3, 6]
    plain = load_base(run, CPU)
    for n, p in plain.named_parameters(): # what is under the adapter is the base as loaded, its untrained head included
        m, _, last = n.rpartition('.')
        inside = loop.model.get_submodule(f'base_model.model.{m}')
        inside = getattr(inside, 'base_layer', getattr(inside, 'original_module', inside))
        assert torch.equal(getattr(inside, last), p), n
    # stopped, forgotten and resumed
    half, _ = loop_of(run)
    train(half, validation, folder/'checkpoints', save_steps=3, stop_at=3)
    torch.manual_seed(999)
    again, _ = loop_of(run)
    train(again, validation, folder/'checkpoints')
    assert again.resumed_at == 3 and again.history == loop.history and all(torch.equal(p, q) for p, q in zip(again.params, loop.params))
    # saved, and read by plain PEFT
    save_adapter(loop.model, folder/'adapter', run)
    assert sorted(n.removeprefix('base_model.model.') for n in load_file(folder/'adapter/adapter_model.safetensors') if 'lora_' not in n) == head
    said = class_scores(loop.model, test, loop.pad_id)
    auto = AutoPeftModelForSequenceClassification.from_pretrained(folder/'adapter', num_labels=3, dtype=torch.float32).eval()
    under = PeftModel.from_pretrained(load_base(run, CPU), folder/'adapter').eval()
    assert class_scores(auto, test, loop.pad_id) == class_scores(under, test, loop.pad_id) == said
    row, = merge_errors(folder/'adapter', run, [collate(test, loop.pad_id)], CPU)
    assert row['logit_relative'] < 1e-5 and (row['flipped_tokens'], row['tokens']) == (0, len(test))
    measured = measure_adapter(folder/'adapter', run.model_copy(update=dict(task_type='CAUSAL_LM'))) # the adapter says itself that it has a head
    assert measured['test_accuracy'] == summarise(said)['accuracy'] and measured['test_nll'] == pytest.approx(summarise(said)['nll'])
    assert measured['trainable_params'] == read['trainable_params'] and 'test_perplexity' not in measured

def test_every_weight_trains_under_a_head_without_an_adapter(reviews, folder):
    from transformers import AutoModelForSequenceClassification
    run = asked(reviews, use_peft=False, learning_rate=1e-4, max_steps=2)
    loop, (_, _, test) = loop_of(run)
    assert check_applied(loop)['trainable_params'] == count_parameters(loop.model)['total_params']
    start = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    train(loop)
    assert not any(torch.equal(p, start[n]) for n, p in loop.model.named_parameters())
    save_trained(loop.model, folder/'whole', run)
    again = AutoModelForSequenceClassification.from_pretrained(folder/'whole', dtype=torch.float32).eval()
    assert again.config.id2label == {0: 'bad', 1: 'fair', 2: 'good'} and class_scores(again, test, loop.pad_id) == class_scores(loop.model, test, loop.pad_id)
    assert run_id(run) != run_id(run.model_copy(update=dict(init_seed=5))) # it draws the head

@pytest.mark.parametrize('low', [dict(dtype='bfloat16'), dict(load_in_4bit=True), dict(load_in_8bit=True)])
def test_a_head_stays_in_float32_on_a_base_that_is_not(low, reviews, folder):
    run = asked(reviews, max_steps=1, lora_dropout=0., **low)
    loop, (_, _, test) = loop_of(run)
    read = check_applied(loop)
    assert read['head_dtype'] == 'float32' and {p.dtype for p in loop.params} == {torch.float32}
    train(loop)
    said = class_scores(loop.model, test, loop.pad_id)
    save_adapter(loop.model, folder/'adapter', run)
    assert class_scores(load_adapter(folder/'adapter', load_base(run, CPU)), test, loop.pad_id) == said

def test_a_point_with_a_head_goes_into_the_database(reviews, folder):
    from lora_study import tracker
    from lora_study.report import quality_table
    from lora_study.sweep import run_point
    run = sealed(asked(reviews, max_steps=20, eval_steps=10))
    rec, _ = run_point(run, 'a', 'heads', folder/'results')
    rows, blank = rec.scores['test'], ('perplexity', 'bits_per_byte', 'token_accuracy', 'n_tokens', 'exact_match', 'n_generated')
    assert not any(f'{w}_{k}' in rec.metrics for w in ('base', 'test') for k in blank) and not any('token_s' in k or k.startswith('batch') for k in rec.metrics)
    assert rec.metrics['test_accuracy'] == sum(r['exact'] for r in rows)/len(rows) and rec.metrics['test_nll'] == pytest.approx(sum(r['nll'] for r in rows)/len(rows))
    assert all(r['prediction'] == max(r['choices'], key=r['choices'].get) and r['nll'] == -r['choices'][r['label']] for r in rows)
    assert len(rec.curves['validation']) == 3 and rec.metrics['merge_base_logit_relative'] < 1e-5 and rec.curves['train'][-1]['loss'] < rec.curves['train'][0]['loss']
    assert 'nats an example' in quality_table(rec.metrics) and rec.provenance['applied_head_labels'] == 'bad, fair, good'
    db = tracker.open_db(folder/'results/study.db')
    tracker.register(db, 'heads', {run: 'a'})
    tracker.finish(db, 'heads', rec, tracker.claim(db, 'heads', rec.run_id, tracker.owner()), 'a.ipynb')
    kept = tracker.example_scores(db, 'heads', rec.run_id)
    assert kept.prediction.tolist() == [r['prediction'] for r in rows] and kept.bytes.isna().all() and (kept.tokens == 1).all()

def test_a_budget_counts_the_head(reviews):
    point = Point(task_type='SEQ_CLS', dataset_name=reviews, lora_budget=41_280)
    run = Run(task_type='SEQ_CLS', dataset_name=reviews, lora_r=rank_for(point))
    assert planned_parameters(run, skeleton(run)) - planned_parameters(run.model_copy(update=dict(task_type='CAUSAL_LM')), skeleton(Run())) == 3*192
    assert head_parameters(skeleton(run)) == ['score.weight'] and head_parameters(skeleton(Run())) == []

def test_what_makes_no_sense_with_a_head_is_refused_in_one_line(reviews, folder):
    for bad in (dict(packing=True), dict(completion_only_loss=False), dict(generate_size=5), dict(max_new_tokens=9), dict(answer_suite=True), dict(lm_eval_tasks=['boolq']), dict(forgetting_dataset_name='embedded')):
        with pytest.raises(BadInput, match=next(iter(bad))): check_together(Point(task_type='SEQ_CLS', **bad))
    check_together(Point(task_type='SEQ_CLS', generate_size=0))
    run = asked(reviews)
    assert run_id(run) == run_id(run.model_copy(update=dict(generate_size=0))) != run_id(run.model_copy(update=dict(task_type='CAUSAL_LM')))
    for placement in ('head', ['score'], '.*'):
        with pytest.raises(BadInput): check_fits(asked(reviews, lora_target_modules=placement), skeleton(run))
    (folder/'talk.jsonl').write_text('\n'.join(json.dumps(dict(prompt=f'q{i}', completion='a')) for i in range(60)))
    with pytest.raises(BadInput, match='choices'): labels_of(asked('talk.jsonl'))
    with pytest.raises(BadInput, match='labels'): labels_of(Run(task_type='SEQ_CLS'))

def test_a_saved_head_is_not_put_to_other_classes(reviews, folder):
    run = asked(reviews)
    save_adapter(make_trainable(load_base(run, CPU), run), folder/'adapter', run)
    (folder/'other.tsv').write_text('text\tlabel\n' + '\n'.join(f'{i} is {w}\t{w}' for i in range(40) for w in ('hot', 'mild', 'cold')))
    with pytest.raises(BadInput, match='tells'): measure_adapter(folder/'adapter', asked(str(folder/'other.tsv')))

def test_sst2_by_a_head_on_a_real_small_model(folder):
    run = Run(task_type='SEQ_CLS', model_name_or_path=str(shared('models/stories260K')), dataset_name='sst2', dataset_path=str(shared('data/sst2')), train_size=400, validation_size=40, test_size=200,
              learning_rate=5e-3, max_steps=20)
    loop, (_, validation, test) = loop_of(run)
    assert labels_of(run) == ('negative', 'positive') and loop.model.config.pad_token_id == loop.pad_id # its files name no padding
    before = summarise(evaluate(loop.model.eval(), load_tokenizer(run), test))
    train(loop, validation)
    after = summarise(evaluate(loop.model, load_tokenizer(run), test))
    print(f"SST-2 with a head, accuracy {after['accuracy']:.3f} after {loop.step} steps, {before['accuracy']:.3f} before, n = {after['n_classified']}")
    assert after['n_classified'] == 200 and 0 < after['accuracy'] <= 1
