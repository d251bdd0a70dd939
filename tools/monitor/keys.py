"""The one table of keys: the bindings, the footer and the help are made from it."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding


@dataclass(frozen=True)
class Key:
    """keys: Textual's names, with commas. shown: as the help prints them. footer: its word there, if it is there."""

    keys: str
    shown: str
    action: str
    help: str
    footer: str = ""
    priority: bool = False

    def binding(self) -> Binding:
        return Binding(self.keys, self.action, self.footer or self.help, show=bool(self.footer),
                       key_display=self.shown.split(" ")[0], priority=self.priority)


GROUPS: tuple[tuple[str, tuple[Key, ...]], ...] = (
    ("Runs", (
        Key("up,k", "up k", "select(-1)", "the run above"),
        Key("down,j", "down j", "select(1)", "the run below"),
        Key("space", "space", "pin", "pin the run: its curve stays while others are selected", "Pin"),
        Key("u", "u", "unpin", "unpin every run"),
        Key("slash", "/", "filter", "show the runs whose name has some words; enter keeps that, esc ends it", "Filter"),
        Key("c", "c", "curve", "take the run's curve out of the plot, or put it back"),
        Key("o", "o", "journal", "what the program said: warnings, and why it failed"),
        Key("i,enter", "i enter", "card", "all about the run, and what to type to go on with it", "Card"),
        Key("s", "s", "sort", "sort the runs: newest, best loss, name", "Sort"),
    )),
    ("Views", (
        Key("tab", "tab", "next_view", "the next view: curve, samples, or both if there is room", "View", True),
        Key("1", "1", "view('curve')", "only the curve"),
        Key("2", "2", "view('samples')", "only the samples"),
        Key("z", "z", "zen", "hide or show the run list and the numbers", "Zen"),
        Key("less_than_sign", "<", "divide(-1)", "less room for the curve, more for the samples"),
        Key("greater_than_sign", ">", "divide(1)", "more room for the curve"),
        Key("left_parenthesis", "(", "rows(-1)", "fewer runs in the list at once"),
        Key("right_parenthesis", ")", "rows(1)", "more runs in the list at once"),
        Key("d", "d", "dark", "dark or light colours"),
    )),
    ("Curve", (
        Key("plus,equals_sign", "+ =", "zoom(0.5)", "zoom in"),
        Key("minus", "-", "zoom(2.0)", "zoom out"),
        Key("left,h", "left h", "pan(-0.25)", "towards the start"),
        Key("right", "right", "pan(0.25)", "towards the newest step"),
        Key("0,home", "0 home", "whole", "the whole run"),
        Key("f,end", "f end", "follow", "follow the newest step"),
        Key("x", "x", "axis", "x axis: step, time or tokens", "Axis"),
        Key("l", "l", "log", "logarithmic y axis", "Log"),
        Key("e", "e", "smooth", "smoothing: none, or the average of 10, 50 or 250 rows", "Smooth"),
        Key("w", "w", "lines", "which losses: both, validation, training"),
        Key("m", "m", "metric", "loss, learning rate, gradient norm, or tokens per second", "Metric"),
        Key("comma", ",", "cursor(-1)", "read the values to the left"),
        Key("full_stop", ".", "cursor(1)", "read the values to the right"),
        Key("escape", "esc", "no_cursor", "put the reading line away"),
    )),
    ("Samples", (
        Key("left_square_bracket", "[", "sample(-1)", "the sample before"),
        Key("right_square_bracket", "]", "sample(1)", "the sample after"),
        Key("left_curly_bracket", "{", "sample(-1000000)", "the first sample"),
        Key("right_curly_bracket", "}", "sample(1000000)", "the newest sample, and those that follow"),
        Key("v", "v", "compare", "the sample beside that of the first pinned run at the same step", "Versus"),
        Key("pageup", "pgup", "scroll(-1)", "scroll the sample up"),
        Key("pagedown", "pgdn", "scroll(1)", "scroll the sample down"),
    )),
    ("Program", (
        Key("question_mark,f1", "? f1", "help", "this help", "Help"),
        Key("q", "q", "quit", "quit; training goes on", "Quit"),
        Key("ctrl+c", "^c", "quit", "quit", "", True),
    )),
)
KEYS = tuple(key for _, group in GROUPS for key in group)
# In a narrow terminal the footer is cut at its end, so how to get help and out comes first.
BINDINGS = [key.binding() for key in sorted(KEYS, key=lambda key: key.action not in ("help", "quit"))]
PALETTE = "ctrl+p finds an action by its words"
MOUSE = ("click a run: select it; click its mark: pin it; click a column head: sort by it",
         "click a run's name over the curve: its curve goes, or comes back; drag the line beside the curve: more room",
         "over the curve: read the values; wheel: zoom there; drag: pan",
         "click the bar over a sample: go there; the names of the views and the footer are buttons too")
