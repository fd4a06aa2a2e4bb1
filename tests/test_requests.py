"""What sample.py is asked for: prompts, suffixes and templates, and what is made of them."""

import json
from types import SimpleNamespace

import pytest
from test_sample import network_of

import config as settings
import diffusion
import sample as decoding
from config import UserError
from data.tokenizer import Char
from lib import checkpoint
from sample import SAMPLERS, request

# ---- Requests ------------------------------------------------------------------------------------

TEXT = Char("abcdefghijklmnopqrstuvwxyz _.\n0123456789")
MASK, BLOCK = TEXT.vocab_size, 30


def network_for(mask_id, block_size, start_id=None):
    """All that a request asks of a network."""
    start_id = mask_id if start_id is None else start_id
    return SimpleNamespace(mask_id=mask_id, block_size=block_size, start_id=start_id)


def asked(**keys):
    """A request as text, with a # for each token that is wanted."""
    ids = request(TEXT, network_for(MASK, BLOCK), **keys)
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
            "prompt and suffix are 30 tokens, which leaves nothing of length 30 to fill",
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
    """program(**keys) -> what sample.main returns, for a small saved model."""

    def run(attention="full", **keys):
        model = network_of(vocab_size=MASK, block_size=BLOCK, attention=attention)
        config = model.config | {"objective": "ar" if attention == "causal" else "any_order"}
        state = {"config": config, "tokenizer": TEXT.meta(), "model": model.state_dict()}
        checkpoint.save(tmp_path / "ckpt.pt", state | {"ema": None, "step": 1})
        defaults = settings.defaults_of([settings, diffusion, decoding])
        own = {"ckpt": str(tmp_path), "device": "cpu", "dtype": "float32", "user_keys": list(keys)}
        return decoding.main(defaults | own | keys)

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
    assert f"---- NFE {sum(r['nfe'] for r in records) / 3:.1f} a sequence, expected " in out


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
        {"cfg_scale": 1.0},
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
        ids = request(text, network_for(text.vocab_size, 9, start_id), **keys)
        return "".join(text.decode([i]) for i in ids)

    assert asked(prompt="ab", length=5) == " ab██"
    assert asked(prompt="ab", length=5, start_id=0) == "ab███"
    assert asked(template="a___2b") == " a██B" and asked(template="___2b") == "██B"
    assert asked(prompt="a", suffix="b", length=4) == " a█B" and asked(length=3) == "███"
