"""How much faster than an ARM with a cache does a masked diffusion model write equally well?

    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m experiments.quality_speed [--smollm2]        (smollm.py says how to get that judge)

SMDM (arXiv 2410.18514) has an MDM in 128 steps as good as its ARM (MT-Bench), 1.4 times as fast;
it had 16 times the ARM's training FLOPs. Here the same, and what is missing there: equal FLOPs.

Writers, of one shape: MDM, which sees both sides and keeps nothing; `order`, a masked model with a
cache (attention in unmasking order); ARM, with its cache; and ARM/16 with a 16th of the FLOPs. All
have read blocks of 512 bytes, so shorter samples are new to the masked ones.

Quality of a point (writer, sampler, steps, length): nats per byte by a judge where the samples have
the entropy of held-out text, between the temperatures (frontier.py), and there the distance of
their 3-grams from those of training text. The judge is a larger ARM of ours, of another seed, which
none of the writers has seen. It may like its own kind; SmolLM2 has learnt from other text.

Seconds: of a whole sample with its draws; all of a length and batch in turns, the fastest round.
The ARMs are timed in float32, too, and the faster counts. Networks as small as these wait for the
calls themselves, larger ones at batch 1 for their weights: either way many tokens a call cost
little more than one. At batch 16 they cost more.

Ratio: the ARM's seconds over those at which the masked writer is as good (equal_quality.py). The
better of several samplers is chosen by looking, so "every sampler" is somewhat optimistic. Euler is
ancestral here (log-linear). The first two samplers go through all lengths, the others have one.

Budget: a seed is 3 runs of 1e14 FLOPs and one of a 16th, the judge of all 4e14: 95 minutes on a
thread of 125 GFLOP/s for one seed; its samples take two hours, SmolLM2 45 minutes, the timing half
an hour: --seeds=1 --minutes=420. Minimum: --seeds=1 --flops=1e13 --num_samples=16.
"""

import functools
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config as settings
from experiments import bench, frontier, papers, results, runs, timing
from experiments import equal_quality as equal
from lib import program
from lib.device import cast_products, machine
from run import checkpoint

DEFAULTS = {
    "data": "data/corpus",  # a prepared folder of bytes
    "flops": 1e14,  # of a run; ARM/16 has a 16th
    "rounds": 2,  # of the timing, in turns; 1 or more
    "smollm2": False,  # SmolLM2 judges as well (smollm.py)
}

STEPS, LENGTHS, BATCHES = [4, 8, 16, 32, 64, 128, 256], [64, 128, 256, 512], [1, 16]
MASKED = {"objective": "any_order", "block_size": 512, "batch_size": 8}
ARM = MASKED | {"objective": "ar"}
WRITERS = {  # name: (keys over the preset, part of the FLOPs)
    "MDM": (MASKED, 1.0),
    "order": (MASKED | {"attention": "order", "batch_size": 4}, 1.0),
    "ARM": (ARM, 1.0),
    "ARM/16": (ARM, 1 / papers.MORE_FLOPS),
}
JUDGE = ARM | {"n_layer": 8, "n_head": 3, "n_embd": 192, "learning_rate": 7e-3}  # rate by the width
DIALS = {  # sampler: (option, its values)
    "ancestral": ("steps", STEPS),
    "confidence": ("steps", STEPS),
    "smdm_greedy": ("steps", STEPS),
    "remask": ("steps", STEPS),
    "remask_rescale": ("steps", STEPS),
    "threshold": ("threshold", [0.3, 0.5, 0.7, 0.9]),
    "entropy_bound": ("max_entropy", [0.5, 2.0, 8.0]),
    "any_order": ("steps", [1]),  # one token a call, as in the next two: no steps
    "left_to_right": ("steps", [1]),
    "right_to_left": ("steps", [1]),
}
MEASURES = {"nats": "judge", "smollm2": "SmolLM2", "js": "3-grams"}


# ---- 1. Points -----------------------------------------------------------------------------------


def plan(config, length):
    """[(name, writer, options)] of the points at a length."""
    points = [("ARM", "ARM", {}), ("ARM/16", "ARM/16", {})]
    for writer, (sampler, (key, values)) in itertools.product(("MDM", "order"), DIALS.items()):
        if length == config["length"] or sampler in list(DIALS)[:2]:
            for value in values[:2] if config["quick"] else values:
                name = f"{writer}, {sampler}"
                if len(values) > 1:
                    name += f", {key} {value:g}"
                points.append((name, writer, {"sampler": sampler, key: value}))
    return points


class Field(frontier.Frontier):
    """The frontier at one length, whose points keep the values of each sample."""

    def __init__(self, runs, data, flops, length):
        super().__init__(runs, data, 2 * flops, JUDGE)  # the judge has twice that
        self.N = max(4, self.N * self.length // length)  # as many bytes at every length
        self.length, self.smollm2 = length, runs.config["smollm2"]

    def parts(self):
        return [*super().parts(), self.smollm2, "each sample"]

    @functools.cached_property
    def second(self):
        from experiments.smollm import SmolLM2

        return SmolLM2(self.runs.config | {"batch_size": 16})

    def point(self, rows, tokenizer):
        judge, text, V = self.open(len(rows[0]))
        point = frontier.of_samples(judge, rows, tokenizer)
        if self.smollm2:
            point["smollm2"] = frontier.of_samples(self.second, rows, tokenizer)["nats"]
        grams = frontier.frequencies(rows, frontier.N_GRAM, V)
        return point | {"js": [frontier.js_distance(grams, text)]}


def written(field, folders, points):
    """{point: {measure: (DRAWS + 1,) at the text's entropy, "NFE": mean}}; left out: no key.

    Held-out text is a point, too.
    """
    text = next((row for row in field.references() if row["sampler"] == frontier.HELD_OUT), None)
    quality = {}
    if text:
        quality[frontier.HELD_OUT] = {
            key: equal.resampled(text[key]) for key in MEASURES if key in text
        }
    for name, writer, options in points:
        paths = [field.path(folder, name, **options) for folder in folders[writer]]
        if text and (paths := [path for path in paths if path]):
            keys = [key for key in MEASURES if key in text]
            by_key = {key: [equal.at_entropy(path, text, key) for path in paths] for key in keys}
            quality[name] = {key: equal.over_seeds(values) for key, values in by_key.items()}
            quality[name]["NFE"] = np.mean([row["NFE"] for path in paths for row in path])
    return quality


def timed(ctx, folders, points, L, B):
    """{point: seconds a sample} in batches of B, the fastest of all rounds, in turns."""
    plain, functions, times = ctx.config | {"dtype": "float32"}, [], {}
    for config, writers in ((ctx.config, WRITERS), (plain, ["ARM", "ARM/16"])):
        device, autocast = machine(config)
        for writer in (writer for writer in writers if folders[writer][0]):
            model, _, _ = checkpoint.load(folders[writer][0], device)
            cast_products(model, autocast)
            x = torch.full((B, L), model.mask_id, device=device)  # (B, L)
            of_writer = [(name, options) for name, of, options in points if of == writer]
            bench.sampler(model, x, autocast, **of_writer[0][1])()  # warm
            functions += [(name, bench.sampler(model, x, autocast, **o)) for name, o in of_writer]
    for _ in tqdm(range(1 if ctx.config["quick"] else ctx.config["rounds"]), disable=None):
        for name, function in functions:
            seconds = timing.seconds_of(function, ctx.device) / B
            times[name] = min(seconds, times.get(name, np.inf))
    return times


# ---- 2. Tables -----------------------------------------------------------------------------------


def point_rows(L, measures, points, quality, seconds):
    """(rows, figures) of the points at a length; seconds: {batch: {point: seconds}}."""
    rows, figures = [], {}
    for name in (frontier.HELD_OUT, *(name for name, *_ in points)):
        row, measured = {"L": str(L), "writer": name}, quality.get(name, {})
        row["NFE"] = (
            f"{measured['NFE']:.1f}" if "NFE" in measured else "" if measured else "left out"
        )
        for key in measures:
            row[MEASURES[key]] = equal.interval(measured[key]) if measured else "left out"
            if row[MEASURES[key]] and measured:
                figures[f"{key}, {name}, L {L}"] = float(measured[key][0])
        for B, times in seconds.items():
            none = "" if name == frontier.HELD_OUT else "left out"
            row[f"seconds,_batch_{B}"] = f"{times[name]:.4f}" if name in times else none
            figures |= {f"seconds, {name}, L {L}, batch {B}": times[name]} if name in times else {}
        rows.append(row)
    return rows, figures


def ratio_rows(L, measures, points, quality, seconds):
    """(rows, figures): how many times as fast as each ARM a masked writer is where as good."""
    rows, figures = [], {}
    for arm, writer in itertools.product(("ARM/16", "ARM"), ("MDM", "order")):
        for choice in ("ancestral", "every sampler"):
            row = {"L": str(L), "writer": f"{writer}, {choice}", "as good as": arm}
            names = [
                name
                for name, of, options in points
                if of == writer and choice in ("every sampler", options["sampler"])
            ]
            for (B, times), key in itertools.product(seconds.items(), measures):
                known = [name for name in names if name in times and name in quality]
                column, shown, ratios = f"batch {B}, {MEASURES[key]}", "left out", {}
                if known and arm in times and arm in quality:
                    path = [(times[name], quality[name][key]) for name in known]
                    shown, ratios = with_figures(equal.ratio((times[arm], quality[arm][key]), path))
                row[column.replace(" ", "_")] = shown
                what = f"{writer}, {choice}, over {arm}, L {L}, {column}"
                figures |= {f"{name}, {what}": value for name, value in ratios.items()}
            rows.append(row)
    return rows, figures


def with_figures(result):
    """(the cell of a ratio, its figures); empty where the ARM never has the text's entropy."""
    if result is None:
        return "", {}
    value, low, high, lacks = result
    if value:
        figures = {"times as fast": value, "low": low, "high": high}
        return f"{value:.2f} ({low:.2f} to {high:.2f})", figures
    if lacks == np.inf:
        return "never", {"times as fast": 0.0}
    return f"never, lacks {lacks:.3f}", {"times as fast": 0.0, "lacks": lacks}


def paper():
    """SMDM's figures, in words."""
    times = [
        f"{steps} steps {score} ({papers.steps_ratio(steps):.1f} times as fast)"
        for steps, (score, _) in papers.MT_BENCH.items()
    ]
    return (
        f"SMDM, 1.1B, MT-Bench, batch 1: ARM {papers.ARM_SCORE}; MDM in {', '.join(times)}, after "
        f"{papers.MORE_FLOPS} times the ARM's training FLOPs, as here ARM/16 to the others.\n"
    )


def draw(axes, figures):
    """Judge's nats at the text's entropy by seconds a sample, batch 1, at one length."""
    matches = [re.fullmatch(r"seconds, (.*), L (\d+), batch 1", key) for key in figures]
    points = [(match[1], match[2], figures[match[0]]) for match in matches if match]
    L, paths, ends = "128" if any(L == "128" for _, L, _ in points) else "32", {}, {}
    for name, of, seconds in points:
        writer, sampler, *_ = [*name.split(", "), ""]
        nats = figures.get(f"nats, {name}, L {L}")
        if of == L and nats is not None and sampler in ("", "ancestral", "confidence"):
            paths.setdefault(f"{writer} {sampler}", []).append((seconds, nats))
    for (name, path), style in zip(
        paths.items(), ("*", "p", "o-", "s--", "^:", "D-."), strict=False
    ):
        axes.plot(*zip(*sorted(path), strict=True), style, color=results.DARK)
        ends[name] = max(path)
    axes.set(xscale="log", xlabel=f"seconds a sample of {L} bytes, batch 1")
    axes.set_ylabel("judge's nats per byte (lower is better)")
    axes.set_title("Quality at the text's entropy against time: more steps to the right")
    if ends:
        results.name_ends(axes, ends)


PLOTS = {"": draw}


def writer_rows(ctx, folders, judge):
    """(rows, figures): the training FLOPs of each, and its nats on held-out text."""
    shares, rows, figures = {name: share for name, (_, share) in WRITERS.items()}, [], {}
    if judge and not ctx.config["judge"]:
        folders, shares["the judge"] = folders | {"the judge": [Path(judge)]}, 4.0
    for name, of_seeds in folders.items():
        nats = [ctx.nats(folder, ctx.config["data"]) for folder in of_seeds]
        row = {"writer": name, "training FLOPs": f"{shares[name] * ctx.config['flops']:.1e}"}
        rows.append(row | {"held-out nats per byte": runs.spelled(nats)})
        figures |= {f"held-out nats, {name}, {i}": z for i, z in enumerate(nats) if z is not None}
    return rows, figures


def main(config):
    """Train, write, judge, time; print, write and return the figures."""
    config, lengths = (config | {"length": 32}, [16]) if config["quick"] else (config, LENGTHS)
    ctx, flops, folders = runs.Runs(config), config["flops"], {name: [] for name in WRITERS}
    for seed, (name, (keys, share)) in itertools.product(ctx.seeds, WRITERS.items()):
        folders[name].append(ctx.train(config["data"], keys, share * flops, seed))
    lengths = [config["length"], *(L for L in lengths if config["length"] != L)]
    fields = [Field(ctx, config["data"], flops, L) for L in lengths]  # the first trains the judge
    writers, figures = writer_rows(ctx, folders, fields[0].judge)
    measures = [key for key in MEASURES if key != "smollm2" or config["smollm2"]]
    tables = {ratio_rows: [], point_rows: []}
    for L, field in zip(lengths, fields, strict=True):
        points, seconds, about = plan(config, L), {}, results.about(ctx.device)
        quality = written(field, folders, points)
        for B in BATCHES:
            parts = ["seconds", L, B, about["machine"], about["threads"], config["rounds"], points]
            parts += [str(folder[0]) for folder in folders.values()]
            run = functools.partial(timed, ctx, folders, points, L, B)
            seconds[B] = ctx.once(parts, run) or {}
        for make, rows in tables.items():
            new_rows, new_figures = make(L, measures, points, quality, seconds)
            rows += new_rows
            figures |= new_figures
    title = "The writers: the bound of the masked ones, the others exactly"
    text = [results.table(title, writers)]
    title = "How many times as fast as the ARM where as good, 95% intervals (never: it is not)"
    text += [results.table(title, tables[ratio_rows]), paper()]
    title = f"At the entropy of held-out text, {fields[0].N} samples a temperature at L ="
    title += f" {config['length']}, 95% intervals (empty: it has not that entropy)"
    text.append(results.table(title, tables[point_rows]))
    return ctx.write("quality_speed", "\n".join(text), figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, frontier, sys.modules[__name__])
