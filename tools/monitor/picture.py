"""What the plot shows of the selected and the pinned runs: from options to a legend and a picture."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from rich.style import Style

from feste import terminal as text

from .curve import Axes, Picture, Row, Series, View, draw, message
from .numbers import finite, smooth, ticks, time_ticks, value_at
from .runs import FollowedRun

SPANS = (1, 10, 50, 250)  # rows in the moving average
LINES = ("both", "validation", "training")
AXES = ("step", "time", "tokens")
METRICS = {"loss": "train_loss", "learning rate": "learning_rate", "gradient norm": "grad_norm",
           "tokens per second": "tokens_per_second"}
NAMES_WIDTH = 80
NOISY = ("loss", "gradient norm", "tokens per second")  # what is smoothed
SWITCH = "switch"  # what a click on a run's name is known by
VAL_GLYPH, BEST_GLYPH = "○", "★"


@dataclass
class Options:
    """How the curve is looked at."""

    view: View = field(default_factory=View)
    axis: str = "step"
    log: bool = False
    span: int = 10
    lines: str = "both"
    metric: str = "loss"
    cursor: float | None = None
    hidden: frozenset[str] = frozenset()  # keys of the runs whose curves are switched off

    @property
    def smooths(self) -> bool:
        return self.span > 1 and self.metric in NOISY

    def describe(self) -> str:
        words = [self.metric]
        if self.metric == "loss" and self.lines != "both":
            words.append(f"{self.lines} only")
        words += [f"by {self.axis}", "log" if self.log else "", f"mean of {self.span}" if self.smooths else "raw"]
        if self.view.span is not None:
            words.append("zoomed" + (", following" if self.view.end is None else ""))
        return "  ".join(word for word in words if word)


def x_of(run: FollowedRun, axis: str) -> np.ndarray:
    """Steps, seconds, or tokens seen, which are NaN if run.json does not tell how many a step has."""
    if axis == "tokens":
        return run.columns["step"] * (run.summary.tokens_per_step or np.nan)
    return run.columns["step" if axis == "step" else "elapsed_seconds"]


def extent(runs: list[FollowedRun], axis: str) -> tuple[float, float]:
    """The first and the last x of some runs."""
    ends = []
    for run in runs:
        x = x_of(run, axis)
        if len(x) and not (np.isfinite(x[0]) and np.isfinite(x[-1])):
            x = x[np.isfinite(x)]
        if len(x):
            ends += [float(x[0]), float(x[-1])]
    return (min(ends), max(ends)) if ends else (0.0, 1.0)


def convert(options: Options, run: FollowedRun, axis: str) -> None:
    """Change the x axis; the same part of the run stays in view."""
    old, new = finite(x_of(run, options.axis), x_of(run, axis))
    view, options.axis = options.view, axis
    if not len(old) or view.span is None:
        options.view, options.cursor = View(), None
        return
    x0, x1 = np.interp(view.bounds(float(old[0]), float(old[-1])), old, new).tolist()
    options.view = View(x1 - x0, None if view.end is None else x1) if x1 > x0 else View()
    options.cursor = None


def picture(run: FollowedRun, pinned: list[FollowedRun], options: Options, width: int,
            height: int) -> tuple[Row, Picture]:
    """A legend and the curves of a run over those of the pinned ones."""
    others = [other for other in pinned if other is not run]
    seen = [one for one in [*others, run] if one.key not in options.hidden]
    x0, x1 = options.view.bounds(*extent(seen or [run], options.axis))
    if not len(run.columns["step"]) and not others:
        return [], message("no rows yet", width, height)
    series = [line for one in seen for line in _series(one, options, x0, x1, alone=not others, main=one is run)]
    losses = options.metric == "loss"
    time = options.axis == "time"
    levels, points = _ln_v(run) if losses else (), _best(run, options) if losses and run in seen else ()
    axes = Axes(x0, x1, options.log, text.duration if time else text.compact, time_ticks if time else ticks,
                levels, points, options.cursor)
    legend = _read_out(seen[::-1], options) if options.cursor is not None else _legend(run, others, options, width)
    return legend, draw(series, axes, width, height)


def _series(run: FollowedRun, options: Options, x0: float, x1: float, alone: bool, main: bool) -> list[Series]:
    """The curves of a run. Of a pinned one, only one, with the run's marker on it."""
    x, made = x_of(run, options.axis), []
    val = finite(x, run.columns["val_loss"]) if options.metric == "loss" and options.lines != "training" else ((), ())
    show_val = len(val[0]) > 0
    show_train = options.metric != "loss" or options.lines != "validation"
    if show_train and (main or not show_val):
        points = finite(x, run.columns[METRICS[options.metric]])
        if options.smooths:
            if main:
                made.append(Series(*points, f"{run.colour} dim", joined=False))
            points = smooth(*points, options.span, x0, x1)
        made.append(Series(*points, run.colour, "" if main else run.marker))
    if show_val:
        made.append(Series(*val, "bold" if alone else f"bold {run.colour}", VAL_GLYPH if alone else run.marker))
    return made


def _ln_v(run: FollowedRun) -> tuple[tuple[float, str], ...]:
    """The loss of a model that knows nothing: every token of the vocabulary is as likely."""
    size = run.summary.vocabulary_size
    return ((float(np.log(size)), f"ln V = {np.log(size):.2f}"),) if size else ()


def _best(run: FollowedRun, options: Options) -> tuple[tuple[float, float, str, str], ...]:
    s = run.summary
    if s.best_val_loss is None or options.lines == "training":
        return ()
    place = int(np.searchsorted(run.columns["step"], s.best_step))
    x = x_of(run, options.axis)
    return ((float(x[place]), s.best_val_loss, BEST_GLYPH, "bold"),) if place < len(x) else ()


def _legend(run: FollowedRun, others: list[FollowedRun], options: Options, width: int) -> Row:
    if options.metric != "loss":
        return _latest(run, others, options.metric, names=width >= NAMES_WIDTH)
    row: Row = [("━ training ", run.colour)]
    row.append((f"{run.marker} validation", f"bold {run.colour}") if others else (f"{VAL_GLYPH} validation", "bold"))
    if run.summary.best_val_loss is not None:
        row.append((f" {BEST_GLYPH} best {run.summary.best_val_loss:.4f} at {run.summary.best_step:,}", "bold"))
    named = [run] * (run.key in options.hidden) + others
    return row + [piece for one in named for piece in _switch(one, options)]


def _switch(run: FollowedRun, options: Options) -> Row:
    """A run's name over the curves; a click on it takes its curve away, or brings it back."""
    off, click = run.key in options.hidden, Style.from_meta({SWITCH: run.key})
    return [("  ", ""), (f"{run.marker} {text.shorten(run.name, 24)}{' (off)' if off else ''}",
                         (Style(dim=True) if off else Style.parse(run.colour)) + click)]


def _latest(run: FollowedRun, others: list[FollowedRun], metric: str, names: bool) -> Row:
    """The newest value of a metric in each run; in a small plot, the run list has the names to the markers."""
    row: Row = [(metric, "bold")]
    for one in [run, *others]:
        name = f" {text.shorten(one.name, 24)}" if names else ""
        row.append((f"  {one.marker}{name} {text.figure(getattr(one.summary, METRICS[metric]))}", one.colour))
    return row


def _read_out(runs: list[FollowedRun], options: Options) -> Row:
    """The values nearest to the reading line, a dash where a run does not reach it."""
    at, losses = options.cursor, options.metric == "loss"
    names = {"step": f"step {at:,.0f}", "time": text.duration(at), "tokens": f"{at:,.0f} tokens"}
    row: Row = [(names[options.axis] if losses else f"{options.metric}, {names[options.axis]}", "bold")]
    for one in runs:
        x, (low, high) = x_of(one, options.axis), extent([one], options.axis)
        columns = [METRICS[options.metric]] + ["val_loss"] * losses
        values = [value_at(*finite(x, one.columns[name]), at) if low <= at <= high else None for name in columns]
        words = "  val ".join(text.number(value) if losses else text.figure(value) for value in values)
        row.append((f"  {one.marker} {'train ' if losses else ''}{words}", one.colour))
    return row
