"""Is the loader fast enough for a GPU, and does its memory grow with the data?

    python -m experiments.loading [--quick]

Batches of 64 x 1024 tokens are drawn from token files of three sizes, each in a process of its own:
the blocks alone, and all that a training step takes (train.make_batch: blocks, masks, weights,
masked positions). Speed is per second of one core, CPU time. The files of 10^6 and 10^9 tokens are
random ids and lie in the page cache; the one of 10^12 is sparse, to show the memory (every read of
a hole makes the system a fresh page, so its speed says little).

Then a small network is trained with its batches made in the loop and made beforehand by a thread
(loader.prefetch), in turns. On a CPU the thread shares the cores with the network; beside a GPU it
has one to itself.
"""

import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config as settings
import diffusion
import train
from config import require
from data import loader
from experiments import results
from experiments.timing import alternate, middle, resident
from lib import program
from lib.device import machine
from lib.files import to_json
from lib.parallel import Team

DEFAULTS = {
    "rounds": 20,  # each figure is the median of so many; 1 or more
    "folder": "",  # where token files go, 2 GB and removed afterwards; empty: a temporary folder
}

NEED = 2_000_000  # tokens a second that a fast GPU may take
SIZES = {10**6: 1, 10**9: 10, 10**12: 10_000}  # tokens: shards
REAL = 10**9  # tokens of the largest file that is written out
B, L, V = 64, 1024, 256
SMALL = {"n_layer": 6, "n_embd": 128, "n_head": 4, "block_size": 128, "vocab_size": V}
SMALL |= {"batch_size": 32, "learning_rate": 1e-3, "optimizer": "adamw"}
CALLS, STEPS = 20, 5  # that are timed together


def write_tokens(folder, n, shards, V=V):
    """A prepared folder of n tokens in its split train: random, or holes in the file if many."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for shard in range(shards):
        with open(folder / f"train_{shard:05d}.bin", "wb") as file:
            for _ in range(n // shards // 10**6 if n <= REAL else 0):
                file.write(numbers.integers(V, size=10**6, dtype=np.uint16).tobytes())
            file.truncate(2 * (n // shards))
    splits = {"train": {"tokens": n, "documents": 1, "bytes": n}}
    meta = {"tokenizer": {"kind": "byte"}, "vocab_size": V, "dtype": "uint16", "splits": splits}
    (folder / "meta.json").write_text(to_json(meta), encoding="utf8")


def config_of(**keys):
    """The config of a training run."""
    return settings.options(keys, *train.MODULES)


def measure(folder, rounds):
    """In a fresh process: {"blocks", "batches"} in tokens a second of one core, "memory" in MiB."""
    torch.set_num_threads(1)
    tokens = loader.Tokens(folder, "train")
    for start in range(0, len(tokens) if len(tokens) <= REAL else 0, 10**6):
        tokens[start : start + 10**6]  # into the page cache
    config, step = config_of(batch_size=B), iter(range(10**9))
    blocks = loader.Blocks(tokens, L, seed=0)
    makers = {
        "blocks": lambda: blocks.batch(B * next(step), range(B)),
        "batches": lambda: train.make_batch(config, blocks, next(step), range(B)),
    }
    speeds = {}
    for name, make in makers.items():
        times = [cpu_seconds(make, CALLS) for _ in range(rounds + 1)]
        speeds[name] = CALLS * B * L / middle(times[1:])  # the first round warms up
    return speeds | {"memory": resident() / 2**20}


def cpu_seconds(function, times):
    """CPU seconds of `times` calls."""
    began = time.process_time()
    for _ in range(times):
        function()
    return time.process_time() - began


def training(folder, rounds, keys):
    """Seconds of some training steps of a small network: {how batches are made: seconds}."""
    config = config_of(**SMALL, **keys)
    team = Team(1, 0, *machine(config))
    model, _, optimizers = train.build(config, team)
    loss_of = diffusion.Loss(model, config["objective"])
    blocks = loader.Blocks(loader.Tokens(folder, "train"), SMALL["block_size"], seed=0)
    step, position = iter(range(10**9)), range(config["batch_size"])

    def steps(prefetch):
        made = (train.make_batch(config, blocks, next(step), position) for _ in range(STEPS))
        for batch in prefetch(made):
            train.train_step(config, 0, iter([batch]), loss_of, optimizers, team)

    ways = {"in the loop": lambda: steps(iter), "by a thread": lambda: steps(loader.prefetch)}
    return {name: middle(times) for name, times in alternate(ways, rounds, team.device).items()}


def short(n):
    return f"1e{len(str(n)) - 1}"


def draw(axes, figures):
    """Lines of the speeds by size, and one at what a GPU needs."""
    names, ends = {"blocks": "o--", "batches": "s-"}, {}
    for name, style in names.items():
        y = [figures[f"{name}_{short(n)}"] / 1e6 for n in SIZES]
        axes.plot(list(SIZES), y, style, color=results.DARK)
        ends[{"blocks": "blocks alone", "batches": "batches with masks"}[name]] = max(SIZES), y[-1]
        for n, speed in zip(SIZES, y, strict=True):
            axes.annotate(f"{speed:.0f}", (n, speed), xytext=(0, 6), textcoords="offset points")
    axes.plot([min(SIZES), max(SIZES)], [figures["need"] / 1e6] * 2, color="black", linewidth=0.8)
    ends[f"a fast GPU takes {figures['need'] / 1e6:.0f}"] = max(SIZES), figures["need"] / 1e6
    axes.set(xscale="log", yscale="log", xlabel="tokens in the data", ylim=(1, 600))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("million tokens a second of one core")
    axes.set_title("The loader is many times as fast as a GPU needs")
    results.name_ends(axes, ends)


PLOTS = {"": draw}


def line(n, measured):
    """The line of the table for n tokens."""
    row = {"tokens": short(n), "shards": SIZES[n]}
    row |= {"blocks": measured["blocks"], "batches": measured["batches"]}
    row |= {"batches_over_need": measured["batches"] / NEED, "resident_MiB": measured["memory"]}
    return row


def main(config):
    """Measure all of it, write loading.json, .md and .png; return the figures."""
    began = time.time()
    device, _ = machine(config)
    rounds = 3 if config["quick"] else config["rounds"]
    base = Path(config["folder"] or tempfile.gettempdir())
    require(base.is_dir(), f"no folder {base}")
    free = shutil.disk_usage(base).free
    lacking = f"{base} has {free / 1e9:.1f} GB free, and 3 are needed; choose another --folder"
    require(free > 3e9, lacking)

    lines, figures = [], {"need": NEED}
    with tempfile.TemporaryDirectory(dir=base) as place:
        for n, shards in tqdm(SIZES.items(), "token files", disable=None, leave=False):
            folder = Path(place, str(n))
            write_tokens(folder, n, shards)
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                measured = fresh.submit(measure, folder, rounds).result()
            lines.append(line(n, measured))
            figures |= {f"{key}_{short(n)}": value for key, value in measured.items()}
        keys = {key: config[key] for key in ("device", "dtype")}
        seconds = training(Path(place, str(10**6)), rounds, keys)
    ratio = {way: seconds["in the loop"] / taken for way, taken in seconds.items()}
    trained = [
        {"batches_are_made": way, "seconds": seconds[way], "ratio": ratio[way]} for way in seconds
    ]
    figures |= {"prefetch_ratio": ratio["by a thread"], "rounds": rounds, "seeds": [0]}
    figures |= results.about(device) | {"seconds": time.time() - began}

    formats = {"ratio": "{:.3f}x", "batches_over_need": "{:.1f}x", "seconds": "{:.3f}"}
    text = results.table(f"Tokens a second of one core, batches of {B} x {L}", lines, formats)
    text += "\n" + results.table("Five steps of training on this machine", trained, formats)
    results.write(config, "loading", figures, text, PLOTS)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
