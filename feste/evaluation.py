"""How good a model is: mean loss, perplexity, and bits per byte, the one loss that compares across tokenizers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from feste.data import even_starts, whole_starts, windows

if TYPE_CHECKING:
    from feste.model import GPT2
    from feste.tokenizer import BPETokenizer


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats, or infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def mean_loss(model: GPT2, tokens: np.ndarray, starts: np.ndarray, seq_len: int, batch_size: int) -> float:
    """Mean loss in nats per token over windows of seq_len tokens that begin at `starts`, batch_size at a time.

    Windows are cut as they are needed, for the tokens may be a file that is larger than memory.
    """
    total = 0.0
    for i in range(0, len(starts), batch_size):
        ids, targets = windows(tokens, starts[i:i + batch_size], seq_len)
        total += model.loss(ids, targets) * len(ids)
    return total / len(starts)


def held_out_loss(model: GPT2, tokens: np.ndarray, seq_len: int, batch_size: int,
                  most_tokens: int) -> tuple[float, int]:
    """Mean loss over held-out tokens and the number of windows it is of.

    All windows, end to end, or as many as most_tokens allows, spread evenly.
    """
    starts = whole_starts(tokens, seq_len)
    most = max(1, most_tokens // seq_len)
    if len(starts) > most:
        starts = even_starts(tokens, seq_len, most)
    return mean_loss(model, tokens, starts, seq_len, batch_size), len(starts)


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
        nats += mean_loss(model, ids, starts, seq_len, batch_size) * len(starts) * seq_len
    rest = len(ids) - 1 - len(starts) * seq_len
    if rest:
        nats += mean_loss(model, ids, np.array([len(starts) * seq_len]), rest, 1) * rest
    return nats / math.log(2.0) / len(tokenizer.decode_bytes(ids[1:]))
