"""The network: every shortcut gives what the plain computation gives; the sizes are published."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from plain import DEFAULTS
from torch.utils.flop_counter import FlopCounterMode

from config import UserError
from diffusion import nelbo
from lib import fused
from lib.cache import Cache
from lib.device import flops_per_token
from model import OrderTransformer, Transformer, make_network, rotary_tables, rotate

B, L, V = 3, 10, 7
VARIANTS = [
    {"norm": norm, "mlp": mlp, "bias": bias, "qk_norm": qk_norm}
    for (norm, bias), mlp, qk_norm in itertools.product(
        [("layer", True), ("layer", False), ("rms", False)],
        ["gelu", "swiglu", "relu2"],
        [False, True],
    )
]
NAMES = ["-".join(str(value) for value in keys.values()) for keys in VARIANTS]
ATTENTION = pytest.mark.parametrize("attention", ["full", "causal"])


def config(**keys):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": L, "vocab_size": V}
    return DEFAULTS | sizes | keys


def tiny(dtype=torch.float64, **keys):
    """A small Transformer none of whose parameters is zero or one."""
    torch.manual_seed(1)
    model = make_network(config(**keys))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).requires_grad_(False)


def tokens(batch=B, length=L):
    """(batch, length), masks among them."""
    return torch.randint(V + 1, (batch, length), generator=torch.Generator().manual_seed(2))


# ---- The network, written out --------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": lambda z: z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu2": lambda z: z.clamp(min=0) ** 2,
    "swiglu": lambda z: z * torch.sigmoid(z),
}


def plain_norm(layer, h, centred):
    h = h - h.mean(-1, keepdim=True) if centred else h
    h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight
    return h if getattr(layer, "bias", None) is None else h + layer.bias


def plain_linear(layer, h):
    return h @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def plain_turn(z):
    """z (B, L, H, d): the pair (i, i + d/2) at position n turns by the angle n * 10000^(-2i/d)."""
    half = z.shape[-1] // 2
    frequency = 10000 ** -(torch.arange(half).double() / half)  # (d/2,)
    angle = torch.outer(torch.arange(z.shape[1]).double(), frequency)  # (L, d/2)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (L, 1, d/2)
    turned = torch.complex(z[..., :half], z[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def plain_attention(q, k, v, causal):
    """softmax(q k^T / sqrt(d)) v of q (B, H, Lq, d), k, v (B, H, Lk, d); last query at last key."""
    score = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])  # (B, H, Lq, Lk)
    for i, j in itertools.product(range(q.shape[2]), range(k.shape[2])):
        if causal and j > i + k.shape[2] - q.shape[2]:
            score[:, :, i, j] = -torch.inf
    return score.softmax(-1) @ v


def plain_forward(model, x):
    """Logits (B, L, V) of the architecture as the papers describe it, with the model's weights."""
    keys, h = model.config, model.embed.weight[x]  # (B, L, D)
    centred, act = keys["norm"] == "layer", ACTIVATIONS[keys["mlp"]]
    if keys["conv"]:  # torch's convolution, each channel by itself
        weight = model.conv.T[:, None]  # (D, 1, width)
        near = torch.nn.functional.conv1d(h.transpose(1, 2), weight, padding="same", groups=16)
        h = h + near.transpose(1, 2)
    for block in model.blocks:
        qkv = plain_linear(block.qkv, plain_norm(block.norm1, h, centred)).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (keys["n_head"], -1)) for z in qkv)  # (B, L, H, d) each
        if keys["qk_norm"]:
            q, k = (z / z.square().mean(-1, keepdim=True).sqrt() for z in (q, k))
        q, k, v = (z.transpose(1, 2) for z in (plain_turn(q), plain_turn(k), v))  # (B, H, L, d)
        y = plain_attention(q, k, v, keys["attention"] == "causal")  # (B, H, L, d)
        h = h + plain_linear(block.proj, y.transpose(1, 2).flatten(2))
        z = plain_norm(block.norm2, h, centred)
        up = plain_linear(block.mlp.up, z)
        gated = keys["mlp"] == "swiglu"
        y = act(plain_linear(block.mlp.gate, z)) * up if gated else act(up)
        h = h + plain_linear(block.mlp.down, y)
    return plain_linear(model.unembed, plain_norm(model.norm, h, centred))[..., :V]


@ATTENTION
@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_the_network_is_the_architecture_written_out(variant, attention):
    model, x = tiny(attention=attention, **variant), tokens()
    assert torch.allclose(model(x), plain_forward(model, x), rtol=1e-5, atol=1e-5)


def test_a_convolution_of_the_embedded_tokens_is_that_of_torch_and_begins_as_nothing():
    model, x = tiny(conv=3), tokens()
    assert torch.allclose(model(x), plain_forward(model, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), plain_forward(tiny(), x), atol=0.1)
    assert not make_network(config(conv=5)).conv.any()


def parts(model, ending):
    """The names of the parameters that end so, with their place in a block or in the network."""
    names = (name for name in model.state_dict() if name.endswith(ending))
    return {name.removesuffix(ending).split(".", 2)[-1] for name in names}


def test_biases_are_in_norms_mlp_and_head_or_nowhere():
    usual = {"norm1", "norm2", "mlp.up", "mlp.down", "norm", "unembed"}
    assert parts(tiny(), ".bias") == usual
    assert parts(tiny(mlp="swiglu"), ".bias") == usual | {"mlp.gate"}
    assert not any(parts(tiny(bias=False, norm=norm), ".bias") for norm in ("layer", "rms"))


def test_a_state_dict_holds_parameters_alone():
    model = tiny()
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


# ---- Shortcuts -----------------------------------------------------------------------------------


@ATTENTION
@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_asking_for_some_positions_gives_those_of_the_whole_and_their_gradients(variant, attention):
    model, x = tiny(attention=attention, **variant).requires_grad_(True), tokens()
    used = [p for name, p in model.named_parameters() if not name.startswith("unembed")]
    whole = model.hidden(x)  # (B, L, D)
    for idx in ([0, 4, 13, 29], [7], range(B * L - 1, -1, -1), []):
        idx = torch.tensor(list(idx), dtype=int)  # (N,)
        some, plain = model.hidden(x, idx), whole.flatten(0, 1)[idx]  # (N, D) each
        assert torch.allclose(some, plain, rtol=1e-10, atol=1e-12)
        direction = torch.randn(some.shape, dtype=some.dtype)
        ours, theirs = (
            torch.autograd.grad((z * direction).sum(), used, retain_graph=True)
            for z in (some, plain)
        )
        for pair in zip(ours, theirs, strict=True):
            assert torch.allclose(*pair, rtol=1e-9, atol=1e-11)
    assert torch.equal(model(x), model.head(whole)) and model(x).shape == (B, L, V)


def continued(model, x, pieces):
    """The hidden states of x, read a piece at a time with a cache: (B, L, D)."""
    cache = [Cache(model.block_size) for _ in model.blocks]
    return torch.cat([model.hidden(piece, cache=cache) for piece in x.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("pieces", [[1] * L, [L], [4, 1, 3, 2], [1, 9], [9, 1]], ids=str)
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1]], ids=["layer", "rms"])
def test_a_causal_network_that_goes_on_from_its_cache_gives_the_full_forward_pass(variant, pieces):
    model, x = tiny(attention="causal", **variant), tokens()
    assert torch.allclose(continued(model, x, pieces), model.hidden(x), rtol=1e-10, atol=1e-12)


def test_the_cache_works_in_bfloat16_too():
    model, x = tiny(torch.float32, attention="causal"), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(continued(model, x, [4, 1, 3, 2]), model.hidden(x), atol=0.2)


def test_a_sequence_longer_than_the_block_is_refused():
    model = tiny(attention="causal")
    with pytest.raises(AssertionError, match="block_size"):
        model(tokens(length=L + 1))
    cache = [Cache(L) for _ in model.blocks]
    model.hidden(tokens(), cache=cache)
    with pytest.raises(AssertionError, match="block_size"):
        model.hidden(tokens(length=1), cache=cache)


@ATTENTION
@pytest.mark.parametrize("lq", [1, 2, 5, 8])
@pytest.mark.parametrize("d", [16, 48])  # the square root of 48 is no power of two
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_plain_attention_also_where_queries_are_fewer(dtype, d, lq, attention):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, length, d).to(dtype) for length in (lq, 8, 8))
    y = fused.attention(q, k, v, attention == "causal")
    plain = plain_attention(q.float(), k.float(), v.float(), attention == "causal")
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert y.dtype == dtype and torch.allclose(y.float(), plain, atol=tolerance)


@ATTENTION
@pytest.mark.parametrize("d", [16, 48])
@pytest.mark.parametrize("lq", [1, 9, 32])
def test_written_out_bfloat16_attention_is_the_kernel_within_its_rounding(lq, d, attention):
    torch.manual_seed(1)
    causal = attention == "causal"
    q, k, v = (torch.randn(2, 3, length, d).bfloat16() for length in (lq, 32, 32))
    seen = torch.ones(lq, 32, dtype=torch.bool).tril(32 - lq) if causal else None  # (Lq, Lk)
    kernel = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert torch.allclose(fused.attention(q, k, v, causal), kernel, atol=0.02)


# ---- Who sees whom -------------------------------------------------------------------------------


@ATTENTION
@pytest.mark.parametrize("variant", VARIANTS[::5], ids=NAMES[::5])
def test_every_position_sees_both_sides_and_a_causal_one_never_the_right(variant, attention):
    model, x = tiny(attention=attention, **variant), tokens(batch=1)
    changed = x.repeat(L, 1)  # (L, L) row j differs from x at position j alone
    changed.fill_diagonal_(0).add_(torch.diag((x[0] + 1) % V))
    change = (model(changed) - model(x)).abs().amax(-1)  # (L, L) that of token j, at i
    seen = torch.ones(L, L, dtype=torch.bool)
    assert torch.equal(change > 1e-9, seen.triu() if attention == "causal" else seen)


@ATTENTION
def test_a_sequence_does_not_see_its_neighbours_in_the_batch(attention):
    model, x = tiny(attention=attention), tokens()
    assert torch.allclose(model(x)[1:2], model(x[1:2]), rtol=1e-10)


def test_a_sequence_may_be_shorter_than_the_block():
    model, x = tiny(attention="causal"), tokens()
    assert torch.allclose(model(x[:, :6]), model(x)[:, :6], rtol=1e-10)


def test_the_mask_can_be_read_and_not_predicted():
    model = tiny(head_padding=1)
    assert model.mask_id == V == model.start_id and model.embed.weight.shape[0] == V + 1
    assert model(torch.full((1, L), model.mask_id)).shape == (1, L, V)
    before = model(tokens())
    model.unembed.weight[V:], model.unembed.bias[V:] = 1e6, 1e6
    assert torch.equal(model(tokens()), before)


def test_a_network_that_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match="Transformer has no attention=order; use make_network"):
        Transformer(config(attention="order"))
    assert type(make_network(config(attention="order"))) is OrderTransformer
    for shape in ({"n_layer": 0, "n_head": 0, "n_embd": 0}, {"n_head": 0}, {"n_layer": 0}):
        with pytest.raises(UserError, match=r"must be 1 or more; train.py fills in 0$"):
            Transformer(config(**shape))


def test_a_causal_network_may_have_a_start_token_of_its_own():
    assert make_network(config(start_id=1)).start_id == 1


# ---- Rotary positions and normalised queries -----------------------------------------------------


def test_rotary_attention_depends_on_relative_positions_alone():
    tables = rotary_tables(config(rotary_bf16=False))
    cos, sin = (table.double() for table in tables)  # (L, d/2) each
    alike = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)  # (2, 1, 1, 1, d) at every position
    q, k = alike.expand(2, 1, 1, L, 8)  # (1, 1, L, d) each
    score = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-2, -1))[0, 0]  # (L, L)
    assert torch.allclose(score[1:, 1:], score[:-1, :-1], atol=1e-5)
    assert (score[0] - score[0, 0]).abs().max() > 0.1


def test_rotary_tables_can_be_rounded_to_bfloat16():
    tables = (rotary_tables(config(rotary_bf16=rounds)) for rounds in (False, True))
    for exact, rounded in zip(*tables, strict=True):
        assert rounded.dtype == torch.float32 and (rounded != exact).any()
        assert torch.equal(rounded, exact.bfloat16().float())


@pytest.mark.parametrize("part", [0, 1], ids=["queries", "keys"])
def test_with_qk_norm_the_length_of_queries_and_keys_means_nothing(part):
    for qk_norm in (True, False):
        model, x = tiny(qk_norm=qk_norm), tokens()
        before = model(x)
        for block in model.blocks:
            block.qkv.weight.view(3, 16, 16)[part].mul_(50)
        assert torch.allclose(model(x), before, atol=1e-3) == qk_norm


# ---- Start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_init", ["head", "all"])
def test_the_loss_of_a_head_that_starts_at_zero_is_log_v_per_token(zero_init):
    model, x0 = make_network(config(zero_init=zero_init)), tokens() % V
    loss, nats = nelbo(model, x0, torch.ones_like(x0, dtype=torch.bool), torch.ones(B))
    assert torch.allclose(nats, torch.full((B,), L * math.log(V)))
    assert torch.isclose(loss, nats.sum())


@pytest.mark.parametrize(
    ("zero_init", "identity"), [("none", False), ("head", False), ("all", True)]
)
def test_blocks_that_start_at_zero_pass_the_embedding_on(zero_init, identity):
    model, x = make_network(config(zero_init=zero_init)), tokens()
    assert torch.allclose(model.hidden(x), model.norm(model.embed(x)), atol=1e-6) == identity
    assert bool(model.head_parameters()[0].any()) == (zero_init == "none")


def test_weights_start_with_the_deviations_of_smdm():
    model = make_network(config(n_embd=64, n_layer=3, mlp="swiglu", vocab_size=200))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            out = "proj" in name or "down" in name
            deviation = 1 / (8 * 3) if out else math.sqrt(2 / (5 * 64))
            assert parameter.std().item() == pytest.approx(deviation, rel=0.04)
        else:
            assert (parameter == (1 if "norm" in name and "weight" in name else 0)).all()


def test_dropout_acts_in_training_alone():
    model, x = tiny(dropout=0.5), tokens()
    assert not torch.allclose(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x)) and torch.equal(model(x), tiny(dropout=0.0)(x))


def test_dropout_is_on_all_that_a_block_adds():
    model, x = tiny(dropout=1.0), tokens()
    assert torch.equal(model.hidden(x), model.norm(model.embed(x)))


# ---- Sizes and cost ------------------------------------------------------------------------------

RADD = {"vocab_size": 50257, "block_size": 1024, "head_padding": 1}
SMDM = {"vocab_size": 32000, "block_size": 2048, "norm": "rms", "mlp": "swiglu", "bias": False}
PUBLISHED = {
    "RADD small": (RADD, 12, 12, 768, 0, 162_265_682),
    "RADD medium": (RADD, 24, 16, 1024, 0, 405_191_762),
    "SMDM 6M": (SMDM, 6, 4, 256, 0, 22_679_040),
    "SMDM 19M": (SMDM, 8, 6, 384, 0, 43_457_280),
    "SMDM 75M": (SMDM, 16, 8, 640, 1600, 116_348_160),
    "SMDM 170M": (SMDM, 18, 12, 768, 0, 219_050_496),
    "SMDM 1028M": (SMDM, 20, 14, 1792, 0, 1_142_367_744),
    "SMDM 2121M": (SMDM, 28, 17, 2176, 0, 2_260_659_456),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_parameters(name):
    keys, *shape, count = PUBLISHED[name]
    shape = dict(zip(("n_layer", "n_head", "n_embd", "mlp_width"), shape, strict=True))
    with torch.device("meta"):
        model = make_network(config(**shape, **keys))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def counted_flops(model, masked_idx=None):
    """What torch counts for a batch on the meta device, where attention is its two products."""
    x = torch.zeros(B, L, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.head(model.hidden(x, masked_idx))
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_flops_per_token_are_what_torch_counts(variant):
    with torch.device("meta"):
        model = make_network(config(mlp_width=40, head_padding=1, **variant))
        some = torch.zeros(12, dtype=torch.long)  # (12,)
    assert counted_flops(model) == B * L * flops_per_token(model, L)
    part = flops_per_token(model, L, head_share=12 / (B * L))
    assert counted_flops(model, some) == pytest.approx(B * L * part)


def test_flops_of_a_causal_network_count_the_half_of_attention_that_is_seen():
    with torch.device("meta"):
        model = make_network(config(attention="causal"))
    attention = 2 * 2 * 2 * L * 16  # layers, two products, multiply and add
    assert counted_flops(model) == B * L * (flops_per_token(model, L) + attention / 2)
