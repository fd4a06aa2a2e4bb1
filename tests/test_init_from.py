"""What a run begins with: weights of another, whose block and alphabet may grow."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_sft import TEXT, TINY, letters, run, small, words

import config as settings
import evaluate
import train
from config import UserError
from data import examples, loader, tokenizer, writer
from data.pairs import prepare as pairs
from data.text import prepare
from diffusion import OBJECTIVES, ORDERS
from lib.entries import uses_p, uses_schedule
from lib.parallel import ANEW
from run import checkpoint, resume

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return letters(tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("form", ["checkpoint", "averaged", "export"])
def test_a_run_begins_with_the_weights_and_the_model_keys_of_another(form, data, tmp_path):
    source = small(data, tmp_path / "source", n_layer=2, bias=False, ema=0.9 * (form == "averaged"))
    if form == "export":
        checkpoint.export(source, tmp_path / "export", "nanomdm")
        source = tmp_path / "export"
    keys = {"init_from": source, "learning_rate": 1e-30, "weight_decay": 0.0, "max_iters": 1}
    argv = words(data, tmp_path / "out", **keys)
    argv = [word for word in argv if not word.startswith(("--n_", "--bias"))]
    train.main(settings.parse(argv, *train.MODULES))
    one, two = (checkpoint.load(out)[0].state_dict() for out in (source, tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one) and "blocks.1.qkv.weight" in two
    assert checkpoint.read(tmp_path / "out")["step"] == 1


@pytest.mark.parametrize(("keys", "length"), [({}, 14), ({"block_size": 20}, 20)])
def test_the_block_of_weights_to_begin_with_grows_with_their_positions(
    keys, length, data, tmp_path, capsys
):
    text = tmp_path / "bytes"
    writer.prepare(text, [("train", "abcdefgh" * 20), ("val", "cab " * 50)], TEXT)
    source = tmp_path / "source"
    run(text, source, block_size=8, max_iters=2, eval_interval=2)
    keys = {"init_from": source, "learning_rate": 1e-30, "weight_decay": 0.0, "max_iters": 1} | keys
    capsys.readouterr()
    run(data, tmp_path / "out", **keys)
    changed = f"other settings than in the checkpoint: block_size 8 -> {length}\n"
    assert changed in capsys.readouterr().out
    (one, _, _), (two, _, config) = (checkpoint.load(out) for out in (source, tmp_path / "out"))
    assert two.block_size == config["block_size"] == length and len(two.cos) == length
    x = torch.tensor([[256, 97, 98, 256, 99, 100, 256, 101]])  # (1, 8)
    assert torch.equal(one(x), two(x)) and torch.equal(one.cos, two.cos[:8])
    run(data, tmp_path / "out", **keys | {"max_iters": 2, "learning_rate": 1e-3})  # resumed
    assert checkpoint.read(tmp_path / "out")["step"] == 2
    with pytest.raises(UserError, match=f"block_size={length}, not 30"):
        run(data, tmp_path / "out", **keys | {"max_iters": 3, "block_size": 30})


def test_a_model_of_characters_learns_those_that_its_alphabet_lacks(tmp_path, capsys):
    text, source = tmp_path / "text", tmp_path / "source"
    writer.prepare(text, [(s, "abc " * 50) for s in ("train", "val")], tokenizer.Char("\n abc"))
    run(text, source, block_size=8, max_iters=2, eval_interval=2)
    checkpoint.export(source, tmp_path / "export", "nanomdm")
    lines = [{"prompt": f"{i} a?", "completion": "b\nc" * (1 + i % 2)} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for lender in ("text", "source", "export", "source/ckpt.pt"):
        words = [f"--input={tmp_path}/mine.jsonl", f"--tokenizer={tmp_path / lender}"]
        words += [f"--out={tmp_path / 'pairs'}", "--val_fraction=0.3"]
        pairs.main(settings.parse(words, pairs, examples, tokenizer))
        meta = loader.read_meta(tmp_path / "pairs")
        assert meta["tokenizer"]["alphabet"] == "\n abc\x000123456789?" and meta["end"] == 5
    keys = {"init_from": source, "learning_rate": 1e-30, "weight_decay": 0.0, "max_iters": 1}
    run(tmp_path / "pairs", tmp_path / "out", **keys)
    said = f"{source} gets rows for 12 new characters: '\\x000123456789?', where '\\x00' is the end"
    assert said in capsys.readouterr().out
    (one, _, _), (two, text, _) = (checkpoint.load(out) for out in (source, tmp_path / "out"))
    x = torch.tensor([[5, 2, 3, 5, 4]])  # (1, 5) with masks
    assert torch.allclose(one(x), two(torch.where(x == 5, 17, x))[..., :5], atol=1e-6)
    assert text.encode("a?") == [2, 16] and two.mask_id == 17
    assert torch.allclose(two.embed.weight[5:17], one.embed.weight[:5].mean(0).expand(12, -1))
    run(tmp_path / "pairs", tmp_path / "out", **keys | {"max_iters": 2})  # resumed


def test_the_published_models_can_be_begun_with(shared, data, tmp_path):
    """Their 64 tokens are not bytes, and that is said; on others of 64 tokens both kinds learn."""
    folder, own = shared("fixtures/smdm_tiny"), tmp_path / "examples"
    text = tokenizer.Char("\0" + "".join(chr(97 + i) for i in range(63)))
    examples.prepare(own, [(s, "", [5, 6, 7], [8, 9]) for s in ("train", "val")], text)
    for name, objective in (("mdm", "lambda_dce"), ("ar", "ar")):
        keys = {key: value for key, value in TINY.items() if not key.startswith("n_")}
        keys |= {"init_from": str(folder / f"{name}.safetensors"), "objective": objective}
        keys |= {"max_iters": 1, "data": str(own), "out_dir": str(tmp_path / name)}
        config = settings.parse([], *train.MODULES) | keys
        for keys in ({}, {"max_iters": 2}):  # begun with, then resumed
            train.main(config | keys)
            kept = {"block_size": 2048, "rotary_bf16": True, "start_id": -1 if name == "mdm" else 1}
            assert checkpoint.read(tmp_path / name)["config"].items() >= kept.items()
        with pytest.raises(UserError, match="has a vocabulary of 64"):
            train.main(config | {"data": str(data), "resume": False})


def test_a_run_that_has_begun_goes_on_whatever_it_began_with(data, tmp_path):
    source = small(data, tmp_path / "source")
    run(data, tmp_path / "out", init_from=source, max_iters=3)
    run(data, tmp_path / "out", init_from=tmp_path / "gone", max_iters=4)
    assert checkpoint.read(tmp_path / "out")["step"] == 4


def test_a_new_run_whose_folder_was_not_named_does_not_go_on_with_another(data, tmp_path):
    out = small(data, tmp_path / "out")
    others = tmp_path / "text"
    writer.prepare(others, [("train", "abcdefgh" * 20), ("val", "cab " * 50)], TEXT)
    saved = (out / "ckpt.pt").read_bytes()
    preset = tmp_path / "preset.py"
    preset.write_text(repr({"out_dir": str(out), "max_iters": 4}))
    told = [word for word in words(data, out) if not word.startswith(("--out_dir", "--max_iters"))]
    for argv, reason in (
        ([*words(data, out), f"--init_from={out}"], "did not begin with init_from="),
        ([str(preset), *told, f"--data={others}"], f"has learnt from {data}, not {others}"),
        ([*words(data, out), "--random_length=0.5"], "was trained with random_length=0.0"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)) as error:
            train.main(settings.parse(argv, *train.MODULES))
        assert ANEW in str(error.value) and (out / "ckpt.pt").read_bytes() == saved


def test_of_data_with_more_characters_it_is_said_which_and_how_to_go_on(tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "out"
    parts = [("train", "abcdefgh" * 20), ("val", "cab " * 50)]
    writer.prepare(text, parts, tokenizer.Char(" abcdefgh"))
    run(text, out, block_size=8)
    (tmp_path / "more.txt").write_text(("abcdé" * 40 + "\n\n" + "abc\n" * 50) * 20)
    words = [f"--input={tmp_path / 'more.txt'}", f"--out={text}", f"--tokenizer={out}"]
    prepare.main(settings.parse(words, prepare, tokenizer))
    assert f"2 new characters beside those of {out}: '\\né'\n" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"the data also have '\\né'; begin .*--init_from=.*--out_dir="
    ):
        run(text, out, block_size=8, max_iters=4)
    config = settings.options({"ckpt": str(out)}, *evaluate.MODULES)
    with pytest.raises(
        UserError, match=r"take '\\né' out of the text, then .* before are in .*old_"
    ):
        evaluate.main(config)
    run(text, tmp_path / "other", init_from=out, block_size=8)
    (text / "meta.json").rename(tmp_path / "away.json")
    with pytest.raises(UserError, match="which is not here; --data= says where it is"):
        evaluate.main(config)


def test_a_resumed_run_says_what_of_its_recipe_is_changed(data, tmp_path, capsys):
    out = small(data, tmp_path / "out")
    capsys.readouterr()
    keys = {"max_iters": 3, "eval_interval": 2, "batch_size": 4, "loss_weight": "constant"}
    run(data, out, **keys)
    changes = "batch_size 8 -> 4, loss_weight bound -> constant, max_iters 2 -> 3"
    line = f"other settings than in the checkpoint: {changes}\n"
    assert line in capsys.readouterr().out
    run(data, out, **keys)
    assert "other settings" not in capsys.readouterr().out
    before = {"user_keys": {"learning_rate": "--learning_rate"}, "learning_rate": 0.003}
    state = {"optimizer": [], "config": before}
    now = {"user_keys": {}, "learning_rate": 0.01, "data": data}
    resume.say_changes(now, state)  # what is no longer said
    said = "other settings than in the checkpoint: learning_rate 0.003 -> 0.01\n"
    assert capsys.readouterr().out == said


def test_a_preset_may_hold_what_only_another_network_heeds(data, tmp_path):
    path = tmp_path / "preset.py"
    path.write_text("{'mask_rate': 'bell', 'loss_weight': 'sqrt', 'prompt_drop': 0.1}")
    argv = words(data, tmp_path / "out", objective="ar", max_iters=1)
    argv = [str(path), *(word for word in argv if not word.startswith("--loss_weight"))]
    train.main(settings.parse(argv, *train.MODULES))
    assert (tmp_path / "out/ckpt.pt").is_file()


@pytest.fixture
def other_text(tmp_path):
    """Plain text with an alphabet of its own, and its folder."""
    folder = tmp_path / "text"
    writer.prepare(folder, [("train", "abc " * 50), ("val", "cab " * 50)], tokenizer.Char(" abc\n"))
    return folder


REFUSED = {
    "no such file": ({"init_from": "gone"}, "no checkpoint gone"),
    "another size": (
        {"init_from": "SOURCE", "n_layer": 3},
        "n_layer=1, not 3; init_from takes a model as it is",
    ),
    "another kind": (
        {"init_from": "SOURCE", "objective": "ar"},
        "has attention=full, but ar trains a network with attention=causal",
    ),
    "another tokenizer": (
        {"init_from": "SOURCE", "data": "TEXT"},
        "has; prepare the data again with --tokenizer=",
    ),
    "text without prompts": (
        {"prompt_drop": 0.1, "data": "TEXT"},
        "is text without prompts, so prompt_drop must be 0",
    ),
    "a prompt for ar": (
        {"prompt_drop": 0.1, "objective": "ar"},
        "prompt_drop is for networks with attention=full",
    ),
    "a prompt for order": (
        {"prompt_drop": 0.1, "attention": "order"},
        "prompt_drop is for networks with attention=full",
    ),
    "a loss weight for ar": (
        {"loss_weight": "constant", "objective": "ar"},
        "loss_weight is for networks with attention=full; leave it out",
    ),
    "an order for masks": (
        {"order": "local"},
        "order is for networks with attention=order; leave it out",
    ),
    "an order_p for masks": (
        {"order_p": 0.3},
        "order_p is for networks with attention=order and an order",
    ),
    "an order_p that its order does not use": (
        {"order_p": 0.3, "attention": "order"},
        "order_p is for networks with attention=order and an order that it changes",
    ),
    "a schedule without a time": (
        {"schedule": "cosine"},
        "schedule is for objectives that draw a time; leave it out",
    ),
    "a schedule for ar": (
        {"schedule": "cosine", "objective": "ar"},
        "schedule is for objectives that draw a time; leave it out",
    ),
    "random length": (
        {"random_length": 0.1},
        "is examples with prompts, so random_length must be 0",
    ),
    "a narrow network": ({"block_size": 13}, "has examples of 14 tokens, block_size is only 13"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(name, data, other_text, tmp_path):
    keys, message = REFUSED[name]
    source = small(data, tmp_path / "source") if "SOURCE" in keys.values() else None
    places = {"SOURCE": source, "TEXT": other_text}
    keys = {key: places.get(value, value) for key, value in keys.items()}
    with pytest.raises(UserError) as error:
        run(keys.pop("data", data), tmp_path / "out", **keys)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


USED = ("local", "mixture"), ("t_dce", "t_dse")
UNUSED = ("uniform", "left_to_right", "right_to_left"), ("any_order", "lambda_dce", "ar")


def test_what_a_key_changes_is_seen_by_changing_it():
    for (orders, objectives), used in ((USED, True), (UNUSED, False)):
        assert all(uses_p(ORDERS[name]) == used for name in orders)
        assert all(uses_schedule(OBJECTIVES[name].draw) == used for name in objectives)


def test_a_preset_may_have_keys_that_other_networks_use(data, tmp_path):
    preset = tmp_path / "preset.py"
    preset.write_text('{"schedule": "cosine", "order_p": 0.3, "prompt_drop": 0.1}')
    argv = [str(preset), *words(data, tmp_path / "out", objective="ar", max_iters=1)]
    train.main(settings.parse(argv, *train.MODULES))
    assert (tmp_path / "out" / "ckpt.pt").exists()


def test_the_command_says_so_and_exits_with_2(data, other_text, tmp_path):
    argv = words(other_text, tmp_path / "out", init_from=small(data, tmp_path / "source"))
    line, env = [sys.executable, "train.py", *argv], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "another tokenizer" in done.stderr
