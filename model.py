"""The network: a Transformer that reads partly hidden tokens and predicts the hidden ones. It is not told the time.

One class holds both published architectures (RADD: LayerNorm, biases, GELU; SMDM: RMSNorm, SwiGLU, no biases), causal or
not, and the variants that train faster at small scale.
"""

import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {
    "n_layer": 6,  # blocks
    "n_head": 4,  # attention heads of a block
    "n_embd": 256,  # width D; a head has n_embd / n_head of it, an even number
    "block_size": 256,  # the longest sequence
    "vocab_size": 0,  # V, without the mask; train.py takes it from the data
    "causal": False,  # True for the autoregressive baseline (objective ar)
    "norm": "layer",  # layer | rms
    "mlp": "gelu",  # gelu | swiglu | relu2
    "mlp_hidden": 0,  # width inside the MLP; 0: 4 * n_embd
    "bias": True,  # in norms, MLP and head (never in attention), as RADD has them
    "qk_norm": False,  # RMS-normalise queries and keys
    "zero_init": "none",  # start at zero: none | head (RADD) | all (head and both output projections of each block)
    "dropout": 0.0,  # after attention and after the MLP
    "rotary_bf16": False,  # round the rotary tables to bfloat16, as SMDM's weights expect
    "start_id": -1,  # the token that stands before the first one of a causal network; -1: the mask
    "unused_rows": 0,  # rows of the head past V that a weight format holds and nothing uses (RADD: 1)
}

SIZES = {  # SMDM's models by their parameters without embedding and head: (n_layer, n_head, n_embd, mlp_hidden)
    "6M": (6, 4, 256, 1024),
    "19M": (8, 6, 384, 1536),
    "34M": (8, 8, 512, 2048),
    "48M": (9, 9, 576, 2304),
    "66M": (10, 10, 640, 2560),
    "75M": (16, 8, 640, 1600),
    "85M": (13, 10, 640, 2560),
    "113M": (12, 12, 768, 3072),
    "142M": (15, 12, 768, 3072),
    "170M": (18, 12, 768, 3072),
    "180M": (14, 14, 896, 3584),
    "206M": (16, 14, 896, 3584),
    "231M": (18, 14, 896, 3584),
    "268M": (16, 16, 1024, 4096),
    "302M": (18, 16, 1024, 4096),
    "336M": (20, 16, 1024, 4096),
    "472M": (18, 10, 1280, 5120),
    "551M": (21, 10, 1280, 5120),
    "571M": (18, 11, 1408, 5632),
    "629M": (24, 10, 1280, 5120),
    "666M": (21, 11, 1408, 5632),
    "717M": (19, 12, 1536, 6144),
    "761M": (24, 11, 1408, 5632),
    "831M": (22, 12, 1536, 6144),
    "944M": (25, 12, 1536, 6144),
    "1028M": (20, 14, 1792, 7168),
    "1233M": (24, 14, 1792, 7168),
    "1476M": (22, 16, 2048, 8192),
    "1678M": (25, 16, 2048, 8192),
    "2121M": (28, 17, 2176, 8704),
}


def attend(q, k, v, causal):
    """Softmax attention. q (B, H, Lq, d), k and v (B, H, Lk, d) -> (B, H, Lq, d); causal counts from the end of k."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused kernel in bfloat16 is about three times slower on a CPU than its two products written out. The scale is
        # taken into q (which rounds it once more, unless the scale is a power of two): torch.compile has a form of its own
        # for the softmax of a scaled table, which takes 1.6 times as long.
        score = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float()  # (B, H, Lq, Lk)
        if causal and q.shape[2] > 1:
            hide = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
            score = score.masked_fill(hide, -torch.inf)
        return score.softmax(-1).to(v.dtype) @ v
    if causal and q.shape[2] not in (1, k.shape[2]):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] > 1)


def rotate(z, cos, sin):
    """Rotary position embedding (arXiv 2104.09864) on half-split pairs (i, i + d/2) of z (..., d); cos, sin (..., d/2)."""
    a, b = z.chunk(2, dim=-1)  # (..., d/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(z.dtype)


def make_norm(config):
    D = config["n_embd"]
    return nn.LayerNorm(D, eps=1e-5, bias=config["bias"]) if config["norm"] == "layer" else nn.RMSNorm(D, eps=1e-5)


def gelu(h):
    """GELU in its tanh form. tanh(z) = 2 sigmoid(2z) - 1, and fused the sigmoid takes 0.4 of the time (on a CPU)."""
    if torch.compiler.is_compiling():
        return h * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))
    return F.gelu(h, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, self.kind = config["n_embd"], config["mlp"]
        width = config["mlp_hidden"] or 4 * D
        if self.kind == "swiglu":
            self.gate = nn.Linear(D, width, bias=config["bias"])
        self.up = nn.Linear(D, width, bias=config["bias"])
        self.down = nn.Linear(width, D, bias=config["bias"])

    def forward(self, h):  # (..., D) -> (..., D)
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(h)) * self.up(h))
        h = self.up(h)  # (..., width)
        return self.down(F.relu(h).square() if self.kind == "relu2" else gelu(h))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config["n_embd"]
        self.n_head, self.causal, self.qk_norm = config["n_head"], config["causal"], config["qk_norm"]
        self.norm1 = make_norm(config)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.proj = nn.Linear(D, D, bias=False)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config["dropout"])

    def forward(self, h, cos, sin, rows=None, cache=None):  # (B, L, D) -> (B, L, D), or (N, D) where rows (N,) are given
        B, L, D = h.shape
        z = self.norm1(h)  # (B, L, D)
        if rows is not None and not self.causal:
            y = self.attend_from(rows, z, cos, sin)  # (N, D)
        else:
            q, k, v = self.qkv(z).view(B, L, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
            q, k = self.place(q, cos, sin), self.place(k, cos, sin)
            if cache is not None:
                k, v = cache.append(k, v)  # (B, H, L so far, d) each
            y = attend(q, k, v, self.causal).transpose(1, 2).reshape(B, L, D)  # (B, L, D)
            y = y if rows is None else y.flatten(0, 1)[rows]  # (N, D)
        h = h if rows is None else h.flatten(0, 1)[rows]  # (N, D): from here on a row depends on itself alone
        h = h + self.drop(self.proj(y))
        return h + self.drop(self.mlp(self.norm2(h)))

    def place(self, z, cos, sin):
        """Queries or keys (..., d), normalised if they are to be, and told where they stand."""
        return rotate(F.rms_norm(z, z.shape[-1:]) if self.qk_norm else z, cos, sin)

    def attend_from(self, rows, z, cos, sin):
        """What the wanted rows (N,) of z (B, L, D) read: (N, D). All positions have keys and values, these alone queries."""
        B, L, D = z.shape
        to_q, to_kv = self.qkv.weight.split([D, 2 * D])
        k, v = F.linear(z, to_kv).view(B, L, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        q = F.linear(z.flatten(0, 1)[rows], to_q).view(-1, self.n_head, k.shape[-1])  # (N, H, d)
        q, k = self.place(q, cos[rows % L, None], sin[rows % L, None]), self.place(k, cos, sin)
        if len(rows) <= 2 * B:  # each asks its own sequence alone, of which it gets a copy
            return attend(q.unsqueeze(2), k[rows // L], v[rows // L], False).flatten(1)
        # With more than about two a sequence copies cost more than a table of all positions, in which the others ask with
        # zeros and are not listened to.
        table = q.new_zeros(B * L, *q.shape[1:]).index_copy(0, rows, q)  # (B*L, H, d)
        y = attend(table.view(B, L, *q.shape[1:]).transpose(1, 2), k, v, False)  # (B, H, L, d)
        return y.transpose(1, 2).reshape(B * L, D)[rows]


class Cache:
    """Keys and values of one layer of a causal network, for at most `length` positions."""

    def __init__(self, length):
        self.length, self.n, self.k, self.v = length, 0, None, None

    def append(self, k, v):
        if self.k is None:
            shape = (*k.shape[:2], self.length, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)  # (B, H, length, d) each
        start, self.n = self.n, self.n + k.shape[2]
        self.k[:, :, start : self.n], self.v[:, :, start : self.n] = k, v
        return self.k[:, :, : self.n], self.v[:, :, : self.n]


class Transformer(nn.Module):
    """model(x) -> logits (B, L, V) for x (B, L) in [0, V], where V = mask_id is the mask: it can be read, not predicted."""

    def __init__(self, config):
        super().__init__()
        D, V = config["n_embd"], config["vocab_size"]
        assert D % config["n_head"] == 0 and (D // config["n_head"]) % 2 == 0
        self.config = config
        self.block_size, self.vocab_size, self.mask_id = config["block_size"], V, V
        self.start_id = V if config["start_id"] < 0 else config["start_id"]
        self.embed = nn.Embedding.from_pretrained(torch.empty(V + 1, D), freeze=False)  # drawn below, with all others
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["n_layer"]))
        self.norm = make_norm(config)
        self.unembed = nn.Linear(D, V + config["unused_rows"], bias=config["bias"])
        cos, sin = (table.to(self.embed.weight.device) for table in rotary_tables(config))  # (block_size, d/2) each
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if not self.embed.weight.is_meta:  # on the meta device there is nothing to draw, and trying costs a second
            with torch.no_grad():
                for name, value in self.initial_weights():
                    self.get_parameter(name).copy_(value)

    def initial_weights(self):
        """Yields (name, value). SMDM's (arXiv 2410.18514): N(0, 2/(5 D)), output projections N(0, 1/(D n_layer^2)).

        One tensor at a time, drawn whole: a network that is spread over processes starts with the same numbers.
        """
        config, D = self.config, self.config["n_embd"]
        for name, parameter in self.named_parameters():
            out = name.endswith(("proj.weight", "down.weight"))
            if parameter.dim() == 2:
                zero = (config["zero_init"] == "all" and out) or (config["zero_init"] != "none" and name == "unembed.weight")
                std = 1 / (math.sqrt(D) * config["n_layer"]) if out else math.sqrt(2 / (5 * D))
                yield name, torch.empty(parameter.shape).normal_(std=0.0 if zero else std)
            else:
                yield name, torch.full(parameter.shape, float("norm" in name and name.endswith("weight")))

    def hidden(self, x, rows=None, cache=None):
        """The last layer, normed: x (B, L) -> (B, L, D); with rows (N,), different flat indices into B*L, those: (N, D).

        The last block does for the wanted rows alone what no other row reads: all but keys and values, in a causal network
        all but attention. That changes no result.
        `cache`, a list of one Cache a block, makes a causal network go on from the positions that the cache holds.
        """
        start = cache[0].n if cache else 0
        assert start + x.shape[1] <= self.block_size, f"{start + x.shape[1]} tokens, block_size {self.block_size}"
        cos, sin = self.cos[start : start + x.shape[1]], self.sin[start : start + x.shape[1]]  # (L, d/2) each
        h = self.embed(x)  # (B, L, D)
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            h = block(h, cos, sin, rows if last else None, cache[i] if cache else None)
        return self.norm(h)

    def head_parameters(self):
        """(weight (V, D), bias (V,) or None) of the head; the mask has no row in it."""
        bias = self.unembed.bias
        return self.unembed.weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]

    def head(self, h):
        """h (..., D) -> logits (..., V)."""
        return F.linear(h, *self.head_parameters())

    def head_loss(self, h, target, row_weight, normalised=True):
        """h (N, D), target (N,), row_weight (N,) -> (sum of row_weight * CE, CE (N,) without gradient), in nats."""
        return head_loss(h, *self.head_parameters(), target, row_weight, normalised)

    def forward(self, x):
        return self.head(self.hidden(x))

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, L, head_share=1.0):
        """Multiply-adds x 2 of matrix products in one forward pass, per token of a sequence of L.

        head_share: the part of the positions whose row leaves the last block (hidden ones, more than two a sequence); their
        output projection, MLP and head (and query, unless causal) are counted, the others' are not, but the attention of all
        is. Training costs three times this (arXiv 2204.02311, appendix B).
        """
        D, n_layer = self.config["n_embd"], self.config["n_layer"]
        block = self.blocks[0]
        tail = block.proj.weight.numel() + sum(p.numel() for p in block.mlp.parameters() if p.dim() == 2)
        query = 0 if self.config["causal"] else D * D
        attention = 2 * L * D // (2 if self.config["causal"] else 1)
        everywhere = block.qkv.weight.numel() - query + attention
        products = n_layer * everywhere + (n_layer - 1 + head_share) * (query + tail)
        return 2 * (products + head_share * self.vocab_size * D)


# ---- The head and its loss -------------------------------------------------------------------------------------------


def head_loss(h, head_weight, head_bias, target, row_weight, normalised=True, chunk=0):
    """(sum of row_weight * CE, CE (N,) without gradient) for h (N, D) and target (N,).

    `chunk` rows at a time; 0: head_chunk.
    """
    chunk = chunk or head_chunk(len(head_weight))
    if torch.is_grad_enabled():
        return HeadLoss.apply(h, head_weight, head_bias, target, row_weight, normalised, chunk)
    pieces = zip(h.split(chunk), target.split(chunk), row_weight.split(chunk), strict=True)
    ce = torch.cat([row_loss(F.linear(a, head_weight, head_bias), b, c, normalised)[0] for a, b, c in pieces])  # (N,)
    return (row_weight * ce).sum(), ce


def head_chunk(V):
    """Rows that pass the head together: 256, or, where that is more, as many as have four million logits."""
    return max(256, 2**22 // V)  # small products are slow


def row_loss(logits, target, row_weight, normalised):
    """CE (N,), and the gradient (N, V) of sum(row_weight * CE), row_weight * (p - onehot); in float32 or wider."""
    z = logits.to(wide(logits.dtype), copy=True)  # (N, V); one table, overwritten step by step
    if normalised:
        z -= z.max(-1, keepdim=True).values
    at_target = z.gather(-1, target[:, None])  # (N, 1)
    total = z.exp_().sum(-1, keepdim=True)  # (N, 1)
    ce = (total.log() if normalised else total - 1) - at_target  # (N, 1)
    w = row_weight[:, None]  # (N, 1)
    gradient = z.mul_(w / total if normalised else w).scatter_add_(1, target[:, None], -w)  # (N, V)
    return ce.squeeze(-1), gradient


def wide(dtype):
    """What sums over V are taken in: float32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


class HeadLoss(torch.autograd.Function):
    """Head and cross-entropy with the gradient taken on the way forward.

    The gradient at the logits needs nothing from upstream but a scalar factor. So each chunk's logits are turned into
    gradients of h and of the head at once and dropped: memory (chunk, V) in place of (N, V), and no product done twice.
    """

    @staticmethod
    def forward(ctx, h, head_weight, head_bias, target, row_weight, normalised, chunk):
        dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
        W, bias = head_weight.to(dtype), None if head_bias is None else head_bias.to(dtype)  # (V, D), (V,)
        dh = torch.empty_like(h)  # (N, D)
        dW = torch.zeros_like(head_weight, dtype=wide(head_weight.dtype))  # (V, D)
        db = None if head_bias is None else torch.zeros_like(head_bias)  # (V,)
        ces = []
        for start in range(0, max(1, len(h)), chunk):  # once also where nothing is hidden
            piece = slice(start, start + chunk)
            part = h[piece].to(dtype)  # (chunk, D)
            ce, g = row_loss(F.linear(part, W, bias), target[piece], row_weight[piece], normalised)  # (chunk,), (chunk, V)
            if db is not None:
                db += g.sum(0)
            g = g.to(dtype)
            dh[piece] = g @ W
            dW += g.T @ part
            ces.append(ce)
        ctx.save_for_backward(dh, dW, db)
        ce = torch.cat(ces)  # (N,)
        ctx.mark_non_differentiable(ce)
        return (row_weight * ce).sum(), ce

    @staticmethod
    def backward(ctx, scale, _):
        dh, dW, db = ctx.saved_tensors
        return dh * scale, dW * scale, None if db is None else db * scale, None, None, None, None


# ---- Tables and speeds -----------------------------------------------------------------------------------------------


def rotary_tables(config):
    """cos, sin (block_size, d/2), on the CPU: angles position * 10000^(-2i/d)."""
    d = config["n_embd"] // config["n_head"]
    frequency = 1.0 / 10000 ** (torch.arange(0, d, 2, device="cpu").float() / d)  # (d/2,)
    angle = torch.outer(torch.arange(config["block_size"], device="cpu").float(), frequency)  # (block_size, d/2)
    dtype = torch.bfloat16 if config["rotary_bf16"] else torch.float32
    return angle.cos().to(dtype).float(), angle.sin().to(dtype).float()


def matmul_flops(device, autocast, n=1024, seconds=0.3):
    """Floating-point operations a second of a plain matrix product here and now: what utilisation is measured against."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a = torch.randn(n, n, device=device)  # (n, n)
    with autocast():
        a = b = a @ a  # (n, n) in the dtype of autocast
        best, began = math.inf, time.perf_counter()
        while time.perf_counter() - began < seconds:
            wait()
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            wait()
            best = min(best, (time.perf_counter() - start) / 4)
    return 2 * n**3 / best
