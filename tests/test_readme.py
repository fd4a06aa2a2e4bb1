"""README and docs/ do what they say: their code and commands run, and what they name exists."""

import json
import os
import re
import runpy
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import plain
import pytest
import torch
from conftest import ROOT

import diffusion
import model as network
import samplers
from data import writer
from data.tokenizer import Char
from run import checkpoint

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf8") for path in PAGES}
README, INDEX = TEXTS["README.md"], TEXTS["docs/INDEX.md"]
TEXT = "The list is sorted by name and the result is returned. It was a dark night.\n"
SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 128}

# What a program is told besides, so that it is done in a second.
TRAIN = "--max_iters=2 --eval_interval=2 --eval_sequences=2 --eval_draws=2 --batch_size=2 --size= "
TRAIN += "--micro_batch_size=0 --compile=False --show_sample=False --resume=False --device=cpu "
OF_DATA = ("--sequences=2", "--strata=2")
SHORT = {
    "train.py": TRAIN + " ".join(f"--{key}={value}" for key, value in SHAPE.items()),
    "sample.py": "--steps=2 --num_samples=1 --device=cpu",
    "evaluate.py": "--sequences=2 --draws=2 --strata=2 --device=cpu",
    "-m run.checkpoint": "",
    "-m view.page": "",
    "-m data.text.prepare": "--workers=1",
    "-m data.pairs.prepare": "",
    "-m evals.choice": "--draws=2",
    "-m evals.quality": "--num_samples=2 --steps=2 --judge_draws=2 --length=8",
    "-m experiments.loss_audit": "--quick",
    "-m experiments.annealing": "--quick",
    "-m experiments.scaling_up": "",
}
LEFT_OUT = {  # what is not run here, and why
    "-m evals.zeroshot": "five sets from the network",
    "-m evals.harness": "a large package; test_harness.py runs it",
    "-m pytest": "the checks of the exercises; below",
    "-m pip": "installs",
    "-m data.pydocs.prepare": "reads all of Python's library; test_data.py runs it",
}
PUBLISHED = r"JingyangOu/[\w-]+|nieshen/SMDM/\S+"  # in their place stands a network of ours


def blocks(page, language=""):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[page], re.S | re.M)
    return [block for kind, block in fenced if kind == language]


def commands(page):
    """[(program, its words)] of the commands in the blocks of a page."""
    lines = re.findall(r"^(?:.*/)?(?:python|torchrun \S+) (.*)", "".join(blocks(page)), re.M)
    split = [shlex.split(line, comments=True) for line in lines]
    return [(w[0], w[1:]) if w[0] != "-m" else (" ".join(w[:2]), w[2:]) for w in split]


def run(program, words):
    """Run a program in this process, where torch is loaded already."""
    name, argv = program.removeprefix("-m "), sys.argv
    module = sys.modules.get(name)
    try:
        sys.argv = [name, *words]
        if program.startswith("-m"):
            sys.modules.pop(name, None)  # or runpy warns
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{program} {' '.join(words)} ends with {stop.code}"
    finally:
        sys.argv = argv
        sys.modules |= {name: module} if module else {}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the files that the pages name, and out/pydocs, which has learnt nothing."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(ROOT / "configs", folder / "configs")
    tokenizer = Char("".join(sorted({*string.printable, *"\0"})))
    documents = [("train", TEXT * 40), ("val", TEXT * 40)]
    writer.prepare(folder / "data/pydocs", documents, tokenizer)
    model = network.make_network({**plain.DEFAULTS, **SHAPE, "vocab_size": tokenizer.vocab_size})
    config = model.config | {"objective": "any_order", "data": "data/pydocs"}
    state = {"config": config, "tokenizer": tokenizer.meta(), "model": model.state_dict()}
    state |= {"ema": None, "optimizer": [], "step": 1}
    checkpoint.save(folder / "out/pydocs/ckpt.pt", state)
    (folder / "mine.txt").write_text("".join(f"{i} {TEXT}\n" for i in range(3000)))
    pair = {"prompt": "What is {}?", "completion": " A list, of {}."}
    lines = [{key: each.format(i) for key, each in pair.items()} for i in range(99)]
    question = {"context": "A list is", "options": [" sorted", " dark"], "gold": 0}
    for name, rows in (("mine", lines), ("questions", [question])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, model


def test_the_lines_of_the_library_run_as_printed_and_do_what_they_say(world, monkeypatch):
    folder, model = world
    monkeypatch.chdir(folder)
    (lines,) = blocks("README.md", "python")
    names = {}
    exec(lines, names)
    V, mask_id = model.vocab_size, model.mask_id
    assert names["p"].shape == (4, V) and torch.allclose(names["p"].sum(1), torch.ones(4))
    assert names["info"]["nfe"].item() <= 4
    kept = names["x"] != mask_id
    assert kept.sum() + 4 == kept.numel() and torch.equal(names["x0"][kept], names["x"][kept])
    assert (names["x0"] != mask_id).all()
    assert names["nats"].shape == (1,) and names["nats"].item() > 0
    assert names["loss"].requires_grad and names["loss"].item() > 0


def test_every_command_of_readme_and_faq_runs_in_its_short_form(world, monkeypatch, capsys):
    monkeypatch.chdir(world[0])
    done = set()
    for program, words in commands("README.md") + commands("docs/FAQ.md"):
        if program in LEFT_OUT:
            continue
        assert program in SHORT, f"say in SHORT how {program} is done in a second"
        words = [re.sub(PUBLISHED, "out/pydocs", word) for word in words]
        given = {word.partition("=")[0] for word in words}
        unfit = OF_DATA if "--text" in given else ()  # there are no sequences to be few of
        unfit += ("--eval_draws=2",) * ("--objective=ar" in words)  # exact, as any_order's calls
        unfit += ("--steps=2",) * ("--sampler=any_order" in words)
        words += [word for word in SHORT[program].split() if word not in unfit]
        if program == "train.py":  # what other commands need is not trained anew
            words += ["--data=data/pydocs"] * ("--data" not in given)
            words += ["--out_dir=out/short"] * ("--out_dir" not in given)
        if (program, *words) not in done:
            run(program, words)
            done.add((program, *words))
    for made in ("out/mine/ckpt.pt", "out/answers/ckpt.pt", "exported/model.safetensors"):
        assert Path(made).is_file(), made
    assert len(done) > 20
    nouns = "block|call|character|document|draw|example|order|question|row|sample|step|token"
    said = "".join(capsys.readouterr())
    assert "1 document," in said and not re.findall(rf"(?<![\w.,])1 (?:\w+ )?(?:{nouns})s\b", said)


def test_every_program_and_key_that_a_page_names_is_there(capsys):
    keys_of = {}
    for page in TEXTS.values():
        for program, rest in re.findall(r"python (-m [\w.]+|\w+\.py)((?: [^`\n#|]*)?)", page):
            keys_of.setdefault(program, set()).update(re.findall(r" --(\w+)", rest))
    for page in ("README.md", "docs/FAQ.md"):  # also what torchrun starts
        for program, words in commands(page):
            keys_of[program] |= {word[2:].partition("=")[0] for word in words if word[:2] == "--"}
    assert {"train.py", "sample.py", "-m run.checkpoint", "-m evals.choice"} <= keys_of.keys()
    for program, keys in keys_of.items():
        if program in ("-m pip", "-m pytest", "-m venv", "mine.py") or "NAME" in program:
            continue
        name = program.removeprefix("-m ")
        path = name if program.endswith(".py") else name.replace(".", "/") + ".py"
        assert (ROOT / path).is_file(), f"a page names {program}"
        run(program, ["--help"])
        help_text = capsys.readouterr().out
        for key in keys - {"help"}:
            assert f'"{key}":' in help_text, f"a page gives {program} the key --{key}"


def test_what_the_pages_link_to_is_there():
    for page, text in TEXTS.items():
        links = re.findall(r"\]\(([^)#]+)\)|src(?:set)?=\"([^\"]+)\"", text)
        for link in (a or b for a, b in links):
            if not link.startswith("http"):
                assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_the_make_targets_that_readme_names_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_make_says_what_it_would_do_for_the_demo():
    env = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    done = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert "train.py configs/pydocs.py" in done.stdout and "sample.py" in done.stdout


def test_the_worked_numbers_of_readme_are_right():
    def cells(name):
        return re.search(rf"^\| {name} \|(.*)\|$", README, re.M)[1].split("|")

    steps = [int(cell.replace(",", "")) for cell in cells("steps")[:-1]]
    for n, said in zip(steps, cells("expected calls"), strict=False):
        r = samplers.unmask_schedule(diffusion.loglinear, n)
        assert float(said) == pytest.approx(samplers.expected_nfe(r, 128), abs=0.051)
    noise = torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    u = (torch.arange(300) + 0.5) / 300  # (300,) k is 1, 2 and 3 in a third of them each
    mask, weight = diffusion.draw_mask("any_order", u, noise)
    k = mask.sum(1)  # (300,) and h_k = k nats
    assert (weight * k * k).unique().tolist() == pytest.approx([3, 6, 9])
    assert (weight * k * k).mean().item() == pytest.approx(6)
    assert (k * k).double().mean().item() == pytest.approx(4.7, abs=0.05)


def test_readme_is_shorter_than_220_lines():
    assert len(README.splitlines()) < 220


def test_each_exercise_fails_until_it_is_solved_and_says_what_is_missing():
    command = [sys.executable, "-m", "pytest", "docs/exercises.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    asked = re.findall(r"\(`-k (\w+)`\)", TEXTS["docs/LEARN.md"])
    assert len(asked) == 10 == done.stdout.count("FAILED docs/exercises.py::")
    for name in asked:
        said = re.search(rf"_ test_{name} _+\n(.*)\n", done.stdout)[1]
        assert re.fullmatch(r".*ANSWERS\['\w+'\] is still None|[\w.]+ has no '\w+' yet", said)


def rows(heading):
    """The rows of the table below a heading of the index, as lists of their cells."""
    part = INDEX.split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return lines[1:]


@pytest.mark.parametrize("paper", ["RADD", "SMDM"])
def test_every_place_in_the_index_exists(paper):
    tests = "".join(path.read_text(encoding="utf8") for path in (ROOT / "tests").glob("test_*.py"))
    for what, code, test, experiment in rows(paper):
        for path, name in re.findall(r"`([\w/]+\.py)(?::(\w+))?`", code):
            source = (ROOT / path).read_text(encoding="utf8")
            defined = rf"^ *(def|class) {name}\(" if name else ""
            assert re.search(defined, source, re.M), f"{what}: {path}:{name}"
        for name in re.findall(r"`(\w+)`", test):
            assert f"def {name}(" in tests, f"{what}: {name}"
        for name in re.findall(r"`(\w+)`", experiment):
            assert (ROOT / f"experiments/{name}.py").is_file(), f"{what}: {name}"


def test_the_code_names_every_equation_and_claim_of_the_index_where_it_is():
    for paper in ("RADD", "SMDM"):
        for what, code, _, _ in rows(paper):
            files = re.findall(r"`([\w/]+\.py)", code)
            source = "".join((ROOT / path).read_text(encoding="utf8") for path in files)
            named = " ".join(re.findall(r"RADD eq\. ((?:[A-Z\d.]+,? ?)+)", source))
            for equation in re.findall(r"\b[\dA-Z]\.\d+", what if "eq. " in what else ""):
                assert equation in re.findall(r"[A-Z\d]+\.\d+", named), f"RADD eq. {equation}"
            assert not files or paper in source, what
