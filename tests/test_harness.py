"""The adapter to lm-evaluation-harness, run for real on local tasks. Left out where that large package is not installed:
pip install -r requirements-lm_eval.txt"""

import json
import math

import numpy as np
import pytest
import torch

import checkpoint
import choice
import config as settings
import diffusion
import evaluate
import harness
import likelihood
import model as network
import sample
from config import UserError
from data import tokenizer

ALPHABET = "abcdefghij .?QA:uestionr\n"

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
"""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    try:
        harness.packages()
    except UserError:
        pytest.skip("lm_eval is not installed (pip install -r requirements-lm_eval.txt)")


def save_model(folder, causal):
    """A random character model of 32 tokens, saved as a run would."""
    text = tokenizer.build("char", [ALPHABET])
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": text.vocab_size, "causal": causal}
    config = {**network.DEFAULTS, **shape}
    torch.manual_seed(0)
    model = network.Transformer(config)
    torch.nn.init.normal_(model.unembed.weight, std=1.0)
    state = {
        "config": config,
        "tokenizer": text.meta(),
        "step": 0,
        "model": model.state_dict(),
        "ema": None,
        "optimizer": [],
    }
    checkpoint.save(folder / "ckpt.pt", state)
    return folder


def write_task(folder, name, kind, lines, text, target, more=""):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, kind=kind, text=text, target=target) + more)


def questions(n=24):
    generator = np.random.default_rng(1)
    word = lambda k: "".join(generator.choice(list("abcdefghij"), k))  # noqa: E731
    return [
        {"context": f"{word(6)} {word(3)}?", "options": [word(k) for k in (3, 4, 5, 3)], "gold": int(generator.integers(4))}
        for _ in range(n)
    ]


def ask(folder, ckpt, task, *more):
    keys = [f"--ckpt={ckpt}", f"--lm_eval={task}", f"--include_path={folder}", "--device=cpu", "--dtype=float32", *more]
    return evaluate.main(settings.parse(keys, settings, diffusion, harness, evaluate))[task]


@pytest.mark.parametrize(("causal", "cfg"), [(False, 0.0), (False, 2.0), (True, 0.0)])
def test_multiple_choice_gives_the_numbers_of_our_own(installed, tmp_path, causal, cfg, capsys):
    ckpt = save_model(tmp_path / "run", causal)
    asked = questions()
    write_task(tmp_path, "mine", "multiple_choice", asked, "{{context}}", "gold", "doc_to_choice: options\n")
    theirs = ask(tmp_path, ckpt, "mine", "--draws=8", f"--cfg={cfg}")
    assert "upper bound by any_order, 8 draws" in (out := capsys.readouterr().out) or (causal and "exact" in out)

    (tmp_path / "plain.jsonl").write_text(
        "".join(json.dumps(q | {"options": [" " + option for option in q["options"]]}) + "\n" for q in asked)
    )
    keys = [f"--ckpt={ckpt}", "--set=plain", f"--from={tmp_path / 'plain.jsonl'}", "--device=cpu", "--dtype=float32"]
    ours = choice.main(settings.parse([*keys, "--draws=8", f"--cfg={cfg}"], settings, diffusion, choice))
    assert theirs["acc,none"] == ours["accuracy"] and 0 < ours["accuracy"] < 1
    assert theirs["acc_stderr,none"] == pytest.approx(ours["error"], rel=1e-6)


def test_rolling_likelihood_is_that_of_consecutive_blocks(installed, tmp_path):
    ckpt = save_model(tmp_path / "run", causal=True)
    texts = ["abc def ghij " * 6, "jihg fed"]
    write_task(
        tmp_path,
        "rolling",
        "loglikelihood_rolling",
        [{"text": t} for t in texts],
        "",
        "text",
        "metric_list:\n  - metric: byte_perplexity\n",
    )
    theirs = ask(tmp_path, ckpt, "rolling")["byte_perplexity,none"]
    model, text, _ = checkpoint.load(str(ckpt), "cpu")
    ids = [np.array(text.encode(t)) for t in texts]
    blocks = [x[i : i + 32] for x in ids for i in range(0, len(x), 32)]
    nats = float(likelihood.sequence_nats(model, blocks, "ar").sum())
    assert theirs == pytest.approx(math.exp(nats / sum(len(t.encode()) for t in texts)), rel=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_generated_text_is_what_the_sampler_writes_up_to_the_stop(installed, tmp_path, causal):
    ckpt = save_model(tmp_path / "run", causal)
    model, text, _ = checkpoint.load(str(ckpt), "cpu")
    prompts = ["abc", "def", "ab cd"]
    written = []
    for prompt in prompts:
        x = torch.tensor([text.encode(prompt) + [model.mask_id] * 8])
        how = {"temperature": 0, "seed": 1337}
        tokens = sample.sample_ar(model, x, **how)[0] if causal else sample.sample(model, x, "confidence", 4, **how)[0]
        written.append(text.decode(tokens[0, -8:].tolist()))
    stop = written[0][3]
    gold = [w.split(stop)[0] for w in written]
    lines = [{"prompt": p, "gold": g} for p, g in zip(prompts, gold, strict=True)]
    more = f"metric_list:\n  - metric: exact_match\ngeneration_kwargs:\n  until: [{json.dumps(stop)}]\n  max_gen_toks: 8\n"
    write_task(tmp_path, "writing", "generate_until", lines, "{{prompt}}", "gold", more)
    assert ask(tmp_path, ckpt, "writing", "--steps=4")["exact_match,none"] == 1.0


def test_greedy_decoding_is_found_out_for_a_continuation_without_rivals(installed, tmp_path):
    ckpt = save_model(tmp_path / "run", causal=True)
    model, text, _ = checkpoint.load(str(ckpt), "cpu")
    x = torch.tensor([text.encode("abc") + [model.mask_id] * 2])
    right = text.decode(sample.sample_ar(model, x, temperature=0)[0][0, -2:].tolist())
    wrong = right[0] + ("a" if right[1] != "a" else "b")
    lines = [{"context": "abc", "last": word} for word in (right, wrong)]
    write_task(tmp_path, "last", "loglikelihood", lines, "{{context}}", '"{{last}}"', "target_delimiter: ''\n")
    assert ask(tmp_path, ckpt, "last")["acc,none"] == 0.5


@pytest.mark.parametrize(
    ("stops", "left"), [([], "one two"), (["t"], "one "), (["x", "e"], "on"), ("two", "one "), ([""], "one two")]
)
def test_a_text_ends_before_its_first_stop(stops, left):
    assert harness.cut("one two", stops) == left


def test_our_own_evaluate_survives_the_package_of_that_name():
    with harness.without_this_folder():
        pass
    import evaluate as again

    assert again is evaluate


def test_an_unknown_task_and_a_missing_folder_are_one_line(installed, tmp_path):
    ckpt = save_model(tmp_path / "run", causal=False)
    with pytest.raises(UserError, match="lm_eval has no task 'arc_eazy'; did you mean 'arc_easy'"):
        ask(tmp_path, ckpt, "arc_eazy")
    with pytest.raises(UserError, match="include_path is a folder"):
        ask(tmp_path / "nowhere", ckpt, "arc_easy")
