"""Sampling: fill every masked position of a sequence, in an order that the sampler decides.

    python sample.py --ckpt=out/pydocs                                    asks for prompts
    python sample.py --ckpt=out/pydocs --num_samples=4                    free samples
    python sample.py --ckpt=out/pydocs --prompt="The list "               begun (ended: --suffix=)
    python sample.py --ckpt=out/pydocs --prompt=FILE:prompt.txt           of several lines
    python sample.py --ckpt=out/pydocs --template="The ___12 of a list."  a gap of 12 tokens
    python sample.py --ckpt=out/pairs --prompt="Who?" --cfg_scale=0.8     guided by its prompt

- Whatever is not masked is a condition and never changes: a prompt, the text around a gap.
- A network call gives p(x0_i | visible) at the positions that are due; each is drawn from it.
- Which are due is the sampler's policy, one entry of samplers.SAMPLERS. The loop knows none.

What makes it fast: the step at which ancestral and Euler sampling unmask a position does not
depend on the network (samplers.py, part 1). So all steps are drawn before the first call, and
those at which a sequence unmasks nothing are skipped: RADD (arXiv 2406.03736, section 3.2) saves
these calls with a cache, here there is nothing to keep. Each sequence goes to its own next step, a
finished one makes room for another, and only positions that are due pass the last layer and the
head. An `order` network (model.py) reads each clean token once, in a cache: Predictor.

    steps drawn for four positions, -1 being a condition:  [5, -1, 2, 5]
    the calls of that sequence, which are two:             [1, -1, 0, 1]
"""

import config as settings  # isort: skip (first: from here on Ctrl-C is one line)
import contextlib
import itertools
import sys
import time

import torch
import torch.nn.functional as F

import diffusion
from config import require
from lib import fused, philox
from lib import subject as subjects
from lib.bar import progress_bar
from lib.device import can_compile, compile_hidden, wait
from lib.files import to_json, whole_file
from lib.stats import finite
from lib.text import request, suppress_eos, suppress_tokens, text_of, text_or_file
from model import Cache, OrderCache
from samplers import SAMPLERS, calls, entropy_of, on_device

DEFAULTS = {
    "ckpt": "out/pydocs",  # what checkpoint.load takes: a run's folder, published weights
    "sampler": "ancestral",  # one of SAMPLERS; a model of examples answers by confidence
    "steps": 128,  # not of any_order, left_to_right, right_to_left, threshold, entropy_bound
    "threshold": 0.9,  # of the sampler threshold: tokens as probable as this are unmasked
    "max_entropy": 0.1,  # of entropy_bound: nats that a call's tokens have, less the largest
    "eta": 0.05,  # of remask: how likely a token is masked again at a step, at most
    "temperature": 1.0,  # 0: the likeliest token, as a model of examples answers
    "top_k": 0,  # keep the k likeliest tokens; 0: all
    "top_p": 1.0,  # keep the likeliest tokens that hold this much probability
    "cfg_scale": 0.0,  # guidance by the condition: logits u + (1 + w)(c - u), u without it; 0: off
    "prompt": "",  # the beginning of each sample; this and the next two also as FILE:PATH
    "suffix": "",  # the end of each sample
    "template": "",  # text with gaps: ___12 is a gap of 12 tokens
    "length": 0,  # tokens in a sample, prompt and suffix included; 0: all that the model takes
    "min_new_tokens": 0,  # of an answer before its eos, at least (models of examples)
    "num_samples": 4,  # how many times the request is filled; by a model of examples once
    "batch_size": 16,  # sequences in one network call
    "compile": False,  # compile the network: pays for many or long samples
    "watch": False,  # show how the samples emerge, call by call
    "out": "",  # also write the samples to this .jsonl file
}
# What the command takes of a model of examples. One token a call as far as the steps reach, the
# most confident first, each the likeliest token: of new sums of 4 digits 98% were right; 95% in 8
# calls for 84 tokens, 82% in 4, 88% in 47 by ancestral sampling (experiments/arithmetic.py).
ANSWERS = {"sampler": "confidence", "temperature": 0.0, "num_samples": 1}
DRAWN = "probabilities of drawn tokens"
LOGITS = 2**24  # that are drawn from at once: in float64 with their copies at most 1 GiB


# ---- 1. The draw ---------------------------------------------------------------------------------
def categorical(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Invert the distribution function: logits (N, V), u (N,) uniform -> tokens (N,), their p (N,).

    p is that of the distribution drawn from, after temperature, top_k and top_p: what `confidence`
    and `threshold` compare. Of temperature 0 it is the network's own.

    In float64. Gumbel noise in float32 cuts the tails, that is, it lowers the temperature unasked
    (arXiv 2409.02908); here a float32 sum over 50,257 tokens would put steps of 1e-7 where rare
    tokens have less probability than that. One uniform number a draw, brought by the caller, makes
    sampling a function of its noise. Logits of nan or infinity are NotFinite where that is known
    without waiting, on the CPU; from another device their p come as nan.
    """
    on_mps = logits.device.type == "mps"  # which has no float64
    logits = (logits.cpu() if on_mps else logits).double()  # (N, V)
    if temperature < 1e-300:  # 0, or too small to divide by
        p, token = logits.softmax(-1).max(-1, keepdim=True)  # (N, 1) each
    else:
        p = keep_likely((logits / temperature).softmax(-1), top_k, top_p)  # (N, V)
        edge = p.cumsum(-1)  # (N, V)
        target = u.to(edge)[:, None] * edge[:, -1:]  # (N, 1)
        token = torch.searchsorted(edge, target, right=True).clamp(max=p.shape[-1] - 1)  # (N, 1)
        p = p.gather(-1, token) / edge[:, -1:]  # (N, 1)
    if p.device.type == "cpu":
        finite(p, DRAWN)
    return token.squeeze(-1), p.squeeze(-1)


def keep_likely(p, top_k, top_p):
    """p (N, V) with all but the top_k tokens, and all past the first top_p of the mass, at 0.

    Of equally likely ones the first are kept.
    """
    if 0 < top_k < p.shape[-1]:
        least = p.topk(top_k, dim=-1).values[:, -1:]  # (N, 1)
        equal, room = p == least, top_k - (p > least).sum(-1, keepdim=True)  # (N, V), (N, 1)
        p = p.masked_fill((p < least) | (equal & (equal.cumsum(-1) > room)), 0.0)
    if top_p < 1:
        share = p / p.sum(-1, keepdim=True)  # (N, V)
        value, order = share.sort(dim=-1, descending=True, stable=True)  # (N, V) each
        out = value.cumsum(-1) - value >= top_p  # (N, V) the mass before it is enough
        p = p.masked_fill(torch.zeros_like(out).scatter(-1, order, out), 0.0)
    return p


def draws(model, h, u, suppress, policy, o):
    """Yield (token, p, entropy, logits) of pieces of n positions, each (piece,) or (piece, V).

    h: their states, a list of (n, D) as diffusion.guided takes them; u (n,) uniform; suppress (n,)
    or None. A piece has at most LOGITS logits, whose float64 tables are most of the memory here: an
    adaptive order draws at all masked positions of a batch at once.
    """
    for now in fused.chunks(len(u), max(1, LOGITS // model.vocab_size)):
        logits = diffusion.guided(model, [z[now] for z in h], o["cfg_scale"])  # (piece, V)
        if suppress is not None:
            suppress_tokens(logits, suppress[now])
        token, p = categorical(logits, u[now], o["temperature"], o["top_k"], o["top_p"])
        yield token, p, entropy_of(logits, policy), logits


# ---- 2. The loops --------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, x, suppress=None, progress=False, on_call=None, **options):
    """Fill every mask_id of x (N, L) and change nothing else -> (tokens (N, L), info).

    options: keys of DEFAULTS (sampler, steps, temperature, top_k, top_p, cfg_scale, batch_size),
    schedule, seed; UserError for what they cannot be. suppress (N, L): a token that a position must
    not get, -1 for none. info: nfe (N,) network calls of each sequence, expected_nfe their mean
    expectation (None: only sampling tells), seconds. A sequence is a pure function of (seed, its
    place in x): the batch size changes how long it takes, not what comes out (but where an adaptive
    sampler finds positions equally sure, and rounding decides). A causal network goes left to
    right. on_call(sequence (n,), position (n,), call (n,), token (n,), p (n,), logits (n, V)), all
    on the CPU, is told of the tokens that each call unmasks.
    """
    o = settings.options(options, settings, diffusion, sys.modules[__name__])
    check_options(o)
    most = f"a sequence has at least one token and at most block_size {model.block_size}"
    require(0 < x.shape[1] <= model.block_size and len(x), f"{most}, not {tuple(x.shape)}")
    if model.config["attention"] == "causal":
        return sample_ar(model, x, o, suppress, progress)
    began, (N, L), device = time.time(), x.shape, x.device
    cond, masked = x != model.mask_id, (x == model.mask_id).cpu()  # (N, L) each
    x = x.clone(memory_format=torch.contiguous_format)  # (N, L)
    flat, policy = x.view(-1), SAMPLERS[o["sampler"]](masked, o)
    states_of, nfe = Predictor(model, cond, policy, o), torch.zeros(N, dtype=torch.long)  # (N,)
    suppress = None if suppress is None else suppress.to(device).flatten()  # (N*L,)
    alike = o["compile"] and device.type == "cuda" and model.config["attention"] == "full"
    plan = on_device(calls(policy, nfe, o["batch_size"]), policy, device, alike)
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    with progress_bar(progress, int(masked.sum()), "token") as bar:
        for call, (live, at, idx, u, *again) in plan:
            if policy.remasks:
                flat.index_fill_(0, *again, model.mask_id)
            h = states_of(x, call, live, idx)  # the states of n positions
            drawn = draws(model, h, u, None if suppress is None else suppress[at], policy, o)
            drawn = [piece if on_call else piece[:3] for piece in drawn]  # logits for on_call
            token, p, entropy, *logits = map(torch.cat, zip(*drawn, strict=True))  # (n,) each
            total = total + p[: len(call.at)].sum()  # looked at in the end: no call waits for it
            keep = torch.ones(len(call.at), dtype=torch.bool)  # (n,) what is unmasked
            if not policy.known:
                keep = accepted(policy, call, L, p, entropy)
                token = torch.where(*fused.moved(token.device, keep), token, model.mask_id)
            flat[at] = token.to(x)
            if on_call:
                arguments = call.at // L, call.at % L, call.done[call.idx // L], token, p, *logits
                on_call(*(z[: len(keep)].cpu()[keep] for z in arguments))
            bar.update(int(keep.sum()))
    finite(total.cpu(), DRAWN)
    wait(device)
    return x, {"nfe": nfe, "expected_nfe": policy.expected_nfe, "seconds": time.time() - began}


def accepted(policy, call, L, p, entropy):
    """Which of a call's tokens are unmasked: (n,) bool, on the CPU. For p the host has to wait."""
    tables = torch.full((2, len(call.live), L), -1.0, dtype=p.dtype)  # p and entropy
    tables[1] = torch.inf
    pair = torch.stack([p, entropy.to(p)]).cpu()  # (2, n)
    finite(pair[0], DRAWN)
    tables.flatten(1)[:, call.idx] = pair
    return policy.accept(call.live, call.done, *tables).flatten()[call.idx]


def check_options(o):
    """Raise UserError for options that no sampler has."""
    settings.at_least(1, o, "steps", "batch_size")
    settings.at_least(0, o, "temperature", "top_k", "max_entropy", "seed")
    settings.fraction(o, "threshold", "eta")
    scale, top_p = o["cfg_scale"], o["top_p"]
    require(-1 <= scale <= 1000, f"cfg_scale must be in -1..1000, not {scale}")
    require(0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}")


class Predictor:
    """The states of positions that are due, for diffusion.guided.

    An `order` network reads each clean token once and keeps its keys and values, in one of
    batch_size slots that a sequence holds until it is done. Guidance has slots of its own.
    """

    def __init__(self, model, cond, policy, o):
        self.model, self.cond, self.policy, self.cfg_scale = model, cond, policy, o["cfg_scale"]
        self.gaps = ~cond.cpu() if model.config["attention"] == "order" else None
        self.slots, self.B = {}, min(o["batch_size"], len(cond))  # {sequence: slot}
        self.caches = []  # [(OrderCache, whether each position was read (B, L + 1))]
        if model.config["attention"] == "order":
            for _ in range(2 if self.cfg_scale else 1):
                was_read = torch.zeros(self.B, cond.shape[1] + 1, dtype=torch.bool)  # after a start
                self.caches.append((OrderCache(model, self.B), was_read))

    def __call__(self, x, call, live, idx):
        """x (N, L); live (b,) and idx (n,) of the Call on its device -> a list of states (n, D)."""
        cond = self.cond[live] if self.cfg_scale else None  # (b, L)
        if not self.caches:
            return diffusion.states(self.model, x[live], idx, cond, self.cfg_scale)
        self.assign(call.live.tolist())
        visible = ~self.policy.masked_at(call.live, call.done)  # (b, L) known to the CPU
        h = [self.read(x[live], visible, call, *self.caches[0])]
        if self.cfg_scale:
            visible &= self.gaps[call.live]
            x = x[live].masked_fill(cond, self.model.mask_id)  # (b, L)
            h.append(self.read(x, visible, call, *self.caches[1]))
        return h

    def assign(self, live):
        """Give sequences that are new the slots of those that are done."""
        self.slots = {n: slot for n, slot in self.slots.items() if n in live}
        free = [slot for slot in range(self.B) if slot not in self.slots.values()]
        for n in (n for n in live if n not in self.slots):
            slot = self.slots[n] = free.pop(0)
            for cache, was_read in self.caches:
                cache.count[slot], was_read[slot] = 0, False

    def read(self, x, visible, call, cache, was_read):
        """The states (n, D) that the call asks for, of x (b, L), having read what is new in it."""
        rows = torch.tensor([self.slots[n] for n in call.live.tolist()])  # (b,)
        visible = F.pad(visible, (1, 0), value=True)  # (b, L + 1)
        gone = (was_read[rows] & ~visible).any(1)  # (b,) a token was masked again
        cache.count[rows[gone]], was_read[rows[gone]] = 0, False  # so all is read anew
        new = visible & ~was_read[rows]  # (b, L + 1)
        was_read[rows] = visible
        return self.model.ask(x, new, call.idx, cache, rows)


def sample_ar(model, x, o, suppress=None, progress=False):
    """The baseline: fill x (N, L) left to right by a causal network that caches keys and values.

    As sample, without guidance. Prompts may differ in length: what all sequences are given is read
    in one call, after that each call adds one position, drawn or given.
    """
    require(o["cfg_scale"] == 0, "cfg_scale needs a masked diffusion model, not a causal one")
    began, (N, L), draw = time.time(), x.shape, (o["temperature"], o["top_k"], o["top_p"])
    x, masked = x.clone(), (x == model.mask_id).cpu()  # (N, L) each
    noise = philox.uniforms(o["seed"], 1, range(N), L)  # (N, L)
    noise, wanted = fused.moved(x.device, noise, masked)
    suppress = None if suppress is None else suppress.to(x.device)  # (N, L)
    nfe, B = torch.zeros(N, dtype=torch.long), o["batch_size"]  # (N,)
    with progress_bar(progress, -(-N // B) * L, "token") as bar:
        for now in (slice(start, start + B) for start in range(0, N, B)):
            y, somewhere = x[now], masked[now].any(0).nonzero().flatten().tolist()  # (b, L) a view
            if not somewhere:
                continue
            first, last = somewhere[0], somewhere[-1]
            cache = [Cache(L) for _ in model.blocks]
            start = y.new_full((len(y), 1), model.start_id)  # (b, 1)
            total = 0.0  # of p: looked at when all is drawn, so that no call waits for it
            new = torch.cat([start, y[:, :first]], dim=1)  # (b, 1 + first)
            for i in range(first, last + 1):
                logits = model.head(model.hidden(new, cache=cache)[:, -1])  # (b, V)
                if suppress is not None:
                    suppress_tokens(logits, suppress[now][:, i])
                token, p = categorical(logits.float(), noise[now][:, i], *draw)  # (b,) each
                total = total + p
                y[:, i] = torch.where(wanted[now, i], token.to(y), y[:, i])
                new = y[:, i : i + 1]  # (b, 1)
                bar.update()
            finite(total.cpu(), DRAWN)
            nfe[now] = last + 1 - first
    wait(x.device)
    expected = float(nfe.double().mean())  # one call a token is what it takes
    return x, {"nfe": nfe, "expected_nfe": expected, "seconds": time.time() - began}


# ---- 3. The command -----------------------------------------------------------------------------
def check(config, causal):
    """Raise UserError for settings that this program or a causal network cannot have."""
    settings.at_least(1, config, "num_samples")
    settings.at_least(0, config, "length", "min_new_tokens")
    check_options(config)
    sampler = config["sampler"]
    if causal:
        left = sampler == "left_to_right" or "sampler" not in config.get("user_keys", ())
        require(left, f"this network is causal: it has the sampler left_to_right, not '{sampler}'")
        between = config["suffix"] or config["template"]
        require(not between, "a causal network cannot see a suffix or fill a template")
        require(not config["watch"], "watch shows masks that fill; this network is causal")


def main(config):
    """Load a checkpoint, fill num_samples copies of the request, print and return the records."""
    return fill(config, opened(config))


def opened(config):
    """The Subject of config["ckpt"], compiled if it is to be."""
    subject = subjects.opened(config, reads_text=True)
    check(config, subject.causal)
    if config["compile"] and not subject.causal and can_compile(subject.model.device):
        compile_hidden(subject.model, subject.model.device)
    return subject


def fill(config, subject):
    """Fill num_samples copies of the config's request, save, print and return the records."""
    model, tokenizer, trained, autocast, _ = subject
    wish = {key: text_or_file(config[key]) for key in ("prompt", "suffix", "template")}
    length = 0 if wish["template"] else trained.get("example_width", 0)  # examples have one
    ids = request(tokenizer, model, **wish, length=config["length"] or length)
    x = torch.tensor([ids] * config["num_samples"], device=model.device)  # (N, L)
    n_new, begin = ids.count(model.mask_id), ids.index(model.mask_id)
    between = wish["suffix"] or wish["template"]  # what follows a gap is kept
    eos_id, least = -1 if between else trained.get("eos_id", -1), config["min_new_tokens"]
    answers = "min_new_tokens is for answers by models of examples, which know an eos"
    require(eos_id >= 0 or not least, answers)
    require(least <= n_new, f"min_new_tokens must be at most the {n_new} to fill")
    suppress = suppress_eos(x, [begin] * len(x), least, eos_id) if least else None
    options = {key: value for key, value in config.items() if key != "user_keys"}
    on_call = None
    if config["watch"]:
        from view.watch import watch  # what is only looked at is not loaded otherwise

        on_call = watch(tokenizer, x, model.mask_id, options)
    with autocast():
        tokens, info = sample(model, x, suppress, not on_call, on_call, **options)

    records = []
    for row, nfe in zip(tokens.tolist(), info["nfe"].tolist(), strict=True):
        records.append({"text": text_of(tokenizer, row, begin, eos_id), "tokens": row, "nfe": nfe})
    if config["out"]:
        with whole_file(config["out"]) as path, open(path, "w", encoding="utf8") as file:
            file.writelines(to_json(record) + "\n" for record in records)
    for i, record in enumerate(records, start=1):
        print(f"---- sample {i}: {record['nfe']} network calls\n{record['text']}")
    nfe, expected, seconds = info["nfe"].double().mean(), info["expected_nfe"], info["seconds"]
    expected = "" if expected is None else f", expected {expected:.1f}"
    print(f"---- NFE {nfe:.1f} a sequence{expected} for {n_new} masked tokens;", end="")
    speed = f"{n_new * len(records) / max(seconds, 1e-6):.0f} tokens/s"
    print(f" {seconds:.2f} s for {len(records)} samples of {len(ids)} tokens, {speed}")
    return records


def suited(config, trained):
    """The config with ANSWERS for a model of examples, where the user has not said otherwise."""
    of_examples, causal = trained.get("example_width"), trained["attention"] == "causal"
    own = {*config.get("user_keys", ANSWERS)} | ({"sampler"} if causal else set())
    return config | {key: ANSWERS[key] for key in ANSWERS if of_examples and key not in own}


def command(config):
    """main, with ANSWERS; in a terminal, without a prompt in the command, it asks for prompts."""
    subject = opened(config)
    config = suited(config, subject.trained)
    wishes = {"prompt", "suffix", "template", "num_samples", "out"} & {*config["user_keys"]}
    if wishes or not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        return fill(config, subject)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  so that lines can be edited
    print("Write a prompt (none: a free sample); Ctrl-D ends.")
    with contextlib.suppress(EOFError):
        for turn in itertools.count():
            own = {"prompt": input("> "), "num_samples": 1, "seed": config["seed"] + turn}
            try:
                fill(config | own, subject)
            except settings.UserError as error:
                print(error)


if __name__ == "__main__":
    settings.run(command, settings, diffusion, sys.modules[__name__])
