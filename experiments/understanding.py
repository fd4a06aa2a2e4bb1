"""Does a small model understand anything: SMDM's eight tasks, and guidance that needs no teacher.

    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m experiments.understanding --from=FOLDER,FOLDER      that hold the sets, as hellaswag*

Close to chance is what byte models of minutes can be expected to be: so the first table says how
small a difference so many questions would have shown (in four samples of five, at 95%), how many
would show one of two points between MDM and ARM, and how many that MDM is not at chance. All
options are compared by nats, w = 0; a block holds the end of a long context alone.

From the published weights, each task with the estimator and the w that SMDM (arXiv 2410.18514) has
for it; RACE is RACE-high there. An ARM is asked without w.

    WEIGHTS=nieshen/SMDM/mdm_safetensors/mdm-1028M-3300e18-rsl-0.01-bs-1024.safetensors
    ask="python -m evals.choice --ckpt=$WEIGHTS --from=FOLDER"
    $ask --set=lambada --estimator=left_to_right --cfg_scale=1.1
    $ask --set=openbookqa --estimator=left_to_right --cfg_scale=1.6
    $ask --set=boolq --estimator=left_to_right --cfg_scale=1.6
    $ask --set=piqa --estimator=left_to_right --cfg_scale=0.6
    $ask --set=arc_easy --estimator=lambda_dce --draws=1024 --cfg_scale=0.6
    $ask --set=social_iqa --estimator=lambda_dce --draws=1024 --cfg_scale=0.6
    $ask --set=race --estimator=lambda_dce --draws=1024 --cfg_scale=0.7
    $ask --set=hellaswag --estimator=lambda_dce --draws=1024 --cfg_scale=0.7

w was chosen on the test sets there. Unsupervised guidance here: w is chosen on one half of the
items and reported on the other, in tasks of which this size knows something: which of four frequent
words goes on from a held-out text (by nats), and a frequent word between both sides of its context
(all letters right, one a call). reverse_curse.py has a third: invented people.

Budget: 6 runs of 1e14 FLOPs, shared with zero_shot and others, then 75 minutes on a thread.
Minimum: --flops=3e13 --limit=50.
"""

import functools
import math
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import config as settings
import evaluate
from config import UserError
from data import choice as sets
from data import loader
from data.tokenizer import from_meta
from evals import choice
from experiments import guidance, orders, papers, results, runs
from lib import program
from lib.stats import t95
from run import checkpoint

DEFAULTS = {
    "data": "data/corpus",  # a prepared folder of bytes
    "from": "",  # folders with the eight sets, with commas between them
    "flops": 1e14,  # of a run
    "limit": 200,  # questions of a set, evenly spaced; 0: all
    "draws": 16,  # for each option; 1 or more
    "words": 400,  # of each guided task; one half chooses w, the other reports it; 4 or more
}

TASKS = ["lambada", "openbookqa", "boolq", "piqa", "arc_easy", "social_iqa", "race", "hellaswag"]
POWER = 1.96 + 0.84  # standard errors of a difference that four samples of five show at 95%
FREQUENT, CONTEXT = 300, 128  # words that are frequent; characters before one of four


# ---- 1. Questions --------------------------------------------------------------------------------


def questions_of(config, name):
    """The questions of a set, `limit` of them, and how many it has."""
    for place in config["from"].split(","):
        if list(Path(place).glob(f"{name}*.jsonl*")) and Path(place).is_dir():
            questions, _ = sets.read(name, place)
            return loader.spread(questions, config["limit"]), len(questions)
    raise UserError(f"no folder of --from={config['from']} has a file {name}*.jsonl*")


def frequent_words(data):
    """(the most frequent lower-case words of the training text, the held-out text)."""
    tokenizer = from_meta(loader.read_meta(data)["tokenizer"])
    train, val = (loader.Tokens(data, split)[: 2**22] for split in ("train", "val"))
    counts = Counter(re.findall(r"\b[a-z]{4,12}\b", tokenizer.decode(train.tolist())))
    words = [word for word, _ in counts.most_common(FREQUENT)]
    return words, tokenizer.decode(val.tolist())


def clozes(text, words, length, n, place):
    """n triples (before, word, after) of ASCII whose word is one of `words`: guidance.clozes."""
    triples = guidance.clozes(text, length, len(text), place, random.Random(0))
    return [each for each in triples if each[1] in words and "".join(each).isascii()][:n]


def one_of_four(text, words, n):
    """Questions which of four frequent words goes on from a text."""
    rng, questions = random.Random(1), []
    for before, word, _ in clozes(text, words, CONTEXT, n, "last"):
        options = [word, *rng.sample([other for other in words if other != word], 3)]
        questions.append(sets.Question("", [before] * 4, options, 0))
    return questions


# ---- 2. Answers ----------------------------------------------------------------------------------


def padded(model):
    """How far rows are filled up with masks: a masked model has seen whole blocks only."""
    return 0 if model.causal else model.block_size


def right(ctx, folder, name, questions):
    """{"right": 0 or 1 for each question, "nats": of an option, the mean}; None: left out.

    The likeliest option; LAMBADA's word by greedy decoding.
    """
    if folder is None:
        return None

    def measure():
        model, tokenizer, _ = checkpoint.load(folder, ctx.device)
        parts = choice.requests_of(questions, tokenizer, model.start_id, model.block_size)
        options = {"draws": ctx.config["draws"], "progress": True, "pad_to": padded(model)}
        with ctx.autocast():
            nats = evaluate.answer_nats(model, parts[0], parts[1], **options).numpy()  # (N,)
            if name == "lambada":
                are_right = choice.decoded(model, parts[0])  # (n,)
            else:
                picks, _ = choice.likeliest(nats, questions)  # (n,)
                are_right = picks == [each.gold for each in questions]
        return {"right": list(map(int, are_right)), "nats": float(nats.mean())}

    return ctx.once([folder.name, name, len(questions), ctx.config["draws"]], measure)


def find_choice(net, questions, w):
    """Which of the questions are right by the chain rule with guidance w: [bool]."""
    model, tokenizer, autocast = net
    parts = choice.requests_of(questions, tokenizer, model.start_id, model.block_size)
    with autocast():
        options = {"estimator": "left_to_right", "cfg_scale": w, "pad_to": padded(model)}
        nats = evaluate.answer_nats(model, parts[0], parts[1], **options).numpy()  # (N,)
    picks, _ = choice.likeliest(nats, questions)  # (n,)
    return [bool(pick == each.gold) for pick, each in zip(picks, questions, strict=True)]


def guided(ctx, folder, task, items):
    """The line of guidance.choose_scale for one run; None: left out."""
    find = {"one of four": find_choice, "between": guidance.hits}[task]

    def measure():
        model, tokenizer, _ = checkpoint.load(folder, ctx.device)
        with_net = functools.partial(find, (model, tokenizer, ctx.autocast))
        return guidance.choose_scale(with_net, items)[0]

    return ctx.once([folder.name, "guided", task, len(items)], measure) if folder else None


# ---- 3. Tables -----------------------------------------------------------------------------------


def needed(values, difference):
    """How many questions would show a difference, as text: values (n,) as they were measured."""
    spread = np.std(values, ddof=1)
    return f"{math.ceil((POWER * spread / difference) ** 2):,}" if difference else "–"


def row_of(name, questions, whole, scores):
    """(row, figures) of a task; scores: {"MDM", "ARM": [of each seed]}, None where left out."""
    scores = {kind: [each for each in seeds if each] for kind, seeds in scores.items()}
    chance = statistics.mean(1 / len(question.options) for question in questions)
    chance, n = 0.0 if name == "lambada" else chance, len(questions)
    row = {"task": name.replace("_", "-"), "questions": f"{n:,} of {whole:,}"}
    row["chance"], figures, rights = f"{100 * chance:.1f}", {f"{name}, chance": 100 * chance}, {}
    for kind, seeds in scores.items():
        row[kind] = "left out"
        if seeds:
            rights[kind] = np.mean([each["right"] for each in seeds], 0)  # (n,)
            mean = float(rights[kind].mean())
            low, high = results.wilson(mean, n)
            row[kind] = f"{100 * mean:.1f} ({100 * low:.0f} to {100 * high:.0f})"
            figures |= {f"{name}, {kind}": 100 * mean, f"{name}, {kind}, low": 100 * low}
            figures |= {f"{name}, {kind}, high": 100 * high}
            figures[f"{name}, {kind}, nats an option"] = statistics.mean(z["nats"] for z in seeds)
    columns = "MDM_-_ARM", "shown_from", "for_two_points", "for_MDM_and_chance"
    row |= dict.fromkeys(columns, "left out")
    if len(rights) == 2:
        gaps = rights["MDM"] - rights["ARM"]  # (n,) paired
        more = np.append(gaps, [1, -1])  # as if each had won once more, or none were no spread
        mean, error = 100 * float(gaps.mean()), 100 * float(np.std(more, ddof=1)) / n**0.5
        above = abs(rights["MDM"].mean() - chance)
        cells = f"{mean:+.1f} ± {1.96 * error:.1f}", f"{POWER * error:.1f}"
        cells += needed(more, 0.02), needed(np.append(rights["MDM"], [0, 1]), above)
        row |= dict(zip(columns, cells, strict=True))
        figures |= {f"{name}, MDM - ARM": mean, f"{name}, MDM - ARM, half": 1.96 * error}
    return row, figures


def guided_row(name, n, lines):
    """(row, figures) of a guided task, over the seeds' lines; the items are the same for all."""
    row = {"task": name, "reported on": f"{n - n // 2} words"}
    if not (lines := [line for line in lines if line]):
        return row | dict.fromkeys(("w, by seed", "w = 0", "with w", "gain"), "left out"), {}
    means = {key: statistics.mean(line[key] for line in lines) for key in ("w = 0", "with w")}
    gains = [line["gain"] for line in lines]
    half = statistics.mean(line["half"] for line in lines)
    if len(gains) > 2:
        half = math.hypot(half, t95(len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5)
    row["w, by seed"] = ", ".join(f"{line['w']:g}" for line in lines)
    row |= {key: f"{mean:.1f}" for key, mean in means.items()}
    row["gain"] = f"{statistics.mean(gains):+.1f} ± {half:.1f}"
    figures = {f"guided, {name}, {key}": value for key, value in means.items()}
    return row, figures | {f"guided, {name}, gain": statistics.mean(gains), f"{name}, half": half}


def paper_rows():
    """SMDM's two gains as rows of the second table."""
    for task, (off, on) in papers.UNSUPERVISED.items():
        row = {"task": f"{task} (SMDM, 220M)", "reported on": "the half that chose w, too"}
        row |= {"w, by seed": "", "w = 0": f"{off:.1f}", "with w": f"{on:.1f}"}
        yield row | {"gain": f"{on - off:+.1f}"}


def draw(axes, figures):
    """Accuracies of both models with their intervals, chance as a line for each task."""
    names = [name for name in TASKS if f"{name}, chance" in figures]
    for y, name in zip(range(len(names), 0, -1), names, strict=True):
        chance = figures[f"{name}, chance"]
        axes.vlines(chance, y - 0.35, y + 0.35, color="black", linewidth=1)
        for shift, kind, color in ((0.15, "MDM", results.DARK), (-0.15, "ARM", results.LIGHT)):
            if f"{name}, {kind}" in figures:
                ends = (figures[f"{name}, {kind}{end}"] for end in ("", ", low", ", high"))
                value, low, high = ends
                axes.hlines(y + shift, low, high, color=color)
                axes.plot(value, y + shift, "o", color=color)
                if y == len(names):
                    axes.text(high + 0.5, y + shift, kind, va="center", color=color)
    axes.set_yticks(range(len(names), 0, -1), names)
    axes.set_xlabel("right answers, percent, 95% intervals over questions; lines: chance")
    axes.set_title("What a model of minutes understands can hardly be told from chance")


PLOTS = {"": draw}


def main(config):
    """Train, ask, guide; print, write and return the figures."""
    ctx, quick = runs.Runs(config), config["quick"]
    data, n = ctx.text(config["data"]), 8 if quick else config["words"]
    words, held_out = frequent_words(data)
    four = one_of_four(held_out, words, n)
    asked = {name: (four, len(four)) if quick else questions_of(config, name) for name in TASKS}
    folders, rows, figures = orders.pair(ctx, data, config["flops"]), [], {}
    for name, (questions, whole) in asked.items():
        scores = {
            kind: [right(ctx, folder, name, questions) for folder in folders[kind]]
            for kind in folders
        }
        row, measured = row_of(name, questions, whole, scores)
        rows, figures = [*rows, row], figures | measured
    title = f"Right answers, percent, 95% intervals over questions, {ctx.all_seeds} of "
    title += f"{config['flops']:.0e} FLOPs each; what {POWER} standard errors show, and how many "
    text = results.table(f"{title}questions would be needed", rows)
    block = runs.QUICK["block_size"] if quick else runs.PAIR["MDM"]["block_size"]
    items = {"one of four": four, "between": clozes(held_out, words, block, n, "middle")}
    lines = []
    for task, of_task in items.items():
        by_seed = [guided(ctx, folder, task, of_task) for folder in folders["MDM"]]
        row, more = guided_row(task, len(of_task), by_seed)
        lines, figures = [*lines, row], figures | more
    title = "Unsupervised guidance: percent right on the half of the words that did not choose w"
    text += "\n" + results.table(title, [*lines, *paper_rows()])
    return ctx.write("understanding", text, figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
