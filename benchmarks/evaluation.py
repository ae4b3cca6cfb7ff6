"""How fast an evaluation is, against how one would write it: metrics of tokens, and greedy answers.

    python benchmarks/evaluation.py [--rows 300] [--prompts 64] [--rounds 3] [--quick]     # prints a table, writes benchmarks/evaluation.json

The embedded base with an adapter trained for some steps here, once unmerged and once merged, in float32 on one thread. Token metrics (NLL, perplexity, bits per byte, token accuracy): ours reads every row once, short rows
together, and widens logits only where a label is; the rivals read the rows in their order, padded to the longest of each batch, with a forward for each metric, or one for all. Greedy answers: ours batches prompts of similar
length and stops a batch when all have ended; the rivals are `generate` one prompt at a time, and `generate` on batches padded to the longest prompt of all that runs to max_new_tokens. Every way's numbers and answers
are asserted to be those of ours. Tokens: those scored, and those answered up to the end token, the same for all ways, so that ratios of times are ratios of speeds.
"""
import argparse, math, tempfile, time
from statistics import median
import torch
import torch.nn.functional as F
from conditions import conditions, written
from lora_study.config import Run
from lora_study.data import collate
from lora_study.evaluation import generated, summarise, token_scores
from lora_study.lora import make_trainable, merged, save_trained
from lora_study.preload import prepare
from lora_study.model import load_base
from lora_study.train import Loop, train

NEW, BATCH = 48, 64

# --- token metrics as one would write them

def batches(examples:list, pad_id:int):
    for k in range(0, len(examples), BATCH): yield collate(examples[k:k+BATCH], pad_id), examples[k:k+BATCH]

@torch.no_grad()
def mean_loss(model, examples, pad_id) -> tuple: # nats a token by the model's own loss, tokens
    nats = tokens = 0
    for b, _ in batches(examples, pad_id):
        n = (b['labels'][:, 1:] != -100).sum().item()
        nats += model(**b).loss.item()*n; tokens += n
    return nats/tokens, tokens

@torch.no_grad()
def accuracy(model, examples, pad_id) -> float:
    right = tokens = 0
    for b, _ in batches(examples, pad_id):
        labels = b.pop('labels')[:, 1:]; said = model(**b).logits[:, :-1].argmax(-1)
        right += ((said == labels) & (labels != -100)).sum().item(); tokens += (labels != -100).sum().item()
    return right/tokens

def a_forward_each(model, examples, pad_id) -> dict:
    "Every metric asks the model anew, as separate metric objects do"
    nll, tokens = mean_loss(model, examples, pad_id)
    bits = mean_loss(model, examples, pad_id)[0]*tokens/math.log(2)/sum(e.n_bytes for e in examples)
    return dict(nll=nll, perplexity=math.exp(mean_loss(model, examples, pad_id)[0]), bits_per_byte=bits, token_accuracy=accuracy(model, examples, pad_id))

@torch.no_grad()
def one_forward(model, examples, pad_id) -> dict:
    "One forward for all, on all logits"
    nats = right = tokens = 0
    for b, _ in batches(examples, pad_id):
        labels = b.pop('labels')[:, 1:]; logits = model(**b).logits[:, :-1].float()
        nats += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction='sum').item()
        right += ((logits.argmax(-1) == labels) & (labels != -100)).sum().item(); tokens += (labels != -100).sum().item()
    return dict(nll=nats/tokens, perplexity=math.exp(nats/tokens), bits_per_byte=nats/math.log(2)/sum(e.n_bytes for e in examples), token_accuracy=right/tokens)

def ours_scores(model, examples, pad_id) -> dict: return summarise(token_scores(model, examples, pad_id, BATCH))

SCORES = {'lora_study: one forward, by length': ours_scores, 'one forward, rows in order, all logits': one_forward, 'a forward for each metric': a_forward_each}

# --- greedy answers as one would write them

@torch.no_grad()
def one_at_a_time(model, tokenizer, examples) -> list:
    out = []
    for e in examples:
        ids = torch.tensor([e.ids[:e.prompt_len]])
        got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
        out.append(tokenizer.decode(got[0, ids.shape[1]:], skip_special_tokens=True))
    return out

@torch.no_grad()
def to_the_limit(model, tokenizer, examples) -> list:
    "Padded to the longest prompt of all, and no early stop"
    longest, out = max(e.prompt_len for e in examples), []
    for k in range(0, len(examples), BATCH):
        prompts = [e.ids[:e.prompt_len] for e in examples[k:k+BATCH]]
        pad = lambda fill, of: torch.tensor([[fill]*(longest - len(p)) + of(p) for p in prompts])
        got = model.generate(input_ids=pad(tokenizer.pad_token_id, list), attention_mask=pad(0, lambda p: [1]*len(p)), do_sample=False, max_new_tokens=NEW, pad_token_id=tokenizer.pad_token_id, eos_token_id=model.config.vocab_size) # an end token that never comes
        for row in got[:, longest:].tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            out.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    return out

def ours_answers(model, tokenizer, examples) -> list: return [text for text, _ in generated(model, tokenizer, examples, NEW, BATCH)]

ANSWERS = {'lora_study: by length, stops when all have ended': ours_answers, 'generate, one prompt at a time': one_at_a_time, 'generate, padded to the longest, to the limit': to_the_limit}

# --- the measurement

def in_turn(ways:dict, args:tuple, rounds:int) -> tuple: # way → seconds (median), way → what it returned
    times, got, names = {w: [] for w in ways}, {}, list(ways)
    for k in range(rounds + 1): # the first warms up
        for w in names[k % len(names):] + names[:k % len(names)]:
            start = time.perf_counter(); got[w] = ways[w](*args)
            if k: times[w].append(time.perf_counter() - start)
    return {w: median(t) for w, t in times.items()}, got

def rows_of(kind:str, adapter:str, seconds:dict, tokens:int, **more) -> list:
    ours = next(iter(seconds.values()))
    return [dict(kind=kind, adapter=adapter, way=w, seconds=s, tok_s=tokens/s, ratio=s/ours, tokens=tokens, **more) for w, s in seconds.items()]

def measure(adapter:str, model, tokenizer, examples:list, prompts:int, rounds:int) -> list:
    seconds, got = in_turn(SCORES, (model, examples, tokenizer.pad_token_id), rounds)
    want = got[next(iter(SCORES))]
    for w, g in got.items():
        off = {k: (v, want[k]) for k, v in g.items() if not math.isclose(v, want[k], rel_tol=1e-4)}
        assert not off, (adapter, w, off)
    rows = rows_of('token metrics', adapter, seconds, want['n_tokens'], rows=len(examples), rounds=rounds)
    asked = [e for e in examples if e.prompt and not e.choices][:prompts]
    seconds, got = in_turn(ANSWERS, (model, tokenizer, asked), rounds)
    want = got[next(iter(ANSWERS))]
    for w, g in got.items(): assert g == want, (adapter, w, [(a, b) for a, b in zip(g, want) if a != b][:3])
    tokens = sum(min(NEW, len(tokenizer(t, add_special_tokens=False).input_ids) + 1) for t in want) # the end token is one
    return rows + rows_of('greedy answers', adapter, seconds, tokens, rows=len(asked), rounds=rounds, max_new_tokens=NEW)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(rows=300, prompts=64, rounds=3, steps=60).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--quick', action='store_true', help='a few rows, one round, an adapter of a few steps')
    a = p.parse_args()
    if a.quick: a.rows, a.prompts, a.rounds, a.steps = 24, 6, 1, 4
    found, cpu = conditions(), torch.device('cpu'); torch.set_num_threads(1)
    run = Run(train_size=max(64, 16*a.steps), validation_size=10, test_size=a.rows, max_steps=a.steps, learning_rate=5e-3, dtype='float32', engine='auto')
    tokenizer, _, encoded, _ = prepare(run)
    model = make_trainable(load_base(run, cpu), run)
    train(Loop(run, model, encoded['train'][0], tokenizer.pad_token_id))
    with tempfile.TemporaryDirectory() as d:
        save_trained(model, d, run)
        models, rows = dict(unmerged=model.eval(), merged=merged(d, run, cpu).eval()), []
    for name, m in models.items():
        rows += measure(name, m, tokenizer, encoded['test'][0], a.prompts, a.rounds)
        for r in rows[-6:]: print(f"{r['adapter']:9} {r['kind']:15} {r['way']:50} {r['seconds']:7.2f} s {r['tok_s']:8.0f} tokens/s {r['ratio']:6.2f} times ours", flush=True)
    written(__file__, found | dict(quick=a.quick, steps=a.steps, rows=rows))

if __name__ == '__main__': main()
