"""The machine's peak, as feste's kernels reach it on data in L1."""

from __future__ import annotations

import time

from feste import ops


def measured_peak(bf16: bool, at_least: float = 0.3) -> float:
    """Operations a second of the register tile on data in L1, all threads."""
    done, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < at_least:
        done += ops.peak_flops(20_000, bf16)
    return done / (time.perf_counter() - begun)
