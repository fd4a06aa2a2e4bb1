"""Training: one loop for a laptop, one GPU, or many under torchrun.

    python train.py configs/pydocs.py                                   one process
    torchrun --nproc-per-node=8 train.py configs/radd_small.py          eight

- A step: draw a batch, mask it, predict, weight the losses, take a gradient step (train_step).
- A batch and its masks are pure functions of (seed, step, row of the global batch). So the number
  of processes, how they share the network (lib/parallel.py) and the micro-batch size affect only
  the speed, up to rounding (and dropout, which each process draws for itself). A stopped run
  continues as if it had never stopped: the same command resumes it.
- Training may draw and weight masks as it likes; evaluation is always the bound.

    loss = sum over masked i of  weight * CE(network(x)_i, x0_i)  / tokens in the batch

  Let w be the weight in the bound under uniform masking rates (L/k in any_order). By default the
  loss departs from the bound in two ways (lib/weighting.py): mask_rate=bell draws middle rates more
  often, and loss_weight=sqrt uses the weight 2 sqrt(w). Both keep the optimum. With
  --mask_rate=uniform --loss_weight=bound the loss is the bound. The log also has each batch's
  NELBO: the same sum with the weight w / (density of the rate).

What makes it fast: a step never waits for a number from the device (except with skip_nonfinite);
blocks are compiled one by one; bfloat16; only half of the positions reach the head (model.py).
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
import model as network
import sample
from data import examples, loader
from diffusion import OBJECTIVES
from lib import fused, optim, parallel, philox
from lib.files import Stop
from lib.optim import clip_gradient, learning_rate, make_optimizers, set_learning_rate, update_ema
from lib.stats import NotFinite, report
from lib.weighting import LOSS_WEIGHTS, MASK_RATES
from run import log as run_log
from run import resume
from run.budget import Clock, with_dial
from run.subject import order_of

DEFAULTS = {
    # the run
    "data": "data/pydocs",  # a prepared folder
    "out_dir": "out/pydocs",  # where the checkpoint and the log go
    "init_from": "",  # start from this checkpoint's weights and model keys; block_size may grow
    "resume": True,  # continue from out_dir/ckpt.pt; False: start over, keep the old run in old_1
    "max_minutes": 0.0,  # total training time; 0: no limit, or 10 minutes if max_iters is 0 too
    "max_iters": 0,  # total optimizer steps; 0: no limit
    "depth": 0,  # in [0, 256], sets shape, batch and learning rate (run/budget.py); 0: by budget
    "size": "",  # a size in SMDM's table (run/formats.SIZES), as 170M: sets shape and architecture
    # objective
    "objective": "any_order",  # one of OBJECTIVES; ar is the causal baseline
    "loss_weight": "sqrt",  # one of LOSS_WEIGHTS; weighs masked tokens in training (attention=full)
    "mask_rate": "bell",  # one of MASK_RATES; how masking rates are drawn (attention=full)
    "order": "uniform",  # one of ORDERS; how unmasking orders are drawn (attention=order)
    "order_p": 0.5,  # mixture: probability of left to right; local: how far a token moves, over L
    "prompt_drop": 0.0,  # in [0, 1], probability of masking a prompt, for guidance (SMDM: 0.1)
    # batch
    "batch_size": 0,  # sequences per step, over all processes; 0: by the width (run/budget.py)
    "micro_batch_size": 0,  # sequences that a process takes at once; 0: its whole share
    "random_length": 0.0,  # in [0, 1], probability that a step has a random length (SMDM: 0.01)
    # optimizer
    "optimizer": "muon",  # one of OPTIMIZERS; muon is for the blocks' matrices, AdamW for the rest
    "learning_rate": 0.0,  # for AdamW and Muon (updates of one size), in [0, 1e30]; 0: by the width
    "beta1": 0.9,  # in [0, 1)
    "beta2": 0.95,  # in [0, 1)
    "weight_decay": 0.0,  # for matrices; with decay_all, for all parameters
    "decay_all": False,  # also decay norm weights and biases, as SMDM does
    "grad_clip": 1.0,  # maximum gradient norm; 0: no clipping
    "skip_nonfinite": False,  # skip a step whose gradient is not finite; False: end the run
    "ema": 0.0,  # decay in [0, 1) of the EMA (moving average) of the weights, used in their place
    # learning-rate schedule
    "warmup_iters": 20,  # steps in which the learning rate rises to its peak
    "lr_decay": "linear",  # one of LR_DECAYS
    "decay_start": 0.3,  # in [0, 1], the fraction of the run after which the decay begins
    "min_lr": 0.0,  # in [0, 1e30], the learning rate at the end of the decay
    # system
    "compile": True,  # on a CPU it needs a C++ compiler; off by default if max_minutes is below 2
    "recompute": False,  # recompute each block in the backward pass: slower, but less memory
    "parallel": "ddp",  # ddp (each process has the whole network) | fsdp (a shard); with torchrun
    # evaluation, checkpoints and the log
    "eval_interval": 0,  # steps between evaluations; 0: ten per run, in a tenth of its minutes
    "eval_sequences": 64,  # held-out blocks per evaluation, 1 or more
    "eval_draws": 4,  # draws of the corruption for each block, in [1, 1e6]
    "show_sample": True,  # print one unconditional sample at each evaluation
    "save_interval": 0,  # steps between checkpoints; 0: as eval_interval
    "keep": 1,  # last checkpoints to keep, 1 or more (above 1: ckpt_STEP.pt); best.pt always stays
    "log_interval": 10,  # steps between log entries, 1 or more; several processes stop only then
}
MODULES = (settings, diffusion, network, run_log, sys.modules[__name__])  # whose keys it takes
# Tables named in DEFAULTS; config.py looks them up here.
ORDERS, OPTIMIZERS, LR_DECAYS = diffusion.ORDERS, optim.OPTIMIZERS, optim.LR_DECAYS
# Where the counters of other random numbers begin; the rows of a batch use those below.
STREAMS = {"length": 2**62, "dropout": 2**62 + 1, "prompt_drop": 2**61, "order": 2**60}
FIXED, VARYING = 16, 128  # masked_idx is padded to a multiple of this, if N is fixed or varies


# ---- 1. A batch ----------------------------------------------------------------------------------
class Batch(NamedTuple):
    """A micro-batch: the arguments of diffusion.Loss, then two counts."""

    x0: torch.Tensor  # (b, L) clean tokens
    mask: torch.Tensor | None = None  # (b, L) bool; None (for ar): every token counts
    weight: torch.Tensor | None = None  # (b,) or (b, L)
    masked_idx: torch.Tensor | None = None  # (N,) flat indices of the positions that count
    order: torch.Tensor | None = None  # (b, L) for an `order` network, instead of a mask
    bound_weight: torch.Tensor | None = None  # like weight, for the NELBO, if it differs
    n_tokens: int = 0  # that count in the global batch; divides its loss, a sum
    n_real: int = 0  # the same, answers only up to their first eos: divides the NELBO

    def inputs(self):
        """The arguments of diffusion.Loss by name, without the counts."""
        return {name: x for name, x in self._asdict().items() if not name.startswith("n_")}

    def each(self, move):
        """Apply `move` to every tensor."""
        return Batch(*(move(field) if torch.is_tensor(field) else field for field in self))


def make_batch(config, dataset, step, rows):
    """`rows` of the global batch at `step`, on the CPU. A pure function of its arguments."""
    if isinstance(dataset, examples.Examples):
        return make_example_batch(config, dataset, step, rows)
    first = loader.sequences_before(config, step)
    x0 = torch.from_numpy(dataset.batch(first, rows))  # (b, block_size)
    numbers = philox.uniforms(config["seed"], step, [STREAMS["length"]], 2)  # (1, 2)
    coin, length = numbers[0].tolist()  # one pair for the whole step
    if coin < config["random_length"]:
        x0 = x0[:, : 1 + int(length * x0.shape[1])]  # (b, L)
    L = x0.shape[1]
    counts = dict.fromkeys(("n_tokens", "n_real"), config["batch_size"] * L)
    if OBJECTIVES[config["objective"]].causal:
        return Batch(x0, **counts)
    if config["attention"] == "order":
        return Batch(x0, order=draw_training_order(config, step, rows, L), **counts)
    mask, weight, bound_weight = draw_training_mask(config, step, rows, L)  # (b, L), (b,) each
    # With symmetric mask rates, an antithetic pair of any_order masks L + 1 positions: N is fixed.
    is_fixed = config["objective"] == "any_order" and len(rows) % 2 == 0
    masked_idx = fused.masked_indices(mask, multiple=FIXED if is_fixed else VARYING)  # (N,)
    return Batch(x0, mask, weight.float(), masked_idx, bound_weight=bound_weight.float(), **counts)


def draw_training_mask(config, step, rows, L, prompt=None):
    """For `rows` of the global batch: mask (b, L), weight in training (b,), in the bound (b,)."""
    B = config["batch_size"]
    schedule = diffusion.SCHEDULES[config["schedule"]]
    u, noise = diffusion.stratified_uniforms(config["seed"], step, rows, B, L)  # (b,), (b, L)
    rate, density = MASK_RATES[config["mask_rate"]](u)  # (b,) each: u reshaped, its density
    mask, w = diffusion.draw_mask(config["objective"], rate, noise, schedule, prompt)
    return mask, LOSS_WEIGHTS[config["loss_weight"]](w), w / density


def draw_training_order(config, step, rows, L, prompt=None):
    """order (b, L) for `rows` of the global batch."""
    noise = philox.uniforms(config["seed"], step, rows, L)  # (b, L)
    coin = coin_of(config, step, rows, "order")  # (b, 1)
    return diffusion.draw_order(config["order"], noise, coin, config["order_p"], prompt)


def coin_of(config, step, rows, stream):
    """One uniform number (b, 1) for each of `rows` of the global batch, from one of STREAMS."""
    return philox.uniforms(config["seed"], step, [STREAMS[stream] + row for row in rows], 1)


def make_example_batch(config, dataset, step, rows):
    """make_batch for prompts and answers. What follows a prompt counts (ar: to its first eos).

    As in SMDM (arXiv 2410.18514), the loss is the mean over all tokens of the global batch that can
    count. An answer ends with eos, and more eos pad the row. A masked model has to learn them, as
    it fills every position. The NELBO includes their nats, but is divided by the tokens up to the
    first eos (where sample.py cuts its text, too). A dropped prompt is masked and does not count.
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
    """Yield this process's micro-batches from step `start` on, of consecutive rows."""
    share, micro = shares(config, team)
    for step in itertools.count(start):
        for first in range(team.rank * share, (team.rank + 1) * share, micro):
            batch = make_batch(config, dataset, step, range(first, first + micro))
            # Copies from pinned memory to the GPU overlap with its work.
            yield batch.each(torch.Tensor.pin_memory) if team.device.type == "cuda" else batch


def shares(config, team):
    """(sequences of a step for this process, sequences of one micro-batch)."""
    share = config["batch_size"] // team.world
    return share, config["micro_batch_size"] or share


# ---- 2. A step -----------------------------------------------------------------------------------
def build(config, team, state=None):
    """(model, ema or None, optimizers), new or restored from the checkpoint `state`.

    The weights are the same for any number of processes and any way of sharing the network.
    """
    with torch.device("meta"):  # no memory yet
        model = network.make_network(config)
    ema = copy.deepcopy(model) if config["ema"] else None
    weights = state["model"] if state else None
    parallel.materialise(model, weights, config, team)
    if ema:
        parallel.materialise(ema, state.get("ema") or weights if state else None, config, team)
    optimizers = make_optimizers(config, model)
    if resume.is_resumed(state):
        resume.load_optimizers(optimizers, state["optimizer"])
    return model, ema, optimizers


def train_step(config, step, batches, loss_fn, optimizers, team):
    """One optimizer step on this process's next micro-batches -> (loss, NELBO, skipped).

    Loss and NELBO are in nats per token and stay on the device. skipped: with skip_nonfinite, the
    gradient was not finite and the weights were left as they are.
    """
    if config["dropout"]:  # by step and process, so that a resumed run draws the same
        philox.seed_torch(config["seed"], step, STREAMS["dropout"] + team.rank)
    share, micro = shares(config, team)
    on_cuda = team.device.type == "cuda"
    total = nelbo = 0.0
    for first in range(0, share, micro):
        batch = next(batches).each(lambda tensor: tensor.to(team.device, non_blocking=on_cuda))
        with parallel.accumulate(loss_fn, last=first + micro == share):
            with team.autocast():
                loss, nats = loss_fn(**batch.inputs())
            loss = loss * (team.world / batch.n_tokens)  # gradients are averaged over processes
            loss.backward()
        total += loss.detach()
        nelbo += nats.sum() * (team.world / batch.n_real)
    skipped = clip_gradient(config, loss_fn.parameters())
    for optimizer in optimizers:
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, nelbo, skipped


# ---- 3. Logging and evaluation -------------------------------------------------------------------
def log_now(config, losses, rate, signal, team, log):
    """Wait for the device and log the step -> a stop signal that any process received, or 0."""
    step = log.clock.step
    (loss, nelbo), stopped, memory = parallel.reduce_over_processes(losses, signal, team)
    is_sound = math.isfinite(loss) or config["skip_nonfinite"]
    resume.require_sound(config, is_sound, f"the loss is {loss} at step {step}")
    log.write_step(step, loss, nelbo, rate, memory)
    return stopped


def evaluate_held_out(config, step, model, val, team):
    """Evaluate the held-out requests, each process its share -> (dict, line) of `report`."""
    mine = parallel.my_share([len(prompt) + len(answer) for prompt, answer in val.requests], team)
    options = {"draws": config["eval_draws"], "seed": config["seed"], "groups": mine}
    options |= order_of("estimator", config, evaluate.ESTIMATORS)
    nats_of = None  # stays None if one is not finite: all processes must know
    with contextlib.suppress(NotFinite), team.autocast():
        nats = evaluate.answer_nats(model, [val.requests[i] for i in mine], **options).tolist()
        nats_of = dict(zip(mine, nats, strict=True))
    parallel.reshard(model)
    parts = parallel.gather(nats_of, team)
    resume.require_sound(config, None not in parts, f"the loss is nan at step {step}")
    nats_of = {i: nats for part in parts for i, nats in part.items()}
    return report([nats_of[i] for i in range(len(val.requests))], val.counts, val.bytes_per_token)


def evaluate_now(config, model, ema, tokenizer, val, team, log):
    """Evaluate, print and log the result, show a sample -> the dict of `report`, or None."""
    step = log.clock.step
    net = (ema or model).eval()
    result = None
    if val:
        result, line = evaluate_held_out(config, step, net, val, team)
        log.say(f"step {step}: {line}")
        resume.keep_best(config, tokenizer, log, model, ema, result, team)
        log.write({"step": step} | result)
    if config["show_sample"]:  # by all processes: with fsdp none can do it alone
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
    keys = {"seed": config["seed"]} | sample.defaults_for(config)
    keys |= order_of("sampler", config, sample.SAMPLERS)
    options = {key: keys[key] for key in keys if key in sample.OPTIONS}
    with team.autocast():
        ids = sample.sample(model, x, **options)[0][0].tolist()
    parallel.reshard(model)
    return sample.text_of(tokenizer, ids, len(prompt), config["eos_id"], apart=True)


# ---- 4. The recipe -------------------------------------------------------------------------------
def main(config):
    """Train -> the dict of the last evaluation, or None. Raises UserError for a bad config."""
    config = settings.whole(config, *MODULES)
    team = parallel.join(config)
    with resume.locked_out_dir(config, team):  # a second run with this out_dir is refused
        return train(config, team)


def train(config, team):
    """The recipe, with out_dir locked."""
    # Start from scratch, from other weights, or from where the run stopped.
    config, state = resume.begin(config, team)
    path = resume.checkpoint_path(config)

    # Data: blocks of text or examples to train on, and held-out ones to evaluate on.
    tokenizer, dataset, val = examples.open_data(config)

    # Fill in settings that were not given, to fit the time, the machine and the text.
    config = resume.with_place_in_data(with_dial(config, dataset, team), state, team)
    clock = Clock(config, state, team)

    # The model, its EMA, the optimizers; the loss, compiled and distributed over processes.
    model, ema, optimizers = build(config, team, state)
    loss_fn = diffusion.Loss(model, config["objective"])
    loss_fn = parallel.prepare_for_training(loss_fn, config, team)
    batches = make_batches(config, dataset, team, state["step"] if state else 0)
    if team.device.type != "cpu":  # on a CPU the thread would compete with the step
        batches = loader.prefetch(batches)

    log = run_log.Log(config, model, dataset, clock, team)
    log.say_start(model, dataset, val, ema, **order_of("order", config, evaluate.ESTIMATORS))
    result, stopped = None, 0
    with Stop() as stop, log, parallel.together(path, team), contextlib.closing(batches):
        for step in clock:
            # One step: forward, loss.backward(), optimizer.step(). The clock counts steps from 1;
            # random numbers and the learning rate are functions of the steps done before.
            rate = learning_rate(step - 1, config, clock.spent())
            set_learning_rate(optimizers, rate)
            loss, nelbo, skipped = train_step(config, step - 1, batches, loss_fn, optimizers, team)
            if skipped:
                log.skip(step)
            elif ema:
                update_ema(ema, model, config["ema"], step)
            log.step(loss)

            # At intervals and at the end: wait for the device, log, evaluate, save.
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
                sys.exit(130)  # the exit code of Ctrl-C
    return result


if __name__ == "__main__":
    program.run(main, *MODULES)
