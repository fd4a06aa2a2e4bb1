"""The house on a CUDA that is not there: numbers are the CPU's, and waits of the host are counted.

tests/test_cuda.py runs this file in a process of its own, with pretended_cuda as a plugin.
"""

import itertools
import json
import time
from types import SimpleNamespace

import pretended_cuda
import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import pretended, waits
from test_quality import TEXT as WORDS
from test_quality import save
from test_train import TEXT, losses, words

import config as settings
import diffusion
import evaluate
import model as network
import sample
import train
from config import UserError
from data import writer
from data.tokenizer import Char
from evals import choice, quality
from experiments import device_speed, gpu, results
from lib import fused, optim, parallel
from lib.compiled import can_compile
from lib.device import PRODUCTS, nominal_flops
from lib.parallel import Team

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 50}
SHAPE |= {"norm": "rms", "mlp": "relu2", "qk_norm": True, "bias": False}
FIXED = ["ancestral", "euler", "any_order", "left_to_right", "right_to_left"]
FIXED += ["remask", "remask_rescale"]


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setitem(PRODUCTS, "cuda", 16)
    with pretended() as device:
        yield device


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda") / "data"
    writer.prepare(folder, [("train", TEXT), ("val", TEXT[:500])], Char("".join(sorted(set(TEXT)))))
    return folder


def pair(cuda, **keys):
    """The same small network, on the CPU and on CUDA."""
    torch.manual_seed(0)
    model = network.make_network(network.DEFAULTS | SHAPE | keys).eval()
    twin = network.make_network(model.config).to(cuda).eval()
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.data.copy_(q.data)
    return model, twin


def same(a, b, within=1e-5):
    return torch.allclose(a.detach().cpu(), b.detach().cpu(), rtol=within, atol=within)


# ---- The pretence itself can fail ----------------------------------------------------------------


def loss_of(model, device):
    """The loss of a few masked sequences in bfloat16, and its gradients."""
    x0 = torch.arange(64).view(4, 16) % 50  # (B, L)
    mask = torch.arange(64).view(4, 16) % 3 > 0  # (B, L)
    with torch.autocast(device.type, torch.bfloat16):
        loss, nats = diffusion.nelbo(model, *(z.to(device) for z in (x0, mask, torch.ones(4))))
    loss.backward()
    return loss, nats


def strays(values, masked_idx, x0):
    row = torch.arange(len(values)) % len(x0)  # made on the CPU
    return values.new_zeros(len(x0)).index_add(0, row, values)


def widened(block, z, cos, sin):
    normed = F.rms_norm(z, z.shape[-1:])  # in float32 where the autocast of CUDA rules
    rows = torch.arange(len(z), device=z.device)  # (B,)
    return network.rotate(torch.zeros_like(z).index_copy(0, rows, normed), cos, sin)


@pytest.mark.parametrize(
    ("owner", "name", "mistake", "says"),
    [
        (fused, "summed", strays, "all tensors to be on the same device"),
        (network.Block, "norm_and_rotate", widened, "expected to have the same dtype"),
    ],
)
def test_a_planted_mistake_that_a_cpu_forgives_is_caught(
    owner, name, mistake, says, cuda, monkeypatch
):
    model, twin = pair(cuda)
    loss, nats = loss_of(model, torch.device("cpu"))
    assert [same(z, w, 2e-2) for z, w in zip(loss_of(twin, cuda), (loss, nats), strict=True)]
    monkeypatch.setattr(owner, name, mistake)
    assert loss_of(model, torch.device("cpu"))[0].isfinite()
    with pytest.raises(RuntimeError, match=says):
        loss_of(twin, cuda)


WAITING = {
    "a number": lambda z: z.sum().item(),
    "a condition": lambda z: bool(z[0] > 0),
    "a copy to the host": lambda z: z.cpu(),
    "a list": lambda z: z.tolist(),
    "a copy from where it is not pinned": lambda z: torch.ones(2).to(z.device, non_blocking=True),
    "a copy that is waited for": lambda z: torch.ones(2).pin_memory().to(z.device),
    "indices": lambda z: z.nonzero(),
    "an index by a mask": lambda z: z[z > 0],
    "an index of the CPU": lambda z: z[torch.tensor([0, 1])],
    "numbers for the device": lambda z: torch.tensor([1, 2], device=z.device),
}
FREE = {
    "arithmetic": lambda z: (z @ z).exp() + 2,
    "a pinned copy": lambda z: torch.ones(2).pin_memory().to(z.device, non_blocking=True),
    "an index of the device": lambda z: z[z.long()],
    "a table made there": lambda z: torch.zeros(3, device=z.device),
}


@pytest.mark.parametrize("what", [*WAITING, *FREE])
def test_what_makes_the_host_wait_is_counted_with_its_line(what, cuda):
    z = torch.ones(3, device=cuda)
    waits.clear()
    (WAITING | FREE)[what](z)
    assert len(waits) == (what in WAITING) and all("on_cuda.py:" in line for line in waits)


# ---- Training ------------------------------------------------------------------------------------

OBJECTIVES = {name: {"objective": name} for name in diffusion.OBJECTIVES}
OBJECTIVES["ar"]["attention"] = "causal"
OBJECTIVES["order"] = {"attention": "order"}
OBJECTIVES["t_dce"] |= {"bias": True, "norm": "layer", "mlp": "gelu", "head_padding": 1}


def steps_of(device, bf16=False, **keys):
    """(losses, weights, waits) of two training steps; the waits are those of the second."""
    config = settings.defaults_of(train.MODULES) | SHAPE | keys
    config |= {
        "learning_rate": 1e-3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "warmup_iters": 1,
        "max_iters": 2,
    }
    blocks = torch.arange(64).view(4, 16).numpy() * 7 % 50  # (B, L)
    dataset = SimpleNamespace(batch=lambda first, position: blocks[list(position)])
    team = Team(device=device, autocast=lambda: torch.autocast(device.type, enabled=bf16))
    model, ema, optimizers = train.build(config, team)
    loss_of = parallel.prepare_for_training(
        diffusion.Loss(model, config["objective"]), config, team
    )
    batches = list(itertools.islice(train.make_batches(config, dataset, team), 4))
    losses = []
    for step in range(2):
        waits.clear()
        batch = iter(batches[2 * step :])
        train.set_learning_rate(optimizers, train.learning_rate(step, config))
        losses.append(train.train_step(config, step, batch, loss_of, optimizers, team)[0])
        train.update_ema(ema, model, 0.9, step)
    counted = dict(waits)
    return torch.stack(losses), [*model.parameters(), *ema.parameters()], counted


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_training_step_gives_the_weights_of_the_cpu_and_waits_for_nothing(
    objective, optimizer, cuda, monkeypatch
):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device_type: True)  # round alike
    keys = OBJECTIVES[objective] | {"optimizer": optimizer, "ema": 0.9, "dropout": 0.0}
    losses, weights, counted = steps_of(cuda, **keys)
    plain_losses, plain, _ = steps_of(torch.device("cpu"), **keys)
    assert counted == {} and same(losses, plain_losses)
    within = 1e-4 if optimizer == "muon" else 1e-5  # Muon multiplies in bfloat16
    assert all(same(*each, within) for each in zip(weights, plain, strict=True))
    rounded, _, counted = steps_of(cuda, bf16=True, **keys)
    assert counted == {} and same(rounded, plain_losses, 2e-2)


def test_attention_is_in_bfloat16_though_cuda_normalises_in_float32(cuda, monkeypatch):
    _, twin = pair(cuda)
    seen, attention = set(), fused.attention
    spy = lambda *z: seen.update(each.dtype for each in z[:3]) or attention(*z)  # noqa: E731
    monkeypatch.setattr(fused, "attention", spy)
    loss_of(twin, cuda)
    assert seen == {torch.bfloat16}


def test_recomputing_and_dropout_run_and_wait_for_nothing(cuda):
    losses, _, counted = steps_of(cuda, recompute=True, dropout=0.1, ema=0.9)
    assert losses.isfinite().all() and counted == {}


def test_a_head_of_odd_width_is_padded_for_the_products_and_no_gradient_sees_it(cuda):
    W, bias = fused.head_for_products(torch.ones(50, 8, device=cuda), None, torch.bfloat16)
    assert W.shape == (64, 8) and (bias.cpu()[50:] == -torch.inf).all()
    assert fused.head_for_products(torch.ones(50, 8), None, torch.bfloat16)[0].shape == (50, 8)
    assert 2048 <= fused.head_chunk(50257, cuda) <= 4096 and fused.head_chunk(10**9, cuda) == 256


# ---- Sampling and evaluation ---------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["full", "order"])
@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_samples_are_those_of_the_cpu_and_a_fixed_order_waits_for_no_call(sampler, attention, cuda):
    model, twin = pair(cuda, attention=attention, n_layer=1)
    x = torch.full((3, 9), 50)  # (N, L)
    x[:, 0] = torch.arange(3)
    suppress = torch.where(torch.arange(9) < 4, 7, -1).expand(3, 9)  # (N, L)
    seen = []
    twin.norm.register_forward_hook(lambda *_: seen.append(1))
    for options in ({}, {"cfg_scale": 0.7, "temperature": 0.8}, {"top_p": 0.9}):
        options = {"sampler": sampler, "steps": 6, "batch_size": 2, "seed": 3} | options
        if "top_p" in options:
            twin.hidden = twin.hidden  # as of a compiled network
        tokens, _ = sample.sample(model, x, suppress, **options)
        there = x.to(cuda)
        waits.clear()
        seen.clear()
        there_tokens, _ = sample.sample(twin, there, suppress, **options)
        counted = sum(waits.values())
        assert torch.equal(there_tokens.cpu(), tokens)
        # Before the first call, for whether these are ids, what is asked and what must not come,
        # and after the last, for whether all drawn had a probability, and whether a mask is left.
        calls = len(seen) // (2 if attention == "order" and options.get("cfg_scale") else 1)
        assert counted <= 7 + (0 if sampler in FIXED else calls) and calls > 4


def test_a_compiled_network_is_asked_in_calls_of_one_size(cuda):
    _, twin = pair(cuda)
    sizes, hidden = set(), twin.hidden
    twin.hidden = lambda x, idx: sizes.add((*x.shape, *idx.shape)) or hidden(x, idx)
    x = torch.full((3, 16), 50, device=cuda)
    sample.sample(twin, x, steps=6)
    assert sizes == {(3, 16, 16)}


def test_the_causal_baseline_waits_for_no_token(cuda):
    model, twin = pair(cuda, attention="causal")
    x = torch.full((3, 16), 50)  # (N, L)
    x[1, :5] = 1
    there = x.to(cuda)
    waits.clear()
    there_tokens, _ = sample.sample(twin, there, batch_size=2)
    assert sum(waits.values()) <= 3 + 2  # a look at the probabilities after each batch
    assert torch.equal(there_tokens.cpu(), sample.sample(model, x, batch_size=2)[0])


ASKED = [*itertools.product(evaluate.ESTIMATORS, ("full", "order")), ("left_to_right", "causal")]


@pytest.mark.parametrize(("estimator", "attention"), ASKED)
def test_an_estimate_is_that_of_the_cpu_and_waits_only_when_all_is_asked(
    estimator, attention, cuda
):
    model, twin = pair(cuda, attention=attention)
    requests = [([i, i + 1], [7, i, 3, i + 2, 9, 11]) for i in range(3)]
    options = {"estimator": estimator, "draws": 4, "batch_size": 5}
    plain = evaluate.answer_nats(model, requests, **options)
    waits.clear()
    assert same(evaluate.answer_nats(twin, requests, **options), plain)
    in_order = attention == "order" and not evaluate.ESTIMATORS[estimator].order
    assert in_order or {line.split(":")[1].strip() for line in waits} == {"evaluate.py"}
    if attention == "full" and estimator != "t_dse":  # which has no guidance
        guided = options | {"cfg_scale": 0.5, "pad_to": 12}
        plain = evaluate.answer_nats(model, requests, **guided)
        assert same(evaluate.answer_nats(twin, requests, **guided), plain)


# ---- Programs ------------------------------------------------------------------------------------

KINDS = {"masked": {"optimizer": "muon", "ema": 0.9}, "ar": {"objective": "ar"}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_programs_train_resume_sample_and_evaluate(kind, dtype, cuda, data, tmp_path):
    keys = KINDS[kind] | {"max_iters": 8, "lr_decay": "constant", "show_sample": True}
    keys |= {"skip_nonfinite": True, "log_interval": 1}
    modules = train.MODULES
    out = tmp_path / "cuda"
    for end in (4, 8):
        line = words(data, out, **keys | {"device": "cuda", "dtype": dtype, "max_iters": end})
        train.main(settings.parse(line, *modules))
    train.main(settings.parse(words(data, tmp_path / "cpu", **keys), *modules))
    within = 1e-5 if dtype == "float32" else 3e-2
    assert losses(out) == pytest.approx(losses(tmp_path / "cpu"), rel=within)
    asked = {"ckpt": str(out), "device": "cuda", "dtype": dtype}
    options = {"num_samples": 2, "out": str(tmp_path / "samples.jsonl")}
    options |= {} if kind == "ar" else {"steps": 4}
    lines = [f"--{key}={value}" for key, value in (asked | options).items()]
    assert len(sample.main(settings.parse(lines, *sample.MODULES))) == 2
    lines = [f"--{key}={value}" for key, value in (asked | {"data": data, "sequences": 3}).items()]
    result = evaluate.main(settings.parse(lines, *evaluate.MODULES))
    assert 0 < result["nats_per_token"] < 5


def test_quality_and_choices_run_too(cuda, tmp_path):
    save(tmp_path)
    keys = {"ckpt": str(tmp_path), "device": "cuda", "dtype": "bfloat16"}
    judged = keys | {"judge": str(tmp_path), "num_samples": 2, "steps": 4, "judge_draws": 2}
    lines = [f"--{key}={value}" for key, value in judged.items()]
    quality.main(settings.parse(lines, *sample.MODULES, quality))
    question = {"context": WORDS[:8], "options": ["the", "cat"], "gold": 0}
    (tmp_path / "plain.jsonl").write_text(json.dumps(question) + "\n")
    keys |= {"from": str(tmp_path), "set": "plain", "draws": 2, "cfg_scale": 0.5}
    result = choice.main(settings.options(keys, *choice.MODULES))
    assert result["questions"] == 1


# ---- The measurements of a card ------------------------------------------------------------------

NOT_PRETENDED = ("of one process", "compiled", "as CUDA graphs")  # NCCL, and Inductor's programs


class Event:
    def __init__(self, **_): ...

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_a_card_is_measured_line_by_line_and_computes_what_is_right(cuda, monkeypatch):
    card = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    fakes = {"Event": Event, "empty_cache": lambda: None, "current_device": lambda: 0}
    fakes |= {"mem_get_info": lambda *_: (79e9, 80e9), "get_device_properties": lambda *_: card}
    for name, fake in fakes.items():
        monkeypatch.setattr(f"torch.cuda.{name}", fake)
    monkeypatch.setattr("gc.collect", lambda: None)
    monkeypatch.setattr(device_speed, "profiled", lambda *_: {})  # torch's looks for a real one
    words, lines = ["--device=cuda", "--quick", "--dtype=bfloat16"], []
    part = gpu.Part(settings.parse(words, settings, results, gpu), 60.0, lines.append)
    for _, measure in gpu.PARTS.values():
        gpu.at_work(part, measure)
    failed = [line for line in lines if "failed" in line]
    failed = [line for line in failed if not any(word in line["what"] for word in NOT_PRETENDED)]
    assert not failed and len(lines) > 70
    assert all(line["right"] for line in lines if "right" in line)
    eager = next(line for line in lines if line["what"] == "micro-batch 2, eager")
    assert {"of_nominal", "of_measured", "memory_GB", "first_step_s"} <= eager.keys()


# ---- What is asked of the card -------------------------------------------------------------------


def test_whether_a_card_can_compile_is_known_beforehand(cuda, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not can_compile.__wrapped__(cuda) and "triton" in capsys.readouterr().err
    assert not can_compile.__wrapped__(torch.device("mps"))


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40", None),
        ("NVIDIA L4", 121e12),
    ],
)
def test_the_data_sheet_of_a_card_is_found_by_its_name(name, flops, cuda, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: name)
    assert nominal_flops(cuda) == (name, flops)
    assert nominal_flops(torch.device("cpu")) == (None, None)


def test_under_torchrun_each_process_takes_its_own_card_and_says_so_to_nccl(cuda, monkeypatch):
    asked, place = [], {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    config = settings.DEFAULTS | {"parallel": "ddp"}
    for key, value in place.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("torch.cuda.set_device", asked.append)
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda *z, **keys: asked.append(keys)
    )
    monkeypatch.setattr("atexit.register", lambda *_: None)
    team = parallel.join(config)
    assert team.device == asked[0] == asked[1]["device_id"] == torch.device("cuda:0")
    with pytest.raises(UserError, match="device is cuda:0 for all"):
        parallel.join(config | {"device": "cuda:0"})
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="there is no cuda:1 here; the last is cuda:0"):
        parallel.join(config)


def test_the_pretence_ends_with_its_block():
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device=pretended_cuda.CUDA)
