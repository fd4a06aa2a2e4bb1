"""Text to token files, streamed: what all of data/NAME/prepare.py share.

A prepared folder holds flat token ids in shards (train_00000.bin, ..., val_00000.bin, ...) and meta.json, which is
written last: a folder with a meta.json is complete.

Documents follow one another, each with the mark of its border, and blocks of training cross from one into the next. With a
`block_size` L they do not: a document starts at a multiple of L, and what it leaves of its last L tokens is filled up with
its end mark (the tokenizer's, else a newline), so that a block is one document or a piece of one. A document that fills its
blocks exactly carries no end mark. The fill is text like any other: it is hidden, predicted, and counted as tokens.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import shutil
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, require, whole_file
from data import loader
from data import tokenizer as tokenizers

DEFAULTS = {
    "tokenizer": "char",  # char | byte | gpt2 | llama
}


def held_out(name, fraction):
    """True for about `fraction` of all names: a fixed pseudo-random choice that depends on nothing but the name."""
    digest = hashlib.sha256(name.encode("utf8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def prepare(folder, documents, tokenizer, workers=1, shard_tokens=100_000_000, block_size=0):
    """Tokenizes `documents`, an iterable of (split, text), into `folder`; returns its meta.

    The documents are streamed: memory does not grow with their number. The number of workers changes the speed and nothing
    else. block_size > 0: no block of that size crosses from one document into another. The folder keeps what it held until
    the new shards are all written. Raises UserError where there is no text at all, or the system cannot write.
    """
    folder = Path(folder)
    building = folder / ".preparing"
    try:
        shutil.rmtree(building, ignore_errors=True)  # what a killed run left
        building.mkdir(parents=True)
        grouped = batches(documents, "" if block_size else tokenizer.separator)
        splits = write_shards(building, encode_all(grouped, tokenizer, workers, block_size), shard_tokens)
        require(splits, f"there is no text to prepare in {folder}")
        dtype = loader.id_type(tokenizer.vocab_size).name
        meta = {"tokenizer": tokenizer.meta(), "vocab_size": tokenizer.vocab_size, "dtype": dtype, "splits": splits}
        meta |= {"block_size": block_size} if block_size else {}
        publish(building, folder, meta)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # a folder made for nothing; one that holds anything stays
    return meta


def summary(folder, meta):
    """One line about a prepared folder, for people."""
    parts = [f"{name} {s['tokens']:,} tokens of {s['documents']:,} documents" for name, s in meta["splits"].items()]
    return f"{folder}: {', '.join(parts)}; {meta['tokenizer']['kind']} tokenizer, V = {meta['vocab_size']}"


def publish(building, folder, meta):
    """Swaps the new shards in; without a meta.json until the last of them is there."""
    (folder / "meta.json").unlink(missing_ok=True)
    for old in [path for split in {"train", "val", *meta["splits"]} for path in loader.shards(folder, split)]:
        old.unlink()
    for new in building.iterdir():
        new.rename(folder / new.name)
    with whole_file(folder / "meta.json") as path:
        path.write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf8")


def write_shards(folder, encoded, shard_tokens):
    """Writes all shards; returns {split: {tokens, documents, bytes}}, bytes being UTF-8 with the separators."""
    splits = {}
    with tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for split, ids, n_documents, n_bytes in itertools.chain.from_iterable(encoded):
            total = splits.setdefault(split, {"tokens": 0, "documents": 0, "bytes": 0})
            append(folder, split, ids, total["tokens"], shard_tokens)
            for key, amount in zip(total, (len(ids), n_documents, n_bytes), strict=True):
                total[key] += amount
            bar.update(n_bytes)
    return splits


def append(folder, split, ids, tokens, shard_tokens):
    """Appends `ids` to a split that has `tokens` already, beginning a new shard wherever one is full."""
    while len(ids):
        shard, filled = divmod(tokens, shard_tokens)
        part, ids = ids[: shard_tokens - filled], ids[shard_tokens - filled :]
        with open(folder / f"{split}_{shard:05d}.bin", "ab") as file:
            file.write(part.tobytes())
        tokens += len(part)


def batches(documents, separator, characters=2**20):
    """Groups (split, text) into lists of about `characters`; the separator goes between the documents of a split."""
    batch, size, begun = [], 0, set()
    for split, text in documents:
        if not text:
            continue
        batch.append((split, separator * (split in begun) + text))
        begun.add(split)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(batch, meta, block_size):
    """[(split, ids, number of documents, number of bytes), ...] for a list of (split, text) and a tokenizer's meta."""
    tokenizer, encoded = rebuilt(meta), []
    for split in sorted({split for split, _ in batch}):
        texts = [text for name, text in batch if name == split]
        ids = list(itertools.chain.from_iterable(laid_out(tokenizer, text, block_size) for text in texts))
        n_bytes = sum(len(text.encode("utf8", "replace")) for text in texts)
        encoded.append((split, np.array(ids, loader.id_type(tokenizer.vocab_size)), len(texts), n_bytes))
    return encoded


def laid_out(tokenizer, text, block_size):
    """The ids of one document, filled up to a multiple of block_size with its end mark where that is not 0."""
    ids = tokenizer.document(text)
    if not block_size:
        return ids
    end = tokenizer.encode("\n", start=False)[-1] if tokenizer.eot is None else tokenizer.eot
    ids = ids[:-1] if ids[-1] == tokenizer.eot else ids
    return ids + [end] * (-len(ids) % block_size)


@functools.cache
def rebuilt(meta):
    """The tokenizer of a meta in JSON, built once in each process: not every tokenizer can be sent to another."""
    return tokenizers.from_meta(json.loads(meta))


def encode_all(batches, tokenizer, workers, block_size):
    """encode_batch over all batches, in their order, by several processes with a few batches under way each."""
    meta, pending = json.dumps(tokenizer.meta()), deque()
    if workers == 1:
        yield from (encode_batch(batch, meta, block_size) for batch in batches)
        return
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is for the parent
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), **quiet) as pool:
        try:
            for batch in batches:
                pending.append(pool.submit(encode_batch, batch, meta, block_size))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except (BrokenProcessPool, OSError):  # an OSError where the pool's pipes were already closed
            raise UserError("a tokenizing process died, perhaps for lack of memory; try --workers=1") from None
