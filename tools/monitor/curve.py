"""Curves as characters: from points to rows of styled text.

A cell of the terminal holds 2 x 4 braille dots, so a plot area of w x h cells is a grid of 2w x 4h dots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np

from .numbers import HUGE, Columns, decimate, ticks

BRAILLE_BITS = np.array([[1, 8], [2, 16], [4, 32], [64, 128]], np.uint8)  # rows from the top, columns from the left
LABEL_WIDTH = 9
DIM = "dim"

Row = list[tuple[str, str]]  # (text, style)


# ---- the part of a run that is in view ---------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How much of the x axis is shown: span None is all of it, end None follows the newest point."""

    span: float | None = None
    end: float | None = None

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        end = high if self.end is None else min(self.end, high)
        if self.span is None or self.span >= high - low:
            return low, high
        start = max(low, end - self.span)
        return start, start + self.span

    def zoom(self, factor: float, low: float, high: float, at: float | None = None) -> View:
        """Show factor times as much, about a place (default: the newest point if it is followed, or the middle)."""
        x0, x1 = self.bounds(low, high)
        span = max((x1 - x0) * factor, (high - low) / 1e6)
        if span >= high - low:
            return View()
        if at is None and self.end is None:
            return View(span)
        at = (x0 + x1) / 2 if at is None else at
        return View(span, at)._within(at - (at - x0) * span / ((x1 - x0) or 1.0), low, high)

    def pan(self, fraction: float, low: float, high: float) -> View:
        """Move by a fraction of what is shown; at the newest point, it is followed."""
        if self.span is None:
            return self
        x0, x1 = self.bounds(low, high)
        return self._within(x0 + fraction * (x1 - x0), low, high)

    def _within(self, start: float, low: float, high: float) -> View:
        end = max(start, low) + self.span
        return View(self.span, None if end >= high else end)


# ---- drawing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A curve. With a glyph, that character stands at its points, or here and there if there are many.

    Points that are not joined are told from a line without any colour.
    """

    x: np.ndarray
    y: np.ndarray
    style: str
    glyph: str = ""
    joined: bool = True


@dataclass(frozen=True)
class Axes:
    """What a plot shows beside its curves."""

    x0: float
    x1: float
    log: bool = False
    x_text: Callable[[float], str] = str
    x_ticks: Callable[[float, float, int], list[float]] = ticks
    levels: tuple[tuple[float, str], ...] = ()  # horizontal lines: y, label
    points: tuple[tuple[float, float, str, str], ...] = ()  # x, y, glyph, style
    cursor: float | None = None


@dataclass
class Picture:
    """Rows of styled text, and where the plot area is in them."""

    rows: list[Row]
    x0: float = 0.0
    x1: float = 1.0
    left: int = 0
    width: int = 1
    y0: float = field(default=math.nan)
    y1: float = field(default=math.nan)

    def x_at(self, column: int) -> float:
        """The x at the middle of a column of cells."""
        inside = min(max(column - self.left, 0), self.width - 1)
        return self.x0 + (self.x1 - self.x0) * (inside + 0.5) / self.width

    def __str__(self) -> str:
        return "\n".join("".join(text for text, _ in row) for row in self.rows)


def message(text: str, width: int, height: int) -> Picture:
    """A text in the middle of an empty picture."""
    rows: list[Row] = [[(" " * width, "")] for _ in range(height)]
    if height:
        rows[height // 2] = [(text[:width].center(width), DIM)]
    return Picture(rows)


def draw(series: list[Series], axes: Axes, width: int, height: int) -> Picture:
    """Plot curves in ascending x, the later ones over the earlier ones."""
    wide, high = width - LABEL_WIDTH - 1, height - 2
    if wide < 10 or high < 2:
        return message("too small", width, height)
    if not axes.x1 > axes.x0:
        half = max(0.5, 1e-6 * abs(axes.x0))
        axes = Axes(**(vars(axes) | {"x0": axes.x0 - half, "x1": axes.x0 + half}))
    reduced = [_reduce(s, axes, 2 * wide) for s in series]
    scale = math.log10 if axes.log else float
    limits = _limits(reduced, [scale(y) for y, _ in axes.levels if y > 0 or not axes.log])
    if limits is None:
        return message("no values here yet", width, height)
    canvas = Canvas(wide, high, axes.x0, axes.x1, *limits)
    for y, label in axes.levels:
        if not axes.log or y > 0:
            canvas.level(scale(y), label)
    for s, columns in zip(series, reduced, strict=True):
        (canvas.curve if s.joined else canvas.dots)(columns, s.style)
    if axes.cursor is not None:
        canvas.vertical(axes.cursor)
    for s, columns in zip(series, reduced, strict=True):
        canvas.glyphs(columns, s.glyph, s.style)
    for x, y, glyph, style in axes.points:
        if not axes.log or y > 0:
            canvas.point(x, scale(y), glyph, style)
    return _frame(canvas, axes, limits)


def _reduce(s: Series, axes: Axes, columns: int) -> Columns:
    """The dot columns of a curve, of its logarithm if that is asked for."""
    if not axes.log:
        return decimate(s.x, s.y, axes.x0, axes.x1, columns)
    x, y = s.x, s.y
    if len(y) and y.min() <= 0:
        x, y = x[y > 0], y[y > 0]
    made = decimate(x, y, axes.x0, axes.x1, columns)
    return Columns(made.place, np.log10(made.last), np.log10(made.low), np.log10(made.high))


def _limits(reduced: list[Columns], levels: list[float]) -> tuple[float, float] | None:
    """The range of the y axis. A few spikes far above all else do not flatten the rest; a level just above is shown."""
    if not any(len(columns.place) for columns in reduced):
        return None
    low = min(float(columns.low.min()) for columns in reduced if len(columns.place))
    highs = np.concatenate([columns.high for columns in reduced])
    high, usual = float(highs.max()), float(np.quantile(highs, 0.98))
    if len(highs) > 20 and high > usual + 1.5 * (usual - low):
        high = usual + 0.1 * (usual - low)
    high = max([high, *(level for level in levels if level <= high + 0.25 * (high - low))])
    margin = 0.02 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


class Canvas:
    """A grid of cells: braille dots, glyphs over them, and a style for each cell."""

    def __init__(self, width: int, height: int, x0: float, x1: float, y0: float, y1: float) -> None:
        self.width, self.height, self.x0, self.x1, self.y0, self.y1 = width, height, x0, x1, y0, y1
        self._bits = np.zeros((height, width), np.uint8)
        self._style = np.zeros((height, width), np.intp)
        self._styles = [""]
        self._over: dict[tuple[int, int], tuple[str, str]] = {}
        self._under: dict[tuple[int, int], tuple[str, str]] = {}

    def dot_row(self, y: np.ndarray) -> np.ndarray:
        """The dot row of values, the top row where they are beyond it."""
        last = 4 * self.height - 1
        return np.clip(np.rint((self.y1 - y) / (self.y1 - self.y0) * last), 0, last).astype(int)

    def curve(self, columns: Columns, style: str) -> None:
        """Vertical strokes between the extremes of each column, joined by lines."""
        if not len(columns.place):
            return
        begin, end = int(columns.place[0]), int(columns.place[-1]) + 1
        line = np.interp(np.arange(begin, end), columns.place, self.dot_row(columns.last)).astype(int)
        top, bottom = line, line.copy()
        top[columns.place - begin] = self.dot_row(columns.high)
        bottom[columns.place - begin] = self.dot_row(columns.low)
        left, right = slice(None, -1), slice(1, None)
        falls, rises = top[right] > bottom[left], bottom[right] < top[left]
        middle = np.where(falls, bottom[left] + top[right], top[left] + bottom[right]) // 2
        above, below = middle + rises, middle + falls  # the two sides meet at the middle row
        joined_top, joined_bottom = top.copy(), bottom.copy()
        joined_bottom[left][falls] = np.maximum(bottom[left], middle)[falls]
        joined_top[right][falls] = np.minimum(top[right], below)[falls]
        joined_top[left][rises] = np.minimum(top[left], above)[rises]
        joined_bottom[right][rises] = np.maximum(joined_bottom[right], middle)[rises]
        rows = np.arange(4 * self.height)[:, None]
        dots = np.zeros((4 * self.height, 2 * self.width), bool)
        dots[:, begin:end] = (rows >= joined_top) & (rows <= joined_bottom)
        self._add(dots, style)

    def dots(self, columns: Columns, style: str) -> None:
        """The last value and the extremes of each column."""
        dots = np.zeros((4 * self.height, 2 * self.width), bool)
        for values in (columns.last, columns.low, columns.high):
            dots[self.dot_row(values), columns.place] = True
        self._add(dots, style)

    def _add(self, dots: np.ndarray, style: str) -> None:
        cells = dots.reshape(self.height, 4, self.width, 2) * BRAILLE_BITS[None, :, None, :]
        bits = cells.sum((1, 3), dtype=np.uint8)
        self._bits |= bits
        self._styles.append(style)
        self._style[bits > 0] = len(self._styles) - 1

    def glyphs(self, columns: Columns, glyph: str, style: str) -> None:
        if not glyph or not len(columns.place):
            return
        apart = 3 if len(columns.place) <= self.width / 3 else max(3, self.width // 8)
        rows, taken = self.dot_row(columns.last) // 4, -apart
        for place, row in zip((columns.place // 2).tolist(), rows.tolist(), strict=True):
            if place - taken >= apart:
                self._over[row, place] = (glyph, style)
                taken = place

    def point(self, x: float, y: float, glyph: str, style: str) -> None:
        if self.x0 <= x <= self.x1 and abs(y) < HUGE:
            column = min(int((x - self.x0) / (self.x1 - self.x0) * self.width), self.width - 1)
            self._over[int(self.dot_row(np.array(y))) // 4, column] = (glyph, style)

    def level(self, y: float, label: str) -> None:
        """A dashed horizontal line where no curve is, with a label at its right end."""
        if not self.y0 <= y <= self.y1:
            return
        row = int(self.dot_row(np.array(y))) // 4
        text = "╌" * (self.width - len(label) - 1) + " " + label
        for column, character in enumerate(text[-self.width:]):
            self._under[row, column] = (character, DIM)

    def vertical(self, x: float) -> None:
        if self.x0 <= x <= self.x1:
            column = min(int((x - self.x0) / (self.x1 - self.x0) * self.width), self.width - 1)
            for row in range(self.height):
                self._over[row, column] = ("│", "reverse")

    def rows(self) -> list[Row]:
        return [self._row(row) for row in range(self.height)]

    def _row(self, row: int) -> Row:
        cells = []
        for column, (bits, style) in enumerate(zip(self._bits[row].tolist(), self._style[row].tolist(), strict=True)):
            place = (row, column)
            if place in self._over:
                cells.append(self._over[place])
            elif bits:
                cells.append((chr(0x2800 + bits), self._styles[style]))
            else:
                cells.append(self._under.get(place, (" ", "")))
        return [("".join(text for text, _ in group), style) for style, group in groupby(cells, lambda cell: cell[1])]


def _frame(canvas: Canvas, axes: Axes, limits: tuple[float, float]) -> Picture:
    """A canvas with its axes."""
    y_labels = _y_labels(canvas, axes.log, limits)
    rows: list[Row] = []
    for row, cells in enumerate(canvas.rows()):
        label = y_labels.get(row, "")
        rows.append([(label.rjust(LABEL_WIDTH - 1) + " ", DIM), ("┤" if label else "│", DIM), *cells])
    places = [(min(round((x - axes.x0) / (axes.x1 - axes.x0) * canvas.width), canvas.width - 1), axes.x_text(x))
              for x in axes.x_ticks(axes.x0, axes.x1, max(2, canvas.width // 14))]
    line, labels = ["─"] * canvas.width, [" "] * (canvas.width + LABEL_WIDTH + 1)
    free = 0
    for column, text in places:
        line[column] = "┬"
        at = min(max(column + LABEL_WIDTH + 1 - len(text) // 2, 0), len(labels) - len(text))
        if at >= free and text:
            labels[at:at + len(text)] = text
            free = at + len(text) + 1
    rows.append([(" " * LABEL_WIDTH + "└" + "".join(line), DIM)])
    rows.append([("".join(labels), DIM)])
    y0, y1 = (10.0 ** limits[0], 10.0 ** limits[1]) if axes.log else limits
    return Picture(rows, axes.x0, axes.x1, LABEL_WIDTH + 1, canvas.width, y0, y1)


def _y_labels(canvas: Canvas, log: bool, limits: tuple[float, float]) -> dict[int, str]:
    most = max(2, min(5, canvas.height // 2), canvas.height // 4)
    if log:
        values = ticks(10.0 ** limits[0], 10.0 ** limits[1], most) if limits[1] - limits[0] < 1.5 else [
            10.0 ** power for power in ticks(*limits, most)]
        places = [(math.log10(value), value) for value in values if value > 0]
    else:
        places = [(value, value) for value in ticks(*limits, most)]
    step = min((b[1] - a[1] for a, b in pairwise(places)), default=0.0)
    return {int(canvas.dot_row(np.array(place))) // 4: _label(value, step) for place, value in places}


def _label(value: float, step: float) -> str:
    """A value with as many decimals as tell it from its neighbours."""
    decimals = min(6, max(0, -math.floor(math.log10(step) + 1e-9))) if step > 0 else 3
    plain = [f"{value:,.{decimals}f}" if step > 0 else f"{value:.4g}"]
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        plain = []
    forms = [*plain, *(f"{value:.{digits}e}" for digits in (2, 1, 0))]
    return next(form for form in forms if len(form) < LABEL_WIDTH)
