"""Any environment: other systems, outputs, names, folders, variables, compilers, and callers."""

import ast
import asyncio
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pretended_windows
import pytest
import torch
from conftest import ROOT
from test_train import log, run, words

import config as settings
import lib.program
import sample
import train
from config import parse
from data import loader, tokenizer, writer
from data.text import prepare
from lib import compiled, device
from lib.files import Stop
from run import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
LINE = "The cat sat on the mat; “a dog” ran to the log, and cat {} ran after it.\n\n"
TEXT = "".join(LINE.format(number) for number in range(800))
PREPARE = (prepare.main, prepare, tokenizer)
TRAIN = (train.main, *train.MODULES)
SAMPLE = (sample.main, *sample.MODULES)
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("*.py"))]
SOURCES = SCRIPTS + [
    path.relative_to(ROOT).as_posix()
    for folder in ("data", "evals", "experiments", "lib", "run", "view")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]
TEXT_OF = {name: (ROOT / name).read_text("utf8") for name in SOURCES}
PROGRAMS = [name for name, text in TEXT_OF.items() if re.search(r"^    program\.run\(", text, re.M)]
# Those in folders that are run as a file, too, and not only with -m.
AS_FILES = [name for name in PROGRAMS if "/" not in name or "sys.path.insert(" in TEXT_OF[name]]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    (folder / "text.txt").write_text(TEXT, encoding="utf8")
    prepared(folder / "text.txt", folder / "data")
    return folder / "data"


def prepared(source, out, **keys):
    keys = {"input": source, "out": out, "val_fraction": 0.3, "workers": 1} | keys
    line = [f"--{key}={value}" for key, value in keys.items()]
    with contextlib.redirect_stdout(None):
        prepare.main(parse(line, prepare, tokenizer))
    return out


@pytest.fixture(scope="session")
def ckpt(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("environment") / "out"
    with contextlib.redirect_stdout(None):
        run(data, out, max_iters=2)
    return out


def exit_code(monkeypatch, program, *line):
    """What a command exits with, in this process."""
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, line)])
    try:
        lib.program.run(*program)
    except SystemExit as end:
        return end.code
    return 0


def command(*line, cwd=ROOT, **env):
    """A finished process of this Python."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    keys = {"cwd": cwd, "env": env, "capture_output": True, "text": True, "check": False}
    return subprocess.run([sys.executable, *map(str, line)], **keys, timeout=120)


def test_a_python_without_torch_is_told_of_the_environment(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    for script in ("train.py", "sample.py", "evaluate.py"):
        done = command(ROOT / script, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        said = "no torch in this Python; first: source .venv/bin/activate\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


# ---- Windows -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def on_windows(tmp_path_factory):
    """{step: what it came to, ...} and the files that are left, of pretended_windows.py."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("Windows is pretended on Linux")
    done = command("tests/pretended_windows.py", tmp_path_factory.mktemp("windows"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


RIGHT = {"a second start": "refused: True", "download": "True"}


@pytest.mark.parametrize("step", pretended_windows.STEPS)
def test_it_works_without_what_windows_lacks(step, on_windows):
    outcome = on_windows["steps"][step]
    assert outcome == RIGHT.get(step, outcome) and not re.match(r"\w*Error", outcome)


def test_on_windows_nothing_is_left_but_what_is_wanted(on_windows):
    runs = {"ckpt.pt", "ckpt_2.pt", "log.jsonl", "page.html"}
    runs |= {f"old_1/{name}" for name in ("ckpt.pt", "ckpt_6.pt", "ckpt_8.pt", "log.jsonl")}
    left = {name.removeprefix("out/") for name in on_windows["left"] if name.startswith("out/")}
    assert left == runs


def calls(*names):
    """(file and line, text) of all calls of functions, or of methods (".read_text")."""
    for file, text in TEXT_OF.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                method = f".{getattr(node.func, 'attr', '')}"
                if {method, getattr(node.func, "id", "")} & set(names):
                    yield f"{file}, line {node.lineno}", ast.unparse(node)


def test_text_is_read_and_written_as_utf8_whatever_the_system_prefers():
    others = r"os\.open\(|tarfile\.open\(|archive\.open\(|[\"']r?\+?[rwax]?b\+?[\"']"
    for where, call in calls("open", ".read_text", ".write_text"):
        assert re.search(rf"encoding=|utf8|{others}", call), f"{where}: {call}"


# ---- Output --------------------------------------------------------------------------------------


def stream(file, encoding):
    return io.TextIOWrapper(file, encoding=encoding, errors="strict")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_the_output_lacks_is_replaced(encoding, ckpt, monkeypatch):
    line = [f"--ckpt={ckpt}", "--num_samples=8", "--steps=4"]
    out, raw = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", stream(out, "utf8"))
    assert exit_code(monkeypatch, SAMPLE, *line) == 0
    monkeypatch.setattr(sys, "stdout", stream(raw, encoding))
    assert exit_code(monkeypatch, SAMPLE, *line) == 0
    text, replaced = (x.getvalue().decode(e) for x, e in ((out, "utf8"), (raw, encoding)))
    whole = text[: text.index("---- NFE")].encode(encoding, "replace").decode(encoding)
    assert "“" in text and whole in replaced and ("?" in whole) == (encoding == "ascii")


def test_closed_streams_swallow_what_is_said(data, tmp_path, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert exit_code(monkeypatch, TRAIN, *words(data, tmp_path)) == 0
    assert log(tmp_path)[-1]["step"] == 12


def test_no_bar_is_drawn_into_a_file_and_lines_say_how_far_a_run_is(data, tmp_path, capsys):
    run(data, tmp_path)
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out
    lines = re.findall(r"step (\d+) of about 12: loss \d.\d{3}, .* tokens/s, .* s left\n", out)
    assert lines == ["2", "4", "6", "8", "10", "12"]


def test_each_bar_is_for_a_terminal_alone():
    for where, call in calls("tqdm"):
        assert re.search("disable=(None|bar_is_off)", call), f"{where}: {call}"


# ---- Ctrl-C --------------------------------------------------------------------------------------

AT_IMPORT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@pytest.fixture(scope="session")
def interrupting(tmp_path_factory):
    """A folder of packages whose import is interrupted by Ctrl-C."""
    folder = tmp_path_factory.mktemp("interrupting")
    for name in ("numpy", "requests", "torch", "tqdm"):
        (folder / f"{name}.py").write_text(AT_IMPORT, encoding="utf8")
    return folder


WAYS = [[name] for name in AS_FILES]
WAYS += [["-m", name.removesuffix(".py").replace("/", ".")] for name in PROGRAMS if "/" in name]


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_ctrl_c_during_the_imports_is_one_line(way, interrupting):
    done = command(*way, PYTHONPATH=str(interrupting))
    script = Path(way[-1]).name if len(way) == 1 else way[-1].rpartition(".")[2] + ".py"
    assert (done.returncode, done.stderr) == (130, f"\n{script}: interrupted\n")


def test_ctrl_c_that_ends_a_run_at_once_says_what_is_saved(data, tmp_path, monkeypatch, capsys):
    def build(*_):
        raise KeyboardInterrupt

    def said(**keys):
        monkeypatch.setattr(sys, "argv", ["train.py", *words(data, tmp_path, **keys)])
        with pytest.raises(SystemExit) as end:
            lib.program.run(train.main, *train.MODULES)
        assert end.value.code == 130
        return capsys.readouterr().err

    first, path = {"max_iters": 2}, tmp_path / "ckpt.pt"
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", build)
        begin = "nothing was saved yet; the same command begins again"
        assert said(**first) == f"\ntrain.py: interrupted; {begin}\n"
    run(data, tmp_path, **first)
    monkeypatch.setattr(train, "build", build)
    saved = f"\ntrain.py: interrupted; {path} is as it was saved last; the same command"
    assert said() == f"{saved} resumes it\n"
    assert said(resume=False) == f"{saved} with --resume resumes it\n"


def test_a_run_whose_terminal_is_closed_saves_and_one_under_nohup_goes_on(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, too
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.signal
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGTERM])
def test_an_error_that_a_stop_causes_in_a_compiler_is_the_stop(signalled):
    error = subprocess.CalledProcessError(-signalled, "g++")
    with pytest.raises(KeyboardInterrupt), Stop():
        signal.raise_signal(signalled)
        raise error
    with pytest.raises(subprocess.CalledProcessError), Stop():
        raise error


# ---- The compiler --------------------------------------------------------------------------------

NO_HEADERS = """#!/bin/sh
case "$*" in *--version*|*-dumpversion*) echo "g++ (Debian) 12.2.0"; exit 0;; esac
echo "fatal error: Python.h: No such file or directory" >&2; exit 1
"""


def test_a_compiler_that_does_not_work_is_one_line_and_training_goes_on(data, tmp_path):
    for name in ("g++", "c++", "clang++"):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(NO_HEADERS)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = command("train.py", *words(data, tmp_path / "out", compile=True), **env)
    assert done.returncode == 0, done.stderr
    why = "fatal error: Python.h: No such file or directory"
    line = f"torch.compile does not work here, so nothing is compiled: {why}"
    assert done.stderr.splitlines()[-1] == line and "Traceback" not in done.stderr
    assert checkpoint.read(tmp_path / "out")["step"] == 12


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "/cache"), KeyError("uid")])
def test_whatever_compiling_lacks_it_is_tried_once_and_said_by_one(error, monkeypatch, capsys):
    tried = []

    def fails(function):
        tried.append(function)
        raise error

    monkeypatch.setattr(torch, "compile", fails)
    compiled.can_compile.cache_clear()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert not compiled.can_compile(torch.device("cpu"))
    assert len(tried) == 1 and capsys.readouterr().err.count("\n") == 1
    compiled.can_compile.cache_clear()
    assert not compiled.can_compile(torch.device("cpu")) and capsys.readouterr().err == ""
    compiled.can_compile.cache_clear()


def test_a_cache_of_the_compiler_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    line = f"{folder} cannot be made (Not a directory), so TORCHINDUCTOR_CACHE_DIR is ignored\n"
    for said in (line, ""):  # once
        device.machine(settings.DEFAULTS | {"device": "cpu"})
        assert capsys.readouterr().err == said
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_kernels_that_a_killed_compiler_left_empty_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    for name, text, age in (("empty", "", 60), ("begun", "", 0), ("whole", "code", 60)):
        kernel = tmp_path / "ab" / f"{name}.so"
        kernel.write_text(text)
        os.utime(kernel, (time.time() - age,) * 2)
    compiled.sweep_cache()
    assert {path.stem for path in tmp_path.glob("ab/*")} == {"begun", "whole"}


# ---- Processors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("avx512", "amx", "maker", "dtype"),
    [
        (False, False, "AuthenticAMD", "float32"),
        (True, False, "AuthenticAMD", "bfloat16"),
        (True, False, "GenuineIntel", "float32"),
        (True, True, "GenuineIntel", "bfloat16"),
    ],
)
@pytest.mark.parametrize("system", ["linux", "windows"])
def test_bfloat16_is_chosen_where_the_processor_is_faster_with_it(
    avx512, amx, maker, dtype, system, monkeypatch
):
    def read_text(path, *_):
        if system == "windows":
            raise FileNotFoundError(path)
        return f"processor : 0\nvendor_id : {maker}\n"

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(device.Path, "read_text", read_text)
    monkeypatch.setattr(device.platform, "processor", lambda: f"Family 6, {maker}")
    device.is_by_intel.cache_clear()
    _, autocast = device.machine(settings.DEFAULTS | {"device": "cpu"})
    device.is_by_intel.cache_clear()
    assert device.dtype_name(autocast, torch.device("cpu")) == dtype


# ---- File systems without hard links -------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), AttributeError("link")])
def test_without_hard_links_checkpoints_are_copied(error, data, tmp_path, monkeypatch):
    def link(*_):
        raise error

    monkeypatch.setattr(os, "link", link)
    run(data, tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "ckpt.pt",
        "ckpt_12.pt",
        "ckpt_8.pt",
    ]
    assert (tmp_path / "ckpt_12.pt").read_bytes() == (tmp_path / "ckpt.pt").read_bytes()


# ---- Callers -------------------------------------------------------------------------------------


def test_a_run_in_a_thread_trains(data, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(data, tmp_path)))
    thread.start()
    thread.join()
    assert results[0]["tokens"] and checkpoint.read(tmp_path)["step"] == 12


def test_a_run_in_a_notebook_trains_and_its_data_are_prepared(data, tmp_path, monkeypatch):
    """A running event loop, and a main module that is no file."""
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))

    async def cell():
        prepared(data.parent / "text.txt", tmp_path / "data", workers=2)
        return run(tmp_path / "data", tmp_path / "out")

    assert asyncio.run(cell())["tokens"]


WITHOUT_GUARD = """
import sys
sys.path.insert(0, sys.argv[1])
from config import parse
from data import tokenizer, writer
print("once")
texts = [("train", "abc " * 300_000), ("train", "def " * 300_000), ("val", "abc def")]
writer.prepare(sys.argv[2], texts, tokenizer.Byte(), workers=2)
"""


@pytest.mark.parametrize("way", ["a script", "standard input"])
def test_a_script_without_a_guard_prepares_data_by_several_processes(way, tmp_path):
    (tmp_path / "script.py").write_text(WITHOUT_GUARD)
    with open(tmp_path / "script.py") as script:
        name = tmp_path / "script.py" if way == "a script" else "-"
        line = [sys.executable, name, ROOT, tmp_path / "out"]
        done = subprocess.run(line, stdin=script, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")
    assert len(loader.Tokens(tmp_path / "out", "train")) == 2_400_002


def test_one_batch_of_text_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ProcessPoolExecutor", None)
    writer.prepare(tmp_path, [("train", TEXT)], tokenizer.Byte(), workers=8)
    assert 1 <= writer.cores() <= min(61, os.cpu_count())


# ---- An environment that is there ----------------------------------------------------------------


def test_make_uses_a_python_that_is_named_and_has_torch():
    def plan(*line):
        outer = ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of the make that runs the tests
        env = {name: value for name, value in os.environ.items() if name not in outer}
        keys = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "check": True}
        return subprocess.run(["make", "-n", "-B", *line], **keys).stdout.splitlines()

    own, fresh = plan("demo", f"PYTHON={sys.executable}"), plan("demo")
    assert (
        own[0].startswith(f"{sys.executable} -m pip install")
        and "torch" not in own[0].split("$")[0]
    )
    assert not any(".venv" in line for line in own if not line.startswith(sys.executable))
    assert fresh[:1] == ["python3 -m venv .venv"] and ".venv/bin/python train.py" in fresh[4]
    lacking = subprocess.run(
        ["sh", "-c", own[0].replace(sys.executable, "echo")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {"numpy", "tiktoken", "requests", "tqdm", "safetensors"} <= {*lacking}
    assert not {"torch", "torch==2.13.0"} & {*lacking}
