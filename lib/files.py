"""Atomic writes, JSON, locks that give a folder to one program at a time, and clean stops."""

import contextlib
import errno
import gzip
import importlib
import itertools
import json
import lzma
import math
import os
import platform
import re
import secrets
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

from config import UserError, first_line, require

KINDS = {"ckpt.pt": "a run", "meta.json": "prepared data", "model.safetensors": "exported weights"}


def check_kind(key, folder, file):
    """Raise UserError if a folder to write to holds another kind of thing than `file` marks."""
    for name in KINDS.keys() - {file}:
        there = Path(folder, name).is_file()
        require(not there, f"{key} {folder} holds {KINDS[name]} ({name}); choose another folder")


def check_ending(key, path, ending):
    """Raise UserError unless the file to write, if any, has a name that ends so: no other is lost.

    What is no regular file, as /dev/stdout, may have any name.
    """
    fits = not path or path.endswith(ending) or (os.path.exists(path) and not os.path.isfile(path))
    require(fits, f"{key} must be a file whose name ends with {ending}, not {path}")


# ---- 1. Whole files ------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path that is renamed to `path` after the block: it is whole or absent.

    Anything that is not a regular file, such as /dev/null, is written directly. If the system
    cannot write (no space, no permission), raises UserError and leaves the old file as it was. A
    process killed inside the block leaves the temporary file behind; see sweep.
    """
    path = Path(path)
    with writing(path):
        if path.exists() and not path.is_file():
            yield path
            return
        with new_folder(path.parent):
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
            try:
                yield temporary
                replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()


@contextlib.contextmanager
def opened(path, newline=None):
    """Open a text file, perhaps .gz or .xz; UserError if the block reads damaged data."""
    path = Path(path)
    try:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it, as with iconv") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, MemoryError):
        # a small .xz can claim to need more memory than there is
        raise UserError(f"{path} is damaged or cut off") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def writing(path):
    """Turn an OSError in the block into a UserError that names the file or folder `path`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot write {path}: a file stands where a folder belongs") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def set_aside(folder, files):
    """Move the files that exist to a new folder old_1, old_2, ...; return the folder."""
    names = (Path(folder, f"old_{n}") for n in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    aside.mkdir()
    for file in files:
        if file.is_file():
            file.rename(aside / file.name)
    return aside


@contextlib.contextmanager
def new_folder(folder):
    """Make a folder and its parents; those still empty after the block are removed again."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def replace(source, target):
    """os.replace with retries, because Windows refuses it while another program reads `target`."""
    for wait in (0.01, 0.1, 0.4, 1.5):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(wait)
    os.replace(source, target)


def to_json(value, **options):
    """Standard JSON: nan and infinity, which it cannot express, become null."""
    return json.dumps(without_nan(value), allow_nan=False, **options)


def without_nan(value):
    """The value with every float in it that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_utf8(file):
    """Whether a file's name is UTF-8: torch cannot map other files into memory."""
    return not re.search("[\udc80-\udcff]", str(file))


def optional(name, needed_by):
    """The module `name` of an optional package; UserError if it is missing or does not load.

    needed_by: the beginning of the message. A folder that happens to have the package's name, such
    as the one that wandb creates where it runs, does not count.
    """
    package = name.rpartition(".")[2]
    try:
        module = importlib.import_module(name)
        if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
            raise ImportError
        return module
    except ImportError:
        raise UserError(f"{needed_by} needs one more package: pip install {package}") from None
    except Exception as error:  # a package built for other versions can raise anything
        message = f"needs {package}, which does not load here ({first_line(error)})"
        raise UserError(f"{needed_by} {message}") from None


def sweep(folder, *names):
    """Remove the temporary files of `names` that killed processes left; no other may be writing."""
    for name in names:
        for torn in Path(folder).glob(f".{name}.[0-9]*.tmp"):
            with contextlib.suppress(OSError):
                torn.unlink()


# ---- 2. One program per folder -------------------------------------------------------------------


@contextlib.contextmanager
def only_one(folder, key, file):
    """Keep other programs out of `folder` during the block; yields whether it is locked.

    Raises UserError if it holds another kind of thing than `file` marks (check_kind).
    The file folder/.lock names its owner. The operating system locks it and releases the lock when
    the process ends, however it ends. Raises UserError, which suggests another --key=, while
    another program holds the folder. Without locks (some network drives) it warns and goes on.
    """
    check_kind(key, folder, file)
    path = Path(folder, ".lock")
    with contextlib.ExitStack() as held:
        with writing(path):
            held.enter_context(new_folder(path.parent))
            file, locked = open_locked(path)
        held.enter_context(file)
        if locked is not False:
            held.callback(remove, path, file)
        file.seek(0)
        owner = file.readline(200).strip()
        message = f"{folder} is in use by {owner or 'another process'}"
        require(locked is not False, f"{message}; choose another with --{key}=")
        if locked is None:
            last = f"; it was last used by {owner}" if owner else ""
            message = f"this system has no locks: see to it that nothing else uses {folder}"
            print(message + last, file=sys.stderr)
        name_owner(file)
        yield bool(locked)


def open_locked(path):
    """(the open file, what `lock` returned for it)."""
    for _ in range(9):
        file = open(path, "a+", encoding="utf8", errors="replace")  # noqa: SIM115 (only_one closes)
        locked = lock(file)
        with contextlib.suppress(OSError):
            if locked is False or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its owner removed it in the meantime
    return file, locked


def name_owner(file):
    """Write the owner, this process, into the lock file."""
    with contextlib.suppress(OSError):  # a full disk does not matter here
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {platform.node()}, since {now}\n")
        file.flush()


def remove(path, file):
    """Remove an open file; Windows allows that only once it is closed."""
    try:
        path.unlink()
    except PermissionError:
        file.close()
        with contextlib.suppress(OSError):
            path.unlink()
    except OSError:
        return


def lock(file, wait=False):
    """Lock a file until it is closed: True; False if another process has it; None without locks.

    wait: wait until it is free.
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
    """lock on Windows, of one byte so far beyond the text that others can still read the text."""
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


# ---- 3. Stopping ---------------------------------------------------------------------------------


class Stop:
    """Record Ctrl-C, SIGTERM or the end of the terminal, so that the loop can finish and save.

    A second Ctrl-C interrupts at once. Threads get no signals, so nothing is recorded in them. A
    running compiler gets the signal too, and the error that follows is reported as the interrupt.
    """

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # no system has them all
    signal = 0

    def __enter__(self):
        numbers = [getattr(signal, name) for name in self.names if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        self.before = {number: signal.getsignal(number) for number in numbers}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN or number == signal.SIGINT:  # SIGHUP stays ignored (nohup)
                signal.signal(number, self.note)
        return self

    def note(self, number, _):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, error_type, error, _):
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self.signal and isinstance(error, Exception) and not isinstance(error, UserError):
            raise KeyboardInterrupt from error
