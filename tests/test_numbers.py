"""Every number says what it is: the bound beside the loss, what was seen, and never nan."""

import ast
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_train import MODULES, TEXT, TINY, batch_of, build, config_of, log, refusal, run

import config as settings
import evaluate
import sample
import train
from config import UserError
from data import examples, loader, writer
from data.tokenizer import Byte, Char
from evals import choice, harness, quality
from experiments import results
from lib.device import mean_length
from lib.files import to_json
from lib.parallel import Team
from lib.stats import NotFinite
from run import checkpoint
from run.subject import load_evaluable
from view import page

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder."""
    folder = tmp_path_factory.mktemp("numbers") / "data"
    writer.prepare(folder, [("train", TEXT), ("val", TEXT[:500])], Char("".join(sorted(set(TEXT)))))
    return folder


def strict(text):
    """JSON as a parser reads it that has never heard of NaN."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


# ---- The bound beside the loss -------------------------------------------------------------------

WEIGHTED = [{"loss_weight": name} for name in train.LOSS_WEIGHTS]
WEIGHTED += [{"objective": "t_dse"}, {"objective": "lambda_dce", "loss_weight": "sqrt"}]


def step_of(data, **keys):
    """(loss, NELBO) of the first step, in nats per token."""
    config, model, blocks, loss_of = build(data, **keys)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = train.make_batches(config, blocks, Team())
    loss, nelbo, _ = train.train_step(config, 0, batches, loss_of, [optimizer], Team())
    return loss.item(), nelbo.item()


@pytest.mark.parametrize("keys", WEIGHTED, ids=str)
def test_the_nelbo_of_a_batch_is_its_cross_entropy_by_the_weights_of_the_bound(keys, data):
    _, model, *_ = build(data, **keys)
    x0, mask, weight, *_ = batch_of(data, 0, range(8), **keys)
    bound = batch_of(data, 0, range(8), **keys | {"loss_weight": "bound"}).weight  # (B,)
    logits = model(torch.where(mask, model.mask_id, x0))  # (B, L, V)
    ce = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")  # (B, L)
    terms = ce
    if keys.get("objective") == "t_dse":
        terms = logits.exp().sum(-1) - 1 - logits.gather(-1, x0[..., None]).squeeze(-1)  # (B, L)
    plain = [
        ((w[:, None] * mask * c).sum() / x0.numel()).item()
        for w, c in ((weight, terms), (bound, ce))
    ]
    assert step_of(data, **keys) == pytest.approx(plain, rel=1e-5)
    for micro in (2, 4):
        assert step_of(data, micro_batch_size=micro, **keys) == pytest.approx(plain, rel=1e-5)


def test_the_bound_costs_no_pass_and_no_wait(data, monkeypatch):
    """One call of the network a micro-batch, and nothing is asked of the device in a step."""
    config, model, blocks, loss_of = build(data, loss_weight="constant", micro_batch_size=4)
    calls, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda *given: calls.append(1) or hidden(*given))
    batches = list(itertools.islice(train.make_batches(config, blocks, Team()), 2))
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waits for the device"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train.train_step(config | {"grad_clip": 0.0}, 0, iter(batches), loss_of, [optimizer], Team())
    assert len(calls) == 2


def test_the_log_and_the_line_name_both(data, tmp_path, capsys):
    run(data, tmp_path / "constant", loss_weight="constant")
    assert ", nelbo " in capsys.readouterr().out
    run(data, tmp_path / "bound")
    for name in ("constant", "bound"):
        pairs = [(e["loss"], e["nelbo"]) for e in log(tmp_path / name) if "loss" in e]
        close = [loss == pytest.approx(nelbo, rel=1e-5) for loss, nelbo in pairs]
        assert len(pairs) == 6 and all(close) == (name == "bound")


@pytest.mark.parametrize("objective", ["any_order", "ar"])
def test_the_nelbo_of_answers_is_per_token_that_is_no_padding(objective, tmp_path):
    text, prompt = Byte(), list(b"ab:")
    items = [("train", "a line", prompt, list(b"xy" * (i % 4 + 1))) for i in range(16)]
    examples.prepare(tmp_path, [*items, ("val", "a line", prompt, list(b"xy"))], text, width=14)
    keys = TINY | {"data": str(tmp_path), "objective": objective, "batch_size": 4}
    config = settings.options(keys, *MODULES)
    part = examples.Examples(tmp_path, "train", config["seed"])
    batch = train.make_batch(config, part, 3, range(4))
    rows = part.index(12, range(4))
    assert batch.n_real == part.counted(rows, padding=False).sum()
    assert batch.n_tokens == part.counted(rows, padding=objective != "ar").sum()


# ---- What was seen -------------------------------------------------------------------------------


def test_data_that_were_prepared_anew_since_a_model_learnt_from_them_are_named(tmp_path, capsys):
    folder, out, other, tokenizer = *(tmp_path / name for name in ("data", "out", "other")), Byte()

    def said(data=folder, **keys):
        if keys:
            run(data, out, **keys)
        else:
            options = {"ckpt": str(out), "draws": 1, "strata": 1}
            evaluate.main(settings.options(options, *evaluate.MODULES))
        return capsys.readouterr().out.count("was prepared anew since")

    texts = [("train", TEXT), ("val", TEXT[:500])]
    writer.prepare(folder, texts, tokenizer)
    assert (said(max_iters=1), said(), said(max_iters=2)) == (0, 0, 0)
    writer.prepare(folder, texts, tokenizer)  # the same text once more
    assert (said(), said(max_iters=3)) == (0, 0)
    texts = [("train", TEXT[500:]), ("val", TEXT[:500])]  # the same alphabet
    for each in (folder, other):
        writer.prepare(each, texts, tokenizer)
    # However often it is resumed, it has learnt from the first text.
    assert (said(), said(max_iters=4), said(max_iters=5), said()) == (1, 1, 1, 1)
    assert said(other, max_iters=6) == 0
    assert (said(), checkpoint.read(out)["config"]["data"]) == (0, str(other))


def test_a_run_resumed_with_another_batch_size_goes_on_where_it_was(data, tmp_path, monkeypatch):
    read, windows = [], loader.Blocks.starts
    spy = lambda blocks, index: read.extend(index.tolist()) or windows(blocks, index)  # noqa: E731
    monkeypatch.setattr(loader.Blocks, "starts", spy)
    keys = {"lr_decay": "constant", "eval_interval": 20}
    run(data, tmp_path, max_iters=20, **keys)
    run(data, tmp_path, max_iters=40, batch_size=32, **keys)
    run(data, tmp_path, max_iters=44, batch_size=2, **keys)
    seen = 20 * 8 + 20 * 32 + 4 * 2
    assert read == list(range(seen))  # each block of an epoch once, none left out
    entries = {entry["step"]: entry for entry in log(tmp_path) if "loss" in entry}
    tokens = {20: 20 * 8 * 16, 40: (20 * 8 + 20 * 32) * 16, 44: seen * 16}
    assert {step: entries[step]["tokens"] for step in tokens} == tokens
    ratio = entries[44]["flops"] / entries[20]["flops"]
    assert ratio == pytest.approx(seen / (20 * 8))


def test_a_new_run_from_the_weights_of_another_begins_its_data_anew(data, tmp_path):
    run(data, tmp_path / "a", max_iters=4)
    run(data, tmp_path / "a", max_iters=8, batch_size=16, lr_decay="constant")
    assert checkpoint.read(tmp_path / "a")["config"]["ahead"] == -4 * 8
    run(data, tmp_path / "b", init_from=str(tmp_path / "a"), max_iters=2)
    assert checkpoint.read(tmp_path / "b")["config"]["ahead"] == 0
    assert log(tmp_path / "b")[0]["tokens"] == 2 * 8 * 16


def test_sequences_that_are_cut_count_for_the_tokens_that_they_have(data, tmp_path):
    blocks, keys = SimpleNamespace(block_size=16), {"random_length": 0.4}
    lengths = [batch_of(data, step, range(2), **keys).x0.shape[1] for step in range(200)]
    expected = mean_length(config_of(data, tmp_path, **keys), blocks)
    assert np.mean(lengths) == pytest.approx(expected, abs=4 * np.std(lengths) / 200**0.5)
    assert mean_length(config_of(data, tmp_path), blocks) == 16


# ---- JSON ----------------------------------------------------------------------------------------


def test_json_has_null_for_what_is_no_number():
    odd = {"a": math.nan, "b": [1.5, -math.inf, {"c": np.float64(math.inf)}], "d": (1, "NaN", None)}
    said = {"a": None, "b": [1.5, None, {"c": None}], "d": [1, "NaN", None]}
    assert strict(to_json(odd)) == said


def test_json_is_written_in_one_place():
    calls = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")]:
        tree = ast.walk(ast.parse(path.read_text(encoding="utf8")))
        names = [node.attr for node in tree if isinstance(node, ast.Attribute)]
        if {"dump", "dumps"} & set(names) and path.parent.name != "tests":
            calls[path.relative_to(ROOT).as_posix()] = 1
    assert list(calls) == ["lib/files.py"]


def test_a_log_with_a_bad_step_and_one_held_out_sequence_is_json(data, tmp_path, monkeypatch):
    make_batch = train.make_batch

    def bad(config, blocks, step, position):
        batch = make_batch(config, blocks, step, position)
        return batch._replace(weight=batch.weight * (math.nan if step == 5 else 1))

    monkeypatch.setattr(train, "make_batch", bad)
    run(data, tmp_path, skip_nonfinite=True, eval_sequences=1, log_interval=1)
    entries = [strict(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry.get("loss", 0) is None] == [6]
    assert entries[-1]["interval"] == [None, None] and entries[-1]["standard_error"] is None


def test_figures_without_a_value_are_null_in_the_file_and_a_dash_in_the_table(tmp_path):
    text = results.table("a title", [{"name": "a", "x": math.nan}, {"name": "b", "x": 2.0}])
    assert "| a | – |" in text and "| b | 2 |" in text
    results.write({"results": str(tmp_path)}, "mine", {"x": math.inf}, text)
    assert strict((tmp_path / "mine.json").read_text()) == {"x": None}
    results.keep(tmp_path / "kept.jsonl", {"x": math.nan})
    assert strict((tmp_path / "kept.jsonl").read_text()) == {"x": None}


# ---- nan and infinity ----------------------------------------------------------------------------


def spoilt(folder, data, objective="any_order", weight=None):
    """A checkpoint of a run: one weight is nan, or those of the head are as large as given."""
    run(data, folder, objective=objective, max_iters=2, eval_interval=2)
    state = torch.load(folder / "ckpt.pt")
    if weight is None:
        state["model"]["blocks.0.mlp.up.weight"][0, 0] = math.nan
    else:
        state["model"]["unembed.weight"] = (
            torch.randn_like(state["model"]["unembed.weight"]) * weight
        )
    torch.save(state, folder / "ckpt.pt")
    return str(folder)


@pytest.fixture
def world(data, tmp_path, monkeypatch):
    """A folder to be in: text, questions, samples."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)
    questions = [{"context": "the ", "options": ["cat", "dog"], "gold": 0}] * 3
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, questions)))
    ids = Char("".join(sorted(set(TEXT)))).encode("the cat")
    lines = [json.dumps({"text": "the cat", "tokens": ids, "nfe": 3})] * 3
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    return tmp_path


ASK = {  # what may be asked of a checkpoint: program -> its words
    "evaluate": (evaluate, "--ckpt=CKPT --data=data"),
    "sample": (sample, "--ckpt=CKPT --out=out.jsonl"),
    "choice": (choice, "--ckpt=CKPT --set=plain --from=asked.jsonl --draws=2 --out=out.jsonl"),
    "quality, who writes": (quality, "--ckpt=CKPT --judge=CKPT --num_samples=2 --steps=4"),
    "quality, who judges": (quality, "--samples=samples.jsonl --judge=CKPT"),
    "page": (page, "--ckpt=CKPT --page=page.html"),
    "harness": (harness, "--ckpt=CKPT --tasks=any"),
    "train": (train, "--init_from=CKPT --data=data --out_dir=out"),
}
MORE = {quality: (*sample.MODULES, quality), page: (*sample.MODULES, page)}


def asked(name, ckpt):
    module, words = ASK[name]
    line = [*words.replace("CKPT", ckpt).split(), "--device=cpu", "--dtype=float32"]
    return module.main(settings.parse(line, *(MORE.get(module) or module.MODULES)))


@pytest.mark.parametrize("name", ASK)
def test_a_checkpoint_with_one_weight_of_nan_is_refused_by_all_that_ask_it(name, world, data):
    ckpt = spoilt(world / "run", data)
    before = sorted(path.name for path in world.iterdir())
    with pytest.raises(UserError) as error:
        asked(name, ckpt)
    said = "run/ckpt.pt: the tensor blocks.0.mlp.up.weight holds nan or infinity"
    assert said in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in world.iterdir()) == before  # nothing half-written


def test_a_run_is_not_resumed_from_weights_of_nan(world, data):
    ckpt = spoilt(world / "run", data)
    said = "no run can be resumed from its model: the tensor blocks.0.mlp.up.weight holds nan"
    assert said in refusal(data, ckpt)


@pytest.mark.parametrize("objective", ["any_order", "ar"])
@pytest.mark.parametrize("name", ["evaluate", "sample", "choice", *list(ASK)[3:5]])
def test_finite_weights_whose_numbers_are_not_are_noticed_where_these_are_used(
    name, objective, world, data
):
    ckpt = spoilt(world / "run", data, objective, weight=1e38)
    with pytest.raises(NotFinite, match=r"\d of \d+ .* are nan or infinite") as error:
        asked(name, ckpt)
    assert "\n" not in str(error.value) and not (world / "out.jsonl").exists()


SAMPLED = [*itertools.product(sample.SAMPLERS, ("full", "order")), ("left_to_right", "causal")]


@pytest.mark.parametrize(("sampler", "attention"), SAMPLED)
def test_a_sampler_on_another_device_notices_when_the_numbers_arrive(
    sampler, attention, monkeypatch
):
    """There a draw does not look at its logits, which would mean waiting."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 5}
    model = train.network.make_network(train.network.DEFAULTS | shape | {"attention": attention})
    draw = lambda logits, u, *_: (logits.argmax(-1), logits[:, 0].double() * math.nan)  # noqa: E731
    monkeypatch.setattr(sample, "categorical", draw)
    with pytest.raises(NotFinite, match="probabilities of drawn tokens are nan"):
        sample.sample(model.eval(), torch.full((3, 8), 5), sampler=sampler, steps=4)


def test_a_process_whose_part_is_nan_still_meets_the_others(data, tmp_path, monkeypatch):
    """It says so, and all of them end in one line together."""
    met, gather = [], train.parallel.gather
    monkeypatch.setattr(train.parallel, "gather", lambda *given: met.append(1) or gather(*given))
    monkeypatch.setattr(
        evaluate, "answer_nats", lambda *_, **__: evaluate.of_set(None, torch.tensor([[math.nan]]))
    )
    with pytest.raises(UserError, match="the loss is nan at step 4; nothing was saved before"):
        run(data, tmp_path)
    assert met


# ---- Nothing, and few ----------------------------------------------------------------------------


def test_nothing_has_the_likelihood_1_whatever_stands_before_it(data, tmp_path):
    run(data, tmp_path, max_iters=2)
    keys = {"ckpt": str(tmp_path), "dtype": "float32"}
    subject = load_evaluable(evaluate.DEFAULTS | settings.DEFAULTS | keys)
    config = settings.options({"draws": 2}, *harness.MODULES)
    args = [("the ", ""), ("", ""), ("the cat", ""), ("the", " cat")]
    requests = [SimpleNamespace(args=pair, task_name="t", doc_id=i) for i, pair in enumerate(args)]
    log_p = harness.log_p_of_continuations(subject, config, harness.collections.Counter(), requests)
    assert log_p[:3] == [(0.0, True)] * 3 and log_p[3][0] < -1
    rolling = [SimpleNamespace(args=(text,)) for text in ("", "the cat")]
    nothing, text = harness.log_p_of_texts(subject, config, rolling)
    assert nothing == 0.0 and text < -1
    assert math.copysign(1, nothing) == 1 == math.copysign(1, log_p[0][0])  # and not -0.0


def test_a_bos_is_given_and_no_part_of_a_text():
    class WithBos(Char):
        bos = 0

    text = WithBos("abc ")
    assert choice.prompt_and_answer(text, -1, "here", "", "ab") == ([0], text.encode("ab"))
    assert choice.prompt_and_answer(text, -1, "here", "", "") == ([0], [])
    assert choice.prompt_and_answer(text, 0, "here", "", "") == ([], [])


def test_one_question_and_one_sample_show_no_error(world, data, capsys):
    run(data, world / "run", max_iters=2)
    for name in ("choice", "quality, who judges"):
        path = world / ("asked.jsonl" if name == "choice" else "samples.jsonl")
        path.write_text(path.read_text().splitlines()[0])
        capsys.readouterr()
        asked(name, "run")
        out = capsys.readouterr().out
        assert re.search(r"too few( questions)? for an error", out)
        assert "inf" not in out and "nan" not in out
        assert "+-" not in out and "±" not in out


def test_a_network_of_one_position_can_be_trained_evaluated_and_asked(world, data, capsys):
    run(data, world / "run", max_iters=2, block_size=1, show_sample=True)
    for name in ("evaluate", "sample", "choice", "quality, who writes"):
        asked(name, "run")
    out = capsys.readouterr().out
    assert "nan" not in out and "inf" not in out and "no draws" not in out


def test_a_causal_run_says_that_its_evaluations_are_exact(data, tmp_path, capsys):
    run(data, tmp_path / "ar", objective="ar", max_iters=2)
    said = f"evaluations: 6 blocks of {data} val, exact, raw weights"
    assert said in capsys.readouterr().out
    run(data, tmp_path / "mdm", max_iters=2)
    said = f"evaluations: 6 blocks of {data} val, upper bound by 2 draws each, raw weights"
    assert said in capsys.readouterr().out
