"""What every benchmark notes beside its numbers: when, on what, how busy."""
import datetime, json, os, platform
from pathlib import Path

def conditions() -> dict:
    "To be asked before the measurement begins: the load average is then that of the others"
    import torch
    from lora_study.profiler import machine
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(date=datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d'), cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(), cpu=machine(torch.device('cpu'))['device_name'],
                **(dict(gpu=gpu) if gpu else {}), load_average=round(os.getloadavg()[0], 2), torch_version=torch.__version__, python=platform.python_version())

def written(
    script,      # the benchmark's `__file__`: its JSON lies beside it
    found:dict,  # conditions and rows
):
    "Writes what was found, floats to five digits"
    def short(v):
        if isinstance(v, dict): return {k: short(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)): return [short(x) for x in v]
        return float(f'{v:.5g}') if isinstance(v, float) else v
    Path(script).with_suffix('.json').write_text(json.dumps(short(found), indent=1) + '\n')
