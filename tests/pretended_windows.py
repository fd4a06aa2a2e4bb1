"""A run from text to sample in a Linux made as like Windows as a process can make itself.

    python tests/pretended_windows.py FOLDER

What Windows lacks is taken away before anything of ours is imported: modules, functions of os,
signals. What it refuses is refused: to sync a file that is open for reading, to replace, move or
remove one that this process has open or mapped, to rename onto another. msvcrt locks as there.
Prints what each step came to, as JSON.
"""

import contextlib
import errno
import fcntl
import http.server
import importlib
import io
import json
import os
import signal
import struct
import sys
import sysconfig
import threading
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"]
FUNCTIONS = ["fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getpgid", "setsid"]
FUNCTIONS += ["chown", "mkfifo", "sched_getaffinity", "uname", "wait3", "wait4", "nice", "link"]
SIGNALS = ["SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGCHLD", "SIGQUIT"]
SIGNALS += ["pthread_sigmask", "SIG_BLOCK", "SIG_SETMASK", "alarm", "pause", "sigwait"]


def in_use(path):
    """Whether this process has a file open or mapped."""
    path, held = os.path.abspath(path), set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            held.add(os.readlink(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps", encoding="utf8", errors="surrogateescape") as maps:
        return path in held or any(line.rstrip("\n").endswith(path) for line in maps)


def refusing(function, paths, exists=False):
    """os.replace and the like, which Windows refuses for files in use, or onto one that exists."""

    def on_windows(*arguments, **keys):
        for path in arguments[:paths]:
            if os.path.isfile(path) and in_use(path):
                raise PermissionError(errno.EACCES, "The file is used by another process", path)
        if exists and os.path.exists(arguments[1]):
            raise FileExistsError(errno.EEXIST, "The file exists", arguments[1])
        return function(*arguments, **keys)

    return on_windows


def locking(fd, mode, n):
    """msvcrt.locking: n bytes from where the file is; an open file locks against any other."""
    kind = {2: fcntl.F_WRLCK, 0: fcntl.F_UNLCK}[mode]
    lock = struct.pack("hhqqi4x", kind, os.SEEK_CUR, 0, n, 0)
    try:
        fcntl.fcntl(fd, getattr(fcntl, "F_OFD_SETLK", 37), lock)
    except OSError as error:
        raise OSError(errno.EACCES, "Permission denied") from error


def pretend():
    sync, replace = os.fsync, os.replace

    def fsync(file):
        fd = file if isinstance(file, int) else file.fileno()
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        sync(fd)

    os.fsync, os.replace = fsync, refusing(replace, 2)
    os.rename, os.unlink = refusing(os.rename, 2, exists=True), refusing(os.unlink, 1)
    os.remove = os.unlink
    for name in MODULES:
        sys.modules[name] = None
    for name in ("numpy", "requests", "safetensors.torch", "tiktoken", "torch", "tqdm"):
        importlib.import_module(name)  # these know that they are on Linux
    sysconfig.get_config_vars()  # and so does this
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in set(names) & set(dir(module)):
            delattr(module, name)
    sys.platform = "win32"
    sys.modules["msvcrt"] = SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0)


def import_all():
    """Every module of the repository, the tests aside."""
    files = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))]
    own = [path for path in files if path.parts[0] not in ("tests", "configs", "docs", "out")]
    own = [path for path in own if not path.parts[0].startswith(".")]
    for path in own:
        importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
    return len(own)


# ---- The steps -----------------------------------------------------------------------------------

LINE = "The cat sat on the mat; “a dog” ran to the log, and cat {} ran after it.\n\n"
TEXT = "".join(LINE.format(number) for number in range(800))
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=8"]
TINY += ["--warmup_iters=2", "--log_interval=2", "--eval_interval=2", "--eval_sequences=4"]
TINY += ["--eval_draws=2", "--show_sample=False", "--device=cpu", "--dtype=float32", "--keep=2"]


PREPARED = ["--out=data", "--val_fraction=0.3", "--workers=1"]


def program(module, *words):
    """A command of the repository, in this process."""
    import config

    modules = {
        "data.text.prepare": ("data.text.prepare", "data.tokenizer"),
        "run.checkpoint": ("run.checkpoint",),
        "view.page": ("config", "run.subject", "diffusion", "samplers", "sample", "view.page"),
    }
    command = importlib.import_module(module)
    parts = [importlib.import_module(name) for name in modules.get(module, ())]
    return command.main(config.parse(words, *(parts or command.MODULES)))


def train(*words):
    return program("train", "--data=data", "--out_dir=out", *TINY, *words)


def second_start():
    """What a second start is told while another program has the folder."""
    from config import UserError
    from lib.files import only_one

    with only_one("out", "out_dir", "ckpt.pt"):
        held = Path("out/.lock").read_text("utf8")  # can be read while it is locked
        try:
            train("--max_iters=8")
        except UserError as error:
            return f"refused: {held.strip() in str(error)}"


def replaced_while_read():
    """Another program reads the checkpoint for a moment, just as the run would replace it."""
    from lib.files import whole_file

    with whole_file("out/ckpt.pt") as temporary:
        temporary.write_bytes(Path("out/ckpt.pt").read_bytes())
        reader = open("out/ckpt.pt", "rb")  # noqa: SIM115
        threading.Timer(0.3, reader.close).start()


def download():
    from data.download import fetch

    handler = lambda *keys: http.server.SimpleHTTPRequestHandler(*keys, directory=".")  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/text.txt"
        path = fetch(url, "copy.txt")
        server.shutdown()
    return path.read_text("utf8") == TEXT


STEPS = {
    "import": import_all,
    "prepare": lambda: program("data.text.prepare", "--input=text.txt", *PREPARED),
    "prepare again": lambda: program("data.text.prepare", "--input=text.txt", *PREPARED),
    "train": lambda: train("--max_iters=4"),
    "a second start": second_start,
    "resume": lambda: train("--max_iters=8"),
    "replaced while read": replaced_while_read,
    "begin anew": lambda: train("--max_iters=2", "--resume=False"),
    "sample": lambda: program("sample", "--ckpt=out", "--steps=4", "--out=samples.jsonl"),
    "evaluate": lambda: program("evaluate", "--ckpt=out", "--data=data", "--draws=2"),
    "page": lambda: program("view.page", "--ckpt=out"),
    "export": lambda: program("run.checkpoint", "--ckpt=out", "--to=exported"),
    "download": download,
}


def main(folder):
    Path(folder, "text.txt").write_text(TEXT, encoding="utf8")
    pretend()
    sys.path.insert(0, str(ROOT))
    os.chdir(folder)
    came_to, said = {}, io.StringIO()
    for name, step in STEPS.items():
        try:
            with contextlib.redirect_stdout(said):
                came_to[name] = str(step())
        except Exception as error:
            came_to[name] = f"{type(error).__name__}: {error}"
    left = sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())
    print(json.dumps({"steps": came_to, "left": left}))


if __name__ == "__main__":
    main(sys.argv[1])
