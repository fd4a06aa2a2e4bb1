"""Plumbing that the scripts use and that a reader of the method can skip.

Command-line programs, processes and devices, the optimizer, the fused loss, key-value caches,
files. Nothing here knows a network, its data or a checkpoint: it imports config and lib alone.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
