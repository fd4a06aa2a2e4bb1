"""Load and save weights: our checkpoints and exports, and RADD's and SMDM's published weights.

    python -m run.checkpoint export --ckpt=out/pydocs --to=DIR --format=nanomdm

`load` takes anything that --ckpt can name: an out_dir of train.py, a folder with config.json and
model.safetensors (ours, RADD's or SMDM's), a folder of RADD's trainer, a single .safetensors, .pth
or .bin file, or a Hub name (JingyangOu/radd-t-dce, nieshen/SMDM/mdm_safetensors/FILE.safetensors).
formats.py has each format's names of tensors and settings. No code in a file is executed.
"""

from lib import program  # isort: skip (first, as in train.py)
import contextlib
import math
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file

from config import UserError, choose, require
from data import download
from data.tokenizer import Unavailable, from_meta
from lib.files import check_kind, is_utf8, set_aside, to_json, whole_file
from lib.stats import not_finite
from model import make_network, rotary_tables
from run import formats

DEFAULTS = {
    "ckpt": "",  # what to export: a folder, a file or a Hub name
    "to": "",  # the folder that config.json and model.safetensors are written to
    "format": "nanomdm",  # one of FORMATS
}
FORMATS = formats.NAMES
WEIGHTS = "ckpt.pt", "best.pt", "model.safetensors", "pytorch_model.bin"  # in a folder
WEIGHTS += ("checkpoints-meta/checkpoint.pth",)
COUNTS = "minutes", "tokens", "flops"  # used by a run so far; older checkpoints lack some

# ---- 1. Our own checkpoint -----------------------------------------------------------------------


def save(path, state, keep=1):
    """Write {config, tokenizer, model, ema, optimizer, step} and COUNTS to `path` atomically.

    With keep > 1 the last `keep` checkpoints are also kept as NAME_STEP.pt. The newest of these is
    a hard link to `path`, or a copy if the file system has no links.
    """
    with whole_file(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError:  # torch raises this instead of an OSError
            raise UserError(f"cannot write {path}; is the disk full?") from None
        with open(temporary, "r+b") as file:  # Windows syncs only files opened for writing
            os.fsync(file)  # it must be on disk before it replaces the last one
    if keep > 1:
        with whole_file(path.with_name(f"{path.stem}_{state['step']}.pt")) as temporary:
            try:
                os.link(path, temporary)
            except (OSError, AttributeError):  # a file system, or a Python, without links
                shutil.copyfile(path, temporary)
        files = kept_beside(path)
        last = sorted(step for step in files if step <= state["step"])[-keep:]
        for step in files.keys() - set(last):  # also later ones, left by a run that then went back
            with contextlib.suppress(OSError):
                files[step].unlink()


def kept_beside(path):
    """{step: file} of the checkpoints that `save` keeps beside `path`."""
    pattern = re.compile(rf"{re.escape(path.stem)}_(\d+)\.pt")
    names = {file: pattern.fullmatch(file.name) for file in path.parent.glob("*.pt")}
    return {int(name[1]): file for file, name in names.items() if name}


def set_run_aside(path):
    """Move the checkpoints and log of the run at `path` aside; the folder, None if there are none.

    Raises UserError if they cannot be moved.
    """
    try:
        files = path, path.with_name("best.pt"), *kept_beside(path).values()
        checkpoints = list(filter(Path.is_file, files))
        if not checkpoints:
            return None
        return set_aside(path.parent, [*checkpoints, path.with_name("log.jsonl")])
    except OSError as error:
        raise UserError(f"cannot move {path} aside: {error.strerror or error}") from None


def read(path):
    """The dict that `save` wrote to `path`, a file or its folder, with current key names.

    Tensors stay on disk until they are used. Raises UserError if the file is missing, damaged or
    not ours, or lacks something that a run needs to resume. It never falls back silently to an
    older checkpoint: a damaged file may be the first sign of a damaged disk.
    """
    file = Path(path, "ckpt.pt") if os.path.isdir(path) else Path(path)
    require(os.path.isfile(file), f"no checkpoint {file}")
    try:
        state = unpickle(file)
    except UserError as error:
        others = {k: f for k, f in kept_beside(file).items() if not os.path.samefile(f, file)}
        advice = f"; copy {others[max(others)]} over it to resume from there" if others else ""
        raise UserError(f"{error}{advice}") from None
    require(is_ours(state), f"{file} is not a checkpoint of train.py: it has no config and model")
    state = {"tokenizer": None, "ema": None} | dict.fromkeys(COUNTS, 0.0) | state
    state["config"] = formats.own_config(state["config"], None, file, file)
    formats.entry(file, "objective", state["config"].get("objective"), "")
    check_parts(state, file)
    return state


def is_ours(state):
    parts = ("config", "model")
    return isinstance(state, dict) and all(isinstance(state.get(key), dict) for key in parts)


def check_parts(state, file):
    """Raise UserError for the first part of a state that a run cannot be resumed from."""
    step, meta, ema = map(state.get, ("step", "tokenizer", "ema"))
    message = f"{file}: no run can be resumed from its"
    require(type(step) is int and step >= 0, f"{message} step")
    for key in COUNTS:
        require(type(state[key]) is float and 0 <= state[key] < math.inf, f"{message} {key}")
    is_text = meta is None or is_dict(meta, str, lambda value: isinstance(value, str))
    require(is_text, f"{message} tokenizer")
    require(are_weights(state["model"]), f"{message} model")
    require(ema is None or are_weights(ema), f"{message} ema")
    for part in ("model", "ema"):
        name = not_finite(state[part] or {})
        require(not name, f"{message} {part}: the tensor {name} holds nan or infinity")
    require(isinstance(state.get("optimizer"), list), f"{message} optimizer")
    for optimizer in state["optimizer"]:
        require(is_optimizer_state(optimizer), f"{message} optimizer")


def is_optimizer_state(part):
    """Whether it is {"state": {int: {name: tensor}}, "param_groups": [{"params": [int, ...]}]}."""
    if not isinstance(part, dict) or not isinstance(part.get("param_groups"), list):
        return False
    for group in part["param_groups"]:
        numbers = group.get("params") if isinstance(group, dict) else None
        if not (isinstance(numbers, list) and all(isinstance(i, int) for i in numbers)):
            return False
    return is_dict(part.get("state"), int, are_weights)


def is_dict(part, key, test):
    """Whether it is a dict whose keys have the type `key` and whose values pass `test`."""
    return isinstance(part, dict) and all(isinstance(k, key) and test(v) for k, v in part.items())


def are_weights(part):
    return is_dict(part, str, is_plain)


def is_plain(w):
    """Whether w is an ordinary floating-point tensor whose values are all in its storage."""
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if not (isinstance(w, torch.Tensor) and w.dtype in floats and w.layout == torch.strided):
        return False
    return not w.is_meta and w.numel() * w.element_size() <= w.untyped_storage().nbytes()


def unpickle(file):
    """torch.load without running code; UserError for a file that is damaged or contains code."""
    try:
        zipped = zipfile.is_zipfile(file)  # all but torch's oldest format, which cannot be mapped
        # Windows cannot replace a file that is mapped.
        mapped = zipped and is_utf8(file) and sys.platform != "win32"
        if zipped:
            with zipfile.ZipFile(file) as archive:
                size = sum(item.file_size for item in archive.infolist())
                bomb = size > os.path.getsize(file)  # torch stores without compression
                require(not bomb and archive.testzip() is None, "a size or a checksum is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch did not write
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code and isinstance(error, pickle.UnpicklingError):
            raise UserError(f"{file} wants to run code ({code[1]}), which is refused") from None
        raise UserError(f"{file} is damaged, or not a checkpoint") from None


# ---- 2. Loading ----------------------------------------------------------------------------------


def load(path, device="cpu", ema=True):
    """(model, tokenizer or None, config) of anything listed at the top of this file.

    The model is on `device` in eval mode, with EMA weights if `ema` is set and the file has them.
    Weights become float32; on the CPU, float32 weights are read without a second copy. The
    tokenizer is None if it cannot be built here (no package, no network). config has the model's
    keys, "objective" and the tokenizer's meta, and for our own checkpoints the whole training
    config. Raises UserError for a file that is damaged or whose shapes contradict its config.
    """
    file = locate(path)
    state = read_tensors(file)
    if is_ours(state):
        raw, where = state["config"] | {"tokenizer": state.get("tokenizer")}, file
        weights = state["ema"] if ema and state.get("ema") is not None else state["model"]
    else:
        raw, where = formats.read_settings(file)
        weights = state["model"] if isinstance(state.get("model"), dict) else state
    format = recognise(weights, file)
    message = f"{file} needs a config.json beside it: its tensors do not tell the number of heads"
    require(raw or format == "smdm", message)
    config = formats.CONFIGS[format](raw, weights, where, file)
    model = skeleton(config, len(weights), where)
    if format == "radd" and ema and state.get("ema") is not None:
        weights, config["ema"] = ema_by_name(state["ema"], model, file), True
    load_weights(model, weights, format, file)
    V = config["vocab_size"]
    meta = raw.get("tokenizer") if format == "nanomdm" else formats.TOKENIZERS.get((format, V))
    return model.to(device).eval(), tokenizer_of(meta, V, where), config | {"tokenizer": meta}


def locate(path):
    """The weights file that a path or a Hub name refers to; in a folder, ours comes first."""
    if not os.path.isdir(path):
        return Path(path) if os.path.isfile(path) else from_hub(str(path))
    for file in (Path(path, name) for name in WEIGHTS):
        if os.path.isfile(file):
            return file
    others = sorted(str(file) for file in Path(path).glob("*.safetensors") if os.path.isfile(file))
    names = f"{', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}"
    which = f"; name the file that is meant: {' or '.join(others)}" if others else runs_in(path)
    raise UserError(f"no checkpoint in folder {path}: it has no {names}{which}")


def runs_in(folder, most=4):
    """The end of a message: up to `most` subfolders with weights, the newest first."""
    holds = lambda run: any(os.path.isfile(run / name) for name in WEIGHTS)  # noqa: E731
    inside = Path(folder).glob("*") if os.path.isdir(folder) else []  # False for what is no name
    runs = sorted(filter(holds, inside), key=os.path.getmtime, reverse=True)
    return f"; there is: {', '.join(map(str, runs[:most]))}" if runs else ""


def from_hub(name):
    """Download OWNER/REPO (config.json and weights) or OWNER/REPO/FILE; the weights' path."""
    owner, *rest = name.split("/")
    is_here = owner == "out" or os.path.exists(owner)
    like_hub = not is_here and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", name)
    why = "" if is_here else ", and not a Hub name (OWNER/REPO or OWNER/REPO/FILE)"
    why = f"no such file or folder{why}{runs_in(Path(name).parent)}"
    require(like_hub, f"no checkpoint {name}: {why}")
    repo, filename = f"{owner}/{rest[0]}", "/".join(rest[1:])
    try:
        if not filename:
            download.hub_file(repo, "config.json")
        return download.hub_file(repo, filename or "model.safetensors")
    except UserError as error:
        raise UserError(f"no file or folder {name}, and as a Hub name: {error}") from None


def read_tensors(file):
    """The dict in a file; its first bytes tell whether it is safetensors or a pickle."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(9)
        if head[8:] == b"{":  # safetensors: the header's length, then the header in JSON
            if not is_utf8(file):
                return load_bytes(Path(file).read_bytes())
            with safe_open(file, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    state, message = unpickle(file), f"{file} is not a checkpoint: it holds a"
    require(isinstance(state, dict), f"{message} {type(state).__name__}")
    return state


def recognise(weights, file):
    """The name of the format, recognised by its name for the embedding."""
    embeddings = {formats.published("embed.weight", format): format for format in formats.NAMES}
    only_tensors = is_dict(weights, str, lambda w: isinstance(w, torch.Tensor))
    fitting = [embeddings[name] for name in embeddings if only_tensors and name in weights]
    message = f"{file} holds no model known here: it must be tensors only, with one named"
    require(fitting, f"{message} {' or '.join(embeddings)}")
    return fitting[0]


def skeleton(config, n_tensors, where):
    """The network of a config, without memory for its weights; UserError for impossible sizes."""
    limits = dict.fromkeys(formats.SIZE_KEYS, (1, 2**20))
    limits |= {"mlp_width": (0, 2**20), "head_padding": (0, 2**20)}
    limits |= {"dropout": (0, 1), "start_id": (-1, config["vocab_size"])}
    for key, (low, high) in limits.items():
        message = f"{where}: {key} must be from {low} to {high}, not {config[key]}"
        require(low <= config[key] <= high, message)
    n_layer = config["n_layer"]
    require(n_layer <= n_tensors, f"{where}: {n_layer} layers, but only {n_tensors} tensors")
    try:
        with torch.device("meta"):
            return make_network(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def ema_by_name(ema, model, file):
    """{name: EMA weight}; RADD's trainer saves them as a list in the order of the parameters."""
    names = [formats.published(name, "radd") for name, _ in model.named_parameters()]
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    paired = isinstance(shadow, list) and [type(w) for w in shadow] == [torch.Tensor] * len(names)
    require(paired, f"{file}: ema must have shadow_params, a list of {len(names)} tensors")
    return dict(zip(names, shadow, strict=True))


def load_weights(model, weights, format, file):
    """Put the weights into the skeleton; UserError for a wrong name, shape, type or value."""
    names, config, frequency = model.state_dict(), model.config, formats.FREQUENCY
    expected = formats.to_format(names, config, format)
    if frequency not in weights:  # the EMA of RADD's trainer lacks it: it is not a parameter
        expected.pop(frequency, None)
    shapes = [{name: tuple(w.shape) for name, w in part.items()} for part in (weights, expected)]
    for name in expected | weights:
        tensor = f"{file}: the tensor {name}"
        shape, needed = (part.get(name, "absent") for part in shapes)
        require(shape == needed, f"{tensor} is {shape}, but by its config it has to be {needed}")
        message = f"{tensor} must hold plain floating-point numbers, not {weights[name].dtype}"
        require(is_plain(weights[name]), message)
    if frequency in weights:
        rotary = torch.allclose(weights[frequency].float(), expected[frequency], rtol=0.01)
        require(rotary, f"{file}: {frequency} is not that of rotary embeddings with base 10000")
    name = not_finite(weights)
    require(not name, f"{file}: the tensor {name} holds nan or infinity")
    model.load_state_dict(formats.from_format(weights, names, config, format), assign=True)
    model.cos, model.sin = rotary_tables(config)  # (block_size, d/2) each, stored in no file


def tokenizer_of(meta, V, where):
    """The tokenizer of a meta, None if it cannot be built here; UserError if the meta is wrong."""
    if meta is None:
        return None
    try:
        tokenizer = from_meta(meta)
    except Unavailable:
        return None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    message = f"its tokenizer has a vocabulary of {tokenizer.vocab_size}, its network one of {V}"
    require(tokenizer.vocab_size == V, f"{where}: {message}")
    return tokenizer


# ---- 3. Export -----------------------------------------------------------------------------------


def export(ckpt, to, format):
    """Write config.json and model.safetensors (float32) in a format to the folder `to`.

    Raises UserError if the format cannot express the model or the system cannot write.
    """
    choose("format", format, FORMATS)
    check_kind("to", to, "model.safetensors")
    model, _, config = load(ckpt)
    refuse_misfit(config, format, ckpt)
    weights = formats.to_format(model.state_dict(), config, format)
    text = to_json(formats.format_config(config, format), indent=1)
    paths = Path(to) / "config.json", Path(to) / "model.safetensors"
    with whole_file(paths[0]) as config_file, whole_file(paths[1]) as weights_file:
        config_file.write_text(text, encoding="ascii")
        try:
            save_file({name: w.contiguous() for name, w in weights.items()}, weights_file)
        except SafetensorError as error:  # safetensors raises this instead of an OSError
            raise UserError(f"cannot write {paths[1]}: {error}") from None


def refuse_misfit(config, format, ckpt):
    """Raise UserError for the first property of a model that the format cannot express."""
    limits = {key: [value] for key, value in formats.FIXED[format].items()}
    limits |= {"mlp_width": [4 * config["n_embd"], 0]} if format == "radd" else {}
    for key, values in limits.items():
        message = f"{ckpt} has {key}={config[key]}, which format {format} cannot say"
        require(config[key] in values, f"{message}: only {values[0]}")
    no_start = format == "smdm" and config["attention"] == "causal" and config["start_id"] < 0
    message = f"{ckpt} reads the mask before the first token (start_id=-1)"
    require(not no_start, f"{message}; causal smdm has no embedding for it")


def main(config):
    """The command `export`."""
    ckpt, to, format = (config[key] for key in DEFAULTS)
    usage = "python -m run.checkpoint export --ckpt=... --to=DIR --format"
    require(ckpt and to, f"usage: {usage}={'|'.join(FORMATS)}")
    export(ckpt, to, format)
    print(f"wrote {to}/config.json and {to}/model.safetensors ({format})")


if __name__ == "__main__":
    del sys.argv[1 : 2 if sys.argv[1:2] == ["export"] else 1]
    program.run(main, sys.modules[__name__])
