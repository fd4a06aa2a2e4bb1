"""The formulas of experiments/scaling_up.py give what can be measured: bytes kept, sent, saved."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils.checkpoint import checkpoint as recomputed

import config as settings
import diffusion
import model as network
import train
from config import UserError
from data import writer
from data.tokenizer import Char
from experiments import results, scaling_up
from lib import fused, parallel
from lib.device import NOMINAL, flops_per_token
from run import checkpoint, formats, resume

CONFIG = settings.parse([], results, scaling_up)
SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 64, "mlp_width": 160}
SMALL |= {"block_size": 32, "vocab_size": 96}
SMDM = formats.FIXED["smdm"] | SMALL
KINDS = {  # of block: SMDM's, RADD's, that of gpu_small, and another
    "smdm": {},
    "radd": {"norm": "layer", "mlp": "gelu", "bias": True, "dropout": 0.1},
    "gpu_small": {"mlp": "gelu", "qk_norm": True},
    "relu2": {"mlp": "relu2", "mlp_width": 0},
}


# ---- What is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "parameters"), [("170M", 219_050_496), ("1028M", 1_142_367_744)])
def test_models_have_the_published_number_of_parameters(size, parameters):
    assert scaling_up.shape(CONFIG, size).n_parameters() == parameters


def test_a_budget_buys_the_tokens_of_the_preset():
    steps = settings.read_preset(ROOT / "configs/smdm_170m.py")["max_iters"]
    tokens = scaling_up.tokens_of(scaling_up.shape(CONFIG, "170M"), 1e20)
    assert tokens / (256 * 2048) == pytest.approx(steps, abs=1)


def kept_bytes(net, loss):
    """(Bytes of what loss() keeps for the backward pass, the largest of them).

    Each storage once; parameters and buffers are left out.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in own)
        alive.append(tensor)  # so that no other storage gets its place
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saved, torch.autocast("cpu", torch.bfloat16):
        loss()
    return sum(kept.values()), max(kept.values())


def as_on_a_gpu(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_keeps_what_the_formula_says(kind, n_layer, recompute, monkeypatch):
    monkeypatch.setattr(fused, "attention", as_on_a_gpu)
    net = network.make_network(plain.DEFAULTS | SMDM | KINDS[kind] | {"n_layer": n_layer})
    x = torch.randint(96, (4, 32))  # (B, L)
    masked_idx = torch.arange(0, x.numel(), 2)  # (N,) half of them
    if recompute:
        for block in net.blocks:
            block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
    target = x.flatten()[masked_idx], torch.ones(len(masked_idx))  # (N,) each: tokens and weights
    loss = lambda: diffusion.cross_entropy(net, net.hidden(x, masked_idx), *target)  # noqa: E731
    measured, _ = kept_bytes(net, loss)
    head = 4 * 96 * (64 + net.config["bias"])  # its gradient
    expected = scaling_up.activation_bytes(net, x.numel(), recompute) + head
    if recompute:  # less a block that is made on the way back
        assert measured == expected - sum(scaling_up.block_bytes(net)) * x.numel()
    else:
        assert measured == expected + scaling_up.memory(CONFIG, net, "ddp", 8, 1)["copies"]


def test_the_logits_that_are_avoided_are_what_a_plain_loss_keeps():
    net = network.make_network(plain.DEFAULTS | SMDM | {"vocab_size": 2000})
    x = torch.randint(2000, (2, 32))  # (B, L)
    _, largest = kept_bytes(net, lambda: F.cross_entropy(net(x).flatten(0, 1), x.flatten()))
    held = scaling_up.memory(CONFIG | {"block_size": 32}, net, "ddp", 8, 2)
    assert largest == held["logits_avoided"]


@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_a_checkpoint_has_as_many_bytes_as_the_formula_says(ema, tmp_path, monkeypatch):
    monkeypatch.setattr("run.log.matmul_flops", lambda *_: 1.0)
    parts = [("train", "abcde" * 80), ("val", "abcde" * 20)]
    writer.prepare(tmp_path / "data", parts, Char("abcde"))
    keys = {"n_layer": 4, "n_embd": 128, "n_head": 2, "block_size": 16, "batch_size": 2}
    keys |= {"max_iters": 1, "ema": ema, "data": tmp_path / "data", "out_dir": tmp_path}
    keys |= {"device": "cpu", "show_sample": False, "eval_sequences": 2} | plain.RECIPE
    words = [f"--{key}={value}" for key, value in keys.items()]
    train.main(settings.parse(words, *train.MODULES))
    net, _, _ = checkpoint.load(tmp_path)
    size = (tmp_path / "ckpt.pt").stat().st_size
    assert size == pytest.approx(scaling_up.checkpoint_bytes(net, ema), rel=0.02)


STEP = """
import json, os, sys
import torch, torch.distributed as dist
import diffusion, model as network
from lib import parallel

config, world, folder = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
rank = next((i for i in range(1, world) if os.fork() == 0), 0)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
bf16 = lambda: torch.autocast("cpu", torch.bfloat16)
team, counts = parallel.Team(world, rank, autocast=bf16), {"asked": 0}

def written():
    return int(open("/proc/self/io").read().split("wchar:")[1].split()[0])

def step(loss_of, micro_steps):
    x = torch.randint(96, (4, 32))  # (B, L)
    mask = torch.arange(128).view(4, 32) % 2 == 0  # (B, L)
    dist.barrier()
    before = written()
    for i in range(micro_steps):
        with parallel.accumulate(loss_of, i == micro_steps - 1):
            with team.autocast():
                loss, _ = loss_of(x, mask, torch.ones(4), mask.flatten().nonzero().flatten())
            loss.backward()
    dist.barrier()
    return written() - before

def count(group, bucket):
    counts["asked"] += bucket.buffer().nbytes
    sent = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return sent.then(lambda done: done.value()[0])

net = network.make_network(config)
loss_of = parallel.prepare_for_training(diffusion.Loss(net, "any_order"), config, team)
loss_of.register_comm_hook(None, count)
counts["ddp"] = step(loss_of, 2)

with torch.device("meta"):
    net = network.make_network(config)
parallel.shard(net, team)
net.to_empty(device=team.device)
net.cos, net.sin = network.rotary_tables(net.config)
parallel.fill(net, net.initial_weights(), "")
loss_of = parallel.prepare_for_training(diffusion.Loss(net, "any_order"), config, team)
counts["fsdp"] = [step(loss_of, 1), step(loss_of, 2)]
counts["held"] = sum(p.to_local().nbytes for p in net.parameters())
if rank == 0:
    print(json.dumps(counts), flush=True)
    for _ in range(world - 1):
        os.wait()
os._exit(0)
"""


def test_processes_send_as_many_bytes_as_the_formula_says(tmp_path):
    world, keys = 3, {"n_embd": 128, "mlp_width": 320, "recompute": False, "compile": False}
    config = plain.DEFAULTS | SMDM | keys
    command = [sys.executable, "-c", STEP, json.dumps(config), str(world), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    counts, net = json.loads(run.stdout), network.make_network(config)

    gradients = 4 * net.n_parameters()
    assert counts["asked"] == gradients
    assert counts["held"] == pytest.approx(gradients / world, rel=0.01)
    assert counts["ddp"] == pytest.approx(scaling_up.sent_bytes(net, "ddp", world, 2), rel=0.01)
    for micro_steps, sent in zip((1, 2), counts["fsdp"], strict=True):
        # gloo's reduce-scatter is an all-reduce, which sends twice.
        more = micro_steps * gradients * (world - 1) / world
        expected = scaling_up.sent_bytes(net, "fsdp", world, micro_steps) + more
        assert sent == pytest.approx(expected, rel=0.01)


# ---- What follows from it ------------------------------------------------------------------------


def test_the_parts_of_the_memory_add_up_and_fsdp_divides_what_ddp_repeats():
    net = scaling_up.shape(CONFIG, "170M")
    ddp, fsdp = (scaling_up.memory(CONFIG, net, engine, 64, 4) for engine in ("ddp", "fsdp"))
    for key in ("weights", "gradients", "optimizer", "averages"):
        assert ddp[key] == 64 * fsdp[key]
    saved = ddp["weights"] + ddp["optimizer"] + ddp["averages"]
    assert saved == scaling_up.checkpoint_bytes(net, True)
    for held in (ddp, fsdp):
        other = ("total", "with_recompute", "logits_avoided")
        parts = sum(value for key, value in held.items() if key not in other)
        assert held["with_recompute"] < held["total"] == parts


def test_a_step_takes_its_arithmetic_and_what_of_the_network_does_not_hide_behind_it():
    net = scaling_up.shape(CONFIG, "170M")
    time = scaling_up.step(CONFIG, net, "fsdp", 8, 8, 8)
    flops = 3 * flops_per_token(net, 2048, 0.5) * 64 * 2048
    assert time["compute"] == pytest.approx(flops / (8 * 989e12 * 0.3))
    rings = 7 / 8 * 4 * 2 * net.n_parameters()  # the blocks twice, but in half as many bytes
    assert time["network"] == pytest.approx(rings / (0.8 * 450e9) + 3 * 7 * 19 * 5e-6)
    assert time["exposed"] == 0 and time["mfu"] == 0.3
    again = scaling_up.step(CONFIG, net, "fsdp", 8, 8, 8, recompute=True)
    assert again["compute"] == pytest.approx(4 / 3 * time["compute"])
    assert again["mfu"] == pytest.approx(0.225)
    slow = scaling_up.step(CONFIG | {"nvlink": 1e9}, net, "fsdp", 8, 8, 8)
    assert slow["seconds"] == pytest.approx(slow["network"] + 0.2 * slow["compute"])
    assert slow["mfu"] == pytest.approx(0.3 * slow["compute"] / slow["seconds"])


FASTER = {80e9: "ddp", 60e9: "fsdp", 40e9: "ddp + recompute", 1e9: "neither fits"}


@pytest.mark.parametrize(("memory", "engine"), FASTER.items())
def test_blocks_are_recomputed_where_a_gpu_is_too_small_for_them(memory, engine):
    net = scaling_up.shape(CONFIG, "1028M")
    _, row = scaling_up.plan(CONFIG | {"memory": memory}, net, 1e20, 1024, 8)
    assert row["faster"] == engine


@pytest.mark.parametrize(
    ("save", "restart", "between"), [(60, 600, 7200), (10, 0, 100_000), (300, 60, 3000)]
)
def test_no_interval_loses_less_than_the_best_one(save, restart, between):
    best = scaling_up.best_interval(save, between)
    intervals = np.geomspace(best / 10, best * 10, 20_001)
    least = min(scaling_up.lost(interval, save, restart, between) for interval in intervals)
    assert scaling_up.lost(best, save, restart, between) == pytest.approx(least, rel=1e-3)


def test_lost_time_is_that_of_a_simulated_run():
    """Failures at random; one during a save or a restart counts too."""
    interval, save, restart, between, n = 1000.0, 50.0, 200.0, 2000.0, 200_000
    random, spent, todo, need = np.random.default_rng(0), 0.0, n, interval + save
    while todo:  # pieces of work that are not saved yet; a failed one begins again, with a restart
        until = random.exponential(between, todo)  # (todo,)
        spent += np.minimum(until, need).sum()
        todo, need = int((until < need).sum()), restart + interval + save
    expected = scaling_up.lost(interval, save, restart, between)
    assert spent / (n * interval) - 1 == pytest.approx(expected, rel=0.01)


def test_the_failure_rate_is_that_of_llama_3():
    assert CONFIG["gpu_hours"] == pytest.approx(16384 * 54 * 24 / 419, rel=0.001)


# ---- Presets -------------------------------------------------------------------------------------


@pytest.fixture(params=scaling_up.PRESETS)
def stated(request):
    """(config, model, said) of a preset: said(pattern) are the numbers of its comment there."""
    comment = (ROOT / f"configs/{request.param}.py").read_text().split("\n{")[0]
    comment = re.sub(r"\s*\n# *", " ", comment)

    def said(pattern):
        match = re.search(pattern, comment)
        return [float(number.replace(",", "")) for number in match.groups()]

    said.hours = re.findall(r"([\d.]+) on one ([\w ]+?)[,:.]", comment)
    return *scaling_up.preset(request.param), said


def cost(config, net):
    """(Operations of a token, tokens) of a whole run."""
    tokens = config["max_iters"] * config["batch_size"] * config["block_size"]
    return 3 * flops_per_token(net, config["block_size"], 0.5), tokens


def test_a_preset_says_how_large_it_is_and_what_it_costs(stated):
    config, net, said = stated
    each, tokens = cost(config, net)
    assert said(r"([\d.]+)M (?:parameters[:,]|with them)")[0] == approx(net.n_parameters() / 1e6)
    assert said(r"= ?([\d.]+) billion")[0] == approx(tokens / 1e9)
    assert said(r"3 x (\d+) million")[0] == round(each / 3e6)
    flops, _, reached = said(r"([\d.]+e\d+) / \((\d+e12) x ([\d.]+) x 3600\)")
    assert flops == float(f"{each * tokens:.1e}")
    assert len(said.hours) >= 1
    for hours, card in said.hours:
        computed = each * tokens / (NOMINAL[card] * reached * 3600)
        assert float(hours) == float(f"{computed:.0f}" if computed > 10 else f"{computed:.1f}"), (
            card
        )


def approx(number):
    return pytest.approx(number, rel=0.03)


def test_a_preset_says_what_memory_it_takes_and_how_much_a_card_holds(stated):
    config, net, said = stated
    gigabytes, micro = said(r"([\d.]+) GB at a micro-batch of (\d+)")
    held = scaling_up.memory(config, net, "ddp", 1, int(micro))["total"] / 1e9
    assert micro == config["micro_batch_size"] and gigabytes == round(held, 1)
    assert said(r"of (\d+), (\d+), (\d+) and (\d+) GB hold") == list(scaling_up.CARDS)
    row = scaling_up.one_card(Path(config["out_dir"]).name)
    cells = [row[f"{card}_GB"].split("; ") for card in scaling_up.CARDS]
    for words, sizes in zip(("hold", "--recompute"), zip(*cells, strict=True), strict=True):
        four = ", ".join(["([\\d,]+)"] * 3) + " and ([\\d,]+)"
        assert said(f"{words} {four}") == [float(size) for size in sizes]


def test_the_preset_for_one_card_says_how_fast_and_how_good_it_should_be():
    comment = re.sub(r"\s*\n# *", " ", (ROOT / "configs/gpu_small.py").read_text())
    config, net = scaling_up.preset("gpu_small")
    each, tokens = cost(config, net)
    stated = re.search(r": ([\d,]+), ([\d,]+) and ([\d,]+) tokens a second", comment).groups()
    cards = [card for _, card in re.findall(r"([\d.]+) on one ([\w ]+)", comment)]
    speeds = [round(0.27 * NOMINAL[card] / each, -3) for card in cards]
    assert [float(speed.replace(",", "")) for speed in stated] == speeds
    budget = 6 * sum(p.numel() for p in net.blocks.parameters()) * tokens
    nats, flops = re.search(r"about ([\d.]+) nats .* tokens = ([\d.e]+)\)", comment).groups()
    assert float(nats) == round(3.37 * (budget / 6e18) ** -0.063, 1)
    assert float(flops) == float(f"{budget:.1e}")


def test_a_preset_can_be_trained_on_one_card_and_on_eight(stated):
    config, _, _ = stated
    path = str(ROOT / f"configs/{Path(config['out_dir']).name}.py")
    config = resume.with_size(settings.parse([path], *train.MODULES))
    resume.check(config)
    for world in (1, 8 if config["batch_size"] % (8 * config["micro_batch_size"]) == 0 else 4):
        resume.with_place_in_data(config, None, parallel.Team(world))


# ---- The command and the example -----------------------------------------------------------------


def test_the_command_writes_its_tables(tmp_path, capsys):
    figures = scaling_up.main(CONFIG | {"results": str(tmp_path), "gpus": "8,1024"})
    assert json.loads((tmp_path / "scaling_up.json").read_text()) == figures
    text = (tmp_path / "scaling_up.md").read_text()
    assert text.count("| 1028M | 1,024 |") == 5
    assert text.split("\n\n", 1)[1] in capsys.readouterr().out + "\n"
    sizes = [figures[f"170M_8_{engine}_GB"] for engine in ("ddp", "fsdp", "fsdp_recompute")]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--sizes=171M,1028M", "unknown size '171M'; did you mean '761M'?"),
        ("--sizes=170M", "sizes, budgets and batches must be equally many"),
        ("--gpus=8,many", "gpus must be numbers above 0, with commas between, not '8,many'"),
        ("--gpus=1.5", "gpus must be from 2 to a million, not '1.5'"),
        ("--budgets=1e20,inf", "budgets must be numbers above 0"),
        ("--mfu=1.5", "mfu must be in [0, 1], not 1.5"),
        ("--block_size=1000000000000", "block_size must be at most 1048576, not 1000000000000"),
        ("--disk=0", "disk must be above 0, not 0.0"),
        ("--micro_batch_size=0", "micro_batch_size must be 1 or more, not 0"),
    ],
)
def test_what_no_cluster_is_is_refused_in_one_line(word, message, tmp_path):
    with pytest.raises(UserError) as error:
        scaling_up.main(settings.parse([word, f"--results={tmp_path}"], results, scaling_up))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_slurm_example_is_sound_and_every_key_in_it_exists():
    path = ROOT / "configs/slurm.sh"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    words = re.findall(r"--\w+=\S+|configs/\w+\.py", path.read_text().split("train.py", 1)[1])
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    config = settings.parse(words, *train.MODULES)
    resume.check(resume.with_size(config))
