"""What reverse_curse.py says of its answers: tables and a plot.

records are {(mdm or ar, seed): what reverse_curse.exam found}.
"""

from math import hypot
from statistics import mean, stdev

from experiments import results, runs
from experiments.berglund import TASKS
from lib.stats import FEWEST, t95

# Invented people who are told of name first only, asked for by description.
SHOWN = TASKS | {"reverse_invented": ("", "", "")}
NAMES = [task for task in SHOWN if not task.endswith("ntd")]  # what is asked for is a name

COLUMNS = [  # of the table and the plot
    ("mdm", "", "MDM"),
    ("mdm", "_words", "MDM, fewest words chosen"),
    ("mdm", "_cfg", "MDM, w = 0.8"),
    ("mdm", "_chosen", "MDM, w chosen"),
    ("mdm", "_free", "MDM, may be empty"),
    ("ar", "", "ARM"),
    ("ar", "_free", "ARM, may be empty"),
]


def interval(percents, n):
    """95% interval (low, high) of the mean of some seeds' percentages on n people.

    Wilson's, and Student's for three seeds or more; of fewer it is over people alone. All seeds are
    asked about the same people, ten times about each, so n grows with neither. (The invented people
    are others in every seed: for them it is too wide.)
    """
    p, k = mean(percents) / 100, len(percents)
    low, high = (100 * z for z in results.wilson(p, n))
    of_seeds = t95(k - 1) * stdev(percents) / k**0.5 if k >= FEWEST else 0.0
    low, high = 100 * p - hypot(100 * p - low, of_seeds), 100 * p + hypot(high - 100 * p, of_seeds)
    return max(0.0, low), min(100.0, high)


def figures_of(records):
    """{mdm_reverse_dtn: [percent of each seed], ...}; endings: those of WAYS, then of rules()."""
    figures = {}
    for (kind, _), record in records.items():
        for name, scores in record["scores"].items():
            for end, score in scores.items():
                figures.setdefault(f"{kind}_{name}{end}", []).append(score)
    return figures


def table(figures, possible, n):
    lines, others = [], []
    for task, (_, smdm, gpt3) in SHOWN.items():
        line = {"task": task.replace("_", ", "), "SMDM 1.1B": smdm, "GPT-3": gpt3}
        line["possible"] = f"{possible[task]:.0f}"
        for kind, way, name in COLUMNS:
            percents = figures.get(f"{kind}_{task}{way}")
            line[name] = "left out"
            if percents:
                low, high = interval(percents, n)
                line[name] = f"{mean(percents):.1f} ({low:.0f} to {high:.0f})"
        lines.append(line)
        other = {"task": line["task"]}
        for kind, name in (("mdm", "MDM"), ("ar", "ARM")):
            for rule, end in (("exact", "_exact"), ("BLEU", "_bleu")):
                percents = figures.get(f"{kind}_{task}{end}")
                other[f"{name}, {rule}"] = f"{mean(percents):.1f}" if percents else ""
        others.append(other)
    title = "Correct answers, percent (the reference is a substring of the answer)"
    others = results.table("By other rules, w = 0 (BLEU needs nltk)", others)
    return f"{results.table(title, lines)}\n{others}"


def answered(records):
    """A few questions and what the first seed answered, as text."""
    (_, seed), out = next(iter(records)), []
    for kind in dict.fromkeys(kind for kind, _ in records):
        for task, answers in records.get((kind, seed), {"answers": {}})["answers"].items():
            out += [f"{kind} {task}: {prompt} ->{answer}" for prompt, _, answer in answers[:3]]
    return "\n".join(["**Examples**", "", "```", *out, "```"])


NAMED = {  # what is asked for, in a plot
    "same_dtn": "the name,\nin the order read",
    "same_ntd": "the description,\nin the order read",
    "reverse_dtn": "the name,\nin the other order",
    "reverse_ntd": "the description,\nin the other order",
    "reverse_invented": "an invented name,\nin the other order",
}


def draw(axes, figures):
    """Bars of both models' percentages, the seeds as dots, SMDM's as short lines."""
    models = [
        (-0.18, "mdm", "", "masked", results.DARK, "white"),
        (0.18, "ar", "", "causal", results.LIGHT, "black"),
    ]
    for x, task in enumerate(SHOWN):
        for left, kind, way, name, color, ink in models:
            place, stem = x + left, f"{kind}_{task}{way}"
            height = figures.get(stem, 0.0)
            seeds = [figures[key] for key in figures if key.startswith(f"{stem}, seed ")]
            axes.bar(place, height, 0.34, color=color)
            axes.text(place, 3, f"{height:.0f}", ha="center", color=ink)
            if x == 0:
                axes.text(place, 12, name, ha="center", rotation=90, color=ink)
            axes.plot([place] * len(seeds), seeds, "o", color="white", mec="black", clip_on=False)
        if SHOWN[task][1].isdigit():
            axes.hlines(int(SHOWN[task][1]), x - 0.36, x, color="black", linewidth=2)
            axes.text(x - 0.38, int(SHOWN[task][1]), "SMDM,\n1.1B", ha="right", va="center")
    axes.set_xticks(range(len(SHOWN)), [NAMED[task] for task in SHOWN])
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel="correct, percent (substring rule); dots: seeds", ylim=(0, 110))
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("In an order that it never read the masked model answers, the causal one never")


def seeds_table(records):
    """How trainings differ, what validation said, and what stands in the right name's place."""
    lines = []
    for (kind, seed), record in records.items():
        line = {"model": kind, "seed": str(seed), "w chosen": f"{record['w']:g}"}
        line["fewest words"] = str(record["words"])
        thirds = (", ".join(f"{z:.0f}" for z in each) for each in record["tries"])
        line["validation at thirds of each try"] = "; ".join(thirds)
        line["reverse, dtn of each"] = ", ".join(f"{z:.0f}" for z in record["unchosen"])
        line["of the best"] = f"{record['scores']['reverse_dtn']['']:.1f}"
        lines.append(line | {key: f"{z:.1f}" for key, z in record["wrong"]["reverse_dtn"].items()})
    title = (
        "Each seed: validation, and the wrong answers to reverse, dtn by whom they name, percent"
    )
    return results.table(title, lines)


def ranks_table(records):
    """Whether the right name is the likeliest of all that are asked for."""
    lines = []
    for task in NAMES:
        line = {"task": task.replace("_", ", ")}
        for kind, name in (("mdm", "MDM"), ("ar", "ARM")):
            ranks = [record["ranked"][task] for (of, _), record in records.items() if of == kind]
            first, rank = zip(*ranks, strict=True) if ranks else ((), ())
            line[f"{name}, ranked first"] = runs.spelled(list(first), ".1f")
            line[f"{name}, mean rank"] = runs.spelled(list(rank), ".1f")
        lines.append(line)
    title = "The right name among the names of all who are asked for, by nats behind the prompt"
    return results.table(title, lines)
