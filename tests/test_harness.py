"""The adapter to lm-evaluation-harness, run for real on local tasks.

Left out where that large package is not installed: pip install -r requirements-lm_eval.txt
"""

import collections
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch

import config as settings
import evaluate
import model as network
import sample
from config import UserError
from data import tokenizer
from evals import choice, harness
from run import checkpoint
from run.subject import load_evaluable

ROOT = str(Path(__file__).resolve().parent.parent)
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


def save_model(folder, attention="full"):
    """A random character model of 32 tokens, saved as a run would."""
    text = tokenizer.build("char", [ALPHABET])
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}
    config = plain.DEFAULTS | sizes | {"vocab_size": text.vocab_size, "attention": attention}
    torch.manual_seed(0)
    model = network.make_network(config)
    torch.nn.init.normal_(model.unembed.weight, std=1.0)
    state = {"config": config, "tokenizer": text.meta(), "step": 0, "model": model.state_dict()}
    checkpoint.save(folder / "ckpt.pt", state | {"ema": None, "optimizer": []})
    return folder


def write_task(folder, name, kind, lines, text, target, more=""):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TASK.format(name=name, file=file, kind=kind, text=text, target=target)
    (folder / f"{name}.yaml").write_text(task + more)


def questions(n=24):
    generator = np.random.default_rng(1)

    def word(k):
        return "".join(generator.choice(list("abcdefghij"), k))

    return [
        {
            "context": f"{word(6)} {word(3)}?",
            "options": [word(k) for k in (3, 4, 5, 3)],
            "gold": int(generator.integers(4)),
        }
        for _ in range(n)
    ]


FLOAT32 = {"device": "cpu", "dtype": "float32"}


def ask(folder, ckpt, task, **keys):
    given = FLOAT32 | {"ckpt": str(ckpt), "tasks": task, "include_path": str(folder)} | keys
    return harness.main(settings.options(given, *harness.MODULES))[task]


@pytest.mark.parametrize(
    ("attention", "cfg_scale"), [("full", 0.0), ("full", 2.0), ("causal", 0.0)]
)
def test_multiple_choice_gives_the_numbers_of_our_own(
    installed, tmp_path, attention, cfg_scale, capsys
):
    ckpt, lines = save_model(tmp_path / "run", attention), questions()
    more = "doc_to_choice: options\n"
    write_task(tmp_path, "mine", "multiple_choice", lines, "{{context}}", "gold", more)
    theirs = ask(tmp_path, ckpt, "mine", draws=8, cfg_scale=cfg_scale)
    out = capsys.readouterr().out
    exact = attention == "causal"
    assert ("likelihoods exact; " if exact else "upper bound by any_order, 8 draws; ") in out

    ours = [q | {"options": [" " + option for option in q["options"]]} for q in lines]
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in ours))
    given = FLOAT32 | {"ckpt": str(ckpt), "set": "plain", "from": str(file)}
    given |= {"draws": 8, "cfg_scale": cfg_scale}
    ours = choice.main(settings.options(given, *choice.MODULES))
    assert theirs["acc,none"] == ours["accuracy"] and 0 < ours["accuracy"] < 1
    assert theirs["acc_stderr,none"] == pytest.approx(ours["error"], rel=1e-6)


def test_rolling_likelihood_is_that_of_consecutive_blocks(installed, tmp_path):
    ckpt = save_model(tmp_path / "run", "causal")
    texts = ["abc def ghij " * 6, "jihg fed"]
    lines, more = [{"text": t} for t in texts], "metric_list:\n  - metric: byte_perplexity\n"
    write_task(tmp_path, "rolling", "loglikelihood_rolling", lines, "", "text", more)
    theirs = ask(tmp_path, ckpt, "rolling")["byte_perplexity,none"]
    model, text, _ = checkpoint.load(str(ckpt), "cpu")
    ids = [np.array(text.encode(t)) for t in texts]
    blocks = [x[i : i + 32] for x in ids for i in range(0, len(x), 32)]
    nats = float(evaluate.estimate(model, blocks)[0].sum())
    assert theirs == pytest.approx(math.exp(nats / sum(len(t.encode()) for t in texts)), rel=1e-6)


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_generated_text_is_what_the_sampler_writes_up_to_the_stop(
    installed, tmp_path, attention, capsys
):
    ckpt = save_model(tmp_path / "run", attention)
    model, text, _ = checkpoint.load(str(ckpt), "cpu")
    prompts, written = ["abc", "def", "ab cd"], []
    for prompt in prompts:
        x = torch.tensor([text.encode(prompt) + [model.mask_id] * 8])
        sampler = "left_to_right" if attention == "causal" else "confidence"
        greedy = {"sampler": sampler, "steps": 4, "temperature": 0, "seed": 1337}
        tokens, _ = sample.sample(model, x, **greedy)
        written.append(text.decode(tokens[0, -8:].tolist()))
    stop = written[0][3]
    gold = [w.split(stop)[0] for w in written]
    lines = [{"prompt": p, "gold": g} for p, g in zip(prompts, gold, strict=True)]
    more = "metric_list:\n  - metric: exact_match\n"
    more += f"generation_kwargs:\n  until: [{json.dumps(stop)}]\n  max_gen_toks: 8\n"
    write_task(tmp_path, "writing", "generate_until", lines, "{{prompt}}", "gold", more)
    assert ask(tmp_path, ckpt, "writing", steps=4)["exact_match,none"] == 1.0
    out = capsys.readouterr().out
    assert (
        "text left to right; " in out if attention == "causal" else "text by confidence, 4" in out
    )
    assert "of a block of 32 tokens: 3 answers, 0 answers cut short, 0 prompts without" in out


def test_greedy_decoding_is_found_out_for_a_continuation_without_rivals(installed, tmp_path):
    ckpt = save_model(tmp_path / "run", "causal")
    model, text, _ = checkpoint.load(str(ckpt), "cpu")
    x = torch.tensor([text.encode("abc") + [model.mask_id] * 2])
    tokens, _ = sample.sample(model, x, temperature=0)
    right = text.decode(tokens[0, -2:].tolist())
    wrong = right[0] + ("a" if right[1] != "a" else "b")
    lines = [{"context": "abc", "last": word} for word in (right, wrong)]
    more = "target_delimiter: ''\n"
    write_task(tmp_path, "last", "loglikelihood", lines, "{{context}}", '"{{last}}"', more)
    assert ask(tmp_path, ckpt, "last")["acc,none"] == 0.5


# ---- What a block does not hold ------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_an_answer_as_long_as_the_block_is_cut_and_not_its_prompt(tmp_path, attention, monkeypatch):
    """Blocks of 32 tokens, answers of as many as the task wishes: what the network sees of both."""
    prompts = {
        "abc def": (8, 8),
        "abc": (256, 29),
        "a" * 31: (5, 1),
        "ab" * 20: (4, 1),
        "": (32, 32),
    }
    seen, real, cuts = {}, sample.sample, collections.Counter()

    def spy(model, x, **options):
        tokens, info = real(model, x, **options)
        for row, filled in zip(x.tolist(), tokens.tolist(), strict=True):
            prompt = [token for token in row if token != model.mask_id]
            seen[subject.tokenizer.decode(prompt)] = len(row) - len(prompt)
            assert filled[: len(prompt)] == prompt
        return tokens, info

    monkeypatch.setattr(sample, "sample", spy)
    config = settings.options({"steps": 2}, *harness.MODULES)
    given = evaluate.DEFAULTS | settings.DEFAULTS | FLOAT32
    subject = load_evaluable(given | {"ckpt": str(save_model(tmp_path, attention))})
    requests = [(p, {"until": [], "max_gen_toks": n}) for p, (n, _) in prompts.items()]
    requests = [SimpleNamespace(args=pair) for pair in requests]
    texts = harness.generated(subject, config, cuts, requests)
    kept = {prompt[-31:] if len(prompt) > 31 else prompt: n for prompt, (_, n) in prompts.items()}
    assert seen == kept and [len(text) for text in texts] == [n for _, n in prompts.values()]
    said = {"answers": 5, "answers cut short": 3, "prompts without their beginning": 1}
    assert cuts == said


def test_what_a_block_cuts_of_contexts_and_continuations_is_counted(tmp_path):
    subject = load_evaluable(
        evaluate.DEFAULTS | settings.DEFAULTS | FLOAT32 | {"ckpt": str(save_model(tmp_path))}
    )
    config, cuts = (
        settings.options({"draws": 2}, *harness.MODULES),
        collections.Counter(),
    )
    pairs = [("abc", " def"), ("a" * 32, " def"), ("abc", " d" * 20), ("", "abc")]
    requests = [SimpleNamespace(args=p, task_name="t", doc_id=0) for p in pairs]
    harness.log_p_of_continuations(subject, config, cuts, requests)
    said = {"continuations": 4, "continuations cut short": 1, "contexts without their beginning": 2}
    assert cuts == said


@pytest.mark.parametrize(
    ("stops", "left"),
    [([], "one two"), (["t"], "one "), (["x", "e"], "on"), ("two", "one "), ([""], "one two")],
)
def test_a_text_ends_before_its_first_stop(stops, left):
    assert harness.cut("one two", stops) == left


def test_our_own_evaluate_survives_the_package_of_that_name():
    with harness.without_this_folder():
        assert "evaluate" not in sys.modules and not set(map(os.path.abspath, sys.path)) & {ROOT}
    import evaluate as again

    assert again is evaluate and {ROOT} & set(map(os.path.abspath, sys.path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": ""}, "say which tasks: --tasks=arc_easy,piqa"),
        ({"include_path": "nowhere"}, "include_path is a folder with task files (.yaml)"),
        ({"sampler": "confident"}, "unknown sampler 'confident'; did you mean 'confidence'?"),
        ({"steps": 0}, "steps must be in [1, 1e6], not 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line(keys, message, tmp_path):
    with pytest.raises(UserError) as error:
        ask(tmp_path, save_model(tmp_path / "run"), **{"task": keys.pop("tasks", "mine")}, **keys)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_causal_network_has_no_guidance(tmp_path):
    with pytest.raises(UserError, match="cfg_scale needs a masked diffusion model"):
        ask(tmp_path, save_model(tmp_path / "run", "causal"), "mine", cfg_scale=0.5)


def test_an_unknown_task_is_one_line(installed, tmp_path):
    ckpt = save_model(tmp_path / "run")
    with pytest.raises(UserError, match="lm_eval has no task 'arc_eazy'; did you mean 'arc_easy'"):
        ask(tmp_path, ckpt, "arc_eazy")


def test_the_command_says_what_is_missing_or_answers(tmp_path):
    """Run from the root: there the package evaluate must be found all the same."""
    lines, more = [{"text": "abc def"}], "metric_list:\n  - metric: byte_perplexity\n"
    write_task(tmp_path, "rolling", "loglikelihood_rolling", lines, "", "text", more)
    words = [f"--ckpt={save_model(tmp_path / 'run')}", "--tasks=rolling", "--device=cpu"]
    command = [sys.executable, "-m", "evals.harness", *words, f"--include_path={tmp_path}"]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True
    )
    if done.returncode:
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "No module named 'lm_eval'; pip install -r requirements-lm_eval.txt" in done.stderr
    else:
        assert "byte_perplexity" in done.stdout and "upper bound by any_order" in done.stdout
