"""Sampling: fill every masked position of a sequence, in an order that the sampler decides.

    python sample.py --ckpt=out/pydocs                                    asks for prompts
    python sample.py --ckpt=out/pydocs --num_samples=4                    samples without a prompt
    python sample.py --ckpt=out/pydocs --prompt="The list "               continue a prompt
    python sample.py --ckpt=out/pydocs --prompt=FILE:prompt.txt           FILE:/dev/stdin: a pipe
    python sample.py --ckpt=out/pydocs --template="The ___12 of a list."  fill a gap of 12 tokens
    python sample.py --ckpt=out/pairs --prompt="Who?" --cfg_scale=0.8     guided by the prompt

- Whatever is not masked is a condition and never changes: a prompt, the text around a gap.
- A network call gives p(x0_i | visible) at the positions that are due; a token is drawn at each.
- The sampler's policy, an entry of samplers.SAMPLERS, decides which are due. One loop serves all.

    while masks are left in x:
        due = the positions that the policy chooses;  p = softmax(network(x)) at due
        x[due] = tokens drawn from p

What makes it fast: the step at which ancestral and Euler sampling unmask a position does not
depend on the network (samplers.py, part 1). So all steps are drawn before the first call, and
steps that unmask nothing in a sequence are skipped. RADD (arXiv 2406.03736, section 3.2) saves
these calls with a cache; here no cache is needed. Each sequence goes to its own next step, a
finished one makes room for another, and only positions that are due go through the last layer and
the head. An `order` network (model.py) reads each clean token once, into a cache (Predictor).

    steps drawn for four positions, -1 is a condition:  [5, -1, 2, 5]
    this sequence needs two calls, 0 and 1:             [1, -1, 0, 1]
"""

from lib import program  # isort: skip (first: from here on Ctrl-C is one line)
import contextlib
import itertools
import sys
import time

import torch

import config as settings
import diffusion
import samplers
from config import require
from lib import compiled, files, fused, philox
from lib.bar import progress_bar
from lib.cache import Cache, OrderCache
from lib.device import calls_on_device, wait
from lib.entries import check_ids, check_left_to_right, keys_read
from lib.stats import Probabilities, entropy_of, finite
from lib.text import gapped_ids, is_given, say, suppress_eos, suppress_tokens, text_of, text_or_file
from lib.watch import watch
from run import subject as subjects
from samplers import SAMPLERS

DEFAULTS = {
    "temperature": 1.0,  # 0: the most probable token, the default for models of prompts and answers
    "top_k": 0,  # keep the k most probable tokens; 0: all
    "top_p": 1.0,  # keep the most probable tokens up to this total probability, in (0, 1]
    "cfg_scale": 0.0,  # w in [-1, 1000] for guidance by the condition: logits u + (1 + w)(c - u)
    "prompt": "",  # the beginning of each sample; this and the next two can be FILE:PATH
    "suffix": "",  # the end of each sample
    "template": "",  # text with gaps: ___12 is a gap of 12 tokens
    "length": 0,  # tokens per sample, prompt and suffix included; 0: as many as the model takes
    "min_new_tokens": 0,  # minimum tokens of an answer before its eos (models of examples)
    "num_samples": 4,  # samples per request, 1 or more; models of examples default to 1
    "batch_size": 16,  # sequences in one network call; 1 or more
    "compile": False,  # compile the network; worth it for many or long samples
    "watch": False,  # show how the samples emerge, call by call
    "out": "",  # also write the samples to this .jsonl file
}
MODULES = (settings, subjects, diffusion, samplers, sys.modules[__name__])  # whose keys it takes
# The keys that `sample` takes as options; the others belong to the command.
OPTIONS = (*samplers.DEFAULTS, *diffusion.DEFAULTS, "seed", "batch_size")
OPTIONS += ("temperature", "top_k", "top_p", "cfg_scale")
# For models of prompts and answers. 98% of new sums were right, 88% with ancestral (LOG.md).
ANSWERS = {"sampler": "confidence", "temperature": 0.0, "num_samples": 1}
# For config.refuse_unused: when a key of the command line has an effect.
DRAWN = "temperatures above 0", lambda o: o["temperature"] > 0
USED_BY = {"top_k": (*DRAWN, 0), "top_p": (*DRAWN, 1.0)}
USED_BY["compile"] = "networks with attention=full", lambda o: o["attention"] == "full", False
USED_BY |= {
    key: ("other samplers", lambda o, key=key: key in o["read"], None)
    for key in {*samplers.DEFAULTS, *diffusion.DEFAULTS} - {"sampler"}
}
LOGITS = 2**24  # how many to draw from at once; with float64 copies at most 1 GiB


# ---- 1. The draw ---------------------------------------------------------------------------------
def categorical(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw by inverting the CDF: logits (N, V), uniform u (N,) -> tokens (N,), their p (N,).

    p is the token's probability after temperature, top_k and top_p, which `confidence` and
    `threshold` compare. At temperature 0 it is the network's own.

    All is in float64. Gumbel noise in float32 cuts off the tails, which silently lowers the
    temperature (arXiv 2409.02908). A float32 CDF over 50,257 tokens would have steps of 1e-7, and
    rare tokens are less probable than that. The caller passes one uniform number per draw, so
    sampling is a function of its noise. Logits of nan give p of nan, on a CPU NotFinite.
    """
    logits = fused.in_float64(logits)  # (N, V)
    if temperature < 1e-300:  # 0, or too small to divide by
        p, token = logits.softmax(-1).max(-1, keepdim=True)  # (N, 1) each
    else:
        p = keep_likely((logits / temperature).softmax(-1), top_k, top_p)  # (N, V)
        cdf = p.cumsum(-1)  # (N, V)
        target = u.to(cdf)[:, None] * cdf[:, -1:]  # (N, 1)
        token = torch.searchsorted(cdf, target, right=True).clamp(max=p.shape[-1] - 1)  # (N, 1)
        p = p.gather(-1, token) / cdf[:, -1:]  # (N, 1)
    if p.device.type == "cpu":  # elsewhere Probabilities does so, and no call waits
        finite(p, Probabilities.what)
    return token.squeeze(-1), p.squeeze(-1)


def keep_likely(p, top_k, top_p):
    """p (N, V) set to 0 outside the top_k tokens, and past the first top_p of the total mass.

    Of equally probable tokens, the first are kept.
    """
    if 0 < top_k < p.shape[-1]:
        least = p.topk(top_k, dim=-1).values[:, -1:]  # (N, 1)
        tied = p == least  # (N, V)
        room = top_k - (p > least).sum(-1, keepdim=True)  # (N, 1) how many tied ones are kept
        p = p.masked_fill((p < least) | (tied & (tied.cumsum(-1) > room)), 0.0)
    if top_p < 1:
        normalised = p / p.sum(-1, keepdim=True)  # (N, V)
        value, order = normalised.sort(dim=-1, descending=True, stable=True)  # (N, V) each
        beyond = value.cumsum(-1) - value >= top_p  # (N, V) the mass before it is enough
        p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    return p


def draw_tokens(model, hs, call, suppress, policy, o, keep_logits=False):
    """Draw the tokens of n positions -> (token, p, entropy (n,) each, logits (n, V) if kept).

    hs: their hidden states, a list of (n, D) for diffusion.guided. call: their Call, on the device.
    suppress (N*L,) or None. Pieces of at most LOGITS logits save memory: the float64 copies would
    be large where an adaptive sampler draws at all masked positions.
    """
    pieces, kept = [], []
    for piece in fused.chunks(len(call.u), max(1, LOGITS // model.vocab_size)):
        logits = diffusion.guided(model, [h[piece] for h in hs], o["cfg_scale"])  # (piece, V)
        if suppress is not None:
            suppress_tokens(logits, suppress[call.at[piece]])
        token, p = categorical(logits, call.u[piece], o["temperature"], o["top_k"], o["top_p"])
        entropy = entropy_of(logits) if policy.by_entropy else torch.zeros_like(p)  # (piece,)
        pieces.append((token, p, entropy))
        if keep_logits:
            kept.append(logits)
    token, p, entropy = map(torch.cat, zip(*pieces, strict=True))  # (n,) each
    return token, p, entropy, torch.cat(kept) if kept else None


# ---- 2. The loops (the plain, slow one: experiments/textbook.py, sample) -------------------------
@torch.no_grad()
def sample(model, x, suppress=None, progress=False, on_call=None, **options):
    """Fill every mask_id of x (N, L) and change nothing else -> (tokens (N, L), info).

    options: keys of OPTIONS. UserError for other keys, for invalid values, or if the sampler leaves
    masks. suppress (N, L): a token that a position must not get, or -1.
    info: nfe (N,), network calls of each sequence; expected_nfe, their expected mean (None: unknown
    before sampling); seconds. A sequence is a pure function of (seed, its index in x): the batch
    size changes the time, not the result (except where an adaptive sampler is equally confident of
    two positions and rounding decides). A causal network samples left to right.
    on_call(sequence (n,), position (n,), call (n,), token (n,), p (n,), logits (n, V)), all on the
    CPU, receives the tokens that each call unmasks. It is not called for causal networks.
    """
    o = settings.options(options, *MODULES, only=OPTIONS)
    check_ids(model, "x", x, values=True)
    if model.causal:
        return sample_ar(model, x, o, suppress, progress)
    return sample_mdm(model, x, o, suppress, progress, on_call)


def sample_mdm(model, x, o, suppress=None, progress=False, on_call=None):
    """`sample` for a masked diffusion model: call by call, as the sampler's policy decides."""
    began = time.time()
    N, L = x.shape
    masked = (x == model.mask_id).cpu()  # (N, L)
    policy = SAMPLERS[o["sampler"]](masked, o)
    states_of = Predictor(model, x != model.mask_id, policy, o)
    nfe = torch.zeros(N, dtype=torch.long)  # (N,)
    plan = samplers.calls(policy, nfe, o["batch_size"])
    x = x.clone(memory_format=torch.contiguous_format)  # (N, L)
    flat = x.view(-1)  # (N*L,) the same memory
    suppress = None if suppress is None else suppress.to(x.device).flatten()  # (N*L,)
    seen = Probabilities()
    with progress_bar(progress, int(masked.sum()), "token") as bar:
        for call, on_device in calls_on_device(plan, policy, model):
            if policy.remasks:
                flat.index_fill_(0, on_device.masked, model.mask_id)
            hs = states_of(x, call, on_device)
            outcome = draw_tokens(model, hs, on_device, suppress, policy, o, bool(on_call))
            token, p, entropy, logits = outcome
            seen.see(p)
            keep, token = accepted(policy, call, model.mask_id, token, p, entropy)
            flat[on_device.at] = token.to(x)
            if on_call:
                columns = call.at // L, call.at % L, call.done[call.idx // L], token, p, logits
                on_call(*(column.cpu()[keep] for column in columns))
            bar.update(int(keep.sum()))
    seen.check()
    left = int((x == model.mask_id).sum())
    require(not left, f"the sampler '{o['sampler']}' must unmask all, but leaves {left} tokens")
    wait(x.device)
    return x, {"nfe": nfe, "expected_nfe": policy.expected_nfe, "seconds": time.time() - began}


def accepted(policy, call, mask_id, token, p, entropy):
    """Which of a call's tokens are kept, (n,) bool on the CPU; the tokens, mask_id if not kept."""
    if policy.planned:  # all are kept, and no call waits for its p
        return torch.ones(len(token), dtype=torch.bool), token
    p_all = torch.full(policy.masked_at(call.live, call.done).shape, -1.0, dtype=p.dtype)  # (b, L)
    entropy_all = torch.full_like(p_all, torch.inf)  # (b, L)
    p, entropy = torch.stack([p, entropy.to(p)]).cpu()  # (n,) each, in one copy
    p_all.view(-1)[call.idx], entropy_all.view(-1)[call.idx] = p, entropy
    keep = policy.accept(call.live, call.done, p_all, entropy_all).flatten()[call.idx]  # (n,)
    (kept,) = fused.moved(token.device, keep)  # (n,)
    return keep, torch.where(kept, token, mask_id)


class Predictor:
    """Hidden states at the positions that are due, for diffusion.guided.

    An `order` network reads each clean token once, into a cache with batch_size slots. A sequence
    holds a slot until it is done. With guidance, a second cache holds x without the condition.
    """

    def __init__(self, model, cond, policy, o):
        N, L = cond.shape
        self.model, self.cond, self.policy = model, cond, policy
        self.cfg_scale, self.B = o["cfg_scale"], min(o["batch_size"], N)
        self.slots = {}  # {sequence: slot}
        self.caches = []
        if model.config["attention"] == "order":
            self.gaps = ~cond.cpu()  # (N, L)
            self.caches = [OrderCache(self.B, L) for _ in range(2 if self.cfg_scale else 1)]

    def __call__(self, x, call, on_device):
        """x (N, L), a Call on the CPU and on x's device -> a list of hidden states (n, D)."""
        x = x[on_device.live]  # (b, L)
        cond = self.cond[on_device.live] if self.cfg_scale else None  # (b, L)
        if self.caches:
            return self.from_caches(x, cond, call)
        hs = diffusion.states(self.model, x, on_device.idx, cond, self.cfg_scale)
        return [h[: len(on_device.at)] for h in hs]  # without the padding of a CUDA graph

    def from_caches(self, x, cond, call):
        """The same for an `order` network: x (b, L) and, with guidance, cond (b, L) of a call."""
        visible = ~self.policy.masked_at(call.live, call.done)  # (b, L) on the CPU
        texts = [(x, visible)]
        if self.cfg_scale:
            without = x.masked_fill(cond, self.model.mask_id)  # (b, L)
            texts.append((without, visible & self.gaps[call.live]))
        slots, ask = self.slots_of(call.live.tolist()), self.model.hidden_from_cache
        pairs = zip(texts, self.caches, strict=True)
        return [ask(*text, call.idx, cache, slots) for text, cache in pairs]

    def slots_of(self, live):
        """The slots (b,) of the live sequences; new ones take those of finished ones."""
        self.slots = {n: slot for n, slot in self.slots.items() if n in live}
        free = [slot for slot in range(self.B) if slot not in self.slots.values()]
        for n in (n for n in live if n not in self.slots):
            self.slots[n] = free.pop(0)
            for cache in self.caches:
                cache.clear(self.slots[n])
        return torch.tensor([self.slots[n] for n in live])


def sample_ar(model, x, o, suppress=None, progress=False):
    """The baseline: fill x (N, L) left to right with a causal network and a key-value cache.

    Like `sample`, without guidance. Prompts may differ in length: the first call reads what all
    sequences of the batch are given, and each later call adds one position, drawn or given.
    """
    began = time.time()
    (N, L), B = x.shape, o["batch_size"]
    x = x.clone()  # (N, L)
    masked = (x == model.mask_id).cpu()  # (N, L)
    check_left_to_right(masked, o)
    noise = philox.uniforms(o["seed"], samplers.STREAMS["token"], range(N), L)  # (N, L)
    noise, to_fill = fused.moved(x.device, noise, masked)
    suppress = torch.full_like(x, -1) if suppress is None else suppress.to(x.device)  # (N, L)
    nfe = torch.zeros(N, dtype=torch.long)  # (N,)
    with progress_bar(progress, -(-N // B) * L, "token") as bar:
        for batch in (slice(start, start + B) for start in range(0, N, B)):
            gaps = masked[batch].any(0).nonzero().flatten().tolist()  # positions to be filled
            if gaps:
                span = range(gaps[0], gaps[-1] + 1)
                parts = x[batch], to_fill[batch], noise[batch], suppress[batch]  # (b, L) each
                for _ in fill_span(model, span, *parts, o):
                    bar.update()
                nfe[batch] = len(span)
    wait(x.device)
    expected = float(nfe.double().mean())  # the number of calls is not random
    return x, {"nfe": nfe, "expected_nfe": expected, "seconds": time.time() - began}


def fill_span(model, span, x, to_fill, u, suppress, o):
    """Fill x (b, L) in place, one position of the span per call; yield after each call."""
    cache = [Cache(x.shape[1]) for _ in model.blocks]
    new = torch.cat([x.new_full((len(x), 1), model.start_id), x[:, : span[0]]], dim=1)  # (b, n)
    seen = Probabilities()
    for i in span:
        logits = model.head(model.hidden(new, cache=cache)[:, -1])  # (b, V)
        suppress_tokens(logits, suppress[:, i])
        token, p = categorical(logits.float(), u[:, i], o["temperature"], o["top_k"], o["top_p"])
        seen.see(p)
        x[:, i] = torch.where(to_fill[:, i], token.to(x), x[:, i])
        new = x[:, i : i + 1]  # (b, 1)
        yield
    seen.check()


# ---- 3. The command -----------------------------------------------------------------------------
def open_model(config):
    """Load the Subject of config["ckpt"], compiled if the config says so."""
    subject = subjects.load_subject(config, reads_text=True)
    if subject.causal:
        subjects.check_causal(config)
    elif config["compile"] and subject.model.config["attention"] == "full":
        compiled.compile_hidden(subject.model, subject.model.device)
    return subject


def fill(config, subject):
    """Fill num_samples copies of the config's request; save, print and return the records."""
    x, suppress, end, eos_id = rows_to_fill(config, subject)  # (N, L) each
    options = {key: config[key] for key in OPTIONS}
    on_call = None
    if config["watch"]:
        policy = SAMPLERS[options["sampler"]]((x == subject.model.mask_id).cpu(), options)
        on_call = watch(subject.tokenizer, x, subject.model.mask_id, policy, options)
    with subject.autocast():
        tokens, info = sample(subject.model, x, suppress, not on_call, on_call, **options)
    records = [
        {"text": text_of(subject.tokenizer, row, end, eos_id), "tokens": row, "nfe": nfe}
        for row, nfe in zip(tokens.tolist(), info["nfe"].tolist(), strict=True)
    ]
    apart = not (config["suffix"] or config["template"])
    texts = [text_of(subject.tokenizer, record["tokens"], end, eos_id, apart) for record in records]
    say(records, texts, info, int((x[0] == subject.model.mask_id).sum()), config["out"])
    return records


def rows_to_fill(config, subject):
    """x (N, L) to fill, its `suppress`, the end of the last given token, and the eos_id or -1."""
    model, tokenizer, trained, *_ = subject
    texts = {key: text_or_file(config[key]) for key in ("prompt", "suffix", "template")}
    length = 0 if texts["template"] else trained.get("example_width", 0)  # that of examples
    ids = gapped_ids(tokenizer, model, **texts, length=config["length"] or length)
    x = torch.tensor([ids] * config["num_samples"])  # (N, L)
    end = max((i + 1 for i, token in enumerate(ids) if token != model.mask_id), default=0)
    least, eos_id = config["min_new_tokens"], trained.get("eos_id", -1)
    suppress = suppress_eos(x, [end] * len(x), least, eos_id)  # (N, L) or None
    if end == 0 and config["cfg_scale"]:
        settings.refuse_typed(config, ["cfg_scale"], "needs a prompt, a suffix or a template")
    return x.to(model.device), suppress, end, eos_id


def defaults_for(trained):
    """Other defaults, for a model trained with a config: ANSWERS, if it learnt examples."""
    keys = ANSWERS if trained.get("example_width") else {}
    if trained["attention"] == "causal":  # left to right, whatever the sampler
        keys = {key: keys[key] for key in keys if key != "sampler"}
    return keys


def with_defaults(config, subject):
    """The config with the model's own defaults and order, except for keys that the user has set."""
    keys = defaults_for(subject.trained)
    keys = {key: keys[key] for key in keys if key not in config.get("user_keys", keys)}
    return subjects.in_its_order(config | keys, subject, "sampler", SAMPLERS)


def converse(config, subject):
    """Ask for prompts and continue each of them, until the input ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  so that lines can be edited
    print(f"Write a prompt{'' if subject.of_examples else ' (none: a free sample)'}; Ctrl-D ends.")
    with contextlib.suppress(EOFError):
        for turn in itertools.count():
            request_keys = {"prompt": input("> "), "num_samples": 1, "seed": config["seed"] + turn}
            try:
                fill(config | request_keys, subject)
            except settings.UserError as error:
                print(error)


def main(config):
    """Fill the request of the command; without one, in a terminal, ask for prompts."""
    config = settings.whole(config, *MODULES)
    files.check_ending("out", config["out"], ".jsonl")
    subject = open_model(config)
    config = with_defaults(config, subject)
    sampler = subjects.sampler_of(subject.model, config["sampler"])
    read = keys_read(SAMPLERS[sampler], samplers.calls, config)
    facts = {"attention": subject.model.config["attention"], "read": read}
    settings.refuse_unused(config, USED_BY, config | facts)
    return (fill if is_given(config, subject.of_examples) else converse)(config, subject)


if __name__ == "__main__":
    program.run(main, *MODULES)
