"""A CUDA that is not there: tensors that say cuda:0 and hold one of the CPU, which computes.

    python -m pytest -p pretended_cuda tests/on_cuda.py      (with PYTHONPATH=tests)

So values and gradients are real, autocast goes by the rules of CUDA, tensors of two devices do not
mix, and `waits` counts by source line what would make the host wait. What it does not know: the
kernels and their limits, streams, memory, speed, torch.compile and NCCL. A small library, compiled
once for each torch, makes torch believe in the device; it has to be loaded before torch is.
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

LIBRARY = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

constexpr auto kind = c10::DeviceType::CUDA;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kind> {
  using Device = c10::Device;
  using Stream = c10::Stream;
  Device getDevice() const override { return Device(kind, 0); }
  Device exchangeDevice(Device) const override { return Device(kind, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

namespace {
Guard guard;
c10::impl::DeviceGuardImplRegistrar registrar(kind, &guard);
}
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
"""


def load_library():
    assert "torch" not in sys.modules, "torch asks for its devices once, when it is imported"
    torch_home = Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256(LIBRARY.encode() + (torch_home / "version.py").read_bytes()).hexdigest()
    library = Path(tempfile.gettempdir()) / f"pretended_cuda_{os.getuid()}_{key[:12]}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        options = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_home}/include"]
        linked = [f"-L{torch_home}/lib", "-lc10", "-ltorch_cpu"]
        command = ["g++", "-x", "c++", "-", "-o", part, *options, *linked]
        subprocess.run(command, input=LIBRARY.encode(), check=True)
        part.rename(library)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(torch_home / "lib" / name, ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


load_library()
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  it looks at torch's functions, before they are replaced
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda:0")
waits = collections.Counter()  # {what: line of the repository: how often}

# What returns a number to the host, or a tensor whose size depends on numbers.
NUMBERS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
NUMBERS |= {"unique_dim", "unique_consecutive", "repeat_interleave"}
# What may mix devices: copies, and an index of the CPU.
MIXES = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_", "set_"}


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says that it is on cuda:0."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        options = {"dtype": inner.dtype, "device": CUDA}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, **options)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"cuda:0 {self.inner!r}"

    def tolist(self):  # torch has none for a wrapper
        return self.cpu().tolist()

    def __getitem__(self, key):  # torch copies a list of numbers past the dispatcher
        parts = key if isinstance(key, tuple) else (key,)
        parts = tuple(torch.tensor(z, device=CUDA) if isinstance(z, list) else z for z in parts)
        return super().__getitem__(parts if isinstance(key, tuple) else parts[0])

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def count(what):
    """One more wait, at the innermost line of the repository's own code."""
    frame = sys._getframe(1)
    while frame and (ROOT not in Path(frame.f_code.co_filename).parents or inside(frame)):
        frame = frame.f_back
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"
    waits[f"{what}: {where}"] += 1


def inside(frame):
    return frame.f_code.co_filename == __file__ or "site-packages" in frame.f_code.co_filename


def run(op, args, kwargs):
    """What an operation gives, computed by the CPU; RuntimeError where two devices meet."""
    name, tensors = op._schema.name.split("::")[1], tensors_in(args, kwargs)
    here = [isinstance(z, OnCuda) for z in tensors]
    device = kwargs.get("device") and torch.device(kwargs["device"]).type
    check(op, name, tensors, here)
    count_waits(name, args, kwargs, here, device)
    plain = {key: changed(z, OnCuda, inner_of) for key, z in kwargs.items()}
    if device == "cuda":
        plain |= {"device": "cpu"} | ({"pin_memory": False} if "pin_memory" in kwargs else {})
    plain_args = changed(args, OnCuda, inner_of)
    out = computed(op, plain_args, plain)
    if name == "_to_copy" and out is plain_args[0]:
        out = out.clone()
    if not op._schema.returns:
        return None
    if name == "copy_" or (op._schema.is_mutable and name.endswith("_")):
        return args[0]  # in place
    if "out" in kwargs:
        return kwargs["out"]
    stays = device == "cuda" or (any(here) and not device)
    return changed(out, torch.Tensor, lifted) if stays else out


def tensors_in(args, kwargs):
    """The tensors among the arguments, also in lists of them."""
    every = [*args, *kwargs.values()]
    every += [z for part in every if isinstance(part, (list, tuple)) for z in part]
    return [z for z in every if isinstance(z, torch.Tensor)]


def changed(tree, kind, change):
    """Nested lists and tuples with all that is of a kind changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(changed(z, kind, change) for z in tree)
    return tree


def inner_of(z):
    return z.inner


def lifted(z):
    return z if isinstance(z, OnCuda) else OnCuda(z)


def computed(op, args, kwargs):
    if op is torch.ops.aten.addmm.dtype_out:  # which CUDA alone has: products in another dtype
        total, a, b, dtype = args
        return kwargs["out"].copy_(total + a.to(dtype) @ b.to(dtype))
    return op(*args, **kwargs)


def check(op, name, tensors, here):
    """RuntimeError where a tensor of the CPU meets one of CUDA, unless it is a single number."""
    strict = name.startswith(("_foreach", "_fused"))
    strays = [z for z, on in zip(tensors, here, strict=True) if not on and (z.dim() or strict)]
    if any(here) and strays and name not in MIXES:
        both = "Expected all tensors to be on the same device, but found at least two devices"
        raise RuntimeError(f"{op}: {both}, cuda:0 and cpu!")


def count_waits(name, args, kwargs, here, device):
    if name in NUMBERS and any(here):
        count(name)
    if name in ("_to_copy", "copy_"):
        to, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
        arrives = isinstance(to, OnCuda) or device == "cuda"
        leaves = isinstance(source, OnCuda) and (to is not None or device) and not arrives
        ahead = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        free = isinstance(source, OnCuda) or (ahead and getattr(source, "pinned", False))
        if leaves or (arrives and not free):
            count("copy")
    if name.lstrip("_").startswith("index") and any(here) and isinstance(args[1], (list, tuple)):
        for index in (z for z in args[1] if z is not None):
            if not isinstance(index, OnCuda):
                count("index of the CPU")
            elif index.dtype in (torch.bool, torch.uint8):
                count("index by a mask")


class Pretence(TorchDispatchMode):
    """See what is made on CUDA or copied there."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        wanted = device is not None and torch.device(device).type == "cuda"
        if wanted or any(isinstance(z, OnCuda) for z in tensors_in(args, kwargs)):
            return run(op, args, kwargs)
        return op(*args, **kwargs)


def pinned(tensor):
    assert not isinstance(tensor, OnCuda), "cannot pin what is not on the CPU"
    copy = tensor.clone()
    copy.pinned = True
    return copy


def tensor(data, device=None, make=torch.tensor, **kwargs):
    """torch.tensor, which copies numbers past the dispatcher."""
    return make(data, **kwargs) if device is None else make(data, **kwargs).to(device)


def save(tree, *args, write=torch.save, **kwargs):
    write(torch.utils._pytree.tree_map_only(OnCuda, inner_of, tree), *args, **kwargs)


@contextlib.contextmanager
def pretended():
    """Inside the block there is the device, which it gives."""
    nothing = lambda *_, **__: None  # noqa: E731
    fakes = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.max_memory_allocated": lambda *_: 0,
        "torch.cuda.synchronize": lambda *_: count("synchronize"),
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.Tensor.pin_memory": pinned,
        "torch.tensor": tensor,
        "torch.save": save,
    }
    for name in ("_lazy_init", "set_device", "reset_peak_memory_stats"):
        fakes[f"torch.cuda.{name}"] = nothing
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch(name, fake))
        # module.to(CUDA) has to replace the tensors, not their data.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(Pretence())
        waits.clear()
        yield CUDA
