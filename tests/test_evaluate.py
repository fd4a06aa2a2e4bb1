"""The evaluation program: what it says, when it stops, and that a zero-shot table is resumed."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from plain import DEFAULTS

import config as settings
import evaluate
from data import loader, writer
from data.loader import spread
from data.tokenizer import Char
from evals import zeroshot
from evaluate import ESTIMATORS, estimate
from experiments import results, variance
from model import make_network
from run import checkpoint

MODULES = evaluate.MODULES
TEXT = "the cät sat on the mat; a dog ran to the log. " * 20
CHAR = Char("".join(sorted(set(TEXT))))
FLOAT32 = {"device": "cpu", "dtype": "float32"}


def save(folder, objective="any_order", larger=0.1):
    """A small checkpoint -> (its averaged weights, which are that much larger, the raw model)."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    attention = "causal" if objective == "ar" else "full"
    sizes |= {"vocab_size": CHAR.vocab_size, "attention": attention}
    model = make_network(DEFAULTS | sizes).eval()
    ema = {name: w + larger for name, w in model.state_dict().items()}
    config = model.config | {"objective": objective, "ema": 0.9}
    state = {"config": config, "tokenizer": CHAR.meta(), "model": model.state_dict(), "step": 1}
    checkpoint.save(folder / "ckpt.pt", state | {"ema": ema, "optimizer": []})
    return ema, model


def run(**keys):
    """evaluate.main with its defaults, in float32 on the CPU."""
    return evaluate.main(settings.options(FLOAT32 | keys, *MODULES))


def table(sets, **keys):
    """The zero-shot table of the checkpoint `run`, likewise."""
    given = FLOAT32 | {"ckpt": "run", "out": "zeroshot.jsonl", "sets": sets} | keys
    return zeroshot.main(settings.options(given, *MODULES, zeroshot))


@pytest.fixture
def program(tmp_path):
    """program(...) -> evaluate.main's result for a small saved model, and that model."""

    def evaluated(objective="any_order", splits=(("train", TEXT), ("val", TEXT[:205])), **keys):
        writer.prepare(tmp_path / "data", list(splits), CHAR)
        ema, model = save(tmp_path, objective)
        if keys.get("ema", True):
            model.load_state_dict(ema)
        return run(ckpt=str(tmp_path), data=str(tmp_path / "data"), **keys), model

    return evaluated


def val_blocks(tmp_path, length=16):
    return loader.in_order(loader.Tokens(tmp_path / "data", "val"), length)


# ---- One text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_program_evaluates_every_token_with_the_weights_that_were_asked_for(
    estimator, ema, program, tmp_path
):
    objective = "t_dse" if estimator == "t_dse" else "any_order"
    options = {"estimator": estimator, "draws": 4, "strata": 2, "seed": 9}
    result, model = program(objective, ema=ema, **options)
    nats, info = estimate(model, val_blocks(tmp_path), **options)
    assert result["tokens"] == 205 and result["sequences"] == 13  # 12 blocks of 16, and the rest
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 205, rel=1e-6)
    assert result["draw_error"] == pytest.approx(info["draw_error"], rel=1e-4)
    rows = 205 if "left" in estimator else 4 * 205 if estimator in ("chain", "orders") else 4 * 13
    assert result["rows"] == rows and 0 < result["calls"] <= rows


def test_the_program_evaluates_a_causal_network_exactly(program, tmp_path, capsys):
    result, model = program("ar", draws=7)
    nats, _ = estimate(model, val_blocks(tmp_path))
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 205, rel=1e-6)
    out = capsys.readouterr().out
    assert result["estimator"] == "ar" and "blocks of 16; exact; " in out
    assert result["draws"] == 0 and "7 draws" not in out
    assert (
        "no draws: for this text the number has no error; 13 rows of the network in 2 calls" in out
    )


def test_the_program_says_what_it_did(program, capsys):
    result, _ = program(draws=6, strata=3, seed=4, dtype="bfloat16", sequences=5)
    out = capsys.readouterr().out
    assert "data val: 80 of 205 tokens, 1 document, 5 blocks of 16; " in out
    drawn = "upper bound by any_order, 6 draws a sequence in sets of 3"
    assert f"{drawn}; bfloat16, averaged weights, seed 4" in out
    half = result["interval"][1] - result["nats_per_token"]
    assert f"{result['nats_per_token']:.4f} +- {half:.4f} nats per token (95% interval)" in out
    error, half = result["draw_error"], result["draw_half"]
    interval = f"standard error {error:.4f}, +- {half:.4f} nats per token (95%)"
    assert f"the draws alone, on this text: {interval}; 30 rows" in out
    assert f"bigram {result['ngram_nats']['bigram']:.4f}" in out


def test_one_set_of_draws_says_that_it_does_not_know_its_error(program, capsys):
    result, _ = program(draws=2)
    assert result["draw_error"] == math.inf
    shown = "too few draws (2 a sequence) to show their error: give --draws=8 or more"
    assert shown in capsys.readouterr().out
    program(draws=8, sequences=1)  # two sets of one sequence are two numbers
    out = capsys.readouterr().out
    shown = "too few draws (8 a sequence) to show their error: give --draws=12 or more"
    assert shown in out and "(too few sequences for an interval: 1)" in out and "+-" not in out
    program(draws=12, sequences=1)
    assert "the draws alone, on this text: standard error" in capsys.readouterr().out


def test_the_program_draws_until_the_estimate_is_as_precise_as_asked_for(program, capsys):
    result, _ = program(precision=0.02, draws=4096)
    assert result["draw_half"] < 0.02 and 8 <= result["draws"] < 4096
    stopped = f"within +- 0.02 after {result['draws']} draws a sequence, 4096 being allowed"
    assert stopped in capsys.readouterr().out


def test_where_the_draws_do_not_suffice_the_program_says_how_many_would(program, capsys):
    few, _ = program(precision=0.01, draws=32)
    out = capsys.readouterr().out
    need = int(out.split("(--draws=")[1].split(")")[0])
    assert few["draws"] == 32 and few["draw_half"] > 0.01 and need % 4 == 0
    assert f"not within +- 0.01; it takes about {need} draws a sequence" in out
    enough, _ = program(precision=0.01, draws=2 * need)
    assert need / 2 < enough["draws"] < 2 * need


def test_bits_per_byte_count_bytes_and_not_characters(program):
    result, _ = program(draws=2)
    n_bytes = len(TEXT[:205].encode())
    assert n_bytes > 205
    bits = result["nats_per_token"] * 205 / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / n_bytes)


def test_a_shorter_block_and_a_part_of_the_text_may_be_evaluated(program, tmp_path):
    result, model = program(block_size=10, sequences=4, draws=2, seed=3)
    nats, _ = estimate(model, spread(val_blocks(tmp_path, 10), 4), draws=2, seed=3)
    assert result["tokens"] == 40 and result["block_size"] == 10
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 40, rel=1e-6)


def test_the_shorter_last_block_counts_unless_the_protocol_of_radd_leaves_it_out(program, capsys):
    assert program(draws=2)[0]["tokens"] == 205 and "left out" not in capsys.readouterr().out
    assert program(draws=2, protocol="radd")[0]["tokens"] == 192
    assert "12 blocks of 16, the rest left out; " in capsys.readouterr().out


def test_only_the_blocks_that_are_evaluated_are_read(program, monkeypatch):
    read, windows = [], loader.Tokens.windows
    spy = lambda self, *span: read.append(span) or windows(self, *span)  # noqa: E731
    monkeypatch.setattr(loader.Tokens, "windows", spy)
    program(splits=[("val", TEXT)], draws=2, sequences=3)
    assert [length for _, length in read] == [16] * 3


def test_text_without_a_training_part_is_evaluated_as_well(program):
    result, _ = program(splits=[("val", TEXT[:205])], draws=2)
    assert result["tokens"] == 205


# ---- The zero-shot table -------------------------------------------------------------------------

NAMES = ["lambada", "ptb", "lm1b"]
ALL = ",".join(NAMES)


def prepare(folder, name, n):
    """A prepared set, with what data.zeroshot.prepare adds to it."""
    folder = folder / "data/zeroshot" / name
    meta = writer.prepare(folder, [("test", TEXT[:n])], CHAR) | {"protocol": f"rows of {name}"}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a checkpoint `run` and three small sets, to be in."""
    save(tmp_path / "run")
    for i, name in enumerate(NAMES):
        prepare(tmp_path, name, 203 + 30 * i)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(capsys):
    """Which sets were evaluated, and which were found in the file, since the last call."""
    out = capsys.readouterr().out
    fresh = [name for name in NAMES if f"data/zeroshot/{name} test: " in out]
    return fresh, [name for name in NAMES if f"data/zeroshot/{name}: already in" in out]


def test_the_table_holds_what_each_set_gets_by_itself(world, capsys):
    rows = table(ALL, draws=16)
    out = capsys.readouterr().out
    assert [row["set"] for row in rows] == NAMES and "text: rows of ptb" in out
    for row in rows:
        alone = run(ckpt="run", data=f"data/zeroshot/{row['set']}", split="test", draws=16)
        for key in ("nats_per_token", "perplexity", "draw_error", "tokens"):
            assert row[key] == alone[key]
        ppl, half = row["perplexity"], row["draw_half"]
        assert ppl == pytest.approx(math.exp(row["nats_per_token"]))
        line = next(line for line in out.splitlines() if line.startswith(f"{row['set']} "))
        shown = [float(word) for word in line.split()[1:6]]
        text = ppl * math.expm1(row["interval"][1] - row["nats_per_token"])
        expected = [row["tokens"], row["nats_per_token"], ppl, ppl * math.expm1(half), text]
        assert shown == pytest.approx(expected, abs=0.006)


OTHER = [
    {"seed": 5},
    {"draws": 3},
    {"estimator": "t_dce"},
    {"protocol": "radd"},
    {"dtype": "bfloat16"},
    {"ema": False},
]


def test_sets_that_are_done_are_kept_unless_something_else_is_asked_for(world, capsys):
    first = table("lambada,ptb", draws=2)
    assert evaluated(capsys) == (["lambada", "ptb"], [])
    assert table(ALL, draws=2)[:2] == first
    assert evaluated(capsys) == (["lm1b"], ["lambada", "ptb"])
    for other in OTHER:
        table("ptb", **{"draws": 2} | other)
        assert evaluated(capsys) == (["ptb"], [])
    prepare(world, "ptb", 260)  # another text
    save(world / "causal", "ar")  # another model
    cases = [("run", "ptb", False), ("causal", "lm1b", False), ("run", "lm1b", True)]
    for ckpt, name, known in cases:
        table(name, ckpt=ckpt, draws=2)
        assert evaluated(capsys) == (([], [name]) if known else ([name], []))


def test_a_checkpoint_that_changed_under_its_name_is_evaluated_again(world, capsys):
    table("ptb", draws=2)
    save(world / "run", larger=0.1001)
    evaluated(capsys)
    table("ptb", draws=2)
    assert evaluated(capsys) == (["ptb"], [])


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


SLOW = """
import time
import evaluate
from evals import zeroshot
from lib import program

plain = evaluate.evaluate
evaluate.evaluate = lambda *args: time.sleep(1) or plain(*args)
program.run(zeroshot.main, *evaluate.MODULES, zeroshot)
"""


def test_a_table_that_is_killed_is_resumed_where_it_was(world, capsys):
    """A real process, killed while it evaluates the second set."""
    words = ["--ckpt=run", f"--sets={ALL}", "--draws=2", "--out=table.jsonl"]
    words += ["--device=cpu", "--dtype=float32"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SLOW, *words]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while not lines(world / "table.jsonl") and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert len(lines(world / "table.jsonl")) == 1
    rows = table(ALL, draws=2, out="table.jsonl")
    assert evaluated(capsys) == (["ptb", "lm1b"], ["lambada"])
    assert len(lines(world / "table.jsonl")) == 3
    whole = table(ALL, draws=2, out="other.jsonl")
    for row, other in zip(rows, whole, strict=True):
        assert row["nats_per_token"] == pytest.approx(other["nats_per_token"], rel=1e-6)


def test_after_ctrl_c_only_the_set_at_hand_is_lost(world, capsys, monkeypatch):
    plain, calls = evaluate.evaluate, iter(range(9))

    def stopped(*args):
        settings.require(next(calls) < 2, "Ctrl-C")
        return plain(*args)

    monkeypatch.setattr(evaluate, "evaluate", stopped)
    with pytest.raises(settings.UserError, match="Ctrl-C"):
        table(ALL, draws=2)
    monkeypatch.undo()
    monkeypatch.chdir(world)
    evaluated(capsys)
    table(ALL, draws=2)
    assert evaluated(capsys) == (["lm1b"], ["lambada", "ptb"])


# ---- What draws take -----------------------------------------------------------------------------


def test_the_experiment_on_variance_measures_what_estimate_finds(program, tmp_path):
    _, model = program(splits=[("val", TEXT)], draws=1)
    keys = FLOAT32 | {"ckpt": str(tmp_path), "data": str(tmp_path / "data"), "sequences": 24}
    keys |= {"draws": 32, "results": str(tmp_path / "results")}
    figures = variance.main(settings.options(keys, settings, results, variance))
    assert json.loads((tmp_path / "results/variance.json").read_text()) == figures
    text = (tmp_path / "results/variance.md").read_text()
    assert "| any_order, stratified in pairs (4) | " in text
    tokens = loader.Tokens(tmp_path / "data", "val")
    blocks = spread(loader.in_order(tokens, 16)[:-1], 24)
    for name, strata in (("i_i_d", 1), ("stratified_in_pairs_4", 4)):
        error = estimate(model, blocks, draws=128, strata=strata)[1]["draw_error"]
        rows = 24 * 128 * (1.96 * error / 0.01) ** 2
        assert figures[f"rows_for_0.01_any_order_{name}"] == pytest.approx(rows, rel=0.3)


# ---- Bad input -----------------------------------------------------------------------------------

BAD = {  # what is wrong: arguments, and what is said
    "no whole block": (
        "--data=short --split=test --protocol=radd",
        "short test has 5 tokens, no whole block of 16",
    ),
    "an unknown protocol": ("--protocol=rad", "unknown protocol 'rad'; did you mean 'radd'?"),
    "an unknown estimator": (
        "--estimator=chains",
        "unknown estimator 'chains'; did you mean 'chain'?",
    ),
    "an estimator of causal networks": ("--estimator=ar", "unknown estimator 'ar'"),
    "scores without a scale": (
        "--estimator=t_dse",
        "run was not trained with t_dse, so its scores have no scale; use",
    ),
    "half a set of orders": (
        "--estimator=orders --draws=5",
        "draws 5 must be a multiple of strata 4",
    ),
    "no draws": ("--draws=0", "draws must be in [1, 1e6], not 0"),
    "no strata": ("--strata=0", "strata must be in [1, 1e6], not 0"),
    "a negative precision": ("--precision=-0.1", "precision must be 0 or more, not -0.1"),
    "long blocks": (
        "--data=short --split=test --block_size=17",
        "block_size must be at most the model's 16, not 17",
    ),
}
BAD_TABLE = {
    "an unprepared set": (
        "--sets=ptb,wikitext2",
        "no prepared data in data/zeroshot/wikitext2; prepare it with: python",
    ),
    "all sets, not all prepared": (
        "--sets=all",
        "prepare.py --set=wikitext2",
    ),
    "an unknown set": ("--sets=ptp", "unknown set 'ptp'; did you mean 'ptb'?"),
    "a file of another kind": (
        "--sets=ptb --out=notes.txt",
        "notes.txt line 2 is no result of a zero-shot table",
    ),
    "a place that cannot be written": (
        "--sets=ptb --out=notes.txt/x.jsonl",
        "cannot read notes.txt/x.jsonl: Not a dir",
    ),
    "another vocabulary": (
        "--sets=lm1b",
        "data/zeroshot/lm1b has another tokenizer than run; take 'αβγ' out of the text",
    ),
    "a text": ("--sets=ptb --data=short", "--data is for evaluate.py: zero-shot sets have their"),
    "a split": ("--sets=ptb --split=val", "--split is for evaluate.py"),
    "half a set of orders": (
        "--sets=ptb --estimator=orders --draws=5",
        "draws 5 must be a multiple of strata 4",
    ),
}


@pytest.mark.parametrize(
    ("program", "case"),
    [*((evaluate, case) for case in BAD), *((zeroshot, case) for case in BAD_TABLE)],
)
def test_bad_input_is_told_in_one_line_before_anything_is_evaluated(program, case, world, capsys):
    writer.prepare(world / "data/zeroshot/lm1b", [("test", "αβγ" * 9)], Char("αβγ"))
    writer.prepare(world / "short", [("test", "the c")], CHAR)
    (world / "notes.txt").write_text('{"identity": {}, "result": {}}\nthe cat\n')
    words, message = BAD[case] if program is evaluate else BAD_TABLE[case]
    modules = MODULES if program is evaluate else (*MODULES, zeroshot)
    capsys.readouterr()
    with pytest.raises(settings.UserError) as error:
        program.main(settings.parse(["--ckpt=run", "--device=cpu", *words.split()], *modules))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


def test_the_table_shows_an_interval_that_no_number_holds():
    row = {"set": "ptb", "tokens": 9, "nats_per_token": 2.0, "perplexity": math.exp(2)}
    row |= {"estimator": "any_order", "draws": 8, "draw_error": 1.0, "draw_half": 1e4}
    shown = zeroshot.table([row | {"interval": [1.0, 3.0]}])
    assert "   inf" in shown and f"{math.exp(3) - math.exp(2):.1f}" in shown
