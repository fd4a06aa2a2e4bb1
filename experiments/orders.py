"""Which order is the cheapest for language, and which writes best?

    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m experiments.orders

A masked model can be asked along any order. Likelihood: the chain rule forward, backward, in the
model's order of confidence (at each turn the masked position whose likeliest token is most
probable; what is visible decides, so it is a chain rule like any other) and in random orders, whose
mean is the any-order bound. Beside them ARM, which has learnt forward alone. What stands between
forward and random is what an order that is never favoured in training costs.

Generation: one token a call, in the same four orders, as paths over temperatures (frontier.py). For
confidence the sampler weighs the tokens that it has drawn, as the field has it (MaskGIT, LLaDA).
RADD's table 6 (arXiv 2406.03736) has one point of each path.

Budget: 6 runs of 1e14 FLOPs, shared with zero_shot and infilling, and a judge of 2e14: 8e14 in all,
60 minutes on two cores with bfloat16 instructions. Minimum: --flops=3e13.
"""

import sys

import torch
from tqdm import tqdm

import config as settings
from experiments import frontier, papers, results, runs
from lib import program
from run import checkpoint

DEFAULTS = {
    "data": "data/corpus",  # a prepared folder
    "flops": 1e14,  # of a run
    "chains": 64,  # held-out blocks that are read along each order; 2 or more
}

ORDERS = {  # name: (options of evaluate.estimate, None: confidence_nats; sampler)
    "forward": ({"estimator": "left_to_right"}, "left_to_right"),
    "backward": ({"estimator": "right_to_left"}, "right_to_left"),
    "random": ({"estimator": "any_order", "draws": 128}, "any_order"),
    "confidence": (None, "confidence"),
}


@torch.no_grad()
def confidence_nats(model, x0, progress=False):
    """-log p(x0) (S,) along the order of confidence: x0 (S, L), L network calls."""
    S, L = x0.shape
    x, nats = torch.full_like(x0, model.mask_id), torch.zeros(S, dtype=torch.float64)  # (S, L)
    row = torch.arange(S)
    for _ in tqdm(range(L), disable=None if progress else True, leave=False):
        masked_idx = (x == model.mask_id).flatten().nonzero().flatten()  # (n,)
        device = model.device
        h = model.hidden(x.to(device), masked_idx.to(device))  # (n, D)
        log_p = model.head(h).float().log_softmax(-1).cpu()  # (n, V)
        best = torch.full((S * L,), -torch.inf).scatter(0, masked_idx, log_p.amax(1))  # (S * L,)
        position = best.view(S, L).argmax(1)  # (S,)
        at = torch.full((S * L,), -1).scatter(0, masked_idx, torch.arange(len(masked_idx)))
        chosen = at[row * L + position]  # (S,) rows of log_p
        nats -= log_p[chosen, x0[row, position]].double()
        x[row, position] = x0[row, position]
    return nats


def chain_nats(ctx, folder, data, options, n, split="val"):
    """Nats per token along an order, on n blocks; None: left out."""
    if folder is None or options:
        return ctx.nats(folder, data, n, split, **(options or {}))

    def measure():
        model, _, _ = checkpoint.load(folder, ctx.device)
        blocks = ctx.blocks(data, model.block_size, n, split)  # (S, L)
        with ctx.autocast():
            return float(confidence_nats(model, blocks, progress=True).sum()) / blocks.numel()

    return ctx.once([folder.name, str(data), "confidence", n, split], measure)


def pair(ctx, data, flops):
    """{"MDM": folders, "ARM": folders}, a folder (or None) for each seed."""
    folders = {"MDM": [], "ARM": []}
    for seed in ctx.seeds:
        for kind in folders:
            folders[kind].append(ctx.train(data, runs.PAIR[kind], flops, seed))
    return folders


def likelihoods(ctx, folders, data, n, split="val"):
    """{order: nats per token of each seed}, with the bound and ARM, all on the same blocks."""
    nats_of = {
        name: [chain_nats(ctx, each, data, options, n, split) for each in folders["MDM"]]
        for name, (options, _) in ORDERS.items()
    }
    return nats_of | {"ARM": [ctx.nats(each, data, n, split) for each in folders["ARM"]]}


PLOTS = {"": frontier.draw}


def main(config):
    """Train, read, write, judge; print, write and return the figures."""
    ctx, flops = runs.Runs(config), config["flops"]
    data = ctx.text(config["data"])
    folders = pair(ctx, data, flops)
    nats = likelihoods(ctx, folders, data, config["chains"])
    field = frontier.Frontier(ctx, data, flops)
    points, references = [], field.references()
    rows, figures = [], {"flops of a run": flops}
    for name, values in nats.items():
        row = {"order": name, "nats_per_token": runs.spelled(values)}
        above = runs.minus(values, nats["random"])
        row["minus_random"] = "" if name == "random" else runs.spelled(above, "+.3f")
        paths = []
        if name in ORDERS:
            options = {"sampler": ORDERS[name][1], "steps": config["length"]}
            paths = [field.path(folder, name, **options) for folder in folders["MDM"]]
        points += paths[0] if paths else []
        for key, shown in (("nats", "judge's_nats"), ("js", "n-gram_distance")):
            at = [frontier.at_entropy(path + references, name, key) for path in paths]
            known = [value for value in at if value is not None]
            none = "-" if not paths else "" if any(paths) else "left out"
            row[shown] = runs.spelled(known) if known else none
            figures |= {f"{key} at the text's entropy, {name}, {i}": v for i, v in enumerate(known)}
        paper = papers.ORDERS.get(name)
        rows.append(row | {"RADD's generative perplexity": f"{paper:.1f}" if paper else ""})
        for seed, value in zip(ctx.seeds, values, strict=True):
            figures |= {} if value is None else {f"nats per token, {name}, seed {seed}": value}
    title = f"{data}, {flops:.0e} training FLOPs a run, mean ± 95% of {ctx.all_seeds}; judged"
    title += " at the entropy of held-out text, between the temperatures (empty: it is outside)"
    text = results.table(title, rows)
    points += references
    if points:
        title = f"The first seed, {field.N} samples a point, judged by {field.judge}, ± one "
        text += "\n" + results.table(f"{title}standard error", frontier.table_rows(points))
    return ctx.write("orders", text, figures | frontier.figures_of(points), PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, frontier, sys.modules[__name__])
