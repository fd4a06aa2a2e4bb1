"""The machine: which device computes, in which dtype, how fast, and how its memory is kept."""

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
import re
import sys
import time

import torch

import config as settings
from config import choose, first_line, require
from lib.fused import product_dtype


def machine(config):
    """(device, autocast) from the keys device and dtype.

    `with autocast():` runs matrix products in that dtype. Raises UserError for a device that is
    unknown or not here.
    """
    config = settings.completed(config, settings)
    require(0 <= config["seed"] < 2**63, f"seed must be from 0 to 2^63 - 1, not {config['seed']}")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available["cpu"] = True
    name = config["device"]
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    kind = name.split(":")[0]
    is_here = choose("device", kind, available)
    require(re.fullmatch(r"\w+(:\d+)?", name), f"device must be like cpu or cuda:1, not '{name}'")
    require(is_here, f"device '{name}' is not available on this machine; try --device=cpu")
    if kind == "cuda":
        cards = torch.cuda.device_count()
        is_here = (torch.device(name).index or 0) < cards
        require(is_here, f"there is no {name} here; the last is cuda:{cards - 1}")
    check_cache()
    if kind == "cpu":
        keep_memory()
    fast = config["dtype"] == "auto" and multiplies_bfloat16(kind)
    bf16 = config["dtype"] == "bfloat16" or fast
    return torch.device(name), lambda: torch.autocast(kind, torch.bfloat16, enabled=bf16)


def multiplies_bfloat16(kind):
    """Whether the hardware multiplies bfloat16 fast, in place of emulating it."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu
    return kind == "cpu" and (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def dtype_name(autocast, device):
    """The dtype of matrix products inside `with autocast():`, as text."""
    with autocast():
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if enabled else torch.float32
        return str(dtype).removeprefix("torch.")


def cast_products(model, autocast):
    """Cast a network's matrices to the dtype of autocast, so that no call casts them again.

    From then on it only predicts, inside autocast.
    """
    with autocast():
        dtype = product_dtype(torch.empty(0, device=model.device))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)


def keep_memory(keep=True):
    """Freed memory stays with the process (glibc only): large tensors need no fresh pages.

    Without it up to a third of a training step on the CPU goes into page faults. keep=False gives
    large ones back.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1 if keep else 2**26)  # M_TRIM_THRESHOLD


def check_cache():
    """Ignore a compiler cache folder that cannot be made: torch would fail on it."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            why = f"{folder} cannot be made ({error.strerror})"
            print(f"{why}, so TORCHINDUCTOR_CACHE_DIR is not heeded", file=sys.stderr)
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]


@functools.cache
def can_compile(device):
    """Whether torch.compile works here: tried once, and where it does not, a line says why.

    It may lack a compiler, Python's headers, triton, or a cache that it may write. Without it all
    is only slower.
    """
    try:
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(f"it is new on {device.type}")
        if device.type == "cuda" and not importlib.util.find_spec("triton"):
            raise ImportError("triton is missing")
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # of any part of it
        cause = re.search(r".*\berror: .*", str(error))  # what the C++ compiler says
        why = cause[0].strip()[:200] if cause else first_line(error)
        if os.environ.get("RANK", "0") == "0":  # one process speaks for all
            print(
                f"torch.compile does not work here, so nothing is compiled: {why}", file=sys.stderr
            )
        return False


def compile_hidden(model, device, graphs=True):
    """Compile what a sampler calls. graphs: on CUDA a call is one CUDA graph, where sizes stay."""
    options = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
    options = options if graphs and device.type == "cuda" else {}
    model.hidden = torch.compile(model.hidden, options=options)


def wait(device):
    """Wait until the device has done what it was told: a GPU works on after a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device):
    """The most memory that this process has held so far, in MiB: on its card, else altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows has none
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


PRODUCTS = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # the n of n x n matrices that keep it busy


def matmul_flops(device, autocast, seconds=0.3):
    """Operations a second of a plain matrix product here and now: utilisation is a part of it."""
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
        torch.cuda.reset_peak_memory_stats(device)  # peak_memory is that of what follows
    return 2 * n**3 / best


NOMINAL = {  # operations a second in bfloat16, dense, by the data sheets; the first name that fits
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
    """(name of the card, its operations a second by NOMINAL); None each where that is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    stated = (flops for key, flops in NOMINAL.items() if name and re.search(rf"\b({key})\b", name))
    return name, next(stated, None)


def flops_per_token(model, L, head_share=1.0):
    """Multiply-adds x 2 of the matrix products of one forward pass, per token of a sequence of L.

    head_share: the part of the positions that leave the last block (masked ones, more than two a
    sequence). Their output projection, MLP and head (and query, unless causal) are counted, those
    of the others are not, but the attention of all is. Training costs three times this (arXiv
    2204.02311, appendix B).
    """
    config, block = model.config, model.blocks[0]
    D, n_layer, attention = config["n_embd"], config["n_layer"], config["attention"]
    mlp = sum(p.numel() for p in block.mlp.parameters() if p.dim() == 2)
    tail, head = block.proj.weight.numel() + mlp, model.vocab_size * D
    if attention == "order":  # two streams, both asking; of the last block the queries alone go on
        read = n_layer * 4 * D * D + (2 * n_layer - 1) * L * D  # keys, values; attention
        return 2 * (read + (2 * n_layer - 1) * (D * D + tail) + head)
    query, halved = (0, 2) if attention == "causal" else (D * D, 1)
    everywhere = block.qkv.weight.numel() - query + 2 * L * D // halved
    products = n_layer * everywhere + (n_layer - 1 + head_share) * (query + tail)
    return 2 * (products + head_share * head)


def step_flops(model, sequences, L, share=1.0):
    """Operations of a training step on so many sequences of L: forward and backward.

    share: the part of the tokens that can count; of these half are masked where attention is full.
    """
    share *= 0.5 if model.config["attention"] == "full" else 1.0
    return 3 * flops_per_token(model, L, share) * sequences * L
