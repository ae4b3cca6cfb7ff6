"The benchmarks' own arithmetic; what they measure is for a quiet machine"
import json, os, subprocess, sys
from pathlib import Path
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))

def test_every_cell_of_the_template_has_a_kind():
    "A cell that no rule knows goes under its heading's own name, and would show here"
    import point_overhead
    from lora_study.sweep import read_template
    found = point_overhead.kinds(read_template().cells)
    assert {k for k, _ in found} == {'setup', 'base', 'probe', 'training', 'evaluation', 'diagnostics', 'figures', 'writing'}
    one = lambda word: {k for k, c in found if word in c.source}
    assert one('train(loop') == {'training'} and one('probe_run(') - {'setup'} == {'probe'} and 'writing' in one('write_whole(') and one('test_rows = evaluate(') == {'evaluation'}

def test_what_a_step_needs():
    "Against a count by hand for one row of 4 tokens, of which 1 is not scored"
    import step_speed
    step_speed.SHAPES['tiny'] = dict(vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    q, gate, down, r = 4*4, 4*6, 6*4, step_speed.RANK
    base = 4*(4*3*q + 3*(q + 2*gate + down)) # forward and the input's gradient, 2 operations a weight and token each; q, k and v of 4 tokens, the rest of 3
    adapters = 6*(4*3*r*8 + 3*r*(8 + 10 + 10 + 10))
    head, attention = 4*3*4*7, 6*4*16
    assert step_speed.needed('tiny', [dict(ids=[0]*4, prompt=1)]) == step_speed.BATCH*(base + adapters + head + attention)

def test_conditions_are_noted_and_numbers_shortened(tmp_path):
    import conditions
    c = conditions.conditions()
    assert {'date', 'cores', 'cpu', 'load_average', 'torch_version', 'python'} <= set(c)
    conditions.written(tmp_path/'x.py', c | dict(rows=[dict(v=1.23456789, w=[2/3])]))
    assert json.loads((tmp_path/'x.json').read_text())['rows'] == [dict(v=1.2346, w=[.66667])]

def test_the_page_names_the_command_of_each_file_that_is_missing(tmp_path):
    "The page of benchmarks runs without any JSON, and says how to make it"
    import nbformat
    cells = [c.source for c in nbformat.read(ROOT/'nbs'/'58_benchmarks.ipynb', 4).cells if c.cell_type == 'code']
    (tmp_path/'nbs').mkdir()
    code = ['\n'.join(l for l in c.split('\n') if not l.startswith(('%', '#|'))) for c in cells]
    k = next(i for i, c in enumerate(code) if c.startswith('def answer('))
    code.insert(k + 1, 'shown, plain = [], answer\ndef answer(*a): m = plain(*a); shown.append(m.data); return m')
    done = subprocess.run([sys.executable, '-c', '\n'.join([*code, 'print("\\n".join(shown))'])], cwd=tmp_path/'nbs', capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ('makespan', 'compiled', 'point_overhead', 'packed', 'evaluation', 'report_time', 'sweep_load', 'generate_world'): assert f'`python benchmarks/{name}.py' in done.stdout, name
