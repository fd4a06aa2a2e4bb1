"""Generative quality: each measure is what its definition says, and depends on nothing else."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from plain import DEFAULTS

import config as settings
import lib.program
import sample
from config import UserError
from data import writer
from data.tokenizer import Char
from evals import quality
from lib.stats import mean_and_error
from model import make_network
from run import checkpoint

TEXT = "the cat sat on the mat; a dog ran to the log. " * 20
ALPHABET = "".join(sorted(set(TEXT)))


# ---- Variety, by hand ----------------------------------------------------------------------------


def test_the_entropy_of_a_sample_is_that_of_its_token_frequencies():
    assert quality.entropy([5, 5, 5, 5]) == 0
    assert quality.entropy([3, 1, 4, 2]) == pytest.approx(math.log(4))
    assert quality.entropy([1, 1, 2, 1]) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )


def test_distinct_n_is_different_n_grams_over_n_grams():
    tokens = [1, 2, 1, 2, 1]
    assert quality.distinct(tokens, 1) == 2 / 5
    assert quality.distinct(tokens, 2) == 2 / 4  # 12 21 12 21
    assert quality.distinct(tokens, 3) == 2 / 3  # 121 212 121
    assert quality.distinct(tokens, 5) == quality.distinct(tokens, 6) == 1  # one n-gram, and none


def test_repetition_is_the_part_of_the_4_grams_that_were_there_before():
    repeated = [1, 2, 3, 4, 1, 2, 3, 4]  # 1234 2341 3412 4123 1234
    assert quality.VARIETY["repetition"](repeated) == pytest.approx(1 / 5)
    assert quality.VARIETY["repetition"]([7] * 14) == pytest.approx(10 / 11)
    assert quality.VARIETY["repetition"](list(range(9))) == 0


def test_the_error_of_a_mean_is_the_usual_one_and_one_sample_has_none():
    error = np.std([3, 5, 4, 8], ddof=1) / 2
    assert mean_and_error([3.0, 5.0, 4.0, 8.0]) == pytest.approx((5.0, error))
    assert mean_and_error([3.0]) == (3.0, math.inf)


# ---- The judge's part ----------------------------------------------------------------------------


class Counting:
    """A judge to whom a token has its id in nats; it reads characters."""

    unjudged, block_size = 0, 4

    def __init__(self, alphabet="abcdefg"):
        text = Char(alphabet)
        self.encode, self.decode, self.vocab_size = text.encode, text.decode, text.vocab_size

    def nats(self, blocks):
        assert all(0 < len(block) <= self.block_size for block in blocks)
        return np.array([float(sum(block)) for block in blocks])


def records(*texts, alphabet="abcdefg"):
    text = Char(alphabet)
    return [{"text": t, "tokens": text.encode(t), "nfe": 1} for t in texts]


def test_generative_perplexity_is_that_of_all_tokens_and_the_mean_has_its_own_line():
    samples = records("aa", "bb", "cccc")  # 0, 2 and 8 nats for 2, 2 and 4 tokens
    measures, _ = quality.measure(samples, Counting())
    assert measures["nats per token"][0] == pytest.approx(10 / 8)
    assert measures["generative perplexity"][0] == pytest.approx(math.exp(10 / 8))
    own = (1 + math.e + math.e**2) / 3
    assert measures["mean of the samples' own perplexities"][0] == pytest.approx(own)


def test_the_error_of_the_perplexity_is_that_of_its_exponent_times_itself():
    measures, _ = quality.measure(records("aa", "bb", "cc", "dd"), Counting())
    error = np.std([0, 1, 2, 3], ddof=1) / 2
    assert measures["nats per token"][1] == pytest.approx(error)
    assert measures["generative perplexity"][1] == pytest.approx(math.exp(1.5) * error)


def test_a_judge_with_the_same_tokenizer_reads_the_tokens_and_another_one_the_text():
    own, read = quality.measure(records("abc", "bca"), Counting())
    assert own["nats per token"][0] == 1 and read == "tokens as they are"
    backwards, read = quality.measure(records("abc", "bca"), Counting("gfedcba"))
    assert backwards["nats per token"][0] == 5 and read == "the text, encoded anew"


def test_what_is_longer_than_the_judge_can_read_is_judged_in_blocks():
    ids = [[1] * 9, [2] * 4, [3]]
    nats, counted = quality.judge_nats(Counting(), ids)
    assert nats.tolist() == [9, 8, 3] and counted.tolist() == [9, 4, 1]
    judge = Counting()
    # As a Hugging Face judge: the first token of a block does not count, so a block of one neither.
    judge.unjudged = 1
    nats, counted = quality.judge_nats(judge, ids)
    assert counted.tolist() == [6, 3, 0] and nats.tolist() == [8, 8, 0]


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_judge_that_says_nan_or_infinity_is_noticed(odd, monkeypatch):
    judge = Counting()
    monkeypatch.setattr(judge, "nats", lambda blocks: np.array([1.0, odd]))
    with pytest.raises(UserError, match="1 of 2 log-likelihoods by the judge are nan or infinite"):
        quality.measure(records("abc", "bca"), judge)


def test_a_text_that_the_judge_cannot_read_is_named():
    with pytest.raises(
        UserError, match="the judge cannot read sample 2: character 'g' is not among"
    ):
        quality.measure(records("abc", "fgf"), Counting("abcdef"))


# ---- The program ---------------------------------------------------------------------------------


def save(folder, alphabet=ALPHABET, **keys):
    """A small checkpoint. With zero_init="head" it gives each of its V tokens the chance 1/V."""
    text, sizes = Char(alphabet), {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    torch.manual_seed(0)
    model = make_network(DEFAULTS | sizes | {"vocab_size": text.vocab_size} | keys)
    objective = "ar" if keys.get("attention") == "causal" else "any_order"
    state = {"config": model.config | {"objective": objective}, "tokenizer": text.meta(), "step": 1}
    checkpoint.save(
        folder / "ckpt.pt", state | {"model": model.state_dict(), "ema": None, "optimizer": []}
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = tmp_path_factory.mktemp("quality")
    save(world / "run")
    save(world / "fair", attention="causal", zero_init="head")
    save(world / "bound", zero_init="head")
    save(world / "other", alphabet="xyz", attention="causal")
    writer.prepare(world / "data", [("train", TEXT), ("val", TEXT[:200])], Char(ALPHABET))
    greek = [("train", "αβγ" * 99), ("val", "αβγ" * 9)]
    writer.prepare(world / "greek", greek, Char("αβγ"))
    cat = {"text": "the cat", "tokens": Char(ALPHABET).encode("the cat"), "nfe": 3}
    files = {"cats": [cat, cat], "empty": [], "no_nfe": [cat, {"text": "a", "tokens": [1]}]}
    files |= {"hollow": [cat | {"tokens": []}], "ids": [cat | {"tokens": [1, "a"]}]}
    for name, lines in files.items():
        (world / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (world / "prose.jsonl").write_text(json.dumps(cat) + "\nthe cat\n")
    return world


def run(world, monkeypatch, *words):
    """What the command does, in this process: quality.main's result or SystemExit."""
    monkeypatch.chdir(world)
    config = settings.parse(list(words), *sample.MODULES, quality)
    return quality.main(config | {"device": "cpu", "dtype": "float32"})


def test_samples_have_log_v_nats_per_token_by_a_judge_that_knows_nothing(
    world, monkeypatch, capsys
):
    V = len(ALPHABET)
    words = ["--ckpt=run", "--judge=fair", "--num_samples=5", "--steps=6", "--reference=data"]
    measures = run(world, monkeypatch, *words)
    assert measures["generative perplexity"] == pytest.approx(V, rel=1e-5)
    assert measures["generative perplexity, error"] == pytest.approx(0, abs=1e-4)
    assert measures["held-out generative perplexity"] == pytest.approx(V, rel=1e-5)
    assert measures["length"] == 16 and 1 <= measures["network calls a sample (NFE)"] <= 6
    out = capsys.readouterr().out
    assert "5 samples from run: sampler ancestral, steps 6," in out and "noise float64" in out
    assert "exact nats of a causal network" in out and "held-out text" in out


def test_a_masked_judge_gives_a_bound_and_says_so(world, monkeypatch, capsys):
    measures = run(world, monkeypatch, "--samples=cats.jsonl", "--judge=bound", "--judge_draws=4")
    assert measures["generative perplexity"] == pytest.approx(len(ALPHABET), rel=1e-4)
    out = capsys.readouterr().out
    assert "upper bound by any_order, 4 draws a sample" in out


def test_a_causal_network_writes_for_a_judge_as_well(world, monkeypatch):
    measures = run(
        world, monkeypatch, "--ckpt=fair", "--judge=fair", "--num_samples=3", "--length=9"
    )
    assert measures["length"] == 9 and measures["network calls a sample (NFE)"] == 9


def test_held_out_text_is_measured_on_as_many_blocks_of_the_same_length(world, monkeypatch):
    samples = [{"text": TEXT[:50], "tokens": Char(ALPHABET).encode(TEXT[:50])}] * 3
    held = quality.reference_records(world / "data", samples)
    assert [record["text"] for record in held] == [TEXT[0:50], TEXT[50:100], TEXT[100:150]]


def command(world, *words):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=world, env=env, capture_output=True, text=True
    )


def test_the_real_commands_judge_what_was_written(world):
    words = ["--ckpt=run", "--num_samples=4", "--steps=5", "--out=made.jsonl"]
    made = command(world, str(ROOT / "sample.py"), *words)
    assert made.returncode == 0, made.stderr
    words = ["--samples=made.jsonl", "--judge=fair", "--device=cpu", "--dtype=float32"]
    done = command(world, "-m", "evals.quality", *words)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith("4 samples from made.jsonl\n")
    line = rf"^generative perplexity +{len(ALPHABET)} ± "
    assert re.search(line, done.stdout, re.M), done.stdout
    (world / "made.jsonl").unlink()


BAD = {
    "no judge": (["--ckpt=run"], "say who judges: --judge="),
    "a judge that is not there": (["--judge=nobody"], "no checkpoint nobody"),
    "no transformers": (
        ["--judge=hf:gpt2"],
        "the judge hf:gpt2 needs one more package: pip install transformers",
    ),
    "no samples": (["--judge=fair", "--samples=none.jsonl"], "no file of samples none.jsonl"),
    "an empty file": (["--judge=fair", "--samples=empty.jsonl"], "empty.jsonl holds no samples"),
    "not JSON": (["--judge=fair", "--samples=prose.jsonl"], "prose.jsonl, line 2: not JSON"),
    "a key is missing": (
        ["--judge=fair", "--samples=no_nfe.jsonl"],
        "no_nfe.jsonl, line 2: no nfe",
    ),
    "no tokens": (
        ["--judge=fair", "--samples=hollow.jsonl"],
        "hollow.jsonl, line 1: tokens must be a list of ids",
    ),
    "not ids": (
        ["--judge=fair", "--samples=ids.jsonl"],
        "ids.jsonl, line 1: tokens must be a list of ids",
    ),
    "two sources": (["--judge=fair", "--samples=cats.jsonl", "--ckpt=run"], "leave --ckpt out"),
    "another alphabet": (
        ["--judge=other", "--samples=cats.jsonl"],
        "the judge cannot read sample 1: character 't'",
    ),
    "another text": (
        ["--judge=fair", "--samples=cats.jsonl", "--reference=greek"],
        "greek has another tokenizer",
    ),
    "no draws": (
        ["--judge=bound", "--samples=cats.jsonl", "--judge_draws=0"],
        "judge_draws must be in [1, 1e6], not 0",
    ),
    "no steps": (["--judge=fair", "--ckpt=run", "--steps=0"], "steps must be in [1, 1e6], not 0"),
    "unknown key": (["--jugde=fair"], "unknown key --jugde; did you mean 'judge'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it(case, world, monkeypatch, capsys):
    words, message = BAD[case]
    monkeypatch.chdir(world)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["quality.py", *words])
    with pytest.raises(SystemExit) as exit:
        lib.program.run(quality.main, *sample.MODULES, quality)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("quality.py: ") and message in err


# ---- A judge from elsewhere ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 of random weights with a tokenizer of characters, saved as transformers does."""
    reason = "the optional package transformers is not installed"
    transformers = pytest.importorskip("transformers", reason=reason)
    import tokenizers

    folder = tmp_path_factory.mktemp("gpt2")
    ids = {c: i for i, c in enumerate(ALPHABET)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="."))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    plain.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(ALPHABET), n_positions=8, n_embd=16, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_hugging_face_judge_gives_the_models_own_loss_but_for_the_first_token(gpt2):
    import transformers

    given = {"judge": f"hf:{gpt2}", "batch_size": 2, "device": "cpu", "dtype": "float32"}
    judge = quality.open_judge(settings.options(given, *sample.MODULES, quality))
    ids = [Char(ALPHABET).encode(text) for text in ("the cat", "a dog", "the mat")]
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    for row, nats in zip(ids, judge.nats(ids), strict=True):
        x = torch.tensor([row])
        assert nats == pytest.approx(model(x, labels=x).loss.item() * (len(row) - 1), rel=1e-5)
    samples = [{"text": "the cat sat on", "tokens": Char(ALPHABET).encode("the cat sat on")}] * 2
    measures, read = quality.measure(samples, judge)
    assert read == "tokens as they are, in blocks of 8"
    assert math.isfinite(measures["nats per token"][0])
    assert quality.judge_nats(judge, [samples[0]["tokens"]])[1] == [14 - 2]


def test_a_hugging_face_judge_that_is_not_there_is_one_line(gpt2, tmp_path):
    given = {"judge": f"hf:{tmp_path}", "device": "cpu"}
    config = settings.options(given, *sample.MODULES, quality)
    with pytest.raises(UserError, match="transformers cannot load the judge hf:"):
        quality.open_judge(config)
