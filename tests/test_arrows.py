"""Which file imports which: arrows run one way."""

import ast

import pytest
from conftest import ROOT

ROOTS = ("config", "diffusion", "model", "train", "samplers", "sample", "evaluate")
FOLDERS = ("lib", "data", "run", "evals", "view")
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


SCRIPTS = ("samplers.py", "sample.py", "evaluate.py", "train.py")
LAYERS = (  # what each may import stands in a line before it, or in the same place
    ("config.py",),
    ("lib/*.py",),
    ("data/*.py", "model.py", "diffusion.py"),
    ("run/*.py",),
    SCRIPTS,
    ("data/*/prepare.py", "evals/*.py", "view/*.py"),
)
PLACES = {  # {file: (layer, the place in it)}
    str(path.relative_to(ROOT)): (layer, place)
    for layer, places in enumerate(LAYERS)
    for place in places
    for path in ROOT.glob(place)
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_lower_layers_and_its_own_place_alone(name):
    layer, place = PLACES[name]
    beside = SCRIPTS if name in SCRIPTS else (place,)
    for other in ARROWS[name]:
        assert PLACES[other][0] < layer or PLACES[other][1] in beside, f"{name} imports {other}"


def test_data_are_prepared_and_read_without_the_method_or_the_network():
    for name in (name for name in FILES if name.startswith("data/")):
        others = {file for file in ARROWS[name] if not file.startswith("data/")}
        known = {"config.py", "lib/files.py", "lib/program.py"}
        assert others <= known, name
