"""Tokenizer training, encoding and decoding on the whole corpus, beside Hugging Face, tiktoken and rustbpe."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from feste import BPETokenizer
from feste.corpus import shakespeare_text
from tools.bench.clock import peak_memory_bytes

VOCAB_SIZES = (512, 1536, 20534)
ENDINGS = [a + b for a in "aeioubcdst" for b in "aeiournslt"][:97]
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _timed(call):
    begun = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begun


def _median_of(call, times: int = 3):
    """What a call gives, and the median of its times in seconds."""
    timings = [_timed(call) for _ in range(times)]
    return timings[0][0], float(np.median([seconds for _, seconds in timings]))


def measure(contender: str, times: int = 3) -> dict:
    """Seconds to train each size, MB/s of encoding and decoding at the largest, and a digest of the ids."""
    text = shakespeare_text()
    return {"feste": _feste, "huggingface": _huggingface, "tiktoken": _tiktoken, "rustbpe": _rustbpe}[contender](
        text, len(text.encode()) / 1e6, times)


def _digest(ids) -> int:
    return int(np.asarray(ids, np.uint64).cumsum().sum() % (1 << 31))


def _feste(text: str, megabytes: float, times: int) -> dict:
    result = {}
    for size in VOCAB_SIZES:
        tokenizer, result[f"train {size} s"] = _median_of(lambda size=size: BPETokenizer.train(text, size), times)
    ids, seconds = _median_of(lambda: tokenizer.encode_to_numpy(text), times)
    result |= {"encode MB/s": megabytes / seconds, "digest": _digest(ids)}
    _, seconds = _median_of(lambda: tokenizer.encode(text), times)
    result["encode to list MB/s"] = megabytes / seconds
    back, seconds = _median_of(lambda: tokenizer.decode(ids), times)
    assert back == text
    result["decode MB/s"] = megabytes / seconds
    return result


def _huggingface(text: str, megabytes: float, times: int) -> dict:
    import tokenizers as hf
    result = {}
    for size in VOCAB_SIZES:
        def train(size=size):
            tokenizer = hf.Tokenizer(hf.models.BPE())
            tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = hf.decoders.ByteLevel()
            alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
            trainer = hf.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train_from_iterator([text], trainer)
            return tokenizer
        tokenizer, result[f"train {size} s"] = _timed(train)
    encoding, seconds = _timed(lambda: tokenizer.encode(text))
    result |= {"encode MB/s": megabytes / seconds, "digest": _digest(encoding.ids)}
    _, seconds = _timed(lambda: tokenizer.decode(encoding.ids))
    return result | {"decode MB/s": megabytes / seconds}


def _tiktoken(text: str, megabytes: float, times: int) -> dict:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    with TemporaryDirectory() as folder:
        path = Path(folder, "ranks.tiktoken")
        BPETokenizer.train(text, VOCAB_SIZES[-1]).export_tiktoken(path)
        ranks = load_tiktoken_bpe(str(path))
    encoding = tiktoken.Encoding("feste", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ids, seconds = _median_of(lambda: encoding.encode_ordinary(text), times)
    _, back = _median_of(lambda: encoding.decode(ids), times)
    return {"encode MB/s": megabytes / seconds, "decode MB/s": megabytes / back, "digest": _digest(ids)}


def _rustbpe(text: str, megabytes: float, times: int) -> dict:
    import rustbpe
    result = {}
    for size in VOCAB_SIZES:
        def train(size=size):
            tokenizer = rustbpe.Tokenizer()
            tokenizer.train_from_iterator(iter([text]), size, pattern=GPT2_PATTERN)
            return tokenizer
        tokenizer, result[f"train {size} s"] = _median_of(train, times)
    _, seconds = _median_of(lambda: tokenizer.encode(text), times)
    return result | {"encode MB/s": megabytes / seconds}


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


def measure_growth(sizes: tuple[int, ...] = (125_000, 250_000, 500_000, 1_000_000, 2_000_000)) -> dict:
    """Nanoseconds a byte of encoding each hard text at each length; constant means linear time. Each time with a new
    tokenizer: one that has met the text before knows its words, which flatters prose."""
    trained = BPETokenizer.train(shakespeare_text(), VOCAB_SIZES[-1])
    result = {}
    for size in sizes:
        for name, text in hard_texts(size).items():
            fresh = iter([BPETokenizer(trained.tokens, trained.merges) for _ in range(5)])
            _, seconds = _median_of(lambda text=text, fresh=fresh: next(fresh).encode_to_numpy(text), 5)
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


def measure_stream(megabytes: int = 500, vocab_size: int = 32_768) -> dict:
    """Training on a stream: time, and the peak of memory above what the first piece of text needs."""
    texts = varied_text(megabytes)
    first = next(texts)
    before = peak_memory_bytes()

    def all_of_it():
        yield first
        yield from texts
    tokenizer, seconds = _timed(lambda: BPETokenizer.train(all_of_it(), vocab_size))
    return {"seconds": seconds, "megabytes": megabytes, "peak_bytes_beyond_text": peak_memory_bytes() - before,
            "vocab_size": tokenizer.vocab_size}
