"""Compiled programs are compared with the code they were made from before they are trusted."""

import pytest
import torch

import diffusion
import model as network
from lib import compiled, parallel

L = 128
SHAPE = {"n_layer": 2, "n_head": 1, "n_embd": 64, "block_size": L, "vocab_size": 9}


@pytest.fixture
def block():
    """A function: attention -> (the first block of a network, the arguments of its forward)."""

    def make(attention):
        torch.manual_seed(1)
        model = network.make_network(network.DEFAULTS | SHAPE | {"attention": attention})
        h = torch.randn(3, 2 * L if attention == "order" else L, 64)
        if attention != "order":
            return model.blocks[0], (h, model.cos, model.sin)
        read = network.fused.attention_in_order
        positions = torch.arange(2 * L) % L
        tables = model.cos[positions], model.sin[positions]
        return model.blocks[0], (h, *tables, network.TwoStreams(L, read, False))

    return make


@pytest.fixture(autouse=True)
def said_anew():
    compiled.say_wrong.cache_clear()
    yield
    compiled.say_wrong.cache_clear()


class Wrong(torch.autograd.Function):
    """The identity, but its gradient is changed."""

    @staticmethod
    def forward(ctx, z, change):
        ctx.change = change
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.change(g), None


def with_wrong_gradient(block, change):
    """The block's forward; the gradient of its queries and keys before rotation is changed."""
    rotated = block.norm_and_rotate

    def forward(*arguments):
        block.norm_and_rotate = lambda z, *tables: rotated(Wrong.apply(z, change), *tables)
        try:
            return type(block).forward(block, *arguments)
        finally:
            del block.norm_and_rotate

    return forward


def in_places(g):
    """The gradient, with zeros in a block of 32 by 32, as a transposition could go wrong."""
    g = g.clone()
    g[..., :32, :32] = 0
    return g


@pytest.mark.parametrize("attention", network.ATTENTIONS)
def test_a_block_with_a_wrong_gradient_is_noticed_though_its_output_is_zero_at_first(
    attention, block
):
    one, arguments = block(attention)
    before = [parameter.clone() for parameter in one.parameters()]
    assert not one.proj.weight.any()  # all gradients of queries and keys are zero
    right = type(one).forward.__get__(one)
    assert compiled.same_gradients(one, right, right, *arguments)
    for change in (lambda g: 1.2 * g, lambda g: g * torch.nan, in_places):
        wrong = with_wrong_gradient(one, change)
        assert torch.equal(wrong(*arguments), right(*arguments))
        assert not compiled.same_gradients(one, wrong, right, *arguments)
    after = list(one.parameters())
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(after, before, strict=True))


def test_rounding_is_no_mistake(block):
    one, (h, cos, sin) = block("full")
    right = type(one).forward.__get__(one)

    def in_bfloat16(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return right(*arguments)

    assert compiled.same_gradients(one, in_bfloat16, right, h, cos, sin)


def test_weights_in_bfloat16_are_those_of_the_network_after_a_check(block):
    """Autocast keeps what it has cast; the check has random weights."""
    one, arguments = block("full")
    torch.nn.init.normal_(one.proj.weight)
    right = type(one).forward.__get__(one)
    with torch.autocast("cpu", torch.bfloat16):
        expected = right(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        compiled.same_gradients(one, right, right, *arguments)
        assert torch.equal(right(*arguments), expected)


@pytest.mark.parametrize("wrong", [lambda z: 1.1 * z, lambda z: z * torch.nan])
def test_a_program_with_wrong_results_is_never_used_and_one_line_says_so(wrong, capsys):
    plain = lambda z: z + 1  # noqa: E731
    for _ in range(2):
        fast = compiled.trusted(lambda z: wrong(z + 1), plain)
        for _ in range(3):
            assert torch.equal(fast(torch.ones(4)), plain(torch.ones(4)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torch.compile does not work here, so nothing is compiled: its programs")


def test_a_program_is_checked_once_and_then_used_alone(capsys):
    calls = []
    fast = compiled.trusted(lambda z: z + 1, lambda z: calls.append(1) or z + 1)
    for _ in range(3):
        assert torch.equal(fast(torch.ones(4)), torch.ones(4) + 1)
    assert calls == [1] and capsys.readouterr().err == ""


def gradients(compile):
    """The loss and gradients of a network of one block in bfloat16, compiled or not."""
    torch.manual_seed(2)
    config = network.DEFAULTS | SHAPE | {"n_layer": 1, "zero_init": "none", "recompute": False}
    model = network.make_network(config)
    loss_fn = diffusion.Loss(model, "any_order")
    keys = config | {"compile": compile}
    loss_fn = parallel.prepare_for_training(loss_fn, keys, parallel.Team())
    x0 = torch.randint(9, (4, L), generator=torch.Generator().manual_seed(3))  # (B, L)
    u, noise = diffusion.stratified_uniforms(0, 0, range(4), 4, L)
    mask, weight = diffusion.draw_mask("any_order", u, noise)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_fn(x0, mask, weight.float())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def test_a_compiled_network_has_the_gradients_of_the_plain_one_in_bfloat16(capsys):
    """With heads of 64, where a compiler that did not know the processor made nan of them."""
    plain, fast = (gradients(compile) for compile in (False, True))
    assert compiled.equal(fast, plain)
    assert "something else" not in capsys.readouterr().err  # it was the compiled one
