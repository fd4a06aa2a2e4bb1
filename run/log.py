"""The log of a training run: progress bar, printed lines, log.jsonl beside the checkpoint.

On request it also goes to wandb or tensorboard, and a trace of a few steps is written for
chrome://tracing or perfetto.dev.
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import plural
from data.loader import sequences_before
from lib.bar import bar_is_off
from lib.device import flops_of_step, matmul_flops, mean_length, nominal_flops
from lib.files import optional, to_json, whole_file, writing
from run.checkpoint import set_run_aside
from run.resume import best_of

DEFAULTS = {
    "wandb": "",  # the wandb project to log training to as well
    "tensorboard": False,  # also write the log to out_dir/tensorboard
    "profile": 0,  # the number of steps that torch's profiler records in out_dir/trace.json
}
MORE = "give more --max_minutes, or --compile=False"
OFTEN = 100  # passes over the text after which most runs overfit (experiments/epochs.py)


class Log:
    """Only the first process (is_main) prints or writes. clock: the budget.Clock of the run."""

    def __init__(self, config, model, dataset, clock, team):
        self.config, self.is_main, self.causal = config, team.rank == 0, model.causal
        self.parameters = model.n_parameters()
        self.flops = float(flops_of_step(config, model, dataset))
        self.peak = matmul_flops(team.device, team.autocast) * team.world  # per second, in total
        self.tokens_per_step = config["batch_size"] * mean_length(config, dataset)  # a mean
        self.tokens_per_epoch = dataset.n * dataset.block_size
        self.path = Path(config["out_dir"]) / "log.jsonl"
        self.clock, self.start, self.skipped, self.sinks = clock, clock.start, 0, []
        if self.start and not clock.tokens:  # missing in older checkpoints
            steps = sequences_before(config, self.start) / config["batch_size"]  # at today's size
            clock.tokens, clock.flops = steps * self.tokens_per_step, steps * self.flops
        self.best = math.inf, 0  # nats per token and step of best.pt
        self.began, self.fifth, self.evaluations = time.perf_counter(), None, []
        self.resources = contextlib.ExitStack()  # to be closed at the end
        if self.is_main:
            self.begin()
        profiled = config["profile"] if self.is_main else 0  # steps
        self.profiler = profiler(profiled, self.path.with_name("trace.json"))
        total = config["max_iters"] or None  # write_step estimates it if minutes are limited
        steps = {"total": total, "initial": self.start, "unit": "step"}
        self.bar = tqdm(**steps, disable=bar_is_off(self.is_main))
        self.restart(self.start)

    def begin(self):
        """Open the sinks, and drop log entries after `start`, which a resumed run writes again.

        A new run first moves an older one aside.
        """
        for key, sink in {"wandb": wandb_sink, "tensorboard": tensorboard_sink}.items():
            if self.config[key]:
                self.sinks.append(sink(self.config, self.path.parent, self.start, self.resources))
        lines = []
        if self.start:
            self.best = best_of(self.config)
        if not self.start and (aside := set_run_aside(self.path.with_name("ckpt.pt"))):
            print(f"the run that was here is kept: --ckpt={aside}")
        if self.start and self.path.is_file():
            lines = self.path.read_text("utf8", errors="replace").splitlines(keepends=True)
        with whole_file(self.path) as temporary:
            text = "".join(line for line in lines if step_of(line) <= self.start)
            temporary.write_text(text, encoding="utf8")

    def __enter__(self):
        self.resources.enter_context(self.bar)
        self.resources.enter_context(self.profiler)
        return self

    def __exit__(self, *error):
        if self.is_main and error[0] is None:
            self.say_end()
        return self.resources.__exit__(*error)

    def say_start(self, model, dataset, val, ema, order=""):
        """Print what is trained and how it is evaluated; order: the one that it is evaluated in."""
        unit, by = "example" if self.config["example_width"] else "block", "exact"
        if order:
            by = f"along the order {order}"
        elif not self.causal:
            by = f"upper bound by {plural(self.config['eval_draws'], 'draw')} each"
            is_other = self.config["attention"] == "order" and self.config["order"] != "uniform"
            by += f" of uniform orders, not of its own, {self.config['order']}" if is_other else ""
        size = f"{plural(len(dataset.tokens), 'training token')} in {plural(dataset.n, unit)}"
        self.say(f"{self.parameters:,} parameters; {size}")
        if val:
            held = f"{plural(len(val.requests), unit)} of {self.config['data']} val"
            self.say(f"evaluations: {held}, {by}, {'averaged' if ema else 'raw'} weights")
        else:
            self.say(f"no evaluations: {self.config['data']} holds nothing out")
        card, nominal = nominal_flops(model.device)
        if card:
            stated = f"{nominal / 1e12:.0f} by its data sheet" if nominal else "no figure is known"
            peak = f"{self.peak / 1e12:.0f} TFLOP/s in matrix products, all processes"
            self.say(f"{card}: {peak}, which is the peak below; bfloat16, one card: {stated}")
        if self.start:
            last = f" of {self.config['max_iters']}" if self.config["max_iters"] else ""
            at = f"at step {self.start}{last}, {self.minutes()}"
            self.say(f"resuming {self.path.with_name('ckpt.pt')} {at}")
            if self.clock.last:
                more = "a larger --max_iters= or --max_minutes= goes on"
                self.say(f"it is finished; --out_dir= begins another, {more}")

    def say(self, text):
        """Print text; do not fail if nobody reads it any more (head, a closed terminal)."""
        if self.is_main and sys.stdout:  # None in a program without a console
            coding = sys.stdout.encoding or "utf8"
            with contextlib.suppress(OSError):
                self.bar.write(text.encode(coding, "replace").decode(coding))

    def minutes(self):
        limit = f" of {self.config['max_minutes']:g}" if self.config["max_minutes"] else ""
        return f"{self.clock.minutes:.1f}{limit} min"

    def step(self, loss):
        """Count a finished step. After the tenth, print how long the run will take."""
        self.bar.update()
        self.clock.tokens += self.tokens_per_step
        self.clock.flops += self.flops
        made = self.clock.step - self.start
        if self.is_main and made in (5, 10):  # by the fifth, everything is compiled
            loss.item()  # waits for the device
            self.fifth = self.fifth or time.perf_counter()
            if made == 10:
                self.say_plan(self.pace())
        if self.config["profile"] and self.is_main:
            self.profiler.step()

    def pace(self):
        """Seconds per step, including evaluations, excluding compilation once that is over."""
        made, now = self.clock.step - self.start, time.perf_counter()
        compiled = self.fifth and made > 5
        return (now - self.fifth) / (made - 5) if compiled else (now - self.began) / made

    def say_plan(self, pace):
        """Print the plan after ten steps. pace: seconds per step from now on."""
        steps, seconds = self.clock.left(pace)
        tokens = self.clock.tokens + steps * self.tokens_per_step
        size = f"{self.parameters:,} parameters, {self.tokens_per_step:,.0f} tokens a step"
        left = f"{seconds / 60:.1f} minutes" if seconds > 60 else f"{seconds:.0f} s"
        end = f"{plural(round(steps), 'step')} and {left} to the end"
        readings = f"{tokens / self.tokens_per_epoch:,.1f} times the text"
        is_often = tokens > OFTEN * self.tokens_per_epoch
        advice = "; so often that a shorter run may end better" if is_often else ""
        total = f"{tokens / 1e6:,.1f}M tokens in all, {readings}{advice}"
        self.say(f"{size}; about {end}, then {total}")
        if self.config["compile"] and not self.start and self.clock.spent() > 1 / 3:
            self.say(f"of {self.minutes()} most were compilation; {MORE}")

    def say_end(self):
        """Say at the end of a run if most of it was compilation, or if held-out text got worse.

        The last evaluation must be worse than the best by more than the interval, which is wide
        for few sequences, or by a tenth.
        """
        made, (best, step) = self.clock.step - self.start, self.best
        nats = [evaluation["nats_per_token"] for evaluation in self.evaluations]
        if self.config["compile"] and self.clock.spent() >= 1 and 0 < made < 10:
            self.say(f"{plural(made, 'step')} in {self.minutes()}, most of it compilation; {MORE}")
        elif nats and max(self.evaluations[-1]["interval"][0], nats[-1] / 1.1) > best:
            number = "NLL" if self.causal else "NELBO"
            there = f"{best:.3f} at step {step} ({self.path.with_name('best.pt')})"
            self.say(f"the lowest held-out {number} was {there}; the last is {nats[-1]:.3f}")
        elif len(nats) > 1 and nats[-1] > nats[0] == min(nats):
            self.say("held-out text is worse than it was at first: try a lower --learning_rate=")

    def skip(self, step):
        """Say that a step was skipped because its gradient was not finite."""
        self.skipped += 1
        result = f"so the weights stay as they are ({plural(self.skipped, 'such step')})"
        self.say(f"step {step}: the gradient is not finite, {result}")

    def write(self, entry):
        """Append an entry, a dict, to log.jsonl and send its numbers to the sinks."""
        if not self.is_main:
            return
        if "nats_per_token" in entry and self.best[1]:
            entry = entry | {"best_step": self.best[1]}  # the step of best.pt
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        with writing(self.path), open(self.path, "a", encoding="utf8") as file:
            file.write(to_json(entry) + "\n")
        part = "val" if "nats_per_token" in entry else "train"
        if part == "val":
            self.evaluations.append(entry)
        for sink in self.sinks:
            sink(entry["step"], {f"{part}/{key}": value for key, value in numbers.items()})

    def write_step(self, step, loss, nelbo, rate, memory):
        """Write and show an entry about training, with the tokens and operations so far.

        loss: the training loss; nelbo: of the same batch, with the bound's weights. rate: the
        learning rate. memory: MiB of the process that uses most. mfu, model FLOPs utilisation, is
        the fraction of the machine's speed in matrix products that training reaches.
        """
        now = time.perf_counter()
        per_second = (step - self.last_step) / (now - self.last_time)  # steps
        steps, left = self.clock.left(self.pace())
        self.bar.total = round(step + steps)
        tokens, mfu = per_second * self.tokens_per_step, per_second * self.flops / self.peak
        speed = f"{tokens:.0f} tokens/s, {mfu:.0%} of peak"
        speed += f", {memory:.0f} MiB" if math.isfinite(memory) else ""  # unknown on Windows
        bound = "" if f"{loss:.3f}" == f"{nelbo:.3f}" else f", nelbo {nelbo:.3f}"
        text = f"loss {loss:.3f}{bound}, {self.minutes()}, {speed}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            self.say(f"step {step} of about {step + steps:.0f}: {text}, {left:.0f} s left")
        entry = {"step": step, "loss": loss, "nelbo": nelbo, "learning_rate": rate}
        entry |= {"tokens": round(self.clock.tokens), "flops": self.clock.flops}
        entry |= {"tokens_per_second": tokens, "mfu": mfu, "memory_mib": memory}
        entry |= {"minutes": self.clock.minutes, "seconds_left": left}
        entry |= {"skipped": self.skipped} if self.skipped else {}
        self.write(entry)
        self.restart(step)

    def restart(self, step):
        """Restart the measurement of speed, so that a preceding evaluation does not count."""
        self.last_time, self.last_step = time.perf_counter(), step


def step_of(line):
    """The step of a line of log.jsonl; infinite for a line cut off by a kill or a full disk."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def profiler(steps, path):
    """A context that records `steps` steps after the first two and writes the trace to `path`."""
    if not steps:
        return contextlib.nullcontext()

    def write(profile):
        with whole_file(path) as temporary:
            profile.export_chrome_trace(str(temporary))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


def wandb_sink(config, folder, start, resources):
    """sink(step, numbers) for the project config["wandb"]; all starts of a run form a group."""
    wandb = optional("wandb", "--wandb")
    name = f"{folder.name} from {start}"
    run = wandb.init(project=config["wandb"], group=folder.name, name=name, config=config)
    resources.callback(run.finish)
    return lambda step, numbers: run.log(numbers, step=step)


def tensorboard_sink(config, folder, start, resources):
    """sink(step, numbers) for out_dir/tensorboard; it purges the entries after `start`."""
    SummaryWriter = optional("torch.utils.tensorboard", "--tensorboard").SummaryWriter
    writer = resources.enter_context(SummaryWriter(folder / "tensorboard", purge_step=start + 1))
    return lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items()]
