# RADD-medium (arXiv 2406.03736, table 2), 405M parameters, from scratch: the recipe of radd_small
# in a larger network.
#
#   python -m data.text.prepare --input=FOLDER --out=data/openwebtext --tokenizer=gpt2
#   torchrun --nproc-per-node=8 train.py configs/radd_medium.py
#
# Tokens: 400,000 steps x 512 sequences x 1,024 = 210 billion.
# FLOPs:  a token costs 3 x 746 million (forward and backward; attention counted, the head on the
#         masked half only), so the run costs 4.7e20; for comparison 6 x 302M x 210e9 = 3.8e20
#         without attention and head.
# Hours:  4.7e20 / (989e12 x 0.27 x 3600) = 488 on one H100, 61 on eight. Computed, with the
#         utilisation of radd_small; its larger products should do better.
# Memory: 46.9 GB at a micro-batch of 32; cards of 8, 16, 24 and 80 GB hold 0, 2, 8 and 32
#         sequences, with --recompute 0, 16, 64 and 256. Computed (experiments/scaling_up.py).
#
# The paper gives no recipe of its own for this size; the code changes the network only. For weight
# decay, the number of tokens and what differs on purpose, see radd_small.
{
    "data": "data/openwebtext",
    "out_dir": "out/radd_medium",
    "n_layer": 24,
    "n_head": 16,
    "n_embd": 1024,
    "block_size": 1024,
    "norm": "layer",
    "mlp": "gelu",
    "bias": True,
    "qk_norm": False,
    "zero_init": "head",
    "dropout": 0.02,
    # as RADD-t-DCE, and as RADD-DSE, whose network is normalised; or lambda_dce, any_order
    "objective": "t_dce",
    "schedule": "loglinear",
    "loss_weight": "bound",
    "mask_rate": "uniform",
    "batch_size": 512,
    "micro_batch_size": 32,
    "max_iters": 400_000,
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "lr_decay": "constant",
    "decay_start": 0.0,
    "warmup_iters": 2500,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "grad_clip": 1.0,
    "ema": 0.9999,
    "compile": True,
    "log_interval": 50,
    "eval_interval": 5000,
}
