"""Training: one loop for a laptop, one GPU, or many under torchrun.

    python train.py configs/pydocs.py                                   one process
    torchrun --nproc-per-node=8 train.py configs/radd_small.py          eight

- A step: draw a batch, mask it, predict, weigh, take a gradient step (train_step).
- A batch and its masks are pure functions of (seed, step, row of the global batch). So the number
  of processes, how they share the network (lib/parallel.py) and the micro-batch change the speed
  and not the run, up to rounding (and dropout, which each process draws for itself). A stopped run
  goes on as if it had never stopped: the same command resumes it.
- Training may draw and weigh masks as it likes; evaluation is always the bound.

    loss = sum over masked i of  weight * CE(network(x)_i, x0_i)  / tokens in the batch

  By default it departs from the bound twice (lib/weighting.py): mask_rate=bell draws middle rates
  more often, loss_weight=sqrt weighs by 2 sqrt(w), w (L/k in any_order) being the bound's weight
  under uniform rates. Both keep the optimum. With --mask_rate=uniform --loss_weight=bound the loss
  is the bound. The log has the batch's NELBO beside it, the sum with w over the rate's density.

What makes it fast: a step waits for no number from the device (except with skip_nonfinite); blocks
are compiled one at a time; bfloat16; half of the positions pass the head (diffusion.py, model.py).
"""

from lib import program  # isort: skip (first: from here on Ctrl-C is one line)
import contextlib
import copy
import itertools
import math
import sys
from typing import NamedTuple

import torch

import config as settings
import diffusion
import evaluate
import lib.log
import model as network
import sample
from data import examples, loader
from data.tokenizer import from_meta
from diffusion import OBJECTIVES
from lib import fused, optim, parallel, philox, resume
from lib.budget import Clock, with_dial
from lib.files import Stop
from lib.optim import clip_gradient, learning_rate, make_optimizers, set_learning_rate, update_ema
from lib.stats import NotFinite, report
from lib.weighting import LOSS_WEIGHTS, MASK_RATES

DEFAULTS = {
    # the run
    "data": "data/pydocs",  # a prepared folder
    "out_dir": "out/pydocs",  # the checkpoint and the log go here
    "init_from": "",  # start with weights and model keys of this checkpoint; block_size may grow
    "resume": True,  # go on from out_dir/ckpt.pt; False: begin anew, and keep the old run in old_1
    "max_minutes": 0.0,  # training time in all; 0: no limit, or 10 minutes if max_iters is 0 too
    "max_iters": 0,  # optimizer steps in all; 0: no limit
    "depth": 0,  # in [0, 256], the dial for shape, batch, rate (lib/budget.py); 0: as time allows
    "size": "",  # a row of SMDM's table (lib/formats.SIZES), as 170M: shape and kind of the network
    # objective
    "objective": "any_order",  # one of OBJECTIVES; ar is the causal baseline
    "loss_weight": "sqrt",  # one of LOSS_WEIGHTS; weighs masked tokens in training (attention=full)
    "mask_rate": "bell",  # one of MASK_RATES; how masking rates are drawn (attention=full)
    "order": "uniform",  # one of ORDERS; how unmasking orders are drawn (attention=order)
    "order_p": 0.5,  # mixture: how often it is left to right; local: how far a token may stray
    "prompt_drop": 0.0,  # in [0, 1], the chance that a prompt is masked, for guidance (SMDM: 0.1)
    # batch
    "batch_size": 0,  # sequences in a step, over all processes; 0: by the width (lib/budget.py)
    "micro_batch_size": 0,  # how many of them a process takes at once; 0: the whole of its share
    "random_length": 0.0,  # in [0, 1], the chance that a step has a random length (SMDM: 0.01)
    # optimizer
    "optimizer": "muon",  # one of OPTIMIZERS; muon is for the blocks' matrices, AdamW for the rest
    "learning_rate": 0.0,  # of AdamW and Muon, whose updates have the same size; 0: by the width
    "beta1": 0.9,  # in [0, 1)
    "beta2": 0.95,  # in [0, 1)
    "weight_decay": 0.0,  # of the matrices; with decay_all, of every parameter
    "decay_all": False,  # let the weights of norms and the biases decay too, as SMDM does
    "grad_clip": 1.0,  # the largest norm of a gradient; 0: no clipping
    "skip_nonfinite": False,  # skip a step whose gradient is not finite; False: it ends the run
    "ema": 0.0,  # decay in [0, 1] of a moving average of the weights, used in their place; 0: none
    # schedule of the learning rate
    "warmup_iters": 20,  # steps in which the learning rate grows to its full value
    "lr_decay": "linear",  # one of LR_DECAYS
    "decay_start": 0.3,  # in [0, 1], the part of the run after which the decay begins
    "min_lr": 0.0,  # the learning rate at the end of the decay
    # system
    "compile": True,  # by a C++ compiler on a CPU; off by default if max_minutes is below 2
    "recompute": False,  # compute each block again for its gradient: slower, but with less memory
    "parallel": "ddp",  # ddp (each process has the network) | fsdp (a part of it); under torchrun
    # evaluation, checkpoints and the log
    "eval_interval": 0,  # steps between two evaluations; 0: ten in a run, in a tenth of its minutes
    "eval_sequences": 64,  # held-out blocks in an evaluation, 1 or more
    "eval_draws": 4,  # draws of the corruption for each of them, 1 or more
    "show_sample": True,  # print one unconditional sample at each evaluation
    "save_interval": 0,  # steps between two checkpoints; 0: as eval_interval
    "keep": 1,  # last checkpoints to keep, 1 or more, above 1 as ckpt_STEP.pt; best.pt stays anyway
    "log_interval": 10,  # steps between log entries, 1 or more; a stop is looked for as often
}
MODULES = (settings, diffusion, network, lib.log, sys.modules[__name__])  # whose keys it takes
# Tables that DEFAULTS names, for config.py to find them here.
ORDERS, OPTIMIZERS, LR_DECAYS = diffusion.ORDERS, optim.OPTIMIZERS, optim.LR_DECAYS
# Random numbers that are no batch's: positions of their own, which no batch reaches.
STREAMS = {"length": 2**62, "dropout": 2**62 + 1, "prompt_drop": 2**61, "order": 2**60}

FIXED, VARYING = 16, 128  # masked_idx is filled up to such a multiple, by whether N varies


# ---- 1. A batch ----------------------------------------------------------------------------------
class Batch(NamedTuple):
    """What a micro-step learns from: the arguments of diffusion.Loss, then two counts."""

    x0: torch.Tensor  # (b, L) clean tokens
    mask: torch.Tensor | None = None  # (b, L) bool; None (of ar): every token counts
    weight: torch.Tensor | None = None  # (b,) or (b, L)
    masked_idx: torch.Tensor | None = None  # (N,) flat indices of what counts
    order: torch.Tensor | None = None  # (b, L) for an `order` network, in place of a mask
    bound_weight: torch.Tensor | None = None  # as weight: that of the NELBO, if it is another
    n_tokens: int = 0  # of the whole global batch: what the sum of all losses is divided by
    n_real: int = 0  # answers up to their first eos: what all nats of the NELBO are divided by

    def inputs(self):
        """The arguments of diffusion.Loss by name: all but the counts."""
        counts = ("n_tokens", "n_real")
        return {name: value for name, value in self._asdict().items() if name not in counts}

    def each(self, move):
        """Apply `move` to every tensor."""
        return Batch(*(move(field) if torch.is_tensor(field) else field for field in self))


def make_batch(config, dataset, step, rows):
    """Some `rows` of the global batch of `step`, on the CPU. A pure function of these."""
    if isinstance(dataset, examples.Examples):
        return make_example_batch(config, dataset, step, rows)
    first = loader.sequences_before(config, step)
    x0 = torch.from_numpy(dataset.batch(first, rows))  # (b, block_size)
    numbers = philox.uniforms(config["seed"], step, [STREAMS["length"]], 2)  # (1, 2)
    coin, length = numbers[0].tolist()  # for the whole step
    if coin < config["random_length"]:
        x0 = x0[:, : 1 + int(length * x0.shape[1])]  # (b, L)
    L = x0.shape[1]
    counts = dict.fromkeys(("n_tokens", "n_real"), config["batch_size"] * L)
    if OBJECTIVES[config["objective"]].causal:
        return Batch(x0, **counts)
    if config["attention"] == "order":
        return Batch(x0, order=draw_training_order(config, step, rows, L), **counts)
    mask, weight, bound_weight = draw_training_mask(config, step, rows, L)  # (b, L), (b,) each
    # Each pair of any_order masks L + 1 positions, so N is the same in every step.
    is_fixed = config["objective"] == "any_order" and len(rows) % 2 == 0
    masked_idx = fused.masked_indices(mask, multiple=FIXED if is_fixed else VARYING)  # (N,)
    return Batch(x0, mask, weight.float(), masked_idx, bound_weight=bound_weight.float(), **counts)


def draw_training_mask(config, step, rows, L, prompt=None):
    """mask (b, L), weights (b,) in training and of the bound, of `rows` of the global batch."""
    B = config["batch_size"]
    schedule = diffusion.SCHEDULES[config["schedule"]]
    u, noise = diffusion.stratified_uniforms(config["seed"], step, rows, B, L)  # (b,), (b, L)
    rate, density = MASK_RATES[config["mask_rate"]](u)  # (b,) u drawn anew, and its density
    mask, w = diffusion.draw_mask(config["objective"], rate, noise, schedule, prompt)
    return mask, LOSS_WEIGHTS[config["loss_weight"]](w), w / density


def draw_training_order(config, step, rows, L, prompt=None):
    """order (b, L) of `rows` of the global batch."""
    noise = philox.uniforms(config["seed"], step, rows, L)  # (b, L)
    coin = coin_of(config, step, rows, "order")  # (b, 1)
    return diffusion.draw_order(config["order"], noise, coin, config["order_p"], prompt)


def coin_of(config, step, rows, stream):
    """A uniform number (b, 1) for each of `rows` of the global batch, of one of STREAMS."""
    return philox.uniforms(config["seed"], step, [STREAMS[stream] + row for row in rows], 1)


def make_example_batch(config, dataset, step, rows):
    """make_batch for prompts and answers: what follows a prompt counts, for ar up to its first eos.

    The loss is the mean over what can count in the global batch, as SMDM has it (arXiv 2410.18514).
    An answer ends with eos, and eos fills the row: a masked model has to learn this padding, for it
    fills every position. Its nats count, but all are divided by the answer's tokens, its first eos
    the last (where sample.py cuts its text, too). A dropped prompt is masked and does not count.
    """
    first, causal = loader.sequences_before(config, step), OBJECTIVES[config["objective"]].causal
    numbers = dataset[dataset.index(first, rows)]
    x0, prompt, length = map(torch.from_numpy, numbers)  # (b, L), (b,), (b,)
    L = x0.shape[1]
    position = torch.arange(L)  # (L,)
    in_prompt = position < prompt[:, None]  # (b, L)
    counts = dataset.counts(first, config["batch_size"], padding=not causal)
    if config["attention"] == "order":
        order = draw_training_order(config, step, rows, L, prompt)  # (b, L) prompts come first
        return Batch(x0, weight=(~in_prompt).float(), order=order, **counts)
    if causal:
        mask = ~in_prompt & (position < length[:, None])  # (b, L)
        weight = bound_weight = torch.ones(len(x0))  # (b,)
    else:
        drawn = draw_training_mask(config, step, rows, L, prompt)
        mask, weight, bound_weight = drawn  # (b, L), (b,), (b,)
    weight, bound_weight = ((w[:, None] * mask).float() for w in (weight, bound_weight))  # (b, L)
    coin = coin_of(config, step, rows, "prompt_drop")  # (b, 1)
    dropped = (coin < config["prompt_drop"]) & in_prompt  # (b, L)
    masked_idx = fused.masked_indices(mask, multiple=VARYING)  # (N,)
    return Batch(x0, mask | dropped, weight, masked_idx, bound_weight=bound_weight, **counts)


def make_batches(config, dataset, team, start=0):
    """Yield this process's micro-batches from step `start` on: consecutive rows, whole pairs."""
    share, micro = shares(config, team)
    for step in itertools.count(start):
        for first in range(team.rank * share, (team.rank + 1) * share, micro):
            batch = make_batch(config, dataset, step, range(first, first + micro))
            # Pinned memory is copied to the card beside its work.
            yield batch.each(torch.Tensor.pin_memory) if team.device.type == "cuda" else batch


def shares(config, team):
    """(sequences of a step that are this process's, and of one micro-batch)."""
    share = config["batch_size"] // team.world
    return share, config["micro_batch_size"] or share


# ---- 2. A step -----------------------------------------------------------------------------------
def build(config, team, state=None):
    """(model, ema or None, optimizers) at the beginning of a run, or as the checkpoint `state` has.

    The same numbers for any number of processes and any way to share the network.
    """
    with torch.device("meta"):  # no memory yet
        model = network.make_network(config)
    ema = copy.deepcopy(model) if config["ema"] else None
    saved = [state["model"], state.get("ema") or state["model"]] if state else [None, None]
    for net, weights in zip((model, ema), saved, strict=True):
        if net is None:
            continue
        if team.world > 1 and config["parallel"] == "fsdp":
            parallel.shard(net, team)
        net.to_empty(device=team.device)
        cos, sin = network.rotary_tables(config)  # (block_size, d/2) each; no parameters to fill
        net.cos, net.sin = cos.to(team.device), sin.to(team.device)
        torch.manual_seed(config["seed"])
        parallel.fill(net, weights.items() if weights else net.initial_weights(), "the checkpoint")
    optimizers = make_optimizers(config, model)
    if resume.is_resumed(state):
        resume.load_optimizers(optimizers, state["optimizer"])
    return model, ema, optimizers


def train_step(config, step, batches, loss_fn, optimizers, team):
    """One optimizer step on this process's next micro-batches -> (loss, NELBO, skipped).

    Loss and NELBO are in nats a token, and stay on the device. skipped: the gradient was not finite
    and, with skip_nonfinite, the weights stay as they are.
    """
    if config["dropout"]:  # each process draws its own, the same whenever this step is taken
        philox.seed_torch(config["seed"], step, STREAMS["dropout"] + team.rank)
    share, micro = shares(config, team)
    on_cuda = team.device.type == "cuda"
    total = nelbo = 0.0
    for first in range(0, share, micro):
        batch = next(batches).each(lambda tensor: tensor.to(team.device, non_blocking=on_cuda))
        with parallel.accumulate(loss_fn, last=first + micro == share):
            with team.autocast():
                loss, nats = loss_fn(**batch.inputs())
            loss = loss * (team.world / batch.n_tokens)  # gradients are averaged over the processes
            loss.backward()
        total += loss.detach()
        nelbo += nats.sum() * (team.world / batch.n_real)
    skipped = clip_gradient(config, loss_fn.parameters())
    for optimizer in optimizers:
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, nelbo, skipped


# ---- 3. Now and then -----------------------------------------------------------------------------
def log_now(config, losses, rate, signal, team, log):
    """Wait for the device and log the step -> the signal that stops any of the processes, or 0."""
    step = log.clock.step
    (loss, nelbo), stopped, memory = parallel.reduce_over_processes(losses, signal, team)
    is_sound = math.isfinite(loss) or config["skip_nonfinite"]
    resume.require_sound(config, is_sound, f"the loss is {loss} at step {step}")
    log.write_step(step, loss, nelbo, rate, memory)
    return stopped


def evaluate_held_out(config, step, model, val, team):
    """(dict, line) of report on the held-out requests, of which each process evaluates its part."""
    mine = parallel.my_share([len(prompt) + len(answer) for prompt, answer in val.requests], team)
    options = {"draws": config["eval_draws"], "seed": config["seed"], "groups": mine}
    nats_of = None  # unless all are finite, which the other processes have to hear
    with contextlib.suppress(NotFinite), team.autocast():
        nats = evaluate.answer_nats(model, [val.requests[i] for i in mine], **options).tolist()
        nats_of = dict(zip(mine, nats, strict=True))
    parallel.reshard(model)
    parts = parallel.gather(nats_of, team)
    resume.require_sound(config, None not in parts, f"the loss is nan at step {step}")
    nats_of = {i: nats for part in parts for i, nats in part.items()}
    return report([nats_of[i] for i in range(len(val.requests))], val.counts, val.bytes_per_token)


def evaluate_now(config, model, ema, tokenizer, val, team, log):
    """Evaluate and show a sample, on the screen and in the log -> a dict of report, or None."""
    step = log.clock.step
    net = (ema or model).eval()
    result = None
    if val:
        result, line = evaluate_held_out(config, step, net, val, team)
        log.say(f"step {step}: {line}")
        resume.keep_best(config, tokenizer, log, model, ema, result, team)
        log.write({"step": step} | result)
    if config["show_sample"]:  # by all processes: with fsdp none of them can alone
        log.say(f"---- a sample\n{one_sample(config, net, tokenizer, val, team)}\n----")
    model.train()
    log.clock.look(after_evaluation=True)
    log.restart(step)
    return result


def one_sample(config, model, tokenizer, val, team):
    """One sample as text; it begins with the first held-out prompt, if there are prompts."""
    prompt = val.requests[0][0] if val else ()
    L = config["example_width"] or config["block_size"]
    x = torch.full((1, L), model.mask_id, device=team.device)  # (1, L)
    x[0, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
    keys = ("sampler", "temperature") if config["example_width"] else ()  # as sample.py answers
    options = {"seed": config["seed"]} | {key: sample.ANSWERS[key] for key in keys}
    with team.autocast():
        ids = sample.sample(model, x, **options)[0][0].tolist()
    parallel.reshard(model)
    return sample.text_of(tokenizer, ids, len(prompt), config["eos_id"], apart=True)


# ---- 4. The recipe -------------------------------------------------------------------------------
def main(config):
    """Train as the config says -> the last evaluation, a dict of report, or None. UserError."""
    config = settings.completed(config, *MODULES)
    team = parallel.join(config)
    with resume.locked_out_dir(config, team):  # a second start with this out_dir is refused
        return train(config, team)


def train(config, team):
    """The recipe; out_dir is locked."""
    # How the run begins: anew, from other weights, or from where it stopped.
    config, state = resume.begin(config, team)
    path = resume.checkpoint_path(config)

    # Data: blocks of text, or examples, to learn from, and held-out ones to evaluate.
    tokenizer = from_meta(loader.read_meta(config["data"])["tokenizer"])
    dataset, val = examples.open_data(config)

    # The network and recipe that fit the time, the machine and the text, where they are not given.
    config = resume.with_place_in_data(with_dial(config, dataset, team), state, team.world)
    clock = Clock(config, state, team)

    # The model, its EMA, the optimizers; the loss, compiled and spread over the processes.
    model, ema, optimizers = build(config, team, state)
    loss_fn = diffusion.Loss(model, config["objective"])
    loss_fn = parallel.prepare_for_training(loss_fn, config, team)
    batches = make_batches(config, dataset, team, state["step"] if state else 0)
    if team.device.type != "cpu":  # there a thread beside the step would only take turns with it
        batches = loader.prefetch(batches)

    log = lib.log.Log(config, model, dataset, clock, team)
    log.say_start(model, dataset, val, "averaged" if ema else "raw")
    result, stopped = None, 0
    with Stop() as stop, log, parallel.together(path, team), contextlib.closing(batches):
        for step in clock:
            # One step: forward, loss.backward(), and a move of the weights. The clock counts steps
            # from 1; random numbers and the learning rate are those of the steps done before.
            rate = learning_rate(step - 1, config, clock.spent())
            set_learning_rate(optimizers, rate)
            loss, nelbo, skipped = train_step(config, step - 1, batches, loss_fn, optimizers, team)
            if skipped:
                log.skip(step)
            elif ema:
                update_ema(ema, model, config["ema"], step)
            log.step(loss)

            # Now and then, and at the end: wait for the device, log, evaluate, save.
            last = clock.tick(config["log_interval"])
            if step % config["log_interval"] == 0 or last or (stop.signal and team.world == 1):
                stopped = log_now(config, (loss, nelbo), rate, stop.signal, team, log)
            if clock.due(config["eval_interval"], share=0.1):
                result = evaluate_now(config, model, ema, tokenizer, val, team, log)
            if clock.due(config["save_interval"] or config["eval_interval"]) or stopped:
                resume.save(config, tokenizer, clock, model, ema, optimizers, team)
                log.restart(step)
            if stopped:
                log.say(f"stopped and saved {path} at step {step}; the same command resumes it")
                sys.exit(130)  # as an interrupted program does
    return result


if __name__ == "__main__":
    program.run(main, *MODULES)
