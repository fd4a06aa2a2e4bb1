"""Checkpoints: what is saved comes back bit for bit, published files go both ways, and bad files
end in one line.
"""

import json
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import config as settings
import diffusion
import evaluate
import sample
import train
from config import RENAMED, UserError, parse
from data import examples, writer
from data.pairs import prepare as pairs
from data.text import prepare as prepare_text
from data.tokenizer import Char
from lib import checkpoint, formats, resume
from lib.checkpoint import load
from lib.formats import FIXED, SIZES, published, size_config
from model import DEFAULTS, Transformer

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 5}
CAUSAL = {"attention": "causal", "start_id": 1}  # as SMDM's ARM, whose start token is Llama's 1
FIXTURES = ROOT / "tests" / "fixtures"
X = torch.tensor([[0, 5, 2, 5, 4], [5, 5, 5, 1, 3]])


def network(**keys):
    torch.manual_seed(0)
    return Transformer(DEFAULTS | SMALL | keys).eval()


def run(folder, objective="any_order", ema=True, tokenizer=Char("abcde").meta(), **keys):
    """Saves a checkpoint as train.py does; returns (its path, the model, the averaged model)."""
    model = network(**keys)
    averaged = network(**keys)
    averaged.embed.weight.data.add_(1)
    config = model.config | {"objective": objective, "out_dir": str(folder), "ema": 0.99}
    state = {"config": config, "tokenizer": tokenizer, "step": 7, "model": model.state_dict()}
    state["ema"] = averaged.state_dict() if ema else None
    state["optimizer"] = [{"state": {}, "param_groups": []}]
    checkpoint.save(folder / "ckpt.pt", state)
    return folder / "ckpt.pt", model, averaged


def same(a, b):
    """Equal names, types and bits."""
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def refusal(path, **keys):
    """The one line in which `load` refuses a path."""
    with pytest.raises(UserError) as error:
        load(path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Our own -------------------------------------------------------------------------------------


def test_what_is_saved_is_read_back(tmp_path):
    path, model, ema = run(tmp_path)
    for place in (path, tmp_path, str(tmp_path)):
        state = checkpoint.read(place)
        same(state["model"], model.state_dict())
        same(state["ema"], ema.state_dict())
        assert state["step"] == 7 and state["config"]["objective"] == "any_order"


def test_load_builds_the_model_its_tokenizer_and_its_config(tmp_path):
    path, model, ema = run(
        tmp_path, objective="t_dce", norm="rms", mlp="swiglu", mlp_width=24, qk_norm=True
    )
    for place in (tmp_path, path):
        loaded, tokenizer, config = load(place)
        assert torch.equal(loaded(X), ema(X)) and not loaded.training
        assert tokenizer.decode([0, 4]) == "ae"
        assert config["objective"] == "t_dce" and DEFAULTS.keys() <= config.keys()
    assert torch.equal(load(path, ema=False)[0](X), model(X))


def test_load_takes_the_plain_weights_where_there_are_no_averages(tmp_path):
    path, model, _ = run(tmp_path, ema=False)
    assert torch.equal(load(path)[0](X), model(X))


def test_a_loaded_model_trains_and_leaves_its_file_alone(tmp_path):
    path, _, _ = run(tmp_path)
    before = path.read_bytes()
    model = load(path)[0].train()
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert path.read_bytes() == before


def test_a_new_checkpoint_replaces_the_old_one_even_while_that_is_in_use(tmp_path):
    path, model, _ = run(tmp_path, ema=False)
    loaded = load(path)[0]
    run(tmp_path, ema=False, n_embd=8)
    assert torch.equal(loaded(X), model(X)) and load(path)[2]["n_embd"] == 8
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


# ---- Written before keys were renamed ------------------------------------------------------------


@pytest.fixture
def before_rename():
    """{"masked" or "ar": {x (L,), logits (L, V), and those after the run was resumed}}"""
    return json.loads((FIXTURES / "before_rename.json").read_text())


def says(path, case, key="logits", atol=1e-5):
    """Whether the model at a path has the logits that the code before the renaming gave it."""
    logits = load(path)[0](torch.tensor([case["x"]]))[0]  # (L, V)
    return torch.allclose(logits, torch.tensor(case[key]), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["masked", "ar"])
def test_a_checkpoint_from_before_the_renaming_loads_with_the_same_logits(kind, before_rename):
    path = FIXTURES / f"before_rename_{kind}.pt"
    assert says(path, before_rename[kind])
    _, tokenizer, config = load(path)
    assert tokenizer.decode([3, 12]) == "1a"
    assert config["attention"] == {"masked": "full", "ar": "causal"}[kind]
    assert config["mlp_width"] == 6 and config["head_padding"] == (kind == "masked")
    state = checkpoint.read(path)
    assert state["step"] == 4 and len(state["optimizer"]) == {"masked": 2, "ar": 1}[kind]
    for keys in (config, state["config"]):
        assert not RENAMED.keys() & keys.keys()
        assert (keys["example_width"], keys["eos_id"]) == (7, 0)


def test_an_export_from_before_the_renaming_loads_with_the_same_logits(before_rename):
    path = FIXTURES / "before_rename_export"
    assert says(path, before_rename["masked"])
    assert not RENAMED.keys() & load(path)[2].keys()


@pytest.mark.parametrize("kind", ["masked", "ar"])
def test_a_run_from_before_the_renaming_is_resumed_as_if_nothing_had_changed(
    tmp_path, kind, before_rename
):
    lines = [{"prompt": f"{i}a", "completion": f"{3 * i % 100}b"} for i in range(10, 60)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [f"--input={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'data'}", "--tokenizer=char"]
    pairs.main(parse([*words, "--val_fraction=0.2"], pairs, examples))
    shutil.copy(FIXTURES / f"before_rename_{kind}.pt", tmp_path / "ckpt.pt")
    config = checkpoint.read(tmp_path)["config"] | {"max_iters": 8, "resume": True}
    train.main(config | {"data": str(tmp_path / "data"), "out_dir": str(tmp_path)})
    assert checkpoint.read(tmp_path)["step"] == 8
    assert says(tmp_path, before_rename[kind], "resumed", atol=1e-3)
    assert not says(tmp_path, before_rename[kind], "logits", atol=0.1)


# ---- Published files -----------------------------------------------------------------------------


@pytest.fixture
def radd(shared, tmp_path):
    """A folder that may be changed: RADD's config.json and model.safetensors."""
    return copied(
        shared("fixtures/radd_tiny"), tmp_path / "radd", "config.json", "model.safetensors"
    )


@pytest.fixture
def smdm(shared, tmp_path):
    """A folder that may be changed: SMDM's mdm.safetensors, ar.safetensors and a config.json."""
    return copied(
        shared("fixtures/smdm_tiny"),
        tmp_path / "smdm",
        "config.json",
        "mdm.safetensors",
        "ar.safetensors",
    )


def copied(source, to, *names):
    to.mkdir()
    for name in names:
        (to / name).write_bytes((source / name).read_bytes())
    return to


def edit(path, change):
    """Rewrites a JSON file as change(its content)."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_radd_weights_load_in_every_layout_that_they_are_found_in(radd):
    logits = load(radd)[0](X)
    weights = load_file(radd / "model.safetensors")
    assert torch.equal(load(radd / "model.safetensors")[0](X), logits)

    edit(radd / "config.json", lambda config: {"config": config, "ngpus": 8})
    assert torch.equal(load(radd)[0](X), logits)

    (radd / "model.safetensors").unlink()
    for old in (False, True):
        torch.save(weights, radd / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        assert torch.equal(load(radd)[0](X), logits)


YAML = """ngpus: 4
tokens: 60  # without the mask
gpt_dir: 'gpt2-large'
training:
  batch_size: 512
  loss_type: k_DCE
  ema: 0.9999

noise:
  type: geometric
eval:
- model: none
model:
    name: "tiny"
    hidden_size: 32
    length: 32
    n_blocks: 2
    n_heads: 2
    dropout: 0.02
"""


@pytest.fixture
def trainer(radd):
    """A folder of RADD's trainer: its averages are the published weights, its weights are zero."""
    weights = load_file(radd / "model.safetensors")
    parts = ["norm1.weight", "norm1.bias", "attn_qkv.weight", "attn_out.weight"]
    parts += ["norm2.weight", "norm2.bias"]
    parts += ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    tail = ["norm_final.weight", "norm_final.bias", "linear.weight", "linear.bias"]
    order = ["vocab_embed.embedding", *(f"blocks.{i}.{part}" for i in range(2) for part in parts)]
    shadow = [weights[name] for name in [*order, *(f"output_layer.{part}" for part in tail)]]
    zeros = {name: w * (name == "rotary_emb.inv_freq") for name, w in weights.items()}
    ema = {"decay": 0.9999, "num_updates": 3, "shadow_params": shadow}
    (radd / ".hydra").mkdir()
    (radd / ".hydra" / "config.yaml").write_text(YAML)
    (radd / "checkpoints-meta").mkdir()
    (radd / "model.safetensors").unlink()
    torch.save(
        {"model": zeros, "ema": ema, "optimizer": {}, "step": 3},
        radd / "checkpoints-meta" / "checkpoint.pth",
    )
    return radd


def test_a_folder_of_the_radd_trainer_gives_its_averaged_weights(trainer, shared):
    model, _, config = load(trainer)
    assert torch.equal(model(X), load(shared("fixtures/radd_tiny"))[0](X))
    assert (
        config["objective"] == "any_order"
        and config["schedule"] == "geometric"
        and config["dropout"] == 0.02
    )
    assert torch.equal(load(trainer / "checkpoints-meta" / "checkpoint.pth")[0](X), model(X))
    assert not load(trainer, ema=False)[0](X).any()


def test_averages_that_are_too_few_or_in_another_order_are_refused(trainer):
    path = trainer / "checkpoints-meta" / "checkpoint.pth"
    state = torch.load(path)
    shadow = state["ema"]["shadow_params"]
    shadow[1], shadow[3] = shadow[3], shadow[1]
    torch.save(state, path)
    assert "blocks.0.norm1.weight is (96, 32)" in refusal(trainer)
    del shadow[-1]
    torch.save(state, path)
    assert "list of 25 tensors" in refusal(trainer)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("radd-t-dce", "t_dce"),
        ("radd-lambda-dce-medium", "lambda_dce"),
        ("radd_t_DSE", "t_dce"),
        ("mine", "lambda_dce"),
    ],
)
def test_the_name_of_a_radd_folder_tells_how_it_was_trained(radd, name, objective):
    assert load(radd.rename(radd.with_name(name)))[2]["objective"] == objective


def test_the_training_section_of_a_radd_config_says_it_better(radd):
    edit(radd / "config.json", lambda config: config | {"training": {"loss_type": "k_DCE"}})
    assert load(radd.rename(radd.with_name("radd-t-dce")))[2]["objective"] == "any_order"


@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_smdm_weights_load_from_a_bare_file_and_from_a_trainer_file(smdm, kind):
    model, _, config = load(smdm / f"{kind}.safetensors")
    assert config["attention"] == {"ar": "causal", "mdm": "full"}[kind]
    assert config["objective"] == {"ar": "ar", "mdm": "lambda_dce"}[kind]
    assert model.block_size == 2048 and model.start_id == {"ar": 1, "mdm": 64}[kind]
    weights = load_file(smdm / f"{kind}.safetensors")
    torch.save(
        {
            "model": weights,
            "optimizer": {},
            "hparams": {"lr": 2e-4},
            "iter_num": 9,
            "step_count": 3,
        },
        smdm / "iter-9.pth",
    )
    assert torch.equal(load(smdm / "iter-9.pth")[0](X), model(X))


def bare(path, n_layer, n_head, n_embd, mlp_width):
    """A file of an SMDM model of some size, and nothing that tells its number of heads."""
    keys = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "mlp_width": mlp_width}
    with torch.device("meta"):
        model = Transformer(DEFAULTS | SMALL | FIXED["smdm"] | keys)
    weights = {name: torch.zeros(w.shape) for name, w in model.state_dict().items()}
    save_file(formats.to_format(weights, model.config, "smdm"), path)
    return path


def test_the_heads_of_a_published_smdm_model_follow_from_its_layers_and_width(tmp_path):
    assert load(bare(tmp_path / "mdm-6M-1e18.safetensors", *SIZES["6M"]))[2]["n_head"] == 4
    path = bare(tmp_path / "mine.safetensors", 2, 2, 48, 120)
    assert "2 layers of width 48" in refusal(path) and "n_head" in refusal(path)
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    assert load(path)[2]["n_head"] == 3


def test_layers_and_width_tell_every_size_apart():
    assert len({(n_layer, n_embd) for n_layer, _, n_embd, _ in SIZES.values()}) == len(SIZES) == 30


def test_a_size_becomes_a_model_of_so_many_parameters():
    for name in SIZES:
        with torch.device("meta"):
            model = Transformer(DEFAULTS | size_config(name) | {"vocab_size": 32000})
        inside = sum(w.numel() for key, w in model.named_parameters() if "embed" not in key)
        assert round(inside / 1e6) in (int(name[:-1]), int(name[:-1]) + 1)
    with pytest.raises(UserError, match="unknown size '300M'; did you mean '302M'"):
        size_config("300M")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(radd, dtype):
    weights = load_file(radd / "model.safetensors")
    save_file({name: w.to(dtype) for name, w in weights.items()}, radd / "other.safetensors")
    model = load(radd / "other.safetensors")[0]
    assert all(
        torch.equal(w, weights[published(name, "radd")].to(dtype).float())
        for name, w in model.state_dict().items()
    )


# ---- The Hub, played by a real server ------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(source folder, "OWNER/REPO", ...) makes a local server offer it, as the Hub does."""
    site = tmp_path / "site"
    site.mkdir()
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NANOMDM_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)

        def offer(source, repo, folder=""):
            place = site / repo / "resolve" / "main" / folder
            place.parent.mkdir(parents=True)
            place.symlink_to(source)

        yield offer
        server.shutdown()


def test_a_hub_name_is_fetched_and_loaded(hub, radd, smdm):
    hub(radd, "JingyangOu/radd-t-dce")
    hub(smdm, "nieshen/SMDM", "mdm_safetensors")
    model, _, config = load("JingyangOu/radd-t-dce")
    assert torch.equal(model(X), load(radd)[0](X)) and config["objective"] == "t_dce"
    assert "n_head" in refusal(
        "nieshen/SMDM/mdm_safetensors/mdm.safetensors"
    )  # found, but of no published size


def test_a_name_that_is_neither_here_nor_on_the_hub_says_so(hub, radd):
    hub(radd, "JingyangOu/radd-t-dce")
    assert "JingyangOu/radd-x-dce" in refusal("JingyangOu/radd-x-dce") and "404" in refusal(
        "JingyangOu/radd-x-dce"
    )
    for missing in ("out/pydocs", "nothing", "/no/where", "./a/b", "radd/typo", "../x/y"):
        assert "no such file or folder" in refusal(missing)


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
        [record] = sample.main(
            parse([ckpt, "--num_samples=1", *words], settings, diffusion, sample)
        )
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
    prepare_text.main(parse([*words, "--val_fraction=0.4"], prepare_text, writer))
    words = [ckpt, f"--data={tmp_path / 'data'}", "--sequences=3", "--draws=2"]
    result = evaluate.main(parse(words, settings, diffusion, evaluate))
    assert abs(result["nats_per_token"] - math.log(V)) < 1, "a network that knows nothing"


# ---- Bad files -----------------------------------------------------------------------------------


class Code:
    """Unpickled, this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def command(*args):
    """Runs `python -m lib.checkpoint export`: (exit code, lines on stderr)."""
    words = [sys.executable, "-m", "lib.checkpoint", "export", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    return done.returncode, done.stderr.splitlines()


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


@pytest.mark.parametrize(
    "content", [{"step": 3}, {"config": {}, "model": 3}, [1, 2], {"config": 1, "model": {}}]
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is not a checkpoint of train"):
        checkpoint.read(tmp_path)
    assert "not a checkpoint" in refusal(tmp_path) or "no model" in refusal(tmp_path)


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
    config = checkpoint.read(FIXTURES / "before_rename_ar.pt")["config"]
    with pytest.raises(UserError, match="unknown objective 'arr'; did you mean 'ar'"):
        resume.check(config | {"objective": "arr"}, world=1)


@pytest.mark.parametrize("key", ["objective", "n_layer"])
def test_a_run_cannot_be_resumed_from_a_checkpoint_that_lacks_a_key(tmp_path, key):
    path, _, _ = run(tmp_path)
    state = checkpoint.read(path)
    del state["config"][key]
    checkpoint.save(path, state)
    with pytest.raises(UserError, match=f"{path}: {key} must be"):
        checkpoint.read(path)


def test_files_and_folders_without_a_checkpoint_are_refused(tmp_path, smdm):
    assert f"no checkpoint in folder {tmp_path}" in refusal(tmp_path)
    assert "ar.safetensors, mdm.safetensors" in refusal(smdm)
    (tmp_path / "text").write_text("To be, or not to be, that is the question")
    assert "text is damaged, or not a checkpoint" in refusal(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "holds no model known here" in refusal(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.read(tmp_path / "none")


ABSENT = object()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_head": 3}, "a width of 16 does not divide into 3 heads"),
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
        (lambda c: c | {"model": c["model"] | {"n_heads": 5}}, "does not divide into 5 heads"),
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
        ("n_head", 5, "a width of 48 does not divide into 5 heads"),
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


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert "but no other .safetensors" in refusal(tmp_path)
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


def test_a_folder_with_several_checkpoints_gives_our_own(radd):
    _, _, ema = run(radd)
    assert torch.equal(load(radd)[0](X), ema(X))


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


FULL = """
import resource, signal, sys, torch
from config import UserError
from lib import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # no file may grow past this
for write in (
    lambda: checkpoint.save(sys.argv[1], checkpoint.read(sys.argv[1])),
    lambda: checkpoint.export(*sys.argv[1:]),
):
    try:
        write()
    except UserError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_files_whole(tmp_path):
    path, _, _ = run(tmp_path / "run")
    checkpoint.export(path, tmp_path / "out", "nanomdm")
    files = [path, tmp_path / "out" / "config.json", tmp_path / "out" / "model.safetensors"]
    before = [file.read_bytes() for file in files]
    words = [sys.executable, "-c", FULL, str(path), str(tmp_path / "out"), "nanomdm"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split(":")[0].split(";")[0] for line in done.stdout.splitlines()] == [
        f"cannot write {path}",
        f"cannot write {files[2]}",
    ]
    assert [file.read_bytes() for file in files] == before
    assert len(list(tmp_path.glob("*/*"))) == 3


def test_the_export_command_writes_what_it_says(tmp_path):
    run(tmp_path / "run")
    assert command(f"--ckpt={tmp_path / 'run'}", f"--to={tmp_path / 'out'}") == (0, [])
    assert load(tmp_path / "out")[1].meta() == Char("abcde").meta()
    code, lines = command(f"--ckpt={tmp_path / 'run'}", f"--to={tmp_path / 'b'}", "--format=raddd")
    assert code == 2 and lines == ["checkpoint.py: unknown format 'raddd'; did you mean 'radd'?"]
