"""Figures of the papers that experiments set beside ours, as printed there.

RADD: arXiv 2406.03736, version 4. Perplexities are per GPT-2 token, upper bounds for diffusion.
SMDM: arXiv 2410.18514. Its IsoFLOP points are read off its plots, to about 1%; perplexities are per
Llama token.
"""

import math
import statistics

SETS = ["lambada", "wikitext2", "ptb", "wikitext103", "lm1b"]
ZERO_SHOT = {  # RADD tables 1 (small) and 2 (medium), 400,000 steps, in the order of SETS
    "small": {
        "GPT-2": [45.04, 42.43, 138.43, 41.60, 75.20],
        "SEDD-Scale": [50.92, 41.84, 114.24, 40.62, 79.29],  # it has a time input, RADD none
        "t_dse": [49.57, 38.83, 111.74, 37.46, 72.35],
        "t_dce": [50.56, 39.02, 109.03, 36.38, 72.60],
        "lambda_dce": [51.70, 39.98, 107.85, 37.98, 72.99],
        "any_order": [50.27, 38.26, 110.38, 35.90, 74.28],
    },
    "medium": {
        "GPT-2": [35.66, 31.80, 123.14, 31.39, 55.72],
        "SEDD-Scale": [42.77, 31.04, 87.12, 29.98, 61.19],
        "t_dse": [42.30, 29.17, 75.16, 28.03, 57.45],
        "t_dce": [43.24, 30.19, 78.77, 29.36, 57.95],
        "lambda_dce": [44.10, 30.60, 82.08, 29.29, 60.32],
        "any_order": [41.96, 29.96, 79.06, 28.51, 57.07],
    },
}
STEPS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SAMPLING = {  # RADD table 3: medium, 1,024 tokens, batch 16, seconds a sample; float64 draws
    "RADD seconds": [0.45, 0.80, 1.54, 2.96, 5.32, 8.39, 12.28, 18.20],
    "SEDD seconds": [0.52, 0.99, 1.91, 3.78, 7.49, 14.93, 29.82, 59.56],  # a call in every step
    "RADD perplexity": [158, 113, 96, 89, 84, 83, 81, 81],
}
ORDERS = {"forward": 81.70, "backward": 103.68, "random": 83.10}  # RADD table 6, medium

BUDGETS = [6e18, 1e19, 3e19, 6e19, 1e20]  # SMDM's IsoFLOP curves: C = 6 N D
ISOFLOP = {  # the minimum of each: parameters without embedding and head; nats per Llama token
    "MDM": {"N": [84e6, 111e6, 229e6, 362e6, 479e6], "nats": [3.37, 3.26, 3.04, 2.92, 2.83]},
    "ARM": {"N": [152e6, 225e6, 446e6, 627e6, 1009e6], "nats": [2.85, 2.75, 2.55, 2.45, 2.38]},
}
LAWS = {  # what SMDM says of them, by isoflop.laws' names
    ("exponent of N*", "MDM"): "0.63",
    ("exponent of N*", "ARM"): "0.64",
    ("exponent of L*", "MDM"): "-0.063",
    ("exponent of L*", "ARM"): "-0.064",
    ("N* of MDM / of ARM", "both"): "about 1/2",
    ("compute of MDM / of ARM for one L*", "both"): "16",
}
SHIFT = {  # SMDM's first version, perplexities of networks of 170M: ARM 6e18, MDM 1e20 FLOPs
    "ARM": {"SlimPajama": 17.34, "FineWeb, February and March 2024": 27.01, "April 2024": 26.93},
    "MDM": {"SlimPajama": 18.02, "FineWeb, February and March 2024": 24.06, "April 2024": 24.01},
}
REPEATS = {  # arXiv 2507.15857, as its authors sum it up: epochs that are nearly as good as new
    "ARM": (4, 15),  # text, and after how many their worth has halved
    "MDM": (100, 500),
}
MORE_FLOPS = 16  # SMDM: training FLOPs of its MDM over those of its ARM, in MT-Bench, 1.1B both
ARM_SCORE, ARM_SECONDS = 1.57, 555  # SMDM, MT-Bench: by GPT-4o, of 80 answers one by one
MT_BENCH = {64: (1.40, 204), 128: (1.56, 396), 256: (1.60, 780)}  # the same of its MDM, by steps
UNSUPERVISED = {"LAMBADA": (36.0, 40.99), "OpenBookQA": (27.0, 34.2)}  # SMDM 220M: w = 0, w chosen


def nats_above(name, base, size="small"):
    """Mean over the five sets of log perplexity above `base`'s: nats per GPT-2 token."""
    table = ZERO_SHOT[size]
    pairs = zip(table[name], table[base], strict=True)
    return statistics.mean(math.log(one / other) for one, other in pairs)


def sampling_ratio(steps):
    """Seconds of a call in every step over RADD's, at 1,024 tokens; None: not in the table."""
    if steps not in STEPS:
        return None
    i = STEPS.index(steps)
    return SAMPLING["SEDD seconds"][i] / SAMPLING["RADD seconds"][i]


def shift(text):
    """MDM's log perplexity above ARM's on a later text, less that on SlimPajama."""
    above = {name: math.log(SHIFT["MDM"][name] / SHIFT["ARM"][name]) for name in SHIFT["MDM"]}
    return above[text] - above["SlimPajama"]


def steps_ratio(steps):
    """SMDM's seconds of its ARM over those of its MDM at so many steps."""
    return ARM_SECONDS / MT_BENCH[steps][1]
