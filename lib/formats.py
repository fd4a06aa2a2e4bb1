"""The formats of weights that are known: ours, RADD's and SMDM's; what each calls its tensors and settings.

checkpoint.py reads and writes the files.
"""

import contextlib
import json
import os
import re

import torch

from config import UserError, choose, require, shown, typed
from model import DEFAULTS as MODEL
from model import SIZES

# ---- 1. Tensors: a table of names each, and one function each way ----------------------------------------------------

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
FIXED = {  # the model keys that a format has one value for
    "nanomdm": {},
    "radd": {"causal": False, "norm": "layer", "mlp": "gelu", "bias": True, "qk_norm": False, "rotary_bf16": False},
    "smdm": {"norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": False, "rotary_bf16": True, "unused_rows": 0},
}
SMDM_FIXED = {"bias": False, "norm_eps": 1e-5, "rotary_percentage": 1.0, "parallel_residual": False}  # in its config.json
ROWS = {"row_width": 0, "row_end": -1}  # of a model of prompts and answers: tokens in a row, and the id of its end mark
TOLD = ("objective", "schedule", "tokenizer")  # what else an export says
SIZE_KEYS = ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")  # without them a network is another
FREQUENCY = "rotary_emb.inv_freq"  # RADD's files hold the rotary frequencies beside the weights


def published(name, format):
    """model.py's name of a tensor -> its name in a format."""
    names = NAMES[format]
    parts = "|".join(map(re.escape, names)) or "(?!)"
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda found: names[found[0]], name)


def to_format(weights, config, format):
    """model.py's tensors -> a format's tensors."""
    D, d = config["n_embd"], config["n_embd"] // config["n_head"]
    out = {}
    for name, w in weights.items():
        if format == "smdm" and name.endswith("qkv.weight"):  # the rows of one head after the other: its q, k, v
            w = w.reshape(3, -1, d, D).transpose(0, 1).reshape(-1, D)  # (3D, D)
        if format == "smdm" and name == "embed.weight" and config["causal"]:  # there is no mask to read
            w = w[:-1]  # (V, D)
        if format == "radd" and name.startswith("unembed") and not config["unused_rows"]:  # a row for the mask
            w = torch.cat([w, torch.zeros_like(w[:1])])  # (V + 1, D) or (V + 1,)
        out[published(name, format)] = w
    if format == "radd":
        out[FREQUENCY] = 1.0 / 10000 ** (torch.arange(0, d, 2).float() / d)  # (d/2,)
    return out


def from_format(found, names, config, format):
    """A format's tensors -> those that model.py calls `names`, in float32. The inverse of to_format."""
    D, d = config["n_embd"], config["n_embd"] // config["n_head"]
    out = {}
    for name in names:
        w = found[published(name, format)].float()
        if format == "smdm" and name.endswith("qkv.weight"):
            w = w.reshape(-1, 3, d, D).transpose(0, 1).reshape(-1, D)  # (3D, D)
        if format == "smdm" and name == "embed.weight" and config["causal"]:
            w = torch.cat([w, torch.zeros_like(w[:1])])  # (V + 1, D)
        out[name] = w
    return out


# ---- 2. A config from what the files say -----------------------------------------------------------------------------


def size_config(name):
    """The model keys of SMDM's architecture (arXiv 2410.18514) in a size of its table; UserError for an unknown name."""
    sizes = zip(("n_layer", "n_head", "n_embd", "mlp_hidden"), choose("size", name, SIZES), strict=True)
    return {key: FIXED["smdm"][key] for key in ("norm", "mlp", "bias", "rotary_bf16")} | dict(sizes)


def entry(where, key, value, default):
    """What a file says of a key, in the type of its default: as config.typed, but text is no number."""
    wanted = "text" if isinstance(default, str) else "a number"
    require((wanted == "text") == isinstance(value, str), f"{where}: {key} must be {wanted}, not {shown(value)}")
    return typed(f"{where}: {key}", value, default)


def own_config(raw, found, where, file):
    """Of our checkpoints and exports: what was saved, each model key in its type."""
    told = MODEL | dict.fromkeys(SIZE_KEYS) | raw
    config = {key: entry(where, key, told[key], default) for key, default in MODEL.items()}
    config |= {key: entry(where, key, raw[key], default) for key, default in ROWS.items() if key in raw}
    for key, value in raw.items():
        plain = isinstance(value, (str, int, float, list, dict, type(None)))
        require(plain, f"{where}: {shown(key)} must be a number or text, not {shown(value)}")
    for key, known in {"norm": ["layer", "rms"], "mlp": ["gelu", "swiglu", "relu2"]}.items():
        choose(f"{key} in {where}", config[key], known)
    return raw | config


def radd_config(raw, found, where, file):
    """Of RADD's files (arXiv 2406.03736): {tokens, noise, model, ...}, in some one level deeper."""
    raw = raw["config"] if "model" not in raw and isinstance(raw.get("config"), dict) else raw
    net = raw.get("model")
    require(isinstance(net, dict), f"{where}: there is no model with its sizes")
    keys = {"n_layer": "n_blocks", "n_head": "n_heads", "n_embd": "hidden_size", "block_size": "length"}
    sizes = {ours: entry(where, f"model.{theirs}", net.get(theirs), 0) for ours, theirs in keys.items()}
    sizes["vocab_size"] = entry(where, "tokens", raw.get("tokens"), 0)
    sizes["dropout"] = entry(where, "model.dropout", net.get("dropout", 0.0), 0.0)
    # Their network is normalised, also for score entropy (t_DSE), which is then the same as cross-entropy.
    objectives = {"k_dce": "any_order", "t_dce": "t_dce", "t_dse": "t_dce"}
    told = str(raw.get("training", where)).lower().replace("-", "_")  # if not there, then perhaps in the repository's name
    recipe = {"objective": next((ours for theirs, ours in objectives.items() if theirs in told), "lambda_dce")}
    recipe["schedule"] = "geometric" if "geometric" in str(raw.get("noise")) else "loglinear"
    return MODEL | FIXED["radd"] | {"zero_init": "head", "unused_rows": 1} | sizes | recipe


def smdm_config(raw, found, where, file):
    """Of SMDM's files, which say little but the shapes of their tensors; what config.json says must agree with them."""
    shapes = []
    for name in ("lm_head.weight", "transformer.wte.weight", "transformer.h.0.mlp.swiglu.w1.weight"):
        require(name in found and found[name].dim() == 2, f"{file}: the matrix {name} is missing")
        shapes.append(found[name].shape)
    (V, D), (rows, _), (width, _) = shapes
    require(rows in (V, V + 1), f"{file}: transformer.wte.weight has {rows} rows; a vocabulary of {V} has {V} or {V + 1}")
    n_layer = len(set(re.findall(r"^transformer\.h\.(\d+)\.", "\n".join(found), re.M)))
    n_head = next((size[1] for size in SIZES.values() if (size[0], size[2]) == (n_layer, D)), None)
    unknown = f"{file}: no size of SMDM has {n_layer} layers of width {D}, so a config.json beside it has to give n_head"
    require(n_head or "n_head" in raw, unknown)
    told = {"n_head": n_head, "block_size": 2048, "vocab_size": V}
    told = {key: entry(where, key, raw.get(key, default), 0) for key, default in told.items()}
    same = {"n_layer": n_layer, "n_embd": D, "intermediate_size": width, "padded_vocab_size": V, "mask_token_id": V}
    same |= SMDM_FIXED | {"rope_base": 10000, "n_query_groups": told["n_head"], "vocab_size": min(V, told["vocab_size"])}
    for key, value in same.items():
        said = raw.get(key, value)
        require(said == value, f"{where}: {key} is {said}, but the network in {file.name} has {value}")
    sizes = {"vocab_size": V, "n_layer": n_layer, "n_embd": D, "mlp_hidden": width}
    kind = {"causal": rows == V, "start_id": 1 if rows == V else -1, "objective": "ar" if rows == V else "lambda_dce"}
    return MODEL | FIXED["smdm"] | told | sizes | kind


CONFIGS = {"nanomdm": own_config, "radd": radd_config, "smdm": smdm_config}
TOKENIZERS = {("radd", 50257): {"kind": "gpt2"}, ("smdm", 32000): {"kind": "llama"}}  # by (format, V)


def read_settings(file):
    """(dict, its path) of the settings beside a file of weights, config.json or that of RADD's trainer; {} if none."""
    beside, hydra = file.with_name("config.json"), file.resolve().parent.parent / ".hydra" / "config.yaml"
    path = next((path for path in (beside, hydra) if os.path.isfile(path)), None)
    if path is None:
        return {}, file
    try:
        text = path.read_text(encoding="utf8")
        raw = read_yaml(text) if path is hydra else json.loads(text)
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is damaged") from None
    require(isinstance(raw, dict), f"{path} must hold a dict, not a {type(raw).__name__}")
    return raw, path


def read_yaml(text):
    """Nested `key: value` lines as nested dicts of numbers and text; whatever else YAML has is passed over."""
    parents = [(-1, {})]  # (indentation, dict), outermost first
    for spaces, key, value in re.findall(r"^( *)(\w+):[ \t]*([^#\n]*)", text, re.M):
        while parents[-1][0] >= len(spaces):
            parents.pop()
        value = value.strip().strip("'\"") or "{}"
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        parents[-1][1][key] = value
        if value == {}:
            parents.append((len(spaces), value))
    return parents[0][1]
