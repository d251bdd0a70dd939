"""What several ranks bring: measured under a launcher of MPI, and a model of machines that are not at hand."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feste.parallel.buckets import Buckets
from feste.params import ParameterTable

from .alternation import HOME, START, Unavailable
from .sizes import model_config


def launch(launcher: str, ranks: int, **told) -> dict:
    """Measure on so many ranks: key -> the values of every rank. launcher: a command with {ranks} in it."""
    start = START.format(home=str(HOME), worker="ranks_worker")
    command = [*shlex.split(launcher.format(ranks=ranks)), sys.executable, "-c", start, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise Unavailable((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def theory_bytes(size: str, ranks: int, wire: str) -> float:
    """What a rank has to send in a step: its gradients' pieces to their owners, its parameters to all."""
    return 2 * (ranks - 1) / ranks * ParameterTable(model_config(size)).size * (2 if wire == "bf16" else 4)


@dataclass(frozen=True)
class Measured:
    """A step on some ranks: seconds, the slowest rank's, and bytes, the mean rank's."""

    ranks: int
    step: float
    compute: float
    exchange: float   # of gradients, when nothing else is done
    gather: float     # of parameters
    exposed: float    # what is left to wait for gradients behind the backward pass
    sent: float
    latency: float
    message: float
    peak_bytes: int
    sha256: str

    @classmethod
    def of(cls, found: dict) -> Measured:
        def worst(key: str) -> float:
            return max(found[key]) if key in found else 0.0

        [sha256] = set(found["sha256"])  # all ranks must have the same parameters
        return cls(len(found["step_seconds"]), worst("step_seconds"), worst("compute_seconds"),
                   worst("exchange_seconds"), worst("gather_seconds"), worst("exchange_waited_seconds"),
                   statistics.mean(found["sent_bytes"]), worst("latency_seconds"), worst("message_seconds"),
                   max(found["peak_bytes"]), sha256)

    @property
    def hidden(self) -> float:
        """The share of the gradients' way that takes place while the backward pass goes on."""
        return max(0.0, 1.0 - self.exposed / self.exchange) if self.exchange else 1.0

    @property
    def efficiency(self) -> float:
        return self.compute / self.step


# ---- a model of other machines -----------------------------------------------------------------------------


BACKWARD, FORWARD = 0.6, 0.3  # shares of a step in which something can travel: two thirds and one, but for the ends


@dataclass(frozen=True)
class Model:
    """What a step would take on machines that are not at hand, fitted to measurements on some that are.

    parameters, buckets: of the model, one message to every other rank each. compute: seconds of a rank's mini-batches
    in a step. used: the share of a link's bandwidth that was reached. latency: seconds of a message there and back.
    message: seconds of one among many, beside its bytes. last: the share of the gradients, and of the parameters, that
    nothing hides: those of the embeddings.
    """

    parameters: int
    buckets: int
    compute: float
    used: float
    latency: float
    message: float
    last: float

    @classmethod
    def fitted(cls, measured: Sequence[Measured], size: str, bits_per_second: float, compute: float) -> Model:
        """used: from how long the parameters of a step took, on their own, to get around on some numbers of ranks.

        latency, message: of small ones, between the fewest of them.
        """
        config = model_config(size)
        parameters, buckets = ParameterTable(config).size, len(Buckets(config, 2))
        ideal = np.array([(m.ranks - 1) / m.ranks * parameters * 32 / bits_per_second for m in measured])
        took = np.array([m.gather for m in measured])
        fewest = min(measured, key=lambda m: m.ranks)
        return cls(parameters, buckets, compute, float(ideal @ ideal / (ideal @ took)), fewest.latency,
                   fewest.message, config.vocab_size * config.n_embd / parameters)

    def step(self, ranks: int, bits_per_second: float, wire: str = "fp32", sync_every: int = 0) -> float:
        """Seconds of a step; of ranks that train apart, on average."""
        bits = (ranks - 1) / ranks * self.parameters * (16 if wire == "bf16" else 32)
        messages = self.buckets * (self.latency + (ranks - 1) * self.message)
        seconds = bits / (bits_per_second * self.used) + messages
        if sync_every:
            return self.compute + 2.0 * seconds / sync_every
        behind = max(seconds * self.last, seconds - BACKWARD * self.compute)  # gradients, after the backward pass
        ahead = max(seconds * self.last, seconds - FORWARD * self.compute)    # parameters, before the next forward pass
        return self.compute + behind + ahead

    def efficiency(self, *where, **how) -> float:
        return self.compute / self.step(*where, **how)


MACHINES = (8, 64, 256)
LINKS = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}
MODES = {"in step": {}, "--wire bf16": {"wire": "bf16"}, "--sync-every 100": {"sync_every": 100},
         "--sync-every 100 --wire bf16": {"wire": "bf16", "sync_every": 100}}


def modelled(model: Model) -> list[list[str]]:
    """Rows of a table: mode and number of machines, and the efficiency on each link."""
    return [[name, str(ranks), *(f"{model.efficiency(ranks, bits, **how):.0%}" for bits in LINKS.values())]
            for name, how in MODES.items() for ranks in MACHINES]
