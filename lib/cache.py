"""Key-value caches: keys and values that are kept from one network call to the next.

- Cache: for one block of a causal network, which reads from left to right.
- OrderCache: for all blocks of an `order` network, which reads in the order of unmasking. It
  records what each sequence has read and works out which of the visible tokens are new.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib import fused


class Cache:
    """Keys and values of one block of a causal network, for at most `length` positions."""

    def __init__(self, length):
        self.length, self.n, self.k, self.v = length, 0, None, None

    def append(self, k, v):
        """Store k and v of the next positions, (B, H, new, d) each; return all, (B, H, n, d)."""
        if self.k is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)  # (B, H, length, d) each
        start, self.n = self.n, self.n + k.shape[2]
        self.k[:, :, start : self.n], self.v[:, :, start : self.n] = k, v
        return self.k[:, :, : self.n], self.v[:, :, : self.n]


class Reading(NamedTuple):
    """One call of an `order` network: each of b sequences reads n clean tokens and Q queries."""

    columns: torch.Tensor  # (b, n) the clean tokens, as columns of [start token; x]
    positions: torch.Tensor  # (b, n + Q) the positions of the clean tokens, then of the queries
    requested: tuple  # (row (N,), query (N,)) in (b, Q) of the requested positions
    attend: object  # (layer, q, kv) -> attention output of q: model.TwoStreams.read with a layer


class OrderCache:
    """Keys and values of the clean tokens read so far by sequences of L tokens, in B slots.

    Later tokens never change earlier entries. A call stores its queries after them, and the next
    call overwrites the queries.
    """

    def __init__(self, B, L):
        self.layers = {}  # {layer: (2, B, H, length, d)}
        self.was_read = np.zeros((B, 1 + L), bool)  # start token, positions

    def clear(self, slots):
        """Free slots (b,) for new sequences, which have read nothing yet."""
        self.was_read[slots] = False

    def plan_call(self, slots, visible, masked_idx, device):
        """Plan a Reading for sequences in slots (b,): new tokens of visible (b, L), then queries.

        masked_idx (N,): the requested flat positions in (b, L). All arguments are on the CPU, which
        plans a call while the device is still computing (in numpy, where torch would take longer
        for so few numbers). If a token that was read is masked again, its slot is read again from
        the start.
        """
        slots, visible, masked_idx = slots.numpy(), visible.numpy(), masked_idx.numpy()
        b, L = visible.shape
        visible = np.concatenate([np.ones((b, 1), bool), visible], axis=1)  # (b, 1 + L)
        read = self.was_read[slots]  # (b, 1 + L)
        read &= ~(read & ~visible).any(1, keepdims=True)
        new = visible & ~read  # (b, 1 + L)
        self.was_read[slots] = visible
        is_query = np.zeros((b, L), bool)
        is_query.flat[masked_idx] = True
        columns, n_new = to_the_left(new)  # (b, n), (b,)
        positions, _ = to_the_left(is_query)  # (b, Q)
        where, seen = layout(visible.sum(1), n_new, columns.shape[1], positions.shape[1])
        first, end = where[0, 0], where[0, -1] + 1
        positions = np.concatenate([(columns - 1).clip(min=0), positions], axis=1)  # (b, n + Q)
        query = (is_query.cumsum(1) - 1).flat[masked_idx]  # (N,)
        is_all = np.array_equal(slots, np.arange(len(self.was_read)))
        in_step = is_all and len(where) == 1
        plan = columns, positions, masked_idx // L, query, slots, where, seen
        plan = fused.moved(device, *map(torch.from_numpy, plan))
        columns, positions, row, query, slots, where, seen = plan
        part = slice(None) if is_all else slots  # slices copy nothing
        entries = (part, slice(first, end)) if in_step else (slots[:, None], where)
        attend = functools.partial(self.attend, part, entries, seen)
        return Reading(columns, positions, (row, query), attend)

    def attend(self, part, entries, seen, layer, q, kv):
        """Store kv (2, b, H, n + Q, d) in a layer; return the attention of q (b, H, T, d) there."""
        (slots, where), length = entries, seen.shape[-1]
        kept = self.layers.get(layer)  # (2, B, H, at least length, d)
        if kept is None:
            kept = kv.new_zeros(2, len(self.was_read), kv.shape[2], 0, kv.shape[4])
        if kept.shape[3] < length:
            kept = F.pad(kept, (0, 0, 0, length - kept.shape[3]))
        kept.transpose(2, 3)[:, slots, where] = kv.transpose(2, 3)
        self.layers[layer] = kept
        k, v = kept[:, part, :, :length]  # (b, H, length, d) each
        return fused.attention(q, k, v, seen=seen[:, :, -q.shape[2] :])


def layout(count, n_new, n, Q):
    """Where n tokens and Q queries are stored (b, n + Q); what they see (b, 1, n + Q, length).

    count (b,): clean tokens of each sequence; its last n_new (b,) are the first of the n. If all
    sequences are in step, one row says it for all: (1, n + Q), in consecutive entries.
    """
    if n_new.min() == n and count.min() == count.max():
        count, n_new = count[:1], n_new[:1]
    count, n_new = count[:, None], n_new[:, None]  # (b, 1) each
    # In steps of 32 entries, so that kernels are needed for few sizes only. Entries that a row does
    # not need are written to the last one, which is not read.
    length = 32 * (1 + (int(count.max()) + Q) // 32)
    entry = np.arange(length)
    entries = count - n_new + entry[:n]  # (b, n)
    kept = np.where(entry[:n] < n_new, entries, length - 1)  # (b, n)
    where = np.concatenate([kept, count + entry[:Q]], axis=1)  # (b, n + Q)
    # A query sees all clean tokens, a clean token sees those before it; each sees itself.
    limit = np.concatenate([entries + 1, count.repeat(Q, axis=1)], axis=1)  # (b, n + Q)
    seen = (entry < limit[..., None]) | (entry == where[..., None])  # (b, n + Q, length)
    return where, seen[:, None]


def to_the_left(keep):
    """Columns (B, n) where keep (B, L) is True, then others; and how many are True, (B,)."""
    count = keep.sum(1)  # (B,)
    return (~keep).argsort(axis=1, kind="stable")[:, : count.max()], count
