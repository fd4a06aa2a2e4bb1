"""A sample that is watched: its trace, and the page, the terminal and the picture that show it."""

import io
import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from pages import HOSTILE, finish, masked_now, network, options, start_of

import sample
from lib import watch
from view import page, svg
from view.page import Recorder

# ---- A recorded sample ---------------------------------------------------------------------------


@pytest.fixture
def recording():
    """(model, tokenizer, x, options, trace, tokens) of two samples of TEXT with two gaps."""

    def record(**keys):
        model, tokenizer = network()
        o = {key: options(steps=9, seed=4, **keys)[key] for key in sample.OPTIONS}
        x = torch.tensor([start_of(tokenizer, model)] * 2)
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
    monkeypatch.setattr("run.checkpoint.load", lambda *_, ema: (model, tokenizer, trained))
    modules = [*sample.MODULES, page]
    config = page.settings.parse([f"--ckpt={tmp_path}", "--device=cpu"], *modules)
    page.main(config)
    assert (tmp_path / "page.html").is_file() and "page.html" in capsys.readouterr().out
    for wrong in ({"template": "Zoë ___3"}, {"template": "no gap"}):
        with pytest.raises(page.settings.UserError):
            page.main(config | wrong)
    for key, value, said in (("conv", 3, "--trace"), ("attention", "causal", "is causal")):
        model.config[key] = value
        with pytest.raises(page.settings.UserError, match=said):
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
    o = {key: options(steps=5, **keys)[key] for key in sample.OPTIONS}
    x = torch.full((2, 100), model.mask_id)
    policy = sample.SAMPLERS[o["sampler"]](x == model.mask_id, o)
    on_call = watch.watch(tokenizer, x, model.mask_id, policy, o, out=out, pause=0)
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
        page.recorded((model, tokenizer, {}), options(sampler="remask"))
    model.config["attention"] = "causal"
    with pytest.raises(page.settings.UserError, match="one draw a position"):
        page.recorded((model, tokenizer, {}), options())


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
