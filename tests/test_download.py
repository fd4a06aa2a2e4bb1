"""Downloads against a real HTTP server that behaves as badly as servers do."""

import contextlib
import email.utils
import gzip
import hashlib
import importlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from config import UserError, parse
from data import download, examples, loader, tokenizer
from data.shakespeare import prepare as shakespeare

ROOT = Path(__file__).parent.parent
BODY = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(BODY).hexdigest()

NONSENSE = [
    "-5",
    "1" * 5000,
    "1e9",
    "0x10",
    "²",
    "12 34",
    "",
    "None",
    "bytes",
    "bytes 0-1/" + "9" * 5000,
    "bytes 5-1/-2",
]


class Handler(BaseHTTPRequestHandler):
    """Play the server's script, an entry a request, noting what is asked; then behave well."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, dict(self.headers)))
        entry = server.script.pop(0) if server.script else {}
        status, keys = entry.get("status", 200), entry.get("headers", {})
        body = entry.get("body", server.files.get(Path(self.path).name, server.body))
        if server.hashes:
            keys = {"X-Linked-Etag": hashlib.sha256(body).hexdigest(), **keys}
        asked = self.headers.get("Range")
        current = self.headers.get("If-Range") in (None, server.etag)
        if status == 200 and asked and current and not entry.get("ignore_range"):
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if first < len(body) else 416
            keys = {**keys, "Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"}
            if status == 416:
                keys["Content-Range"] = f"bytes */{len(body)}"
            body = body[first:] if status == 206 else b""
        self.send_response(status)
        always = {"Content-Length": len(body), "ETag": server.etag, "Connection": "close"}
        for key, value in {**always, **keys}.items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have heard enough
            body = body[: entry.get("drop_after", len(body))]
            for start in range(0, len(body), 2**16):
                self.wfile.write(body[start : start + 2**16])
                time.sleep(server.pause)

    def log_message(self, *_):
        pass


def serve():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.script, server.asked, server.body, server.etag = [], [], BODY, '"v1"'
        server.files = {}  # {name: body} of those unlike the rest
        server.hashes = False  # state hashes as the Hub does
        server.pause = 0.0  # seconds after every 64 KiB
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server():
    yield from serve()


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    for name in ("HF_TOKEN", "HF_ENDPOINT", "NANOMDM_CACHE"):
        monkeypatch.delenv(name, raising=False)


def fetch(server, folder, *script, **options):
    server.script[:] = script
    return download.fetch(
        f"{server.url}/file.bin", folder / "sub" / "file.bin", first_wait=0.01, **options
    )


def only(folder):
    """The one file of a folder and all below: nothing half-written lies about."""
    [path] = [path for path in folder.rglob("*") if path.is_file()]
    return path


def ranges(server):
    return [headers.get("Range") for _, headers in server.asked]


def test_a_file_is_fetched_once_and_then_taken_from_where_it_is(server, tmp_path):
    for options in ({"sha256": SHA256}, {"size": len(BODY)}, {}):
        assert fetch(server, tmp_path, **options).read_bytes() == BODY
    assert len(server.asked) == 1 and only(tmp_path).name == "file.bin"


def test_a_wrong_file_that_is_there_is_fetched_again(server, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.bin").write_bytes(BODY[:-1])
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == BODY


def test_a_dropped_connection_is_taken_up_where_it_broke(server, tmp_path):
    drops = [{"drop_after": 200_000}, {"drop_after": 300_000}, {"drop_after": 400_000}]
    assert fetch(server, tmp_path, *drops).read_bytes() == BODY
    asked = ranges(server)
    starts = [int(text[6:-1]) for text in asked[1:]]
    assert asked[0] is None and len(asked) == 4
    assert 0 < starts[0] < starts[1] < starts[2] < len(BODY)
    only(tmp_path)


def test_many_drops_are_survived_as_long_as_bytes_come(server, tmp_path):
    assert fetch(server, tmp_path, *[{"drop_after": 70_000}] * 14).read_bytes() == BODY


def test_a_server_that_knows_no_ranges_sends_it_all_again(server, tmp_path):
    script = [
        {"drop_after": 300_000},
        {"ignore_range": True, "drop_after": 500_000},
        {"ignore_range": True},
    ]
    assert fetch(server, tmp_path, *script).read_bytes() == BODY
    assert len(server.asked) == 3


def test_a_file_that_changes_half_way_is_fetched_from_its_beginning(server, tmp_path):
    server.body = BODY[::-1]
    script = [{"body": BODY, "headers": {"ETag": '"v0"'}, "drop_after": 300_000}]
    assert fetch(server, tmp_path, *script).read_bytes() == BODY[::-1]


def test_a_range_that_was_not_asked_for_is_not_believed(server, tmp_path):
    wrong = {
        "status": 206,
        "headers": {"Content-Range": f"bytes 5-{len(BODY) - 1}/{len(BODY)}"},
        "body": BODY[5:],
    }
    assert fetch(server, tmp_path, {"drop_after": 300_000}, wrong).read_bytes() == BODY


def test_an_interrupted_run_is_taken_up_by_the_next_where_a_hash_can_tell(server, tmp_path):
    (tmp_path / "sub").mkdir()
    part = tmp_path / "sub" / "file.bin.part"
    part.write_bytes(BODY[:1000])
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == BODY
    assert ranges(server) == ["bytes=1000-"]
    only(tmp_path).unlink()
    part.write_bytes(BODY)
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == BODY  # whole already: 416
    only(tmp_path).unlink()
    part.write_bytes(b"something else")
    assert fetch(server, tmp_path).read_bytes() == BODY, "without a hash the part is not trusted"


def test_a_body_of_unknown_length_is_taken_as_it_comes(server, tmp_path):
    assert fetch(server, tmp_path, {"headers": {"Content-Length": None}}).read_bytes() == BODY


def test_an_empty_file_can_be_fetched(server, tmp_path):
    assert fetch(server, tmp_path, {"body": b""}, size=0).read_bytes() == b""


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_a_busy_server_is_asked_again(server, status, tmp_path):
    assert fetch(server, tmp_path, {"status": status}, {"status": status}).read_bytes() == BODY
    assert len(server.asked) == 3


def test_retry_after_is_honoured_within_bounds(server, tmp_path):
    began = time.time()
    busy = {"status": 429, "headers": {"Retry-After": "1"}}
    assert fetch(server, tmp_path, busy).read_bytes() == BODY
    assert 1 <= time.time() - began < 3
    in_half_a_minute = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < download.retry_after(in_half_a_minute) <= 30
    long_ago = email.utils.formatdate(0, usegmt=True)
    waits = {"7": 7, "99999": 60, "": 0, "soon": 0, "-3": 0, long_ago: 0}
    assert {text: download.retry_after(text) for text in waits} == waits
    texts = [*NONSENSE, "Mon, 01 Jan 0001 00:00:00 -0000"]
    assert all(0 <= download.retry_after(text) <= 60 for text in texts)


def test_it_gives_up_after_failures_in_a_row_and_leaves_nothing(server, tmp_path):
    with pytest.raises(
        UserError, match=r"cannot fetch .*/file\.bin: the server answers 503, 5 times in a row"
    ):
        fetch(server, tmp_path, *[{"status": 503}] * 9)
    assert len(server.asked) == 5 and not (tmp_path / "sub").exists()


def test_a_connection_that_always_drops_at_once_is_given_up(server, tmp_path):
    with pytest.raises(UserError, match="5 times in a row"):
        fetch(server, tmp_path, *[{"drop_after": 0}] * 9)
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("status", "says"),
    [(404, "404"), (401, "HF_TOKEN"), (403, "terms accepted"), (410, "410"), (304, "304")],
)
def test_a_refusal_is_one_line_at_once(server, status, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        fetch(server, tmp_path, {"status": status, "body": b""})
    assert "\n" not in str(error.value) and len(server.asked) == 1
    assert not (tmp_path / "sub").exists()


def test_a_wrong_length_or_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match=f"has {len(BODY)} bytes, not the 5 expected"):
        fetch(server, tmp_path, size=5)
    with pytest.raises(UserError, match="goes on beyond its 5 bytes"):
        fetch(server, tmp_path, {"headers": {"Content-Length": None}}, size=5)
    with pytest.raises(UserError, match="length or hash is wrong"):
        fetch(server, tmp_path, {"headers": {"Content-Length": None}}, size=len(BODY) + 1)
    with pytest.raises(UserError, match="length or hash is wrong"):
        fetch(server, tmp_path, sha256="0" * 64)
    assert not (tmp_path / "sub").exists()


def test_a_file_larger_than_the_disk_is_not_begun(server, tmp_path):
    for claim in ({"Content-Length": 10**15}, {"Content-Length": 10**17}):
        with pytest.raises(UserError, match=f"no space for the {claim['Content-Length']} bytes"):
            fetch(server, tmp_path, {"headers": claim})
        assert not (tmp_path / "sub").exists()


@pytest.mark.parametrize(
    "name", ["Content-Length", "Content-Range", "X-Linked-Size", "X-Linked-Etag", "ETag"]
)
def test_absurd_headers_are_passed_over_or_refused_in_one_line(server, name, tmp_path):
    for value in [*NONSENSE, '"' + "a" * 60000 + '"']:
        for status in (200, 206, 416):
            server.script[:] = [
                {"status": status, "headers": {"X-Linked-Etag": ""} | {name: value}}
            ]
            try:
                path = download.fetch(
                    f"{server.url}/f", tmp_path / "f", SHA256, len(BODY), first_wait=0.001
                )
                assert path.read_bytes() == BODY
            except UserError as error:
                assert "\n" not in str(error)
            for left in tmp_path.iterdir():
                left.unlink()


def test_a_file_that_comes_packed_is_refused_for_it_could_unpack_to_anything(server, tmp_path):
    bomb = gzip.compress(bytes(10**7))
    with pytest.raises(UserError, match=r"comes packed \(gzip\)"):
        fetch(server, tmp_path, {"headers": {"Content-Encoding": "gzip"}, "body": bomb})
    assert not (tmp_path / "sub").exists()


def test_a_file_that_does_not_end_is_left_where_it_should_have_ended(server, tmp_path):
    endless = {"headers": {"Content-Length": None}, "body": BODY * 64}
    with pytest.raises(UserError, match=f"goes on beyond its {len(BODY)} bytes"):
        fetch(server, tmp_path, endless, size=len(BODY))
    assert not (tmp_path / "sub").exists()
    with pytest.raises(UserError, match="goes on beyond"):
        fetch(server, tmp_path, endless, size=len(BODY), sha256=SHA256)
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == BODY  # what was too much is gone


def test_another_thread_can_stop_a_download(server, tmp_path):
    stop, server.pause = threading.Event(), 0.02
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(UserError, match="stopped before all"):
        fetch(server, tmp_path, sha256=SHA256, stop=stop)
    assert 0 < only(tmp_path).stat().st_size < len(BODY)
    with pytest.raises(UserError, match="stopped before all"):
        fetch(server, tmp_path, *[{"status": 503}] * 9, stop=stop)


def test_no_download_is_written_through_a_symbolic_link(server, tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.bin").symlink_to(tmp_path / "victim")
    assert fetch(server, tmp_path, sha256=SHA256).read_bytes() == BODY
    assert not (tmp_path / "sub" / "file.bin").is_symlink()
    (tmp_path / "sub" / "file.bin").unlink()
    (tmp_path / "sub" / "file.bin.part").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="is a symbolic link"):
        fetch(server, tmp_path, sha256=SHA256)
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_urls_and_places_that_cannot_work_are_one_line(server, tmp_path):
    for url in (
        "file:///etc/passwd",
        "no url",
        "http://",
        "http://[bad",
        "http://a b/",
        "http://x:y/",
    ):
        with pytest.raises(UserError, match="cannot fetch"):
            download.fetch(url, tmp_path / "x", first_wait=0.01)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write"):
            download.fetch(f"{server.url}/x", path)


def test_of_several_that_want_a_file_one_downloads_it(server, tmp_path):
    call = f"download.fetch('{server.url}/f', '{tmp_path / 'f'}', '{SHA256}')"
    script = f"from data import download; {call}"
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(subprocess.run, [sys.executable, "-c", script], cwd=ROOT, timeout=60)
            for _ in range(3)
        ]
        assert [run.result().returncode for run in runs] == [0, 0, 0]
    assert len(server.asked) == 1 and only(tmp_path).read_bytes() == BODY


def test_shakespeare_downloads_its_text(server, tmp_path, monkeypatch):
    server.body = b"To be, or not to be.\n" * 10
    monkeypatch.setattr(shakespeare, "URL", server.url)
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(server.body).hexdigest())
    shakespeare.main(parse([f"--out={tmp_path}"], shakespeare, tokenizer))
    assert (len(loader.Tokens(tmp_path, "train")), len(loader.Tokens(tmp_path, "val"))) == (189, 21)
    assert (tmp_path / "raw" / "input.txt").read_bytes() == server.body


@pytest.mark.parametrize("name", ["shakespeare", "gsm8k", "reversal", "zeroshot"])
def test_a_tokenizer_that_is_none_is_refused_before_the_download(name, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("it was downloaded"))
    program = importlib.import_module(f"data.{name}.prepare")
    modules = [program] if "tokenizer" in program.DEFAULTS else [program, tokenizer]
    modules += [examples] if name in ("gsm8k", "reversal") else []
    config = parse([f"--out={tmp_path}/out", f"--tokenizer={tmp_path}/none"], *modules)
    with pytest.raises(UserError, match=r"no checkpoint .*none: no such file or folder"):
        program.main(config)
    assert not list(tmp_path.iterdir())


# ---- The Hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("NANOMDM_CACHE", str(tmp_path / "cache"))
    return server


def test_a_hub_file_is_asked_for_once_under_its_address(hub, tmp_path):
    path = download.hub_file("owner/name.v2", "folder/a file.bin")
    assert path.read_bytes() == BODY and path.is_relative_to(tmp_path / "cache")
    assert download.hub_file("owner/name.v2", "folder/a file.bin") == path
    download.hub_file("datasets/owner/set", "x.bin")
    assert [url for url, _ in hub.asked] == [
        "/owner/name.v2/resolve/main/folder/a%20file.bin",
        "/datasets/owner/set/resolve/main/x.bin",
    ]


@pytest.fixture
def cdn():
    """Where the Hub keeps its files: another port is another host."""
    yield from serve()


def sent_on(cdn, hash=SHA256, size=len(BODY)):
    """The Hub's answer: where the file lies, and what it is."""
    headers = {
        "Location": f"{cdn.url}/blob",
        "X-Repo-Commit": "1" * 40,
        "X-Linked-Etag": f'"{hash}"',
        "X-Linked-Size": size,
    }
    return {"status": 302, "headers": headers, "body": b""}


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub, cdn, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.script[:] = [sent_on(cdn)]
    assert download.hub_file("owner/name", "file.bin").read_bytes() == BODY
    assert hub.asked[0][1]["Authorization"] == "Bearer secret"
    assert cdn.asked[0][0] == "/blob" and "Authorization" not in cdn.asked[0][1]
    assert "secret" not in str(cdn.asked)


GIT = hashlib.sha1(b"blob 1048576\0" + BODY).hexdigest()  # what `git hash-object` says


@pytest.mark.parametrize("hash", [SHA256, GIT])
def test_what_the_hub_says_of_a_file_is_checked(hub, cdn, hash, tmp_path):
    wrong = bytes([1]) + BODY[1:]
    hub.script[:], cdn.body = [sent_on(cdn, hash)], wrong
    with pytest.raises(UserError, match="hash is wrong"):
        download.hub_file("owner/name", "file.bin")
    hub.script[:], cdn.body = [sent_on(cdn, hash)], BODY[1:]
    with pytest.raises(UserError, match="has 1048575 bytes, not the 1048576 expected"):
        download.hub_file("owner/name", "file.bin")
    assert not list((tmp_path / "cache").rglob("file*"))
    hub.script[:], cdn.body = [sent_on(cdn, hash)], BODY
    assert download.hub_file("owner/name", "file.bin").read_bytes() == BODY


def test_the_word_of_the_hub_counts_not_that_of_the_host_it_sends_on_to(hub, cdn):
    hub.script[:] = [
        {"status": 307, "headers": {"Location": "/renamed"}, "body": b""},
        sent_on(cdn),
    ]
    cdn.body = BODY[::-1]
    lie = {"X-Linked-Etag": hashlib.sha256(cdn.body).hexdigest()}
    cdn.script[:] = [{"headers": lie}]
    with pytest.raises(UserError, match="hash is wrong"):
        download.hub_file("owner/name", "file.bin")


LEFT = {
    "a part": BODY[:1000],
    "all": BODY,
    "another version": b"another version",
    "more": BODY + b"more",
}


@pytest.mark.parametrize("left", LEFT)
def test_what_an_interrupted_run_left_of_a_hub_file_is_used_if_it_turns_out_right(
    hub, cdn, left, tmp_path
):
    part = tmp_path / "cache" / "owner--name" / "file.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(LEFT[left])
    hub.script[:] = [sent_on(cdn)] * 3
    assert download.hub_file("owner/name", "file.bin").read_bytes() == BODY
    asked = [f"bytes={len(LEFT[left])}-"] + ([] if BODY.startswith(LEFT[left]) else [None])
    assert ranges(cdn) == asked
    assert only(tmp_path).name == "file.bin"


def test_a_run_that_gives_up_leaves_a_part_for_the_next(hub, cdn, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "TRIES", 1)
    hub.script[:], cdn.script[:] = [sent_on(cdn)] * 2, [{"drop_after": 300_000}]
    with pytest.raises(UserError, match="cannot fetch"):
        download.hub_file("owner/name", "file.bin")
    have = len(only(tmp_path).read_bytes())
    assert download.hub_file("owner/name", "file.bin").read_bytes() == BODY
    assert 0 < have <= 300_000 and ranges(cdn) == [None, f"bytes={have}-"]


def test_the_token_is_not_sent_by_a_plain_fetch_and_not_shown_in_errors(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "se\ncret")
    with pytest.raises(UserError, match="HF_TOKEN") as error:
        download.hub_file("owner/name", "file.bin")
    assert "cret" not in str(error.value)
    fetch(hub, tmp_path)
    assert "Authorization" not in hub.asked[-1][1]


PATHS = ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a\\b", "a/..", "~/x"]
REPOS = ["..", "../..", "owner/..", "/owner", "a/b/c", "", "owner/", "a?b", "http://evil/x"]


@pytest.mark.parametrize(
    ("repo", "filename"),
    [
        *(("owner/name", name) for name in PATHS),
        *((name, "x") for name in REPOS),
    ],
)
def test_names_that_lead_out_of_the_cache_are_refused(hub, repo, filename):
    with pytest.raises(UserError, match="do not name a file"):
        download.hub_file(repo, filename)
    assert not hub.asked and not Path(os.environ["NANOMDM_CACHE"]).exists()


def test_a_symbolic_link_that_leads_out_of_the_cache_is_refused(hub, tmp_path):
    cache, outside = tmp_path / "cache" / "owner--name", tmp_path / "outside"
    cache.mkdir(parents=True)
    outside.mkdir()
    (cache / "folder").symlink_to(outside)
    (cache / "link.bin").symlink_to(outside / "there.bin")
    for filename in ("folder/file.bin", "link.bin"):
        with pytest.raises(UserError, match="leads out of"):
            download.hub_file("owner/name", filename)
    assert not hub.asked and not list(outside.iterdir())
    (tmp_path / "whole").symlink_to(outside)  # the cache itself may lie where its owner wants it
    assert download.hub_file("owner/name", "file.bin", tmp_path / "whole").read_bytes() == BODY
