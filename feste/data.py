"""What a run learns from: a text as one array of tokens, and its (B, T) windows.

`Text` is what a run knows of it, as `pairs.Pairs` is of questions and answers: how it is split, its mini-batches (a
pure function of (seed, step)), what is held out, and how it is described.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from feste.config import IGNORED, TrainConfig
from feste.errors import FesteError
from feste.shards import Shards
from feste.splits import Speller

if TYPE_CHECKING:
    from feste.tokenizer import BPETokenizer

HASH_BLOCK = 1 << 20      # tokens
PROMPT_TOKENS = 8         # words of a sample's beginning at most, out of twice as many tokens
MOST_IN_MEMORY = 1 << 24  # windows of an epoch whose order is held in memory: 128 MB


class Text:
    """A text: one row of tokens, of which the last val_fraction are held out, or others that are given."""

    def __init__(self, tokens: np.ndarray | Shards, held_out: np.ndarray | Shards | None = None) -> None:
        self.tokens, self.held_out = tokens, held_out

    def __len__(self) -> int:
        return len(self.tokens)

    def sha256(self) -> str:
        """Of the ids, whatever their type; in blocks, for they may be larger than memory. Of shards, a fingerprint."""
        digest = hashlib.sha256()
        if isinstance(self.tokens, Shards):
            digest.update(self.tokens.fingerprint())
            digest.update(self.held_out.fingerprint() if self.held_out is not None else b"")
            return digest.hexdigest()
        for tokens in (self.tokens, self.held_out) if self.held_out is not None else (self.tokens,):
            for i in range(0, len(tokens), HASH_BLOCK):
                require_whole(tokens)
                digest.update(np.ascontiguousarray(tokens[i:i + HASH_BLOCK], np.uint32))
        return digest.hexdigest()

    def split(self, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
        return split_tokens(self.tokens, config.val_fraction) if self.held_out is None else (self.tokens, self.held_out)

    def require(self, config: TrainConfig) -> None:
        """FesteError unless both parts hold a window of seq_len."""
        train, held_out = self.split(config)
        part = f"part ({config.val_fraction:.0%} of the text)" if self.held_out is None else "text"
        require_window(held_out, config.seq_len, f"the held-out {part}")
        require_window(train, config.seq_len, "the training text")

    def passes(self, config: TrainConfig) -> float:
        """How many times a run reads the training part."""
        return config.num_steps * config.tokens_per_step / len(self.split(config)[0])

    def describe(self, config: TrainConfig) -> str:
        """How many tokens there are, and what a step takes of them."""
        n, held_out = len(self), len(self.split(config)[1])
        files = f" in {len(self.tokens.parts):,} files" if isinstance(self.tokens, Shards) else ""
        part = f"the last {held_out:,}" if self.held_out is None else f"{held_out:,} in files of their own"
        return (f"{n:,} tokens{files}, {part} held out; {config.tokens_per_step:,} tokens a step "
                f"({config.batch_size} x {config.accumulation} sequences of {config.seq_len})")

    def tokens_per_step(self, config: TrainConfig) -> int:
        return config.tokens_per_step

    def batches(self, config: TrainConfig, tokenizer: BPETokenizer | None = None) -> Batches:
        """The mini-batches of every step. tokenizer: that of the tokens, which token_splits needs."""
        speller = Speller(tokenizer, config) if config.token_splits else None
        return Batches(self.split(config)[0], config.seq_len, config.seed, speller)

    def validation(self, config: TrainConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Mini-batches of val_windows windows, spread evenly over the held-out part."""
        held_out = self.split(config)[1]
        return window_batches(held_out, even_starts(held_out, config.seq_len, config.val_windows), config.seq_len,
                              config.batch_size)

    def scored(self, config: TrainConfig, most_tokens: int) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], str]:
        """Windows of the held-out part, as many as most_tokens allows, and a line that says of what the score is."""
        held_out = self.split(config)[1]
        starts = scored_starts(held_out, config.seq_len, most_tokens)
        whole = len(starts) == (len(held_out) - 1) // config.seq_len
        of = "the whole held-out part" if whole else f"{len(starts):,} windows spread over the held-out part"
        return window_batches(held_out, starts, config.seq_len, config.batch_size), of

    def sample_prompts(self, config: TrainConfig, tokenizer: BPETokenizer, count: int) -> list[str]:
        """Beginnings to go on from: some words at places spread over the held-out part."""
        held_out, found = self.split(config)[1], []
        for place in np.linspace(0, max(0, len(held_out) - 4 * PROMPT_TOKENS), count).astype(np.int64).tolist():
            text = tokenizer.decode(np.asarray(held_out[place:place + 2 * PROMPT_TOKENS]).tolist())
            text = text.replace("\ufffd", "")
            line = next((line for line in text.split("\n")[place > 0:] if len(line) > 3), text).strip()
            words = line.split(" ")
            found.append(" ".join(words[:-1][:PROMPT_TOKENS]) or line)  # the last word may be cut off
        return [prompt for prompt in dict.fromkeys(found) if prompt]


def split_tokens(tokens: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens, and the last val_fraction of the tokens, held out for validation. Views, no copy."""
    n_val = int(len(tokens) * val_fraction)
    return tokens[:len(tokens) - n_val], tokens[len(tokens) - n_val:]


def require_window(tokens: np.ndarray, seq_len: int, what: str) -> None:
    """FesteError unless the tokens hold one window and its targets."""
    if len(tokens) < seq_len + 1:
        raise FesteError(f"{what} has {len(tokens)} tokens, but one window of seq_len={seq_len} and its targets need "
                         f"{seq_len + 1}; use a longer text or a smaller seq_len", "seq_len")


class Shuffle:
    """A permutation of 0 .. n - 1 that is computed and not held, for n that memory is too small for.

    A Feistel network of four rounds permutes the numbers of an even number of bits; one that lands at n or beyond goes
    through it again (cycle walking, Black and Rogaway 2002).
    """

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        self.n, self.half = n, ((n - 1).bit_length() + 1) // 2
        self.keys = [int(key) for key in rng.integers(1 << 62, size=4)]

    def __getitem__(self, place: int) -> int:
        """The number at a place."""
        while True:
            place = self._permuted(place)
            if place < self.n:
                return place

    def _permuted(self, x: int) -> int:
        left, right, mask = x >> self.half, x & ((1 << self.half) - 1), (1 << self.half) - 1
        for key in self.keys:
            mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        return left << self.half | right


class Batches:
    """Windows of seq_len tokens and their targets, the same tokens one further on.

    An epoch cuts the text into consecutive windows from a random offset on and shows them in random order, so
    no window repeats before all were seen, and cuts fall elsewhere in each epoch. Offset and order depend on
    (seed, epoch) alone: any step can be made without the ones before it. With a speller, a window is read in
    other tokens in each epoch, and ends a little earlier in the text.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, speller: Speller | None = None) -> None:
        require_window(tokens, seq_len, "the training text")
        self.tokens, self.seq_len, self.seed, self.speller = tokens, seq_len, seed, speller
        # Every offset up to `slack` leaves the same number of whole windows, so all epochs are equally long.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // seq_len - 1)
        self.slack = min(seq_len, len(tokens) - 1 - self.windows_per_epoch * seq_len)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[int, np.ndarray | Shuffle]:
        """Where the first window of an epoch starts, and the order in which its windows are shown."""
        rng = np.random.default_rng([self.seed, epoch])
        n = self.windows_per_epoch
        return int(rng.integers(self.slack + 1)), rng.permutation(n) if n <= MOST_IN_MEMORY else Shuffle(n, rng)

    def starts(self, step: int, count: int) -> np.ndarray:
        """Starts of the `count` windows of a step; steps count from 1."""
        index = np.arange((step - 1) * count, step * count)
        epochs, places = np.divmod(index, self.windows_per_epoch)
        found = []
        for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True):
            offset, order = self._epoch(epoch)
            found.append(offset + int(order[place]) * self.seq_len)
        return np.array(found)

    def batch(self, step: int, batch_size: int, accumulation: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
        """The mini-batches of a step: (ids, targets), each (batch_size, seq_len) int32.

        The windows of a step are the same however they are divided into mini-batches.
        """
        ids, targets = windows(self.tokens, self.starts(step, batch_size * accumulation), self.seq_len)
        if self.speller is not None:
            spelt = self.speller.spell(np.hstack([ids, targets[:, -1:]]), step)
            ids, targets = np.ascontiguousarray(spelt[:, :-1]), np.ascontiguousarray(spelt[:, 1:])
        return [(ids[i:i + batch_size], targets[i:i + batch_size]) for i in range(0, len(ids), batch_size)]


def require_whole(tokens: np.ndarray) -> None:
    """FesteError if tokens are a map of a file that was cut off since. To touch what is missing kills a process."""
    if isinstance(tokens, Shards):
        for part in tokens.parts:
            require_whole(part)
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


def window_batches(tokens: np.ndarray, starts: np.ndarray, seq_len: int,
                   batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows as mini-batches, cut as they are needed, for the tokens may be a file that is larger than memory."""
    for i in range(0, len(starts), batch_size):
        yield windows(tokens, starts[i:i + batch_size], seq_len)


def count_targets(targets: np.ndarray) -> int:
    """How many targets the loss counts."""
    return int(np.count_nonzero(targets != IGNORED))


def whole_starts(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Starts of all whole windows with targets, end to end."""
    return np.arange((len(tokens) - 1) // seq_len) * seq_len


def scored_starts(tokens: np.ndarray, seq_len: int, most_tokens: int) -> np.ndarray:
    """Starts of all whole windows, or of as many, spread evenly, as most_tokens allows."""
    return even_starts(tokens, seq_len, max(1, most_tokens // seq_len))


def even_starts(tokens: np.ndarray, seq_len: int, count: int) -> np.ndarray:
    """Starts of `count` windows spread evenly over the tokens; where there are fewer, of all of them, end to end."""
    require_window(tokens, seq_len, "the held-out text")
    if count >= (len(tokens) - 1) // seq_len:
        return whole_starts(tokens, seq_len)
    return np.linspace(0, len(tokens) - 1 - seq_len, count).astype(np.int64)
