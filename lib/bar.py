"""The progress bar, shown only in a terminal, never written to a file."""

import sys

from tqdm import tqdm


def bar_is_off(shown):
    """tqdm's `disable`: True for no bar, None for a bar only if stderr is a terminal."""
    return not shown or not sys.stderr or None


def progress_bar(shown, total, unit):
    """A bar that is erased when it is closed."""
    return tqdm(total=total, unit=unit, disable=bar_is_off(shown), leave=False)
