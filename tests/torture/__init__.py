"""Faults on purpose, and a count of what became of them.

Each function tries one kind of fault and returns a Tally. The tests call them with small counts, `python -m
tests.torture` with large ones.
"""

from .crashes import failing_call, failing_calls, kills
from .damage import bit_flips, damaged_tokenizers, forged_files, truncations
from .environment import PHASES, STOPPING, SURROUNDINGS, signals, simultaneous, surroundings
from .process import ENVIRONMENT, ROOT, arguments, command, is_whole, run, start
from .tiny import CONFIG, INTERVAL, SETTINGS, Tally, differences, history, save_example, text, tokenizer, tokens, train

__all__ = [
    "CONFIG",
    "ENVIRONMENT",
    "INTERVAL",
    "PHASES",
    "ROOT",
    "SETTINGS",
    "STOPPING",
    "SURROUNDINGS",
    "Tally",
    "arguments",
    "bit_flips",
    "command",
    "damaged_tokenizers",
    "differences",
    "failing_call",
    "failing_calls",
    "forged_files",
    "history",
    "is_whole",
    "kills",
    "run",
    "save_example",
    "signals",
    "simultaneous",
    "start",
    "surroundings",
    "text",
    "tokenizer",
    "tokens",
    "train",
    "truncations",
]
