"""Judging by questions: how often is the right option the likeliest?

    python choice.py --ckpt=CKPT --set=hellaswag --from=FOLDER --limit=200
    python choice.py --ckpt=CKPT --set=openbookqa --from=FOLDER --estimator=left_to_right --cfg=1.6
    python choice.py --ckpt=CKPT --set=plain --from=mine.jsonl        lines {"context": ..., "options": [...], "gold": 0}

An option costs -log p(option | context) nats, by one of likelihood.py's estimators; the cheapest is the answer. All options
of a question are estimated with the same random numbers: where they are alike, most of the noise cancels
(experiments/common_draws.py measures it). Rows of all questions share full calls. data/choice.py words the questions.

Two accuracies are printed: by the nats of an option, and by its nats per byte, the space before it not counted. These are
lm-evaluation-harness's acc and acc_bytes; its acc_norm divides by characters, which is the same where all are ASCII.

Context and option are tokenized as one text, which is then cut where the context's own tokens end; spaces at the end of a
context go to the option (both as the harness does). Text that a block does not hold loses the beginning of its context and,
if the option alone is too long, the end of the option, which then costs too little: the number of these is printed.

LAMBADA asks for a passage's last word: it counts as right if greedy decoding, one token a call and the surest first (left
to right for a causal network), gives exactly its tokens (SMDM, arXiv 2410.18514). Its nats are also given as a perplexity.

SMDM's published settings: left_to_right with w = 1.1 for lambada, 1.6 for openbookqa and boolq, 0.6 for piqa; lambda_dce,
1,024 draws, with w = 0.6 for arc_easy and social_iqa, 0.7 for race and hellaswag.
"""

import json
import math
import sys
import time

import numpy as np
import torch

import checkpoint
import config as settings
import diffusion
import likelihood
import sample
from config import choose, require
from data import choice as sets
from data import rows
from data.tokenizer import from_meta

DEFAULTS = {
    "ckpt": "out/pydocs",  # whatever checkpoint.load takes
    "set": "hellaswag",  # or arc_challenge arc_easy boolq lambada openbookqa piqa race sciq social_iqa winogrande plain
    "from": "",  # the file of the set, .jsonl, .jsonl.gz or .jsonl.xz, or a folder that has it as SET*.jsonl*
    "limit": 0,  # only the first so many questions, as lm-evaluation-harness limits; 0: all
    "estimator": "any_order",  # as in evaluate.py; SMDM's Monte Carlo is lambda_dce, its chain rule left_to_right
    "draws": 128,  # for each option, stratified
    "cfg": 0.0,  # guidance by the context: logits u + (1 + w)(c - u), u without it; 0: off
    "pad_to": 0,  # fill rows up to this many tokens with masks, as a model may expect that saw one length only; 0: off
    "batch_size": 32,  # rows in one network call
    "ema": True,  # use the averaged weights where the checkpoint has them
    "out": "",  # also write each question's nats and answers to this .jsonl file
}


# ---- Text to requests ------------------------------------------------------------------------------------------------


def request(text, start_id, where, context, option):
    """(prompt ids, answer ids) of one option: one tokenization of both, cut where the tokens of the context alone end.

    A causal network reads its start_id before the first token; where that is the tokenizer's bos, it is not given twice.
    """

    def encode(piece):
        ids = rows.encode(text, where, piece)
        return ids[1:] if text.bos is not None and text.bos == start_id else ids

    both = encode(context + option)
    border = min(len(encode(context.rstrip())), len(both) - 1)  # an option is one token at least
    return both[:border], both[border:]


def fit(prompt, answer, block_size):
    """What a block holds of the two: the answer's beginning, and the prompt's end."""
    answer = answer[:block_size]
    return prompt[max(0, len(prompt) + len(answer) - block_size) :], answer


def requests_of(questions, text, start_id, block_size):
    """(requests, groups (N,), texts that were cut, options that were cut) of all options of all questions."""
    found, groups = [], []
    for number, question in enumerate(questions):
        for context, option in zip(question.contexts, question.options, strict=True):
            found.append(request(text, start_id, question.where, context, option))
            groups.append(number)
    long = sum(len(prompt) + len(answer) > block_size for prompt, answer in found)
    longer = sum(len(answer) > block_size for _, answer in found)
    return [fit(*pair, block_size) for pair in found], groups, long, longer


# ---- Answers ---------------------------------------------------------------------------------------------------------


def answers(nats, questions):
    """The cheapest option of each question, by nats and by nats per byte of its text: nats (N,) -> two (n,) arrays."""
    costs = np.split(np.asarray(nats), np.cumsum([len(question.options) for question in questions])[:-1])
    n_bytes = [[len(option.removeprefix(" ").encode()) for option in question.options] for question in questions]
    plain = [cost.argmin() for cost in costs]
    return np.array(plain), np.array([(cost / n).argmin() for cost, n in zip(costs, n_bytes, strict=True)])


def mean_and_error(values):
    """The mean and its standard error; infinite for one value."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def decoded(model, requests, causal, cfg=0.0, batch_size=32, **how):
    """Does greedy decoding, one token a call and the surest first, give exactly the answer? -> (N,) bool"""
    right = np.zeros(len(requests), bool)
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in requests])  # (N,)
    for W in np.unique(lengths):
        members = np.flatnonzero(lengths == W)
        x0 = torch.tensor([[*requests[i][0], *requests[i][1]] for i in members])  # (n, W)
        prompt = torch.tensor([len(requests[i][0]) for i in members])  # (n,)
        x = torch.where(torch.arange(W) < prompt[:, None], x0, model.mask_id)  # (n, W)
        x = x.to(next(model.parameters()).device)
        if causal:
            tokens, _ = sample.sample_ar(model, x, temperature=0, batch_size=batch_size, **how)
        else:
            tokens, _ = sample.sample(model, x, "confidence", int(W), temperature=0, cfg=cfg, batch_size=batch_size, **how)
        right[members] = (tokens.cpu() == x0).all(1).numpy()
    return right


# ---- The command -----------------------------------------------------------------------------------------------------


def load(ckpt, device, ema=True):
    """checkpoint.load for a model that is asked in text: (model, tokenizer, config)."""
    model, text, trained = checkpoint.load(ckpt, device, ema=ema)
    require(trained["tokenizer"], f"{ckpt} names no tokenizer, so questions cannot be read")
    return model, text or from_meta(trained["tokenizer"]), trained  # says what it lacks, where it could not be built


def check(config):
    """Raises UserError for settings that no model can be judged with."""
    choose("set", config["set"], list(sets.READERS))
    choose("estimator", config["estimator"], [name for name in likelihood.ESTIMATORS if name != "ar"])
    choose("schedule", config["schedule"], diffusion.SCHEDULES)
    settings.at_least(1, config, "draws", "batch_size")
    settings.at_least(0, config, "limit", "pad_to")
    require(config["from"], "say where the questions are: --from=FILE or --from=FOLDER")


def main(config):
    """Asks config["ckpt"] the questions of config["set"], prints how and the accuracy; returns the result, a dict."""
    check(config)
    questions, path = sets.read(config["set"], config["from"], config["limit"])
    device, autocast = settings.machine(config)
    model, text, trained = load(config["ckpt"], device, config["ema"])
    causal = trained["causal"]
    for key in ("cfg", "pad_to"):
        require(not causal or not config[key], f"{key} needs a masked diffusion model; this network is causal")
    require(config["pad_to"] <= model.block_size, f"pad_to must be at most the block's {model.block_size} tokens")

    began, estimator = time.time(), "ar" if causal else config["estimator"]
    requests, groups, long, longer = requests_of(questions, text, model.start_id, model.block_size)
    how = {key: config[key] for key in ("draws", "schedule", "cfg", "seed", "pad_to", "batch_size")}
    how |= {"groups": groups, "autocast": autocast, "progress": True}
    nats = likelihood.answer_nats(model, requests, estimator, **how).numpy()  # (N,)
    picks = answers(nats, questions)  # (n,) twice
    gold = np.array([question.gold for question in questions])  # (n,)
    result = {"set": config["set"], "questions": len(questions), "estimator": estimator, "cfg": config["cfg"]}
    result |= {"texts": len(requests), "texts_cut": long, "options_cut": longer}
    if config["set"] == "lambada":
        right = decoded(model, requests, causal, config["cfg"], config["batch_size"], autocast=autocast)  # (n,)
        result["nats_per_word"], result["nats_error"] = mean_and_error(nats)
    else:
        right = picks[0] == gold  # (n,)
        result["accuracy_per_byte"], result["error_per_byte"] = mean_and_error(picks[1] == gold)
        result["chance"] = float(np.mean([1 / len(question.options) for question in questions]))
    result["accuracy"], result["error"] = mean_and_error(right)
    result["seconds"] = time.time() - began

    used = "averaged" if config["ema"] and trained.get("ema") else "raw"
    print(protocol(config, result, path, model.block_size, f"{settings.dtype_name(autocast, device)}, {used} weights"))
    print(summary(result))
    if config["out"]:
        keep(config["out"], questions, nats, picks, right)
    return result


def protocol(config, result, path, block_size, used):
    """What was asked, and how it was judged, in words."""
    n, name, estimator = result["questions"], config["set"], result["estimator"]
    part = f"the first {n:,}" if n == config["limit"] else f"all {n:,}"
    how = f"upper bound by {estimator}, {config['draws']} draws an option, the same for all options of a question"
    how = f"exact along the order {estimator}" if estimator in likelihood.ORDERS else "exact" if estimator == "ar" else how
    padding = f"rows padded with masks to {config['pad_to']} tokens; " if config["pad_to"] else ""
    return (
        f"{name}: {part} questions of {path}; no examples, context {sets.FORMATS[name]!r}, then the option"
        f"{'' if name == 'plain' else ' behind a space'}; block of {block_size} tokens: the beginning of the context cut in "
        f"{result['texts_cut']} of {result['texts']} texts, the end of the option in {result['options_cut']}\n"
        f"-log p(option | context): {how}; w = {config['cfg']}; {padding}{used}, seed {config['seed']}; "
        f"{result['seconds']:.1f} s"
    )


def summary(result):
    """What came out, with standard errors: how far it would move with other questions of the same kind."""
    right = f"{result['accuracy']:.4f} +- {result['error']:.4f}"
    if "nats_per_word" in result:
        mean, error = result["nats_per_word"], result["nats_error"]
        perplexity = math.exp(mean) if mean < 700 else math.inf
        word = f"{mean:.4f} +- {error:.4f} nats a last word, perplexity {perplexity:.2f}"
        return f"last word right by greedy decoding {right} (standard error); {word}"
    per_byte = f"{result['accuracy_per_byte']:.4f} +- {result['error_per_byte']:.4f}"
    return f"accuracy {right} (standard error); by nats per byte of the option {per_byte}; by chance {result['chance']:.4f}"


def keep(path, questions, nats, picks, right):
    """Writes a line for each question: where it stands, nats of its options, the answers, the right one."""
    place = 0
    with settings.whole_file(path) as temporary, open(temporary, "w", encoding="utf8") as file:
        for question, plain, per_byte, good in zip(questions, *map(np.ndarray.tolist, (*picks, right)), strict=True):
            cost = nats[place : place + len(question.options)].tolist()
            place += len(question.options)
            record = {"question": question.where, "nats": cost, "answer": plain, "answer_per_byte": per_byte}
            file.write(json.dumps(record | {"gold": question.gold, "right": good}) + "\n")


if __name__ == "__main__":
    settings.run(main, settings, diffusion, sys.modules[__name__])
