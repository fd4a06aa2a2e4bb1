"""One sentence, token by token: terms of a chain rule that add up; and the data of a checkpoint."""

import itertools

import pytest
import torch
from conftest import L, Table, V, random_logits

import config as settings
import diffusion
import evaluate
import model as network
import train
from config import UserError
from data import writer
from data.tokenizer import Char
from evaluate import answer_nats, estimate, token_nats
from run import checkpoint

IDS = [2, 0, 1, 1]
SHAPE = {"n_layer": 2, "n_head": 1, "n_embd": 8, "block_size": 9, "vocab_size": V}
TEXT = "the list is sorted.\n"


def trained(attention):
    """A network of that attention whose head is not zero."""
    torch.manual_seed(3)
    return network.make_network(network.DEFAULTS | SHAPE | {"attention": attention}).eval()


@pytest.mark.parametrize("order", ["left_to_right", "right_to_left"])
def test_a_token_costs_what_it_does_given_those_before_it_in_the_order(order):
    model, (nats,) = (
        Table(random_logits()),
        token_nats(Table(random_logits()), IDS, estimator=order),
    )
    for i in range(L):
        x = torch.tensor([IDS])
        x[0, i:] = V
        if order == "right_to_left":
            x = torch.tensor([IDS])
            x[0, : i + 1] = V
        wanted = -model(x)[0, i].log_softmax(-1)[IDS[i]].item()
        assert nats[i].item() == pytest.approx(wanted, rel=1e-6)


NAMES = ("left_to_right", "right_to_left", "chain", "any_order")
CHAINS = [("causal", "left_to_right"), *itertools.product(("full", "order"), NAMES)]


@pytest.mark.parametrize("prompt", [[], [1, 1, 0]])
@pytest.mark.parametrize(("attention", "name"), CHAINS)
def test_the_tokens_of_a_text_cost_together_what_the_text_does(attention, name, prompt):
    model, ids = trained(attention), [0, 2, 1, 1, 2]
    nats = token_nats(model, ids, prompt, estimator=name, draws=6, seed=4)  # (draws, 5)
    exact = attention == "causal" or "to" in name
    assert nats.shape == (1 if exact else 6, 5) and (nats > 0).all()
    by_rows = name == "any_order" and attention != "order"
    estimator = "chain" if by_rows else name  # of the same noise
    requests = [(torch.tensor(prompt), torch.tensor(ids))]
    wanted = answer_nats(model, requests, estimator=estimator, draws=6, seed=4).item()
    assert nats.sum(1).mean().item() == pytest.approx(wanted, rel=1e-5)
    parts = token_nats(model, ids, prompt, estimator=name, draws=6, seed=4, batch_size=4)
    assert torch.allclose(parts, nats, rtol=1e-5)


def test_a_token_behind_a_prompt_costs_what_it_does_given_the_prompt_too():
    model = Table(random_logits())
    (nats,) = token_nats(model, IDS[2:], IDS[:2], estimator="left_to_right")  # (2,)
    for i in (2, 3):
        x = torch.tensor([[*IDS[:i], *[V] * (L - i)]])  # (1, L)
        assert nats[i - 2].item() == pytest.approx(
            -model(x)[0, i].log_softmax(-1)[IDS[i]].item(), rel=1e-6
        )


@pytest.mark.parametrize("name", ["left_to_right", "chain"])
def test_an_order_network_tells_all_tokens_of_a_draw_in_one_pass(name, monkeypatch):
    model, ids, passed = trained("order"), torch.tensor([0, 2, 1, 1, 2]), []
    order_nll = diffusion.order_nll
    monkeypatch.setattr(diffusion, "order_nll", lambda *a: passed.append(a) or order_nll(*a))
    nats = token_nats(model, ids, estimator=name, draws=6, seed=4, batch_size=4)  # (draws, 5)
    assert [len(x0) for _, x0, _ in passed] == ([1] if name == "left_to_right" else [4, 2])
    orders = torch.cat([order for *_, order in passed])  # (draws, 5)
    for terms, order in zip(nats, orders, strict=True):  # each term by a pass of its own
        for k, i in enumerate(order):
            weight = torch.zeros(1, 5).index_fill(1, torch.tensor([k]), 1.0)
            alone = order_nll(model, ids[None], order[None], weight)[0].item()
            assert terms[i].item() == pytest.approx(alone, rel=1e-5)


def test_what_has_no_tokens_of_its_own_is_refused():
    for name in ("lambda_dce", "t_dce", "orders"):
        with pytest.raises(UserError, match=f"{name} has no tokens' nats; try chain"):
            token_nats(Table(random_logits()), IDS, estimator=name)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (token_nats, {"schedule": "cosine"}),
        (lambda model, ids, **keys: answer_nats(model, [([], ids)], **keys), {"strata": 2}),
        (lambda model, ids, **keys: estimate(model, [ids], **keys), {"sequences": 2}),
    ],
)
def test_an_option_that_a_function_does_not_read_is_refused_with_those_it_reads(call, options):
    (key,) = options
    with pytest.raises(UserError, match=f"unknown key {key}; there is: batch_size, draws, "):
        call(Table(random_logits()), IDS, **options)


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a run's folder, the folder that it learnt from)"""
    folder = tmp_path_factory.mktemp("run")
    data, out = str(folder / "data"), str(folder / "out")
    tokenizer = Char("".join(sorted(set(TEXT))))
    writer.prepare(data, [("train", TEXT * 9), ("val", TEXT * 3)], tokenizer)
    keys = {"data": data, "out_dir": out, "max_iters": 2, "eval_interval": 2, "batch_size": 2}
    keys |= {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 20, "device": "cpu"}
    words = [f"--{key}={value}" for key, value in keys.items()]
    train.main(settings.parse(words, *train.MODULES))
    return out, data


def evaluated(*words):
    words = ["--device=cpu", *words]
    return evaluate.main(settings.parse(words, *evaluate.MODULES))


def test_a_sentence_is_scored_and_it_is_said_how(run, tmp_path, capsys):
    capsys.readouterr()
    result = evaluated(f"--ckpt={run[0]}", "--text=is sorted", "--draws=4")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 9 + 3 and result["texts"] == list("is sorted")
    assert out[0].split()[0] == "nats" and out[1].endswith("'i'") and out[3].endswith("' '")
    assert sum(result["nats"]) == pytest.approx(result["total"])
    assert "in all +- " in out[-2] and "upper bound by any_order, 4 orders" in out[-1]
    (tmp_path / "text.txt").write_text("is sorted\n")
    options = [f"--text=FILE:{tmp_path / 'text.txt'}", "--estimator=left_to_right"]
    assert evaluated(f"--ckpt={run[0]}", *options)["texts"] == list("is sorted")
    assert "exact along the order left_to_right" in capsys.readouterr().out


def test_a_sentence_is_scored_given_a_prompt_that_is_not(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("the list \n")
    words = [f"--ckpt={run[0]}", "--text=is", "--estimator=left_to_right"]
    result = evaluated(*words, f"--prompt=FILE:{tmp_path / 'prompt.txt'}")
    said = capsys.readouterr().out.splitlines()
    assert result["texts"] == ["i", "s"] and len(said) == 2 + 3 and len(result["prompt"]) == 9
    assert "-log p(text | 'the list ', 9 tokens, not scored): exact" in said[-1]
    whole = evaluated(f"--ckpt={run[0]}", "--text=the list is", "--estimator=left_to_right")
    assert "-log p(text): exact" in capsys.readouterr().out
    assert result["nats"] == pytest.approx(whole["nats"][9:], rel=1e-5)
    with pytest.raises(UserError, match="the text to score is empty: give --text="):
        evaluated(f"--ckpt={run[0]}", "--prompt=the")
    with pytest.raises(
        UserError, match=r"from 1 to 2 tokens \(block_size, after a prompt of 18.*3"
    ):
        evaluated(f"--ckpt={run[0]}", "--prompt=" + "the " * 4 + "is", "--text=is.")


@pytest.mark.parametrize(
    ("text", "says"),
    [("é", "character 'é' is not among"), ("the " * 6, "from 1 to 20 tokens .* not 24")],
)
def test_a_sentence_that_cannot_be_read_is_one_line(text, says, run):
    with pytest.raises(UserError, match=says):
        evaluated(f"--ckpt={run[0]}", f"--text={text}")


KEYS_OF_DATA = ["data=x", "split=val", "sequences=2", "block_size=8", "protocol=radd"]
KEYS_OF_DATA += ["precision=0.1", "strata=2", "schedule=cosine"]


@pytest.mark.parametrize("word", KEYS_OF_DATA)
def test_a_key_that_only_data_use_is_refused_with_a_text(word, run, tmp_path):
    key, _, value = word.partition("=")
    with pytest.raises(UserError, match=f"^{key} does not go with --text; leave it out$"):
        evaluated(f"--ckpt={run[0]}", "--text=is", f"--{word}")
    preset = tmp_path / "preset.py"
    preset.write_text(repr({key: float(value) if value[0].isdigit() else value}))
    assert evaluated(str(preset), f"--ckpt={run[0]}", "--text=is", "--draws=2")["total"] > 0


def test_a_causal_network_refuses_an_estimator_that_it_does_not_use(run, tmp_path):
    out, few = str(tmp_path / "out"), ["--sequences=2", "--batch_size=4"]
    keys = {"data": run[1], "out_dir": out, "objective": "ar", "max_iters": 1, "batch_size": 2}
    keys |= {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 20, "device": "cpu"}
    train.main(settings.parse([f"--{key}={keys[key]}" for key in keys], *train.MODULES))
    for name in ("lambda_dce", "any_order", "right_to_left"):
        with pytest.raises(UserError, match="estimator has no say, for this network is causal"):
            evaluated(f"--ckpt={out}", f"--estimator={name}", *few)
    exact = evaluated(f"--ckpt={out}", *few)
    same = evaluated(f"--ckpt={out}", "--estimator=left_to_right", *few)
    assert same["nats_per_token"] == exact["nats_per_token"] and exact["estimator"] == "ar"


def test_a_checkpoint_is_evaluated_on_what_it_learnt_from(run, tmp_path):
    few = ["--draws=4", "--sequences=2"]
    own = evaluated(f"--ckpt={run[0]}", *few)
    named = evaluated(f"--ckpt={run[0]}", f"--data={run[1]}", *few)
    assert own["data"] == run[1] and own["nats_per_token"] == named["nats_per_token"]
    checkpoint.export(run[0], tmp_path / "export", "nanomdm")
    with pytest.raises(UserError, match="does not say what it learnt from; give --data=FOLDER"):
        evaluated(f"--ckpt={tmp_path / 'export'}", *few)


def test_weights_that_are_no_numbers_score_nothing():
    model = trained("full")
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="nan or infinite"):
        token_nats(model, [0, 1, 2], estimator="left_to_right")


def test_a_causal_network_refuses_guidance_also_from_python():
    with pytest.raises(UserError, match="cfg_scale needs a masked diffusion model"):
        answer_nats(trained("causal"), [([0], [1, 2])], cfg_scale=0.5)
