"""What sample.py is asked for: prompts, suffixes and templates, and what is made of them."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_sample import network_of

import config as settings
import evaluate
import model as network
import sample as decoding
from config import UserError
from data.tokenizer import Char, build
from lib.text import text_or_file
from lib.watch import token_text
from run import checkpoint
from sample import SAMPLERS, gapped_ids
from view import page

# ---- Requests ------------------------------------------------------------------------------------

TEXT = Char("abcdefghijklmnopqrstuvwxyz _.\n0123456789")
MASK, BLOCK = TEXT.vocab_size, 30


def network_for(mask_id, block_size, start_id=None, **config):
    """All that a request asks of a network."""
    start_id = mask_id if start_id is None else start_id
    own = {"mask_id": mask_id, "block_size": block_size, "start_id": start_id}
    return SimpleNamespace(**own, config=config)


def asked(**keys):
    """A request as text, with a # for each token that is wanted."""
    ids = gapped_ids(TEXT, network_for(MASK, BLOCK), **keys)
    return "".join("#" if i == MASK else TEXT.decode([i]) for i in ids)


def test_without_a_prompt_a_whole_block_is_wanted_or_as_many_tokens_as_asked_for():
    assert asked() == "#" * 30 and asked(length=7) == "#" * 7


def test_a_prompt_begins_and_a_suffix_ends_the_sample():
    assert asked(prompt="the list ", length=12) == "the list ###"
    assert asked(suffix="end.") == "#" * 26 + "end."
    assert asked(prompt="a", suffix="b", length=3) == "a#b"


def test_a_template_has_gaps_anywhere():
    assert asked(template="the ___4 of a ___2.") == "the #### of a ##."
    assert asked(template="___3") == "###" and asked(template="___1___2 a") == "### a"
    assert asked(template="a __1 ____2") == "a __1 _##"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"template": "no gap"}, "the template has no gap: write ___12"),
        ({"template": "a ___ b"}, "the template has no gap: write ___12"),
        ({"template": "a ___0 b"}, "the template has no gap of one token or more"),
        ({"template": "a ___30"}, "the template is 32 tokens, the block 30"),
        ({"template": "a ___" + "9" * 50}, "longer than the block (30)"),
        ({"template": "___3", "prompt": "a"}, "give --template or --prompt and --suffix, not both"),
        ({"template": "___3", "length": 9}, "length"),
        ({"length": 31}, "length must be at most block_size 30, not 31"),
        (
            {"prompt": "a" * 30},
            "prompt and suffix are 30 tokens of 30: none is left to fill",
        ),
        ({"prompt": "a" * 99}, "prompt and suffix are 99 tokens"),
        ({"prompt": "abc", "suffix": "de", "length": 5}, "prompt and suffix are 5 tokens"),
        ({"prompt": "naïve"}, "character 'ï' is not among the 40"),
        ({"template": "___3 ï"}, "character 'ï' is not among the 40"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(keys, says):
    with pytest.raises(UserError) as error:
        asked(**keys)
    assert says in str(error.value) and len(str(error.value)) < 300


# ---- The program ---------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    """program(**keys) -> what sample.fill returns, for a small saved model."""

    def run(attention="full", **keys):
        model = network_of(vocab_size=MASK, block_size=BLOCK, attention=attention)
        config = model.config | {"objective": "ar" if attention == "causal" else "any_order"}
        state = {"config": config, "tokenizer": TEXT.meta(), "model": model.state_dict()}
        checkpoint.save(tmp_path / "ckpt.pt", state | {"ema": None, "step": 1})
        defaults = settings.defaults_of(decoding.MODULES)
        own = {"ckpt": str(tmp_path), "device": "cpu", "dtype": "float32", "user_keys": list(keys)}
        config = defaults | own | keys
        return decoding.fill(config, decoding.open_model(config))

    return run


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_program_prints_each_sample_and_its_calls_beside_the_expected_number(
    sampler, program, capsys
):
    records = program(sampler=sampler, steps=4, num_samples=3, template="the ___3 of a\n___5.")
    out = capsys.readouterr().out
    for i, record in enumerate(records, start=1):
        assert f"---- sample {i}: {record['nfe']} network calls\n{record['text']}\n" in out
        text = record["text"]
        assert text.startswith("the ") and text[7:13] == " of a\n" and text.endswith(".")
        assert TEXT.decode(record["tokens"]) == record["text"] and len(record["tokens"]) == 19
    said = f"---- NFE {sum(r['nfe'] for r in records) / 3:.1f} a sequence"
    open_ended = sampler in ("threshold", "entropy_bound", "remask", "remask_rescale")
    assert f"{said} for " in out if open_ended else f"{said}, expected " in out


def test_samples_are_also_written_to_a_file(program, tmp_path):
    out = tmp_path / "new" / "samples.jsonl"
    records = program(num_samples=5, prompt="the ", length=9, out=str(out), batch_size=2)
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    assert len(records) == 5


def test_the_seed_decides_and_the_batch_size_does_not(program):
    texts = [
        [record["text"] for record in program(seed=seed, batch_size=b)]
        for seed, b in ((1, 16), (1, 3), (2, 16))
    ]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 4


def test_a_causal_network_continues_a_prompt(program):
    records = program(attention="causal", prompt="the ", num_samples=3)
    assert all(record["text"].startswith("the ") and record["nfe"] == 26 for record in records)


@pytest.mark.parametrize(
    "keys",
    [
        {"suffix": "."},
        {"template": "___3"},
        {"cfg_scale": 1.0, "prompt": "the "},
        {"sampler": "ancestral"},
        {"sampler": "confidence"},
    ],
)
def test_a_causal_network_refuses_what_it_cannot_do(keys, program):
    with pytest.raises(UserError, match="causal"):
        program(attention="causal", **keys)
    program(attention="causal", sampler="left_to_right", num_samples=1)


class Marked(Char):
    """A tokenizer whose documents begin with id 0.

    As Llama's does, it encodes the beginning of a text otherwise than what follows.
    """

    bos = 0

    def encode(self, text, start=True):
        return super().encode(text if start else text.upper())


def test_a_text_at_the_beginning_follows_bos_unless_the_network_reads_that_by_itself():
    text = Marked(" abABMN")

    def asked(start_id=None, **keys):
        ids = gapped_ids(text, network_for(text.vocab_size, 9, start_id), **keys)
        return "".join(text.decode([i]) for i in ids)

    assert asked(prompt="ab", length=5) == " ab██"
    assert asked(prompt="ab", length=5, start_id=0) == "ab███"
    assert asked(template="a___2b") == " a██B" and asked(template="___2b") == "██B"
    assert asked(prompt="a", suffix="b", length=4) == " a█B" and asked(length=3) == "███"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_space_before_a_gap_is_left_to_the_word_that_fills_it(
    kind, shared, tmp_path, monkeypatch
):
    if kind == "llama":
        pytest.importorskip("sentencepiece")
    for file in shared("data/tiktoken_cache").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    text = build(kind, [])
    lone, V = text.encode(" ", start=False), text.vocab_size

    def pieces(width=0, **keys):
        ids = gapped_ids(text, network_for(V, 30, V, example_width=width), **keys)
        return [list(group) for masked, group in itertools.groupby(ids, V.__eq__) if not masked]

    start = [text.bos] * (text.bos is not None)
    the, words = start + text.encode("The"), [text.encode(each, False) for each in (" of", " and")]
    assert pieces(template="The ___8 of ___2 and") == [the, *words]
    assert pieces(template="The___8 of___2 and") == [the, *words]
    assert pieces(prompt="The ", suffix=" and", length=9) == [the, words[1]]
    assert pieces(prompt="The  ", length=9)[0] != the and pieces(prompt="The\n", length=9)[0] != the
    assert pieces(width=9, prompt="The ", length=9) == [start + text.encode("The ")]  # as trained
    assert lone[0] not in pieces(template="The ___8 of ___2")[0]


def test_characters_keep_the_space_before_a_gap():
    assert asked(template="a ___2 b") == "a ## b" and asked(prompt="a ", length=3) == "a #"


def test_a_text_of_the_command_line_may_be_a_file(tmp_path):
    path = tmp_path / "prompt.txt"
    for written, text in {"a\nb\n": "a\nb", "a\n\n": "a\n", "a": "a", "": ""}.items():
        path.write_text(written)
        assert text_or_file(f"FILE:{path}") == text
    assert text_or_file("FILES: a\\n") == "FILES: a\\n" and text_or_file("") == ""
    with pytest.raises(UserError, match=r"cannot read gone\.txt"):
        text_or_file("FILE:gone.txt")
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        text_or_file(f"FILE:{path}")


# ---- The command on a terminal -------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{kind: folder} of tiny networks of text, of examples, and of examples left to right."""
    folders = {}
    for kind in ("text", "examples", "causal"):
        keys = {"attention": "causal" if kind == "causal" else "full", "block_size": BLOCK}
        keys |= {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": TEXT.vocab_size}
        model = network.make_network(network.DEFAULTS | keys)
        state = {"config": model.config | {"objective": "any_order"}, "tokenizer": TEXT.meta()}
        state["config"] |= {"example_width": 9, "eos_id": 29} if kind != "text" else {}
        state |= {"model": model.state_dict(), "ema": None, "optimizer": [], "step": 1}
        folders[kind] = tmp_path_factory.mktemp(kind)
        checkpoint.save(folders[kind] / "ckpt.pt", state)
    return folders


def on_a_terminal(lines, *words):
    """(exit code, what a terminal shows, errors) of sample.py, told these lines, then Ctrl-D."""
    pty = pytest.importorskip("pty")  # Windows has none
    ours, theirs = pty.openpty()
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    command = [sys.executable, "sample.py", "--device=cpu", *words]
    keys = {"stdin": theirs, "stdout": theirs, "stderr": subprocess.PIPE, "env": env, "cwd": ROOT}
    process, shown = subprocess.Popen(command, **keys), b""
    os.close(theirs)
    lines = [*lines, None]
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while part := os.read(ours, 4096):
            shown += part
            if lines and shown.endswith(b"> "):
                line = lines.pop(0)
                os.write(ours, b"\x04" if line is None else f"{line}\n".encode())
    os.close(ours)
    return process.wait(60), shown.decode().replace("\r", ""), process.communicate()[1].decode()


def test_on_a_terminal_it_asks_for_prompts_and_goes_on_until_there_are_no_more(checkpoints):
    ckpt = f"--ckpt={checkpoints['text']}"
    code, shown, errors = on_a_terminal(["the list ", "", "é", "x" * 40, "the list "], ckpt)
    assert code == 0 and "Traceback" not in errors
    assert shown.count("---- sample 1:") == 3 and shown.count("> ") == 6
    assert shown.count("calls\nthe list ") == 2
    assert "character 'é' is not among" in shown and "prompt and suffix are 40 tokens" in shown
    first, second = re.findall(r"calls\n(the list .*?)\n---- NFE", shown, re.S)
    assert first != second  # another seed


@pytest.mark.parametrize("wish", ["--num_samples=2", "--prompt=ab", "--template=a___2"])
def test_on_a_terminal_it_asks_nothing_of_who_has_said_what_to_do(wish, checkpoints):
    code, shown, _ = on_a_terminal([], f"--ckpt={checkpoints['text']}", wish)
    assert code == 0 and "> " not in shown and "---- sample 1:" in shown


def test_without_a_terminal_stdin_is_read_only_if_it_is_named(checkpoints):
    command = [sys.executable, "sample.py", "--device=cpu", f"--ckpt={checkpoints['text']}"]
    keys = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60, "check": True}
    silent, never_written = os.pipe()  # open as long as this test runs
    with open(silent), open(never_written, "w"):
        done = subprocess.run(command, stdin=silent, **keys)
    assert done.stdout.count("---- sample") == 4 and "> " not in done.stdout
    assert "no prompt, and no terminal" in done.stderr and done.stderr.count("--prompt=FILE:") == 1
    done = subprocess.run([*command, "--prompt=FILE:/dev/stdin"], input="the list\n", **keys)
    assert done.stdout.count("calls\nthe list") == 4 and "no terminal" not in done.stderr


def test_without_a_prompt_a_model_of_examples_says_what_it_wants(checkpoints, tmp_path):
    words = [f"--ckpt={checkpoints['examples']}", "--device=cpu"]
    for wish in ([], ["--num_samples=4"], [f"--out={tmp_path}/x.jsonl"]):  # they would be blank
        with pytest.raises(UserError, match="this model answers prompts: give --prompt="):
            decoding.main(settings.parse([*words, *wish], *decoding.MODULES))
    words += ["--num_samples=2", "--prompt="]  # who says so gets free samples
    assert len(decoding.main(settings.parse(words, *decoding.MODULES))) == 2


# ---- What suits answers --------------------------------------------------------------------------


def command(ckpt, *words):
    words = [f"--ckpt={ckpt}", "--device=cpu", "--prompt=ab", *words]
    return decoding.main(settings.parse(words, *decoding.MODULES))


def test_a_model_of_examples_answers_as_measured_best_unless_it_is_told_otherwise(
    checkpoints, monkeypatch
):
    options_seen = []
    plain = decoding.sample

    def spy(*arguments, **options):
        options_seen.append(options)
        return plain(*arguments, **options)

    monkeypatch.setattr(decoding, "sample", spy)
    keys = ("sampler", "temperature", "steps")
    for kind, words, wanted, n in (
        ("text", [], ("ancestral", 1.0, 128), 4),
        ("examples", [], ("confidence", 0.0, 128), 1),
        ("examples", ["--sampler=ancestral", "--num_samples=4"], ("ancestral", 0.0, 128), 4),
        ("examples", ["--temperature=1"], ("confidence", 1.0, 128), 1),
        ("causal", [], ("ancestral", 0.0, 128), 1),  # left to right, whatever the sampler
    ):
        records = command(checkpoints[kind], *words)
        options = options_seen.pop()
        assert tuple(options[key] for key in keys) == wanted and len(records) == n
        assert len(records[0]["tokens"]) == (BLOCK if kind == "text" else 9)


def test_from_python_a_command_takes_the_keys_that_differ(checkpoints):
    keys = {"ckpt": str(checkpoints["examples"]), "device": "cpu", "prompt": "ab"}
    (record,) = decoding.main(keys)
    assert record == command(checkpoints["examples"])[0]
    with pytest.raises(UserError, match="unknown key promt; did you mean 'prompt'"):
        decoding.main({"ckpt": keys["ckpt"], "promt": "ab"})
    text = {"ckpt": str(checkpoints["text"]), "device": "cpu", "text": "ab", "draws": 2}
    assert evaluate.main(text)["draws"] == 2


def test_an_answer_ends_behind_the_text_that_is_given_and_never_in_a_gap_before_it(checkpoints):
    words = [f"--ckpt={checkpoints['examples']}", "--device=cpu", "--num_samples=40"]
    words += ["--temperature=9", "--sampler=any_order"]  # an eos where it may be in 1 of 30 draws
    for wish, last in (("--template=a___9b", 11), ("--suffix=b", 9), ("--template=a___6b___4", 8)):
        parsed = settings.parse([*words, wish], *decoding.MODULES)
        records, ended = decoding.main(parsed), 0
        for record in records:
            ids = record["tokens"]
            assert 29 not in ids[:last]
            stop = ids.index(29) if 29 in ids else len(ids)
            assert record["text"] == TEXT.decode(ids[:stop])
            ended += stop < len(ids)
        assert (ended > 0) == wish.endswith("4")


def test_a_page_of_answers_begins_with_a_prompt_and_has_a_sign_for_their_end(checkpoints):
    keys = {"ckpt": str(checkpoints["examples"]), "device": "cpu"}
    config = settings.options(keys, *decoding.MODULES)
    with pytest.raises(UserError, match="this model answers prompts"):
        page.made(config, page.with_weights)
    assert page.made(config | {"template": "ab___7"}, page.with_weights)["text"] == "ab___7"
    trace = page.made(config | {"prompt": "ab", "user_keys": {}}, page.recorded)
    assert len(trace["samples"][0]["start"]) == 9
    tokenizer = Char("\0ab")
    assert [token_text(tokenizer, token) for token in range(3)] == ["∎", "a", "b"]


def test_the_prompt_of_a_file_has_its_lines(checkpoints, tmp_path):
    (tmp_path / "prompt.txt").write_text("a\nb\n")
    (record, *_) = command(checkpoints["text"], f"--prompt=FILE:{tmp_path / 'prompt.txt'}")
    assert TEXT.decode(record["tokens"][:3]) == "a\nb" and record["tokens"][3] != MASK
    wish = f"--template=FILE:{tmp_path / 'prompt.txt'}"
    with pytest.raises(UserError, match="the template has no gap"):
        command(checkpoints["text"], "--prompt=", wish)
