"""How much less noise is in a comparison of options that are estimated with the same numbers?

    python -m experiments.common_draws --ckpt=CKPT --set=hellaswag --from=FOLDER [--quick]

evals/choice.py answers by differences of estimates: nats of one option less nats of another. Here
every question is estimated with several seeds, once with the same draws for all of its options and
once with draws of their own. The variance of a difference over the seeds, averaged over the pairs
with the first option and over the questions, is the noise that can turn an answer; how often two
seeds give different answers is what it does.
"""

import itertools
import sys
import time

import numpy as np

import config as settings
import diffusion
import evaluate
from config import Part
from data import choice as sets
from evals import choice
from experiments import results
from lib import program
from run.subject import load_evaluable

DEFAULTS = {
    "ckpt": "out/pydocs",  # whatever checkpoint.load takes
    "limit": 50,  # questions
    "draws": 16,  # for each option
    "seeds": 8,  # estimates of each option
}
SHARED = Part(choice, "set", "from"), Part(evaluate, "batch_size")
ESTIMATORS = ["any_order", "lambda_dce"]


def noise(nats, counts):
    """(variance of a difference with the first option, part of the pairs of seeds that disagree).

    nats (seeds, N); counts: options of each question.
    """
    variances, disagree = [], []
    for part in np.split(nats, np.cumsum(counts)[:-1], axis=1):  # (seeds, options)
        variances.append((part[:, 1:] - part[:, :1]).var(0, ddof=1).mean())
        pairs = itertools.combinations(part.argmin(1).tolist(), 2)
        disagree.append(np.mean([one != other for one, other in pairs]))
    return float(np.mean(variances)), float(np.mean(disagree))


def main(config):
    """Print, write and return the noise with shared and with separate draws."""
    began = time.time()
    limit, seeds = (8, 3) if config["quick"] else (config["limit"], config["seeds"])
    questions, _ = sets.read(config["set"], config["from"], limit)
    subject = load_evaluable(evaluate.DEFAULTS | config, reads_text=True)
    model = subject.model
    asked = choice.requests_of(questions, subject.tokenizer, model.start_id, model.block_size)
    requests, group_of_each, _, _ = asked
    counts = [len(question.options) for question in questions]
    figures, table = {}, []
    for estimator in ESTIMATORS:
        row = {"estimator": estimator}
        options = {key: config[key] for key in ("draws", "batch_size")} | {"estimator": estimator}
        for name, groups in (("shared", group_of_each), ("separate", None)):
            with subject.autocast():
                nats = [
                    evaluate.answer_nats(model, requests, groups, seed=seed, **options).numpy()
                    for seed in range(seeds)
                ]
            row[f"variance_{name}"], row[f"disagree_{name}"] = noise(np.stack(nats), counts)
        row["ratio"] = row["variance_shared"] / row["variance_separate"]
        table.append(row)
        figures |= {f"{estimator}_{key}": value for key, value in row.items() if key != "estimator"}
    counts = {"question": len(questions), "draw": config["draws"], "seed": seeds}
    title = ", ".join([config["set"], *(settings.plural(counts[noun], noun) for noun in counts)])
    formats = dict.fromkeys(table[0].keys() - {"estimator"}, "{:.3g}")
    text = results.table(f"{title}; variances in nats^2", table, formats)
    about = results.about(model.device) | {"seconds": time.time() - began}
    results.write(config, "common_draws", figures | about, text)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, diffusion, results, *SHARED, sys.modules[__name__])
