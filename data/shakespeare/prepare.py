"""Tiny Shakespeare: 1.1 MB of plays, the text that small character models are compared on.

    python -m data.shakespeare.prepare [--input=FILE]

The last 10% of the text is held out, as is customary for this set, so that results can be compared
with others.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too

from config import require
from data import download, tokenizer, writer
from lib import program
from lib.files import opened
from run import load_checkpoint

DEFAULTS = {
    "input": "",  # a local copy of the text; without one it is downloaded
    "out": "data/shakespeare",  # folder to prepare
}

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main(config):
    # A UserError comes before a download.
    tokenizer.named(config["tokenizer"], [], load_checkpoint)
    path = config["input"] or download.fetch(URL, Path(config["out"], "raw/input.txt"), SHA256)
    with opened(path) as file:
        text = file.read()
    cut = int(0.9 * len(text))
    require(cut, f"{path} holds no text")
    vocabulary = tokenizer.named(config["tokenizer"], [text], load_checkpoint)
    meta = writer.prepare(config["out"], [("train", text[:cut]), ("val", text[cut:])], vocabulary)
    print(writer.summary(config["out"], meta))


if __name__ == "__main__":
    program.run(main, sys.modules[__name__], tokenizer)
