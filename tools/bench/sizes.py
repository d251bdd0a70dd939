"""The four models of the examples, what a step of them costs, and the shapes of their matrix products."""

from __future__ import annotations

from feste.config import PRESETS, Config
from feste.speed import training_flops

SIZES = ("tiny", "small", "medium", "gpt2")
SEQUENCES = 8


def model_config(size: str, block_size: int | None = None) -> Config:
    config = PRESETS[size].model
    return config if block_size is None else Config(**(config.to_dict() | {"block_size": block_size}))


def step_flops(config: Config, sequences: int = SEQUENCES) -> float:
    """Useful operations of one optimizer step."""
    return training_flops(config) * sequences * config.block_size


def gemm_shapes(size: str) -> list[tuple[str, int, int, int]]:
    """(name, M, N, K) of the forward matrix products of a step; backward has the same three numbers."""
    c = model_config(size)
    rows, C, V = SEQUENCES * c.block_size, c.n_embd, c.vocab_size
    return [("c_attn", rows, 3 * C, C), ("attn.c_proj", rows, C, C), ("c_fc", rows, 4 * C, C),
            ("mlp.c_proj", rows, C, 4 * C), ("lm_head", min(rows, 512), V, C)]
