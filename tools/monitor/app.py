"""The screen: what is selected, what is pinned, and how it is looked at."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult, SystemCommand
from textual.containers import Horizontal, Vertical
from textual.css.query import NoMatches
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Static

from . import colours, keys, machine, preferences
from .curve import View
from .line import Line
from .pages import Card, Help, JournalPage
from .panes import ABOVE, BESIDE, FEWEST_ROWS, MOST_ROWS, STEP, Divider, divide, within
from .picture import AXES, LINES, METRICS, SPANS, convert
from .runs import SORTS, FollowedRun, Watch, in_order
from .samples import Samples, ScrubBar
from .widgets import Filter, Plot, RunTable, Status, summary_line, view_names

POLL_SECONDS = 0.4
SCAN_SECONDS = 2.0
MOST_OFTEN, LONGEST_WAIT = 25, 4.0  # showing takes one part in so many of a core; but is not put off longer, in seconds
LARGE_WIDTH = 120                    # from here on curve and samples stand side by side,
TALL, HIGHEST = 40, 48               # from here on with all metrics, and with a longer list
LOW, FLAT = 30, 18  # with fewer rows the list is one line and the sample stands under the curve; or it is all curve
SIDE_METRICS = ("learning rate", "gradient norm", "tokens per second")


def after(value, values):
    """The value that follows in a cycle."""
    values = list(values)
    return values[(values.index(value) + 1) % len(values)]


class Monitor(App):
    """Follows the runs of a Watch in a thread of its own; the screen shows what that thread has read."""

    TITLE = "feste monitor"
    BINDINGS = keys.BINDINGS
    AUTO_FOCUS = None  # keys are the app's, but while words are typed
    HORIZONTAL_BREAKPOINTS = [(0, "-small"), (LARGE_WIDTH, "-large")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-flat"), (FLAT, "-low"), (LOW, "-high"), (TALL, "-tall"), (HIGHEST, "-highest")]  # noqa: RUF012
    CSS_PATH = "app.tcss"

    class Polled(Message):
        """The thread has read what there was."""

    def __init__(self, watch: Watch, choices: dict | None = None, kept_in: Path | None = None,
                 theme: str = preferences.DARK) -> None:
        """choices: of an earlier time, see preferences.CHOICES; those of this time go to the file `kept_in`, if any.

        theme: the one to begin with, if none was chosen.
        """
        super().__init__()
        self.watch, self.choices, self.kept_in = watch, choices or {}, kept_in
        self._first_theme = self.choices.get("theme", theme)
        self.selected: FollowedRun | None = None
        self.pinned: list[str] = []
        self.sort = self.choices.get("sort", SORTS[0])
        self.share: int | None = self.choices.get("share")  # percent of the room that the curve has
        self.rows: int | None = self.choices.get("rows")  # runs in the list that are seen at once
        self.sample_step: int | None = None  # None: the newest
        self.view, self.comparing = "both", False
        self._cores, self._cost = machine.Cores(), 0.0
        self._stop, self._waiting = threading.Event(), threading.Event()

    def compose(self) -> ComposeResult:
        yield RunTable()
        yield Line("line")
        yield Filter()
        yield Static(id="empty", markup=False)
        yield Status("status")
        yield Line("machine")
        yield Line("tabs")
        with Horizontal(id="views", classes="both"):
            yield Plot("curve")
            yield Divider()
            with Vertical(id="side"):
                yield Samples()
                for metric in SIDE_METRICS:
                    yield Plot(metric.replace(" ", "_"), metric).add_class("metric")
        yield Footer(compact=True, show_command_palette=False)

    @property
    def plot(self) -> Plot:
        return self.screen_stack[0].query_one("#curve", Plot)

    @property
    def filter(self) -> Filter:
        return self.screen_stack[0].query_one(Filter)

    @property
    def large(self) -> bool:
        return self.size.width >= LARGE_WIDTH

    # ---- reading ---------------------------------------------------------------------------------------------

    def on_mount(self) -> None:
        self.theme = self._first_theme
        colours.use(self.theme != preferences.LIGHT)
        for name in ("axis", "log", "span", "lines"):
            setattr(self.plot.options, name, self.choices.get(name, getattr(self.plot.options, name)))
        self._lay_out()
        self._follow()
        self.set_interval(machine.SECONDS, self._show_machine)

    def _show_machine(self) -> None:
        """The machine's line, at its own pace; only where it is seen."""
        with suppress(NoMatches):
            line = self.screen_stack[0].query_one("#machine", Line)
            if line.display and self.selected is not None:
                self._cores.look()
                run = self.selected
                said = machine.describe(self._cores, run.info, run.summary.tokens_per_second)
                said.truncate(self.size.width - 2, overflow="ellipsis")
                line.say(said)

    def _choose(self, **choices) -> None:
        """Remember what was chosen, also for the next time."""
        self.choices |= choices
        if self.kept_in is not None:
            preferences.write(self.kept_in, self.choices)

    def on_unmount(self) -> None:
        self._stop.set()

    @work(thread=True)
    def _follow(self) -> None:
        """Read until the app ends. At most one message waits, however slow the screen is; none if nothing is new."""
        scanned, shown = -SCAN_SECONDS, -math.inf
        while not self._stop.is_set():
            if time.monotonic() - scanned >= SCAN_SECONDS or not self.watch.runs:
                self.watch.scan()
                scanned = time.monotonic()
            more = self.watch.poll()
            # Showing takes time from the reading of a long log, and from those who train on this machine.
            late = time.monotonic() - shown >= max(POLL_SECONDS, MOST_OFTEN * self._cost)
            if not self._waiting.is_set() and late and (shown < 0 or self.watch.fresh):
                shown = time.monotonic()
                self._waiting.set()
                self.post_message(self.Polled())
            self._stop.wait(0.0 if more else POLL_SECONDS)

    def on_monitor_polled(self) -> None:
        self._waiting.clear()
        if self.screen_stack:
            begun = time.process_time()
            with suppress(NoMatches):  # the screen is being taken down
                self.show()
            self.call_after_refresh(self._note_cost, begun)

    def _note_cost(self, begun: float) -> None:
        """What it took to show what was new."""
        self._cost = min(time.process_time() - begun, LONGEST_WAIT / MOST_OFTEN)

    # ---- showing ---------------------------------------------------------------------------------------------

    def runs(self) -> list[FollowedRun]:
        """The runs of the list, those that are filtered out left out."""
        return in_order([run for run in self.watch.runs.values() if self.filter.keeps(run.name)], self.sort)

    def show(self) -> None:
        """Bring the whole screen up to date."""
        self.watch.take()
        base, runs = self.screen_stack[0], self.runs()
        base.set_class(not self.watch.runs, "bare")
        if not self.watch.runs:
            self._show_empty(base)
            return
        if self.selected is None or (runs and self.selected not in runs):
            self.selected = in_order(runs or list(self.watch.runs.values()), "newest")[0]
        run, width = self.selected, self.size.width
        base.query_one(RunTable).fill(runs, run, self._marks(), width)
        place = f"{runs.index(run) + 1} of {len(runs)}" if run in runs else ""
        base.query_one("#line", Line).say(summary_line(run, place, width - 2))
        base.query_one(Status).show(run, width - 2, brief=self.size.height < LOW)
        for plot in base.query(Plot):
            plot.show(run, [one for one in runs if one.key in self.pinned], self.plot.options)
        base.query_one(Samples).show(run, self.sample_index(), self._compared_with())
        tabs = Text.assemble(view_names(self.view, self.large), (f" {self.sort} first" if self.sort != "name" else
                             " by name", "dim"), (self._filtered(len(runs)), "bold"),
                             ("  |  " + self.plot.options.describe(), "dim"), no_wrap=True, overflow="ellipsis")
        base.query_one("#tabs", Line).say(tabs)

    def _marks(self) -> dict[str, str]:
        """Behind its own mark a run has a P if it is pinned, a dash if its curve is switched off."""
        return dict.fromkeys(self.pinned, "P") | dict.fromkeys(self.plot.options.hidden, "-")

    def _compared_with(self) -> FollowedRun | None:
        """The run whose samples are shown beside: the first that is pinned, if that is asked for."""
        pinned = [self.watch.runs[key] for key in self.pinned if self.watch.runs[key] is not self.selected]
        return pinned[0] if pinned and self.comparing else None

    def _filtered(self, shown: int) -> str:
        """What is left out of the list, if anything is."""
        words = self.filter.value.strip()
        return f"  {shown} of {len(self.watch.runs)} with {words!r}" if words else ""

    def _show_empty(self, base) -> None:
        places = ", ".join(str(path) for path in self.watch.paths)
        base.query_one("#empty", Static).update(Text(
            f"No run in {places} yet.\n\nStart one, for example with\npython examples/05_train_shakespeare_tiny.py\n"
            "and it appears here; --demo shows made-up runs.", justify="center"))

    def sample_index(self) -> int | None:
        """The sample of the chosen step or the last one before it."""
        samples = self.selected.samples
        if not samples:
            return None
        if self.sample_step is None:
            return len(samples) - 1
        return max(0, bisect_right([step for step, _ in samples], self.sample_step) - 1)

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._divide_and_show)

    def _divide_and_show(self) -> None:
        self._lay_out()
        self.show()

    def _lay_out(self) -> None:
        """Divide the screen as was chosen: samples stand beside the curve, or where there is less room below it."""
        base = self.screen_stack[0]
        divide(self.plot, base.query_one("#side"), self.share if self.view == "both" else None,
               "width" if self.large else "height")
        base.query_one(RunTable).styles.max_height = None if self.rows is None else self.rows + 1

    def get_system_commands(self, screen: Screen) -> Iterator[SystemCommand]:
        """What the command palette offers: every key's action."""
        for key in keys.KEYS:
            if key.action not in ("select(-1)", "select(1)") and len(self.screen_stack) <= 2:
                title = key.help[0].upper() + key.help[1:]
                yield SystemCommand(title, f"key {key.shown}", partial(self.run_action, key.action))
        for metric in METRICS:
            yield SystemCommand(f"Show the {metric}", "in the large plot", partial(self._set, metric=metric))

    def check_action(self, action: str, parameters) -> bool | None:
        """Under the help, only what ends the program."""
        return len(self.screen_stack) <= 1 or action in ("quit", "dismiss", "copy")

    # ---- runs ------------------------------------------------------------------------------------------------

    def select(self, run: FollowedRun) -> None:
        self.selected = run
        self.plot.options.cursor = None
        self.show()

    def action_select(self, change: int) -> None:
        runs = self.runs()
        if self.selected in runs:
            self.select(runs[min(max(runs.index(self.selected) + change, 0), len(runs) - 1)])

    def toggle_pin(self, key: str) -> None:
        if key in self.pinned:
            self.pinned.remove(key)
        else:
            self.pinned.append(key)
        self.show()

    def action_pin(self) -> None:
        if self.selected is not None:
            self.toggle_pin(self.selected.key)

    def action_unpin(self) -> None:
        self.pinned.clear()
        self.show()

    def action_curve(self, key: str = "") -> None:
        """Switch the curve of a run off or on, without a key that of the selected one."""
        if key or self.selected is not None:
            self._set(hidden=self.plot.options.hidden ^ {key or self.selected.key})

    def action_filter(self) -> None:
        self.filter.open()

    def on_input_changed(self) -> None:
        self.show()

    def on_input_submitted(self) -> None:
        self.filter.close()

    def action_sort(self) -> None:
        self.sort = after(self.sort, SORTS)
        self._choose(sort=self.sort)
        self.show()

    def on_run_table_clicked(self, message: RunTable.Clicked) -> None:
        sorts = {"run": "name", "state": "newest", "best": "best loss"}
        if message.key is None:
            self.sort = sorts.get(message.column, self.sort)
            self.show()
        elif message.column == "mark":
            self.toggle_pin(message.key)
        else:
            self.select(self.watch.runs[message.key])

    # ---- views -----------------------------------------------------------------------------------------------

    def action_view(self, name: str) -> None:
        self.view = name
        self.screen_stack[0].query_one("#views").set_classes(name)
        self._lay_out()
        self.call_after_refresh(self.show)

    def action_next_view(self) -> None:
        views = ("both", "curve", "samples") if self.large else ("curve", "samples")
        view = self.view if self.view in views else "curve"
        self.action_view(after(view, views))

    def action_zen(self) -> None:
        self.screen_stack[0].toggle_class("zen")
        self.call_after_refresh(self.show)

    def action_divide(self, change: int) -> None:
        standard = BESIDE if self.large else ABOVE
        self._divide((standard if self.share is None else self.share) + change * STEP)

    def _divide(self, share: int) -> None:
        self.share = within(share)
        self._choose(share=self.share)
        self._lay_out()
        self.call_after_refresh(self.show)

    def on_divider_moved(self, message: Divider.Moved) -> None:
        self._divide(round(100 * message.column / self.size.width))

    def action_rows(self, change: int) -> None:
        table = self.screen_stack[0].query_one(RunTable)
        shown = table.size.height - 1 if self.rows is None else self.rows
        self.rows = min(max(shown + change, FEWEST_ROWS), MOST_ROWS)
        self._choose(rows=self.rows)
        self._lay_out()
        self.call_after_refresh(self.show)

    def action_dark(self) -> None:
        self.theme = preferences.LIGHT if self.theme == preferences.DARK else preferences.DARK
        self._choose(theme=self.theme)

    def watch_theme(self, theme: str) -> None:
        """Runs and states have other colours on another background."""
        colours.use(theme != preferences.LIGHT)
        if self.screen_stack and self.watch.runs:
            with suppress(NoMatches):
                self.show()

    def action_card(self) -> None:
        if self.selected is not None:
            self.push_screen(Card(self.selected, list(self.watch.runs.values())))

    def action_journal(self) -> None:
        if self.selected is not None:
            self.push_screen(JournalPage(self.selected))

    def action_help(self) -> None:
        self.push_screen(Help())

    # ---- curve -----------------------------------------------------------------------------------------------

    def _set(self, **options) -> None:
        for name, value in options.items():
            setattr(self.plot.options, name, value)
        self.show()

    def action_zoom(self, factor: float) -> None:
        self.plot.zoom(factor)

    def action_pan(self, fraction: float) -> None:
        self.plot.pan(fraction)

    def on_plot_named(self, message: Plot.Named) -> None:
        self.action_curve(message.key)

    def on_plot_changed(self) -> None:
        self.show()

    def action_whole(self) -> None:
        self._set(view=View())

    def action_follow(self) -> None:
        self._set(view=View(self.plot.options.view.span))

    def action_axis(self) -> None:
        if self.selected is not None:
            convert(self.plot.options, self.selected, after(self.plot.options.axis, AXES))
            self._choose(axis=self.plot.options.axis)
            self.show()

    def _turn(self, **option) -> None:
        """Set an option that is kept for the next time."""
        self._choose(**option)
        self._set(**option)

    def action_log(self) -> None:
        self._turn(log=not self.plot.options.log)

    def action_smooth(self) -> None:
        self._turn(span=after(self.plot.options.span, SPANS))

    def action_lines(self) -> None:
        self._turn(lines=after(self.plot.options.lines, LINES))

    def action_metric(self) -> None:
        self._set(metric=after(self.plot.options.metric, METRICS))

    def action_cursor(self, cells: int) -> None:
        self.plot.move_cursor(cells)

    def action_no_cursor(self) -> None:
        self._set(cursor=None)

    # ---- samples ---------------------------------------------------------------------------------------------

    def _go_to_sample(self, index: int) -> None:
        samples = self.selected.samples
        index = min(max(index, 0), len(samples) - 1)
        self.sample_step = None if index == len(samples) - 1 else samples[index][0]
        self.show()

    def action_sample(self, change: int) -> None:
        if self.selected is not None and self.selected.samples:
            self._go_to_sample(self.sample_index() + change)

    def on_scrub_bar_moved(self, message: ScrubBar.Moved) -> None:
        if self.selected is not None and self.selected.samples:
            self._go_to_sample(round(message.fraction * (len(self.selected.samples) - 1)))

    def action_compare(self) -> None:
        self.comparing = not self.comparing
        if self.comparing and not [key for key in self.pinned if self.selected is None or key != self.selected.key]:
            self.notify("pin another run with space, then select this one")
        self.show()

    def action_scroll(self, direction: int) -> None:
        self.screen_stack[0].query_one(Samples).scroll_text(direction)
