"""How fast a run is beside what this machine can do: the operations of a token, and the peak of the kernels."""

from __future__ import annotations

import time

from feste import ops
from feste.config import Config


def training_flops(config: Config, seq_len: int | None = None) -> float:
    """Useful operations of training on one token: two for each weight of a matrix forward, twice that backward; of
    attention the causal half, (T + 1) / 2 keys a query. T: seq_len, or else the whole context."""
    C, L, T, V = config.n_embd, config.n_layers, seq_len or config.block_size, config.vocab_size
    return 3.0 * (2 * (12 * L * C * C + V * C) + 4 * L * C * (T + 1) / 2)


def measured_peak(bf16: bool, at_least: float = 0.3) -> float:
    """Operations a second of the register tile on data in L1, all threads; measured for so many seconds."""
    done, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < at_least:
        done += ops.peak_flops(20_000, bf16)
    return done / (time.perf_counter() - begun)
