"""Survival: killed, terminated, out of disk, read-only, damaged, diverged. What was saved stays, and the run goes on."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import TEXT, config_of, log, log_so_far, losses, process, refusal, run, same, state_of, until, words

import checkpoint
import config as settings
import train
from config import UserError
from data import writer
from data.tokenizer import Char
from experiments import results, survive
from journal import Journal

pytestmark = pytest.mark.usefixtures("quick")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survive") / "data"
    writer.prepare(folder, [("train", TEXT), ("val", TEXT[:500])], Char("".join(sorted(set(TEXT)))))
    return folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(train.network, "matmul_flops", lambda *_: 1e9)
    torch.set_num_threads(1)


# ---- Killed ------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_again_and_again_ends_as_one_left_alone(tmp_path):
    line = ["--kills=5", "--steps=16", f"--results={tmp_path}"]
    figures = survive.main(settings.parse(line, settings, results, survive))
    assert (figures["kills"], figures["corrupted"], figures["lost_steps"], figures["identical"]) == (5, 0, 0, True)
    assert json.loads((tmp_path / "survive.json").read_text()) == figures


KILLED_WHILE_IT_WRITES = """
import os, signal, sys, torch, checkpoint
from pathlib import Path

def half(state, path):
    Path(path).write_bytes(Path(sys.argv[1]).read_bytes()[:-2000])
    os.kill(os.getpid(), signal.SIGKILL)

state = checkpoint.read(sys.argv[1])
torch.save = half
checkpoint.save(Path(sys.argv[1]), state | {"step": 99})
"""


def test_a_checkpoint_half_written_leaves_the_one_before_and_is_swept_away(data, tmp_path):
    run(data, tmp_path, max_iters=4)
    before = (tmp_path / "ckpt.pt").read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_WRITES, tmp_path / "ckpt.pt"], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert len(left) == 1 and left[0].stat().st_size == len(before) - 2000
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    run(data, tmp_path, max_iters=6)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "log.jsonl"] and checkpoint.read(tmp_path)["step"] == 6


# ---- The disk ----------------------------------------------------------------------------------------------------------

STEADY = {"lr_decay": "constant"}


def test_a_disk_that_is_full_ends_the_run_in_one_line_and_the_run_goes_on_when_there_is_room(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(data, parts, **STEADY, max_iters=4)
    before = (parts / "ckpt.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)  # noqa: E731 (no file may be larger)
    line = [sys.executable, "train.py", *words(data, parts, **STEADY)]
    full = subprocess.run(line, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert full.stderr.splitlines()[-1] == f"train.py: cannot write {parts}/ckpt.pt; is the disk full?"
    assert (parts / "ckpt.pt").read_bytes() == before and sorted(os.listdir(parts)) == ["ckpt.pt", "log.jsonl"]
    assert run(data, parts, **STEADY) == run(data, whole, **STEADY)
    assert same(state_of(parts), state_of(whole)) and log(parts) == log(whole)


def test_a_full_disk_under_the_log_is_one_line(data, tmp_path):
    journal = Journal(config_of(data, tmp_path), tmp_path / "ckpt.pt", 0, 1.0, 1.0, told=True)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with journal, pytest.raises(UserError, match=r"cannot write .*log.jsonl: No space left on device"):
        journal.write({"step": 1})


@pytest.fixture
def open_to_all():
    """A folder in which another user than root may read and write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_a_folder_that_is_read_only_is_one_line_at_the_start_and_stays_as_it_is(data, open_to_all):
    text = shutil.copytree(data, open_to_all / "data")
    run(text, open_to_all / "out", max_iters=4)
    before = [(path, path.read_bytes()) for path in sorted((open_to_all / "out").iterdir())]
    os.chmod(open_to_all / "out", 0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # nothing is read-only for root
    try:
        assert refusal(text, open_to_all / "out") == f"cannot write {open_to_all}/out/log.jsonl: Permission denied"
    finally:
        if root:
            os.seteuid(0)
    os.chmod(open_to_all / "out", 0o755)
    assert [(path, path.read_bytes()) for path in sorted((open_to_all / "out").iterdir())] == before


def test_a_damaged_log_does_no_harm(data, tmp_path):
    run(data, tmp_path, max_iters=4)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'\0\0\xff\n[]\n{"step": "x"}\n{"st')
    run(data, tmp_path)
    assert [entry["step"] for entry in log(tmp_path)] == [2, 4, 4, 6, 8, 8, 10, 12, 12]


# ---- Checkpoints that are kept -----------------------------------------------------------------------------------------


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pt")


def test_the_last_checkpoints_are_kept_the_newest_at_no_cost(data, tmp_path):
    run(data, tmp_path, keep=3, save_interval=2)
    assert kept(tmp_path) == ["ckpt.pt", "ckpt_10.pt", "ckpt_12.pt", "ckpt_8.pt"]
    assert [checkpoint.read(tmp_path / f"ckpt_{step}.pt")["step"] for step in (8, 10, 12)] == [8, 10, 12]
    assert os.path.samefile(tmp_path / "ckpt.pt", tmp_path / "ckpt_12.pt")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:3000] + bytes([b[3000] ^ 1]) + b[3001:]])
def test_a_damaged_checkpoint_is_one_line_that_names_the_one_before_from_which_the_run_goes_on(damage, data, tmp_path):
    keys = {"keep": 2, "save_interval": 3, "ema": 0.9}
    run(data, tmp_path / "whole", **keys)
    run(data, tmp_path / "parts", **keys)
    path = tmp_path / "parts" / "ckpt.pt"
    path.write_bytes(damage(path.read_bytes()))  # and with it ckpt_12.pt, the same file
    before = path.with_name("ckpt_9.pt")
    told = f"{path} is damaged, or not a checkpoint; copy {before} over it to go on from there"
    assert refusal(data, path.parent, **keys) == told
    shutil.copy(before, path)
    run(data, path.parent, **keys)
    assert same(state_of(path.parent), state_of(tmp_path / "whole")) and log(path.parent) == log(tmp_path / "whole")
    assert kept(path.parent) == ["ckpt.pt", "ckpt_12.pt", "ckpt_9.pt"]


def test_a_run_that_goes_back_makes_later_checkpoints_again(data, tmp_path):
    run(data, tmp_path, keep=3, save_interval=2)
    shutil.copy(tmp_path / "ckpt_8.pt", tmp_path / "ckpt.pt")
    run(data, tmp_path, keep=3, save_interval=1, max_iters=9, lr_decay="constant")
    assert kept(tmp_path) == ["ckpt.pt", "ckpt_8.pt", "ckpt_9.pt"]


# ---- Diverged ----------------------------------------------------------------------------------------------------------


def test_a_bad_step_is_stepped_over_as_if_it_had_not_been(data, tmp_path, monkeypatch, capsys):
    make_batch = train.make_batch

    def bad(config, blocks, step, position):
        x0, mask, weight, rows = make_batch(config, blocks, step, position)
        return x0, mask, weight * (math.nan if step == 5 else 1), rows

    monkeypatch.setattr(train, "make_batch", bad)
    keys = {"ema": 0.9, "grad_clip": 0.0, "log_interval": 1, "eval_interval": 5, "keep": 9, "save_interval": 1}
    run(data, tmp_path, **keys, skip_nonfinite=True)
    five, six = (checkpoint.read(tmp_path / f"ckpt_{step}.pt") for step in (5, 6))
    assert all(same(five[part], six[part]) for part in ("model", "ema"))
    assert "step 6: the gradient is not finite, so the weights stay as they are (1 such steps)" in capsys.readouterr().out
    assert losses(tmp_path)[5] is None and all(losses(tmp_path)[:5] + losses(tmp_path)[6:])
    told = f"the loss is nan at step 6; the last good checkpoint is {tmp_path}/other/ckpt.pt"
    assert refusal(data, tmp_path / "other", **keys) == told
    assert checkpoint.read(tmp_path / "other")["step"] == 5


def test_weights_that_are_not_finite_are_never_saved(data, tmp_path):
    config = config_of(data, tmp_path, max_iters=4)
    run(data, tmp_path, max_iters=4)
    before = (tmp_path / "ckpt.pt").read_bytes()
    model, _, optimizers = train.build(checkpoint.read(tmp_path)["config"], torch.device("cpu"), None)
    model.norm.weight.data[3] = math.inf
    text = Char("".join(sorted(set(TEXT))))
    with pytest.raises(UserError, match=f"not finite at step 5; the last good checkpoint is {tmp_path}/ckpt.pt"):
        train.save(tmp_path / "ckpt.pt", config, text, 5, model, None, optimizers, 1, 0)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


# ---- Several processes -------------------------------------------------------------------------------------------------

PROGRAM = """
import os, pathlib, signal, sys, time, train, config, diffusion, model
here, step_of = pathlib.Path(sys.argv.pop(1)), train.train_step
mine = here / f"ended_{os.environ['RANK']}"
model.matmul_flops = lambda *_: 1e9

def train_step(config, step, *rest):
    if step == 8 and os.environ["RANK"] == "1" and not mine.exists():
        mine.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(config, step, *rest)

train.train_step = train_step
try:
    config.run(train.main, config, diffusion, model, train)
finally:
    mine.exists() or mine.write_text(str(time.time()))
"""


def test_a_rank_that_dies_ends_the_others_and_torchrun_goes_on_and_stops_when_told(data, tmp_path):
    keys = STEADY | {"max_iters": 4000, "log_interval": 4, "save_interval": 5, "eval_interval": 4000}
    (tmp_path / "program.py").write_text(PROGRAM)
    line = [*TORCHRUN, "--max-restarts=1", tmp_path / "program.py", tmp_path, *words(data, tmp_path / "out", **keys)]
    with process(*line) as both:
        until((tmp_path / "out" / "log.jsonl").exists, both)
        until(lambda: any(entry["step"] > 20 for entry in log_so_far(tmp_path / "out")), both)
        both.send_signal(signal.SIGTERM)
        out, err = both.communicate(timeout=60)
    # Process 1 was killed at step 9. Process 0 said so in one line and ended at once; both went on from step 5.
    killed, ended = (float((tmp_path / f"ended_{rank}").read_text()) for rank in (1, 0))
    assert 0 < ended - killed < 10
    assert len(re.findall(r"^program.py: lost the other processes: .* goes on from .*ckpt.pt.*$", err, re.M)) == 1
    assert f"going on from {tmp_path}/out/ckpt.pt at step 5 of 4000" in out
    # SIGTERM to torchrun: both stopped at the same step, the next one that is logged, and saved.
    at = checkpoint.read(tmp_path / "out")["step"]
    assert both.returncode != 0 and 20 < at < 4000 and at % 4 == 0
    assert f"stopped and saved {tmp_path}/out/ckpt.pt at step {at}" in out
    run(data, tmp_path / "one", **keys | {"max_iters": at})
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
