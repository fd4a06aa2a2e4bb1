"""Weight formats: the names of tensors and settings in our files, RADD's and SMDM's.

run/checkpoint.py reads and writes the files.
"""

import contextlib
import json
import os
import re

import torch

import model as network
from config import RENAMED, Table, UserError, allowed, choose, require, shown, typed

# Earlier defaults, for old files that lack these keys.
OLD = {"norm": "layer", "bias": True, "qk_norm": False, "zero_init": "none"}
MODEL = network.DEFAULTS | network.PUBLISHED | OLD

# ---- 1. Tensors: a table of names for each format, and one function each way ---------------------

# fmt: off
NAMES = Table(  # model.py's name of a module or tensor -> the published one
    "format",
    nanomdm={},
    radd={
        "embed.weight": "vocab_embed.embedding", "qkv": "attn_qkv", "proj": "attn_out",
        "mlp.up": "mlp.0", "mlp.down": "mlp.2",
        "norm": "output_layer.norm_final", "unembed": "output_layer.linear",
    },
    smdm={
        "embed": "transformer.wte", "blocks": "transformer.h",
        "norm1": "norm_1", "qkv": "attn.attn", "proj": "attn.proj", "norm2": "norm_2",
        "mlp.gate": "mlp.swiglu.w1", "mlp.up": "mlp.swiglu.w2", "mlp.down": "mlp.swiglu.w3",
        "norm": "transformer.ln_f", "unembed": "lm_head",
    },
)
# fmt: on
FREQUENCY = "rotary_emb.inv_freq"  # RADD's files also hold the rotary frequencies


def published(name, format):
    """The name that a format gives to a tensor of model.py."""
    names = NAMES[format]
    parts = "|".join(map(re.escape, names)) or "(?!)"
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda part: names[part[0]], name)


def to_format(weights, config, format):
    """The tensors {name: tensor} of model.py, converted to a format."""
    D, d = config["n_embd"], config["n_embd"] // config["n_head"]
    out = {}
    for name, w in weights.items():
        if format == "smdm" and name.endswith("qkv.weight"):
            # SMDM stores q, k and v of the first head, then those of the next one.
            w = w.reshape(3, -1, d, D).transpose(0, 1).reshape(-1, D)  # (3D, D)
        if format == "smdm" and name == "embed.weight" and config["attention"] == "causal":
            w = w[:-1]  # (V, D): its causal network cannot read the mask
        if format == "radd" and name.startswith("unembed") and not config["head_padding"]:
            w = torch.cat([w, torch.zeros_like(w[:1])])  # (V + 1, D) or (V + 1,), with the mask
        out[published(name, format)] = w
    if format == "radd":
        out[FREQUENCY] = network.rotary_frequency(config)  # (d/2,)
    return out


def from_format(weights, names, config, format):
    """The inverse of to_format: the tensors called `names` in model.py, in float32."""
    D, d = config["n_embd"], config["n_embd"] // config["n_head"]
    out = {}
    for name in names:
        w = weights[published(name, format)].float()
        if format == "smdm" and name.endswith("qkv.weight"):
            w = w.reshape(-1, 3, d, D).transpose(0, 1).reshape(-1, D)  # (3D, D)
        if format == "smdm" and name == "embed.weight" and config["attention"] == "causal":
            w = torch.cat([w, torch.zeros_like(w[:1])])  # (V + 1, D)
        out[name] = w
    return out


# ---- 2. Settings ---------------------------------------------------------------------------------

RADD = {"norm": "layer", "mlp": "gelu", "bias": True, "rotary_bf16": False}  # its type of block
SMDM = {"norm": "rms", "mlp": "swiglu", "bias": False, "rotary_bf16": True}
FIXED = {  # the model keys that have only one value in a format
    "nanomdm": {},
    "radd": RADD | {"qk_norm": False, "conv": 0, "attention": "full"},
    "smdm": SMDM | {"qk_norm": False, "conv": 0, "head_padding": 0},
}
RADD_SIZES = {"n_layer": "n_blocks", "n_head": "n_heads", "n_embd": "hidden_size"}
RADD_SIZES |= {"block_size": "length"}  # their names for these settings
SMDM_FIXED = {"bias": False, "norm_eps": 1e-5, "rotary_percentage": 1.0, "parallel_residual": False}
SIZE_KEYS = ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")  # without a default
EXAMPLES = {"example_width": 0, "eos_id": -1}  # keys of models trained on examples
EXPORTED = (*MODEL, *EXAMPLES, "objective", "schedule", "tokenizer")  # the keys of our exports
TOKENIZERS = {("radd", 50257): {"kind": "gpt2"}, ("smdm", 32000): {"kind": "llama"}}  # (format, V)
# fmt: off
SIZES = {  # SMDM's, by parameters without embedding and head: (n_layer, n_head, n_embd, mlp_width)
    "6M": (6, 4, 256, 1024),        "19M": (8, 6, 384, 1536),       "34M": (8, 8, 512, 2048),
    "48M": (9, 9, 576, 2304),       "66M": (10, 10, 640, 2560),     "75M": (16, 8, 640, 1600),
    "85M": (13, 10, 640, 2560),     "113M": (12, 12, 768, 3072),    "142M": (15, 12, 768, 3072),
    "170M": (18, 12, 768, 3072),    "180M": (14, 14, 896, 3584),    "206M": (16, 14, 896, 3584),
    "231M": (18, 14, 896, 3584),    "268M": (16, 16, 1024, 4096),   "302M": (18, 16, 1024, 4096),
    "336M": (20, 16, 1024, 4096),   "472M": (18, 10, 1280, 5120),   "551M": (21, 10, 1280, 5120),
    "571M": (18, 11, 1408, 5632),   "629M": (24, 10, 1280, 5120),   "666M": (21, 11, 1408, 5632),
    "717M": (19, 12, 1536, 6144),   "761M": (24, 11, 1408, 5632),   "831M": (22, 12, 1536, 6144),
    "944M": (25, 12, 1536, 6144),   "1028M": (20, 14, 1792, 7168),  "1233M": (24, 14, 1792, 7168),
    "1476M": (22, 16, 2048, 8192),  "1678M": (25, 16, 2048, 8192),  "2121M": (28, 17, 2176, 8704),
}
# fmt: on


def size_config(name):
    """The model keys of one of SMDM's model sizes (arXiv 2410.18514); UserError if unknown."""
    keys = ("n_layer", "n_head", "n_embd", "mlp_width")
    return SMDM | dict(zip(keys, choose("size", name, SIZES), strict=True))


def entry(where, key, value, default):
    """A file's value in the type of its default: config.typed, but text never becomes a number."""
    wants_text = isinstance(default, str)
    message = f"{where}: {key} must be {'text' if wants_text else 'a number'}, not {shown(value)}"
    require(isinstance(value, str) == wants_text, message)
    return typed(f"{where}: {key}", value, default)


def renamed(raw):
    """Our config with current key names; attention used to be causal=True or False."""
    raw = {RENAMED.get(key, key): value for key, value in raw.items()}
    if isinstance(raw.get("attention"), bool):
        raw["attention"] = "causal" if raw["attention"] else "full"
    return raw


def own_config(raw, weights, where, file):
    """The config of our checkpoints and exports: as saved, with its model keys checked."""
    raw = renamed(raw)
    saved = MODEL | dict.fromkeys(SIZE_KEYS) | raw
    config = {key: entry(where, key, saved[key], MODEL[key]) for key in MODEL}
    others = EXAMPLES | {"objective": "", "schedule": "", "batch_size": 0, "ahead": 0}
    config |= {key: entry(where, key, raw[key], others[key]) for key in others if key in raw}
    for key, value in raw.items():
        is_plain = isinstance(value, (str, int, float, list, dict, type(None)))
        require(is_plain, f"{where}: {shown(key)} must be a number or text, not {shown(value)}")
    for key, values in allowed(network).items():
        choose(f"{key} in {where}", config[key], values)
    return raw | config


def radd_config(raw, weights, where, file):
    """The config of RADD's files (arXiv 2406.03736): {tokens, noise, model, ...}."""
    raw = raw["config"] if "model" not in raw and isinstance(raw.get("config"), dict) else raw
    net = raw.get("model")
    require(isinstance(net, dict), f"{where}: there is no model with its sizes")
    config = MODEL | FIXED["radd"] | {"zero_init": "head", "head_padding": 1}
    for ours, theirs in RADD_SIZES.items():
        config[ours] = entry(where, f"model.{theirs}", net.get(theirs), 0)
    config["vocab_size"] = entry(where, "tokens", raw.get("tokens"), 0)
    config["dropout"] = entry(where, "model.dropout", net.get("dropout", 0.0), 0.0)
    # Their network is normalised, so score entropy (t_DSE) equals cross-entropy.
    objectives = {"k_dce": "any_order", "t_dce": "t_dce", "t_dse": "t_dce"}
    recipe = str(raw.get("training", where)).lower().replace("-", "_")  # the path may tell
    names = (ours for theirs, ours in objectives.items() if theirs in recipe)
    schedule = "geometric" if "geometric" in str(raw.get("noise")) else "loglinear"
    return config | {"objective": next(names, "lambda_dce"), "schedule": schedule}


def smdm_config(raw, weights, where, file):
    """The config of SMDM's files, from the shapes of their tensors; a config.json must agree."""
    names = ["lm_head.weight", "transformer.wte.weight", "transformer.h.0.mlp.swiglu.w1.weight"]
    for name in names:
        matrix = name in weights and weights[name].dim() == 2
        require(matrix, f"{file}: the matrix {name} is missing")
    (V, D), (rows, _), (width, _) = (weights[name].shape for name in names)
    message = f"{file}: transformer.wte.weight has {rows} rows; a vocabulary of {V} has"
    require(rows in (V, V + 1), f"{message} {V} or {V + 1}")
    n_layer = len(set(re.findall(r"^transformer\.h\.(\d+)\.", "\n".join(weights), re.M)))
    n_head = {(size[0], size[2]): size[1] for size in SIZES.values()}.get((n_layer, D))
    message = f"{file}: no size of SMDM has {n_layer} layers of width {D}"
    require(n_head or "n_head" in raw, f"{message}, so a config.json beside it has to give n_head")
    sizes = {"n_head": n_head, "block_size": 2048, "vocab_size": V}
    sizes = {key: entry(where, key, raw.get(key, sizes[key]), 0) for key in sizes}
    required = {"n_layer": n_layer, "n_embd": D, "intermediate_size": width, "mask_token_id": V}
    required |= {
        "padded_vocab_size": V,
        "vocab_size": min(V, sizes["vocab_size"]),
        "rope_base": 10000,
    }
    required |= SMDM_FIXED | {"n_query_groups": sizes["n_head"]}
    for key, value in required.items():
        claim = raw.get(key, value)
        message = f"{where}: {key} is {claim}, but the network in {file.name} has {value}"
        require(claim == value, message)
    sizes |= {"vocab_size": V, "n_layer": n_layer, "n_embd": D, "mlp_width": width}
    masked = {"attention": "full", "start_id": -1, "objective": "lambda_dce"}
    causal = {"attention": "causal", "start_id": 1, "objective": "ar"}
    return MODEL | FIXED["smdm"] | sizes | (causal if rows == V else masked)


CONFIGS = {"nanomdm": own_config, "radd": radd_config, "smdm": smdm_config}


def format_config(config, format):
    """The contents of an export's config.json."""
    V, D, schedule = config["vocab_size"], config["n_embd"], config.get("schedule")
    if format == "radd":
        net = {theirs: config[ours] for ours, theirs in RADD_SIZES.items()}
        net |= {"name": "nanomdm", "type": "ddit_wot", "cond_dim": 128, "use_checkpoint": False}
        net |= {"dropout": config["dropout"], "dtype": "float32"}
        noise = "geometric" if schedule == "geometric" else "loglinear"  # weights do not need it
        noise = {"type": noise, "sigma_min": 1e-4, "sigma_max": 20}
        return {"tokens": V, "noise": noise, "model": net}
    if format == "smdm":
        net = {key: config[key] for key in SIZE_KEYS} | SMDM_FIXED
        net |= {"name": "nanomdm", "_norm_class": "FusedRMSNorm", "_mlp_class": "LLaMAMLP"}
        net |= {"padded_vocab_size": V, "n_query_groups": config["n_head"]}
        return net | {"intermediate_size": config["mlp_width"] or 4 * D}
    return {"format": format} | {key: config[key] for key in EXPORTED if key in config}


def read_settings(file):
    """(settings, their path) that belong to a weights file; ({}, file) if there are none.

    They are in config.json beside it, or in .hydra/config.yaml as written by RADD's trainer.
    """
    hydra = file.resolve().parent.parent / ".hydra" / "config.yaml"
    beside = (file.with_name("config.json"), hydra)
    path = next((path for path in beside if os.path.isfile(path)), None)
    if path is None:
        return {}, file
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = read_yaml(text) if path is hydra else json.loads(text)
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is damaged") from None
    require(isinstance(raw, dict), f"{path} must hold a dict, not a {type(raw).__name__}")
    return raw, path


def read_yaml(text):
    """Nested dicts of numbers and text from nested `key: value` lines; other lines are skipped."""
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
