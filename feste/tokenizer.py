"""BPETokenizer: byte-level byte-pair encoding with GPT-2's pre-tokenization.

Sennrich, Haddow and Birch 2016, arXiv:1508.07909; Radford et al. 2019 for the bytes and the word pattern. The
file format is that of Hugging Face's `tokenizers`, and ids are the same as theirs. Lossless on every string.
"""

from __future__ import annotations

import codecs
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, islice
from pathlib import Path

import numpy as np

from feste import _bpe, _unicode, disk
from feste.errors import FesteError
from feste.formats import gpt2_vocabulary, tiktoken_ranks, tokenizer_json
from feste.formats.vocabulary import BYTE_CHARACTERS, Parts, TokenizerError, read_file

CHUNK_BYTES = 1 << 18   # text that is worth a thread of its own
GROUP_BYTES = 1 << 25   # text that is in memory at once as UTF-8, if it comes as many documents
GROUP_TEXTS = 1 << 12   # documents that are looked at together; a multiple of them makes up GROUP_BYTES


def _install_char_classes() -> None:
    runs = _unicode.RUNS.split()
    classes = np.array([int(run[0]) for run in runs], np.uint8)
    _bpe.set_char_classes(np.repeat(classes, [int(run[1:], 16) for run in runs]))


_install_char_classes()


# Ids 0 .. 255 in the order of those characters, as in GPT-2 and in Hugging Face's trainer.
BASE_BYTES = sorted(range(256), key=lambda byte: BYTE_CHARACTERS[byte])


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at position {error.start}; "
                         "read the file as UTF-8, or replace it with text.encode('utf-8', 'replace')") from None


@dataclass
class Documents:
    """The UTF-8 of some documents, one behind the other, and where each of them ends (n) int64."""

    data: memoryview
    ends: np.ndarray

    @classmethod
    def of(cls, texts: list[str]) -> Documents:
        encoded = [_utf8(text) for text in texts]
        ends = np.fromiter(accumulate(map(len, encoded)), np.int64, len(encoded))
        return cls(memoryview(encoded[0] if len(encoded) == 1 else b"".join(encoded)), ends)

    def in_pieces(self) -> Documents:
        """The same bytes, with long documents cut where a word surely begins, which changes no word."""
        lengths = np.diff(self.ends, prepend=0)
        cuts = [cut for i in np.flatnonzero(lengths > 2 * CHUNK_BYTES)
                for cut in self._cuts(int(self.ends[i] - lengths[i]), int(self.ends[i]))]
        return Documents(self.data, np.sort(np.concatenate([self.ends, cuts]).astype(np.int64))) if cuts else self

    def _cuts(self, start: int, end: int) -> Iterator[int]:
        while start + CHUNK_BYTES < end:
            start += _bpe.safe_split(self.data[start:end], CHUNK_BYTES)
            if start < end:
                yield start

    def shares(self, most: int) -> list[Documents]:
        """At most so many parts of whole documents, of about equal length and not much below CHUNK_BYTES."""
        count = max(1, min(most, len(self.data) // CHUNK_BYTES))
        targets = len(self.data) * np.arange(1, count) // count
        borders = np.unique([0, *np.searchsorted(self.ends, targets), len(self.ends)])
        starts = np.concatenate([[0], self.ends])[borders]
        return [Documents(self.data[a:b], self.ends[i:j] - a)
                for i, j, a, b in zip(borders, borders[1:], starts, starts[1:], strict=False)]


def _groups(texts: Iterable[str]) -> Iterator[Documents]:
    """Some texts, as many at a time as make up GROUP_BYTES."""
    texts, group, size = iter(texts), [], 0
    while some := list(islice(texts, GROUP_TEXTS)):
        group += some
        size += sum(map(len, some))
        if size >= GROUP_BYTES:
            yield Documents.of(group)
            group, size = [], 0
    if group:
        yield Documents.of(group)


END_OF_TEXT = "<|endoftext|>"  # GPT-2's special token behind each document, and behind each answer


class BPETokenizer:
    """A byte-level BPE tokenizer. Make one with `train`, `load` or `from_json`.

    tokens: the bytes of each id. merges: pairs of ids in the order they were learned.
    special_tokens: text -> id; ordinary text cannot produce them, see `encode`.
    """

    def __init__(self, tokens: list[bytes], merges: np.ndarray,
                 special_tokens: Mapping[str, int] | None = None) -> None:
        self.tokens = tokens
        self.merges = np.ascontiguousarray(merges, np.int32).reshape(-1, 2)
        self.special_tokens = dict(special_tokens or {})
        self._check_ids()
        special_ids = set(self.special_tokens.values())
        ordinary = {token: i for i, token in enumerate(tokens) if i not in special_ids}
        missing = [byte for byte in range(256) if bytes([byte]) not in ordinary]
        if missing:
            raise TokenizerError(f"the vocabulary lacks the bytes {missing[:8]}; a byte-level tokenizer has all 256")
        base = np.array([ordinary[bytes([byte])] for byte in range(256)], np.int32)
        try:
            merged = [ordinary[tokens[a] + tokens[b]] for a, b in self.merges.tolist()]
        except KeyError as error:
            raise TokenizerError(f"a merge makes {error.args[0]!r}, which is not in the vocabulary") from None
        if len(set(merged)) != len(merged) or len(merged) != len(ordinary) - 256:
            raise TokenizerError(f"{len(merged)} merges make {len(set(merged))} tokens, but the vocabulary has "
                                 f"{len(ordinary) - 256} beside the bytes")
        self._merges = _bpe.Merges(base, self.merges, np.array(merged, np.int32))
        self._encoder = _bpe.Encoder(self._merges)
        self._arena = b"".join([*tokens, bytes(16)])
        self._starts = np.concatenate([[0], np.cumsum([len(token) for token in tokens])]).astype(np.int64)

    def _check_ids(self) -> None:
        """Nothing names an id that is not there, and no two ids stand for the same bytes."""
        if self.merges.size and not 0 <= self.merges.min() <= self.merges.max() < len(self.tokens):
            raise TokenizerError(f"merges must be of ids in 0 .. {len(self.tokens) - 1}, got {self.merges.min()} .. "
                                 f"{self.merges.max()}")
        for text, i in self.special_tokens.items():
            if not 0 <= i < len(self.tokens) or self.tokens[i] != _utf8(text):
                raise TokenizerError(f"the special token {text!r} is not the token of its id, {i}")
        if len(set(self.tokens)) != len(self.tokens):
            twice = next(token for token, count in Counter(self.tokens).items() if count > 1)
            raise TokenizerError(f"two ids stand for {twice!r:.60}; a special token must differ from all others")

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple:
        """A copy, also by pickle or in another process, is made from the same parts; its tables are its own."""
        return BPETokenizer, tuple(self.parts)

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size})"

    # ---- training -------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int, special_tokens: Iterable[str] = ()) -> BPETokenizer:
        """Learn merges from a whole text, or from an iterable of texts that are not held in memory.

        Exact: no sampling. The most frequent pair is merged first, of equally frequent ones the pair of the
        smaller ids. vocab_size counts the 256 bytes and the special tokens, which get the last ids.
        """
        special = [special_tokens] if isinstance(special_tokens, str) else list(dict.fromkeys(special_tokens))
        if not all(isinstance(token, str) and token for token in special):
            raise TypeError(f"special_tokens must be non-empty strings, got {special}")
        special_bytes = [_utf8(token) for token in special]
        if not isinstance(vocab_size, (int, np.integer)) or vocab_size < 256 + len(special):
            raise FesteError(f"vocab_size must be an integer of at least 256, one id for each byte"
                             f"{f', and {len(special)} for the special tokens' if special else ''}, got {vocab_size}",
                             "vocab_size")
        words = _count_words([text] if isinstance(text, (str, bytes)) else text)
        base = np.empty(256, np.int32)
        base[BASE_BYTES] = np.arange(256, dtype=np.int32)
        merges = _bpe.Trainer(words, base).train(vocab_size - 256 - len(special), 256)
        tokens = [bytes([byte]) for byte in BASE_BYTES]
        for a, b in merges.tolist():
            tokens.append(tokens[a] + tokens[b])
        ids = {token: len(tokens) + i for i, token in enumerate(special)}
        tokenizer = cls(tokens + special_bytes, merges, ids)
        if tokenizer.vocab_size < vocab_size:
            warnings.warn(f"the text yields only {tokenizer.vocab_size} tokens, not the {vocab_size} asked for: "
                          "no pair is left to merge", stacklevel=2)
        return tokenizer

    def with_special_tokens(self, *special_tokens: str) -> BPETokenizer:
        """This tokenizer with more special tokens, which get the next ids; ordinary text is cut as before."""
        new = [token for token in dict.fromkeys(special_tokens) if token not in self.special_tokens]
        ids = {token: self.vocab_size + i for i, token in enumerate(new)}
        return type(self)([*self.tokens, *map(_utf8, new)], self.merges, self.special_tokens | ids)

    @property
    def end_of_text(self) -> int | None:
        """The id of `<|endoftext|>`, or None for a tokenizer without it."""
        return self.special_tokens.get(END_OF_TEXT)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids at which a generated text ends: that of `<|endoftext|>`, if there is one."""
        return () if self.end_of_text is None else (self.end_of_text,)

    # ---- encoding -------------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text. Special tokens in it are plain characters unless allow_special is true."""
        return self.encode_to_numpy(text, allow_special).tolist()

    def encode_to_numpy(self, text: str, allow_special: bool = False) -> np.ndarray:
        """The ids of a text as a 1-D array, uint16 if the vocabulary fits, else uint32."""
        data = _utf8(text)
        if not allow_special or not self.special_tokens:
            return self._encode_bytes(data)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        return np.concatenate([np.array([self.special_tokens[piece]], self._dtype) if piece in self.special_tokens
                               else self._encode_bytes(_utf8(piece)) for piece in pieces])

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of strings, got one string; encode takes it")
        found: list[list[int]] = []
        for group in _groups(texts):
            for ids, ends in self._encode(group):
                found += _bpe.to_lists(ids, ends, self._numbers)
        return found

    @property
    def _dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _encode_bytes(self, data: bytes) -> np.ndarray:
        whole = Documents(memoryview(data), np.array([len(data)], np.int64))
        parts = [ids.astype(self._dtype, copy=False) for ids, _ in self._encode(whole.in_pieces())]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encode(self, documents: Documents) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids (m) int32 of documents in their order, and where those of each end, for each share of them."""
        shares = documents.shares(_available_cores())
        encoders = [self._encoder, *(_bpe.Encoder(self._merges) for _ in shares[1:])]

        def encode_share(encoder: _bpe.Encoder, share: Documents) -> tuple[np.ndarray, np.ndarray]:
            ids, ends = np.empty(len(share.data), np.int32), np.empty(len(share.ends), np.int64)
            return ids[:encoder.encode(share.data, share.ends, ids, ends)], ends

        return _in_threads(encode_share, encoders, shares)

    @cached_property
    def _numbers(self) -> list[int]:
        return list(range(self.vocab_size))

    # ---- decoding -------------------------------------------------------------------------------------------

    def decode_bytes(self, ids) -> bytes:
        """The bytes of some ids; ValueError for an id outside the vocabulary."""
        array = np.asarray(ids)
        if array.size == 0:
            return b""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"ids must be a sequence of integers, got {array.dtype} of shape {array.shape}")
        if array.dtype.itemsize > 4 and (array.max() > 0x7FFFFFFF or array.min() < 0):
            bad = array.max() if array.max() > 0x7FFFFFFF else array.min()
            raise ValueError(f"token ids must lie in 0 .. {self.vocab_size - 1}, got {bad}")
        return _bpe.decode(np.ascontiguousarray(array, np.int32), self._arena, self._starts)

    def decode(self, ids) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    # ---- files ----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The tokenizer in the format of Hugging Face's `tokenizers`."""
        return tokenizer_json.write(self.parts)

    @property
    def parts(self) -> Parts:
        return Parts(self.tokens, self.merges, self.special_tokens)

    @classmethod
    def from_json(cls, text: str, source: str = "the tokenizer") -> BPETokenizer:
        """The tokenizer of `to_json`. Anything else is a TokenizerError that names the source and the reason."""
        return cls._made(tokenizer_json.read(text, source), source)

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json for feste and Hugging Face; the file is either the old one or the new one, whole."""
        disk.write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike, merges: str | os.PathLike | None = None) -> BPETokenizer:
        """Read a tokenizer: tokenizer.json, GPT-2's vocab.json with its merges.txt, or a tiktoken rank file."""
        path = Path(path)
        text, source = read_file(path), str(path)
        if merges is not None:
            parts = gpt2_vocabulary.read(text, read_file(Path(merges)), f"{path} and {merges}")
        elif path.name == "vocab.json":
            raise TokenizerError(f"{path} holds no merges; name its merges.txt too: load(vocab_json, merges_txt)")
        else:
            read = tokenizer_json.read if text.lstrip()[:1] == "{" else tiktoken_ranks.read
            parts = read(text, source)
        return cls._made(parts, source)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> BPETokenizer:
        """The tokenizer of a directory: its tokenizer.json, or vocab.json with merges.txt."""
        directory = Path(directory)
        if (directory / "tokenizer.json").exists():
            return cls.load(directory / "tokenizer.json")
        if (directory / "vocab.json").exists():
            return cls.load(directory / "vocab.json", directory / "merges.txt")
        raise TokenizerError(f"{directory} has neither tokenizer.json nor vocab.json with merges.txt")

    @classmethod
    def _made(cls, parts: Parts, source: str) -> BPETokenizer:
        try:
            return cls(*parts)
        except TokenizerError as error:
            raise TokenizerError(f"{source}: {error}") from None

    def export_tiktoken(self, path: str | os.PathLike) -> None:
        """Write the ranks in tiktoken's format. Special tokens are not part of it."""
        disk.write_text(Path(path), tiktoken_ranks.write(self.parts))


class StreamDecoder:
    """Turns ids into text one at a time, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: BPETokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that is complete with this id; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


@cache
def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_threads(work: Callable, states: Sequence, shares: Sequence) -> list:
    """work(state, share) for each share, in threads if there is more than one; kernels run without the GIL."""
    if len(shares) == 1:
        return [work(states[0], shares[0])]
    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(work, states, shares))


def _count_words(texts: Iterable[str]) -> _bpe.WordTable:
    """Distinct words and their counts; each core counts into a table of its own, and the tables are added."""
    cores = _available_cores()
    tables = [_bpe.WordTable() for _ in range(cores)]
    for group in _groups(texts):
        _in_threads(lambda table, share: table.count(share.data, share.ends), tables, group.in_pieces().shares(cores))
    for table in tables[1:]:
        tables[0].merge(table)  # which gives the memory of the other back
    return tables[0]
