"""The loop of sampling: it draws what the plain loop draws, at the NFE it says; conditions stay."""

import math

import pytest
import torch
from conftest import L, V, predict
from plain import DEFAULTS
from test_samplers import (
    ADAPTIVE,
    EMPTY,
    ONE_BY_ONE,
    TIMED,
    counts_of,
    plain_law,
    sample,
    unmask_steps,
)

import diffusion
import sample as decoding
import samplers
from config import UserError
from lib import philox
from lib.text import suppress_tokens
from model import make_network
from sample import SAMPLERS

# ---- The fast loop is the plain loop -------------------------------------------------------------


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """test_tables.py checks the entries; here their random numbers are replaced."""
    monkeypatch.setattr(SAMPLERS, "lacking", None)


def network_of(seed=0, **keys):
    """A small Transformer whose logits are far from flat."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 50}
    model = make_network(DEFAULTS | sizes | keys).eval()
    model.unembed.weight.data.mul_(4)
    return model


def requests_for(model, n, seed=0):
    """n requests with gaps anywhere, from none to everywhere; the first token tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(model.vocab_size, (n, model.block_size), generator=generator)  # (n, L)
    masked = torch.rand(x.shape, generator=generator) < torch.linspace(0, 1, n)[:, None]  # (n, L)
    x[masked] = model.mask_id
    x[:, 0] = torch.arange(n)
    return x


def plain_draw(logits, u, **keys):
    """Invert the distribution function: logits (..., V), u (...) -> tokens (...), p (...)."""
    keys = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | keys
    law = [plain_law(row, **keys) for row in logits.flatten(0, -2)]
    p = torch.tensor(law, dtype=torch.float64).view(logits.shape)  # (..., V)
    token = (p.cumsum(-1) <= u[..., None]).sum(-1)  # (...)
    return token, p.gather(-1, token[..., None]).squeeze(-1)


def guided(model, x, cond, cfg_scale):
    """Logits (B, L, V) everywhere, guided away from the same input without its condition."""
    c = model(x)
    if not cfg_scale:
        return c
    u = model(torch.where(cond, model.mask_id, x))
    return u + (1 + cfg_scale) * (c - u)


@torch.no_grad()
def textbook_sample(model, x, unmask_step, noise, cfg_scale=0.0, **keys):
    """The plain sampler: the whole softmax at every step, and only then a look at what is due."""
    cond = x != model.mask_id  # (B, L)
    for k in range(int(unmask_step.max()) + 1):
        token, _ = plain_draw(guided(model, x, cond, cfg_scale), noise, **keys)  # (B, L)
        x = torch.where(unmask_step == k, token, x)  # (B, L)
    return x


CASES = [(s, c, n) for s in TIMED for c, n in [("loglinear", 5), ("cosine", 12), ("geometric", 30)]]
CASES += [(s, "loglinear", 1) for s in ONE_BY_ONE]


@pytest.mark.parametrize(("sampler", "schedule", "steps"), CASES)
def test_the_fast_sampler_gives_the_tokens_of_the_textbook_sampler(sampler, schedule, steps):
    model = network_of()
    x = requests_for(model, 12)
    noise = philox.uniforms(3, 1, range(12), 16)  # (N, L)
    step = unmask_steps(x == model.mask_id, sampler, steps, schedule, seed=3)  # (N, L)
    plain = textbook_sample(model, x, step, noise)
    assert torch.equal(sample(model, x, sampler, steps, schedule, seed=3, batch_size=5)[0], plain)


@pytest.mark.parametrize(
    "keys",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.6},
        {"cfg_scale": 1.5},
        {"temperature": 0.7, "top_k": 5, "cfg_scale": -0.5},
    ],
)
def test_temperature_top_k_top_p_and_guidance_are_those_of_the_textbook_sampler(keys):
    model = network_of()
    x = requests_for(model, 12)
    step, noise = unmask_steps(x == 50, "ancestral", 6), philox.uniforms(0, 1, range(12), 16)
    tokens, _ = sample(model, x, "ancestral", 6, batch_size=5, **keys)
    assert torch.equal(tokens, textbook_sample(model, x, step, noise, **keys))
    assert not torch.equal(tokens, sample(model, x, "ancestral", 6)[0])


@torch.no_grad()
def plain_confidence(model, x, counts, seed, place, **keys):
    """One sequence (1, L) at a time: draw every masked token, keep the `count` likeliest."""
    for call, count in enumerate(counts):
        masked = x == model.mask_id  # (1, L)
        noise = philox.uniforms(seed, 2 + call, [place], x.shape[1])  # (1, L)
        token, p = plain_draw(model(x), noise, **keys)  # (1, L) each
        keep = p.where(masked, -1.0).topk(count).indices  # (1, count)
        x = x.scatter(1, keep, token.gather(1, keep))
    return x


@pytest.mark.parametrize("keys", [{}, {"temperature": 0.6}, {"top_k": 4}])
@pytest.mark.parametrize("sampler", ADAPTIVE)
def test_an_adaptive_order_unmasks_the_most_confident_tokens_of_each_sequence(sampler, keys):
    model = network_of()
    x = requests_for(model, 12)
    counts = counts_of(x == model.mask_id, sampler, 5)
    rows = [plain_confidence(model, x[i : i + 1], counts[i], 3, i, **keys) for i in range(12)]
    tokens, _ = sample(model, x, sampler, 5, seed=3, batch_size=5, **keys)
    assert torch.equal(tokens, torch.cat(rows))


# ---- Network calls -------------------------------------------------------------------------------


def watched(model, *arguments, **keys):
    """sample, and the inputs of each network call: (tokens, info, [(b, L), ...])."""
    seen, hidden = [], model.hidden
    model.hidden = lambda z, masked_idx: seen.append(z.clone()) or hidden(z, masked_idx)
    try:
        return *sample(model, *arguments, **keys), seen
    finally:
        model.hidden = hidden


@pytest.mark.parametrize(("sampler", "schedule", "steps"), CASES)
def test_the_nfe_of_a_sequence_is_the_number_of_its_distinct_unmasking_steps(
    sampler, schedule, steps
):
    model = network_of()
    x = requests_for(model, 30)
    _, info, seen = watched(model, x, sampler, steps, schedule, batch_size=7)
    step = unmask_steps(x == model.mask_id, sampler, steps, schedule)  # (N, L)
    distinct = [len(set(row) - {-1}) for row in step.tolist()]
    entered = torch.cat(seen)[:, 0].bincount(minlength=30)  # (N,) by the first token
    assert info["nfe"].tolist() == distinct == entered.tolist()


@pytest.mark.parametrize("sampler", ADAPTIVE)
def test_the_nfe_of_an_adaptive_order_is_the_length_of_its_num_transfer_tokens(sampler):
    model = network_of()
    x = requests_for(model, 30)
    _, info, seen = watched(model, x, sampler, 6, batch_size=7)
    counts = [len(each) for each in counts_of(x == model.mask_id, sampler, 6)]
    assert info["nfe"].tolist() == counts == torch.cat(seen)[:, 0].bincount(minlength=30).tolist()
    assert info["expected_nfe"] == pytest.approx(sum(counts) / 30)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("sampler", TIMED)
def test_the_mean_number_of_calls_is_the_expected_one(sampler, schedule, arbitrary):
    x = EMPTY.repeat(4000, 1)
    x[:2000, 1] = 0  # half of them have a token less to unmask
    _, info = sample(arbitrary, x, sampler, 5, schedule, batch_size=4000)
    mean, error = info["nfe"].double().mean().item(), info["nfe"].double().std().item() / 4000**0.5
    assert abs(mean - info["expected_nfe"]) < 4 * error
    unmask_prob = getattr(samplers, f"{sampler}_prob")
    r = samplers.unmask_schedule(diffusion.SCHEDULES[schedule], 5, unmask_prob)  # (steps,)
    full, less = samplers.expected_nfe(r, L), samplers.expected_nfe(r, L - 1)
    assert info["expected_nfe"] == pytest.approx((full + less) / 2)
    assert abs(mean - full) > 4 * error


@pytest.mark.parametrize("sampler", ONE_BY_ONE)
def test_one_token_at_a_time_takes_a_call_a_token(sampler, arbitrary):
    _, info = sample(arbitrary, torch.tensor([[V, V, V, V], [0, V, 1, V]]), sampler)
    assert info["nfe"].tolist() == [4, 2] and info["expected_nfe"] == 3.0


@pytest.mark.parametrize("sampler", ["ancestral", "any_order", "confidence"])
def test_a_finished_sequence_makes_room_so_that_calls_stay_full_to_the_end(sampler):
    model = network_of()
    x = requests_for(model, 50)
    _, info, seen = watched(model, x, sampler, 8, batch_size=6)
    sizes, nfe = [len(z) for z in seen], info["nfe"]
    assert sum(sizes) == nfe.sum() and sizes == sorted(sizes, reverse=True)
    assert sum(size < 6 for size in sizes) < nfe.max()  # only the last, once none is waiting
    assert len(sizes) < math.ceil(int(nfe.sum()) / 6) + nfe.max()


def test_the_head_works_on_the_tokens_that_are_unmasked_and_on_no_others():
    model = network_of()
    x, sizes, head = requests_for(model, 20), [], model.head
    model.head = lambda h: sizes.append(len(h)) or head(h)
    sample(model, x, "ancestral", 5)
    assert sum(sizes) == (x == model.mask_id).sum()


# ---- Conditions, options, and what a result depends on -------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gaps_are_filled_and_nothing_else_is_changed(sampler):
    model = network_of()
    x = requests_for(model, 20)
    before, cond = x.clone(), x != model.mask_id
    tokens, info = sample(model, x, sampler, 4, temperature=3.0)
    assert torch.equal(x, before) and torch.equal(tokens[cond], x[cond])
    assert (tokens < model.vocab_size).all() and (info["nfe"][cond.all(1)] == 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_depends_on_its_seed_and_its_place_and_not_on_the_batch(sampler):
    model = network_of()
    x = requests_for(model, 20)
    tokens, _ = sample(model, x, sampler, 4, seed=1)
    for n, batch_size in ((20, 1), (20, 7), (20, 100), (13, 16)):
        part, _ = sample(model, x[:n], sampler, 4, seed=1, batch_size=batch_size)
        assert torch.equal(part, tokens[:n])
    assert not torch.equal(sample(model, x, sampler, 4, seed=2)[0], tokens)
    twins, _ = sample(model, torch.full((6, 16), model.mask_id), sampler, 4, seed=1)
    assert len({tuple(row) for row in twins.tolist()}) == 6


@pytest.mark.parametrize("sampler", [*SAMPLERS, "ar"])
def test_a_suppressed_token_is_not_taken_and_the_law_of_the_rest_is_renormalised(sampler):
    causal = sampler == "ar"
    model = network_of(attention="causal" if causal else "full")
    keys = {"sampler": "left_to_right" if causal else sampler, "steps": 4, "seed": 1}
    x = requests_for(model, 20)
    if causal:  # it cannot see what follows a gap
        x[:, :4], x[:, 4:] = 1, model.mask_id
    plain, _ = sample(model, x, **keys)
    suppress = torch.where(torch.rand(x.shape) < 0.3, plain, -1)  # what would come at some places
    tokens, _ = sample(model, x, suppress=suppress, **keys)
    masked = x == model.mask_id
    assert (tokens != suppress)[masked].all() and (suppress >= 0)[masked].any()
    assert torch.equal(sample(model, x, suppress=torch.full_like(x, -1), **keys)[0], plain)
    logits = torch.randn(2, 5)
    whole = logits.softmax(1)
    suppress_tokens(logits, torch.tensor([3, -1]))
    law = logits.softmax(1)
    assert law[0, 3] == 0 and torch.equal(law[1], whole[1])
    assert torch.allclose(law[0, :3], whole[0, :3] / (1 - whole[0, 3]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_no_gap_the_network_is_not_asked(sampler):
    x = torch.tensor([[0, 1, 2, 0]])
    tokens, info, seen = watched(network_of(), x, sampler, 4)
    assert torch.equal(tokens, x) and seen == []
    assert info["nfe"].tolist() == [0] and info["expected_nfe"] in (0, None)


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "ancestal"}, "unknown sampler 'ancestal'; did you mean 'ancestral'?"),
        ({"sampler": "foo"}, "unknown sampler 'foo'; there is: ancestral, any_order, confidence,"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ({"step": 4}, "unknown key step; did you mean 'steps'?"),
        ({"cfg": 1.0}, "unknown key cfg; did you mean 'cfg_scale'?"),
        ({"autocast": None}, "unknown key autocast; there is: batch_size, "),
        ({"num_samples": 2}, "unknown key num_samples; there is: batch_size, cfg_scale, eta, "),
        ({"compile": True}, "unknown key compile; there is: batch_size, cfg_scale, eta, "),
        ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"top_p": "all"}, "top_p must be a number, not 'all'"),
    ],
)
def test_unknown_samplers_and_options_are_user_errors_also_from_python(options, says, attention):
    model = network_of(attention=attention)
    with pytest.raises(UserError) as error:
        decoding.sample(model, requests_for(model, 2), **options)
    assert says in str(error.value)


def test_a_sampler_that_leaves_a_mask_is_named_in_a_user_error(arbitrary, monkeypatch):
    def lazy(masked, o):
        step = torch.where(masked, 0, -1).index_fill(1, torch.tensor([1]), -1)  # (N, L)
        return samplers.FixedOrder(step, o["seed"])

    monkeypatch.setitem(SAMPLERS, "lazy", lazy)
    with pytest.raises(UserError, match="the sampler 'lazy' must unmask all, but leaves 2 tokens"):
        sample(arbitrary, EMPTY.repeat(2, 1), "lazy")


def test_options_that_are_left_out_are_the_defaults_of_the_program():
    model = network_of()
    x = requests_for(model, 12)
    options = {"sampler": "ancestral", "steps": 128, "temperature": 1.0, "seed": 1337}
    tokens, info = decoding.sample(model, x)
    explicit, other = decoding.sample(model, x, **options)
    assert torch.equal(tokens, explicit) and torch.equal(info["nfe"], other["nfe"])


# ---- Guidance ------------------------------------------------------------------------------------


def test_without_guidance_calls_have_their_plain_size_and_with_it_twice_that():
    model = network_of()
    x = requests_for(model, 10)
    _, info, plain = watched(model, x, steps=4, batch_size=4)
    _, _, doubled = watched(model, x, steps=4, batch_size=4, cfg_scale=0.5)
    assert [2 * len(z) for z in plain] == [len(z) for z in doubled]
    assert sum(map(len, plain)) == info["nfe"].sum()


@torch.no_grad()
def test_guidance_drives_the_logits_away_from_those_without_the_condition():
    model = network_of()
    x = torch.tensor([[3, 1, 50, 4, 50, 50, 9]])  # 4 was drawn; 3, 1 and 9 are the condition
    cond = torch.tensor([[True, True, False, False, False, False, True]])
    c, u = model(x)[0], model(torch.tensor([[50, 50, 50, 4, 50, 50, 50]]))[0]  # (L, V) each
    idx = torch.tensor([5, 2])
    for w in (0.0, 0.5, -1.0):
        logits = predict(model, x, idx, cond, w)  # (2, V)
        assert torch.allclose(logits, (u + (1 + w) * (c - u))[idx], atol=1e-5)


# ---- The causal baseline -------------------------------------------------------------------------


@torch.no_grad()
def plain_ar(model, x, noise, **keys):
    """Left to right, no cache, one sequence (1, L) at a time."""
    for i in range(x.shape[1]):
        if x[0, i] == model.mask_id:
            seen = torch.cat([torch.tensor([[model.start_id]]), x[:, :i]], dim=1)  # (1, 1 + i)
            x = x.clone()
            x[0, i] = plain_draw(model(seen)[:, -1], noise[:, i], **keys)[0]
    return x


@pytest.mark.parametrize("keys", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("start_id", [-1, 7])
def test_the_cached_causal_sampler_gives_the_tokens_of_the_uncached_loop(start_id, keys):
    model = network_of(attention="causal", start_id=start_id)
    x = torch.full((7, 16), model.mask_id)
    for i, length in enumerate([3, 0, 5, 1, 16, 15, 4]):  # prompts
        x[i, :length] = torch.arange(length) + i
    noise = philox.uniforms(5, 1, range(7), 16)  # (N, L)
    plain = torch.cat([plain_ar(model, x[i : i + 1], noise[i : i + 1], **keys) for i in range(7)])
    for batch_size in (1, 3, 16):
        tokens, _ = sample(model, x, seed=5, batch_size=batch_size, **keys)
        assert torch.equal(tokens, plain) and torch.equal(tokens[x != 50], x[x != 50])


def test_the_causal_sampler_reads_a_prompt_in_one_call_and_adds_one_token_a_call():
    model, seen = network_of(attention="causal"), []
    hidden = model.hidden
    model.hidden = lambda z, cache: seen.append(tuple(z.shape)) or hidden(z, cache=cache)
    x = torch.full((3, 16), model.mask_id)
    x[:, :5] = 1
    _, info = sample(model, x, batch_size=2)
    assert seen == [(2, 6), *[(2, 1)] * 10, (1, 6), *[(1, 1)] * 10]
    assert info["nfe"].tolist() == [11, 11, 11] and info["expected_nfe"] == 11.0


def test_the_causal_sampler_is_not_asked_where_nothing_is_wanted():
    model, x = network_of(attention="causal"), torch.ones(2, 16, dtype=torch.long)
    tokens, info = sample(model, x)
    assert torch.equal(tokens, x) and info["nfe"].tolist() == [0, 0]
