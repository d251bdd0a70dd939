"""The run directory: training_log.csv and run.json, their writer and their readers.

The monitor and the plots know a run only through this module, and it knows neither model nor kernels.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import platform
import socket
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

COLUMNS = ("step", "timestamp", "elapsed_seconds", "learning_rate", "train_loss", "val_loss", "train_perplexity",
           "val_perplexity", "grad_norm", "tokens_per_second", "sample")
LOG_NAME, INFO_NAME, LOCK_NAME = "training_log.csv", "run.json", ".lock"
FLUSH_SECONDS = 0.2
END_STATES = ("finished", "early_stopped", "interrupted", "failed")


class RunLogError(OSError):
    """The run directory cannot be written or is in use: one line with the remedy."""


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700.0 else math.inf


# ---- writing -----------------------------------------------------------------------------------------------


class RunLog:
    """Writes one run. A directory in use by another process is refused; the lock ends with the process.

    info goes into run.json beside what is known of the process. With resume_step, the directory is that of an
    earlier run: rows of later steps are dropped and the rest is kept.
    """

    def __init__(self, run_dir: str | os.PathLike, info: dict, resume_step: int | None = None) -> None:
        self.path = Path(run_dir)
        try:
            self.path.mkdir(parents=True, exist_ok=resume_step is not None)
            self._lock = _take_lock(self.path)
            if resume_step is not None:
                _drop_rows_after(self.path / LOG_NAME, resume_step)
            self._file = open(self.path / LOG_NAME, "a", encoding="utf-8", newline="")  # noqa: SIM115
        except FileExistsError:
            raise RunLogError(f"{self.path} exists; a run directory is never reused. Choose another --run-dir, "
                              "or continue that run with --resume") from None
        except OSError as error:
            raise self._error(error) from error
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._flushed = time.monotonic()
        self.info = info | {
            "state": "running", "reason": None, "pid": os.getpid(), "process_started": _process_start(os.getpid()),
            "host": socket.gethostname(), "started": _now(), "ended": None,
            "python": platform.python_version(), "numpy": np.__version__,
        }
        if self._file.tell() == 0:
            self._write(COLUMNS)
        self._write_info()
        self.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self.info["state"] == "running":
            self.close("failed", f"{kind.__name__}: {error}")
        else:
            self.close(self.info["state"] if self.info["state"] != "running" else "finished")

    def log(self, record: dict) -> None:
        """Append one row; a column that is missing or None stays empty."""
        get = record.get
        self._write([_cell(get(column)) for column in COLUMNS])
        if get("val_loss") is not None or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def _write(self, row) -> None:
        try:
            self._writer.writerow(row)
        except OSError as error:
            raise self._error(error) from error

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise self._error(error) from error
        self._flushed = time.monotonic()

    def update(self, **fields) -> None:
        """Change fields of run.json."""
        self.info |= fields
        self._write_info()

    def close(self, state: str, reason: str | None = None) -> None:
        """End the run with one of END_STATES. Closing twice changes nothing."""
        if self._file.closed:
            return
        self.info |= {"state": state, "reason": reason, "ended": _now()}
        try:
            self.flush()
            self._file.close()
            self._write_info()
        finally:
            os.close(self._lock)

    def _write_info(self) -> None:
        """Replace run.json as a whole."""
        temporary = self.path / f".{INFO_NAME}.{os.getpid()}"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(self.info, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / INFO_NAME)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> RunLogError:
        if isinstance(error, RunLogError):
            return error
        return RunLogError(f"cannot write the run directory {self.path}: {error.strerror or error}; free some disk "
                           "space, or choose a directory you may write with --run-dir")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _take_lock(directory: Path) -> int:
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise RunLogError(f"{directory} is in use by another training process; wait for it, or choose another "
                          "directory with --run-dir") from None
    return fd


def _drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows up to a step; the file is replaced as a whole. A torn last row is dropped too."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    rows = list(csv.reader(io.StringIO(text)))
    kept = [row for row in rows[1:] if len(row) == len(COLUMNS) and row[0].isdigit() and int(row[0]) <= step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept])
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot: tells a process from a later one with its number."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


# ---- reading -----------------------------------------------------------------------------------------------


def read_info(run_dir: str | os.PathLike) -> dict:
    """run.json, or an empty dictionary if there is none (yet) or it is not one."""
    try:
        info = json.loads(Path(run_dir, INFO_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def read_rows(run_dir: str | os.PathLike) -> list[dict]:
    """Every whole row of the log: numbers as int and float, empty cells left out."""
    rows = []
    with open(Path(run_dir, LOG_NAME), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if None in row.values():
                continue
            typed = {name: value if name in ("timestamp", "sample") else float(value)
                     for name, value in row.items() if value}
            rows.append(typed | {"step": int(row["step"])})
    return rows


class RunReader:
    """Follows a run as it is written. `poll` reads what is new; everything else is what was read so far.

    columns: name -> float64 array (NaN where a cell is empty), one entry for each step in ascending order.
    samples: (step, text). problems: what was wrong with the files, in words.
    A torn last row waits for its rest; a file that was truncated or replaced is read afresh; rows of a resumed
    run replace those of the same steps.
    """

    NUMERIC = tuple(name for name in COLUMNS if name not in ("timestamp", "sample"))
    STALLED_SECONDS = 120.0

    def __init__(self, run_dir: str | os.PathLike) -> None:
        self.path = Path(run_dir)
        self.info: dict = {}
        self._reset()

    def _reset(self) -> None:
        self._inode, self._offset, self._rest = None, 0, b""
        self._header: list[str] | None = None
        self._data = np.empty((1024, len(self.NUMERIC)))
        self._n = 0
        self._samples: list[tuple[int, str]] = []
        self.problems: list[str] = []
        self._modified = 0.0

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return {name: self._data[:self._n, i] for i, name in enumerate(self.NUMERIC)}

    @property
    def samples(self) -> list[tuple[int, str]]:
        return self._samples

    def poll(self) -> bool:
        """Read what has been written since the last call; True if anything changed."""
        info = read_info(self.path)
        changed = info != self.info and bool(info)
        self.info = info or self.info
        try:
            with open(self.path / LOG_NAME, "rb") as file:
                return self._follow(file) or changed
        except OSError:
            return changed

    def _follow(self, file) -> bool:
        status = os.fstat(file.fileno())
        if self._inode is not None and (status.st_ino != self._inode or status.st_size < self._offset):
            self._reset()
        self._inode, self._modified = status.st_ino, status.st_mtime
        if status.st_size == self._offset:
            return False
        file.seek(self._offset)
        new = file.read(status.st_size - self._offset)
        self._offset += len(new)
        self._take(self._rest + new)
        return True

    def _take(self, data: bytes) -> None:
        """Parse up to the last line end that no open quote runs across; keep the rest for later."""
        end = data.rfind(b"\n") + 1
        while end and data.count(b'"', 0, end) % 2:
            end = data.rfind(b"\n", 0, end - 1) + 1
        self._rest = data[end:]
        text = data[:end].decode("utf-8", errors="replace").replace("\0", "")
        for row in csv.reader(io.StringIO(text, newline="")):
            self._take_row(row)

    def _take_row(self, row: list[str]) -> None:
        if self._header is None:
            self._header = row
            missing = [name for name in COLUMNS if name not in row]
            if missing:
                self._problem(f"the log has no column {', '.join(missing)}")
            return
        cells = dict(zip(self._header, row, strict=False))
        try:
            step = int(cells["step"])
            values = [float(cells.get(name) or "nan") for name in self.NUMERIC]
        except (KeyError, ValueError):
            self._problem("the log has rows that are not feste's")
            return
        self._append(step, values)
        if cells.get("sample"):
            self._samples.append((step, cells["sample"]))

    def _append(self, step: int, values: list[float]) -> None:
        if self._n and step <= self._data[self._n - 1, 0]:  # a resumed run goes back
            self._n = int(np.searchsorted(self._data[:self._n, 0], step))
            self._samples = [sample for sample in self._samples if sample[0] < step]
        if self._n == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self._n] = values
        self._n += 1

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    @property
    def state(self) -> str:
        """How the run stands: one of END_STATES, running, stalled, crashed or unknown.

        Crashed needs evidence: run.json says running, on this host, and its process is gone.
        """
        state = self.info.get("state", "unknown")
        if state != "running":
            return state
        if self.info.get("host") == socket.gethostname() and not self._process_lives():
            return "crashed"
        silent = time.time() - self._modified if self._modified else 0.0
        return "stalled" if silent > max(self.STALLED_SECONDS, 20 * self._seconds_per_step()) else "running"

    def _process_lives(self) -> bool:
        pid, started = self.info.get("pid"), self.info.get("process_started")
        if not isinstance(pid, int) or started is None:
            return True
        return _process_start(pid) == started

    def _seconds_per_step(self) -> float:
        elapsed = self._data[max(0, self._n - 50):self._n, self.NUMERIC.index("elapsed_seconds")]
        return float(np.median(np.diff(elapsed))) if len(elapsed) > 1 else 0.0
