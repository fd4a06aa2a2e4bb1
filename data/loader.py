"""Token files as blocks: shuffled for training, in order for evaluation; and what counting n-grams achieves on them.

A prepared folder is one long text, the end or the beginning of each document marked by an id (or a blank line), and a block
is any run of block_size tokens: it crosses from one document into the next, as RADD's and SMDM's do. Where a block must not,
the text is laid out for it when it is prepared (writer.py): meta.json then has a "block_size", a document starts at a
multiple of it, and blocks are those runs that do too. No list of documents is ever held, however long the text.
"""

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from config import require


def id_type(vocab_size):
    """The narrowest dtype that also holds the mask, id `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)


def shards(folder, split):
    """The shards of a split in their order."""
    numbered = {path: re.fullmatch(rf"{re.escape(split)}_(\d+)\.bin", path.name) for path in Path(folder).iterdir()}
    return sorted((path for path, match in numbered.items() if match), key=lambda path: int(numbered[path][1]))


def read_meta(folder):
    """The meta.json of a prepared folder; UserError where it is missing or damaged."""
    folder = Path(folder)
    own = (Path(__file__).parent / folder.name / "prepare.py").is_file()
    recipe = f"data.{folder.name}.prepare" if own else f"data.text.prepare --input=FILE --out={folder}"
    path = folder / "meta.json"
    require(path.is_file(), f"no prepared data in {folder}; prepare it with: python -m {recipe}")
    try:
        meta = json.loads(path.read_bytes()) if path.stat().st_size < 2**26 else {}  # the largest alphabet takes 2**23
        counts = [split[key] for split in meta["splits"].values() for key in ("tokens", "documents", "bytes")]
        good = all(type(n) is int and 0 < n < 2**63 for n in [meta["vocab_size"], meta.get("block_size", 1), *counts])
        good = good and meta["vocab_size"] < 2**32 and isinstance(meta["tokenizer"], dict)
        good = good and meta["dtype"] == id_type(meta["vocab_size"]).name
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    require(good, f"{path} is damaged; prepare it again with: python -m {recipe}")
    return meta


class Tokens:
    """The tokens of one split as if they were one long array; they stay on disk.

    Nothing is open or mapped between two reads: neither file handles nor resident memory grow with the data.
    Raises UserError for a folder that is not prepared, lacks the split, or whose shards do not add up.
    """

    def __init__(self, folder, split):
        self.folder, self.meta = Path(folder), read_meta(folder)
        require(split in self.meta["splits"], f"{folder} has no split '{split}', only {', '.join(self.meta['splits'])}")
        self.dtype = np.dtype(self.meta["dtype"])
        self.vocab_size = self.meta["vocab_size"]
        self.paths = shards(folder, split)
        sizes = [path.stat().st_size if path.is_file() else 0 for path in self.paths]  # a link may lead nowhere
        expected = self.meta["splits"][split]["tokens"] * self.dtype.itemsize
        whole = sum(sizes) == expected and all(size % self.dtype.itemsize == 0 for size in sizes)
        require(whole, f"the {split} shards of {folder} hold {sum(sizes)} bytes, not the {expected} of its meta.json")
        self.borders = np.cumsum([0, *sizes]) // self.dtype.itemsize  # (shards + 1,) first token of each shard, and N

    def __len__(self):
        return int(self.borders[-1])

    def __getitem__(self, span):
        """tokens[a:b] -> (b - a,) int64, clipped as any slice is."""
        start, stop, step = span.indices(len(self))
        assert step == 1
        return self.windows(np.array([start]), max(0, stop - start))[0]  # (b - a,)

    def windows(self, starts, length):
        """(n,) first positions -> (n, length) int64 tokens."""
        assert np.all((starts >= 0) & (starts + length <= len(self)))
        out = np.empty((len(starts), length), self.dtype)  # (n, length)
        first = np.searchsorted(self.borders, starts, side="right") - 1  # (n,)
        last = np.searchsorted(self.borders, starts + length, side="left")  # (n,) one past the last shard
        for shard in sorted({shard for span in zip(first, last, strict=True) for shard in range(*span)}):
            rows = np.flatnonzero((first <= shard) & (shard < last))
            self._read(shard, zip(rows.tolist(), starts[rows].tolist(), strict=True), out)
        require(not out.size or out.max() < self.vocab_size, f"{self.folder} holds ids that its vocabulary lacks")
        return out.astype(np.int64)

    def _read(self, shard, rows, out):
        """Fills in what one shard has of the rows [(row, its first position), ...] of out (n, length)."""
        low, high = self.borders[shard : shard + 2].tolist()
        with open(self.paths[shard], "rb", buffering=0) as file:
            for row, start in rows:
                a, b = max(start, low), min(start + out.shape[1], high)
                part = out[row, a - start : b - start]  # (b - a,)
                file.seek((a - low) * out.itemsize)
                require(file.readinto(part) == part.nbytes, f"{file.name} is shorter than it was when it was opened")


def mix(x):
    """A fixed scrambling of 64-bit words, any uint64 array (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(*numbers, count):
    """`count` (8 at most) pseudo-random 64-bit words, a function of the integers in their order -> (count,) uint64."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permute(i, n, key, rounds=6):
    """Where a pseudo-random permutation of range(n) sends each of i -> int64 in the shape of i, in constant memory.

    A Feistel network on pairs (left, right) of Z_a x Z_b with a, b about sqrt(n): each round adds to one half a hash of
    the other, which can be undone. The rectangle has up to a - 1 cells beyond n; an image that lands there is sent on
    until it is in range, which keeps the map a bijection (Black and Rogaway, CT-RSA 2002).
    """
    a = np.uint64(math.isqrt(n - 1) + 1)
    b = np.uint64(-(-n // int(a)))
    keys = hash_words(key, n, count=rounds)  # (rounds,)
    image = np.array(i, np.uint64)
    outside = np.ones(image.shape, bool)
    while outside.any():
        left, right = image[outside] % a, image[outside] // a
        for k in range(0, rounds, 2):
            left = (left + mix(right + keys[k]) % a) % a
            right = (right + mix(left + keys[k + 1]) % b) % b
        image[outside] = right * a + left
        outside = image >= np.uint64(n)
    return image.astype(np.int64)


class Blocks:
    """Shuffled training blocks: every batch is a pure function of (seed, step, position in the global batch).

    An epoch cuts the text into n windows from an offset of its own and takes each once, in an order of its own.
    Raises UserError for a text shorter than one block.
    """

    def __init__(self, tokens, block_size, seed):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        size, laid_out = len(tokens), fits(tokens, block_size)
        require(size >= block_size, f"{tokens.folder} holds {size} tokens, less than one block of {block_size}")
        # The windows of an epoch, whatever its offset, and how many offsets: every token comes up in some epoch.
        self.n = size // block_size if laid_out else max(1, (size - block_size + 1) // block_size)
        self.offsets = 1 if laid_out else size - self.n * block_size + 1

    def starts(self, index):
        """(b,) sample numbers -> (b,) first positions of their windows."""
        epoch, i = np.divmod(index, self.n)
        out = np.empty_like(index)  # (b,)
        for e in np.unique(epoch):
            order, offset = map(int, hash_words(self.seed, int(e), count=2))
            window = permute(i[epoch == e], self.n, order)
            out[epoch == e] = offset % self.offsets + window * self.block_size
        return out

    def batch(self, step, positions, batch_size):
        """The samples at `positions` (b,) of the global batch of `step` -> (b, block_size) int64."""
        index = step * batch_size + np.asarray(positions, np.int64)  # (b,)
        return self.tokens.windows(self.starts(index), self.block_size)


class in_order(Sequence):
    """The text from its beginning in blocks (block_size,) int64, each read when asked for; the last one may be shorter."""

    def __init__(self, tokens, block_size):
        fits(tokens, block_size)
        self.tokens, self.starts = tokens, range(0, len(tokens), block_size)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        return self.tokens[self.starts[i] : self.starts[i] + self.starts.step]


def fits(tokens, block_size):
    """True where documents are laid out for blocks of this size, False where they follow one another.

    Raises UserError where they are laid out for another size.
    """
    wanted = tokens.meta.get("block_size")
    same = wanted in (None, block_size)
    require(same, f"{tokens.folder} is laid out in blocks of {wanted}: --block_size must be that, not {block_size}")
    return wanted is not None


def prefetch(items, ahead=2):
    """Yields the items of an iterable, in their order, while a thread makes up to `ahead` of them beforehand.

    What an item raises is raised here in its turn. Closing this generator, or leaving it by an exception, ends the thread
    once the item in the making is done.
    """
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(ahead))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(thread.submit(next, items, end))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


def ngram_nats(folder, limit=2**24):
    """Nats per held-out token of n-gram models counted on the training text: {"unigram": ..., "bigram": ...}.

    Witten-Bell smoothing, which has nothing to tune: after a context h seen c(h) times before T(h) distinct tokens,
    p(v | h) = (c(hv) + T(h) p(v | h less its first token)) / (c(h) + T(h)), starting from the uniform 1/V.
    Stops at trigrams, or where the table of V^n counts exceeds `limit`. Reads `limit` tokens of each split at most.
    """
    train, val = Tokens(folder, "train")[:limit], Tokens(folder, "val")[:limit]  # (N,) (M,)
    V, nats = read_meta(folder)["vocab_size"], {}
    p = np.full(len(val), 1 / V)  # (M,) of each held-out token
    for n, name in enumerate(["unigram", "bigram", "trigram"], start=1):
        if V**n > limit or len(val) < n:
            break
        counts = np.bincount(ngrams(train, n, V), minlength=V**n).reshape(-1, V)  # (V^(n-1), V)
        seen, kinds = counts.sum(1), (counts > 0).sum(1)  # (V^(n-1),) c(h), T(h)
        context, token = np.divmod(ngrams(val, n, V), V)  # (M - n + 1,)
        c, t, backoff = seen[context], kinds[context], p[n - 1 :]
        p[n - 1 :] = np.where(c > 0, (counts[context, token] + t * backoff) / np.maximum(c + t, 1), backoff)
        nats[name] = float(-np.log(p).mean())
    return nats


def ngrams(x, n, V):
    """(M,) tokens -> (M - n + 1,) each run of n tokens as one number in base V."""
    count = max(0, len(x) - n + 1)
    return sum(x[k : k + count] * V ** (n - 1 - k) for k in range(n))
