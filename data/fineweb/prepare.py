"""FineWeb: web text for full pre-training runs, tokenized for GPT-2, in shards of 100M tokens.

    python -m data.fineweb.prepare --shards=10                    the first billion tokens, 2 GB
    python -m data.fineweb.prepare --sample=100B --shards=1030    all of the larger sample, 206 GB

Several shards are downloaded from the Hub at a time. Each is checked (length and hash as stated by
the Hub, header, ids) and stripped of its header, which the files of this repository do not have.
The same command resumes a stopped one, and a larger --shards adds to the existing ones; meta.json
is written last, so a folder that has it is complete. The text is HuggingFaceFW/fineweb's (licence
ODC-By 1.0); id 50256 begins each document, whereas it ends each in our own GPT-2 token files.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, too
from lib import program  # isort: skip (first, as in train.py)
import contextlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
from tqdm import tqdm

from config import UserError, choose, plural, require
from data import download, loader, tokenizer, writer
from lib.files import only_one, to_json, whole_file, writing

DEFAULTS = {
    "shards": 10,  # shards of training text, 200 MB each; one more is held out; 1 or more
    "sample": "10B",  # 10B (103 shards) | 100B (1,030 shards)
    "out": "data/fineweb",  # folder to prepare
    "threads": 4,  # shards to download at a time; 1 or more
}

SAMPLES = {  # repository, number of shards
    "10B": ("kjj0/fineweb10B-gpt2", 103),
    "100B": ("kjj0/fineweb100B-gpt2", 1030),
}
MAGIC, VERSION = 20240520, 1  # the first two int32 of a header; the third is the number of tokens
HEADER = 1024  # bytes of a header
SHARD = HEADER + 2 * 100_000_000  # bytes of most shards
EOT = tokenizer.GPT2.eot


# ---- 1. Existing shards --------------------------------------------------------------------------


def whole_shards(folder, repo):
    """{name: counts} of the complete shards.

    They are in the folder or, if a run was stopped before moving them, in .preparing.
    """
    building, meta = folder / ".preparing", {}
    try:
        meta = loader.read_meta(folder)
        counts = dict(meta["shards"])
    except (UserError, KeyError, TypeError, ValueError):
        counts = {}
    same_text = not meta or meta.get("source") == repo
    require(same_text, f"{folder} holds another text than {repo}; choose another --out")
    try:
        counts |= {path.stem: json.loads(path.read_bytes()) for path in building.glob("[!.]*.json")}
        size = {name: 2 * count["tokens"] for name, count in counts.items()}
        return {name: counts[name] for name in size if size[name] in sizes(folder, building, name)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder} is damaged; remove it and prepare it again") from None


def sizes(folder, building, name):
    """Sizes in bytes of the existing files of a shard."""
    paths = [place / f"{name}.bin" for place in (folder, building)]
    return [path.stat().st_size for path in paths if path.is_file()]


def check_space(folder, missing, threads):
    """Raise UserError if the disk has no room for `missing` shards.

    Up to `threads` of them exist twice for a while, with and without the header.
    """
    begun = sum(path.stat().st_size for path in (folder / ".preparing").glob("fineweb_*"))
    need = (missing + min(missing, threads)) * SHARD - begun
    place = next(place for place in [folder, *folder.resolve().parents] if place.exists())
    free = shutil.disk_usage(place).free
    lacking = f"{need / 1e9:.1f} GB for {plural(missing, 'shard')}"
    require(need <= free, f"{folder} needs {lacking}, and {free / 1e9:.1f} GB are free")


# ---- 2. Downloads --------------------------------------------------------------------------------


def fetch_shard(repo, name, building, lengths, stop):
    """Download a shard into `building`; keep its tokens (NAME.bin) and counts (NAME.json)."""
    split, number = name.split("_")
    published = f"fineweb_{split}_{int(number):06d}.bin"
    source = download.hub_file(f"datasets/{repo}", published, building, stop)
    counts = convert(source, building / f"{name}.bin", lengths)
    with whole_file(building / f"{name}.json") as path:
        path.write_text(to_json(counts), encoding="utf8")
    source.unlink()


def convert(source, target, lengths):
    """Copy a shard without its header; lengths (V,) in bytes -> {tokens, documents, bytes}.

    Raises UserError for a file that is not a shard or holds more or less than its header says, and
    removes it.
    """

    def check(condition, problem):
        if not condition:
            source.unlink()  # so that the next run fetches it again
            raise UserError(f"{source.name} {problem}; it is removed")

    size, V = source.stat().st_size, len(lengths)
    counts = np.zeros(2**16, np.int64)  # of each id
    with open(source, "rb") as file, whole_file(target) as path, open(path, "wb") as out:
        header = file.read(HEADER)
        check(len(header) == HEADER, f"has only {size} bytes, less than a header")
        magic, version, n = np.frombuffer(header, "<i4")[:3].tolist()
        mark = f"its header begins {magic}, {version}"
        check((magic, version) == (MAGIC, VERSION), f"is no shard: {mark}")
        room = (size - HEADER) / 2
        check(n == room, f"says that it holds {n} tokens, and has room for {room:g}")
        while part := file.read(2**22):
            counts += np.bincount(np.frombuffer(part, "<u2"), minlength=2**16)
            out.write(part)
        check(not counts[V:].any(), f"holds ids beyond the {V} of GPT-2's vocabulary")
        check(counts[EOT], f"holds no document: no id {EOT}")
    return {"tokens": n, "documents": int(counts[EOT]), "bytes": int(counts[:V] @ lengths)}


def fetch_all(repo, names, building, lengths, threads):
    """fetch_shard for all names, several at a time; a failure or Ctrl-C soon stops them all."""
    stop = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        try:
            jobs = [pool.submit(fetch_shard, repo, name, building, lengths, stop) for name in names]
            done = as_completed(jobs)
            for job in tqdm(done, desc="shards", total=len(jobs), unit="shard", disable=None):
                job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


# ---- 3. The folder -------------------------------------------------------------------------------


def publish(folder, names, counts, meta):
    """Move the new shards in and list them in meta.json; a run killed here loses nothing."""
    building = folder / ".preparing"
    for name in names:
        if (building / f"{name}.bin").is_file():
            (building / f"{name}.bin").replace(folder / f"{name}.bin")
    for path in [*loader.shards(folder, "train"), *loader.shards(folder, "val")]:
        if path.stem not in names:
            path.unlink()  # no meta.json lists it
    shards = {name: counts[name] for name in names}
    for split in ("train", "val"):
        of_split = [count for name, count in shards.items() if name.startswith(split)]
        keys = ("tokens", "documents", "bytes")
        meta["splits"][split] = {key: sum(count[key] for count in of_split) for key in keys}
    with whole_file(folder / "meta.json") as path:
        path.write_text(to_json(meta | {"shards": shards}), encoding="utf8")
    shutil.rmtree(building, ignore_errors=True)


def main(config):
    repo, most = choose("sample", config["sample"], SAMPLES)
    n = config["shards"]
    require(n <= most, f"sample {config['sample']} has {plural(most, 'shard')}, not {n}")
    folder, names = Path(config["out"]), ["val_00000", *(f"train_{i:05d}" for i in range(1, n + 1))]
    building = folder / ".preparing"
    require(not building.is_symlink(), f"{building} is a symbolic link: it is not written through")
    gpt2 = tokenizer.build("gpt2", [])
    table = gpt2.table[: gpt2.vocab_size]
    lengths = np.array([len(text) if i != EOT else 0 for i, text in enumerate(table)])  # (V,)
    with only_one(folder, "out", "meta.json"), writing(folder):
        try:
            there = whole_shards(folder, repo)
            message = f"{folder} has {plural(len(there.keys() - names), 'shard')} more than {n}"
            require(there.keys() <= {*names}, f"{message}; choose another --out, or remove it")
            missing = [name for name in names if name not in there]
            check_space(folder, len(missing), config["threads"])
            building.mkdir(parents=True, exist_ok=True)
            fetch_all(repo, missing, building, lengths, config["threads"])
            meta = writer.about(gpt2) | {"source": repo, "splits": {}}
            publish(folder, names, whole_shards(folder, repo), meta)
        finally:
            with contextlib.suppress(OSError):  # empty folders; others stay
                building.rmdir()
                folder.rmdir()
    print(writer.summary(folder, loader.read_meta(folder)))


if __name__ == "__main__":
    program.run(main, sys.modules[__name__])
