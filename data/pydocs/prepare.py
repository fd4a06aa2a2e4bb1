"""The default text: English prose that every Python carries, about 2 MB, no download.

    python -m data.pydocs.prepare

The documents are the topics of Python's reference and, module by module, the docstrings of the
standard library. They differ between Python versions: the hash printed at the end identifies the
text behind a result.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too

import ast
import hashlib
import platform
import re
import sysconfig
from collections import Counter
from pydoc_data.topics import topics

from data import tokenizer, writer
from lib import program
from run import load_checkpoint

DEFAULTS = {
    "out": "data/pydocs",  # folder to prepare
}

HELD_OUT = 0.05  # fraction of the documents, by a hash of their names
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}


def docstrings(path):
    """The docstrings of one source file in order; it is parsed, never run."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return []  # lib2to3 contains Python 2 files
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in nodes if isinstance(node, documented) and ast.get_docstring(node)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has none and comes first
    return [ast.get_docstring(node) for node in nodes]


def sources():
    """{name: texts} of all topics and modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root): path for path in sorted(root.rglob("*.py"))}
    paths = {name: path for name, path in paths.items() if not SKIP & set(name.parts)}
    modules = {name.as_posix(): docstrings(path) for name, path in paths.items()}
    return {f"topic {name}": [text] for name, text in sorted(topics.items())} | modules


def documents():
    """{name: text}, with only the first occurrence of each longer paragraph.

    Topics quote one another and modules share docstrings, but a held-out paragraph must not also be
    in the training text. Paragraphs with a non-ASCII character that only one document has are left
    out, since nothing can be learnt about it.
    """
    joined = {name: "\n\n".join(texts) for name, texts in sources().items()}
    split = {name: re.split(r"\n\s*\n", text) for name, text in joined.items()}
    users = Counter(c for paragraphs in split.values() for c in set("".join(paragraphs)))
    rare = {c for c, count in users.items() if count == 1 and not c.isascii()}
    seen, kept = set(), {}
    for name, paragraphs in split.items():
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
    split_of = {name: "val" if writer.is_held_out(name, HELD_OUT) else "train" for name in texts}
    pairs = [(split_of[name], text) for name, text in texts.items()]
    vocabulary = tokenizer.named(config["tokenizer"], texts.values(), load_checkpoint)
    meta = writer.prepare(config["out"], pairs, vocabulary)
    digest = hashlib.sha256("\n\n".join(texts.values()).encode("utf8")).hexdigest()
    characters = len(set().union(*texts.values()))
    print(f"{writer.summary(config['out'], meta)}; {characters} distinct characters")
    print(f"text of Python {platform.python_version()}, sha256 {digest}")


if __name__ == "__main__":
    program.run(main, sys.modules[__name__], tokenizer)
