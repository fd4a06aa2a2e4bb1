"""The quality of samples as a frontier: the judge's nats against entropy, over temperatures.

A single generative perplexity says nothing: whoever writes less varied text has a better one (arXiv
2409.02908, 2604.02718). So a sampler is a *path*, a point for each temperature, and of two paths
the lower one is better at equal entropy. What stands beside:

- held-out text, the point where both numbers are right, which has a place below or above a path
- two samplers of nonsense: bytes drawn by their frequency (all variety, no sense), and one frequent
  word again and again (the judge likes nothing better): a measure that prefers them is no measure
- the n-gram distance: square root of the Jensen-Shannon divergence between the n-grams of the
  samples and of training text, 0 where they are equal, 1 where none is shared. A few samples are
  never at 0; held-out text of the same size is the floor.

    f = Frontier(runs, data)                           the judge is trained where --judge is empty
    rows = f.path(folder, "ancestral, 64 steps", steps=64) + f.references()
    figure = at_entropy(rows, "ancestral, 64 steps")   nats where the path has the text's entropy
"""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import config as settings
import sample
from data import loader, ngram
from data.tokenizer import from_meta
from evals import quality
from experiments.results import DARK
from experiments.runs import PAIR
from lib.stats import mean_and_error
from run import checkpoint

DEFAULTS = {
    "judge": "",  # a checkpoint or hf:NAME; empty: an ARM of another seed and twice the FLOPs
    "num_samples": 64,  # of each point; 2 or more
    "length": 128,  # tokens of a sample; 2 or more
    "temperatures": "0.7,0.8,0.9,1,1.1",  # the points of a path
}

HELD_OUT, N_GRAM = "held-out text", 3
MEASURES = ("nats", "entropy", "js")  # of a point; each has its standard error but js
FORMATS = {"nats": "{:.3f}", "entropy": "{:.3f}", "js": "{:.3f}", "repetition": "{:.3f}"}
FORMATS |= {"nats_error": "{:.3f}", "NFE": "{:.1f}", "seconds_a_sample": "{:.3f}"}


def frequencies(rows, n, V):
    """(n-grams (G,), their shares (G,)) of rows (N, L) of ids below V."""
    grams = np.concatenate([ngram.ngrams(row, n, V) for row in np.asarray(rows, np.int64)])
    grams, counts = np.unique(grams, return_counts=True)
    return grams, counts / counts.sum()


def js_distance(ours, theirs):
    """Distance of two frequencies, in [0, 1]: the root of the divergence in bits."""
    every = np.union1d(ours[0], theirs[0])  # (G,)
    p, q = np.zeros((2, len(every)))
    p[np.searchsorted(every, ours[0])] = ours[1]
    q[np.searchsorted(every, theirs[0])] = theirs[1]
    middle = (p + q) / 2
    terms = [(z * np.log2(np.divide(z, middle, out=np.ones_like(z), where=z > 0))) for z in (p, q)]
    return float(np.sqrt(max(0.0, (terms[0].sum() + terms[1].sum()) / 2)))


def at_entropy(rows, sampler, measure="nats"):
    """The measure on the straight lines of a path at the entropy of held-out text; None outside."""
    where = [row["entropy"] for row in rows if row["sampler"] == HELD_OUT]
    points = sorted((row["entropy"], row[measure]) for row in rows if row["sampler"] == sampler)
    if not where or not points or not points[0][0] <= where[0] <= points[-1][0]:
        return None
    return float(np.interp(where[0], *zip(*points, strict=True)))


def of_samples(judge, rows, tokenizer):
    """{"nats", "entropy": of each of the rows, lists of ids}, nats by the judge for a token."""
    records = [{"text": tokenizer.decode(row), "tokens": row} for row in rows]
    nats, _ = quality.judge_nats(judge, quality.ids_for(judge, records)[0])  # (N,)
    lengths = [len(row) for row in rows]
    each = {"nats": (nats / lengths).tolist()}
    return each | {"entropy": [quality.entropy(row) for row in rows]}


class Frontier:
    """A judge, a text to compare with, and the points that were measured; see the file's top."""

    def __init__(self, runs, data, flops, keys=PAIR["ARM"]):
        """keys: of the judge, where it is trained."""
        self.runs, config = runs, runs.config
        self.data = runs.text(data)
        judge = config["judge"] or runs.train(data, keys, 2 * flops, min(runs.seeds) - 1)
        self.judge = str(judge) if judge else ""
        words = config["temperatures"].split(",")
        self.temperatures = [settings.typed("temperatures", word, 1.0) for word in words]
        self.N, self.length = 8 if config["quick"] else config["num_samples"], config["length"]
        self.opened = None

    def path(self, folder, name, **options):
        """Rows, one a temperature, of samples of a run; options are those of sample.sample."""
        rows = []
        for T in self.temperatures if folder and self.judge else []:
            parts = [Path(folder).name, name, T, sorted(options.items()), *self.parts()]
            row = self.runs.once(parts, lambda T=T: self.sampled(folder, T, options))
            rows += [{"sampler": name, "temperature": f"{T:g}"} | row] if row else []
        return rows

    def parts(self):
        return [self.judge, str(self.data), self.N, self.length]

    def sampled(self, folder, T, options):
        """The point of N samples at temperature T."""
        model, tokenizer, _ = checkpoint.load(folder, self.runs.device)
        L = min(model.block_size, self.length)
        x = torch.full((self.N, L), model.mask_id, device=self.runs.device)  # (N, L)
        keys = {"temperature": T, "seed": self.runs.config["seed"], "batch_size": self.N} | options
        with self.runs.autocast():
            tokens, info = sample.sample(model, x, progress=True, **keys)  # (N, L)
        row = self.point(tokens.tolist(), tokenizer)
        row |= {"NFE": float(info["nfe"].double().mean())}
        return row | {"seconds_a_sample": info["seconds"] / self.N}

    def open(self, L):
        """The judge, and the n-grams of as much training text in pieces of L, once."""
        if not self.opened:
            options = quality.DEFAULTS | self.runs.config | {"judge": self.judge, "batch_size": 64}
            train = loader.Tokens(self.data, "train")
            V, starts = train.vocab_size, range(0, len(train) - L, L)
            text = train.windows(np.array(loader.spread(starts, 4096)), L)  # (4096, L)
            self.opened = quality.open_judge(options), frequencies(text, N_GRAM, V), V
        return self.opened

    def point(self, rows, tokenizer):
        """The measures of samples, lists of ids: means and their standard errors."""
        judge, text, V = self.open(len(rows[0]))
        each = of_samples(judge, rows, tokenizer)
        mean = {name: mean_and_error(values) for name, values in each.items()}
        row = {name: mean[name][0] for name in ("nats", "entropy")}
        row |= {"js": js_distance(frequencies(rows, N_GRAM, V), text)}
        row |= {"repetition": float(np.mean([quality.VARIETY["repetition"](row) for row in rows]))}
        return row | {f"{name}_error": mean[name][1] for name in ("nats", "entropy")}

    def references(self):
        """Rows of held-out text and of nonsense, as many and as long as the samples."""
        if not self.judge:
            return []
        tokenizer = from_meta(loader.read_meta(self.data)["tokenizer"])
        L = min(32, self.length) if self.runs.config["quick"] else self.length
        held = self.runs.blocks(self.data, L, self.N)  # (N, L)
        train = loader.Tokens(self.data, "train")[: 2**20]  # (n,)
        words = Counter(tokenizer.decode(train.tolist()).split()).most_common(1)
        word = np.resize(tokenizer.encode(f"{words[0][0]} "), held.shape[1])  # (L,)
        drawn = np.random.default_rng(0).choice(train, held.shape)  # (N, L)
        texts = {HELD_OUT: held.tolist(), "nonsense: bytes by frequency": drawn.tolist()}
        texts["nonsense: one word"] = [word.tolist()] * len(held)
        rows = []
        for name, text in texts.items():
            row = self.runs.once(
                [name, *self.parts()], lambda text=text: self.point(text, tokenizer)
            )
            rows += [{"sampler": name, "temperature": ""} | row] if row else []
        return rows


def table_rows(rows):
    """Rows for results.table: what a reader compares, with standard errors."""
    shown = []
    for row in rows:
        line = {"sampler": row["sampler"], "temperature": row["temperature"]}
        line["judge's_nats"] = f"{row['nats']:.3f} ± {row['nats_error']:.3f}"
        line["entropy"] = f"{row['entropy']:.3f} ± {row['entropy_error']:.3f}"
        line |= {"n-gram_distance": f"{row['js']:.3f}", "repetition": f"{row['repetition']:.3f}"}
        line["NFE"] = f"{row['NFE']:.1f}" if "NFE" in row else ""
        shown.append(line)
    return shown


def figures_of(rows):
    """The points as figures, which are flat."""
    figures = {}
    for row in rows:
        name = f"{row['sampler']}, temperature {row['temperature']}".removesuffix(", temperature ")
        figures |= {f"{name}, {key}": row[key] for key in (*MEASURES, "NFE") if key in row}
    return figures


def draw(axes, figures):
    """Judge's nats against entropy: a path for each sampler, a point for each temperature."""
    points = {}
    for key, nats in figures.items():
        if match := re.fullmatch(r"(.*?)(, temperature \S+)?, nats", key):
            entropy = figures[f"{match[1]}{match[2] or ''}, entropy"]
            points.setdefault((match[1], bool(match[2])), []).append((entropy, nats))
    styles = itertools.cycle(("o-", "s--", "^:", "D-.", "v-"))
    for (name, is_path), path in points.items():
        x, y = zip(*path, strict=True)
        if is_path:
            axes.plot(x, y, next(styles), color=DARK, label=name)
        else:
            axes.plot(x, y, "*", color="black")
            axes.annotate(f" {name}", path[0], va="top")
    axes.set_xlabel("entropy of a sample's tokens, nats (more varied to the right)")
    axes.set_ylabel("judge's nats per token (the lower, the likelier)")
    axes.set_title("Samples by temperature: at equal entropy the lower path is better")
    if points:
        axes.legend(frameon=False)
