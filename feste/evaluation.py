"""How good a model is: mean loss, perplexity, and bits per byte, the one loss that compares across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from feste.config import IGNORED
from feste.data import count_targets, scored_starts, whole_starts, window_batches, windows

if TYPE_CHECKING:
    from feste.model import GPT2
    from feste.parallel.team import Alone
    from feste.tokenizer import BPETokenizer


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats, or infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def in_bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte, for tokens of so many UTF-8 bytes each, on average."""
    return loss / math.log(2.0) / bytes_per_token


def bytes_per_token(batches: Iterable[tuple[np.ndarray, np.ndarray]], tokenizer: BPETokenizer) -> float | None:
    """UTF-8 bytes of a target that counts, on average over mini-batches; None if they have none."""
    counted = [targets[targets != IGNORED] for _, targets in batches]
    tokens = sum(map(len, counted))
    size = sum(len(tokenizer.decode_bytes(targets.tolist())) for targets in counted)
    return size / tokens if size else None


def mean_loss(model: GPT2, batches: Iterable[tuple[np.ndarray, np.ndarray]], team: Alone | None = None) -> float:
    """Mean loss in nats per token that counts, over mini-batches (ids, targets).

    The ranks of a team compute some each, and come to the number that one process would.
    """
    rank, ranks = (team.rank, team.size) if team else (0, 1)
    found = [(model.loss(ids, targets), count_targets(targets))
             for i, (ids, targets) in enumerate(batches) if i % ranks == rank]
    everyone = team.gather(found) if team else [found]
    total = tokens = 0
    for i in range(sum(map(len, everyone))):
        loss, counted = everyone[i % ranks][i // ranks]
        total += loss * counted
        tokens += counted
    return total / tokens


def held_out_loss(model: GPT2, tokens: np.ndarray, seq_len: int, batch_size: int,
                  most_tokens: int) -> tuple[float, int]:
    """Mean loss over held-out tokens and the number of windows it is of.

    All windows, end to end, or as many as most_tokens allows, spread evenly.
    """
    starts = scored_starts(tokens, seq_len, most_tokens)
    return mean_loss(model, window_batches(tokens, starts, seq_len, batch_size)), len(starts)


def bits_per_byte(model: GPT2, tokenizer: BPETokenizer, text: str, seq_len: int, batch_size: int = 8) -> float:
    """Bits that a model needs for each UTF-8 byte of a text: summed loss in nats / ln 2 / bytes predicted.

    The text is read in windows of seq_len tokens, end to end; every token but the first is predicted once, from the
    tokens before it in its window. ValueError for a text of fewer than two tokens.
    """
    ids = tokenizer.encode_to_numpy(text)
    if len(ids) < 2:
        raise ValueError(f"the held-out text has {len(ids)} tokens; at least 2 are needed to predict one")
    starts, nats = whole_starts(ids, seq_len), 0.0
    if len(starts):
        nats += mean_loss(model, window_batches(ids, starts, seq_len, batch_size)) * len(starts) * seq_len
    rest = len(ids) - 1 - len(starts) * seq_len
    if rest:
        nats += mean_loss(model, [windows(ids, np.array([len(starts) * seq_len]), rest)]) * rest
    return nats / math.log(2.0) / len(tokenizer.decode_bytes(ids[1:]))
