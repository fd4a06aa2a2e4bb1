"""What a run may cost and what it is spent on: the clock, and the dial that picks the network.

The dial is one number, `depth`. All that is 0 in the config follows from it:

  n_layer        depth
  n_embd         16 * depth up to 6 layers, 64 * round(depth^2 / 24) above: 96, 192, 384 at 6, 9, 12
  n_head         heads of at most 64
  batch_size     4,096 tokens a step at a width of 96 and in proportion to it, at least 16 sequences
  learning_rate  1e-2 (adamw: 4e-3) up to a width of 96, beyond it falling with its square root; a
                 tenth of that with init_from

and a depth of 0 is the largest one that can read 20 tokens for each parameter of its blocks: in
max_minutes at 40% of the speed that this machine has in matrix products, in max_iters steps, and in
30 readings of the text. (20 as in arXiv 2203.15556; LOG.md has the check of this rule.)
"""

import math
import time

import torch

import model as network
from lib import parallel
from lib.device import matmul_flops
from lib.log import flops_of_step
from lib.optim import OPTIMIZERS

DEPTHS = range(2, 33)  # what the machine can pick
TOKENS = 20  # to read for each parameter of the blocks
UTILISATION = 0.4  # part of the machine's speed in matrix products that training has
READINGS = 30  # of a text, after which a larger network may learn it by heart (a guess)
MINUTES = 10.0  # of a run that is told neither max_iters nor max_minutes

now = time.perf_counter


# ---- 1. The dial ---------------------------------------------------------------------------------


def with_dial(config, dataset, team):
    """The config with all that the dial says in place of zeros; the first process prints it."""
    why, dial = "", ("n_layer", "n_embd", "n_head", "batch_size", "learning_rate")
    if not (config["max_iters"] or config["max_minutes"]):
        config = config | {"max_minutes": MINUTES}
    if not (config["depth"] or (config["n_layer"] and config["n_embd"])):
        operations, ends = 0.0, [f"{config['max_iters']:,} steps"] * (config["max_iters"] > 0)
        if config["max_minutes"]:
            speed = matmul_flops(team.device, team.autocast, seconds=1.0)  # operations a second
            speed = sum(parallel.gather(speed, team))
            operations = 60 * config["max_minutes"] * UTILISATION * speed
            ends += [f"{config['max_minutes']:g} minutes at {speed / 1e9:.0f} GFLOP/s"]
        config = config | {"depth": fitting_depth(config, dataset, operations)}
        why = f" (for {' or '.join(ends)}; on another machine --depth={config['depth']} repeats it)"
    chosen = filled(config)
    if team.rank == 0 and any(config[key] == 0 for key in dial):
        shown = ", ".join(f"{key} {chosen[key]:.3g}" for key in dial)
        print(f"depth {config['depth']}: " * (config["depth"] > 0) + shown + why)
    return chosen


def fitting_depth(config, dataset, operations):
    """The largest of DEPTHS whose blocks get TOKENS a parameter. operations: of the run; 0: any."""
    best = DEPTHS[0]
    for depth in DEPTHS:
        mine = filled(config | {"depth": depth})
        with torch.device("meta"):
            model = network.Transformer(mine)
        step = mine["batch_size"] * dataset.block_size  # tokens
        tokens = [READINGS * len(dataset.tokens)]
        tokens += [mine["max_iters"] * step] * (mine["max_iters"] > 0)
        tokens += [operations / flops_of_step(mine, model, dataset) * step] * (operations > 0)
        if min(tokens) < TOKENS * sum(p.numel() for p in model.blocks.parameters()):
            break
        best = depth
    return best


def filled(config):
    """The config with what follows from its depth, and from its width, in place of zeros."""
    depth, chosen = config["depth"], {}
    chosen["n_layer"] = config["n_layer"] or depth
    chosen["n_embd"] = D = config["n_embd"] or width(depth)
    chosen["n_head"] = config["n_head"] or -(-D // 64)
    sequences = 4096 * D / 96 / (config.get("example_width") or config["block_size"])
    chosen["batch_size"] = config["batch_size"] or max(16, 2 ** round(math.log2(sequences)))
    rate, _ = OPTIMIZERS[config["optimizer"]]
    rate *= min(1, 96 / D) ** 0.5 * (0.1 if config["init_from"] else 1)
    chosen["learning_rate"] = config["learning_rate"] or rate
    return config | chosen


def width(depth):
    return 16 * depth if depth <= 6 else 64 * round(depth**2 / 24)


# ---- 2. The clock --------------------------------------------------------------------------------


class Clock:
    """How much of a run is over, of its steps (max_iters) and of its minutes (max_minutes).

    Minutes are those of all starts of the run, compilation and evaluations included. Iterating over
    the clock counts the steps that are left. Where minutes are limited, several processes `look` at
    the clock together and take the latest of theirs: so they agree on learning rate and end.
    """

    def __init__(self, config, state, team):
        self.limits, self.team = (config["max_iters"], config["max_minutes"]), team
        self.start = self.step = state["step"] if state else 0
        self.before = self.minutes = state.get("minutes", 0.0) if state else 0.0
        self.began, self.evaluating = now(), 0.0  # evaluating: minutes
        self.tenth, self.last = 0, self.done() >= 1

    def __iter__(self):
        while not self.last:
            self.tenth = int(10 * self.done())
            self.step += 1
            yield self.step

    def tick(self, interval):
        """Say whether this step is the last; several processes look every `interval` steps."""
        if self.team.world == 1 or self.step % interval == 0:
            self.look()
        self.last = self.done() >= 1
        return self.last

    def look(self, evaluated=False):
        """Read the clock; `evaluated` says that an evaluation has just ended."""
        before, minutes = self.minutes, self.before + (now() - self.began) / 60
        self.minutes = max(parallel.gather(minutes, self.team)) if self.limits[1] else minutes
        self.evaluating += (self.minutes - before) * evaluated

    def spent(self):
        """The part of the minutes that is used; 0 where they are not limited."""
        return self.minutes / self.limits[1] if self.limits[1] else 0.0

    def done(self):
        """The part of the run that is over."""
        return max(self.step / self.limits[0] if self.limits[0] else 0.0, self.spent())

    def due(self, interval, share=1.0):
        """Whether what is done every `interval` steps, or for 0 ten times a run, is due now.

        share: the part of the minutes, where they are limited, that evaluations may have taken.
        """
        if self.last or interval:
            return self.last or self.step % interval == 0
        spares = not self.limits[1] or self.evaluating <= share * self.minutes
        return spares and int(10 * self.done()) > self.tenth

    def left(self, pace):
        """(steps, seconds) to the end, at `pace` seconds a step."""
        iters, minutes = self.limits
        seconds = max(0.0, 60 * (minutes - self.minutes))
        ends = [(iters - self.step, (iters - self.step) * pace)] * (iters > 0)
        return min(ends + [(seconds / pace, seconds)] * (minutes > 0))
