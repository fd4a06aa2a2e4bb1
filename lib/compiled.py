"""torch.compile: whether it works here, what it compiles, and whether that computes the same.

A C++ compiler can make a wrong program, most of all for a processor that is newer than itself. So
on a CPU the first results of each program are compared with those of the code it was made from,
which takes its place if they differ.
"""

import contextlib
import functools
import importlib.util
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

from config import first_line
from lib import fused


@functools.cache
def can_compile(device):
    """Whether torch.compile works here, tried once; if it does not, a line says why.

    A compiler, Python's headers, triton or a cache folder may be missing. Without torch.compile
    everything works, but more slowly.
    """
    try:
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"it is too new on {device.type}")
        if device.type == "cuda" and not importlib.util.find_spec("triton"):
            raise ImportError("triton is missing")
        sweep_cache()
        if device.type == "cpu" and sys.platform == "linux" and platform.machine() == "x86_64":
            use_short_vectors()
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:  # any type may be raised
        cause = re.search(r".*\berror: .*", str(error))  # the C++ compiler's message
        say_eager(cause[0].strip()[:200] if cause else first_line(error))
        return False


def say_eager(reason):
    """Say that nothing is compiled, and why; one process reports for all."""
    if os.environ.get("RANK", "0") == "0":
        message = "torch.compile does not work here, so nothing is compiled"
        print(f"{message}: {reason}", file=sys.stderr)


@functools.cache
def say_wrong():
    """Say once that programs are wrong here."""
    say_eager("its programs compute something else; a newer C++ compiler may help")


def use_short_vectors():
    """Let the C++ compiler put plain loops into vectors of 256 bits; torch's own keep their width.

    g++ 12.2 makes 512 bits of them on processors that it does not know, and then transposes
    bfloat16 wrongly: on an Intel Xeon of 2023, the gradient of attention became nan.
    """
    from torch._inductor.config import cpp

    if getattr(cpp, "march", "") is None:  # newer versions of torch have this setting
        cpp.march = "native -mprefer-vector-width=256"


def sweep_cache():
    """Delete kernels that a killed compiler left empty: torch would take them for complete ones."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for kernel in Path(cache_dir()).glob("*/*.so"):
        with contextlib.suppress(OSError):  # another process may be sweeping too
            about = kernel.stat()
            if about.st_size == 0 and time.time() - about.st_mtime > 5:  # no longer being written
                kernel.unlink()


# ---- What is compiled ----------------------------------------------------------------------------


def compile_block(block, forward, check):
    """Compile a block's `forward` for training, where shapes do not vary; elsewhere it is its own.

    check: compare the first results and their gradients, which dropout would make differ.
    """
    eager, fast = block.forward, torch.compile(forward)
    if check:
        fast = trusted(fast, forward, functools.partial(same_gradients, block))

    def in_training(*arguments, **keys):
        return (fast if block.training else eager)(*arguments, **keys)

    return in_training


def compile_hidden(model, device, graphs=True):
    """Compile model.hidden for sampling, if possible. graphs: recurring sizes are CUDA graphs."""
    if not can_compile(device):
        return
    options = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
    options = options if graphs and device.type == "cuda" else {}
    eager, fast = model.hidden, torch.compile(model.hidden, options=options)
    model.hidden = trusted(fast, eager) if device.type == "cpu" else fast


def compiled_row_loss(device):
    """fused.cross_entropy_and_grad compiled as one program for any number of rows."""
    eager = fused.cross_entropy_and_grad
    program = torch.compile(eager)

    def row_loss(logits, target, weight, normalised):
        for tensor in filter(torch.is_tensor, (logits, target, weight)):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return program(logits, target, weight, normalised)

    return trusted(row_loss, eager) if device.type == "cpu" else row_loss


# ---- Whether it computes the same ----------------------------------------------------------------


def same_results(fast, plain, *arguments, **keys):
    """Whether two functions return the same tensor or tensors, up to rounding."""
    return equal(fast(*arguments, **keys), plain(*arguments, **keys))


def trusted(fast, plain, same=same_results):
    """`fast` if its first results are those of `plain`, else `plain`, which a line says.

    same: (fast, plain, *arguments, **keys) -> whether they are.
    """
    chosen = []

    def function(*arguments, **keys):
        if not chosen:
            is_right = same(fast, plain, *arguments, **keys)
            chosen.append(fast if is_right else plain)
            if not is_right:
                say_wrong()
        return chosen[0](*arguments, **keys)

    return function


def same_gradients(block, fast, plain, h, *arguments, **keys):
    """Whether two forwards of a block give the same result and gradients, up to rounding.

    The block has random weights meanwhile: zeros, as it may start with, would hide differences.
    """
    parameters, generator = list(block.parameters()), torch.Generator().manual_seed(0)
    saved = [parameter.detach().clone() for parameter in parameters]

    def results(forward):
        z = h.detach().clone().requires_grad_()  # (B, L, D)
        y = forward(z, *arguments, **keys)  # (B, L, D) or (N, D)
        with torch.autocast(h.device.type, enabled=False):
            return [y, *torch.autograd.grad(y.square().sum(), [z, *parameters])]

    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=len(parameter) ** -0.5, generator=generator)
        return equal(results(fast), results(plain))
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
        torch.clear_autocast_cache()  # of the random weights in bfloat16


def equal(results, expected):
    """Whether tensors differ by at most a twentieth of their norm: rounding, but not a mistake."""
    if torch.is_tensor(expected):
        results, expected = [results], [expected]
    pairs = [(a, b) for a, b in zip(results, expected, strict=True) if b is not None]
    return all((a - b).norm() <= 0.05 * b.norm() for a, b in pairs)  # nan is not
