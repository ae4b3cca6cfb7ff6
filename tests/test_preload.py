"What a parent makes ready, and what the first point measures for all, changes no number."
import json, os
from pathlib import Path
import pytest
from conftest import cli
from lora_study import tracker

STUDY = 'train_size: 64\nvalidation_size: 8\ntest_size: 8\ngenerate_size: 2\nmax_new_tokens: 4\nmax_steps: 3\neval_steps: 3\nlora_dropout: .1\nforgetting_dataset_name: embedded\nforgetting_size: 8\naxes:\n  lora_r: [2, 4]\nseeds: [0]\n'

def measured(folder, monkeypatch, warm): # run id → what no clock and no memory decides; each run's provenance
    folder.mkdir(); monkeypatch.chdir(folder); monkeypatch.setenv('LORA_STUDY_WARM', warm)
    Path('tiny.yaml').write_text(STUDY)
    done = cli('run', 'tiny.yaml')
    assert done.returncode == 0, done.stdout + done.stderr
    records = [tracker.read_record(f) for f in sorted(Path('results/tiny/runs').glob('*/final/record.json'))]
    timed = ('_s', '_bytes', 'tok_s', 'probe_', 'predicted_', 'time_')
    plain = {r.run_id: dict(metrics={k: v for k, v in r.metrics.items() if not k.endswith(timed) and not k.startswith(timed)}, curves=r.curves, scores=r.scores, adapter=r.adapter) for r in records}
    return plain, [r.provenance for r in records]

def test_points_of_a_warm_parent_measure_what_fresh_kernels_measure(tmp_path, monkeypatch):
    fresh, by_fresh = measured(tmp_path/'fresh', monkeypatch, '0')
    warm, by_warm = measured(tmp_path/'warm', monkeypatch, '')
    assert len(fresh) == 2 and json.dumps(warm, sort_keys=True) == json.dumps(fresh, sort_keys=True)
    assert len({p['base_scored_by'] for p in by_warm}) == 1 # the base was scored once
    assert [p['prepared_s'] > 0 for p in by_warm] == [True]*2 and [p['prepared_s'] for p in by_fresh] == [0]*2 # the parent had made it ready, and a fresh kernel had none
    assert len(list((tmp_path/'warm'/'results'/'tiny'/'base').glob('base-*.json'))) == 1
