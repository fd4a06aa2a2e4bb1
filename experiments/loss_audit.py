"""The loss audit: which of the numbers called the loss of a masked diffusion model are bounds?

    python -m experiments.loss_audit           a joint that can be enumerated, and out/pydocs
    python -m experiments.loss_audit --ckpt=   the enumeration alone

Every code for masked diffusion masks tokens, asks the network for them and adds up cross-entropies.
The codes differ in how many tokens they mask and in the loss weight of each, and nearly all of them
print the exponential of the result and call it perplexity. This file says what each of these
numbers is.

One fact makes it simple. All of them mask positions without preference. So, whatever the rule, its
expectation is

    sum over k = 1..L of  a_k h_k,      h_k = the mean CE of a masked token when k of L are masked.

h_k belongs to the model and the text, a_k to the rule: a_k = E[weight * k, where k are masked] / L.
The chain rule says which a is right. Along a random order the last token is predicted with one
masked, the one before it with two, the first with all L, and these L cross-entropies add up to
-log p(x0). So a_k = 1/L: the bound per token is the plain mean of h_1..h_L. With the true
conditionals it equals the entropy of the text, with any others it lies above it (RADD eq. 2.16,
arXiv 2406.03736).

h_k grows with k, from h_1 (all other tokens are visible) to h_L (none is). Hence the ways to be
wrong:

  - a leans to small k: below the entropy. On average no distribution over texts can need fewer nats
    than the entropy, so such a number is no likelihood, its exponential no perplexity, and it
    compares with no autoregressive model's. BERT's 15% (arXiv 1810.04805) and one token at a time
    (the pseudo-log-likelihood of arXiv 1910.14659) are of this kind: each token is predicted from
    the others, the others from it, and what they share is never counted.
  - a leans to large k: above. A constant weight, or the mean over all masked tokens of a batch,
    counts a sequence the more the more of it is masked. Still an upper bound, but a loose one, and
    looser for a model that makes more of its context.
  - a does not sum to 1: the unit is wrong. 1/t under cosine masking counts every token Si(pi/2) =
    1.37 times, since t is not the probability of being masked there and m'(t)/m(t) would be right;
    weight 1 counts it half.
  - a is right and the number noisy: a draw with loss weight 1/lambda has an infinite variance (its
    square integrates like 1/lambda at 0), which is why codes cut lambda off, at 0.001 say, and are
    a little off for it. RADD's t_dce adds the log of a scalar whose integral over t vanishes while
    its standard deviation, pi/sqrt(3) = 1.81 nats a token and draw, does not; its range of t leaves
    out a thousandth of the integral, which is enough to be below the entropy. any_order needs
    neither.

Two things look wrong and are right. The mean over the masked tokens of each *sequence*, with lambda
uniform, is any_order: where anything is masked, k is uniform on 1..L, and the weight is 1/k. (Over
a *batch* it is not: there a sequence counts by how much of it is masked.) And score entropy (t_dse)
on a network with a softmax is t_dce.

Training may use other weights: each of these is least at the true conditionals, where every h_k is.
Our demo trains with the square root, and draws k from a bell besides (lib/weighting.py). It is the
number that is reported which has to be the bound.

How it is computed. For the joint (V = 3, L = 4) h_k is a sum over all masks and all x0 in float64,
and a_k a closed form or an integral over t to 1e-12: no draws. For a model h_k is measured on
held-out blocks: for each k a random permutation of each block is cut into L // k groups of k, which
are masked in turn. All rules are read off the same h_k, so that their differences are far sharper
than the numbers themselves, whose 95% intervals are over blocks.
"""

import itertools
import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import config as settings
import diffusion
from config import require
from data import loader
from data.loader import spread
from experiments import results
from lib import philox, program
from lib.device import machine
from lib.fused import masked_indices
from lib.stats import FEWEST, finite, t95
from run import checkpoint

DEFAULTS = {
    "ckpt": "out/pydocs",  # a masked model that is audited beside the joint; empty: the joint alone
    "data": "data/pydocs",  # a prepared folder; its val part is what the model is audited on
    "sequences": 64,  # how many blocks of it, evenly spaced; 3 or more
    "batch_size": 64,  # rows in one network call; 1 or more
}

BOUND = "any_order: weight L/k, k uniform"
WIDEST = 100  # percent above the bound that the plot shows; longer bars are cut off
# GPT-2's tokens have so many bytes on tiny Shakespeare, and on Wikipedia articles.
BYTES_A_TOKEN = 3.30, 4.45
BYTES = "nats per byte, by another text's bytes a token"
WHY = {  # the sentence that explains a rule, below the table
    BYTES: "A bound per token becomes one per byte by the bytes of the text that it was measured "
    "on. A constant from elsewhere is a factor: text of {:.2f} bytes a token divided by {:.2f} "
    "looks as much better as text of longer words would (shown per token).",
    "1/(1-t), t up to 0.999": "Right where t is the share that is visible; where it is the chance "
    "of a mask, what weighs most is what nothing is known about, and the number is that of the "
    "cut-off: it grows with the log of it without end.",
    "1/lambda, lambda up to 0.15": "The loss is lower because the task is easier: with at least "
    "85% visible, no term counts the tokens that come first, which are what a likelihood is about.",
    "1/lambda of the mean over masked": "The weight is taken twice: a mean over the masked tokens "
    "of a sequence has divided by their number already, so a_k is 1/k, and the sum is no 1.",
    "mean over masked, batch of 32": "A mean over all masked tokens of a batch counts a sequence "
    "by how much of it is masked, so that the hard terms, with little visible, count most.",
}


# ---- 1. The rules: a_k ---------------------------------------------------------------------------


def quadrature(low=0.0, high=1.0, n=400):
    """Nodes and weights (n + 1,) of an integral over [low, high], by the tanh-sinh rule.

    The function may be singular at either end.
    """
    x = torch.linspace(-3, 3, n + 1, dtype=torch.float64)  # (n + 1,)
    y = math.pi / 2 * x.sinh()
    share = 6 / n * math.pi / 2 * x.cosh() / (2 * y.cosh() ** 2)  # (n + 1,) sums to 1
    return low + (high - low) / (1 + (-2 * y).exp()), (high - low) * share


def binomial(L, m):
    """Probability that k = 0..L of L tokens are masked, each with m (T,): (T, L + 1)."""
    k, m = torch.arange(L + 1, dtype=torch.float64), m[:, None]  # (L + 1,), (T, 1)
    ways = math.lgamma(L + 1) - (k + 1).lgamma() - (L - k + 1).lgamma()  # (L + 1,) log L choose k
    return (ways + torch.xlogy(k, m) + torch.xlogy(L - k, 1 - m)).exp()


def weighted(L, m, weight, low=0.0, high=1.0):
    """a (L,): t uniform on [low, high], each token masked with m(t), its loss weight weight(t)."""
    t, dt = quadrature(low, high)  # (T,) each
    k = torch.arange(L + 1, dtype=torch.float64)
    return ((dt * weight(t) / (high - low)) @ binomial(L, m(t)) * k / L)[1:]


def mean_of_masked(L, m, batch):
    """a (L,) of the mean over all masked tokens of `batch` sequences, t uniform for each.

    A batch with nothing masked is skipped. A sequence with k masked counts k / (k + those masked in
    the others), and that is a sum of batch - 1 like it.
    """
    t, dt = quadrature()
    p = (dt @ binomial(L, m(t))).numpy()  # (L + 1,) of the number masked in a sequence
    others = np.ones(1)  # the same for the other sequences together
    for _ in range(batch - 1):
        others = np.convolve(others, p)
    k = np.arange(1, L + 1)  # (L,)
    share = others / (k[:, None] + np.arange(len(others)))  # (L, n)
    return torch.from_numpy(batch * p[1:] * k * share.sum(1) / (1 - p[0] ** batch))


def rules(L):
    """{name: (a (L,), what is added to sum a_k h_k)}: numbers in use, the four right ones first."""
    k = torch.arange(1, L + 1, dtype=torch.float64)
    uniform, cosine = lambda t: t, lambda t: diffusion.cosine(t)[0]
    slope = lambda schedule: lambda t: schedule(t)[1] / schedule(t)[0]  # noqa: E731
    t, dt = quadrature(1e-3, 1)  # RADD's official range of t; lam = 0.999 t, weight 1/t
    lam = 0.999 * t
    scalar = float((dt / 0.999 / t * lam * (lam / (1 - lam)).log()).sum())
    rows = {
        BOUND: torch.full((L,), 1 / L, dtype=torch.float64),
        "lambda_dce: 1/lambda": weighted(L, uniform, lambda t: 1 / t),
        "t_dce: m'/m, cosine masking": weighted(L, cosine, slope(diffusion.cosine)),
        "t_dse: m'/m, log-linear, softmax": weighted(L, uniform, slope(diffusion.loglinear)),
        "mean over masked, each sequence": mean_of_masked(L, uniform, 1),
        "mean over masked, batch of 32": mean_of_masked(L, uniform, 32),
        "constant weight 2": weighted(L, uniform, lambda t: 2 + 0 * t),
        "constant weight 1 (mean over all)": weighted(L, uniform, lambda t: 1 + 0 * t),
        "square root: 2 sqrt(L/k)": 2 * (k / L).sqrt() / L,
        "1/t, cosine masking": weighted(L, cosine, lambda t: 1 / t),
        "1/lambda, lambda from 0.001 (SMDM)": weighted(L, uniform, lambda t: 1 / t, 1e-3),
        "1/lambda, lambda in 0.3..0.8": weighted(L, uniform, lambda t: 1 / t, 0.3, 0.8),
        "t_dce with RADD's scalar": weighted(L, lambda t: 0.999 * t, lambda t: 1 / t, 1e-3),
        "half masked, mean over masked": mean_of_masked(L, lambda t: 0.5 + 0 * t, 32),
        "15% masked (BERT), mean over masked": mean_of_masked(L, lambda t: 0.15 + 0 * t, 32),
        "one at a time (pseudo-likelihood)": (k == 1).double(),
        BYTES: torch.full((L,), BYTES_A_TOKEN[0] / BYTES_A_TOKEN[1] / L, dtype=torch.float64),
        "1/(1-t), t up to 0.999": weighted(L, uniform, lambda t: 1 / (1 - t), 0, 0.999),
        "1/lambda, lambda up to 0.15": weighted(L, uniform, lambda t: 1 / t, 0, 0.15),
        "1/lambda of the mean over masked": 1 / k,
    }
    return {name: (a, scalar if "scalar" in name else 0.0) for name, a in rows.items()}


# ---- 2. The terms: h_k ---------------------------------------------------------------------------


def tiny_joint(V=3, L=4, seed=1):
    """p(x0) > 0 over [0, V)^L, float64: (V, ..., V)."""
    noise = np.random.default_rng(seed).normal(size=[V] * L)
    return np.exp(1.5 * noise) / np.exp(1.5 * noise).sum()


def exact_terms(joint):
    """h (L,): the mean over all masks of k of the entropy of a masked token given the visible."""
    L = joint.ndim
    h = torch.zeros(L, dtype=torch.float64)
    for k in range(1, L + 1):
        masks = list(itertools.combinations(range(L), k))
        for mask in masks:
            visible = joint.sum(mask, keepdims=True)  # p(visible)
            for i in mask:
                others = tuple(j for j in mask if j != i)
                both = joint.sum(others, keepdims=True)  # p(x0_i, visible)
                h[k - 1] += -(both * np.log(both / visible)).sum() / (k * len(masks))
    return h


def masks_of(L, number, seed):
    """For each k the L // k groups of k that a random permutation is cut into: (R, L), k (R,)."""
    turns = philox.uniforms(seed, number, range(L), L).argsort(1).argsort(1)  # (L, L)
    sizes = range(1, L + 1)
    masks = [turns[k - 1] // k == torch.arange(L // k)[:, None] for k in sizes]  # (L // k, L) each
    return torch.cat(masks), torch.tensor([k for k in sizes for _ in range(L // k)])


@torch.no_grad()
def measured_terms(model, blocks, seed, batch_size):
    """h (S, L), float64, of S blocks (L,), by one random partition of the positions for each k."""
    device, L = model.device, len(blocks[0])
    h = torch.zeros(len(blocks), L, dtype=torch.float64)
    for s, block in enumerate(tqdm(blocks, unit="block", disable=None, leave=False)):
        masks, k = masks_of(L, s, seed)  # (R, L), (R,)
        for mask, size in zip(masks.split(batch_size), k.split(batch_size), strict=True):
            x0, masked_idx = torch.from_numpy(block).expand(len(mask), L), masked_indices(mask)
            batch = (z.to(device) for z in (x0, mask, 1 / size, masked_idx))
            _, nats = diffusion.nelbo(model, *batch)  # (b,) the mean over the masked
            h[s].index_add_(0, size - 1, nats.double().cpu() / (L // size))
    return h


# ---- 3. The verdict ------------------------------------------------------------------------------


def verdict(difference, error):
    """Where a number stands to the bound: equal within its error, above it, or below."""
    return "equal" if abs(difference) <= error else "above" if difference > 0 else "**below**"


def audit(h, rules, tolerance=1e-10):
    """{rule: (number, half its interval, minus the bound, half of that, verdict)} of h (S, L)."""
    S, audited = len(h), {}
    bound = h @ rules[BOUND][0]  # (S,)
    for name, (a, extra) in rules.items():
        numbers = h @ a + extra  # (S,)
        pair = []
        for z in (numbers, numbers - bound):
            error = t95(S - 1) * float(z.std()) / math.sqrt(S) if S > 1 else 0.0
            pair += [float(z.mean()), max(error, tolerance)]
        audited[name] = (*pair, verdict(*pair[2:]))
    return audited


def model_terms(config):
    """h (S, L) of the checkpoint on held-out blocks."""
    device, autocast = machine(config)
    model, _, trained = checkpoint.load(config["ckpt"], device)
    exact = f"{config['ckpt']} is causal: its loss is exact, there is nothing to audit"
    require(not model.causal, exact)
    tokens, L = loader.Tokens(config["data"], "val"), model.block_size
    alike = trained["tokenizer"] in (None, tokens.meta["tokenizer"])
    alike = alike and tokens.vocab_size == model.vocab_size
    require(alike, f"{config['data']} has another tokenizer than {config['ckpt']}")
    short = f"{config['data']} val has {len(tokens)} tokens, less than {FEWEST} blocks of {L}"
    require(len(tokens) >= FEWEST * L, short)
    n = 4 if config["quick"] else config["sequences"]
    blocks = [tokens[start : start + L] for start in spread(range(0, len(tokens) // L * L, L), n)]
    with autocast():
        h = measured_terms(model, blocks, config["seed"], config["batch_size"])  # (S, L)
    return finite(h, "terms of the bound")


def rows_of(joint, model):
    """The table: one row a rule, from `audit` of the joint and of the model (or None)."""
    rows = []
    for name, (number, _, difference, _, where) in joint.items():
        row = {"what is reported": name, "joint": number}
        row |= {"minus the entropy": difference, "joint says": where}
        if model:
            number, half, difference, error, where = model[name]
            row |= {"model": f"{number:.4f} ± {half:.4f}"}
            row |= {"minus the bound": f"{difference:+.4f} ± {error:.4f}", "model says": where}
        rows.append(row)
    return rows


def draw(axes, figures):
    """Bars: how far each number is from the bound, in percent of it."""
    who, bound = "model", figures.get(f"model, {BOUND}")
    if not bound:
        who, bound = "joint", figures["entropy of the joint"]
    names = [key.removeprefix(f"{who}, ") for key in figures if key.startswith(f"{who}, ")]
    names = [name for name in names if not name.startswith("h_") and ", minus the" not in name]
    names = [name for name in names if not name.endswith(", half interval")]
    unit, bars, halves = bound / 100, {}, {}
    for name in names:
        off = figures.get(f"{who}, {name}, minus the bound", figures[f"{who}, {name}"] - bound)
        bars[name] = round(off / unit, 3) + 0.0
        halves[name] = figures.get(f"{who}, {name}, minus the bound, half interval", 0) / unit
    bars = {name: bars[name] for name in sorted(bars, key=lambda n: -bars[n])}
    shown = {name: min(value, WIDEST) for name, value in bars.items()}
    halves = {name: half for name, half in halves.items() if bars[name] <= WIDEST}
    results.bars(axes, shown, "{:+.2g}%", [n for n in bars if bars[n] < -0.01], halves)
    for label, value in zip(axes.texts, bars.values(), strict=True):
        if value > WIDEST:
            label.set_text(f"{value:+.0f}%, cut")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("percent above the bound (left of 0: no bound at all); 95% intervals")
    axes.set_title("Of the numbers that are reported as a loss, few are the bound")


PLOTS = {"": draw}


def figures_of(joint, model, h):
    """All numbers of the table, and some of h (L,), in one flat dict."""
    figures = {f"joint, {name}": number for name, (number, *_) in joint.items()}
    if model:
        parts = ["", ", half interval", ", minus the bound", ", minus the bound, half interval"]
        figures |= {
            f"model, {name}{part}": model[name][i] for name in model for i, part in enumerate(parts)
        }
        some = sorted({1, len(h) // 4, len(h) // 2, 3 * len(h) // 4, len(h)})
        figures |= {f"model, h_{k}": float(h[k - 1]) for k in some}
    return figures


def main(config):
    """Audit the joint and the checkpoint; write and return the figures."""
    began, joint, h, model, audited = time.time(), tiny_joint(), None, None, "left out"
    exact = audit(exact_terms(joint)[None], rules(joint.ndim))
    if config["ckpt"]:
        terms = model_terms(config)  # (S, L)
        model, h = audit(terms, rules(terms.shape[1])), terms.mean(0).numpy()
        audited = f"{config['ckpt']} on {len(terms)} blocks of {terms.shape[1]}, ± 95%"

    entropy = -(joint * np.log(joint)).sum() / joint.ndim
    title = f"The joint's entropy is {entropy:.6f} nats per token; the model: {audited}"
    formats = {"joint": "{:.6f}", "minus the entropy": "{:+.6f}"}
    text = results.table(title, rows_of(exact, model), formats) + "\n"
    for name, sentence in WHY.items():
        text += f"- **{name}**: {sentence.format(*BYTES_A_TOKEN)}\n"
    figures = {"entropy of the joint": entropy} | figures_of(exact, model, h)
    figures |= results.about(torch.device("cpu"))
    figures |= {key: config[key] for key in ("ckpt", "data", "sequences", "seed")}
    figures |= {"seconds": time.time() - began}
    results.write(config, "loss_audit", figures, text, PLOTS)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
