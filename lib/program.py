"""Run main(config) as a command: --help, Ctrl-C, streams, one-line errors, exit codes.

Every program imports this first, so that Ctrl-C prints one line even while torch is loading.
"""

import contextlib
import errno
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path

from config import ROOT, UserError, first_line, help_text, parse


def interrupted(number, frame):
    """Handle Ctrl-C before a program runs: while one of ours is importing, exit with one line."""
    script = Path(sys.argv[0])  # "-m" while Python looks for the package
    ours = script.name == "-m" or (script.suffix == ".py" and ROOT in script.resolve().parents[:3])
    frames = (outer.f_code.co_filename for outer, _ in traceback.walk_stack(frame))
    if not (ours and any("importlib" in name for name in frames)):
        signal.default_int_handler(number, frame)
    print(f"\n{script.name}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def ready_streams():
    """Open closed streams, replace characters that a stream cannot encode, flush every line."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf8"))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):  # a notebook's streams lack it
            raises = stream.errors in ("strict", "surrogateescape")
            stream.reconfigure(errors="replace" if raises else stream.errors, line_buffering=True)


def system_error(error):
    """The one-line message of an OSError; "" if it means that nobody reads the output any more."""
    windows = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    unread, what = isinstance(error, BrokenPipeError) or windows, ""
    try:
        sys.stdout.flush()
    except OSError:  # Python would raise it again at exit, unless the output goes to devnull
        what = "cannot write the output: "
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return "" if unread else what + first_line(error)


def memory_error(error):
    """The one-line message of an out-of-memory error; "" for any other error."""
    pattern = r"allocate [\d.]+ ?\w+|(?:allocate|size calculation) [^.,(]*\w"
    request = re.search(pattern, str(error))
    is_full = request or re.search("out of memory|ALLOC_FAILED", str(error))  # by CUDA, by cuBLAS
    if not (is_full or isinstance(error, MemoryError)):
        return ""
    cannot = f" (cannot {request[0]})" if request else ""
    return f"not enough memory{cannot}; a smaller batch, micro-batch, block or network needs less"


def run(main, *modules):
    """Run main(config) as a command, with --help.

    A UserError, an out-of-memory error or a system error becomes one line and exit code 2. Ctrl-C
    gives exit code 130; 141, as after SIGPIPE, means that nobody reads the output any more (head).
    """
    script, code = Path(sys.argv[0]).name, 2
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ready_streams()
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(sys.modules["__main__"].__doc__ or "")
            print(f"usage: {script} [PRESET.py ...] [--key=value ...]\n\n{help_text(*modules)}")
        else:
            main(parse(sys.argv[1:], *modules))
        return sys.stdout.flush()
    except UserError as error:
        message = str(error).replace("\n", "\\n")
    except OSError as error:
        message = system_error(error)
        code = 2 if message else 141
    except (MemoryError, RuntimeError) as error:  # torch raises either if memory is full
        message = memory_error(error)
        if not message:
            raise
    except KeyboardInterrupt as error:  # its text may say what was saved
        print(file=sys.stderr)
        message, code = f"interrupted; {error}" if str(error) else "interrupted", 130
    if message:
        print(f"{script}: {message}", file=sys.stderr)
    sys.exit(code)


is_main = threading.current_thread() is threading.main_thread()
if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)
if Path(*sys.argv[:1]).resolve().parent == ROOT and not importlib.util.find_spec("torch"):
    print("no torch in this Python; first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)
