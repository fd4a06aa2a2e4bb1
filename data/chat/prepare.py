"""Conversations: the first question and its answer in Vicuna's template, as SMDM does on ShareGPT.

    python -m data.chat.prepare --input=sharegpt.jsonl --tokenizer=llama --width=2048
    python sample.py --ckpt=CKPT --prompt="A chat between ... USER: What is a fjord? ASSISTANT:"

Each line is {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...},
...]}, or "messages" with "role" (user, assistant) and "content". The answer is tokenized on its
own, so with Llama's tokenizer it begins with a bos too (SMDM: arXiv 2410.18514). Conversations that
do not begin with a question and an answer are skipped, those longer than the width are dropped;
both are counted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too

from config import plural, require
from data import examples, writer
from data import tokenizer as tokenizers
from lib import program
from run import load_checkpoint

DEFAULTS = {
    "input": "",  # files, separated by commas
    "out": "data/chat",  # folder to prepare
    "val_fraction": 0.05,  # fraction of the conversations to hold out; in [0, 1]
}

TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: {} ASSISTANT:"
)
SPEAKERS = (["human", "gpt"], ["user", "assistant"])  # of a question and its answer


def first_turn(where, record):
    """The (question, answer) that begin a conversation, or None; UserError if it is malformed."""
    turns = record.get("conversations", record.get("messages"))
    is_list = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    require(is_list, f'{where}: no list of turns under "conversations" or "messages"')
    if [turn.get("from", turn.get("role")) for turn in turns[:2]] not in SPEAKERS:
        return None
    texts = [turn.get("value", turn.get("content")) for turn in turns[:2]]
    all_text = all(isinstance(text, str) for text in texts)
    require(all_text, f"{where}: a turn must have its text as value or content")
    question, answer = (writer.as_utf8(text.strip()) for text in texts)
    return (question, answer) if question and answer else None


def tokenized(turns, tokenizer, val_fraction):
    """Yield examples for examples.prepare from an iterable of (where, question, answer)."""
    for where, question, answer in turns:
        split = "val" if writer.is_held_out(question, val_fraction) else "train"
        prompt = examples.encode(tokenizer, where, TEMPLATE.format(question))
        alone = tokenizer.bos is not None
        answer = answer if alone else f" {answer}"
        yield split, where, prompt, examples.encode(tokenizer, where, answer, start=alone)


def main(config):
    paths = writer.listed(config["input"])
    require(paths, "say what to prepare: --input=FILE.jsonl")
    records = (item for path in paths for item in examples.records(path))
    firsts = [(where, first_turn(where, record)) for where, record in records]
    turns = [(where, *first) for where, first in firsts if first]
    passed = f"passed over: {len(firsts) - len(turns):,} of {plural(len(firsts), 'conversation')}"
    print(f"{passed}, without a question and an answer at the beginning")
    texts = (f"{TEMPLATE.format(question)} {answer}" for _, question, answer in turns)
    tokenizer = examples.vocabulary(config["tokenizer"], texts, load_checkpoint)
    held = writer.adjusted((question for _, question, _ in turns), config["val_fraction"])
    items = tokenized(turns, tokenizer, held)
    meta = examples.prepare(config["out"], items, tokenizer, config["width"])
    print(examples.summary(config["out"], meta))
    writer.say_unheld(config["out"], meta, config["val_fraction"])


if __name__ == "__main__":
    program.run(main, sys.modules[__name__], examples, tokenizers)
