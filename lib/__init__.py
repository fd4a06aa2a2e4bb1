"""Plumbing that the scripts use and that a reader of the method can skip.

Command-line programs, checkpoints and weight formats, processes and devices, the optimizer, the
fused loss, key-value caches, the log, files. Nothing here imports train, sample, samplers or
evaluate. Modules that build networks or set up runs (checkpoint, formats, budget, resume) import
model; resume and rows import diffusion.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
