"""What an interval of a given width takes in network rows, by each estimator of evaluate.py.

    python -m experiments.variance --ckpt=out/pydocs --data=data/pydocs

Each estimator is repeated on the same held-out blocks by independent sets of draws. The variance of
a set's mean, times the rows of the network that the set needs, says how many rows make the mean
over a text as sharp as +- 0.01 nats per token: a number that does not depend on how many blocks the
text has.

Why stratified, paired draws need so few: the cross-entropy of a token depends mostly on how much of
the text is masked, u. Strata leave nothing of that to chance, and a pair (u, 1 - u) nearly nothing,
since it is nearly straight in u. What remains is which tokens are masked when few are.
"""

import math
import re
import sys
import time

import torch
from tqdm import tqdm

import config as settings
import diffusion
import evaluate
from config import plural, require
from data import loader
from experiments import results
from lib import program
from lib.stats import finite
from run.rows import distinct_uniforms, random_numbers
from run.subject import load_evaluable

DEFAULTS = {
    "ckpt": "out/pydocs",  # a trained masked model
    "data": "data/pydocs",  # a prepared folder
    "split": "val",
    "sequences": 32,  # blocks, evenly spaced over the split; 2 or more
    "draws": 128,  # of each estimator, 2 or more, for each block; a sixteenth for the chain rule
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
def repeated(subject, x0, method, n_sets, config):
    """The means of n_sets independent sets for each block: x0 (S, L) -> (S, n_sets), per token."""
    estimator, schedule, size, source = method
    (S, L), seed, schedule = x0.shape, config["seed"], diffusion.SCHEDULES[schedule]
    rule = evaluate.ESTIMATORS[estimator]
    turns = 1 if rule.row else L
    rows = torch.arange(S * n_sets * size * turns)  # each a block, set, draw, turn
    nats = torch.zeros(S * n_sets, dtype=torch.float64)
    pieces, name = rows.split(config["batch_size"]), f"{estimator} by {size}"
    for part in tqdm(pieces, desc=name, disable=None, leave=False):
        turn, draw, place = part % turns, part // turns % size, part // turns // size  # (b,) each
        u, noise = random_numbers(seed, 0, place, draw, size, L)  # (b,), (b, L)
        if source == "unpaired":
            jitter = distinct_uniforms(seed, 1, place * size + draw, 1)  # (b, 1)
            u = (draw + 1 - jitter.squeeze(1)) / size
        if source == "published":
            mask, weight = diffusion.draw_mask(estimator, u, noise)  # (b, L), (b,)
            weight = weight[:, None] * mask  # (b, L)
        else:
            numbers = evaluate.RowNoise(u, noise, turn, torch.zeros_like(place), schedule)
            mask, weight = rule.row_of(numbers)  # (b, L) each
        block = x0[place // n_sets]  # (b, L)
        with subject.autocast():
            row_nats = evaluate.nats_of_rows(subject.model, block, mask, weight, rule)  # (b,)
        nats.index_add_(0, place, row_nats.cpu().double() / size / L)
    return finite(nats.view(S, n_sets), "log-likelihoods")


def measure(name, subject, x0, config):
    """A row of the table: the mean, and the variance of a network row with its standard error."""
    (estimator, _, size, _), (S, L) = METHODS[name], x0.shape
    rule = evaluate.ESTIMATORS[estimator]
    chain, exact = rule.row is None, rule.exact
    n_sets = 1 if exact else max(2, config["draws"] // size // (16 if chain else 1))
    began = time.time()
    sets = repeated(subject, x0, METHODS[name], n_sets, config)  # (S, n_sets)
    rows = size * (L if chain else 1)  # of a set
    of_block = torch.zeros(S) if exact else sets.var(1) * rows  # (S,) were rows independent
    variance, error = of_block.mean().item(), of_block.std().item() / math.sqrt(S)
    return {
        "estimator": name,
        "nats_per_token": sets.mean().item(),
        "rows_a_draw": rows // size,
        "variance_of_a_row": variance,
        "known_to": error / variance if variance else 0.0,
        "rows_for_0.01": 1.96**2 * variance / 1e-4,
        "seconds": time.time() - began,
    }


def key(name):
    """The name of a method in the figures."""
    return re.sub(r"\W+", "_", name).strip("_")


def draw(axes, figures):
    """Bars: rows of the network for +- 0.01 nats per token."""
    rows = {name: figures.get(f"rows_for_0.01_{key(name)}") for name in METHODS}
    rows = {name: rows[name] for name in sorted(rows, key=lambda n: rows[n] or 0) if rows[name]}
    results.bars(axes, rows, light=[name for name in rows if "i.i.d." in name])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("rows through the network for a 95% interval of ± 0.01 nats per token")
    axes.set_title("Independent draws (light) cost many times what stratified and paired ones do")


PLOTS = {"": draw}


def main(config):
    """Print, write and return the variance of each method's rows, and what an interval takes."""
    config = config | ({"draws": 16, "sequences": 4} if config["quick"] else {})
    subject = load_evaluable(evaluate.DEFAULTS | config)
    exact = f"{config['ckpt']} is causal: its likelihood is exact and needs no draws"
    require(not subject.causal, exact)
    tokens, L = loader.Tokens(config["data"], config["split"]), subject.model.block_size
    other = f"{config['data']} has another vocabulary than {config['ckpt']}"
    require(tokens.vocab_size == subject.model.vocab_size, other)
    starts = loader.spread(range(0, len(tokens) - L + 1, L), config["sequences"])
    require(starts, f"{config['data']} {config['split']} holds no block of {L} tokens")
    x0 = torch.stack([torch.from_numpy(tokens[start : start + L]) for start in starts])  # (S, L)

    rows = [measure(name, subject, x0, config) for name in METHODS]
    base = rows[0]["variance_of_a_row"]
    for row in rows:
        row["share_of_iid"] = row["variance_of_a_row"] / base
    formats = {
        "nats_per_token": "{:.3f}",
        "variance_of_a_row": "{:.4f}",
        "known_to": "{:.0%}",
        "share_of_iid": "{:.2f}",
    }
    title = f"{config['ckpt']}, {plural(len(x0), 'block')} of {L} "
    title += f"of {config['data']} {config['split']}"
    text = results.table(title, rows, formats | {"seconds": "{:.0f}"})
    drawn = {key(row["estimator"]): row for row in rows if row["variance_of_a_row"]}
    figures = {f"share_of_iid_{name}": row["share_of_iid"] for name, row in drawn.items()}
    figures |= {f"rows_for_0.01_{name}": row["rows_for_0.01"] for name, row in drawn.items()}
    seconds = sum(row["seconds"] for row in rows)
    figures |= {"seed": config["seed"], "seconds": seconds}
    figures |= results.about(subject.model.device)
    results.write(config, "variance", figures, text, PLOTS)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
