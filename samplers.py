"""Samplers: which positions are due, to be drawn in the next call. SAMPLERS has one entry each.

- A fixed order: the step of every position is known before the first call, without the network.
  any_order samples from the p(x0) that training bounds. So do ancestral and Euler sampling, except
  for tokens unmasked in one step: these are drawn independently, each given what was visible
  before. This is the only error of few steps, and what more steps buy (README: "New York").
  left_to_right samples from the p of that one order, which evaluate.py's left_to_right evaluates.
- An adaptive sampler draws all masked positions at every call and unmasks those it is most
  confident of. So however many calls it makes, its distribution is not the network's.
- A remasking sampler also masks tokens again, at steps that are known beforehand too. With the true
  conditionals, the visible tokens at any time have the same distribution as without remasking; with
  a network's conditionals, they do not.

To add a sampler, add an entry to SAMPLERS: a function (masked (N, L) bool, options) -> Policy.
options is a dict of DEFAULTS, schedule and seed. `calls` below asks the policy what is due; the
loop in sample.py asks it what to accept. (lib/entries.py shows a sampler of three lines.)
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

import config as settings
import diffusion
from lib import philox
from lib.entries import check_sampler

DEFAULTS = {
    "sampler": "ancestral",  # one of SAMPLERS; models of examples default to confidence
    "steps": 128,  # unmasking steps in [1, 1e6]; no use where a call has one token or a bound
    "threshold": 0.9,  # in [0, 1]; for threshold: unmask tokens that are at least this probable
    "max_entropy": 0.1,  # for entropy_bound: most nats of a call's tokens, all but the last
    "eta": 0.05,  # in [0, 1]; for remask: highest probability of being masked again in a step
}
# Random streams of a sequence; "call" and "remask" are the first of many, one per call or step.
STREAMS = {"order": 0, "token": 1, "call": 2, "remask": 2**40}


# ---- 1. Unmasking times: when a position is unmasked, known before the first network call --------
def ancestral_prob(schedule, t, s):
    """Probability that a token masked at time t is unmasked in the step to s < t: (...), float64.

    It is exact: 1 - m(s)/m(t) = (m(t) - m(s)) / m(t), RADD eq. D.8, D.14, D.27. RADD calls it
    Tweedie tau-leaping: all positions take a step of length t - s (tau) at once, by the denoiser
    p(x0 | x_t) (Tweedie) instead of the score at t.
    """
    return 1 - schedule(s)[0] / schedule(t)[0]


def euler_prob(schedule, t, s):
    """The same by Euler's method: the step size times the reverse rate at t, at most 1.

    The rate is m'(t)/m(t), RADD eq. 2.10; the probability is in RADD eq. D.13, D.15, D.29. For the
    log-linear schedule it is (t - s)/t, equal to ancestral_prob: RADD eq. D.16.
    """
    m, dm = schedule(t)
    return ((t - s) * dm / m).clamp(max=1.0)


def unmask_schedule(schedule, steps, unmask_prob=ancestral_prob):
    """r (steps,): probability that a position is unmasked in each of `steps` equal steps; sum 1.

    It depends only on time, so a position's step can be drawn before the first network call. The
    last step unmasks what is left, if the schedule does not end at 0 or Euler's rate falls short.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)  # (steps + 1,)
    p = unmask_prob(schedule, t[:-1], t[1:])  # (steps,)
    p[-1] = 1.0
    still_masked = torch.cat([p.new_ones(1), (1 - p[:-1]).cumprod(0)])  # (steps,)
    return still_masked * p


def expected_nfe(r, L):
    """Expected network calls (NFE: number of function evaluations) to unmask L masked positions.

    A step needs a call only if it unmasks something: sum_k 1 - (1 - r_k)^L, RADD eq. 3.4, D.22. For
    n log-linear steps this is n (1 - (1 - 1/n)^L), RADD eq. D.31. It holds with a prompt too, since
    L counts only masked tokens, RADD eq. D.30. For L = 128 it is 81 at n = 128, 120 at n = 1,024,
    and it tends to L for many steps.
    """
    return float((1 - (1 - r) ** L).sum())


# ---- 2. Policies: which positions are due in a call, and which of them are unmasked --------------
class Policy:
    """Decides what is drawn and kept in a call, for sequences live (b,) after done (b,) calls each.

    A subclass defines masked_at(live, done), the positions (b, L) that are masked before the next
    call; due(live, done), the positions (b, L) whose tokens are drawn in it; and the `seed` of its
    noise. If all calls are known ahead, it sets `nfe` (N,), their number; otherwise it overrides
    `unfinished` and `accept`.
    """

    planned = True  # all calls are known before the first, and every token drawn is kept
    remasks = False  # a token can be masked again
    by_entropy = False  # `accept` needs entropies; elsewhere they are 0
    expected_nfe = None  # mean calls per sequence; None: unknown before sampling
    step = None  # (N, L) the time step of each position, if it was drawn from a schedule

    def unfinished(self, done):
        """Which sequences (N,) need another call after done (N,) calls each."""
        return done < self.nfe

    def noise(self, live, done):
        """Uniform numbers (b, L), new in every call: a position may be drawn more than once."""
        L = self.due(live, done).shape[1]
        pairs = zip(live.tolist(), done.tolist(), strict=True)
        stream = STREAMS["call"]
        return torch.cat([philox.uniforms(self.seed, stream + call, [n], L) for n, call in pairs])

    def accept(self, live, done, p, entropy):
        """Which of the drawn tokens are kept (b, L). Called only if the policy is not `planned`."""
        return self.due(live, done)


class FixedOrder(Policy):
    """Each position is drawn once, at its unmask_step (N, L), which is -1 for conditions."""

    def __init__(self, unmask_step, seed, expected_nfe=None):
        self.call = step_to_call(unmask_step)  # (N, L)
        self.nfe = self.call.max(1).values + 1  # (N,)
        mean = float(self.nfe.double().mean())  # exact if only the order is random
        self.expected_nfe = mean if expected_nfe is None else expected_nfe
        N, L = unmask_step.shape
        self.u = philox.uniforms(seed, STREAMS["token"], range(N), L)  # (N, L)

    def masked_at(self, live, done):
        return self.call[live] >= done[:, None]

    def due(self, live, done):
        return self.call[live] == done[:, None]

    def noise(self, live, done):
        """Uniform numbers (b, L), one per position, since each is drawn only once."""
        return self.u[live]


class Adaptive(Policy):
    """All masked positions are drawn in every call, and a rule decides which of them to unmask.

    rule(live, done, p, entropy) -> (b, L) bool. p (b, L): probability of each drawn token, -1 where
    not due. entropy (b, L): that of its distribution, in nats, infinite where not due. If the rule
    unmasks nothing in a sequence, the most probable token is unmasked.
    """

    planned = False

    def __init__(self, masked, seed, rule, by_entropy=False, expected_nfe=None):
        self.masked = masked.clone()  # (N, L)
        self.seed, self.rule = seed, rule
        self.by_entropy, self.expected_nfe = by_entropy, expected_nfe

    def unfinished(self, done):
        return self.masked.any(1)

    def masked_at(self, live, done):
        return self.masked[live]

    due = masked_at

    def accept(self, live, done, p, entropy):
        """The positions (b, L) that the rule unmasks, at least one in each sequence."""
        accepted = self.rule(live, done, p, entropy)  # (b, L)
        none = ~accepted.any(1, keepdim=True)  # (b, 1)
        accepted |= none & F.one_hot(p.argmax(1), p.shape[1]).bool()
        accepted &= self.masked[live]
        self.masked[live] &= ~accepted
        return accepted


class Remasking(Policy):
    """Each position is unmasked, and perhaps masked again, at steps known before the first call.

    events: for each sequence a list with one (due (L,), masked (L,)) per call.
    """

    remasks = True

    def __init__(self, events, seed):
        self.events, self.seed = events, seed
        self.nfe = torch.tensor([*map(len, events)])  # (N,)

    def events_at(self, live, done):
        return [self.events[n][call] for n, call in zip(live, done, strict=True)]

    def masked_at(self, live, done):
        return torch.stack([masked for _, masked in self.events_at(live, done)])

    def due(self, live, done):
        return torch.stack([due for due, _ in self.events_at(live, done)])


# ---- 3. The calls of a policy, one after the other -----------------------------------------------
class Call(NamedTuple):
    """One network call: n positions of b sequences."""

    live: torch.Tensor  # (b,) sequences
    at: torch.Tensor  # (n,) flat positions in x (N, L) that are due
    idx: torch.Tensor  # (n,) the same in x[live]
    u: torch.Tensor  # (n,) uniform numbers for their draws
    masked: torch.Tensor  # (m,) flat positions in x that are masked, if the policy remasks
    done: torch.Tensor  # (b,) earlier calls of each sequence


def calls(policy, done, batch_size):
    """Yield the Calls, counting them in done (N,); a finished sequence makes room for another."""
    while True:
        live = policy.unfinished(done).nonzero().flatten()[:batch_size]  # (b,)
        if len(live) == 0:
            return
        had = done[live]  # (b,) calls so far
        due, noise = policy.due(live, had), policy.noise(live, had)  # (b, L) each
        L = due.shape[1]
        idx = due.flatten().nonzero().flatten()  # (n,)
        masked = idx[:0]
        if policy.remasks:
            row, position = policy.masked_at(live, had).nonzero(as_tuple=True)  # (m,) each
            masked = live[row] * L + position
        at = live[idx // L] * L + idx % L  # (n,)
        # The caller draws and accepts here; the next call may depend on it.
        yield Call(live, at, idx, noise.flatten()[idx], masked, had)
        done[live] += 1


def step_to_call(unmask_step):
    """The call, from 0 in each sequence, that unmasks each position: (N, L), -1 for conditions.

    A step in which a sequence unmasks nothing gets no call: its calls are its distinct steps.
    """
    step, order = unmask_step.sort(1)  # (N, L)
    before = torch.cat([step.new_full((len(step), 1), -1), step[:, :-1]], dim=1)  # (N, L)
    return torch.empty_like(step).scatter(1, order, (step > before).cumsum(1) - 1)


# ---- 4. Samplers: (masked (N, L) bool, options) -> policy ----------------------------------------
def ancestral(masked, o):
    """Ancestral sampling: each position independently, at a step from the unmasking schedule."""
    return by_time(masked, o, ancestral_prob)


def euler(masked, o):
    """The same by Euler's method, with the rate at the beginning of each step."""
    return by_time(masked, o, euler_prob)


def by_time(masked, o, unmask_prob):
    """Draw all steps from the unmasking schedule, which depends only on time."""
    N, L = masked.shape
    r = unmask_schedule(diffusion.SCHEDULES[o["schedule"]], o["steps"], unmask_prob)  # (steps,)
    u = philox.uniforms(o["seed"], STREAMS["order"], range(N), L)  # (N, L)
    # The step whose part of [0, 1), of length r, holds u.
    step = torch.searchsorted(r.cumsum(0), u, right=True).clamp(max=o["steps"] - 1)  # (N, L)
    expected = sum(expected_nfe(r, int(n)) for n in masked.sum(1)) / N
    policy = FixedOrder(torch.where(masked, step, -1), o["seed"], expected)
    policy.step = step
    return policy


def any_order(masked, o):
    """One token per call, in a uniformly random order as in the any_order bound (RADD, table 6)."""
    N, L = masked.shape
    u = philox.uniforms(o["seed"], STREAMS["order"], range(N), L)  # (N, L)
    return FixedOrder(torch.where(masked, rank(u), -1), o["seed"])


def left_to_right(masked, o):
    return FixedOrder(torch.where(masked, torch.arange(masked.shape[1]), -1), o["seed"])


def right_to_left(masked, o):
    step = torch.arange(masked.shape[1]).flip(0)  # (L,)
    return FixedOrder(torch.where(masked, step, -1), o["seed"])


def confidence(masked, o):
    """Unmask the most probable of the drawn tokens, equally many in each call.

    From MaskGIT (arXiv 2202.04200) and LLaDA (2502.09992). The field calls it low-confidence
    remasking, but no token is masked again: tokens drawn with low confidence are not kept.
    """
    return most_confident(masked, o, evenly)


def smdm_greedy(masked, o):
    """SMDM's variant of confidence: int(n (1 - s/t)) of n masked tokens in the step from t to s."""
    return most_confident(masked, o, smdm_counts)


def most_confident(masked, o, counts):
    """Unmask the most probable tokens; counts(masked tokens, steps) -> how many in each call."""
    num_transfer_tokens = [counts(int(n), o["steps"]) for n in masked.sum(1)]

    def rule(live, done, p, entropy):
        pairs = zip(live, done, strict=True)
        n = torch.tensor([num_transfer_tokens[i][call] for i, call in pairs])  # (b,)
        return rank(p, descending=True) < n[:, None]

    expected = sum(map(len, num_transfer_tokens)) / len(masked)
    return Adaptive(masked, o["seed"], rule, expected_nfe=expected)


def threshold(masked, o):
    """Unmask the drawn tokens that have a probability of `threshold` or more."""
    return Adaptive(masked, o["seed"], lambda live, done, p, entropy: p >= o["threshold"])


def entropy_bound(masked, o):
    """Unmask by increasing entropy, while the sum over all but the last stays within max_entropy.

    So at least one. Drawing them independently loses at most that sum in nats (arXiv 2505.24857).
    The choice of positions does not depend on the temperature.
    """

    def rule(live, done, p, entropy):
        entropy, order = entropy.sort(dim=1, stable=True)  # (b, L) each
        before = entropy.cumsum(1) - entropy  # (b, L)
        within = entropy.isfinite() & (before <= o["max_entropy"])  # (b, L)
        return torch.zeros_like(within).scatter(1, order, within)

    return Adaptive(masked, o["seed"], rule, by_entropy=True)


def remask(masked, o):
    """ReMDM (arXiv 2503.00307), capped: visible tokens are masked again with probability <= eta.

    Let alpha = 1 - m. In the step from t to s, a visible token is masked with probability sigma,
    and a masked one is unmasked with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). This keeps
    the marginals of ancestral sampling if sigma <= (1 - alpha_s) / alpha_t. Nothing here depends on
    the network, so all steps are drawn ahead, and steps that unmask nothing need no call.
    """
    return remasking(masked, o, lambda highest: min(o["eta"], highest))


def remask_rescale(masked, o):
    """The same with sigma = eta times the highest value that keeps the marginals."""
    return remasking(masked, o, lambda highest: o["eta"] * highest)


def remasking(masked, o, sigma_of):
    """Draw all steps ahead, without a network; sigma_of(highest sigma) -> sigma of a step."""
    N, L = masked.shape
    t = torch.linspace(1, 0, o["steps"] + 1, dtype=torch.float64)  # (steps + 1,)
    alpha = (1 - diffusion.SCHEDULES[o["schedule"]](t)[0]).tolist()  # probability of visible
    alpha[-1] = 1.0  # the last step unmasks everything and masks nothing
    is_masked = masked.clone()  # (N, L)
    events = [[] for _ in range(N)]
    for k, (alpha_t, alpha_s) in enumerate(itertools.pairwise(alpha)):
        sigma = sigma_of(min(1.0, (1 - alpha_s) / alpha_t if alpha_t else 1.0))
        p = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)  # probability of unmasking
        u = philox.uniforms(o["seed"], STREAMS["remask"] + k, range(N), L)  # (N, L)
        due = is_masked & (u < p)  # (N, L)
        for n in due.any(1).nonzero().flatten().tolist():
            events[n].append((due[n], is_masked[n].clone()))
        is_masked = (is_masked & ~due) | (~is_masked & masked & (u < sigma))
    return Remasking(events, o["seed"])


def rank(values, descending=False):
    """Rank of each value in its row, from 0; ties go to the first: (N, L) -> (N, L)."""
    return values.argsort(dim=1, descending=descending, stable=True).argsort(1)


def evenly(n, steps):
    """Spread n tokens evenly over at most `steps` calls: a list without zeros."""
    if n == 0:
        return []
    steps = min(steps, n)
    fewest, remainder = divmod(n, steps)
    return [fewest + 1] * remainder + [fewest] * (steps - remainder)


def smdm_counts(n, steps):
    """SMDM's counts, rounded in float32 as in its code; steps that unmask nothing get no call."""
    t = torch.linspace(1, 1e-5, steps + 1)  # (steps + 1,)
    counts = []
    for i in range(steps):
        counts.append(n if i == steps - 1 else int(n * (1 - t[i + 1] / t[i])))
        n -= counts[-1]
    return [count for count in counts if count]


SAMPLERS = settings.Table(
    "sampler",
    lambda entry: check_sampler(entry, calls, settings.DEFAULTS | diffusion.DEFAULTS | DEFAULTS),
    ancestral=ancestral,
    euler=euler,
    any_order=any_order,
    left_to_right=left_to_right,
    right_to_left=right_to_left,
    confidence=confidence,
    smdm_greedy=smdm_greedy,
    threshold=threshold,
    entropy_bound=entropy_bound,
    remask=remask,
    remask_rescale=remask_rescale,
)
