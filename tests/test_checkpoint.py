"""Our own checkpoints: what is saved comes back bit for bit, today and after keys are renamed."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from plain import DEFAULTS

import train
from config import RENAMED, UserError, parse
from data import examples, tokenizer
from data.pairs import prepare as pairs
from data.tokenizer import Char
from model import make_network
from run import checkpoint
from run.checkpoint import load

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 5}
CAUSAL = {"attention": "causal", "start_id": 1}  # as SMDM's ARM, whose start token is Llama's 1
FIXTURES = ROOT / "tests" / "fixtures"
X = torch.tensor([[0, 5, 2, 5, 4], [5, 5, 5, 1, 3]])


def network(**keys):
    torch.manual_seed(0)
    return make_network(DEFAULTS | SMALL | keys).eval()


def run(folder, objective="any_order", ema=True, tokenizer=Char("abcde").meta(), **keys):
    """Save a checkpoint as train.py does; return (its path, the model, the averaged model)."""
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


FULL = """
import resource, signal, sys, torch
from config import UserError
from run import checkpoint
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
    pairs.main(parse([*words, "--val_fraction=0.2"], pairs, examples, tokenizer))
    shutil.copy(FIXTURES / f"before_rename_{kind}.pt", tmp_path / "ckpt.pt")
    config = checkpoint.read(tmp_path)["config"] | {"max_iters": 8, "resume": True}
    keys = {"data": str(tmp_path / "data"), "out_dir": str(tmp_path)}
    train.main(config | keys | {"user_keys": {"out_dir": "--out_dir"}})
    assert checkpoint.read(tmp_path)["step"] == 8
    assert says(tmp_path, before_rename[kind], "resumed", atol=1e-3)
    assert not says(tmp_path, before_rename[kind], "logits", atol=0.1)
