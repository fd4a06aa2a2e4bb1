"""Masked diffusion on one page of plain PyTorch: a network, its training, a bound, samples.

    python -m experiments.textbook      about a minute on two CPU cores

This is the method as the papers write it down, and nothing else: read it after the first page of
diffusion.py and before the rest. Remarks, `# ->`, name what the real scripts do at the same place,
and why; what they gain is measured by experiments/bench.py, and tests hold them to the plain form.

From a GPT to this: attention looks both ways; there is one more id to read, the mask; what is
predicted stands where it is predicted, with no shift; the loss is that of masked tokens, weighted;
and a sample is filled in over a number of steps, in any order, not from left to right.
"""

import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.functional import cross_entropy

L, D, HEADS, LAYERS, BATCH = 128, 128, 4, 4, 32  # -> configs/*.py: presets; config.py: any key


def read(folder="data/pydocs"):
    """(training ids, held-out ids, the characters): a prepared folder, or what Python carries."""
    if (Path(folder) / "meta.json").is_file():
        from data import loader, tokenizer

        splits = [loader.Tokens(folder, split) for split in ("train", "val")]
        text = tokenizer.from_meta(splits[0].meta["tokenizer"])
        train, val = (text.decode(ids[: len(ids)].tolist()) for ids in splits)
    else:  # -> data/: other texts, other tokenizers, held-out documents, token files of any size
        from pydoc_data.topics import topics

        train, val = "\n".join(topics.values()), ""
        train, val = train[: -len(train) // 10], train[-len(train) // 10 :]
    letters = sorted(set(train + val))
    ids = {letter: i for i, letter in enumerate(letters)}
    return *(torch.tensor([ids[letter] for letter in part]) for part in (train, val)), letters


def blocks(ids, n):
    """n blocks of L tokens from anywhere in the text: (n, L)."""
    start = torch.randint(len(ids) - L, (n,))  # -> data/loader.py: every token once an epoch
    return ids[start[:, None] + torch.arange(L)]


class Network(nn.Module):
    """x (B, L) in [0, V], where V is the mask -> logits (B, L, V). It is not told the time."""

    def __init__(self, V):
        super().__init__()
        self.mask_id = V
        self.embed = nn.Embedding(V + 1, D)
        self.place = nn.Parameter(torch.zeros(L, D))  # -> model.py: rotary, nothing to learn
        layer = nn.TransformerEncoderLayer(
            D, HEADS, 4 * D, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )  # -> model.py: RMS-normalised queries and keys, relu^2: it learns in fewer steps
        self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, V))

    def forward(self, x):
        # -> model.Block.attention_at: of the last block only masked positions are computed
        return self.head(self.blocks(self.embed(x) + self.place))


def corrupt(x0, mask_id):
    """Draw a time for each sequence and mask each token with probability m(t) = t."""
    t = 1 - torch.rand(len(x0), 1)  # (B, 1) in (0, 1]
    mask = torch.rand(x0.shape) < t  # (B, L)
    # -> diffusion.draw_mask: exactly k masked, k uniform on 1..L: the same bound, less noise;
    #    diffusion.stratified: one k from each stratum of the batch, in pairs (k, L + 1 - k)
    return torch.where(mask, mask_id, x0), mask, 1 / t


def nelbo(model, x0):
    """The bound on -log p(x0), the mean over the batch, in nats per token.

    Its weight is m'(t)/m(t) = 1/t: with it the expectation is the mean of -log p along all orders.
    """
    x, mask, weight = corrupt(x0, model.mask_id)
    logits = model(x)  # (B, L, V) -> lib/fused.py: at masked positions alone, a chunk at a time
    ce = cross_entropy(logits.transpose(1, 2), x0, reduction="none")  # (B, L)
    return (weight * mask * ce).sum() / x0.numel()  # not / mask.sum(): that is no bound


def train(model, ids, steps):
    """AdamW on random blocks; returns the loss of every step."""
    # -> lib/optim.py: Muon for matrices, a warm-up and a decay, averaged weights; train.py:
    #    bfloat16, torch.compile, gradient clipping, several processes, checkpoints, resuming
    optimizer, losses, began = torch.optim.AdamW(model.parameters(), lr=2e-3), [], time.time()
    for step in range(1, steps + 1):
        loss = nelbo(model, blocks(ids, BATCH))  # -> train.py: loss_weight, another one to train by
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step}: loss {mean:.3f} nats per token, {time.time() - began:.0f} s")
    return losses


@torch.no_grad()
def bound(model, ids, draws=32):
    """The bound on held-out text, a mean over many blocks and draws of the mask."""
    # -> evaluate.py: every token of the text, stratified draws, and the error of either
    return sum(nelbo(model, blocks(ids, BATCH)).item() for _ in range(draws)) / draws


@torch.no_grad()
def sample(model, n, steps):
    """Ancestral sampling: from t = 1, masks alone, to t = 0 in equal steps: (n, L)."""
    x = torch.full((n, L), model.mask_id)  # (n, L) -> sample.py: a prompt, a gap: whatever is there
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps  # from t to s
        p = model(x).softmax(-1)  # (n, L, V), a network call in every step
        drawn = torch.multinomial(p.flatten(0, 1), 1).view(n, L)
        unmask = (x == model.mask_id) & (torch.rand(n, L) < (t - s) / t)  # (m(t) - m(s)) / m(t)
        x = torch.where(unmask, drawn, x)
        # -> sample.py: each position's step is drawn ahead, and a sequence at which nothing is due
        #    is not called; only what is due passes the head; the draw is in float64
    return x


def main(steps=300, n=3, sample_steps=128):
    """Train, print the bound and n samples; returns (losses, bound, samples (n, L), model)."""
    torch.manual_seed(0)
    ids, held_out, letters = read()
    model = Network(len(letters))
    print(f"{len(ids):,} characters, {len(letters)} different ones")
    losses = train(model, ids, steps)
    nats = bound(model.eval(), held_out)
    print(f"held-out text: at most {nats:.3f} nats per token")
    x = sample(model, n, sample_steps)
    for row in x.tolist():
        print("----", "".join(letters[i] for i in row), sep="\n")
    return losses, nats, x, model


if __name__ == "__main__":
    main()
