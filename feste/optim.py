"""AdamW and Muon on flat buffers, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from feste import ops
from feste.config import TrainConfig
from feste.errors import FesteError
from feste.params import Parameter, ParameterTable

if TYPE_CHECKING:
    from feste.model import GPT2

FIRST_MOMENTUM, MOMENTUM_STEPS = 0.85, 300  # Muon's momentum rises from the one in so many steps: Jordan et al. 2024


class Part(NamedTuple):
    """What AdamW updates in one go: where it lies in the flat buffers and in the moments, and whether it decays."""

    flat: slice
    m: slice
    v: slice
    whole_v: slice  # where it lies in the v of an optimizer that updates everything
    decays: bool


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on a model's flat buffers.

    Matrices and embeddings decay, biases and norms do not; with cautious_decay only where the update goes towards zero,
    too (Chen et al. 2025, arXiv:2510.12402). `m` and `v` are flat float32 arrays laid out like `model.flat_params`, or
    those `ranges` of it that this optimizer has to update, end to end; `t` counts the updates made. outer: the momentum
    of what ranks that train apart average, None where they do not. FesteError for a setting out of range.

    copy.copy has moments of its own and updates the same model; deepcopy and pickle take the model along, and of a
    model and its optimizer that are copied together, the new optimizer updates the new model.
    """

    name = "adamw"

    def __init__(self, model: GPT2, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1, cautious_decay: bool = False) -> None:
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
        self.cautious_decay = bool(cautious_decay)
        self.v_table = self.second_moments(model.table)
        self.t = 0
        self.m, self.v = ops.zeros(model.table.size), ops.zeros(self.v_table.size)
        self.ranges = [slice(0, model.table.size)]
        self.parts = list(self.parts_of(self.ranges))
        self.outer: np.ndarray | None = None

    def begin_outer(self) -> None:
        """Have an outer momentum, which begins as zero."""
        if self.outer is None:
            self.outer = ops.zeros(self.model.table.size)

    def own(self, ranges: list[slice]) -> None:
        """From now on update these ranges of the flat buffers, which are in order, and no others."""
        if ranges == self.ranges:
            return
        if self.m.size != self.model.table.size:
            raise FesteError("this optimizer has the moments of one rank among others; load it anew", "optimizer")
        m, v = self.m, self.v
        self.ranges, self.parts = ranges, list(self.parts_of(ranges))
        self.m = ops.zeros(sum(part.stop - part.start for part in ranges))
        self.v = ops.zeros(sum(part.v.stop - part.v.start for part in self.parts))
        self.take(m, v)

    def take(self, m: np.ndarray, v: np.ndarray) -> None:
        """Go on with moments out of those of all parameters, laid out as in a checkpoint."""
        if self.m.size:
            np.concatenate([m[part] for part in self.ranges], out=self.m)
        for part in self.parts:
            self.v[part.v] = v[part.whole_v]

    def put(self, m: np.ndarray, v: np.ndarray, ranges: list[slice], own_m: np.ndarray, own_v: np.ndarray) -> None:
        """Write the moments of some ranges, this optimizer's or another rank's, into those of all parameters."""
        begin = 0
        for part in ranges:
            end = begin + part.stop - part.start
            m[part] = own_m[begin:end]
            begin = end
        for part in self.parts_of(ranges):
            v[part.whole_v] = own_v[part.v]

    @classmethod
    def second_moments(cls, table: ParameterTable) -> ParameterTable:
        """The table of `v`, for the parameters of a table."""
        return table

    @staticmethod
    def whole(parameter: Parameter) -> bool:
        """Whether one rank must own all of a parameter, for its update is no matter of single elements."""
        return False

    def settings(self) -> dict:
        """The settings by their names in TrainConfig."""
        return {"optimizer": self.name, "beta1": self.betas[0], "beta2": self.betas[1], "eps": self.eps,
                "weight_decay": self.weight_decay, "cautious_decay": self.cautious_decay}

    @classmethod
    def of(cls, model: GPT2, settings: dict) -> AdamW:
        """An optimizer with the settings of `settings`."""
        rest = {name: value for name, value in settings.items() if name not in ("optimizer", "beta1", "beta2")}
        return cls(model, (settings["beta1"], settings["beta2"]), **rest)

    def __setstate__(self, state: dict) -> None:
        """A copy has moments of its own, which begin where a cache line begins."""
        self.__dict__ |= state
        for name in ("m", "v") if self.outer is None else ("m", "v", "outer"):
            moment = ops.zeros(state[name].size)
            np.copyto(moment, state[name])
            setattr(self, name, moment)

    def __repr__(self) -> str:
        return (f"{type(self).__name__}({self.model.num_parameters():,} parameters, betas={self.betas}, "
                f"eps={self.eps:g}, weight_decay={self.weight_decay:g}, {self.t} updates)")

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
        norm = math.sqrt(ops.sum_of_squares(self.model.flat_grads, self.model.table.size))
        self.update(norm, learning_rate, clip_norm, zero_grad)
        return norm

    def update(self, norm: float, learning_rate: float, clip_norm: float | None, zero_grad: bool) -> None:
        """`step`, with the norm of a gradient that may lie in several processes."""
        if not math.isfinite(norm):
            return
        scale = min(1.0, clip_norm / norm) if clip_norm is not None and norm > 0.0 else 1.0
        self.t += 1
        self._update(learning_rate, scale, zero_grad)

    def _update(self, learning_rate: float, scale: float, zero_grad: bool) -> None:
        model = self.model
        for flat, m, v, _, decays in self.parts:
            ops.adamw_update(model.flat_params[flat], self.m[m], self.v[v], model.flat_grads[flat], learning_rate,
                             *self.betas, self.eps, self.weight_decay if decays else 0.0, self.cautious_decay, scale,
                             self.t, zero_grad, flat.stop - flat.start)

    def parts_of(self, ranges: list[slice]) -> Iterator[Part]:
        """What AdamW updates of some ranges, in as few parts as lie together."""
        m_begin = v_begin = 0
        for of in ranges:
            for begin, end, whole_v, decays in self._segments():
                first, last = max(begin, of.start), min(end, of.stop)
                if first < last:
                    size, m, whole = last - first, m_begin + first - of.start, whole_v + first - begin
                    yield Part(slice(first, last), slice(m, m + size), slice(v_begin, v_begin + size),
                               slice(whole, whole + size), decays)
                    v_begin += size
            m_begin += of.stop - of.start

    def _segments(self) -> Iterator[tuple[int, int, int, bool]]:
        """Where parameters that AdamW updates lie together and all decay, or none: begin, end, place in v, which."""
        places = {p.name: p.offset for p in self.model.table}
        begin = end = v_begin = 0
        decays = True
        for p in self.v_table:
            if places[p.name] != end or p.decays != decays:
                if end > begin:
                    yield begin, end, v_begin, decays
                begin, v_begin, decays = places[p.name], p.offset, p.decays
            end = places[p.name] + p.size
        yield begin, end, v_begin, decays


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embeddings, head and vectors.

    Queries, keys and values are matrices of their own. The matrices' learning rate is matrix_rate times that of the
    rest, and their decay matrix_decay; their momentum rises to `momentum` in the first steps. They have no second
    moments: v has those of the rest.
    """

    name = "muon"

    def __init__(self, model: GPT2, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1, cautious_decay: bool = False, momentum: float = 0.95,
                 matrix_rate: float = 2.0, matrix_decay: float = 0.0) -> None:
        if not 0.0 <= momentum < 1.0:
            raise FesteError(f"momentum must lie in [0, 1), got {momentum}", "momentum")
        if not 0.0 < matrix_rate < math.inf:
            raise FesteError(f"matrix_rate must be a positive number, got {matrix_rate}", "matrix_rate")
        if not matrix_decay >= 0.0:
            raise FesteError(f"matrix_decay must not be negative, got {matrix_decay}", "matrix_decay")
        super().__init__(model, betas, eps, weight_decay, cautious_decay)
        self.momentum, self.matrix_rate, self.matrix_decay = momentum, matrix_rate, matrix_decay
        self._matrices = np.array([[*matrix, m] for matrix, m in self._owned_matrices()], np.int32)

    def own(self, ranges: list[slice]) -> None:
        """From now on update these ranges of the flat buffers, in which matrices are whole, and no others."""
        super().own(ranges)
        self._matrices = np.array([[*matrix, m] for matrix, m in self._owned_matrices()], np.int32)

    def _owned_matrices(self) -> Iterator[tuple[tuple[int, int, int, int], int]]:
        """The matrices of `matrices_of` that lie in `ranges`, each with the place of its momentum in m."""
        m_begin = 0
        for of in self.ranges:
            yield from ((matrix, m_begin + matrix[0] - of.start) for matrix in matrices_of(self.model.table)
                        if of.start <= matrix[0] < of.stop)
            m_begin += of.stop - of.start

    @staticmethod
    def whole(parameter: Parameter) -> bool:
        return parameter.hidden

    @classmethod
    def second_moments(cls, table: ParameterTable) -> ParameterTable:
        """The table of `v`: without the matrices of the blocks."""
        return table.without_hidden()

    def settings(self) -> dict:
        """The settings by their names in TrainConfig."""
        return super().settings() | {"momentum": self.momentum, "matrix_rate": self.matrix_rate,
                                     "matrix_decay": self.matrix_decay}

    def _update(self, learning_rate: float, scale: float, zero_grad: bool) -> None:
        model, rising = self.model, min(1.0, self.t / MOMENTUM_STEPS)
        momentum = min(self.momentum, FIRST_MOMENTUM) * (1.0 - rising) + self.momentum * rising
        if len(self._matrices):
            ops.muon_update(model.flat_params, self.m, model.flat_grads, self._matrices,
                            self.matrix_rate * learning_rate, momentum, self.matrix_decay, self.cautious_decay, scale,
                            zero_grad, len(self._matrices), model.table.size, self.m.size)
        super()._update(learning_rate, scale, zero_grad)


def matrices_of(table: ParameterTable) -> Iterator[tuple[int, int, int, int]]:
    """Muon's matrices in a flat buffer: where each begins, its rows, its columns, and the length of a row."""
    for p in table:
        if p.hidden:
            K, N = p.shape
            parts = 3 if p.name.endswith("attn.c_attn.weight") else 1  # query, key and value
            for part in range(parts):
                yield p.offset + part * (N // parts), K, N // parts, N


OPTIMIZERS = {optimizer.name: optimizer for optimizer in (AdamW, Muon)}


def make(model: GPT2, config: TrainConfig) -> AdamW:
    """The optimizer of a run. beta2 by a half-life in tokens: Marek et al. 2025, arXiv:2507.07101."""
    half_life = config.beta2_half_life
    settings = {"optimizer": config.optimizer, "beta1": config.beta1,
                "beta2": 0.5 ** (config.tokens_per_step / half_life) if half_life else config.beta2, "eps": config.eps,
                "weight_decay": config.weight_decay, "cautious_decay": config.cautious_decay}
    if config.optimizer == "muon":
        settings |= {"momentum": config.momentum, "matrix_rate": config.matrix_rate,
                     "matrix_decay": config.matrix_decay}
    return OPTIMIZERS[config.optimizer].of(model, settings)
