"""IsoFLOP curves to minima and power laws with intervals, tables and a plot: serves scaling.py.

- A curve has the nats of networks of several sizes N at one number of operations C. Through the
  FITTED sizes around the lowest goes a parabola in log N; its minimum is (N*, L*).
- log N* and log L* of several curves are lines in log C.
- Intervals: each curve is made anew DRAWS times, from its parabola and residuals drawn from those
  of all curves of its family, widened for the parameters that were fitted and by Student's t. They
  hold the noise of runs and the misfit of parabolas, and not whether a power law is right.

    N, L = minima([(N (n,), nats (n,)), ...])      (k, 1 + draws) each, of k curves of one family
    laws(C, {"MDM": (N, L), "ARM": (N, L)})        {what: {family: values (1 + draws,)}}

Column 0 is always that of the points themselves.
"""

import re

import numpy as np

from experiments import papers
from experiments.results import DARK, LIGHT
from lib.stats import FEWEST, t95

FITTED = 5  # sizes of a parabola
DRAWS = 2000
FAMILIES = ("MDM", "ARM")


# ---- Fits ----------------------------------------------------------------------------------------


def is_whole(curve):
    """Whether the first seed of a curve {N: [nats of each seed]} has been there for all sizes."""
    return len(curve) > 2 and all(values[0] is not None for values in curve.values())


def around(curve):
    """The FITTED sizes N around the lowest of a curve, by its first seed."""
    N = sorted(curve)
    lowest = min(range(len(N)), key=lambda i: curve[N[i]][0])
    start = max(0, min(lowest - FITTED // 2, len(N) - FITTED))
    return N[start : start + FITTED]


def points(curve):
    """(N (n,), nats (n,)) that are fitted: all seeds of the sizes around the lowest."""
    pairs = [(N, y) for N in around(curve) for y in curve[N] if y is not None]
    return tuple(np.array(part, float) for part in zip(*pairs, strict=True))


def parabola(N, nats):
    """(log N in the middle, coefficients (3,) or (3, R)) through N (n,), nats (n,) or (n, R)."""
    x = np.log(N)  # (n,)
    return x.mean(), np.polyfit(x - x.mean(), nats, 2)


def minimum(N, nats):
    """(N* (R,), L* (R,)) of the parabolas through N (n,), nats (n, R); nan: they have none."""
    middle, (c, b, a) = parabola(N, nats)  # (R,) each
    c = np.where(c > 0, c, np.nan)
    return np.exp(middle - b / (2 * c)), a - b**2 / (4 * c)


def minima(curves, draws=DRAWS):
    """(N*, L*) (k, 1 + draws) of k curves (N (n,), nats (n,)) of one family.

    Without draws where too few points are left to know how large residuals are.
    """
    fits = []
    for N, nats in curves:
        middle, of_x = parabola(N, nats)
        fits.append(np.polyval(of_x, np.log(N) - middle))  # (n,)
    rest = np.concatenate([nats - fit for (_, nats), fit in zip(curves, fits, strict=True)])  # (m,)
    freedom = len(rest) - 3 * len(curves)
    enough = freedom >= FEWEST - 1
    wide = np.sqrt(len(rest) / freedom) * t95(freedom) / 1.96 if enough else 0.0
    generator, resampled = np.random.default_rng(0), []
    for (N, nats), fit in zip(curves, fits, strict=True):
        drawn = wide * generator.choice(rest, (len(N), draws * enough))  # (n, draws)
        resampled.append(minimum(N, np.column_stack([nats, fit[:, None] + drawn])))
    return tuple(np.array(part) for part in zip(*resampled, strict=True))


def law(C, y):
    """(exponent (R,), log y in the middle of log C (R,)) of power laws through C (k,), y (k, R)."""
    x, log_y = np.log(C) - np.log(C).mean(), np.log(y)  # (k,), (k, R)
    return x @ log_y / (x @ x), log_y.mean(0)


def laws(C, minima_of):
    """{what: {family: values (1 + draws,)}} from C (k,) and {"MDM", "ARM": (N*, L*)}.

    The compute: how much further along its line MDM has the L* that ARM has in the middle of log C.
    """
    slopes, levels = {"N*": {}, "L*": {}}, {"N*": {}, "L*": {}}
    for family, stars in minima_of.items():
        for star, y in zip(("N*", "L*"), stars, strict=True):
            slopes[star][family], levels[star][family] = law(C, y)
    estimates = {f"exponent of {star}": of_family for star, of_family in slopes.items()}
    above = {star: of_family["MDM"] - of_family["ARM"] for star, of_family in levels.items()}
    estimates["N* of MDM / of ARM"] = {"both": np.exp(above["N*"])}
    compute = np.exp(-above["L*"] / slopes["L*"]["MDM"])
    return estimates | {"compute of MDM / of ARM for one L*": {"both": compute}}


# ---- Tables --------------------------------------------------------------------------------------


def bounds(values):
    """{"": estimate, ", low", ", high"} of values (1 + draws,), 95%.

    Without the two where there are no draws, or a tenth of them had no minimum.
    """
    draws, middle = values[1:][np.isfinite(values[1:])], {"": float(values[0])}
    if len(draws) <= 0.9 * len(values):
        return middle
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return middle | {", low": low, ", high": high}


def spelled(values, form):
    """bounds as text."""
    middle, *ends = (f"{z:{form}}" for z in bounds(values).values())
    return f"{middle} [{', '.join(ends)}]" if ends else f"{middle} (no interval)"


def lowest_points(curves):
    """(rows, figures, {family: {C: (N*, L*) (2, 1 + draws)}} of the minima inside their grid).

    curves: {(family, C): {N: [nats of each seed]}}.
    """
    rows, figures, inside = [], {}, {family: {} for family in FAMILIES}
    for family in FAMILIES:
        done = [C for kind, C in curves if kind == family and is_whole(curves[kind, C])]
        lowest = minima([points(curves[family, C]) for C in done]) if done else ()
        stars_of = {C: np.stack([part[i] for part in lowest]) for i, C in enumerate(done)}
        for C in (C for kind, C in curves if kind == family):
            curve, stars = curves[family, C], stars_of.get(C)  # (2, 1 + draws)
            row, is_inside = row_of(family, C, curve, stars)
            rows.append(row)
            if is_inside:
                inside[family][C] = stars
                for name, values in zip(("N*", "L*"), stars, strict=True):
                    ends = bounds(values).items()
                    figures |= {f"{family} at {C:.3e}, {name}{end}": z for end, z in ends}
    return sorted(rows, key=lambda row: float(row["FLOPs"])), figures, inside


def row_of(family, C, curve, stars):
    """(row of a curve, whether its minimum is inside the grid); stars None: left out."""
    N = sorted(curve)
    row = {"FLOPs": f"{C:.0e}", "family": family, "sizes": f"{len(N)}"}
    row |= {"from": f"{N[0]:,}", "to": f"{N[-1]:,}"}
    if stars is None:
        return row | dict.fromkeys(("N*", "L*", "N*_is"), "left out"), False
    if np.isnan(stars[0, 0]):
        return row | dict.fromkeys(("N*", "L*", "N*_is"), "no minimum"), False
    row |= {"N*": spelled(stars[0], ",.0f"), "L*": spelled(stars[1], ".3f")}
    lowest = min(N, key=lambda n: curve[n][0])
    is_inside = lowest not in (N[0], N[-1]) and N[0] < stars[0, 0] < N[-1]
    return row | {"N*_is": "inside the grid" if is_inside else "at its edge"}, is_inside


def power_laws(inside):
    """(rows, figures): ours, where two budgets have both families, beside the paper's points."""
    C = np.array([C for C in inside["MDM"] if C in inside["ARM"]])
    stars = {
        family: [np.array([z]).T for z in papers.ISOFLOP[family].values()] for family in FAMILIES
    }
    theirs, ours = laws(np.array(papers.BUDGETS), stars), {}
    if len(C) > 1:
        stars = {family: np.stack([inside[family][c] for c in C], axis=1) for family in FAMILIES}
        ours = laws(C, stars)
    rows, figures = [], {}
    for what, family in [(w, family) for w, of_family in theirs.items() for family in of_family]:
        row = {"of": what, "family": family, "ours": "needs two budgets"}
        if ours:
            row["ours"] = spelled(ours[what][family], ".3g")
            figures |= {f"{what}, {family}{k}": z for k, z in bounds(ours[what][family]).items()}
        row["SMDM's points"] = f"{theirs[what][family][0]:.3g}"
        rows.append(row | {"SMDM, printed": papers.LAWS.get((what, family), "")})
    return rows, figures


def at_equal_sizes(curves):
    """Rows of MDM - ARM of the first seed at equal parameters and FLOPs."""
    rows, budgets = [], sorted({C for _, C in curves})
    common = {C: curves["MDM", C].keys() & curves["ARM", C].keys() for C in budgets}
    for N in sorted(set().union(*common.values())):
        row = {"parameters": f"{N:,}"}
        for C in budgets:
            shown = "left out" if N in common[C] else ""
            mdm, arm = (curves[family, C].get(N, [None])[0] for family in FAMILIES)
            if mdm is not None and arm is not None:
                shown = f"{mdm:.3f} - {arm:.3f} = {mdm - arm:.3f}"
            row[f"{C:.0e} FLOPs"] = shown
        rows.append(row)
    return rows


# ---- The plot ------------------------------------------------------------------------------------


def figures_of(curves, seeds):
    """The points as figures, which are flat; curves_in reads them."""
    figures = {}
    for (family, C), curve in curves.items():
        for N, values in curve.items():
            for seed, value in zip(seeds, values, strict=False):
                name = f"{family} at {C:.3e}, {N} parameters, seed {seed}"
                figures |= {} if value is None else {name: value}
    return figures


def curves_in(figures):
    """{(family, C): {N: [nats]}} of the figures of an experiment."""
    curves = {}
    for key, nats in figures.items():
        if match := re.fullmatch(r"(\w+) at (\S+), (\d+) parameters, seed \d+", key):
            curve = curves.setdefault((match[1], float(match[2])), {})
            curve.setdefault(int(match[3]), []).append(nats)
    return curves


def draw(axes, figures):
    """The curves; N* and L* against C, ours and the paper's."""
    figure, curves = axes.figure, curves_in(figures)
    figure.set_size_inches(13, 4)
    axes.remove()
    left, *both = figure.subplots(1, 3)
    for (family, C), curve in curves.items():
        color = DARK if family == "MDM" else LIGHT
        pairs = [(N, y) for N in curve for y in curve[N]]
        left.plot(*zip(*pairs, strict=True), ".", color=color)
        if is_whole(curve):
            N, nats = points(curve)
            middle, of_x = parabola(N, nats)
            x = np.geomspace(N.min(), N.max())
            y = np.polyval(of_x, np.log(x) - middle)
            left.plot(x, y, color=color)
            left.annotate(f"{family} {C:.0e}", (x[0], y[0]), ha="right", fontsize=7)
    left.set(xscale="log", xlabel="parameters N", ylabel="nats per token")
    left.set_title("A curve for each number of operations C")
    for field, (star, key) in zip(both, {"N*": "N", "L*": "nats"}.items(), strict=True):
        for family in FAMILIES:
            ours = (
                (C, figures.get(f"{family} at {C:.3e}, {star}")) for f, C in curves if f == family
            )
            theirs = zip(papers.BUDGETS, papers.ISOFLOP[family][key], strict=True)
            draw_law(field, [pair for pair in ours if pair[1]], f"our {family}", family)
            draw_law(field, [*theirs], f"SMDM's {family}", family)
        field.set(xscale="log", yscale="log", xlabel="training FLOPs C")
    both[0].set_title("The best size N*")
    both[1].set_title("L*, nats per token (ours: bytes)")


def draw_law(axes, pairs, name, family):
    """The points (C, y) and the line through them, with its name."""
    if not pairs:
        return
    C, y = (np.array(part) for part in zip(*pairs, strict=True))
    color = DARK if family == "MDM" else LIGHT
    axes.plot(C, y, "o", color=color)
    axes.annotate(f"{name} ", (C[0], y[0]), ha="left", va="bottom", fontsize=7)
    if len(C) > 1:
        exponent, level = law(C, y[:, None])
        axes.plot(C, np.exp(level + exponent * (np.log(C) - np.log(C).mean())), color=color)
