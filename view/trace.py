"""A recorded sample: plain data that a page or a picture plays without the network."""

from samplers import SAMPLERS

BY_TIME = ("ancestral", "euler")


def unmask_steps(masked, o):
    """The step of each position (N, L), as sample.py draws it; None where a call is a step."""
    policy = SAMPLERS[o["sampler"]](masked, o)
    return policy.step if o["sampler"] in BY_TIME else None  # drawn by time, ahead of the calls


class Recorder:
    """An `on_call` of sample.sample: each token's step, call, probability and five alternatives."""

    def __init__(self, tokenizer, x, mask_id, options):
        self.tokenizer, self.start, self.mask_id, self.o = tokenizer, x.cpu(), mask_id, options
        self.steps = unmask_steps(self.start == mask_id, options)  # (N, L) or None
        self.draws = [[] for _ in x]

    def __call__(self, rows, places, calls, tokens, p, logits):
        likely = (logits.double() / (self.o["temperature"] or 1)).softmax(-1)  # (n, V)
        likely = likely.topk(min(5, likely.shape[1]))  # (n, 5)
        steps = calls if self.steps is None else self.steps[rows, places]  # (n,)
        columns = places, steps, calls, tokens, p, likely.indices, likely.values
        for row, *draw, ids, ps in zip(*(z.tolist() for z in (rows, *columns)), strict=True):
            draw = dict(zip(("place", "step", "call", "token", "p"), draw, strict=True))
            draw["alternatives"] = [[v, round(q, 4)] for v, q in zip(ids, ps, strict=True)]
            self.draws[row].append(draw)

    def data(self, info):
        """{mask_id, table: {id: text}, samples: {start, draws, steps, expected calls} of each}."""
        samples, used = [], set(self.start.flatten().tolist()) - {self.mask_id}
        for start, draws, nfe in zip(self.start.tolist(), self.draws, info["nfe"], strict=True):
            run = {"start": start, "draws": draws, "expected": info["expected_nfe"]}
            samples.append(run | {"steps": int(nfe) if self.steps is None else self.o["steps"]})
            used |= {v for draw in draws for v, _ in [*draw["alternatives"], (draw["token"], 1)]}
        table = {v: self.tokenizer.table[v].decode("utf8", "replace") for v in sorted(used)}
        return {"mask_id": self.mask_id, "table": table, "samples": samples}
