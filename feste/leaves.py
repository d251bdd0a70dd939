"""The gradient of a step, added up in an order that does not depend on who computes it.

A leaf is the gradient of one mini-batch. Leaves are added in a binary tree: neighbours in pairs, then pairs of pairs,
and where one is left over it goes up a level alone. Any 2^k leaves that stand together from a multiple of 2^k on are
thus a subtree, whose sum is the same whether one process or one of many makes it: so the ranks of `parallel` share the
leaves of a step, and every number of them comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from feste import ops

if TYPE_CHECKING:
    from feste.model import GPT2


def merges(i: int, count: int) -> int:
    """How often, once item i of `count` stands on the stack of sums, the upper two of the stack become one.

    That is the tree: behind every second item a pair is closed, behind every fourth two pairs; behind the last, all.
    """
    if i == count - 1:
        return i.bit_count()
    return ((i + 1) & -(i + 1)).bit_length() - 1  # ones at the end of i


def depth(count: int) -> int:
    """How high the stack of sums grows."""
    return max(i.bit_count() + 1 for i in range(count))


def tree_sum(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of arrays of one shape, in the order of the tree; in the memory of the parts."""
    stack: list[np.ndarray] = []
    for i, part in enumerate(parts):
        stack.append(part)
        for _ in range(merges(i, len(parts))):
            upper = stack.pop()
            np.add(stack[-1], upper, out=stack[-1])
    return stack[0]


class _Hooks:
    """Of one pass: transformer.Hooks from functions, or from none."""

    def __init__(self, before: Callable[[int], None] | None, after: Callable[[int], None] | None) -> None:
        self.any = before is not None or after is not None
        self.before, self.after = before or _nothing, after or _nothing


def _nothing(stage: int) -> None:
    pass


class Leaves:
    """The mini-batches of a step that this process computes; the sum of their gradients is left in the model's.

    More than one need room: buffers as large as the model's gradients, as many as the tree of `count` leaves is deep.
    """

    def __init__(self, model: GPT2, count: int) -> None:
        self.model, self.count = model, count
        self.stack = [model.gradients, *(model.new_gradients() for _ in range(depth(count) - 1))]

    def compute(self, batches: Sequence[tuple[np.ndarray, np.ndarray]], shares: Sequence[float], first_key: int,
                needed: Callable[[int], None] | None = None,
                ready: Callable[[int], Iterator[slice]] | None = None) -> list[float]:
        """The mean loss of each mini-batch; the gradients, each times its share, are added to those of the model.

        The model's gradients must be zero before it. first_key: dropout_key of the first mini-batch, the others follow.
        needed(stage) is called before the first mini-batch's pass reads the parameters of a stage. ready(stage), called
        in the last one's, yields the ranges of the flat buffer that are whole then; each holds the sum when the next is
        asked for.
        """
        losses, last = [], self.count - 1
        for i, ((ids, targets), share) in enumerate(zip(batches, shares, strict=True)):
            hooks = _Hooks(needed if i == 0 else None,
                           (lambda stage: self._merge(last, ready(stage))) if ready and i == last else None)
            losses.append(self.model.forward_backward(ids, targets, share, first_key + i, self.stack[i.bit_count()],
                                                      hooks if hooks.any else None))
            if not (ready and i == last):
                self._merge(i, [slice(0, self.model.table.size)])
        return losses

    def _merge(self, i: int, ranges: Iterable[slice]) -> None:
        """The sums that leaf i closes, within ranges of the flat buffer; what was merged is zero again."""
        top, closed = i.bit_count(), merges(i, self.count)
        for part in ranges:
            for level in range(top, top - closed, -1):
                ops.add(self.stack[level - 1].flat[part], self.stack[level].flat[part], True, part.stop - part.start)
