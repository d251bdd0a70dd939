"""What the disciplines measure with: time, the machine's peak, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

from feste import ops


def seconds_per_call(call: Callable[[], object], at_least: float, minimum: int = 1) -> float:
    """Mean time of a call, over enough calls to fill at_least seconds, after one that is not counted."""
    call()
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < at_least or count < minimum:
        call()
        count += 1
    return elapsed / count


def measured_peak(bf16: bool, at_least: float = 0.3) -> float:
    """Operations a second of the register tile on data in L1, all threads."""
    done, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < at_least:
        done += ops.peak_flops(20_000, bf16)
    return done / (time.perf_counter() - begun)


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
