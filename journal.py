"""What a training run tells of itself: a progress bar, lines on the screen, and log.jsonl beside the checkpoint."""

import json
import math
import time

from tqdm import tqdm

from config import whole_file


class Journal:
    """Only the first process tells (`told`). A resumed run drops the entries past `start`, which it will make again."""

    def __init__(self, config, path, start, flops, peak, told):
        self.config, self.flops, self.peak, self.told = config, flops, peak, told  # flops of a step, peak a second
        self.log = path.with_name("log.jsonl")
        if told:
            lines = self.log.read_text().splitlines(keepends=True) if start and self.log.is_file() else []
            whole = [line for line in lines if line.endswith("\n")]  # a full disk can tear the last one
            with whole_file(self.log) as temporary:
                temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= start))
        self.bar = tqdm(total=config["max_iters"], initial=start, disable=not told, unit="step")
        self.restart(start)

    def say(self, text):
        if self.told:
            self.bar.write(text)

    def write(self, entry):
        """One line of log.jsonl; a number that JSON lacks (an infinite error bar) is null."""
        if self.told:
            odd = {key: None for key, value in entry.items() if isinstance(value, float) and not math.isfinite(value)}
            with open(self.log, "a") as file:
                file.write(json.dumps(entry | odd) + "\n")

    def speed(self, step, loss, rate):
        """One entry: loss a token, learning rate, tokens a second, and the part of the machine's speed that was used."""
        per_second = (step - self.since) / (time.perf_counter() - self.clock)
        tokens, mfu = self.config["batch_size"] * self.config["block_size"], per_second * self.flops / self.peak
        self.bar.set_postfix_str(f"loss {loss:.3f}, {per_second * tokens:.0f} tokens/s, {mfu:.0%} of peak")
        entry = {"step": step, "loss": loss, "learning_rate": rate, "tokens": step * tokens, "flops": step * self.flops}
        self.write(entry | {"tokens_per_second": per_second * tokens, "mfu": mfu})
        self.restart(step)

    def restart(self, step):
        """Starts the clock anew: what came before, an evaluation say, is not training time."""
        self.clock, self.since = time.perf_counter(), step
