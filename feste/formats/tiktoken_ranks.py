"""tiktoken's rank files: a base64 token and its rank on each line. The merges are not in them, and are recovered."""

from __future__ import annotations

import base64
import binascii
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

from feste.formats.vocabulary import Parts, TokenizerError


def read(text: str, source: str) -> Parts:
    """A tokenizer from the text of the file; a rank is an id."""
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            if int(rank) in tokens:
                raise TokenizerError(f"{source}, line {number}: rank {rank} stands twice")
            tokens[int(rank)] = base64.b64decode(token, validate=True)
        except TokenizerError:
            raise
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{source}, line {number}: {line!r:.60} is not a base64 token and a rank") from None
    if sorted(tokens) != list(range(len(tokens))):
        raise TokenizerError(f"{source}: the ranks of {len(tokens)} tokens are not 0 .. {len(tokens) - 1}")
    ordered = [tokens[rank] for rank in range(len(tokens))]
    if len(set(ordered)) != len(ordered):
        raise TokenizerError(f"{source}: two ranks stand for the same token")
    return Parts(ordered, np.array(_recover_merges(ordered, source), np.int32).reshape(-1, 2), {})


def _recover_merges(tokens: list[bytes], source: str) -> list[tuple[int, int]]:
    """The pair each token was merged from: what its bytes come to by the merges of lower rank."""
    id_of_byte = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
    if len(id_of_byte) != 256:
        raise TokenizerError(f"{source} lacks the bytes {sorted(set(range(256)) - set(id_of_byte))[:8]}; "
                             "a byte-level tokenizer has all 256")
    made: dict[tuple[int, int], int] = {}
    for i, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = _merge([id_of_byte[byte] for byte in token], made)
        if len(parts) != 2:
            raise TokenizerError(f"{source}: token {i}, {token!r:.60}, is no merge of two tokens of lower rank")
        made[parts[0], parts[1]] = i
    return list(made)


def _merge(symbols: list[int], made: dict[tuple[int, int], int]) -> list[int]:
    """Merge the pair of lowest rank, the leftmost of equals, until there is none.

    Through a heap, so that a file of very long tokens takes no more than n log n.
    """
    left, right = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
    heap = [(made[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in made]
    heapify(heap)
    while heap:
        new, at = heappop(heap)
        behind = right[at]
        if behind < 0 or made.get((symbols[at], symbols[behind])) != new:
            continue  # an earlier merge has changed this place
        symbols[at], symbols[behind], right[at] = new, -1, right[behind]
        if right[at] >= 0:
            left[right[at]] = at
        for start in (left[at], at):
            pair = (symbols[start], symbols[right[start]]) if start >= 0 and right[start] >= 0 else None
            if pair in made:
                heappush(heap, (made[pair], start))
    return [symbol for symbol in symbols if symbol >= 0]


def write(parts: Parts) -> str:
    """The text of the file. Special tokens are not part of it."""
    special = set(parts.special_tokens.values())
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(parts.tokens)
                   if i not in special)
