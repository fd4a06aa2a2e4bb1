"""The n-gram baseline of a prepared folder, to compare a model's number with."""

import numpy as np

from data.loader import Tokens, read_meta


def baseline(folder, limit=2**24):
    """Nats per held-out token of n-gram models of the training text: {"unigram": ..., ...}.

    {} if the folder is not text with both splits. Witten-Bell smoothing, which has nothing to tune:
    after a context h that was seen c(h) times, before T(h) distinct tokens, p(v | h) = (c(hv) +
    T(h) p(v | h without its first token)) / (c(h) + T(h)), starting from the uniform 1/V. Stops at
    trigrams, or when the table of V^n counts exceeds `limit`. Reads at most `limit` tokens of each
    split.
    """
    meta, nats = read_meta(folder), {}
    if meta.get("width") or not {"train", "val"} <= meta["splits"].keys():
        return nats
    train, val = Tokens(folder, "train")[:limit], Tokens(folder, "val")[:limit]  # (N,) (M,)
    V = meta["vocab_size"]
    p = np.full(len(val), 1 / V)  # (M,) of each held-out token
    for n, name in enumerate(["unigram", "bigram", "trigram"], start=1):
        if V**n > limit or len(val) < n:
            break
        counts = np.bincount(ngrams(train, n, V), minlength=V**n).reshape(-1, V)  # (V^(n-1), V)
        context, token = np.divmod(ngrams(val, n, V), V)  # (M - n + 1,)
        c, T = counts.sum(1)[context], (counts > 0).sum(1)[context]  # (M - n + 1,) c(h), T(h)
        backoff = p[n - 1 :]  # (M - n + 1,)
        smoothed = (counts[context, token] + T * backoff) / np.maximum(c + T, 1)
        p[n - 1 :] = np.where(c > 0, smoothed, backoff)
        nats[name] = float(-np.log(p).mean())
    return nats


def words(nats, of_model):
    """The baseline in words, with advice if a model's nats per token are worse."""
    shown = ", ".join(f"{name} {value:.4f}" for name, value in nats.items())
    method = "Witten-Bell, counted on the training text"
    is_worse = of_model > min(nats.values())
    longer = "train it longer (--max_minutes=), or less, if it has read its text too often"
    advice = f"; the model is worse: {longer}" if is_worse else ""
    return f"n-gram baseline on all of val ({method}): {shown} nats per token{advice}"


def ngrams(x, n, V):
    """(M,) tokens -> (M - n + 1,) each run of n tokens as one number in base V."""
    count = max(0, len(x) - n + 1)
    return sum(x[k : k + count] * V ** (n - 1 - k) for k in range(n))
