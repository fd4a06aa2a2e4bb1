"""Generative quality: what samples are worth to a judge and how varied they are, both always, and with what they cost.

    python quality.py --ckpt=out/pydocs --judge=out/pydocs_ar --num_samples=64     draws samples as sample.py does
    python quality.py --samples=FILE.jsonl --judge=hf:gpt2-large                    reads those of sample.py --out=FILE.jsonl

No number here means much alone. A sampler that repeats itself, or one whose noise is too coarse, has a *better* generative
perplexity and a lower entropy (arXiv 2409.02908; experiments/annealing.py). So all are printed together, with the network
calls, the dtype of the noise and the length, and --reference=FOLDER measures held-out text in the same way beside them.

Each is a mean over samples with its standard error, samples being the unit. Of one sample of L tokens:

  nats        -log p by the judge, summed over tokens: exact if the judge is causal, an upper bound if it is a masked model
  entropy     -sum_v f_v ln f_v, f_v being how often v is in the sample, over L (arXiv 2409.02908). It is ln L at most, so
              only samples of one length compare. (RADD's tables have 8.1 for 1024 tokens, more than ln 1024 = 6.9: bits?)
  distinct-n  different n-grams over n-grams (arXiv 1510.03055, where it is over all samples at once)
  repetition  1 - distinct-4, the part of its 4-grams that have been there before (seq-rep-4 of arXiv 1908.04319)

Generative perplexity is exp(all nats / all tokens). RADD (arXiv 2406.03736) reports the mean over samples of exp(nats /
tokens), which is never lower for samples of one length and which a few bad ones decide: it has a line of its own.

The judge reads the tokens themselves if its tokenizer makes the same text of them; else the text, encoded anew, and then
"per token" means the judge's tokens. What is longer than the judge can read is cut into blocks, each judged without what
stands before it. A Hugging Face judge works as in the papers: its first token in a block is read and not judged.
"""

import contextlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import config as settings
import diffusion
import likelihood
import sample
from config import UserError, require
from data import loader
from data.tokenizer import from_meta

DEFAULTS = {
    "judge": "",  # whatever checkpoint.load takes, or hf:NAME, a causal model for the package transformers
    "samples": "",  # judge this .jsonl file of sample.py --out= in place of samples drawn from ckpt
    "reference": "",  # a prepared folder: as much of its val text is measured in the same way
    "judge_draws": 16,  # draws of the corruption for each sample, where the judge is a masked model
}


# ---- Variety: measures of one sample, a list of ids ------------------------------------------------------------------


def entropy(tokens):
    """Entropy of the frequencies of the tokens, in nats: 0 for one token repeated, ln L for L different ones."""
    share = np.array(list(Counter(tokens).values())) / len(tokens)  # (different tokens,)
    return float(-(share * np.log(share)).sum())


def distinct(tokens, n):
    """Different n-grams over n-grams, in (0, 1]; 1 where there is none."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / max(1, len(grams)) if grams else 1.0


def repetition(tokens):
    """The part of the 4-grams that have been there before, in [0, 1)."""
    return 1 - distinct(tokens, 4)


# ---- Judges: encode(text), decode(ids), block_size, unjudged tokens a block, nats(blocks) -----------------------------


class Checkpoint:
    """A checkpoint that judges: a causal one exactly, a masked one by its bound."""

    unjudged = 0

    def __init__(self, config, device, autocast):
        name = config["judge"]
        self.model, tokenizer, trained = checkpoint.load(name, device)
        require(trained["tokenizer"], f"the judge {name} names no tokenizer, so it cannot read text")
        tokenizer = tokenizer or from_meta(trained["tokenizer"])  # says what it lacks, where it could not be built
        self.encode, self.decode, self.vocab_size = tokenizer.encode, tokenizer.decode, tokenizer.vocab_size
        self.block_size = self.model.block_size
        self.how = {"estimator": "ar" if trained["causal"] else "any_order", "draws": config["judge_draws"]}
        self.how |= {"seed": config["seed"], "batch_size": config["batch_size"], "autocast": autocast}
        masked = f"an upper bound by any_order, {config['judge_draws']} draws a sample: not comparable with exact nats"
        self.says = "exact nats of a causal network" if trained["causal"] else masked

    def nats(self, blocks):
        """Blocks, a list of S lists of ids -> (S,) float64."""
        return likelihood.sequence_nats(self.model, [np.array(block) for block in blocks], **self.how, progress=True).numpy()


class HuggingFace:
    """A causal language model by the package transformers; weights from safetensors only, no code from the repository."""

    unjudged = 1
    says = "exact nats of a causal network, but for the first token of each block"

    def __init__(self, config, device, autocast):
        name = config["judge"].removeprefix("hf:")
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise UserError(f"the judge hf:{name} needs one more package: pip install transformers") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True).float().to(device).eval()
        except (OSError, ValueError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"transformers cannot load the judge hf:{name}: {why}") from None
        self.block_size = getattr(self.model.config, "max_position_embeddings", 1024)
        self.vocab_size = len(self.tokenizer)
        self.device, self.autocast, self.batch_size = device, autocast, config["batch_size"]

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def nats(self, blocks):
        """Blocks, a list of S lists of ids -> (S,) float64."""
        nats = np.zeros(len(blocks))
        for length in sorted({len(block) for block in blocks}):
            same = [i for i, block in enumerate(blocks) if len(block) == length]
            for start in range(0, len(same), self.batch_size):
                now = same[start : start + self.batch_size]
                x = torch.tensor([blocks[i] for i in now], device=self.device)  # (b, length)
                with self.autocast():
                    logits = self.model(x).logits.float()  # (b, length, V)
                ce = F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none")  # (b, length - 1)
                nats[now] = ce.double().sum(1).cpu().numpy()
        return nats


def open_judge(config, device, autocast):
    """The judge that config["judge"] names; UserError where there is none."""
    require(config["judge"], "say who judges: --judge=CHECKPOINT, or --judge=hf:NAME (gpt2-large is the usual one)")
    settings.at_least(1, config, "judge_draws")
    return (HuggingFace if config["judge"].startswith("hf:") else Checkpoint)(config, device, autocast)


def ids_for(judge, records):
    """The ids of each sample that the judge reads, and whether they are the sample's own."""

    def reads(record):
        return max(record["tokens"]) < judge.vocab_size and judge.decode(record["tokens"]) == record["text"]

    own = all(reads(record) for record in records)
    ids = []
    for i, record in enumerate(records, start=1):
        try:
            ids.append(record["tokens"] if own else judge.encode(record["text"]))
        except UserError as error:
            raise UserError(f"the judge cannot read sample {i}: {error}") from None
        require(len(ids[-1]) > judge.unjudged, f"sample {i} has {len(ids[-1])} tokens for the judge: nothing to judge")
    return ids, own


def judge_nats(judge, ids):
    """Nats of each sample, and how many tokens they are for: ids, a list of S lists -> (S,), (S,)."""
    size = judge.block_size
    blocks = [(s, row[i : i + size]) for s, row in enumerate(ids) for i in range(0, len(row), size)]
    blocks = [(s, block) for s, block in blocks if len(block) > judge.unjudged]
    nats, counted = np.zeros(len(ids)), np.zeros(len(ids))
    np.add.at(nats, [s for s, _ in blocks], judge.nats([block for _, block in blocks]))
    np.add.at(counted, [s for s, _ in blocks], [len(block) - judge.unjudged for _, block in blocks])
    return nats, counted


# ---- All measures of some samples ------------------------------------------------------------------------------------


def mean(values):
    """(mean, its standard error) of one number a sample; one sample has no error: infinite."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def measure(records, judge):
    """{measure: (mean, standard error)} of samples {"text", "tokens"}, and what the judge read, in words."""
    ids, own = ids_for(judge, records)
    nats, counted = judge_nats(judge, ids)  # (S,), (S,)
    per_token, error = likelihood.mean_and_error(nats, counted)
    ppl = math.exp(min(per_token, 700.0))
    found = {"generative perplexity": (ppl, ppl * error), "nats per token": (per_token, error)}
    found["mean of the samples' own perplexities"] = mean(np.exp(np.minimum(nats / counted, 700)))
    rows = [record["tokens"] for record in records]
    found["entropy, nats"] = mean([entropy(row) for row in rows])
    for n in (1, 2, 3):
        found[f"distinct-{n}"] = mean([distinct(row, n) for row in rows])
    found["repetition"] = mean([repetition(row) for row in rows])
    found["length"] = mean([len(row) for row in rows])
    read = "tokens as they are" if own else "the text, encoded anew"
    cut = max(map(len, ids)) > judge.block_size
    return found, read + f", in blocks of {judge.block_size}" * cut


def held_out(folder, records):
    """As many blocks of the val text of a prepared folder as there are samples, as long as these: records."""
    text, length = loader.Tokens(folder, "val"), max(len(record["tokens"]) for record in records)
    tokenizer = from_meta(text.meta["tokenizer"])
    first = records[0]
    same = max(first["tokens"]) < tokenizer.vocab_size and tokenizer.decode(first["tokens"]) == first["text"]
    require(same, f"{folder} has another tokenizer than the samples, so entropy and distinct-n would not compare")
    require(len(text) >= length, f"{folder} val has {len(text)} tokens, fewer than a sample ({length})")
    starts = likelihood.spread(range(0, len(text) - length + 1, length), len(records))
    rows = [text[start : start + length].tolist() for start in starts]
    return [{"text": tokenizer.decode(row), "tokens": row} for row in rows]


# ---- Where samples come from -----------------------------------------------------------------------------------------


def read_samples(path):
    """The records in a file of sample.py --out=, dicts with text, tokens and nfe. UserError names the line."""
    require(Path(path).is_file(), f"no file of samples {path}; write one with: python sample.py --out={path}")
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number} is not JSON") from None
        wanted = {"text": str, "tokens": list, "nfe": int}
        for key, kind in wanted.items():
            good = isinstance(record, dict) and isinstance(record.get(key), kind)
            require(good, f"{path}, line {number}: no {key}, or not a {kind.__name__}; a sample has {', '.join(wanted)}")
        good = record["tokens"] and all(type(i) is int and i >= 0 for i in record["tokens"])
        require(good, f"{path}, line {number}: tokens must be a list of ids, at least one")
        records.append(record)
    require(records, f"{path} holds no samples")
    return records


def samples_of(config):
    """(records, how they were made): read from the file, or drawn by sample.py with this config."""
    if config["samples"]:
        clash = {"ckpt", "steps", "sampler", "num_samples"} & set(config.get("given", ()))
        require(not clash, f"--samples are there already: leave --{min(clash, default='')} out, or leave --samples out")
        records = read_samples(config["samples"])
        noise = {str(record.get("noise", "not recorded (float64 in sample.py)")) for record in records}
        return records, f"from {config['samples']}; noise {', '.join(sorted(noise))}"
    with contextlib.redirect_stdout(None):  # the samples themselves are not what is asked for
        records = sample.main(config)
    said = [f"{key} {config[key]}" for key in ("sampler", "steps", "temperature", "top_k", "top_p", "cfg", "seed")]
    return records, f"from {config['ckpt']}: {', '.join(said)}; noise float64"


def main(config):
    """Measures the samples and prints all of it; returns {measure: value, "measure, error": standard error}."""
    device, autocast = settings.machine(config)
    judge = open_judge(config, device, autocast)
    records, made = samples_of(config)
    held = held_out(config["reference"], records) if config["reference"] else []
    found, read = measure(records, judge)
    found = {"network calls a sample (NFE)": mean([record["nfe"] for record in records])} | found
    beside = measure(held, judge)[0] if held else {}

    print(f"{len(records)} samples {made}")
    print(f"judge {config['judge']}: {judge.says}; it read {read}")
    print(f"{'mean ± standard error over samples':40}{'samples':>22}{'held-out text' if beside else '':>22}")
    for name, pair in found.items():
        cells = [f"{value:.4g} ± {error:.2g}" for value, error in [pair, *([beside[name]] if name in beside else [])]]
        print(f"{name:40}" + "".join(f"{cell:>22}" for cell in cells))
    flat = {name: value for name, (value, _) in found.items()} | {f"{name}, error": e for name, (_, e) in found.items()}
    return flat | {f"held-out {name}": value for name, (value, _) in beside.items()}


if __name__ == "__main__":
    settings.run(main, settings, diffusion, sample, sys.modules[__name__])
