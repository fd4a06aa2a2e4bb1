"""Uniform random numbers as a function of a seed and of where they are used."""

import numpy as np
import torch


def uniforms(seed, step, counters, n):
    """(B, n) numbers in [0, 1), float64: row b is a pure function of (seed, step, counters[b]).

    A counter-based generator (Philox, Salmon et al., SC 2011) can jump to any row, so every process
    draws its own part of the global batch, and a resumed run draws the same numbers as one that was
    never stopped. One generator is moved from row to row, because creating a new one takes longer.
    """
    source, out = np.random.Philox(key=[seed, 0]), np.empty((len(counters), n))  # (B, n)
    numbers, state = np.random.Generator(source), source.state
    for row, counter in zip(out, counters, strict=True):
        state["state"]["counter"][2:] = int(counter), step
        source.state = state
        numbers.random(out=row)
    return torch.from_numpy(out)


def distinct_uniforms(seed, step, counters, n):
    """uniforms, drawn once per distinct counter: all rows of a chain rule share a counter."""
    counters, row = counters.unique(return_inverse=True)
    return uniforms(seed, step, counters, n)[row]  # (b, n)


def seed_torch(seed, step, counter):
    """Seed torch's own generators with one such number."""
    torch.manual_seed(int(uniforms(seed, step, [counter], 1) * 2**53))
