"""Does the dial pick the right network? Its choice and its neighbours for the same arithmetic.

    python -m experiments.dial --data=FOLDER            what has no result yet, then the table

FOLDER is prepared data whose held-out part may be looked at. For each budget of floating-point
operations the depth that run/budget.py picks is trained, and one less and one more, each with the
recipe and the steps that its depth and the budget give. All are evaluated on the same blocks with
the same masks. What has run is kept, so a screening that was stopped goes on.
"""

import statistics
import sys
import tempfile
import time

import torch

import config as settings
import train
from data import examples, loader
from experiments import recipe, results
from lib import program
from run import budget

DEFAULTS = {
    "data": "",  # a prepared folder
    "operations": "1e12,3e12,1e13",  # the budgets, separated by commas
    "seeds": 2,  # how many seeds (1337, 1338, ...) each run gets; 1 or more
    "rows": "experiments/results/dial.jsonl",  # keeps what has run
}

WITHIN = 0.03  # nats that the choice may lie above the best of the three


def settings_of(config, operations, depth=0, seed=1337):
    """The training config of a run; depth 0: as the dial picks it."""
    words = [f"--data={config['data']}", "--resume=False", "--show_sample=False", "--compile=False"]
    words += ["--eval_sequences=200", f"--seed={seed}", f"--depth={depth}"]
    words += [f"--{key}={config[key]}" for key in ("device", "dtype")]
    run = settings.parse(words, *train.MODULES)
    V = loader.read_meta(config["data"])["vocab_size"]
    run |= {"vocab_size": V, "attention": "full", "example_width": 0}
    if not depth:
        _, dataset, _ = examples.open_data(run)
        run["depth"] = budget.fitting_depth(run, dataset, operations)
    steps = round(operations / recipe.step_flops(budget.filled(run)))
    return run | {"max_iters": steps, "eval_interval": steps}


def run(config, operations, depth, seed):
    """Train one network in this process. -> its row"""
    run, began = settings_of(config, operations, depth, seed), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = train.main(run | {"out_dir": folder})
    row = {"mark": mark(config, operations, depth, seed), "steps": run["max_iters"]}
    return row | {"cpu_seconds": time.process_time() - began} | result


def mark(config, operations, depth, seed):
    """What a row depends on: all that the run is told."""
    run = budget.filled(settings_of(config, operations, depth, seed))
    return results.mark(sorted(run.items()))


def table_of(config, rows):
    """(figures, lines): for each budget the dial's choice and its neighbours, and the best."""
    figures, lines = {}, []
    for operations in map(float, config["operations"].split(",")):
        choice = settings_of(config, operations)["depth"]
        nats = {}
        for depth in range(max(1, choice - 1), choice + 2):
            done = [rows[mark(config, operations, depth, seed)] for seed in seeds(config)]
            run = budget.filled(settings_of(config, operations, depth))
            nats[depth] = statistics.mean(row["nats_per_token"] for row in done)
            shape = f"{run['n_layer']} x {run['n_embd']}, batch {run['batch_size']}"
            line = {"operations": f"{operations:.0e}", "depth": str(depth), "network": shape}
            line |= {"learning_rate": run["learning_rate"], "steps": run["max_iters"]}
            line |= {"nats_per_token": nats[depth]}
            for seed, row in zip(seeds(config), done, strict=True):
                line[f"seed_{seed}"] = row["nats_per_token"]
            lines.append(line | {"": "the dial's choice" if depth == choice else ""})
        figures[f"depth_{operations:.0e}"] = choice
        figures[f"above_best_{operations:.0e}"] = nats[choice] - min(nats.values())
    return figures, lines


def seeds(config):
    return range(1337, 1337 + config["seeds"])


def main(config):
    """Train what is missing; print, write and return how far the choices are from the best."""
    rows = {row["mark"]: row for row in results.kept(config["rows"])}
    for operations in map(float, config["operations"].split(",")):
        choice = settings_of(config, operations)["depth"]
        for seed in seeds(config):
            for depth in range(max(1, choice - 1), choice + 2):
                key = mark(config, operations, depth, seed)
                if key not in rows:
                    rows[key] = run(config, operations, depth, seed)
                    results.keep(config["rows"], rows[key])
                    print(operations, depth, seed, rows[key]["nats_per_token"], flush=True)
    figures, lines = table_of(config, rows)
    formats = dict.fromkeys(lines[0], "{:.3f}") | {"steps": "{:,}", "learning_rate": "{:.1e}"}
    title = f"Nats per token of {config['data']} by depth, for the same operations"
    worst = max(value for key, value in figures.items() if key.startswith("above_best"))
    verdict = "is not" if worst > WITHIN else "is"
    is_right = f"{verdict} within {WITHIN} nats of the best of the three"
    text = results.table(title, lines, formats)
    text += f"\nThe dial's choice {is_right} at each budget.\n"
    figures |= results.about(torch.device("cpu"))
    results.write(config, "dial", figures, text)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
