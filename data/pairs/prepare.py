"""Your own pairs: .jsonl files with a "prompt" and a "completion" on each line (also .gz, .xz), for conditional training.

    python -m data.pairs.prepare --input=mine.jsonl --tokenizer=gpt2
    python train.py --data=data/pairs --init_from=CKPT

A completion goes on from its prompt as it is, so it brings the space or the newline that stands between the two. The prompt
is tokenized first and the completion after it: `sample.py --prompt=` then asks with the very same tokens. Which pairs are
held out depends on their prompts alone. A pair longer than the width is dropped and counted; a prompt that fills the width
by itself is an error.
"""

import sys

from config import fraction, require, run
from data import rows, writer

DEFAULTS = {
    "input": "",  # files, separated by commas
    "out": "data/pairs",  # folder to prepare
    "val_fraction": 0.05,  # of the pairs, held out
}


def pairs(path):
    """Yields (where, prompt, completion) of a file; UserError for a line that is no such pair."""
    for where, record in rows.records(path):
        prompt, completion = rows.field(where, record, "prompt"), rows.field(where, record, "completion")
        require(completion, f"{where}: the completion is empty")
        yield where, prompt, completion


def examples(found, text, val_fraction, width):
    """Yields what rows.prepare takes, of an iterable of (where, prompt, completion)."""
    seen = set()
    for where, prompt, completion in found:
        split = "val" if writer.held_out(prompt, val_fraction) else "train"
        given, wanted = rows.encode(text, where, prompt), rows.encode(text, where, completion, start=False)
        fits = not width or len(given) + 2 <= width  # with one token of answer and the end mark
        require(fits, f"{where}: the prompt is {len(given)} tokens, which leaves no answer in a row of {width}")
        seen.add(split)
        yield split, where, given, wanted
    require(len(seen) == 2, f"all pairs are in the {'/'.join(seen)} split; use another --val_fraction")


def main(config):
    paths = [path for path in config["input"].split(",") if path]
    require(paths, "say what to prepare: --input=FILE.jsonl")
    fraction(config, "val_fraction")
    texts = (prompt + completion for path in paths for _, prompt, completion in pairs(path))
    text = rows.vocabulary(config["tokenizer"], texts)
    found = (pair for path in paths for pair in pairs(path))
    meta = rows.prepare(config["out"], examples(found, text, config["val_fraction"], config["width"]), text, config["width"])
    print(rows.summary(config["out"], meta))


if __name__ == "__main__":
    run(main, sys.modules[__name__], rows)
