"""The readers of a run directory: what the monitor, the plots and the comparison know a run by.

They import neither model nor kernels, and write nothing.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from functools import cache
from pathlib import Path

import numpy as np

from feste.disk import is_locked
from feste.run.names import COLUMNS, END_STATES, INFO, LOCK, LOG, RUNNING, TEXT_COLUMNS
from feste.run.rows import ascending, cells_of, number_of, parse_plain, record_end, records, without_samples

CHUNK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 26  # a quote still open after this much is damage and not a long sample


def read_info(run_dir: str | os.PathLike) -> dict:
    """run.json, or an empty dictionary if there is none (yet) or it is not one."""
    try:
        info = json.loads(Path(run_dir, INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


def read_rows(run_dir: str | os.PathLike) -> list[dict]:
    """Every whole row of the log: numbers as int and float, empty cells left out."""
    header, *rows = [cells_of(record) for record in records(Path(run_dir, LOG).read_bytes())] or [None]
    typed = [{name: value if name in TEXT_COLUMNS else float(value)
              for name, value in zip(header, row, strict=True) if value}
             for row in rows if row and len(row) == len(header)]
    return [row | {"step": int(row["step"])} for row in typed]


@cache
def machine() -> dict:
    """What tells this machine, or the kernel that its containers share, from another: host name and boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = None
    return {"host": platform.node(), "boot": boot}


class RunReader:
    """Follows a run as it is written. `poll` reads what is new; everything else is what was read so far.

    names: which columns are kept, step first. columns: name -> float64 array (NaN where a cell is empty), one entry
    for each step in ascending order.
    samples: (step, text). problems: what was wrong with the files, in words. found: whether the directory holds a
    run.json or a log. behind: bytes of the log that are not read yet.
    A torn last row waits for its rest; a file that was truncated or replaced is read afresh; rows of a resumed
    run replace those of the same steps.
    """

    NUMERIC = tuple(name for name in COLUMNS if name not in TEXT_COLUMNS)
    STALLED_SECONDS = 120.0
    QUIET_SECONDS = 2.0  # a log that grew since then is that of a live run, whatever else is seen

    def __init__(self, run_dir: str | os.PathLike, names: tuple[str, ...] = NUMERIC) -> None:
        self.path, self.names = Path(run_dir), names
        self.info: dict = {}
        self.found = False
        self._reset()

    def _reset(self) -> None:
        self._inode, self._offset, self._size, self._rest = None, 0, 0, b""
        self._head, self._tail = b"", b""
        self._header: list[str] | None = None
        self._data = [np.empty(1024) for _ in self.names]
        self._n = 0
        self._samples: list[tuple[int, str]] = []
        self.problems: list[str] = []
        self.behind = 0
        self._modified = 0.0

    @property
    def columns(self) -> dict[str, np.ndarray]:
        data, n = self._data, self._n
        return {name: values[:n] for name, values in zip(self.names, data, strict=True)}

    @property
    def samples(self) -> list[tuple[int, str]]:
        return self._samples

    def poll(self, max_bytes: int | None = None) -> bool:
        """Read what has been written since the last call, at most max_bytes of it; True if anything changed."""
        info = read_info(self.path)
        changed = info != self.info and bool(info)
        self.info = info or self.info
        try:
            with open(self.path / LOG, "rb") as file:
                self.found = True
                return self._follow(file, max_bytes) or changed
        except OSError:
            found, self.found = self.found, bool(info)
            return changed or found != self.found

    def _follow(self, file, max_bytes: int | None) -> bool:
        status = os.fstat(file.fileno())
        if self._inode == status.st_ino and self._offset == status.st_size and self._modified == status.st_mtime:
            return False
        changed = False
        if self._inode is not None and not self._continues(file, status):
            self._reset()
            changed = True
        self._inode, self._modified, self._size = status.st_ino, status.st_mtime, status.st_size
        stop = status.st_size if max_bytes is None else min(status.st_size, self._offset + max_bytes)
        file.seek(self._offset)
        while self._offset < stop and (new := file.read(min(CHUNK_BYTES, stop - self._offset))):
            self._head = self._head or new[:256]
            self._tail = (self._tail + new)[-64:]
            self._offset += len(new)
            self._take(self._rest + new)
            changed = True
        self.behind = status.st_size - self._offset
        return changed

    def _continues(self, file, status: os.stat_result) -> bool:
        """Whether the file is still the one that was read: its start and the end of what was read are the same."""
        if status.st_ino != self._inode or status.st_size < self._offset:
            return False
        head = file.read(len(self._head))
        file.seek(self._offset - len(self._tail))
        return head == self._head and file.read(len(self._tail)) == self._tail

    def _take(self, data: bytes) -> None:
        """Parse the whole records; what follows the last line end that no open quote runs across waits for later."""
        if self._header is None:
            end = record_end(data, 0)
            if end is None:
                self._keep_rest(data)
                return
            self._take_header(data[:end])
            data = data[end:]
        plain, samples, end = without_samples(data)
        values = parse_plain(plain, self.names) if plain is not None and self._header == list(COLUMNS) else None
        if values is not None and ascending(values[0], self._data[0][self._n - 1] if self._n else -math.inf):
            self._append(values)
            self._samples += samples
        else:
            self._take_slowly(data[:end])
        self._keep_rest(data[end:])

    def _keep_rest(self, rest: bytes) -> None:
        if len(rest) > MAX_RECORD_BYTES:  # go on behind the line that opened the quote
            self._problem("the log has rows that are not feste's")
            rest = rest.partition(b"\n")[2]
        self._rest = rest

    def _take_header(self, line: bytes) -> None:
        self._header = [name.lstrip("\ufeff") for name in cells_of(line) or [""]]
        missing = [name for name in COLUMNS if name not in self._header]
        if missing:
            self._problem(f"the log has no column {', '.join(missing)}")

    def _take_slowly(self, data: bytes) -> None:
        begin = 0
        while end := record_end(data, begin):
            self._take_row(cells_of(data[begin:end]))
            begin = end

    def _take_row(self, row: list[str] | None) -> None:
        if row == [""]:
            return
        if row is None or len(row) != len(self._header):
            self._problem("the log has rows that are not feste's")
            return
        cells = dict(zip(self._header, row, strict=False))
        step = number_of(cells.get("step", ""))
        if step is None or not step.is_integer():
            self._problem("the log has rows that are not feste's")
            return
        values = [number_of(cells.get(name) or "nan") for name in self.names]
        if None in values:
            self._problem("the log has cells that are not numbers")
        if self._n and step <= self._data[0][self._n - 1]:  # a resumed run goes back
            self._n = int(np.searchsorted(self._data[0][:self._n], step))
            self._samples = [sample for sample in self._samples if sample[0] < step]
        self._append(np.array([[math.nan if value is None else value] for value in values]))
        if cells.get("sample"):
            self._samples.append((int(step), cells["sample"]))

    def _append(self, values: np.ndarray) -> None:
        """Add columns of values behind the last row."""
        n = self._n + values.shape[1]
        if n > len(self._data[0]):  # column by column, so that only one is there twice
            expected = int(1.1 * n * self._size / self._offset)  # room for the rest of a long log at once
            for i, old in enumerate(self._data):
                self._data[i] = np.empty(max(n, 2 * len(old), expected))
                self._data[i][:self._n] = old[:self._n]
        for column, new in zip(self._data, values, strict=True):
            column[self._n:n] = new
        self._n = n

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    @property
    def state(self) -> str:
        """How the run stands: one of END_STATES, running, stalled, crashed or unknown.

        Crashed needs evidence: run.json says running, and the lock that the run holds as long as it lives is free. A
        process that is not seen proves nothing: it may be in a container, or another user's.
        """
        state = self.info.get("state", "unknown")
        if state != RUNNING:
            return state if state in END_STATES else "unknown"
        silent = time.time() - self._modified if self._modified else 0.0
        if silent > self.QUIET_SECONDS and self._lock_is_free():
            return "crashed"
        return "stalled" if silent > max(self.STALLED_SECONDS, 20 * self._seconds_per_step()) else RUNNING

    def _lock_is_free(self) -> bool:
        """Whether the run let go of its lock; False where that cannot be known, as on another machine."""
        here = machine()
        same_machine = any(here[name] is not None and self.info.get(name) == here[name] for name in here)
        return bool(self.info.get("locked")) and same_machine and is_locked(self.path / LOCK) is False

    def _seconds_per_step(self) -> float:
        elapsed = self.columns["elapsed_seconds"][-50:]
        with np.errstate(all="ignore"):  # a damaged log holds any numbers
            return float(np.median(np.diff(elapsed))) if len(elapsed) > 1 else 0.0
