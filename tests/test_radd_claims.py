"""RADD's claims by one command each: the quick forms end in their files, and the arithmetic."""

import json
import math
import sys

import pytest
import torch
from conftest import L, V, states
from torch.utils.flop_counter import FlopCounterMode

import config as settings
import diffusion
import model as network
import train
from experiments import (
    cached_sampling,
    frontier,
    infilling,
    objectives,
    orders,
    results,
    runs,
    zero_shot,
)
from experiments import time_independence as timing

X0 = states(V, L)  # (V^L, L)


# ---- Arithmetic ----------------------------------------------------------------------------------


def test_the_log_linear_t_dce_is_lambda_dce_draw_for_draw():
    u, noise = diffusion.stratified_uniforms(1, 2, range(16), 16, 8)
    one, other = (diffusion.draw_mask(name, u, noise) for name in ("t_dce", "lambda_dce"))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_the_variance_of_a_gradient_is_split_without_bias():
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    shares = []
    for _ in range(4000):
        text, draw = 2 * normal(3, 1, 2), 3 * normal(3, 2, 2)  # (batches, repeats, P)
        shares.append(objectives.parts_of_variance(4 + text + draw))
    mean, error = torch.tensor(shares).mean(0), torch.tensor(shares).std(0) / 4000**0.5
    assert ((mean - torch.tensor([18.0, 8.0, 32.0])).abs() < 4 * error).all() and error.max() < 0.5
    alike = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    assert objectives.parts_of_variance(alike) == pytest.approx((0.0, 2.0, 2 - 2 / 3))


def timed_network():
    config = network.DEFAULTS | {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 8}
    config |= {"vocab_size": 7, "zero_init": "all"}
    torch.manual_seed(0)
    model = timing.Timed(config)
    with torch.no_grad():
        for name, value in model.initial_weights():
            model.get_parameter(name).copy_(value)
    return config, model


def test_a_network_with_a_time_input_starts_as_the_one_without_and_learns_from_it():
    config, model = timed_network()
    plain = network.make_network(config)
    own = model.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    for net in (plain, model):  # so that blocks and head do something
        torch.manual_seed(1)
        for name, p in net.named_parameters():
            if name.endswith(("proj.weight", "down.weight", "unembed.weight")):
                torch.nn.init.normal_(p)
    x = torch.tensor([[7, 1, 7, 2, 3, 7, 0, 5]] * 2)
    idx = torch.tensor([0, 2, 13])
    model.time = torch.tensor([0.1, 0.9])
    assert torch.equal(model.hidden(x, idx), plain.hidden(x, idx))
    model.head(model.hidden(x)).square().sum().backward()
    assert all(block.modulate.weight.grad.abs().sum() > 0 for block in model.blocks)
    with torch.no_grad():
        for block in model.blocks:
            torch.nn.init.normal_(block.modulate.weight)
    h = model.hidden(x)
    assert not torch.allclose(h[0], h[1]), "the same text at two times"
    assert torch.allclose(model.hidden(x, idx), h.flatten(0, 1)[idx], atol=1e-5)
    model.time = torch.tensor([3 / 8, 3 / 8])
    output, model.time = model.hidden(x), None
    assert torch.equal(model.hidden(x), output), "untold, it reads the share of masks"


def test_the_flops_of_the_time_input_are_those_that_torch_counts():
    config, model = timed_network()
    with FlopCounterMode(display=False) as counter:
        cond = model.time2(model.time1(torch.zeros(1, timing.WIDTH)))
        for block in model.blocks:
            block.modulate(cond)
    config |= {"batch_size": 4}
    step = runs.step_flops(config)
    extra = 3 * 4 * counter.get_total_flops()
    assert timing.share_without_modulation(config) == pytest.approx(step / (step + extra))


def test_the_time_that_the_network_is_told_is_the_draw_s_and_ends_with_the_block():
    plain = network.Transformer, diffusion.Loss
    with timing.timed():
        _, model = timed_network()
        loss_of, times = diffusion.Loss(model, "lambda_dce"), []
        hidden = model.hidden
        model.hidden = lambda *z: times.append(model.time) or hidden(*z)
        mask, weight = diffusion.draw_mask(
            "lambda_dce", torch.tensor([0.25, 1.0]), torch.rand(2, 8)
        )
        loss_of(torch.zeros(2, 8, dtype=torch.long), mask, weight, bound_weight=weight)
        assert times[0].tolist() == [0.25, 1.0] and model.time is None
        assert isinstance(network.make_network(model.config), timing.Timed)
    assert (network.Transformer, diffusion.Loss) == plain


@pytest.mark.parametrize("name", cached_sampling.SAMPLERS)
def test_the_calls_of_the_real_loop_are_the_expected_number(name):
    for steps, length in ((3, 5), (64, 16)):
        expected, mean, error = cached_sampling.counted(name, steps, length, 500, 1)
        assert abs(mean - expected) < 4 * error, (steps, length)
    closed = steps * (1 - (1 - 1 / steps) ** length)  # RADD eq. D.31
    assert (expected == pytest.approx(closed)) == ("log-linear" in name)


def test_confidence_order_is_a_chain_rule(network, arbitrary, joint):
    exact = orders.confidence_nats(network, X0)  # (V^L,) along any order of the true conditionals
    assert torch.allclose(exact, -joint.flatten().log(), atol=1e-5)
    total = (-orders.confidence_nats(arbitrary, X0)).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5), "over all texts, whatever the network"


def test_the_bound_of_a_gap_is_its_likelihood_given_the_rest(network, joint):
    ctx = runs.Runs(settings.defaults_of([settings, results, runs, infilling]))
    ctx.config = ctx.config | {"gap_draws": 20_000, "device": "cpu", "dtype": "float32"}
    x0, gap = torch.tensor([[0, 2, 1, 1]]), torch.tensor([[True, False, True, True]])
    ce, weight = infilling.terms(ctx, network, x0, gap)  # (R, L), (R,)
    each = (weight[:, None] * ce).nan_to_num(0.0).sum(1)  # (R,)
    exact = -(joint[0, 2, 1, 1] / joint[:, 2].sum()).log()
    error = each.std() / len(each) ** 0.5
    assert ce[:, 1].isnan().all() and abs(each.mean() - exact) < 5 * error < 0.2


def test_gaps_are_what_their_names_say():
    text = "ab cd  ef\ngh"
    x0 = torch.tensor([list(text.encode())])
    marked = lambda gap: "".join("_" if g else c for g, c in zip(gap[0], text, strict=True))  # noqa
    shown = {name: marked(gap(x0)) for name, gap in infilling.GAPS.items()}
    assert shown["prefix given"] == "ab cd ______" and shown["suffix given"] == "______ ef\ngh"
    assert shown["both ends given"] == "ab ______\ngh"
    assert shown["every other word given"] == "ab __  ef\n__"


def test_values_are_averaged_by_where_they_are():
    values, where = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.1, 1.0])
    assert infilling.binned(values, where) == [2.0, *[None] * 6, 5.0]


def test_the_perplexity_per_token_is_that_of_all_nats_over_all_tokens():
    assert zero_shot.perplexity(0.5, n_bytes=800, n_tokens=200) == pytest.approx(math.exp(2))


# ---- The quick forms -----------------------------------------------------------------------------

HEADS = {
    objectives: ["objective | draws | nats per token | minus any order | noise of the draw |"],
    timing: ["network | nats per token | minus without | seconds of a run |"],
    cached_sampling: [
        "sampler | L | 16 steps | 64 steps |",
        "steps | judge's nats | n-gram distance | NFE | RADD's generative perplexity |",
        "V | L | steps | E-NFE | textbook | RADD's cache | ours | textbook / RADD | RADD / ours |",
    ],
    orders: ["order | nats per token | minus random | judge's nats | n-gram distance |"],
    zero_shot: [
        "set | MDM bits per byte | MDM perplexity per GPT-2 token | ARM bits per byte |",
        "text | forward | backward | random | confidence | ARM | random minus forward |",
    ],
    infilling: ["gap | MDM nats per byte | ARM nats per byte | MDM minus ARM | bytes given |"],
}
KEYS = {cached_sampling: [frontier], orders: [frontier]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all quick forms keep their runs, which they share."""
    return tmp_path_factory.mktemp("claims")


def quick(module, folder, monkeypatch):
    line = ["--quick", f"--runs={folder}/runs", f"--results={folder}/found", "--device=cpu"]
    line += ["--temperatures=0.7,1.1"] if module in KEYS else []
    monkeypatch.setattr(sys, "argv", ["program.py", *line])
    modules = [settings, results, runs, *KEYS.get(module, []), module]
    return module.main(settings.parse(line, *modules))


@pytest.mark.parametrize("module", HEADS, ids=lambda module: module.__name__.split(".")[-1])
def test_the_quick_form_writes_its_three_files_and_trains_nothing_twice(
    module, folder, monkeypatch, capsys
):
    figures, name = quick(module, folder, monkeypatch), module.__name__.split(".")[-1]
    table = (folder / f"found/{name}.md").read_text()
    assert all(f"| {head}" in table for head in HEADS[module]) and "left out" not in table
    assert json.loads((folder / f"found/{name}.json").read_text()) == figures
    assert {"commit", "machine", "seeds", "seconds", "runs left out"} <= figures.keys()
    assert all(isinstance(value, (str, int, float)) for value in figures.values())
    for ending in module.PLOTS:
        assert (folder / f"found/{name}{ending}.png").stat().st_size > 10_000
    assert table.split("\n\n", 1)[1].strip() in capsys.readouterr().out

    def forbidden(_):
        raise AssertionError("this run is finished")

    monkeypatch.setattr(train, "main", forbidden)
    again = quick(module, folder, monkeypatch)
    assert again | {"seconds": 0} == figures | {"seconds": 0}


def test_what_was_given_to_fill_a_gap_is_never_changed(folder, monkeypatch):
    quick(infilling, folder, monkeypatch)
    table = (folder / "found/infilling.md").read_text().partition("|---")[2].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    assert [row[0] for row in rows] == list(infilling.GAPS)
    assert all(int(given) > 0 and changed == "0" for *_, given, changed in rows)
