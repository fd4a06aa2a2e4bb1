"""SMDM's claims by one command each: fits, plans and cuts, and the quick forms end in files."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import config as settings
import diffusion
import model as network
import train
from config import UserError
from data import loader, tokenizer, writer
from experiments import epochs, isoflop, papers, results, runs, scaling, temporal_shift
from lib import fused

BUDGETS = np.array([3e12, 1e13, 3e13])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all quick forms keep their runs, which they share."""
    return tmp_path_factory.mktemp("claims")


@pytest.fixture(scope="module")
def text(folder):
    words = "to be or not to be, that is the question. "
    writer.prepare(folder / "bytes", [("train", words * 99), ("val", words * 9)], tokenizer.Byte())
    return str(folder / "bytes")


def opened(module, folder, *words):
    """(Runs, config) of an experiment in a folder."""
    line = [f"--runs={folder}/runs", f"--results={folder}/found", "--device=cpu", *words]
    config = settings.parse(line, settings, results, runs, module)
    return runs.Runs(config), config


# ---- The fits of IsoFLOP curves ------------------------------------------------------------------

TRUE = {
    "MDM": (1.5e5, 0.6, 2.2, -0.07),
    "ARM": (3e5, 0.65, 1.5, -0.065),
}  # N*, L* at 1e13; exponents


def made_up(noise, seed, n_seeds=2):
    """{(family, C): {N: [nats]}} of parabolas whose minima follow TRUE's laws, with noise."""
    generator, curves = np.random.default_rng(seed), {}
    for family, (N, n, L, l) in TRUE.items():
        for C in BUDGETS:
            best, low = N * (C / 1e13) ** n, L * (C / 1e13) ** l
            sizes = [round(best * 2**k) for k in (-3, -2, -1, 0, 1, 2)]
            nats = {N: low + 0.04 * np.log(N / best) ** 2 for N in sizes}
            curves[family, C] = {
                N: (y + noise * generator.normal(size=n_seeds)).tolist() for N, y in nats.items()
            }
    return curves


def fitted(curves):
    """isoflop.laws of made-up curves."""
    stars = {}
    for family in TRUE:
        stars[family] = isoflop.minima([isoflop.points(curves[family, C]) for C in BUDGETS], 400)
    return isoflop.laws(BUDGETS, stars)


def test_without_noise_the_fits_give_back_what_the_points_were_made_with():
    figures = fitted(made_up(0.0, 0))
    for family, (_, n, _, l) in TRUE.items():
        assert figures["exponent of N*"][family][0] == pytest.approx(n, abs=1e-5)
        assert figures["exponent of L*"][family][0] == pytest.approx(l, abs=1e-6)
    middle = np.exp(np.log(BUDGETS / 1e13).mean())
    assert figures["N* of MDM / of ARM"]["both"][0] == pytest.approx(0.5 * middle**-0.05)
    gap = (2.2 / 1.5 * middle**-0.005) ** (1 / 0.07)
    assert figures["compute of MDM / of ARM for one L*"]["both"][0] == pytest.approx(gap)


def test_the_true_exponents_are_inside_their_intervals_as_often_as_95_percent_say():
    inside, widths, trials = 0, [], 25
    for seed in range(trials):
        figures = fitted(made_up(0.01, seed))
        for family, (_, *exponents) in TRUE.items():
            for star, true in (("N*", exponents[0]), ("L*", exponents[2])):
                _, low, high = isoflop.bounds(figures[f"exponent of {star}"][family]).values()
                inside += low <= true <= high
                widths.append(high - low)
    assert 0.88 * 4 * trials <= inside < 4 * trials, "of 100 independent pairs of them"
    assert max(widths) < 0.6


def test_the_papers_own_points_give_the_exponents_and_the_gap_that_it_prints():
    rows, _ = isoflop.power_laws({"MDM": {}, "ARM": {}})
    for row in rows:
        ours, printed = row["SMDM's points"], row["SMDM, printed"].removeprefix("about ")
        printed = 0.5 if printed == "1/2" else float(printed)
        assert float(ours) == pytest.approx(printed, rel=0.05), row["of"]
        assert row["ours"] == "needs two budgets"


def test_a_curve_without_a_minimum_or_with_one_at_an_end_is_said_and_not_fitted():
    curves = made_up(0.0, 0)
    curves["MDM", 3e12] = {N: [1 - 1e-6 * N] for N in (1000, 2000, 3000, 4000)}
    curves["ARM", 3e13] = dict([*curves["ARM", 3e13].items()][:4])  # the lowest is the largest
    curves["MDM", 1e13] = {N: [None] for N in (1000, 2000, 3000)}
    rows, figures, inside = isoflop.lowest_points(curves)
    said = {(row["family"], row["FLOPs"]): row["N*_is"] for row in rows}
    assert said["MDM", "3e+12"] == "no minimum" and said["ARM", "3e+13"] == "at its edge"
    assert said["MDM", "1e+13"] == "left out" and said["ARM", "1e+13"] == "inside the grid"
    assert list(inside["MDM"]) == [3e13] and list(inside["ARM"]) == [3e12, 1e13]
    assert all(isinstance(value, float) and np.isfinite(value) for value in figures.values())


# ---- Sizes and runs of IsoFLOP curves ------------------------------------------------------------


@pytest.mark.parametrize("best", [3e4, 1e5, 1.5e6])
def test_sizes_are_added_until_the_lowest_is_inside(best, folder, monkeypatch):
    ctx, config = opened(scaling, folder)
    calls = []
    nats = lambda ctx, family, N, C, seed: calls.append(N) or np.log(N / best) ** 2  # noqa: E731
    monkeypatch.setattr(scaling, "nats_of", nats)
    nats_at = scaling.first_seed(ctx, "MDM", 1e13)
    N = sorted(nats_at)
    assert min(nats_at, key=nats_at.get) not in (N[0], N[-1]) and len(N) >= 5 == isoflop.FITTED
    sizes, *_ = scaling.window(config, "MDM", 1e13)
    first = sizes.index(N[0])
    assert sizes[first : first + len(N)] == N, "no gap between them"
    assert len(calls) == len(set(calls)), "each once"


def test_where_there_are_no_more_sizes_the_search_ends(folder, monkeypatch):
    ctx, _ = opened(scaling, folder)
    monkeypatch.setattr(scaling, "nats_of", lambda ctx, family, N, C, seed: float(N))
    assert min(scaling.first_seed(ctx, "ARM", 1e13)) == min(scaling.sizes_of("bytes"))


@pytest.mark.parametrize("shape", [(1, 32), (3, 56), (6, 96)], ids=str)
@pytest.mark.parametrize("family", scaling.FAMILIES)
def test_the_flops_of_a_step_are_within_2_percent_of_what_torch_counts(family, shape, folder, text):
    ctx, _ = opened(scaling, folder)
    keys = scaling.shape_keys(*shape) | scaling.FAMILIES[family] | {"batch_size": 2}
    recipe = ctx.recipe(text, keys, 1e12, 0)
    model = network.make_network(recipe)
    L, D, n_layer = recipe["block_size"], recipe["n_embd"], recipe["n_layer"]
    batch = [torch.zeros(2, L, dtype=torch.long)]
    if family == "MDM":
        mask, weight, _ = train.draw_training_mask(recipe, 0, range(2), L)
        batch += [mask, weight.float(), fused.masked_indices(mask, 1)]
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        loss, _ = diffusion.Loss(model, recipe["objective"])(*batch)
        loss.backward()
    # It counts the whole table of attention, of which an ARM sees half.
    unseen = 3 * 2 * L * n_layer * 2 * L * D if family == "ARM" else 0
    counted = counter.get_total_flops() - unseen
    assert runs.step_flops(recipe) == pytest.approx(counted, rel=0.02)


def test_the_papers_grid_takes_the_papers_steps_and_has_its_best_sizes_inside(folder, text):
    ctx, config = opened(
        scaling, folder, "--shapes=smdm", f"--preset={ROOT}/configs/smdm_170m.py", f"--data={text}"
    )
    (N,) = [N for N in scaling.sizes_of("smdm") if round(N / 1e6) == 170]
    for family in scaling.FAMILIES:
        keys, flops = scaling.planned(ctx, family, N, 1e20)
        assert ctx.recipe(text, keys, flops, 0)["max_iters"] == 187_107  # as configs/smdm_170m.py
        for C, best in zip(papers.BUDGETS, papers.ISOFLOP[family]["N"], strict=True):
            sizes, start, end = scaling.window(config, family, C)
            assert end - start == 5 and sizes[start + 1] < best < sizes[end - 2]


def test_the_plan_lists_the_runs_and_trains_nothing(folder, text, monkeypatch, capsys):
    monkeypatch.setattr(train, "main", lambda _: pytest.fail("nothing is to be trained"))
    _, config = opened(scaling, folder, "--only=plan", f"--data={text}")
    figures = scaling.main(config)
    said = capsys.readouterr().out
    assert "30 runs a seed" in said and figures["FLOPs of a seed"] == pytest.approx(4.3e14)
    assert said.count("| 3e+13 | ARM |") == 5


# ---- Books ---------------------------------------------------------------------------------------


def library(folder, *years):
    path = folder / "books.jsonl"
    books = [{"title": f"Book {i}", "year": y, "text": f"text {i}"} for i, y in enumerate(years)]
    path.write_text("\n".join(map(json.dumps, books)))
    return str(path)


def test_a_cut_of_books_has_no_book_on_both_sides_and_each_dated_one_once(tmp_path):
    years = [str(y) for y in range(1780, 1960, 3)] + ["760 BC", "1605", "1992", "1885"]
    books = temporal_shift.read(library(tmp_path, *years))
    for cut in (1800, 1890, 1950):
        groups = temporal_shift.cut_books(books, temporal_shift.DEFAULTS | {"cut": cut})
        titles = [book.title for group in groups.values() for book in group]
        assert len(titles) == len(set(titles)) == len(years) - 3
        early = groups.pop(temporal_shift.LEARNT) + groups.pop(temporal_shift.OLD)
        assert all(1700 <= book.year < cut for book in early)
        for decade, later in groups.items():
            assert {f"{book.year // 10}0s" for book in later} == {decade}
            assert all(cut <= book.year <= 1960 for book in later)


@pytest.mark.parametrize("cut", [1750, 1990])
def test_a_cut_that_leaves_one_side_without_books_is_a_user_error(cut, tmp_path):
    books = temporal_shift.read(library(tmp_path, "1800", "1850", "1870", "1900"))
    with pytest.raises(UserError, match=f"cut {cut} leaves no .*there are years 1800, 1850"):
        temporal_shift.cut_books(books, temporal_shift.DEFAULTS | {"cut": cut})


@pytest.fixture
def shift(folder):
    """Three groups of books, and networks whose nats are known functions of their FLOPs."""
    ctx, _ = opened(temporal_shift, folder, "--flops=1e14")
    groups = {temporal_shift.LEARNT: [temporal_shift.Book(1800, "a", "a " * 200)]}
    groups[temporal_shift.OLD] = [temporal_shift.Book(1801, f"b{i}", "b " * 200) for i in (0, 1)]
    groups["1900s"] = [temporal_shift.Book(1900, "c", "c " * 200)]
    shift = temporal_shift.Shift(ctx, groups)
    shift.read = lambda kind, flops, seed: [3 - np.log10(flops / 1e12), 2.0, 1.5]
    return shift


@pytest.mark.parametrize("target", [2.9, 2.1, 1.8])
def test_the_arm_has_the_same_nats_on_old_books_between_two_that_were_trained(target, shift):
    nats, flops = shift.arm_like(target, 1337)
    assert shift.on_old(nats) == pytest.approx(target) and nats[2] == pytest.approx(1.5)
    assert shift.on_old(shift.read("ARM", flops, 1337)) == pytest.approx(target, abs=1e-6)


def test_an_arm_that_is_never_as_good_or_was_left_out_gives_no_row(shift):
    assert shift.arm_like(0.0, 1337) is None
    shift.read = lambda *_: None
    assert shift.arm_like(2.0, 1337) is None
    rows, figures = temporal_shift.table_of(shift, [None, None])
    assert {row["MDM_-_ARM"] for row in rows} == {"left out"} and not figures


def test_a_difference_of_differences_is_that_of_two_means_with_the_interval_of_books():
    generator, hits = np.random.default_rng(1), 0
    for _ in range(200):
        above = [*generator.normal(0.0, 0.1, 6), *generator.normal(-0.05, 0.2, 9)]
        mean, half = temporal_shift.difference(above, range(6, 15), range(6))
        assert mean == pytest.approx(np.mean(above[6:]) - np.mean(above[:6]))
        hits += abs(mean + 0.05) <= half
    assert 0.92 < hits / 200 <= 1
    assert papers.shift("April 2024") == pytest.approx(
        np.log(24.01 / 26.93) - np.log(18.02 / 17.34)
    )


# ---- Repeated text -------------------------------------------------------------------------------


def test_a_part_is_a_run_of_the_text_and_what_is_held_out_is_whole(folder, text):
    ctx, _ = opened(epochs, folder)
    train_text = loader.Tokens(text, "train")[:].tolist()
    parts = [epochs.part_of(ctx, text, 500, seed) for seed in (1, 2, 2)]
    for part in parts:
        tokens = loader.Tokens(part, "train")[:].tolist()
        starts = (i for i in range(len(train_text)) if train_text[i : i + 500] == tokens)
        assert len(tokens) == 500 and next(starts, None) is not None
        assert np.array_equal(loader.Tokens(part, "val")[:], loader.Tokens(text, "val")[:])
    assert parts[0] != parts[1] == parts[2]
    whole = epochs.part_of(ctx, text, len(train_text), 3)
    assert loader.Tokens(whole, "train")[:].tolist() == train_text


def test_runs_on_a_part_read_it_as_often_as_their_epochs_say(folder, text, monkeypatch):
    ctx, config = opened(epochs, folder, "--epochs=1,4,30", "--seeds=1")
    made = []
    train_of = lambda data, keys, flops, seed: made.append((data, flops))  # noqa: E731
    monkeypatch.setattr(ctx, "train", train_of)
    assert epochs.plan(config) == [(1, 1), (4, 4), (30, 3), (30, 30)]
    curves = epochs.one_seed(ctx, text, 1)
    assert {pair[0] for pair in curves.values()} == {None} and len(curves) == 3 * 3
    each = itertools.product(epochs.plan(config), epochs.kinds_of(config).items())
    for ((E, e), (_, keys)), (data, flops) in zip(each, made, strict=True):
        recipe = ctx.recipe(data, keys, flops, 1)
        step = recipe["batch_size"] * recipe["block_size"]  # tokens
        read = len(loader.Tokens(data, "train")) * e
        assert abs(recipe["max_iters"] * step - read) < step + 0.05 * read, (E, e)


def test_where_a_kind_turns_is_said_with_what_is_not_known():
    along = [(1.0, 2.5), (3.0, 2.2), (10.0, 2.1), (30.0, 2.4)]
    assert epochs.turn(along) == (2.1, 10.0) and epochs.turn([*along, (30.0, None)]) is None
    alongs = {(kind, 30): [along, along] for kind in epochs.KINDS}
    alongs["MDM", 30] = [[(3.0, 2.0), (30.0, 1.9)], [(3.0, 2.0), (30.0, 1.9)]]
    alongs["ARM", 30] = [[(30.0, None)], [(30.0, None)]]
    (row,) = epochs.lowest_along(alongs, 9000)
    assert row["MDM_turns"] == "not yet" and row[f"{epochs.REGULAR}_turns"] == "at 10"
    assert row["ARM"] == row["ARM_turns"] == row["MDM - better ARM"] == "left out"
    assert row["MDM"].startswith("1.900") and row["tokens_of_text"] == "300"
    nats = {("MDM", E): [y, y] for E, y in ((1, 2.0), (3, 2.01), (10, 2.04), (30, 2.2))}
    assert epochs.nearly_as_good(nats, "MDM") == 10


# ---- The quick forms -----------------------------------------------------------------------------

HEADS = {
    "scaling": [
        "FLOPs | family | sizes | from | to | N* | L* | N* is |",
        "of | family | ours | SMDM's points | SMDM, printed |",
        "parameters | 3e+12 FLOPs | 1e+13 FLOPs |",
    ],
    "scaling_rate": ["family | network | 0.5 x the rule's | 1 x the rule's | 2 x the rule's |"],
    "epochs": [
        "epochs | tokens of text | MDM | ARM | ARM with dropout and decay | MDM - ARM |",
        "epochs | tokens of text | MDM | MDM turns | ARM | ARM turns |",
    ],
    "temporal_shift": ["books | how many | MDM | ARM | MDM - ARM | minus old (± books) |"],
}
MODULES = {"scaling": scaling, "scaling_rate": scaling}
MODULES |= {"epochs": epochs, "temporal_shift": temporal_shift}
WORDS = {"scaling": ["--budgets=3e12,1e13"], "scaling_rate": ["--only=rate"]}


def quick(name, folder, monkeypatch):
    line = ["--quick", f"--runs={folder}/runs", f"--results={folder}/found", "--device=cpu"]
    line += WORDS.get(name, [])
    monkeypatch.setattr(sys, "argv", ["program.py", *line])
    return MODULES[name].main(settings.parse(line, settings, results, runs, MODULES[name]))


@pytest.mark.parametrize("name", HEADS)
def test_the_quick_form_writes_its_three_files_and_trains_nothing_twice(
    name, folder, monkeypatch, capsys
):
    figures = quick(name, folder, monkeypatch)
    table = (folder / f"found/{name}.md").read_text()
    assert all(f"| {head}" in table for head in HEADS[name]) and "left out" not in table
    assert json.loads((folder / f"found/{name}.json").read_text()) == figures
    assert {"commit", "machine", "seeds", "seconds", "runs left out"} <= figures.keys()
    assert all(isinstance(value, (str, int, float)) for value in figures.values())
    assert (folder / f"found/{name}.png").stat().st_size > 10_000
    assert table.split("\n\n", 1)[1].strip() in capsys.readouterr().out
    monkeypatch.setattr(train, "main", lambda _: pytest.fail("this run is finished"))
    again = quick(name, folder, monkeypatch)
    assert again | {"seconds": 0} == figures | {"seconds": 0}


def test_two_processes_make_the_curves_together_as_one_does(folder, tmp_path, monkeypatch):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = ["-m", "experiments.scaling", "--quick", "--budgets=3e12", "--device=cpu"]
    line += [f"--runs={tmp_path}/runs", f"--results={tmp_path}/found"]
    command = [sys.executable, *launch, *line]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The quick form") == 1, "one process speaks"
    two = json.loads((tmp_path / "found/scaling.json").read_text())
    one = quick("scaling", folder, monkeypatch)
    named = [key for key in two if re.search(r"parameters, seed", key)]
    assert len(named) == 6
    assert {k: two[k] for k in named} == pytest.approx({k: one[k] for k in named}, rel=5e-3)
