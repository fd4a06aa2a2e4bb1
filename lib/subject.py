"""A checkpoint that is asked something: its network, its tokenizer, and how it computes."""

from typing import NamedTuple

import torch

from config import require
from data import examples, loader
from data.tokenizer import from_meta
from lib import checkpoint
from lib.device import dtype_name, machine


class Subject(NamedTuple):
    """Who is asked."""

    model: torch.nn.Module
    tokenizer: object  # None where its package is missing
    trained: dict  # the config it was trained with
    autocast: object  # `with autocast():` has the dtype of matrix products
    words: str  # how it computes

    @property
    def causal(self):
        return self.trained["attention"] == "causal"


def opened(config, reads_text=False):
    """The Subject that config["ckpt"] names; reads_text: UserError where it has no tokenizer."""
    (device, autocast), ckpt = machine(config), config["ckpt"]
    model, tokenizer, trained = checkpoint.load(ckpt, device, ema=config["ema"])
    require(
        config["estimator"] != "t_dse" or trained.get("objective") == "t_dse",
        f"{ckpt} was not trained with t_dse, so its scores have no scale; use --estimator=t_dce",
    )
    if reads_text:
        require(trained["tokenizer"], f"{ckpt} names no tokenizer, so it cannot read text")
        tokenizer = tokenizer or from_meta(trained["tokenizer"])  # says which package it lacks
    weights = "averaged weights" if config["ema"] and trained.get("ema") else "raw weights"
    words = f"{dtype_name(autocast, device)}, {weights}, seed {config['seed']}"
    return Subject(model, tokenizer, trained, autocast, words)


def open_text(config, subject, folder, split):
    """(Tokens, first positions of the blocks, L) of a folder; UserError if it does not fit."""
    tokens, ckpt = loader.Tokens(folder, split), config["ckpt"]
    most, V = subject.model.block_size, subject.model.vocab_size
    L, width = config["block_size"] or most, examples.layout(folder, tokens.meta)[0]
    require(most >= L, f"block_size must be at most the model's {most}, not {L}")
    has = f"{folder} has a vocabulary of {tokens.vocab_size}"
    require(tokens.vocab_size == V, f"{has}, {ckpt} one of {V}")
    known = subject.trained["tokenizer"]
    alphabet_fits = not known or known["kind"] != "char" or known == tokens.meta["tokenizer"]
    require(alphabet_fits, f"{folder} has another alphabet than {ckpt}")
    require(width <= most, f"{folder} has examples of {width} tokens, {ckpt} reads {most}")
    loader.fits(tokens, width or L)
    end = len(tokens) if config["protocol"] == "whole" else len(tokens) // L * L
    short = f"{folder} {split} has {len(tokens)} tokens, no whole block of {L}"
    require(end, f"{short}; try --protocol=whole")
    return tokens, loader.spread(range(0, end, L), config["sequences"]), L
