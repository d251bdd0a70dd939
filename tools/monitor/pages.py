"""Pages that lie over the screen: the help, the card of a run, and its journal."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from feste import terminal as text
from feste.run.journal import ERROR, WARNING, Entry

from . import colours
from .card import card, commands
from .keys import GROUPS, MOUSE, PALETTE
from .line import same
from .runs import FollowedRun

JOURNAL_SECONDS = 1.0  # between looks at a journal that is open


class Page(ModalScreen):
    """A page of text that scrolls; esc closes it."""

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="page"):
            yield Static(self.content(), markup=False)

    def content(self) -> Text:
        """What stands on it."""
        return Text()


class Help(Page):
    """Every key, from the key table."""

    BINDINGS = [("escape,q,question_mark,f1", "dismiss", "Close")]  # noqa: RUF012

    def content(self) -> Text:
        made = Text("Keys (esc closes this, arrows scroll)\n", "bold")
        for title, keys in GROUPS:
            made.append(f"\n{title}\n", "bold underline")
            for key in keys:
                made.append(f"  {key.shown:9}", "bold")
                made.append(f"{key.help}\n", "not bold")
        made.append(f"\n{PALETTE}\n")
        made.append("\nMouse\n", "bold underline")
        for line in MOUSE:
            made.append(f"  {line}\n", "not bold")
        return made


class Card(Page):
    """All that is known of a run."""

    BINDINGS = [("escape,q,i,enter", "dismiss", "Close"), ("c", "copy(0)", "Copy"),  # noqa: RUF012
                ("r", "copy(1)", "Copy")]

    def __init__(self, run: FollowedRun, others: list[FollowedRun]) -> None:
        super().__init__()
        self.run, self.others = run, others

    def content(self) -> Text:
        return card(self.run, self.others)

    def action_copy(self, which: int) -> None:
        """To the clipboard of the terminal, where it has one (OSC 52)."""
        command = commands(self.run)[which]
        self.app.copy_to_clipboard(command)
        self.notify(command, title="copied")


class JournalPage(Page):
    """What the program said while it trained a run, the newest at the end; it grows while one looks."""

    BINDINGS = [("escape,q,o", "dismiss", "Close")]  # noqa: RUF012

    def __init__(self, run: FollowedRun) -> None:
        super().__init__()
        self.run, self._shown = run, Text("")

    def on_mount(self) -> None:
        self.set_interval(JOURNAL_SECONDS, self._look)
        self.call_after_refresh(self._to_the_end)

    def _look(self) -> None:
        content = self.content()
        if not same(self._shown, content):
            self._shown = content
            self.query_one(Static).update(content)
            self.call_after_refresh(self._to_the_end)

    def _to_the_end(self) -> None:
        self.query_one(VerticalScroll).scroll_end(animate=False)

    def content(self) -> Text:
        made = Text()
        made.append(f"{self.run.marker} {text.clean_line(self.run.name)}", f"bold {self.run.colour}")
        made.append(": what the program said (UTC, esc closes this)\n", "bold")
        for entry in self.run.journal:
            made.append_text(_of_entry(entry))
        if not self.run.journal:
            made.append("\nnothing: this run has no run.log")
        return made


def _of_entry(entry: Entry) -> Text:
    """Its time, and the words in the colour of their kind."""
    style = {WARNING: colours.palette.warning, ERROR: colours.palette.state("failed")}.get(entry.kind, "")
    made = Text(f"\n{text.clean_line(entry.time.replace('T', ' ')[:19])}  ", "dim")
    made.append(f"{entry.kind}: " if style else "", f"bold {style}")
    return made.append("\n    ".join(map(text.clean_line, entry.words.split("\n"))), style)
