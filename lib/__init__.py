"""Plumbing that the scripts use and that a reader of the method can skip.

Command-line programs, processes and devices, the optimizer, the fused loss, key-value caches,
files. Nothing here imports a network, data or a checkpoint: only config and lib.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
