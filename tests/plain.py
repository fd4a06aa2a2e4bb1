"""The plain network and the plain recipe: what tests start from that are not about the defaults.

With train.py's own defaults a network that has not learnt says the same about everything.
"""

import model

DEFAULTS = model.DEFAULTS | {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 256}
DEFAULTS |= {"norm": "layer", "bias": True, "qk_norm": False, "zero_init": "none"}
RECIPE = {"zero_init": "none", "loss_weight": "bound", "mask_rate": "uniform", "compile": False}
RECIPE |= {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1}
RECIPE |= {"lr_decay": "cosine", "decay_start": 0.0}


def words_of(keys):
    """The words of a run with these keys, but for those that would change nothing of it."""
    left_out = ["eval_draws"] * (keys.get("objective") == "ar")
    left_out += ["decay_start"] * (keys.get("lr_decay") == "constant")
    return [f"--{key}={value}" for key, value in keys.items() if key not in left_out]
