"""The numbers of the page: its network, its samplers and its NELBO are the model's."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from pages import (
    KINDS,
    ON_PAGE,
    OPEN,
    TEXT,
    differences,
    finish,
    masked_now,
    network,
    partly_masked,
    start_of,
    written,
)
from plain import DEFAULTS

import diffusion
import sample
import samplers
from lib import philox
from model import make_network
from view import page

COMMITTED = ROOT / "docs/index.html"

# ---- The numbers are the model's -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_the_page_are_those_of_pytorch(chromium, tmp_path, kind):
    model, tokenizer = network(kind)
    chromium.open(written(tmp_path / "page.html", model, tokenizer))
    assert max(differences(chromium, model, partly_masked(model, 10, 40))) < 1e-3
    assert max(differences(chromium, model, partly_masked(model, 3, 7))) < 1e-3
    assert not chromium.complaints()


def test_the_rounding_is_the_one_that_the_page_states():
    model = make_network(DEFAULTS | {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 9})
    data, rounded = page.pack(model)
    for name, w in model.state_dict().items():
        scale = w.abs().amax(-1, keepdim=True) if w.dim() == 2 else w.abs()
        error = (rounded[name] - w).abs()
        assert (error <= scale * (0.5 / 127 + 2**-8)).all(), name
        if w.dim() == 2:
            q = rounded[name] / (scale / 127).bfloat16().float()
            assert torch.equal(q, q.round()) and q.abs().max() <= 127
    n = sum(w.numel() for w in rounded.values() if w.dim() == 2)
    assert len(base64.b64decode(data["narrow"])) == n


def test_a_row_of_zeros_stays_one():
    model = make_network(DEFAULTS | {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9})
    torch.nn.init.zeros_(model.unembed.weight)
    assert page.pack(model)[1]["unembed.weight"].eq(0).all()


def run_in_page(chromium, start, o, uniforms):
    """A whole run of the page with uniform numbers {stream: (L,)} from outside."""
    ask = """(start, o, given) => {
      const run = new Run(network, start, o, (stream, place) => given[stream][place]);
      while (run.calls < run.plan.length) run.call();
      const { tokens, calls, expected, steps } = run;
      return { tokens, calls, expected, steps };
    }"""
    return chromium.call(ask, start, o, {k: u.tolist() for k, u in uniforms.items()})


CASES = [{"sampler": name} for name in ON_PAGE]
CASES += [{"sampler": "ancestral", "temperature": 0.0}, {"sampler": "confidence", "steps": 40}]
CASES += [{"sampler": "ancestral", "steps": 128}]
CASES += [{"sampler": "threshold", "threshold": z} for z in (0.0, 0.3, 1.0)]
CASES += [{"sampler": "threshold", "threshold": 0.4, "temperature": 0.0}]
CASES += [{"sampler": "entropy_bound", "max_entropy": z} for z in (0.0, 1.0, 4.0, 1e3)]


def draws_of_both(chromium, model, tokenizer, case):
    """The page draws what sample.py draws, of three sequences; returns their calls (3,)."""
    o = {"steps": 6, "temperature": 0.9} | case
    limits = {key: samplers.DEFAULTS[key] for key in ("threshold", "max_entropy")}
    start = start_of(tokenizer, model)
    x = torch.tensor([start] * 3)
    tokens, info = sample.sample(model, x, seed=5, **o)
    for row in range(3):
        streams = range(2 + x.shape[1])
        u = {s: philox.uniforms(5, s, [row], x.shape[1])[0] for s in streams}
        ours = run_in_page(chromium, start, limits | o, u)
        assert ours["tokens"] == tokens[row].tolist()
        assert ours["calls"] == info["nfe"][row]
        if o["sampler"] in OPEN:
            assert ours["expected"] is None and ours["steps"] == ours["calls"]
        else:
            assert ours["expected"] == pytest.approx(info["expected_nfe"], rel=1e-12)
    return info["nfe"].tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_with_the_same_uniforms_it_draws_the_tokens_of_sample_py(demo, case):
    chromium, model, tokenizer, path = demo
    chromium.open(path)
    calls = draws_of_both(chromium, model, tokenizer, case)
    if case.get("threshold") == 0.0 or case.get("max_entropy") == 1e3:
        assert calls == [1, 1, 1]
    if case.get("threshold") == 1.0 or case.get("max_entropy") == 0.0:
        assert calls == [17, 17, 17]
    if case.get("threshold") == 0.3 or case.get("max_entropy") == 4.0:
        assert max(calls) < 17 and min(calls) > 1  # so the rule had a say


@pytest.fixture(scope="module")
def in_order(chromium, tmp_path_factory):
    """(chromium, model, tokenizer, the path of its page) of an `order` network."""
    model, tokenizer = network("order")
    path = written(tmp_path_factory.mktemp("order") / "page.html", model, tokenizer)
    return chromium, model, tokenizer, path


@pytest.mark.parametrize("sampler", ON_PAGE)
def test_an_order_network_draws_the_tokens_of_sample_py(in_order, sampler):
    chromium, model, tokenizer, path = in_order
    chromium.open(path)
    draws_of_both(chromium, model, tokenizer, {"sampler": sampler})
    assert not chromium.complaints()


def test_the_page_has_every_sampler_that_takes_nothing_back(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    assert len(ON_PAGE) == len(sample.SAMPLERS) - 2
    assert chromium.js("Object.keys(SAMPLERS)") == ON_PAGE
    assert chromium.js("[...$('sampler').options].map((o) => o.value)") == ON_PAGE


def two_token_law(model, start, same_step):
    """P(v, w) of a gap of two, (V, V): in one step with probability same_step, else in either."""
    i, j = (k for k, token in enumerate(start) if token == model.mask_id)
    V, x = model.vocab_size, torch.tensor([start])
    p = lambda x, k: model(x)[:, k].double().softmax(-1)  # noqa: E731
    first, second = x.repeat(V, 1), x.repeat(V, 1)
    first[:, i] = second[:, j] = torch.arange(V)
    with torch.no_grad():
        pi, pj = p(x, i)[0], p(x, j)[0]  # (V,) each
        i_first, j_first = pi[:, None] * p(first, j), pj[None] * p(second, i).T  # (V, V) each
    return same_step * pi[:, None] * pj + (1 - same_step) / 2 * (i_first + j_first)


def test_the_law_over_a_gap_of_two_is_the_enumerated_one(chromium, tmp_path):
    model, tokenizer = network(alphabet="abcd", block_size=6, n_layer=1, n_embd=16)
    chromium.open(written(tmp_path / "page.html", model, tokenizer, template="a___2b"))
    start, steps, n = [0, 4, 4, 1], 3, 8000
    ask = """(start, steps, n) => {
      const o = { sampler: "ancestral", steps, temperature: 1 };
      const counts = Array(16).fill(0);
      for (let row = 0; row < n; row++) {
        const run = new Run(network, start, o, generator(7, row));
        while (run.calls < run.plan.length) run.call();
        counts[run.tokens[1] * 4 + run.tokens[2]]++;
      }
      return counts;
    }"""
    counts = np.array(chromium.call(ask, start, steps, n))
    law = two_token_law(model, start, 1 / steps).flatten().numpy()
    independent = two_token_law(model, start, 1.0).flatten().numpy()
    chi = lambda p: float(((counts - n * p) ** 2 / (n * p)).sum())  # noqa: E731
    assert law.sum() == pytest.approx(1) and chi(law) < 44.3  # 15 degrees of freedom, p = 1e-4
    assert chi(independent) > 100  # it could have been told apart


def test_the_page_draws_uniform_numbers(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    ask = "[1, 2, 1337].flatMap((s) => [0, 1].flatMap((r) => [0, 1, 9].flatMap((k) => "
    u = np.array(chromium.js(ask + "range(500).map((i) => generator(s, r)(k, i)))))"))
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == len(u)
    counts = np.histogram(u, 100, (0, 1))[0]
    assert ((counts - 90) ** 2 / 90).sum() < 160  # 99 degrees of freedom, p = 1e-4
    rows = u.reshape(-1, 500) - 0.5
    assert abs(12 * rows @ rows.T / 500 - np.eye(18)).max() < 0.25


def test_the_nelbo_of_the_page_is_that_of_diffusion_py(demo):
    chromium, model, tokenizer, path = demo
    chromium.open(path)
    ids, prompt, draws = tokenizer.encode(TEXT), 9, 8
    L = len(ids)
    jitter = philox.uniforms(3, 0, range(draws // 2), 1).squeeze(1)
    noise = philox.uniforms(3, 1, range(draws), L)
    position = torch.arange(draws)
    u = diffusion.stratified(jitter[position // 2], position, draws)
    prompts = torch.full((draws,), prompt)
    mask, weight = diffusion.draw_mask("any_order", u, noise, prompt=prompts)
    x0 = torch.tensor([ids] * draws)
    with torch.no_grad():
        nats = diffusion.nelbo(model, x0, mask, weight.float())[1]
    ask = """(ids, places, jitter, noise) => [...nelbo(network, ids, places, noise.length,
      (stream, i) => (stream === -1 ? jitter : noise[-2 - stream])[i])]
      .map((terms) => terms.reduce((sum, { weight, ce }) => sum + weight * ce, 0))"""
    places = list(range(prompt, L))
    ours = chromium.call(ask, ids, places, jitter.tolist(), noise.tolist())
    assert ours == pytest.approx(nats.tolist(), rel=1e-5)


def test_the_nelbo_of_an_order_network_is_the_chain_rule_along_orders(in_order):
    chromium, model, tokenizer, path = in_order
    chromium.open(path)
    ids, prompt, draws = tokenizer.encode(TEXT), 9, 4
    L = len(ids)
    noise = philox.uniforms(3, 1, range(draws), L)
    place = torch.arange(L).expand(draws, L)
    order = torch.where(place < prompt, place - L, noise).argsort(1)
    weight = (order >= prompt).float()
    with torch.no_grad():
        nats = diffusion.order_nll(model, torch.tensor([ids] * draws), order, weight)[1].sum(1)
    ask = """(ids, places, noise) => [...nelbo(network, ids, places, noise.length,
      (stream, i) => (stream === -1 ? 0 : noise[-2 - stream][i]))]
      .map((terms) => terms.map(({ place, weight, ce }) => [place, weight * ce]))"""
    terms = chromium.call(ask, ids, list(range(prompt, L)), noise.tolist())
    for ours, theirs in zip(terms, order.tolist(), strict=True):
        assert [at for at, _ in ours] == theirs[prompt:]
    totals = [sum(nats for _, nats in ours) for ours in terms]
    assert totals == pytest.approx(nats.tolist(), rel=1e-5)


# ---- The committed page --------------------------------------------------------------------------


def test_the_committed_page_is_this_code_in_one_small_file(chromium):
    text = COMMITTED.read_text(encoding="utf8")
    assert COMMITTED.stat().st_size < 1_000_000
    for name in ("network.js", "sampler.js", "app.js"):
        assert (ROOT / "view" / name).read_text(encoding="utf8") in text, f"make it anew: {name}"
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", text)
    chromium.open(COMMITTED)
    chromium.js("$('steps').value = 5; $('request').requestSubmit()")
    finish(chromium)
    assert masked_now(chromium) == [] and not chromium.complaints()


def test_the_committed_page_computes_what_pytorch_computes(chromium):
    """With the weights that are in it, read by another hand."""
    text = COMMITTED.read_text(encoding="utf8")
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])
    narrow = np.frombuffer(base64.b64decode(data["narrow"]), np.int8)
    wide = np.frombuffer(base64.b64decode(data["wide"]), "<u2").astype(np.uint32) << 16
    wide, state = torch.from_numpy(wide.view(np.float32)), {}
    for name, shape in data["shapes"].items():
        scale, wide = wide[: shape[0]], wide[shape[0] :]
        state[name] = scale
        if len(shape) == 2:
            size = shape[0] * shape[1]
            q, narrow = torch.from_numpy(narrow[:size].astype(np.float32)), narrow[size:]
            state[name] = q.view(shape) * scale[:, None]
    keys = {"bias": "norm.bias" in state, "mlp_width": len(state["blocks.0.mlp.up.weight"])}
    model = make_network(DEFAULTS | data["config"] | keys)
    model.load_state_dict(state)
    chromium.open(COMMITTED)
    x = partly_masked(model, 10, model.block_size)
    assert max(differences(chromium, model, x)) < 1e-3


def test_each_paragraph_links_to_a_function_that_there_is():
    links = re.findall(
        r'"\{\{code\}\}(\w+\.py)#:~:text=(.*?)"',
        (ROOT / "view/page.html").read_text("utf8"),
    )
    assert len(links) == 5
    for file, target in links:
        source = (ROOT / file).read_text(encoding="utf8")
        assert re.search(rf"^{target.replace('%20', ' ')}\b", source, re.M), (file, target)
    for file in re.findall(r'href="([^"#:]+\.py)#', COMMITTED.read_text(encoding="utf8")):
        assert (COMMITTED.parent / file).is_file()
