"""Evaluate a checkpoint on the tasks of EleutherAI's lm-evaluation-harness.

    python -m evals.harness --ckpt=CKPT --tasks=arc_easy,piqa --cfg_scale=0.6
    python -m evals.harness --ckpt=CKPT --tasks=mine --include_path=FOLDER
                                                     FOLDER/mine.yaml; needs no network

The harness makes three kinds of requests to a masked diffusion model or a causal one:

  loglikelihood          log p(continuation | context), estimated as in choice.py by one stratified
                         set of draws, which the options of one document share. Greedy
                         decoding takes one call per token, so it is compared only with a
                         continuation that has no alternatives (LAMBADA's last word); only there do
                         metrics need it.
  loglikelihood_rolling  log p(text), as in evaluate.py: consecutive blocks, each on its own
  generate_until         masks after the context, filled by a sampler; cut at the first stop string
                         or end-of-text token

If a context and what follows do not fit into a block, a continuation keeps as much of its context
as fits, while a generated answer keeps its whole context and gets the rest of the block, at least
one token. The number of cuts is printed after the table.

Optional: pip install -r requirements-lm_eval.txt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, too
from lib import program  # isort: skip (first, as in train.py)
import collections
import contextlib
from functools import partial

import numpy as np
import torch

import config as settings
import diffusion
import evaluate
import sample
import samplers
from config import Part, UserError, nearest, plural, require
from data import examples
from evals import choice
from lib.stats import method
from run import subject as subjects

DEFAULTS = {
    "tasks": "",  # tasks of lm-evaluation-harness, separated by commas
    "include_path": "",  # a folder with more task files (.yaml)
    "limit": 0,  # only the first `limit` documents of each task; 0: all
    "sampler": "confidence",  # one of SAMPLERS; for tasks that generate
    "max_new_tokens": 256,  # generated if a task does not say how many; 1 or more
}
SHARED = Part(evaluate, "estimator", "draws", "strata", "batch_size"), Part(sample, "cfg_scale")
SHARED += (Part(samplers, "steps"),)
MODULES = (settings, subjects, diffusion, *SHARED, sys.modules[__name__])  # whose keys it takes

SAMPLERS = samplers.SAMPLERS


@contextlib.contextmanager
def without_this_folder():
    """Keep this project out of imports: the harness needs another package called evaluate."""
    root, path = Path(__file__).resolve().parent.parent, sys.path[:]
    evaluate_module = sys.modules.pop("evaluate", None)
    sys.path[:] = [folder for folder in path if Path(folder or ".").resolve() != root]
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules.pop("evaluate", None)
        if evaluate_module:
            sys.modules["evaluate"] = evaluate_module


def packages():
    """(lm_eval, its class LM, its TaskManager); UserError if it is not installed."""
    try:
        with without_this_folder():
            import lm_eval
            from lm_eval.api.model import LM
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"{error}; pip install -r requirements-lm_eval.txt") from None
    return lm_eval, LM, TaskManager


# ---- Requests of the harness ---------------------------------------------------------------------


def options(config, *keys):
    """The given keys of the config, and those that every function takes."""
    return {key: config[key] for key in (*keys, "seed", "batch_size")} | {"progress": True}


def log_p_of_continuations(subject, config, cuts, requests):
    """loglikelihood: (context, continuation) -> [(log p, whether greedy decoding gives it)].

    cuts, here and below: a Counter of what was cut to fit a block.
    """
    model, tokenizer, L = subject.model, subject.tokenizer, subject.model.block_size
    texts = [request.args for request in requests]
    both_of = partial(choice.prompt_and_answer, tokenizer, model.start_id, "a request")
    whole = [both_of(*text) for text in texts]
    pairs = [choice.fit(*pair, L) for pair in whole]
    cuts["continuations"] += len(pairs)
    cuts["continuations cut short"] += sum(len(answer) > L for _, answer in whole)
    both = zip(whole, pairs, strict=True)
    cuts["contexts without their beginning"] += sum(len(a) > len(b) for (a, _), (b, _) in both)
    keys = options(config, "estimator", "draws", "schedule", "cfg_scale")
    documents = [(request.task_name, request.doc_id) for request in requests]
    number_of = {document: i for i, document in enumerate(dict.fromkeys(documents))}
    groups = [number_of[document] for document in documents]
    nats = evaluate.answer_nats(model, pairs, groups, **keys)  # (N,)
    rivals = collections.Counter(documents)
    alone = [i for i, document in enumerate(documents) if rivals[document] == 1]
    greedy = np.zeros(len(pairs), bool)  # (N,)
    keys = options(config, "cfg_scale")
    greedy[alone] = choice.decoded(model, [pairs[i] for i in alone], **keys)
    return list(zip((0.0 - nats).tolist(), greedy.tolist(), strict=True))


def log_p_of_texts(subject, config, requests):
    """loglikelihood_rolling: (text,) -> [log p]; a bos is given and not scored."""
    model, L, log_p = subject.model, subject.model.block_size, []
    keys = options(config, "estimator", "draws", "strata", "schedule")
    for request in requests:
        text = "", *request.args
        bos, ids = choice.prompt_and_answer(subject.tokenizer, model.start_id, "a request", *text)
        first = L - len(bos)
        blocks = [([], ids[i : i + L]) for i in range(first, len(ids), L)]
        blocks.insert(0, (bos, ids[:first]))
        log_p.append(0.0 - float(evaluate.estimate(model, blocks, **keys)[0].sum()))
    return log_p


def generated(subject, config, cuts, requests):
    """generate_until: (context, dict) -> [text].

    It reads until, max_gen_toks, do_sample and temperature from the dict.
    """
    model, tokenizer, texts = subject.model, subject.tokenizer, [""] * len(requests)
    groups = collections.defaultdict(list)  # {(tokens in the prompt, new ones, temperature): [...]}
    for i, request in enumerate(requests):
        context, keywords = request.args
        whole = examples.encode(tokenizer, "a request", context)
        longest = keywords.get("max_gen_toks", config["max_new_tokens"])
        n = max(1, min(longest, model.block_size - len(whole)))  # the prompt has priority
        prompt, _ = choice.fit(whole, range(n), model.block_size)
        cuts["answers"] += 1
        cuts["answers cut short"] += int(n < longest)
        cuts["prompts without their beginning"] += int(len(prompt) < len(whole))
        temperature = (
            float(keywords.get("temperature", 1.0)) if keywords.get("do_sample", False) else 0.0
        )
        groups[len(prompt), n, temperature].append((i, prompt))
    keys = options(config, "steps", "schedule", "cfg_scale")
    keys |= {"sampler": subjects.sampler_of(model, config["sampler"])}
    for (_, n, temperature), members in groups.items():
        x = torch.tensor([[*prompt, *[model.mask_id] * n] for _, prompt in members])  # (N, P + n)
        x = x.to(model.device)
        tokens, _ = sample.sample(model, x, temperature=temperature, **keys)  # (N, P + n)
        for (i, _), row in zip(members, tokens[:, -n:].tolist(), strict=True):
            ids = row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row
            texts[i] = cut(tokenizer.decode(ids), requests[i].args[1].get("until") or [])
    return texts


def cut(text, stops):
    """The text before the first stop string."""
    stops = [stops] if isinstance(stops, str) else stops
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]


# ---- The command ---------------------------------------------------------------------------------


def check(config):
    """Raise UserError for settings that are wrong for every task."""
    require(config["tasks"], "say which tasks: --tasks=arc_easy,piqa")
    folder = config["include_path"]
    no_folder = f"include_path is a folder with task files (.yaml), not '{folder}'"
    require(not folder or Path(folder).is_dir(), no_folder)


def main(config):
    """Run the tasks on config["ckpt"], print the harness's table, return its results as a dict."""
    check(config)
    subject = subjects.load_evaluable(config, reads_text=True)
    config = subjects.in_its_order(config, subject, "estimator", evaluate.ESTIMATORS)
    config = subjects.in_its_order(config, subject, "sampler", SAMPLERS)
    choice.check_network(config, subject, "cfg_scale")
    lm_eval, LM, TaskManager = packages()
    manager = TaskManager(include_path=config["include_path"] or None)
    tasks = config["tasks"].split(",")
    for task in tasks:
        message = f"lm_eval has no task '{task}'{nearest(task, manager.all_tasks)}"
        require(task in manager.all_tasks, message)

    cuts = collections.Counter()

    class Answerer(LM):
        loglikelihood = staticmethod(partial(log_p_of_continuations, subject, config, cuts))
        loglikelihood_rolling = staticmethod(partial(log_p_of_texts, subject, config))
        generate_until = staticmethod(partial(generated, subject, config, cuts))

    keys = {"tasks": tasks, "task_manager": manager, "bootstrap_iters": 1000}
    with subject.autocast():
        output = lm_eval.simple_evaluate(Answerer(), limit=config["limit"] or None, **keys)
    estimator = evaluate.estimator_of(subject.model, config["estimator"])
    likelihoods = method(estimator, plural(config["draws"], "draw"))
    steps = f"by {config['sampler']}, {plural(config['steps'], 'step')}"
    text = "left to right" if subject.causal else steps
    settings_used = f"likelihoods {likelihoods}; text {text}; cfg_scale {config['cfg_scale']}"
    print(f"lm-evaluation-harness {lm_eval.__version__}: {settings_used}; {subject.words}")
    print(lm_eval.utils.make_table(output))
    if cuts:
        counts = ", ".join(f"{n} {what}" for what, n in cuts.items())
        print(f"of a block of {subject.model.block_size} tokens: {counts}")
    return output["results"]


if __name__ == "__main__":
    program.run(main, *MODULES)
