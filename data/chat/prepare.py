"""Conversations: the first question and its answer, in Vicuna's template, as SMDM fine-tunes on ShareGPT (arXiv 2410.18514).

    python -m data.chat.prepare --input=sharegpt.jsonl --tokenizer=llama --width=2048
    python sample.py --ckpt=CKPT --prompt="A chat between ... USER: What is a fjord? ASSISTANT:"

Each line is {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}, or "messages" with
"role" (user, assistant) and "content". The answer is tokenized on its own, so with Llama's tokenizer it begins with a bos
too. Conversations that do not begin with a question and an answer are passed over, longer ones than the width dropped; both
are counted.
"""

import sys

from config import fraction, require, run
from data import rows, writer

DEFAULTS = {
    "input": "",  # files, separated by commas
    "out": "data/chat",  # folder to prepare
    "val_fraction": 0.05,  # of the conversations, held out
}

TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: {} ASSISTANT:"
)


def first_turn(where, record):
    """(question, answer) that a conversation begins with, or None; UserError for a record that is no conversation."""
    turns = record.get("conversations", record.get("messages"))
    good = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    require(good, f'{where}: no list of turns under "conversations" or "messages"')
    said = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns[:2]]
    if [role for role, _ in said] not in (["human", "gpt"], ["user", "assistant"]):
        return None
    require(all(isinstance(text, str) for _, text in said), f"{where}: a turn must have its text as value or content")
    question, answer = (text.strip().encode("utf8", "replace").decode("utf8") for _, text in said)
    return (question, answer) if question and answer else None


def examples(turns, text, val_fraction):
    """Yields what rows.prepare takes, of an iterable of (where, question, answer)."""
    for where, question, answer in turns:
        split = "val" if writer.held_out(question, val_fraction) else "train"
        alone = text.bos is not None
        reply = rows.encode(text, where, answer if alone else f" {answer}", start=alone)
        yield split, where, rows.encode(text, where, TEMPLATE.format(question)), reply


def main(config):
    paths = [path for path in config["input"].split(",") if path]
    require(paths, "say what to prepare: --input=FILE.jsonl")
    fraction(config, "val_fraction")
    found = [(where, first_turn(where, record)) for path in paths for where, record in rows.records(path)]
    turns = [(where, *turn) for where, turn in found if turn]
    print(
        f"{len(found) - len(turns):,} of {len(found):,} conversations passed over: no question and answer at their beginning"
    )
    text = rows.vocabulary(config["tokenizer"], (TEMPLATE.format(question) + " " + answer for _, question, answer in turns))
    meta = rows.prepare(config["out"], examples(turns, text, config["val_fraction"]), text, config["width"])
    print(rows.summary(config["out"], meta))


if __name__ == "__main__":
    run(main, sys.modules[__name__], rows)
