"""Does a run survive being killed? SIGKILL at random moments, many times over a run.

    python -m experiments.survive --kills=100

A small model is trained with a checkpoint at every step, so that many of the kills hit a checkpoint
that is being written. After each kill the checkpoint has to be readable and no older than the last
one whose writing had ended. The process that follows resumes the run. In the end weights, averages,
optimizer state and the log have to be those of a run that was left alone, bit for bit.
"""

import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

import config as settings
import train
from data import writer
from data.tokenizer import Char
from experiments import results
from lib import program
from run import checkpoint, log

DEFAULTS = {
    "kills": 100,  # how many processes are killed; 1 or more
    "steps": 300,  # of the run in which they are
    "moments": 0,  # seed of the moments at which they are killed
}

TEXT = "the cat sat on the mat; a dog ran to the log, and the cat ran after it. " * 40
CLOCK = ("tokens_per_second", "mfu", "memory_mib", "seconds_left", "minutes")
KEYS = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4}
KEYS |= {"warmup_iters": 2, "ema": 0.9, "dropout": 0.1, "random_length": 0.2, "optimizer": "muon"}
KEYS |= {"compile": False, "log_interval": 1, "save_interval": 1, "keep": 2, "show_sample": False}
KEYS |= {"eval_sequences": 2, "eval_draws": 2, "device": "cpu", "dtype": "float32"}


def live(config, progress):
    """A process that trains until it is done or killed.

    progress: [steps done, steps saved, whether it is saving].
    """
    torch.set_num_threads(1)
    # The lock of tqdm is between processes, and outlives those that are killed.
    tqdm.set_lock(threading.RLock())
    log.matmul_flops = lambda *_: 1e9  # the speed of the machine does not matter here
    step_of, save = train.train_step, checkpoint.save

    def train_step(config, step, *rest):
        result = step_of(config, step, *rest)
        progress[0] = step + 1
        return result

    def saving(path, state, keep):
        progress[2] = 1
        save(path, state, keep)
        progress[2] = 0
        progress[1] = state["step"] if path.name == "ckpt.pt" else progress[1]

    train.train_step, checkpoint.save = train_step, saving
    output = Path(config["out_dir"]).with_suffix(".txt")
    sys.stdout = sys.stderr = open(output, "a", encoding="utf8")  # noqa: SIM115
    train.main(config)


def start(config):
    """(process, progress): a run in its own process, forked from one that has torch already."""
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    context.set_forkserver_preload(["train", "torch._dynamo"])
    progress = context.Array("q", 3, lock=False)  # a lock could be held by a killed process
    process = context.Process(target=live, args=(config, progress))
    process.start()
    return process, progress


def wait(process, progress, step):
    """Wait until that step is done, or the process has ended. -> seconds"""
    began = time.time()
    while process.exitcode is None and progress[0] < step:
        time.sleep(0.0005)
    return time.time() - began


def leave_alone(config):
    """A run to its end -> (seconds until its first step is done, of each step after it)."""
    process, progress = start(config)
    begin, rest = (wait(process, progress, step) for step in (1, config["max_iters"]))
    process.join()
    log = Path(config["out_dir"]).with_suffix(".txt").read_text("utf8")
    message = f"a run has ended by itself with {process.exitcode}: {log[-300:]}"
    settings.require(process.exitcode == 0, message)
    return begin, rest / (config["max_iters"] - 1)


def kill(config, step, seconds, chance):
    """Resume the run and kill it -> {killed, corrupted, lost_steps, while_saving}.

    Four in five die a random moment after `step`, the fifth at any moment of its start. seconds: of
    leave_alone.
    """
    before = step_saved(config) or 0
    process, progress = start(config)
    if chance.random() < 0.8:
        wait(process, progress, step)
        time.sleep(chance.random() * seconds[1])
    else:
        time.sleep(chance.random() * seconds[0])
    process.kill()
    process.join()
    after = step_saved(config)
    return {
        "killed": int(process.exitcode < 0),
        "corrupted": int(after is None),
        "lost_steps": max(0, max(before, progress[1]) - (after or 0)),
        "while_saving": progress[2],
    }


def step_saved(config):
    """The step of the checkpoint: 0 where there is none yet, None for one that cannot be read."""
    path = Path(config["out_dir"]) / "ckpt.pt"
    try:
        return checkpoint.read(path)["step"] if path.exists() else 0
    except settings.UserError as error:
        print(error, flush=True)
        return None


def same(a, b):
    """Equal bit for bit, whatever is nested in it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def outcome(folder):
    """All that a run leaves, but its settings and what depends on the clock."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf8").splitlines()]
    steady = [{k: v for k, v in entry.items() if k not in CLOCK} for entry in entries]
    state = checkpoint.read(folder)
    parts = {key: state[key] for key in ("model", "ema", "optimizer", "step")}
    names = sorted(path.name for path in folder.iterdir())
    return parts | {"log": steady, "files": names}


def keys_of(config, folder):
    """The keys of the run, whose data this writes to the folder."""
    parts = [("train", TEXT), ("val", TEXT[:500])]
    writer.prepare(folder / "data", parts, Char("".join(sorted(set(TEXT)))))
    keys = KEYS | {"data": folder / "data", "seed": config["seed"]}
    return keys | {"max_iters": config["steps"], "eval_interval": config["steps"] // 2}


def run_of(keys):
    """The config of a run."""
    line = [f"--{key}={value}" for key, value in keys.items()]
    return settings.parse(line, *train.MODULES)


def main(config):
    """Print, write and return {kills, corrupted, lost_steps, identical, ...}."""
    began, chance = time.time(), random.Random(config["moments"])
    enough = config["steps"] > config["kills"] + 1
    settings.require(enough, "steps must be more than kills, and two more")
    totals = {"killed": 0, "corrupted": 0, "lost_steps": 0, "while_saving": 0}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run = run_of(keys_of(config, folder))
        left_alone, killed = (
            {**run, "out_dir": str(folder / name)} for name in ("left_alone", "killed")
        )
        seconds = leave_alone(left_alone)
        for number in range(config["kills"]):
            step = int((number + chance.random()) / config["kills"] * (config["steps"] - 2))
            for key, value in kill(killed, step, seconds, chance).items():
                totals[key] += value
        leave_alone(killed)
        identical = same(outcome(folder / "left_alone"), outcome(folder / "killed"))
    figures = {"kills": totals.pop("killed"), **totals, "identical": identical}
    figures |= {"steps": config["steps"], "seconds": time.time() - began}
    figures |= results.about(torch.device("cpu"))
    columns = ("kills", "while_saving", "corrupted", "lost_steps", "identical")
    row = {key: str(figures[key]) for key in columns}
    text = results.table(f"A run of {config['steps']} steps, killed again and again", [row])
    results.write(config, "survive", figures, text)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
