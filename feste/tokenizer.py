"""BPETokenizer: byte-level byte-pair encoding with GPT-2's pre-tokenization.

Sennrich, Haddow and Birch 2016, arXiv:1508.07909; Radford et al. 2019 for the bytes and the word pattern. The
file format is that of Hugging Face's `tokenizers`, and ids are the same as theirs. Lossless on every string.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from feste import _bpe, _unicode, tokenizer_files
from feste.tokenizer_files import BYTE_CHARACTERS, TokenizerError, visible

CHUNK_BYTES = 1 << 20         # text a thread takes at a time
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


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


def _chunks(data: bytes) -> Iterator[memoryview]:
    """Pieces of about CHUNK_BYTES that can be split into words on their own."""
    view, start = memoryview(data), 0
    while start < len(data):
        end = _bpe.safe_split(view, start + CHUNK_BYTES) if start + CHUNK_BYTES < len(data) else len(data)
        yield view[start:end]
        start = end


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
            raise ValueError(f"vocab_size must be an integer of at least 256, one id for each byte"
                             f"{f', and {len(special)} for the special tokens' if special else ''}, got {vocab_size}")
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
        return [self.encode(text) for text in texts]

    @property
    def _dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _encode_bytes(self, data: bytes) -> np.ndarray:
        if len(data) <= 2 * CHUNK_BYTES:
            return self._encode_chunk(self._encoder, data)
        workers = _available_cores()
        encoders = [_bpe.Encoder(self._merges) for _ in range(workers)]

        def encode_share(worker: int) -> list[np.ndarray]:
            return [self._encode_chunk(encoders[worker], chunk) for chunk in shares[worker]]

        chunks = list(_chunks(data))
        shares = [chunks[i * len(chunks) // workers:(i + 1) * len(chunks) // workers] for i in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            return np.concatenate([ids for share in pool.map(encode_share, range(workers)) for ids in share])

    def _encode_chunk(self, encoder: _bpe.Encoder, data: bytes | memoryview) -> np.ndarray:
        out = np.empty(len(data), np.int32)
        return out[:encoder.encode(data, out)].astype(self._dtype)

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
        names = [visible(token) for token in self.tokens]
        special = {i: text for text, i in self.special_tokens.items()}
        added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": True} for i, text in sorted(special.items())]
        return json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": PRE_TOKENIZER, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(names) if i not in special},
                "merges": [[names[a], names[b]] for a, b in self.merges.tolist()],
            },
        }, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str = "the tokenizer") -> BPETokenizer:
        """The tokenizer of `to_json`. Anything else is a TokenizerError that names the source and the reason."""
        return cls._made(tokenizer_files.from_huggingface(text, source), source)

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json for feste and Hugging Face; the file is either the old one or the new one, whole."""
        path = Path(path)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.",
                                         delete=False) as file:
            try:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike, merges: str | os.PathLike | None = None) -> BPETokenizer:
        """Read a tokenizer: tokenizer.json, GPT-2's vocab.json with its merges.txt, or a tiktoken rank file."""
        parts = tokenizer_files.load(Path(path), None if merges is None else Path(merges))
        return cls._made(parts, str(path))

    @classmethod
    def _made(cls, parts: tokenizer_files.Parts, source: str) -> BPETokenizer:
        try:
            return cls(*parts)
        except TokenizerError as error:
            raise TokenizerError(f"{source}: {error}") from None

    def export_tiktoken(self, path: str | os.PathLike) -> None:
        """Write the ranks in tiktoken's format. Special tokens are not part of it."""
        tokenizer_files.write_tiktoken(Path(path), self.tokens, set(self.special_tokens.values()))


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


def _count_words(texts: Iterable[str]) -> _bpe.WordTable:
    """Distinct words and their counts; each core counts into a table of its own, and the tables are added."""
    cores = _available_cores()
    tables = [_bpe.WordTable() for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        for text in texts:
            chunks = list(_chunks(_utf8(text)))
            shares = [chunks[i::cores] for i in range(cores)]
            list(pool.map(lambda table, share: [table.count(chunk) for chunk in share], tables, shares))
    for table in tables[1:]:
        tables[0].merge(table)  # which gives the memory of the other back
    return tables[0]
