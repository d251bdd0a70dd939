"""Libraries that are mapped into this process."""

from __future__ import annotations

from pathlib import Path


def mapped_libraries() -> set[str]:
    """The paths of the files that are mapped; empty where the system does not tell."""
    maps = Path("/proc/self/maps")
    return {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line} if maps.exists() else set()


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes among them. Two in one process hold each other's threads up."""
    return sorted({Path(path).name for path in mapped_libraries()
                   if any(name in path for name in ("libgomp", "libomp", "libiomp"))})
