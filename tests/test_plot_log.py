"""Training curves: what is drawn is what the log says."""

import json
import math
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from config import UserError, options
from experiments import plot_log, results

CONFIG = plot_log.DEFAULTS


def line(step, loss, **more):
    entry = {"step": step, "loss": loss, "learning_rate": 0.1} | more
    return entry | {"tokens": step * 100, "flops": step * 1e6, "mfu": 0.5}


def evaluation(step, nats):
    interval = [nats - 0.1, nats + 0.1]
    entry = {"step": step, "nats_per_token": nats}
    return entry | {"interval": interval, "perplexity": math.exp(nats)}


def log(folder, *entries, end="\n"):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, entries)) + end)
    return str(folder)


def test_a_log_is_read_as_steps_tokens_and_operations(tmp_path):
    entries = [line(10, 3.0), line(20, 2.5), evaluation(20, 2.6), line(30, 2.0)]
    folder = log(tmp_path / "a", *entries, evaluation(35, 2.1))
    train, held_out = plot_log.read_log(folder)
    columns = [[3.0, 10, 1000, 1e7], [2.5, 20, 2000, 2e7], [2.0, 30, 3000, 3e7]]
    assert train[:, :4].tolist() == columns and np.isnan(train[:, 4]).all()
    assert held_out[:, :4].tolist() == [[2.6, 20, 2000, 2e7], [2.1, 35, 3500, 3.5e7]]
    assert np.allclose(held_out[:, 4:], [[2.5, 2.7], [2.0, 2.2]])
    assert plot_log.label("a", held_out) == "a: 2.100 ± 0.100 at 35"


def test_dots_stand_where_their_tokens_were_seen_also_where_the_batch_has_grown(tmp_path):
    grown = line(20, 2.0) | {"tokens": 5000, "flops": 5e7}  # four times as many a step
    folder = log(tmp_path / "a", line(10, 3.0), evaluation(10, 3), grown, evaluation(15, 2.5))
    _, held_out = plot_log.read_log(folder)
    assert held_out[:, 2:4].tolist() == [[1000, 1e7], [3000, 3e7]]


def test_a_line_in_the_writing_is_left_out_and_a_number_that_json_lacks_is_a_gap(tmp_path):
    endless = {"step": 20, "nats_per_token": 2.0, "interval": [-math.inf, math.inf]}
    folder = log(tmp_path / "a", line(10, None), line(20, 2.0), endless, end='\n{"step": 30, "lo')
    train, held_out = plot_log.read_log(folder)
    assert math.isnan(train[0, 0]) and len(train) == 2
    assert plot_log.label("a", held_out) == "a: 2.000 at 20"
    assert plot_log.smoothed(train[:, 0], 1.0).tolist() == [2.0, 2.0]


def test_a_run_is_drawn_by_its_bound_and_its_loss_beside_it_where_that_is_another(tmp_path):
    logs = {"bound": (2.0, 2.0), "weighted": (3.0, 2.0), "old": (2.0, None), "gap": (None, None)}
    drawn = {}
    for name, (loss, nelbo) in logs.items():
        more = {} if name == "old" else {"nelbo": nelbo}
        entries = [line(1, 2.0, nelbo=2.0)] * (name == "gap") + [line(2, loss, **more)]
        train, _ = plot_log.read_log(log(tmp_path / name, *entries))
        drawn[name] = {k: v[~np.isnan(v)].tolist() for k, v in plot_log.curves(train).items()}
    assert drawn["bound"] == drawn["gap"] == {"-": [2.0]}
    assert drawn["weighted"] == {"-": [2.0], "--": [3.0]} and drawn["old"] == {"--": [2.0]}
    runs = [(name, plot_log.read_log(tmp_path / name)) for name in ("bound", "weighted")]
    low, high = plot_log.limits(runs, 0.0)
    assert low < 2.0 and high > 3.0


def test_smoothing_keeps_a_line_straight_and_means_what_it_says():
    y = np.arange(101.0)  # (n,)
    assert np.array_equal(plot_log.smoothed(y, 0), y)
    assert np.allclose(plot_log.smoothed(y, 0.1)[5:-5], y[5:-5])
    assert plot_log.smoothed(y, 0.1)[0] == y[:6].mean()
    assert plot_log.smoothed(y, 0.1)[50] == y[45:56].mean()


def test_the_steep_beginning_does_not_set_the_scale(tmp_path):
    entries = [line(step, 10.0 if step < 5 else 2.0 - step / 1000) for step in range(1, 101)]
    runs = [("a", plot_log.read_log(log(tmp_path / "a", *entries, evaluation(100, 2.05))))]
    low, high = plot_log.limits(runs, 0.0)
    assert 1.8 < low < 1.9 and 2.05 < high < 2.1


@pytest.mark.parametrize("runs", [1, 8])
def test_one_to_eight_runs_make_one_picture(tmp_path, runs):
    folders = [
        log(tmp_path / f"run_{i}", line(1, 5.0), line(2, 4.0 - i / 10), evaluation(2, 4.0))
        for i in range(runs)
    ]
    last = plot_log.main(CONFIG | {"folders": folders})
    picture = (tmp_path / "run_0" / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24])[0] == 1650
    assert last == dict.fromkeys(folders, 4.0)


def test_the_command_takes_folders_and_keys_in_any_order_and_refuses_in_one_line(tmp_path):
    folders = [log(tmp_path / name, line(1, 5.0), line(2, 4.0)) for name in "ab"]

    def command(*words):
        line = [sys.executable, "-m", "experiments.plot_log", *words]
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)

    out = f"--out={tmp_path / 'c.png'}"
    done = command(folders[0], out, folders[1])
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "c.png").is_file()
    refused = command(folders[0], "-o", out)
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr.startswith("plot_log.py: '-o' is neither")


def refusal(**keys):
    with pytest.raises(UserError) as error:
        plot_log.main(CONFIG | keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_drawn_is_named(tmp_path):
    whole, out = log(tmp_path / "good", line(1, 5.0)), str(tmp_path / "out.png")
    assert "say which runs" in refusal(folders=[])
    typo = f"no log.jsonl in {tmp_path / 'god'}; did you mean '{whole}'?"
    assert refusal(folders=[str(tmp_path / "god")]) == typo
    assert "has no training step yet" in refusal(folders=[log(tmp_path / "new", end="")])
    bad = log(tmp_path / "bad", line(1, 5.0), {"step": 2, "loss": 3})
    assert "log.jsonl, line 2: no entry" in refusal(folders=[bad])
    assert "9 runs are too many" in refusal(folders=[whole] * 9)
    with pytest.raises(UserError, match=r"smooth must be in \[0, 1\], not 2.0"):
        options({"smooth": 2.0}, plot_log)
    assert "cannot write" in refusal(folders=[whole], out=str(tmp_path))
    assert not (tmp_path / out).exists()


def test_every_plot_of_the_results_is_drawn_from_their_figures_alone(tmp_path):
    pytest.importorskip("matplotlib")
    kept = ROOT / "experiments/results"
    for path in kept.glob("*.json"):
        shutil.copy(path, tmp_path)
    results.main({"results": tmp_path})
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in kept.glob("*.png")}
    assert all(p.stat().st_size > 8_000 for p in tmp_path.glob("*.png"))
