"""The progress bar, for a terminal alone: none is drawn into a file."""

import sys

from tqdm import tqdm


def bar_is_off(shown):
    """tqdm's `disable` of a bar that is to be shown where there is a terminal."""
    return not shown or not sys.stderr or None


def progress_bar(shown, total, unit):
    """A bar that leaves nothing behind."""
    return tqdm(total=total, unit=unit, disable=bar_is_off(shown), leave=False)
