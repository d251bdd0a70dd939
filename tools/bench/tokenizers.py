"""Tokenizer training, encoding and decoding of feste."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from feste import BPETokenizer
from feste.corpus import shakespeare_text

from .clock import median_of, peak_memory_bytes
from .documents import VOCAB_SIZES, cut, digest

ENDINGS = [a + b for a in "aeioubcdst" for b in "aeiournslt"][:97]


def measure(program: str, text: str, **_) -> dict:
    """Seconds to train each size, MB/s of encoding and decoding at the largest, and a digest of the ids."""
    text = Path(text).read_text(encoding="utf-8")
    result, megabytes = {}, len(text.encode()) / 1e6
    for size in VOCAB_SIZES:
        tokenizer, result[f"train {size} s"] = median_of(lambda size=size: BPETokenizer.train(text, size))
    ids, seconds = median_of(lambda: tokenizer.encode_to_numpy(text))
    result |= {"encode MB/s": megabytes / seconds, "digest": digest(ids)}
    _, seconds = median_of(lambda: tokenizer.encode(text))
    result["encode to list MB/s"] = megabytes / seconds
    back, seconds = median_of(lambda: tokenizer.decode(ids))
    assert back == text
    return result | {"decode MB/s": megabytes / seconds}


def measure_documents(program: str, text: str, lengths: list[int], vocab_size: int, **_) -> dict:
    """Microseconds a document to train on an iterable of documents, and to encode a batch of them, by their length."""
    result = {}
    for length, documents in cut(Path(text).read_text(encoding="utf-8"), lengths).items():
        tokenizer, seconds = median_of(lambda documents=documents: BPETokenizer.train(iter(documents), vocab_size))
        result[f"train {length}"] = 1e6 * seconds / len(documents)
        ids, seconds = median_of(lambda documents=documents, tokenizer=tokenizer: tokenizer.encode_batch(documents))
        result[f"encode_batch {length}"] = 1e6 * seconds / len(documents)
        result[f"digest {length}"] = digest(sum(len(document) for document in ids))
    return result


# ---- growth and memory -------------------------------------------------------------------------------------


def hard_texts(n_bytes: int) -> dict[str, str]:
    """Prose, and the texts that make careless encoders slow, each of about n_bytes bytes."""
    rng = np.random.default_rng(0)
    prose = shakespeare_text()
    letters = "".join(map(chr, rng.integers(ord("a"), ord("z") + 1, n_bytes)))
    points = rng.integers(0x20, 0x30000, n_bytes // 4)
    anything = "".join(chr(p) for p in points if not 0xD800 <= p <= 0xDFFF)
    return {"prose": (prose * (n_bytes // len(prose) + 1))[:n_bytes], "one character": "a" * n_bytes,
            "no space": letters, "random Unicode": anything,
            "prose, letters only": (re.sub("[^A-Za-z]", "", prose) * 2)[:n_bytes]}


def measure_growth(program: str, sizes: tuple[int, ...] = (125_000, 250_000, 500_000, 1_000_000, 2_000_000)) -> dict:
    """Nanoseconds a byte of encoding each hard text at each length; constant means linear time. Each time with a new
    tokenizer: one that has met the text before knows its words, which flatters prose."""
    trained = BPETokenizer.train(shakespeare_text(), VOCAB_SIZES[-1])
    result = {}
    for size in sizes:
        for name, text in hard_texts(size).items():
            fresh = iter([BPETokenizer(trained.tokens, trained.merges) for _ in range(5)])
            _, seconds = median_of(lambda text=text, fresh=fresh: next(fresh).encode_to_numpy(text), 5)
            result[f"{name} {size}"] = 1e9 * seconds / len(text.encode())
    return result


def varied_text(megabytes: int) -> Iterator[str]:
    """The corpus again and again; in each copy every word of four letters and more gets one of 97 endings, which
    depends on the word and the copy, so that distinct words grow with the text as they do in a large corpus."""
    text, made, copy = shakespeare_text(), 0, 0
    while made < megabytes * 1_000_000:
        copy += 1

        def vary(match, copy=copy):
            word = match.group()
            return f"{word}{ENDINGS[(zlib.crc32(word.encode()) ^ copy) % 97]}"
        piece = text if copy == 1 else re.sub(r"[A-Za-z]{4,}", vary, text)
        made += len(piece)
        yield piece


def measure_stream(program: str, megabytes: int = 500, vocab_size: int = 32_768) -> dict:
    """Training on a stream: time, and the peak of memory above what the first piece of text needs."""
    texts = varied_text(megabytes)
    first = next(texts)
    before = peak_memory_bytes()

    def all_of_it():
        yield first
        yield from texts
    tokenizer, seconds = median_of(lambda: BPETokenizer.train(all_of_it(), vocab_size), times=1)
    return {"seconds": seconds, "megabytes": megabytes, "peak_bytes_beyond_text": peak_memory_bytes() - before,
            "vocab_size": tokenizer.vocab_size}
