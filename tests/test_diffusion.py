"""The mathematics, checked by enumeration in float64: every mask, every sequence, every order at V = 3, L = 4.

Expectations go through draw_mask and nelbo themselves: a test chooses u and noise so that every corruption appears once, and
weighs it by its exact probability. What they must equal is written here a second time, from the definitions.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import L, Table, V, random_logits, states
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
from diffusion import SCHEDULES, cosine, draw_mask, loglinear, nelbo, reveal_law, stratified, training_mask, uniforms
from model import DEFAULTS, Transformer

X0 = states(V, L)  # (V^L, L) every clean sequence
PATTERNS = states(2, L).bool()  # (2^L, L) every mask
DENOISING = ["lambda_dce", "t_dce", "t_dse"]
FULL_RANGE = ["loglinear", "cosine"]  # schedules that run from exactly 0 to exactly 1


# ---- Expectations as sums ----------------------------------------------------------------------------------------------


def gauss(n):
    """Nodes and weights of Gauss-Legendre quadrature on (0, 1), exact for polynomials below degree 2n: (n,), (n,)."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def corruptions(objective, schedule, n=120):
    """What draw_mask can be given, and how likely: u (N,), noise (N, L), chance (N,) with sum 1."""
    if objective == "any_order":  # each k, each order of the noise
        orders = torch.tensor(list(itertools.permutations(range(L)))) / L  # (L!, L)
        u = ((torch.arange(L) + 0.5) / L).repeat_interleave(len(orders))  # (L * L!,)
        return u, orders.repeat(L, 1), torch.full((len(u),), 1 / len(u), dtype=torch.float64)
    nodes, weights = gauss(n)
    m = (nodes if objective == "lambda_dce" else schedule(nodes)[0].clamp(0, 1))[:, None, None]  # (n, 1, 1)
    chance = torch.where(PATTERNS, m, 1 - m).prod(-1) * weights[:, None]  # (n, 2^L)
    noise = torch.where(PATTERNS, 0.0, math.nextafter(1, 0)).double()  # (2^L, L) hides exactly the pattern
    return nodes.repeat_interleave(len(noise)), noise.repeat(n, 1), chance.flatten()


@torch.no_grad()
def expected_nats(model, objective, schedule=loglinear, normalised=True, reweigh=lambda u, weight: weight):
    """E[sum_i weight * CE_i] of every clean sequence, through draw_mask and nelbo: (V^L,)."""
    u, noise, chance = corruptions(objective, schedule)
    mask, weight = draw_mask(objective, u, noise, schedule)
    x0, mask = X0.repeat_interleave(len(u), 0), mask.repeat(len(X0), 1)  # (V^L * N, L) each
    _, nats = nelbo(model, x0, mask, reweigh(u, weight).repeat(len(X0)), normalised=normalised)
    return nats.view(len(X0), -1).double() @ chance


def pattern_nats(model):
    """Sum of cross-entropies over the hidden positions, for each clean sequence and mask: (V^L, 2^L)."""
    x0 = X0[:, None].expand(-1, len(PATTERNS), -1)  # (V^L, 2^L, L)
    x = torch.where(PATTERNS, model.mask_id, x0)  # (V^L, 2^L, L)
    log_p = model(x.flatten(0, 1)).log_softmax(-1).view(*x.shape, V)
    return -(log_p.gather(-1, x0[..., None]).squeeze(-1) * PATTERNS).sum(-1)


def chain_rule_nats(model):
    """-log p(x0) by the chain rule, averaged over all L! orders: the any-order bound by definition, (V^L,)."""
    log_p, total, orders = 0.0, 0.0, list(itertools.permutations(range(L)))
    for order in orders:
        x = torch.full_like(X0, model.mask_id)  # (V^L, L)
        for i in order:
            total = total - model(x)[:, i].log_softmax(-1).gather(-1, X0[:, i, None]).squeeze(-1)
            x[:, i] = X0[:, i]
    return log_p + total / len(orders)


def nats_between(model, low, high):
    """Integral over m in (low, high) of E[sum CE] / m, from the definition: (V^L,)."""
    nodes, weights = gauss(L)
    m = low + (high - low) * nodes[:, None, None]  # (n, 1, 1)
    chance = torch.where(PATTERNS, m, 1 - m).prod(-1) / m[..., 0]  # (n, 2^L)
    return pattern_nats(model) @ ((high - low) * weights @ chance)


def same(a, b, tolerance=2e-6):
    """Equal up to the float32 in which nelbo adds up (about 1e-7 of the value)."""
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def scaled(schedule, chance=1.0, slope=1.0):
    """The schedule with its chance or slope off by a factor."""
    return lambda t: tuple(value * factor for value, factor in zip(schedule(t), (chance, slope), strict=True))


CASES = [("any_order", "loglinear")] + [(o, s) for o in DENOISING for s in FULL_RANGE]


# ---- The bound ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "schedule"), CASES)
def test_with_true_conditionals_every_objective_is_exactly_minus_log_p_of_each_sequence(objective, schedule, network, joint):
    nats = expected_nats(network, objective, SCHEDULES[schedule])
    assert same(nats, -joint.flatten().log())
    entropy = -(joint * joint.log()).sum()
    assert same(joint.flatten() @ nats, entropy)


@pytest.mark.parametrize(("objective", "schedule"), CASES)
def test_with_arbitrary_conditionals_every_objective_is_the_same_any_order_bound(objective, schedule, arbitrary):
    assert same(expected_nats(arbitrary, objective, SCHEDULES[schedule]), chain_rule_nats(arbitrary))


def test_a_network_with_wrong_conditionals_pays_for_it(arbitrary, joint):
    entropy = -(joint * joint.log()).sum()
    assert joint.flatten() @ expected_nats(arbitrary, "any_order") > entropy + 0.1


@pytest.mark.parametrize("objective", ["t_dce", "t_dse"])
def test_the_geometric_schedule_gives_the_integral_over_its_own_range(objective, arbitrary, network, joint):
    geometric = SCHEDULES["geometric"]
    low, high = -math.expm1(-1e-4), -math.expm1(-20.0)
    for model in (arbitrary, network):
        assert same(expected_nats(model, objective, geometric), nats_between(model, low, high))
        assert same(nats_between(model, 0, 1), chain_rule_nats(model), 1e-12)


def test_what_the_geometric_schedule_leaves_out_is_a_ten_thousandth_of_one_hidden_token(arbitrary):
    low, high = (SCHEDULES["geometric"](torch.tensor(end, dtype=torch.float64))[0].item() for end in (0, 1))
    missing = chain_rule_nats(arbitrary) - nats_between(arbitrary, low, high)  # (V^L,)
    one_hidden = pattern_nats(arbitrary)[:, PATTERNS.sum(1) == 1].sum(1)  # (V^L,)
    assert torch.allclose(missing, 1e-4 * one_hidden, rtol=1e-3)


def wrong_by_one_percent():
    yield "weight", "any_order", loglinear, lambda u, weight: 1.01 * weight
    yield "weight that counts k from 0", "any_order", loglinear, lambda u, weight: L / (L / weight - 1).clamp(min=1)
    yield "weight of a mean over hidden tokens", "any_order", loglinear, lambda u, weight: torch.ones_like(weight)
    yield "weight 1/t under cosine masking", "t_dce", cosine, lambda u, weight: 1 / u
    yield "weight of the cosine under log-linear masking", "t_dce", loglinear, lambda u, weight: cosine(u)[1] / cosine(u)[0]
    yield "power of lambda", "lambda_dce", loglinear, lambda u, weight: weight**1.01
    for name in FULL_RANGE:
        yield f"slope of {name}", "t_dce", scaled(SCHEDULES[name], slope=1.01), None
        yield f"chance of {name}", "t_dce", scaled(SCHEDULES[name], chance=1.01), None
        yield f"time of {name}", "t_dse", (lambda t, right=SCHEDULES[name]: (right(t**1.01)[0], right(t)[1])), None


@pytest.mark.parametrize("wrong", wrong_by_one_percent(), ids=lambda wrong: wrong[0])
def test_a_wrong_weight_or_schedule_is_not_the_bound(wrong, network, arbitrary, joint):
    _, objective, schedule, reweigh = wrong
    change = {} if reweigh is None else {"reweigh": reweigh}
    for model, bound in ((network, -joint.flatten().log()), (arbitrary, chain_rule_nats(arbitrary))):
        assert not same(expected_nats(model, objective, schedule, **change), bound, tolerance=1e-3)


# ---- Schedules and the concrete score ----------------------------------------------------------------------------------

SIGMA_BAR = {
    "loglinear": lambda t: -torch.log1p(-t),
    "cosine": lambda t: -torch.log(1 - torch.sin(math.pi * t / 2)),
    "geometric": lambda t: torch.exp((1 - t) * math.log(1e-4) + t * math.log(20)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_one_minus_exp_minus_sigma_bar_and_its_slope(name):
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64, requires_grad=True)  # (25,)
    m, dm = SCHEDULES[name](t)
    assert torch.allclose(m, 1 - torch.exp(-SIGMA_BAR[name](t)), rtol=1e-12)
    assert torch.allclose(dm, torch.autograd.grad(m.sum(), t)[0], rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_slope_over_chance_is_the_weight_of_the_paper(name):
    t = torch.linspace(0.01, 0.95, 25, dtype=torch.float64, requires_grad=True)  # (25,)
    sigma_bar = SIGMA_BAR[name](t)  # (25,)
    sigma = torch.autograd.grad(sigma_bar.sum(), t, retain_graph=True)[0]
    m, dm = SCHEDULES[name](t)
    assert torch.allclose(dm / m, sigma * torch.exp(-sigma_bar) / (1 - torch.exp(-sigma_bar)), rtol=1e-10)


@pytest.mark.parametrize("name", FULL_RANGE)
def test_log_linear_and_cosine_run_from_all_visible_to_all_hidden(name):
    assert SCHEDULES[name](torch.tensor([0.0, 1.0]))[0].tolist() == [0, 1]


def test_the_epsilon_of_published_models_shortens_the_log_linear_schedule():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)  # (11,)
    m, dm = loglinear(t, eps=1e-3)
    assert torch.allclose(m, 0.999 * t) and torch.allclose(dm, torch.full_like(t, 0.999))


def noised(joint, m):
    """p_t over partly hidden sequences, each token hidden with chance m: (V+1, V+1, V+1, V+1)."""
    hide = torch.cat([(1 - m) * torch.eye(V), torch.full((V, 1), float(m))], dim=1).double()  # (V, V+1)
    return torch.einsum("abcd,ai,bj,ck,dl->ijkl", joint, hide, hide, hide, hide)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_concrete_score_is_the_ratio_of_noised_probabilities(name, t, network, joint):
    m = SCHEDULES[name](torch.tensor(t, dtype=torch.float64))[0]
    p, x = noised(joint, m).flatten(), states(V + 1, L)
    score = diffusion.concrete_score(network(x), m)  # ((V+1)^L, L, V)
    for i, v in itertools.product(range(L), range(V)):
        hidden = x[:, i] == V
        y = (torch.arange(len(x)) - (V - v) * (V + 1) ** (L - 1 - i))[hidden]  # rows of x with the hidden i := v
        assert torch.allclose(score[hidden, i, v], p[y] / p[hidden], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("normalised", [True, False])
def test_score_entropy_is_weighted_cross_entropy_plus_what_the_logits_lack_of_a_sum_of_one(name, normalised):
    m, dm = SCHEDULES[name](torch.linspace(0.1, 0.9, 9, dtype=torch.float64))  # (9,) each
    logits = random_logits()[:9, 0]  # (9, V)
    logits = logits.log_softmax(-1) if normalised else logits
    x0 = torch.arange(9) % V  # (9,)
    ce = -logits[torch.arange(9), x0]  # (9,)
    got = diffusion.score_entropy(logits + ((1 - m) / m).log()[:, None], x0, m, dm)
    assert torch.allclose(got, dm / m * (ce + logits.exp().sum(-1) - 1), rtol=1e-9, atol=1e-9)
    assert not normalised or torch.allclose(got, dm / m * ce, rtol=1e-9, atol=1e-9)


def test_the_concrete_score_and_only_it_makes_score_entropy_least():
    m, dm = cosine(torch.tensor(0.4, dtype=torch.float64))
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    log_score = diffusion.concrete_score(p.log(), m).log().requires_grad_()  # (V,)
    loss = (p * diffusion.score_entropy(log_score.expand(V, V), torch.arange(V), m, dm)).sum()
    assert torch.autograd.grad(loss, log_score)[0].abs().max() < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_unnormalised_loss_is_score_entropy(name):
    model, u = Table(random_logits()), torch.linspace(0.05, 0.95, len(X0), dtype=torch.float64)
    m, dm = SCHEDULES[name](u)  # (V^L,) each
    noise = uniforms(0, 0, range(len(X0)), L)
    mask, weight = draw_mask("t_dse", u, noise, SCHEDULES[name])
    log_score = model(torch.where(mask, V, X0)) + ((1 - m) / m).log()[:, None, None]  # (V^L, L, V)
    entropy = diffusion.score_entropy(log_score, X0, m[:, None], dm[:, None])  # (V^L, L)
    loss, nats = nelbo(model, X0, mask, weight, normalised=False)
    assert same(nats, (entropy * mask).sum(1), 1e-5) and same(loss, (entropy * mask).sum(), 1e-5)


def test_with_a_softmax_score_entropy_is_denoising_cross_entropy(arbitrary):
    assert same(expected_nats(arbitrary, "t_dse", cosine, normalised=False), expected_nats(arbitrary, "t_dce", cosine))


# ---- Drawing masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", DENOISING)
def test_a_token_is_hidden_with_exactly_the_chance_of_the_schedule(objective, name):
    u = torch.linspace(0.03, 0.99, 33, dtype=torch.float64)  # (33,)
    noise = ((torch.arange(10_000) + 0.5) / 10_000).double().expand(33, -1)  # (33, 10000) evenly spread
    share = draw_mask(objective, u, noise, SCHEDULES[name])[0].double().mean(1)  # (33,)
    m = u if objective == "lambda_dce" else 1 - torch.exp(-SIGMA_BAR[name](u))
    assert (share - m).abs().max() <= 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_a_batch_has_one_u_in_each_stratum_and_pairs_are_antithetic(batch_size):
    position = torch.arange(batch_size)  # (B,)
    for step in range(5):
        u = stratified(uniforms(0, step, position // 2, 1).squeeze(1), position, batch_size)  # (B,)
        assert sorted((u * batch_size).floor().tolist()) == list(range(batch_size))
        pairs = u[: batch_size // 2 * 2].view(-1, 2)  # (pairs, 2)
        assert torch.allclose(pairs.sum(1), torch.ones(len(pairs)).double())


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_the_mean_over_a_stratified_batch_is_unbiased(batch_size):
    position, (jitters, weights) = torch.arange(batch_size), gauss(8)
    u = torch.stack([stratified(jitter, position, batch_size) for jitter in jitters])  # (n, B)
    for degree in range(16):
        assert torch.isclose(weights @ (u**degree).mean(1), torch.tensor(1 / (degree + 1)).double(), rtol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("batch_size", [2, 6, 16])
def test_any_order_hides_the_same_number_of_tokens_in_each_pair_at_each_step(length, batch_size):
    for step in range(10):
        mask, weight = training_mask("any_order", 0, step, range(batch_size), batch_size, length)
        k = mask.sum(1)  # (B,)
        assert (k.view(-1, 2).sum(1) == length + 1).all()  # so any micro-batch of whole pairs is constant too
        assert k.sum() == batch_size * (length + 1) // 2 and k.min() >= 1
        assert torch.allclose(weight * k, torch.full_like(weight, length))


def test_any_order_hides_each_number_of_tokens_equally_often():
    mask, _ = training_mask("any_order", 0, 0, range(12), 12, 4)
    assert sorted(mask.sum(1).tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("objective", ["any_order", *DENOISING])
def test_masks_are_the_same_however_the_batch_is_split(objective):
    whole, whole_weight = training_mask(objective, 3, 5, range(12), 12, L, cosine)
    for cuts in ([0, 12], [0, 6, 12], [0, 2, 4, 6, 8, 10, 12], [0, 1, 12]):
        parts = [training_mask(objective, 3, 5, range(a, b), 12, L, cosine) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(whole, torch.cat([mask for mask, _ in parts]))
        assert torch.equal(whole_weight, torch.cat([weight for _, weight in parts]))


@pytest.mark.parametrize("objective", ["any_order", *DENOISING])
def test_masks_change_with_the_seed_and_with_the_step(objective):
    masks = [training_mask(objective, seed, step, range(12), 12, 20)[0] for seed, step in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert all((a != b).any() for a, b in itertools.combinations(masks, 2))


def test_no_uniform_number_is_used_twice():
    rows = [uniforms(seed, step, range(4), 300) for seed in (0, 1) for step in (0, 1)]  # (4, 300) each
    jitter = uniforms(0, 0, range(4, 6), 1)  # what training_mask takes for a batch of 4
    numbers = torch.cat([*rows, jitter.expand(2, 300)[:, :1].T.expand(1, 2).repeat(1, 1).new_zeros(0, 300)]).flatten()
    assert len(numbers.unique()) == numbers.numel()


def test_uniforms_are_uniform():
    numbers = uniforms(0, 0, range(40), 500)
    assert numbers.dtype == torch.float64 and 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 0.01 and abs(numbers.var() - 1 / 12) < 0.002
