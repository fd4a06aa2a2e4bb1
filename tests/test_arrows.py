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


def test_five_files_of_lib_import_the_method_or_the_network_and_none_another_script():
    scripts = {f"{name}.py" for name in ROOTS} - {"config.py"}
    arrows = {name: ARROWS[name] & scripts for name in FILES if name.startswith("lib/")}
    assert {name: files for name, files in arrows.items() if files} == {
        "lib/budget.py": {"model.py"},
        "lib/checkpoint.py": {"model.py"},
        "lib/formats.py": {"model.py"},
        "lib/resume.py": {"diffusion.py", "model.py"},
        "lib/rows.py": {"diffusion.py"},
    }


def test_data_are_prepared_and_read_without_the_method_or_the_network():
    for name in (name for name in FILES if name.startswith("data/")):
        others = {file for file in ARROWS[name] if not file.startswith("data/")}
        known = {"config.py", "lib/files.py", "lib/program.py"}
        assert others <= known, name
