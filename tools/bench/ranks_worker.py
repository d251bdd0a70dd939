"""One rank of a measurement under mpiexec: argument JSON; the first rank prints one line of JSON."""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from feste import GPT2, AdamW, ops, parallel
from feste.config import TrainConfig
from feste.leaves import Leaves

from .inputs import batch
from .sizes import model_config

MESSAGES = 100  # small ones, to see what each costs


def main() -> None:
    told, team = json.loads(sys.argv[1]), parallel.world()
    ops.set_num_threads(told["threads"] or team.threads())
    found = measure(team, **told)
    everyone = team.gather(found)
    if team.first:
        merged = {key: [one[key] for one in everyone] for key in found}
        print(json.dumps(merged | {"hosts": [peer.host for peer in getattr(team, "peers", [])]}), flush=True)
    team.leave()


def measure(team: parallel.Alone, size: str, precision: str, wire: str, sequences: int, each: int, steps: int,
            threads: int) -> dict:
    """Seconds of a step and of its parts on this rank, bytes it sent, and what the parameters are in the end.

    sequences: of a mini-batch; each: mini-batches of a rank in a step.
    """
    config = model_config(size)
    model = GPT2(config, seed=0, precision=precision)
    count = each * team.size
    train = TrainConfig(accumulation=count, batch_size=sequences, seq_len=config.block_size, wire=wire)
    optimizer = AdamW(model)
    update = parallel.make_update(team, model, optimizer, train)
    ids, targets = batch(config, sequences * count)
    batches = [(ids[i:i + sequences], targets[i:i + sequences]) for i in range(0, len(ids), sequences)]
    weights = np.full(count, sequences * config.block_size)

    def step(number: int) -> None:
        update.compute(batches, weights, (number - 1) * count, None)
        update.step(number, 1e-4, 1.0)

    def compute() -> None:
        Leaves.compute(update.leaves, batches[:each], [1.0 / count] * each, 0)
        model.zero_grad()

    step(1)  # takes the memory
    found: dict = {"compute_seconds": _median(team, compute, steps)}
    if team.size > 1:
        def exchange() -> None:
            for bucket in update.buckets:
                update.exchange.put(bucket)
            update.exchange.finish()

        found["exchange_seconds"] = _median(team, exchange, 3)
        def spread() -> None:
            update.exchange.spread(model.flat_params)
            update.settle()

        found["gather_seconds"] = _median(team, spread, 3)
        found["latency_seconds"] = _median(team, lambda: team.gather_numbers([0.0]), 50)
        found["message_seconds"] = _median(team, lambda: _many_messages(team), 20) / MESSAGES
        model.zero_grad()
    sent, waited = bytes_sent(), team.waited
    exchange_waited = update.exchange.waited if team.size > 1 else 0.0
    numbers = iter(range(2, 2 + steps))
    found["step_seconds"] = _median(team, lambda: step(next(numbers)), steps)
    update.settle()
    found["waited_seconds"] = (team.waited - waited) / steps
    found["exchange_waited_seconds"] = ((update.exchange.waited if team.size > 1 else 0.0) - exchange_waited) / steps
    found["sent_bytes"] = (bytes_sent() - sent) / steps
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["sha256"] = hashlib.sha256(model.flat_params).hexdigest()
    update.close()
    return found


def _median(team: parallel.Alone, action: Callable[[], None], times: int) -> float:
    seconds = []
    for _ in range(times):
        team.gather_numbers([0.0])  # all begin together
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _many_messages(team: parallel.Team) -> None:
    """Small messages to the next rank, and from the one before."""
    values, after, before = np.zeros((2, MESSAGES), np.uint8), (team.rank + 1) % team.size, (team.rank - 1) % team.size
    requests = [team.comm.Irecv(values[0, i:i + 1], before) for i in range(MESSAGES)]
    requests += [team.comm.Isend(values[1, i:i + 1], after) for i in range(MESSAGES)]
    while not team.MPI.Request.Testall(requests):
        time.sleep(0.0)


def bytes_sent() -> int:
    """What the network links of this host have sent, the one to itself left out."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines()[2:] if path.exists() else []
    links = (line.partition(":") for line in lines)
    return sum(int(numbers.split()[8]) for name, _, numbers in links if name.strip() != "lo")


if __name__ == "__main__":
    main()
