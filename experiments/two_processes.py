"""What do two processes lose? One process with two threads beside two processes with one each.

    python -m experiments.two_processes            needs two cores and nothing else running

All train the same run, with the same global batch, in turns, round after round. Tokens per second
are the medians of the lines in log.jsonl, without the first quarter, in which programs are
compiled; a ratio is between neighbours in the same round.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import config as settings
from experiments import results
from lib import program

DEFAULTS = {
    "preset": "configs/pydocs_2400.py",  # what is trained
    "data": "data/pydocs",  # a prepared folder
    "keys": "",  # further keys of train.py, as "--n_layer=2 --compile=False"
    "iters": 120,  # steps of each run; 1 or more
    "rounds": 3,  # how often each way is measured; 1 or more
}

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WAYS = {  # name: (threads of a process, what comes before train.py, key)
    "one process": (2, [], "--parallel=ddp"),
    "ddp": (1, TWO, "--parallel=ddp"),
    "fsdp": (1, TWO, "--parallel=fsdp"),
}


def measure(config, name):
    """Tokens per second of one run."""
    threads, launcher, key = WAYS[name]
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, *launcher, "train.py", config["preset"], key]
        line += [f"--data={config['data']}", f"--out_dir={folder}", f"--seed={config['seed']}"]
        line += [f"--max_iters={config['iters']}", f"--eval_interval={config['iters']}"]
        line += ["--log_interval=5", "--eval_sequences=2", "--show_sample=False"]
        line += config["keys"].split()
        keys = {"env": os.environ | {"OMP_NUM_THREADS": str(threads)}}
        done = subprocess.run(line, capture_output=True, text=True, check=False, **keys)
        settings.require(done.returncode == 0, f"{name} has failed: {done.stderr.strip()[-500:]}")
        entries = results.kept(Path(folder, "log.jsonl"))
        speeds = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry]
    return statistics.median(speeds[len(speeds) // 4 :])


def main(config):
    """Print, write and return the speeds and their ratios to one process."""
    began, speeds = time.time(), {name: [] for name in WAYS}
    for number in range(config["rounds"]):
        for name in WAYS:
            speeds[name].append(measure(config, name))
            print(f"round {number + 1}: {name}: {speeds[name][-1]:,.0f} tokens/s", flush=True)
    rows, figures, alone = [], {}, next(iter(speeds.values()))
    for name, measured in speeds.items():
        ratios = [speed / base for speed, base in zip(measured, alone, strict=True)]
        row = {"tokens_per_second": statistics.median(measured), "ratio": statistics.median(ratios)}
        row |= {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
        rows.append({"way": name} | row)
        figures |= {f"{name.replace(' ', '_')}_{key}": value for key, value in row.items()}
    formats = dict.fromkeys(("ratio", "lowest_ratio", "highest_ratio"), "{:.2f}")
    title = f"{config['preset']}, {config['iters']} steps, {config['rounds']} rounds"
    text = results.table(title, rows, formats)
    figures |= {"rounds": config["rounds"], "seconds": time.time() - began}
    figures |= results.about(torch.device("cpu"))
    results.write(config, "two_processes", figures, text)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
