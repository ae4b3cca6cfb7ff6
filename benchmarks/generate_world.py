"""How fast the embedded world writes its rows, against reading the same rows from a JSONL file with `datasets`.

    python benchmarks/generate_world.py            # prints a table, writes benchmarks/generate_world.json

Three ways to the same list of dicts, interleaved, medians of the rounds; the file of `datasets` is new in every round, so its cache does not answer.
"""
import json, statistics, tempfile, time
from pathlib import Path
from conditions import conditions, written
from lora_study import world

ROUNDS, ROWS = 5, 20_000

def generated(split:str) -> list: return world.instruction_examples(split, ROWS if split == 'train' else ROWS//5)

def with_datasets(path:Path, cache:Path) -> list:
    from datasets import load_dataset
    return load_dataset('json', data_files=str(path), split='train', cache_dir=str(cache)).to_list()

def with_json(path:Path) -> list: return [json.loads(line) for line in path.open()]

def timed(call, *args) -> tuple: # rows a second, the rows
    start = time.perf_counter()
    rows = call(*args)
    return len(rows)/(time.perf_counter() - start), rows

def main():
    from datasets.utils.logging import disable_progress_bar
    disable_progress_bar()
    speeds, found = {}, conditions()
    for k in range(ROUNDS):
        with tempfile.TemporaryDirectory() as d:
            speed, rows = timed(generated, 'train')
            speeds.setdefault('world, train split', []).append(speed)
            speeds.setdefault('world, test split', []).append(timed(generated, 'test')[0])
            path = Path(d)/f'{k}.jsonl'
            path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
            for name, call in (('datasets, json', lambda: with_datasets(path, Path(d)/'cache')), ('json.loads', lambda: with_json(path))):
                speed, got = timed(call)
                assert got == rows
                speeds.setdefault(name, []).append(speed)
    medians = {name: statistics.median(s) for name, s in speeds.items()}
    rival = medians['datasets, json']
    table = [dict(way=name, rows_per_second=round(m), ratio_to_datasets=round(m/rival, 2)) for name, m in medians.items()]
    for row in table: print(f"{row['way']:20} {row['rows_per_second']:>10,} rows/s {row['ratio_to_datasets']:>6} ×")
    written(__file__, found | dict(rows=ROWS, rounds=ROUNDS, results=table))

if __name__ == '__main__': main()
