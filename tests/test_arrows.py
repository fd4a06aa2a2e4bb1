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
            folder, names = ROOT / node.module.replace(".", "/"), [each.name for each in node.names]
            own = any(not (folder / f"{name}.py").is_file() for name in names)
            yield from (node.module, f"{node.module}.__init__") if own else (node.module,)
            yield from (f"{node.module}.{name}" for name in names)


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


def test_data_are_read_without_a_network_and_prepared_without_one_but_for_its_tokenizer():
    for name in (name for name in FILES if name.startswith("data/")):
        others = {file for file in ARROWS[name] if not file.startswith("data/")}
        known = {"config.py", "lib/files.py", "lib/program.py"}
        known |= {"run/__init__.py"} if name.endswith("prepare.py") else set()  # load_checkpoint
        assert others <= known, name
