"""One script a claim, of the two papers or of this project: `python -m experiments.NAME [--quick]`.

Each prints one table and writes results/NAME.json, .md and .png. They share results.py (what they
write), runs.py (what they train) and what they can of each other; nothing outside imports from
here.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
