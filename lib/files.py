"""Files that are whole or not there, JSON, and a stop that is noticed where it can be obeyed."""

import contextlib
import json
import math
import os
import signal
from pathlib import Path

from config import UserError, require


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path` that takes its name once the block is done.

    So a file is whole or not there. Raises UserError where the system cannot write (no space, no
    permission); the old file, if any, is untouched. A process that is killed in the block leaves
    the temporary file behind; see sweep.
    """
    path = Path(path)
    require(path.name, f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def to_json(value, **options):
    """JSON that any parser reads: nan and infinity, for which it has no word, are null."""
    return json.dumps(without_nan(value), allow_nan=False, **options)


def without_nan(value):
    """The value with None for every float in it that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sweep(folder):
    """Removes what processes killed in whole_file have left in a folder where none writes now."""
    for torn in Path(folder).glob(".*.[0-9]*.tmp"):
        with contextlib.suppress(OSError):
            torn.unlink()


class Stop:
    """Notes Ctrl-C or SIGTERM, so that the loop can finish its step and save.

    A second Ctrl-C is not held back.
    """

    signal = 0

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, _):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
