"""What feste and its peers are measured with: time and memory. Nothing of feste, for the peers use it too."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import numpy as np


def seconds_per_call(call: Callable[[], object], at_least: float, minimum: int = 1) -> float:
    """Mean time of a call, over enough calls to fill at_least seconds, after one that is not counted."""
    call()
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < at_least or count < minimum:
        call()
        count += 1
    return elapsed / count


def median_seconds(call: Callable[[], object], seconds: float, least: int = 2,
                   between: Callable[[float], None] | None = None) -> float:
    """Median time of as many calls as fit into `seconds`: a moment's disturbance of the machine does not count.

    between: called after each with the seconds it took.
    """
    times: list[float] = []
    while sum(times) < seconds or len(times) < least:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
        if between is not None:
            between(times[-1])
    return float(np.median(times))


def median_of(call: Callable[[], object], times: int = 3) -> tuple[object, float]:
    """What a call gives, and the median of its times in seconds."""
    results, seconds = [], []
    for _ in range(times):
        begun = time.perf_counter()
        results.append(call())
        seconds.append(time.perf_counter() - begun)
    return results[0], float(np.median(seconds))


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
