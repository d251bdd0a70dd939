"""Who answers and how: settings, the model of a checkpoint, and its answers as they come. No terminal."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from feste import BPETokenizer, Checkpoint, Sampler, find_checkpoint, ops, perplexity
from feste.errors import FesteError
from feste.generation import Decoder

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
                     f"{c.n_heads} heads, context {c.block_size}",
            "tokenizer": f"{self.tokenizer.vocab_size:,} tokens",
            "kernels": f"{ops.isa}, {ops.get_num_threads()} threads, {self.model.precision}",
        }


class Answer:
    """Continuations of a prompt of one model, as many as settings.samples, made together.

    Iterating makes a token of each and yields the pieces of text that are complete with it.
    """

    def __init__(self, loaded: LoadedModel, prompt: str, settings: Settings, seed: int) -> None:
        self.loaded, self.settings, self.seed = loaded, settings, seed
        self.ids = loaded.tokenizer.encode(prompt)
        self.texts = [""] * settings.samples
        self.tokens, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[list[str]]:
        decoders = [self.loaded.tokenizer.stream_decoder() for _ in self.texts]
        begun = time.perf_counter()
        # A model may have room for more tokens than its tokenizer knows.
        sampler = self.settings.sampler(self.seed, self.loaded.tokenizer.vocab_size)
        for ids in self.loaded.decoder(self.settings.samples).stream(self.ids, self.settings.tokens, sampler):
            pieces = [decoder.feed(i) for decoder, i in zip(decoders, ids, strict=True)]
            self.tokens += len(ids)
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
