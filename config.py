"""The config dictionary, and the errors that a user can cause.

    python train.py configs/pydocs.py --learning_rate=1e-3 --compile

- A key is defined once, with its default and a comment, in a dict DEFAULTS at the top of the file
  that uses it.
- A program's config is one flat dict: the DEFAULTS of its files < a preset file < the command line.
- The values that a key can have stand in its comment, `a | b | c` or `one of TABLE`, and are
  checked against it.
- A mistake of the user is a UserError: one line that says what would be right, and exit code 2.
"""

import ast
import contextlib
import difflib
import errno
import functools
import inspect
import math
import os
import re
import reprlib
import signal
import sys
import threading
import traceback
from pathlib import Path

DEFAULTS = {
    "device": "auto",  # auto (cuda, then mps, then cpu), cpu, mps, cuda, or one card: cuda:1
    "dtype": "auto",  # auto (bfloat16 where the hardware multiplies it) | float32 | bfloat16
    "seed": 1337,  # every random draw is a function of this
}

# The keys that name a file or a folder, or several with commas between them: ~ is the home there.
PATHS = {"ckpt", "data", "folder", "from", "gpt2", "include_path", "init_from", "input", "judge"}
PATHS |= {"out_dir", "page", "preset", "reference", "results", "rows", "runs", "samples", "svg"}
PATHS |= {"out", "to", "tokenizer", "val"}

RENAMED = {  # keys of earlier versions: a command may name them, a checkpoint hold them
    "causal": "attention",
    "cfg": "cfg_scale",
    "min_tokens": "min_new_tokens",
    "mlp_hidden": "mlp_width",
    "new_tokens": "max_new_tokens",
    "row_end": "eos_id",
    "row_width": "example_width",
    "unused_rows": "head_padding",
}


ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """A user error: its message is one line, what is wrong with which key and what is right."""


def require(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def nearest(name, known):
    """The tail of a message about an unknown name: what was meant, or the list of what exists."""
    known = sorted(str(each) for each in known if str(each))
    if RENAMED.get(name) in known:
        return f"; did you mean '{RENAMED[name]}'?"
    close = [] if name in RENAMED else difflib.get_close_matches(str(name), known, n=1)
    listed = ", ".join(known) or "nothing"
    return f"; did you mean '{close[0]}'?" if close else f"; there is: {listed}"


def choose(key, value, options):
    """options[value] (of a dict) or value (in a list); UserError names the nearest one."""
    if not (isinstance(value, str) and value in options):
        raise UserError(f"unknown {key} '{value}'{nearest(str(value), options)}")
    return options[value] if isinstance(options, dict) else value


class Table(dict):
    """{name: entry}, all there is of one kind; to add one is to add one entry.

    An unknown name is a UserError wherever it is looked up. So is an entry that lacks something, at
    the first look: lacking(entry) -> what, in words, or "".
    """

    def __init__(self, kind, lacking=None, /, **entries):
        super().__init__(entries)
        self.kind, self.lacking, self.whole = kind, lacking, {}

    def __getitem__(self, name):
        entry = super().__getitem__(choose(self.kind, name, list(self)))
        if self.lacking and self.whole.get(name, self) is not entry:
            try:
                problem = self.lacking(entry)
            except Exception as error:  # an entry may hold anything
                problem = f"fails with {type(error).__name__}: {error}"
            require(not problem, f"the {self.kind} '{name}' {problem}")
            self.whole[name] = entry
        return entry


def at_least(low, config, *keys):
    """Raise UserError unless config[key] >= low for each key."""
    for key in keys:
        require(config[key] >= low, f"{key} must be {low} or more, not {config[key]}")


def fraction(config, *keys):
    """Raise UserError unless 0 <= config[key] <= 1 for each key."""
    for key in keys:
        require(0 <= config[key] <= 1, f"{key} must be from 0 to 1, not {config[key]}")


def first_line(error):
    """What an error says, in short, or else its kind."""
    said = str(error).strip().splitlines()
    return said[0][:200] if said else type(error).__name__


# ---- One key -------------------------------------------------------------------------------------


def shown(value):
    """The value for a message, in short: a file can hold what would fill the memory."""
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"


def typed(key, value, default):
    """The value in the type of its default: text is parsed, a literal checked, or UserError."""
    if isinstance(default, str):
        plain = isinstance(value, str) and not re.search("[\0\ud800-\udc7f\udd00-\udfff]", value)
        require(plain, f"{key} must be text, not {shown(value)}")  # no file can be called otherwise
        return value
    if isinstance(default, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        word = str(value).lower() if isinstance(value, (str, bool)) else ""
        require(word in words, f"{key} must be True or False, not {shown(value)}")
        return words[word]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(default, float):
        require(math.isfinite(number), f"{key} must be a number, not {shown(value)}")
        return number
    require(
        number.is_integer(), f"{key} must be a whole number, not {shown(value)}"
    )  # False also for nan and infinity
    return int(number if isinstance(value, str) and re.search("[.eE]", value) else value)


def at_home(key, value):
    """The path, or paths, of a key with ~ as the home folder; UserError where there is none."""

    def whole(found):
        path = os.path.expanduser(found[0])
        is_name = path == found[0] and not os.path.lexists(path)
        message = f"{key}: no home folder {found[0]}; a folder that is called so is ./{found[0]}"
        require(not is_name, message)
        return path

    return re.sub(r"(?<![^,])~[^,]*", whole, value)


@functools.cache
def key_block(module):
    """The text of a module's DEFAULTS: a key is documented by the line that defines it."""
    return re.search(r"^DEFAULTS = \{\n(.*?)^\}", inspect.getsource(module), re.S | re.M)[1]


def allowed(module):
    """The values that keys can have, {key: list}, as the comments of DEFAULTS list them.

    `# a | b (why) | c; more` or `# one of TABLE`, a dict or list of the module. They are read from
    there because a reader and --help look there: so what is said and what is checked are one.
    """
    values = {}
    for key, comment in re.findall(r'^ *"(\w+)": ".*?",  # (.*)', key_block(module), re.M):
        listed = re.sub(r" \(.*?\)", "", comment).split(";")[0]  # without remarks
        if table := re.fullmatch(r"one of (\w+)", listed):
            values[key] = list(getattr(module, table[1]))
        elif re.fullmatch(r"\w+( \| \w+)+", listed):
            values[key] = listed.split(" | ")
    return values


# ---- One config ----------------------------------------------------------------------------------


def defaults_of(modules):
    """The DEFAULTS of several modules in one dict; a key has one home."""
    keys = [key for module in modules for key in module.DEFAULTS]
    assert len(keys) == len(set(keys)), (
        f"defined twice: {sorted({key for key in keys if keys.count(key) > 1})}"
    )
    return {key: value for module in modules for key, value in module.DEFAULTS.items()}


def merge(items, *modules):
    """The modules' DEFAULTS overridden by items (what to call it, key, value), in their order.

    Raises UserError for an unknown key, and for a value that it cannot have.
    """
    config = defaults_of(modules)
    listed = {key: values for module in modules for key, values in allowed(module).items()}
    for where, key, value in items:
        require(key in config, f"unknown key {where}{nearest(key, config)}")
        config[key] = typed(where, value, config[key])
        config[key] = at_home(where, config[key]) if key in PATHS else config[key]
        if key in listed:
            file, _, _ = where.rpartition(": ")
            unknown = f"{file}: " * bool(file) + f"unknown {key} '{config[key]}'"
            require(config[key] in listed[key], unknown + nearest(config[key], listed[key]))
    return config


def options(given, *modules):
    """A call's keyword options over the modules' DEFAULTS: `sample(model, x, steps=8)`."""
    return merge([(key, key, value) for key, value in given.items()], *modules)


def completed(config, *modules):
    """A config that was made in Python over the DEFAULTS, checked as a command's; others stay."""
    known = defaults_of(modules)
    return config | options({key: config[key] for key in config if key in known}, *modules)


def read_preset(path):
    """A preset file is one Python dict literal; it is read, never executed.

    One that is not in the working directory is looked for in this repository.
    """
    path = Path(at_home("preset", str(path)))
    if not os.path.isfile(path) and os.path.isfile(ROOT / path):  # called from another folder
        path = ROOT / path
    if not os.path.isfile(path):  # unlike path.is_file() this is False also where one may not look
        folder = path.parent if os.path.isdir(path.parent) else ROOT / "configs"
        raise UserError(f"no preset file {path}{nearest(path, folder.glob('[!.]*.py'))}")
    try:
        preset = ast.literal_eval(path.read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        why = str(error).splitlines() or ["nested too deeply"]  # a MemoryError says nothing
        raise UserError(f"{path} must hold one Python dict literal ({why[0]})") from None
    require(
        isinstance(preset, dict),
        f"{path} must hold one Python dict literal, not a {type(preset).__name__}",
    )
    return preset


def parse(argv, *modules):
    """One config dict: the modules' DEFAULTS < preset files < --key=value; `--key` alone is True.

    config["user_keys"] is {key: where}, the keys that the user set and whether by `--key` or in
    `PRESET: key`, so that a program can tell a wish from a default. Raises UserError for an unknown
    key, a wrong type or value, a missing preset.
    """
    defaults, items = defaults_of(modules), []
    for arg in argv:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            require(key in defaults, f"unknown key --{key}{nearest(key, defaults)}")
            alone = not equals and isinstance(defaults[key], bool)
            require(equals or alone, f"write --{key}=VALUE, not '{arg}'")
            items.append((f"--{key}", key, True if alone else value))
        else:
            require(
                arg.endswith(".py"),
                f"'{arg}' is neither a preset (configs/NAME.py) nor --key=value",
            )
            items += [(f"{arg}: {key}", key, value) for key, value in read_preset(arg).items()]
    return merge(items, *modules) | {"user_keys": {key: where for where, key, _ in items}}


def help_text(*modules):
    """Each module's own DEFAULTS block; `one of TABLE` is followed by the table's names."""
    blocks = []
    for module in modules:
        block = key_block(module)
        for table in set(re.findall(r"# one of (\w+)", block)):
            names = " | ".join(getattr(module, table))
            block = re.sub(rf"# one of {table}\b", f"# one of {table}: {names}", block)
        blocks.append(f"keys of {Path(inspect.getfile(module)).name}:\n{block}")
    return "\n".join(blocks)


# ---- One program ---------------------------------------------------------------------------------


def interrupted(number, frame):
    """Ctrl-C: ends one of our programs in one line while it imports, and is as ever elsewhere."""
    script = Path(sys.argv[0])  # -m while a package is being found
    ours = script.name == "-m" or (script.suffix == ".py" and ROOT in script.resolve().parents[:3])
    frames = (outer.f_code.co_filename for outer, _ in traceback.walk_stack(frame))
    if not (ours and any("importlib" in name for name in frames)):
        signal.default_int_handler(number, frame)
    print(f"\n{script.name}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def ready_streams():
    """Give closed streams a sink, replace characters that a stream lacks, flush every line."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf8"))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):  # a notebook's has none
            plain = stream.errors in ("strict", "surrogateescape")
            stream.reconfigure(errors="replace" if plain else stream.errors, line_buffering=True)


def system_error(error):
    """The message of an OSError, for one line; "" where only the reader of the output is gone."""
    windows = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    unread, what = isinstance(error, BrokenPipeError) or windows, ""
    try:
        sys.stdout.flush()
    except OSError:  # again at Python's own end, unless all else goes nowhere
        what = "cannot write the output: "
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return "" if unread else what + first_line(error)


def run(main, *modules):
    """Run main(config) as a command, with --help.

    A UserError, full memory or a system error is one line and exit code 2; Ctrl-C is 130; a reader
    of the output that is gone (head) is 141, as by SIGPIPE.
    """
    script = Path(sys.argv[0]).name
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ready_streams()
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(sys.modules["__main__"].__doc__ or "")
            print(f"usage: {script} [PRESET.py] [--key=value ...]\n")
            print(help_text(*modules))
        else:
            main(parse(sys.argv[1:], *modules))
        sys.stdout.flush()
    except UserError as error:
        print(f"{script}: {error}".replace("\n", "\\n"), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        message = system_error(error)
        print(f"{script}: {message}\n" * bool(message), end="", file=sys.stderr)
        sys.exit(2 if message else 141)
    except (MemoryError, RuntimeError) as error:  # torch says it by either
        wanted = re.search(
            r"allocate [\d.]+ ?\w+|(?:allocate|size calculation) [^.,(]*\w", str(error)
        )
        full = wanted or re.search("out of memory|ALLOC_FAILED", str(error))  # CUDA's, cuBLAS's
        if not (full or isinstance(error, MemoryError)):
            raise
        advice = "a smaller batch, micro-batch, block or network needs less"
        print(
            f"{script}: not enough memory{f' (cannot {wanted[0]})' if wanted else ''}; {advice}",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt as error:  # it may say what was saved
        print(f"\n{script}: interrupted{f'; {error}' * bool(str(error))}", file=sys.stderr)
        sys.exit(130)


if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, interrupted)
