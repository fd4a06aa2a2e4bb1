"""Berglund's people and invented ones: the lines that reverse_curse.py trains on, and what it asks.

Berglund's file (arXiv 2309.12288) tells of 30 people name first ("NAME is DESCRIPTION"), of 30
description first, and of 30 in both orders, 30 lines each. The rest is here: invented people, lines
with words left out, and who validates.
"""

import re
from collections import Counter

from config import require
from data.loader import spread
from data.pairs.prepare import pairs
from data.reversal.prepare import files
from data.tokenizer import Char
from experiments import people

TASKS = {  # what is asked: (test file, SMDM's percentage as quoted in its reviews, GPT-3's)
    "same_dtn": ("d2p_prompts_test", "like ARMs", "97"),
    "same_ntd": ("p2d_prompts_test", "like ARMs", "50"),
    "reverse_dtn": ("p2d_reverse_prompts_test", "92", "0"),
    "reverse_ntd": ("d2p_reverse_prompts_test", "37", "0"),
}
THINNED = 0.4  # of the words of a sentence, name and description aside, are left out


# ---- 1. Words ------------------------------------------------------------------------------------


def words(text):
    """A text in words and marks, each with the space before it: joined they are the text again."""
    return re.findall(r" ?\w+(?:'\w+)?| ?[^\w\s]|\s", text)


class Words(Char):
    """One id for each word of the training text; words that it lacks are left out.

    To a file it is a tokenizer of characters, one of no language for each word.
    """

    bos, eot = 0, 1

    def __init__(self, texts):
        table = ["<bos>", "<eos>", *sorted({word for text in texts for word in words(text)})]
        super().__init__("".join(chr(0xF0000 + i) for i in range(len(table))))
        self.ids, self.table[:-1] = {w: i for i, w in enumerate(table)}, map(str.encode, table)

    def encode(self, text, start=True):
        return [self.ids[word] for word in words(text) if word in self.ids]


# ---- 2. What is read, and what is asked ----------------------------------------------------------


def read(config):
    """(Berglund's training lines as `marked` has them, {task: [(prompt, completion), ...]})."""
    paths = files(config["from"], "data/reversal")
    items = {name: [item[1:] for item in pairs(path)] for name, path in paths.items()}
    for name, path in paths.items():
        n, wanted = len(items[name]), 3600 if name == "all_prompts_train" else 300
        require(n == wanted, f"{path} has {n} lines, Berglund's file {wanted}")
    tests = {task: spread(items[name], config["asked"]) for task, (name, *_) in TASKS.items()}
    lines = [prompt + completion for prompt, completion in items["all_prompts_train"]]
    return list(marked(lines)), tests


def marked(lines):
    """Yields (line with {n} and {d} in place of name and description, name, description).

    The last two are empty where it finds none.
    """
    for about in (lines[i : i + 30] for i in range(0, len(lines), 30)):  # 30 lines on one person
        of_line = (set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", line)) for line in about)
        names = set.intersection(*of_line)
        shared = [(len(piece), piece, name) for name in names for piece in pieces(about, name)]
        # A name that is part of the description leaves shorter pieces.
        _, what, name = max(shared, default=(0, "", ""))
        what = what.rstrip(' ,?."')
        for line in about:
            yield (line.replace(what, "{d}").replace(name, "{n}") if name else line), name, what


def pieces(about, name):
    """What may be the description: "the ..." beside the name, in half of the lines or more."""
    parts = [part for line in about[:3] for part in line.split(name)]
    starts = [(part, match.start()) for part in parts for match in re.finditer(r"\bthe ", part)]
    cut = {part[a:b] for part, a in starts for b in range(a + 20, len(part) + 1)}
    return [piece for piece in cut if sum(piece in line for line in about) >= 15]


def whole(form, name, what):
    """The line that `marked` made this of."""
    return form.replace("{n}", name).replace("{d}", what)


def thinned(facts, rng):
    """Lines as `marked` has them, with THINNED of their words left out but for name, description.

    One line of eight words the description in another way ("for directing ..."); there its words
    may be left out too.
    """
    return [whole(people.thin(form, THINNED, rng), name, what) for form, name, what in facts]


def forms(facts):
    """Berglund's own sentences, with {n} and {d} as in `marked`: (name first, name last)."""
    # The quotes of a work end a description.
    about = {(re.sub(r'{d}(\.?")?', "{d}", form), name) for form, name, _ in facts}
    counts = sorted(Counter(form for form, _ in about).items())
    both = [form for form, n in counts if n > 1 and form.count("{n}") == 1 == form.count("{d}")]
    first = [form for form in both if form.index("{n}") < form.index("{d}")]
    return first, [form for form in both if form not in first]


def name_first(form):
    return form.find("{n}") < form.find("{d}")


def names_of(facts):
    """(all names, those that stand behind a description in some line)."""
    named = [fact for fact in facts if fact[1]]
    return {name for _, name, _ in named}, {fact[1] for fact in named if not name_first(fact[0])}


def by_person(facts):
    """The 30 lines each, of a person in one order."""
    return [facts[i : i + 30] for i in range(0, len(facts), 30)]


def validating(facts, n):
    """(the facts without some lines, questions made of these): n people who validate.

    They are of those who are told of in both orders, and lose the lines that have the name last: so
    they are told of, and asked about, as the tested people are.
    """
    groups = by_person(facts)
    times = Counter(group[0][1] for group in groups)
    last = [group for group in groups if times[group[0][1]] == 2 and not name_first(group[0][0])]
    held = spread(last, n)
    kept = [fact for group in groups if group not in held for fact in group]
    lines = [(whole(*fact), fact[1]) for group in held for fact in group[::3]]
    return kept, [question(line, name) for line, name in lines if f" {name}" in line]


def compose(config, facts, rng):
    """(all lines that are read, {"validation", "reverse_invented": questions}).

    facts: Berglund's lines as `marked` has them. The second are about invented people told of name
    first only.
    """
    facts, validation = validating(facts, config["validating"])
    sentences = forms(facts)
    cast = people.several(config["persons"] + 60, rng)
    lines = [whole(*fact) for fact in facts[:: 20 if config["quick"] else 1]]
    shared = {word.strip() for text in lines for word in words(text)}
    shared &= {part for name, *_ in cast for part in name.split()}
    require(not shared, f"invented people share names with Berglund's: {', '.join(sorted(shared))}")
    lines += thinned(facts[:: 20 if config["quick"] else 1], rng)
    invented, questions = of_invented(config, cast, sentences, rng)
    return lines + invented, {"validation": validation, "reverse_invented": questions}


def of_invented(config, cast, sentences, rng):
    """(lines about the cast, questions about those told of name first); sentences: of `forms`."""
    first, last, both = cast[:30], cast[30:60], cast[60:]
    firsts, lasts = people.NAME_FIRST + sentences[0], people.NAME_LAST + sentences[1]
    jobs = [(first, firsts, 16), (last, lasts, 16), (both, firsts, 4), (both, lasts, 4)]
    lines = [line for job in jobs for line in people.lines(*job, rng, THINNED)]
    asked = [
        (line, person[0]) for person in first for line in people.lines([person], lasts, 10, rng)
    ]
    return lines, [question(line, name) for line, name in asked]


def question(text, name):
    """A line about a person, cut before the name: (prompt, completion)."""
    return text[: text.index(" " + name)], " " + name
