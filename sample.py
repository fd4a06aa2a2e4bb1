"""Decoding: fill every masked position of a sequence, in an order that depends on the sampler; all else stays as given.

    python sample.py --ckpt=out/pydocs                                     free samples
    python sample.py --ckpt=out/pydocs --prompt="The list "                 a beginning (--suffix= an end)
    python sample.py --ckpt=out/pairs --prompt="Who was it?" --cfg=0.8      an answer, guided towards its prompt
    python sample.py --ckpt=out/pydocs --template="The ___12 of a list is ___20."   gaps of 12 and 20 tokens

The fast loop rests on one fact: the step at which ancestral and Euler sampling reveal a position does not depend on the
network, so it is drawn before the first call. Steps that reveal nothing are then never taken (this is RADD's cache, arXiv
2406.03736 section 3.2, without a cache), each sequence goes straight to its own next step, and a finished one makes room
for the next request, so that calls stay full and only rows to be revealed leave the last layer. (The adaptive orders,
confidence and smdm_greedy, choose among all hidden rows, so for them these leave it.)
"""

import contextlib
import json
import re
import sys
import time

import torch
from tqdm import tqdm

import checkpoint
import config as settings
import diffusion
from config import choose, require
from data.tokenizer import from_meta
from diffusion import predict
from model import Cache

DEFAULTS = {
    "ckpt": "out/pydocs",  # whatever checkpoint.load takes: a run's folder, an export, published weights
    "sampler": "ancestral",  # ancestral | euler | any_order | left_to_right | right_to_left | confidence | smdm_greedy
    "steps": 128,  # of ancestral, euler, confidence, smdm_greedy; the others reveal one token a call
    "temperature": 1.0,  # 0: the likeliest token
    "top_k": 0,  # keep the k likeliest tokens; 0: all
    "top_p": 1.0,  # keep the likeliest tokens that hold this much probability
    "cfg": 0.0,  # guidance towards the given tokens: logits u + (1 + w) (c - u); 0: off
    "prompt": "",  # the beginning of each sample
    "suffix": "",  # the end of each sample
    "template": "",  # text with gaps: ___12 is a gap of 12 tokens
    "length": 0,  # tokens in a sample, prompt and suffix included; 0: block_size, or the width of the rows learnt from
    "min_tokens": 0,  # an answer by a model of rows has at least so many tokens before its end mark
    "num_samples": 4,  # how many times the request is filled
    "batch_size": 16,  # sequences in one network call
    "compile": False,  # compile the network: pays for many or long samples
    "out": "",  # also write the samples to this .jsonl file
}

SAMPLERS = ["ancestral", "euler", "any_order", "left_to_right", "right_to_left", "confidence", "smdm_greedy"]


# ---- The draw --------------------------------------------------------------------------------------------------------


def categorical(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One exact draw a row by inverting the distribution function: logits (N, V), u (N,) uniform -> tokens (N,), p (N,).

    In float64: float32 Gumbel noise would cut the tails, that is lower the temperature unasked (arXiv 2409.02908). One
    uniform number a draw, brought by the caller, makes sampling a function of its noise. p is the token's probability.
    """
    logits = logits.cpu().double() if logits.device.type == "mps" else logits.double()  # MPS has no float64
    if temperature == 0:
        p, token = logits.softmax(-1).max(-1)
        return token, p
    p = keep_likely((logits / temperature).softmax(-1), top_k, top_p)  # (N, V)
    edge = p.cumsum(-1)  # (N, V)
    target = u.to(edge)[:, None] * edge[:, -1:]  # (N, 1)
    token = torch.searchsorted(edge, target, right=True).clamp(max=p.shape[-1] - 1)  # (N, 1)
    return token.squeeze(-1), (p.gather(-1, token) / edge[:, -1:]).squeeze(-1)


def keep_likely(p, top_k, top_p):
    """p (N, V) with all but the top_k tokens, and all past the first top_p of probability, set to 0 (not renormalised)."""
    if top_k:
        p = p * (p >= p.topk(min(top_k, p.shape[-1])).values[:, -1:])
    if top_p < 1:
        value, order = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)  # (N, V)
        out = value.cumsum(-1) - value >= top_p  # (N, V) the mass before it is enough
        p = p.masked_fill(torch.zeros_like(out).scatter(-1, order, out), 0.0)
    return p


def forbid(logits, tokens):
    """Takes one token away from each row, in place: logits (N, V), tokens (N,), -1 for none."""
    rows = (tokens >= 0).nonzero().flatten()
    logits[rows.to(logits.device), tokens[rows].to(logits.device)] = -torch.inf


# ---- The order: what each network call reveals -----------------------------------------------------------------------


def draw_reveal_step(hidden, sampler, steps, schedule, u):
    """The step at which each position will be revealed: hidden (N, L) bool, u (N, L) uniform -> (N, L), -1 where given."""
    if sampler in ("ancestral", "euler"):
        law = diffusion.reveal_law(diffusion.SCHEDULES[schedule], steps, sampler)  # (steps,)
        step = torch.searchsorted(law.cumsum(0), u, right=True).clamp(max=steps - 1)  # (N, L)
    elif sampler == "any_order":
        step = u.argsort(1).argsort(1)  # (N, L) a random permutation: one token a call
    else:
        place = torch.arange(hidden.shape[1]).expand(hidden.shape)  # (N, L)
        step = place if sampler == "left_to_right" else place.flip(1)
    return torch.where(hidden, step, -1)


def calls(reveal_step):
    """The network call, counted from 0 in each row, that reveals each position: (N, L), -1 where given.

    Steps at which a row reveals nothing get no call: a row's calls are its distinct reveal steps.
    """
    step, order = reveal_step.sort(1)  # (N, L)
    before = torch.cat([step.new_full((len(step), 1), -1), step[:, :-1]], dim=1)  # (N, L)
    return torch.empty_like(step).scatter(1, order, (step > before).cumsum(1) - 1)


def quotas(n_hidden, sampler, steps):
    """How many tokens each call of an adaptive order reveals, a list without zeros.

    confidence spreads them evenly (MaskGIT, LLaDA). smdm_greedy is SMDM's rule, int(masked * (1 - s/t)) in float32, which
    reveals nothing for many steps where tokens are few; those steps need no call.
    """
    if sampler == "confidence":
        steps = min(steps, n_hidden)
        return [n_hidden // steps + (i < n_hidden % steps) for i in range(steps)]
    t = torch.linspace(1, 1e-5, steps + 1)  # (steps + 1,)
    counts, left = [], n_hidden
    for i in range(steps):
        counts.append(left if i == steps - 1 else int(left * (1 - t[i + 1] / t[i])))
        left -= counts[-1]
    return [count for count in counts if count]


def surest(p, rows, quota, shape):
    """Which rows (N,) are among the quota (b,) largest p of their own sequence; shape = (b, L). -> (N,) bool"""
    table = p.new_full((shape[0] * shape[1],), -1.0)
    table[rows] = p
    rank = table.view(shape).argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (b, L)
    return (rank < quota[:, None]).flatten()[rows]


# ---- The loops -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model,
    x,
    sampler="ancestral",
    steps=128,
    schedule="loglinear",
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    cfg=0.0,
    seed=0,
    batch_size=16,
    autocast=contextlib.nullcontext,
    progress=False,
    ban=None,
):
    """Fills every mask_id of x (N, L) and changes nothing else. -> (tokens (N, L), info)

    ban: (N, L), the token that a place must not get, -1 for none: an end mark at the first place of an answer, say.

    info: nfe (N,) network calls of each sequence, expected_nfe their mean expectation, seconds. A sequence is a pure
    function of (seed, its place in x): the batch size changes how long it takes, not what comes out.
    """
    began = time.time()
    device, (N, L) = x.device, x.shape
    x, given, hidden = x.clone(), x != model.mask_id, (x == model.mask_id).cpu()  # (N, L) each
    adaptive = sampler in ("confidence", "smdm_greedy")
    if adaptive:
        quota = [quotas(int(n), sampler, steps) if n else [] for n in hidden.sum(1)]
        nfe = torch.tensor([len(q) for q in quota])  # (N,)
    else:
        u = diffusion.uniforms(seed, 0, range(N), L)  # (N, L)
        call = calls(draw_reveal_step(hidden, sampler, steps, schedule, u))  # (N, L)
        nfe = call.max(1).values + 1  # (N,)
        noise = diffusion.uniforms(seed, 1, range(N), L)  # (N, L)
    done = torch.zeros_like(nfe)
    with tqdm(total=int(nfe.sum()), disable=not progress, desc="sampling", unit="call", leave=False) as bar:
        while len(live := (done < nfe).nonzero().flatten()[:batch_size]):  # (b,) a finished sequence makes room for the next
            wanted = hidden[live] if adaptive else call[live] == done[live, None]  # (b, L)
            rows = wanted.flatten().nonzero().flatten()  # (n,)
            with autocast():
                logits = predict(model, x[live], rows.to(device), given[live.to(device)], cfg)  # (n, V)
            if ban is not None:
                forbid(logits, ban[live].flatten()[rows])
            if adaptive:  # positions are asked again at every call, each time with fresh noise
                noise_now = torch.cat([diffusion.uniforms(seed, 2 + int(done[i]), [i], L) for i in live])  # (b, L)
            else:
                noise_now = noise[live]
            token, p = categorical(logits, noise_now.flatten()[rows], temperature, top_k, top_p)  # (n,)
            if adaptive:
                share = torch.tensor([quota[i][done[i]] for i in live])  # (b,)
                keep = surest(p.cpu(), rows, share, (len(live), L))  # (n,)
                rows, token = rows[keep], token[keep.to(token.device)]
                hidden[live[rows // L], rows % L] = False
            x[live[rows // L].to(device), (rows % L).to(device)] = token.to(device)
            done[live] += 1
            bar.update(len(live))
    if sampler in ("ancestral", "euler"):
        law = diffusion.reveal_law(diffusion.SCHEDULES[schedule], steps, sampler)
        expected = sum(diffusion.expected_nfe(law, int(n)) for n in (~given).sum(1)) / N
    else:
        expected = float(nfe.double().mean())
    return x, {"nfe": nfe, "expected_nfe": expected, "seconds": time.time() - began}


@torch.no_grad()
def sample_ar(
    model,
    x,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    batch_size=16,
    autocast=contextlib.nullcontext,
    progress=False,
    ban=None,
):
    """The baseline: fills x (N, L) left to right with a causal network that caches keys and values. As `sample`.

    Rows may have prompts of different lengths: what all of them are given is read in one call, after that each call adds
    one position, drawn or given.
    """
    began, (N, L) = time.time(), x.shape
    x, hidden = x.clone(), x == model.mask_id  # (N, L) each
    noise = diffusion.uniforms(seed, 1, range(N), L).to(torch.float32 if x.device.type == "mps" else torch.float64)
    nfe = torch.zeros(N, dtype=torch.long)
    starts = range(0, N, batch_size)
    with tqdm(total=len(starts) * L, disable=not progress, desc="sampling", unit="token", leave=False) as bar:
        for start in starts:
            now = slice(start, start + batch_size)
            y, want = x[now], hidden[now]  # (b, L) views
            if not want.any():
                continue
            first, last = want.any(0).nonzero().flatten()[[0, -1]].tolist()
            cache = [Cache(L) for _ in model.blocks]
            new = torch.cat([y.new_full((len(y), 1), model.start_id), y[:, :first]], dim=1)  # (b, 1 + first)
            for i in range(first, last + 1):
                with autocast():
                    logits = model.head(model.hidden(new, cache=cache)[:, -1])  # (b, V)
                if ban is not None:
                    forbid(logits, ban[now][:, i])
                token, _ = categorical(logits.float(), noise[now][:, i], temperature, top_k, top_p)  # (b,)
                y[:, i] = torch.where(want[:, i], token.to(y), y[:, i])
                new = y[:, i : i + 1]  # (b, 1)
                bar.update()
            nfe[now] = last + 1 - first
    return x, {"nfe": nfe, "expected_nfe": float(nfe.double().mean()), "seconds": time.time() - began}


# ---- Requests: text in, text out -------------------------------------------------------------------------------------


def request(tokenizer, mask_id, block_size, prompt="", suffix="", template="", length=0, start_id=None):
    """One request as token ids, a list with mask_id where a token is wanted. UserError if it does not fit or has no gap.

    A text at the very beginning follows the tokenizer's bos, if it has one, as every document did in training; a causal
    network whose start_id is that bos reads it anyway.
    """

    def encode(text, start):
        begin = [tokenizer.bos] if start and tokenizer.bos not in (None, start_id) else []
        return begin + tokenizer.encode(text, start) if text else []

    if template:
        require(not prompt and not suffix, "give --template or --prompt and --suffix, not both")
        require(not length, "a template has its own length; leave --length out")
        pieces = re.split(r"___(\d+)", template)
        require(len(pieces) > 1, f"the template has no gap: write ___12 for a gap of 12 tokens in '{template}'")
        parts = []  # text, gap, text, gap, ..., text: the ids of a text, a range as long as a gap
        for i, piece in enumerate(pieces):
            require(i % 2 == 0 or len(piece) < 8, f"a gap of ___{piece} tokens is longer than the block ({block_size})")
            parts.append(range(int(piece)) if i % 2 else encode(piece, start=i == 0))
        require(any(parts[1::2]), f"the template has no gap of one token or more: '{template}'")
        total = sum(map(len, parts))
        require(total <= block_size, f"the template is {total} tokens, the block {block_size}")
        return [token for part in parts for token in ([mask_id] * len(part) if isinstance(part, range) else part)]
    length = length or block_size
    require(length <= block_size, f"length must be at most block_size {block_size}, not {length}")
    head, tail = encode(prompt, start=True), encode(suffix, start=False)
    wanted = length - len(head) - len(tail)
    require(
        wanted > 0, f"prompt and suffix are {len(head) + len(tail)} tokens, which leaves nothing of length {length} to fill"
    )
    return head + [mask_id] * wanted + tail


def no_end(x, begins, least, end):
    """`ban` of sample: the end mark at none of the `least` places from begins[i] on. x (N, L) -> (N, L)"""
    ban = torch.full(x.shape, -1)  # (N, L)
    for row, begin in zip(ban, begins, strict=True):
        row[begin : begin + least] = end
    return ban


def text_of(tokenizer, ids, begin=0, end=-1):
    """The text of a sample. For a model of rows, which knows an `end` mark: up to the first one from place `begin` on."""
    if end < 0:
        return tokenizer.decode(ids)
    stop = ids.index(end, begin) if end in ids[begin:] else len(ids)
    return tokenizer.decode([i for i in ids[:stop] if i != tokenizer.bos])


def check(config, causal):
    """Raises UserError for settings that no sampler has."""
    choose("sampler", config["sampler"], SAMPLERS)
    choose("schedule", config["schedule"], diffusion.SCHEDULES)
    settings.at_least(1, config, "steps", "num_samples", "batch_size")
    settings.at_least(0, config, "temperature", "top_k", "length", "min_tokens")
    require(-1 <= config["cfg"] <= 1000, f"cfg must be in -1..1000, not {config['cfg']}")
    require(0 < config["top_p"] <= 1, f"top_p must be in (0, 1], not {config['top_p']}")
    if causal:
        fits = "sampler" not in config.get("given", ()) or config["sampler"] == "left_to_right"
        require(fits, f"this network is causal: it has the sampler left_to_right, not '{config['sampler']}'")
        require(not config["suffix"] and not config["template"], "a causal network cannot see a suffix or fill a template")
        require(config["cfg"] == 0, "cfg needs a masked diffusion model; this network is causal")


def main(config):
    """Loads a checkpoint, fills config["num_samples"] copies of the request, prints and returns them as records."""
    device, autocast = settings.machine(config)
    model, tokenizer, trained = checkpoint.load(config["ckpt"], device)
    require(trained["tokenizer"], f"{config['ckpt']} names no tokenizer, so text cannot be read or written")
    tokenizer = tokenizer or from_meta(trained["tokenizer"])  # says what it lacks, where it could not be built
    check(config, trained["causal"])
    if config["compile"] and not trained["causal"] and settings.can_compile(device):
        model.hidden = torch.compile(model.hidden)

    wish = {key: config[key] for key in ("prompt", "suffix", "template", "length")}
    if not (wish["length"] or wish["template"]):
        wish["length"] = trained.get("row_width", 0)  # a model of rows fills one
    ids = request(tokenizer, model.mask_id, model.block_size, **wish, start_id=model.start_id)
    x = torch.tensor([ids] * config["num_samples"], device=device)  # (N, L)
    keys = ["temperature", "top_k", "top_p", "seed", "batch_size"]
    keys += [] if trained["causal"] else ["sampler", "steps", "schedule", "cfg"]
    fill = sample_ar if trained["causal"] else sample
    begin = ids.index(model.mask_id)
    end = -1 if config["suffix"] or config["template"] else trained.get("row_end", -1)  # what follows a gap is not cut off
    require(end >= 0 or not config["min_tokens"], "min_tokens is for answers by models of rows, which know an end mark")
    require(
        config["min_tokens"] <= ids.count(model.mask_id),
        f"min_tokens must be at most the {ids.count(model.mask_id)} to fill",
    )
    ban = no_end(x, [begin] * len(x), config["min_tokens"], end) if config["min_tokens"] else None
    tokens, info = fill(model, x, autocast=autocast, progress=True, ban=ban, **{key: config[key] for key in keys})

    nfe = info["nfe"].tolist()
    texts = [text_of(tokenizer, row, begin, end) for row in tokens.tolist()]
    records = [{"text": text, "tokens": row, "nfe": n} for text, row, n in zip(texts, tokens.tolist(), nfe, strict=True)]
    for i, record in enumerate(records):
        print(f"---- sample {i + 1}: {record['nfe']} network calls\n{record['text']}")
    speed = tokens.numel() / info["seconds"]
    print(f"---- NFE {sum(nfe) / len(nfe):.1f} a sequence, expected {info['expected_nfe']:.1f}; ", end="")
    print(f"{info['seconds']:.2f} s for {len(nfe)} samples of {len(ids)} tokens, {speed:.0f} tokens/s")
    if config["out"]:
        with settings.whole_file(config["out"]) as path, open(path, "w", encoding="utf8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return records


if __name__ == "__main__":
    settings.run(main, settings, diffusion, sys.modules[__name__])
