"""A rank that fails, or is heard of no more, ends the job, with one line that names it.

Launchers end a job when one of its processes dies, as a rule, but not when a machine loses its power or its network. So
every rank tells the first one twice a second that it lives, and the first one tells all others. A rank that has to give
up says why, and the others, who would wait for it, end as well.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from feste.parallel.team import Team

ALIVE, GIVES_UP = 1, 2  # tags


class Watch(threading.Thread):
    """lost: what is to be said of a rank that has failed; finding: set when there is something to say."""

    INTERVAL = 0.5  # seconds between signs of life
    LIMIT = 7.0     # without one, a rank is lost
    GRACE = 1.5     # in which the training ends the job by itself

    def __init__(self, team: Team) -> None:
        super().__init__(name="feste-watch", daemon=True)
        self.team, self.comm, self.MPI = team, team.comm.Dup(), team.MPI
        self.lost: str | None = None
        self.finding, self._over = threading.Event(), threading.Event()
        self._peers = range(1, team.size) if team.first else range(1)
        self._sent: dict[int, object] = {}
        self._last: list[object] = []
        self.start()

    def run(self) -> None:
        heard = dict.fromkeys(self._peers, time.monotonic())
        while not self._over.wait(self.INTERVAL):
            try:
                for peer in self._peers:
                    self._tell(peer)
                heard |= dict.fromkeys(self._read(), time.monotonic())
                if self.lost is not None:
                    return
            except self.MPI.Exception:
                pass  # of which peer, its silence will tell
            silent = [peer for peer, when in heard.items() if time.monotonic() - when > self.LIMIT]
            if silent:
                self._report(silent)
                return

    def give_up(self, why: str) -> None:
        """Tell all others that this rank gives up; what they were told by now stays."""
        text = np.frombuffer(why.encode(), np.uint8)
        self._last = [self.comm.Isend(text, peer, GIVES_UP) for peer in range(self.team.size) if peer != self.team.rank]

    def stop(self) -> None:
        """All ranks stop watching; what is still on its way is read."""
        self._over.set()
        self.join()
        self.team.all_here(self.LIMIT)
        list(self._read())

    def _tell(self, peer: int) -> None:
        if peer not in self._sent or self._sent[peer].Test():
            self._sent[peer] = self.comm.Isend(np.zeros(1, np.uint8), peer, ALIVE)

    def _read(self) -> Iterator[int]:
        """Whoever has sent a message since."""
        status = self.MPI.Status()
        while self.comm.Iprobe(status=status):
            text = np.zeros(status.Get_count(), np.uint8)
            self.comm.Recv(text, status.source, status.tag)
            if status.tag == GIVES_UP and self.lost is None:
                self.lost = text.tobytes().decode()
                self.finding.set()
            yield status.source

    def _report(self, silent: list[int]) -> None:
        """Tell the training; if it does not end the job, being busy with something else, do it here."""
        who = ", ".join(str(self.team.peers[peer]) for peer in silent)
        self.lost = (f"{who} has not been heard of for {self.LIMIT:.0f} seconds; the last checkpoint is whole, and the "
                     "run can be resumed on the machines that are left")
        self.finding.set()
        time.sleep(self.GRACE + 0.2 * self.team.rank)
        os.write(2, f"error: {self.lost}\n".encode())
        self.team.comm.Abort(1)
