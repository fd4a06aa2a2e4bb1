"""What a training run says: a progress bar, lines on the screen, log.jsonl beside the checkpoint.

On demand the same goes to wandb or tensorboard, and a trace of a few steps is written for
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

from lib.bar import bar_is_off
from lib.checkpoint import set_aside
from lib.device import nominal_flops, step_flops
from lib.files import append_line, optional, to_json, whole_file
from lib.resume import seen

MORE = "give more --max_minutes, or --compile=False"


class Log:
    """Only the first process (is_main) says anything. flops: of a step; peak: of all, a second.

    clock: the budget.Clock of the run.
    """

    def __init__(self, config, dataset, clock, flops, peak, is_main):
        self.config, self.flops, self.peak, self.is_main = config, flops, peak, is_main
        self.tokens = config["batch_size"] * mean_length(config, dataset)  # of a step
        self.path = Path(config["out_dir"]) / "log.jsonl"
        self.clock, self.start, self.skipped, self.sinks = clock, clock.start, 0, []
        self.began, self.fifth, self.held_out = time.perf_counter(), None, []  # [(nats, step)]
        self.opened = contextlib.ExitStack()
        if is_main:
            self.begin()
        self.profiler = profiler(config["profile"] * is_main, self.path.with_name("trace.json"))
        total = config["max_iters"] or None  # where time decides, `speed` knows more
        steps = {"total": total, "initial": self.start, "unit": "step"}
        self.bar = tqdm(**steps, disable=bar_is_off(is_main))
        self.restart(self.start)

    def begin(self):
        """Open the sinks, and drop the entries past `start`, which a resumed run makes again.

        A run that begins anew moves an older one aside.
        """
        for key, sink in {"wandb": wandb_sink, "tensorboard": tensorboard_sink}.items():
            if self.config[key]:
                self.sinks.append(sink(self.config, self.path.parent, self.start, self.opened))
        lines = []
        if not self.start and (aside := set_aside(self.path.with_name("ckpt.pt"))):
            print(f"the run that was here is kept: --ckpt={aside}")
        if self.start and self.path.is_file():
            lines = self.path.read_text("utf8", errors="replace").splitlines(keepends=True)
        with whole_file(self.path) as temporary:
            text = "".join(line for line in lines if step_of(line) <= self.start)
            temporary.write_text(text, encoding="utf8")

    def __enter__(self):
        self.opened.enter_context(self.bar)
        self.opened.enter_context(self.profiler)
        return self

    def __exit__(self, *error):
        if self.is_main and error[0] is None:
            self.say_end()
        return self.opened.__exit__(*error)

    def say_start(self, model, dataset, val, weights):
        unit = "examples" if self.config["example_width"] else "blocks"
        data, by = f"{unit} of {self.config['data']} val", "exact"
        if self.config["objective"] != "ar":
            by = f"upper bound by {self.config['eval_draws']} draws each"
        size = f"{len(dataset.tokens):,} training tokens in {dataset.n:,} {unit}"
        self.parameters = model.n_parameters()
        self.say(f"{self.parameters:,} parameters; {size}")
        if val:
            self.say(f"evaluations: {len(val.requests)} {data}, {by}, {weights} weights")
        else:
            self.say(f"no evaluations: {self.config['data']} holds nothing out")
        card, nominal = nominal_flops(model.device)
        if card:
            stated = f"{nominal / 1e12:.0f} by its data sheet" if nominal else "no figure is known"
            peak = f"{self.peak / 1e12:.0f} TFLOP/s in matrix products, all processes"
            self.say(f"{card}: {peak}, which is the peak below; bfloat16, one card: {stated}")
        if self.start:
            last = f" of {self.config['max_iters']}" * (self.config["max_iters"] > 0)
            at = f"at step {self.start}{last}, {self.minutes()}"
            self.say(f"resuming {self.path.with_name('ckpt.pt')} {at}")
            if self.clock.last:
                more = "a larger --max_iters= or --max_minutes= goes on"
                self.say(f"it is finished; --out_dir= begins another, {more}")

    def say(self, text):
        """Print it. A run outlives who reads what it says: head, or a terminal that is closed."""
        if self.is_main and sys.stdout:  # a program with windows has none
            coding = sys.stdout.encoding or "utf8"
            with contextlib.suppress(OSError):
                self.bar.write(text.encode(coding, "replace").decode(coding))

    def minutes(self):
        limit = self.config["max_minutes"]
        return f"{self.clock.minutes:.1f}{f' of {limit:g}' * (limit > 0)} min"

    def step(self, loss):
        """One step of training is done. After the tenth a line says how long the run will be."""
        self.bar.update()
        made = self.clock.step - self.start
        if self.is_main and made in (5, 10):  # compiled by the fifth
            loss.item()  # waits for the device
            self.fifth = self.fifth or time.perf_counter()
            if made == 10:
                self.say_plan(self.pace())
        if self.config["profile"] and self.is_main:
            self.profiler.step()

    def pace(self):
        """Seconds a step, evaluations included, and compilation left out as soon as it is over."""
        made, now = self.clock.step - self.start, time.perf_counter()
        return (
            (now - self.fifth) / (made - 5)
            if self.fifth and made > 5
            else (now - self.began) / made
        )

    def say_plan(self, pace):
        """The line after ten steps, with `pace` seconds a step from now on."""
        steps, seconds = self.clock.left(pace)
        tokens = (self.clock.step + steps) * self.tokens
        size = f"{self.parameters:,} parameters, {self.tokens:,.0f} tokens a step"
        left = f"{seconds / 60:.1f} minutes" if seconds > 60 else f"{seconds:.0f} seconds"
        end = f"{steps:,.0f} steps and {left} to the end"
        self.say(f"{size}; about {end}, then {tokens / 1e6:,.1f}M tokens in all")
        if self.clock.spent() > 1 / 3:
            self.say(f"of {self.minutes()} most were compilation; {MORE}")

    def say_end(self):
        """What is to be known of a run that has ended and did not go as it should."""
        made, (best, step) = self.clock.step - self.start, min(self.held_out, default=(0.0, 0))
        if self.clock.spent() >= 1 and made < 10:
            self.say(f"{made} steps in {self.minutes()}, most of it compilation; {MORE}")
        elif self.held_out and self.held_out[-1][0] > best + 0.05:
            now = f"with {best:.3f} nats at step {step}, and has {self.held_out[-1][0]:.3f} now"
            self.say(f"held-out text was best {now}: fewer steps, or more text, are better")

    def skip(self, step):
        """A step's gradient was not finite, and it was skipped."""
        self.skipped += 1
        kept = f"so the weights stay as they are ({self.skipped} such steps)"
        self.say(f"step {step}: the gradient is not finite, {kept}")

    def write(self, entry):
        """One line of log.jsonl. UserError on a full disk."""
        if not self.is_main:
            return
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        append_line(self.path, to_json(entry))
        part = "val" if "nats_per_token" in entry else "train"
        if part == "val":
            self.held_out.append((entry["nats_per_token"], entry["step"]))
        for sink in self.sinks:
            sink(entry["step"], {f"{part}/{key}": value for key, value in numbers.items()})

    def speed(self, step, loss, nelbo, rate, memory):
        """One entry. rate: of learning; memory: MiB of the process that has most.

        loss: as trained; nelbo: of the same batch, by the weights of the bound. tokens, flops: of
        all sequences seen. mfu: the part of the machine's speed in matrix products that is used.
        """
        now = time.perf_counter()
        per_second = (step - self.last_step) / (now - self.last_time)  # steps
        steps, left = self.clock.left(self.pace())
        self.bar.total = round(step + steps)
        tokens, mfu = per_second * self.tokens, per_second * self.flops / self.peak
        speed = f"{tokens:.0f} tokens/s, {mfu:.0%} of peak"
        speed += f", {memory:.0f} MiB" if math.isfinite(memory) else ""  # Windows does not say
        bound = "" if f"{loss:.3f}" == f"{nelbo:.3f}" else f", nelbo {nelbo:.3f}"
        said = f"loss {loss:.3f}{bound}, {self.minutes()}, {speed}"
        self.bar.set_postfix_str(said)
        if self.bar.disable:
            self.say(f"step {step} of about {step + steps:.0f}: {said}, {left:.0f} s left")
        counted = seen(self.config, step) / self.config["batch_size"]  # in steps of today's size
        entry = {"step": step, "loss": loss, "nelbo": nelbo, "learning_rate": rate}
        entry |= {"tokens": round(counted * self.tokens), "flops": counted * self.flops}
        entry |= {"tokens_per_second": tokens, "mfu": mfu, "memory_mib": memory}
        entry |= {"minutes": self.clock.minutes, "seconds_left": left}
        entry |= {"skipped": self.skipped} if self.skipped else {}
        self.write(entry)
        self.restart(step)

    def restart(self, step):
        """Start the clock anew: what came before, an evaluation say, is not training time."""
        self.last_time, self.last_step = time.perf_counter(), step


def step_of(line):
    """The step of an entry; infinite for a line that a killed process or a full disk has torn."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def flops_of_step(config, model, dataset):
    """Operations of a training step: forward and backward, of the positions that are predicted."""
    share, L = 1.0, dataset.block_size
    if config["example_width"]:
        padding = config["attention"] != "causal"
        share = dataset.counted(range(dataset.n), padding).mean() / L
    sequences = config["batch_size"] * mean_length(config, dataset) / L
    return step_flops(model, sequences, L, share)


def mean_length(config, dataset):
    """Tokens of a sequence, in the mean over steps that random_length cuts and those it does not.

    Of examples all, the padding included.
    """
    L = dataset.block_size
    return L - config["random_length"] * (L - 1) / 2


def profiler(steps, path):
    """A context that follows `steps` steps, after two left out, and writes them to path."""
    if not steps:
        return contextlib.nullcontext()

    def write(profile):
        with whole_file(path) as temporary:
            profile.export_chrome_trace(str(temporary))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


def wandb_sink(config, folder, start, opened):
    """sink(step, numbers) into the project config["wandb"]; the starts of one run are a group."""
    wandb = optional("wandb", "--wandb")
    name = f"{folder.name} from {start}"
    run = wandb.init(project=config["wandb"], group=folder.name, name=name, config=config)
    opened.callback(run.finish)
    return lambda step, numbers: run.log(numbers, step=step)


def tensorboard_sink(config, folder, start, opened):
    """sink(step, numbers) into out_dir/tensorboard; the entries past `start` are purged."""
    SummaryWriter = optional("torch.utils.tensorboard", "--tensorboard").SummaryWriter
    writer = opened.enter_context(SummaryWriter(folder / "tensorboard", purge_step=start + 1))
    return lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items()]
