"""Weights in and out: our checkpoints and exports, and the published files of RADD and SMDM, both ways.

    python checkpoint.py export --ckpt=out/pydocs --to=DIR --format=nanomdm

`load` takes all that --ckpt may name, and tells what it is by what it finds there: our out_dir, a folder with config.json
and model.safetensors (ours, RADD's or SMDM's), a folder of RADD's trainer, a single .safetensors, .pth or .bin file, or a
Hub name such as JingyangOu/radd-t-dce or nieshen/SMDM/mdm_safetensors/mdm-170M-100e18.safetensors.
What the formats call their tensors and settings is in formats.py. Nothing in a file is ever executed.
"""

import contextlib
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import config as settings
import formats
from config import UserError, choose, require, whole_file
from data import download, tokenizer
from model import DEFAULTS as MODEL
from model import Transformer, rotary_tables

DEFAULTS = {
    "ckpt": "",  # what to export: a folder, a file or a Hub name
    "to": "",  # the folder that gets config.json and model.safetensors
    "format": "nanomdm",  # nanomdm | radd | smdm
}

# ---- 1. Our own checkpoint -------------------------------------------------------------------------------------------


def save(path, state, keep=1):
    """Writes the dict `state`, {config, tokenizer, model, ema, optimizer, step, ...}, whole or not at all.

    With keep > 1 the last `keep` also stay as NAME_STEP.pt; the newest of them is the file `path` by another name.
    """
    with whole_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError:  # what torch makes of an OSError
            raise UserError(f"cannot write {path}; is the disk full?") from None
        with open(temporary, "rb") as file:
            os.fsync(file)  # on the disk before it takes the place of the last one
    if keep > 1:
        with whole_file(path.with_name(f"{path.stem}_{state['step']}.pt")) as temporary:
            os.link(path, temporary)
        kept = kept_beside(path)
        for step in set(kept) - set(sorted(step for step in kept if step <= state["step"])[-keep:]):
            with contextlib.suppress(OSError):
                kept[step].unlink()  # also one past this step: a run that went back to an earlier one makes it again


def kept_beside(path):
    """{step: file} of the checkpoints that `save` has kept beside `path`."""
    names = {other: re.fullmatch(rf"{re.escape(path.stem)}_(\d+)\.pt", other.name) for other in path.parent.iterdir()}
    return {int(name[1]): other for other, name in names.items() if name}


def read(path):
    """The dict that `save` wrote to `path`, a file or its folder. Its tensors stay on disk until they are used.

    Raises UserError where it is missing, damaged or not ours, or lacks what a network or a run is made from. An older
    checkpoint is never taken in its place unasked: a damaged file may be the first sign of a damaged disk.
    """
    file = Path(path, "ckpt.pt") if os.path.isdir(path) else Path(path)
    require(os.path.isfile(file), f"no checkpoint {file}")
    try:
        state = unpickle(file)
    except UserError as error:
        kept = [other for _, other in sorted(kept_beside(file).items()) if not os.path.samefile(other, file)]
        raise UserError(f"{error}; copy {kept[-1]} over it to go on from there" if kept else str(error)) from None
    require(is_ours(state), f"{file} is not a checkpoint of train.py: it has no config and model")
    config = formats.own_config(state["config"], None, file, file)
    formats.entry(file, "objective", config.get("objective"), "")
    for key, kind in SAVED.items():
        require(fits(state.get(key), kind), f"{file}: its {key} is none that a run can go on from")
    return state | {key: state.get(key) for key in SAVED} | {"config": config}


def is_ours(state):
    return isinstance(state, dict) and all(isinstance(state.get(key), dict) for key in ("config", "model"))


def fits(part, kind):
    """Whether nested dicts and lists are of a kind as SAVED has them: a tuple of kinds, [of each item], {key or its type: of
    the value}, a type, None or a test."""
    if isinstance(kind, tuple):
        return any(fits(part, each) for each in kind)
    if isinstance(kind, list):
        return isinstance(part, list) and all(fits(item, kind[0]) for item in part)
    if isinstance(kind, dict):
        return isinstance(part, dict) and all(
            all(isinstance(name, key) and fits(item, inner) for name, item in part.items())
            if isinstance(key, type)
            else fits(part.get(key), inner)
            for key, inner in kind.items()
        )
    return isinstance(part, kind) if isinstance(kind, type) else part is None if kind is None else kind(part)


def is_plain(w):
    """Whether it is a tensor of plain floating-point numbers, every one of which is in its file."""
    dense = isinstance(w, torch.Tensor) and w.dtype in FLOATS and w.layout == torch.strided and not w.is_meta
    return dense and w.numel() * w.element_size() <= w.untyped_storage().nbytes()


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SAVED = {  # what `save` is given and a run goes on from, beside config
    "step": lambda step: type(step) is int and step >= 0,
    "tokenizer": (None, {str: str}),
    "model": {str: is_plain},
    "ema": (None, {str: is_plain}),
    "optimizer": [{"state": {int: {str: is_plain}}, "param_groups": [{"params": [int]}]}],
}


def unpickle(file):
    """torch.load of data alone: UserError for a damaged file, and for a pickle that names code, which does not run."""
    try:
        zipped = zipfile.is_zipfile(file)  # all but the oldest files; only these can be mapped into memory
        if zipped:
            with zipfile.ZipFile(file) as archive:
                size = sum(item.file_size for item in archive.infolist())  # torch stores without compression: no bombs
                require(size <= os.path.getsize(file) and archive.testzip() is None, "a size or a checksum is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch did not write
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        what = f"wants to run code ({code[1]}), which is refused" if code else "is damaged, or not a checkpoint"
        raise UserError(f"{file} {what}") from None


# ---- 2. Loading ------------------------------------------------------------------------------------------------------


def load(path, device="cpu", ema=True):
    """(model, tokenizer or None, config) of all that the top of this file names; the model in eval mode on `device`.

    config: the keys that built the model, "objective" and the tokenizer's meta; for ours all that it was trained with.
    ema takes averaged weights where there are some. A tokenizer that cannot be built here (no package, no network) is None
    and a warning. Weights are float32; those stored as float16, bfloat16 or float64 are converted, float32 on the CPU
    stays in the file's pages: no second copy is made. Raises UserError for all that is damaged or of another shape.
    """
    file = locate(path)
    state = read_tensors(file)
    if is_ours(state):
        raw, where = state["config"] | {"tokenizer": state.get("tokenizer")}, file
        found = state["ema"] if ema and state.get("ema") is not None else state["model"]
    else:
        raw, where = formats.read_settings(file)
        found = state["model"] if isinstance(state.get("model"), dict) else state
    format = recognise(found, file)
    require(raw or format == "smdm", f"{file} needs a config.json beside it: its tensors do not tell the number of heads")
    config = formats.CONFIGS[format](raw, found, where, file)
    model = skeleton(config, len(found), where)
    if format == "radd" and ema and state.get("ema") is not None:
        found, config["ema"] = averaged(state["ema"], model, file), True
    fill(model, found, config, format, file)
    meta = raw.get("tokenizer") if format == "nanomdm" else formats.TOKENIZERS.get((format, config["vocab_size"]))
    return model.to(device).eval(), text_of(meta, config["vocab_size"], where), config | {"tokenizer": meta}


def locate(path):
    """The file of weights that a path or a Hub name stands for; in a folder with several, our checkpoint goes first."""
    if os.path.isdir(path):
        names = ["ckpt.pt", "model.safetensors", "pytorch_model.bin", "checkpoints-meta/checkpoint.pth"]
        file = next((file for name in names if os.path.isfile(file := Path(path, name))), None)
        others = ", ".join(sorted(other.name for other in Path(path).glob("*.safetensors") if os.path.isfile(other)))
        require(file, f"no checkpoint in folder {path}: none of {', '.join(names)}, but {others or 'no other .safetensors'}")
        return file
    return Path(path) if os.path.isfile(path) else from_hub(str(path))


def from_hub(name):
    """Fetches OWNER/REPO (config.json and weights) or OWNER/REPO/FILE; returns the path of the weights."""
    owner, *rest = name.split("/")
    like_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", name) and not os.path.exists(owner) and owner != "out"
    require(like_hub, f"no checkpoint {name}: no such file or folder, and not a Hub name (OWNER/REPO or OWNER/REPO/FILE)")
    repo = f"{owner}/{rest[0]}"
    try:
        if rest[1:]:
            return download.hub_file(repo, "/".join(rest[1:]))
        download.hub_file(repo, "config.json")
        return download.hub_file(repo, "model.safetensors")
    except UserError as error:
        raise UserError(f"no file or folder {name}, and as a Hub name: {error}") from None


def read_tensors(file):
    """The dict in a file, whose first bytes tell what it is: safetensors, or a pickle."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(9)
        if head[8:] == b"{":  # safetensors: a header in JSON behind its length
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    state = unpickle(file)
    require(isinstance(state, dict), f"{file} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def recognise(found, file):
    """The format: the one whose name the embedding has."""
    known = {formats.published("embed.weight", format): format for format in formats.NAMES}
    format = next((known[name] for name in known if isinstance(found, dict) and name in found), None)
    plain = format and all(isinstance(name, str) and isinstance(w, torch.Tensor) for name, w in found.items())
    require(plain, f"{file} holds no model known here: it must be tensors only, with one named {' or '.join(known)}")
    return format


def skeleton(config, n_tensors, where):
    """The network without memory for its weights; UserError for sizes that none can have."""
    limits = dict.fromkeys(formats.SIZE_KEYS, (1, 2**20)) | dict.fromkeys(("mlp_hidden", "unused_rows"), (0, 2**20))
    limits |= {"dropout": (0, 1), "start_id": (-1, config["vocab_size"])}
    for key, (low, high) in limits.items():
        require(low <= config[key] <= high, f"{where}: {key} must be from {low} to {high}, not {config[key]}")
    D, H, n_layer = (config[key] for key in ("n_embd", "n_head", "n_layer"))
    require(n_layer <= n_tensors, f"{where}: {n_layer} layers, but only {n_tensors} tensors")
    require(D % (2 * H) == 0, f"{where}: a width of {D} does not divide into {H} heads of an even size")
    with torch.device("meta"):
        return Transformer(config)


def averaged(ema, model, file):
    """The averaged weights under RADD's names: its trainer leaves a list in the order of the parameters."""
    names = [formats.published(name, "radd") for name, _ in model.named_parameters()]
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    good = isinstance(shadow, list) and [type(w) for w in shadow] == [torch.Tensor] * len(names)
    require(good, f"{file}: ema must have shadow_params, a list of {len(names)} tensors")
    return dict(zip(names, shadow, strict=True))


def fill(model, found, config, format, file):
    """Makes the tensors found the weights of the skeleton; UserError where a name or a shape does not fit."""
    names = model.state_dict()
    expected = formats.to_format(names, config, format)
    if formats.FREQUENCY not in found:  # no parameter, so not among the averages of RADD's trainer
        expected.pop(formats.FREQUENCY, None)
    for name in [*expected, *found]:
        there, wanted = (tuple(part[name].shape) if name in part else "absent" for part in (found, expected))
        require(there == wanted, f"{file}: the tensor {name} is {there}, but by its config it has to be {wanted}")
    for name, w in found.items():
        require(is_plain(w), f"{file}: the tensor {name} must hold plain floating-point numbers, not {w.dtype}")
    key = formats.FREQUENCY
    base = key not in found or torch.allclose(found[key].float(), expected[key], rtol=0.01)
    require(base, f"{file}: {key} is not that of rotary embeddings with base 10000")
    model.load_state_dict(formats.from_format(found, names, config, format), assign=True)
    model.cos, model.sin = rotary_tables(config)  # (block_size, d/2) each; in no file


def text_of(meta, V, where):
    """The tokenizer of a meta; None where it cannot be built here; UserError where it does not fit."""
    if meta is None:
        return None
    try:
        text = tokenizer.from_meta(meta)
    except tokenizer.Unavailable:
        return None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    require(text.vocab_size == V, f"{where}: its tokenizer has a vocabulary of {text.vocab_size}, its network one of {V}")
    return text


# ---- 3. Export -------------------------------------------------------------------------------------------------------


def export(ckpt, to, format):
    """Writes config.json and model.safetensors (float32) to folder `to`, as the format's own code reads them.

    Raises UserError where the model does not fit the format, or the system cannot write.
    """
    choose("format", format, formats.NAMES)
    model, _, config = load(ckpt)
    refuse_misfit(config, format, ckpt)
    tensors = {name: w.contiguous() for name, w in formats.to_format(model.state_dict(), config, format).items()}
    about = json.dumps(format_config(config, format), indent=1)
    with whole_file(Path(to) / "config.json") as config_file, whole_file(Path(to) / "model.safetensors") as weights_file:
        config_file.write_text(about, encoding="ascii")
        try:
            save_file(tensors, weights_file)
        except SafetensorError as error:  # what safetensors makes of an OSError
            raise UserError(f"cannot write {to}/model.safetensors: {error}") from None


def refuse_misfit(config, format, ckpt):
    """UserError for the first thing about a model that the format has no place for."""
    for key, value in formats.FIXED[format].items():
        require(config[key] == value, f"{ckpt} has {key}={config[key]}, which format {format} cannot say: only {value}")
    wide = format == "radd" and config["mlp_hidden"] not in (0, 4 * config["n_embd"])
    require(not wide, f"{ckpt} has mlp_hidden={config['mlp_hidden']}, which format radd cannot say: only 4 * n_embd")
    start = format == "smdm" and config["causal"] and config["start_id"] < 0
    require(not start, f"{ckpt} reads the mask before the first token (start_id=-1); causal smdm has no embedding for it")


def format_config(config, format):
    """What config.json says."""
    V, D, H = config["vocab_size"], config["n_embd"], config["n_head"]
    if format == "radd":
        size = {"hidden_size": D, "n_blocks": config["n_layer"], "n_heads": H, "length": config["block_size"]}
        rest = {"name": "nanomdm", "type": "ddit_wot", "cond_dim": 128, "dropout": config["dropout"]}
        kind = "geometric" if config.get("schedule") == "geometric" else "loglinear"  # which no weight depends on
        noise = {"type": kind, "sigma_min": 1e-4, "sigma_max": 20}
        return {"tokens": V, "noise": noise, "model": size | rest | {"use_checkpoint": False, "dtype": "float32"}}
    if format == "smdm":
        size = {key: config[key] for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
        size |= {"padded_vocab_size": V, "n_query_groups": H, "intermediate_size": config["mlp_hidden"] or 4 * D}
        return size | formats.SMDM_FIXED | {"name": "nanomdm", "_norm_class": "FusedRMSNorm", "_mlp_class": "LLaMAMLP"}
    return {"format": format} | {key: config[key] for key in [*MODEL, *formats.ROWS, *formats.TOLD] if key in config}


def main(config):
    """The command `export`."""
    given = config["ckpt"] and config["to"]
    require(given, f"usage: python checkpoint.py export --ckpt=... --to=DIR --format={'|'.join(formats.NAMES)}")
    export(config["ckpt"], config["to"], config["format"])
    print(f"wrote {config['to']}/config.json and {config['to']}/model.safetensors ({config['format']})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        del sys.argv[1]
    settings.run(main, sys.modules[__name__])
