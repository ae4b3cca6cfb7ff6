"""A GPU for a machine without one: tensors that say they are on `cuda:0`, compute on the processor, and refuse to meet those that are not

    python tests/pretended_gpu.py point '{"engine": "fast"}'   # or checks, pack, benchmarks; prints what it found, as JSON

What it shows is that nothing is on the wrong device, and that what is computed there is right. It says nothing of a GPU's own kernels, speed or memory, and knows no 4-bit and 8-bit layers, which have kernels of their own.
"""
import json, math, sys, tempfile, types
from contextlib import contextmanager
from pathlib import Path
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

HERE, aten = torch.device('cuda:0'), torch.ops.aten
MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default} # indices may lie on the processor
CUDA = dict(is_available=True, is_initialized=True, device_count=1, current_device=0, get_device_name='Pretended GPU', get_device_capability=(9, 0), is_bf16_supported=True,
            memory_allocated=10**9, max_memory_allocated=10**9, memory_reserved=2*10**9, max_memory_reserved=2*10**9, get_rng_state=torch.zeros(16, dtype=torch.uint8),
            get_device_properties=types.SimpleNamespace(uuid='0', name='Pretended GPU', total_memory=80*2**30, multi_processor_count=1, major=9, minor=0),
            **dict.fromkeys(('synchronize', 'empty_cache', 'reset_peak_memory_stats', 'set_rng_state', 'manual_seed', 'manual_seed_all'))) # what torch.cuda answers

class OnGPU(torch.Tensor):
    "A tensor of the pretended GPU; what it holds is `held`"
    @staticmethod
    def __new__(cls, held):
        t = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device='meta')
        t.held = held
        return t
    device, is_cuda, is_cpu, is_meta = HERE, True, False, False
    @property
    def data(self): return OnGPU(self.held.detach())
    @data.setter
    def data(self, other): self.held = other.held
    def untyped_storage(self): return self.held.untyped_storage()
    def data_ptr(self): return self.held.data_ptr()
    def get_device(self): return 0
    def tolist(self): return self.held.tolist()
    def __reduce_ex__(self, protocol): return self.held.__reduce_ex__(protocol) # what is saved is read to the processor
    def numpy(self, *a, **kw): raise TypeError("can't convert cuda:0 device type tensor to numpy")
    def backward(self): torch.autograd.backward([self])
    def __setitem__(self, at, value): super().__setitem__(at, value if isinstance(value, torch.Tensor) else OnGPU(torch.tensor(value, dtype=self.dtype)))
    def __repr__(self, **kw): return f'OnGPU({self.held})'
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention: return attention(*args, **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs or {})
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, tensors = dict(kwargs or {}), [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        odd = [tuple(t.shape) for t in tensors if not isinstance(t, OnGPU) and t.dim()]
        if odd and func not in MAY_MIX: raise RuntimeError(f'{func}: expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu: {odd}')
        leaves = kwargs.get('device') is not None and torch.device(kwargs['device']).type == 'cpu'
        if 'device' in kwargs: kwargs['device'] = torch.device('cpu')
        args, kwargs = tree_map_only(OnGPU, lambda t: t.held, (args, kwargs))
        known = {id(t.held): t for t in tensors if isinstance(t, OnGPU)} # what is changed in place stays the tensor it was
        return tree_map_only(torch.Tensor, lambda t: t if leaves else known.get(id(t)) if func._schema.is_mutable and id(t) in known else OnGPU(t), func(*args, **kwargs))

class Arriving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return OnGPU(x.detach().clone())
    @staticmethod
    def backward(ctx, g): return g.held

class Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.held.clone()
    @staticmethod
    def backward(ctx, g): return OnGPU(g)

def arrived(t): return t if isinstance(t, OnGPU) else Arriving.apply(t) if t.requires_grad and torch.is_grad_enabled() else OnGPU(t.detach().clone())
def left(t): return t if not isinstance(t, OnGPU) else Leaving.apply(t) if t.requires_grad and torch.is_grad_enabled() else t.held.clone()

def attention(q, k, v, attn_mask=None, **kw): # one operation, as on a GPU; torch would take it apart here, with masks of its own
    assert all(isinstance(t, OnGPU) for t in (q, k, v, attn_mask) if t is not None), 'attention over two devices'
    return arrived(torch.nn.functional.scaled_dot_product_attention(left(q), left(k), left(v), None if attn_mask is None else attn_mask.held, **kw))

class Pretending(TorchFunctionMode):
    "Takes over what names a device: making a tensor there, and moving one"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, '__name__', '')
        kwargs.pop('pin_memory', None)
        if name == 'pin_memory': return args[0]
        if name in ('to', 'cuda', 'cpu') and isinstance(args[0], torch.Tensor): return self.moved(name, *args, **kwargs)
        if kwargs.get('device') is None or torch.device(kwargs['device']).type != 'cuda': return func(*args, **kwargs)
        there = any(isinstance(a, OnGPU) for a in tree_flatten(args)[0])
        made = func(*args, **{k: v for k, v in kwargs.items() if k != 'device'})
        return made if there else arrived(made)
    def moved(self, name, t, *args, device=None, dtype=None, copy=False, **kw):
        like = next((a for a in args if isinstance(a, torch.Tensor)), None)
        if like is not None: device, dtype = like.device, like.dtype
        device = dict(cuda='cuda', cpu='cpu').get(name) or device or next((a for a in args if isinstance(a, (str, int, torch.device)) and not isinstance(a, bool)), None)
        dtype = dtype or next((a for a in args if isinstance(a, torch.dtype)), None)
        kind = None if device is None else 'cuda' if isinstance(device, int) else torch.device(device).type
        out = {'cuda': arrived, 'cpu': left}.get(kind, lambda t: t)(t)
        if kind == 'meta': return torch.Tensor.to(t, device)
        if dtype not in (None, out.dtype): out = torch.Tensor.to(out, dtype)
        return out.clone() if copy and out is t else out

@contextmanager
def pretending():
    "A GPU is there; for a process that does nothing else, as libraries remember what they found"
    import lora_study.drift, lora_study.harness, lora_study.packed, lora_study.plots, lora_study.preload, lora_study.spectra # with all that they import, while none is
    for name, answer in CUDA.items(): setattr(torch.cuda, name, lambda *a, answer=answer, **kw: answer)
    torch.__future__.set_swap_module_params_on_conversion(True) # a parameter that moves stays the one it was, as on a GPU: embeddings and head may share it
    with Pretending(): yield

SMALL = dict(train_size=64, validation_size=20, test_size=20, per_device_train_batch_size=8, max_steps=4, eval_steps=2, generate_size=4, max_new_tokens=6)

def point(device:str, **given) -> dict: # metrics, engine, device_name
    "The cells of the point notebook, here"
    cells, names = json.loads((Path(__file__).parents[1]/'nbs/50_point.ipynb').read_text())['cells'], {}
    with tempfile.TemporaryDirectory() as d:
        for c in cells:
            if c['cell_type'] != 'code': continue
            exec(''.join(c['source']).replace('%matplotlib inline', ''), names)
            if 'parameters' in c['metadata'].get('tags', []): names.update(SMALL | dict(device=device, work_dir=d) | given)
    record = names['record']
    return dict(metrics=record.metrics, train=[h['loss'] for h in record.curves['train']], engine=record.provenance['applied_engine'], device_name=record.provenance['device_name'])

def pack(device:str, together:bool=True, **given) -> dict: # losses of three runs
    "Runs of their own rank and rate, on one base"
    from lora_study.classify import encoded
    from lora_study.config import Run
    from lora_study.data import load_splits
    from lora_study.model import load_base, load_tokenizer
    from lora_study.packed import pack_runs, packed_step
    runs = [Run(**SMALL, lora_r=r, learning_rate=lr, seed=s, engine='fast', **given) for r, lr, s in ((4, 1e-3, 0), (8, 3e-3, 1), (2, 1e-2, 2))]
    tokenizer = load_tokenizer(runs[0]); rows = encoded(runs[0], load_splits(runs[0]).train, tokenizer)[0]
    losses = []
    for some in [runs] if together else [[r] for r in runs]:
        p = pack_runs(some, load_base(runs[0], torch.device(device)), [rows]*len(some), tokenizer.pad_token_id)
        for _ in range(4): packed_step(p)
        losses += [[h['loss'] for h in l.history['train']] for l in p.loops]
    return dict(losses=losses)

def checks(device:str) -> dict: # check → how far off it is, None where it could not be measured
    "All of `lora-study validate`"
    from lora_study.validate import validate
    return {v.name: v.value if math.isfinite(v.value) else None for v in validate('embedded', torch.device(device)) if v.passed or not math.isfinite(v.value)}

def benchmarks(device:str) -> dict: # a row of packed, what a worker of step_speed answers
    "What the benchmarks measure on a GPU, but of small bases"
    import io
    sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
    import packed, step_speed
    tiny = dict(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    step_speed.SHAPES['tiny'], made = tiny, step_speed.model_of
    step_speed.model_of = lambda shape, device='cpu': made(shape).bfloat16().to(device) # there a base is drawn on the device itself
    row, = packed.measured('tiny', 'bfloat16', step_speed.model_of('tiny', device).requires_grad_(False).eval(), (1,), 32, (2,), 1, dtype='bfloat16')
    with tempfile.TemporaryDirectory() as d:
        (file := Path(d)/'rows.json').write_text(json.dumps(step_speed.rows_of('uneven', tiny['vocab_size'], None, 16)))
        sys.stdin, sys.stdout, kept = io.StringIO('2\nrate\n'), io.StringIO(), (sys.stdin, sys.stdout)
        said = sys.stdout
        step_speed.worker('fast_bf16', 'tiny', str(file), device)
        sys.stdin, sys.stdout = kept
    return dict(row=row, worker=[json.loads(line) for line in said.getvalue().splitlines()])

if __name__ == '__main__':
    torch.set_num_threads(1)
    what, given = dict(point=point, checks=checks, pack=pack, benchmarks=benchmarks)[sys.argv[1]], json.loads(sys.argv[2])
    alone = what('cpu', **given | (dict(together=False) if what is pack else {}))
    with pretending(): there = what('cuda', **given)
    print('\n' + json.dumps(dict(cpu=alone, gpu=there)))
