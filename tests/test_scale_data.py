"""Data at scale: FineWeb, blocks of one document, lazy blocks, prefetching, hostile input."""

import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_download import serve

from config import UserError, parse
from data import loader, tokenizer, writer
from data.fineweb import prepare as fineweb
from data.text import prepare as text
from data.zeroshot import prepare as zeroshot
from lib.files import whole_file

ROOT = Path(__file__).parent.parent
EOT, V = 50256, 50257


# ---- FineWeb -------------------------------------------------------------------------------------


def shard_file(ids, magic=20240520, version=1, n=None, extra=b""):
    """What the Hub has of ids (n,): a header of 256 int32, and uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if n is None else n
    return header.tobytes() + ids.astype("<u2").tobytes() + extra


def random_ids(number, n=30_000):
    """(n,) ids of a shard, with a document's beginning about every 500."""
    draw = np.random.default_rng(number)
    return np.where(draw.random(n) < 0.002, EOT, draw.integers(0, EOT, n)) if n else np.zeros(0)


@pytest.fixture
def hub(monkeypatch):
    """A Hub with four training shards and one held out, which states the hash of each."""
    for server in serve():
        server.shards = [random_ids(i, 50_000 + 1000 * i) for i in range(5)]  # 0 is held out
        names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 5))]
        server.files = dict(zip(names, map(shard_file, server.shards), strict=True))
        server.hashes = True
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def vocabulary(monkeypatch):
    """GPT-2's vocabulary without its text: id i stands for 1 to 7 bytes."""
    table = [b"x" * (1 + i % 7) for i in range(V + 1)]
    stand_in = SimpleNamespace(vocab_size=V, eot=EOT, table=table, meta=lambda: {"kind": "gpt2"})
    monkeypatch.setattr(tokenizer, "build", lambda kind, texts: stand_in)
    return table


def prepare(folder, *args):
    fineweb.main(parse([f"--out={folder}", *args], fineweb))
    return loader.read_meta(folder)


def asked(hub):
    names = [Path(path).name for path, _ in hub.asked]
    hub.asked.clear()
    return names


def test_fineweb_becomes_a_prepared_folder_like_any_other(hub, vocabulary, tmp_path):
    meta = prepare(tmp_path / "set", "--shards=3")
    train, val = loader.Tokens(tmp_path / "set", "train"), loader.Tokens(tmp_path / "set", "val")
    ids = np.concatenate(hub.shards[1:4])
    assert np.array_equal(train[:], ids) and np.array_equal(val[:], hub.shards[0])
    n_bytes = sum(len(vocabulary[i]) for i in ids if i != EOT)
    counts = {"tokens": len(ids), "documents": int((ids == EOT).sum()), "bytes": n_bytes}
    assert meta["splits"]["train"] == counts
    assert sorted(asked(hub)) == sorted([*hub.files][:4])
    files = ["meta.json", *(f"train_{i:05d}.bin" for i in (1, 2, 3)), "val_00000.bin"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == files


def test_fineweb_grows_by_what_is_new_and_never_shrinks_unasked(hub, vocabulary, tmp_path):
    prepare(tmp_path, "--shards=2")
    assert len(asked(hub)) == 3
    prepare(tmp_path, "--shards=2")
    assert asked(hub) == []
    prepare(tmp_path, "--shards=4")
    assert sorted(asked(hub)) == ["fineweb_train_000003.bin", "fineweb_train_000004.bin"]
    assert np.array_equal(loader.Tokens(tmp_path, "train")[:], np.concatenate(hub.shards[1:5]))
    with pytest.raises(UserError, match="has 3 shards more than 1"):
        prepare(tmp_path, "--shards=1")
    (tmp_path / "train_00002.bin").unlink()
    prepare(tmp_path, "--shards=4")
    assert asked(hub) == ["fineweb_train_000002.bin"], "a shard that is gone comes again"


def test_another_text_is_not_mixed_with_fineweb(hub, vocabulary, tmp_path):
    prepare(tmp_path / "a", "--shards=1")
    with pytest.raises(UserError, match="holds another text than kjj0/fineweb100B-gpt2"):
        prepare(tmp_path / "a", "--shards=1", "--sample=100B")
    writer.prepare(tmp_path / "b", [("train", "some text"), ("val", "more")], tokenizer.Byte())
    with pytest.raises(UserError, match="holds another text"):
        prepare(tmp_path / "b", "--shards=1")
    assert tokenizer.Byte().decode(loader.Tokens(tmp_path / "b", "train")[:]) == "some text"


def test_fineweb_survives_dropped_connections_and_busy_servers(
    hub, vocabulary, tmp_path, monkeypatch
):
    monkeypatch.setattr(threading.Event, "wait", lambda *_: None)
    hub.script[:] = [{"drop_after": 70_000}, {"status": 503}, {"drop_after": 90_000}]
    hub.script += [{"drop_after": 5}, {"status": 429}]
    prepare(tmp_path, "--shards=4", "--threads=3")
    assert np.array_equal(loader.Tokens(tmp_path, "train")[:], np.concatenate(hub.shards[1:5]))
    assert any("Range" in headers for _, headers in hub.asked)


IDS = random_ids(9)
BAD_SHARDS = {
    "another magic": (shard_file(IDS, magic=20240521), "its header begins 20240521, 1"),
    "another version": (shard_file(IDS, version=2), "its header begins 20240520, 2"),
    "claims more": (
        shard_file(IDS, n=len(IDS) + 1),
        "says that it holds 30001 tokens, and has room for 30000",
    ),
    "claims less": (shard_file(IDS, n=3), "says that it holds 3 tokens"),
    "claims 2 billion": (shard_file(IDS, n=2**31 - 1), "says that it holds 2147483647 tokens"),
    "claims -1": (shard_file(IDS, n=-1), "says that it holds -1 tokens"),
    "a byte more": (shard_file(IDS, extra=b"\0"), "has room for 30000.5"),
    "empty": (b"", "has only 0 bytes"),
    "half a header": (shard_file(IDS)[:1000], "has only 1000 bytes"),
    "nothing but a header": (shard_file(IDS[:0]), "holds no document"),
    "ids beyond the vocabulary": (shard_file(np.append(IDS[1:], V)), "holds ids beyond the 50257"),
    "no document": (shard_file(IDS % EOT), "holds no document"),
    "a page of HTML": (b"<html>" * 999, "is no shard"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_a_shard_that_is_not_what_it_says_is_refused_and_fetched_anew_the_next_time(
    case, hub, vocabulary, tmp_path
):
    name, (bad, says) = "fineweb_train_000002.bin", BAD_SHARDS[case]
    hub.hashes = False  # a mirror that states no hash: the shard must speak for itself
    whole, hub.files[name] = hub.files[name], bad
    with pytest.raises(UserError, match=f"{name}.*{says}") as error:
        prepare(tmp_path, "--shards=2")
    assert "\n" not in str(error.value) and not (tmp_path / "meta.json").exists()
    hub.files[name] = whole
    prepare(tmp_path, "--shards=2")
    assert np.array_equal(loader.Tokens(tmp_path, "train")[:], np.concatenate(hub.shards[1:3]))


def test_a_shard_whose_hash_or_length_is_not_the_stated_one_is_refused(hub, vocabulary, tmp_path):
    for lie, says in {
        ("X-Linked-Etag", "0" * 64): "hash is wrong",
        ("X-Linked-Size", 12): "not the 12 expected",
        ("Content-Length", 10**16): "no space for",
    }.items():
        hub.script[:] = [{"headers": dict([lie])}] * 9
        with pytest.raises(UserError, match=says):
            prepare(tmp_path, "--shards=4")
        assert not (tmp_path / "meta.json").exists()


def test_a_preparation_that_got_nothing_leaves_nothing(hub, vocabulary, tmp_path):
    hub.script[:] = [{"status": 404, "body": b""}] * 9
    with pytest.raises(UserError, match="404"):
        prepare(tmp_path / "set", "--shards=2")
    assert not (tmp_path / "set").exists()


def test_a_failure_ends_the_other_downloads_soon(hub, vocabulary, tmp_path):
    hub.pause, hub.script[:] = 0.5, [{"status": 404, "body": b""}]
    # About 80 pieces of half a second each.
    hub.files |= {name: body * 50 for name, body in hub.files.items()}
    began = time.time()
    with pytest.raises(UserError, match="404"):
        prepare(tmp_path, "--shards=4")
    assert time.time() - began < 15


def test_what_a_run_that_was_killed_has_done_is_not_done_again(
    hub, vocabulary, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    @contextlib.contextmanager
    def dies_at(path):
        if path.name == "meta.json":
            raise Killed
        with whole_file(path) as temporary:
            yield temporary

    prepare(tmp_path, "--shards=1")
    asked(hub)
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "whole_file", dies_at)
        with pytest.raises(Killed):
            prepare(tmp_path, "--shards=3")
    with pytest.raises(UserError, match=r"not the .* of its meta\.json"):
        loader.Tokens(tmp_path, "train")
    assert len(asked(hub)) == 2
    prepare(tmp_path, "--shards=3")
    assert asked(hub) == []
    assert np.array_equal(loader.Tokens(tmp_path, "train")[:], np.concatenate(hub.shards[1:4]))


def test_fineweb_is_not_begun_where_the_disk_is_too_small(hub, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2.3e9))
    with pytest.raises(UserError, match=r"needs 3\.0 GB for 11 shards, and 2\.3 GB are free"):
        prepare(tmp_path / "set", "--shards=10")
    assert not hub.asked and not (tmp_path / "set").exists()
    prepare(tmp_path / "set", "--shards=4")


def test_settings_of_fineweb_that_cannot_be_are_one_line(hub, vocabulary, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".preparing").symlink_to(tmp_path)
    for args, says in {
        ("--shards=0",): "shards must be 1 or more",
        ("--shards=104",): "sample 10B has 103 shards, not 104",
        ("--threads=0",): "threads must be 1 or more",
        ("--sample=10T",): "unknown sample '10T'",
        (f"--out={tmp_path / 'file'}",): "cannot write",
        (f"--out={tmp_path / 'linked'}",): "is a symbolic link",
    }.items():
        with pytest.raises(UserError, match=says):
            prepare(tmp_path / "set", *args)
    assert not hub.asked


def test_ctrl_c_stops_fineweb_at_once_and_the_same_command_goes_on(hub, shared, tmp_path):
    cache = tmp_path / "tiktoken"
    shutil.copytree(shared("data/tiktoken_cache"), cache)
    hub.files = {name: shard_file(random_ids(i, 300_000)) for i, name in enumerate(hub.files)}
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(cache), "HF_ENDPOINT": hub.url}
    module = [sys.executable, "-m", "data.fineweb.prepare"]
    command = [*module, "--shards=4", f"--out={tmp_path / 'set'}"]
    hub.pause = 0.5  # 10 pieces: five seconds a shard
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as run:
        while len(hub.asked) < 4:
            time.sleep(0.05)
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130
        assert run.stderr.read().strip().endswith("prepare.py: interrupted")
    parts = [path.stat().st_size for path in (tmp_path / "set").rglob("*.part")]
    assert len(parts) == 4 and all(parts)
    hub.pause, hub.asked[:] = 0.0, []
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train 1,200,000 tokens" in done.stdout and "gpt2 tokenizer, V = 50257" in done.stdout
    assert sorted(int(h["Range"][6:-1]) for _, h in hub.asked if "Range" in h) == sorted(parts)
    assert np.array_equal(loader.Tokens(tmp_path / "set", "val")[:], random_ids(0, 300_000))


# ---- Blocks that keep to one document ------------------------------------------------------------


DOCUMENTS = ["a", "bc" * 4, "d" * 7, "e" * 9, "f" * 16, "g" * 23, "one\n\ntwo", "é" * 5]
TRAIN = [("train", document) for document in DOCUMENTS]


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2", "llama"])
def test_a_block_is_one_document_or_a_piece_of_one_and_then_eos(
    kind, tmp_path, shared, monkeypatch
):
    if kind == "gpt2":
        cache = tmp_path / "tiktoken"
        shutil.copytree(shared("data/tiktoken_cache"), cache)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    if kind == "llama":
        pytest.importorskip("sentencepiece")
        monkeypatch.setenv("NANOMDM_SHARED", str(shared("data/llama_tokenizer").parent.parent))
    vocabulary = tokenizer.build(kind, DOCUMENTS)
    meta = writer.prepare(tmp_path / "set", TRAIN, vocabulary, block_size=8)
    tokens = loader.Tokens(tmp_path / "set", "train")
    blocks = loader.in_order(tokens, 8)
    eos = {"gpt2": 50256, "llama": 2}.get(kind) or vocabulary.encode("\n", start=False)[0]
    rest = [int(i) for block in blocks for i in block]
    for document in DOCUMENTS:
        ids = vocabulary.encode(document)
        ids = [1, *ids] if kind == "llama" else ids
        size = -(-len(ids) // 8) * 8  # no block of eos alone, whatever the length
        assert rest[:size] == ids + [eos] * (size - len(ids))
        rest = rest[size:]
    assert rest == []
    counts = {"tokens": len(tokens), "documents": len(DOCUMENTS)}
    counts |= {"bytes": len("".join(DOCUMENTS).encode())}
    assert (meta["block_size"], meta["splits"]["train"]) == (8, counts)


def test_an_epoch_of_laid_out_documents_takes_every_block_once(tmp_path):
    writer.prepare(tmp_path, TRAIN, tokenizer.Byte(), block_size=8, shard_tokens=30)
    tokens = loader.Tokens(tmp_path, "train")
    blocks = loader.Blocks(tokens, 8, seed=1)
    assert blocks.n * 8 == len(tokens)
    whole = sorted(map(bytes, loader.in_order(tokens, 8)))
    orders = [blocks.batch(epoch * blocks.n, np.arange(blocks.n)) for epoch in range(3)]
    assert all(sorted(map(bytes, order)) == whole for order in orders)
    assert not np.array_equal(orders[0], orders[1])


def test_blocks_of_another_size_than_the_documents_are_laid_out_for_are_refused(tmp_path):
    writer.prepare(tmp_path, TRAIN, tokenizer.Byte(), block_size=8)
    tokens = loader.Tokens(tmp_path, "train")
    message = r"laid out in blocks of 8: --block_size must be that, not \d+"
    for make in (lambda: loader.Blocks(tokens, 16, 0), lambda: loader.in_order(tokens, 4)):
        with pytest.raises(UserError, match=message):
            make()


def test_your_own_text_is_laid_out_alike_by_any_number_of_processes(tmp_path):
    lines = [json.dumps({"text": f"document {i} " * (1 + i % 50)}) for i in range(9000)]
    for part in range(3):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines[part::3]))
    for workers in (1, 3):
        args = [f"--input={tmp_path}", f"--out={tmp_path / str(workers)}", f"--workers={workers}"]
        text.main(parse([*args, "--tokenizer=byte", "--block_size=64"], text, tokenizer))
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert loader.read_meta(tmp_path / "1")["splits"]["train"]["tokens"] % 64 == 0
    for size in (-1, 2**30):
        args = [f"--input={tmp_path}", f"--out={tmp_path / 'x'}", f"--block_size={size}"]
        with pytest.raises(UserError, match=r"block_size must be in \[0, 65536\]"):
            text.main(parse(args, text, tokenizer))


# ---- Evaluation blocks ---------------------------------------------------------------------------


def test_of_evaluation_blocks_only_those_that_are_wanted_are_read(tmp_path, monkeypatch):
    writer.prepare(tmp_path, [("train", "abcdefghij" * 100)], tokenizer.Byte())
    tokens, reads = loader.Tokens(tmp_path, "train"), []
    plain = [tokens[start : start + 7] for start in range(0, 1000, 7)]
    read = loader.Tokens.windows

    def watched(self, starts, n):
        reads.append(starts)
        return read(self, starts, n)

    monkeypatch.setattr(loader.Tokens, "windows", watched)
    blocks = loader.in_order(tokens, 7)
    assert len(blocks) == len(plain) == len(reads) == 143 and len(blocks[142]) == 6
    assert all(map(np.array_equal, blocks, plain))
    reads.clear()
    some = loader.in_order(tokens, 7, 5, end=994)
    assert len(some) == len(reads) == 5
    assert all(map(np.array_equal, some, loader.spread(plain[:142], 5)))


# ---- Prefetching ---------------------------------------------------------------------------------


def test_prefetching_changes_neither_items_nor_order(tmp_path):
    writer.prepare(tmp_path, [("train", "abcdefghij" * 100)], tokenizer.Byte())
    blocks = loader.Blocks(loader.Tokens(tmp_path, "train"), 8, seed=0)
    batches = (blocks.batch(4 * step, np.arange(4)) for step in range(50))
    plain = [blocks.batch(4 * step, np.arange(4)) for step in range(50)]
    assert all(map(np.array_equal, loader.prefetch(batches), plain))
    assert list(loader.prefetch([])) == [] and list(loader.prefetch([None, 0])) == [None, 0]
    assert list(itertools.islice(loader.prefetch(itertools.count()), 99)) == list(range(99))


def test_no_more_is_prefetched_than_was_said(tmp_path):
    made = []
    items = loader.prefetch((made.append(i) or i for i in range(100)), ahead=3)
    assert made == [], "nothing is made before the first item is asked for"
    for i in range(10):
        assert next(items) == i
        time.sleep(0.01)
        assert len(made) == i + 4  # the last one handed out, and three more
    items.close()


def test_an_error_comes_through_in_its_turn_and_the_thread_ends():
    def items():
        yield 1
        yield 2
        raise UserError("the third is bad")

    before, taken = threading.active_count(), []
    with pytest.raises(UserError, match="the third is bad"):
        for item in loader.prefetch(items(), ahead=4):
            taken.append(item)
    assert taken == [1, 2] and threading.active_count() == before


def test_a_prefetching_loop_that_is_left_ends_its_thread():
    before = threading.active_count()
    with contextlib.closing(loader.prefetch(itertools.count())) as items:
        assert next(items) == 0
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.mark.parametrize("closing", [True, False])
def test_ctrl_c_ends_a_program_that_prefetches(closing):
    script = f"""
import contextlib, time
from data import loader
def items():
    while True:
        time.sleep(0.2)
        yield 1
batches = loader.prefetch(items(), ahead=2)
with contextlib.closing(batches) if {closing} else contextlib.nullcontext():
    for item in batches:
        print(item, flush=True)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) as run:
        run.stdout.readline()
        run.send_signal(signal.SIGINT)
        run.wait(20)
        assert run.stderr.read().rstrip().endswith("KeyboardInterrupt")


# ---- Hostile input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 2**40},
        {"block_size": 0},
        {"block_size": "8"},
        {"block_size": 2**70},
        {"fill": "x" * 2**26},
    ],
)
def test_a_meta_that_claims_the_absurd_is_refused(change, tmp_path):
    meta = writer.prepare(tmp_path, [("train", "abc")], tokenizer.Byte())
    dtype = {"dtype": "uint32"} if "vocab_size" in change else {}
    (tmp_path / "meta.json").write_text(json.dumps(meta | change | dtype))
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
        loader.Tokens(tmp_path, "train")


def test_text_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 2**20)
    (tmp_path / "line.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "ok"}\n{"text": "' + b"a" * 2**21 + b'"}')
    )
    with pytest.raises(UserError, match="line 2: longer than 1048576 characters"):
        list(text.documents([str(tmp_path / "line.jsonl.gz")]))
    huge = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**30}]
    (tmp_path / "claim.txt.xz").write_bytes(lzma.compress(b"little", filters=huge))
    script = f"""
import resource
from data.text import prepare
from lib import program
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
program.run(lambda config: list(prepare.documents([{str(tmp_path / "claim.txt.xz")!r}])), prepare)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "claim.txt.xz" in done.stderr


def archive(kind, members):
    """A .zip or .tar.gz as bytes, of (name, content), None for a symbolic link to ../../victim."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            for name, content in members:
                file.writestr(name, content or "link")
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as file:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content or b"")
                member.type = tarfile.REGTYPE if content else tarfile.SYMTYPE
                member.linkname = "" if content else "../../victim"
                file.addfile(member, io.BytesIO(content or b""))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_what_is_in_an_archive_is_never_written_outside_its_folder(kind, tmp_path, monkeypatch):
    name = next(iter(zeroshot.SETS))
    wanted = next(iter(zeroshot.SETS[name].files)).replace("*", "x")
    evil = [f"../../{wanted}", f"/{tmp_path}/outside/{wanted}", "..", f"a/../../../{wanted}"]
    members = [(member, b"evil") for member in evil] + [(wanted, None)] * (kind != "zip")
    (tmp_path / "victim").write_text("precious")
    for server in serve():
        server.body = archive(kind, members)
        source = {"url": f"{server.url}/x.{kind}", "sha256": None, "size": None}
        monkeypatch.setitem(zeroshot.SETS, name, zeroshot.SETS[name]._replace(**source))
        zeroshot.fetch(name, tmp_path / "a" / "b" / "raw")
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parent for path in written} <= {tmp_path, tmp_path / "a" / "b" / "raw"}
    assert {path for path in written if path.parent == tmp_path} == {tmp_path / "victim"}
    assert (tmp_path / "victim").read_text() == "precious"
    assert not any(path.is_symlink() for path in written)
