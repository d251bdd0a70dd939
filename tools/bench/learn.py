"""What a recipe learns: the seed's and the modern one, and the modern one without each of its parts, on several seeds.

A run is a whole training; its figure is the loss over the held-out part, of the parameters that the run ends with, and
of those it would keep as its best.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from feste import GPT2, plan
from feste.config import PRESETS, Preset
from feste.corpus import Source
from feste.evaluation import mean_loss
from feste.trainer import train

from .alternation import Figure

MOST_TOKENS = 1_000_000  # of the held-out part that are scored
# The parts of the recipe: fields of the model and of the run that the two presets of a size differ in.
PARTS = {
    "modern layers": ("arch",),
    "Muon": ("optimizer", "matrix_rate", "momentum"),
    "learning rate": ("learning_rate",),
    "falls to zero": ("schedule", "min_lr_fraction", "warmup_fraction"),
    "betas": ("beta1", "beta2"),
    "dropout and decay": ("dropout", "weight_decay"),
    "token splits": ("token_splits",),
}


@dataclass
class Learned:
    """One recipe on several seeds: losses at the end and at the best validation, in nats, and the time of a step."""

    name: str
    final: Figure
    best: Figure
    step_milliseconds: Figure

    @classmethod
    def of(cls, name: str, preset: Preset, seeds: int, steps: int | None) -> Learned:
        runs = [run(preset, preset.train.seed + seed, steps) for seed in range(seeds)]
        return cls(name, *(Figure([one[i] for one in runs]) for i in range(3)))


def recipes(size: str) -> Iterator[tuple[str, Preset]]:
    """The seed's recipe, the modern one, and that without each part in which they differ."""
    seed, modern = PRESETS[size], PRESETS[f"{size}-modern"]
    yield "the seed's recipe", seed
    yield "the modern recipe", modern
    for name, fields in PARTS.items():
        without = modern
        for part in ("model", "train"):
            ours, theirs = getattr(seed, part), getattr(without, part)
            named = {field: getattr(ours, field) for field in fields if hasattr(ours, field)}
            without = replace(without, **{part: replace(theirs, **named)})
        if without != modern:
            yield f"  without: {name}", without


def run(preset: Preset, seed: int, steps: int | None = None) -> tuple[float, float, float]:
    """Train a preset; loss over the held-out part at the end, the best validation loss, and milliseconds a step."""
    source = Source(None, preset.train_chars, preset.tokenizer_chars)
    tokens, tokenizer = source.load(preset.model.vocab_size)
    config = replace(preset.train, seed=seed, sample_interval=10**9, num_steps=steps or preset.train.num_steps)
    model = GPT2(replace(preset.model, vocab_size=tokenizer.vocab_size), seed, config.precision)
    the_plan = plan.new(model, tokenizer, tokens, config)
    begun = time.perf_counter()
    result = train(the_plan)
    milliseconds = 1e3 * (time.perf_counter() - begun) / result.step
    batches, _ = the_plan.data.scored(config, MOST_TOKENS)
    return mean_loss(model, batches), result.best_val_loss, milliseconds
