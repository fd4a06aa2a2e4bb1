"""The mathematics of judging: how many nats a model needs for an answer after a prompt. evaluate.py has the commands.

A whole text is an answer to an empty prompt. Every estimator is a sum over rows that the network reads. A row hides some
tokens of the answer and counts the weighted cross-entropy of all or some of these:

  any_order, lambda_dce, t_dce, t_dse   one row a draw, hidden and weighed by diffusion.draw_mask; all that is hidden counts
  chain                                 the chain rule along a random order: l rows, one a turn. Row k hides what the turns
                                        from k on reveal and counts the token of turn k. That is exactly -log p along this
                                        order, and its mean over orders is the any_order bound (RADD eq. 2.16)
  orders                                -log of the mean of p along K random orders: a bound that falls with K towards the
                                        likelihood of the mixture over all orders (the argument of arXiv 1509.00519)
  left_to_right, right_to_left          the chain rule along one order: no draws
  ar                                    a causal network, which hides nothing: one row, exact

All but the last three are random. Their draws come in sets. Within a set they are stratified; sets are independent of each
other, so their spread tells the error of their mean. Another order is given as a function, like those in ORDERS. All results
are in nats, and float64.
"""

import contextlib
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import diffusion

ONE_ROW = ["any_order", "lambda_dce", "t_dce", "t_dse"]
DRAWN = [*ONE_ROW, "chain", "orders"]  # what is not is exact: one draw, no error
ORDERS = {  # the turn at which an answer of l tokens reveals that at `place`
    "left_to_right": lambda place, l: place,
    "right_to_left": lambda place, l: l - 1 - place,
}
ESTIMATORS = [*DRAWN, *ORDERS, "ar"]
SURE = (
    100  # degrees of freedom of an error before it may end the draws: one that happens to be small would end them too soon
)


# ---- 1. A draw: random numbers, and what a row of the network hides, counts and weighs -------------------------------


def random_numbers(seed, number, place, draw, size, n):
    """u (b,) and noise (b, n) of draws `draw` (b,) in set `number` of `size` draws, for the requests at `place` (b,).

    Pure functions of these; the first of the n do not depend on n. Over the set u is stratified, in antithetic pairs.
    """
    noise = distinct_uniforms(seed, 2 * number, place * size + draw, n)  # (b, n)
    jitter = distinct_uniforms(seed, 2 * number + 1, place * size + draw // 2, 1).squeeze(1)  # (b,)
    return diffusion.stratified(jitter, draw, size), noise


def distinct_uniforms(seed, step, position, n):
    """diffusion.uniforms, each position drawn once: many rows of a chain, or of a group, have the same numbers."""
    position, row = position.unique(return_inverse=True)
    return diffusion.uniforms(seed, step, position, n)[row]  # (b, n)


def network_row(estimator, u, noise, turn, prompt, schedule="loglinear"):
    """What a row hides (b, W) bool, and the weight (b, W) of what it counts: u, turn, prompt (b,), noise (b, W).

    The answer is what follows the first `prompt` tokens; noise is read at these places alone. `ar` hides nothing.
    """
    place = torch.arange(noise.shape[1]) - prompt[:, None]  # (b, W) in the answer, negative in the prompt
    if estimator in ONE_ROW:
        noise, share = (noise, 1.0) if estimator == "any_order" else some_hidden(estimator, u, noise, place >= 0, schedule)
        mask, weight = diffusion.draw_mask(estimator, u, noise, diffusion.SCHEDULES[schedule], prompt)  # (b, W), (b,)
        return mask, (weight * share)[:, None] * mask
    if estimator == "ar":  # the mask says what counts, as diffusion.ar_nll takes it
        return place >= 0, (place >= 0).double()
    if estimator in ("chain", "orders"):
        order = noise.masked_fill(place < 0, torch.inf).argsort(1).argsort(1)  # (b, W) the turn of each token
    else:
        order = ORDERS.get(estimator, estimator)(place, noise.shape[1] - prompt[:, None])  # (b, W)
    return (order >= turn[:, None]) & (place >= 0), ((order == turn[:, None]) & (place >= 0)).double()


def some_hidden(estimator, u, noise, answer, schedule):
    """Noise under which some token of the answer is hidden, with the chance of that: u (b,), noise, answer (b, W).

    The weight 1/m has no second moment: one token hidden at a tiny m counts for too much, and no interval could be trusted.
    Where the draw is one given that its lowest number falls below m, the weight times the chance of that is at most l.
    Given the lowest of l uniform numbers, the rest are uniform above it: so a stretch of 1 - noise does it.
    """
    m = u if estimator == "lambda_dce" else diffusion.SCHEDULES[schedule](u)[0]  # (b,)
    l = answer.sum(1)  # (b,)
    share = -torch.expm1(l * torch.log1p(-m))  # (b,) 1 - (1 - m)^l
    above = (1 - noise).masked_fill(~answer, 0.0).amax(1) ** l  # (b,) chance that all l numbers are above the lowest
    stretch = ((1 - share + share * above) / above) ** (1 / l)  # (b,)
    return 1 - (1 - noise) * stretch[:, None], share


def rows_nats(model, x0, mask, weight, given, estimator, cfg):
    """weight * cross-entropy, summed over each row: x0, mask, weight, given (b, W) -> (b,) float64. One network call.

    cfg guides the logits away from what the network says without the `given` tokens (diffusion.predict).
    """
    rows = weight.flatten().nonzero().flatten()  # (n,) what counts, and alone leaves the last layer
    x0, mask, weight, rows, given = (z.to(next(model.parameters()).device) for z in (x0, mask, weight.float(), rows, given))
    if estimator == "ar":
        nats = diffusion.ar_nll(model, x0, mask, weight, rows)[1]  # (b,)
    elif not cfg:
        nats = diffusion.nelbo(model, x0, mask, weight, rows, normalised=estimator != "t_dse")[1]  # (b,)
    else:
        logits = diffusion.predict(model, torch.where(mask, model.mask_id, x0), rows, given, cfg)  # (n, V)
        ce = F.cross_entropy(logits, x0.flatten()[rows], reduction="none")  # (n,)
        nats = ce.new_zeros(len(x0)).index_add(0, rows // x0.shape[1], weight.flatten()[rows] * ce)  # (b,)
    return nats.cpu().double()


# ---- 2. A set of draws for many requests, in full batches ------------------------------------------------------------


@torch.no_grad()
def set_nats(
    model,
    requests,
    estimator,
    size,
    number=0,
    schedule="loglinear",
    cfg=0.0,
    seed=0,
    batch_size=32,
    autocast=contextlib.nullcontext,
    progress=False,
    places=None,
    pad_to=0,
):
    """Set `number` of `size` draws for each request -> (nats (N, size), {"rows", "calls"} that the network took).

    requests: N pairs (prompt ids, answer ids), arrays or lists. places (N,): requests with one place have the same random
    numbers, by their place in the answer; without it each has its own. pad_to: rows are filled up to it with masks.
    """
    places = torch.arange(len(requests)) if places is None else torch.as_tensor(places)  # (N,)
    nats, cost = torch.zeros(len(requests), size, dtype=torch.float64), {"rows": 0, "calls": 0}
    lengths = np.array([[len(prompt), len(answer)] for prompt, answer in requests], int).reshape(-1, 2)  # (N, 2)
    with tqdm(total=len(requests) * size, disable=not progress, desc="evaluating", unit="draw", leave=False) as bar:
        for request, draw, turn in batches(lengths, size, estimator, batch_size):
            x0 = torch.from_numpy(np.stack([np.concatenate(requests[i]).astype(np.int64) for i in request]))  # (b, W)
            prompt, request = torch.from_numpy(lengths[request, 0]), torch.from_numpy(request)  # (b,) each
            W = x0.shape[1]
            place = torch.arange(W) - prompt[:, None]  # (b, W) in the answer, negative in the prompt
            u, noise = random_numbers(seed, number, places[request], draw, size, W)  # (b,), (b, W)
            mask, weight = network_row(estimator, u, noise.gather(1, place.clamp(min=0)), turn, prompt, schedule)
            fill = max(0, pad_to - W)
            given, mask, weight = (F.pad(z, (0, fill)) for z in (place < 0, mask, weight))  # (b, W + fill) each
            with autocast():
                found = rows_nats(model, F.pad(x0, (0, fill), value=model.mask_id), mask, weight, given, estimator, cfg)
            nats.index_put_((request, draw), found, accumulate=True)
            cost["rows"] += len(x0) * (2 if cfg else 1)
            cost["calls"] += 1
            bar.update(int((turn == 0).sum()))
    return nats, cost


def batches(lengths, size, estimator, batch_size):
    """Yields (request (b,), draw (b,), turn (b,)), b <= batch_size: every row that is needed, with others of its length.

    lengths (N, 2) of prompt and answer. There is no attention mask: rows of different length cannot share a call.
    """
    turns = np.minimum(lengths[:, 1], 1) if estimator in (*ONE_ROW, "ar") else lengths[:, 1]  # (N,) rows of a draw
    for length in np.unique(lengths.sum(1)):
        members = np.flatnonzero(lengths.sum(1) == length)
        first = np.cumsum([0, *turns[members] * size])  # (members + 1,) number of each request's first row
        for start in range(0, first[-1], batch_size):
            row = np.arange(start, min(start + batch_size, first[-1]))  # (b,)
            i = np.searchsorted(first, row, side="right") - 1  # (b,)
            draw, turn = np.divmod(row - first[i], turns[members[i]])
            yield members[i], torch.from_numpy(draw), torch.from_numpy(turn)


def of_set(estimator, nats):
    """What a set of draws (N, K) says: (N,). The mean; for `orders` -log of the mean probability."""
    return math.log(nats.shape[1]) - (-nats).logsumexp(1) if estimator == "orders" else nats.mean(1)


# ---- 3. Answers after prompts, and whole texts -----------------------------------------------------------------------


def answer_nats(
    model,
    requests,
    estimator="any_order",
    draws=128,
    schedule="loglinear",
    cfg=0.0,
    seed=0,
    batch_size=32,
    autocast=contextlib.nullcontext,
    progress=False,
    groups=None,
    pad_to=0,
):
    """-log p(answer | prompt) of each request: N pairs (prompt ids, answer ids) -> (N,) float64, by one stratified set.

    groups (N,) ints: requests of one group share their random numbers, so that the options of one question compare with
    little noise. cfg: unsupervised guidance, logits u + (1 + w)(c - u). pad_to: a row is filled up to it with masks.
    """
    draws = draws if estimator in DRAWN else 1
    how = {"schedule": schedule, "cfg": cfg, "seed": seed, "batch_size": batch_size, "autocast": autocast}
    return of_set(
        estimator, set_nats(model, requests, estimator, draws, **how, progress=progress, places=groups, pad_to=pad_to)[0]
    )


def estimate(model, blocks, estimator="any_order", draws=16, strata=4, precision=0.0, lengths=None, **how):
    """Nats of each block (L,) of a text by sets of `strata` draws, `draws` in all -> (nats (S,), info).

    A block may also be a pair (prompt ids, answer ids); lengths (S,): how many of its tokens count, without it all. Stops
    once the 95% interval of this text's nats per token is within +- precision, where that is not 0, and known well enough.
    info: draws, draw_error and draw_half (of the interval) in nats per token, rows and calls of the network, seconds.
    **how: the keys of set_nats.
    """
    began = time.time()
    draws = draws if estimator in DRAWN else 1
    requests = [block if isinstance(block, tuple) else (block[:0], block) for block in blocks]
    n_tokens = sum(len(answer) for _, answer in requests) if lengths is None else sum(lengths)
    sizes = [min(strata, draws - first) for first in range(0, draws, strata)]
    sets, info = [], {"rows": 0, "calls": 0}
    for number, size in enumerate(sizes):
        found, cost = set_nats(model, requests, estimator, size, number, **how)  # (S, size)
        sets.append(of_set(estimator, found))
        info = {key: info[key] + cost[key] for key in cost}
        nats, error = mean_over_sets(torch.stack(sets, 1), sizes[: number + 1])  # (S,), a float
        error = error / max(1, n_tokens) if estimator in DRAWN else 0.0
        half = 0.0 if error == 0 else error * t95(len(blocks) * number)
        if half < precision and (error == 0 or len(blocks) * number >= SURE):
            break
    info |= {"draws": sum(sizes[: number + 1]), "draw_error": error, "draw_half": half}
    return nats, info | {"seconds": time.time() - began}


def sequence_nats(model, blocks, estimator="any_order", draws=16, **how):
    """The nats of `estimate`: blocks, a list of S int64 arrays -> (S,). **how: the keys of estimate and of set_nats.

    A block's number is a pure function of (seed, its place: `places` (S,), or that in the list).
    """
    return estimate(model, blocks, estimator, draws, **how)[0]


# ---- 4. How sure it is -----------------------------------------------------------------------------------------------


def mean_over_sets(sets, sizes):
    """Mean (S,) over R independent sets of draws, (S, R) of `sizes` (R,), and the standard error of the sum of these means.

    Draws of one set are stratified, so their own spread says too much. Sets are independent, and so are sequences: the
    variance of each mean is unbiased, exactly for equal sizes, and they add. One set shows no error: infinite.
    """
    share = torch.as_tensor(sizes, dtype=torch.float64) / sum(sizes)  # (R,)
    mean = (sets * share).sum(1)  # (S,)
    left = 1 - (share**2).sum().item()
    squares = (share * (sets - mean[:, None])).square().sum().item()
    return mean, math.sqrt(squares / left) if len(sizes) > 1 else math.inf


def mean_and_error(nats, lengths):
    """Nats per token and its standard error, clustered by sequence: nats, lengths (S,) -> two floats.

    The ratio estimator sum(nats) / sum(lengths) and the usual linearisation of its error; infinite for one sequence.
    """
    nats, lengths = np.asarray(nats, float), np.asarray(lengths, float)
    mean = nats.sum() / lengths.sum()
    S = len(nats)
    residual = nats - mean * lengths  # (S,)
    error = math.sqrt((residual**2).sum() * S / (S - 1)) / lengths.sum() if S > 1 else math.inf
    return float(mean), error


def t95(freedom):
    """Half a 95% interval in standard errors, Student's t: the expansion of Abramowitz and Stegun, 26.7.5."""
    return 1.96 + sum(c / freedom**k for k, c in enumerate((2.372, 2.822, 2.556, 1.589), 1)) if freedom else math.inf


def report(nats, lengths, bytes_per_token):
    """The result as a dict and as text: nats, lengths (S,). The 95% interval is that of another text of the same kind."""
    mean, error = mean_and_error(nats, lengths)
    half = t95(len(nats) - 1) * error
    result = {"nats_per_token": mean, "standard_error": error, "interval": [mean - half, mean + half]}
    result |= {"perplexity": math.exp(mean) if mean < 700 else math.inf, "bits_per_token": mean / math.log(2)}
    result |= {"bits_per_byte": mean / math.log(2) / bytes_per_token, "tokens": int(sum(lengths)), "sequences": len(nats)}
    bit = math.log(2)
    text = (
        f"{mean:.4f} +- {half:.4f} nats per token (95% interval) = {mean / bit:.4f} +- {half / bit:.4f} bits per token"
        f" = {result['bits_per_byte']:.4f} +- {half / bit / bytes_per_token:.4f} bits per byte; "
        f"perplexity {result['perplexity']:.2f}"
    )
    return result, text


def spread(blocks, n):
    """n of the blocks, evenly spaced; all of them for n = 0."""
    if not n or n >= len(blocks):
        return blocks
    return [blocks[i * len(blocks) // n] for i in range(n)]
