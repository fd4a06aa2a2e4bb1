"""Token files as blocks: shuffled for training, in order for evaluation.

A prepared folder is one long text, in which an id (or a blank line) marks the end or the beginning
of each document. A block is any run of block_size tokens and may cross from one document into the
next, as in RADD and SMDM. If blocks must not do so, the text is laid out for that when it is
prepared (writer.py): meta.json then has a "block_size", and documents and blocks start at multiples
of it. No list of documents is ever kept in memory, however long the text.
"""

import hashlib
import json
import math
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from config import ROOT, plural, require

# ---- 1. A prepared folder ------------------------------------------------------------------------


def id_type(vocab_size):
    """The narrowest dtype that also holds the mask, id `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)


def shards(folder, split):
    """The shards of a split in order."""
    names = {path: re.fullmatch(r"(.*)_(\d+)\.bin", path.name) for path in Path(folder).iterdir()}
    numbers = {path: int(name[2]) for path, name in names.items() if name and name[1] == split}
    return sorted(numbers, key=numbers.get)


def preparer(name):
    """The arguments with which python, run in the working directory, prepares data/NAME."""
    path = ROOT / "data" / name / "prepare.py"
    return f"-m data.{name}.prepare" if Path.cwd() == ROOT else str(path)


def read_meta(folder):
    """The meta.json of a prepared folder; UserError if it is missing or damaged."""
    folder = Path(folder)
    recipe = f"{preparer('text')} --input=FILE --out={folder}"
    if folder.is_file():
        recipe = f"{preparer('text')} --input={folder} --out={Path('data', folder.stem)}"
    elif (Path(__file__).parent / folder.name / "prepare.py").is_file():
        recipe = preparer(folder.name)
    path = folder / "meta.json"
    require(path.is_file(), f"no prepared data in {folder}; prepare it with: python {recipe}")
    try:
        small = path.stat().st_size < 2**26  # the largest alphabet takes 2**23
        meta = json.loads(path.read_bytes()) if small else {}
        undamaged = describes_tokens(meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        undamaged = False
    require(undamaged, f"{path} is damaged; prepare it again with: python {recipe}")
    return meta


def hash_of(paths):
    """A hash of the concatenated contents of the files, as 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def is_replaced(folder, trained):
    """Whether the training text in the folder has changed since a model was trained on it.

    trained: the config of the model. False if it or the folder has no hash, as older ones.
    """
    hashes = {read_meta(folder).get("train_hash"), trained.get("train_hash")} - {None}
    return Path(folder) == Path(str(trained.get("data"))) and len(hashes) > 1


def describes_tokens(meta):
    """Whether a meta.json is valid; if not, may raise KeyError, TypeError or AttributeError."""
    V, splits = meta["vocab_size"], meta["splits"].values()
    numbers = [split[key] for split in splits for key in ("tokens", "documents", "bytes")]
    numbers += [V, meta.get("block_size", 1)]
    return (
        all(type(n) is int and 0 < n < 2**63 for n in numbers)
        and V < 2**32
        and isinstance(meta["tokenizer"]["kind"], str)
        and meta["dtype"] == id_type(V).name
    )


class Tokens:
    """The tokens of one split as if they were one long array; they stay on disk.

    Nothing is open or mapped between two reads, so neither file handles nor resident memory grow
    with the data. Raises UserError for a folder that is not prepared or lacks the split, or whose
    shards do not add up.
    """

    def __init__(self, folder, split):
        self.folder, self.meta = Path(folder), read_meta(folder)
        splits = self.meta["splits"]
        require(split in splits, f"{folder} has no split '{split}', only {', '.join(splits)}")
        self.dtype = np.dtype(self.meta["dtype"])
        self.vocab_size = self.meta["vocab_size"]
        self.paths = shards(folder, split)
        width = self.dtype.itemsize  # bytes per id
        sizes = [path.stat().st_size if path.is_file() else 0 for path in self.paths]  # or a link
        held, stated = sum(sizes), splits[split]["tokens"] * width
        require(
            held == stated and all(size % width == 0 for size in sizes),
            f"the {split} shards of {folder} hold {held} bytes, not the {stated} of its meta.json",
        )
        # The first token of each shard, and at the end the number N of tokens.
        self.borders = np.cumsum([0, *sizes]) // width  # (shards + 1,)

    def __len__(self):
        return int(self.borders[-1])

    def __getitem__(self, span):
        """tokens[a:b] -> (b - a,) int64, clipped like any slice."""
        start, stop, step = span.indices(len(self))
        assert step == 1
        return self.windows(np.array([start]), max(0, stop - start))[0]  # (b - a,)

    def windows(self, starts, length):
        """First positions (n,) -> (n, length) int64 tokens."""
        assert np.all((starts >= 0) & (starts + length <= len(self)))
        out = np.empty((len(starts), length), self.dtype)  # (n, length)
        first = np.searchsorted(self.borders, starts, side="right") - 1  # (n,) shards
        end = np.searchsorted(self.borders, starts + length, side="left")  # (n,) one past the last
        for shard in sorted(
            {shard for a, b in zip(first, end, strict=True) for shard in range(a, b)}
        ):
            rows = np.flatnonzero((first <= shard) & (shard < end))
            self._read(shard, zip(rows.tolist(), starts[rows].tolist(), strict=True), out)
        in_vocabulary = not out.size or out.max() < self.vocab_size
        require(in_vocabulary, f"{self.folder} holds ids that its vocabulary lacks")
        return out.astype(np.int64)

    def _read(self, shard, rows, out):
        """Fill in one shard's part of the rows [(row, its first position), ...] of out."""
        low, high = self.borders[shard : shard + 2].tolist()
        with open(self.paths[shard], "rb", buffering=0) as file:
            for row, start in rows:
                a, b = max(start, low), min(start + out.shape[1], high)
                part = out[row, a - start : b - start]  # (b - a,)
                file.seek((a - low) * out.itemsize)
                complete = file.readinto(part) == part.nbytes
                require(complete, f"{file.name} is shorter than it was when it was opened")


# ---- 2. A permutation that needs no memory -------------------------------------------------------


def mix(x):
    """A fixed scrambling of 64-bit words, any uint64 array (the finalizer of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_words(*numbers, count):
    """At most 8 pseudo-random 64-bit words, a function of the integers: (count,) uint64."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8 * count).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permute(i, n, key, rounds=6):
    """The images of i under a pseudo-random permutation of range(n): int64 in the shape of i.

    A Feistel network on pairs (left, right) of Z_a x Z_b with a, b about sqrt(n): each round adds a
    hash of one half to the other, which can be undone. The rectangle has up to a - 1 cells beyond
    n; an image that lands there is mapped again until it is in range, which keeps the map a
    bijection (Black and Rogaway, CT-RSA 2002). Its memory does not depend on n.
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


# ---- 3. Blocks -----------------------------------------------------------------------------------


def sequences_before(config, step):
    """How many sequences a run has read before `step`, whatever its batch sizes were."""
    return config.get("ahead", 0) + step * config["batch_size"]


class Blocks:
    """Shuffled training blocks, each a pure function of (seed, its number in the run).

    Each epoch cuts the text into n windows from its own offset and takes each once, in its own
    order. Raises UserError for a text shorter than one block.
    """

    def __init__(self, tokens, block_size, seed):
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        size, folder = len(tokens), tokens.folder
        laid_out = fits(tokens, block_size)
        enough = size >= block_size
        held = f"{folder} holds {plural(size, 'token')}"
        require(enough, f"{held}, less than one block of {block_size}")
        # The number of windows per epoch, whatever its offset, and the number of offsets: every
        # token comes up in some epoch.
        self.n = size // block_size if laid_out else max(1, (size - block_size + 1) // block_size)
        self.offsets = 1 if laid_out else size - self.n * block_size + 1

    def starts(self, index):
        """Sample numbers (b,) -> (b,) first positions of their windows."""
        epoch, i = np.divmod(index, self.n)
        out = np.empty_like(index)  # (b,)
        for e in np.unique(epoch):
            order, offset = map(int, hash_words(self.seed, int(e), count=2))
            window = permute(i[epoch == e], self.n, order)
            out[epoch == e] = offset % self.offsets + window * self.block_size
        return out

    def batch(self, first, rows):
        """The `rows` (b,) of a batch that `first` blocks precede: (b, block_size)."""
        index = first + np.asarray(rows, np.int64)  # (b,)
        return self.tokens.windows(self.starts(index), self.block_size)


def in_order(tokens, block_size, n=0, end=None):
    """n evenly spaced blocks of the text up to `end`, all for n = 0: (block_size,) int64 each.

    The last one may be shorter.
    """
    fits(tokens, block_size)
    starts = spread(range(0, len(tokens) if end is None else end, block_size), n)
    return [tokens[start : start + block_size] for start in starts]


def fits(tokens, block_size):
    """Whether documents are laid out for blocks of this size, rather than simply concatenated.

    Raises UserError if they are laid out for another size.
    """
    L = tokens.meta.get("block_size")
    advice = f"--block_size must be that, not {block_size}"
    require(L in (None, block_size), f"{tokens.folder} is laid out in blocks of {L}: {advice}")
    return L is not None


def spread(items, n):
    """n evenly spaced items; all of them for n = 0."""
    if not n or n >= len(items):
        return items
    return [items[i * len(items) // n] for i in range(n)]


def prefetch(items, ahead=2):
    """Yield the items of an iterable in order; a thread makes up to `ahead` of them in advance.

    An item's exception is raised here when the item is due. Closing this generator, or leaving it
    by an exception, ends the thread once its current item is done.
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
