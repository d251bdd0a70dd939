"""Files of tokens that other programs made: nanoGPT's train.bin and val.bin, and the shards of llm.c. Read only.

    nanoGPT   train.bin, val.bin: uint16 and nothing else
    llm.c     NAME_train_000001.bin, ..., NAME_val_000000.bin: 256 int32 first, of which three are magic, version and
              the number of tokens; then uint16 (magic 20240520, version 1) or uint32 (magic 20240801, version 7)

Files are mapped into memory, end to end in the order of their names; those with "val" in their names are the held-out
part. The tokenizer is not among them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from feste.errors import FesteError

LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 1024
DTYPES = {(LLMC_MAGIC, LLMC_VERSION): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # magic and version -> tokens
RAW = ("train.bin", "val.bin")
PICKLE = "meta.pkl"
SAMPLES, SAMPLE_TOKENS = 64, 4096  # of each file, for a fingerprint


class ShardsError(FesteError):
    """Files of tokens that cannot be read: which, and why."""


class Shards:
    """1-D arrays end to end as one, without a copy: length, slices and arrays of indices as of an ndarray."""

    ndim = 1

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.dtype = np.result_type(*parts)
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def __getitem__(self, key: slice | np.ndarray) -> Shards | np.ndarray:
        """A slice is a view; an array of indices, of any shape, gives the tokens there."""
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            if step != 1:
                raise ValueError("a slice of shards has step 1")
            edges = [0, *self._ends.tolist()]
            return Shards([part[max(begin - a, 0):max(min(end, b) - a, 0)]
                           for part, (a, b) in zip(self.parts, pairwise(edges), strict=True)] or self.parts)
        index = np.asarray(key)
        found, shard = np.empty(index.shape, self.dtype), np.searchsorted(self._ends, index, side="right")
        for i in np.unique(shard):
            here = shard == i
            found[here] = self.parts[i][index[here] - (self._ends[i - 1] if i else 0)]
        return found

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        whole = np.concatenate([np.empty(0, self.dtype), *self.parts])
        return whole if dtype is None else whole.astype(dtype)

    def fingerprint(self) -> bytes:
        """A hash of every file's length and of SAMPLES places in it: the whole of 20 GB would take a minute to read."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(len(part).to_bytes(8, "little"))
            for begin in np.linspace(0, max(0, len(part) - SAMPLE_TOKENS), SAMPLES).astype(np.int64):
                digest.update(np.ascontiguousarray(part[begin:begin + SAMPLE_TOKENS], np.uint32))
        return digest.digest()


def has_shards(folder: str | os.PathLike) -> bool:
    """Whether a directory holds files of tokens that other programs made."""
    return any(path.name in RAW or _header(path) is not None for path in _files(folder))


def load_shards(folder: str | os.PathLike) -> tuple[Shards, Shards | None]:
    """The training tokens, and those of the validation files or None. ShardsError for a file that is none of them."""
    train, held_out = [], []
    for path in _files(folder):
        (held_out if "val" in path.stem else train).append(_tokens(path))
    if not train:
        raise ShardsError(f"{folder} has validation tokens, but none to train on: a file without \"val\" in its name",
                          "data")
    return Shards(train), Shards(held_out) if held_out else None


def _files(folder: str | os.PathLike) -> list[Path]:
    return sorted(path for path in Path(folder).glob("*.bin") if path.is_file())


def _header(path: Path) -> np.ndarray | None:
    """Magic, version and count of a shard of llm.c, or None."""
    with open(path, "rb") as file:
        words = np.frombuffer(file.read(12), "<i4", count=-1) if path.stat().st_size >= LLMC_HEADER_BYTES else []
    return words if len(words) == 3 and words[0] in {magic for magic, _ in DTYPES} else None


def _tokens(path: Path) -> np.ndarray:
    """The tokens of a file, mapped."""
    words, size = _header(path), path.stat().st_size
    if words is None:
        if path.name not in RAW:
            raise ShardsError(f"{path} is no file of tokens: its name is not {' or '.join(RAW)}, and it does not begin "
                              "as a shard of llm.c does", "data")
        if size % 2 or not size:
            raise ShardsError(f"{path} has {size:,} bytes, which is no whole number of uint16 tokens", "data")
        return np.memmap(path, "<u2", mode="r")
    magic, version, count = map(int, words)
    dtype = DTYPES.get((magic, version))
    if dtype is None:
        known = " or ".join(f"{v} with magic {m}" for m, v in DTYPES)
        raise ShardsError(f"{path} is a shard of version {version} with magic {magic}; known are {known}", "data")
    if count < 1 or size != LLMC_HEADER_BYTES + count * dtype.itemsize:
        raise ShardsError(f"{path} says that it has {count:,} tokens, and has {size - LLMC_HEADER_BYTES:,} bytes "
                          f"of them instead of {count * dtype.itemsize:,}; it was cut off, or is damaged", "data")
    return np.memmap(path, dtype, mode="r", offset=LLMC_HEADER_BYTES)
