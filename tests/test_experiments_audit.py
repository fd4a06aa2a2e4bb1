"""The loss audit and annealing: expectations against enumeration, laws against draws."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import L, Table, V, random_joint, score_entropy, states, true_conditionals
from plain import DEFAULTS

import config as settings
import diffusion
import lib.program
import sample
from data import writer
from data.tokenizer import Char
from experiments import annealing, loss_audit, results
from lib.device import machine
from model import make_network
from run import checkpoint

TEXT = "the cat sat on the mat; a dog ran to the log. " * 20
X0 = states(V, L)  # (V^L, L)
RIGHT = 5  # the first rules: the four right ones and the mean over each sequence's masked tokens
BELOW = [
    "constant weight 1 (mean over all)",
    "15% masked (BERT), mean over masked",
    "one at a time (pseudo-likelihood)",
    loss_audit.BYTES,
    "1/lambda, lambda up to 0.15",
]


# ---- The audit: what each rule expects -----------------------------------------------------------


def entropy_of(joint):
    return -(joint * np.log(joint)).sum() / joint.ndim


@pytest.mark.parametrize(("V", "L", "seed"), [(3, 4, 1), (3, 4, 2), (2, 6, 3), (5, 2, 4)])
def test_the_right_rules_expect_the_entropy_and_the_wrong_ones_do_not(V, L, seed):
    joint = loss_audit.tiny_joint(V, L, seed)
    h = loss_audit.exact_terms(joint)
    numbers = {name: float(h @ a) + extra for name, (a, extra) in loss_audit.rules(L).items()}
    off = [abs(number - entropy_of(joint)) for number in numbers.values()]
    assert max(off[:RIGHT]) < 1e-10 and min(off[RIGHT:]) > 1e-5
    assert all(numbers[name] < entropy_of(joint) - 1e-3 for name in BELOW)


@pytest.mark.parametrize("seed", range(10))
def test_h_k_grows_with_k_so_that_the_pseudo_likelihood_is_below_the_entropy(seed):
    joint = loss_audit.tiny_joint(seed=seed)
    h = loss_audit.exact_terms(joint)
    assert (h.diff() > 0).all() and h[0] < entropy_of(joint) < h[-1]


def test_enumerated_terms_are_the_losses_of_a_network_with_the_true_conditionals():
    joint = random_joint()
    network, h = Table(true_conditionals(joint)), loss_audit.exact_terms(joint.numpy())
    for k in range(1, L + 1):
        masks = [[i in mask for i in range(L)] for mask in itertools.combinations(range(L), k)]
        masks = torch.tensor(masks)  # (R, L)
        x0, mask = X0.repeat_interleave(len(masks), 0), masks.repeat(len(X0), 1)  # (V^L * R, L)
        weight = torch.full((len(x0),), 1 / k, dtype=torch.float64)
        _, nats = diffusion.nelbo(network, x0, mask, weight)
        mean = float(joint.flatten() @ nats.view(len(X0), -1).mean(1))
        assert mean == pytest.approx(float(h[k - 1]), abs=1e-12)


def agrees(samples, expected):
    """The mean of independent rows (n, L) is `expected` (L,), within 5 standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    return (np.abs(samples.mean(0) - expected.numpy()) < 5 * error + 1e-12).all()


M_AND_WEIGHT = {
    "lambda_dce: 1/lambda": lambda t: (t, 1 / t),
    "t_dce: m'/m, cosine masking": lambda t: (
        np.sin(np.pi / 2 * t),
        np.pi / 2 / np.tan(np.pi / 2 * t),
    ),
    "constant weight 2": lambda t: (t, 2 + 0 * t),
    "1/t, cosine masking": lambda t: (np.sin(np.pi / 2 * t), 1 / t),
    "1/lambda, lambda in 0.3..0.8": lambda t: (0.3 + 0.5 * t, 1 / (0.3 + 0.5 * t)),
    "1/lambda, lambda up to 0.15": lambda t: (0.15 * t, 1 / (0.15 * t)),
    "1/(1-t), t up to 0.999": lambda t: (0.999 * t, 1 / (1 - 0.999 * t)),
    "t_dce with RADD's scalar": lambda t: (0.999 * (1e-3 + 0.999 * t), 1 / (1e-3 + 0.999 * t)),
}


@pytest.mark.parametrize("name", M_AND_WEIGHT)
def test_a_rule_of_m_and_weight_is_what_drawing_it_gives(name):
    generator = np.random.default_rng(1)
    m, weight = M_AND_WEIGHT[name](1 - generator.random(400_000))
    k = generator.binomial(6, m)  # (n,)
    samples = (weight * k / 6)[:, None] * (k[:, None] == np.arange(1, 7))  # (n, 6)
    a, _ = loss_audit.rules(6)[name]
    assert agrees(samples, a) and not agrees(samples, 1.1 * a)


MEANS = {"mean over masked, each sequence": (1, None), "mean over masked, batch of 32": (32, None)}
MEANS |= {
    "half masked, mean over masked": (32, 0.5),
    "15% masked (BERT), mean over masked": (32, 0.15),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_masked_tokens_is_what_drawing_batches_gives(name):
    (batch, fixed), generator = MEANS[name], np.random.default_rng(1)
    m = generator.random((20_000, batch)) if fixed is None else fixed
    k = generator.binomial(6, m, (20_000, batch))
    k = k[k.sum(1) > 0]  # (n, batch)
    samples = np.stack([(k * (k == j)).sum(1) / k.sum(1) for j in range(1, 7)], 1)  # (n, 6)
    a, _ = loss_audit.rules(6)[name]
    assert agrees(samples, a) and not agrees(samples, 1.1 * a)


def test_a_weight_that_is_taken_twice_counts_the_terms_by_one_over_k():
    t, dt = loss_audit.quadrature()
    a, _ = loss_audit.rules(6)["1/lambda of the mean over masked"]
    assert torch.allclose(a, (dt / t) @ loss_audit.binomial(6, t)[:, 1:], atol=1e-10)


def test_a_constant_of_bytes_a_token_scales_the_bound_by_that_of_the_text_over_it():
    rules, (own, other) = loss_audit.rules(6), loss_audit.BYTES_A_TOKEN
    assert torch.allclose(rules[loss_audit.BYTES][0] * other, rules[loss_audit.BOUND][0] * own)
    assert own < other and set(loss_audit.WHY) <= set(rules)


def test_score_entropy_of_a_normalised_network_expects_the_entropy_as_well():
    joint, table = random_joint(), true_conditionals(random_joint())
    t, dt = loss_audit.quadrature()
    m, dm = diffusion.loglinear(t)  # (T,)
    place = (V + 1) ** torch.arange(L - 1, -1, -1)
    total = 0.0
    for mask in states(2, L).bool():
        log_p = table[(torch.where(mask, V, X0) * place).sum(1)][:, mask]  # (V^L, k, V)
        log_score = log_p[:, :, None] + ((1 - m) / m).log()[:, None]  # (V^L, k, T, V)
        x0 = X0[:, mask, None].expand(-1, -1, len(t))  # (V^L, k, T)
        loss = torch.zeros(len(X0), len(t), dtype=torch.float64)  # (V^L, T) with nothing masked
        if mask.any():
            loss = score_entropy(log_score, x0, m, dm).sum(1)  # (V^L, T)
        total += joint.flatten() @ loss @ (dt * m ** mask.sum() * (1 - m) ** (~mask).sum())
    assert float(total) / L == pytest.approx(entropy_of(joint.numpy()), abs=1e-10)


def test_an_integral_may_be_singular_at_its_ends():
    t, dt = loss_audit.quadrature()
    assert float(dt @ t.log()) == pytest.approx(-1, abs=1e-11)
    assert float(dt @ (1 - t).log()) == pytest.approx(-1, abs=1e-11)
    t, dt = loss_audit.quadrature(2, 5)
    assert float(dt @ t**3) == pytest.approx((5**4 - 2**4) / 4, abs=1e-9)


# ---- The audit of a model ------------------------------------------------------------------------


def test_the_masks_of_a_block_mask_k_for_each_k_and_no_position_twice():
    masks, k = loss_audit.masks_of(12, number=3, seed=5)
    assert torch.equal(masks.sum(1), k)
    for size in range(1, 13):
        mine = masks[k == size]
        assert len(mine) == 12 // size and mine.sum(0).max() == 1
    assert not torch.equal(loss_audit.masks_of(12, number=4, seed=5)[0], masks)


def test_measured_terms_are_the_networks_cross_entropies(network):
    blocks = [row.numpy() for row in X0[:5]]
    _, autocast = machine(settings.DEFAULTS | {"device": "cpu"})
    with autocast():
        h = loss_audit.measured_terms(network, blocks, seed=1, batch_size=3)
    log_p = network.logits.detach()
    for s, x0 in enumerate(X0[:5]):
        place = (V + 1) ** torch.arange(L - 1, -1, -1)
        every = log_p[-1].gather(-1, x0[:, None]).squeeze(-1)  # (L,) all are masked
        alone = [
            log_p[(x0.index_fill(0, torch.tensor(i), V) * place).sum(), i, x0[i]] for i in range(L)
        ]
        assert float(h[s, -1]) == pytest.approx(-float(every.mean()), rel=1e-5)
        assert float(h[s, 0]) == pytest.approx(-float(sum(alone)) / L, rel=1e-5)


def test_an_audit_says_equal_within_its_error_and_compares_on_the_same_draws():
    torch.manual_seed(1)
    # Blocks differ by more than k does:
    h = 1 + torch.rand(50, 1, dtype=torch.float64) + torch.arange(4) / 10  # (S, L)
    audited = loss_audit.audit(h, loss_audit.rules(4))
    number, half, difference, error, says = audited["one at a time (pseudo-likelihood)"]
    assert difference == pytest.approx(-0.15) and error < 1e-9 < half and says == "**below**"
    assert number == pytest.approx(float(h[:, 0].mean()))
    assert audited["lambda_dce: 1/lambda"][-1] == "equal"
    noisy = h + torch.randn(50, 4, dtype=torch.float64)
    audited = loss_audit.audit(noisy, loss_audit.rules(4))
    assert audited["1/lambda, lambda from 0.001 (SMDM)"][-1] == "equal"


# ---- Annealing: the law of a draw ----------------------------------------------------------------


def test_a_zipf_law_in_steps_has_every_token_once_and_all_mass():
    for size in (5, 104, 50257):
        p, count = annealing.zipf(size)
        assert count.sum() == size and (p * count).sum() == pytest.approx(1)
        assert (np.diff(p) < 0).all()
    p, _ = annealing.zipf(50257)
    assert p[3] == pytest.approx(p[0] / 4)


def test_the_law_of_a_draw_is_that_of_all_noises_enumerated():
    p, bits = np.array([0.055, 0.13, 0.815]), 4
    E = -np.log(np.arange(16) / 16 + annealing.TINY)  # (16,)
    noises = np.stack(np.meshgrid(E, E, E, indexing="ij"), -1).reshape(-1, 3)  # (16^3, 3)
    wins = np.bincount((p / noises).argmax(1), minlength=3) / 16**3
    assert annealing.draw_law(p, np.ones(3, int), bits) == pytest.approx(wins, abs=1e-12)
    assert annealing.draw_law(p, np.ones(3, int), 24) == pytest.approx(p, rel=1e-3)


def histogram(tokens, size):
    return np.bincount(tokens.numpy(), minlength=size) / len(tokens)


def close(shares, law, n):
    return (np.abs(shares - law) < 5 * np.sqrt(law * (1 - law) / n) + 1e-9).all()


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_gumbel_max_draws_by_that_law(dtype):
    p, unmask, n = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01]), 1 / 30, 400_000
    generator = torch.Generator().manual_seed(1)
    tokens = annealing.gumbel_max(p.expand(n, -1), unmask, getattr(torch, dtype), generator)
    right = law = np.append(p.numpy() * unmask, 1 - unmask)
    if dtype in annealing.BITS:
        law = annealing.draw_law(right, np.ones(6, int), annealing.BITS[dtype])
    assert close(histogram(tokens, 6), law, n)
    if dtype in annealing.BITS:
        assert not close(histogram(tokens, 6), right, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gumbel_max_is_the_argmax_over_tokens_and_mask_where_no_token_is_left_out(
    dtype, monkeypatch
):
    p, kind = torch.tensor([[0.5, 0.3, 0.2]] * 1000), getattr(torch, dtype)
    drawn = iter([torch.rand(1000, dtype=kind), torch.rand(3000, dtype=kind)])
    mask_u, token_u = first = list(drawn)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: first.pop(0))
    tokens = annealing.gumbel_max(p, 1.0 - 1e-9, kind, None)  # so likely that every token can win
    u = torch.cat([token_u.view(1000, 3), mask_u[:, None]], 1).float()  # (1000, 4)
    law = torch.cat([p * (1.0 - 1e-9), torch.full((1000, 1), 1e-9)], 1)
    assert torch.equal(tokens, (law / -(u + annealing.TINY).log()).argmax(1))


def test_float32_noise_loses_entropy_and_is_late_with_many_steps_and_many_tokens():
    many = [annealing.first_step(50257, n, 24) for n in (16, 256, 4096)]
    for key in ("entropy", "unmasked"):
        assert many[0][key] > many[1][key] > many[2][key]
    few, (p, count) = annealing.first_step(104, 256, 24), annealing.zipf(104)
    entropy = -(count * p * np.log(p)).sum()
    assert few["lost"] == 0 and few["entropy"] == pytest.approx(entropy, rel=1e-3)
    assert many[2]["lost"] > 0.3 and annealing.onset(104, 24) > 4096 > annealing.onset(50257, 24)


def test_the_textbook_sampler_in_float64_draws_from_the_same_law_as_ours(network):
    n, steps = 6000, 3
    x = torch.full((n, L), V)
    x[:, 2] = 1  # a condition
    plain, calls = annealing.textbook(network, x, steps, torch.float64, seed=1, batch_size=10**6)
    ours, info = sample.sample(network, x, steps=steps, seed=2, batch_size=10**6)
    place = V ** torch.arange(L - 1, -1, -1)
    a, b = (histogram((tokens * place).sum(1), V**L) for tokens in (plain, ours))
    seen = (a + b) > 10 / n
    chi2 = (n * (a - b) ** 2 / (a + b + 1e-300))[seen].sum()
    assert chi2 < seen.sum() + 4 * math.sqrt(2 * seen.sum())
    assert (plain[:, 2] == 1).all() and plain.max() < V
    spread = math.sqrt(float(calls.double().var() + info["nfe"].double().var()) / n)
    assert abs(float(calls.double().mean() - info["nfe"].double().mean())) < 5 * spread


# ---- Both as programs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world, tokenizer = tmp_path_factory.mktemp("experiments"), Char("".join(sorted(set(TEXT))))
    writer.prepare(world / "data", [("train", TEXT), ("val", TEXT[:200])], tokenizer)
    greek = [("train", "αβγ" * 99), ("val", "αβγ" * 9)]
    writer.prepare(world / "greek", greek, Char("αβγ"))
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    sizes |= {"vocab_size": tokenizer.vocab_size}
    for name, attention, objective in (("run", "full", "any_order"), ("judge", "causal", "ar")):
        torch.manual_seed(0)
        model = make_network(DEFAULTS | sizes | {"attention": attention})
        config = model.config | {"objective": objective}
        state = {"config": config, "tokenizer": tokenizer.meta(), "model": model.state_dict()}
        checkpoint.save(world / name / "ckpt.pt", state | {"step": 1, "ema": None})
    return world


def run(module, world, monkeypatch, *words):
    monkeypatch.chdir(world)
    words = ["--quick=True", "--results=found", "--device=cpu", "--dtype=float32", *words]
    monkeypatch.setattr(sys, "argv", ["program.py", *words])
    return lib.program.run(module.main, settings, results, module)


def test_the_loss_audit_writes_its_figures_table_and_plot(world, monkeypatch, capsys):
    run(loss_audit, world, monkeypatch, "--ckpt=run", "--data=data")
    figures = json.loads((world / "found/loss_audit.json").read_text())
    entropy, bound = figures["entropy of the joint"], figures[f"model, {loss_audit.BOUND}"]
    for name in list(loss_audit.rules(4))[:RIGHT]:
        assert figures[f"joint, {name}"] == pytest.approx(entropy, abs=1e-10)
        assert figures[f"model, {name}"] == pytest.approx(bound, rel=1e-6)
    table = (world / "found/loss_audit.md").read_text()
    assert table.startswith("Made by `") and "**below**" in table
    assert capsys.readouterr().out.rstrip() == table.split("\n\n", 1)[1].rstrip()
    assert (world / "found/loss_audit.png").stat().st_size > 10_000


def test_the_loss_audit_needs_no_model(world, monkeypatch, capsys):
    run(loss_audit, world, monkeypatch, "--ckpt=")
    out = capsys.readouterr().out
    assert "the model: left out" in out and "**below**" in out and "model says" not in out


def test_the_annealing_experiment_writes_its_figures_table_and_plot(world, monkeypatch, capsys):
    words = ["--ckpt=run", "--judge=judge", "--data=data", "--num_samples=3"]
    run(annealing, world, monkeypatch, *words)
    figures = json.loads((world / "found/annealing.json").read_text())
    for noise in ("float64", "float32", "float16", "bfloat16"):
        assert figures[f"{noise}, 16 steps, generative perplexity"] > 1
        assert 0 <= figures[f"{noise}, 16 steps, entropy, nats"] <= math.log(16)
    lost = [figures[f"{noise}, V 104, 16 steps, lost"] for noise in ("float16", "bfloat16")]
    assert lost[0] < lost[1] <= 1
    assert "held-out text" in (world / "found/annealing.md").read_text()
    assert "| float32 | 104 |" in capsys.readouterr().out
    assert (world / "found/annealing.png").stat().st_size > 10_000


BAD = {
    "a causal network has no masks": (
        loss_audit,
        ["--ckpt=judge", "--data=data"],
        "judge is causal",
    ),
    "another vocabulary": (
        loss_audit,
        ["--ckpt=run", "--data=greek"],
        "greek has another tokenizer than run",
    ),
    "one block shows no error": (
        loss_audit,
        ["--ckpt=run", "--data=data", "--sequences=1"],
        "sequences must be 3 or more",
    ),
    "no checkpoint": (loss_audit, ["--ckpt=out/none"], "no checkpoint out/none"),
    "nobody writes": (annealing, ["--ckpt=judge", "--judge=judge"], "judge is causal"),
    "nobody judges": (annealing, ["--ckpt=run", "--judge="], "say who judges"),
    "one sample shows no error": (
        annealing,
        ["--ckpt=run", "--num_samples=1"],
        "num_samples must be 2 or more",
    ),
    "text with another tokenizer": (
        annealing,
        ["--ckpt=run", "--judge=judge", "--data=greek"],
        "greek has another tokenizer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it(case, world, monkeypatch, capsys):
    module, words, says = BAD[case]
    with pytest.raises(SystemExit) as exit:
        run(module, world, monkeypatch, *words)
    err = capsys.readouterr().err.splitlines()[-1].split("\r")[-1].strip()
    assert exit.value.code == 2 and err.startswith("program.py: ") and says in err
