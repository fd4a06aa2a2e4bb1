"""A sample's progress in a terminal: what is new in colour, counters, redrawn in place."""

import contextlib
import shutil
import sys
import time

import torch

from samplers import SAMPLERS
from view.trace import unmask_steps

WIDTH = 80
NEW, MASKED, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def watch(tokenizer, x, mask_id, options, out=None, pause=0.04):
    """An `on_call` of sample.sample that draws x (N, L) after each network call.

    In a terminal a frame takes the place of the last one, by one write, as far as there is room.
    Elsewhere the lines of the first sequence follow one another.
    """
    out, x = out or sys.stdout, x.cpu().clone()
    steps, coding, terminal = unmask_steps(x == mask_id, options), out.encoding, out.isatty()
    mark = "░" if "utf" in (coding or "").lower() else "_"
    counters, height = ["not begun"] * len(x), 0
    policy = SAMPLERS[options["sampler"]](x == mask_id, options)  # says what is masked again

    def on_call(rows, places, calls, tokens, p, logits):
        nonlocal height
        live = rows.unique()  # (b,)
        done = torch.stack([calls[rows == row][0] for row in live])  # (b,)
        if policy.remasks:
            x[live] = x[live].masked_fill(policy.masked_at(live, done), mask_id)
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
        frame = frame[: shutil.get_terminal_size().lines - 1] if terminal else frame
        text = "".join(line + ("\x1b[K\n" if terminal else "\n") for line in frame)
        text = (f"\x1b[{height}F" if height else "") + text + ("\x1b[J" if terminal else "")
        with contextlib.suppress(OSError):  # who watched is gone; the samples are still wanted
            out.write(text.encode(coding or "ascii", "replace").decode(coding or "ascii"))
            out.flush()
        height = len(frame) if terminal else 0
        time.sleep(pause if terminal else 0)

    return on_call


def lines(tokenizer, ids, mask_id, mark, new):
    """The text in lines of WIDTH characters; new: places in colour, None: no colours at all."""
    out, width = [""], 0
    for place, token in enumerate(ids):
        text = mark if token == mask_id else tokenizer.table[token].decode("utf8", "replace")
        colour = MASKED if token == mask_id else NEW if place in (new or ()) else ""
        for character in text:
            if character == "\n" or width == WIDTH:
                out, width = [*out, ""], 0
            if character != "\n":
                shown = character if character.isprintable() else "?"
                out[-1] += f"{colour}{shown}{PLAIN}" if colour and new is not None else shown
                width += 1
    return out
