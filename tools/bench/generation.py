"""Tokens a second of feste on its cache of keys and values, and what reading the weights allows."""

from __future__ import annotations

import numpy as np

from feste import GPT2, ops
from feste.generation import PACKINGS, Sampler

from .clock import median_seconds
from .sizes import model_config

TOKENS = {"tiny": 60, "small": 120, "medium": 240, "gpt2": 60}


def measure(program: str, size: str, precision: str, seconds: float, samples: int = 1) -> dict:
    """Tokens a second of a prompt of one token, weights packed beforehand; median of the prompts.

    limit: what there would be if nothing were done but reading the matrices from memory, for each round of `samples`.
    """
    model = GPT2(model_config(size), precision=precision)
    decoder = model.decoder(samples)

    def generate():
        return list(decoder.stream([1], TOKENS[size], Sampler(seed=1)))
    generate()
    return {"tokens_per_second": TOKENS[size] * samples / median_seconds(generate, seconds, least=3),
            "limit": samples / _seconds_to_read(_matrix_bytes(model), seconds)}


def _matrix_bytes(model: GPT2) -> int:
    """Bytes of the matrices that each token reads."""
    packing, total = PACKINGS.get(model.precision), 0
    matrices = [w for name, w in model.params.items() if w.ndim == 2 and ".h." in name]
    for K, N in [w.shape for w in matrices] + [model.head.shape[::-1]]:
        total += packing.size(K, N) * np.dtype(packing.dtype).itemsize if packing else 4 * K * N
    return total


def _seconds_to_read(size: int, seconds: float) -> float:
    """How long all threads take to read so many bytes, in order."""
    x = np.ones(size // 4, np.float32)
    return median_seconds(lambda: ops.sum_of_squares(x, x.size), seconds / 4)
