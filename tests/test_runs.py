"""What experiments share: runs that are kept and resumed, measurements, the frontier of samples."""

import math
import shutil

import numpy as np
import pytest
import torch

import config as settings
import train
from data import tokenizer, writer
from experiments import frontier, papers, results, runs
from lib.stats import t95
from run import checkpoint

PRESET = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "batch_size": 4}


def opened(folder, *words):
    """Runs of a tiny preset in a folder."""
    (folder / "preset.py").write_text(str(PRESET))
    line = [f"--preset={folder}/preset.py", f"--runs={folder}/runs", f"--results={folder}/found"]
    return runs.Runs(settings.parse([*line, "--device=cpu", *words], settings, results, runs))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("text"), "to be or not to be, that is the question. "
    writer.prepare(folder, [("train", words * 99), ("val", words * 9)], tokenizer.Byte())
    return str(folder)


def steps_of(ctx, text, steps, **keys):
    """FLOPs of so many steps."""
    return steps * runs.step_flops(ctx.recipe(text, keys, 1.0, 0))


def forbidden(*_):
    raise AssertionError("nothing is left to do")


# ---- Runs ----------------------------------------------------------------------------------------


def test_a_run_costs_the_flops_that_are_asked_for_up_to_half_a_step(tmp_path, text):
    ctx = opened(tmp_path)
    for keys in ({}, {"objective": "ar"}, {"n_embd": 32}, {"attention": "order"}):
        recipe = ctx.recipe(text, keys, 1e9, 1)
        one = runs.step_flops(recipe)
        assert abs(recipe["max_iters"] * one - 1e9) <= one / 2, keys
    assert ctx.recipe(text, {"objective": "ar"}, 1e9, 1)["attention"] == "causal"


def test_a_finished_run_is_found_again_and_each_change_is_a_run_of_its_own(
    tmp_path, text, monkeypatch
):
    ctx, made = opened(tmp_path), set()
    monkeypatch.setattr(train, "main", lambda recipe: made.add(recipe["out_dir"]))
    one = 1.1 * steps_of(ctx, text, 2)
    changes = [{}, {"objective": "lambda_dce"}, {"independent": True}, {"learning_rate": 0.5}]
    folders = [ctx.train(text, keys, one, 1) for keys in changes]
    folders += [ctx.train(text, {}, 3 * one, 1), ctx.train(text, {}, one, 2)]
    folders += [ctx.train(text, {}, one, 1, runs.independent_draws)]
    assert len(set(folders)) == len(made) == 7
    other = opened(tmp_path, "--minutes=7", "--seeds=9", "--sequences=3")
    assert other.train(text, {"objective": "any_order"}, one, 1) == folders[0]


def test_a_run_that_was_killed_goes_on_from_a_third_to_the_same_weights(
    tmp_path, text, monkeypatch
):
    ctx = opened(tmp_path)
    flops = steps_of(ctx, text, 9)
    folder = ctx.train(text, {}, flops, 1)
    kept = checkpoint.kept_beside(folder / "ckpt.pt")
    assert sorted(kept) == [3, 6, 9]
    whole = checkpoint.read(folder)["model"]
    weights = {name: w.clone() for name, w in whole.items()}
    shutil.copy(kept[3], folder / "ckpt.pt")
    assert ctx.train(text, {}, flops, 1) == folder
    again = checkpoint.read(folder)
    assert again["step"] == 9 and all(torch.equal(again["model"][n], w) for n, w in weights.items())
    curve, seconds = ctx.curve(folder)
    assert len(curve) == 9 and curve[-1][0] == pytest.approx(flops) and seconds > 0
    monkeypatch.setattr(train, "main", forbidden)
    assert ctx.train(text, {}, flops, 1) == folder


def test_what_does_not_fit_is_left_out_and_named(tmp_path, text, monkeypatch):
    monkeypatch.setattr(train, "main", forbidden)
    ctx = opened(tmp_path, "--minutes=1")
    ctx.rate = 1e9
    assert ctx.fits(40e9) and not ctx.fits(46e9), "a quarter is left for measuring"
    assert ctx.train(text, {}, 46e9, 1) is None and len(ctx.left_out) == 1
    assert ctx.nats(None, text) is None
    figures = ctx.write("some", "A table.\n", {}, {})
    assert figures["runs left out"] == 1
    said = (tmp_path / "found/some.md").read_text()
    assert "1 min were too few" in said and ctx.left_out[0] in said
    over = opened(tmp_path, "--minutes=0")
    assert over.once(["a"], forbidden) is None, "the time is over, so nothing is measured"


def test_a_measurement_is_made_once_for_all_that_it_depends_on(tmp_path):
    ctx, calls = opened(tmp_path), []
    measure = lambda: calls.append(1) or {"x": len(calls)}  # noqa: E731
    assert [ctx.once(parts, measure)["x"] for parts in (["a", 1], ["a", 1], ["a", 2])] == [1, 1, 2]
    assert opened(tmp_path).once(["a", 2], forbidden) == {"x": 2}


def test_means_are_spelled_with_their_interval_and_pairs_are_subtracted():
    assert runs.spelled([1.0, 2.0, 3.0], ".2f") == f"2.00 ± {t95(2) / 3**0.5:.2f}"
    assert runs.spelled([1.0, 2.0], ".1f") == "1.5 (two seeds)"
    assert runs.spelled([1.0, None]) == "1.000 (one seed)" and runs.spelled([None]) == "left out"
    assert runs.minus([3.0, None, 5.0], [1.0, 2.0, None]) == [2.0, None, None]


def test_the_papers_figures_are_in_nats_per_token():
    expected = [math.log(a / b) for a, b in ((49.57, 50.27), (38.83, 38.26), (111.74, 110.38))]
    expected += [math.log(37.46 / 35.90), math.log(72.35 / 74.28)]
    assert papers.nats_above("t_dse", "any_order") == pytest.approx(sum(expected) / 5)
    assert papers.sampling_ratio(4096) == pytest.approx(59.56 / 18.20)
    assert papers.sampling_ratio(16) is None


# ---- The frontier --------------------------------------------------------------------------------


def frequencies(*rows, n=1):
    return frontier.frequencies([list(row) for row in rows], n, 256)


def test_the_n_gram_distance_is_that_of_two_distributions():
    a, b, both = frequencies(b"aaaa"), frequencies(b"bb"), frequencies(b"abab")
    assert frontier.js_distance(a, a) == 0 and frontier.js_distance(a, b) == 1
    # m = (3/4, 1/4): H(m) - H(1/2, 1/2) / 2 = 0.811278 - 0.5 bits
    assert frontier.js_distance(a, both) == pytest.approx(math.sqrt(0.311278), abs=1e-6)
    assert frontier.js_distance(both, a) == frontier.js_distance(a, both)


def test_n_grams_are_counted_inside_a_sample_and_not_across_two():
    grams, share = frequencies(b"aba", b"bab", n=2)
    ab, ba = 97 * 256 + 98, 98 * 256 + 97
    assert grams.tolist() == [ab, ba] and share.tolist() == [0.5, 0.5]
    large = frontier.frequencies(np.full((1, 4), 50256), 3, 50257)[0]
    assert large.tolist() == [50256 * (50257**2 + 50257 + 1)]


def test_paths_are_compared_at_the_entropy_of_held_out_text_and_not_outside_of_them():
    path = [{"sampler": "a", "entropy": h, "nats": y} for h, y in ((3.0, 5.0), (1.0, 2.0))]
    text = {"sampler": frontier.HELD_OUT, "entropy": 2.5, "nats": 0.0}
    assert frontier.at_entropy([*path, text], "a") == pytest.approx(4.25)
    assert frontier.at_entropy([*path, text | {"entropy": 3.5}], "a") is None
    assert frontier.at_entropy([*path, text], "b") is None
