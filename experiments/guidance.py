"""Guidance without a teacher: does pushing away from what a model says without the context find more hidden words?

    python train.py configs/pydocs.py && python -m experiments.guidance --ckpt=out/pydocs [--quick=True]

In held-out text one word is hidden: the last of a clause, with text before it, or one in the middle of a text. All its
letters must be found, one a call, surest first. Logits are u + (1 + w)(c - u), u being what the model says without the text:

  unsupervised  the model as it is, which has learnt all masks (SMDM, arXiv 2410.18514)
  standard      fine-tuned on rows "context, word, end mark" with one context in ten hidden (arXiv 2207.12598)

w is chosen on one half of the words and judged on the other half.
"""

import random
import re
import sys
import tempfile

import torch

import checkpoint
import config as settings
import diffusion
import model as network
import sample
import train
from config import require
from data import loader, rows
from experiments import results

DEFAULTS = {
    "ckpt": "out/pydocs",  # a masked diffusion model of text, trained on `data`
    "data": "data/pydocs",  # a prepared folder; words are hidden in its val split
    "words": 800,  # of each kind; one half chooses w, the other judges it
    "max_iters": 400,  # steps of fine-tuning for standard guidance; 0: without it
}

SCALES = [0.0, 0.2, 0.4, 0.7, 1.0, 1.5]  # w
QUICK = {"words": 8, "max_iters": 2}
PAPER = (
    "For comparison, unsupervised guidance of 220M parameters, w chosen on the test sets (arXiv 2410.18514 as quoted in "
    "reviews of it): LAMBADA 36.0 to 41.0, OpenBookQA 27.0 to 34.2."
)


# ---- Hidden words ----------------------------------------------------------------------------------------------------


def clozes(text, length, n, kind, rng):
    """n triples (before, word, after), `length` characters together, no two of the same word at the same place.

    kind "last": the word ends a clause and nothing follows it; "middle": as much text after it as before it.
    """
    pattern = r"(?<= )[a-z]{4,12}(?=[.,:;!?\n])" if kind == "last" else r"(?<= )[a-z]{4,12}(?= )"
    found = []
    for match in re.finditer(pattern, text):
        start = match.end() - length if kind == "last" else (match.start() + match.end() - length) // 2
        if 0 <= start <= len(text) - length:
            found.append((text[start : match.start()], match[0], text[match.end() : start + length]))
    require(len(found) > 1, f"the text has fewer than two words ({kind}) with {length} characters around them")
    rng.shuffle(found)
    return found[:n]


def hits(model, text, items, w, autocast, end=-1):
    """Which words are found, [bool]. end: the mark behind a word, for a model of rows, which has to find the length too."""
    L = model.block_size
    x = torch.full((len(items), L), model.mask_id, device=next(model.parameters()).device)  # (N, L)
    for row, (before, _, after) in zip(x, items, strict=True):
        given = [text.encode(before)[-(L - 16) :] if end >= 0 else text.encode(before), text.encode(after)]
        row[: len(given[0])] = torch.tensor(given[0])
        row[L - len(given[1]) :] = torch.tensor(given[1], dtype=torch.long)
    want = x == model.mask_id  # (N, L)
    out, _ = sample.sample(
        model, x, "confidence", 10**6 if end < 0 else 16, temperature=0.0, cfg=w, batch_size=64, autocast=autocast
    )
    found = (ids[hidden].tolist() for ids, hidden in zip(out, want, strict=True))
    return [sample.text_of(text, ids, 0, end) == word for ids, (_, word, _) in zip(found, items, strict=True)]


# ---- Standard guidance: a model that has seen contexts hidden --------------------------------------------------------


def tune(config, text, block_size, folder):
    """Fine-tunes the checkpoint on rows of last words from the training text. -> (model, end mark)"""
    tokens = loader.Tokens(config["data"], "train")
    source = text.decode(tokens[:1_000_000].tolist())
    items = clozes(source, block_size - 16 + 8, 20_000, "last", random.Random(config["seed"]))
    cut = max(1, len(items) // 50)

    def examples():
        for i, (before, word, _) in enumerate(items):
            prompt = text.encode(before)[-(block_size - 16) :]
            yield "val" if i < cut else "train", f"word {i}", prompt, text.encode(word)

    meta = rows.prepare(f"{folder}/rows", examples(), text, block_size)
    steps = config["max_iters"]
    keys = {"data": f"{folder}/rows", "out_dir": f"{folder}/run", "init_from": config["ckpt"], "prompt_drop": 0.1}
    keys |= {
        "max_iters": steps,
        "eval_interval": steps,
        "warmup_iters": steps // 10,
        "learning_rate": 1e-3,
        "show_sample": False,
    }
    keys |= {key: config[key] for key in ("seed", "device", "dtype")}
    train.main(settings.parse([f"--{key}={value}" for key, value in keys.items()], settings, diffusion, network, train))
    return checkpoint.load(f"{folder}/run", settings.machine(config)[0])[0].eval(), meta["end"]


# ---- The recipe ------------------------------------------------------------------------------------------------------


def judge(find, items):
    """find(items, w) -> [bool]. Chooses w on the first half, judges it on the second. -> (line of the table, curve)"""
    half = len(items) // 2
    curve = [100 * sum(find(items[:half], w)) / half for w in SCALES]
    best = SCALES[max(range(len(SCALES)), key=curve.__getitem__)]
    off = find(items[half:], 0.0)
    on = find(items[half:], best) if best else off
    gains = [100 * (b - a) for a, b in zip(off, on, strict=True)]  # paired: the same words
    gain = sum(gains) / len(gains)
    spread = (sum((g - gain) ** 2 for g in gains) / max(1, len(gains) - 1) / len(gains)) ** 0.5
    share = [100 * sum(found) / len(found) for found in (off, on)]
    return {"w": best, "w = 0": share[0], "with w": share[1], "gain": gain, "half": 1.96 * spread}, curve


def main(config):
    """Writes guidance.json, .md and .png; returns the figures."""
    config |= {key: value for key, value in QUICK.items() if config["quick"] and key not in config.get("given", ())}
    settings.at_least(2, config, "words")
    settings.at_least(0, config, "max_iters")
    device, autocast = settings.machine(config)
    model, text, trained = checkpoint.load(config["ckpt"], device)
    require(
        not trained["causal"],
        f"{config['ckpt']} is a causal network: guidance masks the context, so it needs the other kind",
    )
    val = loader.Tokens(config["data"], "val")
    same = text is not None and text.meta() == val.meta["tokenizer"] and text.meta()["kind"] == "char"
    require(same, f"{config['ckpt']} must be a model of the characters of {config['data']}")
    source, L, rng = text.decode(val[: len(val)].tolist()), model.block_size, random.Random(config["seed"])
    items = {kind: clozes(source, L, config["words"], kind, rng) for kind in ("last", "middle")}

    jobs = [(kind, "unsupervised", model.eval(), -1) for kind in items]
    with tempfile.TemporaryDirectory() as folder:
        if config["max_iters"]:
            jobs.append(("last", "standard", *tune(config, text, L, folder)))
    lines, curves, figures = [], {}, {}
    for kind, how, net, end in jobs:
        line, curve = judge(lambda some, w, net=net, end=end: hits(net, text, some, w, autocast, end), items[kind])
        name = f"{kind} word, {how}"
        curves[name] = curve
        figures |= {f"{kind}_{how}_{key}": line[field] for key, field in (("w", "w"), ("off", "w = 0"), ("on", "with w"))}
        shown = {"w": f"{line['w']}", "w = 0": f"{line['w = 0']:.1f}", "with w": f"{line['with w']:.1f}"}
        shown["gain"] = f"{line['gain']:+.1f} ± {line['half']:.1f}"
        along = {f"w={w}": f"{share:.1f}" for w, share in zip(SCALES, curve, strict=True)}
        lines.append({"hidden": name, "words judged": len(items[kind]) - len(items[kind]) // 2} | shown | along)
        print(lines[-1], flush=True)
    title = "Words found, percent: w chosen on one half (columns w=...), judged on the other with 95% intervals of the gain"
    table = results.table(title, lines) + f"\n{PAPER}\n"
    print(table)

    def plot(axes):
        for name, curve in curves.items():
            axes.plot(SCALES, curve, "o-", label=name)
        axes.set(xlabel="guidance w", ylabel="words found, percent (the half that chooses w)")
        axes.legend()

    results.write(config, "guidance", figures | results.about(device), table, plot)
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
