"""A picture of a real sample: animated, or still at t = 1, 0.6, 0.3 and 0.

    python -m view.svg --ckpt=out/pydocs --template="The list ___24 is sorted by ___16."

Only CSS animates it, so it works inside <img>, where no script may run; light or dark follows the
reader's setting. One sample is drawn for it, with the keys of sample.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, too

from html import escape

import sample
from config import plural
from lib import program
from lib.files import check_ending, whole_file
from view import page

DEFAULTS = {
    "svg": "sample.svg",  # the file to write
    "still": False,  # four still moments, one below the other
    "columns": 60,  # characters per line
    "seconds": 12.0,  # the duration of one loop of the animation
}
MOMENTS = (1.0, 0.6, 0.3, 0.0)  # t of the still picture
WIDE, HIGH, EDGE = 10, 28, 24  # a character, a line, a margin
STYLE = """svg{--ink:#23262b;--soft:#63676f;--hole:#dcd8ce;--new:#2f5bb7;--card:#fff}
@media(prefers-color-scheme:dark){svg{--ink:#e6e4df;--soft:#9b9fa8;--hole:#454a54;--new:#8fb0f5;
--card:#1e2126}}text{font:16px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;
fill:var(--ink);white-space:pre}.hole{fill:var(--hole)}.new{fill:var(--new);font-weight:bold}
.card{fill:var(--card)}.note{fill:var(--soft)}.moves.hole,.moves.note{opacity:0}
.moves.note:last-child{opacity:1}@media(prefers-reduced-motion){.moves{animation:none!important}}"""


def cells(trace, columns):
    """(x, y, text, draw or None) of each token of the first sample, in lines of `columns`."""
    run, x, y = trace["samples"][0], 0, 0
    draws = {draw["place"]: draw for draw in run["draws"]}
    for position, token in enumerate(run["start"]):
        draw = draws.get(position)
        text = trace["table"][draw["token"] if draw else token]
        if x + len(text) > columns or "\n" in text:
            x, y, text = 0, y + 1, text.replace("\n", "")
        yield x * WIDE, y * HIGH, text, draw
        x += len(text)


def letters(x, y, text, more=""):
    """The text with every character at its own position, whatever the font."""
    at = " ".join(str(EDGE + x + WIDE * i) for i in range(len(text)))
    return f'<text x="{at}" y="{EDGE + y + 15:g}" {more}>{escape(text)}</text>' if text else ""


def hole(x, y, text, more='class="hole"'):
    place = f'x="{EDGE + x + 1}" y="{EDGE + y + 1:g}" width="{max(1, WIDE * len(text) - 2)}"'
    return f'<rect {place} height="18" rx="2" {more}/>'


def keyframes(name, at, before, after, later):
    """Switch from `before` to `after` at `at` percent, then move gradually through `later`."""
    return f"@keyframes {name}{{0%,{at:.2f}%{{{before}}}{at + 0.01:.2f}%{{{after}}}{later}}}"


def animated(trace, o):
    """(elements, bottom): each call's masks vanish and its tokens appear, coloured for a while."""
    run, tokens, body, css = trace["samples"][0], list(cells(trace, o["columns"])), [], ""
    when = lambda draw: round(4 + 76 * (draw["step"] + 1) / run["steps"], 2)  # noqa: E731
    at = {draw["call"]: when(draw) for draw in run["draws"]}  # percent of a loop

    def moving(name, call):
        style = f"animation:{name[0]}{call} {o['seconds']}s infinite"
        return f'class="moves {name}" style="{style}"'

    for call, until in zip(at, [*list(at.values())[1:], 99.9], strict=True):
        css += keyframes(f"h{call}", at[call], "opacity:1", "opacity:0", "to{opacity:0}")
        new, old = "opacity:1;fill:var(--new)", f"{at[call] + 8:.2f}%,to{{fill:var(--ink)}}"
        css += keyframes(f"t{call}", at[call], "opacity:0", new, old)
        end = f"{until:.2f}%{{opacity:1}}{until + 0.01:.2f}%,to{{opacity:{int(until == 99.9)}}}"
        css += keyframes(f"n{call}", at[call], "opacity:0", "opacity:1", end)
    for x, y, text, draw in tokens:
        body += [hole(x, y, text, moving("hole", draw["call"]))] if draw else []
        body += [letters(x, y, text, moving("token", draw["call"]) if draw else "")]
    bottom = tokens[-1][1] + 1.6 * HIGH
    for call in at:
        text = f"network call {call + 1} of {len(at)}"
        text += f", expected {run['expected']:.1f}" if run["expected"] is not None else ""
        body += [letters(0, bottom, text, moving("note", call))]
    return [f"<style>{css}</style>", *body], bottom


def still(trace, o):
    """(elements, bottom): one text at four times, with the number of network calls so far."""
    run, tokens, body, top = trace["samples"][0], list(cells(trace, o["columns"])), [], 0
    for t, before in zip(MOMENTS, (2.0, *MOMENTS), strict=False):
        shown, old = ((1 - z) * run["steps"] for z in (t, before))  # steps taken
        calls = len({draw["call"] for draw in run["draws"] if draw["step"] < shown})
        text = f"t = {t:g}, {plural(calls, 'network call')}"
        body += [letters(0, top, text, 'class="note"')]
        for x, y, text, draw in tokens:
            if draw and draw["step"] >= shown:
                body += [hole(x, top + HIGH + y, text)]
            else:
                name = "new" if draw and draw["step"] >= old else "given"
                body += [letters(x, top + HIGH + y, text, f'class="{name}"')]
        top += tokens[-1][1] + 2.7 * HIGH
    return body, top - 1.7 * HIGH


def draw(trace, o):
    """The picture of a trace's first sample."""
    body, bottom = (still if o["still"] else animated)(trace, o)
    size = f"{o['columns'] * WIDE + 2 * EDGE} {bottom + 2 * EDGE + 20:.0f}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>'
    card = '<rect class="card" width="100%" height="100%" rx="12"/>'
    return "\n".join([head, card, *body, "</svg>"])


def main(config):
    """Draw a sample and write its picture."""
    check_ending("svg", config["svg"], ".svg")
    trace = page.made(config | {"num_samples": 1}, page.recorded)
    with whole_file(config["svg"]) as path:
        Path(path).write_text(draw(trace, config), encoding="utf8")


if __name__ == "__main__":
    program.run(main, *sample.MODULES, sys.modules[__name__])
