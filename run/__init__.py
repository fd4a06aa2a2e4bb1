"""What a program works with: a run's checkpoint, its log, dial and clock, and requests to evaluate.

Modules here build networks and open data, so they import model, diffusion, data and lib. Nothing
here imports train, sample, samplers or evaluate.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)


def load_checkpoint(name):
    """run.checkpoint.load, imported when called: torch takes seconds, and few prepares need it."""
    from run import checkpoint

    return checkpoint.load(name)
