"""Judging: how many nats a model needs for text that it has not seen.

    python evaluate.py --ckpt=out/pydocs --data=data/pydocs

For a masked diffusion model the number is the bound of diffusion.py, estimated with stratified draws of the corruption;
for a causal network it is the exact negative log-likelihood. The interval says how far it would move with other draws
and with other text of the same kind: sequences are the unit, since tokens of one sequence share a draw.
"""

import contextlib
import math
import sys

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import config as settings
import diffusion
from config import choose, require
from data import loader

DEFAULTS = {
    "ckpt": "out/pydocs",  # whatever checkpoint.load takes
    "data": "data/pydocs",  # a prepared folder
    "split": "val",  # the part of the folder that is judged
    "estimator": "any_order",  # any_order | lambda_dce | t_dce | t_dse; a causal network is always judged exactly
    "draws": 16,  # draws of the corruption for each sequence, stratified
    "sequences": 0,  # how many blocks, evenly spaced over the split; 0: all
    "block_size": 0,  # tokens in a block; 0: the model's block_size
    "batch_size": 32,  # rows in one network call
    "ema": True,  # use the averaged weights where the checkpoint has them
}


@torch.no_grad()
def sequence_nats(
    model,
    blocks,
    estimator="any_order",
    draws=16,
    schedule="loglinear",
    seed=0,
    batch_size=32,
    autocast=contextlib.nullcontext,
    progress=False,
    places=None,
):
    """Nats of each block, the mean over its draws: blocks, a list of S int64 arrays -> (S,) float64.

    A block's number is a pure function of (seed, its place: `places` (S,), or that in the list).
    estimator "ar": exact, one call a row.
    """
    device = next(model.parameters()).device
    draws = 1 if estimator == "ar" else draws
    places = torch.arange(len(blocks)) if places is None else torch.as_tensor(places)  # (S,)
    nats = torch.zeros(len(blocks), draws, dtype=torch.float64)
    with tqdm(total=len(blocks) * draws, disable=not progress, desc="evaluating", unit="row", leave=False) as bar:
        for item in chunks([len(block) for block in blocks], draws, batch_size):
            x0 = torch.from_numpy(np.stack([blocks[i // draws] for i in item]))  # (b, L)
            item = torch.from_numpy(item)  # (b,)
            number = places[item // draws] * draws + item % draws  # (b,)
            with autocast():
                if estimator == "ar":
                    _, found = diffusion.ar_nll(model, x0.to(device))  # (b,)
                else:
                    mask, weight = mask_of_draw(estimator, seed, number, draws, x0.shape[1], schedule)
                    rows = diffusion.hidden_rows(mask).to(device)
                    arguments = (x0.to(device), mask.to(device), weight.float().to(device), rows)
                    _, found = diffusion.nelbo(model, *arguments, normalised=estimator != "t_dse")  # (b,)
            nats.view(-1)[item] = found.double().cpu()
            bar.update(len(item))
    return nats.mean(1)


def chunks(lengths, draws, batch_size):
    """Numbers i of (block i // draws, draw i % draws), in arrays of at most batch_size with blocks of one length."""
    lengths = np.repeat(lengths, draws)
    for length in np.unique(lengths):
        items = np.flatnonzero(lengths == length)
        yield from np.split(items, range(batch_size, len(items), batch_size))


def mask_of_draw(estimator, seed, item, draws, L, schedule):
    """draw_mask for item = sequence * draws + draw, stratified over the draws of each sequence: (b, L), (b,)."""
    draw = item % draws  # (b,)
    jitter = diffusion.uniforms(seed, 1, item - draw + draw // 2, 1).squeeze(1)  # (b,) one for both of a pair
    u = diffusion.stratified(jitter, draw, draws)  # (b,)
    return diffusion.draw_mask(estimator, u, diffusion.uniforms(seed, 0, item, L), diffusion.SCHEDULES[schedule])


def mean_and_error(nats, lengths):
    """Nats per token and its standard error, clustered by sequence: nats, lengths (S,) -> two floats.

    The ratio estimator sum(nats) / sum(lengths) and the usual linearisation of its error; infinite for one sequence.
    """
    nats, lengths = np.asarray(nats, float), np.asarray(lengths, float)
    mean = nats.sum() / lengths.sum()
    S = len(nats)
    residual = nats - mean * lengths  # (S,)
    error = math.sqrt((residual**2).sum() * S / (S - 1)) / lengths.sum() if S > 1 else math.inf
    return float(mean), error


def spread(blocks, n):
    """n of the blocks, evenly spaced; all of them for n = 0."""
    if not n or n >= len(blocks):
        return blocks
    return [blocks[i * len(blocks) // n] for i in range(n)]


def report(nats, lengths, bytes_per_token):
    """The result as a dict and as text; 95% intervals are mean +- 1.96 standard errors."""
    mean, error = mean_and_error(nats, lengths)
    half = 1.96 * error
    result = {"nats_per_token": mean, "standard_error": error, "interval": [mean - half, mean + half]}
    result |= {"perplexity": math.exp(mean) if mean < 700 else math.inf, "bits_per_token": mean / math.log(2)}
    result |= {"bits_per_byte": mean / math.log(2) / bytes_per_token, "tokens": int(sum(lengths)), "sequences": len(nats)}
    bit = math.log(2)
    text = (
        f"{mean:.4f} +- {half:.4f} nats per token (95% interval) = {mean / bit:.4f} +- {half / bit:.4f} bits per token"
        f" = {result['bits_per_byte']:.4f} +- {half / bit / bytes_per_token:.4f} bits per byte; "
        f"perplexity {result['perplexity']:.2f}"
    )
    return result, text


def main(config):
    """Evaluates config["ckpt"] on config["data"], prints the protocol and the result; returns the result as a dict."""
    choose("estimator", config["estimator"], [name for name in diffusion.OBJECTIVES if name != "ar"])
    choose("schedule", config["schedule"], diffusion.SCHEDULES)
    settings.at_least(1, config, "draws", "batch_size")
    settings.at_least(0, config, "sequences", "block_size")
    device, autocast = settings.machine(config)
    model, _, trained = checkpoint.load(config["ckpt"], device, ema=config["ema"])
    tokens = loader.Tokens(config["data"], config["split"])
    L = config["block_size"] or model.block_size
    require(model.block_size >= L, f"block_size must be at most the model's {model.block_size}, not {L}")
    fits = tokens.vocab_size == model.vocab_size
    require(fits, f"{config['data']} has a vocabulary of {tokens.vocab_size}, {config['ckpt']} one of {model.vocab_size}")

    known = trained["tokenizer"]
    require(
        not known or known["kind"] != "char" or known == tokens.meta["tokenizer"],
        f"{config['data']} has another alphabet than {config['ckpt']}",
    )
    blocks = spread(list(loader.in_order(tokens, L)), config["sequences"])
    estimator = "ar" if trained["causal"] else config["estimator"]
    keys = ("draws", "schedule", "seed", "batch_size")
    nats = sequence_nats(model, blocks, estimator, autocast=autocast, progress=True, **{key: config[key] for key in keys})

    split = tokens.meta["splits"][config["split"]]
    result, text = report(nats, [len(block) for block in blocks], split["bytes"] / split["tokens"])
    result |= {"estimator": estimator, "draws": config["draws"], "block_size": L, "data": str(config["data"])}
    how = "exact" if estimator == "ar" else f"upper bound by {estimator}, {config['draws']} stratified draws a sequence"
    with autocast():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    print(
        f"{config['data']} {config['split']}: {result['tokens']} of {split['tokens']} tokens, {split['documents']} "
        f"documents, {len(blocks)} blocks of {L}; {how}; {str(dtype).removeprefix('torch.')}, "
        f"{'averaged' if config['ema'] and trained.get('ema') else 'raw'} weights, seed {config['seed']}"
    )
    print(text + (" (a token is a character)" if tokens.meta["tokenizer"]["kind"] == "char" else ""))
    counted = loader.ngram_nats(config["data"]) if {"train", "val"} <= tokens.meta["splits"].keys() else {}
    if counted:
        rest = ", ".join(f"{name} {value:.4f}" for name, value in counted.items())
        print(f"counting alone, for comparison (Witten-Bell n-grams of the training text): {rest} nats per token")
    return result | {"ngram_nats": counted}


if __name__ == "__main__":
    settings.run(main, settings, diffusion, sys.modules[__name__])
