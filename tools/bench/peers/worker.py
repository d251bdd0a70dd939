"""One measurement of a peer in a process of its own: arguments TASK JSON, prints one line of JSON."""

from __future__ import annotations

import json
import sys

from ...loaded import mapped_libraries, openmp_runtimes


def loaded_of_feste() -> list[str]:
    """Modules of feste in this process, and libraries of it that are mapped."""
    modules = [name for name in sys.modules if name == "feste" or name.startswith("feste.")]
    return modules + sorted(path for path in mapped_libraries() if "/feste/" in path or "_ops_" in path)


def measure(task: str, arguments: dict) -> dict:
    from . import generation, kernels, steps, tokenizers
    tasks = {"steps": steps.measure, "memory": steps.measure_memory, "kernels": kernels.measure,
             "generation": generation.measure, "tokenizer": tokenizers.measure,
             "documents": tokenizers.measure_documents}
    return tasks[task](**arguments)


def main() -> None:
    result = measure(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps(result | {"loaded": {"feste": loaded_of_feste(), "openmp": openmp_runtimes()}}))
