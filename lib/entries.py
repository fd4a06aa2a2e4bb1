"""Checks of entries of tables (diffusion.py, lib/weighting.py): each says what an entry lacks.

config.Table runs them at an entry's first use, in float64 and a few milliseconds. To add a
schedule, an order, an objective or a loss weight takes one entry, there or in a script before it
calls train.main:

    import diffusion
    import train

    # m(t), the probability that a token is masked at time t, and its slope m'(t)
    diffusion.SCHEDULES["square"] = lambda t: (t**2, 2 * t)

    # numbers (B, L) to sort positions by, from noise and place (B, L), coin (B, 1) and order_p
    diffusion.ORDERS["ends_first"] = lambda noise, place, coin, p: 0.1 * noise - abs(place - 0.5)


    def many_masked(u, noise, n, schedule):
        \"""Exactly k masked, large k more often: P(k) = (2k - 1)/n^2, so the weight 1/(k P(k)).\"""
        mask, _ = diffusion.any_order(u.sqrt(), noise, n, schedule)  # (B, L)
        k = mask.sum(1)  # (B,)
        return mask, n**2 / (k * (2 * k - 1))


    diffusion.OBJECTIVES["many_masked"] = diffusion.Objective(many_masked)

    # the weight of a masked token in training, from its weight in the bound (b,)
    train.LOSS_WEIGHTS["fourth_root"] = lambda weight: weight**0.25
"""

import torch


def of_schedule(schedule):
    """It must be t (T,) -> (m (T,), m' (T,)), where m grows from 0 to 1 and m' is its slope."""
    t, h = torch.linspace(0.01, 0.99, 50, dtype=torch.float64), 1e-5  # (50,)
    pair = schedule(t)
    if not (isinstance(pair, tuple) and len(pair) == 2):
        return "gives no pair (m(t), m'(t)): the slope m' is missing"
    if not all(torch.is_tensor(z) and z.shape == t.shape for z in pair):
        return f"must give m and m' in the shape of t {tuple(t.shape)}"
    ends = schedule(torch.tensor([0.0, 1.0], dtype=t.dtype))[0].tolist()
    if not (0 <= ends[0] <= 0.01 and 0.99 <= ends[1] <= 1):
        return f"must grow from m(0) = 0 to m(1) = 1, not from {ends[0]:.3g} to {ends[1]:.3g}"
    slope = (schedule(t + h)[0] - schedule(t - h)[0]) / (2 * h)  # (50,)
    off = (~torch.isclose(pair[1], slope, rtol=1e-3)).nonzero().flatten().tolist()
    if off:
        i = off[0]
        return f"has m'({t[i]:.2f}) = {pair[1][i]:.4g}, but m grows by {slope[i]:.4g} there"
    return "" if (slope > 0).all() else "must grow at every t: m' > 0"


def of_loss_weight(weigh):
    """It must be the bound's weights (b,) -> weights (b,) above 0."""
    weight = torch.linspace(1, 100, 50, dtype=torch.float64)  # (50,)
    result = weigh(weight)
    if not (torch.is_tensor(result) and result.shape == weight.shape):
        return (
            f"must give a weight for each weight of the bound, in their shape {tuple(weight.shape)}"
        )
    return "" if result.isfinite().all() and (result > 0).all() else "must give weights above 0"


def of_order(order):
    """It must be (noise (B, L), place (B, L), coin (B, 1), p) -> numbers (B, L) to sort by."""
    noise = torch.linspace(0, 0.9, 15, dtype=torch.float64).view(3, 5)  # (3, 5)
    place, coin = (torch.arange(5) / 5).expand(3, 5), noise[:, :1]  # (3, 5), (3, 1)
    key = order(noise, place, coin, 0.5)
    if not (torch.is_tensor(key) and key.shape == noise.shape and key.is_floating_point()):
        return "must give one number for each position, in the shape of the noise (B, L)"
    return "" if key.isfinite().all() else "gives numbers that are not finite, which have no order"


def of_objective(objective):
    """Its draw must have the weights of the bound: h_k, the mean CE of k masked tokens, once each.

    For three tokens, that is, E[weight; i masked, k masked in all] = 1/3 for all i and k. This is
    checked by quadrature, with a curved schedule, without a prompt and behind one. u is v^3, since
    weights grow as 1/u.
    """
    if not (isinstance(objective.attention, tuple) and objective.attention):
        return "must have an attention that is a tuple of one or more of model.ATTENTIONS"
    if objective.draw is None:
        causal = objective.attention == ("causal",)
        return "" if causal else "has no draw, which a network that is not causal needs"
    z = torch.quasirandom.SobolEngine(4).draw(2**16, dtype=torch.float64)[1:]  # (N, 4)
    v = 1 - z[:, 0]  # (N,)
    behind = torch.cat([torch.full_like(z[:, :1], torch.inf), z[:, 1:]], dim=1)  # (N, 4)
    for noise, n in ((z[:, 1:], 3), (behind, torch.full((len(v),), 3))):
        mask, weight = objective.draw(v**3, noise, n, lambda t: (t**2, 2 * t))
        if mask.shape != noise.shape or mask.dtype != torch.bool or weight.shape != v.shape:
            return "must draw (mask (B, L) bool, weight (B,))"
        mask = mask[:, -3:]  # (N, 3)
        counted = (3 * v**2 * weight)[:, None] * mask  # (N, 3)
        share = [(counted * (mask.sum(1) == k)[:, None]).mean(0) for k in (1, 2, 3)]
        share = torch.stack(share)  # (3, 3) of k and i
        if abs(share.sum() / 3 - 1) > 0.01 or (3 * share - 1).abs().max() > 0.05:
            sums = ", ".join(f"{x:.3f}" for x in share.sum(1).tolist())
            return f"gives no bound: of 3 tokens 1, 2, 3 masked ones count {sums} times, not once"
    return ""
