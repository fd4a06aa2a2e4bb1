"""What a training run tells of itself: a progress bar, lines on the screen, log.jsonl beside the checkpoint, and on demand
the same to wandb or tensorboard, and a trace of a few steps for chrome://tracing or perfetto.dev."""

import contextlib
import json
import math
import resource
import sys
import time

import torch
from tqdm import tqdm

from config import UserError, sweep, whole_file


class Journal:
    """Only the first process tells (`told`). A resumed run drops the entries past `start`, which it will make again."""

    def __init__(self, config, path, start, flops, peak, told):
        self.config, self.flops, self.peak, self.told = config, flops, peak, told  # flops of a step, peak a second
        self.log = path.with_name("log.jsonl")
        self.start, self.began, self.skipped, self.sinks = start, time.perf_counter(), 0, []
        self.opened = contextlib.ExitStack()
        if told:
            sweep(path.parent)
            lines = self.log.read_text(errors="replace").splitlines(keepends=True) if start and self.log.is_file() else []
            with whole_file(self.log) as temporary:
                temporary.write_text("".join(line for line in lines if step_of(line) <= start))
            for key, sink in {"wandb": wandb_sink, "tensorboard": tensorboard_sink}.items():
                if config[key]:
                    self.sinks.append(sink(config, path.parent, start, self.opened))
        self.profiler = profiler(config["profile"] * told, path.with_name("trace.json"))
        self.bar = tqdm(total=config["max_iters"], initial=start, disable=not told, unit="step")
        self.restart(start)

    def __enter__(self):
        self.opened.enter_context(self.bar)
        self.opened.enter_context(self.profiler)
        return self

    def __exit__(self, *error):
        return self.opened.__exit__(*error)

    def step(self):
        """One step of training is done."""
        self.bar.update()
        if self.config["profile"] and self.told:
            self.profiler.step()

    def say(self, text):
        if self.told:
            self.bar.write(text)

    def skip(self, step):
        """A step's gradient was not finite, and it was stepped over."""
        self.skipped += 1
        self.say(f"step {step}: the gradient is not finite, so the weights stay as they are ({self.skipped} such steps)")

    def write(self, entry):
        """One line of log.jsonl; a number that JSON lacks (an infinite error bar) is null. UserError on a full disk."""
        if self.told:
            odd = {key: None for key, value in entry.items() if isinstance(value, float) and not math.isfinite(value)}
            try:
                with open(self.log, "a") as file:
                    file.write(json.dumps(entry | odd) + "\n")
            except OSError as error:
                raise UserError(f"cannot write {self.log}: {error.strerror}") from None
            part = "val" if "nats_per_token" in entry else "train"
            for sink in self.sinks:
                numbers = {f"{part}/{key}": value for key, value in entry.items() if isinstance(value, (int, float))}
                sink(entry["step"], numbers)

    def speed(self, step, loss, rate, memory):
        """One entry: loss a token, learning rate, tokens a second, the part of the machine's speed that was used, memory.

        memory: MiB of the process that has most. Time left is what the steps so far took, evaluations included.
        """
        now = time.perf_counter()
        per_second = (step - self.since) / (now - self.clock)
        left = (now - self.began) / (step - self.start) * (self.config["max_iters"] - step)
        tokens, mfu = self.config["batch_size"] * self.config["block_size"], per_second * self.flops / self.peak
        speed = f"{per_second * tokens:.0f} tokens/s, {mfu:.0%} of peak, {memory:.0f} MiB"
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed}")
        entry = {"step": step, "loss": loss, "learning_rate": rate, "tokens": step * tokens, "flops": step * self.flops}
        entry |= {"tokens_per_second": per_second * tokens, "mfu": mfu, "memory_mib": memory, "seconds_left": left}
        self.write(entry | ({"skipped": self.skipped} if self.skipped else {}))
        self.restart(step)

    def restart(self, step):
        """Starts the clock anew: what came before, an evaluation say, is not training time."""
        self.clock, self.since = time.perf_counter(), step


def step_of(line):
    """The step of an entry; infinite for a line that a killed process or a full disk has torn."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def peak_memory(device):
    """The most memory that this process has held so far, in MiB: on its card, or else altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def profiler(steps, path):
    """The context in which torch's profiler follows `steps` steps, after two that it leaves out, and writes them to path."""
    if not steps:
        return contextlib.nullcontext()

    def write(profile):
        with whole_file(path) as temporary:
            profile.export_chrome_trace(str(temporary))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


def wandb_sink(config, folder, start, opened):
    """sink(step, numbers) into a run of the project config["wandb"]; all starts of one out_dir are in one group."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs a package: pip install wandb") from None
    run = wandb.init(project=config["wandb"], group=folder.name, name=f"{folder.name} from {start}", config=config)
    opened.callback(run.finish)
    return lambda step, numbers: run.log(numbers, step=step)


def tensorboard_sink(config, folder, start, opened):
    """sink(step, numbers) into out_dir/tensorboard; what an earlier start wrote past `start` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    writer = opened.enter_context(SummaryWriter(folder / "tensorboard", purge_step=start + 1))
    return lambda step, numbers: [writer.add_scalar(key, value, step) for key, value in numbers.items()]
