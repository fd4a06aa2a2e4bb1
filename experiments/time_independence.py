"""Does a network that is told the time do better than one that is not?

    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m experiments.time_independence

By RADD's Theorem 1 (arXiv 2406.03736, section 3.1) what is to be predicted does not depend on the
time, so an input for it is cost without gain. Here the demo's network gets one as DiT and SEDD have
it (adaLN-zero: shifts, scales and gates of each block from an embedding of t, zero at the start),
and both are trained on the same draws of lambda_dce, t = lambda, to equal FLOPs, those of the
modulation included. What is compared: the bound, by draws of lambda_dce whose t the network is
told; the seconds; and the bound of the same network when it is told the time of another draw, which
says whether it has come to depend on a thing that it does not need.

Budget: 6 runs of 1e14 FLOPs, 6e14 in all: 60 minutes on two cores with bfloat16 instructions.
Minimum: 3e13 a run (--flops=3e13).
"""

import contextlib
import statistics
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import config as settings
import diffusion
import evaluate
import model as network
from experiments import papers, results, runs
from lib import program
from run import checkpoint

DEFAULTS = {
    "data": "data/corpus",  # a prepared folder
    "flops": 1e14,  # of a run
    "eval_draws": 16,  # of the corruption, for each block of the evaluation; 2 or more
}

WIDTH = 128  # of the embedding of the time
KEYS = {"objective": "lambda_dce", "loss_weight": "bound"}
PLAIN, TIMED = "without a time input", "with a time input"


# ---- The network with a time input ---------------------------------------------------------------


class TimedBlock(network.Block):
    """Block whose norms are shifted and scaled, and whose additions are gated, by the time."""

    def __init__(self, config):
        super().__init__(config)
        self.modulate = nn.Linear(WIDTH, 6 * config["n_embd"])

    def forward(self, h, cos, sin, masked_idx=None, cache=None):
        """As Block.forward; `cond` (B, WIDTH) is set by Timed.hidden."""
        each = self.modulate(F.silu(self.cond))[:, None].chunk(6, dim=-1)  # six of (B, 1, D)
        z = self.norm1(h) * (1 + each[0]) + each[1]  # (B, L, D)
        if masked_idx is None:
            y = self.attention(z, cos, sin)  # (B, L, D)
        else:
            row = masked_idx // h.shape[1]  # (N,)
            each = [part[row, 0] for part in each]  # six of (N, D)
            h = h.flatten(0, 1)[masked_idx]  # (N, D)
            y = self.attention_at(masked_idx, z, cos, sin)
        h = h + (1 + each[2]) * self.proj(y)
        z = self.norm2(h) * (1 + each[3]) + each[4]
        return h + (1 + each[5]) * self.mlp(z)


class Timed(network.Transformer):
    """Transformer that reads `time` (B,) where it is set; else the share of masked tokens."""

    time = None

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(TimedBlock(config) for _ in range(config["n_layer"]))
        self.time1, self.time2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def initial_weights(self):
        """As Transformer; without modulation, so that it starts as the plain network does."""
        for name, value in super().initial_weights():
            yield name, torch.zeros_like(value) if "modulate" in name else value

    def hidden(self, x, masked_idx=None):
        """As Transformer.hidden."""
        t = (x == self.mask_id).float().mean(1) if self.time is None else self.time  # (B,)
        scale = torch.arange(WIDTH // 2, device=x.device) / (WIDTH // 2)
        angle = 1000 * t.to(x.device)[:, None] * 10000**-scale  # (B, WIDTH / 2)
        wave = torch.cat([angle.cos(), angle.sin()], dim=1).float()  # (B, WIDTH)
        cond = self.time2(F.silu(self.time1(wave)))  # (B, WIDTH) which every block reads
        for block in self.blocks:
            block.cond = cond
        return super().hidden(x, masked_idx)


class TimedLoss(diffusion.Loss):
    """Loss that tells the network its draw's time, lambda = 1 / the weight of the bound."""

    def forward(self, x0, mask=None, weight=None, masked_idx=None, order=None, bound_weight=None):
        self.model.time = 1 / bound_weight  # (B,)
        try:
            return super().forward(x0, mask, weight, masked_idx, order, bound_weight)
        finally:
            self.model.time = None


@contextlib.contextmanager
def timed():
    """Inside the block networks that are made, loaded and trained have a time input."""
    saved = network.Transformer, diffusion.Loss
    network.Transformer, diffusion.Loss = Timed, TimedLoss
    try:
        yield
    finally:
        network.Transformer, diffusion.Loss = saved


def share_without_modulation(config):
    """The part of a step's FLOPs that is not for the time: once a sequence, not once a token."""
    extra = 2 * (WIDTH * 6 * config["n_embd"] * config["n_layer"] + 2 * WIDTH * WIDTH)
    return 1 / (1 + 3 * extra * config["batch_size"] / runs.step_flops(config))


# ---- Measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def bound(ctx, folder, data, kind, other=False):
    """Nats per token by lambda_dce; other: the network is told the time of another draw."""
    with timed() if kind == TIMED else contextlib.nullcontext():
        model, _, _ = checkpoint.load(folder, ctx.device)
    x0, size = ctx.blocks(data, model.block_size), ctx.config["eval_draws"]  # (S, L)
    rows, total, rule = torch.arange(len(x0) * size), 0.0, evaluate.ESTIMATORS["lambda_dce"]
    for part in rows.split(64):
        draw, place = part % size, part // size  # (b,) each
        u, noise = evaluate.random_numbers(0, 0, place, draw, size, x0.shape[1])  # (b,), (b, L)
        none = torch.zeros_like(place)
        draws = evaluate.RowNoise(u, noise, none, none, diffusion.loglinear)
        mask, weight = evaluate.lambda_dce(draws)  # (b, L) each
        model.time = (u.roll(1) if other else u).float() if kind == TIMED else None
        with ctx.autocast():
            total += evaluate.nats_of_rows(model, x0[place], mask, weight, rule).double().sum()
    return float(total) / size / x0.numel()


def draw(axes, figures):
    """The evaluations along the first seed's runs."""
    for kind, curve in runs.curves_in(figures).items():
        style = {"color": results.DARK} if kind == PLAIN else {"color": results.LIGHT, "ls": "--"}
        axes.plot(*zip(*curve, strict=True), marker="o", label=kind, **style)
    axes.set(xlabel="training FLOPs", ylabel="nats per token (any_order, 64 blocks)")
    axes.set_title("What is to be predicted does not depend on the time")
    axes.legend(frameon=False)


PLOTS = {"": draw}


def main(config):
    """Train, measure, print and write; returns the figures."""
    ctx = runs.Runs(config)
    data = ctx.text(config["data"])
    share = share_without_modulation(ctx.recipe(data, KEYS, config["flops"], 0))
    kinds = {PLAIN: (1, contextlib.nullcontext), TIMED: (share, timed)}
    folders = {kind: [] for kind in kinds}
    for seed in ctx.seeds:
        for kind, (part, within) in kinds.items():
            folders[kind].append(ctx.train(data, KEYS, part * config["flops"], seed, within))

    def measured(kind, other=False):
        once = lambda each: ctx.once(  # noqa: E731
            [each.name, data, config["eval_draws"], config["sequences"], other],
            lambda: bound(ctx, each, data, kind, other),
        )
        return [once(each) if each else None for each in folders[kind]]

    nats = {kind: measured(kind) for kind in kinds}
    nats["the same, told another draw's time"] = measured(TIMED, other=True)
    rows, figures = [], {"flops of a run": config["flops"]}
    for kind, values in nats.items():
        row = {"network": kind, "nats_per_token": runs.spelled(values, ".4f")}
        above = runs.minus(values, nats[PLAIN])
        row["minus_without"] = "" if kind == PLAIN else runs.spelled(above, "+.4f")
        done = [ctx.curve(each) for each in folders.get(kind, []) if each]
        seconds = [second for _, second in done]
        row["seconds_of_a_run"] = f"{statistics.mean(seconds):.0f}" if seconds else ""
        figures |= runs.flat(kind, done[0][0] if done else [])
        for seed, value in zip(ctx.seeds, values, strict=True):
            figures |= {} if value is None else {f"{kind}, seed {seed}": value}
        figures |= {f"{kind}, seconds": statistics.mean(seconds)} if seconds else {}
        rows.append(row)
    title = f"{data}, {config['flops']:.0e} training FLOPs a run, mean ± 95% of {ctx.all_seeds}"
    text = results.table(f"{title}; held-out text, the same blocks and draws", rows)
    gain = [papers.nats_above("SEDD-Scale", "t_dse", size) for size in ("small", "medium")]
    text += f"\nRADD's figure (tables 1, 2): with a time input (SEDD) {gain[0]:+.3f} (small) and "
    text += (
        f"{gain[1]:+.3f} (medium) nats per GPT-2 token above without (RADD-DSE), at equal steps;"
    )
    text += f" the modulation is {1 - share:.1%} of our FLOPs.\n"
    return ctx.write("time_independence", text, figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
