# SMDM's masked diffusion model of 170M parameters without embedding and head, 219M with them (arXiv
# 2410.18514, appendix B.2), from scratch with 1e20 FLOPs: the published mdm-170M-100e18.
#
#   python -m data.text.prepare --input=FOLDER --out=data/slimpajama --tokenizer=llama
#   torchrun --nproc-per-node=8 train.py configs/smdm_170m.py              --size=336M for another
#                                                                          of SMDM's sizes
#
# Steps:  C / (6 N x tokens a step) = 1e20 / (6 x 169.9e6 x 256 x 2,048) = 187,107; 1% of them are
#         the warm-up.
# Tokens: 187,107 x 256 x 2,048 = 98 billion.
# FLOPs:  1e20 as the paper counts them. With attention, and the head on the masked half, a token
#         costs 3 x 469 million, so the run costs 1.4e20.
# Hours:  1.4e20 / (989e12 x 0.3 x 3600) = 129 on one H100, 16 on eight. Computed: 28 to 32% of its
#         bfloat16 peak is what a roofline of every operation gives. `python -m experiments.gpu`
#         measures it.
# Memory: 35.5 GB at a micro-batch of 16; cards of 8, 16, 24 and 80 GB hold 1, 4, 8 and 32
#         sequences, with --recompute 8, 32, 64 and 256. Computed (experiments/scaling_up.py).
#
# Where the paper and the published code disagree, this follows the code, which presumably made the
# published weights:
#   learning rate  paper from 4e-4 to 4e-5, code from 2e-4 to 2e-5.
# And where this differs from the code on purpose: the probability of masking is stratified over the
# global batch, where theirs is the same draw in every process, and is u, not 1e-3 + (1 - 1e-3) u;
# learning rate and random length are set once a step, theirs with every micro-batch.
{
    "data": "data/slimpajama",
    "out_dir": "out/smdm_170m",
    # with it SMDM's block, and rotary tables in bfloat16 as theirs, so that the result can be
    # exported
    "size": "170M",
    "block_size": 2048,
    "qk_norm": False,
    "zero_init": "none",
    "objective": "lambda_dce",
    "loss_weight": "bound",
    "mask_rate": "uniform",
    # 0.01 for mdm-170M-100e18-rsl-0.01, with 188,047 steps: they are shorter on average
    "random_length": 0.0,
    "batch_size": 256,
    "micro_batch_size": 16,
    "max_iters": 187_107,
    "optimizer": "adamw",
    "learning_rate": 2e-4,
    "min_lr": 2e-5,
    "lr_decay": "cosine",
    "decay_start": 0.0,
    "warmup_iters": 1871,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "decay_all": True,
    "grad_clip": 1.0,
    "compile": True,
    "log_interval": 50,
    "eval_interval": 2000,
}
