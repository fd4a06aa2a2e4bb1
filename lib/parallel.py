"""Several processes in one run: how they are set up and share the network and its tensors.

    torchrun --nproc-per-node=8 train.py ...                    ddp: each has the whole network
    torchrun --nproc-per-node=8 train.py ... --parallel=fsdp    fsdp: each has 1/8 of every tensor

- ddp averages the gradients.
- fsdp (arXiv 2304.11277) shards weights, their EMA, gradients and optimizer state across the
  processes. A block's weights are gathered when it runs and dropped afterwards. A sharded tensor is
  a DTensor.
- A checkpoint holds whole tensors, whatever --parallel says and the number of processes.
"""

import atexit
import contextlib
import datetime
import functools
import gc
import inspect
import os
import re
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from config import UserError, require
from lib import fused
from lib.compiled import can_compile, compile_block, compiled_row_loss
from lib.device import keep_memory, machine, peak_memory

# The advice if a run cannot be resumed.
ANEW = "begin anew in another --out_dir=, or here with --resume=False, which keeps the old run"
# How long to wait for a process that hangs; a dead one is noticed at once. Processes also wait
# while one of them compiles or process 0 writes a large checkpoint.
PATIENCE = datetime.timedelta(minutes=30)


# ---- 1. The processes ----------------------------------------------------------------------------


class Team(NamedTuple):
    """The processes of a run, and the device of this one."""

    world: int = 1  # the number of processes
    rank: int = 0  # this one's number
    device: torch.device = torch.device("cpu")
    autocast: object = contextlib.nullcontext  # `with autocast():` sets the dtype of products


def join(config):
    """Join the processes that torchrun has started: the Team. On CUDA each gets its own GPU.

    Raises UserError if they would all share one GPU.
    """
    world, rank, local_rank = launched(os.environ)
    name, several = config["device"], world > 1 and torch.cuda.is_available()
    advice = "under torchrun each process takes a card of its own: use --device=cuda"
    require(not (several and name.startswith("cuda:")), f"device is {name} for all; {advice}")
    if several and name in ("auto", "cuda"):
        config = config | {"device": f"cuda:{local_rank}"}
    device, autocast = machine(config)
    if world > 1 and not dist.is_initialized():
        group = {"store": own_store(), "world_size": world, "rank": rank, "timeout": PATIENCE}
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend, group["device_id"] = "nccl", device  # without it NCCL guesses the GPU
        dist.init_process_group(backend, **group)
        atexit.register(leave)
    return Team(world, rank, device, autocast)


def leave():
    """End the group before Python exits: a gloo thread may need Python's lock for its last tensor.

    The group ends with the last reference to it, and DDP is in reference cycles that hold one.
    """
    gc.collect()
    dist.destroy_process_group()


def launched(env):
    """(number of processes, rank, rank on this machine) from torchrun's variables in `env`.

    If some of the variables are missing, torchrun did not set the others, and a line says that they
    are ignored. Raises UserError if the values are not such numbers.
    """
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    are_set = [name for name in names if env.get(name)]
    if are_set != [*names]:
        if are_set and env.get("WORLD_SIZE") != "1":
            missing = ", ".join(name for name in names if name not in are_set)
            message = f"{', '.join(are_set)} set, but not {missing}: not by torchrun, so ignored"
            print(f"{message}; this is one process", file=sys.stderr)
        return 1, 0, 0
    values = [env["WORLD_SIZE"], env["RANK"], env.get("LOCAL_RANK") or env["RANK"]]
    are_numbers = all(re.fullmatch("[0-9]{1,9}", value) for value in values)
    world, rank, local_rank = map(int, values) if are_numbers else (0, 0, 0)
    message = "WORLD_SIZE, RANK and LOCAL_RANK must be whole numbers, the ranks less than the size"
    require(max(rank, local_rank) < world, f"{message}, not {', '.join(values)}")
    return world, rank, local_rank


def own_store():
    """The store in which the processes of this start find each other; None: torch chooses one.

    With torchrun --max-restarts, all starts share a store, in which a process may find the address
    of a killed one. On a single machine, each start therefore gets its own part of it. (On several
    machines, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each start its own store.)
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    shared = dist.TCPStore(host, port, is_master=False, timeout=PATIENCE)
    return dist.PrefixStore(f"start {env['TORCHELASTIC_RESTART_COUNT']}", shared)


def gather(value, team):
    """The values of all processes, in the order of their ranks, on every process."""
    parts = [value] * team.world
    if team.world > 1:
        dist.all_gather_object(parts, value)
    return parts


def reduce_over_processes(losses, signal, team):
    """(mean of each loss, largest signal, most memory in MiB) over all processes.

    Waits for the device.
    """
    parts = gather((torch.stack(losses).tolist(), signal, peak_memory(team.device)), team)
    losses, signals, memories = zip(*parts, strict=True)
    means = [sum(each) / team.world for each in zip(*losses, strict=True)]
    return means, max(signals), max(memories)


@contextlib.contextmanager
def together(path, team):
    """Turn the loss of another process during the block into a UserError.

    With NCCL, its watchdog may end this process first, with its own report.
    """
    try:
        yield
    except RuntimeError as error:
        if team.world == 1 or not re.search("gloo|nccl|connection|timed out", str(error), re.I):
            raise
        lost = "lost the other processes: one of them has ended, or hangs"
        advice = f"the same command resumes {path}, or starts again if it is not there"
        raise UserError(f"{lost}; {advice}") from None


def my_share(lengths, team):
    """The items that this process works on: as many of each length as every other process.

    So all make the same network calls. If the division leaves a remainder, some are done twice.
    """
    items = []
    for length in sorted(set(lengths)):
        group = [i for i in range(len(lengths)) if lengths[i] == length]
        turns = range(team.rank, -(-len(group) // team.world) * team.world, team.world)
        items += [group[i % len(group)] for i in turns]
    return items


# ---- 2. Sharing the network ----------------------------------------------------------------------


def shard(model, team):
    """Apply fsdp to a network on the meta device, so that no process ever holds all of it.

    Blocks are gathered in the dtype of the products, which halves the bytes and saves autocast a
    copy. Gradients are summed in float32, and embedding and head are gathered in float32, the dtype
    of the hidden states.
    """
    from torch.distributed import fsdp  # takes half a second, so only if needed

    keep_memory(False)  # on a CPU, dropped weights must really be freed
    mesh = init_device_mesh(team.device.type, (team.world,))
    with team.autocast():
        dtype = fused.product_dtype(torch.empty(0, device=team.device))
    # LayerNorm on a CPU cannot mix dtypes.
    mixes = team.device.type == "cuda" or model.config["norm"] == "rms"
    low = {"param_dtype": dtype, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    policy = fsdp.MixedPrecisionPolicy(**low if mixes else {})
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh)  # the rest: embedding, last norm and head
    for method in ("hidden", "hidden_in_order"):
        if hasattr(model, method):
            fsdp.register_fsdp_forward_method(model, method)


def materialise(model, weights, config, team):
    """Give a network on the meta device memory, sharded if config says so, and its weights.

    weights: a state dict; None: initial ones, the same for any number of processes.
    """
    if team.world > 1 and config["parallel"] == "fsdp":
        shard(model, team)
    model.to_empty(device=team.device)
    model.set_rotary_tables(team.device)
    torch.manual_seed(config["seed"])
    fill(model, weights.items() if weights else model.initial_weights(), "the checkpoint")


def prepare_for_training(loss_fn, config, team):
    """Make a diffusion.Loss ready for training: recomputation, compilation, averaged gradients.

    Blocks are compiled one at a time and share their programs, since they are alike. A step is as
    fast as with one program for the whole network, compilation takes half as long, and sharded
    weights are gathered between programs, not inside them.
    """
    model, compiled = loss_fn.model, config["compile"] and can_compile(team.device)
    if compiled and team.rank == 0:
        print("compiling the network: the first steps wait for it, on a CPU up to two minutes")
    sharded = is_sharded(model.embed.weight)
    check = team.device.type == "cpu" and not (sharded or model.blocks[0].drop.p)
    for block in model.blocks:
        forward = block.forward
        if config["recompute"]:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        block.forward = compile_block(block, forward, check) if compiled else forward
    if compiled and model.vocab_size >= 1024:  # a small head is not worth the wait
        model.row_loss = compiled_row_loss(team.device)
    if sharded or team.world == 1:
        return loss_fn
    known = inspect.signature(DistributedDataParallel).parameters  # the old name gives a warning
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options = {"gradient_as_bucket_view": True, sync: False}  # rotary tables do not change
    return DistributedDataParallel(loss_fn, **options)


def accumulate(loss_fn, last):
    """The context of a micro-step: ddp averages the gradients only at the last one.

    fsdp does so every time, because postponed gradients would be as large as the network.
    """
    waits = isinstance(loss_fn, DistributedDataParallel) and not last
    return loss_fn.no_sync() if waits else contextlib.nullcontext()


def reshard(model):
    """Drop the weights that were gathered by a call outside training (fsdp)."""
    if hasattr(model, "reshard"):
        model.reshard()


# ---- 3. Whole and sharded tensors ----------------------------------------------------------------


def is_sharded(tensor):
    """Whether it is a DTensor, recognised by a method, since only fsdp imports that class."""
    return hasattr(tensor, "to_local")


def local(tensor):
    """The part of a tensor that this process holds; all of it if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor):
    """The whole tensor on every process; all processes must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part(tensor, like):
    """Shard a tensor that every process holds whole in the same way as `like`; nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(model, weights, where):
    """Load weights, pairs (name, whole tensor), into a network; UserError if one does not fit."""
    empty = dict(model.named_parameters())
    for name, value in weights:
        message = f"the tensor {name} {tuple(value.shape)} does not fit the network of its config"
        shape = empty[name].shape if name in empty else None
        require(value.shape == shape, f"{where}: {message}")
        local(empty[name]).copy_(local(part(value, empty.pop(name))))
    require(not empty, f"{where}: the tensor {next(iter(empty), '')} is missing")


def optimizer_parts(state, optimizer):
    """An optimizer's saved "state", sharded as its parameters are; UserError if it does not fit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {}
    for i, entry in state.items():
        shapes = ((), parameters[i].shape) if 0 <= i < len(parameters) else ()
        message = f"the optimizer's state {i} does not fit its parameters"
        has_shapes = all(value.shape in shapes for value in entry.values())
        require(shapes and has_shapes, f"{message}; {ANEW}")
        parts[i] = {k: part(v, parameters[i]) if v.dim() else v for k, v in entry.items()}
    return parts


def whole(tree, keep):
    """Nested dicts and lists with sharded tensors made whole, on the host if keep, else None.

    All processes must call this together. Process 0 can then write one ordinary file, which any
    number of processes, sample.py and evaluate.py can read. This takes host memory for everything,
    16 bytes per parameter with AdamW and an EMA, and device memory for one tensor. The alternative,
    torch.distributed.checkpoint, writes in parallel, which helps if one writer is too slow, but
    nothing else here can read its folder, whose index is a pickle and may run code.
    """
    if isinstance(tree, dict):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value, keep) for value in tree]
    if not is_sharded(tree):
        return tree
    full = gathered(tree)
    return full.cpu() if keep else None
