"""The machine: the device and dtype of computations, its speed and its memory."""

import contextlib
import ctypes
import functools
import math
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

import config as settings
from config import choose, require
from lib.fused import moved, product_dtype


def machine(config):
    """(device, autocast) as the keys device and dtype say.

    `with autocast():` runs matrix products in that dtype. Raises UserError for a device that is
    unknown or missing.
    """
    config = settings.completed(config, settings)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    name = config["device"]
    if name == "auto":
        name = next(device_type for device_type in available if available[device_type])
    device_type = name.split(":")[0]
    is_here = choose("device", device_type, available)
    require(re.fullmatch(r"\w+(:\d+)?", name), f"device must be like cpu or cuda:1, not '{name}'")
    require(is_here, f"device '{name}' is not available on this machine; try --device=cpu")
    if device_type == "cuda":
        cards = torch.cuda.device_count()
        is_here = (torch.device(name).index or 0) < cards
        require(is_here, f"there is no {name} here; the last is cuda:{cards - 1}")
    check_cache()
    if device_type == "cpu":
        keep_memory()
    fast = config["dtype"] == "auto" and multiplies_bfloat16(device_type)
    bf16 = config["dtype"] == "bfloat16" or fast
    return torch.device(name), lambda: torch.autocast(device_type, torch.bfloat16, enabled=bf16)


def multiplies_bfloat16(device_type):
    """Whether the hardware multiplies bfloat16 natively, and faster than float32.

    Without AMX an Intel Xeon of 2023 takes up to twice as long with bfloat16. Nothing is timed:
    after a resume the answer must be the same.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    fast = torch.cpu._is_avx512_bf16_supported() and not is_by_intel()
    return device_type == "cpu" and (fast or torch.cpu._is_amx_tile_supported())


@functools.cache
def is_by_intel():
    with contextlib.suppress(OSError):  # other systems than Linux lack the file
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text("utf8", "replace")
    return "GenuineIntel" in platform.processor()


def dtype_name(autocast, device):
    """The dtype of matrix products inside `with autocast():`, as text."""
    with autocast():
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if enabled else torch.float32
        return str(dtype).removeprefix("torch.")


def cast_products(model, autocast):
    """Cast a network's matrices to the dtype of autocast once, instead of in every call.

    Afterwards the network is for inference only, and only inside autocast.
    """
    with autocast():
        dtype = product_dtype(torch.empty(0, device=model.device))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)


def keep_memory(keep=True):
    """Let the process keep freed memory (glibc only), so that large tensors need no new pages.

    Otherwise page faults take up to a third of a training step on the CPU. keep=False returns the
    memory of large tensors to the system.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1 if keep else 2**26)  # M_TRIM_THRESHOLD


def check_cache():
    """Ignore TORCHINDUCTOR_CACHE_DIR if it cannot be created, since torch would fail."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            message = f"{folder} cannot be made ({error.strerror})"
            print(f"{message}, so TORCHINDUCTOR_CACHE_DIR is ignored", file=sys.stderr)
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def calls_on_device(plan, policy, model):
    """Yield each Call of samplers.py and its copy on the device (with `masked` if it remasks).

    If all calls are known in advance, they are copied together, so that none waits for a copy.
    A network compiled to CUDA graphs reads one size, so `live` and `idx` are padded with their last
    element to the length of the longest call (sample.Predictor drops the states of the padding).
    """
    names = ("live", "at", "idx", "u", "masked") if policy.remasks else ("live", "at", "idx", "u")
    if not policy.planned:
        for call in plan:
            tensors = moved(model.device, *(getattr(call, name) for name in names))
            yield call, call._replace(**dict(zip(names, tensors, strict=True)))
        return
    plan = list(plan)
    if not plan:
        return
    parts = {name: [getattr(call, name) for call in plan] for name in names}  # one per call
    compiled = "hidden" in vars(model)  # set by compile_hidden, not the class's
    if compiled and model.device.type == "cuda" and model.config["attention"] == "full":
        most = -(-max(map(len, parts["idx"])) // 16) * 16  # a multiple of 16: few distinct sizes
        parts["live"] = repeated_to(len(plan[0].live), parts["live"])
        parts["idx"] = repeated_to(most, parts["idx"])
    tables = moved(model.device, *map(torch.cat, parts.values()))
    for name, table in zip(names, tables, strict=True):
        parts[name] = table.split([*map(len, parts[name])])
    for i, call in enumerate(plan):
        yield call, call._replace(**{name: parts[name][i] for name in names})


def repeated_to(size, tensors):
    """Pad each tensor (n,) to (size,) by repeating its last element."""
    return [torch.cat([z, z[-1:].expand(size - len(z))]) for z in tensors]


def wait(device):
    """Wait until the device has finished: calls return while a GPU is still computing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device):
    """The peak memory of this process so far in MiB, of its GPU or else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


PRODUCTS = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # matrices (n, n) large enough to keep it busy


def matmul_flops(device, autocast, seconds=0.3):
    """Operations per second of a plain matrix product here: the peak for utilisation."""
    n = PRODUCTS[device.type]
    a = torch.randn(n, n, device=device)  # (n, n)
    with autocast():
        a = b = a @ a  # (n, n) in the dtype of autocast
        best, began = math.inf, time.perf_counter()
        while time.perf_counter() - began < seconds:
            wait(device)
            start = time.perf_counter()
            for _ in range(4):
                a @ b
            wait(device)
            best = min(best, (time.perf_counter() - start) / 4)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # do not count these matrices in peak_memory
    return 2 * n**3 / best


NOMINAL = {  # dense bfloat16 operations per second, from data sheets; the first match counts
    "B200": 2250e12,
    "H200|GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def nominal_flops(device):
    """(name of the GPU, its operations per second by NOMINAL); either is None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    stated = (flops for key, flops in NOMINAL.items() if name and re.search(rf"\b({key})\b", name))
    return name, next(stated, None)


def flops_per_token(model, L, head_share=1.0):
    """Operations (2 per multiply-add) in matrix products of a forward pass, per token of L.

    head_share: the fraction of positions that leave the last block (masked ones, more than two per
    sequence). The last block's output projection and MLP (and query, unless causal) and the head
    count only these; its attention counts all positions. Training takes three times as many
    (arXiv 2204.02311, appendix B).
    """
    config, block = model.config, model.blocks[0]
    D, n_layer, attention = config["n_embd"], config["n_layer"], config["attention"]
    mlp = sum(p.numel() for p in block.mlp.parameters() if p.dim() == 2)
    tail, head = block.proj.weight.numel() + mlp, model.vocab_size * D
    if attention == "order":  # two streams, both with queries; only one leaves the last block
        read = n_layer * 4 * D * D + (2 * n_layer - 1) * L * D  # keys, values; attention
        return 2 * (read + (2 * n_layer - 1) * (D * D + tail) + head)
    query, halved = (0, 2) if attention == "causal" else (D * D, 1)
    everywhere = block.qkv.weight.numel() - query + 2 * L * D // halved
    products = n_layer * everywhere + (n_layer - 1 + head_share) * (query + tail)
    return 2 * (products + head_share * head)


def step_flops(model, sequences, L, share=1.0):
    """Operations of a training step, forward and backward, on `sequences` sequences of length L.

    share: the fraction of tokens that can count; with attention=full half of them are masked.
    """
    share *= 0.5 if model.config["attention"] == "full" else 1.0
    return 3 * flops_per_token(model, L, share) * sequences * L


def flops_of_step(config, model, dataset):
    """Operations of a training step, forward and backward, for the positions that it predicts."""
    share, L = 1.0, dataset.block_size
    if config["example_width"]:
        share = dataset.counted(range(dataset.n), not model.causal).mean() / L
    sequences = config["batch_size"] * mean_length(config, dataset) / L
    return step_flops(model, sequences, L, share)


def mean_length(config, dataset):
    """The mean number of tokens in a sequence, which random_length shortens in some steps.

    In examples, padding counts too.
    """
    L = dataset.block_size
    return L - config["random_length"] * (L - 1) / 2
