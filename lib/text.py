"""Requests: text in, text out."""

import re

import torch

from config import require


def request(tokenizer, model, prompt="", suffix="", template="", length=0):
    """One request as a list of ids, mask_id where a token is wanted; UserError if it cannot be met.

    A text at the very beginning follows the tokenizer's bos, if it has one, as every document did
    in training; a causal network whose start_id is that bos reads it anyway.
    """
    block = model.block_size

    def encode(text, start):
        bos = [tokenizer.bos] if start and tokenizer.bos not in (None, model.start_id) else []
        return bos + tokenizer.encode(text, start) if text else []

    if template:
        require(not prompt and not suffix, "give --template or --prompt and --suffix, not both")
        require(not length, "a template has its own length; leave --length out")
        pieces = re.split(r"___(\d+)", template)  # text, gap, text, gap, ..., text
        example = "write ___12 for a gap of 12 tokens in"
        require(len(pieces) > 1, f"the template has no gap: {example} '{template}'")
        texts, gaps = [encode(text, i == 0) for i, text in enumerate(pieces[::2])], pieces[1::2]
        for gap in gaps:
            require(len(gap) < 8, f"a gap of ___{gap} tokens is longer than the block ({block})")
        total = sum(map(len, texts)) + sum(map(int, gaps))
        require(any(map(int, gaps)), f"the template has no gap of one token or more: '{template}'")
        require(total <= block, f"the template is {total} tokens, the block {block}")
        ids = texts[0]
        for gap, text in zip(gaps, texts[1:], strict=True):
            ids += [model.mask_id] * int(gap) + text
        return ids
    length = length or block
    require(length <= block, f"length must be at most block_size {block}, not {length}")
    head, tail = encode(prompt, start=True), encode(suffix, start=False)
    n_new, nothing = length - len(head) - len(tail), f"leaves nothing of length {length} to fill"
    require(n_new > 0, f"prompt and suffix are {length - n_new} tokens, which {nothing}")
    return head + [model.mask_id] * n_new + tail


def suppress_eos(x, begins, least, eos_id):
    """`suppress` of sample: no eos_id at the `least` positions from begins[i] on, x (N, L)."""
    suppress = torch.full(x.shape, -1)  # (N, L)
    for row, begin in zip(suppress, begins, strict=True):
        row[begin : begin + least] = eos_id
    return suppress


def text_of(tokenizer, ids, begin=0, eos_id=-1):
    """The text of a sample; with eos_id up to the first one from position `begin` on."""
    if eos_id < 0:
        return tokenizer.decode(ids)
    stop = ids.index(eos_id, begin) if eos_id in ids[begin:] else len(ids)
    return tokenizer.decode([i for i in ids[:stop] if i != tokenizer.bos])
