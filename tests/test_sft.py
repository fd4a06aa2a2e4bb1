"""Conditional training: noise on answers alone, the loss per token that noise may hide, and models to begin with."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, L, V, states
from test_diffusion import CASES, corruptions

import batch
import checkpoint
import config as settings
import diffusion
import evaluate
import harness
import model as network
import sample
import train
from config import UserError
from data import rows, tokenizer, writer

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 8, "max_iters": 6, "warmup_iters": 2, "log_interval": 1}
TINY |= {"eval_interval": 3, "eval_sequences": 6, "eval_draws": 2, "show_sample": False, "device": "cpu", "dtype": "float32"}
MASKED = ["any_order", "lambda_dce", "t_dce", "t_dse"]
TEXT = tokenizer.Byte()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of a letter said again: "b: " asks for "bb", and so on, with answers of 2 to 5 letters."""
    folder = tmp_path_factory.mktemp("rows")
    found = [(f"{chr(97 + i % 26)}{i}: ", chr(97 + i % 26) * (2 + i % 4)) for i in range(40)]
    splits = [("train", found[:30]), ("val", found[30:])]
    rows.prepare(folder, [(s, "", [*p.encode()], [*a.encode()]) for s, part in splits for p, a in part], TEXT, width=14)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, so that sums have one order; and no time spent on measuring the machine."""
    monkeypatch.setattr(network, "matmul_flops", lambda *_: 1e9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def words(data, out, **keys):
    return [f"--{key}={value}" for key, value in (TINY | {"data": data, "out_dir": out} | keys).items()]


def config_of(data, out="unused", **keys):
    return settings.parse(words(data, out, **keys), settings, diffusion, network, train)


def run(data, out, **keys):
    return train.main(config_of(data, out, **keys))


def batch_of(data, step=0, position=range(8), **keys):
    """(x0, mask, weight, rows) of a batch, and the rows it came from."""
    config = config_of(data, **keys)
    found = rows.Rows(data, "train", config["seed"])
    return train.make_batch(config, found, step, position), found


def placed(found, step, n=8):
    """(prompt (n, 1), length (n, 1), place (L,)) of the rows of a global batch."""
    index = found.index(step, range(n), n)
    lengths = (torch.from_numpy(z[index])[:, None] for z in (found.prompt, found.length))
    return *lengths, torch.arange(found.block_size)


# ---- The conditional bound, by enumeration -----------------------------------------------------------------------------


def conditional_nats(model, objective, schedule, given):
    """E[sum of weight * CE] of every clean sequence with a prompt of `given` tokens, through draw_mask and nelbo: (V^L,)."""
    u, noise, chance = corruptions(objective, schedule)
    if objective == "any_order":  # u that hits each k of those that are left equally often
        n = L - given
        u = ((torch.arange(n).double() + 0.5) / n).repeat_interleave(math.factorial(L))  # (n * L!,)
        noise, chance = noise[: len(u)], torch.full((len(u),), 1 / len(u), dtype=torch.float64)
    mask, weight = diffusion.draw_mask(objective, u, noise, schedule, torch.full((len(u),), given))
    assert not mask[:, :given].any()
    x0 = states(V, L)  # (V^L, L)
    x, mask = x0.repeat_interleave(len(u), 0), mask.repeat(len(x0), 1)  # (V^L * N, L) each
    with torch.no_grad():
        nats = diffusion.nelbo(model, x, mask, weight.repeat(len(x0)))[1]
    return nats.view(len(x0), -1).double() @ chance


@pytest.mark.parametrize("given", [0, 1, 2, 3])
@pytest.mark.parametrize(("objective", "schedule"), CASES)
def test_with_true_conditionals_every_objective_is_exactly_minus_log_p_of_the_rest_given_the_prompt(
    objective, schedule, given, network, joint
):
    nats = conditional_nats(network, objective, diffusion.SCHEDULES[schedule], given)  # (V^L,)
    prompt = joint.sum(list(range(given, L)), keepdim=True) if given else torch.ones(1, 1, 1, 1)
    assert torch.allclose(nats, -(joint / prompt).log().flatten(), rtol=1e-12)
    entropy = -(joint * (joint / prompt).log()).sum()  # H(rest | prompt)
    assert torch.allclose(joint.flatten() @ nats, entropy, rtol=1e-12)


def test_a_prompt_hidden_with_the_rest_gives_the_bound_of_a_model_without_prompts(network, joint):
    """What standard guidance learns where it drops prompts: p(rest), the prompt being unknown."""
    x0 = states(V, L)  # (V^L, L)
    total = 0.0
    for order in itertools.permutations((2, 3)):
        for k in (1, 2):  # the last k of the order are hidden, each k with chance 1/2 and weight 2/k
            mask = torch.zeros(len(x0), L, dtype=torch.bool)
            mask[:, list(order[2 - k :])] = True
            hide, weight = mask.clone(), (mask * 2.0 / k).double()
            hide[:, :2] = True
            total = total + diffusion.nelbo(network, x0, hide, weight, diffusion.hidden_rows(mask, multiple=7))[1] / 4
    rest = joint.sum((0, 1), keepdim=True).expand(V, V, V, V)  # p of the last two alone
    assert torch.allclose(total.detach(), -rest.log().flatten(), rtol=1e-12)


# ---- Batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", MASKED)
def test_noise_falls_on_all_that_follows_a_prompt_and_on_nothing_else(objective, data):
    hidden = 0
    for step in range(60):
        (_, mask, weight, kept), found = batch_of(data, step, objective=objective)
        prompt, _, place = placed(found, step)
        assert not (mask & (place < prompt)).any() and mask.any(1).all() | (objective != "any_order")
        assert ((weight > 0) == mask).all() and set(mask.flatten().nonzero().flatten().tolist()) <= set(kept.tolist())
        hidden = hidden + mask.sum(0)
    assert (hidden[6:] > 0.42 * 480).all() and (hidden[6:] < 0.64 * 480).all()  # padding to the last token too


def test_any_order_hides_each_number_of_an_answers_tokens_equally_often(data):
    seen = torch.zeros(15)
    for step in range(120):
        (_, mask, _, _), found = batch_of(data, step)
        left = found.block_size - placed(found, step)[0].squeeze(1)  # (8,)
        seen += torch.bincount(mask.sum(1)[left == 10], minlength=15)
    assert seen[0] == 0 and not seen[11:].any()
    assert (seen[1:11] / seen.sum() - 0.1).abs().max() < 0.05


@pytest.mark.parametrize("objective", [*MASKED, "ar"])
def test_a_batch_does_not_depend_on_how_its_rows_are_shared_out(objective, data):
    keys = {"objective": objective, "prompt_drop": 0.0 if objective == "ar" else 0.4}
    whole = batch_of(data, 7, **keys)[0][:3]
    parts = [batch_of(data, 7, part, **keys)[0][:3] for part in (range(0, 1), range(1, 6), range(6, 8))]
    assert all(torch.equal(torch.cat(pieces), z) for z, pieces in zip(whole, zip(*parts, strict=True), strict=True))


def test_a_prompt_is_dropped_as_a_whole_as_often_as_asked_and_never_counts(data):
    dropped, rows_seen = 0, 0
    for step in range(80):
        (x0, mask, weight, kept), found = batch_of(data, step, prompt_drop=0.3)
        prompt, _, place = placed(found, step)
        hidden = (mask & (place < prompt)).sum(1, keepdim=True)  # (8, 1)
        assert ((hidden == 0) | (hidden == prompt)).all() and not weight[place < prompt].any()
        plain = batch_of(data, step)[0]
        assert torch.equal(plain[0], x0) and torch.equal(plain[2], weight) and torch.equal(plain[3], kept)
        dropped, rows_seen = dropped + int((hidden > 0).sum()), rows_seen + 8
    assert dropped / rows_seen == pytest.approx(0.3, abs=0.05)


def plain_loss(model, x0, prompt, length, mask, weight, causal):
    """The loss of SMDM's fine-tuning by its definition: x0 (B, L), prompt and length (B, 1), weight (B, 1)."""
    place = torch.arange(x0.shape[1])
    if causal:
        start = torch.full_like(x0[:, :1], model.start_id)
        logits, mask = model(torch.cat([start, x0[:, :-1]], 1)), (place >= prompt) & (place < length)
        total, weight = mask.sum(), 1.0
    else:
        logits, total = model(torch.where(mask, model.mask_id, x0)), (place >= prompt).sum()
    ce = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")  # (B, L)
    return (weight * ce * mask * (place >= prompt)).sum() / total


def step_of(data, world=1, rank=0, **keys):
    """(loss, gradients, model as it was, config) of train_step on the part that one of `world` processes has of step 0."""
    config = config_of(data, grad_clip=0.0, **keys)
    config |= {"vocab_size": 256, "causal": config["objective"] == "ar", "block_size": 14}
    model, _, _ = train.build(config, torch.device("cpu"), None)
    before, gradients = copy.deepcopy(model), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    loss_of, found = diffusion.Loss(model, config["objective"]), rows.Rows(data, "train", config["seed"])
    arguments = (loss_of, [optimizer], torch.device("cpu"), torch.enable_grad, world, rank)
    batches = train.make_batches(config, found, 0, world, rank)
    return train.train_step(config, 0, batches, *arguments), gradients, before, config


@pytest.mark.parametrize(
    "keys", [{"objective": "lambda_dce", "prompt_drop": 0.5}, {"loss_weight": "constant"}, {"objective": "ar"}]
)
def test_the_loss_is_the_mean_over_what_may_be_hidden_in_the_whole_batch(keys, data):
    loss, gradients, model, config = step_of(data, **keys)
    found = rows.Rows(data, "train", config["seed"])
    x0, mask, weight, _ = train.make_batch(config, found, 0, range(8))
    prompt, length, place = placed(found, 0)
    counted = (place >= prompt) & (mask | (config["objective"] == "ar"))
    if config["objective"] != "ar":  # the weight of the definition, without the divisor
        arguments = (config["objective"], config["seed"], 0, range(8), 8, 14, diffusion.loglinear, prompt.squeeze(1))
        weight = batch.training_weight(config, diffusion.training_mask(*arguments)[1])[:, None].float()
    plain = plain_loss(model, x0, prompt, length, mask, weight * counted, config["causal"])
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert all(torch.allclose(p.grad, gradients[name], atol=2e-6) for name, p in model.named_parameters())


@pytest.mark.parametrize("keys", [{"prompt_drop": 0.5}, {"objective": "t_dce"}, {"objective": "ar"}])
def test_micro_batches_and_processes_add_up_to_the_whole_batch(keys, data):
    loss, whole, *_ = step_of(data, **keys)
    other, parts, *_ = step_of(data, micro_batch_size=2, **keys)
    first, second = (step_of(data, world=2, rank=rank, **keys) for rank in (0, 1))  # which DDP then averages
    assert other.item() == pytest.approx(loss.item(), rel=1e-5)
    assert (first[0] + second[0]).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, atol=2e-6)
        assert torch.allclose((first[1][name] + second[1][name]) / 2, gradient, atol=2e-6)


def test_for_ar_the_answer_and_its_own_end_mark_count_and_nothing_else(data):
    (x0, mask, weight, _), found = batch_of(data, objective="ar")
    prompt, length, place = placed(found, 0)
    assert torch.equal(mask, (place >= prompt) & (place < length)) and ((weight > 0) == mask).all()
    assert torch.equal((x0 == 0) & mask, place == length - 1)  # one end mark in each


# ---- A run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["any_order", "ar"])
def test_a_run_learns_to_answer_and_is_judged_by_the_answers_alone(objective, data, tmp_path):
    keys = {"max_iters": 60, "learning_rate": 0.02, "eval_interval": 60}
    result = run(data, tmp_path, objective=objective, **keys)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "log.jsonl").read_text().splitlines()][:60]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    _, _, trained = checkpoint.load(tmp_path)
    assert (trained["row_width"], trained["row_end"], trained["block_size"]) == (14, 0, 14)
    val = rows.Rows(data, "val")
    assert result["tokens"] == val.counted(np.arange(6) * 10 // 6, padding=False).sum() and result["sequences"] == 6
    # Bits per byte of the answers: their bytes are known, their end marks count as tokens.
    counts = val.tokens.meta["splits"]["val"]
    ratio = counts["answer_tokens"] / counts["bytes"]
    assert result["bits_per_byte"] == pytest.approx(result["bits_per_token"] * ratio)


@pytest.mark.parametrize("keys", [{"prompt_drop": 0.2, "ema": 0.5}, {"objective": "ar"}])
def test_a_stopped_run_goes_on_bit_for_bit(keys, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(data, parts, max_iters=3, lr_decay="constant", **keys)
    assert run(data, parts, lr_decay="constant", **keys) == run(data, whole, lr_decay="constant", **keys)
    one, two = (checkpoint.read(out)["model"] for out in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_bound_of_a_causal_run_is_minus_log_p_of_the_answers(data, tmp_path):
    result = run(data, tmp_path, objective="ar", eval_sequences=10)
    model, _, _ = checkpoint.load(tmp_path)
    val, nats = rows.Rows(data, "val"), 0.0
    for x, a, b in zip(*val[range(10)], strict=True):
        read = torch.tensor([model.start_id, *x[: b - 1]])[None]  # (1, b)
        nats += F.cross_entropy(model(read)[0, a:], torch.from_numpy(x[a:b]), reduction="sum").item()
    assert result["nats_per_token"] == pytest.approx(nats / (val.length - val.prompt).sum(), rel=1e-5)


def test_a_sample_is_shown_up_to_the_end_of_its_answer(data, tmp_path, capsys):
    run(data, tmp_path, max_iters=3, show_sample=True)
    prompt = bytes(rows.Rows(data, "val").requests(1, padding=True)[0][0][0].tolist()).decode()
    assert f"---- a sample\n{prompt}" in capsys.readouterr().out
    assert sample.text_of(TEXT, [*b"q: yes", 0, *b"more", 0, 0], begin=3, end=0) == "q: yes"
    assert sample.text_of(TEXT, [*b"q\0: yes"], begin=3, end=0) == "q\0: yes"
    assert sample.text_of(TEXT, [*b"q: yes", 0]) == "q: yes\0"


# ---- What a run begins with --------------------------------------------------------------------------------------------


def small(data, out, **keys):
    """A trained model, as a folder."""
    run(data, out, max_iters=2, eval_interval=2, **keys)
    return out


@pytest.mark.parametrize("form", ["checkpoint", "averaged", "export"])
def test_a_run_begins_with_the_weights_and_the_model_keys_of_another(form, data, tmp_path):
    source = small(data, tmp_path / "source", n_layer=2, bias=False, ema=0.9 * (form == "averaged"))
    if form == "export":
        checkpoint.export(source, tmp_path / "export", "nanomdm")
        source = tmp_path / "export"
    keys = {"init_from": source, "learning_rate": 0.0, "weight_decay": 0.0, "max_iters": 1}
    words_left = [word for word in words(data, tmp_path / "out", **keys) if not word.startswith(("--n_", "--bias"))]
    train.main(settings.parse(words_left, settings, diffusion, network, train))
    one, two = (checkpoint.load(out)[0].state_dict() for out in (source, tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one) and "blocks.1.qkv.weight" in two
    assert checkpoint.read(tmp_path / "out")["step"] == 1


def test_the_published_models_can_be_begun_with(shared, data, tmp_path):
    """Their 64 tokens are not bytes, and that is said; on rows with 64 tokens they learn, both kinds."""
    folder = shared("fixtures/smdm_tiny")
    text = tokenizer.Char("\0" + "".join(chr(97 + i) for i in range(63)))
    rows.prepare(tmp_path / "rows", [(s, "", [5, 6, 7], [8, 9]) for s in ("train", "val")], text)
    for kind, objective in (("mdm", "lambda_dce"), ("ar", "ar")):
        plain = settings.parse([], settings, diffusion, network, train)
        keys = TINY | {"init_from": str(folder / f"{kind}.safetensors"), "objective": objective, "max_iters": 1}
        keys = {key: value for key, value in keys.items() if not key.startswith("n_")}
        config = plain | keys | {"data": str(tmp_path / "rows"), "out_dir": str(tmp_path / kind)}
        train.main(config)
        assert checkpoint.read(tmp_path / kind)["config"]["block_size"] == 2048
        with pytest.raises(UserError, match="has a vocabulary of 64"):
            train.main(config | {"data": str(data), "resume": False})


def test_a_run_that_has_begun_goes_on_whatever_it_began_with(data, tmp_path):
    source = small(data, tmp_path / "source")
    run(data, tmp_path / "out", init_from=source, max_iters=3)
    run(data, tmp_path / "out", init_from=tmp_path / "gone", max_iters=4)
    assert checkpoint.read(tmp_path / "out")["step"] == 4


@pytest.fixture
def other_text(tmp_path):
    """Plain text with an alphabet of its own, and its folder."""
    folder = tmp_path / "text"
    writer.prepare(folder, [("train", "abc " * 50), ("val", "cab " * 50)], tokenizer.Char(" abc\n"))
    return folder


REFUSED = {
    "no such file": ({"init_from": "gone"}, "no checkpoint gone"),
    "another size": ({"init_from": "SOURCE", "n_layer": 3}, "n_layer=1, not 3; init_from takes a model as it is"),
    "another kind": ({"init_from": "SOURCE", "objective": "ar"}, "is no causal network, so it cannot learn ar"),
    "another tokenizer": ({"init_from": "SOURCE", "data": "TEXT"}, "was trained with another tokenizer than"),
    "text without prompts": ({"prompt_drop": 0.1, "data": "TEXT"}, "is text without prompts, so prompt_drop must be 0"),
    "a prompt for ar": ({"prompt_drop": 0.1, "objective": "ar"}, "prompt_drop needs a masked diffusion objective, not ar"),
    "random length": ({"random_length": 0.1}, "is rows with prompts, so random_length must be 0"),
    "a narrow network": ({"block_size": 13}, "has rows of 14 tokens, block_size is only 13"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(name, data, other_text, tmp_path):
    keys, message = REFUSED[name]
    source = small(data, tmp_path / "source") if "SOURCE" in keys.values() else None
    keys = {key: {"SOURCE": source, "TEXT": other_text}.get(value, value) for key, value in keys.items()}
    with pytest.raises(UserError) as error:
        run(keys.pop("data", data), tmp_path / "out", **keys)
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_command_says_so_and_exits_with_2(data, other_text, tmp_path):
    line = [sys.executable, "train.py", *words(other_text, tmp_path / "out", init_from=small(data, tmp_path / "source"))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "another tokenizer" in done.stderr


# ---- Sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_guidance_takes_the_calls_of_plain_sampling_and_a_weight_of_zero_changes_nothing(sampler, data):
    config = config_of(data) | {"vocab_size": 256, "block_size": 14, "n_embd": 32}
    torch.manual_seed(0)
    model = network.Transformer(config).eval()
    x0, prompt, _ = rows.Rows(data, "val")[range(6)]
    given = torch.arange(14) < torch.from_numpy(prompt)[:, None]  # (6, L)
    x = torch.from_numpy(x0).where(given, torch.tensor(256))
    how = {"sampler": sampler, "steps": 5, "seed": 3}
    plain, off, guided = (sample.sample(model, x, **how, **keys) for keys in ({}, {"cfg": 0.0}, {"cfg": 0.8}))
    assert torch.equal(plain[0], off[0]) and not torch.equal(plain[0], guided[0])
    assert torch.equal(guided[0][given], x[given])
    for key in ("nfe", "expected_nfe"):
        assert torch.equal(torch.as_tensor(plain[1][key]), torch.as_tensor(guided[1][key]))


@pytest.mark.parametrize("objective", ["any_order", "ar"])
def test_the_command_answers_a_prompt_up_to_the_end_mark_and_keeps_all_tokens_in_the_record(objective, data, tmp_path):
    small(data, tmp_path, objective=objective)
    given = {"ckpt": str(tmp_path), "prompt": "b1: ", "num_samples": 3, "device": "cpu", "steps": 4, "temperature": 3.0}
    records = sample.main(settings.DEFAULTS | diffusion.DEFAULTS | sample.DEFAULTS | given)
    for record in records:
        assert len(record["tokens"]) == 14  # a row
        answer = bytes(record["tokens"][4:]).split(b"\0")[0].decode(errors="replace")
        assert record["text"] == "b1: " + answer
    for record in sample.main(settings.DEFAULTS | diffusion.DEFAULTS | sample.DEFAULTS | given | {"min_tokens": 7}):
        assert 0 not in record["tokens"][4:11]
    if objective != "ar":  # with something behind the gap nothing is cut off
        (record, *_) = sample.main(settings.DEFAULTS | diffusion.DEFAULTS | sample.DEFAULTS | given | {"suffix": "\0z"})
        assert record["text"].endswith("\0z")
        with pytest.raises(UserError, match="min_tokens is for answers"):
            sample.main(settings.DEFAULTS | diffusion.DEFAULTS | sample.DEFAULTS | given | {"suffix": "z", "min_tokens": 7})


def test_an_export_still_knows_its_row_and_its_end_mark(data, tmp_path):
    run(data, tmp_path / "run", max_iters=1)
    checkpoint.export(str(tmp_path / "run"), str(tmp_path / "export"), "nanomdm")
    kept = checkpoint.load(str(tmp_path / "export"))[2]
    assert (kept["row_width"], kept["row_end"]) == (14, rows.end_mark(TEXT))


@pytest.mark.parametrize("objective", ["any_order", "ar"])
def test_evaluate_finds_the_bound_of_the_run_on_the_held_out_answers(objective, data, tmp_path, capsys):
    result = run(data, tmp_path, objective=objective, eval_sequences=10, max_iters=3)
    keys = [f"--ckpt={tmp_path}", f"--data={data}", "--draws=2", "--device=cpu", "--dtype=float32"]
    found = evaluate.main(settings.parse(keys, settings, diffusion, harness, evaluate))
    for key in ("nats_per_token", "bits_per_byte", "tokens"):
        assert found[key] == pytest.approx(result[key], rel=1e-12)
    assert "10 answers in rows of 14, given their prompts" in capsys.readouterr().out
