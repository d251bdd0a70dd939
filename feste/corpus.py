"""Which text a run is trained on: the complete works of Shakespeare, or any text file or directory of tokens.

The works come with the package, compressed, so a first run needs no network: 5,057,240 characters in modern spelling,
the text files of the source distribution `shakespeare` 0.6 (Project Gutenberg's plain texts, which are in the public
domain), in the order of their names, with a line feed behind each.
"""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import numpy as np

from feste.data import Text
from feste.errors import FesteError
from feste.pairs import Pairs, looks_like_pairs, read_pairs
from feste.shards import PICKLE, has_shards, load_shards
from feste.text import read_text
from feste.tokenizer import END_OF_TEXT, BPETokenizer
from feste.tokens import TOKENIZER, is_token_directory, load_tokens

SHAKESPEARE = "the complete works of Shakespeare"
OWN_COPY = Path("data", "shakespeare.txt")  # comes first
SHAKESPEARE_FILE = "shakespeare.txt.xz"
SHAKESPEARE_SHA256 = "64d0f3aab6c2b9b92ced74b927a209a7fae861daf9d7ea72ede67519b43d83fe"
JSON_NAMES = (".jsonl", ".ndjson", ".json")
PAIRS_NAMES = (".jsonl", ".ndjson")


class CorpusError(FesteError):
    """No usable text, and what would help."""


@dataclass(frozen=True)
class Source:
    """Which text a run is trained on, and how much of it. run.json keeps it as `data_flags`.

    data: a text file, a directory of tokens, or None for Shakespeare. train_chars: train on the first so many
    characters; tokenizer_chars: make the tokenizer from the first so many; None for all of them. encoding and errors:
    how files are read, see `text`. tokenizer: a file or directory that holds the tokenizer, which is not made then.
    val_data: a text file that is held out, instead of the end of the text.
    """

    data: str | None = None
    train_chars: int | None = None
    tokenizer_chars: int | None = None
    encoding: str | None = None
    errors: str = "strict"
    tokenizer: str | None = None
    val_data: str | None = None

    def __post_init__(self) -> None:
        for name in ("train_chars", "tokenizer_chars"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CorpusError(f"{name} must be at least 1, got {value}", name)
        if self.is_tokens:
            given = [f.name for f in fields(self)
                     if f.name not in ("data", "tokenizer") and getattr(self, f.name) != f.default]
            if given:
                raise CorpusError(f"{given[0]} is for texts, and {self.data} is a directory of tokens; leave it out",
                                  given[0])

    @property
    def is_tokens(self) -> bool:
        return self.data is not None and Path(self.data).is_dir()

    def __str__(self) -> str:
        return self.data or SHAKESPEARE

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def of_run(cls, info: dict) -> Source | None:
        """The text that run.json names, or None."""
        kept = info.get("data_flags")
        if not isinstance(kept, dict) or "data" not in kept:
            return None
        known = {f.name: kept[f.name] for f in fields(cls) if f.name in kept}
        kinds = {"train_chars": int | None, "tokenizer_chars": int | None, "errors": str}
        if all(isinstance(value, kinds.get(name, str | None)) for name, value in known.items()):
            return cls(**known)
        return None

    def characters(self) -> int:
        """The length of the text that a run is trained on. CorpusError for what is no text."""
        if self.is_pairs:
            raise CorpusError(f"{self.data} holds questions and answers, not a text", "data")
        return len(self.text())

    def text(self) -> str:
        """The part of the text that a run is trained on. CorpusError for a directory of tokens."""
        return self._whole()[:self.train_chars]

    def val_text(self) -> str | None:
        """The text that is held out, if it is one of its own."""
        return None if self.val_data is None else read_text(self.val_data, self.encoding, self.errors)

    def _whole(self) -> str:
        if self.data is None:
            return shakespeare_text()
        if self.is_tokens:
            raise CorpusError(f"{self.data} is a directory, not a text", "data")
        if self._names(JSON_NAMES):
            raise CorpusError(f"{self.data} holds JSON, of which every line or object is a text of its own", "prepare")
        if self._names((".parquet",)):
            raise CorpusError(f"{self.data} is a Parquet file, of which every row is a text of its own", "prepare")
        return read_text(self.data, self.encoding, self.errors)

    def _names(self, endings: tuple[str, ...]) -> bool:
        return self.data is not None and Path(self.data).name.lower().removesuffix(".gz").endswith(endings)

    @cached_property
    def is_pairs(self) -> bool:
        """Whether it is a file of JSON lines that are questions and answers."""
        if not self._names(PAIRS_NAMES) or self.is_tokens:
            return False
        return looks_like_pairs(read_text(self.data, self.encoding, self.errors))

    def load(self, vocab_size: int,
             tokenizer: BPETokenizer | None = None) -> tuple[np.ndarray | Text | Pairs, BPETokenizer]:
        """The tokens, or pairs, and the tokenizer: the given one, that of a directory of tokens, or one made for it.

        Of pairs, a tokenizer without <|endoftext|> gets it.
        """
        if tokenizer is None and self.tokenizer is not None:
            read = BPETokenizer.from_pretrained if Path(self.tokenizer).is_dir() else BPETokenizer.load
            tokenizer = read(self.tokenizer)
        if self.is_pairs:
            return self._load_pairs(vocab_size, tokenizer)
        if self.is_tokens:
            if not is_token_directory(self.data) and has_shards(self.data):
                return self._load_shards(tokenizer)
            if not is_token_directory(self.data):
                raise CorpusError(f"{self.data} is a directory without tokens", "prepare")
            tokens, made_with = load_tokens(self.data)
            if tokenizer is not None and tokenizer.to_json() != made_with.to_json():
                raise CorpusError(f"the tokens in {self.data} were made with another tokenizer than that of the "
                                  "checkpoint; make them again with its tokenizer.json, or name a text file", "data")
            return tokens, made_with
        text, held_out = self._whole(), self.val_text()
        if tokenizer is None:
            tokenizer = BPETokenizer.train(text[:self.tokenizer_chars], vocab_size)
        tokens = tokenizer.encode_to_numpy(text[:self.train_chars])
        return (tokens if held_out is None else Text(tokens, tokenizer.encode_to_numpy(held_out))), tokenizer

    def _load_shards(self, tokenizer: BPETokenizer | None) -> tuple[Text, BPETokenizer]:
        """Files of other programs, whose tokenizer must be named or lie beside them."""
        beside = Path(self.data, TOKENIZER)
        if tokenizer is None and beside.exists():
            tokenizer = BPETokenizer.load(beside)
        if tokenizer is None:
            pickle = Path(self.data, PICKLE)
            also = f" ({pickle} may say which, but it is a pickle, and to read one can run anything)"
            raise CorpusError(f"the tokens in {self.data} are of another program, and their tokenizer is not among them"
                              f"{also if pickle.exists() else ''}", "tokenizer_file")
        return Text(*load_shards(self.data)), tokenizer

    def _load_pairs(self, vocab_size: int, tokenizer: BPETokenizer | None) -> tuple[Pairs, BPETokenizer]:
        for name in ("train_chars", "tokenizer_chars", "val_data"):
            if getattr(self, name) is not None:
                raise CorpusError(f"{name} is for texts, and {self.data} holds questions and answers; leave it out",
                                  name)
        examples = read_pairs(self.data, self.encoding, self.errors)
        if tokenizer is None:
            texts = ["".join(piece.text for piece in pieces) for pieces in examples.values()]
            tokenizer = BPETokenizer.train(texts, vocab_size, [END_OF_TEXT])
        elif tokenizer.end_of_text is None:
            tokenizer = tokenizer.with_special_tokens(END_OF_TEXT)
        return Pairs(examples, tokenizer), tokenizer


def shakespeare_text() -> str:
    """The complete works, 5,057,240 characters; data/shakespeare.txt if the working directory has one."""
    if OWN_COPY.exists():
        return read_text(OWN_COPY)
    packed = files("feste").joinpath(SHAKESPEARE_FILE)
    try:
        data = lzma.decompress(packed.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise CorpusError(f"the text that comes with feste cannot be read ({packed}: {error}); install feste again, or "
                          "name a text of your own", "data") from error
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise CorpusError(f"the text that comes with feste ({packed}) is damaged; install feste again", "data")
    return data.decode("utf-8")
