"""The laws of sampling: a draw, and what a sampler draws in all, has the law it should have.

sample() is a function of its noise, so its law can be had without sampling: `exact_law` feeds it
noise that stands for every order of unmasking and every outcome at once, and adds up their
probabilities. What it must equal is written here a second time.
"""

import itertools
import math
from collections import defaultdict
from statistics import NormalDist

import pytest
import torch
from conftest import L, V, states

import config as settings
import diffusion
import sample as decoding
import samplers
from lib import philox
from lib.stats import NotFinite
from sample import SAMPLERS
from samplers import step_to_call

TIMED = ["ancestral", "euler"]
ONE_BY_ONE = ["any_order", "left_to_right", "right_to_left"]
ADAPTIVE = ["confidence", "smdm_greedy"]
EMPTY = torch.full((1, L), V)  # everything is masked
TAIL = math.nextafter(1, 0)  # the largest uniform number


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """test_tables.py checks the entries; here their random numbers are replaced."""
    monkeypatch.setattr(SAMPLERS, "lacking", None)


def categorical(logits, u, **keys):
    """decoding.categorical with the defaults of the command."""
    usual = {key: decoding.DEFAULTS[key] for key in ("temperature", "top_k", "top_p")}
    return decoding.categorical(logits, u, **usual | keys)


def sample(model, x, sampler="ancestral", steps=128, schedule="loglinear", **options):
    """decoding.sample, the first options by their place, and with seed 0."""
    options = {"seed": 0, "sampler": sampler, "steps": steps, "schedule": schedule} | options
    return decoding.sample(model, x, **options)


def policy_of(masked, sampler, steps, schedule="loglinear", seed=0):
    """The policy of a sampler for the masks (N, L)."""
    options = {"sampler": sampler, "steps": steps, "schedule": schedule, "seed": seed}
    return SAMPLERS[sampler](masked, settings.options(options, *decoding.MODULES))


def unmask_steps(masked, *arguments, u=None, **keys):
    """The step at which the policy unmasks each position, from u if given: (N, L), -1: never."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        if u is not None:
            patch.setattr(philox, "uniforms", lambda *_: u)
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
        keys = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        token, p = categorical(logits.expand(n, -1), u, **keys)  # (n,) each
        law = plain_law(logits, temperature, top_k, top_p)
        law = torch.tensor(law, dtype=torch.float64)  # (V,)
        assert ((token.bincount(minlength=6) / n - law).abs() <= 1 / n).all()
        assert torch.allclose(p, law[token], rtol=1e-12)


def test_temperature_zero_takes_the_likeliest_token_and_says_how_likely_it_is():
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))  # (N, V)
    token, p = categorical(logits, torch.rand(20), temperature=0)
    assert torch.equal(token, logits.argmax(-1))
    assert torch.allclose(p, logits.double().softmax(-1).max(-1).values)


@pytest.mark.parametrize(
    "keys", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-310}], ids=str
)
def test_what_leaves_one_token_leaves_the_first_of_equally_likely_ones(keys):
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100  # (N,)
    for size in (4, 40):  # short and long rows are sorted in other ways
        logits = torch.full((size,), 2.0).index_fill(0, torch.arange(1, size - 1), 5.0)  # (V,)
        token, _ = categorical(logits.expand(100, -1), u, **keys)  # (N,)
        assert token.unique().tolist() == [1]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_top_k_keeps_exactly_k_whatever_is_equally_likely(k):
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # (N,)
    for logits in ([0.0] * 7, [1.0, 5.0, 5.0, 2.0, 5.0, 1.0, 1.0], [3.0, 3.0, 1.0] + [2.0] * 4):
        token, _ = categorical(torch.tensor(logits).expand(1000, -1), u, top_k=k)
        first = sorted(range(7), key=lambda v: -logits[v])[:k]  # stable, so the first of equals
        assert token.unique().tolist() == sorted(first)


@pytest.mark.parametrize("keys", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_logits_that_are_no_numbers_draw_nothing(odd, keys):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, odd, 1.0]])  # (N, V)
    with pytest.raises(NotFinite, match="1 of 2 probabilities of drawn tokens are nan or infinite"):
        categorical(logits, torch.tensor([0.5, 0.5]), **keys)
    logits[1, 1] = -math.inf  # a token that is never drawn
    assert categorical(logits, torch.tensor([0.5, 0.5]), **keys)[0][1] != 1


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
        patch.setattr(philox, "uniforms", lambda _, step, place, n: noise[step][list(place)])
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


RIGHT = samplers.unmask_schedule


def wrong_law(schedule, steps, unmask_prob):
    """The unmasking schedule with one percent of the second step left to the third."""
    law = RIGHT(schedule, steps, unmask_prob)
    moved = 0.01 * law[1]
    return law + torch.tensor([0, -moved, moved])


@pytest.mark.parametrize("sampler", TIMED)
def test_a_rate_that_is_off_by_one_percent_is_noticed(sampler, arbitrary, monkeypatch):
    monkeypatch.setattr(samplers, "unmask_schedule", wrong_law)
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
    monkeypatch.setattr(philox, "uniforms", lambda *_: one)
    assert misfit(drawn(network, "any_order"), joint) > 1


@torch.no_grad()
def adaptive_law(model, keep):
    """Draw every masked token, keep some, again: by recursion, [V] * L.

    keep(call, drawn {position: its token's p}, h {position: entropy}) -> positions that are kept.
    """
    law, finished = {(V,) * L: 1.0}, defaultdict(float)
    for call in range(L):
        after = defaultdict(float)
        for x, chance in law.items():
            p = model(torch.tensor([x]))[0].softmax(-1).tolist()  # (L, V)
            masked = [i for i in range(L) if x[i] == V]
            h = {i: -sum(q * math.log(q) for q in p[i]) for i in masked}
            for draw in itertools.product(range(V), repeat=len(masked)):
                drawn = dict(zip(masked, draw, strict=True))
                kept = keep(call, {i: p[i][v] for i, v in drawn.items()}, h)
                y = tuple(drawn[i] if i in kept else x[i] for i in range(L))
                (after if V in y else finished)[y] += chance * math.prod(
                    p[i][v] for i, v in drawn.items()
                )
        law = after
    assert not law
    each = [finished[tuple(x)] for x in states(V, L).tolist()]
    law = torch.tensor(each, dtype=torch.float64).view([V] * L)
    assert law.sum().item() == pytest.approx(1)
    return (law + 1e-9) / (1 + 1e-9 * law.numel())  # some sequences cannot come up


def likeliest(p, n):
    return sorted(p, key=lambda i: -p[i])[:n]


@pytest.mark.parametrize(
    ("steps", "counts"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (9, [1, 1, 1, 1])]
)
def test_samples_of_the_confidence_order_fit_its_definition(steps, counts, arbitrary):
    law = adaptive_law(arbitrary, lambda call, p, h: likeliest(p, counts[call]))
    assert misfit(drawn(arbitrary, "confidence", n=5000, steps=steps), law) < 1


def probable_enough(tau):
    return lambda call, p, h: {i for i in p if p[i] >= tau} | set(likeliest(p, 1))


def certain_enough(gamma):
    """The largest set, in order of entropy, whose sum without its largest is at most gamma."""

    def keep(call, p, h):
        order = sorted(h, key=h.get)
        return order[
            : max(n for n in range(1, len(h) + 1) if sum(map(h.get, order[: n - 1])) <= gamma)
        ]

    return keep


@pytest.mark.parametrize("bound", [0.5, 0.8])
def test_samples_of_threshold_and_entropy_bound_fit_their_definitions(bound, arbitrary):
    for sampler, keep, key in (
        ("threshold", probable_enough(bound), "threshold"),
        ("entropy_bound", certain_enough(bound), "max_entropy"),
    ):
        law = adaptive_law(arbitrary, keep)
        assert misfit(drawn(arbitrary, sampler, n=5000, **{key: bound}), law) < 1
        other = drawn(arbitrary, sampler, n=5000, **{key: bound / 4})
        assert misfit(other, law) > 1


@torch.no_grad()
def remasking_law(model, steps, schedule, sigma_of):
    """The law of ReMDM's process by its transitions, one position after the other: [V] * L."""
    t, x = torch.linspace(1, 0, steps + 1, dtype=torch.float64), states(V + 1, L)  # (S, L)
    alpha = (1 - diffusion.SCHEDULES[schedule](t)[0]).tolist()
    p = model(x).softmax(-1)  # (S, L, V)
    law = (x == V).all(1).double()  # (S,)
    for k in range(steps):
        now, then = alpha[k], alpha[k + 1]
        sigma = sigma_of(min(1.0, (1 - then) / now if now > 0 else 1.0))
        unmask = 1.0 if k == steps - 1 else (then - (1 - sigma) * now) / (1 - now)
        sigma = 0.0 if k == steps - 1 else sigma
        if_masked = torch.cat([unmask * p, torch.full_like(p[..., :1], 1 - unmask)], dim=-1)
        if_visible = (1 - sigma) * torch.nn.functional.one_hot(x, V + 1)
        if_visible[..., V] += sigma
        options = torch.where((x == V)[..., None], if_masked, if_visible)  # (S, L, V + 1)
        law = law @ torch.stack([options[:, i, x[:, i]] for i in range(L)]).prod(0)
    return law.view([V + 1] * L)[(slice(V),) * L]


@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
@pytest.mark.parametrize("sampler", ["remask", "remask_rescale"])
def test_samples_of_remasking_fit_the_process_though_idle_steps_are_skipped(
    sampler, schedule, arbitrary
):
    capped = sampler == "remask"
    sigma_of = lambda highest: min(0.3, highest) if capped else 0.3 * highest  # noqa: E731
    law = remasking_law(arbitrary, 5, schedule, sigma_of)
    assert law.sum().item() == pytest.approx(1)
    samples = drawn(arbitrary, sampler, steps=5, schedule=schedule, eta=0.3)
    assert misfit(samples, law) < 1
    other = remasking_law(arbitrary, 5, schedule, lambda highest: 0.0)
    assert misfit(samples, other) > 1


# ---- Steps and counts ----------------------------------------------------------------------------


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


def test_calls_count_the_distinct_steps_of_each_row():
    step = torch.tensor([[5, -1, 2, 5], [-1, -1, -1, -1], [0, 0, 0, 0], [3, 2, 1, 9]])
    assert step_to_call(step).tolist() == [[1, -1, 0, 1], [-1] * 4, [0] * 4, [2, 1, 0, 3]]
