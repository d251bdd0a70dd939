"""One measurement of a peer in its own process: python -m tools.bench.peers.worker TASK JSON. One line of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def loaded_of_feste() -> list[str]:
    """Modules of feste in this process, and libraries of it that are mapped."""
    modules = [name for name in sys.modules if name == "feste" or name.startswith("feste.")]
    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line} if maps.exists() else set()
    return modules + sorted(path for path in paths if "/feste/" in path or "_ops_" in path)


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes that are mapped into this process."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return sorted({Path(line.split()[-1]).name for line in lines
                   if any(name in line for name in ("libgomp", "libomp", "libiomp"))})


def measure(task: str, arguments: dict) -> dict:
    from tools.bench.peers import generation, kernels, steps, tokenizers
    tasks = {"steps": steps.measure, "memory": steps.measure_memory, "kernels": kernels.measure,
             "generation": generation.measure, "tokenizer": tokenizers.measure,
             "documents": tokenizers.measure_documents}
    return tasks[task](**arguments)


def main() -> None:
    result = measure(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps(result | {"loaded": {"feste": loaded_of_feste(), "openmp": openmp_runtimes()}}))


if __name__ == "__main__":
    main()
