"""How fast, and what each trick is worth: everything measured side by side in one run.

    python -m experiments.bench [--quick=True] [--device=cuda]

Variants take turns (A B C, A B C, ...) and the median over the rounds is reported with its spread,
so that a machine whose speed drifts slows all of them. A turn is a second of calls in a row, as in
a run: the first step after another variant's finds nothing of its own in the caches. What they are
measured against is this machine's own matrix product at the shapes of the model. Textbook code
(baselines.py) runs in processes of its own, which the C library gives and takes memory as it likes;
all else, the products too, in this one, which keeps freed memory (lib.device.keep_memory).
Utilisation is lib.device.step_flops / seconds / limit: forward and backward products of a step with
half of the positions predicted. Attention of the last layer counts for all positions.
"""

import contextlib
import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config as settings
import diffusion
import evaluate
import model as network
import sample
import samplers
from data import loader
from experiments import baselines, results
from experiments.timing import Elsewhere, added_memory, alternate, middle, product_limit, spread
from lib import fused, parallel, program
from lib.compiled import can_compile
from lib.device import machine, step_flops
from lib.files import to_json

DEFAULTS = {
    "rounds": 5,  # how often each variant is timed, in turns; quick: 2; 1 or more
}

TEXTBOOK = "textbook: float32, all logits, log_softmax, plain AdamW"
KEPT = "+ freed memory kept"
COMPILED_TEXTBOOK = "textbook compiled, freed memory kept, for comparison"
FLOAT32 = "ours in float32, compiled, for comparison"
SMALL = {"n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 256}
SMALL |= {"norm": "rms", "mlp": "relu2", "bias": False, "qk_norm": True, "zero_init": "none"}
RADD_SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "head_padding": 1}
RADD_SMALL |= {"norm": "layer", "mlp": "gelu", "bias": True, "qk_norm": False, "zero_init": "none"}


def transformer(V, shape=SMALL, **keys):
    return network.make_network({**network.DEFAULTS, **shape, "vocab_size": V, **keys})


def gathered_loss(hidden):
    """Head and cross-entropy at masked positions only: hidden(model, x, masked_idx) -> (N, D)."""

    def loss(model, x0, mask, weight, masked_idx):
        h = hidden(model, torch.where(mask, model.mask_id, x0), masked_idx)  # (N, D)
        target = x0.flatten()[masked_idx]  # (N,)
        ce = F.cross_entropy(model.head(h).float(), target, reduction="none")  # (N,)
        return ((weight[:, None] * mask).flatten()[masked_idx] * ce).sum()

    return loss


def our_loss(model, x0, mask, weight, masked_idx):
    return diffusion.nelbo(model, x0, mask, weight, masked_idx)[0]


# ---- What is compared ----------------------------------------------------------------------------


def training(V, B, rounds, device, shape=SMALL, only=()):
    """The training step, one trick after another, and two for comparison: rows of a table.

    Memory is what a step adds to weights and optimizer state, which all variants have alike; the
    textbook's is taken here.
    """
    torch.compiler.reset()  # or programs are made for changing shapes, and not more than a few
    L = shape["block_size"]
    shape = {**shape, "vocab_size": V}

    def early(model, x, masked_idx):
        return baselines.hidden(model, x).flatten(0, 1)[masked_idx]

    bf16 = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    late = lambda model, x, masked_idx: model.hidden(x, masked_idx)  # noqa: E731
    whole = lambda model, x, masked_idx: model.hidden(x).flatten(0, 1)[masked_idx]  # noqa: E731
    plain, none, one_call = baselines.PLAIN, contextlib.nullcontext, {"fused": True}

    def compiled(_, model):
        config = {"compile": True, "recompute": False}
        team = parallel.Team(device=device)
        loss_of = parallel.prepare_for_training(diffusion.Loss(model, "any_order"), config, team)
        return lambda *batch: loss_of(*batch)[0]

    last_block = "+ queries, projection and MLP of the last block at masked positions only"
    tricks = {
        KEPT: (baselines.loss, plain, none),
        "+ head at masked positions only": (gathered_loss(early), plain, none),
        "+ attention by SDPA": (gathered_loss(whole), plain, none),
        last_block: (gathered_loss(late), plain, none),
        "+ gradient of the head at once, in chunks": (our_loss, plain, none),
        "+ fused AdamW": (our_loss, one_call, none),
        "+ bfloat16 (attention by SDPA)": (our_loss, one_call, bf16),
        "+ attention by what is fastest here": (our_loss, one_call, bf16),
        "+ compile": (None, one_call, bf16, compiled),
        FLOAT32: (None, one_call, none, compiled),
    }
    if can_compile(device):
        tricks[COMPILED_TEXTBOOK] = (torch.compile(baselines.loss), plain, none)
    steps = {}
    for name, trick in tricks.items():
        if not only or name in only:
            step = baselines.training_step(shape, B, device, *trick)
            steps[name] = with_sdpa(step) if "by SDPA" in name else step
    memory = {name: added_memory(step, device) for name, step in steps.items()}
    memory[TEXTBOOK] = memory[KEPT]
    with Elsewhere(baselines.training_step, shape, B, device) as untouched:
        times = alternate({TEXTBOOK: untouched} | steps, rounds, device)
    model = transformer(V, shape).to(device)
    limits = {
        kind: product_limit(model, B, L, kind, rounds, device)
        for kind in (torch.float32, torch.bfloat16)
    }
    flops = step_flops(model, B, L)
    rows = []
    for name, taken in times.items():
        row = {"name": name, "tokens_per_second": B * L / middle(taken)}
        row |= {"ratio": middle(times[TEXTBOOK]) / middle(taken), "spread": spread(taken)}
        row |= {"of_bf16_limit": flops / middle(taken) / limits[torch.bfloat16]}
        rows.append(row | {"memory_mib": memory[name]})
    return rows, limits


def with_sdpa(step):
    """The step with SDPA's attention also where another is faster."""

    def sdpa(q, k, v, causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def changed():
        fastest, fused.attention = fused.attention, sdpa
        try:
            step()
        finally:
            fused.attention = fastest

    return changed


def sampler(model, x, autocast, **options):
    """A function that samples x (B, L), all sequences in one batch."""

    def run():
        with autocast():
            sample.sample(model, x, batch_size=len(x), **options)

    return run


def sampling(V, steps, B, rounds, device, quick):
    """Seconds a sequence of the textbook sampler, RADD's cache and ours: rows of a table."""
    torch.compiler.reset()
    shape, model = {**SMALL, "vocab_size": V}, transformer(V).to(device).eval()
    compiled = copy.deepcopy(model)
    compiled.hidden = torch.compile(compiled.hidden)
    L = SMALL["block_size"]
    x = torch.full((B, L), model.mask_id, device=device)  # (B, L)
    bf16 = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    # A step of the textbook takes as long as any other, so some of them are scaled up. RADD's cache
    # calls the network as often as sequences change, the expected number of which is known, and
    # draws at the masked positions, in the mean half of all. Ours runs to the end.
    some = 2 if quick else 8
    r = samplers.unmask_schedule(diffusion.SCHEDULES["loglinear"], steps)  # (steps,)
    nfe = samplers.expected_nfe(r, L)
    often = {
        "textbook": {"sample": steps / some},
        "RADD's cache": {"call": nfe, "draw": (steps + 1) / 2},
    }
    with contextlib.ExitStack() as stack:
        here = baselines.sampling_part
        elsewhere = lambda *z: stack.enter_context(Elsewhere(here, *z))  # noqa: E731
        table = {}  # {row: {part: (function, how often it is called)}}
        for dtype, autocast in (("float32", contextlib.nullcontext), ("bfloat16", bf16)):
            for kept in ("", KEPT):
                for name, parts in often.items():
                    row = table[f"{name} {dtype} {kept}".strip()] = {}
                    for part, count in parts.items():
                        arguments = (shape, B, device, part, dtype == "bfloat16", steps, some)
                        row[part] = (here if kept else elsewhere)(*arguments), count
            table[f"ours {dtype}"] = {"sample": (sampler(model, x, autocast, steps=steps), 1)}
        fast = sampler(compiled, x, bf16, steps=steps)
        table["ours bfloat16 compiled"] = {"sample": (fast, 1)}
        functions = {
            f"{row}: {part}": function
            for row in table
            for part, (function, _) in table[row].items()
        }
        times = alternate(functions, rounds, device)
    rows = []
    for row, parts in table.items():
        taken = {part: times[f"{row}: {part}"] for part in parts}
        seconds = sum(count * middle(taken[part]) for part, (_, count) in parts.items()) / B
        widest = max(map(spread, taken.values()))
        rows.append({"name": row, "seconds_per_sequence": seconds, "spread": widest})
        rows[-1]["ratio"] = rows[0]["seconds_per_sequence"] / seconds
    return rows


def baseline(V, rounds, device, autocast, quick):
    """Tokens/s of our causal baseline with its cache, and of the diffusion model of its size."""
    rows = []
    for B in (1, 16):
        causal, full = (transformer(V, attention=kind).to(device) for kind in ("causal", "full"))
        x = torch.full((B, SMALL["block_size"]), full.mask_id, device=device)  # (B, L)
        variants = {
            "causal, cached": sampler(causal, x, autocast),
            "causal, cached, float32": sampler(causal, x, contextlib.nullcontext),
        }
        for steps in (16,) if quick else (16, 32, 64, 128, 256):
            variants[f"masked, {steps} steps"] = sampler(full, x, autocast, steps=steps)
        times = alternate(variants, rounds, device)
        base = min(middle(taken) for name, taken in times.items() if name.startswith("causal"))
        for name, taken in times.items():
            entry = {"name": f"{name}, batch {B}", "tokens_per_second": x.numel() / middle(taken)}
            rows.append(entry | {"ratio": base / middle(taken)})
    return rows


def loading(rounds, device):
    """Tokens/s of shuffled blocks and of their masks, one thread, the file in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = torch.randint(100, (20_000_000,), dtype=torch.int16).numpy().astype("uint16")
        tokens.tofile(Path(folder) / "train_00000.bin")
        split = {"tokens": len(tokens), "documents": 1, "bytes": len(tokens)}
        meta = {"tokenizer": {"kind": "byte"}, "vocab_size": 256, "dtype": "uint16"}
        meta = to_json(meta | {"splits": {"train": split}})
        (Path(folder) / "meta.json").write_text(meta, encoding="utf8")
        blocks = loader.Blocks(loader.Tokens(folder, "train"), 1024, seed=0)
        count = iter(range(10**9))

        def masks():
            u, noise = diffusion.stratified_uniforms(0, next(count), range(64), 64, 1024)
            diffusion.draw_mask("any_order", u, noise)

        variants = {
            "blocks of 1024, 64 a batch": lambda: blocks.batch(64 * next(count), range(64)),
            "their masks (any_order)": masks,
        }
        times = alternate(variants, rounds, device)
    return [
        {"name": name, "tokens_per_second": 64 * 1024 / middle(taken)}
        for name, taken in times.items()
    ]


def evaluating(V, rounds, device, autocast):
    """Tokens/s of the bound: sequences x draws x L by evaluate.estimate, and the calls alone."""
    model, L = transformer(V).to(device).eval(), SMALL["block_size"]
    blocks = list(torch.randint(V, (8, L)).numpy())  # 8 of (L,)
    x = torch.full((32, L), model.mask_id, device=device)  # (32, L)

    def bound():
        with autocast():
            evaluate.estimate(model, blocks, draws=4)

    @torch.no_grad()
    def calls_alone():
        with autocast():
            model(x)

    variants = {
        "bound, 8 sequences x 4 draws": bound,
        "one plain forward of the same 32 rows": calls_alone,
    }
    times = alternate(variants, rounds, device)
    return [
        {"name": name, "tokens_per_second": 32 * L / middle(taken)} for name, taken in times.items()
    ]


# ---- The report ----------------------------------------------------------------------------------

FORMATS = {
    "ratio": "{:.2f}x",
    "spread": "{:.0%}",
    "of_bf16_limit": "{:.0%}",
    "seconds_per_sequence": "{:.3f}",
}


KINDS = {"char": "V = 110", "bpe": "V = 50,257"}


def compared(axes, figures, names, title):
    """Bars of ratios to the textbook; names: {name: function of (key -> figure) -> ratio}."""
    bars = {}
    for kind, V in KINDS.items():
        for name, ratio in names.items():
            bars[f"{name}, {V}"] = ratio(lambda key, kind=kind: figures[key.format(kind)])
    light = [bar for bar in bars if bar.startswith("textbook")]
    results.bars(axes, bars, "{:.1f}x", light, start=1.0)
    axes.set(xscale="log", xlabel="times as fast as the textbook (logarithmic)", xlim=(1, None))
    axes.xaxis.set_major_formatter("{x:g}")
    char, bpe = (bars[f"here, bfloat16 compiled, {V}"] for V in KINDS.values())
    axes.set_title(f"{title}: {char:.0f} and {bpe:.0f} times as fast as the textbook")


def draw_training(axes, figures):
    ratio, kept = "train_{}_ratio", "train_{}_ratio_kept"
    names = {
        "textbook keeping memory": lambda of: of(ratio) / of(kept),
        "here, float32 compiled": lambda of: of("train_{}_ratio_float32"),
        "here, bfloat16 compiled": lambda of: of(ratio),
    }
    compared(axes, figures, names, "A training step")


def draw_sampling(axes, figures):
    ours, kept = "sample_{}_ratio_same_dtype", "sample_{}_ratio_same_dtype_kept"
    cache = "sample_{}_vs_cache_kept"
    names = {
        "textbook keeping memory": lambda of: of(ours) / of(kept),
        "textbook with RADD's cache": lambda of: of(ours) / of(cache),
        "here, float32": lambda of: of(ours),
        "here, bfloat16 compiled": lambda of: of("sample_{}_ratio"),
    }
    compared(axes, figures, names, "1,024 sampling steps")


PLOTS = {"_training": draw_training, "_sampling": draw_sampling}


def main(config):
    """Run all comparisons, print their tables, write and return the figures, a flat dict."""
    began = time.time()
    device, autocast = machine(config)
    quick, rounds = config["quick"], 2 if config["quick"] else config["rounds"]
    texts, figures = [], {}

    def report(title, rows):
        texts.append(results.table(title, rows, FORMATS))
        tqdm.write(texts[-1])
        return {row["name"]: row for row in rows}

    for kind, V, B in (("char", 110, 16), ("bpe", 50257, 8)):
        rows, limits = training(V, B, rounds, device)
        title = f"Training step, V = {V}, batch {B} x 256, 6 layers of 256"
        rows_of = report(title, rows)
        best = max(rows, key=lambda row: row["tokens_per_second"])
        figures[f"train_{kind}_ratio"] = best["ratio"]
        figures[f"train_{kind}_mfu"] = best["of_bf16_limit"]
        figures[f"train_{kind}_ratio_float32"] = rows_of[FLOAT32]["ratio"]
        figures[f"train_{kind}_ratio_kept"] = best["ratio"] / rows_of[KEPT]["ratio"]
        figures[f"train_{kind}_memory_ratio"] = best["memory_mib"] / max(1, rows[0]["memory_mib"])
        limit = " and ".join(f"{limits[dtype] / 1e9:.0f} ({dtype})" for dtype in limits)
        limit = limit.replace("torch.", "")
        texts.append(f"Plain matrix products at these shapes: {limit} GFLOP/s.\n")
        if kind == "char":
            figures["matmul_fp32_gflops"] = limits[torch.float32] / 1e9
            figures["matmul_bf16_gflops"] = limits[torch.bfloat16] / 1e9

    for kind, V in (("char", 110), ("bpe", 50257)):
        # With the large vocabulary the textbook takes minutes.
        for steps in (64,) if quick else (64, 256, 1024) if kind == "char" else (1024,):
            rows = sampling(V, steps, 4, min(rounds, 3), device, quick)
            rows_of = report(f"Sampling, V = {V}, {steps} steps, batch 4 x 256", rows)
        seconds = {name: row["seconds_per_sequence"] for name, row in rows_of.items()}
        pairs = {
            "ratio": ("textbook float32", "ours bfloat16 compiled"),
            "ratio_same_dtype": ("textbook float32", "ours float32"),
            "vs_cache": ("RADD's cache float32", "ours float32"),
            "ratio_same_dtype_kept": (f"textbook float32 {KEPT}", "ours float32"),
            "vs_cache_kept": (f"RADD's cache float32 {KEPT}", "ours float32"),
        }
        for name, (theirs, ours) in pairs.items():
            figures[f"sample_{kind}_{name}"] = seconds[theirs] / seconds[ours]

    rows = baseline(110, min(rounds, 2), device, autocast, quick)
    report("Against the causal baseline, V = 110, 256 tokens", rows)
    report("Data", loading(rounds, device))
    report("Evaluation, V = 110", evaluating(110, rounds, device, autocast))
    if not quick:
        rows, _ = training(50257, 1, 3, device, RADD_SMALL, (KEPT, "+ compile"))
        report("Training step of RADD-small, batch 1 x 1024", rows)

    figures |= results.about(device) | {"seconds": time.time() - began}
    results.write(config, "bench", figures, "\n".join(texts), PLOTS)
    print(to_json(figures, indent=1))
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
