"""How much less noise is in a comparison of two options that are estimated with the same random numbers?

    python -m experiments.common_draws --ckpt=CKPT --set=hellaswag --from=FOLDER [--quick=True]

choice.py answers by differences of estimates: nats of one option less nats of another. Here every question is estimated with
several seeds, once with the same draws for all of its options and once with draws of their own. The variance of a
difference over the seeds, averaged over the pairs with the first option and over the questions, is the noise that can turn
an answer; how often two seeds give different answers is what it does.
"""

import itertools
import sys
import time

import numpy as np

import choice
import config as settings
import diffusion
import likelihood
from data import choice as sets
from experiments import results

DEFAULTS = {
    "ckpt": "out/pydocs",  # whatever checkpoint.load takes
    "set": "hellaswag",  # as in choice.py
    "from": "",  # as in choice.py
    "limit": 50,  # questions
    "draws": 16,  # for each option
    "seeds": 8,  # estimates of each option
    "batch_size": 32,  # rows in one network call
}

ESTIMATORS = ["any_order", "lambda_dce"]


def noise(nats, counts):
    """(variance of a difference with the first option, part of the pairs of seeds that disagree): nats (seeds, N)."""
    variances, disagree = [], []
    for part in np.split(nats, np.cumsum(counts)[:-1], axis=1):  # (seeds, options)
        variances.append((part[:, 1:] - part[:, :1]).var(0, ddof=1).mean())
        pairs = itertools.combinations(part.argmin(1).tolist(), 2)
        disagree.append(np.mean([one != other for one, other in pairs]))
    return float(np.mean(variances)), float(np.mean(disagree))


def main(config):
    began = time.time()
    limit, seeds = (8, 3) if config["quick"] else (config["limit"], config["seeds"])
    questions, _ = sets.read(config["set"], config["from"], limit)
    device, autocast = settings.machine(config)
    model, text, _ = choice.load(config["ckpt"], device)
    requests, groups, _, _ = choice.requests_of(questions, text, model.start_id, model.block_size)
    counts = [len(question.options) for question in questions]
    figures, table = {}, []
    for estimator in ESTIMATORS:
        row = {"estimator": estimator}
        for name, places in (("shared", groups), ("separate", None)):
            how = {"draws": config["draws"], "batch_size": config["batch_size"], "autocast": autocast, "groups": places}
            nats = [likelihood.answer_nats(model, requests, estimator, **how, seed=seed).numpy() for seed in range(seeds)]
            row[f"variance_{name}"], row[f"disagree_{name}"] = noise(np.stack(nats), counts)
        row["ratio"] = row["variance_shared"] / row["variance_separate"]
        table.append(row)
        figures |= {f"{estimator}_{key}": value for key, value in row.items() if key != "estimator"}
    title = f"{config['set']}, {len(questions)} questions, {config['draws']} draws, {seeds} seeds; variances in nats^2"
    text = results.table(title, table, dict.fromkeys(table[0].keys() - {"estimator"}, "{:.3g}"))
    print(text)
    results.write(config, "common_draws", figures | results.about(device) | {"seconds": time.time() - began}, text)
    return figures


if __name__ == "__main__":
    settings.run(main, settings, diffusion, results, sys.modules[__name__])
