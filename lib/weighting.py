"""How training departs from the bound, with the same optimum: weights of tokens, rates of masks."""

import math

import torch

from config import Table

# Of a masked token in training, from the bound's (b,). Half of all L/k are above 2: so the factor
# keeps the size of the loss. The optimum is the same; sqrt and constant have gradients less noisy.
LOSS_WEIGHTS = Table(
    "loss_weight",
    bound=lambda weight: weight,
    sqrt=lambda weight: 2 * weight.sqrt(),
    constant=lambda weight: torch.full_like(weight, 2.0),
)


def bell(u, width=0.7):
    """Middle rates more often: u (b,) uniform -> logit-normal rates and their density (b,) each.

    1 - u gives 1 - rate, so pairs stay antithetic. (arXiv 2605.13026 has bells of other shapes.)
    """
    z = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))  # (b,) normal
    rate = torch.sigmoid(width * z)  # (b,)
    normal = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # (b,)
    return rate, normal / (width * rate * (1 - rate))


MASK_RATES = Table("mask_rate", uniform=lambda u: (u, torch.ones_like(u)), bell=bell)
