"""Eight minutes on a card: is everything right there, how fast is it, and what will a preset take?

    python -m experiments.gpu                           on a GPU; the same again: what is missing
    python -m experiments.gpu --device=cpu --quick      toy sizes, to see that every line comes

Each of PARTS, the most important first, has a process of its own and a limit in seconds: what a
card does not recover from, or what hangs, ends one part. A line is told when it is measured; one
that fails says why, and the next goes on. gpu.json, gpu.md and gpu.jsonl, from which the same
command goes on, are written after each part.

How it is measured. The clock is the card's own (experiments/timing.seconds_of), after calls that
compile and warm up: the median of three turns of as many calls in a row as the part's time allows.
first_step_s is all that comes before the second step: network, optimizer and compilation, by what
torch has in its cache. memory_GB is the most that tensors have taken since the line began.
of_nominal and of_measured are utilisation, lib.device.step_flops, as a part of the data sheet's
bfloat16 and of a plain product measured here. on_one_batch is the speed with the loader over that
without. A sample is scaled up from some of its calls, with as many tokens due in each as in those
of the whole. --quick traces programs, and does not compile them.
"""

import contextlib
import functools
import gc
import itertools
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

import config as settings
import diffusion
import train
from data import loader
from experiments import device_checks, device_speed, loading, results, scaling_up
from experiments.timing import seconds_of
from lib import device as devices
from lib import parallel, program
from lib.optim import update_ema
from run import resume

DEFAULTS = {
    "minutes": 8.0,  # in all; the limits of the parts are in proportion
    "only": "",  # parts, with commas between; empty: all
    "resume": True,  # keep what this code has measured on this card; False: measure it again
}

ROOT = Path(__file__).resolve().parent.parent
# Micro-batches of presets, from large to small.
MICRO = {"radd_small": (64, 16, 8), "smdm_170m": (16, 4), "gpu_small": (128, 32)}
TOY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "mlp_width": 0, "block_size": 32}  # with --quick
SHARES = ("of_nominal", "of_measured", "of_all", "idle")  # parts of one


# ---- 1. A part at work ---------------------------------------------------------------------------


class Part:
    """Where a part measures and how long it may take; tell: gets a dict for each line."""

    def __init__(self, config, seconds, tell):
        self.config, self.quick, self.seconds, self.tell = config, config["quick"], seconds, tell
        self.device, self.autocast = devices.machine(config)
        self.team = parallel.Team(1, 0, self.device, self.autocast)
        self.on_cuda = self.device.type == "cuda"

    def __call__(self, what, measure, *arguments):
        """Tell the line `what`: the dict measure(self, *arguments), or why there is none."""
        torch.compiler.reset()  # or programs are made for changing shapes, and not more than a few
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        line = {"what": what}
        try:
            line |= measure(self, *arguments)
            if self.on_cuda:
                line = {"memory_GB": torch.cuda.max_memory_allocated(self.device) / 1e9} | line
        except Exception as error:  # of a kernel, of torch, of ours: it is told, and the next comes
            line["failed"] = reason(error)
        odd = {k: str(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        self.tell(line | odd)  # JSON has no nan
        return line

    def some(self, full, toy):
        return toy if self.quick else full

    def seconds_of(self, function, share=0.02):
        """Seconds of a call. All calls together take about this share of the part's time."""
        function()
        once = seconds_of(function, self.device)
        if self.quick:
            return once
        calls = min(1000, max(1, int(share * self.seconds / 3 / once)))
        return statistics.median(seconds_of(function, self.device, calls) for _ in range(3))

    def of_nominal(self, speed):
        """{of_nominal} of operations a second in bfloat16, where the card's data sheet is known."""
        _, nominal = devices.nominal_flops(self.device)
        return {"of_nominal": speed / nominal} if nominal else {}

    def preset(self, name, **keys):
        """The config of a preset; with --quick that of a toy of its kind."""
        words = [str(ROOT / f"configs/{name}.py"), f"--dtype={self.config['dtype']}"]
        config = resume.with_size(settings.parse(words, *train.MODULES))
        config |= {"vocab_size": scaling_up.PRESETS[name], "attention": "full", "example_width": 0}
        return config | self.some({}, TOY | {"vocab_size": 1100}) | keys

    @contextlib.contextmanager
    def blocks(self, config):
        """Training blocks of a random text in a file."""
        with tempfile.TemporaryDirectory() as place:
            folder, n = Path(place, "data"), self.some(10**7, 10**6)
            loading.write_tokens(folder, n, 1, config["vocab_size"])
            yield loader.Blocks(loader.Tokens(folder, "train"), config["block_size"], 1)

    def stepper(self, config):
        """(step, model) of a run that begins: step(batches) is one step as train.main does it."""
        model, ema, optimizers = train.build(config, self.team)
        loss_of = diffusion.Loss(model, config["objective"])
        loss_of, count = (
            parallel.prepare_for_training(loss_of, config, self.team),
            itertools.count(),
        )

        def step(batches, config=config):
            number = next(count)
            train.set_learning_rate(optimizers, train.learning_rate(number, config))
            train.train_step(config, number, batches, loss_of, optimizers, self.team)
            if ema:
                update_ema(ema, model, config["ema"], 1)

        return step, model


def reason(error):
    """An exception in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return "out of memory" if device_speed.is_full(error) else text


# ---- 2. The parts --------------------------------------------------------------------------------


def right(part):
    for what, check, *arguments in device_checks.checks(part.quick):
        part(what, check, *arguments)


def trains(name):
    return functools.partial(device_speed.training, name=name, micros=MICRO[name])


PARTS = {  # the seconds that each may take of eight minutes, and what it does
    "machine": (10, device_speed.machine),
    "right": (75, right),
    "radd_small": (115, trains("radd_small")),
    "where": (45, device_speed.where),
    "sampling": (100, device_speed.sampling),
    "smdm_170m": (55, trains("smdm_170m")),
    "gpu_small": (40, trains("gpu_small")),
    "largest": (25, device_speed.largest),
    "loader": (10, device_speed.loading_speed),
}


# ---- 3. A process for each part ------------------------------------------------------------------

REST = {"what": "(the rest)", "ended": True}  # of a part that has not come to its end


def lines_of(config, measure, seconds):
    """Yield the lines of measure(part), made in another process, which ends with its time."""
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        ours = ["experiments.device_speed", "experiments.device_checks"]
        context.set_forkserver_preload([*ours, "torch._dynamo", "torch.distributed.fsdp"])
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, config, measure, seconds))
    process.start()
    there.close()
    ends = time.monotonic() + seconds
    try:
        while here.poll(max(0.0, ends - time.monotonic())):
            yield here.recv()
        yield REST | {"failed": f"left out, the {seconds:.0f} seconds were over"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield REST | {"failed": f"left out, the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def serve(pipe, config, measure, seconds):
    """In a process of its own, which says nothing but its lines."""
    with open(os.devnull, "w", encoding="utf8") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.redirect_stderr(nowhere):
            gc.freeze()  # what is loaded by now need not be looked through before each line
            at_work(Part(config, seconds, pipe.send), measure)


def at_work(part, measure):
    """measure(part); with --quick programs are traced, as compiling takes longer than all else."""
    traced = functools.partial(torch.compile, backend="eager")
    try:
        with mock.patch("torch.compile", traced) if part.quick else contextlib.nullcontext():
            measure(part)
    except Exception as error:  # outside a line; or the card is lost to this process
        part.tell(REST | {"failed": reason(error)})


# ---- 4. The report -------------------------------------------------------------------------------


def shown(line):
    """A line's figures as text."""
    if "failed" in line:
        return f"FAILED: {line['failed']}"
    words = ["WRONG"] if line.get("right") is False else []
    for key, value in line.items():
        if isinstance(value, str):
            if key != "what":
                words.append(f"{key} {value}")
        elif key != "right":
            form = "{:.1%}" if key in SHARES else "{:,.0f}" if abs(value) >= 1000 else "{:.3g}"
            words.append(f"{key} {form.format(value)}")
    return ", ".join(words)


def best_of(lines, key, what=""):
    """The line with the most of the key, of those whose `what` begins so; None if there is none."""
    lines = [line for line in lines if key in line and line["what"].startswith(what)]
    return max(lines, key=lambda line: line[key], default=None)


def hours(name, machine, speed):
    """(Hours of the whole preset at a speed in tokens a second, what its comment says of them)."""
    path = ROOT / f"configs/{name}.py"
    preset = settings.read_preset(path)
    tokens = preset["max_iters"] * preset["batch_size"] * preset["block_size"]
    took, text = tokens / speed / 3600, re.sub(r"\s*\n#\s*", " ", path.read_text("utf8"))
    for number, card in re.findall(r"([\d.]+) on one ([\w ]+)", text):
        if re.search(rf"\b{card}\b", machine):
            near = "confirmed" if abs(took / float(number) - 1) < 0.1 else "not confirmed"
            return took, f"{number} computed for one {card}: {near}"
    return took, "none computed for this card"


def memory(name, line):
    """GB of a training line, and what experiments/scaling_up.py computes for it."""
    config, net = scaling_up.preset(name)
    micro = int(re.search(r"micro-batch (\d+)", line["what"])[1])
    computed = scaling_up.memory(config, net, "ddp", 1, micro)["total"] / 1e9
    return f"{line['memory_GB']:.1f} ({computed:.1f} computed, not compiled)"


def summary(about, lines_of_part):
    """The table for README: what is right, how fast training and sampling are, hours of presets."""
    head, rows = f"measured on {about['machine']} by commit {about['commit']}", []
    checks = [line for line in lines_of_part.get("right", []) if not line.get("ended")]
    if checks:
        count = sum(line.get("right", False) for line in checks)
        rows.append({head: "right against the CPU", "": f"{count} of {len(checks)} checks"})
    for name in MICRO:
        if best := best_of(lines_of_part.get(name, []), "tokens_per_second"):
            rows.append({head: f"training {name}, {best['what']}", "": shown(best)})
            took, stated = hours(name, about["machine"], best["tokens_per_second"])
            rows.append({head: f"hours of {name}", "": f"{took:.1f} ({stated})"})
        for line in lines_of_part.get(name, []):
            if "memory_GB" in line:
                rows.append({head: f"GB of {name}, {line['what']}", "": memory(name, line)})
    for line in lines_of_part.get("sampling", []):
        if "seconds_a_sample" in line:
            rows.append({head: f"sampling, {line['what']}", "": shown(line)})
    return results.table("For README", rows) if rows else ""


def write(config, about, records):
    """gpu.json, a flat dict, and gpu.md, the lines and what README takes from them."""
    parts = {name: records[name] for name in PARTS if name in records}
    figures, texts = dict(about), []
    for name, record in parts.items():
        figures[f"{name}: seconds"] = record["seconds"]
        for line in record["lines"]:
            figures |= {f"{name}: {line['what']}: {k}": v for k, v in line.items() if k != "what"}
        rows = [{"what": line["what"], "measured": shown(line)} for line in record["lines"]]
        texts.append(results.table(f"{name}, {record['seconds']:.0f} s", rows)) if rows else None
    texts.append(summary(about, {name: record["lines"] for name, record in parts.items()}))
    results.write(config, "gpu", figures, "\n".join(texts))
    return figures, texts[-1]


def main(config):
    """Measure the parts that are missing; print, write and return the figures, a flat dict."""
    began, path = time.monotonic(), Path(config["results"], "gpu.jsonl")
    names = config["only"].split(",") if config["only"] else list(PARTS)
    for name in names:
        settings.choose("only", name, PARTS)
    settings.require(config["minutes"] > 0, f"minutes must be above 0, not {config['minutes']}")
    devices.machine(config)  # or a UserError
    about, *_ = lines_of(config, measured_on, 300)
    settings.require("machine" in about, f"the device does not work: {about.get('failed')}")
    code = subprocess.run(["git", "diff", "HEAD"], capture_output=True, check=False, cwd=ROOT)
    mark = results.mark(about, config["quick"], str(code.stdout))
    records = [record for record in results.kept(path) if record["mark"] == mark]
    records = {record["part"]: record for record in records} if config["resume"] else {}
    figures, text = write(config, about, records)
    for name in names:
        if name in records and not any(line.get("ended") for line in records[name]["lines"]):
            print(f"{name}: measured before", flush=True)
            continue
        limit, measure = PARTS[name]
        start, lines = time.monotonic(), []
        left = 60 * config["minutes"] - (start - began)
        for line in lines_of(config, measure, max(0.0, min(limit * config["minutes"] / 8, left))):
            lines.append(line)
            print(f"{name}: {line['what']}: {shown(line)}", flush=True)
        records[name] = {"part": name, "seconds": time.monotonic() - start, "lines": lines}
        results.keep(path, records[name] | {"mark": mark})
        figures, text = write(config, about, records)
    print(f"\n{text}")
    return figures


def measured_on(part):
    part.tell(results.about(part.device))


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
