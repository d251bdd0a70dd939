"""The samples of a run, and where in the run they are; two runs' samples beside each other."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Static

from feste import terminal as text

from .line import Line
from .runs import FollowedRun


class ScrubBar(Line):
    """Where in the run the sample is."""

    class Moved(Message):
        def __init__(self, fraction: float) -> None:
            super().__init__()
            self.fraction = fraction

    def on_click(self, event: events.Click) -> None:
        self.post_message(self.Moved(event.x / max(1, self.size.width - 1)))


class Samples(Vertical):
    """A sample of the run, and how many there are."""

    def __init__(self) -> None:
        super().__init__(id="samples")
        self._shown: tuple | None = None

    def compose(self) -> ComposeResult:
        yield Line("sample_head")
        yield ScrubBar("sample_bar")
        with VerticalScroll(id="sample_scroll", can_focus=False):
            yield Static(id="sample_text", markup=False)

    def show(self, run: FollowedRun, index: int | None, other: FollowedRun | None = None) -> None:
        """The sample of that index, None if there is none; with that of another run at that step, if one is given."""
        width = max(10, self.size.width - 2)
        if index is None:
            shown = (run.key, None)
            head, bar, body = "no samples yet", "", Text("")
        else:
            step, sample = run.samples[index]
            beside = None if other is None else sample_at(other, step)
            shown = (run.key, step, sample, beside)
            newest = "  newest" if index == len(run.samples) - 1 else ""
            head = f"sample {index + 1} of {len(run.samples)}  step {step:,}{newest}"
            place = round(index / max(1, len(run.samples) - 1) * (width - 1))
            bar = "─" * place + "●" + "─" * (width - 1 - place)
            body = self._body(run, sample) if other is None else compared(run, sample, other, beside)
        self.query_one("#sample_head", Line).say(Text(head, "bold"))
        self.query_one("#sample_bar", Line).say(Text(bar, run.colour))
        if shown != self._shown:
            self._shown = shown
            self.query_one("#sample_text", Static).update(body)
            self.query_one("#sample_scroll").scroll_home(animate=False)

    @staticmethod
    def _body(run: FollowedRun, sample: str) -> Text:
        body = Text(text.clean(sample))
        train = run.info.get("train")
        prompt = train.get("sample_prompt") if isinstance(train, dict) else None
        if isinstance(prompt, str) and body.plain.startswith(text.clean(prompt)):
            body.stylize("bold", 0, len(text.clean(prompt)))
        return body

    def scroll_text(self, direction: int) -> None:
        scroll = self.query_one("#sample_scroll")
        scroll.scroll_relative(y=direction * max(1, scroll.size.height - 1), animate=False)


def sample_at(run: FollowedRun, step: int) -> tuple[int, str] | None:
    """The sample of a step, or the last one before it."""
    return next((found for found in reversed(run.samples) if found[0] <= step), None)


def compared(run: FollowedRun, sample: str, other: FollowedRun, beside: tuple[int, str] | None) -> Text:
    """Two samples, one below the other; words that both have, in the same order, are dim."""
    if beside is None:
        return Text(f"{other.name} has no sample up to here")
    words = [re.findall(r"\s*\S+", text.clean(one)) for one in (sample, beside[1])]
    common = SequenceMatcher(None, *([word.strip() for word in side] for side in words), autojunk=False)
    alike: tuple[set[int], set[int]] = set(), set()
    for block in common.get_matching_blocks():
        alike[0].update(range(block.a, block.a + block.size))
        alike[1].update(range(block.b, block.b + block.size))
    made = Text()
    heads = (f"{run.marker} {run.name}", f"{other.marker} {other.name}, step {beside[0]:,}")
    for i, (one, head) in enumerate(zip((run, other), heads, strict=True)):
        made.append(("\n\n" if i else "") + head + "\n", f"bold {one.colour}")
        for at, word in enumerate(words[i]):
            made.append(word, "dim" if at in alike[i] else "")
    return made
