"""Text of other kinds than what was read: RADD's five sets, by a byte model and its ARM.

    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m data.zeroshot.prepare --set=all --tokenizer=byte --out=data/zeroshot_byte
    python -m data.zeroshot.prepare --set=all                 their GPT-2 tokens, for the perplexity
    python -m experiments.zero_shot

A byte model has bits per byte. All nats of a set over its number of GPT-2 tokens (border marks
included on both sides, one a row) are the nats per token that a model of GPT-2's tokens would have
to reach, and their exponential the perplexity beside RADD's (arXiv 2406.03736, tables 1 and 2: 100
times the parameters, 10^6 times the FLOPs, and 1,024 tokens of context, about 4,400 bytes). Nothing
is said about how good a byte model of RADD's size would be.

The same table from published weights, or from a run of RADD's recipe:

    python -m evals.zeroshot --ckpt=JingyangOu/radd-t-dce --block_size=1024
    python -m evals.zeroshot --ckpt=JingyangOu/radd-lambda-dce --block_size=1024
    python -m evals.zeroshot --ckpt=JingyangOu/radd-lambda-dce-medium --block_size=1024
    python -m evals.zeroshot --ckpt=out/radd_small

Second table: which order is the cheapest for language: chain rules forward, backward, along the
model's confidence and along random orders (see orders.py), on each set.

Budget: 6 runs of 1e14 FLOPs, 6e14 in all, shared with orders and infilling: 60 minutes on two cores
with bfloat16 instructions. Minimum: --flops=3e13.
"""

import math
import statistics
import sys
from pathlib import Path

import config as settings
from data import loader, tokenizer, writer
from experiments import orders, papers, results, runs
from lib import program

DEFAULTS = {
    "data": "data/corpus",  # a prepared folder of bytes
    "sets": "data/zeroshot_byte",  # the five sets as bytes
    "gpt2": "data/zeroshot",  # the five sets as GPT-2's tokens, of which only the number is read
    "flops": 1e14,  # of a run
    "chains": 16,  # blocks of each set that are read along each order; 0: no second table
}


def perplexity(nats_per_byte, n_bytes, n_tokens):
    """Perplexity per token of a text with so many bytes and tokens, from nats per byte."""
    return math.exp(min(nats_per_byte * n_bytes / n_tokens, 700.0))


def quick_sets(config):
    """The config with one small set of each name, cut from this repository's prose."""
    text = (runs.ROOT / "README.md").read_text("utf8")
    for i, name in enumerate(papers.SETS):
        part = [("test", text[1000 * i : 1000 * i + 1000])]
        writer.prepare(Path(config["runs"], "sets", name), part, tokenizer.Byte())
    place = str(Path(config["runs"], "sets"))
    return config | {"sets": place, "gpt2": place}


def sizes(config, name):
    """(bytes, GPT-2 tokens) of a set, as the two prepared folders count them."""
    counts = [loader.read_meta(Path(config[key], name)) for key in ("sets", "gpt2")]
    kind = counts[0]["tokenizer"]["kind"]
    settings.require(kind == "byte", f"{config['sets']}/{name} is prepared by {kind}, not by byte")
    return tuple(meta["splits"]["test"]["tokens"] for meta in counts)


def row_of_set(ctx, config, name, folders):
    """(row of the first table, figures) of one set."""
    row, figures = {"set": name}, {}
    n_bytes, n_tokens = sizes(config, name)
    for kind in folders:
        nats = [ctx.nats(each, f"{config['sets']}/{name}", 0, "test") for each in folders[kind]]
        known = [value for value in nats if value is not None]
        row[f"{kind}_bits_per_byte"] = runs.spelled([z / math.log(2) for z in known])
        shown = "left out"
        if known:
            ppl = [perplexity(value, n_bytes, n_tokens) for value in known]
            shown = f"{statistics.geometric_mean(ppl):,.0f}"
            figures |= {f"{name}, {kind}, perplexity, {i}": z for i, z in enumerate(ppl)}
            figures |= {f"{name}, {kind}, nats per byte, {i}": z for i, z in enumerate(known)}
        row[f"{kind}_perplexity_per_GPT-2_token"] = shown
    row["bytes_per_token"] = f"{n_bytes / n_tokens:.2f}"
    for size, which in (("small", "GPT-2"), ("small", "any_order"), ("medium", "any_order")):
        value = papers.ZERO_SHOT[size][which][papers.SETS.index(name)]
        row[f"{'RADD-AO' if which != 'GPT-2' else which} {size} (paper)"] = f"{value:.2f}"
    return row, figures


def row_of_orders(ctx, name, place, folders):
    """(row of the second table, figures) of one text."""
    split = "val" if place == ctx.config["data"] else "test"
    nats = orders.likelihoods(ctx, folders, place, ctx.config["chains"], split)
    row, figures = {"text": name}, {}
    for order, values in nats.items():
        row[order] = runs.spelled(values)
        known = [value for value in values if value is not None]
        figures |= {f"{name}, {order}, nats per byte, {i}": z for i, z in enumerate(known)}
    row["random_minus_forward"] = runs.spelled(runs.minus(nats["random"], nats["forward"]), "+.3f")
    gain = runs.minus(nats["random"], nats["confidence"])
    return row | {"random_minus_confidence": runs.spelled(gain, "+.3f")}, figures


def draw(axes, figures):
    """Perplexity per GPT-2 token of each set, ours and the papers', on a logarithmic scale."""
    shown = {"RADD-AO medium": papers.ZERO_SHOT["medium"]["any_order"]}
    shown["GPT-2 small"] = papers.ZERO_SHOT["small"]["GPT-2"]
    for kind in ("ARM", "MDM"):
        key = f"{{}}, {kind}, perplexity, 0"
        shown[f"our {kind}"] = [figures.get(key.format(name), math.nan) for name in papers.SETS]
    places = range(len(papers.SETS), 0, -1)
    for (name, values), marker in zip(shown.items(), "os^D", strict=True):
        color = results.DARK if name.startswith("our") else results.LIGHT
        axes.plot(values, places, marker, color=color, label=name)
    axes.set(xscale="log", xlabel="perplexity per GPT-2 token, the first seed's", ylim=(0.5, 6.2))
    axes.legend(ncols=len(shown), loc="upper center", frameon=False)
    axes.set_yticks(places, papers.SETS)
    axes.set_title("Text of other kinds: byte models of minutes beside the papers' (light)")


PLOTS = {"": draw}


def main(config):
    """Train, evaluate, print and write; returns the figures."""
    config = quick_sets(config) if config["quick"] else config
    for name in papers.SETS:
        sizes(config, name)  # what is missing is an error now, not after the training
    ctx = runs.Runs(config)
    folders = orders.pair(ctx, config["data"], config["flops"])
    rows, figures = [], {"flops of a run": config["flops"]}
    for name in papers.SETS:
        row, measured = row_of_set(ctx, config, name, folders)
        rows, figures = [*rows, row], figures | measured
    title = f"Byte models of 0.7M parameters, {config['flops']:.0e} training FLOPs a run; of a set "
    title += (
        f"{config['sequences']} blocks of {runs.PAIR['MDM']['block_size']} bytes, evenly spaced, "
    )
    title += f"mean ± 95% of {ctx.all_seeds}"
    text, table = results.table(title, rows), []
    for name in ["held-out", *papers.SETS] if config["chains"] else []:
        place = config["data"] if name == "held-out" else f"{config['sets']}/{name}"
        row, measured = row_of_orders(ctx, name, place, folders)
        table, figures = [*table, row], figures | measured
    if table:
        title = f"Nats per byte along an order, {config['chains']} blocks of each text"
        text += "\n" + results.table(title, table)
    return ctx.write("zero_shot", text, figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
