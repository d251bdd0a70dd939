"""How a step becomes an update: in one process, by ranks in step with each other, or by ranks that train apart.

An update of each kind has the same parts, which the trainer calls in this order:

    compute(batches, weights, first_key, signal)   the loss of a step's mini-batches; their gradients are under way
    step(number, learning_rate, clip_norm)         the norm of the gradient before clipping; parameters are updated, and
                                                   are all there behind `settle`, or the next compute
    moments(room)                                  of all parameters, for a checkpoint, on the first rank
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from feste import ops
from feste.config import TrainConfig
from feste.leaves import Leaves
from feste.model import GPT2
from feste.optim import AdamW
from feste.parallel.buckets import Buckets
from feste.parallel.exchange import Exchange, tiles_of, to_bf16
from feste.parallel.team import Team

Moments = tuple[np.ndarray, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]  # ids and targets (B, T)


class Single:
    """An update of one process."""

    def __init__(self, model: GPT2, optimizer: AdamW, count: int) -> None:
        self.model, self.optimizer, self.leaves = model, optimizer, Leaves(model, count)

    def compute(self, batches: Sequence[Batch], weights: np.ndarray, first_key: int, signal: int | None) -> float:
        """The loss of a step: the mean over all that counts in its mini-batches, which weigh as their counted tokens.

        first_key: dropout_key of the first mini-batch. signal: what this rank was asked to stop by.
        """
        shares = weights / weights.sum()
        return weighted(self.leaves.compute(batches, shares, first_key), shares)

    def where_not_finite(self) -> str:
        """Which rank the last loss owes it to that it is not finite, if there are several."""
        return ""

    def agreed(self, signal: int | None) -> int | None:
        """The signal that all ranks stop by, given this one's: none, until all of them know of it."""
        return signal

    def step(self, number: int, learning_rate: float, clip_norm: float) -> float:
        return self.optimizer.step(learning_rate, clip_norm, zero_grad=True)

    def skip(self) -> None:
        """Leave the gradients of a step that is not to be made."""
        self.model.zero_grad()

    def settle(self) -> None:
        """Wait until all parameters are those of the last step."""

    def whole_before(self, number: int) -> int:
        """The last step before this one behind which all ranks have, or had, the same parameters."""
        return number - 1

    def is_whole(self, number: int) -> bool:
        """Whether all ranks have the same parameters behind a step."""
        return True

    def moments(self, room: Moments | None) -> Moments | None:
        """Those of all parameters, in room if there is any; on the first rank, on the others None."""
        if room is None:
            return self.optimizer.m, self.optimizer.v
        np.copyto(room[0], self.optimizer.m)
        np.copyto(room[1], self.optimizer.v)
        return room

    def close(self) -> None:
        """The run is over."""


def weighted(losses: Iterable[float], shares: Iterable[float]) -> float:
    """The sum of losses times shares, from left to right."""
    total = 0.0
    for loss, share in zip(losses, shares, strict=True):
        total += loss * share
    return total


def own_part(rank: int, each: int) -> slice:
    """The mini-batches of a step that a rank computes: as many as the others, next to each other."""
    return slice(rank * each, (rank + 1) * each)


class InStep(Single):
    """Ranks that make each step together, as one process would, to the bit.

    Gradients are added up in pieces, one rank's each; it updates those parameters, whose moments it alone has (the
    first stage of ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054), and sends them to the others.
    """

    def __init__(self, team: Team, model: GPT2, optimizer: AdamW, config: TrainConfig) -> None:
        super().__init__(model, optimizer, config.accumulation // team.size)
        self.team, self.bf16, self._signal = team, config.wire == "bf16", None
        self.buckets = Buckets(model.config, team.size, optimizer.whole)
        optimizer.own(self.buckets.of(team.rank))
        self.exchange = Exchange(team, self.buckets, model.flat_grads, config.wire)

    def compute(self, batches, weights, first_key, signal):
        mine, shares = own_part(self.team.rank, self.leaves.count), weights / weights.sum()
        losses = self.leaves.compute(batches[mine], shares[mine], first_key + mine.start, self.exchange.wait_for,
                                     self._whole)
        told = self.team.gather_numbers([*losses, signal or 0])
        self._signal, self._told = int(told[:, -1].max()) or None, told
        return weighted(told[:, :-1].reshape(-1).tolist(), shares)

    def where_not_finite(self):
        bad = np.flatnonzero(~np.isfinite(self._told).all(axis=1))
        return f", on {self.team.peers[bad[0]]}" if len(bad) else ""

    def agreed(self, signal):
        return self._signal

    def _whole(self, stage: int) -> Iterator[slice]:
        """The buckets of a stage; when their sums have been made here, they are sent."""
        mine = [bucket for bucket in self.buckets if bucket.stage == stage]
        yield from (slice(bucket.begin, bucket.end) for bucket in mine)
        for bucket in mine:
            self.exchange.put(bucket)

    def step(self, number, learning_rate, clip_norm):
        self.exchange.finish()
        norm = math.sqrt(self._sum_of_squares())
        before = [self.model.flat_params[part].copy() for part in self.optimizer.ranges] if self.bf16 else []
        self.optimizer.update(norm, learning_rate, clip_norm, zero_grad=False)
        if math.isfinite(norm):
            self._spread_parameters(before)
        self.model.zero_grad()
        return norm

    def settle(self):
        self.exchange.wait_for()

    def skip(self):
        self.exchange.finish()
        self.model.zero_grad()

    def _sum_of_squares(self) -> float:
        """Of the whole gradient: tiles in their order, as one process adds them."""
        own = self.exchange.squares
        counts = [sum(last - first for first, last in map(tiles_of, self.buckets.of(rank)))
                  for rank in range(self.team.size)]
        mine = np.concatenate([own[:0], *(own[slice(*tiles_of(part))] for part in self.optimizer.ranges)])
        room = np.empty(own.size)
        self.team.wait(self.team.comm.Iallgatherv(mine, [room, counts]))
        tiles, at = np.empty(own.size), 0
        for rank in range(self.team.size):
            for first, last in map(tiles_of, self.buckets.of(rank)):
                tiles[first:last] = room[at:at + last - first]
                at += last - first
        return float(np.cumsum(tiles)[-1])

    def _spread_parameters(self, before: list[np.ndarray]) -> None:
        """Every rank gets what the others have updated, while it begins with the next step.

        With bf16 it is the change that is sent and rounded, and its owner takes the rounded one as well, so that all
        ranks keep the same parameters in float32.
        """
        flat = self.model.flat_params
        if not self.bf16:
            self.exchange.spread(flat)
            return
        changes = np.zeros(flat.size, np.uint16)
        for part, old in zip(self.optimizer.ranges, before, strict=True):
            changes[part] = to_bf16(flat[part] - old)
            flat[part] = old
        self.exchange.spread(changes, add_to=flat)

    # ---- checkpoints ----------------------------------------------------------------------------------------

    def moments(self, room):
        m, v = self.optimizer.m, self.optimizer.v
        sizes = self.team.gather((m.size, v.size))
        if not self.team.first:
            for moment in (m, v):
                self.team.wait(self.team.comm.Isend(moment, 0))
            return None
        if room is None:
            room = ops.zeros(self.model.table.size), ops.zeros(self.optimizer.v_table.size)
        self.optimizer.put(*room, self.optimizer.ranges, m, v)
        for rank in range(1, self.team.size):
            theirs = tuple(np.empty(size, np.float32) for size in sizes[rank])
            for moment in theirs:
                self.team.wait(self.team.comm.Irecv(moment, rank))
            self.optimizer.put(*room, self.buckets.of(rank), *theirs)
        return room

    def close(self):
        self.exchange.close()
