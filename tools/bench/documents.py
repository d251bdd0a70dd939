"""What tokenizers are measured on. Nothing of feste, for the peers use it too."""

from __future__ import annotations

import numpy as np

VOCAB_SIZES = (512, 1536, 20534)
MOST_DOCUMENTS = 180_000


def digest(ids) -> int:
    """A number that tells sequences of ids apart."""
    return int(np.asarray(ids, np.uint64).cumsum().sum() % (1 << 31))


def cut(text: str, lengths: list[int]) -> dict[int, list[str]]:
    """A text as documents of so many characters, for each length."""
    return {length: [text[i:i + length] for i in range(0, len(text), length)][:MOST_DOCUMENTS] for length in lengths}
