"""Bad input to the commands: one line that names the culprit, exit code 2, nothing half-written."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from plain import DEFAULTS, RECIPE

import evaluate
import lib.program
import sample
import train
from data import writer
from data.tokenizer import Char
from model import make_network
from run import checkpoint

TEXT = "the cat sat on the mat; a dog ran to the log. " * 20
TRAIN = ["train", "--data=data", "--out_dir=out", "--n_layer=1", "--n_embd=16"]
TRAIN += ["--block_size=16", "--max_iters=2", "--n_head=4", "--batch_size=32"]
TRAIN += [f"--{key}={value}" for key, value in RECIPE.items()]
SAMPLE = ["sample", "--ckpt=run", "--out=samples.jsonl"]
EVALUATE = ["evaluate", "--ckpt=run", "--data=data"]
MODULES = {
    "train": (train.main, *train.MODULES),
    "sample": (sample.main, *sample.MODULES),
    "evaluate": (evaluate.main, *evaluate.MODULES),
}


def save(folder, text, **keys):
    """A small checkpoint as train.py leaves it, but for its optimizer."""
    shape = {"n_layer": 1, "n_embd": 16, "block_size": 16, "vocab_size": text.vocab_size}
    model = make_network(DEFAULTS | shape | keys)
    state = {"config": model.config | {"objective": "any_order"}, "tokenizer": text.meta()}
    state |= {"step": 1, "model": model.state_dict(), "ema": None, "optimizer": []}
    checkpoint.save(folder / "ckpt.pt", state)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with good and bad things in it: data, runs, presets, texts."""
    world = tmp_path_factory.mktemp("world")
    text = Char("".join(sorted(set(TEXT))))
    writer.prepare(world / "data", [("train", TEXT), ("val", TEXT[:200])], text)
    writer.prepare(world / "short", [("train", "a cat"), ("val", "a dog")], text)
    writer.prepare(world / "unlearnt", [("val", TEXT)], text)
    greek = [("train", "αβγ" * 99), ("val", "αβγ" * 9)]
    writer.prepare(world / "greek", greek, Char("αβγ"))
    loud = "".join(sorted(set(TEXT.upper())))
    writer.prepare(world / "loud", [("train", TEXT.upper()), ("val", TEXT.upper())], Char(loud))
    meta = shutil.copytree(world / "data", world / "renamed") / "meta.json"
    other = json.loads(meta.read_text("utf8")) | {"tokenizer": {"kind": "gpt2"}}
    meta.write_text(json.dumps(other), "utf8")
    writer.prepare(world / "torn", [("train", TEXT), ("val", TEXT)], text)
    (world / "torn" / "train_00000.bin").write_bytes(b"\0" * 99)

    save(world / "run", text)
    save(world / "causal", text, attention="causal")
    whole = (world / "run" / "ckpt.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    bad = {"cut": whole[: len(whole) // 2], "flipped": flipped}
    bad |= {"nothing": b"", "prose": TEXT.encode()}
    for name, content in bad.items():
        (world / name).mkdir()
        (world / name / "ckpt.pt").write_bytes(content)
    (world / "foreign").mkdir()
    torch.save({"weights": torch.zeros(3)}, world / "foreign" / "ckpt.pt")
    (world / "lacking").mkdir()
    torch.save({"config": {}, "model": {}}, world / "lacking" / "ckpt.pt")
    (world / "hollow").mkdir()
    (world / "weights").mkdir()
    (world / "weights" / "model.safetensors").touch()

    (world / "small.py").write_text("{'n_layer': 2}")
    (world / "typo.py").write_text("{'n_layers': 2}")
    (world / "code.py").write_text("{'n_layer': print('ran')}")
    (world / "empty.txt").write_text(" \n")
    (world / "own.txt").write_text(TEXT)
    return world


def contents(folder):
    """All that is in a folder: its files with their hashes, and its folders."""
    paths = sorted(folder.rglob("*"))
    hashed = lambda path: hashlib.sha256(path.read_bytes()).digest()  # noqa: E731
    return [(path, hashed(path) if path.is_file() else None) for path in paths]


# ---- As real commands ----------------------------------------------------------------------------

REAL = {
    "no data folder": (
        ["train.py", *TRAIN[1:], "--data=nowhere"],
        "no prepared data in nowhere; prepare it with: python",
    ),
    "unknown key": (
        ["train.py", "small.py", *TRAIN[1:], "--sead=1"],
        "unknown key --sead; did you mean 'seed'?",
    ),
    "wrong type": (
        ["train.py", *TRAIN[1:], "--batch_size=many"],
        "--batch_size must be a whole number, not 'many'",
    ),
    "damaged checkpoint": (["train.py", *TRAIN[1:], "--out_dir=cut"], "with --resume=False, which"),
    "long prompt": (
        ["sample.py", "--ckpt=run", f"--prompt={TEXT}"],
        f"prompt and suffix are {len(TEXT)} tokens",
    ),
    "no gap": (
        ["sample.py", "--ckpt=run", "--template=the cat"],
        "the template has no gap: write ___12",
    ),
    "unknown sampler": (
        ["sample.py", "--ckpt=run", "--sampler=ancestor"],
        "unknown sampler 'ancestor'; did you mean",
    ),
    "another vocabulary": (
        ["evaluate.py", "--ckpt=run", "--data=greek"],
        "greek has another tokenizer than run; take ",
    ),
    "empty text": (
        ["-m", "data.text.prepare", "--out=prepared", "--input=empty.txt"],
        "empty.txt holds no text",
    ),
    "data in a run": (
        ["-m", "data.text.prepare", "--out=run", "--input=own.txt"],
        "out run holds a run (ckpt.pt); choose another folder",
    ),
    "an export in a run": (
        ["-m", "run.checkpoint", "export", "--ckpt=run", "--to=run"],
        "to run holds a run (ckpt.pt); choose another folder",
    ),
}
GOOD = {"sample": (["sample.py", "--ckpt=run", "--template=the ___5 on"], "---- sample 4: ")}


def command(words, cwd):
    """A finished process."""
    ours = [word for word in words if word.endswith(".py") and (ROOT / word).exists()]
    words = [str(ROOT / word) if word in ours else word for word in words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    keys = {"cwd": cwd, "env": env, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *words], check=False, **keys)


@pytest.fixture(scope="session")
def finished(world):
    """{case: finished process}, run two at a time, and what the world held before and after."""
    before, cases = contents(world), REAL | GOOD
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda case: command(case[0], world), cases.values())
        done = dict(zip(cases, done, strict=True))
    return done, before, contents(world)


@pytest.mark.parametrize("case", REAL)
def test_a_real_command_with_bad_input_says_one_line_and_exits_with_code_2(case, finished):
    done, message = finished[0][case], REAL[case][1]
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.count("\n") == 1 and "\r" not in done.stderr, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("case", GOOD)
def test_the_good_command_beside_the_bad_ones_works(case, finished):
    done, message = finished[0][case], GOOD[case][1]
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert message in done.stdout


def test_real_commands_leave_everything_as_it_was(finished):
    _, before, after = finished
    assert after == before


# ---- In this process: the same entry, without the seconds that a start takes ---------------------

BAD = {
    "nothing to score": (["evaluate", "--ckpt=run", "--text="], "the text to score is empty"),
    "a text as a folder": (
        [*TRAIN, "--data=data/meta.json"],
        "--input=data/meta.json --out=data/meta",
    ),
    "a file as a folder": ([*TRAIN, "--out_dir=data/meta.json"], "a file stands where a folder"),
    # What comes in: presets and keys
    "a missing preset": (
        [TRAIN[0], "smal.py", *TRAIN[1:]],
        "no preset file smal.py; did you mean 'small.py'?",
    ),
    "typo in a preset": (
        [TRAIN[0], "typo.py", *TRAIN[1:]],
        "unknown key typo.py: n_layers; did you mean 'n_layer'?",
    ),
    "code in a preset": (
        [TRAIN[0], "code.py", *TRAIN[1:]],
        "code.py must hold one Python dict literal",
    ),
    "no equals sign": ([*TRAIN, "--batch_size"], "write --batch_size=VALUE"),
    "a preset without its folder": (["train", "pydocs"], "did you mean configs/pydocs.py?"),
    "no dashes": (["train", "max_iters=3"], "did you mean --max_iters=3?"),
    "two lines": ([*SAMPLE, "--template=the\ncat"], "the template has no gap"),
    # What training cannot do
    "objective": (
        [*TRAIN, "--objective=anyorder"],
        "unknown objective 'anyorder'; did you mean 'any_order'?",
    ),
    "optimizer": ([*TRAIN, "--optimizer=adam"], "unknown optimizer 'adam'; did you mean 'adamw'?"),
    "loss weight": ([*TRAIN, "--loss_weight=none"], "unknown loss_weight 'none'"),
    "schedule": (
        [*TRAIN, "--schedule=linear"],
        "unknown schedule 'linear'; did you mean 'loglinear'?",
    ),
    "lr decay": ([*TRAIN, "--lr_decay=exp"], "unknown lr_decay 'exp'"),
    "norm": ([*TRAIN, "--norm=batch"], "unknown norm 'batch'"),
    "mlp": ([*TRAIN, "--mlp=relu"], "unknown mlp 'relu'; did you mean 'relu2'?"),
    "zero init": ([*TRAIN, "--zero_init=yes"], "unknown zero_init 'yes'"),
    "size": ([*TRAIN, "--size=18M"], "unknown size '18M'"),
    "vocabulary": ([*TRAIN, "--vocab_size=9"], "vocab_size comes from the data: data has "),
    "a run among data": (
        [*TRAIN, "--out_dir=data"],
        "out_dir data holds prepared data (meta.json)",
    ),
    "a run among weights": (
        [*TRAIN, "--out_dir=weights"],
        "out_dir weights holds exported weights",
    ),
    "a huge batch": ([*TRAIN, "--batch_size=1e9"], "batch_size must be at most 1048576"),
    "ema": ([*TRAIN, "--ema=1"], "ema must be in [0, 1), not 1"),
    "no layers": ([*TRAIN, "--n_layer=-1"], "n_layer must be 0 or more, not -1"),
    "no block": ([*TRAIN, "--block_size=0"], "block_size must be 1 or more, not 0"),
    "no batch": ([*TRAIN, "--batch_size=-1"], "batch_size must be 0 or more, not -1"),
    "no evaluation": ([*TRAIN, "--eval_interval=-1"], "eval_interval must be 0 or more, not -1"),
    "no time": ([*TRAIN, "--max_minutes=-1"], "max_minutes must be 0 or more, not -1"),
    "no dial": ([*TRAIN, "--depth=300"], "depth must be in [0, 256], not 300"),
    "an overruled dial": (
        [*TRAIN, "--depth=3", "--n_layer=1", "--n_embd=16"],
        "depth is overruled by n_layer and n_embd, which are set; leave it out",
    ),
    "the dial of a named size": (
        ["train", "--data=data", "--max_iters=1", "--depth=3", "--size=19M"],
        "depth is overruled by n_layer and n_embd",
    ),
    "heads": ([*TRAIN, "--n_embd=18"], "n_embd 18 must be a multiple of 2 * n_head = 8"),
    "micro batch": (
        [*TRAIN, "--batch_size=8", "--micro_batch_size=3"],
        "batch_size 8 must be a multiple of micro_batch_size 3",
    ),
    "dropout": ([*TRAIN, "--dropout=1.5"], "dropout must be in [0, 1), not 1.5"),
    "negative rate": ([*TRAIN, "--learning_rate=-1"], "learning_rate must be in [0, 1e30], not -1"),
    "beta": ([*TRAIN, "--beta2=1"], "beta2"),
    "mlp width": ([*TRAIN, "--mlp_width=-5"], "mlp_width"),
    "draws of a causal network": ([*TRAIN, "--objective=ar", "--eval_draws=8"], "eval_draws is"),
    "a constant rate": (
        [*TRAIN, "--lr_decay=constant"],  # with the decay_start of the plain recipe
        "decay_start is for learning rates that decay; leave it out",
    ),
    "no decay": (
        [*TRAIN, "--weight_decay=0", "--decay_all"],
        "decay_all is for a weight_decay above 0; leave it out",
    ),
    "a key of published weights": ([*TRAIN, "--start_id=1"], "unknown key --start_id"),
    "attention": (
        [*TRAIN, "--attention=causal"],
        "objective 'any_order' trains a network with attention=full or order, not causal",
    ),
    "an old key": ([*TRAIN, "--causal=True"], "unknown key --causal; did you mean 'attention'?"),
    "seed": ([*TRAIN, "--seed=-1"], "seed must be in [0, 9e18], not -1"),
    "device": ([*TRAIN, "--device=gpu"], "unknown device 'gpu'"),
    "device number": ([*TRAIN, "--device=cpu:x"], "cpu:x"),
    "dtype": ([*TRAIN, "--dtype=half"], "unknown dtype 'half'"),
    # Data
    "short text": ([*TRAIN, "--data=short"], "short holds 5 tokens, less than one block of 16"),
    "no training text": ([*TRAIN, "--data=unlearnt"], "unlearnt has no split 'train', only val"),
    "a folder that is not prepared": ([*TRAIN, "--data=hollow"], "no prepared data in hollow"),
    "a torn shard": ([*TRAIN, "--data=torn"], "the train shards of torn hold 99 bytes"),
    "out_dir is a file": ([*TRAIN, "--out_dir=empty.txt"], "empty.txt"),
    # Checkpoints
    "resume from nothing": ([*TRAIN, "--out_dir=nothing"], "nothing/ckpt.pt is damaged"),
    "resume from flipped": ([*TRAIN, "--out_dir=flipped"], "flipped/ckpt.pt is damaged"),
    "resume from foreign": (
        [*TRAIN, "--out_dir=foreign"],
        "foreign/ckpt.pt is not a checkpoint of train.py",
    ),
    "resume from lacking": ([*TRAIN, "--out_dir=lacking"], "lacking/ckpt.pt"),
    "resume from another model": (
        [*TRAIN, "--out_dir=run", "--n_layer=2"],
        "run/ckpt.pt was trained with n_layer=1, not 2",
    ),
    "resume with other text": (
        [*TRAIN, "--out_dir=run", "--data=greek"],
        "another tokenizer than greek has",
    ),
    "no checkpoint here": ([*SAMPLE, "--ckpt=out/nowhere"], "no checkpoint out/nowhere"),
    "no checkpoint there": ([*SAMPLE, "--ckpt=/nowhere/run"], "no checkpoint /nowhere/run"),
    "no checkpoint in folder": ([*SAMPLE, "--ckpt=hollow"], "no checkpoint in folder hollow"),
    "cut": ([*SAMPLE, "--ckpt=cut"], "cut/ckpt.pt is damaged"),
    "flipped": ([*SAMPLE, "--ckpt=flipped"], "flipped/ckpt.pt is damaged"),
    "prose": ([*EVALUATE, "--ckpt=prose"], "prose/ckpt.pt is damaged, or not a checkpoint"),
    "foreign": ([*EVALUATE, "--ckpt=foreign"], "foreign/ckpt.pt holds no model known here"),
    "lacking": ([*EVALUATE, "--ckpt=lacking"], "lacking/ckpt.pt"),
    # Requests
    "an unknown character": ([*SAMPLE, "--prompt=naïve"], "character 'ï' is not among the"),
    "no token wanted": (
        [*SAMPLE, "--template=the ___0"],
        "the template has no gap of one token or more",
    ),
    "a template longer than the block": (
        [*SAMPLE, "--template=the cat ___9"],
        "the template is 17 tokens, the block 16",
    ),
    "two ways to ask": ([*SAMPLE, "--template=___9", "--prompt=a"], "not both"),
    "length": ([*SAMPLE, "--length=17"], "length must be at most block_size 16, not 17"),
    "no steps": ([*SAMPLE, "--steps=0"], "steps must be in [1, 1e6], not 0"),
    "no samples": ([*SAMPLE, "--num_samples=0"], "num_samples must be 1 or more, not 0"),
    "cold": ([*SAMPLE, "--temperature=-1"], "temperature must be 0 or more, not -1"),
    "no nucleus": ([*SAMPLE, "--top_p=0"], "top_p must be in (0, 1], not 0"),
    "top k": ([*SAMPLE, "--top_k=-1"], "top_k must be 0 or more, not -1"),
    "a causal template": (
        [*SAMPLE, "--ckpt=causal", "--template=a ___3"],
        "a causal network cannot see a suffix",
    ),
    "a causal order": ([*SAMPLE, "--ckpt=causal", "--sampler=euler"], "this network is causal"),
    "calls of a causal network": (
        [*SAMPLE, "--ckpt=causal", "--steps=8"],
        "steps is for other samplers; leave it out",
    ),
    "a sampler without steps": ([*SAMPLE, "--sampler=any_order", "--steps=8"], "other samplers"),
    "a sampler without eta": ([*SAMPLE, "--eta=0.1"], "eta is for other samplers; leave it out"),
    "top k of the likeliest": (
        [*SAMPLE, "--temperature=0", "--top_k=8"],
        "top_k is for temperatures above 0; leave it out",
    ),
    "guidance by nothing": (
        [*SAMPLE, "--cfg_scale=0.5"],
        "cfg_scale needs a prompt, a suffix or a template; leave it out",
    ),
    "a compiled cache": (
        [*SAMPLE, "--ckpt=causal", "--compile"],
        "compile is for networks with attention=full",
    ),
    "samples over a checkpoint": (
        [*SAMPLE, "--out=run/ckpt.pt"],
        "out must be a file whose name ends with .jsonl, not run/ckpt.pt",
    ),
    "samples into a folder": ([*SAMPLE, "--out=data", "--steps=1"], "cannot write data"),
    # Evaluation
    "estimator": ([*EVALUATE, "--estimator=ar"], "unknown estimator 'ar'"),
    "split": (
        [*EVALUATE, "--split=test"],
        "data has no split 'test'; choose --split=train or --split=val",
    ),
    "draws": ([*EVALUATE, "--draws=0"], "draws must be in [1, 1e6], not 0"),
    "draws of what is exact": (
        [*EVALUATE, "--estimator=left_to_right", "--draws=8"],
        "draws is for estimators that draw; leave it out",
    ),
    "sets of a causal network": ([*EVALUATE, "--ckpt=causal", "--strata=2"], "strata is for"),
    "an estimator without time": (
        [*EVALUATE, "--schedule=cosine"],
        "schedule is for estimators that draw a time; leave it out",
    ),
    "long block": (
        [*EVALUATE, "--block_size=99"],
        "block_size must be at most the model's 16, not 99",
    ),
    "another alphabet of the same size": ([*EVALUATE, "--data=loud"], "loud has another tokenizer"),
    "another tokenizer of the same size": (
        [*EVALUATE, "--data=renamed"],
        "renamed has another tokenizer than run",
    ),
}
# Found out when something has been said already.
LATE = ["out_dir is a file", "samples into a folder"]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it_and_nothing_is_written(
    case, world, monkeypatch, capsys
):
    (program, *words), message = BAD[case]
    before = contents(world)
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *words])
    with pytest.raises(SystemExit) as exit:
        lib.program.run(*MODULES[program])
    out, err = capsys.readouterr()
    err = re.sub(r"\r[^\n]*\r", "", err)  # a progress bar that was there and is gone
    assert exit.value.code == 2 and err.startswith(f"{program}.py: ") and message in err
    assert err.count("\n") == 1 and err.endswith("\n") and (out == "" or case in LATE)
    assert contents(world) == before
