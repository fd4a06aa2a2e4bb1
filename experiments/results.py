"""What every experiment leaves behind: NAME.json (the figures claimed), NAME.md (the table) and NAME.png (the plot)."""

import contextlib
import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

import config as settings

DEFAULTS = {
    "quick": False,  # a short form, to see that it runs: its figures mean little
    "results": "experiments/results",  # folder for the figures, the table and the plot
}


def table(title, rows, formats=None):
    """One Markdown table; the columns are the keys of the dicts in `rows`, {key: format} says how a number is shown."""
    formats = formats or {}
    keys = list(rows[0])
    lines = [f"**{title}**", "", "| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|---" * len(keys) + "|"]
    for row in rows:
        cells = [
            value if isinstance(value, str) else formats.get(key, "{:,.0f}").format(value) for key, value in row.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def about(device):
    """What was measured on: commit, machine, threads, torch."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line] if cpu.exists() else []
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else names[0] if names else platform.processor()
    return {"commit": commit.stdout.strip(), "machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def kept(path):
    """The records of a .jsonl file, [] where there is none. A line that a killed program left unfinished is passed over."""
    records = []
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def keep(path, record):
    """Appends a record to a .jsonl file, on a line of its own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a") as file:
        file.write("\n" * torn + json.dumps(record) + "\n")


def mark(*parts):
    """A hash of all that a record depends on, kept with it: a record counts only for a command that would make it again."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write(config, name, figures, text, draw=None, script=None):
    """Writes NAME.json (flat dict `figures`), NAME.md (`text`, below the command of the script that made it) and NAME.png.

    draw(axes) fills one matplotlib axes; without matplotlib the plot is left out with a line that says so.
    """
    folder = Path(config["results"])
    with settings.whole_file(folder / f"{name}.json") as path:
        path.write_text(json.dumps(figures, indent=1) + "\n")
    command = " ".join(["python -m", f"experiments.{script or name}", *sys.argv[1:]])
    with settings.whole_file(folder / f"{name}.md") as path:
        path.write_text(f"Made by `{command}`.\n\n{text}")
    if draw:
        plot(folder / f"{name}.png", draw)


def plot(path, draw):
    """Calls draw(axes) on a fresh matplotlib axes and saves it as the PNG file `path`."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    draw(axes)
    with settings.whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
