"""A race against the clock, for a few seconds: both models train and are judged."""

import json

import config as settings
from data import tokenizer, writer
from experiments import budget, results


def test_both_models_train_for_a_time_and_are_judged(tmp_path):
    text = "to be or not to be, that is the question. " * 200
    writer.prepare(tmp_path / "data", [("train", text), ("val", text[:420])], tokenizer.build("char", [text]))
    preset = tmp_path / "preset.py"
    preset.write_text(str({"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 32, "batch_size": 8, "compile": False}))
    keys = {"preset": preset, "data": tmp_path / "data", "results": tmp_path, "minutes": 0.25, "seeds": 1, "rehearsal": 20}
    given = [f"--{key}={value}" for key, value in keys.items()]
    figures = budget.main(settings.parse(given, settings, results, budget))
    assert json.loads((tmp_path / "budget.json").read_text()) == figures
    for objective in ("any_order", "ar"):
        assert figures[f"{objective}_steps"] > 0 and figures[f"{objective}_seconds"] < 60
        assert figures[f"{objective}_nats_per_token"] < 3, "no worse than a guess; how far it gets depends on the machine"
