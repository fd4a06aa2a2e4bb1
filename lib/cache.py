"""Key-value caches: keys and values that are kept from one network call to the next.

- Cache: for one block of a causal network, which reads from left to right.
- OrderCache: for all blocks of an `order` network, which reads in the order of unmasking. It
  records what each sequence has read and works out which of the visible tokens are new.
"""

import functools
from typing import NamedTuple

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
    answers: tuple  # (row (N,), query (N,)) in (b, Q) of the requested positions
    attend: object  # (layer, q, kv) -> attention output of q: model.Streams.read with a layer


class OrderCache:
    """Keys and values of the clean tokens read so far by sequences of L tokens, in B slots.

    Later tokens never change earlier entries. A call stores its queries after them, and the next
    call overwrites the queries.
    """

    def __init__(self, B, L):
        self.layers, self.length = {}, 0  # {layer: (2, B, H, length, d)}
        self.was_read = torch.zeros(B, 1 + L, dtype=torch.bool)  # start token, positions

    def clear(self, slots):
        """Free slots (b,) for new sequences, which have read nothing yet."""
        self.was_read[slots] = False

    def plan_call(self, slots, visible, masked_idx, device):
        """Plan a Reading for sequences in slots (b,): new tokens of visible (b, L), then queries.

        masked_idx (N,): the requested flat positions in (b, L). All arguments are on the CPU, which
        plans a call while the device is still computing. If a token that was read is masked again,
        its slot is read again from the start.
        """
        b, L = visible.shape
        visible = F.pad(visible, (1, 0), value=True)  # (b, 1 + L)
        read = self.was_read[slots]  # (b, 1 + L)
        read &= ~(read & ~visible).any(1, keepdim=True)
        new = visible & ~read  # (b, 1 + L)
        self.was_read[slots] = visible
        is_query = torch.zeros(b * L, dtype=torch.bool).index_fill(0, masked_idx, True).view(b, L)
        columns, n_new = to_the_left(new)  # (b, n), (b,)
        positions, _ = to_the_left(is_query)  # (b, Q)
        where, seen = self.layout(visible.sum(1), n_new, columns.shape[1], positions.shape[1])
        positions = torch.cat([(columns - 1).clamp(min=0), positions], dim=1)  # (b, n + Q)
        query = (is_query.cumsum(1) - 1).flatten()[masked_idx]  # (N,)
        all_slots = torch.equal(slots, torch.arange(len(self.was_read)))
        tensors = columns, positions, masked_idx // L, query, slots, where, seen
        columns, positions, row, query, slots, where, seen = fused.moved(device, *tensors)
        part = slice(None) if all_slots else slots  # a slice copies nothing
        attend = functools.partial(self.attend, part, (slots[:, None], where), seen)
        return Reading(columns, positions, (row, query), attend)

    def layout(self, count, n_new, n, Q):
        """Where n tokens and Q queries are stored (b, n + Q); what they see (b, 1, n + Q, length).

        count (b,): clean tokens of each sequence; its last n_new (b,) are the first of the n.
        """
        count, n_new = count[:, None], n_new[:, None]  # (b, 1) each
        # Grow by 32 entries at a time, so that kernels are needed for few sizes only. Entries that
        # a row does not need are written to the last one, which is never read.
        self.length = max(self.length, 32 * (1 + (int(count.max()) + Q) // 32))
        entry = torch.arange(self.length)
        entries = count - n_new + entry[:n]  # (b, n)
        kept = torch.where(entry[:n] < n_new, entries, self.length - 1)  # (b, n)
        where = torch.cat([kept, count + entry[:Q]], dim=1)  # (b, n + Q)
        # A query sees all clean tokens, a clean token sees those before it; each sees itself.
        limit = torch.cat([entries + 1, count.expand(-1, Q)], dim=1)  # (b, n + Q)
        seen = (entry < limit[..., None]) | (entry == where[..., None])  # (b, n + Q, length)
        return where, seen[:, None]

    def attend(self, part, stored, seen, layer, q, kv):
        """Store kv (2, b, H, n + Q, d) in a layer; return the attention of q (b, H, T, d) there."""
        slots, where = stored
        kept = self.layers.get(layer)  # (2, B, H, length, d)
        if kept is None:
            kept = kv.new_zeros(2, len(self.was_read), kv.shape[2], 0, kv.shape[4])
        if kept.shape[3] < self.length:
            kept = F.pad(kept, (0, 0, 0, self.length - kept.shape[3]))
        kept.transpose(2, 3)[:, slots, where] = kv.transpose(2, 3)
        self.layers[layer] = kept
        k, v = kept[:, part]  # (b, H, length, d) each
        return fused.attention(q, k, v, seen=seen[:, :, -q.shape[2] :])


def to_the_left(keep):
    """Columns (B, n) where keep (B, L) is True, then others; and how many are True, (B,)."""
    count = keep.sum(1)  # (B,)
    return (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(count.max())], count
