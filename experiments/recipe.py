"""Which recipe reaches the lowest bound for the same arithmetic: one setting changed at a time.

    python -m experiments.recipe --data=FOLDER              what has no result yet, then the table
    python -m experiments.recipe --data=FOLDER --only="A;B"   these variants

FOLDER is prepared data whose held-out part may be looked at: choose on a part of the training text,
never on the part that the final figure is measured on. Losers are kept. Every run costs the same
number of floating-point operations (those of `steps` steps of the base), so that wide and narrow,
short and long are compared fairly; processor seconds stand beside. All runs are evaluated on the
same blocks with the same masks, which makes their differences far less noisy than the intervals;
those of another block size are evaluated on as many blocks of their own.
"""

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

import config as settings
import train
from config import choose, require
from data import loader
from experiments import results
from experiments.runs import independent_draws, step_flops
from lib import program

DEFAULTS = {
    "preset": "configs/pydocs_2400.py",  # the base that the variants change
    "data": "",  # a prepared folder
    "only": "",  # variants, separated by ;, or all; a single one runs here and makes no table
    "steps": 500,  # of the base; the others get as many as cost the same; 1 or more
    "seeds": 1,  # how many seeds (1337, 1338, ...) each variant gets; 1 or more
    "rows": "",  # a .jsonl file that keeps what has run; empty: results/recipe_DATA_STEPS.jsonl
}

BASE = "base"
VARIANTS = {
    BASE: {},
    "AdamW, learning rate 1e-3": {"optimizer": "adamw", "learning_rate": 1e-3},
    "AdamW, learning rate 3e-3": {"optimizer": "adamw", "learning_rate": 3e-3},
    "AdamW, learning rate 6e-3": {"optimizer": "adamw", "learning_rate": 6e-3},
    "learning rate 5e-3": {"learning_rate": 5e-3},
    "learning rate 2e-2": {"learning_rate": 2e-2},
    "weight of the bound": {"loss_weight": "bound"},
    "constant weight": {"loss_weight": "constant"},
    "lambda_dce": {"objective": "lambda_dce"},
    "lambda_dce, weight of the bound": {"objective": "lambda_dce", "loss_weight": "bound"},
    "any_order, independent draws": {"independent": True},
    "any_order, independent draws, weight of the bound": {
        "independent": True,
        "loss_weight": "bound",
    },
    "ReLU squared": {"mlp": "relu2"},
    "SwiGLU": {"mlp": "swiglu", "mlp_width": 256},
    "zero-init: head only": {"zero_init": "head"},
    "zero-init: none": {"zero_init": "none"},
    "no QK-norm": {"qk_norm": False},
    "LayerNorm": {"norm": "layer"},
    "average of weights, 0.99": {"ema": 0.99},
    "weight decay 0.1": {"weight_decay": 0.1},
    "decay from the start": {"decay_start": 0.0},
    "decay from 0.6": {"decay_start": 0.6},
    "cosine decay from the start": {"lr_decay": "cosine", "decay_start": 0.0},
    "batch 16": {"batch_size": 16},
    "batch 64": {"batch_size": 64},
    "block 64, batch 64": {"block_size": 64, "batch_size": 64},
    "block 256, batch 16": {"block_size": 256, "batch_size": 16},
    "1 head": {"n_head": 1},
    "4 heads": {"n_head": 4},
    "4 layers of 96": {"n_layer": 4},
    "8 layers of 96": {"n_layer": 8},
    "6 layers of 64": {"n_embd": 64},
    "6 layers of 128": {"n_embd": 128},
    "6 layers of 192": {"n_embd": 192},
    "4 layers of 128": {"n_layer": 4, "n_embd": 128},
    "4 layers of 128, ReLU squared": {"n_layer": 4, "n_embd": 128, "mlp": "relu2"},
}


def settings_of(config, name, seed):
    """The training config of a variant: preset, change, and the steps that cost as much."""
    words = [config["preset"], f"--data={config['data']}", "--resume=False", "--show_sample=False"]
    words += ["--eval_sequences=200", f"--seed={seed}"]
    words += [f"--{key}={config[key]}" for key in ("device", "dtype")]
    base = settings.parse(words, *train.MODULES)
    V = loader.read_meta(config["data"])["vocab_size"]
    base |= {"vocab_size": V, "attention": "full"}
    run_config = base | {
        key: value for key, value in VARIANTS[name].items() if key != "independent"
    }
    steps = round(config["steps"] * step_flops(base) / step_flops(run_config))
    return run_config | {
        "max_iters": steps,
        "eval_interval": steps,
        "warmup_iters": max(1, steps // 50),
    }


def run(config, name, seed):
    """Train one variant in this process. -> its row"""
    used, draws = time.process_time(), independent_draws(VARIANTS[name].get("independent", False))
    with tempfile.TemporaryDirectory() as folder, draws:
        run_config = settings_of(config, name, seed) | {"out_dir": folder}
        result = train.main(run_config)
    row = {"name": name, "seed": seed, "mark": mark(config, name), "steps": run_config["max_iters"]}
    return row | {"cpu_seconds": time.process_time() - used} | result


def mark(config, name):
    """What a row depends on: the preset as it is now, the variant, length, data, dtype."""
    keys = [config[key] for key in ("steps", "data", "device", "dtype")]
    preset = settings.parse([config["preset"]], *train.MODULES)
    return results.mark(preset, VARIANTS[name], *keys)


def fitting(config, path):
    """The rows that have run as this command would run them."""
    rows = [row for row in results.kept(path) if row["name"] in VARIANTS]
    rows = [row for row in rows if row.get("mark") == mark(config, row["name"])]
    steps = lambda row: settings_of(config, row["name"], row["seed"])["max_iters"]  # noqa: E731
    return [row for row in rows if row["steps"] == steps(row)]


def named(config):
    """Results of one text after one length of run stand beside those of others."""
    return f"recipe_{Path(config['data']).name}_{config['steps']}"


def report(config, rows):
    """Write NAME.json, .md and .png from the rows, best first."""
    variants = {}
    for row in rows:
        variants.setdefault(row["name"], []).append(row)
    base = {row["seed"]: row["nats_per_token"] for row in variants.get(BASE, [])}
    lines, figures = [], {}
    for name, of_variant in variants.items():
        figures[name] = sum(row["nats_per_token"] for row in of_variant) / len(of_variant)
        gains = [
            row["nats_per_token"] - base[row["seed"]] for row in of_variant if row["seed"] in base
        ]
        line = {"variant": name, "seeds": f"{len(of_variant)}", "steps": of_variant[0]["steps"]}
        gain = sum(gains) / len(gains) if gains else math.inf  # without a base there is none
        line |= {"nats_per_token": figures[name], "to_the_base": gain}
        seconds = sum(row["cpu_seconds"] for row in of_variant) / len(of_variant)
        lines.append(line | {"cpu_seconds": seconds})
    # Paired with the base of the same seed, as seeds differ by more than variants.
    lines.sort(key=lambda line: (line["to_the_base"], line["nats_per_token"]))
    formats = {"nats_per_token": "{:.3f}", "to_the_base": "{:+.3f}"}
    text = results.table(f"Bound after the same arithmetic, {config['data']}", lines, formats)

    gains = {f"{line['variant']}, to the base": line["to_the_base"] for line in lines}
    about = gains | results.about(torch.device("cpu"))
    results.write(config, named(config), figures | about, text, PLOTS, "recipe")
    print(text)
    return figures


def draw(axes, figures):
    """Bars: nats per token to the base, best first; what is worse is light."""
    end = ", to the base"
    gains = {name.removesuffix(end): gain for name, gain in figures.items() if name.endswith(end)}
    gains = {name: gains[name] for name in sorted(gains, key=gains.get)}
    results.bars(axes, gains, "{:+.3f}", light=[name for name in gains if gains[name] > 0])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("nats per token less those of the base (to the left is better)")
    axes.set_title("One setting changed at a time, the arithmetic kept: dark is better")


PLOTS = {"": draw}


def main(config):
    """Run what is missing, one process each, and write the table -> {variant: nats per token}."""
    require(config["data"], "say which data: --data=FOLDER, prepared")
    loader.read_meta(config["data"])
    path = Path(config["rows"] or Path(config["results"]) / f"{named(config)}.jsonl")
    names = config["only"].split(";") if config["only"] else VARIANTS
    for name in names:
        choose("only", name, VARIANTS)
    if len(names) == 1:
        results.keep(path, run(config, names[0], config["seed"]))
        return results.kept(path)[-1]
    seeds = [config["seed"] + i for i in range(config["seeds"])]
    wanted = [(name, seed) for seed in seeds for name in names]
    for name, seed in tqdm(wanted, unit="run", disable=None):
        if not any((row["name"], row["seed"]) == (name, seed) for row in fitting(config, path)):
            child = [sys.executable, "-m", "experiments.recipe", *sys.argv[1:]]
            child += [f"--only={name}", f"--seed={seed}"]
            done = subprocess.run(child, stderr=subprocess.PIPE, text=True, check=False)
            message = f"{name}, seed {seed} has failed: {done.stderr.strip()[-500:]}"
            require(done.returncode == 0, message)
    return report(config, fitting(config, path))


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
