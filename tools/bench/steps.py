"""Whole optimizer steps of 8 sequences: forward, backward, clip, AdamW."""

from __future__ import annotations

import time

import numpy as np

from feste import GPT2, AdamW, ops
from feste.params import ParameterTable
from tools.bench.clock import measured_peak, peak_memory_bytes
from tools.bench.sizes import SEQUENCES, model_config, step_flops

LEARNING_RATE = 1e-3
PEAK_EVERY = 0.2  # seconds of steps between two samples of the machine's peak


def batch(config, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    both = np.random.default_rng(0).integers(0, config.vocab_size, (sequences, config.block_size + 1)).astype(np.int32)
    return np.ascontiguousarray(both[:, :-1]), np.ascontiguousarray(both[:, 1:])


def feste_stepper(model: GPT2, optimizer: AdamW, accumulation: int):
    """step(ids, targets) -> loss: forward, backward, clip and update, in `accumulation` mini-batches."""
    def step(ids, targets) -> float:
        size, total = len(ids) // accumulation, 0.0
        for i in range(0, len(ids), size):
            total += model.forward_backward(ids[i:i + size], targets[i:i + size], 1.0 / accumulation) / accumulation
        optimizer.step(LEARNING_RATE, 1.0, zero_grad=True)
        return total
    return step


def _torch_stepper(config, contender: str, precision: str, accumulation: int, threads: int):
    import torch

    from tools.bench.torch_gpt2 import trainer
    torch.set_num_threads(threads)
    flat = np.empty(ParameterTable(config).size, np.float32)
    ParameterTable(config).initialise(flat, 0)
    step = trainer(config, flat, contender == "compile", precision == "bf16", accumulation)
    return lambda ids, targets: step(torch.from_numpy(ids).long(), torch.from_numpy(targets).long())


def _stepper(contender: str, config, precision: str, accumulation: int, threads: int):
    if contender == "feste":
        ops.set_num_threads(threads)
        model = GPT2(config, seed=0, precision=precision)
        return feste_stepper(model, AdamW(model), accumulation)
    return _torch_stepper(config, contender, precision, accumulation, threads or ops.get_num_threads())


def measure(size: str, contender: str, precision: str, seconds: float, threads: int = 0, block_size: int | None = None,
            sequences: int = SEQUENCES, accumulation: int = 1) -> dict:
    """Steps a second of feste, of PyTorch (eager) or of PyTorch (compile). losses: of the first steps, to compare.

    The time of a step is the median of those that fit into `seconds`, so that a moment's disturbance of the
    machine does not count. The peak is sampled all along, between the steps: it changes with the phases of the machine.
    """
    config = model_config(size, block_size)
    step = _stepper(contender, config, precision, accumulation, threads)
    ids_and_targets = batch(config, sequences)
    losses = [step(*ids_and_targets) for _ in range(3)]
    times, peaks, unsampled = [], [], 0.0
    while sum(times) < seconds or len(times) < 2:
        start = time.perf_counter()
        step(*ids_and_targets)
        times.append(time.perf_counter() - start)
        unsampled += times[-1]
        if contender == "feste" and (unsampled > PEAK_EVERY or not peaks):
            peaks.append(measured_peak(precision == "bf16", 0.05 * unsampled))
            unsampled = 0.0
    result = {"steps_per_second": 1.0 / float(np.median(times)), "losses": losses, "peak_bytes": peak_memory_bytes()}
    if contender == "feste":
        peak = float(np.median(peaks))
        rate = step_flops(config, sequences) * result["steps_per_second"]
        result |= {"share_of_peak": rate / peak, "gflops": rate / 1e9, "peak_gflops": peak / 1e9}
    return result


def measure_memory(size: str, contender: str, precision: str, block_size: int | None = None,
                   sequences: int = SEQUENCES, accumulation: int = 1) -> dict:
    """Peak resident memory of two training steps."""
    config = model_config(size, block_size)
    step = _stepper(contender, config, precision, accumulation, 0)
    for _ in range(2):
        step(*batch(config, sequences))
    return {"peak_bytes": peak_memory_bytes()}
