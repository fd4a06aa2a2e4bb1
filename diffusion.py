"""Absorbing-state (masked) diffusion: everything the method needs beyond a network. Read this file first.

A clean sequence x0 is corrupted by hiding each token, independently, with a chance m(t) that grows from 0 at t = 0 to 1 at
t = 1. A hidden token shows as `mask_id` and stays hidden. A network learns p(x0_i | visible tokens) at every hidden i; the
reversed process then starts from all masks and reveals tokens, drawing each from that conditional.

The reversed process is driven by the *concrete score*, the ratios p_t(y)/p_t(x) between x and every y that differs from it
by one revealed token. RADD (arXiv 2406.03736, Theorem 1) shows that this ratio is an analytic scalar of time times a
conditional of clean data: `concrete_score` below. Three things follow, and they are the whole repository:

  a network without time     model.py reads tokens only                        (section 3.1 of the paper)
  an exact likelihood bound  is a weighted cross-entropy: `draw_mask`, `nelbo`   (section 3.3)
  a cached sampler           calls the network only when a token was revealed: `reveal_chance`, `expected_nfe` (section 3.2)

All likelihoods are in nats.
"""

import math

import numpy as np
import torch

# ---- 1. A schedule is m(t), the chance that a token is hidden at time t, and its slope -------------------------------


def loglinear(t, eps=0.0):
    """m = (1 - eps) t, so sigma_bar = -log(1 - (1 - eps) t). RADD and SEDD trained with eps = 1e-3; ours is 0."""
    return (1 - eps) * t, (1 - eps) * torch.ones_like(t)


def cosine(t):
    """m = sin(pi t / 2): hides tokens sooner than log-linear, so sampling reveals slowly at first."""
    angle = math.pi / 2 * t
    return angle.sin(), math.pi / 2 * angle.cos()


def geometric(t, sigma_min=1e-4, sigma_max=20.0):
    """m = 1 - exp(-sigma_bar), sigma_bar = sigma_min^(1-t) sigma_max^t. Runs from 1e-4 to 1 - 2e-9, not from 0 to 1."""
    sigma_bar = sigma_min ** (1 - t) * sigma_max**t
    return -torch.expm1(-sigma_bar), sigma_bar * math.log(sigma_max / sigma_min) * torch.exp(-sigma_bar)


SCHEDULES = {"loglinear": loglinear, "cosine": cosine, "geometric": geometric}

DEFAULTS = {
    "schedule": "loglinear",  # loglinear | cosine | geometric; any_order, lambda_dce and ar have no use for it in training
}


# ---- 2. The concrete score: analytic in time, a clean conditional in data --------------------------------------------


def concrete_score(log_p, m):
    """p_t(x with hidden i := v) / p_t(x) = e^-sb / (1 - e^-sb) * p(x0_i = v | visible of x), with 1 - e^-sb = m.

    log_p (..., V), m broadcastable -> (..., V). RADD Theorem 1 (eq. 3.2), arXiv 2406.03736.
    """
    return (1 - m) / m * log_p.exp()


def score_entropy(log_score, x0, m, dm):
    """Denoising score entropy of hidden positions, in nats: RADD eq. 2.11 (SEDD, arXiv 2310.16834).

    log_score (..., V) of a network whose output need not be normalised, x0 (...) -> (...). With score = (1 - m)/m e^logit
    it equals dm/m * (-logit[x0] + sum_v e^logit_v - 1); where the logits are log-probabilities the sum is 1 and what is left
    is the weighted cross-entropy that `nelbo` computes: that is all the difference between t_dse and t_dce.
    """
    ratio = (1 - m) / m  # the true score: `ratio` at the clean token, 0 elsewhere
    at_x0 = log_score.gather(-1, x0[..., None]).squeeze(-1)
    rate = dm / (1 - m)  # sigma'(t)
    return rate * (log_score.exp().sum(-1) - ratio * at_x0 + ratio * (ratio.log() - 1))


# ---- 3. Objectives are data: which positions are hidden, and what a hidden token weighs ------------------------------

OBJECTIVES = ["any_order", "lambda_dce", "t_dce", "t_dse", "ar"]


def draw_mask(objective, u, noise, schedule=loglinear, prompt=None):
    """One draw of the corruption: (mask (B, L) bool, weight (B,)), from uniform u (B,) in (0, 1] and noise (B, L) in [0, 1).

    The expectation over u and noise of sum_i weight * CE_i over hidden i bounds -log p(x0) from above, and is the same
    number for each of (RADD eq. 3.7):
      any_order   exactly k hidden, k uniform on 1..L, weight L/k            eq. 2.16
      lambda_dce  each hidden with chance lam = u, weight 1/lam              eq. 3.6
      t_dce, t_dse  each hidden with chance m(t), t = u, weight m'(t)/m(t)   eq. 3.5, 2.11
    A weight that is not the slope over the chance gives a number that is not a bound.

    The first `prompt` (B,) tokens of a row, fewer than L, are given: they are never hidden, L above is the number of those
    that follow, and what is bounded is -log p(those that follow | prompt).
    """
    n = noise.shape[1]  # that may be hidden: L, or (B,) what the prompts leave of it
    if prompt is not None:
        noise = noise.masked_fill(torch.arange(n) < prompt[:, None], torch.inf)  # (B, L)
        n = n - prompt
    if objective == "any_order":
        k = (1 + (u * n).floor()).clamp(max=n)  # (B,)
        kth = torch.from_numpy(np.sort(noise.numpy())).gather(1, k.long()[:, None] - 1)  # (B, 1); torch.sort is far slower
        return noise <= kth, n / k  # exactly k: the noise has no ties
    m, dm = loglinear(u) if objective == "lambda_dce" else schedule(u)  # (B,), (B,)
    return noise < m[:, None], dm / m


def stratified(jitter, position, batch_size):
    """Low-variance u for draw_mask: one in each of batch_size equal strata of (0, 1), in antithetic pairs (u, 1 - u).

    position (B,) counts in the whole (global) batch; 2j and 2j + 1 are a pair and must bring the same jitter in [0, 1).
    Together they cover (0, 1) evenly, so a batch mean is unbiased; a position always has its own stratum, so data must come
    to positions at random. For any_order a pair is (k, L + 1 - k): it hides L + 1 tokens, so a batch hides exactly
    B (L + 1) / 2 and the head works on a static number of rows.
    """
    u = (position // 2 + 1 - jitter) / batch_size  # (B,) in (0, 1/2 + 1/(2 batch_size)]
    return torch.where(position % 2 == 1, 1 - u, u)


def uniforms(seed, step, position, n):
    """(B, n) uniform numbers in [0, 1), float64: row b is a pure function of (seed, step, position[b]).

    A counter-based generator (Philox) jumps to any row, so every process draws its own rows of the global batch, and a
    resumed run draws what it would have drawn. One generator is moved from row to row: to make one takes longer.
    """
    source = np.random.Philox(key=[seed, 0])
    numbers, state, out = np.random.Generator(source), source.state, np.empty((len(position), n))  # (B, n)
    for row, p in zip(out, position, strict=True):
        state["state"]["counter"][2:] = int(p), step
        source.state = state
        numbers.random(out=row)
    return torch.from_numpy(out)


def training_mask(objective, seed, step, position, batch_size, L, schedule=loglinear, prompt=None):
    """draw_mask for rows `position` of a global batch, stratified over the batch: the same for any number of processes."""
    position = torch.as_tensor(position)  # (B,)
    jitter = uniforms(seed, step, batch_size + position // 2, 1).squeeze(1)  # (B,) counters past the batch's own rows
    noise = uniforms(seed, step, position, L)  # (B, L)
    return draw_mask(objective, stratified(jitter, position, batch_size), noise, schedule, prompt)


# ---- 4. The bound: one weighted cross-entropy ------------------------------------------------------------------------


def nelbo(model, x0, mask, weight, rows=None, normalised=True):
    """The loss: weight * cross-entropy, summed over hidden positions. An upper bound on -log p(x0) in expectation.

    x0 (B, L), mask (B, L) bool, weight (B,) -> (loss, nats): loss a scalar, the sum over the batch, to be differentiated;
    nats (B,) the same by sequence, without a gradient. `rows` may bring hidden_rows(mask), computed ahead.
    normalised=False is score entropy (t_dse) on e^logit as it is: CE becomes -logit[x0] + sum_v e^logit_v - 1.
    A weight (B, L) may leave hidden positions out, which `rows` then need not hold.
    """
    x = torch.where(mask, model.mask_id, x0)  # (B, L)
    return weighted_ce(model, x, x0, mask, weight, rows, normalised)


def ar_nll(model, x0, mask=None, weight=None, rows=None):
    """Exact -log p(x0), left to right, of a causal network: the baseline. x0 (B, L) -> (loss, nats (B,)) as in nelbo.

    The network reads the sequence shifted by one, behind a start token. `mask` tells which tokens count; without it, all.
    """
    B, L = x0.shape
    x = torch.cat([x0.new_full((B, 1), model.start_id), x0[:, :-1]], dim=1)  # (B, L)
    if mask is not None:
        return weighted_ce(model, x, x0, mask, weight, rows)
    h = model.hidden(x).flatten(0, 1)  # (B*L, D)
    loss, ce = model.head_loss(h, x0.flatten(), h.new_ones(B * L))
    return loss, ce.view(B, L).sum(1)


def weighted_ce(model, x, x0, mask, weight, rows=None, normalised=True):
    """weight * cross-entropy of x0 given x, summed over mask: (loss, nats (B,)).

    Only these positions count, so only their rows pass the head, a chunk at a time (model.head_loss).
    """
    B, L = x0.shape
    rows = hidden_rows(mask) if rows is None else rows  # (N,)
    h = model.hidden(x, rows)  # (N, D)
    row_weight = (weight.view(B, -1) * mask).flatten()[rows].to(h.device, h.dtype)  # (N,)
    loss, ce = model.head_loss(h, x0.flatten()[rows], row_weight, normalised)
    return loss, ce.new_zeros(B).index_add(0, rows // L, row_weight * ce)


def hidden_rows(mask, multiple=1):
    """Flat indices of hidden positions, (N,). N is rounded up to a multiple with visible rows, which weigh nothing.

    Few distinct N mean few compiled programs; computed where the mask is drawn, it costs the accelerator no wait.
    """
    flat = mask.flatten()
    n = -(-int(flat.sum()) // multiple) * multiple
    return (~flat).to(torch.uint8).argsort(stable=True)[:n]


class Loss(torch.nn.Module):
    """What training differentiates, as a module: (x0, mask, weight, rows), or (x0,) for all of ar, -> (loss, nats)."""

    def __init__(self, model, objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x0, mask=None, weight=None, rows=None):
        if self.objective == "ar":
            return ar_nll(self.model, x0, mask, weight, rows)
        return nelbo(self.model, x0, mask, weight, rows, normalised=self.objective != "t_dse")


# ---- 5. Reveal times: when the reversed process reveals a position, drawn before the network is asked ----------------


def reveal_chance(schedule, t, s, sampler="ancestral"):
    """Chance that a token hidden at time t is revealed by the step to s < t: (...) from t, s (...), in float64.

    ancestral (tau-leaping = Tweedie for this process): 1 - m(s)/m(t), exact (eq. D.14).
    euler: the first-order rate (t - s) m'(t)/m(t), at most 1 (eq. D.15). Equal for log-linear: (t - s)/t (eq. D.16).
    """
    m, dm = schedule(t)
    return 1 - schedule(s)[0] / m if sampler == "ancestral" else ((t - s) * dm / m).clamp(max=1.0)


def reveal_law(schedule, steps, sampler="ancestral"):
    """r (steps,): the chance that a position is revealed at step k of `steps` equal steps from t = 1 to 0 (sums to 1).

    It depends on nothing but time, so a position's step can be drawn before the first network call. The last step reveals
    all that is left, also where the schedule does not end at 0 or the Euler rate falls short.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)  # (steps + 1,)
    p = reveal_chance(schedule, t[:-1], t[1:], sampler)  # (steps,)
    p[-1] = 1.0
    still_hidden = torch.cat([p.new_ones(1), (1 - p[:-1]).cumprod(0)])  # (steps,)
    return still_hidden * p


def expected_nfe(r, L):
    """Expected network calls to reveal L hidden positions: a step needs one only if it reveals something.

    sum_k 1 - (1 - r_k)^L (RADD eq. 3.4); n (1 - (1 - 1/n)^L) for n steps of the log-linear schedule (eq. D.31).
    """
    return float((1 - (1 - r) ** L).sum())


# ---- 6. Guidance: what is given, said louder -------------------------------------------------------------------------


def predict(model, x, rows, given, cfg):
    """Logits (N, V) at flat positions rows (N,) of x (b, L), guided away from the same input with `given` (b, L) masked.

    u + (1 + w)(c - u) is unsupervised classifier-free guidance (SMDM, arXiv 2410.18514), both inputs in one doubled batch.
    """
    if cfg == 0:
        return model.head(model.hidden(x, rows)).float()
    both = torch.cat([x, x.masked_fill(given, model.mask_id)])  # (2b, L)
    c, u = model.head(model.hidden(both, torch.cat([rows, rows + x.numel()]))).float().chunk(2)  # (N, V) each
    return u + (1 + cfg) * (c - u)
