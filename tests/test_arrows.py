"""Which file imports which: arrows run one way."""

import ast

import pytest
from conftest import ROOT

ROOTS = ("config", "diffusion", "model", "train", "samplers", "sample", "evaluate")
FOLDERS = ("lib", "data", "evals", "view")
FILES = [f"{name}.py" for name in ROOTS]
FILES += [str(path.relative_to(ROOT)) for name in FOLDERS for path in (ROOT / name).rglob("*.py")]


def modules_of(name):
    """The modules, and names in them, that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# {file: those of FILES that it imports}
ARROWS = {
    name: {f"{module.replace('.', '/')}.py" for module in modules_of(name)} & {*FILES}
    for name in FILES
}


def test_no_file_imports_itself_by_way_of_others():
    left = dict(ARROWS)
    while ends := [name for name, files in left.items() if not files & left.keys()]:
        for name in ends:
            del left[name]
    assert not left, f"in a cycle, or on the way to one: {sorted(left)}"


@pytest.mark.parametrize("name", ROOTS)
def test_a_script_of_the_root_imports_none_that_evaluates_or_shows_it(name):
    first = {module.split(".")[0] for module in modules_of(f"{name}.py")}
    assert first and not first & {"evals", "experiments", "view"}


def test_no_file_of_lib_imports_a_script_that_is_run():
    for name in (name for name in FILES if name.startswith("lib/")):
        assert not ARROWS[name] & {"train.py", "samplers.py", "sample.py", "evaluate.py"}, name
