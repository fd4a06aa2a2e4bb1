"""Data: token files and their loader, tokenizers, downloads, and a `prepare.py` for each data set.

`python -m data.NAME.prepare` writes a folder that train.py and evaluate.py read. Code that masks
tokens, or asks a network about them, does not belong here.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
