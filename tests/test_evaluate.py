"""Judging: the estimates are unbiased, their error bars honest, and a number depends on what it says it depends on."""

import math

import numpy as np
import pytest
import torch
from conftest import L, Table, V, random_logits, states

import checkpoint
import config as settings
import diffusion
import evaluate
from data import loader, writer
from data.tokenizer import Char
from evaluate import mask_of_draw, mean_and_error, report, sequence_nats, spread
from model import DEFAULTS, Transformer

ESTIMATORS = ["any_order", "lambda_dce", "t_dce", "t_dse"]
X0 = states(V, L)  # (V^L, L)


def blocks_of(x0):
    """Rows of a tensor as evaluate takes them."""
    return list(x0.numpy())


def transformer(**keys):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 7}
    return Transformer(DEFAULTS | sizes | keys).eval()


def random_blocks(lengths, n_tokens=7, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(n_tokens, size=length) for length in lengths]


# ---- Mean and error ----------------------------------------------------------------------------------------------------


def unequal(S=300):
    """Sequences of very unequal length whose nats have a part of their own: nats (S,), lengths (S,)."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 60, size=S)
    return lengths * (1 + 0.3 * generator.standard_normal(S)) + generator.exponential(3, size=S), lengths


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


def test_with_equal_lengths_the_error_is_the_usual_one_and_one_sequence_has_none():
    nats = np.array([3.0, 5.0, 4.0, 8.0])
    assert mean_and_error(nats, [10] * 4) == pytest.approx((0.5, nats.std(ddof=1) / 2 / 10))
    assert mean_and_error([3.0], [10]) == (0.3, math.inf)


def coverage(nats, truth, widen=1.0, size=20):
    """How often the 95% interval of `size` sequences covers the truth: nats (R * size,) -> a part of 1."""
    inside = 0
    for group in nats.view(-1, size).tolist():
        mean, error = mean_and_error(group, [L] * size)
        inside += abs(mean - truth) < 1.96 * widen * error
    return inside / (len(nats) // size)


def test_intervals_cover_the_exact_entropy_as_often_as_they_say(network, joint):
    drawn = torch.multinomial(joint.flatten(), 400 * 20, replacement=True, generator=torch.Generator().manual_seed(3))
    nats = sequence_nats(network, blocks_of(X0[drawn]), draws=4, batch_size=10**6)
    entropy = -(joint * joint.log()).sum().item() / L
    assert 0.90 < coverage(nats, entropy) < 0.98
    assert coverage(nats, entropy, widen=0.5) < 0.80  # as if the four tokens of a sequence were four sequences
    assert coverage(nats, 1.05 * entropy) < 0.90


def test_a_report_says_one_number_in_every_unit():
    result, text = report([20.0, 30.0], [10, 10], bytes_per_token=4.0)
    assert result["nats_per_token"] == 2.5 and result["tokens"] == 20 and result["sequences"] == 2
    assert result["standard_error"] == pytest.approx(0.5)
    assert result["interval"] == pytest.approx([2.5 - 0.98, 2.5 + 0.98])
    assert result["perplexity"] == pytest.approx(math.exp(2.5))
    assert result["bits_per_token"] == pytest.approx(3.6067, abs=1e-4)
    assert result["bits_per_byte"] == pytest.approx(0.9017, abs=1e-4)
    assert "2.5000 +- 0.9800 nats per token (95% interval) = 3.6067 +- 1.4138 bits per token" in text
    assert "= 0.9017 +- 0.3535 bits per byte; perplexity 12.18" in text


def test_a_hopeless_model_is_reported_too():
    result, text = report([1e5, 2e5], [10, 10], bytes_per_token=1.0)
    assert result["nats_per_token"] == 15_000 and result["perplexity"] == math.inf and "perplexity inf" in text


# ---- Estimates ---------------------------------------------------------------------------------------------------------


def z_score(nats, truth):
    """How many standard errors the mean of the differences is from 0: (S,) each."""
    difference = nats - truth
    return float(difference.mean() / difference.std() * math.sqrt(len(nats)))


HEAVY = [("lambda_dce", "loglinear", 1.1), ("t_dce", "cosine", 1.1), ("t_dse", "loglinear", 1.1)]  # 1/t where t is small


@pytest.mark.parametrize(("estimator", "schedule", "wrong"), [("any_order", "loglinear", 1.01), *HEAVY])
def test_each_estimate_is_unbiased_and_a_wrong_weight_would_be_noticed(estimator, schedule, wrong, network, joint):
    nats = sequence_nats(network, blocks_of(X0), estimator, draws=300, schedule=schedule, batch_size=10**6)
    truth = -joint.flatten().log()
    assert abs(z_score(nats, truth)) < 4 < z_score(wrong * nats, truth)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_estimate_is_the_weighted_cross_entropy_of_its_draws(estimator):
    model = Table(random_logits())  # not normalised
    nats = sequence_nats(model, blocks_of(X0[:10]), estimator, draws=3, seed=5)
    for i in range(10):
        mask, weight = mask_of_draw(estimator, 5, torch.arange(3 * i, 3 * i + 3), 3, L, "loglinear")  # (3, L), (3,)
        logits = model(torch.where(mask, V, X0[i])).detach()  # (3, L, V)
        at_x0 = logits.gather(-1, X0[i].expand(3, -1)[..., None]).squeeze(-1)  # (3, L)
        total = logits.exp().sum(-1)  # (3, L)
        ce = (total - 1 if estimator == "t_dse" else total.log()) - at_x0
        assert nats[i].item() == pytest.approx(float((weight[:, None] * mask * ce).sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize("draws", [1, 2, 5, 16])
def test_the_draws_of_each_sequence_are_stratified_and_come_in_antithetic_pairs(draws):
    item = torch.arange(40 * draws)
    _, weight = mask_of_draw("lambda_dce", 3, item, draws, L, "loglinear")
    u = (1 / weight).view(40, draws)  # (S, draws)
    assert torch.equal((u * draws).floor().long().sort(1).values, torch.arange(draws).expand(40, -1))
    pairs = u[:, : draws // 2 * 2].view(40, -1, 2)  # (S, pairs, 2)
    assert torch.allclose(pairs.sum(-1), torch.ones_like(pairs[..., 0]), rtol=1e-12)
    assert len(set(u[:, 0].tolist())) == 40  # each sequence has strata of its own jitter


def test_stratified_draws_have_a_lower_variance_than_independent_ones(network):
    blocks = blocks_of(X0) * 30
    stratified = sequence_nats(network, blocks, draws=8, batch_size=10**6).view(30, -1)  # (30, V^L)
    independent = sequence_nats(network, blocks * 8, draws=1, batch_size=10**6).view(8, 30, -1).mean(0)  # (30, V^L)
    assert stratified.var(0).mean() < 0.75 * independent.var(0).mean()


def test_a_causal_network_is_judged_exactly():
    model = transformer(causal=True)
    blocks = random_blocks([16, 16, 5, 16])
    nats = sequence_nats(model, blocks, "ar", draws=16, batch_size=2)
    for block, found in zip(blocks, nats.tolist(), strict=True):
        x0 = torch.from_numpy(block)
        log_p = model(torch.cat([torch.tensor([model.start_id]), x0[:-1]])[None])[0].log_softmax(-1)  # (L, V)
        assert found == pytest.approx(-log_p.gather(-1, x0[:, None]).sum().item(), rel=1e-5)


# ---- What a number depends on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_number_of_a_block_depends_on_its_place_and_not_on_the_batch_or_on_what_comes_after(estimator, arbitrary):
    blocks = blocks_of(X0[:30])
    whole = sequence_nats(arbitrary, blocks, estimator, draws=5, seed=2)
    for n, batch_size in ((30, 1), (30, 7), (30, 1000), (11, 32)):
        assert torch.equal(sequence_nats(arbitrary, blocks[:n], estimator, 5, seed=2, batch_size=batch_size), whole[:n])
    assert not torch.equal(sequence_nats(arbitrary, blocks, estimator, draws=5, seed=3), whole)
    assert len(set(sequence_nats(arbitrary, blocks[:1] * 9, estimator, draws=5).tolist())) == 9


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_blocks_of_other_lengths_keep_their_own_number(batch_size):
    model = transformer()
    blocks = random_blocks([16, 16, 9, 16, 9, 1])
    alone = sequence_nats(model, blocks, draws=4, batch_size=1)
    assert torch.allclose(sequence_nats(model, blocks, draws=4, batch_size=batch_size), alone, rtol=1e-5)
    short = sequence_nats(model, [blocks[0], blocks[1], blocks[2][:3]], draws=4)
    assert torch.allclose(short[:2], alone[:2], rtol=1e-5) and not torch.allclose(short[2], alone[2], rtol=1e-5)


def test_no_blocks_have_no_numbers(arbitrary):
    assert sequence_nats(arbitrary, []).shape == (0,)


def test_a_part_of_the_blocks_is_spread_evenly():
    assert spread(list(range(10)), 0) == spread(list(range(10)), 99) == list(range(10))
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread(list(range(10)), 1) == [0]


# ---- The program -------------------------------------------------------------------------------------------------------

TEXT = "the cät sat on the mat; a dog ran to the log. " * 20


@pytest.fixture
def program(tmp_path):
    """program(...) -> what evaluate.main returns for a small saved model, and for its averaged weights, all 0.1 larger."""

    def run(objective="any_order", splits=(("train", TEXT), ("val", TEXT[:205])), **keys):
        text = Char("".join(sorted(set(TEXT))))
        writer.prepare(tmp_path / "data", list(splits), text)
        model = transformer(vocab_size=text.vocab_size, causal=objective == "ar")
        ema = {name: w + 0.1 for name, w in model.state_dict().items()}
        config = model.config | {"objective": objective, "ema": 0.9}
        state = {"config": config, "tokenizer": text.meta(), "model": model.state_dict(), "ema": ema, "step": 1}
        checkpoint.save(tmp_path / "ckpt.pt", state)
        given = {"ckpt": str(tmp_path), "data": str(tmp_path / "data"), "device": "cpu", "dtype": "float32"}
        model.load_state_dict(ema if keys.get("ema", True) else model.state_dict())
        return evaluate.main(settings.DEFAULTS | diffusion.DEFAULTS | evaluate.DEFAULTS | given | keys), model

    return run


def val_blocks(tmp_path, length=16):
    return list(loader.in_order(loader.Tokens(tmp_path / "data", "val"), length))


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_program_judges_every_token_with_the_weights_that_were_asked_for(estimator, ema, program, tmp_path):
    result, model = program(estimator=estimator, draws=3, seed=9, ema=ema)
    nats = sequence_nats(model, val_blocks(tmp_path), estimator, 3, seed=9)
    assert result["tokens"] == 205 and result["sequences"] == 13  # twelve blocks of 16, and what is left
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 205, rel=1e-6)


def test_the_program_judges_a_causal_network_exactly(program, tmp_path, capsys):
    result, model = program("ar", draws=7)
    nats = sequence_nats(model, val_blocks(tmp_path), "ar")
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 205, rel=1e-6)
    assert result["estimator"] == "ar" and "blocks of 16; exact; " in capsys.readouterr().out


def test_the_program_says_what_it_did(program, capsys):
    result, _ = program(draws=3, seed=4, dtype="bfloat16", split="train", sequences=5)
    out = capsys.readouterr().out
    tokens = len(TEXT)
    assert f"data train: 80 of {tokens} tokens, 1 documents, 5 blocks of 16; " in out
    assert "upper bound by any_order, 3 stratified draws a sequence; bfloat16, averaged weights, seed 4" in out
    half = 1.96 * result["standard_error"]
    assert f"{result['nats_per_token']:.4f} +- {half:.4f} nats per token (95% interval)" in out
    assert f"bigram {result['ngram_nats']['bigram']:.4f}" in out


def test_bits_per_byte_count_bytes_and_not_characters(program):
    result, _ = program(draws=2)
    n_bytes = len(TEXT[:205].encode())
    assert n_bytes > 205
    assert result["bits_per_byte"] == pytest.approx(result["nats_per_token"] * 205 / math.log(2) / n_bytes)


def test_a_shorter_block_and_a_part_of_the_text_may_be_judged(program, tmp_path):
    result, model = program(block_size=10, sequences=4, draws=2, seed=3)
    blocks = spread(val_blocks(tmp_path, 10), 4)
    nats = sequence_nats(model, blocks, draws=2, seed=3)
    assert result["tokens"] == 40 and result["block_size"] == 10
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 40, rel=1e-6)


def test_text_without_a_training_part_is_judged_as_well(program):
    result, _ = program(splits=[("val", TEXT[:205])], draws=2)
    assert result["tokens"] == 205
