"""Rows of the network for many requests: their random numbers, and full batches of them."""

import numpy as np
import torch

import diffusion
from lib.philox import distinct_uniforms


def random_numbers(seed, number, place, draw, size, n):
    """u (b,) and noise (b, n) of draws `draw` (b,) in set `number` of `size`, for requests `place`.

    Pure functions of these; the first of the n do not depend on n. Over the set u is stratified.
    """
    jitter = distinct_uniforms(seed, 2 * number + 1, place * size + draw // 2, 1)  # (b, 1)
    noise = distinct_uniforms(seed, 2 * number, place * size + draw, n)  # (b, n)
    return diffusion.stratified(jitter.squeeze(1), draw, size), noise


def batches(lengths, turns, size, batch_size):
    """Yield (request (b,), draw (b,), turn (b,)), b <= batch_size: each needed row, by length.

    lengths (N,), turns (N,) rows of a draw. There is no padding: two lengths share no call.
    """
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        first = np.cumsum([0, *turns[members] * size])  # (members + 1,) each request's first row
        for start in range(0, first[-1], batch_size):
            row = np.arange(start, min(start + batch_size, first[-1]))  # (b,)
            i = np.searchsorted(first, row, side="right") - 1  # (b,)
            draw, turn = np.divmod(row - first[i], turns[members[i]])  # (b,) each
            yield members[i], torch.from_numpy(draw), torch.from_numpy(turn)
