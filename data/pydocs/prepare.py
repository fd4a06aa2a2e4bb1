"""The default text: English prose that every Python carries, about 2 MB, no download.

    python -m data.pydocs.prepare

Documents are the topics of Python's reference and, module by module, the docstrings of the standard library. They
differ between Python versions: the hash printed at the end says which text a result is about.
"""

import ast
import hashlib
import platform
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

from config import run
from data import tokenizer, writer

DEFAULTS = {
    "out": "data/pydocs",  # folder to prepare
}

HELD_OUT = 0.05  # of the documents, by a hash of their names
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}


def docstrings(path):
    """The docstrings of one source file in their order; it is parsed, never run."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return []  # lib2to3 carries files in Python 2
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in nodes if isinstance(node, kinds) and ast.get_docstring(node)]
    found.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has none: it comes first
    return [ast.get_docstring(node) for node in found]


def sources():
    """{name: texts} of all topics and modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not SKIP & set(path.relative_to(root).parts)]
    modules = {path.relative_to(root).as_posix(): docstrings(path) for path in files}
    return {f"topic {name}": [text] for name, text in sorted(topics.items())} | modules


def documents():
    """{name: text}, with each longer paragraph where it comes first only.

    Topics quote one another and modules share docstrings: a held-out paragraph must not be in the training text too.
    Paragraphs with a character beyond ASCII that only one document has are left out: nothing can be learnt about it.
    """
    everything = {name: re.split(r"\n\s*\n", "\n\n".join(texts)) for name, texts in sources().items()}
    users = Counter(c for paragraphs in everything.values() for c in set("".join(paragraphs)))
    rare = {c for c, count in users.items() if count == 1 and not c.isascii()}
    seen, kept = set(), {}
    for name, paragraphs in everything.items():
        new = []
        for paragraph in paragraphs:
            words = " ".join(paragraph.split())
            if words not in seen and not rare & set(paragraph):
                new.append(paragraph.rstrip())
            if len(words) >= 60:
                seen.add(words)
        kept[name] = "\n\n".join(new).strip("\n")
    return {name: text for name, text in kept.items() if text}


def main(config):
    texts = documents()
    split = [("val" if writer.held_out(name, HELD_OUT) else "train", text) for name, text in texts.items()]
    vocabulary = tokenizer.build(config["tokenizer"], texts.values())
    meta = writer.prepare(config["out"], split, vocabulary)
    digest = hashlib.sha256("\n\n".join(texts.values()).encode("utf8")).hexdigest()
    print(f"{writer.summary(config['out'], meta)}; {len(set().union(*texts.values()))} distinct characters")
    print(f"text of Python {platform.python_version()}, sha256 {digest}")


if __name__ == "__main__":
    run(main, sys.modules[__name__], writer)
