"Fails when committed files are not what the notebooks give: modules, README, packaged notebook, clean notebooks."
import shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MADE = ('nbs', 'lora_study', 'settings.ini', 'setup.py', 'README.md', 'index.qmd', 'results')

def contents(root): # path → bytes of every file that is made or cleaned
    return {p.relative_to(root): p.read_bytes() for name in ('nbs', 'lora_study', 'README.md', 'index.qmd') for p in ([root/name] if (root/name).is_file() else (root/name).rglob('*'))
            if p.is_file() and '__pycache__' not in p.parts and '.ipynb_checkpoints' not in p.parts}

def main():
    with tempfile.TemporaryDirectory() as d:
        copy, bin = Path(d)/'lora_study', Path(sys.executable).parent
        copy.mkdir()
        for name in MADE:
            if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns('__pycache__', 'runs', '*.db*'))
            elif (ROOT/name).exists(): shutil.copy(ROOT/name, copy/name)
        for command in ([bin/'nbdev_export'], [bin/'nbdev_clean'], [sys.executable, '-m', 'lora_study.pages']):
            subprocess.run([str(c) for c in command], cwd=copy, check=True)
        before, after = contents(ROOT), contents(copy)
        stale = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if stale: sys.exit('not in step with the notebooks: ' + ', '.join(stale) + ': run `make export` and commit')
    print('modules, README, packaged notebook and notebooks are in step')

main()
