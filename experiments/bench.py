"""How fast, and what each trick is worth: everything measured side by side in one run.

    python -m experiments.bench [--quick=True] [--device=cuda]

Variants take turns (A B C, A B C, ...) and the median over the rounds is reported with its spread, so that a machine whose
speed drifts slows all of them. A turn is a second of calls in a row, as in a run: the first step after another variant's
finds nothing of its own in the caches. What they are measured against is this machine's own matrix product at the shapes
of the model. Textbook code runs in processes of its own, which the C library gives and takes memory as it likes; all
else, the products too, in this one, which keeps freed memory (config.keep_memory).
Utilisation is 3 * Transformer.flops_per_token * tokens / seconds / limit: forward and backward products of a step with half
of the positions predicted. Attention of the last layer counts for all positions, though half of them ask for nothing.
"""

import contextlib
import copy
import ctypes
import json
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config as settings
import diffusion
import likelihood
import model as network
import parallel
import sample
from data import loader
from experiments import results, textbook

DEFAULTS = {
    "rounds": 5,  # how often each variant is timed, in turns; quick: 2
}

TURN = 1.0  # seconds, or one call where that takes longer
TEXTBOOK = "textbook: float32, all logits, log_softmax, plain AdamW"
KEPT = "+ freed memory kept"
COMPILED_TEXTBOOK = "textbook compiled, freed memory kept, for comparison"
FLOAT32 = "ours in float32, compiled, for comparison"
SMALL = {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 256, "norm": "rms", "mlp": "relu2", "bias": False}
SMALL |= {"qk_norm": True}
RADD_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "unused_rows": 1}


def gathered_loss(hidden):
    """Head and cross-entropy on hidden rows only, for hidden(model, x, rows) -> (N, D)."""

    def loss(model, x0, mask, weight, rows):
        h = hidden(model, torch.where(mask, model.mask_id, x0), rows)
        ce = F.cross_entropy(model.head(h).float(), x0.flatten()[rows], reduction="none")  # (N,)
        return ((weight[:, None] * mask).flatten()[rows] * ce).sum()

    return loss


def our_loss(model, x0, mask, weight, rows):
    return diffusion.nelbo(model, x0, mask, weight, rows)[0]


# ---- Measuring -------------------------------------------------------------------------------------------------------


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def alternate(variants, rounds, device):
    """{name: function} -> {name: [seconds of a call, one a round]}; each runs twice unmeasured before."""
    calls = {}
    for name, function in variants.items():
        function()
        calls[name] = math.ceil(TURN / seconds_of(function, device)) or 1
    times = {name: [] for name in variants}
    for _ in tqdm(range(rounds), desc=next(iter(variants)), leave=False):
        for name, function in variants.items():
            times[name].append(seconds_of(function, device, calls[name]))
    return times


def seconds_of(function, device, times=1):
    """Seconds of a call, the mean of `times` in a row; on a GPU by its own clock."""
    wait(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    began = time.perf_counter()
    for _ in range(times):
        function()
    seconds = time.perf_counter() - began
    if device.type == "cuda":
        end.record()
        wait(device)
        seconds = start.elapsed_time(end) / 1000
    return seconds / times


class Elsewhere:
    """A function in a process of its own, where nobody has told the C library to keep freed memory: textbooks do not.

    with Elsewhere(make, *arguments) as function: calls what make(*arguments) returns, over there.
    """

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=textbook.serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self):
        self.pipe.send(True)
        self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def middle(times):
    return statistics.median(times)


def spread(times):
    """Between the fastest and the slowest round, as a part of the median."""
    return (max(times) - min(times)) / middle(times)


def peak_memory(function, device):
    """MiB that function() adds at its highest point to what is in use before it."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        wait(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    settings.keep_memory(False)
    function()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what was freed goes back, so that it is not counted as in use
    before, top, stop = resident(), [0], threading.Event()

    def watch():
        while not stop.wait(0.002):
            top[0] = max(top[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    stop.set()
    watcher.join()
    settings.keep_memory()
    return max(0, top[0] - before) / 2**20


def resident():
    """Bytes of this process in memory now, or the most it ever had where the system does not tell."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def product_seconds(model, B, L, dtype, device):
    """{name: (function, flops)} of the plain matrix products of one training step at this model's shapes.

    Each is run three times: forward, gradient of the input, gradient of the weight.
    """
    D, H, V, N = model.config["n_embd"], model.config["n_head"], model.vocab_size, B * L
    block = model.blocks[0]
    widths = [p.shape for p in block.parameters() if p.dim() == 2]  # (out, in) each
    layers = len(model.blocks)
    made = {}

    def product(rows, wide, deep, times):
        a = torch.randn(rows, deep, device=device, dtype=dtype)
        w = torch.randn(wide, deep, device=device, dtype=dtype)
        g = torch.randn(rows, wide, device=device, dtype=dtype)

        def run():
            _ = a @ w.T, g @ w, g.T @ a

        made[f"{rows}x{deep}x{wide}"] = (run, 6 * rows * wide * deep, times)

    for out, deep in widths:
        product(N, out, deep, layers)
    product(min(512, N // 2), V, D, N / 2 / min(512, N // 2))
    q = torch.randn(B, H, L, D // H, device=device, dtype=dtype)
    s = torch.randn(B, H, L, L, device=device, dtype=dtype)

    def attention():
        _ = q @ q.mT, s @ q, s @ q, s.mT @ q, q @ q.mT, s.mT @ q

    made["attention"] = (attention, 12 * B * L * L * D, layers)
    return made


def product_limit(model, B, L, dtype, rounds, device):
    """FLOP/s of plain matrix products in the proportions of this model's step: what a perfect step would reach."""
    made = product_seconds(model, B, L, dtype, device)
    times = alternate({name: run for name, (run, _, _) in made.items()}, rounds, device)
    seconds = sum(min(times[name]) * count for name, (_, _, count) in made.items())
    return sum(flops * count for _, flops, count in made.values()) / seconds


# ---- What is compared ------------------------------------------------------------------------------------------------


def training(V, B, rounds, device, shape=SMALL, only=()):
    """The training step, one trick after another, and two for comparison. -> rows of {name, tokens/s, ratio, spread, ...}

    Memory is what a step adds to weights and optimizer state, which all variants have alike; the textbook's is taken here.
    """
    torch.compiler.reset()  # or programs are made for shapes that change, and not more than a few of them
    L = shape["block_size"]
    shape = {**shape, "vocab_size": V}
    bf16 = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    sdpa = lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # noqa: E731
    late = lambda model, x, rows: model.hidden(x, rows)  # noqa: E731
    early = lambda model, x, rows: textbook.hidden(model, x).flatten(0, 1)[rows]  # noqa: E731
    whole = lambda model, x, rows: model.hidden(x).flatten(0, 1)[rows]  # noqa: E731
    plain, none, fused = textbook.PLAIN, contextlib.nullcontext, {"fused": True}

    def compiled(_, model):
        loss_of = parallel.engine(diffusion.Loss(model, "any_order"), {"compile": True, "recompute": False}, device, 1)
        return lambda *batch: loss_of(*batch)[0]

    tricks = {
        KEPT: (textbook.loss, plain, none),
        "+ head on hidden rows only": (gathered_loss(early), plain, none),
        "+ attention by SDPA": (gathered_loss(whole), plain, none),
        "+ queries, projection and MLP of the last block on hidden rows only": (gathered_loss(late), plain, none),
        "+ gradient of the head at once, in chunks": (our_loss, plain, none),
        "+ fused AdamW": (our_loss, fused, none),
        "+ bfloat16 (attention by SDPA)": (our_loss, fused, bf16),
        "+ attention by what is fastest here": (our_loss, fused, bf16),
        "+ compile": (None, fused, bf16, compiled),
        FLOAT32: (None, fused, none, compiled),
    }
    if settings.can_compile(device):
        tricks[COMPILED_TEXTBOOK] = (torch.compile(textbook.loss), plain, none)
    steps = {}
    for name, trick in tricks.items():
        if not only or name in only:
            step = textbook.training_step(shape, B, device, *trick)
            steps[name] = with_attention(sdpa, step) if "by SDPA" in name else step
    memory = {name: peak_memory(step, device) for name, step in steps.items()}
    memory[TEXTBOOK] = memory[KEPT]
    with Elsewhere(textbook.training_step, shape, B, device) as untouched:
        times = alternate({TEXTBOOK: untouched} | steps, rounds, device)
    model = network.Transformer({**network.DEFAULTS, **shape}).to(device)
    limits = {kind: product_limit(model, B, L, kind, rounds, device) for kind in (torch.float32, torch.bfloat16)}
    flops = 3 * model.flops_per_token(L, 0.5) * B * L
    rows = []
    for name, taken in times.items():
        rate = flops / middle(taken)
        rows.append(
            {
                "name": name,
                "tokens_per_second": B * L / middle(taken),
                "ratio": middle(times[TEXTBOOK]) / middle(taken),
                "spread": spread(taken),
                "of_bf16_limit": rate / limits[torch.bfloat16],
                "memory_mib": memory[name],
            }
        )
    return rows, limits


def with_attention(attend, step):
    """The step with another attention than the fastest."""

    def changed():
        fastest, network.attend = network.attend, attend
        try:
            step()
        finally:
            network.attend = fastest

    return changed


def sampling(V, steps, B, rounds, device, quick):
    """Seconds a sequence of the textbook sampler, RADD's cache and ours, in float32 and bfloat16. -> rows"""
    torch.compiler.reset()
    shape = {**SMALL, "vocab_size": V}
    model = network.Transformer({**network.DEFAULTS, **shape}).to(device).eval()
    compiled = copy.deepcopy(model)
    compiled.hidden = torch.compile(compiled.hidden)
    L = SMALL["block_size"]
    x = torch.full((B, L), model.mask_id, device=device)  # (B, L)
    bf16 = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    # A step of the textbook costs what any other does, so some of them are scaled up. RADD's cache calls the network as
    # often as sequences change, the expected number of which is known, and draws at the hidden positions, in the mean half
    # of all. Ours runs to the end.
    some = 2 if quick else 8
    nfe = diffusion.expected_nfe(diffusion.reveal_law(diffusion.SCHEDULES["loglinear"], steps, "ancestral"), L)
    often = {"textbook": {"sample": steps / some}, "RADD's cache": {"call": nfe, "draw": (steps + 1) / 2}}
    with contextlib.ExitStack() as stack:
        table = {}  # {row: {part: (function, how often it is called)}}
        for dtype, autocast in (("float32", contextlib.nullcontext), ("bfloat16", bf16)):
            for kept in ("", KEPT):
                for name, parts in often.items():
                    row = table[f"{name} {dtype} {kept}".strip()] = {}
                    for part, count in parts.items():
                        arguments = (shape, B, device, part, dtype == "bfloat16", steps, some)
                        if kept:
                            function = textbook.sampling_part(*arguments)
                        else:
                            function = stack.enter_context(Elsewhere(textbook.sampling_part, *arguments))
                        row[part] = function, count
            ours = lambda a=autocast: sample.sample(model, x, steps=steps, batch_size=B, autocast=a)  # noqa: E731
            table[f"ours {dtype}"] = {"sample": (ours, 1)}
        ours = lambda: sample.sample(compiled, x, steps=steps, batch_size=B, autocast=bf16)  # noqa: E731
        table["ours bfloat16 compiled"] = {"sample": (ours, 1)}
        functions = {f"{row}: {part}": function for row in table for part, (function, _) in table[row].items()}
        times = alternate(functions, rounds, device)
    rows = []
    for row, parts in table.items():
        seconds = sum(count * middle(times[f"{row}: {part}"]) for part, (_, count) in parts.items()) / B
        spreads = [spread(times[f"{row}: {part}"]) for part in parts]
        rows.append({"name": row, "seconds_per_sequence": seconds, "spread": max(spreads)})
        rows[-1]["ratio"] = rows[0]["seconds_per_sequence"] / seconds
    return rows


def baseline(V, rounds, device, autocast, quick):
    """Tokens/s of our causal baseline with its cache, and of the diffusion model of its size at 16 to 256 steps. -> rows"""
    rows = []
    for B in (1, 16):
        models = {}
        for causal in (True, False):
            models[causal] = network.Transformer({**network.DEFAULTS, **SMALL, "vocab_size": V, "causal": causal}).to(device)
        x = torch.full((B, SMALL["block_size"]), models[False].mask_id, device=device)  # (B, L)
        variants = {
            "causal, cached": lambda: sample.sample_ar(models[True], x, batch_size=B, autocast=autocast),  # noqa: B023
            "causal, cached, float32": lambda: sample.sample_ar(models[True], x, batch_size=B),  # noqa: B023
        }
        for steps in (16,) if quick else (16, 32, 64, 128, 256):
            variants[f"masked, {steps} steps"] = lambda n=steps: sample.sample(
                models[False],  # noqa: B023
                x,  # noqa: B023
                steps=n,
                batch_size=B,  # noqa: B023
                autocast=autocast,
            )
        times = alternate(variants, rounds, device)
        base = min(middle(taken) for name, taken in times.items() if name.startswith("causal"))
        for name, taken in times.items():
            entry = {"name": f"{name}, batch {B}", "tokens_per_second": x.numel() / middle(taken)}
            rows.append(entry | {"ratio": base / middle(taken)})
    return rows


def loading(rounds, device):
    """Tokens/s of shuffled blocks and of their masks, one thread, from a made-up token file in the page cache. -> rows"""
    with tempfile.TemporaryDirectory() as folder:
        tokens = torch.randint(100, (20_000_000,), dtype=torch.int16).numpy().astype("uint16")
        tokens.tofile(Path(folder) / "train_00000.bin")
        split = {"tokens": len(tokens), "documents": 1, "bytes": len(tokens)}
        meta = {"tokenizer": {"kind": "byte"}, "vocab_size": 256, "dtype": "uint16", "splits": {"train": split}}
        (Path(folder) / "meta.json").write_text(json.dumps(meta))
        blocks = loader.Blocks(loader.Tokens(folder, "train"), 1024, seed=0)
        count = iter(range(10**9))
        variants = {
            "blocks of 1024, 64 a batch": lambda: blocks.batch(next(count), range(64), 64),
            "their masks (any_order)": lambda: diffusion.training_mask("any_order", 0, next(count), range(64), 64, 1024),
        }
        times = alternate(variants, rounds, device)
    return [{"name": name, "tokens_per_second": 64 * 1024 / middle(taken)} for name, taken in times.items()]


def judging(V, rounds, device, autocast):
    """Tokens/s of the bound: sequences x draws x L through likelihood.sequence_nats, and the network calls alone. -> rows"""
    model = network.Transformer({**network.DEFAULTS, **SMALL, "vocab_size": V}).to(device).eval()
    L = SMALL["block_size"]
    blocks = list(torch.randint(V, (8, L)).numpy())  # 8 of (L,)
    x = torch.full((32, L), model.mask_id, device=device)  # (32, L)

    @torch.no_grad()
    def calls_alone():
        with autocast():
            model(x)

    variants = {
        "bound, 8 sequences x 4 draws": lambda: likelihood.sequence_nats(model, blocks, draws=4, autocast=autocast),
        "one plain forward of the same 32 rows": calls_alone,
    }
    times = alternate(variants, rounds, device)
    return [{"name": name, "tokens_per_second": 32 * L / middle(taken)} for name, taken in times.items()]


# ---- The report ------------------------------------------------------------------------------------------------------

FORMATS = {"ratio": "{:.2f}x", "spread": "{:.0%}", "of_bf16_limit": "{:.0%}", "seconds_per_sequence": "{:.3f}"}


def draw(axes, ratios):
    """Bars of every variant's ratio to the textbook: ratios {title: {name: ratio}}, on a logarithmic axis."""
    axes.figure.set_size_inches(8, 9)
    at = 0
    for title, rows in ratios.items():
        axes.barh(range(at, at - len(rows), -1), list(rows.values()), label=title)
        for i, (name, ratio) in enumerate(rows.items()):
            axes.text(ratio, at - i, f" {name}", va="center", fontsize=6)
        at -= len(rows) + 1
    axes.set(xscale="log", yticks=[], xlabel="times as fast as the textbook", xlim=(0.7, 1500))
    axes.legend(fontsize=7, loc="upper right")


def main(config):
    """Runs all comparisons, prints their tables, writes bench.json, .md and .png; returns the figures as a flat dict."""
    began = time.time()
    settings.at_least(1, config, "rounds")
    device, autocast = settings.machine(config)
    quick, rounds = config["quick"], 2 if config["quick"] else config["rounds"]
    texts, figures, ratios = [], {}, {}

    def tell(title, rows):
        texts.append(results.table(title, rows, FORMATS))
        tqdm.write(texts[-1])
        if rows[0]["name"].startswith("textbook"):
            ratios[title] = {row["name"].split(":")[0]: row["ratio"] for row in rows}
        return {row["name"]: row for row in rows}

    for kind, V, B in (("char", 110, 16), ("bpe", 50257, 8)):
        rows, limits = training(V, B, rounds, device)
        title = f"Training step, V = {V}, batch {B} x 256, {SMALL['n_layer']} layers of {SMALL['n_embd']}"
        found = tell(title, rows)
        best = max(rows, key=lambda row: row["tokens_per_second"])
        figures |= {f"train_{kind}_ratio": best["ratio"], f"train_{kind}_mfu": best["of_bf16_limit"]}
        figures[f"train_{kind}_ratio_float32"] = found[FLOAT32]["ratio"]
        figures[f"train_{kind}_ratio_kept"] = best["ratio"] / found[KEPT]["ratio"]
        figures[f"train_{kind}_memory_ratio"] = best["memory_mib"] / max(1, rows[0]["memory_mib"])
        limit = " and ".join(f"{limits[kind] / 1e9:.0f} ({kind})" for kind in limits).replace("torch.", "")
        texts.append(f"Plain matrix products at these shapes: {limit} GFLOP/s.\n")
        if kind == "char":
            figures["matmul_fp32_gflops"] = limits[torch.float32] / 1e9
            figures["matmul_bf16_gflops"] = limits[torch.bfloat16] / 1e9

    for kind, V in (("char", 110), ("bpe", 50257)):
        for steps in (64,) if quick else (64, 256, 1024) if kind == "char" else (1024,):  # the textbook takes minutes there
            rows = sampling(V, steps, 4, min(rounds, 3), device, quick)
            found = tell(f"Sampling, V = {V}, {steps} steps, batch 4 x 256", rows)
        seconds = {name: row["seconds_per_sequence"] for name, row in found.items()}
        figures[f"sample_{kind}_ratio"] = seconds["textbook float32"] / seconds["ours bfloat16 compiled"]
        figures[f"sample_{kind}_ratio_same_dtype"] = seconds["textbook float32"] / seconds["ours float32"]
        figures[f"sample_{kind}_vs_cache"] = seconds["RADD's cache float32"] / seconds["ours float32"]
        figures[f"sample_{kind}_ratio_same_dtype_kept"] = seconds[f"textbook float32 {KEPT}"] / seconds["ours float32"]
        figures[f"sample_{kind}_vs_cache_kept"] = seconds[f"RADD's cache float32 {KEPT}"] / seconds["ours float32"]

    tell("Against the causal baseline, V = 110, 256 tokens", baseline(110, min(rounds, 2), device, autocast, quick))
    tell("Data", loading(rounds, device))
    tell("Evaluation, V = 110", judging(110, rounds, device, autocast))
    if not quick:
        shape = RADD_SMALL, (KEPT, "+ compile")
        tell("Training step of RADD-small, batch 1 x 1024", training(50257, 1, 3, device, *shape)[0])

    figures |= results.about(device) | {"seconds": time.time() - began}
    results.write(config, "bench", figures, "\n".join(texts), lambda axes: draw(axes, ratios))
    print(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    settings.run(main, settings, results, sys.modules[__name__])
