"""Finding runs, following them, and what is known of each: no drawing, no terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from feste.runlog import INFO_NAME, LOG_NAME, RunReader

from feste import runlog
from feste.terminal import clean_line

# Told apart by most colour-blind eyes (after Okabe and Ito), and by the marker without any colour.
COLOURS = ("#56b4e9", "#e69f00", "#2fbf8f", "#cc79a7", "#e8dc4a", "#e2703a", "#8c9eff", "#a8a8a8")
MARKERS = "●■▲◆▼◉✚✖"
NAMES = ("step", "elapsed_seconds", "learning_rate", "train_loss", "val_loss", "grad_norm", "tokens_per_second")
SORTS = ("newest", "best loss", "name")
RECENT_ROWS = 50
POLL_BYTES = 4 << 20


@dataclass(frozen=True)
class Summary:
    """What is known of a run. None is unknown; times in seconds, losses in nats."""

    name: str
    path: str
    state: str = "unknown"
    reason: str | None = None
    started: str | None = None
    rows: int = 0
    step: int | None = None
    planned_steps: int | None = None
    elapsed_seconds: float | None = None
    seconds_left: float | None = None
    steps_per_second: float | None = None
    tokens_per_second: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    train_loss: float | None = None
    train_perplexity: float | None = None
    val_loss: float | None = None
    val_perplexity: float | None = None
    best_val_loss: float | None = None
    best_val_perplexity: float | None = None
    best_step: int | None = None
    lowest_train_loss: float | None = None
    vocabulary_size: int | None = None
    parameters: int | None = None
    tokens_per_step: int | None = None
    samples: int = 0
    problems: tuple[str, ...] = field(default=())

    @property
    def best_loss(self) -> float | None:
        """What runs are sorted by: the best validation loss, or else the lowest training loss."""
        return self.best_val_loss if self.best_val_loss is not None else self.lowest_train_loss

    @property
    def fraction(self) -> float | None:
        if self.step is None or not self.planned_steps:
            return None
        return min(1.0, self.step / self.planned_steps)


class Run:
    """A run that is followed. One thread may `poll`; what another one sees changes only when that one calls `take`.

    columns (see RunReader), samples: (step, text), and summary belong together. fresh: there is more to take.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.key = path, str(path)
        self.name = clean_line(path.resolve().name) or "run"
        self.colour, self.marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        self._reader = RunReader(path, NAMES)
        self._known: tuple | None = None
        self.fresh = True
        self._latest = (self._reader.columns, [], Summary(self.name, self.key, "waiting"))
        self.take()

    def poll(self) -> bool:
        """Read what is new, a bounded part of it; True if there is more to read at once."""
        changed = self._reader.poll(POLL_BYTES)
        known = (self._reader.state, self._reader.found)
        if changed or known != self._known:
            self._known = known
            columns, samples = self._reader.columns, list(self._reader.samples)
            with np.errstate(all="ignore"):  # damaged logs hold any numbers
                summary = summarise(self.name, self.key, self._reader, columns, len(samples))
            self._latest = (columns, samples, summary)
            self.fresh = True
        return self._reader.behind > 0

    def take(self) -> None:
        """See what has been read."""
        self.fresh = False  # first, so that what comes meanwhile is not missed
        self.columns, self.samples, self.summary = self._latest

    @property
    def info(self) -> dict:
        return self._reader.info


def state_of(reader: RunReader) -> str:
    """RunReader's state, or gone or waiting while there is no such directory."""
    if not reader.found:
        return "gone" if reader.info or len(reader.columns["step"]) else "waiting"
    return reader.state


def summarise(name: str, key: str, reader: RunReader, columns: dict[str, np.ndarray], samples: int) -> Summary:
    info, state = reader.info, state_of(reader)
    moving = state in ("running", "unknown")
    planned, step = _integer(info.get("planned_steps")), _last(columns["step"])
    step = None if step is None else int(step)
    train, val = _last(columns["train_loss"]), _last_finite(columns["val_loss"])
    best, best_at = _lowest(columns["val_loss"])
    pace = _steps_per_second(columns)
    model = info.get("model") if isinstance(info.get("model"), dict) else {}
    return Summary(
        name, key, state, _text(info.get("reason")), _text(info.get("started")), len(columns["step"]), step,
        planned, _last_finite(columns["elapsed_seconds"]),
        _seconds_left(columns, step, planned) if state == "running" else None,
        pace if moving or state in runlog.END_STATES else None, _median(columns["tokens_per_second"][-RECENT_ROWS:]),
        _last_finite(columns["learning_rate"]), _last(columns["grad_norm"]),
        train, _perplexity(train), val, _perplexity(val), best, _perplexity(best),
        None if best_at is None else int(columns["step"][best_at]), _lowest(columns["train_loss"])[0],
        _integer(model.get("vocab_size")), _integer(info.get("parameters")),
        _integer(info.get("tokens_per_step")), samples,
        tuple(map(clean_line, [*reader.problems, *_alerts(columns)])))


def _alerts(columns: dict[str, np.ndarray]) -> list[str]:
    """What in the numbers deserves a look."""
    alerts, loss = [], columns["train_loss"]
    bad = ~np.isfinite(loss)
    if len(loss) and bad.any() and not np.isnan(loss).all():
        at = int(columns["step"][np.flatnonzero(bad)[-1]])
        rows = "1 row" if bad.sum() == 1 else f"{bad.sum():,} rows"
        alerts.append(f"the loss is not finite in {rows}, last at step {at:,}")
    recent = loss[-200:][np.isfinite(loss[-200:])]
    if len(recent) >= RECENT_ROWS:
        usual = float(np.median(recent[:-1]))
        spread = float(np.median(np.abs(recent[:-1] - usual)))
        if recent[-1] > usual + 8 * spread + 0.1 * abs(usual):
            alerts.append(f"loss spike: {recent[-1]:.4g}, the median of recent rows is {usual:.4g}")
    return alerts


def _text(value) -> str | None:
    return None if value is None else clean_line(value)


def _integer(value) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1e15 else None


def _last(values: np.ndarray) -> float | None:
    """The last value, which may be Inf or NaN; None if there are none at all, as in a missing column."""
    return None if not len(values) or np.isnan(values[-RECENT_ROWS:]).all() else float(values[-1])


def _last_finite(values: np.ndarray) -> float | None:
    for begin in (-1000, 0):  # nearly always in the last rows
        places = np.flatnonzero(np.isfinite(values[begin:]))
        if len(places):
            return float(values[begin:][places[-1]])
    return None


def _lowest(values: np.ndarray) -> tuple[float | None, int | None]:
    if not len(values):
        return None, None
    low = np.fmin.reduce(values)  # without NaN, and without a copy
    if not math.isfinite(low):
        values = np.where(np.isfinite(values), values, math.nan)
        low = np.fmin.reduce(values)
    return (None, None) if math.isnan(low) else (float(low), int(np.argmax(values == low)))


def _median(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _steps_per_second(columns: dict[str, np.ndarray]) -> float | None:
    """Of a median row, so that validations and samples in between do not count."""
    seconds, steps = (np.diff(columns[name][-RECENT_ROWS - 1:]) for name in ("elapsed_seconds", "step"))
    pace = _median(seconds / steps)
    return 1.0 / pace if pace and pace > 0 else None


def _seconds_left(columns: dict[str, np.ndarray], step: int | None, planned: int | None) -> float | None:
    """At the mean pace of recent rows, validations and samples included."""
    elapsed, steps = columns["elapsed_seconds"][-4 * RECENT_ROWS:], columns["step"][-4 * RECENT_ROWS:]
    if step is None or planned is None or len(steps) < 2:
        return None
    left = (planned - step) * (elapsed[-1] - elapsed[0]) / (steps[-1] - steps[0])
    return float(left) if math.isfinite(left) and left >= 0 else None


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None or math.isnan(loss) else runlog.perplexity(loss)


class Watch:
    """The runs of some paths, each a run directory, a folder that holds some, or nothing yet."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [_directory(path) for path in paths]
        self.runs: dict[str, Run] = {}

    def scan(self) -> None:
        """Take up runs that have come. A run that has gone stays in the list."""
        for path in self.paths:
            for directory in _run_directories(path):
                key = str(directory)
                if key not in self.runs:
                    self.runs[key] = Run(directory, len(self.runs))

    def poll(self) -> bool:
        """Read what is new in every run; True if there is more to read at once."""
        return any([run.poll() for run in list(self.runs.values())])

    def read(self) -> list[Run]:
        """Everything there is now."""
        self.scan()
        while self.poll():
            pass
        self.take()
        return list(self.runs.values())

    @property
    def fresh(self) -> bool:
        return any(run.fresh for run in list(self.runs.values()))

    def take(self) -> None:
        """See what has been read."""
        for run in list(self.runs.values()):
            run.take()


def _directory(path: Path) -> Path:
    if path.name in (LOG_NAME, INFO_NAME):
        return path.parent
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is not a run directory; name the directory that holds its {LOG_NAME}")
    return path


def _is_run(path: Path) -> bool:
    return (path / LOG_NAME).exists() or (path / INFO_NAME).exists()


def _run_directories(path: Path) -> list[Path]:
    try:
        if _is_run(path):
            return [path]
        return sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
    except OSError:  # not there, not there any more, or not ours to read
        return []


def in_order(runs: list[Run], sort: str) -> list[Run]:
    """The runs by one of SORTS: what is running is newest; a run without a loss comes last."""
    runs = sorted(runs, key=lambda run: run.name)
    if sort == "newest":
        return sorted(runs, key=lambda run: (run.summary.state == "running", run.summary.started or ""), reverse=True)
    if sort == "best loss":
        return sorted(runs, key=lambda run: math.inf if run.summary.best_loss is None else run.summary.best_loss)
    return runs
