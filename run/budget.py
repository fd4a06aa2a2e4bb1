"""The budget of a run: the dial that picks a network to fit it, and the clock that measures it.

The dial is one number, `depth`. It determines the keys of shape, batch and learning rate that are 0
in the config (see `filled`). A depth of 0 selects the largest of DEPTHS at which training can read
TOKENS tokens per parameter of the blocks (arXiv 2203.15556) within max_minutes (at UTILISATION of
this machine's speed in matrix products), max_iters steps, and READINGS passes over the text.
LOG.md reports how this rule was checked.
"""

import math
import os
import time

import torch

import model as network
from config import plural, refuse_typed
from lib import parallel
from lib.device import flops_of_step, matmul_flops
from lib.optim import OPTIMIZERS

DEPTHS = range(2, 33)  # the depths that the rule chooses from
TOKENS = 20  # tokens read per parameter of the blocks
UTILISATION = 0.4  # the fraction of the machine's speed in matrix products that training reaches
READINGS = 30  # passes over the text after which a larger network may memorise it (a guess)
MINUTES = 10.0  # max_minutes of a run that sets neither max_iters nor max_minutes
# Runs of this many minutes or more are compiled by default. Compiling takes 20 s on two fast cores,
# 95 s on a slow, busy one (LOG.md); steps become 1.45 times as fast, a gain after 1 or 5 minutes.
COMPILED = 2.0

now = time.perf_counter


# ---- 1. The dial ---------------------------------------------------------------------------------


def with_dial(config, dataset, team):
    """The config with its zeros set by the dial; the first process prints the values.

    Raises UserError if --depth has no effect because the user also set the shape.
    """
    reason, dial = "", ("n_layer", "n_embd", "n_head", "batch_size", "learning_rate")
    shape = ("n_layer", "n_embd")
    if config["depth"] and all(config[key] and key in config.get("user_keys", ()) for key in shape):
        refuse_typed(config, ["depth"], f"is overruled by {' and '.join(shape)}, which are set")
    if not (config["max_iters"] or config["max_minutes"]):
        config = config | {"max_minutes": MINUTES}
    is_short = 0 < config["max_minutes"] < COMPILED
    if is_short and "compile" not in config.get("user_keys", ["compile"]):
        config = config | {"compile": False}
    if not (config["depth"] or (config["n_layer"] and config["n_embd"])):
        operations, ends = 0.0, []
        if config["max_iters"]:
            ends.append(plural(config["max_iters"], "step"))
        if config["max_minutes"]:
            speed = matmul_flops(team.device, team.autocast, seconds=1.0)  # operations per second
            speed = sum(parallel.gather(speed, team))
            operations = 60 * config["max_minutes"] * UTILISATION * speed
            minutes = f"{config['max_minutes']:g} min"
            ends.append(f"{minutes} at {speed / 1e9:.0f} GFLOP/s")
        config = config | {"depth": fitting_depth(config, dataset, operations)}
        of_text = fitting_depth(config | {"max_iters": 0}, dataset, 0)
        if of_text == config["depth"] < DEPTHS[-1]:
            ends = [f"the text, which it would learn by heart; {' or '.join(ends)} allow more"]
        repeat = f"on another machine --depth={config['depth']} repeats it"
        reason = f" (for {' or '.join(ends)}{if_busy()}; {repeat})"
    chosen = filled(config)
    if team.rank == 0 and any(config[key] == 0 for key in dial):
        numbers = {key: chosen[key] for key in dial[:-1]}
        numbers["learning_rate"] = f"{chosen['learning_rate']:.3g}"
        shown = ", ".join(f"{key} {number}" for key, number in numbers.items())
        depth = f"depth {config['depth']}: " if config["depth"] else ""
        print(f"{depth}{shown}{reason}")
    return chosen


def if_busy():
    """A remark if more programs are running than there are processors, else "" (as on Windows)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = "; other programs run beside it"
    busy += ": OMP_NUM_THREADS=1 may make it faster" if torch.get_num_threads() > 1 else ""
    return busy if load > os.cpu_count() + 0.5 else ""


def fitting_depth(config, dataset, operations):
    """The largest of DEPTHS at which the run reads TOKENS tokens per parameter of the blocks.

    operations: how many the run can do in its minutes; 0: no limit.
    """
    best = DEPTHS[0]
    for depth in DEPTHS:
        candidate = filled(config | {"depth": depth})
        with torch.device("meta"):
            model = network.make_network(candidate)
        step_tokens = candidate["batch_size"] * dataset.block_size
        tokens = [READINGS * len(dataset.tokens)]
        if candidate["max_iters"]:
            tokens.append(candidate["max_iters"] * step_tokens)
        if operations:
            tokens.append(operations / flops_of_step(candidate, model, dataset) * step_tokens)
        if min(tokens) < TOKENS * sum(p.numel() for p in model.blocks.parameters()):
            break
        best = depth
    return best


def filled(config):
    """The config with its zeros replaced by values derived from its depth and width."""
    depth, chosen = config["depth"], {}
    chosen["n_layer"] = config["n_layer"] or depth
    chosen["n_embd"] = D = config["n_embd"] or width(depth)
    chosen["n_head"] = config["n_head"] or -(-D // 64)  # at most 64 dimensions per head
    L = config.get("example_width") or config["block_size"]
    sequences = 4096 * D / 96 / L  # 4,096 tokens per step at D = 96, proportional to D
    chosen["batch_size"] = config["batch_size"] or max(16, 2 ** round(math.log2(sequences)))
    rate, _ = OPTIMIZERS[config["optimizer"]]  # at D = 96; beyond that, it falls as 1/sqrt(D)
    rate *= min(1, 96 / D) ** 0.5 * (0.1 if config["init_from"] else 1)
    chosen["learning_rate"] = config["learning_rate"] or rate
    return config | chosen


def width(depth):
    """n_embd: 96, 192, 384 at depths 6, 9, 12."""
    return 16 * depth if depth <= 6 else 64 * round(depth**2 / 24)


# ---- 2. The clock --------------------------------------------------------------------------------


class Clock:
    """The progress of a run in steps (max_iters) and in minutes (max_minutes).

    Minutes before a resume count, and so do compilation and evaluations. Iterating over the clock
    yields the remaining steps. If minutes are limited, all processes `look` at their clocks
    together and use the latest time, so that they agree on the learning rate and on when to stop.
    """

    def __init__(self, config, state, team):
        self.limits, self.team = (config["max_iters"], config["max_minutes"]), team
        self.start = self.step = state["step"] if state else 0
        self.before = self.minutes = state.get("minutes", 0.0) if state else 0.0
        self.tokens = state.get("tokens", 0.0) if state else 0.0  # the log updates these two
        self.flops = state.get("flops", 0.0) if state else 0.0
        self.began, self.evaluating = now(), 0.0  # minutes spent on evaluations
        self.tenth, self.last = 0, self.done() >= 1

    def __iter__(self):
        self.look()  # compilation may already have taken time
        while not self.last:
            self.tenth = int(10 * self.done())
            self.step += 1
            yield self.step

    def tick(self, interval):
        """Whether this step is the last. Several processes check only every `interval` steps."""
        if self.team.world == 1 or self.step % interval == 0:
            self.look()
        self.last = self.done() >= 1
        return self.last

    def look(self, after_evaluation=False):
        """Read the clock. after_evaluation: count the time since the last look as evaluation."""
        before, minutes = self.minutes, self.before + (now() - self.began) / 60
        self.minutes = max(parallel.gather(minutes, self.team)) if self.limits[1] else minutes
        if after_evaluation:
            self.evaluating += self.minutes - before

    def spent(self):
        """The fraction of the minutes used so far; 0 if they are not limited."""
        return self.minutes / self.limits[1] if self.limits[1] else 0.0

    def done(self):
        """The fraction of the run that is over, by steps or by minutes, whichever is larger."""
        return max(self.step / self.limits[0] if self.limits[0] else 0.0, self.spent())

    def due(self, interval, share=1.0):
        """Whether something that happens every `interval` steps (0: ten times a run) is due.

        If minutes are limited, it is postponed while evaluations have taken more than `share` of
        the time so far.
        """
        if self.last or interval:
            return self.last or self.step % interval == 0
        may_evaluate = not self.limits[1] or self.evaluating <= share * self.minutes
        return may_evaluate and int(10 * self.done()) > self.tenth

    def left(self, pace):
        """(steps, seconds) left, at `pace` seconds per step."""
        iters, minutes = self.limits
        seconds = max(0.0, 60 * (minutes - self.minutes))
        ends = []
        if iters:
            ends.append((iters - self.step, (iters - self.step) * pace))
        if minutes:
            ends.append((seconds / pace, seconds))
        return min(ends)
