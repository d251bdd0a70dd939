"""AdamW on flat buffers, gradient clipping, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from feste import ops
from feste.config import TrainConfig
from feste.errors import FesteError

if TYPE_CHECKING:
    from feste.model import GPT2


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then cosine decay to `min_lr_fraction` of it at the last step.

    `step` counts from 1. Loshchilov and Hutter 2017, arXiv:1608.03983.
    """
    warmup = int(config.warmup_fraction * config.num_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = min(1.0, (step - warmup) / max(1, config.num_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_fraction + (1.0 - config.min_lr_fraction) * cosine)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on a model's flat buffers.

    Matrices and embeddings decay, biases and layernorms do not. `m` and `v` are flat float32 arrays laid out like
    `model.flat_params`; `t` counts the updates made. FesteError for a setting out of range.

    copy.copy has moments of its own and updates the same model; deepcopy and pickle take the model along, and of a
    model and its optimizer that are copied together, the new optimizer updates the new model.
    """

    def __init__(self, model: GPT2, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise FesteError(f"betas must lie in [0, 1), got {betas}", "beta1", "beta2")
        if not eps > 0.0:
            raise FesteError(f"eps must be positive, got {eps}", "eps")
        if not weight_decay >= 0.0:
            raise FesteError(f"weight_decay must not be negative, got {weight_decay}", "weight_decay")
        self.model = model
        self.betas = tuple(betas)
        self.eps = eps
        self.weight_decay = weight_decay
        self.m, self.v = ops.zeros(model.table.size), ops.zeros(model.table.size)
        self.t = 0

    def __setstate__(self, state: dict) -> None:
        """A copy has moments of its own, which begin where a cache line begins."""
        self.__dict__ |= state
        for name in ("m", "v"):
            moment = ops.zeros(self.model.table.size)
            np.copyto(moment, state[name])
            setattr(self, name, moment)

    def __repr__(self) -> str:
        return (f"AdamW({self.model.num_parameters():,} parameters, betas={self.betas}, eps={self.eps:g}, "
                f"weight_decay={self.weight_decay:g}, {self.t} updates)")

    def step(self, learning_rate: float, clip_norm: float | None = None, zero_grad: bool = False) -> float:
        """Update the parameters from the gradients; returns the gradient norm before clipping.

        Gradients are scaled by min(1, clip_norm / norm), within the same pass over memory as the update and,
        if asked for, the zeroing. A norm that is not finite changes nothing and is returned.
        """
        if not (math.isfinite(learning_rate) and learning_rate >= 0.0):
            raise FesteError(f"learning_rate must be a finite number, not negative, got {learning_rate}",
                             "learning_rate")
        if clip_norm is not None and not clip_norm > 0.0:
            raise FesteError(f"clip_norm must be positive or None, got {clip_norm}", "clip_norm")
        model, table = self.model, self.model.table
        norm = math.sqrt(ops.sum_of_squares(model.flat_grads, table.size))
        if not math.isfinite(norm):
            return norm
        scale = min(1.0, clip_norm / norm) if clip_norm is not None and norm > 0.0 else 1.0
        self.t += 1
        for part, decay in ((slice(0, table.decayed_size), self.weight_decay),
                            (slice(table.decayed_size, table.size), 0.0)):
            ops.adamw_update(model.flat_params[part], self.m[part], self.v[part], model.flat_grads[part],
                             learning_rate, *self.betas, self.eps, decay, scale, self.t, zero_grad,
                             part.stop - part.start)
        return norm
