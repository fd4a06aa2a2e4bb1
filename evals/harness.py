"""EleutherAI's lm-evaluation-harness asks, a checkpoint of ours answers: its tasks, prompts and metrics are the harness's.

    python evaluate.py --ckpt=CKPT --lm_eval=arc_easy,piqa --cfg=0.6
    python evaluate.py --ckpt=CKPT --lm_eval=mine --include_path=FOLDER          FOLDER/mine.yaml; needs no network

The harness asks three things, of a masked diffusion model or a causal one:

  loglikelihood          log p(continuation | context), as choice.py estimates it: the options of one document share their
                         random numbers. Whether greedy decoding gives the continuation costs a call a token; it is found out
                         for a continuation that has no rival (LAMBADA's last word), where alone metrics ask for it.
  loglikelihood_rolling  log p(text), as evaluate.py does: blocks one after the other, each on its own
  generate_until         masks behind the context, filled by a sampler; cut at the first stop string or end-of-text token

Optional: pip install -r requirements-lm_eval.txt
"""

import collections
import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

import choice
import config as settings
import likelihood
import sample
from config import UserError, choose, nearest, require
from data import rows
from data.tokenizer import from_meta

DEFAULTS = {
    "lm_eval": "",  # in place of data: tasks of lm-evaluation-harness, separated by commas
    "include_path": "",  # folder with more task files
    "limit": 0,  # only the first so many documents of each task; 0: all
    "cfg": 0.0,  # guidance by the context: logits u + (1 + w)(c - u), u without it; 0: off
    "sampler": "confidence",  # for tasks that generate; as in sample.py
    "steps": 128,  # of the sampler
    "new_tokens": 256,  # generated where a task does not say how many
}


@contextlib.contextmanager
def without_this_folder():
    """Inside the block imports do not see this project: the harness needs a package that is called evaluate, as ours is."""
    here, path = Path(__file__).resolve().parent, sys.path[:]
    ours = sys.modules.pop("evaluate", None)
    sys.path[:] = [folder for folder in path if Path(folder or ".").resolve() != here]
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules.pop("evaluate", None)
        if ours:
            sys.modules["evaluate"] = ours


def packages():
    """(lm_eval, its class LM, its TaskManager); UserError where it is not installed."""
    try:
        with without_this_folder():
            import lm_eval
            from lm_eval.api.model import LM
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"{error}; for --lm_eval: pip install -r requirements-lm_eval.txt") from None
    return lm_eval, LM, TaskManager


@dataclasses.dataclass
class Subject:
    """Who is asked, and how."""

    model: torch.nn.Module
    causal: bool
    text: object  # the tokenizer
    config: dict
    autocast: object

    def how(self, *keys):
        """Arguments that all of our functions take, and config's `keys`."""
        return {key: self.config[key] for key in ("seed", "batch_size", *keys)} | {
            "autocast": self.autocast,
            "progress": True,
        }


def log_p_of_continuations(subject, requests):
    """The harness's loglikelihood: requests for (context, continuation) -> [(log p, whether greedy decoding gives it)]."""
    model, config = subject.model, subject.config
    pairs = [choice.request(subject.text, model.start_id, "a request", *request.args) for request in requests]
    pairs = [choice.fit(*pair, model.block_size) for pair in pairs]
    documents = [(request.task_name, request.doc_id) for request in requests]
    guided = {} if subject.causal else {"cfg": config["cfg"]}
    estimator = "ar" if subject.causal else config["estimator"]
    how = subject.how("draws", "schedule")
    nats = likelihood.answer_nats(
        model, pairs, estimator, groups=[number for _, number in documents], **how, **guided
    )  # (N,)
    rivals = collections.Counter(documents)
    alone = [i for i, document in enumerate(documents) if rivals[document] == 1]
    greedy = np.zeros(len(pairs), bool)  # (N,)
    greedy[alone] = choice.decoded(model, [pairs[i] for i in alone], subject.causal, **subject.how(), **guided)
    return list(zip((-nats).tolist(), greedy.tolist(), strict=True))


def log_p_of_texts(subject, requests):
    """The harness's loglikelihood_rolling: requests for (text,) -> [log p]."""
    model, found = subject.model, []
    estimator = "ar" if subject.causal else subject.config["estimator"]
    for request in requests:
        ids = np.array(rows.encode(subject.text, "a request", request.args[0]), np.int64)  # (l,)
        blocks = [ids[start : start + model.block_size] for start in range(0, len(ids), model.block_size)]
        how = subject.how("draws", "strata", "schedule")
        found.append(-float(likelihood.sequence_nats(model, blocks, estimator, **how).sum()) if blocks else 0.0)
    return found


def written(subject, requests):
    """The harness's generate_until: requests for (context, settings) -> [text]. Of `settings` it takes until, max_gen_toks,
    do_sample and temperature."""
    model, text, found = subject.model, subject.text, [""] * len(requests)
    alike = collections.defaultdict(list)  # {(tokens in the prompt, to write, temperature): [(request, prompt), ...]}
    for i, request in enumerate(requests):
        context, wish = request.args
        n = min(wish.get("max_gen_toks", subject.config["new_tokens"]), model.block_size - 1)
        prompt = rows.encode(text, "a request", context)[-(model.block_size - n) :]
        heat = float(wish.get("temperature", 1.0)) if wish.get("do_sample", False) else 0.0
        alike[len(prompt), n, heat].append((i, prompt))
    for (_, n, heat), members in alike.items():
        x = torch.tensor([[*prompt, *[model.mask_id] * n] for _, prompt in members])  # (N, P + n)
        x = x.to(next(model.parameters()).device)
        if subject.causal:
            tokens, _ = sample.sample_ar(model, x, temperature=heat, **subject.how())
        else:
            how = subject.how("sampler", "steps", "schedule", "cfg")
            tokens, _ = sample.sample(model, x, temperature=heat, **how)  # (N, P + n)
        for (i, _), row in zip(members, tokens[:, -n:].tolist(), strict=True):
            ids = row[: row.index(text.eot)] if text.eot in row else row
            found[i] = cut(text.decode(ids), requests[i].args[1].get("until") or [])
    return found


def cut(text, stops):
    """The text before the first of the stop strings."""
    stops = [stops] if isinstance(stops, str) else stops
    return text[: min([text.find(stop) for stop in stops if stop and stop in text], default=len(text))]


def main(config, model, text, trained, autocast):
    """Runs the tasks config["lm_eval"] on a loaded checkpoint, prints the harness's table; returns its results, a dict."""
    choose("sampler", config["sampler"], sample.SAMPLERS)
    settings.at_least(0, config, "limit")
    settings.at_least(1, config, "steps", "new_tokens")
    require(trained["tokenizer"], f"{config['ckpt']} names no tokenizer, so text cannot be read or written")
    require(not trained["causal"] or not config["cfg"], "cfg needs a masked diffusion model; this network is causal")
    folder = config["include_path"]
    require(not folder or Path(folder).is_dir(), f"include_path is a folder with task files (.yaml), not '{folder}'")
    lm_eval, LM, TaskManager = packages()
    tasks, manager = config["lm_eval"].split(","), TaskManager(include_path=folder or None)
    for task in tasks:
        require(task in manager.all_tasks, f"lm_eval has no task '{task}'{nearest(task, manager.all_tasks)}")
    subject = Subject(model, trained["causal"], text or from_meta(trained["tokenizer"]), config, autocast)

    class Answerer(LM):
        loglikelihood = staticmethod(lambda requests: log_p_of_continuations(subject, requests))
        loglikelihood_rolling = staticmethod(lambda requests: log_p_of_texts(subject, requests))
        generate_until = staticmethod(lambda requests: written(subject, requests))

    limit = config["limit"] or None
    found = lm_eval.simple_evaluate(Answerer(), tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=1000)
    how = (
        "exact"
        if trained["causal"]
        else f"upper bound by {config['estimator']}, {config['draws']} draws; w = {config['cfg']}"
    )
    print(f"lm-evaluation-harness {lm_eval.__version__}: likelihoods {how}; seed {config['seed']}")
    print(lm_eval.utils.make_table(found))
    return found["results"]
