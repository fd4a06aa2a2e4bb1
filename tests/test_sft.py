"""Conditional training: only answers are masked; the loss per maskable token; what is sampled."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import L, V, states
from plain import RECIPE, words_of
from test_diffusion import CASES, corruptions
from test_train import log

import config as settings
import diffusion
import evaluate
import model as network
import sample
import train
from config import UserError
from data import examples, tokenizer
from lib import fused
from lib.parallel import Team
from run import checkpoint

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 8, "max_iters": 6}
TINY |= {"warmup_iters": 2, "log_interval": 1, "eval_interval": 3, "eval_sequences": 6}
TINY |= {"eval_draws": 2, "show_sample": False, "device": "cpu", "dtype": "float32"} | RECIPE
MASKED = ["any_order", "lambda_dce", "t_dce", "t_dse"]
TEXT = tokenizer.Byte()


pytestmark = pytest.mark.usefixtures("one_thread")


def letters(folder, width=14):
    """Examples of a letter said again: "b: " asks for "bb"; answers of 2 to 5 letters."""
    pairs = [(f"{chr(97 + i % 26)}{i}: ", chr(97 + i % 26) * (2 + i % 4)) for i in range(40)]
    splits = [("train", pairs[:30]), ("val", pairs[30:])]
    items = [(s, "", [*p.encode()], [*a.encode()]) for s, part in splits for p, a in part]
    examples.prepare(folder, items, TEXT, width)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return letters(tmp_path_factory.mktemp("examples"))


def words(data, out, **keys):
    return words_of(TINY | {"data": data, "out_dir": out} | keys)


def config_of(data, out="unused", **keys):
    return settings.parse(words(data, out, **keys), *train.MODULES)


def run(data, out, **keys):
    return train.main(config_of(data, out, **keys))


def batch_of(data, step=0, rows=range(8), **keys):
    """A train.Batch, and the examples it came from."""
    config = config_of(data, **keys)
    dataset = examples.Examples(data, "train", config["seed"])
    return train.make_batch(config, dataset, step, rows), dataset


def placed(dataset, step, n=8):
    """(prompt (n, 1), length (n, 1), place (L,)) of the examples of a global batch."""
    index = dataset.index(step * n, range(n))
    lengths = (torch.from_numpy(z[index])[:, None] for z in (dataset.prompt, dataset.length))
    return *lengths, torch.arange(dataset.block_size)


# ---- The conditional bound, by enumeration -------------------------------------------------------


def conditional_nats(model, objective, schedule, given):
    """E[sum of weight * CE] of every clean sequence with a prompt of `given` tokens: (V^L,).

    Through draw_mask and nelbo.
    """
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
def test_with_true_conditionals_every_objective_is_minus_log_p_of_rest_given_prompt(
    objective, schedule, given, network, joint
):
    nats = conditional_nats(network, objective, diffusion.SCHEDULES[schedule], given)  # (V^L,)
    prompt = joint.sum(list(range(given, L)), keepdim=True) if given else torch.ones(1, 1, 1, 1)
    assert torch.allclose(nats, -(joint / prompt).log().flatten(), rtol=1e-12)
    entropy = -(joint * (joint / prompt).log()).sum()  # H(rest | prompt)
    assert torch.allclose(joint.flatten() @ nats, entropy, rtol=1e-12)


def test_a_prompt_masked_with_the_rest_gives_the_bound_of_a_model_without_prompts(network, joint):
    """What standard guidance learns where it drops prompts: p(rest), the prompt being unknown."""
    x0 = states(V, L)  # (V^L, L)
    total = 0.0
    for order in itertools.permutations((2, 3)):
        for k in (1, 2):  # the last k of the order are masked, each k with chance 1/2, weight 2/k
            counted = torch.zeros(len(x0), L, dtype=torch.bool)
            counted[:, list(order[2 - k :])] = True
            mask, weight = counted.clone(), (counted * 2.0 / k).double()
            mask[:, :2] = True
            masked_idx = fused.masked_indices(counted, multiple=7)
            total = total + diffusion.nelbo(network, x0, mask, weight, masked_idx)[1] / 4
    rest = joint.sum((0, 1), keepdim=True).expand(V, V, V, V)  # p of the last two alone
    assert torch.allclose(total.detach(), -rest.log().flatten(), rtol=1e-12)


# ---- Batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", MASKED)
def test_all_that_follows_a_prompt_is_masked_and_nothing_else(objective, data):
    masked = 0
    for step in range(60):
        (_, mask, weight, masked_idx, *_), dataset = batch_of(data, step, objective=objective)
        prompt, _, place = placed(dataset, step)
        assert not (mask & (place < prompt)).any()
        assert mask.any(1).all() or objective != "any_order"
        assert ((weight > 0) == mask).all()
        assert set(mask.flatten().nonzero().flatten().tolist()) <= set(masked_idx.tolist())
        masked = masked + mask.sum(0)
    assert (masked[6:] > 0.42 * 480).all(), "padding to the last token too"
    assert (masked[6:] < 0.64 * 480).all()


def test_any_order_masks_each_number_of_an_answers_tokens_equally_often(data):
    seen = torch.zeros(15)
    for step in range(120):
        batch, dataset = batch_of(data, step)
        left = dataset.block_size - placed(dataset, step)[0].squeeze(1)  # (8,)
        seen += torch.bincount(batch.mask.sum(1)[left == 10], minlength=15)
    assert seen[0] == 0 and not seen[11:].any()
    assert (seen[1:11] / seen.sum() - 0.1).abs().max() < 0.05


@pytest.mark.parametrize("objective", [*MASKED, "ar"])
def test_a_batch_does_not_depend_on_how_its_rows_are_shared_out(objective, data):
    keys = {"objective": objective, "prompt_drop": 0.0 if objective == "ar" else 0.4}
    whole = batch_of(data, 7, **keys)[0][:3]
    shares = range(0, 1), range(1, 6), range(6, 8)
    parts = zip(*(batch_of(data, 7, share, **keys)[0][:3] for share in shares), strict=True)
    for z, pieces in zip(whole, parts, strict=True):
        assert torch.equal(torch.cat(pieces), z)


def test_a_prompt_is_dropped_as_a_whole_as_often_as_asked_and_never_counts(data):
    dropped = 0
    for step in range(80):
        batch, dataset = batch_of(data, step, prompt_drop=0.3)
        prompt, _, place = placed(dataset, step)
        masked = (batch.mask & (place < prompt)).sum(1, keepdim=True)  # (8, 1)
        assert ((masked == 0) | (masked == prompt)).all()
        assert not batch.weight.masked_select(place < prompt).any()
        plain = batch_of(data, step)[0]
        for key in ("x0", "weight", "masked_idx"):
            assert torch.equal(getattr(plain, key), getattr(batch, key))
        assert plain.n_tokens == batch.n_tokens
        dropped += int((masked > 0).sum())
    assert dropped / (80 * 8) == pytest.approx(0.3, abs=0.05)


def plain_loss(model, x0, lengths, mask, weight, causal):
    """The loss of SMDM's fine-tuning by its definition: x0 (B, L), lengths and weight (B, 1)."""
    place, (prompt, length) = torch.arange(x0.shape[1]), lengths
    if causal:
        start = torch.full_like(x0[:, :1], model.start_id)
        logits = model(torch.cat([start, x0[:, :-1]], 1))
        mask = (place >= prompt) & (place < length)
        total, weight = mask.sum(), 1.0
    else:
        logits, total = model(torch.where(mask, model.mask_id, x0)), (place >= prompt).sum()
    ce = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")  # (B, L)
    return (weight * ce * mask * (place >= prompt)).sum() / total


def step_of(data, world=1, rank=0, **keys):
    """(loss, gradients, model as it was, config) of train_step on one process's part of step 0."""
    config = config_of(data, grad_clip=0.0, **keys)
    objective, team = config["objective"], Team(world, rank)
    attention = diffusion.OBJECTIVES[objective].attention[0]
    config |= {"vocab_size": 256, "attention": attention, "block_size": 14}
    model, _, _ = train.build(config, Team())
    before, gradients = copy.deepcopy(model), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    dataset = examples.Examples(data, "train", config["seed"])
    batches, loss_of = train.make_batches(config, dataset, team), diffusion.Loss(model, objective)
    loss, _, skipped = train.train_step(config, 0, batches, loss_of, [optimizer], team)
    assert not skipped
    return loss, gradients, before, config


LOSSES = [{"objective": "lambda_dce", "prompt_drop": 0.5}, {"loss_weight": "constant"}]
LOSSES += [{"objective": "ar"}]


@pytest.mark.parametrize("keys", LOSSES)
def test_the_loss_is_the_mean_over_what_may_be_masked_in_the_whole_batch(keys, data):
    loss, gradients, model, config = step_of(data, **keys)
    dataset, causal = examples.Examples(data, "train", config["seed"]), "ar" in keys.values()
    x0, mask, weight, *_ = train.make_batch(config, dataset, 0, range(8))
    prompt, length, _ = placed(dataset, 0)
    if not causal:  # the weight of the definition
        u, noise = diffusion.stratified_uniforms(config["seed"], 0, range(8), 8, 14)
        drawn = (config["objective"], u, noise, diffusion.loglinear, prompt.squeeze(1))
        weight = diffusion.draw_mask(*drawn)[1][:, None].float()  # (8, 1)
        constant = config["loss_weight"] == "constant"
        weight = torch.full_like(weight, 2.0) if constant else weight
    plain = plain_loss(model, x0, (prompt, length), mask, weight, causal)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=2e-6)


@pytest.mark.parametrize(
    "keys", [{"prompt_drop": 0.5}, {"objective": "t_dce"}, {"objective": "ar"}]
)
def test_micro_batches_and_processes_add_up_to_the_whole_batch(keys, data):
    loss, whole, *_ = step_of(data, **keys)
    other, parts, *_ = step_of(data, micro_batch_size=2, **keys)
    # DDP would then average these two.
    first, second = (step_of(data, world=2, rank=rank, **keys) for rank in (0, 1))
    assert other.item() == pytest.approx(loss.item(), rel=1e-5)
    assert (first[0] + second[0]).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in whole.items():
        assert torch.allclose(parts[name], gradient, atol=2e-6)
        assert torch.allclose((first[1][name] + second[1][name]) / 2, gradient, atol=2e-6)


def test_for_ar_the_answer_and_its_own_eos_count_and_nothing_else(data):
    (x0, mask, weight, *_), dataset = batch_of(data, objective="ar")
    prompt, length, place = placed(dataset, 0)
    assert torch.equal(mask, (place >= prompt) & (place < length))
    assert ((weight > 0) == mask).all()
    assert torch.equal((x0 == 0) & mask, place == length - 1), "one eos in each"


# ---- A run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["any_order", "ar"])
def test_a_run_learns_to_answer_and_is_evaluated_on_the_answers_alone(objective, data, tmp_path):
    keys = {"max_iters": 60, "learning_rate": 0.02, "eval_interval": 60}
    result = run(data, tmp_path, objective=objective, **keys)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("loss") for line in lines][:60]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    _, _, trained = checkpoint.load(tmp_path)
    assert (trained["example_width"], trained["eos_id"], trained["block_size"]) == (14, 0, 14)
    val = examples.Examples(data, "val")
    assert result["tokens"] == val.counted(np.arange(6) * 10 // 6, padding=False).sum()
    assert result["sequences"] == 6
    # Bits per byte of the answers: their bytes are known, their eos count as tokens.
    counts = val.tokens.meta["splits"]["val"]
    ratio = counts["answer_tokens"] / counts["bytes"]
    assert result["bits_per_byte"] == pytest.approx(result["bits_per_token"] * ratio)


@pytest.mark.parametrize("keys", [{"prompt_drop": 0.2, "ema": 0.5}, {"objective": "ar"}])
def test_a_stopped_run_goes_on_bit_for_bit(keys, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    keys |= {"lr_decay": "constant"}
    run(data, parts, max_iters=3, **keys)
    assert run(data, parts, **keys) == run(data, whole, **keys)
    one, two = (checkpoint.read(out)["model"] for out in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_bound_of_a_causal_run_is_minus_log_p_of_the_answers(data, tmp_path):
    result = run(data, tmp_path, objective="ar", eval_sequences=10)
    model, _, _ = checkpoint.load(tmp_path)
    val, nats = examples.Examples(data, "val"), 0.0
    for x, a, b in zip(*val[range(10)], strict=True):
        read = torch.tensor([model.start_id, *x[: b - 1]])[None]  # (1, b)
        answer = torch.from_numpy(x[a:b])  # (b - a,)
        nats += F.cross_entropy(model(read)[0, a:], answer, reduction="sum").item()
    n_tokens = (val.length - val.prompt).sum()
    assert result["nats_per_token"] == pytest.approx(nats / n_tokens, rel=1e-5)


def test_a_sample_is_shown_up_to_the_end_of_its_answer(data, tmp_path, capsys):
    run(data, tmp_path, max_iters=3, show_sample=True)
    ((prompt, _),), _ = examples.Examples(data, "val").requests(1, padding=True)
    prompt = bytes(prompt.tolist()).decode()
    assert f"---- a sample\n{prompt}\n" in capsys.readouterr().out
    assert sample.text_of(TEXT, [*b"q: yes", 0, *b"more", 0, 0], begin=3, eos_id=0) == "q: yes"
    assert sample.text_of(TEXT, [*b"q\0: yes"], begin=3, eos_id=0) == "q\0: yes"
    assert sample.text_of(TEXT, [*b"q: yes", 0]) == "q: yes\0"


def small(data, out, **keys):
    """A trained model, as a folder."""
    run(data, out, max_iters=2, eval_interval=2, **keys)
    return out


# ---- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_guidance_takes_the_calls_of_plain_sampling_and_scale_0_changes_nothing(sampler, data):
    config = config_of(data) | {"vocab_size": 256, "block_size": 14, "n_embd": 32}
    torch.manual_seed(0)
    model = network.make_network(config).eval()
    x0, prompt, _ = examples.Examples(data, "val")[range(6)]
    in_prompt = torch.arange(14) < torch.from_numpy(prompt)[:, None]  # (6, L)
    x = torch.from_numpy(x0).where(in_prompt, torch.tensor(256))
    options = {"sampler": sampler, "steps": 5, "seed": 3}
    scales = {}, {"cfg_scale": 0.0}, {"cfg_scale": 0.8}
    plain, off, guided = (sample.sample(model, x, **options, **scale) for scale in scales)
    assert torch.equal(plain[0], off[0]) and not torch.equal(plain[0], guided[0])
    assert torch.equal(guided[0][in_prompt], x[in_prompt])
    assert torch.equal(plain[1]["nfe"], guided[1]["nfe"])
    assert plain[1]["expected_nfe"] == guided[1]["expected_nfe"]


def command(ckpt):
    """The config of sample.py for three answers to one prompt."""
    config = settings.defaults_of(sample.MODULES) | {"ckpt": str(ckpt)}
    config |= {"prompt": "b1: ", "num_samples": 3, "device": "cpu", "steps": 4}
    return config | {"temperature": 3.0}


def test_guidance_of_answers_that_always_had_their_prompts_is_told(data, tmp_path, capsys):
    for drop, said in ((0.0, True), (0.1, False)):
        out = tmp_path / str(drop)
        run(data, out, max_iters=1, prompt_drop=drop)
        capsys.readouterr()
        fill(command(out) | {"cfg_scale": 0.8})
        assert ("--prompt_drop=0.1" in capsys.readouterr().out) == said


def fill(config):
    return sample.fill(config, sample.open_model(config))


@pytest.mark.parametrize("objective", ["any_order", "ar"])
def test_the_command_answers_a_prompt_up_to_the_eos_and_keeps_all_tokens(
    objective, data, tmp_path, capsys
):
    config = command(small(data, tmp_path, objective=objective))
    records, said = fill(config), capsys.readouterr().out
    for record in records:
        assert len(record["tokens"]) == 14, "a whole example"
        answer = bytes(record["tokens"][4:]).split(b"\0")[0].decode(errors="replace")
        assert record["text"] == "b1: " + answer
        assert f" network calls\nb1: \n{answer}\n----" in said
    for record in fill(config | {"min_new_tokens": 7}):
        assert 0 not in record["tokens"][4:11]


def test_with_something_behind_the_gap_nothing_is_cut_off(tmp_path):
    text = tokenizer.Char("\0b1: z\n")
    pair = text.encode("b1: "), text.encode("bb")
    examples.prepare(tmp_path / "old", [(s, "", *pair) for s in ("train", "val")], text, width=14)
    config = command(small(tmp_path / "old", tmp_path / "run"))
    (record, *_) = fill(config | {"suffix": "\nz"})
    assert record["text"].endswith("\nz") and len(record["text"]) == 14
    with pytest.raises(UserError, match="min_new_tokens must be at most the 0 to fill"):
        fill(config | {"suffix": "z", "min_new_tokens": 7})


def test_an_export_still_knows_its_width_and_its_eos(data, tmp_path):
    run(data, tmp_path / "run", max_iters=1)
    checkpoint.export(str(tmp_path / "run"), str(tmp_path / "export"), "nanomdm")
    kept = checkpoint.load(str(tmp_path / "export"))[2]
    assert (kept["example_width"], kept["eos_id"]) == (14, examples.eos_of(TEXT))


@pytest.mark.parametrize("objective", ["any_order", "ar"])
def test_evaluate_finds_the_bound_of_the_run_on_the_held_out_answers(
    objective, data, tmp_path, capsys
):
    result = run(data, tmp_path, objective=objective, eval_sequences=10, max_iters=3)
    argv = [f"--ckpt={tmp_path}", f"--data={data}", "--device=cpu", "--dtype=float32"]
    argv += [] if objective == "ar" else ["--draws=2"]
    bound = evaluate.main(settings.parse(argv, *evaluate.MODULES))
    for key in ("nats_per_token", "bits_per_byte", "tokens"):
        assert bound[key] == pytest.approx(result[key], rel=1e-12)
    assert "10 answers in examples of 14, given their prompts" in capsys.readouterr().out
    for word in ("--block_size=10", "--protocol=radd"):  # they would change nothing
        with pytest.raises(UserError, match="is for text; these are examples; leave it out"):
            evaluate.main(settings.parse([*argv, word], *evaluate.MODULES))


@pytest.mark.parametrize("objective", ["any_order", "ar"])
def test_an_answer_costs_given_its_prompt_what_it_does_as_it_was_trained(
    objective, data, tmp_path, capsys
):
    words = [f"--ckpt={small(data, tmp_path, objective=objective)}", "--prompt=b1: ", "--text=bb"]
    words += ["--device=cpu", "--dtype=float32"]
    keys = {} if objective == "ar" else {"estimator": "chain", "draws": 4}
    words += [f"--{key}={value}" for key, value in keys.items()]
    capsys.readouterr()
    result = evaluate.main(settings.parse(words, *evaluate.MODULES))
    said = capsys.readouterr().out
    padding = [0] * (7 if objective == "any_order" else 0)
    requests, model = [([*b"b1: "], [*b"bb", 0, *padding])], checkpoint.load(str(tmp_path))[0]
    nats = evaluate.answer_nats(model, requests, **keys).item()
    assert result["total"] == pytest.approx(nats, rel=1e-5) and result["prompt"] == [*b"b1: "]
    assert f", {result['total'] / 3:.4f} per token\n" in said  # the answer and its eos
    assert ("  7 more of the last, to the width of the examples\n" in said) == bool(padding)
    assert "-log p(answer and eos | 'b1: ', 4 tokens, not scored): " in said
    too_long = [*words[:2], "--text=" + "b" * 10]
    with pytest.raises(UserError, match=r"from 1 to 10 tokens \(an example of 14, with eos, .* 11"):
        evaluate.main(settings.parse(too_long, *evaluate.MODULES))


def test_resumed_with_examples_of_another_width_a_run_counts_what_it_has_seen(data, tmp_path):
    narrow, keys = letters(tmp_path / "narrow", width=12), {"lr_decay": "constant"}
    run(data, tmp_path / "run", max_iters=3, **keys)
    run(narrow, tmp_path / "run", **keys)
    run(narrow, tmp_path / "other", max_iters=3, **keys)
    first, last, other = (
        log(tmp_path / "run")[2],
        log(tmp_path / "run")[-2],
        log(tmp_path / "other")[2],
    )
    assert first["tokens"] == 3 * 8 * 14 and last["tokens"] == 3 * 8 * (14 + 12)
    assert last["flops"] - first["flops"] == pytest.approx(other["flops"])
