"""Time is a budget: the clock, the dial that picks the network, and what the presets say."""

import json

import pytest
import torch
from conftest import ROOT
from test_train import MODULES, TEXT, TINY, data, log, run, same, state_of, stop_at, stopped

import config as settings
import diffusion
import model as network
import train
from config import UserError
from data import examples
from lib.device import flops_of_step
from lib.optim import learning_rate
from lib.parallel import Team
from run import budget, checkpoint, resume

__all__ = ["data"]  # a fixture of test_train
pytestmark = pytest.mark.usefixtures("one_thread")


class Hours:
    """A clock that stands still but where the test moves it on. In seconds."""

    def __init__(self, monkeypatch, step=6.0, evaluation=0.0):
        self.seconds = 1000.0  # where it begins has no meaning
        monkeypatch.setattr(budget, "now", lambda: self.seconds)
        for name, seconds in {"train_step": step, "evaluate_held_out": evaluation}.items():
            monkeypatch.setattr(train, name, self.taking(seconds, getattr(train, name)))

    def taking(self, seconds, function):
        def slow(*arguments):
            self.seconds += seconds
            return function(*arguments)

        return slow


TIMED = {"max_iters": 0, "max_minutes": 1.0, "warmup_iters": 0, "lr_decay": "linear"}
TIMED |= {"log_interval": 1, "eval_interval": 100}


def entries(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def rates(out):
    return [entry["learning_rate"] for entry in log(out) if "loss" in entry]


# ---- The clock -----------------------------------------------------------------------------------


def test_a_run_ends_when_its_minutes_are_over_and_its_learning_rate_with_it(
    data, tmp_path, monkeypatch
):
    Hours(monkeypatch, step=6.0)
    run(data, tmp_path, **TIMED, min_lr=1e-4)
    assert checkpoint.read(tmp_path)["step"] == 10 and checkpoint.read(tmp_path)["minutes"] == 1.0
    assert rates(tmp_path) == pytest.approx([1e-3 - 9e-4 * i / 10 for i in range(10)])


def test_evaluations_count_as_time(data, tmp_path, monkeypatch):
    Hours(monkeypatch, step=6.0, evaluation=18.0)
    run(data, tmp_path, **TIMED | {"eval_interval": 4})
    assert [e["step"] for e in log(tmp_path) if "nats_per_token" in e] == [4, 7]
    spent = [0, 6, 12, 18, 42, 48, 54]  # seconds, at the beginning of a step
    assert rates(tmp_path) == pytest.approx([1e-3 * (1 - seconds / 60) for seconds in spent])


def test_what_is_compiled_before_the_first_step_counts_as_time(data, tmp_path, monkeypatch):
    hours = Hours(monkeypatch, step=6.0)
    monkeypatch.setattr("lib.parallel.can_compile", hours.taking(30.0, lambda device: False))
    run(data, tmp_path, **TIMED | {"compile": True})
    assert len(rates(tmp_path)) == 5 and rates(tmp_path)[0] == pytest.approx(1e-3 / 2)


@pytest.mark.parametrize(
    ("minutes", "words", "compiled"),
    [(1.9, [], False), (1.9, ["--compile"], True), (2.0, [], True), (0.0, [], True)],
)
def test_a_run_too_short_for_it_is_compiled_only_if_that_is_asked_for(
    minutes, words, compiled, data, tmp_path
):
    words = [*words, f"--max_minutes={minutes}", "--depth=2", f"--data={data}", "--block_size=16"]
    config = settings.parse([*words, f"--out_dir={tmp_path}"], *MODULES) | {"example_width": 0}
    assert budget.with_dial(config, None, Team())["compile"] == compiled
    config.pop("user_keys")  # in Python the key is what it was given
    assert budget.with_dial(config, None, Team())["compile"]


@pytest.mark.parametrize(("iters", "minutes", "end"), [(8, 1.0, 8), (40, 1.0, 10), (8, 0.0, 8)])
def test_whichever_is_over_first_ends_the_run_and_leads_the_decay(
    iters, minutes, end, data, tmp_path, monkeypatch
):
    Hours(monkeypatch, step=6.0)
    run(data, tmp_path, **TIMED | {"max_iters": iters, "max_minutes": minutes})
    assert rates(tmp_path) == pytest.approx([1e-3 * (1 - i / end) for i in range(end)])


def test_the_schedule_follows_the_larger_part_of_steps_and_minutes():
    shape = {"learning_rate": 1.0, "min_lr": 0.0, "warmup_iters": 10, "max_iters": 100}
    shape |= {"decay_start": 0.5, "lr_decay": "linear"}
    for step in range(100):
        for part in (0.0, 0.2, 0.5, 0.6, 0.9, 1.0, 1.3):
            done = min(1.0, max(step / 100, part))
            wanted = (step + 1) / 11 if step < 10 else min(1.0, 2 - 2 * done)
            assert learning_rate(step, shape, part) == pytest.approx(wanted, abs=1e-12)
    endless = shape | {"max_iters": 0}
    assert [learning_rate(10**6, endless, part) for part in (0.0, 0.75, 1.0)] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("keys", [{}, {"eval_interval": 4}, {"optimizer": "muon", "ema": 0.9}])
def test_a_resumed_run_goes_on_with_the_minutes_that_are_left(keys, data, tmp_path, monkeypatch):
    keys, whole, parts = TIMED | keys, tmp_path / "whole", tmp_path / "parts"
    hours = Hours(monkeypatch, step=6.0, evaluation=3.0)
    result = run(data, whole, **keys)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        stopped(data, parts, **keys)
    assert 0.5 <= checkpoint.read(parts)["minutes"] < 0.6
    hours.seconds = -500.0  # another process, later
    assert run(data, parts, **keys) == result
    assert same(state_of(parts), state_of(whole)) and log(parts) == log(whole)


def test_a_run_whose_time_is_over_stays_as_it_is_and_goes_on_with_more(
    data, tmp_path, monkeypatch, capsys
):
    Hours(monkeypatch, step=6.0)
    run(data, tmp_path, **TIMED)
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert run(data, tmp_path, **TIMED) is None
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert "at step 10, 1.0 of 1 min" in capsys.readouterr().out
    run(data, tmp_path, **TIMED | {"max_minutes": 1.5})
    assert checkpoint.read(tmp_path)["step"] == 15


def test_ten_evaluations_are_spread_over_the_steps_or_the_minutes_of_a_run(
    data, tmp_path, monkeypatch
):
    Hours(monkeypatch, step=2.0)
    steps = TIMED | {"max_iters": 40, "max_minutes": 0.0, "eval_interval": 0}
    for name, keys in (("steps", steps), ("time", TIMED | {"eval_interval": 0})):
        run(data, tmp_path / name, **keys)
        evaluated = [e["step"] for e in log(tmp_path / name) if "nats_per_token" in e]
        end = 40 if name == "steps" else 30
        assert evaluated == [end * i // 10 for i in range(1, 11)]


def test_evaluations_that_would_take_more_than_a_tenth_of_the_time_are_left_out(
    data, tmp_path, monkeypatch
):
    Hours(monkeypatch, step=1.0, evaluation=5.0)
    run(data, tmp_path, **TIMED | {"eval_interval": 0})
    seconds = [round(60 * e["minutes"]) for e in entries(tmp_path) if "loss" in e]
    evaluated = [e["step"] for e in log(tmp_path) if "nats_per_token" in e]
    assert [seconds[step - 1] for step in evaluated] == [6, 54, 60], "5 s, then 10 s of 54 or more"


@pytest.mark.parametrize("minutes", [-1.0, "1", float("nan"), float("inf"), True])
def test_no_run_is_resumed_from_minutes_of_another_kind(minutes, data, tmp_path):
    run(data, tmp_path, max_iters=2)
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.read(tmp_path) | {"minutes": minutes})
    with pytest.raises(UserError, match="no run can be resumed from its minutes"):
        checkpoint.read(tmp_path)


def test_without_limits_in_minutes_or_steps_a_run_has_ten_minutes(data, tmp_path, monkeypatch):
    Hours(monkeypatch, step=120.0)
    run(data, tmp_path, **TIMED | {"max_minutes": 0.0})
    assert checkpoint.read(tmp_path)["step"] == 5


def test_after_ten_steps_a_line_says_how_long_the_run_will_be(data, tmp_path, monkeypatch, capsys):
    ticks = iter(range(10**6))
    monkeypatch.setattr("run.log.time", type("Time", (), {"perf_counter": lambda: next(ticks)}))
    run(data, tmp_path, max_iters=40, log_interval=100, eval_interval=100)
    said = [line for line in capsys.readouterr().out.splitlines() if "to the end" in line]
    (line,) = said
    assert "parameters, 128 tokens a step; about 30 steps and " in line and "0.0M tokens" in line
    times = 40 * 128 / ((len(TEXT) - 15) // 16 * 16)
    assert line.endswith(f"in all, {times:,.1f} times the text")
    run(data, tmp_path / "short", max_iters=9)
    assert "to the end" not in capsys.readouterr().out


def test_what_is_left_is_counted_by_whichever_end_comes_first():
    config = {"max_iters": 100, "max_minutes": 2.0}
    clock = budget.Clock(config, {"step": 40, "minutes": 0.5}, Team())
    assert clock.left(1.0) == (60, 60.0) and clock.left(2.0) == (45.0, 90.0)
    assert clock.done() == 0.4 and clock.spent() == 0.25


# ---- The dial ------------------------------------------------------------------------------------


def config_of(data, out, *words):
    """The config of a run of the default recipe, as its data complete it."""
    places = [f"--data={data}", f"--out_dir={out}", "--device=cpu", "--dtype=float32"]
    config = settings.parse([*places, *words], *MODULES)
    return resume.begin(config, Team())[0]


def test_more_operations_more_text_or_more_steps_never_make_the_network_smaller(data, tmp_path):
    config, text = config_of(data, tmp_path), examples.open_data(config_of(data, tmp_path))[1]
    text.tokens = range(10**12)  # so that it is the operations that decide
    budgets = [10 ** (9 + i / 2) for i in range(20)]
    depths = [budget.fitting_depth(config, text, operations) for operations in budgets]
    assert depths == [budget.fitting_depth(config, text, operations) for operations in budgets]
    assert depths == sorted(depths) and depths[0] == 2 and len(set(depths)) > 10
    steps, texts = [{"max_iters": 9**i} for i in range(7)], [{"tokens": 16**i} for i in range(9)]
    for keys in (steps, texts):
        picked = []
        for each in keys:
            text.tokens = range(each.pop("tokens", 10**12))
            picked.append(budget.fitting_depth(config | each, text, 1e18))
        assert picked == sorted(picked) and len(set(picked)) >= 3


def test_the_network_gets_twenty_tokens_a_parameter_and_a_larger_one_would_not(data, tmp_path):
    config, text = config_of(data, tmp_path), examples.open_data(config_of(data, tmp_path))[1]
    text.tokens = range(10**12)
    for operations in (1e12, 1e13, 1e15, 1e17):
        depth = budget.fitting_depth(config, text, operations)
        ratios = []
        for each in (depth, depth + 1):
            mine = budget.filled(config | {"depth": each})
            with torch.device("meta"):
                model = network.make_network(mine)
            steps = operations / flops_of_step(mine, model, text)
            parameters = sum(p.numel() for p in model.blocks.parameters())
            ratios.append(steps * mine["batch_size"] * 128 / parameters)
        assert ratios[0] >= 20 > ratios[1]


def test_every_depth_is_a_network_that_can_be_built_and_each_is_larger_than_the_last():
    config = settings.parse([], *MODULES) | {"vocab_size": 100, "example_width": 0}
    sizes = []
    for depth in range(1, 65):
        mine = budget.filled(config | {"depth": depth})
        resume.with_place_in_data(mine, None, Team(8))
        D, H = mine["n_embd"], mine["n_head"]
        assert D // H <= 64 and D % (2 * H) == 0
        sizes.append(mine["n_layer"] * mine["n_embd"] ** 2)
    assert sizes == sorted(set(sizes))
    six = budget.filled(config | {"depth": 6})
    wanted = {"n_layer": 6, "n_head": 2, "n_embd": 96, "batch_size": 32, "learning_rate": 1e-2}
    assert wanted.items() <= six.items(), "the network of the screenings"


def unmeasured(*_, **__):
    raise AssertionError("the machine was measured")


@pytest.mark.parametrize("words", [["--n_layer=2", "--n_embd=24"], ["--depth=3"], ["--size=19M"]])
def test_a_shape_that_is_given_is_not_measured(words, data, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "matmul_flops", unmeasured)
    config = resume.with_size(config_of(data, tmp_path, *words))
    chosen = budget.with_dial(config, None, Team())
    given = {key: value for key, value in config.items() if value and key != "user_keys"}
    assert given.items() <= chosen.items()


def test_each_key_that_is_given_wins_over_the_dial(data, tmp_path):
    given = {"n_layer": 5, "n_embd": 40, "n_head": 4, "batch_size": 6, "learning_rate": 0.5}
    plain = budget.filled(config_of(data, tmp_path, "--depth=3"))
    for key, value in given.items():
        mine = budget.filled(config_of(data, tmp_path, "--depth=3", f"--{key}={value}"))
        assert mine[key] == value != plain[key]


FAST = ["--compile=False", "--max_iters=2", "--show_sample=False", "--eval_draws=1"]


def test_the_machine_picks_the_dial_and_its_line_repeats_it_on_another_one(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(budget, "READINGS", 1e9)  # the text is short
    monkeypatch.setattr(budget, "matmul_flops", lambda *_, **__: 5e10)
    words = ["--max_minutes=4", *FAST[:1], *FAST[2:], f"--data={data}", f"--out_dir={tmp_path}/a"]
    words += ["--device=cpu", "--dtype=float32"]
    Hours(monkeypatch, step=240.0)
    monkeypatch.setattr(budget.os, "getloadavg", lambda: (1e3, 1e3, 1e3))
    train.main(settings.parse(words, *MODULES))
    first = checkpoint.read(tmp_path / "a")["config"]
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("depth 3: n_layer 3, n_embd 48, n_head 1, batch_size 16, ")
    measured = "for 4 min at 50 GFLOP/s; other programs run beside it"
    advice = ": OMP_NUM_THREADS=1 may make it faster" if torch.get_num_threads() > 1 else ""
    assert line.endswith(f"({measured}{advice}; on another machine --depth=3 repeats it)")
    monkeypatch.setattr(budget, "matmul_flops", unmeasured)
    train.main(settings.parse([*words, "--depth=3", f"--out_dir={tmp_path}/b"], *MODULES))
    second = checkpoint.read(tmp_path / "b")["config"]
    assert all(first[key] == second[key] for key in first if key not in ("out_dir", "user_keys"))


def test_a_resumed_run_keeps_its_dial_on_any_machine(data, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "matmul_flops", lambda *_, **__: 5e10)
    run_of = lambda *words: train.main(  # noqa: E731
        settings.parse([*FAST, f"--data={data}", f"--out_dir={tmp_path}", *words], *MODULES)
    )
    run_of()
    first = checkpoint.read(tmp_path)["config"]
    monkeypatch.setattr(budget, "matmul_flops", unmeasured)
    run_of("--max_iters=4")
    state = checkpoint.read(tmp_path)
    dial = ("depth", "n_layer", "n_embd", "n_head", "batch_size", "learning_rate")
    assert state["step"] == 4 and all(state["config"][key] == first[key] for key in dial)
    run_of("--max_iters=5", f"--depth={first['depth']}")
    with pytest.raises(UserError, match=f"was trained with depth={first['depth']}, not 9"):
        run_of("--depth=9")


def test_a_text_that_is_soon_known_by_heart_gets_a_smaller_network(data, tmp_path):
    config, text = config_of(data, tmp_path), examples.open_data(config_of(data, tmp_path))[1]
    assert len(text.tokens) < 3000 and budget.fitting_depth(config, text, 1e18) == 2


# ---- Presets -------------------------------------------------------------------------------------

PRESETS = json.loads((ROOT / "tests/fixtures/presets.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_the_papers_recipes_are_what_they_were_whatever_the_defaults_are(name):
    file = "pydocs_2400" if name == "pydocs" else name  # what the demo was, and experiments are
    words = [str(ROOT / f"configs/{file}.py")]
    config = resume.with_size(settings.parse(words, *MODULES))
    assert PRESETS[name].items() <= (network.PUBLISHED | config).items()
    assert config["max_minutes"] == 0 and budget.filled(config) == config


def test_the_demo_is_the_default_recipe_for_four_minutes():
    config = settings.parse([str(ROOT / "configs/pydocs.py")], *MODULES)
    keys = {"data", "out_dir", "max_minutes"}
    assert config == settings.defaults_of(MODULES) | {
        key: config[key] for key in config.keys() & (keys | {"user_keys"})
    }
    assert config["max_minutes"] == 4 and config["user_keys"].keys() == set(keys)
    same_size = {"depth": 6, "example_width": 0}
    recipe = network.PUBLISHED | budget.filled(config | same_size)
    assert {k for k, v in PRESETS["pydocs"].items() if recipe[k] != v} == {
        "max_iters",
        "eval_interval",
        "warmup_iters",
    }
    assert diffusion.DEFAULTS.keys() <= config.keys() and TINY
