"""README does what it says: its Python runs as printed, its commands name what exists."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import model as network
from data.tokenizer import Char
from lib import checkpoint

README = (ROOT / "README.md").read_text(encoding="utf8")
TEXT = "The list is sorted.\n"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder with out/pydocs, a tiny network that has learnt nothing."""
    tokenizer = Char("".join(sorted(set(TEXT))))
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 32}
    model = network.Transformer({**network.DEFAULTS, **shape, "vocab_size": tokenizer.vocab_size})
    state = {"config": model.config | {"objective": "any_order"}, "tokenizer": tokenizer.meta()}
    state |= {"model": model.state_dict(), "ema": None, "optimizer": [], "step": 1}
    checkpoint.save(tmp_path / "out/pydocs/ckpt.pt", state)
    monkeypatch.chdir(tmp_path)
    return model


def test_the_lines_of_the_library_run_as_printed_and_do_what_they_say(trained):
    (lines,) = blocks("python")
    names = {}
    exec(lines, names)
    V, mask_id = trained.vocab_size, trained.mask_id
    assert names["p"].shape == (4, V) and torch.allclose(names["p"].sum(1), torch.ones(4))
    assert names["info"]["nfe"].item() <= 4
    kept = names["x"] != mask_id
    assert kept.sum() + 4 == kept.numel() and torch.equal(names["x0"][kept], names["x"][kept])
    assert (names["x0"] != mask_id).all()
    assert names["nats"].shape == (1,) and names["nats"].item() > 0
    assert names["loss"].requires_grad and names["loss"].item() > 0


def test_every_program_that_readme_names_is_there_and_prints_its_help():
    text = " ".join(README.split())
    programs = set(re.findall(r"python (-m [\w.]+|\w+\.py)", text)) - {"-m pip"}
    assert {
        "train.py",
        "sample.py",
        "evaluate.py",
        "-m lib.checkpoint",
        "-m evals.choice",
    } <= programs
    for program in sorted(programs):
        name = program.removeprefix("-m ")
        path = name if program.endswith(".py") else name.replace(".", "/") + ".py"
        assert (ROOT / path).is_file(), f"README names {program}"


def test_every_key_that_readme_names_is_one_of_the_program_beside_it():
    commands = re.findall(r"(?:python (-m [\w.]+|\w+\.py))((?: [^`\n#]*)?)", README)
    checked = 0
    for program, rest in commands:
        keys = re.findall(r"--(\w+)", rest)
        if not keys or program == "-m pip":
            continue
        command = [sys.executable, *program.split(), "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for key in set(keys) - {"help"}:
            assert f'"{key}":' in done.stdout, f"README gives {program} the key --{key}"
            checked += 1
    assert checked > 10


def test_the_make_targets_that_readme_names_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_make_says_what_it_would_do_for_the_demo():
    env = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    done = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert "train.py configs/pydocs.py" in done.stdout and "sample.py" in done.stdout
