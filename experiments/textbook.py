"""What experiments/bench.py compares with: training and sampling as tutorials and the official repositories write them."""

import contextlib
import functools

import torch
import torch.nn.functional as F

import diffusion
import model as network

PLAIN = {"foreach": False, "fused": False}  # AdamW, one tensor at a time


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


# ---- Things to time, each made from plain settings, so that another process can make them too ------------------------


def training_step(shape, B, device, loss=loss, optimizer=PLAIN, autocast=contextlib.nullcontext, bind=functools.partial):
    """A function that does one step of training on B sequences of a random text, always the same.

    bind(loss, model) -> a function of a batch.
    """
    torch.manual_seed(0)
    model = network.Transformer({**network.DEFAULTS, **shape}).to(device)
    loss_of, V, L = bind(loss, model), model.vocab_size, model.block_size
    x0 = torch.randint(V, (B, L))  # (B, L)
    mask, weight = diffusion.training_mask("any_order", 0, 0, range(B), B, L)  # (B, L), (B,)
    batch = [z.to(device) for z in (x0, mask, weight.float(), diffusion.hidden_rows(mask, multiple=16))]
    update = torch.optim.AdamW(model.parameters(), lr=1e-4, **(optimizer if device.type == "cpu" else {}))

    def step():
        with autocast():
            value = loss_of(*batch)
        (value / (B * L)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad(set_to_none=True)

    return step


def sampling_part(shape, B, device, part, bfloat16, steps, some):
    """A function that does a part of sampling: `some` of the textbook's `steps`, or a call or a draw of RADD's cache."""
    torch.manual_seed(0)
    model = network.Transformer({**network.DEFAULTS, **shape}).to(device).eval()
    x = torch.full((B, model.block_size), model.mask_id, device=device)  # (B, L)
    autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if bfloat16 else contextlib.nullcontext
    p = cache_call(model, x, autocast)  # (B, L, V)
    return {
        "sample": lambda: sample(model, x, steps, autocast, some),
        "call": lambda: cache_call(model, x, autocast),
        "draw": lambda: cache_draw(p, x, model.mask_id, 1 / steps),
    }[part]


def serve(pipe, make, arguments):
    """Calls the function that make(*arguments) returns whenever it is asked to, until the other end closes."""
    function = make(*arguments)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            function()
            if torch.cuda.is_initialized():  # a GPU works on after the call
                torch.cuda.synchronize()
            pipe.send(True)
