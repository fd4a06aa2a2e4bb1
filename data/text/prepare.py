"""Your own text: .txt and .jsonl files (a key "text" on each line), also .gz or .xz, and folders.

    python -m data.text.prepare --input=book.txt,more/ --tokenizer=gpt2
    python -m data.text.prepare --input=train.jsonl --val=val.jsonl     your own held-out part

Every line of a .jsonl file is a document. A .txt file is cut into documents at the first blank line
after 4,096 characters (if there is none for long, at the end of a line or a space). Which documents
are held out depends on their text alone, so equal documents are always on the same side. If that
holds out none or too much of a few documents, the end of the text is held out instead, or nothing
of a text that is too short.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too

import itertools

from config import plural, require
from data import tokenizer, writer
from lib import program
from lib.files import opened
from run import load_checkpoint

DEFAULTS = {
    "input": "",  # files or folders, separated by commas
    "out": "data/text",  # folder to prepare
    "val": "",  # files or folders to hold out, instead of a part of the input
    "val_fraction": 0.05,  # fraction of the documents to hold out; 0: none, 1: all; in [0, 1]
    "workers": 0,  # processes that tokenize; 0: one per core
    "block_size": 0,  # in [0, 65536], tokens of a block of at most one document; 0: of several
}

DOCUMENT = 4096  # minimum characters of a document cut from a .txt file; the maximum is twice that
LEAST = 256  # minimum characters to hold out: fewer say nothing about a model
LONGEST = 2**28  # maximum characters of a .jsonl line: a small .xz can unpack to fill the memory
KINDS = tuple(kind + packed for kind in (".txt", ".jsonl") for packed in ("", ".gz", ".xz"))


def find(item):
    """The files of an item of --input, in a fixed order: itself, or those of known kinds in it."""
    path = Path(item)
    require(path.exists(), f"no file or folder {item}")
    if path.is_dir():
        return sorted(file for file in in_folder(path) if file.name.lower().endswith(KINDS))
    advice = f"known kinds: {', '.join(KINDS)}"
    require(path.name.lower().endswith(KINDS), f"cannot tell what {item} holds; {advice}")
    return [path]


def in_folder(path):
    """All files in a folder and its folders, but for hidden ones."""
    files = (file for file in path.rglob("*") if file.is_file())
    return (file for file in files if not is_hidden(file.relative_to(path)))


def other_kinds(item):
    """The end of a message: how many files of other kinds are in a folder; "" if none are."""
    path = Path(item)
    others = [] if path.is_file() else [*{*in_folder(path)} - {*find(item)}]
    names = f"{plural(len(others), 'file')} of other kinds (as {min(others)})" if others else ""
    return f"{names} left out; known kinds: {', '.join(KINDS)}" if names else ""


def is_hidden(path):
    """Whether a file is for internal use by a system or program: .git/x.txt, macOS's ._book.txt."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def cut(file):
    """The documents of an open text file, which is never read as a whole."""
    rest = ""
    while more := file.read(DOCUMENT):
        rest += more
        while len(rest) >= 2 * DOCUMENT:
            end = border(rest, DOCUMENT, len(rest)) or 2 * DOCUMENT
            yield rest[:end]
            rest = rest[end:]
    yield rest


def border(text, start, end):
    """Where to cut a text between two positions: a blank line, a line end or a space, or None."""
    marks = (text.find(mark, start, end) for mark in ("\n\n", "\n", " "))
    return next((place for place in marks if place >= 0), None)


def lines(file, path):
    """The documents of the open .jsonl file `path`."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), start=1):
        where = f"{path}, line {number}"
        require(len(line) < LONGEST, f"{where}: longer than {LONGEST} characters")
        text = writer.record_of(line, where).get("text") if line.strip() else ""
        require(isinstance(text, str), f'{where}: no text under the key "text"')
        yield writer.as_utf8(text)


def read(path):
    """The documents of one file, one at a time."""
    with opened(path) as file:
        texts = lines(file, path) if ".jsonl" in path.name.lower() else cut(file)
        yield from (text.strip("\n") for text in texts if text.strip())


def documents(items):
    """All documents of all items, each file once; UserError for an item without any."""
    seen = set()
    for item in items:
        empty = True
        for path in find(item):
            if path.resolve() in seen:  # read twice, a part of it could be held out and learnt
                empty = False
                continue
            seen.add(path.resolve())
            for text in read(path):
                empty = False
                yield text
        rest = other_kinds(item)
        require(not empty, f"{item} holds no text{': ' if rest else ''}{rest}")


def split(texts, val_fraction):
    """(split, text) of all texts(): some of them, or the end of the last ones, are val."""
    few = itertools.islice(texts(), writer.FEW + 1)
    sizes = [(len(text), writer.is_held_out(text, val_fraction)) for text in few]
    total, held = sum(n for n, _ in sizes), sum(n for n, is_val in sizes if is_val)
    are_many = len(sizes) > writer.FEW
    if not are_many and val_fraction * total < LEAST:
        val_fraction = 0
    if are_many or val_fraction in (0, 1) or writer.about_right(held, total, val_fraction):
        part = {True: "val", False: "train"}
        return ((part[writer.is_held_out(text, val_fraction)], text) for text in texts())
    return end_held_out(texts(), round((1 - val_fraction) * total), total)


def end_held_out(texts, start, total):
    """Yield (split, text); of `total` characters, those from about `start` on are val."""
    seen = 0
    for text in texts:
        here = start - seen  # where val begins in this text
        if 0 < here < len(text):
            here = border(text, here, here + (total - start) // 2) or here
            yield "train", text[:here]
            yield "val", text[here:].strip("\n")
        else:
            yield "train" if here > 0 else "val", text
        seen += len(text)


def main(config):
    items, val = writer.listed(config["input"]), writer.listed(config["val"])
    require(items, "say what to prepare: --input=FILE or --input=FOLDER")
    clash = val and "val_fraction" in config.get("user_keys", ())
    require(not clash, "give val or val_fraction, not both: what val names is all that is held out")
    learnt = {file.resolve() for item in items for file in find(item)}
    both = next((file for item in val for file in find(item) if file.resolve() in learnt), None)
    require(not both, f"{both} of --val is in --input, too: what is learnt is not held out")
    L, workers = config["block_size"], config["workers"] or writer.cores()
    vocabulary = tokenizer.named(config["tokenizer"], documents([*items, *val]), load_checkpoint)
    pairs = split(lambda: documents(items), 0 if val else config["val_fraction"])
    pairs = itertools.chain(pairs, (("val", text) for text in documents(val)))
    meta = writer.prepare(config["out"], pairs, vocabulary, workers, block_size=L)
    print(writer.summary(config["out"], meta))
    for rest in dict.fromkeys(filter(None, map(other_kinds, [*items, *val]))):
        print(rest)
    writer.say_unheld(config["out"], meta, 0 if val else config["val_fraction"])


if __name__ == "__main__":
    program.run(main, sys.modules[__name__], tokenizer)
