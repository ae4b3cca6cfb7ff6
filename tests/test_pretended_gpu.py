"""What nobody has a GPU for here: that every tensor is on the device it should be on, and computes what it computes on the processor. See pretended_gpu.py for what that leaves open"""
import json, math, os, subprocess, sys
from pathlib import Path
import pytest, torch
from pretended_gpu import OnGPU, arrived, left

def told(what:str, **given) -> tuple: # of the processor, of the pretended GPU
    env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg')
    p = subprocess.run([sys.executable, Path(__file__).with_name('pretended_gpu.py'), what, json.dumps(given)], capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stderr[-3000:]
    return (said := json.loads(p.stdout.splitlines()[-1]))['cpu'], said['gpu']

def test_what_is_on_it_meets_nothing_else():
    here = torch.ones(2, 3)
    there = arrived(here)
    assert there.device == torch.device('cuda:0') and isinstance(there + 1, OnGPU) and torch.equal(left(there + there), here + here)
    for meet in (lambda: there + here, lambda: there @ here.T, lambda: torch.cat([there, here]), lambda: there.index_select(0, torch.tensor([1]))):
        with pytest.raises(RuntimeError, match='two devices'): meet()

@pytest.mark.parametrize('given, engine', [(dict(engine='fast'), 'flat'), (dict(engine='auto', lora_dropout=1e-9), 'layers'), (dict(engine='peft', packing=True), 'peft'), (dict(use_peft=False), 'peft')], ids=['flat', 'layers', 'packing', 'full'])
def test_a_point_on_it_has_the_numbers_of_one_on_the_processor(given, engine):
    cpu, gpu = told('point', dtype='float32', **given)
    assert (gpu['engine'], gpu['device_name']) == (engine, 'Pretended GPU') and gpu['engine'] == cpu['engine']
    assert gpu['train'] == pytest.approx(cpu['train'], rel=1e-5) and len(gpu['train']) == 4
    for name in ('base_nll', 'test_nll', 'test_exact_match', 'drift_cka'): assert gpu['metrics'][name] == pytest.approx(cpu['metrics'][name], rel=1e-4), name
    assert gpu['metrics']['training_peak_reserved_bytes'] == 2e9 and 'training_peak_reserved_bytes' not in cpu['metrics']

def test_runs_trained_together_on_it_have_the_losses_of_each_alone_on_the_processor():
    apart, together = told('pack', dtype='float32')
    for a, b in zip(apart['losses'], together['losses'], strict=True): assert b == pytest.approx(a, rel=1e-5)

def test_the_checks_pass_on_it():
    cpu, gpu = told('checks')
    assert gpu.keys() == cpu.keys() and len(gpu) > 20 # what had failed would be missing
    assert {name for name, value in gpu.items() if value is None} == {n for n in gpu if '4-bit' in n or 'nf4' in n or 'int8' in n} and None not in cpu.values() # it has no kernels for these

def test_the_benchmarks_have_a_way_through_it():
    _, gpu = told('benchmarks')
    assert gpu['row']['device'] == 'cuda' and gpu['row']['gain'] > 0 and 'out_of_memory' not in gpu['row']
    times, rate = gpu['worker']
    assert len(times['times']) == 2 and all(a == b for a, b in times['times']) and math.isfinite(rate) # both clocks are the one that waits for it
