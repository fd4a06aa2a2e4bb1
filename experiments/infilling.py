"""Filling gaps: is what is given kept, and what is the rest worth to who sees both sides?

    python -m data.text.prepare --input=TRAIN --val=HELD_OUT --tokenizer=byte --out=data/corpus
    python -m experiments.infilling

Four gaps in held-out text: its second half (prefix given), its first half (suffix given), its
middle half, and every other word. A masked model is trained on every set of visible tokens, so each
of these is a condition that it knows (RADD, arXiv 2406.03736, Theorem 1). Measured:

- what was given and has changed in the samples: asserted to be nothing
- the conditional bound, -log p(gap | rest) in nats per byte of the gap, by any_order inside the
  gap: position by position, and by how much of the text is visible
- ARM on the same bytes, each from all that is left of it, the true bytes of the gap included: its
  likelihood of a gap behind a prefix, and all that it can say of the others

Budget: 6 runs of 1e14 FLOPs, 6e14 in all, shared with zero_shot and orders: 60 minutes on two cores
with bfloat16 instructions. Minimum: --flops=3e13.
"""

import itertools
import sys
from functools import partial

import torch
from tqdm import tqdm

import config as settings
import diffusion
import sample
from experiments import orders, results, runs
from lib import fused, philox, program
from run import checkpoint

DEFAULTS = {
    "data": "data/corpus",  # a prepared folder of bytes
    "flops": 1e14,  # of a run
    "gap_draws": 16,  # of the corruption inside each gap; 2 or more
}

BINS, EXAMPLES = 8, 2  # of places and of visible shares; texts of each kind that are printed


# ---- Gaps ----------------------------------------------------------------------------------------


def every_other_word(x0):
    """True in the second, fourth ... word of each row of bytes (S, L); spaces stay."""
    space = (x0 == 32) | (x0 == 10)  # (S, L)
    begins = ~space & torch.cat([torch.ones_like(space[:, :1]), space[:, :-1]], dim=1)  # (S, L)
    return ~space & (begins.cumsum(1) % 2 == 0)


def halves(first, last):
    """The gap from a part of the block to another: x0 (S, L) -> (S, L) bool."""

    def gap(x0):
        place = (torch.arange(x0.shape[1]) + 0.5) / x0.shape[1]  # (L,)
        return ((place > first) & (place < last)).expand(x0.shape)

    return gap


GAPS = {
    "prefix given": halves(0.5, 1.0),
    "suffix given": halves(0.0, 0.5),
    "both ends given": halves(0.25, 0.75),
    "every other word given": every_other_word,
}


# ---- Measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def terms(ctx, model, x0, gap):
    """Draws of the bound on -log p(gap | rest): CE (R, L), nan where it is visible, weight (R,).

    x0, gap (S, L), no gap empty; R = S * gap_draws. The mean of weight * CE over the draws of a row
    is what each position adds to its bound.
    """
    draws, L = ctx.config["gap_draws"], x0.shape[1]
    x0, gap = x0.repeat_interleave(draws, 0), gap.repeat_interleave(draws, 0)  # (R, L) each
    row = torch.arange(len(x0))  # (R,)
    jitter = philox.uniforms(0, 1, (row // 2).tolist(), 1).squeeze(1)  # (R,)
    u = diffusion.stratified(jitter, row % draws, draws)  # (R,) over the draws of a block
    noise = philox.uniforms(0, 0, row.tolist(), L).masked_fill(~gap, torch.inf)  # (R, L)
    mask, weight = diffusion.any_order(u, noise, gap.sum(1), None)  # (R, L), (R,)
    ce = torch.full((len(x0) * L,), torch.nan)
    for rows in tqdm(row.split(64), leave=False, disable=None):
        idx = fused.masked_indices(mask[rows])  # (n,)
        x = torch.where(mask[rows], model.mask_id, x0[rows])  # (b, L)
        target = x0[rows].flatten()[idx].to(ctx.device)  # (n,)
        with ctx.autocast():
            h = model.hidden(x.to(ctx.device), idx.to(ctx.device))  # (n, D)
            _, _, each = diffusion.cross_entropy(model, h, target, h.new_ones(len(h)))  # (n,)
        ce[rows[0] * L + idx] = each.float().cpu()
    return ce.view(-1, L), weight.float()


@torch.no_grad()
def left_terms(ctx, model, x0):
    """CE of each byte by an ARM, from all that is left of it: x0 (S, L) -> (S, L)."""
    x = torch.cat([torch.full_like(x0[:, :1], model.start_id), x0[:, :-1]], dim=1)  # (S, L)
    parts = []
    for now, target in zip(x.split(64), x0.split(64), strict=True):
        with ctx.autocast():
            h = model.hidden(now.to(ctx.device)).flatten(0, 1)  # (b*L, D)
            w, flat = h.new_ones(len(h)), target.flatten().to(ctx.device)  # (b*L,) each
            _, _, ce = diffusion.cross_entropy(model, h, flat, w)
        parts.append(ce.view(target.shape).float().cpu())
    return torch.cat(parts)


def binned(values, where):
    """Means of values (n,) in BINS equal parts of [0, 1], by `where` (n,); None: an empty one."""
    bins = (where * BINS).long().clamp(max=BINS - 1)  # (n,)
    return [float(values[bins == i].mean()) if (bins == i).any() else None for i in range(BINS)]


def measured(ctx, folders, name):
    """Nats per byte of a gap by one seed's MDM and ARM: in all, by place, by what is visible."""
    mdm, arm = (checkpoint.load(folder, ctx.device)[0] for folder in folders)
    x0 = ctx.blocks(ctx.config["data"], mdm.block_size)  # (S, L)
    gap = GAPS[name](x0)  # (S, L)
    x0, gap = x0[gap.any(1)], gap[gap.any(1)]  # (S, L) each
    ce, weight = terms(ctx, mdm, x0, gap)  # (R, L), (R,)
    bound = (weight[:, None] * ce).nan_to_num(0.0)  # (R, L)
    bound = bound.view(len(x0), -1, x0.shape[1]).mean(1)  # (S, L)
    left = left_terms(ctx, arm, x0)  # (S, L)
    place = ((torch.arange(x0.shape[1]) + 0.5) / x0.shape[1]).expand(gap.shape)  # (S, L)
    masked = ~ce.isnan()  # (R, L)
    visible = (~masked).float().mean(1, keepdim=True).expand(ce.shape)  # (R, L)
    return {
        "MDM": float(bound.sum() / gap.sum()),
        "ARM": float(left[gap].mean()),
        "MDM by place": binned(bound[gap], place[gap]),
        "ARM by place": binned(left[gap], place[gap]),
        "MDM by visible share": binned(ce[masked], visible[masked]),
        "ARM by visible share": binned(left[gap], place[gap]),
    }


def filled(ctx, folder, name):
    """{"given": bytes, "changed": of them, "examples"}: samples fill the gap of 16 blocks."""
    model, tokenizer, _ = checkpoint.load(folder, ctx.device)
    x0 = ctx.blocks(ctx.config["data"], model.block_size)[:16]  # (N, L)
    gap, changed = GAPS[name](x0), 0  # (N, L)
    x = torch.where(gap, model.mask_id, x0).to(ctx.device)  # (N, L)
    samplers = ("confidence", "ancestral")
    for sampler in samplers:
        keys = {"sampler": sampler, "steps": 64, "seed": ctx.config["seed"]}
        with ctx.autocast():
            tokens = sample.sample(model, x, **keys)[0].cpu()  # (N, L)
        changed += int((tokens != x0)[~gap].sum())
        assert changed == 0 and not (tokens == model.mask_id).any(), (
            f"{sampler} broke what is given"
        )
    texts = []
    for ids, hole in list(zip(tokens.tolist(), gap.tolist(), strict=True))[:EXAMPLES]:
        groups = itertools.groupby(zip(ids, hole, strict=True), lambda pair: pair[1])
        parts = [(inside, tokenizer.decode([i for i, _ in part])) for inside, part in groups]
        texts.append("".join(f"[{part}]" if inside else part for inside, part in parts))
    return {"given": len(samplers) * int((~gap).sum()), "changed": changed, "examples": texts}


# ---- The report ----------------------------------------------------------------------------------


def by_bins(by_name, what, head):
    """Rows of means over seeds, a column for each bin: {gap: [measured of a seed]}."""
    rows = []
    for name, seeds in by_name.items():
        for kind in ("MDM", "ARM"):
            row = {"gap": name, "model": kind}
            for i, part in enumerate(
                zip(*(each[f"{kind} by {what}"] for each in seeds), strict=True)
            ):
                known = [value for value in part if value is not None]
                label = f"{head} {i / BINS:.3g}-{(i + 1) / BINS:.3g}"
                row[label] = f"{sum(known) / len(known):.3f}" if known else ""
            rows += [row] if seeds else []
    return rows


def draw(axes, figures):
    """Nats of a byte by where it is, a field for each gap: MDM dark, ARM light."""
    figure = axes.figure
    axes.remove()
    fields = figure.subplots(1, len(GAPS), sharey=True)
    for field, name in zip(fields, GAPS, strict=True):
        for kind, style in (("MDM", "o-"), ("ARM", "s--")):
            key = f"{name}, {kind}, at "
            points = {float(k.removeprefix(key)): v for k, v in figures.items() if key in k}
            color = results.DARK if kind == "MDM" else results.LIGHT
            field.plot(points.keys(), points.values(), style, color=color, markersize=4, label=kind)
        field.set(xlabel="place in the block", xlim=(0, 1), title=name)
    fields[0].set_ylabel("nats per byte of the gap")
    fields[0].legend(frameon=False)


PLOTS = {"": draw}


def main(config):
    """Train, fill, measure; print, write and return the figures."""
    ctx = runs.Runs(config)
    ctx.config = config = config | {"data": ctx.text(config["data"])}
    folders = orders.pair(ctx, config["data"], config["flops"])
    pairs = [pair for pair in zip(*folders.values(), strict=True) if None not in pair]
    rows, figures, by_name, examples = [], {"flops of a run": config["flops"]}, {}, ""
    for name in GAPS:
        parts = [config["data"], name, config["gap_draws"], config["sequences"]]
        each = [
            ctx.once(
                [*(folder.name for folder in pair), *parts], partial(measured, ctx, pair, name)
            )
            for pair in pairs
        ]
        by_name[name] = [part for part in each if part]
        fill = {"given": "left out", "changed": "left out", "examples": []}
        if pairs:
            key = [pairs[0][0].name, *parts, "filled"]
            fill = ctx.once(key, partial(filled, ctx, pairs[0][0], name)) or fill
        nats = {kind: [part[kind] for part in by_name[name]] for kind in ("MDM", "ARM")}
        row = {"gap": name} | {f"{kind}_nats_per_byte": runs.spelled(nats[kind]) for kind in nats}
        row["MDM_minus_ARM"] = runs.spelled(runs.minus(nats["MDM"], nats["ARM"]), "+.3f")
        rows.append(row | {"bytes given": str(fill["given"]), "changed": str(fill["changed"])})
        for kind, values in nats.items():
            figures |= {f"{name}, {kind}, {i}": value for i, value in enumerate(values)}
            for i, part in enumerate(
                zip(*(z[f"{kind} by place"] for z in by_name[name]), strict=True)
            ):
                if None not in part:
                    figures[f"{name}, {kind}, at {(i + 0.5) / BINS}"] = sum(part) / len(part)
        examples += "".join(f"\n{name}:\n\n```\n{text}\n```\n" for text in fill["examples"])
    title = f"Bytes of a gap given the rest (ARM: given what is left of each), {config['data']}, "
    title += f"{config['flops']:.0e} training FLOPs a run, mean ± 95% of {ctx.all_seeds}"
    text = results.table(title, rows)
    if any(by_name.values()):
        table = by_bins(by_name, "place", "at")
        text += "\n" + results.table("The same by where in the block a byte is", table)
        title = "Nats of a masked byte by the share of the block that is visible to the model"
        text += "\n" + results.table(title, by_bins(by_name, "visible share", "seen"))
    return ctx.write("infilling", text + examples, figures, PLOTS)


if __name__ == "__main__":
    program.run(main, settings, results, runs, sys.modules[__name__])
