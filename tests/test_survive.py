"""Survival: killed, terminated, out of disk, read-only, damaged, diverged. What was saved stays."""

import contextlib
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
from test_train import (
    TEXT,
    config_of,
    log,
    log_so_far,
    losses,
    process,
    refusal,
    run,
    same,
    state_of,
    until,
    words,
)

import config as settings
import model as network
import train
from config import UserError
from data import loader, writer
from data.tokenizer import Char
from experiments import results, survive, two_hosts
from lib.parallel import ANEW, Team
from run import checkpoint, resume
from run.budget import Clock
from run.log import Log

pytestmark = pytest.mark.usefixtures("one_thread")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survive") / "data"
    writer.prepare(folder, [("train", TEXT), ("val", TEXT[:500])], Char("".join(sorted(set(TEXT)))))
    return folder


# ---- Killed --------------------------------------------------------------------------------------


def test_a_run_that_is_killed_again_and_again_ends_as_one_left_alone(tmp_path):
    line = ["--kills=5", "--steps=48", f"--results={tmp_path}"]
    figures = survive.main(settings.parse(line, settings, results, survive))
    assert [figures[key] for key in ("kills", "corrupted", "lost_steps")] == [5, 0, 0]
    assert figures["identical"] is True
    assert json.loads((tmp_path / "survive.json").read_text()) == figures


KILLED_WHILE_IT_WRITES = """
import os, signal, sys, torch
from pathlib import Path
from run import checkpoint

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
    command = [sys.executable, "-c", KILLED_WHILE_IT_WRITES, tmp_path / "ckpt.pt"]
    killed = subprocess.run(command, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert len(left) == 1 and left[0].stat().st_size == len(before) - 2000
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    run(data, tmp_path, max_iters=6)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "log.jsonl"]
    assert checkpoint.read(tmp_path)["step"] == 6


# ---- The disk ------------------------------------------------------------------------------------

STEADY = {"lr_decay": "constant"}


def test_a_full_disk_ends_the_run_in_one_line_and_with_room_it_is_resumed(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(data, parts, **STEADY, max_iters=4)
    before = (parts / "ckpt.pt").read_bytes()

    def limit():
        """No file may be larger."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    line = [sys.executable, "train.py", *words(data, parts, **STEADY)]
    keys = {"cwd": ROOT, "capture_output": True, "text": True}
    full = subprocess.run(line, preexec_fn=limit, check=False, **keys)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    message = f"train.py: cannot write {parts}/ckpt.pt; is the disk full?"
    assert full.stderr.splitlines()[-1] == message
    assert (parts / "ckpt.pt").read_bytes() == before
    assert sorted(os.listdir(parts)) == ["ckpt.pt", "log.jsonl"]
    assert run(data, parts, **STEADY) == run(data, whole, **STEADY)
    assert same(state_of(parts), state_of(whole)) and log(parts) == log(whole)


def test_a_full_disk_under_the_log_is_one_line(data, tmp_path):
    blocks = loader.Blocks(loader.Tokens(data, "train"), 16, 1)
    config, _ = resume.begin(config_of(data, tmp_path), Team())
    model = network.make_network(config)
    full = Log(config, model, blocks, Clock(config, None, Team()), Team())
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with full, pytest.raises(UserError, match=r"cannot write .*log.jsonl: No space left on device"):
        full.write({"step": 1})


@pytest.fixture
def open_to_all():
    """A folder in which another user than root may read and write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_a_folder_that_is_read_only_is_one_line_at_the_start_and_stays_as_it_is(data, open_to_all):
    text = shutil.copytree(data, open_to_all / "data")
    run(text, open_to_all / "out", max_iters=4)
    out = open_to_all / "out"
    before = [(path, path.read_bytes()) for path in sorted(out.iterdir())]
    os.chmod(out, 0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # nothing is read-only for root
    try:
        assert refusal(text, out) == f"cannot write {out}/.lock: Permission denied"
    finally:
        if root:
            os.seteuid(0)
    os.chmod(out, 0o755)
    assert [(path, path.read_bytes()) for path in sorted(out.iterdir())] == before


def test_a_damaged_log_does_no_harm(data, tmp_path):
    run(data, tmp_path, max_iters=4)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'\0\0\xff\n[]\n{"step": "x"}\n{"st')
    run(data, tmp_path)
    assert [entry["step"] for entry in log(tmp_path)] == [2, 4, 4, 6, 8, 8, 10, 12, 12]


# ---- Checkpoints that are kept -------------------------------------------------------------------


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pt")


def test_the_last_checkpoints_are_kept_the_newest_at_no_cost(data, tmp_path):
    run(data, tmp_path, keep=3, save_interval=2)
    assert kept(tmp_path) == ["ckpt.pt", "ckpt_10.pt", "ckpt_12.pt", "ckpt_8.pt"]
    for step in (8, 10, 12):
        assert checkpoint.read(tmp_path / f"ckpt_{step}.pt")["step"] == step
    assert os.path.samefile(tmp_path / "ckpt.pt", tmp_path / "ckpt_12.pt")


DAMAGES = {"cut": lambda b: b[: len(b) // 2]}
DAMAGES["flipped"] = lambda b: b[:3000] + bytes([b[3000] ^ 1]) + b[3001:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_that_names_the_one_to_resume(damage, data, tmp_path):
    keys = {"keep": 2, "save_interval": 3, "ema": 0.9}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(data, whole, **keys)
    run(data, parts, **keys)
    path, before = parts / "ckpt.pt", parts / "ckpt_9.pt"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))  # and with it ckpt_12.pt, the same file
    advice = f"copy {before} over it to resume from there, or {ANEW}"
    assert refusal(data, parts, **keys) == f"{path} is damaged, or not a checkpoint; {advice}"
    shutil.copy(before, path)
    run(data, parts, **keys)
    assert same(state_of(parts), state_of(whole)) and log(parts) == log(whole)
    assert kept(parts) == ["ckpt.pt", "ckpt_12.pt", "ckpt_9.pt"]


def test_a_run_that_goes_back_makes_later_checkpoints_again(data, tmp_path):
    run(data, tmp_path, keep=3, save_interval=2)
    shutil.copy(tmp_path / "ckpt_8.pt", tmp_path / "ckpt.pt")
    run(data, tmp_path, keep=3, save_interval=1, max_iters=9, lr_decay="constant")
    assert kept(tmp_path) == ["ckpt.pt", "ckpt_8.pt", "ckpt_9.pt"]


# ---- Diverged ------------------------------------------------------------------------------------


def test_a_bad_step_is_skipped_as_if_it_had_not_been(data, tmp_path, monkeypatch, capsys):
    make_batch = train.make_batch

    def bad(config, blocks, step, position):
        batch = make_batch(config, blocks, step, position)
        return batch._replace(weight=batch.weight * (math.nan if step == 5 else 1))

    monkeypatch.setattr(train, "make_batch", bad)
    keys = {"ema": 0.9, "grad_clip": 0.0, "log_interval": 1, "eval_interval": 5}
    keys |= {"keep": 9, "save_interval": 1}
    run(data, tmp_path, **keys, skip_nonfinite=True)
    five, six = (checkpoint.read(tmp_path / f"ckpt_{step}.pt") for step in (5, 6))
    assert all(same(five[part], six[part]) for part in ("model", "ema"))
    line = "step 6: the gradient is not finite, so the weights stay as they are (1 such step)"
    assert line in capsys.readouterr().out
    assert losses(tmp_path)[5] is None and all(losses(tmp_path)[:5] + losses(tmp_path)[6:])
    other = tmp_path / "other"
    message = f"the loss is nan at step 6; the last good checkpoint is {other}/ckpt.pt"
    assert refusal(data, other, **keys) == message
    assert checkpoint.read(other)["step"] == 5


def test_weights_that_are_not_finite_are_never_saved(data, tmp_path):
    config = config_of(data, tmp_path, max_iters=4)
    run(data, tmp_path, max_iters=4)
    before = (tmp_path / "ckpt.pt").read_bytes()
    model, _, optimizers = train.build(checkpoint.read(tmp_path)["config"], Team())
    model.norm.weight.data[3] = math.inf
    tokenizer = Char("".join(sorted(set(TEXT))))
    message = f"not finite at step 5; the last good checkpoint is {tmp_path}/ckpt.pt"
    with pytest.raises(UserError, match=message):
        clock = Clock(config, {"step": 5}, Team())
        resume.save(config, tokenizer, clock, model, None, optimizers, Team())
    assert (tmp_path / "ckpt.pt").read_bytes() == before


# ---- Several processes ---------------------------------------------------------------------------

PROGRAM = """
import os, pathlib, signal, sys, time, train, run.log
from lib import program
here, step_of = pathlib.Path(sys.argv.pop(1)), train.train_step
mine = here / f"ended_{os.environ['RANK']}"
run.log.matmul_flops = lambda *_: 1e9

def train_step(config, step, *rest):
    if step == 8 and os.environ["RANK"] == "1" and not mine.exists():
        mine.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(config, step, *rest)

train.train_step = train_step
try:
    program.run(train.main, *train.MODULES)
finally:
    mine.exists() or mine.write_text(str(time.time()))
"""


def test_a_rank_that_dies_ends_the_others_and_torchrun_goes_on_and_stops_when_told(data, tmp_path):
    keys = STEADY | {"max_iters": 4000, "eval_interval": 4000}
    keys |= {"log_interval": 4, "save_interval": 5}
    program, out_dir = tmp_path / "program.py", tmp_path / "out"
    program.write_text(PROGRAM)
    line = [*TORCHRUN, "--max-restarts=1", program, tmp_path, *words(data, out_dir, **keys)]
    with process(*line) as both:
        until((out_dir / "log.jsonl").exists, both)
        until(lambda: any(entry["step"] > 20 for entry in log_so_far(out_dir)), both)
        both.send_signal(signal.SIGTERM)
        out, err = both.communicate(timeout=60)
    # Process 1 was killed at step 9. Process 0 said so in one line and ended at once; then both
    # resumed the run at step 5.
    killed, ended = (float((tmp_path / f"ended_{rank}").read_text()) for rank in (1, 0))
    assert 0 < ended - killed < 10
    line = r"^program.py: lost the other processes: .* resumes .*ckpt.pt.*$"
    assert len(re.findall(line, err, re.M)) == 1, err
    assert f"resuming {out_dir}/ckpt.pt at step 5 of 4000" in out
    # SIGTERM to torchrun: both stopped at the same step, the next one that is logged, and saved.
    at = checkpoint.read(out_dir)["step"]
    assert both.returncode != 0 and 20 < at < 4000 and at % 4 == 0
    assert f"stopped and saved {out_dir}/ckpt.pt at step {at}" in out
    run(data, tmp_path / "one", **keys | {"max_iters": at})
    assert losses(out_dir) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


REACH = """
import socket
with socket.create_connection(("10.77.0.1", 29500), 5) as line:
    print(line.recv(5).decode())
"""
MEET = """
import socket
with socket.create_server(("10.77.0.1", 29500)) as place:
    print(flush=True)
    place.accept()[0].send(b"hello")
"""


def test_two_hosts_reach_each_other_and_whatever_happens_nothing_of_them_is_left():
    def at(host, program):
        line = ["ip", "netns", "exec", host.name, sys.executable, "-c", program]
        return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)

    with pytest.raises(ValueError), contextlib.ExitStack() as opened:
        try:
            first, second = opened.enter_context(two_hosts.two_hosts())
        except UserError as refused:
            pytest.skip(str(refused))
        server, sleeper = at(first, MEET), at(first, "import time; time.sleep(600)")
        server.stdout.readline()
        assert at(second, REACH).communicate(timeout=60)[0] == "hello\n"
        raise ValueError
    assert sleeper.wait(timeout=60) == -signal.SIGKILL
    names = two_hosts.ip("netns", "list")
    assert first.name not in names and second.name not in names


def test_the_two_hosts_compare_the_tensors_that_differ_most():
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.zeros(3)}
    assert two_hosts.difference(a, a) == 0
    assert two_hosts.difference(a, a | {"x": torch.tensor([1.0, 2.5])}) == 0.5
