"""The authors' own numbers: what the official code of RADD and SMDM makes of tiny random weights.

Everything is float32 on the CPU, from the files as published. The tolerances are those of the
READMEs beside them.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, predict, score_entropy
from plain import DEFAULTS

import config as settings
import diffusion
import sample
import samplers
import train
from data import examples
from data.tokenizer import Char
from lib import optim, philox
from model import make_network
from run import checkpoint, formats, resume


def close(measured, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(measured, expected, atol=atol, rtol=rtol, check_dtype=False)


def plain_ce(model, x, x0):
    """Cross-entropy at every position, with nothing clever: x, x0 (B, L) -> (B, L)."""
    return F.cross_entropy(model(x).transpose(1, 2), x0, reduction="none")


def gradients(model, format):
    """The gradients under the names of a format."""
    gradient_of = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: g.double()
        for name, g in formats.to_format(gradient_of, model.config, format).items()
        if "inv_freq" not in name
    }


# ---- RADD ----------------------------------------------------------------------------------------


@pytest.fixture
def radd(shared):
    """(model, expected)"""
    folder = shared("fixtures/radd_tiny")
    return checkpoint.load(folder)[0], torch.load(folder / "expected.pt", weights_only=True)


@torch.no_grad()
def test_radd_outputs_are_the_published_ones(radd):
    model, expected = radd
    assert len(expected["forward"]) == 5 and model.mask_id == expected["forward"][0]["mask_token"]
    for case in expected["forward"]:
        x, x0 = case["x"].long(), case["x0"].long()
        logits = model(x)  # (B, L, V)
        log_p = logits.log_softmax(-1)
        close(logits.double().logsumexp(-1), case["logits_lse"], atol=2e-5)
        close(-(log_p.double().exp() * log_p).sum(-1), case["entropy"], atol=2e-5)
        close(log_p.gather(-1, x0[..., None]).squeeze(-1), case["log_prob_of_x0"], atol=2e-5)
        assert torch.equal(logits.argmax(-1), case["argmax"].long())
        if "logits" in case:
            whole = model.unembed(model.hidden(x))  # (B, L, V + 1), with the row that nothing uses
            close(whole, case["logits"][..., case["columns"].long()], atol=2e-5)
            close(torch.cat([log_p, whole[..., 60:]], dim=-1), case["log_probs"], atol=2e-5)


def radd_draw(name, case):
    """diffusion.py's corruption from the official code's draws: (mask (B, L), weight (B,))."""
    if name == "k_DCE":
        L = case["ranks"].shape[1]
        return diffusion.draw_mask("any_order", (case["k"] - 0.5) / L, case["ranks"].float())
    if name == "lambda_DCE":
        return diffusion.draw_mask("lambda_dce", case["lam"], case["r"])
    return diffusion.draw_mask(
        "t_dce", case["t"], case["r"], lambda t: diffusion.loglinear(t, eps=1e-3)
    )


@pytest.mark.parametrize("name", ["t_DSE", "t_DCE", "lambda_DCE", "k_DCE"])
def test_radd_losses_at_given_masks_are_the_published_ones(radd, name):
    model, expected = radd
    case = expected["losses"][name]
    x0 = case["x0"].long()
    mask, weight = radd_draw(name, case)
    assert torch.equal(mask, case["masked"])
    assert torch.equal(torch.where(mask, model.mask_id, x0), case["xt"].long())
    _, nats = diffusion.nelbo(model, x0, mask, weight)
    if (
        name == "t_DCE"
    ):  # the scalar inside the logarithm of eq. 3.5 has no gradient, and we leave it out
        nats = nats + weight * mask.sum(1) * torch.expm1(case["sigma"]).log()
    close(nats, case["loss"], rtol=5e-6)


def test_radd_score_entropy_of_the_network_is_the_published_one(radd):
    model, expected = radd
    case = expected["losses"]["t_DSE"]
    x0 = case["x0"].long()
    m, dm = (z[:, None] for z in diffusion.loglinear(case["t"].double(), eps=1e-3))  # (B, 1) each
    log_score = (
        model(case["xt"].long()).double().log_softmax(-1) + ((1 - m) / m).log()[..., None]
    )  # (B, L, V)
    nats = (score_entropy(log_score, x0, m, dm) * case["masked"]).sum(1)  # (B,)
    close(nats, case["loss"], rtol=5e-6)
    close((dm / m)[:, 0], case["dsigma"] / torch.expm1(case["sigma"]), rtol=1e-5)


def test_radd_gradients_are_the_published_ones(radd):
    model, expected = radd
    case = expected["losses"]["lambda_DCE"]
    loss, _ = diffusion.nelbo(model, case["x0"].long(), case["masked"], 1 / case["lam"])
    (loss / len(case["x0"])).backward()
    ours = gradients(model, "radd")
    assert ours.keys() == case["grad_norm"].keys() == case["grad_sum"].keys()
    for name, g in ours.items():
        close(g.norm(), torch.tensor(case["grad_norm"][name]), rtol=5e-6)
        close(g.sum(), torch.tensor(case["grad_sum"][name]), atol=1e-6 * float(g.abs().sum()))


def test_radd_update_rates_are_the_published_ones(radd):
    rows = radd[1]["update_rate"]
    assert len(rows) == 136
    schedules = {
        "loglinear": lambda t: diffusion.loglinear(t, eps=1e-3),
        "geometric": diffusion.geometric,
    }
    for row in rows:
        t = torch.tensor(row["t"], dtype=torch.float64)
        s = t - (1 - row["eps"]) / row["steps"]
        tweedie = row["method"] == "tweedie"
        unmask_prob = samplers.ancestral_prob if tweedie else samplers.euler_prob
        p = float(unmask_prob(schedules[row["noise"]], t, s))
        if row["noise"] == "loglinear":  # eq. D.16
            assert p == pytest.approx(row["rate"], rel=1.1e-4)
            assert p == pytest.approx(row["dt_over_t"], rel=1e-9)
        elif row["method"] == "euler" or row["i"] < row["steps"] - 2:
            # a rate may pass 1, a probability may not
            assert p == pytest.approx(min(row["rate"], 1.0), rel=2e-4)
        else:  # theirs is float32 and cancels
            assert p == pytest.approx(row["rate"], abs=2.3e-4)


# ---- SMDM ----------------------------------------------------------------------------------------

MASK = 64


@pytest.fixture
def smdm(shared):
    """smdm(KIND) -> a fresh model, KIND mdm or ar; smdm() -> expected"""
    folder = shared("fixtures/smdm_tiny")

    def load(kind=None):
        if kind:
            return checkpoint.load(folder / f"{kind}.safetensors")[0]
        return torch.load(folder / "expected.pt", weights_only=True)

    return load


def as_published(measured, expected, rel=1e-4):
    assert measured == pytest.approx(expected, rel=rel, abs=1e-4)


def check_gradients(model, published):
    """published: {name: [norm, sum]}"""
    ours = gradients(model, "smdm")
    assert ours.keys() == published.keys()
    for name, g in ours.items():
        norm, total = published[name]
        as_published(float(g.norm()), norm)
        assert float(g.sum()) == pytest.approx(total, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mdm", "ar"])
def test_smdm_logits_are_the_published_ones_with_rounded_and_exact_rotary_tables(smdm, kind):
    model, cases = smdm(kind), smdm()["forward"][kind]
    assert (
        model.mask_id == MASK == smdm()["mask"]
        and model.vocab_size == smdm()["vocab"]
        and len(cases) == 6
    )
    exact = make_network(model.config | {"rotary_bf16": False}).eval()
    exact.load_state_dict(model.state_dict())
    for case in cases:
        kept = slice(case["first_position_kept"], None)
        close(model(case["x"].long())[:, kept], case["logits"], atol=1e-3)
        close(exact(case["x"].long())[:, kept], case["logits_exact_rotary"], atol=1e-3)


def micro_batch(case, i, length=24):
    """Micro-batch i of pre-training, cut to `length`: (x0 (B, L), mask (B, L), p (B,))."""
    x0 = case["tokens"][i, :, :length].long()
    p = (1 - case["eps"]) * case["u"][i] + case["eps"]  # (B,)
    return x0, case["r"][i, :, :length] < p[:, None], p


def pretraining_loss(kind, case):
    """loss(model, i) of micro-batch i, in nats per token."""
    run = case[kind]
    cut = (
        [n if c < run["ratio"] else 24 for n, c in zip(run["lengths"], run["coins"], strict=True)]
        if "coins" in run
        else None
    )

    def loss(model, i):
        if kind == "ar":
            return plain_ce(
                model, case["tokens"][i, :, :-1].long(), case["tokens"][i, :, 1:].long()
            ).mean()
        x0, mask, p = micro_batch(case, i, cut[i] if cut else 24)
        return diffusion.nelbo(model, x0, mask, 1 / p)[0] / x0.numel()

    return loss


def test_smdm_first_batch_is_masked_as_published(smdm):
    case = smdm()["pretraining"]
    x0, mask, p = micro_batch(case, 0)
    first = case["first_batch"]
    close(p, first["p_mask"])
    assert torch.equal(mask, first["masked"]) and torch.equal(
        torch.where(mask, MASK, x0), first["noisy"].long()
    )


@pytest.mark.parametrize("kind", ["mdm", "ar", "mdm_random_length"])
def test_smdm_three_steps_of_pretraining_are_the_published_ones(smdm, kind):
    model, case = smdm("ar" if kind == "ar" else "mdm"), smdm()["pretraining"]
    run, loss_of = case[kind], pretraining_loss(kind, case)
    recipe = {
        "optimizer": "adamw",
        "learning_rate": case["peak_lr"],
        "min_lr": case["min_lr"],
        "decay_all": True,
    }
    recipe |= {
        "weight_decay": case["weight_decay"],
        "warmup_iters": case["warmup_iters"],
        "max_iters": case["total_iters"],
    }
    recipe |= {
        "beta1": case["betas"][0],
        "beta2": case["betas"][1],
        "lr_decay": "cosine",
        "decay_start": 0.0,
    }
    (optimizer,) = optim.make_optimizers(recipe, model)
    for i in range(6):
        step, warm = i // 2, case["warmup_iters"]
        lr = (
            case["peak_lr"] * i / warm if i < warm else optim.learning_rate(i, recipe)
        )  # theirs counts micro-batches
        loss = loss_of(model, i)
        as_published(loss.item(), run["losses"][i])
        (loss / case["accumulate"]).backward()
        if i % 2 == 0:
            continue
        assert lr == pytest.approx(run["lr_of_step"][step], rel=1e-6)
        if step == 0:
            check_gradients(model, run["grad_norm_and_sum"])
        as_published(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), case["grad_clip"])),
            run["grad_norm_of_step"][step],
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    after = formats.to_format(model.state_dict(), model.config, "smdm")
    assert after.keys() == run["weight_sum_after"].keys()
    for name, w in after.items():
        assert float(w.double().sum()) == pytest.approx(run["weight_sum_after"][name], abs=1e-3)


@pytest.mark.parametrize(
    "name",
    ["sft", "sft_standard_cfg_prompt_dropped", "sft_standard_cfg_prompt_kept", "gsm8k", "reverse"],
)
def test_smdm_finetuning_losses_and_gradients_are_the_published_ones(smdm, name):
    model, case = smdm("mdm"), smdm()["finetuning"]
    width = 256 if name == "gsm8k" else int(case["length"].max())
    x0 = case["data"][:, :width].long()  # (B, L)
    p = (1 - case["eps"]) * case["u"][:, None] + case["eps"]  # (B, 1)
    prompt = torch.arange(width) < case["input_length"][:, None]  # (B, L)
    wanted = torch.ones_like(prompt) if name == "reverse" else ~prompt  # (B, L)
    mask = wanted & (case["r"][:, :width] < p)  # (B, L)
    x = torch.where(mask | prompt if name.endswith("dropped") else mask, MASK, x0)  # (B, L)
    assert torch.equal(x, case[name]["network_input"].long())
    loss = (plain_ce(model, x, x0) / p)[mask].sum() / wanted.sum()
    loss.backward()
    as_published(loss.item(), case[name]["loss"])
    as_published(
        float(torch.nn.utils.get_total_norm(w.grad for w in model.parameters())),
        case[name]["grad_norm"],
    )
    check_gradients(model, case[name]["grad_norm_and_sum"])


def test_smdm_causal_finetuning_loss_and_gradients_are_the_published_ones(smdm):
    model, case = smdm("ar"), smdm()["finetuning"]
    data, width = case["data"].long(), int(case["length"].max())
    place = torch.arange(1, width)  # of the token predicted
    answer = (place >= case["input_length"][:, None]) & (
        place < case["length"][:, None]
    )  # (B, L - 1)
    loss = plain_ce(model, data[:, : width - 1], data[:, 1:width])[answer].mean()
    loss.backward()
    as_published(loss.item(), case["sft_ar"]["loss"])
    as_published(
        float(torch.nn.utils.get_total_norm(w.grad for w in model.parameters())),
        case["sft_ar"]["grad_norm"],
    )
    check_gradients(model, case["sft_ar"]["grad_norm_and_sum"])


def official_examples(case, folder, protected=True, width=0, skip=0):
    """The official batch as examples of ours, in its order, with its 64 tokens and its eos."""
    letters = "".join(chr(0x4E00 + i) for i in range(63))
    text = Char(letters[:2] + "\0" + letters[2:])
    assert examples.eos_of(text) == case["eos"] and text.vocab_size == MASK
    prompts = case["input_length"].tolist() if protected else [0] * 4
    pieces = zip(case["data"].tolist(), prompts, case["length"].tolist(), strict=True)
    examples.prepare(
        folder, [("train", "", row[:a], row[a : b - 1]) for row, a, b in pieces], text, width
    )
    dataset = examples.Examples(folder, "train", skip=skip)
    dataset.index = lambda first, position: np.asarray(position)
    return dataset


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sft", {}),
        ("sft_standard_cfg_prompt_dropped", {"prompt_drop": 1.0}),
        ("sft_standard_cfg_prompt_kept", {"prompt_drop": 0.4}),  # a coin of 0.5
        ("gsm8k", {}),
        ("reverse", {}),
    ],
)
def test_smdm_finetuning_batches_and_losses_are_those_of_train_py(
    smdm, name, keys, monkeypatch, tmp_path
):
    model, case = smdm("mdm"), smdm()["finetuning"]
    dataset = official_examples(
        case, tmp_path, protected=name != "reverse", width=256 * (name == "gsm8k")
    )
    p = (1 - case["eps"]) * case["u"] + case["eps"]  # (B,)
    monkeypatch.setattr(diffusion, "stratified", lambda *_: p)
    monkeypatch.setattr(
        philox,
        "uniforms",
        lambda seed, step, place, n: case["r"][:, :n] if n > 1 else torch.full((4, 1), 0.5),
    )
    config = {
        "objective": "lambda_dce",
        "attention": "full",
        "schedule": "loglinear",
        "loss_weight": "bound",
        "mask_rate": "uniform",
        "prompt_drop": 0.0,
    }
    config |= {"seed": 0, "batch_size": 4} | keys
    batch = train.make_batch(config, dataset, 0, range(4))
    x = torch.where(batch.mask, MASK, batch.x0)  # (B, L)
    assert torch.equal(x, case[name]["network_input"].long())
    loss = diffusion.Loss(model, "lambda_dce")(**batch.inputs())[0] / batch.n_tokens
    loss.backward()
    as_published(loss.item(), case[name]["loss"])
    as_published(
        float(torch.nn.utils.get_total_norm(w.grad for w in model.parameters())),
        case[name]["grad_norm"],
    )
    check_gradients(model, case[name]["grad_norm_and_sum"])


def test_smdm_causal_finetuning_losses_and_gradients_are_those_of_train_py(smdm, tmp_path):
    """The official code begins with the data's first token: a start token of each row's own."""
    model, case = smdm("ar"), smdm()["finetuning"]
    dataset, total = official_examples(case, tmp_path, skip=1), 0.0
    config = {"objective": "ar", "attention": "causal", "prompt_drop": 0.0}
    config |= {"seed": 0, "batch_size": 4}
    for i in range(4):
        model.start_id = int(case["data"][i, 0])
        batch = train.make_batch(config, dataset, 0, range(i, i + 1))
        loss = diffusion.Loss(model, "ar")(**batch.inputs())[0] / batch.n_tokens
        loss.backward()
        total += loss.item()
    as_published(total, case["sft_ar"]["loss"])
    as_published(
        float(torch.nn.utils.get_total_norm(w.grad for w in model.parameters())),
        case["sft_ar"]["grad_norm"],
    )
    check_gradients(model, case["sft_ar"]["grad_norm_and_sum"])


# ---- SMDM: likelihoods of an answer, guided or not -----------------------------------------------


def answer_ce(model, x, prefix, target, cfg_scale):
    """Guided cross-entropy of the target at its positions: x (B, L), target (l,) -> (B, l)."""
    B, L = x.shape
    place = torch.arange(L)
    cond = place < len(prefix)  # (L,)
    wanted = ~cond & (place < len(prefix) + len(target))  # (L,)
    masked_idx = wanted.expand(B, L).flatten().nonzero().flatten()  # (B*l,)
    logits = predict(model, x, masked_idx, cond.expand(B, L), cfg_scale)  # (B*l, V)
    return F.cross_entropy(logits, target.repeat(B), reduction="none").view(B, -1)


def monte_carlo(model, prefix, target, cfg_scale, u0, r):
    """Mean over t_j = (u0 + j/b) mod 1 of the cross-entropy of masked target tokens over t.

    Returns (nats, t (b,), mask (b, l)).
    """
    b = len(r)
    t = (u0 + torch.arange(b) / b) % 1  # (b,)
    mask = r[:, len(prefix) :] < t[:, None]  # (b, l)
    x = torch.cat([prefix.expand(b, -1), torch.where(mask, MASK, target)], dim=1)  # (b, L)
    return (
        float(((answer_ce(model, x, prefix, target, cfg_scale) * mask).sum(1) / t).mean()),
        t,
        mask,
    )


def chain_rule(model, prefix, target, cfg_scale, padding=0):
    """-log p, one target token after the other, all that follows masked."""
    nats = 0.0
    for i in range(len(target)):
        masks = torch.full((len(target) - i + padding,), MASK)
        x = torch.cat([prefix, target[:i], masks])[None]  # (1, L)
        nats += float(answer_ce(model, x, prefix, target, cfg_scale)[0, i])
    return nats


@pytest.fixture
def likelihood(smdm):
    """(expected, prefix, target)"""
    case = smdm()["likelihood"]
    return case, case["prefix"].long(), case["target"].long()


@torch.no_grad()
def test_smdm_guidance_combines_logits_as_published(smdm, likelihood):
    model, (case, prefix, _) = smdm("mdm"), likelihood
    case = case["guidance"]
    x, dropped = case["x"].long(), case["x_prompt_masked"].long()
    cond = torch.arange(x.shape[1])[None] < len(prefix)  # (1, L)
    assert torch.equal(x.masked_fill(cond, MASK), dropped)
    close(model(x), case["logits"], atol=1e-3)
    close(model(dropped), case["logits_prompt_masked"], atol=1e-3)
    assert case["combined"].keys() == {0.0, 0.5, 1.6}
    for w, combined in case["combined"].items():
        close(predict(model, x, torch.arange(x.numel()), cond, w), combined[0], atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 1.6])
def test_smdm_likelihoods_of_an_answer_are_the_published_ones(smdm, likelihood, cfg_scale):
    model, (case, prefix, target) = smdm("mdm"), likelihood
    rounds = [
        monte_carlo(model, prefix, target, cfg_scale, u0, r)
        for u0, r in zip(*(case["mc"][k] for k in ("u0", "r")), strict=True)
    ]
    _, t, mask = rounds[0]
    close(t, case["mc"]["first_round"]["p_mask"], atol=1e-6)
    assert (
        torch.equal(mask, case["mc"]["first_round"]["masked"]) and len(mask) == case["mc"]["batch"]
    )
    assert sum(nats for nats, _, _ in rounds) / 2 == pytest.approx(case["mc"][cfg_scale], abs=1e-4)
    assert chain_rule(model, prefix, target, cfg_scale) == pytest.approx(
        case["chain_rule"][cfg_scale], abs=1e-4
    )


@torch.no_grad()
def test_smdm_likelihood_padded_with_masks_is_the_published_one(smdm, likelihood):
    model, (case, prefix, target) = smdm("mdm"), likelihood
    nats = chain_rule(model, prefix, target, 0.0, padding=2048 - len(prefix) - len(target))
    assert nats == pytest.approx(case["chain_rule_padded_to_2048"], abs=1e-4)


@torch.no_grad()
def test_smdm_causal_likelihood_is_the_published_one(smdm, likelihood):
    model, (case, prefix, target) = smdm("ar"), likelihood
    logits = model(torch.cat([prefix, target])[None, :-1])[0, len(prefix) - 1 :]  # (l, V)
    assert F.cross_entropy(logits, target, reduction="sum").item() == pytest.approx(
        case["ar"]["nll"], abs=1e-4
    )
    assert torch.equal(logits.argmax(-1), case["ar"]["argmax"].long())


# ---- SMDM: sampling ------------------------------------------------------------------------------


def watched(model, x, **keys):
    """sample.sample, and what the network read at each call: (tokens (1, L), [(L,), ...])."""
    seen, hidden = [], model.hidden
    model.hidden = lambda z, masked_idx: seen.append(z[0]) or hidden(z, masked_idx)
    return sample.sample(model, x, **keys)[0], seen


@pytest.mark.parametrize("cfg_scale", [0.0, 1.1])
def test_smdm_greedy_answer_comes_token_by_token_as_published(smdm, likelihood, cfg_scale):
    model, (case, prefix, target) = smdm("mdm"), likelihood
    case = case["greedy_answer"][cfg_scale]
    x = F.pad(prefix, (0, len(target)), value=MASK)[None]  # (1, L)
    tokens, seen = watched(
        model, x, sampler="confidence", steps=len(target), temperature=0, cfg_scale=cfg_scale
    )
    assert torch.equal(torch.stack([*seen, tokens[0]]), case["states"].long())
    assert torch.equal(tokens[0, len(prefix) :], case["answer"].long())


def moves(states):
    """The states without those that repeat the one before."""
    return [x for i, x in enumerate(states) if i == 0 or not torch.equal(x, states[i - 1])]


@pytest.mark.parametrize("name", ["greedy", "greedy_cfg_0.8", "greedy_more_steps_than_tokens"])
def test_smdm_greedy_sampling_goes_step_by_step_as_published(smdm, name):
    case = smdm()["sampling"][name]
    states = case["states"][:, 0].long()  # (steps + 1, L)
    keys = {
        "sampler": "smdm_greedy",
        "steps": case["steps"],
        "temperature": 0,
        "cfg_scale": case["cfg"],
    }
    tokens, seen = watched(smdm("mdm"), states[:1], **keys)
    t = torch.linspace(1, 1e-5, case["steps"] + 1)  # its last bit is that of the processor
    close(t, case["timesteps"], rtol=3e-7)
    assert (
        torch.equal(states[0, :6], case["prompt"][0].long()) and states.shape[1] == case["length"]
    )
    counts = [n for n in case["revealed"] if n]
    assert counts == samplers.smdm_counts(case["length"] - 6, case["steps"])
    assert torch.equal(torch.stack([*seen, tokens[0]]), torch.stack(moves(states)))


@torch.no_grad()
def test_smdm_greedy_sampling_of_a_batch_ranks_all_its_rows_together(smdm):
    """We rank each sequence alone: none depends on its neighbours; the rest of it is theirs."""
    model, case = smdm("mdm"), smdm()["sampling"]["greedy_batch_of_two_shares_one_ranking"]
    states = case["states"].long()  # (steps + 1, 2, L)
    assert (
        torch.equal(states[0, :, :6], case["prompt"].long()) and states.shape[2] == case["length"]
    )
    masked = (states[0] == MASK).view(1, -1)  # (1, 2L): both as one sequence
    policy = samplers.smdm_greedy(masked, {"steps": case["steps"], "seed": 0})
    assert samplers.smdm_counts(int(masked.sum()), case["steps"]) == case["revealed"]
    for i, (x, after) in enumerate(itertools.pairwise(states)):
        masked_idx = (x == MASK).flatten().nonzero().flatten()  # (n,)
        logits = predict(model, x, masked_idx, x != MASK, case["cfg"])  # (n, V)
        token, p = sample.categorical(logits, None, 0, 0, 1.0)  # (n,) each
        confidence = p.new_full((1, x.numel()), -1.0)  # (1, 2L)
        confidence[0, masked_idx] = p
        keep = policy.accept([0], [i], confidence, confidence)[0, masked_idx]  # (n,)
        y = x.flatten().index_put((masked_idx[keep],), token[keep])  # (2L,)
        assert torch.equal(y.view_as(x), after)


def gumbel(logits, noise, temperature=1.0):
    """The official sampler's weights, whose largest is the draw: noise uniform, all in float64."""
    return logits.double().exp() / (-noise.double().log()) ** temperature


def test_smdm_gumbel_weights_are_the_published_ones(smdm):
    case = smdm()["sampling"]["gumbel"]
    for temperature in (1, 0.1):
        close(
            gumbel(case["logits"], case["noise"], temperature),
            case[f"temperature_{temperature}"],
            rtol=1e-9,
        )


@torch.no_grad()
def test_smdm_ancestral_sampling_with_guidance_goes_step_by_step_as_published(smdm):
    """With the official noise for ours: guidance and unmasking are those of our sampler."""
    model, case = smdm("mdm"), smdm()["sampling"]["ordinary_cfg_0.5"]
    x, t = case["states"][0].long(), case["timesteps"].double()
    cond = x != MASK  # (1, L)
    assert torch.equal(x[cond], case["prompt"][0].long()) and x.shape[1] == case["length"]
    close(torch.linspace(1, 1e-5, case["steps"] + 1), case["timesteps"])
    for i in range(case["steps"]):
        masked_idx = (x == MASK).flatten().nonzero().flatten()  # (n,)
        p = samplers.ancestral_prob(diffusion.loglinear, t[i], t[i + 1])
        due = case["uniform_of_step"][i] < (p if i + 1 < case["steps"] else 1.0)  # (n,)
        logits = predict(model, x, masked_idx[due], cond, case["cfg"])
        weight = gumbel(logits, case["noise_of_step"][i], case["temperature"])
        x.view(-1)[masked_idx[due]] = weight.argmax(-1)
        assert torch.equal(x, case["states"][i + 1].long())


def test_smdm_causal_greedy_tokens_are_the_published_ones(smdm):
    model, case = smdm("ar"), smdm()["sampling"]["ar_greedy"]
    tokens = case["tokens"].long()  # (1, L)
    model.start_id = int(tokens[0, 0])  # the official call gives the first token, no BOS before it
    missing = tokens.shape[1] - case["prompt"].shape[1]
    x = F.pad(case["prompt"][:, 1:].long(), (0, missing), value=MASK)  # (1, L - 1)
    assert torch.equal(sample.sample(model, x, temperature=0)[0], tokens[:, 1:])


def test_smdm_initialisation_has_the_published_deviations(smdm):
    case = smdm()["initialisation"]
    torch.manual_seed(0)
    sizes = {"n_embd": case["n_embd"], "n_layer": case["n_layer"], "vocab_size": 64}
    model = make_network(DEFAULTS | formats.FIXED["smdm"] | sizes)
    exported = formats.to_format(model.state_dict(), model.config, "smdm")
    assert case["std"].keys() == {name for name, w in exported.items() if w.dim() == 2}
    for name, std in case["std"].items():
        small = name.endswith(("attn.proj.weight", "w3.weight"))
        formula = case["std_by_formula"][
            "attn.proj, w3" if small else "embedding, head, attn.attn, w1, w2"
        ]
        assert formula == pytest.approx(1 / (16 * 3) if small else math.sqrt(2 / (5 * 256)))
        assert float(exported[name].std()) == pytest.approx(
            formula, rel=0.02
        ) and std == pytest.approx(formula, rel=0.02)


# ---- Presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters", "tokens"),
    [
        ("radd_small", 50257, 162_265_682 - 769, 210e9),  # less the row that nothing uses
        ("radd_medium", 50257, 405_191_762 - 1025, 210e9),
        ("smdm_170m", 32000, 219_050_496, 1e20 / (6 * 169.898e6)),
    ],
)
def test_a_preset_trains_the_published_model_on_so_many_tokens(
    name, vocab_size, parameters, tokens
):
    config = resume.with_size(settings.parse([str(ROOT / f"configs/{name}.py")], *train.MODULES))
    resume.check(config)
    with torch.device("meta"):
        model = make_network(config | {"vocab_size": vocab_size})
    assert sum(w.numel() for w in model.parameters()) == parameters
    assert config["max_iters"] * config["batch_size"] * config["block_size"] == pytest.approx(
        tokens, rel=2e-3
    )


def test_another_size_of_the_table_is_one_word_after_the_preset():
    words = [str(ROOT / "configs/smdm_170m.py"), "--size=336M"]
    config = resume.with_size(settings.parse(words, *train.MODULES))
    resume.check(config)
    with torch.device("meta"):
        model = make_network(config | {"vocab_size": 32000})
    assert sum(w.numel() for w in model.parameters()) == 401_123_328
