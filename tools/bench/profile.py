"""Where the time of a step goes: every call timed, by kernel and by matrix shape, in the team that runs the step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

import feste.model
import feste.optim
import feste.transformer
from feste import GPT2, AdamW, ops
from feste.speed import measured_peak

from .inputs import batch
from .sizes import SEQUENCES, model_config, step_flops
from .steps import stepper


class TimedRecording:
    """Stands in for ops.Recording: its runs are timed call by call, in the team that works through them."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch, self.labels, self.recording = watch, [], ops.Recording()

    def __enter__(self) -> TimedRecording:
        self.watch.recorded = self.labels
        self.recording.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.watch.recorded = None
        self.recording.__exit__(*error)

    def __len__(self) -> int:
        return len(self.recording)

    def run(self, first: int = 0, end: int | None = None) -> None:
        seconds = np.zeros(len(self))
        self.recording.run(first, end, seconds)
        for label, took in list(zip(self.labels, seconds, strict=True))[first:end]:
            self.watch.add(label, took)


class Stopwatch:
    """Stands in for feste.ops and adds up the seconds of each kernel."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.flops: dict[str, float] = defaultdict(float)
        self.recorded: list | None = None  # the labels of the calls that are being noted down
        names = {name: getattr(ops, name) for name in dir(ops) if not name.startswith("_")}
        self.ops = SimpleNamespace(**{name: self._timed(name, value) if callable(value) else value
                                      for name, value in names.items()})
        self.ops.Recording = lambda: TimedRecording(self)

    def _timed(self, name: str, kernel):
        def call(*args, **kwargs):
            begun = time.perf_counter()
            result = kernel(*args, **kwargs)
            if name in ("zeros", "get_num_threads"):
                return result
            if self.recorded is None:
                self.add(_label(name, args), time.perf_counter() - begun)
            else:
                self.recorded.append(_label(name, args))
            return result
        return call

    def add(self, label: tuple[str, float], seconds: float) -> None:
        """A call of a kernel took so long."""
        key, flops = label
        self.seconds[key] += seconds
        self.calls[key] += 1
        self.flops[key] += flops

    def reset(self) -> None:
        for table in (self.seconds, self.calls, self.flops):
            table.clear()


@contextmanager
def _in_place_of_ops(kernels) -> Iterator[None]:
    """The model and the optimizer call these kernels."""
    modules = (feste.model, feste.transformer, feste.optim)
    try:
        for module in modules:
            module.ops = kernels
        yield
    finally:
        for module in modules:
            module.ops = ops


def _label(name: str, args: tuple) -> tuple[str, float]:
    """A kernel's name with its matrix shape, and the operations of a matrix product."""
    if name.startswith("linear") or name == "gemm":
        sizes = [a for a in args if isinstance(a, int) and not isinstance(a, bool)][:3]
        return f"{name} {'x'.join(map(str, sizes))}", 2.0 * sizes[0] * sizes[1] * sizes[2]
    if name.startswith("attention"):
        B, T, H, D = [a for a in args if isinstance(a, int)][:4]
        return name, (4 if name.endswith("forward") else 8) * B * H * D * T * (T + 1) / 2
    return name, 0.0


def profile(size: str, precision: str, steps: int = 10) -> str:
    """A table of what the kernels of a step cost, and of what is left between them."""
    config, watch = model_config(size), Stopwatch()
    model = GPT2(config, seed=0, precision=precision)
    step, ids_and_targets = stepper(model, AdamW(model), 1), batch(config, SEQUENCES)
    with _in_place_of_ops(watch.ops):
        for _ in range(2):
            step(*ids_and_targets)
        watch.reset()
        begun = time.perf_counter()
        for _ in range(steps):
            step(*ids_and_targets)
        total = time.perf_counter() - begun
    peak = measured_peak(precision == "bf16")
    lines = [f"{size} {precision}: {1e3 * total / steps:.2f} ms a step, "
             f"{step_flops(config) * steps / total / peak:.1%} of the peak of {peak / 1e9:.0f} GFLOP/s"]
    for key, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        rate = f"{watch.flops[key] / seconds / 1e9:6.0f} GFLOP/s" if watch.flops[key] else ""
        lines.append(f"  {key:42} {watch.calls[key] // steps:4d} calls {1e3 * seconds / steps:9.3f} ms "
                     f"{seconds / total:6.1%}  {rate}")
    between = total - sum(watch.seconds.values())
    lines.append(f"  {'between the kernels':42} {'':10} {1e3 * between / steps:9.3f} ms "
                 f"{between / total:6.1%}")
    return "\n".join(lines)
