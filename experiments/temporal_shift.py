"""Later text: does masked diffusion lose less than an ARM that is as good on the text of its time?

    python -m experiments.temporal_shift --input=BOOKS

BOOKS: .jsonl files (perhaps .xz) of books, a line each, with title, year and text.

Claim (SMDM, arXiv 2410.18514): trained on SlimPajama to nearly the same validation loss, MDM is
better than ARM on web text of later years: a difference of differences.

Design. Networks learn from books before `cut` and are read on whole other books: of the same years,
and of each later decade. MDM gets `flops`. An ARM is as good long before, so ARMs of the same size
are trained to the end of half, a quarter ... of that, until one is above MDM's nats per byte on the
old books that are held out and one is below; what ARM has on each book is on the straight line
between these two, where both families are equal on the old books. So in each later decade MDM - ARM
is the difference of differences. Books count alike. Two intervals: of the books (would other books
of these years say so?) and of the seeds.

The years are of a book's first publication, so what is older than `first` is left out: its English
is a later translator's. So is what is younger than `last`, collections of older texts. Some books
in between are translations, too.

Budget: 3 runs of 1e14 FLOPs, and about a tenth of that for ARMs, 3.3e14 in all: 60 minutes on two
cores with bfloat16 instructions. Minimum: --flops=3e13.
"""

import math
import re
import statistics
import sys
from typing import NamedTuple

import torch

import config as settings
import evaluate
from data import examples, writer
from experiments import papers, results, runs
from lib import program
from lib.stats import plus_minus, t95
from run import checkpoint

DEFAULTS = {
    "input": "",  # files of books, separated by commas
    "first": 1700,  # books of earlier years are left out
    "cut": 1890,  # networks learn from books of earlier years
    "last": 1960,  # books of later years are left out
    "held_out": 0.4,  # in [0, 1], of the earlier books, by a hash of the title: few say little
    "flops": 1e14,  # of MDM's runs
    "blocks": 32,  # that are read of each book, evenly spaced; 0: all
}

LEARNT, OLD, LATER = "learnt", "old, held out", "all later"


class Book(NamedTuple):
    year: int
    title: str
    text: str


# ---- Books ---------------------------------------------------------------------------------------


def read(files):
    """The books of .jsonl files whose year is a number of four digits, one of each title."""
    books = {}
    for where, record in (each for path in writer.listed(files) for each in examples.records(path)):
        year, title, text = (
            examples.field(where, record, key) for key in ("year", "title", "text")
        )
        if re.fullmatch(r"\d{4}", year):
            books.setdefault(title, Book(int(year), title, text))
    return [*books.values()]


def cut_books(books, config):
    """{LEARNT, OLD, "1890s", ...: books}: each book whose year is between first and last, once."""
    first, cut, last = (config[key] for key in ("first", "cut", "last"))
    early = [book for book in books if first <= book.year < cut]
    share = writer.adjusted([book.title for book in early], config["held_out"])
    groups = {LEARNT: [], OLD: []}
    for book in early:
        groups[OLD if writer.is_held_out(book.title, share) else LEARNT].append(book)
    for book in sorted(book for book in books if cut <= book.year <= last):
        groups.setdefault(f"{book.year // 10 * 10}s", []).append(book)
    enough = len(groups) > 2 and all(groups.values())
    message = f"cut {cut} leaves no learnt, held out and later books; there are years"
    settings.require(enough, f"{message} {years(books)}")
    return groups


def years(books):
    return ", ".join(map(str, sorted({book.year for book in books})))


def quick_books():
    """Pieces of this repository's prose as books of two centuries."""
    text = "".join((runs.ROOT / name).read_text("utf8") for name in ("README.md", "LOG.md"))
    size = len(text) // 14
    return [Book(1800 + 10 * i, f"piece {i}", text[size * i : size * (i + 1)]) for i in range(14)]


# ---- Runs ----------------------------------------------------------------------------------------


class Shift:
    """The books as prepared data, and what networks have on each that is read."""

    def __init__(self, ctx, groups):
        self.ctx = ctx
        self.group_of = [name for name in groups if name != LEARNT for _ in groups[name]]
        self.books = [book for name in groups if name != LEARNT for book in groups[name]]
        parts = [("train", book.text) for book in groups[LEARNT]]
        parts += [("val", book.text) for book in groups[OLD]]
        parts += [(f"book{i}", book.text) for i, book in enumerate(self.books)]
        self.data = ctx.prepared(f"books_{results.mark(parts)[:8]}", parts)

    def of(self, group):
        """Indices of the books of a group."""
        later = group == LATER
        return [i for i, g in enumerate(self.group_of) if g == group or (later and g != OLD)]

    def read(self, kind, flops, seed):
        """Nats per byte on each book of a network that is trained for so many FLOPs; None: none."""
        ctx = self.ctx
        folder = ctx.train(self.data, runs.PAIR[kind], flops, seed)

        def measure():
            model, _, _ = checkpoint.load(folder, ctx.device)
            n, L, texts = ctx.config["blocks"], model.block_size, range(len(self.books))
            blocks = [ctx.blocks(self.data, L, n, f"book{i}") for i in texts]  # (n, L) each
            with ctx.autocast():
                keys = {"draws": 8, "batch_size": 64, "progress": True}
                nats, _ = evaluate.estimate(model, list(torch.cat(blocks).numpy()), **keys)  # (S,)
            parts = nats.split([len(block) for block in blocks])
            return [float(part.mean()) / L for part in parts]

        return ctx.once([folder.name, "books", ctx.config["blocks"]], measure) if folder else None

    def on_old(self, nats):
        return statistics.mean(nats[i] for i in self.of(OLD))

    def arm_like(self, target, seed):
        """(nats of an ARM on each book, its FLOPs) that has `target` on old ones; None: left out.

        Between two ARMs a factor of two in FLOPs apart, one above the target and one below.
        """
        most, known = self.ctx.config["flops"], {}
        flops = most / 32
        while flops not in known:
            known[flops] = nats = self.read("ARM", flops, seed)
            if nats is None or self.ctx.config["quick"]:
                return nats and (nats, flops)
            last, flops = flops, flops * (2 if self.on_old(nats) > target else 0.5)
            if not most / 2048 < flops <= most:
                return None
        one, other = known[flops], known[last]
        share = (target - self.on_old(other)) / (self.on_old(one) - self.on_old(other))
        nats = [share * x + (1 - share) * y for x, y in zip(one, other, strict=True)]
        return nats, flops**share * last ** (1 - share)


# ---- The table -----------------------------------------------------------------------------------


def difference(above, later, old):
    """(mean over books `later` less that over `old`, half of its 95% interval): above (books,)."""
    parts = [[above[i] for i in group] for group in (later, old)]
    mean = statistics.mean(parts[0]) - statistics.mean(parts[1])
    fewest = min(map(len, parts))
    if fewest < 2:
        return mean, math.inf
    error = sum(statistics.variance(part) / len(part) for part in parts) ** 0.5
    return mean, t95(fewest - 1) * error


def table_of(shift, pairs):
    """(rows, figures): pairs of nats of MDM and ARM on each book, one for each seed, or None."""
    done = [pair for pair in pairs if pair]
    above = [[m - a for m, a in zip(*pair, strict=True)] for pair in done]  # [seed][book]
    of_book = [statistics.mean(seeds) for seeds in zip(*above, strict=True)]
    rows, figures, old = [], {}, shift.of(OLD)
    for group in [*dict.fromkeys(shift.group_of), LATER]:
        books = shift.of(group)
        row = {"books": group, "how_many": f"{len(books)}"}
        for i, kind in enumerate(runs.PAIR):
            row[kind] = runs.spelled([statistics.mean(pair[i][b] for b in books) for pair in done])
        row |= {"MDM_-_ARM": "left out", "minus_old_(±_books)": "", "(±_seeds)": ""}
        rows.append(row)
        if not done:
            continue
        seeds = [statistics.mean(seed[b] for b in books) for seed in above]
        row["MDM_-_ARM"] = f"{statistics.mean(seeds):+.4f}"
        figures[f"{group}, MDM - ARM"] = statistics.mean(seeds)
        if group != OLD:
            mean, half = difference(of_book, books, old)
            row["minus_old_(±_books)"] = f"{mean:+.4f}{plus_minus(half, sign='±')}"
            seeds = [difference(seed, books, old)[0] for seed in above]
            row["(±_seeds)"] = runs.spelled(seeds, "+.4f")
            figures |= {f"{group}, minus old": mean}
            figures |= {f"{group}, half of its interval": half} if math.isfinite(half) else {}
    for book, value in zip(shift.books, of_book, strict=False):
        figures[f"{book.year}, {book.title}, MDM - ARM"] = value
    return rows, figures


def draw(axes, figures):
    """MDM - ARM of each book by its year, and of each decade."""
    books = [re.fullmatch(r"(\d{4}), .*, MDM - ARM", key) for key in figures]
    books = [(int(match[1]), figures[match[0]]) for match in books if match]
    old = figures.get(f"{OLD}, MDM - ARM", 0.0)
    if books:
        axes.plot(*zip(*books, strict=True), ".", color=results.LIGHT)
    for key, mean in figures.items():
        if match := re.fullmatch(r"(\d{3}0)s, minus old", key):
            half = figures.get(f"{match[1]}s, half of its interval", 0.0)
            axes.errorbar(int(match[1]) + 5, old + mean, half, fmt="o", color=results.DARK)
    axes.axhline(old, color="black", linewidth=0.5)
    axes.set(xlabel="year of publication", ylabel="MDM - ARM, nats per byte")
    axes.set_title("Equal on old books (line): who loses less on later ones? Below: MDM")


PLOTS = {"": draw}


def main(config):
    """Train, read, print and write; returns the figures."""
    quick = config["quick"]
    settings.require(quick or config["input"], "say where the books are: --input=FILE.jsonl.xz")
    groups = cut_books(quick_books() if quick else read(config["input"]), config)
    ctx = runs.Runs(config)
    shift, pairs, shares = Shift(ctx, groups), [], []
    for seed in ctx.seeds:
        mdm = shift.read("MDM", config["flops"], seed)
        arm = mdm and shift.arm_like(shift.on_old(mdm), seed)
        pairs.append(arm and (mdm, arm[0]))
        shares += [config["flops"] / arm[1]] if arm else []
    rows, figures = table_of(shift, pairs)
    learnt = sum(len(book.text.encode()) for book in groups[LEARNT]) / 1e6
    seeds = settings.plural(len(shares), "seed")
    title = f"Learnt from {len(groups[LEARNT])} books of {config['first']} to {config['cut'] - 1} "
    title += f"({learnt:.1f} MB), {seeds}: nats per byte, MDM by {config['flops']:.0e}"
    text = results.table(f"{title} FLOPs, ARM stopped where it has the same on old books", rows)
    if shares:
        less = statistics.geometric_mean(shares)
        text += f"\nThe ARM takes {less:.0f} times fewer FLOPs to be as good on old books.\n"
        figures["FLOPs of MDM / of ARM"] = less
    for later in [*papers.SHIFT["MDM"]][1:]:
        text += f"SMDM, SlimPajama to FineWeb of {later.removeprefix('FineWeb, ')}: "
        text += f"{papers.shift(later):+.3f} nats per Llama token.\n"
    return ctx.write("temporal_shift", text, figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
