"""Tokens a second of feste on its cache of keys and values."""

from __future__ import annotations

from feste import GPT2

from .clock import median_seconds
from .sizes import model_config

TOKENS = {"tiny": 60, "small": 120, "medium": 240, "gpt2": 60}


def measure(program: str, size: str, precision: str, seconds: float, samples: int = 1) -> dict:
    """Tokens a second over whole calls of generate, prompt and preparation included; median of the calls."""
    model = GPT2(model_config(size), precision=precision)

    def generate():
        return model.generate_batch([1], samples, TOKENS[size], seed=1)
    generate()
    return {"tokens_per_second": TOKENS[size] * samples / median_seconds(generate, seconds, least=3)}
