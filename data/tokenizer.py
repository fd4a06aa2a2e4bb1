"""Text to token ids and back: characters, bytes, GPT-2's BPE, Llama 2's SentencePiece.

All have the same interface. A tokenizer has V real tokens; id V is the mask, which no text contains
and which `decode` shows as a block, so that partly masked text can be read. `meta` holds everything
needed to build a tokenizer again.
"""

import itertools
import os
from pathlib import Path

from tqdm import tqdm

from config import ROOT, Table, UserError, plural, require, shown
from data import loader
from lib.files import optional

DEFAULTS = {
    # char | byte | gpt2 | llama, or the tokenizer of a prepared folder or checkpoint
    "tokenizer": "char",
}

MASK = "█"
LLAMA = ROOT / "data/llama/tokenizer.model"  # not redistributable: comes with Llama 2


class Unavailable(UserError):
    """A known tokenizer whose package or vocabulary is not on this machine."""


class Tokenizer:
    """The base class of the four; `table[i]` is the UTF-8 text of token i, the mask's is the last.

    encode(text, start=True) -> ids. start=False says that other tokens precede the text; it
    matters only for Llama.
    """

    bos = None  # id that begins a document, if there is one
    eot = None  # id that ends a document, if there is one
    separator = ""  # text between two documents, if no id marks the border
    joins_spaces = False  # whether the token of a word includes the space before it

    def __init__(self, table):
        self.table = [*table, MASK.encode()]
        self.vocab_size = len(table)  # V, without the mask

    def decode(self, ids):
        """The text of ids in [0, V], where V is the mask; bytes not in UTF-8 become U+FFFD."""
        return b"".join(self.table[i] for i in ids).decode("utf8", errors="replace")

    def document(self, text):
        """The ids of one whole document, including the id that marks its border."""
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
        """Raise Unavailable if tiktoken neither has nor can fetch the vocabulary."""
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
        """Read LLAMA, or the copy in the shared folder; Unavailable if there is no model."""
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
        """SentencePiece puts a space before a text, which a continuation must not have.

        So a continuation gets a newline, which is part of no other piece: the space and the
        newline are then ids of their own and are cut off.
        """
        return self.pieces.encode(text) if start else self.pieces.encode("\n" + text)[2:]

    def decode(self, ids):
        """As in the base class, but without the bos and the space that precede every text."""
        ids = list(ids)
        return super().decode(ids[ids[:1] == [self.bos] :]).removeprefix(" ")

    def document(self, text):
        return [self.bos, *self.encode(text)]


KINDS = Table("tokenizer", char=Char, byte=Byte, gpt2=GPT2, llama=Llama)


def named(name, texts, load):
    """The tokenizer that --tokenizer=name means: a new one of a kind, or an existing one.

    The latter comes from a prepared folder or anything that `load` (run.checkpoint.load) takes.
    Raises UserError if there is none. New characters in `texts` are appended to an alphabet, so
    that a network which knows the old ones can learn them (run/resume.py).
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
        end = " ('\\x00' ends an answer)" if "\0" in new else ""
        print(f"{plural(len(new), 'new character')} beside those of {name}: {new!r}{end}")
    return Char(tokenizer.alphabet + new)


def lacks(known, meta):
    """The characters in the alphabet of `meta` (of data) that that of `known` (a model) lacks."""
    are_chars = known["kind"] == meta["kind"] == "char"
    return "".join(sorted({*meta["alphabet"]} - {*known["alphabet"]})) if are_chars else ""


def build(kind, texts):
    """A new tokenizer. `texts`, an iterable of str, is read only for a character alphabet.

    The alphabet is that of all the text, including held-out documents: a character that never
    occurs in training then worsens the bound, as it should. Leaving it out would alter the held-out
    text and flatter the bound.
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
    """The tokenizer that wrote `meta`; UserError if `meta` is not valid."""
    texts = isinstance(meta, dict) and all(isinstance(value, str) for value in meta.values())
    message = f"a tokenizer's meta must be a dict of texts with a kind, not {shown(meta)}"
    require(texts and "kind" in meta, message)
    rest = {key: value for key, value in meta.items() if key != "kind"}
    kind, tokenizer = meta["kind"], KINDS[meta["kind"]]
    keys = ["alphabet"] if kind == "char" else []
    message = f"the meta of a {kind} tokenizer has beside its kind the keys {keys}"
    require(list(rest) == keys, f"{message}, not {list(rest)}")
    return tokenizer(**rest)
