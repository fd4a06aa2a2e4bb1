"""Evaluation: -log p in nats, exact or an upper bound, of text that a model has not seen.

    python evaluate.py --ckpt=out/pydocs                                  its own held-out data
    python evaluate.py --ckpt=out/pydocs --text="The list is sorted."     token by token
    python evaluate.py --ckpt=out/mine --text="A sequence." --prompt="What is a list?"
    python evaluate.py --ckpt=out/pydocs --precision=0.002 --draws=256    to within 0.002 nats

- A masked diffusion model gives a bound (NELBO: negative evidence lower bound), estimated from
  draws of the corruption; a causal model gives an exact number. A conditional likelihood, -log
  p(answer | prompt), never masks the prompt. A text is an answer to an empty prompt.
- A draw is a random corruption of a sequence, a row an input of the network, a set the draws that
  are stratified together. An estimator is a function (what a row masks and counts) or an order.

    any_order        one row per draw: k tokens are masked, and each counts L/k times
    lambda_dce, t_dce, t_dse   the same, drawn so that no mask is empty (importance_sampled)
    chain            the chain rule along a random order, one row per token. Row k masks the k-th
                     token of the order and all after it, and counts the k-th. Exact for this order;
                     the mean over orders is the any_order bound. RADD eq. 2.16
    orders           -log of the mean of p along K orders (log-mean-exp): a bound that falls with K
                     to the likelihood of the mixture of all orders (as in arXiv 1509.00519)
    left_to_right, right_to_left   the exact -log p of sampling in that order (SMDM): no draws

  An `order` network gives all terms in one pass: a row per draw. If it learnt left_to_right or
  right_to_left alone, that is the default.

- Two 95% intervals are printed: the mean +- Student's t times a standard error. Sequence s of S has
  l_s tokens and n_s nats, the mean over R sets of draws; r = sum n / sum l.

    of the draws     How far would other draws move the number for this text? With var_s, the
                     variance over the R sets: sqrt(sum_s var_s / R) / sum l, S (R - 1) degrees of
                     freedom. --precision refers to this interval.
    of the text      How far would other text of the same kind move it?
                     sqrt(S/(S - 1) sum (n_s - r l_s)^2) / sum l, S - 1 degrees of freedom. It
                     includes the noise of the draws; blocks of one document count as independent.

What makes it fast: the draws of a set are stratified in antithetic pairs (u, 1 - u), each with its
own noise: an eighth of the calls of independent draws for the same interval. Sets are independent.
"""

from lib import program  # isort: skip (first: from here on Ctrl-C is one line)
import math
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import config as settings
import diffusion
from config import Table, plural, require
from data import ngram
from lib import fused
from lib.bar import progress_bar
from lib.entries import check_estimator, uses_time
from lib.stats import certainty, finite, mean_over_sets, method, report, t95
from lib.text import by_token, check_text
from run import subject as subjects
from run.rows import Requests, random_numbers, set_sizes

DEFAULTS = {
    "data": "",  # a prepared folder; empty: the one that the checkpoint was trained on
    "text": "",  # a sentence (or FILE:PATH) to score token by token, instead of data
    "prompt": "",  # what precedes the text (or FILE:PATH): a condition, which is not scored
    "split": "val",  # the split of the folder to evaluate
    "estimator": "any_order",  # one of ESTIMATORS (SMDM: lambda_dce); a causal network needs none
    "draws": 16,  # per sequence, in [1, 1e6]; if precision is given, the maximum
    "strata": 4,  # draws stratified together, in [1, 1e6] (1: independent); K of estimator=orders
    "precision": 0.0,  # stop at a 95% interval of +- this many nats per token; 0: take all draws
    "sequences": 0,  # blocks to evaluate, evenly spaced over the split; 0: all
    "block_size": 0,  # tokens per block; 0: the model's block_size
    "protocol": "whole",  # whole (a shorter last block counts) | radd (it is dropped, as in RADD)
    "batch_size": 32,  # rows in one network call; 1 or more
}
MODULES = (settings, subjects, diffusion, sys.modules[__name__])  # whose keys it takes
# The keys that token_nats, answer_nats and estimate take as options; those that --text lacks.
OF_TOKENS = ("estimator", "draws", "seed", "batch_size")
OF_ANSWERS = (*OF_TOKENS, "schedule")
OF_ESTIMATE = (*OF_ANSWERS, "strata", "precision")
OF_DATA = [key for key in (*DEFAULTS, "schedule") if key not in ("text", "prompt", *OF_TOKENS)]
SURE = 100  # degrees of freedom needed to trust an error: with few it may be small by chance


# ---- 1. Estimators: what a row of the network masks, and what it counts --------------------------
class RowNoise(NamedTuple):
    """Random numbers for b rows of width W; the answer is what follows the prompt."""

    u: torch.Tensor  # (b,) uniform
    noise: torch.Tensor  # (b, W) uniform
    turn: torch.Tensor  # (b,) index of a term of the chain rule
    prompt: torch.Tensor  # (b,) length of each prompt
    schedule: object

    @property
    def position(self):  # (b, W) from 0 in the answer, negative in the prompt
        return torch.arange(self.noise.shape[1]) - self.prompt[:, None]


def any_order(drawn):
    """Mask k of the l answer tokens; each of them counts l/k times."""
    mask, weight = diffusion.draw_mask("any_order", drawn.u, drawn.noise, prompt=drawn.prompt)
    return mask, weight[:, None] * mask  # (b, W) each


def lambda_dce(drawn):
    return importance_sampled("lambda_dce", drawn, drawn.u)


def t_dce(drawn):
    return importance_sampled("t_dce", drawn, drawn.schedule(drawn.u)[0])


def importance_sampled(objective, drawn, m):
    """The objective's draw given that some token is masked, times the probability of that.

    The plain weight 1/m has infinite variance: one token masked at a tiny m counts too much, and no
    interval could be trusted. But an empty mask adds nothing, so E[X] = P(some) E[X | some], where
    "some" means that some token is masked, and weight * P(some) = (1 - (1 - m)^n) / m is at most n
    (t_dce: n m'). The condition is that the lowest of n uniform numbers is below m. Given the
    lowest, the others are uniform above it, so scaling 1 - noise by one factor per row moves the
    lowest to where it must be. (highest^n is uniform on (0, 1]; it must become uniform on (1 -
    P(some), 1].)
    """
    answer = drawn.position >= 0  # (b, W)
    n = answer.sum(1)  # (b,)
    p_some = -torch.expm1(n * torch.log1p(-m))  # (b,) 1 - (1 - m)^n
    highest = (1 - drawn.noise).masked_fill(~answer, 0.0).amax(1)  # (b,) of 1 - noise
    p_above = highest**n  # (b,) P(all noise above its lowest)
    scale = ((1 - p_some + p_some * p_above) / p_above) ** (1 / n)  # (b,)
    noise = 1 - (1 - drawn.noise) * scale[:, None]  # (b, W)
    mask, weight = diffusion.draw_mask(objective, drawn.u, noise, drawn.schedule, drawn.prompt)
    return mask, (weight * p_some)[:, None] * mask  # (b, W) each


def along(name, p=None):
    """A function RowNoise -> order (b, W): `name` of diffusion.ORDERS, with prompts first."""
    return lambda r: diffusion.draw_order(name, r.noise, r.u[:, None], p, r.prompt)


def one_term(drawn, order):
    """Term `turn` of the chain rule along an order (b, W), prompts first; later ones masked too."""
    turns = order.argsort(1) - drawn.prompt[:, None]  # (b, W) by position, negative in the prompt
    turn = drawn.turn[:, None]  # (b, 1)
    return turns >= turn, (turns == turn).double()  # (b, W) each


def ar(drawn):
    """The answer counts, as diffusion.ar_nll takes it; nothing is masked."""
    answer = drawn.position >= 0  # (b, W)
    return answer, answer.double()


class Estimator(NamedTuple):
    row: object = None  # RowNoise -> (mask bool, weight), (b, W) each; None: a chain-rule term
    order: object = None  # RowNoise -> order (b, W) of that chain rule, prompts first
    exact: bool = False  # nothing is drawn
    mean_of_p: bool = False  # a set gives -log(mean of p), not the mean of -log p
    normalised: bool = True  # False: the output is a score, not log-probabilities
    name: str = ""  # in ESTIMATORS, set by estimator_of

    def row_of(self, drawn):
        """The mask (b, W) bool of each row, and the weight (b, W) of the tokens that it counts."""
        return self.row(drawn) if self.row else one_term(drawn, self.order(drawn))


ESTIMATORS = Table(
    "estimator",
    lambda entry: check_estimator(entry, RowNoise),
    any_order=Estimator(any_order, along("uniform")),  # the order is for `order` networks
    lambda_dce=Estimator(lambda_dce),
    t_dce=Estimator(t_dce),
    t_dse=Estimator(t_dce, normalised=False),  # of networks trained with t_dse: others lack a scale
    chain=Estimator(order=along("uniform")),
    orders=Estimator(order=along("uniform"), mean_of_p=True),
    left_to_right=Estimator(order=along("left_to_right"), exact=True),
    right_to_left=Estimator(order=along("right_to_left"), exact=True),
)
AR = Estimator(ar, along("left_to_right"), exact=True, name="ar")  # for causal networks
# For config.refuse_unused: the estimators that a key affects.
DRAWN = "estimators that draw", lambda estimator: not estimator.exact, None
USED_BY = dict.fromkeys(("draws", "strata", "precision"), DRAWN)
USED_BY["schedule"] = "estimators that draw a time", lambda e: uses_time(e, RowNoise), None


def estimator_of(model, name):
    """The Estimator for this network: the one of that name, or AR if the network is causal."""
    estimator = ESTIMATORS[name]._replace(name=name)
    fits = not model.causal or name in (DEFAULTS["estimator"], "left_to_right")
    require(fits, f"a causal network is exact: it needs no estimator, and has no '{name}'")
    return AR if model.causal else estimator


# ---- 2. A set of draws for many requests, in full batches ----------------------------------------
@torch.no_grad()
def set_nats(model, requests, o, number=0, size=1, progress=False):
    """Take set `number`, of `size` draws, for Requests -> (nats (N, size), cost {"rows", "calls"}).

    o: the options of all MODULES. A row is one sequence that the network reads. With size = 2, for
    example, three requests with answers of 5 tokens take 6 rows with any_order, where all masked
    tokens of a row count, and 30 rows with chain, where a row counts one token, that of its `turn`.
    """
    estimator, groups = estimator_of(model, o["estimator"]), requests.group_of_each()  # (N,)
    rows_a_draw = requests.rows_a_draw(model, estimator)  # (N,)
    # A row counts twice if it is read in two streams (`order`), or with and without the prompt.
    passes = 2 if requests.in_one_pass(model, estimator) or requests.cfg_scale else 1
    nats = torch.zeros(len(groups), size, dtype=torch.float64)
    cost = {"rows": 0, "calls": 0}
    pending = []  # ((request, draw), nats) per call, (b,) each: read at the end, so no call waits
    with progress_bar(progress, nats.numel(), "draw") as bar:
        for i, k, turn in requests.batches(rows_a_draw, size, o["batch_size"]):  # (b,) each
            x0, prompt = requests.clean(i)  # (b, W), (b,)
            u, noise = random_numbers(o["seed"], number, groups[i], k, size, x0.shape[1], prompt)
            drawn = RowNoise(u, noise, turn, prompt, diffusion.SCHEDULES[o["schedule"]])
            row_nats = nats_of_call(model, requests, estimator, x0, drawn)  # (b,)
            pending.append(((torch.from_numpy(i), k), row_nats))
            cost["rows"] += len(x0) * passes
            cost["calls"] += 1
            bar.update(int((turn == 0).sum()))
    for index, row_nats in pending:
        nats.index_put_(index, row_nats.cpu().double(), accumulate=True)
    return nats, cost


def nats_of_call(model, requests, estimator, x0, drawn):
    """The nats (b,) that each row of x0 (b, W) counts. One network call."""
    if requests.in_one_pass(model, estimator):
        arguments = x0, estimator.order(drawn), drawn.position >= 0  # (b, W) each; prompts first
        return diffusion.order_nll(model, *fused.moved(model.device, *arguments))[1].sum(1)
    mask, weight = estimator.row_of(drawn)  # (b, W) each
    fill = (0, max(0, requests.pad_to - x0.shape[1]))
    x0 = F.pad(x0, fill, value=model.mask_id)  # (b, W + fill)
    mask, weight, cond = (F.pad(each, fill) for each in (mask, weight, drawn.position < 0))
    cond = cond if requests.cfg_scale else None
    return nats_of_rows(model, x0, mask, weight, estimator, cond, requests.cfg_scale)


def nats_of_rows(model, x0, mask, weight, estimator, cond=None, cfg_scale=0.0):
    """weight * CE, summed over each row (b, W) -> (b,), guided by cond (b, W). One network call."""
    idx = weight.flatten().nonzero().flatten()  # (n,) what counts: only this is computed
    x0, mask, weight, idx = fused.moved(model.device, x0, mask, weight.float(), idx)
    if model.causal:
        return diffusion.ar_nll(model, x0, mask, weight, idx)[1]
    if cond is None:
        return diffusion.nelbo(model, x0, mask, weight, idx, estimator.normalised)[1]
    (cond,) = fused.moved(model.device, cond)  # (b, W)
    x = torch.where(mask, model.mask_id, x0)  # (b, W)
    target = x0.flatten()[idx]  # (n,)
    hs = diffusion.states(model, x, idx, cond, cfg_scale)
    ces = []
    for span in fused.chunks(len(target), fused.head_chunk(model.vocab_size, model.device)):
        logits = diffusion.guided(model, [h[span] for h in hs], cfg_scale)  # (chunk, V)
        ces.append(F.cross_entropy(logits, target[span], reduction="none"))
    return fused.summed(weight.flatten()[idx] * torch.cat(ces), idx, x0)


def of_set(estimator, nats):
    """Combine a set of K draws: nats (N, K) -> (N,). NotFinite if one is nan or infinite."""
    nats = finite(nats, "log-likelihoods")
    return math.log(nats.shape[1]) - (-nats).logsumexp(1) if estimator.mean_of_p else nats.mean(1)


# ---- 3. Answers after prompts, and whole texts ---------------------------------------------------
def answer_nats(model, requests, groups=None, cfg_scale=0.0, pad_to=0, progress=False, **options):
    """-log p(answer | prompt) of each request: N pairs (prompt ids, answer ids) -> (N,) float64.

    It takes one stratified set of `draws`. groups, cfg_scale, pad_to: see Requests. If the choices
    of a question form a group, they are compared with little noise. options: keys of OF_ANSWERS.
    """
    o = settings.options(options, *MODULES, only=OF_ANSWERS)
    estimator = estimator_of(model, o["estimator"])
    requests = Requests(requests, groups, cfg_scale, pad_to).checked(model, estimator)
    size = 1 if estimator.exact else o["draws"]
    nats, _ = set_nats(model, requests, o, size=size, progress=progress)  # (N, size)
    return of_set(estimator, nats)


def estimate(model, requests, lengths=None, progress=False, **options):
    """The nats of each request, or block (L,) of ids -> (nats (S,) float64, info).

    Takes `draws` draws in sets of `strata`. With a precision above 0 it stops once the 95% interval
    of the draws is within +- precision nats per token, and known well enough. lengths (S,): tokens
    of each that count (default: all). info: draws; draw_error and draw_half (of the interval) in
    nats per token; rows and calls of the network; seconds. options: keys of OF_ESTIMATE.
    """
    began = time.time()
    o = settings.options(options, *MODULES, only=OF_ESTIMATE)
    estimator = estimator_of(model, o["estimator"])
    pairs = [request if isinstance(request, tuple) else ((), request) for request in requests]
    requests = Requests(pairs).checked(model, estimator)
    n_tokens, sizes = requests.tokens(lengths), set_sizes(estimator, o)
    sets, info = [], {"rows": 0, "calls": 0}
    for number, size in enumerate(sizes):
        nats, cost = set_nats(model, requests, o, number, size, progress)  # (S, size)
        sets.append(of_set(estimator, nats))
        info = {key: info[key] + cost[key] for key in cost}
        mean, error = mean_over_sets(torch.stack(sets, 1), sizes[: number + 1])  # (S,), a float
        error = 0.0 if estimator.exact else error / max(1, n_tokens)
        freedom = len(requests.pairs) * number
        half = error * t95(freedom) if error else 0.0
        if half < o["precision"] and (error == 0 or freedom >= SURE):
            break
    info |= {"draws": 0 if estimator.exact else sum(sizes[: number + 1]), "draw_error": error}
    return mean, info | {"draw_half": half, "seconds": time.time() - began}


@torch.no_grad()
def token_nats(model, ids, prompt=(), **options):
    """The nats of each token of a text by the chain rule: ids (L,) -> (draws, L) float64.

    Each token is conditioned on the prompt ids (P,) and the tokens before it in the draw's order.
    UserError if the estimator is no chain rule. options: keys of OF_TOKENS.
    """
    o = settings.options(options, *MODULES, only=OF_TOKENS)
    estimator = estimator_of(model, o["estimator"])
    message = f"{estimator.name} has no tokens' nats; try chain"
    require(estimator.order and not estimator.mean_of_p, message)
    one_pass = Requests([(prompt, ids)]).checked(model, estimator).in_one_pass(model, estimator)
    x0, P, L = torch.tensor([[*prompt, *ids]]), len(prompt), len(ids)  # (1, P + L)
    terms_of, turns = (all_terms, 1) if one_pass else (term_of_each_row, L)  # rows per draw
    K = 1 if estimator.exact else o["draws"]
    nats = torch.zeros(K, L, dtype=torch.float64)
    for row in torch.arange(K * turns).split(o["batch_size"]):  # (b,)
        k, turn, first = row // turns, row % turns, torch.full_like(row, P)  # (b,) each
        u, noise = random_numbers(o["seed"], 0, 0 * row, k, K, P + L, first)  # (b,), (b, P + L)
        drawn = RowNoise(u, noise, turn, prompt=first, schedule=None)
        position, terms = terms_of(model, estimator, x0.expand(len(row), P + L), drawn)
        nats[k[:, None], position - P] = terms.cpu().double()
    return finite(nats, "log-likelihoods")


def all_terms(model, estimator, x0, drawn):
    """All terms in one pass of an `order` network: x0 (b, W) -> positions, nats (b, W - P) each."""
    order, P = estimator.order(drawn), drawn.prompt[0]  # (b, W)
    terms = diffusion.order_nll(model, *fused.moved(model.device, x0, order))[1]  # (b, W)
    return order[:, P:], terms[:, P:]


def term_of_each_row(model, estimator, x0, drawn):
    """The term `turn` of each row: x0 (b, W) -> its position and its nats, (b, 1) each."""
    order = estimator.order(drawn)  # (b, W)
    nats = nats_of_rows(model, x0, *one_term(drawn, order), estimator)  # (b,)
    return order.gather(1, (drawn.prompt + drawn.turn)[:, None]), nats[:, None]


# ---- 4. One text ---------------------------------------------------------------------------------
def check(config):
    """Raise UserError for settings that no evaluation can have."""
    set_sizes(ESTIMATORS[config["estimator"]], config)
    check_text(config, OF_DATA)


def evaluate(config, subject, folder, split):
    """Evaluate one split of a prepared folder -> a dict, and a report as text."""
    meta, part, L = subjects.open_text(config, subject, folder, split)
    options = {key: config[key] for key in OF_ESTIMATE} | {"progress": True}
    estimator = estimator_of(subject.model, config["estimator"])
    with subject.autocast():
        nats, info = estimate(subject.model, part.requests, part.counts, **options)
    result, text = report(nats, part.counts, part.bytes_per_token)
    result |= info | {"estimator": estimator.name, "block_size": L, "data": str(folder)}
    size = min(config["strata"], result["draws"])
    draws = f"{plural(result['draws'], 'draw')} a sequence in sets of {size}"
    coverage = subjects.coverage(result, split, meta, config["protocol"])
    head = f"{coverage}; {method(estimator, draws)}; {subject.words}"
    end = certainty(result, config["precision"], config["draws"], config["strata"])
    return result, "\n".join([head, subjects.with_remarks(meta, text), end])


def score(config, subject):
    """Evaluate config["text"], print a line for each token -> {"tokens", "nats", "total", ...}."""
    prompt, ids, n, scored = subjects.ids_of_text(subject, config)  # lists of P and L ids
    options = {key: config[key] for key in OF_TOKENS}
    estimator = estimator_of(subject.model, config["estimator"])
    with subject.autocast():
        nats = token_nats(subject.model, ids, prompt, **options)  # (draws, L)
    result, text = by_token(subject.tokenizer, ids, nats, n)
    how_evaluated = method(estimator, plural(len(nats), "order"))
    print(f"{text}\n-log p({scored}): {how_evaluated}; {subject.words}")
    return result | {"prompt": prompt, "estimator": estimator.name}


def main(config):
    """Evaluate config["ckpt"] on config["text"] or config["data"]; return the result, a dict."""
    check(config := settings.whole(config, *MODULES))
    subject = subjects.load_evaluable(config, reads_text=bool(config["text"]))
    config = subjects.in_its_order(config, subject, "estimator", ESTIMATORS)
    settings.refuse_unused(config, USED_BY, estimator_of(subject.model, config["estimator"]))
    if config["text"]:
        return score(config, subject)
    folder = subjects.folder_of(config, subject)
    result, text = evaluate(config, subject, folder, config["split"])
    print(text)
    ngram_nats = ngram.baseline(folder) if config["split"] == "val" else {}
    if ngram_nats:
        print(ngram.words(ngram_nats, result["nats_per_token"]))
    return result | {"ngram_nats": ngram_nats}


if __name__ == "__main__":
    program.run(main, *MODULES)
