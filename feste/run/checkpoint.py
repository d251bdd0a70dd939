"""Checkpoint: the complete state of a run in one safetensors file. The format, and nothing else.

Parameters stand under their Hugging Face names, AdamW's moments under `optimizer.m.` and `optimizer.v.` and the same
names. Everything else is JSON in the metadata: configuration, tokenizer, step, best validation loss, the trainer's
counters. A checksum covers all of it, tensors and metadata. There is no pickle, so no code in a file can run.

The safetensors library writes and reads the file, and refuses tables that overlap, leave gaps or do not fit the file.
On top of it stand our own bounds: the tensors must be just those of the configuration before anything is allocated.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from feste import disk
from feste.config import Config
from feste.errors import FesteError
from feste.model import GPT2
from feste.optim import OPTIMIZERS, AdamW
from feste.params import ParameterTable
from feste.tokenizer import BPETokenizer

FORMAT_VERSION = 1
REQUIRED = ("feste_format_version", "config", "precision", "seed", "step", "best", "train_config", "trainer_state",
            "checksum")
# What the tensors' names begin with; the last are of ranks that train apart.
PARAMETERS, FIRST, SECOND, OUTER = "", "optimizer.m.", "optimizer.v.", "optimizer.outer."


class CheckpointError(FesteError):
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
        write(Path(path), Snapshot(model, tokenizer, optimizer, **state))

    @staticmethod
    def load(path: str | os.PathLike, *, precision: str | None = None) -> Checkpoint:
        """Read a checkpoint, or CheckpointError. precision replaces the one it was saved with."""
        return _read(Path(path), precision)


# ---- writing -----------------------------------------------------------------------------------------------


class Snapshot:
    """What a checkpoint will hold at one moment.

    With `room`, arrays as room_for makes them, the flat buffers are copied into it, so that training can go on while
    they are written. Without, the snapshot is of the live buffers: write it at once. moments: fills room for the two
    moments with those of all parameters, or returns them, where the optimizer has those of a part only.
    """

    def __init__(self, model: GPT2, tokenizer: BPETokenizer | None, optimizer: AdamW | None, *, step: int = 0,
                 best_val_loss: float = math.inf, best_step: int = 0, train_config: dict | None = None,
                 trainer_state: dict | None = None, room: list[np.ndarray] | None = None,
                 moments: Callable[[tuple | None], tuple] | None = None) -> None:
        self.tables = _tables_of_optimizer(model.table, optimizer)
        self.flats = _flats(model, optimizer)
        if moments is not None:
            self.flats[1:3] = moments(room and (room[1], room[2]))
        if room is not None:
            for copy, flat in zip(room, self.flats, strict=True):
                if copy is not flat:
                    np.copyto(copy, flat)
            self.flats = list(room)
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
            self.metadata["optimizer"] = json.dumps(
                optimizer.settings() | {"t": optimizer.t} | ({} if optimizer.outer is None else {"outer": True}))

    @staticmethod
    def room_for(model: GPT2, optimizer: AdamW | None) -> list[np.ndarray]:
        """Arrays for the flat buffers of a snapshot. They are written to, so that the memory is there."""
        return [np.full(table.size, 0.0, np.float32)
                for table in _tables_of_optimizer(model.table, optimizer).values()]

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self.flats)

    def tensors(self) -> dict[str, np.ndarray]:
        return {prefix + name: view for (prefix, table), flat in zip(self.tables.items(), self.flats, strict=True)
                for name, view in table.views(flat).items()}

    def checksum(self) -> str:
        digest = _new_digest(self.metadata)
        for flat in self.flats:
            digest.update(flat)
        return digest.hexdigest()


def _tables(table: ParameterTable, optimizer: type[AdamW] | None, outer: bool = False) -> dict[str, ParameterTable]:
    """The tables of the flat buffers of a checkpoint, by the beginning of their tensors' names."""
    if optimizer is None:
        return {PARAMETERS: table}
    moments = {FIRST: table, SECOND: optimizer.second_moments(table)}
    return {PARAMETERS: table} | moments | ({OUTER: table} if outer else {})


def _tables_of_optimizer(table: ParameterTable, optimizer: AdamW | None) -> dict[str, ParameterTable]:
    return _tables(table, optimizer and type(optimizer), optimizer is not None and optimizer.outer is not None)


def _flats(model: GPT2, optimizer: AdamW | None) -> list[np.ndarray]:
    """The flat buffers of a checkpoint, in the order of `_tables`."""
    if optimizer is None:
        return [model.flat_params]
    return [model.flat_params, optimizer.m, optimizer.v] + ([] if optimizer.outer is None else [optimizer.outer])


def write(path: Path, snapshot: Snapshot) -> None:
    """Replace a checkpoint as a whole, or CheckpointError."""
    try:
        with disk.replacing(path) as partial, _library_errors():
            save_file(snapshot.tensors(), partial, snapshot.metadata | {"checksum": snapshot.checksum()})
            os.chmod(partial, 0o644)  # the library makes files that only their owner may read
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write the checkpoint {path}: {error.strerror or error}; earlier ones are intact; "
                           f"{disk.advice(error)}", "run_dir")


@contextmanager
def _library_errors() -> Iterator[None]:
    """The library's errors of the file system as Python's; the number stands in its message."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error)) from error


def _new_digest(metadata: Mapping[str, str]):
    """SHA-256 (processors have instructions for it, and it runs without the GIL), begun with the metadata.

    The flat buffers follow, in their own order and not in that of the file. The table of tensors needs no part in it:
    it is derived from the configuration, and compared when read.
    """
    described = {key: value for key, value in metadata.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode())


# ---- reading -----------------------------------------------------------------------------------------------


def _read(path: Path, precision: str | None) -> Checkpoint:
    with _opened(path) as file:
        metadata, config = _read_header(path, file)
        with _damage(path, "its metadata"):
            model = GPT2(config, seed=None, precision=precision or metadata["precision"])
            model.dropout_seed = int(metadata["seed"])
            step, best_val_loss, best_step, train_config, trainer_state = _run_state(metadata)
            optimizer = _make_optimizer(model, json.loads(metadata["optimizer"])) if "optimizer" in metadata else None
        digest = _new_digest(metadata)
        tables = _tables_of_optimizer(model.table, optimizer)
        for (prefix, table), flat in zip(tables.items(), _flats(model, optimizer), strict=True):
            for name, view in table.views(flat).items():
                np.copyto(view, file.get_tensor(prefix + name))
            digest.update(flat)
    if digest.hexdigest() != metadata["checksum"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    with _damage(path, "its tokenizer"):
        tokenizer = BPETokenizer.from_json(metadata["tokenizer"], str(path)) if "tokenizer" in metadata else None
    return Checkpoint(model, tokenizer, optimizer, step, best_val_loss, best_step, train_config, trainer_state, path)


def verify(path: Path) -> int:
    """The step of a whole checkpoint; CheckpointError for a damaged one. Reads all of it, a tensor at a time."""
    with _opened(path) as file:
        metadata, config = _read_header(path, file)
        digest = _new_digest(metadata)
        for prefix, table in _tables_of(metadata, config).items():
            for p in table:
                digest.update(file.get_tensor(prefix + p.name))
    if digest.hexdigest() != metadata["checksum"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    with _damage(path, "its metadata"):
        return _run_state(metadata)[0]


def step_of(path: Path) -> float:
    """The step a file claims to be of, without reading its tensors; infinity if it cannot be told."""
    try:
        with _opened(path) as file, _damage(path, "its metadata"):
            return _run_state(_read_header(path, file)[0])[0]
    except CheckpointError:
        return math.inf


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """The file through the library, read by calls and not through a map: a device that fails is then an error."""
    try:
        with safe_open(path, framework="np", backend="pread") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint: {error}") from error


def _read_header(path: Path, file: safe_open) -> tuple[dict[str, str], Config]:
    """Metadata and configuration of a file that holds just the tensors of its configuration."""
    metadata = file.metadata() or {}
    if "feste_format_version" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file of another program, no checkpoint of feste")
    if metadata["feste_format_version"] != str(FORMAT_VERSION):
        raise CheckpointError(f"{path} has format version {metadata['feste_format_version']}; this feste reads "
                              f"version {FORMAT_VERSION}")
    with _damage(path, "its header"):
        missing = [key for key in REQUIRED if key not in metadata]
        if missing:
            raise ValueError(f"the metadata lack {', '.join(missing)}")
        config, names = Config.from_dict(json.loads(metadata["config"])), set(file.keys())
        if config.n_layers > len(names):
            raise ValueError(f"n_layers={config.n_layers} with {len(names)} tensors")
        expected = {prefix + p.name: p.shape for prefix, table in _tables_of(metadata, config).items() for p in table}
        for name in sorted({*names, *expected}):
            held = file.get_slice(name) if name in names else None
            if name not in expected or held is None or held.get_dtype() != "F32" \
                    or tuple(held.get_shape()) != expected[name]:
                raise ValueError(f"its tensors are not those of its configuration, first {name!r}")
    return metadata, config


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


def _tables_of(metadata: Mapping[str, str], config: Config) -> dict[str, ParameterTable]:
    """The tables of the tensors that a file with these metadata should hold."""
    if "optimizer" not in metadata:
        return _tables(ParameterTable(config), None)
    state = json.loads(metadata["optimizer"])
    return _tables(ParameterTable(config), _optimizer_class(state), bool(state.get("outer")))


def _optimizer_class(state: dict) -> type[AdamW]:
    name = state.get("optimizer", AdamW.name)  # files from before there was a choice do not say
    if name not in OPTIMIZERS:
        raise ValueError(f"the optimizer is {name!r:.60}")
    return OPTIMIZERS[name]


def _make_optimizer(model: GPT2, state: dict) -> AdamW:
    settings = {name: value for name, value in state.items() if name not in ("t", "betas", "outer")}
    if "betas" in state:  # as older files name them
        settings["beta1"], settings["beta2"] = state["betas"]
    optimizer = _optimizer_class(state).of(model, settings)
    optimizer.t = int(state["t"])
    if state.get("outer"):
        optimizer.begin_outer()
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
