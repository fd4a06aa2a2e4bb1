"""Text to token files, streamed: the code that all data/NAME/prepare.py share.

A prepared folder holds flat token ids in shards (train_00000.bin, ..., val_00000.bin, ...) and
meta.json, which is written last: a folder with a meta.json is complete.

Documents follow one another, each with an id or a separator at its border, and training blocks
cross from one into the next. With a `block_size` L they do not: a document starts at a multiple of
L and is padded with eos (the tokenizer's, else a newline) to the next one, so that a block is one
document or a part of one. A document that fills its blocks exactly has no eos. The padding is
treated like other text: it is masked, predicted, and counted as tokens.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import types
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, plural, require
from data import loader
from data import tokenizer as tokenizers
from lib.files import only_one, set_aside, to_json, whole_file, writing

SHARD = 100_000_000  # tokens per shard, except the last
FEW = 1000  # documents or prompts: of so few, a hash may hold out none or far too many


# ---- 1. Text in ----------------------------------------------------------------------------------


def listed(names):
    """The names in a comma-separated list; a file's or folder's name may contain commas itself."""
    parts, paths = names.split(","), []
    while parts:
        lengths = range(len(parts), 1, -1)
        n = next((n for n in lengths if os.path.exists(",".join(parts[:n]))), 1)
        paths.append(",".join(parts[:n]))
        parts = parts[n:]
    return [name for name in paths if name]


def record_of(line, where):
    """The JSON object on a line; UserError, beginning with `where`, for anything else."""
    try:
        record, what = json.loads(line), "no JSON object"
    except (ValueError, RecursionError):
        record, what = None, "not JSON"
    what = "a JSON array" if line.lstrip().startswith("[") else what
    require(isinstance(record, dict), f"{where}: {what}; each line must be an object of its own")
    return record


def as_utf8(text):
    """The text with lone surrogates, which JSON can express but UTF-8 cannot, replaced."""
    return text.encode("utf8", "replace").decode("utf8")


def is_held_out(name, fraction):
    """True for about `fraction` of all names: a fixed pseudo-random function of the name alone."""
    return draw_of(name) < fraction * 2**64


def draw_of(name):
    """A pseudo-random number below 2^64, always the same for the same name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf8", "replace")).digest()[:8], "big")


def about_right(held, total, fraction):
    """Whether the part held out is between half the `fraction` and twice as much."""
    return fraction / 2 <= held / max(1, total) <= 2 * fraction


def adjusted(names, fraction):
    """The fraction itself, or another if is_held_out holds out too little or too much of few names.

    With it, is_held_out holds out the fraction of them, rounded down: those with the lowest draws.
    """
    names = list(itertools.islice(names, FEW + 1))
    draws = sorted(set(map(draw_of, names)))
    held = sum(draw < fraction * 2**64 for draw in draws)
    if len(names) > FEW or about_right(held, len(draws), fraction):
        return fraction
    borders, n = [0, *draws, 2**64], int(fraction * len(draws))
    return (borders[n] + borders[n + 1]) / 2**65


# ---- 2. A prepared folder ------------------------------------------------------------------------


def prepare(folder, documents, tokenizer, workers=1, shard_tokens=SHARD, block_size=0):
    """Tokenize `documents`, an iterable of (split, text), into `folder`; return its meta.

    The documents are streamed: memory does not grow with their number. The number of workers
    changes only the speed. block_size > 0: no block of that size crosses from one document into
    another. The folder keeps its old contents until all new shards are written. Raises UserError if
    there is no text at all or the system cannot write.
    """
    with replacing(folder) as building:
        grouped = batches(documents, "" if block_size else tokenizer.separator)
        encoded = encode_all(grouped, tokenizer, workers, block_size)
        splits = write_shards(building, encoded, shard_tokens)
        require(splits, f"there is no text to prepare in {folder}")
        meta = about(tokenizer) | {"splits": splits}
        meta |= {"block_size": block_size} if block_size else {}
        publish(building, Path(folder), meta)
    return meta


def about(tokenizer):
    """The entries of meta.json that describe the tokenizer."""
    V = tokenizer.vocab_size
    return {"tokenizer": tokenizer.meta(), "vocab_size": V, "dtype": loader.id_type(V).name}


@contextlib.contextmanager
def replacing(folder):
    """Yield an empty folder inside `folder` for new shards, and remove it afterwards; see publish.

    Raises UserError if the system cannot write or another program is preparing the folder.
    """
    building = Path(folder, ".preparing")
    with only_one(folder, "out", "meta.json"), writing(folder):
        try:
            shutil.rmtree(building, ignore_errors=True)  # what a killed run left
            building.mkdir()
            yield building
        finally:
            shutil.rmtree(building, ignore_errors=True)


def publish(building, folder, meta):
    """Swap in the new shards (see clear_away); there is no meta.json until the last is in place.

    meta.json gets a hash of the training text, by which a model knows what it was trained on.
    """
    meta["train_hash"] = loader.hash_of(loader.shards(building, "train"))
    clear_away(folder, meta)
    for new in building.iterdir():
        new.replace(folder / new.name)
    with whole_file(folder / "meta.json") as path:
        path.write_bytes(described(meta).encode())


def summary(folder, meta):
    """A readable line about a prepared folder."""
    splits = ", ".join(
        f"{name} {plural(split['tokens'], 'token')} of {plural(split['documents'], 'document')}"
        for name, split in meta["splits"].items()
    )
    V = meta["vocab_size"]
    return f"{folder}: {splits}; {meta['tokenizer']['kind']} tokenizer, V = {V}"


def clear_away(folder, meta):
    """Delete a folder's old data, or keep them elsewhere in it if `meta` does not describe them."""
    path = folder / "meta.json"
    if not path.is_file():
        return
    splits = {"train", "val", "test", *meta["splits"]}
    old = [path, *(file for split in splits for file in folder.glob(f"{split}_*.bin"))]
    if path.read_bytes() != described(meta).encode():
        print(f"the data that were here are kept in {set_aside(folder, old)}")
        return
    for file in old:
        file.unlink()


def described(meta):
    """The text of a meta.json."""
    return to_json(meta, ensure_ascii=False, indent=1)


def say_unheld(folder, meta, fraction):
    """Report if the held-out part is far from the fraction that was wanted, or empty."""
    sizes = {name: split["tokens"] for name, split in meta["splits"].items()}
    held, total = sizes.get("val", 0), sum(sizes.values())
    if fraction and not held:
        print(f"{folder} is too short to hold anything out: it trains without evaluations")
    elif not about_right(held, total, fraction) and 0 < fraction < 1:
        reason = f"not val_fraction {fraction}: documents are whole, and equal ones stay together"
        print(f"{folder} holds {held / total:.0%} of its tokens out, {reason}")


def write_shards(folder, encoded, shard_tokens):
    """Write all shards; return {split: {tokens, documents, bytes}}, UTF-8 bytes with separators."""
    splits = {}
    with tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for split, ids, n_documents, n_bytes in itertools.chain.from_iterable(encoded):
            total = splits.setdefault(split, {"tokens": 0, "documents": 0, "bytes": 0})
            append(folder, split, ids, total["tokens"], shard_tokens)
            for key, amount in zip(total, (len(ids), n_documents, n_bytes), strict=True):
                total[key] += amount
            bar.update(n_bytes)
    return splits


def append(folder, split, ids, tokens, shard_tokens=SHARD):
    """Append `ids` to a split that already has `tokens`; after a full shard a new one begins."""
    while len(ids):
        shard, filled = divmod(tokens, shard_tokens)
        part, ids = ids[: shard_tokens - filled], ids[shard_tokens - filled :]
        with open(folder / f"{split}_{shard:05d}.bin", "ab") as file:
            file.write(part.tobytes())
        tokens += len(part)


# ---- 3. Text to ids, by several processes --------------------------------------------------------


def batches(documents, separator, characters=2**20):
    """Group (split, text) into lists of about `characters`, with separators between documents."""
    batch, size, begun = [], 0, set()
    for split, text in documents:
        if not text:
            continue
        batch.append((split, separator + text if split in begun else text))
        begun.add(split)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(batch, meta, block_size):
    """A list of (split, text) -> [(split, ids, number of documents, number of bytes), ...]."""
    tokenizer, encoded = rebuilt(meta), []
    dtype = loader.id_type(tokenizer.vocab_size)
    for split in sorted({split for split, _ in batch}):
        texts = [text for name, text in batch if name == split]
        ids = itertools.chain.from_iterable(laid_out(tokenizer, text, block_size) for text in texts)
        n_bytes = sum(len(text.encode("utf8", "replace")) for text in texts)
        encoded.append((split, np.fromiter(ids, dtype), len(texts), n_bytes))
    return encoded


def laid_out(tokenizer, text, block_size):
    """The ids of one document, padded with eos to a multiple of block_size, if that is not 0."""
    ids = tokenizer.document(text)
    if not block_size:
        return ids
    eos = tokenizer.encode("\n", start=False)[-1] if tokenizer.eot is None else tokenizer.eot
    ids = ids[:-1] if ids[-1] == tokenizer.eot else ids
    return ids + [eos] * (-len(ids) % block_size)


@functools.cache
def rebuilt(meta):
    """The tokenizer of a meta in JSON, built once per process: some cannot be sent to another."""
    return tokenizers.from_meta(json.loads(meta))


def cores():
    """How many cores this process may use; at most 61, since Windows waits for no more at once."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(61, len(affinity(0)) if affinity else os.cpu_count() or 1)


@contextlib.contextmanager
def nameless_main():
    """Processes started in this block neither run the main program again nor receive Ctrl-C.

    They would run it to know its names, and a script without a guard would start again in each.
    Ours need none of its names, and end with the program.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    mask = getattr(signal, "pthread_sigmask", lambda *_: ())  # Windows has none
    before = mask(getattr(signal, "SIG_BLOCK", 0), [signal.SIGINT])
    try:
        yield
    finally:
        mask(getattr(signal, "SIG_SETMASK", 0), before)
        sys.modules["__main__"] = main


def encode_all(batches, tokenizer, workers, block_size):
    """encode_batch of all batches, in order, by several processes with a few batches each."""
    meta, pending = to_json(tokenizer.meta()), deque()
    first = list(itertools.islice(batches, 2 if workers > 1 else 0))
    batches = itertools.chain(first, batches)
    if len(first) < 2:  # one batch is not worth a process
        yield from (encode_batch(batch, meta, block_size) for batch in batches)
        return
    spawn, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, spawn, signal.signal, ignore) as pool:  # Ctrl-C is ours
        try:
            for batch in batches:
                with nameless_main():
                    pending.append(pool.submit(encode_batch, batch, meta, block_size))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except (
            BrokenProcessPool,
            OSError,
        ):  # an OSError if the pool's pipes were already closed
            lost = "a tokenizing process died, perhaps for lack of memory; try --workers=1"
            raise UserError(lost) from None
