"""The ranks of a job: who they are, what they tell each other, and how they wait."""

from __future__ import annotations

import math
import os
import pickle
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from feste import launcher
from feste.errors import FesteError
from feste.machine import useful_threads, visible_cores
from feste.parallel.watch import Watch

AWAKE_SECONDS, NAP_SECONDS = 0.002, 0.0002  # so long a rank stays awake for the others; then it looks at intervals
LAST_WORDS_SECONDS = 5.0  # until the others must have come to their end, too
MOST_BYTES = 1 << 30      # of one message
LINK_BYTES = 1 << 25      # that are sent to measure a link


class RankLost(RuntimeError):
    """A rank that has given up, or is not heard of any more: which one, and why."""


@dataclass(frozen=True)
class Peer:
    """A rank as the others know it. cores: those it may run on, none if unknown; useful: those its container has."""

    rank: int
    host: str
    pid: int
    cores: frozenset[int]
    useful: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Alone:
    """A job of one process."""

    rank, size, first, waited = 0, 1, True, 0.0

    def gather(self, value) -> list:
        """The value of every rank, in their order."""
        return [value]

    def gather_numbers(self, values: Sequence[float]) -> np.ndarray:
        """The same numbers of every rank (ranks, numbers), float64."""
        return np.array([values], np.float64)

    def broadcast(self, value):
        """The first rank's value."""
        return value

    def broadcast_array(self, array: np.ndarray) -> None:
        """Fill an array with the first rank's."""

    def on_first(self, action: Callable[[], object]):
        """What the action returns on the first rank, which alone does it; its error is that of all."""
        return action()

    def begin_watch(self) -> None:
        """From now on a rank that is not heard of any more ends the job."""

    def link(self) -> float:
        """Bytes a second that this rank sends, and receives, when all of them send to all others; measured now."""
        return math.inf

    def threads(self) -> int:
        """The threads that this rank should run, 0 for all."""
        return 0

    def require_alike(self, facts: dict) -> None:
        """FesteError unless facts are the same on every rank."""

    def describe(self, threads: int) -> dict:
        """What run.json says of the ranks."""
        return {}

    def give_up(self, why: str) -> None:
        """This rank cannot go on: the others, if they are at work, end with it."""

    def all_here(self, seconds: float | None = None) -> bool:
        """Whether every rank calls this, within so many seconds."""
        return True

    def leave(self) -> None:
        """The ranks part; none will be watched any more."""


class Team(Alone):
    """The ranks that MPI started. Every method is called by all of them, in the same order.

    waited: seconds that this rank has spent waiting for others.
    """

    def __init__(self) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise FesteError("this MPI was started without MPI_THREAD_MULTIPLE, which overlapping needs; leave "
                             "mpi4py.rc.thread_level as it is")
        self.MPI, self.comm, self._end = MPI, MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup()
        self.rank, self.size, self.waited = self.comm.rank, self.comm.size, 0.0
        self.first, self.watch = self.rank == 0, None
        cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
        self.peers = self.gather(Peer(self.rank, platform.node(), os.getpid(), cores, useful_threads()))

    @property
    def me(self) -> Peer:
        return self.peers[self.rank]

    # ---- messages -------------------------------------------------------------------------------------------

    def wait(self, request) -> None:
        """Until a request is done. Asks at intervals, for MPI's own waiting would take a core from who computes."""
        begun = time.perf_counter()
        try:
            while not request.Test():
                now = time.perf_counter()
                time.sleep(0.0 if now - begun < AWAKE_SECONDS else NAP_SECONDS)
                self.raise_if_lost()
        except self.MPI.Exception as error:
            raise self._verdict(error) from error
        self.waited += time.perf_counter() - begun

    def raise_if_lost(self) -> None:
        if self.watch is not None and self.watch.lost is not None:
            raise RankLost(self.watch.lost)

    def _verdict(self, error: Exception) -> RankLost:
        """A message failed: give the watch the time to say whose end is the cause."""
        if self.watch is not None:
            self.watch.finding.wait(self.watch.LIMIT)
        return RankLost((self.watch and self.watch.lost) or f"MPI failed on {self.me}: {error}")

    def gather(self, value) -> list:
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.zeros(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([data.size]), sizes))
        room = np.empty(sizes.sum(), np.uint8)
        self.wait(self.comm.Iallgatherv(data, [room, sizes.tolist()]))
        return [pickle.loads(part.tobytes()) for part in np.split(room, np.cumsum(sizes)[:-1])]

    def gather_numbers(self, values: Sequence[float]) -> np.ndarray:
        own = np.array(values, np.float64)
        room = np.empty((self.size, own.size))
        self.wait(self.comm.Iallgather(own, room))
        return room

    def broadcast(self, value):
        return self.gather(value if self.first else None)[0]

    def broadcast_array(self, array: np.ndarray) -> None:
        flat = array.reshape(-1).view(np.uint8)
        for begin in range(0, flat.size, MOST_BYTES):
            self.wait(self.comm.Ibcast(flat[begin:begin + MOST_BYTES]))

    def on_first(self, action):
        outcome = None, None
        if self.first:
            try:
                outcome = action(), None
            except (ValueError, OSError, MemoryError) as error:
                outcome = None, error
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return value

    # ---- who they are ---------------------------------------------------------------------------------------

    def threads(self) -> int:
        """An even share of the cores, among the ranks of this host that may run on the same."""
        beside = [peer for peer in self.peers if peer.host == self.me.host
                  and (peer.cores & self.me.cores or not self.me.cores)]
        return max(1, min(len(self.me.cores) or visible_cores(), self.me.useful) // len(beside))

    def require_alike(self, facts: dict) -> None:
        everyone = self.gather(facts)
        for peer, theirs in zip(self.peers, everyone, strict=True):
            for name, value in everyone[0].items():
                if theirs[name] != value:
                    raise FesteError(f"{peer} has another {name} than {self.peers[0]}: {theirs[name]}, not {value}",
                                     *["isa"] * (name == "instruction set"))

    def describe(self, threads: int) -> dict:
        counts = self.gather(threads)
        return {"ranks": [{"host": peer.host, "pid": peer.pid, "threads": count}
                          for peer, count in zip(self.peers, counts, strict=True)]}

    def link(self):
        sent, room = (np.zeros((self.size, LINK_BYTES // self.size), np.uint8) for _ in range(2))
        seconds = []
        for _ in range(3):
            self.gather_numbers([0.0])  # all begin together
            begun = time.perf_counter()
            self.wait(self.comm.Ialltoall(sent, room))
            seconds.append(time.perf_counter() - begun)
        return sent.nbytes * (self.size - 1) / self.size / min(seconds)

    def begin_watch(self):
        self.watch = self.watch or Watch(self)

    # ---- the end --------------------------------------------------------------------------------------------

    def all_here(self, seconds: float | None = None) -> bool:
        begun, request = time.perf_counter(), self._end.Ibarrier()
        while not request.Test():
            if seconds is not None and time.perf_counter() - begun > seconds:
                return False
            time.sleep(NAP_SECONDS)
        return True

    def leave(self) -> None:
        self.all_here()  # for MPI's own end would wait busily
        if self.watch is not None:
            self.watch.stop()

    def give_up(self, why: str) -> None:
        if self.watch is not None and self.watch.lost is None:
            self.watch.give_up(f"{self.me}: {why}")

    def abort(self, code: int) -> None:
        """End the whole job."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.Abort(code)


# ---- this process ------------------------------------------------------------------------------------------


@cache
def _world() -> Alone:
    if not launcher.launched():
        return Alone()
    try:
        from mpi4py import MPI
    except ImportError as error:
        if not launcher.may_speak():
            sys.exit(2)
        raise FesteError(f"MPI started this process, but Python's side of it is missing ({error}): pip install "
                         "'feste[mpi]'") from None
    return Team() if MPI.COMM_WORLD.size > 1 else Alone()


def world() -> Alone:
    """The ranks of this job; the first call of all of them comes together."""
    return _world()


def current() -> Alone:
    """The ranks of this job if they have come together, else this process alone."""
    return _world() if _world.cache_info().currsize else Alone()
