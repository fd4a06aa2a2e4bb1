"""What a run needs on more machines than are here, computed and not measured.

    python -m experiments.scaling_up                two of SMDM's models on 8, 64 and 1,024 GPUs
    python -m experiments.scaling_up --sizes=336M --budgets=1e20 --batches=256 --gpus=16

Memory, network, time and failures. Every assumption is a key, the defaults being those of nodes of
eight H100. What the formulas count (parameters, operations, bytes kept, bytes sent, bytes saved)
tests measure on small cases; speeds are taken from data sheets, and a utilisation.
"""

import math
import sys
from pathlib import Path

import torch

import config as settings
import model as network
from config import require
from data.loader import id_type
from experiments import results
from lib import fused, program
from lib.device import step_flops
from run import formats

DEFAULTS = {
    "sizes": "170M,1028M",  # of SMDM's table (run/formats.SIZES); 1028M is their "1.1B" (1.14B)
    "budgets": "1e20,3.3e21",  # operations of each, counted as the paper counts (tokens_of)
    "batches": "256,1024",  # sequences a step of each: SMDM's; with more GPUs one for each GPU
    "gpus": "8,64,1024",  # how many there are
    "block_size": 2048,  # tokens of a sequence; 1 or more
    "vocab_size": 32000,  # V, Llama 2's; 1 or more
    "micro_batch_size": 8,  # sequences that a GPU takes at once; 1 or more
    "ema": True,  # keep averaged weights
    "peak": 989e12,  # operations a second: an H100's in bfloat16, dense, by its data sheet
    "memory": 80e9,  # bytes of a GPU
    "mfu": 0.3,  # in [0, 1], the part of the peak reached while no GPU waits: 0.28..0.32 for 170M
    "node": 8,  # GPUs of a node; 1 or more
    "nvlink": 450e9,  # bytes a second that a GPU sends inside its node, an H100's
    "links": 8,  # network cards of a node; 1 or more
    "link": 50e9,  # bytes a second that each sends: 400 Gb/s
    "reached": 0.8,  # the part of these two speeds that collectives reach; in [0, 1]
    "hop": 5e-6,  # seconds until a message is at the next GPU
    "overlap": 0.8,  # the part of the arithmetic behind which messages can hide; in [0, 1]
    "loader": 20e6,  # tokens a second that the loader of one process reads, at least
    "disk": 2e9,  # bytes a second that process 0 writes to the shared file system
    # Of which one fails: Llama 3 had 419 unexpected stops in 54 days of 16,384 (arXiv 2407.21783).
    "gpu_hours": 50700.0,
    "restart": 600.0,  # seconds from a failure until the run goes on
    "save_minutes": 30.0,  # between two checkpoints
}

PRESETS = {"gpu_small": 50257, "radd_small": 50257, "smdm_170m": 32000, "radd_medium": 50257}  # V
CARDS = (8, 16, 24, 80)  # GB, a tenth of which goes to CUDA, fragments, and tables in passing
BUCKET = 25 * 2**20  # bytes of gradients that ddp sends at once


# ---- 1. What is counted: tests measure these on small cases --------------------------------------


def shape(config, size):
    """The model of a size of SMDM's table, without memory for it."""
    keys = {key: config[key] for key in ("vocab_size", "block_size")}
    return unmade(formats.MODEL | formats.size_config(size) | keys)


def preset(name):
    """(config, model) of a preset, without memory for it."""
    path = Path(__file__).parent.parent / f"configs/{name}.py"
    config = network.DEFAULTS | {"size": "", "ema": 0.0} | settings.read_preset(path)
    config |= {"vocab_size": PRESETS[name]}
    config |= formats.size_config(config["size"]) if config["size"] else {}
    return config, unmade(config)


def unmade(config):
    with torch.device("meta"):
        return network.make_network(config)


def norm_bytes(net):
    """Bytes that a norm keeps of a token in float32: input and scale, and its mean or result."""
    D = net.config["n_embd"]
    return 4 * D + 8 if net.config["norm"] == "layer" else 8 * D + 4


def block_bytes(net):
    """Bytes that a block keeps for its backward pass in bfloat16 autocast.

    (For each token, for each position that leaves the block); weights left out. bfloat16: what goes
    into qkv, proj, and into up and gate (2D each), what qkv gives (6D), q and k turned (2D each),
    what attention gives (2D, and 4H for its sums), what leaves up and enters down, and with a gate
    two more (2F each), and what dropout keeps (2D each). Float32: norms, of q and k too (4D and 4H
    each). A fused norm, a compiled block and the masks of dropout on a GPU keep less.
    """
    D, H = net.config["n_embd"], net.config["n_head"]
    F, gate = net.config["mlp_width"] or 4 * D, net.config["mlp"] == "swiglu"
    normed = (4 * D + 4 * H) * net.config["qk_norm"]
    attention = norm_bytes(net) + 2 * D + 6 * D + 4 * D + normed + 2 * D + 4 * H
    mlp = norm_bytes(net) + (1 + gate) * (2 * D + 4 * F)
    dropped = 4 * D if net.config["dropout"] else 0
    return attention, 2 * D + normed + mlp + dropped


def activation_bytes(net, tokens, recompute=False):
    """Bytes kept from the forward to the backward pass of `tokens`, half masked; no weights."""
    D, n_layer, N = net.config["n_embd"], net.config["n_layer"], tokens // 2
    per_token, per_position = block_bytes(net)
    # Ids, masked_idx, last norm, and the gradient at its output.
    ends = 8 * tokens + 8 * N + norm_bytes(net) * N + 4 * D * N
    if recompute:  # what goes into each block, and all of one block
        return ends + 4 * D * tokens * n_layer + (per_token + per_position) * tokens
    turns = 4 * D // net.config["n_head"] * N  # cos and sin at the last block's queries
    positions = tokens * (n_layer - 1) + N
    return ends + per_token * tokens * n_layer + per_position * positions + turns


def sent_bytes(net, engine, gpus, micro_steps):
    """Bytes that each GPU sends in a step.

    ddp: a ring all-reduce of the gradients in float32. fsdp (arXiv 2304.11277), in each micro-step:
    a ring all-gather of the blocks' weights in bfloat16 for the forward pass and one for the
    backward pass, one of embedding and head, and a reduce-scatter of gradients, all in float32.
    """
    N, blocks = net.n_parameters(), sum(p.numel() for p in net.blocks.parameters())
    size = 8 * N if engine == "ddp" else micro_steps * (4 * blocks + 4 * (N - blocks) + 4 * N)
    return size * (gpus - 1) / gpus


def checkpoint_bytes(net, ema):
    """Bytes of ckpt.pt: weights, the two moments of AdamW, and the averages, in float32."""
    return (4 + 8 + (4 if ema else 0)) * net.n_parameters()


# ---- 2. Memory -----------------------------------------------------------------------------------


def memory(config, net, engine, gpus, micro):
    """Bytes that a GPU holds at the peak of a step, by what they are for."""
    N, D, V = net.n_parameters(), net.config["n_embd"], net.vocab_size
    block = sum(p.numel() for p in net.blocks[0].parameters())
    ends = N - block * len(net.blocks)  # embedding, last norm and head
    matrices = sum(p.numel() for p in net.blocks[0].parameters() if p.dim() == 2)
    copies = 2 * matrices if engine == "ddp" else 0  # of a block's matrices in bfloat16
    part, tokens = gpus if engine == "fsdp" else 1, micro * config["block_size"]
    held = {"weights": 4 * N / part, "gradients": 4 * N / part, "optimizer": 8 * N / part}
    held["averages"] = 4 * N * config["ema"] / part
    # Weights and gradients of the ends; a block and the next one in bfloat16, and the gradient of
    # one, also in float32 as it is sent.
    held["gathered"] = 8 * ends + 10 * block if part > 1 else 0
    held["copies"] = copies * len(net.blocks)
    # The gradient of the head and its copy, and a chunk of logits.
    held["head"] = 6 * D * V + 8 * fused.head_chunk(V, torch.device("cuda")) * V
    rest = sum(held.values())
    held["activations"] = activation_bytes(net, tokens)
    held["total"] = rest + held["activations"]
    recomputed = copies + activation_bytes(net, tokens, recompute=True)
    held["with_recompute"] = rest - held["copies"] + recomputed
    return held | {"logits_avoided": 4 * tokens * V}


def one_card(name):
    """What a preset needs on one GPU: GB in any case and for each sequence at once, and the largest
    micro-batches, powers of two, that cards of so many GB hold: as it is, with blocks recomputed.
    """
    config, net = preset(name)
    parts = {}
    for key in ("total", "with_recompute"):
        one, two = (memory(config, net, "ddp", 1, micro)[key] / 1e9 for micro in (1, 2))
        parts[key] = 2 * one - two, two - one
    row = {"preset": name, "GB": parts["total"][0], "GB_a_sequence": parts["total"][1]}
    row |= {"recomputed": parts["with_recompute"][0]}
    row |= {"recomputed_a_sequence": parts["with_recompute"][1]}
    for card in CARDS:
        sizes = [int((0.9 * card - fixed) / each) for fixed, each in parts.values()]
        largest = [2 ** (size.bit_length() - 1) if size > 0 else 0 for size in sizes]
        row[f"{card}_GB"] = "{}; {}".format(*largest)
    return row


# ---- 3. Time -------------------------------------------------------------------------------------


def step(config, net, engine, gpus, share, micro, recompute=False):
    """One step on `share` sequences a GPU: tokens, bytes each GPU sends, seconds, utilisation."""
    L, micro_steps = config["block_size"], math.ceil(share / micro)  # of one GPU
    useful = step_flops(net, share, L) / (config["peak"] * config["mfu"])
    compute = useful * (4 / 3 if recompute else 1)
    sent = sent_bytes(net, engine, gpus, micro_steps)
    # A ring leaves a node once, and shares its cards with no other.
    across = min(config["nvlink"], config["links"] * config["link"])
    speed = config["reached"] * (config["nvlink"] if gpus <= config["node"] else across)
    if engine == "ddp":  # up and down a tree for each bucket, behind the last backward pass
        hops = 2 * math.ceil(math.log2(gpus)) * math.ceil(4 * net.n_parameters() / BUCKET)
        window = compute * 2 / 3 / micro_steps
    else:  # around the ring three times for each block, behind everything
        hops, window = 3 * (gpus - 1) * (len(net.blocks) + 1) * micro_steps, compute
    wire = sent / speed + hops * config["hop"]
    exposed = max(0.0, wire - config["overlap"] * window)
    seconds = compute + exposed
    time = {"tokens": share * L * gpus, "sent": sent, "compute": compute, "network": wire}
    mfu = config["mfu"] * useful / seconds
    return time | {"exposed": exposed, "seconds": seconds, "mfu": mfu}


def tokens_of(net, budget):
    """How many tokens a budget buys as the paper counts: 6 operations a token for each parameter.

    But for those of embedding and head.
    """
    ends = net.embed.weight.numel() + net.unembed.weight.numel()
    return budget / (6 * (net.n_parameters() - ends))


# ---- 4. Failures ---------------------------------------------------------------------------------


def lost(interval, save, restart, between):
    """The time that saves, failures and what they undo add, as a part of the work.

    Daly, FGCS 22, 2006, eq. 20. All in seconds: work between two saves, a save, a restart, and the
    mean between two failures, which are independent.
    """
    if (interval + save + restart) / between > 700:  # e^700 is nearly all that a float holds
        return math.inf
    starts = between / interval * math.exp(restart / between)
    return starts * math.expm1((interval + save) / between) - 1


def best_interval(save, between):
    """The interval with the least lost (Daly's eq. 37).

    sqrt(2 save between), which is Young's, and two terms more.
    """
    if save >= 2 * between:
        return between
    x = math.sqrt(save / (2 * between))
    return math.sqrt(2 * save * between) * (1 + x / 3 + x * x / 9) - save


# ---- 5. The tables -------------------------------------------------------------------------------


def numbers(config, key):
    """The list of positive numbers of a key."""
    try:
        values = [float(item) for item in config[key].split(",")]
    except ValueError:
        values = [0.0]
    message = f"{key} must be numbers above 0, with commas between, not '{config[key]}'"
    require(all(0 < n < 1e30 for n in values), message)
    return values


POSITIVE = ["peak", "memory", "mfu", "nvlink", "link", "reached", "loader", "disk", "gpu_hours"]


def check(config):
    """([(size, budget, batch), ...], the numbers of GPUs); UserError for what no cluster is."""
    for key in [*POSITIVE, "save_minutes"]:
        require(1e-9 < config[key] < 1e30, f"{key} must be above 0, not {config[key]}")
    for key in ("block_size", "vocab_size"):
        require(config[key] <= 2**20, f"{key} must be at most {2**20}, not {config[key]}")
    sizes, gpus = config["sizes"].split(","), numbers(config, "gpus")
    budgets, batches = numbers(config, "budgets"), numbers(config, "batches")
    equal = len(sizes) == len(budgets) == len(batches)
    require(equal, "sizes, budgets and batches must be equally many")
    whole = all(n == int(n) and 2 <= n <= 10**6 for n in gpus)
    require(whole, f"gpus must be from 2 to a million, not '{config['gpus']}'")
    return list(zip(sizes, budgets, batches, strict=True)), [int(n) for n in gpus]


def plan(config, net, budget, batch, gpus):
    """What a model needs on so many GPUs, and a row with the faster engine.

    {engine: (memory of a GPU, a step, hours)}; blocks are recomputed where a GPU would otherwise
    not hold them.
    """
    engines, share = {}, math.ceil(batch / gpus)
    micro = min(config["micro_batch_size"], share)
    for engine in ("ddp", "fsdp"):
        held = memory(config, net, engine, gpus, micro) | {"sequences": micro}
        recompute = held["total"] > config["memory"]
        time = step(config, net, engine, gpus, share, micro, recompute)
        hours = tokens_of(net, budget) / time["tokens"] * time["seconds"] / 3600
        engines[engine] = held, time, hours
    small = [e for e in engines if engines[e][0]["with_recompute"] <= config["memory"]]
    engine = min(small or engines, key=lambda engine: engines[engine][2])
    held, time, hours = engines[engine]
    name = f"{engine} + recompute" if held["total"] > config["memory"] else engine
    row = {f"{engine}_GB": held["total"] / 1e9 for engine, (held, _, _) in engines.items()}
    row |= {"faster": name if small else "neither fits"}
    speed = time["tokens"] / time["seconds"]
    row |= {"tokens_per_second": speed, "mfu": time["mfu"], "hours": hours}
    bandwidth = speed * id_type(net.vocab_size).itemsize / 1e6
    row |= {"data_MB_per_s": bandwidth, "of_the_loader": speed / gpus / config["loader"]}
    return engines, row | failures(config, net, gpus, hours)


def failures(config, net, gpus, hours):
    """The last columns of a row: what saves and failures take."""
    size, between = checkpoint_bytes(net, config["ema"]), config["gpu_hours"] * 3600 / gpus
    save, interval = size / config["disk"], 60 * config["save_minutes"]
    best = best_interval(save, between)
    share, least = (lost(length, save, config["restart"], between) for length in (interval, best))
    row = {"checkpoint_GB": size / 1e9, "save_s": save}
    row |= {"failures": gpus * hours * (1 + share) / config["gpu_hours"], "lost": share}
    return row | {"best_interval_min": best / 60, "lost_at_it": least}


HELD = ["weights", "gradients", "optimizer", "averages", "gathered", "copies", "head"]
MEMORY = [*HELD, "activations", "total", "with_recompute", "logits_avoided"]
KEPT = ["checkpoint_GB", "failures", "lost", "lost_at_it", "best_interval_min"]
TENTHS = [*MEMORY, "ddp_GB", "fsdp_GB", "sent_GB", "compute_ms", "network_ms", "exposed_ms"]
TENTHS += ["hours", "data_MB_per_s", "checkpoint_GB", "save_s"]
FORMATS = dict.fromkeys(["GB", "GB_a_sequence", "recomputed", "recomputed_a_sequence"], "{:.2f}")
FORMATS |= dict.fromkeys(TENTHS, "{:,.1f}") | {"failures": "{:.2f}"}
FORMATS |= dict.fromkeys(["mfu", "lost", "lost_at_it", "of_the_loader"], "{:.1%}")


def draw(axes, figures):
    """Utilisation against GPUs, a line for each model and engine."""
    ends, lines = {}, {}
    for key, value in figures.items():
        if key.endswith("_mfu"):
            size, gpus, engine, _ = key.split("_")
            lines.setdefault((size, engine), []).append((int(gpus), 100 * value))
    for (size, engine), points in lines.items():
        style = "o-" if engine == "ddp" else "s--"
        axes.plot(*zip(*points, strict=True), style, color=results.DARK)
        ends[f"{size}, {engine.upper()}"] = points[-1]
    ticks = sorted({gpus for points in lines.values() for gpus, _ in points})
    axes.set(xscale="log", xlabel="GPUs", ylabel="percent of the peak that is reached", ylim=0)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_title("Computed, not measured: DDP goes on where FSDP waits for the network")
    results.name_ends(axes, ends)


PLOTS = {"": draw}


def main(config):
    """Compute and write the three tables; return the figures, a flat dict."""
    models, gpu_counts = check(config)
    memories, speeds, runs, figures = [], [], [], {}
    for size, budget, batch in models:
        net = shape(config, size)
        for gpus in gpu_counts:
            engines, row = plan(config, net, budget, batch, gpus)
            runs.append({"model": size, "GPUs": gpus} | row)
            for engine, (held, time, hours) in engines.items():
                who = {"model": size, "GPUs": gpus, "engine": engine}
                table = {key: held[key] / 1e9 for key in MEMORY}
                memories.append(who | {"sequences": held["sequences"]} | table)
                times = {f"{key}_ms": 1e3 * time[key] for key in ("compute", "network", "exposed")}
                speed = {"tokens_per_second": time["tokens"] / time["seconds"], "mfu": time["mfu"]}
                speed |= {"hours": hours}
                batches = {"batch": time["tokens"] // config["block_size"]}
                speeds.append(who | batches | {"sent_GB": time["sent"] / 1e9} | times | speed)
                name = f"{size}_{gpus}_{engine}"
                figures[f"{name}_GB"] = held["total"] / 1e9
                figures[f"{name}_recompute_GB"] = held["with_recompute"] / 1e9
                figures |= {f"{name}_{key}": value for key, value in speed.items()}
            figures |= {f"{size}_{gpus}_{key}": row[key] for key in KEPT}
    cards = [one_card(name) for name in PRESETS]
    tables = {
        "The whole run, by the faster engine": runs,
        "Memory of a GPU at the peak of a step, GB": memories,
        "One step, and the whole budget": speeds,
        "One GPU: memory, and the largest micro-batch on cards; with blocks recomputed": cards,
    }
    text = "\n".join(results.table(title, rows, FORMATS) for title, rows in tables.items())
    results.write(config, "scaling_up", figures, text, PLOTS)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, results, sys.modules[__name__])
