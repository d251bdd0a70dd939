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
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from feste.rows import COLUMNS, ascending, cells_of, number_of, parse_plain, record_end, without_samples

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

    info goes into run.json beside what is known of the process. With resume_step, an earlier run goes on: rows of
    later steps are dropped and the rest is kept. If that run is in another directory, origin, its files stay as
    they are, and run_dir must be new, as for a run from the beginning.
    """

    def __init__(self, run_dir: str | os.PathLike, info: dict, resume_step: int | None = None,
                 origin: str | os.PathLike | None = None) -> None:
        self.path = Path(run_dir)
        self._lock, self._file, self._flushed = None, None, time.monotonic()
        self.info = info | {
            "state": "running", "reason": None, "pid": os.getpid(), "process_started": _process_start(os.getpid()),
            "host": socket.gethostname(), "started": _now(), "ended": None,
            "python": platform.python_version(), "numpy": np.__version__,
        }
        try:
            self._open(resume_step, self.path if origin is None else Path(origin))
        except BaseException as error:
            self._release()
            if isinstance(error, FileExistsError):
                raise RunLogError(f"{self.path} exists; a run directory is never reused. Choose another --run-dir, "
                                  "or continue that run with --resume") from None
            if isinstance(error, OSError):
                raise self.error(error) from error
            raise

    def _open(self, resume_step: int | None, origin: Path) -> None:
        goes_on_here = resume_step is not None and origin.resolve() == self.path.resolve()
        self.path.mkdir(parents=True, exist_ok=goes_on_here)
        self._lock = _take_lock(self.path)
        if resume_step is not None:
            _copy_rows(origin / LOG_NAME, self.path / LOG_NAME, resume_step)
        self._file = open(self.path / LOG_NAME, "a", encoding="utf-8", newline="")  # noqa: SIM115
        self._writer = _csv_writer(self._file)
        if self._file.tell() == 0:
            self._write(COLUMNS)
        self._write_info()
        self.flush()

    def _release(self) -> None:
        """Let go of the log and the lock, whatever state they are in."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close("finished")
            return
        with suppress(RunLogError):  # the first error says what went wrong
            self.close("failed", f"{kind.__name__}: {error}")

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
            raise self.error(error) from error

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise self.error(error) from error
        self._flushed = time.monotonic()

    def update(self, **fields) -> None:
        """Change fields of run.json."""
        self.info |= fields
        self._write_info()

    def close(self, state: str, reason: str | None = None) -> None:
        """End the run with one of END_STATES. Closing twice changes nothing."""
        if self._lock is None:
            return
        failure = None
        try:
            self._file.close()
        except OSError as error:
            failure = self.error(error)
            state, reason = "failed", str(failure)
        self.info |= {"state": state, "reason": reason, "ended": _now()}
        try:
            self._write_info()
        finally:
            self._release()
        if failure is not None:
            raise failure

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
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self.error(error) from error

    def error(self, error: OSError) -> RunLogError:
        """An error of the file system as one line that names the directory and the remedy."""
        if isinstance(error, RunLogError):
            return error
        return RunLogError(f"cannot write the run directory {self.path}: {error.strerror or error}; free some disk "
                           "space, or choose a directory you may write with --run-dir")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Lines:
    """Ends each row with a line feed alone."""

    def __init__(self, file) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def _csv_writer(file):
    """A csv.writer that quotes carriage returns, which csv does only if they are part of its line end."""
    return csv.writer(_Lines(file))


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def require_free(run_dir: str | os.PathLike) -> None:
    """RunLogError if a process is training in the directory."""
    if Path(run_dir, LOCK_NAME).exists():
        os.close(_take_lock(Path(run_dir)))


def _take_lock(directory: Path) -> int:
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise RunLogError(f"{directory} is in use by another training process; wait for it, or choose another "
                          "directory with --run-dir") from None
    return fd


def _copy_rows(source: Path, path: Path, last: int) -> None:
    """A log of the rows of another, or of itself, up to a step. Replaced as a whole; a torn last row is dropped."""
    if not source.exists():
        return
    # A row may be torn within a character: bytes that are not UTF-8 go through unchanged.
    with open(source, encoding="utf-8", errors="surrogateescape", newline="") as file:
        text = file.read()
    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise RunLogError(f"{source} is damaged ({error}); rename it, and the resumed run begins a new one") from error
    kept = [row for row in rows[1:] if len(row) == len(COLUMNS) and row[0].isdigit() and int(row[0]) <= last]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        _csv_writer(file).writerows([COLUMNS, *kept])
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
    except (OSError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


def read_rows(run_dir: str | os.PathLike) -> list[dict]:
    """Every whole row of the log: numbers as int and float, empty cells left out."""
    data, rows, header, begin = Path(run_dir, LOG_NAME).read_bytes(), [], None, 0
    while end := record_end(data, begin):
        row, begin = cells_of(data[begin:end]), end
        if header is None:
            header = row
        elif row and len(row) == len(header):
            typed = {name: value if name in ("timestamp", "sample") else float(value)
                     for name, value in zip(header, row, strict=True) if value}
            rows.append(typed | {"step": int(typed["step"])})
    return rows


CHUNK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 20  # a quote still open after this much is damage and not a long sample


class RunReader:
    """Follows a run as it is written. `poll` reads what is new; everything else is what was read so far.

    names: which columns are kept, step first. columns: name -> float64 array (NaN where a cell is empty), one entry
    for each step in ascending order.
    samples: (step, text). problems: what was wrong with the files, in words. found: whether the directory holds a
    run.json or a log. behind: bytes of the log that are not read yet.
    A torn last row waits for its rest; a file that was truncated or replaced is read afresh; rows of a resumed
    run replace those of the same steps.
    """

    NUMERIC = tuple(name for name in COLUMNS if name not in ("timestamp", "sample"))
    STALLED_SECONDS = 120.0

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
            with open(self.path / LOG_NAME, "rb") as file:
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

        Crashed needs evidence: run.json says running, on this host, and its process is gone.
        """
        state = self.info.get("state", "unknown")
        if state != "running":
            return state if state in END_STATES else "unknown"
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
        elapsed = self.columns["elapsed_seconds"][-50:]
        with np.errstate(all="ignore"):  # a damaged log holds any numbers
            return float(np.median(np.diff(elapsed))) if len(elapsed) > 1 else 0.0
