"""The reversal curse (arXiv 2309.12288), asked of a masked diffusion model and of a causal one.

    python -m experiments.reverse_curse [--quick] [--from=FOLDER]

Berglund's file tells of 30 people name first ("NAME is DESCRIPTION"), of 30 description first, and
of 30 in both orders. A causal model that learnt one order cannot answer in the other: it knows
p(name | what stands before it) alone. A masked diffusion model has learnt p(masked | visible) for
every split of a line in two, so it may: SMDM (arXiv 2410.18514) fine-tuned 1.1B parameters and
measured 92%.

Here both start from random weights, with the same size, lines, number of epochs, optimizer and
learning rate. They read words, a unit that favours no order; words of a question that training
lacks are left out. A network that has read nothing but 90 people takes the order for a trait of the
person, and the forms of sentences for traits of the order. So both also read about invented people
(experiments/people.py; no name is shared), in Berglund's training forms and others. Sixty of these
are told of in one order only, and asked about as well. And both models read all sentences thinned,
with words left out at random that belong neither to the name nor (but for one line of eight) to the
description, Berglund's beside the lines as they are: so that a fact is not tied to the wording, and
the places in it, that it was read in.

What has been trained is kept in reverse_curse.jsonl among the results; the same command goes on
from there. Seeds can be trained beside each other: --seed=N --seeds=1.
"""

import importlib.util
import random
import re
import sys
import tempfile
import time
from collections import Counter
from math import hypot
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

import config as settings
import diffusion
import model as network
import sample
import train
from config import require
from data import examples
from data.loader import spread
from data.pairs.prepare import pairs
from data.reversal.prepare import files
from data.tokenizer import Tokenizer
from experiments import people, results
from lib import parallel
from lib.stats import FEWEST, t95

DEFAULTS = {
    "from": "",  # a folder with Berglund's .jsonl files; empty: downloaded to data/reversal/raw
    "seeds": 3,  # training runs of each model: seed, seed + 1, ...
    "persons": 300,  # invented people told of in both orders, 8 lines each
    "epochs": 80,  # passes over all lines
    "looks": 6,  # at the accuracies during training: the learning curve
    "asked": 300,  # items of each test
    "steps": 32,  # of SMDM's greedy sampler, as in the paper
    "preset": "configs/pydocs_2400.py",  # the recipe of both models, but for SHAPE
}

SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 128, "mlp": "relu2", "batch_size": 64}
SHAPE |= {"loss_weight": "constant"}
WIDTH = 40  # words in an example: the longest of Berglund's lines, with bos and eos
THINNED = 0.4  # of the words of a sentence, name and description aside, are left out
WAYS = {  # how both models answer: {ending of a figure's name: (w, fewest words)}
    "": (0.0, 2),  # no reference has less than two words
    "_cfg": (0.8, 2),  # the paper's w; for the masked model alone
    "_free": (0.0, 0),  # may be empty: training says that a line ends behind a description
}
TASKS = {  # what is asked: (test file, SMDM's percentage as quoted in its reviews, GPT-3's)
    "same_dtn": ("d2p_prompts_test", "like ARMs", "97"),
    "same_ntd": ("p2d_prompts_test", "like ARMs", "50"),
    "reverse_dtn": ("p2d_reverse_prompts_test", "92", "0"),
    "reverse_ntd": ("d2p_reverse_prompts_test", "37", "0"),
}
CHOSEN = (
    "The settings were chosen by looking at the reverse accuracies of the masked model on these "
    "items, mostly with seed 1337, so those are somewhat optimistic; the causal model takes them "
    "as they are. `possible`: references whose words the training text has. Invented people are "
    "others in every seed."
)
# Invented people who are told of name first only, asked for by description.
SHOWN = TASKS | {"reverse_invented": ("", "", "")}
QUICK = {"seeds": 1, "persons": 4, "epochs": 1, "looks": 1, "asked": 4, "steps": 4}


# ---- 1. Words ------------------------------------------------------------------------------------


def words(text):
    """A text in words and marks, each with the space before it: joined they are the text again."""
    return re.findall(r" ?\w+(?:'\w+)?| ?[^\w\s]|\s", text)


class Words(Tokenizer):
    """One id for each word of the training text; words that it lacks are left out."""

    kind, bos, eot = "words", 0, 1

    def __init__(self, texts):
        table = ["<bos>", "<eos>", *sorted({word for text in texts for word in words(text)})]
        self.ids = {word: i for i, word in enumerate(table)}
        super().__init__([word.encode() for word in table])

    def encode(self, text, start=True):
        return [self.ids[word] for word in words(text) if word in self.ids]


# ---- 2. What is read, and what is asked ----------------------------------------------------------


def read(config):
    """(Berglund's training lines as `marked` has them, {task: [(prompt, completion), ...]})."""
    paths = files(config["from"], "data/reversal")
    items = {name: [item[1:] for item in pairs(path)] for name, path in paths.items()}
    for name, path in paths.items():
        n, wanted = len(items[name]), 3600 if name == "all_prompts_train" else 300
        require(n == wanted, f"{path} has {n} lines, Berglund's file {wanted}")
    tests = {task: spread(items[name], config["asked"]) for task, (name, *_) in TASKS.items()}
    lines = [prompt + completion for prompt, completion in items["all_prompts_train"]]
    return list(marked(lines)), tests


def marked(lines):
    """Yields (line with {n} and {d} in place of name and description, name, description).

    The last two are empty where it finds none.
    """
    for about in (lines[i : i + 30] for i in range(0, len(lines), 30)):  # 30 lines on one person
        of_line = (set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", line)) for line in about)
        names = set.intersection(*of_line)
        shared = [(len(piece), piece, name) for name in names for piece in pieces(about, name)]
        # A name that is part of the description leaves shorter pieces.
        _, what, name = max(shared, default=(0, "", ""))
        what = what.rstrip(' ,?."')
        for line in about:
            yield (line.replace(what, "{d}").replace(name, "{n}") if name else line), name, what


def pieces(about, name):
    """What may be the description: "the ..." beside the name, in half of the lines or more."""
    parts = [part for line in about[:3] for part in line.split(name)]
    starts = [(part, match.start()) for part in parts for match in re.finditer(r"\bthe ", part)]
    cut = {part[a:b] for part, a in starts for b in range(a + 20, len(part) + 1)}
    return [piece for piece in cut if sum(piece in line for line in about) >= 15]


def whole(form, name, what):
    """The line that `marked` made this of."""
    return form.replace("{n}", name).replace("{d}", what)


def thinned(facts, rng):
    """Lines as `marked` has them, with THINNED of their words left out but for name, description.

    One line of eight words the description in another way ("for directing ..."); there its words
    may be left out too.
    """
    return [whole(people.thin(form, THINNED, rng), name, what) for form, name, what in facts]


def forms(facts):
    """Berglund's own sentences, with {n} and {d} as in `marked`: (name first, name last)."""
    # The quotes of a work end a description.
    about = {(re.sub(r'{d}(\.?")?', "{d}", form), name) for form, name, _ in facts}
    counts = sorted(Counter(form for form, _ in about).items())
    both = [form for form, n in counts if n > 1 and form.count("{n}") == 1 == form.count("{d}")]
    first = [form for form in both if form.index("{n}") < form.index("{d}")]
    return first, [form for form in both if form not in first]


def compose(config, facts, rng):
    """(all lines that are read, questions about invented people told of name first only).

    facts: Berglund's lines as `marked` has them.
    """
    sentences, facts = forms(facts), facts[:: 20 if config["quick"] else 1]
    first_forms, last_forms = people.NAME_FIRST + sentences[0], people.NAME_LAST + sentences[1]
    lines = [whole(*fact) for fact in facts]
    cast = people.several(config["persons"] + 60, rng)
    shared = {word.strip() for text in lines for word in words(text)}
    shared &= {part for name, *_ in cast for part in name.split()}
    require(not shared, f"invented people share names with Berglund's: {', '.join(sorted(shared))}")
    first, last, both = cast[:30], cast[30:60], cast[60:]
    invented = [(first, first_forms, 16), (last, last_forms, 16)]
    invented += [(both, first_forms, 4), (both, last_forms, 4)]
    texts = lines + thinned(facts, rng)
    texts += [line for job in invented for line in people.lines(*job, rng, THINNED)]
    questions = []
    for person in first:
        asked = people.lines([person], last_forms, 10, rng)
        questions += [question(line, person[0]) for line in asked]
    return texts, questions


def question(text, name):
    """A line about a person, cut before the name: (prompt, completion)."""
    return text[: text.index(" " + name)], " " + name


# ---- 3. Training and asking ----------------------------------------------------------------------


def fit(config, folder, objective, seed, look):
    """Trains on the examples in `folder` -> (model, autocast, curve).

    curve: [look(model, autocast) at `looks` moments].
    """
    data = examples.Examples(folder, "train", seed)
    recipe = recipe_of(config, data, objective, seed)
    team, steps, looks = parallel.join(recipe), recipe["max_iters"], config["looks"]
    model, _, optimizers = train.build(recipe, team)
    loss_of = parallel.engine(diffusion.Loss(model, objective), recipe, team)
    batches, curve = train.make_batches(recipe, data, team), []
    for step in tqdm(range(steps), desc=f"{objective}, seed {seed}", disable=None):
        train.train_step(recipe, step, batches, loss_of, optimizers, team)
        if (step + 1) * looks // steps > step * looks // steps:
            curve.append(look(model.eval(), team.autocast))
            model.train()
    return model.eval(), team.autocast, curve


def recipe_of(config, data, objective, seed):
    """The config that a model is trained with."""
    keys = SHAPE | {"objective": objective, "seed": seed, "compile": not config["quick"]}
    argv = [config["preset"], *(f"--{key}={value}" for key, value in keys.items())]
    recipe = settings.parse(argv, settings, diffusion, network, train)
    steps = config["epochs"] * data.n // recipe["batch_size"]
    recipe |= {"vocab_size": data.tokens.vocab_size, "block_size": WIDTH}
    recipe |= {"attention": diffusion.OBJECTIVES[objective].attention[0]}
    recipe |= {"max_iters": steps, "warmup_iters": steps // 25}
    return recipe | {key: config[key] for key in ("device", "dtype")}


def ask(net, items, steps, way):
    """The answers to items (prompt, completion), filled to the width and cut at the first eos.

    net: (model, tokenizer, autocast).
    """
    (model, tokenizer, autocast), (cfg_scale, least) = net, WAYS[way]
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt, _ in items]
    shape, device = (len(items), model.block_size), next(model.parameters()).device
    x = torch.full(shape, model.mask_id, device=device)  # (N, L)
    for row, ids in zip(x, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    suppress = sample.suppress_eos(x, map(len, prompts), least, tokenizer.eot)  # (N, L)
    options = {"sampler": "smdm_greedy", "steps": steps, "cfg_scale": cfg_scale}
    options |= {"temperature": 0.0, "batch_size": 100}
    with autocast():
        out, _ = sample.sample(model, x, suppress, **options)  # (N, L)
    answers = [ids[len(prompt) :] for ids, prompt in zip(out.tolist(), prompts, strict=True)]
    return [sample.text_of(tokenizer, ids, 0, tokenizer.eot) for ids in answers]


def known(tokenizer, items):
    """The references without the words that training lacks: the best that anyone can answer."""
    return [tokenizer.decode(tokenizer.encode(wanted)) for _, wanted in items]


def substring(answer, wanted):
    """SMDM's rule: the reference occurs in the answer, case aside."""
    return wanted.strip().lower() in answer.strip().lower()


def exact(answer, wanted):
    """The answer is the reference and nothing else, case and final full stops aside."""
    return answer.strip().lower().rstrip(".") == wanted.strip().lower().rstrip(".")


def bleu(answer, wanted):
    """NLTK's sentence_bleu of raw strings, so of characters, as in the paper's code: 0 to 1."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    answer, smoothing = answer.strip(), SmoothingFunction().method1
    if not answer:
        return 0.0
    return sentence_bleu([wanted.strip()], answer, smoothing_function=smoothing)


def rules():
    """{ending of a figure's name: rule}; BLEU where nltk is installed."""
    always = {"": substring, "_exact": exact}
    return always | {"_bleu": bleu} if importlib.util.find_spec("nltk") else always


def percent(rule, answers, items):
    scores = [rule(answer, wanted) for answer, (_, wanted) in zip(answers, items, strict=True)]
    return 100 * sum(scores) / len(items)


def run(config, texts, tests, kind, seed):
    """Trains one model and asks it everything -> its record."""
    began, tokenizer, steps = time.process_time(), Words(texts), config["steps"]
    few = {task: spread(items, 60) for task, items in tests.items() if task.startswith("reverse")}

    def look(model, autocast):
        net = model, tokenizer, autocast
        return {task: percent(substring, ask(net, few[task], steps, ""), few[task]) for task in few}

    with tempfile.TemporaryDirectory() as folder:
        ids = ([tokenizer.bos, *tokenizer.encode(line)] for line in texts)
        items = (("train", "a line", [], answer) for answer in ids)
        examples.prepare(folder, items, tokenizer, WIDTH)
        objective = "ar" if kind == "ar" else "any_order"
        model, autocast, curve = fit(config, folder, objective, seed, look)
    record = {"kind": kind, "seed": seed, "parameters": model.n_parameters()}
    record |= {"lines": len(texts), "V": tokenizer.vocab_size, "curve": curve}
    record["cpu_seconds"] = round(time.process_time() - began)
    record["possible"] = {
        task: percent(substring, known(tokenizer, items), items) for task, items in tests.items()
    }
    return record | exam((model, tokenizer, autocast), tests, steps, kind)


def exam(net, tests, steps, kind):
    """{"scores": {task and way: {rule: percent}}, "answers": {task and way: some of them}}."""
    scores, shown = {}, {}
    for task, items in tests.items():
        for way in WAYS if kind == "mdm" else ("", "_free"):
            answers = ask(net, items, steps, way)
            percents = {end: percent(rule, answers, items) for end, rule in rules().items()}
            asked = [[*item, answer] for item, answer in zip(items, answers, strict=True)]
            scores[task + way], shown[task + way] = percents, asked[::37]
    return {"scores": scores, "answers": shown}


# ---- 4. The table --------------------------------------------------------------------------------


COLUMNS = [  # of the table and the plot
    ("mdm", "", "MDM"),
    ("mdm", "_cfg", "MDM, w = 0.8"),
    ("mdm", "_free", "MDM, may be empty"),
    ("ar", "", "ARM"),
    ("ar", "_free", "ARM, may be empty"),
]


def interval(percents, n):
    """95% interval (low, high) of the mean of some seeds' percentages on n people.

    Wilson's, and Student's for three seeds or more; of fewer it is over people alone. All seeds are
    asked about the same people, ten times about each, so n grows with neither. (The invented people
    are others in every seed: for them it is too wide.)
    """
    p, k, z = mean(percents) / 100, len(percents), 1.96
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = (100 * (middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    of_seeds = t95(k - 1) * stdev(percents) / k**0.5 if k >= FEWEST else 0.0
    low, high = 100 * p - hypot(100 * p - low, of_seeds), 100 * p + hypot(high - 100 * p, of_seeds)
    return max(0.0, low), min(100.0, high)


def figures_of(records):
    """{mdm_reverse_dtn: [percent of each seed], ...}; endings: those of WAYS, then of rules()."""
    figures = {}
    for record in records:
        for name, scores in record["scores"].items():
            for end, score in scores.items():
                figures.setdefault(f"{record['kind']}_{name}{end}", []).append(score)
    return figures


def table(figures, possible, n):
    lines = []
    for task, (_, smdm, gpt3) in SHOWN.items():
        line = {"task": task.replace("_", ", "), "SMDM 1.1B": smdm, "GPT-3": gpt3}
        line["possible"] = f"{possible[task]:.0f}"
        for kind, way, name in COLUMNS:
            stem = f"{kind}_{task}{way}"
            low, high = interval(figures[stem], n)
            line[name] = f"{mean(figures[stem]):.1f} ({low:.0f} to {high:.0f})"
        lines.append(line)
    others = [{"task": task.replace("_", ", ")} for task in SHOWN]
    for line, task in zip(others, SHOWN, strict=True):
        for kind, name in (("mdm", "MDM"), ("ar", "ARM")):
            for rule, end in (("exact", "_exact"), ("BLEU", "_bleu")):
                percents = figures.get(f"{kind}_{task}{end}")
                line[f"{name}, {rule}"] = f"{mean(percents):.1f}" if percents else ""
    title = "Correct answers, percent (the reference is a substring of the answer)"
    others = results.table("By other rules, w = 0 (BLEU needs nltk)", others)
    return f"{results.table(title, lines)}\n{others}"


def curves(records):
    """The learning curves: what the reverse tasks gave along the way, mean over the seeds."""
    lines, title = [], "Along the way, 60 items of each, w = 0, percent"
    for kind in ("mdm", "ar"):
        mine = [record["curve"] for record in records if record["kind"] == kind]
        for i, points in enumerate(zip(*mine, strict=True)):
            line = {"model": kind, "part of the run": f"{i + 1}/{len(mine[0])}"}
            lines.append(line | {task: mean(point[task] for point in points) for task in points[0]})
    return results.table(title, lines, {"reverse_dtn": "{:.0f}"})


def answered(records):
    """A few questions and what was answered, as text."""
    out = []
    for record in (record for record in records if record["seed"] == records[0]["seed"]):
        for name, answers in record["answers"].items():
            head = f"{record['kind']} {name}"
            if not name.endswith(("_cfg", "_free")):
                out += [f"{head}: {prompt} ->{answer}" for prompt, _, answer in answers[:3]]
    return "\n".join(["**Examples**", "", "```", *out, "```"])


NAMED = {  # what is asked for, in a plot
    "same_dtn": "the name,\nin the order read",
    "same_ntd": "the description,\nin the order read",
    "reverse_dtn": "the name,\nin the other order",
    "reverse_ntd": "the description,\nin the other order",
    "reverse_invented": "an invented name,\nin the other order",
}


def draw(axes, figures):
    """Bars of both models' percentages, the seeds as dots, SMDM's as short lines."""
    models = [
        (-0.18, "mdm", "_cfg", "masked, w = 0.8", results.DARK, "white"),
        (0.18, "ar", "", "causal", results.LIGHT, "black"),
    ]
    for x, task in enumerate(SHOWN):
        for left, kind, way, name, color, ink in models:
            place, stem = x + left, f"{kind}_{task}{way}"
            height, seeds = figures[stem], figures.get(f"{stem}, seeds", [])
            axes.bar(place, height, 0.34, color=color)
            axes.text(place, 3, f"{height:.0f}", ha="center", color=ink)
            if x == 0:
                axes.text(place, 12, name, ha="center", rotation=90, color=ink)
            axes.plot([place] * len(seeds), seeds, "o", color="white", mec="black", clip_on=False)
        if SHOWN[task][1].isdigit():
            axes.hlines(int(SHOWN[task][1]), x - 0.36, x, color="black", linewidth=2)
            axes.text(x - 0.38, int(SHOWN[task][1]), "SMDM,\n1.1B", ha="right", va="center")
    axes.set_xticks(range(len(SHOWN)), [NAMED[task] for task in SHOWN])
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="correct, percent (substring rule); dots: seeds", ylim=(0, 110))
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("In an order that it never read the masked model answers, the causal one never")


PLOTS = {"": draw}


def trained(config, facts, tests):
    """The records of all seeds and both models; those that `results` lacks are trained and kept."""
    path = Path(config["results"]) / "reverse_curse.jsonl"
    keys = ("epochs", "looks", "steps", "quick", "device", "dtype")
    preset = settings.parse([config["preset"]], settings, diffusion, network, train)
    recipe = [preset, SHAPE, WIDTH, WAYS, list(rules())]
    recipe += [[config[key] for key in keys]]
    records = []
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        texts, invented = compose(config, facts, random.Random(seed))
        asked = tests | {"reverse_invented": spread(invented, config["asked"])}
        mark = results.mark(recipe, texts, asked)
        old = [record for record in results.kept(path) if record["mark"] == mark]
        for kind in ("mdm", "ar"):
            mine = [record for record in old if (record["kind"], record["seed"]) == (kind, seed)]
            records += mine[-1:] or [run(config, texts, asked, kind, seed) | {"mark": mark}]
            if not mine:
                results.keep(path, records[-1])
            scores = {name: round(score[""], 1) for name, score in records[-1]["scores"].items()}
            seconds = records[-1]["cpu_seconds"]
            print(f"{kind}, seed {seed}: {scores}, {seconds} CPU seconds", flush=True)
    return records


def main(config):
    """Trains what is missing, writes reverse_curse.json, .md and .png. Returns the figures."""
    if config["quick"]:
        config |= {k: v for k, v in QUICK.items() if k not in config.get("user_keys", ())}
    settings.at_least(1, config, "seeds", "epochs", "looks", "asked", "steps")
    settings.at_least(0, config, "persons")
    require(config["asked"] <= 300, f"asked must be at most 300, not {config['asked']}")
    facts, tests = read(config)
    records = trained(config, facts, tests)

    percents = figures_of(records)
    size, n = records[0]["parameters"], len({wanted for _, wanted in tests["reverse_dtn"]})
    about = (
        f"About {size:,} parameters each, {records[0]['lines']:,} lines read, {config['seeds']} "
        f"seeds, {config['asked']} items a task on {n} people. {CHOSEN}\n"
    )
    possible = {task: mean(record["possible"][task] for record in records) for task in SHOWN}
    tables = [table(percents, possible, n), curves(records), answered(records)]
    text = "\n".join([about, *tables]) + "\n"
    figures = {name: mean(values) for name, values in percents.items()}
    figures |= {f"{name}, seeds": values for name, values in percents.items()}
    figures |= {"seeds": config["seeds"]} | results.about(torch.device("cpu"))
    figures |= {"cpu_seconds": sum(record["cpu_seconds"] for record in records)}
    results.write(config, "reverse_curse", figures, text, PLOTS)
    print(text)
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
