"""Your own pairs: .jsonl files with a "prompt" and a "completion" on each line (also .gz, .xz).

    python -m data.pairs.prepare --input=mine.jsonl --tokenizer=gpt2
    python train.py --data=data/pairs --init_from=CKPT

A completion follows its prompt as it is, so it must include the space or newline between the two.
Prompt and completion are tokenized separately, so that `sample.py --prompt=` uses exactly the same
tokens. Which pairs are held out depends on their prompts alone; of a few pairs, those with the
lowest hashes are. A pair longer than the width is dropped and counted; a prompt that fills the
width by itself is an error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too

from config import require
from data import examples, writer
from data import tokenizer as tokenizers
from lib import program
from run import load_checkpoint

DEFAULTS = {
    "input": "",  # files, separated by commas
    "out": "data/pairs",  # folder to prepare
    "val_fraction": 0.05,  # fraction of the pairs to hold out; in [0, 1]
}


def pairs(path):
    """Yield (where, prompt, completion) of a file; UserError for a line that is not such a pair."""
    for where, record in examples.records(path):
        prompt, completion = (
            examples.field(where, record, key) for key in ("prompt", "completion")
        )
        require(completion, f"{where}: the completion is empty")
        yield where, prompt, completion


def tokenized(items, tokenizer, val_fraction, width):
    """Yield examples for examples.prepare from an iterable of (where, prompt, completion)."""
    for where, prompt, completion in items:
        split = "val" if writer.is_held_out(prompt, val_fraction) else "train"
        ids = examples.encode(tokenizer, where, prompt)
        leaves_room = not width or len(ids) + 2 <= width  # one token of answer and the eos
        full = f"the prompt is {len(ids)} tokens, which leaves no answer in an example of {width}"
        require(leaves_room, f"{where}: {full}")
        yield split, where, ids, examples.encode(tokenizer, where, completion, start=False)


def main(config):
    paths = writer.listed(config["input"])
    require(paths, "say what to prepare: --input=FILE.jsonl")
    texts = (prompt + completion for path in paths for _, prompt, completion in pairs(path))
    tokenizer = examples.vocabulary(config["tokenizer"], texts, load_checkpoint)
    prompts = (prompt for path in paths for _, prompt, _ in pairs(path))
    held = writer.adjusted(prompts, config["val_fraction"])
    items = (pair for path in paths for pair in pairs(path))
    ids = tokenized(items, tokenizer, held, config["width"])
    meta = examples.prepare(config["out"], ids, tokenizer, config["width"])
    print(examples.summary(config["out"], meta))
    writer.say_unheld(config["out"], meta, config["val_fraction"])


if __name__ == "__main__":
    program.run(main, sys.modules[__name__], examples, tokenizers)
