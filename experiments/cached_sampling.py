"""What does skipping idle steps save, and what do more steps buy?

    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m experiments.cached_sampling
    python -m experiments.cached_sampling --only=speed      or nfe, quality

NFE. A step needs a network call only where it unmasks something (RADD, arXiv 2406.03736, eq. 3.4).
Measured: calls of the real sampling loop, over a network that answers at once, for Tweedie
(`ancestral`) and Euler, which are one under the log-linear schedule and differ under the cosine: a
sample of either takes its NFE times the seconds of a call.

Speed. Seconds a sample of one sequence at a time, random weights, the same dtype for all, memory
kept: the textbook (a call and a draw of all positions in every step), RADD's published cache (a
call where something has changed, a draw of all masked positions in every step) and sample.py. A
step of the first two takes as long as any other, so a few are timed and counted for all; RADD's
calls are the expected number and its masked positions half of all, in the mean. Ours runs whole.
In turns; the fastest round counts. RADD's table 3 compares with SEDD, which calls in every step, as
the textbook does: the first ratio is the one to set beside its "up to 3.5 times".

Quality. Samples of a byte model at 16 to 4,096 steps as paths over temperatures: frontier.py.

Budget: 2 runs of 1e14 and 2e14 FLOPs (the writer and its judge), then as long for the rest: 60
minutes on two cores with bfloat16 instructions. Minimum: --flops=3e13; the times need no training.
"""

import functools
import math
import re
import statistics
import sys
from types import SimpleNamespace

import torch
from tqdm import tqdm

import config as settings
import diffusion
import sample
import samplers
from config import choose
from experiments import baselines, bench, frontier, papers, results, runs, timing
from lib import program

DEFAULTS = {
    "data": "data/corpus",  # a prepared folder
    "flops": 1e14,  # of the run that writes
    "only": "",  # nfe, speed or quality; empty: all
    "rounds": 3,  # of the timing, in turns; 1 or more
    "sequences_counted": 400,  # for each NFE; 2 or more
}

STEPS, LENGTHS, VOCABULARIES = [16, 64, 256, 1024, 4096], [64, 256, 1024], [256, 50257]
SAMPLERS = {
    "Tweedie = Euler, log-linear": ("ancestral", "loglinear"),
    "Tweedie, cosine": ("ancestral", "cosine"),
    "Euler, cosine": ("euler", "cosine"),
}


# ---- NFE -----------------------------------------------------------------------------------------


def instant(V, L):
    """What sample.sample needs of a network, whose logits are all 0."""
    hidden = lambda x, masked_idx: torch.zeros(len(masked_idx), 1)  # noqa: E731
    head = lambda h: h.expand(-1, V)  # noqa: E731
    look = {"config": {"attention": "full"}, "block_size": L, "mask_id": V, "vocab_size": V}
    look |= {"device": torch.device("cpu")}
    return SimpleNamespace(hidden=hidden, head=head, causal=False, **look)


def counted(name, steps, L, n, seed):
    """(expected NFE, mean of the measured, its standard error) over n sequences."""
    sampler, schedule = SAMPLERS[name]
    x = torch.full((n, L), 2)  # (n, L) all masked
    keys = {"sampler": sampler, "schedule": schedule, "steps": steps, "seed": seed, "batch_size": n}
    _, info = sample.sample(instant(2, L), x, **keys)
    nfe = info["nfe"].double()  # (n,)
    return info["expected_nfe"], float(nfe.mean()), float(nfe.std()) / math.sqrt(n)


def nfe_table(ctx, steps, lengths):
    """(text, figures) of every sampler, length and number of steps."""
    n = 50 if ctx.config["quick"] else ctx.config["sequences_counted"]
    rows, figures, worst = [], {}, 0.0
    for name in SAMPLERS:
        for L in lengths:
            row = {"sampler": name, "L": str(L)}
            for k in steps:
                parts = [name, k, L, n, ctx.config["seed"]]
                calls = ctx.once(["NFE", *parts], functools.partial(counted, *parts))
                row[f"{k}_steps"] = "left out"
                if calls:
                    expected, mean, error = calls
                    z = (mean - expected) / error if error else 0.0
                    worst = max(worst, abs(z))
                    row[f"{k}_steps"] = f"{mean:.1f} ± {error:.1f} ({expected:.1f})"
                    figures[f"NFE, {name}, L {L}, {k} steps"] = mean
                    figures[f"expected NFE, {name}, L {L}, {k} steps"] = expected
            rows.append(row)
    figures["largest deviation of NFE in standard errors"] = worst
    title = f"Network calls of {n} sequences, mean ± standard error (expected, RADD eq. 3.4); the "
    return results.table(f"{title}furthest is {worst:.1f} standard errors off", rows), figures


# ---- Speed ---------------------------------------------------------------------------------------


def timed(ctx, V, L, steps):
    """{"sample", "call", "draw" or steps of ours: seconds}, of the fastest round."""
    shape = bench.SMALL | {"block_size": L, "vocab_size": V}
    shape |= {"n_layer": 1, "n_head": 1, "n_embd": 32} if ctx.config["quick"] else {}
    with ctx.autocast():
        bfloat16 = torch.is_autocast_enabled(ctx.device.type)
    part = lambda name: baselines.sampling_part(  # noqa: E731
        shape, 1, ctx.device, name, bfloat16, max(steps), 1
    )
    functions = {name: part(name) for name in ("sample", "call", "draw")}
    model = bench.transformer(V, shape).to(ctx.device).eval()
    x = torch.full((1, L), model.mask_id, device=ctx.device)  # (1, L)
    for k in steps:
        functions[str(k)] = bench.sampler(model, x, ctx.autocast, steps=k)
    times = {name: [] for name in functions}
    for function in [functions[name] for name in ("sample", "call", "draw", str(min(steps)))]:
        function()  # warm
    for _ in tqdm(
        range(1 if ctx.config["quick"] else ctx.config["rounds"]), leave=False, disable=None
    ):
        for name, function in functions.items():
            repeats = 5 if not name.isdigit() else 1
            times[name].append(timing.seconds_of(function, ctx.device, repeats))
    return {name: min(taken) for name, taken in times.items()}


def speed_table(ctx, steps, lengths, vocabularies):
    """(text, figures) of the three samplers, for every V, L and number of steps."""
    rows, figures = [], {}
    for V in vocabularies:
        for L in lengths:
            about = results.about(ctx.device)
            parts = ["speed", V, L, steps, about["machine"], about["threads"], ctx.config["rounds"]]
            times = ctx.once(parts, functools.partial(timed, ctx, V, L, steps))
            for k in steps:
                row = {"V": str(V), "L": str(L), "steps": str(k)}
                nfe = samplers.expected_nfe(samplers.unmask_schedule(diffusion.loglinear, k), L)
                row |= {"E-NFE": f"{nfe:.1f}"}
                columns = "textbook", "RADD's cache", "ours", "textbook / RADD", "RADD / ours"
                shown = ["left out"] * 5
                if times:
                    seconds = [k * times["sample"]]
                    seconds += [nfe * times["call"] + (k + 1) / 2 * times["draw"], times[str(k)]]
                    ratios = [seconds[0] / seconds[1], seconds[1] / seconds[2]]
                    shown = [f"{z:.3f}" for z in seconds] + [f"{z:.2f}x" for z in ratios]
                    for name, value in zip(columns, seconds + ratios, strict=True):
                        figures[f"{name}, V {V}, L {L}, {k} steps"] = value
                row |= dict(zip(columns, shown, strict=True))
                paper = papers.sampling_ratio(k) if L == 1024 else None
                rows.append(row | {"SEDD / RADD (paper)": f"{paper:.2f}x" if paper else ""})
    ours = [value for name, value in figures.items() if name.startswith("RADD / ours")]
    figures |= {"RADD / ours, least": min(ours)} if ours else {}
    title = (
        f"Seconds a sample, batch 1, the fastest of {ctx.config['rounds']} rounds, 6 layers of 256"
    )
    return results.table(title, rows), figures


# ---- Quality -------------------------------------------------------------------------------------


def quality_table(ctx, steps):
    """(text, figures) of one writer's frontier, a path for each number of steps."""
    data, flops = ctx.text(ctx.config["data"]), ctx.config["flops"]
    folder = ctx.train(data, runs.PAIR["MDM"], flops, ctx.seeds[0])
    field, points, figures = frontier.Frontier(ctx, data, flops), [], {}
    for k in steps:
        points += field.path(folder, f"{k} steps", steps=k)
    points += field.references()
    rows = []
    for k in steps:
        row = {"steps": str(k)}
        for key, shown in zip(("nats", "js"), ("judge's_nats", "n-gram_distance"), strict=True):
            value = frontier.at_entropy(points, f"{k} steps", key)
            row[shown] = "" if value is None else f"{value:.3f}"
            figures |= {} if value is None else {f"{key} at the text's entropy, {k} steps": value}
        nfe = [point["NFE"] for point in points if point["sampler"] == f"{k} steps"]
        row["NFE"] = f"{statistics.mean(nfe):.1f}" if nfe else "left out"
        paper = dict(zip(papers.STEPS, papers.SAMPLING["RADD perplexity"], strict=True))
        rows.append(row | {"RADD's generative perplexity": str(paper.get(k, ""))})
    text = results.table("At the entropy of held-out text (between the temperatures)", rows)
    title = f"{field.N} samples a point, judged by {field.judge}, ± one standard error"
    if points:
        text += "\n" + results.table(title, frontier.table_rows(points))
    return text, figures | frontier.figures_of(points)


def draw(axes, figures):
    """Calls against steps: lines expected, dots measured."""
    calls, ends = {}, {}
    for name, expected in figures.items():
        if match := re.fullmatch(r"expected NFE, (Tweedie =.*), L (\d+), (\d+) steps", name):
            point = int(match[3]), expected, figures[name.removeprefix("expected ")]
            calls.setdefault(f"L = {match[2]}", []).append(point)
    for L, table in calls.items():
        steps, expected, measured = zip(*table, strict=True)
        axes.plot(steps, expected, color=results.DARK)
        axes.plot(steps, measured, "o", color=results.DARK)
        axes.plot(steps, steps, ":", color="black", linewidth=0.8)
        ends[L] = steps[-1], expected[-1]
        ends["a call in every step"] = steps[-1], steps[-1]
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="network calls of a sample (NFE)")
    axes.set_title("Calls end at one a token, however many steps: expected, and measured (dots)")
    if ends:
        results.name_ends(axes, ends)


PLOTS = {"": draw, "_quality": frontier.draw}


def main(config):
    """Count, time and judge; print, write and return the figures."""
    choose("only", config["only"], ["", "nfe", "speed", "quality"])
    ctx, quick, texts, figures, plots = runs.Runs(config), config["quick"], [], {}, {}
    steps, lengths = (STEPS[:2], LENGTHS[:1]) if quick else (STEPS, LENGTHS)
    vocabularies = VOCABULARIES[:1] if quick else VOCABULARIES
    if config["only"] in ("", "nfe"):
        text, measured = nfe_table(ctx, steps, lengths)
        texts, figures, plots = [*texts, text], figures | measured, {"": draw}
    if config["only"] in ("", "quality"):
        text, measured = quality_table(ctx, steps)
        texts, figures = [*texts, text], figures | measured
        plots["_quality"] = frontier.draw
    if config["only"] in ("", "speed"):
        text, measured = speed_table(ctx, steps, lengths, vocabularies)
        texts, figures = [*texts, text], figures | measured
    return ctx.write("cached_sampling", "\n".join(texts), figures, plots)


if __name__ == "__main__":
    program.run(main, settings, results, runs, frontier, sys.modules[__name__])
