"""The mathematics, by enumeration in float64: every mask, sequence and order at V = 3, L = 4.

Expectations go through draw_mask and nelbo themselves: a test chooses u and noise so that every
corruption appears once, and weighs it by its exact probability. What they must equal is written
here a second time, from the definitions.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import (
    L,
    Table,
    V,
    concrete_score,
    random_logits,
    score_entropy,
    states,
    training_mask,
)
from plain import DEFAULTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import diffusion
from diffusion import (
    SCHEDULES,
    cosine,
    draw_mask,
    loglinear,
    nelbo,
    stratified,
)
from lib import fused
from lib.philox import uniforms
from model import make_network
from samplers import ancestral_prob, euler_prob, expected_nfe, unmask_schedule

X0 = states(V, L)  # (V^L, L) every clean sequence
PATTERNS = states(2, L).bool()  # (2^L, L) every mask
DENOISING = ["lambda_dce", "t_dce", "t_dse"]
FULL_RANGE = ["loglinear", "cosine"]  # schedules that run from exactly 0 to exactly 1


# ---- Expectations as sums ------------------------------------------------------------------------


def gauss(n):
    """Nodes and weights (n,) of Gauss-Legendre quadrature on (0, 1): exact below degree 2n."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def corruptions(objective, schedule, n=120):
    """What draw_mask can be given, and how likely: u (N,), noise (N, L), p (N,) with sum 1."""
    if objective == "any_order":  # each k, each order of the noise
        orders = torch.tensor(list(itertools.permutations(range(L)))) / L  # (L!, L)
        u = ((torch.arange(L).double() + 0.5) / L).repeat_interleave(len(orders))  # (L * L!,)
        return u, orders.repeat(L, 1), torch.full((len(u),), 1 / len(u), dtype=torch.float64)
    nodes, weights = gauss(n)
    m = nodes if objective == "lambda_dce" else schedule(nodes)[0].clamp(0, 1)  # (n,)
    m = m[:, None, None]  # (n, 1, 1)
    p = torch.where(PATTERNS, m, 1 - m).prod(-1) * weights[:, None]  # (n, 2^L)
    # Noise that masks exactly the pattern, and every pattern once:
    noise = torch.where(PATTERNS, 0.0, math.nextafter(1, 0)).double()  # (2^L, L)
    return nodes.repeat_interleave(len(noise)), noise.repeat(n, 1), p.flatten()


@torch.no_grad()
def expected_nats(
    model, objective, schedule=loglinear, normalised=True, reweigh=lambda u, weight: weight
):
    """E[sum_i weight * CE_i] of every clean sequence, through draw_mask and nelbo: (V^L,)."""
    u, noise, p = corruptions(objective, schedule)
    mask, weight = draw_mask(objective, u, noise, schedule)
    x0, mask = X0.repeat_interleave(len(u), 0), mask.repeat(len(X0), 1)  # (V^L * N, L) each
    _, nats = nelbo(model, x0, mask, reweigh(u, weight).repeat(len(X0)), normalised=normalised)
    return nats.view(len(X0), -1).double() @ p


def pattern_nats(model):
    """Sum of CE over the masked positions, for each clean sequence and mask: (V^L, 2^L)."""
    x0 = X0[:, None].expand(-1, len(PATTERNS), -1)  # (V^L, 2^L, L)
    x = torch.where(PATTERNS, model.mask_id, x0)  # (V^L, 2^L, L)
    log_p = model(x.flatten(0, 1)).log_softmax(-1).view(*x.shape, V)
    return -(log_p.gather(-1, x0[..., None]).squeeze(-1) * PATTERNS).sum(-1)


def chain_rule_nats(model):
    """-log p(x0) by the chain rule, the mean over all L! orders: the any-order bound, (V^L,)."""
    total, orders = 0.0, list(itertools.permutations(range(L)))
    for order in orders:
        x = torch.full_like(X0, model.mask_id)  # (V^L, L)
        for i in order:
            total = total - model(x)[:, i].log_softmax(-1).gather(-1, X0[:, i, None]).squeeze(-1)
            x[:, i] = X0[:, i]
    return total / len(orders)


def nats_between(model, low, high):
    """Integral over m in (low, high) of E[sum CE] / m, from the definition: (V^L,)."""
    nodes, weights = gauss(L)
    m = low + (high - low) * nodes[:, None, None]  # (n, 1, 1)
    p = torch.where(PATTERNS, m, 1 - m).prod(-1) / m[..., 0]  # (n, 2^L)
    return pattern_nats(model) @ ((high - low) * weights @ p)


def same(a, b, tolerance=1e-12):
    """Equal up to the float32 in which nelbo adds up (about 1e-7 of the value)."""
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def scaled(schedule, m=1.0, slope=1.0):
    """The schedule with its m or its slope off by a factor."""
    return lambda t: (schedule(t)[0] * m, schedule(t)[1] * slope)


CASES = [("any_order", "loglinear")] + [(o, s) for o in DENOISING for s in FULL_RANGE]


# ---- The bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "schedule"), CASES)
def test_with_true_conditionals_every_objective_is_minus_log_p_of_each_sequence(
    objective, schedule, network, joint
):
    nats = expected_nats(network, objective, SCHEDULES[schedule])
    assert same(nats, -joint.flatten().log())
    entropy = -(joint * joint.log()).sum()
    assert same(joint.flatten() @ nats, entropy)


@pytest.mark.parametrize(("objective", "schedule"), CASES)
def test_with_arbitrary_conditionals_every_objective_is_the_same_any_order_bound(
    objective, schedule, arbitrary
):
    assert same(
        expected_nats(arbitrary, objective, SCHEDULES[schedule]), chain_rule_nats(arbitrary)
    )


def test_the_bound_of_a_network_with_wrong_conditionals_is_above_the_entropy(arbitrary, joint):
    entropy = -(joint * joint.log()).sum()
    assert joint.flatten() @ expected_nats(arbitrary, "any_order") > entropy + 0.1


@pytest.mark.parametrize("objective", ["t_dce", "t_dse"])
def test_the_geometric_schedule_gives_the_integral_over_its_own_range(
    objective, arbitrary, network
):
    geometric = SCHEDULES["geometric"]
    low, high = -math.expm1(-1e-4), -math.expm1(-20.0)
    for model in (arbitrary, network):
        assert same(expected_nats(model, objective, geometric), nats_between(model, low, high))
        assert same(nats_between(model, 0, 1), chain_rule_nats(model), 1e-12)


def test_the_geometric_schedule_leaves_out_a_ten_thousandth_of_one_masked_token(arbitrary):
    low, high = (SCHEDULES["geometric"](double(end))[0].item() for end in (0, 1))
    missing = chain_rule_nats(arbitrary) - nats_between(arbitrary, low, high)  # (V^L,)
    one_masked = pattern_nats(arbitrary)[:, PATTERNS.sum(1) == 1].sum(1)  # (V^L,)
    assert torch.allclose(missing, 1e-4 * one_masked, rtol=1e-3)


WRONG_WEIGHTS = {  # name: (objective, schedule, (u, weight) -> another weight)
    "weight": ("any_order", loglinear, lambda u, w: 1.01 * w),
    "weight that counts k from 0": (
        "any_order",
        loglinear,
        lambda u, w: L / (L / w - 1).clamp(min=1),
    ),
    "weight of a mean over masked tokens": (
        "any_order",
        loglinear,
        lambda u, w: torch.ones_like(w),
    ),
    "weight 1/t under cosine masking": ("t_dce", cosine, lambda u, w: 1 / u),
    "weight of the cosine under log-linear masking": (
        "t_dce",
        loglinear,
        lambda u, w: cosine(u)[1] / cosine(u)[0],
    ),
    "weight 1/lambda^1.01": ("lambda_dce", loglinear, lambda u, w: w**1.01),
}


def late(schedule):
    """The schedule with the m of another time."""
    return lambda t: (schedule(t**1.01)[0], schedule(t)[1])


def wrong_weights_and_schedules():
    yield from ((name, *wrong) for name, wrong in WRONG_WEIGHTS.items())
    for name in FULL_RANGE:
        yield f"slope of {name}", "t_dce", scaled(SCHEDULES[name], slope=1.01), None
        yield f"m of {name}", "t_dce", scaled(SCHEDULES[name], m=1.01), None
        yield f"time of {name}", "t_dse", late(SCHEDULES[name]), None


@pytest.mark.parametrize("wrong", wrong_weights_and_schedules(), ids=lambda wrong: wrong[0])
def test_a_wrong_weight_or_schedule_is_not_the_bound(wrong, network, arbitrary, joint):
    _, objective, schedule, reweigh = wrong
    change = {} if reweigh is None else {"reweigh": reweigh}
    for model, bound in (
        (network, -joint.flatten().log()),
        (arbitrary, chain_rule_nats(arbitrary)),
    ):
        assert not same(expected_nats(model, objective, schedule, **change), bound, tolerance=1e-3)


# ---- Schedules and the concrete score ------------------------------------------------------------

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
def test_slope_over_m_is_the_weight_of_the_paper(name):
    t = torch.linspace(0.01, 0.95, 25, dtype=torch.float64, requires_grad=True)  # (25,)
    sigma_bar = SIGMA_BAR[name](t)  # (25,)
    sigma = torch.autograd.grad(sigma_bar.sum(), t, retain_graph=True)[0]
    m, dm = SCHEDULES[name](t)
    factor = torch.exp(-sigma_bar) / (1 - torch.exp(-sigma_bar))  # (25,)
    assert torch.allclose(dm / m, sigma * factor, rtol=1e-10)


@pytest.mark.parametrize("name", FULL_RANGE)
def test_log_linear_and_cosine_run_from_all_visible_to_all_masked(name):
    assert SCHEDULES[name](torch.tensor([0.0, 1.0]))[0].tolist() == [0, 1]


def test_the_epsilon_of_published_models_shortens_the_log_linear_schedule():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)  # (11,)
    m, dm = loglinear(t, eps=1e-3)
    assert torch.allclose(m, 0.999 * t) and torch.allclose(dm, torch.full_like(t, 0.999))


def noised(joint, m):
    """p_t, each token masked with probability m: (V+1, V+1, V+1, V+1)."""
    step = torch.cat([(1 - m) * torch.eye(V, dtype=m.dtype), m.expand(V, 1)], dim=1)  # (V, V+1)
    return torch.einsum("abcd,ai,bj,ck,dl->ijkl", joint, step, step, step, step)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_concrete_score_is_the_ratio_of_noised_probabilities(name, t, network, joint):
    m = SCHEDULES[name](double(t))[0]
    p, x = noised(joint, m).flatten(), states(V + 1, L)
    score = concrete_score(network(x), m)  # ((V+1)^L, L, V)
    for i, v in itertools.product(range(L), range(V)):
        masked = (x[:, i] == V).nonzero().flatten()  # (n,) rows of x
        y = masked - (V - v) * (V + 1) ** (L - 1 - i)  # (n,) the rows of x with the masked i := v
        assert torch.allclose(score[masked, i, v], p[y] / p[masked], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("normalised", [True, False])
def test_score_entropy_is_weighted_cross_entropy_plus_what_the_sum_differs_from_one(
    name, normalised
):
    m, dm = SCHEDULES[name](torch.linspace(0.1, 0.9, 9, dtype=torch.float64))  # (9,) each
    logits = random_logits()[:9, 0]  # (9, V)
    logits = logits.log_softmax(-1) if normalised else logits
    x0 = torch.arange(9) % V  # (9,)
    ce = -logits[torch.arange(9), x0]  # (9,)
    got = score_entropy(logits + ((1 - m) / m).log()[:, None], x0, m, dm)
    assert torch.allclose(got, dm / m * (ce + logits.exp().sum(-1) - 1), rtol=1e-9, atol=1e-9)
    assert not normalised or torch.allclose(got, dm / m * ce, rtol=1e-9, atol=1e-9)


def test_the_concrete_score_and_only_it_makes_score_entropy_least():
    m, dm = cosine(double(0.4))
    p = double([0.5, 0.3, 0.2])
    log_score = concrete_score(p.log(), m).log().requires_grad_()  # (V,)
    loss = (p * score_entropy(log_score.expand(V, V), torch.arange(V), m, dm)).sum()
    assert torch.autograd.grad(loss, log_score)[0].abs().max() < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_unnormalised_loss_is_score_entropy(name):
    model, u = Table(random_logits()), torch.linspace(0.05, 0.95, len(X0), dtype=torch.float64)
    m, dm = SCHEDULES[name](u)  # (V^L,) each
    noise = uniforms(0, 0, range(len(X0)), L)
    mask, weight = draw_mask("t_dse", u, noise, SCHEDULES[name])
    log_score = model(torch.where(mask, V, X0)) + ((1 - m) / m).log()[:, None, None]  # (V^L, L, V)
    entropy = score_entropy(log_score, X0, m[:, None], dm[:, None])  # (V^L, L)
    loss, nats = nelbo(model, X0, mask, weight, normalised=False)
    assert same(nats, (entropy * mask).sum(1), 1e-5) and same(loss, (entropy * mask).sum(), 1e-5)


def test_with_a_softmax_score_entropy_is_denoising_cross_entropy(arbitrary):
    assert same(
        expected_nats(arbitrary, "t_dse", cosine, normalised=False),
        expected_nats(arbitrary, "t_dce", cosine),
    )


# ---- Drawing masks -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", DENOISING)
def test_a_token_is_masked_with_exactly_the_probability_of_the_schedule(objective, name):
    u = torch.linspace(0.03, 0.99, 33, dtype=torch.float64)  # (33,)
    evenly = ((torch.arange(10_000) + 0.5) / 10_000).double()  # (10000,)
    noise = evenly.expand(33, -1)  # (33, 10000)
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
def test_no_u_is_zero_so_every_weight_is_finite(batch_size):
    position = torch.arange(batch_size)  # (B,)
    for jitter in (0.0, math.nextafter(1, 0)):
        jitters = torch.full((batch_size,), jitter, dtype=torch.float64)  # (B,)
        u = stratified(jitters, position, batch_size)  # (B,)
        for objective in ("any_order", "lambda_dce", "t_dce"):
            weight = draw_mask(objective, u, torch.zeros(batch_size, L), cosine)[1]
            assert weight.isfinite().all() and (weight >= 0).all()


def test_the_schedule_is_log_linear_by_default():
    u, noise = double([0.2, 0.9]), uniforms(0, 0, range(2), L)
    default, explicit = draw_mask("t_dce", u, noise), draw_mask("t_dce", u, noise, loglinear)
    assert all(map(torch.equal, default, explicit))
    assert not torch.equal(default[1], draw_mask("t_dce", u, noise, cosine)[1])


def test_u_of_one_masks_every_token_at_a_weight_of_one():
    mask, weight = draw_mask("any_order", double([1.0]), torch.zeros(1, L))
    assert mask.all() and weight.item() == 1


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_the_mean_over_a_stratified_batch_is_unbiased(batch_size):
    position, (jitters, weights) = torch.arange(batch_size), gauss(8)
    u = torch.stack([stratified(jitter, position, batch_size) for jitter in jitters])  # (n, B)
    for degree in range(16):
        assert torch.isclose(weights @ (u**degree).mean(1), double(1 / (degree + 1)), rtol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("batch_size", [2, 6, 16])
def test_any_order_masks_the_same_number_of_tokens_in_each_pair(length, batch_size):
    for step in range(10):
        mask, weight = training_mask("any_order", 0, step, range(batch_size), batch_size, length)
        k = mask.sum(1)  # (B,)
        # So any micro-batch of whole pairs masks a constant number, too.
        assert (k.view(-1, 2).sum(1) == length + 1).all()
        assert k.sum() == batch_size * (length + 1) // 2 and k.min() >= 1
        assert torch.allclose(weight * k, torch.full_like(weight, length))


def test_any_order_masks_each_number_of_tokens_equally_often():
    mask, _ = training_mask("any_order", 0, 0, range(12), 12, 4)
    assert sorted(mask.sum(1).tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("objective", ["any_order", *DENOISING])
def test_masks_are_the_same_however_the_batch_is_split(objective):
    whole, whole_weight = training_mask(objective, 3, 5, range(12), 12, L, cosine)
    for cuts in ([0, 12], [0, 6, 12], [0, 2, 4, 6, 8, 10, 12], [0, 1, 12]):
        parts = [
            training_mask(objective, 3, 5, range(a, b), 12, L, cosine)
            for a, b in itertools.pairwise(cuts)
        ]
        assert torch.equal(whole, torch.cat([mask for mask, _ in parts]))
        assert torch.equal(whole_weight, torch.cat([weight for _, weight in parts]))


@pytest.mark.parametrize("objective", ["any_order", *DENOISING])
def test_masks_change_with_the_seed_and_with_the_step(objective):
    masks = [
        training_mask(objective, seed, step, range(12), 12, 20)[0]
        for seed, step in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    assert all((a != b).any() for a, b in itertools.combinations(masks, 2))


def test_no_uniform_number_is_used_twice():
    each = [uniforms(seed, step, range(6), 300) for seed in (0, 1) for step in (0, 1)]
    numbers = torch.cat(each)  # (24, 300)
    assert len(numbers.unique()) == numbers.numel()


def test_each_pair_has_a_jitter_of_its_own_that_is_no_number_of_the_noise():
    position = torch.arange(0, 8, 2)  # (4,) the first of each pair
    _, weight = training_mask("lambda_dce", 0, 0, position, 8, L)
    jitter = position // 2 + 1 - 8 / weight  # (4,) solved from u = 1 / weight
    numbers = torch.cat([jitter, uniforms(0, 0, range(8), L).flatten()]).sort().values
    assert numbers.diff().min() > 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_masks_follow_the_schedule(name):
    u = 1 / training_mask("lambda_dce", 0, 0, range(8), 8, L)[1]  # (8,)
    m, dm = SCHEDULES[name](u)
    mask, weight = training_mask("t_dce", 0, 0, range(8), 8, L, SCHEDULES[name])
    assert torch.allclose(weight, dm / m) and torch.equal(
        mask, uniforms(0, 0, range(8), L) < m[:, None]
    )


def test_uniforms_are_uniform():
    numbers = uniforms(0, 0, range(40), 500)
    assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 0.01 and abs(numbers.var() - 1 / 12) < 0.002


# ---- The fast loss is the plain loss -------------------------------------------------------------


def plain_nelbo(model, x0, mask, weight, normalised=True):
    """The textbook loss, on the logits of all positions: the specification of nelbo."""
    logits = model(torch.where(mask, model.mask_id, x0))  # (B, L, V)
    at_x0 = logits.gather(-1, x0[..., None]).squeeze(-1)  # (B, L)
    ce = (logits.logsumexp(-1) if normalised else logits.exp().sum(-1) - 1) - at_x0  # (B, L)
    nats = (weight[:, None] * mask * ce).sum(1)  # (B,)
    return nats.sum(), nats


def plain_ar_nll(model, x0):
    """The textbook loss of a causal network behind a start token."""
    x = torch.cat([torch.full_like(x0[:, :1], model.start_id), x0], dim=1)[:, :-1]  # (B, L)
    nats = -model(x).log_softmax(-1).gather(-1, x0[..., None]).sum((1, 2))  # (B,)
    return nats.sum(), nats


def tiny(dtype=torch.float32, **keys):
    """A Transformer none of whose parameters is zero or one."""
    torch.manual_seed(4)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 10, "vocab_size": 7}
    model = make_network(DEFAULTS | sizes | keys)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype)


MODELS = {
    "table": lambda: Table(random_logits()),
    "float64": lambda: tiny(torch.float64),
    "bias": tiny,
    "no bias": lambda: tiny(bias=False, norm="rms", mlp="swiglu", head_padding=1),
}


def gradients(model, loss):
    """The gradient of every parameter of 3 * loss: the factor from upstream must arrive."""
    model.zero_grad()
    (3 * loss).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def corrupted(model, B=6):
    """(x0, mask, weight): B sequences of full length, masked anywhere from once to everywhere."""
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randint(model.vocab_size, (B, model.block_size), generator=generator)  # (B, L)
    return x0, *training_mask("any_order", 0, 0, range(B), B, model.block_size)


def assert_agree(model, fast, plain, tolerance):
    (loss, nats), (plain_loss, plain_nats) = fast(), plain()
    assert same(loss, plain_loss, tolerance) and same(nats, plain_nats, tolerance)
    assert not nats.requires_grad
    for got, wanted in zip(gradients(model, loss), gradients(model, plain_loss), strict=True):
        assert same(got, wanted, 10 * tolerance)
    with torch.no_grad():
        loss, nats = fast()
    assert same(loss, plain_loss, tolerance) and same(nats, plain_nats, tolerance)


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "unnormalised"])
@pytest.mark.parametrize("chunk", [1, 5, 11, 512])
@pytest.mark.parametrize("name", MODELS)
def test_the_fast_loss_and_all_its_gradients_are_those_of_the_plain_loss(
    name, chunk, normalised, monkeypatch
):
    patched = functools.partial(fused.cross_entropy, chunk=chunk)
    monkeypatch.setattr(fused, "cross_entropy", patched)
    model = MODELS[name]()
    batch = corrupted(model)
    fast, plain = (
        functools.partial(loss, model, *batch, normalised=normalised)
        for loss in (nelbo, plain_nelbo)
    )
    assert_agree(model, fast, plain, 1e-5)


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "unnormalised"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["table", "float64"])
def test_the_cross_entropy_is_the_plain_one_in_value_and_gradient(
    name, grad, normalised, monkeypatch
):
    model = MODELS[name]()
    x0, mask, weight = corrupted(model)
    masked_idx = fused.masked_indices(mask)  # (N,)
    target, w = x0.flatten()[masked_idx], diffusion.at_masked(weight, mask, masked_idx)  # (N,) each

    def outcome(formula):
        h = model.hidden(torch.where(mask, model.mask_id, x0), masked_idx)  # (N, D)
        return formula(model, h, target, w, normalised)

    with torch.set_grad_enabled(grad):
        ours = outcome(diffusion.cross_entropy)
        monkeypatch.setattr(fused, "cross_entropy", None)  # the plain formula stands on its own
        plain = outcome(diffusion.plain_cross_entropy)
    assert all(same(*pair) for pair in zip(ours, plain, strict=True))
    assert not (plain[1].requires_grad or plain[2].requires_grad)
    if grad:
        pairs = zip(gradients(model, ours[0]), gradients(model, plain[0]), strict=True)
        assert all(same(*pair) for pair in pairs)


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "unnormalised"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_loss_of_other_weights_knows_the_bound_as_well(name, grad, normalised):
    model = MODELS[name]()
    x0, mask, bound = corrupted(model)
    weight = torch.linspace(0.5, 3, len(x0))  # (B,) as training likes it
    with torch.set_grad_enabled(grad):
        loss, nats = nelbo(model, x0, mask, weight, normalised=normalised, bound_weight=bound)
    same_loss, _ = plain_nelbo(model, x0, mask, weight, normalised)
    _, wanted = plain_nelbo(model, x0, mask, bound)  # of probabilities, whatever the loss is of
    assert same(loss, same_loss, 1e-5) and same(nats, wanted, 1e-5) and not nats.requires_grad
    alone = nelbo(model, x0, mask, weight, normalised=normalised)[0]
    assert torch.equal(loss, alone) and loss.requires_grad == grad
    if grad:
        pairs = zip(gradients(model, loss), gradients(model, same_loss), strict=True)
        assert all(same(*pair, 1e-4) for pair in pairs)


@pytest.mark.parametrize("multiple", [1, 4, 7, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_indices_padded_to_a_multiple_change_nothing(name, multiple, monkeypatch):
    model = MODELS[name]()
    batch = corrupted(model)
    idx = fused.masked_indices(batch[1], multiple)  # (N,)
    masked = batch[1].flatten().nonzero().squeeze(1)
    padded = min(-(-len(masked) // multiple) * multiple, batch[1].numel())
    assert len(idx) == padded == len(idx.unique())
    assert torch.isin(masked, idx).all()
    monkeypatch.setattr(fused, "masked_indices", None)  # not asked again
    fast, plain = (
        functools.partial(nelbo, model, *batch, masked_idx=idx),
        functools.partial(plain_nelbo, model, *batch),
    )
    assert_agree(model, fast, plain, 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_batch_with_nothing_masked_is_zero(name):
    model = MODELS[name]()
    x0, mask, weight = corrupted(model)
    batch = x0, torch.zeros_like(mask), weight
    assert_agree(model, lambda: nelbo(model, *batch), lambda: plain_nelbo(model, *batch), 1e-5)


def test_large_logits_do_not_overflow():
    model = tiny()
    torch.nn.init.normal_(model.unembed.weight, std=1000.0)
    loss, _ = nelbo(model, *corrupted(model))
    assert same(loss, plain_nelbo(model, *corrupted(model))[0], 1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss))


@pytest.mark.parametrize(("V", "pieces"), [(104, 1), (4096, 2), (50257, 5), (10**6, 5)])
def test_the_head_takes_pieces_of_at_most_four_million_logits_or_256_positions(V, pieces):
    seen, plain = [], fused.cross_entropy_and_grad

    def counted(logits, *rest):
        seen.append(len(logits))
        return plain(logits, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch.device("meta"):
        patch.setattr(fused, "cross_entropy_and_grad", counted)
        patch.setattr(fused, "product_dtype", lambda h: h.dtype)  # meta knows no autocast
        h, W, target = torch.empty(1200, 8), torch.empty(V, 8), torch.empty(1200, dtype=int)
        fused.cross_entropy(h, (W, None), target, torch.empty(1200))
    assert len(seen) == pieces and sum(seen) == 1200 and max(seen) <= max(256, 2**22 / V)


def test_the_head_costs_one_product_in_evaluation_and_three_in_training():
    h, W = torch.randn(20, 16, requires_grad=True), torch.randn(7, 16, requires_grad=True)
    target = torch.arange(20) % 7
    for grad, products in ((False, 1), (True, 3)):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            loss, *_ = fused.cross_entropy(h, (W, None), target, torch.ones(20), chunk=8)
            if grad:
                loss.backward()
        assert counter.get_total_flops() == products * 2 * 20 * 7 * 16


def test_the_loss_in_bfloat16_is_near_the_plain_loss():
    model = tiny()
    batch = corrupted(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, nats = nelbo(model, *batch)
        got = gradients(model, loss)
    plain_loss, plain_nats = plain_nelbo(model, *batch)
    wanted = gradients(model, plain_loss)
    assert same(loss, plain_loss, 0.02) and same(nats, plain_nats, 0.05)
    for a, b in zip(got, wanted, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("grad", [True, False])
def test_a_float64_network_keeps_its_precision_in_autocast(grad):
    model = tiny(torch.float64)
    batch = corrupted(model)
    with torch.set_grad_enabled(grad):
        loss, nats = nelbo(model, *batch)
        with torch.autocast("cpu", torch.bfloat16):
            inside, inside_nats = nelbo(model, *batch)
    assert same(inside, loss) and same(inside_nats, nats)


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor made inside it."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        self.numel = max([self.numel, *(t.numel() for t in leaves if torch.is_tensor(t))])
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_the_fast_loss_never_holds_the_logits_of_more_than_a_chunk(grad, monkeypatch):
    patched = functools.partial(fused.cross_entropy, chunk=4)
    monkeypatch.setattr(fused, "cross_entropy", patched)
    model = tiny(vocab_size=500)
    with torch.set_grad_enabled(grad), LargestTensor() as largest:
        loss, _ = nelbo(model, *corrupted(model))
        if grad:
            loss.backward()
    assert largest.numel <= model.embed.weight.numel() < 33 * 500  # the batch has 33 masked tokens
    with LargestTensor() as largest:
        plain_nelbo(model, *corrupted(model))
    assert largest.numel >= 60 * 500


@pytest.mark.parametrize("keys", [{}, {"bias": False}, {"start_id": 3}])
def test_the_autoregressive_loss_and_its_gradients_are_those_of_the_plain_loss(keys):
    model = tiny(attention="causal", **keys)
    x0, _, _ = corrupted(model)
    assert_agree(model, lambda: diffusion.ar_nll(model, x0), lambda: plain_ar_nll(model, x0), 1e-5)


class LeftToRight(Table):
    """The table as a causal network: position i of the shifted input knows x0 before i alone."""

    causal = True

    def hidden(self, x):
        known = torch.ones(L, L).tril(-1).bool()  # row i: what position i knows
        x0 = x.roll(-1, 1)[:, None]  # (B, 1, L)
        partly = torch.where(known, x0, self.mask_id).flatten(0, 1)  # (B*L, L)
        h = super().hidden(partly).view(len(x), L, L, V)
        return h.diagonal(dim1=1, dim2=2).transpose(1, 2)  # (B, L, V)


def test_the_autoregressive_loss_of_true_conditionals_is_minus_log_p(network, joint):
    model = LeftToRight(network.logits.detach())
    loss, nats = diffusion.ar_nll(model, X0)
    assert same(nats, -joint.flatten().log()) and same(loss, -joint.log().sum())


# ---- Unmasking times -----------------------------------------------------------------------------


def m_at(name, n):
    """m at the n + 1 times of n equal steps from 1 to 0, as plain numbers."""
    t = torch.linspace(1, 0, n + 1, dtype=torch.float64)  # (n + 1,)
    return (1 - torch.exp(-SIGMA_BAR[name](t))).tolist()


@pytest.mark.parametrize("unmask_prob", [ancestral_prob, euler_prob])
@pytest.mark.parametrize("steps", [1, 2, 5, 64])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_token_is_unmasked_at_exactly_one_step(name, steps, unmask_prob):
    r = unmask_schedule(SCHEDULES[name], steps, unmask_prob)  # (steps,)
    assert r.shape == (steps,) and (r >= 0).all() and math.isclose(r.sum(), 1, rel_tol=1e-12)


@pytest.mark.parametrize("steps", [1, 5, 64])
@pytest.mark.parametrize("name", FULL_RANGE)
def test_ancestral_steps_unmask_what_the_schedule_masks_between_them(name, steps):
    m = m_at(name, steps)
    expected = double([a - b for a, b in itertools.pairwise(m)])  # (steps,)
    assert torch.allclose(unmask_schedule(SCHEDULES[name], steps), expected, rtol=1e-6)


def test_the_last_step_unmasks_what_a_schedule_that_does_not_end_at_zero_has_left():
    m = m_at("geometric", 5)
    expected = double([(a - b) / m[0] for a, b in itertools.pairwise([*m[:-1], 0.0])])  # (5,)
    assert torch.allclose(unmask_schedule(SCHEDULES["geometric"], 5), expected, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 64])
def test_euler_is_ancestral_for_the_log_linear_schedule(steps):
    r = unmask_schedule(loglinear, steps, euler_prob)  # (steps,)
    assert torch.allclose(r, unmask_schedule(loglinear, steps), rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_steps_unmask_at_the_rate_of_the_start_of_the_step(name):
    steps, masked, expected = 5, 1.0, []
    for k in range(steps):
        m, dm = SCHEDULES[name](double(1 - k / steps))
        p = min(1.0, float(dm / m) / steps) if k < steps - 1 else 1.0
        expected.append(masked * p)
        masked *= 1 - p
    r = unmask_schedule(SCHEDULES[name], steps, euler_prob)  # (steps,)
    assert torch.allclose(r, double(expected), rtol=1e-9)


def test_a_wrong_schedule_or_rate_gives_another_unmasking_schedule():
    def power(t):
        return cosine(t)[0] ** 1.01, cosine(t)[1]

    ours, euler = unmask_schedule(cosine, 5), unmask_schedule(cosine, 5, euler_prob)  # (5,) each
    assert not torch.allclose(unmask_schedule(power, 5), ours, rtol=1e-3)
    r = unmask_schedule(scaled(cosine, slope=1.01), 5, euler_prob)
    assert not torch.allclose(r, euler, rtol=1e-3)
    r = unmask_schedule(scaled(loglinear, slope=1.01), 5, euler_prob)
    assert not torch.allclose(r, unmask_schedule(loglinear, 5), rtol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_expected_nfe_is_the_mean_number_of_distinct_unmasking_steps(name):
    r = unmask_schedule(SCHEDULES[name], 5)  # (5,)
    steps = states(5, L)  # (5^L, L) every way that L tokens can be unmasked in 5 steps
    distinct = double([len(set(row)) for row in steps.tolist()])  # (5^L,)
    assert math.isclose(expected_nfe(r, L), r[steps].prod(1) @ distinct, rel_tol=1e-12)


@pytest.mark.parametrize(("n", "nfe"), [(128, 127.96), (1024, 647.5), (2048, 806.0), (4096, 906.1)])
def test_expected_nfe_of_1024_tokens_is_what_the_paper_says(n, nfe):
    got = expected_nfe(unmask_schedule(loglinear, n), 1024)
    assert math.isclose(got, n * (1 - (1 - 1 / n) ** 1024), rel_tol=1e-9)
    assert abs(got - nfe) < (0.005 if n == 128 else 0.05)


def test_one_step_needs_one_call_and_endless_steps_one_call_a_token():
    assert expected_nfe(unmask_schedule(cosine, 1), L) == 1
    assert 3.99 < expected_nfe(unmask_schedule(cosine, 10_000), L) < L
