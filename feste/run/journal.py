"""run.log: what the program said while it trained a run, for whoever was not there.

An entry is a line of time, kind and words: how a run begins and ends, warnings, steps that were skipped. What else an
entry has to say, such as the traceback of a failure, stands indented below it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from feste.run.names import JOURNAL

INFO, WARNING, ERROR = KINDS = ("info", "warning", "error")
INDENT = "    "
MOST_BYTES = 1 << 16  # of the end of a journal, that are read


class Entry(NamedTuple):
    time: str
    kind: str
    words: str


class Journal:
    """The journal of the run in a directory. Between `open` and `close`, Python's warnings are entries, too.

    An entry that cannot be written is left out: the writer of the rows tells what is wrong with the disk.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL
        self._ears = ExitStack()

    def open(self) -> None:
        self._ears.enter_context(overheard(lambda words: self.note(words, WARNING)))

    def close(self) -> None:
        """As often as one likes."""
        self._ears.close()

    def note(self, words: str, kind: str = INFO) -> None:
        lines = words.rstrip().replace("\r", " ").split("\n")
        with suppress(OSError), open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{now()} {kind:{max(map(len, KINDS))}} {f'{chr(10)}{INDENT}'.join(lines)}\n")


@contextmanager
def overheard(take: Callable[[str], None]) -> Iterator[None]:
    """Every warning that Python shows meanwhile goes to `take`, too."""
    shown, hearing = warnings.showwarning, True

    def show(message, *where) -> None:
        if hearing:
            take(str(message))
        shown(message, *where)

    warnings.showwarning = show
    try:
        yield
    finally:
        hearing = False
        if warnings.showwarning is show:  # a run in another thread may have put its own over it
            warnings.showwarning = shown


def read_journal(directory: Path) -> list[Entry]:
    """The entries at the end of a journal, oldest first; none where there is no journal, or it cannot be read."""
    try:
        with open(directory / JOURNAL, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MOST_BYTES))
            lines = file.read(MOST_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []
    entries: list[Entry] = []
    for line in lines[size > MOST_BYTES:]:  # the first one may be the end of a line
        time, kind, words = [*line.split(None, 2), "", "", ""][:3]
        if line[:1].strip() and kind in KINDS:
            entries.append(Entry(time, kind, words))
        elif entries:
            entries[-1] = entries[-1]._replace(words=f"{entries[-1].words}\n{line.removeprefix(INDENT)}")
    return entries


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
