"""The data package: tokenizers, shards, shuffling, n-gram baselines and the three datasets."""

import gzip
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from config import UserError, parse
from data import loader, ngram, tokenizer, writer
from data.pydocs import prepare as pydocs
from data.shakespeare import prepare as shakespeare
from data.text import prepare as text

ROOT = Path(__file__).parent.parent
PANGRAM = "Hello world: the quick brown fox\n\njumps over  the lazy dog. 3.14"
WORLD = "naïve façade — Ελληνικά, 日本語, 😀\ttab"


def command(*args, cwd=ROOT, **env):
    """Run a module of ours as the user would."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def offline(shared, tmp_path_factory):
    """A private copy of tiktoken's cache, which tiktoken may then do with as it likes."""
    cache = tmp_path_factory.mktemp("tiktoken")
    for file in shared("data/tiktoken_cache").iterdir():
        shutil.copyfile(file, cache / file.name)
    return str(cache)


@pytest.fixture(params=["char", "byte", "gpt2", "llama"])
def any_tokenizer(request, monkeypatch, shared):
    if request.param == "gpt2":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", request.getfixturevalue("offline"))
    if request.param == "llama":
        pytest.importorskip("sentencepiece")
        monkeypatch.setenv("NANOMDM_SHARED", str(shared("data/llama_tokenizer").parent.parent))
    return tokenizer.build(request.param, [PANGRAM, WORLD])


def numbers(folder, n, **options):
    """The training text is the ids 0, 1, ..., n - 1: a token says where it stands."""
    alphabet = "".join(chr(0x4E00 + i) for i in range(n))
    writer.prepare(folder, [("train", alphabet)], tokenizer.Char(alphabet), **options)
    return loader.Tokens(folder, "train")


# ---- Tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [PANGRAM, WORLD, "", " leading", "a", "\n\n"])
def test_decoding_gives_back_the_text(any_tokenizer, said):
    assert any_tokenizer.decode(any_tokenizer.encode(said)) == said


@pytest.mark.parametrize("rest", [PANGRAM, WORLD, "", " leading", ".", "\n\n", "▁"])
def test_a_text_that_goes_on_after_another_gains_nothing(any_tokenizer, rest):
    if any_tokenizer.kind == "char":
        any_tokenizer = tokenizer.build("char", [PANGRAM, WORLD, "▁"])
    ids = any_tokenizer.encode("quick", start=True) + any_tokenizer.encode(rest, start=False)
    written = rest.replace("▁", " ") if any_tokenizer.kind == "llama" else rest
    assert any_tokenizer.decode(ids) == "quick" + written


def test_ids_lie_below_the_vocabulary_size_and_the_mask_is_drawn_as_a_block(any_tokenizer):
    ids, mask = any_tokenizer.encode(PANGRAM), any_tokenizer.vocab_size
    assert all(0 <= i < mask for i in ids)
    assert any_tokenizer.decode([mask, mask]) == "██"
    half = len(ids) // 2
    assert any_tokenizer.decode([*ids[:half], mask, *ids[half:]]).replace("█", "") == PANGRAM


def test_any_sequence_of_ids_can_be_decoded(any_tokenizer):
    everything = np.random.default_rng(0).permutation(any_tokenizer.vocab_size + 1)
    assert isinstance(any_tokenizer.decode(everything), str)
    assert isinstance(any_tokenizer.decode(iter([0, any_tokenizer.vocab_size])), str)


def test_a_tokenizer_is_rebuilt_from_its_meta_written_as_json(any_tokenizer):
    again = tokenizer.from_meta(json.loads(json.dumps(any_tokenizer.meta())))
    assert type(again) is type(any_tokenizer) and again.vocab_size == any_tokenizer.vocab_size
    assert again.encode(WORLD) == any_tokenizer.encode(WORLD)


def test_vocabularies_and_border_marks_are_the_published_ones(any_tokenizer):
    V, bos, eot = {
        "char": (len(set(PANGRAM + WORLD)), None, None),
        "byte": (256, None, None),
        "gpt2": (50257, None, 50256),
        "llama": (32000, 1, 2),
    }[any_tokenizer.kind]
    assert (any_tokenizer.vocab_size, any_tokenizer.bos, any_tokenizer.eot) == (V, bos, eot)


def test_published_vocabularies_give_the_published_ids(any_tokenizer):
    characters = sorted(set(PANGRAM + WORLD))
    known = {
        "char": [characters.index(c) for c in "Hello world"],
        "byte": list(b"Hello world"),
        "gpt2": [15496, 995],
        "llama": [15043, 3186],
    }
    assert any_tokenizer.encode("Hello world") == known[any_tokenizer.kind]


def test_text_that_spells_a_border_mark_does_not_become_one(any_tokenizer):
    for mark in ("<|endoftext|>", "</s>", "<s>") if any_tokenizer.kind != "char" else ():
        assert not {any_tokenizer.bos, any_tokenizer.eot} & set(any_tokenizer.encode(mark))


def test_a_document_carries_one_border_mark_where_there_is_an_id_for_it(any_tokenizer):
    ids = any_tokenizer.encode(PANGRAM)
    expected = {"gpt2": [*ids, 50256], "llama": [1, *ids]}.get(any_tokenizer.kind, ids)
    assert any_tokenizer.document(PANGRAM) == expected
    assert (any_tokenizer.separator == "\n\n") == (expected == ids)


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'é' is not among the 3 .*character-level"):
        tokenizer.Char("abc").encode("abcé")


@pytest.mark.parametrize(
    "meta",
    [
        *(
            None,
            [],
            {},
            {"kind": "chat"},
            {"kind": []},
            {"kind": "char"},
            {"kind": "char", "alphabet": ""},
        ),
        *(
            {"kind": "char", "alphabet": "aa"},
            {"kind": "char", "alphabet": 3},
            {"kind": "byte", "alphabet": "a"},
        ),
    ],
)
def test_a_damaged_tokenizer_meta_is_refused(meta):
    with pytest.raises(UserError):
        tokenizer.from_meta(meta)


def test_a_llama_model_is_read_from_the_repository_or_the_shared_folder(
    tmp_path, monkeypatch, shared
):
    pytest.importorskip("sentencepiece")
    real = shared("data/llama_tokenizer/tokenizer.model")
    own, other = tmp_path / "own.model", tmp_path / "data/llama_tokenizer/tokenizer.model"
    monkeypatch.setattr(tokenizer, "LLAMA", own)
    monkeypatch.setenv("NANOMDM_SHARED", str(tmp_path))
    with pytest.raises(UserError, match=f"put it at {own}"):
        tokenizer.Llama()
    other.parent.mkdir(parents=True)
    shutil.copyfile(real, other)
    assert tokenizer.Llama().meta() == {"kind": "llama"}  # no path: checkpoints travel
    own.write_text("no model")
    with pytest.raises(UserError, match=f"{own} is not a SentencePiece model"):
        tokenizer.Llama()


# ---- Shards --------------------------------------------------------------------------------------


def test_any_slice_across_any_shards_equals_the_slice_of_one_shard(tmp_path):
    one, many = numbers(tmp_path / "one", 50), numbers(tmp_path / "many", 50, shard_tokens=7)
    assert (len(one.paths), len(many.paths)) == (1, 8) and len(one) == len(many) == 50
    for a in range(51):
        for b in range(a, 53):
            assert np.array_equal(many[a:b], np.arange(a, min(b, 50)))
            assert many[a:b].dtype == np.int64
    assert np.array_equal(many[:], one[:]) and np.array_equal(many[-5:], one[45:])


def test_several_processes_write_what_one_writes(tmp_path):
    texts = [f"document {i} " + chr(97 + i) * 150_000 for i in range(25)]
    documents = [("val" if i % 7 == 3 else "train", text) for i, text in enumerate(texts)]
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        writer.prepare(folder, iter(documents), tokenizer.Byte(), workers, shard_tokens=1_000_000)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == ["meta.json", *(f"train_{i:05d}.bin" for i in range(4)), "val_00000.bin"]
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    joined = "\n\n".join(document for split, document in documents if split == "train")
    assert tokenizer.Byte().decode(loader.Tokens(tmp_path / "2", "train")[:]) == joined


def test_meta_counts_tokens_documents_and_bytes_with_separators(tmp_path):
    pairs = [("train", "é"), ("val", "b"), ("train", ""), ("train", "cd")]
    meta = writer.prepare(tmp_path, pairs, tokenizer.build("char", "ébcd"))
    assert meta["splits"]["train"] == {"tokens": 5, "documents": 2, "bytes": 6}
    assert meta["splits"]["val"] == {"tokens": 1, "documents": 1, "bytes": 1}
    assert loader.read_meta(tmp_path) == meta


@pytest.mark.parametrize(("V", "dtype"), [(65535, "uint16"), (65536, "uint32")])
def test_ids_are_as_narrow_as_the_mask_allows(V, dtype, tmp_path):
    alphabet = "".join(chr(i) for i in range(V + 2048) if not 0xD800 <= i < 0xE000)[:V]
    meta = writer.prepare(tmp_path, [("train", alphabet[-9:])], tokenizer.Char(alphabet))
    assert meta["dtype"] == dtype
    assert loader.Tokens(tmp_path, "train")[:].tolist() == list(range(V - 9, V))


def test_preparing_again_keeps_other_data_aside_and_a_failure_leaves_what_is_there(tmp_path):
    old = numbers(tmp_path, 50, shard_tokens=7)[:]
    for _ in range(2):  # the same data again are no others
        assert np.array_equal(numbers(tmp_path, 20)[:], np.arange(20))
    assert np.array_equal(loader.Tokens(tmp_path / "old_1", "train")[:], old)
    (tmp_path / "train_notes.txt").touch()

    def fails_half_way():
        yield "train", "a" * 3_000_000
        raise UserError("a document is bad")

    with pytest.raises(UserError, match="a document is bad"):
        writer.prepare(tmp_path, fails_half_way(), tokenizer.Byte())
    assert np.array_equal(loader.Tokens(tmp_path, "train")[:], np.arange(20))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["meta.json", "old_1", "train_00000.bin", "train_notes.txt"]


def test_nothing_to_prepare_is_an_error_and_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no text"):
        writer.prepare(tmp_path / "new", [("train", "")], tokenizer.Byte())
    assert not (tmp_path / "new").exists()


def test_a_killed_preparation_does_not_look_prepared_and_the_next_one_works(tmp_path):
    script = f"""
import os, signal
from data import tokenizer, writer
def documents():
    yield "train", "a" * 3_000_000
    os.kill(os.getpid(), signal.SIGKILL)
writer.prepare({str(tmp_path)!r}, documents(), tokenizer.Byte())
"""
    assert command("-c", script).returncode == -9
    assert list(tmp_path.rglob("*.bin"))
    with pytest.raises(UserError, match="no prepared data"):
        loader.Tokens(tmp_path, "train")
    assert len(numbers(tmp_path, 20)) == 20 and not (tmp_path / ".preparing").exists()


def test_a_process_that_dies_is_one_clear_line(tmp_path):
    def documents():
        for _ in range(9):
            yield "train", "a" * 1_100_000
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises(UserError, match="process died"):
        writer.prepare(tmp_path / "new", documents(), tokenizer.Byte(), workers=2)
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        writer.prepare(tmp_path / "file", [("train", "a")], tokenizer.Byte())


def test_a_missing_folder_says_how_to_prepare_it(tmp_path):
    with pytest.raises(UserError, match=r"python -m data\.pydocs\.prepare"):
        loader.Tokens(tmp_path / "pydocs", "train")
    command = r"python -m data\.text\.prepare --input=FILE --out=.*/mine"
    with pytest.raises(UserError, match=command):
        loader.Tokens(tmp_path / "mine", "train")


def test_a_missing_split_is_named(tmp_path):
    numbers(tmp_path, 20)
    with pytest.raises(UserError, match="no split 'val', only train"):
        loader.Tokens(tmp_path, "val")


@pytest.mark.parametrize(
    "damage",
    [
        lambda meta: "{",
        lambda meta: "[]",
        lambda meta: "[" * 100_000,
        lambda meta: json.dumps(meta | {"splits": {"train": 3}}),
        lambda meta: json.dumps(meta | {"splits": []}),
        lambda meta: json.dumps(meta | {"vocab_size": "20"}),
        lambda meta: json.dumps(meta | {"vocab_size": -1}),
        lambda meta: json.dumps(meta | {"dtype": "O"}),
        lambda meta: json.dumps(meta | {"dtype": "uint32"}),
        lambda meta: json.dumps({key: meta[key] for key in meta if key != "tokenizer"}),
        lambda meta: "\udcff",
    ],
)
def test_a_damaged_meta_is_refused(damage, tmp_path):
    numbers(tmp_path, 20)
    meta = json.loads((tmp_path / "meta.json").read_text("utf8"))
    (tmp_path / "meta.json").write_bytes(damage(meta).encode("utf8", "surrogateescape"))
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
        loader.Tokens(tmp_path, "train")


@pytest.mark.parametrize("size", [0, 26, 27, 30])
def test_shards_that_do_not_add_up_are_refused(size, tmp_path):
    numbers(tmp_path, 20, shard_tokens=14)
    with open(tmp_path / "train_00000.bin", "r+b") as file:
        file.truncate(size)
    with pytest.raises(UserError, match=f"hold {size + 12} bytes, not the 40"):
        loader.Tokens(tmp_path, "train")


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    tokens = numbers(tmp_path, 20)
    np.full(20, 20, np.uint16).tofile(tokens.paths[0])  # 20 is the mask: not an id of text
    with pytest.raises(UserError, match="ids that its vocabulary lacks"):
        tokens[:5]


def test_a_shard_cut_under_our_hands_is_an_error(tmp_path):
    tokens = numbers(tmp_path, 20)
    os.truncate(tokens.paths[0], 10)
    with pytest.raises(UserError, match="shorter than it was"):
        tokens[:]


# ---- Shuffling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 70), 99, 100, 101, 1000, 4095, 4096, 4097])
def test_permute_is_a_bijection(n):
    for key in (0, 1, 2**64 - 1):
        assert sorted(loader.permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_permute_needs_no_memory_for_a_trillion_and_takes_any_shape():
    n = 10**12
    image = loader.permute(np.arange(n - 10_000, n).reshape(100, 100), n, 5)
    assert image.shape == (100, 100) and image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == 10_000
    assert loader.permute(n - 1, n, 5) == image[-1, -1]


def test_permutations_look_random_and_differ_between_keys():
    n, i = 5000, np.arange(5000)
    images = np.stack([loader.permute(i, n, key) for key in range(40)])  # (40, n)
    assert abs(np.abs(images - i).mean() / n - 1 / 3) < 0.01  # mean distance of two random points
    follows = (np.diff(images, axis=1) == 1).sum(1)  # (40,) about Poisson(1)
    agrees = (images[1:] == images[:-1]).sum(1)  # (39,) about Poisson(1)
    assert follows.mean() < 2 and agrees.mean() < 2
    thirds = np.bincount((images[:, 0] * 3) // n, minlength=3)
    assert thirds.min() > 3  # even the image of one index is anywhere


def test_every_order_of_three_comes_up_equally_often():
    orders = Counter(tuple(loader.permute(np.arange(3), 3, key).tolist()) for key in range(3000))
    assert len(orders) == 6 and max(orders.values()) < 650 and min(orders.values()) > 360


def test_an_epoch_takes_every_window_once_and_the_next_one_takes_others(tmp_path):
    blocks = loader.Blocks(numbers(tmp_path, 1000), 8, seed=1)
    assert blocks.n == 124
    n = 3 * blocks.n  # 3 epochs in one batch
    seen = blocks.batch(0, np.arange(n)).reshape(3, blocks.n, 8)
    assert np.array_equal(seen, seen[..., :1] + np.arange(8))  # windows are consecutive text
    starts = seen[..., 0]
    for epoch in starts:
        offset = epoch.min()
        assert offset <= 1000 - 8 * blocks.n
        assert np.array_equal(np.sort(epoch), offset + 8 * np.arange(blocks.n))
    assert len({epoch.min() for epoch in starts}) > 1, "each epoch has an offset of its own"
    assert not np.array_equal(starts[0] // 8, starts[1] // 8), "each epoch has an order of its own"


def test_every_offset_and_every_token_come_up(tmp_path):
    blocks = loader.Blocks(numbers(tmp_path, 100), 8, seed=1)
    first = [blocks.starts(e * blocks.n + np.arange(blocks.n)).min() for e in range(200)]
    assert set(first) == set(range(100 - 8 * blocks.n + 1))
    assert set(blocks.batch(0, np.arange(2400)).ravel()) == set(range(100))


def test_a_batch_does_not_depend_on_how_its_positions_are_shared_out(tmp_path):
    tokens = numbers(tmp_path, 1000)
    whole = loader.Blocks(tokens, 8, seed=3).batch(17 * 12, np.arange(12))
    for world in (2, 3, 4):
        for rank in range(world):
            blocks = loader.Blocks(tokens, 8, seed=3)
            part = blocks.batch(17 * 12, np.arange(rank, 12, world))
            assert np.array_equal(part, whole[rank::world])
    assert not np.array_equal(loader.Blocks(tokens, 8, seed=4).batch(17 * 12, np.arange(12)), whole)
    assert not np.array_equal(loader.Blocks(tokens, 8, seed=3).batch(18 * 12, np.arange(12)), whole)


@pytest.mark.parametrize("n", [8, 9, 15, 16, 17])
def test_a_text_of_hardly_a_block_still_trains_and_a_shorter_one_is_an_error(n, tmp_path):
    tokens = numbers(tmp_path, n)
    batch = loader.Blocks(tokens, 8, seed=0).batch(0, np.arange(50))
    assert set(batch[:, 0]) <= set(range(n - 7)) and len(set(batch[:, 0])) > min(n - 8, 4)
    with pytest.raises(UserError, match=f"holds {n} tokens, less than one block of {n + 1}"):
        loader.Blocks(tokens, n + 1, seed=0)


def test_evaluation_blocks_are_the_text_in_order_with_its_remainder(tmp_path):
    blocks = loader.in_order(numbers(tmp_path, 20, shard_tokens=7), 8)
    assert [len(block) for block in blocks] == [8, 8, 4]
    assert np.array_equal(np.concatenate(blocks), np.arange(20))


def test_memory_and_file_handles_do_not_grow_with_the_data(tmp_path):
    script = f"""
import json, os, resource, sys
from pathlib import Path
import numpy as np
from data import loader, tokenizer
n, shards, folder = int(sys.argv[1]), int(sys.argv[2]), Path({str(tmp_path)!r}, sys.argv[1])
folder.mkdir()
for shard in range(shards):
    with open(folder / f"train_{{shard:05d}}.bin", "wb") as file:
        file.truncate(2 * n // shards)  # a sparse file: zeros that take no space
split = {{"tokens": n, "documents": 1, "bytes": n}}
meta = {{"tokenizer": {{"kind": "byte"}}, "vocab_size": 256, "dtype": "uint16"}}
meta["splits"] = {{"train": split}}
(folder / "meta.json").write_text(json.dumps(meta))
blocks = loader.Blocks(loader.Tokens(folder, "train"), 1024, 0)
before = len(os.listdir("/dev/fd"))
for step in range(100):
    blocks.batch(32 * step, np.arange(32))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak //= 1024 if sys.platform == "darwin" else 1  # KiB
print(len(os.listdir("/dev/fd")) - before, peak)
"""
    sizes = ("1000000", "1"), ("1000000000", "2000")
    small, large = (command("-c", script, *size).stdout.split() for size in sizes)
    assert small[0] == large[0] == "0"
    assert abs(int(small[1]) - int(large[1])) < 4000, "kB of resident memory"


# ---- n-grams -------------------------------------------------------------------------------------


def plain_ngram(train, h, v, V):
    """Witten-Bell p(v | h) by the book: one context, one token at a time."""
    if h is None:
        return 1 / V
    after = [train[i + len(h)] for i in range(len(train) - len(h)) if train[i : i + len(h)] == h]
    backoff = plain_ngram(train, h[1:] if h else None, v, V)
    if not after:
        return backoff
    kinds = len(set(after))
    return (after.count(v) + kinds * backoff) / (len(after) + kinds)


def test_ngram_baselines_equal_plain_counting_and_are_normalised(tmp_path):
    train, val = "abracadabra, abra\n", "cab, arcade"
    alphabet = "".join(sorted(set(train + val)))
    writer.prepare(tmp_path, [("train", train), ("val", val)], tokenizer.Char(alphabet))
    got = ngram.baseline(tmp_path)
    for n, name in enumerate(["unigram", "bigram", "trigram"]):
        contexts = [val[max(0, i - n) : i] for i in range(len(val))]
        for h in contexts:
            assert math.isclose(sum(plain_ngram(train, h, v, len(alphabet)) for v in alphabet), 1)
        p = [plain_ngram(train, h, v, len(alphabet)) for h, v in zip(contexts, val, strict=True)]
        assert math.isclose(got[name], -sum(map(math.log, p)) / len(p))


def test_ngram_baselines_stop_where_the_table_would_be_too_large(tmp_path):
    writer.prepare(tmp_path, [("train", "abcabc"), ("val", "abc")], tokenizer.Byte())
    assert list(ngram.baseline(tmp_path, limit=256**2)) == ["unigram", "bigram"]
    assert list(ngram.baseline(tmp_path, limit=100)) == []


# ---- The sets ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pydocs_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pydocs")
    done = command("-m", "data.pydocs.prepare", f"--out={folder}")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder, done.stdout


def test_pydocs_prepares_about_two_megabytes_and_says_which_text_it_is(pydocs_folder):
    folder, printed = pydocs_folder
    meta = loader.read_meta(folder)
    train, val = (meta["splits"][split] for split in ("train", "val"))
    assert 1_000_000 < train["tokens"] + val["tokens"] < 4_000_000
    assert 0.01 < val["tokens"] / train["tokens"] < 0.15 and val["documents"] > 15
    assert 90 <= meta["vocab_size"] <= 160
    assert f"{train['tokens']:,} tokens" in printed and "sha256" in printed


def test_pydocs_holds_out_whole_documents_and_no_long_paragraph_is_on_both_sides(pydocs_folder):
    sides = {}
    for split in ("train", "val"):
        tokens = loader.Tokens(pydocs_folder[0], split)
        paragraphs = tokenizer.from_meta(tokens.meta["tokenizer"]).decode(tokens[:]).split("\n\n")
        sides[split] = [" ".join(paragraph.split()) for paragraph in paragraphs]
    long = {split: {p for p in paragraphs if len(p) >= 60} for split, paragraphs in sides.items()}
    assert len(long["val"]) > 50 and not long["train"] & long["val"]
    documents = pydocs.documents()
    assert hashlib.sha256("\n\n".join(documents.values()).encode()).hexdigest() in pydocs_folder[1]
    held = [text for name, text in documents.items() if writer.is_held_out(name, pydocs.HELD_OUT)]
    assert " ".join(" ".join(held).split()) == " ".join(" ".join(sides["val"]).split())


def test_trigrams_beat_bigrams_beat_unigrams_on_pydocs(pydocs_folder):
    nats = ngram.baseline(pydocs_folder[0])
    assert 1.5 < nats["trigram"] < nats["bigram"] - 0.3 < nats["unigram"] - 0.6 < 3.2


def test_shakespeare_has_the_customary_split(tmp_path, shared):
    copy = shared("data/tinyshakespeare.txt")
    shakespeare.main(parse([f"--input={copy}", f"--out={tmp_path}"], shakespeare, tokenizer))
    train, val = loader.Tokens(tmp_path, "train"), loader.Tokens(tmp_path, "val")
    assert (len(train), len(val), train.vocab_size) == (1_003_854, 111_540, 65)
    vocabulary = tokenizer.from_meta(train.meta["tokenizer"])
    assert vocabulary.decode(train[:]) + vocabulary.decode(val[:]) == copy.read_text("utf8")


def test_text_reads_every_kind_of_file_and_folder_alike(tmp_path):
    documents = [f"Document {i}: ünï.\n\nIts end." for i in range(4)]
    lines = [json.dumps({"text": document, "id": 1}) + "\n\n" for document in documents]
    as_lines = "".join(lines).encode()
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "0.jsonl").write_bytes(as_lines)
    (tmp_path / "a" / "1.jsonl.gz").write_bytes(gzip.compress(as_lines))
    (tmp_path / "a" / "b" / "2.jsonl.xz").write_bytes(lzma.compress(as_lines))
    (tmp_path / "a" / "ignored.csv").write_text("1,2")
    windows = documents[0].replace("\n", "\r\n").encode()
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + windows + b"\n")
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(documents[1].encode()))
    (tmp_path / "t.txt.xz").write_bytes(lzma.compress(documents[2].encode()))
    items = [str(tmp_path / name) for name in ("a", "t.txt", "t.txt.gz", "t.txt.xz")]
    assert list(text.documents(items)) == documents * 3 + documents[:3]


@pytest.mark.parametrize(
    "paragraph", ["One line of words.\n\n", "One line of words.\n", "One line of words. ", "x"]
)
def test_one_long_text_is_cut_into_documents_that_lose_nothing(paragraph, tmp_path):
    whole = paragraph * (100_000 // len(paragraph))
    (tmp_path / "long.txt").write_text(whole)
    documents = list(text.documents([str(tmp_path / "long.txt")]))
    assert all(4096 - 2 <= len(document) <= 8192 for document in documents[:-1])
    assert "".join(documents).replace("\n", "") == whole.replace("\n", "")


def test_documents_are_held_out_by_what_they_say_alone():
    texts = [f"document {i}" for i in range(4000)]
    held = {t for split, t in text.split(lambda: texts, 0.05) if split == "val"}
    assert 140 < len(held) < 260
    assert held == {t for split, t in text.split(lambda: texts[::-1] * 2, 0.05) if split == "val"}
    assert held < {t for split, t in text.split(lambda: texts, 0.1) if split == "val"}
    assert {split for split, _ in text.split(lambda: texts, 0)} == {"train"}
    assert {split for split, _ in text.split(lambda: texts, 1)} == {"val"}


def test_what_val_names_is_held_out_and_nothing_else(tmp_path):
    for name, part in (("own.txt", "abc " * 3000), ("held.jsonl", json.dumps({"text": "xyz"}))):
        (tmp_path / name).write_text(part)
    words = [f"--input={tmp_path}/own.txt", f"--val={tmp_path}/held.jsonl", "--tokenizer=char"]
    text.main(parse([*words, f"--out={tmp_path}/out", "--workers=1"], text, tokenizer))
    train, val = (loader.Tokens(tmp_path / "out", split) for split in ("train", "val"))
    decode = tokenizer.from_meta(train.meta["tokenizer"]).decode
    assert decode(val[:].tolist()) == "xyz" and set(decode(train[:].tolist())) == set("abc \n")
    assert val.meta["splits"]["train"]["documents"] > 1


def test_gpt2_and_llama_prepare_text_with_several_processes_and_no_network(
    tmp_path, shared, offline
):
    pytest.importorskip("sentencepiece")
    said = [f"Document {i} says {i * i}." for i in range(300)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in said))
    env = {
        "TIKTOKEN_CACHE_DIR": offline,
        "NANOMDM_SHARED": str(shared("data/llama_tokenizer").parent.parent),
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    for kind, border in (("gpt2", "<|endoftext|>"), ("llama", "<s>")):
        out = tmp_path / kind
        files = [f"--input={tmp_path / 'in.jsonl'}", f"--out={out}"]
        args = [*files, f"--tokenizer={kind}", "--workers=2"]
        done = command("-m", "data.text.prepare", *args, **env)
        assert done.returncode == 0, done.stderr
        tokens = loader.Tokens(out, "train")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", offline)
            read = tokenizer.from_meta(tokens.meta["tokenizer"]).decode(tokens[:])
        documents = [part.strip() for part in read.split(border)]
        assert kind == "llama" or documents.pop() == "", (
            "GPT-2's mark ends a document, Llama's begins one"
        )
        assert documents == [line for line in said if not writer.is_held_out(line, 0.05)]
        assert tokens.meta["splits"]["train"]["documents"] == len(documents)


BAD = {
    "nothing": ([], "say what to prepare"),
    "missing.txt": (["--input=missing.txt"], "no file or folder missing.txt"),
    "empty.txt": (["--input=empty.txt"], "empty.txt holds no text"),
    "empty folder": (["--input=hollow"], "hollow holds no text"),
    "a kind unknown": (["--input=table.csv"], "cannot tell what table.csv holds"),
    "not UTF-8": (["--input=latin.txt"], "latin.txt is not UTF-8"),
    "a cut gz": (["--input=cut.txt.gz"], "cut.txt.gz is damaged"),
    "no gz": (["--input=no.txt.gz"], "no.txt.gz is damaged"),
    "a cut xz": (["--input=cut.txt.xz"], "cut.txt.xz is damaged"),
    "not JSON": (["--input=bad.jsonl", "--tokenizer=byte"], "bad.jsonl, line 3: not JSON"),
    "an array": (["--input=array.jsonl"], "array.jsonl, line 1: a JSON array; each line"),
    "no key": (["--input=key.jsonl.gz"], 'key.jsonl.gz, line 2: no text under the key "text"'),
    "fraction": (["--input=short.txt", "--val_fraction=2"], "val_fraction must be in [0, 1]"),
    "two held-out parts": (
        ["--input=short.txt", "--val=short.txt", "--val_fraction=0.1"],
        "not both",
    ),
    "held-out text that is learnt": (
        ["--input=short.txt,hollow", "--val=hollow/../link.txt"],
        "hollow/../link.txt of --val is in --input, too",
    ),
    "tokenizer": (
        ["--input=short.txt", "--tokenizer=chra"],
        "unknown tokenizer 'chra'; did you mean 'char'?",
    ),
    "key": (
        ["--input=short.txt", "--tokeniser=char"],
        "unknown key --tokeniser; did you mean 'tokenizer'?",
    ),
    "no vocabulary": (["--input=short.txt", "--tokenizer=gpt2"], "set TIKTOKEN_CACHE_DIR"),
}


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    whole = b'{"text": "good"}\n'
    (folder / "hollow").mkdir()
    (folder / "empty.txt").write_text(" \n")
    (folder / "table.csv").write_text("1,2")
    (folder / "short.txt").write_text("too short")
    (folder / "link.txt").symlink_to("short.txt")
    (folder / "array.jsonl").write_text(json.dumps([{"text": "good"}], indent=1))
    (folder / "latin.txt").write_bytes("naïve".encode("latin1"))
    (folder / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(10_000).hex().encode())[:5000])
    (folder / "no.txt.gz").write_bytes(b"plain text")
    (folder / "cut.txt.xz").write_bytes(lzma.compress(os.urandom(10_000).hex().encode())[:5000])
    (folder / "bad.jsonl").write_bytes(whole * 2 + b'{"text": "bad}\n' + whole)
    (folder / "key.jsonl.gz").write_bytes(gzip.compress(whole + b'{"txt": "bad"}\n'))
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, bad_files):
    args, says = BAD[case]
    cache = {"TIKTOKEN_CACHE_DIR": str(bad_files / "hollow"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = command("-m", "data.text.prepare", "--out=out", *args, cwd=bad_files, **cache)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert not (bad_files / "out").exists()


def test_shakespeare_without_its_file_is_one_line(tmp_path):
    args = ["--input=missing.txt", f"--out={tmp_path / 'out'}"]
    done = command("-m", "data.shakespeare.prepare", *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "missing.txt" in done.stderr
    assert not (tmp_path / "out").exists()
