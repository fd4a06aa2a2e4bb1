"""Absorbing-state (masked) diffusion: the whole method except the network. Read this first.

- Corrupt: replace each token of a clean text x0 by `mask_id`, independently, with probability m(t),
  which grows from 0 at time t = 0 to 1 at t = 1. A masked token stays masked: "mask" absorbs.
- Learn: a network predicts p(x0_i | unmasked tokens) at masked positions i, for any set of them.
- Sample: start at t = 1 with only masks, go back to t = 0, and draw tokens from the network.

    one sentence      t = 1      _     _     _     _   _      0 network calls so far
    on its way back   t = 0.6    _     sat   _     _   _      1 call: one position was unmasked
                      t = 0.3    _     sat   on    the _      2 calls: "on" and "the" independently
                      t = 0      cats  sat   on    the mat    3 calls

Why it works. In a short time dt, a visible token is masked with probability m'/(1 - m) dt: the
visible share is 1 - m, and it shrinks by m' dt. Let y be x with its masked position i unmasked to
v. By Bayes' rule, x was y a time dt ago with probability m'/(1 - m) dt * p_t(y)/p_t(x), as in
RADD eq. 2.10. So going back requires only these ratios, the *concrete score*. With k masked and
L - k visible tokens, p_t(x) = m^k (1 - m)^(L-k) p(visible tokens), so

    p_t(x with masked i := v) / p_t(x)  =  (1 - m)/m * p(visible, x0_i = v) / p(visible)
                                        =  (1 - m)/m * p(x0_i = v | visible)

a factor that depends only on time, times a conditional of clean text that does not: RADD (arXiv
2406.03736) Theorem 1, RADD eq. 3.2, 3.3. (The papers write m = 1 - exp(-sigma_bar), where sigma_bar
is the total noise up to t; the factor is then exp(-sigma_bar) / (1 - exp(-sigma_bar)).) Times the
rate m'/(1 - m) above, this is the rate of the reverse process: a masked token is unmasked at the
rate m'/m, whatever the network says, and becomes v with probability p(x0_i = v | visible). Hence
the network needs no time input. It fills any gap, because it is trained on any visible set. And the
conditionals are learnt by cross-entropy (CE), with the weights of part 2 a bound on -log p(x0).
"""

import math
from typing import NamedTuple

import torch

from config import Table, require
from lib import fused, philox
from lib.entries import check_ids, check_objective, check_order, check_schedule

DEFAULTS = {
    "schedule": "loglinear",  # one of SCHEDULES; any_order, lambda_dce and ar train without one
}


# ---- 1. A schedule: m(t), the probability that a token is masked at time t, and its slope m'(t) --
def loglinear(t, eps=0.0):
    """m = (1 - eps) t: sigma_bar = -log(1 - (1 - eps) t). RADD trained with eps = 1e-3; here 0."""
    return (1 - eps) * t, (1 - eps) * torch.ones_like(t)


def cosine(t):
    """m = cos(pi/2 (1 - t)) = sin(pi/2 t). It is above t, so sampling unmasks slowly at first."""
    return torch.sin(math.pi / 2 * t), math.pi / 2 * torch.cos(math.pi / 2 * t)


def geometric(t, sigma_min=1e-4, sigma_max=20.0):
    """sigma_bar = sigma_min^(1-t) sigma_max^t. m starts at 1e-4, so t_dce omits lower rates."""
    sigma_bar = sigma_min ** (1 - t) * sigma_max**t
    slope = sigma_bar * math.log(sigma_max / sigma_min)  # sigma, the slope of sigma_bar
    return -torch.expm1(-sigma_bar), slope * torch.exp(-sigma_bar)


SCHEDULES = Table(
    "schedule", check_schedule, loglinear=loglinear, cosine=cosine, geometric=geometric
)


# ---- 2. Objectives are data: which positions are masked, and the loss weight of a masked token ---
class Objective(NamedTuple):
    draw: object  # (u (B,), noise (B, L), n (B,), schedule) -> (mask (B, L) bool, weight (B,))
    normalised: bool = True  # False: the output is a score, not log-probabilities
    attention: tuple = ("full",)  # the kinds that it trains

    @property
    def causal(self):  # the baseline: nothing is masked
        return self.attention == ("causal",)


def any_order(u, noise, n, schedule):
    """Mask exactly k of n, k uniform on 1..n, weight n/k. RADD eq. 2.16, G.3 (any-order AR)."""
    k = (1 + (u * n).floor()).clamp(max=n)  # (B,)
    return noise <= fused.kth_smallest(noise, k.long()), n / k  # the k of least noise


def lambda_dce(u, noise, n, schedule):
    """Mask with probability lam = u, weight 1/lam: denoising CE (DCE). RADD eq. 3.6, 3.8."""
    return noise < u[:, None], 1 / u


def t_dce(u, noise, n, schedule):
    """Mask with probability m(t), t = u, weight m'(t)/m(t). RADD eq. 3.5, 2.11 (DSE)."""
    m, dm = schedule(u)  # (B,) each
    return noise < m[:, None], dm / m


OBJECTIVES = Table(
    "objective",
    check_objective,  # at an entry's first use: its weights must give the bound
    any_order=Objective(any_order, attention=("full", "order")),
    lambda_dce=Objective(lambda_dce),
    t_dce=Objective(t_dce),
    t_dse=Objective(t_dce, normalised=False),
    ar=Objective(None, attention=("causal",)),  # nothing is masked: the baseline
)

# Why any_order is a bound. Along one order, -log p is a sum of L terms: each token's CE given those
# before it. In a random order with k tokens still masked, the next is any of them, so its expected
# CE is h_k, the mean CE of k masked tokens, and the bound is h_1 + ... + h_L. A draw picks one of L
# values of k, so h_k counts L times: L h_k = L/k * (sum of the k CEs). By hand: README.
#
# Why all objectives are this bound, RADD eq. 3.7. Mask each token with probability lam ~ U(0, 1).
# Then k is uniform on 0..L, 1/(L + 1) each; given k, lam ~ Beta(k + 1, L - k + 1) and 1/lam has
# mean (L + 1)/k. So k contributes 1/(L + 1) * (L + 1)/k * k h_k = h_k again. A schedule only
# substitutes lam = m(t), d lam/lam = m'(t)/m(t) dt. t_dse (denoising score entropy, SEDD's loss) is
# the same if its scores sum to 1, as in t_dce. any_order has the least noise: k fixes its weight.
#
# What is bounded: -log p(x0), where p is the mean over orders of the chain rule's product, as drawn
# by the sampler any_order. The bound averages log p; the log of an average is larger (Jensen)
# unless all orders agree, as with true conditionals. Averaging p is tighter: evaluate.py, `orders`.
#
# What other weights do. L times each sequence's mean masked CE is right only if k is uniform on
# 1..L: with lam, an empty mask counts as 0, which gives L/(L + 1) of the bound. One mean over all
# masked tokens of a batch weights a sequence by its k: L sum_k k h_k / sum_k k. Another weight or
# distribution of k (see train.py) keeps the optimum but gives no bound: experiments/loss_audit.py.


def draw_mask(objective, u, noise, schedule=loglinear, prompt=None):
    """(mask (B, L) bool, weight (B,)) from uniform u (B,) in (0, 1] and noise (B, L) in [0, 1).

    E[sum over masked i of weight * CE_i] >= -log p(x0), in nats. The first `prompt` (B,) tokens,
    fewer than L, are never masked: then -log p(rest | prompt). On the CPU. UserError for `ar`.
    """
    B, L = noise.shape
    prompt = torch.zeros(B, dtype=torch.long) if prompt is None else prompt  # (B,)
    noise = noise.masked_fill(torch.arange(L) < prompt[:, None], torch.inf)  # (B, L)
    kind, m = OBJECTIVES[objective], schedule if callable(schedule) else SCHEDULES[schedule]
    require(kind.draw, f"objective '{objective}' masks nothing: its loss is ar_nll")
    mask, weight = kind.draw(u, noise, L - prompt, m)  # (B, L), (B,)
    return mask & noise.isfinite(), weight


# Only for attention=order (model.py, part 3), which is trained on orders instead of masks.
ORDERS = Table(  # noise, place (B, L), coin (B, 1) in [0, 1) and order_p -> (B, L) sort keys
    "order",
    check_order,
    uniform=lambda noise, place, coin, p: noise,
    left_to_right=lambda noise, place, coin, p: place,
    right_to_left=lambda noise, place, coin, p: -place,
    mixture=lambda noise, place, coin, p: torch.where(coin < p, place, noise),
    local=lambda noise, place, coin, p: place + p * noise,
)


def draw_order(name, noise, coin, p=None, prompt=None):
    """order (B, L) from noise (B, L), coin (B, 1) in [0, 1), order_p; prompts (B,) come first."""
    L = noise.shape[1]
    place = (torch.arange(L) / L).expand(noise.shape)  # (B, L)
    key = ORDERS[name](noise, place, coin, p)  # (B, L)
    if prompt is not None:
        key = key.masked_fill(torch.arange(L) < prompt[:, None], -torch.inf)
    return key.argsort(dim=1, stable=True)


# ---- 3. Low-variance draws, the same for any number of processes ---------------------------------
def stratified(jitter, rows, batch_size):
    """u (B,) for draw_mask: one in each of batch_size strata of (0, 1), in antithetic pairs.

    rows (B,) are indices into the global batch. Rows 2j and 2j + 1 form a pair (u, 1 - u) and have
    the same jitter in [0, 1). Row i always draws from the same stratum, so data must be shuffled.
    """
    u = (rows // 2 + 1 - jitter) / batch_size  # (B,) in (0, 1/2 + 1/(2 batch_size)]
    return torch.where(rows % 2 == 1, 1 - u, u)


def stratified_uniforms(seed, step, rows, batch_size, L):
    """(u (B,), noise (B, L)) for draw_mask, for `rows` (B,) of the global batch at `step`."""
    rows = torch.as_tensor(rows)  # (B,)
    pair = batch_size + rows // 2  # (B,) counters past those of the rows
    u = stratified(philox.uniforms(seed, step, pair, 1).squeeze(1), rows, batch_size)  # (B,)
    return u, philox.uniforms(seed, step, rows, L)


# ---- 4. The bound: one weighted cross-entropy ----------------------------------------------------
def plain_cross_entropy(model, h, target, weight, normalised=True):
    """The specification, only used in checks: h (N, D) -> (loss, terms (N,), CE (N,)), in nats.

    Only loss = sum(weight * terms) has a gradient. Terms are CE, or for t_dse (normalised=False;
    SEDD, arXiv 2310.16834, RADD eq. 2.11) -logit[target] + sum_v e^logit_v - 1 >= CE: there e^logit
    is a score without its factor (1 - m)/m, which is in the weight, and need not sum to 1.
    """
    logits = model.head(h).to(fused.wide(h.dtype))  # (N, V)
    at_target = logits.gather(-1, target[:, None]).squeeze(-1)  # (N,)
    ce = logits.logsumexp(-1) - at_target  # (N,)
    terms = ce if normalised else logits.exp().sum(-1) - 1 - at_target  # (N,)
    return (weight * terms).sum(), terms.detach(), ce.detach()


def cross_entropy(model, h, target, weight, normalised=True):
    """The same value and gradient in chunks, so that the (N, V) logits are never stored."""
    head, row_loss = model.head_parameters(), model.row_loss
    return fused.cross_entropy(h, head, target, weight, normalised, row_loss=row_loss)


def nelbo(model, x0, mask, weight, masked_idx=None, normalised=True, bound_weight=None):
    """The loss: weight * cross-entropy, summed over masked positions. Its mean bounds -log p(x0).

    NELBO: negative evidence lower bound. x0 (B, L), mask (B, L) bool, weight (B,) or (B, L) ->
    (loss, nats): a scalar summed over the batch, and the same per sequence (B,), without gradient.
    masked_idx (N,): flat indices of the positions that count, padded with some of weight 0 (by
    fused.masked_indices on the CPU: no GPU waits for N). bound_weight: nats are bound_weight * CE.
    """
    check_ids(model, "x0", x0, mask, causal=False)
    masked_idx = fused.masked_indices(mask) if masked_idx is None else masked_idx  # (N,)
    x = torch.where(mask, model.mask_id, x0)  # (B, L)
    h = model.hidden(x, masked_idx)  # (N, D)
    target, w = x0.flatten()[masked_idx], at_masked(weight, mask, masked_idx).to(h)  # (N,) each
    loss, terms, ce = cross_entropy(model, h, target, w, normalised)
    nats = w * terms  # (N,)
    if bound_weight is not None:  # the bound is on the softmax: CE, for t_dse too
        nats = at_masked(bound_weight, mask, masked_idx).to(h) * ce  # (N,)
    return loss, fused.summed(nats, masked_idx, x0)


def at_masked(weight, mask, masked_idx):
    """The weight (B,) or (B, L) at the flat positions masked_idx (N,), 0 at unmasked ones: (N,)."""
    return (weight.view(len(mask), -1) * mask).flatten()[masked_idx]


def ar_nll(model, x0, mask=None, weight=None, masked_idx=None):
    """Exact -log p(x0) of a causal network, the baseline. Like nelbo; no mask: all tokens count."""
    check_ids(model, "x0", x0, mask, causal=True)
    x = torch.nn.functional.pad(x0[:, :-1], (1, 0), value=model.start_id)  # (B, L) shifted
    if mask is None:
        loss, terms = of_all(model, model.hidden(x).flatten(0, 1), x0)
        return loss, terms.sum(1)
    masked_idx = fused.masked_indices(mask) if masked_idx is None else masked_idx  # (N,)
    h = model.hidden(x, masked_idx)  # (N, D)
    w = at_masked(weight, mask, masked_idx).to(h)  # (N,)
    loss, ce, _ = cross_entropy(model, h, x0.flatten()[masked_idx], w)
    return loss, fused.summed(w * ce, masked_idx, x0)


def order_nll(model, x0, order, weight=None):
    """Exact -log p(x0) along an order, for an `order` network: (loss, its L terms (B, L)).

    order[b, k] (B, L) is the position unmasked k-th, terms[b, k] its CE times weight (B, L) or 1,
    no gradient. Their sum, averaged over uniform orders, is the any_order bound: no k is drawn.
    """
    check_ids(model, "x0", x0, order=order)
    target = x0.gather(1, order)  # (B, L) in the order in which they are unmasked
    clean = torch.nn.functional.pad(target[:, :-1], (1, 0), value=model.mask_id)  # (B, L)
    positions = torch.cat([order.new_zeros(len(order), 1), order[:, :-1], order], dim=1)  # (B, 2L)
    h = model.hidden_in_order(clean, positions).flatten(0, 1)  # (B*L, D)
    return of_all(model, h, target, weight)


def of_all(model, h, target, weight=None):
    """(loss, terms (B, L)) for all tokens of target (B, L), from h (B*L, D); weight (B, L) or 1."""
    w = h.new_ones(len(h)) if weight is None else weight.flatten().to(h.dtype)  # (B*L,)
    loss, ce, _ = cross_entropy(model, h, target.flatten(), w)
    return loss, (w * ce).view(target.shape)


class Loss(torch.nn.Module):
    """The training loss: the arguments of nelbo, ar_nll or order_nll -> (loss, nats (B,))."""

    def __init__(self, model, objective):
        super().__init__()
        self.model, self.objective = model, OBJECTIVES[objective]

    def forward(self, x0, mask=None, weight=None, masked_idx=None, order=None, bound_weight=None):
        model, normalised = self.model, self.objective.normalised
        if order is not None:
            loss, terms = order_nll(model, x0, order, weight)
            return loss, terms.sum(1)
        if self.objective.causal:
            return ar_nll(model, x0, mask, weight, masked_idx)
        return nelbo(model, x0, mask, weight, masked_idx, normalised, bound_weight)


# ---- 5. Guidance ---------------------------------------------------------------------------------
def states(model, x, masked_idx, cond, cfg_scale=0.0):
    """hs for `guided`: [h (N, D)] of x (B, L); with guidance also of x with cond (B, L) masked."""
    if cfg_scale == 0:
        return [model.hidden(x, masked_idx)]
    both = torch.cat([x, x.masked_fill(cond, model.mask_id)])  # (2B, L) both as one batch
    return model.hidden(both, torch.cat([masked_idx, masked_idx + x.numel()])).chunk(2)


def guided(model, hs, cfg_scale=0.0):
    """Logits (N, V) guided by the condition, from the hs of `states` or from a slice of each.

    Unsupervised classifier-free guidance (SMDM, arXiv 2410.18514): u + (1 + cfg_scale) * (c - u)
    favours what the condition makes more likely. c are the network's logits; u are those with the
    condition masked too, which need no fine-tuning. cfg_scale 0 gives c, -1 gives u.
    """
    if cfg_scale == 0:
        return model.head(hs[0]).float()  # (N, V)
    c, u = model.head(torch.cat(hs)).float().chunk(2)  # (N, V) each
    return u + (1 + cfg_scale) * (c - u)
