"""How a run begins: new, from other weights (init_from) or resumed; and how it is saved.

What determines the value of a key:

  model.DEFAULTS, the shape   the checkpoint, if there is one: the user may set no other value;
                              for a new network the command, then the dial (run/budget.py)
  RESUMED                     for a resumed run the checkpoint; the user may change the marked ones
  attention                   for a new network the objective
  block_size                  like the shape, but the user may change it with init_from, because
                              positions are rotary. For a new network the data: the width of
                              examples, the blocks that a text is laid out in, or the length of a
                              shorter text
  vocab_size, example_width, eos_id   the data; so is train_hash, as of the start of the run
  all others                  the command, then the preset, then the default: a resumed run may
                              change its recipe, and reports it. With another batch_size it
                              continues at the same place in the data (`ahead`)
"""

import contextlib
import math
from pathlib import Path

import torch

import diffusion
import model as network
from config import UserError, completed, plural, refuse_unused, require
from data import examples, loader
from data.tokenizer import lacks
from lib import files, parallel
from lib.entries import uses_p, uses_schedule
from lib.optim import LR_DECAYS
from lib.parallel import ANEW
from lib.stats import not_finite
from run import checkpoint, formats

# (what a key is for, a test of a config), and {key: (both, the value that has no effect)}
FULL = "networks with attention=full", lambda config: config["attention"] == "full"
IN_ORDER = "networks with attention=order", lambda config: config["attention"] == "order"
WITH_P = (
    "networks with attention=order and an order that it changes",
    lambda config: IN_ORDER[1](config) and uses_p(diffusion.ORDERS[config["order"]]),
)
WITH_TIME = (
    "objectives that draw a time",
    lambda config: uses_schedule(diffusion.OBJECTIVES[config["objective"]].draw),
)
MASKED = (
    "objectives that mask",
    lambda config: not diffusion.OBJECTIVES[config["objective"]].causal,
)
DECAYS = (
    "learning rates that decay",
    lambda config: LR_DECAYS[config["lr_decay"]](0.5) != LR_DECAYS[config["lr_decay"]](0.0),
)
USED_BY = {
    "prompt_drop": (*FULL, 0.0),
    "mask_rate": (*FULL, "uniform"),
    "loss_weight": (*FULL, "bound"),
    "order": (*IN_ORDER, "uniform"),
    "order_p": (*WITH_P, None),
    "schedule": (*WITH_TIME, None),
    "eval_draws": (*MASKED, None),
    "decay_start": (*DECAYS, None),
    "min_lr": (*DECAYS, 0.0),
    "decay_all": ("a weight_decay above 0", lambda config: config["weight_decay"] > 0, False),
}
# {key: whether the user may change it}, taken from the checkpoint by a resumed run, like the shape.
RESUMED = {"objective": False, "random_length": False, "mask_rate": True}
# The values with which older checkpoints, which lack these keys, were made.
OLDER = {"depth": 0, "init_from": "", "mask_rate": "uniform", "random_length": 0.0}


def checkpoint_path(config):
    return Path(config["out_dir"]) / "ckpt.pt"


def best_path(config):
    return Path(config["out_dir"]) / "best.pt"


def require_sound(config, sound, what):
    """Raise UserError unless `sound`; its message is `what` and the last good checkpoint."""
    path = checkpoint_path(config)
    last = f"the last good checkpoint is {path}" if path.is_file() else "nothing was saved before"
    require(sound, f"{what}; {last}")


@contextlib.contextmanager
def locked_out_dir(config, team):
    """Keep other runs out of out_dir during the block, and remove half-written files.

    The first process does so for all. Raises UserError in every process if another run uses the
    folder. A KeyboardInterrupt that ends the block says what was saved and how to resume.
    """
    refused = ""
    require(config["out_dir"], "say where the run is kept: --out_dir=FOLDER")
    with contextlib.ExitStack() as held:
        try:
            folder = Path(config["out_dir"])
            lock = files.only_one(folder, "out_dir", "ckpt.pt")
            if team.rank == 0 and held.enter_context(lock):
                files.sweep(folder, "*.pt", "log.jsonl", "trace.json")
        except UserError as error:
            refused = str(error)
        refused = parallel.gather(refused, team)[0]
        require(not refused, refused)
        try:
            yield
        except KeyboardInterrupt:
            path, also = checkpoint_path(config), "" if config["resume"] else " with --resume"
            message = "nothing was saved yet; the same command begins again"
            if path.is_file():
                message = f"{path} is as it was saved last; the same command{also} resumes it"
            raise KeyboardInterrupt(message) from None


def begin(config, team):
    """(config, state): the config of the run, and the state that it begins from.

    state is None for a new network; is_resumed tells a resumed run from weights (init_from).
    Raises UserError for settings that cannot be trained or are incompatible.
    """
    path, meta = checkpoint_path(config), loader.read_meta(config["data"])
    state, source = starting_point(config, path)
    if state and not is_resumed(state):
        add_character_rows(state, source, meta, team)
    config = network.PUBLISHED | with_size(config)
    config = with_saved(config, state, source) if state else config
    steps = parallel.gather(state["step"] if state else 0, team)
    message = f"the processes do not see the same {path}"
    require(len(set(steps)) == 1, f"{message}; out_dir must be a folder that all of them share")
    check(config)
    config = with_attention(with_data(config, state, source), state, source)
    return config, state


def say_changes(config, state):
    """Report the keys set by the user, now or before, that differ from the checkpoint."""
    before, keys = state["config"], {"block_size"}
    if is_resumed(state):
        keys = {*config.get("user_keys", ()), *before.get("user_keys", ())}
        keys -= {"init_from", "out_dir", "resume"}
    pairs = [(key, before[key], config[key]) for key in sorted(keys & before.keys())]
    changes = ", ".join(f"{key} {a} -> {b}" for key, a, b in pairs if a != b)
    if changes:
        print(f"other settings than in the checkpoint: {changes}")
    if loader.is_replaced(config["data"], config):
        warning = "which goes on with the new text, and may have learnt what is held out now"
        print(f"{config['data']} was prepared anew since the run began, {warning}")


def starting_point(config, path):
    """(state, its name) of the checkpoint `path` or of init_from; (None, "") for a new network."""
    if config["resume"] and path.is_file():
        try:
            return checkpoint.read(path), path
        except UserError as error:
            raise UserError(f"{error}{', or' if '; ' in str(error) else ';'} {ANEW}") from None
    older = checkpoint.kept_beside(path) if config["resume"] else {}
    if older:
        advice = f"copy {older[max(older)]} to {path} to resume, or {ANEW}"
        raise UserError(f"no {path}, but checkpoints of the run are beside it; {advice}")
    if not config["init_from"]:
        return None, ""
    model, _, saved = checkpoint.load(config["init_from"])
    state = {"config": saved, "tokenizer": saved["tokenizer"], "step": 0}
    return state | {"model": model.state_dict()}, config["init_from"]


def is_resumed(state):
    """Whether the state is that of a run to resume, and not just weights for a new one."""
    return bool(state) and "optimizer" in state


def add_character_rows(state, source, meta, team):
    """Add rows to the init_from network for characters that the data add to its alphabet.

    A new row starts as the mean of the others. data.tokenizer.named makes such alphabets.
    """
    old, current = state["tokenizer"], meta["tokenizer"]
    are_chars = old and old["kind"] == current["kind"] == "char"
    if not are_chars or not current["alphabet"].startswith(old["alphabet"]):
        return
    V, n = len(old["alphabet"]), len(current["alphabet"])
    for name in {"embed.weight", "unembed.weight", "unembed.bias"} & state["model"].keys():
        w = state["model"][name]  # (V + 1, D), (V or more, D) or (V or more,)
        new = w[:V].mean(0, keepdim=True).expand(n - V, *w.shape[1:])
        state["model"][name] = torch.cat([w[:V], new, w[V:]])
    state |= {"tokenizer": current, "config": state["config"] | {"vocab_size": n}}
    if n > V and team.rank == 0:
        new = current["alphabet"][V:]
        end = ", where '\\x00' is the end of an answer" if "\0" in new else ""
        print(f"{source} gets rows for {plural(n - V, 'new character')}: {new!r}{end}")


def with_size(config):
    """The config with the model keys of its `size`; UserError if the user set one differently."""
    shape = formats.size_config(config["size"]) if config["size"] else {}
    user_keys = config.get("user_keys", {})
    for key in (key for key in shape if key in user_keys):
        message = f"size {config['size']} has {key}={shape[key]}, not {config[key]}"
        require(config[key] == shape[key], message)
    return config | shape | {"user_keys": dict.fromkeys(shape, "--size") | user_keys}


def with_saved(config, state, source):
    """The config with the model keys of the state and, for a resumed run, those in RESUMED."""
    saved, resumed = OLDER | state["config"], is_resumed(state)
    keys, user_keys = {*network.DEFAULTS, *network.PUBLISHED, "depth"}, config.get("user_keys", {})
    if resumed:
        keys |= {key for key, free in RESUMED.items() if not (free and key in user_keys)}
    else:
        keys -= {"block_size"} & user_keys.keys()
    check_saved(config, saved, keys, source, resumed)
    return config | {key: saved[key] for key in keys}


def check_saved(config, saved, keys, source, resumed):
    """Raise UserError if the user set one of `keys` to another value than the checkpoint has.

    For a resumed run also if it did not begin with the given init_from, or if the data differ and
    no --out_dir was given: such a command means a new run and forgot to name its folder.
    """
    user_keys = config.get("user_keys", {})
    advice = ANEW if resumed else "init_from takes a model as it is"
    require(keys <= saved.keys(), f"{source} does not say how its model was made; {advice}")
    for key in (key for key in user_keys if key in keys):
        message = f"{source} was trained with {key}={saved[key]}, not {config[key]}"
        require(config[key] == saved[key], f"{message}; {advice}")
    message = f"{source} did not begin with init_from={config['init_from']}"
    require(not resumed or saved["init_from"] or not config["init_from"], f"{message}; {advice}")
    if resumed and "user_keys" in config and not user_keys.get("out_dir", "").startswith("--"):
        old, new = str(saved.get("data")), config["data"]
        require(Path(old) == Path(new), f"{source} has learnt from {old}, not {new}; {advice}")


def with_data(config, state, source):
    """The config with the keys that the data determine."""
    data, meta = config["data"], loader.read_meta(config["data"])
    width, eos_id = examples.layout(data, meta)
    resumed = is_resumed(state)
    if not (resumed or "block_size" in config.get("user_keys", {})):
        L, tokens = config["block_size"], meta["splits"].get("train", {"tokens": 1})["tokens"]
        length = max(width, L) if state else width or min(L, tokens)
        config = config | {"block_size": meta.get("block_size") or length}
    check_data(config, state, source, meta, width)
    same_data = resumed and state["config"].get("data") == data
    train_hash = (state["config"] if same_data else meta).get("train_hash")
    V = meta["vocab_size"]
    known = config["vocab_size"] in (V, network.DEFAULTS["vocab_size"])
    require(known, f"vocab_size comes from the data: {data} has {V}; leave it out")
    config = config | {"vocab_size": V, "train_hash": train_hash}
    return config | {"example_width": width, "eos_id": eos_id}


def check_data(config, state, source, meta, width):
    """Raise UserError if the data (examples of `width` tokens; 0: text) do not suit the config."""
    data, V = config["data"], meta["vocab_size"]
    if state:
        same_tokenizer = state["tokenizer"] in (None, meta["tokenizer"])
        message = f"{source} was trained with another tokenizer than {data} has"
        require(same_tokenizer, f"{message}; {tokenizer_advice(state, source, data, meta)}")
        message = f"{source} has a vocabulary of {config['vocab_size']}, {data} one of {V}"
        require(config["vocab_size"] == V, message)
    L, drop, cut = (config[key] for key in ("block_size", "prompt_drop", "random_length"))
    require(config["start_id"] <= V, f"start_id must be at most {V}, the mask")
    require(width or not drop, f"{data} is text without prompts, so prompt_drop must be 0")
    require(not (width and cut), f"{data} is examples with prompts, so random_length must be 0")
    require(width <= L, f"{data} has examples of {width} tokens, block_size is only {L}")


def tokenizer_advice(state, source, data, meta):
    """What to do if a checkpoint and the data have different tokenizers, in words."""
    prepare = f"prepare the data again with --tokenizer={source}"
    begin = f"begin from these weights: --init_from={source} --out_dir=ANOTHER"
    if not is_resumed(state):
        return prepare
    if state["config"].get("data") != data:
        return f"it has learnt from {state['config'].get('data')}; {ANEW}"
    known = state["tokenizer"] or {"kind": "unknown"}
    grown = known["kind"] == "char" and lacks(known, meta["tokenizer"])
    if grown and meta["tokenizer"]["alphabet"].startswith(known["alphabet"]):
        return f"the data also have {grown!r}; {begin}"
    return f"{prepare}, then {begin}"


def with_attention(config, state, source):
    """The config with the attention that its objective trains.

    Raises UserError if the checkpoint has or the user wants another one, and for a key on the
    command line that would change nothing (USED_BY).
    """
    objective, attention = config["objective"], config["attention"]
    choices, user_keys = diffusion.OBJECTIVES[objective].attention, config.get("user_keys", {})
    trains = f"trains a network with attention={' or '.join(choices)}"
    if state:
        message = f"{source} has attention={attention}, but {objective} {trains}"
        require(attention in choices, message)
    elif "attention" in user_keys:
        require(attention in choices, f"objective '{objective}' {trains}, not {attention}")
    elif attention not in choices:
        attention = choices[0]
    config = config | {"attention": attention}
    refuse_unused(config, USED_BY, config)
    return config


def check(config):
    """Raise UserError for impossible sizes (perhaps of a checkpoint) and probabilities."""
    completed(config, network)
    for key in ("n_layer", "n_embd", "block_size", "mlp_width", "batch_size"):
        require(config[key] <= 2**20, f"{key} must be at most {2**20}, not {config[key]}")
    is_chance = config["order"] != "mixture" or config["order_p"] <= 1
    require(is_chance, f"order_p must be in [0, 1] for a mixture, not {config['order_p']}")


def with_place_in_data(config, state, team):
    """The config with `ahead`, the sequences that a resumed run has seen beyond step * batch_size.

    This is not 0 once batch_size has changed. The first process reports what has changed. Raises
    UserError for a batch that cannot be divided among the processes.
    """
    B, world = config["batch_size"], team.world
    micro = config["micro_batch_size"] or max(1, B // world)
    parts = f"micro_batch_size {micro}" + (f" times {world} processes" if world > 1 else "")
    require(B % (world * micro) == 0, f"batch_size {B} must be a multiple of {parts}")
    if state and team.rank == 0:
        say_changes(config, state)
    if not is_resumed(state):
        return config | {"ahead": 0}
    step = state["step"]
    before = loader.sequences_before({"batch_size": B} | state["config"], step)
    return config | {"ahead": before - step * B}


def load_optimizers(optimizers, saved):
    """Load the optimizers' state from a checkpoint, but keep the settings of the config.

    Raises UserError if the state does not fit.
    """
    require(len(saved) == len(optimizers), f"a resumed run must keep its optimizer; {ANEW}")
    for optimizer, state in zip(optimizers, saved, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        now, before = ([g["params"] for g in each] for each in (groups, state["param_groups"]))
        require(now == before, f"a resumed run must keep decay_all; {ANEW}")
        parts = parallel.optimizer_parts(state["state"], optimizer)
        optimizer.load_state_dict({"state": parts, "param_groups": groups})


def save(config, tokenizer, clock, model, ema, optimizers, team):
    """Write the checkpoint, all processes together; UserError for weights that are not finite."""
    clock.look()
    optimizer = [optimizer.state_dict() for optimizer in optimizers]
    state = weights_of(config, tokenizer, clock, model, ema) | {"optimizer": optimizer}
    write(checkpoint_path(config), state, team, config["keep"])


def weights_of(config, tokenizer, clock, model, ema):
    """The state that every checkpoint of a run holds."""
    state = {"config": config, "tokenizer": tokenizer.meta(), "step": clock.step}
    state |= {key: getattr(clock, key) for key in checkpoint.COUNTS}
    return state | {"model": model.state_dict(), "ema": ema.state_dict() if ema else None}


def write(path, state, team, keep=1):
    """Gather a state, all processes together, and let the first of them write it to a file."""
    state = parallel.whole(state, keep=team.rank == 0)
    if team.rank == 0:
        sound = not not_finite(state["model"])
        what = f"the weights are not finite at step {state['step']}"
        require_sound(state["config"], sound, what)
        checkpoint.save(path, state, keep)
    parallel.gather(None, team)


def keep_best(config, tokenizer, log, model, ema, result, team):
    """Write out_dir/best.pt if its evaluation, a dict of report, is the lowest so far.

    This starts after one pass over the training text: no weights before that can have memorised
    it, and a large run, which reads nothing twice, saves the disk space.
    """
    nats = result["nats_per_token"]
    is_best = log.clock.tokens > log.tokens_per_epoch and nats < log.best[0]
    if parallel.gather(is_best, team)[0]:  # the first process knows what best.pt holds
        log.best = nats, log.clock.step
        state = weights_of(config, tokenizer, log.clock, model, ema)
        state |= {"optimizer": [], "nats_per_token": nats}
        write(best_path(config), state, team)


def best_of(config):
    """(nats per token of held-out text, step) of out_dir/best.pt; (inf, 0) if there is none."""
    path = best_path(config)
    if not path.is_file():
        return math.inf, 0
    state = checkpoint.read(path)
    nats = state.get("nats_per_token")
    require(type(nats) is float, f"{path} does not say how good it is: take it out of the folder")
    return nats, state["step"]
