"""Judging: how many nats a model needs for text that it has not seen.

    python evaluate.py --ckpt=out/pydocs --data=data/pydocs                       one text
    python evaluate.py --ckpt=out/pydocs --precision=0.002 --draws=256            until the estimate is as sharp as that
    python evaluate.py --ckpt=JingyangOu/radd-t-dce --zeroshot=all                 zero-shot perplexity on RADD's five sets

For a masked diffusion model the number is a bound, estimated by one of likelihood.py's estimators; for a causal network it
is the exact negative log-likelihood. Two errors are printed, and they are of two questions. The draws: how far would the
estimate for this text move with other draws? More draws make it smaller, and it is what --precision is about. The text: how
far would it move with other text of the same kind? Sequences are the unit, since tokens of one sequence share a draw.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch

import batch
import checkpoint
import config as settings
import diffusion
import harness
import likelihood
from config import UserError, choose, require
from data import loader, rows
from data.tokenizer import from_meta

DEFAULTS = {
    "ckpt": "out/pydocs",  # whatever checkpoint.load takes
    "data": "data/pydocs",  # a prepared folder
    "split": "val",  # the part of the folder that is judged
    "zeroshot": "",  # in place of data: all, or a list such as lambada,ptb (python -m data.zeroshot.prepare makes them)
    "out": "out/zeroshot.jsonl",  # where a zero-shot table keeps the sets that are done, to go on from there
    "estimator": "any_order",  # any_order | lambda_dce | t_dce | t_dse | chain | orders | left_to_right | right_to_left
    "draws": 16,  # of the corruption, or of an order, for each sequence; the most of them where precision is given
    "strata": 4,  # draws that are stratified together (1: independent ones); for `orders` the K orders of one bound
    "precision": 0.0,  # draw until the estimate is within +- this many nats per token, with 95% confidence; 0: all draws
    "sequences": 0,  # how many blocks, evenly spaced over the split; 0: all
    "block_size": 0,  # tokens in a block; 0: the model's block_size
    "protocol": "whole",  # whole (the last, shorter block counts too) | radd (it is left out, as RADD's code does)
    "batch_size": 32,  # rows in one network call
    "ema": True,  # use the averaged weights where the checkpoint has them
}

ZERO_SHOT = ["lambada", "wikitext2", "ptb", "wikitext103", "lm1b"]


# ---- One text --------------------------------------------------------------------------------------------------------


def check(config):
    """Raises UserError for settings that no evaluation has."""
    choose("estimator", config["estimator"], [name for name in likelihood.ESTIMATORS if name != "ar"])
    choose("schedule", config["schedule"], diffusion.SCHEDULES)
    choose("protocol", config["protocol"], ["whole", "radd"])
    settings.at_least(1, config, "draws", "strata", "batch_size")
    whole = config["estimator"] != "orders" or config["draws"] % config["strata"] == 0
    require(whole, f"orders takes whole sets: draws {config['draws']} must be a multiple of strata {config['strata']}")
    settings.at_least(0, config, "sequences", "block_size", "precision")


def open_text(config, folder, split, model, trained):
    """(tokens, first positions of the blocks, L) of a prepared folder; UserError where it does not fit the model."""
    tokens = loader.Tokens(folder, split)
    L = config["block_size"] or model.block_size
    require(model.block_size >= L, f"block_size must be at most the model's {model.block_size}, not {L}")
    fits = tokens.vocab_size == model.vocab_size
    require(fits, f"{folder} has a vocabulary of {tokens.vocab_size}, {config['ckpt']} one of {model.vocab_size}")
    known = trained["tokenizer"]
    same = not known or known["kind"] != "char" or known == tokens.meta["tokenizer"]
    require(same, f"{folder} has another alphabet than {config['ckpt']}")
    width = rows.layout(folder, tokens.meta)[0]
    require(width <= model.block_size, f"{folder} has rows of {width} tokens, {config['ckpt']} reads {model.block_size}")
    loader.fits(tokens, width or L)
    end = len(tokens) if config["protocol"] == "whole" else len(tokens) // L * L
    require(end, f"{folder} {split} has {len(tokens)} tokens, no whole block of {L}; try --protocol=whole")
    return tokens, likelihood.spread(range(0, end, L), config["sequences"]), L


def judge(config, model, trained, folder, split, autocast):
    """Judges one split of a prepared folder: prints what was done and what came out; returns the result, a dict."""
    tokens, starts, L = open_text(config, folder, split, model, trained)
    width, causal, counts = rows.layout(folder, tokens.meta)[0], trained["causal"], tokens.meta["splits"][split]
    if width:  # prompts and answers: the bound of each answer, given its prompt
        skip = int(causal and from_meta(tokens.meta["tokenizer"]).bos == model.start_id)
        blocks, lengths, size = batch.held_out(folder, tokens.meta, split, L, config["sequences"], causal, skip)
    else:
        blocks = [tokens[start : start + L] for start in starts]
        lengths, size = [len(block) for block in blocks], counts["bytes"] / counts["tokens"]
    estimator = "ar" if causal else config["estimator"]
    keys = ("draws", "strata", "precision", "schedule", "seed", "batch_size")
    how = {key: config[key] for key in keys} | {"autocast": autocast, "progress": True}
    nats, info = likelihood.estimate(model, blocks, estimator, lengths=lengths, **how)

    result, text = likelihood.report(nats, lengths, size)
    result |= info | {"estimator": estimator, "block_size": L, "data": str(folder)}
    print(
        f"{folder} {split}: {result['tokens']} of {counts['tokens']} tokens, {counts['documents']} documents, "
        f"{len(blocks)} {f'answers in rows of {width}, given their prompts' if width else f'blocks of {L}'}"
        f"{', the rest left out' * (config['protocol'] == 'radd')}; "
        f"{method(estimator, result, config['strata'])}; {settings.dtype_name(autocast, next(model.parameters()).device)}, "
        f"{'averaged' if config['ema'] and trained.get('ema') else 'raw'} weights, seed {config['seed']}"
    )
    if "protocol" in tokens.meta:
        print(f"text: {tokens.meta['protocol']}")
    print(text + (" (a token is a character)" if tokens.meta["tokenizer"]["kind"] == "char" else ""))
    print(certainty(result, config["precision"], config["draws"], config["strata"]))
    return result


def method(estimator, result, strata):
    """How a number came about, in words."""
    if estimator == "ar":
        return "exact"
    if estimator in likelihood.ORDERS:
        return f"exact along the order {estimator}"
    return f"upper bound by {estimator}, {result['draws']} draws a sequence in sets of {strata}"


def certainty(result, precision, most, strata):
    """The error of the draws, what it cost, and, where it is wider than asked for, how many draws would do."""
    error, half, draws = result["draw_error"], result["draw_half"], result["draws"]
    cost = f"{result['rows']:,} rows of the network in {result['calls']:,} calls, {result['seconds']:.1f} s"
    if error == 0:
        return f"no draws: for this text the number has no error; {cost}"
    if not math.isfinite(half):
        return f"one set of {draws} draws does not show their error: give --draws={2 * strata} or more; {cost}"
    text = f"the draws alone, on this text: standard error {error:.4f}, +- {half:.4f} nats per token (95%); {cost}"
    if half < precision:
        return f"{text}; within +- {precision} after {draws} draws a sequence, {most} being allowed"
    if precision:
        need = math.ceil(draws * (half / precision) ** 2 / strata) * strata
        return f"{text}; not within +- {precision}: about {need} draws a sequence would be (--draws={need})"
    return text


# ---- Zero-shot perplexity: a table over many texts, one after the other ----------------------------------------------


def zero_shot(config, model, trained, autocast):
    """Judges the sets of config["zeroshot"], leaves out those that `out` has already, prints a table; returns its rows."""
    names = ZERO_SHOT if config["zeroshot"] == "all" else [name.strip() for name in config["zeroshot"].split(",")]
    for name in names:
        choose("zeroshot", name, ZERO_SHOT)
        folder = Path("data/zeroshot", name)
        made = f"prepare it with: python -m data.zeroshot.prepare --set={name}"
        require((folder / "meta.json").is_file(), f"no prepared data in {folder}; {made}")
        open_text(config, folder, "test", model, trained)  # says what does not fit before anything is judged
    keep(config["out"], finished(config["out"]))  # so that a file that cannot be read or written costs no time
    weights, rows = digest(model), []
    for name in names:
        folder = Path("data/zeroshot", name)
        identity = identify(config, folder, weights, settings.dtype_name(autocast, next(model.parameters()).device))
        result = finished(config["out"]).get(identity)
        if result:
            print(f"{folder}: already in {config['out']}")
        else:
            result = judge(config, model, trained, folder, "test", autocast)
            keep(config["out"], finished(config["out"]) | {identity: result})
        rows.append({"set": name} | result)
    print(table(rows))
    return rows


def digest(model):
    """A short hash of the network and all its weights: a checkpoint may change under its name."""
    hashed = hashlib.blake2b(repr(sorted(model.config.items())).encode(), digest_size=8)
    for name, w in sorted(model.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(w.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def identify(config, folder, weights, precision_of_products):
    """All that a result depends on, as one line of JSON."""
    keys = ["estimator", "draws", "strata", "precision", "schedule", "seed", "sequences", "block_size", "protocol"]
    facts = {key: config[key] for key in keys} | {"dtype": precision_of_products, "weights": weights}
    return json.dumps({"folder": str(folder), "text": loader.read_meta(folder)} | facts, sort_keys=True)


def finished(path):
    """{identity: result} of the file `path`, a line each; empty where there is none. UserError for another kind of file."""
    results = {}
    try:
        text = Path(path).read_text(encoding="utf8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', 'it is no text')}") from None
    for i, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            results[json.dumps(entry["identity"], sort_keys=True)] = entry["result"] | {}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} line {i} is no result of a zero-shot table; give another --out=FILE") from None
    return results


def keep(path, results):
    """Writes the results to the file, which is whole at any time."""
    with settings.whole_file(path) as temporary, open(temporary, "w", encoding="utf8") as file:
        for identity, result in results.items():
            file.write(json.dumps({"identity": json.loads(identity), "result": result}) + "\n")


def table(rows):
    """The perplexities as text. +- is half a 95% interval: of the draws, for this text; and of draws and text."""
    lines = [f"{'set':12} {'tokens':>9} {'nats/token':>10} {'perplexity':>10} {'+- draws':>9} {'+- text':>9}  estimator"]
    for row in rows:
        ppl, mean = row["perplexity"], row["nats_per_token"]
        halves = (row["draw_half"], row["interval"][1] - mean)
        draws, text = (ppl * math.expm1(half) if mean + half < 700 else math.inf for half in halves)
        how = f"{row['estimator']}, {row['draws']} draws" if row["draw_error"] else row["estimator"]
        lines.append(f"{row['set']:12} {row['tokens']:9,} {mean:10.4f} {ppl:10.2f} {draws:9.2f} {text:9.2f}  {how}")
    return "\n".join(lines)


# ---- The command -----------------------------------------------------------------------------------------------------


def main(config):
    """Evaluates config["ckpt"] on config["data"], or on the zero-shot sets; returns the result, or a list of them."""
    check(config)
    device, autocast = settings.machine(config)
    model, text, trained = checkpoint.load(config["ckpt"], device, ema=config["ema"])
    fits = config["estimator"] != "t_dse" or trained.get("objective") == "t_dse"
    require(fits, f"{config['ckpt']} was not trained with t_dse, so its scores have no scale; use --estimator=t_dce")
    if config["lm_eval"]:
        return harness.main(config, model, text, trained, autocast)
    if config["zeroshot"]:
        return zero_shot(config, model, trained, autocast)
    result = judge(config, model, trained, config["data"], config["split"], autocast)
    meta = loader.read_meta(config["data"])
    text = (
        config["split"] == "val" and {"train", "val"} <= meta["splits"].keys() and not rows.layout(config["data"], meta)[0]
    )
    counted = loader.ngram_nats(config["data"]) if text else {}
    if counted:
        rest = ", ".join(f"{name} {value:.4f}" for name, value in counted.items())
        print(f"counting alone, for comparison (Witten-Bell n-grams of the training text): {rest} nats per token")
    return result | {"ngram_nats": counted}


if __name__ == "__main__":
    settings.run(main, settings, diffusion, harness, sys.modules[__name__])
