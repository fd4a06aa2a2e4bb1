"""Muon: gradient descent whose step has, in each matrix, the same size in every direction (Jordan et al. 2024).

The momentum U S V' of a matrix is replaced by about U V'. torch.optim.Muon gives the same step, one matrix after the other;
here matrices of one shape go together, because small ones take longer to call than to multiply. Sharded ones are gathered
first, each once, where torch's would gather inside every product.
"""

import torch

import parallel

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, five times, takes singular values from (0, 1] to 0.7..1.2
STACK = 2**24  # numbers in a stack at most: large matrices gain nothing, and a stack is whole on every process


def orthogonal(g):
    """U V', roughly, of every matrix U S V' of g (n, rows, columns), by the Newton-Schulz iteration in bfloat16."""
    a, b, c = POLYNOMIAL
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g).bfloat16()  # (n, short, long)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)  # so that no singular value exceeds 1
    for _ in range(5):
        square = x @ x.mT  # (n, short, short)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices. Nesterov momentum, decoupled decay, and updates as large as AdamW's (arXiv 2502.16982, eq. 4)."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, alike in shapes.items():
                n = max(1, STACK // shape.numel())
                for some in (alike[i : i + n] for i in range(0, len(alike), n)):
                    self.move(some, **group)

    def move(self, matrices, lr, weight_decay, momentum, **_):
        """One step of a few matrices of one shape."""
        ahead = []
        for p in matrices:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            ahead.append(parallel.gathered(p.grad.lerp(state["momentum_buffer"], momentum)))  # (rows, columns)
        size = lr * 0.2 * max(matrices[0].shape) ** 0.5
        for p, direction in zip(matrices, orthogonal(torch.stack(ahead)), strict=True):
            p.mul_(1 - lr * weight_decay).sub_(parallel.part(direction.to(p.dtype), p), alpha=size)
