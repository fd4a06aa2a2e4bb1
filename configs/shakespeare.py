# The speedrun's recipe (experiments/speedrun.py): tiny Shakespeare by characters, in three minutes
# on two cores. What is not train.py's own was chosen on a part of the training text (LOG.md).
{
    "data": "data/shakespeare",
    "out_dir": "out/shakespeare",
    "n_layer": 4,
    "n_head": 2,
    "n_embd": 96,
    "conv": 9,
    "mask_rate": "bell",
    "batch_size": 32,
    "max_minutes": 3,
    "learning_rate": 1e-2,
    "warmup_iters": 50,
}
