"""Seconds at equal quality (SMDM), with intervals: the arithmetic of quality_speed.py.

A point is what a writer did at one temperature: {"entropy": [of each sample], "nats": [...], ...}.
Whatever follows from points is an array (DRAWS + 1,): first as measured, then as it would be with
other samples, and other seeds, drawn with replacement from those that there are (the bootstrap).
"""

import numpy as np

DRAWS = 500


def resampled(values):
    """Means (DRAWS + 1,) of the values (N,); lists of one length are resampled alike."""
    values = np.array(values)
    which = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    return np.concatenate([[values.mean()], values[which].mean(1)])


def at_entropy(path, text, measure):
    """The measure (DRAWS + 1,) where a path has the entropy of the text; nan where it has not.

    path: points, one a temperature, with straight lines between them; text: a point.
    """
    H, y = (np.array([resampled(point[key]) for point in path]) for key in ("entropy", measure))
    order = H.argsort(0)  # (T, DRAWS + 1)
    H, y = np.take_along_axis(H, order, 0), np.take_along_axis(y, order, 0)
    columns = zip(resampled(text["entropy"]), H.T, y.T, strict=True)
    return np.array([np.interp(*column, left=np.nan, right=np.nan) for column in columns])


def over_seeds(values):
    """The mean over seeds: (seeds, DRAWS + 1) -> (DRAWS + 1,)."""
    values = np.array(values)
    which = np.random.default_rng(1).integers(len(values), size=values.shape)
    which[:, 0] = range(len(values))
    return np.take_along_axis(values, which, 0).mean(0)


def seconds_at(quality, path):
    """Seconds at which a path, [(seconds, quality)], is as good as `quality`; inf: it never is.

    Low is good. Along its lower envelope, straight in the logarithm of seconds.
    """
    best, before = np.inf, 0.0
    for seconds, value in sorted(path):
        if value <= quality:
            if best == np.inf:
                return seconds
            share = (best - quality) / (best - value)
            return float(before * (seconds / before) ** share)
        if value < best:
            best, before = value, seconds
    return np.inf


def ratio(arm, path):
    """(how many times as fast a path is as `arm` where as good, low, high, what it lacks); or None.

    arm: (seconds, quality (DRAWS + 1,)); path: [the same]. 95% interval; 0 where it is never as
    good, and by how much its best point is worse. None: the quality of `arm` is not known.
    """
    seconds, wanted = arm
    if np.isnan(wanted[0]):
        return None
    values = np.nan_to_num([quality for _, quality in path], nan=np.inf)  # (points, DRAWS + 1)
    times = [time for time, _ in path]
    pairs = [pair for pair in zip(wanted, values.T, strict=True) if not np.isnan(pair[0])]
    ratios = [seconds / seconds_at(q, zip(times, column, strict=True)) for q, column in pairs]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return ratios[0], float(low), float(high), float(values[:, 0].min() - wanted[0])


def interval(values, form=".3f"):
    """What was measured and its 95% interval as text; empty where it is not known."""
    if np.isnan(values[0]):
        return ""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return f"{values[0]:{form}} ({low:{form}} to {high:{form}})"
