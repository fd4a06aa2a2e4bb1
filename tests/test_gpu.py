"""The measurements of a card: every line comes, also where the one before it has failed."""

import json
import os
import signal
import time

import pytest
import torch

import config as settings
import sample
from experiments import device_checks, device_speed, gpu, results

QUICK = ["--device=cpu", "--quick", "--minutes=400"]
ON_A_CPU = {"CUDNN_ATTENTION", "EFFICIENT_ATTENTION"}  # what it lacks


def config_of(folder, *words):
    return settings.parse([*QUICK, f"--results={folder}", *words], settings, results, gpu)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder, figures) of the whole program at toy sizes."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, gpu.main(config_of(folder))


@pytest.fixture
def part():
    """A part in this process, which keeps its lines."""
    lines = []
    made = gpu.Part(config_of("nowhere"), 60.0, lines.append)
    made.lines = lines
    return made


def records(folder):
    return {record["part"]: record["lines"] for record in results.kept(folder / "gpu.jsonl")}


# ---- Everything ----------------------------------------------------------------------------------


def test_every_part_tells_its_lines_and_none_fails(measured):
    folder, figures = measured
    lines = records(folder)
    assert list(lines) == list(gpu.PARTS) and all(lines.values())
    for part, of_part in lines.items():
        failed = [line for line in of_part if "failed" in line]
        assert all(line["what"].split()[-1] in ON_A_CPU for line in failed), (part, failed)
        assert len({line["what"] for line in of_part}) == len(of_part)
    assert json.loads((folder / "gpu.json").read_text()) == figures
    assert all(isinstance(value, (str, int, float)) for value in figures.values())


def test_what_is_checked_is_right_and_so_says_the_summary(measured):
    folder, _ = measured
    lines, names = records(folder)["right"], [what for what, *_ in device_checks.checks(True)]
    assert [line["what"] for line in lines] == names
    assert all(line["right"] for line in lines)
    assert f"| {len(names)} of {len(names)} checks |" in (folder / "gpu.md").read_text()


def test_what_was_measured_is_not_measured_again(measured, monkeypatch, capsys):
    folder, figures = measured
    only_about = lambda config, measure, _: gpu_lines(config, measure)  # noqa: E731
    monkeypatch.setattr(gpu, "lines_of", only_about)
    mark = json.loads((folder / "gpu.jsonl").read_text("utf8").splitlines()[0])["mark"]
    monkeypatch.setattr(gpu.results, "mark", lambda *_: mark)  # of a process with its own threads
    again = gpu.main(config_of(folder))
    assert again | {"threads": 0} == figures | {"threads": 0}  # other tests change their number
    assert capsys.readouterr().out.count("measured before") == len(gpu.PARTS)


def gpu_lines(config, measure):
    assert measure is gpu.measured_on, "only what it is measured on is asked again"
    lines = []
    measure(gpu.Part(config, 1.0, lines.append))
    return lines


# ---- What goes wrong -----------------------------------------------------------------------------


def stumbles(part):
    part("good", lambda part: {"ms": 1.0})
    part("raises", lambda part: torch.ones(2) @ torch.ones(3))
    part("is full", lambda part: torch.empty(2**60))
    part("is wrong", lambda part: device_checks.verdict({"h": 0.1, "W": float("nan")}, 1e-4))
    raise ValueError("outside a line")


def is_killed(part):
    part("good", lambda part: {"ms": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(part):
    part("good", lambda part: {"ms": 1.0})
    time.sleep(3600)


def works(part):
    part("good", lambda part: {"ms": 1.0})


def test_a_part_that_fails_is_told_in_its_lines_and_the_next_goes_on(tmp_path, monkeypatch):
    parts = {"stumbles": stumbles, "is_killed": is_killed, "hangs": hangs, "works": works}
    limits = dict.fromkeys(parts, 60.0) | {"hangs": 0.1}
    monkeypatch.setattr(gpu, "PARTS", {name: (limits[name], parts[name]) for name in parts})
    figures = gpu.main(config_of(tmp_path))
    lines = records(tmp_path)
    assert [line["what"] for line in lines["stumbles"]][:4] == [
        "good",
        "raises",
        "is full",
        "is wrong",
    ]
    assert lines["stumbles"][1]["failed"].startswith("RuntimeError: ")
    assert lines["stumbles"][2]["failed"] == "out of memory"
    assert "WRONG, error nan" in (tmp_path / "gpu.md").read_text()
    assert lines["stumbles"][-1] == gpu.REST | {"failed": "ValueError: outside a line"}
    assert lines["is_killed"][-1] == gpu.REST | {"failed": "left out, the process ended with -9"}
    assert lines["hangs"][-1] == gpu.REST | {"failed": "left out, the 5 seconds were over"}
    assert figures["works: good: ms"] == 1.0

    again = gpu.main(config_of(tmp_path, "--only=is_killed,works"))
    assert again == figures | {"is_killed: seconds": again["is_killed: seconds"]}
    names = [record["part"] for record in results.kept(tmp_path / "gpu.jsonl")]
    assert names == [*parts, "is_killed"], "what has come to its end is not repeated"


def test_a_device_that_is_not_here_and_an_unknown_part_are_one_line(tmp_path):
    for words, message in (
        (["--device=cuda"], "device 'cuda' is not available"),
        (["--only=machine,rigth"], "unknown only 'rigth'; did you mean 'right'?"),
    ):
        with pytest.raises(settings.UserError, match=message.replace("?", r"\?")):
            gpu.main(config_of(tmp_path, *words))
    assert not list(tmp_path.iterdir())


# ---- What the figures mean -----------------------------------------------------------------------


def test_hours_that_a_preset_states_are_confirmed_or_not():
    tokens = 400_000 * 512 * 1024
    fast, slow = (tokens / 3600 / hours for hours in (150, 200))
    name = "NVIDIA H100 80GB HBM3"
    assert gpu.hours("radd_small", name, fast)[1] == "157 computed for one H100: confirmed"
    assert gpu.hours("radd_small", name, slow)[1] == "157 computed for one H100: not confirmed"
    assert gpu.hours("gpu_small", "NVIDIA L4", 208_000.0)[1].startswith("2.6 computed for one L4:")
    assert gpu.hours("gpu_small", "NVIDIA L40S", fast)[1] == "none computed for this card"


@pytest.mark.parametrize("steps", [8, 64])
def test_a_sample_is_scaled_up_to_the_calls_that_it_would_take(part, steps, monkeypatch):
    model, sampled = device_speed.built(part, "full"), device_speed.sampled

    def clocked(*arguments, **options):
        _, info = sampled(*arguments, **options)
        assert info["nfe"] < 10, "only a few calls are made"
        return float(info["nfe"]), info  # as if a call took a second

    monkeypatch.setattr(device_speed, "sampled", clocked)
    line = device_speed.masked(part, model, 1, steps)
    with part.autocast():
        _, info = sample.sample(model, torch.full((64, 32), model.mask_id), steps=steps)
    assert line["seconds_a_sample"] == pytest.approx(float(info["nfe"].double().mean()), rel=0.05)
    assert line["ms_a_call"] == pytest.approx(1000)


def test_the_largest_micro_batch_is_found_between_what_fits_and_what_does_not(part, monkeypatch):
    class Model:
        def zero_grad(self, **_): ...

    def step(batches, config):
        if config["batch_size"] > 21:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(part, "stepper", lambda config: (step, Model()))
    monkeypatch.setattr(part, "some", lambda full, toy: full)
    monkeypatch.setattr(device_speed.train, "make_batch", lambda *_: None)
    sequences = device_speed.largest_batch(part, {}, None)["sequences"]
    assert 21 * 7 / 8 - 1 <= sequences <= 21
