r"""Coarse noise passes for quality: float32 Gumbel noise anneals a sampler (arXiv 2409.02908).

    python train.py configs/pydocs_2400.py --objective=ar --out_dir=out/pydocs_ar     the judge
    python -m experiments.annealing                           --ckpt= for the exact part alone

With GPT-2's vocabulary, where float32 shows it too:

    python -m data.pydocs.prepare --out=data/bpe --tokenizer=gpt2
    python train.py configs/pydocs_2400.py --data=data/bpe --out_dir=out/bpe --block_size=64 \
        --n_layer=3 --max_iters=250
    python train.py configs/pydocs_2400.py --data=data/bpe --out_dir=out/bpe_ar --block_size=64 \
        --n_layer=3 --max_iters=200 --objective=ar
    python -m experiments.annealing --ckpt=out/bpe --judge=out/bpe_ar --data=data/bpe \
        --steps=1024 --num_samples=16 --results=experiments/results/bpe

The textbook sampler takes n steps, and in each draws every masked position from one categorical
over V tokens and the mask: token v with chance p_v / (steps left), the mask with the rest (`direct`
in RADD's code; SEDD and MDLM do the same). It draws by the Gumbel-max trick: the largest p / -log u
wins, u uniform. In float32 u is a multiple of 2^-24 below 1. So -log u is 2^-24 or more (Gumbel
noise, -log -log u, is 16.6 or less) and a token's score 2^24 p_v / (steps left) or less, while the
mask, whose chance is near 1, scores about 1. A token whose p_v is below (steps left) / 2^24 cannot
be drawn, whatever the noise: with many steps that is the tail of the vocabulary. What is left has
less entropy, and comes later than it should. Generative perplexity falls, and falls with the number
of steps, because the text gets poorer. RADD's table 4 (float32) has 22 at 4096 steps with an
entropy of 7.27, its table 3 (float64) 81 with 8.13.

Part 1 is exact: the law of the first step's draw on a Zipf law, by arithmetic. How often a token is
unmasked, what entropy it has, and how much of the mass belongs to tokens that come up less than
half as often as they should. So it says where the effect begins: a vocabulary of characters does
not show it in float32, one of GPT-2's size does from a few dozen steps on.
Part 2 lets a trained model write, with noise of 53, 24, 11 and 8 bits and nothing else different,
and judges what it wrote. float64 is sample.py as it is, whose draw inverts the distribution
function in float64 and loses no tail.
"""

import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import config as settings
import evaluate
import sample
from config import plural, require
from evals import quality
from experiments import results
from lib import program
from lib.stats import finite, plus_minus
from run.subject import load_evaluable

DEFAULTS = {
    "ckpt": "out/pydocs",  # a masked model that writes; empty: the exact part alone
    "judge": "out/pydocs_ar",  # who judges it: see evals/quality.py
    "data": "data/pydocs",  # a prepared folder; its val text is judged beside the samples
    "steps": 4096,  # the most sampling steps, 16 or more; then a quarter, and so on down to 16
    "num_samples": 32,  # for each dtype and number of steps; 2 or more
    "batch_size": 32,  # sequences in one network call; 1 or more
}

TINY = 1e-10  # keeps log(u) finite at u = 0, as in the published codes
BITS = {"float32": 24, "float16": 11, "bfloat16": 8}  # u is a multiple of 2^-bits
VOCABULARIES = [104, 4096, 50257]  # the demo's characters, something between, GPT-2's tokens


# ---- 1. The law of a draw, exactly ---------------------------------------------------------------


def zipf(V, alone=32, growth=1.1):
    """A Zipf law p ~ 1/rank, the first ranks alone, then in bins.

    -> p of one token (G,), tokens in the bin (G,).
    """
    edges = list(range(1, min(alone, V) + 1))
    while edges[-1] <= V:
        edges.append(min(V + 1, int(edges[-1] * growth) + 1))
    weight = np.add.reduceat(1 / np.arange(1, V + 1), np.array(edges[:-1]) - 1)  # (G,)
    count = np.diff(edges)  # (G,)
    return weight / count / weight.sum(), count


def draw_law(p, count, bits):
    """Chance (G,) that an outcome of each bin has the largest p / E, E = -log(u + TINY).

    p, count (G,). u = 1 - k 2^-bits with k = 1..2^bits, each as likely, so E rises with k. A bin's
    best outcome is the one with the least k; it wins if all others have p / E below its own. 24
    bits are too many to sum one by one: from k = 128 on they come in blocks of 1%, in whose middle
    E is taken. Outcomes of one bin share its chance.
    """
    size = 2.0**bits
    k = list(range(1, 129 if bits > 16 else int(size) + 2))
    while k[-1] <= size:
        k.append(min(size + 1, math.ceil(k[-1] * 1.01)))
    first, stop = np.array(k[:-1], float), np.array(k[1:], float)  # (K,) blocks first <= k < stop
    E = -np.log(1 - (first + stop - 1) / 2 / size + TINY)  # (K,)
    won = np.zeros(len(p))
    with np.errstate(divide="ignore"):
        none_before, none_in = np.log1p(-(first - 1) / size), np.log1p(-(stop - 1) / size)  # (K,)
        for g in range(len(p)):
            # (K,) chance that the bin's least k is in the block
            least = np.exp(count[g] * none_before) - np.exp(count[g] * none_in)
            limit = E[:, None] * p / p[g]  # (K, G) another outcome loses if its E is above
            below = np.minimum(np.floor(size * -np.expm1(-limit)), size - 1)  # (K, G)
            over = np.where(limit < -math.log(TINY), below, size)  # (K, G)
            others = count * np.log1p(-over / size)  # (K, G)
            others[:, g] = 0
            won[g] = (least * np.exp(others.sum(1))).sum()
    return won


def first_step(V, steps, bits):
    """What the first of n steps does to a Zipf law of V tokens: a dict of numbers.

    unmasked: the chance that a token is unmasked, over the right one, 1/n. lost: the mass of tokens
    that come up less than half as often as they should. entropy: of the token unmasked, in nats, 0
    where none is.
    """
    p, count = zipf(V)
    won = draw_law(np.append(p / steps, 1 - 1 / steps), np.append(count, 1), bits)[:-1]  # (G,)
    share = won / max(won.sum(), 1e-300) / count  # (G,) of one token, given that one is unmasked
    return {
        "unmasked": float(won.sum() * steps),
        "lost": float((p * count)[won * steps < p * count / 2].sum()),
        "entropy": abs(float((count * share * np.log(np.maximum(share, 1e-300))).sum())),
    }


def onset(V, bits):
    """The fewest steps, a power of two up to 2^bits, whose first one loses 1% of the mass."""
    steps = (2**j for j in range(1, bits + 1))
    return next((n for n in steps if first_step(V, n, bits)["lost"] > 0.01), 2**bits)


def exact_part(vocabularies, steps):
    """(rows of the table, flat figures) of first_step for each dtype, V and number of steps."""
    rows, figures = [], {}
    for name, bits in tqdm(BITS.items(), "exact laws", disable=None, leave=False):
        for V in vocabularies:
            p, count = zipf(V)
            begins = onset(V, bits)
            row = {
                "noise": name,
                "V": V,
                "1% lost from": f"{begins:,} steps",
                "right entropy": -(count * p * np.log(p)).sum(),
            }
            figures[f"{name}, V {V}, steps that lose 1%"] = begins
            for n in steps:
                law = first_step(V, n, bits)
                row[f"n = {n}"] = f"{law['entropy']:.2f}, {law['unmasked']:.2f}, {law['lost']:.0%}"
                figures |= {f"{name}, V {V}, {n} steps, {key}": value for key, value in law.items()}
            rows.append(row)
    return rows, figures


# ---- 2. The textbook sampler ---------------------------------------------------------------------


def gumbel_max(p, chance, dtype, generator):
    """Draw from chance * p (n, V) and the mask, 1 - chance: (n,) tokens, V for the mask.

    u has the dtype. Exactly the argmax of p / -log(u + TINY); a token that could not beat the mask
    with the best u there is gets none, and these are most of a large vocabulary: the artefact saves
    us the time. Equal scores go to the first, as in argmax.
    """
    (n, V), device = p.shape, p.device
    wide = torch.promote_types(dtype, torch.float32)  # u alone is coarse, what follows is not

    def noise(n):
        u = torch.rand(n, dtype=dtype, device=device, generator=generator)  # (n,)
        return -(u.to(wide) + TINY).log()

    least = 0.999 * torch.finfo(dtype).eps / 2  # below -log of the largest u
    mask_score = (1 - chance) / noise(n)  # (n,)
    can_win = p >= (mask_score * (least / chance)).to(p)[:, None]  # (n, V)
    row, token = can_win.nonzero(as_tuple=True)  # (c,) each
    score = p[row, token].to(wide) * chance / noise(len(row))  # (c,)
    best = mask_score.scatter_reduce(0, row, score, "amax")  # (n,)
    wins = score == best[row]  # (c,)
    none = torch.full((n,), V, device=device)  # (n,)
    return none.scatter_reduce(0, row[wins], token[wins], "amin")


@torch.no_grad()
def textbook(model, x, steps, dtype, seed=0, batch_size=32):
    """Fill every mask_id of x (N, L) in `steps` log-linear steps.

    -> tokens (N, L), network calls of each sequence (N,). A sequence goes through the network again
    only when a token of it was unmasked: p does not change otherwise.
    """
    (N, L), V, device = x.shape, model.vocab_size, x.device
    x, p = x.clone(), torch.empty(N, L, V, device=device)  # (N, L), (N, L, V)
    generator = torch.Generator(device).manual_seed(seed)
    stale, nfe = torch.ones(N, dtype=torch.bool, device=device), torch.zeros(N, dtype=torch.long)
    for left in tqdm(range(steps, 0, -1), unit="step", disable=None, leave=False):
        for rows in stale.nonzero().flatten().split(batch_size) if stale.any() else []:  # (b,)
            p[rows] = model(x[rows]).float().softmax(-1)
            nfe[rows.cpu()] += 1
        masked_idx, before = (x == model.mask_id).flatten().nonzero().flatten(), x.clone()  # (n,)
        for piece in masked_idx.split(256):
            drawn = gumbel_max(p.view(-1, V)[piece], 1 / left, dtype, generator)  # V is the mask
            x.view(-1)[piece] = drawn
        stale = (x != before).any(1) & (x == model.mask_id).any(1)  # (N,)
    finite(p.amax(-1), "probabilities of the likeliest token")
    return x, nfe


def write_text(config, subject, noise, steps):
    """(tokens (N, L), network calls (N,)) of num_samples free samples."""
    model, shape = subject.model, (config["num_samples"], subject.model.block_size)
    x = torch.full(shape, model.mask_id, device=model.device)  # (N, L)
    options = {"seed": config["seed"], "batch_size": config["batch_size"]}
    with subject.autocast():
        if noise != "float64":
            return textbook(model, x, steps, getattr(torch, noise), **options)
        tokens, info = sample.sample(model, x, steps=steps, **options)
    return tokens, info["nfe"]


def trained_part(config, steps):
    """(rows of the table, figures) of samples by ckpt."""
    judge = quality.open_judge(quality.DEFAULTS | config)
    subject = load_evaluable(evaluate.DEFAULTS | config, reads_text=True)
    require(not subject.causal, f"{config['ckpt']} is causal: it has no mask to draw")
    rows, figures = [], {}

    def put(noise, n, nfe, records):
        measures, _ = quality.measure(records, judge)
        row = {"noise": noise, "steps": n, "NFE": nfe}
        for name in ("generative perplexity", "entropy, nats", "distinct-2", "repetition"):
            value, error = measures[name]
            row[name] = f"{value:.4g}{plus_minus(error, '.2g', '±')}"
            figures[f"{noise}, {n} steps, {name}"] = value
            figures[f"{noise}, {n} steps, {name}, error"] = error
        rows.append(row)

    for noise in ["float64", *BITS]:
        for n in steps:
            tokens, nfe = write_text(config, subject, noise, n)
            texts = [(subject.tokenizer.decode(row), row) for row in tokens.tolist()]
            records = [{"text": text, "tokens": row} for text, row in texts]
            put(noise, f"{n}", f"{nfe.double().mean():.1f}", records)
    put("held-out text", "", "", quality.reference_records(config["data"], records))
    return rows, figures


def draw(axes, figures):
    """Entropy of samples by steps: a line for each dtype of the noise, held-out text beside."""
    keys = [key for key in figures if key.endswith(" steps, entropy, nats")]
    steps = sorted({int(n) for key in keys if (n := key.split(", ")[1].split()[0]) != "steps"})
    styles, ends = ["o-", "s--", "^-.", "D:"], {}
    for noise, style in zip(("float64", "float32", "float16", "bfloat16"), styles, strict=True):
        names = [f"{noise}, {n} steps, entropy, nats" for n in steps]
        y, errors = ([figures[name + end] for name in names] for end in ("", ", error"))
        half = [1.96 * error for error in errors]
        axes.errorbar(steps, y, half, fmt=style, color=results.DARK, capsize=2)
        perplexity = figures[f"{noise}, {steps[-1]} steps, generative perplexity"]
        ends[f"{noise} noise: {perplexity:.1f}"] = steps[-1], y[-1]
    text = "held-out text,  steps, "
    height, perplexity = figures[f"{text}entropy, nats"], figures[f"{text}generative perplexity"]
    axes.plot([steps[0], steps[-1]], [height, height], color="black", linewidth=0.8)
    ends[f"held-out text: {perplexity:.1f}"] = steps[-1], height
    axes.set(xscale="log", xlabel="sampling steps", ylim=(0, height + 0.5))
    axes.set_ylabel("entropy of a sample's tokens, nats; 95% intervals")
    axes.set_xticks(steps, [f"{n:,}" for n in steps])
    axes.minorticks_off()
    axes.set_title("Coarse noise makes the text poorer, and its perplexity (the numbers) lower")
    results.name_ends(axes, ends)


PLOTS = {"": draw}


def main(config):
    """The exact table and samples of the checkpoint; writes and returns the figures."""
    began = time.time()
    most = min(64, config["steps"]) if config["quick"] else config["steps"]
    steps = [most // 4**i for i in range(10) if most >= 16 * 4**i][::-1]
    vocabularies = VOCABULARIES[:1] if config["quick"] else VOCABULARIES
    config |= {"num_samples": min(4, config["num_samples"])} if config["quick"] else {}
    rows, figures = trained_part(config, steps) if config["ckpt"] else ([], {})
    exact, more = exact_part(vocabularies, steps)

    title = "First of n steps on a Zipf law: entropy of the token unmasked, "
    title += "its chance over the right one, mass that is lost"
    text = results.table(title, exact, {"right entropy": "{:.2f}"})
    if rows:
        title = f"{plural(config['num_samples'], 'sample')} of {config['ckpt']}, "
        title += f"judged by {config['judge']}"
        text += "\n" + results.table(f"{title} (± one standard error)", rows)
    figures |= more | results.about(torch.device("cpu")) | {"seconds": time.time() - began}
    figures |= {key: config[key] for key in ("ckpt", "judge", "num_samples", "seed")}
    results.write(config, "annealing", figures, text, PLOTS if rows else None)
    print(text)
    return figures


if __name__ == "__main__":
    program.run(main, settings, results, sys.modules[__name__])
