"""What an experiment leaves behind: NAME.json (its figures), NAME.md (its table), NAME.png."""

import contextlib
import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from lib.files import whole_file

DEFAULTS = {
    "quick": False,  # a short form, to see that it runs: its figures mean little
    "results": "experiments/results",  # folder for the figures, the table and the plot
}


def table(title, rows, formats=None):
    """One Markdown table: a column for each key of `rows`; formats: {key: format of a number}."""

    def line(cells):
        return "| " + " | ".join(cells) + " |"

    def shown(key, value):
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
    commit = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip()
    name, cpu = platform.processor(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif cpu.exists():
        lines = [line for line in cpu.read_text().splitlines() if "model name" in line]
        name = lines[0].split(":")[1].strip() if lines else name
    threads = torch.get_num_threads()
    return {"commit": commit, "machine": name, "threads": threads, "torch": torch.__version__}


def kept(path):
    """The records of a .jsonl file, [] where there is none; without a line that was cut off."""
    records = []
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def keep(path, record):
    """Append a record to a .jsonl file, on a line of its own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a") as file:
        file.write("\n" * torn + json.dumps(record) + "\n")


def mark(*parts):
    """A hash of all that a record depends on: it counts only where it would be made again."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write(config, name, figures, text, draw=None, script=None):
    """Write NAME.json (flat dict `figures`), NAME.md (`text`, below the command) and NAME.png.

    draw(axes) fills one matplotlib axes; without matplotlib a line says that the plot is left out.
    script: the module of experiments that makes it, where it is not called `name`.
    """
    folder = Path(config["results"])
    with whole_file(folder / f"{name}.json") as path:
        path.write_text(json.dumps(figures, indent=1) + "\n")
    command = " ".join(["python -m", f"experiments.{script or name}", *sys.argv[1:]])
    with whole_file(folder / f"{name}.md") as path:
        path.write_text(f"Made by `{command}`.\n\n{text}")
    if draw:
        plot(folder / f"{name}.png", draw)


def plot(path, draw):
    """Call draw(axes) on a fresh matplotlib axes and saves it as the PNG file `path`."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    draw(axes)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
