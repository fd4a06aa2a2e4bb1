"""GSM8K in small: the whole pipeline on the real files, with a model too small for the problems.

    python -m experiments.gsm8k --from=FOLDER [--ckpt=RUN] [--quick]

As SMDM evaluates (arXiv 2410.18514): from the question the model writes the equations, from both it
writes the answer, each time filling an example of one width; what follows the last #### counts, and
two answers are equal if they are the same number. Without --ckpt a small character model is trained
first (data/gsm8k/prepare.py), for minutes, not days: its accuracy shows that the pipeline runs, no
more. With --ckpt (a model trained on data/gsm8k) the figure is real.
"""

import re
import sys
import tempfile
import time
from fractions import Fraction

import torch

import config as settings
import sample
import train
from config import require
from data import examples
from data import tokenizer as tokenizers
from data.gsm8k import prepare
from experiments import results
from lib import program
from lib.device import machine
from run import checkpoint
from run.subject import sampler_of

DEFAULTS = {
    "from": "",  # a folder with GSM8K's train.jsonl, test.jsonl, valid.txt; empty: downloaded
    "ckpt": "",  # a model trained on data/gsm8k; empty: train a small one here
    "width": 384,  # characters in an example of the small model; 1 or more
    "max_iters": 600,  # its training steps; 1 or more
    "asked": 200,  # test problems; 0: all 1,319
    "sampler": "confidence",  # one of SAMPLERS
    "steps": 64,  # network calls for the equations, and again for the answer; 1 or more
    "cfg_scale": 0.0,  # guidance (SMDM: 0.1)
    "preset": "configs/pydocs_2400.py",  # the recipe of the small model
}

SAMPLERS = sample.SAMPLERS
SHAPE = {"n_layer": 4, "n_head": 2, "n_embd": 128, "mlp": "relu2", "batch_size": 16}
SHAPE |= {"compile": False, "show_sample": False}
QUICK = {"width": 300, "max_iters": 2, "asked": 2, "steps": 2}
PAPER = "58.5"  # SMDM's 1.1B parameters after 120,193 steps, as published


# ---- 1. Answers ----------------------------------------------------------------------------------


def final(text):
    """What follows the last ####, to the end of its line; None where there is none."""
    answers = re.findall(r"####[ \t]*([^\n]*)", text)
    return answers[-1].strip() if answers else None


def number(text):
    """The Fraction that a text writes: "$1,080.50 ", "3/4", "12%", "70 dollars". Else None."""
    pattern = r"[^\d\-.]*(-?)\$?(\d[\d,]*(?:\.\d+)?|\.\d+)(?:/(\d+))?[^\d]*"
    parts = re.fullmatch(pattern, (text or "").strip().replace("\u2212", "-"))
    if not parts or (parts[3] and not int(parts[3])):
        return None
    value = Fraction(parts[2].replace(",", "")) / int(parts[3] or 1)
    return -value if parts[1] else value


def same(written, wanted):
    """Whether two answers are one number; what is no number is equal to nothing."""
    return number(written) is not None and number(written) == number(wanted)


# ---- 2. The two passes ---------------------------------------------------------------------------


class Solver:
    """A model of examples that solves problems; trained: the config that it was trained with."""

    def __init__(self, model, tokenizer, trained, config, autocast):
        self.model, self.tokenizer, self.autocast = model.eval(), tokenizer, autocast
        self.width, self.eos = trained["example_width"], trained["eos_id"]
        self.options = {"temperature": 0.0, "batch_size": 32}
        self.options |= {key: config[key] for key in ("steps", "cfg_scale", "seed")}
        self.options |= {"sampler": sampler_of(model, config["sampler"])}

    def fill(self, prompts):
        """Complete examples: prompts, a list of ids -> the text behind each, up to an eos."""
        device = self.model.device
        x = torch.full((len(prompts), self.width), self.model.mask_id, device=device)  # (N, width)
        for row, ids in zip(x, prompts, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        with self.autocast():
            out, _ = sample.sample(self.model, x, progress=True, **self.options)  # (N, width)
        answers = [ids[len(p) :] for ids, p in zip(out.tolist(), prompts, strict=True)]
        return [sample.text_of(self.tokenizer, ids, 0, self.eos) for ids in answers]

    def ids_of(self, text):
        """The ids of a piece of an example; a model of characters reads those it knows."""
        alphabet = self.tokenizer.meta().get("alphabet", "")
        known = "".join(c for c in text if c in alphabet) if alphabet else text
        return examples.encode(self.tokenizer, "a problem", known)

    def solve(self, questions):
        """Questions -> [(equations, answer), ...], the texts of both passes.

        What is too long is cut. As in training, "Question: ...", "Answer: ..." and "#### ..." are
        tokenized each on its own.
        """
        heads = [self.ids_of(prepare.HEADS[0] + q)[: self.width - 3] for q in questions]
        thoughts = self.fill(heads)
        prompts = [
            (head + self.ids_of(thought) if thought else head)[: self.width - 2]
            for head, thought in zip(heads, thoughts, strict=True)
        ]
        return list(zip(thoughts, self.fill(prompts), strict=True))


# ---- 3. The recipe -------------------------------------------------------------------------------


def small_model(config, folder):
    """Prepare examples of characters, train SHAPE on them, and return the folder of the run."""
    data, out, width = f"{folder}/examples", f"{folder}/run", config["width"]
    words = [f"--from={config['from']}", "--tokenizer=char", f"--out={data}", f"--width={width}"]
    prepare.main(settings.parse(words, prepare, examples, tokenizers))
    keys = SHAPE | {"data": data, "out_dir": out, "block_size": width}
    keys |= {key: config[key] for key in ("seed", "max_iters", "device", "dtype")}
    keys |= {"eval_interval": config["max_iters"]}
    words = [config["preset"], *(f"--{key}={value}" for key, value in keys.items())]
    train.main(settings.parse(words, *train.MODULES))
    return out


def check(config, source, tokenizer, trained):
    """Raise UserError for a model that cannot be asked, or not in this way."""
    on_examples = tokenizer and trained.get("example_width")
    require(on_examples, f"{source} was not trained on the examples of data/gsm8k")
    chosen = "sampler" in config.get("user_keys", ()) and config["sampler"] != "left_to_right"
    clash = trained["attention"] == "causal" and (chosen or config["cfg_scale"])
    require(not clash, f"{source} is causal: it has neither samplers nor guidance (cfg_scale)")


def main(config):
    """Solve test problems, print them and write gsm8k.json and .md; return the figures."""
    began = time.time()
    if config["quick"]:
        config |= {k: v for k, v in QUICK.items() if k not in config.get("user_keys", ())}
    device, autocast = machine(config)
    tested = prepare.find("test.jsonl", config["from"], "data/gsm8k")
    problems = list(prepare.problems(tested))[: config["asked"] or None]
    with tempfile.TemporaryDirectory() as folder:
        source = config["ckpt"] or small_model(config, folder)
        model, tokenizer, trained = checkpoint.load(source, device)
    check(config, source, tokenizer, trained)
    questions = [question for _, question, _, _ in problems]
    wanted = [answer.strip() for _, _, _, answer in problems]
    solved = Solver(model, tokenizer, trained, config, autocast).solve(questions)
    right = sum(same(final(a), b) for (_, a), b in zip(solved, wanted, strict=True))
    in_form = sum(final(answer) is not None for _, answer in solved)

    n, name = len(problems), config["ckpt"] or "a small one, trained here"
    line = {"model": name, "parameters": model.n_parameters(), "problems": n}
    line |= {"answers in form": in_form, "right": right, "percent": 100 * right / n}
    line |= {"SMDM 1.1B": PAPER}
    shown = [
        f"{question}\n  equations: {thought}\n  answer: {answer!r}, wanted {reference}"
        for question, (thought, answer), reference in zip(questions, solved, wanted, strict=True)
    ]
    table = results.table("GSM8K test, two passes", [line], {"percent": "{:.1f}"})
    table += "\n".join(["\n```", *shown[:3], "```\n"])
    figures = {"right_percent": line["percent"], "in_form": in_form, "problems": n}
    figures |= {"seconds": time.time() - began} | results.about(device)
    results.write(config, "gsm8k", figures, table)
    print(table)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
