"""Training: one loop for a laptop, one GPU, or many under torchrun.

    python train.py configs/pydocs.py                                       one process
    torchrun --nproc-per-node=8 train.py configs/radd_small.py              eight

A batch and its masks are functions of (seed, step, place in the global batch) and of nothing else. So the number of
processes, how they share the network (parallel.py) and the micro-batch change the speed and not the run (but for dropout,
which each process draws for itself, and the rounding of sums, which Muon's products in bfloat16 make larger), and a stopped
run goes on as if it had never stopped. The same command resumes it.
"""

import contextlib
import copy
import math
import sys
from pathlib import Path

import torch

import checkpoint
import config as settings
import diffusion
import formats
import likelihood
import model as network
import parallel
import sample
from batch import fit_data, make_batch, read_data
from config import choose, require
from data import loader, tokenizer
from journal import Journal, peak_memory
from muon import Muon

DEFAULTS = {
    "size": "",  # a size of SMDM's table, as 170M (model.SIZES): sets the shape of the network and its kind of block
    "data": "data/pydocs",  # a prepared folder
    "out_dir": "out/pydocs",  # checkpoint and log go here
    "init_from": "",  # begin with the weights and model keys of this checkpoint (all that checkpoint.load takes)
    "resume": True,  # go on from out_dir/ckpt.pt where there is one; False: start again and overwrite it
    "objective": "any_order",  # any_order | lambda_dce | t_dce | t_dse | ar (the causal baseline)
    "loss_weight": "bound",  # what training weighs a hidden token with: bound | sqrt (of the bound's weight) | constant
    "prompt_drop": 0.0,  # chance that the prompt of a row is hidden, for standard guidance (SMDM: 0.1)
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
    "skip_nonfinite": False,  # leave out a step whose gradient is not finite, in place of ending the run
    "compile": False,  # torch.compile: some seconds at the start, then faster; needs a C++ compiler on the CPU
    "recompute": False,  # compute each block again for its gradient: slower, and less memory
    "parallel": "ddp",  # under torchrun: ddp (each process has the network) | fsdp (a part of it: for large ones)
    "log_interval": 10,  # steps between two lines in log.jsonl, and until several processes see a stop (torchrun waits 30 s)
    "save_interval": 0,  # steps between two checkpoints; 0: one at each evaluation
    "keep": 1,  # how many checkpoints are kept: ckpt.pt, and where more than one, the last ones as ckpt_STEP.pt
    "eval_interval": 500,  # steps between two evaluations
    "eval_sequences": 64,  # held-out blocks judged at each evaluation
    "eval_draws": 4,  # draws of the corruption for each of them
    "show_sample": True,  # print one free sample at each evaluation
    "wandb": "",  # log to this project of wandb too
    "tensorboard": False,  # log to out_dir/tensorboard too
    "profile": 0,  # follow this many steps with torch's profiler, and write out_dir/trace.json
}


# ---- Settings ----------------------------------------------------------------------------------------------------------


def check(config, world):
    """Raises UserError for settings that cannot be trained."""
    options = {"objective": diffusion.OBJECTIVES, "schedule": diffusion.SCHEDULES, "norm": ["layer", "rms"]}
    options |= {"loss_weight": ["bound", "sqrt", "constant"], "optimizer": ["adamw", "muon"]}
    options |= {"lr_decay": ["cosine", "linear", "constant"], "mlp": ["gelu", "swiglu", "relu2"]}
    for key, known in (options | {"zero_init": ["none", "head", "all"], "parallel": ["ddp", "fsdp"]}).items():
        choose(key, config[key], known)
    settings.at_least(1, config, "n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters")
    settings.at_least(1, config, "log_interval", "eval_interval", "eval_sequences", "eval_draws", "keep")
    settings.at_least(0, config, "micro_batch_size", "warmup_iters", "learning_rate", "weight_decay", "grad_clip")
    settings.at_least(0, config, "mlp_hidden", "unused_rows", "min_lr", "save_interval", "profile")
    for key in ("n_layer", "n_embd", "block_size", "mlp_hidden"):
        require(config[key] <= 2**20, f"{key} must be at most {2**20}, not {config[key]}")
    require(max(config["beta1"], config["beta2"]) < 1, "beta1 and beta2 must be less than 1")
    settings.fraction(config, "dropout", "ema", "decay_start", "random_length", "prompt_drop", "beta1", "beta2")
    D, H = config["n_embd"], config["n_head"]
    require(D % (2 * H) == 0, f"n_embd {D} must be a multiple of 2 * n_head = {2 * H}")
    causal = config["objective"] == "ar"
    clash = "causal" in config.get("given", ()) and config["causal"] != causal
    require(not clash, f"objective '{config['objective']}' trains a network with causal={causal}; leave causal out")
    require(not (causal and config["prompt_drop"]), "prompt_drop needs a masked diffusion objective, not ar")
    micro = config["micro_batch_size"] or config["batch_size"] // world
    fits = micro and config["batch_size"] % (world * micro) == 0
    require(fits, f"batch_size {config['batch_size']} must be a multiple of {world} processes x micro_batch_size {micro}")


def sized(config):
    """The config with the model keys of its `size`; UserError where one was given another value."""
    shape = formats.size_config(config["size"]) if config["size"] else {}
    given = config.get("given", ())
    for key in (key for key in shape if key in given):
        require(config[key] == shape[key], f"size {config['size']} has {key}={shape[key]}, not {config[key]}")
    return config | shape | {"given": sorted({*given, *shape})}


def beginning(config, path):
    """What a run begins with, as a state of checkpoint.save, and its name: the checkpoint `path`, init_from, or nothing."""
    if config["resume"] and path.is_file():
        return checkpoint.read(path), path
    kept = checkpoint.kept_beside(path) if config["resume"] and path.parent.is_dir() else {}
    advice = f"copy {kept[max(kept)]} to {path} to go on, or start again with --resume=False" if kept else ""
    require(not kept, f"no {path}, but checkpoints of the run are beside it; {advice}")
    if not config["init_from"]:
        return None, ""
    model, _, saved = checkpoint.load(config["init_from"])
    return {"config": saved, "tokenizer": saved["tokenizer"], "step": 0, "model": model.state_dict()}, config["init_from"]


def merge_saved(config, state, source):
    """The model keys of the state win; a different one that the user asked for is an error. -> config"""
    saved, resumed = state["config"], "optimizer" in state
    keys = [*network.DEFAULTS, *["objective"] * resumed]
    advice = "start again with --resume=False" if resumed else "init_from takes a model as it is"
    require(set(keys) <= saved.keys(), f"{source} does not say how its model was made; {advice}")
    kept = {key: saved[key] for key in keys}
    for key in config.get("given", ()):
        same = key not in kept or config[key] == kept[key]
        require(same, f"{source} was trained with {key}={kept.get(key)}, not {config[key]}; {advice}")
    fits = kept["causal"] == (config["objective"] == "ar") or resumed
    require(fits, f"{source} is {'a' if kept['causal'] else 'no'} causal network, so it cannot learn {config['objective']}")
    return config | kept


# ---- Parts of the recipe ---------------------------------------------------------------------------------------------


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
        optimizers.append(Muon(muon, **common))
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
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    averages, weights = zip(*([parallel.local(p) for p in pair] for pair in pairs), strict=True)
    torch._foreach_lerp_(averages, weights, 1 - decay)


def build(config, device, state, world=1):
    """(model, average or None, optimizers) at the beginning of a run, or as the checkpoint `state` has them.

    The same numbers for any number of processes and any way to share the network.
    """
    with torch.device("meta"):  # no memory yet
        model = network.Transformer(config)
    average = copy.deepcopy(model) if config["ema"] else None
    for each in filter(None, (model, average)):
        if world > 1 and config["parallel"] == "fsdp":
            parallel.shard(each, device)
        each.to_empty(device=device)
        each.cos, each.sin = (table.to(device) for table in network.rotary_tables(config))  # (block_size, d/2) each
        saved = state and ((each is average and state.get("ema")) or state["model"])
        torch.manual_seed(config["seed"])
        parallel.fill(each, saved.items() if saved else each.initial_weights(), "the checkpoint")
    optimizers = make_optimizers(config, model)
    if state and "optimizer" in state:
        require(len(state["optimizer"]) == len(optimizers), "a resumed run must keep its optimizer; see --resume=False")
        for optimizer, saved in zip(optimizers, state["optimizer"], strict=True):
            own = optimizer.state_dict()["param_groups"]  # as the config has them: they may change on the way
            fits = [group["params"] for group in own] == [group["params"] for group in saved["param_groups"]]
            require(fits, "a resumed run must keep decay_all; see --resume=False")
            optimizer.load_state_dict({"state": parallel.optimizer_parts(saved["state"], optimizer), "param_groups": own})
    return model, average, optimizers


def make_batches(config, blocks, start, world, rank, pin=False):
    """Yields this process's micro-batches from step `start` on (make_batch). pin: for a copy to CUDA beside its work.

    Each process has consecutive rows, in micro-batches of consecutive rows: both halves of an antithetic pair stay together.
    """
    share = config["batch_size"] // world
    micro = config["micro_batch_size"] or share
    for step in range(start, config["max_iters"]):
        for first in range(rank * share, (rank + 1) * share, micro):
            batch = make_batch(config, blocks, step, range(first, first + micro))
            yield [z.pin_memory() for z in batch] if pin else batch


def train_step(config, step, batches, loss_of, optimizers, device, autocast, world, rank):
    """One optimizer step on this process's next micro-batches -> the loss a token, a tensor on the device.

    With skip_nonfinite it is nan, on every process, where the gradient was not finite and so nothing was done.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
    if config["dropout"]:
        torch.manual_seed(int(diffusion.uniforms(config["seed"], step, [2**62 + 1 + rank], 1) * 2**53))
    share = config["batch_size"] // world
    micro = config["micro_batch_size"] or share
    total = 0.0
    for first in range(0, share, micro):
        batch = [z.to(device, non_blocking=True) for z in next(batches)]
        last = first + micro == share
        with parallel.accumulate(loss_of, last):
            with autocast():
                loss, _ = loss_of(*batch)
            loss = loss / (batch[0].numel() * (share // micro))
            loss.backward()
        total += loss.detach()
    good = True
    if config["grad_clip"] or config["skip_nonfinite"]:
        norm = torch.nn.utils.clip_grad_norm_(loss_of.parameters(), config["grad_clip"] or math.inf)
        # The norm is that of all processes together, so they decide alike.
        good = not config["skip_nonfinite"] or parallel.whole(norm, keep=True).isfinite().item()
    for optimizer in optimizers:
        if good:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total if good else total * math.nan


def judge(config, model, judged, counts, bytes_per_token, autocast, world, rank):
    """The bound on the answers `judged`, each process taking its part: (dict, line) of likelihood.report, on every process.

    judged: pairs (prompt ids, answer ids); counts: how many tokens of each answer are not padding.
    """
    mine = parallel.deal([len(prompt) + len(answer) for prompt, answer in judged], world, rank)
    estimator = "ar" if config["causal"] else "any_order"
    nats = likelihood.answer_nats(
        model,
        [judged[i] for i in mine],
        estimator,
        config["eval_draws"],
        seed=config["seed"],
        autocast=autocast,
        groups=mine,
    ).tolist()
    parallel.release(model)
    found = dict(pair for part in parallel.gather(list(zip(mine, nats, strict=True)), world) for pair in part)
    return likelihood.report([found[i] for i in range(len(judged))], counts, bytes_per_token)


def one_sample(config, model, text, prompt, device, autocast):
    """The text of one sample, which begins with the `prompt` ids."""
    x = torch.full((1, config["row_width"] or config["block_size"]), model.mask_id, device=device)  # (1, L)
    x[0, : len(prompt)] = torch.as_tensor(prompt)
    fill = sample.sample_ar if config["causal"] else sample.sample
    ids = fill(model, x, seed=config["seed"], autocast=autocast)[0][0].tolist()
    parallel.release(model)
    return sample.text_of(text, ids, len(prompt), config["row_end"])


def save(path, config, text, step, model, average, optimizers, world, rank):
    """Writes the checkpoint. All processes must call it, and all return once it is there.

    Raises UserError for weights that are not finite, and where the system cannot write.
    """
    state = {"config": config, "tokenizer": text.meta(), "step": step, "model": model.state_dict()}
    state |= {"ema": average and average.state_dict(), "optimizer": [o.state_dict() for o in optimizers]}
    state = parallel.whole(state, keep=rank == 0)
    if rank == 0:
        finite = all(w.isfinite().all() for w in state["model"].values())
        require(finite, f"the weights are not finite at step {step}; {last_good(path)}")
        checkpoint.save(path, state, config["keep"])
    parallel.gather(None, world)


def last_good(path):
    return f"the last good checkpoint is {path}" if path.is_file() else "nothing was saved before"


# ---- The recipe -------------------------------------------------------------------------------------------------------


def main(config):
    """Trains as config says; returns the last evaluation, a dict of likelihood.report. Raises UserError."""
    # Settings: those of the command, unless a checkpoint in out_dir says that a run has begun.
    config, world, rank = parallel.processes(config)
    path = Path(config["out_dir"]) / "ckpt.pt"
    state, source = beginning(config, path)
    config = sized(config)
    config = merge_saved(config, state, source) if state else config
    start = state["step"] if state else 0
    alike = len(set(parallel.gather(start, world))) == 1
    require(alike, f"the processes do not see the same {path}; out_dir must be a folder that all of them share")
    check(config, world)
    device, autocast = settings.machine(config)

    # Data: shuffled blocks, or rows with prompts, to learn from, and held-out ones to be judged on.
    meta = loader.read_meta(config["data"])
    config = fit_data(config, meta, state, source)
    text = tokenizer.from_meta(meta["tokenizer"])
    blocks, judged, counts, bytes_per_token = read_data(config, meta, text)

    # Model, the average of its weights, optimizers, and the loss: compiled, and spread over the processes.
    model, average, optimizers = build(config, device, state, world)
    loss_of = parallel.engine(diffusion.Loss(model, config["objective"]), config, device, world)

    # The loop: a step, now and then a line in the log, an evaluation and a checkpoint.
    share, L = 1.0 if config["causal"] else 0.5, blocks.block_size
    if config["row_width"]:
        share *= blocks.counted(range(blocks.n), padding=not config["causal"]).mean() / L  # of the positions are predicted
    flops = 3 * model.flops_per_token(L, share) * config["batch_size"] * L
    peak = network.matmul_flops(device, autocast) * world
    journal = Journal(config | {"block_size": L}, path, start, flops, peak, rank == 0)
    unit = "rows" if config["row_width"] else "blocks"
    journal.say(f"{model.n_parameters():,} parameters; {len(blocks.tokens):,} training tokens in {blocks.n:,} {unit}")
    kind = "averaged" if average else "raw"
    journal.say(f"evaluations: {len(judged)} {unit} of {config['data']} val, {config['eval_draws']} draws, {kind} weights")
    if start:
        journal.say(f"going on from {path} at step {start} of {config['max_iters']}")
    result, stopped = None, False
    batches = make_batches(config, blocks, start, world, rank, device.type == "cuda")
    if device.type != "cpu":  # there a thread that makes batches ahead would take turns with the step
        batches = loader.prefetch(batches)
    with settings.Stop() as stop, journal, parallel.together(path, world), contextlib.closing(batches):
        for step in range(start + 1, config["max_iters"] + 1):
            loss = train_step(config, step - 1, batches, loss_of, optimizers, device, autocast, world, rank)
            if config["skip_nonfinite"] and loss.isnan():
                journal.skip(step)
            elif average:
                update_average(average, model, config["ema"], step)
            journal.step()

            last = step == config["max_iters"]
            if step % config["log_interval"] == 0 or last or (stop.signal and world == 1):
                # Here alone the processor waits for the device.
                loss, stopped, memory = parallel.agree(loss.item(), stop.signal, peak_memory(device), world)
                good = math.isfinite(loss) or config["skip_nonfinite"]
                require(good, f"the loss is {loss} at step {step}; {last_good(path)}")
                journal.speed(step, loss, learning_rate(step - 1, config), memory)
            evaluated = step % config["eval_interval"] == 0 or last
            if evaluated:
                best = (average or model).eval()
                result, line = judge(config, best, judged, counts, bytes_per_token, autocast, world, rank)
                require(math.isfinite(result["nats_per_token"]), f"the loss is nan at step {step}; {last_good(path)}")
                journal.say(f"step {step}: {line}")
                journal.write({"step": step} | result)
                if config["show_sample"]:  # by all processes: with fsdp none of them can alone
                    journal.say(f"---- a sample\n{one_sample(config, best, text, judged[0][0], device, autocast)}\n----")
            due = step % (config["save_interval"] or config["eval_interval"]) == 0 or last or stopped
            if due:
                save(path, config, text, step, model, average, optimizers, world, rank)
            if stopped:
                journal.say(f"stopped and saved {path} at step {step}; the same command goes on from there")
                raise KeyboardInterrupt
            if evaluated or due:
                model.train()
                journal.restart(step)
    return result


if __name__ == "__main__":
    settings.run(main, settings, diffusion, network, sys.modules[__name__])
