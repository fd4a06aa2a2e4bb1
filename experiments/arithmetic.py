"""Addition column by column, in the form of GSM8K: what a small model learns, and where it breaks.

    python -m experiments.arithmetic [--quick]

An example is `478+694||<<8+4=12>><<7+9+1=17>><<4+6+1=11>> #### 1172`, in characters. The prompt
ends with ||; the chain of thought has an equation for each column, lowest first and with the carry
last; the answer follows. Two models of one size learn from the same examples of up to `digits`
digits and are asked about new numbers, also about longer ones (there are so few numbers of one and
two digits that most of their sums have been seen). The masked diffusion model writes in several
orders and with more or fewer network calls; the causal one only left to right.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import torch

import config as settings
import sample
import train
from data import examples
from experiments import results
from experiments.gsm8k import final, same
from lib import program
from lib.device import machine
from run import checkpoint

DEFAULTS = {
    "digits": 4,  # of a number, at most, in training; asked are up to two more; 1 or more
    "problems": 40000,  # training examples; 1 or more
    "asked": 100,  # problems of each number of digits, of three or more digits new ones; 1 or more
    "max_iters": 4000,  # training steps of each model; 1 or more
    "preset": "configs/pydocs_2400.py",  # the recipe of both models, but for SHAPE
}

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "mlp": "relu2", "batch_size": 64}
SHAPE |= {"show_sample": False}
WRITERS = {  # how the masked diffusion model writes: (sampler, steps)
    "left to right": ("left_to_right", 1),
    "right to left": ("right_to_left", 1),
    "random order": ("any_order", 1),
    "most confident first, 1 a call": ("confidence", 10**6),
    "most confident first, 16 calls": ("confidence", 16),
    "most confident first, 8 calls": ("confidence", 8),
    "most confident first, 4 calls": ("confidence", 4),
    "most confident first, 2 calls": ("confidence", 2),
    "most confident first, 1 call": ("confidence", 1),
    "ancestral, 64 steps": ("ancestral", 64),
    "ancestral, 16 steps": ("ancestral", 16),
}
QUICK = {"digits": 1, "problems": 200, "asked": 4, "max_iters": 4}


# ---- 1. Problems ---------------------------------------------------------------------------------


def problem(a, b):
    """(prompt, answer) of a + b: the columns from the lowest, then the sum."""
    columns, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        columns.append(f"<<{x}+{y}{'+1' if carry else ''}={total}>>")
        carry = total // 10
    return f"{a}+{b}||", f"{''.join(columns)} #### {a + b}"


def draw(rng, digits):
    """Two numbers of `digits` digits."""
    return [rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2)]


def tokenized(config, tokenizer, rng, asked):
    """Yield what examples.prepare takes: `problems` examples, as many of each number of digits.

    No long one is asked later; of small numbers, of one and two digits, there are too few.
    """
    for i in range(config["problems"] + 64):
        a, b = draw(rng, 1 + i % config["digits"])
        if (a, b) not in asked or a < 100:
            prompt, answer = map(tokenizer.encode, problem(a, b))
            yield "train" if i < config["problems"] else "val", f"number {i}", prompt, answer


def questions(config, rng):
    """{number of digits: [(a, b), ...]}, two more digits than in training."""
    digits = range(1, config["digits"] + 3)
    return {n: [draw(rng, n) for _ in range(config["asked"])] for n in digits}


# ---- 2. Asking -----------------------------------------------------------------------------------


def ask(model, tokenizer, asked, eos, writer, autocast):
    """(share of right sums, mean network calls, the last answer) of problems [(a, b), ...]."""
    prompts = [tokenizer.encode(problem(a, b)[0]) for a, b in asked]
    device, (sampler, steps) = model.device, WRITERS[writer]
    x = torch.full((len(asked), model.block_size), model.mask_id, device=device)  # (N, L)
    for row, ids in zip(x, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    options = {"sampler": sampler, "steps": steps, "temperature": 0.0, "batch_size": 100}
    with autocast():
        out, info = sample.sample(model, x, **options)
    pairs = zip(out.tolist(), prompts, strict=True)
    answers = [sample.text_of(tokenizer, ids, len(prompt), eos) for ids, prompt in pairs]
    right = [same(final(text), str(a + b)) for text, (a, b) in zip(answers, asked, strict=True)]
    return sum(right) / len(asked), float(info["nfe"].double().mean()), answers[-1]


def fit(config, folder, objective, width):
    """Train one model on the examples in `folder` -> (model, tokenizer, autocast, CPU seconds)."""
    out, began, steps = Path(folder) / objective, time.process_time(), config["max_iters"]
    keys = SHAPE | {"data": folder, "out_dir": out, "objective": objective, "block_size": width}
    keys |= {"max_iters": steps, "eval_interval": steps, "warmup_iters": steps // 25}
    keys |= {key: config[key] for key in ("seed", "device", "dtype")}
    keys |= {"compile": not config["quick"]}
    keys |= {} if objective == "ar" else {"loss_weight": "constant"}
    words = [config["preset"], *(f"--{key}={value}" for key, value in keys.items())]
    recipe = settings.parse(words, *train.MODULES)
    train.main(recipe)
    device, autocast = machine(recipe)
    model, tokenizer, _ = checkpoint.load(str(out), device)
    return model.eval(), tokenizer, autocast, time.process_time() - began


def compare(config, asked, rng):
    """Train both models and ask them -> (lines of the table, parameters, CPU seconds)."""
    lines, cpu, known = [], 0.0, {tuple(pair) for pairs in asked.values() for pair in pairs}
    width = 1 + max(sum(map(len, problem(10**n - 1, 10**n - 1))) for n in asked)  # and an eos
    tokenizer = examples.vocabulary("char", ["0123456789+|<>= #"], checkpoint.load)
    with tempfile.TemporaryDirectory() as folder:
        items = tokenized(config, tokenizer, rng, known)
        eos = examples.prepare(folder, items, tokenizer, width)["end"]
        for name, objective in (("MDM", "any_order"), ("ARM", "ar")):
            model, tokenizer, autocast, seconds = fit(config, folder, objective, width)
            cpu += seconds
            for writer in WRITERS if name == "MDM" else ["left to right"]:
                line = {"model": name, "order": writer}
                for n, pairs in asked.items():
                    share, calls, answer = ask(model, tokenizer, pairs, eos, writer, autocast)
                    line[f"{n} digits"] = 100 * share
                lines.append(line | {"calls": calls})
                print(f"{lines[-1]}; {answer}", flush=True)
    return lines, model.n_parameters(), cpu


# ---- 3. The recipe -------------------------------------------------------------------------------


def figures_of(lines, asked):
    """The percentages by name: {mdm_left_to_right_3: ..., ...}."""
    figures = {}
    for line in lines:
        kind = {"MDM": "mdm", "ARM": "ar"}[line["model"]]
        writer = line["order"].replace(", ", "_").replace(" ", "_")
        figures |= {f"{kind}_{writer}_{n}": line[f"{n} digits"] for n in asked}
    return figures


def draw_right(axes, figures):
    """Bars: sums of as many digits as were trained on, by order and number of calls."""
    n, asked = figures["digits"], figures["asked"]
    ends = {f"{kind}_{writer}_{n}": name for kind, writer, name in named()}
    right = {name: figures[end] for end, name in ends.items() if end in figures}
    results.bars(axes, right, "{:.0f}", light=["causal, left to right"])
    axes.set(xlim=(0, 110), xticks=range(0, 101, 20))
    axes.set_xlabel(f"right answers, percent of {asked} sums of {n} digits")
    axes.set_title("Few calls cost accuracy")


def named():
    """(model, writer as in the figures, what a plot calls it)."""
    for writer in WRITERS:
        yield "mdm", writer.replace(", ", "_").replace(" ", "_"), writer
    yield "ar", "left_to_right", "causal, left to right"


PLOTS = {"": draw_right}


def main(config):
    """Train both models, ask, write arithmetic.json, .md and .png; return the figures."""
    if config["quick"]:
        config |= {k: v for k, v in QUICK.items() if k not in config.get("user_keys", ())}
    rng, digits = random.Random(config["seed"]), config["digits"]
    asked = questions(config, rng)
    lines, parameters, cpu = compare(config, asked, rng)

    longer = f"{digits + 1} and {digits + 2} digits are longer than all in training"
    table = results.table(f"Right sums, percent; {longer}", lines)
    about = (
        f"{parameters:,} parameters each, {config['problems']:,} examples, {config['max_iters']:,} "
        f"steps of {SHAPE['batch_size']} examples, {config['asked']} problems of each length; "
        f"greedy tokens; {cpu:.0f} CPU seconds. Sums of one and two digits have mostly been seen "
        "in training, longer ones never.\n\n"
    )
    figures = figures_of(lines, asked) | {"cpu_seconds": cpu, "digits": digits}
    figures["asked"] = config["asked"]
    figures |= results.about(torch.device("cpu"))
    results.write(config, "arithmetic", figures, about + table, PLOTS)
    print(table)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
