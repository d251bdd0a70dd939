"""Text whose place on the screen stays: to lay out the whole screen anew is most of what showing something costs."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import Static


def same(old: Text | str | None, new: Text | str) -> bool:
    """Whether two texts look alike: a Text is equal to another one of any style."""
    return type(old) is type(new) and old == new and getattr(old, "style", "") == getattr(new, "style", "")


class Line(Static):
    """A line, or any text of a height that is known."""

    def __init__(self, id: str) -> None:
        super().__init__(id=id, markup=False)
        self._said: Text | str | None = None

    def say(self, content: Text | str, layout: bool = False) -> None:
        """Show it, if it is something new. layout: it needs more or fewer lines than before."""
        if layout or not same(self._said, content):
            self._said = content
            self.update(content, layout=layout)
