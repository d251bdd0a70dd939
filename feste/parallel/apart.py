"""Ranks that train apart for some steps and then average, for machines joined by a slow network.

DiLoCo (Douillard et al. 2023, arXiv:2311.08105): every rank takes H steps of its own, with its own moments; the mean of
how far the ranks have come is then the gradient of an outer step, by SGD with Nesterov momentum:

    d = mean over the ranks of (start - parameters)    u = momentum u + d    start -= rate (d + momentum u)

from where all go on. The network carries the parameters once in H steps. The numbers depend on how many ranks there
are, not on when they arrive.
"""

from __future__ import annotations

import numpy as np

from feste.config import TrainConfig
from feste.model import GPT2
from feste.optim import AdamW
from feste.parallel.buckets import Buckets
from feste.parallel.exchange import Exchange, to_bf16
from feste.parallel.team import Alone
from feste.parallel.updates import Single, own_part, weighted


class Apart(Single):
    """An update of this rank alone, and every sync_every steps, and behind the last, one of all together."""

    def __init__(self, team: Alone, model: GPT2, optimizer: AdamW, config: TrainConfig) -> None:
        super().__init__(model, optimizer, config.accumulation // team.size)
        self.team, self.config, self._signal = team, config, None
        self.start = model.flat_params.copy()
        optimizer.begin_outer()
        self.buckets = Buckets(model.config, team.size)
        self.exchange = None if team.size == 1 else Exchange(team, self.buckets, model.flat_grads, config.wire)
        self._number = 0  # of the step under way

    def compute(self, batches, weights, first_key, signal):
        mine = own_part(self.team.rank, self.leaves.count)
        shares = weights[mine] / weights[mine].sum()
        loss = weighted(self.leaves.compute(batches[mine], shares, first_key + mine.start), shares)
        self._signal, self._number = None, 1 + first_key // self.config.accumulation
        if not self.is_whole(self._number):
            return loss
        told = self.team.gather_numbers([loss, signal or 0])
        self._signal = int(told[:, 1].max()) or None
        return weighted(told[:, 0], [1.0 / self.team.size] * self.team.size)

    def agreed(self, signal):
        return self._signal

    def step(self, number, learning_rate, clip_norm):
        norm = super().step(number, learning_rate, clip_norm)
        if self.is_whole(number):
            self._average_parameters()
        return norm

    def skip(self):
        super().skip()
        if self.is_whole(self._number):
            self._average_parameters()

    def whole_before(self, number):
        return (number - 1) // self.config.sync_every * self.config.sync_every

    def is_whole(self, number):
        return number % self.config.sync_every == 0 or number == self.config.num_steps

    def _average_parameters(self) -> None:
        """The outer step; gradients are zero afterwards."""
        d, u, momentum = self.model.flat_grads, self.optimizer.outer, self.config.outer_momentum
        np.subtract(self.start, self.model.flat_params, out=d)
        self._average(d)
        u *= np.float32(momentum)
        u += d
        d += np.float32(momentum) * u
        d *= np.float32(self.config.outer_rate)
        self.start -= d
        np.copyto(self.model.flat_params, self.start)
        self.model.zero_grad()

    def _average(self, flat: np.ndarray) -> None:
        """flat, which is the gradients' buffer, becomes its mean over the ranks."""
        if self.exchange is None:
            return
        for bucket in self.buckets:
            self.exchange.put(bucket)
        self.exchange.finish()
        if self.config.wire == "bf16":
            rounded = to_bf16(flat)
            flat[...] = 0.0
            self.exchange.spread(rounded, add_to=flat)
        else:
            self.exchange.spread(flat)
        self.exchange.wait_for()
        flat *= np.float32(1.0 / self.team.size)

    def moments(self, room):
        """The mean of the ranks' moments, with which all of them go on: so a checkpoint is all there is to know."""
        flat = self.model.flat_grads
        for moment in (self.optimizer.m, self.optimizer.v):
            flat[:moment.size] = moment
            flat[moment.size:] = 0.0
            self._average(flat)
            moment[...] = flat[:moment.size]
        self.model.zero_grad()
        return super().moments(room) if self.team.first else None

    def close(self):
        if self.exchange is not None:
            self.exchange.close()
