"""How fast a device is: plain products, training, its parts, sampling; parts of experiments/gpu.py.

A part is a function (part, ...) that tells its lines by part(what, function, ...).
"""

import contextlib
import itertools
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import diffusion
import model as network
import sample
import samplers
import train
from data import loader
from experiments import loading, results
from lib import device as devices
from lib import fused
from lib.compiled import can_compile, compile_hidden
from lib.device import flops_of_step
from lib.optim import update_ema

CALLS = 48  # network calls of a sample that are timed
TOP = 10  # kernels of a step that are told
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


# ---- The machine ---------------------------------------------------------------------------------


def machine(part):
    part("device", about)
    for dtype, n in (("bfloat16", part.some(8192, 256)), ("float32", part.some(4096, 256))):
        part(f"product of {n} x {n} matrices, {dtype}", product, n, getattr(torch, dtype))
    part("copy on the device, read and written", copied, False)
    part("copy of pinned memory to the device", copied, True)


def about(part):
    facts = {"name": results.about(part.device)["machine"], "torch": torch.__version__}
    if part.on_cuda:
        card = torch.cuda.get_device_properties(part.device)
        free, total = torch.cuda.mem_get_info(part.device)
        facts |= {"free_GB": free / 1e9, "of_GB": total / 1e9, "cuda": str(torch.version.cuda)}
        facts |= {"processors": card.multi_processor_count, "sm": f"{card.major}{card.minor}"}
    facts |= {"dtype": devices.dtype_name(part.autocast, part.device), "cores": os.cpu_count()}
    return facts | {"compiles": str(can_compile(part.device))}


def product(part, n, dtype):
    a = torch.randn(n, n, device=part.device, dtype=dtype)  # (n, n)
    speed = 2 * n**3 / part.seconds_of(lambda: a @ a, 0.1)
    return {"tflops": speed / 1e12} | (part.of_nominal(speed) if dtype == torch.bfloat16 else {})


def copied(part, pinned):
    size = part.some(2**30, 2**20)  # bytes
    there = torch.zeros(size, dtype=torch.uint8, device=part.device)  # (size,)
    here = torch.zeros(size, dtype=torch.uint8)  # (size,)
    here = here.to(part.device) if not pinned else here.pin_memory() if part.on_cuda else here
    seconds = part.seconds_of(lambda: there.copy_(here, non_blocking=True), 0.1)
    return {"GB_per_s": (1 if pinned else 2) * size / seconds / 1e9}


# ---- Training ------------------------------------------------------------------------------------


def training(part, name, micros):
    """A preset with micro-batches from large to small: eager, then those that fit compiled."""
    with part.blocks(part.preset(name)) as blocks:
        fitting = []
        for B in part.some(micros, (2,)):
            config = part.preset(name, batch_size=B, micro_batch_size=0, compile=False)
            line = part(f"micro-batch {B}, eager", trained, config, blocks)
            if "failed" not in line:
                fitting.append(config | {"compile": True})
        for config in fitting:
            part(f"micro-batch {config['batch_size']}, compiled", trained, config, blocks)


def trained(part, config, blocks):
    """Steps of one micro-batch each; compiled ones also on one batch that is there already."""
    if config["compile"] and not can_compile(part.device):
        raise RuntimeError("torch.compile lacks something here: a compiler, triton, or the card")
    batches = train.make_batches(config, blocks, part.team)
    batches = batches if part.device.type == "cpu" else loader.prefetch(batches)
    with contextlib.closing(batches):
        began = time.perf_counter()
        step, model = part.stepper(config)
        step(batches)
        devices.wait(part.device)
        first, made = time.perf_counter() - began, programs()
        seconds = part.seconds_of(lambda: step(batches))
        line = speeds(part, config, model, blocks, seconds) | {"first_step_s": first}
        if config["compile"]:
            for _ in range(part.some(50, 2)):
                step(batches)
            line["programs_made_later"] = programs() - made
            resident = itertools.repeat(next(batches).each(lambda z: z.to(part.device)))
            line["on_one_batch"] = part.seconds_of(lambda: step(resident)) / seconds
    return line


def programs():
    """How many programs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def speeds(part, config, model, blocks, seconds):
    tokens, flops = config["batch_size"] * blocks.block_size, flops_of_step(config, model, blocks)
    # Looked at here, as a measurement of products forgets it.
    memory = {"memory_GB": torch.cuda.max_memory_allocated() / 1e9} if part.on_cuda else {}
    speed = flops / seconds
    line = {"tokens_per_second": tokens / seconds, "step_ms": 1e3 * seconds} | memory
    of_measured = speed / devices.matmul_flops(part.device, part.autocast)
    return line | part.of_nominal(speed) | {"of_measured": of_measured}


def largest(part):
    config = part.preset("radd_small", compile=False, micro_batch_size=0)
    with part.blocks(config) as blocks:
        for recompute in (False, True):
            what = f"largest micro-batch, eager{', recompute' if recompute else ''}"
            part(what, largest_batch, config | {"recompute": recompute}, blocks)


def largest_batch(part, config, blocks):
    """What fits, to within an eighth: doubled until it does not, then in halves."""
    step, model = part.stepper(config)
    largest, fails, B = 0, part.some(2**12, 4), part.some(8, 2)
    while fails - largest > max(1, largest // 8):
        batch = train.make_batch(config | {"batch_size": B}, blocks, 0, range(B))
        try:
            step(iter([batch]), config | {"batch_size": B})
            devices.wait(part.device)
            largest = B
        except RuntimeError as error:
            if not is_full(error):
                raise
            fails = B
        model.zero_grad(set_to_none=True)
        B = min(2 * B, (largest + fails) // 2)
    return {"sequences": largest}


def is_full(error):
    """Whether an exception says that there is no memory left."""
    match = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))
    return isinstance(error, MemoryError) or bool(match)


def loading_speed(part):
    with tempfile.TemporaryDirectory() as place:
        loading.write_tokens(Path(place, "data"), part.some(10**8, 10**6), 1)
        part("batches with masks, one core", loaded, Path(place, "data"))


def loaded(part, folder):
    speed = loading.measure(folder, 1)
    return {"tokens_per_second": speed["batches"], "blocks_per_second": speed["blocks"]}


# ---- The parts of a training step ----------------------------------------------------------------


def where(part):
    """Head, block, attention, optimizer, and the kernels of a whole step."""
    config = part.preset("radd_small", batch_size=part.some(64, 2), micro_batch_size=0)
    N = config["batch_size"] * config["block_size"] // 2  # positions that are predicted
    for chunk in part.some((0, 256, 1024, 4096), (0, 8)):
        part(f"head, {N} positions, {chunk or 'its own'} at a time", head, config, N, chunk)
    for V in (config["vocab_size"], -(-config["vocab_size"] // 64) * 64):
        part(f"products of the head, {part.some(4096, 8)} positions x {V}", products, config, V)
    for compiled in (False, True):
        part(f"block{', compiled' if compiled else ''}", block, config, compiled)
    for B, L in part.some(((64, 1024), (16, 2048)), ((2, 32),)):
        for backend in BACKENDS:
            part(f"attention, {B} x {L}, {backend}", attention, config, B, L, backend)
    part("clipping, optimizer and average", update, config)
    with part.blocks(config) as blocks:
        part("kernels of a compiled step", profiled, config | {"compile": True}, blocks)


def there_and_back(part, function, *leaves):
    """Milliseconds of function() and its gradients at the leaves."""

    def call():
        with part.autocast():
            out = function()
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return {"ms": 1e3 * part.seconds_of(call)}


def head(part, config, N, chunk):
    D, V, on = config["n_embd"], config["vocab_size"], {"device": part.device}
    h, W, bias = (torch.randn(*n, **on, requires_grad=True) for n in ((N, D), (V, D), (V,)))
    target, weight = torch.randint(V, (N,), **on), torch.rand(N, **on)  # (N,) each

    def loss():
        return fused.cross_entropy(h, (W, bias), target, weight, chunk=chunk)[0]

    return there_and_back(part, loss, h, W, bias)


def products(part, config, V):
    """Of one chunk: logits, their gradient to the hidden states and to the weight."""
    N, D, keys = part.some(4096, 8), config["n_embd"], {"device": part.device}
    keys["dtype"] = torch.bfloat16
    h, W, g = (torch.randn(*n, **keys) for n in ((N, D), (V, D), (N, V)))
    seconds = part.seconds_of(lambda: (h @ W.T, g @ W, g.T @ h))
    return {"ms": 1e3 * seconds, "tflops": 6 * N * D * V / seconds / 1e12}


def block(part, config, compiled):
    model = network.make_network(config).to(part.device)
    one = torch.compile(model.blocks[0]) if compiled else model.blocks[0]
    shape = config["batch_size"], config["block_size"], config["n_embd"]
    h = torch.randn(shape, device=part.device, requires_grad=True)  # (B, L, D)
    leaves = h, *model.blocks[0].parameters()
    return there_and_back(part, lambda: one(h, model.cos, model.sin), *leaves)


def attention(part, config, B, L, backend):
    H, d = config["n_head"], config["n_embd"] // config["n_head"]
    keys = {"device": part.device, "dtype": torch.bfloat16, "requires_grad": True}
    qkv = torch.randn(B, L, 3, H, d, **keys)  # as a block has it

    def read():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))

    line = there_and_back(part, read, qkv)
    return line | {"tflops": 14 * B * H * L * L * d / line["ms"] / 1e9}


def update(part, config):
    model, ema, optimizers = train.build(config, part.team)
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def call():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_ema(ema, model, config["ema"], 1)

    return {"ms": 1e3 * part.seconds_of(call)}


def profiled(part, config, blocks):
    """Tell the kernels that take most of three steps -> {idle: the share of time without any}."""
    step, _ = part.stepper(config)
    batch = train.make_batch(config, blocks, 0, range(config["batch_size"]))
    batches = itertools.repeat(batch.each(lambda z: z.to(part.device)))
    for _ in range(3):
        step(batches)
    devices.wait(part.device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if part.on_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        began = time.perf_counter()
        for _ in range(3):
            step(batches)
        devices.wait(part.device)
        seconds = time.perf_counter() - began
    taken = kernels(profile.key_averages(), part.on_cuda)
    for kernel in sorted(taken, key=taken.get, reverse=True)[:TOP]:
        of = taken[kernel] / sum(taken.values())
        part.tell({"what": f"kernel {kernel[:60]}", "ms": 1e3 * taken[kernel] / 3, "of_all": of})
    return {"step_ms": 1e3 * seconds / 3, "idle": 1 - sum(taken.values()) / seconds}


def kernels(averages, on_cuda):
    """{kernel: seconds}, of operators on the CPU."""
    if not on_cuda:
        return {each.key: each.self_cpu_time_total / 1e6 for each in averages}
    on_card = [each for each in averages if each.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [each for each in on_card if not each.is_user_annotation]
    return {each.key: each.self_device_time_total / 1e6 for each in kernels}


# ---- Sampling ------------------------------------------------------------------------------------


PROGRAMS = ("eager", "compiled", "as CUDA graphs")


def sampling(part):
    """RADD-small's shape, whole samples: masked by steps, the causal baseline, an order network."""
    batches, steps = part.some((1, 16), (1, 2)), part.some((64, 1024, 128, 256, 512), (8, 64))
    model = built(part, "full")
    for B, n in itertools.product(batches, steps):
        part(f"masked, batch {B}, {n} steps", masked, model, B, n)
    causal = built(part, "causal")
    for B in batches:
        part(f"causal, cached, batch {B}", left_to_right, causal, B)
    part(f"confidence, batch {batches[-1]}, 2 calls", confidence, model, batches[-1])
    del causal
    order = built(part, "order")
    for B, n in itertools.product(batches, steps[:1]):
        part(f"order, cached, batch {B}, {n} steps", masked, order, B, n)
    del order
    programs = itertools.product(steps[:2], batches, PROGRAMS[1:])
    for n, B, how in itertools.islice(programs, part.some(None, 2)):
        part(f"masked, {how}, batch {B}, {n} steps", masked, model, B, n, how)


def built(part, attention):
    config = part.preset("radd_small", attention=attention)
    model = network.make_network(config).to(part.device).eval()
    devices.cast_products(model, part.autocast)
    return model


def masked(part, model, B, steps, how="eager"):
    """As large a part of a sample as takes CALLS calls, with the same tokens due in each."""
    L, schedule = model.block_size, diffusion.SCHEDULES["loglinear"]
    nfe = samplers.expected_nfe(samplers.unmask_schedule(schedule, steps), L)
    share = min(1.0, part.some(CALLS, 4) / nfe) if model.config["attention"] == "full" else 1.0
    x = torch.zeros(B, L, dtype=torch.long, device=part.device)  # (B, L)
    x[:, : round(share * L)] = model.mask_id
    if how != "eager":
        compile_hidden(model, part.device, graphs=how == PROGRAMS[2])
    try:
        seconds, info = sampled(part, model, x, steps=max(1, round(share * steps)))
    finally:
        vars(model).pop("hidden", None)  # the method is behind it
    calls = float(info["nfe"].double().mean())
    whole = seconds * nfe / calls if share < 1 else seconds
    return {"seconds_a_sample": whole / B, "ms_a_call": 1e3 * seconds / float(info["nfe"].max())}


def sampled(part, model, x, **options):
    """(Seconds of sample.sample, the median of three after one to warm up; its info)."""
    times = []
    for _ in range(1 + part.some(3, 1)):
        devices.wait(part.device)
        began = time.perf_counter()
        with part.autocast():
            _, info = sample.sample(model, x, batch_size=len(x), **options)
        devices.wait(part.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), info


def left_to_right(part, model, B):
    """The first and the last tokens of a sample; those between cost as much as their mean."""
    L, n, times = model.block_size, part.some(128, 8), []
    for given in (0, L - n):
        x = torch.zeros(B, given + n, dtype=torch.long, device=part.device)  # (B, given + n)
        x[:, given:] = model.mask_id
        times.append(sampled(part, model, x)[0] / n)
    line = {"seconds_a_sample": L * sum(times) / 2 / B}
    return line | {"ms_a_token_first": 1e3 * times[0], "ms_a_token_last": 1e3 * times[1]}


def confidence(part, model, B):
    x = torch.full((B, model.block_size), model.mask_id, device=part.device)  # (B, L)
    return {"ms_a_call": 1e3 * sampled(part, model, x, sampler="confidence", steps=2)[0] / 2}
