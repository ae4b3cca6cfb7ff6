"""How much faster K runs train together on one frozen base than one after the other.

    python benchmarks/packed.py [--rounds 3] [--quick] [--only gpu --gpu NAME …]     # prints a table, writes benchmarks/packed.json

The rival is our own fast engine, one run after the other, on the same base and rows; `lora_study.packed.gain` lets the two take turns in each round, after one of warm-up, and medians are compared. Memory is the peak of a
step above what the base takes: of all K runs together, and of one run alone, which is all that the rival holds at a time. On the CPU: S5 of benchmarks/step_speed.py in bfloat16, and the embedded base in float32. Where there is
a GPU, by itself: bases of 1 to 8 B parameters with random weights, built from the configs that ship with the package (no hub), in bfloat16 and in nf4, with rows of 512 tokens; what does not fit is a row that says so.
"""
import argparse, ctypes, gc, json, sys, time
from pathlib import Path
import torch
from conditions import conditions, written
from lora_study.config import Run
from lora_study.data import Example
from lora_study.model import load_base, weight_bytes
from lora_study.packed import gain, pack_runs, packed_step
from lora_study.profiler import read_peak, reset_peak
from lora_study.shapes import preset, presets
from lora_study.sweep import NO_MEMORY

TOGETHER, RANK = (2, 4, 8), 16
CPU = {'S5, bfloat16': dict(batches=(1, 2, 8), length=256), 'embedded, float32': dict(batches=(1, 2, 8), length=128)}
GPU, GPU_BATCHES, GPU_LENGTH = ('Llama-3.2-1B', 'Llama-3.2-3B', 'Llama-3.1-8B'), (1, 2, 4), 512

def random_base(name:str, device:torch.device, dtype=torch.bfloat16, four_bits:bool=False) -> torch.nn.Module:
    "A base of a known shape, drawn on the device; frozen"
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    known = {k: v for k, v in presets()[preset(name)].items() if k != 'parameters'}
    config = AutoConfig.for_model(known.pop('model_type'), **known, pad_token_id=0)
    torch.manual_seed(0)
    with device: model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if four_bits:
        import bitsandbytes as bnb
        for name, m in list(model.named_modules()):
            if not isinstance(m, torch.nn.Linear) or m is model.get_output_embeddings(): continue
            small = bnb.nn.Linear4bit(m.in_features, m.out_features, m.bias is not None, compute_dtype=dtype, quant_type='nf4', device='meta')
            small.weight = bnb.nn.Params4bit(m.weight.data, requires_grad=False, quant_type='nf4', compress_statistics=False, module=small).to(device)
            if m.bias is not None: small.bias = m.bias
            model.set_submodule(name, small)
        model.is_loaded_in_4bit, model.config.quantization_config = True, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=dtype)
    gc.collect()
    return model.requires_grad_(False).eval()

def cpu_base(name:str):
    if name.startswith('embedded'): return load_base(Run(dtype='float32'), torch.device('cpu'))
    from step_speed import model_of
    return model_of('S5').requires_grad_(False).to(torch.bfloat16).eval()

def runs_of(k:int, batch:int, length:int, **more) -> list:
    return [Run(lora_r=RANK, seed=s, per_device_train_batch_size=batch, max_length=length, max_steps=1000, engine='fast', **more) for s in range(k)]

def held(device:torch.device) -> int: # bytes
    if device.type == 'cuda': return torch.cuda.memory_allocated(device)
    return 1024*int(Path('/proc/self/status').read_text().partition('VmRSS:')[2].split()[0])

def emptied():
    "Gives back what Python and the C library keep of freed memory, which would count as held"
    gc.collect()
    if sys.platform == 'linux' and (trim := getattr(ctypes.CDLL(None), 'malloc_trim', None)): trim(0)
    if torch.cuda.is_available(): torch.cuda.empty_cache()

def step_peak(base, runs:list, length:int) -> int: # bytes above what was held before
    "Peak memory of a second step of runs trained together"
    emptied()
    device, g = next(base.parameters()).device, torch.Generator().manual_seed(0)
    before, ids = held(device), lambda: torch.randint(base.config.vocab_size, (length,), generator=g).tolist()
    pack = pack_runs(runs, base, [[Example('', '', '', ids(), length//4, 1, i) for i in range(r.per_device_train_batch_size)] for r in runs], 0)
    packed_step(pack); kind = reset_peak(device); packed_step(pack)
    return max(v for k, v in read_peak(device, kind).items() if 'reserved' not in k) - before

def cell(base, k:int, batch:int, length:int, rounds:int, **more) -> dict:
    runs, found = runs_of(k, batch, length, **more), {}
    try:
        for name, some in (('alone_bytes', runs[:1]), ('together_bytes', runs)): found[name] = step_peak(base, some, length)
        found |= gain(base, runs, length, rounds)
        found['together_tok_s'] = k*batch*length/found['together_s']
    except RuntimeError as e:
        if not NO_MEMORY.search(str(e)): raise
        found['out_of_memory'] = True
    emptied()
    return found

def measured(name:str, stored:str, base, batches, length:int, together, rounds:int, **more) -> list:
    rows, start = [], time.perf_counter()
    step_peak(base, runs_of(1, batches[0], length, **more), length) # what libraries take once is not a step's
    for batch in batches:
        for k in together:
            rows.append(dict(base=name, dtype=stored, device=next(base.parameters()).device.type, base_bytes=weight_bytes(base), batch=batch, together=k, length=length, rounds=rounds) | cell(base, k, batch, length, rounds, **more)); r = rows[-1]
            print(f'{name:14} {stored:9} batch {batch}, {k} together: ' + ('out of memory' if 'out_of_memory' in r else f"{1000*r['together_s']:8.1f} ms for all, {1000*r['apart_s']:8.1f} one after the other: {r['gain']:.2f} times; "
                  f"{r['together_bytes']/2**20:,.0f} MiB above the base, one alone {r['alone_bytes']/2**20:,.0f}; {time.perf_counter() - start:.0f} s so far"), flush=True)
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rounds', type=int, default=3); p.add_argument('--gpu', nargs='*', default=list(GPU), help='bases to measure on a GPU, by the names of `lora_study.shapes.presets`'); p.add_argument('--quick', action='store_true', help='one round, two runs together, batch 1, short rows')
    p.add_argument('--only', choices=('cpu', 'gpu'), help='leave the other part, and what the JSON holds of it, as it is')
    a = p.parse_args()
    rounds, together = (1, TOGETHER[:1]) if a.quick else (a.rounds, TOGETHER)
    torch.set_num_threads(1)
    file, parts = Path(__file__).with_suffix('.json'), {}
    if a.only and file.exists(): parts = {k: v for k, v in json.loads(file.read_text()).items() if k in ('cpu', 'gpu')}
    if a.only != 'gpu':
        found = conditions()
        rows = [r for name, s in CPU.items() for r in measured(*name.split(', '), cpu_base(name), s['batches'][:1] if a.quick else s['batches'], 32 if a.quick else s['length'], together, rounds, dtype=name.split(', ')[1])]
        parts['cpu'] = found | dict(quick=a.quick, rows=rows)
    if a.only == 'cpu': pass
    elif not torch.cuda.is_available(): print('no GPU here: the bases of 1 to 8 B parameters are left out')
    else:
        found, device = conditions(), torch.device('cuda')
        rows = [r for r in parts.get('gpu', {}).get('rows', []) if r['base'] not in a.gpu]
        for name in a.gpu:
            for four_bits in (False, True):
                base = random_base(name, device, four_bits=four_bits)
                rows += measured(name, 'nf4' if four_bits else 'bfloat16', base, GPU_BATCHES[:1] if a.quick else GPU_BATCHES, GPU_LENGTH, together, rounds, dtype='bfloat16', load_in_4bit=four_bits)
                del base; gc.collect(); torch.cuda.empty_cache()
                parts['gpu'] = found | dict(quick=a.quick, rows=rows); written(__file__, parts) # what was measured is kept if the machine goes
    written(__file__, parts)

if __name__ == '__main__': main()
