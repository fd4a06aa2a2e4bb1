"""One page with the model inside: a self-contained file that samples in the reader's browser.

    python -m view.page --ckpt=out/pydocs                         writes out/pydocs/page.html
    python -m view.page --ckpt=JingyangOu/radd-t-dce --trace      a recorded sample, no weights

It starts with the text --template=, and with --threshold= and --max_entropy=; with --trace, all
keys of sample.py apply. page.html is the frame, network.js the network, sampler.js the samplers and
the NELBO, app.js the user interface.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, too
from lib import program  # isort: skip (first, as in train.py)
import base64
import os
import re

import torch

import config as settings
import model as network
import sample
import samplers
from config import plural, require
from lib.files import check_ending, to_json, whole_file
from lib.text import text_or_file
from lib.watch import token_text
from run.subject import load_subject

DEFAULTS = {
    "page": "",  # the file to write; "": page.html beside the checkpoint
    "trace": False,  # record a sample now and leave out the weights
    "code": "",  # the base URL of the page's links to the code; "": relative to the page
}
HERE = Path(__file__).resolve().parent
MOST = 4_000_000  # the most parameters that a page holds


def pack(model):
    """(the weights as a page stores them, the same as a state dict), rounded only once.

    A matrix is q * s: s is max |w| / 127 of each row, in bfloat16, and q the nearest integer from
    -127 to 127. A vector is bfloat16.
    """
    shapes, narrow, wide, rounded = {}, b"", b"", {}
    for name, w in model.state_dict().items():
        w = w.detach().float().cpu()  # (n, D) or (n,)
        scale = (w.abs().amax(1, keepdim=True) / 127 if w.dim() == 2 else w).bfloat16()
        rounded[name], shapes[name] = scale.float(), list(w.shape)  # (n, 1) or (n,)
        wide += scale.view(torch.int16).numpy().astype("<i2").tobytes()
        if w.dim() == 2:
            q = (w / scale.float()).nan_to_num().round().clamp(-127, 127)  # (n, D)
            narrow += q.to(torch.int8).numpy().tobytes()
            rounded[name] = q * scale.float()
    narrow, wide = (base64.b64encode(part).decode() for part in (narrow, wide))
    return {"shapes": shapes, "narrow": narrow, "wide": wide}, rounded


def with_weights(subject, o):
    """The data of a page that holds the network; UserError if it cannot hold it."""
    model, tokenizer, trained, *_ = subject
    config, n, kind = model.config, model.n_parameters(), tokenizer.kind
    simple = n <= MOST and kind in ("char", "byte")
    simple = simple and not any(config[key] for key in ("rotary_bf16", "head_padding", "conv"))
    in_network_js = {"norm": ("layer", "rms"), "mlp": ("gelu", "swiglu", "relu2")}  # supported
    simple = simple and all(config[key] in in_network_js[key] for key in in_network_js)
    require(not model.causal, "a page shows masks that fill; this network is causal")
    require(simple, "a page cannot hold this model; record a sample of it with --trace")
    asks = o["template"] or not trained.get("example_width")
    require(asks, "this model answers prompts: begin with one and a gap, --template='Why?___20'")
    template = text_or_file(o["template"]) or f"___{model.block_size}"
    sample.gapped_ids(tokenizer, model, template=template)  # or its UserError
    about = f"This file holds a masked diffusion language model of {n:,} parameters, which writes "
    about += "here, in your browser; nothing is fetched. Its matrices are rounded to 8‑bit whole "
    about += "numbers times one 16‑bit number a row, its vectors to 16 bits (bfloat16)."
    if config["attention"] == "order":
        about += " It reads visible tokens in the order in which they became visible."
    table = [token_text(tokenizer, token) for token in range(len(tokenizer.table) - 1)]
    data = {"mask_id": model.mask_id, "table": table, "tokenizer": kind, "about": about}
    data |= {"text": template, "config": {key: config[key] for key in network.DEFAULTS}}
    data["options"] = {key: (samplers.DEFAULTS | o)[key] for key in ("threshold", "max_entropy")}
    return data | pack(model)[0]


class Recorder:
    """An `on_call` for sample.sample: records step, call, probability, 5 alternatives per token."""

    def __init__(self, tokenizer, x, mask_id, options):
        self.tokenizer, self.start, self.mask_id, self.o = tokenizer, x.cpu(), mask_id, options
        policy = samplers.SAMPLERS[options["sampler"]](self.start == mask_id, options)
        self.steps = policy.step  # (N, L) or None
        self.draws = [[] for _ in x]

    def __call__(self, rows, positions, calls, tokens, p, logits):
        likely = (logits.double() / (self.o["temperature"] or 1)).softmax(-1)  # (n, V)
        likely = sample.keep_likely(likely, self.o["top_k"], self.o["top_p"])
        likely /= likely.sum(-1, keepdim=True)
        likely = likely.topk(min(5, likely.shape[1]))  # (n, 5)
        steps = calls if self.steps is None else self.steps[rows, positions]  # (n,)
        columns = positions, steps, calls, tokens, p, likely.indices, likely.values
        for row, *draw, ids, ps in zip(*(z.tolist() for z in (rows, *columns)), strict=True):
            draw = dict(zip(("place", "step", "call", "token", "p"), draw, strict=True))
            draw["alternatives"] = [[v, round(q, 4)] for v, q in zip(ids, ps, strict=True)]
            self.draws[row].append(draw)

    def data(self, info):
        """{mask_id, table: {id: text}, samples: {start, draws, steps, expected calls} of each}."""
        samples, used = [], set(self.start.flatten().tolist()) - {self.mask_id}
        for start, draws, nfe in zip(self.start.tolist(), self.draws, info["nfe"], strict=True):
            run = {"start": start, "draws": draws, "expected": info["expected_nfe"]}
            samples.append(run | {"steps": int(nfe) if self.steps is None else self.o["steps"]})
            used |= {v for draw in draws for v, _ in [*draw["alternatives"], (draw["token"], 1)]}
        table = {v: token_text(self.tokenizer, v) for v in sorted(used)}
        return {"mask_id": self.mask_id, "table": table, "samples": samples}


def recorded(subject, o):
    """The data of a page or picture that replays samples, drawn now with the keys of sample.py."""
    model, tokenizer, *_ = subject
    rule = "a record holds one draw a position: no causal network, no sampler that masks again"
    require(not model.causal, rule)
    x, suppress, *_ = sample.rows_to_fill(o, subject)  # (N, L) each
    policy = sample.SAMPLERS[o["sampler"]]((x == model.mask_id).cpu(), o)
    require(not policy.remasks, rule)
    recorder = Recorder(tokenizer, x, model.mask_id, o)
    options = {key: o[key] for key in sample.OPTIONS}
    _, info = sample.sample(model, x, suppress, progress=True, on_call=recorder, **options)
    about = f"A recorded sample of a model of {model.n_parameters():,} parameters: {o['sampler']}, "
    about += f"{plural(o['steps'], 'step')}, temperature {o['temperature']}, seed {o['seed']}."
    return recorder.data(info) | {"about": about}


def made(config, make):
    """make(subject, the keys of sample.py) for the checkpoint config["ckpt"]."""
    subject = load_subject(config, reads_text=True, cast=False)  # weights as saved
    keys = settings.defaults_of(sample.MODULES)
    config = sample.with_defaults(config, subject)
    with subject.autocast():
        return make(subject, {key: config[key] for key in keys})


def html(data, code):
    """The page. Text of the model stays text, also in the data, where no '<' can begin a tag."""
    parts = {path.name: path.read_text("utf8") for path in HERE.glob("[!.]*.js")}
    parts |= {"code": code, "data": to_json(data, ensure_ascii=False).replace("<", "\\u003c")}
    frame = (HERE / "page.html").read_text("utf8")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], frame)


def main(config):
    """Write the page and print its path and size."""
    require(not config["out"], "the page goes to --page=FILE, not to --out")
    check_ending("page", config["page"], ".html")
    data = made(config, recorded if config["trace"] else with_weights)
    ckpt = Path(config["ckpt"])
    path = Path(config["page"] or (ckpt if ckpt.is_dir() else Path()) / "page.html")
    root = Path(os.path.relpath(HERE.parent, path.resolve().parent)).as_posix() + "/"
    text = html(data, config["code"] or root).encode("utf8", "replace")
    with whole_file(path) as temporary:
        temporary.write_bytes(text)
    print(f"{path}: {len(text):,} bytes; open it in a browser")


if __name__ == "__main__":
    program.run(main, *sample.MODULES, sys.modules[__name__])
