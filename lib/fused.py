"""Fast versions of plain formulas: harder to read, and tested against the plain ones.

- cross_entropy: head and cross-entropy in chunks, with the gradient taken in the forward pass
- attention: F.scaled_dot_product_attention, or its two products written out where that is faster
- gelu: the tanh form in fewer operations when compiled; relu2: without a power
- moved: .to(device) without waiting; masked_indices: in few distinct sizes; kth_smallest
"""

import numpy as np
import torch
import torch.nn.functional as F


def wide(dtype):
    """The dtype for sums over V: float32, or float64 if the inputs are float64."""
    return torch.promote_types(dtype, torch.float32)


def masked_indices(mask, multiple=1):
    """Flat indices (N,) of the masked positions, padded with visible ones to a `multiple`."""
    flat = mask.flatten()  # (B*L,)
    N = -(-int(flat.sum()) // multiple) * multiple  # few distinct N: few compiled programs
    return (~flat).to(torch.uint8).argsort(stable=True)[:N]


def kth_smallest(values, k):
    """The k-th smallest value (B, 1) of each row of values (B, L), k (B,) from 1; on the CPU."""
    ordered = np.sort(values.numpy())  # (B, L) numpy sorts far faster than torch
    return torch.from_numpy(ordered).gather(1, k[:, None] - 1)


def summed(values, masked_idx, x0):
    """Sum values (N,) at flat indices (N,) over each sequence of x0 (B, L): (B,)."""
    return values.new_zeros(x0.numel()).index_copy(0, masked_idx, values).view(x0.shape).sum(1)


# ---- Head and cross-entropy ----------------------------------------------------------------------


def cross_entropy(h, head, target, weight, normalised=True, chunk=0, row_loss=None):
    """diffusion.plain_cross_entropy without (N, V) logits: (loss, terms (N,), CE (N,)).

    h (N, D), head (weight (V, D), bias (V,) or None), target (N,), weight (N,). chunk: at most so
    many positions at a time; 0: head_chunk. row_loss: a compiled cross_entropy_and_grad.
    """
    chunk = chunk or head_chunk(len(head[0]), h.device)
    row_loss = row_loss or cross_entropy_and_grad
    loss_of = lambda *rows: row_loss(*rows, normalised)  # noqa: E731 (logits, target, weight)
    if torch.is_grad_enabled():
        return FusedCrossEntropy.apply(h, *head, target, weight, chunk, loss_of)
    dtype, pieces = product_dtype(h), []
    W, bias = head_for_products(*head, dtype)
    for span in chunks(len(h), chunk):
        logits = F.linear(h[span].to(dtype), W, bias)  # (chunk, V)
        pieces.append(loss_of(logits, target[span], None)[:2])
    terms, ce = map(torch.cat, zip(*pieces, strict=True))  # (N,) each
    return (weight * terms).sum(), terms, ce


def head_chunk(V, device):
    """Positions per chunk: at most 4 million logits (128 million on CUDA), at least 256 positions.

    On a CPU the logits should fit into the cache; a GPU needs large products. 2^27 logits are
    0.25 GiB in bfloat16; a training step holds them, their gradients and, unless it is compiled, a
    float32 table, 1 GiB in total.
    """
    return max(256, 2 ** (27 if device.type == "cuda" else 22) // V)


def chunks(N, most):
    """Slices of N positions, equal but for the last, of at most `most` each; one if N is 0."""
    count = max(1, -(-N // most))
    size = -(-N // count)
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def head_for_products(W, bias, dtype):
    """(weight (V, D), bias (V,) or None) in the dtype of the products, made once for all chunks.

    On CUDA, outputs of -inf pad V to a multiple of 64, since products of an odd width are slow.
    """
    W, bias = W.to(dtype), None if bias is None else bias.to(dtype)
    more = -len(W) % 64 if W.device.type == "cuda" else 0
    if more:
        bias = W.new_zeros(len(W)) if bias is None else bias
        W, bias = F.pad(W, (0, 0, 0, more)), F.pad(bias, (0, more), value=-torch.inf)
    return W, bias


def cross_entropy_and_grad(logits, target, weight, normalised=True):
    """Terms (N,), CE (N,), and the gradient of sum(weight * terms) with respect to logits (N, V).

    Terms are CE, and the gradient is weight * (softmax(logits) - onehot(target)). normalised=False:
    terms are -logit[target] + sum_v e^logit_v - 1, and e^logits replaces the softmax. weight None:
    no gradient. One table holds the logits, then their exponentials, then the gradient; a compiled
    program needs no table.
    """
    table = logits.to(wide(logits.dtype), copy=True)  # (N, V)
    if normalised:
        table -= table.amax(-1, keepdim=True)
    at_target = table.gather(-1, target[:, None])  # (N, 1)
    total = table.exp_().sum(-1, keepdim=True)  # (N, 1)
    ce = (total.log() - at_target).squeeze(-1)  # (N,)
    terms = ce if normalised else (total - 1 - at_target).squeeze(-1)  # (N,)
    if weight is None:
        return terms, ce, None
    w = weight[:, None]  # (N, 1)
    table.mul_(w / total if normalised else w)
    if torch.compiler.is_compiling():  # this fuses; a scatter would need the table
        onehot = torch.arange(table.shape[1], device=table.device) == target[:, None]  # (N, V)
        table = torch.where(onehot, table - w, table)
    else:
        table.scatter_add_(1, target[:, None], -w)
    return terms, ce, table.to(logits.dtype)


def product_dtype(h):
    """The dtype in which autocast multiplies h; it leaves float64 alone."""
    device_type = h.device.type
    lower = torch.is_autocast_enabled(device_type) and h.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if lower else h.dtype


class FusedCrossEntropy(torch.autograd.Function):
    """The gradient with respect to the logits needs only a scalar factor from upstream.

    So each chunk of logits is turned into gradients of h and of the head at once, then dropped.
    This keeps (chunk, V) numbers in memory instead of (N, V), and computes no product twice.
    """

    @staticmethod
    def forward(ctx, h, W, bias, target, weight, chunk, loss_of):
        dtype = product_dtype(h)
        W_cast, bias_cast = head_for_products(W, bias, dtype)  # (V, D), (V,)
        dh = torch.empty_like(h)  # (N, D)
        dW = torch.zeros_like(W_cast, dtype=wide(W.dtype))  # (V, D)
        dbias = None if bias is None else torch.zeros_like(dW[:, 0])  # (V,)
        pieces = []
        for span in chunks(len(h), chunk):
            part = h[span].to(dtype)  # (chunk, D)
            table = F.linear(part, W_cast, bias_cast)  # (chunk, V) the logits, then their gradient
            *piece, table = loss_of(table, target[span], weight[span])  # and (chunk,) twice
            dh[span] = table @ W_cast
            add_product(dW, table.T, part)
            if dbias is not None:
                dbias += table.sum(0, dtype=dbias.dtype)
            pieces.append(piece)
            del table  # else it would stay alive beside the next logits
        dW, dbias = dW[: len(W)], None if bias is None else dbias[: len(W)]
        ctx.save_for_backward(dh, dW, dbias)
        terms, ce = map(torch.cat, zip(*pieces, strict=True))  # (N,) each
        ctx.mark_non_differentiable(terms, ce)
        return (weight * terms).sum(), terms, ce

    @staticmethod
    def backward(ctx, scale, _terms, _ce):
        dh, dW, dbias = ctx.saved_tensors
        grads = [None if grad is None else grad * scale for grad in (dh, dW, dbias)]
        return *grads, None, None, None, None


def add_product(total, a, b):
    """total += a @ b, in place; on CUDA the product is not rounded before it is added."""
    if total.device.type == "cuda" and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


# ---- Parts of a block ----------------------------------------------------------------------------


def attention(q, k, v, causal=False, seen=None):
    """Softmax attention: q (B, H, Lq, d), k and v (B, H, Lk, d) -> (B, H, Lq, d).

    causal: the last query is at the position of the last key, and no query sees keys after its own.
    Otherwise seen (B, 1, Lq, Lk) bool may say which keys each query sees.
    """
    Lq, Lk = q.shape[2], k.shape[2]
    few = Lq > 1 and len(q) * Lq <= 16  # few queries: SDPA's kernel takes half the time
    written_out = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not few
    if causal and Lq > 1 and (written_out or Lq != Lk):
        seen = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq)  # (Lq, Lk)
    if written_out:
        # In bfloat16 on a CPU, SDPA's kernel takes about three times as long as its two products
        # written out. q is scaled (one more rounding, unless the scale is a power of two) because
        # torch.compile handles the softmax of a scaled table in a special way that takes 1.6 times
        # as long. A softmax of bfloat16 is summed in float32 and rounded once.
        score = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, Lq, Lk)
        score = score if seen is None else score.masked_fill(~seen, -torch.inf)
        return score.softmax(-1) @ v
    causal = causal and Lq > 1 and seen is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)


FEW = 2  # queries per sequence; up to here, copying its keys and values is cheaper


def attention_at(masked_idx, q, k, v):
    """Attention of queries q (N, H, d) at flat positions (N,) to k, v (B, H, L, d): (N, H, d)."""
    B, H, L, d = k.shape
    if len(masked_idx) <= FEW * B:  # each query gets a copy of its own sequence
        row = masked_idx // L  # (N,)
        return attention(q.unsqueeze(2), k[row], v[row], False).squeeze(2)
    # With more queries, a table of all positions, with zeros for the others, is cheaper.
    table = q.new_zeros(B * L, H, d).index_copy(0, masked_idx, q).view(B, L, H, d)
    y = attention(table.transpose(1, 2), k, v, False)  # (B, H, L, d)
    return y.transpose(1, 2).reshape(B * L, H, d).index_select(0, masked_idx)


def attention_in_order(q, kv):
    """Attention among the 2n tokens of a chain rule, n clean ones, then n queries.

    kv (2, B, H, 2n, d). The i-th token of either half sees the clean tokens 0..i; a query also sees
    itself. q is (B, H, 2n, d), or (B, H, n, d) with the queries alone.
    """
    (k, v), n = kv, kv.shape[3] // 2
    keys, values, own_k, own_v = k[:, :, :n], v[:, :, :n], k[:, :, n:], v[:, :, n:]  # (B, H, n, d)
    clean, queries = (None, q) if q.shape[2] == n else q.split(n, dim=2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Written out as above, but n + 1 wide: `attention` would score n - 1 unneeded keys.
        scaled = queries * q.shape[-1] ** -0.5  # (B, H, n, d)
        unseen = torch.ones(n, n, dtype=torch.bool).triu(1)  # (n, n)
        score = (scaled @ keys.transpose(-2, -1)).masked_fill(unseen, -torch.inf)  # (B, H, n, n)
        own_score = (scaled.float() * own_k.float()).sum(-1, keepdim=True).to(score)  # (B, H, n, 1)
        p = torch.cat([score, own_score], dim=-1).softmax(-1)  # (B, H, n, n + 1)
        y = p[..., :n] @ values + p[..., n:] * own_v
    else:
        tril = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        seen = torch.cat([tril, torch.eye(n, dtype=torch.bool, device=q.device)], dim=1)  # (n, 2n)
        y = F.scaled_dot_product_attention(queries, k, v, attn_mask=seen)
    if clean is None:
        return y
    return torch.cat([attention(clean, keys, values, causal=True), y], dim=2)


def gelu(h):
    """GELU in its tanh form; compiled, tanh(z) = 2 sigmoid(2z) - 1 takes 0.4 of the time."""
    if torch.compiler.is_compiling():
        return h * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (h + 0.044715 * h * h * h))
    return F.gelu(h, approximate="tanh")


def relu2(h):
    """relu(h)^2 as a product, because CUDA's autocast would compute a power in float32."""
    h = F.relu(h)
    return h * h


# ---- From the host to a device -------------------------------------------------------------------


def in_float64(values):
    """The values as float64, on the CPU if they are on MPS, which lacks float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def moved(device, *tensors):
    """Move tensors from the CPU to the device; to CUDA from pinned memory, without waiting.

    MPS has no float64, so such a tensor stays where it is.
    """
    device_type = torch.device(device).type
    if device_type == "cuda":
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    stays = torch.float64 if device_type == "mps" else None
    return [tensor if tensor.dtype == stays else tensor.to(device) for tensor in tensors]
