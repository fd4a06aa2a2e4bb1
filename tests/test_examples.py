"""Examples of prompt, answer and eos: what is written, what is read, what is said of bad input."""

import gzip
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from config import UserError, parse
from data import examples, tokenizer, writer
from data.chat import prepare as chat
from data.examples import Examples
from data.gsm8k import prepare as gsm8k
from data.pairs import prepare as pairs
from data.reversal import prepare as reversal

TEXT = tokenizer.Byte()


def asked(part):
    """[(prompt ids, answer ids with their eos)] of all its examples."""
    return part.requests(0, padding=False)[0]


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def prepared(module, folder, **keys):
    """The training examples of a data/NAME/prepare.py run."""
    words = [f"--{key}={value}" for key, value in (keys | {"out": folder}).items()]
    module.main(parse(words, module, examples, tokenizer))
    return Examples(folder, "train")


def numbered(folder, n=10, **keys):
    """n examples whose prompt is the byte 'a' + i, i + 1 of them, and whose answer is 'xyz'."""
    items = [("train", f"number {i}", [97 + i] * (i + 1), [*b"xyz"]) for i in range(n)]
    examples.prepare(folder, items, TEXT, **keys)
    return Examples(folder, "train", seed=3)


# ---- The format ----------------------------------------------------------------------------------


def test_an_example_is_prompt_answer_eos_and_eos_up_to_the_width(tmp_path):
    items = [("train", "", [*b"ab"], [*b"cde"]), ("val", "", [], [*b"f"])]
    meta = examples.prepare(tmp_path, items, TEXT, width=8)
    assert np.fromfile(tmp_path / "train_00000.bin", np.uint16).tolist() == [*b"abcde", 0, 0, 0]
    assert np.fromfile(tmp_path / "train_prompt.bin", "<u2").tolist() == [2, 6]
    assert np.fromfile(tmp_path / "val_00000.bin", np.uint16).tolist() == [*b"f"] + [0] * 7
    assert np.fromfile(tmp_path / "val_prompt.bin", "<u2").tolist() == [0, 2]
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    assert (meta["width"], meta["end"]) == (8, 0)
    counts = {"tokens": 8, "documents": 1, "bytes": 3}
    counts |= {"answer_tokens": 4, "prompt_tokens": 2, "dropped": 0}
    assert meta["splits"]["train"] == counts


def test_without_a_width_examples_are_as_wide_as_the_longest_needs(tmp_path):
    assert numbered(tmp_path, n=5).block_size == 5 + 3 + 1


def test_an_example_that_does_not_fit_is_dropped_and_counted(tmp_path):
    assert numbered(tmp_path, n=5, width=7).n == 3  # a prompt of 3, the answer, its eos
    assert json.loads((tmp_path / "meta.json").read_text())["splits"]["train"]["dropped"] == 2


def test_a_split_of_which_nothing_fits_is_an_error_and_leaves_the_old_folder_alone(tmp_path):
    numbered(tmp_path, n=5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="of 5 train examples none fits a width of 4"):
        numbered(tmp_path, n=5, width=4)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_examples_take_the_place_of_plain_text_and_the_other_way_round(tmp_path):
    writer.prepare(tmp_path, [("train", "some text"), ("val", "more")], TEXT)
    numbered(tmp_path)
    assert Examples(tmp_path, "train").n == 10
    writer.prepare(tmp_path, [("train", "some text"), ("val", "more")], TEXT)
    with pytest.raises(UserError, match="holds no examples with prompts"):
        Examples(tmp_path, "train")


@pytest.mark.parametrize("damage", ["absent", "short", "long prompt", "odd"])
def test_lengths_that_do_not_fit_the_examples_are_one_line(damage, tmp_path):
    numbered(tmp_path)
    path = tmp_path / "train_prompt.bin"
    lengths = np.fromfile(path, "<u2")
    changed = {
        "short": lengths[:-2],
        "long prompt": np.where(lengths == lengths[0], 999, lengths),
        "odd": lengths[:-1],
    }
    path.unlink() if damage == "absent" else changed[damage].tofile(path)
    with pytest.raises(UserError) as error:
        Examples(tmp_path, "train")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [{"width": "14"}, {"width": -3}, {"end": 256}, {"end": None}, {"width": 0}, {"width": 13}],
)
def test_a_damaged_layout_is_one_line(damage, tmp_path):
    numbered(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | damage))
    with pytest.raises(UserError) as error:
        Examples(tmp_path, "train")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_width_that_no_example_can_have_is_refused(tmp_path):
    for width in (-1, 65536):
        with pytest.raises(UserError, match="width must be from 0 to 65535"):
            numbered(tmp_path, width=width)
    message = "the longest example is 65537 tokens; give a width of at most 65535"
    with pytest.raises(UserError, match=message):
        examples.prepare(tmp_path, [("train", "", [1], [1] * 65535)], TEXT)
    assert not any(tmp_path.iterdir())


# ---- The eos -------------------------------------------------------------------------------------


def test_the_eos_is_the_tokenizers_own_or_nul_which_an_alphabet_gains(tmp_path):
    assert examples.eos_of(TEXT) == 0
    new = examples.vocabulary("char", ["ab"], None)
    assert new.decode([examples.eos_of(new)]) == "\0"
    old = tokenizer.Char("\nab")
    writer.prepare(tmp_path, [("train", "ab"), ("val", "ba")], old)
    lent = examples.vocabulary(str(tmp_path), ["cab\0"], None)
    assert lent.alphabet == "\nab\0c" and examples.eos_of(lent) == 3
    assert tokenizer.named(str(tmp_path), ["ba"], None).meta() == old.meta()


def test_an_answer_cannot_hold_its_eos(tmp_path):
    with pytest.raises(UserError, match=r"line 7: the answer holds '\\x00', which marks its end"):
        examples.prepare(tmp_path, [("train", "line 7", [1], [*b"a\0b"])], TEXT)


# ---- Reading -------------------------------------------------------------------------------------


def test_examples_come_back_as_they_were_written(tmp_path):
    x0, prompt, length = numbered(tmp_path)[range(10)]
    assert x0.shape == (10, 14)
    assert prompt.tolist() == list(range(1, 11)) and length.tolist() == list(range(5, 15))
    for i in range(10):
        assert bytes(x0[i].tolist()) == bytes([97 + i] * (i + 1)) + b"xyz" + bytes(10 - i)


def test_every_epoch_takes_each_example_once_in_an_order_of_its_own(tmp_path):
    data = numbered(tmp_path)
    order = [data.index(4 * step, range(4)) for step in range(10)]  # 4 epochs, steps across
    order = np.concatenate(order).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 4


@pytest.mark.parametrize("step", [0, 2, 7])  # a part of step 2 is in the second epoch
def test_a_batch_does_not_depend_on_how_it_is_shared_out(step, tmp_path):
    data = numbered(tmp_path)
    whole = data.index(4 * step, range(4)).tolist()
    assert whole == [data.index(4 * step, [position]).item() for position in range(4)]
    assert whole != Examples(tmp_path, "train", seed=4).index(4 * step, range(4)).tolist()


def test_a_network_that_brings_the_bos_reads_examples_without_it(tmp_path):
    whole, cut = numbered(tmp_path), Examples(tmp_path, "train", seed=3, skip=1)
    (x0, prompt, length), (y0, less, shorter) = whole[range(10)], cut[range(10)]
    assert (x0[:, 1:] == y0).all() and (prompt - 1 == less).all() and (length - 1 == shorter).all()


def test_requests_are_prompt_and_answer_with_or_without_padding(tmp_path):
    data = numbered(tmp_path)
    items, counts = data.requests(5, padding=False)
    assert [len(prompt) for prompt, _ in items] == [1, 3, 5, 7, 9] and counts == [4] * 5
    assert all(bytes(answer.tolist()) == b"xyz\0" for _, answer in items)
    assert data.counted(range(10), padding=True).tolist() == list(range(13, 3, -1))
    assert data.counted(range(10), padding=False).tolist() == [4] * 10
    padded, counts = data.requests(0, padding=True)
    assert all(len(prompt) + len(answer) == 14 for prompt, answer in padded) and counts == [4] * 10


# ---- Your own pairs ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "llama"])
def test_a_pair_is_tokenized_as_sampling_asks_for_it(kind, tmp_path, monkeypatch, shared):
    if kind == "llama":
        pytest.importorskip("sentencepiece")
        monkeypatch.setenv("NANOMDM_SHARED", str(shared("data/llama_tokenizer").parent.parent))
    said = [pair(f"What is {i}?", f" It is {i}.") for i in range(40)]
    path = write(tmp_path / "mine.jsonl", *said)
    train = prepared(pairs, tmp_path / "out", input=path, tokenizer=kind, val_fraction=0.2)
    text = tokenizer.from_meta(train.tokens.meta["tokenizer"])
    bos = [] if text.bos is None else [text.bos]
    items = asked(train) + asked(Examples(tmp_path / "out", "val"))
    for prompt, answer in items:
        question = text.decode(prompt.tolist())
        assert prompt.tolist() == bos + text.encode(question)
        reply = question.replace("What is", " It is").replace("?", ".")
        assert text.decode([*prompt, *answer[:-1]]) == question + reply
    assert len(items) == 40 and 24 < train.n < 39


def test_pairs_with_one_prompt_are_held_out_together(tmp_path):
    path = write(tmp_path / "mine.jsonl", *(pair(f"{i % 20} ", f"{i}") for i in range(200)))
    train = prepared(pairs, tmp_path / "out", input=path, tokenizer="byte", val_fraction=0.3)
    parts = train, Examples(tmp_path / "out", "val")
    learnt, held_out = ({bytes(p.tolist()) for p, _ in asked(part)} for part in parts)
    assert not learnt & held_out and len(learnt | held_out) == 20


GOOD = pair("question", " answer")
BAD = {
    "not JSON": ([GOOD, "{'prompt'\n"], {}, "line 2: not JSON"),
    "no object": ([GOOD, "1\n"], {}, "line 2: no JSON object; each line must"),
    "an array": ([GOOD, "[1]\n"], {}, "line 2: a JSON array; each line must be an"),
    "no completion": (
        [GOOD, {"prompt": "", "completon": ""}],
        {},
        "line 2: no key \"completion\"; did you mean 'completon'?",
    ),
    "an empty completion": ([GOOD, GOOD, pair("q", "")], {}, "line 3: the completion is empty"),
    "a number": ([pair("q", 3)], {}, 'line 1: "completion" must be text, not 3'),
    "a prompt longer than the width": (
        [GOOD, pair("a long question", "x")],
        {"width": 16},
        "line 2: the prompt is 15 tokens, which leaves no answer in an example of 16",
    ),
}


def bad_command(name, folder):
    """(keys of data.pairs.prepare, the message) of a bad input."""
    lines, keys, message = BAD[name]
    path = write(folder / "mine.jsonl", *lines)
    keys = {"input": path, "out": folder / "out", "tokenizer": "byte"} | keys
    return keys, f"{path}, {message}"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_with_file_and_number_and_nothing_is_written(name, tmp_path):
    keys, message = bad_command(name, tmp_path)
    with pytest.raises(UserError) as error:
        prepared(pairs, keys.pop("out"), **keys)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["an empty completion", "a prompt longer than the width"])
def test_the_command_says_it_in_one_line_and_exits_with_2(name, tmp_path):
    keys, message = bad_command(name, tmp_path)
    words = [f"--{key}={value}" for key, value in keys.items()]
    line, env = [sys.executable, "-m", "data.pairs.prepare", *words], os.environ
    env = env | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"prepare.py: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [pairs, chat])
def test_a_command_without_input_says_what_it_needs(module, tmp_path):
    with pytest.raises(UserError, match=r"--input=FILE\.jsonl"):
        prepared(module, tmp_path)


# ---- The reversal curse --------------------------------------------------------------------------


def test_the_reversal_sets_are_the_official_ones(shared, tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    monkeypatch.setenv("NANOMDM_SHARED", str(shared("data/llama_tokenizer").parent.parent))
    keys = {"from": shared("data/reversal_curse"), "tokenizer": "llama"}
    train = prepared(reversal, tmp_path, **keys)
    assert train.n == 3600 and train.block_size == 54
    assert not train.prompt.any(), "nothing is protected"
    assert train.length.min() == 19 and train.length.max() == 52
    assert train.length.mean() == pytest.approx(36.2, abs=0.05)
    text, x0 = tokenizer.Llama(), train[range(3600)][0]
    assert (x0[:, 0] == text.bos).all() and (x0[:, -1] == text.eot).all()
    ids = [row[:n].tolist() for row, n in zip(x0, train.length, strict=True)]
    learnt = {text.decode(line).removesuffix("</s>") for line in ids}
    widths = {"dtn_same": (20, 44), "dtn_reverse": (20, 44)}
    widths |= {"ntd_same": (25, 54), "ntd_reverse": (25, 54)}
    for name, (low, high) in widths.items():
        items = asked(Examples(tmp_path, name))
        assert len(items) == 300
        assert all(low <= len(prompt) + len(answer) <= high for prompt, answer in items)
        for prompt, answer in items:  # tokens of the whole text, and no pair was learnt
            said = text.decode([*prompt, *answer[:-1]])
            assert [*prompt, *answer] == [text.bos, *text.encode(said), text.eot]
            assert said not in learnt
    assert Examples(tmp_path, "val").n == 600


# ---- GSM8K ---------------------------------------------------------------------------------------

LINE = "Two and two?||<<2+2=4>> <<4*1=4>> #### 4\n"


def test_a_problem_gives_its_thought_and_then_its_answer(tmp_path):
    path = write(tmp_path / "some.txt", LINE)
    items = gsm8k.tokenized(gsm8k.problems(path), "train", TEXT, 0)
    said = [(bytes(prompt).decode(), bytes(answer).decode()) for _, _, prompt, answer in items]
    question, thought = "Question: Two and two?", "Answer: <<2+2=4>> <<4*1=4>> "
    assert said == [(question + thought, "#### 4\n"), (question, thought)]


@pytest.mark.parametrize(("width", "kept"), [(0, 2), (58, 2), (57, 1)])  # 57 bytes and the eos
def test_a_line_too_long_for_its_answer_gives_no_thought_either(width, kept, tmp_path):
    problems = gsm8k.problems(write(tmp_path / "some.txt", LINE))
    items = list(gsm8k.tokenized(problems, "train", TEXT, width))
    assert len(items) == kept and len(items[0][2]) + len(items[0][3]) == 57


def test_the_equations_of_a_solution_are_the_published_thought(shared):
    folder = shared("data/gsm8k")
    own, published = gsm8k.problems(folder / "test.jsonl"), gsm8k.problems(folder / "icot_test.txt")
    own, published = (
        [[" ".join(text.split()) for text in problem] for _, *problem in problems]
        for problems in (own, published)
    )
    assert own == published and len(own) == 1319


def test_the_set_learns_from_nothing_that_it_is_evaluated_on(shared, tmp_path):
    keys = {"from": shared("data/gsm8k"), "tokenizer": "byte", "width": 512}
    train = prepared(gsm8k, tmp_path, **keys)
    assert train.block_size == 512
    parts = train, Examples(tmp_path, "val")
    learnt, held_out = ({bytes(p.tolist()) for p, _ in asked(part)} for part in parts)
    assert not learnt & held_out
    counts = json.loads((tmp_path / "meta.json").read_text())["splits"]
    lines = {name: part["documents"] // 2 + part["dropped"] for name, part in counts.items()}
    assert lines == {"train": 7473 - 500, "val": 500}


@pytest.mark.parametrize("line", ["no bars #### 3", "q||thought, and no answer"])
def test_a_line_that_is_no_problem_is_named(line, tmp_path):
    with pytest.raises(UserError, match=r"some.txt, line 2: not of the form"):
        list(gsm8k.problems(write(tmp_path / "some.txt", LINE, line)))


def test_a_packed_file_is_read_and_a_damaged_one_named(tmp_path):
    whole = gzip.compress(LINE.encode() * 500)
    (tmp_path / "good.txt.gz").write_bytes(whole)
    assert len(list(gsm8k.problems(tmp_path / "good.txt.gz"))) == 500
    (tmp_path / "bad.txt.gz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"bad\.txt\.gz is damaged or cut off"):
        list(gsm8k.problems(tmp_path / "bad.txt.gz"))


# ---- Conversations -------------------------------------------------------------------------------


def talk(*turns, key="conversations", who="from", what="value"):
    return {key: [{who: role, what: text} for role, text in turns]}


def test_of_a_conversation_the_first_question_is_asked_in_vicunas_words(tmp_path, capsys):
    said = [talk(("human", f"Q{i}?"), ("gpt", f"A{i}."), ("human", "more")) for i in range(20)]
    said += [talk(("user", "U?"), ("assistant", "V."), key="messages", who="role", what="content")]
    passed = [talk(("gpt", "first"), ("human", "?")), talk(("human", "alone"))]
    passed += [talk(("human", "Q"), ("gpt", " "))]
    path = write(tmp_path / "talk.jsonl", *said, *passed)
    train = prepared(chat, tmp_path / "out", input=path, tokenizer="byte", val_fraction=0.2)
    assert "passed over: 3 of 24 conversations, without a" in capsys.readouterr().out
    both = asked(train) + asked(Examples(tmp_path / "out", "val"))
    texts = [(bytes(p.tolist()).decode(), bytes(a.tolist()).decode()) for p, a in both]
    expected = [(f"Q{i}?", f" A{i}.\0") for i in range(20)] + [("U?", " V.\0")]
    expected = [(chat.TEMPLATE.format(question), answer) for question, answer in expected]
    assert sorted(texts) == sorted(expected)
    assert chat.TEMPLATE.endswith("questions. USER: {} ASSISTANT:")


def test_with_llamas_tokenizer_an_answer_begins_with_a_bos_of_its_own(shared, monkeypatch):
    pytest.importorskip("sentencepiece")
    monkeypatch.setenv("NANOMDM_SHARED", str(shared("data/llama_tokenizer").parent.parent))
    text = tokenizer.Llama()
    ((_, _, prompt, answer),) = chat.tokenized([("", "Q?", "Yes.")], text, 0.0)
    assert prompt == [1, *text.encode(chat.TEMPLATE.format("Q?"))]
    assert answer == [1, *text.encode("Yes.")]


def test_a_line_that_is_no_conversation_is_named(tmp_path):
    for line in ({"text": "?"}, {"conversations": ["?"]}, talk(("human", 3), ("gpt", "A"))):
        path = write(tmp_path / "talk.jsonl", talk(("human", "Q"), ("gpt", "A")), line)
        with pytest.raises(UserError, match=r"talk.jsonl, line 2: "):
            prepared(chat, tmp_path / "out", input=path, tokenizer="byte")


# ---- Downloads -----------------------------------------------------------------------------------


def test_the_hashes_of_what_is_downloaded_are_those_of_the_files(shared):
    folder = shared("data/reversal_curse")
    files = {name: (folder / f"{name}.jsonl").read_bytes() for name in reversal.SHA256}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert digests == reversal.SHA256
    packed = shared("data/gsm8k")
    files = {"train.jsonl": gzip.decompress((packed / "train.jsonl.gz").read_bytes())}
    files["valid.txt"] = (packed / "icot_valid.txt").read_bytes()
    files["test.jsonl"] = (packed / "test.jsonl").read_bytes()
    for name, content in files.items():
        assert hashlib.sha256(content).hexdigest() == gsm8k.FILES[name][1]
