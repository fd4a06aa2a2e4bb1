"""Download files: resumed, checked, and moved to their final path only when complete.

Servers are not trusted blindly: a size must be as expected and fit on the disk, a hash must match,
a name must stay in its folder, and no symbolic link is written through.
"""

import contextlib
import email.utils
import hashlib
import os
import re
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import quote

import requests
from tqdm import tqdm

from config import UserError, require
from lib.files import lock, new_folder

TRIES = 5  # consecutive failures, without a new byte between them, before it gives up
LONGEST_WAIT = 60  # seconds between two tries, whatever the server asks for

PASSING = (  # errors that may not recur at the next try
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
)


class CannotWrite(UserError):
    """A download cannot be written to this machine."""


class TryAgain(Exception):
    """A temporary failure: what it was, and how many seconds the server asks to wait."""

    def __init__(self, what, wait=0.0):
        super().__init__(what)
        self.wait = wait


def fetch(url, path, sha256=None, size=None, headers=None, first_wait=1.0, stop=None):
    """Download `url` to `path`, unless the right file is there already; return the path.

    The size and hash given by the caller, or else those stated by the server as the Hub does, are
    checked. A dropped connection is resumed where it stopped, and so is an interrupted run if there
    is a hash to check the result. After drops, 429 and 5xx it waits (first_wait seconds, then twice
    that, ..., or what Retry-After says) and tries again. Raises UserError for a refusal, a wrong
    length or hash, when it gives up, and soon after another thread sets `stop` (a threading.Event);
    CannotWrite if the system cannot write.
    """
    path, stop = Path(path), stop or threading.Event()
    expected = {"hash": sha256, "size": size}  # completed with what the server states
    try:
        if not is_expected(path, **expected):
            with new_folder(path.parent):
                fetch_missing(url, path, expected, headers or {}, first_wait, stop)
    except requests.RequestException as error:  # only its type: the text may contain our headers
        raise UserError(f"cannot fetch {url}: {type(error).__name__}") from None
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from None
    return path


def fetch_missing(url, path, expected, headers, first_wait, stop):
    """fetch a missing file into an existing folder; it is `path`.part until it is complete."""
    part = path.with_name(path.name + ".part")
    require(not part.is_symlink(), f"{part} is a symbolic link: it is not written through")
    try:
        with open(part, "ab") as file:
            lock(file, wait=True)  # if several processes want the file, one downloads it
            if is_expected(path, **expected):
                return
            left = file.seek(0, os.SEEK_END)  # bytes that an interrupted run left
            download(url, file, expected, headers, first_wait, stop)
            if left and not (expected["hash"] and is_expected(part, **expected)):
                file.truncate(0)  # only a hash can tell that those bytes belong here
                download(url, file, expected, headers, first_wait, stop)
            if not is_expected(part, **expected):
                file.truncate(0)
                raise UserError(f"{url} is not the expected file: its length or hash is wrong")
            with contextlib.suppress(PermissionError):  # Windows cannot move an open file
                return os.replace(part, path)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            if not expected["hash"] or part.stat().st_size == 0:
                part.unlink()


def is_expected(path, hash, size):
    """Whether the file exists and is the expected one. hash: its sha256 or its git blob id."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    if hash is None:
        return True
    digest = hashlib.sha256()
    if len(hash) == 40:  # git hashes a header and the file, with sha1
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest() == hash


def download(url, file, expected, headers, first_wait, stop):
    """Request `url` until `file` is complete."""
    headers = {"Accept-Encoding": "identity", **headers}
    failures, most = 0, 0
    name = Path(file.name).stem
    with tqdm(desc=name, unit="B", unit_scale=True, disable=None, leave=None) as bar:
        while True:
            require(not stop.is_set(), f"stopped before all of {url} was there")
            try:
                request(url, file, expected, headers, bar, stop)
                return file.flush()
            except requests.exceptions.SSLError:
                raise
            except PASSING as error:
                problem = TryAgain(type(error).__name__)
            except TryAgain as error:
                problem = error
            failures = 1 if file.tell() > most else failures + 1
            most = max(most, file.tell())
            place = Path(file.name).with_suffix("")  # without .part
            problem_is = f"cannot fetch {url}: {problem}, {TRIES} times in a row"
            require(failures < TRIES, f"{problem_is}; if you have the file, put it at {place}")
            stop.wait(max(problem.wait, first_wait * 2 ** (failures - 1)))


def request(url, file, expected, headers, bar, stop):
    """One request for what `file` lacks; puts into `headers` what the next request must send."""
    have = file.seek(0, os.SEEK_END)
    headers.update({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        refuse(url, response)
        for key, value in stated(response).items():
            expected[key] = value if expected[key] is None else expected[key]
        begins, total = extent(response)
        if response.status_code == 416 and total == have:
            return
        if begins != have:  # no support for ranges, or the file has changed
            file.seek(0)
            file.truncate()
            headers.pop("Range", None)
            if begins != 0:
                raise TryAgain("a wrong range")
        check_size(url, expected["size"], total, (total or 0) - begins, Path(file.name).parent)
        packed = response.headers.get("Content-Encoding", "identity")[:20]
        require(packed == "identity", f"{url} comes packed ({packed}), which was not asked for")
        version = response.headers.get("ETag", "W/")
        headers.update({} if version.startswith("W/") else {"If-Range": version})
        bar.total, bar.n = total, begins
        most = total if expected["size"] is None else expected["size"]
        for chunk in response.iter_content(2**16):
            file.write(chunk)
            bar.update(len(chunk))
            require(most is None or file.tell() <= most, f"{url} goes on beyond its {most} bytes")
            if stop.is_set():
                raise TryAgain("told to stop")
        if total is not None and file.tell() < total:
            raise TryAgain("the connection drops")


def check_size(url, expected, total, missing, folder):
    """Raise UserError if `total` is not the expected size, or there is no room for the rest."""
    message = f"{url} has {total} bytes, not the {expected} expected"
    require(expected is None or total in (expected, None), message)
    free = shutil.disk_usage(folder).free
    require(missing <= free, f"no space for the {total} bytes of {url}, only {free}")


def refuse(url, response):
    """Raise UserError for a refusal that is final, TryAgain for one that may be temporary."""
    status = response.status_code
    if status in (408, 429) or status >= 500:
        wait = retry_after(response.headers.get("Retry-After", ""))
        raise TryAgain(f"the server answers {status}", wait)
    advice = {401: "; does it need HF_TOKEN?"}
    advice[403] = "; does it need HF_TOKEN, or its terms accepted on its page?"
    refusal = f"{url} answers {status} {response.reason}{advice.get(status, '')}"
    require(status in (200, 206, 416), refusal)


def retry_after(text):
    """The seconds that a Retry-After header (a number, or a date) asks for, in 0..LONGEST_WAIT."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if text.isdigit():
            wait = float(text)
        else:
            wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        return min(max(wait, 0.0), LONGEST_WAIT)
    return 0.0


def extent(response):
    """(first byte, length of the whole file or None) of a response's content."""
    if response.status_code == 200:
        return 0, number(response.headers.get("Content-Length"))
    pattern = r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)"
    match = re.fullmatch(pattern, response.headers.get("Content-Range", ""))
    first, total = match.groups() if match else (None, None)
    return number(first), number(total)


def number(text):
    """The number in a header; None if there is none, or if it has more digits than a size."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text or "") else None


def stated(response):
    """{hash, size} of a file as stated by the Hub when it redirects to it, or None each.

    The first answer that states them is the Hub's; later hosts are not trusted.
    """
    answers = (answer.headers for answer in [*response.history, response])
    headers = next((headers for headers in answers if "X-Linked-Etag" in headers), {})
    hash = re.fullmatch(r'"?([0-9a-f]{64}|[0-9a-f]{40})"?', headers.get("X-Linked-Etag", ""))
    return {"hash": hash and hash[1], "size": number(headers.get("X-Linked-Size"))}


def cache():
    """The folder of downloads: NANOMDM_CACHE, or nanomdm in the user's cache folder."""
    if folder := os.environ.get("NANOMDM_CACHE"):
        return Path(os.path.expanduser(folder))
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    message = "there is no home folder for downloads; set NANOMDM_CACHE to a folder"
    require(os.path.isabs(of_user), message)
    return Path(of_user, "nanomdm")


def hub_file(repo, filename, folder=None, stop=None):
    """Download a file of a Hugging Face repository ("owner/name", "datasets/owner/name"): its path.

    It is downloaded once, to `folder` or else to the cache. The token in HF_TOKEN goes only to the
    Hub: requests drops it on redirects to another host (which a test checks).
    """
    parts = [*repo.split("/"), *filename.split("/")]
    name = r"[\w.+=-][\w .+=-]*"
    safe = all(re.fullmatch(name, part) and part not in (".", "..") for part in parts)
    shape = re.fullmatch(r"(datasets/)?[\w.-]+(/[\w.-]+)?", repo)
    require(safe and shape, f"'{repo}' and '{filename}' do not name a file of a Hub repository")
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    advice = "" if folder else "; set NANOMDM_CACHE to another folder"
    folder = Path(folder or cache() / repo.replace("/", "--"))
    inside = (folder / filename).resolve().is_relative_to(folder.resolve())
    require(inside, f"{folder / filename} leads out of {folder} by a symbolic link")
    token = os.environ.get("HF_TOKEN", "").strip()
    require(re.fullmatch(r"[!-~]*", token), "HF_TOKEN holds characters that no token has")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{hub}/{repo}/resolve/main/{quote(filename)}"
    try:
        return fetch(url, folder / filename, headers=headers, stop=stop)
    except CannotWrite as error:
        raise UserError(f"{error}{advice}") from None
