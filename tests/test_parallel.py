"""Several processes: however many, and however they share the network, a run is the same run."""

import contextlib
import math
import multiprocessing
import os
import pickle
import socket

import pytest
import torch
from test_train import MODULES, TEXT, config_of, log, losses, run, same, state_of, words

import config as settings
import train
from config import UserError
from data import writer
from data.tokenizer import Char
from lib import parallel
from lib.parallel import Team
from run import budget, checkpoint
from run import log as run_log

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = {"n_layer": 2, "ema": 0.9, "eval_sequences": 7, "log_interval": 1}
DEEP |= {"max_iters": 6, "eval_interval": 3}
FSDP = {"parallel": "fsdp"}
SPREAD = {
    "ddp": {"micro_batch_size": 1},
    "fsdp": FSDP | {"micro_batch_size": 2, "recompute": True},
    "fsdp muon": FSDP | {"optimizer": "muon", "n_layer": 1, "max_iters": 3},
    "ddp order": {"attention": "order", "order": "mixture"},
    "fsdp order": FSDP | {"attention": "order", "n_layer": 1, "max_iters": 3},
    "fsdp ar": FSDP | {"objective": "ar", "decay_all": True, "show_sample": True},
}
SPREAD["fsdp bf16"] = FSDP | {"dtype": "bfloat16", "norm": "rms", "max_iters": 3}
SPREAD["fsdp"] |= {"norm": "rms", "mlp": "swiglu", "qk_norm": True}
# By how many processes a run is done in turns, how far each gets, and how: each resumes the one
# before.
CHAIN = {
    1: [(2, {})],
    2: [(4, FSDP), (6, {"parallel": "ddp", "micro_batch_size": 2})],
    4: [(8, {"parallel": "ddp"}), (10, FSDP | {"micro_batch_size": 1})],
    "1 again": [(12, FSDP | {"micro_batch_size": 4})],
}
STEADY = DEEP | {"lr_decay": "constant", "eval_interval": 2}
SPREAD_OVER = [*((2, name) for name in SPREAD), (4, "fsdp")]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "data"
    parts = [("train", TEXT[:500]), ("val", TEXT[:500])]  # read once in four steps
    writer.prepare(folder, parts, Char("".join(sorted(set(TEXT)))))
    return folder


# ---- What the processes do -----------------------------------------------------------------------


def begin(config, world, rank, folder):
    """Build the network; leave its first weights, whole, and how many this process holds."""
    config |= {"vocab_size": 25, "attention": "full"}
    model, ema, _ = train.build(config, Team(world, rank))
    mine = sum(parallel.local(p).numel() for p in model.parameters())
    weights = [parallel.whole(dict(each.state_dict()), keep=True) for each in (model, ema)]
    (folder / f"begin_{rank}_of_{world}").write_bytes(pickle.dumps((mine, weights)))


def stumble(config, world, rank, folder):
    """Train while the last process meets a weight that is not finite, at steps 3 and 4."""
    make_batch = train.make_batch

    def bad_batch(config, blocks, step, position):
        batch = make_batch(config, blocks, step, position)
        factor = math.inf if rank == world - 1 and step in (2, 3) else 1
        return batch._replace(weight=batch.weight * factor)

    train.make_batch = bad_batch
    try:
        train.main(config)
    finally:
        train.make_batch = make_batch


def disagree(config, world, rank, folder):
    """Resume from a folder of this process's own, of which only one holds a checkpoint."""
    with pytest.raises(UserError, match="do not see the same"):
        train.main(config | {"out_dir": str(folder / f"own_{rank}")})


def hurry(config, world, rank, folder):
    """Train by the clock, which is three times as fast in the last process; leave its rates."""
    seconds, rates, step_of, now = [0.0], [], train.train_step, budget.now

    def timed_step(config, step, batches, loss_of, optimizers, *rest):
        done = step_of(config, step, batches, loss_of, optimizers, *rest)
        seconds[0] += 15.0 if rank == world - 1 else 5.0
        rates.append(optimizers[0].param_groups[0]["lr"])
        return done

    train.train_step, budget.now = timed_step, lambda: seconds[0]
    try:
        train.main(config)
    finally:
        train.train_step, budget.now = step_of, now
    (folder / f"rates_{rank}").write_text(repr(rates))


def simply(config, world, rank, folder):
    train.main(config)


JOBS = {"begin": begin, "stumble": stumble, "disagree": disagree, "hurry": hurry, "simply": simply}


def work(rank, world, port, folder, jobs):
    """One of `world` processes: does the jobs one after the other, (name, command line) each."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_log.matmul_flops = lambda *_: 1e9
    torch.set_num_threads(1)
    with (
        open(folder / f"out_{rank}_of_{world}", "w") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        for name, line in jobs:
            JOBS[name](settings.parse(line, *MODULES), world, rank, folder)


def launch(world, folder, jobs):
    """`world` real processes, forked from one that has torch already, which takes longest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch.distributed.fsdp"])
    shared = world, port, folder, jobs
    several = [context.Process(target=work, args=(rank, *shared)) for rank in range(world)]
    for one in several:
        one.start()
    for one in several:
        one.join(600)
        one.kill()
    said = [(folder / f"out_{rank}_of_{world}").read_text()[-2000:] for rank in range(world)]
    assert [one.exitcode for one in several] == [0] * world, "\n".join(said)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """The folder where one, two and four processes have done all that this file asks about."""
    folder = tmp_path_factory.mktemp("runs")
    for world, turns in CHAIN.items():
        steps = [STEADY | keys | {"max_iters": end} for end, keys in turns]
        jobs = [("simply", words(data, folder / "chain", **keys)) for keys in steps]
        if world in (2, 4):
            jobs += [("begin", words(data, "none", **DEEP, **FSDP))]
            mine = {name: SPREAD[name] for count, name in SPREAD_OVER if count == world}
            for name, keys in mine.items():
                jobs += [("simply", words(data, folder / f"{name} {world}", **DEEP | keys))]
        if world == 2:
            odd = DEEP | {"skip_nonfinite": True, "grad_clip": 0.0}
            for name in ("ddp", "fsdp"):
                jobs += [("stumble", words(data, folder / f"odd {name}", **odd, parallel=name))]
            jobs += [("disagree", words(data, "none"))]
            timed = {"max_iters": 0, "max_minutes": 1, "warmup_iters": 0, "log_interval": 2}
            timed |= {"lr_decay": "linear", "eval_interval": 0}
            jobs += [("hurry", words(data, folder / "hurried", **timed))]
            run(data, folder / "own_1", max_iters=4)
        if world in (2, 4):
            launch(world, folder, jobs)
        else:
            for _, line in jobs:
                train.main(settings.parse(line, *MODULES))
    return folder


# ---- The same run --------------------------------------------------------------------------------


def close(actual, expected, within):
    """Whether two checkpoints hold the same weights, up to the order of sums."""
    for part in ("model", "ema"):
        assert actual[part].keys() == expected[part].keys()
        pairs = [(actual[part][name], w) for name, w in expected[part].items()]
        assert all(torch.allclose(a, b, rtol=0, atol=within) for a, b in pairs)
    return True


@pytest.mark.parametrize(("world", "name"), SPREAD_OVER)
def test_several_processes_train_as_one_does(world, name, finished, data, tmp_path):
    alone = ("parallel", "recompute", "micro_batch_size")
    keys = {key: value for key, value in SPREAD[name].items() if key not in alone}
    run(data, tmp_path, **DEEP | keys)
    out = finished / f"{name} {world}"
    # Muon multiplies in bfloat16.
    within = 1e-2 if "bf16" in name else 1e-4 if "muon" in name else 1e-5
    assert losses(out) == pytest.approx(losses(tmp_path), rel=within) and len(losses(out)) >= 3
    assert close(checkpoint.read(out), checkpoint.read(tmp_path), within)
    if (steps := len(losses(out))) > 3:
        best = checkpoint.read(out / "best.pt")
        assert best["step"] == steps and close(best, checkpoint.read(tmp_path), within)
    evaluations = [[e for e in log(where) if "nats_per_token" in e] for where in (out, tmp_path)]
    several, one = ([e["nats_per_token"] for e in each] for each in evaluations)
    assert several == pytest.approx(one, rel=within) and several


def test_a_run_may_change_the_number_of_processes_and_how_they_share_it(finished, data, tmp_path):
    run(data, tmp_path, **STEADY | {"max_iters": 12})
    assert losses(finished / "chain") == pytest.approx(losses(tmp_path), rel=1e-5)
    assert len(losses(tmp_path)) == 12
    chain, whole = (checkpoint.read(out) for out in (finished / "chain", tmp_path))
    assert close(chain, whole, 1e-5) and chain["step"] == whole["step"] == 12
    best = checkpoint.read(finished / "chain" / "best.pt")
    assert best["step"] == 12 and close(best, whole, 1e-5)


@pytest.mark.parametrize(("world", "name"), SPREAD_OVER)
def test_the_checkpoint_has_the_same_form_whoever_wrote_it(world, name, finished, data, tmp_path):
    run(data, tmp_path, **DEEP | SPREAD[name])
    assert form(state_of(finished / f"{name} {world}")) == form(state_of(tmp_path))


def form(tree):
    """What is nested in what, and the shape and type of each tensor."""
    if isinstance(tree, dict):
        return {key: form(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return list(map(form, tree))
    if isinstance(tree, torch.Tensor):
        return tuple(tree.shape), tree.dtype, tree.layout
    return type(tree)


# ---- The beginning -------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_a_network_starts_with_the_same_weights_however_it_is_shared(world, finished, data):
    config = config_of(data, "none", **DEEP) | {"vocab_size": 25, "attention": "full"}
    model, ema, _ = train.build(config, Team())
    for rank in range(world):
        _, (weights, averages) = pickle.loads((finished / f"begin_{rank}_of_{world}").read_bytes())
        assert same(weights, dict(model.state_dict()))
        assert same(averages, dict(ema.state_dict()))


@pytest.mark.parametrize("world", [2, 4])
def test_with_fsdp_each_process_holds_its_part_of_the_weights_and_no_more(world, finished, data):
    files = [finished / f"begin_{rank}_of_{world}" for rank in range(world)]
    held, ((weights, _), *_) = zip(*(pickle.loads(f.read_bytes()) for f in files), strict=True)
    numbers = sum(w.numel() for w in weights.values())
    assert sum(held) == numbers
    # Of some tensors one process has a row more, of 16 numbers and more.
    assert max(held) <= numbers / world + 16 * len(weights)


def test_recomputing_changes_nothing_but_memory_and_time(data, tmp_path):
    for recompute in (False, True):
        run(data, tmp_path / str(recompute), **DEEP, dropout=0.1, recompute=recompute)
    assert same(state_of(tmp_path / "True"), state_of(tmp_path / "False"))


# ---- What they decide together -------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_all_processes_skip_a_gradient_that_is_not_finite_on_one(engine, finished):
    out = finished / f"odd {engine}"
    entries = [entry for entry in log(out) if "loss" in entry]
    assert [entry["step"] for entry in entries if entry["loss"] is None] == [3, 4]
    assert [entry.get("skipped", 0) for entry in entries] == [0, 0, 1, 2, 2, 2]
    assert "step 4: the gradient is not finite" in (finished / "out_0_of_2").read_text()
    assert all(w.isfinite().all() for w in checkpoint.read(out)["model"].values())


def test_processes_whose_clocks_differ_have_one_learning_rate_and_one_end(finished):
    rates = [eval((finished / f"rates_{rank}").read_text()) for rank in range(2)]
    assert rates[0] == rates[1] == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    state = checkpoint.read(finished / "hurried")
    assert (state["step"], state["minutes"]) == (4, 1.0)
    evaluated = [e["step"] for e in log(finished / "hurried") if "nats_per_token" in e]
    assert evaluated == [2, 4], "every tenth that has passed when all look at the clock"


def test_what_is_dealt_out_is_everything_in_calls_of_equal_number():
    lengths = [16] * 7 + [5] + [9] * 4
    for world in (1, 2, 3, 4, 20):
        hands = [parallel.my_share(lengths, Team(world, rank)) for rank in range(world)]
        assert {i for hand in hands for i in hand} == set(range(len(lengths)))
        assert len({tuple(sorted(lengths[i] for i in hand)) for hand in hands}) == 1
    assert parallel.my_share(lengths, Team()) == [7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6]


def test_the_end_of_another_process_is_one_line_and_other_errors_stay_what_they_are(tmp_path):
    gloo = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2042"
    with pytest.raises(UserError, match="lost the other processes"):
        with parallel.together(tmp_path / "ckpt.pt", Team(2)):
            raise RuntimeError(gloo)
    for world, text in ((1, "gloo"), (2, "mat1 and mat2 shapes cannot be multiplied")):
        with pytest.raises(RuntimeError, match=text):
            with parallel.together(tmp_path / "ckpt.pt", Team(world)):
                raise RuntimeError(text)
