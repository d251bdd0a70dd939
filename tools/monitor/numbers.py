"""What curves are made of: finite points, fewer points, smooth points, round numbers. Pure functions of arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

BLOCKS = "▁▂▃▄▅▆▇█"
POOL_LIMIT = 8000  # more values than this are averaged in groups before they are smoothed
HUGE = 1e290  # numbers beyond count as infinite, so that sums and differences of others are finite


@dataclass(frozen=True)
class Columns:
    """A curve reduced to dot columns: where they are, and the last value and the extremes in each."""

    place: np.ndarray
    last: np.ndarray
    low: np.ndarray
    high: np.ndarray


def finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points whose two coordinates are numbers, with x made ascending (a clock may have been set back)."""
    if len(x) and not (_ascends(x) and y.min() > -HUGE and y.max() < HUGE):  # a NaN makes any comparison false
        keep = (x > -HUGE) & (x < HUGE) & (y > -HUGE) & (y < HUGE)
        x, y = np.maximum.accumulate(x[keep]), y[keep]
    return x, y


def _ascends(x: np.ndarray) -> bool:
    """Whether x is in order and its ends are numbers, so that all of it are. In one pass: a million take a while."""
    return bool((x[1:] >= x[:-1]).all()) and x[0] > -HUGE and x[-1] < HUGE


def decimate(x: np.ndarray, y: np.ndarray, x0: float, x1: float, columns: int) -> Columns:
    """Points with x0 <= x <= x1 in ascending x, by column. No extreme is lost."""
    begin, end = np.searchsorted(x, x0, "left"), np.searchsorted(x, x1, "right")
    x, y = x[begin:end], y[begin:end]
    edges = np.searchsorted(x, x0 + (x1 - x0) * np.arange(1, columns) / columns, "left")
    starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(x)]])
    place = np.flatnonzero(ends > starts)
    starts, ends = starts[place], ends[place]
    if not len(place):
        return Columns(place, y, y, y)
    return Columns(place, y[ends - 1], np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))


def pool(x: np.ndarray, y: np.ndarray, limit: int = POOL_LIMIT) -> tuple[np.ndarray, np.ndarray, int]:
    """At most limit points: the means of groups of equal size, each at its last x; and the size of a group."""
    size = -(-len(y) // limit) if len(y) else 1
    if size == 1:
        return x, y, 1
    starts = np.arange(0, len(y), size)
    ends = np.minimum(starts + size, len(y))
    return x[ends - 1], np.add.reduceat(y, starts) / (ends - starts), size


def ema(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential moving average with decay 1 - 1/span, without the bias towards zero of its start."""
    if span <= 1 or not len(values):
        return values
    keep = 1.0 - 1.0 / span
    sums = np.fromiter(accumulate((values * (1.0 - keep)).tolist(), lambda old, new: old * keep + new), float)
    return sums / -np.expm1(np.arange(1, len(values) + 1) * math.log(keep))


def smooth(x: np.ndarray, y: np.ndarray, span: float, x0: float, x1: float) -> tuple[np.ndarray, np.ndarray]:
    """A centred mean over about span points where x0 <= x <= x1: an EMA forwards, and then one backwards.

    One alone lags: while a loss falls, it lies above every point. What lies up to five spans outside takes part.
    """
    margin = math.ceil(5 * span)
    begin = max(0, int(np.searchsorted(x, x0, "left")) - margin)
    end = int(np.searchsorted(x, x1, "right")) + margin
    x, y, size = pool(x[begin:end], y[begin:end])
    if len(y) and y.min() < y.max():  # of a level line, only rounding errors would be seen
        y = ema(ema(y, span / size / 2)[::-1], span / size / 2)[::-1]
    keep = slice(np.searchsorted(x, x0, "left"), np.searchsorted(x, x1, "right"))
    return x[keep], y[keep]


def value_at(x: np.ndarray, y: np.ndarray, place: float) -> float | None:
    """The value at the point nearest to a place, of points in ascending x."""
    if not len(x):
        return None
    right = min(int(np.searchsorted(x, place)), len(x) - 1)
    left = max(0, right - 1)
    return float(y[left if abs(x[left] - place) <= abs(x[right] - place) else right])


def sparkline(values: np.ndarray, width: int) -> str:
    """One row of blocks, each the mean of its share of the finite values.

    The highest tenth has the same block, so that the fall at the start leaves some for the rest of a run.
    """
    values = finite(np.arange(len(values)), values)[1]
    if not len(values) or width < 1:
        return ""
    starts = np.unique(np.arange(width) * len(values) // width)
    means = np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
    low, high = float(means.min()), float(np.quantile(means, 0.9))
    levels = np.minimum((means - low) / (high - low or 1.0), 1.0) * (len(BLOCKS) - 1)
    return "".join(BLOCKS[int(level)] for level in np.rint(levels))


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round values in a range, 1, 2 or 5 times a power of ten apart."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low or most < 1:
        return []
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.ceil(low / (step * factor) - 1e-9), math.floor(high / (step * factor) + 1e-9)
        if last - first < most:
            return [i * step * factor for i in range(first, last + 1)]
    return []


def time_ticks(low: float, high: float, most: int) -> list[float]:
    """Round times in seconds."""
    for step in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 604800):
        first, last = math.ceil(low / step), math.floor(high / step)
        if high - low > 4 and last - first < most:
            return [float(i * step) for i in range(first, last + 1)]
    return ticks(low, high, most)
