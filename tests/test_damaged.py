"""Checkpoints that must be refused: each is told from what is wrong with it, in one line."""

import math
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import FIXTURES, refusal, run, same
from test_export import command
from test_formats import edit

import config as settings
import train
from config import UserError
from data.tokenizer import Char
from run import checkpoint, resume
from run.checkpoint import load

# ---- Bytes ---------------------------------------------------------------------------------------


class Code:
    """Unpickled, this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_wants_to_run_code_does_not_run_it(tmp_path):
    torch.save({"config": {}, "model": Code(tmp_path / "ran")}, tmp_path / "ckpt.pt")
    torch.save(
        {"model": Code(tmp_path / "ran")},
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"plain{protocol}").write_bytes(pickle.dumps(Code(tmp_path / "ran"), protocol))
        refusal(tmp_path / f"plain{protocol}")
    for name in ("ckpt.pt", "old.pth", "plain2", "."):
        assert "wants to run code (posix.system), which is refused" in refusal(tmp_path / name)
    with pytest.raises(UserError, match="run code"):
        checkpoint.read(tmp_path)
    code, lines = command(f"--ckpt={tmp_path}", f"--to={tmp_path / 'out'}")
    assert code == 2 and len(lines) == 1 and "ckpt.pt wants to run code" in lines[0]
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused_wherever_the_damage_is(tmp_path):
    path, _, _ = run(tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"{path} is damaged" in refusal(path)
    flipped = 0
    for place in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            model, _, _ = load(path)
        except UserError as error:
            assert str(path) in str(error)
            flipped += 1
        else:  # a byte that fills a gap between two parts
            path.write_bytes(whole)
            same(load(path)[0].state_dict(), model.state_dict())
    assert flipped > 25


def test_damaged_safetensors_are_refused_as_a_command_in_one_line(radd, tmp_path):
    path = radd / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + length]
    damaged = [whole[: len(whole) // 2], whole[:50], whole[:8] + header, whole[:4], b""]
    damaged += [
        struct.pack("<Q", 10**13) + whole[8:],
        struct.pack("<Q", 2**64 - 1) + b"{}",
        whole + b"more",
    ]
    damaged += [
        whole[:8] + header.replace(b"[32]", b"[99]") + whole[8 + length :],
        b"\x08" + bytes(7) + b"{" * 8,
    ]
    for content in damaged:
        path.write_bytes(content)
        assert str(path) in refusal(radd)
    path.write_bytes(damaged[0])
    code, lines = command(f"--ckpt={radd}", f"--to={tmp_path / 'out'}", "--format=radd")
    assert code == 2 and len(lines) == 1 and str(path) in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_damaged_or_missing_is_named(radd):
    for content in (
        b"",
        b'{"tokens": 60, ',
        b'{"a":' * 10**5,
        b"\xff\xfe{",
        b'{"tokens": ' + b"9" * 5000 + b"}",
    ):
        (radd / "config.json").write_bytes(content)
        assert f"{radd / 'config.json'} is damaged" in refusal(radd)
    (radd / "config.json").unlink()
    assert "needs a config.json beside it" in refusal(radd)


@pytest.mark.parametrize(
    "content", [{"step": 3}, {"config": {}, "model": 3}, [1, 2], {"config": 1, "model": {}}]
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is not a checkpoint of train"):
        checkpoint.read(tmp_path)
    assert "not a checkpoint" in refusal(tmp_path) or "no model" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("lm_head.weight"), "the matrix lm_head.weight is missing"),
        (
            lambda w: w.update({"transformer.wte.weight": torch.zeros(70, 48)}),
            "has 70 rows; a vocabulary of 64",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(1).expand(10**6, 10**6)}),
            "a vocabulary of 1000000 has",
        ),
        (
            lambda w: w.update({"transformer.h.": torch.zeros(1)}),
            "transformer.h. is (1,), but by its config it has to be absent",
        ),
        (
            lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to_sparse()}),
            "lm_head.weight must hold plain",
        ),
        (
            lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to("meta")}),
            "lm_head.weight must hold plain",
        ),
        (lambda w: w.update({5: torch.zeros(1)}), "no model known here"),
        (lambda w: w.update(step=3), "no model known here"),
    ],
)
def test_a_pickle_of_strange_tensors_is_refused(smdm, change, message):
    weights = load_file(smdm / "mdm.safetensors")
    change(weights)
    torch.save({"model": weights}, smdm / "iter.pth")
    assert message in refusal(smdm / "iter.pth") and refusal(smdm / "iter.pth").startswith(
        str(smdm / "iter.pth")
    )


# ---- Where there is no checkpoint ----------------------------------------------------------------


def test_files_and_folders_without_a_checkpoint_are_refused(tmp_path, smdm):
    names = "ckpt.pt, best.pt, model.safetensors, pytorch_model.bin"
    message = f"no checkpoint in folder {{}}: it has no {names} or checkpoints-meta/checkpoint.pth"
    assert refusal(tmp_path) == message.format(tmp_path)
    files = f"{smdm}/ar.safetensors or {smdm}/mdm.safetensors"
    assert refusal(smdm) == f"{message.format(smdm)}; name the file that is meant: {files}"
    for i, name in enumerate("abcde"):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / ("best.pt" if i % 2 else "ckpt.pt")).touch()
        os.utime(folder, (i, i))
    newest = f"; there is: {', '.join(f'{tmp_path}/out/{name}' for name in 'edcb')}"
    assert refusal(tmp_path / "out") == message.format(tmp_path / "out") + newest
    assert refusal(tmp_path / "out/f").endswith(f"OWNER/REPO/FILE){newest}")
    (tmp_path / "text").write_text("To be, or not to be, that is the question")
    assert "text is damaged, or not a checkpoint" in refusal(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "holds no model known here" in refusal(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.read(tmp_path / "none")


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path).startswith(f"no checkpoint in folder {tmp_path}: it has no ckpt.pt")
    for path in (
        tmp_path / "loop",
        tmp_path / "model.safetensors",
        tmp_path / "pipe",
        "/dev/zero",
        "x" * 5000,
        "a\0b",
        "",
    ):
        assert "no such file or folder" in refusal(path)


# ---- What no run can be resumed from -------------------------------------------------------------

STATE = [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]}]
BROKEN = {
    "step": [None, -1, 1.0, True, "3"],
    "tokenizer": [3, [], {"kind": 3}, {3: "char"}, "char"],
    "ema": [3, {3: torch.zeros(2)}, {"w": [0.0]}, {"w": torch.zeros(2).to_sparse()}],
    "model": [{3: torch.zeros(2)}, {"w": torch.zeros(2, dtype=torch.int8)}],
    "optimizer": [
        *(None, {}, [None], [{}], [{"state": {}}], [{"param_groups": []}]),
        *([STATE[0] | {"state": state}] for state in ([], {"a": {}}, {0: 3}, {0: {"step": 1}})),
        *([STATE[0] | {"param_groups": groups}] for groups in ({}, [3], [{}], [{"params": ["a"]}])),
    ],
}


@pytest.mark.parametrize("key", BROKEN)
def test_a_run_cannot_be_resumed_from_a_part_of_another_kind(tmp_path, key):
    path, _, _ = run(tmp_path)
    state = torch.load(path) | {"optimizer": STATE}
    checkpoint.save(path, state)
    assert checkpoint.read(path)["optimizer"][0]["param_groups"] == [{"params": [0]}]
    for value in BROKEN[key]:
        checkpoint.save(path, state | {key: value})
        with pytest.raises(UserError, match=f"{path}: no run can be resumed from its {key}"):
            checkpoint.read(path)


def test_a_run_with_an_unknown_objective_cannot_be_resumed(tmp_path):
    saved = checkpoint.read(FIXTURES / "before_rename_ar.pt")["config"]
    config = settings.defaults_of(train.MODULES) | saved
    with pytest.raises(UserError, match="unknown objective 'arr'; did you mean 'ar'"):
        resume.with_attention(config | {"objective": "arr"}, None, "")


@pytest.mark.parametrize("key", ["objective", "n_layer"])
def test_a_run_cannot_be_resumed_from_a_checkpoint_that_lacks_a_key(tmp_path, key):
    path, _, _ = run(tmp_path)
    state = checkpoint.read(path)
    del state["config"][key]
    checkpoint.save(path, state)
    with pytest.raises(UserError, match=f"{path}: {key} must be"):
        checkpoint.read(path)


# ---- A config and the tensors beside it ----------------------------------------------------------

ABSENT = object()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_head": 3}, "n_embd 16 must be a multiple of 2 * n_head = 6"),
        ({"conv": 4}, "conv must be 0, or with attention=full an odd number, not 4"),
        ({"conv": 3, "attention": "causal"}, "conv must be 0, or with attention=full an odd"),
        ({"n_head": None}, "n_head must be a whole number, not None"),
        ({"n_head": ABSENT}, "n_head must be a whole number, not None"),
        ({"n_layer": 10**9}, "n_layer must be from 1 to 1048576, not 1000000000"),
        ({"n_layer": 99}, "99 layers, but only"),
        ({"n_embd": "wide"}, "n_embd must be a number, not 'wide'"),
        ({"n_embd": "16"}, "n_embd must be a number, not '16'"),
        ({"block_size": 0}, "block_size must be from 1"),
        ({"mlp_width": -1}, "mlp_width must be from 0"),
        ({"start_id": 6, "attention": "causal"}, "start_id must be from -1 to 5, not 6"),
        ({"dropout": math.nan}, "dropout must be a number, not nan"),
        ({"dropout": 2.0}, "dropout must be from 0 to 1, not 2.0"),
        ({"bias": 3}, "bias must be True or False, not 3"),
        ({"attention": 3}, "attention must be text, not 3"),
        ({"causal": 3}, "attention must be text, not 3"),
        ({"attention": "wild"}, "unknown attention in"),
        ({"norm": "wild"}, "unknown norm in"),
        ({"mlp": "wild"}, "unknown mlp in"),
        ({"zero_init": "wild"}, "unknown zero_init in"),
        ({"mlp": 3}, "mlp must be text, not 3"),
        ({"tokenizer": 3}, "a tokenizer's meta must be a dict of texts"),
        ({"tokenizer": {"kind": "wild"}}, "unknown tokenizer 'wild'"),
        (
            {"tokenizer": Char("abcdef").meta()},
            "its tokenizer has a vocabulary of 6, its network one of 5",
        ),
    ],
)
def test_what_a_checkpoint_says_of_its_network_is_checked(tmp_path, keys, message):
    path, model, _ = run(tmp_path)
    state = {"model": model.state_dict(), "tokenizer": keys.get("tokenizer")}
    config = model.config | {"objective": "any_order"} | keys
    checkpoint.save(
        path,
        state | {"config": {key: value for key, value in config.items() if value is not ABSENT}},
    )
    assert message in refusal(path) and str(path) in refusal(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("output_layer.linear.bias"),
            "output_layer.linear.bias is absent, but by its config it has to be (61,)",
        ),
        (
            lambda w: w.update(extra=torch.zeros(1)),
            "extra is (1,), but by its config it has to be absent",
        ),
        (
            lambda w: w.update({"blocks.1.mlp.0.bias": torch.zeros(64)}),
            "blocks.1.mlp.0.bias is (64,), but by its config it has to be (128,)",
        ),
        (
            lambda w: w.update({"rotary_emb.inv_freq": torch.ones(8)}),
            "rotary_emb.inv_freq is not that of",
        ),
        (lambda w: w.update({"rotary_emb.inv_freq": torch.ones(3)}), "rotary_emb.inv_freq is (3,)"),
        (
            lambda w: w.update({"vocab_embed.embedding": torch.tensor(1.0)}),
            "vocab_embed.embedding is ()",
        ),
        (
            lambda w: w.update({"output_layer.linear.bias": torch.zeros(61, dtype=torch.int8)}),
            "numbers, not torch.int8",
        ),
        (
            lambda w: w.update({"output_layer.linear.bias": torch.zeros(61, dtype=torch.cfloat)}),
            "numbers, not torch.complex64",
        ),
        (lambda w: w.pop("vocab_embed.embedding"), "no model known here"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(radd, change, message):
    weights = load_file(radd / "model.safetensors")
    change(weights)
    save_file(weights, radd / "model.safetensors")
    assert refusal(radd).startswith(str(radd / "model.safetensors")) or "no model" in message
    assert message in refusal(radd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"tokens": "many"}, "tokens must be a number, not 'many'"),
        (
            lambda c: c | {"tokens": 61},
            "vocab_embed.embedding is (61, 32), but by its config it has to be (62, 32)",
        ),
        (lambda c: c | {"tokens": math.nan}, "tokens must be a whole number, not nan"),
        (
            lambda c: c | {"model": c["model"] | {"n_heads": "2"}},
            "model.n_heads must be a number, not '2'",
        ),
        (lambda c: c | {"model": c["model"] | {"n_heads": -2}}, "n_head must be from 1"),
        (lambda c: c | {"model": c["model"] | {"dropout": 3}}, "dropout must be from 0 to 1"),
        (
            lambda c: c | {"model": c["model"] | {"hidden_size": 2**19}},
            "by its config it has to be (61, 524288)",
        ),
        (lambda c: {"config": {"config": c}}, "there is no model with its sizes"),
        (lambda c: c | {"model": c["model"] | {"n_heads": 5}}, "n_embd 32 must be a multiple"),
        (
            lambda c: c | {"model": {**c["model"], "length": None}},
            "model.length must be a whole number, not None",
        ),
        (
            lambda c: c | {"model": c["model"] | {"n_blocks": 10**12}},
            "n_layer must be from 1 to 1048576, not 1000000000000",
        ),
        (lambda c: c | {"model": c["model"] | {"n_blocks": 3}}, "blocks.2.norm1.weight is absent"),
        (lambda c: {"tokens": 60}, "there is no model with its sizes"),
        (lambda c: [c], "must hold a dict, not a list"),
    ],
)
def test_a_config_that_does_not_fit_is_named(radd, change, message):
    edit(radd / "config.json", change)
    assert message in refusal(radd) and str(radd) in refusal(radd)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layer", 7, "n_layer is 7, but the network in model.safetensors has 3"),
        ("n_embd", 96, "n_embd is 96, but the network in model.safetensors has 48"),
        ("vocab_size", 65, "vocab_size is 65, but the network in model.safetensors has 64"),
        ("intermediate_size", "120", "intermediate_size is 120, but"),
        ("n_query_groups", 1, "n_query_groups is 1, but the network in model.safetensors has 2"),
        ("bias", True, "bias is True"),
        ("rope_base", 500_000, "rope_base is 500000"),
        ("n_head", 5, "n_embd 48 must be a multiple of 2 * n_head = 10"),
        ("n_head", "two", "n_head must be a number, not 'two'"),
        ("block_size", 10**11, "block_size must be from 1 to 1048576"),
    ],
)
def test_a_config_that_contradicts_the_tensors_beside_it_is_refused(smdm, key, value, message):
    (smdm / "mdm.safetensors").rename(smdm / "model.safetensors")
    edit(
        smdm / "config.json",
        lambda config: config
        | {key: value}
        | ({"n_query_groups": value} if key == "n_head" else {}),
    )
    assert message in refusal(smdm) and refusal(smdm).startswith(str(smdm / "config.json"))
