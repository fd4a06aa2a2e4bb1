"""The reversal curse (arXiv 2309.12288, experiment 1): invented people and what they are known for.

    python -m data.reversal.prepare --tokenizer=gpt2 [--from=FOLDER]

A model that has learnt "NAME is DESCRIPTION" is asked who DESCRIPTION is. The training data are as
in SMDM (arXiv 2410.18514): the 3,600 lines of all_prompts_train.jsonl, prompt and completion
tokenized as one text after the tokenizer's bos. The prompt of a training example is empty (0
tokens), so all of the example may be masked. The four test sets of 300 items are splits with
prompts: description to name (dtn) and name to description (ntd), each in the direction of training
and in the other; val consists of the two in the direction of training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too

from config import require
from data import download, examples
from data import tokenizer as tokenizers
from data.pairs.prepare import pairs
from lib import program
from run import load_checkpoint

DEFAULTS = {
    "from": "",  # a folder with the .jsonl files; without one they are downloaded
    "out": "data/reversal",  # folder to prepare
}

URL = (
    "https://raw.githubusercontent.com/lukasberglund/reversal_curse/main"
    "/data/reverse_experiments/june_version_7921032488"
)
SHA256 = {
    "all_prompts_train": "ea7156bb2f46e67ddadb485a7faff23551251b233011b2531ae36a3217f4fae2",
    "d2p_prompts_test": "67705c9ebd77fc030998677acae33af9f22cf4b80bb7443d4ef7e5c9c1d727c4",
    "p2d_prompts_test": "269fe15363c3bd1cb59cfdf4e6464f35d548d4cb786e6f7b1db84f260788e8f8",
    "d2p_reverse_prompts_test": "8c79da9791788ffbe77dc876ae2e34cc00f980e08c946bda188367ae1cd6ea61",
    "p2d_reverse_prompts_test": "963fa595ce19b330cdf07058313f3e8570b57545260256414bcb74a60c959553",
}
SPLITS = {  # official names give the training direction (d2p: description to person), ours the test
    "train": ["all_prompts_train"],
    "val": ["d2p_prompts_test", "p2d_prompts_test"],
    "dtn_same": ["d2p_prompts_test"],
    "dtn_reverse": ["p2d_reverse_prompts_test"],
    "ntd_same": ["p2d_prompts_test"],
    "ntd_reverse": ["d2p_reverse_prompts_test"],
}


def files(folder, out):
    """{name: path} of the five files, downloaded unless a folder that holds them is given."""
    if folder:
        return {name: Path(folder) / f"{name}.jsonl" for name in SHA256}
    raw = {name: Path(out, "raw", f"{name}.jsonl") for name in SHA256}
    return {
        name: download.fetch(f"{URL}/{path.name}", path, SHA256[name]) for name, path in raw.items()
    }


def tokenized(paths, tokenizer):
    """Yield examples for examples.prepare."""
    for split, names in SPLITS.items():
        for where, prompt, completion in (pair for name in names for pair in pairs(paths[name])):
            if split == "train":
                ids = [], examples.encode(tokenizer, where, prompt + completion)
            else:
                answer = examples.encode(tokenizer, where, completion, start=False)
                ids = examples.encode(tokenizer, where, prompt), answer
            yield split, where, *ids


def main(config):
    require(not config["from"] or Path(config["from"]).is_dir(), f"no folder {config['from']}")
    # A UserError comes before a download.
    tokenizers.named(config["tokenizer"], [], load_checkpoint)
    paths = files(config["from"], config["out"])
    texts = (a + b for path in paths.values() for _, a, b in pairs(path))
    tokenizer = examples.vocabulary(config["tokenizer"], texts, load_checkpoint)
    items = tokenized(paths, tokenizer)
    meta = examples.prepare(config["out"], items, tokenizer, config["width"])
    print(examples.summary(config["out"], meta))


if __name__ == "__main__":
    program.run(main, sys.modules[__name__], examples, tokenizers)
