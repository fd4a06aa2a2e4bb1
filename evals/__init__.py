"""Other ways to evaluate than evaluate.py, one program each: `python -m evals.NAME`.

What estimates a likelihood belongs in evaluate.py, what prepares data in data/, and a claim of a
paper that is measured in experiments/.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
