"""Show a sample as it emerges, call by call, in a terminal or in plain lines."""

import contextlib
import shutil
import sys
import time

WIDTH = 80
NEW, MASKED, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def token_text(tokenizer, token):
    """The text of a token, with a symbol for NUL, the eos of a character alphabet."""
    return tokenizer.table[token].decode("utf8", "replace").replace("\0", "∎")


def watch(tokenizer, x, mask_id, policy, o, out=None, pause=0.04):
    """An `on_call` for sample.sample that prints x (N, L) after each network call.

    policy: made from the options o, since `sample` uses up its own. In a terminal each frame
    replaces the last one in a single write, as far as there is room. Elsewhere only the first
    sequence is printed, one frame after another.
    """
    out, x, height = out or sys.stdout, x.cpu().clone(), 0
    steps, coding, terminal = policy.step, out.encoding, out.isatty()
    mark = "░" if "utf" in (coding or "").lower() else "_"
    counters = ["not begun"] * len(x)

    def on_call(rows, positions, calls, tokens, p, logits):
        nonlocal height
        if policy.remasks:
            x[rows] = x[rows].masked_fill(policy.masked_at(rows, calls), mask_id)
        x[rows, positions] = tokens.to(x)
        at = calls if steps is None else steps[rows, positions]  # (n,)
        for row, step, call in zip(rows.tolist(), at.tolist(), calls.tolist(), strict=True):
            left = int((x[row] == mask_id).sum())
            counters[row] = f"step {step + 1}, network call {call + 1}, {left} masked"
        frame = []
        for row in range(len(x)) if terminal else {0} & set(rows.tolist()):
            new = set(positions[rows == row].tolist()) if terminal else None
            text = lines(tokenizer, x[row].tolist(), mask_id, mark, new)
            frame += [f"---- sample {row + 1}: {counters[row]}", *text]
        text = f"\x1b[{height}F" if height else ""  # up to the start of the last frame
        if terminal:
            frame = [line + "\x1b[K" for line in frame[: shutil.get_terminal_size().lines - 1]]
            height = len(frame)
        text += "".join(line + "\n" for line in frame) + ("\x1b[J" if terminal else "")
        with contextlib.suppress(OSError):  # nobody watches any more; the samples are still wanted
            out.write(text.encode(coding or "ascii", "replace").decode(coding or "ascii"))
            out.flush()
        time.sleep(pause if terminal else 0)

    return on_call


def lines(tokenizer, ids, mask_id, mark, new):
    """The text in lines of WIDTH characters. new: positions to colour; None: no colours at all."""
    out, width = [""], 0
    for position, token in enumerate(ids):
        text = mark if token == mask_id else token_text(tokenizer, token)
        colour = MASKED if token == mask_id else NEW if position in (new or ()) else ""
        for character in text:
            if character == "\n" or width == WIDTH:
                out, width = [*out, ""], 0
            if character != "\n":
                shown = character if character.isprintable() else "?"
                out[-1] += f"{colour}{shown}{PLAIN}" if colour and new is not None else shown
                width += 1
    return out
