"""The network: a Transformer that reads partly masked tokens and predicts the masked ones.

It has no time input, because what it predicts does not depend on the time (diffusion.py).

- It reads ids from 0 to V, where V is the mask, and outputs V logits: it can never predict a mask.
- It predicts in place: the output at a masked position is about that position. Nothing is shifted.
- attention=full sees both sides: masked diffusion as in both papers. One unmasked token changes
  every hidden state, so nothing can be kept from one call to the next.
- attention=causal sees the left: the autoregressive baseline (ARM), with a cache (lib/cache.py).
- attention=order is any-order generation with a cache (part 3; skip it if you use the other two).
  make_network(config) builds any of the three.
- One class covers both papers' architectures (RADD: LayerNorm, biases, GELU; SMDM: RMSNorm, SwiGLU,
  no biases; both rotary) and adds what trains faster at small scale (QK-norm, zero initialisation).

    h = embed(x)                               (B, L, D)
    h = h + proj(attention(norm1(h)))          in each block
    h = h + mlp(norm2(h))
    logits = unembed(norm(h))                  (B, L, V)

What makes it fast: the last block (attention_at) and the head run only at masked positions.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Table, choose, require
from lib import fused
from lib.cache import OrderCache
from lib.entries import check_ids

DEFAULTS = {
    "n_layer": 0,  # blocks; 0: set by train.py's `depth`, as for n_head and n_embd
    "n_head": 0,  # attention heads in each block
    "n_embd": 0,  # width D; the width of a head, n_embd / n_head, must be even
    "block_size": 128,  # maximum sequence length; 1 or more
    "vocab_size": 0,  # V, without the mask; train.py takes it from the data
    "attention": "full",  # one of ATTENTIONS; ar needs causal, any_order full or order
    "norm": "rms",  # one of NORMS
    "mlp": "gelu",  # one of MLPS
    "mlp_width": 0,  # inner width of the MLP; 0: 4 * n_embd
    "bias": False,  # biases in norms, MLPs and the head, as in RADD; attention never has any
    "qk_norm": True,  # RMS-normalise queries and keys
    "conv": 0,  # width (odd) of a convolution over the embeddings, for full attention; 0: none
    "zero_init": "all",  # one of ZERO_INITS; which output matrices start at zero (RADD: head)
    "dropout": 0.0,  # after attention and after the MLP; in [0, 1)
}
PUBLISHED = {  # no keys of commands: published weights and train.py's `size` set them
    "rotary_bf16": False,  # round the rotary tables to bfloat16, as SMDM's weights expect
    "start_id": -1,  # the token a causal network reads before the first; -1: the mask
    "head_padding": 0,  # unused outputs past V that a weight format stores (RADD: 1)
}


def check_shape(config):
    """Raise UserError for a shape that no network can have."""
    D, H, n_layer, conv = (config[key] for key in ("n_embd", "n_head", "n_layer", "conv"))
    message = f"n_layer {n_layer}, n_head {H} and n_embd {D} must be 1 or more; train.py fills in 0"
    require(min(n_layer, H, D) > 0, message)
    require(D % (2 * H) == 0, f"n_embd {D} must be a multiple of 2 * n_head = {2 * H}")
    message = f"conv must be 0, or with attention=full an odd number, not {conv}"
    require(conv == 0 or (config["attention"] == "full" and conv % 2 == 1), message)


def rotary_frequency(config):
    """10000^(-2i/d) (d/2,): the angle by which pair i turns per position; on the CPU."""
    d = config["n_embd"] // config["n_head"]
    return 1.0 / 10000 ** (torch.arange(0, d, 2, device="cpu").float() / d)


def rotary_tables(config):
    """cos, sin (block_size, d/2) of the angles position * frequency; on the CPU."""
    position = torch.arange(config["block_size"], device="cpu").float()  # (block_size,)
    angle = torch.outer(position, rotary_frequency(config))  # (block_size, d/2)
    dtype = torch.bfloat16 if config["rotary_bf16"] else torch.float32
    return angle.cos().to(dtype).float(), angle.sin().to(dtype).float()


def rotate(z, cos, sin):
    """Rotary position embedding (arXiv 2104.09864), on half-split pairs (i, i + d/2).

    z (..., d); cos, sin (..., d/2) -> (..., d)
    """
    a, b = z.chunk(2, dim=-1)  # (..., d/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(z.dtype)


# ---- 1. A block ----------------------------------------------------------------------------------
ATTENTIONS = ("full", "causal", "order")
NORMS = Table(
    "norm",
    layer=lambda config: nn.LayerNorm(config["n_embd"], eps=1e-5, bias=config["bias"]),
    rms=lambda config: nn.RMSNorm(config["n_embd"], eps=1e-5),
)
MLPS = Table(  # (activation, whether it is applied to a gate)
    "mlp",
    gelu=(fused.gelu, False),
    swiglu=(F.silu, True),
    relu2=(fused.relu2, False),
)
ZERO_INITS = Table(  # name suffixes of the weights that start at zero
    "zero_init",
    none=(),
    head=("unembed.weight",),
    all=("unembed.weight", "proj.weight", "down.weight"),
)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, width = config["n_embd"], config["mlp_width"] or 4 * config["n_embd"]
        self.activation, gated = MLPS[config["mlp"]]
        self.gate = nn.Linear(D, width, bias=config["bias"]) if gated else None
        self.up = nn.Linear(D, width, bias=config["bias"])
        self.down = nn.Linear(width, D, bias=config["bias"])

    def forward(self, h):  # (..., D) -> (..., D)
        if self.gate is None:
            return self.down(self.activation(self.up(h)))
        return self.down(self.activation(self.gate(h)) * self.up(h))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, self.n_head, self.qk_norm = config["n_embd"], config["n_head"], config["qk_norm"]
        self.causal = config["attention"] == "causal"
        self.norm1 = NORMS[config["norm"]](config)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.proj = nn.Linear(D, D, bias=False)
        self.norm2 = NORMS[config["norm"]](config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config["dropout"])

    def forward(self, h, cos, sin, masked_idx=None, cache=None):
        """(B, L, D) -> (B, L, D), or only at flat positions masked_idx (N,): (N, D)."""
        z = self.norm1(h)  # (B, L, D)
        if masked_idx is None:
            return self.after_attention(h, self.attention(z, cos, sin, cache))  # (B, L, D)
        h = h.flatten(0, 1).index_select(0, masked_idx)  # (N, D) with a faster backward than []
        return self.after_attention(h, self.attention_at(masked_idx, z, cos, sin))  # (N, D)

    def after_attention(self, h, y):
        """The rest of the block, position by position: h and attention's y -> h, (..., D) each."""
        h = h + self.drop(self.proj(y))
        return h + self.drop(self.mlp(self.norm2(h)))

    def attention(self, z, cos, sin, cache=None):
        """Self-attention: (B, L, D) -> (B, L, D). A cache adds keys and values of earlier calls."""
        B, L, D = z.shape
        qkv = self.qkv(z).view(B, L, 3, self.n_head, -1)  # (B, L, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        q = self.norm_and_rotate(q, cos, sin)  # (B, H, L, d)
        k = self.norm_and_rotate(k, cos, sin)  # (B, H, L, d)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, L so far, d) each
        return fused.attention(q, k, v, self.causal).transpose(1, 2).reshape(B, L, D)

    def norm_and_rotate(self, z, cos, sin):
        """Queries or keys (..., d): normalised if qk_norm, then rotated by their positions."""
        if self.qk_norm:
            z = F.rms_norm(z, z.shape[-1:]).to(z.dtype)  # CUDA's autocast makes it float32
        return rotate(z, cos, sin)

    def attention_at(self, masked_idx, z, cos, sin):
        """attention(z), computed only at flat positions masked_idx (N,): (N, D), the same values.

        Keys and values are needed at all positions: 2 of the 12 D x D products of a block (with an
        MLP of width 4 D). The other 10 (query, output projection, MLP) are needed only where a
        token is predicted: at half of the positions in training, at a few in sampling.
        """
        B, L, D = z.shape
        if self.causal:
            return self.attention(z, cos, sin).flatten(0, 1).index_select(0, masked_idx)
        to_q, to_kv = self.qkv.weight.split([D, 2 * D])
        kv = F.linear(z, to_kv).view(B, L, 2, self.n_head, -1)  # (B, L, 2, H, d)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        q = F.linear(z.flatten(0, 1).index_select(0, masked_idx), to_q)  # (N, D)
        q = q.view(-1, *kv.shape[3:])  # (N, H, d)
        position = masked_idx % L  # (N,)
        q = self.norm_and_rotate(q, cos[position, None], sin[position, None])  # (N, H, d)
        k = self.norm_and_rotate(k, cos, sin)  # (B, H, L, d)
        return fused.attention_at(masked_idx, q, k, v).flatten(1)


# ---- 2. The network ------------------------------------------------------------------------------
def make_network(config):
    """The network of a config: an OrderTransformer for attention=order, otherwise a Transformer."""
    return OrderTransformer(config) if config["attention"] == "order" else Transformer(config)


class Transformer(nn.Module):
    """model(x) -> logits (B, L, V) for x (B, L) in [0, V]; V = mask_id."""

    attentions, block_class = ("full", "causal"), Block

    def __init__(self, config):
        super().__init__()
        config = PUBLISHED | config
        check_shape(config)
        attention = choose("attention", config["attention"], ATTENTIONS)
        message = f"a {type(self).__name__} has no attention={attention}; use make_network(config)"
        require(attention in self.attentions, message)
        D, V, conv = config["n_embd"], config["vocab_size"], config["conv"]
        self.config = config
        self.block_size, self.vocab_size, self.mask_id = config["block_size"], V, V
        self.start_id = V if config["start_id"] < 0 else config["start_id"]
        self.row_loss = None  # lib/parallel.py may set a compiled one
        self.embed = nn.Embedding.from_pretrained(torch.empty(V + 1, D), freeze=False)
        self.conv = nn.Parameter(torch.empty(conv, D)) if conv else None
        self.blocks = nn.ModuleList(self.block_class(config) for _ in range(config["n_layer"]))
        self.norm = NORMS[config["norm"]](config)
        self.unembed = nn.Linear(D, V + config["head_padding"], bias=config["bias"])
        self.set_rotary_tables(self.embed.weight.device)
        if not self.embed.weight.is_meta:  # which has no memory; drawing would take a second
            with torch.no_grad():
                for name, value in self.initial_weights():
                    self.get_parameter(name).copy_(value)

    def set_rotary_tables(self, device):
        for name, table in zip(("cos", "sin"), rotary_tables(self.config), strict=True):
            self.register_buffer(name, table.to(device), persistent=False)  # (block_size, d/2)

    @property
    def causal(self):
        return self.config["attention"] == "causal"

    def initial_weights(self):
        """Yield (name, value): N(0, 2/(5 D)), output projections N(0, 1/(D n_layer^2)), or 0.

        This is SMDM's initialisation (arXiv 2410.18514). Tensors are drawn one at a time, each as a
        whole, so that a network sharded over processes starts with the same weights.
        """
        D, n_layer = self.config["n_embd"], self.config["n_layer"]
        zero = ZERO_INITS[self.config["zero_init"]]
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                out = name.endswith(("proj.weight", "down.weight"))
                std = 1 / (math.sqrt(D) * n_layer) if out else math.sqrt(2 / (5 * D))
                std = 0.0 if name == "conv" or name.endswith(zero) else std
                yield name, torch.empty(parameter.shape).normal_(std=std)
            else:
                one = "norm" in name and name.endswith("weight")
                yield name, torch.full(parameter.shape, float(one))

    def hidden(self, x, masked_idx=None, cache=None):
        """Hidden states: x (B, L) -> (B, L, D), or (N, D) at distinct flat indices masked_idx (N,).

        cache: a list of one Cache per block, which a causal network continues from and appends to.
        """
        start = cache[0].n if cache else 0
        end = start + x.shape[1]
        assert end <= self.block_size, f"{end} tokens, block_size {self.block_size}"
        cos, sin = self.cos[start:end], self.sin[start:end]  # (L, d/2) each
        h = self.embed(x)  # (B, L, D)
        if self.conv is not None:
            h = h + self.convolved(h)
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            h = block(h, cos, sin, masked_idx if last else None, cache[i] if cache else None)
        return self.norm(h)

    def convolved(self, h):
        """A depthwise convolution over neighbours on both sides: (B, L, D) -> (B, L, D).

        Attention has to learn which positions are neighbours; a convolution has it built in.
        """
        L, half = h.shape[1], len(self.conv) // 2
        padded = F.pad(h, (0, 0, half, half))  # (B, L + width - 1, D)
        return sum(padded[:, i : i + L] * weight for i, weight in enumerate(self.conv))

    def head_parameters(self):
        """The weight (V, D) and bias (V,) or None of the head; the mask has no output."""
        weight, bias, V = self.unembed.weight, self.unembed.bias, self.vocab_size
        if self.config["head_padding"]:
            weight, bias = weight[:V], None if bias is None else bias[:V]
        return weight, bias

    def head(self, h):
        """h (..., D) -> logits (..., V)."""
        return F.linear(h, *self.head_parameters())

    def forward(self, x):
        check_ids(self, "x", x)
        return self.head(self.hidden(x))

    @property
    def device(self):
        return self.cos.device

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())


# ---- 3. A network with attention=order -----------------------------------------------------------
class TwoStreams(NamedTuple):
    """What an OrderBlock needs besides h, cos and sin."""

    n: int  # number of clean tokens; the others are queries
    read: object  # (q (B, H, T, d), k and v (2, B, H, n + Q, d)) -> attention's output (B, H, T, d)
    last: bool  # whether this is the last block, which needs only the queries


class OrderBlock(Block):
    def forward(self, h, cos, sin, streams):
        """h (B, n + Q, D), n clean tokens, then Q queries -> the same; last block: (B, Q, D)."""
        y = self.attention_in_order(self.norm1(h), cos, sin, streams)  # (B, T, D)
        return self.after_attention(h[:, -y.shape[1] :], y)

    def attention_in_order(self, z, cos, sin, streams):
        """z (B, n + Q, D), n clean tokens, then Q queries -> the same; last block: (B, Q, D).

        All later tokens attend to a clean token; nothing but itself attends to a query. The last
        block needs only the queries.
        """
        (B, T, _), (n, read, last) = z.shape, streams
        qkv = self.qkv(z).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, d)
        q, k = self.norm_and_rotate(qkv[:2], cos, sin)  # (B, H, T, d) each
        q = q[:, :, n:] if last else q
        return read(q, torch.stack([k, qkv[2]])).transpose(1, 2).flatten(2)


class OrderTransformer(Transformer):
    """Any-order generation with a cache.

    Clean tokens are laid out in the order in which they are unmasked, and each sees itself and
    those before it. A *query* is the mask at some position; it sees the clean tokens so far and
    itself. Later tokens never change earlier keys and values. So a cache is exact, and one pass
    over [clean tokens; queries] gives all L terms of a chain rule. A prediction depends on the
    order of the visible tokens, not only on their set. From left to right, this is an ARM with
    queries. (XLNet, arXiv 1906.08237; sigma-GPT, 2404.09562; Eso-LM, 2506.01928.)
    """

    attentions, block_class = ("order",), OrderBlock

    def hidden(self, x, masked_idx=None):
        """Like Transformer.hidden. Visible tokens are read from left to right, then the queries."""
        B, L = x.shape
        idx = torch.arange(B * L) if masked_idx is None else masked_idx.cpu()  # (N,)
        visible = x.cpu() != self.mask_id  # (B, L)
        slots = torch.arange(B)  # (B,)
        h = self.hidden_from_cache(x, visible, idx, OrderCache(B, L), slots)  # (N, D)
        return h.view(B, L, -1) if masked_idx is None else h

    def hidden_in_order(self, clean, positions, attend=None):
        """Hidden states (B, Q, D) of the queries.

        clean (B, n): a start token, then ids in the order in which they are unmasked. positions
        (B, n + Q): those of the clean tokens, then those of the queries. By default Q = n, and
        query k sees the clean tokens 0..k: all terms of a chain rule in one pass. With `attend`
        from a cache's Reading (lib/cache.py), each query sees all that its sequence has read.
        """
        n, Q = clean.shape[1], positions.shape[1] - clean.shape[1]
        queries = torch.full((len(clean), Q), self.mask_id, device=clean.device)  # (B, Q)
        cos, sin = (table[positions][:, None] for table in (self.cos, self.sin))  # (B, 1, n+Q, d/2)
        h = self.embed(torch.cat([clean, queries], dim=1))  # (B, n + Q, D)
        for i, block in enumerate(self.blocks):
            read = functools.partial(attend, i) if attend else fused.attention_in_order
            h = block(h, cos, sin, streams=TwoStreams(n, read, i == len(self.blocks) - 1))
        return self.norm(h)

    def hidden_from_cache(self, x, visible, masked_idx, cache, slots):
        """Hidden states (N, D) at flat positions masked_idx (N,) of x (B, L), with an OrderCache.

        slots (B,) say where the cache stores each sequence. Tokens of visible (B, L) that it does
        not hold yet are read first. All tensors but x are on the CPU.
        """
        reading = cache.plan_call(slots, visible, masked_idx, x.device)
        clean = F.pad(x, (1, 0), value=self.mask_id).gather(1, reading.columns)  # (B, n)
        h = self.hidden_in_order(clean, reading.positions, reading.attend)  # (B, Q, D)
        return h[reading.requested]
