"""GSM8K in small: the whole pipeline on the real files, with a model that is far too small to solve the problems.

    python -m experiments.gsm8k --from=FOLDER [--ckpt=RUN] [--quick=True]

As SMDM evaluates (arXiv 2410.18514): from the question the model writes the equations, from both it writes the answer, each
time filling a row of one width; what follows the last #### counts, and two answers are equal if they are the same number.
Without --ckpt a small character model is trained first (data/gsm8k/prepare.py), for minutes, not days: its accuracy shows
that the pipeline runs, no more. With --ckpt (a model trained on rows of data/gsm8k) the figure is real.
"""

import re
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import torch

import checkpoint
import config as settings
import diffusion
import model as network
import sample
import train
from config import choose, require
from data import download, rows
from data.gsm8k import prepare
from experiments import results

DEFAULTS = {
    "from": "",  # a folder with GSM8K's train.jsonl, test.jsonl and valid.txt; without one they are downloaded
    "ckpt": "",  # a model trained on data/gsm8k; empty: train a small one here
    "width": 384,  # characters in a row of the small model
    "max_iters": 600,  # its training steps
    "asked": 200,  # test problems; 0: all 1,319
    "sampler": "confidence",  # as in sample.py
    "steps": 64,  # network calls for the equations, and again for the answer
    "cfg": 0.0,  # guidance (SMDM: 0.1)
    "preset": "configs/pydocs.py",  # the recipe of the small model
}

SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 128, "mlp": "relu2", "batch_size": 16, "compile": False, "show_sample": False}
QUICK = {"width": 300, "max_iters": 2, "asked": 2, "steps": 2}
TEST = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
    "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
)
PAPER = "58.5"  # SMDM's 1.1B parameters after 120,193 steps, as published


# ---- Answers ---------------------------------------------------------------------------------------------------------


def final(text):
    """What follows the last ####, to the end of its line; None where there is none."""
    found = re.findall(r"####[ \t]*([^\n]*)", text)
    return found[-1].strip() if found else None


def number(text):
    """The Fraction that a text writes, currency, unit and thousands aside: "$1,080.50 ", "3/4", "12%". Else None."""
    found = (
        re.fullmatch(r"[^\d\-.]*(-?)\$?(\d[\d,]*(?:\.\d+)?|\.\d+)(?:/(\d+))?[^\d]*", text.strip().replace("\u2212", "-"))
        if text
        else None
    )
    if not found or (found[3] and not int(found[3])):
        return None
    value = Fraction(found[2].replace(",", "")) / int(found[3] or 1)
    return -value if found[1] else value


def same(written, wanted):
    """Whether two answers are one number; what is no number is equal to nothing."""
    return number(written) is not None and number(written) == number(wanted)


# ---- The two passes --------------------------------------------------------------------------------------------------


def fill(model, prompts, width, end, config, autocast):
    """Completes rows: prompts, a list of ids -> the ids that follow each, up to the first end mark."""
    x = torch.full((len(prompts), width), model.mask_id, device=next(model.parameters()).device)  # (N, width)
    for row, ids in zip(x, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    how = {"temperature": 0.0, "seed": config["seed"], "batch_size": 32, "autocast": autocast, "progress": True}
    if model.config["causal"]:
        out, _ = sample.sample_ar(model, x, **how)
    else:
        out, _ = sample.sample(model, x, config["sampler"], config["steps"], cfg=config["cfg"], **how)
    answers = [ids[len(prompt) :] for ids, prompt in zip(out.tolist(), prompts, strict=True)]
    return [ids[: ids.index(end)] if end in ids else ids for ids in answers]


def solve(model, text, questions, width, end, config, autocast):
    """Questions -> [(equations, answer), ...], the texts of the first and the second pass. What is too long is cut.

    As in training, "Question: ...", "Answer: ..." and "#### ..." are tokenized each on its own.
    """

    alphabet = set(text.meta().get("alphabet", ""))

    def ids_of(head, piece):
        if alphabet:  # a model of characters reads what it knows
            piece = "".join(c for c in piece if c in alphabet)
        return rows.encode(text, "a problem", head + piece)

    def texts(answers):
        return [text.decode([token for token in ids if token != text.bos]) for ids in answers]

    heads = [ids_of(prepare.HEADS[0], question)[: width - 3] for question in questions]
    thoughts = texts(fill(model, heads, width, end, config, autocast))
    asked = [
        (head + ids_of("", thought) if thought else head)[: width - 2] for head, thought in zip(heads, thoughts, strict=True)
    ]
    return list(zip(thoughts, texts(fill(model, asked, width, end, config, autocast)), strict=True))


# ---- The recipe ------------------------------------------------------------------------------------------------------


def small_model(config, folder):
    """Prepares rows of characters, trains SHAPE on them, and returns the folder of the run."""
    settings_of_rows = settings.parse([f"--from={config['from']}", "--tokenizer=char"], prepare, rows)
    prepare.main(settings_of_rows | {"out": f"{folder}/rows", "width": config["width"]})
    keys = SHAPE | {"data": f"{folder}/rows", "out_dir": f"{folder}/run", "seed": config["seed"]}
    keys |= {"block_size": config["width"]}
    keys |= {key: config[key] for key in ("max_iters", "device", "dtype")} | {"eval_interval": config["max_iters"]}
    given = [f"--{key}={value}" for key, value in keys.items()]
    train.main(settings.parse([config["preset"], *given], settings, diffusion, network, train))
    return keys["out_dir"]


def test_file(config):
    if config["from"]:
        return prepare.find("test.jsonl", config["from"], "")
    return download.fetch(TEST[0], Path("data/gsm8k/raw/test.jsonl"), TEST[1])


def main(config):
    """Solves test problems, prints them and writes gsm8k.json and .md. Returns the figures."""
    config |= {key: value for key, value in QUICK.items() if config["quick"] and key not in config.get("given", ())}
    settings.at_least(0, config, "asked", "cfg")
    settings.at_least(1, config, "steps", "max_iters", "width")
    choose("sampler", config["sampler"], sample.SAMPLERS)
    device, autocast = settings.machine(config)
    problems = list(prepare.problems(test_file(config)))[: config["asked"] or None]
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        source = config["ckpt"] or small_model(config, folder)
        model, text, trained = checkpoint.load(source, device)
    require(text and trained.get("row_width"), f"{source} was not trained on rows of data/gsm8k")
    sampled = ("sampler" in config.get("given", ()) and config["sampler"] != "left_to_right") or config["cfg"]
    require(not (model.config["causal"] and sampled), f"{source} is causal: it has neither samplers nor guidance (cfg)")
    questions, wanted = [problem[1] for problem in problems], [problem[3].strip() for problem in problems]
    solved = solve(model.eval(), text, questions, trained["row_width"], trained["row_end"], config, autocast)
    right = [same(final(answer), reference) for (_, answer), reference in zip(solved, wanted, strict=True)]
    formed = sum(final(answer) is not None for _, answer in solved)

    line = {
        "model": config["ckpt"] or "a small one, trained here",
        "parameters": model.n_parameters(),
        "problems": len(right),
    }
    line |= {"answers in form": formed, "right": sum(right), "percent": 100 * sum(right) / len(right), "SMDM 1.1B": PAPER}
    examples = [
        f"{question}\n  equations: {thought}\n  answer: {answer!r}, wanted {reference}"
        for question, (thought, answer), reference in list(zip(questions, solved, wanted, strict=True))[:3]
    ]
    table = results.table("GSM8K test, two passes", [line], {"percent": "{:.1f}"})
    table += "\n".join(["\n```", *examples, "```\n"])
    print(table)
    figures = {"right_percent": line["percent"], "in_form": formed, "problems": len(right), "seconds": time.time() - began}
    results.write(config, "gsm8k", figures | results.about(device), table)
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
