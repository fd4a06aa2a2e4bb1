"""Samplers: which positions are due in the next network call. One entry of SAMPLERS each.

- A fixed order knows the step of every position before the first call; the network has no say.
  any_order draws from the p(x0) that is bounded in training. So do ancestral and Euler sampling but
  for tokens unmasked in one step: these are drawn independently, each given what was visible
  before. It is the only error of few steps, and what more steps buy (README: "New York").
  left_to_right draws from the p of that one order, which evaluate.py's left_to_right evaluates.
- An adaptive sampler asks for all masked positions at every call and unmasks those it is most
  confident of. So it draws from another distribution than the network's, at any number of calls.
- A remasking sampler also masks tokens again, at steps that are known beforehand as well. Given the
  true conditionals, what is visible at a time is distributed as it is without remasking; given a
  network's, it is not.

To add a sampler, add an entry to SAMPLERS: a function (masked (N, L) bool, options) -> Policy.
options is a dict of DEFAULTS, schedule and seed. `calls`, here, asks the policy what is due; the
loop in sample.py asks it what to accept. (lib/entries.py has one of three lines.)
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
    "sampler": "ancestral",  # one of SAMPLERS; a model of examples answers by confidence
    "steps": 128,  # unmasking steps in [1, 1e6]; not of any_order, *_to_*, threshold, entropy_bound
    "threshold": 0.9,  # in [0, 1]; for threshold: unmask the tokens that are at least this probable
    "max_entropy": 0.1,  # for entropy_bound: the most nats that a call's tokens add up to, save one
    "eta": 0.05,  # in [0, 1]; for remask: the highest probability to be masked again at a step
}
# Which random numbers of a sequence are for what; "call" and "remask" count on from there.
STREAMS = {"order": 0, "token": 1, "call": 2, "remask": 2**40}


# ---- 1. Unmasking times: when a position is unmasked, known before the network is asked ----------
def ancestral_prob(schedule, t, s):
    """Probability that a token masked at time t is unmasked by the step to s < t: (...), float64.

    1 - m(s)/m(t) = (m(t) - m(s)) / m(t), exact: RADD eq. D.8, D.14, D.27, where it is called
    Tweedie tau-leaping (several positions leap at once, by p(x0 | x_t) and not by the score at t).
    """
    return 1 - schedule(s)[0] / schedule(t)[0]


def euler_prob(schedule, t, s):
    """The same by Euler's method: the step times the rate of going back at t, and at most 1.

    The rate is m'(t)/m(t), RADD eq. 2.10, and the probability RADD eq. D.13, D.15, D.29. For the
    log-linear schedule it is (t - s)/t, as ancestral_prob: RADD eq. D.16.
    """
    m, dm = schedule(t)
    return ((t - s) * dm / m).clamp(max=1.0)


def unmask_schedule(schedule, steps, unmask_prob=ancestral_prob):
    """r (steps,): probability that a position is unmasked at each of `steps` equal steps; sum 1.

    It depends on time alone, so a position's step can be drawn before the first network call. The
    last step unmasks what is left, where a schedule does not end at 0 or Euler's rate falls short.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)  # (steps + 1,)
    p = unmask_prob(schedule, t[:-1], t[1:])  # (steps,)
    p[-1] = 1.0
    still_masked = torch.cat([p.new_ones(1), (1 - p[:-1]).cumprod(0)])  # (steps,)
    return still_masked * p


def expected_nfe(r, L):
    """Expected network calls (NFE: number of function evaluations) to unmask L masked positions.

    A step needs a call only if it unmasks something: sum_k 1 - (1 - r_k)^L, RADD eq. 3.4, D.22;
    n (1 - (1 - 1/n)^L) for n log-linear steps, RADD eq. D.31; behind a prompt, too, for L counts
    masked tokens alone, RADD eq. D.30. For L = 128: 81 at n = 128, 120 at n = 1,024, and towards L
    for many steps.
    """
    return float((1 - (1 - r) ** L).sum())


# ---- 2. Policies: what is due in a call, and which of it is unmasked -----------------------------
class Policy:
    """Says what is drawn and kept in a call for sequences live (b,) after their done (b,) calls.

    A subclass has masked_at(live, done), the positions (b, L) that are masked before the next call,
    and due(live, done), those (b, L) whose tokens are drawn in it; and the `seed` of its noise. One
    that knows all calls sets `nfe` (N,), their number; another says what is unfinished and what it
    accepts.
    """

    planned = True  # all calls are known before the first, and what is due is unmasked
    remasks = False  # a token can be masked again
    by_entropy = False  # `accept` needs entropies; elsewhere they are 0
    expected_nfe = None  # mean calls of a sequence; None: only sampling tells

    def unfinished(self, done):
        """Which sequences need another call, having had done (N,)."""
        return done < self.nfe

    def noise(self, live, done):
        """Uniform numbers (b, L), new at every call: a position may be drawn more than once."""
        L = self.due(live, done).shape[1]
        pairs = zip(live.tolist(), done.tolist(), strict=True)
        stream = STREAMS["call"]
        return torch.cat([philox.uniforms(self.seed, stream + call, [n], L) for n, call in pairs])

    def accept(self, live, done, p, entropy):
        """Which of the tokens drawn are kept (b, L). The loop asks where not `planned`."""
        return self.due(live, done)


class FixedOrder(Policy):
    """Each position is drawn once, at unmask_step (N, L), which is -1 at conditions."""

    def __init__(self, unmask_step, seed, expected_nfe=None):
        self.step = unmask_step  # (N, L)
        self.call = step_to_call(unmask_step)  # (N, L)
        self.nfe = self.call.max(1).values + 1  # (N,)
        mean = float(self.nfe.double().mean())  # what is expected where the order alone is drawn
        self.expected_nfe = mean if expected_nfe is None else expected_nfe
        N, L = unmask_step.shape
        self.u = philox.uniforms(seed, STREAMS["token"], range(N), L)  # (N, L)

    def masked_at(self, live, done):
        return self.call[live] >= done[:, None]

    def due(self, live, done):
        return self.call[live] == done[:, None]

    def noise(self, live, done):
        """Uniform numbers (b, L), one for each position, which is drawn once."""
        return self.u[live]


class Adaptive(Policy):
    """All masked positions are drawn at every call, and a rule says which of them to unmask.

    rule(live, done, p, entropy) -> (b, L), from p (b, L) of the tokens drawn, -1 where not due,
    and the entropy (b, L) of their distributions in nats, infinite where not due. Where it would
    unmask none, the most probable token is unmasked.
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
        """Which of the masked positions are unmasked (b, L) by the rule, at least one."""
        accepted = self.rule(live, done, p, entropy)  # (b, L)
        none = ~accepted.any(1, keepdim=True)  # (b, 1)
        accepted |= none & F.one_hot(p.argmax(1), p.shape[1]).bool()
        accepted &= self.masked[live]
        self.masked[live] &= ~accepted
        return accepted


class Remasking(Policy):
    """Each position is unmasked, and perhaps masked again, at steps known before the first call.

    events: for each sequence a list of (due (L,), masked (L,)), one for each call.
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
    """What one network call asks for: n positions of b sequences."""

    live: torch.Tensor  # (b,) sequences
    at: torch.Tensor  # (n,) flat positions in x (N, L) that are due
    idx: torch.Tensor  # (n,) the same in x[live]
    u: torch.Tensor  # (n,) uniform numbers for their draws
    masked: torch.Tensor  # (m,) flat positions in x that are masked, where the policy remasks
    done: torch.Tensor  # (b,) calls that each sequence has had before


def calls(policy, done, batch_size):
    """Yield the Calls, counting them in done (N,); a finished sequence makes room for another."""
    while True:
        live = policy.unfinished(done).nonzero().flatten()[:batch_size]  # (b,)
        if len(live) == 0:
            return
        had = done[live]  # (b,) calls
        due, noise = policy.due(live, had), policy.noise(live, had)  # (b, L) each
        L = due.shape[1]
        idx = due.flatten().nonzero().flatten()  # (n,)
        masked = idx[:0]
        if policy.remasks:
            row, position = policy.masked_at(live, had).nonzero(as_tuple=True)  # (m,) each
            masked = live[row] * L + position
        at = live[idx // L] * L + idx % L  # (n,)
        # The loop draws and accepts here: only then is the next call known.
        yield Call(live, at, idx, noise.flatten()[idx], masked, had)
        done[live] += 1


def step_to_call(unmask_step):
    """The call, from 0 in each sequence, that unmasks each position: (N, L), -1 at conditions.

    Steps at which a sequence unmasks nothing get no call: its calls are its distinct steps.
    """
    step, order = unmask_step.sort(1)  # (N, L)
    before = torch.cat([step.new_full((len(step), 1), -1), step[:, :-1]], dim=1)  # (N, L)
    return torch.empty_like(step).scatter(1, order, (step > before).cumsum(1) - 1)


# ---- 4. Samplers: (masked (N, L) bool, options) -> policy ----------------------------------------
def ancestral(masked, o):
    """Ancestral sampling: each position by itself, at a step drawn from the unmasking schedule."""
    return by_time(masked, o, ancestral_prob)


def euler(masked, o):
    """The same by Euler's method, whose rates are those of the beginning of each step."""
    return by_time(masked, o, euler_prob)


def by_time(masked, o, unmask_prob):
    """Draw all steps from the unmasking schedule, which knows the time alone."""
    N, L = masked.shape
    r = unmask_schedule(diffusion.SCHEDULES[o["schedule"]], o["steps"], unmask_prob)  # (steps,)
    u = philox.uniforms(o["seed"], STREAMS["order"], range(N), L)  # (N, L)
    step = torch.searchsorted(r.cumsum(0), u, right=True).clamp(max=o["steps"] - 1)  # (N, L)
    expected = sum(expected_nfe(r, int(n)) for n in masked.sum(1)) / N
    return FixedOrder(torch.where(masked, step, -1), o["seed"], expected)


def any_order(masked, o):
    """One token a call, in an order drawn uniformly, as in the bound any_order (RADD, table 6)."""
    N, L = masked.shape
    u = philox.uniforms(o["seed"], STREAMS["order"], range(N), L)  # (N, L)
    return FixedOrder(torch.where(masked, rank(u), -1), o["seed"])


def left_to_right(masked, o):
    return FixedOrder(torch.where(masked, torch.arange(masked.shape[1]), -1), o["seed"])


def right_to_left(masked, o):
    step = torch.arange(masked.shape[1]).flip(0)  # (L,)
    return FixedOrder(torch.where(masked, step, -1), o["seed"])


def confidence(masked, o):
    """The most probable of the tokens drawn, equally many in each call.

    From MaskGIT (arXiv 2202.04200) and LLaDA (2502.09992). The field calls it low-confidence
    remasking, though no token is masked again: those drawn with low confidence are not kept.
    """
    return most_confident(masked, o, evenly)


def smdm_greedy(masked, o):
    """SMDM's form of confidence: int(n (1 - s/t)) of n masked tokens in the step from t to s."""
    return most_confident(masked, o, smdm_counts)


def most_confident(masked, o, counts):
    """The most probable tokens: counts(masked tokens, steps) -> a list, how many in each call."""
    num_transfer_tokens = [counts(int(n), o["steps"]) for n in masked.sum(1)]

    def rule(live, done, p, entropy):
        pairs = zip(live, done, strict=True)
        n = torch.tensor([num_transfer_tokens[i][call] for i, call in pairs])  # (b,)
        return rank(p, descending=True) < n[:, None]

    expected = sum(map(len, num_transfer_tokens)) / len(masked)
    return Adaptive(masked, o["seed"], rule, expected_nfe=expected)


def threshold(masked, o):
    """The tokens drawn that have a probability of `threshold` or more."""
    return Adaptive(masked, o["seed"], lambda live, done, p, entropy: p >= o["threshold"])


def entropy_bound(masked, o):
    """In order of entropy, as many as keep the sum of all but the last within max_entropy.

    So at least one. Drawing them independently loses at most that sum in nats (arXiv 2505.24857).
    The temperature has no say in which positions these are.
    """

    def rule(live, done, p, entropy):
        entropy, order = entropy.sort(dim=1, stable=True)  # (b, L) each
        before = entropy.cumsum(1) - entropy  # (b, L)
        within = entropy.isfinite() & (before <= o["max_entropy"])  # (b, L)
        return torch.zeros_like(within).scatter(1, order, within)

    return Adaptive(masked, o["seed"], rule, by_entropy=True)


def remask(masked, o):
    """ReMDM (arXiv 2503.00307), capped: visible tokens are masked again with probability eta.

    In the step from t to s a visible token is masked with probability sigma, and a masked one is
    unmasked with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), alpha = 1 - m. This keeps the
    marginals of ancestral sampling if sigma <= (1 - alpha_s) / alpha_t. None of it depends on the
    network, so all is drawn ahead, and steps that unmask nothing need no call.
    """
    return remasking(masked, o, lambda highest: min(o["eta"], highest))


def remask_rescale(masked, o):
    """The same, with a sigma of eta times the highest that keeps the marginals."""
    return remasking(masked, o, lambda highest: o["eta"] * highest)


def remasking(masked, o, sigma_of):
    """Walk through the steps once, without a network; sigma_of(highest) -> sigma of a step."""
    N, L = masked.shape
    t = torch.linspace(1, 0, o["steps"] + 1, dtype=torch.float64)  # (steps + 1,)
    alpha = (1 - diffusion.SCHEDULES[o["schedule"]](t)[0]).tolist()  # that a token is visible
    alpha[-1] = 1.0  # the last step unmasks all, and masks nothing again
    is_masked = masked.clone()  # (N, L)
    events = [[] for _ in range(N)]
    for k, (alpha_t, alpha_s) in enumerate(itertools.pairwise(alpha)):
        sigma = sigma_of(min(1.0, (1 - alpha_s) / alpha_t if alpha_t else 1.0))
        p = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)  # that a masked token is unmasked
        u = philox.uniforms(o["seed"], STREAMS["remask"] + k, range(N), L)  # (N, L)
        due = is_masked & (u < p)  # (N, L)
        for n in due.any(1).nonzero().flatten().tolist():
            events[n].append((due[n], is_masked[n].clone()))
        is_masked = (is_masked & ~due) | (~is_masked & masked & (u < sigma))
    return Remasking(events, o["seed"])


def rank(values, descending=False):
    """How many values of its row come before each: (N, L) -> (N, L); of equal ones the first."""
    return values.argsort(dim=1, descending=descending, stable=True).argsort(1)


def evenly(n, steps):
    """n tokens over at most `steps` calls: a list without zeros."""
    if n == 0:
        return []
    steps = min(steps, n)
    fewest, remainder = divmod(n, steps)
    return [fewest + 1] * remainder + [fewest] * (steps - remainder)


def smdm_counts(n, steps):
    """SMDM's counts, rounded in float32 as there; steps that unmask none get no call."""
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
