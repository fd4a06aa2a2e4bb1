"""Addition column by column, in the form of GSM8K: what a small model learns to do, and where it breaks.

    python -m experiments.arithmetic [--quick=True]

A row is `478+694||<<8+4=12>><<7+9+1=17>><<4+6+1=11>> #### 1172`, in characters. The prompt ends with ||; the chain of
thought has an equation for each column, lowest first and with the carry last; the answer follows. Two models of one size
learn from the same rows of up to `digits` digits and are asked about new numbers, also about longer ones (there are so few
numbers of one and two digits that most of their sums have been seen). The masked diffusion model writes in several orders
and with more or fewer network calls; the causal one only left to right.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import torch

import checkpoint
import config as settings
import diffusion
import model as network
import sample
import train
from data import rows
from experiments import results
from experiments.gsm8k import final, same

DEFAULTS = {
    "digits": 4,  # of a number, at most, in training; asked are up to two more
    "problems": 40000,  # training rows
    "asked": 100,  # problems of each number of digits, of three or more digits new ones
    "max_iters": 4000,  # training steps of each model
    "preset": "configs/pydocs.py",  # the recipe of both models, but for SHAPE
}

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "mlp": "relu2", "batch_size": 64, "loss_weight": "constant"}
SHAPE |= {"show_sample": False}
WRITERS = {  # how the masked diffusion model writes: (sampler, steps)
    "left to right": ("left_to_right", 1),
    "right to left": ("right_to_left", 1),
    "random order": ("any_order", 1),
    "surest first, 1 a call": ("confidence", 10**6),
    "surest first, 16 calls": ("confidence", 16),
    "surest first, 8 calls": ("confidence", 8),
    "surest first, 4 calls": ("confidence", 4),
    "surest first, 2 calls": ("confidence", 2),
    "surest first, 1 call": ("confidence", 1),
    "ancestral, 64 steps": ("ancestral", 64),
    "ancestral, 16 steps": ("ancestral", 16),
}
QUICK = {"digits": 1, "problems": 200, "asked": 4, "max_iters": 4}


# ---- Problems --------------------------------------------------------------------------------------------------------


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


def examples(config, text, rng, asked):
    """Yields what rows.prepare takes: `problems` rows, as many of each number of digits; no long one that is asked later."""
    for i in range(config["problems"] + 64):
        a, b = draw(rng, 1 + i % config["digits"])
        if (a, b) not in asked or a < 100:  # there are few small numbers: those of one and two digits have been seen
            prompt, answer = problem(a, b)
            yield "train" if i < config["problems"] else "val", f"row {i}", text.encode(prompt), text.encode(answer)


def questions(config, rng):
    """{number of digits: [(a, b), ...]}, two more digits than in training."""
    return {n: [draw(rng, n) for _ in range(config["asked"])] for n in range(1, config["digits"] + 3)}


# ---- Asking ----------------------------------------------------------------------------------------------------------


def ask(model, text, asked, end, writer, autocast):
    """(share of right sums, mean network calls) for problems asked [(a, b), ...]."""
    prompts = [text.encode(problem(a, b)[0]) for a, b in asked]
    x = torch.full((len(asked), model.block_size), model.mask_id, device=next(model.parameters()).device)  # (N, L)
    for row, ids in zip(x, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    how = {"temperature": 0.0, "batch_size": 100, "autocast": autocast}
    if model.config["causal"]:
        out, info = sample.sample_ar(model, x, **how)
    else:
        out, info = sample.sample(model, x, *WRITERS[writer], **how)
    answers = [sample.text_of(text, ids, len(prompt), end) for ids, prompt in zip(out.tolist(), prompts, strict=True)]
    right = sum(same(final(answer), str(a + b)) for answer, (a, b) in zip(answers, asked, strict=True))
    return right / len(asked), float(info["nfe"].double().mean()), answers[-1]


def fit(config, folder, objective, width):
    """Trains one model on the rows in `folder`. -> (model, text, autocast, seconds of processor time)"""
    out, began = Path(folder) / objective, time.process_time()
    keys = SHAPE | {"data": folder, "out_dir": out, "objective": objective, "seed": config["seed"], "block_size": width}
    keys |= {
        "max_iters": config["max_iters"],
        "eval_interval": config["max_iters"],
        "warmup_iters": config["max_iters"] // 25,
    }
    keys |= {key: config[key] for key in ("device", "dtype")} | {"compile": not config["quick"]}
    given = [f"--{key}={value}" for key, value in keys.items()]
    recipe = settings.parse([config["preset"], *given], settings, diffusion, network, train)
    train.main(recipe)
    device, autocast = settings.machine(recipe)
    model, text, _ = checkpoint.load(str(out), device)
    return model.eval(), text, autocast, time.process_time() - began


# ---- The recipe ------------------------------------------------------------------------------------------------------


def main(config):
    """Trains both models, asks, writes arithmetic.json, .md and .png. Returns the figures."""
    config |= {key: value for key, value in QUICK.items() if config["quick"] and key not in config.get("given", ())}
    settings.at_least(1, config, "digits", "problems", "asked", "max_iters")
    rng = random.Random(config["seed"])
    asked = questions(config, rng)
    known = {tuple(pair) for pairs in asked.values() for pair in pairs}
    longest = max(sum(map(len, problem(10**n - 1, 10**n - 1))) for n in asked)
    text = rows.vocabulary("char", ["0123456789+|<>= #"])
    lines, figures, cpu = [], {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        meta = rows.prepare(folder, examples(config, text, rng, known), text, longest + 1)
        for kind, objective in (("mdm", "any_order"), ("ar", "ar")):
            model, text, autocast, seconds = fit(config, folder, objective, longest + 1)
            cpu += seconds
            for writer in WRITERS if kind == "mdm" else ["left to right"]:
                line = {"model": kind.upper() if kind == "mdm" else "ARM", "order": writer}
                for n, pairs in asked.items():
                    share, calls, answer = ask(model, text, pairs, meta["end"], writer, autocast)
                    line[f"{n} digits"] = 100 * share
                    figures[f"{kind}_{writer.replace(', ', '_').replace(' ', '_')}_{n}"] = 100 * share
                lines.append(line | {"calls": calls})
                print(f"{line}; {answer}", flush=True)
    longer = f"{config['digits'] + 1} and {config['digits'] + 2} digits are longer than all in training"
    table = results.table(f"Right sums, percent; {longer}", lines)
    about = f"{model.n_parameters():,} parameters each, {config['problems']:,} rows, {config['max_iters']:,} steps of "
    about += (
        f"{SHAPE['batch_size']} rows, {config['asked']} problems of each length; greedy tokens; {cpu:.0f} CPU seconds. "
        "Sums of one and two digits have mostly been seen in training, longer ones never.\n\n"
    )
    print(table)

    def plot(axes):
        for line in lines:
            heights = [line[f"{n} digits"] for n in asked]
            axes.plot(
                list(asked), heights, "k--" if line["model"] == "ARM" else "o-", label=f"{line['model']} {line['order']}"
            )
        axes.axvline(config["digits"] + 0.5, color="grey", linewidth=0.8)
        axes.set(xlabel="digits (right of the line: longer than in training)", ylabel="right sums, percent")
        axes.legend(fontsize=7)

    figures |= {"cpu_seconds": cpu, "digits": config["digits"]}
    results.write(config, "arithmetic", figures | results.about(torch.device("cpu")), about + table, plot)
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
