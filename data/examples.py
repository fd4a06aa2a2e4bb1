"""Conditional data: examples of one width, each a prompt, its answer, an eos, and eos as padding.

A folder of examples is a folder of token files (writer.py) with two additions. meta.json has
"width", the tokens per example, and "end", the id of the eos; its "documents" are examples, its
"bytes" those of the answers. SPLIT_prompt.bin has two little-endian uint16 per example: the length
of the prompt, and of prompt, answer and one eos together. Example r is the ids r * width to
(r + 1) * width of the split. If the prompt has 0 tokens, the whole example may be masked.

Everything after the prompt may be masked, including every eos, so a model learns where an answer
ends, and a sampler later fills an example of the full width. All examples take the same compute,
and none depends on its neighbours in a batch.
"""

import itertools
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import UserError, nearest, plural, require
from data import loader, writer
from data import tokenizer as tokenizers
from lib.files import opened

DEFAULTS = {
    "width": 0,  # tokens per example, including prompt and eos; 0: as many as the longest needs
}

LENGTH, WIDEST = np.dtype("<u2"), 65535  # of SPLIT_prompt.bin
EOS = "\0"  # the eos if a tokenizer has no id for it


# ---- 1. Text in ----------------------------------------------------------------------------------


def lines(path):
    """Yield (where, line) of a text file, without blank lines; where is "FILE, line N"."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line


def records(path):
    """Yield (where, dict) for each line of a file with one JSON object per line."""
    for where, line in lines(path):
        yield where, writer.record_of(line, where)


def field(where, record, key):
    """The text under a key; UserError if there is none."""
    require(key in record, f'{where}: no key "{key}"{nearest(key, record)}')
    text = record[key]
    require(isinstance(text, str), f'{where}: "{key}" must be text, not {str(text)[:40]}')
    return writer.as_utf8(text)


# ---- 2. Text to ids ------------------------------------------------------------------------------


def vocabulary(name, texts, load):
    """tokenizer.named, with the eos in a character alphabet."""
    return tokenizers.named(name, itertools.chain([EOS], texts), load)


def eos_of(tokenizer):
    """The id that ends an answer: the tokenizer's own, or else NUL's."""
    return tokenizer.encode(EOS)[0] if tokenizer.eot is None else tokenizer.eot


def encode(tokenizer, where, text, start=True):
    """The ids of a text; at a start they follow the tokenizer's bos, as in a document."""
    try:
        ids = tokenizer.encode(text, start)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return [tokenizer.bos, *ids] if start and tokenizer.bos is not None else ids


# ---- 3. Examples out -----------------------------------------------------------------------------


class Ragged:
    """Examples of different lengths, one after another: a split before its width is known."""

    def __init__(self):
        self.ids, self.lengths, self.answer_bytes, self.dropped = array("I"), array("I"), 0, 0

    def add(self, prompt, answer, eos):
        self.ids.extend([*prompt, *answer, eos])
        self.lengths.extend([len(prompt), len(prompt) + len(answer) + 1])


def prepare(folder, examples, tokenizer, width=0):
    """Write a folder of examples; return its meta.

    examples: an iterable of (split, where, prompt ids, answer ids); `where` is for messages.
    Examples longer than the width are dropped and counted. Raises UserError for an answer that is
    empty or holds the eos, for a split without examples, and if the system cannot write. The folder
    keeps its old contents until everything is written.
    """
    require(0 <= width <= WIDEST, f"width must be from 0 to {WIDEST}, not {width}")
    splits = collect(examples, tokenizer, width)
    require(splits, "the input holds no examples")
    for split, part in splits.items():
        dropped = f"of {plural(part.dropped, f'{split} example')} none fits a width of {width}"
        require(part.lengths, dropped)
    width = width or max(max(part.lengths) for part in splits.values())
    advice = f"give a width of at most {WIDEST} to drop such examples"
    require(width <= WIDEST, f"the longest example is {width} tokens; {advice}")
    meta = writer.about(tokenizer) | {"width": width, "end": eos_of(tokenizer), "splits": {}}
    with writer.replacing(folder) as building:
        for split, part in splits.items():
            meta["splits"][split] = write_split(building, split, part, meta)
        writer.publish(building, Path(folder), meta)
    return meta


def collect(examples, tokenizer, width):
    """{split: Ragged} of the examples; those longer than the width, if not 0, are only counted."""
    eos, splits = eos_of(tokenizer), {}
    end = f"{tokenizer.decode([eos])!r}, which marks its end"
    bar = tqdm(examples, desc="tokenizing", unit=" examples", disable=None)
    for split, where, prompt, answer in bar:
        require(answer, f"{where}: the answer is empty")
        require(eos not in answer, f"{where}: the answer holds {end}")
        part = splits.setdefault(split, Ragged())
        if width and len(prompt) + len(answer) >= width:
            part.dropped += 1
            continue
        part.add(prompt, answer, eos)
        part.answer_bytes += sum(len(tokenizer.table[i]) for i in answer if i != tokenizer.bos)
    return splits


def write_split(folder, split, part, meta, at_once=4096):
    """Pad a Ragged to the width and write it; return its entry in meta.json."""
    width, ids = meta["width"], np.frombuffer(part.ids, np.uint32)  # (tokens,)
    lengths = np.frombuffer(part.lengths, np.uint32).reshape(-1, 2)  # (n, 2)
    prompt, length = lengths.astype(np.int64).T  # (n,) each
    border = np.concatenate([[0], length.cumsum()])  # (n + 1,) between the examples in ids
    n = len(lengths)
    for first in range(0, n, at_once):
        now = length[first : first + at_once]  # (b,)
        x = np.full((len(now), width), meta["end"], meta["dtype"])  # (b, width)
        x[np.arange(width) < now[:, None]] = ids[border[first] : border[first + len(now)]]
        writer.append(folder, split, x.ravel(), first * width)
    lengths.astype(LENGTH).tofile(folder / f"{split}_prompt.bin")
    counts = {"tokens": n * width, "documents": n, "bytes": part.answer_bytes}
    counts |= {"answer_tokens": int((length - prompt).sum()), "prompt_tokens": int(prompt.sum())}
    return counts | {"dropped": part.dropped}


def summary(folder, meta):
    """A readable summary of what was prepared, with a line for each split."""
    head = f"{folder}: examples of {meta['width']} tokens; {meta['tokenizer']['kind']} tokenizer"
    head += f", V = {meta['vocab_size']}, eos {meta['end']}"
    return "\n".join([head, *(summary_of_split(*item) for item in meta["splits"].items())])


def summary_of_split(name, split):
    n, maskable = split["documents"], split["tokens"] - split["prompt_tokens"]
    padding = 1 - split["answer_tokens"] / maskable
    after = f"{maskable / n:.1f} tokens follow a prompt, {padding:.0%} of them padding"
    return f"  {name}: {plural(n, 'example')}, {split['dropped']:,} dropped as too long; {after}"


# ---- 4. Examples in ------------------------------------------------------------------------------


def layout(folder, meta):
    """(width, eos) of a folder of examples, (0, -1) for text; UserError for a damaged meta.json."""
    width, eos = meta.get("width", 0), meta.get("end", -1)
    undamaged = type(width) is type(eos) is int and 0 <= width <= WIDEST
    undamaged = undamaged and eos < meta["vocab_size"] and (eos < 0) == (width == 0)
    require(undamaged, f"{folder}/meta.json is damaged: width {width}, end {eos}")
    return width, eos


class Examples:
    """Shuffled examples, each a pure function of (seed, its number in the run).

    An epoch takes each example once, in its own order. skip: tokens to leave out at the beginning
    of each, 1 if the network itself supplies the bos. Raises UserError if the folder is not a
    complete folder of examples.
    """

    def __init__(self, folder, split, seed=0, skip=0):
        self.tokens, self.seed, self.skip = loader.Tokens(folder, split), seed, skip
        width, _ = layout(folder, self.tokens.meta)
        path = Path(folder) / f"{split}_prompt.bin"
        there = width and path.is_file()
        require(there, f"{folder} holds no examples with prompts in its {split} split")
        lengths, self.n = np.fromfile(path, LENGTH).astype(np.int64), len(self.tokens) // width
        require(
            len(lengths) == 2 * self.n
            and len(self.tokens) == self.n * width
            and all(np.diff(lengths.reshape(-1, 2)) > 0)
            and lengths.max() <= width,
            f"{path} does not fit the {split} examples of {folder}; prepare it again",
        )
        self.block_size = width - skip
        self.prompt, self.length = (lengths.reshape(-1, 2) - skip).clip(0).T  # (n,), as on disk

    def __getitem__(self, index):
        """Example numbers (b,) -> (x0 (b, block_size), prompt (b,), length (b,)), int64."""
        index = np.asarray(index, np.int64)
        starts = index * (self.block_size + self.skip) + self.skip  # (b,)
        x0 = self.tokens.windows(starts, self.block_size)  # (b, block_size)
        return x0, self.prompt[index], self.length[index]

    def index(self, first, rows):
        """Numbers (b,) of the examples in `rows` of a batch that `first` examples precede."""
        sample = first + np.asarray(rows, np.int64)  # (b,)
        epoch, i = np.divmod(sample, self.n)  # (b,) each
        out = np.empty_like(i)  # (b,)
        for e in np.unique(epoch):
            order = int(loader.hash_words(self.seed, int(e), count=1)[0])
            out[epoch == e] = loader.permute(i[epoch == e], self.n, order)
        return out

    def counted(self, index, padding):
        """Tokens after the prompt in the examples `index` (b,), with or without padding: (b,)."""
        return (self.block_size if padding else self.length[index]) - self.prompt[index]

    def counts(self, first, batch_size, padding):
        """{"n_tokens", "n_real"} of a whole batch that `first` examples precede.

        Both are sums of `counted`: n_tokens with padding if that counts, n_real without.
        """
        index = self.index(first, range(batch_size))  # (B,)
        n_tokens, n_real = (int(self.counted(index, each).sum()) for each in (padding, False))
        return {"n_tokens": n_tokens, "n_real": n_real}

    def requests(self, n, padding):
        """n evenly spaced examples (0: all): [(prompt ids, answer ids), ...], [tokens, ...].

        An answer includes its padding or stops at its first eos; tokens excludes the padding.
        """
        n = min(n or self.n, self.n)
        index = np.arange(n) * self.n // n  # (n,)
        x0, prompt, _ = self[index]
        ends = prompt + self.counted(index, padding)  # (n,)
        pairs = [(x[:a], x[a:b]) for x, a, b in zip(x0, prompt, ends, strict=True)]
        return pairs, self.counted(index, padding=False).tolist()


# ---- 5. Training data and held-out data ----------------------------------------------------------


class HeldOut(NamedTuple):
    """Held-out data to evaluate; a block of text is an answer to an empty prompt."""

    requests: list  # pairs (prompt ids, answer ids)
    counts: list  # tokens of each answer that are not padding
    bytes_per_token: float


def open_data(config):
    """(tokenizer, training Blocks or Examples, HeldOut or None) of config["data"]."""
    folder, L, causal = config["data"], config["block_size"], config["attention"] == "causal"
    network = causal, config.get("start_id", -1)
    if config["example_width"]:
        dataset = Examples(folder, "train", config["seed"], brought_by_network(folder, *network))
    else:
        dataset = loader.Blocks(loader.Tokens(folder, "train"), L, config["seed"])
    meta, val = dataset.tokens.meta, None
    if "val" in meta["splits"]:
        val = held_out(folder, "val", L, config["eval_sequences"], network)
    return tokenizers.from_meta(meta["tokenizer"]), dataset, val


def held_out(folder, split, block_size, n, network, end=None):
    """HeldOut: n evenly spaced examples or blocks (of the text up to `end`) of a split, 0 for all.

    network: (causal, start_id).
    """
    meta, (causal, _) = loader.read_meta(folder), network
    if layout(folder, meta)[0]:
        part = Examples(folder, split, skip=brought_by_network(folder, *network))
        requests, counts = part.requests(n, padding=not causal)
        n_tokens = part.counted(range(part.n), padding=False).sum()
    else:
        tokens = loader.Tokens(folder, split)
        blocks = loader.in_order(tokens, block_size, n, end)
        requests, counts = [(x[:0], x) for x in blocks], [len(x) for x in blocks]
        n_tokens = len(tokens)
    return HeldOut(requests, counts, meta["splits"][split]["bytes"] / n_tokens)


def brought_by_network(folder, causal, start_id):
    """How many tokens of an example a causal network supplies: 1 if its start_id is the bos."""
    tokenizer = tokenizers.KINDS[loader.read_meta(folder)["tokenizer"]["kind"]]
    return int(causal and tokenizer.bos == start_id)
