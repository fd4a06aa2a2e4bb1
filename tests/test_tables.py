"""Tables of names: an unknown one is an error wherever it enters, and an entry is all it takes."""

import re
import textwrap

import pytest
import torch
from conftest import ROOT, L, Table, V, random_logits

import config as settings
import diffusion
import evaluate
import model as network
import sample
import samplers
import train
from config import UserError
from data import choice, tokenizer, writer
from data.fineweb import prepare as fineweb
from data.zeroshot import prepare as zeroshot
from lib import device, entries, optim, weighting
from run import checkpoint, formats

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": L, "vocab_size": V}
KEYS = settings.defaults_of(train.MODULES) | SHAPE
MODEL = Table(random_logits())
CAUSAL = network.make_network(KEYS | {"attention": "causal"})
IN_ORDER = network.make_network(KEYS | {"attention": "order"})
X = torch.full((1, L), V)  # (1, L)
U, NOISE = torch.rand(2, dtype=torch.float64), torch.rand(2, L, dtype=torch.float64)
REQUESTS = [([0], [1, 2])]


def keys_of(module, **given):
    return settings.defaults_of([module]) | {"set": "ptb", "tokenizer": "byte"} | given


CALLS = {  # of the library, in Python, with a name that is nearly right
    "draw_mask": lambda: diffusion.draw_mask("any_ordr", U, NOISE),
    "draw_mask, schedule": lambda: diffusion.draw_mask("t_dce", U, NOISE, "cosin"),
    "draw_order": lambda: diffusion.draw_order("unifrom", NOISE, U[:, None]),
    "schedule": lambda: diffusion.SCHEDULES["cosin"],
    "no text": lambda: diffusion.SCHEDULES[None],
    "a list": lambda: diffusion.OBJECTIVES[["any_order"]],
    "Loss": lambda: diffusion.Loss(MODEL, "lambda"),
    "attention": lambda: network.make_network(KEYS | {"attention": "fulll"}),
    "attention of a table": lambda: network.make_network(KEYS | {"attention": ("full",)}),
    "norm": lambda: network.make_network(KEYS | {"norm": "rsm"}),
    "mlp": lambda: network.make_network(KEYS | {"mlp": "swigl"}),
    "zero_init": lambda: network.make_network(KEYS | {"zero_init": "heads"}),
    "sampler": lambda: sample.sample(MODEL, X, sampler="confidense"),
    "sampler, causal": lambda: sample.sample(CAUSAL, X, sampler="confidense"),
    "schedule of a sampler": lambda: sample.sample(MODEL, X, schedule="cosin"),
    "answer_nats": lambda: evaluate.answer_nats(MODEL, REQUESTS, estimator="chian"),
    "estimate": lambda: evaluate.estimate(MODEL, REQUESTS, estimator="chian"),
    "estimator, causal": lambda: evaluate.estimator_of(CAUSAL, "chian"),
    "optimizer": lambda: optim.make_optimizers(KEYS | {"optimizer": "moun"}, CAUSAL),
    "lr_decay": lambda: optim.learning_rate(200, KEYS | {"lr_decay": "cosin"}),
    "dtype": lambda: device.machine(KEYS | {"dtype": "float16"}),
    "loss_weight": lambda: train.LOSS_WEIGHTS["sqr"],
    "train, objective": lambda: train.main({"objective": "any_ordr"}),
    "train, parallel": lambda: train.main({"parallel": "fdsp"}),
    "train, a type": lambda: train.main({"max_iters": "many"}),
    "format": lambda: formats.to_format({"norm.weight": U}, KEYS, "raddd"),
    "set": lambda: choice.read("hella", "mine.jsonl"),
    "tokenizer": lambda: tokenizer.KINDS["gpt"],
    "zero-shot set": lambda: zeroshot.main(keys_of(zeroshot, set="ptp")),
    "zero-shot protocol": lambda: zeroshot.main(keys_of(zeroshot, protocol="rad")),
    "sample of FineWeb": lambda: fineweb.main(keys_of(fineweb, sample="10")),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_unknown_name_is_a_user_error_also_from_python(call):
    with pytest.raises(UserError, match=r"unknown \w+ '.*'; (did you mean|there is)|many"):
        call()


def test_a_schedule_can_be_given_by_its_name_and_a_causal_objective_has_no_masks():
    by_name = diffusion.draw_mask("t_dce", U, NOISE, "cosine")
    assert all(map(torch.equal, by_name, diffusion.draw_mask("t_dce", U, NOISE, diffusion.cosine)))
    with pytest.raises(UserError, match="objective 'ar' masks nothing"):
        diffusion.draw_mask("ar", U, NOISE)


MASK, ONE = X == V, torch.ones(1)
NO_IDS = {  # calls of the library with what the network cannot read
    "x must be ids (B, L) of int64, not torch.int64 (4,)": (
        lambda: sample.sample(MODEL, X[0]),
        lambda: network.make_network(KEYS | {"attention": "full"})(X[0]),
    ),
    "x must be ids (B, L) of int64, not torch.float32 (1, 4)": (
        lambda: sample.sample(CAUSAL, 1.0 * X),
        lambda: CAUSAL(1.0 * X),
    ),
    "not a list": (lambda: sample.sample(MODEL, [[0, V]]),),
    "not torch.int64 (0, 4)": (lambda: sample.sample(MODEL, X[:0]),),
    "L at most block_size 4, not 8": (lambda: sample.sample(MODEL, X.repeat(1, 2)),),
    "each from 0 to 3 (the mask), not 4 to 4": (lambda: sample.sample(MODEL, X + 1),),
    "each from 0 to 3 (the mask), not -1 to -1": (lambda: sample.sample(CAUSAL, X - 4),),
    "x0 must be ids (B, L)": (
        lambda: diffusion.nelbo(MODEL, X[0], MASK[0], ONE),
        lambda: diffusion.nelbo(MODEL, 0.5 * X, MASK, ONE),
        lambda: diffusion.ar_nll(CAUSAL, X[0]),
        lambda: diffusion.order_nll(MODEL, X[0], X[0]),
    ),
    "a causal network has no masks: its loss is ar_nll": (
        lambda: diffusion.nelbo(CAUSAL, 0 * X, MASK, ONE),
    ),
    "a causal network is exact: it needs no estimator, and has no 'chain'": (
        lambda: evaluate.estimate(CAUSAL, 0 * X, estimator="chain"),
        lambda: evaluate.token_nats(CAUSAL, [0], estimator="chain"),
    ),
    "ar_nll is for causal networks; the loss of this one is nelbo": (
        lambda: diffusion.ar_nll(MODEL, 0 * X),
    ),
    "a causal network cannot see what is given after a gap": (
        lambda: sample.sample(CAUSAL, torch.tensor([[0, V, 0, V]])),
    ),
    "a causal network samples left to right: it has no sampler 'confidence'": (
        lambda: sample.sample(CAUSAL, X, sampler="confidence"),
    ),
    "cfg_scale needs a masked diffusion model": (lambda: sample.sample(CAUSAL, X, cfg_scale=1),),
    "the mask must be bool in the shape of x0, (1, 4)": (
        lambda: diffusion.nelbo(MODEL, 0 * X, MASK[:, 1:], ONE),
        lambda: diffusion.nelbo(MODEL, 0 * X, X, ONE),
    ),
    "request 0 must be ids (L,) from 0 to 2, at most 4 with those of its prompt": (
        lambda: evaluate.estimate(MODEL, torch.tensor([0, 1, 2])),
        lambda: evaluate.estimate(MODEL, 0.5 * X),
        lambda: evaluate.estimate(MODEL, X),
        lambda: evaluate.answer_nats(MODEL, [([0, 1], [0, 1, 2])]),
        lambda: evaluate.token_nats(MODEL, [0.5], estimator="chain"),
    ),
    "order_nll is for networks of attention=order": (
        lambda: diffusion.order_nll(network.make_network(KEYS | {"attention": "full"}), X, X),
    ),
    "the order must be (B, L) (2, 4), not (1, 4)": (
        lambda: diffusion.order_nll(IN_ORDER, 0 * X.repeat(2, 1), X),
    ),
    "groups must have one number per request: 1, not 2": (
        lambda: evaluate.answer_nats(MODEL, REQUESTS, groups=[0, 1]),
    ),
    "lengths must have one number per request: 2, not 1": (
        lambda: evaluate.estimate(MODEL, 0 * X.repeat(2, 1), lengths=[4]),
    ),
    "cfg_scale must be in [-1, 1000], not -5": (
        lambda: evaluate.answer_nats(MODEL, REQUESTS, cfg_scale=-5),
    ),
    "pad_to must be in [0, 4], not 5": (lambda: evaluate.answer_nats(MODEL, REQUESTS, pad_to=5),),
    "seed must be in [0, 9e18], not 18446744073709551616": (
        lambda: sample.sample(MODEL, X, seed=2**64),
    ),
    "unknown key learning_rte; did you mean 'learning_rate'?": (
        lambda: train.main({"learning_rte": 0.5}),
    ),
    "unknown key lr; did you mean 'learning_rate'?": (lambda: train.main({"lr": 0.5}),),
    "draws must be in [1, 1e6], not 1000000000": (
        lambda: evaluate.estimate(MODEL, 0 * X, draws=10**9),
    ),
    "request 1 must be ids (L,)": (lambda: evaluate.answer_nats(MODEL, [*REQUESTS, ([0],)]),),
}
CALLS_OF = [(says, call) for says, calls in NO_IDS.items() for call in calls]


@pytest.mark.parametrize(("says", "call"), CALLS_OF)
def test_what_the_network_cannot_read_is_a_user_error_also_from_python(says, call):
    with pytest.raises(UserError, match=re.escape(says)):
        call()


def test_every_table_is_one_that_refuses_unknown_names():
    modules = (diffusion, network, samplers, sample, evaluate, train, choice, tokenizer)
    names = [(module, name) for module in modules for name in vars(module) if name.isupper()]
    tables = {name: getattr(module, name) for module, name in names}
    tables = {name: table for name, table in tables.items() if isinstance(table, dict)}
    plain = {name for name, table in tables.items() if not isinstance(table, settings.Table)}
    known = {"DEFAULTS", "PUBLISHED", "STREAMS", "FORMATS", "ANSWERS", "USED_BY"}
    assert plain == known & tables.keys()
    assert {"SCHEDULES", "OBJECTIVES", "ORDERS", "SAMPLERS", "ESTIMATORS"} <= tables.keys()


# ---- What an entry lacks -------------------------------------------------------------------------


def twice(u, noise, n, schedule):
    mask, weight = diffusion.any_order(u, noise, n, schedule)
    return mask, 1.02 * weight


def without_slope(u, noise, n, schedule):
    m, _ = schedule(u)
    return noise < m[:, None], 1 / m


def first_ones(u, noise, n, schedule):  # which are masked is no matter of chance
    k = diffusion.any_order(u, noise, n, schedule)[0].sum(1)  # (B,)
    place = (noise < torch.inf).cumsum(1) - 1  # (B, L)
    return (place < k[:, None]) & (noise < torch.inf), n / k


def of_the_masked(u, noise, n, schedule):  # the mean over the masked tokens
    mask = noise < u[:, None]
    return mask, n / mask.sum(1).clamp(min=1)


def row_of(draw, factor=1.0):
    mask, weight = evaluate.any_order(draw)
    return mask, factor * weight


def counts_all(draw):  # visible tokens, too
    return evaluate.any_order(draw)[0], (draw.position >= 0).double()


def of_three(draw):  # right for answers of three tokens alone
    mask, weight = evaluate.any_order(draw)
    return mask, weight * 3 / (draw.position >= 0).sum(1, keepdim=True)


def too_little(u, noise, n, schedule):
    mask, weight = diffusion.any_order(u, noise, n, schedule)
    return mask, weight * 3 / n


def never(u, noise, n, schedule):
    return noise < u[:, None], float("nan") * u


class Leaving(samplers.FixedOrder):
    """A policy that ends one call too early."""

    def __init__(self, masked, o):
        step = torch.arange(masked.shape[1]).expand(masked.shape)  # (N, L)
        super().__init__(torch.where(masked, step, -1), o["seed"])
        self.nfe -= 1


class Lazy(samplers.Adaptive):
    """A policy that never unmasks a token."""

    def __init__(self, masked):
        super().__init__(masked, 0, None)

    def accept(self, live, done, p, entropy):
        return torch.zeros_like(self.masked[live])


O, E = diffusion.Objective, evaluate.Estimator
LACKING = [
    ("SCHEDULES", lambda t: t**2, "gives no pair (m(t), m'(t)): the slope m' is missing"),
    ("SCHEDULES", lambda t: (t**2, t), "has m'(0.01) = 0.01, but m grows by 0.02 there"),
    ("SCHEDULES", lambda t: (t, 1.0), "must give m and m' in the shape and dtype of t"),
    ("SCHEDULES", lambda t: (t.float(), torch.ones(len(t))), "must give m and m' in the shape and"),
    ("SCHEDULES", lambda t: (t / 2, torch.ones_like(t) / 2), "must grow from m(0) = 0 to m(1) = 1"),
    ("SCHEDULES", lambda t: (1 - t, -torch.ones_like(t)), "must grow from m(0) = 0 to m(1) = 1"),
    ("SCHEDULES", lambda: 0, "fails with TypeError"),
    ("SCHEDULES", None, "fails with TypeError"),
    ("ORDERS", lambda noise, place, coin, p: coin, "must give one number for each position"),
    ("ORDERS", lambda noise, place, coin, p: place.log(), "gives numbers that are not finite"),
    ("ORDERS", lambda noise, place, coin, p: noise > 0.5, "must give floating-point numbers to"),
    ("ORDERS", lambda noise, place, coin, p: (10 * noise).long(), "must give floating-point"),
    ("ORDERS", lambda noise: noise, "fails with TypeError"),
    ("OBJECTIVES", O(twice), "gives no bound: of 3 tokens 1, 2, 3 masked ones count 1.02"),
    ("OBJECTIVES", O(without_slope), "gives no bound: of 3 tokens"),
    ("OBJECTIVES", O(first_ones), "gives no bound: of 3 tokens"),
    ("OBJECTIVES", O(of_the_masked), "gives no bound: of 3 tokens"),
    (
        "OBJECTIVES",
        O(lambda u, noise, n, schedule: noise < u[:, None]),
        "gives no pair (mask, weight",
    ),
    ("OBJECTIVES", O(None), "has no draw, which a network that is not causal needs"),
    ("OBJECTIVES", O(diffusion.lambda_dce, attention="full"), "must have an attention that is a"),
    ("OBJECTIVES", diffusion.lambda_dce, "is a function: wrap it in diffusion.Objective(...)"),
    ("ESTIMATORS", row_of, "is a function: wrap it in evaluate.Estimator(...)"),
    ("LOSS_WEIGHTS", lambda weight: -weight, "must give weights above 0"),
    ("LOSS_WEIGHTS", lambda weight: 1.0, "must give a weight for each"),
    ("LOSS_WEIGHTS", lambda weight: weight.sum(), "must give a weight for each"),
    (
        "MASK_RATES",
        lambda u: (u**2, torch.ones_like(u)),
        "has a density of 1 at u = 0.02",
    ),
    ("MASK_RATES", lambda u: (2 * u, u / u / 2), "must give rates from 0 to 1"),
    (
        "MASK_RATES",
        lambda u: ((1 + u) / 2, 2 + 0 * u),
        "must grow from 0 to 1 as u does, not from 0.5",
    ),
    (
        "MASK_RATES",
        lambda u: (1 - u, -1 + 0 * u),
        "must grow from 0 to 1 as u does, not from 1 to 0",
    ),
    ("MASK_RATES", lambda u: u**2, "gives no pair (rate, density): the density"),
    ("LR_DECAYS", lambda done: 2 - done, "must give parts from 0 to 1, not [2.0, 1.5, 1.0]"),
    ("LR_DECAYS", lambda: 1.0, "fails with TypeError"),
    ("ESTIMATORS", E(lambda draw: row_of(draw, 2.0)), "gives no bound: of 3 tokens 1, 2, 3 masked"),
    ("ESTIMATORS", E(lambda draw: row_of(draw)[1]), "gives no pair (mask, weight): the weight is"),
    ("ESTIMATORS", E(lambda draw: row_of(draw, float("nan"))), "gives weights that are not finite"),
    ("ESTIMATORS", E(counts_all), "gives a weight to tokens that are not masked"),
    ("ESTIMATORS", E(of_three), "gives no bound: of 2 tokens 1, 2 masked ones count"),
    (
        "ESTIMATORS",
        E(order=evaluate.along("uniform"), exact=True),
        "draws its orders, so it is not exact",
    ),
    ("OBJECTIVES", diffusion.Objective(never), "gives weights that are not finite"),
    ("OBJECTIVES", diffusion.Objective(too_little), "gives no bound: of 2 tokens 1, 2 masked ones"),
    ("SAMPLERS", lambda masked, o: Leaving(masked, o), "must unmask all, but leaves positions"),
    (
        "ESTIMATORS",
        E(lambda draw: (row_of(draw)[0], draw.u)),
        "must give (mask (b, W) bool",
    ),
    ("ESTIMATORS", E(order=lambda draw: draw.noise.argsort(1)), "must give an order in which the"),
    ("ESTIMATORS", E(order=lambda draw: draw.noise), "must give an order (b, W): each position"),
    ("SAMPLERS", lambda masked, o: None, "must return a Policy"),
    ("SAMPLERS", lambda masked: None, "fails with TypeError"),
    ("SAMPLERS", lambda masked, o: Lazy(masked), "never ends"),
    ("SAMPLERS", lambda masked, o: samplers.any_order(masked | True, o), "must leave what is not"),
    ("SAMPLERS", lambda masked, o: samplers.Policy(), "fails with AttributeError"),
]
WHERE = diffusion, train, evaluate, samplers, weighting, optim


@pytest.mark.parametrize(("table", "entry", "lacks"), LACKING)
def test_an_entry_that_lacks_a_part_says_so_at_its_first_use(table, entry, lacks, monkeypatch):
    table = next(getattr(module, table) for module in WHERE if hasattr(module, table))
    monkeypatch.setitem(table, "mine", entry)
    for _ in range(2):  # it is not forgotten
        with pytest.raises(UserError, match=re.escape(f"the {table.kind} 'mine' {lacks}")):
            table["mine"]


def test_an_estimator_without_a_row_or_an_order_says_so(monkeypatch):
    monkeypatch.setitem(evaluate.ESTIMATORS, "mine", evaluate.Estimator(exact=True))
    with pytest.raises(UserError, match="the estimator 'mine' has neither row nor order"):
        evaluate.answer_nats(MODEL, REQUESTS, estimator="mine")


@pytest.mark.parametrize("table", sorted({table for table, *_ in LACKING}))
def test_a_table_of_a_class_says_how_to_wrap_a_plain_function(table, monkeypatch):
    table = next(getattr(module, table) for module in WHERE if hasattr(module, table))
    kind = type(next(iter(table.values())))
    if hasattr(kind, "_fields"):
        monkeypatch.setitem(table, "mine", lambda *_: None)
        with pytest.raises(UserError, match=rf"wrap it in {kind.__module__}.{kind.__name__}\("):
            table["mine"]


@pytest.mark.parametrize("table", sorted({table for table, *_ in LACKING}))
def test_every_entry_that_we_bring_is_whole(table):
    table = next(getattr(module, table) for module in WHERE if hasattr(module, table))
    assert [table[name] for name in table] == list(table.values())


def test_an_entry_that_is_replaced_is_looked_at_again(monkeypatch):
    monkeypatch.setitem(diffusion.SCHEDULES, "mine", lambda t: (t, torch.ones_like(t)))
    diffusion.SCHEDULES["mine"]
    monkeypatch.setitem(diffusion.SCHEDULES, "mine", lambda t: t)
    with pytest.raises(UserError, match="the slope m' is missing"):
        diffusion.SCHEDULES["mine"]


def test_a_command_refuses_a_faulty_entry_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setitem(diffusion.SCHEDULES, "mine", lambda t: t)
    with pytest.raises(UserError, match="the schedule 'mine' gives no pair"):
        settings.parse(["--schedule=mine"], *train.MODULES)
    with pytest.raises(UserError, match="the schedule 'mine' gives no pair"):
        train.main({"schedule": "mine", "out_dir": str(tmp_path / "out")})
    assert not list(tmp_path.iterdir())


README = (ROOT / "README.md").read_text(encoding="utf8")
SHOWN = re.findall(r"^```py\n(.*?)^lib.program.run\(train.main, .*?^```", README, re.S | re.M)
assert SHOWN, "README shows a schedule, an order and an objective"
SHOWN.append(textwrap.dedent(entries.__doc__[entries.__doc__.index("    import torch") :]))


@pytest.mark.parametrize("lines", SHOWN)
def test_the_entries_that_are_shown_are_all_that_a_run_by_them_takes(lines, tmp_path, monkeypatch):
    for name in ("SCHEDULES", "ORDERS", "OBJECTIVES"):
        table = getattr(diffusion, name)
        monkeypatch.setattr(diffusion, name, settings.Table(table.kind, table.lacking, **table))
        monkeypatch.setattr(train, name, getattr(diffusion, name), raising=False)
    before = {name: set(getattr(diffusion, name)) for name in ("SCHEDULES", "ORDERS", "OBJECTIVES")}
    monkeypatch.setattr(samplers, "SAMPLERS", sample.SAMPLERS | {})
    monkeypatch.setattr(train, "LOSS_WEIGHTS", train.LOSS_WEIGHTS | {})
    rates = settings.Table("mask_rate", entries.check_mask_rate, **train.MASK_RATES)
    monkeypatch.setattr(train, "MASK_RATES", rates)
    exec(lines, {})
    (schedule,), (order,), (objective,) = (set(getattr(diffusion, n)) - before[n] for n in before)
    text = "the list is sorted.\n"
    parts = [("train", text * 9), ("val", text * 3)]
    writer.prepare(tmp_path / "data", parts, tokenizer.build("char", [text]))
    keys = {"data": tmp_path / "data", "max_iters": 2, "eval_interval": 2, "batch_size": 2}
    keys |= {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 20, "device": "cpu"}
    keys |= {"compile": False, "eval_sequences": 2, "show_sample": False}
    for i, own in enumerate(
        (
            {"objective": "t_dce", "schedule": schedule},
            {"attention": "order", "order": order},
            {"objective": objective},
        )
    ):
        given = keys | own | {"out_dir": tmp_path / str(i)}
        words = [f"--{key}={value}" for key, value in given.items()]
        result = train.main(settings.parse(words, *train.MODULES))
        assert 0 < result["nats_per_token"] < 99
    for name in rates:  # those that are shown, too
        assert rates[name](torch.rand(5, dtype=torch.float64))[0].shape == (5,)
    model = checkpoint.load(tmp_path / "0")[0]
    x0, info = sample.sample(model, torch.full((2, 20), model.mask_id), steps=4, schedule=schedule)
    assert (x0 < model.mask_id).all() and (info["nfe"] <= 4).all()
    for name in samplers.SAMPLERS.keys() - sample.SAMPLERS.keys():
        monkeypatch.setitem(sample.SAMPLERS, name, samplers.SAMPLERS[name])
        x0, info = sample.sample(model, torch.full((2, 20), model.mask_id), sampler=name)
        assert (x0 < model.mask_id).all() and info["nfe"].tolist() == [2, 2]


@pytest.mark.parametrize("order", diffusion.ORDERS)
def test_prompts_come_first_and_left_to_right_in_every_order(order):
    noise = torch.rand(50, 7, generator=torch.Generator().manual_seed(1))  # (50, 7)
    prompt = torch.arange(50) % 7  # (50,)
    drawn = diffusion.draw_order(order, noise, noise[:, :1], 0.5, prompt)  # (50, 7)
    for row, n in zip(drawn.tolist(), prompt.tolist(), strict=True):
        assert row[:n] == list(range(n)) and sorted(row) == list(range(7))
