"""Multiple-choice questions: one line of a .jsonl file (also .gz, .xz) to contexts, options and the right one.

They are worded as lm-evaluation-harness 0.4.13 words them without examples, since that is what published numbers are made
with; FORMATS says how. Between a context and an option stands one space. A set of your own has lines
{"context": TEXT, "options": [TEXT, ...], "gold": NUMBER FROM 0}, and its options go on from the context as they are.
"""

import itertools
import re
import string
from pathlib import Path
from typing import NamedTuple

from config import require
from data import rows

ARC = "Question: {question}\nAnswer:"
FORMATS = {  # the context of a question; in braces the keys of its line
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "boolq": "{passage}\nQuestion: {question}?\nAnswer:",
    "hellaswag": "{query}",
    "lambada": "{text but its last word}",
    "openbookqa": "{question_stem}",
    "piqa": "Question: {goal}\nAnswer:",
    "plain": "{context}",
    "race": "Article: {article}\n\n{its other questions with their answers}{question}",
    "sciq": "{support}\nQuestion: {question}\nAnswer:",
    "social_iqa": "Q: {context} {question}\nA:",
    "winogrande": "{sentence up to the gap, with an option in it}",
}


class Question(NamedTuple):
    where: str  # file and line, for messages
    contexts: list  # the text before each option; one text, but in WinoGrande
    options: list  # the texts that are scored
    gold: int  # which of them is right


def read(name, place, limit=0):
    """The first `limit` questions (0: all) of a set -> (questions, path of the file).

    place: a file, or a folder with one file NAME*.jsonl*. Raises UserError that names file and line for a line that is not
    JSON, lacks a key or holds another type there, and for an answer that none of the options is.
    """
    path = find(name, Path(place))
    records = articles(rows.records(path)) if name == "race" else rows.records(path)
    questions = []
    for where, record in itertools.islice(records, limit or None):
        contexts, options, gold = READERS[name](where, record)
        require(options and all(map(str.strip, options)), f"{where}: an option is empty, or there is none")
        require(0 <= gold < len(options), f"{where}: the answer is out of range: {len(options)} options, and it is {gold}")
        space = "" if name == "plain" else " "
        questions.append(Question(where, contexts, [space + option for option in options], gold))
    require(questions, f"{path} holds no question")
    return questions, path


def find(name, place):
    """The file of a set."""
    require(place.exists(), f"no file or folder {place}")
    if place.is_file():
        return place
    files = sorted(place.glob(f"{name}*.jsonl*"))
    require(files, f"{place} holds no file {name}*.jsonl (or .jsonl.gz, .jsonl.xz)")
    require(len(files) == 1, f"{place} holds several files of {name}, so name one: {', '.join(f.name for f in files)}")
    return files[0]


# ---- Values of a line ------------------------------------------------------------------------------------------------


def texts(where, record, key):
    """The list of texts under a key."""
    require(isinstance(record.get(key), list), f'{where}: no list under the key "{key}"')
    return [rows.field(where, {key: item}, key) for item in record[key]]


def number(where, record, key):
    """The whole number under a key, which may be spelt as text, True or False."""
    require(key in record, f'{where}: no key "{key}"')
    good = isinstance(record[key], int) or re.fullmatch(r"\s*\d{1,9}\s*", str(record[key]))
    require(good, f'{where}: "{key}" must be a whole number, not {str(record[key])[:40]!r}')
    return int(record[key])


def context(name, where, record):
    """The context of a question, by its format."""
    keys = [key for _, key, _, _ in string.Formatter().parse(FORMATS[name]) if key]
    return FORMATS[name].format(**{key: rows.field(where, record, key) for key in keys})


# ---- The sets: (contexts, options, gold) of a line -------------------------------------------------------------------


def same(name, where, record, options, gold):
    """All options behind one context."""
    return [context(name, where, record)] * len(options), options, gold


def keyed(name, *keys, answer, first=0):
    """A reader of options that have a key each; the right one is numbered from `first` under the key `answer`."""

    def reader(where, record):
        options = [rows.field(where, record, key) for key in keys]
        return same(name, where, record, options, number(where, record, answer) - first)

    return reader


def lettered(name):
    """A reader of ARC and OpenBookQA: {"choices": {"text": [...], "label": [...]}, "answerKey": one of the labels}."""

    def reader(where, record):
        choices = record.get("choices")
        require(isinstance(choices, dict), f'{where}: no object under the key "choices"')
        options, labels = texts(where, choices, "text"), texts(where, choices, "label")
        answer = rows.field(where, record, "answerKey").strip()
        require(answer in labels, f'{where}: the answer "{answer}" is none of the labels {", ".join(labels)}')
        return same(name, where, record, options, labels.index(answer))

    return reader


def hellaswag(where, record):
    """As the harness leaves it, {"query", "choices", "gold"}, or as it was published, with ctx_a, ctx_b and endings."""
    if "query" in record:
        return same("hellaswag", where, record, texts(where, record, "choices"), number(where, record, "gold"))
    label, a, b = (rows.field(where, record, key) for key in ("activity_label", "ctx_a", "ctx_b"))
    options = [without_brackets(option) for option in texts(where, record, "endings")]
    query = without_brackets(f"{label}: {a} {b.capitalize()}")
    return [query] * len(options), options, number(where, record, "label")


def without_brackets(text):
    """HellaSwag's text without the [title], [step], ... of WikiHow."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def sciq(where, record):
    options = [rows.field(where, record, key) for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return same("sciq", where, record | {"support": rows.field(where, record, "support").lstrip()}, options, 3)


def race(where, record):
    article, question = rows.field(where, record, "article"), rows.field(where, record, "question")
    options, answer = texts(where, record, "options"), rows.field(where, record, "answer")
    require(len(answer) == 1 and answer in "ABCDEFGH", f'{where}: the answer must be a letter, not "{answer}"')
    gold = "ABCDEFGH".index(answer)
    return [f"Article: {article}\n\n{record.get('before', '')}{question}"] * len(options), options, gold


def articles(records):
    """RACE as the harness asks it: of an article's questions the last; those before it stand answered in the context.

    The lines of one article have to follow each other. An answered question that ends in a gap is a sentence.
    """
    for _, group in itertools.groupby(records, lambda found: found[1].get("article")):
        before = ""
        for where, record in group:
            last = where, record | {"before": before}
            _, options, gold = race(where, record)
            require(gold < len(options), f"{where}: the answer is out of range: {len(options)} options, and it is {gold}")
            question = rows.field(where, record, "question")
            before += question[:-5] if question.endswith("  _  .") else f"Question: {question}\nAnswer: "
            before += options[gold] + "\n"
        yield last


def winogrande(where, record):
    """Either option is put in the gap, and what follows the gap is scored."""
    sentence = rows.field(where, record, "sentence")
    before, gap, after = sentence.partition("_")
    require(gap, f"{where}: the sentence has no gap _")
    contexts = [before + rows.field(where, record, key) for key in ("option1", "option2")]
    return contexts, [after.strip()] * 2, number(where, record, "answer") - 1


def lambada(where, record):
    """One option: the last word."""
    text, space, word = rows.field(where, record, "text").rpartition(" ")
    require(space, f"{where}: the text must be more than one word")
    return [text], [word], 0


READERS = {
    "arc_challenge": lettered("arc_challenge"),
    "arc_easy": lettered("arc_easy"),
    "boolq": lambda where, record: same("boolq", where, record, ["no", "yes"], number(where, record, "answer")),
    "hellaswag": hellaswag,
    "lambada": lambada,
    "openbookqa": lettered("openbookqa"),
    "piqa": keyed("piqa", "sol1", "sol2", answer="label"),
    "plain": lambda where, record: same(
        "plain", where, record, texts(where, record, "options"), number(where, record, "gold")
    ),
    "race": race,
    "sciq": sciq,
    "social_iqa": keyed("social_iqa", "answerA", "answerB", "answerC", answer="label", first=1),
    "winogrande": winogrande,
}
