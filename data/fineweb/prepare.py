"""FineWeb, web text for whole pre-training runs, already tokenized for GPT-2: shards of 100 million tokens from the Hub.

    python -m data.fineweb.prepare --shards=10                    the first billion tokens, 2 GB
    python -m data.fineweb.prepare --sample=100B --shards=1030    all of the larger sample, 206 GB

Several shards come at a time. Each is checked (length and hash as the Hub states them, its header, its ids) and stripped of
its header, which the files of this repository do not have. The same command goes on where one was stopped, and a larger
--shards adds to what is there; meta.json, written last, makes the folder whole. The text is HuggingFaceFW/fineweb's (licence
ODC-By 1.0); id 50256 begins each document, where our own files of GPT-2 tokens have it at the end.
"""

import contextlib
import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import UserError, at_least, choose, require, run, whole_file
from data import download, loader, tokenizer, writer

DEFAULTS = {
    "shards": 10,  # of training text, 200 MB each; one more is held out
    "sample": "10B",  # 10B (103 shards) | 100B (1,030 shards)
    "out": "data/fineweb",  # folder to prepare
    "threads": 4,  # shards that are fetched at a time
}

SAMPLES = {"10B": ("kjj0/fineweb10B-gpt2", 103), "100B": ("kjj0/fineweb100B-gpt2", 1030)}  # repository, its shards
MAGIC, VERSION, HEADER = 20240520, 1, 1024  # the first two of a header's int32, the third is the count; bytes of a header
SHARD = HEADER + 2 * 100_000_000  # bytes, of most


def known(folder, repo):
    """{name: counts} of the shards that are whole, in the folder or, from a run that was stopped, still in .preparing."""
    building, meta = folder / ".preparing", {}
    try:
        meta = loader.read_meta(folder)
        counts = dict(meta["shards"])
    except (UserError, KeyError, TypeError, ValueError):
        counts = {}
    other = bool(meta) and meta.get("source") != repo
    require(not other, f"{folder} holds another text than {repo}; choose another --out")
    try:
        counts |= {path.stem: json.loads(path.read_bytes()) for path in building.glob("*.json")}
        return {name: count for name, count in counts.items() if 2 * count["tokens"] in sizes(folder, building, name)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder} is damaged; remove it and prepare it again") from None


def sizes(folder, building, name):
    paths = [place / f"{name}.bin" for place in (folder, building)]
    return [path.stat().st_size for path in paths if path.is_file()]


def check_space(folder, missing, threads):
    """Raises UserError where the disk lacks the room for `missing` shards, `threads` of them with and without a header."""
    begun = sum(path.stat().st_size for path in (folder / ".preparing").glob("fineweb_*"))
    need = (missing + min(missing, threads)) * SHARD - begun
    free = shutil.disk_usage(next(place for place in [folder, *folder.resolve().parents] if place.exists())).free
    require(need <= free, f"{folder} needs {need / 1e9:.1f} GB for {missing} shards, and {free / 1e9:.1f} GB are free")


def fetch_shard(repo, name, building, lengths, stop):
    """Downloads one shard into `building` and leaves there its tokens alone, NAME.bin, and their counts, NAME.json."""
    split, number = name.split("_")
    source = download.hub_file(f"datasets/{repo}", f"fineweb_{split}_{int(number):06d}.bin", building, stop)
    counts = convert(source, building / f"{name}.bin", lengths)
    with whole_file(building / f"{name}.json") as path:
        path.write_text(json.dumps(counts))
    source.unlink()


def convert(source, target, lengths):
    """Copies a shard without its header -> {tokens, documents, bytes}; lengths (V,) is how many bytes each id stands for.

    Raises UserError for a file that is no shard, or holds more or less than it says; such a file is removed.
    """

    def check(good, what):
        if not good:
            source.unlink()  # the next run shall fetch it again
            raise UserError(f"{source.name} {what}; it is removed")

    seen = np.zeros(2**16, np.int64)  # of each id
    with open(source, "rb") as file, whole_file(target) as path, open(path, "wb") as out:
        header, size = np.frombuffer(file.read(HEADER), np.uint8), source.stat().st_size
        check(len(header) == HEADER, f"has only {size} bytes, less than a header")
        magic, version, n = header.view("<i4")[:3].tolist()
        check((magic, version) == (MAGIC, VERSION), f"is no shard: its header begins {magic}, {version}")
        check(HEADER + 2 * n == size, f"says that it holds {n} tokens, and has room for {(size - HEADER) / 2:g}")
        while part := file.read(2**22):
            seen += np.bincount(np.frombuffer(part, "<u2"), minlength=2**16)
            out.write(part)
        check(not seen[len(lengths) :].any(), f"holds ids beyond the {len(lengths)} of GPT-2's vocabulary")
        check(seen[tokenizer.GPT2.eot], f"holds no document: no id {tokenizer.GPT2.eot}")
    return {"tokens": n, "documents": int(seen[tokenizer.GPT2.eot]), "bytes": int(seen[: len(lengths)] @ lengths)}


def fetch_all(repo, names, building, lengths, threads):
    """fetch_shard for all names, several at a time; the first that fails, or Ctrl-C, soon ends all."""
    stop = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        try:
            jobs = [pool.submit(fetch_shard, repo, name, building, lengths, stop) for name in names]
            for job in tqdm(as_completed(jobs), desc="shards", total=len(jobs), unit="shard", disable=None):
                job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def publish(folder, names, counts, meta):
    """Moves the new shards in and says so in meta.json; a run that is killed here has lost nothing."""
    building = folder / ".preparing"
    for name in names:
        if (building / f"{name}.bin").is_file():
            (building / f"{name}.bin").replace(folder / f"{name}.bin")
    for path in [*loader.shards(folder, "train"), *loader.shards(folder, "val")]:
        if path.stem not in names:
            path.unlink()  # no meta.json knows it
    shards = {name: counts[name] for name in names}
    for split in ("train", "val"):
        own = [count for name, count in shards.items() if name.startswith(split)]
        meta["splits"][split] = {key: sum(count[key] for count in own) for key in ("tokens", "documents", "bytes")}
    with whole_file(folder / "meta.json") as path:
        path.write_text(json.dumps(meta | {"shards": shards}))
    shutil.rmtree(building, ignore_errors=True)


def main(config):
    repo, most = choose("sample", config["sample"], SAMPLES)
    at_least(1, config, "shards", "threads")
    require(config["shards"] <= most, f"sample {config['sample']} has {most} shards, not {config['shards']}")
    folder, names = Path(config["out"]), ["val_00000", *(f"train_{i:05d}" for i in range(1, config["shards"] + 1))]
    building = folder / ".preparing"
    require(not building.is_symlink(), f"{building} is a symbolic link: it is not written through")
    text = tokenizer.build("gpt2", [])
    lengths = np.array([len(text.table[i]) if i != text.eot else 0 for i in range(text.vocab_size)])  # (V,)
    try:
        there = known(folder, repo)
        more = len(there.keys() - names)
        require(not more, f"{folder} has {more} shards more than {config['shards']}; choose another --out, or remove it")
        missing = [name for name in names if name not in there]
        check_space(folder, len(missing), config["threads"])
        building.mkdir(parents=True, exist_ok=True)
        fetch_all(repo, missing, building, lengths, config["threads"])
        dtype = loader.id_type(text.vocab_size).name
        meta = {"tokenizer": text.meta(), "vocab_size": text.vocab_size, "dtype": dtype, "source": repo, "splits": {}}
        publish(folder, names, known(folder, repo), meta)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # folders made for nothing; those that hold anything stay
            building.rmdir()
            folder.rmdir()
    print(writer.summary(folder, loader.read_meta(folder)))


if __name__ == "__main__":
    run(main, sys.modules[__name__])
