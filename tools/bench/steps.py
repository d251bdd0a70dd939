"""Whole optimizer steps of feste: forward, backward, clip, AdamW."""

from __future__ import annotations

import numpy as np

from feste import GPT2, AdamW, ops
from feste.speed import measured_peak

from .clock import median_seconds, peak_memory_bytes
from .inputs import batch
from .sizes import SEQUENCES, model_config, step_flops

LEARNING_RATE = 1e-3
PEAK_EVERY = 0.2  # seconds of steps between two samples of the machine's peak


def stepper(model: GPT2, optimizer: AdamW, accumulation: int):
    """step(ids, targets) -> loss: forward, backward, clip and update, in `accumulation` mini-batches."""
    def step(ids, targets) -> float:
        size, total = len(ids) // accumulation, 0.0
        for i in range(0, len(ids), size):
            total += model.forward_backward(ids[i:i + size], targets[i:i + size], 1.0 / accumulation) / accumulation
        optimizer.step(LEARNING_RATE, 1.0, zero_grad=True)
        return total
    return step


def _step_of(config, precision: str, sequences: int, accumulation: int):
    model, ids_and_targets = GPT2(config, seed=0, precision=precision), batch(config, sequences)
    step = stepper(model, AdamW(model), accumulation)
    return lambda: step(*ids_and_targets)


def measure(program: str, size: str, precision: str, seconds: float, threads: int = 0, block_size: int | None = None,
            sequences: int = SEQUENCES, accumulation: int = 1) -> dict:
    """Steps a second, and the losses of the first steps, to compare.

    The peak is sampled all along, between the steps: it changes with the phases of the machine.
    """
    ops.set_num_threads(threads)
    config = model_config(size, block_size)
    step = _step_of(config, precision, sequences, accumulation)
    losses, peaks, unsampled = [step() for _ in range(3)], [], 0.0

    def sample_peak(took: float) -> None:
        nonlocal unsampled
        unsampled += took
        if unsampled > PEAK_EVERY or not peaks:
            peaks.append(measured_peak(precision == "bf16", 0.05 * unsampled))
            unsampled = 0.0

    rate = 1.0 / median_seconds(step, seconds, between=sample_peak)
    peak, flops = float(np.median(peaks)), step_flops(config, sequences) * rate
    return {"steps_per_second": rate, "losses": losses, "peak_bytes": peak_memory_bytes(),
            "share_of_peak": flops / peak, "gflops": flops / 1e9, "peak_gflops": peak / 1e9}


def measure_memory(program: str, size: str, precision: str, accumulation: int = 1) -> dict:
    """Peak resident memory of two training steps."""
    step = _step_of(model_config(size), precision, SEQUENCES, accumulation)
    for _ in range(2):
        step()
    return {"peak_bytes": peak_memory_bytes()}
