"""Weights in and out: our checkpoints and exports, and the published files of RADD and SMDM, both ways.

    python checkpoint.py export --ckpt=out/pydocs --to=DIR --format=nanomdm

`load` takes all that --ckpt may name, and tells what it is by what it finds there: our out_dir, a folder with config.json
and model.safetensors (ours, RADD's or SMDM's), a folder of RADD's trainer, a single .safetensors, .pth or .bin file, or a
Hub name such as JingyangOu/radd-t-dce or nieshen/SMDM/mdm_safetensors/mdm-170M-100e18.safetensors.
Nothing in a file is ever executed.
"""

import ast
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import config as settings
from config import UserError, choose, nearest, require, typed, whole_file
from data import download, tokenizer
from model import DEFAULTS as MODEL
from model import Transformer, rotary_tables

DEFAULTS = {
    "ckpt": "",  # what to export: a folder, a file or a Hub name
    "to": "",  # the folder that gets config.json and model.safetensors
    "format": "nanomdm",  # nanomdm | radd | smdm
}

# ---- 1. Our own checkpoint ---------------------------------------------------------------------------------------------


def save(path, state):
    """Writes the dict `state`, {config, tokenizer, model, ema, optimizer, step, ...}, whole or not at all."""
    with whole_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError:  # what torch makes of an OSError
            raise UserError(f"cannot write {path}; is the disk full?") from None


def read(path):
    """The dict that `save` wrote to `path`, a file or its folder. Its tensors stay on disk until they are used.

    Raises UserError where it is missing, damaged or not ours.
    """
    file = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    require(file.is_file(), f"no checkpoint {file}")
    state = unpickle(file)
    ours = isinstance(state, dict) and all(isinstance(state.get(key), dict) for key in ("config", "model"))
    require(ours, f"{file} is not a checkpoint of train.py: it has no config and model")
    return state


def unpickle(file):
    """torch.load of data alone: UserError for a damaged file, and for a pickle that names code, which does not run."""
    try:
        zipped = zipfile.is_zipfile(file)  # all but the oldest files; only these can be mapped into memory
        if zipped and zipfile.ZipFile(file).testzip():
            raise zipfile.BadZipFile("wrong checksum")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        what = f"wants to run code ({code[1]}), which is refused" if code else "is damaged, or not a checkpoint"
        raise UserError(f"{file} {what}") from None


# ---- 2. Formats: one table of names each, and one function each way ----------------------------------------------------

NAMES = {  # model.py's name of a module or tensor -> the published one
    "nanomdm": {},
    "radd": {
        "embed.weight": "vocab_embed.embedding",
        "qkv": "attn_qkv",
        "proj": "attn_out",
        "mlp.up": "mlp.0",
        "mlp.down": "mlp.2",
        "norm": "output_layer.norm_final",
        "unembed": "output_layer.linear",
    },
    "smdm": {
        "embed": "transformer.wte",
        "blocks": "transformer.h",
        "norm1": "norm_1",
        "qkv": "attn.attn",
        "proj": "attn.proj",
        "norm2": "norm_2",
        "mlp.gate": "mlp.swiglu.w1",
        "mlp.up": "mlp.swiglu.w2",
        "mlp.down": "mlp.swiglu.w3",
        "norm": "transformer.ln_f",
        "unembed": "lm_head",
    },
}
BLOCK = {  # the model keys that a format fixes
    "nanomdm": {},
    "radd": {"causal": False, "norm": "layer", "mlp": "gelu", "bias": True, "qk_norm": False, "rotary_bf16": False},
    "smdm": {"norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": False, "rotary_bf16": True, "unused_rows": 0},
}
FREQUENCY = "rotary_emb.inv_freq"  # RADD's files hold the rotary frequencies beside the weights


def published(name, format):
    """model.py's name of a tensor -> its name in a format."""
    names = NAMES[format]
    parts = "|".join(map(re.escape, names)) or "(?!)"
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda found: names[found[0]], name)


def to_format(weights, config, format):
    """model.py's tensors -> a format's tensors."""
    H, D = config["n_head"], config["n_embd"]
    out = {}
    for name, w in weights.items():
        if format == "smdm" and name.endswith("qkv.weight"):  # [q, k, v] rows of one head after the other
            w = w.view(3, H, -1, D).transpose(0, 1).reshape(-1, D)  # (3D, D)
        if format == "smdm" and name == "embed.weight" and config["causal"]:  # has no mask to read
            w = w[:-1]  # (V, D)
        if format == "radd" and name.startswith("unembed") and not config["unused_rows"]:  # a row for the mask
            w = torch.cat([w, torch.zeros_like(w[:1])])  # (V + 1, D) or (V + 1,)
        out[published(name, format)] = w
    if format == "radd":
        out[FREQUENCY] = 1.0 / 10000 ** (torch.arange(0, D // H, 2, device="cpu").float() * H / D)  # (d/2,)
    return out


def from_format(found, names, config, format):
    """A format's tensors -> those that model.py calls `names`, float32. The inverse of to_format."""
    H, D = config["n_head"], config["n_embd"]
    out = {}
    for name in names:
        w = found[published(name, format)].float()
        if format == "smdm" and name.endswith("qkv.weight"):
            w = w.view(H, 3, -1, D).transpose(0, 1).reshape(-1, D)  # (3D, D)
        if format == "smdm" and name == "embed.weight" and config["causal"]:
            w = torch.cat([w, torch.zeros_like(w[:1])])  # (V + 1, D)
        out[name] = w
    return out
