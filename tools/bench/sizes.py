"""The four models of the examples, what a step of them costs, and the shapes of their matrix products."""

from __future__ import annotations

from feste.config import PRESETS, Config

SIZES = ("tiny", "small", "medium", "gpt2")
SEQUENCES = 8


def model_config(size: str, block_size: int | None = None) -> Config:
    config = PRESETS[size].model
    return config if block_size is None else Config(**(config.to_dict() | {"block_size": block_size}))


def step_flops(config: Config, sequences: int = SEQUENCES) -> float:
    """Useful operations of one optimizer step: two for each weight of a matrix and token forward, twice that
    backward; of attention the causal half, (T + 1) / 2 keys a query."""
    C, L, T, V = config.n_embd, config.n_layers, config.block_size, config.vocab_size
    per_token = 2 * (12 * L * C * C + V * C) + 4 * L * C * (T + 1) / 2
    return 3.0 * per_token * sequences * T


def gemm_shapes(size: str) -> list[tuple[str, int, int, int]]:
    """(name, M, N, K) of the forward matrix products of a step; backward has the same three numbers."""
    c = model_config(size)
    rows, C, V = SEQUENCES * c.block_size, c.n_embd, c.vocab_size
    return [("c_attn", rows, 3 * C, C), ("attn.c_proj", rows, C, C), ("c_fc", rows, 4 * C, C),
            ("mlp.c_proj", rows, C, 4 * C), ("lm_head", min(rows, 512), V, C)]
