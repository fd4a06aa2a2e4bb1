"""Training curves of one run or several, in one picture.

    python -m experiments.plot_log out/a out/b [--out=curves.png]

Against steps, tokens and floating-point operations. Solid lines are the NELBO of the training
batches, smoothed and faintly as logged; dashed ones, where a run trains by other weights, the loss
by these, which is no bound. Dots are the held-out bound with its 95% interval. Solid lines and dots
can be compared. What a run has not written to log.jsonl yet is not there.
"""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np

from config import UserError, nearest, require
from lib import program
from lib.files import optional, whole_file

DEFAULTS = {
    "out": "",  # the picture; empty: curves.png in the first folder
    "smooth": 0.03,  # a point is the mean over this part of its run, in [0, 1]; 0: as logged
}

# Columns of a run's arrays.
AXES = {1: "optimizer steps", 2: "training tokens", 3: "floating-point operations"}
MOST = 8  # runs that one can tell apart


def read_row(line):
    """One line of log.jsonl -> (its kind, [nats per token, step, a, b, NELBO]).

    a, b: tokens and operations, or the ends of the interval. NELBO: of the batch; older logs have
    none.
    """
    entry = json.loads(line)
    kind = "loss" if "loss" in entry else "nats_per_token"
    a, b = (entry["tokens"], entry["flops"]) if kind == "loss" else entry["interval"]
    values = entry[kind], entry["step"], a, b, entry.get("nelbo")
    return kind, [math.nan if value is None else float(value) for value in values]


def read_log(folder):
    """(training (n, 5), held-out (m, 6)) of an out_dir.

    The columns: nats per token, step, tokens, operations, NELBO or interval. A last line that is
    cut off is left out: the run may be writing it. UserError where there is no log, or none of a
    run.
    """
    path = Path(folder, "log.jsonl")
    others = [log.parent for log in Path(folder).parent.glob("*/log.jsonl")]
    require(os.path.isfile(path), f"no log.jsonl in {folder}{nearest(folder, others)}")
    rows = {"loss": [], "nats_per_token": []}
    lines = path.read_text(encoding="utf8", errors="replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            kind, row = read_row(line)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UserError(f"{path}, line {number}: no entry of a training run") from None
        rows[kind].append(row)
    require(rows["loss"], f"{path} has no training step yet")
    train, held_out = (np.array(part).reshape(-1, 5) for part in rows.values())  # (n, 5), (m, 5)
    cost = np.stack([until(train, column, held_out[:, 1]) for column in (2, 3)], 1)  # (m, 2)
    return train, np.hstack([held_out[:, :2], cost, held_out[:, 2:4]])


def until(train, column, steps):
    """Tokens or operations until `steps` (m,), between what was logged (as at the end, past it)."""
    known, cost = (np.append(0.0, train[:, i]) for i in (1, column))  # (n + 1,) each
    beyond = np.maximum(steps / known[-1], 1)  # (m,)
    return np.interp(steps, known, cost) * beyond  # (m,)


def smoothed(y, part):
    """y (n,) -> (n,): means over windows of `part` of n values around each, fewer at the ends.

    What is nan is left out.
    """
    half = int(part * len(y) / 2)
    window = np.ones(2 * half + 1)  # (w,)
    known = np.isfinite(y)  # (n,)
    sums = (np.convolve(z, window) for z in (np.where(known, y, 0), known))  # (n + w - 1,) each
    total, count = (z[half : half + len(y)] for z in sums)  # (n,) each
    return np.divide(total, count, out=np.full(len(y), math.nan), where=count > 0)


def curves(train):
    """{line style: nats per token (n,)} of a run: its NELBO, and its loss where it is another."""
    loss, nelbo = train[:, 0], train[:, 4]  # (n,) each
    if np.allclose(loss, nelbo, rtol=1e-3, equal_nan=True):
        return {"-": nelbo}
    return {"-": nelbo, "--": loss} if np.isfinite(nelbo).any() else {"--": loss}


def label(folder, held_out):
    """The name of a run, and its last bound."""
    if not len(held_out):
        return str(folder)
    nats, step, *_, low, high = held_out[-1]
    error = f" ± {(high - low) / 2:.3f}" if math.isfinite(high) else ""
    return f"{folder}: {nats:.3f}{error} at {step:,.0f}"


def draw(axes, column, runs, part):
    """One panel: every run against a column of its arrays."""
    for i, (folder, (train, held_out)) in enumerate(runs):
        name = {"label": label(folder, held_out)}
        for style, nats in curves(train).items():
            axes.plot(train[:, column], nats, style, color=f"C{i}", linewidth=0.6, alpha=0.25)
            axes.plot(train[:, column], smoothed(nats, part), style, color=f"C{i}", **name)
            name = {}
        error = np.nan_to_num(np.abs(held_out[:, 4:].T - held_out[:, 0]), posinf=0)  # (2, m)
        dots = {"fmt": "o", "markersize": 4, "capsize": 2, "color": f"C{i}"}
        axes.errorbar(held_out[:, column], held_out[:, 0], error, **dots)
    axes.set_xlabel(AXES[column])
    axes.grid(alpha=0.3)


def limits(runs, part):
    """The span of the bounds, and of the lines after a tenth of their runs.

    Before that they fall steeply.
    """
    lines = [nats for _, (train, _) in runs for nats in curves(train).values()]
    lines = [smoothed(nats, part)[len(nats) // 10 :] for nats in lines]
    values = np.concatenate([held_out[:, 0] for _, (_, held_out) in runs] + lines)  # (n,)
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def main(config):
    """Draw config["folders"] into one picture -> {folder: last bound, or nan}."""
    folders = config["folders"]
    require(folders, "say which runs: python -m experiments.plot_log OUT_DIR ...")
    many = f"{len(folders)} runs are too many to be told apart in one picture: {MOST} at most"
    require(len(folders) <= MOST, many)
    out = config["out"] or Path(folders[0], "curves.png")
    runs = [(folder, read_log(folder)) for folder in folders]
    optional("matplotlib", "drawing").use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5), sharey=True, layout="constrained")
    for axes, column in zip(panels, AXES, strict=True):
        draw(axes, column, runs, config["smooth"])
    panels[0].set_ylim(*limits(runs, config["smooth"]))
    panels[0].set_ylabel("nats per token")
    panels[2].set_xscale("log")
    panels[2].set_xlim(left=min(train[len(train) // 50, 3] for _, (train, _) in runs))
    names = panels[0].get_legend_handles_labels()
    title = "solid: NELBO of training batches; dashed: the loss by training's own weights; "
    title += "dots: held-out bound, 95% interval, the last one in figures"
    figure.legend(*names, loc="outside lower center", ncols=2, title=title, frameon=False)
    with whole_file(out) as path:
        figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
    print(f"wrote {out}")
    last = lambda held_out: held_out[-1, 0] if len(held_out) else math.nan  # noqa: E731
    return {folder: last(held_out) for folder, (_, held_out) in runs}


if __name__ == "__main__":
    folders = [word for word in sys.argv[1:] if not word.startswith("-")]
    sys.argv[1:] = [word for word in sys.argv[1:] if word.startswith("-")]
    program.run(lambda config: main(config | {"folders": folders}), sys.modules[__name__])
