"""The estimators of a likelihood: exact where they say so, else unbiased, and honestly so."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import L, Table, V, random_joint, random_logits, states, true_conditionals
from plain import DEFAULTS

import config as settings
import diffusion
import evaluate
from data.loader import spread
from evaluate import (
    ESTIMATORS,
    Estimator,
    Requests,
    RowNoise,
    along,
    answer_nats,
    estimate,
    nats_of_rows,
    of_set,
    random_numbers,
    set_nats,
)
from lib.stats import certainty, mean_and_error, mean_over_sets, report, t95
from model import make_network
from run import checkpoint

X0 = states(V, L)  # (V^L, L)
TURNS = torch.tensor(list(itertools.permutations(range(L))))  # (24, L) orders: turn of each place
WIDE = 10**6  # rows in one call: all of them
DRAWN = [name for name, estimator in ESTIMATORS.items() if not estimator.exact]
ONE_ROW = [name for name, estimator in ESTIMATORS.items() if estimator.row]


def nats_of(model, blocks, **options):
    """The nats that `estimate` finds."""
    return estimate(model, blocks, **options)[0]


def one_set(model, requests, size, number=0, **options):
    """What set `number` of `size` draws says of each request: (N,)."""
    o = settings.options(options, *evaluate.MODULES)
    nats, _ = set_nats(model, Requests(requests), o, number, size)  # (N, size)
    return of_set(ESTIMATORS[o["estimator"]], nats)


def row_of(estimator, u, noise, turn, prompt, schedule="loglinear"):
    """What an estimator masks and counts: (b, W) each."""
    rows = RowNoise(u, noise, turn, prompt, diffusion.SCHEDULES[schedule])
    return ESTIMATORS[estimator].row_of(rows)


@pytest.fixture
def order(monkeypatch):
    """order(name, turns): from now on an estimator is the chain rule along the order of `turns`.

    turns takes a RowNoise to the turn of each token (b, W), of prompts anything.
    """

    def register(name, turns):
        def prompts_first(rows):
            return turns(rows).masked_fill(rows.position < 0, -1).argsort(dim=1, stable=True)

        estimator = Estimator(order=prompts_first, exact=True)
        monkeypatch.setitem(ESTIMATORS, name, estimator)

    return register


def blocks_of(x0):
    """Examples of a tensor as `estimate` takes them."""
    return list(x0.numpy())


def requests_of(x0, prompt):
    """Examples of a tensor as requests with a prompt of that many tokens."""
    return [(row[:prompt], row[prompt:]) for row in x0.numpy()]


def conditional(joint, prompt):
    """-log p(the rest | the first `prompt` tokens) of all sequences: (V^L,)."""
    begin = joint.flatten(prompt).sum(-1, keepdim=True).expand(*[V] * prompt, V ** (L - prompt))
    return -(joint.flatten() / begin.flatten()).log()


@torch.no_grad()
def chain_by_hand(model, x0, turn):
    """-log p along one order, token by token: x0 (N, L), turn (L,) -> (N,)."""
    nats = torch.zeros(len(x0), dtype=torch.float64)
    for k, i in enumerate(turn.argsort()):
        log_p = model(torch.where(turn >= k, V, x0))[:, i].log_softmax(-1)  # (N, V)
        nats -= log_p.gather(1, x0[:, i : i + 1]).squeeze(1)
    return nats


@pytest.fixture
def by_order(arbitrary):
    """-log p along every order, for conditionals that agree with no joint: (V^L, 24)."""
    return torch.stack([chain_by_hand(arbitrary, X0, turn) for turn in TURNS], 1)


def transformer(**keys):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 7}
    return make_network(DEFAULTS | sizes | keys).eval()


def random_ids(lengths, n_tokens=7, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(n_tokens, size=length) for length in lengths]


# ---- Exact values --------------------------------------------------------------------------------


def close(nats, expected, rel=1e-6):
    torch.testing.assert_close(nats, expected, rtol=rel, atol=1e-9)


def even_first(rows):
    """An order of our own."""
    l = rows.noise.shape[1] - rows.prompt[:, None]  # (b, 1)
    return rows.position // 2 + (rows.position % 2) * ((l + 1) // 2)


@pytest.mark.parametrize("prompt", [0, 1, 3])
@pytest.mark.parametrize(
    "estimator", ["chain", "orders", "left_to_right", "right_to_left", "even_first"]
)
def test_the_chain_rule_with_true_conditionals_is_the_likelihood_along_every_order(
    estimator, prompt, network, joint, order
):
    order("even_first", even_first)
    options = {"estimator": estimator, "draws": 3, "batch_size": WIDE}
    close(answer_nats(network, requests_of(X0, prompt), **options), conditional(joint, prompt))
    assert not prompt or not torch.allclose(
        -joint.flatten().log(), conditional(joint, prompt), rtol=0.01
    )


def test_the_coin_of_a_mixture_of_orders_is_the_stratified_number_of_a_row(arbitrary, monkeypatch):
    noise = torch.rand(2, L, dtype=torch.float64)
    none = torch.zeros(2, dtype=torch.long)
    rows = RowNoise(torch.tensor([0.3, 0.7]), noise, none, none, None)
    mixed = torch.stack([torch.arange(L), noise[1].argsort()])  # half of them left to right
    assert torch.equal(along("mixture", 0.5)(rows), mixed)
    monkeypatch.setitem(ESTIMATORS, "mixture", Estimator(order=along("mixture", 0.5)))
    nats = answer_nats(arbitrary, requests_of(X0, 0), estimator="mixture", draws=4)
    assert nats.isfinite().all()


def test_an_order_that_is_registered_is_the_chain_rule_along_it(arbitrary, by_order, order):
    options, blocks = {"batch_size": WIDE}, blocks_of(X0)
    for turn, expected in zip(TURNS[::5], by_order.T[::5], strict=True):
        order("ours", lambda rows, turn=turn: turn[rows.position])
        close(nats_of(arbitrary, blocks, estimator="ours", **options), expected)
    forward, backward = (
        chain_by_hand(arbitrary, X0, turn) for turn in (torch.arange(L), L - 1 - torch.arange(L))
    )
    close(nats_of(arbitrary, blocks, estimator="left_to_right", **options), forward)
    close(nats_of(arbitrary, blocks, estimator="right_to_left", **options), backward)
    assert not torch.allclose(forward, backward, rtol=0.01)


def share_of(k, l):
    """What each mask of k of l tokens weighs in the mean over draws: (k - 1)! (l - k)! / l!."""
    return 1 / (k * math.comb(l, k))


@pytest.mark.parametrize("l", [1, 4])
@pytest.mark.parametrize(
    ("estimator", "schedule"), [(name, "loglinear") for name in ONE_ROW] + [("t_dce", "cosine")]
)
def test_the_mean_over_draws_weighs_every_mask_as_the_bound_does(estimator, schedule, l):
    n, generator = 800_000, torch.Generator().manual_seed(0)
    u = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    noise = torch.rand(n, 2 + l, generator=generator, dtype=torch.float64)
    mask, weight = row_of(estimator, u, noise, None, torch.full((n,), 2), schedule)
    assert not mask[:, :2].any() and torch.equal(mask, weight > 0) and mask.any(1).all()
    assert weight.max() < 1.6 * l  # l, and for cosine pi / 2 of it
    assert torch.allclose(
        weight[:, 2:].mean(0), torch.ones(l).double(), rtol=0.007
    )  # every token counts once
    for k in range(1, l + 1):  # with every number of masked ones beside it
        value = weight.sum(1) * (mask.sum(1) == k)  # (n,)
        error = value.std() / math.sqrt(n)
        assert abs(value.mean() - 1) < 3.5 * error + 1e-6 < 0.0115


@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 2])
def test_with_true_conditionals_the_bound_is_the_likelihood_of_the_answer(prompt, network, joint):
    total, l = 0.0, L - prompt
    for pattern in states(2, l)[1:].bool():
        mask = F.pad(pattern, (prompt, 0)).expand(len(X0), L)
        weight = share_of(int(pattern.sum()), l) * mask.double()
        total = total + nats_of_rows(network, X0, mask, weight, ESTIMATORS["any_order"])
    close(total, conditional(joint, prompt))
    with pytest.raises(AssertionError):
        close(1.01 * total, conditional(joint, prompt))


def test_the_mean_over_all_orders_is_the_bound(arbitrary, by_order):
    nats, info = estimate(arbitrary, blocks_of(X0), draws=256, batch_size=WIDE)
    error = info["draw_error"] * L * V**L
    assert abs(nats.sum() - by_order.mean(1).sum()) < 3.5 * error < 0.01 * nats.sum()


def mean_of_k_orders(by_order, K):
    """The mean of -log((p_1 + ... + p_K) / K) over K independent orders: (V^L,)."""
    p = (-by_order).exp()  # (V^L, 24)
    return -torch.stack(
        [p[:, list(i)].mean(1).log() for i in itertools.product(range(24), repeat=K)]
    ).mean(0)


def test_the_bound_over_k_orders_falls_to_the_likelihood_of_their_mixture(by_order):
    mixture = -(-by_order).exp().mean(1).log()  # (V^L,)
    assert float((-mixture).exp().sum()) == pytest.approx(1, rel=1e-9)  # it is a distribution
    gaps = [mean_of_k_orders(by_order, K) - mixture for K in (1, 2, 3)]
    assert all((a > b).all() for a, b in itertools.pairwise([*gaps, torch.zeros(V**L)]))
    assert gaps[0].sum() > 0.03 * mixture.sum()  # what orders gain here is no rounding error


def test_the_estimator_orders_never_takes_a_smaller_set(arbitrary):
    with pytest.raises(settings.UserError, match="orders takes whole sets: draws 5 must"):
        estimate(arbitrary, blocks_of(X0), estimator="orders", draws=5, strata=4)


def test_the_estimator_orders_comes_down_to_that_mixture(arbitrary, by_order):
    """The gap falls as 1/K."""
    bounds, blocks = [by_order[::3].mean(1).sum()], blocks_of(X0[::3])
    for K in (6, 36, 216):
        bounds.append(
            nats_of(arbitrary, blocks, estimator="orders", draws=K, strata=K, batch_size=WIDE).sum()
        )
    mixture = -(-by_order[::3]).exp().mean(1).log().sum()
    assert all(a > b for a, b in itertools.pairwise(bounds)) and bounds[-1] == pytest.approx(
        float(mixture), rel=0.01
    )


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_estimator_orders_is_unbiased_for_the_bound_over_k_orders(K, arbitrary, by_order):
    options = {"estimator": "orders", "draws": 240, "strata": K, "batch_size": WIDE}
    nats, info = estimate(arbitrary, blocks_of(X0), **options)
    error, expected = info["draw_error"] * L * V**L, mean_of_k_orders(by_order, K).sum()
    assert abs(nats.sum() - expected) < 3.5 * error < 0.012 * expected


def test_a_causal_network_is_evaluated_exactly():
    model = transformer(attention="causal")
    blocks = random_ids([16, 16, 5, 16])
    nats = nats_of(model, blocks, draws=16, batch_size=2)
    for block, value in zip(blocks, nats.tolist(), strict=True):
        x0 = torch.from_numpy(block)
        log_p = model(torch.cat([torch.tensor([model.start_id]), x0[:-1]])[None])[0].log_softmax(
            -1
        )  # (L, V)
        ce = -log_p.gather(-1, x0[:, None]).squeeze(-1)  # (L,)
        assert value == pytest.approx(ce.sum().item(), rel=1e-5)
        answer = answer_nats(model, [(block[:3], block[3:])]).item()
        assert answer == pytest.approx(ce[3:].sum().item(), rel=1e-5)


# ---- Draws ---------------------------------------------------------------------------------------


def numbers(draws, size, seed=3, place=5, number=0, n=L):
    """u (draws,) and noise (draws, n) of the first draws of a set."""
    draw = torch.arange(draws)
    return random_numbers(seed, number, torch.full_like(draw, place), draw, size, n)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_a_set_is_stratified_and_its_draws_come_in_antithetic_pairs(size):
    sets = [numbers(size, size, number=i) for i in range(40)]
    for u, _ in sets:
        assert torch.equal(
            (u * size).floor().long().clamp(max=size - 1).sort().values, torch.arange(size)
        )
        even, odd = slice(0, size // 2 * 2, 2), slice(1, None, 2)
        assert torch.allclose(
            u[even] + u[odd], torch.ones(size // 2, dtype=torch.float64), rtol=1e-12
        )
    assert len({u[0].item() for u, _ in sets}) == 40  # the sets are independent


def test_random_numbers_do_not_depend_on_the_length_of_the_answer_or_on_the_batch():
    u, noise = numbers(6, 6, n=9)
    short, cut = numbers(6, 6, n=2)
    assert torch.equal(u, short) and torch.equal(noise[:, :2], cut)
    draw = torch.tensor([4, 1, 4])
    again = random_numbers(3, 0, torch.full_like(draw, 5), draw, 6, 9)
    assert torch.equal(again[0], u[draw]) and torch.equal(again[1], noise[draw])
    for other in ({"seed": 4}, {"place": 6}, {"number": 1}):
        assert not torch.isclose(numbers(6, 6, n=9, **other)[1], noise).any()


def watched(model):
    """The inputs of every call, as a list that grows."""
    seen, hidden = [], model.hidden
    model.hidden = lambda x, masked_idx=None: seen.append(x.clone()) or hidden(x, masked_idx)
    return seen


@pytest.mark.parametrize("estimator", ["chain", "left_to_right"])
def test_the_rows_of_a_chain_unmask_the_answer_token_by_token_and_keep_the_prompt(
    estimator, arbitrary
):
    seen = watched(arbitrary)
    answer_nats(arbitrary, [([2], [0, 1, 2])], estimator=estimator, draws=1)
    masked = seen[0] == V  # (3, L)
    assert len(seen) == 1 and masked.sum(1).tolist() == [3, 2, 1] and not masked[:, 0].any()
    assert (masked[:-1] | ~masked[1:]).all()  # what is unmasked stays
    assert estimator == "chain" or masked[2].tolist() == [False, False, False, True]


def test_draws_in_one_set_have_a_lower_variance_than_independent_ones(network):
    requests, variance = requests_of(X0[::2], 0), {}
    for size in (1, 8):
        sets = [one_set(network, requests, size, i, batch_size=WIDE) for i in range(240 // size)]
        variance[size] = (
            torch.stack(sets).var(0).mean() * size
        )  # of one draw, as if all were independent
    assert variance[8] < 0.4 * variance[1]


# ---- What a number depends on --------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_number_of_a_block_depends_on_its_place_and_not_on_batch_or_later_ones(
    estimator, arbitrary
):
    draws = 6 if estimator == "orders" else 5  # the others take two sets, of 3 and 2
    blocks, options = blocks_of(X0[:20]), {"estimator": estimator, "draws": draws, "strata": 3}
    whole = nats_of(arbitrary, blocks, seed=2, **options)
    for n, batch_size in ((20, 1), (20, 7), (20, 1000), (11, 32)):
        nats = nats_of(arbitrary, blocks[:n], seed=2, batch_size=batch_size, **options)
        assert torch.allclose(nats, whole[:n], rtol=1e-12)
    other = nats_of(arbitrary, blocks, seed=3, **options)
    assert torch.equal(other, whole) == (estimator not in DRAWN)
    same_text = nats_of(arbitrary, blocks[:1] * 9, estimator=estimator, draws=4).tolist()
    assert len(set(same_text)) == (9 if estimator in DRAWN else 1)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("estimator", ["any_order", "chain", "left_to_right"])
def test_rows_of_other_lengths_keep_their_own_number(estimator, batch_size):
    model = transformer()
    requests = list(
        zip(random_ids([0, 3, 0, 8, 2, 5]), random_ids([9, 6, 4, 1, 7, 0], seed=1), strict=True)
    )
    options = {"estimator": estimator, "draws": 4, "batch_size": batch_size}
    together = answer_nats(model, requests, groups=range(6), **options)
    alone = [
        answer_nats(model, [request], groups=[i], **options) for i, request in enumerate(requests)
    ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5)
    assert together[5] == 0 and (together[:5] > 0).all()  # for nothing, none


def test_no_blocks_have_no_numbers(arbitrary):
    assert nats_of(arbitrary, []).shape == answer_nats(arbitrary, []).shape == (0,)


def test_more_draws_continue_fewer(arbitrary):
    few, many = (estimate(arbitrary, blocks_of(X0), draws=draws, strata=4)[0] for draws in (4, 8))
    second = one_set(arbitrary, requests_of(X0, 0), 4, number=1)
    close(many, (few + second) / 2)


# ---- Answers to prompts --------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["any_order", "lambda_dce", "t_dce", "chain"])
def test_requests_of_one_group_share_their_draws_by_the_place_in_the_answer(estimator, arbitrary):
    requests = [([1], [2, 0, 1]), ([2], [1, 1, 0]), ([1], [2, 0, 1])]
    seen, options = watched(arbitrary), {"estimator": estimator, "draws": 8, "batch_size": WIDE}
    shared = answer_nats(arbitrary, requests, groups=[4, 4, 4], **options)
    masked = (seen[0] == V).view(3, -1, L)  # the calls' rows by request
    assert torch.equal(masked[0], masked[1]) and torch.equal(masked[0], masked[2])
    assert shared[0] == shared[2]
    assert not masked[:, :, :1].any() and masked[:, :, 1:].any()
    own = answer_nats(arbitrary, requests, groups=[4, 5, 6], **options)
    assert own[0] == shared[0] and own[2] != shared[2]


def test_the_tokens_that_answers_of_unequal_length_have_in_common_come_in_one_order():
    model, turns = transformer(), []
    for answer in ([1, 2, 3, 4, 5], [6, 6, 6]):
        seen = watched(model)
        options = {"estimator": "chain", "draws": 1, "batch_size": WIDE}
        answer_nats(model, [([0, 0], answer)], groups=[9], **options)
        turns.append((seen[0] == model.mask_id)[:, 2:5].sum(0))  # (3,) how long each stays masked
    assert torch.equal(turns[0].argsort(), turns[1].argsort()) and len(set(turns[1].tolist())) == 3


def test_shared_draws_compare_options_with_less_noise():
    """Options that differ in their last token, of texts whose tokens have little in common."""
    by_place = torch.randn(L, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = sum(
        by_place[i].view([V if i == j else 1 for j in range(L)]) for i in range(L)
    )  # (V, V, V, V)
    joint = (2 * logits + 0.3 * random_joint().log()).flatten().softmax(0).view([V] * L)
    network, truth = Table(true_conditionals(joint)), conditional(joint, 1)
    pairs = [(i, j) for i in range(0, 81, 3) for j in range(i + 1, i + 3)]
    requests = [request for pair in pairs for request in requests_of(X0[list(pair)], 1)]
    true, noise = torch.tensor([truth[i] - truth[j] for i, j in pairs]), []
    for groups in (torch.arange(len(requests)) // 2, torch.arange(len(requests))):
        tries = [
            answer_nats(network, requests, draws=8, seed=s, groups=groups, batch_size=WIDE)
            for s in range(20)
        ]
        gaps = torch.stack(tries).view(20, -1, 2)  # (20, pairs, 2)
        noise.append((gaps[:, :, 0] - gaps[:, :, 1] - true).square().mean())
    assert noise[0] < 0.6 * noise[1]


@pytest.mark.parametrize("estimator", ["any_order", "chain", "left_to_right"])
def test_a_row_that_is_filled_with_masks_is_read_as_such(estimator, network, joint):
    x0 = states(V, 3)
    begin = joint.sum(3)  # (V, V, V) of the first three tokens; the fourth is never told
    truth = -(begin / begin.sum((1, 2), keepdim=True)).flatten().log()
    seen = watched(network)
    options = {"estimator": estimator, "draws": 1024, "batch_size": WIDE}
    nats = answer_nats(network, requests_of(x0, 1), pad_to=L, **options)
    assert all((x[:, 3] == V).all() for x in seen)
    if estimator == "any_order":
        assert abs((nats - truth).mean()) < 0.004 * truth.mean()
    else:
        close(nats, truth)


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["any_order", "left_to_right"])
def test_guidance_pushes_the_logits_away_from_those_without_the_prompt(estimator, arbitrary):
    w, x0 = 0.7, X0[40:45]
    options = {"estimator": estimator, "draws": 8, "seed": 4}
    nats = answer_nats(arbitrary, requests_of(x0, 2), cfg_scale=w, batch_size=WIDE, **options)
    total = torch.zeros(5, dtype=torch.float64)
    draw = torch.arange(8) if estimator == "any_order" else torch.tensor([0, 0])
    for i in range(5):
        u, noise = random_numbers(4, 0, torch.full_like(draw, i), draw, len(draw), 2)
        turn, prompt = torch.arange(len(draw)) % 2, torch.full_like(draw, 2)
        mask, weight = row_of(estimator, u, F.pad(noise, (2, 0)), turn, prompt)  # (b, L) each
        x = torch.where(mask, V, x0[i])  # (b, L)
        c, u = (
            arbitrary(x),
            arbitrary(torch.cat([torch.full_like(x[:, :2], V), x[:, 2:]], 1)),
        )  # (b, L, V) each
        log_p = (u + (1 + w) * (c - u)).log_softmax(-1)
        ce = -log_p.gather(-1, x0[i].expand_as(x)[..., None]).squeeze(-1)  # (b, L)
        total[i] = (weight * ce).sum() / (len(draw) if estimator == "any_order" else 1)
    close(nats, total)
    unguided = answer_nats(arbitrary, requests_of(x0, 2), **options)
    assert not torch.allclose(nats, unguided, rtol=0.01)


@pytest.fixture
def smdm(shared):
    """(folder, likelihoods that the official code found, the request)"""
    folder = shared("fixtures/smdm_tiny")
    case = torch.load(folder / "expected.pt", weights_only=True)["likelihood"]
    return folder, case, [(case["prefix"].tolist(), case["target"].tolist())]


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 1.6])
def test_the_published_likelihoods_come_out_of_the_published_draws(cfg_scale, smdm):
    folder, case, [(prefix, target)] = smdm
    model, nats = checkpoint.load(folder / "mdm.safetensors")[0], []
    x0 = torch.tensor([prefix + target] * 8)  # (8, W)
    given = (torch.arange(x0.shape[1]) < len(prefix)).expand_as(x0)  # (8, W)
    for u0, r in zip(case["mc"]["u0"], case["mc"]["r"], strict=True):
        t = (u0 + torch.arange(8) / 8) % 1  # (8,)
        mask, weight = diffusion.draw_mask("lambda_dce", t, r, prompt=torch.full((8,), len(prefix)))
        weight = weight[:, None] * mask  # (8, W)
        guidance = (given, cfg_scale) if cfg_scale else ()
        row_nats = nats_of_rows(
            model, x0, mask, weight, ESTIMATORS["lambda_dce"], *guidance
        )  # (8,)
        nats.append(row_nats.mean().item())
    assert sum(nats) / 2 == pytest.approx(case["mc"][cfg_scale], abs=1e-4)
    options = {"estimator": "left_to_right", "cfg_scale": cfg_scale}
    chain = answer_nats(model, [(prefix, target)], **options).item()
    assert chain == pytest.approx(case["chain_rule"][cfg_scale], abs=1e-4)


def test_the_published_likelihood_with_masks_up_to_2048_and_the_causal_one_come_out(smdm):
    folder, case, request = smdm
    model, causal = (checkpoint.load(folder / f"{kind}.safetensors")[0] for kind in ("mdm", "ar"))
    options = {"estimator": "left_to_right", "pad_to": 2048, "batch_size": 4}
    padded = answer_nats(model, request, **options).item()
    assert padded == pytest.approx(case["chain_rule_padded_to_2048"], abs=1e-4)
    [(prefix, target)] = request
    causal.start_id = prefix[
        0
    ]  # theirs reads the prefix as it is, ours a start token and the prompt
    exact = answer_nats(causal, [(prefix[1:], target)]).item()
    assert exact == pytest.approx(case["ar"]["nll"], abs=1e-4)


# ---- How sure it is: the draws -------------------------------------------------------------------


def test_the_interval_factor_is_students():
    for freedom, expected in (
        (2, 4.303),
        (4, 2.776),
        (10, 2.228),
        (60, 2.000),
        (10**9, 1.960),
    ):
        assert t95(freedom) == pytest.approx(expected, rel=0.01)
    assert t95(0) == t95(1) == math.inf


def test_the_error_over_sets_is_the_usual_one_and_one_set_has_none():
    sets = torch.randn(7, 5, dtype=torch.float64)
    mean, error = mean_over_sets(sets, [4] * 5)
    close(mean, sets.mean(1))
    assert error == pytest.approx(math.sqrt(sets.var(1).sum().item() / 5))
    assert mean_over_sets(sets[:, :1], [4])[1] == math.inf


def test_a_last_set_that_is_shorter_counts_for_less():
    noise = torch.randn(
        200_000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sets = torch.stack([noise[:, :4].mean(1), noise[:, 4:8].mean(1), noise[:, 8:].mean(1)], 1)
    mean, error = mean_over_sets(sets, [4, 4, 2])
    close(mean, noise.mean(1))
    assert error == pytest.approx(math.sqrt(200_000 / 10), rel=0.01)


def cover(sets, truth, widen=1.0, size=12):
    """How often the 95% interval over R sets of `size` sequences covers the truth (N,): (N, R)."""
    inside, R = [], sets.shape[1]
    for group, true in zip(sets.split(size), truth.split(size), strict=True):
        mean, error = mean_over_sets(group, [1] * R)
        inside.append(float(abs(mean.sum() - true.sum()) < widen * t95(size * (R - 1)) * error))
    return np.mean(inside)


@pytest.mark.parametrize("estimator", DRAWN)
def test_intervals_over_draws_cover_the_exact_value_as_often_as_they_say(
    estimator, network, arbitrary, joint, by_order
):
    """250 texts of 12 sequences, two sets of draws each.

    With true conditionals, but where all orders would then be equal.
    """
    truth = {"chain": by_order.mean(1), "orders": mean_of_k_orders(by_order, 3)}.get(
        estimator, -joint.flatten().log()
    )
    model, size = (arbitrary, 3) if estimator in ("chain", "orders") else (network, 8)
    pick = torch.randint(V**L, (250 * 12,), generator=torch.Generator().manual_seed(1))
    requests = requests_of(X0[pick], 0)
    options = {"estimator": estimator, "batch_size": WIDE}
    sets = [one_set(model, requests, size, i, **options) for i in range(2)]
    sets, truth = torch.stack(sets, 1), truth[pick]
    assert 0.915 < cover(sets, truth) < 0.98
    assert cover(sets, truth, widen=0.5) < 0.78


def test_precision_stops_the_draws_as_soon_as_the_interval_is_narrow_enough(network):
    blocks = blocks_of(X0)
    wide, info = estimate(network, blocks, draws=4096, precision=0.02, batch_size=WIDE)
    assert info["draw_half"] < 0.02 and 8 <= info["draws"] < 4096 and info["draws"] % 4 == 0
    assert info["rows"] == V**L * info["draws"] and info["calls"] == info["draws"] // 4
    again, fixed = estimate(network, blocks, draws=info["draws"], batch_size=WIDE)
    assert torch.equal(wide, again) and fixed["draw_half"] == info["draw_half"]
    before = estimate(network, blocks, draws=info["draws"] - 4, batch_size=WIDE)[1]
    assert before["draw_half"] >= 0.02
    assert estimate(network, blocks, draws=24, precision=1e-9, batch_size=WIDE)[1]["draws"] == 24
    options = {"estimator": "left_to_right", "draws": 24, "precision": 0.02, "batch_size": WIDE}
    once = estimate(network, blocks, **options)[1]
    assert once["draws"] == 0 and once["draw_error"] == once["draw_half"] == 0
    assert once["rows"] == V**L * L


def test_stopped_intervals_cover_as_often_as_they_say(network, joint):
    truth, inside = -joint.flatten().log()[::4], []
    for seed in range(80):
        nats, info = estimate(
            network, blocks_of(X0[::4]), draws=512, precision=0.06, seed=seed, batch_size=WIDE
        )
        inside.append(float(abs(nats.sum() - truth.sum())) < info["draw_half"] * L * len(truth))
    assert 0.88 < np.mean(inside) < 0.99


# ---- How sure it is: the text --------------------------------------------------------------------


def unequal(S=300):
    """Sequences of very unequal length whose nats have a part of their own: nats, lengths (S,)."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 60, size=S)
    return lengths * (1 + 0.3 * generator.standard_normal(S)) + generator.exponential(
        3, size=S
    ), lengths


def test_the_mean_is_that_of_all_tokens():
    assert mean_and_error([1.0, 9.0], [1, 3])[0] == 2.5


def test_the_error_is_that_of_a_jackknife_over_sequences():
    nats, lengths = unequal()
    S = len(nats)
    without = [(nats.sum() - nats[i]) / (lengths.sum() - lengths[i]) for i in range(S)]
    jackknife = math.sqrt((S - 1) / S * sum((value - np.mean(without)) ** 2 for value in without))
    assert mean_and_error(nats, lengths)[1] == pytest.approx(jackknife, rel=0.02)


def test_the_error_is_that_of_a_bootstrap_over_sequences():
    nats, lengths = unequal()
    picks = np.random.default_rng(2).integers(len(nats), size=(4000, len(nats)))  # (4000, S)
    bootstrap = (nats[picks].sum(1) / lengths[picks].sum(1)).std()
    assert mean_and_error(nats, lengths)[1] == pytest.approx(bootstrap, rel=0.05)


def test_with_equal_lengths_the_error_is_the_usual_one_and_two_sequences_have_none():
    nats = np.array([3.0, 5.0, 4.0, 8.0])
    assert mean_and_error(nats, [10] * 4) == pytest.approx((0.5, nats.std(ddof=1) / 2 / 10))
    assert mean_and_error([3.0], [10]) == (0.3, math.inf)
    assert mean_and_error([3.0, 5.0], [10, 10]) == (0.4, math.inf)


def coverage(nats, truth, widen=1.0, size=20):
    """How often the 95% interval of `size` sequences covers the truth: nats (R * size,)."""
    inside = []
    for group in nats.view(-1, size).tolist():
        mean, error = mean_and_error(group, [L] * size)
        inside.append(abs(mean - truth) < widen * t95(size - 1) * error)
    return np.mean(inside)


def test_intervals_over_text_cover_the_exact_entropy_as_often_as_they_say(network, joint):
    drawn = torch.multinomial(
        joint.flatten(), 400 * 20, replacement=True, generator=torch.Generator().manual_seed(3)
    )
    nats = nats_of(network, blocks_of(X0[drawn]), draws=4, seed=0, batch_size=WIDE)
    entropy = -(joint * joint.log()).sum().item() / L
    assert 0.92 < coverage(nats, entropy) < 0.98
    assert (
        coverage(nats, entropy, widen=0.5) < 0.80
    )  # as if the four tokens of a sequence were four sequences
    assert coverage(nats, 1.05 * entropy) < 0.90


# ---- The report ----------------------------------------------------------------------------------


def test_a_report_says_one_number_in_every_unit():
    result, text = report([20.0, 30.0] * 20, [10, 10] * 20, bytes_per_token=4.0)
    half = t95(39) * math.sqrt(40 / 39 * 25 / 40) / 10
    assert result["nats_per_token"] == 2.5 and result["tokens"] == 400 and result["sequences"] == 40
    assert result["interval"] == pytest.approx([2.5 - half, 2.5 + half])
    assert result["perplexity"] == pytest.approx(math.exp(2.5))
    assert result["bits_per_token"] == pytest.approx(3.6067, abs=1e-4)
    assert result["bits_per_byte"] == pytest.approx(0.9017, abs=1e-4)
    bits = half / math.log(2)
    assert (
        f"2.5000 +- {half:.4f} nats per token (95% interval) = 3.6067 +- {bits:.4f} bits per token"
        in text
    )
    assert f"= 0.9017 +- {bits / 4:.4f} bits per byte; perplexity 12.18" in text


def test_a_hopeless_model_is_reported_too():
    result, text = report([1e5, 2e5], [10, 10], bytes_per_token=1.0)
    assert result["nats_per_token"] == 15_000 and result["perplexity"] == math.inf
    assert "perplexity e^15000" in text


def test_draws_that_agree_are_draws_all_the_same():
    result = {"draw_error": 0.0, "draw_half": 0.0, "rows": 8, "calls": 1, "seconds": 1.0}
    result |= {"sequences": 4}
    said = certainty(result | {"draws": 8}, 0.0, 8, 4)
    assert said.startswith("the draws alone, on this text: standard error 0.0000, +- 0.0000 nats")
    assert certainty(result | {"draws": 0}, 0.0, 8, 4).startswith("no draws: ")


def test_the_draws_for_a_smaller_interval_are_told_if_anybody_could_wait_for_them():
    result = {"draw_error": 0.1, "draw_half": 0.2, "rows": 8, "calls": 1, "seconds": 1.0}
    result |= {"sequences": 4, "draws": 8}
    assert certainty(result, 0.02, 8, 4).endswith(
        "it takes about 800 draws a sequence (--draws=800)"
    )
    assert certainty(result, 1e-9, 8, 4).endswith("1,000,000 draws are not enough for that")


@pytest.mark.parametrize("n", [1, 2])
def test_a_report_of_two_sequences_calls_them_too_few_for_an_interval(n):
    result, text = report([20.0, 30.0][:n], [10, 10][:n], bytes_per_token=4.0)
    assert result["interval"] == [-math.inf, math.inf] and "+-" not in text
    said = f"nats per token (too few sequences for an interval: {n}) = "
    assert text.startswith(f"{result['nats_per_token']:.4f} {said}")
    assert "+-" in report([20.0, 30.0, 40.0], [10] * 3, 4.0)[1]


def test_a_part_of_the_blocks_is_spread_evenly():
    assert spread(list(range(10)), 0) == spread(list(range(10)), 99) == list(range(10))
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(list(range(10)), 1) == [0]


def test_unnormalised_logits_are_evaluated_by_score_entropy():
    model = Table(random_logits())
    nats = nats_of(model, blocks_of(X0[:5]), estimator="t_dse", draws=3, seed=5)
    for i in range(5):
        u, noise = random_numbers(5, 0, torch.full((3,), i), torch.arange(3), 3, L)
        mask, weight = row_of("t_dse", u, noise, None, torch.zeros(3, dtype=torch.long))
        logits = model(torch.where(mask, V, X0[i])).detach()  # (3, L, V)
        at_x0 = logits.gather(-1, X0[i].expand(3, -1)[..., None]).squeeze(-1)  # (3, L)
        assert nats[i].item() == pytest.approx(
            float((weight * (logits.exp().sum(-1) - 1 - at_x0)).sum() / 3), rel=1e-5
        )
