"""Tokenizer training, encoding and decoding of Hugging Face, tiktoken and rustbpe."""

from __future__ import annotations

import os
from pathlib import Path

from ..clock import median_of
from ..documents import VOCAB_SIZES, cut, digest

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def measure(program: str, text: str, ranks: str) -> dict:
    """Seconds to train each size, MB/s of encoding and decoding at the largest, and a digest of the ids.

    text: a file of UTF-8. ranks: tokens of the largest size in tiktoken's format, which cannot train.
    """
    whole = Path(text).read_text(encoding="utf-8")
    programs = {"huggingface": _huggingface, "tiktoken": _tiktoken, "rustbpe": _rustbpe}
    return programs[program](whole, len(whole.encode()) / 1e6, ranks)


def measure_documents(program: str, text: str, lengths: list[int], vocab_size: int, threads: int) -> dict:
    """Microseconds a document to train on an iterable of documents, and to encode a batch of them, by their length."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(threads)}
    result = {}
    for length, documents in cut(Path(text).read_text(encoding="utf-8"), lengths).items():
        tokenizer, seconds = median_of(lambda documents=documents: _train(iter(documents), vocab_size))
        result[f"train {length}"] = 1e6 * seconds / len(documents)
        ids, seconds = median_of(lambda documents=documents, tokenizer=tokenizer: [
            encoding.ids for encoding in tokenizer.encode_batch_fast(documents)])
        result[f"encode_batch {length}"] = 1e6 * seconds / len(documents)
        result[f"digest {length}"] = digest(sum(len(document) for document in ids))
    return result


def _train(texts, vocab_size: int):
    """A byte-level tokenizer of Hugging Face with GPT-2's pattern."""
    import tokenizers as hf
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, hf.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet,
                                                                show_progress=False))
    return tokenizer


def _huggingface(text: str, megabytes: float, ranks: str) -> dict:
    result = {}
    for size in VOCAB_SIZES:
        tokenizer, result[f"train {size} s"] = median_of(lambda size=size: _train([text], size), times=1)
    encoding, seconds = median_of(lambda: tokenizer.encode(text), times=1)
    result |= {"encode MB/s": megabytes / seconds, "digest": digest(encoding.ids)}
    _, seconds = median_of(lambda: tokenizer.decode(encoding.ids), times=1)
    return result | {"decode MB/s": megabytes / seconds}


def _tiktoken(text: str, megabytes: float, ranks: str) -> dict:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    encoding = tiktoken.Encoding("peer", pat_str=GPT2_PATTERN, mergeable_ranks=load_tiktoken_bpe(ranks),
                                 special_tokens={})
    ids, seconds = median_of(lambda: encoding.encode_ordinary(text))
    _, back = median_of(lambda: encoding.decode(ids))
    return {"encode MB/s": megabytes / seconds, "decode MB/s": megabytes / back, "digest": digest(ids)}


def _rustbpe(text: str, megabytes: float, ranks: str) -> dict:
    import rustbpe
    result = {}
    for size in VOCAB_SIZES:
        def train(size=size):
            tokenizer = rustbpe.Tokenizer()
            tokenizer.train_from_iterator(iter([text]), size, pattern=GPT2_PATTERN)
            return tokenizer
        tokenizer, result[f"train {size} s"] = median_of(train)
    _, seconds = median_of(lambda: tokenizer.encode(text))
    return result | {"encode MB/s": megabytes / seconds}
