"""What experiments/bench.py compares with: training and sampling as tutorials and the official repositories write them."""

import torch
import torch.nn.functional as F

import model as network


def hidden(model, x):
    """(B, L, D), attention written out, every position through every layer: x (B, L)."""
    h = model.embed(x)
    cos, sin = model.cos[: x.shape[1]], model.sin[: x.shape[1]]
    for block in model.blocks:
        B, L, D = h.shape
        q, k, v = block.qkv(block.norm1(h)).view(B, L, 3, block.n_head, -1).permute(2, 0, 3, 1, 4)
        if block.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        q, k = network.rotate(q, cos, sin), network.rotate(k, cos, sin)
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, H, L, L)
        h = h + block.proj((attention @ v).transpose(1, 2).reshape(B, L, D))
        h = h + block.mlp(block.norm2(h))
    return model.norm(h)


def loss(model, x0, mask, weight, rows):
    log_p = model.head(hidden(model, torch.where(mask, model.mask_id, x0))).log_softmax(-1)  # (B, L, V)
    ce = -log_p.gather(-1, x0[..., None]).squeeze(-1)  # (B, L)
    return (weight[:, None] * mask * ce).sum()


@torch.no_grad()
def sample(model, x, steps, autocast, last):
    """Ancestral sampling with a network call and a softmax at every position in every step; the first `last` of `steps`."""
    t = torch.linspace(1, 0, steps + 1)
    for i in range(last):
        with autocast():
            p = model.head(hidden(model, x)).float().softmax(-1)  # (B, L, V)
        drawn = (p / -torch.rand_like(p).log()).argmax(-1)  # (B, L)
        reveal = (x == model.mask_id) & (torch.rand(x.shape, device=x.device) < 1 - t[i + 1] / t[i])
        x = torch.where(reveal, drawn, x)
    return x


@torch.no_grad()
def cache_call(model, x, autocast):
    """What RADD's published cache makes again for the sequences x (B, L) that changed: (B, L, V) probabilities."""
    with autocast():
        return model.head(hidden(model, x)).float().softmax(-1)


@torch.no_grad()
def cache_draw(p, x, mask_id, chance):
    """Its draw in every step: at each hidden position one categorical over V tokens and the mask. -> x (B, L)"""
    wanted = x == mask_id  # (B, L)
    rows = p[wanted]  # (n, V)
    law = torch.cat([rows * chance, rows.new_full((len(rows), 1), 1 - chance)], dim=-1)  # (n, V + 1)
    x = x.clone()
    x[wanted] = (law / -torch.rand_like(law).log()).argmax(-1)  # V is the mask
    return x
