"""Text to token ids and back: characters, bytes, GPT-2's BPE, Llama 2's SentencePiece.

All have one interface. A tokenizer knows V real tokens; id V is the mask, which no text contains
and `decode` draws as a block, so that partly masked text can be read. `meta` holds all that is
needed to build a tokenizer again.
"""

import itertools
import os
from pathlib import Path

from tqdm import tqdm

from config import ROOT, Table, UserError, require, shown
from data import loader
from lib.files import optional

DEFAULTS = {
    # char | byte | gpt2 | llama, or whose tokenizer it is: a prepared folder, a checkpoint
    "tokenizer": "char",
}

MASK = "█"
LLAMA = ROOT / "data/llama/tokenizer.model"  # not ours to give away: comes with Llama 2


class Unavailable(UserError):
    """A tokenizer that there is, but whose package or vocabulary is not on this machine."""


class Tokenizer:
    """What the four have in common; `table[i]` is the UTF-8 text of token i, with the mask's last.

    encode(text, start=True) -> ids. start=False says that other tokens stand before the text; it
    matters to Llama alone.
    """

    bos = None  # id that begins a document, if there is one
    eot = None  # id that ends a document, if there is one
    separator = ""  # text between two documents, where no id does it
    joins_spaces = False  # whether the token of a word holds the space before it

    def __init__(self, table):
        self.table = [*table, MASK.encode()]
        self.vocab_size = len(table)  # V, without the mask

    def decode(self, ids):
        """The text of ids in [0, V], V being the mask; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.table[i] for i in ids).decode("utf8", errors="replace")

    def document(self, text):
        """The ids of one whole document, with the marks of its border."""
        return self.encode(text) + ([] if self.eot is None else [self.eot])

    def meta(self):
        return {"kind": self.kind}


class Char(Tokenizer):
    """One id per character of a fixed alphabet."""

    kind = "char"
    separator = "\n\n"

    def __init__(self, alphabet):
        distinct = alphabet and len(set(alphabet)) == len(alphabet)
        require(distinct, "an alphabet must be characters, each once")
        self.alphabet = alphabet
        self.ids = {character: i for i, character in enumerate(alphabet)}
        super().__init__([character.encode("utf8", "replace") for character in alphabet])

    def encode(self, text, start=True):
        """Raise UserError for a character that the alphabet lacks."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            message = f"character {error.args[0]!r} is not among the {self.vocab_size} that"
            origin = "this character-level tokenizer knows from the text it was prepared on"
            raise UserError(f"{message} {origin}") from None

    def meta(self):
        return {"kind": "char", "alphabet": self.alphabet}


class Byte(Tokenizer):
    """The 256 bytes of UTF-8: any text, no unknown symbol."""

    kind = "byte"
    separator = "\n\n"

    def __init__(self):
        super().__init__([bytes([i]) for i in range(256)])

    def encode(self, text, start=True):
        return list(text.encode("utf8", errors="replace"))


class GPT2(Tokenizer):
    """GPT-2's byte-pair encoding, V = 50257; id 50256 follows every document."""

    kind = "gpt2"
    eot = 50256
    joins_spaces = True

    def __init__(self):
        """Raise Unavailable where tiktoken neither has nor can fetch the vocabulary."""
        import requests
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (requests.RequestException, ValueError, OSError) as error:
            problem = f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__})"
            advice = "set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's copy of it"
            raise Unavailable(f"{problem}; without a network, {advice}") from None
        super().__init__([self.bpe.decode_single_token_bytes(i) for i in range(self.bpe.n_vocab)])

    def encode(self, text, start=True):
        return self.bpe.encode_ordinary(text)


class Llama(Tokenizer):
    """Llama 2's SentencePiece model, V = 32000. Id 1 begins every document, as in SMDM's data."""

    kind = "llama"
    bos, eot = 1, 2
    joins_spaces = True

    def __init__(self):
        """Read LLAMA, or the copy in the shared folder; Unavailable where there is no model."""
        try:
            sentencepiece = optional("sentencepiece", "the llama tokenizer")
        except UserError as error:
            raise Unavailable(error) from None
        shared = ROOT / (os.environ.get("NANOMDM_SHARED") or "../shared")
        path = LLAMA if LLAMA.is_file() else shared / "data/llama_tokenizer/tokenizer.model"
        if not path.is_file():
            raise Unavailable(f"no tokenizer.model of Llama 2: put it at {LLAMA}")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise Unavailable(f"{path} is not a SentencePiece model") from None
        super().__init__([self._bytes(i) for i in range(self.pieces.vocab_size())])

    def _bytes(self, i):
        piece = self.pieces.id_to_piece(i)
        if self.pieces.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("▁", " ").encode()

    def encode(self, text, start=True):
        """SentencePiece puts a space before a text; one that continues another must not gain it.

        Behind a newline, which is part of no other piece, the space and the newline are ids of
        their own and are cut off.
        """
        return self.pieces.encode(text) if start else self.pieces.encode("\n" + text)[2:]

    def decode(self, ids):
        """As for all, less what stands before every text: the id that begins it, and a space."""
        ids = list(ids)
        return super().decode(ids[ids[:1] == [self.bos] :]).removeprefix(" ")

    def document(self, text):
        return [self.bos, *self.encode(text)]


KINDS = Table("tokenizer", char=Char, byte=Byte, gpt2=GPT2, llama=Llama)


def named(name, texts, load):
    """The tokenizer that --tokenizer=name means: a new one of a kind, or that of what has one.

    That is a prepared folder or all that `load` takes, lib.checkpoint.load. UserError where there
    is none. To an alphabet the characters are added that `texts` hold besides, behind those that it
    has: a network that knows these can learn the others (lib/resume.py).
    """
    if name in KINDS or not (os.path.exists(name) or "/" in name):
        return build(name, texts)
    if Path(name, "meta.json").is_file():
        meta = loader.read_meta(name)["tokenizer"]
    else:
        meta = load(name)[2]["tokenizer"]
    require(meta, f"{name} names no tokenizer")
    tokenizer = from_meta(meta)
    if not isinstance(tokenizer, Char):
        return tokenizer
    new = "".join(sorted(characters(texts) - {*tokenizer.alphabet}))
    if new:
        end = ", the first of which ends answers" if "\0" in new else ""
        print(f"{name} has no {new!r}: added to its alphabet{end}, for --init_from= to learn")
    return Char(tokenizer.alphabet + new)


def lacks(known, meta):
    """The characters that the alphabet of some data has and that of a model has not: two metas."""
    are_chars = known["kind"] == meta["kind"] == "char"
    return "".join(sorted({*meta["alphabet"]} - {*known["alphabet"]})) if are_chars else ""


def build(kind, texts):
    """A new tokenizer. `texts`, an iterable of str, is read for a character alphabet only.

    The alphabet is that of all the text, held-out documents included: a character that training
    never shows then makes the bound as bad as it should. Leaving it out would mean altering the
    held-out text, and a bound that flatters.
    """
    tokenizer = KINDS[kind]
    if tokenizer is not Char:
        return tokenizer()
    return Char("".join(sorted({*Char.separator} | characters(texts))))


def characters(texts):
    """The set of characters of an iterable of texts."""
    bar = tqdm(texts, "collecting characters", unit=" documents", leave=False, disable=None)
    return set(itertools.chain.from_iterable(bar))


def from_meta(meta):
    """The tokenizer that wrote `meta`; UserError where the meta is not one."""
    texts = isinstance(meta, dict) and all(isinstance(value, str) for value in meta.values())
    message = f"a tokenizer's meta must be a dict of texts with a kind, not {shown(meta)}"
    require(texts and "kind" in meta, message)
    rest = {key: value for key, value in meta.items() if key != "kind"}
    kind, tokenizer = meta["kind"], KINDS[meta["kind"]]
    keys = ["alphabet"] if kind == "char" else []
    message = f"the meta of a {kind} tokenizer has beside its kind the keys {keys}"
    require(list(rest) == keys, f"{message}, not {list(rest)}")
    return tokenizer(**rest)
