"""Generative quality: how likely samples are under a judge and how varied, always both.

    python -m evals.quality --ckpt=out/pydocs --judge=out/pydocs_ar --num_samples=64
    python -m evals.quality --samples=FILE.jsonl --judge=hf:gpt2-large

The first command draws samples as sample.py does, the second reads those of sample.py
--out=FILE.jsonl. No number here means much alone: a sampler that repeats itself or whose noise is
too coarse has a *better* generative perplexity and a lower entropy (arXiv 2409.02908;
experiments/annealing.py). So all are printed together, with the network calls and the length, and
--reference=FOLDER adds the same measures of held-out text.

Each is a mean over samples with its standard error. For one sample of L tokens:

  nats        -log p under the judge: exact if it is causal, an upper bound if it is a masked model
  entropy     -sum_v f_v ln f_v, where f_v is the count of v in the sample over L (arXiv
              2409.02908). It is at most ln L, so only samples of equal length compare. (RADD's
              tables have 8.1 for 1024 tokens, more than ln 1024 = 6.9: bits?)
  distinct-n  distinct n-grams over all n-grams (arXiv 1510.03055, there over all samples at once)
  repetition  1 - distinct-4: the share of repeated 4-grams (seq-rep-4 of arXiv 1908.04319)

Generative perplexity is exp(all nats / all tokens). RADD (arXiv 2406.03736) reports the mean over
samples of exp(nats / tokens), which is never lower for samples of equal length and is dominated by
a few bad ones; it has its own line.

The judge reads the tokens themselves if its tokenizer decodes them to the same text; otherwise the
text, encoded again, and then "per token" means the judge's tokens. A sample longer than the judge
can read is cut into blocks, each judged without the text before it. A Hugging Face judge works as
in the papers: it reads the first token of a block but does not judge it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, too
from lib import program  # isort: skip (first, as in train.py)
import contextlib
import functools
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
import sample
from config import UserError, first_line, plural, require
from data import examples, loader
from data.tokenizer import from_meta
from lib.device import machine
from lib.files import optional
from lib.stats import FEWEST, finite, mean_and_error, perplexity, plus_minus
from run.subject import in_its_order, load_evaluable

DEFAULTS = {
    "judge": "",  # anything checkpoint.load takes, or hf:NAME, a causal model of transformers
    "samples": "",  # judge this .jsonl file of sample.py --out= instead of samples of ckpt
    "reference": "",  # a prepared folder: measure as much of its val text in the same way
    "judge_draws": 16,  # per sample, if the judge is a masked model; in [1, 1e6]
}


# ---- Variety: measures of one sample, a list of ids ----------------------------------------------


def entropy(tokens):
    """Entropy of the token frequencies: 0 for one repeated token, ln L for L distinct ones."""
    share = np.array(list(Counter(tokens).values())) / len(tokens)  # (different tokens,)
    return float(-(share * np.log(share)).sum())


def distinct(tokens, n):
    """Distinct n-grams over all n-grams, in (0, 1]; 1 if there are none."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / max(1, len(grams)) if grams else 1.0


VARIETY = {
    "entropy, nats": entropy,
    **{f"distinct-{n}": functools.partial(distinct, n=n) for n in (1, 2, 3)},
    "repetition": lambda tokens: 1 - distinct(tokens, 4),
    "length": len,
}


# ---- Judges: encode, decode, vocab_size, block_size, unjudged tokens per block, nats(blocks) -----


class Checkpoint:
    """A checkpoint as a judge: a causal one exactly, a masked one by its bound."""

    unjudged = 0

    def __init__(self, config):
        config = evaluate.DEFAULTS | config | {"ckpt": config["judge"]}
        self.subject = load_evaluable(config, reads_text=True)
        tokenizer = self.subject.tokenizer
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.vocab_size, self.block_size = tokenizer.vocab_size, self.subject.model.block_size
        draws = config["judge_draws"]
        self.options = {"draws": draws, "seed": config["seed"], "batch_size": config["batch_size"]}
        bound = f"an upper bound by any_order, {plural(draws, 'draw')} a sample: not comparable"
        exact = "exact nats of a causal network"
        self.words = exact if self.subject.causal else f"{bound} with exact nats"

    def nats(self, blocks):
        """Nats of S blocks, a list of lists of ids: (S,) float64."""
        blocks = [np.array(block) for block in blocks]
        with self.subject.autocast():
            nats, _ = evaluate.estimate(self.subject.model, blocks, progress=True, **self.options)
        return nats.numpy()


class HuggingFace:
    """A causal model of the package transformers: safetensors weights, no remote code."""

    unjudged = 1
    words = "exact nats of a causal network, but for the first token of each block"

    def __init__(self, config):
        name = config["judge"].removeprefix("hf:")
        hf = optional("transformers", f"the judge hf:{name}")
        try:
            self.tokenizer = hf.AutoTokenizer.from_pretrained(name)
            model = hf.AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"transformers cannot load the judge hf:{name}: {reason}") from None
        self.device, self.autocast = machine(config)
        self.model, self.batch_size = model.float().to(self.device).eval(), config["batch_size"]
        self.block_size = getattr(model.config, "max_position_embeddings", 1024)
        self.vocab_size = len(self.tokenizer)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def nats(self, blocks):
        """Nats of S blocks, a list of lists of ids: (S,) float64."""
        nats, lengths = np.zeros(len(blocks)), np.array([len(block) for block in blocks])  # (S,)
        for length in np.unique(lengths):
            members = np.flatnonzero(lengths == length)
            for start in range(0, len(members), self.batch_size):
                now = members[start : start + self.batch_size]  # (b,)
                x = torch.tensor([blocks[i] for i in now], device=self.device)  # (b, length)
                with self.autocast():
                    logits = self.model(x).logits.float()  # (b, length, V)
                logits = logits[:, :-1].transpose(1, 2)  # (b, V, length - 1)
                ce = F.cross_entropy(logits, x[:, 1:], reduction="none")  # (b, length - 1)
                nats[now] = ce.double().sum(1).cpu().numpy()
        return nats


def open_judge(config):
    """The judge that config["judge"] names; UserError if there is none."""
    name = config["judge"]
    usual = "--judge=hf:NAME (gpt2-large is the usual one)"
    require(name, f"say who judges: --judge=CHECKPOINT, or {usual}")
    return HuggingFace(config) if name.startswith("hf:") else Checkpoint(config)


def ids_for(judge, records):
    """The ids that the judge reads for each sample, and whether they are the sample's own."""
    own_tokens = all(reads(judge, record) for record in records)
    ids = []
    for i, record in enumerate(records, start=1):
        try:
            ids.append(record["tokens"] if own_tokens else judge.encode(record["text"]))
        except UserError as error:
            raise UserError(f"the judge cannot read sample {i}: {error}") from None
        message = f"sample {i} has {plural(len(ids[-1]), 'token')} for the judge: nothing to judge"
        require(len(ids[-1]) > judge.unjudged, message)
    return ids, own_tokens


def reads(tokenizer, record):
    """Whether this tokenizer (or judge) decodes a sample's tokens to its text."""
    tokens = record["tokens"]
    return max(tokens) < tokenizer.vocab_size and tokenizer.decode(tokens) == record["text"]


def judge_nats(judge, ids):
    """Nats of each sample, and how many tokens were judged: S lists of ids -> (S,), (S,)."""
    size = judge.block_size
    blocks = [(s, row[i : i + size]) for s, row in enumerate(ids) for i in range(0, len(row), size)]
    blocks = [(s, block) for s, block in blocks if len(block) > judge.unjudged]
    nats, counted = np.zeros(len(ids)), np.zeros(len(ids))
    of_block = finite(judge.nats([block for _, block in blocks]), "log-likelihoods by the judge")
    np.add.at(nats, [s for s, _ in blocks], of_block)
    np.add.at(counted, [s for s, _ in blocks], [len(block) - judge.unjudged for _, block in blocks])
    return nats, counted


# ---- All measures of some samples ----------------------------------------------------------------


def measure(records, judge):
    """({measure: (mean, standard error)} of samples {"text", "tokens"}, what the judge read)."""
    ids, own_tokens = ids_for(judge, records)
    nats, counted = judge_nats(judge, ids)  # (S,), (S,)
    per_token, error = mean_and_error(nats, counted)
    ppl, ppls = perplexity(per_token), [perplexity(each) for each in nats / counted]
    measures = {"generative perplexity": (ppl, ppl * error), "nats per token": (per_token, error)}
    with np.errstate(invalid="ignore", over="ignore"):  # a perplexity may be infinite
        measures["mean of the samples' own perplexities"] = mean_and_error(ppls)
    for name, variety in VARIETY.items():
        measures[name] = mean_and_error([variety(record["tokens"]) for record in records])
    read = "tokens as they are" if own_tokens else "the text, encoded anew"
    if max(map(len, ids)) > judge.block_size:
        read += f", in blocks of {judge.block_size}"
    return measures, read


def reference_records(folder, records):
    """Records of a folder's val text: as many blocks as there are samples, and equally long."""
    text, length = loader.Tokens(folder, "val"), max(len(record["tokens"]) for record in records)
    tokenizer = from_meta(text.meta["tokenizer"])
    message = f"{folder} has another tokenizer than the samples"
    require(reads(tokenizer, records[0]), f"{message}, so entropy and distinct-n would not compare")
    message = f"{folder} val has {plural(len(text), 'token')}, fewer than a sample ({length})"
    require(len(text) >= length, message)
    starts = loader.spread(range(0, len(text) - length + 1, length), len(records))
    rows = [text[start : start + length].tolist() for start in starts]
    return [{"text": tokenizer.decode(row), "tokens": row} for row in rows]


# ---- Where samples come from ---------------------------------------------------------------------


def read_samples(path):
    """The records of sample.py --out=, dicts with text, tokens, nfe; UserError names the line."""
    write = f"write one with: python sample.py --out={path}"
    require(Path(path).is_file(), f"no file of samples {path}; {write}")
    records = []
    for where, record in examples.records(path):
        for key, form in {"text": str, "tokens": list, "nfe": int}.items():
            message = f"no {key}, or not a {form.__name__}; a sample has text, tokens, nfe"
            require(isinstance(record.get(key), form), f"{where}: {message}")
        ids = record["tokens"]
        all_ids = ids and all(type(i) is int and i >= 0 for i in ids)
        require(all_ids, f"{where}: tokens must be a list of ids, at least one")
        records.append(record)
    require(records, f"{path} holds no samples")
    return records


def samples_of(config):
    """(records, their source in words): read from the file, or drawn by sample.py."""
    if config["samples"]:
        clash = {"ckpt", "steps", "sampler", "num_samples"} & set(config["user_keys"])
        leave = f"leave --{min(clash, default='')} out, or leave --samples out"
        require(not clash, f"--samples are there already: {leave}")
        return read_samples(config["samples"]), f"from {config['samples']}"
    for_sample = {key: value for key, value in config.items() if key not in DEFAULTS}
    with contextlib.redirect_stdout(None):  # the samples themselves are not wanted
        subject = sample.open_model(for_sample)
        config = in_its_order(config, subject, "sampler", sample.SAMPLERS)
        records = sample.fill(for_sample | {"sampler": config["sampler"]}, subject)
    keys = ("sampler", "steps", "temperature", "top_k", "top_p", "cfg_scale", "seed")
    options = ", ".join(f"{key} {config[key]}" for key in keys)
    return records, f"from {config['ckpt']}: {options}; noise float64"


def main(config):
    """Print all measures of the samples; return {measure: value, "measure, error": its error}."""
    judge = open_judge(config)
    records, source = samples_of(config)
    held = reference_records(config["reference"], records) if config["reference"] else []
    nfe = mean_and_error([record["nfe"] for record in records])
    measures, read = measure(records, judge)
    measures = {"network calls a sample (NFE)": nfe} | measures
    beside = measure(held, judge)[0] if held else {}

    print(f"{plural(len(records), 'sample')} {source}")
    print(f"judge {config['judge']}: {judge.words}; it read {read}")
    error = "± standard error" if len(records) >= FEWEST else "(too few for an error)"
    heads = f"mean {error} over samples", "samples", "held-out text" if held else ""
    print("{:40}{:>22}{:>22}".format(*heads))
    for name in measures:
        pairs = [part[name] for part in (measures, beside) if name in part]
        cells = [f"{value:.4g}{plus_minus(error, '.2g', '±')}" for value, error in pairs]
        print(f"{name:40}" + "".join(f"{cell:>22}" for cell in cells))
    flat = {name: value for name, (value, _) in measures.items()}
    flat |= {f"{name}, error": error for name, (_, error) in measures.items()}
    return flat | {f"held-out {name}": value for name, (value, _) in beside.items()}


if __name__ == "__main__":
    program.run(main, *sample.MODULES, sys.modules[__name__])
