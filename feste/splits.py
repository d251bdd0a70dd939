"""Other spellings of a text in the same tokens, so that a text that is read many times is not learnt by heart.

Now and then a token is read as two shorter ones that spell the same bytes (StochasTok: Sims et al. 2025,
arXiv:2506.01687; its ancestor is BPE-dropout: Provilkov et al. 2020, arXiv:1910.13267). Each pass over the text then
shows other tokens, and what the model keeps is the text and not one row of numbers: docs/LEARNING.md has the figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from feste.config import TrainConfig
from feste.errors import FesteError
from feste.schedule import share_of_peak_rate

if TYPE_CHECKING:
    from feste.tokenizer import BPETokenizer

ROUNDS = 2      # the halves of a token may be split again
RANDOM_KEY = 1  # keeps the random numbers of splits apart from those of the batches


class TokenSplits:
    """Splits tokens into any of the pairs of tokens that spell them, all as likely.

    Single bytes and special tokens have no such pair. FesteError where no token has one.
    """

    def __init__(self, tokenizer: BPETokenizer) -> None:
        special = set(tokenizer.special_tokens.values())
        spelt = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size) if i not in special}
        pairs: list[list[tuple[int, int]]] = [[] for _ in range(tokenizer.vocab_size)]
        for word, i in spelt.items():
            halves = ((spelt.get(word[:k]), spelt.get(word[k:])) for k in range(1, len(word)))
            pairs[i] = [(left, right) for left, right in halves if left is not None and right is not None]
        self._counts = np.array([len(found) for found in pairs])
        if not self._counts.any():
            raise FesteError("token_splits needs tokens that others spell, and these are single bytes", "token_splits")
        self._first = np.cumsum(self._counts) - self._counts
        self._pairs = np.array([pair for found in pairs for pair in found])

    def split(self, rows: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
        """Rows of tokens (N, n), each split with probability `rate`, cut off behind n tokens."""
        n_rows, n = rows.shape
        ids, starts = rows.ravel(), np.arange(n_rows) * n
        for _ in range(ROUNDS):
            counts = self._counts[ids]
            hit = (rng.random(len(ids)) < rate) & (counts > 0)
            chosen = self._first[ids] + (rng.random(len(ids)) * counts).astype(np.int64)
            places = np.arange(len(ids)) + np.cumsum(hit) - hit  # of each token among the new ones
            ids = np.repeat(ids, 1 + hit)
            ids[places[hit]], ids[places[hit] + 1] = self._pairs[chosen[hit]].T
            starts = places[starts]
        return ids[starts[:, None] + np.arange(n)]


class Speller:
    """What a run reads instead of the windows of a step: (seed, step) decide how their tokens are split.

    The rate is config.token_splits at the peak of the learning rate and falls with it, so that what is learnt last is
    the text as it will be read.
    """

    def __init__(self, tokenizer: BPETokenizer, config: TrainConfig) -> None:
        self.splits, self.config = TokenSplits(tokenizer), config

    def spell(self, rows: np.ndarray, step: int) -> np.ndarray:
        """The windows (N, n) of a step in other tokens."""
        rng = np.random.default_rng([self.config.seed, step, RANDOM_KEY])
        return self.splits.split(rows, self.config.token_splits * share_of_peak_rate(step, self.config), rng)
