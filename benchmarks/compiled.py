"""Whether torch.compile pays in the fast step: what it saves a step, and what it takes before the first.

    python benchmarks/compiled.py [--shapes S5] [--rounds 5] [--steps 4] [--quick]     # prints a table, writes benchmarks/compiled.json

The elementwise parts of a layer (norms and their gradients, rotation, the gated product and its gradient) through torch.compile with dynamic shapes, as kernels of one pass each; the products stay as they are. Both ways live in processes
of their own, on one thread, and take turns; medians of all steps after the first of a round, on full rows. The first step is timed in processes of its own: with an empty cache, and once more with what that one left in it. Both ways' losses are asserted to agree.
"""
import argparse, json, math, os, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median
from conditions import conditions, written
from step_speed import LENGTH, SHAPES, ours, rows_of

WAYS = ('plain', 'compiled')

def compile_parts():
    "Gives `lora_study.fast` elementwise parts made by torch.compile, until this process ends"
    import torch, torch.nn.functional as F
    from lora_study import fast
    made = lambda f: torch.compile(f, dynamic=True, fullgraph=True)
    @made
    def normed(x, w, eps):
        f = x.to(fast.wide(x.dtype)); inv = (f.square().mean(-1, keepdim=True) + eps).rsqrt()
        return (f*inv).to(x.dtype)*w, inv
    @made
    def unnormed(dn, x, inv, w, into):
        g, f = (dn*w).to(inv.dtype), x.to(inv.dtype)
        return (into.to(inv.dtype) + g*inv - f*((g*f).sum(-1, keepdim=True)*inv.pow(3)/x.shape[-1])).to(x.dtype)
    @made
    def turned(heads, cos, sin):
        one, two = heads.chunk(2, -1)
        return torch.cat([one*cos - two*sin, two*cos + one*sin], -1)
    @made
    def gated(gu):
        g, u = gu.chunk(2, -1)
        return F.silu(g)*u
    @made
    def ungated(dm, gu):
        g, u, d = (t.to(fast.wide(t.dtype)) for t in (*gu.chunk(2, -1), dm)); s = torch.sigmoid(g)
        return torch.cat([d*u*s*(1 + g - g*s), d*g*s], -1).to(gu.dtype)
    class Writing(torch.autograd.Function):
        "`fast.Writing` with the parts above"
        @staticmethod
        def forward(ctx, x, a, block, step, *params):
            o, ho = fast.project(block.o, a, block.pairs['o'], step.spans)
            x = o.add_(x); n, inv = normed(x, block.norms[1], block.eps)
            gu, hgu = fast.project(block.gu, n, block.pairs['gu'], step.spans)
            out, hd = fast.project(block.down, gated(gu), block.pairs['down'], step.spans)
            ctx.block, ctx.step = block, step; ctx.save_for_backward(a, x, inv, n, gu, *ho, *hgu, *hd)
            return out.add_(x)
        @staticmethod
        def backward(ctx, dout):
            (a, x, inv, n, gu, *hs), block, spans = ctx.saved_tensors, ctx.block, ctx.step.spans; k = len(spans)
            dm, down = fast.unproject(block.down, dout, gated(gu), hs[2*k:], block.pairs['down'], spans)
            dn, gate = fast.unproject(block.gu, ungated(dm, gu), n, hs[k:2*k], block.pairs['gu'], spans)
            dx = unnormed(dn, x, inv, block.norms[1], dout)
            da, o = fast.unproject(block.o, dx, a, hs[:k], block.pairs['o'], spans)
            return dx, da, None, None, *o, *gate, *down
    def rotate(heads, cos, sin, back=False): heads.copy_(turned(heads, cos, -sin if back else sin))
    fast.normed, fast.unnormed, fast.rotate, fast.Writing = normed, unnormed, rotate, Writing

def worker(way:str, shape:str, dtype:str):
    "Takes a first step, then as many as each line asks for; answers with seconds and losses"
    import logging, warnings
    warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch, lora_study.train as train
    torch.set_num_threads(1)
    if way == 'compiled': compile_parts()
    losses, plain = [], train.optimizer_step
    def noted(loop, batches): loss, n = plain(loop, batches); losses.append(loss); return loss, n
    train.optimizer_step = noted
    going = ours(f'fast_{dtype}', shape, rows_of('full', SHAPES[shape]['vocab_size'], None))
    def step(): start = time.perf_counter(); next(going); return time.perf_counter() - start
    first = step()
    for line in sys.stdin:
        answers.write(json.dumps(dict(first_s=first, times=[step() for _ in range(int(line))], losses=losses)) + '\n'); answers.flush()

def started(way:str, shape:str, dtype:str, cache:Path):
    env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TORCHINDUCTOR_CACHE_DIR=str(cache), TORCHINDUCTOR_COMPILE_THREADS='1')
    return subprocess.Popen([sys.executable, __file__, '--worker', way, shape, dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
def ask(p, steps:int) -> dict: p.stdin.write(f'{steps}\n'); p.stdin.flush(); return json.loads(p.stdout.readline())

def measure(shape:str, dtype:str, rounds:int, steps:int) -> dict:
    with tempfile.TemporaryDirectory() as d:
        first = {}
        for name in ('cold', 'warm'):
            p = started('compiled', shape, dtype, Path(d)); first[name] = ask(p, 0)['first_s']; p.kill()
        workers, times, losses = {w: started(w, shape, dtype, Path(d)) for w in WAYS}, {w: [] for w in WAYS}, {}
        try:
            for k in range(rounds + 1): # the first round warms up
                for w in WAYS[k % 2:] + WAYS[:k % 2]:
                    said = ask(workers[w], steps + 1); losses[w] = said['losses']
                    if k: times[w] += said['times'][1:]
                    elif w == 'plain': first['plain'] = said['first_s']
        finally:
            for p in workers.values(): p.kill()
    assert all(math.isclose(*pair, rel_tol=.02 if dtype == 'bf16' else 1e-5) for pair in zip(*losses.values())), losses
    plain, compiled = (median(times[w]) for w in WAYS)
    saved = plain - compiled
    return dict(shape=shape, dtype=dtype, rounds=rounds, steps=steps, length=LENGTH, plain_s=plain, compiled_s=compiled, ratio=plain/compiled, first_s=first, pays_after={k: (first[k] - first['plain'])/saved for k in ('cold', 'warm')} if saved > 0 else None)

def main():
    if sys.argv[1:2] == ['--worker']: return worker(*sys.argv[2:])
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--shapes', nargs='+', choices=SHAPES, default=['S5']); p.add_argument('--rounds', type=int, default=5); p.add_argument('--steps', type=int, default=4)
    p.add_argument('--quick', action='store_true', help='one round of one step')
    a = p.parse_args()
    if a.quick: a.rounds, a.steps = 1, 1
    found, rows = conditions(), []
    for shape in a.shapes:
        for dtype in ('bf16', 'fp32'):
            rows.append(measure(shape, dtype, a.rounds, a.steps)); r = rows[-1]
            print(f"{shape} {dtype}: {1000*r['plain_s']:.0f} ms a step, compiled {1000*r['compiled_s']:.0f} ms ({r['ratio']:.2f} times as fast); first step {r['first_s']['plain']:.1f} s, compiled {r['first_s']['cold']:.1f} s, with a warm cache {r['first_s']['warm']:.1f} s", flush=True)
    written(__file__, found | dict(quick=a.quick, rows=rows))

if __name__ == '__main__': main()
