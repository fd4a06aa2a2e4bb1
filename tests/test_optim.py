"""Muon: the directions it takes, and its step beside torch's own."""

import pytest
import torch

from lib import optim

SHAPES = [(24, 8), (8, 24), (16, 16), (8, 24), (24, 8), (8, 24)]


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 8, 32), (3, 32, 8), (1, 4, 4)])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_directions_keep_singular_vectors_and_lose_singular_values(shape, bfloat16, monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device_type: bfloat16)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # (n, rows, columns)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    # Diagonal where the singular vectors are the same:
    turned = u.mT @ optim.orthogonal(g).float() @ vh.mT  # (n, k, k)
    size = turned.diagonal(dim1=1, dim2=2)  # (n, k)
    assert size[s > 0.1 * s.amax(1, keepdim=True)].sub(1).abs().max() < 0.35
    assert (turned - torch.diag_embed(size)).abs().max() < 0.05


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("stack", [1, 2 * 8 * 24, optim.STACK])
def test_the_steps_are_those_of_torch(stack, bfloat16, monkeypatch):
    monkeypatch.setattr(optim, "STACK", stack)
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device_type: bfloat16)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    pairs = [[torch.nn.Parameter(w.clone()) for w in start] for _ in range(2)]
    keys = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    theirs = torch.optim.Muon(pairs[0], adjust_lr_fn="match_rms_adamw", **keys)
    ours = optim.Muon(pairs[1], **keys)
    for _ in range(5):
        for a, b in zip(*pairs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        theirs.step()
        ours.step()
    off = 2e-3 if bfloat16 else 2e-2  # torch's are in bfloat16, in sums of another order
    for a, b, w in zip(*pairs, start, strict=True):
        assert (b - a).norm() < off * (a - w).norm()
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(theirs.state[a]["momentum_buffer"], ours.state[b]["momentum_buffer"])


def test_a_matrix_without_a_gradient_stays():
    w = torch.nn.Parameter(torch.ones(4, 4))
    optim.Muon([w], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(w, torch.ones(4, 4))
