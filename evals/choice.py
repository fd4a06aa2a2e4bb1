"""Multiple choice: how often is the right option the likeliest?

    python -m evals.choice --ckpt=CKPT --set=hellaswag --from=FOLDER --limit=200
    python -m evals.choice --ckpt=CKPT --set=boolq --from=FOLDER --estimator=left_to_right
    python -m evals.choice --ckpt=CKPT --set=plain --from=mine.jsonl
        of lines {"context": ..., "options": [...], "gold": 0}

The answer is the option with the fewest nats, -log p(option | context), by one of the estimators of
evaluate.py. All options of a question share their random numbers: where the options are alike, most
of the noise cancels (experiments/common_draws.py measures it). Options of different questions are
batched into full network calls. data/choice.py words the questions.

Two accuracies are printed: by the nats of an option, and by its nats per byte, not counting the
space before it. These are lm-evaluation-harness's acc and acc_bytes; its acc_norm divides by
characters, which is the same for ASCII.

Context and option are tokenized as one text, which is then split where the context's own tokens
end; spaces at the end of a context go to the option (both as in the harness). A text longer than a
block loses the beginning of its context and, if the option alone is too long, the end of the
option, which then has too few nats; the number of such cuts is printed.

LAMBADA asks for a passage's last word, which counts as right if greedy decoding, one token per call
by confidence (left to right for a causal network), gives exactly its tokens (SMDM, arXiv
2410.18514). Its nats are also given as a perplexity.

SMDM's published settings: left_to_right with cfg_scale 1.1 for lambada, 1.6 for openbookqa and
boolq, 0.6 for piqa; lambda_dce, 1,024 draws, with 0.6 for arc_easy and social_iqa, 0.7 for race and
hellaswag.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, too
from lib import program  # isort: skip (first, as in train.py)
import time

import numpy as np
import torch

import config as settings
import diffusion
import evaluate
import sample
from config import Part, plural, require
from data import choice as sets
from data import examples
from lib.files import check_ending, to_json, whole_file
from lib.stats import mean_and_error, method, plus_minus, shown_perplexity
from run import subject as subjects

DEFAULTS = {
    "set": "hellaswag",  # one of READERS
    "from": "",  # the set's file (.jsonl, .jsonl.gz, .jsonl.xz), or a folder with one SET*.jsonl*
    "limit": 0,  # only the first `limit` questions, as in lm-evaluation-harness; 0: all
    "draws": 128,  # per option, stratified; in [1, 1e6]
    "pad_to": 0,  # pad rows with masks to this length, for a model that saw only one; 0: off
    "out": "",  # also write each question's nats and answers to this .jsonl file
}
SHARED = Part(evaluate, "estimator", "batch_size"), Part(sample, "cfg_scale")
MODULES = (settings, subjects, diffusion, *SHARED, sys.modules[__name__])  # whose keys it takes

READERS = sets.READERS


# ---- Text to requests ----------------------------------------------------------------------------


def prompt_and_answer(tokenizer, start_id, where, context, option):
    """(prompt ids, answer ids): both tokenized as one text, split where the context's tokens end.

    A causal network reads its start_id before the first token; if that is the tokenizer's bos, it
    is not given twice.
    """

    def encode(piece):
        ids = examples.encode(tokenizer, where, piece)
        return ids[1:] if tokenizer.bos is not None and tokenizer.bos == start_id else ids

    if not option:
        return encode(context), []  # log p of an empty option is 0
    both = encode(context + option)
    border = min(len(encode(context.rstrip())), len(both) - 1)  # an option is at least one token
    return both[:border], both[border:]


def fit(prompt, answer, block_size):
    """Cut both to fit a block: keep the beginning of the answer and the end of the prompt."""
    answer = answer[:block_size]
    return prompt[max(0, len(prompt) + len(answer) - block_size) :], answer


def requests_of(questions, tokenizer, start_id, block_size):
    """(requests, groups (N,), number of texts cut, number of options cut) of all questions."""
    pairs, groups = [], []
    for number, question in enumerate(questions):
        for context, option in zip(question.contexts, question.options, strict=True):
            pairs.append(prompt_and_answer(tokenizer, start_id, question.where, context, option))
            groups.append(number)
    long = sum(len(prompt) + len(answer) > block_size for prompt, answer in pairs)
    longer = sum(len(answer) > block_size for _, answer in pairs)
    return [fit(*pair, block_size) for pair in pairs], groups, long, longer


# ---- Answers -------------------------------------------------------------------------------------


def by_question(nats, questions):
    """nats (N,) of all options -> a list of arrays (options,), one per question."""
    return np.split(np.asarray(nats), np.cumsum([len(q.options) for q in questions])[:-1])


def likeliest(nats, questions):
    """The likeliest option of each question, by nats and by nats per byte: (N,) -> (n,) twice."""
    by_nats, per_byte = [], []
    for part, question in zip(by_question(nats, questions), questions, strict=True):
        n_bytes = [len(option.removeprefix(" ").encode()) for option in question.options]
        by_nats.append(part.argmin())
        per_byte.append((part / n_bytes).argmin())
    return np.array(by_nats), np.array(per_byte)


def decoded(model, requests, **options):
    """Whether greedy decoding, one token per call by confidence, gives the answer: (N,) bool."""
    right = np.zeros(len(requests), bool)
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in requests])  # (N,)
    right[lengths == 0] = True  # nothing can be wrong there
    for W in np.unique(lengths[lengths > 0]).tolist():
        members = np.flatnonzero(lengths == W)
        x0 = torch.tensor([[*requests[i][0], *requests[i][1]] for i in members])  # (n, W)
        prompt = torch.tensor([len(requests[i][0]) for i in members])  # (n,)
        x = torch.where(torch.arange(W) < prompt[:, None], x0, model.mask_id)  # (n, W)
        x = x.to(model.device)
        greedy = {"sampler": subjects.sampler_of(model, "confidence")}
        greedy |= {"steps": W, "temperature": 0}
        tokens, _ = sample.sample(model, x, **greedy, **options)  # (n, W)
        right[members] = (tokens.cpu() == x0).all(1).numpy()
    return right


# ---- The command ---------------------------------------------------------------------------------


def check(config):
    """Raise UserError for settings that are wrong for every set and network."""
    require(config["from"], "say where the questions are: --from=FILE or --from=FOLDER")
    check_ending("out", config["out"], ".jsonl")


def check_network(config, subject, *keys):
    """Raise UserError for settings that do not apply to the network."""
    for key in keys:
        masked_only = f"{key} needs a masked diffusion model; this network is causal"
        require(not subject.causal or not config[key], masked_only)


def main(config):
    """Evaluate config["ckpt"] on config["set"], print how and the result; return it as a dict."""
    check(config)
    questions, path = sets.read(config["set"], config["from"], config["limit"])
    subject = subjects.load_evaluable(config, reads_text=True)
    config = subjects.in_its_order(config, subject, "estimator", evaluate.ESTIMATORS)
    check_network(config, subject, "cfg_scale", "pad_to")
    began, model, L = time.time(), subject.model, subject.model.block_size
    require(config["pad_to"] <= L, f"pad_to must be at most the block's {L} tokens")
    requests, groups, *cut = requests_of(questions, subject.tokenizer, model.start_id, L)
    keys = ("estimator", "draws", "schedule", "seed", "batch_size", "cfg_scale", "pad_to")
    options = {key: config[key] for key in keys}
    with subject.autocast():
        nats = evaluate.answer_nats(model, requests, groups, progress=True, **options).numpy()
        picks = likeliest(nats, questions)  # (n,) twice
        if config["set"] == "lambada":
            greedy = {key: config[key] for key in ("cfg_scale", "batch_size")}
            right = decoded(model, requests, **greedy)  # (n,)
        else:
            right = picks[0] == [question.gold for question in questions]  # (n,)
    result = {"set": config["set"], "questions": len(questions), "cfg_scale": config["cfg_scale"]}
    result["estimator"] = evaluate.estimator_of(model, config["estimator"]).name
    result |= {"texts": len(requests), "texts_cut": cut[0], "options_cut": cut[1]}
    result |= accuracies(config["set"], questions, nats, picks, right)
    result["seconds"] = time.time() - began
    if config["out"]:
        keep(config["out"], questions, nats, picks, right)
    print(protocol(config, result, path, subject))
    print(summary(result))
    return result


def accuracies(name, questions, nats, picks, right):
    """Accuracies, with standard errors over questions: a dict."""
    accuracy, error = mean_and_error(right)
    result = {"accuracy": accuracy, "error": error}
    if name == "lambada":
        mean, error = mean_and_error(nats)
        return result | {"nats_per_word": mean, "nats_error": error}
    per_byte, error = mean_and_error(picks[1] == [question.gold for question in questions])
    chance = float(np.mean([1 / len(question.options) for question in questions]))
    return result | {"accuracy_per_byte": per_byte, "error_per_byte": error, "chance": chance}


def protocol(config, result, path, subject):
    """What was asked, and how it was evaluated, in words."""
    n, name = result["questions"], config["set"]
    part = f"{'the first' if n == config['limit'] else 'all'} {plural(n, 'question')}"
    texts = plural(result["texts"], "text")
    space = "" if name == "plain" else " behind a space"
    estimator = evaluate.estimator_of(subject.model, config["estimator"])
    draws = f"{plural(config['draws'], 'draw')} an option, the same for all options of a question"
    padding = f"rows padded with masks to {config['pad_to']} tokens; " if config["pad_to"] else ""
    return (
        f"{name}: {part} of {path}; no examples, context {sets.FORMATS[name]!r}, "
        f"then the option{space}; block of {subject.model.block_size} tokens: "
        f"the beginning of the context cut in {result['texts_cut']} of {texts}, "
        f"the end of the option in {result['options_cut']}\n"
        f"-log p(option | context): {method(estimator, draws)}; "
        f"cfg_scale {config['cfg_scale']}; {padding}{subject.words}; {result['seconds']:.1f} s"
    )


def summary(result):
    """The result in words, with standard errors over questions."""
    with_error = lambda key, error: f"{result[key]:.4f}{plus_minus(result[error])}"  # noqa: E731
    right, n = with_error("accuracy", "error"), result["questions"]
    few = f"too few questions for an error: {n}"
    error = "standard error" if plus_minus(result["error"]) else few
    if "nats_per_word" in result:
        mean, nats = result["nats_per_word"], with_error("nats_per_word", "nats_error")
        word = f"{nats} nats a last word, perplexity {shown_perplexity(mean)}"
        return f"last word right by greedy decoding {right} ({error}); {word}"
    per_byte = with_error("accuracy_per_byte", "error_per_byte")
    rest = f"by nats per byte of the option {per_byte}; by chance {result['chance']:.4f}"
    return f"accuracy {right} ({error}); {rest}"


def keep(path, questions, nats, picks, right):
    """Write a line for each question: its place in the file, its options' nats, answers, gold."""
    columns = by_question(nats, questions), *picks, right
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf8") as file:
        for question, *values in zip(questions, *columns, strict=True):
            keys = ("nats", "answer", "answer_per_byte", "right")
            record = {"question": question.where, "gold": question.gold}
            record |= {key: value.tolist() for key, value in zip(keys, values, strict=True)}
            file.write(to_json(record) + "\n")


if __name__ == "__main__":
    program.run(main, *MODULES)
