"""One measurement of feste in a process of its own: arguments TASK JSON, prints one line of JSON."""

from __future__ import annotations

import json
import sys

from . import generation, kernels, long_run, saves, steps, tokenizers


def main() -> None:
    tasks = {"steps": steps.measure, "kernels": kernels.measure, "generation": generation.measure,
             "tokenizer": tokenizers.measure, "documents": tokenizers.measure_documents,
             "tokenizer_growth": tokenizers.measure_growth, "tokenizer_stream": tokenizers.measure_stream,
             "memory": steps.measure_memory, "saves": saves.measure, "long_run": long_run.measure}
    print(json.dumps(tasks[sys.argv[1]](**json.loads(sys.argv[2]))))
