"""Attention in unmasking order: exact chain rules, an exact cache, and what it is trained on."""

import itertools
import math

import numpy as np
import plain
import pytest
import torch
from conftest import predict, states

import config as settings
import diffusion
import evaluate
import sample as decoding
import samplers
import train
from config import UserError
from data import examples, tokenizer
from lib.cache import OrderCache
from lib.parallel import Team
from model import make_network

V, L = 3, 4
X0 = states(V, L)  # (V^L, L)
ORDERS = torch.tensor(list(itertools.permutations(range(L))))  # (24, L)
VARIANTS = [
    {"norm": "rms", "mlp": "relu2", "bias": False, "qk_norm": True},
    {"norm": "layer", "mlp": "gelu", "bias": True, "head_padding": 1},
    {"norm": "rms", "mlp": "swiglu", "bias": False, "rotary_bf16": True},
]


def tiny(V=V, L=L, attention="order", dtype=torch.float64, **keys):
    """A network whose weights are far from their beginning, so that every part matters."""
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": L, "vocab_size": V}
    model = make_network(plain.DEFAULTS | shape | {"attention": attention} | keys)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.to(dtype).eval()


def arrivals_logits(model, ids, places, asked):
    """Logits of positions `asked` after tokens that are read in the order of arrival, uncached."""
    clean = torch.tensor([[model.mask_id, *ids]] * len(asked))  # (Q, n)
    rows = [[0, *places] + [i] * clean.shape[1] for i in asked]
    h = model.hidden_in_order(clean, torch.tensor(rows))  # (Q, n, D)
    return model.head(h[:, -1])  # (Q, V) of the last query, which sees all


# ---- One pass is an exact chain rule -------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda keys: keys["mlp"])
@torch.no_grad()
def test_along_every_order_the_probabilities_of_all_texts_add_up_to_one(variant):
    model = tiny(**variant)
    for order in ORDERS[::5]:
        nats = diffusion.order_nll(model, X0, order.expand(len(X0), L))[1].sum(1)  # (V^L,)
        assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert nats.std() > 0.1


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda keys: keys["mlp"])
@torch.no_grad()
def test_one_pass_equals_a_call_for_each_token(variant):
    model, x0 = tiny(**variant), X0[::7]
    for order in ORDERS[::4].tolist():
        _, terms = diffusion.order_nll(model, x0, torch.tensor(order).expand(len(x0), L))
        for row, in_one_pass in zip(x0.tolist(), terms.tolist(), strict=True):
            separate = []
            for k, i in enumerate(order):
                before = order[:k]
                logits = arrivals_logits(model, [row[j] for j in before], before, [i])
                separate.append(-logits[0].log_softmax(-1)[row[i]].item())
            assert in_one_pass == pytest.approx(separate, abs=1e-5)


@torch.no_grad()
def test_nothing_later_changes_an_earlier_key_or_value_bit_for_bit():
    model, (a, b) = tiny(L=8, dtype=torch.float32), torch.randint(V, (2, 1, 8))
    b[:, :5], caches = a[:, :5], []
    for x in (a, b):
        cache, one = OrderCache(1, 8), torch.arange(1)
        model.hidden_from_cache(x, torch.ones(1, 8, dtype=torch.bool), one, cache, one)
        caches.append(cache.layers.values())
    assert not torch.equal(a, b)
    for first, second in zip(*caches, strict=True):
        assert torch.equal(first[:, :, :, :6], second[:, :, :, :6])  # start token and five tokens
        assert not torch.equal(first, second)


@torch.no_grad()
def test_hidden_reads_the_visible_tokens_left_to_right():
    model = tiny(L=8)
    x = torch.randint(V, (3, 8))
    x[0, 2:5], x[1, ::2], x[2, 7] = model.mask_id, model.mask_id, model.mask_id
    idx = (x == model.mask_id).flatten().nonzero().flatten()  # (N,)
    logits = model.head(model.hidden(x, idx))  # (N, V)
    assert torch.allclose(logits, model(x).flatten(0, 1)[idx], atol=1e-12)
    for i, row_logits in zip(idx.tolist(), logits, strict=True):
        row, place = divmod(i, 8)
        seen = [j for j in range(8) if x[row, j] != model.mask_id]
        ids = x[row, seen].tolist()
        assert torch.allclose(row_logits, arrivals_logits(model, ids, seen, [place])[0], atol=1e-12)


def test_the_fused_attention_of_both_streams_is_that_of_a_table_in_bfloat16_too():
    q, kv = torch.randn(2, 2, 10, 8), torch.randn(2, 2, 2, 10, 8)
    from lib.fused import attention_in_order

    plain = attention_in_order(q, kv)  # (2, 2, 10, 8)
    rounded = attention_in_order(q.bfloat16(), kv.bfloat16()).float()
    assert torch.allclose(plain, rounded, atol=0.05)
    assert torch.allclose(attention_in_order(q[:, :, 5:], kv), plain[:, :, 5:], atol=1e-6)


def test_the_loss_is_the_plain_formula_with_its_gradient():
    model, x0 = tiny(), X0[5:9]
    order = ORDERS[[3, 7, 11, 20]]
    loss, terms = diffusion.order_nll(model, x0, order)
    loss.backward()
    fused = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    target = x0.gather(1, order)  # (4, L)
    start = torch.full((4, 1), model.mask_id)
    places = torch.cat([torch.zeros_like(start), order[:, :-1], order], dim=1)  # (4, 2L)
    h = model.hidden_in_order(torch.cat([start, target[:, :-1]], dim=1), places)  # (4, L, D)
    ce = -model.head(h).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)  # (4, L)
    ce.sum().backward()
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.allclose(terms.double(), ce, atol=1e-5) and not terms.requires_grad
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fused, plain, strict=True))


# ---- Estimators ----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_any_order_estimate_is_the_mean_over_all_orders_one_row_a_draw():
    model, blocks = tiny(), [row.numpy() for row in X0[10:14]]
    exact = torch.stack(
        [diffusion.order_nll(model, X0[10:14], order.expand(4, L))[1].sum(1) for order in ORDERS]
    ).double()  # (24, 4)
    nats, info = evaluate.estimate(model, blocks, draws=1000, strata=1, batch_size=4000)
    error = exact.std(0) / 1000**0.5  # (4,)
    assert ((nats - exact.mean(0)).abs() < 4 * error).all()
    assert info["rows"] == 2 * 4 * 1000  # a clean token and a query for each token
    tight = evaluate.answer_nats(
        model, [(row[:0], row) for row in blocks], estimator="orders", draws=1000
    )
    mixture = math.log(24) - (-exact).logsumexp(0)  # (4,)
    assert torch.allclose(tight, mixture, atol=0.1) and (mixture < exact.mean(0)).all()


@torch.no_grad()
def test_left_to_right_is_its_own_chain_rule_and_prompts_come_first_in_the_order():
    model, row = tiny(L=6), np.array([0, 2, 1, 1, 0, 2])
    both, prompt, rest = (
        evaluate.answer_nats(model, [pair], estimator="left_to_right").item()
        for pair in ((row[:0], row), (row[:0], row[:2]), (row[:2], row[2:]))
    )
    assert both == pytest.approx(prompt + rest, abs=1e-5)
    chain = sum(
        -arrivals_logits(model, row[:k].tolist(), range(k), [k])[0].log_softmax(-1)[row[k]].item()
        for k in range(6)
    )
    assert both == pytest.approx(chain, abs=1e-5)


# ---- Sampling with a cache -----------------------------------------------------------------------


def requests_for(model, N=7):
    """Prompts, suffixes, gaps, and nothing at all."""
    x = torch.full((N, model.block_size), model.mask_id)
    x[1, 0], x[2, :3], x[3, -2:], x[4, 4] = 1, 2, 0, 1
    return x


def uncached(model, x, policy):
    """The sampler's loop with all clean tokens read anew at each call, in order of arrival."""
    x, (N, L) = x.clone(), x.shape
    for n in range(N):
        places = [i for i in range(L) if x[n, i] != model.mask_id]
        live, done = torch.tensor([n]), torch.zeros(1, dtype=torch.long)
        while policy.unfinished(torch.zeros(N, dtype=torch.long).index_fill(0, live, int(done)))[n]:
            due = policy.due(live, done)[0].nonzero().flatten()  # (n,)
            ids = [int(x[n, i]) for i in places]
            logits = arrivals_logits(model, ids, places, due.tolist()).float()
            u = policy.noise(live, done)[0, due]  # (n,)
            token, p = decoding.categorical(logits, u, 1.0, 0, 1.0)
            table = torch.full((1, L), -1.0, dtype=torch.float64).index_fill(1, due, 0)
            table[0, due] = p
            keep = policy.accept(live, done, table, table)[0, due]  # (n,)
            x[n, due[keep]] = token[keep]
            places += due[keep].tolist()
            done += 1
    return x


@pytest.mark.parametrize("name", ["ancestral", "any_order", "left_to_right", "confidence"])
@torch.no_grad()
def test_cached_sampling_is_the_uncached_token_for_token(name):
    model = tiny(V=5, L=8)
    x, keys = requests_for(model), {"sampler": name, "steps": 4, "seed": 3}
    o = settings.options(keys, *decoding.MODULES)
    plain = uncached(model, x, samplers.SAMPLERS[name](x == model.mask_id, o))
    for batch_size in (1, 3, 7):
        tokens, _ = decoding.sample(model, x, batch_size=batch_size, **keys)
        assert torch.equal(tokens, plain)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_fills_all_gaps_of_an_order_network_also_with_guidance(name):
    model = tiny(V=5, L=8)
    x = requests_for(model)
    for scale in (0.0, 0.7):
        keys = {"sampler": name, "steps": 5, "cfg_scale": scale, "seed": 1}
        tokens, _ = decoding.sample(model, x, **keys)
        one, _ = decoding.sample(model, x, batch_size=2, **keys)
        assert torch.equal(tokens, one) and (tokens != model.mask_id).all()
        assert torch.equal(tokens[x != model.mask_id], x[x != model.mask_id])


def test_guidance_of_an_order_network_is_that_of_its_uncached_logits():
    model = tiny(V=5, L=8)
    x = requests_for(model)
    cond, idx = x != model.mask_id, (x == model.mask_id).flatten().nonzero().flatten()
    o = {"cfg_scale": 0.7, "batch_size": 7}
    call = samplers.Call(torch.arange(7), idx, idx, None, None, torch.zeros(7, dtype=torch.long))
    policy = policy_of("any_order", ~cond)
    h = decoding.Predictor(model, cond, policy, o)(x, call, call)  # two of (n, D)
    cached, plain = diffusion.guided(model, h, 0.7), predict(model, x, idx, cond, 0.7)
    assert torch.allclose(cached, plain, atol=1e-5)  # (n, V) each


def test_about_two_tokens_a_token_pass_the_network_for_a_whole_sample():
    model, passed = tiny(V=5, L=64), []
    model.embed.register_forward_hook(lambda _, inputs, __: passed.append(inputs[0].numel()))
    x = torch.full((1, 64), model.mask_id)
    for keys in ({"sampler": "any_order"}, {"steps": 8}, {"sampler": "left_to_right"}):
        passed.clear()
        _, info = decoding.sample(model, x, **keys)
        assert 64 < sum(passed) <= 2 * 64  # what the last call unmasks is never read
        assert info["nfe"].item() <= 64


def test_the_law_of_the_left_to_right_sampler_is_the_chain_rule():
    model, n = tiny(V=2, L=3), 5_000
    x = torch.full((n, 3), model.mask_id)
    tokens, _ = decoding.sample(model, x, sampler="left_to_right", batch_size=n)
    texts = states(2, 3)  # (8, 3)
    nats = diffusion.order_nll(model, texts, torch.arange(3).expand(8, 3))[1].sum(1)  # (8,)
    counted = (tokens[:, None] == texts).all(-1).sum(0).double()  # (8,)
    expected = n * (-nats.detach().double()).exp()  # (8,)
    assert ((counted - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees, 0.001


# ---- Orders, and training on them ----------------------------------------------------------------


def test_orders_are_what_their_names_say_and_prompts_come_first():
    noise, coin = torch.rand(1000, 6, dtype=torch.float64), torch.rand(1000, 1)
    left = torch.arange(6).expand(1000, 6)
    assert torch.equal(diffusion.draw_order("left_to_right", noise, coin), left)
    assert torch.equal(diffusion.draw_order("right_to_left", noise, coin), left.flip(1))
    assert torch.equal(diffusion.draw_order("uniform", noise, coin), noise.argsort(1))
    mixed = (diffusion.draw_order("mixture", noise, coin, 0.3) == left).all(1)  # (1000,)
    by_chance = (noise.argsort(1) == left).all(1)  # (1000,)
    assert torch.equal(mixed, (coin < 0.3).squeeze(1) | by_chance)
    local = diffusion.draw_order("local", noise, coin, 0.2)
    assert (local - left).abs().max() <= 1 and not torch.equal(local, left)
    prompt = torch.arange(1000) % 4  # (1000,)
    order = diffusion.draw_order("uniform", noise, coin, prompt=prompt)
    for row, n in zip(order[:8].tolist(), prompt.tolist(), strict=False):
        assert row[:n] == list(range(n)) and sorted(row) == list(range(6))


@pytest.fixture
def folder(tmp_path):
    text = tokenizer.Char("\0\n abcde")
    pairs = [(f"{a}{b}", f"{b}{a}{b}") for a in "abcde" for b in "abcde"]
    rows = [
        (split, "here", text.encode(prompt), text.encode(answer))
        for split in ("train", "val")
        for prompt, answer in pairs
    ]
    examples.prepare(tmp_path / "pairs", rows, text)
    return tmp_path / "pairs"


def config_of(folder, out, *words):
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=8", "--max_iters=30"]
    more = ["--eval_interval=30", "--eval_sequences=8", "--device=cpu", "--dtype=float32"]
    decay = {"lr_decay": "constant"} if "--lr_decay=constant" in words else {}
    more += plain.words_of(plain.RECIPE | decay)
    places = [f"--data={folder}", f"--out_dir={out}", "--attention=order", "--log_interval=1"]
    words = [*shape, *more, *places, "--warmup_iters=2", "--learning_rate=1e-2", *words]
    return settings.parse(words, *train.MODULES)


def test_an_order_network_learns_answers_and_resumes_as_if_never_stopped(folder, tmp_path):
    whole = train.main(config_of(folder, tmp_path / "a", "--order=mixture", "--order_p=0.3"))
    assert whole["nats_per_token"] < 1.6  # from log 8 = 2.08
    train.main(config_of(folder, tmp_path / "b", "--max_iters=15", "--lr_decay=constant"))
    both = [train.main(config_of(folder, tmp_path / name, "--lr_decay=constant")) for name in "bc"]
    assert both[0]["nats_per_token"] == both[1]["nats_per_token"]


def test_a_network_that_learnt_one_order_is_asked_in_that_order(folder, tmp_path, capsys):
    out = tmp_path / "right"
    trained = train.main(config_of(folder, out, "--order=right_to_left"))
    assert "along the order right_to_left" in capsys.readouterr().out
    ask = [f"--ckpt={out}", "--device=cpu", "--dtype=float32", "--sequences=8"]
    results = {
        words: evaluate.main(settings.parse([*ask, *words], *evaluate.MODULES))
        for words in ((), ("--estimator=right_to_left",), ("--estimator=any_order",))
    }
    own, named, other = (result["nats_per_token"] for result in results.values())
    assert own == named == pytest.approx(trained["nats_per_token"]) and other > own + 0.1
    config = settings.parse(ask[:3], *decoding.MODULES)
    subject = decoding.open_model(config)
    assert decoding.with_defaults(config, subject)["sampler"] == "right_to_left"
    config = settings.parse([*ask[:3], "--sampler=euler"], *decoding.MODULES)
    assert decoding.with_defaults(config, subject)["sampler"] == "euler"
    few = {"ckpt": str(out), "device": "cpu", "dtype": "float32", "sequences": 8}
    for keys, wanted in ((few, own), (few | {"estimator": "any_order"}, other)):  # its default
        assert evaluate.main(keys)["nats_per_token"] == pytest.approx(wanted)
    train.main(config_of(folder, tmp_path / "near", "--order=local", "--max_iters=1"))
    assert "of uniform orders, not of its own, local" in capsys.readouterr().out
    ask[0] = f"--ckpt={tmp_path / 'near'}"
    evaluate.main(settings.parse(ask, *evaluate.MODULES))
    assert "but learnt 'local', which has no estimator of its own" in capsys.readouterr().out
    evaluate.main(settings.parse([*ask, "--estimator=left_to_right"], *evaluate.MODULES))
    assert "asked in uniform orders" not in capsys.readouterr().out  # the user has said how


def test_a_batch_of_examples_has_prompts_first_and_counts_what_follows(folder):
    config = config_of(folder, "unused") | {"example_width": 6, "start_id": -1}
    dataset = examples.Examples(folder, "train")
    batch = train.make_batch(config, dataset, 0, range(8))
    assert batch.mask is None and batch.order.shape == batch.x0.shape
    assert (batch.order[:, :2] == torch.arange(2)).all()
    assert batch.weight.sum() == batch.n_tokens == 8 * 4
    text = train.make_batches(config, dataset, Team())
    assert torch.equal(next(text).order, batch.order)


def test_only_any_order_trains_an_order_network(folder, tmp_path):
    for objective in ("lambda_dce", "t_dse", "ar"):
        with pytest.raises(UserError, match="trains a network with attention="):
            train.main(config_of(folder, tmp_path / "d", f"--objective={objective}"))


# ---- The samplers that came with it --------------------------------------------------------------


def policy_of(name, masked, **keys):
    o = settings.options({"sampler": name, "seed": 1, **keys}, *decoding.MODULES)
    return samplers.SAMPLERS[name](masked, o)


def test_threshold_takes_all_that_are_probable_enough_and_always_one():
    masked, live = torch.ones(2, 4, dtype=torch.bool), torch.arange(2)
    p = torch.tensor([[0.95, 0.2, 0.9, 0.89], [0.1, 0.3, 0.2, 0.3]])
    policy = policy_of("threshold", masked, threshold=0.9)
    accepted = policy.accept(live, torch.zeros(2), p, p)
    assert accepted.tolist() == [[True, False, True, False], [False, True, False, False]]


def test_entropy_bound_takes_the_largest_set_within_its_bound():
    masked, live = torch.ones(2, 4, dtype=torch.bool), torch.arange(2)
    masked[1, 0] = False
    h = torch.tensor([[0.3, 0.1, 0.2, 2.0], [math.inf, 1.0, 1.5, 0.4]])
    cases = ((0.0, [1, 1]), (0.11, [2, 1]), (0.31, [3, 1]), (0.61, [4, 2]), (9, [4, 3]))
    for bound, wanted in cases:
        policy = policy_of("entropy_bound", masked, max_entropy=bound)
        accepted = policy.accept(live, torch.zeros(2), h, h)
        assert accepted.sum(1).tolist() == wanted
        for row, entropies in zip(accepted, h, strict=True):
            taken = entropies[row]
            assert taken.sum() - taken.max() <= bound + 1e-6


def test_entropy_bound_zero_is_one_token_a_call(arbitrary):
    x = torch.full((50, arbitrary.block_size), arbitrary.mask_id)
    _, info = decoding.sample(arbitrary, x, sampler="entropy_bound", max_entropy=0.0)
    assert info["nfe"].tolist() == [arbitrary.block_size] * 50


def test_the_calls_of_remasking_are_the_steps_that_unmask_something(arbitrary):
    x, calls = torch.full((40, arbitrary.block_size), arbitrary.mask_id), []
    hidden = arbitrary.hidden
    arbitrary.hidden = lambda z, idx: calls.append(len(z)) or hidden(z, idx)
    masked = x == arbitrary.mask_id
    _, info = decoding.sample(arbitrary, x, sampler="remask", steps=50, eta=0.1, seed=1)
    events = policy_of("remask", masked, steps=50, eta=0.1).events
    assert info["nfe"].tolist() == [len(each) for each in events]
    assert sum(calls) == info["nfe"].sum()


def test_on_call_is_told_of_every_token_once_with_its_probability(arbitrary):
    x, calls = torch.full((3, arbitrary.block_size), arbitrary.mask_id), []
    tokens, info = decoding.sample(arbitrary, x, steps=3, on_call=lambda *z: calls.append(z))
    row, place, call, token, p, logits = (torch.cat(part) for part in zip(*calls, strict=True))
    assert len(set(zip(row.tolist(), place.tolist(), strict=True))) == x.numel() == len(row)
    assert torch.equal(tokens[row, place], token)
    assert torch.allclose(logits.double().softmax(-1).gather(1, token[:, None])[:, 0], p)
    assert [int(call[row == n].max()) + 1 for n in range(3)] == info["nfe"].tolist()
