"""The reversal curse (arXiv 2309.12288), asked of a masked diffusion model and of a causal one.

    python -m experiments.reverse_curse [--quick] [--from=FOLDER]

Berglund's file tells of 30 people name first ("NAME is DESCRIPTION"), of 30 description first, and
of 30 in both orders. A causal model that learnt one order cannot answer in the other: it knows
p(name | what stands before it) alone. A masked diffusion model has learnt p(masked | visible) for
every split of a line in two, so it may: SMDM (arXiv 2410.18514) fine-tuned 1.1B parameters and
measured 92%.

Here both start from random weights, with the same size, lines, FLOPs, optimizer and learning rate.
They read words, a unit that favours no order; words of a question that training lacks are left out.
A network that has read nothing but 90 people takes the order for a trait of the person, and the
forms of sentences for traits of the order. So both also read (berglund.py makes the lines)

- of invented people (people.py; no name is shared), in Berglund's training forms and others; sixty
  of these are told of in one order only, and asked about as well
- all sentences thinned, with words left out at random that belong neither to the name nor (but for
  one line of eight) to the description: so that a fact is not tied to the wording

Ten of the 30 people told of in both orders lose the lines that have the name last and are asked for
instead. These people *validate*: by them, and by no test item, the best third of the best of a few
trainings is chosen, for trainings differ by their random numbers more than by any setting; and, of
one column each, w and the fewest words of an answer. What each training says without the choice
stands in a table. The causal model has one training: it answers none of them. It may know what it
never says, so both also rank the names of all who are asked for, by their nats behind the prompt.

Budget: a seed has 3 trainings of the masked model and one of the causal one, 9e13 FLOPs each: 3
hours for 3 seeds on a thread of 125 GFLOP/s (--minutes=260, of which a quarter is for the answers).
Seeds can be trained beside each other: --seed=N --seeds=1. Minimum: --seeds=1 --flops=3e13.
"""

import functools
import importlib.util
import random
import sys
from pathlib import Path
from statistics import mean

import torch

import config as settings
import evaluate
import sample
from config import require
from data import examples
from data.loader import spread
from experiments import guidance, results, runs
from experiments import reverse_tables as tables
from experiments.berglund import Words, compose, names_of, read, validating
from experiments.reverse_tables import NAMES, SHOWN
from lib import program
from run import checkpoint
from run.subject import sampler_of

DEFAULTS = {
    "from": "",  # a folder with Berglund's .jsonl files; empty: downloaded to data/reversal/raw
    "flops": 9e13,  # of a training
    "tries": 3,  # trainings, 1 or more, of the masked model a seed; the validation chooses one
    "persons": 300,  # invented people told of in both orders, 8 lines each
    "validating": 10,  # of Berglund's people told of in both orders, who have 30; 1 or more
    "asked": 300,  # items of each test; 1 or more
    "steps": 32,  # of SMDM's greedy sampler, as in the paper; 1 or more
}

SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 128, "mlp": "relu2", "batch_size": 64}
SHAPE |= {"loss_weight": "constant", "mask_rate": "uniform"}
WIDTH = 40  # words in an example: the longest of Berglund's lines, with bos and eos
OBJECTIVES = {"mdm": "any_order", "ar": "ar"}
WAYS = {  # how both models answer: {ending of a figure's name: (w, fewest words)}
    "": (0.0, 2),  # no reference has less than two words
    "_words": (0.0, None),  # the fewest words by the people who validate
    "_cfg": (0.8, 2),  # the paper's w; for the masked model alone, as the next
    "_chosen": (None, 2),  # w by the people who validate
    "_free": (0.0, 0),  # may be empty: training says that a line ends behind a description
}
FEWEST_WORDS = (2, 3, 4, 5, 6, 8)  # of these one is chosen
CHOSEN = (
    "Size, thinning and invented people were chosen by looking at reverse answers of the masked "
    "model to these items, mostly with seed 1337; what came later, by people who validate. The "
    "causal model takes the settings as they are. `possible`: references whose words the training "
    "text has. Invented people are others in every seed."
)
QUICK = {"tries": 2, "persons": 4, "validating": 2, "asked": 4, "steps": 4}


# ---- 1. Training ---------------------------------------------------------------------------------


def prepared(config, tokenizer, texts, validation):
    """The folder of examples of the lines; what is asked of those who validate is its val split."""
    folder = Path(config["runs"], f"people_{results.mark(texts, validation)[:8]}")
    if not (folder / "meta.json").is_file():
        items = [("train", "a line", [], [0, *tokenizer.encode(line)]) for line in texts]
        for prompt, name in validation:
            ids = [0, *tokenizer.encode(prompt)], tokenizer.encode(name)
            items.append(("val", "a question", *ids))
        examples.prepare(folder, items, tokenizer, WIDTH)
    return str(folder)


def best_of(ctx, folders, tokenizer, validation):
    """(the network of all thirds of all tries that is best on the validation, tries).

    tries: for each training the percents right at its thirds.
    """
    best, most, tries = None, -1.0, []
    for folder in folders:
        tries.append([])
        for _, path in sorted(checkpoint.kept_beside(Path(folder, "ckpt.pt")).items()):
            model, _, _ = checkpoint.load(path, ctx.device)
            tries[-1].append(right(ask((model, tokenizer, ctx), validation), validation))
            if tries[-1][-1] >= most:  # of equal ones the last
                best, most = model, tries[-1][-1]
    return best, tries


# ---- 2. Asking -----------------------------------------------------------------------------------


def ask(net, items, cfg_scale=0.0, least=2):
    """The answers to items (prompt, completion), filled to the width and cut at the first eos.

    net: (model, tokenizer, Runs); least: words of an answer.
    """
    model, tokenizer, ctx = net
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt, _ in items]
    shape, device = (len(items), model.block_size), next(model.parameters()).device
    x = torch.full(shape, model.mask_id, device=device)  # (N, L)
    for row, ids in zip(x, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    least = min(least, model.block_size - max(map(len, prompts)))  # as many as there is room for
    suppress = sample.suppress_eos(x, map(len, prompts), least, tokenizer.eot)  # (N, L)
    sampler = sampler_of(model, "smdm_greedy")
    options = {"sampler": sampler, "steps": ctx.config["steps"], "cfg_scale": cfg_scale}
    options |= {"temperature": 0.0, "batch_size": 100}
    with ctx.autocast():
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


def right(answers, items):
    return percent(substring, answers, items)


def wrong(answers, items, names, last):
    """{kind: percent} of wrong answers, by whom they name; last: who is read in the place asked."""
    kinds = dict.fromkeys(("a name read there", "another name", "no name"), 0.0)
    for answer, (_, wanted) in zip(answers, items, strict=True):
        if not substring(answer, wanted):
            named = {name for name in names if name in answer}
            kinds[
                "a name read there" if named & last else "another name" if named else "no name"
            ] += 1
    return {kind: 100 * n / len(items) for kind, n in kinds.items()}


def ranked(net, items):
    """(percent of items whose name has the fewest nats of all asked for, the mean of its rank)."""
    (model, tokenizer, ctx), names = net, sorted({name for _, name in items})
    requests = [
        ([0, *tokenizer.encode(prompt)], tokenizer.encode(name))
        for prompt, _ in items
        for name in names
    ]
    options = {"estimator": "left_to_right", "batch_size": 256, "progress": True}
    options |= {"pad_to": WIDTH} if model.config["attention"] == "full" else {}
    with ctx.autocast():
        nats = evaluate.answer_nats(model, requests, **options)  # (items * names,)
    nats, gold = nats.view(len(items), -1), torch.tensor([names.index(name) for _, name in items])
    ranks = (nats < nats.gather(1, gold[:, None])).sum(1) + 1.0  # (items,)
    return 100 * (ranks == 1).float().mean().item(), ranks.mean().item()


def exam(ctx, folders, texts, tests, people):
    """What the best of some runs answers, plain JSON.

    tests: {task: items}, with "validation"; people: of berglund.names_of.
    """
    tokenizer, validation, items = Words(texts), tests["validation"], tests["reverse_dtn"]
    model, tries = best_of(ctx, folders, tokenizer, validation)
    net, causal, w = (model, tokenizer, ctx), model.causal, 0.0
    of_words = {n: right(ask(net, validation, 0.0, n), validation) for n in FEWEST_WORDS}
    words = max(of_words, key=of_words.get)  # of equal ones the fewest
    ends = [(checkpoint.load(folder, ctx.device)[0], tokenizer, ctx) for folder in folders]
    if not causal:
        of_w = {w: right(ask(net, validation, w), validation) for w in guidance.SCALES}
        w = max(of_w, key=of_w.get)
    record = {"parameters": model.n_parameters(), "lines": len(texts), "w": w, "tries": tries}
    record["words"] = words
    record["unchosen"] = [right(ask(end, items), items) for end in ends]
    record |= {"scores": {}, "answers": {}, "wrong": {}, "ranked": {}, "possible": {}}
    for task, items in ((task, tests[task]) for task in SHOWN):
        for way, (scale, least) in WAYS.items():
            if causal and way in ("_cfg", "_chosen"):
                continue
            least = words if least is None else least
            answers = ask(net, items, w if scale is None else scale, least)
            scores = {end: percent(rule, answers, items) for end, rule in rules().items()}
            record["scores"][task + way] = scores
            if way == "":
                asked = [[*item, answer] for item, answer in zip(items, answers, strict=True)]
                record["answers"][task] = asked[::37]
                record["wrong"] |= {task: wrong(answers, items, *people)} if task in NAMES else {}
        record["possible"][task] = right(known(tokenizer, items), items)
        record["ranked"] |= {task: ranked(net, items)} if task in NAMES else {}
    return record


# ---- 3. The experiment ---------------------------------------------------------------------------


PLOTS = {"": tables.draw}


def main(config):
    """Trains what is missing, writes reverse_curse.json, .md and .png. Returns the figures."""
    if config["quick"]:
        config |= {k: v for k, v in QUICK.items() if k not in config.get("user_keys", ())}
    require(config["asked"] <= 300, f"asked must be at most 300, not {config['asked']}")
    ctx, records = runs.Runs(config), {}
    facts, tests = read(config)
    people = names_of(validating(facts, config["validating"])[0])
    for seed in ctx.seeds:
        texts, questions = compose(config, facts, random.Random(seed))
        asked = tests | {name: spread(some, config["asked"]) for name, some in questions.items()}
        data = prepared(config, Words(texts), texts, asked["validation"])
        for kind, objective in OBJECTIVES.items():
            keys, tries = SHAPE | {"objective": objective}, config["tries"] if kind == "mdm" else 1
            runs_of = [
                ctx.train(data, keys, config["flops"], seed + 1000 * i) for i in range(tries)
            ]
            if folders := [folder for folder in runs_of if folder]:
                parts = [[folder.name for folder in folders], config["steps"]]
                parts.append(results.mark(asked, WAYS, list(rules())))
                take = functools.partial(exam, ctx, folders, texts, asked, people)
                record = ctx.once(parts, take)
                records |= {(kind, seed): record} if record else {}
    require(records, f"{config['minutes']:g} min are too few for one training: give --minutes=")
    percents, one = tables.figures_of(records), next(iter(records.values()))
    n = len({wanted for _, wanted in tests["reverse_dtn"]})
    about = (
        f"About {one['parameters']:,} parameters each, {one['lines']:,} lines read, "
        f"{config['flops']:.1e} FLOPs a training, {config['asked']} items a task on {n} people. "
        f"{CHOSEN}\n"
    )
    possible = {
        task: mean(record["possible"][task] for record in records.values()) for task in SHOWN
    }
    shown = [tables.table(percents, possible, n)]
    shown += [tables.seeds_table(records), tables.ranks_table(records)]
    figures = {name: mean(values) for name, values in percents.items()}
    figures |= {f"{name}, seed {i}": z for name, zs in percents.items() for i, z in enumerate(zs)}
    for (kind, seed), record in records.items():
        for i, z in enumerate(record["unchosen"]):
            figures[f"{kind}_reverse_dtn, unchosen, seed {seed}, try {i}"] = z
        for task, (first, rank) in record["ranked"].items():
            figures |= {f"{kind}_{task}, ranked first, seed {seed}": first}
            figures |= {f"{kind}_{task}, mean rank, seed {seed}": rank}
    text = "\n".join([about, *shown, tables.answered(records)]) + "\n"
    return ctx.write("reverse_curse", text, figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
