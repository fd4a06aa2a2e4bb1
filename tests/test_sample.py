"""Sampling: what a sampler draws has the law it should have, at the NFE it says; conditions stay.

sample() is a function of its noise, so its law can be had without sampling: `exact_law` feeds it
noise that stands for every order of unmasking and every outcome at once, and adds up their
probabilities. What it must equal is written here a second time.
"""

import itertools
import json
import math
from collections import defaultdict
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from conftest import L, V, states

import config as settings
import diffusion
import sample as decoding
import samplers
from config import UserError
from data.tokenizer import Char
from lib import checkpoint
from model import DEFAULTS, Transformer
from sample import SAMPLERS, categorical, request
from samplers import step_to_call

TIMED = ["ancestral", "euler"]
ONE_BY_ONE = ["any_order", "left_to_right", "right_to_left"]
ADAPTIVE = ["confidence", "smdm_greedy"]
EMPTY = torch.full((1, L), V)  # everything is masked
TAIL = math.nextafter(1, 0)  # the largest uniform number


def sample(model, x, sampler="ancestral", steps=128, schedule="loglinear", **options):
    """decoding.sample, the first options by their place, and with seed 0."""
    options = {"seed": 0, "sampler": sampler, "steps": steps, "schedule": schedule} | options
    return decoding.sample(model, x, **options)


def policy_of(masked, sampler, steps, schedule="loglinear", seed=0):
    """The policy of a sampler for the masks (N, L)."""
    options = {"sampler": sampler, "steps": steps, "schedule": schedule, "seed": seed}
    return SAMPLERS[sampler](masked, settings.options(options, settings, diffusion, decoding))


def unmask_steps(masked, *arguments, u=None, **keys):
    """The step at which the policy unmasks each position, from u if given: (N, L), -1: never."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        if u is not None:
            patch.setattr(diffusion, "uniforms", lambda *_: u)
        patch.setattr(samplers, "step_to_call", lambda z: seen.append(z) or step_to_call(z))
        policy_of(masked, *arguments, **keys)
    return seen[0]


def counts_of(masked, sampler, steps):
    """How many tokens each call of an adaptive policy unmasks, for each of the masks (N, L)."""
    policy, counts = policy_of(masked, sampler, steps), [[] for _ in masked]
    done = torch.zeros(len(masked), dtype=torch.long)  # (N,)
    while len(live := policy.unfinished(done).nonzero().flatten()):
        due = policy.due(live, done[live])  # (b, L)
        p = torch.rand(due.shape).masked_fill(~due, -1.0)  # (b, L)
        for n, accepted in zip(live.tolist(), policy.accept(live, done[live], p, p), strict=True):
            counts[n].append(int(accepted.sum()))
        done[live] += 1
    return counts


# ---- The draw ------------------------------------------------------------------------------------


def plain_law(logits, temperature, top_k, top_p):
    """The probabilities that categorical must draw from, one list at a time: logits (V,)."""
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
def test_equally_spaced_uniforms_draw_each_token_as_often_as_its_probability(
    temperature, top_k, top_p
):
    n, generator = 10_000, torch.Generator().manual_seed(4)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # (n,)
    for logits in torch.randn(5, 6, generator=generator) * 2:
        token, p = categorical(logits.expand(n, -1), u, temperature, top_k, top_p)  # (n,) each
        law = plain_law(logits, temperature, top_k, top_p)
        law = torch.tensor(law, dtype=torch.float64)  # (V,)
        assert ((token.bincount(minlength=6) / n - law).abs() <= 1 / n).all()
        assert torch.allclose(p, law[token], rtol=1e-12)


def test_temperature_zero_takes_the_likeliest_token_and_says_how_likely_it_is():
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))  # (N, V)
    token, p = categorical(logits, torch.rand(20), temperature=0)
    assert torch.equal(token, logits.argmax(-1))
    assert torch.allclose(p, logits.double().softmax(-1).max(-1).values)


def test_tokens_of_probability_1e_12_come_up_as_often_as_they_should():
    logits = torch.tensor([0.0, 0.0, 1e-12, 3e-12]).log()  # (V,)
    # The last 1e-11 of all uniform numbers:
    u = 1 - 1e-11 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # (1000,)
    logits[1] = 0.0
    counts = categorical(logits.expand(1000, -1), u)[0].bincount(minlength=4)
    assert counts[0] == 0 and abs(counts[3] - 300) <= 1 and abs(counts[2] - 100) <= 1


@pytest.mark.parametrize("u", [0.0, TAIL])
def test_a_token_without_probability_is_never_drawn(u):
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf], [3.0, 5.0, 4.0, 3.0]])  # (2, V)
    token, _ = categorical(logits, torch.full((2,), u, dtype=torch.float64), top_k=2)
    assert set(token.tolist()) <= {1, 2}


# ---- The law of a sampler, by enumeration --------------------------------------------------------


def unmask_patterns(sampler, steps, schedule, n=1_000_000):
    """Noise that gives each pattern of steps once, and how likely each is: (P, L), (P,)."""
    if sampler in TIMED:  # how much of (0, 1) leads to each step is measured
        u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # (n,)
        every = torch.ones(1, n, dtype=torch.bool)
        step = unmask_steps(every, sampler, steps, schedule, u=u[None])[0]  # (n,)
        p = step.bincount(minlength=steps) / n  # (steps,)
        place = states(steps, L)  # (P, L)
        each = [u[step == k].mean() if p[k] else u[0] for k in range(steps)]
        return torch.stack(each)[place], p.double()[place].prod(1)
    noise = torch.tensor(list(itertools.permutations(range(L)))).double() / L  # (L!, L)
    return noise, torch.full((len(noise),), 1 / len(noise), dtype=torch.float64)


def exact_law(
    monkeypatch, model, sampler, steps=1, schedule="loglinear", x=EMPTY, batch_size=10**6
):
    """The probability of each sequence, [V] * L, under sample() itself.

    It is run once, on all patterns x all outcomes.
    """
    unmask, chance = unmask_patterns(sampler, steps, schedule)
    P, T = len(unmask), V**L
    wanted = states(V, L).repeat(P, 1)  # (P * T, L)
    code = V * torch.arange(P * T)[:, None] + wanted  # (P * T, L) the noise says what to draw
    log_p = torch.zeros(P * T, dtype=torch.float64)

    def forced(logits, u, *_):
        row, token = u.long() // V, u.long() % V  # (n,) each
        p = logits.double().softmax(-1).gather(-1, token[:, None]).squeeze(-1)  # (n,)
        log_p.index_add_(0, row, p.log())
        return token, p

    noise = [unmask.repeat_interleave(T, 0), code.double()]
    x = x.expand(P * T, -1)  # (P * T, L)
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "uniforms", lambda _, step, place, n: noise[step][list(place)])
        patch.setattr(decoding, "categorical", forced)
        tokens, _ = sample(model, x, sampler, steps, schedule, batch_size=batch_size)
    assert torch.equal(tokens, torch.where(x == V, wanted, x))
    law = torch.where((tokens == wanted).all(1), log_p.exp(), 0.0)  # an outcome that x forbids: 0
    return (chance @ law.view(P, T)).view([V] * L)


def transition(model, stay):
    """One step of the textbook: a mask stays with probability `stay`, or is drawn. -> (S, S)"""
    x = states(V + 1, L)  # (S, L)
    unmask = (1 - stay) * model(x).softmax(-1)  # (S, L, V)
    options = torch.cat([unmask, torch.full_like(unmask[..., :1], stay)], dim=-1)  # (S, L, V+1)
    options = torch.where((x == V)[..., None], options, torch.nn.functional.one_hot(x, V + 1))
    return torch.stack([options[:, i, x[:, i]] for i in range(L)]).prod(0)


@torch.no_grad()
def textbook_law(model, sampler, steps, schedule="loglinear", x=EMPTY):
    """The law of the reversed process in `steps` steps, by its transitions: [V] * L."""
    t, m_of = torch.linspace(1, 0, steps + 1, dtype=torch.float64), diffusion.SCHEDULES[schedule]
    law = (states(V + 1, L) == x).all(1).double()  # (S,)
    for k in range(steps):
        (m, dm), (m_next, _) = m_of(t[k]), m_of(t[k + 1])
        euler = (1 - (t[k] - t[k + 1]) * dm / m).clamp(min=0)
        stay = m_next / m if sampler == "ancestral" else euler
        law = law @ transition(model, 0.0 if k == steps - 1 else float(stay))
    return law.view([V + 1] * L)[(slice(V),) * L]


@torch.no_grad()
def chain_rule_law(model, orders):
    """The law of unmasking one position after the other, the mean over the orders: [V] * L."""
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
EXACT = 2e-6  # logits are float32, and the probability of a step is measured to 1e-6


@pytest.mark.parametrize("sampler", ONE_BY_ONE)
def test_one_token_at_a_time_has_the_law_of_the_joint(sampler, network, joint, monkeypatch):
    assert apart(exact_law(monkeypatch, network, sampler), joint) < EXACT


@pytest.mark.parametrize("sampler", ONE_BY_ONE)
def test_one_token_at_a_time_goes_in_its_order_also_where_orders_disagree(
    sampler, arbitrary, monkeypatch
):
    law = exact_law(monkeypatch, arbitrary, sampler)
    assert apart(law, chain_rule_law(arbitrary, ORDERS[sampler])) < EXACT
    for other in set(ONE_BY_ONE) - {sampler}:
        assert apart(law, chain_rule_law(arbitrary, ORDERS[other])) > 100 * EXACT


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("sampler", TIMED)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_in_time_have_the_law_of_the_textbook_process(
    sampler, steps, schedule, arbitrary, monkeypatch
):
    law = exact_law(monkeypatch, arbitrary, sampler, steps, schedule)
    assert law.sum().item() == pytest.approx(1, abs=EXACT)
    assert apart(law, textbook_law(arbitrary, sampler, steps, schedule)) < EXACT


def test_one_step_draws_every_position_from_its_marginal(network, joint, monkeypatch):
    marginals = [joint.sum([j for j in range(L) if j != i]) for i in range(L)]  # (V,) each
    independent = torch.einsum("a,b,c,d->abcd", *marginals)
    assert apart(exact_law(monkeypatch, network, "ancestral", 1), independent) < EXACT


@pytest.mark.parametrize("x", [[V, 2, V, V], [0, V, V, 1], [V, V, 1, 0]])
def test_what_is_not_masked_conditions_what_is_drawn(x, network, joint, arbitrary, monkeypatch):
    x = torch.tensor([x])  # (1, L)
    agree = torch.where(((x == V) | (states(V, L) == x)).all(1).view([V] * L), joint, 0.0)
    assert apart(exact_law(monkeypatch, network, "any_order", x=x), agree / agree.sum()) < EXACT
    law = exact_law(monkeypatch, arbitrary, "ancestral", 3, "cosine", x)
    assert apart(law, textbook_law(arbitrary, "ancestral", 3, "cosine", x)) < EXACT


def test_the_law_does_not_depend_on_how_many_sequences_share_a_call(arbitrary, monkeypatch):
    whole = exact_law(monkeypatch, arbitrary, "ancestral", 2)
    assert apart(exact_law(monkeypatch, arbitrary, "ancestral", 2, batch_size=97), whole) < 1e-12


RIGHT = diffusion.unmask_schedule


def wrong_law(schedule, steps, sampler):
    """The unmasking schedule with one percent of the second step left to the third."""
    law = RIGHT(schedule, steps, sampler)
    moved = 0.01 * law[1]
    return law + torch.tensor([0, -moved, moved])


@pytest.mark.parametrize("sampler", TIMED)
def test_a_rate_that_is_off_by_one_percent_is_noticed(sampler, arbitrary, monkeypatch):
    monkeypatch.setattr(diffusion, "unmask_schedule", wrong_law)
    for schedule in ("loglinear", "cosine"):
        law = exact_law(monkeypatch, arbitrary, sampler, 3, schedule)
        assert apart(law, textbook_law(arbitrary, sampler, 3, schedule)) > 10 * EXACT


# ---- The law of a sampler, by sampling -----------------------------------------------------------


def misfit(tokens, law):
    """Pearson's chi-square of sequences (N, L) against a law [V] * L; > 1 is a misfit.

    It is taken over its limit at a level of 1e-4, by Wilson and Hilferty.
    """
    place = V ** torch.arange(L - 1, -1, -1)
    expected = len(tokens) * law.flatten()  # (V^L,)
    counts = (tokens * place).sum(1).bincount(minlength=V**L)  # (V^L,)
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom, z = V**L - 1, NormalDist().inv_cdf(1 - 1e-4)
    return chi2 / (freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3)


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
    noise = torch.rand(10_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = noise.expand(-1, L)  # (N, L) the order and the tokens from one number
    monkeypatch.setattr(diffusion, "uniforms", lambda *_: one)
    assert misfit(drawn(network, "any_order"), joint) > 1


@torch.no_grad()
def confidence_law(model, counts):
    """Draw every masked token, keep the `count` likeliest, again: by recursion, [V] * L."""
    law = {(V,) * L: 1.0}
    for count in counts:
        after = defaultdict(float)
        for x, chance in law.items():
            p = model(torch.tensor([x]))[0].softmax(-1).tolist()  # (L, V)
            masked = [i for i in range(L) if x[i] == V]
            for draw in itertools.product(range(V), repeat=len(masked)):
                drawn = list(zip(masked, draw, strict=True))
                kept = dict(sorted(drawn, key=lambda pair: -p[pair[0]][pair[1]])[:count])
                y = tuple(kept.get(i, x[i]) for i in range(L))
                after[y] += chance * math.prod(p[i][v] for i, v in drawn)
        law = after
    each = [law[tuple(x)] for x in states(V, L).tolist()]
    return torch.tensor(each, dtype=torch.float64).view([V] * L)


@pytest.mark.parametrize(
    ("steps", "counts"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (9, [1, 1, 1, 1])]
)
def test_samples_of_the_confidence_order_fit_its_definition(steps, counts, arbitrary):
    law = confidence_law(arbitrary, counts)
    assert law.sum().item() == pytest.approx(1)
    law = (law + 1e-9) / (1 + 1e-9 * law.numel())  # some sequences cannot come up
    assert misfit(drawn(arbitrary, "confidence", n=5000, steps=steps), law) < 1


# ---- The fast loop is the plain loop -------------------------------------------------------------


def network_of(seed=0, **keys):
    """A small Transformer whose logits are far from flat."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 50}
    model = Transformer(DEFAULTS | sizes | keys).eval()
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
    """Inverts the distribution function: logits (..., V), u (...) -> tokens (...), p (...)."""
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
    noise = diffusion.uniforms(3, 1, range(12), 16)  # (N, L)
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
    step, noise = unmask_steps(x == 50, "ancestral", 6), diffusion.uniforms(0, 1, range(12), 16)
    tokens, _ = sample(model, x, "ancestral", 6, batch_size=5, **keys)
    assert torch.equal(tokens, textbook_sample(model, x, step, noise, **keys))
    assert not torch.equal(tokens, sample(model, x, "ancestral", 6)[0])


@torch.no_grad()
def plain_confidence(model, x, counts, seed, place, **keys):
    """One sequence (1, L) at a time: draw every masked token, keep the `count` likeliest."""
    for call, count in enumerate(counts):
        masked = x == model.mask_id  # (1, L)
        noise = diffusion.uniforms(seed, 2 + call, [place], x.shape[1])  # (1, L)
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


@pytest.mark.parametrize("n", [1, 2, 7, 30, 100])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_num_transfer_tokens_unmask_everything_and_those_of_confidence_are_even(n, steps):
    for counts in (samplers.evenly(n, steps), samplers.smdm_counts(n, steps)):
        assert sum(counts) == n and min(counts) >= 1 and len(counts) <= steps
    even = samplers.evenly(n, steps)
    assert len(even) == min(n, steps) and max(even) - min(even) <= 1
    masked = torch.arange(100)[None] < n  # (1, 100)
    assert counts_of(masked, "confidence", steps) == [even]
    assert counts_of(masked, "smdm_greedy", steps) == [samplers.smdm_counts(n, steps)]
    assert samplers.evenly(0, steps) == samplers.smdm_counts(0, steps) == []


def test_smdm_greedy_rounds_down_and_leaves_what_is_left_to_the_last_step():
    assert samplers.smdm_counts(10, 4) == [2, 2, 2, 4]
    assert samplers.smdm_counts(3, 8) == [1, 2]


# ---- Network calls -----------------------------------------------------------------------


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
    r = diffusion.unmask_schedule(diffusion.SCHEDULES[schedule], 5, sampler)  # (steps,)
    full, less = diffusion.expected_nfe(r, L), diffusion.expected_nfe(r, L - 1)
    assert info["expected_nfe"] == pytest.approx((full + less) / 2)
    assert abs(mean - full) > 4 * error


@pytest.mark.parametrize("sampler", ONE_BY_ONE)
def test_one_token_at_a_time_takes_a_call_a_token(sampler, arbitrary):
    _, info = sample(arbitrary, torch.tensor([[V, V, V, V], [0, V, 1, V]]), sampler)
    assert info["nfe"].tolist() == [4, 2] and info["expected_nfe"] == 3.0


def test_calls_count_the_distinct_steps_of_each_row():
    step = torch.tensor([[5, -1, 2, 5], [-1, -1, -1, -1], [0, 0, 0, 0], [3, 2, 1, 9]])
    assert step_to_call(step).tolist() == [[1, -1, 0, 1], [-1] * 4, [0] * 4, [2, 1, 0, 3]]


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
    plain, _ = sample(model, x, **keys)
    suppress = torch.where(torch.rand(x.shape) < 0.3, plain, -1)  # what would come at some places
    tokens, _ = sample(model, x, suppress=suppress, **keys)
    masked = x == model.mask_id
    assert (tokens != suppress)[masked].all() and (suppress >= 0)[masked].any()
    assert torch.equal(sample(model, x, suppress=torch.full_like(x, -1), **keys)[0], plain)
    logits = torch.randn(2, 5)
    whole = logits.softmax(1)
    decoding.suppress_tokens(logits, torch.tensor([3, -1]))
    law = logits.softmax(1)
    assert law[0, 3] == 0 and torch.equal(law[1], whole[1])
    assert torch.allclose(law[0, :3], whole[0, :3] / (1 - whole[0, 3]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_no_gap_the_network_is_not_asked(sampler):
    x = torch.tensor([[0, 1, 2, 0]])
    tokens, info, seen = watched(network_of(), x, sampler, 4)
    assert torch.equal(tokens, x) and seen == []
    assert info["nfe"].tolist() == [0] and info["expected_nfe"] == 0


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
        ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"top_p": "all"}, "top_p must be a number, not 'all'"),
    ],
)
def test_unknown_samplers_and_options_are_user_errors_also_from_python(options, says, attention):
    model = network_of(attention=attention)
    with pytest.raises(UserError) as error:
        decoding.sample(model, requests_for(model, 2), **options)
    assert says in str(error.value)


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
        logits = diffusion.predict(model, x, idx, cond, w)  # (2, V)
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
    x[3, 9] = 2  # also a condition in between
    noise = diffusion.uniforms(5, 1, range(7), 16)  # (N, L)
    plain = torch.cat([plain_ar(model, x[i : i + 1], noise[i : i + 1], **keys) for i in range(7)])
    for batch_size in (1, 3, 16):
        tokens, _ = sample(model, x, seed=5, batch_size=batch_size, **keys)
        assert torch.equal(tokens, plain) and torch.equal(tokens[x != 50], x[x != 50])


def test_the_causal_sampler_reads_a_prompt_in_one_call_and_adds_one_token_a_call():
    model, seen = network_of(attention="causal"), []
    hidden = model.hidden
    model.hidden = lambda z, cache: seen.append(tuple(z.shape)) or hidden(z, cache=cache)
    x = torch.full((3, 16), model.mask_id)
    x[:, :5], x[:, 9:] = 1, 2
    _, info = sample(model, x, batch_size=2)
    assert seen == [(2, 6), (2, 1), (2, 1), (2, 1), (1, 6), (1, 1), (1, 1), (1, 1)]
    assert info["nfe"].tolist() == [4, 4, 4] and info["expected_nfe"] == 4.0


def test_the_causal_sampler_is_not_asked_where_nothing_is_wanted():
    model, x = network_of(attention="causal"), torch.ones(2, 16, dtype=torch.long)
    tokens, info = sample(model, x)
    assert torch.equal(tokens, x) and info["nfe"].tolist() == [0, 0]


# ---- Requests ------------------------------------------------------------------------------------

TEXT = Char("abcdefghijklmnopqrstuvwxyz _.\n0123456789")
MASK, BLOCK = TEXT.vocab_size, 30


def network_for(mask_id, block_size, start_id=None):
    """All that a request asks of a network."""
    start_id = mask_id if start_id is None else start_id
    return SimpleNamespace(mask_id=mask_id, block_size=block_size, start_id=start_id)


def asked(**keys):
    """A request as text, with a # for each token that is wanted."""
    ids = request(TEXT, network_for(MASK, BLOCK), **keys)
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
    ("keys", "says"),
    [
        ({"template": "no gap"}, "the template has no gap: write ___12"),
        ({"template": "a ___ b"}, "the template has no gap: write ___12"),
        ({"template": "a ___0 b"}, "the template has no gap of one token or more"),
        ({"template": "a ___30"}, "the template is 32 tokens, the block 30"),
        ({"template": "a ___" + "9" * 50}, "longer than the block (30)"),
        ({"template": "___3", "prompt": "a"}, "give --template or --prompt and --suffix, not both"),
        ({"template": "___3", "length": 9}, "length"),
        ({"length": 31}, "length must be at most block_size 30, not 31"),
        (
            {"prompt": "a" * 30},
            "prompt and suffix are 30 tokens, which leaves nothing of length 30 to fill",
        ),
        ({"prompt": "a" * 99}, "prompt and suffix are 99 tokens"),
        ({"prompt": "abc", "suffix": "de", "length": 5}, "prompt and suffix are 5 tokens"),
        ({"prompt": "naïve"}, "character 'ï' is not among the 40"),
        ({"template": "___3 ï"}, "character 'ï' is not among the 40"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(keys, says):
    with pytest.raises(UserError) as error:
        asked(**keys)
    assert says in str(error.value) and len(str(error.value)) < 300


# ---- The program ---------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    """program(**keys) -> what sample.main returns, for a small saved model."""

    def run(attention="full", **keys):
        model = network_of(vocab_size=MASK, block_size=BLOCK, attention=attention)
        config = model.config | {"objective": "ar" if attention == "causal" else "any_order"}
        state = {"config": config, "tokenizer": TEXT.meta(), "model": model.state_dict()}
        checkpoint.save(tmp_path / "ckpt.pt", state | {"ema": None, "step": 1})
        defaults = settings.defaults_of([settings, diffusion, decoding])
        own = {"ckpt": str(tmp_path), "device": "cpu", "dtype": "float32", "user_keys": list(keys)}
        return decoding.main(defaults | own | keys)

    return run


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_program_prints_each_sample_and_its_calls_beside_the_expected_number(
    sampler, program, capsys
):
    records = program(sampler=sampler, steps=4, num_samples=3, template="the ___3 of a\n___5.")
    out = capsys.readouterr().out
    for i, record in enumerate(records, start=1):
        assert f"---- sample {i}: {record['nfe']} network calls\n{record['text']}\n" in out
        text = record["text"]
        assert text.startswith("the ") and text[7:13] == " of a\n" and text.endswith(".")
        assert TEXT.decode(record["tokens"]) == record["text"] and len(record["tokens"]) == 19
    assert f"---- NFE {sum(r['nfe'] for r in records) / 3:.1f} a sequence, expected " in out


def test_samples_are_also_written_to_a_file(program, tmp_path):
    out = tmp_path / "new" / "samples.jsonl"
    records = program(num_samples=5, prompt="the ", length=9, out=str(out), batch_size=2)
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert len(records) == 5


def test_the_seed_decides_and_the_batch_size_does_not(program):
    texts = [
        [record["text"] for record in program(seed=seed, batch_size=b)]
        for seed, b in ((1, 16), (1, 3), (2, 16))
    ]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 4


def test_a_causal_network_continues_a_prompt(program):
    records = program(attention="causal", prompt="the ", num_samples=3)
    assert all(record["text"].startswith("the ") and record["nfe"] == 26 for record in records)


@pytest.mark.parametrize(
    "keys",
    [
        {"suffix": "."},
        {"template": "___3"},
        {"cfg_scale": 1.0},
        {"sampler": "ancestral"},
        {"sampler": "confidence"},
    ],
)
def test_a_causal_network_refuses_what_it_cannot_do(keys, program):
    with pytest.raises(UserError, match="causal"):
        program(attention="causal", **keys)
    program(attention="causal", sampler="left_to_right", num_samples=1)


class Marked(Char):
    """A tokenizer whose documents begin with id 0.

    As Llama's does, it encodes the beginning of a text otherwise than what follows.
    """

    bos = 0

    def encode(self, text, start=True):
        return super().encode(text if start else text.upper())


def test_a_text_at_the_beginning_follows_bos_unless_the_network_reads_that_by_itself():
    text = Marked(" abABMN")

    def asked(start_id=None, **keys):
        ids = request(text, network_for(text.vocab_size, 9, start_id), **keys)
        return "".join(text.decode([i]) for i in ids)

    assert asked(prompt="ab", length=5) == " ab██"
    assert asked(prompt="ab", length=5, start_id=0) == "ab███"
    assert asked(template="a___2b") == " a██B" and asked(template="___2b") == "██B"
    assert asked(prompt="a", suffix="b", length=4) == " a█B" and asked(length=3) == "███"
