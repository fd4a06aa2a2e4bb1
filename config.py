"""The config dictionary, and errors that a user can cause.

    python train.py configs/pydocs.py --learning_rate=1e-3 --compile

- A key is defined once, with its default and a comment, in a dict DEFAULTS at the top of the file
  that uses it.
- A program's config is one flat dict: the DEFAULTS of its files < a preset file < the command line.
- The values that a key accepts are listed in its comment and nowhere else, and the check parses it:
  `a | b | c` or `one of TABLE`; for a number `1 or more` or `in [0, 1)`, otherwise 0 or more.
- A user's mistake raises UserError: one line that says what would be right (lib/program.py).
"""

import ast
import difflib
import functools
import inspect
import math
import os
import re
import reprlib
import traceback
from pathlib import Path

DEFAULTS = {
    "device": "auto",  # cpu, mps, cuda or one card (cuda:1); auto: the first of cuda, mps, cpu
    "dtype": "auto",  # auto (bfloat16 if the hardware multiplies it fast) | float32 | bfloat16
    "seed": 1337,  # in [0, 9e18]; every random draw is a function of the seed
}

# Keys whose value is a path, or several separated by commas; ~ is expanded to the home folder.
PATHS = {"ckpt", "data", "folder", "from", "gpt2", "include_path", "init_from", "input", "judge",
         "out", "out_dir", "page", "preset", "reference", "results", "rows", "runs", "samples",
         "svg", "to", "tokenizer", "val"}  # fmt: skip
# {key: suffix of the files that it takes, or of a file in the folders that it takes}
ENDS = {"ckpt": (".pt", ".pth", ".safetensors"), "data": "meta.json", "out_dir": "ckpt.pt"}

RENAMED = {  # names from earlier versions (in old commands and checkpoints) or from other code
    "causal": "attention",
    "cfg": "cfg_scale",
    "lr": "learning_rate",
    "min_tokens": "min_new_tokens",
    "mlp_hidden": "mlp_width",
    "new_tokens": "max_new_tokens",
    "row_end": "eos_id",
    "row_width": "example_width",
    "temp": "temperature",
    "unused_rows": "head_padding",
}

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """A user's mistake. The one-line message says what is wrong and what would be right."""


def require(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def nearest(name, names):
    """The end of a message about an unknown name: the closest one of `names`, or all of them."""
    names = sorted(str(each) for each in names if str(each))
    old = name in RENAMED
    close = [RENAMED[name]] if old else difflib.get_close_matches(str(name), names, n=1)
    if close and close[0] in names:
        return f"; did you mean '{close[0]}'?"
    return f"; there is: {', '.join(names) or 'nothing'}"


def choose(key, value, options):
    """options[value] for a dict, the value itself for a list; UserError if it is not in there."""
    if not (isinstance(value, str) and value in options):
        raise UserError(f"unknown {key} '{value}'{nearest(str(value), options)}")
    return options[value] if isinstance(options, dict) else value


class Table(dict):
    """A dict {name: entry} of all things of one kind. To add a new one, add an entry.

    Looking up an unknown name raises UserError. So does looking up a faulty entry: the first lookup
    calls lacking(entry), which returns what is wrong with it, in words, or "".
    """

    def __init__(self, kind, lacking=None, /, **entries):
        super().__init__(entries)
        self.kind, self.lacking, self.checked = kind, lacking, {}

    def __getitem__(self, name):
        entry = super().__getitem__(choose(self.kind, name, list(self)))
        is_checked = name in self.checked and self.checked[name] is entry
        if self.lacking and not is_checked:
            try:
                problem = self.lacking(entry)
            except Exception as error:  # an entry may run any code
                frames = traceback.extract_tb(error.__traceback__)
                frame = [each for each in frames if "torch" not in Path(each.filename).parts][-1]
                where = f"{Path(frame.filename).name}, line {frame.lineno}"
                problem = f"fails with {type(error).__name__} ({where}): {error}"
            require(not problem, f"the {self.kind} '{name}' {problem}")
            self.checked[name] = entry
        return entry


def first_line(error):
    """The first line of an error's message, shortened, or its type if there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class Part:
    """A module with only some of its keys, for a program that shares these."""

    def __init__(self, module, *keys):
        self.module = module
        in_order = sorted(keys, key=list(module.DEFAULTS).index)
        self.DEFAULTS = {key: module.DEFAULTS[key] for key in in_order}

    def __getattr__(self, name):
        return getattr(self.module, name)


def plural(n, noun):
    """A number with its noun: 1 block, 2 blocks."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# ---- One key -------------------------------------------------------------------------------------


def shown(value):
    """The value as text for a message, shortened, because a file can hold a huge one."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an int with more digits than Python prints
        return "a number of thousands of digits"


def typed(key, value, default):
    """The value, parsed from text or checked, in the type of its default; UserError otherwise."""
    if isinstance(default, str):
        # the excluded characters cannot occur in a file name
        is_text = isinstance(value, str) and not re.search("[\0\ud800-\udc7f\udd00-\udfff]", value)
        require(is_text, f"{key} must be text, not {shown(value)}")
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
    require(number.is_integer(), f"{key} must be a whole number, not {shown(value)}")
    return int(number if isinstance(value, str) and re.search("[.eE]", value) else value)


def at_home(key, value):
    """The path or paths of a key with ~ expanded to the home folder; UserError if there is none."""

    def expanded(match):
        path = os.path.expanduser(match[0])
        there = path != match[0] or os.path.lexists(path)
        require(there, f"{key}: no home folder {match[0]}; a folder with that name is ./{match[0]}")
        return path

    return re.sub(r"(?<![^,])~[^,]*", expanded, value)


@functools.cache
def key_block(module):
    """The source of a module's DEFAULTS: the line that defines a key also documents it."""
    if isinstance(module, Part):
        lines = [rf'^ *"{key}": .*\n' for key in module.DEFAULTS]
        return "".join(re.findall("|".join(lines), key_block(module.module), re.M))
    return re.search(r"^DEFAULTS = \{\n(.*?)^\}", inspect.getsource(module), re.S | re.M)[1]


def allowed(module):
    """The values that each key accepts, {key: list or dict}, as listed in the comments of DEFAULTS.

    A comment is `# a | b (remark) | c; remark` or `# one of TABLE`, a dict or list of the module.
    Readers and --help rely on these comments, so the check does too: a second list could differ.
    """
    values = {}
    for key, comment in re.findall(r'^ *"(\w+)": ".*?",  # (.*)', key_block(module), re.M):
        first_part = re.sub(r" \(.*?\)", "", comment).split(";")[0]  # without remarks
        if table := re.fullmatch(r"one of (\w+)", first_part):
            values[key] = getattr(module, table[1])
        elif re.fullmatch(r"\w+( \| \w+)+", first_part):
            values[key] = first_part.split(" | ")
    return values


def ranges(module):
    """The range of each number, {key: text}, as stated in the comments of DEFAULTS.

    It is `1 or more`, or `in [0, 1)` (without the 1), or `0 or more` if the comment states none.
    """
    numbers = re.findall(r'^ *"(\w+)": -?\d[^,]*,(.*)', key_block(module), re.M)
    stated = r"-?\d+ or more|in [\[(].*?[\])]"
    return {key: [*re.findall(stated, comment), "0 or more"][0] for key, comment in numbers}


def in_range(value, text):
    """Whether a number is in a range, given as the text that `ranges` returns."""
    interval = re.fullmatch(r"in ([\[(])(.*), (.*)([\])])", text)
    if not interval:
        return value >= int(text.split()[0])
    left, low, high, right = interval.groups()
    above = value > float(low) if left == "(" else value >= float(low)
    return above and (value < float(high) if right == ")" else value <= float(high))


# ---- One config ----------------------------------------------------------------------------------


def defaults_of(modules):
    """The DEFAULTS of several modules in one dict; no two may define the same key."""
    keys = [key for module in modules for key in module.DEFAULTS]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    assert not twice, f"defined twice: {twice}"
    return {key: value for module in modules for key, value in module.DEFAULTS.items()}


def merge(items, *modules):
    """The modules' DEFAULTS, overridden in order by items (name in messages, key, value).

    Raises UserError for an unknown key, or a value that the key does not accept.
    """
    config = defaults_of(modules)
    choices = {key: values for module in modules for key, values in allowed(module).items()}
    limits = {key: text for module in modules for key, text in ranges(module).items()}
    for where, key, value in items:
        require(key in config, f"unknown key {where}{nearest(key, config)}")
        config[key] = typed(where, value, config[key])
        config[key] = at_home(where, config[key]) if key in PATHS else config[key]
        file, colon, _ = where.rpartition(": ")
        if key in choices:
            message = f"{file}{colon}unknown {key} '{config[key]}'"
            require(config[key] in choices[key], message + nearest(config[key], choices[key]))
            if isinstance(choices[key], Table):
                choices[key][config[key]]  # a faulty entry raises UserError
        if key in limits:
            message = f"{file}{colon}{key} must be {limits[key]}, not {config[key]}"
            require(in_range(config[key], limits[key]), message)
    return config


def options(keywords, *modules, only=None):
    """The keyword options of a call merged over the DEFAULTS, as in `sample(model, x, steps=8)`.

    only: the keys that the call reads, if not all; any other raises a UserError that lists them.
    """
    keys = defaults_of(modules)
    only = keys if only is None else only
    for key in keywords:
        unknown = "" if key in keys else key  # a key of other calls is not misspelled
        require(key in only, f"unknown key {key}{nearest(unknown, only)}")
    return merge([(key, key, value) for key, value in keywords.items()], *modules)


def completed(config, *modules):
    """A config made in Python, merged over the DEFAULTS and checked like that of a command.

    Keys that no module defines are kept as they are.
    """
    keys = config.keys() & defaults_of(modules)
    return config | options({key: config[key] for key in keys}, *modules)


def whole(config, *modules):
    """A config made in Python like that of a command, of which it need not have all keys.

    The user has set the keys that are there; if all are, those that differ from their defaults.
    """
    defaults = defaults_of(modules)
    has_all = config.keys() >= defaults.keys()
    keys = [key for key in config if not has_all or config[key] != defaults.get(key)]
    config = {"user_keys": dict(zip(keys, keys, strict=True))} | config
    return completed(well_spelled(config, *modules), *modules)


def well_spelled(config, *modules):
    """The config; UserError for a key that no module defines, but that looks like one of theirs."""
    defaults = defaults_of(modules)
    for key in config.keys() - defaults:
        misspelled = key in RENAMED or difflib.get_close_matches(key, defaults, cutoff=0.85)
        require(not misspelled, f"unknown key {key}{nearest(key, defaults)}")
    return config


def refuse_typed(config, keys, reason):
    """Raise UserError if the command line sets one of `keys`; `reason` says why it has no effect.

    A preset may set it, since other commands may use it.
    """
    for key in keys:
        where = config.get("user_keys", {}).get(key, "")
        require(not where.startswith("--"), f"{key} {reason}; leave it out")


def refuse_unused(config, used_by, thing):
    """refuse_typed for the keys in used_by that have no effect on a thing.

    used_by: {key: (what it is for, in words; thing -> whether it is used; a value always allowed)}.
    """
    for key, (what, uses, neutral) in used_by.items():
        typed_key = config.get("user_keys", {}).get(key, "").startswith("--")
        if typed_key and config[key] != neutral and not uses(thing):
            refuse_typed(config, [key], f"is for {what}")


def read_preset(path):
    """The dict of a preset file: one Python dict literal, which is parsed and never executed.

    A path that does not exist in the working directory is looked up in this repository.
    """
    path = Path(at_home("preset", str(path)))
    if not os.path.isfile(path) and os.path.isfile(ROOT / path):  # called from another folder
        path = ROOT / path
    if not os.path.isfile(path):  # unlike path.is_file(), False also if access is denied
        folder = path.parent if os.path.isdir(path.parent) else ROOT / "configs"
        raise UserError(f"no preset file {path}{nearest(path, folder.glob('[!.]*.py'))}")
    try:
        preset = ast.literal_eval(path.read_text(encoding="utf-8-sig"))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error).splitlines() or ["nested too deeply"]  # a MemoryError has no message
        raise UserError(f"{path} must hold one Python dict literal ({reason[0]})") from None
    message = f"{path} must hold one Python dict literal, not a {type(preset).__name__}"
    require(isinstance(preset, dict), message)
    return preset


def meant(word, keys):
    """The end of a message about a word that is no preset and no --key=value, perhaps a path."""
    if "=" in word and word.partition("=")[0] in keys:
        return f"; did you mean --{word}?"
    preset = Path("configs", f"{Path(word).name}.py")
    there = os.path.isfile(ROOT / preset)
    return taker(word, keys) or (f"; did you mean {preset}?" if there else "")


def taker(path, keys):
    """The end of a message about a path without a key: the one of `keys` that takes such a path."""
    names = os.listdir(path) if os.path.isdir(path) else [path] if os.path.isfile(path) else []
    fitting = [key for key in ENDS if key in keys and any(n.endswith(ENDS[key]) for n in names)]
    return f"; did you mean --{fitting[0]}={path}?" if fitting else ""


def parse(argv, *modules):
    """The config of a command line: DEFAULTS < preset files < --key=value; --key alone is True.

    config["user_keys"] says which keys the user set, and where: {key: "--key" or "FILE: key"}.
    Raises UserError for an unknown key, a wrong type or value, or a missing preset.
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
            message = f"'{arg}' is neither a preset (configs/NAME.py) nor --key=value"
            require(arg.endswith(".py"), message + meant(arg, defaults))
            items += [(f"{arg}: {key}", key, value) for key, value in read_preset(arg).items()]
    return merge(items, *modules) | {"user_keys": {key: where for where, key, _ in items}}


def help_text(*modules):
    """The text of each module's DEFAULTS, with the names in TABLE listed after `one of TABLE`."""
    blocks = []
    for module in modules:
        block = key_block(module)
        for table in set(re.findall(r"# one of (\w+)", block)):
            names = " | ".join(getattr(module, table))
            block = re.sub(rf"# one of {table}\b", f"# one of {table}: {names}", block)
        blocks.append(f"keys of {Path(module.__file__).name}:\n{block}")
    return "\n".join(blocks)
