"""What the scripts need and a reader of the method need not open.

How a main(config) becomes a command, checkpoints and weight formats, processes and devices, the
optimizer, the fused loss, caches of keys and values, the log, files. Nothing here imports train,
sample, samplers or evaluate. What makes networks or runs (checkpoint, formats, budget, resume)
imports model, and resume and rows import diffusion.
"""

from lib import program  # noqa: F401 (first of all: from here on Ctrl-C is one line)
