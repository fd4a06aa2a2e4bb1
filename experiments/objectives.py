"""Do RADD's objectives train the same model, and what does the noise of each cost?

    python -m data.pydocs.prepare
    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m experiments.objectives

t_dse (unnormalised), t_dce, lambda_dce and any_order have one expectation (RADD, arXiv 2406.03736,
eq. 3.7) and differ in the noise of a draw. Each is trained with the weight of the bound to equal
FLOPs, with stratified and with independent draws, on both texts (TRAIN and HELD_OUT: ours are
Wikipedia articles and books). Beside them: t_dce with another schedule, any_order with the square
root of the weight, which is the demo's, and ARM. All masked models are evaluated by any_order on
the same blocks with the same draws.

Noise. At three points of a run (a third, two thirds, the end) the gradient of a batch is taken for
several batches of text and several draws of the mask for each. Its variance has two parts: of the
draw for one batch of text, and of the text, which ARM has alone. Both are divided by the square of
the expected gradient: at 1 a batch's noise is as long as what it has to say.

Budget: 60 runs of 1e13 FLOPs, 6e14 in all: 60 minutes on two cores with bfloat16 instructions.
Minimum: 1e13 a run, the least at which the bound is well below what counting bigrams has.
"""

import itertools
import statistics
import sys

import torch

import config as settings
import diffusion
import train
from data import loader
from experiments import papers, results, runs
from lib import fused, philox, program
from run import checkpoint

DEFAULTS = {
    "data": "data/pydocs,data/corpus",  # prepared folders, one table each
    "flops": 1e13,  # of a run
    "batches": 8,  # of text, for the noise of the gradient
    "repeats": 4,  # draws of the mask for each
}

MASKED = {
    "any_order": {"objective": "any_order"},
    "lambda_dce": {"objective": "lambda_dce"},
    "t_dce": {"objective": "lambda_dce"},  # m = t, so they are equal draw for draw: one run
    "t_dce cosine": {"objective": "t_dce", "schedule": "cosine"},
    "t_dse": {"objective": "t_dse"},
}
KINDS = {  # what a row differs in
    f"{name}, {how}": keys | {"loss_weight": "bound", "independent": how != "stratified"}
    for name, keys in MASKED.items()
    for how in ("stratified", "independent")
}
BASE, ARM, DEMO = "any_order, stratified", "ARM", "any_order, square root of the weight"
KINDS |= {ARM: {"objective": "ar"}, DEMO: {"objective": "any_order", "loss_weight": "sqrt"}}


# ---- The noise of a gradient ---------------------------------------------------------------------


def parts_of_variance(gradients):
    """Variances (of the draw, of the text) of g (batches, repeats, P), and the mean's square.

    Each is a sum over P, without bias: one-way analysis of variance. The variance of a batch's mean
    holds 1/repeats of the draw's, and the square of the grand mean 1/batches of that.
    """
    batches, repeats, _ = gradients.shape
    draw = gradients.var(1).mean(0).sum()
    between = gradients.mean(1).var(0).sum()
    square = gradients.mean((0, 1)).square().sum() - between / batches
    return float(draw), float(between - draw / repeats), float(square)


def noise(ctx, folder, step, kind):
    """(draw, text): parts_of_variance over the square, of a run's gradient at a checkpoint."""
    model, _, trained = checkpoint.load(folder / f"ckpt_{step}.pt", ctx.device)
    model.train()
    loss_of = diffusion.Loss(model, trained["objective"])
    B, L = trained["batch_size"], model.block_size
    text = loader.Blocks(loader.Tokens(trained["data"], "train"), L, seed=0)
    small = ctx.config["quick"]
    batches, repeats = (2, 2) if small else (ctx.config["batches"], ctx.config["repeats"])
    weights, gradients = list(model.parameters()), []
    with runs.independent_draws(KINDS[kind].get("independent", False)):
        for number, repeat in itertools.product(range(batches), range(repeats)):
            x0 = torch.from_numpy(text.batch(number * B, range(B)))  # (B, L)
            # A row has a stratum of its own, so which text has which is part of the draw.
            x0 = x0[philox.uniforms(repeat, number, [0], B)[0].argsort()]
            batch = [x0]
            if trained["objective"] != "ar":
                draws = trained | {"seed": 10_000 + repeat}
                mask, weight, _ = train.draw_training_mask(draws, number, range(B), L)
                batch += [mask, weight.float(), fused.masked_indices(mask, 128)]
            with ctx.autocast():
                loss, _ = loss_of(*(z.to(ctx.device) for z in batch))
            each = torch.autograd.grad(loss / x0.numel(), weights)
            gradients.append(torch.cat([g.flatten() for g in each]).cpu())  # (P,)
    table = torch.stack(gradients).view(batches, repeats, -1)  # (batches, repeats, P)
    draw, text, square = parts_of_variance(table)
    return draw / square, text / square


def noise_of_run(ctx, folder, kind):
    """[(noise of the draw, of the text)] after each third of a run, as far as there was time."""
    noises = []
    for step in sorted(checkpoint.kept_beside(folder / "ckpt.pt")):
        parts = [folder.name, step, ctx.config["batches"], ctx.config["repeats"], "noise"]
        part = ctx.once(parts, lambda step=step: noise(ctx, folder, step, kind))
        noises += [part] if part else []
    return noises


# ---- One text ------------------------------------------------------------------------------------


def one_text(ctx, data, folders):
    """(rows of the table, figures) of one text, from {kind: a folder or None for each seed}."""
    nats = {kind: [ctx.nats(each, data) for each in folders[kind]] for kind in KINDS}
    rows, figures = [], {}
    for kind in KINDS:
        objective, _, how = kind.partition(", ")
        above = runs.minus(nats[kind], nats[BASE])
        row = {"objective": objective, "draws": how, "nats_per_token": runs.spelled(nats[kind])}
        row["minus_any_order"] = "" if kind == BASE else runs.spelled(above, "+.3f")
        done = [folder for folder in folders[kind] if folder]
        noises = noise_of_run(ctx, done[0], kind) if done else []
        for i, part in enumerate(("draw", "text")):
            row[f"noise_of_the_{part}"] = ", ".join(f"{noise[i]:.2g}" for noise in noises)
        seconds = [ctx.curve(folder)[1] for folder in done]
        row["seconds"] = f"{statistics.mean(seconds):.0f}" if seconds else ""
        for size in ("small", "medium"):
            paper = objective in papers.ZERO_SHOT[size] and how == "stratified"
            above = papers.nats_above(objective, "any_order", size) if paper else 0
            row[f"RADD_{size}"] = f"{above:+.3f}" if above else ""
        rows.append(row)
        for seed, value in zip(ctx.seeds, nats[kind], strict=True):
            figures |= {} if value is None else {f"{data}, {kind}, seed {seed}": value}
        for third, pair in enumerate(noises, 1):
            for part, value in zip(("draw", "text"), pair, strict=True):
                figures[f"{data}, {kind}, noise of the {part} after {third} thirds"] = value
        curve = ctx.curve(done[0])[0] if done else []
        figures |= runs.flat(f"{kind} on {data}", curve)
    return rows, figures


def draw(axes, figures):
    """Nats per token against FLOPs, a field for each text; the stratified ones and ARM."""
    curves = runs.curves_in(figures)
    texts = list(dict.fromkeys(name.rpartition(" on ")[2] for name in curves))
    figure = axes.figure
    figure.set_size_inches(8, 4)
    axes.remove()
    fields = figure.subplots(1, max(1, len(texts)), squeeze=False)[0]
    for field, data in zip(fields, texts, strict=False):
        ends, styles = {}, itertools.cycle(("-", "--", ":", "-."))
        for kind in KINDS:
            curve = curves.get(f"{kind} on {data}")
            if curve and not kind.startswith("t_dce,") and not kind.endswith("independent"):
                x, y = zip(*curve, strict=True)
                color = results.LIGHT if kind == ARM else results.DARK
                field.plot(x, y, next(styles), color=color)
                ends[kind.removesuffix(", stratified")] = x[-1], y[-1]
        field.set(xlabel="training FLOPs", ylabel="nats per token (64 blocks)")
        field.xaxis.set_major_formatter("{x:.0e}")
        field.set_title(f"{data}: one bound, {len(ends) - 1} ways to draw it")
        results.name_ends(field, ends)


PLOTS = {"": draw}


def main(config):
    """Train, measure, print and write; returns the figures."""
    ctx, texts, figures = runs.Runs(config), [], {}
    names = dict.fromkeys(map(ctx.text, config["data"].split(",")))
    folders = {data: {kind: [] for kind in KINDS} for data in names}
    for seed, data, kind in itertools.product(ctx.seeds, names, KINDS):
        folders[data][kind].append(ctx.train(data, KINDS[kind], config["flops"], seed))
    for data in names:
        rows, measured = one_text(ctx, data, folders[data])
        figures |= measured
        title = f"{data}, {config['flops']:.0e} training FLOPs a run, held-out text, mean ± 95% "
        title += f"of {ctx.all_seeds}; noise of a batch's gradient after each third of a run"
        texts.append(results.table(title, rows))
    note = "RADD's columns: mean over its five sets of log perplexity above any_order's, nats per "
    texts.append(f"{note}GPT-2 token (tables 1 and 2, 400,000 steps).\n")
    figures["flops of a run"] = config["flops"]
    return ctx.write("objectives", "\n".join(texts), figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
