"""What an interval of a given width costs in network rows: the estimators of likelihood.py on a trained model.

    python -m experiments.variance --ckpt=out/pydocs --data=data/pydocs

Each estimator is repeated on the same held-out blocks by independent sets of draws. The variance of a set's mean, times the
rows of the network that the set needs, says how many rows make the mean over a text as sharp as +- 0.01 nats per token: a
number that does not depend on how many blocks the text has.

Why stratified, paired draws need so few: what a token costs depends mostly on how much of the text is hidden, u. Strata
leave nothing of that to chance, and a pair (u, 1 - u) nearly nothing, since the cost is nearly straight in u. What remains
is which tokens are hidden when few are.
"""

import math
import re
import sys
import time

import torch
from tqdm import tqdm

import checkpoint
import config as settings
import diffusion
import likelihood
from config import require
from data import loader
from experiments import results

DEFAULTS = {
    "ckpt": "out/pydocs",  # a trained masked model
    "data": "data/pydocs",  # a prepared folder
    "split": "val",
    "sequences": 32,  # blocks, evenly spaced over the split
    "draws": 128,  # of each estimator for each block; of the chain rule, which needs a row a token, a sixteenth
    "batch_size": 64,  # rows in one network call
}

# What is compared: name -> (estimator, schedule, draws in a set, where the numbers come from).
METHODS = {
    "any_order, i.i.d.": ("any_order", "loglinear", 1, "ours"),
    "any_order, stratified (4)": ("any_order", "loglinear", 4, "unpaired"),
    "any_order, pairs": ("any_order", "loglinear", 2, "ours"),
    "any_order, stratified in pairs (4)": ("any_order", "loglinear", 4, "ours"),
    "any_order, stratified in pairs (16)": ("any_order", "loglinear", 16, "ours"),
    "lambda_dce, i.i.d., as published": ("lambda_dce", "loglinear", 1, "published"),
    "lambda_dce, i.i.d.": ("lambda_dce", "loglinear", 1, "ours"),
    "lambda_dce, stratified in pairs (4)": ("lambda_dce", "loglinear", 4, "ours"),
    "t_dce cosine, stratified in pairs (4)": ("t_dce", "cosine", 4, "ours"),
    "chain, random orders": ("chain", "loglinear", 1, "ours"),
    "left_to_right": ("left_to_right", "loglinear", 1, "ours"),
}


@torch.no_grad()
def repeated(model, x0, method, n_sets, config, autocast):
    """The means of n_sets independent sets for each block: x0 (S, L) -> (S, n_sets), nats per token."""
    estimator, schedule, size, source = method
    S, L = x0.shape
    turns = L if estimator in ("chain", "left_to_right") else 1
    item = torch.arange(S * n_sets * size * turns)  # a row each: block, set, draw, turn
    nats = torch.zeros(S * n_sets, dtype=torch.float64)
    for part in tqdm(item.split(config["batch_size"]), desc=f"{estimator} by {size}", disable=None, leave=False):
        turn, draw, place = part % turns, part // turns % size, part // turns // size  # (b,) each
        u, noise = likelihood.random_numbers(config["seed"], 0, place, draw, size, L)  # (b,), (b, L)
        if source == "unpaired":
            jitter = likelihood.distinct_uniforms(config["seed"], 1, place * size + draw, 1).squeeze(1)  # (b,)
            u = (draw + 1 - jitter) / size
        block, prompt = x0[place // n_sets], torch.zeros_like(place)  # (b, L), (b,)
        if source == "published":
            mask, weight = diffusion.draw_mask(estimator, u, noise)  # (b, L), (b,)
            weight = weight[:, None] * mask  # (b, L)
        else:
            mask, weight = likelihood.network_row(estimator, u, noise, turn, prompt, schedule)  # (b, L) each
        with autocast():
            found = likelihood.rows_nats(model, block, mask, weight, torch.zeros_like(mask), estimator, cfg=0.0)
        nats.index_add_(0, place, found / size / L)
    return nats.view(S, n_sets)


def measure(name, model, x0, config, autocast):
    """One row of the table: the mean, and the variance of a network row with what it is known to (a standard error)."""
    estimator, _, size, _ = METHODS[name]
    chain, exact = estimator == "chain", estimator == "left_to_right"
    n_sets = 1 if exact else max(2, config["draws"] // size // (16 if chain else 1))
    began = time.time()
    sets = repeated(model, x0, METHODS[name], n_sets, config, autocast)  # (S, n_sets)
    cost = size * (x0.shape[1] if chain or exact else 1)  # rows of a set
    of_block = sets.var(1) * cost if not exact else torch.zeros(len(x0))  # (S,) of one row, were rows independent
    variance, error = of_block.mean().item(), of_block.std().item() / math.sqrt(len(x0))
    row = {
        "estimator": name,
        "nats_per_token": sets.mean().item(),
        "rows_a_draw": cost // size,
        "variance_of_a_row": variance,
    }
    known = error / variance if variance else 0.0
    return row | {"known_to": known, "rows_for_0.01": 1.96**2 * variance / 1e-4, "seconds": time.time() - began}


def draw(rows):
    """Bars: rows of the network for +- 0.01 nats per token."""

    def fill(axes):
        shown = [row for row in rows if row["variance_of_a_row"]][::-1]
        axes.barh([row["estimator"] for row in shown], [row["rows_for_0.01"] for row in shown])
        axes.set_xlabel("rows through the network for a 95% interval of +- 0.01 nats per token")

    return fill


def main(config):
    settings.at_least(2, config, "sequences", "draws")
    device, autocast = settings.machine(config)
    model, _, trained = checkpoint.load(config["ckpt"], device)
    require(not trained["causal"], f"{config['ckpt']} is causal: its likelihood is exact and needs no draws")
    tokens, L = loader.Tokens(config["data"], config["split"]), model.block_size
    require(tokens.vocab_size == model.vocab_size, f"{config['data']} has another vocabulary than {config['ckpt']}")
    starts = likelihood.spread(range(0, len(tokens) - L + 1, L), 4 if config["quick"] else config["sequences"])
    require(starts, f"{config['data']} {config['split']} holds no block of {L} tokens")
    x0 = torch.stack([torch.from_numpy(tokens[start : start + L]) for start in starts])  # (S, L)
    if config["quick"]:
        config = config | {"draws": 16}

    rows = [measure(name, model, x0, config, autocast) for name in METHODS]
    base = rows[0]["variance_of_a_row"]
    for row in rows:
        row["share_of_iid"] = row["variance_of_a_row"] / base
    formats = {"nats_per_token": "{:.3f}", "variance_of_a_row": "{:.4f}", "known_to": "{:.0%}", "share_of_iid": "{:.2f}"}
    title = f"{config['ckpt']}, {len(x0)} blocks of {L} of {config['data']} {config['split']}"
    text = results.table(title, rows, formats | {"seconds": "{:.0f}"})
    print(text)
    drawn = {re.sub(r"\W+", "_", row["estimator"]).strip("_"): row for row in rows if row["variance_of_a_row"]}
    figures = {f"share_of_iid_{name}": row["share_of_iid"] for name, row in drawn.items()}
    figures |= {f"rows_for_0.01_{name}": row["rows_for_0.01"] for name, row in drawn.items()}
    figures |= {"seed": config["seed"], "seconds": sum(row["seconds"] for row in rows)} | results.about(device)
    results.write(config, "variance", figures, text, draw(rows))
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
