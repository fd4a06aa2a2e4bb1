"""What is held out of little text, what it is for, and that README's lines run."""

import json

import pytest
import torch
from test_train import MODULES, TINY, log, refusal, run, same

import config as settings
import evaluate
import train
from config import UserError, parse
from data import examples, loader, tokenizer, writer
from data.pairs import prepare as pairs
from data.text import prepare as text
from run import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = "The {0} cat sat on {1} mats, and {2} dogs ran after it.\n{3}"


def prose(characters):
    """A text of so many characters, in paragraphs, no two of which are equal."""
    sentences = (WORDS.format(i, i + 1, i + 2, "\n" * (i % 3 == 0)) for i in range(characters))
    whole = ""
    while len(whole) < characters:
        whole += next(sentences)
    return whole[:characters]


def prepared(tmp_path, content, name="own.txt", **keys):
    """(the train text, the val text or None) of a file with this content, once prepared."""
    (tmp_path / name).write_text(content)
    keys = {"input": tmp_path / name, "out": tmp_path / "data", "workers": 1} | keys
    text.main(parse([f"--{key}={value}" for key, value in keys.items()], text, tokenizer))
    meta = loader.read_meta(tmp_path / "data")
    decode = tokenizer.from_meta(meta["tokenizer"]).decode
    parts = {split: decode(loader.Tokens(tmp_path / "data", split)[:]) for split in meta["splits"]}
    return parts["train"], parts.get("val")


def trained(tmp_path, *words):
    """(result, config) of a short run on tmp_path/data with the default recipe."""
    places = [f"--data={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", "--max_iters=2"]
    short = ["--compile=False", "--device=cpu", "--dtype=float32", "--eval_draws=1"]
    short += ["--eval_sequences=8"]
    result = train.main(parse([*places, *short, *words], *MODULES))
    return result, checkpoint.read(tmp_path / "out")["config"]


@pytest.mark.parametrize("characters", [6_000, 30_000, 60_000])
def test_the_end_of_a_short_text_is_held_out_and_nothing_is_lost(characters, tmp_path):
    whole = prose(characters)
    learnt, held = prepared(tmp_path, whole)
    squeeze = lambda part: part.replace("\n", "")  # noqa: E731
    assert squeeze(learnt + held) == squeeze(whole), "one piece, the last one"
    assert 0.025 * characters <= len(held) <= 0.05 * characters
    assert held.startswith("The "), "it begins a sentence"


def test_files_of_other_kinds_in_a_folder_are_left_out_and_counted(tmp_path, capsys):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("a.md", "b.py", ".hidden.md"):
        (folder / name).write_text(prose(3000))
    with pytest.raises(UserError, match="holds no text: 2 files of other kinds") as refused:
        prepared(tmp_path, "", input=folder)
    assert str(refused.value).endswith(f"left out; known kinds: {', '.join(text.KINDS)}")
    (folder / "c.txt").write_text(prose(3000))
    learnt, _ = prepared(tmp_path, "", input=folder)
    assert len(learnt) > 2900
    assert f"2 files of other kinds (as {folder}/a.md) left out" in capsys.readouterr().out
    prepared(tmp_path, prose(3000))
    assert "other kinds" not in capsys.readouterr().out


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    folder = tmp_path / "notes" / "old"
    folder.mkdir(parents=True)
    for path, start in ((folder.parent / "a.txt", 0), (folder / "b.txt", 4000)):
        path.write_text(prose(8000)[start : start + 4000])
    once = prepared(tmp_path, "", input=folder.parent)
    for second in (folder.parent, folder, folder / "b.txt"):
        assert prepared(tmp_path, "", input=f"{folder.parent},{second}") == once


def test_of_one_document_on_one_line_the_end_is_held_out(tmp_path):
    learnt, held = prepared(tmp_path, json.dumps({"text": prose(20_000)}), name="own.jsonl")
    assert 500 <= len(held) <= 1000 and len(learnt) >= 19_000


def test_of_many_documents_the_hash_alone_decides_as_ever(tmp_path):
    said = [f"document {i} " * 20 for i in range(400)]
    lines = "".join(json.dumps({"text": each}) + "\n" for each in said)
    _, held = prepared(tmp_path, lines, name="own.jsonl")
    expected = [each for each in said if writer.is_held_out(each, 0.05)]
    assert 10 <= len(expected) <= 40 and held.split("\n\n") == expected


def test_nothing_is_held_out_of_a_text_that_is_too_short_and_it_says_so(tmp_path, capsys):
    assert prepared(tmp_path, prose(3000))[1] is None
    assert "too short to hold anything out" in capsys.readouterr().out
    assert prepared(tmp_path, prose(30_000), val_fraction=0)[1] is None
    assert "too short" not in capsys.readouterr().out


@pytest.mark.parametrize("characters", [1, 2, 59, 300])
def test_a_text_too_short_to_hold_anything_out_trains_without_evaluations(
    characters, tmp_path, capsys
):
    prepared(tmp_path, prose(characters))
    result, config = trained(tmp_path)
    said = capsys.readouterr().out
    assert result is None and config["block_size"] == min(characters, 128)
    assert f"no evaluations: {tmp_path / 'data'} holds nothing out" in said
    assert said.count("---- a sample\n") == 2 and "nats per token" not in said
    assert [entry["step"] for entry in log(tmp_path / "out")] == [2]


@pytest.mark.parametrize("keys", [{}, {"tokenizer": "byte"}, {"block_size": 64}])
def test_the_line_for_own_text_trains_and_evaluates_at_once(keys, tmp_path):
    prepared(tmp_path, prose(30_000), **keys)
    result, config = trained(tmp_path)
    assert result["tokens"] >= 500 and config["block_size"] == keys.get("block_size", 128)
    assert config["optimizer"] == "muon" and config["loss_weight"] == "sqrt"


# ---- Pairs ---------------------------------------------------------------------------------------


def answers(tmp_path, n, prompts=None):
    """meta.json of n pairs, once prepared."""
    said = [{"prompt": f"{i % (prompts or n)}? ", "completion": f"{i}!"} for i in range(n)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, said)))
    words = [f"--input={tmp_path / 'own.jsonl'}", f"--out={tmp_path / 'data'}", "--tokenizer=char"]
    pairs.main(parse(words, pairs, tokenizer, examples))
    return loader.read_meta(tmp_path / "data")["splits"]


@pytest.mark.parametrize(("n", "prompts"), [(20, 20), (23, 23), (40, 40), (99, 20)])
def test_of_a_few_pairs_about_as_many_prompts_are_held_out_as_the_fraction_says(
    n, prompts, tmp_path
):
    splits = answers(tmp_path, n, prompts)
    assert splits["train"]["documents"] + splits["val"]["documents"] == n
    kept = [examples.Examples(tmp_path / "data", split) for split in ("train", "val")]
    rows = [zip(*part[range(part.n)], strict=True) for part in kept]
    learnt, asked = ({x[:a].tobytes() for x, a, _ in part} for part in rows)
    assert not learnt & asked and len(learnt | asked) == prompts
    assert 1 <= len(asked) <= prompts / 10


def test_what_is_held_out_of_a_few_names_does_not_depend_on_their_order():
    for n in range(60):
        names = [f"name {i}" for i in range(n)]
        fraction = writer.adjusted(names, 0.05)
        held = {name for name in names if writer.is_held_out(name, fraction)}
        assert fraction == writer.adjusted(names[::-1] * 2, 0.05)
        assert (fraction == 0.05 and n / 40 <= len(held) <= n / 10) or len(held) == n // 20
    many = [f"name {i}" for i in range(5000)]
    assert writer.adjusted(many, 0.05) == 0.05 and writer.adjusted(many, 1e-9) == 1e-9


def test_pairs_too_few_to_hold_any_out_train_without_evaluations(tmp_path, capsys):
    assert answers(tmp_path, 7).keys() == {"train"}
    assert "too short to hold anything out" in capsys.readouterr().out
    assert trained(tmp_path)[0] is None


def test_a_model_of_text_is_fine_tuned_on_answers_by_readme_s_lines(tmp_path):
    prepared(tmp_path, prose(30_000) + '0123456789?!\0" ')
    shape = [f"--{key}={value}" for key, value in TINY.items() if key.startswith("n_")]
    trained(tmp_path, *shape, "--block_size=16")
    (tmp_path / "out").rename(tmp_path / "text_model")
    said = [{"prompt": f"{i}? ", "completion": f"{i}!"} for i in range(30)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, said)))
    words = {"input": tmp_path / "own.jsonl", "out": tmp_path / "pairs"}
    words["tokenizer"] = tmp_path / "data"
    pairs.main(
        parse([f"--{key}={value}" for key, value in words.items()], pairs, tokenizer, examples)
    )
    source = f"--init_from={tmp_path / 'text_model'}"
    result, config = trained(tmp_path, source, f"--data={tmp_path / 'pairs'}")
    assert result["sequences"] >= 1 and config["n_embd"] == TINY["n_embd"]
    assert config["learning_rate"] == pytest.approx(1e-3), "a tenth"


def test_the_default_recipe_is_the_one_of_the_screenings():
    config = parse([], *MODULES)
    recipe = {"optimizer": "muon", "loss_weight": "sqrt", "objective": "any_order"}
    recipe |= {"norm": "rms", "mlp": "gelu", "bias": False, "qk_norm": True, "zero_init": "all"}
    recipe |= {"lr_decay": "linear", "decay_start": 0.3, "weight_decay": 0.0, "block_size": 128}
    assert recipe.items() <= config.items()
    assert settings.defaults_of(MODULES).keys() >= recipe.keys()


def test_where_far_more_is_held_out_than_was_wanted_it_is_said(tmp_path, capsys):
    counts = {"train": {"tokens": 50}, "val": {"tokens": 50}}
    writer.say_unheld(tmp_path, {"splits": counts}, 0.05)
    assert "holds 50% of its tokens out, not val_fraction 0.05" in capsys.readouterr().out
    writer.say_unheld(tmp_path, {"splits": counts | {"val": {"tokens": 3}}}, 0.05)
    assert capsys.readouterr().out == ""


# ---- The best weights ----------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path):
    """A folder of random letters: what is learnt of them by heart is no help with others."""
    numbers = torch.randint(8, (2, 400), generator=torch.Generator().manual_seed(1)).tolist()
    parts = [("".join("abcdefgh"[i] for i in row)) for row in numbers]
    chars = tokenizer.Char("abcdefgh")
    writer.prepare(tmp_path / "data", list(zip(("train", "val"), parts, strict=True)), chars)
    return tmp_path / "data"


OVERFIT = {"objective": "ar", "n_embd": 32, "eval_interval": 10, "save_interval": 10, "keep": 99}
OVERFIT |= {"max_iters": 60, "lr_decay": "constant", "learning_rate": 1e-2}


def nats_of(out):
    """{step: nats per token} of the evaluations in the log, and the steps that it names best."""
    entries = [entry for entry in log(out) if "nats_per_token" in entry]
    nats = {entry["step"]: entry["nats_per_token"] for entry in entries}
    return nats, [entry.get("best_step") for entry in entries]


@pytest.mark.parametrize(("ema", "sequences"), [(0.0, 6), (0.5, 2)])  # of two no interval is known
def test_the_best_weights_are_kept_when_a_run_learns_its_text_by_heart(
    ema, sequences, letters, tmp_path, capsys
):
    out, keys = tmp_path / "out", OVERFIT | {"ema": ema, "eval_sequences": sequences}
    run(letters, out, **keys)
    nats, named = nats_of(out)
    best = min(nats, key=nats.get)
    state, then = checkpoint.read(out / "best.pt"), checkpoint.read(out / f"ckpt_{best}.pt")
    assert state["step"] == best < 60 and named[-1] == best
    assert same(state["model"], then["model"]) and same(state["ema"], then["ema"])
    said = f"the lowest held-out NLL was {nats[best]:.3f} at step {best} ({out / 'best.pt'}); the "
    assert f"{said}last is {nats[60]:.3f}\n" in capsys.readouterr().out
    words = [f"--ckpt={out / 'best.pt'}", f"--sequences={sequences}"]
    words += ["--device=cpu", "--dtype=float32"]
    result = evaluate.main(parse(words, *evaluate.MODULES))
    assert result["nats_per_token"] == pytest.approx(nats[best], rel=1e-5)


def test_a_resumed_run_knows_its_best_weights_and_a_new_one_leaves_them_with_the_old(
    letters, tmp_path, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(letters, whole, **OVERFIT)
    for steps in (10, 40, 60):
        run(letters, parts, **OVERFIT | {"max_iters": steps})
        best = (parts / "best.pt").read_bytes()
    assert same(*(checkpoint.read(out / "best.pt")["model"] for out in (whole, parts)))
    assert nats_of(parts) == nats_of(whole)
    run(letters, parts, **OVERFIT | {"max_iters": 70})
    assert (parts / "best.pt").read_bytes() == best, "none was better"
    for content, says in (
        (best[:999], "is damaged"),
        ((parts / "ckpt.pt").read_bytes(), "how good"),
    ):
        (parts / "best.pt").write_bytes(content)
        assert says in refusal(letters, parts, **OVERFIT | {"max_iters": 80})
    (parts / "best.pt").write_bytes(best)
    run(letters, parts, **OVERFIT | {"max_iters": 10, "learning_rate": 1e-6, "resume": False})
    assert (parts / "old_1" / "best.pt").read_bytes() == best
    assert checkpoint.read(parts / "best.pt")["step"] == 10, "worse, and the best of its own run"
    (parts / "ckpt.pt").unlink()
    [path.unlink() for path in parts.glob("ckpt_*.pt")]
    run(letters, parts, **OVERFIT | {"max_iters": 2, "eval_interval": 2})
    assert sorted(path.name for path in (parts / "old_2").iterdir()) == ["best.pt", "log.jsonl"]
    assert not (parts / "best.pt").exists(), "not yet read once"
    assert f"kept: --ckpt={parts / 'old_2'}\n" in capsys.readouterr().out
    assert checkpoint.load(parts / "old_2")[2]["max_iters"] == 10


def test_a_text_read_once_or_without_a_held_out_part_keeps_no_best_weights(
    letters, tmp_path, capsys
):
    run(letters, tmp_path / "once", **OVERFIT | {"max_iters": 3, "eval_interval": 1})
    writer.prepare(tmp_path / "all", [("train", "abc" * 90)], tokenizer.Char("abc"))
    run(tmp_path / "all", tmp_path / "whole", **OVERFIT | {"max_iters": 20})
    assert not list(tmp_path.glob("*/best.pt")) and "lowest" not in capsys.readouterr().out
