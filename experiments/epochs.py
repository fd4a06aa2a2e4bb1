"""Repeated data: what is text worth that was read before, to masked diffusion and to an ARM?

    python -m data.shakespeare.prepare && python -m data.pydocs.prepare
    python -m experiments.epochs --minutes=150

Claim (arXiv 2507.15857): a text read again is nearly worth a new one up to 4 times to an ARM, up to
100 times to MDM, so with little data and much compute MDM wins. Disputed (2510.04071): an ARM with
dropout and weight decay gains as much.

Design. A budget is what it costs to read the whole text once (--readings: so many times). For each
number of epochs E the same FLOPs go into a part of the text, 1/E of it, at a place of its own for
each seed; what is held out is never cut. First table: MDM, ARM, and ARM with dropout and weight
decay at these equal FLOPs. Second: the lowest of the evaluations along the runs, as who stops in
time has it, and after how many epochs it comes. There are ten a run, and where a tenth of the
epochs are several another run has so many in all, so that an early turn is seen, too.

Budget: 27 runs a seed and text, 19 times one reading: 9e13 FLOPs for tiny Shakespeare and 1.8e14
for pydocs; with three seeds 8e14, 150 minutes on two cores with bfloat16 instructions. Minimum:
--seeds=1 --data=data/shakespeare.
"""

import itertools
import re
import statistics
import sys

import numpy as np

import config as settings
from data import loader, tokenizer
from experiments import papers, results, runs
from experiments.scaling_up import numbers
from lib import program

DEFAULTS = {
    "data": "data/shakespeare,data/pydocs",  # prepared folders, two tables each
    "epochs": "1,3,10,30,100,300",  # the parts of the text are 1/1, 1/3, ... of the budget's tokens
    "readings": 1.0,  # how often the whole text could be read for the FLOPs of a run
    "dropout": 0.2,  # of the third kind
    "weight_decay": 0.1,  # of the third kind
}

LEAST = 3  # epochs of a shorter run
NEAR = 0.05  # nats above unrepeated text at which a text counts as nearly as good
BATCH = {"batch_size": 16}
KINDS = MDM, ARM, REGULAR = "MDM", "ARM", "ARM with dropout and decay"


def kinds_of(config):
    """{name: keys of train.py}."""
    regular = {key: config[key] for key in ("dropout", "weight_decay")}
    arm = BATCH | {"objective": "ar"}
    return {MDM: BATCH, ARM: arm, REGULAR: arm | regular}


def budget_of(ctx, data):
    """(tokens, FLOPs) of a budget."""
    tokens = round(ctx.config["readings"] * len(loader.Tokens(data, "train")))
    recipe = ctx.recipe(data, BATCH, 1.0, 0)
    step = recipe["batch_size"] * recipe["block_size"]
    return tokens, tokens / step * runs.step_flops(recipe)


def part_of(ctx, data, size, seed):
    """A prepared folder with `size` training tokens in a row, and all that is held out."""
    block = ctx.recipe(data, BATCH, 1.0, 0)["block_size"]
    few = f"{size} tokens of {data} are less than a block of {block}: give fewer epochs"
    settings.require(size >= block, few)
    tokens = {split: loader.Tokens(data, split) for split in ("train", "val")}
    start = int(np.random.default_rng(seed).random() * (len(tokens["train"]) - size + 1))
    text = tokenizer.from_meta(tokens["train"].meta["tokenizer"])
    train = text.decode(tokens["train"][start : start + size].tolist())
    val = text.decode(tokens["val"][:].tolist())
    name = f"part_{size}_{results.mark(train, val)[:8]}"
    return ctx.prepared(name, [("train", train), ("val", val)], text)


# ---- Runs ----------------------------------------------------------------------------------------


def plan(config):
    """[(E, epochs of a run)] of runs of the whole budget, and of a tenth of it."""
    every = sorted(numbers(config, "epochs"))
    every = [E for E in every if config["readings"] <= E]
    settings.require(every, f"epochs must not all be below readings, {config['readings']:g}")
    every = every[::3] if config["quick"] else every
    return [(E, e) for E in every for e in (E / 10, E) if e == E or e >= LEAST]


def one_seed(ctx, data, seed):
    """{(kind, E): (nats of the whole run, [(epochs, nats)] along its runs)}; None: left out."""
    (tokens, flops), curves = budget_of(ctx, data), {}
    parts = {E: part_of(ctx, data, round(tokens / E), seed) for E, _ in plan(ctx.config)}
    for (E, e), (kind, keys) in itertools.product(plan(ctx.config), kinds_of(ctx.config).items()):
        folder = ctx.train(parts[E], keys, flops * e / E, seed)
        along = curves.setdefault((kind, E), [])
        curve = ctx.curve(folder)[0] if folder else [(1.0, None)]
        along += [(e * x / curve[-1][0], nats) for x, nats in curve]
        if e == E:
            curves[kind, E] = ctx.nats(folder, data), along
    return curves


# ---- The tables ----------------------------------------------------------------------------------


def at_equal_flops(nats, tokens):
    """Rows: what E epochs of 1/E of the text give. nats: {(kind, E): [of each seed]}."""
    rows = []
    for E in sorted({E for _, E in nats}):
        row = {"epochs": f"{E:g}", "tokens_of_text": f"{tokens / E:,.0f}"}
        row |= {kind: runs.spelled(nats[kind, E]) for kind in KINDS}
        for kind in (ARM, REGULAR):
            row[f"MDM - {kind}"] = runs.spelled(runs.minus(nats[MDM, E], nats[kind, E]), "+.3f")
        rows.append(row)
    return rows


def turn(along):
    """(lowest nats, epochs until then) of [(epochs, nats)]; None: one is left out."""
    known = None not in [nats for _, nats in along]
    return min((nats, epochs) for epochs, nats in along) if known else None


def lowest_along(alongs, tokens):
    """Rows: the lowest evaluation on each part, and when it comes. {(kind, E): [of each seed]}."""
    rows = []
    for E in sorted({E for _, E in alongs}):
        row, lowest = {"epochs": f"{E:g}", "tokens_of_text": f"{tokens / E:,.0f}"}, {}
        for kind in KINDS:
            turns = [turn(along) for along in alongs[kind, E]]
            lowest[kind] = [pair and pair[0] for pair in turns]
            when = statistics.median([pair[1] for pair in turns if pair] or [0])
            shown = "not yet" if when > 0.999 * E else f"at {when:.2g}"
            row |= {
                kind: runs.spelled(lowest[kind]),
                f"{kind}_turns": shown if when else "left out",
            }
        pairs = zip(lowest[ARM], lowest[REGULAR], strict=True)
        better = [None if None in pair else min(pair) for pair in pairs]
        row["MDM - better ARM"] = runs.spelled(runs.minus(lowest[MDM], better), "+.3f")
        rows.append(row)
    return rows


def nearly_as_good(nats, kind):
    """The most epochs whose mean is within NEAR of unrepeated text, at equal FLOPs; None: none."""
    every = sorted({E for _, E in nats})
    above = {E: runs.minus(nats[kind, E], nats[kind, every[0]]) for E in every}
    known = {E: [z for z in values if z is not None] for E, values in above.items()}
    return max((E for E in every if known[E] and statistics.mean(known[E]) <= NEAR), default=None)


def one_text(ctx, data, seeds):
    """(text of the tables, figures) of one text; seeds: what one_seed gives of each."""
    nats, alongs = ({key: [seed[key][i] for seed in seeds] for key in seeds[0]} for i in (0, 1))
    tokens, flops = budget_of(ctx, data)
    title = f"{data}, {flops:.1e} FLOPs a run, nats per token of held-out text, {ctx.all_seeds}"
    text = results.table(f"{title}: E epochs of 1/E of the text", at_equal_flops(nats, tokens))
    about = f"{title}: the lowest of the evaluations (64 blocks) on the way, and its epochs"
    text += "\n" + results.table(about, lowest_along(alongs, tokens)) + "\n"
    figures = {f"{data}, FLOPs of a run": flops}
    for (kind, E), values in nats.items():
        for seed, value, along in zip(ctx.seeds, values, alongs[kind, E], strict=True):
            name = f"{kind} on {data}, {E:g} epochs, seed {seed}"
            figures |= {} if value is None else {name: value}
            lowest = zip((", lowest", ", lowest at"), turn(along) or (), strict=False)
            figures |= {f"{name}{what}": z for what, z in lowest}
    for kind in KINDS:
        near = nearly_as_good(nats, kind)
        shown = "left out" if near is None else f"{near:g}"
        text += f"Epochs within {NEAR} nats of unrepeated text at equal FLOPs, {kind}: {shown}"
        if kind in papers.REPEATS:
            epochs, half = papers.REPEATS[kind]
            text += f" (2507.15857: about {epochs}, half of their worth left after {half})"
        text += ".\n"
        figures |= {} if near is None else {f"{kind} on {data}, epochs nearly as good": near}
    return text, figures


def draw(axes, figures):
    """Nats at equal FLOPs against epochs, a field for each text; means over seeds."""
    points = {}
    for key, value in figures.items():
        match = re.fullmatch(r"(.*) on (.*), (\S+) epochs, seed \d+", key)
        if match:
            kind = points.setdefault(match[2], {}).setdefault(match[1], {})
            kind.setdefault(float(match[3]), []).append(value)
    figure = axes.figure
    axes.remove()
    fields = figure.subplots(1, max(1, len(points)), squeeze=False)[0]
    for field, (data, kinds) in zip(fields, points.items(), strict=False):
        ends, styles = {}, itertools.cycle(("o-", "s--", "^:"))
        for kind, of_epochs in kinds.items():
            y = [statistics.mean(values) for values in of_epochs.values()]
            color = results.DARK if kind == MDM else results.LIGHT
            field.plot([*of_epochs], y, next(styles), color=color)
            ends[kind] = [*of_epochs][-1], y[-1]
        field.set(xscale="log", xlabel="epochs of a smaller text, at equal FLOPs")
        field.set(ylabel="nats per token of held-out text")
        field.set_title(f"{data}: what is a text worth again?")
        results.name_ends(field, ends)


PLOTS = {"": draw}


def main(config):
    """Train, measure, print and write; returns the figures."""
    settings.require(config["readings"] > 0, "readings must be above 0")
    ctx, texts, figures = runs.Runs(config), [], {}
    names = dict.fromkeys(map(ctx.text, config["data"].split(",")))
    by_data = {data: [] for data in names}
    for seed, data in itertools.product(ctx.seeds, names):
        by_data[data].append(one_seed(ctx, data, seed))
    for data, seeds in by_data.items():
        text, more = one_text(ctx, data, seeds)
        texts, figures = [*texts, text], figures | more
    return ctx.write("epochs", "\n".join(texts), figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
