"""Decoding: what each sampler draws has exactly the law it should have, at the price it says, and what was given stays.

sample() is a function of its noise, so its law can be had without sampling: `exact_law` feeds it noise that stands for every
reveal pattern and every outcome at once, and adds up their probabilities. What it must equal is written here a second time.
"""

import itertools
import json
import math
from collections import defaultdict
from statistics import NormalDist

import pytest
import torch
from conftest import L, V, states

import checkpoint
import config as settings
import diffusion
import sample as decoding
from config import UserError
from data.tokenizer import Char
from model import DEFAULTS, Transformer
from sample import calls, categorical, draw_reveal_step, predict, quotas, request, sample, sample_ar

TIMED = ["ancestral", "euler"]
ONE_BY_ONE = ["any_order", "left_to_right", "right_to_left"]
EMPTY = torch.full((1, L), V)  # nothing is given
TAIL = math.nextafter(1, 0)  # the largest uniform number


# ---- The draw ----------------------------------------------------------------------------------------------------------


def plain_law(logits, temperature, top_k, top_p):
    """The probabilities that categorical must draw from, one list at a time: logits (V,) -> [p, ...]"""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda v: -p[v])
    kept = order[: top_k or len(p)]
    total = sum(p[v] for v in kept)
    before = itertools.accumulate((p[v] for v in kept), initial=0.0)
    nucleus = [v for v, mass in zip(kept, before, strict=False) if mass < top_p * total]
    total = sum(p[v] for v in nucleus)
    return [p[v] / total if v in nucleus else 0.0 for v in range(len(p))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.3, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 1, 1.0),
        (1.0, 0, 0.7),
        (0.8, 4, 0.9),
        (1.0, 99, 1e-9),
    ],
)
def test_equally_spaced_uniforms_draw_each_token_as_often_as_its_probability(temperature, top_k, top_p):
    n, generator = 10_000, torch.Generator().manual_seed(4)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # (n,)
    for logits in torch.randn(5, 6, generator=generator) * 2:
        token, p = categorical(logits.expand(n, -1), u, temperature, top_k, top_p)  # (n,) each
        law = torch.tensor(plain_law(logits, temperature, top_k, top_p), dtype=torch.float64)  # (V,)
        assert ((token.bincount(minlength=6) / n - law).abs() <= 1 / n).all()
        assert torch.allclose(p, law[token], rtol=1e-12)


def test_temperature_zero_takes_the_likeliest_token_and_says_how_likely_it_is():
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))  # (N, V)
    token, p = categorical(logits, torch.rand(20), temperature=0)
    assert torch.equal(token, logits.argmax(-1))
    assert torch.allclose(p, logits.double().softmax(-1).max(-1).values)


def test_tokens_of_probability_1e_12_come_up_as_often_as_they_should():
    logits = torch.tensor([0.0, 0.0, 1e-12, 3e-12]).log()  # (V,)
    u = 1 - 1e-11 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # the last 1e-11 of all uniform numbers
    logits[1] = 0.0
    counts = categorical(logits.expand(1000, -1), u)[0].bincount(minlength=4)
    assert counts[0] == 0 and abs(counts[3] - 300) <= 1 and abs(counts[2] - 100) <= 1


@pytest.mark.parametrize("u", [0.0, TAIL])
def test_a_token_without_probability_is_never_drawn(u):
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf], [3.0, 5.0, 4.0, 3.0]])  # (2, V)
    token, _ = categorical(logits, torch.full((2,), u, dtype=torch.float64), top_k=2)
    assert set(token.tolist()) <= {1, 2}


# ---- The law of a sampler, by enumeration ------------------------------------------------------------------------------


def reveal_patterns(sampler, steps, schedule, n=1_000_000):
    """Noise that gives each reveal pattern once, and how likely each is: (P, L), (P,)."""
    if sampler in TIMED:  # how much of (0, 1) leads to each step is measured
        u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # (n,)
        step = draw_reveal_step(torch.ones(1, n, dtype=torch.bool), sampler, steps, schedule, u[None])[0]  # (n,)
        chance = step.bincount(minlength=steps) / n  # (steps,)
        place = states(steps, L)  # (P, L)
        some_u = torch.stack([u[step == k].mean() if chance[k] else u[0] for k in range(steps)])  # (steps,)
        return some_u[place], chance.double()[place].prod(1)
    noise = torch.tensor(list(itertools.permutations(range(L)))).double() / L  # (L!, L)
    return noise, torch.full((len(noise),), 1 / len(noise), dtype=torch.float64)


def exact_law(monkeypatch, model, sampler, steps=0, schedule="loglinear", x=EMPTY, batch_size=10**6):
    """The probability of each sequence, [V] * L, under sample() itself, run on all patterns x all outcomes at once."""
    reveal, chance = reveal_patterns(sampler, steps, schedule)
    P, T = len(reveal), V**L
    wanted = states(V, L).repeat(P, 1)  # (P * T, L)
    code = V * torch.arange(P * T)[:, None] + wanted  # (P * T, L) the noise tells the draw what to give
    log_p = torch.zeros(P * T, dtype=torch.float64)

    def forced(logits, u, *_):
        row, token = u.long() // V, u.long() % V  # (n,) each
        p = logits.double().softmax(-1).gather(-1, token[:, None]).squeeze(-1)  # (n,)
        log_p.index_add_(0, row, p.log())
        return token, p

    noise = [reveal.repeat_interleave(T, 0), code.double()]
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "uniforms", lambda seed, step, position, n: noise[step])
        patch.setattr(decoding, "categorical", forced)
        tokens, _ = sample(model, x.expand(P * T, -1), sampler, steps, schedule, batch_size=batch_size)
    assert torch.equal(tokens, torch.where(x == V, wanted, x))
    law = torch.where((tokens == wanted).all(1), log_p.exp(), 0.0).view(P, T)  # outcomes that clash with x are others'
    return (chance @ law).view([V] * L)


def transition(model, stay):
    """One step of the textbook: each hidden token stays with chance `stay`, else is drawn. -> (S, S) from row to column"""
    x = states(V + 1, L)  # (S, L)
    reveal = (1 - stay) * model(x).softmax(-1)  # (S, L, V)
    options = torch.cat([reveal, torch.full_like(reveal[..., :1], stay)], dim=-1)  # (S, L, V+1)
    options = torch.where((x == V)[..., None], options, torch.nn.functional.one_hot(x, V + 1))
    return torch.stack([options[:, i, x[:, i]] for i in range(L)]).prod(0)


@torch.no_grad()
def textbook_law(model, sampler, steps, schedule="loglinear", x=EMPTY):
    """The law of the reversed process taken in `steps` steps, from the definition of its transitions: [V] * L."""
    t, m_of = torch.linspace(1, 0, steps + 1, dtype=torch.float64), diffusion.SCHEDULES[schedule]
    law = (states(V + 1, L) == x).all(1).double()  # (S,)
    for k in range(steps):
        (m, dm), (m_next, _) = m_of(t[k]), m_of(t[k + 1])
        stay = m_next / m if sampler == "ancestral" else (1 - (t[k] - t[k + 1]) * dm / m).clamp(min=0)
        law = law @ transition(model, 0.0 if k == steps - 1 else float(stay))
    return law.view([V + 1] * L)[(slice(V),) * L]


@torch.no_grad()
def chain_rule_law(model, orders):
    """The law of revealing one position after the other, the mean over the orders: [V] * L."""
    x0, law = states(V, L), 0.0
    for order in orders:
        x, p = torch.full_like(x0, V), torch.ones(len(x0), dtype=torch.float64)
        for i in order:
            p = p * model(x)[:, i].softmax(-1).gather(-1, x0[:, i, None]).squeeze(-1)
            x[:, i] = x0[:, i]
        law = law + p / len(orders)
    return law.view([V] * L)


def apart(a, b):
    """The largest difference between two laws."""
    return float((a - b).abs().max())


ORDERS = {
    "any_order": list(itertools.permutations(range(L))),
    "left_to_right": [range(L)],
    "right_to_left": [range(L)[::-1]],
}
EXACT = 2e-6  # logits are float32, and the chance of a reveal step is measured to 1e-6


@pytest.mark.parametrize("sampler", ONE_BY_ONE)
def test_one_token_at_a_time_has_the_law_of_the_joint(sampler, network, joint, monkeypatch):
    assert apart(exact_law(monkeypatch, network, sampler), joint) < EXACT


@pytest.mark.parametrize("sampler", ONE_BY_ONE)
def test_one_token_at_a_time_goes_in_its_order_also_where_orders_disagree(sampler, arbitrary, monkeypatch):
    law = exact_law(monkeypatch, arbitrary, sampler)
    assert apart(law, chain_rule_law(arbitrary, ORDERS[sampler])) < EXACT
    for other in set(ONE_BY_ONE) - {sampler}:
        assert apart(law, chain_rule_law(arbitrary, ORDERS[other])) > 100 * EXACT


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("sampler", TIMED)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_in_time_have_the_law_of_the_textbook_process(sampler, steps, schedule, arbitrary, monkeypatch):
    law = exact_law(monkeypatch, arbitrary, sampler, steps, schedule)
    assert law.sum().item() == pytest.approx(1, abs=EXACT)
    assert apart(law, textbook_law(arbitrary, sampler, steps, schedule)) < EXACT


def test_one_step_draws_every_position_from_its_marginal(network, joint, monkeypatch):
    marginals = [joint.sum([j for j in range(L) if j != i]) for i in range(L)]  # (V,) each
    independent = torch.einsum("a,b,c,d->abcd", *marginals)
    assert apart(exact_law(monkeypatch, network, "ancestral", 1), independent) < EXACT


@pytest.mark.parametrize("given", [[V, 2, V, V], [0, V, V, 1], [V, V, 1, 0]])
def test_what_is_given_conditions_what_is_drawn(given, network, joint, arbitrary, monkeypatch):
    x = torch.tensor([given])  # (1, L)
    agree = torch.where(((x == V) | (states(V, L) == x)).all(1).view([V] * L), joint, 0.0)
    assert apart(exact_law(monkeypatch, network, "any_order", x=x), agree / agree.sum()) < EXACT
    law = exact_law(monkeypatch, arbitrary, "ancestral", 3, "cosine", x)
    assert apart(law, textbook_law(arbitrary, "ancestral", 3, "cosine", x)) < EXACT


def test_the_law_does_not_depend_on_how_many_sequences_share_a_call(arbitrary, monkeypatch):
    whole = exact_law(monkeypatch, arbitrary, "ancestral", 2)
    assert apart(exact_law(monkeypatch, arbitrary, "ancestral", 2, batch_size=97), whole) < 1e-12


RIGHT = diffusion.reveal_law


def wrong_law(schedule, steps, sampler):
    """The reveal law with one percent of what the second step reveals left to the third."""
    law = RIGHT(schedule, steps, sampler)
    moved = 0.01 * law[1]
    return law + torch.tensor([0, -moved, moved])


@pytest.mark.parametrize("sampler", TIMED)
def test_a_rate_that_is_off_by_one_percent_is_noticed(sampler, arbitrary, monkeypatch):
    monkeypatch.setattr(diffusion, "reveal_law", wrong_law)
    for schedule in ("loglinear", "cosine"):
        law = exact_law(monkeypatch, arbitrary, sampler, 3, schedule)
        assert apart(law, textbook_law(arbitrary, sampler, 3, schedule)) > 10 * EXACT


# ---- The law of a sampler, by sampling ---------------------------------------------------------------------------------


def misfit(tokens, law):
    """Pearson's chi-square of sequences (N, L) against a law [V] * L, over its limit at a level of 1e-4; > 1 is a misfit."""
    place = V ** torch.arange(L - 1, -1, -1)
    expected = len(tokens) * law.flatten()  # (V^L,)
    chi2 = ((((tokens * place).sum(1)).bincount(minlength=V**L) - expected) ** 2 / expected).sum().item()
    freedom, z = V**L - 1, NormalDist().inv_cdf(1 - 1e-4)
    return chi2 / (freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3)  # Wilson and Hilferty


def drawn(model, sampler, n=10_000, **keys):
    return sample(model, EMPTY.expand(n, -1), sampler, seed=6, batch_size=n, **keys)[0]


@pytest.mark.parametrize("sampler", ONE_BY_ONE)
def test_samples_drawn_one_token_at_a_time_fit_the_joint(sampler, network, joint):
    assert misfit(drawn(network, sampler), joint) < 1


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("sampler", TIMED)
def test_samples_drawn_in_steps_fit_the_textbook_process(sampler, steps, arbitrary):
    tokens = drawn(arbitrary, sampler, steps=steps, schedule="cosine")
    assert misfit(tokens, textbook_law(arbitrary, sampler, steps, "cosine")) < 1


def test_samples_of_a_wrong_law_do_not_fit(network, joint, monkeypatch):
    assert misfit(drawn(network, "any_order", temperature=0.9), joint) > 1
    assert misfit(drawn(network, "ancestral", steps=2), textbook_law(network, "ancestral", 3)) > 1
    same_noise = torch.rand(10_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(-1, L)
    monkeypatch.setattr(diffusion, "uniforms", lambda *_: same_noise)  # the order and the tokens from one number
    assert misfit(drawn(network, "any_order"), joint) > 1


@torch.no_grad()
def confidence_law(model, counts):
    """Draw every hidden token, keep the `count` likeliest of them, again and again; by recursion over states: [V] * L."""
    law = {(V,) * L: 1.0}
    for count in counts:
        after = defaultdict(float)
        for x, chance in law.items():
            p = model(torch.tensor([x]))[0].softmax(-1).tolist()  # (L, V)
            hidden = [i for i in range(L) if x[i] == V]
            for draw in itertools.product(range(V), repeat=len(hidden)):
                sure = sorted(zip(hidden, draw, strict=True), key=lambda pair: -p[pair[0]][pair[1]])[:count]
                y = tuple(dict(sure).get(i, x[i]) for i in range(L))
                after[y] += chance * math.prod(p[i][v] for i, v in zip(hidden, draw, strict=True))
        law = after
    return torch.tensor([law[tuple(x)] for x in states(V, L).tolist()], dtype=torch.float64).view([V] * L)


@pytest.mark.parametrize(("steps", "counts"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (9, [1, 1, 1, 1])])
def test_samples_of_the_confidence_order_fit_its_definition(steps, counts, arbitrary):
    law = confidence_law(arbitrary, counts)
    assert law.sum().item() == pytest.approx(1)
    law = (law + 1e-9) / (1 + 1e-9 * law.numel())  # some sequences cannot come up
    assert misfit(drawn(arbitrary, "confidence", n=5000, steps=steps), law) < 1


# ---- The fast loop is the plain loop -----------------------------------------------------------------------------------


def network_of(seed=0, **keys):
    """A small Transformer whose logits are far from flat."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 50}
    model = Transformer(DEFAULTS | sizes | keys).eval()
    model.unembed.weight.data.mul_(4)
    return model


def requests_for(model, n, seed=0):
    """n requests of block_size tokens with gaps anywhere, from none to everywhere; the first token tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(model.vocab_size, (n, model.block_size), generator=generator)  # (n, L)
    hidden = torch.rand(x.shape, generator=generator) < torch.linspace(0, 1, n)[:, None]  # (n, L)
    x[hidden] = model.mask_id
    x[:, 0] = torch.arange(n)
    return x


def plain_draw(logits, u, **keys):
    """Inverts the distribution function: logits (..., V), u (...) -> tokens (...), p (...)."""
    flat, law = logits.flatten(0, -2), []
    for row in flat:
        law.append(plain_law(row, keys.get("temperature", 1.0), keys.get("top_k", 0), keys.get("top_p", 1.0)))
    p = torch.tensor(law, dtype=torch.float64).view(logits.shape)  # (..., V)
    token = (p.cumsum(-1) <= u[..., None]).sum(-1)  # (...)
    return token, p.gather(-1, token[..., None]).squeeze(-1)


def guided(model, x, given, cfg):
    """Logits (B, L, V) everywhere, guided away from the same input without what was given."""
    c = model(x)
    if not cfg:
        return c
    u = model(torch.where(given, model.mask_id, x))
    return u + (1 + cfg) * (c - u)


@torch.no_grad()
def textbook_sample(model, x, reveal_step, noise, cfg=0.0, **keys):
    """The plain sampler: the whole softmax at every step, and only then a look at who is to be revealed."""
    given = x != model.mask_id  # (B, L)
    for k in range(int(reveal_step.max()) + 1):
        token, _ = plain_draw(guided(model, x, given, cfg), noise, **keys)  # (B, L)
        x = torch.where(reveal_step == k, token, x)  # (B, L)
    return x


def reveal_steps(x, model, sampler, steps, schedule="loglinear", seed=0):
    u = diffusion.uniforms(seed, 0, range(len(x)), x.shape[1])  # (N, L)
    return draw_reveal_step(x == model.mask_id, sampler, steps, schedule, u)  # (N, L)


CASES = [(s, c, n) for s in TIMED for c, n in [("loglinear", 5), ("cosine", 12), ("geometric", 30)]]
CASES += [(s, "loglinear", 0) for s in ONE_BY_ONE]


@pytest.mark.parametrize(("sampler", "schedule", "steps"), CASES)
def test_the_fast_sampler_gives_the_tokens_of_the_textbook_sampler(sampler, schedule, steps):
    model = network_of()
    x = requests_for(model, 12)
    noise = diffusion.uniforms(3, 1, range(12), 16)  # (N, L)
    plain = textbook_sample(model, x, reveal_steps(x, model, sampler, steps, schedule, seed=3), noise)
    assert torch.equal(sample(model, x, sampler, steps, schedule, seed=3, batch_size=5)[0], plain)


@pytest.mark.parametrize(
    "keys", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"cfg": 1.5}, {"temperature": 0.7, "top_k": 5, "cfg": -0.5}]
)
def test_temperature_top_k_top_p_and_guidance_are_those_of_the_textbook_sampler(keys):
    model = network_of()
    x = requests_for(model, 12)
    plain = textbook_sample(
        model, x, reveal_steps(x, model, "ancestral", 6), diffusion.uniforms(0, 1, range(12), 16), **keys
    )
    found, _ = sample(model, x, "ancestral", 6, batch_size=5, **keys)
    assert torch.equal(found, plain)
    assert not torch.equal(found, sample(model, x, "ancestral", 6)[0])


@torch.no_grad()
def plain_confidence(model, x, counts, seed, place, **keys):
    """One sequence (1, L) at a time: draw every hidden token, keep the likeliest `count` of them."""
    for call, count in enumerate(counts):
        hidden = x == model.mask_id  # (1, L)
        token, p = plain_draw(model(x), diffusion.uniforms(seed, 2 + call, [place], x.shape[1]), **keys)  # (1, L) each
        keep = p.where(hidden, -1.0).topk(count).indices  # (1, count)
        x = x.scatter(1, keep, token.gather(1, keep))
    return x


@pytest.mark.parametrize("keys", [{}, {"temperature": 0.6}, {"top_k": 4}])
@pytest.mark.parametrize("sampler", ["confidence", "smdm_greedy"])
def test_an_adaptive_order_reveals_the_surest_tokens_of_each_sequence(sampler, keys):
    model = network_of()
    x = requests_for(model, 12)
    counts = [quotas(int(n), sampler, 5) if n else [] for n in (x == model.mask_id).sum(1)]
    rows = [plain_confidence(model, x[i : i + 1], counts[i], 3, i, **keys) for i in range(12)]
    assert torch.equal(sample(model, x, sampler, 5, seed=3, batch_size=5, **keys)[0], torch.cat(rows))


@pytest.mark.parametrize("n", [1, 2, 7, 30, 100])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_quotas_reveal_everything_and_those_of_confidence_are_even(n, steps):
    for sampler in ("confidence", "smdm_greedy"):
        counts = quotas(n, sampler, steps)
        assert sum(counts) == n and min(counts) >= 1 and len(counts) <= steps
    even = quotas(n, "confidence", steps)
    assert len(even) == min(n, steps) and max(even) - min(even) <= 1


# ---- What a sequence costs ---------------------------------------------------------------------------------------------


def watched(model, *arguments, **keys):
    """sample, and the inputs of each network call: (tokens, info, [(b, L), ...])."""
    seen, hidden = [], model.hidden
    model.hidden = lambda z, rows: seen.append(z.clone()) or hidden(z, rows)
    try:
        return *sample(model, *arguments, **keys), seen
    finally:
        model.hidden = hidden


@pytest.mark.parametrize(("sampler", "schedule", "steps"), CASES)
def test_a_sequence_costs_a_call_for_each_of_its_distinct_reveal_steps_and_no_more(sampler, schedule, steps):
    model = network_of()
    x = requests_for(model, 30)
    _, info, seen = watched(model, x, sampler, steps, schedule, batch_size=7)
    distinct = [len(set(row.tolist()) - {-1}) for row in reveal_steps(x, model, sampler, steps, schedule)]
    entered = torch.cat(seen)[:, 0].bincount(minlength=30)  # (N,) the first token tells sequences apart
    assert info["nfe"].tolist() == distinct == entered.tolist()


@pytest.mark.parametrize("sampler", ["confidence", "smdm_greedy"])
def test_an_adaptive_order_costs_a_call_for_each_quota(sampler):
    model = network_of()
    x = requests_for(model, 30)
    _, info, seen = watched(model, x, sampler, 6, batch_size=7)
    counts = [len(quotas(int(n), sampler, 6)) if n else 0 for n in (x == model.mask_id).sum(1)]
    assert info["nfe"].tolist() == counts == torch.cat(seen)[:, 0].bincount(minlength=30).tolist()
    assert info["expected_nfe"] == pytest.approx(sum(counts) / 30)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("sampler", TIMED)
def test_the_mean_number_of_calls_is_the_expected_one(sampler, schedule, arbitrary):
    x = EMPTY.repeat(4000, 1)
    x[:2000, 1] = 0  # half of them have a token less to reveal
    _, info = sample(arbitrary, x, sampler, 5, schedule, batch_size=4000)
    nfe = info["nfe"].double()
    assert abs(nfe.mean().item() - info["expected_nfe"]) < 4 * nfe.std().item() / math.sqrt(4000)
    law = diffusion.reveal_law(diffusion.SCHEDULES[schedule], 5, sampler)
    assert info["expected_nfe"] == pytest.approx((diffusion.expected_nfe(law, L) + diffusion.expected_nfe(law, L - 1)) / 2)
    assert abs(nfe.mean().item() - diffusion.expected_nfe(law, L)) > 4 * nfe.std().item() / math.sqrt(4000)


@pytest.mark.parametrize("sampler", ONE_BY_ONE)
def test_one_token_at_a_time_costs_a_call_a_token(sampler, arbitrary):
    _, info = sample(arbitrary, torch.tensor([[V, V, V, V], [0, V, 1, V]]), sampler)
    assert info["nfe"].tolist() == [4, 2] and info["expected_nfe"] == 3.0


def test_calls_count_the_distinct_steps_of_each_row():
    step = torch.tensor([[5, -1, 2, 5], [-1, -1, -1, -1], [0, 0, 0, 0], [3, 2, 1, 9]])
    assert calls(step).tolist() == [[1, -1, 0, 1], [-1] * 4, [0] * 4, [2, 1, 0, 3]]


@pytest.mark.parametrize("sampler", ["ancestral", "any_order", "confidence"])
def test_a_finished_sequence_makes_room_so_that_calls_stay_full_until_the_queue_is_empty(sampler):
    model = network_of()
    x = requests_for(model, 50)
    _, info, seen = watched(model, x, sampler, 8, batch_size=6)
    sizes, nfe = [len(z) for z in seen], info["nfe"]
    assert sum(sizes) == nfe.sum() and sizes == sorted(sizes, reverse=True)
    assert sum(size < 6 for size in sizes) < nfe.max()  # only the last sequences, once nobody is waiting
    assert len(sizes) < math.ceil(int(nfe.sum()) / 6) + nfe.max()


def test_the_head_works_on_the_tokens_that_are_revealed_and_on_no_others():
    model = network_of()
    x, rows, head = requests_for(model, 20), [], model.head
    model.head = lambda h: rows.append(len(h)) or head(h)
    sample(model, x, "ancestral", 5)
    assert sum(rows) == (x == model.mask_id).sum()


# ---- What is given, and what a result depends on -----------------------------------------------------------------------

ALL = decoding.SAMPLERS


@pytest.mark.parametrize("sampler", ALL)
def test_gaps_are_filled_and_nothing_else_is_changed(sampler):
    model = network_of()
    x = requests_for(model, 20)
    before, given = x.clone(), x != model.mask_id
    tokens, info = sample(model, x, sampler, 4, temperature=3.0)
    assert torch.equal(x, before) and torch.equal(tokens[given], x[given])
    assert (tokens < model.vocab_size).all() and (info["nfe"][given.all(1)] == 0).all()


@pytest.mark.parametrize("sampler", ALL)
def test_a_sample_depends_on_its_seed_and_its_place_and_not_on_the_batch(sampler):
    model = network_of()
    x = requests_for(model, 20)
    tokens, _ = sample(model, x, sampler, 4, seed=1)
    for n, batch_size in ((20, 1), (20, 7), (20, 100), (13, 16)):
        assert torch.equal(sample(model, x[:n], sampler, 4, seed=1, batch_size=batch_size)[0], tokens[:n])
    assert not torch.equal(sample(model, x, sampler, 4, seed=2)[0], tokens)
    twins, _ = sample(model, torch.full((6, 16), model.mask_id), sampler, 4, seed=1)
    assert len({tuple(row) for row in twins.tolist()}) == 6


@pytest.mark.parametrize("sampler", [*ALL, "ar"])
def test_a_banned_token_is_not_taken_at_its_place_and_the_law_of_the_rest_is_renormalised(sampler):
    model = network_of(causal=sampler == "ar")
    fill = (
        (lambda x, **keys: sample_ar(model, x, **keys))
        if sampler == "ar"
        else lambda x, **keys: sample(model, x, sampler, 4, **keys)
    )
    x = requests_for(model, 20)
    plain, _ = fill(x, seed=1)
    ban = torch.where(torch.rand(x.shape) < 0.3, plain, -1)  # what would come at some places
    tokens, _ = fill(x, seed=1, ban=ban)
    hidden = x == model.mask_id
    assert (tokens != ban)[hidden].all() and (ban >= 0)[hidden].any()
    assert torch.equal(fill(x, seed=1, ban=torch.full_like(x, -1))[0], plain)
    logits = torch.randn(2, 5)
    kept = logits.clone()
    decoding.forbid(logits, torch.tensor([3, -1]))
    law, whole = logits.softmax(1), kept.softmax(1)
    assert law[0, 3] == 0 and torch.allclose(law[0, :3], whole[0, :3] / (1 - whole[0, 3])) and torch.equal(law[1], whole[1])


@pytest.mark.parametrize("sampler", ALL)
def test_with_no_gap_the_network_is_not_asked(sampler):
    x = torch.tensor([[0, 1, 2, 0]])
    tokens, info, seen = watched(network_of(), x, sampler, 4)
    assert torch.equal(tokens, x) and info["nfe"].tolist() == [0] and info["expected_nfe"] == 0 and seen == []


# ---- Guidance ----------------------------------------------------------------------------------------------------------


def test_without_guidance_calls_have_their_plain_size_and_with_it_twice_that():
    model = network_of()
    x = requests_for(model, 10)
    _, info, plain = watched(model, x, steps=4, batch_size=4)
    _, _, doubled = watched(model, x, steps=4, batch_size=4, cfg=0.5)
    assert [2 * len(z) for z in plain] == [len(z) for z in doubled] and sum(map(len, plain)) == info["nfe"].sum()


@torch.no_grad()
def test_guidance_drives_the_logits_away_from_those_without_what_was_given():
    model = network_of()
    x = torch.tensor([[3, 1, 50, 4, 50, 50, 9]])  # 4 was drawn, 3, 1 and 9 given
    given = torch.tensor([[True, True, False, False, False, False, True]])
    c, u = model(x)[0], model(torch.tensor([[50, 50, 50, 4, 50, 50, 50]]))[0]  # (L, V) each
    rows = torch.tensor([5, 2])
    for w in (0.0, 0.5, -1.0):
        assert torch.allclose(predict(model, x, rows, given, w), (u + (1 + w) * (c - u))[rows], atol=1e-5)


# ---- The causal baseline -----------------------------------------------------------------------------------------------


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
    model = network_of(causal=True, start_id=start_id)
    x = torch.full((7, 16), model.mask_id)
    for i, length in enumerate([3, 0, 5, 1, 16, 15, 4]):  # prompts
        x[i, :length] = torch.arange(length) + i
    x[3, 9] = 2  # also a token given in between
    noise = diffusion.uniforms(5, 1, range(7), 16)  # (N, L)
    plain = torch.cat([plain_ar(model, x[i : i + 1], noise[i : i + 1], **keys) for i in range(7)])
    for batch_size in (1, 3, 16):
        tokens, _ = sample_ar(model, x, seed=5, batch_size=batch_size, **keys)
        assert torch.equal(tokens, plain) and torch.equal(tokens[x != 50], x[x != 50])


def test_the_causal_sampler_reads_a_prompt_in_one_call_and_then_adds_one_token_a_call():
    model, seen = network_of(causal=True), []
    hidden = model.hidden
    model.hidden = lambda z, cache: seen.append(tuple(z.shape)) or hidden(z, cache=cache)
    x = torch.full((3, 16), model.mask_id)
    x[:, :5], x[:, 9:] = 1, 2
    _, info = sample_ar(model, x, batch_size=2)
    assert seen == [(2, 6), (2, 1), (2, 1), (2, 1), (1, 6), (1, 1), (1, 1), (1, 1)]
    assert info["nfe"].tolist() == [4, 4, 4] and info["expected_nfe"] == 4.0


def test_the_causal_sampler_is_not_asked_where_nothing_is_wanted():
    model, x = network_of(causal=True), torch.ones(2, 16, dtype=torch.long)
    tokens, info = sample_ar(model, x)
    assert torch.equal(tokens, x) and info["nfe"].tolist() == [0, 0]


# ---- Requests ----------------------------------------------------------------------------------------------------------

TEXT = Char("abcdefghijklmnopqrstuvwxyz _.\n0123456789")
MASK, BLOCK = TEXT.vocab_size, 30


def asked(**keys):
    """A request as text, with a # for each token that is wanted."""
    ids = request(TEXT, MASK, BLOCK, **keys)
    return "".join("#" if i == MASK else TEXT.decode([i]) for i in ids)


def test_without_a_prompt_a_whole_block_is_wanted_or_as_many_tokens_as_asked_for():
    assert asked() == "#" * 30 and asked(length=7) == "#" * 7


def test_a_prompt_begins_and_a_suffix_ends_the_sample():
    assert asked(prompt="the list ", length=12) == "the list ###"
    assert asked(suffix="end.") == "#" * 26 + "end."
    assert asked(prompt="a", suffix="b", length=3) == "a#b"


def test_a_template_has_gaps_anywhere():
    assert asked(template="the ___4 of a ___2.") == "the #### of a ##."
    assert asked(template="___3") == "###" and asked(template="___1___2 a") == "### a"
    assert asked(template="a __1 ____2") == "a __1 _##"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"template": "no gap"}, "the template has no gap: write ___12"),
        ({"template": "a ___ b"}, "the template has no gap: write ___12"),
        ({"template": "a ___0 b"}, "the template has no gap of one token or more"),
        ({"template": "a ___30"}, "the template is 32 tokens, the block 30"),
        ({"template": "a ___" + "9" * 50}, "longer than the block (30)"),
        ({"template": "___3", "prompt": "a"}, "give --template or --prompt and --suffix, not both"),
        ({"template": "___3", "length": 9}, "length"),
        ({"length": 31}, "length must be at most block_size 30, not 31"),
        ({"prompt": "a" * 30}, "prompt and suffix are 30 tokens, which leaves nothing of length 30 to fill"),
        ({"prompt": "a" * 99}, "prompt and suffix are 99 tokens"),
        ({"prompt": "abc", "suffix": "de", "length": 5}, "prompt and suffix are 5 tokens"),
        ({"prompt": "naïve"}, "character 'ï' is not among the 40"),
        ({"template": "___3 ï"}, "character 'ï' is not among the 40"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(keys, told):
    with pytest.raises(UserError) as error:
        asked(**keys)
    assert told in str(error.value) and len(str(error.value)) < 300


# ---- The program -------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    """program(**keys) -> what sample.main returns, for a small saved model; `causal` is its kind."""

    def run(causal=False, **keys):
        model = network_of(vocab_size=MASK, block_size=BLOCK, causal=causal)
        state = {"config": model.config | {"objective": "ar" if causal else "any_order"}, "tokenizer": TEXT.meta()}
        checkpoint.save(tmp_path / "ckpt.pt", state | {"model": model.state_dict(), "ema": None, "step": 1})
        given = {"ckpt": str(tmp_path), "device": "cpu", "dtype": "float32", "given": list(keys)}
        return decoding.main(settings.DEFAULTS | diffusion.DEFAULTS | decoding.DEFAULTS | given | keys)

    return run


@pytest.mark.parametrize("sampler", ALL)
def test_the_program_prints_each_sample_and_its_calls_beside_the_expected_number(sampler, program, capsys):
    records = program(sampler=sampler, steps=4, num_samples=3, template="the ___3 of a\n___5.")
    out = capsys.readouterr().out
    for i, record in enumerate(records, start=1):
        assert f"---- sample {i}: {record['nfe']} network calls\n{record['text']}\n" in out
        assert record["text"].startswith("the ") and record["text"][7:13] == " of a\n" and record["text"].endswith(".")
        assert TEXT.decode(record["tokens"]) == record["text"] and len(record["tokens"]) == 19
    assert f"---- NFE {sum(r['nfe'] for r in records) / 3:.1f} a sequence, expected " in out


def test_samples_are_also_written_to_a_file(program, tmp_path):
    out = tmp_path / "new" / "samples.jsonl"
    records = program(num_samples=5, prompt="the ", length=9, out=str(out), batch_size=2)
    assert [json.loads(line) for line in out.read_text().splitlines()] == records and len(records) == 5


def test_the_seed_decides_and_the_batch_size_does_not(program):
    texts = [[record["text"] for record in program(seed=seed, batch_size=b)] for seed, b in ((1, 16), (1, 3), (2, 16))]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 4


def test_a_causal_network_continues_a_prompt(program):
    records = program(causal=True, prompt="the ", num_samples=3)
    assert all(record["text"].startswith("the ") and record["nfe"] == 26 for record in records)


@pytest.mark.parametrize(
    "keys", [{"suffix": "."}, {"template": "___3"}, {"cfg": 1.0}, {"sampler": "ancestral"}, {"sampler": "confidence"}]
)
def test_a_causal_network_refuses_what_it_cannot_do(keys, program):
    with pytest.raises(UserError, match="causal"):
        program(causal=True, **keys)
    program(causal=True, sampler="left_to_right", num_samples=1)


class Marked(Char):
    """A tokenizer whose documents begin with id 0, and which, as Llama's does, begins a text otherwise than it goes on."""

    bos = 0

    def encode(self, text, start=True):
        return super().encode(text if start else text.upper())


def test_a_text_at_the_beginning_follows_bos_unless_the_network_reads_that_by_itself():
    text = Marked(" abABMN")

    def asked(**keys):
        return "".join(text.decode([i]) for i in request(text, text.vocab_size, 9, **keys))

    assert asked(prompt="ab", length=5) == " ab██" and asked(prompt="ab", length=5, start_id=0) == "ab███"
    assert asked(template="a___2b") == " a██B" and asked(template="___2b") == "██B"
    assert asked(prompt="a", suffix="b", length=4) == " a█B" and asked(length=3) == "███"
