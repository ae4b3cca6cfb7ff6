"Every fault of the list is shown to be survived by a test, or says why none can show it. Read from the tests' text: nothing is run."
import ast
import yaml
from conftest import ROOT

FAULTS = yaml.safe_load((ROOT/'tests/faults.yaml').read_text())

def numbers(decorator) -> list: # of a pytest.mark.fault(…), wherever it stands
    return [a.value for n in ast.walk(decorator) if isinstance(n, ast.Call) and ast.unparse(n.func) == 'pytest.mark.fault' for a in n.args if isinstance(a, ast.Constant)]

def shown() -> dict: # number → names of tests
    out = {}
    for path in sorted((ROOT/'tests').glob('test_*.py')):
        tree = ast.parse(path.read_text())
        tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')]
        for t in tests:
            for n in (n for d in t.decorator_list for n in numbers(d)): out.setdefault(n, []).append(f'{path.name}::{t.name}')
        for call in (n for s in tree.body if isinstance(s, (ast.Assign, ast.Expr)) for n in ast.walk(s) if isinstance(n, ast.Call) and ast.unparse(n.func) == 'case'): # cases of a table: case(name, number, …)
            out.setdefault(call.args[1].value, []).append(f'{path.name}::{call.args[0].value}')
    return out

def test_the_list_is_whole():
    assert list(FAULTS) == list(range(1, 73))
    for n, f in FAULTS.items(): assert {'fault', 'then'} <= set(f) <= {'fault', 'then', 'without'} and all(f.values()), n

def test_marks_name_faults_of_the_list():
    assert set(shown()) <= set(FAULTS)

def test_every_fault_is_shown_or_says_why_not():
    have = shown()
    assert [n for n, f in FAULTS.items() if n not in have and 'without' not in f] == []
