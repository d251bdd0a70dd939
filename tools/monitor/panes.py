"""How the screen is divided, and the border between two panes, which can be dragged."""

from __future__ import annotations

from textual import events
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

LEAST, MOST, STEP = 20, 80, 5  # percent of the room that the curve has beside the samples, or above them
BESIDE, ABOVE = 67, 75         # what it is, as long as nobody has chosen
FEWEST_ROWS, MOST_ROWS = 1, 40  # runs in the list that are seen at once
RULE, MARK = "│", "┃"


def within(share: int) -> int:
    """The nearest share that leaves room for both panes."""
    return min(max(share, LEAST), MOST)


def divide(curve: Widget, side: Widget, share: int | None, dimension: str) -> None:
    """Give two panes their shares of the width or the height; share None: those of the style sheet."""
    for name in ("width", "height"):
        used = share is not None and name == dimension
        setattr(curve.styles, name, f"{share}fr" if used else None)
        setattr(side.styles, name, f"{100 - share}fr" if used else None)


class Divider(Static):
    """The border between curve and samples where they stand side by side."""

    ALLOW_SELECT = False
    can_focus = False

    class Moved(Message):
        """It was dragged to a column of the screen."""

        def __init__(self, column: int) -> None:
            super().__init__()
            self.column = column

    def __init__(self) -> None:
        super().__init__(id="divider", markup=False)
        self._dragged = False

    def render(self) -> str:
        return "\n".join([MARK if self._dragged else RULE] * max(1, self.size.height))

    def on_mouse_down(self, event: events.MouseDown) -> None:
        self._drag(True)
        self.capture_mouse()
        event.stop()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self._dragged:
            self.post_message(self.Moved(event.screen_x))

    def on_mouse_up(self) -> None:
        self._drag(False)
        self.release_mouse()

    def _drag(self, dragged: bool) -> None:
        self._dragged = dragged
        self.refresh()
