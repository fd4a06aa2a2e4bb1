"""Fast forms of plain formulas, each held to the plain one by tests, and slower to read than it.

- cross_entropy: head and cross-entropy a chunk at a time, the gradient taken on the way forward
- attention: F.scaled_dot_product_attention, or its two products written out where that is faster
- gelu: its tanh form in fewer operations where it is compiled
"""

import torch
import torch.nn.functional as F


def wide(dtype):
    """The dtype that sums over V are taken in: float32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


# ---- Head and cross-entropy ----------------------------------------------------------------------


def cross_entropy(h, head, target, weight, normalised=True, chunk=0):
    """diffusion.cross_entropy without (N, V) logits in memory: (loss, terms (N,), CE (N,)).

    h (N, D), head: (weight (V, D), bias (V,) or None), target (N,), weight (N,). chunk: so many
    positions at a time; 0: head_chunk.
    """
    W, bias = head
    chunk = chunk or head_chunk(len(W))
    if torch.is_grad_enabled():
        return FusedCrossEntropy.apply(h, W, bias, target, weight, normalised, chunk)
    dtype = product_dtype(h)
    W, bias = (None if z is None else z.to(dtype) for z in head)  # cast once, not with each chunk
    pieces = zip(h.split(chunk), target.split(chunk), weight.split(chunk), strict=True)
    logits = ((F.linear(a.to(W.dtype), W, bias), b, c) for a, b, c in pieces)
    pieces = [cross_entropy_and_grad(*each, normalised)[:2] for each in logits]
    terms, ce = map(torch.cat, zip(*pieces, strict=True))  # (N,) each
    return (weight * terms).sum(), terms, ce


def head_chunk(V):
    """Positions of at most four million logits, but 256, as small products are slow."""
    return max(256, 2**22 // V)


def cross_entropy_and_grad(logits, target, weight, normalised=True):
    """Terms (N,), CE (N,), and the gradient of sum(weight * terms) at the logits (N, V).

    Terms are CE, the gradient weight * (softmax(logits) - onehot(target)). normalised=False: terms
    are -logit[target] + sum_v e^logit_v - 1, and e^logits take the place of the softmax. One table
    holds the logits, then their exponentials, then the gradient.
    """
    table = logits.to(wide(logits.dtype), copy=True)  # (N, V)
    if normalised:
        table -= table.max(-1, keepdim=True).values
    at_target = table.gather(-1, target[:, None])  # (N, 1)
    total = table.exp_().sum(-1, keepdim=True)  # (N, 1)
    ce = total.log() - at_target  # (N, 1)
    terms = ce if normalised else total - 1 - at_target  # (N, 1)
    w = weight[:, None]  # (N, 1)
    grad = table.mul_(w / total if normalised else w).scatter_add_(1, target[:, None], -w)  # (N, V)
    return terms.squeeze(-1), ce.squeeze(-1), grad


def product_dtype(h):
    """The dtype that autocast multiplies h in; it leaves float64 alone."""
    kind = h.device.type
    lower = torch.is_autocast_enabled(kind) and h.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if lower else h.dtype


class FusedCrossEntropy(torch.autograd.Function):
    """The gradient at the logits needs nothing from upstream but a scalar factor.

    So each chunk's logits are turned into gradients of h and of the head at once and dropped:
    (chunk, V) numbers in memory in place of (N, V), and no product done twice.
    """

    @staticmethod
    def forward(ctx, h, W, bias, target, weight, normalised, chunk):
        dtype = product_dtype(h)
        W_cast, bias_cast = W.to(dtype), None if bias is None else bias.to(dtype)  # (V, D), (V,)
        dh = torch.empty_like(h)  # (N, D)
        dW = torch.zeros_like(W, dtype=wide(W.dtype))  # (V, D)
        dbias = None if bias is None else torch.zeros_like(bias)  # (V,)
        pieces = []
        for start in range(0, max(1, len(h)), chunk):  # once also where nothing is masked
            now = slice(start, start + chunk)
            part = h[now].to(dtype)  # (chunk, D)
            logits = F.linear(part, W_cast, bias_cast)  # (chunk, V)
            *piece, grad = cross_entropy_and_grad(logits, target[now], weight[now], normalised)
            if dbias is not None:
                dbias += grad.sum(0)
            grad = grad.to(dtype)
            dh[now] = grad @ W_cast
            dW += grad.T @ part
            pieces.append(piece)
        ctx.save_for_backward(dh, dW, dbias)
        terms, ce = map(torch.cat, zip(*pieces, strict=True))  # (N,) each
        ctx.mark_non_differentiable(terms, ce)
        return (weight * terms).sum(), terms, ce

    @staticmethod
    def backward(ctx, scale, _terms, _ce):
        dh, dW, dbias = ctx.saved_tensors
        grads = [None if z is None else z * scale for z in (dh, dW, dbias)]
        return *grads, None, None, None, None


# ---- Parts of a block ----------------------------------------------------------------------------


def attention(q, k, v, causal=False, seen=None):
    """Softmax attention: q (B, H, Lq, d), k and v (B, H, Lk, d) -> (B, H, Lq, d).

    causal: the last query stands at the last key, and none looks to the right of its own place.
    seen (B, 1, Lq, Lk) bool says instead which keys a query looks at.
    """
    Lq, Lk = q.shape[2], k.shape[2]
    plain = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if causal and Lq > 1 and (plain or Lq != Lk):
        seen = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq)  # (Lq, Lk)
    if plain:
        # The kernel of SDPA in bfloat16 is about three times slower on a CPU than its two products
        # written out. The scale is taken into q (which rounds it once more, unless it is a power of
        # two): torch.compile has a form of its own for the softmax of a scaled table, which takes
        # 1.6 times as long.
        score = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float()  # (B, H, Lq, Lk)
        score = score if seen is None else score.masked_fill(~seen, -torch.inf)
        return score.softmax(-1).to(v.dtype) @ v
    causal = causal and Lq > 1 and seen is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)


def attention_in_order(q, kv):
    """Attention of a chain rule's 2n tokens, n clean ones and n queries: kv (2, B, H, 2n, d).

    Token number i of both halves sees the clean tokens 0..i, a query itself as well. q (B, H, 2n,
    d) may hold the queries alone: (B, H, n, d).
    """
    (k, v), n = kv, kv.shape[3] // 2
    keys, values, own_k, own_v = k[:, :, :n], v[:, :, :n], k[:, :, n:], v[:, :, n:]  # (B, H, n, d)
    clean, asked = (None, q) if q.shape[2] == n else q.split(n, dim=2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # written out, as above
        scaled = asked * q.shape[-1] ** -0.5  # (B, H, n, d)
        unseen = torch.ones(n, n, dtype=torch.bool).triu(1)  # (n, n)
        score = (scaled @ keys.transpose(-2, -1)).float().masked_fill(unseen, -torch.inf)
        own = (scaled.float() * own_k.float()).sum(-1, keepdim=True)  # (B, H, n, 1)
        p = torch.cat([score, own], dim=-1).softmax(-1).to(v.dtype)  # (B, H, n, n + 1)
        y = p[..., :n] @ values + p[..., n:] * own_v
    else:
        tril = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        seen = torch.cat([tril, torch.eye(n, dtype=torch.bool, device=q.device)], dim=1)  # (n, 2n)
        y = F.scaled_dot_product_attention(asked, k, v, attn_mask=seen)
    return (
        y if clean is None else torch.cat([attention(clean, keys, values, causal=True), y], dim=2)
    )


def gelu(h):
    """GELU in its tanh form. tanh(z) = 2 sigmoid(2z) - 1, and fused that takes 0.4 of the time."""
    if torch.compiler.is_compiling():
        return h * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))
    return F.gelu(h, approximate="tanh")
