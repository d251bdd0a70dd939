"""What a model thinks of a text: the tokens it expects next, and how much each token of the text surprises it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from feste.terminal import clean

from .answers import LoadedModel

EXPECTED = 10  # tokens that /probs shows
BAR = 30       # characters of a certain token
# Bits from which a token has a colour, with the style. A bit is a choice of two; ln(V) nats would be a blind guess.
SURPRISE = ((10.0, "white on dark_red"), (7.0, "white on red3"), (4.0, "black on dark_orange"),
            (2.0, "black on light_goldenrod1"), (0.0, "black on pale_green1"))


@dataclass(frozen=True)
class Token:
    """A token, the probability that the model gave it, and what that is in bits of surprise."""

    text: bytes
    probability: float

    @property
    def bits(self) -> float:
        return -float(np.log2(self.probability)) if self.probability > 0.0 else float("inf")


def probabilities(loaded: LoadedModel, ids: list[int]) -> np.ndarray:
    """Of every token (V) after each of the ids (T, V), as far as the model's context reaches."""
    logits = loaded.model.forward(np.array([ids], np.int32))[0, :, :loaded.tokenizer.vocab_size].astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def expected(loaded: LoadedModel, text: str, count: int = EXPECTED) -> list[Token]:
    """The likeliest tokens after a text, the likeliest first."""
    ids = loaded.tokenizer.encode(text)[-loaded.model.config.block_size:]
    after = probabilities(loaded, ids)[-1]
    return [Token(loaded.tokenizer.tokens[i], float(after[i])) for i in np.argsort(-after, kind="stable")[:count]]


def surprises(loaded: LoadedModel, text: str) -> list[Token]:
    """The tokens of a text but the first, with the probability that the model gave each, knowing those before it.

    Of a text that is longer than the context, the last ones. ValueError for a text of fewer than two tokens.
    """
    ids = loaded.tokenizer.encode(text)[-loaded.model.config.block_size - 1:]
    if len(ids) < 2:
        raise ValueError(f"{text!r} is a single token, and nothing stands before it that it could surprise after")
    before = probabilities(loaded, ids[:-1])
    return [Token(loaded.tokenizer.tokens[i], float(p[i])) for i, p in zip(ids[1:], before, strict=True)]


def bars(tokens: list[Token], token_text) -> Table:
    """A bar for each token, as long as it is likely."""
    table = Table.grid(padding=(0, 1))
    for token in tokens:
        bar = "█" * round(BAR * token.probability) or "▏"
        table.add_row(Text(f"{100 * token.probability:5.1f} %", "dim"), Text(bar, "cyan"),
                      Text(token_text(token.text), "bold"))
    return table


def coloured(first: str, tokens: list[Token]) -> Text:
    """A text with each token in the colour of its surprise; the first one has none. Bytes that are no text are dots."""
    painted = Text(first, "dim")
    for token in tokens:
        style = next(style for least, style in SURPRISE if token.bits >= least)
        painted.append(clean(token.text.decode("utf-8", "replace")).replace("\ufffd", "·"), style)
    return painted


def legend() -> Text:
    """What the colours mean."""
    ends = [None, *(least for least, _ in SURPRISE)]
    parts = [(f" {least:g} to {most:g} bits " if most else f" {least:g} bits and more ", style)
             for (least, style), most in zip(SURPRISE, ends, strict=False)]
    return Text.assemble(*[piece for part in reversed(parts) for piece in (part, " ")])
