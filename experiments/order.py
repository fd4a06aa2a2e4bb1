"""Attention in unmasking order: what it costs in likelihood, and what it gains in speed.

    python -m experiments.order                       trains what has not been, then measures
    python -m experiments.order --only=quality        the first table alone; or --only=speed

Quality. `full`, `order` (uniform orders; mixtures with left to right) and the causal baseline, on
the demo's recipe and text, each for as many steps as cost the operations of the preset's run,
several seeds. All held-out blocks: the any-order bound, and left to right where a network can. A
run is an ordinary run of train.py in out/order: a stopped one resumes, a finished one is kept. The
preset's loss weight (sqrt) is that of `full`; `order` and ARM train on the likelihood itself.

Speed. Seconds a sample with random weights (speed does not depend on them), head and draw included,
for the causal network with its cache, `full` as sample.py runs it, and `order` with its cache, at
L, L/2, L/4 and L/8 calls of equal numbers of tokens. All in turns, in one run.
"""

import contextlib
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import config as settings
import diffusion
import evaluate
import model as network
import sample
import samplers
import train
from config import choose
from data import loader
from experiments import results
from experiments.runs import step_flops
from lib import philox, program
from lib.device import cast_products, machine
from lib.stats import mean_half, plus_minus
from run import checkpoint

DEFAULTS = {
    "preset": "configs/pydocs_2400.py",  # the recipe of all
    "seeds": 3,  # 1337, 1338, ...; 1 or more
    "share": 1.0,  # of the preset's operations
    "folder": "out/order",  # where the runs are
    "only": "",  # quality or speed; empty: both
    "rounds": 5,  # of the speed table, in turns; 1 or more
}

KINDS = {  # name: what differs from the preset
    "full": {"attention": "full"},
    "order": {"attention": "order", "batch_size": 16},
    "order, half left to right": {
        "attention": "order",
        "batch_size": 16,
        "order": "mixture",
        "order_p": 0.5,
    },
    "order, quarter left to right": {
        "attention": "order",
        "batch_size": 16,
        "order": "mixture",
        "order_p": 0.25,
    },
    "ARM": {"objective": "ar"},
}
SHAPE = {"n_layer": 6, "n_head": 4, "n_embd": 256, "norm": "rms", "mlp": "relu2", "bias": False}
SHAPE |= {"qk_norm": False, "zero_init": "none"}


# ---- Quality -------------------------------------------------------------------------------------


def run_config(config, name, seed):
    """The training config of a run, with the steps that cost as much as the preset's."""
    base = settings.parse([config["preset"]], *train.MODULES)
    base |= {"vocab_size": loader.read_meta(base["data"])["vocab_size"]}
    run = base | KINDS[name]
    run |= {"attention": "causal"} if run["objective"] == "ar" else {}
    steps = 60 if config["quick"] else config["share"] * base["max_iters"]
    steps = round(steps * step_flops(base) / step_flops(run))
    words = f"{name} {config['share']:g} {seed}{' quick' if config['quick'] else ''}"
    words = words.replace(",", "")
    run |= {"seed": seed, "max_iters": steps, "eval_interval": steps, "show_sample": False}
    run |= {"out_dir": str(Path(config["folder"], words.replace(" ", "_"))), "save_interval": 200}
    run |= {key: config[key] for key in ("device", "dtype")} | {"compile": not config["quick"]}
    keys = ("seed", "max_iters", "attention", *KINDS[name])
    return run | {"user_keys": dict.fromkeys(keys, "")}


def measured(config, name, seed):
    """{order: nats per token} of a run, which is trained first where it has not been."""
    recipe = run_config(config, name, seed)
    path = Path(recipe["out_dir"], "ckpt.pt")
    if not path.is_file() or checkpoint.read(path)["step"] < recipe["max_iters"]:
        train.main(recipe)
    device, autocast = machine(config)
    model, _, trained = checkpoint.load(path, device)
    tokens, L = loader.Tokens(trained["data"], "val"), trained["block_size"]
    blocks = loader.in_order(tokens, L)[: 8 if config["quick"] else None]
    count = sum(map(len, blocks))
    if name == "ARM":
        wanted = {"left to right": "ar"}
    elif name == "full":
        wanted = {"any order": "any_order"}
    else:
        wanted = {"any order": "any_order", "left to right": "left_to_right"}
    nats_of = {}
    for order, estimator in wanted.items():
        keys = {} if estimator == "ar" else {"estimator": estimator, "draws": 8, "strata": 4}
        with autocast():
            nats, _ = evaluate.estimate(model, blocks, batch_size=64, progress=True, **keys)
        nats_of[order] = float(nats.sum()) / count
    return nats_of


def quality(config):
    """(rows of the table, figures) of all kinds and seeds."""
    seeds, rows, figures = range(1337, 1337 + config["seeds"]), [], {}
    runs_of = {name: [] for name in KINDS}
    for seed in seeds:
        for name in KINDS:
            runs_of[name].append(measured(config, name, seed))
            tqdm.write(f"{name}, seed {seed}: {runs_of[name][-1]}")
    for name, runs in runs_of.items():
        row = {"network": name}
        for order in ("any order", "left to right"):
            values = [run[order] for run in runs if order in run]
            row[order] = spelled(values)
            if values:
                figures[f"{name}, {order}"] = values
        rows.append(row | {"steps": run_config(config, name, 1337)["max_iters"]})
    return rows, figures


def spelled(values):
    """The mean of some seeds and half of its 95% interval, and the values."""
    if not values:
        return ""
    mean, half = mean_half(values)
    each = ", ".join(f"{value:.3f}" for value in values)
    return f"{mean:.3f}{plus_minus(half, '.3f')} ({each})"


# ---- Speed ---------------------------------------------------------------------------------------


def even(masked, o):
    """A random order, the same number of tokens in each of `steps` calls."""
    u = philox.uniforms(o["seed"], 0, range(len(masked)), masked.shape[1])  # (N, L)
    turns = u.masked_fill(~masked, 2).argsort(1).argsort(1)  # (N, L) conditions last
    call = turns * o["steps"] // masked.sum(1, keepdim=True)  # (N, L)
    return samplers.FixedOrder(torch.where(masked, call, -1), o["seed"])


def speed(config):
    """Rows: seconds a sample, in turns, for lengths, vocabularies and batches."""
    device, autocast = machine(config)
    rows = []
    grid = [(L, V, B) for L in (256, 1024) for V in (104, 50257) for B in (1, 16)]
    for L, V, B in grid[:1] if config["quick"] else grid:
        shape = network.DEFAULTS | SHAPE | {"block_size": L, "vocab_size": V}
        models = {
            kind: network.make_network(shape | {"attention": kind}).to(device).eval()
            for kind in ("causal", "full", "order")
        }
        for kind in ("full", "order"):  # as sample.py does
            cast_products(models[kind], autocast)
        calls = {"causal": {}}
        for kind in ("full", "order"):
            for part in (1, 2, 4, 8):
                calls[f"{kind}, {part} a call"] = {"sampler": "even", "steps": L // part}
        times = in_turns(models, calls, (B, L), config["rounds"], autocast)
        arm = min(times["causal"])
        for name, seconds in times.items():
            row = {"L": str(L), "V": str(V), "batch": str(B), "network": name}
            row |= {"seconds_a_sample": min(seconds) / B, "times_the_ARM": arm / min(seconds)}
            full = times.get(name.replace("order", "full"))
            row["times_full"] = f"{min(full) / min(seconds):.1f}" if "order" in name else ""
            rows.append(row)
        tqdm.write(results.table(f"L = {L}, V = {V}, batch {B}", rows[-9:], FORMATS))
    return rows


def in_turns(models, calls, shape, rounds, autocast):
    """{name: [seconds of a whole sample]}.

    A call of `full` costs the same whatever is visible, so a few are timed and counted for all.
    The causal network runs in float32: at one token a call bfloat16 makes it slower.
    """
    samplers.SAMPLERS["even"], times = even, {name: [] for name in calls}
    few = max(2, 2048 // shape[1])
    empty = torch.full(shape, models["full"].mask_id, device=models["full"].device)  # (B, L)
    for _ in range(rounds):
        for name, options in calls.items():
            model, x, more = models[name.split(",")[0]], empty, 1.0
            if model is models["full"] and options["steps"] > few:
                x, more = empty.clone(), options["steps"] / few
                x[:, few * shape[1] // options["steps"] :] = 0
                options = options | {"steps": few}
            began = time.perf_counter()
            with autocast() if model is not models["causal"] else contextlib.nullcontext():
                sample.sample(model, x, batch_size=shape[0], **options)
            times[name].append(more * (time.perf_counter() - began))
    del samplers.SAMPLERS["even"]
    return times


FORMATS = {"seconds_a_sample": "{:.3f}", "times_the_ARM": "{:.2f}"}


def draw(axes, figures):
    """Tokens a second over those of the causal network, by tokens a call; L = 256, V = 104."""
    ends, ticks = {}, [1, 2, 4, 8]
    for kind, style in (("order", "o-"), ("full", "s--")):
        for batch in (1, 16):
            name = f"seconds a sample, L 256 V 104 batch {batch} network "
            calls = [f"{name}{kind}, {n} a call" for n in ticks]
            if calls[0] in figures:
                speeds = [figures[f"{name}causal"] / figures[call] for call in calls]
                axes.plot(ticks, speeds, style, color=results.DARK)
                ends[f"{kind}, batch {batch}"] = ticks[-1], speeds[-1]
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens a call")
    axes.set_ylabel("times the tokens a second of the cached ARM")
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("Several tokens a call: attention in unmasking order beside an ARM")
    if ends:
        results.name_ends(axes, ends)


PLOTS = {"": draw}


def main(config):
    """Train, measure, print and write both tables; return the figures."""
    began, texts, figures, rows = time.time(), [], {}, []
    choose("only", config["only"], ["", "quality", "speed"])
    if config["only"] != "speed":
        table, measured = quality(config)
        figures |= {f"{key}, seed {i}": v for key, vs in measured.items() for i, v in enumerate(vs)}
        texts.append(results.table("Nats per token at equal operations, held-out text", table))
    if config["only"] != "quality":
        rows = speed(config)
        keys = ("L", "V", "batch", "network")
        for row in rows:
            name = " ".join(f"{key} {row[key]}" for key in keys)
            figures[f"seconds a sample, {name}"] = row["seconds_a_sample"]
        texts.append(results.table("Seconds a sample", rows, FORMATS))
    device, _ = machine(config)
    figures |= results.about(device) | {"seconds": math.ceil(time.time() - began)}
    text = "\n".join(texts)
    name = f"order_{config['only']}" if config["only"] else "order"
    results.write(config, name, figures, text, PLOTS if rows else None, script="order")
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, diffusion, results, sys.modules[__name__])
