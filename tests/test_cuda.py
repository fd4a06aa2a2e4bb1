"""A GPU without one: what needs torch to believe in a card runs in a process of its own.

Each test here stands for the test of its name in on_cuda.py or on_h100.py, for all of its cases.
"""

import ast
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import ROOT

FILES = ["on_cuda.py", "on_h100.py"]
HERE = sys.platform == "linux" and shutil.which("g++") and not torch.version.cuda
pytestmark = pytest.mark.skipif(not HERE, reason="needs Linux, g++ and a torch without CUDA")


def names_in(file):
    """The tests of a file, which cannot be imported here."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return [node.name for node in functions if node.name.startswith("test_")]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """outcomes(FILE) -> {name of a test: its cases, XML of junit}; each file runs once."""
    ran, folder = {}, tmp_path_factory.mktemp("cuda")

    def run(file):
        if file not in ran:
            report = folder / f"{file}.xml"
            plugin = ["-p", "pretended_cuda", f"--junitxml={report}", "-o", "addopts="]
            command = [sys.executable, "-m", "pytest", *plugin, f"tests/{file}"]
            env = os.environ | {"PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"}
            keys = {"capture_output": True, "text": True, "timeout": 600}
            done = subprocess.run(command, cwd=ROOT, env=env, check=False, **keys)
            assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
            ran[file] = {}
            for case in ET.parse(report).iter("testcase"):
                ran[file].setdefault(case.get("name").split("[")[0], []).append(case)
        return ran[file]

    return run


@pytest.mark.parametrize(
    ("file", "name"), [(file, name) for file in FILES for name in names_in(file)]
)
def test_on_a_card_that_is_not_there(file, name, outcomes):
    cases = outcomes(file)[name]
    for case in cases:
        failed = [*case.iter("failure"), *case.iter("error")]
        assert not failed, f"{case.get('name')}\n{failed[0].text[-3000:]}"
    skipped = [each.get("message") for case in cases for each in case.iter("skipped")]
    if skipped:
        pytest.skip(skipped[0])
