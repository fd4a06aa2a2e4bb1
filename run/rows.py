"""Evaluation requests, the rows that a network reads for them, and their random numbers."""

from typing import NamedTuple

import numpy as np
import torch

import diffusion
from config import require
from lib.philox import distinct_uniforms


def set_sizes(estimator, o):
    """The sizes of the sets that the draws are taken in, for options o.

    UserError if the last set would be smaller and the estimator depends on the size (`orders`).
    """
    draws, K = 1 if estimator.exact else o["draws"], o["strata"]
    message = f"{o['estimator']} takes whole sets: draws {draws} must be a multiple of strata {K}"
    require(draws % K == 0 or not estimator.mean_of_p, message)
    return [min(K, draws - first) for first in range(0, draws, K)]


class Requests(NamedTuple):
    """N pairs (prompt ids, answer ids), and how the network evaluates them."""

    pairs: list
    groups: object = None  # (N,) ints: a group shares random numbers; None: no groups
    cfg_scale: float = 0.0  # guidance by the prompt
    pad_to: int = 0  # rows are padded with masks to this width

    def checked(self, model, estimator):
        """Return self; UserError for the first request that the network cannot read, or a field."""
        n, n_groups = len(self.pairs), len(self.group_of_each())
        V, most = model.vocab_size, model.block_size
        require(n == n_groups, f"groups must have one number per request: {n}, not {n_groups}")
        scale_fits = -1 <= self.cfg_scale <= 1000
        require(scale_fits, f"cfg_scale must be in [-1, 1000], not {self.cfg_scale}")
        guides = self.cfg_scale != 0
        message = "cfg_scale needs a masked diffusion model, not a causal one"
        require(not (guides and model.causal), message)
        message = "t_dse has no guidance; cfg_scale must be 0"
        require(estimator.normalised or not guides, message)
        require(0 <= self.pad_to <= most, f"pad_to must be in [0, {most}], not {self.pad_to}")
        for i, pair in enumerate(self.pairs):
            fits = len(pair) == 2 and all(are_ids(part, V) for part in pair)
            kind = f"must be ids (L,) from 0 to {V - 1}, at most {most} with those of its prompt"
            given = np.asarray(pair[-1])
            message = f"request {i} {kind}, not {given.dtype} {given.shape}"
            require(fits and sum(map(len, pair)) <= most, message)
        return self

    def tokens(self, lengths):
        """The number of answer tokens, or the sum of `lengths`, of which each request has one."""
        if lengths is None:
            return sum(len(answer) for _, answer in self.pairs)
        n = len(self.pairs), len(lengths)
        require(n[0] == n[1], f"lengths must have one number per request: {n[0]}, not {n[1]}")
        return sum(lengths)

    def in_one_pass(self, model, estimator):
        """Whether one row gives all terms of a chain rule: `order` networks, unguided, unpadded."""
        in_order = model.config["attention"] == "order" and estimator.order is not None
        return in_order and not (self.cfg_scale or self.pad_to)

    def rows_a_draw(self, model, estimator):
        """How many rows a draw of each request takes (N,): one, or one per token."""
        n = self.lengths()[:, 1]  # (N,)
        in_one_row = estimator.row or self.in_one_pass(model, estimator)
        return n.clip(max=1) if in_one_row else n

    def lengths(self):
        """The number of tokens in each prompt and answer: (N, 2), in numpy."""
        return np.array([[len(p), len(a)] for p, a in self.pairs], int).reshape(-1, 2)

    def group_of_each(self):
        """The group of each request (N,); without groups, each is a group of its own."""
        return torch.as_tensor(range(len(self.pairs)) if self.groups is None else self.groups)

    def clean(self, i):
        """Clean tokens (b, W) of requests i (b,) of equal length, and their prompt lengths (b,)."""
        x0 = np.stack([np.concatenate(self.pairs[j]).astype(np.int64) for j in i])  # (b, W)
        return torch.from_numpy(x0), torch.tensor([len(self.pairs[j][0]) for j in i])

    def batches(self, turns, size, batch_size):
        """Yield (request (b,), draw k (b,), turn (b,)), b <= batch_size, that cover each row once.

        turns (N,): rows per draw; size: the number of draws. Only requests of equal length share a
        batch, so there is no padding.
        """
        lengths = self.lengths().sum(1)  # (N,)
        for length in np.unique(lengths):
            members = np.flatnonzero(lengths == length)
            first = np.cumsum([0, *turns[members] * size])  # (members + 1,) each one's first row
            for start in range(0, first[-1], batch_size):
                row = np.arange(start, min(start + batch_size, first[-1]))  # (b,)
                i = np.searchsorted(first, row, side="right") - 1  # (b,)
                k, turn = np.divmod(row - first[i], turns[members[i]])  # (b,) each
                yield members[i], torch.from_numpy(k), torch.from_numpy(turn)


def are_ids(part, V):
    """Whether part of a request is an array (L,) of integers in [0, V), perhaps empty."""
    part = np.asarray(part)  # (L,)
    whole = part.ndim == 1 and (part.dtype.kind in "iu" or not part.size)
    return whole and (not part.size or (part.min() >= 0 and part.max() < V))


def random_numbers(seed, number, group, k, size, n, prompt=None):
    """u (b,) and noise (b, n) for the draws k (b,) of requests of `group` (b,).

    They belong to set `number` of `size` draws, over which u is stratified. They are pure functions
    of the arguments. The first columns of noise do not depend on n and follow the prompt (b,).
    """
    jitter = distinct_uniforms(seed, 2 * number + 1, group * size + k // 2, 1)  # (b, 1)
    noise = distinct_uniforms(seed, 2 * number, group * size + k, n)  # (b, n)
    if prompt is not None:
        noise = noise.gather(1, (torch.arange(n) - prompt[:, None]).clamp(min=0))
    return diffusion.stratified(jitter.squeeze(1), k, size), noise
