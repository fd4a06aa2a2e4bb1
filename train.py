"""Training: one loop for a laptop, one GPU, or many under torchrun.

    python train.py configs/pydocs.py                                       one process
    torchrun --nproc-per-node=8 train.py configs/radd_small.py              eight

A batch and its masks are functions of (seed, step, place in the global batch) and of nothing else. So the number of
processes and the micro-batch change the speed and not the run (but for dropout, which each process draws for itself), and
a stopped run goes on as if it had never stopped. The same command resumes it.
"""

import contextlib
import copy
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config as settings
import diffusion
import evaluate
import model as network
import sample
from config import choose, require
from data import loader, tokenizer
from journal import Journal

DEFAULTS = {
    "size": "",  # a size of SMDM's table, as 170M (model.SIZES): sets the shape of the network and its kind of block
    "data": "data/pydocs",  # a prepared folder
    "out_dir": "out/pydocs",  # checkpoint and log go here
    "resume": True,  # go on from out_dir/ckpt.pt where there is one; False: start again and overwrite it
    "objective": "any_order",  # any_order | lambda_dce | t_dce | t_dse | ar (the causal baseline)
    "loss_weight": "bound",  # what training weighs a hidden token with: bound | sqrt (of the bound's weight) | constant
    "random_length": 0.0,  # chance that a step's sequences are cut to a random length (SMDM: 0.01)
    "batch_size": 32,  # sequences a step, over all processes
    "micro_batch_size": 0,  # sequences a process puts through the network at once; 0: its whole share
    "max_iters": 3000,  # optimizer steps in all
    "optimizer": "adamw",  # adamw | muon (Muon for the matrices of the blocks, AdamW for the rest)
    "learning_rate": 1e-3,  # of both: Muon's updates are scaled to the size of AdamW's
    "min_lr": 0.0,  # where the decay ends
    "warmup_iters": 100,
    "lr_decay": "cosine",  # cosine | linear | constant
    "decay_start": 0.0,  # the part of the run before the decay begins (0.5: constant, then down over the last half)
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,  # of matrices; decay_all: of every parameter
    "decay_all": False,  # as SMDM does
    "grad_clip": 1.0,  # largest norm of the gradient; 0: no clipping
    "ema": 0.0,  # decay of the averaged weights that are then judged and sampled; 0: no average
    "compile": False,  # torch.compile: some seconds at the start, then faster; needs a C++ compiler on the CPU
    "log_interval": 10,  # steps between two lines in log.jsonl
    "eval_interval": 500,  # also how often the checkpoint is saved
    "eval_sequences": 64,  # held-out blocks judged at each evaluation
    "eval_draws": 4,  # draws of the corruption for each of them
    "show_sample": True,  # print one free sample at each evaluation
}


# ---- Settings ----------------------------------------------------------------------------------------------------------


def check(config, world):
    """Raises UserError for settings that cannot be trained."""
    options = {"objective": diffusion.OBJECTIVES, "schedule": diffusion.SCHEDULES, "norm": ["layer", "rms"]}
    options |= {"loss_weight": ["bound", "sqrt", "constant"], "optimizer": ["adamw", "muon"]}
    options |= {"lr_decay": ["cosine", "linear", "constant"], "mlp": ["gelu", "swiglu", "relu2"]}
    for key, known in (options | {"zero_init": ["none", "head", "all"]}).items():
        choose(key, config[key], known)
    settings.at_least(1, config, "n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters")
    settings.at_least(1, config, "log_interval", "eval_interval", "eval_sequences", "eval_draws")
    settings.at_least(0, config, "micro_batch_size", "warmup_iters", "learning_rate", "weight_decay", "grad_clip")
    settings.at_least(0, config, "mlp_hidden", "unused_rows")
    require(max(config["beta1"], config["beta2"]) < 1, "beta1 and beta2 must be less than 1")
    settings.fraction(config, "dropout", "ema", "decay_start", "random_length", "beta1", "beta2")
    D, H = config["n_embd"], config["n_head"]
    require(D % (2 * H) == 0, f"n_embd {D} must be a multiple of 2 * n_head = {2 * H}")
    causal = config["objective"] == "ar"
    clash = "causal" in config.get("given", ()) and config["causal"] != causal
    require(not clash, f"objective '{config['objective']}' trains a network with causal={causal}; leave causal out")
    micro = config["micro_batch_size"] or config["batch_size"] // world
    fits = micro and config["batch_size"] % (world * micro) == 0
    require(fits, f"batch_size {config['batch_size']} must be a multiple of {world} processes x micro_batch_size {micro}")


def sized(config):
    """The config with the model keys of its `size`; UserError where one was given another value."""
    shape = checkpoint.size_config(config["size"]) if config["size"] else {}
    given = config.get("given", ())
    for key in (key for key in shape if key in given):
        require(config[key] == shape[key], f"size {config['size']} has {key}={shape[key]}, not {config[key]}")
    return config | shape | {"given": sorted({*given, *shape})}


def merge_resumed(config, saved, path):
    """The model keys of the checkpoint win; a different one that the user asked for is an error. -> config"""
    whole = {*network.DEFAULTS, "objective"} <= saved.keys()
    require(whole, f"{path} does not say how its model was made; start again with --resume=False")
    kept = {key: saved[key] for key in [*network.DEFAULTS, "objective"]}
    for key in config.get("given", ()):
        same = key not in kept or config[key] == kept[key]
        require(same, f"{path} was trained with {key}={kept.get(key)}, not {config[key]}; start again with --resume=False")
    return config | kept


# ---- Parts of the recipe ---------------------------------------------------------------------------------------------


def make_batch(config, blocks, step, position):
    """Rows `position` of the global batch of `step`: (x0 (b, L), mask (b, L), weight (b,), rows (N,)), on the CPU.

    The weight is that of training: a hidden token may count otherwise than in the bound, which has the same optimum and,
    in practice, less noise. Evaluation always weighs as the bound does.
    """
    x0 = torch.from_numpy(blocks.batch(step, position, config["batch_size"]))  # (b, block_size)
    coin, length = diffusion.uniforms(config["seed"], step, [2**62], 2)[0].tolist()  # one draw for the whole step
    if coin < config["random_length"]:
        x0 = x0[:, : 1 + int(length * x0.shape[1])]  # (b, L)
    if config["objective"] == "ar":
        return (x0,)
    schedule = diffusion.SCHEDULES[config["schedule"]]
    arguments = (config["objective"], config["seed"], step, position, config["batch_size"], x0.shape[1])
    mask, weight = diffusion.training_mask(*arguments, schedule)  # (b, L), (b,)
    if config["loss_weight"] != "bound":
        weight = torch.full_like(weight, 2.0) if config["loss_weight"] == "constant" else 2 * weight.sqrt()
    return x0, mask, weight.float(), diffusion.hidden_rows(mask, multiple=128)


def make_optimizers(config, model):
    """[AdamW] or [AdamW, Muon]; decay on matrices only unless decay_all."""
    named = dict(model.named_parameters())
    muon = [p for n, p in named.items() if config["optimizer"] == "muon" and n.startswith("blocks.") and p.dim() == 2]
    rest = [p for p in named.values() if not any(p is q for q in muon)]
    matrices = [p for p in rest if p.dim() == 2 or config["decay_all"]]
    vectors = [p for p in rest if not (p.dim() == 2 or config["decay_all"])]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    common = {"lr": config["learning_rate"], "weight_decay": config["weight_decay"]}
    fused = rest[0].device.type in ("cpu", "cuda")
    betas = (config["beta1"], config["beta2"])
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, fused=fused, **common)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw", **common))
    return optimizers


def learning_rate(step, config):
    """Linear warm-up, constant up to decay_start, then a decay to min_lr at max_iters."""
    peak, floor, warmup = config["learning_rate"], config["min_lr"], config["warmup_iters"]
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    start = max(warmup, config["decay_start"] * config["max_iters"])
    done = min(1.0, max(0.0, (step - start) / max(1, config["max_iters"] - start)))  # 0..1
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config["lr_decay"]]
    return floor + (peak - floor) * left


@torch.no_grad()
def update_average(average, model, decay, step):
    """Moves the averaged weights towards the model's; early on faster, so that the start is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def build(config, device, state):
    """(model, average or None, optimizers) at the beginning of a run, or as the checkpoint `state` has them."""
    torch.manual_seed(config["seed"])
    model = network.Transformer(config).to(device)
    average = copy.deepcopy(model) if config["ema"] else None
    optimizers = make_optimizers(config, model)
    if state:
        model.load_state_dict(state["model"])
        if average:
            average.load_state_dict(state["ema"] or state["model"])
        require(len(state["optimizer"]) == len(optimizers), "a resumed run must keep its optimizer; see --resume=False")
        for optimizer, saved in zip(optimizers, state["optimizer"], strict=True):
            own = optimizer.state_dict()["param_groups"]  # as the config has them: they may change on the way
            fits = [group["params"] for group in own] == [group["params"] for group in saved["param_groups"]]
            require(fits, "a resumed run must keep decay_all; see --resume=False")
            optimizer.load_state_dict(saved | {"param_groups": own})
    return model, average, optimizers


def agree(loss, signal, world):
    """(mean loss, largest signal) over the processes, as numbers: the only wait for the device in the loop."""
    if world == 1:
        return loss.item(), signal
    parts = [None] * world
    dist.all_gather_object(parts, (loss.item(), signal))
    return sum(loss for loss, _ in parts) / world, max(signal for _, signal in parts)


def train_step(config, step, blocks, loss_of, optimizers, device, autocast, world, rank):
    """One optimizer step on this process's rows of the global batch -> the loss a token, a tensor on the device.

    Each process has consecutive rows, in micro-batches of consecutive rows: both halves of an antithetic pair stay together.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
    if config["dropout"]:
        torch.manual_seed(int(diffusion.uniforms(config["seed"], step, [2**62 + 1 + rank], 1) * 2**53))
    share = config["batch_size"] // world
    micro = config["micro_batch_size"] or share
    total = 0.0
    for first in range(rank * share, (rank + 1) * share, micro):
        batch = make_batch(config, blocks, step, range(first, first + micro))
        batch = [z.to(device, non_blocking=True) for z in batch]
        last = first + micro == (rank + 1) * share
        with contextlib.nullcontext() if last or world == 1 else loss_of.no_sync():
            with autocast():
                loss, _ = loss_of(*batch)
            loss = loss / (batch[0].numel() * (share // micro))
            loss.backward()
        total += loss.detach()
    if config["grad_clip"]:
        torch.nn.utils.clip_grad_norm_(loss_of.parameters(), config["grad_clip"])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def judge(config, model, judged, bytes_per_token, autocast, world, rank):
    """The bound on the blocks `judged`, each process taking its part: (dict, line) of evaluate.report, on every process."""
    mine = list(range(rank, len(judged), world))
    estimator = "ar" if config["causal"] else "any_order"
    nats = evaluate.sequence_nats(
        model,
        [judged[i] for i in mine],
        estimator,
        config["eval_draws"],
        seed=config["seed"],
        autocast=autocast,
        places=mine,
    ).tolist()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (mine, nats))
        nats = [nat for _, nat in sorted(pair for part in parts for pair in zip(*part, strict=True))]
    return evaluate.report(nats, [len(block) for block in judged], bytes_per_token)


def one_sample(config, model, text, device, autocast):
    """The text of one free sample."""
    x = torch.full((1, config["block_size"]), model.mask_id, device=device)  # (1, L)
    fill = sample.sample_ar if config["causal"] else sample.sample
    return text.decode(fill(model, x, seed=config["seed"], autocast=autocast)[0][0].tolist())


# ---- The recipe -------------------------------------------------------------------------------------------------------


def main(config):
    """Trains as config says; returns the last evaluation, a dict of evaluate.report. Raises UserError."""
    # Settings: those of the command, unless a checkpoint in out_dir says that a run has begun.
    config, world, rank = settings.processes(config)
    path = Path(config["out_dir"]) / "ckpt.pt"
    state = checkpoint.read(path) if config["resume"] and path.is_file() else None
    config = sized(config)
    config = merge_resumed(config, state["config"], path) if state else config
    start = state["step"] if state else 0
    check(config, world)
    device, autocast = settings.machine(config)

    # Data: shuffled blocks to learn from, and held-out ones to be judged on.
    train, val = loader.Tokens(config["data"], "train"), loader.Tokens(config["data"], "val")
    text = tokenizer.from_meta(train.meta["tokenizer"])
    fits = not state or state["tokenizer"] == text.meta()
    require(fits, f"{path} was trained with another tokenizer than {config['data']} has")
    config |= {"vocab_size": train.vocab_size, "causal": config["objective"] == "ar"}
    require(config["start_id"] <= train.vocab_size, f"start_id must be at most {train.vocab_size}, the mask")
    blocks = loader.Blocks(train, config["block_size"], config["seed"])
    judged = evaluate.spread(list(loader.in_order(val, config["block_size"])), config["eval_sequences"])
    bytes_per_token = val.meta["splits"]["val"]["bytes"] / len(val)

    # Model, the average of its weights, optimizers, and the loss: compiled, and spread over the processes.
    model, average, optimizers = build(config, device, state)
    loss_of = diffusion.Loss(model, config["objective"])
    if config["compile"] and settings.can_compile(device):
        loss_of = torch.compile(loss_of)
    if world > 1:
        loss_of = DistributedDataParallel(loss_of, gradient_as_bucket_view=True)

    # The loop: a step, now and then a line in the log, an evaluation and a checkpoint.
    share = 1.0 if config["causal"] else 0.5  # of the positions are predicted
    flops = 3 * model.flops_per_token(config["block_size"], share) * config["batch_size"] * config["block_size"]
    peak = network.matmul_flops(device, autocast) * world
    journal = Journal(config, path, start, flops, peak, rank == 0)
    journal.say(f"{model.n_parameters():,} parameters; {len(train):,} training tokens in {blocks.n:,} blocks")
    kind = "averaged" if average else "raw"
    journal.say(f"evaluations: {len(judged)} blocks of {config['data']} val, {config['eval_draws']} draws, {kind} weights")
    if start:
        journal.say(f"going on from {path} at step {start} of {config['max_iters']}")
    result, stopped = None, False
    with settings.Stop() as stop, journal.bar:
        for step in range(start + 1, config["max_iters"] + 1):
            loss = train_step(config, step - 1, blocks, loss_of, optimizers, device, autocast, world, rank)
            if average:
                update_average(average, model, config["ema"], step)
            journal.bar.update()

            last = step == config["max_iters"]
            if step % config["log_interval"] == 0 or last or (stop.signal and world == 1):
                loss, stopped = agree(loss, stop.signal, world)
                require(math.isfinite(loss), f"the loss is {loss} at step {step}; the last good checkpoint is {path}")
                journal.speed(step, loss, learning_rate(step - 1, config))
            evaluated = step % config["eval_interval"] == 0 or last
            if evaluated:
                best = (average or model).eval()
                result, line = judge(config, best, judged, bytes_per_token, autocast, world, rank)
                require(math.isfinite(result["nats_per_token"]), f"the loss is nan at step {step}; see {path}")
                journal.say(f"step {step}: {line}")
                journal.write({"step": step} | result)
                if config["show_sample"] and rank == 0:
                    journal.say(f"---- a sample\n{one_sample(config, best, text, device, autocast)}\n----")
            if rank == 0 and (evaluated or stopped):
                state = {"config": config, "tokenizer": text.meta(), "step": step, "model": model.state_dict()}
                state |= {"ema": average and average.state_dict(), "optimizer": [o.state_dict() for o in optimizers]}
                checkpoint.save(path, state)
            if stopped:
                journal.say(f"stopped and saved {path} at step {step}; the same command goes on from there")
                raise KeyboardInterrupt
            if evaluated:
                model.train()
                journal.restart(step)
    return result


if __name__ == "__main__":
    settings.run(main, settings, diffusion, network, sys.modules[__name__])
