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
import difflib
import functools
import inspect
import math
import os
import re
import reprlib
import sys
from pathlib import Path

DEFAULTS = {
    "device": "auto",  # auto (cuda, then mps, then cpu), cpu, mps, cuda, or one card: cuda:1
    "dtype": "auto",  # auto (bfloat16 where the hardware multiplies it) | float32 | bfloat16
    "seed": 1337,  # every random draw is a function of this
}

RENAMED = {  # keys of earlier versions, for who types one and for checkpoints that hold them
    "causal": "attention",
    "cfg": "cfg_scale",
    "min_tokens": "min_new_tokens",
    "mlp_hidden": "mlp_width",
    "new_tokens": "max_new_tokens",
    "row_end": "eos_id",
    "row_width": "example_width",
    "unused_rows": "head_padding",
}


class UserError(Exception):
    """A user error: its message is one line, what is wrong with which key and what is right."""


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
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
    """Raises UserError unless config[key] >= low for each key."""
    for key in keys:
        require(config[key] >= low, f"{key} must be {low} or more, not {config[key]}")


def fraction(config, *keys):
    """Raises UserError unless 0 <= config[key] <= 1 for each key."""
    for key in keys:
        require(0 <= config[key] <= 1, f"{key} must be from 0 to 1, not {config[key]}")


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
        word = (
            value.lower() if isinstance(value, str) else value if isinstance(value, bool) else None
        )
        require(
            word in (True, False, "true", "false", "1", "0"),
            f"{key} must be True or False, not {shown(value)}",
        )
        return word in (True, "true", "1")
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


@functools.cache
def key_lines(module):
    """The lines of a module's DEFAULTS block: a key is documented by the line that defines it."""
    return re.search(r"^DEFAULTS = \{\n(.*?)^\}", inspect.getsource(module), re.S | re.M)[
        1
    ].splitlines()


def allowed(module):
    """The values that keys can have, {key: list}, as the comments of DEFAULTS list them.

    `# a | b (why) | c; more` or `# one of TABLE`, a dict or list of the module.
    """
    values = {}
    for line in key_lines(module):
        if found := re.match(r'\s*"(\w+)": ".*?",\s*# (.*)', line):
            listed = re.sub(r" *\(.*?\)", "", found[2]).split(";")[0]  # without what is in brackets
            if table := re.match(r"one of ([A-Z_]+)", listed):
                values[found[1]] = list(getattr(module, table[1]))
            elif re.fullmatch(r"\w+( \| \w+)+", listed):
                values[found[1]] = listed.split(" | ")
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
    """A preset file is one Python dict literal; it is read, never executed."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike path.is_file() this is False also where one may not look
        folder = path.parent if os.path.isdir(path.parent) else Path("configs")
        raise UserError(f"no preset file {path}{nearest(path, folder.glob('*.py'))}")
    try:
        preset = ast.literal_eval(path.read_text(encoding="utf8"))
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

    config["user_keys"] lists the keys that the user set, so that a resumed run can tell a wish from
    a default. Raises UserError for an unknown key, a wrong type or value, a missing preset.
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
    return merge(items, *modules) | {"user_keys": sorted({key for _, key, _ in items})}


def help_text(*modules):
    """Each module's own DEFAULTS block; `one of TABLE` is followed by the table's names."""
    blocks = []
    for module in modules:
        lines = [f"keys of {Path(inspect.getfile(module)).name}:", *key_lines(module)]
        for key, values in allowed(module).items():
            names = lambda found, values=values: f"{found[0]}: {' | '.join(values)}"  # noqa: E731
            lines = [
                re.sub(r"one of [A-Z_]+", names, line) if f'"{key}"' in line else line
                for line in lines
            ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def run(main, *modules):
    """Runs main(config) as a command, with --help.

    A UserError or full memory is one line and exit code 2; Ctrl-C is exit code 130.
    """
    script = Path(sys.argv[0]).name
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(sys.modules["__main__"].__doc__ or "")
            print(f"usage: {script} [PRESET.py] [--key=value ...]\n")
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
        wanted = re.search(
            r"allocate [\d.]+ ?\w+|(?:allocate|size calculation) [^.,(]*\w", str(error)
        )
        if not (wanted or isinstance(error, MemoryError)):
            raise
        advice = "a smaller batch, micro-batch, block or network needs less"
        print(
            f"{script}: not enough memory{f' (cannot {wanted[0]})' if wanted else ''}; {advice}",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(130)
