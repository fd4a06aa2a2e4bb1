"""The screening of recipes: the same arithmetic for all, independent draws, nothing run twice."""

import json
import sys

import pytest
import torch

import config as settings
import diffusion
from data import tokenizer, writer
from experiments import dial, recipe, results
from run import budget


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The command line of a screening of a tiny preset on a tiny text."""
    text = "to be or not to be, that is the question. " * 200
    parts = [("train", text), ("val", text[:420])]
    writer.prepare(tmp_path / "data", parts, tokenizer.build("char", [text]))
    preset = tmp_path / "preset.py"
    keys = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 32, "batch_size": 8}
    keys |= {"compile": False, "objective": "any_order"}
    preset.write_text(str(keys | {"optimizer": "muon", "learning_rate": 0.01}))
    keys = {"preset": preset, "data": tmp_path / "data", "results": tmp_path, "steps": 30}
    line = [f"--{key}={value}" for key, value in keys.items()]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *line, "--only=base;AdamW, learning rate 1e-3"])
    return line


def parse(line):
    return settings.parse(line, settings, results, recipe)


@pytest.mark.parametrize("name", recipe.VARIANTS)
def test_every_variant_costs_what_the_base_costs_up_to_one_step(name, given):
    config = parse(["--preset=configs/pydocs_2400.py", *given[1:]])
    base, mine = (recipe.settings_of(config, each, 7) for each in (recipe.BASE, name))
    assert base["max_iters"] == 30 and mine["seed"] == 7 and mine["data"] == config["data"]
    cost = mine["max_iters"] * recipe.step_flops(mine)
    assert abs(cost - 30 * recipe.step_flops(base)) <= recipe.step_flops(mine) / 2
    changed = {key for key in mine if mine[key] != base[key]}
    assert changed <= {*recipe.VARIANTS[name], "max_iters", "eval_interval", "warmup_iters"}


def test_independent_draws_are_uniform_not_stratified_and_end_with_the_block():
    B, step = 8, 3

    def draw(step):
        u, noise = diffusion.stratified_uniforms(0, step, range(B), B, 4)  # (B,), (B, 4)
        return diffusion.draw_mask("lambda_dce", u, noise)[1].reciprocal()  # (B,)

    def stratum(u):
        return (u * B).ceil().sort().values.tolist()

    assert stratum(draw(step)) == list(range(1, B + 1))
    with recipe.independent_draws(True):
        lam = torch.cat([draw(step) for step in range(400)])  # (3200,)
        one_each = sum(stratum(draw(step)) == list(range(1, B + 1)) for step in range(100))
        assert one_each < 10, "chance: 1 in 416"
    assert lam.min() > 0 and lam.max() <= 1 and len(lam.unique()) == len(lam)
    for moment in (1, 2, 3):
        assert abs(lam.pow(moment).mean() - 1 / (moment + 1)) < 4 * 0.3 / 3200**0.5
    assert stratum(draw(step)) == list(range(1, B + 1))


def test_a_screening_runs_what_is_missing_ranks_it_and_does_not_run_it_again(given, tmp_path):
    figures = recipe.main(parse([*given, "--only=base;AdamW, learning rate 1e-3"]))
    rows = results.kept(tmp_path / "recipe_data_30.jsonl")
    expected = [("base", 30), ("AdamW, learning rate 1e-3", 30)]
    assert [(row["name"], row["steps"]) for row in rows] == expected
    assert figures == {row["name"]: row["nats_per_token"] for row in rows}
    assert figures["base"] < figures["AdamW, learning rate 1e-3"], "Muon shows in 30 steps"
    lines = (tmp_path / "recipe_data_30.md").read_text().splitlines()[-2:]
    assert lines[0].startswith("| base | 1 | 30 |") and lines[1].startswith("| AdamW")
    assert json.loads((tmp_path / "recipe_data_30.json").read_text()).items() >= figures.items()

    assert recipe.main(parse([*given, "--only=base;AdamW, learning rate 1e-3"])) == figures
    assert len(results.kept(tmp_path / "recipe_data_30.jsonl")) == 2
    other = parse([*given, "--steps=31", f"--rows={tmp_path}/recipe_data_30.jsonl"])
    fitting = recipe.fitting(other, tmp_path / "recipe_data_30.jsonl")
    assert fitting == [], "rows of another length do not count"


def test_a_variant_that_is_not_there_is_one_line(given):
    with pytest.raises(settings.UserError, match=r"only.*batch 16"):
        recipe.main(parse([*given, "--only=batch 17"]))


def test_variants_are_ranked_against_the_base_of_the_same_seed(given, tmp_path):
    nats = {("base", 1): 2.0, ("base", 2): 3.0, ("batch 16", 1): 2.1, ("SwiGLU", 2): 2.9}
    keys = {"steps": 30, "cpu_seconds": 1.0}
    rows = [{"name": n, "seed": s, "nats_per_token": x} | keys for (n, s), x in nats.items()]
    recipe.report(parse(given), rows)
    lines = (tmp_path / "recipe_data_30.md").read_text().splitlines()[-3:]
    names = [line.split(" | ")[0] for line in lines]
    assert names == ["| SwiGLU", "| base", "| batch 16"], "by their means batch 16 leads"


# ---- The dial ------------------------------------------------------------------------------------


def test_the_dial_and_its_neighbours_get_the_same_operations_and_run_once(given, tmp_path):
    line = [f"--data={tmp_path / 'data'}", f"--results={tmp_path}", "--operations=2e9", "--seeds=1"]
    line += [f"--rows={tmp_path / 'dial.jsonl'}", "--device=cpu"]
    config = settings.parse(line, settings, results, dial)
    assert dial.settings_of(config, 2e9)["depth"] == 2
    for depth in (1, 2, 3):
        mine = budget.filled(dial.settings_of(config, 2e9, depth))
        cost = recipe.step_flops(mine)
        assert mine["n_layer"] == depth and abs(mine["max_iters"] * cost - 2e9) <= cost / 2
    figures = dial.main(config)
    rows = results.kept(tmp_path / "dial.jsonl")
    nats = [row["nats_per_token"] for row in rows]
    assert len(rows) == 3 and figures["above_best_2e+09"] == pytest.approx(nats[1] - min(nats))
    assert (tmp_path / "dial.md").read_text().count("the dial's choice") == 1
    assert dial.main(config) == figures
    assert len(results.kept(tmp_path / "dial.jsonl")) == 3
