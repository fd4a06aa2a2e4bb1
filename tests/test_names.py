"""Any name, any home, any variable, any folder called like something else."""

import gzip
import importlib
import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT
from test_environment import AS_FILES, SAMPLE, SOURCES, TEXT, TEXT_OF, command, exit_code, prepared
from test_train import run, words

import config as settings
import evaluate
import train
from config import UserError, parse
from data import download, loader, writer
from data.text import prepare
from data.tokenizer import GPT2
from lib import parallel
from lib.files import optional
from run import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    (folder / "text.txt").write_text(TEXT, encoding="utf8")
    return prepared(folder / "text.txt", folder / "data")


# ---- Names ---------------------------------------------------------------------------------------

NAMES = ["~tilde", "a, b", "CAPITALS.D", "caf\udce9", "日本 “語”", "-dash"]
NAMES += ["[x]*?", "a=b", "%s {}"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_of_a_folder_is_taken_from_text_to_sample(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    Path(name, "Text.TXT").write_text(TEXT, encoding="utf8")
    folder = f"./{name}"
    prepared(folder, f"{folder}/data")
    for steps in (2, 4):  # resumed
        run(f"{folder}/data", f"{folder}/out", max_iters=steps, keep=2, lr_decay="constant")
    assert checkpoint.read(f"{folder}/out")["step"] == 4
    line = [f"--ckpt={folder}/out", f"--out={folder}/s.jsonl", "--steps=2", "--device=cpu"]
    assert exit_code(monkeypatch, SAMPLE, *line) == 0
    keys = {"ckpt": f"{folder}/out", "data": f"{folder}/data", "sequences": 2, "draws": 2}
    line = [f"--{key}={value}" for key, value in keys.items()]
    assert evaluate.main(parse(line, *evaluate.MODULES))["tokens"] == 32
    checkpoint.export(f"{folder}/out", f"{folder}/exported", "nanomdm")
    assert checkpoint.load(f"{folder}/exported")[0].block_size == 16
    assert os.listdir(tmp_path) == [name]
    assert exit_code(monkeypatch, SAMPLE, f"--ckpt={folder}/none") == 2
    assert capsys.readouterr().err.count("\n") == 1


TEXTS = {"prompt", "suffix", "template", "size", "split", "wandb", "device", "set", "sets", "tasks"}
TEXTS |= {"code", "only", "keys", "sizes", "budgets", "batches", "gpus", "text", "operations"}
TEXTS |= {"temperatures", "epochs"}


def test_each_key_of_text_is_known_to_name_a_path_or_not():
    for name in (name for name in SOURCES if "\nDEFAULTS = {" in TEXT_OF[name]):
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        texts = {key for key, value in module.DEFAULTS.items() if isinstance(value, str)}
        unknown = texts - settings.allowed(module).keys() - settings.PATHS - TEXTS
        assert not unknown, f"{name}: does {unknown} name a path? Then it belongs to config.PATHS"
    assert not settings.PATHS & TEXTS


@pytest.mark.parametrize("key", sorted(settings.PATHS))
def test_a_tilde_is_the_home_folder_in_keys_that_name_paths(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    module = types.SimpleNamespace(DEFAULTS={key: "", "prompt": ""})
    monkeypatch.setattr(settings, "key_block", lambda _: "")
    config = parse([f"--{key}=~/a,b,~/c", "--prompt=~/a"], module)
    assert config[key] == f"{tmp_path}/a,b,{tmp_path}/c" and config["prompt"] == "~/a"
    for kept in ("a~/b", "./~/b", "a ~/b"):
        assert parse([f"--{key}={kept}"], module)[key] == kept
    with pytest.raises(
        UserError, match=r"^--.*: no home folder ~no.such/x; a folder with that name is"
    ):
        parse([f"--{key}=~no.such/x"], module)
    monkeypatch.chdir(tmp_path)
    Path("~$doc.txt").touch()  # what an office program leaves beside a file
    assert parse([f"--{key}=~$doc.txt"], module)[key] == "~$doc.txt"


def test_a_preset_may_name_paths_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text('\ufeff{"out_dir": "~/run"}', encoding="utf8")
    assert parse(["~/mine.py"], train)["out_dir"] == f"{tmp_path}/run"


def test_files_that_systems_keep_for_themselves_are_no_text(tmp_path):
    junk = ["._book.txt", ".DS_Store", "Thumbs.db", "desktop.ini", ".git/x.txt", "__MACOSX/b.txt"]
    junk += ["sub/._b.jsonl", ".ipynb_checkpoints/b.txt", "sub/.hidden.txt.gz"]
    for name in [*junk, "book.txt", "sub/b.TXT"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(TEXT.encode() if "._" not in name else b"\0\5\x16\7\0\xff")
    names = [path.relative_to(tmp_path).as_posix() for path in prepare.find(tmp_path)]
    assert names == ["book.txt", "sub/b.TXT"]
    hidden = tmp_path / ".git"  # but what is named itself is taken
    assert prepare.find(hidden) == [hidden / "x.txt"]


def test_such_files_in_folders_of_ours_do_no_harm(data, tmp_path):
    folder, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    run(folder, out, max_iters=2, keep=2)
    for name in ("._train_00000.bin", "._meta.json", "._ckpt.pt", "._ckpt_4.pt", ".DS_Store"):
        (folder / name).write_bytes(b"\0\5\x16\7")
        (out / name).write_bytes(b"\0\5\x16\7")
    assert len(loader.Tokens(folder, "train")) == len(loader.Tokens(data, "train"))
    run(folder, out, max_iters=4, keep=2)
    assert checkpoint.read(out)["step"] == 4 and checkpoint.load(out)[0].block_size == 16


def test_kinds_of_files_are_told_whatever_their_case(tmp_path):
    record = json.dumps({"text": "abc"})
    (tmp_path / "A.JSONL").write_text(record, encoding="utf8")
    with gzip.open(tmp_path / "B.Txt.GZ", "wt", encoding="utf8") as file:
        file.write("defg")
    assert list(prepare.documents([tmp_path])) == ["abc", "defg"]


def test_a_comma_may_be_part_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c.txt", "d,", "e,f,g"):
        Path(name).touch()
    assert writer.listed("a,b.txt,c.txt,d,,e,f,g,none") == [
        "a,b.txt",
        "c.txt",
        "d,",
        "e,f,g",
        "none",
    ]
    assert writer.listed(",c.txt,,") == ["c.txt"] and writer.listed("") == []


# ---- Home and cache ------------------------------------------------------------------------------


CACHES = {
    "the one that is given": ({"NANOMDM_CACHE": "/given"}, "/given"),
    "the system's": ({"XDG_CACHE_HOME": "/caches", "HOME": "/home/me"}, "/caches/nanomdm"),
    "at home": ({"HOME": "/home/me", "NANOMDM_CACHE": "", "XDG_CACHE_HOME": ""}, None),
    "no home": ({}, "there is no home folder for downloads; set NANOMDM_CACHE to a folder"),
}


@pytest.mark.parametrize("case", CACHES)
def test_the_cache_of_downloads(case, monkeypatch):
    variables, wanted = CACHES[case]
    for name in ("HOME", "NANOMDM_CACHE", "XDG_CACHE_HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    unknown = types.SimpleNamespace(getpwuid={}.__getitem__)
    monkeypatch.setitem(sys.modules, "pwd", unknown)  # nobody knows this user
    if case == "no home":
        with pytest.raises(UserError, match=wanted):
            download.cache()
    else:
        assert download.cache() == Path(wanted or "/home/me/.cache/nanomdm")


def test_a_cache_that_cannot_be_written_is_one_line_that_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOMDM_CACHE", str(tmp_path / "file" / "cache"))
    message = r"^cannot write .*/config.json: Not a directory; set NANOMDM_CACHE to another folder$"
    with pytest.raises(UserError, match=message):
        download.hub_file("owner/name", "config.json")
    with pytest.raises(UserError, match=r"config.json: Not a directory$"):
        download.hub_file("owner/name", "config.json", tmp_path / "file" / "mine")


def test_a_tokenizer_whose_cache_cannot_be_written_is_one_line(monkeypatch):
    def get_encoding(name):
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)
    with pytest.raises(UserError, match=r"\(PermissionError\).* set TIKTOKEN_CACHE_DIR to a"):
        GPT2()


# ---- Variables, folders and packages -------------------------------------------------------------

HEEDED = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def test_the_variables_of_torchrun_are_heeded_where_all_are_there(capsys):
    assert parallel.launched(HEEDED) == (4, 3, 3)
    assert parallel.launched(HEEDED | {"LOCAL_RANK": "1"}) == (4, 3, 1)
    assert parallel.launched({}) == parallel.launched({"WORLD_SIZE": "1"}) == (1, 0, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("lacks", HEEDED)
def test_a_variable_alone_is_not_heeded_and_a_line_says_so(lacks, capsys):
    for env in ({lacks: "4"}, {**HEEDED, lacks: ""}):
        assert parallel.launched(env) == (1, 0, 0)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "this is one process" in err and lacks in err


ODD = [{"RANK": "4"}, {"WORLD_SIZE": "x"}, {"RANK": "-1"}, {"RANK": "²"}]


@pytest.mark.parametrize("odd", ODD)
def test_variables_that_make_no_sense_are_one_line(odd):
    with pytest.raises(UserError, match="WORLD_SIZE, RANK and LOCAL_RANK must be whole numbers"):
        parallel.launched(HEEDED | odd)


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "matplotlib", "sentencepiece"])
def test_a_folder_called_like_an_optional_package_is_none(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    before = dict(sys.modules)
    try:
        sys.modules.pop(name, None)
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"^it needs one more package: pip install {name}$"):
            optional(name, "it")
        sys.modules.pop(name, None)
        (tmp_path / name / "__init__.py").write_text("1 / 0")
        with pytest.raises(UserError, match=rf"needs {name}, which does not load here \(division"):
            optional(name, "it")
        (tmp_path / name / "__init__.py").write_text("")
        assert optional(name, "it").__name__ == name
    finally:
        sys.modules.pop(name, None)
        sys.modules.update(before)


def test_ours_win_over_packages_of_their_names_from_any_folder(data, tmp_path):
    """A program of the root, and one of a folder run as a file: other packages, other folder."""
    for name in ("config", "data", "diffusion", "evals", "lib", "model", "run", "view"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "__init__.py").write_text("raise SystemExit(9)")
    keys = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "other"), "PYTHONIOENCODING": "ascii"}
    line = ["--input=text.txt", "--val_fraction=0.3", "--workers=1"]
    shutil.copy(data.parent / "text.txt", tmp_path)
    done = command(ROOT / "data/text/prepare.py", *line, **keys)
    assert done.returncode == 0 and (tmp_path / "data/text/meta.json").exists(), done.stderr
    line = words("data/text", "run", max_iters=2, show_sample=True, compile=False)
    done = command(ROOT / "train.py", "configs/pydocs.py", *line, **keys)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "run" / "ckpt.pt").exists() and "---- a sample" in done.stdout


HELPS = """
import contextlib, io, runpy, sys
path, before = sys.path[1:], set(sys.modules)
import numpy, torch
for file in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] in %r]:
        del sys.modules[name]
    sys.path[:], sys.argv = [file.rpartition("/")[0], *path], [file, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(file, run_name="__main__")
    print(file, "usage:" in said.getvalue())
"""


def test_programs_of_folders_run_as_files_from_any_folder(tmp_path):
    ours = sorted({Path(name).parts[0].removesuffix(".py") for name in SOURCES})
    files = [str(ROOT / name) for name in AS_FILES]
    done = command("-c", HELPS % ours, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{file} True" for file in files] and len(files) > 15


def test_a_preset_is_looked_for_here_and_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.read_preset("configs/pydocs.py")
    Path("configs").mkdir()
    Path("configs/pydocs.py").write_text("{'n_layer': 3}")
    assert settings.read_preset("configs/pydocs.py") == {"n_layer": 3}
    with pytest.raises(UserError, match=r"no preset file nowhere/x.py; there is: .*pydocs.py"):
        settings.read_preset("nowhere/x.py")


def test_what_prepares_data_is_named_as_it_runs_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"prepare it with: python -m data.gsm8k.prepare"):
        loader.read_meta(tmp_path / "gsm8k")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=f"prepare it with: python {ROOT}/data/text/prepare.py --in"
    ):
        loader.read_meta("mine")
