"""The zero-shot sets: each detokeniser's rules, RADD's rows and what it drops, honest folders."""

import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from config import UserError, parse
from data import loader, writer
from data.tokenizer import Byte, Char
from data.zeroshot import prepare as zeroshot

ROOT = Path(__file__).parent.parent


def command(*args, **env):
    """Run the program as the user would."""
    line = [sys.executable, "-m", "data.zeroshot.prepare", *args]
    return subprocess.run(
        line, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def made(tmp_path):
    """made(set, text of its file, **keys) -> (meta, ids, Byte()) of the folder it prepares."""
    names = {
        "lambada": "lambada_test.jsonl",
        "ptb": "ptb.test.txt",
        "wikitext103": "wiki.test.raw",
        "lm1b": "lm1b_sample.txt",
    }

    def run(name, text, **keys):
        (tmp_path / names[name]).write_text(text, encoding="utf8")
        given = {
            "set": name,
            "from": str(tmp_path),
            "out": str(tmp_path / "out"),
            "tokenizer": "byte",
        } | keys
        meta = zeroshot.main(zeroshot.DEFAULTS | given)[name]
        return meta, loader.Tokens(tmp_path / "out" / name, "test")[:], Byte()

    return run


# ---- Detokenisers --------------------------------------------------------------------------------

RULES = [
    (zeroshot.lambada, "  he said, “no” \n", '\nhe said, "no"'),
    (zeroshot.wikitext, "the dogs ' house", "the dogs' house"),
    (zeroshot.wikitext, "guest @-@ star , 1 @,@ 000 at 2 @.@ 5 m", "guest-star, 1,000 at 2.5 m"),
    (zeroshot.wikitext, "so : a ; b . c ! d ? e , f", "so: a; b. c! d? e, f"),
    (zeroshot.wikitext, "it ended .", "it ended ."),  # no space behind the mark
    (zeroshot.wikitext, "and . . . so", "and. .. so"),  # marks one after another: every second one
    (zeroshot.wikitext, "( 24 in ) and [ sic ] and { x }", "(24 in) and [sic] and {x}"),
    (zeroshot.wikitext, "a \" bird \" and ' fish '", "a \"bird\" and 'fish'"),
    (zeroshot.wikitext, " = = = = Deep = = = = \n", " ==== Deep ====\n"),
    (zeroshot.wikitext, " = = = Early = = = \n", " === Early ===\n"),
    (zeroshot.wikitext, " = = Early = = \n", " == Early ==\n"),
    (zeroshot.wikitext, " = Title = \n", " = Title =\n"),
    (zeroshot.wikitext, "at 5 ° C", "at 5°C"),
    (zeroshot.wikitext, "a \n b", "a\nb"),
    (zeroshot.wikitext, "about N of Jon 's", "about 1 of Jon's"),
    (zeroshot.ptb, "the bank 's", "the bank's"),
    (zeroshot.ptb, "the banks ' view", "the banks' view"),
    (zeroshot.ptb, "it did n't", "it didn't"),
    (zeroshot.ptb, "a \n b", "a\nb"),
    (zeroshot.ptb, r"his\/her", "his/her"),
    (zeroshot.ptb, "from N N N N to", "from 1 1 1 1 to"),
    (zeroshot.ptb, "$ N and # N million", "$1 and #1 million"),
    (zeroshot.ptb, "a <unk> man", "a ? man"),
    (zeroshot.ptb, "N years", "N years"),  # no space before
    (zeroshot.lm1b, "see http : / / a.b or https : / / c.d", "see http://a.b or https://c.d"),
    (zeroshot.lm1b, "Wal-Mart 's we 're", "Wal-Mart's we're"),
    (zeroshot.lm1b, "one ends . Two ends .", "one ends. Two ends."),
    (zeroshot.lm1b, "so ? yes ! who ?", "so? yes! who?"),
    (zeroshot.lm1b, "stop !", "stop!"),
    (zeroshot.lm1b, "a , b : c ; d", "a, b: c; d"),
    (zeroshot.lm1b, "and / or", "and/or"),
    (zeroshot.lm1b, "\" a b \" and ' c d e '", "\"a b\" and 'c d e'"),
    (zeroshot.lm1b, "( a b ) and [ c ]", "(a b) and [c]"),
    (zeroshot.lm1b, "$ 5 or £ 4", "$5 or £4"),
]


@pytest.mark.parametrize(("rule", "before", "after"), RULES)
def test_each_rule_undoes_its_part_of_a_sets_tokenization(rule, before, after):
    assert rule(before) == after


def test_real_rows_read_as_english_again(shared):
    folder = shared("data/zero_shot_ppl")
    config = zeroshot.DEFAULTS
    rows = {
        name: list(zeroshot.texts(name, zeroshot.find(name, folder)[0], config, ""))
        for name in zeroshot.SETS
    }
    assert rows["ptb"][0] == "no it wasn't black monday"
    assert rows["wikitext103"][:3] == ["", " = Robert Boulter =\n", ""]
    assert ' as "Craig" in the episode "Teddy\'s Story"' in rows["wikitext103"][3]
    spokesman = "A spokesman said the company has been affected by the credit crunch in the "
    assert rows["lm1b"][2] == spokesman + "United States."
    assert rows["lambada"][0].startswith("\nIn my palm is a clear stone")
    assert len(rows["lambada"]) == 5153
    assert len(rows["wikitext103"]) == 4358 and len(rows["ptb"]) == 3761


# ---- Examples and marks --------------------------------------------------------------------------


def test_every_row_has_its_mark_and_a_blank_line_is_a_row(shared, tmp_path, monkeypatch):
    shutil.copytree(shared("data/tiktoken_cache"), tmp_path / "cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n Some text . And more \n")
    given = {"set": "wikitext103", "from": str(tmp_path), "out": str(tmp_path / "out")}
    meta = zeroshot.main(zeroshot.DEFAULTS | given)["wikitext103"]
    ids = loader.Tokens(tmp_path / "out/wikitext103", "test")[:]
    texts = ["", " = Title =\n", "", " Some text. And more\n"]
    import tiktoken

    expected = [i for text in texts for i in [*tiktoken.get_encoding("gpt2").encode(text), 50256]]
    assert ids.tolist() == expected
    assert meta["splits"]["test"] == {
        "tokens": len(expected),
        "documents": 4,
        "bytes": sum(map(len, texts)),
    }


def test_without_marks_a_newline_ends_each_row(made):
    _, ids, text = made("ptb", " the bank 's \n it did n't \n", eos=False)
    assert text.decode(ids) == "the bank's\nit didn't\n"
    _, ids, text = made("wikitext103", " \n = Title = \n \n", eos=False)
    assert text.decode(ids) == "\n = Title =\n\n"


def test_a_tokenizer_without_a_mark_has_its_own_border(made):
    meta, ids, text = made("ptb", "one \n two \n")
    assert (
        text.decode(ids) == "one\n\ntwo\n\n" and meta["splits"]["test"]["bytes"] == len(ids) == 10
    )


def test_rows_can_be_left_as_they_are(made):
    _, ids, text = made("ptb", " the bank 's \n", detokenise=False)
    assert text.decode(ids) == "the bank 's\n\n"


def test_a_prepared_folder_lends_its_tokenizer(made, tmp_path):
    writer.prepare(
        tmp_path / "mine",
        [("train", "abcdefghijklmnopqrstuvwxyz '")],
        Char("\nabcdefghijklmnopqrstuvwxyz '"),
    )
    meta, _, _ = made("ptb", " the bank 's \n", tokenizer=str(tmp_path / "mine"))
    assert meta["tokenizer"]["kind"] == "char" and meta["vocab_size"] == 29


# ---- What RADD drops -----------------------------------------------------------------------------


def dropped_by_hand(rows, workers, block):
    """As `workers` processes do it: each takes consecutive rows, 1,000 at a time, whole blocks."""
    kept, first = [], 0
    for worker in range(workers):
        end = first + len(rows) // workers + (worker < len(rows) % workers)
        for start in range(first, end, 1000):
            stream = list(itertools.chain(*rows[start : min(start + 1000, end)]))
            while len(stream) >= block:
                kept += stream[:block]
                stream = stream[block:]
        first = end
    return kept


@pytest.mark.parametrize(
    ("n", "workers", "block"), [(5153, 8, 64), (2500, 2, 100), (1000, 1, 7), (7, 3, 4), (2, 8, 2)]
)
def test_radds_remainders_are_those_of_its_workers_and_batches(n, workers, block):
    generator = np.random.default_rng(0)
    rows = [generator.integers(100, size=length) for length in generator.integers(1, 9, size=n)]
    kept = np.concatenate(list(zeroshot.whole_blocks(rows, workers, block)))
    assert kept.tolist() == dropped_by_hand(rows, workers, block) and len(kept) % block == 0


def test_by_default_nothing_is_dropped_and_with_radds_protocol_it_says_how_much(made):
    text = "a line of words \n" * 100
    whole, ids, _ = made("ptb", text)
    radd, kept, _ = made("ptb", text, protocol="radd", num_proc=3, block_size=50)
    assert (
        len(ids) == 1700
        and "nothing dropped. Unlike RADD: the tokenizer is byte; remainders are kept."
        in whole["protocol"]
    )
    assert (
        len(kept) == 1650
        and "remainders below 50 of 3 workers dropped: 50 tokens" in radd["protocol"]
    )
    assert "other blocks or workers" in radd["protocol"] and radd["splits"]["test"]["bytes"] == 1650


# ---- Where it comes from -------------------------------------------------------------------------


def test_the_protocol_names_every_deviation(made, capsys):
    meta, _, _ = made("lm1b", "A dog .\n", detokenise=False, eos=False)
    unlike = [
        "it is a sample, not the whole held-out set",
        "the tokenizer is byte",
        "the text is not detokenised",
    ]
    unlike += ["no mark between rows", "remainders are kept"]
    assert meta["protocol"].endswith(f"Unlike RADD: {'; '.join(unlike)}.")
    assert meta["protocol"] in capsys.readouterr().out


def test_the_test_part_of_wikitext2_is_a_deviation_and_the_training_part_preferred(tmp_path):
    (tmp_path / "wikitext2_raw.test.txt").write_text("test \n")
    assert zeroshot.find("wikitext2", tmp_path) == (
        [tmp_path / "wikitext2_raw.test.txt"],
        zeroshot.TEST,
    )
    (tmp_path / "wiki.train.raw").write_text("train \n")
    assert zeroshot.find("wikitext2", tmp_path) == ([tmp_path / "wiki.train.raw"], "")


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


def tarred(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """served(set, name, bytes): a real server has this file, and is the set's official address."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()

    def serve(which, name, content):
        (tmp_path / "served" / name).write_bytes(content)
        url, digest = (
            f"http://127.0.0.1:{httpd.server_port}/{name}",
            hashlib.sha256(content).hexdigest(),
        )
        source = zeroshot.SETS[which]._replace(url=url, size=len(content), sha256=digest)
        monkeypatch.setitem(zeroshot.SETS, which, source)

    yield serve
    httpd.shutdown()
    httpd.server_close()


WIKI = {"w/wiki.train.raw": "train \n", "w/wiki.test.raw": "test \n"}
BILLION = {
    "b/held/news.en.heldout-00001-of-00050": "Dog two .\n",
    "b/held/news.en.heldout-00000-of-00050": "Dog one .\n",
    "b/../../evil": "no",
    "b/train/news.en-00001-of-00100": "no",
}


@pytest.mark.parametrize(
    ("name", "file", "content", "text"),
    [
        ("ptb", "ptb.test.txt", b"one 's \n two \n", "one's\n\ntwo\n\n"),
        ("wikitext2", "w.zip", zipped(WIKI), "train\n\n\n"),
        ("wikitext103", "w.zip", zipped(WIKI), "test\n\n\n"),
        ("lm1b", "b.tar.gz", tarred(BILLION), "Dog one.\n\nDog two.\n\n"),
    ],
    ids=["ptb", "wikitext2", "wikitext103", "lm1b"],
)
def test_a_set_comes_from_its_official_address_out_of_its_archive(
    name, file, content, text, served, tmp_path
):
    served(name, file, content)
    zeroshot.main(
        zeroshot.DEFAULTS | {"set": name, "out": str(tmp_path / "out"), "tokenizer": "byte"}
    )
    assert Byte().decode(loader.Tokens(tmp_path / "out" / name, "test")[:]) == text
    assert not [
        path for path in tmp_path.rglob("*") if path.name in ("evil", "news.en-00001-of-00100")
    ]


def test_a_damaged_archive_is_one_line(served, tmp_path):
    served("wikitext103", "w.zip", zipped(WIKI)[:-9])
    with pytest.raises(UserError, match=r"w\.zip is damaged; remove it"):
        zeroshot.main(
            zeroshot.DEFAULTS
            | {"set": "wikitext103", "out": str(tmp_path / "out"), "tokenizer": "byte"}
        )
    assert not (tmp_path / "out/wikitext103").exists()


# ---- Errors --------------------------------------------------------------------------------------


PTB, LAMBADA = ["--set=ptb", "--from=."], ["--set=lambada", "--from=."]
MISTAKES = [
    (["--set=ptp"], {}, "unknown set 'ptp'; did you mean 'ptb'?"),
    (["--set=ptb", "--from=nowhere"], {}, "no file or folder nowhere"),
    (PTB, {}, ". holds nothing of ptb: none of ptb.test.txt"),
    (
        ["--from=x.txt"],
        {"x.txt": b"a"},
        "x.txt is one file: say which set it is with --set=lambada|",
    ),
    (PTB, {"ptb.test.txt": b"\n\n"}, "ptb.test.txt holds no text"),
    (PTB, {"ptb.test.txt": b"a\xff"}, "ptb.test.txt is not UTF-8 text"),
    (
        LAMBADA,
        {"lambada_test.jsonl": b'{"text": "a"}\n{"txt": 1}'},
        'lambada_test.jsonl, line 2: no key "text"',
    ),
    (LAMBADA, {"lambada_test.jsonl": b'{"text": "a"}\nno'}, "lambada_test.jsonl, line 2: not JSON"),
    ([*PTB, "--protocol=rad"], {}, "unknown protocol 'rad'; did you mean 'radd'?"),
    ([*PTB, "--num_proc=0"], {}, "num_proc must be 1 or more, not 0"),
    (
        [*PTB, "--protocol=radd"],
        {"ptb.test.txt": b"a b"},
        "no 1,000 rows of a worker fill a block of 1024 tokens",
    ),
    (
        [*PTB, "--tokenizer=gpt3"],
        {"ptb.test.txt": b"a b"},
        "unknown tokenizer 'gpt3'; did you mean 'gpt2'?",
    ),
]


@pytest.mark.parametrize(("args", "files", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    args, files, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).write_bytes(content)
    with pytest.raises(UserError) as error:
        zeroshot.main(parse(["--tokenizer=byte", "--out=out", *args], zeroshot))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("out").exists()


def test_the_command_prepares_a_folder_and_says_what_it_did(tmp_path):
    (tmp_path / "ptb.test.txt").write_text("it did n't \n")
    done = command("--set=ptb", f"--from={tmp_path}", f"--out={tmp_path}/out", "--tokenizer=byte")
    assert (
        done.returncode == 0 and "ptb: test 11 tokens of 1 document; byte tokenizer" in done.stdout
    ), done.stderr
    assert "1 row of ptb.test.txt, detokenised" in done.stdout
    assert json.loads((tmp_path / "out/ptb/meta.json").read_text())["protocol"] in done.stdout


def test_the_command_fails_in_one_line(tmp_path):
    done = command("--set=ptb", f"--from={tmp_path}", f"--out={tmp_path}/out")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
