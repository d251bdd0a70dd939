"""One measurement in its own process: python -m tools.bench.worker TASK JSON. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable


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
    from feste import ops
    done, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < at_least:
        done += ops.peak_flops(20_000, bf16)
    return done / (time.perf_counter() - begun)


def peak_memory_bytes() -> int:
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    from tools.bench import generation, kernels, steps, tokenizers
    tasks = {"steps": steps.measure, "kernels": kernels.measure, "generation": generation.measure,
             "tokenizer": tokenizers.measure, "tokenizer_growth": tokenizers.measure_growth,
             "tokenizer_stream": tokenizers.measure_stream, "memory": steps.measure_memory}
    print(json.dumps(tasks[sys.argv[1]](**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
