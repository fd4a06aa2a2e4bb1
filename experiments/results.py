"""What an experiment leaves behind: NAME.json (its figures), NAME.md (its table), NAME.png.

    python -m experiments.results [--results=FOLDER]      draws all plots again, from the figures

A module's PLOTS are {ending: draw(axes, figures)}: each draws NAMEending.png from the flat dict of
figures alone. A plot has one message, names on the things themselves, and is read in grey, too.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch

from config import UserError
from lib import program
from lib.files import optional, to_json, whole_file, writing

DEFAULTS = {
    "quick": False,  # a short form, to see that it runs: its figures mean little
    "results": "experiments/results",  # folder for the figures, the table and the plot
}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.titlesize": 10, "axes.titlelocation": "left"}
DARK, LIGHT = "#1f4e79", "#a9bccd"


def table(title, rows, formats=None):
    """One Markdown table: a column for each key of `rows`; formats: {key: format of a number}."""

    def line(cells):
        return "| " + " | ".join(cells) + " |"

    def shown(key, value):
        if isinstance(value, float) and not math.isfinite(value):
            return "–"  # nothing was found out
        return value if isinstance(value, str) else formats.get(key, "{:,.0f}").format(value)

    formats, keys = formats or {}, list(rows[0])
    head = [
        f"**{title}**",
        "",
        line(key.replace("_", " ") for key in keys),
        "|---" * len(keys) + "|",
    ]
    return "\n".join([*head, *(line(shown(*item) for item in row.items()) for row in rows), ""])


def about(device):
    """What was measured on: commit, machine, threads, torch."""
    command, commit = ["git", "rev-parse", "--short", "HEAD"], ""
    with contextlib.suppress(OSError):  # there is no git
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    name, cpu = platform.processor(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif cpu.exists():
        lines = [line for line in cpu.read_text("utf8").splitlines() if "model name" in line]
        name = lines[0].split(":")[1].strip() if lines else name
    threads = torch.get_num_threads()
    return {"commit": commit, "machine": name, "threads": threads, "torch": torch.__version__}


def kept(path):
    """The records of a .jsonl file, [] where there is none; without a line that was cut off."""
    records = []
    for line in Path(path).read_text("utf8").splitlines() if Path(path).is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def keep(path, record):
    """Append a record to a .jsonl file, on a line of its own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with writing(path), open(path, "a", encoding="utf8") as file:
        file.write(("\n" if torn else "") + to_json(record) + "\n")


def mark(*parts):
    """A hash of all that a record depends on: it counts only where it would be made again."""
    return hashlib.sha256(to_json(parts).encode()).hexdigest()


def write(config, name, figures, text, plots=None, script=None):
    """Write NAME.json (flat dict `figures`), NAME.md (`text`, below the command) and the plots.

    plots: the module's PLOTS; without matplotlib a line says that they are left out. script: the
    module of experiments that makes it, where it is not called `name`.
    """
    folder = Path(config["results"])
    with whole_file(folder / f"{name}.json") as path:
        path.write_text(to_json(figures, indent=1) + "\n", encoding="utf8")
    command = " ".join(["python -m", f"experiments.{script or name}", *sys.argv[1:]])
    with whole_file(folder / f"{name}.md") as path:
        path.write_text(f"Made by `{command}`.\n\n{text}", encoding="utf8")
    for ending, draw in (plots or {}).items():
        plot(folder / f"{name}{ending}.png", functools.partial(draw, figures=figures))


def wilson(share, n):
    """The 95% interval (low, high) of a share of n by Wilson's score; it lies within 0..1."""
    z = 1.96
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


# ---- Plots ---------------------------------------------------------------------------------------


def plot(path, draw):
    """Call draw(axes) on a fresh matplotlib axes and saves it as the PNG file `path`."""
    try:
        optional("matplotlib", "it").use("Agg")
    except UserError as error:
        print(f"no {path.name}: {error}", file=sys.stderr)
        return
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        draw(axes)
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        pyplot.close(figure)


def bars(axes, values, text="{:,.0f}", light=(), errors=None, start=0.0):
    """A horizontal bar for each of `values` {name: value}, the number behind it; light: names.

    errors: {name: half of its interval}; start: where the bars begin.
    """
    axes.figure.set_size_inches(8, 1 + 0.24 * len(values))
    places = range(len(values), 0, -1)
    lengths = [value - start for value in values.values()]
    colors = [LIGHT if name in light else DARK for name in values]
    halves = [errors.get(name, 0) for name in values] if errors else None
    drawn = axes.barh(places, lengths, left=start, color=colors, xerr=halves, ecolor="black")
    labels = [text.format(value).replace("-", "\N{MINUS SIGN}") for value in values.values()]
    axes.bar_label(drawn, labels, padding=3)
    axes.set_yticks(places, values)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.16, y=0.01)


def name_ends(axes, ends, gap=0.05):
    """Write each line's name beside its right end, {name: (x, y)}, `gap` of the axes apart."""
    axes.autoscale_view()  # or its limits are those of before the lines
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: to_axes.transform(end)[1] for name, end in ends.items()}
    last = -1.0
    for name in sorted(heights, key=heights.get):
        last = max(heights[name], last + gap)
        right = max(to_axes.transform(end)[0] for end in ends.values())
        axes.text(right + 0.015, last, name, transform=axes.transAxes, va="center")


def script_of(name):
    """The module of experiments whose results are called `name` or name_SOMETHING."""
    scripts = [path.stem for path in Path(__file__).parent.glob("[!.]*.py")]
    owners = (s for s in scripts if f"{name}_".startswith(f"{s}_"))
    return max(owners, key=len, default="")  # "": of a script that is no more


def main(config):
    """Draw the plots of all figures in a folder again."""
    for path in sorted(Path(config["results"]).glob("[!.]*.json")):
        name = script_of(path.stem)
        module = importlib.import_module(f"experiments.{name}") if name else None
        for ending, draw in getattr(module, "PLOTS", {}).items():
            picture = path.with_name(f"{path.stem}{ending}.png")
            plot(picture, functools.partial(draw, figures=json.loads(path.read_text("utf8"))))
            print(picture)


if __name__ == "__main__":
    program.run(main, sys.modules[__name__])
