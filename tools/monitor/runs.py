"""Following runs: what one thread reads, another one sees when it asks for it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Set
from pathlib import Path

import numpy as np

from feste.run.journal import INFO, Entry, read_journal
from feste.run.names import JOURNAL

from ..runs import Run, Summary, directory_of, run_directories, summarise
from . import colours

NAMES = ("step", "elapsed_seconds", "learning_rate", "train_loss", "val_loss", "grad_norm", "tokens_per_second")
SORTS = ("newest", "best loss", "name")
POLL_BYTES = 4 << 20
N_COLOURS = len(colours.DARK.runs)


class FollowedRun(Run):
    """A run that is followed. One thread may `poll`; what another one sees changes only when that one calls `take`.

    columns (see RunReader), samples: (step, text), and summary belong together. fresh: there is more to take.
    """

    def __init__(self, path: Path, look: int) -> None:
        super().__init__(path, names=NAMES)
        self._colour = look % N_COLOURS
        self.marker = colours.MARKERS[look // N_COLOURS % len(colours.MARKERS)]
        self._known: tuple | None = None
        self._journal: tuple[int, list[Entry]] = -1, []  # its size, and what it says
        self.fresh = True
        self._latest = (self.reader.columns, [], Summary(self.name, self.key, "waiting"), [])
        self.take()

    @property
    def colour(self) -> str:
        return colours.palette.runs[self._colour]

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return self._taken[0]

    @property
    def samples(self) -> list[tuple[int, str]]:
        return self._taken[1]

    @property
    def summary(self) -> Summary:
        return self._taken[2]

    @property
    def journal(self) -> list[Entry]:
        """What the program said."""
        return self._taken[3]

    @property
    def warned(self) -> str:
        """How many warnings and failures the journal has, in words; nothing where it has none."""
        count = sum(entry.kind != INFO for entry in self.journal)
        return f"the program warned {'once' if count == 1 else f'{count} times'}: press o" if count else ""

    def poll(self) -> bool:
        """Read what is new, a bounded part of it; True if there is more to read at once."""
        changed = self.reader.poll(POLL_BYTES)
        known = (self.reader.state, self.reader.found, self._read_journal())
        if changed or known != self._known:
            self._known = known
            columns, samples = self.reader.columns, list(self.reader.samples)
            self._latest = (columns, samples, summarise(self.name, self.key, self.reader, columns, len(samples)),
                            self._journal[1])
            self.fresh = True
        return self.reader.behind > 0

    def _read_journal(self) -> int:
        """Read the journal again if it is longer, or another one; returns its size."""
        try:
            size = (self.path / JOURNAL).stat().st_size
        except OSError:  # runs of other programs, and old ones, have none
            size = 0
        if size != self._journal[0]:
            self._journal = size, read_journal(self.path)
        return size

    def take(self) -> None:
        """See what has been read."""
        self.fresh = False  # first, so that what comes meanwhile is not missed
        self._taken = self._latest


def look_of(name: str, taken: Set[int]) -> int:
    """Which of the pairs of a colour and a marker a run has: by its name, so that it keeps them, or the next free one.

    The next one has another colour. When all pairs are taken, they are shared.
    """
    pairs = N_COLOURS * len(colours.MARKERS)
    first = zlib.crc32(name.encode(errors="replace")) % pairs
    return next((look for look in ((first + i) % pairs for i in range(pairs)) if look not in taken), first)


class Watch:
    """The runs of some paths, each a run directory, a folder that holds some, or nothing yet."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [directory_of(path) for path in paths]
        self.runs: dict[str, FollowedRun] = {}
        self._looks: set[int] = set()

    def scan(self) -> None:
        """Take up runs that have come. A run that has gone stays in the list."""
        for path in self.paths:
            for directory in run_directories(path):
                key = str(directory)
                if key not in self.runs:
                    look = look_of(directory.absolute().name, self._looks)
                    self._looks.add(look)
                    self.runs[key] = FollowedRun(directory, look)

    def poll(self) -> bool:
        """Read what is new in every run; True if there is more to read at once."""
        return any([run.poll() for run in list(self.runs.values())])

    def read(self) -> list[FollowedRun]:
        """Everything there is now."""
        self.scan()
        while self.poll():
            pass
        self.take()
        return list(self.runs.values())

    @property
    def fresh(self) -> bool:
        return any(run.fresh for run in list(self.runs.values()))

    def take(self) -> None:
        """See what has been read."""
        for run in list(self.runs.values()):
            run.take()


def in_order(runs: list[FollowedRun], sort: str) -> list[FollowedRun]:
    """The runs by one of SORTS: what is running is newest; a run without a loss comes last."""
    runs = sorted(runs, key=lambda run: run.name)
    if sort == "newest":
        return sorted(runs, key=lambda run: (run.summary.state == "running", run.summary.started or ""), reverse=True)
    if sort == "best loss":
        return sorted(runs, key=lambda run: math.inf if run.summary.best_loss is None else run.summary.best_loss)
    return runs
