"""feste and its peers in alternation: a process for each measurement, medians, ratios."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]  # where the folder tools/ lies
# The workers belong to the package `tools` also in an installed feste, whose own names a peer must not load.
START = "import sys; sys.path.append({home!r}); from tools.bench.{worker} import main; main()"


@dataclass
class Figure:
    """What a program reached in one discipline: one value for each round."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def range(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    def to(self, digits: int) -> str:
        """Median and range, to so many digits."""
        low, high = self.range
        return f"{self.median:.{digits}g} ({low:.{digits}g} - {high:.{digits}g})"

    def __str__(self) -> str:
        return self.to(3)


# The environment in which feste, PyTorch, oneDNN and MKL know no newer instruction set than one. (On AMD's processors
# MKL takes kernels of its own for float32, which need AVX2, whatever it is told.)
LIMITS = {isa: dict(zip(("FESTE_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"), names,
                        strict=True))
          for isa, *names in (("avx512", "avx512", "avx512", "AVX512_CORE_BF16", "AVX512"),
                              ("avx2", "avx2", "avx2", "AVX2", "AVX2"),
                              ("generic", "generic", "default", "SSE41", "SSE4_2"))}


def limit_to(isa: str) -> None:
    """From now on every process that is started here knows no newer instruction set."""
    # Compiled PyTorch takes what it finds in its cache for its own, and what was made for AVX-512 computes nonsense.
    cache = tempfile.mkdtemp(prefix=f"torchinductor_{isa}_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ.update(LIMITS[isa], TORCHINDUCTOR_CACHE_DIR=cache)


class Unavailable(Exception):
    """A program that cannot run here: its library is missing, or it failed."""


def run_worker(task: str, program: str = "feste", python: str = sys.executable, **arguments) -> dict:
    """One measurement in a process of its own; the worker prints its result as the last line, in JSON.

    program: feste, or a peer, whose worker loads nothing of feste and has the environment that its users have.
    """
    is_peer = not program.startswith("feste")
    start = START.format(home=str(HOME), worker="peers.worker" if is_peer else "worker")
    command = [python if is_peer else sys.executable, "-c", start, task, json.dumps(arguments | {"program": program})]
    # feste needs no BLAS; but NumPy's, with which results are checked, has threads that go on spinning for a while.
    environment = os.environ if is_peer else os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(lines[-1])
    result = json.loads(done.stdout.strip().splitlines()[-1])
    loaded = result.pop("loaded", {"feste": []})
    if is_peer and loaded["feste"]:
        raise SystemExit(f"the process of {program} has loaded feste, so its figures are not its own")
    return result


def alternate(task: str, programs: dict[str, dict], rounds: int, python: str = sys.executable,
              say=print) -> tuple[dict[str, list[dict]], dict]:
    """Every program once a round. Returns its results, round by round, and the reasons of those that cannot run."""
    results: dict[str, list[dict]] = {name: [] for name in programs}
    missing: dict[str, str] = {}
    for number in range(rounds):
        for name, arguments in programs.items():
            if name in missing:
                continue
            try:
                results[name].append(run_worker(task, **{"program": name, "python": python, **arguments}))
                say(f"  round {number + 1} {name}: {_brief(results[name][-1])}")
            except Unavailable as reason:
                missing[name] = str(reason)
                say(f"  {name} does not run here: {reason}")
    return {name: values for name, values in results.items() if values}, missing


def _brief(result: dict) -> str:
    shown = [f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, (int, float))]
    return ", ".join(shown[:4])


def figures(results: dict[str, list[dict]], key: str) -> dict[str, Figure]:
    return {name: Figure([result[key] for result in rounds]) for name, rounds in results.items()}


def ratios(results: dict[str, list[dict]], key: str, ours: str, theirs: str) -> Figure:
    """Round by round, so that a slow phase of the machine counts for both."""
    return Figure([a[key] / b[key] for a, b in zip(results[ours], results[theirs], strict=False)])
