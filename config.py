"""The edges of every program: settings come in, errors and files go out.

A setting ("key") is defined once, in a dict named DEFAULTS at the top of the file that uses it. A program's config is
one flat dict: the defaults of its files, then a preset file, then the command line, each overriding what came before.

    python train.py configs/pydocs.py --learning_rate=1e-3
"""

import ast
import contextlib
import ctypes
import difflib
import inspect
import math
import os
import re
import reprlib
import shutil
import signal
import sys
from pathlib import Path

DEFAULTS = {
    "device": "auto",  # auto (cuda, then mps, then cpu) | cuda | cuda:1 | mps | cpu
    "dtype": "auto",  # auto (bfloat16 where the hardware multiplies it, else float32) | float32 | bfloat16
    "seed": 1337,  # every random draw is a function of this
}


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: what is wrong with which file, key or value."""


def nearest(name, known):
    """' (did you mean X?)' or the list of what exists; the tail of an error message about an unknown name."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there is: {', '.join(known) or 'nothing'}"


def choose(key, value, options):
    """Returns options[value] (a dict) or value (a list); UserError with the nearest name where there is none."""
    if value not in options:
        raise UserError(f"unknown {key} '{value}'{nearest(value, options)}")
    return options[value] if isinstance(options, dict) else value


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def at_least(low, config, *keys):
    """Raises UserError unless config[key] >= low for each key."""
    for key in keys:
        require(config[key] >= low, f"{key} must be {low} or more, not {config[key]}")


def fraction(config, *keys):
    """Raises UserError unless 0 <= config[key] <= 1 for each key."""
    for key in keys:
        require(0 <= config[key] <= 1, f"{key} must be from 0 to 1, not {config[key]}")


def shown(value):
    """The value for a message, in short: a file can hold numbers and lists that would fill the memory if written out."""
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"


def typed(key, value, default):
    """The value in the type of its default: text is parsed, a literal (from a preset) checked."""
    kind, text = type(default), isinstance(value, str)
    if kind is str:
        good = text and not re.search("[\0\ud800-\udc7f\udd00-\udfff]", value)  # no file can be called so
        require(good, f"{key} must be text, not {shown(value)}")
        return value
    if kind is bool:
        known = {"true": True, "false": False, "1": True, "0": False, True: True, False: False}
        require(text or isinstance(value, bool), f"{key} must be True or False, not {shown(value)}")
        require((value.lower() if text else value) in known, f"{key} must be True or False, not {shown(value)}")
        return known[value.lower() if text else value]
    word = "a whole number" if kind is int else "a number"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    exact = math.isfinite(number) and not isinstance(value, bool) and (kind is float or number.is_integer())
    require(exact, f"{key} must be {word}, not {shown(value)}")
    return int(value) if kind is int and not (text and re.search("[.eE]", value)) else kind(number)


def read_preset(path):
    """A preset file is one Python dict literal; it is read, never executed."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike path.is_file() this is False also where one may not look
        around = path.parent if os.path.isdir(path.parent) else Path("configs")
        raise UserError(f"no preset file {path}{nearest(path, around.glob('*.py'))}")
    try:
        preset = ast.literal_eval(path.read_text(encoding="utf8"))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        why = str(error).splitlines() or ["nested too deeply"]  # a MemoryError says nothing
        raise UserError(f"{path} must hold one Python dict literal ({why[0]})") from None
    require(isinstance(preset, dict), f"{path} must hold one Python dict literal, not a {type(preset).__name__}")
    return preset


def parse(argv, *modules):
    """One config dict from the modules' DEFAULTS < preset files < --key=value.

    config["given"] lists the keys that the user set, so that a resumed run can tell a wish from a default.
    Raises UserError for an unknown key, a wrong type, a missing preset.
    """
    defaults = {key: value for module in modules for key, value in module.DEFAULTS.items()}
    config = dict(defaults)
    given = []
    for arg in argv:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            require(equals, f"write --{key}=VALUE, not '{arg}'")
            items = [(f"--{key}", key, value)]
        else:
            require(arg.endswith(".py"), f"'{arg}' is neither a preset (configs/NAME.py) nor --key=value")
            items = [(f"{arg}: {key}", key, value) for key, value in read_preset(arg).items()]
        for where, key, value in items:
            require(key in defaults, f"unknown key {where}{nearest(key, defaults)}")
            config[key] = typed(where, value, defaults[key])
            given.append(key)
    return config | {"given": sorted(set(given))}


def help_text(*modules):
    """Each module's own DEFAULTS block, comments and all: the documentation of a key is the line that defines it."""
    parts = []
    for module in modules:
        source = inspect.getsource(module)
        block = re.search(r"^DEFAULTS = \{\n(.*?)^\}", source, re.S | re.M)
        parts.append(f"keys of {Path(inspect.getfile(module)).name}:\n{block.group(1)}")
    return "\n".join(parts)


def run(main, *modules):
    """Runs main(config) as a command: --help, one line and exit code 2 for a UserError or full memory, 130 after Ctrl-C."""
    script = Path(sys.argv[0]).name
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(f"{sys.modules['__main__'].__doc__ or ''}\nusage: {script} [PRESET.py] [--key=value ...]\n")
            print(help_text(*modules))
        else:
            main(parse(sys.argv[1:], *modules))
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        print(f"{script}: {error}".replace("\n", "\\n"), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # torch says it by either
        wanted = re.search(r"(?:allocate|size calculation) [^.,(]*\w", str(error))
        if not (wanted or isinstance(error, MemoryError)):
            raise
        advice = "a smaller batch, micro-batch, block or network needs less"
        print(f"{script}: not enough memory{f' (cannot {wanted[0]})' if wanted else ''}; {advice}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path` that takes its name once the block is done: a file is whole or not there.

    Raises UserError where the system cannot write (no space, no permission); the old file, if any, is untouched.
    A process that is killed in the block leaves the temporary file behind; see sweep.
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


def sweep(folder):
    """Removes what processes that were killed in whole_file have left in a folder; none may be writing there now."""
    for torn in Path(folder).glob(".*.[0-9]*.tmp"):
        with contextlib.suppress(OSError):
            torn.unlink()


class Stop:
    """Notes Ctrl-C or SIGTERM, so that the loop can finish its step and save; a second Ctrl-C is not held back."""

    signal = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def machine(config):
    """(device, autocast) from the keys device and dtype; `with autocast():` runs matrix products in that dtype."""
    import torch

    require(0 <= config["seed"] < 2**63, f"seed must be from 0 to 2^63 - 1, not {config['seed']}")
    name = config["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    choose("device", kind, ["cuda", "mps", "cpu"])
    require(re.fullmatch(r"\w+(:\d+)?", name), f"device must be like cpu or cuda:1, not '{name}'")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    require(there[kind], f"device '{name}' is not available on this machine; try --device=cpu")
    choose("dtype", config["dtype"], ["auto", "float32", "bfloat16"])
    fast = {
        "cuda": lambda: torch.cuda.is_bf16_supported(),
        "mps": lambda: False,
        "cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    }
    if kind == "cpu":
        keep_memory()
    bf16 = config["dtype"] == "bfloat16" or (config["dtype"] == "auto" and fast[kind]())
    return torch.device(name), lambda: torch.autocast(kind, torch.bfloat16, enabled=bf16)


def dtype_name(autocast, device):
    """The dtype of matrix products inside `with autocast():`, as text."""
    import torch

    with autocast():
        used = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    return str(used).removeprefix("torch.")


def keep_memory(keep=True):
    """Freed memory stays with the process (glibc only), so that large tensors need no fresh pages at every step.

    Without it up to a third of a training step on the CPU goes into page faults. keep=False gives large ones back at once.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1 if keep else 2**26)  # M_TRIM_THRESHOLD


def can_compile(device):
    """torch.compile needs a C++ compiler for the CPU; without one training is slower, not impossible."""
    return device.type != "cpu" or bool(shutil.which("c++") or shutil.which("g++"))
