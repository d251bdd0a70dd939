"""The preset `best`: shape, batch and steps for one text, on this machine, in so many minutes.

The rule comes from the grid of runs in docs/LEARNING.md: of the shapes below, the largest that sees
TOKENS_PER_PARAMETER tokens for each of its parameters in the time, at the speed that is measured here. A smaller one
has learned what it can before the time is over; a larger one has not begun to. A text that is read many times needs
dropout and other spellings (splits.py); and as they do not keep every model from learning a short text by heart,
neither the parameters nor the passes over it are more than MOST_PARAMETERS and MOST_PASSES, however much time there is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from feste import ops, optim
from feste.config import MODERN, REPEATED, SPELT, Config, Preset, TrainConfig
from feste.errors import FesteError
from feste.model import GPT2
from feste.params import ParameterTable
from feste.terminal import duration

TOKENS_PER_PARAMETER = 1.0
USABLE = 0.9            # of the time is for steps; validations, samples and checkpoints take the rest
FEWEST_STEPS = 100
# Up to so many characters: the size of the vocabulary, and the characters of English in one of its tokens.
VOCABULARIES = ((1.5e6, 512, 1.9), (10e6, 1024, 2.4), (50e6, 4096, 3.2), (float("inf"), 16_384, 3.8))
DROPOUTS = ((4.0, 0.0), (20.0, 0.1))  # up to so many passes over the text
MOST_DROPOUT = 0.2
SPELT_FROM = 10.0       # passes on, tokens are split: at 6 passes that costs 0.02 bits a byte, at 12 it brings 0.03
MOST_PARAMETERS = 8.0   # for each token of the text
MOST_PASSES = 12.0      # over it
TIMED_SECONDS = 1.0     # of steps of each shape, and one step at least


@dataclass(frozen=True)
class Shape:
    n_embd: int
    n_layers: int
    n_heads: int
    block_size: int
    batch_size: int = 8


LADDER = (Shape(64, 2, 1, 64), Shape(96, 3, 2, 128), Shape(128, 3, 2, 128), Shape(192, 4, 3, 128),
          Shape(256, 4, 4, 256), Shape(320, 5, 5, 256), Shape(384, 6, 6, 256), Shape(512, 8, 8, 256),
          Shape(768, 12, 12, 512))


def choose(characters: int, minutes: float, precision: str | None = None,
           threads: int = 0) -> tuple[Preset, list[str]]:
    """A preset for a text of so many characters, and three lines that say why. Without a precision the faster one."""
    precision = precision or ("bf16" if ops.isa == "avx512" else "fp32")
    if not 0.0 < minutes < float("inf"):
        raise FesteError(f"minutes must be a positive number, got {minutes}", "minutes")
    vocab_size, length = next((size, length) for most, size, length in VOCABULARIES if characters <= most)
    tokens = characters / length
    ops.set_num_threads(threads)
    best, by_heart = None, False
    for shape in LADDER:
        if tokens < 20 * shape.block_size:
            break
        config = Config(vocab_size, shape.n_embd, shape.n_layers, shape.n_heads, shape.block_size, arch="modern")
        seconds = seconds_per_step(config, shape.batch_size, precision)
        steps, size = int(USABLE * 60.0 * minutes / seconds), ParameterTable(config).size
        enough = steps * shape.batch_size * shape.block_size >= TOKENS_PER_PARAMETER * size
        by_heart = size > MOST_PARAMETERS * tokens
        if best is not None and (by_heart or not enough):
            break
        best = shape, config, seconds, max(FEWEST_STEPS, steps)
    if best is None:
        raise FesteError(f"the text has only {characters:,} characters; even the smallest model needs more", "data")
    shape, config, seconds, possible = best
    most = max(FEWEST_STEPS, int(MOST_PASSES * tokens / (shape.batch_size * shape.block_size)))
    steps = min(possible, most)
    parameters, seen = ParameterTable(config).size, steps * shape.batch_size * shape.block_size
    passes = seen / tokens
    dropout = next((rate for most, rate in DROPOUTS if passes <= most), MOST_DROPOUT)
    repeated = {} if dropout == 0.0 else REPEATED if passes < SPELT_FROM else SPELT
    preset = _preset(replace(config, dropout=dropout), shape, steps, precision, repeated)
    why = ("more, or a larger model, would learn a text of this length by heart" if steps < possible or by_heart else
           f"a larger model would see fewer than {TOKENS_PER_PARAMETER:g}, and end worse")
    lines = [f"best for {minutes:g} min: a step of {parameters:,} parameters takes {1e3 * seconds:.3g} ms here, so "
             f"there is time for {possible:,} steps; {steps:,} are planned, {duration(steps * seconds)}",
             f"they see {seen / parameters:.1f} tokens for each parameter; {why}",
             f"the text is read {passes:.1f} times, so dropout is {dropout:g}"
             f"{f', and tokens are split at {preset.train.token_splits:g}' if preset.train.token_splits else ''}; "
             f"{vocab_size:,} tokens suit its length"]
    return preset, lines


def _preset(config: Config, shape: Shape, steps: int, precision: str, repeated: dict) -> Preset:
    interval = max(1, steps // 20)
    train = TrainConfig(steps, seq_len=shape.block_size, batch_size=shape.batch_size, val_interval=interval,
                        sample_interval=4 * interval, checkpoint_interval=2 * interval, patience=steps,
                        precision=precision, **MODERN, **repeated)
    return Preset("best", "what learns most in the time", config, train)


def seconds_per_step(config: Config, batch_size: int, precision: str) -> float:
    """The median time of a training step on random tokens."""
    model = GPT2(config, precision=precision)
    optimizer = optim.make(model, TrainConfig(**MODERN))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, config.block_size + 1))
    times: list[float] = []
    while sum(times) < TIMED_SECONDS or len(times) < 2:  # the first one also takes the memory
        begun = time.perf_counter()
        model.forward_backward(ids[:, :-1], ids[:, 1:])
        optimizer.step(1e-3, 1.0, zero_grad=True)
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))
