"""How good does a model get in three minutes? The masked diffusion model and the causal one.

    python -m data.shakespeare.prepare && python -m experiments.budget

Needs a machine that does nothing else. The clock runs from the start of `python train.py` to its
end, with imports, compilation (into an empty cache) and the last save. How many steps fit must be
known first, because the learning rate must know its end: by a rehearsal for the first run of each
model, by the run before for each other. Then the whole held-out part is evaluated: the bound for
the masked diffusion model, the exact value for the causal one.
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
import diffusion
import evaluate
from experiments import results

DEFAULTS = {
    "preset": "configs/pydocs_2400.py",  # the recipe of both
    "data": "data/shakespeare",  # a prepared folder
    "minutes": 3.0,  # of wall time for one run
    "seeds": 3,  # runs of each model: seed, seed + 1, ...
    "rehearsal": 250,  # steps of the run that measures the speed first
}

MODELS = {"masked diffusion": "any_order", "causal": "ar"}
SPARE = 0.93  # the part of the time that is planned for: speed varies by percents between runs
SHOWN = ["nats_per_token", "draw_half", "standard_error"]


def train(config, objective, steps, seed, folder):
    """Train in a process of its own. -> (seconds in all, seconds of a step once compiled)"""
    keys = {"data": config["data"], "device": config["device"], "dtype": config["dtype"]}
    keys |= {"out_dir": f"{folder}/run", "objective": objective, "seed": seed}
    keys |= {"max_iters": steps, "eval_interval": steps, "warmup_iters": max(1, steps // 50)}
    keys |= {"eval_sequences": 8, "show_sample": False}
    words = [config["preset"], *(f"--{key}={value}" for key, value in keys.items())]
    began = time.time()
    empty = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
    command = [sys.executable, "train.py", *words]
    done = subprocess.run(command, env=empty, capture_output=True, text=True)
    seconds = time.time() - began
    failed = f"{objective}: training has failed: {done.stderr.strip()[-500:]}"
    settings.require(done.returncode == 0, failed)
    entries = results.kept(Path(folder, "run/log.jsonl"))
    steady = [entry for entry in entries if "tokens_per_second" in entry]
    tokens = steady[0]["tokens"] / steady[0]["step"]
    late = [entry["tokens_per_second"] for entry in steady[len(steady) // 2 :]]
    return seconds, tokens / statistics.median(late)


def evaluated(config, folder):
    """The result of evaluate.py on all held-out text."""
    given = {key: config[key] for key in ("data", "device", "dtype")} | {"ckpt": f"{folder}/run"}
    return evaluate.main(settings.options(given, settings, diffusion, evaluate))


def race(config, name, objective):
    """Train and evaluate one model `seeds` times: a line of the table for each run."""
    steps, lines = config["rehearsal"], []
    with tempfile.TemporaryDirectory() as folder:
        seconds, step = train(config, objective, steps, config["seed"], folder)
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        steps += int((SPARE * 60 * config["minutes"] - seconds) / step)
        minutes = f"minutes must be more than {config['minutes']:g}"
        settings.require(steps > 0, f"{minutes}, in which {name} takes no step")
        with tempfile.TemporaryDirectory() as folder:
            seconds, step = train(config, objective, steps, seed, folder)
            result = evaluated(config, folder)
        line = {"model": name, "seed": str(seed), "steps": steps, "seconds": seconds}
        lines.append(line | {key: result[key] for key in SHOWN})
        print(lines[-1], flush=True)
    return lines


def main(config):
    """Print, write and return nats per token, steps and seconds of both models."""
    settings.at_least(1, config, "seeds", "rehearsal")
    settings.require(config["minutes"] > 0, f"minutes must be more than 0, not {config['minutes']}")
    began, rows, figures = time.time(), [], {}
    for name, objective in MODELS.items():
        lines = race(config, name, objective)
        nats = [line["nats_per_token"] for line in lines]
        mean = {"steps": statistics.mean(line["steps"] for line in lines)}
        mean |= {"seconds": max(line["seconds"] for line in lines)}
        mean |= {"nats_per_token": statistics.mean(nats)}
        figures |= {f"{objective}_{key}": value for key, value in mean.items()}
        figures[f"{objective}_spread"] = max(nats) - min(nats)
        rows += [*lines, dict.fromkeys(lines[0], "") | {"model": name, "seed": "mean"} | mean]
    formats = dict.fromkeys(SHOWN, "{:.4f}") | {"seconds": "{:.1f}"}
    title = f"Nats per token of {config['data']} after {config['minutes']:g} minutes"
    text = results.table(f"{title} (seconds: the mean's is the longest)", rows, formats)
    figures |= {"seconds_in_all": time.time() - began} | results.about(torch.device("cpu"))
    results.write(config, "budget", figures, text)
    print(text)
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
