"""Sampling: fill every masked position of a sequence, in an order that the sampler decides.

    python sample.py --ckpt=out/pydocs                                    free samples
    python sample.py --ckpt=out/pydocs --prompt="The list "               begun (ended: --suffix=)
    python sample.py --ckpt=out/pydocs --template="The ___12 of a list."  a gap of 12 tokens
    python sample.py --ckpt=out/pairs --prompt="Who?" --cfg_scale=0.8     guided by its prompt

- Whatever is not masked is a condition and never changes: a prompt, the text around a gap.
- A network call gives p(x0_i | visible) at the positions that are due; each is drawn from it.
- Which are due is the sampler's policy, one entry of SAMPLERS. The loop knows none of them.

What makes it fast: when ancestral and Euler sampling unmask a position does not depend on the
network (diffusion.py, part 6). So all steps are drawn before the first call, and those at which a
sequence unmasks nothing are skipped: RADD (arXiv 2406.03736, section 3.2) saves these calls with a
cache, here there is nothing to keep. Each sequence goes to its own next step, a finished one makes
room for another, and only positions that are due pass the last layer and the head.

    steps drawn for four positions, -1 being a condition:  [5, -1, 2, 5]
    the calls of that sequence, which are two:             [1, -1, 0, 1]
"""

import json
import re
import sys
import time

import torch
from tqdm import tqdm

import config as settings
import diffusion
from config import require
from data.tokenizer import from_meta
from lib import checkpoint
from lib.device import can_compile, machine
from lib.files import whole_file
from model import Cache

DEFAULTS = {
    "ckpt": "out/pydocs",  # a run's folder, an export, published weights (checkpoint.load)
    "sampler": "ancestral",  # one of SAMPLERS
    "steps": 128,  # ancestral, euler, confidence, smdm_greedy; others unmask one token a call
    "temperature": 1.0,  # 0: the likeliest token
    "top_k": 0,  # keep the k likeliest tokens; 0: all
    "top_p": 1.0,  # keep the likeliest tokens that hold this much probability
    "cfg_scale": 0.0,  # guidance by the condition: logits u + (1 + w)(c - u), u without it; 0: off
    "prompt": "",  # the beginning of each sample
    "suffix": "",  # the end of each sample
    "template": "",  # text with gaps: ___12 is a gap of 12 tokens
    "length": 0,  # tokens in a sample, prompt and suffix included; 0: all that the model takes
    "min_new_tokens": 0,  # of an answer before its end mark, at least (models of examples)
    "num_samples": 4,  # how many times the request is filled
    "batch_size": 16,  # sequences in one network call
    "compile": False,  # compile the network: pays for many or long samples
    "out": "",  # also write the samples to this .jsonl file
}


# ---- 1. The draw ---------------------------------------------------------------------------------
def categorical(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Invert the distribution function: logits (N, V), u (N,) uniform -> tokens (N,), their p (N,).

    In float64. Gumbel noise in float32 cuts the tails, that is, it lowers the temperature unasked
    (arXiv 2409.02908); here a float32 sum over 50,257 tokens would put steps of 1e-7 where rare
    tokens have less probability than that. One uniform number a draw, brought by the caller, makes
    sampling a function of its noise.
    """
    on_mps = logits.device.type == "mps"  # which has no float64
    logits = (logits.cpu() if on_mps else logits).double()  # (N, V)
    if temperature == 0:
        p, token = logits.softmax(-1).max(-1)
        return token, p
    p = keep_likely((logits / temperature).softmax(-1), top_k, top_p)  # (N, V)
    edge = p.cumsum(-1)  # (N, V)
    target = u.to(edge)[:, None] * edge[:, -1:]  # (N, 1)
    token = torch.searchsorted(edge, target, right=True).clamp(max=p.shape[-1] - 1)  # (N, 1)
    return token.squeeze(-1), (p.gather(-1, token) / edge[:, -1:]).squeeze(-1)


def keep_likely(p, top_k, top_p):
    """p (N, V) with all but the top_k tokens, and all past the first top_p of the mass, at 0."""
    if 0 < top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(top_k, dim=-1).values[:, -1:], 0.0)
    if top_p < 1:
        value, order = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)  # (N, V)
        out = value.cumsum(-1) - value >= top_p  # (N, V) the mass before it is enough
        p = p.masked_fill(torch.zeros_like(out).scatter(-1, order, out), 0.0)
    return p


def suppress_tokens(logits, tokens):
    """Takes one token away from each row, in place: logits (N, V), tokens (N,), -1 for none."""
    rows = (tokens >= 0).nonzero().flatten()
    logits[rows.to(logits.device), tokens[rows].to(logits.device)] = -torch.inf


# ---- 2. Policies: which positions are due in the next call ---------------------------------------
class FixedOrder:
    """Each position's step is known before the first call: unmask_step (N, L), -1: conditions."""

    def __init__(self, unmask_step, expected_nfe=None):
        self.call = step_to_call(unmask_step)  # (N, L)
        self.nfe = self.call.max(1).values + 1  # (N,)
        self.expected_nfe = expected_nfe or float(self.nfe.double().mean())

    def due(self, live, done):
        """Positions (b, L) that are asked for in call number done (b,) of sequences live (b,)."""
        return self.call[live] == done[:, None]

    def accept(self, live, done, p):
        """Which of them are unmasked (b, L), by p (b, L) of the tokens drawn, -1 where not due."""
        return p >= 0

    def noise(self, seed, live, done, L):
        """(b, L) uniform numbers: a position is drawn once, so one a position is enough."""
        return diffusion.uniforms(seed, 1, live.tolist(), L)


class Adaptive:
    """All masked positions are asked for; the most confident num_transfer_tokens are unmasked.

    num_transfer_tokens: for each sequence a list, how many in each of its calls.
    """

    def __init__(self, masked, num_transfer_tokens):
        self.masked, self.counts = masked.clone(), num_transfer_tokens  # (N, L), N lists
        self.nfe = torch.tensor([len(counts) for counts in self.counts])  # (N,)
        self.expected_nfe = float(self.nfe.double().mean())

    def due(self, live, done):
        return self.masked[live]

    def accept(self, live, done, p):
        count = torch.tensor([self.counts[i][n] for i, n in zip(live, done, strict=True)])  # (b,)
        rank = p.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (b, L)
        accepted = rank < count[:, None]  # (b, L)
        self.masked[live] &= ~accepted
        return accepted

    def noise(self, seed, live, done, L):
        """Fresh at every call: a position is asked for again and again."""
        pairs = zip(live.tolist(), done.tolist(), strict=True)
        return torch.cat([diffusion.uniforms(seed, 2 + n, [i], L) for i, n in pairs])  # (b, L)


def step_to_call(unmask_step):
    """The call, from 0 in each sequence, that unmasks each position: (N, L), -1 at conditions.

    Steps at which a sequence unmasks nothing get no call: its calls are its distinct steps.
    """
    step, order = unmask_step.sort(1)  # (N, L)
    before = torch.cat([step.new_full((len(step), 1), -1), step[:, :-1]], dim=1)  # (N, L)
    return torch.empty_like(step).scatter(1, order, (step > before).cumsum(1) - 1)


def by_time(masked, o):
    """Ancestral and Euler sampling: each position's step by itself, by the unmasking schedule."""
    (N, L), schedule = masked.shape, diffusion.SCHEDULES[o["schedule"]]
    r = diffusion.unmask_schedule(schedule, o["steps"], o["sampler"])  # (steps,)
    u = diffusion.uniforms(o["seed"], 0, range(N), L)  # (N, L)
    step = torch.searchsorted(r.cumsum(0), u, right=True).clamp(max=o["steps"] - 1)  # (N, L)
    expected = sum(diffusion.expected_nfe(r, int(n)) for n in masked.sum(1)) / N
    return FixedOrder(torch.where(masked, step, -1), expected)


def any_order(masked, o):
    """One token a call, in an order drawn uniformly: what the any-order bound is about."""
    u = diffusion.uniforms(o["seed"], 0, range(len(masked)), masked.shape[1])  # (N, L)
    return FixedOrder(torch.where(masked, u.argsort(1).argsort(1), -1))


def left_to_right(masked, o):
    return FixedOrder(torch.where(masked, torch.arange(masked.shape[1]), -1))


def right_to_left(masked, o):
    return FixedOrder(torch.where(masked, torch.arange(masked.shape[1]).flip(0), -1))


def confidence(masked, o):
    """Low-confidence remasking (MaskGIT, arXiv 2202.04200; LLaDA, 2502.09992), evenly spread."""
    return Adaptive(masked, [evenly(int(n), o["steps"]) for n in masked.sum(1)])


def smdm_greedy(masked, o):
    """SMDM's form of it: in each step int(masked * (1 - s/t)) tokens."""
    return Adaptive(masked, [smdm_counts(int(n), o["steps"]) for n in masked.sum(1)])


def evenly(n, steps):
    """n tokens over at most `steps` calls: a list without zeros."""
    steps = min(steps, n)
    return [n // steps + (i < n % steps) for i in range(steps)] if n else []


def smdm_counts(n, steps):
    """SMDM's rounding, in float32 as there. Where tokens are few, steps without any get no call."""
    t, counts = torch.linspace(1, 1e-5, steps + 1), []  # (steps + 1,)
    for i in range(steps):
        counts.append(n if i == steps - 1 else int(n * (1 - t[i + 1] / t[i])))
        n -= counts[-1]
    return [count for count in counts if count]


SAMPLERS = {
    "ancestral": by_time,
    "euler": by_time,
    "any_order": any_order,
    "left_to_right": left_to_right,
    "right_to_left": right_to_left,
    "confidence": confidence,
    "smdm_greedy": smdm_greedy,
}


# ---- 3. The loops --------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, x, suppress=None, progress=False, **options):
    """Fill every mask_id of x (N, L) and change nothing else -> (tokens (N, L), info).

    options: keys of DEFAULTS (sampler, steps, temperature, top_k, top_p, cfg_scale, batch_size),
    schedule, seed; UserError for what they cannot be. suppress (N, L): a token that a position must
    not get, -1 for none. info: nfe (N,) network calls of each sequence, expected_nfe their mean
    expectation, seconds. A sequence is a pure function of (seed, its place in x): the batch size
    changes how long it takes, not what comes out. A causal network goes left to right (sample_ar).
    """
    o = settings.options(options, settings, diffusion, sys.modules[__name__])
    if model.config["attention"] == "causal":
        return sample_ar(model, x, o, suppress, progress)
    began, (N, L), draw = time.time(), x.shape, (o["temperature"], o["top_k"], o["top_p"])
    x, cond, masked = x.clone(), x != model.mask_id, (x == model.mask_id).cpu()  # (N, L) each
    policy = SAMPLERS[o["sampler"]](masked, o)
    done = torch.zeros(N, dtype=torch.long)  # calls of each sequence
    with tqdm(total=int(policy.nfe.sum()), disable=not progress, unit="call", leave=False) as bar:
        while len(live := (done < policy.nfe).nonzero().flatten()[: o["batch_size"]]):  # (b,)
            due = policy.due(live, done[live])  # (b, L)
            idx = due.flatten().nonzero().flatten()  # (n,)
            row, place = live[idx // L], idx % L  # (n,) each
            now = x[live], idx.to(x.device), cond[live.to(x.device)]  # (b, L), (n,), (b, L)
            logits = diffusion.predict(model, *now, o["cfg_scale"])  # (n, V)
            if suppress is not None:
                suppress_tokens(logits, suppress[row, place])
            u = policy.noise(o["seed"], live, done[live], L).flatten()[idx]  # (n,)
            token, p = categorical(logits, u, *draw)  # (n,) each
            table = torch.full((len(live), L), -1.0, dtype=p.dtype)  # (b, L)
            table[due] = p.cpu()
            keep = policy.accept(live, done[live], table)[due]  # (n,)
            token = token[keep.to(token.device)].to(x.device)  # (unmasked,)
            x[row[keep].to(x.device), place[keep].to(x.device)] = token
            done[live] += 1
            bar.update(len(live))
    seconds = time.time() - began
    return x, {"nfe": policy.nfe, "expected_nfe": policy.expected_nfe, "seconds": seconds}


def sample_ar(model, x, o, suppress=None, progress=False):
    """The baseline: fill x (N, L) left to right by a causal network that caches keys and values.

    As sample. Prompts may differ in length: what all sequences are given is read in one call, after
    that each call adds one position, drawn or given.
    """
    began, (N, L), draw = time.time(), x.shape, (o["temperature"], o["top_k"], o["top_p"])
    x, masked = x.clone(), x == model.mask_id  # (N, L) each
    noise = diffusion.uniforms(o["seed"], 1, range(N), L)  # (N, L)
    noise = noise.to(x.device, torch.float32 if x.device.type == "mps" else torch.float64)
    nfe, B = torch.zeros(N, dtype=torch.long), o["batch_size"]  # (N,)
    with tqdm(total=-(-N // B) * L, disable=not progress, unit="token", leave=False) as bar:
        for now in (slice(start, start + B) for start in range(0, N, B)):
            y, wanted = x[now], masked[now]  # (b, L) views
            if not wanted.any():
                continue
            first, last = wanted.any(0).nonzero().flatten()[[0, -1]].tolist()
            cache = [Cache(L) for _ in model.blocks]
            start = y.new_full((len(y), 1), model.start_id)  # (b, 1)
            new = torch.cat([start, y[:, :first]], dim=1)  # (b, 1 + first)
            for i in range(first, last + 1):
                logits = model.head(model.hidden(new, cache=cache)[:, -1])  # (b, V)
                if suppress is not None:
                    suppress_tokens(logits, suppress[now][:, i])
                token, _ = categorical(logits.float(), noise[now][:, i], *draw)  # (b,)
                y[:, i] = torch.where(wanted[:, i], token.to(y), y[:, i])
                new = y[:, i : i + 1]  # (b, 1)
                bar.update()
            nfe[now] = last + 1 - first
    mean = float(nfe.double().mean())
    return x, {"nfe": nfe, "expected_nfe": mean, "seconds": time.time() - began}


# ---- 4. Requests: text in, text out --------------------------------------------------------------
def request(tokenizer, model, prompt="", suffix="", template="", length=0):
    """One request as a list of ids, mask_id where a token is wanted; UserError if it cannot be met.

    A text at the very beginning follows the tokenizer's bos, if it has one, as every document did
    in training; a causal network whose start_id is that bos reads it anyway.
    """
    block = model.block_size

    def encode(text, start):
        bos = [tokenizer.bos] if start and tokenizer.bos not in (None, model.start_id) else []
        return bos + tokenizer.encode(text, start) if text else []

    if template:
        require(not prompt and not suffix, "give --template or --prompt and --suffix, not both")
        require(not length, "a template has its own length; leave --length out")
        pieces = re.split(r"___(\d+)", template)  # text, gap, text, gap, ..., text
        example = "write ___12 for a gap of 12 tokens in"
        require(len(pieces) > 1, f"the template has no gap: {example} '{template}'")
        texts, gaps = [encode(text, i == 0) for i, text in enumerate(pieces[::2])], pieces[1::2]
        for gap in gaps:
            require(len(gap) < 8, f"a gap of ___{gap} tokens is longer than the block ({block})")
        total = sum(map(len, texts)) + sum(map(int, gaps))
        require(any(map(int, gaps)), f"the template has no gap of one token or more: '{template}'")
        require(total <= block, f"the template is {total} tokens, the block {block}")
        ids = texts[0]
        for gap, text in zip(gaps, texts[1:], strict=True):
            ids += [model.mask_id] * int(gap) + text
        return ids
    length = length or block
    require(length <= block, f"length must be at most block_size {block}, not {length}")
    head, tail = encode(prompt, start=True), encode(suffix, start=False)
    n_new, nothing = length - len(head) - len(tail), f"leaves nothing of length {length} to fill"
    require(n_new > 0, f"prompt and suffix are {length - n_new} tokens, which {nothing}")
    return head + [model.mask_id] * n_new + tail


def suppress_eos(x, begins, least, eos_id):
    """`suppress` of sample: no eos_id at the `least` positions from begins[i] on, x (N, L)."""
    suppress = torch.full(x.shape, -1)  # (N, L)
    for row, begin in zip(suppress, begins, strict=True):
        row[begin : begin + least] = eos_id
    return suppress


def text_of(tokenizer, ids, begin=0, eos_id=-1):
    """The text of a sample; with eos_id up to the first one from position `begin` on."""
    if eos_id < 0:
        return tokenizer.decode(ids)
    stop = ids.index(eos_id, begin) if eos_id in ids[begin:] else len(ids)
    return tokenizer.decode([i for i in ids[:stop] if i != tokenizer.bos])


def check(config, causal):
    """Raise UserError for settings that no sampler has."""
    settings.at_least(1, config, "steps", "num_samples", "batch_size")
    settings.at_least(0, config, "temperature", "top_k", "length", "min_new_tokens")
    scale, top_p, sampler = config["cfg_scale"], config["top_p"], config["sampler"]
    require(-1 <= scale <= 1000, f"cfg_scale must be in -1..1000, not {scale}")
    require(0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}")
    if causal:
        left = sampler == "left_to_right" or "sampler" not in config.get("user_keys", ())
        require(left, f"this network is causal: it has the sampler left_to_right, not '{sampler}'")
        between = config["suffix"] or config["template"]
        require(not between, "a causal network cannot see a suffix or fill a template")
        require(scale == 0, "cfg_scale needs a masked diffusion model; this network is causal")


def main(config):
    """Load a checkpoint, fill num_samples copies of the request, print and return the records."""
    device, autocast = machine(config)
    model, tokenizer, trained = checkpoint.load(config["ckpt"], device)
    textless = f"{config['ckpt']} names no tokenizer, so text cannot be read or written"
    require(trained["tokenizer"], textless)
    tokenizer = tokenizer or from_meta(trained["tokenizer"])  # which says what it lacks
    causal = trained["attention"] == "causal"
    check(config, causal)
    if config["compile"] and not causal and can_compile(device):
        model.hidden = torch.compile(model.hidden)

    wish = {key: config[key] for key in ("prompt", "suffix", "template", "length")}
    if not (wish["length"] or wish["template"]):
        wish["length"] = trained.get("example_width", 0)  # a model of examples fills one
    ids = request(tokenizer, model, **wish)
    x = torch.tensor([ids] * config["num_samples"], device=device)  # (N, L)
    n_new, begin = ids.count(model.mask_id), ids.index(model.mask_id)
    between = config["suffix"] or config["template"]  # what follows a gap is kept
    eos_id, least = -1 if between else trained.get("eos_id", -1), config["min_new_tokens"]
    answers = "min_new_tokens is for answers by models of examples, which know an end mark"
    require(eos_id >= 0 or not least, answers)
    require(least <= n_new, f"min_new_tokens must be at most the {n_new} to fill")
    suppress = suppress_eos(x, [begin] * len(x), least, eos_id) if least else None
    options = {key: value for key, value in config.items() if key != "user_keys"}
    with autocast():
        tokens, info = sample(model, x, suppress, progress=True, **options)

    records = []
    for row, nfe in zip(tokens.tolist(), info["nfe"].tolist(), strict=True):
        records.append({"text": text_of(tokenizer, row, begin, eos_id), "tokens": row, "nfe": nfe})
        print(f"---- sample {len(records)}: {nfe} network calls\n{records[-1]['text']}")
    nfe, expected, seconds = info["nfe"].double().mean(), info["expected_nfe"], info["seconds"]
    print(
        f"---- NFE {nfe:.1f} a sequence, expected {expected:.1f} for {n_new} masked tokens;", end=""
    )
    speed = f"{tokens.numel() / seconds:.0f} tokens/s"
    print(f" {seconds:.2f} s for {len(records)} samples of {len(ids)} tokens, {speed}")
    if config["out"]:
        with whole_file(config["out"]) as path, open(path, "w", encoding="utf8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return records


if __name__ == "__main__":
    settings.run(main, settings, diffusion, sys.modules[__name__])
