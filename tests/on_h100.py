"""The code that Inductor writes for an H100, looked at without one: what lives, how many programs.

tests/test_cuda.py runs this file in a process of its own, with pretended_cuda as a plugin. Tensors
are fake: they have shapes and no numbers. A program's kernels do nothing, but it makes and drops
its tables as it would, so that the most that is live at once can be read off.
"""

import contextlib
import functools
import math
import re
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pretended_cuda import CUDA
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as network
from lib import fused
from lib.compiled import compiled_row_loss

GIB = 2**30
H100 = {"name": "NVIDIA H100", "type": "cuda", "index": 0, "major": 9, "minor": 0}
H100 |= {"multi_processor_count": 132, "regs_per_multiprocessor": 65536, "warp_size": 32}
H100 |= {"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024}
H100 |= {"shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448}
H100 |= {"total_memory": 80 * GIB, "L2_cache_size": 50 * 2**20, "gcnArchName": ""}


class Live(TorchDispatchMode):
    """Add up the bytes of what is made inside it and not dropped: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for z in tree_leaves(out):
            if isinstance(z, torch.Tensor) and z.untyped_storage()._cdata not in self.known:
                storage = z.untyped_storage()
                self.known.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)

    def drop(self, key, n):
        self.known.discard(key)
        self.add(-n)


def as_module(graph, programs):
    """The module of a compiled graph, whose kernels do nothing; its code goes to `programs`."""
    code, *_ = graph.codegen()
    programs.append(code.value)
    scope, guards = {"__name__": "program", "__file__": "program"}, torch._C._dynamo.guards
    made = functools.partial(torch.empty_strided, device="cuda")
    fakes = {
        "_empty_strided_cuda": lambda size, stride, dtype: made(size, stride, dtype=dtype),
        "_reinterpret_tensor": lambda z, size, stride, offset: z.as_strided(size, stride, offset),
        "assert_size_stride": lambda *_: None,
        "copy_if_misaligned": lambda z: z,
    }
    kernel = SimpleNamespace(run=lambda *_, **__: None)
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(guards, name, fake))
        stack.enter_context(mock.patch.object(AsyncCompile, "triton", lambda *_, **__: kernel))
        stack.enter_context(mock.patch.object(AsyncCompile, "wait", lambda *_: None))
        exec(code.value, scope)
    return SimpleNamespace(call=scope["call"], key="", __file__="")


@pytest.fixture
def programs():
    """The code of all that is compiled for the H100 in a test."""
    pytest.importorskip("triton", reason="pip install --no-deps triton==3.7.1")
    programs, no = [], lambda *_: None
    fakes = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda._get_device_properties": lambda *_: SimpleNamespace(**H100),
        "torch.cuda._lazy_init": no,
        "torch.cuda._exchange_device": lambda _: 0,
        "torch.cuda._maybe_exchange_device": lambda _: 0,
        "torch.cuda.set_device": no,
        "torch.cuda._DeviceGuard": lambda _: contextlib.nullcontext(),
        "torch.cuda.get_rng_state": lambda *_: torch.get_rng_state(),
        "torch.cuda.set_rng_state": no,
        "torch._C._cuda_getCurrentRawStream": lambda _: 0,
        "torch.utils._triton.triton_hash_with_backend": lambda: "",
        "torch._inductor.fx_passes.fuse_attention._sfdp_init": no,  # it takes real tensors
        "torch._inductor.graph.GraphLowering.compile_to_module": lambda g: as_module(g, programs),
    }
    torch.compiler.reset()
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch(name, fake, create=True))
        keys = {"force_disable_caches": True, "joint_graph_constant_folding": False}
        stack.enter_context(torch._inductor.config.patch(keys))
        stack.enter_context(FakeTensorMode())
        yield programs
    torch.compiler.reset()


def head_peak(N, V=50257, D=768, **options):
    """The most bytes that the head and its gradients hold at once, besides what they are given."""
    h, W, bias = (torch.empty(*n, device=CUDA, requires_grad=True) for n in ((N, D), (V, D), (V,)))
    target, weight = torch.empty(N, dtype=torch.long, device=CUDA), torch.empty(N, device=CUDA)
    with Live() as live, torch.autocast("cuda", torch.bfloat16):
        fused.cross_entropy(h, (W, bias), target, weight, **options)
    return live.peak


def test_the_head_is_one_program_for_any_number_of_tokens_and_holds_under_1_5_gib(programs):
    row_loss = compiled_row_loss(CUDA)
    for N in (32768, 4112, 9984, 32800):
        assert head_peak(N, row_loss=row_loss) < 1.5 * GIB
    assert len(programs) == programs[0].count("= async_compile.triton(") == 1  # with one kernel
    tables = re.findall(r"empty_strided_cuda\(\(\w+, 50304\), \(\d+, 1\), (.*?)\)", programs[0])
    assert tables == ["torch.bfloat16"]  # the gradient; the logits are read where they are
    assert GIB < head_peak(32768) < 1.5 * GIB  # what is not compiled has a float32 table as well


def test_more_programs_and_more_memory_would_be_seen(programs):
    for N in (600, 700):
        head_peak(N, V=1000, D=64, row_loss=torch.compile(fused.cross_entropy_and_grad))
    assert len(programs) == 2
    assert head_peak(8192, chunk=8192) > 3 * GIB


SHAPES = {"RADD": {"n_head": 12, "n_embd": 768, "block_size": 1024}}
SHAPES["ours"] = SHAPES["RADD"] | {"norm": "rms", "mlp": "relu2", "bias": False, "qk_norm": True}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_block_keeps_44_bytes_a_token_and_unit_of_width_and_no_wide_float32_table(
    kind, programs, monkeypatch
):
    config = network.DEFAULTS | SHAPES[kind]
    B, L, D = 8, config["block_size"], config["n_embd"]
    flash = torch.ops.aten._scaled_dot_product_flash_attention  # which torch would choose there
    monkeypatch.setattr(fused, "attention", lambda q, k, v, *_: flash(q, k, v)[0])
    with torch.device(CUDA):
        block = network.Block(config)
        h = torch.empty(B, L, D, requires_grad=True)
        tables = torch.empty(2, L, D // config["n_head"] // 2)  # cos and sin
    with Live() as live:
        with torch.autocast("cuda", torch.bfloat16):
            out = torch.compile(block.forward)(h, *tables)
        kept = live.now - out.untyped_storage().nbytes()
        out.sum().backward()
    assert len(programs) == 2  # forward and backward
    assert D < kept / (B * L) < 44 * D  # the weights in bfloat16 are 2 of them
    made = r"empty_strided_cuda\(\(([\d, ]+)\), .*?, torch\.float32\)"
    shapes = [eval(f"({shape})") for code in programs for shape in re.findall(made, code)]
    of_tokens = [shape for shape in shapes if {B * L, L} & set(shape)]
    assert of_tokens and all(math.prod(shape) <= B * L * D for shape in of_tokens)
