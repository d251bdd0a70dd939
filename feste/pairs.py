"""Questions with their answers, to fine-tune on: JSON lines of prompts and completions, or of conversations.

    {"prompt": "Who speaks next?", "completion": " HAMLET"}
    {"messages": [{"role": "user", "content": "Who is next?"}, {"role": "assistant", "content": "HAMLET"}]}

are the forms of OpenAI's and Hugging Face's fine-tuning. The loss counts the answers, and the <|endoftext|> behind
each; what is asked is read, not learnt. A prompt and its completion are joined as they stand; a conversation is written
as `ask` and `ANSWER` say, and the REPL asks in the same words.

Every example is a sequence of its own, padded on the right to the longest of its mini-batch, where nothing counts: with
causal attention no token sees what comes behind it, so padding changes nothing. Examples of similar length go together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from feste.config import IGNORED, TrainConfig
from feste.errors import FesteError
from feste.text import read_text
from feste.tokenizer import END_OF_TEXT, BPETokenizer

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
ANSWER = "Assistant:"  # stands before an answer, which begins with a space
ROUNDED = 16           # the length of a mini-batch is a multiple of so many tokens
STEPS_TOGETHER = 32    # steps whose examples are sorted by length before they are cut into steps


class PairsError(FesteError):
    """A file that is not one of pairs: its line, and what would help."""


@dataclass(frozen=True)
class Piece:
    """Part of an example: its text, and whether it is an answer, which the loss counts."""

    text: str
    counted: bool


def ask(role: str, content: str) -> str:
    """A turn of a conversation that is not an answer."""
    return f"{ROLES[role]}: {content}\n"


# ---- from lines to pieces ----------------------------------------------------------------------------------


def read_pairs(path: str | os.PathLike, encoding: str | None = None, errors: str = "strict") -> dict[int, list[Piece]]:
    """Line number -> the pieces of its example. PairsError for the first line that is none."""
    found: dict[int, list[Piece]] = {}
    for number, line in enumerate(read_text(path, encoding, errors).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found[number] = _example(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise PairsError(f"{path}, line {number}: {_short(error)}", "data") from None
    if len(found) < 2:
        raise PairsError(f"{path} has {len(found)} examples; at least 2 are needed, one to learn from and one to hold "
                         "out", "data")
    return found


def looks_like_pairs(text: str) -> bool:
    """Whether the first line of a text is, or is meant to be, an example: not if it is an object with a "text"."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    with suppress(ValueError, RecursionError):
        value = json.loads(first)
        return not isinstance(value, dict) or "text" not in value
    return first.lstrip().startswith("{")


def _short(error: Exception) -> str:
    return f"no JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error) or "nested too deeply"


def _example(value: object) -> list[Piece]:
    """The pieces of a line's example, or ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"an object is expected, not {value!r:.40}")
    if "messages" in value:
        return _conversation(value["messages"])
    if "prompt" not in value or "completion" not in value:
        raise ValueError(f'neither "prompt" and "completion" nor "messages" are among its keys '
                         f"({', '.join(map(repr, value)) or 'it has none'})"[:200])
    return [Piece(_text(value, "prompt", empty=True), False), Piece(_text(value, "completion"), True)]


def _conversation(messages: object) -> list[Piece]:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list of at least one message')
    pieces = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"every message needs a role, one of {', '.join(ROLES)}; got {role!r:.40}")
        content = _text(message, "content")
        pieces += [Piece(ANSWER, False), Piece(f" {content}", True)] if role == "assistant" else [
            Piece(ask(role, content), False)]
    if not pieces[-1].counted:
        raise ValueError("the last message must be an answer of the assistant")
    return pieces


def _text(value: Mapping, key: str, empty: bool = False) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not (text or empty):
        raise ValueError(f'"{key}" must be a text{"" if empty else " that is not empty"}, got {text!r:.40}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{key}" holds half of a surrogate pair, which is no character') from None
    return text


# ---- from pieces to tokens ---------------------------------------------------------------------------------


class Pairs:
    """Examples as tokens, and which of them count; what a run learns from, like `data.Text`.

    ids, counted: all examples end to end; ends: where each begins, and the end of the last; lines: that of each in its
    file; prompts: what comes before the first answer of each.
    """

    def __init__(self, examples: Mapping[int, Sequence[Piece]], tokenizer: BPETokenizer) -> None:
        if tokenizer.end_of_text is None:
            raise FesteError(f"the tokenizer has no {END_OF_TEXT}, which ends an answer; add it with "
                             "tokenizer.with_special_tokens", "tokenizer")
        ids, counted, self.lines, self.prompts = [], [], list(examples), []
        for pieces in examples.values():
            encoded = [_encoded(piece, tokenizer) for piece in pieces]
            ids.append(np.concatenate(encoded))
            counted.append(np.repeat([piece.counted for piece in pieces], [len(part) for part in encoded]))
            self.prompts.append("".join(_before_answer(pieces)))
        self.ends = np.concatenate([[0], np.cumsum([len(part) for part in ids])])
        self.ids, self.counted = np.concatenate(ids).astype(np.int32), np.concatenate(counted)
        self.padding = tokenizer.end_of_text

    def __len__(self) -> int:
        """Tokens, those that do not count included."""
        return len(self.ids)

    def sha256(self) -> str:
        """Of the tokens, of which count, and of where examples end."""
        digest = hashlib.sha256()
        for part in (self.ids.astype(np.uint32), self.counted, self.ends.astype(np.uint64)):
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()

    def split(self, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the examples to learn from, and of those held out, the last val_fraction; at least one of each."""
        count = len(self.lines)
        held_out = min(count - 1, max(1, int(count * config.val_fraction)))
        return np.arange(count - held_out), np.arange(count - held_out, count)

    def require(self, config: TrainConfig) -> None:
        """FesteError for an example that seq_len does not hold."""
        lengths = np.diff(self.ends)
        for i in np.flatnonzero(lengths - 1 > config.seq_len)[:1]:
            too_long = (lengths - 1 > config.seq_len).sum()
            raise PairsError(f"the example of line {self.lines[i]} has {lengths[i]:,} tokens, and a sequence holds "
                             f"seq_len + 1 = {config.seq_len + 1:,}; {too_long:,} are too long. Shorten them, or leave "
                             "them out", "data", "seq_len")

    def passes(self, config: TrainConfig) -> float:
        """How many times a run sees the examples that are to learn from."""
        return config.num_steps * config.batch_size * config.accumulation / len(self.split(config)[0])

    def describe(self, config: TrainConfig) -> str:
        """How many there are, and how many a step takes."""
        held_out = self.split(config)[1]
        return (f"{len(self.lines):,} examples of {len(self):,} tokens, {self.counted.sum():,} of them in answers; the "
                f"last {len(held_out):,} held out; {config.batch_size} x {config.accumulation} a step")

    def tokens_per_step(self, config: TrainConfig) -> int:
        """On average, without padding."""
        return round(config.batch_size * config.accumulation * len(self) / len(self.lines))

    def batches(self, config: TrainConfig, tokenizer: BPETokenizer | None = None) -> PairBatches:
        """The mini-batches of every step."""
        if config.token_splits:
            raise FesteError(f"token_splits={config.token_splits} is for texts; questions and answers are read as they "
                             "are", "token_splits")
        return PairBatches(self, self.split(config)[0], config.seed)

    def validation(self, config: TrainConfig, windows: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Mini-batches of the held-out examples: val_windows of them, or so many, spread evenly."""
        held_out = self.split(config)[1]
        count = min(len(held_out), windows or config.val_windows)
        chosen = held_out[np.linspace(0, len(held_out) - 1, count).astype(np.int64)]
        return (self.padded(chosen[i:i + config.batch_size]) for i in range(0, count, config.batch_size))

    def scored(self, config: TrainConfig, most_tokens: int) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], str]:
        """The held-out examples, as many as most_tokens allows, and a line that says of how many the score is."""
        held_out = self.split(config)[1]
        count = min(len(held_out), max(1, most_tokens // config.seq_len))
        whole = count == len(held_out)
        return self.validation(config, count), (f"the answers of {'all ' if whole else ''}{count:,} held-out examples"
                                                + ("" if whole else f" of {len(held_out):,}, spread evenly"))

    def sample_prompts(self, config: TrainConfig, tokenizer: BPETokenizer, count: int) -> list[str]:
        """What the first held-out examples ask."""
        return [self.prompts[i] for i in self.split(config)[1][:count]]

    def padded(self, examples: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """ids and targets (B, T) int32 of some examples; targets are IGNORED where nothing counts."""
        parts = [slice(self.ends[i], self.ends[i + 1]) for i in examples]
        T = -(-max(part.stop - part.start - 1 for part in parts) // ROUNDED) * ROUNDED
        ids = np.full((len(parts), T), self.padding, np.int32)
        targets = np.full((len(parts), T), IGNORED, np.int32)
        for row, part in enumerate(parts):
            n = part.stop - part.start - 1
            ids[row, :n] = self.ids[part][:-1]
            targets[row, :n] = np.where(self.counted[part][1:], self.ids[part][1:], IGNORED)
        return ids, targets


def _encoded(piece: Piece, tokenizer: BPETokenizer) -> np.ndarray:
    """A piece as tokens; an answer ends with <|endoftext|>."""
    ids = tokenizer.encode_to_numpy(piece.text)
    return np.append(ids, tokenizer.end_of_text) if piece.counted else ids


def _before_answer(pieces: Sequence[Piece]) -> Iterator[str]:
    for piece in pieces:
        if piece.counted:
            return
        yield piece.text


class PairBatches:
    """The mini-batches of every step, a pure function of (seed, step).

    An epoch shows every example once, in random order; those of STEPS_TOGETHER steps are sorted by length, cut into
    steps, and the steps shuffled. What is left over when the last step is full waits for the next epoch's order.
    """

    def __init__(self, pairs: Pairs, examples: np.ndarray, seed: int) -> None:
        self.pairs, self.examples, self.seed = pairs, examples, seed
        self.lengths = np.diff(pairs.ends)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int, count: int) -> np.ndarray:
        """The examples of each step of an epoch, (steps, count)."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.examples)
        order = np.resize(order, max(1, len(order) // count) * count)  # repeats them where a step takes more
        for i in range(0, len(order), STEPS_TOGETHER * count):
            together = order[i:i + STEPS_TOGETHER * count]
            together[:] = together[np.argsort(self.lengths[together], kind="stable")]
        return rng.permutation(order.reshape(-1, count))

    def batch(self, step: int, batch_size: int, accumulation: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
        """The mini-batches of a step, which counts from 1: (ids, targets), each (batch_size, T) int32."""
        count = batch_size * accumulation
        steps = max(1, len(self.examples) // count)
        chosen = self._epoch((step - 1) // steps, count)[(step - 1) % steps]
        edges = [*range(0, count, batch_size), count]
        return [self.pairs.padded(chosen[a:b]) for a, b in pairwise(edges)]
