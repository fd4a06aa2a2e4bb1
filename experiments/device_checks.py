"""Is everything right on a device? What it computes, against the CPU: a part of experiments/gpu.py.

A check is a function (part, ...) -> a line of figures with `right`. part has a team (lib/parallel),
the program's config, and quick. A bound is of |what came out - what is right| / |what is right|,
for each tensor by itself.
"""

import copy
import itertools
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

import config as settings
import diffusion
import evaluate
import model as network
import sample
import samplers
import train
from experiments import survive
from lib import parallel
from lib.device import dtype_name, machine
from run import checkpoint

# Errors that rounding explains: the CPU's own bfloat16 is off by 2e-2, in the weights of norms.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
KINDS = list(itertools.product(("layer", "rms"), ("gelu", "swiglu", "relu2"), (False, True)))
OBJECTIVES = {"full": "any_order", "causal": "ar", "order": "any_order"}  # of each attention
SMALL = {"n_layer": 4, "n_head": 2, "n_embd": 128, "block_size": 128, "vocab_size": 1100}
TOY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 110}
B = 4  # sequences


def checks(quick):
    """Yield (what is checked, the function, its further arguments), the most telling first."""
    kinds = KINDS[::5] if quick else KINDS
    for attention, dtype in itertools.product(OBJECTIVES, BOUNDS):
        yield f"{attention}, {dtype}, {len(kinds)} kinds", gradients, attention, dtype, kinds
    for dtype in BOUNDS:
        yield f"head, {dtype}", head, dtype
    for sampler in samplers.SAMPLERS:
        yield f"sampler {sampler}", same_tokens, "full", sampler, (0.0, 0.5)
    yield "sampler ancestral, order", same_tokens, "order", "ancestral", (0.0, 0.5)
    yield "sampler left_to_right, causal", same_tokens, "causal", "left_to_right", (0.0,)
    for estimator in evaluate.ESTIMATORS:
        yield f"estimator {estimator}", same_nats, "full", estimator
    for attention in ("order", "causal"):
        yield f"estimator any_order, {attention}", same_nats, attention, "any_order"
    yield "10 steps, a checkpoint and 10 more: as 20", resumed
    for engine, dtype in itertools.product(("ddp", "fsdp"), BOUNDS):
        yield f"{engine} of one process, {dtype}", group_of_one, engine, dtype
    for attention in ("full",) if quick else OBJECTIVES:
        yield f"{attention}, compiled", gradients, attention, "auto", [("rms", "relu2", True)], True


def verdict(errors, bound):
    """The largest of {where: error}, and whether it is within the bound; where, if it is not."""
    worst = max(errors, key=lambda where: math.inf if math.isnan(errors[where]) else errors[where])
    line = {"error": errors[worst], "bound": bound, "right": errors[worst] <= bound}
    return line if line["right"] else line | {"at": worst}


def error(got, expected):
    got, expected = (z.detach().double().cpu() for z in (got, expected))
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def small(part, attention, **keys):
    """The config of a small network."""
    known = {"attention": attention, "objective": OBJECTIVES[attention], "optimizer": "adamw"}
    known |= {"learning_rate": 1e-3, "batch_size": B, "compile": False}
    known |= (TOY if part.quick else SMALL) | keys
    return settings.options(known, *train.MODULES) | {"example_width": 0}


def team_of(part, dtype):
    """The part's Team with products in that dtype."""
    _, autocast = machine(part.config | {"dtype": dtype})
    return part.team._replace(autocast=autocast)


# ---- Gradients -----------------------------------------------------------------------------------


def gradients(part, attention, dtype, kinds, compiled=False):
    """Loss and every gradient on the device, against the CPU's in float32."""
    errors, team = {}, team_of(part, dtype)
    for norm, mlp, qk_norm in kinds:
        keys = {"norm": norm, "mlp": mlp, "qk_norm": qk_norm, "bias": norm == "layer"}
        config = small(part, attention, **keys)
        expected = loss_and_gradients(config, parallel.Team())
        for name, got in loss_and_gradients(config | {"compile": compiled}, team).items():
            where = f"{norm} {mlp} {'qk_norm ' if qk_norm else ''}{name}"
            errors[where] = error(got, expected[name])
    return verdict(errors, BOUNDS[dtype_name(team.autocast, team.device)])


def loss_and_gradients(config, team, engine=None):
    """{name: gradient, "loss": loss} of a batch; engine: by ddp or fsdp, in a group of one."""
    model = train.build(config, team)[0]
    if engine == "fsdp":  # as train.build shards it for more than one process
        weights = model.state_dict()
        with torch.device("meta"):
            model = network.make_network(config)
        parallel.shard(model, team)
        model.to_empty(device=team.device)
        model.cos, model.sin = (z.to(team.device) for z in network.rotary_tables(model.config))
        parallel.fill(model, weights.items(), "")
    loss_of = diffusion.Loss(model, config["objective"])
    loss_of = parallel.prepare_for_training(
        loss_of, config, team._replace(world=2 if engine else 1)
    )
    dataset = SimpleNamespace(batch=lambda *_: some_tokens(config))
    batch = train.make_batch(config, dataset, 0, range(B)).each(lambda z: z.to(team.device))
    with team.autocast():
        loss, _ = loss_of(**batch.inputs())
    (loss / batch.n_tokens).backward()
    gradients = {name: parallel.gathered(p.grad) for name, p in model.named_parameters()}
    return gradients | {"loss": loss}


def some_tokens(config):
    """(B, L) int64"""
    shape = B, config["block_size"]
    return np.random.default_rng(0).integers(config["vocab_size"], size=shape)


def head(part, dtype):
    """The head's loss and gradients as training takes them, against the formula in float64."""
    N, V = (40, 110) if part.quick else (300, 50257)
    torch.manual_seed(0)
    config = small(part, "full", vocab_size=V, bias=True)
    h, target, weight = torch.randn(N, config["n_embd"]), torch.randint(V, (N,)), torch.rand(N)
    outcomes, team, model = [], team_of(part, dtype), network.make_network(config)
    for device, wide in (("cpu", torch.float64), (team.device, torch.float32)):
        model = copy.deepcopy(model).to(device, wide)
        leaf, w = (z.to(device, wide).requires_grad_() for z in (h, weight))  # (N, D), (N,)
        if not outcomes:
            loss, _, ce = diffusion.plain_cross_entropy(model, leaf, target, w.detach())
        else:
            with team.autocast():
                loss, _, ce = diffusion.cross_entropy(model, leaf, target.to(device), w.detach())
        loss.backward()
        outcomes.append((ce, leaf.grad, model.unembed.weight.grad, model.unembed.bias.grad))
    names = "ce", "hidden states", "weight", "bias"
    errors = {name: error(got, true) for name, true, got in zip(names, *outcomes, strict=True)}
    return verdict(errors, BOUNDS[dtype])


def group_of_one(part, engine, dtype):
    """ddp or fsdp with one process, on a card by NCCL, against no group at all."""
    config, team = small(part, "full", norm="rms", bias=False), team_of(part, dtype)
    expected, cuda = loss_and_gradients(config, team), team.device.type == "cuda"
    group = {"device_id": torch.device("cuda", torch.cuda.current_device())} if cuda else {}
    group |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **group)
    try:
        got = loss_and_gradients(config, team, engine)
    finally:
        dist.destroy_process_group()
    return verdict({name: error(got[name], expected[name]) for name in expected}, BOUNDS[dtype])


def resumed(part):
    """The weights of a run that is stopped and resumed, against those of one that is not."""
    weights = []
    with tempfile.TemporaryDirectory() as folder:
        keys = survive.keys_of({"seed": 1, "steps": 20}, Path(folder))
        keys |= {"device": part.team.device, "lr_decay": "constant"}
        for name, ends in (("whole", [20]), ("parts", [10, 20])):
            for end in ends:
                run = keys | {"out_dir": Path(folder, name), "max_iters": end}
                train.main(survive.run_of(run))
            weights.append(checkpoint.read(Path(folder, name))["model"])
    whole, parts = weights
    return verdict({name: error(parts[name], whole[name]) for name in whole}, BOUNDS["float32"])


# ---- Samples and evaluations ---------------------------------------------------------------------


def here_and_there(part, attention):
    """A small network in float32, on the CPU and on the device."""
    torch.manual_seed(1)
    model = network.make_network(small(part, attention, block_size=32 if part.quick else 64)).eval()
    return model, copy.deepcopy(model).to(part.team.device)


def same_tokens(part, attention, sampler, scales):
    """Two sequences of which the beginning is given: whether the same tokens are drawn."""
    models, tokens, differ = here_and_there(part, attention), 0, 0
    for cfg_scale in scales:
        options, drawn = {"sampler": sampler, "steps": 16, "cfg_scale": cfg_scale}, []
        for model in models:
            x = torch.full((2, model.block_size), model.mask_id)  # (N, L)
            x[:, :3] = torch.arange(3)
            drawn.append(sample.sample(model, x.to(model.device), **options)[0].cpu())
        tokens, differ = tokens + x.numel(), differ + int((drawn[0] != drawn[1]).sum())
    return {"tokens": tokens, "differ": differ, "right": differ == 0}


def same_nats(part, attention, estimator):
    """Two sequences: how far the estimates of their nats are apart."""
    nats = []
    for model in here_and_there(part, attention):
        blocks = list(some_tokens(model.config)[:2])
        nats.append(evaluate.estimate(model, blocks, estimator=estimator, draws=4)[0])
    return verdict({"nats": error(nats[1], nats[0])}, BOUNDS["float32"])
