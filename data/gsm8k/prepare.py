"""GSM8K (arXiv 2110.14168), grade-school problems solved by equations, in the two steps of SMDM.

    python -m data.gsm8k.prepare --tokenizer=llama --width=256 [--from=FOLDER | --augmented]

A line `question||<<16-3-4=9>> <<9*2=18>> #### 18` (the form of implicit chain of thought, arXiv
2311.01460) gives two examples: prompt "Question: ..." with answer "Answer: <<...>> ", and both of
these as the prompt with answer "#### 18" and its newline. The three pieces are tokenized separately
with a bos each (SMDM: arXiv 2410.18514). A line too long for its second example gives neither.

The training lines are the equations of GSM8K's own 7,473 problems, without the 500 in valid.txt;
SMDM's are the 384,620 of the augmented file (87 MB). The val split is valid.txt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too

import itertools
import re

from config import require
from data import download, examples
from data import tokenizer as tokenizers
from lib import program
from run import load_checkpoint

DEFAULTS = {
    "from": "",  # a folder with the files; without one they are downloaded
    "augmented": False,  # train on the augmented file
    "out": "data/gsm8k",  # folder to prepare
}

HEADS = ("Question: ", "Answer: ", "####")  # of the three pieces
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
ICOT = "da03/implicit_chain_of_thought/main/data/gsm8k"
FILES = {  # name: (address, sha256)
    "train.jsonl": (
        f"{GSM8K}/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    "train.txt": (
        f"https://media.githubusercontent.com/media/{ICOT}/train.txt",
        "6f9a20bc1476ca65eee9bc5117c2d0582b1f1733d5148ffc0ff29cad2a9e9c6b",
    ),
    "valid.txt": (
        f"https://raw.githubusercontent.com/{ICOT}/valid.txt",
        "04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87",
    ),
    "test.jsonl": (
        f"{GSM8K}/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
}


def find(name, folder, out):
    """The path of a file: in the folder (also as .gz, or with the prefix icot_) or downloaded."""
    if not folder:
        url, sha256 = FILES[name]
        return download.fetch(url, Path(out, "raw", name), sha256)
    names = [f"{before}{name}{packed}" for before in ("", "icot_") for packed in ("", ".gz")]
    path = next((path for path in (Path(folder, name) for name in names) if path.is_file()), None)
    require(path, f"no {name} in {folder}")
    return path


def problems(path):
    """Yield (where, question, thought, answer) of a .jsonl or .txt file; UserError for others."""
    if ".jsonl" in Path(path).name.lower():
        for where, record in examples.records(path):
            question, solution = (
                examples.field(where, record, key) for key in ("question", "answer")
            )
            require("####" in solution, f"{where}: there is no #### before the answer")
            equations, answer = re.findall(r"<<.*?>>", solution), solution.rpartition("####")[2]
            yield where, question, " ".join(equations) + " ", f"{answer.rstrip()}\n"
        return
    for where, line in examples.lines(path):
        parts = re.fullmatch(r"(.*?)\|\|(.*?)####(.*\n?)", line)
        require(parts, f"{where}: not of the form question||equations #### answer")
        yield where, *parts.groups()


def tokenized(items, split, tokenizer, width):
    """Yield examples for examples.prepare from (where, question, thought, answer) items."""
    for where, *pieces in items:
        question, thought, answer = (
            examples.encode(tokenizer, where, a + b) for a, b in zip(HEADS, pieces, strict=True)
        )
        yield split, where, question + thought, answer
        if not width or len(question + thought + answer) < width:
            yield split, where, question, thought


def main(config):
    require(not config["from"] or Path(config["from"]).is_dir(), f"no folder {config['from']}")
    # A UserError comes before a download.
    tokenizers.named(config["tokenizer"], [], load_checkpoint)
    names = ("train.txt" if config["augmented"] else "train.jsonl", "valid.txt")
    train, valid = (find(name, config["from"], config["out"]) for name in names)
    held_out = {question.strip() for _, question, *_ in problems(valid)}
    learnt = (problem for problem in problems(train) if problem[1].strip() not in held_out)
    texts = ("".join(pieces) for path in (train, valid) for _, *pieces in problems(path))
    texts = itertools.chain(HEADS, texts)
    tokenizer = examples.vocabulary(config["tokenizer"], texts, load_checkpoint)
    items = itertools.chain(
        tokenized(learnt, "train", tokenizer, config["width"]),
        tokenized(problems(valid), "val", tokenizer, config["width"]),
    )
    meta = examples.prepare(config["out"], items, tokenizer, config["width"])
    print(examples.summary(config["out"], meta))


if __name__ == "__main__":
    program.run(main, sys.modules[__name__], examples, tokenizers)
