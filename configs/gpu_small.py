# English web text by GPT-2's tokens, in an evening on one GPU of 8 to 24 GB: 52.8M parameters, of
# which 14.2M are in the blocks, and the rest in embedding and head.
#
#   python -m data.fineweb.prepare --shards=20      two billion tokens, 4 GB
#   python train.py configs/gpu_small.py            --micro_batch_size=128 from 16 GB on
#
# Tokens: 30,000 steps x 128 sequences x 512 = 2.0 billion, each read once.
# FLOPs:  a token costs 3 x 52 million (forward and backward; attention counted, the head on the
#         masked half only), so the run costs 3.1e17.
# Hours:  3.1e17 / (71e12 x 0.27 x 3600) = 4.5 on one RTX 3090, 1.9 on one RTX 4090, 2.6 on one L4:
#         122,000, 283,000 and 208,000 tokens a second. Computed: 27% of the bfloat16 peak is what a
#         roofline gives for radd_small on an H100. Smaller products are slower, and a card with
#         less arithmetic for each byte that it moves reaches more of its peak.
#         `python -m experiments.gpu` measures it.
# Memory: 4.9 GB at a micro-batch of 32; cards of 8, 16, 24 and 80 GB hold 32, 128, 128 and 512
#         sequences, with --recompute 256, 512, 1,024 and 2,048. Computed
#         (experiments/scaling_up.py).
# NELBO:  about 4.2 nats per token. Extrapolated by SMDM's scaling law (arXiv 2410.18514, from its
#         plot: 3.37 (C / 6e18)^-0.063 nats, C = 6 x 14.2M x tokens = 1.7e17) to a 36th of its
#         smallest budget. It is about Llama's tokens; GPT-2's are longer, so each costs more.
#
# The recipe is what the screenings of LOG.md suggest, which were short and small: Muon, the square
# root of the loss weight, GELU, RMSNorm, QK-norm, projections that start at zero. The learning rate
# falls with the square root of the width, from 1e-2 at pydocs' 96; no run of this size has tried
# it.
{
    "data": "data/fineweb",
    "out_dir": "out/gpu_small",
    "n_layer": 8,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 512,
    "norm": "rms",
    "mlp": "gelu",
    "bias": False,
    "qk_norm": True,
    "zero_init": "all",
    "objective": "any_order",
    "loss_weight": "sqrt",
    "mask_rate": "bell",
    "batch_size": 128,
    "micro_batch_size": 32,
    "max_iters": 30_000,
    "optimizer": "muon",
    "learning_rate": 5e-3,
    "warmup_iters": 200,
    "lr_decay": "linear",
    "decay_start": 0.3,
    "weight_decay": 0.1,
    "compile": True,
    "eval_interval": 2000,
}
