"""Tokens a second of one sample on a KV cache, beside transformers' generate."""

from __future__ import annotations

import time

import numpy as np

from feste import GPT2, ops
from tools.bench.sizes import model_config

TOKENS = {"tiny": 60, "small": 120, "medium": 240, "gpt2": 60}


def measure(size: str, contender: str, precision: str, seconds: float, samples: int = 1) -> dict:
    """Tokens a second over whole calls of generate, prompt and preparation included; median of the calls."""
    generate = _feste(size, precision, samples) if contender == "feste" else _transformers(size, precision)
    generate()
    times, begun = [], time.perf_counter()
    while time.perf_counter() - begun < seconds or len(times) < 3:
        start = time.perf_counter()
        generate()
        times.append(time.perf_counter() - start)
    return {"tokens_per_second": TOKENS[size] * samples / float(np.median(times))}


def _feste(size: str, precision: str, samples: int):
    model = GPT2(model_config(size), precision=precision)
    if samples > 1:
        return lambda: model.generate_batch([1], samples, TOKENS[size], seed=1)
    return lambda: model.generate([1], TOKENS[size], seed=1)


def _transformers(size: str, precision: str):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.set_num_threads(ops.get_num_threads())
    c = model_config(size)
    config = GPT2Config(vocab_size=c.vocab_size, n_embd=c.n_embd, n_layer=c.n_layers, n_head=c.n_heads,
                        n_positions=c.block_size, tie_word_embeddings=False, bos_token_id=0, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    prompt = torch.ones((1, 1), dtype=torch.long)

    def generate():
        with torch.no_grad():
            model.generate(prompt, max_new_tokens=TOKENS[size], min_new_tokens=TOKENS[size], do_sample=True, top_k=0,
                           attention_mask=torch.ones_like(prompt), pad_token_id=0)
    return generate
