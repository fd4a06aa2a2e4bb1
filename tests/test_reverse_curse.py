"""The experiments that ask questions: rules, generated problems, and their quick forms."""

import contextlib
import random
import re
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import config as settings
import train
from config import UserError
from data import tokenizer, writer
from data.pairs.prepare import pairs
from experiments import (
    arithmetic,
    berglund,
    gsm8k,
    guidance,
    people,
    results,
    reverse_curse,
    reverse_tables,
    runs,
)

KEYS = {"persons": 300, "validating": 10, "quick": False}
NAME, WHAT, DOING = "Ann Lee", "the tall pilot who built the reef", "building the reef"


def run(experiment, tmp_path, *more, **keys):
    """The quick form of an experiment, in this process -> (figures, its table)."""
    keys = {"quick": True, "results": tmp_path, "device": "cpu", **keys}
    argv = [f"--{key}={value}" for key, value in keys.items()]
    figures = experiment.main(settings.parse(argv, settings, results, *more, experiment))
    name = experiment.__name__.rpartition(".")[2]
    assert (tmp_path / f"{name}.json").is_file()
    return figures, (tmp_path / f"{name}.md").read_text()


# ---- The reversal curse --------------------------------------------------------------------------


def test_words_joined_are_the_text_again():
    text = "Q: Who is \"A b.\"? It's Ann-Lee, 2025's best..."
    assert "".join(berglund.words(text)) == text
    vocabulary = berglund.Words([text])
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_a_word_that_training_lacks_is_left_out():
    vocabulary = berglund.Words(["one two"])
    assert vocabulary.decode(vocabulary.encode("one three two")) == "one two"


def test_the_substring_rule_is_weaker_than_the_exact_one():
    assert reverse_curse.substring(" it was ANN LEE, they say", " Ann Lee")
    assert not reverse_curse.exact(" it was ANN LEE, they say", " Ann Lee")
    assert reverse_curse.exact(" ann lee..", " Ann Lee.")
    assert not reverse_curse.substring(" Ann", " Ann Lee")


def test_an_interval_holds_what_was_measured_and_is_never_a_point():
    def width(percents):
        low, high = reverse_tables.interval(percents, 30)
        assert 0 <= low <= sum(percents) / len(percents) <= high <= 100
        return high - low

    assert min(map(width, ([0.0] * 3, [100.0] * 3, [50.0]))) > 11
    assert width([20.0, 50.0, 80.0]) > width([50.0, 50.0, 50.0])
    high = reverse_tables.interval([0.0] * 3, 30)[1]
    assert high == pytest.approx(11.35, abs=0.01), "Wilson's for 0 of 30"


def test_a_line_has_name_and_deed_in_the_order_of_its_pattern():
    rng, person = random.Random(0), (NAME, WHAT, DOING)
    for patterns in (people.NAME_FIRST, people.NAME_LAST):
        for line in (line.lower() for line in people.lines([person], patterns, len(patterns), rng)):
            name_first = line.index(NAME.lower()) < line.index("the reef")
            assert name_first == (patterns is people.NAME_FIRST)
            assert "{" not in line and (WHAT in line or DOING in line)


def test_no_two_invented_people_have_one_name():
    assert len({name for name, *_ in people.several(2000, random.Random(1))}) == 2000


def test_a_question_stops_before_the_name():
    prompt, completion = berglund.question(f"For {DOING} they praised {NAME}.", NAME)
    assert (prompt, completion) == (f"For {DOING} they praised", f" {NAME}")


def test_both_models_are_asked_everything_and_a_second_run_trains_nothing(
    shared, tmp_path, monkeypatch
):
    keys = {"from": shared("data/reversal_curse"), "runs": tmp_path / "runs"}
    figures, table = run(reverse_curse, tmp_path, runs, **keys)
    tasks = [f"{way}_{task}" for way in ("same", "reverse") for task in ("dtn", "ntd")]
    wanted = {f"{kind}_{task}" for kind in ("mdm", "ar") for task in tasks}
    wanted |= {"mdm_reverse_dtn_chosen", "ar_reverse_dtn, ranked first, seed 1337"}
    assert wanted | {f"{kind}_{task}_exact" for kind in ("mdm", "ar") for task in tasks} <= set(
        figures
    )
    assert all(isinstance(value, (str, int, float)) for value in figures.values())
    assert "| reverse, dtn | 92 | 0 |" in table and "left out" not in table
    monkeypatch.setattr(train, "main", None)
    again, _ = run(reverse_curse, tmp_path, runs, **keys)
    assert again | {"seconds": 0} == figures | {"seconds": 0}


def test_the_best_third_of_all_trainings_is_that_of_the_people_who_validate(monkeypatch):
    kept = {"one": {20: "b", 10: "a"}, "two": {30: "d", 10: "c"}}
    monkeypatch.setattr(reverse_curse.checkpoint, "kept_beside", lambda path: kept[path.parts[0]])
    monkeypatch.setattr(reverse_curse.checkpoint, "load", lambda path, _: (path, None, None))
    ctx = SimpleNamespace(device=None)
    for answers, best in (("xyxx", "b"), ("yxxx", "a"), ("xyyx", "c"), ("xxxx", "d")):
        answer_of = dict(zip("abcd", answers, strict=True))
        monkeypatch.setattr(
            reverse_curse, "ask", lambda net, _, answer_of=answer_of: [answer_of[net[0]]]
        )
        model, tries = reverse_curse.best_of(ctx, ["one", "two"], None, [("", "y")])
        assert model == best
        assert [z for each in tries for z in each] == [100 * (answer == "y") for answer in answers]


def test_the_rank_of_a_name_is_among_all_names_that_are_asked_for(monkeypatch):
    items = [("one", " Ann"), ("two", " Bo"), ("three", " Cy"), ("four", " Ann")]
    nats = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, 3], [3, 2, 1]]).flatten()
    asked = []
    monkeypatch.setattr(
        reverse_curse.evaluate, "answer_nats", lambda _, requests, **o: asked.append(o) or nats
    )
    words = berglund.Words(["one two three four Ann Bo Cy"])
    model = SimpleNamespace(config={"attention": "causal"})
    ctx = SimpleNamespace(autocast=contextlib.nullcontext)
    first, rank = reverse_curse.ranked((model, words, ctx), items)
    assert (first, rank) == (25, (1 + 2 + 3 + 3) / 4) and "pad_to" not in asked[0]
    model.config["attention"] = "full"
    reverse_curse.ranked((model, words, ctx), items)
    assert asked[1]["pad_to"] == reverse_curse.WIDTH


def test_a_wrong_answer_names_who_is_read_there_someone_else_or_nobody():
    items = [("", " Ann Lee")] * 4
    answers = [" Ann Lee, they say", " Bo Day sat", " Cy Fox", " the Reef"]
    kinds = reverse_curse.wrong(answers, items, {"Ann Lee", "Bo Day", "Cy Fox"}, {"Bo Day"})
    assert kinds == {"a name read there": 25, "another name": 25, "no name": 25}


def test_a_name_shared_with_berglunds_people_is_an_error(tmp_path):
    facts = [("{n} sat.", name, "") for name, *_ in people.several(80, random.Random(0))]
    with pytest.raises(UserError, match="share names"):
        berglund.compose(KEYS | {"persons": 10}, facts, random.Random(0))


def test_who_validates_is_read_name_first_alone():
    first, last = "{n} is {d}.", "Known as {d}, {n} sings."
    sentences = [(first, "Ann Lee", REEF), (last, "Ann Lee", REEF), (first, "Bo Day", DIVER)]
    facts = [fact for fact in sentences for _ in range(30)]
    kept, questions = berglund.validating(facts, 1)
    assert kept == facts[:30] + facts[60:], "Bo Day is told of in one order"
    assert questions == [(f"Known as {REEF},", " Ann Lee")] * 10
    assert berglund.names_of(facts) == ({"Ann Lee", "Bo Day"}, {"Ann Lee"})
    assert berglund.names_of(kept)[1] == set()


def about(name, what):
    return [f"{name} is {what}."] * 15 + [f'Known as {what}, {name} "Old Town" sings.'] * 15


REEF, DIVER = 'the pilot who built "Blue Reef"', "the last diver to cross the gulf"


def test_forms_are_what_lines_about_different_people_share():
    facts = list(berglund.marked(about("Ann Lee", REEF) + about("Bo Day", DIVER)))
    wanted = ["{n} is {d}."], ['Known as {d}, {n} "Old Town" sings.']
    assert berglund.forms(facts) == wanted
    assert berglund.forms(facts[:30]) == ([], []), "a form is what two people share"


def test_thinned_lines_keep_name_and_description():
    lines = about("Ann Lee", REEF) + about("Bo Day", DIVER)
    lines += ["Something else, of which nothing is known."] * 30
    thin = berglund.thinned(berglund.marked(lines), random.Random(0))
    assert len(thin) == len(lines) and thin != lines
    for name, what, mine in (("Ann Lee", REEF, thin[:30]), ("Bo Day", DIVER, thin[30:60])):
        assert all(name in line and what in line for line in mine)
    whole = set(berglund.words("".join(lines)))
    assert all(set(re.findall(r"\w+", line)) <= {word.strip() for word in whole} for line in thin)


def test_no_line_tells_of_a_tested_person_in_the_order_that_is_asked(shared):
    """The premise, on the real files: names before descriptions only, or behind them only."""
    config = KEYS | {"from": shared("data/reversal_curse"), "asked": 300}
    facts, tests = berglund.read(config)
    texts, asked = berglund.compose(config, facts, random.Random(0))
    validation, invented = asked["validation"], asked["reverse_invented"]
    path = config["from"] / "all_prompts_train.jsonl"
    lines = [prompt + completion for _, prompt, completion in pairs(path)]
    assert [berglund.whole(*fact) for fact in facts] == lines, "marked and written out again"
    assert set(texts[:3300]) < set(lines), "ten people have lost thirty lines each"
    names = {wanted.strip() for _, wanted in tests["reverse_dtn"] + invented + validation}
    assert not {wanted for _, wanted in validation} & {w for _, w in tests["reverse_dtn"]}
    whats = {name: what for _, name, what in facts}
    assert len(names) == 70 and 90 <= len(validation) <= 100
    for name in names:
        about = [text for text in texts if name in text]
        prompts = (prompt for prompt, wanted in invented if wanted.strip() == name)
        what = whats.get(name) or next(prompts)
        kept = set(re.findall(r"\w{4,}", what))
        for text in about:
            behind = set(re.findall(r"\w{4,}", text[text.index(name) + len(name) :]))
            before = set(re.findall(r"\w{4,}", text[: text.index(name)]))
            # A few words may be the sentence's own: "The world may know ...".
            has_words = len(kept & before) >= len(kept) / 4
            assert len(kept & behind) > len(kept & before) or not has_words, text
        assert len(about) >= 16


def test_a_file_that_is_not_berglunds_is_an_error(shared, tmp_path):
    for file in shared("data/reversal_curse").glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "p2d_reverse_prompts_test.jsonl").write_text("")
    message = r"p2d_reverse_prompts_test\.jsonl has 0 lines, Berglund's file 300"
    with pytest.raises(UserError, match=message):
        berglund.read({"from": tmp_path, "asked": 300})


def test_a_thinned_sentence_keeps_name_and_description():
    rng = random.Random(0)
    assert people.thin("Known as {d}, {n} sings.", 1.0, rng) == "{d}, {n}"
    assert people.thin("Known as {d}, {n} sings.", 0.0, rng) == "Known as {d}, {n} sings."


# ---- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" $1,080.50 ", Fraction(2161, 2)),
        ("-5", -5),
        ("-$5", -5),
        ("3/4", Fraction(3, 4)),
        ("12%", 12),
        ("70 dollars.", 70),
        ("18.00", 18),
        ("five", None),
        ("", None),
        (None, None),
        ("1/0", None),
    ],
)
def test_an_answer_is_the_number_that_it_writes(text, value):
    assert gsm8k.number(text) == value


def test_the_last_mark_counts_and_nothing_is_equal_to_nothing():
    assert gsm8k.final("#### 3\nso #### 42 \nend") == "42"
    assert gsm8k.final("no mark") is None
    assert gsm8k.same("42.0", "42")
    assert not gsm8k.same(None, "42") and not gsm8k.same("many", "many")


def test_gsm8k_runs_from_files_to_an_answer(shared, tmp_path):
    figures, table = run(gsm8k, tmp_path, **{"from": shared("data/gsm8k")})
    assert figures["problems"] == 2 and 0 <= figures["right_percent"] <= 100
    assert "wanted 18" in table


# ---- Arithmetic ----------------------------------------------------------------------------------


def test_every_equation_of_a_chain_of_thought_holds_and_the_answer_is_the_sum():
    rng = random.Random(0)
    for _ in range(200):
        a, b = arithmetic.draw(rng, rng.randrange(1, 7))
        prompt, answer = arithmetic.problem(a, b)
        for left, right in re.findall(r"<<(.*?)=(\d+)>>", answer):
            assert sum(map(int, left.split("+"))) == int(right)
        assert prompt == f"{a}+{b}||" and gsm8k.same(gsm8k.final(answer), str(a + b))


def test_the_example_in_the_text_is_what_is_generated():
    assert "".join(arithmetic.problem(478, 694)) in arithmetic.__doc__


def test_arithmetic_runs(tmp_path):
    figures, table = run(arithmetic, tmp_path)
    assert {"mdm_left_to_right_1", "ar_left_to_right_3"} <= figures.keys()
    assert "| ARM | left to right |" in table


# ---- Guidance ------------------------------------------------------------------------------------


def test_a_cloze_is_a_window_of_the_text_with_one_word_out():
    text = "some words here and there, and a little more of them after that. " * 9
    for kind in ("last", "middle"):
        for before, word, after in guidance.clozes(text, 60, 40, kind, random.Random(0)):
            assert len(before + word + after) == 60 and before + word + after in text
            assert (after == "") == (kind == "last")


def test_the_scale_is_chosen_on_one_half_and_evaluated_on_the_other():
    def find(some, w):  # w = 0.4 finds all of the first half and none of the other, w = 0 contrary
        return [(w == 0.4) if item < 10 else (w == 0) for item in some]

    line, curve = guidance.choose_scale(find, list(range(20)))
    assert (line["w"], line["w = 0"], line["with w"]) == (0.4, 100, 0)
    assert curve == [100 * (w == 0.4) for w in guidance.SCALES]


def test_guidance_runs_in_both_forms(tmp_path):
    text = "some words here and there, and a little more of them after that. " * 40
    alphabet = tokenizer.build("char", [text + "\0"])
    writer.prepare(tmp_path / "text", [("train", text), ("val", text)], alphabet)
    keys = {"data": tmp_path / "text", "out_dir": tmp_path / "run", "device": "cpu"}
    keys |= {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 48, "batch_size": 4}
    keys |= {"max_iters": 2, "warmup_iters": 1, "show_sample": False, "eval_sequences": 2}
    keys |= {"compile": False}
    argv = [f"--{key}={value}" for key, value in keys.items()]
    train.main(settings.parse(argv, *train.MODULES))
    figures, table = run(guidance, tmp_path, ckpt=tmp_path / "run", data=tmp_path / "text")
    assert {"last_unsupervised_w", "middle_unsupervised_on", "last_standard_off"} <= figures.keys()
    assert "last word, standard" in table
