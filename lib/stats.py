"""Means, standard errors and 95% intervals in nats, and the sentences that report them."""

import math

import numpy as np
import torch

from config import UserError, plural

MOST = 10**6  # draws a sequence that one would wait for
FEWEST = 3  # values needed to estimate an error: two are too often close by chance


class NotFinite(UserError):
    """A number that a result needs is nan or infinite."""


def finite(values, what):
    """The values, a tensor or an array; raises NotFinite if one is nan or infinite."""
    bad = ~torch.as_tensor(values).isfinite()
    if bad.any():
        reason = "the weights are damaged, or too large for the dtype"
        raise NotFinite(f"{int(bad.sum())} of {bad.numel()} {what} are nan or infinite: {reason}")
    return values


class Probabilities:
    """Checks the probabilities of drawn tokens and raises NotFinite if one is nan.

    `check` does so after the last call, so that no call waits for the device.
    """

    what = "probabilities of drawn tokens"

    def __init__(self):
        self.total = 0.0

    def see(self, p):
        self.total = self.total + p.sum()

    def check(self):
        finite(self.total, self.what)


def entropy_of(logits):
    """Entropy (n,) in nats of the distributions of logits (n, V)."""
    log_p = logits.float().log_softmax(-1)  # (n, V)
    return -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)


def not_finite(weights):
    """The name of the first tensor that holds nan or infinity, or None."""
    ends = ((name, w.aminmax()) for name, w in weights.items() if w.numel())  # without a copy
    return next((name for name, pair in ends if not all(map(torch.isfinite, pair))), None)


def mean_over_sets(sets, sizes):
    """Mean (S,) over R independent sets of draws (S, R), and the standard error of the means' sum.

    The draws within a set are stratified, so their spread overstates the error. Sets are
    independent, and so are sequences: the estimated variance of each mean is unbiased (exactly for
    sets of equal `sizes` (R,)), and the variances add up. With one set the error is infinite.
    """
    share = torch.as_tensor(sizes, dtype=torch.float64) / sum(sizes)  # (R,)
    mean = (sets * share).sum(1)  # (S,)
    squares = (share * (sets - mean[:, None])).square().sum().item()
    left = 1 - (share**2).sum().item()
    return mean, math.sqrt(squares / left) if len(sizes) > 1 else math.inf


def mean_and_error(values, lengths=None):
    """sum(values) / sum(lengths) and its standard error, clustered by item: (S,) -> two floats.

    This is the ratio estimator with the usual linearised error; without lengths, the mean and its
    standard error. The error is infinite for fewer than FEWEST items.
    """
    values = np.asarray(values, float)
    lengths = np.ones(len(values)) if lengths is None else np.asarray(lengths, float)
    mean, S = values.sum() / lengths.sum(), len(values)
    residual = values - mean * lengths  # (S,)
    if S < FEWEST:
        return float(mean), math.inf
    return float(mean), math.sqrt((residual**2).sum() * S / (S - 1)) / lengths.sum()


def mean_half(values):
    """The mean of values (S,) and half its 95% interval, infinite for fewer than FEWEST values."""
    mean, error = mean_and_error(values)
    return mean, t95(len(values) - 1) * error


def t95(freedom):
    """Half a 95% interval in standard errors, by Student's t: Abramowitz and Stegun, 26.7.5.

    Infinite for fewer degrees of freedom than FEWEST values have.
    """
    terms = enumerate((2.372, 2.822, 2.556, 1.589), 1)
    enough = freedom >= FEWEST - 1
    return 1.96 + sum(c / freedom**k for k, c in terms) if enough else math.inf


def plus_minus(half, form=".4f", sign="+-"):
    """An error or half an interval as text to put after the value; "" if it is unknown."""
    return f" {sign} {half:{form}}" if half is not None and math.isfinite(half) else ""


def perplexity(nats):
    """e^nats, infinite if it overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def shown_perplexity(nats):
    return f"{perplexity(nats):.2f}" if nats < 700 else f"e^{nats:.0f}"


def report(nats, lengths, bytes_per_token):
    """The result of an evaluation as a dict and as text, from nats and lengths (S,).

    The 95% interval is over sequences. If there are too few, it is infinite and the text says so.
    """
    mean, error = mean_and_error(nats, lengths)
    half, bit = t95(len(nats) - 1) * error, math.log(2)
    bits, per_byte = mean / bit, mean / bit / bytes_per_token
    result = {
        "nats_per_token": mean,
        "standard_error": error,
        "interval": [mean - half, mean + half],
        "perplexity": perplexity(mean),
        "bits_per_token": bits,
        "bits_per_byte": per_byte,
        "tokens": int(sum(lengths)),
        "sequences": len(nats),
    }
    interval = "95% interval"
    if not math.isfinite(half):
        interval = f"too few sequences for an interval: {len(nats)}"
    text = (
        f"{mean:.4f}{plus_minus(half)} nats per token ({interval})"
        f" = {bits:.4f}{plus_minus(half / bit)} bits per token"
        f" = {per_byte:.4f}{plus_minus(half / bit / bytes_per_token)} bits per byte;"
        f" perplexity {shown_perplexity(mean)}"
    )
    return result, text


def method(estimator, draws):
    """How an evaluate.Estimator computed a number, in words; `draws` says what was drawn."""
    name = estimator.name
    if name == "ar":
        return "exact"
    return f"exact along the order {name}" if estimator.exact else f"upper bound by {name}, {draws}"


def certainty(result, precision, most, strata):
    """The error of the draws and their cost, as text, and the draws needed for a smaller error."""
    error, half, draws = result["draw_error"], result["draw_half"], result["draws"]
    rows, calls = (plural(result[f"{noun}s"], noun) for noun in ("row", "call"))
    network = f"{rows} of the network in {calls}"
    took = f"{network}, {result['seconds']:.1f} s"
    if not draws:
        return f"no draws: for this text the number has no error; {took}"
    if not math.isfinite(half):
        sets = 1 + math.ceil((FEWEST - 1) / result["sequences"])
        more = f"give --draws={sets * strata} or more"
        return f"too few draws ({draws} a sequence) to show their error: {more}; {took}"
    interval = f"standard error {error:.4f}, +- {half:.4f} nats per token (95%)"
    text = f"the draws alone, on this text: {interval}; {took}"
    if half < precision:
        return f"{text}; within +- {precision} after {draws} draws a sequence, {most} being allowed"
    if precision:
        need = math.ceil(draws * (half / precision) ** 2 / strata) * strata
        text += f"; not within +- {precision}"
        more = f"it takes about {need} draws a sequence (--draws={need})"
        return f"{text}; {more if need <= MOST else f'{MOST:,} draws are not enough for that'}"
    return text
