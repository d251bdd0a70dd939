"""The writer of training_log.csv and run.json."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from feste import disk
from feste.errors import FesteError
from feste.run.follow import machine
from feste.run.journal import now
from feste.run.names import COLUMNS, INFO, LOG, RUNNING
from feste.run.rows import cells_of, record_of, records

FLUSH_SECONDS = 0.2


class RunDirectoryError(FesteError):
    """The run directory cannot be written or is in use."""


def failure(path: Path, error: OSError) -> RunDirectoryError:
    """An error of the file system as one line that names the directory and what helps."""
    return RunDirectoryError(f"cannot write the run directory {path}: {error.strerror or error}; "
                             f"{disk.advice(error)}", "run_dir")


class RunLog:
    """The rows and the description of one run, in a directory that the caller owns.

    info goes into run.json beside what is known of the process. locked: whether the lock of the directory is held, so
    that a reader may conclude from it. The log is opened for appending; the first row of a new one is the header.
    """

    def __init__(self, path: Path, info: dict, locked: bool) -> None:
        self.path, self._flushed = path, time.monotonic()
        self.info = info | {
            "state": RUNNING, "reason": None, "pid": os.getpid(), "locked": locked, **machine(),
            "started": now(), "ended": None, "python": platform.python_version(), "numpy": np.__version__,
        }
        self._file = open(path / LOG, "a", encoding="utf-8", newline="")  # noqa: SIM115
        try:
            if self._file.tell() == 0:
                self._file.write(record_of(COLUMNS))
            self.describe()
            self._file.flush()
        except BaseException:
            with suppress(OSError):
                self._file.close()
            raise

    def describe(self) -> None:
        """Write run.json as it is now."""
        disk.write_json(self.path / INFO, self.info)

    def write(self, record: dict) -> None:
        """Append one row; a column that is missing or None stays empty."""
        get = record.get
        try:
            self._file.write(record_of([_cell(get(column)) for column in COLUMNS]))
            if get("val_loss") is not None or time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self.flush()
        except OSError as error:
            raise failure(self.path, error) from error

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise failure(self.path, error) from error
        self._flushed = time.monotonic()

    def close(self, state: str, reason: str | None = None) -> None:
        """End the run with one of END_STATES: the rows first, then run.json."""
        error_of_rows = None
        try:
            self._file.close()
        except OSError as error:
            error_of_rows = failure(self.path, error)
            state, reason = "failed", str(error_of_rows)
        self.info |= {"state": state, "reason": reason, "ended": now()}
        try:
            self.describe()
        except OSError as error:
            raise error_of_rows or failure(self.path, error) from error
        if error_of_rows is not None:
            raise error_of_rows


def copy_rows(source: Path, path: Path, last: int) -> None:
    """Make the log `path` of the rows of another, or of itself, up to a step. A torn last row is left out."""
    if not source.exists():
        return
    kept = [record_of(COLUMNS).encode()]
    for record in records(source.read_bytes()):
        cells = cells_of(record)
        if cells and len(cells) == len(COLUMNS) and cells[0].isdigit() and int(cells[0]) <= last:
            kept.append(record)
    with disk.replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)
