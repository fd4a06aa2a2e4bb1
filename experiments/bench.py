"""How fast, and what each trick is worth: everything measured side by side in one process.

    python -m experiments.bench [--quick=True] [--device=cuda]

Variants take turns (A B C, A B C, ...) and the median over the rounds is reported with its spread, so that a machine whose
speed drifts slows all of them. What they are measured against is this machine's own matrix product at the shapes of the
model. Utilisation counts the products that a step needs (Transformer.flops_per_token, forward and backward), not those
that it happens to do.
"""

import contextlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config as settings
import diffusion
import evaluate
import model as network
import sample
import train
from data import loader

DEFAULTS = {
    "quick": False,  # fewer rounds, shorter samples: to see that it runs
    "rounds": 5,
    "results": "experiments/results",  # folder for bench.json and bench.md
}

SMALL = {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 256, "norm": "rms", "mlp": "relu2", "bias": False}
SMALL |= {"qk_norm": True}
RADD_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "unused_rows": 1}


# ---- Textbook code, as tutorials and the official repositories write it -----------------------------------------------


def textbook_hidden(model, x):
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


def textbook_loss(model, x0, mask, weight, rows):
    log_p = model.head(textbook_hidden(model, torch.where(mask, model.mask_id, x0))).log_softmax(-1)  # (B, L, V)
    ce = -log_p.gather(-1, x0[..., None]).squeeze(-1)  # (B, L)
    return (weight[:, None] * mask * ce).sum()


def gathered_loss(hidden):
    """Head and cross-entropy on hidden rows only, for hidden(model, x, rows) -> (N, D)."""

    def loss(model, x0, mask, weight, rows):
        h = hidden(model, torch.where(mask, model.mask_id, x0), rows)
        ce = F.cross_entropy(model.head(h).float(), x0.flatten()[rows], reduction="none")  # (N,)
        return ((weight[:, None] * mask).flatten()[rows] * ce).sum()

    return loss


def our_loss(model, x0, mask, weight, rows):
    return diffusion.nelbo(model, x0, mask, weight, rows)[0]


@torch.no_grad()
def textbook_sample(model, x, steps, autocast, first=0, last=None):
    """Ancestral sampling with a network call and a softmax at every position in every step, or in steps first..last."""
    t = torch.linspace(1, 0, steps + 1)
    for i in range(first, steps if last is None else last):
        with autocast():
            p = model.head(textbook_hidden(model, x)).float().softmax(-1)  # (B, L, V)
        drawn = (p / -torch.rand_like(p).log()).argmax(-1)  # (B, L)
        reveal = (x == model.mask_id) & (torch.rand(x.shape, device=x.device) < 1 - t[i + 1] / t[i])
        x = torch.where(reveal, drawn, x)
    return x


@torch.no_grad()
def cached_sample(model, x, steps, autocast):
    """RADD's published cache: probabilities at all positions, made again for the sequences that changed in the last step.

    As in the official code one categorical over V tokens and the mask is drawn at every position in every step.
    """
    t = torch.linspace(1, 0, steps + 1)
    x, p = x.clone(), torch.empty(*x.shape, model.vocab_size, device=x.device)  # (B, L), (B, L, V)
    changed = torch.ones(len(x), dtype=torch.bool, device=x.device)  # (B,)
    for i in range(steps):
        if changed.any():
            with autocast():
                p[changed] = model.head(textbook_hidden(model, x[changed])).float().softmax(-1)
        chance = 1 - t[i + 1] / t[i]
        law = torch.cat([p * chance, (1 - chance).expand(*x.shape, 1).to(p)], dim=-1)  # (B, L, V + 1)
        drawn = (law / -torch.rand_like(law).log()).argmax(-1)  # (B, L), V is the mask
        new = torch.where(x == model.mask_id, drawn, x)
        changed, x = (new != x).any(1), new
    return x


# ---- Measuring -----------------------------------------------------------------------------------------------------------


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(variants, rounds, device):
    """{name: function} -> {name: [seconds, one a round]}; each runs once unmeasured before."""
    for function in variants.values():
        function()
    times = {name: [] for name in variants}
    for _ in tqdm(range(rounds), desc=next(iter(variants)), leave=False):
        for name, function in variants.items():
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return times


def middle(times):
    return statistics.median(times)


def peak_memory(function, device):
    """MiB that function() adds at its highest point to what is in use before it."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        wait(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before, top, stop = resident(), [0], threading.Event()

    def watch():
        while not stop.wait(0.002):
            top[0] = max(top[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    stop.set()
    watcher.join()
    return max(0, top[0] - before) / 2**20


def resident():
    """Bytes of this process in memory now, or the most it ever had where the system does not tell."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def product_seconds(model, B, L, dtype, device):
    """{name: (function, flops)} of the plain matrix products of one training step at this model's shapes.

    Each is run three times: forward, gradient of the input, gradient of the weight.
    """
    D, H, V, N = model.config["n_embd"], model.config["n_head"], model.vocab_size, B * L
    block = model.blocks[0]
    widths = [p.shape for p in block.parameters() if p.dim() == 2]  # (out, in) each
    layers = len(model.blocks)
    made = {}

    def product(rows, wide, deep, times):
        a = torch.randn(rows, deep, device=device, dtype=dtype)
        w = torch.randn(wide, deep, device=device, dtype=dtype)
        g = torch.randn(rows, wide, device=device, dtype=dtype)

        def run():
            _ = a @ w.T, g @ w, g.T @ a

        made[f"{rows}x{deep}x{wide}"] = (run, 6 * rows * wide * deep, times)

    for out, deep in widths:
        product(N, out, deep, layers)
    product(min(512, N // 2), V, D, N / 2 / min(512, N // 2))
    q = torch.randn(B, H, L, D // H, device=device, dtype=dtype)
    s = torch.randn(B, H, L, L, device=device, dtype=dtype)

    def attention():
        _ = q @ q.mT, s @ q, s @ q, s.mT @ q, q @ q.mT, s.mT @ q

    made["attention"] = (attention, 12 * B * L * L * D, layers)
    return made


def product_limit(model, B, L, dtype, rounds, device):
    """FLOP/s of plain matrix products in the proportions of this model's step: what a perfect step would reach."""
    made = product_seconds(model, B, L, dtype, device)
    times = alternate({name: run for name, (run, _, _) in made.items()}, rounds, device)
    seconds = sum(min(times[name]) * count for name, (_, _, count) in made.items())
    return sum(flops * count for _, flops, count in made.values()) / seconds


# ---- What is compared ------------------------------------------------------------------------------------------------------


def training(V, B, rounds, device, shape=SMALL, only=()):
    """The training step, one trick after another. -> rows of {name, tokens/s, ratio, spread, share of the limit, memory}"""
    L = shape["block_size"]
    settings_of = {**network.DEFAULTS, **shape, "vocab_size": V}
    bf16 = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    sdpa = lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # noqa: E731
    late = lambda model, x, rows: model.hidden(x, rows)  # noqa: E731
    early = lambda model, x, rows: textbook_hidden(model, x).flatten(0, 1)[rows]  # noqa: E731
    plain = {"foreach": False, "fused": False}
    tricks = {
        "textbook: float32, all logits, log_softmax, plain AdamW": (textbook_loss, plain, contextlib.nullcontext, False),
        "+ head on hidden rows only": (gathered_loss(early), plain, contextlib.nullcontext, False),
        "+ last block on hidden rows only, SDPA": (gathered_loss(late), plain, contextlib.nullcontext, False),
        "+ head and cross-entropy in chunks, gradient at once": (our_loss, plain, contextlib.nullcontext, False),
        "+ fused AdamW": (our_loss, {"fused": True}, contextlib.nullcontext, False),
        "+ bfloat16 (attention by SDPA)": (our_loss, {"fused": True}, bf16, False),
        "+ attention by what is fastest here": (our_loss, {"fused": True}, bf16, False),
        "+ compile": (our_loss, {"fused": True}, bf16, True),
    }
    tricks = {name: trick for name, trick in tricks.items() if not only or name in only}
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(V, (B, L), generator=generator)  # (B, L)
    mask, weight = diffusion.training_mask("any_order", 0, 0, range(B), B, L)  # (B, L), (B,)
    batch = [z.to(device) for z in (x0, mask, weight.float(), diffusion.hidden_rows(mask, multiple=128))]

    def step_of(name, loss, optimizer, autocast, compiled):
        torch.manual_seed(0)
        model = network.Transformer(settings_of).to(device)
        if compiled:
            model.hidden = torch.compile(model.hidden)
        update = torch.optim.AdamW(model.parameters(), lr=1e-4, **optimizer)
        attend = sdpa if "by SDPA" in name else network.attend

        def step():
            with patched(network, "attend", attend), autocast():
                value = loss(model, *batch)
            (value / (B * L)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            update.step()
            update.zero_grad(set_to_none=True)

        return step

    steps = {name: step_of(name, *trick) for name, trick in tricks.items()}
    times = alternate(steps, rounds, device)
    memory = {name: peak_memory(step, device) for name, step in steps.items()}
    model = network.Transformer(settings_of).to(device)
    limits = {kind: product_limit(model, B, L, kind, rounds, device) for kind in (torch.float32, torch.bfloat16)}
    flops = 3 * model.flops_per_token(L, 0.5) * B * L
    rows = []
    first = next(iter(times))
    for name, taken in times.items():
        rate = flops / middle(taken)
        rows.append(
            {
                "name": name,
                "tokens_per_second": B * L / middle(taken),
                "ratio": statistics.median(a / b for a, b in zip(times[first], taken, strict=True)),
                "spread": (max(taken) - min(taken)) / middle(taken),
                "mfu": rate / limits[torch.bfloat16],
                "memory_mib": memory[name],
            }
        )
    return rows, limits


@contextlib.contextmanager
def patched(module, name, value):
    """The module's attribute is `value` inside the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def sampling(V, steps, B, rounds, device, quick):
    """Seconds a sequence of the textbook sampler, RADD's cache and ours, in float32 and bfloat16. -> rows"""
    model = network.Transformer({**network.DEFAULTS, **SMALL, "vocab_size": V}).to(device).eval()
    torch.nn.init.normal_(model.unembed.weight, std=0.02)
    L = SMALL["block_size"]
    x = torch.full((B, L), model.mask_id, device=device)  # (B, L)
    bf16 = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    some = 2 if quick else 8  # of the textbook's steps, all of which cost the same
    part = max(1, steps // 16) if quick else steps
    variants = {}
    for dtype, autocast in (("float32", contextlib.nullcontext), ("bfloat16", bf16)):
        variants[f"textbook {dtype}"] = lambda a=autocast: textbook_sample(model, x, steps, a, 0, some)
        variants[f"RADD's cache {dtype}"] = lambda a=autocast: cached_sample(model, x, part, a)
        variants[f"ours {dtype}"] = lambda a=autocast: sample.sample(model, x, steps=part, batch_size=B, autocast=a)
    times = alternate(variants, rounds, device)
    seconds = {name: middle(taken) * (steps / some if "textbook" in name else steps / part) for name, taken in times.items()}
    base = seconds["textbook float32"]
    return [
        {"name": name, "seconds_per_sequence": seconds[name] / B, "ratio": base / seconds[name]} for name in seconds
    ]
