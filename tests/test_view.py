"""view/: the page's network, samplers and NELBO are the model's; what is shown is what was drawn.

The page is run in a real headless Chromium, driven over the DevTools protocol by a pipe. Where it
is not installed these tests are skipped, but where NANOMDM_SHARED is set, as in .ci/run, they fail.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from conftest import ROOT

import diffusion
import sample
from data.tokenizer import Char
from model import DEFAULTS, Transformer
from view import page, svg, watch
from view.trace import Recorder

COMMITTED = ROOT / "docs/index.html"
TEXT = "the cat sat on a mat and ran"
ALPHABET = "\n " + "".join(sorted(set("the cat sat on a mat and ran_0123456789") - {" "}))
KINDS = {
    "demo": {"norm": "rms", "bias": False, "qk_norm": True},
    "radd": {"norm": "layer", "bias": True},
    "smdm": {"norm": "rms", "bias": False, "mlp": "swiglu", "mlp_width": 40},
    "relu2": {"norm": "layer", "bias": False, "mlp": "relu2"},
    "order": {"norm": "rms", "bias": False, "qk_norm": True, "attention": "order"},
}
# Of the samplers the page has all but those that take tokens back.
ON_PAGE = [name for name in sample.SAMPLERS if name not in ("remask", "remask_rescale")]
OPEN = ("threshold", "entropy_bound")  # how many calls they take depends on the network


class Browser:
    """Chromium with one tab; `js` evaluates, `events` is all that the tab has told."""

    def __init__(self, folder):
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        if not program:
            assert "NANOMDM_SHARED" not in os.environ, "NANOMDM_SHARED is set, but no chromium here"
            pytest.skip("needs chromium")
        there, self.out = os.pipe()
        self.back, here = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={folder}", "--hide-scrollbars"]
        command = ["bash", "-c", f'exec "$@" 3<&{there} 4>&{here}', "bash", program, *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(there, here), **quiet)
        os.close(there)
        os.close(here)
        self.number, self.rest, self.session, self.events = 0, b"", {}, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                piece = os.read(self.back, 2**16)
                assert piece, "the browser is gone"
                self.rest += piece
            line, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def js(self, code):
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.send("Runtime.evaluate", expression=code, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, function, *values):
        """function(*values) in the page: the values travel as JSON."""
        return self.js(f"({function})({', '.join(json.dumps(value) for value in values)})")

    def until(self, condition):
        end = time.time() + 60
        while not self.js(condition):
            assert time.time() < end, f"never: {condition}"
            time.sleep(0.02)

    def open(self, path, width=1200, mobile=False, **media):
        media = {"prefers-reduced-motion": "reduce"} | media  # so that nothing plays by itself
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.send("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        self.until("document.readyState === 'complete'")

    def mouse(self, selector, *kinds):
        """A real pointer at the middle of what `selector` (JavaScript) names."""
        box = (
            f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect()))({selector})"
        )
        x, y = self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in kinds or ("mouseMoved", "mousePressed", "mouseReleased"):
            press = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **press)

    def key(self, name, code=0):
        for kind in ("keyDown", "keyUp"):
            key = {"key": name, "code": name, "windowsVirtualKeyCode": code}
            self.send("Input.dispatchKeyEvent", type=kind, **key)

    def complaints(self):
        """Exceptions and messages of the console, and whatever was asked of a network."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [e["params"]["request"]["url"] for e in asked]
        own = [url for url in urls if url.startswith(("file:", "data:"))]
        return [e for e in self.events if e["method"] in bad] + [u for u in urls if u not in own]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.process.kill()
    browser.process.wait()


def network(kind="demo", alphabet=ALPHABET, **keys):
    """(model, tokenizer): random, of rounded weights, and sharp enough that context matters."""
    torch.manual_seed(1)
    keys = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 40} | KINDS[kind] | keys
    model = Transformer(DEFAULTS | keys | {"vocab_size": len(alphabet)}).eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.dim() == 1:
                w.add_(0.3 * torch.randn(w.shape))
            w.mul_(3.0 if "embed" in name else 1.5)
    model.load_state_dict(page.pack(model)[1])
    return model, Char(alphabet)


def options(**keys):
    return page.settings.options(keys, page.settings, diffusion, sample)


def written(path, model, tokenizer, template="the ___8 sat on ___4."):
    data = page.with_weights(model, tokenizer, {"template": template.replace(".", "")})
    path.write_text(page.html(data, ""), encoding="utf8")
    return path


@pytest.fixture(scope="module")
def demo(chromium, tmp_path_factory):
    """(chromium, model, tokenizer, the path of its page)."""
    model, tokenizer = network()
    path = written(tmp_path_factory.mktemp("page") / "page.html", model, tokenizer)
    return chromium, model, tokenizer, path


def partly_masked(model, rows, L):
    """x (rows, L): of every degree, from one mask to masks alone."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(model.vocab_size, (rows, L), generator=generator)
    for i, row in enumerate(x):
        n = 1 + i * (L - 1) // (rows - 1)
        row[torch.randperm(L, generator=generator)[:n]] = model.mask_id
    return x


def differences(chromium, model, x):
    """The largest difference between the page's logits and PyTorch's, of each row of x."""
    worst = []
    for row in x:
        masked = (row == model.mask_id).nonzero().flatten()
        ask = "(x, at) => logits(network, x, at).map((row) => [...row])"
        ours = torch.tensor(chromium.call(ask, row.tolist(), masked.tolist()))
        with torch.no_grad():
            worst.append(float((ours - model(row[None])[0, masked]).abs().max()))
    return worst


# ---- The numbers are the model's -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_the_page_are_those_of_pytorch(chromium, tmp_path, kind):
    model, tokenizer = network(kind)
    chromium.open(written(tmp_path / "page.html", model, tokenizer))
    assert max(differences(chromium, model, partly_masked(model, 10, 40))) < 1e-3
    assert max(differences(chromium, model, partly_masked(model, 3, 7))) < 1e-3
    assert not chromium.complaints()


def test_the_rounding_is_the_one_that_the_page_states():
    model = Transformer(DEFAULTS | {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 9})
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
    model = Transformer(DEFAULTS | {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 9})
    torch.nn.init.zeros_(model.unembed.weight)
    assert page.pack(model)[1]["unembed.weight"].eq(0).all()


def run_in_page(chromium, start, o, uniforms):
    """A whole run of the page with uniform numbers {stream: (L,)} from outside."""
    ask = """(start, o, given) => {
      const run = new Run(network, start, o, (stream) => given[stream]);
      while (run.calls < run.plan.length) run.call();
      const { tokens, calls, expected, draws } = run;
      return { tokens, calls, expected, draws: [...draws.values()] };
    }"""
    return chromium.call(ask, start, o, {k: u.tolist() for k, u in uniforms.items()})


def start_of(tokenizer, model):
    ids = tokenizer.encode(TEXT)
    return [model.mask_id if 4 <= i < 15 or 20 <= i < 26 else v for i, v in enumerate(ids)]


CASES = [{"sampler": name} for name in ON_PAGE]
CASES += [{"sampler": "ancestral", "temperature": 0.0}, {"sampler": "confidence", "steps": 40}]
CASES += [{"sampler": "ancestral", "steps": 128}]
CASES += [{"sampler": "threshold", "threshold": z} for z in (0.0, 0.3, 1.0)]
CASES += [{"sampler": "threshold", "threshold": 0.4, "temperature": 0.0}]
CASES += [{"sampler": "entropy_bound", "max_entropy": z} for z in (0.0, 1.0, 4.0, 1e3)]


def draws_of_both(chromium, model, tokenizer, case):
    """The page draws what sample.py draws, of three sequences; returns their calls (3,)."""
    o = {"steps": 6, "temperature": 0.9} | case
    limits = {key: sample.DEFAULTS[key] for key in ("threshold", "max_entropy")}
    start = start_of(tokenizer, model)
    x = torch.tensor([start] * 3)
    tokens, info = sample.sample(model, x, seed=5, **o)
    for row in range(3):
        streams = range(2 + x.shape[1])
        u = {s: diffusion.uniforms(5, s, [row], x.shape[1])[0] for s in streams}
        ours = run_in_page(chromium, start, limits | o, u)
        assert ours["tokens"] == tokens[row].tolist()
        assert ours["calls"] == info["nfe"][row]
        if o["sampler"] in OPEN:
            assert ours["expected"] is None
            assert all(draw["steps"] == ours["calls"] for draw in ours["draws"])
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


def test_a_sampler_has_its_own_fields_and_ends_when_it_is_done(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    fields = "[...document.querySelectorAll('[data-of] input')].filter((e) => e.offsetParent)"
    own = {"ancestral": ["steps"], "any_order": [], "left_to_right": [], "right_to_left": []}
    own |= {"threshold": ["threshold"], "entropy_bound": ["max_entropy"]}
    for sampler in ON_PAGE:
        chromium.js(f"$('sampler').value = '{sampler}'; $('sampler').onchange()")
        assert chromium.js(f"{fields}.map((e) => e.id)") == own.get(sampler, ["steps"])
    for key in ("threshold", "max_entropy"):
        assert chromium.js(f"+$('{key}').value") == sample.DEFAULTS[key]
    chromium.js("$('sampler').value = 'threshold'; $('sampler').onchange()")
    chromium.js("$('steps').value = ''; $('threshold').value = 0.2; $('samples').value = 3")
    chromium.mouse("document.querySelector('form .main')")
    chromium.until("page.playing")
    assert chromium.js("page.steps") == 12  # at most
    assert re.match(r"\d+ network calls ·", chromium.js("page.boards[0].note.textContent"))
    finish(chromium)
    calls = chromium.js("page.runs.map((run) => run.calls)")
    assert 1 < max(calls) < 12 and masked_now(chromium) == []
    assert chromium.js("[page.steps, page.shown, +$('slider').max]") == [max(calls)] * 3
    colours = chromium.js("[...page.runs[0].draws.values()].map((d) => (d.step + 1) / d.steps)")
    assert max(colours) == 1 and not chromium.complaints()


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
    u = np.array(chromium.js(ask + "generator(s, r)(k, 500))))"))
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
    jitter = diffusion.uniforms(3, 0, range(draws // 2), 1).squeeze(1)
    noise = diffusion.uniforms(3, 1, range(draws), L)
    position = torch.arange(draws)
    u = diffusion.stratified(jitter[position // 2], position, draws)
    prompts = torch.full((draws,), prompt)
    mask, weight = diffusion.draw_mask("any_order", u, noise, prompt=prompts)
    x0 = torch.tensor([ids] * draws)
    with torch.no_grad():
        nats = diffusion.nelbo(model, x0, mask, weight.float())[1]
    ask = """(ids, places, jitter, noise) => [...nelbo(network, ids, places, noise.length,
      (stream) => (stream === -1 ? jitter : noise[-2 - stream]))]
      .map((terms) => terms.reduce((sum, { weight, ce }) => sum + weight * ce, 0))"""
    places = list(range(prompt, L))
    ours = chromium.call(ask, ids, places, jitter.tolist(), noise.tolist())
    assert ours == pytest.approx(nats.tolist(), rel=1e-5)


def test_the_nelbo_of_an_order_network_is_the_chain_rule_along_orders(in_order):
    chromium, model, tokenizer, path = in_order
    chromium.open(path)
    ids, prompt, draws = tokenizer.encode(TEXT), 9, 4
    L = len(ids)
    noise = diffusion.uniforms(3, 1, range(draws), L)
    place = torch.arange(L).expand(draws, L)
    order = torch.where(place < prompt, place - L, noise).argsort(1)
    weight = (order >= prompt).float()
    with torch.no_grad():
        nats = diffusion.order_nll(model, torch.tensor([ids] * draws), order, weight)[1]
    ask = """(ids, places, noise) => [...nelbo(network, ids, places, noise.length,
      (stream, n) => (stream === -1 ? Array(n).fill(0) : noise[-2 - stream]))]
      .map((terms) => terms.map(({ place, weight, ce }) => [place, weight * ce]))"""
    terms = chromium.call(ask, ids, list(range(prompt, L)), noise.tolist())
    for ours, theirs in zip(terms, order.tolist(), strict=True):
        assert [at for at, _ in ours] == theirs[prompt:]
    totals = [sum(nats for _, nats in ours) for ours in terms]
    assert totals == pytest.approx(nats.tolist(), rel=1e-5)


# ---- What is seen and done -----------------------------------------------------------------------


def shown(chromium):
    """What each token of the first sample shows: its classes and its text."""
    return chromium.js("page.boards[0].spans.map((s) => [s.className, s.textContent])")


def finish(chromium):
    chromium.js("playing(false), seek(page.steps)")


def masked_now(chromium):
    return [i for i, (name, _) in enumerate(shown(chromium)) if name == "hole"]


def test_the_slider_shows_what_was_drawn_before_a_step(demo):
    chromium, model, tokenizer, path = demo
    chromium.open(path)
    steps = chromium.js("page.steps")
    for step in (steps, 0, 10, steps // 2, steps):
        chromium.js(f"$('slider').value = {step}; $('slider').dispatchEvent(new Event('input'))")
        chromium.until(f"page.shown === {step} && !page.seeking")
        draws = chromium.js("[...page.runs[0].draws.values()]")
        start = chromium.js("page.runs[0].start")
        before = {draw["place"]: draw["token"] for draw in draws if draw["step"] < step}
        for i, (name, text) in enumerate(shown(chromium)):
            token = before.get(i, start[i])
            assert (name == "hole") == (token == model.mask_id)
            assert name == "hole" or text == tokenizer.alphabet[token].replace("\n", "↵\n")
        note = chromium.js("page.boards[0].note.textContent")
        calls = len({draw["call"] for draw in draws if draw["step"] < step})
        assert note.startswith(f"{calls} network calls, expected ")
        assert f"{12 - len(before)} masked" in note
        assert chromium.js("$('clock').textContent").startswith(f"step {step} of {steps}")
    assert not chromium.complaints()


def test_play_pause_and_one_step_forward_and_back(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    chromium.mouse("$('on')")
    chromium.until("page.shown === 1")
    chromium.mouse("$('on')")
    chromium.until("page.shown === 2")
    chromium.mouse("$('back')")
    chromium.until("page.shown === 1")
    chromium.mouse("$('play')")
    chromium.until("page.shown >= 4")
    assert chromium.js("$('play').ariaLabel") == "Pause"
    chromium.mouse("$('play')")
    chromium.until("!page.playing && !page.seeking")
    stopped = chromium.js("page.shown")
    time.sleep(0.5)
    assert chromium.js("page.shown") == stopped
    chromium.mouse("$('play')")
    chromium.until("page.shown === page.steps && !page.playing")
    assert chromium.js("$('news').textContent.length") > 40  # said to a screen reader, once
    assert masked_now(chromium) == []


def test_it_plays_by_itself_unless_less_motion_is_wanted(demo):
    chromium, _, _, path = demo
    chromium.open(path, **{"prefers-reduced-motion": "no-preference"})
    chromium.until("page.shown >= 2")
    chromium.open(path)
    time.sleep(0.5)
    assert chromium.js("page.shown") == 0


def test_a_pointer_shows_the_alternatives_of_the_moment(demo):
    chromium, model, tokenizer, path = demo
    chromium.open(path)
    finish(chromium)
    draw = chromium.js("[...page.runs[0].draws.values()][5]")
    chromium.mouse(f"page.boards[0].spans[{draw['place']}]", "mouseMoved")
    card = chromium.js("$('card').hidden ? '' : $('card').textContent").splitlines()
    assert f"p = {draw['p']:.3f}, step {draw['step'] + 1}, call {draw['call'] + 1}" in card[0]
    # What the model said then: the start, with what was drawn in earlier calls.
    start, draws = chromium.js("[page.runs[0].start, [...page.runs[0].draws.values()]]")
    x = torch.tensor([start])
    for other in draws:
        if other["call"] < draw["call"]:
            x[0, other["place"]] = other["token"]
    temperature = float(chromium.js("$('temperature').value"))
    with torch.no_grad():
        p = (model(x)[0, draw["place"]].double() / temperature).softmax(-1)
    best = p.topk(5)
    for line, v, q in zip(card[1:], best.indices.tolist(), best.values.tolist(), strict=False):
        name = {" ": "space", "\n": "newline"}.get(tokenizer.alphabet[v], tokenizer.alphabet[v])
        assert line.split()[0] == name and abs(float(line.split()[1]) - q) < 2e-3
    chromium.mouse("document.querySelector('h1')", "mouseMoved")
    assert chromium.js("$('card').hidden")


def test_a_click_masks_a_token_and_the_model_redoes_it_alone(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    finish(chromium)
    before = shown(chromium)
    place, other = chromium.js("[...page.runs[0].draws.keys()].slice(0, 2)")
    chromium.mouse(f"page.boards[0].spans[{place}]")
    assert masked_now(chromium) == [place]
    chromium.mouse(f"page.boards[0].spans[{other}]")
    assert sorted(masked_now(chromium)) == sorted([place, other])
    chromium.until("page.shown === page.steps && !page.playing && !page.seeking")
    after = shown(chromium)
    assert masked_now(chromium) == []
    kept = [i for i in range(len(after)) if i not in (place, other)]
    assert [after[i] for i in kept] == [before[i] for i in kept]  # with their colours
    redone = chromium.js("page.runs.map((run) => [...run.draws.keys()].sort((a, b) => a - b))")
    assert redone == [sorted([place, other]), []]


def test_a_first_tap_shows_and_a_second_one_masks(demo):
    chromium, _, _, path = demo
    chromium.open(path, 380, True)
    finish(chromium)
    place = chromium.js("[...page.runs[0].draws.keys()][0]")
    span = f"page.boards[0].spans[{place}]"
    chromium.js(f"{span}.scrollIntoView({{block: 'center'}})")
    x, y = chromium.js(
        f"(b => [b.x + b.width / 2, b.y + b.height / 2])({span}.getBoundingClientRect())"
    )
    for expected in ([], [place]):
        touch = {"touchPoints": [{"x": x, "y": y}]}
        chromium.send("Input.dispatchTouchEvent", type="touchStart", **touch)
        chromium.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        time.sleep(0.5)
        assert masked_now(chromium) == expected
        assert chromium.js("$('card').hidden") == bool(expected)


def test_the_keyboard_does_what_the_pointer_does(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    finish(chromium)
    chromium.js("page.boards[0].spans[0].focus()")
    place = chromium.js("Math.min(...page.runs[0].draws.keys())")
    for _ in range(place):
        chromium.key("ArrowRight", 39)
    assert chromium.js("document.activeElement.place") == place
    assert "step" in chromium.js("document.activeElement.ariaLabel")
    assert not chromium.js("$('card').hidden")
    chromium.key("Enter", 13)
    assert masked_now(chromium) == [place]
    assert chromium.js("document.activeElement.place") == place
    chromium.js("$('slider').focus()")
    chromium.key("End", 35)
    chromium.until("page.shown === page.steps && !page.seeking")


def test_gaps_are_typed_or_selected_and_a_wrong_text_is_told(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    chromium.js("$('text').value = 'the cat sat'; $('text').setSelectionRange(4, 7)")
    chromium.mouse("$('mask')")
    assert chromium.js("$('text').value") == "the ___3 sat"
    assert chromium.js("$('length').textContent") == "11 tokens, 3 masked"
    chromium.js("$('text').value = 'a ___ mat'; $('text').oninput()")
    assert chromium.js("$('length').textContent") == "14 tokens, 8 masked"
    chromium.js("$('samples').value = 3")
    chromium.mouse("document.querySelector('form .main')")
    chromium.until("page.shown > 0")
    assert chromium.js("page.runs.map((run) => run.start.length)") == [14] * 3
    for text, message in {
        "Zoë ___3": "‘Z’ is not among",
        "a cat": "Nothing is masked",
        "___99": "99 tokens, but the model reads 40",
    }.items():
        chromium.call("(text) => { $('text').value = text; $('text').oninput(); }", text)
        assert message in chromium.js("$('length').textContent")
        turn = chromium.js("page.turn")
        chromium.mouse("document.querySelector('form .main')")
        assert chromium.js("page.turn") == turn and not chromium.js("$('request').checkValidity()")


def test_the_nelbo_is_shaded_by_token(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    chromium.mouse("document.querySelector('[value=nats]')")
    chromium.until("page.runs.every((run) => run.nats)")
    nats, bound = chromium.js("[page.runs[0].nats, page.runs[0].bound]")
    drawn = [i for i, (name, _) in enumerate(shown(chromium)) if name != "given"]
    assert f"NELBO {bound:.2f} nats" in chromium.js("page.boards[0].note.textContent")
    colours = chromium.js("page.boards[0].spans.map((s) => s.style.getPropertyValue('--c'))")
    by_nats = sorted((i for i in drawn if nats[i] is not None), key=lambda i: nats[i])
    green = [int(re.findall(r"\d+", colours[i])[1]) for i in by_nats]
    assert len(green) > 8 and green == sorted(green, reverse=True)  # grey, orange, red


def test_one_step_writes_no_more_than_what_it_changes(demo):
    chromium, _, _, path = demo
    chromium.open(path)
    finish(chromium)
    chromium.js("seek(0)")
    chromium.js("""window.touched = new Set(); window.watcher = new MutationObserver((list) => {
      for (const { target } of list) touched.add(target.place ?? target.parentNode.place); });
      watcher.observe(page.boards[0].text, { subtree: true, childList: true, attributes: true })""")
    for step in range(1, chromium.js("page.steps") + 1):
        chromium.js(f"touched.clear(); seek({step}).then(() => sleep(0))")
        draws = chromium.js("[...page.runs[0].draws.values()]")
        changed = {d["place"] for d in draws if d["step"] in (step - 1, step - 2)}
        assert set(chromium.js("[...touched]")) <= changed


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>hacked = 1",
    "<img src=x onerror=hacked=1>",
]
HOSTILE += ["&lt;b&gt;", "<!--", "]]>", "{{data}}", "\u2028", "\0", "a"]


class Hostile:
    """A vocabulary of markup."""

    kind, bos = "char", None
    table = [text.encode() for text in [*HOSTILE, "mask"]]  # noqa: RUF012

    def encode(self, text, start=True):
        return [HOSTILE.index(c) for c in text]


def test_tokens_are_text_and_never_markup(chromium, tmp_path):
    model, _ = network(alphabet="0123456789")
    data = page.with_weights(model, Hostile(), {"template": "a___30a"})
    path = tmp_path / "page.html"
    path.write_bytes(page.html(data, "").encode("utf8", "replace"))
    chromium.open(path)
    chromium.js("$('temperature').value = 50")  # so that each of them is drawn
    chromium.mouse("document.querySelector('form .main')")
    finish(chromium)
    drawn = chromium.js("[...page.runs[0].draws.values()]")
    texts = [text for _, text in shown(chromium)]
    assert {HOSTILE[d["token"]] for d in drawn} >= set(HOSTILE[:3])
    assert all(texts[d["place"]] == HOSTILE[d["token"]] for d in drawn)
    for draw in drawn:
        chromium.mouse(f"page.boards[0].spans[{draw['place']}]", "mouseMoved")
    assert chromium.js("typeof hacked") == "undefined"
    assert chromium.js("document.querySelectorAll('script').length") == 2
    assert chromium.js("document.querySelectorAll('main img, #card *, .text span *').length") == 0
    assert chromium.js("DATA.table") == HOSTILE
    assert not chromium.complaints()


def test_a_phone_a_dark_room_and_a_screen_reader(demo):
    chromium, _, _, path = demo
    chromium.open(path, 380, True)
    finish(chromium)
    assert chromium.js("document.documentElement.scrollWidth") == 380
    chromium.mouse("page.boards[0].spans[5]", "mouseMoved")
    left, right = chromium.js("(b => [b.left, b.right])($('card').getBoundingClientRect())")
    assert left >= 0 and right <= 380
    light, dark = "getComputedStyle(document.body).backgroundColor", "rgb(22, 24, 28)"
    assert chromium.js(light) == "rgb(251, 250, 247)"
    chromium.open(path, **{"prefers-color-scheme": "dark"})
    assert chromium.js(light) == dark
    nodes = chromium.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "slider", "spinbutton", "radio", "image", "link")
    named = [node for node in nodes if node.get("role", {}).get("value") in roles]
    own = [node for node in named if not node["ignored"]]
    names = {node["name"]["value"] for node in own if node.get("name", {}).get("value")}
    assert {"Play", "One step back", "One step forward", "Step", "Fill the gaps"} <= names
    assert {"Sampler", "Steps", "Temperature", "Seed", "Samples"} <= names


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
    model = Transformer(DEFAULTS | data["config"] | keys)
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


# ---- A recorded sample ---------------------------------------------------------------------------


@pytest.fixture
def recording():
    """(model, tokenizer, x, options, trace, tokens) of two samples of TEXT with two gaps."""

    def record(**keys):
        model, tokenizer = network()
        o, x = options(steps=9, seed=4, **keys), torch.tensor([start_of(tokenizer, model)] * 2)
        recorder = Recorder(tokenizer, x, model.mask_id, o)
        tokens, info = sample.sample(model, x, on_call=recorder, **o)
        return model, tokenizer, x, o, recorder.data(info), tokens

    return record


@pytest.mark.parametrize("sampler", ["ancestral", "any_order", "confidence"])
def test_a_trace_says_when_and_how_likely_each_token_was(recording, sampler):
    model, _, x, _, trace, tokens = recording(sampler=sampler, temperature=0.8)
    for i, run in enumerate(trace["samples"]):
        now = x[i].clone()
        assert (
            sorted(d["place"] for d in run["draws"])
            == (x[i] == model.mask_id).nonzero().flatten().tolist()
        )
        steps = [d["step"] for d in run["draws"]]
        assert steps == sorted(steps) and max(steps) < run["steps"]
        ranks = {step: call for call, step in enumerate(sorted(set(steps)))}
        for call in range(len(ranks)):
            with torch.no_grad():
                p = (model(now[None])[0].double() / 0.8).softmax(-1)
            draws = [d for d in run["draws"] if d["call"] == call]
            for d in draws:
                assert d["call"] == ranks[d["step"]]
                assert d["p"] == pytest.approx(float(p[d["place"], d["token"]]), abs=1e-3)
                best = p[d["place"]].topk(5)
                assert [v for v, _ in d["alternatives"]] == best.indices.tolist()
                assert [q for _, q in d["alternatives"]] == pytest.approx(
                    best.values.tolist(), abs=1e-3
                )
            for d in draws:
                now[d["place"]] = d["token"]
        assert torch.equal(now, tokens[i])
    json.dumps(trace)


def test_the_page_plays_a_trace_without_weights(chromium, recording, tmp_path):
    _, tokenizer, _, _, trace, tokens = recording()
    path = tmp_path / "page.html"
    path.write_text(page.html(trace | {"about": "A recorded sample."}, ""), encoding="utf8")
    chromium.open(path)
    assert not chromium.js("network") and not re.search(
        r'"(narrow|wide|config)":', path.read_text()
    )
    assert chromium.js("$('request').hidden && $('evaluation').hidden && $('redo').hidden")
    finish(chromium)
    text = chromium.js("page.boards.map(({ text }) => text.textContent)")
    assert text == [tokenizer.decode(row).replace("\n", "↵\n") for row in tokens.tolist()]
    chromium.mouse("page.boards[0].spans[5]")
    assert masked_now(chromium) == []  # nothing here could redo it
    chromium.js("seek(0)")
    assert len(masked_now(chromium)) == 17 and not chromium.complaints()


def test_a_page_is_written_beside_its_checkpoint(recording, tmp_path, monkeypatch, capsys):
    model, tokenizer = network()
    trained = model.config | {"tokenizer": tokenizer.meta()}
    monkeypatch.setattr(page.checkpoint, "load", lambda path, device: (model, tokenizer, trained))
    modules = [page.settings, diffusion, sample, page]
    config = page.settings.parse([f"--ckpt={tmp_path}", "--device=cpu"], *modules)
    page.main(config)
    assert (tmp_path / "page.html").is_file() and "page.html" in capsys.readouterr().out
    for wrong in ({"template": "Zoë ___3"}, {"template": "no gap"}):
        with pytest.raises(page.settings.UserError):
            page.main(config | wrong)
    model.config["attention"] = "causal"
    with pytest.raises(page.settings.UserError, match="--trace"):
        page.main(config)


# ---- A terminal and a picture --------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    def __init__(self, is_terminal, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)
        self.isatty = lambda: is_terminal

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def watched(out, **keys):
    model, tokenizer = network(block_size=120)
    o = options(steps=5, **keys)
    x = torch.full((2, 100), model.mask_id)
    on_call = watch.watch(tokenizer, x, model.mask_id, o, out=out, pause=0)
    tokens, info = sample.sample(model, x, on_call=on_call, **o)
    return tokenizer, tokens, info


@pytest.mark.parametrize("encoding", ["utf8", "ascii"])
def test_a_terminal_shows_each_call_in_the_place_of_the_last(encoding, monkeypatch):
    monkeypatch.setenv("LINES", "24")
    out = Terminal(True, encoding)
    _, _, info = watched(out)
    frames = re.split(r"\x1b\[(\d+)F", out.text())
    assert len(frames) == 2 * info["nfe"].max() - 1
    for frame, up in zip(frames[::2], [*frames[1::2], None], strict=True):
        lines = frame.split("\n")
        assert lines[-1] == "\x1b[J" and up in (None, str(len(lines) - 1))
        assert all(line.endswith("\x1b[K") for line in lines[:-1])
        plain = [re.sub(r"\x1b\[[\d;]*[mKJ]", "", line) for line in lines]
        assert max(map(len, plain)) <= 80 and len(lines) <= 24
        assert watch.NEW in frame
    assert ("░" if encoding == "utf8" else "_") in frames[0]
    assert watch.MASKED not in frames[-1]
    assert f"---- sample 1: step 5, network call {info['nfe'][0]}, 0 masked" in frames[-1]


@pytest.mark.parametrize("sampler", ["remask", "remask_rescale"])
def test_a_terminal_shows_what_is_masked_again(sampler):
    out = Terminal(False, "utf8")
    _, _, info = watched(out, sampler=sampler, eta=0.3)
    masked = torch.full((2, 100), True)
    events = sample.SAMPLERS[sampler](masked, options(steps=5, sampler=sampler, eta=0.3)).events[0]
    left = [int(now.sum() - due.sum()) for due, now in events]
    assert [int(n) for n in re.findall(r"(\d+) masked$", out.text(), re.M)] == left
    assert len(left) == info["nfe"][0] and sum(int(due.sum()) for due, _ in events) > 100
    assert [text.count("░") for text in out.text().split("----")[1:]] == left


def test_what_is_no_single_draw_a_position_is_not_recorded():
    model, tokenizer = network()
    with pytest.raises(page.settings.UserError, match="one draw a position"):
        page.recorded(model, tokenizer, options(sampler="remask"))
    model.config["attention"] = "causal"
    with pytest.raises(page.settings.UserError, match="one draw a position"):
        page.recorded(model, tokenizer, options())


def test_without_a_terminal_the_progress_is_plain_lines():
    out = Terminal(False, "utf8")
    tokenizer, tokens, info = watched(out, sampler="confidence")
    text = out.text()
    assert "\x1b" not in text and text.count("---- sample 1") == info["nfe"][0]
    last = text[text.rindex("0 masked\n") + len("0 masked\n") :]
    assert last.replace("\n", "") == tokenizer.decode(tokens[0].tolist()).replace("\n", "")
    assert max(map(len, text.split("\n"))) <= 80


def picture(trace, **keys):
    o = svg.DEFAULTS | keys
    return svg.draw(trace, o)


def test_a_picture_is_small_and_moves_by_css_alone(chromium, recording, tmp_path):
    *_, trace, _ = recording()
    text = picture(trace)
    tree = ET.fromstring(text)
    assert len(text.encode()) < 400_000
    assert {node.tag.rpartition("}")[2] for node in tree.iter()} == {"svg", "style", "rect", "text"}
    assert "prefers-color-scheme" in text and "prefers-reduced-motion" in text
    path = tmp_path / "a.svg"
    path.write_text(text, encoding="utf8")
    chromium.open(path, **{"prefers-reduced-motion": "no-preference"})
    draws, steps = trace["samples"][0]["draws"], trace["samples"][0]["steps"]
    seen = """(at) => { for (const a of document.getAnimations()) { a.pause(); a.currentTime = at; }
      return [".hole", ".token", ".note"].map((kind) => [...document.querySelectorAll(kind)]
        .filter((node) => getComputedStyle(node).opacity > 0.5).map((n) => n.textContent)); }"""
    for step in range(steps + 1):
        holes, come, notes = chromium.call(seen, 120 * (4 + 76 * (step + 0.5) / steps))
        before = [d for d in draws if d["step"] < step]
        assert len(holes) == len(draws) - len(before) and len(notes) == bool(before)
        assert len(come) == len([d for d in before if trace["table"][d["token"]] != "\n"])
        calls = len({d["call"] for d in before})
        assert not before or notes[0].startswith(f"network call {calls} of ")
    assert not chromium.complaints()


def test_a_still_picture_shows_four_moments(recording):
    _, tokenizer, _, _, trace, tokens = recording()
    tree = ET.fromstring(picture(trace, still=True))
    lines = ["".join(node.itertext()) for node in tree.iter() if node.tag.endswith("text")]
    heads = [line for line in lines if line.startswith("t = ")]
    assert [head.split(",")[0] for head in heads] == ["t = 1", "t = 0.6", "t = 0.3", "t = 0"]
    run = trace["samples"][0]
    holes = [node for node in tree.iter() if node.get("class") == "hole"]
    masked = sum(
        d["step"] >= (1 - t) * run["steps"] for t in (1, 0.6, 0.3, 0) for d in run["draws"]
    )
    assert len(holes) == masked
    assert heads[-1].endswith(f"{1 + max(d['call'] for d in run['draws'])} network calls")
    last = "".join(lines[lines.index(heads[-1]) + 1 :])
    assert last == tokenizer.decode(tokens[0].tolist()).replace("\n", "")


def test_markup_in_a_picture_is_text():
    draws = [{"place": i, "step": i, "call": i, "token": i} for i in range(len(HOSTILE))]
    run = {"start": [99] * len(draws), "draws": draws, "steps": len(draws), "expected": 3.0}
    table = {i: text.replace("\0", "?") for i, text in enumerate(HOSTILE)}
    for still in (False, True):
        tree = ET.fromstring(picture({"table": table, "samples": [run]}, still=still))
        text = "".join(tree.itertext())
        assert all(part in text for part in HOSTILE[:7])
        assert {node.tag.rpartition("}")[2] for node in tree.iter()} <= {
            "svg",
            "style",
            "rect",
            "text",
        }
