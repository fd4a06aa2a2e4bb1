"""Settings: what overrides what, what a value may be; files that are whole or absent; machines."""

import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT

import config as settings
import diffusion
import evaluate
import lib.program
from config import RENAMED, UserError, choose, defaults_of, help_text, options, parse, read_preset
from lib.device import machine
from lib.files import Stop, sweep, whole_file

DEFAULTS = {
    "steps": 10,  # -3 or more
    "rate": 0.5,
    "fast": False,
    "name": "a",
}
MODULE = sys.modules[__name__]


def programs():
    """{name: the words of its `run(main, ...)` line}, of every file that is run as a program."""
    values = {}
    for pattern in (
        "*.py",
        "lib/*.py",
        "run/*.py",
        "evals/*.py",
        "data/*/prepare.py",
        "experiments/*.py",
    ):
        for path in sorted(ROOT.glob(pattern)):
            end = path.read_text().partition('if __name__ == "__main__":')[2]
            if call := re.search(r"\brun\((.*)\)", end, re.S):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                values[name] = call[1].replace(" ", "").replace("\n", "").strip(",").split(",")
    return values


PROGRAMS = programs()


def modules_of(program):
    """The modules whose keys a program takes, as it names them itself."""
    names = vars(importlib.import_module(program))
    return eval(f"[{', '.join(PROGRAMS[program][1:])}]", names)


def made(folder, text, name="made"):
    """The module with this text, which defines DEFAULTS."""
    (folder / f"{name}.py").write_text(text)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(function, *arguments):
    """The one line in which a call is refused."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert str(error.value).strip() and "\n" not in str(error.value)
    return str(error.value)


def preset(folder, text, name="preset.py"):
    (folder / name).write_text(text)
    return str(folder / name)


# ---- Defaults < presets < command line -----------------------------------------------------------


def test_defaults_give_way_to_presets_and_both_to_the_command_line_in_its_order(tmp_path):
    a = preset(tmp_path, "# why\n{'steps': 20, 'name': 'b',  # and why\n 'width': 4}", "a.py")
    b = preset(tmp_path, "{'name': 'c'}", "b.py")
    other = made(tmp_path, 'DEFAULTS = {\n    "width": 3,\n}\n')
    assert parse([], MODULE, other) == DEFAULTS | {"width": 3, "user_keys": {}}
    expected = {"steps": 30, "rate": 0.5, "fast": False, "name": "c", "width": 4}
    config = parse([a, b, "--steps=30"], MODULE, other)
    own = {"steps": "--steps", "name": f"{b}: name", "width": f"{a}: width"}
    assert config == expected | {"user_keys": own}
    assert parse(["--name=z", a], MODULE, other)["name"] == "b"
    assert parse(["--steps=1", "--steps=2"], MODULE)["steps"] == 2


def test_parsing_leaves_the_defaults_alone():
    parse(["--steps=30"], MODULE)["rate"] = 7
    assert DEFAULTS == {"steps": 10, "rate": 0.5, "fast": False, "name": "a"}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "12", 12),
        ("steps", "-3", -3),
        ("steps", "1e3", 1000),
        ("steps", "123456789012345678", 123456789012345678),  # more digits than a float holds
        ("rate", "2e-2", 0.02),
        ("rate", "3", 3.0),
        ("fast", "True", True),
        ("fast", "false", False),
        ("fast", "1", True),
        ("name", "", ""),
        ("name", "x=y, 1", "x=y, 1"),
        ("name", "True", "True"),
    ],
)
def test_text_takes_the_type_of_the_default(key, text, value):
    parsed = parse([f"--{key}={text}"], MODULE)[key]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("steps", "ten", "a whole number"),
        ("steps", "1.5", "a whole number"),
        ("steps", "", "a whole number"),
        ("steps", "inf", "a whole number"),
        ("rate", "fast", "a number"),
        ("rate", "nan", "a number"),
        ("rate", "1e999", "a number"),
        ("fast", "yes", "True or False"),
        ("fast", "", "True or False"),
    ],
)
def test_text_of_another_type_is_refused(key, text, wanted):
    assert refusal(parse, [f"--{key}={text}"], MODULE) == f"--{key} must be {wanted}, not '{text}'"


@pytest.mark.parametrize(
    "item",
    ["'steps': 1.5", "'steps': True", "'steps': None", "'rate': [1]", "'fast': 1", "'name': 3"],
)
def test_a_literal_of_another_type_is_refused_with_its_file(item, tmp_path):
    path = preset(tmp_path, f"{{{item}}}")
    key = item.split("'")[1]
    assert refusal(parse, [path], MODULE).startswith(f"{path}: {key} must be ")


def test_a_literal_takes_the_type_of_the_default(tmp_path):
    config = parse([preset(tmp_path, "{'rate': 1, 'steps': 2.0}")], MODULE)
    assert (config["rate"], config["steps"]) == (1.0, 2)
    assert type(config["rate"]) is float and type(config["steps"]) is int


def test_a_boolean_key_alone_means_true_and_any_other_wants_a_value():
    assert parse(["--fast"], MODULE)["fast"] is True
    assert parse(["--fast"], MODULE)["user_keys"] == {"fast": "--fast"}
    assert parse(["--fast", "--fast=False"], MODULE)["fast"] is False
    for key in ("steps", "rate", "name"):
        assert refusal(parse, [f"--{key}"], MODULE) == f"write --{key}=VALUE, not '--{key}'"
    train = modules_of("train")
    assert (
        not parse([], *train)["recompute"] and parse(["--recompute"], *train)["recompute"] is True
    )
    assert refusal(parse, ["--size"], *train) == "write --size=VALUE, not '--size'"


def test_options_of_a_call_are_merged_over_the_defaults_and_checked():
    assert options({}, MODULE) == DEFAULTS
    assert options({"steps": 3, "rate": 1}, MODULE, diffusion) == {
        **{"steps": 3, "rate": 1.0, "fast": False, "name": "a"},
        **diffusion.DEFAULTS,
    }
    refused = {"step": 3}, {"steps": 1.5}, {"schedule": "cosin"}
    assert [refusal(options, given, MODULE, diffusion) for given in refused] == [
        "unknown key step; did you mean 'steps'?",
        "steps must be a whole number, not 1.5",
        "unknown schedule 'cosin'; did you mean 'cosine'?",
    ]
    assert DEFAULTS["steps"] == 10


# ---- Values that a comment lists -----------------------------------------------------------------

LISTED = """TABLE = {"red": 1, "green": 2}
DEFAULTS = {
    "lr_decay": "cosine",  # cosine | linear | constant
    "kind": "auto",  # auto (the best, then a | b) | plain | full; all of them are fast
    "colour": "red",  # one of TABLE; green is slower
    "free": "x",  # x or y, whatever you like
    "data": "data/pydocs",  # a folder | or not
}
"""


def test_the_values_that_a_key_can_have_are_those_that_its_comment_lists(tmp_path):
    module = made(tmp_path, LISTED)
    assert settings.allowed(module) == {
        "lr_decay": ["cosine", "linear", "constant"],
        "kind": ["auto", "plain", "full"],
        "colour": {"red": 1, "green": 2},
    }
    sound = {"lr_decay": "linear", "kind": "full", "colour": "green", "free": "?", "data": "/"}
    assert parse([f"--{key}={value}" for key, value in sound.items()], module).items() > (
        sound.items()
    )


def test_a_value_that_is_not_listed_is_told_its_nearest_name(tmp_path):
    module = made(tmp_path, LISTED)
    path = preset(tmp_path, "{'colour': 'gren'}")
    for words, message in {
        ("--lr_decay=cosin",): "unknown lr_decay 'cosin'; did you mean 'cosine'?",
        ("--kind=?",): "unknown kind '?'; there is: auto, full, plain",
        ("--colour=blue",): "unknown colour 'blue'; there is: green, red",
        (path,): f"{path}: unknown colour 'gren'; did you mean 'green'?",
    }.items():
        assert refusal(parse, words, module) == message
    assert refusal(options, {"kind": "ful"}, module) == "unknown kind 'ful'; did you mean 'full'?"
    assert "did you mean 'muon'?" in refusal(parse, ["--optimizer=moun"], *modules_of("train"))


RANGED = """DEFAULTS = {
    "beta": 0.9,  # in [0, 1), as its comment says
    "top_p": 1.0,  # in (0, 1]
    "scale": 0,  # w in [-1, 10]: guidance
    "start": -1,  # -1 or more; -1: the mask
    "keep": 1,  # files, 1 or more
    "free": 3,
}
"""


def test_a_number_is_0_or_more_unless_its_comment_has_another_range(tmp_path):
    module = made(tmp_path, RANGED)
    sound = {"beta": [0, 0.99], "top_p": [0.01, 1], "scale": [-1, 10], "start": [-1, 0]}
    for key, values in (sound | {"keep": [1, 2**70], "free": [0]}).items():
        assert [parse([f"--{key}={value}"], module)[key] for value in values] == values
    wrong = {"beta": [-0.1, 1.0], "top_p": [0.0, 1.01], "scale": [-2, 11], "start": [-2]}
    for key, values in (wrong | {"keep": [0], "free": [-1]}).items():
        says = settings.ranges(module)[key]
        for value in values:
            assert refusal(options, {key: value}, module) == f"{key} must be {says}, not {value}"
    path = preset(tmp_path, "{'free': -1}")
    assert refusal(parse, [path], module) == f"{path}: free must be 0 or more, not -1"


def test_help_names_what_is_in_a_table_that_a_comment_names(tmp_path):
    text = help_text(made(tmp_path, LISTED))
    assert '"colour": "red",  # one of TABLE: red | green; green is slower\n' in text
    assert '"lr_decay": "cosine",  # cosine | linear | constant\n' in text


def test_a_part_is_its_module_with_some_of_its_keys():
    part = settings.Part(evaluate, "batch_size", "estimator")
    text, whole = (help_text(module).splitlines() for module in (part, evaluate))
    assert text[0] == "keys of evaluate.py:" and set(text) < set(whole)
    assert [re.match(' *"(.*?)":', line)[1] for line in text[1:]] == ["estimator", "batch_size"]
    assert parse([], part) == {"estimator": "any_order", "batch_size": 32, "user_keys": {}}
    assert parse(["--batch_size=2"], MODULE, part)["batch_size"] == 2
    assert "did you mean 'chain'?" in refusal(parse, ["--estimator=chains"], part)
    assert refusal(parse, ["--batch_size=0"], part) == "batch_size must be 1 or more, not 0"
    assert "unknown key --draws" in refusal(parse, ["--draws=2"], part)
    with pytest.raises(ValueError, match="bach_size"):
        settings.Part(evaluate, "bach_size")


# ---- Unknown names -------------------------------------------------------------------------------


def test_an_unknown_key_is_told_its_nearest_name_or_all_there_are(tmp_path):
    assert refusal(parse, ["--step=3"], MODULE) == "unknown key --step; did you mean 'steps'?"
    assert refusal(parse, ["--q=3"], MODULE) == "unknown key --q; there is: fast, name, rate, steps"
    path = preset(tmp_path, "{'nane': 'b'}")
    assert refusal(parse, [path], MODULE) == f"unknown key {path}: nane; did you mean 'name'?"
    assert "unknown key --user_keys" in refusal(parse, ["--user_keys=x"], MODULE)


def test_a_word_that_is_no_setting_is_refused():
    assert refusal(parse, ["--steps"], MODULE) == "write --steps=VALUE, not '--steps'"
    refused = refusal(parse, ["steps=3"], MODULE)
    assert "neither a preset (configs/NAME.py) nor --key=value" in refused


@pytest.mark.parametrize(
    ("program", "holds", "key"),
    [
        ("sample", "ckpt.pt", "ckpt"),
        ("sample", "model.safetensors", "ckpt"),
        ("sample", "meta.json", ""),
        ("evaluate", "meta.json", "data"),
        ("train", "meta.json", "data"),
        ("train", "ckpt.pt", "out_dir"),
        ("train", "mine.txt", ""),
    ],
)
def test_a_path_that_stands_alone_is_answered_with_the_key_that_takes_it(
    program, holds, key, tmp_path
):
    file = tmp_path / holds
    file.touch()
    for path in (tmp_path, file)[: 2 if key == "ckpt" else 1]:
        end = f"; did you mean --{key}={path}?" if key else "nor --key=value"
        assert refusal(parse, [str(path)], *modules_of(program)).endswith(end)


def test_an_old_name_of_a_key_is_answered_with_the_new_one():
    answered = set()
    for program in PROGRAMS:
        modules = modules_of(program)
        for old, new in RENAMED.items():
            if new in defaults_of(modules):
                message = f"unknown key --{old}; did you mean '{new}'?"
                assert refusal(parse, [f"--{old}=1"], *modules) == message
                answered.add(old)
    taken_by_none = {"row_width", "row_end", "unused_rows"}  # from the data, of published weights
    assert answered >= RENAMED.keys() - taken_by_none


def test_an_unknown_choice_is_told_its_nearest_name():
    assert choose("kind", "linear", ["linear", "cosine"]) == "linear"
    assert choose("kind", "b", {"b": 2}) == 2
    refused = refusal(choose, "kind", "linaer", ["linear", "cosine"])
    assert refused == "unknown kind 'linaer'; did you mean 'linear'?"
    assert refusal(choose, "kind", "?", {"b": 2, "a": 1}) == "unknown kind '?'; there is: a, b"
    assert refusal(choose, "kind", "?", []) == "unknown kind '?'; there is: nothing"


def test_a_missing_preset_is_told_its_nearest_neighbour(tmp_path):
    path = preset(tmp_path, "{}", "small.py")
    missing = str(tmp_path / "smal.py")
    assert refusal(parse, [missing], MODULE) == f"no preset file {missing}; did you mean '{path}'?"
    assert "no preset file" in refusal(parse, [str(tmp_path / "nowhere" / "small.py")], MODULE)
    assert "no preset file" in refusal(parse, [str(tmp_path / "folder.py")], MODULE)


# ---- Presets are read, never executed ------------------------------------------------------------


def test_code_in_a_preset_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    for text in (
        f"open({str(mark)!r}, 'w')",
        f"{{'steps': len([open({str(mark)!r}, 'w')])}}",
        "import os\n{'steps': 1}",
    ):
        path = preset(tmp_path, text)
        assert f"{path} must hold one Python dict literal" in refusal(parse, [path], MODULE)
    assert not mark.exists()


BROKEN = {
    "nothing": "",
    "a list": "[1]",
    "two dicts": "{}\n{}",
    "cut off": "{'steps': 3",
    "null byte": "{'steps': 3}\0",
    "list as key": "{[]: 1}",
    "deep": "(" * 300 + ")" * 300,
    "deep without parentheses": "-" * 100_000 + "1",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_preset_that_is_no_dict_literal_is_refused(case, tmp_path):
    path = preset(tmp_path, BROKEN[case])
    assert refusal(read_preset, path).startswith(f"{path} must hold one Python dict literal")


def test_a_preset_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert "must hold one Python dict literal" in refusal(read_preset, tmp_path / "binary.py")


def test_a_number_too_large_for_any_key_is_refused(tmp_path):
    path = preset(tmp_path, f"{{'rate': {'9' * 400}}}")
    assert f"{path}: rate must be a number" in refusal(parse, [path], MODULE)


# ---- What each program knows ---------------------------------------------------------------------


def test_the_programs_are_those_that_are_known():
    assert {"train", "sample", "evaluate", "run.checkpoint"} <= PROGRAMS.keys()
    folders = {name.split(".")[0] for name in PROGRAMS}
    assert {"evals", "data", "experiments"} <= folders and len(PROGRAMS) > 20


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_has_two_keys_of_one_name(program):
    assert defaults_of(modules_of(program))


def test_two_keys_of_one_name_are_noticed(tmp_path):
    other = made(tmp_path, 'DEFAULTS = {\n    "steps": 3,\n}\n')
    with pytest.raises(AssertionError, match=r"defined twice: \['steps'\]"):
        parse([], MODULE, other)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_default_is_a_value_that_the_command_line_can_give(program):
    modules = modules_of(program)
    defaults = defaults_of(modules)
    config = parse([f"--{key}={value}" for key, value in defaults.items()], *modules)
    assert config == defaults | {"user_keys": {key: f"--{key}" for key in defaults}}


@pytest.mark.parametrize("program", ["train", "sample", "evaluate", "run.checkpoint"])
def test_help_prints_every_key_with_its_default_and_its_comment(program):
    for module in modules_of(program):
        text, path = help_text(module), ROOT / f"{module.__name__.replace('.', '/')}.py"
        source = path.read_text().split("DEFAULTS = {\n")[1].split("\n}")[0]
        tables = re.findall(r"one of ([A-Z_]+)", source)
        for table in tables:
            names = " | ".join(getattr(module, table))
            source = source.replace(f"one of {table}", f"one of {table}: {names}")
        assert text == f"keys of {path.name}:\n{source}\n"
        assert all(re.search(rf'^    "{key}": .+,', text, re.M) for key in module.DEFAULTS)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_preset_of_the_repository_fits_the_training_script(path):
    config = parse([str(path)], *modules_of("train"))
    assert config["user_keys"].keys() == read_preset(path).keys()


# ---- Running a program ---------------------------------------------------------------------------


def outcome(monkeypatch, capsys, main, *words):
    """(exit code or None, stdout, stderr) of a program with the keys of MODULE."""
    monkeypatch.setattr(sys, "argv", ["some/where/program.py", *words])
    code = None
    try:
        lib.program.run(main, MODULE)
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def test_a_program_gets_its_config(monkeypatch, capsys):
    main = lambda config: print(config["steps"])  # noqa: E731
    assert outcome(monkeypatch, capsys, main, "--steps=3") == (None, "3\n", "")


def test_a_user_error_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(config):
        raise UserError("no file x")

    assert outcome(monkeypatch, capsys, main) == (2, "", "program.py: no file x\n")
    code, out, err = outcome(monkeypatch, capsys, main, "--stepz=1")
    assert (code, out, err) == (2, "", "program.py: unknown key --stepz; did you mean 'steps'?\n")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), ""),
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has",
            " (cannot allocate 2.00 GiB)",
        ),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes.", " (cannot"),
        ("CUDA error: out of memory", ""),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", ""),
    ],
)
def test_full_memory_is_one_line_and_exit_code_2(error, says, monkeypatch, capsys):
    def main(config):
        raise RuntimeError(error) if isinstance(error, str) else error

    code, out, err = outcome(monkeypatch, capsys, main)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"program.py: not enough memory{says}") and "a smaller batch" in err


def test_a_line_stays_one_line_whatever_the_user_typed(monkeypatch, capsys):
    code, _, err = outcome(monkeypatch, capsys, None, "--steps=1\n2")
    assert code == 2 and err.count("\n") == 1
    code, _, err = outcome(monkeypatch, capsys, None, "--st\neps=1")
    assert code == 2 and err.count("\n") == 1


def test_help_says_what_can_be_set_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["some/where/program.py", "--seed=1", "--help"])
    lib.program.run(None, settings)
    out, err = capsys.readouterr()
    assert "usage: program.py [PRESET.py ...] [--key=value ...]" in out
    assert help_text(settings) in out and err == ""


def test_ctrl_c_is_exit_code_130_and_a_mistake_of_ours_is_not_hidden(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    assert outcome(monkeypatch, capsys, interrupted) == (130, "", "\nprogram.py: interrupted\n")
    with pytest.raises(ZeroDivisionError):
        outcome(monkeypatch, capsys, lambda config: 1 / 0)


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null"])
def test_what_is_no_file_is_written_to_and_never_replaced(path, monkeypatch):
    before = os.stat(path)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("a device was replaced"))
    end = UserError if path == "/dev/full" else None
    with pytest.raises(end, match="cannot write /dev/full: No space") if end else nullcontext():
        with whole_file(path) as file, open(file, "w") as out:
            out.write("\n")
    assert os.stat(path).st_ino == before.st_ino


# ---- Files out -----------------------------------------------------------------------------------


def test_a_file_appears_whole_in_a_folder_made_for_it(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with whole_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_who_reads_the_old_file_while_it_is_replaced_reads_it_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with open(path) as reader:
        with whole_file(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old" and path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_what_goes_wrong_while_writing_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error):
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from lib.files import whole_file
with whole_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 2
    sweep(tmp_path, path.name)
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    def write(path):
        with whole_file(path) as temporary:
            temporary.write_text("x")

    (tmp_path / "file").write_text("old")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for path in (tmp_path / "file" / "x", tmp_path / "folder", tmp_path / ("long" * 100)):
        assert refusal(write, path).startswith(f"cannot write {path}: ")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_read_only_folder_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    user, nobody = os.geteuid(), 65534
    os.seteuid(user or nobody)  # root can write everywhere
    try:
        with pytest.raises(UserError, match="Permission denied"):
            with whole_file("x") as temporary:
                temporary.write_text("x")
    finally:
        os.seteuid(user)
    assert not os.listdir(tmp_path)


# ---- Signals and machines ------------------------------------------------------------------------


def test_a_first_signal_is_noted_a_second_not_held_back_and_old_handlers_return():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.signal
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def on(**keys):
    return machine(settings.DEFAULTS | {"device": "cpu"} | keys)


@pytest.mark.parametrize(
    ("dtype", "product"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_matrix_products_run_in_the_dtype_that_was_asked_for(dtype, product):
    device, autocast = on(dtype=dtype)
    with autocast():
        assert device == torch.device("cpu") and (torch.eye(2) @ torch.eye(2)).dtype == product


def test_a_device_is_chosen_where_none_is_named():
    device, _ = on(device="auto")
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    assert device.type == next(kind for kind in there if there[kind])


def test_devices_and_dtypes_that_are_not_there_are_refused():
    assert refusal(lambda: on(device="cud")) == "unknown device 'cud'; did you mean 'cuda'?"
    refused = refusal(parse, ["--dtype=float16"], settings)
    assert refused == "unknown dtype 'float16'; did you mean 'bfloat16'?"
    missing = [
        kind
        for kind, module in (("cuda", torch.cuda), ("mps", torch.backends.mps))
        if not module.is_available()
    ]
    for kind in missing:
        assert "is not available on this machine" in refusal(lambda kind=kind: on(device=kind))
    for device in ("cpu:x", "cpu:1:2"):
        assert device in refusal(lambda device=device: on(device=device))


def test_a_seed_out_of_range_is_refused():
    assert refusal(lambda: on(seed=-1)) == "seed must be in [0, 9e18], not -1"
    assert refusal(lambda: on(seed=2**63)) == f"seed must be in [0, 9e18], not {2**63}"
