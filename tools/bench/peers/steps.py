"""Whole optimizer steps of PyTorch, eager or compiled, from the parameters and the batch of a file."""

from __future__ import annotations

from ..clock import median_seconds, peak_memory_bytes


def _step_of(program: str, inputs: str, n_heads: int, precision: str, accumulation: int, threads: int):
    import numpy as np
    import torch

    from .torch_gpt2 import trainer
    torch.set_num_threads(threads)
    arrays = dict(np.load(inputs))
    ids, targets = (torch.from_numpy(arrays.pop(name)).long() for name in ("ids", "targets"))
    step = trainer(arrays, n_heads, program == "compile", precision == "bf16", accumulation)
    return lambda: step(ids, targets)


def measure(program: str, inputs: str, n_heads: int, precision: str, seconds: float, threads: int,
            accumulation: int = 1, **_) -> dict:
    """Steps a second of PyTorch (eager) or PyTorch (compile), and the losses of the first steps, to compare."""
    step = _step_of(program, inputs, n_heads, precision, accumulation, threads)
    losses = [step() for _ in range(3)]
    return {"steps_per_second": 1.0 / median_seconds(step, seconds), "losses": losses,
            "peak_bytes": peak_memory_bytes()}


def measure_memory(program: str, inputs: str, n_heads: int, precision: str, threads: int, **_) -> dict:
    """Peak resident memory of two training steps."""
    step = _step_of(program, inputs, n_heads, precision, 1, threads)
    for _ in range(2):
        step()
    return {"peak_bytes": peak_memory_bytes()}
