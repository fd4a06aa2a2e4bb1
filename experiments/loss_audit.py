"""The loss audit: which of the numbers that are called the loss of a masked diffusion model are likelihood bounds?

    python -m experiments.loss_audit           a joint that can be enumerated, and the model in out/pydocs
    python -m experiments.loss_audit --ckpt=   the enumeration alone

Every code for masked diffusion hides tokens, asks the network for them and adds up cross-entropies. The codes differ in how
many tokens they hide and in what a hidden token weighs, and nearly all of them print the exponential of the result and call
it perplexity. This file says what each of these numbers is.

One fact makes it simple. All of them hide positions without preference. So, whatever the rule, its expectation is

    sum over k = 1..L of  a_k h_k,      h_k = what a hidden token costs on average when k of L are hidden.

h_k belongs to the model and the text, a_k to the rule: a_k = E[weight * k, where k are hidden] / L. The chain rule says
which a is right. Along a random order the last token is guessed with one hidden, the one before it with two, the first with
all L, and these L costs add up to -log p(x0). So a_k = 1/L: the bound per token is the plain mean of h_1..h_L. With the true
conditionals it equals the entropy of the text, with any others it lies above it (RADD eq. 2.16, arXiv 2406.03736).

h_k grows with k, from h_1 (all other tokens are there to be looked at) to h_L (none is). Hence the ways to be wrong:

  - a leans to small k: below the entropy. On average no distribution over texts can cost less than the entropy, so such a
    number is no likelihood, its exponential no perplexity, and it compares with no autoregressive model's. BERT's 15% (arXiv
    1810.04805) and one token at a time (the pseudo-log-likelihood of arXiv 1910.14659) are of this kind: each token is told
    by the others, the others by it, and nobody pays for what they share.
  - a leans to large k: above. A constant weight, or the mean over all hidden tokens of a batch, counts a sequence the more
    the more of it is hidden. Still an upper bound, but a loose one, and looser for a model that makes more of its context.
  - a does not sum to 1: the unit is wrong. 1/t under cosine masking counts every token Si(pi/2) = 1.37 times, since t is not
    the chance of being hidden there and m'(t)/m(t) would be right; weight 1 counts it half.
  - a is right and the number noisy: a draw weighed by 1/lambda has an infinite variance (its square integrates like 1/lambda
    at 0), which is why codes cut lambda off, at 0.001 say, and pay a little for it. RADD's t_dce adds the log of a scalar
    whose integral over t vanishes while its standard deviation, pi/sqrt(3) = 1.81 nats a token and draw, does not; its range
    of t leaves out a thousandth of the integral, which is enough to be below the entropy. any_order needs neither.

Two things look wrong and are right. The mean over the hidden tokens of each *sequence*, with lambda uniform, is any_order:
where anything is hidden, k is uniform on 1..L, and the weight is 1/k. (Over a *batch* it is not: there a sequence counts by
how much of it is hidden.) And score entropy (t_dse) on a network with a softmax is t_dce.

Training may weigh as it likes: each of these is least at the true conditionals, where every h_k is. A constant weight is
what our demo trains with. It is the number that is reported which has to be the bound.

How it is computed. For the joint (V = 3, L = 4) h_k is a sum over all masks and all x0 in float64, and a_k a closed form or
an integral over t to 1e-12: no draws. For a model h_k is measured on held-out blocks: for each k a random permutation of
each block is cut into L // k groups of k, which are hidden in turn. All rules are read off the same h_k, so that their
differences are far sharper than the numbers themselves, whose 95% intervals are over blocks.
"""

import itertools
import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import config as settings
import diffusion
import likelihood
from config import require
from data import loader
from experiments import results

DEFAULTS = {
    "ckpt": "out/pydocs",  # a masked model that is audited beside the joint; empty: the joint alone
    "data": "data/pydocs",  # a prepared folder; its val part is what the model is audited on
    "sequences": 64,  # how many blocks of it, evenly spaced
    "batch_size": 64,  # rows in one network call
}

BOUND = "any_order: weight L/k, k uniform"


# ---- 1. The rules: a_k -----------------------------------------------------------------------------------------------


def quadrature(low=0.0, high=1.0, n=400):
    """Nodes and weights (n + 1,) of an integral over [low, high] that may be singular at its ends (tanh-sinh rule)."""
    x = torch.linspace(-3, 3, n + 1, dtype=torch.float64)  # (n + 1,)
    y = math.pi / 2 * x.sinh()
    share = 6 / n * math.pi / 2 * x.cosh() / (2 * y.cosh() ** 2)  # (n + 1,) sums to 1
    return low + (high - low) / (1 + (-2 * y).exp()), (high - low) * share


def binomial(L, chance):
    """Chance that k = 0..L of L tokens are hidden, each with `chance` (T,) -> (T, L + 1)."""
    k = torch.arange(L + 1, dtype=torch.float64)
    ways = math.lgamma(L + 1) - (k + 1).lgamma() - (L - k + 1).lgamma()  # (L + 1,) log of L choose k
    return (ways + torch.xlogy(k, chance[:, None]) + torch.xlogy(L - k, 1 - chance[:, None])).exp()


def weighted(L, chance, weight, low=0.0, high=1.0):
    """a (L,) of: t uniform on [low, high], each token hidden with chance(t), a hidden one weighs weight(t)."""
    t, dt = quadrature(low, high)  # (T,) each
    k = torch.arange(L + 1, dtype=torch.float64)
    return ((dt * weight(t) / (high - low)) @ binomial(L, chance(t)) * k / L)[1:]


def mean_of_hidden(L, chance, batch):
    """a (L,) of the mean over all hidden tokens of `batch` sequences, t uniform on [0, 1] for each; nothing hidden: skipped.

    A sequence with k hidden counts k / (k + what the others hide), and that is a sum of batch - 1 like it.
    """
    t, dt = quadrature()
    law = (dt @ binomial(L, chance(t))).numpy()  # (L + 1,)
    others = np.ones(1)  # law of the number hidden in the other sequences
    for _ in range(batch - 1):
        others = np.convolve(others, law)
    k = np.arange(1, L + 1)
    share = (others / (k[:, None] + np.arange(len(others)))).sum(1)  # (L,) E[1 / all hidden] for each k
    return torch.from_numpy(batch * law[1:] * k * share / (1 - law[0] ** batch))


def rules(L):
    """{name: (a (L,), what is added to sum a_k h_k)}: the numbers found in the wild, the four right ones first."""
    k = torch.arange(1, L + 1, dtype=torch.float64)
    uniform, cosine = lambda t: t, lambda t: diffusion.cosine(t)[0]
    slope = lambda schedule: lambda t: schedule(t)[1] / schedule(t)[0]  # noqa: E731
    t, dt = quadrature(1e-3, 1)  # RADD's official range of t; lam = 0.999 t, weight 1/t
    lam = 0.999 * t
    scalar = float((dt / 0.999 / t * lam * (lam / (1 - lam)).log()).sum())
    found = {
        BOUND: torch.full((L,), 1 / L, dtype=torch.float64),
        "lambda_dce: 1/lambda": weighted(L, uniform, lambda t: 1 / t),
        "t_dce: m'/m, cosine masking": weighted(L, cosine, slope(diffusion.cosine)),
        "t_dse: m'/m, log-linear, softmax": weighted(L, uniform, slope(diffusion.loglinear)),
        "mean over hidden, each sequence": mean_of_hidden(L, uniform, 1),
        "mean over hidden, batch of 32": mean_of_hidden(L, uniform, 32),
        "constant weight 2": weighted(L, uniform, lambda t: 2 + 0 * t),
        "constant weight 1 (mean over all)": weighted(L, uniform, lambda t: 1 + 0 * t),
        "square root: 2 sqrt(L/k)": 2 * (k / L).sqrt() / L,
        "1/t, cosine masking": weighted(L, cosine, lambda t: 1 / t),
        "1/lambda, lambda from 0.001 (SMDM)": weighted(L, uniform, lambda t: 1 / t, 1e-3),
        "1/lambda, lambda in 0.3..0.8": weighted(L, uniform, lambda t: 1 / t, 0.3, 0.8),
        "t_dce with RADD's scalar": weighted(L, lambda t: 0.999 * t, lambda t: 1 / t, 1e-3),
        "half hidden, mean over hidden": mean_of_hidden(L, lambda t: 0.5 + 0 * t, 32),
        "15% hidden (BERT), mean over hidden": mean_of_hidden(L, lambda t: 0.15 + 0 * t, 32),
        "one at a time (pseudo-likelihood)": (k == 1).double(),
    }
    return {name: (a, scalar if "scalar" in name else 0.0) for name, a in found.items()}


# ---- 2. The costs: h_k -----------------------------------------------------------------------------------------------


def tiny_joint(V=3, L=4, seed=1):
    """p(x0) > 0 over [0, V)^L, float64: (V, ..., V)."""
    noise = np.random.default_rng(seed).normal(size=[V] * L)
    return np.exp(1.5 * noise) / np.exp(1.5 * noise).sum()


def exact_costs(joint):
    """h (L,): the mean over all masks of k positions, and over these, of the entropy of a hidden token given the visible."""
    L = joint.ndim
    h = torch.zeros(L, dtype=torch.float64)
    for k in range(1, L + 1):
        masks = list(itertools.combinations(range(L), k))
        for hidden in masks:
            visible = joint.sum(hidden, keepdims=True)  # p(visible)
            for i in hidden:
                both = joint.sum(tuple(j for j in hidden if j != i), keepdims=True)  # p(x0_i, visible)
                h[k - 1] += -(both * np.log(both / visible)).sum() / (k * len(masks))
    return h


def masks_of(L, number, seed):
    """For each k the L // k groups of k that a random permutation is cut into: (R, L) bool, and k of each row (R,)."""
    rank = diffusion.uniforms(seed, number, range(L), L).argsort(1).argsort(1)  # (L, L)
    masks = [rank[k - 1] // k == torch.arange(L // k)[:, None] for k in range(1, L + 1)]  # (L // k, L) each
    return torch.cat(masks), torch.tensor([k for k in range(1, L + 1) for _ in range(L // k)])


@torch.no_grad()
def measured_costs(model, blocks, seed, batch_size, autocast):
    """h of each of S blocks (L,), by one random partition of its positions for each k: (S, L) float64, in nats."""
    device, L = next(model.parameters()).device, len(blocks[0])
    h = torch.zeros(len(blocks), L, dtype=torch.float64)
    for s, block in enumerate(tqdm(blocks, unit="block", leave=False)):
        masks, k = masks_of(L, s, seed)  # (R, L), (R,)
        for mask, size in zip(masks.split(batch_size), k.split(batch_size), strict=True):
            x0 = torch.from_numpy(block).expand(len(mask), L)  # (b, L)
            with autocast():
                arguments = (x0.to(device), mask.to(device), (1 / size).to(device), diffusion.hidden_rows(mask).to(device))
                _, nats = diffusion.nelbo(model, *arguments)  # (b,) the mean over the hidden
            h[s].index_add_(0, size - 1, nats.double().cpu() / (L // size))
    return h


# ---- 3. The verdict --------------------------------------------------------------------------------------------------


def verdict(difference, error):
    """Where a number stands to the bound: equal within its error, above it, or below."""
    return "equal" if abs(difference) <= error else "above" if difference > 0 else "**below**"


def audit(h, found, tolerance=1e-10):
    """{rule: (number, half its interval, minus the bound, half the interval of that, verdict)} of costs h (S, L)."""
    S, audited = len(h), {}
    bound = h @ found[BOUND][0]  # (S,)
    for name, (a, extra) in found.items():
        numbers = h @ a + extra  # (S,)
        pair = []
        for z in (numbers, numbers - bound):
            error = likelihood.t95(S - 1) * float(z.std()) / math.sqrt(S) if S > 1 else 0.0
            pair += [float(z.mean()), max(error, tolerance)]
        audited[name] = (*pair, verdict(*pair[2:]))
    return audited


def model_costs(config):
    """h (S, L) of the checkpoint on held-out blocks, or None where none is asked for."""
    if not config["ckpt"]:
        return None
    settings.at_least(1, config, "batch_size")
    settings.at_least(2, config, "sequences")
    device, autocast = settings.machine(config)
    model, _, trained = checkpoint.load(config["ckpt"], device)
    require(not trained["causal"], f"{config['ckpt']} is causal: its loss is exact, there is nothing to audit")
    tokens, L = loader.Tokens(config["data"], "val"), model.block_size
    known = trained["tokenizer"] in (None, tokens.meta["tokenizer"]) and tokens.vocab_size == model.vocab_size
    require(known, f"{config['data']} has another tokenizer than {config['ckpt']}")
    require(len(tokens) >= 2 * L, f"{config['data']} val has {len(tokens)} tokens, less than two blocks of {L}")
    starts = likelihood.spread(range(0, len(tokens) // L * L, L), 4 if config["quick"] else config["sequences"])
    blocks = [tokens[start : start + L] for start in starts]
    return measured_costs(model, blocks, config["seed"], config["batch_size"], autocast)


def rows_of(joint, model):
    """The table: one row a rule, from `audit` of the joint and of the model (or None)."""
    rows = []
    for name, (number, _, difference, _, where) in joint.items():
        row = {"what is reported": name, "joint": number, "minus the entropy": difference, "joint says": where}
        if model:
            number, half, difference, error, where = model[name]
            row |= {"model": f"{number:.4f} ± {half:.4f}", "minus the bound": f"{difference:+.4f} ± {error:.4f}"}
            row |= {"model says": where}
        rows.append(row)
    return rows


def draw(axes, joint, model, h):
    """Bars: how far each number is from the bound, in percent of it, for the joint and the model, with h_k in a corner."""
    shown = [(joint, "enumerated joint, L = 4", "#9aa5b1"), (model, "trained model", "#1f6f8b")]
    last = model or joint
    names = sorted(last, key=lambda name: last[name][2])
    place = np.arange(len(names))
    for i, (audited, label, color) in enumerate(shown):
        if audited:
            values, errors = (np.array([audited[name][j] for name in names]) / audited[BOUND][0] * 100 for j in (2, 3))
            axes.barh(place + 0.2 - 0.4 * i, values, 0.4, xerr=errors, label=label, color=color, error_kw={"elinewidth": 1})
    for y, (name, value, error) in enumerate(zip(names, values, errors, strict=True)):  # of the last one shown
        text = "the bound" if name == BOUND else "=" if last[name][-1] == "equal" else f"{value:+.2g}%"
        side = 1 if value >= -1e-6 else -1
        axes.annotate(text, (value + side * error, y - 0.2 * bool(model)), xytext=(4 * side, 0), textcoords="offset points",
                      ha="left" if side > 0 else "right", va="center", fontsize=7)  # fmt: skip
    axes.set_yticks(place, names, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    low, high = axes.get_xlim()
    low, high = 1.15 * low, 1.15 * high
    axes.axvspan(low, 0, color="#c0392b", alpha=0.08, linewidth=0)
    axes.set_xlim(low, high)
    axes.text(-0.02 * (high - low), 0.97, "below: not a bound", color="#c0392b", ha="right", va="top", fontsize=9,
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xlabel("percent above the bound")
    axes.legend(loc="lower right", fontsize=8)
    if model:
        inset = axes.inset_axes([0.09, 0.6, 0.27, 0.27])
        inset.plot(np.arange(1, len(h) + 1), h, color="#1f6f8b")
        inset.axhline(h.mean(), color="black", linewidth=0.8, linestyle=":")
        inset.set_title("$h_k$ of the model; dotted: their mean, the bound", fontsize=7)
        inset.set_xlabel("hidden tokens $k$", fontsize=7, labelpad=1)
        inset.tick_params(labelsize=6)


def figures_of(joint, model, h):
    """All numbers of the table, and some of h (L,), in one flat dict."""
    figures = {f"joint, {name}": number for name, (number, *_) in joint.items()}
    if model:
        parts = ["", ", half interval", ", minus the bound", ", minus the bound, half interval"]
        figures |= {f"model, {name}{part}": model[name][i] for name in model for i, part in enumerate(parts)}
        figures |= {f"model, h_{k}": float(h[k - 1]) for k in sorted({1, len(h) // 4, len(h) // 2, 3 * len(h) // 4, len(h)})}
    return figures


def main(config):
    """Audits the joint and the checkpoint; writes and returns the figures."""
    began = time.time()
    joint, costs = tiny_joint(), model_costs(config)  # (V, ..., V), and (S, L) or None
    exact = audit(exact_costs(joint)[None], rules(joint.ndim))
    model = None if costs is None else audit(costs, rules(costs.shape[1]))
    h = None if costs is None else costs.mean(0).numpy()  # (L,)

    entropy = -(joint * np.log(joint)).sum() / joint.ndim
    said = f"{config['ckpt']} on {len(costs)} blocks of {costs.shape[1]}, ± 95%" if model else "left out"
    title = f"The joint's entropy is {entropy:.6f} nats per token; the model: {said}"
    text = results.table(title, rows_of(exact, model), {"joint": "{:.6f}", "minus the entropy": "{:+.6f}"})
    print(text)
    figures = {"entropy of the joint": entropy} | figures_of(exact, model, h) | results.about(torch.device("cpu"))
    figures |= {key: config[key] for key in ("ckpt", "data", "sequences", "seed")} | {"seconds": time.time() - began}
    results.write(config, "loss_audit", figures, text, lambda axes: draw(axes, exact, model, h))
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
