"""The rows that a network evaluates for many requests: random numbers, and full batches."""

import numpy as np
import torch

import diffusion
from lib.philox import distinct_uniforms


def random_numbers(seed, number, place, draw, size, n):
    """u (b,) and noise (b, n) for the draws `draw` (b,) of requests `place` (b,).

    They belong to set `number`, of `size` draws over which u is stratified. Pure functions of the
    arguments; the first columns of the noise do not depend on n.
    """
    jitter = distinct_uniforms(seed, 2 * number + 1, place * size + draw // 2, 1)  # (b, 1)
    noise = distinct_uniforms(seed, 2 * number, place * size + draw, n)  # (b, n)
    return diffusion.stratified(jitter.squeeze(1), draw, size), noise


def batches(lengths, turns, size, batch_size):
    """Yield (request (b,), draw (b,), turn (b,)) with b <= batch_size, for every row once.

    lengths (N,) of the requests; turns (N,): how many rows one draw takes. Only requests of equal
    length share a batch, so that there is no padding.
    """
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        first = np.cumsum([0, *turns[members] * size])  # (members + 1,) each request's first row
        for start in range(0, first[-1], batch_size):
            row = np.arange(start, min(start + batch_size, first[-1]))  # (b,)
            i = np.searchsorted(first, row, side="right") - 1  # (b,)
            draw, turn = np.divmod(row - first[i], turns[members[i]])  # (b,) each
            yield members[i], torch.from_numpy(draw), torch.from_numpy(turn)
