"""What feste and its peers get alike: a batch, and the parameters a model starts with, in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from feste.config import Config
from feste.params import ParameterTable


def batch(config: Config, sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and targets (sequences, block_size) int32."""
    both = np.random.default_rng(0).integers(0, config.vocab_size, (sequences, config.block_size + 1)).astype(np.int32)
    return np.ascontiguousarray(both[:, :-1]), np.ascontiguousarray(both[:, 1:])


def write_inputs(path: Path, config: Config, sequences: int) -> str:
    """A file of NumPy's (.npz) with ids, targets and every parameter under its Hugging Face name; returns its path."""
    table = ParameterTable(config)
    flat = np.empty(table.size, np.float32)
    table.initialise(flat, 0)
    ids, targets = batch(config, sequences)
    np.savez(path, ids=ids, targets=targets, **table.views(flat))
    return str(path)
