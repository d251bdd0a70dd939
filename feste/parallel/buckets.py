"""How the ranks of a run divide the flat buffers.

A bucket is a stretch of them whose gradients are whole at the end of a stage of the backward pass, so that it can be
sent while the pass goes on; the last block's comes first. Each bucket is cut into a piece for every rank, which adds up
that piece of everybody's gradient, updates those parameters, and keeps their moments.

Cuts fall between tiles of ops.SUM_TILE elements, so that a tile's squares are added up by one rank, and never within a
parameter that the optimizer needs whole; where such a parameter ends within a tile, the rank before the cut gets the
gradients of the tile's rest as well, for the sum of its squares.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import groupby, pairwise

from feste import ops
from feste.config import Config
from feste.params import Parameter, ParameterTable
from feste.transformer import stage_of

LEAST, MOST = 1 << 18, 1 << 23  # elements of a bucket, where cuts allow it: 1 MB and 32 MB


@dataclass(frozen=True)
class Bucket:
    """stage: of the backward pass, behind which it is whole. cuts: bounds of the pieces, in the order of `owners`."""

    stage: int
    cuts: tuple[int, ...]
    owners: tuple[int, ...]

    @property
    def begin(self) -> int:
        return self.cuts[0]

    @property
    def end(self) -> int:
        return self.cuts[-1]

    def piece(self, rank: int) -> slice:
        """What a rank owns of the flat buffer; it may be nothing."""
        i = self.owners.index(rank)
        return slice(self.cuts[i], self.cuts[i + 1])


class Buckets:
    """The buckets of a model among so many ranks, in the order in which they are sent. Iterates over `Bucket`s.

    whole: says of a parameter whether one rank must own all of it.
    """

    def __init__(self, config: Config, ranks: int, whole=lambda parameter: False) -> None:
        self.table, self.ranks = ParameterTable(config), ranks
        self.size = self.table.size
        stages = {p.name: stage_of(p, config) for p in self.table}
        self.cuts = _allowed(self.table, whole)
        places = sorted({self._cut_from(begin) for begin in self._bounds(stages)} | {0, self.size})
        found = []
        for i, (begin, end) in enumerate(pairwise(places)):
            cuts = self._pieces(begin, end)
            stage = max(stages[p.name] for p in _overlapping(self.table, begin, self.covered(slice(begin, end)).stop))
            # in turn, so that nobody is always the one who gets the larger piece
            found.append(Bucket(stage, cuts, tuple((rank + i) % ranks for rank in range(ranks))))
        self._buckets = sorted(found, key=lambda bucket: (bucket.stage, -bucket.begin))

    def __iter__(self):
        return iter(self._buckets)

    def __len__(self) -> int:
        return len(self._buckets)

    def of(self, rank: int) -> list[slice]:
        """All that a rank owns, in the order of the flat buffer."""
        return sorted((b.piece(rank) for b in self if b.piece(rank).start < b.piece(rank).stop), key=lambda s: s.start)

    def covered(self, piece: slice) -> slice:
        """A piece and the rest of its last tile."""
        whole_tiles = -(-piece.stop // ops.SUM_TILE) * ops.SUM_TILE if piece.start < piece.stop else piece.stop
        return slice(piece.start, min(self.size, whole_tiles))

    def _bounds(self, stages: dict[str, int]) -> list[int]:
        """Where a bucket should begin: at a new stage if the last one is large enough, and within what is too large."""
        found, begin = [0], 0
        for stage, group in groupby(self.table, key=lambda p: stages[p.name]):
            parameters = list(group)
            first, last = parameters[0].offset, parameters[-1].offset + parameters[-1].size
            in_turn = 0 < stage < max(stages.values())
            if first - begin >= LEAST or not in_turn:
                found.append(first)
                begin = first
            parts = -(-(last - first) // MOST)
            found += [first + (last - first) * part // parts for part in range(1, parts)]
        return found

    def _pieces(self, begin: int, end: int) -> tuple[int, ...]:
        """Bounds of `ranks` pieces, as alike as the allowed cuts have it."""
        inner = [self._cut_near(begin + (end - begin) * i // self.ranks, begin, end) for i in range(1, self.ranks)]
        return begin, *inner, end

    def _cut_from(self, place: int) -> int:
        return self.cuts[bisect_left(self.cuts, place)]

    def _cut_near(self, place: int, least: int, most: int) -> int:
        i = bisect_left(self.cuts, place)
        near = [cut for cut in self.cuts[max(0, i - 1):i + 1] if least <= cut <= most] or [most]
        return min(near, key=lambda cut: abs(cut - place))


def _allowed(table: ParameterTable, whole) -> list[int]:
    """Where the flat buffer may be cut, in order."""
    cuts = {*range(0, table.size, ops.SUM_TILE), table.size}
    for p in table:
        if whole(p):
            cuts -= set(range(-(-p.offset // ops.SUM_TILE) * ops.SUM_TILE, p.offset + p.size, ops.SUM_TILE))
            cuts |= {p.offset, p.offset + p.size}
    return sorted(cuts)


def _overlapping(table: ParameterTable, begin: int, end: int) -> list[Parameter]:
    return [p for p in table if p.offset < end and begin < p.offset + p.size]
