"""Mask rates and loss weights, by which training departs from the bound but not its optimum.

The defaults do both: mask rates from a bell, and loss weights 2 sqrt(w), where w is the weight in
the bound under uniform rates (RADD eq. 2.16, 3.5, 3.6). No loss weight includes the bell's density.
The NELBO in the log divides w by it, so that it is the bound for any mask rates.
"""

import math

import torch

from config import Table
from lib.entries import check_loss_weight, check_mask_rate

# {name: weight of a masked token in the bound under uniform rates (b,) -> its weight in training}.
# sqrt and constant make gradients less noisy; half of all L/k are above 2, so the factor 2
# preserves the scale of the loss.
LOSS_WEIGHTS = Table(
    "loss_weight",
    check_loss_weight,
    bound=lambda weight: weight,
    sqrt=lambda weight: 2 * weight.sqrt(),
    constant=lambda weight: torch.full_like(weight, 2.0),
)


def bell(u, width=0.7):
    """Logit-normal mask rates, mostly middle ones: uniform u (b,) -> rates and density (b,) each.

    1 - u gives 1 - rate, so pairs stay antithetic. (arXiv 2605.13026 has other bells.)
    """
    z = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))  # (b,) normal
    rate = torch.sigmoid(width * z)  # (b,)
    normal = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # (b,)
    return rate, normal / (width * rate * (1 - rate))


# {name: uniform u (b,) -> the u that masks are drawn from, and its density (b,)}. The bound needs
# uniform u, or weights divided by the density.
MASK_RATES = Table(
    "mask_rate", check_mask_rate, uniform=lambda u: (u, torch.ones_like(u)), bell=bell
)
