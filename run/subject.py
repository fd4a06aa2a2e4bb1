"""A loaded checkpoint: its network, its tokenizer, how it computes, and the data it can read."""

from pathlib import Path
from typing import NamedTuple

import torch

from config import choose, plural, refuse_typed, require, shown
from data import examples, loader
from data.tokenizer import from_meta, lacks
from lib.device import cast_products, dtype_name, machine
from lib.text import encode, text_or_file, without_space
from run import checkpoint

DEFAULTS = {
    "ckpt": "out/pydocs",  # anything checkpoint.load takes: a run's folder, published weights
    "ema": True,  # use the averaged weights if the checkpoint has them
}


class Subject(NamedTuple):
    """The model that a program samples or evaluates."""

    model: torch.nn.Module
    tokenizer: object  # None if it cannot be built here
    trained: dict  # the config that the model was trained with
    autocast: object  # `with autocast():` sets the dtype of matrix products
    words: str  # how it computes, for reports

    @property
    def causal(self):
        return self.model.causal

    @property
    def of_examples(self):  # it answers prompts rather than continuing text
        return bool(self.trained.get("example_width"))


def load_subject(config, reads_text=False, cast=True):
    """The Subject of the checkpoint config["ckpt"].

    reads_text: raise UserError if there is no tokenizer. cast: cast its matrices once to the dtype
    of products; otherwise they stay as they were saved.
    """
    device, autocast = machine(config)
    ckpt, ema = config["ckpt"], config.get("ema", DEFAULTS["ema"])
    model, tokenizer, trained = checkpoint.load(ckpt, device, ema=ema)
    if reads_text:
        message = f"{ckpt} names no tokenizer, so text cannot be read or written"
        require(trained["tokenizer"], message)
        tokenizer = tokenizer or from_meta(trained["tokenizer"])  # or a UserError
    if cast:
        cast_products(model, autocast)
    if config.get("cfg_scale") and trained.get("example_width") and not trained.get("prompt_drop"):
        print(f"{ckpt} never saw an answer without its prompt, as guidance does: --prompt_drop=0.1")
    weights = "averaged weights" if ema and trained.get("ema") else "raw weights"
    words = f"{dtype_name(autocast, device)}, {weights}, seed {config['seed']}"
    return Subject(model, tokenizer, trained, autocast, words)


def order_of(key, trained, table):
    """{key: name} of the order that an `order` network learnt, if `table` has that name; else {}.

    key: sampler or estimator. A network that learnt a single order is asked in that order; uniform
    orders, which it has never seen, would say nothing of it.
    """
    order = trained.get("order") if trained.get("attention") == "order" else None
    return {key: order} if order in table else {}


def in_its_order(config, subject, key, table):
    """The config of a command with order_of, unless the user has set the key.

    Says so if the network learnt an order that the table does not have.
    """
    own, order = order_of(key, subject.trained, table), subject.trained.get("order", "uniform")
    chosen = key in config.get("user_keys", (key,))
    in_order = subject.trained.get("attention") == "order" and order != "uniform"
    if in_order and not (own or chosen):
        print(f"it is asked in uniform orders, but learnt '{order}', which has no {key} of its own")
    return config if chosen else config | own


def sampler_of(model, name):
    """The sampler of that name, or left_to_right for a causal network, which has no other."""
    return "left_to_right" if model.causal else name


def check_causal(config):
    """Raise UserError for keys of sample.py that do not apply to a causal network."""
    message = f"this network is causal: it has the sampler left_to_right, not '{config['sampler']}'"
    chosen = "sampler" in config.get("user_keys", ())
    require(config["sampler"] == "left_to_right" or not chosen, message)
    reads_ahead = config["suffix"] or config["template"]
    require(not reads_ahead, "a causal network cannot see a suffix or fill a template")
    require(not config["watch"], "watch shows masks that fill; this network is causal")


def load_evaluable(config, reads_text=False):
    """load_subject for an evaluation.

    Raises UserError for t_dse with a model whose scores have no scale, and for --estimator with a
    causal network, which has only one.
    """
    subject = load_subject(config, reads_text)
    if subject.causal and config["estimator"] != "left_to_right":
        refuse_typed(config, ["estimator"], "has no say, for this network is causal and exact")
    scaled = config["estimator"] != "t_dse" or subject.trained.get("objective") == "t_dse"
    advice = "was not trained with t_dse, so its scores have no scale; use --estimator=t_dce"
    require(scaled, f"{config['ckpt']} {advice}")
    return subject


def ids_of_text(subject, config):
    """(ids of config["prompt"], ids of config["text"], how many of these count, both in words).

    They are as the model read them in training: in an example, eos ends the answer and, unless the
    model is causal, pads the example. The padding adds nats but does not count as tokens. Raises
    UserError if there is nothing to score or too much to read.
    """
    model, tokenizer, width = subject.model, subject.tokenizer, subject.trained.get("example_width")
    prompt, text = (text_or_file(config[key]) for key in ("prompt", "text"))
    before = without_space(tokenizer, model, prompt)
    head = encode(tokenizer, model, before)
    ids = encode(tokenizer, model, prompt[len(before) :] + text, start=not head)
    n, most = len(ids), (width or model.block_size) - len(head)
    if width and ids:
        n += 1
        ids += [subject.trained["eos_id"]] * (1 if model.causal else max(1, most - n + 1))
    unit = f"an example of {width}, with eos" if width else "block_size"
    after = f", after a prompt of {len(head)}" if head else ""
    require(most > 0, f"the prompt is {plural(len(head), 'token')}: no room for a text in {unit}")
    message = f"a text must have from 1 to {most} tokens ({unit}{after}), not {n}"
    require(0 < n <= most, message)
    given = " | no prompt" if width else ""
    given = f" | {shown(before)}, {plural(len(head), 'token')}, not scored" if head else given
    return head, ids, n, ("answer and eos" if width else "text") + given


def folder_of(config, subject):
    """The prepared folder config["data"], or else the one the checkpoint was trained on."""
    folder = config["data"] or subject.trained.get("data")
    message = f"{config['ckpt']} does not say what it learnt from; give --data=FOLDER"
    require(folder and isinstance(folder, str), message)
    message = f"{config['ckpt']} learnt from {folder}, which is not here; --data= says where it is"
    require(config["data"] or Path(folder, "meta.json").is_file(), message)
    return folder


def open_text(config, subject, folder, split):
    """(meta, HeldOut, block size) of a split of a prepared folder; UserError if it does not fit."""
    splits, ckpt = loader.read_meta(folder)["splits"], config["ckpt"]
    choices = f"choose --split={' or --split='.join(splits)}"
    require(split in splits, f"{folder} has no split '{split}'; {choices}")
    tokens = loader.Tokens(folder, split)
    most, V = subject.model.block_size, subject.model.vocab_size
    L, width = config["block_size"] or most, examples.layout(folder, tokens.meta)[0]
    if width:
        refuse_typed(config, ["block_size", "protocol"], "is for text; these are examples")
    require(most >= L, f"block_size must be at most the model's {most}, not {L}")
    known, meta = subject.trained["tokenizer"], tokens.meta["tokenizer"]
    new = lacks(known or meta, meta)
    advice = f"take {new!r} out of the text, then " if new else ""
    advice += f"prepare it with --tokenizer={ckpt}"
    if Path(folder, "old_1").is_dir():
        advice += f"; the data that were there before are in {folder}/old_*"
    require(known in (None, meta), f"{folder} has another tokenizer than {ckpt}; {advice}")
    message = f"{folder} has a vocabulary of {tokens.vocab_size}, {ckpt} one of {V}"
    require(tokens.vocab_size == V, f"{message}; {advice}")
    require(width <= most, f"{folder} has examples of {width} tokens, {ckpt} reads {most}")
    loader.fits(tokens, width or L)
    if loader.is_replaced(folder, subject.trained):
        warning = "it may have learnt from the very text that it is asked about now"
        print(f"{folder} was prepared anew since {ckpt} learnt from it: {warning}")
    ends = {"whole": len(tokens), "radd": len(tokens) // L * L}
    end = choose("protocol", config["protocol"], ends)
    message = f"{folder} {split} has {plural(len(tokens), 'token')}, no whole block of {L}"
    require(width or end, f"{message}; try --protocol=whole")
    network = subject.causal, subject.model.start_id
    part = examples.held_out(folder, split, L, config["sequences"], network, end)
    return tokens.meta, part, L


def coverage(result, split, meta, protocol):
    """The data behind a result, in words."""
    counts, width = meta["splits"][split], meta.get("width")
    tokens, documents = (plural(counts[f"{noun}s"], noun) for noun in ("token", "document"))
    unit = plural(result["sequences"], "answer" if width else "block")
    block = result["block_size"]
    unit += f" in examples of {width}, given their prompts" if width else f" of {block}"
    rest = ", the rest left out" if protocol == "radd" and not width else ""
    return f"{result['data']} {split}: {result['tokens']:,} of {tokens}, {documents}, {unit}{rest}"


def with_remarks(meta, text):
    """The text of a report, with remarks about the data."""
    before = f"text: {meta['protocol']}\n" if "protocol" in meta else ""
    after = " (a token is a character)" if meta["tokenizer"]["kind"] == "char" else ""
    return before + text + after
