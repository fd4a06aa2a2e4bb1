"""What a sample does call by call: shown in a terminal, or recorded for a page or a picture."""

import contextlib
import shutil
import sys
import time

from sample import keep_likely
from samplers import SAMPLERS

WIDTH = 80
NEW, MASKED, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def token_text(tokenizer, token):
    """The text of a token, with a sign for NUL, which is the end of an answer in an alphabet."""
    return tokenizer.table[token].decode("utf8", "replace").replace("\0", "∎")


def unmask_steps(masked, o):
    """The step of each position (N, L), as sample.py draws it; None where a call is a step."""
    by_time = o["sampler"] in ("ancestral", "euler")  # drawn ahead of the calls
    return SAMPLERS[o["sampler"]](masked, o).step if by_time else None


def watch(tokenizer, x, mask_id, options, out=None, pause=0.04):
    """An `on_call` of sample.sample that draws x (N, L) after each network call.

    In a terminal a frame takes the place of the last one, by one write, as far as there is room.
    Elsewhere the lines of the first sequence follow one another.
    """
    out, x, height = out or sys.stdout, x.cpu().clone(), 0
    steps, coding, terminal = unmask_steps(x == mask_id, options), out.encoding, out.isatty()
    policy = SAMPLERS[options["sampler"]](x == mask_id, options)  # says what is masked again
    mark = "░" if "utf" in (coding or "").lower() else "_"
    counters = ["not begun"] * len(x)

    def on_call(rows, places, calls, tokens, p, logits):
        nonlocal height
        if policy.remasks:
            x[rows] = x[rows].masked_fill(policy.masked_at(rows, calls), mask_id)
        x[rows, places] = tokens.to(x)
        at = calls if steps is None else steps[rows, places]  # (n,)
        for row, step, call in zip(rows.tolist(), at.tolist(), calls.tolist(), strict=True):
            left = int((x[row] == mask_id).sum())
            counters[row] = f"step {step + 1}, network call {call + 1}, {left} masked"
        frame = []
        for row in range(len(x)) if terminal else {0} & set(rows.tolist()):
            new = set(places[rows == row].tolist()) if terminal else None
            text = lines(tokenizer, x[row].tolist(), mask_id, mark, new)
            frame += [f"---- sample {row + 1}: {counters[row]}", *text]
        text = f"\x1b[{height}F" if height else ""  # up to where the last one began
        if terminal:
            frame = [line + "\x1b[K" for line in frame[: shutil.get_terminal_size().lines - 1]]
            height = len(frame)
        text += "".join(line + "\n" for line in frame) + ("\x1b[J" if terminal else "")
        with contextlib.suppress(OSError):  # who watched is gone; the samples are still wanted
            out.write(text.encode(coding or "ascii", "replace").decode(coding or "ascii"))
            out.flush()
        time.sleep(pause if terminal else 0)

    return on_call


def lines(tokenizer, ids, mask_id, mark, new):
    """The text in lines of WIDTH characters; new: places in colour, None: no colours at all."""
    out, width = [""], 0
    for place, token in enumerate(ids):
        text = mark if token == mask_id else token_text(tokenizer, token)
        colour = MASKED if token == mask_id else NEW if place in (new or ()) else ""
        for character in text:
            if character == "\n" or width == WIDTH:
                out, width = [*out, ""], 0
            if character != "\n":
                shown = character if character.isprintable() else "?"
                out[-1] += f"{colour}{shown}{PLAIN}" if colour and new is not None else shown
                width += 1
    return out


class Recorder:
    """An `on_call` of sample.sample: each token's step, call, probability and five alternatives."""

    def __init__(self, tokenizer, x, mask_id, options):
        self.tokenizer, self.start, self.mask_id, self.o = tokenizer, x.cpu(), mask_id, options
        self.steps = unmask_steps(self.start == mask_id, options)  # (N, L) or None
        self.draws = [[] for _ in x]

    def __call__(self, rows, places, calls, tokens, p, logits):
        likely = (logits.double() / (self.o["temperature"] or 1)).softmax(-1)  # (n, V)
        likely = keep_likely(likely, self.o["top_k"], self.o["top_p"])
        likely /= likely.sum(-1, keepdim=True)
        likely = likely.topk(min(5, likely.shape[1]))  # (n, 5)
        steps = calls if self.steps is None else self.steps[rows, places]  # (n,)
        columns = places, steps, calls, tokens, p, likely.indices, likely.values
        for row, *draw, ids, ps in zip(*(z.tolist() for z in (rows, *columns)), strict=True):
            draw = dict(zip(("place", "step", "call", "token", "p"), draw, strict=True))
            draw["alternatives"] = [[v, round(q, 4)] for v, q in zip(ids, ps, strict=True)]
            self.draws[row].append(draw)

    def data(self, info):
        """{mask_id, table: {id: text}, samples: {start, draws, steps, expected calls} of each}."""
        samples, used = [], set(self.start.flatten().tolist()) - {self.mask_id}
        for start, draws, nfe in zip(self.start.tolist(), self.draws, info["nfe"], strict=True):
            run = {"start": start, "draws": draws, "expected": info["expected_nfe"]}
            samples.append(run | {"steps": int(nfe) if self.steps is None else self.o["steps"]})
            used |= {v for draw in draws for v, _ in [*draw["alternatives"], (draw["token"], 1)]}
        table = {v: token_text(self.tokenizer, v) for v in sorted(used)}
        return {"mask_id": self.mask_id, "table": table, "samples": samples}
