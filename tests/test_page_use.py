"""The page in use, in a real browser: it shows what was drawn, and each of its controls works."""

import re
import time

import torch
from pages import HOSTILE, ON_PAGE, finish, masked_now, network, shown

import samplers
from view import page

# ---- The steps of a sample -----------------------------------------------------------------------


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


# ---- Pointer, finger and keys --------------------------------------------------------------------


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


# ---- What is asked for ---------------------------------------------------------------------------


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
        chromium.js("window.earlier = page.runs, null")
        chromium.mouse("document.querySelector('form .main')")
        assert chromium.js("page.runs === earlier && !$('request').checkValidity()")


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
        assert chromium.js(f"+$('{key}').value") == samplers.DEFAULTS[key]
    chromium.js("$('sampler').value = 'threshold'; $('sampler').onchange()")
    chromium.js("$('steps').value = ''; $('threshold').value = 0.2; $('samples').value = 3")
    chromium.mouse("document.querySelector('form .main')")
    chromium.until("page.playing")
    assert chromium.js("page.steps") == 12  # at most
    assert re.match(r"\d+ network calls? ·", chromium.js("page.boards[0].note.textContent"))
    finish(chromium)
    calls = chromium.js("page.runs.map((run) => run.calls)")
    assert 1 < max(calls) < 12 and masked_now(chromium) == []
    assert chromium.js("[page.steps, page.shown, +$('slider').max]") == [max(calls)] * 3
    last = chromium.js("page.runs.map(({ draws }) => [...draws.values()].at(-1).step)")
    assert [step + 1 for step in last] == calls and not chromium.complaints()


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
    part = [int(re.search(r"(\d+)%", colours[i])[1]) for i in by_nats]
    assert len(set(part)) > 4 and part == sorted(part)  # from grey to red


# ---- Strange tokens and other readers ------------------------------------------------------------


class Hostile:
    """A vocabulary of markup."""

    kind, bos, joins_spaces = "char", None, False
    table = [text.encode() for text in [*HOSTILE, "mask"]]  # noqa: RUF012

    def encode(self, text, start=True):
        return [HOSTILE.index(c) for c in text]


def test_tokens_are_text_and_never_markup(chromium, tmp_path):
    model, _ = network(alphabet="0123456789")
    data = page.with_weights((model, Hostile(), {}), {"template": "a___30a"})
    path = tmp_path / "page.html"
    path.write_bytes(page.html(data, "").encode("utf8", "replace"))
    chromium.open(path)
    chromium.js("$('temperature').value = 50")  # so that each of them is drawn
    chromium.mouse("document.querySelector('form .main')")
    finish(chromium)
    drawn = chromium.js("[...page.runs[0].draws.values()]")
    texts = [text for _, text in shown(chromium)]
    assert {HOSTILE[d["token"]] for d in drawn} >= set(HOSTILE[:3])
    table = [text.replace("\0", "∎") for text in HOSTILE]
    assert all(texts[d["place"]] == table[d["token"]] for d in drawn)
    for draw in drawn:
        chromium.mouse(f"page.boards[0].spans[{draw['place']}]", "mouseMoved")
    assert chromium.js("typeof hacked") == "undefined"
    assert chromium.js("document.querySelectorAll('script').length") == 2
    assert chromium.js("document.querySelectorAll('main img, #card *, .text span *').length") == 0
    assert chromium.js("DATA.table") == table
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
