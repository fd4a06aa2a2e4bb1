"""Settings: what overrides what, what a value may be, and that a file is whole or not there."""

import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import config as settings
from config import UserError, choose, help_text, machine, parse, read_preset, whole_file

MODULE = SimpleNamespace(DEFAULTS={"steps": 10, "rate": 0.5, "fast": False, "name": "a"})
OTHER = SimpleNamespace(DEFAULTS={"width": 3})
PROGRAMS = [
    "train",
    "sample",
    "evaluate",
    "checkpoint",
    "data.pydocs.prepare",
    "data.text.prepare",
    "data.shakespeare.prepare",
]


def refusal(function, *arguments):
    """The one line in which a call is refused."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert str(error.value).strip() and "\n" not in str(error.value)
    return str(error.value)


def preset(folder, text, name="preset.py"):
    (folder / name).write_text(text)
    return str(folder / name)


# ---- Defaults < presets < command line ---------------------------------------------------------------------------------


def test_defaults_give_way_to_presets_and_both_to_the_command_line_in_its_order(tmp_path):
    a = preset(tmp_path, "# why\n{'steps': 20, 'name': 'b',  # and why\n 'width': 4}", "a.py")
    b = preset(tmp_path, "{'name': 'c'}", "b.py")
    assert parse([], MODULE, OTHER) == MODULE.DEFAULTS | OTHER.DEFAULTS | {"given": []}
    expected = {"steps": 30, "rate": 0.5, "fast": False, "name": "c", "width": 4}
    assert parse([a, b, "--steps=30"], MODULE, OTHER) == expected | {"given": ["name", "steps", "width"]}
    assert parse(["--name=z", a], MODULE, OTHER)["name"] == "b"
    assert parse(["--steps=1", "--steps=2"], MODULE)["steps"] == 2


def test_parsing_leaves_the_defaults_alone():
    parse(["--steps=30"], MODULE)["rate"] = 7
    assert MODULE.DEFAULTS == {"steps": 10, "rate": 0.5, "fast": False, "name": "a"}


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
    found = parse([f"--{key}={text}"], MODULE)[key]
    assert found == value and type(found) is type(value)


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


@pytest.mark.parametrize("item", ["'steps': 1.5", "'steps': True", "'steps': None", "'rate': [1]", "'fast': 1", "'name': 3"])
def test_a_literal_of_another_type_is_refused_with_its_file(item, tmp_path):
    path = preset(tmp_path, f"{{{item}}}")
    key = item.split("'")[1]
    assert refusal(parse, [path], MODULE).startswith(f"{path}: {key} must be ")


def test_a_literal_takes_the_type_of_the_default(tmp_path):
    found = parse([preset(tmp_path, "{'rate': 1, 'steps': 2.0}")], MODULE)
    assert (found["rate"], type(found["rate"]), found["steps"], type(found["steps"])) == (1.0, float, 2, int)


# ---- Unknown names -----------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_told_its_nearest_name_or_all_there_are(tmp_path):
    assert refusal(parse, ["--step=3"], MODULE) == "unknown key --step; did you mean 'steps'?"
    assert refusal(parse, ["--q=3"], MODULE) == "unknown key --q; there is: fast, name, rate, steps"
    path = preset(tmp_path, "{'nane': 'b'}")
    assert refusal(parse, [path], MODULE) == f"unknown key {path}: nane; did you mean 'name'?"
    assert "unknown key --given" in refusal(parse, ["--given=x"], MODULE)


def test_a_word_that_is_no_setting_is_refused():
    assert refusal(parse, ["--steps"], MODULE) == "write --steps=VALUE, not '--steps'"
    assert "neither a preset (configs/NAME.py) nor --key=value" in refusal(parse, ["steps=3"], MODULE)


def test_an_unknown_choice_is_told_its_nearest_name():
    assert choose("kind", "linear", ["linear", "cosine"]) == "linear" and choose("kind", "b", {"b": 2}) == 2
    assert refusal(choose, "kind", "linaer", ["linear", "cosine"]) == "unknown kind 'linaer'; did you mean 'linear'?"
    assert refusal(choose, "kind", "?", {"b": 2, "a": 1}) == "unknown kind '?'; there is: a, b"
    assert refusal(choose, "kind", "?", []) == "unknown kind '?'; there is: nothing"


def test_a_missing_preset_is_told_its_nearest_neighbour(tmp_path):
    path = preset(tmp_path, "{}", "small.py")
    missing = str(tmp_path / "smal.py")
    assert refusal(parse, [missing], MODULE) == f"no preset file {missing}; did you mean '{path}'?"
    assert "no preset file" in refusal(parse, [str(tmp_path / "nowhere" / "small.py")], MODULE)
    assert "no preset file" in refusal(parse, [str(tmp_path / "folder.py")], MODULE)


# ---- Presets are read, never executed ----------------------------------------------------------------------------------


def test_code_in_a_preset_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    for text in (f"open({str(mark)!r}, 'w')", f"{{'steps': len([open({str(mark)!r}, 'w')])}}", "import os\n{'steps': 1}"):
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


# ---- What each program knows -------------------------------------------------------------------------------------------


@pytest.fixture
def modules_of(monkeypatch):
    """modules_of(PROGRAM) -> the modules whose keys it takes, as it names them itself."""
    found = []
    monkeypatch.setattr(settings, "run", lambda main, *modules: found.append(modules))

    def run(program):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return found.pop()

    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_has_two_keys_of_one_name(program, modules_of):
    keys = [key for module in modules_of(program) for key in module.DEFAULTS]
    assert sorted(keys) == sorted(set(keys))


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_default_is_a_value_that_the_command_line_can_give(program, modules_of):
    modules = modules_of(program)
    defaults = {key: value for module in modules for key, value in module.DEFAULTS.items()}
    assert parse([f"--{key}={value}" for key, value in defaults.items()], *modules) == defaults | {"given": sorted(defaults)}


@pytest.mark.parametrize("program", ["train", "sample", "evaluate", "checkpoint"])
def test_help_prints_every_key_with_its_default_and_its_comment(program):
    module = importlib.import_module(program)
    told = help_text(settings, module)
    for part in (settings, module):
        source = (ROOT / f"{part.__name__}.py").read_text().split("DEFAULTS = {\n")[1].split("\n}")[0]
        assert f"keys of {part.__name__}.py:\n{source}\n" in told
        assert all(re.search(rf'^    "{key}": .+,', source, re.M) for key in part.DEFAULTS)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_preset_of_the_repository_fits_the_training_script(path, modules_of):
    assert parse([str(path)], *modules_of("train"))["given"] == sorted(read_preset(path))


# ---- Running a program -------------------------------------------------------------------------------------------------


def outcome(monkeypatch, capsys, main, *words):
    """(exit code or None, stdout, stderr) of a program with the keys of MODULE."""
    monkeypatch.setattr(sys, "argv", ["some/where/program.py", *words])
    code = None
    try:
        settings.run(main, MODULE)
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def test_a_program_gets_its_config(monkeypatch, capsys):
    assert outcome(monkeypatch, capsys, lambda config: print(config["steps"]), "--steps=3") == (None, "3\n", "")


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def main(config):
        raise UserError("no file x")

    assert outcome(monkeypatch, capsys, main) == (2, "", "program.py: no file x\n")
    code, out, err = outcome(monkeypatch, capsys, main, "--stepz=1")
    assert (code, out, err) == (2, "", "program.py: unknown key --stepz; did you mean 'steps'?\n")


def test_a_line_stays_one_line_whatever_the_user_typed(monkeypatch, capsys):
    code, _, err = outcome(monkeypatch, capsys, None, "--steps=1\n2")
    assert code == 2 and err.count("\n") == 1
    code, _, err = outcome(monkeypatch, capsys, None, "--st\neps=1")
    assert code == 2 and err.count("\n") == 1


def test_help_says_what_can_be_set_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["some/where/program.py", "--seed=1", "--help"])
    settings.run(None, settings)
    out, err = capsys.readouterr()
    assert "usage: program.py [PRESET.py] [--key=value ...]" in out and help_text(settings) in out and err == ""


def test_ctrl_c_is_exit_code_130_and_a_mistake_of_ours_is_not_hidden(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    assert outcome(monkeypatch, capsys, interrupted)[0] == 130
    with pytest.raises(ZeroDivisionError):
        outcome(monkeypatch, capsys, lambda config: 1 / 0)


# ---- Files out ---------------------------------------------------------------------------------------------------------


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
from config import whole_file
with whole_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_place_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path):
    def write(path):
        with whole_file(path) as temporary:
            temporary.write_text("x")

    (tmp_path / "file").write_text("old")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for path in (tmp_path / "file" / "x", tmp_path / "folder", tmp_path / ("long" * 100)):
        assert refusal(write, path).startswith(f"cannot write {path}: ")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and (tmp_path / "file").read_text() == "old"


def test_a_read_only_folder_is_a_mistake_of_the_user(tmp_path, monkeypatch):
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


# ---- Signals and machines ----------------------------------------------------------------------------------------------


def test_a_first_signal_is_noted_a_second_ctrl_c_is_not_held_back_and_the_old_handlers_return():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with settings.Stop() as stop:
        assert not stop.signal
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def on(**keys):
    return machine(settings.DEFAULTS | {"device": "cpu"} | keys)


@pytest.mark.parametrize(("dtype", "product"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_matrix_products_run_in_the_dtype_that_was_asked_for(dtype, product):
    device, autocast = on(dtype=dtype)
    with autocast():
        assert device == torch.device("cpu") and (torch.eye(2) @ torch.eye(2)).dtype == product


def test_a_device_is_chosen_where_none_is_named():
    device, _ = on(device="auto")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    assert device.type == next(kind for kind in there if there[kind])


def test_devices_and_dtypes_that_are_not_there_are_refused():
    assert refusal(lambda: on(device="cud")) == "unknown device 'cud'; did you mean 'cuda'?"
    assert refusal(lambda: on(dtype="float16")) == "unknown dtype 'float16'; did you mean 'bfloat16'?"
    missing = [kind for kind, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if not module.is_available()]
    for kind in missing:
        assert "is not available on this machine" in refusal(lambda kind=kind: on(device=kind))
    for device in ("cpu:x", "cpu:1:2"):
        assert device in refusal(lambda device=device: on(device=device))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed):
    assert refusal(lambda: on(seed=seed)) == f"seed must be from 0 to 2^63 - 1, not {seed}"
