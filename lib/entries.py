"""Checks of table entries (config.Table), each of which says what is wrong, and a check of ids.

They run at an entry's first use, in float64, within milliseconds. Adding a schedule, an order, an
objective, a loss weight or a sampler takes one entry, in its table or in a script before it calls
train.main or sample.main:

    import torch

    import diffusion
    import samplers
    import train

    # m(t), the probability that a token is masked at time t, and its slope m'(t)
    diffusion.SCHEDULES["square"] = lambda t: (t**2, 2 * t)

    # numbers (B, L) to sort positions by, from noise and place (B, L), coin (B, 1) and order_p;
    # a sampler and an estimator of the same name are the default for a network that learnt it
    diffusion.ORDERS["ends_first"] = lambda noise, place, coin, p: 0.1 * noise - abs(place - 0.5)


    def many_masked(u, noise, n, schedule):
        \"""Exactly k masked, large k more often: P(k) = (2k - 1)/n^2, so the weight 1/(k P(k)).\"""
        mask, _ = diffusion.any_order(u.sqrt(), noise, n, schedule)  # (B, L)
        k = mask.sum(1)  # (B,)
        return mask, n**2 / (k * (2 * k - 1))


    diffusion.OBJECTIVES["many_masked"] = diffusion.Objective(many_masked)

    # the weight of a masked token in training, from its weight in the bound (b,)
    train.LOSS_WEIGHTS["fourth_root"] = lambda weight: weight**0.25

    # uniform u (b,) -> masking rates, which grow from 0 to 1, and their density du/d rate
    train.MASK_RATES["low"] = lambda u: ((u + u**2) / 2, 1 / (0.5 + u))


    def even_first(masked, o):
        \"""Every second position in one call, then the others, which see both sides.\"""
        step = torch.arange(masked.shape[1]) % 2  # (L,)
        return samplers.FixedOrder(torch.where(masked, step, -1), o["seed"])  # -1: nothing to draw


    samplers.SAMPLERS["even_first"] = even_first
"""

import collections
import math

import torch

from config import require
from lib.philox import uniforms


def check_ids(model, name, x, mask=None, values=False, causal=None, order=None):
    """Raise UserError unless x holds ids (B, L) and the mask, if given, is bool (B, L).

    causal: whether the network must be causal, or must not; None: both will do. order: that of an
    `order` network, ids in the shape of x.
    values: also require that the network can read x: ids in [0, mask_id], a check that waits for a
    GPU, and L at most block_size.
    """
    form = f"{name} must be ids (B, L) of int64"
    is_causal = getattr(model, "causal", causal)
    fits = causal is None or causal == is_causal
    require(fits or causal, "a causal network has no masks: its loss is ar_nll")
    require(fits, "ar_nll is for causal networks; the loss of this one is nelbo")
    is_tensor = torch.is_tensor(x)
    kind = f"{x.dtype} {tuple(x.shape)}" if is_tensor else f"a {type(x).__name__}"
    is_ids = is_tensor and x.dim() == 2 and x.dtype in (torch.int64, torch.int32)
    require(is_ids and x.numel(), f"{form}, not {kind}")
    if mask is not None:
        is_mask = torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == x.shape
        require(is_mask, f"the mask must be bool in the shape of {name}, {tuple(x.shape)}")
    if order is not None:
        require(hasattr(model, "hidden_in_order"), "order_nll is for networks of attention=order")
        shapes = tuple(order.shape), tuple(x.shape)
        require(shapes[0] == shapes[1], f"the order must be (B, L) {shapes[1]}, not {shapes[0]}")
    if values:
        low, high = torch.stack(x.aminmax()).tolist()
        most = f"L at most block_size {model.block_size}"
        require(x.shape[1] <= model.block_size, f"{form}, {most}, not {x.shape[1]}")
        inside = low >= 0 and high <= model.mask_id
        require(inside, f"{form}, each from 0 to {model.mask_id} (the mask), not {low} to {high}")


def check_left_to_right(masked, o):
    """Raise UserError for what a causal network cannot do with masked (N, L) bool and options o."""
    require(o["cfg_scale"] == 0, "cfg_scale needs a masked diffusion model, not a causal one")
    name, known = o["sampler"], ("left_to_right", "ancestral")  # the latter is sample's default
    require(name in known, f"a causal network samples left to right: it has no sampler '{name}'")
    given_later = masked.cummax(1).values & ~masked  # (N, L)
    require(not given_later.any(), "a causal network cannot see what is given after a gap")


def is_pair(result):
    return isinstance(result, tuple) and len(result) == 2


def check_schedule(schedule):
    """A schedule maps t (T,) to (m (T,), m' (T,)); m grows from 0 to 1, and m' is its slope."""
    t, h = torch.linspace(0.01, 0.99, 50, dtype=torch.float64), 1e-5  # (50,)
    pair = schedule(t)
    if not is_pair(pair):
        return "gives no pair (m(t), m'(t)): the slope m' is missing"
    if not all(torch.is_tensor(z) and (z.shape, z.dtype) == (t.shape, t.dtype) for z in pair):
        return f"must give m and m' in the shape and dtype of t, {tuple(t.shape)} {t.dtype}"
    ends = schedule(torch.tensor([0.0, 1.0], dtype=t.dtype))[0].tolist()
    if not (0 <= ends[0] <= 0.01 and 0.99 <= ends[1] <= 1):
        return f"must grow from m(0) = 0 to m(1) = 1, not from {ends[0]:.3g} to {ends[1]:.3g}"
    slope = (schedule(t + h)[0] - schedule(t - h)[0]) / (2 * h)  # (50,)
    off = (~torch.isclose(pair[1], slope, rtol=1e-3)).nonzero().flatten().tolist()
    if off:
        i = off[0]
        return f"has m'({t[i]:.2f}) = {pair[1][i]:.4g}, but m grows by {slope[i]:.4g} there"
    return "" if (slope > 0).all() else "must grow at every t: m' > 0"


def check_loss_weight(weigh):
    """A loss weight maps the weights of the bound (b,) to positive weights (b,)."""
    weight = torch.linspace(1, 100, 50, dtype=torch.float64)  # (50,)
    result = weigh(weight)
    if not (torch.is_tensor(result) and result.shape == weight.shape):
        return (
            f"must give a weight for each weight of the bound, in their shape {tuple(weight.shape)}"
        )
    return "" if result.isfinite().all() and (result > 0).all() else "must give weights above 0"


def check_mask_rate(mask_rate):
    """A mask rate maps u (b,) to (rate (b,), density du/d rate (b,)), rates that grow from 0 to 1.

    Nearly: bell, whose u is clamped to 1e-9 and more, reaches from 0.015 to 0.985.
    """
    u, h = torch.linspace(0.02, 0.98, 49, dtype=torch.float64), 1e-6  # (49,)
    pair = mask_rate(u)
    if not is_pair(pair):
        return "gives no pair (rate, density): the density du/d rate is missing"
    rate, density = pair  # (49,) each
    if not ((rate > 0) & (rate <= 1)).all():
        return "must give rates from 0 to 1"
    low, high = mask_rate(torch.tensor([0.0, 1.0], dtype=torch.float64))[0].tolist()
    if not (low < 0.02 and high > 0.98 and (rate.diff() > 0).all()):
        return f"must grow from 0 to 1 as u does, not from {low:.3g} to {high:.3g}"
    slope = (mask_rate(u + h)[0] - mask_rate(u - h)[0]) / (2 * h)  # (49,)
    off = (~torch.isclose(density * slope, torch.ones_like(u), rtol=1e-3)).nonzero().tolist()
    if off:
        i = off[0][0]
        right = 1 / slope[i]
        return (
            f"has a density of {density[i]:.4g} at u = {u[i]:.2f}, where du/d rate is {right:.4g}"
        )
    return ""


def check_lr_decay(decay):
    """A decay maps the fraction of it that is over to the fraction of the rate that remains."""
    parts = [decay(done) for done in (0.0, 0.5, 1.0)]
    right = all(math.isfinite(part) and 0 <= part <= 1 for part in parts)
    return "" if right else f"must give parts from 0 to 1, not {parts} at 0, 0.5 and 1"


def uses_p(order):
    """Whether order_p changes an entry of ORDERS."""
    noise = torch.linspace(0.9, 0, 15, dtype=torch.float64).view(3, 5)  # (3, 5)
    place, coin = (torch.arange(5) / 5).expand(3, 5), torch.full((3, 1), 0.5)  # (3, 5), (3, 1)
    return not torch.equal(*(order(noise, place, coin, p) for p in (0.25, 0.75)))


def uses_schedule(draw):
    """Whether the schedule changes `draw`, of an entry of OBJECTIVES; False if it is None."""
    if draw is None:
        return False
    u, noise = torch.full((4,), 0.5), torch.linspace(0.1, 0.9, 12).view(4, 3)  # (4,), (4, 3)
    schedules = (lambda t: (t, torch.ones_like(t)), lambda t: (t**2, 2 * t))
    draws = [draw(u, noise, torch.full((4,), 3), schedule) for schedule in schedules]
    return any(not torch.equal(*pair) for pair in zip(*draws, strict=True))


def uses_time(estimator, rows_of):
    """Whether the schedule changes an entry of ESTIMATORS. rows_of: see check_estimator."""

    def draw(u, noise, n, schedule):
        none = torch.zeros(len(u), dtype=torch.long)  # (4,)
        return estimator.row(rows_of(u, noise, none, none, schedule))

    return uses_schedule(draw if estimator.row else None)


def check_order(order):
    """An order maps (noise (B, L), place (B, L), coin (B, 1), p) to numbers (B, L) to sort by."""
    noise = torch.linspace(0, 0.9, 15, dtype=torch.float64).view(3, 5)  # (3, 5)
    place, coin = (torch.arange(5) / 5).expand(3, 5), noise[:, :1]  # (3, 5), (3, 1)
    key = order(noise, place, coin, 0.5)
    if not (torch.is_tensor(key) and key.shape == noise.shape):
        return "must give one number for each position, in the shape of the noise (B, L)"
    if not key.is_floating_point():
        return f"must give floating-point numbers to sort by, not {key.dtype}"
    return "" if key.isfinite().all() else "gives numbers that are not finite, which have no order"


def check_objective(objective):
    """The weights of `draw` must give the bound: each h_k, the mean CE of k masked tokens, once.

    For n tokens this means E[weight; i masked, k masked in all] = 1/n for all i and k. It is
    checked by quadrature for two and three, with a curved schedule, without a prompt and after one.
    u is v^3, since weights grow as 1/u.
    """
    if not hasattr(objective, "attention"):
        return f"is a {type(objective).__name__}: wrap it in diffusion.Objective(...)"
    if not (isinstance(objective.attention, tuple) and objective.attention):
        return "must have an attention that is a tuple of one or more of model.ATTENTIONS"
    if objective.draw is None:
        return "" if objective.causal else "has no draw, which a network that is not causal needs"
    for tokens, v, noise, _ in quasi_random():
        n = torch.full((len(v),), tokens)  # (N,)
        pair = objective.draw(v**3, noise, n, lambda t: (t**2, 2 * t))
        if not is_pair(pair):
            return "gives no pair (mask, weight): the weight is missing"
        mask, weight = pair  # (N, W), (N,)
        if mask.shape != noise.shape or mask.dtype != torch.bool or weight.shape != v.shape:
            return "must draw (mask (B, L) bool, weight (B,))"
        if problem := counted_once(tokens, v, mask, weight[:, None] * mask):
            return problem
    return ""


def quasi_random():
    """Yield (n tokens, v (N,), noise (N, W), prompt lengths (N,)): n tokens, then with a prompt."""
    for n in (3, 2):
        z = torch.quasirandom.SobolEngine(1 + n).draw(2**16, dtype=torch.float64)[1:]  # (N, 1 + n)
        none = torch.zeros(len(z), dtype=torch.long)  # (N,)
        yield n, 1 - z[:, 0], z[:, 1:], none
        behind = torch.cat([torch.full_like(z[:, :1], torch.inf), z[:, 1:]], dim=1)  # (N, 1 + n)
        yield n, 1 - z[:, 0], behind, none + 1


def counted_once(n, v, mask, weight):
    """Why E[weight_i; k masked in all] is not 1/n for the last n tokens i and all k, or "".

    v (N,) is the cube root of u; mask and weight are (N, W).
    """
    if not weight.isfinite().all():
        return "gives weights that are not finite"
    if weight[~mask].any():
        return "gives a weight to tokens that are not masked, which the network sees"
    mask, weight = mask[:, -n:], weight[:, -n:]  # (N, n) each
    counted = (3 * v**2)[:, None] * weight  # (N, n)
    share = [(counted * (mask.sum(1) == k)[:, None]).mean(0) for k in range(1, n + 1)]
    share = torch.stack(share)  # (n, n) of k and i
    if abs(share.sum() / n - 1) > 0.01 or (n * share - 1).abs().max() > 0.05:
        ks = ", ".join(map(str, range(1, n + 1)))
        sums = ", ".join(f"{x:.3f}" for x in share.sum(1).tolist())
        return f"gives no bound: of {n} tokens {ks} masked ones count {sums} times, not once"
    return ""


def check_estimator(estimator, rows_of):
    """The weights of `row` must give the bound, as in check_objective; `order` must be an order.

    rows_of(u, noise, turn, prompt, schedule) -> the argument of both (evaluate.RowNoise).
    """
    if not hasattr(estimator, "row"):
        return f"is a {type(estimator).__name__}: wrap it in evaluate.Estimator(...)"
    if not (estimator.row or estimator.order):
        return "has neither row nor order"
    for n, v, noise, prompt in quasi_random():
        drawn = rows_of(v**3, noise.clamp(max=1), 0 * prompt, prompt, lambda t: (t**2, 2 * t))
        problem = row_problem(n, v, estimator.row(drawn), noise.shape) if estimator.row else ""
        if not problem and estimator.order:
            problem = order_problem(n, estimator.order(drawn), noise.shape, estimator.exact)
        if problem:
            return problem
    return ""


def row_problem(n, v, pair, shape):
    """What is wrong with the (mask, weight) of rows of `shape` that end in n tokens, or ""."""
    if not is_pair(pair):
        return "gives no pair (mask, weight): the weight is missing"
    mask, weight = pair  # (N, W) each
    if not (mask.shape == weight.shape == shape) or mask.dtype != torch.bool:
        return "must give (mask (b, W) bool, weight (b, W)) of a row"
    return counted_once(n, v, mask, weight)


def order_problem(n, order, shape, exact):
    """What is wrong with the orders of rows of `shape` that end in n tokens, or ""."""
    every = torch.arange(shape[1]).expand(shape)  # (N, W)
    if order.shape != shape or not torch.equal(order.sort(1).values, every):
        return "must give an order (b, W): each position once in a row"
    if (order.argsort(1)[:, :-n] >= shape[1] - n).any():
        return "must give an order in which the prompt comes first"
    drawn = exact and (order != order[:1]).any()
    return "draws its orders, so it is not exact: exact must be False" if drawn else ""


def keys_read(sampler, calls, options):
    """The options that a sampler reads, found by a dry run, so that no list has to repeat them."""
    read = set()

    class Options(collections.UserDict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    check_sampler(sampler, calls, Options(options))
    return read


def check_sampler(sampler, calls, options):
    """A sampler maps (masked (N, L) bool, options) to a policy that unmasks all, step by step.

    This is a dry run of sample.py's loop. calls: the function of samplers.py that maps (policy,
    calls done (N,), batch_size) to the positions to predict, call by call.
    """
    masked = torch.tensor([[True, False, True, True], [False, True, True, True]])  # (2, 4)
    left, done = masked.clone(), torch.zeros(2, dtype=torch.long)  # (2, 4), (2,)
    policy = sampler(masked.clone(), options | {"steps": 5})
    if not hasattr(policy, "unfinished"):
        return f"must return a Policy (as samplers.FixedOrder), not a {type(policy).__name__}"
    for number, call in enumerate(calls(policy, done, 2)):
        if number == 1000:
            return "never ends"
        due = policy.due(call.live, call.done)  # (b, 4)
        if (due & ~masked[call.live]).any():
            return "must leave what is not masked as it is"
        keep = due
        p = torch.where(due, uniforms(0, number, range(len(call.live)), 4), -1.0)  # (b, 4)
        if not policy.planned:
            keep = policy.accept(call.live, call.done, p, torch.where(p < 0, torch.inf, p))
        before = policy.masked_at(call.live, call.done) if policy.remasks else left[call.live]
        left[call.live] = before & ~keep
    if left.any():
        return "must unmask all, but leaves positions masked"
    missing = [name for name in ("by_entropy", "expected_nfe") if not hasattr(policy, name)]
    return f"makes a policy without {' and '.join(missing)}" if missing else ""
