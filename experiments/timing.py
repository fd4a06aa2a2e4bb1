"""Measuring: seconds of functions that take turns, and the memory that one adds.

Elsewhere puts textbook code (baselines.py) into a process of its own; product_limit is what this
machine's plain matrix products reach in the shapes of a model.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import statistics
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from experiments import baselines
from lib.device import keep_memory, peak_memory, wait

TURN = 1.0  # seconds, or one call where that takes longer


def alternate(variants, rounds, device):
    """{name: function} -> {name: [seconds of a call, one a round]}; each first runs twice more."""
    calls = {}
    for name, function in variants.items():
        function()
        calls[name] = math.ceil(TURN / seconds_of(function, device)) or 1
    times = {name: [] for name in variants}
    for _ in tqdm(range(rounds), next(iter(variants)), disable=None, leave=False):
        for name, function in variants.items():
            times[name].append(seconds_of(function, device, calls[name]))
    return times


def seconds_of(function, device, times=1):
    """Seconds of a call, the mean of `times` in a row; on a GPU by its own clock."""
    wait(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    began = time.perf_counter()
    for _ in range(times):
        function()
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        end.record()
        wait(device)
        seconds = start.elapsed_time(end) / 1000
    return seconds / times


class Elsewhere:
    """A function in a process of its own, where the C library need not keep freed memory.

    with Elsewhere(make, *arguments) as function: calls what make(*arguments) returns, over there.
    """

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=baselines.serve, args=(theirs, make, arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def __call__(self):
        self.pipe.send(True)
        self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def middle(times):
    return statistics.median(times)


def spread(times):
    """Between the fastest and the slowest round, as a part of the median."""
    return (max(times) - min(times)) / middle(times)


def added_memory(function, device):
    """MiB that function() adds at its highest point to what is in use before it."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        wait(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    keep_memory(False)
    function()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what was freed goes back and is not counted
    before, top, stop = resident(), [0], threading.Event()

    def watch():
        while not stop.wait(0.002):
            top[0] = max(top[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    stop.set()
    watcher.join()
    keep_memory()
    return max(0, top[0] - before) / 2**20


def resident():
    """Bytes of this process in memory now, or its most so far where the system knows no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text("utf8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 2**20 * peak_memory(torch.device("cpu"))


def product_seconds(model, B, L, dtype, device):
    """{name: (function, flops, times)} of the plain matrix products of one training step.

    A function makes three: forward, gradient of the input, gradient of the weight.
    """
    D, H, V, N = model.config["n_embd"], model.config["n_head"], model.vocab_size, B * L
    block = model.blocks[0]
    widths = [p.shape for p in block.parameters() if p.dim() == 2]  # (out, in) each
    layers = len(model.blocks)
    made = {}

    def product(rows, wide, deep, times):
        a = torch.randn(rows, deep, device=device, dtype=dtype)
        w = torch.randn(wide, deep, device=device, dtype=dtype)
        g = torch.randn(rows, wide, device=device, dtype=dtype)

        def run():
            _ = a @ w.T, g @ w, g.T @ a

        made[f"{rows}x{deep}x{wide}"] = (run, 6 * rows * wide * deep, times)

    for out, deep in widths:
        product(N, out, deep, layers)
    product(min(512, N // 2), V, D, N / 2 / min(512, N // 2))
    q = torch.randn(B, H, L, D // H, device=device, dtype=dtype)
    s = torch.randn(B, H, L, L, device=device, dtype=dtype)

    def attention():
        _ = q @ q.mT, s @ q, s @ q, s.mT @ q, q @ q.mT, s.mT @ q

    made["attention"] = (attention, 12 * B * L * L * D, layers)
    return made


def product_limit(model, B, L, dtype, rounds, device):
    """FLOP/s of plain products in the proportions of this model's step: those of a perfect step."""
    made = product_seconds(model, B, L, dtype, device)
    times = alternate({name: run for name, (run, _, _) in made.items()}, rounds, device)
    seconds = sum(min(times[name]) * count for name, (_, _, count) in made.items())
    return sum(flops * count for _, flops, count in made.values()) / seconds
