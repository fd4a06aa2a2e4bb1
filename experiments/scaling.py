"""IsoFLOP curves of masked diffusion (MDM) and an ARM: the best sizes, and the gap in compute.

    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m experiments.scaling --minutes=300
    python -m experiments.scaling --minutes=3000 --budgets=3e12,1e13,3e13,1e14,3e14       two more
    python -m experiments.scaling --only=rate      is the learning rate right at two widths?
    python -m experiments.scaling --only=plan      what would be trained, and nothing is

Claim (SMDM, arXiv 2410.18514): MDM's loss falls with compute at the rate of ARM's, from a higher
level: it takes 16 times the compute, and its best network is about half as large.

Design. At each budget C both families train at least five sizes N (parameters without embedding and
head), with one text and one recipe; sizes are added while the lowest one is at an end. How N*(C),
L*(C), the lines through them and the intervals come out of the points is told in isoflop.py. C
counts matrix products, attention and head included, as tests compare with PyTorch's own counter.
The batch is the same for all sizes. The learning rate follows from the width, as run/budget.py has
it, in both families: 1e-2 up to a width of 96, beyond it falling with its square root. --only=rate
tries half and twice of that.

The paper's grid, with its sizes, its recipe (but for 2% of warm-up), and C = 6 N D as it counts:

    torchrun --nproc-per-node=8 -m experiments.scaling --shapes=smdm --preset=configs/smdm_170m.py
        --data=data/slimpajama --budgets=6e18,1e19,3e19,6e19,1e20 --minutes=1e9 --seeds=1

Budget: 5 sizes x 2 families x 4.3e13 = 4.3e14 FLOPs a seed, 80 minutes on two cores with
bfloat16 instructions, where small networks reach a third of the speed of others, and three seeds.
--only=rate: 1.2e14 a seed. Minimum: --seeds=1.
"""

import functools
import itertools
import sys

import numpy as np
import torch

import config as settings
import model as network
import train
from experiments import isoflop, papers, results, runs
from experiments.scaling_up import numbers
from lib import program
from run import budget, formats

DEFAULTS = {
    "data": "data/corpus",  # a prepared folder
    "budgets": "3e12,1e13,3e13",  # FLOPs of the runs of a curve
    "shapes": "bytes",  # bytes (SHAPES) | smdm (its table of sizes)
    "only": "curves",  # curves | rate | plan
    "micro_batch_size": 0,  # sequences that a process takes at once; 0: the preset's
}

# n_layer, n_embd: each about twice the last
SHAPES = [(1, 16), (1, 32), (2, 32), (2, 48), (3, 56), (4, 64), (5, 80), (6, 96), (7, 128)]
SHAPES += [(8, 144), (9, 192), (10, 256), (12, 320), (14, 384), (16, 448)]
BATCH = 16  # sequences of all sizes: where it changed there would be a step in the curves
FAMILIES = {"MDM": {}, "ARM": {"objective": "ar"}}
GUESS = {"MDM": 1.8e5, "ARM": 3.2e5}  # N* at 1e13 FLOPs on bytes: where the search begins
RATES, RATE_SHAPES = (0.5, 1.0, 2.0), [(2, 48), (7, 128)]


# ---- Sizes ---------------------------------------------------------------------------------------


def shape_keys(n_layer, D, factor=1.0):
    """The keys of a shape, with `factor` times the learning rate of the rule."""
    filled = budget.filled(train.DEFAULTS | network.DEFAULTS | {"n_layer": n_layer, "n_embd": D})
    keys = {key: filled[key] for key in ("n_layer", "n_embd", "n_head")} | {"batch_size": BATCH}
    return keys | {"learning_rate": factor * filled["learning_rate"]}


@functools.cache
def sizes_of(shapes, quick=False):
    """{N: keys of train.py} of the sizes that there are, small ones first."""
    each = [shape_keys(*shape) for shape in ([(1, 8), (1, 16), (1, 32)] if quick else SHAPES)]
    if shapes == "smdm":
        each = [formats.size_config(name) | {"size": ""} for name in formats.SIZES]
    sizes = {}
    for keys in each:
        with torch.device("meta"):
            net = network.make_network(network.DEFAULTS | keys | {"vocab_size": 1})
        N = net.n_parameters() - net.embed.weight.numel() - net.unembed.weight.numel()
        if shapes != "smdm" or max(sizes, default=0) < N / 1.45:  # some of SMDM's are close
            sizes[N] = keys
    return sizes


def window(config, family, C):
    """(all sizes N, start, end): those from start to end are around the guess of N*."""
    sizes = [*sizes_of(config["shapes"], config["quick"])]
    log_N = np.log(GUESS[family]) + 0.6 * np.log(C / 1e13)
    if config["shapes"] == "smdm":
        log_N = np.interp(np.log(C), np.log(papers.BUDGETS), np.log(papers.ISOFLOP[family]["N"]))
    nearest = int(np.abs(np.log(sizes) - log_N).argmin())
    start = max(0, min(nearest - isoflop.FITTED // 2, len(sizes) - isoflop.FITTED))
    return sizes, start, min(start + isoflop.FITTED, len(sizes))


# ---- Runs ----------------------------------------------------------------------------------------


def planned(ctx, family, N, C):
    """(keys, FLOPs as runs.py counts them) of a run; with --shapes=smdm C is 6 N D, as there."""
    config = ctx.config
    chosen = {key: config[key] for key in ["micro_batch_size"] if config[key]}
    keys = sizes_of(config["shapes"], config["quick"])[N] | FAMILIES[family] | chosen
    if config["shapes"] != "smdm":
        return keys, C
    recipe = ctx.recipe(ctx.text(config["data"]), keys, 1.0, 0)
    step = recipe["batch_size"] * recipe["block_size"]  # tokens
    return keys, int(C / (6 * N * step)) * runs.step_flops(recipe)


def nats_of(ctx, family, N, C, seed):
    """Nats per token of a run; None: left out."""
    data, (keys, flops) = ctx.config["data"], planned(ctx, family, N, C)
    return ctx.nats(ctx.train(data, keys, flops, seed), data)


def first_seed(ctx, family, C):
    """{N: nats}: as many sizes as it takes until the lowest is inside, or there are no more."""
    (sizes, start, end), nats = window(ctx.config, family, C), {}
    while True:
        for N in (N for N in sizes[start:end] if N not in nats):
            nats[N] = nats_of(ctx, family, N, C, ctx.seeds[0])
        if None in nats.values():
            return nats
        lowest, before = min(nats, key=nats.get), (start, end)
        start -= start > 0 and lowest == sizes[start]
        end += end < len(sizes) and lowest == sizes[end - 1]
        if (start, end) == before:
            return nats


def curves_of(ctx, budgets):
    """{(family, C): {N: [nats of each seed]}}; a further seed has the sizes that are fitted."""
    curves = {}
    for C in budgets:
        for family in FAMILIES:
            nats = first_seed(ctx, family, C)
            curves[family, C] = {N: [nats[N]] for N in sorted(nats)}
    for seed in ctx.seeds[1:]:
        for (family, C), curve in curves.items():
            for N in isoflop.around(curve) if isoflop.is_whole(curve) else []:
                curve[N].append(nats_of(ctx, family, N, C, seed))
    return curves


# ---- The parts -----------------------------------------------------------------------------------

NOTE = """
What this does not show: a factor of ten in compute below 1e14 FLOPs, on bytes and with networks of
a few layers, says nothing of a million times as much; a power law without an irreducible term has
an exponent that depends on text and tokens; MDM's number is a bound, ARM's is exact; where the gap
is larger than the budgets are apart, a line says it beyond its points. What carries over is that
both families are treated alike.
"""


def curves_part(ctx, budgets):
    """(text, figures) of the curves."""
    curves = curves_of(ctx, budgets)
    rows, estimates, inside = isoflop.lowest_points(curves)
    title = f"{ctx.config['data']}, {ctx.all_seeds}: the lowest point of each curve [95%]; "
    text = results.table(f"{title}L* in nats per token of held-out text", rows)
    rows, more = isoflop.power_laws(inside)
    text += "\n" + results.table("Power laws in C; the last two rows in the middle of log C", rows)
    title = "At equal parameters and FLOPs: MDM - ARM, nats per token, the first seed"
    text += "\n" + results.table(title, isoflop.at_equal_sizes(curves))
    return text + NOTE, isoflop.figures_of(curves, ctx.seeds) | estimates | more


def rate_part(ctx, budgets):
    """(text, figures) of the check of the learning rate, at the budget in the middle."""
    data, C, rows, figures = ctx.config["data"], budgets[len(budgets) // 2], [], {}
    for family in FAMILIES:
        for n_layer, D in RATE_SHAPES:
            row, nats = {"family": family, "network": f"{n_layer} x {D}"}, {}
            for factor in RATES:
                keys = shape_keys(n_layer, D, factor) | FAMILIES[family]
                nats[factor] = [ctx.nats(ctx.train(data, keys, C, s), data) for s in ctx.seeds]
                row[f"{factor:g} x the rule's"] = runs.spelled(nats[factor])
                for seed, value in zip(ctx.seeds, nats[factor], strict=True):
                    name = f"{family}, {n_layer} x {D}, {factor:g} x the rate, seed {seed}"
                    figures |= {} if value is None else {name: value}
            for factor in RATES[::2]:
                above = runs.minus(nats[factor], nats[1.0])
                row[f"{factor:g} x minus 1 x"] = runs.spelled(above, "+.3f")
            rows.append(row)
    title = f"{data}, {C:.0e} FLOPs, {ctx.all_seeds}: nats per token by learning rate"
    note = "\nThe rule holds where both differences are above 0, or as small as a seed's.\n"
    return results.table(title, rows) + note, figures


def plan_part(ctx, budgets):
    """(text, figures) of the runs that the curves begin with; nothing is trained or written."""
    rows, total = [], 0.0
    for C in budgets:
        for family in FAMILIES:
            sizes, start, end = window(ctx.config, family, C)
            for N in sizes[start:end]:
                keys, flops = planned(ctx, family, N, C)
                recipe = ctx.recipe(ctx.text(ctx.config["data"]), keys, flops, 0)
                tokens = recipe["max_iters"] * recipe["batch_size"] * recipe["block_size"]
                row = {"budget": f"{C:.0e}", "family": family, "parameters": N}
                row |= {"network": f"{recipe['n_layer']} x {recipe['n_embd']}"}
                row |= {"learning_rate": f"{recipe['learning_rate']:.2g}"}
                row |= {"steps": recipe["max_iters"], "tokens": tokens, "FLOPs": f"{flops:.2e}"}
                rows, total = [*rows, row], total + flops
    title = f"{len(rows)} runs a seed, {total:.2e} FLOPs, and more where a lowest is at an end"
    return results.table(title, rows), {"FLOPs of a seed": total}


def draw(axes, figures):
    """The curves and laws; of --only=rate what other rates cost, the first seed."""
    if isoflop.curves_in(figures):
        isoflop.draw(axes, figures)
    ends = {}
    for family, (n_layer, D) in itertools.product(FAMILIES, RATE_SHAPES):
        name = f"{family}, {n_layer} x {D}"
        rates = [key for key in figures if key.startswith(name)]
        seed = min((key.rpartition(" ")[2] for key in rates), default="")
        y = [figures.get(f"{name}, {factor:g} x the rate, seed {seed}") for factor in RATES]
        if rates and None not in y:
            axes.plot(RATES, [z - y[1] for z in y], "o-")
            ends[name] = RATES[-1], y[-1] - y[1]
    if ends:
        axes.set(xlabel="learning rate / the rule's", ylabel="nats per token above the rule's")
        axes.set_title("The rule of the learning rate at two widths")
        results.name_ends(axes, ends)


PLOTS = {"": draw}
PARTS = {"curves": curves_part, "rate": rate_part, "plan": plan_part}
NAMES = {"curves": "scaling", "rate": "scaling_rate"}


def main(config):
    """Train, fit, print and write; returns the figures."""
    ctx, budgets = runs.Runs(config), sorted(numbers(config, "budgets"))
    text, figures = PARTS[config["only"]](ctx, budgets)
    if config["only"] == "plan":
        ctx.of_first(lambda: print(text))
        return figures
    return ctx.write(NAMES[config["only"]], text, figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
