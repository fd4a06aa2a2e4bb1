"""Whatever is typed or lies in a file: it is taken, or refused in one line that leaves no trace.

Nothing in a file is run. The cases are drawn by hypothesis, in the same order every time;
NANOMDM_FUZZ=20 tries twenty times as many.
"""

import builtins
import copy
import functools
import gzip
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
import evaluate
import lib.program
import model as network
import sample
import train
from config import UserError
from data import choice, download, examples, loader, ngram, tokenizer, writer
from data.fineweb import prepare as fineweb
from data.pairs import prepare as pairs
from data.text import prepare as text
from evals import harness, quality, zeroshot
from experiments import plot_log
from lib.files import whole_file
from run import checkpoint, formats

RAN, PLANNED = Counter(), {}  # cases by the name of their test
SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 5}


def cases(number, **strategies):
    """A test run on so many drawn cases, counted."""

    def wrap(test):
        @functools.wraps(test)
        def counted(*fixtures, **drawn):
            RAN[test.__name__] += 1
            test(*fixtures, **drawn)

        many = number * int(os.environ.get("NANOMDM_FUZZ", 1))
        PLANNED[test.__name__] = many
        quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
        keys = {"derandomize": True, "database": None, "deadline": None}
        options = settings(max_examples=many, suppress_health_check=quiet, **keys)
        return options(given(**strategies)(counted))

    return wrap


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory):
    """A working folder without data; no network; 2 GiB of address space beyond what is in use."""
    folder = tmp_path_factory.mktemp("fuzz")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NANOMDM_CACHE", "cache")
        patch.setattr(download, "fetch", nothing_there)
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, hard))
        yield folder
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def nothing_there(url, path, **_):
    assert Path("cache").resolve() in Path(path).resolve().parents
    raise UserError(f"cannot fetch {url}")


def attempt(function, *arguments, **keys):
    """What a call returns, or None where it is refused in one line; all else is a finding."""
    try:
        return function(*arguments, **keys)
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 100_000
        return None


def listing(folder):
    """{path: content} of all that a folder holds."""
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


@contextmanager
def untouched(folder):
    """The block may change nothing in the folder."""
    before = listing(folder)
    yield
    assert listing(folder) == before


# ---- What is drawn -------------------------------------------------------------------------------

ODD = ["", "\0", "\ud800", "\udcff", "..", "../../etc/passwd", "/etc/passwd", "/dev/null", "."]
ODD += ["/", "~", "a/b/c", "a,b", "0", "1", "2", "-1", "1_000", "nan", "inf", "1e999"]
ODD += ["0x" + "f" * 5000, "9" * 5000, "٣", "True", "None", "x" * 300, "\n", "\x1b[31m", "%s%n"]
ODD += ["{0.__class__}", "$(touch ran)", "__import__('os').system('touch ran')", "out/x", "o/radd"]
words = st.sampled_from(ODD) | st.text(max_size=12)
edges = [0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**400]
numbers = st.integers() | st.floats() | st.sampled_from(edges)
leaves = st.none() | st.booleans() | numbers | words


def nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)


trees = st.recursive(leaves, nested, max_leaves=6)
DEEP = ["[" * 20_000, "{'a':" * 9_000, "-" * 9_000 + "1", "1" + "+1" * 9_000, "(" * 90 + ")" * 90]
DEEP += ['{"a": ' * 80 + "1" + "}" * 80]


def edited(draw, tree, values):
    """A copy of a tree of dicts and lists, one to three things replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node, parent = tree, None
        while isinstance(node, (dict, list)) and node:
            if parent is not None and not draw(st.integers(0, 3)):
                break
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            node, parent = node[key], node
        if parent is None:
            return draw(values)
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            del parent[key]
        else:
            new = action == "add" and isinstance(parent, dict)
            parent[draw(words) if new else key] = draw(values)
    return tree


def torn(draw, data):
    """Bytes that were cut, blotted out, doubled or written over somewhere."""
    a, b = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
    blot = st.sampled_from([b"", data[a:b] * 2, b"\0" * (b - a), b"\xff" * (b - a)])
    return data[:a] + draw(blot | st.binary(max_size=20)) + data[b:]


@st.composite
def json_files(draw, tree):
    """The bytes of a JSON file that was edited or torn."""
    kind = draw(st.integers(0, 7))
    if kind == 0:
        return draw(st.sampled_from(DEEP)).encode()
    text = json.dumps(edited(draw, tree, trees), ensure_ascii=draw(st.booleans()))
    data = text.encode("utf8", "surrogatepass")
    data = data.replace(b'"2"', b"9" * 5000)  # more digits than Python reads
    return torn(draw, data) if kind == 1 else data


# ---- Command lines, presets, templates -----------------------------------------------------------

PROGRAMS = {
    "train": (train.main, train.MODULES),
    "sample": (sample.main, sample.MODULES),
    "evaluate": (evaluate.main, evaluate.MODULES),
    "zeroshot": (zeroshot.main, (*evaluate.MODULES, zeroshot)),
    "harness": (harness.main, harness.MODULES),
    "checkpoint": (checkpoint.main, [checkpoint]),
    "plot_log": (lambda given: plot_log.main(given | {"folders": [given["out"]]}), [plot_log]),
}


@st.composite
def command_lines(draw):
    """(program, its words): known and unknown keys, sound and odd values, no settings at all."""
    name = draw(st.sampled_from(sorted(PROGRAMS)))
    known = {key: value for module in PROGRAMS[name][1] for key, value in module.DEFAULTS.items()}
    key = st.sampled_from(sorted(known)) | st.sampled_from(sorted(known)) | words
    value = words | numbers.map(str) | st.sampled_from(sorted(map(str, known.values())))
    setting = st.builds("--{}={}".format, key, value)
    other = words | words.map("{}.py".format) | words.map("--{}".format)
    return name, draw(st.lists(setting | setting | other, max_size=4))


def command(name, argv):
    """Run a program as its command does: exit code 2 comes with one line, which is returned."""
    main, modules = PROGRAMS[name]
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(sys, "argv", [f"{name}.py", *argv])
        patch.setattr(sys, "stderr", said)
        patch.setattr(sys, "stdout", io.StringIO())
        try:
            lib.program.run(main, *modules)
        except SystemExit as stop:
            line = said.getvalue()
            assert stop.code == 2 and line.count("\n") == 1 and line.startswith(f"{name}.py: ")
            return line


@cases(500, line=command_lines())
def test_any_command_line_is_taken_or_refused_in_one_line(place, line):
    with untouched(place):
        command(*line)


def literal(tree):
    """A tree as Python writes it, whole numbers in base 16: those may have any length."""
    if isinstance(tree, dict):
        items = ", ".join(f"{literal(key)}: {literal(value)}" for key, value in tree.items())
        return "{" + items + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(literal, tree)) + "]"
    return hex(tree) if type(tree) is int else repr(tree)


@st.composite
def presets(draw):
    """The bytes of a preset: one Python literal, or nearly so."""
    keys = st.sampled_from(["n_layer", "learning_rate", "compile", "data", "out_dir"]) | words
    values = trees | st.just(16**5000)
    kind = draw(st.integers(0, 9))
    if kind < 2:
        return draw(st.sampled_from(DEEP)).encode() if kind else draw(st.binary())
    data = literal(draw(st.dictionaries(keys, values, max_size=3))).encode("utf8", "replace")
    return torn(draw, data) if kind < 5 else data


@cases(400, preset=presets())
def test_any_preset_is_taken_or_refused_in_one_line(place, preset):
    (place / "preset.py").write_bytes(preset)
    with untouched(place):
        command("train", ["preset.py"])


GAPS = ["___", "___0", "___3", "___٣", "___²", "__4", "___-1", "___1e3", "___9999999"]
GAPS += ["___" + "9" * 5000]
pieces = words | st.sampled_from(GAPS) | st.integers(0, 9).map("___{}".format)
templates = st.lists(pieces, max_size=5).map("".join)
VOCABULARIES = [tokenizer.Byte(), tokenizer.Char("ab_ 12")]


def network_of(V, block_size):
    """What a request asks of its network."""
    return SimpleNamespace(mask_id=V, start_id=V, block_size=block_size, config={})


requests = {"vocabulary": st.sampled_from(VOCABULARIES), "template": templates, "suffix": words}


@cases(250, **requests, length=st.integers(0, 12))
def test_any_request_fits_the_block_or_is_refused(vocabulary, template, suffix, length):
    V = vocabulary.vocab_size
    for wish in ({"template": template}, {"prompt": template, "suffix": suffix, "length": length}):
        ids = attempt(sample.gapped_ids, vocabulary, network_of(V, 10), **wish)
        assert ids is None or (V in ids and len(ids) <= 10 and max(ids) <= V)


# ---- Data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(place):
    """A sound folder."""
    folder = place / "prepared"
    writer.prepare(folder, [("train", "abcde" * 8), ("val", "edcba" * 4)], tokenizer.Char("abcde"))
    return folder


COUNTS = {"tokens": 20, "documents": 2, "bytes": 20}
META = {"tokenizer": {"kind": "char", "alphabet": "abcde"}, "vocab_size": 5, "dtype": "uint16"}
META |= {"width": 4, "end": 4, "splits": {"train": COUNTS, "val": dict(COUNTS)}}


def use_data(folder):
    """All that is done with a prepared folder."""
    attempt(examples.Examples, folder, "train")
    for split in ("train", "val"):
        tokens = attempt(loader.Tokens, folder, split)
        if tokens:
            attempt(tokenizer.from_meta, tokens.meta["tokenizer"])
            attempt(lambda tokens: loader.in_order(tokens, 4), tokens)
            attempt(lambda tokens: loader.Blocks(tokens, 4, 1).batch(24, range(2)), tokens)
    attempt(ngram.baseline, folder, 2**12)


def write_shards(folder):
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        np.arange(20, dtype=np.uint16).__mod__(5).tofile(folder / f"{split}_00000.bin")
        np.array([1, 3] * 5, "<u2").tofile(folder / f"{split}_prompt.bin")


@cases(300, meta=json_files(META))
def test_any_meta_json_is_taken_or_refused_in_one_line(place, meta):
    write_shards(place / "data")
    (place / "data/meta.json").write_bytes(meta)
    with untouched(place):
        use_data(place / "data")


shards = st.binary(max_size=80)


@cases(100, shard=shards, prompt=shards, names=st.lists(words, max_size=2))
def test_any_shard_is_taken_or_refused_in_one_line(place, shard, prompt, names):
    write_shards(place / "data")
    meta = copy.deepcopy(META)
    meta["splits"]["train"]["tokens"] = max(1, len(shard) // 2)
    (place / "data/meta.json").write_text(json.dumps(meta))
    (place / "data/train_00000.bin").write_bytes(shard)
    (place / "data/train_prompt.bin").write_bytes(prompt)
    with untouched(place):
        use_data(place / "data")


# ---- Checkpoints ---------------------------------------------------------------------------------


def tiny_state(**keys):
    """What train.py saves of a tiny run."""
    model = network.make_network(plain.DEFAULTS | SMALL | keys)
    state = {"config": model.config | {"objective": "any_order", "schedule": "loglinear"}}
    state |= {"step": 3, "ema": None, "model": model.state_dict()}
    state |= {"tokenizer": {"kind": "char", "alphabet": "abcde"}}
    return state | {"optimizer": [torch.optim.AdamW(model.parameters()).state_dict()]}


def strange_tensors():
    """Tensors that no network has, among them views of one number as 10^12 numbers."""
    dtypes = torch.float32, torch.float16
    huge = [torch.zeros(1, dtype=dtype).expand(10**6, 10**6) for dtype in dtypes]
    odd = [torch.zeros(2, 3).to_sparse(), torch.zeros(6, 8, device="meta")]
    odd += [torch.zeros((), dtype=torch.complex64), torch.zeros(6, 8, dtype=torch.int8)]
    odd += [torch.zeros(0), torch.full((6, 8), torch.nan), torch.zeros(6, 8).T]
    return huge + odd


def doubling(depth):
    """A list that holds the same list twice, and so on: as text it would have 2^depth parts."""
    tree = ["x" * 100]
    for _ in range(depth):
        tree = [tree, tree]
    return tree


def use_checkpoint(folder):
    """All that is done with a checkpoint but sampling; what is refused may leave nothing behind."""
    with untouched(folder):
        attempt(checkpoint.read, folder)
        loaded = attempt(checkpoint.load, folder)
    if loaded is None:
        with untouched(folder):
            assert attempt(checkpoint.export, folder, folder / "to", "nanomdm") is None
    else:
        loaded[0](torch.zeros(1, 2, dtype=torch.long))
        for format in formats.NAMES:
            attempt(checkpoint.export, folder, folder / "to", format)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def emptied(folder):
    """A folder without files."""
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return folder


RUN = {"max_iters": 4, "batch_size": 2, "warmup_iters": 1, "log_interval": 1, "device": "cpu"}
RUN |= {"show_sample": False, "eval_sequences": 1, "eval_draws": 1} | plain.RECIPE
STATE = tiny_state()
CKPT = saved(STATE)
in_states = trees | st.sampled_from([*strange_tensors(), 16**5000, doubling(40), (1, 2), {1}, b"x"])


@st.composite
def states(draw):
    """The bytes of a checkpoint that holds something else than it should."""
    return saved(edited(draw, STATE, in_states))


@st.composite
def torn_checkpoints(draw):
    return torn(draw, CKPT)


@cases(250, data=states() | torn_checkpoints())
def test_any_checkpoint_is_taken_or_refused_in_one_line(place, data):
    folder = emptied(place / "ckpt")
    (folder / "ckpt.pt").write_bytes(data)
    use_checkpoint(folder)


@pytest.fixture(scope="module")
def exports(place):
    """{format: (config.json as a tree, the header of model.safetensors as one, what follows it)}"""
    folder, parts = emptied(place / "from"), {}
    for format, keys in {"nanomdm": {}, "radd": {}, "smdm": formats.FIXED["smdm"]}.items():
        (folder / "ckpt.pt").write_bytes(saved(tiny_state(**keys)))
        checkpoint.export(folder, folder / format, format)
        data = (folder / format / "model.safetensors").read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        about = json.loads((folder / format / "config.json").read_text())
        parts[format] = about, json.loads(data[8:end]), data[end:]
    return parts


CLAIMS = [0, 8, 99, 10**7, 10**13, 2**63, 2**64 - 1]  # the length of a header, in bytes
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "F8_E4M3", "F4", "I64", "BOOL", "x"]),
        "shape": st.lists(st.sampled_from([0, 1, 6, 8, 10**6, 2**40, 2**63]), max_size=3),
        "data_offsets": st.lists(st.sampled_from([0, 192, 10**13, 2**63]), min_size=2, max_size=2),
    }
)


@cases(300, drawn=st.data(), format=st.sampled_from(sorted(formats.NAMES)))
def test_any_safetensors_and_config_are_taken_or_refused_in_one_line(place, exports, drawn, format):
    about, header, body = exports[format]
    part = drawn.draw(st.integers(0, 3))
    about = drawn.draw(json_files(about)) if part == 0 else json.dumps(about).encode()
    header = edited(drawn.draw, header, entries | trees) if part == 1 else header
    head = json.dumps(header).encode("utf8", "replace")
    length = drawn.draw(st.sampled_from(CLAIMS)) if part == 2 else len(head)
    data = struct.pack("<Q", length) + head + body
    folder = emptied(place / "safe")
    (folder / "config.json").write_bytes(about)
    (folder / "model.safetensors").write_bytes(torn(drawn.draw, data) if part == 3 else data)
    use_checkpoint(folder)


@cases(150, data=states(), log=st.binary(max_size=60))
def test_any_run_is_resumed_or_refused_in_one_line(place, prepared, data, log):
    folder = emptied(place / "run")
    (folder / "ckpt.pt").write_bytes(data)
    (folder / "log.jsonl").write_bytes(log)
    given = [f"--{key}={value}" for key, value in (SMALL | RUN).items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.log.matmul_flops", lambda *_: 1.0)
        command("train", [*given, f"--data={prepared}", f"--out_dir={folder}"])


class Call:
    """Unpickled by Python's own pickle, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = [(os.system, "touch ran"), (exec, "open('ran', 'w')"), (eval, "open('ran', 'w')")]
CALLS += [(open, "ran", "w"), (os.mkdir, "ran"), (subprocess.run, ["touch", "ran"])]
CALLS += [(torch.load, "ran"), (torch.save, 1, "ran"), (Path, "ran")]
CALLS += [(builtins.__import__, "antigravity"), (np.save, "ran", 1), (Path.touch, Path("ran"))]
CALLS += [(torch.hub.load, "a/b", "c")]
calls = {"call": st.sampled_from(CALLS), "zipped": st.booleans(), "protocol": st.integers(2, 4)}
parts = st.sampled_from(sorted(STATE))


@cases(100, key=parts, **calls)
def test_no_code_in_a_checkpoint_is_run(place, call, key, zipped, protocol):
    folder, part, file = emptied(place / "code"), {key: Call(*call)}, io.BytesIO()
    if zipped:
        torch.save(STATE | part, file, pickle_protocol=protocol)
    else:
        pickle.dump(part, file, protocol)
    (folder / "ckpt.pt").write_bytes(file.getvalue())
    with untouched(place):
        assert attempt(checkpoint.read, folder) is None and attempt(checkpoint.load, folder) is None
    assert not os.path.exists("ran")


@pytest.mark.parametrize("large", ["data.pkl", "data/0"])
def test_a_checkpoint_that_unpacks_to_more_than_it_is_takes_no_memory(place, large):
    folder, zeros = emptied(place / "bomb"), bytes(2**28)
    packed = zipfile.ZipFile(folder / "ckpt.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with zipfile.ZipFile(io.BytesIO(CKPT)) as good, packed as bomb:
        for name in good.namelist():
            bomb.writestr(name, good.read(name) + (zeros if name.endswith(large) else b""))
    del zeros
    assert (folder / "ckpt.pt").stat().st_size < 2**22
    line = [sys.executable, "-c", PEAK, ROOT, folder]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert int(done.stdout) < 2**15, f"KiB more; {done.stderr}"


# Prints how many KiB refusing a checkpoint adds to the most memory that the process had before.
PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from config import UserError
from run import checkpoint
unit = 1024 if sys.platform == "darwin" else 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for function in (checkpoint.read, checkpoint.load):
    try:
        function(sys.argv[2])
        sys.exit("it was taken")
    except UserError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // unit)
"""


# ---- Chosen by hand ------------------------------------------------------------------------------


PATHS = ["step", "ema", "tokenizer", "optimizer"]
PATHS += ["config.n_layer", "config.norm", "config.objective"]


@pytest.mark.parametrize("path", PATHS)
def test_a_value_that_would_fill_the_memory_if_written_out_is_named_in_short(place, path):
    folder, state = emptied(place / "long"), copy.deepcopy(STATE)
    *parents, key = path.split(".")
    (state[parents[0]] if parents else state)[key] = doubling(60)
    (folder / "ckpt.pt").write_bytes(saved(state))
    assert attempt(checkpoint.read, folder) is None


def test_a_tensor_that_is_one_number_many_times_over_is_refused(place):
    """In half precision it would be made in full: a small file of a vast network fills memory."""
    folder, state = emptied(place / "one"), copy.deepcopy(STATE)
    state["model"]["embed.weight"] = torch.zeros(1).expand(6, 8)
    (folder / "ckpt.pt").write_bytes(saved(state))
    assert attempt(checkpoint.read, folder) is None and attempt(checkpoint.load, folder) is None


@pytest.mark.parametrize("claim", ["header", "tensor", "offset"])
def test_a_file_that_claims_10_terabytes_is_refused(place, exports, claim):
    folder = emptied(place / "claims")
    about, header, body = exports["nanomdm"]
    offsets = [0, 10**13 if claim == "offset" else len(body)]
    vast = {"dtype": "F16", "shape": [5 * 10**12], "data_offsets": offsets}
    head = json.dumps(header if claim == "header" else {"embed.weight": vast}).encode()
    (folder / "config.json").write_text(json.dumps(about))
    length = struct.pack("<Q", 10**13 if claim == "header" else len(head))
    (folder / "model.safetensors").write_bytes(length + head + body)
    use_checkpoint(folder)
    assert attempt(checkpoint.load, folder) is None


def test_a_template_of_many_vast_gaps_is_refused_before_it_is_built():
    tracemalloc.start()
    template = "___9999999" * 12_000  # as long as a word of a command line can be
    vast = attempt(sample.gapped_ids, VOCABULARIES[0], network_of(256, 1024), template=template)
    assert vast is None
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


VAST = ["n_embd=200000", "n_embd=1000000000000", "block_size=10000000", "n_layer=1000000000"]


@pytest.mark.parametrize("word", VAST)
def test_a_network_that_fits_no_memory_is_one_line(place, prepared, word):
    given = [f"--{key}={value}" for key, value in (RUN | {"block_size": 6, "n_head": 2}).items()]
    assert command("train", [*given, f"--data={prepared}", "--out_dir=vast", f"--{word}"])


ODD_FILES = {"a loop": lambda path: path.symlink_to(path)}
ODD_FILES["a dangling link"] = lambda path: path.symlink_to("nowhere")
ODD_FILES["a device"] = lambda path: path.symlink_to("/dev/zero")
ODD_FILES |= {"a pipe": os.mkfifo, "a folder": Path.mkdir}
FILES = ["ckpt.pt", "model.safetensors", "config.json", "log.jsonl", "meta.json", "train_00000.bin"]


@pytest.mark.parametrize("kind", sorted(ODD_FILES))
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_in_one_line_and_not_waited_for(place, exports, kind, name):
    folder = emptied(place / "odd")
    write_shards(folder)
    (folder / "meta.json").write_text(json.dumps(META))
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes((place / "from/nanomdm" / file).read_bytes())
    (folder / name).unlink(missing_ok=True)
    ODD_FILES[kind](folder / name)
    attempt(checkpoint.read, folder)
    attempt(checkpoint.load, folder)
    attempt(plot_log.read_log, folder)
    use_data(folder)


def test_a_link_in_the_place_of_a_file_is_replaced_and_what_it_points_to_stays(place):
    folder = emptied(place / "links")
    (folder / "other").write_text("other")
    (folder / "file").symlink_to("other")
    with whole_file(folder / "file") as path:
        path.write_text("new")
    assert (folder / "file").read_text() == "new" and (folder / "other").read_text() == "other"


# ---- Logs, lists, texts, names -------------------------------------------------------------------

LOG = [{"step": s, "loss": 3.0, "tokens": s * 10, "flops": s * 1e3} for s in (1, 2, 3, 4)]
LOG += [{"step": 2, "nats_per_token": 3.0, "interval": [2.5, 3.5]}]
LOG += [{"step": 4, "nats_per_token": 3, "interval": [None, None]}]


@cases(150, drawn=st.data())
def test_any_log_is_drawn_or_refused_in_one_line(place, drawn):
    folder = emptied(place / "log")
    lines = [json.dumps(line) for line in LOG]
    odd = drawn.draw(json_files(drawn.draw(st.sampled_from(LOG[3:]))))
    lines[drawn.draw(st.integers(0, 5))] = odd.decode("utf8", "replace")
    (folder / "log.jsonl").write_text("\n".join(lines) + drawn.draw(st.sampled_from(["", "\n"])))
    with untouched(place):
        log = attempt(plot_log.read_log, folder)
        if log:
            low, high = plot_log.limits([(folder, log)], 0.5)
            assert low < high and plot_log.label(folder, log[1])


PREPARED = {"text": (text, tokenizer), "pairs": (pairs, examples, tokenizer)}
TEXTS = st.sampled_from(["a.txt", "a.jsonl", "a.jsonl.gz"])
KEYS = {"text": "some words", "prompt": "a", "completion": "b"}


@cases(150, drawn=st.data(), kind=st.sampled_from(sorted(PREPARED)), name=TEXTS)
def test_any_text_is_prepared_or_refused_in_one_line(place, drawn, kind, name):
    folder = emptied(place / "text")
    data = b"\n".join([json.dumps(KEYS).encode()] * 3 + [drawn.draw(json_files(KEYS))])
    data = torn(drawn.draw, gzip.compress(data)) if name.endswith("gz") else data
    (folder / name).write_bytes(data)
    line = [f"--input={folder / name}", f"--out={folder / 'out'}"]
    line += ["--tokenizer=byte", "--val_fraction=0.5"] + ["--workers=1"] * (kind == "text")
    before, modules = listing(folder), PREPARED[kind]
    taken = attempt(lambda: modules[0].main(config.parse(line, *modules)) or True)
    assert taken or listing(folder) == before


QUESTIONS = {"plain": {"context": "a", "options": ["b", "c"], "gold": 1}}
QUESTIONS["boolq"] = {"passage": "a", "question": "b", "answer": True}
choices = {"text": ["b", "c"], "label": ["A", "B"]}
QUESTIONS["arc_easy"] = {"question": "a", "choices": choices, "answerKey": "B"}
QUESTIONS["winogrande"] = {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"}
SAMPLE = {"text": "a", "tokens": [0, 1], "nfe": 2}
RESULT = {"identity": {"folder": "a"}, "result": {"nats_per_token": 1.0}}


@cases(200, drawn=st.data(), name=st.sampled_from([*sorted(QUESTIONS), "sample", "result"]))
def test_any_list_of_records_is_read_or_refused_in_one_line(place, drawn, name):
    record = QUESTIONS.get(name, SAMPLE if name == "sample" else RESULT)
    path = place / "records.jsonl"
    path.write_bytes(json.dumps(record).encode() + b"\n" + drawn.draw(json_files(record)))
    if name in QUESTIONS:
        attempt(choice.read, name, path)
    else:
        attempt(quality.read_samples if name == "sample" else zeroshot.finished, path)


heads = st.lists(st.sampled_from([20240520, 0, 1, 2, -1, 2**31 - 1]), max_size=3)


lengths = st.sampled_from([0, 12, 1023, 1024, 1024, 1024])


@cases(150, head=heads, length=lengths, body=st.binary(max_size=30))
def test_any_shard_of_fineweb_is_converted_or_refused_in_one_line(place, head, length, body):
    folder, sound = emptied(place / "shard"), [20240520, 1, len(body) // 2]
    header = np.array(head + sound[len(head) :] + [0] * 253, "<i4").tobytes()
    (folder / "in").write_bytes(header[:length] + body)
    if attempt(fineweb.convert, folder / "in", folder / "out", np.ones(50257, np.int64)) is None:
        assert not listing(folder)  # it is fetched again


@cases(150, parts=st.lists(words, max_size=4))
def test_any_name_on_the_hub_stays_within_the_cache(place, parts):
    with untouched(place):
        attempt(download.hub_file, "/".join(parts[:2]), "/".join(parts[2:]))
        attempt(checkpoint.from_hub, "/".join(parts))


def test_these_are_2000_cases():
    drawn = {name for name, test in globals().items() if hasattr(test, "hypothesis")}
    assert PLANNED.keys() == drawn
    assert sum(PLANNED.values()) >= 2000
    for name, ran in RAN.items():  # those that have run in this session of pytest
        assert ran >= PLANNED[name], f"{name} ran {ran} of {PLANNED[name]} cases"
