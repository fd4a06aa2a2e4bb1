"""Questions: worded as the harness words them, tokenized as one text, answered by likelihoods."""

import gzip
import json
import lzma
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import L, V
from plain import DEFAULTS

import config as settings
import evaluate
from config import UserError
from data import choice as sets
from data import tokenizer as tokenizers
from data.tokenizer import Byte, Char
from evals import choice
from experiments import common_draws
from lib.stats import mean_and_error
from model import make_network
from run import checkpoint

ROOT = Path(__file__).parent.parent


def transformer(**keys):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64, "vocab_size": 256}
    return make_network(DEFAULTS | sizes | keys).eval()


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return path


def read(tmp_path, name, *records):
    return sets.read(name, jsonl(tmp_path / f"{name}.jsonl", *records))[0]


# ---- Questions -----------------------------------------------------------------------------------

FIRST = {  # of each real set: how the context begins and ends, its first options, the gold
    "arc_challenge": (
        "Question: An astronomer observes",
        "increase in rotation?\nAnswer:",
        [" Planetary density will decrease.", " Planetary years will become longer."],
        2,
    ),
    "arc_easy": (
        "Question: Which statement best",
        "most food webs?\nAnswer:",
        [" Sunlight is the source"],
        0,
    ),
    "boolq": (
        "All biomass goes through at least some",
        "\nQuestion: does ethanol take more energy make that produces?\nAnswer:",
        [" no", " yes"],
        0,
    ),
    "hellaswag": (
        "Roof shingle removal: A man is sitting on a roof. he",
        " on a roof. he",
        [" is using wrap to wrap a pair of skis.", " is ripping level tiles off."],
        3,
    ),
    "openbookqa": (
        "A person wants to start saving",
        "the best way to save money is to",
        [" make more phone calls"],
        1,
    ),
    "piqa": (
        "Question: How do I ready",
        "it's new occupants?\nAnswer:",
        [" Provide the guinea pig with"],
        0,
    ),
    "race": (
        'Article: It is well-known that the "prom"',
        'stops worrying.\n\nQuestion: In which country is the prom called a "formal"?\n'
        "Answer: Canada.\nQuestion: Why is the prom important in the students' lives?\n"
        "Answer: It's the sign of becoming an adult.\n"
        "What is the passage mainly about?",
        [" The history of the prom."],
        3,
    ),
    "sciq": (
        "\nQuestion: Who proposed the theory",
        "by natural selection?\nAnswer:",
        [" Linnaeus", " shaw", " Scopes", " darwin"],
        3,
    ),
    "social_iqa": (
        "Q: Tracy didn't go home that evening and resisted Riley's attacks. What does",
        "What does Tracy need to do before this?\nA:",
        [" make a new plan", " Go home and see Riley", " Find somewhere to go"],
        2,
    ),
    "winogrande": (
        "Sarah was a much better surgeon than Maria so Sarah",
        " than Maria so Sarah",
        [" always got the easier cases.", " always got the easier cases."],
        1,
    ),
    "lambada": ("In my palm is a clear stone", "I don't care about", [" signs"], 0),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_question_of_each_real_set_is_worded_as_the_harness_words_it(name, shared):
    begin, end, options, gold = FIRST[name]
    folder = "data/zero_shot_ppl" if name == "lambada" else "data/multiple_choice"
    questions, _ = sets.read(name, shared(folder), limit=3)
    first = questions[0]
    assert len(questions) == 3
    assert first.contexts[0].startswith(begin) and first.contexts[0].endswith(end)
    assert len(first.contexts) == len(first.options) and first.gold == gold
    assert all(
        option.startswith(beginning)
        for option, beginning in zip(first.options, options, strict=False)
    )


def test_every_real_question_has_options_and_one_of_them_is_right(shared):
    for name, total in (("race", 362), ("openbookqa", 500), ("winogrande", 1267)):
        questions, _ = sets.read(name, shared("data/multiple_choice"))
        assert len(questions) == total and all(
            option[0] == " " for question in questions for option in question.options
        )


def test_winogrande_scores_what_follows_the_gap_behind_either_option(tmp_path):
    record = {"sentence": "Bo saw Al, so _ ran.", "option1": "Bo", "option2": "Al", "answer": "2"}
    (question,) = read(tmp_path, "winogrande", record)
    assert question.contexts == ["Bo saw Al, so Bo", "Bo saw Al, so Al"] and question.options == [
        " ran.",
        " ran.",
    ]
    assert question.gold == 1


def test_race_asks_the_last_question_of_an_article_and_shows_the_others_answered(tmp_path):
    one = {"article": "A.", "question": "Who?", "options": ["me", "you"], "answer": "B"}
    gap = {"article": "A.", "question": "It was  _  .", "options": ["old", "new"], "answer": "A"}
    last = {"article": "A.", "question": "Why?", "options": ["so", "no"], "answer": "A"}
    other = {"article": "B.", "question": "How?", "options": ["so", "no"], "answer": "B"}
    first, second = read(tmp_path, "race", one, gap, last, other)
    assert (
        first.contexts[0] == "Article: A.\n\nQuestion: Who?\nAnswer: you\nIt was old\nWhy?"
        and first.gold == 0
    )
    assert (
        second.contexts[1] == "Article: B.\n\nHow?"
        and second.gold == 1
        and second.where.endswith("line 4")
    )


def test_hellaswag_as_published_becomes_what_the_harness_makes_of_it(tmp_path):
    published = {
        "activity_label": "Roof",
        "ctx_a": "A man [header] sits.",
        "ctx_b": "he",
        "label": "1",
    }
    published["endings"] = ["falls. [title] Then [step] he  runs.", "stays."]
    (question,) = read(tmp_path, "hellaswag", published)
    assert question.contexts == ["Roof: A man sits. He"] * 2 and question.gold == 1
    assert question.options == [" falls.. Then he runs.", " stays."]


def test_ones_own_questions_go_on_from_their_context_as_they_are(tmp_path):
    (question,) = read(
        tmp_path, "plain", {"context": "2+2=", "options": ["4", " 5"], "gold": 0, "more": None}
    )
    assert question == (f"{tmp_path}/plain.jsonl, line 1", ["2+2="] * 2, ["4", " 5"], 0)


def test_braces_in_a_question_are_text(tmp_path):
    (question,) = read(tmp_path, "piqa", {"goal": "{x} {}", "sol1": "{", "sol2": "}", "label": 0})
    assert question.contexts[0] == "Question: {x} {}\nAnswer:" and question.options == [" {", " }"]


@pytest.mark.parametrize(
    ("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]
)
def test_files_may_be_packed_and_a_folder_finds_its_set(ending, pack, tmp_path):
    line = b'{"context": "a", "options": ["b"], "gold": 0}\n'
    (tmp_path / f"plain_test.jsonl{ending}").write_bytes(pack(b"\n" + line + line))
    questions, path = sets.read("plain", tmp_path, limit=1)
    assert len(questions) == 1 and path.name == f"plain_test.jsonl{ending}"
    assert questions[0].where.endswith("line 2")


ARC = {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
WRONG = [
    ("plain", {"context": "a", "options": ["b"]}, 'no key "gold"'),
    ("plain", {"context": "a", "options": "bc", "gold": 0}, 'no list under the key "options"'),
    ("plain", {"context": "a", "options": ["b", 3], "gold": 0}, '"options" must be text, not 3'),
    ("plain", {"context": "a", "options": ["b", ""], "gold": 0}, "an option is empty"),
    ("plain", {"context": "a", "options": [], "gold": 0}, "an option is empty, or there is none"),
    (
        "plain",
        {"context": "a", "options": ["b", "c"], "gold": 2},
        "the answer 2 is out of range: from 0 to 1",
    ),
    (
        "plain",
        {"context": "a", "options": ["b", "c"], "gold": -1},
        "the answer -1 is out of range: from 0 to 1",
    ),
    (
        "plain",
        {"context": "a", "options": ["b", "c"], "gold": "b"},
        "\"gold\" must be a whole number, not 'b'",
    ),
    ("plain", {"context": 5, "options": ["b", "c"], "gold": 0}, '"context" must be text, not 5'),
    ("piqa", {"goal": "g", "sol1": "a", "label": 0}, 'no key "sol2"'),
    (
        "social_iqa",
        {
            "context": "c",
            "question": "q",
            "answerA": "a",
            "answerB": "b",
            "answerC": "c",
            "label": "4",
        },
        "the answer 3 is out of range",
    ),
    ("arc_easy", ARC | {"answerKey": "C"}, 'the answer "C" is none of the labels A, B'),
    ("arc_easy", ARC | {"choices": ["x", "y"]}, 'no object under the key "choices"'),
    (
        "race",
        {"article": "a", "question": "q", "options": ["x"], "answer": "B"},
        "the answer 1 is out of range: from 0 to 0",
    ),
    (
        "race",
        {"article": "a", "question": "q", "options": ["x"], "answer": "BB"},
        'the answer must be a letter, not "BB"',
    ),
    ("race", {"question": "q", "options": ["x"], "answer": "A"}, 'no key "article"'),
    (
        "winogrande",
        {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"},
        "the sentence has no gap _",
    ),
    ("lambada", {"text": "word"}, "the text must be more than one word"),
    (
        "boolq",
        {"passage": "p", "question": "q", "answer": "yes"},
        "\"answer\" must be a whole number, not 'yes'",
    ),
]


@pytest.mark.parametrize(("name", "record", "message"), WRONG)
def test_a_line_that_is_no_question_is_named_with_its_file_and_number(
    name, record, message, tmp_path
):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError) as error:
        sets.read(name, path)
    assert str(error.value).startswith(f"{path}, line 2: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no question"),
        ("\n \n", "holds no question"),
        ('{"context": "a", "options": ["b"], "gold": 0}\n{"context"', "line 2: not JSON"),
        ("[1]", "line 1: a JSON array; each line"),
    ],
)
def test_a_file_that_is_no_set_is_one_line(content, message, tmp_path):
    (tmp_path / "plain.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        sets.read("plain", tmp_path)


def test_a_folder_must_have_one_file_of_the_set(tmp_path):
    with pytest.raises(UserError, match=r"holds no file plain\*\.jsonl"):
        sets.read("plain", tmp_path)
    for name in ("plain_a.jsonl", "plain_b.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"several files of plain, so name one: plain_a\.jsonl, plain_b\.jsonl\.gz"
    ):
        sets.read("plain", tmp_path)


# ---- Text to requests ----------------------------------------------------------------------------


@pytest.fixture
def gpt2(shared, tmp_path, monkeypatch):
    for file in shared("data/tiktoken_cache").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return tokenizers.build("gpt2", [])


def test_context_and_option_are_tokenized_as_one_text_and_a_space_is_the_options(gpt2):
    expected = gpt2.encode("The cat"), gpt2.encode(" sat down")
    assert choice.prompt_and_answer(gpt2, -1, "", "The cat", " sat down") == expected
    assert choice.prompt_and_answer(gpt2, -1, "", "The cat ", "sat down") == expected
    assert choice.prompt_and_answer(gpt2, -1, "", "", "sat down") == ([], gpt2.encode("sat down"))


def test_where_a_token_spans_the_border_the_cut_is_at_the_contexts_own_length(gpt2):
    assert (
        gpt2.encode("unbelie") != gpt2.encode("unbelievable")[:2]
        and len(gpt2.encode("unbelie")) == 3
    )
    prompt, answer = choice.prompt_and_answer(gpt2, -1, "", "unbelie", "vable so")
    assert prompt + answer == gpt2.encode("unbelievable so") and len(prompt) == min(
        3, len(prompt + answer) - 1
    )
    prompt, answer = choice.prompt_and_answer(gpt2, -1, "", "h", "e")
    assert (prompt, answer) == ([], gpt2.encode("he"))  # an option has a token at least


def test_llamas_bos_is_given_once(shared, monkeypatch):
    pytest.importorskip("sentencepiece")
    monkeypatch.setenv("NANOMDM_SHARED", str(shared("data/llama_tokenizer").parent.parent))
    llama = tokenizers.build("llama", [])
    prompt, answer = choice.prompt_and_answer(llama, -1, "", "The cat", " sat")
    assert prompt == [1, *llama.encode("The cat")] and prompt + answer == [
        1,
        *llama.encode("The cat sat"),
    ]
    assert choice.prompt_and_answer(llama, 1, "", "The cat", " sat") == (
        prompt[1:],
        answer,
    )  # a causal network reads it as start_id
    assert choice.prompt_and_answer(llama, -1, "", "", "sat") == ([1], llama.encode("sat"))


def test_a_block_keeps_the_end_of_the_context_and_the_beginning_of_the_option():
    prompt, answer = list(range(10)), list(range(20, 25))
    assert choice.fit(prompt, answer, 15) == (prompt, answer)
    assert choice.fit(prompt, answer, 8) == ([7, 8, 9], answer)
    assert choice.fit(prompt, answer, 5) == ([], answer)
    assert choice.fit(prompt, answer, 3) == ([], answer[:3])


# ---- Answers: exact where the joint can be enumerated --------------------------------------------


@pytest.fixture
def asked(tmp_path):
    """Every context of two letters, every pair of letters as its options, a random gold."""
    pairs = [a + b for a in "abc" for b in "abc"]
    golds = np.random.default_rng(3).integers(9, size=9).tolist()
    records = [
        {"context": pair, "options": pairs, "gold": gold}
        for pair, gold in zip(pairs, golds, strict=True)
    ]
    questions = read(tmp_path, "plain", *records)
    requests, groups, long, longer = choice.requests_of(questions, Char("abc"), V, L)
    assert long == longer == 0 and len(requests) == 81
    return questions, requests, groups


@pytest.mark.parametrize(
    "estimator", ["chain", "left_to_right", "right_to_left", "any_order", "orders"]
)
def test_with_true_conditionals_the_answers_are_those_of_the_enumerated_joint(
    estimator, asked, network, joint
):
    questions, requests, groups = asked
    options = {"estimator": estimator, "draws": 400 if estimator == "any_order" else 2}
    nats = evaluate.answer_nats(network, requests, groups, batch_size=4096, **options).numpy()
    table = joint.view(9, 9)  # p(context, option)
    exact = -(table / table.sum(1, keepdim=True)).log().flatten().numpy()  # (81,)
    assert nats == pytest.approx(exact, abs=0.25 if estimator == "any_order" else 1e-9)
    best = table.argmax(1).numpy()  # (9,)
    plain, per_byte = choice.likeliest(nats, questions)
    assert plain.tolist() == per_byte.tolist() == best.tolist()  # all options have one length
    gold = [question.gold for question in questions]
    assert mean_and_error(plain == gold)[0] == np.mean(best == gold)


def test_a_longer_option_wins_by_its_nats_per_byte(tmp_path):
    (question,) = read(
        tmp_path, "plain", {"context": "", "options": [" no", " yes, né"], "gold": 1}
    )
    plain, per_byte = choice.likeliest(np.array([2.0, 7.9]), [question])  # 1 nat a byte, and 7.9/8
    assert (plain.item(), per_byte.item()) == (0, 1)
    assert choice.likeliest(np.array([2.0, 8.1]), [question])[1].item() == 0


def test_the_error_of_an_accuracy_is_that_of_a_mean():
    assert mean_and_error([1, 0, 0, 1]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert mean_and_error([True]) == (1.0, math.inf)


@pytest.mark.parametrize("estimator", ["any_order", "lambda_dce", "chain"])
def test_options_that_are_alike_and_share_draws_compare_with_a_fraction_of_the_noise(
    estimator,
):
    model, answer = transformer(vocab_size=20), [7, 3, 9, 4, 4, 1]
    # As in WinoGrande: one text behind contexts that differ in a word.
    requests = [([5, i], answer) for i in range(4)]

    def variance(groups):  # of the difference with the first option, over 30 seeds
        options = {"estimator": estimator, "draws": 4, "groups": groups, "batch_size": 4096}
        nats = torch.stack(
            [evaluate.answer_nats(model, requests, seed=s, **options) for s in range(30)]
        )
        return (nats[:, 1:] - nats[:, :1]).var(0).mean()  # (30, 3)

    assert variance([0] * 4) < 0.3 * variance(None)


def test_the_noise_of_a_comparison_is_the_variance_of_differences_over_seeds():
    # Two seeds, questions of three and of two options: differences 1, 4 twice; then 1 and -1.
    nats = np.array([[1.0, 2, 5, 5, 6], [4, 5, 8, 6, 5]])
    variance, disagree = common_draws.noise(nats, [3, 2])
    assert variance == pytest.approx((0 + 2) / 2) and disagree == 0.5


def test_questions_and_options_share_full_calls_of_the_network(asked, network):
    _, requests, groups = asked
    sizes = []
    hidden = network.hidden
    network.hidden = lambda x, masked_idx=None: sizes.append(len(x)) or hidden(x, masked_idx)
    evaluate.answer_nats(network, requests, draws=10, groups=groups, batch_size=100)
    assert sizes == [100] * 8 + [10]


# ---- The last word -------------------------------------------------------------------------------


def by_hand(model, prompt, n):
    """Greedy decoding of n tokens, one a call, the most confident first."""
    x = torch.tensor([prompt + [model.mask_id] * n])  # (1, W)
    for _ in range(n):
        p, token = model(x)[0].softmax(-1).max(-1)  # (W,) each
        place = torch.where(x[0] == model.mask_id, p, -1).argmax()
        x[0, place] = token[place]
    return x[0, len(prompt) :].tolist()


@torch.no_grad()
def test_a_last_word_is_right_if_greedy_decoding_gives_exactly_its_tokens():
    model = transformer()
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8], [9] * 5]
    answers = [by_hand(model, prompt, n) for prompt, n in zip(prompts, (2, 3, 4, 1), strict=True)]
    requests = list(zip(prompts, answers, strict=True))
    requests[1][1][-1] = (requests[1][1][-1] + 1) % 256  # one token is another
    assert choice.decoded(model, requests, batch_size=2).tolist() == [True, False, True, True]
    guided = choice.decoded(model, requests, cfg_scale=50.0)
    assert guided.tolist() != [True, False, True, True]


@torch.no_grad()
def test_a_causal_network_decodes_the_last_word_from_left_to_right():
    model = transformer(attention="causal")

    def greedy(prompt, n):
        for _ in range(n):
            logits = model(torch.tensor([[model.start_id, *prompt]]))[0, -1]  # (V,)
            prompt = [*prompt, logits.argmax().item()]
        return prompt[-n:]

    requests = [([1, 2, 3], greedy([1, 2, 3], 2)), ([4], greedy([4], 4)), ([5, 6], [0, 0, 0])]
    assert choice.decoded(model, requests).tolist() == [True, True, False]


# ---- The program ---------------------------------------------------------------------------------

RECORDS = [
    {"context": "The cat", "options": [" sat on the mat", " mat the on sat", " ran"], "gold": 0},
    {"context": "Two and two", "options": [" is four", " is fünf"], "gold": 1},
    {"context": "x" * 80, "options": [" y", " z" * 40], "gold": 0},
]


@pytest.fixture
def program(tmp_path):
    """program(...) -> (what choice.main returns for a small saved model and RECORDS, the model)."""

    def run(records=RECORDS, attention="full", **keys):
        model = transformer(attention=attention)
        config = model.config | {"objective": "ar" if attention == "causal" else "any_order"}
        state = {"config": config, "tokenizer": Byte().meta(), "model": model.state_dict()}
        checkpoint.save(tmp_path / "ckpt.pt", state | {"step": 1})
        given = {"ckpt": str(tmp_path), "from": str(tmp_path), "device": "cpu", "dtype": "float32"}
        given |= {"set": "plain"} | keys
        jsonl(tmp_path / f"{given['set']}.jsonl", *records)
        return choice.main(settings.options(given, *choice.MODULES)), model

    return run


@pytest.mark.parametrize("estimator", ["any_order", "lambda_dce", "left_to_right", "ar"])
def test_the_program_answers_as_its_estimator_says(estimator, program, tmp_path):
    keys = {"attention": "causal"} if estimator == "ar" else {"estimator": estimator}
    result, model = program(draws=6, seed=4, out=str(tmp_path / "out.jsonl"), **keys)
    assert result["estimator"] == estimator
    requests = []
    for record in RECORDS:
        for option in record["options"]:
            answer = list(option.encode())[:64]
            context = list(record["context"].encode()) if len(answer) < 64 else []
            requests.append((context[-(64 - len(answer)) :], answer))
    groups, keys = [0, 0, 0, 1, 1, 2, 2], {} if estimator == "ar" else keys
    nats = evaluate.answer_nats(model, requests, groups, draws=6, seed=4, **keys).tolist()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [n for line in lines for n in line["nats"]] == pytest.approx(nats, rel=1e-5)
    answers = [np.argmin(nats[:3]), np.argmin(nats[3:5]), np.argmin(nats[5:])]
    assert [line["answer"] for line in lines] == answers and [line["gold"] for line in lines] == [
        0,
        1,
        0,
    ]
    per_byte = [
        np.argmin(np.divide(nats[:3], [14, 14, 3])),
        np.argmin(np.divide(nats[3:5], [7, 8])),
    ]
    assert [line["answer_per_byte"] for line in lines][:2] == per_byte
    assert result["accuracy"] == np.mean([a == g for a, g in zip(answers, (0, 1, 0), strict=True)])
    assert result["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert (result["texts"], result["texts_cut"], result["options_cut"]) == (7, 2, 1)


def test_the_program_says_what_was_asked_how_it_was_evaluated_and_what_was_cut(
    program, tmp_path, capsys
):
    result, _ = program(draws=2, limit=4, cfg_scale=0.5, pad_to=64, seed=7)
    out = capsys.readouterr().out
    asked = f"plain: all 3 questions of {tmp_path}/plain.jsonl; no examples, "
    assert f"{asked}context '{{context}}', then the option; " in out
    assert "block of 64 tokens: the beginning of the context cut in 2 of 7 texts, " in out
    assert "2 of 7 texts, the end of the option in 1\n" in out
    drawn = "2 draws an option, the same for all options of a question"
    assert f"upper bound by any_order, {drawn}; cfg_scale 0.5; " in out
    assert "rows padded with masks to 64 tokens; float32, raw weights, seed 7; " in out
    accuracy = f"accuracy {result['accuracy']:.4f} +- {result['error']:.4f} (standard error)"
    assert f"{accuracy}; by nats per byte" in out
    program(limit=2, draws=2)
    assert "plain: the first 2 questions" in capsys.readouterr().out


def test_guidance_and_padding_change_the_numbers(program, tmp_path):
    written = []
    for keys in ({}, {"cfg_scale": 1.0}, {"pad_to": 64}):
        program(out=str(tmp_path / "out.jsonl"), draws=2, limit=2, **keys)
        written.append((tmp_path / "out.jsonl").read_text())
    assert len(set(written)) == 3


def test_lambada_gives_the_last_words_accuracy_and_perplexity(program, capsys):
    words = [bytes(by_hand(transformer(), list(b"one two"), 4)), b" six"]
    assert words[0][:1] != b" "  # so it cannot be a real last word, and neither of the two is right
    result, model = program(
        [{"text": "one two six"}, {"text": "a bee"}], set="lambada", draws=3, seed=1
    )
    requests = [(list(b"one two"), list(b" six")), (list(b"a"), list(b" bee"))]
    nats = evaluate.answer_nats(model, requests, draws=3, seed=1).numpy()
    assert (
        result["nats_per_word"] == pytest.approx(nats.mean(), rel=1e-5) and result["accuracy"] == 0
    )
    assert f"perplexity {math.exp(nats.mean()):.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"set": "hella"}, "unknown set 'hella'; did you mean 'hellaswag'?"),
        ({"from": ""}, "say where the questions are: --from=FILE or --from=FOLDER"),
        ({"from": "nowhere"}, "no file or folder nowhere"),
        ({"estimator": "ar"}, "unknown estimator 'ar'"),
        ({"draws": 0}, "draws must be in [1, 1e6], not 0"),
        ({"limit": -1}, "limit must be 0 or more, not -1"),
        ({"pad_to": 65}, "pad_to must be at most the block's 64 tokens"),
        ({"attention": "causal", "cfg_scale": 1.0}, "cfg_scale needs a masked diffusion model"),
        ({"attention": "causal", "pad_to": 64}, "pad_to needs a masked diffusion model"),
        ({"schedule": "linear"}, "unknown schedule 'linear'; did you mean 'loglinear'?"),
    ],
)
def test_a_mistake_is_one_line(keys, message, program):
    with pytest.raises(UserError) as error:
        program(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_question_that_an_alphabet_cannot_write_is_named(tmp_path):
    questions = read(tmp_path, "plain", {"context": "ab", "options": ["c", "d"], "gold": 0})
    with pytest.raises(UserError, match=r"plain\.jsonl, line 1: character 'd' is not among the 3"):
        choice.requests_of(questions, Char("abc"), V, L)


def test_the_command_fails_in_one_line(tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        '{"context": "a", "options": ["b"], "gold": 0}\n{"context": "a", "options": ["b"]}'
    )
    words = [f"--ckpt={tmp_path}", "--set=plain", f"--from={tmp_path}/mine.jsonl"]
    command = [sys.executable, "-m", "evals.choice", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f'choice.py: {tmp_path}/mine.jsonl, line 2: no key "gold"\n'
