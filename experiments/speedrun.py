"""The speedrun: how low can the bound of tiny Shakespeare get in three minutes, or 1e13 operations?

    python -m data.shakespeare.prepare && python -m experiments.speedrun
    python -m experiments.speedrun --preset=mine.py --only=flops        checks a claim

The rules of a record:
- Text: tiny Shakespeare by characters, its last tenth held out. That tenth is for this script
  alone; choose on a part of the rest (experiments/recipe.py).
- Score: the NELBO of the whole held-out tenth, nats per character, the mean of three seeds. Any
  network and training loss; but evaluation is the any-order bound of a masked diffusion model,
  from one order or mask a draw (estimator orders, which bounds more tightly, is another number).
- clock: three minutes of training on two cores and no more, compilation into an empty cache
  counted. It compares what ran on one machine.
- flops: 1e13 operations as train.py's log counts them. It compares machines.
- A record is below the one that stands by more than the seeds explain: with all of the 95%
  interval of the claim's mean.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import config as settings
import evaluate
import train
from config import choose
from data import loader
from experiments import results, runs
from lib import program
from lib.stats import mean_half
from run import budget, checkpoint

DEFAULTS = {
    "preset": "configs/shakespeare.py",  # the recipe whose claim is checked
    "data": "data/shakespeare",  # a prepared folder
    "only": "",  # clock or flops; empty: both
    "minutes": 3.0,  # of training, for clock
    "flops": 1e13,  # operations of training, for flops
    "seeds": 3,  # 1337, 1338, ...; 1 or more
}
RECORDS = [  # nats per character by the clock and after 1e13 operations, and what changed
    {"clock": 1.944, "commit": "a4539dd", "change": "6 layers of 128, Muon, ReLU squared"},
    {
        "clock": 1.872,
        "commit": "69ba69b",
        "change": "6 layers of 96, GELU; compiled block by block; Muon on stacked matrices",
    },
    {
        "clock": 1.840,
        "flops": 1.966,
        "commit": "4b964ca",
        "change": "4 layers of 96; a convolution of the embeddings; masking rates of a bell",
    },
]


def recipe(config, form, seed, folder):
    """The command line of one run of train.py."""
    keys = {"data": config["data"], "seed": seed, "out_dir": folder, "show_sample": False}
    keys |= {key: config[key] for key in ("device", "dtype")}
    line = [config["preset"], *(f"--{key}={value}" for key, value in keys.items())]
    if form == "clock":
        return [*line, f"--max_minutes={config['minutes']}", "--max_iters=0", "--eval_interval=1e9"]
    run_config = settings.parse(line, *train.MODULES)
    steps = int(config["flops"] / step_flops(run_config))
    settings.require(steps, f"a step takes more than {config['flops']:g} operations")
    last = ["--max_minutes=0", f"--max_iters={steps}", f"--eval_interval={steps}"]
    return [*line, *last, f"--warmup_iters={max(1, min(run_config['warmup_iters'], steps // 50))}"]


def step_flops(run_config):
    """Operations of a training step, as the log counts them; UserError without a shape."""
    shaped = run_config["depth"] or (run_config["n_layer"] and run_config["n_embd"])
    settings.require(shaped, "the preset must have a depth, or n_layer and n_embd")
    V = loader.read_meta(run_config["data"])["vocab_size"]
    return runs.step_flops(budget.filled(run_config) | {"vocab_size": V})


def run(config, form, seed):
    """One row of the table: a run in a process of its own, with an empty cache, then its bound."""
    with tempfile.TemporaryDirectory() as folder:
        line = recipe(config, form, seed, f"{folder}/run")
        empty, began = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}, time.time()
        done = subprocess.run(
            [sys.executable, "train.py", *line], env=empty, stderr=subprocess.PIPE, text=True
        )
        failed = f"{form}, seed {seed}: training has failed: {done.stderr.strip()[-500:]}"
        settings.require(done.returncode == 0, failed)
        row = {"budget": form, "seed": str(seed), "seconds": time.time() - began}
        row["steps"] = checkpoint.read(f"{folder}/run")["step"]
        keys = {key: config[key] for key in ("data", "device", "dtype")}
        result = evaluate.main(
            settings.options(keys | {"ckpt": f"{folder}/run"}, *evaluate.MODULES)
        )
    return row | {key: result[key] for key in ("nats_per_token", "draw_half", "perplexity")}


def verdict(nats, best):
    """Whether the interval of the mean of three or more seeds is below `best`."""
    if len(nats) < 3:
        return "three seeds are needed for a record"
    mean, half = mean_half(nats)
    below = mean + half < best
    return f"+- {half:.4f}, {'a record:' if below else 'no record: not'} below {best:.3f}"


def main(config):
    """Run both forms for all seeds; print and write the records, the runs and the verdict."""
    choose("only", config["only"], ["", "clock", "flops"])
    began, rows, figures, lines = time.time(), [], {}, []
    for form in [config["only"]] if config["only"] else ["flops", "clock"]:
        of_form = [run(config, form, 1337 + i) for i in range(config["seeds"])]
        nats, rows = [row["nats_per_token"] for row in of_form], rows + of_form
        figures |= {f"{form}, seed {row['seed']}": row["nats_per_token"] for row in of_form}
        best = min((each[form] for each in RECORDS if form in each), default=math.inf)
        lines.append(f"{form}: {statistics.mean(nats):.4f} nats, {verdict(nats, best)}")
    formats = {"nats_per_token": "{:.4f}", "draw_half": "{:.4f}", "perplexity": "{:.3f}"}
    keys = ("clock", "flops", "commit", "change")
    spelled = [{key: str(record.get(key, "")) for key in keys} for record in RECORDS]
    text = results.table("Records, nats per character", spelled)
    text += "\n" + results.table(f"The claim of {config['preset']}", rows, formats)
    text += "\n" + "\n\n".join(lines) + "\n"
    figures |= results.about(torch.device("cpu")) | {"seconds_in_all": time.time() - began}
    results.write(config, "speedrun", figures, text)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
