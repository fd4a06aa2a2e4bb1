"""What a training step learns from: blocks of text, or rows with a prompt and an answer, with what noise hides of them.

A batch is a pure function of (seed, step, place in the global batch), so the number of processes, the micro-batch and a
restart do not change it.
"""

import torch

import diffusion
import likelihood
from config import require
from data import loader, rows


def fit_data(config, meta, state, source):
    """The config for the data of a meta.json; UserError where the two do not go together.

    row_width and row_end are those of a set of rows, 0 and -1 for text. A new network gets the width of its rows as its
    block_size, unless the user gave one.
    """
    data, V = config["data"], meta["vocab_size"]
    width, end = rows.layout(data, meta)
    if state:
        known = state["tokenizer"] in (None, meta["tokenizer"])
        require(known, f"{source} was trained with another tokenizer than {data} has")
        require(config["vocab_size"] == V, f"{source} has a vocabulary of {config['vocab_size']}, {data} one of {V}")
    elif width and "block_size" not in config.get("given", ()):
        config |= {"block_size": width}
    require(config["start_id"] <= V, f"start_id must be at most {V}, the mask")
    require(width or not config["prompt_drop"], f"{data} is text without prompts, so prompt_drop must be 0")
    require(not (width and config["random_length"]), f"{data} is rows with prompts, so random_length must be 0")
    require(width <= config["block_size"], f"{data} has rows of {width} tokens, block_size is only {config['block_size']}")
    causal = config["objective"] == "ar"
    return config | {"vocab_size": V, "causal": causal, "row_width": width, "row_end": end}


def read_data(config, meta, text):
    """(training blocks or rows, held-out requests, how many tokens of each count, bytes of text for each of these).

    A request is (prompt ids, answer ids) for likelihood.answer_nats. A block is an answer to nothing.
    """
    data, L = config["data"], config["block_size"]
    skip = int(config["causal"] and text.bos == config["start_id"])  # the network brings the bos that a row begins with
    if config["row_width"]:
        blocks = rows.Rows(data, "train", config["seed"], skip)
    else:
        blocks = loader.Blocks(loader.Tokens(data, "train"), L, config["seed"])
    return blocks, *held_out(data, meta, "val", L, config["eval_sequences"], config["causal"], skip)


def held_out(data, meta, split, L, n, causal, skip=0):
    """(requests, how many tokens of each count, bytes of text for each of these): n of a split, evenly spread, 0 for all."""
    if rows.layout(data, meta)[0]:
        found = rows.Rows(data, split, skip=skip)
        requests, counts = found.requests(n, padding=not causal)
        size = found.counted(range(found.n), padding=False).sum()
    else:
        tokens = loader.Tokens(data, split)
        requests = [(block[:0], block) for block in likelihood.spread(loader.in_order(tokens, L), n)]
        counts, size = [len(block) for _, block in requests], len(tokens)
    return requests, counts, meta["splits"][split]["bytes"] / size


def make_batch(config, blocks, step, position):
    """Rows `position` of the global batch of `step`: (x0 (b, L), mask (b, L), weight (b,), rows (N,)), on the CPU.

    The weight is that of training: a hidden token may count otherwise than in the bound, which has the same optimum and,
    in practice, less noise. Evaluation always weighs as the bound does.
    """
    if isinstance(blocks, rows.Rows):
        return make_row_batch(config, blocks, step, position)
    x0 = torch.from_numpy(blocks.batch(step, position, config["batch_size"]))  # (b, block_size)
    coin, length = diffusion.uniforms(config["seed"], step, [2**62], 2)[0].tolist()  # one draw for the whole step
    if coin < config["random_length"]:
        x0 = x0[:, : 1 + int(length * x0.shape[1])]  # (b, L)
    if config["objective"] == "ar":
        return (x0,)
    schedule = diffusion.SCHEDULES[config["schedule"]]
    arguments = (config["objective"], config["seed"], step, position, config["batch_size"], x0.shape[1])
    mask, weight = diffusion.training_mask(*arguments, schedule)  # (b, L), (b,)
    constant = config["objective"] == "any_order" and len(position) % 2 == 0  # a pair hides L + 1 positions
    hidden = diffusion.hidden_rows(mask, multiple=16 if constant else 128)  # (N,)
    return x0, mask, training_weight(config, weight).float(), hidden


def training_weight(config, weight):
    """What training weighs a hidden token with, where the bound has `weight` (b,)."""
    if config["loss_weight"] == "constant":
        return torch.full_like(weight, 2.0)
    return weight if config["loss_weight"] == "bound" else 2 * weight.sqrt()


def make_row_batch(config, found, step, position):
    """make_batch for rows with prompts: only what follows a prompt counts, for ar only up to the first end mark.

    The weight is (b, L). It makes the loss the mean over what can count in the whole global batch, as SMDM has it (arXiv
    2410.18514), however the batch is shared out. A dropped prompt is hidden and does not count: each row by its own coin.
    """
    B, causal = config["batch_size"], config["objective"] == "ar"
    x0, prompt, length = map(torch.from_numpy, found[found.index(step, position, B)])  # (b, L), (b,), (b,)
    L, place = x0.shape[1], torch.arange(x0.shape[1])  # (L,)
    if causal:
        mask, weight = (place >= prompt[:, None]) & (place < length[:, None]), torch.ones(len(x0))  # (b, L), (b,)
    else:
        arguments = (config["objective"], config["seed"], step, position, B, L, diffusion.SCHEDULES[config["schedule"]])
        mask, weight = diffusion.training_mask(*arguments, prompt)  # (b, L), (b,)
        weight = training_weight(config, weight)
    total = found.counted(found.index(step, range(B), B), padding=not causal).sum()  # of the global batch
    weight = (weight * B * L / total)[:, None] * mask  # (b, L)
    coin = diffusion.uniforms(config["seed"], step, [2**61 + p for p in position], 1)  # (b, 1)
    dropped = (coin < config["prompt_drop"]) & (place < prompt[:, None])  # (b, L)
    return x0, mask | dropped, weight.float(), diffusion.hidden_rows(mask, multiple=128)
