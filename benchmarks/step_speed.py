"""How long a training step takes, here and with Trainer + PEFT and TRL, on Llamas of random weights.

    python benchmarks/step_speed.py [--shapes S5 S17] [--rounds 5] [--steps 4] [--dataset FILE] [--only cpu] [--trl] [--quick]   # prints a table, writes benchmarks/step_speed.json

Each way lives in a process of its own, on one thread, and they take turns: a round is `steps` optimizer steps of each, in an order that rotates. Medians over all steps after the first of a round; ratios are of
medians. Processor seconds are what to read on a machine that does something else too. Peak memory is that of the process, less what it held when all was imported and no model made. Rows are
full (every row 256 tokens) and uneven (lengths of FILE's rows, or drawn so that padding is 1.7 times the tokens). --trl fetches TRL, without its dependencies, into a folder of its own under ~/.cache/lora_study.
A shape and kind of rows that is measured again on the same kind of processor takes the place of its row in the JSON; the others stay. Beside the times: the machine's own rate, of bfloat16 products in the base's own sizes on one thread, what a step needs
in floating-point operations (the head and the end of the last layer only where a label is), and where one more step of each of our ways goes by torch.profiler, by kind of operation.
Where there is a GPU it is measured too, by itself: the clock waits for it, memory is what its allocator held at most, and its processor's own seconds count for nothing.
"""
import argparse, json, os, random, re, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median
from conditions import conditions, written

SHAPES = dict(S5=dict(vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4),
              S17=dict(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=9, num_attention_heads=6, num_key_value_heads=6),
              S60=dict(vocab_size=8192, hidden_size=640, intermediate_size=1728, num_hidden_layers=10, num_attention_heads=10, num_key_value_heads=10),
              L1B=dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)) # Llama-3.2-1B's
ON = dict(cpu=['S5', 'S17', 'S60'], cuda=['S60', 'L1B']) # the shapes measured where nothing else is said
WAYS = dict(fast_bf16='lora_study, engine fast, base in bfloat16', fast_fp32='lora_study, engine fast, float32', plain_bf16='lora_study, engine peft, base in bfloat16', full_bf16='lora_study, the whole base, bfloat16',
            trainer_fp32='Trainer + PEFT, float32', trainer_bf16='Trainer + PEFT, bf16=True', trl='TRL SFTTrainer, its defaults')
BATCH, LENGTH, RANK, TRL = 8, 256, 16, Path('~/.cache/lora_study/trl').expanduser()

OPERATIONS = {'matrix products': r'mm\b|mm_\b|bmm|linear|matmul|mkldnn', 'attention': r'attention', 'loss': r'softmax|cross_entropy|nll_loss|gather|scatter', 'optimizer': r'foreach|adam|Optimizer|clip_grad',
              'casts and copies': r'copy|clone|contiguous|::cat|::to\b|index|empty|fill|zero'} # of torch.profiler's names; the first that fits

def peak_bytes(device:str) -> int:
    "Peak of resident memory so far, or of what a GPU's allocator gave out"
    if device == 'cuda':
        import torch
        return torch.cuda.max_memory_allocated()
    return 1024*int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])

# --- a process that takes steps when told to

def model_of(shape:str, device:str='cpu'):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    with torch.device(device): return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=512, pad_token_id=0))

def ours(way:str, shape:str, rows:list, device:str='cpu'):
    "Yields after each optimizer step: tokens trained on"
    import torch
    from lora_study.config import Run
    from lora_study.data import Example
    from lora_study.lora import make_trainable
    from lora_study.train import Loop, micro_batches, optimizer_step
    kind, dtype = way.split('_')
    run = Run(engine='fast' if kind == 'fast' else 'peft', use_peft=kind != 'full', lora_r=RANK, learning_rate=1e-4, per_device_train_batch_size=BATCH, max_length=LENGTH, max_steps=10**6, dtype=dict(fp32='float32', bf16='bfloat16')[dtype])
    base = model_of(shape, device).requires_grad_(False).to(getattr(torch, run.dtype))
    examples = [Example('', '', '', r['ids'], r['prompt'], 1, i) for i, r in enumerate(rows)]
    loop = Loop(run, make_trainable(base, run).train(), examples, 0)
    assert kind != 'fast' or loop.engine.kind == 'flat', loop.engine.note # or something else would be measured
    while True:
        yield optimizer_step(loop, micro_batches(loop, loop.step))[1]
        loop.schedule.step(); loop.step += 1

def theirs(way:str, shape:str, rows:list, steps:int, note, device:str):
    "Trains `steps` steps; `note(started, tokens)` at the start and end of each"
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments
    class Clock(TrainerCallback):
        def on_step_begin(self, *a, **k): note(True)
        def on_step_end(self, *a, **k): note(False)
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules='all-linear', task_type='CAUSAL_LM')
    common = dict(output_dir=tempfile.gettempdir(), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-4, report_to=[], save_strategy='no', logging_strategy='no', use_cpu=device == 'cpu', disable_tqdm=True, dataloader_num_workers=0)
    if way == 'trl':
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        from transformers import PreTrainedTokenizerFast
        from tokenizers import Tokenizer, models
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'<pad>': 0, '</s>': 1}, unk_token='<pad>')), pad_token='<pad>', eos_token='</s>')
        data = Dataset.from_list([dict(input_ids=r['ids'], completion_mask=[int(i >= r['prompt']) for i in range(len(r['ids']))]) for r in rows])
        trainer = SFTTrainer(model_of(shape, device), SFTConfig(**common, max_length=LENGTH), train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()])
    else:
        import torch
        def collate(rows):
            longest = max(len(r['ids']) for r in rows)
            pad = lambda r, ids, fill: ids + [fill]*(longest - len(r['ids']))
            return dict(input_ids=torch.tensor([pad(r, r['ids'], 0) for r in rows]), attention_mask=torch.tensor([pad(r, [1]*len(r['ids']), 0) for r in rows]),
                        labels=torch.tensor([pad(r, [-100]*r['prompt'] + r['ids'][r['prompt']:], -100) for r in rows]))
        trainer = Trainer(get_peft_model(model_of(shape, device), lora), TrainingArguments(**common, bf16=way == 'trainer_bf16', remove_unused_columns=False), train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    trainer.train()

def clock_of(device:str): # → (seconds by the clock, of processor), called; on a GPU both are the clock's, once it is done
    import torch
    if device == 'cpu': return lambda: (time.perf_counter(), time.process_time())
    def clock(): torch.cuda.synchronize(); return (time.perf_counter(),)*2
    return clock

def matrix_rate(shape:str, device:str, seconds:float=.5) -> float: # operations a second
    "What this machine reaches on the base's own products, one after the other, bfloat16 on this process's threads"
    import torch
    clock = clock_of(device)
    s, tokens, spent, done = SHAPES[shape], BATCH*LENGTH, 0., 0
    h, f, k = widths(s)
    sizes = [(h, h)]*2 + [(h, k)]*2 + [(h, f)]*2 + [(f, h), (h, s['vocab_size'])]
    pairs = [(torch.randn(tokens, a, dtype=torch.bfloat16, device=device), torch.randn(b, a, dtype=torch.bfloat16, device=device)) for a, b in sizes]
    for x, w in pairs: x @ w.T
    while spent < seconds:
        start = clock()[1]
        for x, w in pairs: x @ w.T
        spent += clock()[1] - start; done += sum(2*tokens*a*b for a, b in sizes)
    return done/spent

def widths(s:dict) -> tuple: # of the stream, the feed-forward, keys and values
    return s['hidden_size'], s['intermediate_size'], s['hidden_size']*s['num_key_value_heads']//s['num_attention_heads']

def needed(shape:str, rows:list) -> float: # floating-point operations
    "What an optimizer step of LoRA needs: forward and the gradient of the input through the base, both and their own gradient for the adapters, causal attention"
    s = SHAPES[shape]; (h, f, k), layers = widths(s), s['num_hidden_layers']
    tokens, scored = (sum(of(r) for r in rows)/len(rows)*BATCH for of in (lambda r: len(r['ids']), lambda r: len(r['ids']) - r['prompt']))
    late, early = h*h + 3*h*f, h*h + 2*h*k # weights after attention, before it
    adapters = lambda n: RANK*sum(a + b for a, b in n)
    layer = lambda kept: 4*(early*tokens + late*kept) + 6*(adapters([(h, h), (h, k), (h, k)])*tokens + adapters([(h, h), (h, f), (h, f), (f, h)])*kept)
    attention = 6*h*layers*BATCH*sum(len(r['ids'])**2 for r in rows)/len(rows)
    return layer(tokens)*(layers - 1) + layer(scored) + 4*h*s['vocab_size']*scored + attention

def where_it_goes(step, device:str) -> dict: # kind of operation → share of the step's processor time, or of its time on a GPU
    "One step by torch.profiler; what no operation took is Python's, or waiting for it"
    import torch
    from torch.profiler import ProfilerActivity, profile
    clock, busy = clock_of(device), 'self_cpu_time_total' if device == 'cpu' else 'self_device_time_total'
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == 'cuda' else [])]) as p: start = clock()[1]; step(); spent = clock()[1] - start
    out = {}
    for e in p.key_averages():
        if '::' not in e.key or e.device_type != torch.autograd.DeviceType.CPU: continue # our own functions around operations; a GPU's kernels, which their operation's row holds already
        kind = next((k for k, pattern in OPERATIONS.items() if re.search(pattern, e.key)), 'elementwise and norms')
        out[kind] = out.get(kind, 0.) + getattr(e, busy)/1e6
    total = max(spent, sum(out.values()))
    return {k: v/total for k, v in sorted(out.items(), key=lambda x: -x[1])} | {'outside operations': 1 - sum(out.values())/total}

def worker(way:str, shape:str, file:str, device:str):
    "Reads how many steps to take, or what else to measure, a line each; answers with one line of JSON"
    import logging, warnings
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch
    torch.set_num_threads(1)
    rows, clock = json.loads(Path(file).read_text()), clock_of(device)
    import peft, transformers.models.llama.modeling_llama
    if way == 'trl': import trl
    elif way.startswith('trainer'): from transformers import Trainer
    else: import lora_study.train
    held, going = peak_bytes(device), None if way.startswith('tr') else ours(way, shape, rows, device)
    if going: next(going)
    if device == 'cuda': torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats() # building a model took more than a step does
    for line in sys.stdin:
        times, start = [], None
        if not line.strip().isdigit():
            said = matrix_rate(shape, device) if line.strip() == 'rate' else where_it_goes(lambda: next(going), device)
            answers.write(json.dumps(said) + '\n'); answers.flush()
            continue
        def note(begins):
            nonlocal start
            if begins: start = clock()
            else: times.append([b - a for a, b in zip(start, clock())])
        if going:
            for _ in range(int(line)): note(True); next(going); note(False)
        else: theirs(way, shape, rows, int(line), note, device)
        answers.write(json.dumps(dict(times=times, extra_bytes=peak_bytes(device) - held)) + '\n'); answers.flush()

# --- the one that calls them

def rows_of(kind:str, vocab:int, dataset:str|None, n:int=64) -> list:
    "Token ids and prompt lengths of `n` rows"
    g = random.Random(0)
    if kind == 'full': sizes = [(LENGTH, LENGTH//3)]*n
    elif dataset:
        from lora_study.config import Run
        from lora_study.data import encode, load_splits
        from lora_study.model import load_tokenizer
        run = Run(dataset_name=dataset, train_size=n)
        sizes = [(len(e.ids), e.prompt_len) for e in encode(load_splits(run).train, load_tokenizer(run), LENGTH)[0]]
    else: sizes = [(l, l//3) for l in (min(LENGTH, max(16, int(g.lognormvariate(4.7, .55)))) for _ in range(n))]
    return [dict(ids=[g.randrange(2, vocab) for _ in range(l)], prompt=p) for l, p in sizes]

def fetch_trl():
    if not (TRL/'trl').is_dir(): subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', TRL, 'trl'], check=True)

def measure(shape:str, kind:str, ways:list, rounds:int, steps:int, dataset:str|None, device:str) -> dict|None: # None: ours could not run
    "One shape and kind of rows, all ways in turn"
    with tempfile.TemporaryDirectory() as d:
        rows = rows_of(kind, SHAPES[shape]['vocab_size'], dataset)
        file = Path(d)/'rows.json'; file.write_text(json.dumps(rows))
        env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), str(TRL), os.environ.get('PYTHONPATH', '')]))
        workers = {w: subprocess.Popen([sys.executable, __file__, '--worker', w, shape, file, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(Path(d)/f'{w}.txt').open('w'), text=True, env=env) for w in ways}
        times, extra = {w: [] for w in ways}, {}
        try:
            for k in range(rounds + 1): # the first round warms up
                for w in ways[k % len(ways):] + ways[:k % len(ways)]:
                    p = workers.get(w)
                    if p is None: continue
                    try: p.stdin.write(f'{steps + 1}\n'); p.stdin.flush(); said = json.loads(p.stdout.readline())
                    except (ValueError, OSError): print(f'  {w}: could not run:', (Path(d)/f'{w}.txt').read_text().strip()[-600:], file=sys.stderr); workers.pop(w); continue
                    if k: times[w] += said['times'][1:]; extra[w] = max(extra.get(w, 0), said['extra_bytes'])
            if 'fast_bf16' not in workers: return None
            ask = lambda w, line: (workers[w].stdin.write(line + '\n'), workers[w].stdin.flush(), json.loads(workers[w].stdout.readline()))[-1]
            rate, goes = ask('fast_bf16', 'rate'), {w: ask(w, 'profile') for w in ways if w in workers and not w.startswith('tr')}
        finally:
            for p in workers.values(): p.kill()
        tokens = sum(len(r['ids']) for r in rows)/len(rows)*BATCH
        out = {w: dict(step_s=median(t[0] for t in ts), cpu_s=median(t[1] for t in ts), tok_s=tokens/median(t[0] for t in ts), tok_cpu_s=tokens/median(t[1] for t in ts), extra_mib=extra[w]/2**20) for w, ts in times.items() if ts}
        return dict(shape=shape, rows=kind, tokens_a_step=tokens, rounds=rounds, steps=steps, ways=out, operations=needed(shape, rows), matrix_rate=rate, rate_reached=needed(shape, rows)/out['fast_bf16']['cpu_s']/rate, profile=goes,
                    ratios={w: dict(wall=o['step_s']/out['fast_bf16']['step_s'], cpu=o['cpu_s']/out['fast_bf16']['cpu_s']) for w, o in out.items()})

def main():
    if sys.argv[1:2] == ['--worker']: return worker(*sys.argv[2:6])
    ask = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    ask.add_argument('--shapes', nargs='+', choices=SHAPES, help='others than S5, S17 and S60, or S60 and L1B on a GPU'); ask.add_argument('--only', choices=ON, help='one of the two; both otherwise, where there is a GPU'); ask.add_argument('--rows', nargs='+', choices=('full', 'uneven'), default=['full', 'uneven'])
    ask.add_argument('--ways', nargs='+', choices=WAYS, default=[w for w in WAYS if w != 'trl']); ask.add_argument('--dataset'); ask.add_argument('--trl', action='store_true')
    ask.add_argument('--rounds', type=int, default=5); ask.add_argument('--steps', type=int, default=4); ask.add_argument('--quick', action='store_true', help='S5, full rows, one round of one step, two ways')
    a = ask.parse_args()
    if a.quick: a.shapes, a.rows, a.rounds, a.steps, a.ways = ['S5'], ['full'], 1, 1, ['fast_bf16', 'full_bf16']
    there = conditions()
    devices = [d for d in ON if a.only in (None, d) and (d == 'cpu' or 'gpu' in there)]
    if not devices: raise SystemExit('no GPU is here to be measured')
    if a.trl: fetch_trl()
    ways, file = list(dict.fromkeys(['fast_bf16', *a.ways, *(['trl'] if a.trl else [])])), Path(__file__).with_suffix('.json')
    of = lambda r: (r['shape'], r['rows'], r.get('gpu') or r.get('cpu'))
    for device, shape, kind in [(d, s, k) for d in devices for s in a.shapes or ON[d] for k in a.rows]:
        where = {k: v for k, v in conditions().items() if k != 'gpu' or device == 'cuda'} | (dict(quick=True) if a.quick else {})
        if not (r := measure(shape, kind, ways, a.rounds, a.steps, a.dataset, device)): continue
        print(f"{shape}, {kind} rows, {r['tokens_a_step']:.0f} tokens a step, load {where['load_average']:.1f}; {r['matrix_rate']/1e9:.0f} GFLOP/s in its products alone, {r['rate_reached']:.0%} of it in a step: " + ', '.join(f'{k} {v:.0%}' for k, v in r['profile']['fast_bf16'].items()))
        for w, o in r['ways'].items(): print(f"  {WAYS[w]:45} {1000*o['step_s']:7.0f} ms {1000*o['cpu_s']:7.0f} ms of processor {o['tok_cpu_s']:8.0f} tokens a processor second, {r['ratios'][w]['cpu']:5.2f} times the first, {o['extra_mib']:6.0f} MiB more at the peak", flush=True)
        there = json.loads(file.read_text())['rows'] if file.exists() else []
        rows = [q for q in there if of(q) != of(where | r)] + [where | r]
        written(__file__, dict(rows=sorted(rows, key=lambda q: (of(q)[2], list(SHAPES).index(q['shape']), q['rows'])))) # what was measured is kept if the next cannot be

if __name__ == '__main__': main()
