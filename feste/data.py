"""From one array of tokens to (B, T) windows: every batch is a pure function of (seed, step)."""

from __future__ import annotations

import mmap
from functools import lru_cache

import numpy as np

from feste.errors import FesteError


def split_tokens(tokens: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens, and the last val_fraction of the tokens, held out for validation. Views, no copy."""
    n_val = int(len(tokens) * val_fraction)
    return tokens[:len(tokens) - n_val], tokens[len(tokens) - n_val:]


def require_window(tokens: np.ndarray, seq_len: int, what: str) -> None:
    """FesteError unless the tokens hold one window and its targets."""
    if len(tokens) < seq_len + 1:
        raise FesteError(f"{what} has {len(tokens)} tokens, but one window of seq_len={seq_len} and its targets need "
                         f"{seq_len + 1}; use a longer text or a smaller seq_len", "seq_len")


class Batches:
    """Windows of seq_len tokens and their targets, the same tokens one further on.

    An epoch cuts the text into consecutive windows from a random offset on and shows them in random order, so
    no window repeats before all were seen, and cuts fall elsewhere in each epoch. Offset and order depend on
    (seed, epoch) alone: any step can be made without the ones before it.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int) -> None:
        require_window(tokens, seq_len, "the training text")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        # Every offset up to `slack` leaves the same number of whole windows, so all epochs are equally long.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // seq_len - 1)
        self.slack = min(seq_len, len(tokens) - 1 - self.windows_per_epoch * seq_len)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch start, in the order they are shown."""
        rng = np.random.default_rng([self.seed, epoch])
        return rng.integers(self.slack + 1) + rng.permutation(self.windows_per_epoch) * self.seq_len

    def starts(self, step: int, count: int) -> np.ndarray:
        """Starts of the `count` windows of a step; steps count from 1."""
        index = np.arange((step - 1) * count, step * count)
        epochs, places = np.divmod(index, self.windows_per_epoch)
        return np.array([self._epoch(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])

    def batch(self, step: int, batch_size: int, accumulation: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
        """The mini-batches of a step: (ids, targets), each (batch_size, seq_len) int32.

        The windows of a step are the same however they are divided into mini-batches.
        """
        ids, targets = windows(self.tokens, self.starts(step, batch_size * accumulation), self.seq_len)
        return [(ids[i:i + batch_size], targets[i:i + batch_size]) for i in range(0, len(ids), batch_size)]


def require_whole(tokens: np.ndarray) -> None:
    """FesteError if tokens are a map of a file that was cut off since. To touch what is missing kills a process."""
    if isinstance(tokens, np.memmap) and tokens._mmap is not None:
        begin = tokens.offset - tokens.offset % mmap.ALLOCATIONGRANULARITY  # of a map, not only of what is used of it
        if tokens._mmap.size() < begin + len(tokens._mmap):
            raise FesteError(f"{tokens.filename} was cut off while it was in use: it has {tokens._mmap.size():,} bytes "
                             f"of {begin + len(tokens._mmap):,}; put it back, and resume the run", "data")


def windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and targets, both (len(starts), seq_len) int32."""
    require_whole(tokens)
    both = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
    return np.ascontiguousarray(both[:, :-1]), np.ascontiguousarray(both[:, 1:])


def whole_starts(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Starts of all whole windows with targets, end to end."""
    return np.arange((len(tokens) - 1) // seq_len) * seq_len


def even_starts(tokens: np.ndarray, seq_len: int, count: int) -> np.ndarray:
    """Starts of `count` windows spread evenly over the tokens; where there are fewer, of all of them, end to end."""
    require_window(tokens, seq_len, "the held-out text")
    if count >= (len(tokens) - 1) // seq_len:
        return whole_starts(tokens, seq_len)
    return np.linspace(0, len(tokens) - 1 - seq_len, count).astype(np.int64)
