"""The speedrun: a claim is trained to its budget, evaluated, and compared with the record."""

import json

import config as settings
import train
from data import tokenizer, writer
from experiments import results, speedrun


def test_a_claim_is_trained_to_its_operations_and_evaluated(tmp_path):
    text = "to be or not to be, that is the question. " * 200
    splits = [("train", text), ("val", text[:420])]
    writer.prepare(tmp_path / "data", splits, tokenizer.build("char", [text]))
    preset = tmp_path / "preset.py"
    small = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 32, "batch_size": 8}
    preset.write_text(str(small | {"data": str(tmp_path / "data"), "compile": False}))
    given = [f"--preset={preset}", f"--data={tmp_path / 'data'}", f"--results={tmp_path}"]
    given += ["--only=flops", "--flops=1e9", "--seeds=1"]
    figures = speedrun.main(settings.parse(given, settings, results, speedrun))
    assert json.loads((tmp_path / "speedrun.json").read_text()) == figures
    assert figures["flops, seed 1337"] < 3
    mine = settings.parse([str(preset)], *train.MODULES)
    steps = int(1e9 / speedrun.step_flops(mine))
    assert f"| {steps:,} |" in (tmp_path / "speedrun.md").read_text()


def test_a_record_is_below_the_one_that_stands_with_its_whole_interval():
    assert "three seeds" in speedrun.verdict([1.0, 1.0], 1.5)
    assert "a record" in speedrun.verdict([1.40, 1.41, 1.39], 1.5)
    assert "no record" in speedrun.verdict([1.40, 1.41, 1.39], 1.41)
    assert "no record" in speedrun.verdict([1.0, 1.4, 1.9], 1.5)
