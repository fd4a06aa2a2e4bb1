"""Masked diffusion on one page of plain PyTorch: a network, its loss, its bound, its samples.

    python -m experiments.textbook      about a minute on two CPU cores (--quick: seconds)

This is the method as the papers write it, in one self-contained file. Read it after the first page
of diffusion.py. A remark `->` says what the real scripts do at the same place, and why.

From a GPT to this: attention looks both ways; the input has one more id, the mask; tokens are
predicted in place; the loss is on masked tokens, weighted; sampling unmasks in steps, anywhere.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

L, D, HEADS, LAYERS, BATCH = 64, 128, 4, 3, 32  # -> configs/: presets for all settings


def read(folder="data/pydocs"):
    """(training ids, held-out ids, characters) of a prepared text, or of Python's help texts."""
    if (Path(folder) / "meta.json").is_file():
        sys.path.append(str(Path(__file__).parents[1]))
        from data import loader, tokenizer

        parts = [loader.Tokens(folder, split) for split in ("train", "val")]
        known = tokenizer.from_meta(parts[0].meta["tokenizer"])
        train, val = (known.decode(part[: len(part)].tolist()) for part in parts)
    else:  # -> data/: whole documents held out, tokenizers, token files of any size
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
        train, val = text[:-40_000], text[-40_000:]
    letters = sorted({*train, *val})
    ids = {letter: i for i, letter in enumerate(letters)}
    return *(torch.tensor([ids[letter] for letter in z]) for z in (train, val)), letters


def blocks(ids, n):
    """n blocks from random places in the text: (n, L)."""
    start = torch.randint(len(ids) - L, (n, 1))  # -> data/loader.py: each block once per epoch
    return ids[start + torch.arange(L)]


def rotate(z):
    """Rotary embedding: rotate pairs (i, i + d/2) of z (B, H, L, d) by position * frequency."""
    d = z.shape[-1]
    angle = torch.outer(torch.arange(L), 10000 ** -(torch.arange(0, d, 2) / d))  # (L, d/2)
    a, b = z.chunk(2, dim=-1)  # (B, H, L, d/2) each
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.qkv, self.proj = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, h):  # (B, L, D) -> (B, L, D)
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)  # no causal mask
        h = h + self.proj(y.transpose(1, 2).flatten(2))
        # -> model.py: in the last block, this and the queries only at masked positions
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Network(nn.Module):
    """x (B, L) in [0, V], where V is the mask -> logits (B, L, V). There is no time input."""

    def __init__(self, V):
        super().__init__()
        self.mask_id, self.embed = V, nn.Embedding(V + 1, D)
        # -> model.py: normalised queries and keys, zero initialisation: fewer steps
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.unembed = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, x):
        return self.unembed(self.norm(self.blocks(self.embed(x))))


def nelbo(model, x0):
    """The loss: the bound on -log p(x0), in nats per token. x0 (B, L) -> a scalar."""
    t = 1 - torch.rand(len(x0), 1)  # (B, 1) the time in (0, 1], also the masking probability
    mask = torch.rand(x0.shape) < t  # (B, L)
    # -> diffusion.draw_mask: exactly k masked, k uniform on 1..L; diffusion.stratified: k spread
    #    evenly over the batch, in antithetic pairs (k, L + 1 - k). The same bound, far less noise.
    logits = model(torch.where(mask, model.mask_id, x0))  # (B, L, V)
    # -> lib/fused.py: logits only at masked positions, a chunk at a time
    ce = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")  # (B, L)
    # The weight is m'(t)/m(t) = 1/t, and the sum is divided by B * L. Dividing by the number of
    # masked tokens is common, but gives no bound: experiments/loss_audit.py.
    return (mask * ce / t).sum() / x0.numel()  # -> train.py: mask_rate, loss_weight depart from it


def train(model, ids, steps):
    """AdamW on random blocks -> the loss of each step."""
    # -> train.py: bfloat16, torch.compile, many processes, checkpoints, EMA; lib/optim.py: Muon
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for step in range(1, steps + 1):
        loss = nelbo(model, blocks(ids, BATCH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}: loss {sum(losses[-100:]) / 100:.3f} nats per token")
    return losses


@torch.no_grad()
def evaluate(model, ids, draws=100):
    """The bound on held-out text. -> evaluate.py: the whole text, stratified draws, error bars."""
    return sum(nelbo(model, blocks(ids, BATCH)).item() for _ in range(draws)) / draws


@torch.no_grad()
def sample(model, n, steps):
    """Ancestral sampling, from only masks at t = 1 to text at t = 0: (n, L)."""
    x = torch.full((n, L), model.mask_id)  # (n, L) -> sample.py: a prompt, a text with gaps
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps  # a step goes from t to s
        p = model(x).softmax(-1)  # (n, L, V)
        token = torch.multinomial(p.flatten(0, 1), 1).view(n, L)  # -> sample.categorical: float64
        unmask = (x == model.mask_id) & (torch.rand(n, L) < (t - s) / t)  # (m(t) - m(s)) / m(t)
        x = torch.where(unmask, token, x)
        # -> sample.py: steps are drawn ahead, idle ones skipped; the head runs only where due
    return x


def main(steps=800, n=3):
    """Train, evaluate and sample; returns (losses, bound, samples (n, L), model)."""
    torch.manual_seed(0)
    ids, held_out, letters = read()
    model = Network(len(letters))
    print(f"{len(ids):,} characters, {len(letters)} different ones")
    losses, bound = train(model, ids, steps), evaluate(model, held_out)
    print(f"held-out text: at most {bound:.3f} nats per token")
    x = sample(model, n, steps=2 * L)
    for row in x.tolist():
        print("----", "".join(letters[i] for i in row), sep="\n")
    return losses, bound, x, model


if __name__ == "__main__":
    sys.exit(__doc__) if {*sys.argv[1:]} - {"--quick"} else main(20 if sys.argv[1:] else 800)
