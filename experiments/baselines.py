"""What experiments/bench.py compares with: the plain training step and samplers, over our weights.

Tutorials and the official repositories write them so. The plain sampler calls the network in every
step; RADD's published cache calls it only where a sequence has changed.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F

import diffusion
import model as network
from lib import fused

PLAIN = {"foreach": False, "fused": False}  # AdamW, one tensor at a time


def hidden(model, x):
    """x (B, L) -> (B, L, D), attention written out, every position through every layer."""
    h = model.embed(x)  # (B, L, D)
    cos, sin = model.cos[: x.shape[1]], model.sin[: x.shape[1]]  # (L, d/2) each
    for block in model.blocks:
        B, L, D = h.shape
        q, k, v = block.qkv(block.norm1(h)).view(B, L, 3, block.n_head, -1).permute(2, 0, 3, 1, 4)
        if block.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        q, k = network.rotate(q, cos, sin), network.rotate(k, cos, sin)  # (B, H, L, d) each
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, H, L, L)
        h = h + block.proj((attention @ v).transpose(1, 2).reshape(B, L, D))
        h = h + block.mlp(block.norm2(h))
    return model.norm(h)


def loss(model, x0, mask, weight, masked_idx):
    """weight * cross-entropy over the logits of all positions, summed over the masked ones."""
    x = torch.where(mask, model.mask_id, x0)  # (B, L)
    log_p = model.head(hidden(model, x)).log_softmax(-1)  # (B, L, V)
    ce = -log_p.gather(-1, x0[..., None]).squeeze(-1)  # (B, L)
    return (weight[:, None] * mask * ce).sum()


@torch.no_grad()
def sample(model, x, steps, autocast, last):
    """Ancestral sampling with a network call and a whole softmax in each step, up to the `last`."""
    t = torch.linspace(1, 0, steps + 1)  # (steps + 1,)
    for i in range(last):
        p = cache_call(model, x, autocast)  # (B, L, V)
        drawn = (p / -torch.rand_like(p).log()).argmax(-1)  # (B, L)
        now = torch.rand(x.shape, device=x.device) < 1 - t[i + 1] / t[i]  # (B, L)
        x = torch.where((x == model.mask_id) & now, drawn, x)
    return x


@torch.no_grad()
def cache_call(model, x, autocast):
    """What RADD's cache makes again for the sequences x (B, L) that changed: p (B, L, V)."""
    with autocast():
        return model.head(hidden(model, x)).float().softmax(-1)


@torch.no_grad()
def cache_draw(p, x, mask_id, unmask_prob):
    """Its draw in a step: each masked position from a categorical over V tokens and the mask."""
    masked = x == mask_id  # (B, L)
    each = p[masked] * unmask_prob  # (n, V)
    stay = each.new_full((len(each), 1), 1 - unmask_prob)  # (n, 1)
    each = torch.cat([each, stay], dim=-1)  # (n, V + 1), V is the mask
    x = x.clone()
    x[masked] = (each / -torch.rand_like(each).log()).argmax(-1)
    return x


# ---- Things to time, made from plain settings, so that another process can make them too ---------


def training_step(
    shape,
    B,
    device,
    loss=loss,
    optimizer=PLAIN,
    autocast=contextlib.nullcontext,
    bind=functools.partial,
):
    """A function that does a training step on B sequences of a random text, always the same.

    bind(loss, model) -> a function of a batch.
    """
    torch.manual_seed(0)
    model = network.make_network({**network.DEFAULTS, **shape}).to(device)
    loss_of, V, L = bind(loss, model), model.vocab_size, model.block_size
    x0 = torch.randint(V, (B, L))  # (B, L)
    u, noise = diffusion.stratified_uniforms(0, 0, range(B), B, L)  # (B,), (B, L)
    mask, weight = diffusion.draw_mask("any_order", u, noise)  # (B, L), (B,)
    masked_idx = fused.masked_indices(mask, multiple=16)  # (N,)
    batch = [z.to(device) for z in (x0, mask, weight.float(), masked_idx)]
    if optimizer == PLAIN and device.type != "cpu":
        optimizer = {}  # what torch itself takes there: all tensors of a kind in one call
    update = torch.optim.AdamW(model.parameters(), lr=1e-4, **optimizer)

    def step():
        with autocast():
            value = loss_of(*batch)
        (value / (B * L)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad(set_to_none=True)

    return step


def sampling_part(shape, B, device, part, bfloat16, steps, some):
    """A function that does `some` of the plain sampler's `steps`, or a part of RADD's cache."""
    torch.manual_seed(0)
    model = network.make_network({**network.DEFAULTS, **shape}).to(device).eval()
    x = torch.full((B, model.block_size), model.mask_id, device=device)  # (B, L)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
    p = cache_call(model, x, autocast)  # (B, L, V)
    return {
        "sample": lambda: sample(model, x, steps, autocast, some),
        "call": lambda: cache_call(model, x, autocast),
        "draw": lambda: cache_draw(p, x, model.mask_id, 1 / steps),
    }[part]


def serve(pipe, make, arguments):
    """Call what make(*arguments) returns at each request, until the other end closes."""
    function = make(*arguments)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            function()
            if torch.cuda.is_initialized():  # a GPU works on after the call
                torch.cuda.synchronize()
            pipe.send(True)
