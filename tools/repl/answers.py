"""Who answers and how: settings, the model of a checkpoint, and its answers as they come. No terminal."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from feste import BPETokenizer, Checkpoint, Sampler, find_checkpoint, ops, perplexity
from feste.errors import FesteError
from feste.generation import Decoder
from feste.pairs import ANSWER, ask
from feste.tokenizer import END_OF_TEXT

# ---- settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dial:
    """A setting that a flag and a command of the same name turn. unset is the word for None."""

    field: str
    kind: type
    help: str
    unset: str | None = None

    def parse(self, word: str) -> float | int | None:
        if word == self.unset:
            return None
        try:
            return self.kind(word)
        except ValueError:
            kind = "a whole number" if self.kind is int else "a number"
            raise ValueError(f"{word!r} is not {kind}{f' or {self.unset!r}' if self.unset else ''}") from None

    def word(self, value: float | int | None) -> str:
        """What `parse` reads as this value, every digit of it: a seed that is rounded draws another answer."""
        return self.unset if value is None else str(value)


DIALS = {
    "temp": Dial("temperature", float, "temperature: 0 takes the most likely token, higher is more varied"),
    "top-k": Dial("top_k", int, "draw from the K most likely tokens only", "off"),
    "top-p": Dial("top_p", float, "draw from the fewest tokens whose probabilities reach P", "off"),
    "tokens": Dial("tokens", int, "new tokens in an answer"),
    "samples": Dial("samples", int, "answers to each prompt, side by side"),
    "seed": Dial("seed", int, "the same seed draws the same answer", "random"),
}


@dataclass(frozen=True)
class Settings:
    """How answers are drawn. A bad value raises ValueError."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    tokens: int = 200
    samples: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        self.sampler(0)

    def sampler(self, seed: int, vocab_size: int | None = None) -> Sampler:
        return Sampler(self.temperature, self.top_k, self.top_p, seed, vocab_size)

    def __str__(self) -> str:
        return ", ".join(f"{name} {dial.word(getattr(self, dial.field))}" for name, dial in DIALS.items())


# ---- models and their answers ------------------------------------------------------------------------------


class LoadedModel:
    """The model and tokenizer of a checkpoint; of a run directory, those of its best checkpoint."""

    def __init__(self, path: str | os.PathLike, precision: str | None = None) -> None:
        self.path, self.passed_over = find_checkpoint(path, prefer="best")
        checkpoint = Checkpoint.load(self.path, precision=precision)
        self.model, self.step, self.best_val_loss = checkpoint.model, checkpoint.step, checkpoint.best_val_loss
        self.train_config = checkpoint.train_config or {}
        beside = self.path.parent / "tokenizer.json"
        if checkpoint.tokenizer is None and not beside.exists():
            raise FesteError(f"{self.path} holds no tokenizer and there is no {beside}; save one there with "
                             "tokenizer.save")
        self.tokenizer = checkpoint.tokenizer or BPETokenizer.load(beside)
        self.name = f"{self.path.absolute().parent.name}/{self.path.name}"
        self._decoder: Decoder | None = None

    def decoder(self, samples: int) -> Decoder:
        """The one of the last prompt, if it had as many samples: its weights are packed."""
        if self._decoder is None or self._decoder.num_samples != samples:
            self._decoder = self.model.decoder(samples)
        return self._decoder

    def facts(self) -> dict[str, str]:
        c = self.model.config
        best = "none" if math.isinf(self.best_val_loss) else (
            f"{self.best_val_loss:.4f} nats, perplexity {perplexity(self.best_val_loss):.2f}")
        return {
            "checkpoint": str(self.path), "step": f"{self.step:,}", "best validation loss": best,
            "model": f"{self.model.num_parameters():,} parameters: {c.n_layers} layers, {c.n_embd} channels, "
                     f"{c.n_heads} heads, context {c.block_size}, {c.arch} layers",
            "tokenizer": f"{self.tokenizer.vocab_size:,} tokens",
            "kernels": f"{ops.isa}, {ops.get_num_threads()} threads, {self.model.precision}",
        }


class Answer:
    """Continuations of a prompt of one model, as many as settings.samples, made together.

    Iterating makes a token of each and yields the pieces of text that are complete with it. A continuation ends at
    <|endoftext|>. ids: what the model reads, if it is not the prompt alone.
    """

    def __init__(self, loaded: LoadedModel, prompt: str, settings: Settings, seed: int,
                 ids: list[int] | None = None) -> None:
        self.loaded, self.settings, self.seed = loaded, settings, seed
        self.ids = loaded.tokenizer.encode(prompt) if ids is None else ids
        self.texts = [""] * settings.samples
        self.drawn: list[list[int]] = [[] for _ in self.texts]
        self.tokens, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[list[str]]:
        tokenizer, ended = self.loaded.tokenizer, [False] * len(self.texts)
        decoders = [tokenizer.stream_decoder() for _ in self.texts]
        stop_tokens = tokenizer.stop_tokens
        begun = time.perf_counter()
        # A model may have room for more tokens than its tokenizer knows.
        sampler = self.settings.sampler(self.seed, tokenizer.vocab_size)
        decoder = self.loaded.decoder(self.settings.samples)
        for ids in decoder.stream(self.ids, self.settings.tokens, sampler, stop_tokens):
            ended = [over or i in stop_tokens for over, i in zip(ended, ids, strict=True)]
            pieces = [""] * len(ids)
            for n in (n for n, over in enumerate(ended) if not over):
                pieces[n] = decoders[n].feed(ids[n])
                self.drawn[n].append(ids[n])
                self.tokens += 1
            self.seconds += time.perf_counter() - begun
            yield self._add(pieces)
            begun = time.perf_counter()
        yield self._add([decoder.flush() for decoder in decoders])

    def _add(self, pieces: list[str]) -> list[str]:
        self.texts = [text + piece for text, piece in zip(self.texts, pieces, strict=True)]
        return pieces

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Conversation:
    """What was asked and answered so far, in the words that a model was fine-tuned on, see `feste.pairs`.

    The oldest turns are forgotten when the model's context has no room for them, the question and an answer.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.tokenizer.end_of_text is None:
            raise ValueError(f"the tokenizer of {loaded.name} has no {END_OF_TEXT}, so the model was not taught to "
                             "end an answer; /chat is for models that were fine-tuned on questions and answers")
        self.loaded, self.turns = loaded, []

    def ask(self, question: str, tokens: int) -> list[int]:
        """The ids that end where the answer to a question begins, of at most `tokens` tokens."""
        self._question = self.loaded.tokenizer.encode(f"{ask('user', question)}{ANSWER}")
        room = self.loaded.model.config.block_size - tokens - len(self._question)
        while self.turns and sum(map(len, self.turns)) > room:
            self.turns.pop(0)
        return [*chain(*self.turns), *self._question]

    def answered(self, ids: list[int]) -> None:
        self.turns.append([*self._question, *ids, self.loaded.tokenizer.end_of_text])
