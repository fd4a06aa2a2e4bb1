"""Exported checkpoints: what goes out comes back bit for bit, and reads text as its authors do."""

import json
import math
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_checkpoint import CAUSAL, X, network, run, same

import evaluate
import sample
from config import UserError, parse
from data import tokenizer
from data.text import prepare as prepare_text
from data.tokenizer import Char
from run import checkpoint
from run.checkpoint import load
from run.formats import FIXED


def command(*args):
    """Run `python -m run.checkpoint export`: (exit code, lines on stderr)."""
    words = [sys.executable, "-m", "run.checkpoint", "export", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    return done.returncode, done.stderr.splitlines()


# ---- Export: there and back ----------------------------------------------------------------------


def test_radd_weights_go_out_as_they_came_in(radd, tmp_path):
    checkpoint.export(radd, tmp_path / "out", "radd")
    same(load_file(tmp_path / "out" / "model.safetensors"), load_file(radd / "model.safetensors"))
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", radd)
    )
    assert (
        ours.keys() == theirs.keys()
        and ours["tokens"] == theirs["tokens"]
        and ours["noise"] == theirs["noise"]
    )
    assert ours["model"] | {"name": "tiny_radd"} == theirs["model"]


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_smdm_weights_go_out_as_they_came_in(smdm, tmp_path, kind):
    checkpoint.export(smdm / f"{kind}.safetensors", tmp_path / "out", "smdm")
    same(load_file(tmp_path / "out" / "model.safetensors"), load_file(smdm / f"{kind}.safetensors"))
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", smdm)
    )
    assert {key: theirs.get(key, value) for key, value in ours.items()} == ours | {
        "name": "tiny_visible"
    }
    assert torch.equal(load(tmp_path / "out")[0](X), load(smdm / f"{kind}.safetensors")[0](X))


@pytest.mark.parametrize("source", ["radd", "smdm/mdm.safetensors", "smdm/ar.safetensors"])
def test_published_weights_go_through_our_own_format(radd, smdm, tmp_path, source):
    checkpoint.export(tmp_path / source, tmp_path / "out", "nanomdm")
    there, here = load(tmp_path / source), load(tmp_path / "out")
    same(here[0].state_dict(), there[0].state_dict())
    assert here[2] == there[2] | {"format": "nanomdm"}


def test_our_own_export_keeps_weights_tokenizer_and_objective(tmp_path):
    _, _, ema = run(tmp_path / "run", objective="t_dce", mlp="relu2", zero_init="all")
    checkpoint.export(tmp_path / "run", tmp_path / "out", "nanomdm")
    model, tokenizer, config = load(tmp_path / "out")
    same(model.state_dict(), ema.state_dict())
    assert tokenizer.meta() == Char("abcde").meta() and config["objective"] == "t_dce"
    assert "out_dir" not in config


def test_our_models_in_their_architecture_can_be_given_to_their_code(tmp_path):
    run(tmp_path / "radd", zero_init="head", dropout=0.02)
    checkpoint.export(tmp_path / "radd", tmp_path / "a", "radd")
    assert load_file(tmp_path / "a" / "model.safetensors")["output_layer.linear.weight"].shape == (
        6,
        16,
    )
    assert torch.equal(load(tmp_path / "a")[0](X), load(tmp_path / "radd")[0](X))
    for keys in ({}, CAUSAL):
        run(tmp_path / "smdm", **keys, **FIXED["smdm"])
        checkpoint.export(tmp_path / "smdm", tmp_path / "b", "smdm")
        (tmp_path / "b" / "config.json").write_text('{"n_head": 2, "block_size": 12}')
        x = X.clamp(max=4) if keys else X
        assert torch.equal(load(tmp_path / "b")[0](x), load(tmp_path / "smdm")[0](x))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["radd", "mdm", "ar"])
def test_networks_of_any_shape_go_through_a_published_format_and_back(tmp_path, kind, seed):
    draw = random.Random(f"{kind} {seed}")
    keys = {
        "n_head": draw.randint(1, 5),
        "n_layer": draw.randint(1, 3),
        "block_size": draw.randint(2, 40),
    }
    keys |= {"n_embd": keys["n_head"] * 2 * draw.randint(1, 9), "vocab_size": draw.randint(2, 99)}
    if kind == "radd":
        keys |= FIXED["radd"] | {"head_padding": draw.randint(0, 1)}
    else:
        keys |= FIXED["smdm"] | {"mlp_width": draw.randint(1, 50)}
        keys |= CAUSAL if kind == "ar" else {}
    model = network(**keys)
    for w in model.parameters():  # norms and biases too, so that none can be taken for another
        torch.nn.init.normal_(w, std=0.3)
    state = {
        "config": model.config | {"objective": "ar" if kind == "ar" else "lambda_dce"},
        "model": model.state_dict(),
    }
    checkpoint.save(tmp_path / "ckpt.pt", state)

    format = "radd" if kind == "radd" else "smdm"
    checkpoint.export(tmp_path, tmp_path / "out", format)
    checkpoint.export(tmp_path / "out", tmp_path / "ours", "nanomdm")
    checkpoint.export(tmp_path / "ours", tmp_path / "again", format)
    x = torch.randint(
        model.vocab_size + (kind != "ar"), (2, model.block_size)
    )  # (B, L), with masks where there are any
    assert all(
        torch.equal(load(tmp_path / folder)[0](x), model(x)) for folder in ("out", "ours", "again")
    )
    same(
        load_file(tmp_path / "again" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert (tmp_path / "again" / "config.json").read_text() == (
        tmp_path / "out" / "config.json"
    ).read_text()


@pytest.mark.parametrize(
    ("format", "keys"),
    [
        ("radd", {key: other})
        for key, other in {"norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": True}.items()
    ]
    + [
        ("radd", {"attention": "causal"}),
        ("radd", {"rotary_bf16": True}),
        ("radd", {"mlp_width": 24}),
    ]
    + [
        ("smdm", FIXED["smdm"] | {"rotary_bf16": False}),
        ("smdm", FIXED["smdm"] | {"attention": "causal"}),
        ("smdm", {}),
    ],
)
def test_a_model_that_does_not_fit_a_format_is_refused_and_nothing_written(tmp_path, format, keys):
    run(tmp_path / "run", **keys)
    with pytest.raises(UserError, match=f"{tmp_path}/run (has|reads)"):
        checkpoint.export(tmp_path / "run", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_the_export_command_writes_what_it_says(tmp_path):
    run(tmp_path / "run")
    assert command(f"--ckpt={tmp_path / 'run'}", f"--to={tmp_path / 'out'}") == (0, [])
    assert load(tmp_path / "out")[1].meta() == Char("abcde").meta()
    code, lines = command(f"--ckpt={tmp_path / 'run'}", f"--to={tmp_path / 'b'}", "--format=raddd")
    assert code == 2 and lines == ["checkpoint.py: unknown format 'raddd'; did you mean 'radd'?"]


# ---- Text in, text out ---------------------------------------------------------------------------


@pytest.fixture
def vocabularies(shared, tmp_path, monkeypatch):
    """Llama 2's and GPT-2's, without a network."""
    pytest.importorskip("sentencepiece")
    monkeypatch.setenv("NANOMDM_SHARED", str(shared("data/llama_tokenizer").parent.parent))
    monkeypatch.setenv(
        "TIKTOKEN_CACHE_DIR",
        str(shutil.copytree(shared("data/tiktoken_cache"), tmp_path / "tiktoken")),
    )


@pytest.mark.parametrize("kind", ["mdm", "ar", "radd"])
def test_text_goes_into_a_published_model_as_its_authors_have_it(tmp_path, vocabularies, kind):
    V, vocabulary, format = (50257, "gpt2", "radd") if kind == "radd" else (32000, "llama", "smdm")
    keys = FIXED[format] | {"vocab_size": V, "block_size": 20} | (CAUSAL if kind == "ar" else {})
    run(tmp_path / "run", tokenizer=None, **keys)
    checkpoint.export(tmp_path / "run", tmp_path / "out", format)
    ckpt = f"--ckpt={tmp_path / 'out'}"

    def sampled(*words):
        [record] = sample.main(parse([ckpt, "--num_samples=1", *words], *sample.MODULES))
        return record["text"], record["tokens"]

    text, tokens = sampled("--prompt=A list", "--length=9")
    begin = {"mdm": [1, 319, 1051], "ar": [319, 1051], "radd": [32, 1351]}[
        kind
    ]  # a document begins with 1, which ar supplies
    assert tokens[: len(begin)] == begin and text.startswith("A list") and len(tokens) == 9
    if kind != "ar":
        middle = {"mdm": [310, 278], "radd": [286, 262]}[kind]  # " of the", with one space
        text, tokens = sampled("--template=A list___2 of the___3.")
        assert (
            tokens[: len(begin)] == begin
            and tokens[len(begin) + 2 :][:2] == middle
            and " of the" in text
        )

    lines = [json.dumps({"text": f"Item {i} of the list, in words. " * 5}) for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    words = [
        f"--input={tmp_path / 'in.jsonl'}",
        f"--out={tmp_path / 'data'}",
        f"--tokenizer={vocabulary}",
        "--workers=1",
    ]
    prepare_text.main(parse([*words, "--val_fraction=0.4"], prepare_text, tokenizer))
    words = [ckpt, f"--data={tmp_path / 'data'}", "--sequences=3"]
    words += [] if kind == "ar" else ["--draws=2"]
    result = evaluate.main(parse(words, *evaluate.MODULES))
    assert abs(result["nats_per_token"] - math.log(V)) < 1, "a network that knows nothing"
