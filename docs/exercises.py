"""Ten exercises, and the checks of their answers: docs/LEARN.md says what is asked.

    python -m pytest docs/exercises.py -k nfe       one of them; all fail until they are solved

Answers in numbers and names go into ANSWERS; the others are code of yours in the scripts.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import L, Table, V, random_logits, states  # noqa: E402

import diffusion  # noqa: E402
import evaluate  # noqa: E402
import model as network  # noqa: E402
import sample  # noqa: E402
import samplers  # noqa: E402
from samplers import SAMPLERS  # noqa: E402

ANSWERS = {
    "by_hand": None,  # (the bound, the loss with weight 1) in nats
    "broken_weight": None,  # "tests/test_FILE.py::test_NAME"
    "nfe": None,  # expected network calls, to a tenth
    "two_tokens": None,  # steps
    "cache": None,  # kinds of attention, as {"full", ...}
    "guidance": None,  # cfg_scale
}


def answer(name):
    """What stands in ANSWERS; the check fails where that is nothing yet."""
    if ANSWERS[name] is None:
        pytest.fail(f"docs/exercises.py: ANSWERS['{name}'] is still None", pytrace=False)
    return ANSWERS[name]


def right(is_right, hint):
    """Fail with a hint, and without the numbers that would give the answer away."""
    if not is_right:
        pytest.fail(hint, pytrace=False)


def entry(table, name, where):
    """table[name]; the check fails where it is not there yet."""
    if name not in table:
        pytest.fail(f"{where} has no '{name}' yet", pytrace=False)
    return table[name]


def tiny(attention):
    """A network that has learnt nothing: V = 5, L = 6."""
    shape = {"n_layer": 2, "n_head": 1, "n_embd": 8, "block_size": 6, "vocab_size": 5}
    shape |= {"zero_init": "none"}  # or it says the same about everything
    torch.manual_seed(0)
    return network.make_network(network.DEFAULTS | shape | {"attention": attention}).eval()


def test_schedule():
    schedule = entry(diffusion.SCHEDULES, "early", "diffusion.SCHEDULES")
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64).requires_grad_()
    m, dm = schedule(t)
    assert torch.allclose(m, 2 * t - t**2), "m(t) is not 2t - t^2"
    assert torch.allclose(dm, torch.autograd.grad(m.sum(), t)[0]), "dm is not the slope of m"


def test_by_hand():
    h = torch.tensor([0.5, 1.5, 2.5])  # of h_1, h_2, h_3
    u = torch.linspace(0.0005, 0.9995, 1000)  # (1000,)
    noise = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    mask, weight = diffusion.draw_mask("any_order", u, noise)  # (1000, 3), (1000,)
    k = mask.sum(1)  # (1000,)
    bound, plain = answer("by_hand")
    right(bound == pytest.approx((weight * k * h[k - 1]).mean().item(), rel=0.01), "not the bound")
    right(plain == pytest.approx((k * h[k - 1]).mean().item(), rel=0.01), "not that of weight 1")


def test_broken_weight():
    name = answer("broken_weight")
    run = "import sys, diffusion, pytest\nwhole, broken = diffusion.draw_mask, sys.argv[2] == '1'\n"
    run += "def draw_mask(*args, **keys):\n    mask, weight = whole(*args, **keys)\n"
    run += "    return mask, weight * (1.01 if broken else 1)\ndiffusion.draw_mask = draw_mask\n"
    run += "sys.exit(pytest.main([sys.argv[1], '-q', '-x']))"
    status = [
        subprocess.run([sys.executable, "-c", run, name, broken], cwd=ROOT).returncode
        for broken in "01"
    ]
    assert status == [0, 1], f"{name} does not pass with right weights and fail with wrong ones"


def test_objective():
    entry(diffusion.OBJECTIVES, "flat", "diffusion.OBJECTIVES")
    n, length = 20_000, 5
    noise = torch.rand(n, length, generator=torch.Generator().manual_seed(0))  # (n, L)
    u = (torch.arange(n) + 1.0) / n  # (n,)
    mask, weight = diffusion.draw_mask("flat", u, noise)  # (n, L), (n,)
    assert weight.min() > 0.99 * weight.max(), "a masked token weighs more at some k than at others"
    for k in range(1, length + 1):
        total = (weight * k)[mask.sum(1) == k].sum().item() / n
        assert total == pytest.approx(1, rel=0.01), f"h_{k} counts {total:.3f} times, not once"


def test_nfe():
    r = samplers.unmask_schedule(diffusion.loglinear, 50)  # (50,)
    right(answer("nfe") == pytest.approx(samplers.expected_nfe(r, 100), abs=0.06), "not so many")


def test_two_tokens():
    def wrong(n):  # both words in one step, and then half of the pairs
        return 0.5 * float(samplers.unmask_schedule(diffusion.loglinear, n).square().sum())

    n = answer("two_tokens")
    right(wrong(n) < 0.0101, f"in {n} steps {wrong(n):.2%} are wrong")
    right(wrong(n - 1) > 0.0101, f"fewer than {n} steps are enough")


def test_order():
    entry(SAMPLERS, "outside_in", "samplers.SAMPLERS")
    net, drawn = tiny("full"), []
    x = torch.full((2, 6), net.mask_id)  # (2, 6)
    x[1, 0] = 3  # a condition

    def on_call(row, position, call, *_):
        drawn.extend(zip(row.tolist(), call.tolist(), position.tolist(), strict=True))

    tokens, info = sample.sample(net, x, sampler="outside_in", on_call=on_call)
    positions = [[position for n, _, position in sorted(drawn) if n == row] for row in (0, 1)]
    assert positions[0] == [0, 5, 1, 4, 2, 3], f"{positions[0]} is not from both ends to the middle"
    assert positions[1] == [5, 1, 4, 2, 3] and tokens[1, 0] == 3, "a condition is never drawn"
    assert info["nfe"].tolist() == [6, 5], "one token a call, and no call for a condition"


@torch.no_grad()
def test_cache():
    x = torch.tensor([[0, 1, 2, 3, 4, 0]])  # (1, 6) a text, and the same with another end
    other, positions, exact = x.index_fill(1, torch.tensor([5]), 2), torch.arange(6), set()
    for kind in ("full", "causal", "order"):
        net = tiny(kind)
        more = (positions.repeat(2)[None],) if kind == "order" else ()
        read = net.hidden_in_order if kind == "order" else net.hidden
        before, after = read(x, *more), read(other, *more)  # (1, 6, D) each
        if torch.allclose(before[:, :5], after[:, :5], atol=1e-6):
            exact.add(kind)
    right(set(answer("cache")) == exact, "look at what changes when the last token does")


@torch.no_grad()
def test_guidance():
    net, w = tiny("full"), answer("guidance")
    x = torch.tensor([[0, 1, 5, 5, 5, 5]])  # (1, 6)
    idx = torch.arange(2, 6)
    hs = diffusion.states(net, x, idx, x != net.mask_id, w)  # two of (4, D)
    guided = diffusion.guided(net, hs, w)  # (4, V)
    alone = net.head(net.hidden(torch.full_like(x, net.mask_id), idx))  # (4, V)
    assert w and torch.allclose(guided, alone, atol=1e-5), "the prompt still has a say"


def test_estimator():
    entry(evaluate.ESTIMATORS, "outside_in", "evaluate.ESTIMATORS")
    net, x0 = Table(random_logits()), states(V, L)[::7]  # (S, L)
    nats, _ = evaluate.estimate(net, x0.numpy(), estimator="outside_in", draws=1)  # (S,)
    x, exact = torch.full_like(x0, net.mask_id), torch.zeros(len(x0), dtype=torch.float64)
    for position in (0, 3, 1, 2):  # from both ends to the middle
        log_p = net(x).log_softmax(-1)[:, position].detach()  # (S, V)
        exact -= log_p.gather(1, x0[:, position, None]).squeeze(1)
        x[:, position] = x0[:, position]
    assert torch.allclose(nats, exact, atol=1e-5), "not the chain rule along that order"
