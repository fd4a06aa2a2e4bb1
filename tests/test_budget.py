"""A race against the clock, for a few seconds: both models train and are evaluated."""

import json

import pytest

import config as settings
from data import tokenizer, writer
from experiments import budget, results


def test_both_models_train_for_a_time_and_are_evaluated(tmp_path):
    text = "to be or not to be, that is the question. " * 200
    writer.prepare(
        tmp_path / "data", [("train", text), ("val", text[:420])], tokenizer.build("char", [text])
    )
    preset = tmp_path / "preset.py"
    small = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 32, "batch_size": 8}
    preset.write_text(str(small | {"compile": False}))
    keys = {"preset": preset, "data": tmp_path / "data", "results": tmp_path}
    keys |= {"minutes": 0.25, "seeds": 1, "rehearsal": 20}
    given = [f"--{key}={value}" for key, value in keys.items()]
    figures = budget.main(settings.parse(given, settings, results, budget))
    assert json.loads((tmp_path / "budget.json").read_text()) == figures
    for objective in ("any_order", "ar"):
        assert figures[f"{objective}_steps"] > 0 and figures[f"{objective}_seconds"] < 60
        assert figures[f"{objective}_nats_per_token"] < 3, (
            "no worse than a guess; how far it gets depends on the machine"
        )


def test_each_run_is_as_long_as_the_run_before_says(tmp_path, monkeypatch):
    taken = []

    def train(config, objective, steps, seed, folder):
        # two fast runs after two slow ones
        start, step = (20.0, 0.1) if len(taken) % 4 < 2 else (10.0, 0.05)
        taken.append(steps)
        return start + steps * step, step

    monkeypatch.setattr(budget, "train", train)
    result = {"nats_per_token": 2.0, "draw_half": 0.0, "standard_error": 0.0}
    monkeypatch.setattr(budget, "evaluated", lambda *_: result)
    given = [f"--results={tmp_path}", "--minutes=2", "--seeds=3", "--rehearsal=50"]
    figures = budget.main(settings.parse(given, settings, results, budget))
    slow, fast = int((budget.SPARE * 120 - 20) / 0.1), int((budget.SPARE * 120 - 10) / 0.05)
    for objective_steps in (taken[:4], taken[4:]):
        assert objective_steps == pytest.approx([50, slow, slow, fast], abs=1), (
            "a run is planned by the one before"
        )
    assert figures["ar_seconds"] == max(
        20 + taken[5] * 0.1, 10 + taken[6] * 0.05, 10 + taken[7] * 0.05
    )
