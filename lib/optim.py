"""From the gradient to a step: clipping, AdamW, Muon, the learning rate, the EMA.

A step of Muon (Jordan et al. 2024) has the same size in every direction of a matrix: the momentum
U S V' is replaced by approximately U V'. torch.optim.Muon takes the same step for one matrix at a
time. Here matrices of the same shape are stacked, because calls take longer than products of small
matrices, and a sharded matrix is gathered once, not inside every product.
"""

import math

import torch

from config import Table
from lib import parallel
from lib.device import multiplies_bfloat16
from lib.entries import check_lr_decay

OPTIMIZERS = Table(  # {name: (learning rate up to a width of 96, whether Muon moves matrices)}
    "optimizer", adamw=(4e-3, False), muon=(1e-2, True)
)
LR_DECAYS = Table(  # {name: fraction of the decay that is over -> fraction of the rate that stays}
    "lr_decay",
    check_lr_decay,
    cosine=lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    linear=lambda done: 1 - done,
    constant=lambda done: 1.0,
)

# a x + b x^3 + c x^5, applied five times, maps singular values in (0, 1] to 0.7..1.2.
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
# Most numbers in a stack: large matrices gain nothing, and every process holds the whole stack.
STACK = 2**24


def orthogonal(g):
    """Approximately U V' for each U S V' of g (n, rows, columns), by Newton-Schulz.

    In bfloat16 where the hardware multiplies it; elsewhere it would take 30 times as long.
    """
    a, b, c = POLYNOMIAL
    tall = g.shape[1] > g.shape[2]
    dtype = torch.bfloat16 if multiplies_bfloat16(g.device.type) else torch.float32
    x = (g.mT if tall else g).to(dtype)  # (n, short, long)
    size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (n, 1, 1)
    x = x / size.clamp(min=1e-7)  # so that no singular value exceeds 1
    for _ in range(5):
        square = x @ x.mT  # (n, short, short)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices: Nesterov momentum, decoupled weight decay, steps as large as AdamW's.

    The size of a step follows arXiv 2502.16982, eq. 4.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                n = max(1, STACK // shape.numel())
                for stack in (matrices[i : i + n] for i in range(0, len(matrices), n)):
                    self.move(stack, **group)

    def move(self, matrices, lr, weight_decay, momentum, **_):
        """Take one step with several matrices of the same shape."""
        ahead = []
        for p in matrices:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            nesterov = p.grad.lerp(state["momentum_buffer"], momentum)  # (rows, columns)
            ahead.append(parallel.gathered(nesterov))
        size = lr * 0.2 * max(matrices[0].shape) ** 0.5
        for p, direction in zip(matrices, orthogonal(torch.stack(ahead)), strict=True):
            p.mul_(1 - lr * weight_decay).sub_(parallel.part(direction.to(p.dtype), p), alpha=size)


def make_optimizers(config, model):
    """[AdamW], or [AdamW, Muon] with Muon for the blocks' matrices.

    Only matrices decay, unless decay_all is set.
    """
    muon, decayed, undecayed = [], [], []
    _, has_muon = OPTIMIZERS[config["optimizer"]]
    for name, p in model.named_parameters():
        if has_muon and name.startswith("blocks.") and p.dim() == 2:
            muon.append(p)
        else:
            (decayed if p.dim() == 2 or config["decay_all"] else undecayed).append(p)
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    common = {"lr": config["learning_rate"], "weight_decay": config["weight_decay"]}
    fused = decayed[0].device.type in ("cpu", "cuda")
    betas = config["beta1"], config["beta2"]
    adamw = torch.optim.AdamW(groups, betas=betas, fused=fused, **common)
    return [adamw, Muon(muon, **common)] if muon else [adamw]


def learning_rate(step, config, spent=0.0):
    """The rate of a step: linear warm-up, constant until decay_start, then decay to min_lr.

    The decay follows the run's steps (max_iters) or the fraction `spent` of its minutes, whichever
    is further along.
    """
    peak, floor, warmup = config["learning_rate"], config["min_lr"], config["warmup_iters"]
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    late, end = config["decay_start"], config["max_iters"]
    start = max(warmup, late * end)
    done = (step - start) / max(1, end - start) if end else 0.0
    done = min(1.0, max(0.0, done, (spent - late) / max(1e-9, 1 - late)))  # 0..1
    return floor + (peak - floor) * LR_DECAYS[config["lr_decay"]](done)


def clip_gradient(config, parameters):
    """Clip the gradient to a norm of grad_clip; return whether skip_nonfinite skips this step."""
    if not (config["grad_clip"] or config["skip_nonfinite"]):
        return False
    norm = torch.nn.utils.clip_grad_norm_(parameters, config["grad_clip"] or math.inf)
    if not config["skip_nonfinite"]:
        return False  # the host need not wait for the norm
    return not parallel.whole(norm, keep=True).isfinite().item()  # of all processes: they agree


def set_learning_rate(optimizers, rate):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Move the exponential moving average of the weights towards the model's, faster at first."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    averages, weights = zip(*([parallel.local(p) for p in pair] for pair in pairs), strict=True)
    torch._foreach_lerp_(averages, weights, 1 - decay)
