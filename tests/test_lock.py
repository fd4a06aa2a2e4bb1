"""Nothing is lost, also by the user's own hand: one run a folder, and what it replaces is kept."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import TEXT, log, process, refusal, run, same, state_of, until, words

import lib.program
import sample
import train
from config import UserError
from data import tokenizer, writer
from lib import files
from lib.files import only_one, whole_file
from lib.parallel import ANEW
from run import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = (train.main, *train.MODULES)
SAMPLE = (sample.main, *sample.MODULES)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lock") / "data"
    alphabet = tokenizer.Char("".join(sorted(set(TEXT))))
    writer.prepare(folder, [("train", TEXT), ("val", TEXT[:500])], alphabet)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- One program a folder ------------------------------------------------------------------------


def test_a_second_start_is_refused_by_name_harms_nothing_and_may_follow_a_kill(data, tmp_path):
    long = {"max_iters": 100_000, "save_interval": 1, "eval_interval": 1000, "lr_decay": "constant"}
    with process("train.py", *words(data, tmp_path, **long)) as first:
        until((tmp_path / "ckpt.pt").exists, first)
        owner = (tmp_path / ".lock").read_text("utf8").strip()
        assert owner.startswith(f"process {first.pid} on ") and re.search(r", since \d{4}-", owner)
        for keys in ({"max_iters": 1}, {"max_iters": 1, "resume": False}) * 3:
            message = f"{tmp_path} is in use by {owner}; choose another with --out_dir="
            assert refusal(data, tmp_path, **keys) == message
        until(lambda step=checkpoint.read(tmp_path)["step"]: reads(tmp_path) > step + 5, first)
        first.kill()
        first.wait()
    assert first.returncode == -signal.SIGKILL and (tmp_path / ".lock").exists()
    step = checkpoint.read(tmp_path)["step"]
    run(data, tmp_path, **long | {"max_iters": step + 2})
    assert checkpoint.read(tmp_path)["step"] == step + 2
    best = {"best.pt"}  # there if the killed run had time to read its text once
    assert {*os.listdir(tmp_path)} - best == {"ckpt.pt", "log.jsonl"}


def reads(out):
    return checkpoint.read(out)["step"]


def test_a_second_start_of_several_processes_is_refused_in_all(data, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with only_one(tmp_path, "out_dir", "ckpt.pt"):
        with process(*launch, "train.py", *words(data, tmp_path)) as both:
            _, err = both.communicate(timeout=120)
    assert both.returncode == 1
    assert err.count(f"train.py: {tmp_path} is in use by process {os.getpid()} on ") == 2
    assert os.listdir(tmp_path) == []


def test_a_second_preparation_of_a_folder_is_refused_and_harms_nothing(tmp_path):
    def documents():
        yield "train", "a" * 10
        with pytest.raises(UserError, match=rf"^{tmp_path} is in use by .*; choose another"):
            writer.prepare(tmp_path, [("train", "b")], tokenizer.Byte())
        yield "train", "a" * 10

    assert writer.prepare(tmp_path, documents(), tokenizer.Byte())["splits"]["train"]["bytes"] == 22


def test_one_process_gets_a_folder_however_many_want_it_at_a_time(tmp_path):
    inside, most, refused = [], [], []

    def want():
        for _ in range(50):
            try:
                with only_one(tmp_path / "new", "out", "meta.json"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except UserError:
                refused.append(1)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 200
    assert not list(tmp_path.glob("new/*"))


def test_a_lock_file_that_was_taken_away_while_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    real, seen = files.lock, []

    def lock(file, wait=False):
        if not seen:
            (tmp_path / ".lock").unlink()
        return seen.append(real(file, wait)) or seen[-1]

    monkeypatch.setattr(files, "lock", lock)
    with only_one(tmp_path, "out_dir", "ckpt.pt"):
        monkeypatch.undo()
        with (
            pytest.raises(UserError, match="in use by process"),
            only_one(tmp_path, "out_dir", "ckpt.pt"),
        ):
            pass
    assert len(seen) == 2


def test_without_locks_a_line_says_so_and_nothing_that_may_be_in_use_is_removed(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(files, "lock", lambda *_: None)
    (tmp_path / ".lock").write_text("process 5 on there, since 2020-01-01 00:00:00\n")
    (tmp_path / ".ckpt.pt.5.tmp").touch()
    run(data, tmp_path)
    said = (
        f"this system has no locks: see to it that nothing else uses {tmp_path}; it was last used"
    )
    assert f"{said} by process 5 on there" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == [".ckpt.pt.5.tmp", "ckpt.pt", "log.jsonl"]
    monkeypatch.undo()
    run(data, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "log.jsonl"]


def test_two_who_write_a_file_at_a_time_do_not_meet(tmp_path):
    with whole_file(tmp_path / "file") as one, whole_file(tmp_path / "file") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one" and os.listdir(tmp_path) == ["file"]


# ---- What a new run replaces ---------------------------------------------------------------------


def test_begun_anew_the_old_run_is_kept_and_can_be_used_and_resumed(data, tmp_path, capsys):
    steady = {"lr_decay": "constant", "keep": 2, "save_interval": 2}
    run(data, tmp_path, **steady, max_iters=4)
    before, aside = contents(tmp_path), tmp_path / "old_1"
    run(data, tmp_path, resume=False, n_layer=2, max_iters=2)
    assert f"the run that was here is kept: --ckpt={aside}" in capsys.readouterr().out
    assert contents(aside) == {aside / path.name: text for path, text in before.items()}
    assert checkpoint.read(tmp_path)["config"]["n_layer"] == 2
    run(data, tmp_path, resume=False, max_iters=2)
    assert checkpoint.read(tmp_path / "old_2")["config"]["n_layer"] == 2
    assert checkpoint.load(aside)[0].config["n_layer"] == 1
    run(data, aside, **steady, max_iters=8)
    run(data, tmp_path / "whole", **steady, max_iters=8)
    assert same(state_of(aside), state_of(tmp_path / "whole"))
    assert log(aside) == log(tmp_path / "whole")


def test_a_new_run_that_cannot_begin_leaves_the_old_one_where_it_was(data, tmp_path, monkeypatch):
    run(data, tmp_path, max_iters=2)
    before = contents(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for keys in ({"n_embd": 7}, {"data": tmp_path / "none"}, {"wandb": "mine"}):
        refusal(**{"data": data, "out": tmp_path, "resume": False} | keys)
        assert contents(tmp_path) == before


def test_advice_to_begin_anew_names_another_folder_first():
    assert ANEW.index("--out_dir=") < ANEW.index("--resume=False")
    for path in [*ROOT.glob("lib/*.py"), *ROOT.glob("run/*.py")]:
        others = path.read_text("utf8").replace(ANEW, "")
        assert "--resume=False" not in others, path


def test_a_finished_run_says_so_and_how_to_go_on(data, tmp_path, capsys):
    run(data, tmp_path)
    assert "finished" not in capsys.readouterr().out
    run(data, tmp_path)
    said = (
        "it is finished; --out_dir= begins another, a larger --max_iters= or --max_minutes= goes on"
    )
    assert said in capsys.readouterr().out.splitlines()


def test_make_clean_leaves_trained_models():
    plan = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0 and ".venv" in plan.stdout
    assert not re.search(r"\bout\b", plan.stdout)


# ---- Saved before shown --------------------------------------------------------------------------


@contextlib.contextmanager
def nobody_reads(monkeypatch, path=None):
    """Inside, the output goes to a pipe that nobody reads, or to a file."""
    reading, writing = os.pipe()
    os.close(reading)
    with io.TextIOWrapper(open(path or writing, "wb"), encoding="utf8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        yield
        monkeypatch.undo()
    path and os.close(writing)


def exit_code(monkeypatch, program, *line):
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, line)])
    with pytest.raises(SystemExit) as end:
        lib.program.run(*program)
    return end.value.code


@pytest.mark.parametrize("watch", [False, True])
def test_samples_are_saved_though_nobody_reads_what_is_said(watch, data, tmp_path, monkeypatch):
    run(data, tmp_path, max_iters=2)
    line = [f"--ckpt={tmp_path}", f"--out={tmp_path / 's.jsonl'}", "--steps=4", f"--watch={watch}"]
    with nobody_reads(monkeypatch):
        assert exit_code(monkeypatch, SAMPLE, *line) == 141
    lines = (tmp_path / "s.jsonl").read_text("utf8").splitlines()
    assert [len(json.loads(line)["tokens"]) for line in lines] == [16] * 4


def test_a_run_goes_on_to_its_end_though_nobody_reads_what_is_said(data, tmp_path, monkeypatch):
    with nobody_reads(monkeypatch):
        assert exit_code(monkeypatch, TRAIN, *words(data, tmp_path, show_sample=True)) == 141
    assert checkpoint.read(tmp_path)["step"] == 12 and len(log(tmp_path)) == 9


def test_an_experiment_writes_its_results_before_it_shows_them():
    for path in ROOT.glob("experiments/*.py"):
        text = path.read_text("utf8")
        written, shown = (
            text.find("results.write("),
            re.search(r"\n    print\((text|table)\)", text),
        )
        assert written < 0 or not shown or written < shown.start(), path


def test_a_full_disk_under_the_output_is_one_line(data, tmp_path, monkeypatch, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    run(data, tmp_path, max_iters=2)
    line = [f"--ckpt={tmp_path}", f"--out={tmp_path / 's.jsonl'}", "--steps=4"]
    with nobody_reads(monkeypatch, "/dev/full"):
        assert exit_code(monkeypatch, SAMPLE, *line) == 2
    message = "program.py: cannot write the output: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == message
    assert (tmp_path / "s.jsonl").exists()
