"""Runs as every tool knows them: where they are, how they stand, and what came of them. No drawing, no terminal.

A run is known by its directory alone; nothing here imports the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from feste.errors import FesteError
from feste.evaluation import in_bits_per_byte, perplexity
from feste.run.follow import RunReader, read_info
from feste.run.names import BEST, END_STATES, FINAL, INFO, LOG, is_run, periodic
from feste.terminal import clean_line

RECENT_ROWS = 50


class Run:
    """A run directory, as far as it has been read.

    name: of the directory, or what the caller says. columns and samples as in RunReader, whose `names` limits them.
    """

    def __init__(self, path: Path, name: str | None = None, names: tuple[str, ...] = RunReader.NUMERIC) -> None:
        self.path, self.key = path, str(path)
        self.name = clean_line(path.resolve().name if name is None else name) or "run"
        self.reader = RunReader(path, names)

    def __repr__(self) -> str:
        return f"Run({self.key!r})"

    @property
    def info(self) -> dict:
        return self.reader.info

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return self.reader.columns

    @property
    def samples(self) -> list[tuple[int, str]]:
        return self.reader.samples

    @property
    def summary(self) -> Summary:
        return summarise(self.name, self.key, self.reader, self.columns, len(self.samples))

    def configuration(self) -> dict:
        """The fields of the model and of the training, which have different names."""
        parts = (self.info.get("model"), self.info.get("train"))
        return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}

    def bits_per_byte(self, loss: float) -> float | None:
        """A validation loss of the run as bits per byte, if its run.json tells how long the tokens are."""
        return _bits_per_byte(self.info, loss)

    def best(self) -> tuple[float, int] | None:
        """The least validation loss and its step."""
        loss, at = _lowest(self.columns["val_loss"])
        return None if loss is None else (loss, int(self.columns["step"][at]))


# ---- where they are ----------------------------------------------------------------------------------------


def directory_of(path: Path) -> Path:
    """The directory a path means, which may be that of a log; FesteError for another file."""
    if path.name in (LOG, INFO):
        return path.parent
    if path.exists() and not path.is_dir():
        raise FesteError(f"{path} is not a run directory; name the directory that holds its {LOG}", "runs")
    return path


def run_directories(path: Path) -> list[Path]:
    """The run that a directory is, or the runs that lie in it, by name."""
    try:
        if is_run(path):
            return [path]
        return sorted(child for child in path.iterdir() if child.is_dir() and is_run(child))
    except OSError:  # not there, not there any more, or not ours to read
        return []


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The directories of the runs that some paths mean, each a run or a folder of runs; FesteError if it is neither."""
    found: list[Path] = []
    for path in map(Path, paths):
        if len(paths) > 1 and path.is_file() and path.name not in (LOG, INFO):
            continue  # data/* names texts too
        inside = run_directories(directory_of(path))
        if not inside:
            raise FesteError(f"{path} is no run directory: it has no {LOG}, and no directory in it has one", "runs")
        found += inside
    if not found:
        raise FesteError(f"none of {', '.join(map(str, paths))} is a run directory", "runs")
    return found


def open_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read the runs that some paths mean, of a folder those that have a step. FesteError for a path without any."""
    found, named = find_runs(paths), {directory_of(Path(path)) for path in paths}
    short = [path.absolute().name for path in found]
    runs = [Run(path, name if short.count(name) == 1 else str(path)) for path, name in zip(found, short, strict=True)]
    for run in runs:
        run.reader.poll()
    begun = [run for run in runs if len(run.columns["step"])]
    for run in runs:
        if run not in begun and (run.path in named or not begun):
            raise FesteError(f"{run.path} has no step in its {LOG} yet", "runs")
    return begun


def has_checkpoint(path: Path) -> bool:
    """Whether a directory holds a checkpoint, whole or not."""
    return bool(periodic(path)) or (path / BEST).exists() or (path / FINAL).exists()


def newest_with_checkpoint(paths: Sequence[str | Path]) -> tuple[Path, int]:
    """Of the runs that some paths mean the one that was started last and has a checkpoint; how many runs there are."""
    found = find_runs(paths)
    usable = [path for path in found if has_checkpoint(path)]
    if not usable:
        raise FesteError(f"none of {len(found)} runs holds a checkpoint yet", "runs")
    return max(usable, key=lambda path: (str(read_info(path).get("started") or ""), str(path))), len(found)


# ---- how they stand ----------------------------------------------------------------------------------------


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
    val_bits_per_byte: float | None = None
    best_bits_per_byte: float | None = None
    lowest_train_loss: float | None = None
    vocabulary_size: int | None = None
    parameters: int | None = None
    tokens_per_step: int | None = None
    samples: int = 0
    ranks: int | None = None
    waiting: float | None = None
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


def state_of(reader: RunReader) -> str:
    """RunReader's state, or gone or waiting while there is no such directory."""
    if not reader.found:
        return "gone" if reader.info or len(reader.columns["step"]) else "waiting"
    return reader.state


@np.errstate(all="ignore")  # damaged logs hold any numbers
def summarise(name: str, key: str, reader: RunReader, columns: dict[str, np.ndarray], samples: int) -> Summary:
    """What some columns of a run, and its run.json, come to."""
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
        pace if moving or state in END_STATES else None, _median(columns["tokens_per_second"][-RECENT_ROWS:]),
        _last_finite(columns["learning_rate"]), _last(columns["grad_norm"]),
        train, _perplexity(train), val, _perplexity(val), best, _perplexity(best),
        None if best_at is None else int(columns["step"][best_at]),
        _bits_per_byte(info, val), _bits_per_byte(info, best), _lowest(columns["train_loss"])[0],
        _integer(model.get("vocab_size")), _integer(info.get("parameters")),
        _integer(info.get("tokens_per_step")), samples, *_ranks(info),
        tuple(map(clean_line, [*reader.problems, *_alerts(columns)])))


def _ranks(info: dict) -> tuple[int | None, float | None]:
    """How many ranks train together, and the share of the time that the first one waits for others."""
    ranks, waiting = info.get("ranks"), info.get("waiting")
    known = isinstance(waiting, (int, float)) and not isinstance(waiting, bool) and 0 <= waiting <= 1
    return (len(ranks), waiting if known else None) if isinstance(ranks, list) and ranks else (None, None)


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


def _bits_per_byte(info: dict, loss: float | None) -> float | None:
    """A validation loss as bits per byte, where run.json tells how long the tokens are."""
    size = info.get("val_bytes_per_token")
    known = isinstance(size, (int, float)) and not isinstance(size, bool) and 0 < size < 1e6
    return in_bits_per_byte(loss, size) if known and loss is not None and math.isfinite(loss) else None


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None or math.isnan(loss) else perplexity(loss)
