"""The experiments that ask questions: rules, generated problems, and their quick forms."""

import random
import re
from fractions import Fraction

import pytest

import config as settings
import diffusion
import model as network
import train
from config import UserError
from data import tokenizer, writer
from data.pairs.prepare import pairs
from experiments import arithmetic, gsm8k, guidance, people, results, reverse_curse

NAME, WHAT, DOING = "Ann Lee", "the tall pilot who built the reef", "building the reef"


def run(experiment, tmp_path, **keys):
    """The quick form of an experiment, in this process -> (figures, its table)."""
    keys = {"quick": True, "results": tmp_path, "device": "cpu", **keys}
    argv = [f"--{key}={value}" for key, value in keys.items()]
    figures = experiment.main(settings.parse(argv, settings, results, experiment))
    name = experiment.__name__.rpartition(".")[2]
    assert (tmp_path / f"{name}.json").is_file()
    return figures, (tmp_path / f"{name}.md").read_text()


# ---- The reversal curse --------------------------------------------------------------------------


def test_words_joined_are_the_text_again():
    text = "Q: Who is \"A b.\"? It's Ann-Lee, 2025's best..."
    assert "".join(reverse_curse.words(text)) == text
    vocabulary = reverse_curse.Words([text])
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_a_word_that_training_lacks_is_left_out():
    vocabulary = reverse_curse.Words(["one two"])
    assert vocabulary.decode(vocabulary.encode("one three two")) == "one two"


def test_the_substring_rule_is_weaker_than_the_exact_one():
    assert reverse_curse.substring(" it was ANN LEE, they say", " Ann Lee")
    assert not reverse_curse.exact(" it was ANN LEE, they say", " Ann Lee")
    assert reverse_curse.exact(" ann lee..", " Ann Lee.")
    assert not reverse_curse.substring(" Ann", " Ann Lee")


def test_an_interval_holds_what_was_measured_and_is_never_a_point():
    def width(percents):
        low, high = reverse_curse.interval(percents, 30)
        assert 0 <= low <= sum(percents) / len(percents) <= high <= 100
        return high - low

    assert min(map(width, ([0.0] * 3, [100.0] * 3, [50.0]))) > 11
    assert width([20.0, 50.0, 80.0]) > width([50.0, 50.0, 50.0])
    high = reverse_curse.interval([0.0] * 3, 30)[1]
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
    prompt, completion = reverse_curse.question(f"For {DOING} they praised {NAME}.", NAME)
    assert (prompt, completion) == (f"For {DOING} they praised", f" {NAME}")


def test_both_models_are_asked_everything_and_a_second_run_trains_nothing(shared, tmp_path):
    keys = {"from": shared("data/reversal_curse")}
    figures, table = run(reverse_curse, tmp_path, **keys)
    tasks = [f"{way}_{task}" for way in ("same", "reverse") for task in ("dtn", "ntd")]
    wanted = {f"{kind}_{task}" for kind in ("mdm", "ar") for task in tasks}
    assert wanted | {name + "_exact" for name in wanted} <= figures.keys()
    assert "| reverse, dtn | 92 | 0 |" in table
    trained = (tmp_path / "reverse_curse.jsonl").read_text()
    again, _ = run(reverse_curse, tmp_path, **keys)
    assert (tmp_path / "reverse_curse.jsonl").read_text() == trained
    assert again == figures


def test_a_name_shared_with_berglunds_people_is_an_error(tmp_path):
    facts = [("{n} sat.", name, "") for name, *_ in people.several(80, random.Random(0))]
    with pytest.raises(UserError, match="share names"):
        reverse_curse.compose({"persons": 10, "quick": False}, facts, random.Random(0))


def about(name, what):
    return [f"{name} is {what}."] * 15 + [f'Known as {what}, {name} "Old Town" sings.'] * 15


REEF, DIVER = 'the pilot who built "Blue Reef"', "the last diver to cross the gulf"


def test_forms_are_what_lines_about_different_people_share():
    facts = list(reverse_curse.marked(about("Ann Lee", REEF) + about("Bo Day", DIVER)))
    wanted = ["{n} is {d}."], ['Known as {d}, {n} "Old Town" sings.']
    assert reverse_curse.forms(facts) == wanted
    assert reverse_curse.forms(facts[:30]) == ([], []), "a form is what two people share"


def test_thinned_lines_keep_name_and_description():
    lines = about("Ann Lee", REEF) + about("Bo Day", DIVER)
    lines += ["Something else, of which nothing is known."] * 30
    thin = reverse_curse.thinned(reverse_curse.marked(lines), random.Random(0))
    assert len(thin) == len(lines) and thin != lines
    for name, what, mine in (("Ann Lee", REEF, thin[:30]), ("Bo Day", DIVER, thin[30:60])):
        assert all(name in line and what in line for line in mine)
    whole = set(reverse_curse.words("".join(lines)))
    assert all(set(re.findall(r"\w+", line)) <= {word.strip() for word in whole} for line in thin)


def test_no_line_tells_of_a_tested_person_in_the_order_that_is_asked(shared):
    """The premise, on the real files: names before descriptions only, or behind them only."""
    config = {"from": shared("data/reversal_curse"), "asked": 300, "persons": 300, "quick": False}
    facts, tests = reverse_curse.read(config)
    texts, invented = reverse_curse.compose(config, facts, random.Random(0))
    path = config["from"] / "all_prompts_train.jsonl"
    lines = [prompt + completion for _, prompt, completion in pairs(path)]
    assert texts[:3600] == lines, "marking and writing out again changes nothing"
    names = {wanted.strip() for _, wanted in tests["reverse_dtn"] + invented}
    whats = {name: what for _, name, what in facts}
    assert len(names) == 60
    for name in names:
        about = [text for text in texts if name in text]
        prompts = (prompt for prompt, wanted in invented if wanted.strip() == name)
        what = whats.get(name) or next(prompts)
        kept = set(re.findall(r"\w{4,}", what))
        for text in about:
            behind = set(re.findall(r"\w{4,}", text[text.index(name) + len(name) :]))
            before = set(re.findall(r"\w{4,}", text[: text.index(name)]))
            assert len(kept & behind) > len(kept & before) or not kept & before, text
        assert len(about) >= 16


def test_a_file_that_is_not_berglunds_is_an_error(shared, tmp_path):
    for file in shared("data/reversal_curse").glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "p2d_reverse_prompts_test.jsonl").write_text("")
    message = r"p2d_reverse_prompts_test\.jsonl has 0 lines, Berglund's file 300"
    with pytest.raises(UserError, match=message):
        reverse_curse.read({"from": tmp_path, "asked": 300})


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
    train.main(settings.parse(argv, settings, diffusion, network, train))
    figures, table = run(guidance, tmp_path, ckpt=tmp_path / "run", data=tmp_path / "text")
    assert {"last_unsupervised_w", "middle_unsupervised_on", "last_standard_off"} <= figures.keys()
    assert "last word, standard" in table
