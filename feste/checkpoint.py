"""Checkpoint: the complete state of a run in one safetensors file, whole or not there at all.

Parameters under their Hugging Face names, AdamW's moments under `optimizer.m.` and `optimizer.v.` and the same
names. Everything else is JSON in the metadata: configuration, tokenizer, step, best validation loss, the trainer's
counters. A checksum covers all of it, tensors and metadata. There is no pickle, so no code in a file can run.

A file is written under a temporary name in the same directory, flushed to the disk, renamed, and the directory
flushed: at every instant the name stands for the old file or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from feste.config import Config
from feste.model import GPT2
from feste.optim import AdamW
from feste.params import ParameterTable
from feste.tokenizer import BPETokenizer

FORMAT_VERSION = 1
TEMPORARY = ".partial"                   # suffix of a file that is still being written
SET_ASIDE = ".superseded"                # suffix of a file that the run no longer goes through
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
MAX_HEADER_BYTES = 100_000_000           # the limit of the safetensors library
BLOCK = 1 << 24                          # bytes hashed and written at a time


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: names the file and the reason."""


@dataclass
class Checkpoint:
    """A loaded checkpoint, and where it came from. optimizer and tokenizer are None if the file holds none."""

    model: GPT2
    tokenizer: BPETokenizer | None
    optimizer: AdamW | None
    step: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0
    train_config: dict | None = None
    trainer_state: dict = field(default_factory=dict)
    path: Path | None = None

    @staticmethod
    def save(path: str | os.PathLike, model: GPT2, tokenizer: BPETokenizer | None = None,
             optimizer: AdamW | None = None, **state) -> None:
        """Write a checkpoint; without an optimizer it serves inference only.

        state: step, best_val_loss, best_step, train_config, trainer_state, as in the dataclass.
        """
        _write([Path(path)], Snapshot(model, tokenizer, optimizer, **state))

    @staticmethod
    def load(path: str | os.PathLike, *, precision: str | None = None) -> Checkpoint:
        """Read a checkpoint, or CheckpointError. precision replaces the one it was saved with."""
        return _read(Path(path), precision)


class Snapshot:
    """What a checkpoint will hold, copied at one moment, so that training can go on while it is written."""

    def __init__(self, model: GPT2, tokenizer: BPETokenizer | None, optimizer: AdamW | None, *, step: int = 0,
                 best_val_loss: float = math.inf, best_step: int = 0, train_config: dict | None = None,
                 trainer_state: dict | None = None, into: np.ndarray | None = None) -> None:
        flats = [model.flat_params] + ([optimizer.m, optimizer.v] if optimizer is not None else [])
        self.table = model.table
        self.buffer = self.room_for(model, optimizer) if into is None else into
        for copy, flat in zip(self.buffer, flats, strict=True):
            np.copyto(copy, flat)
        self.metadata = {
            "format": "pt",  # what safetensors' readers expect; the layout is the same for every framework
            "feste_format_version": str(FORMAT_VERSION),
            "config": json.dumps(model.config.to_dict()),
            "precision": model.precision,
            "seed": str(model.dropout_seed),
            "step": str(step),
            "best": json.dumps([best_val_loss if math.isfinite(best_val_loss) else None, best_step]),
            "train_config": json.dumps(train_config),
            "trainer_state": json.dumps(trainer_state or {}),
        }
        if tokenizer is not None:
            self.metadata["tokenizer"] = tokenizer.to_json()
        if optimizer is not None:
            self.metadata["optimizer"] = json.dumps({"betas": optimizer.betas, "eps": optimizer.eps,
                                                     "weight_decay": optimizer.weight_decay, "t": optimizer.t})

    @staticmethod
    def room_for(model: GPT2, optimizer: AdamW | None) -> np.ndarray:
        """An uninitialised buffer for the flat arrays of a snapshot, one row each."""
        return np.empty((1 if optimizer is None else 3, model.table.size), np.float32)

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def header(self) -> bytes:
        """The safetensors header: the length, then the JSON table of tensors and the metadata.

        Tensors lie in the file in the order of the flat buffers, so each buffer is written in one piece.
        """
        entries: dict = {"__metadata__": self.metadata | {"checksum": self._checksum()}}
        for name, start, stop, shape in _tensors(self.table, len(self.buffer)):
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        text = json.dumps(entries, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _checksum(self) -> str:
        digest = _new_digest(self.metadata)
        for block in _blocks(self.buffer):
            digest.update(block)
        return digest.hexdigest()


REQUIRED = ("feste_format_version", "config", "precision", "seed", "step", "best", "train_config", "trainer_state",
            "checksum")
PREFIXES = ("", "optimizer.m.", "optimizer.v.")


def _tensors(table, n_buffers: int) -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
    """(name, first byte, end byte, shape) of every tensor of a file, in order."""
    for i, prefix in enumerate(PREFIXES[:n_buffers]):
        for p in table:
            start = 4 * (i * table.size + p.offset)
            yield prefix + p.name, start, start + 4 * p.size, p.shape


def _new_digest(metadata: Mapping[str, str]):
    """SHA-256 (processors have instructions for it, and it runs without the GIL), begun with the metadata.

    The table of tensors needs no part in it: it is derived from the configuration, and compared when read.
    """
    described = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode())


def _blocks(buffer: np.ndarray) -> Iterator[memoryview]:
    view = memoryview(buffer).cast("B")
    return (view[i:i + BLOCK] for i in range(0, len(view), BLOCK))


# ---- writing -----------------------------------------------------------------------------------------------


def _write(paths: list[Path], snapshot: Snapshot) -> None:
    """Write a snapshot under the first name; the other names become links to the same file."""
    temporaries = [path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}") for path in paths]
    try:
        _write_file(temporaries[0], snapshot)
        for temporary in temporaries[1:]:
            _link_or_copy(temporaries[0], temporary, snapshot)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        _sync_directory(paths[0].parent)
    except OSError as error:
        for temporary in temporaries:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write the checkpoint {paths[0]}: {error.strerror or error}; earlier ones are "
                              "intact. Free some disk space or choose another directory") from error


def _write_file(path: Path, snapshot: Snapshot) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write_all(fd, snapshot.header())
        for block in _blocks(snapshot.buffer):
            _write_all(fd, block)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes | memoryview) -> None:
    """os.write may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def _link_or_copy(source: Path, link: Path, snapshot: Snapshot) -> None:
    """A second name for a whole file; file systems without hard links get a second file."""
    try:
        os.link(source, link)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _write_file(link, snapshot)


def _sync_directory(directory: Path) -> None:
    """Without this the rename itself may be lost with the power."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_partial(directory: Path) -> None:
    """Delete what a killed or failed writer left behind."""
    for path in directory.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


class CheckpointWriter:
    """Writes checkpoints of one run in a background thread.

    `save` waits for the save before it, copies the state, and returns: the copy is what training waits for
    (`held_up_seconds`). Several names due at the same step share one file. An error in the thread is raised by
    the next save, check or close.
    """

    def __init__(self, keep_last: int) -> None:
        self.keep_last = keep_last
        self.saves, self.held_up_seconds = 0, 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._room: np.ndarray | None = None

    def save(self, paths: Iterable[Path], model: GPT2, tokenizer: BPETokenizer | None, optimizer: AdamW | None,
             **state) -> None:
        begun = time.perf_counter()
        self.wait()
        if self._room is None:  # kept from save to save: fresh memory costs more than the copy
            self._room = Snapshot.room_for(model, optimizer)
        snapshot = Snapshot(model, tokenizer, optimizer, into=self._room, **state)
        self._thread = threading.Thread(target=self._run, args=(list(paths), snapshot), name="feste-checkpoint")
        self._thread.start()
        self.saves += 1
        self.held_up_seconds += time.perf_counter() - begun

    def _run(self, paths: list[Path], snapshot: Snapshot) -> None:
        try:
            _write(paths, snapshot)
            retain(paths[0].parent, self.keep_last)
        except BaseException as error:  # handed to the training thread
            self._error = error

    def check(self) -> None:
        """Raise the error of a finished save, if there was one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Let the save under way come to its end, whatever that is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until the save under way is done; raises its error."""
        self.settle()
        self.check()


def retain(directory: Path, keep_last: int) -> None:
    """Delete periodic checkpoints but the last few; best and final stay."""
    for _, path in periodic(directory)[:-keep_last]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot delete the old checkpoint {path}: {error.strerror or error}; make the "
                                  "directory writable, or raise --keep-last") from error


def set_aside_later(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps and those without a readable header; returns their new names.

    A run that goes back to `step` is a new history: a file of the old one must not count as the newest, nor
    push a new one out of the last few. Nothing is deleted.
    """
    moved = []
    for path in [directory / "checkpoint_final.bin", directory / "checkpoint_best.bin",
                 *(path for _, path in periodic(directory))]:
        if path.exists() and _step_in_header(path) > step:
            names = (path.with_name(f"{path.name}{SET_ASIDE}{n or ''}") for n in itertools.count())
            moved.append(next(name for name in names if not name.exists()))
            os.replace(path, moved[-1])
    return moved


def restore_best(directory: Path, origin: Path, best_step: int) -> None:
    """Give a run that goes on without its best checkpoint that file again, if it is to be found.

    It was set aside, because a later step was better, or the run goes on in another directory than `origin`.
    """
    best = directory / "checkpoint_best.bin"
    for source in (origin / best.name, origin / f"checkpoint_step_{best_step}.bin"):
        if not best.exists() and source.exists() and _step_in_header(source) == best_step:
            partial = best.with_name(best.name + TEMPORARY)
            shutil.copy(source, partial)
            os.replace(partial, best)


def _step_in_header(path: Path) -> float:
    """The step a file claims to be of, without reading its tensors; infinity if it cannot be told."""
    try:
        with _opened(path) as file, _damage(path, "its metadata"):
            return _run_state(_read_header(path, file)[0])[0]
    except CheckpointError:
        return math.inf


def periodic(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the periodic checkpoints, oldest first."""
    found = [(path.stem.removeprefix("checkpoint_step_"), path) for path in directory.glob("checkpoint_step_*.bin")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


# ---- reading -----------------------------------------------------------------------------------------------


def _read(path: Path, precision: str | None) -> Checkpoint:
    with _opened(path) as file:
        metadata, config, has_optimizer = _read_header(path, file)
        with _damage(path, "its metadata"):
            model = GPT2(config, seed=None, precision=precision or metadata["precision"])
            model.dropout_seed = int(metadata["seed"])
            step, best_val_loss, best_step, train_config, trainer_state = _run_state(metadata)
            optimizer = _make_optimizer(model, json.loads(metadata["optimizer"])) if has_optimizer else None
        digest = _new_digest(metadata)
        for flat in [model.flat_params] + ([optimizer.m, optimizer.v] if optimizer else []):
            for block in _blocks(flat):
                file.readinto(block)
                digest.update(block)
    if digest.hexdigest() != metadata["checksum"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    with _damage(path, "its tokenizer"):
        tokenizer = BPETokenizer.from_json(metadata["tokenizer"], str(path)) if "tokenizer" in metadata else None
    return Checkpoint(model, tokenizer, optimizer, step, best_val_loss, best_step, train_config, trainer_state, path)


def _run_state(metadata: Mapping[str, str]) -> tuple[int, float, int, dict | None, dict]:
    """step, best_val_loss, best_step, train_config, trainer_state; ValueError for a wrong type."""
    step, (best_val_loss, best_step) = int(metadata["step"]), json.loads(metadata["best"])
    train_config, trainer_state = json.loads(metadata["train_config"]), json.loads(metadata["trainer_state"])
    for name, value, kind in (("best_val_loss", best_val_loss, float | int | None), ("best_step", best_step, int),
                              ("train_config", train_config, dict | None), ("trainer_state", trainer_state, dict)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r:.60}")
    if step < 0:
        raise ValueError(f"step is {step}")
    return step, math.inf if best_val_loss is None else best_val_loss, best_step, train_config, trainer_state


def verify(path: Path) -> int:
    """The step of a whole checkpoint; CheckpointError for a damaged one. Reads all of it, allocates little."""
    with _opened(path) as file:
        metadata, _, _ = _read_header(path, file)
        digest, at_most = _new_digest(metadata), min(BLOCK, os.fstat(file.fileno()).st_size)
        while block := file.read(at_most):
            digest.update(block)
    if digest.hexdigest() != metadata["checksum"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    with _damage(path, "its metadata"):
        return _run_state(metadata)[0]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, str], Config, bool]:
    """Metadata, configuration, and whether there are moments; the file is left where the tensors begin.

    The file must hold just the tensors of its configuration, byte for byte where they belong, before anything
    is allocated for them.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path} is not a checkpoint, or cut off in its header ({size} bytes)")
    with _damage(path, "its header"):
        entries = json.loads(file.read(length).decode("utf-8"))
        metadata = entries.pop("__metadata__")
        for key in {*REQUIRED, *metadata}:
            if not isinstance(metadata.get(key), str):
                raise ValueError(f"the entry {key!r} is {metadata.get(key)!r:.60}, not a string")
        version = metadata["feste_format_version"]
        if version != str(FORMAT_VERSION):
            raise CheckpointError(f"{path} has format version {version}; this feste reads version {FORMAT_VERSION}")
        config, has_optimizer = Config.from_dict(json.loads(metadata["config"])), "optimizer" in metadata
        if config.n_layers > len(entries):
            raise ValueError(f"n_layers={config.n_layers} with {len(entries)} tensors")
        expected = {name: {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
                    for name, start, stop, shape in _tensors(ParameterTable(config), 3 if has_optimizer else 1)}
        if entries != expected:
            wrong = min(name for name in {*entries, *expected} if entries.get(name) != expected.get(name))
            raise ValueError(f"its tensors are not those of its configuration, first {wrong!r}")
    end = 8 + length + max(entry["data_offsets"][1] for entry in expected.values())
    if size != end:
        raise CheckpointError(f"{path} is damaged: it has {size} bytes, its table describes {end}")
    return metadata, config, has_optimizer


def _make_optimizer(model: GPT2, state: dict) -> AdamW:
    optimizer = AdamW(model, tuple(state["betas"]), state["eps"], state["weight_decay"])
    optimizer.t = int(state["t"])
    return optimizer


class _damage:
    """Turn whatever a malformed value raises into a CheckpointError that says where it was."""

    def __init__(self, path: Path, where: str) -> None:
        self.path, self.where = path, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)) \
                and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self.path} is damaged in {self.where}: {error}") from error


# ---- finding -----------------------------------------------------------------------------------------------


def find_checkpoint(path: str | os.PathLike, prefer: str = "latest") -> tuple[Path, list[str]]:
    """The checkpoint a path means, and a line for each damaged one that was passed over.

    A file means itself. A run directory means its newest whole checkpoint, or with prefer="best" its best one.
    """
    path = Path(path)
    if path.is_file():
        return path, []
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a checkpoint nor a run directory")
    best, final = path / "checkpoint_best.bin", path / "checkpoint_final.bin"
    ordered = [final, *(p for _, p in reversed(periodic(path))), best]
    candidates = [p for p in ([best, *ordered[:-1]] if prefer == "best" else ordered) if p.exists()]
    whole, passed_over = [], []
    for candidate in candidates:
        try:
            whole.append((verify(candidate), candidate))
            if prefer == "best":
                break
        except CheckpointError as error:
            passed_over.append(str(error))
    if not whole:
        raise CheckpointError(passed_over[0] if passed_over else f"{path} holds no checkpoint yet")
    return max(whole, key=lambda found: found[0])[1], passed_over
