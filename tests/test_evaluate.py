"""The judging program: what it says, when it stops, and that a table of many texts is never begun anew."""

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

import checkpoint
import config as settings
import diffusion
import evaluate
import harness
from data import loader, writer
from data.tokenizer import Char
from experiments import results, variance
from likelihood import estimate, sequence_nats, spread
from model import DEFAULTS, Transformer

MODULES = (settings, diffusion, harness, evaluate)
ESTIMATORS = ["any_order", "lambda_dce", "t_dce", "t_dse", "chain", "orders", "left_to_right", "right_to_left"]
TEXT = "the cät sat on the mat; a dog ran to the log. " * 20
CHAR = Char("".join(sorted(set(TEXT))))


def save(folder, objective="any_order", larger=0.1):
    """A small checkpoint, whose averaged weights are that much larger -> (averaged weights, the model with the raw ones)."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": CHAR.vocab_size}
    sizes["causal"] = objective == "ar"
    model = Transformer(DEFAULTS | sizes).eval()
    ema = {name: w + larger for name, w in model.state_dict().items()}
    config = model.config | {"objective": objective, "ema": 0.9}
    state = {"config": config, "tokenizer": CHAR.meta(), "model": model.state_dict(), "ema": ema, "step": 1}
    checkpoint.save(folder / "ckpt.pt", state | {"optimizer": []})
    return ema, model


def run(**keys):
    """evaluate.main with its defaults, in float32 on the CPU."""
    given = {"device": "cpu", "dtype": "float32", "out": "zeroshot.jsonl"}
    return evaluate.main(settings.parse([], *MODULES) | given | keys)


@pytest.fixture
def program(tmp_path):
    """program(...) -> what evaluate.main returns for a small saved model, and that model with the weights judged."""

    def judge(objective="any_order", splits=(("train", TEXT), ("val", TEXT[:205])), **keys):
        writer.prepare(tmp_path / "data", list(splits), CHAR)
        ema, model = save(tmp_path, objective)
        if keys.get("ema", True):
            model.load_state_dict(ema)
        return run(ckpt=str(tmp_path), data=str(tmp_path / "data"), **keys), model

    return judge


def val_blocks(tmp_path, length=16):
    return list(loader.in_order(loader.Tokens(tmp_path / "data", "val"), length))


# ---- One text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_program_judges_every_token_with_the_weights_that_were_asked_for(estimator, ema, program, tmp_path):
    objective = "t_dse" if estimator == "t_dse" else "any_order"
    result, model = program(objective, estimator=estimator, draws=4, strata=2, seed=9, ema=ema)
    nats, info = estimate(model, val_blocks(tmp_path), estimator, 4, strata=2, seed=9)
    assert result["tokens"] == 205 and result["sequences"] == 13  # twelve blocks of 16, and what is left
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 205, rel=1e-6)
    assert result["draw_error"] == pytest.approx(info["draw_error"], rel=1e-4)
    rows = 205 if "right" in estimator or "left" in estimator else 4 * 205 if estimator in ("chain", "orders") else 4 * 13
    assert result["rows"] == rows and 0 < result["calls"] <= rows


def test_the_program_judges_a_causal_network_exactly(program, tmp_path, capsys):
    result, model = program("ar", draws=7)
    nats = sequence_nats(model, val_blocks(tmp_path), "ar")
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 205, rel=1e-6)
    out = capsys.readouterr().out
    assert result["estimator"] == "ar" and "blocks of 16; exact; " in out
    assert "no draws: for this text the number has no error; 13 rows of the network in 2 calls, " in out


def test_the_program_says_what_it_did(program, capsys):
    result, _ = program(draws=6, strata=3, seed=4, dtype="bfloat16", sequences=5)
    out = capsys.readouterr().out
    assert "data val: 80 of 205 tokens, 1 documents, 5 blocks of 16; " in out
    assert "upper bound by any_order, 6 draws a sequence in sets of 3; bfloat16, averaged weights, seed 4" in out
    half = result["interval"][1] - result["nats_per_token"]
    assert f"{result['nats_per_token']:.4f} +- {half:.4f} nats per token (95% interval)" in out
    error, half = result["draw_error"], result["draw_half"]
    assert f"the draws alone, on this text: standard error {error:.4f}, +- {half:.4f} nats per token (95%); 30 rows" in out
    assert f"bigram {result['ngram_nats']['bigram']:.4f}" in out


def test_one_set_of_draws_says_that_it_does_not_know_its_error(program, capsys):
    result, _ = program(draws=2)
    assert result["draw_error"] == math.inf
    assert "one set of 2 draws does not show their error: give --draws=8 or more" in capsys.readouterr().out


def test_the_program_draws_until_the_estimate_is_as_precise_as_asked_for(program, capsys):
    result, _ = program(precision=0.02, draws=4096)
    assert result["draw_half"] < 0.02 and 8 <= result["draws"] < 4096
    told = f"within +- 0.02 after {result['draws']} draws a sequence, 4096 being allowed"
    assert told in capsys.readouterr().out


def test_where_the_draws_do_not_suffice_the_program_says_how_many_would(program, capsys):
    few, _ = program(precision=0.01, draws=32)
    out = capsys.readouterr().out
    need = int(out.split("(--draws=")[1].split(")")[0])
    assert few["draws"] == 32 and few["draw_half"] > 0.01 and need % 4 == 0
    assert f"not within +- 0.01: about {need} draws a sequence would be" in out
    enough, _ = program(precision=0.01, draws=2 * need)
    assert need / 2 < enough["draws"] < 2 * need


def test_bits_per_byte_count_bytes_and_not_characters(program):
    result, _ = program(draws=2)
    n_bytes = len(TEXT[:205].encode())
    assert n_bytes > 205
    assert result["bits_per_byte"] == pytest.approx(result["nats_per_token"] * 205 / math.log(2) / n_bytes)


def test_a_shorter_block_and_a_part_of_the_text_may_be_judged(program, tmp_path):
    result, model = program(block_size=10, sequences=4, draws=2, seed=3)
    nats = sequence_nats(model, spread(val_blocks(tmp_path, 10), 4), draws=2, seed=3)
    assert result["tokens"] == 40 and result["block_size"] == 10
    assert result["nats_per_token"] == pytest.approx(nats.sum().item() / 40, rel=1e-6)


def test_the_shorter_last_block_counts_unless_the_protocol_of_radd_leaves_it_out(program, capsys):
    assert program(draws=2)[0]["tokens"] == 205 and "left out" not in capsys.readouterr().out
    assert program(draws=2, protocol="radd")[0]["tokens"] == 192
    assert "12 blocks of 16, the rest left out; " in capsys.readouterr().out


def test_only_the_blocks_that_are_judged_are_read(program, monkeypatch):
    read, windows = [], loader.Tokens.windows
    monkeypatch.setattr(loader.Tokens, "windows", lambda self, *span: read.append(span) or windows(self, *span))
    program(splits=[("val", TEXT)], draws=2, sequences=3)
    assert [length for _, length in read] == [16] * 3


def test_text_without_a_training_part_is_judged_as_well(program):
    result, _ = program(splits=[("val", TEXT[:205])], draws=2)
    assert result["tokens"] == 205


# ---- The zero-shot table -----------------------------------------------------------------------------------------------

NAMES = ["lambada", "ptb", "lm1b"]


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


def judged(capsys):
    """Which sets the program has judged, and which it found in its file, since the last call."""
    out = capsys.readouterr().out
    fresh = [name for name in NAMES if f"data/zeroshot/{name} test: " in out]
    return fresh, [name for name in NAMES if f"data/zeroshot/{name}: already in" in out]


def test_the_table_holds_what_each_set_gets_by_itself(world, capsys):
    rows = run(ckpt="run", zeroshot="lambada,ptb,lm1b", draws=16)
    out = capsys.readouterr().out
    assert [row["set"] for row in rows] == NAMES and "text: rows of ptb" in out
    for row in rows:
        alone = run(ckpt="run", data=f"data/zeroshot/{row['set']}", split="test", draws=16)
        assert all(row[key] == alone[key] for key in ("nats_per_token", "perplexity", "draw_error", "tokens"))
        ppl, half = row["perplexity"], row["draw_half"]
        assert ppl == pytest.approx(math.exp(row["nats_per_token"]))
        line = next(line for line in out.splitlines() if line.startswith(f"{row['set']} "))
        shown = [float(word) for word in line.split()[1:6]]
        text = ppl * math.expm1(row["interval"][1] - row["nats_per_token"])
        expected = [row["tokens"], row["nats_per_token"], ppl, ppl * math.expm1(half), text]
        assert shown == pytest.approx(expected, abs=0.006)


def test_sets_that_are_done_are_not_judged_again_unless_something_else_is_asked_for(world, capsys):
    first = run(ckpt="run", zeroshot="lambada,ptb", draws=2)
    assert judged(capsys) == (["lambada", "ptb"], [])
    assert run(ckpt="run", zeroshot="lambada,ptb,lm1b", draws=2)[:2] == first
    assert judged(capsys) == (["lm1b"], ["lambada", "ptb"])
    for other in ({"seed": 5}, {"draws": 3}, {"estimator": "t_dce"}, {"protocol": "radd"}, {"dtype": "bfloat16"}):
        run(ckpt="run", zeroshot="ptb", **{"draws": 2} | other)
        assert judged(capsys) == (["ptb"], [])
    prepare(world, "ptb", 260)  # another text
    save(world / "causal", "ar")  # another model
    for ckpt, name, known in (("run", "ptb", False), ("causal", "lm1b", False), ("run", "lm1b", True)):
        run(ckpt=ckpt, zeroshot=name, draws=2)
        assert judged(capsys) == (([], [name]) if known else ([name], []))


def test_a_checkpoint_that_changed_under_its_name_is_judged_again(world, capsys):
    run(ckpt="run", zeroshot="ptb", draws=2)
    save(world / "run", larger=0.1001)
    judged(capsys)
    run(ckpt="run", zeroshot="ptb", draws=2)
    assert judged(capsys) == (["ptb"], [])


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_a_table_that_is_killed_goes_on_where_it_was(world, capsys):
    """A real process, killed while it judges the second set."""
    slow = "import time, evaluate; judge = evaluate.judge; evaluate.judge = lambda *a: time.sleep(1) or judge(*a); "
    slow += "import config, diffusion, harness; config.run(evaluate.main, config, diffusion, harness, evaluate)"
    words = [
        "--ckpt=run",
        "--zeroshot=lambada,ptb,lm1b",
        "--draws=2",
        "--device=cpu",
        "--dtype=float32",
        "--out=table.jsonl",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", slow, *words], env=env, stderr=subprocess.PIPE, text=True)
    while not lines(world / "table.jsonl") and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert len(lines(world / "table.jsonl")) == 1
    rows = run(ckpt="run", zeroshot="lambada,ptb,lm1b", draws=2, out="table.jsonl")
    assert judged(capsys) == (["ptb", "lm1b"], ["lambada"]) and len(lines(world / "table.jsonl")) == 3
    whole = run(ckpt="run", zeroshot="lambada,ptb,lm1b", draws=2, out="other.jsonl")
    for row, other in zip(rows, whole, strict=True):
        assert row["nats_per_token"] == pytest.approx(other["nats_per_token"], rel=1e-6)


def test_after_ctrl_c_only_the_set_at_hand_is_lost(world, capsys, monkeypatch):
    judge, sets = evaluate.judge, iter(range(9))
    monkeypatch.setattr(evaluate, "judge", lambda *a: settings.require(next(sets) < 2, "Ctrl-C") or judge(*a))
    with pytest.raises(settings.UserError, match="Ctrl-C"):
        run(ckpt="run", zeroshot="lambada,ptb,lm1b", draws=2)
    monkeypatch.undo()
    monkeypatch.chdir(world)
    judged(capsys)
    run(ckpt="run", zeroshot="lambada,ptb,lm1b", draws=2)
    assert judged(capsys) == (["lm1b"], ["lambada", "ptb"])


# ---- What draws cost ---------------------------------------------------------------------------------------------------


def test_the_experiment_on_variance_measures_what_estimate_finds(program, tmp_path):
    _, model = program(splits=[("val", TEXT)], draws=1)
    keys = {"ckpt": str(tmp_path), "data": str(tmp_path / "data"), "device": "cpu", "dtype": "float32", "sequences": 24}
    config = settings.parse([], settings, results, variance) | keys | {"draws": 32, "results": str(tmp_path / "results")}
    figures = variance.main(config)
    assert json.loads((tmp_path / "results/variance.json").read_text()) == figures
    assert "| any_order, stratified in pairs (4) | " in (tmp_path / "results/variance.md").read_text()
    blocks = spread(list(loader.in_order(loader.Tokens(tmp_path / "data", "val"), 16))[:-1], 24)
    for name, strata in (("i_i_d", 1), ("stratified_in_pairs_4", 4)):
        error = estimate(model, blocks, draws=128, strata=strata)[1]["draw_error"]
        rows = 24 * 128 * (1.96 * error / 0.01) ** 2
        assert figures[f"rows_for_0.01_any_order_{name}"] == pytest.approx(rows, rel=0.3)


# ---- Bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "an unprepared set": (
        "--zeroshot=ptb,wikitext2",
        "no prepared data in data/zeroshot/wikitext2; prepare it with: python",
    ),
    "all sets, not all prepared": ("--zeroshot=all", "python -m data.zeroshot.prepare --set=wikitext2"),
    "an unknown set": ("--zeroshot=ptp", "unknown zeroshot 'ptp'; did you mean 'ptb'?"),
    "a file of another kind": ("--zeroshot=ptb --out=notes.txt", "notes.txt line 2 is no result of a zero-shot table"),
    "a place that cannot be written": ("--zeroshot=ptb --out=notes.txt/x.jsonl", "cannot read notes.txt/x.jsonl: Not a dir"),
    "another vocabulary": ("--zeroshot=lm1b", "data/zeroshot/lm1b has a vocabulary of 3, run one of"),
    "no whole block": ("--data=short --split=test --protocol=radd", "short test has 5 tokens, no whole block of 16"),
    "an unknown protocol": ("--protocol=rad", "unknown protocol 'rad'; did you mean 'radd'?"),
    "an unknown estimator": ("--estimator=chains", "unknown estimator 'chains'; did you mean 'chain'?"),
    "an estimator of causal networks": ("--estimator=ar", "unknown estimator 'ar'"),
    "scores without a scale": ("--estimator=t_dse", "run was not trained with t_dse, so its scores have no scale; use"),
    "half a set of orders": ("--estimator=orders --draws=5", "draws 5 must be a multiple of strata 4"),
    "no draws": ("--draws=0", "draws must be 1 or more, not 0"),
    "no strata": ("--strata=0", "strata must be 1 or more, not 0"),
    "a negative precision": ("--precision=-0.1", "precision must be 0 or more, not -0.1"),
    "long blocks": ("--data=short --split=test --block_size=17", "block_size must be at most the model's 16, not 17"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line_before_anything_is_judged(case, world, capsys):
    writer.prepare(world / "data/zeroshot/lm1b", [("test", "αβγ" * 9)], Char("αβγ"))
    writer.prepare(world / "short", [("test", "the c")], CHAR)
    (world / "notes.txt").write_text('{"identity": {}, "result": {}}\nthe cat\n')
    words, told = BAD[case]
    with pytest.raises(settings.UserError) as error:
        evaluate.main(settings.parse(["--ckpt=run", "--device=cpu", *words.split()], *MODULES))
    assert told in str(error.value) and "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_the_table_shows_an_interval_that_no_number_holds():
    row = {"set": "ptb", "tokens": 9, "nats_per_token": 2.0, "perplexity": math.exp(2), "estimator": "any_order", "draws": 8}
    shown = evaluate.table([row | {"draw_error": 1.0, "draw_half": 1e4, "interval": [1.0, 3.0]}])
    assert "   inf" in shown and f"{math.exp(3) - math.exp(2):.1f}" in shown
