"""The benchmark compares things that compute the same, and reports what it promises."""

import contextlib
import math
import runpy
import sys

import pytest
import torch
from conftest import training_mask
from plain import DEFAULTS

import diffusion
from data import writer
from data.tokenizer import Char
from experiments import baselines, bench, textbook, timing
from lib import fused
from model import make_network

CPU = torch.device("cpu")
TINY = bench.SMALL | {"n_layer": 2, "n_embd": 32, "block_size": 16}


def test_textbook_and_ours_have_the_same_loss():
    torch.manual_seed(0)
    model = make_network(DEFAULTS | TINY | {"vocab_size": 11})
    x0 = torch.randint(11, (4, 16))
    mask, weight = training_mask("any_order", 0, 0, range(4), 4, 16)
    batch = x0, mask, weight.float(), fused.masked_indices(mask, multiple=8)
    gathered = bench.gathered_loss(
        lambda model, x, masked_idx: baselines.hidden(model, x).flatten(0, 1)[masked_idx]
    )
    losses = [loss(model, *batch).item() for loss in (baselines.loss, gathered, bench.our_loss)]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


def test_the_cache_draws_each_token_with_its_probability_at_masked_positions_only():
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.2]).expand(1, 40_000, 3)  # (B, L, V)
    x = torch.full((1, 40_000), 3)
    x[0, :100] = 1
    new = baselines.cache_draw(p, x, 3, 0.25)
    assert (new[0, :100] == 1).all()
    shares = torch.bincount(new[0, 100:]) / 39_900
    assert torch.allclose(shares, torch.tensor([0.125, 0.075, 0.05, 0.75]), atol=0.01)


def test_the_tables_have_every_variant_and_their_first_is_the_unit(monkeypatch):
    monkeypatch.setattr(bench, "SMALL", TINY)
    monkeypatch.setattr(timing, "TURN", 0.0)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    rows, limits = bench.training(11, 2, 1, CPU, TINY)
    names = [row["name"] for row in rows]
    assert (names[0], names[1]) == (bench.TEXTBOOK, bench.KEPT) and rows[0]["ratio"] == 1
    assert names[-3:] == ["+ compile", bench.FLOAT32, bench.COMPILED_TEXTBOOK]
    assert all(limit > 0 for limit in limits.values())
    rows = bench.sampling(11, 8, 2, 1, CPU, quick=True)
    names = {row["name"] for row in rows}
    assert {"textbook float32", "RADD's cache bfloat16", "ours bfloat16 compiled"} <= names
    assert rows[0]["ratio"] == 1 and all(row["seconds_per_sequence"] > 0 for row in rows)
    rows = bench.baseline(11, 1, CPU, contextlib.nullcontext, quick=True)
    assert max(row["ratio"] for row in rows if row["name"].startswith("causal")) == 1


def test_a_turn_is_as_many_calls_as_fit_and_its_time_is_that_of_one(monkeypatch):
    clock, calls = [0.0], {"fast": 0, "slow": 0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        calls[name] += 1
        clock[0] += seconds

    variants = {"fast": lambda: call("fast", 0.25), "slow": lambda: call("slow", 3.0)}
    times = timing.alternate(variants, 2, CPU)
    assert times == {"fast": [0.25, 0.25], "slow": [3.0, 3.0]}
    assert calls == {"fast": 2 + 2 * 4, "slow": 2 + 2}


def test_the_textbook_learns_and_its_samples_have_no_masks(monkeypatch, capsys):
    monkeypatch.setattr(textbook, "L", 16)
    monkeypatch.setattr(textbook, "D", 32)
    monkeypatch.setattr(textbook, "LAYERS", 1)
    losses, bound, x, model = textbook.main(steps=100, n=2)
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 0.3
    assert 1 < bound < math.log(model.mask_id)  # below that of a uniform guess
    assert x.shape == (2, 16) and x.min() >= 0 and x.max() < model.mask_id
    out = capsys.readouterr().out
    assert "step 100: loss " in out and "held-out text: at most " in out and out.count("----") == 2


@pytest.mark.parametrize("word", ["--help", "--quik", "data/pydocs"])
def test_the_textbook_shows_how_it_is_called_and_does_not_train(word, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["textbook.py", "--quick", word])
    with pytest.raises(SystemExit, match=r"python -m experiments\.textbook "):
        runpy.run_path(textbook.__file__, run_name="__main__")


def test_the_textbook_reads_prepared_text(monkeypatch, tmp_path):
    tokenizer = Char("abcn ")
    writer.prepare(tmp_path, [("train", "a banana can " * 9), ("val", "a can " * 9)], tokenizer)
    train, val, letters = textbook.read(tmp_path)
    assert "".join(letters[i] for i in train).startswith("a banana can a banana")
    assert "".join(letters[i] for i in val).startswith("a can a can")


def test_the_loss_of_the_textbook_is_our_bound(monkeypatch):
    monkeypatch.setattr(textbook, "L", 16)
    monkeypatch.setattr(textbook, "LAYERS", 1)
    torch.manual_seed(0)
    model = textbook.Network(5)
    x0 = torch.randint(5, (1, textbook.L))
    with torch.no_grad():
        theirs = torch.tensor([textbook.nelbo(model, x0.expand(64, -1)) for _ in range(40)])
        model.hidden = lambda x, idx: model.norm(model.blocks(model.embed(x))).flatten(0, 1)[idx]
        model.head_parameters = lambda: (model.unembed.weight, model.unembed.bias)
        model.row_loss = None
        mask, weight = training_mask("any_order", 0, 0, range(512), 512, textbook.L)
        loss, _ = diffusion.nelbo(model, x0.expand(512, -1), mask, weight)
    error = theirs.std() / 40**0.5
    assert abs(theirs.mean() - loss / mask.numel()) < 4 * error and error < 0.02 * theirs.mean()
