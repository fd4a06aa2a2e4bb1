"""Conditional data: rows of one width, each a prompt, its answer, an end mark, and end marks up to the width.

A folder of rows is a folder of token files (writer.py) with two things more. meta.json has "width", the tokens of a row,
and "end", the id of the end mark; its "documents" are rows, its "bytes" those of the answers. SPLIT_prompt.bin has two
little-endian uint16 for each row: tokens of the prompt, and of prompt, answer and one end mark together. Row r is the ids
r * width to (r + 1) * width of the split. A prompt of 0 tokens makes a row that noise may hide entirely.

Noise falls on all that follows a prompt, every end mark included: so a model learns where an answer ends, and a row of the
full width is what a sampler fills later. All rows cost the same, and none depends on its neighbours in a batch.
"""

import contextlib
import gzip
import itertools
import json
import lzma
import shutil
import zlib
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, nearest, require
from data import loader, writer
from data import tokenizer as tokenizers

DEFAULTS = {
    "tokenizer": "gpt2",  # char | byte | gpt2 | llama, or a prepared folder, whose tokenizer is then used
    "width": 0,  # tokens in a row, prompt and end mark included; 0: as many as the longest needs
}

LENGTH, WIDEST = np.dtype("<u2"), 65535  # of SPLIT_prompt.bin
END = "\0"  # the end mark where a tokenizer has no id for it


# ---- Text in ---------------------------------------------------------------------------------------------------------


def lines(path):
    """Yields (where, line) of a text file, perhaps .gz or .xz, less blank lines; where is "FILE, line N", for messages."""
    path = Path(path)
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError):
        raise UserError(f"{path} is damaged or cut off") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def records(path):
    """Yields (where, dict) of a file with a JSON object on each line."""
    for where, line in lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not JSON") from None
        require(isinstance(record, dict), f"{where}: not a JSON object with keys, but a {type(record).__name__}")
        yield where, record


def field(where, record, key):
    """The text under a key; UserError where there is none."""
    require(key in record, f'{where}: no key "{key}"{nearest(key, record)}')
    require(isinstance(record[key], str), f'{where}: "{key}" must be text, not {str(record[key])[:40]}')
    return record[key].encode("utf8", "replace").decode("utf8")  # JSON can spell half a character, UTF-8 cannot


# ---- Text to ids -----------------------------------------------------------------------------------------------------


def vocabulary(name, texts):
    """The tokenizer that the key `tokenizer` names; `texts`, an iterable of str, is read for a new alphabet only."""
    if Path(name, "meta.json").is_file():
        return tokenizers.from_meta(loader.read_meta(name)["tokenizer"])
    return tokenizers.build(name, itertools.chain([END], texts))


def end_mark(text):
    """The id that ends an answer: the tokenizer's own, else that of the character NUL, else (an old alphabet) a newline."""
    if text.eot is not None:
        return text.eot
    for mark in (END, "\n"):
        with contextlib.suppress(UserError):
            return text.encode(mark)[0]
    raise UserError("this alphabet has no character that could end an answer, neither NUL nor a newline")


def encode(text, where, piece, start=True):
    """The ids of a piece of text. One that starts anew follows the tokenizer's bos, if it has one, as documents do."""
    try:
        ids = text.encode(piece, start)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return [text.bos, *ids] if start and text.bos is not None else ids


# ---- Rows out --------------------------------------------------------------------------------------------------------


class Ragged:
    """Examples of different lengths, one behind the other: what is known of a split before its width is."""

    def __init__(self):
        self.ids, self.lengths, self.answer_bytes, self.dropped = array("I"), array("I"), 0, 0

    def add(self, prompt, answer, end):
        self.ids.extend([*prompt, *answer, end])
        self.lengths.extend([len(prompt), len(prompt) + len(answer) + 1])


def prepare(folder, examples, text, width=0):
    """Writes a folder of rows from `examples`, an iterable of (split, where, prompt ids, answer ids); returns its meta.

    An example longer than the width is dropped and counted. Raises UserError for an answer that is empty or holds the end
    mark, for a split without rows, and where the system cannot write. The folder keeps what it held until all is written.
    """
    require(0 <= width <= WIDEST, f"width must be from 0 to {WIDEST}, not {width}")
    end, splits = end_mark(text), {}
    for split, where, prompt, answer in tqdm(examples, desc="tokenizing", unit=" rows", disable=None):
        require(answer, f"{where}: the answer is empty")
        require(end not in answer, f"{where}: the answer holds {text.decode([end])!r}, which marks its end")
        part = splits.setdefault(split, Ragged())
        if width and len(prompt) + len(answer) >= width:
            part.dropped += 1
            continue
        part.add(prompt, answer, end)
        part.answer_bytes += sum(len(text.table[i]) for i in answer if i != text.bos)
    require(splits, f"there is nothing to prepare in {folder}")
    for split, part in splits.items():
        require(part.lengths, f"none of the {part.dropped} {split} rows fits a width of {width}")
    width = width or max(max(part.lengths) for part in splits.values())
    require(width <= WIDEST, f"the longest row is {width} tokens; give a width of at most {WIDEST} to drop such rows")
    meta = {"tokenizer": text.meta(), "vocab_size": text.vocab_size, "dtype": loader.id_type(text.vocab_size).name}
    meta |= {"width": width, "end": end, "splits": {}}
    write(Path(folder), splits, meta)
    return meta


def write(folder, splits, meta):
    """Swaps the shards and lengths of all splits into the folder, and says in meta["splits"] what they hold."""
    building = folder / ".preparing"
    try:
        shutil.rmtree(building, ignore_errors=True)  # what a killed run left
        building.mkdir(parents=True)
        for split, part in splits.items():
            meta["splits"][split] = write_split(building, split, part, meta)
        writer.publish(building, folder, meta)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # a folder made for nothing; one that holds anything stays


def write_split(folder, split, part, meta, shard_tokens=100_000_000, at_once=4096):
    """Pads a Ragged to the width and writes it; returns what meta.json says of it."""
    width, ids = meta["width"], np.frombuffer(part.ids, np.uint32)  # (tokens,)
    lengths = np.frombuffer(part.lengths, np.uint32).reshape(-1, 2)  # (n, 2)
    border = np.concatenate([[0], lengths[:, 1].cumsum(dtype=np.int64)])  # (n + 1,) of the examples in ids
    for first in range(0, len(lengths), at_once):
        length = lengths[first : first + at_once, 1]  # (b,)
        x = np.full((len(length), width), meta["end"], meta["dtype"])  # (b, width)
        x[np.arange(width) < length[:, None]] = ids[border[first] : border[first + len(length)]]
        writer.append(folder, split, x.ravel(), first * width, shard_tokens)
    lengths.astype(LENGTH).tofile(folder / f"{split}_prompt.bin")
    answer_tokens = int((lengths[:, 1].astype(np.int64) - lengths[:, 0]).sum())
    counts = {"tokens": len(lengths) * width, "documents": len(lengths), "bytes": part.answer_bytes}
    return counts | {"answer_tokens": answer_tokens, "prompt_tokens": int(lengths[:, 0].sum()), "dropped": part.dropped}


def summary(folder, meta):
    """What was prepared, for people: a line for each split."""
    kind = meta["tokenizer"]["kind"]
    out = [f"{folder}: rows of {meta['width']} tokens; {kind} tokenizer, V = {meta['vocab_size']}, end mark {meta['end']}"]
    for name, split in meta["splits"].items():
        noisy = split["tokens"] - split["prompt_tokens"]
        padding = 1 - split["answer_tokens"] / noisy
        after = f"{noisy / split['documents']:.1f} tokens of a row follow its prompt, {padding:.0%} of them padding"
        out.append(f"  {name}: {split['documents']:,} rows, {split['dropped']:,} dropped as too long; {after}")
    return "\n".join(out)


def layout(folder, meta):
    """(width, end mark) of a folder of rows, (0, -1) of one of text; UserError where its meta.json is damaged."""
    width, end = meta.get("width", 0), meta.get("end", -1)
    good = type(width) is int and type(end) is int and 0 <= width <= WIDEST and (end < 0) == (width == 0)
    require(good and end < meta["vocab_size"], f"{folder}/meta.json is damaged: width {width}, end {end}")
    return width, end


# ---- Rows in ---------------------------------------------------------------------------------------------------------


class Rows:
    """Shuffled rows: every batch is a pure function of (seed, step, position in the global batch).

    An epoch takes each row once, in an order of its own. skip: tokens to leave out at the beginning of each row, 1 where the
    network brings the bos itself. Raises UserError for what is not a whole folder of rows.
    """

    def __init__(self, folder, split, seed=0, skip=0):
        self.tokens, self.seed, self.skip = loader.Tokens(folder, split), seed, skip
        (width, _), path = layout(folder, self.tokens.meta), Path(folder) / f"{split}_prompt.bin"
        require(width and path.is_file(), f"{folder} holds no rows with prompts in its {split} split")
        lengths, (n, rest) = np.fromfile(path, LENGTH).astype(np.int64), divmod(len(self.tokens), width)  # (2n,)
        good = len(lengths) == 2 * n and not rest
        good = good and all(np.diff(lengths.reshape(-1, 2)) > 0) and lengths.max() <= width
        require(good, f"{path} does not fit the {split} rows of {folder}; prepare it again")
        self.n, self.block_size = n, width - skip
        self.prompt, self.length = (lengths.reshape(-1, 2) - skip).clip(0).T  # (n,) each: as in SPLIT_prompt.bin

    def __getitem__(self, index):
        """Numbers of rows (b,) -> (x0 (b, block_size), prompt (b,), length (b,)), int64."""
        index = np.asarray(index, np.int64)
        x0 = self.tokens.windows(index * (self.block_size + self.skip) + self.skip, self.block_size)
        return x0, self.prompt[index], self.length[index]

    def index(self, step, positions, batch_size):
        """Numbers (b,) of the rows at `positions` of the global batch of `step`."""
        epoch, i = np.divmod(step * batch_size + np.asarray(positions, np.int64), self.n)  # (b,) each
        out = np.empty_like(i)  # (b,)
        for e in np.unique(epoch):
            order = int(loader.hash_words(self.seed, int(e), count=1)[0])
            out[epoch == e] = loader.permute(i[epoch == e], self.n, order)
        return out

    def counted(self, index, padding):
        """How many tokens of the rows `index` (b,) follow a prompt; without padding, up to the first end mark: (b,)."""
        return (self.block_size if padding else self.length[index]) - self.prompt[index]

    def requests(self, n, padding):
        """n rows evenly spread (0: all) as [(prompt ids, answer ids), ...], with padding or up to the first end mark.

        And how many ids of each answer are not padding (n,)."""
        n = min(n or self.n, self.n)
        index = np.arange(n) * self.n // n  # (n,)
        x0, prompt, _ = self[index]
        ends = prompt + self.counted(index, padding)  # (n,)
        return [(x[:a], x[a:b]) for x, a, b in zip(x0, prompt, ends, strict=True)], self.counted(index, False).tolist()
