"""How good does a model get in three minutes? The masked diffusion model and the causal one, on the same clock.

    python -m data.shakespeare.prepare && python -m experiments.budget            needs a machine that does nothing else

The clock runs from the start of `python train.py` to its end, with imports, compilation (into an empty cache) and the last
save. How many steps fit must be known first, because the learning rate must know its end: by a rehearsal for the first run
of each model, by the run before for each other. Then the whole held-out part is judged: the bound for the masked diffusion
model, the exact value for the causal one.
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
import harness
from experiments import results

DEFAULTS = {
    "preset": "configs/pydocs.py",  # the recipe of both
    "data": "data/shakespeare",  # a prepared folder
    "minutes": 3.0,  # of wall time for one run
    "seeds": 3,  # runs of each model: seed, seed + 1, ...
    "rehearsal": 250,  # steps of the run that measures the speed first
}

MODELS = {"masked diffusion": "any_order", "causal": "ar"}
SPARE = 0.93  # the part of the time that is planned for: speed varies by some percent from run to run


def train(config, objective, steps, seed, folder):
    """Trains in a process of its own. -> (seconds in all, seconds of a step once compiled)"""
    line = [sys.executable, "train.py", config["preset"], f"--data={config['data']}", f"--out_dir={folder}/run"]
    line += [f"--objective={objective}", f"--seed={seed}", f"--max_iters={steps}", f"--eval_interval={steps}"]
    line += [f"--warmup_iters={max(1, steps // 50)}", "--eval_sequences=8", "--show_sample=False"]
    line += [f"--{key}={config[key]}" for key in ("device", "dtype")]
    began = time.time()
    empty = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
    done = subprocess.run(line, env=empty, capture_output=True, text=True)
    seconds = time.time() - began
    settings.require(done.returncode == 0, f"{objective}: training has failed: {done.stderr.strip()[-500:]}")
    steady = [entry for entry in results.kept(Path(folder, "run/log.jsonl")) if "tokens_per_second" in entry]
    tokens = steady[0]["tokens"] / steady[0]["step"]
    return seconds, tokens / statistics.median(entry["tokens_per_second"] for entry in steady[len(steady) // 2 :])


def judge(config, folder):
    """The result of evaluate.py on all held-out text."""
    given = [f"--ckpt={folder}/run", *(f"--{key}={config[key]}" for key in ("data", "device", "dtype"))]
    return evaluate.main(settings.parse(given, settings, diffusion, harness, evaluate))


def main(config):
    """Prints, writes and returns nats per token, steps and seconds of both models."""
    settings.at_least(1, config, "seeds", "rehearsal")
    settings.require(config["minutes"] > 0, f"minutes must be more than 0, not {config['minutes']}")
    began, lines, figures = time.time(), [], {}
    for name, objective in MODELS.items():
        steps = config["rehearsal"]
        with tempfile.TemporaryDirectory() as folder:
            seconds, step = train(config, objective, steps, config["seed"], folder)
        found = []
        for seed in range(config["seed"], config["seed"] + config["seeds"]):
            steps += int((SPARE * 60 * config["minutes"] - seconds) / step)
            settings.require(steps > 0, f"minutes must be more than {config['minutes']:g}, in which {name} takes no step")
            with tempfile.TemporaryDirectory() as folder:
                seconds, step = train(config, objective, steps, seed, folder)
                result = judge(config, folder)
            line = {"model": name, "seed": str(seed), "steps": steps, "seconds": seconds}
            lines.append(line | {key: result[key] for key in ("nats_per_token", "draw_half", "standard_error")})
            found.append(lines[-1])
            print(lines[-1], flush=True)
        nats = [line["nats_per_token"] for line in found]
        mean = {"steps": statistics.mean(line["steps"] for line in found)}
        mean |= {"seconds": max(line["seconds"] for line in found), "nats_per_token": statistics.mean(nats)}
        figures |= {f"{objective}_{key}": value for key, value in mean.items()}
        figures[f"{objective}_spread"] = max(nats) - min(nats)
        lines.append({"model": name, "seed": "mean"} | mean | {"draw_half": "", "standard_error": ""})
    formats = {"nats_per_token": "{:.4f}", "draw_half": "{:.4f}", "standard_error": "{:.4f}", "seconds": "{:.1f}"}
    title = f"Nats per token of {config['data']} after {config['minutes']:g} minutes (seconds: the mean's is the longest)"
    text = results.table(title, [{key: line[key] for key in lines[0]} for line in lines], formats)
    print(text)
    figures |= {"seconds_in_all": time.time() - began} | results.about(torch.device("cpu"))
    results.write(config, "budget", figures, text)
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
