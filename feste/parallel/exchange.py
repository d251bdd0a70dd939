"""Gradients on their way between ranks during the backward pass, and parameters during the next forward pass.

Every rank gets from every other one the piece of each bucket that it owns, and adds them up in the order of `leaves`,
so the sum is that of one process. MPI moves the bytes, from point to point, and they arrive as they were; its own sums
(MPI_Allreduce, MPI_Reduce_scatter) are added in an order that is the library's business and differs from one number of
ranks to the next. A rank sends and receives (R - 1) / R of the gradient, as little as any way needs; recursive halving
would take log R messages instead of R - 1, but would have to add between them, when the cores are the backward pass's.

A thread of its own asks MPI whether something has arrived, for without being asked most MPIs move nothing. It sleeps
while nothing moves, and adds with NumPy.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np

from feste import ops
from feste.leaves import tree_sum
from feste.parallel.buckets import Bucket, Buckets
from feste.parallel.team import Team

UNDER_WAY = 3           # buckets of gradients at once, each of which needs room for the pieces of every rank
POLL_SECONDS = 0.0005   # between questions, while nothing moves
MOVING_SECONDS = 4e-6   # a question that takes longer has moved something, so that the next one follows at once
TILES_AT_ONCE = 2       # so few elements that the kernel has no use for a second thread
GRADIENTS, PARAMETERS = 1, 2  # tags


class _UnderWay(NamedTuple):
    bucket: Bucket
    requests: list
    parts: list[np.ndarray]  # of gradients: of each rank, what this one owns of the bucket, as it is on the wire
    sent: list[np.ndarray]   # must stay until they have arrived


class Exchange:
    """Sums up a flat buffer of gradients over all ranks, and gives every rank what the others own of the parameters.

    `put` and `finish`, bucket by bucket, leave the sum of what this rank owns in `gradients`. `spread` and `wait_for`
    do the other way. squares: of the tiles (ops.SUM_TILE) that begin within what this rank owns, in the place of each;
    others are zero. wire: fp32, or bf16 to round what is sent. waited: seconds spent in `finish`.
    """

    def __init__(self, team: Team, buckets: Buckets, gradients: np.ndarray, wire: str) -> None:
        self.team, self.buckets, self.gradients, self.bf16 = team, buckets, gradients, wire == "bf16"
        self.comm, self.Testall = team.comm.Dup(), team.MPI.Request.Testall
        self.squares = np.zeros(-(-gradients.size // ops.SUM_TILE))
        self.owned = buckets.of(team.rank)
        most = max(team.size * self._size(bucket) for bucket in buckets)
        self._rooms = [np.empty(most, np.uint16 if self.bf16 else np.float32) for _ in range(UNDER_WAY)]
        self._sums = {part.start: np.empty(part.stop - part.start, np.float32) for part in self.owned}
        self._orders: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._summed, self._missing, self._error, self.waited = 0, set(), None, 0.0
        self._arrived, self._awaited = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="feste-exchange", daemon=True)
        self._thread.start()

    # ---- what the training thread asks for ------------------------------------------------------------------

    def put(self, bucket: Bucket) -> None:
        """Send a bucket of gradients, which must not change before `finish`. Every rank puts all, in their order."""
        self._orders.put((bucket,))

    def finish(self) -> None:
        """Wait until all buckets of gradients have been added up."""
        self.waited += self._wait(lambda: self._summed == len(self.buckets))
        self._summed = 0
        for part in self.owned:  # not before, for tiles that reach into a piece are sent to two ranks
            self.gradients[part] = self._sums[part.start]

    def spread(self, values: np.ndarray, add_to: np.ndarray | None = None) -> None:
        """Fill the pieces of a flat buffer that other ranks own, in the order of a forward pass, while it goes on.

        add_to: values are bfloat16, and are added to this in the end, those that this rank owns included.
        """
        self._missing = set(self.buckets)
        for bucket in reversed(list(self.buckets)):
            self._orders.put((bucket, values, add_to))

    def wait_for(self, stage: int | None = None) -> None:
        """Wait until the parameters of a stage, or all of them, are there."""
        self._wait(lambda: not any(stage in (None, bucket.stage) for bucket in self._missing))

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join()

    def _wait(self, there: Callable[[], bool]) -> float:
        """Until something is there; seconds."""
        begun = time.perf_counter()
        with self._arrived:
            self._awaited = True
            while not there() and self._error is None:
                self._arrived.wait(0.1)
                self.team.raise_if_lost()
            self._awaited = False
        waited = time.perf_counter() - begun
        self.team.waited += waited
        if self._error is not None:
            raise self._error
        return waited

    def _size(self, bucket: Bucket) -> int:
        """Gradients that this rank gets of a bucket from each."""
        part = self.buckets.covered(bucket.piece(self.team.rank))
        return part.stop - part.start

    # ---- the thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        gradients, parameters = deque(), deque()  # of what is under way, and what is to be done when it is there
        waiting: deque[Bucket] = deque()          # for room
        started = 0
        try:
            while True:
                for order in self._new_orders(wait=not (gradients or parameters or waiting)):
                    if order is None:
                        return
                    if len(order) > 1:
                        parameters.append(self._start_parameters(*order))
                    else:
                        waiting.append(order[0])
                while waiting and len(gradients) < UNDER_WAY:
                    gradients.append(self._start_gradients(waiting.popleft(), self._rooms[started % UNDER_WAY]))
                    started += 1
                self._look(gradients, parameters)
        except BaseException as error:  # handed to the training thread
            with self._arrived:
                self._error = error if not isinstance(error, self.team.MPI.Exception) else self.team._verdict(error)
                self._arrived.notify()

    def _look(self, *queues: deque) -> None:
        """Finish what has arrived; if nothing has, and nothing moves, leave the core to others for a while."""
        begun, arrived = time.perf_counter(), False
        for under_way in queues:
            if under_way and self.Testall(under_way[0][0].requests):
                arrived = True
                done, finish = under_way.popleft()
                finish(done)
        if not arrived and time.perf_counter() - begun < MOVING_SECONDS:
            _let_others_run() if self._awaited else time.sleep(POLL_SECONDS)

    def _new_orders(self, wait: bool) -> Iterator[tuple | None]:
        with suppress(queue.Empty):
            yield self._orders.get(block=wait)
            while True:
                yield self._orders.get(block=False)

    def _start_gradients(self, bucket: Bucket, room: np.ndarray) -> tuple[_UnderWay, Callable]:
        """Ask every rank for its part of what this one owns, and send it what it owns; the next rank first."""
        me, size = self.team.rank, self._size(bucket)
        parts = [room[rank * size:(rank + 1) * size] for rank in range(self.team.size)]
        requests = [self.comm.Irecv(parts[rank], rank, GRADIENTS) for rank in self._others() if size]
        sent = []
        for rank in (*self._others(), me):
            piece = self.gradients[self.buckets.covered(bucket.piece(rank))]
            if piece.size == 0:
                continue
            piece = to_bf16(piece) if self.bf16 else piece
            if rank == me:
                np.copyto(parts[me], piece)
            else:
                sent.append(piece)
                requests.append(self.comm.Isend(piece, rank, GRADIENTS))
        return _UnderWay(bucket, requests, parts, sent), self._add_up

    def _start_parameters(self, bucket: Bucket, values: np.ndarray,
                          add_to: np.ndarray | None) -> tuple[_UnderWay, Callable]:
        """Ask every rank for what it owns, and send it what this one does."""
        own, requests = values[bucket.piece(self.team.rank)], []
        for rank in self._others():
            theirs = values[bucket.piece(rank)]
            if theirs.size:
                requests.append(self.comm.Irecv(theirs, rank, PARAMETERS))
            if own.size:
                requests.append(self.comm.Isend(own, rank, PARAMETERS))
        return _UnderWay(bucket, requests, [], [own]), partial(self._take_parameters, values, add_to)

    def _others(self) -> list[int]:
        """The other ranks, each rank's next one first, so that not all send to the same."""
        return [(self.team.rank + i) % self.team.size for i in range(1, self.team.size)]

    def _take_parameters(self, values: np.ndarray, add_to: np.ndarray | None, done: _UnderWay) -> None:
        part = slice(done.bucket.begin, done.bucket.end)
        if add_to is not None:
            add_to[part] += from_bf16(values[part])
        with self._arrived:
            self._missing.discard(done.bucket)
            self._arrived.notify()

    def _add_up(self, done: _UnderWay) -> None:
        piece = done.bucket.piece(self.team.rank)
        if piece.start < piece.stop:
            parts = [from_bf16(part) for part in done.parts] if self.bf16 else done.parts
            total = tree_sum(parts)
            self._sums[piece.start][...] = total[:piece.stop - piece.start]
            self._take_squares(total, piece.start, *tiles_of(piece))
        with self._arrived:
            self._summed += 1
            self._arrived.notify()

    def _take_squares(self, total: np.ndarray, begin: int, first: int, last: int) -> None:
        for tile in range(first, last, TILES_AT_ONCE):
            end = min(last, tile + TILES_AT_ONCE)
            x = total[tile * ops.SUM_TILE - begin:end * ops.SUM_TILE - begin]
            ops.tile_squares(self.squares[tile:end], x, x.size)


def _let_others_run() -> None:
    """Give the core to whoever wants it, but be back at once: a sleep of no time takes a twentieth of a millisecond."""
    os.sched_yield() if hasattr(os, "sched_yield") else time.sleep(0.0)


def tiles_of(piece: slice) -> tuple[int, int]:
    """The tiles that begin within a piece: the first, and the one behind the last."""
    return -(-piece.start // ops.SUM_TILE), -(-piece.stop // ops.SUM_TILE)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to nearest, ties to even. Infinity and NaN stay what they are."""
    bits = x.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    bad = ~np.isfinite(x)
    if bad.any():
        rounded[bad] = (bits[bad] >> 16) | np.isnan(x[bad]) * np.uint32(0x40)
    return rounded


def from_bf16(halves: np.ndarray) -> np.ndarray:
    """The float32 numbers that have these upper halves."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
