"""Checkpoints of others: RADD's and SMDM's files and folders load, from here and from the Hub."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from plain import DEFAULTS
from safetensors.torch import load_file, save_file
from test_checkpoint import SMALL, X, refusal, run

from config import UserError
from model import make_network
from run import formats
from run.checkpoint import load
from run.formats import FIXED, SIZES, published, size_config

# ---- Published files -----------------------------------------------------------------------------


def edit(path, change):
    """Rewrite a JSON file as change(its content)."""
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
        model = make_network(DEFAULTS | SMALL | FIXED["smdm"] | keys)
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
            model = make_network(DEFAULTS | size_config(name) | {"vocab_size": 32000})
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


def test_a_folder_with_several_checkpoints_gives_our_own(radd):
    _, _, ema = run(radd)
    assert torch.equal(load(radd)[0](X), ema(X))


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
