"""Guidance without a teacher: does pushing away from what a model says without the context help?

    python train.py configs/pydocs.py && python -m experiments.guidance --ckpt=out/pydocs [--quick]

In held-out text one word is masked: the last of a clause, with text before it, or one in the middle
of a text. All its letters must be found, one a call, the most confident first. Logits are
u + (1 + w)(c - u), u being what the model says without the text:

  unsupervised  the model as it is, which has learnt all masks (SMDM, arXiv 2410.18514)
  standard      fine-tuned on examples "context, word, eos" with one context in ten masked
                (arXiv 2207.12598)

w is chosen on one half of the words and evaluated on the other half.
"""

import functools
import random
import re
import sys
import tempfile

import torch

import config as settings
import sample
import train
from config import require
from data import examples, loader
from experiments import results
from lib import program
from lib.device import machine
from lib.stats import mean_and_error, plus_minus
from run import checkpoint
from run import subject as subjects

DEFAULTS = {
    "ckpt": "out/pydocs",  # a masked diffusion model of text, trained on `data`
    "data": "data/pydocs",  # a prepared folder; words are masked in its val split
    "words": 800,  # of each kind; one half chooses w, the other evaluates it; 2 or more
    "max_iters": 400,  # steps of fine-tuning for standard guidance; 0: without it
}

SCALES = [0.0, 0.2, 0.4, 0.7, 1.0, 1.5]  # w
GAP = 16  # tokens that an example of standard guidance leaves for the word
RECIPE = {"optimizer": "adamw", "loss_weight": "bound", "batch_size": 32, "weight_decay": 0.1}
RECIPE |= {"mask_rate": "uniform"}
RECIPE |= {"lr_decay": "cosine", "decay_start": 0.0, "compile": False}  # of fine-tuning
QUICK = {"words": 8, "max_iters": 2}
PATTERNS = {  # of a word; "last": of a clause
    "last": r"(?<= )[a-z]{4,12}(?=[.,:;!?\n])",
    "middle": r"(?<= )[a-z]{4,12}(?= )",
}
PAPER = (
    "For comparison, unsupervised guidance of 220M parameters, w chosen on the test sets (arXiv "
    "2410.18514 as quoted in reviews of it): LAMBADA 36.0 to 41.0, OpenBookQA 27.0 to 34.2."
)


# ---- 1. Masked words -----------------------------------------------------------------------------


def clozes(text, length, n, place, rng):
    """n triples (before, word, after), `length` characters together, no occurrence of a word twice.

    place "last": the word ends a clause and nothing follows it; "middle": as much text after it as
    before it.
    """
    triples = []
    for match in re.finditer(PATTERNS[place], text):
        start, end = match.span()
        first = end - length if place == "last" else (start + end - length) // 2
        if 0 <= first <= len(text) - length:
            triples.append((text[first:start], match[0], text[end : first + length]))
    few = f"the text has fewer than two words ({place}) with {length} characters around them"
    require(len(triples) > 1, few)
    rng.shuffle(triples)
    return triples[:n]


def hits(net, items, w, eos=-1):
    """Which words are found, [bool]; net: (model, tokenizer, autocast).

    eos: of a model of examples, which has to find the length of the word too.
    """
    model, tokenizer, autocast = net
    L, device = model.block_size, model.device
    x = torch.full((len(items), L), model.mask_id, device=device)  # (N, L)
    for row, (before, _, after) in zip(x, items, strict=True):
        head, tail = tokenizer.encode(before), tokenizer.encode(after)
        head = head[-(L - GAP) :] if eos >= 0 else head
        row[: len(head)] = torch.tensor(head)
        row[L - len(tail) :] = torch.tensor(tail, dtype=torch.long)
    masked = x == model.mask_id  # (N, L)
    options = {"sampler": "confidence", "steps": 10**6 if eos < 0 else GAP, "temperature": 0.0}
    with autocast():
        out, _ = sample.sample(model, x, cfg_scale=w, batch_size=64, **options)  # (N, L)
    words = [sample.text_of(tokenizer, out[i][masked[i]].tolist(), 0, eos) for i in range(len(x))]
    return [written == word for written, (_, word, _) in zip(words, items, strict=True)]


# ---- 2. Standard guidance: a model that has seen its contexts masked -----------------------------


def tune(config, tokenizer, block_size, folder):
    """Fine-tunes the checkpoint on last words from the training text -> (model, eos)."""
    tokens = loader.Tokens(config["data"], "train")
    source, rng = tokenizer.decode(tokens[:1_000_000].tolist()), random.Random(config["seed"])
    items = clozes(source, block_size - GAP + 8, 20_000, "last", rng)
    n_val = max(1, len(items) // 50)

    def tokenized():
        for i, (before, word, _) in enumerate(items):
            prompt = tokenizer.encode(before)[-(block_size - GAP) :]
            yield "val" if i < n_val else "train", f"word {i}", prompt, tokenizer.encode(word)

    data, out, steps = f"{folder}/examples", f"{folder}/run", config["max_iters"]
    meta = examples.prepare(data, tokenized(), tokenizer, block_size)
    keys = {"data": data, "out_dir": out, "init_from": config["ckpt"], "prompt_drop": 0.1}
    keys |= {"max_iters": steps, "eval_interval": steps, "warmup_iters": steps // 10}
    keys |= {"learning_rate": 1e-3, "show_sample": False} | RECIPE
    keys |= {key: config[key] for key in ("seed", "device", "dtype")}
    words = [f"--{key}={value}" for key, value in keys.items()]
    train.main(settings.parse(words, *train.MODULES))
    return checkpoint.load(out, machine(config)[0])[0].eval(), meta["end"]


# ---- 3. The recipe -------------------------------------------------------------------------------


def choose_scale(find, items):
    """Choose w on the first half of the items and evaluate it on the other.

    find(items, w) -> [bool] -> (line of the table, curve)
    """
    half = len(items) // 2
    curve = [100 * sum(find(items[:half], w)) / half for w in SCALES]
    best = SCALES[max(range(len(SCALES)), key=curve.__getitem__)]
    off = find(items[half:], 0.0)
    on = find(items[half:], best) if best else off
    gain, error = mean_and_error([100 * (b - a) for a, b in zip(off, on, strict=True)])  # paired
    share = [100 * sum(hit) / len(hit) for hit in (off, on)]
    line = {"w": best, "w = 0": share[0], "with w": share[1]}
    return line | {"gain": gain, "half": 1.96 * error}, curve


def load_subject(config):
    """((model, tokenizer, autocast), held-out text) of ckpt and data; UserError for a bad pair."""
    subject, ckpt = subjects.load_subject(config, reads_text=True), config["ckpt"]
    model, tokenizer, trained, autocast, _ = subject
    advice = "guidance masks the context, so it needs attention=full"
    require(trained["attention"] == "full", f"{ckpt} has {trained['attention']}: {advice}")
    val = loader.Tokens(config["data"], "val")
    same_tokenizer = tokenizer.meta() == val.meta["tokenizer"]
    of_characters = same_tokenizer and tokenizer.kind == "char"
    require(of_characters, f"{ckpt} must be a model of the characters of {config['data']}")
    return (model, tokenizer, autocast), tokenizer.decode(val[:].tolist())


def shown(name, line, curve, n):
    """The line as the table shows it, n being how many words w was evaluated on."""
    row = {"masked": name, "words evaluated": n, "w": f"{line['w']}"}
    row |= {key: f"{line[key]:.1f}" for key in ("w = 0", "with w")}
    row["gain"] = f"{line['gain']:+.1f}{plus_minus(line['half'], '.1f', '±')}"
    return row | {f"w={w}": f"{share:.1f}" for w, share in zip(SCALES, curve, strict=True)}


def draw(axes, figures):
    """Gains in points with their intervals, SMDM's beside."""
    ends = {name.removesuffix("_half"): name for name in figures if name.endswith("_half")}
    gains = {name.replace("_", " word, "): figures[f"{name}_gain"] for name in ends}
    halves = {name.replace("_", " word, "): figures[end] for name, end in ends.items()}
    theirs = {"SMDM 220M, LAMBADA": 5.0, "SMDM 220M, OpenBookQA": 7.2}
    results.bars(axes, gains | theirs, "{:+.1f}", light=theirs, errors=halves)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("what guidance adds to the words found, percentage points; 95% intervals")
    axes.set_title("At this size guidance adds nothing that can be told")


PLOTS = {"": draw}


def main(config):
    """Write guidance.json, .md and .png; return the figures."""
    if config["quick"]:
        config |= {k: v for k, v in QUICK.items() if k not in config.get("user_keys", ())}
    net, source = load_subject(config)
    model, tokenizer, autocast = net
    L, rng = model.block_size, random.Random(config["seed"])
    items = {place: clozes(source, L, config["words"], place, rng) for place in PATTERNS}
    jobs = [(place, "unsupervised", net, -1) for place in items]
    with tempfile.TemporaryDirectory() as folder:
        if config["max_iters"]:
            tuned, eos = tune(config, tokenizer, L, folder)
            jobs.append(("last", "standard", (tuned, tokenizer, autocast), eos))

    rows, curves, figures = [], {}, {}
    for place, form, net, eos in jobs:
        find = functools.partial(hits, net, eos=eos)
        line, curve = choose_scale(find, items[place])
        name = f"{place} word, {form}"
        curves[name] = curve
        keys = {"w": "w", "off": "w = 0", "on": "with w", "gain": "gain", "half": "half"}
        figures |= {f"{place}_{form}_{key}": line[column] for key, column in keys.items()}
        rows.append(shown(name, line, curve, len(items[place]) - len(items[place]) // 2))
        print(rows[-1], flush=True)
    title = (
        "Words found, percent: w chosen on one half (columns w=...), evaluated on the other with "
        "95% intervals of the gain"
    )
    table = results.table(title, rows) + f"\n{PAPER}\n"
    figures |= results.about(model.device)
    results.write(config, "guidance", figures, table, PLOTS)
    print(table)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
