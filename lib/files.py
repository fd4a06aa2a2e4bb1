"""Files that are whole or not there, JSON, a folder that one program has, a stop obeyed in time."""

import contextlib
import errno
import importlib
import json
import math
import os
import platform
import re
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

from config import UserError, first_line, require

# ---- 1. Whole files ------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path` that takes its name once the block is done.

    So a file is whole or not there. What is no file, as /dev/stdout, is written to as it is. Raises
    UserError where the system cannot write (no space, no permission); the old file, if any, is
    untouched. A process that is killed in the block leaves the temporary file behind; see sweep.
    """
    path, mark = Path(path), f"{os.getpid()}.{secrets.token_hex(3)}"
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        with new_folder(path.parent):
            temporary = path.with_name(f".{path.name}.{mark}.tmp")
            try:
                yield temporary
                replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def new_folder(folder):
    """Make a folder, with its parents; those that are still empty after the block go again."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def append_line(path, line):
    """Append a line to a text file; UserError where the system cannot write."""
    try:
        with open(path, "a", encoding="utf8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def replace(source, target):
    """os.replace; Windows refuses it while another program reads `target`, so it is tried again."""
    for wait in (0.01, 0.1, 0.4, 1.5):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(wait)
    os.replace(source, target)


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


def is_utf8(file):
    """Whether the name of a file is: torch maps none into memory whose name is other bytes."""
    return not re.search("[\udc80-\udcff]", str(file))


def optional(name, wanted):
    """The module `name` of an optional package; UserError where it is not there or does not load.

    wanted: how the message begins, what needs it. A folder that only has the package's name, as
    the one that wandb leaves where it ran, is none.
    """
    package = name.rpartition(".")[2]
    try:
        module = importlib.import_module(name)
        if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
            raise ImportError
        return module
    except ImportError:
        raise UserError(f"{wanted} needs one more package: pip install {package}") from None
    except Exception as error:  # one that was built for other versions can raise anything
        broken = f"needs {package}, which does not load here ({first_line(error)})"
        raise UserError(f"{wanted} {broken}") from None


def sweep(folder, *names):
    """Remove what processes killed in whole_file have left of these files, which none writes."""
    for torn in (torn for name in names for torn in Path(folder).glob(f".{name}.[0-9]*.tmp")):
        with contextlib.suppress(OSError):
            torn.unlink()


# ---- 2. One program a folder ---------------------------------------------------------------------


@contextlib.contextmanager
def only_one(folder, key):
    """Inside the block `folder` is this program's alone; yields whether the system sees to that.

    Who has it stands in folder/.lock. The lock on that file is the system's and ends with its
    process, however that ends. Raises UserError where another has the folder; key chooses another.
    Where there are no locks (on some network drives) a line says so, and the block goes on.
    """
    path = Path(folder, ".lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(new_folder(path.parent))
            file, locked = open_locked(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        held.enter_context(file)
        if locked is not False:
            held.callback(remove, path, file)
        file.seek(0)
        owner = file.readline(200).strip()
        others = f"{folder} is in use by {owner or 'another process'}"
        require(locked is not False, f"{others}; choose another with --{key}=")
        if locked is None:
            last = f"; it was last used by {owner}" * bool(owner)
            alone = f"this system has no locks: see to it that nothing else uses {folder}{last}"
            print(alone, file=sys.stderr)
        name_owner(file)
        yield bool(locked)


def open_locked(path):
    """(the file, open, whether it is locked now): lock tells which."""
    for _ in range(9):
        file = open(path, "a+", encoding="utf8", errors="replace")  # noqa: SIM115 (only_one closes)
        locked = lock(file)
        with contextlib.suppress(OSError):
            if locked is False or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # whoever had it took it away in between
    return file, locked


def name_owner(file):
    """Make the lock file say whose it is."""
    with contextlib.suppress(OSError):  # a full disk does not matter here
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {platform.node()}, since {since}\n")
        file.flush()


def remove(path, file):
    """Remove an open file; where it has to be closed first, as on Windows, it is."""
    try:
        path.unlink()
    except PermissionError:
        file.close()
        with contextlib.suppress(OSError):
            path.unlink()
    except OSError:
        return


def lock(file, wait=False):
    """Lock a file until it is closed -> True; False where another has it, None where none can.

    wait: until no other has it.
    """
    try:
        import fcntl
    except ImportError:
        return lock_on_windows(file, wait)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None


def lock_on_windows(file, wait):
    """The same by a lock on one byte, as far behind what others read of the file as it goes."""
    try:
        import msvcrt
    except ImportError:
        return None
    here = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    try:
        while True:
            os.lseek(file.fileno(), 2**31 - 2, os.SEEK_SET)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                    return None
            if not wait:
                return False
            time.sleep(0.1)
    finally:
        os.lseek(file.fileno(), here, os.SEEK_SET)


# ---- 3. A stop -----------------------------------------------------------------------------------


class Stop:
    """Note Ctrl-C, SIGTERM or the end of the terminal, so that the loop can finish and save.

    A second Ctrl-C is not held back. In a thread, which gets no signals, there is nothing to note.
    """

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # no system has all
    signal = 0

    def __enter__(self):
        numbers = [getattr(signal, name) for name in self.names if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        self.before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN or number == signal.SIGINT:  # nohup goes on without one
                signal.signal(number, self.note)
        return self

    def note(self, number, _):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)
