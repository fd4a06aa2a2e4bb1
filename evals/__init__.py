"""Evaluations other than evaluate.py, one program each: `python -m evals.NAME`.

Estimators of likelihoods belong in evaluate.py, the preparation of data in data/, and measurements
of a paper's claims in experiments/.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
