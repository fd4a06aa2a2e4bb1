"""From text to the ids of a request, and from the ids of samples to printed text."""

import os
import re
import sys

import torch

from config import plural, refuse_typed, require
from lib.files import opened, to_json, whole_file
from lib.stats import mean_half, plus_minus


def text_or_file(text):
    """A text of the command line: the text itself or, for FILE:PATH, what the file holds.

    A newline at the end of the file is dropped, since editors add one.
    """
    if not text.startswith("FILE:"):
        return text
    with opened(os.path.expanduser(text.removeprefix("FILE:"))) as file:
        return file.read().removesuffix("\n")


def encode(tokenizer, model, text, start=True):
    """The ids of a text; at the start of a sequence they follow the tokenizer's bos, if any.

    Documents do so in training, too. A causal network whose start_id is the bos reads it anyway.
    """
    bos = [tokenizer.bos] if start and tokenizer.bos not in (None, model.start_id) else []
    return bos + tokenizer.encode(text, start) if text else []


def without_space(tokenizer, model, text):
    """The text before a gap without its final space, which the gap has to supply.

    If the token of a word includes the space (BPE), spaces hardly ever stand alone in training.
    A model of examples takes its prompt literally, as in training.
    """
    joins = tokenizer.joins_spaces and not model.config.get("example_width")
    return text.removesuffix(" ") if joins else text


def before_gap(tokenizer, model, text, start):
    """The ids of a text before a gap."""
    return encode(tokenizer, model, without_space(tokenizer, model, text), start)


def gapped_ids(tokenizer, model, prompt="", suffix="", template="", length=0):
    """A request as a list of ids, with mask_id where a token is wanted; UserError if impossible."""
    if template:
        require(not prompt and not suffix, "give --template or --prompt and --suffix, not both")
        require(not length, "a template has its own length; leave --length out")
        return template_ids(tokenizer, model, template)
    block = model.block_size
    length = length or block
    require(length <= block, f"length must be at most block_size {block}, not {length}")
    head = before_gap(tokenizer, model, prompt, start=True)
    tail = encode(tokenizer, model, suffix, start=False)
    n_new = length - len(head) - len(tail)
    given = plural(length - n_new, "token")
    message = f"prompt and suffix are {given} of {length}: none is left to fill"
    require(n_new > 0, message)
    return head + [model.mask_id] * n_new + tail


def template_ids(tokenizer, model, template):
    """The ids of a text with gaps: ___12 becomes 12 times mask_id."""
    pieces, block = re.split(r"___(\d+)", template), model.block_size  # text, gap, text, ..., text
    advice = "write ___12 for a gap of 12 tokens in"
    require(len(pieces) > 1, f"the template has no gap: {advice} '{template}'")
    (*before, last), gaps = pieces[::2], pieces[1::2]
    texts = [before_gap(tokenizer, model, text, start=i == 0) for i, text in enumerate(before)]
    texts.append(encode(tokenizer, model, last, start=False))
    for gap in gaps:
        require(len(gap) < 8, f"a gap of ___{gap} tokens is longer than the block ({block})")
    total = sum(map(len, texts)) + sum(map(int, gaps))
    require(any(map(int, gaps)), f"the template has no gap of one token or more: '{template}'")
    require(total <= block, f"the template is {total} tokens, the block {block}")
    ids = texts[0]
    for gap, text in zip(gaps, texts[1:], strict=True):
        ids += [model.mask_id] * int(gap) + text
    return ids


def by_token(tokenizer, ids, nats, n):
    """The nats (draws, L) of each token of ids (L,), as a dict and as the text of a table.

    The first n tokens count; the ids after them are the padding of an example.
    """
    mean = nats.mean(0).tolist()
    total, half = mean_half(nats.sum(1))
    texts = [tokenizer.table[i].decode("utf8", "replace") for i in ids]
    lines = [f"{value:10.4f}  {text!r}" for value, text in list(zip(mean, texts, strict=True))[:n]]
    if n < len(ids):
        padding = f"{len(ids) - n} more of the last, to the width of the examples"
        lines.append(f"{sum(mean[n:]):10.4f}  {padding}")
    interval = plus_minus(half)
    interval += " (95% over the orders)" if interval else ""
    lines = ["      nats  token, given those before it in the order", *lines]
    lines.append(f"{total:10.4f}  in all{interval}, {total / n:.4f} per token")
    result = {"tokens": ids, "texts": texts, "nats": mean, "total": total, "draws": len(nats)}
    return result, "\n".join(lines)


def check_text(config, of_data):
    """Raise UserError if --text is missing, or for keys that do not go with it."""
    text_given = "text" in config.get("user_keys", ()) or config["prompt"]
    require(config["text"] or not text_given, "the text to score is empty: give --text=")
    if config["text"]:
        refuse_typed(config, of_data, "does not go with --text")


def is_given(config, answers):
    """Whether a command says what to fill, or there is no terminal to ask for prompts.

    Raises UserError if the model answers prompts and got none; to draw free samples, give it an
    empty one. For other models, a line says that free samples are drawn for lack of a terminal.
    """
    keys, terminal = {*config["user_keys"]}, (sys.stdin, sys.stdout)
    if keys & {"prompt", "suffix", "template"}:
        return True
    free = keys & {"num_samples", "out"}
    if not free and all(stream and stream.isatty() for stream in terminal):
        return False
    pipe = "from a pipe: --prompt=FILE:/dev/stdin"
    require(not answers, f"this model answers prompts: give --prompt=..., or {pipe}")
    if not free:
        said = "no prompt, and no terminal to ask for one, so these are free samples; a prompt"
        print(said, pipe, file=sys.stderr)
    return True


def suppress_eos(x, begins, least, eos_id):
    """`suppress` for sample: no eos_id in row i of x (N, L) before position begins[i] + least.

    None without either. Raises UserError if the model knows no eos, or has no room for so many
    tokens.
    """
    if eos_id < 0 and not least:
        return None
    message = "min_new_tokens is for answers by models of examples, which know an eos"
    require(eos_id >= 0, message)
    suppress = torch.full(x.shape, -1)  # (N, L)
    for row, begin in zip(suppress, begins, strict=True):
        room = len(row) - begin
        require(least <= room, f"min_new_tokens must be at most the {room} to fill")
        row[: begin + least] = eos_id
    return suppress


def text_of(tokenizer, ids, begin=0, eos_id=-1, apart=False):
    """The text of a sample, which ends before the first eos_id from position `begin` on.

    apart: the answer, which begins there, starts on a new line.
    """
    if eos_id < 0:
        return tokenizer.decode(ids)
    stop = ids.index(eos_id, begin) if eos_id in ids[begin:] else len(ids)
    parts = ([i for i in ids[:n] if i != tokenizer.bos] for n in (stop, begin))
    text, prompt = map(tokenizer.decode, parts)
    if apart and prompt and not prompt.endswith("\n"):
        return f"{prompt}\n{text.removeprefix(prompt)}"
    return text


def say(records, texts, info, n_new, out):
    """Print the texts, network calls and time; write the records to the file `out`, if given."""
    if out:
        with whole_file(out) as path, open(path, "w", encoding="utf8") as file:
            file.writelines(to_json(record) + "\n" for record in records)
    for i, (record, text) in enumerate(zip(records, texts, strict=True), start=1):
        print(f"---- sample {i}: {plural(record['nfe'], 'network call')}\n{text}")
    nfe, seconds = info["nfe"].double().mean(), info["seconds"]
    expected = info["expected_nfe"]
    expected = "" if expected is None else f", expected {expected:.1f}"
    print(f"---- NFE {nfe:.1f} a sequence{expected} for {plural(n_new, 'masked token')};", end="")
    L = len(records[0]["tokens"])
    speed = n_new * len(records) / max(seconds, 1e-6)
    samples = f"{plural(len(records), 'sample')} of {plural(L, 'token')}"
    print(f" {seconds:.2f} s for {samples}, {speed:.0f} tokens/s")


def suppress_tokens(logits, tokens):
    """Suppress one token in each row, in place: logits (N, V), tokens (N,), -1 for none."""
    column = tokens[:, None].clamp(min=0)  # (N, 1)
    logit = logits.gather(1, column)  # (N, 1)
    logits.scatter_(1, column, logit.masked_fill(tokens[:, None] >= 0, -torch.inf))
