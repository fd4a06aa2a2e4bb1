# Where experiments start from, so that their figures do not depend on the machine: 2,400 steps of 6
# layers of 96 by the demo's recipe, but for its masking rates.
{
    "data": "data/pydocs",
    "out_dir": "out/pydocs",
    "n_layer": 6,
    "n_head": 2,
    "n_embd": 96,
    "batch_size": 32,
    "mask_rate": "uniform",
    "max_iters": 2400,
    "learning_rate": 1e-2,
    "warmup_iters": 50,
    "eval_interval": 500,
}
