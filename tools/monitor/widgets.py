"""The parts of the screen."""

from __future__ import annotations

from dataclasses import replace

from rich.style import Style
from rich.text import Text
from textual import events
from textual.message import Message
from textual.widget import Widget
from textual.widgets import DataTable, Input

from feste import terminal as text

from ..comparison import differences
from ..runs import Summary
from . import colours, summary
from .curve import Row
from .line import Line, same
from .numbers import sparkline
from .picture import SWITCH, Options, extent, picture
from .runs import FollowedRun

ROOM_FOR_NAMES = 26  # characters of the runs' names that settings leave in the table
WIDEST_DIAL = 16
ROOM_FOR_STEPS = 70  # characters of a line that says the step in full
STATE_WORDS = {"early_stopped": "early stop"}
# key, head, width; figures are on the right of their columns, and a gap is part of the width
WORDS = ("mark", "run", "state")
NARROW = (("mark", "", 4), ("run", "run", 0), ("state", "state", 11), ("done", "done", 6), ("loss", "train", 7),
          ("best", "best", 7), ("rate", "step/s", 7))
WIDE = (*NARROW[:3], ("done", "done", 7), ("loss", "train", 9), ("val", "val", 9), ("best", "best", 9),
        ("rate", "step/s", 9), ("tokens", "tok/s", 11), ("left", "left", 10), ("elapsed", "elapsed", 10),
        ("size", "parameters", 15))


def dials(runs: list[FollowedRun], room: int) -> dict[str, tuple[int, dict[str, str]]]:
    """Settings in which runs differ, as many as fit: name -> the width of its column, and key -> what the run has."""
    found: dict[str, tuple[int, dict[str, str]]] = {}
    for name, values in differences(runs).items() if room > 0 else ():
        words = ["-" if value is None else f"{value:g}" if isinstance(value, float) else text.clean_line(str(value))
                 for value in values]
        shown = {run.key: text.shorten(word, WIDEST_DIAL) for run, word in zip(runs, words, strict=True)}
        wide = max(map(len, (name, *shown.values()))) + 2
        if wide <= room:
            found[name] = wide, shown
            room -= wide
    return found


def joined(row: Row) -> Text:
    """Styled text from pieces; the text is never taken for markup."""
    return Text.assemble(*[(piece, style) for piece, style in row], no_wrap=True, overflow="ellipsis", end="")


class RunTable(DataTable):
    """The run list. The app says what is selected; the table only shows it and tells of clicks."""

    can_focus = False

    class Clicked(Message):
        """key: the run that was clicked, None for a column's head."""

        def __init__(self, key: str | None, column: str) -> None:
            super().__init__()
            self.key, self.column = key, column

    def __init__(self) -> None:
        super().__init__(id="runs", cursor_type="row", zebra_stripes=False, cell_padding=0)
        self._shown: tuple = ()
        self._dials: dict[str, tuple[int, dict[str, str]]] = {}

    def fill(self, runs: list[FollowedRun], selected: FollowedRun | None, marks: dict[str, str], width: int) -> None:
        """Show the runs in this order, with the mark that each has behind its own."""
        layout = (width, tuple((run.key, run.summary.started) for run in runs))
        if layout != self._shown:
            self._shown = layout
            self.clear(columns=True)
            columns = WIDE if width >= 130 else NARROW
            taken = sum(wide for _, _, wide in columns) + 1  # and a scroll bar
            self._dials = dials(runs, width - taken - ROOM_FOR_NAMES)
            columns = (*columns, *((name, name, wide) for name, (wide, _) in self._dials.items()))
            taken = sum(wide for _, _, wide in columns) + 1
            for key, head, wide in columns:
                self.add_column(Text(head, justify="left" if key in WORDS else "right"), key=key,
                                width=wide or min(max(8, width - taken), 60))
            for run in runs:
                self.add_row(*[""] * len(columns), key=run.key)
        for run in runs:
            name_width = self.columns["run"].width - 1
            cells = self._cells(run, run is selected, marks.get(run.key, " "), name_width)
            cells |= {name: Text(values[run.key], justify="right") for name, (_, values) in self._dials.items()}
            for key, cell in cells.items():
                if key in self.columns and not same(self.get_cell(run.key, key), cell):
                    self.update_cell(run.key, key, cell)
        if selected in runs and self.cursor_row != runs.index(selected):  # it scrolls there, so only when it has to
            self.move_cursor(row=runs.index(selected))

    @staticmethod
    def _cells(run: FollowedRun, selected: bool, mark: str, name_width: int) -> dict[str, Text]:
        s = run.summary
        done = text.compact(s.step) if s.fraction is None and s.step is not None else (
            text.UNKNOWN if s.fraction is None else f"{int(100 * s.fraction)} %")
        right = {"done": done, "loss": text.fitted(s.train_loss, 6), "val": text.fitted(s.val_loss, 6),
                 "best": text.fitted(s.best_loss, 6), "rate": text.rate(s.steps_per_second),
                 "tokens": text.rate(s.tokens_per_second), "left": text.duration(s.seconds_left),
                 "elapsed": text.duration(s.elapsed_seconds), "size": text.count(s.parameters)}
        return {"mark": Text(f"{'>' if selected else ' '}{run.marker}{mark}", run.colour),
                "run": Text(text.shorten(run.name, name_width), "bold" if selected else ""),
                "state": Text(STATE_WORDS.get(s.state, s.state), colours.palette.state(s.state)),
                **{key: Text(value, justify="right") for key, value in right.items()}}

    def on_click(self, event: events.Click) -> None:
        row, column = event.style.meta.get("row"), event.style.meta.get("column")
        if row is None or column is None or column < 0 or column >= len(self.columns):
            return
        key = None if row < 0 else self.ordered_rows[row].key.value
        self.post_message(self.Clicked(key, self.ordered_columns[column].key.value))


class Filter(Input):
    """Words that the names of the runs in the list must have, wherever. Shown while they are typed."""

    BINDINGS = [("escape", "put_away", "All runs")]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(id="filter", placeholder="words of a run's name", compact=True)
        self.display = False

    def open(self) -> None:
        self.display = True
        self.focus()

    def close(self) -> None:
        self.display = False
        self.app.set_focus(None)

    def action_put_away(self) -> None:
        self.value = ""
        self.close()

    def keeps(self, name: str) -> bool:
        """Whether a run of this name is to be seen."""
        return all(word in name.lower() for word in self.value.lower().split())


class Status(Line):
    """The numbers of the selected run."""

    _height = 0

    def show(self, run: FollowedRun, width: int, brief: bool = False) -> None:
        """brief: only the figures, a line each; what else there is stands in a line above."""
        s = run.summary
        if brief:
            self._put([joined([(line, "")]) for line in (summary.losses(s), summary.pace(s))], width)
            return
        head = joined([(f"{run.marker} {text.shorten(s.name, max(10, width - 34))}  ", f"bold {run.colour}"),
                       (summary.state(s), colours.palette.state(s.state) or "bold")])
        figures = [summary.losses(s), summary.pace(s)]
        if width >= sum(map(len, figures)) + 4:
            figures = ["    ".join(figures)]
        lines = [head, joined(self._bar(run, s, width)), *(joined([(line, "")]) for line in figures),
                 joined([("loss ", "dim"), (sparkline(run.columns["train_loss"], width - 5), run.colour)])]
        lines += [joined([(f"! {problem}", f"bold {colours.palette.warning}")])
                  for problem in [*s.problems[:3], run.warned] if problem]
        self._put(lines, width)

    def _put(self, lines: list[Text], width: int) -> None:
        """A line is cut where the screen ends, and does not take another's place."""
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        self.say(Text("\n", no_wrap=True).join(lines), layout=len(lines) != self._height)
        self._height = len(lines)

    @staticmethod
    def _bar(run: FollowedRun, s: Summary, width: int) -> Row:
        words = f" {summary.progress(s)}  {summary.times(s, both=width >= 100)}"
        wide = max(0, width - len(words))
        full = round((s.fraction or 0.0) * wide)
        return [("█" * full, run.colour), ("░" * (wide - full), "dim"), (words, "")]


class Plot(Widget):
    """The curve. Options are changed by the app's actions and by the mouse. With a metric of its own, it shows that."""

    ALLOW_SELECT = False
    can_focus = False

    class Changed(Message):
        """The options are others; more than one plot may show them."""

    class Named(Message):
        """The name of a run over the curves was clicked."""

        def __init__(self, key: str) -> None:
            super().__init__()
            self.key = key

    def __init__(self, id: str, metric: str | None = None) -> None:
        super().__init__(id=id)
        self.options = Options()
        self.metric = metric
        self.run: FollowedRun | None = None
        self.pinned: list[FollowedRun] = []
        self._picture = None
        self._shown: tuple = ()
        self._dragged: int | None = None

    def show(self, run: FollowedRun | None, pinned: list[FollowedRun], options: Options) -> None:
        self.run, self.pinned, self.options = run, pinned, options
        shown = ([one and (one.key, one.summary) for one in (run, *pinned)], replace(options), colours.palette)
        if shown != self._shown:  # a long run is not drawn again for nothing
            self._shown = shown
            self.refresh()

    def render(self) -> Text:
        if self.run is None:
            return Text("")
        options = self.options
        if self.metric:  # what the large plot shows already makes room for the loss
            options = replace(options, metric="loss" if options.metric == self.metric else self.metric)
        legend, self._picture = picture(self.run, self.pinned, options, self.size.width, self.size.height - 1)
        head = joined(legend)
        head.truncate(self.size.width, overflow="ellipsis")
        return Text("\n", no_wrap=True, end="").join([head, *map(joined, self._picture.rows)])

    def extent(self) -> tuple[float, float]:
        others = [run for run in self.pinned if run is not self.run]
        return extent([self.run, *others], self.options.axis) if self.run else (0.0, 1.0)

    def zoom(self, factor: float, at: float | None = None) -> None:
        self.options.view = self.options.view.zoom(factor, *self.extent(), self.options.cursor if at is None else at)
        self.post_message(self.Changed())

    def pan(self, fraction: float) -> None:
        self.options.view = self.options.view.pan(fraction, *self.extent())
        self.post_message(self.Changed())

    def move_cursor(self, cells: int) -> None:
        """Move the reading line; the first time, it comes at the right end."""
        if self._picture is None:
            return
        p, at = self._picture, self.options.cursor
        at = p.x1 if at is None else at + cells * (p.x1 - p.x0) / p.width
        self._read(min(max(at, p.x0), p.x1))

    def _read(self, at: float | None) -> None:
        self.options.cursor = at
        self.post_message(self.Changed())

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self._picture is None:
            return
        if self._dragged is not None:
            self.pan((self._dragged - event.x) / self._picture.width)
            self._dragged = event.x
        elif event.x >= self._picture.left:
            self._read(self._picture.x_at(event.x))

    def on_leave(self) -> None:
        self._read(None)

    def on_click(self, event: events.Click) -> None:
        if SWITCH in event.style.meta:
            self.post_message(self.Named(event.style.meta[SWITCH]))

    def on_mouse_down(self, event: events.MouseDown) -> None:
        self._dragged = event.x
        self.capture_mouse()

    def on_mouse_up(self) -> None:
        self._dragged = None
        self.release_mouse()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self._wheel(0.8, event)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self._wheel(1.25, event)

    def _wheel(self, factor: float, event: events.MouseEvent) -> None:
        event.stop()
        if self._picture is not None:
            self.zoom(factor, self._picture.x_at(event.x))


def summary_line(run: FollowedRun, place: str, width: int) -> Text:
    """A run in one line, for screens without room for a list: name, state, how far it is, and losses if they fit."""
    s = run.summary
    done = f"{int(100 * s.fraction)} %" if s.fraction is not None else text.count(s.step)
    done = summary.progress(s) if width >= ROOM_FOR_STEPS else done
    parts = [STATE_WORDS.get(s.state, s.state), done, summary.times(s, both=False), place,
             f"best {text.fitted(s.best_loss, 6)}", f"train {text.fitted(s.train_loss, 6)}"]
    row: Row = []
    for part in filter(None, parts):
        if sum(len(piece) for piece, _ in row) + len(part) + 2 + 12 <= width:
            row.append((f"  {part}", ""))
    room = width - sum(len(piece) for piece, _ in row)
    return joined([(f"{run.marker} {text.shorten(s.name, max(8, room - 2))}", f"bold {run.colour}"), *row])


def view_names(view: str, large: bool) -> Text:
    """The names of the views, each a button."""
    made = Text(no_wrap=True)
    for number, name in enumerate(("curve", "samples"), 1):
        on = view == name or (view == "both" and (large or name == "curve"))
        style = Style(bold=on, reverse=on, dim=not on) + Style.from_meta({"@click": f"app.view('{name}')"})
        made.append(f" {number} {name} ", style)
        made.append(" ")
    return made
