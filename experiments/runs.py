"""Trained networks that experiments share: each is trained once, kept, and measured once.

    runs = Runs(config)                        config has the keys of settings and of this module
    folder = runs.train(data, {"objective": "ar"}, flops=1e13, seed=1337)
    nats = runs.nats(folder, data)             per token, on the held-out blocks

- A run is what train.py makes of the preset, keys over it, training FLOPs and a seed. Its folder in
  `runs` is named after all that matters to it, so experiments find each other's. A stopped one
  resumes, a finished one is kept: who kills an experiment loses a third of a training at most.
- `minutes` is for all that is missing. A training that would not end in three quarters of it is not
  begun, and no measurement after it: train, nats and once then return None, `spelled` says "left
  out", and the table ends with what is missing. So the slower a machine, the fewer runs, each of
  the FLOPs that are asked for. To go on, give the same command again.
- FLOPs are those of lib/device.flops_per_token: the matrix products, attention included.
- Under torchrun all processes train each run together; the first one decides, measures and writes.
- once(parts, function) keeps any other result that is plain JSON, beside the runs.
- A script has the keys of settings, results and this module beside its own, which say its `data`
  and `flops`; it plans its trainings seed by seed, so that what is left out is a seed, and ends
  with runs.write(name, text, figures, PLOTS). Any key of train.py can differ between runs (n_embd,
  batch_size, dropout, init_from); what is no key is a `within` (time_independence.py).
- --quick trains for 60 steps of a tiny network on the texts of this repository.
"""

import contextlib
import io
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import config as settings
import diffusion
import evaluate
import model as network
import train
from data import loader, tokenizer, writer
from experiments import results
from lib import device, parallel, philox
from lib.device import matmul_flops
from lib.files import to_json
from lib.stats import mean_half
from run import checkpoint

DEFAULTS = {
    "preset": "configs/pydocs_2400.py",  # the recipe that runs change
    "runs": "out/runs",  # every run has a folder here, whichever experiment has asked for it
    "minutes": 60.0,  # for what is not there yet; what does not fit is left out
    "seeds": 3,  # 1337, 1338, ...; 1 or more
    "sequences": 512,  # held-out blocks of an evaluation, evenly spaced; 0: all
}

ROOT = Path(__file__).resolve().parent.parent
QUICK_STEPS = 60
QUICK = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 32, "batch_size": 8}  # at most
# The two families at one size, on longer blocks than the demo's: experiments share these runs.
PAIR = {
    "MDM": {"objective": "any_order", "block_size": 256, "batch_size": 16},
    "ARM": {"objective": "ar", "block_size": 256, "batch_size": 16},
}
POINTS = 3  # checkpoints of a run that are kept: after each third
# Keys that do not change the weights.
SIDE = {"out_dir", "user_keys", "device", "compile", "show_sample", "save_interval", "keep"}
SIDE |= {"eval_interval", "eval_sequences", "eval_draws", "micro_batch_size"}


def step_flops(config):
    """Operations of a training step on text: lib.device.step_flops of a network not made."""
    with torch.device("meta"):
        model = network.make_network(config)
    return device.step_flops(model, config["batch_size"], config["block_size"])


@contextlib.contextmanager
def independent_draws(yes=True):
    """Inside the block every sequence draws its own u, as codes without stratification do."""
    stratified = diffusion.stratified

    def own(jitter, position, _):
        return 1 - philox.uniforms(int(jitter[0] * 2**53), 0, position, 1).squeeze(1)  # (B,)

    diffusion.stratified = own if yes else stratified
    try:
        yield
    finally:
        diffusion.stratified = stratified


def spelled(values, form=".3f"):
    """The mean over some seeds and half of its 95% interval, as text; None is a seed left out."""
    values = [value for value in values if value is not None]
    if not values:
        return "left out"
    mean, half = mean_half(values)
    few = {1: " (one seed)", 2: " (two seeds)"}  # which have no interval
    interval = f" ± {half:{form.lstrip('+')}}"
    return f"{mean:{form}}{few.get(len(values), interval)}"


def minus(values, others):
    """Differences of seeds that both have: their intervals are sharper than those of the means."""
    pairs = zip(values, others, strict=True)
    return [None if None in pair else pair[0] - pair[1] for pair in pairs]


def flat(name, curve):
    """A curve [(FLOPs, nats)] as figures, which are flat; curves_in reads them."""
    return {f"{name} at {x:.3e} FLOPs": y for x, y in curve}


def curves_in(figures):
    """{name: [(FLOPs, nats)]} of all the curves in the figures of an experiment."""
    curves = {}
    for key, y in figures.items():
        if match := re.fullmatch(r"(.*) at (\S+) FLOPs", key):
            curves.setdefault(match[1], []).append((float(match[2]), y))
    return curves


class Runs:
    """The runs of one experiment, the time that it has, and what was measured before."""

    def __init__(self, config):
        self.config, self.began, self.rate = config, time.monotonic(), None
        self.left_out, self.unmeasured = [], 0
        self.team = parallel.join(train.DEFAULTS | config)
        self.device, self.autocast = self.team.device, self.team.autocast
        seeds = 1 if config["quick"] else config["seeds"]
        self.seeds = range(config["seed"], config["seed"] + seeds)
        self.all_seeds = settings.plural(seeds, "seed")  # for titles
        self.kept = Path(config["runs"], "measured.jsonl")
        whole = "\n".join((ROOT / name).read_text("utf8") for name in ("README.md", "LOG.md"))
        parts = [("train", whole[4096:]), ("val", whole[:4096])]
        self.small = self.prepared("text", parts) if config["quick"] else ""

    def of_first(self, function):
        """function() of the first process, told to all."""
        first = self.team.rank == 0
        return parallel.gather(function() if first else None, self.team)[0]

    def seconds_left(self):
        return 60 * self.config["minutes"] - (time.monotonic() - self.began)

    def text(self, folder):
        """The prepared folder that is meant; in the quick form one of README.md and LOG.md."""
        is_whole = not self.config["quick"] or Path(self.config["runs"]) in Path(folder).parents
        return folder if is_whole else self.small

    def prepared(self, name, parts, text=None):
        """The folder `name` in `runs` of [(split, text)], made where it is not there yet.

        text: the tokenizer; None: bytes.
        """
        folder = Path(self.config["runs"], name)

        def prepare():
            if not (folder / "meta.json").is_file():
                writer.prepare(folder, parts, text or tokenizer.Byte())

        self.of_first(prepare)
        return str(folder)

    # ---- Training --------------------------------------------------------------------------------

    def recipe(self, data, keys, flops, seed):
        """The training config of a run, with the steps that cost so many FLOPs."""
        config = self.config
        base = settings.parse([config["preset"]], *train.MODULES)
        run = base | keys | {"data": str(data), "seed": seed}
        run |= {k: min(v, run[k] or v) for k, v in QUICK.items()} if config["quick"] else {}
        attention = train.OBJECTIVES[run["objective"]].attention
        run |= {"attention": run["attention"] if run["attention"] in attention else attention[0]}
        meta = loader.read_meta(data)
        run |= {"vocab_size": meta["vocab_size"], "dtype": config["dtype"]}
        run |= {"block_size": meta["width"]} if "width" in meta else {}  # of examples
        steps = QUICK_STEPS if config["quick"] else max(1, round(flops / step_flops(run)))
        run |= {"max_iters": steps, "warmup_iters": max(1, steps // 50)}
        run |= {"save_interval": -(-steps // POINTS), "keep": POINTS, "show_sample": False}
        run |= {"eval_interval": -(-steps // 10), "device": config["device"]}
        run |= {"eval_interval": 30, "eval_sequences": 4} if config["quick"] else {}
        return run | {"compile": run["compile"] and not config["quick"], "user_keys": {}}

    def train(self, data, keys, flops, seed, within=contextlib.nullcontext):
        """The folder of a run, which is trained first where it has not been; None: no time.

        keys: of train.py, and independent=True for draws without strata. `within()` is a context
        that changes the network or the loss; a function of its own name for each change.
        """
        keys = dict(keys)
        independent = keys.pop("independent", False)
        recipe = self.recipe(self.text(data), keys, flops, seed)
        usual = settings.defaults_of(train.MODULES)
        changed = {k: v for k, v in recipe.items() if k not in SIDE and v != usual[k]}
        digest = results.mark(sorted(changed.items()), independent, within.__name__)[:8]
        name = f"{recipe['objective']}_{flops:.0e}_{seed}_{digest}"
        folder = Path(self.config["runs"], name)
        done = checkpoint.read(folder)["step"] if (folder / "ckpt.pt").is_file() else 0
        left = 1 - done / recipe["max_iters"]
        if left > 0 and not self.of_first(lambda: self.fits(left * flops)):
            self.left_out.append(name)
            return None
        if left > 0:
            torch.compiler.reset()  # or programs are made for changing shapes
            began, quiet = time.monotonic(), contextlib.redirect_stdout(io.StringIO())
            with within(), independent_draws(independent), quiet:
                train.main(recipe | {"out_dir": str(folder)})
            seconds = time.monotonic() - began
            self.rate = left * flops / seconds
            if self.team.rank == 0:
                tqdm.write(f"{folder}: trained in {seconds:.0f} s", file=sys.stderr)
        return folder

    def fits(self, flops):
        """Whether a training would end in time to be measured, at the speed of the last one."""
        self.rate = self.rate or 0.3 * matmul_flops(self.device, self.autocast) * self.team.world
        left = self.seconds_left() - 0.25 * 60 * self.config["minutes"]
        return self.config["quick"] or flops / self.rate < left

    def curve(self, folder):
        """([(FLOPs, nats per token)] of a run's evaluations, its seconds but for compilation)."""
        entries = results.kept(Path(folder, "log.jsonl"))
        steady = [entry for entry in entries if "tokens_per_second" in entry]
        one = steady[-1]["flops"] / steady[-1]["step"]
        evaluated = (entry for entry in entries if "nats_per_token" in entry)
        curve = [(one * entry["step"], entry["nats_per_token"]) for entry in evaluated]
        speed = statistics.median(entry["tokens_per_second"] for entry in steady)
        return curve, steady[-1]["tokens"] / speed

    # ---- Measuring -------------------------------------------------------------------------------

    def once(self, parts, function):
        """function(), plain JSON, kept under `parts`, all that it depends on; None: no time."""
        mark = results.mark(parts, self.config["quick"])

        def value():
            for record in results.kept(self.kept):
                if record["mark"] == mark:
                    return record["value"]
            if self.seconds_left() < 0:
                self.unmeasured += 1
                return None
            made = json.loads(to_json(function()))
            results.keep(self.kept, {"mark": mark, "of": parts, "value": made})
            return made

        return self.of_first(value)

    def blocks(self, data, L, n=0, split="val"):
        """Blocks (S, L) of a prepared text, evenly spaced; n: how many, 0: `sequences`."""
        tokens, n = loader.Tokens(self.text(data), split), n or self.config["sequences"]
        starts = loader.spread(range(0, len(tokens) - L + 1, L), 8 if self.config["quick"] else n)
        settings.require(starts, f"{data} {split} holds no block of {L} tokens")
        return torch.stack([torch.from_numpy(tokens[start : start + L]) for start in starts])

    def nats(self, folder, data, n=0, split="val", **options):
        """Nats per token of a run, by any_order unless it is causal; None: left out.

        n: how many blocks; options: those of evaluate.estimate.
        """
        if folder is None:
            return None
        n, options = n or self.config["sequences"], {"draws": 8, "batch_size": 64} | options

        def measure():
            model, _, _ = checkpoint.load(folder, self.device)
            blocks = self.blocks(data, model.block_size, n, split)  # (S, L)
            with self.autocast():
                nats, _ = evaluate.estimate(model, list(blocks.numpy()), progress=True, **options)
            return float(nats.sum()) / blocks.numel()

        return self.once([folder.name, str(data), n, split, sorted(options.items())], measure)

    # ---- The report ------------------------------------------------------------------------------

    def write(self, name, text, figures, plots):
        """Print the tables and write NAME.json, .md and the plots; returns the figures."""
        out = sorted(set(self.left_out))
        if out or self.unmeasured:
            lacking = settings.plural(len(out), "training")
            lacking += f" and {settings.plural(self.unmeasured, 'measurement')}"
            text += f"\n{self.config['minutes']:g} min were too few for {lacking}; "
            text += "the same command goes on, or give --minutes="
            text += f".{' Not trained: ' if out else ''}{', '.join(out)}\n"
        if self.config["quick"]:
            text = (
                f"The quick form: {QUICK_STEPS} steps, a tiny network, README.md and LOG.md: it "
                f"shows that all runs, and its figures mean little.\n\n{text}"
            )
        figures |= results.about(self.device) | {"seeds": ", ".join(map(str, self.seeds))}
        figures |= {"runs left out": len(out), "seconds": round(time.monotonic() - self.began)}
        if self.team.rank == 0:
            print(text)
            results.write(self.config, name, figures, text, plots, results.script_of(name))
        return figures
