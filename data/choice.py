"""Multiple-choice questions: a line of a .jsonl file (also .gz, .xz) to contexts, options and gold.

They are worded as by lm-evaluation-harness 0.4.13 without examples, which published numbers use;
see FORMATS. A context and an option are separated by one space. A set of your own (plain) has lines
{"context": TEXT, "options": [TEXT, ...], "gold": NUMBER FROM 0}, and its options follow the context
as they are.
"""

import itertools
import re
import string
from pathlib import Path
from typing import NamedTuple

from config import Table, require
from data.examples import field, records

ARC = "Question: {question}\nAnswer:"
FORMATS = {  # the context of a question; keys of its line are in braces
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
    contexts: list  # the text before each option; the same for all but in WinoGrande
    options: list  # the texts to score
    gold: int  # the index of the right one


def read(name, place, limit=0):
    """The first `limit` questions (0: all) of a set: (questions, path of the file).

    place: a file, or a folder with one file NAME*.jsonl*. Raises UserError, naming file and line,
    for a line that is not JSON, lacks a key or has a value of another type there, and for a gold
    that is not the index of an option.
    """
    reader, path = READERS[name], find(name, Path(place))
    lines = articles(records(path)) if name == "race" else records(path)
    questions = []
    for where, record in itertools.islice(lines, limit or None):
        contexts, options, gold = reader(where, record)
        filled = options and all(map(str.strip, options))
        require(filled, f"{where}: an option is empty, or there is none")
        in_range(where, options, gold)
        space = "" if name == "plain" else " "
        questions.append(Question(where, contexts, [space + option for option in options], gold))
    require(questions, f"{path} holds no question")
    return questions, path


def find(name, place):
    """The file of a set: `place` itself, or the only one of that name in the folder."""
    require(place.exists(), f"no file or folder {place}")
    if place.is_file():
        return place
    files = sorted(place.glob(f"{name}*.jsonl*"))
    require(files, f"{place} holds no file {name}*.jsonl (or .jsonl.gz, .jsonl.xz)")
    several = f"{place} holds several files of {name}, so name one"
    require(len(files) == 1, f"{several}: {', '.join(file.name for file in files)}")
    return files[0]


# ---- Values of a line ----------------------------------------------------------------------------


def texts(where, record, key):
    """The list of texts under a key."""
    require(isinstance(record.get(key), list), f'{where}: no list under the key "{key}"')
    return [field(where, {key: item}, key) for item in record[key]]


def number(where, record, key):
    """The whole number under a key, which may be written as text, True or False."""
    require(key in record, f'{where}: no key "{key}"')
    value = record[key]
    whole = isinstance(value, int) or re.fullmatch(r"\s*\d{1,9}\s*", str(value))
    require(whole, f'{where}: "{key}" must be a whole number, not {str(value)[:40]!r}')
    return int(value)


def in_range(where, options, gold):
    """Raise UserError for an answer that is not the index of an option."""
    n = len(options)
    require(0 <= gold < n, f"{where}: the answer {gold} is out of range: from 0 to {n - 1}")


# ---- The sets: (contexts, options, gold) of a line -----------------------------------------------


def one_context(name, where, record, options, gold):
    """All options after the same context, worded by the format of the set."""
    keys = [key for _, key, _, _ in string.Formatter().parse(FORMATS[name]) if key]
    context = FORMATS[name].format(**{key: field(where, record, key) for key in keys})
    return [context] * len(options), options, gold


def keyed(name, *keys, answer, first=0):
    """A reader of sets with one key per option; `answer` holds the gold, counted from `first`."""

    def reader(where, record):
        options = [field(where, record, key) for key in keys]
        return one_context(name, where, record, options, number(where, record, answer) - first)

    return reader


def lettered(name):
    """A reader of {"choices": {"text": [...], "label": [...]}, "answerKey": one of the labels}."""

    def reader(where, record):
        choices = record.get("choices")
        require(isinstance(choices, dict), f'{where}: no object under the key "choices"')
        options, labels = texts(where, choices, "text"), texts(where, choices, "label")
        answer = field(where, record, "answerKey").strip()
        none = f'{where}: the answer "{answer}" is none of the labels {", ".join(labels)}'
        require(answer in labels, none)
        return one_context(name, where, record, options, labels.index(answer))

    return reader


def boolq(where, record):
    return one_context("boolq", where, record, ["no", "yes"], number(where, record, "answer"))


def plain(where, record):
    options, gold = texts(where, record, "options"), number(where, record, "gold")
    return one_context("plain", where, record, options, gold)


def hellaswag(where, record):
    """As processed by the harness (query, choices, gold) or published (ctx_a, ctx_b, endings)."""
    if "query" in record:
        options, gold = texts(where, record, "choices"), number(where, record, "gold")
        return one_context("hellaswag", where, record, options, gold)
    label, a, b = (field(where, record, key) for key in ("activity_label", "ctx_a", "ctx_b"))
    options = [without_brackets(option) for option in texts(where, record, "endings")]
    query = without_brackets(f"{label}: {a} {b.capitalize()}")
    return [query] * len(options), options, number(where, record, "label")


def without_brackets(text):
    """HellaSwag's text without WikiHow's [title], [step], ..."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def sciq(where, record):
    keys = ("distractor1", "distractor2", "distractor3", "correct_answer")
    options = [field(where, record, key) for key in keys]
    support = {"support": field(where, record, "support").lstrip()}
    return one_context("sciq", where, record | support, options, 3)


def race(where, record):
    article, question = field(where, record, "article"), field(where, record, "question")
    options, answer = texts(where, record, "options"), field(where, record, "answer")
    a_letter = len(answer) == 1 and answer in "ABCDEFGH"
    require(a_letter, f'{where}: the answer must be a letter, not "{answer}"')
    context = f"Article: {article}\n\n{record.get('before', '')}{question}"
    return [context] * len(options), options, "ABCDEFGH".index(answer)


def articles(lines):
    """RACE as in the harness: an article's last question, after the other ones with answers.

    The lines of one article must be consecutive. An answered question that ends in a gap becomes a
    sentence.
    """
    for _, group in itertools.groupby(lines, lambda line: line[1].get("article")):
        before = ""
        for where, record in group:
            last = where, record | {"before": before}
            _, options, gold = race(where, record)
            in_range(where, options, gold)
            question = field(where, record, "question")
            gap = question.endswith("  _  .")
            before += question[:-5] if gap else f"Question: {question}\nAnswer: "
            before += options[gold] + "\n"
        yield last


def winogrande(where, record):
    """Each option is put into the gap, and the text after the gap is scored."""
    before, gap, after = field(where, record, "sentence").partition("_")
    require(gap, f"{where}: the sentence has no gap _")
    contexts = [before + field(where, record, key) for key in ("option1", "option2")]
    return contexts, [after.strip()] * 2, number(where, record, "answer") - 1


def lambada(where, record):
    """One option: the last word."""
    text, space, word = field(where, record, "text").rpartition(" ")
    require(space, f"{where}: the text must be more than one word")
    return [text], [word], 0


READERS = Table(
    "set",
    arc_challenge=lettered("arc_challenge"),
    arc_easy=lettered("arc_easy"),
    boolq=boolq,
    hellaswag=hellaswag,
    lambada=lambada,
    openbookqa=lettered("openbookqa"),
    piqa=keyed("piqa", "sol1", "sol2", answer="label"),
    plain=plain,
    race=race,
    sciq=sciq,
    social_iqa=keyed("social_iqa", "answerA", "answerB", "answerC", answer="label", first=1),
    winogrande=winogrande,
)
