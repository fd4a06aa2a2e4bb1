"""Your own text: .txt and .jsonl files (one object with a key "text" on each line), also as .gz or .xz, and folders.

    python -m data.text.prepare --input=book.txt,more/ --tokenizer=gpt2

Every line of a .jsonl file is a document. A .txt file is cut into documents at the first blank line after 4,096
characters (at a line's end or a space where there is none for long), so that a single file has a held-out part too.
Which documents are held out depends on their text alone: equal documents are always on the same side.
"""

import gzip
import json
import lzma
import os
import sys
import zlib
from pathlib import Path

from config import UserError, at_least, fraction, require, run
from data import tokenizer, writer

DEFAULTS = {
    "input": "",  # files or folders, separated by commas
    "out": "data/text",  # folder to prepare
    "val_fraction": 0.05,  # of the documents, held out; 0: none, 1: all
    "workers": 0,  # processes that tokenize; 0: one for each core
    "block_size": 0,  # 0: a block may hold several documents; L: a block of L holds one, or a piece of one, and end marks
}

DOCUMENT = 4096  # characters that a document cut from a .txt file has at least, and twice that at most
LONGEST = 2**28  # characters in a line of a .jsonl file: a small .xz can unpack to more than there is memory
KINDS = tuple(kind + packed for kind in (".txt", ".jsonl") for packed in ("", ".gz", ".xz"))


def find(item):
    """The files that one item of --input stands for: itself, or all of a known kind in a folder, in a fixed order."""
    path = Path(item)
    require(path.exists(), f"no file or folder {item}")
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.name.endswith(KINDS) and file.is_file())
    require(path.name.endswith(KINDS), f"cannot tell what {item} holds; known kinds: {', '.join(KINDS)}")
    return [path]


def cut(file):
    """The documents of an open text file, which is never held whole."""
    rest = ""
    while more := file.read(DOCUMENT):
        rest += more
        while len(rest) >= 2 * DOCUMENT:
            ends = (rest.find(mark, DOCUMENT) for mark in ("\n\n", "\n", " "))
            end = next((end for end in ends if end >= 0), 2 * DOCUMENT)
            yield rest[:end]
            rest = rest[end:]
    yield rest


def lines(file, path):
    """The documents of an open .jsonl file, `path`."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), start=1):
        require(len(line) < LONGEST, f"{path}, line {number}: longer than {LONGEST} characters")
        try:
            record = json.loads(line) if line.strip() else {"text": ""}
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number}: not JSON") from None
        text = record.get("text") if isinstance(record, dict) else None
        require(isinstance(text, str), f'{path}, line {number}: no text under the key "text"')
        yield text.encode("utf8", "replace").decode("utf8")  # JSON can spell half a character, UTF-8 cannot


def read(path):
    """The documents of one file, one at a time."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            documents = lines(file, path) if ".jsonl" in path.suffixes else cut(file)
            yield from (text.strip("\n") for text in documents if text.strip())
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, MemoryError):  # of an .xz that claims to need more
        raise UserError(f"{path} is damaged or cut off") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def documents(items):
    """All documents of all items; UserError for an item without any."""
    for item in items:
        empty = True
        for path in find(item):
            for text in read(path):
                empty = False
                yield text
        require(not empty, f"{item} holds no text")


def split(texts, val_fraction):
    """Yields (split, text); UserError where one of the two was wanted and got nothing."""
    counts = {"train": 0, "val": 0}
    for text in texts:
        name = "val" if writer.held_out(text, val_fraction) else "train"
        counts[name] += 1
        yield name, text
    for name, wanted in (("train", val_fraction < 1), ("val", val_fraction > 0)):
        advice = f"none of the {sum(counts.values())} documents is in the {name} split; use another --val_fraction"
        require(counts[name] or not wanted, advice)


def main(config):
    items = [item for item in config["input"].split(",") if item]
    require(items, "say what to prepare: --input=FILE or --input=FOLDER")
    fraction(config, "val_fraction")
    at_least(0, config, "workers")
    require(0 <= config["block_size"] <= 2**16, f"block_size must be from 0 to 65536, not {config['block_size']}")
    vocabulary = tokenizer.build(config["tokenizer"], documents(items))
    pairs = split(documents(items), config["val_fraction"])
    workers = config["workers"] or os.cpu_count()
    meta = writer.prepare(config["out"], pairs, vocabulary, workers, block_size=config["block_size"])
    print(writer.summary(config["out"], meta))


if __name__ == "__main__":
    run(main, sys.modules[__name__], writer)
