"""Training: a run is a function of its settings, however often stopped, however many share it."""

import contextlib
import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from plain import RECIPE, words_of

import config as settings
import diffusion
import evaluate
import train
from config import UserError
from data import loader, ngram, writer
from data.tokenizer import Char
from lib.parallel import ANEW, Team
from lib.weighting import MASK_RATES
from run import checkpoint, resume

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "the cat sat on the mat; a dog ran to the log, and the cat ran after it. " * 40
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 8}
TINY |= {"max_iters": 12, "warmup_iters": 2, "log_interval": 2, "eval_interval": 4}
TINY |= {"eval_sequences": 6, "eval_draws": 2, "show_sample": False}
TINY |= {"device": "cpu", "dtype": "float32"} | RECIPE
# What differs between two runs that are the same.
CLOCK = {"tokens_per_second", "mfu", "memory_mib", "seconds_left", "minutes"}
MODULES = train.MODULES


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder."""
    folder = tmp_path_factory.mktemp("train") / "data"
    writer.prepare(folder, [("train", TEXT), ("val", TEXT[:500])], Char("".join(sorted(set(TEXT)))))
    return folder


def words(data, out, **keys):
    """The command line of a tiny run."""
    return words_of(TINY | {"data": data, "out_dir": out} | keys)


def config_of(data, out, **keys):
    return settings.parse(words(data, out, **keys), *MODULES)


def run(data, out, **keys):
    return train.main(config_of(data, out, **keys))


def refusal(data, out, **keys):
    """The one line in which a run is refused."""
    with pytest.raises(UserError) as error:
        run(data, out, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def stopped(data, out, **keys):
    """A run that ends as an interrupted program does."""
    with pytest.raises(SystemExit) as stop:
        run(data, out, **keys)
    assert stop.value.code == 130


def log(out):
    """log.jsonl without what depends on the clock."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in CLOCK} for entry in entries]


def losses(out, key="loss"):
    return [entry[key] for entry in log(out) if key in entry]


def same(a, b):
    """Equal bit for bit, whatever is nested in it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state_of(out):
    """All that a checkpoint holds of a run but its settings and its time."""
    state = checkpoint.read(out)
    return {key: value for key, value in state.items() if key not in ("config", "minutes")}


# ---- The learning rate ---------------------------------------------------------------------------


def rates(**keys):
    shape = {"learning_rate": 2.0, "min_lr": 0.5, "warmup_iters": 9, "max_iters": 109}
    shape |= {"decay_start": 0.0} | keys
    return [train.learning_rate(step, shape) for step in range(shape["max_iters"] + 1)]


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_in_equal_steps_to_its_peak(decay):
    lr = rates(lr_decay=decay)
    assert lr[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(lr) == 2.0 == lr[9]


def test_the_learning_rate_decays_from_the_end_of_warm_up_to_its_floor():
    decays = ("cosine", "linear", "constant")
    cosine, linear, constant = (rates(lr_decay=decay)[9:] for decay in decays)
    done = [step / 100 for step in range(101)]
    assert linear == pytest.approx([2.0 - 1.5 * d for d in done])
    assert cosine == pytest.approx([0.5 + 0.75 * (1 + math.cos(math.pi * d)) for d in done])
    assert constant == [2.0] * 101


def test_the_decay_may_begin_later():
    lr = rates(lr_decay="linear", warmup_iters=0, max_iters=100, decay_start=0.6)
    assert lr[:61] == [2.0] * 61
    assert lr[80] == pytest.approx(1.25) and lr[100] == pytest.approx(0.5)
    assert rates(lr_decay="linear", warmup_iters=50, max_iters=100, decay_start=0.2)[50] == 2.0


# ---- Batches -------------------------------------------------------------------------------------

OBJECTIVES = ["any_order", "lambda_dce", "t_dce", "ar"]


def batch_of(data, step, position, **keys):
    config = config_of(data, "unused", **keys)
    blocks = loader.Blocks(loader.Tokens(data, "train"), 16, config["seed"])
    return train.make_batch(config, blocks, step, position)


def drawn(batch):
    """x0, mask and weight, of ar x0 alone."""
    return [z for z in batch[:3] if z is not None]


@pytest.mark.parametrize("random_length", [0.0, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_does_not_depend_on_how_its_rows_are_shared_out(objective, random_length, data):
    keys = {"objective": objective, "random_length": random_length}
    whole, *parts = (
        batch_of(data, 7, position, **keys)
        for position in (range(8), range(0, 1), range(1, 6), range(6, 8))
    )
    pieces = zip(*map(drawn, parts), strict=True)
    for z, piece in zip(drawn(whole), pieces, strict=True):
        assert torch.equal(torch.cat(piece), z)
    assert {part.n_tokens for part in parts} == {whole.n_tokens} == {whole.x0.numel()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_changes_with_the_step_and_with_the_seed(objective, data):
    first, *others = (
        batch_of(data, step, range(8), objective=objective, **keys)
        for step, keys in ((7, {}), (8, {}), (7, {"seed": 2}))
    )
    for other in others:
        assert not any(map(torch.equal, drawn(first), drawn(other)))


def test_bell_shaped_mask_rates_have_their_density_and_stay_pairs():
    u = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)  # (1000,)
    rate, density = MASK_RATES["bell"](u)
    assert torch.allclose(rate + rate.flip(0), torch.ones(1000, dtype=torch.float64))
    slope = (MASK_RATES["bell"](u + 1e-6)[0] - MASK_RATES["bell"](u - 1e-6)[0]) / 2e-6
    assert torch.allclose(slope, 1 / density, rtol=1e-4)  # d rate / du is 1 / density
    middle = ((rate > 0.25) & (rate < 0.75)).double().mean()
    assert middle > 0.85  # a uniform rate: 0.5


def test_the_nelbo_of_a_batch_is_the_bound_whatever_the_mask_rates(data):
    config = config_of(data, "unused", batch_size=4096, mask_rate="bell") | {"attention": "full"}
    L = config["block_size"]
    mask, _, bound = train.draw_training_mask(config, 0, range(4096), L)  # (4096, L), (4096,)
    k = mask.sum(1)  # (4096,)
    assert torch.equal(k[::2] + k[1::2], torch.full((2048,), L + 1))
    for j in range(L // 3, L - L // 3):  # numbers that come often bring their mean CE once
        assert (bound * k * (k == j)).mean().item() == pytest.approx(1, abs=0.1)


def test_the_loss_weight_changes_what_masked_tokens_count_for_and_not_which_they_are(data):
    batches = {kind: batch_of(data, 7, range(8), loss_weight=kind) for kind in train.LOSS_WEIGHTS}
    bound = batches["bound"]
    for batch in batches.values():
        assert torch.equal(batch.x0, bound.x0) and torch.equal(batch.mask, bound.mask)
        assert torch.equal(batch.masked_idx, bound.masked_idx) and batch.weight.shape == (8,)
    assert torch.allclose(bound.weight, 16 / bound.mask.sum(1))  # any_order: L / k
    assert torch.allclose(batches["sqrt"].weight, 2 * bound.weight.sqrt())
    assert (batches["constant"].weight == 2).all()


def test_a_step_in_so_many_is_cut_to_a_length_that_is_the_same_for_all_its_rows(data):
    keys = {"random_length": 0.4, "objective": "ar"}
    lengths = [batch_of(data, step, range(2), **keys).x0.shape[1] for step in range(400)]
    cut = [n for n in lengths if n < 16]
    expected = 0.4 * 15 / 16  # one length in 16 is the whole block
    assert len(cut) / 400 == pytest.approx(expected, abs=0.05)
    assert set(cut) == set(range(1, 16)) and max(map(cut.count, range(1, 16))) < 2 * len(cut) / 15
    assert all(batch_of(data, step, range(2)).x0.shape[1] == 16 for step in range(20))


# ---- One step ------------------------------------------------------------------------------------


def build(data, **keys):
    """(config, model, blocks, Loss) at the beginning of a run."""
    config = config_of(data, "unused", **keys)
    tokens = loader.Tokens(data, "train")
    attention = diffusion.OBJECTIVES[config["objective"]].attention[0]
    config |= {"vocab_size": tokens.vocab_size, "attention": attention}
    model, _, _ = train.build(config, Team())
    loss_of = diffusion.Loss(model, config["objective"])
    return config, model, loader.Blocks(tokens, 16, config["seed"]), loss_of


def gradient_of_step(data, **keys):
    """(loss, gradients) of train_step: what plain descent with a rate of 1 moves the weights by."""
    config, model, blocks, loss_of = build(data, grad_clip=0.0, **keys)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = train.make_batches(config, blocks, Team())
    loss, _, skipped = train.train_step(config, 0, batches, loss_of, [optimizer], Team())
    assert not skipped
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    return loss, [a.detach() - b.detach() for a, b in pairs]


@pytest.mark.parametrize(
    "keys", [{"objective": objective} for objective in OBJECTIVES] + [{"random_length": 1.0}]
)
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(keys, data):
    loss, whole = gradient_of_step(data, **keys)
    for micro in (1, 2, 4):
        other, parts = gradient_of_step(data, micro_batch_size=micro, **keys)
        assert other.item() == pytest.approx(loss.item(), rel=1e-5)
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    "keys", [{"objective": "lambda_dce"}, {"loss_weight": "constant"}, {"random_length": 1.0}]
)
def test_the_loss_is_the_weighted_cross_entropy_per_token_of_the_plain_definition(keys, data):
    _, model, *_ = build(data, **keys)
    x0, mask, weight, *_ = batch_of(data, 0, range(8), **keys)
    logits = model(torch.where(mask, model.mask_id, x0))  # (B, L, V)
    ce = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")  # (B, L)
    plain = (weight[:, None] * mask * ce).sum() / x0.numel()
    plain.backward()
    loss, gradients = gradient_of_step(data, **keys)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    pairs = zip(gradients, model.parameters(), strict=True)
    assert all(torch.allclose(g, p.grad, atol=2e-6) for g, p in pairs)


def names_of(optimizer, model):
    """[(names of its parameters, weight decay) of each group]"""
    named = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups
    return [({named[id(p)] for p in group["params"]}, group["weight_decay"]) for group in groups]


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_weight_has_one_optimizer_and_vectors_do_not_decay_unless_all_do(
    optimizer, decay_all, data
):
    config, model, *_ = build(data, optimizer=optimizer, decay_all=decay_all, weight_decay=0.3)
    groups = [names_of(each, model) for each in train.make_optimizers(config, model)]
    every = [name for optimizer in groups for names, _ in optimizer for name in names]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())
    for names, decay in (group for optimizer in groups for group in optimizer):
        decays = [decay_all or model.get_parameter(name).dim() == 2 for name in names]
        assert all(decay == (0.3 if each else 0.0) for each in decays)
    if optimizer == "muon":
        named = model.named_parameters()
        assert groups[1][0][0] == {n for n, p in named if "blocks" in n and p.dim() == 2}


def test_the_ema_follows_the_weights_slowly_once_it_has_caught_up(data):
    _, model, *_ = build(data)
    ema, plain = copy.deepcopy(model), model.embed.weight.detach().clone()
    for step in range(1, 40):
        model.embed.weight.data.add_(1.0)
        train.update_ema(ema, model, 0.7, step)
        decay = min(0.7, (1 + step) / (10 + step))
        plain = decay * plain + (1 - decay) * model.embed.weight.detach()
    assert torch.allclose(ema.embed.weight, plain, rtol=1e-5)


# ---- A run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [{"optimizer": "muon", "learning_rate": 0.02}, {"objective": "ar", "learning_rate": 0.01}],
)
def test_a_run_learns(keys, data, tmp_path):
    result = run(data, tmp_path, max_iters=150, eval_interval=150, n_embd=32, **keys)
    assert losses(tmp_path)[-1] < 0.6 * losses(tmp_path)[0]
    assert result["nats_per_token"] < ngram.baseline(data)["unigram"] - 0.3


def test_a_run_writes_what_it_did(data, tmp_path, capsys):
    result = run(data, tmp_path, eval_interval=5, show_sample=True, ema=0.9)
    entries = log(tmp_path)
    assert [e["step"] for e in entries if "loss" in e] == [2, 4, 6, 8, 10, 12]
    assert [e["step"] for e in entries if "nats_per_token" in e] == [5, 10, 12]
    for entry in (entry for entry in entries if "loss" in entry):
        assert entry["tokens"] == entry["step"] * 8 * 16 and entry["learning_rate"] <= 1e-3
    assert entries[-1] == {"step": 12} | result
    out = capsys.readouterr().out
    assert out.count("nats per token (95% interval)") == 3 == out.count("---- a sample\n")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "log.jsonl"]


@pytest.mark.parametrize(
    "keys", [{}, {"ema": 0.9}, {"objective": "ar"}, {"objective": "t_dce", "ema": 0.5}]
)
def test_the_bound_of_the_run_is_the_one_that_evaluate_finds(keys, data, tmp_path):
    result = run(data, tmp_path, seed=5, **keys)
    given = {"ckpt": str(tmp_path), "data": str(data), "draws": 2, "sequences": 6, "seed": 5}
    given |= {"device": "cpu", "dtype": "float32"}
    other = evaluate.main(settings.options(given, *evaluate.MODULES))
    for key in ("nats_per_token", "standard_error", "bits_per_byte", "tokens"):
        assert other[key] == result[key]


@pytest.mark.parametrize("interval", [1, 1000])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(interval, data, tmp_path):
    keys = {"learning_rate": 1e25, "warmup_iters": 0, "grad_clip": 0.0}
    keys |= {"eval_interval": 1, "log_interval": interval}
    assert "the loss is nan at step" in refusal(data, tmp_path, **keys)
    if (tmp_path / "ckpt.pt").exists():
        assert all(w.isfinite().all() for w in checkpoint.read(tmp_path)["model"].values())


# ---- Seeing a run --------------------------------------------------------------------------------


def test_each_line_of_the_log_has_speed_memory_and_the_time_that_is_left(data, tmp_path):
    run(data, tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and entry["mfu"] > 0 for entry in entries)
    assert all(100 < entry["memory_mib"] < 10000 for entry in entries)
    assert entries[0]["seconds_left"] > 0 == entries[-1]["seconds_left"]


def test_a_trace_of_some_steps_is_written_on_demand(data, tmp_path):
    run(data, tmp_path, profile=2, max_iters=4)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert any(event["name"] == "aten::mm" for event in events)


@pytest.mark.parametrize("key", [{"wandb": "project"}, {"tensorboard": True}])
def test_a_missing_logger_is_one_line_with_the_command_that_installs_it(
    key, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refusal(data, tmp_path, **key)
    assert re.fullmatch(r"--(\w+) needs one more package: pip install \1", message)


def test_wandb_and_tensorboard_get_the_numbers_of_the_log(data, tmp_path, monkeypatch):
    sent = {"wandb": [], "tensorboard": []}

    class Writer(contextlib.nullcontext):
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "tensorboard" and purge_step == 1
            super().__init__(self)

        def add_scalar(self, key, value, step):
            sent["tensorboard"].append((step, key, value))

    def log(numbers, step):
        sent["wandb"].extend((step, *item) for item in numbers.items())

    def init(project, group, **_):
        assert (project, group) == ("mine", tmp_path.name)
        return SimpleNamespace(log=log, finish=lambda: None)

    tensorboard = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    run(data, tmp_path, wandb="mine", tensorboard=True)
    assert sent["wandb"] == sent["tensorboard"]
    assert [value for _, key, value in sent["wandb"] if key == "train/loss"] == losses(tmp_path)
    assert [step for step, key, _ in sent["wandb"] if key == "val/nats_per_token"] == [4, 8, 12]


# ---- Keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parallel": "dp"}, "unknown parallel 'dp'; did you mean 'ddp'?"),
        ({"objective": "anyorder"}, "unknown objective 'anyorder'; did you mean 'any_order'?"),
        ({"loss_weight": "sqr"}, "unknown loss_weight 'sqr'; did you mean 'sqrt'?"),
        ({"loss_weight": ""}, "unknown loss_weight ''; there is: bound, constant, sqrt"),
        ({"keep": 0}, "keep must be 1 or more, not 0"),
        ({"save_interval": -1}, "save_interval must be 0 or more, not -1"),
        ({"profile": -2}, "profile must be 0 or more, not -2"),
        ({"min_lr": -1.0}, "min_lr must be in [0, 1e30], not -1.0"),
    ],
)
def test_a_key_that_makes_no_sense_is_one_line(keys, message, data, tmp_path):
    assert refusal(data, tmp_path / "out", **keys) == message and not (tmp_path / "out").exists()


TABLES = {"objective": diffusion.OBJECTIVES, "loss_weight": train.LOSS_WEIGHTS}


@pytest.mark.parametrize("key", TABLES)
def test_a_key_accepts_each_name_of_its_table_and_says_so_in_its_help(key, data):
    names = list(TABLES[key])
    assert [*settings.allowed(train)[key]] == names and len(names) >= 3
    assert [config_of(data, "unused", **{key: name})[key] for name in names] == names
    assert " | ".join(names) in settings.help_text(train)


@pytest.mark.parametrize("key", TABLES)
def test_each_name_of_a_table_trains(key, data, tmp_path):
    for name in TABLES[key]:
        run(data, tmp_path / name, **{key: name}, max_iters=2)
        assert all(map(math.isfinite, losses(tmp_path / name)))


# ---- Stopped and resumed -------------------------------------------------------------------------


def stop_at(monkeypatch, at, number=signal.SIGINT):
    """Ctrl-C, a real signal, in the middle of a step."""
    step_of = train.train_step

    def step_and_signal(config, step, *rest):
        if step == at - 1:
            os.kill(os.getpid(), number)
        return step_of(config, step, *rest)

    monkeypatch.setattr(train, "train_step", step_and_signal)


RUNS = {
    "adamw": {"ema": 0.9},
    "muon": {"optimizer": "muon", "ema": 0.9, "dropout": 0.2, "random_length": 0.5, "n_layer": 2},
    "ar": {"objective": "ar", "dropout": 0.1, "lr_decay": "linear"},
    "lambda": {"objective": "lambda_dce", "loss_weight": "sqrt", "micro_batch_size": 2},
}
RUNS["lambda"] |= {"decay_all": True}


@pytest.mark.parametrize("at", [3, 6, 8])  # before any checkpoint, between two, at one
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_stopped_and_resumed_equals_one_never_stopped_bit_for_bit(
    kind, at, data, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run(data, whole, **RUNS[kind])
    with monkeypatch.context() as patch:
        stop_at(patch, at)
        stopped(data, parts, **RUNS[kind])
    assert checkpoint.read(parts)["step"] == at
    assert run(data, parts, **RUNS[kind]) == result
    assert same(state_of(parts), state_of(whole))
    extra = 1 if at % 2 else 0  # the step of the stop is logged
    assert [entry for entry in log(parts) if not (extra and entry["step"] == at)] == log(whole)


def test_batches_made_ahead_by_a_thread_change_nothing(data, tmp_path, monkeypatch):
    """As they are wherever the network is not on the CPU itself."""
    run(data, tmp_path / "whole", **RUNS["muon"])
    make_batches, before = train.make_batches, threading.active_count()
    monkeypatch.setattr(train, "make_batches", lambda *given: loader.prefetch(make_batches(*given)))
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        stopped(data, tmp_path / "parts", **RUNS["muon"])
    run(data, tmp_path / "parts", **RUNS["muon"])
    assert same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert threading.active_count() == before


def test_a_run_made_longer_equals_a_long_run(data, tmp_path):
    keys = {"lr_decay": "constant", "ema": 0.9, "optimizer": "muon"}
    run(data, tmp_path / "whole", **keys)
    for steps in (4, 8, 12):
        run(data, tmp_path / "parts", max_iters=steps, **keys)
    assert same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(data, tmp_path, capsys):
    run(data, tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("ckpt.pt", "log.jsonl")]
    run(data, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("ckpt.pt", "log.jsonl")] == before
    assert "at step 12 of 12" in capsys.readouterr().out


def test_a_run_whose_checkpoint_holds_no_tokenizer_is_resumed(data, tmp_path):
    run(data, tmp_path / "a", max_iters=4)
    path = tmp_path / "a" / "ckpt.pt"
    checkpoint.save(path, checkpoint.read(path) | {"tokenizer": None})
    run(data, tmp_path / "a", max_iters=8)
    assert checkpoint.read(path)["step"] == 8


def test_resume_false_starts_again(data, tmp_path):
    run(data, tmp_path, seed=1)
    run(data, tmp_path, resume=False, n_layer=2, max_iters=6)
    assert [entry["step"] for entry in log(tmp_path)] == [2, 4, 4, 6, 6]
    assert checkpoint.read(tmp_path)["config"]["n_layer"] == 2


def test_entries_past_the_checkpoint_are_written_anew_and_a_torn_one_does_no_harm(data, tmp_path):
    run(data, tmp_path / "whole")
    run(data, tmp_path / "parts", max_iters=8, lr_decay="constant")
    with open(tmp_path / "parts" / "log.jsonl", "a") as file:  # killed, the disk full
        file.write('{"step": 10, "loss": 99.0}\n{"step": 12, "lo')
    run(data, tmp_path / "parts", lr_decay="constant")
    parts, whole = ([entry["step"] for entry in log(tmp_path / x)] for x in ("parts", "whole"))
    assert parts == whole
    assert 99.0 not in losses(tmp_path / "parts")


# ---- What may be changed on the way --------------------------------------------------------------


def run_without(leave_out, data, out, **keys):
    """run by a command that leaves out some of its keys."""
    line = words(data, out, **keys)
    line = [word for word in line if word[2:].partition("=")[0] not in leave_out]
    return train.main(settings.parse(line, *MODULES))


def test_the_model_keys_of_the_checkpoint_win_over_defaults(data, tmp_path):
    run(data, tmp_path, max_iters=4, objective="lambda_dce", qk_norm=False)
    run_without(("n_layer", "n_head", "n_embd", "block_size"), data, tmp_path)
    config = checkpoint.read(tmp_path)["config"]
    assert config["max_iters"] == 12 == checkpoint.read(tmp_path)["step"]
    kept = [config[key] for key in ("n_layer", "n_embd", "objective", "qk_norm")]
    assert kept == [1, 16, "lambda_dce", False]


CONFLICTS = {"n_layer": 2, "block_size": 8, "qk_norm": False, "objective": "ar", "vocab_size": 5}
CONFLICTS |= {"attention": "causal", "depth": 3}


@pytest.mark.parametrize(("key", "value"), CONFLICTS.items())
def test_a_model_key_that_conflicts_is_an_error_and_changes_nothing(key, value, data, tmp_path):
    run(data, tmp_path, max_iters=4)
    before = [(tmp_path / name).read_bytes() for name in ("ckpt.pt", "log.jsonl")]
    kept = TINY | {"objective": "any_order", "attention": "full", "qk_norm": True}
    kept["depth"] = 0
    kept["vocab_size"] = loader.Tokens(data, "train").vocab_size
    conflict = f"{tmp_path / 'ckpt.pt'} was trained with {key}={kept[key]}, not {value}"
    message = f"{conflict}; {ANEW}"
    assert refusal(data, tmp_path, **{key: value}) == message
    assert [(tmp_path / name).read_bytes() for name in ("ckpt.pt", "log.jsonl")] == before


def test_training_keys_may_be_changed_and_the_change_takes_effect(data, tmp_path):
    run(data, tmp_path, max_iters=4)
    keys = {"weight_decay": 0.7, "beta2": 0.5, "ema": 0.9}
    run(data, tmp_path, **keys, learning_rate=5e-4, lr_decay="constant")
    state = checkpoint.read(tmp_path)
    matrices, vectors = state["optimizer"][0]["param_groups"]
    assert matrices["lr"] == 5e-4 and state["ema"] is not None
    assert matrices["weight_decay"] == 0.7 and vectors["weight_decay"] == 0.0
    assert matrices["betas"][1] == 0.5


@pytest.mark.parametrize("keys", [{"optimizer": "muon"}, {"decay_all": True}])
def test_an_optimizer_of_another_shape_is_refused_in_one_line(keys, data, tmp_path):
    run(data, tmp_path, max_iters=4)
    assert "--resume=False" in refusal(data, tmp_path, **keys)


def test_text_with_another_tokenizer_is_refused(data, tmp_path):
    run(data, tmp_path / "out", max_iters=4)
    loud = Char("".join(sorted(set(TEXT.upper()))))
    writer.prepare(tmp_path / "loud", [("train", TEXT.upper()), ("val", TEXT.upper())], loud)
    assert "another tokenizer" in refusal(tmp_path / "loud", tmp_path / "out")


def test_a_size_sets_the_shape_and_a_key_that_conflicts_is_an_error(data, tmp_path):
    shape = ("n_layer", "n_head", "n_embd", "mlp_width", "norm", "mlp", "bias")
    config = settings.parse(["--size=19M", "--n_head=6"], *MODULES)
    sized = resume.with_size(config)
    assert [sized[key] for key in shape] == [8, 6, 384, 1536, "rms", "swiglu", False]
    assert resume.with_size(config | {"size": ""}) == config | {"size": ""}
    conflict = refusal(data, tmp_path, size="19M", n_head=6, n_embd=384)
    assert conflict == "size 19M has n_layer=8, not 1"


def test_a_size_that_conflicts_with_the_checkpoint_is_an_error(data, tmp_path):
    run(data, tmp_path, max_iters=4)
    with pytest.raises(UserError, match="--resume=False"):
        run_without(("n_layer", "n_head", "n_embd"), data, tmp_path, size="19M")


# ---- Real processes ------------------------------------------------------------------------------

LONG = {"max_iters": 200, "eval_interval": 40, "ema": 0.9, "dropout": 0.1, "log_interval": 1}


@contextlib.contextmanager
def process(*command):
    """A command that runs in the repository while the block lasts; torchrun ends all of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes) as began:
        try:
            yield began
        finally:
            began.terminate()


def until(condition, process):
    """Wait for it, a minute at most, while the process lives."""
    limit = time.time() + 60
    while not condition():
        assert process.poll() is None and time.time() < limit
        time.sleep(0.005)


def test_a_run_killed_and_then_terminated_ends_where_one_never_stopped_ends(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with process("train.py", *words(data, parts, **LONG)) as killed:
        until((parts / "ckpt.pt").exists, killed)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL

    first = checkpoint.read(parts)["step"]
    with process("train.py", *words(data, parts, **LONG)) as terminated:
        until(lambda: any(entry["step"] > first + 20 for entry in log_so_far(parts)), terminated)
        terminated.send_signal(signal.SIGTERM)
        out, err = terminated.communicate(timeout=60)
    assert terminated.returncode == 130 and "Traceback" not in err
    at = checkpoint.read(parts)["step"]
    said = f"stopped and saved {parts / 'ckpt.pt'} at step {at}; the same command resumes it"
    assert first < at < 200 and out.splitlines()[-1] == said

    assert run(data, parts, **LONG) == run(data, whole, **LONG)
    assert same(state_of(parts), state_of(whole)) and log(parts) == log(whole)


def log_so_far(out):
    """The entries of a log that is being written."""
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


PROGRAM = """
import runpy, sys
for line in open(sys.argv[1]).read().splitlines():
    sys.argv = ["train.py", *line.split()]
    runpy.run_path("train.py", run_name="__main__")
"""
SHARED = {
    "any_order": {"ema": 0.9, "eval_sequences": 7},
    "lambda_dce": {"objective": "lambda_dce", "random_length": 0.5, "loss_weight": "sqrt"},
    "ar": {"objective": "ar", "optimizer": "muon"},
}


@pytest.fixture(scope="session")
def two_processes(data, tmp_path_factory):
    """The folder with the runs of SHARED, each by two processes with two micro-batches each."""
    folder = tmp_path_factory.mktemp("two")
    runs = [words(data, folder / name, micro_batch_size=2, **keys) for name, keys in SHARED.items()]
    (folder / "runs").write_text("\n".join(" ".join(line) for line in runs))
    (folder / "program.py").write_text(PROGRAM)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with process(*launch, folder / "program.py", folder / "runs") as both:
        _, err = both.communicate(timeout=120)
    assert both.returncode == 0, err
    return folder


@pytest.mark.parametrize("kind", SHARED)
def test_two_processes_train_as_one_does(kind, two_processes, data, tmp_path):
    run(data, tmp_path, **SHARED[kind])
    for key in ("loss", "nelbo"):
        assert losses(two_processes / kind, key) == pytest.approx(losses(tmp_path, key), rel=2e-5)
    assert len(losses(tmp_path)) == 6
    two, one = (checkpoint.read(out) for out in (two_processes / kind, tmp_path))
    assert two["step"] == one["step"] == 12
    assert all(torch.allclose(two["model"][name], w, atol=1e-4) for name, w in one["model"].items())


@pytest.mark.parametrize("kind", SHARED)
def test_two_processes_evaluate_as_one_does(kind, two_processes, data, tmp_path):
    run(data, tmp_path, **SHARED[kind])
    for one, two in zip(log(tmp_path), log(two_processes / kind), strict=True):
        if "nats_per_token" in one:
            assert two["nats_per_token"] == pytest.approx(one["nats_per_token"], rel=1e-4)
            assert two["standard_error"] == pytest.approx(one["standard_error"], rel=1e-3)
            assert two["tokens"] == one["tokens"]


def test_kept_checkpoints_without_the_last_one_are_not_overwritten_unasked(data, tmp_path):
    run(data, tmp_path, keep=2, max_iters=4, save_interval=2, eval_interval=4)
    (tmp_path / "ckpt.pt").unlink()
    message = refusal(data, tmp_path, keep=2, max_iters=4)
    assert "ckpt_4.pt to" in message
    assert f"to resume, or {ANEW}" in message
    assert {path.name for path in tmp_path.glob("*.pt")} == {"ckpt_2.pt", "ckpt_4.pt"}
