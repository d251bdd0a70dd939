"""The learning rate of every step: it rises, and falls."""

from __future__ import annotations

import math

from feste.config import TrainConfig


def warmup_steps(config: TrainConfig) -> int:
    return config.warmup_steps or int(config.warmup_fraction * config.num_steps)


def decay_begin(config: TrainConfig) -> int:
    """The last step at the peak learning rate."""
    if config.schedule != "wsd":
        return warmup_steps(config)
    return max(warmup_steps(config), config.num_steps - round(config.decay_fraction * config.num_steps))


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then the decay to `min_lr_fraction` of it at the last step. `step` counts from 1.

    cosine: Loshchilov and Hutter 2017, arXiv:1608.03983. linear: Bergsma et al. 2025, arXiv:2502.15938. wsd (warm-up,
    stable, decay): the peak is held until the last decay_fraction of the steps; Hu et al. 2024, arXiv:2404.06395.
    """
    warmup, begin = warmup_steps(config), decay_begin(config)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = min(1.0, max(0, step - begin) / max(1, config.num_steps - begin))
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.learning_rate * (config.min_lr_fraction + (1.0 - config.min_lr_fraction) * share)


def share_of_peak_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of the peak."""
    return learning_rate_at(step, config) / config.learning_rate
