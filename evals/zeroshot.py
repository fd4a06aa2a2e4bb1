"""Zero-shot perplexity: one table for texts of other kinds than a model was trained on.

    python -m data.zeroshot.prepare --set=all
    python -m evals.zeroshot --ckpt=JingyangOu/radd-t-dce                    RADD's five sets
    python -m evals.zeroshot --ckpt=out/fineweb --sets=lambada,ptb

Each set is evaluated as by evaluate.py, with the same keys. Its result is stored in the file `out`
under everything it depends on, so an interrupted table is resumed and nothing is computed twice.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, too
from lib import program  # isort: skip (first, as in train.py)
import hashlib
import json
import math

import torch

import evaluate
from config import UserError, choose, plural, require
from data import loader
from lib.files import to_json, whole_file
from lib.stats import shown_perplexity
from run.subject import in_its_order, load_evaluable, open_text

DEFAULTS = {
    "sets": "all",  # all, or a list such as lambada,ptb
    "out": "out/zeroshot.jsonl",  # the file that keeps the results of finished sets
}

SETS = ["lambada", "wikitext2", "ptb", "wikitext103", "lm1b"]
FACTS = ["estimator", "draws", "strata", "precision", "schedule", "seed"]  # keys that a result
FACTS += ["sequences", "block_size", "protocol"]  # depends on


def main(config):
    """Evaluate the sets that `out` lacks, print the table and return its rows."""
    evaluate.check(config)
    keys = {"data", "split"} & set(config.get("user_keys", ()))
    require(
        not keys, f"--{min(keys, default='')} is for evaluate.py: zero-shot sets have their own"
    )
    folders = prepared(config["sets"])
    # A file that cannot be read or written, or a folder that does not fit, is an error now, not
    # after the first set.
    keep(config["out"], finished(config["out"]))
    subject = load_evaluable(config)
    config = in_its_order(config, subject, "estimator", evaluate.ESTIMATORS)
    for folder in folders.values():
        open_text(config, subject, folder, "test")
    weights, rows = digest(subject.model), []
    for name, folder in folders.items():
        identity = identify(config, folder, weights, subject)
        if identity in finished(config["out"]):
            print(f"{folder}: already in {config['out']}")
        else:
            result, text = evaluate.evaluate(config, subject, folder, "test")
            keep(config["out"], finished(config["out"]) | {identity: result})
            print(text)
        rows.append({"set": name} | finished(config["out"])[identity])
    print(table(rows))
    return rows


def prepared(sets):
    """{name: its folder} for the key `sets`; UserError if one is unknown or not prepared."""
    names = SETS if sets == "all" else [name.strip() for name in sets.split(",")]
    folders = {choose("set", name, SETS): Path("data/zeroshot", name) for name in names}
    for name, folder in folders.items():
        recipe = f"prepare it with: python {loader.preparer('zeroshot')} --set={name}"
        require((folder / "meta.json").is_file(), f"no prepared data in {folder}; {recipe}")
    return folders


# ---- Stored results ------------------------------------------------------------------------------


def digest(model):
    """A short hash of the network and its weights, since a file may change under the same name."""
    hashed = hashlib.blake2b(repr(sorted(model.config.items())).encode(), digest_size=8)
    for name, w in sorted(model.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(w.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def identify(config, folder, weights, subject):
    """Everything a result depends on, as one line of JSON."""
    facts = {key: config[key] for key in FACTS} | {"weights": weights, "as": subject.words}
    facts |= {"folder": str(folder), "text": loader.read_meta(folder)}
    return to_json(facts, sort_keys=True)


def finished(path):
    """{identity: result} of a file, one per line; {} without one, UserError for another kind."""
    try:
        text = Path(path).read_text(encoding="utf8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is no text")
        raise UserError(f"cannot read {path}: {reason}") from None
    results = {}
    for i, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            results[to_json(entry["identity"], sort_keys=True)] = entry["result"] | {}
        except (ValueError, KeyError, TypeError, RecursionError):
            message = "is no result of a zero-shot table; give another --out=FILE"
            raise UserError(f"{path} line {i} {message}") from None
    return results


def keep(path, results):
    """Write the results to the file atomically."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf8") as file:
        for identity, result in results.items():
            file.write(to_json({"identity": json.loads(identity), "result": result}) + "\n")


# ---- The table -----------------------------------------------------------------------------------


def table(rows):
    """The perplexities as text; +- is half a 95% interval, over the draws and over the text."""
    heads = ["set", "tokens", "nats/token", "perplexity", "+- draws", "+- text"]
    lines = ["{:12} {:>9} {:>10} {:>10} {:>9} {:>9}  estimator".format(*heads)]
    for row in rows:
        mean, high = row["nats_per_token"], row["interval"][1]
        halves = (row["draw_half"], None if high is None else high - mean)
        draws, text = (wider(mean, half) for half in halves)
        by = row["estimator"]
        if row["draw_error"] != 0:  # None: too few draws for an error
            by += f", {plural(row['draws'], 'draw')}"
        cells = f"{shown_perplexity(mean):>10} {draws:>9} {text:>9}  {by}"
        lines.append(f"{row['set']:12} {row['tokens']:9,} {mean:10.4f} {cells}")
    return "\n".join(lines)


def wider(mean, half):
    """How far the perplexity e^mean is from e^(mean + half), as text."""
    if half is None:
        return "unknown"
    return f"{math.exp(mean) * math.expm1(half):.2f}" if mean + half < 700 else "inf"


if __name__ == "__main__":
    program.run(main, *evaluate.MODULES, sys.modules[__name__])
