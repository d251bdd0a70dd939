"""Many processes that train one model, through MPI: `mpiexec -n 4 feste train ...`.

    team      the ranks: who they are, what they tell each other, how they wait
    watch     a rank that fails, or is heard of no more, ends the job
    buckets   how the flat buffers are divided
    exchange  gradients on their way, while the backward pass goes on
    updates   a step: of one process, and of ranks in step with each other
    apart     ... of ranks that train apart for a while
    state     a checkpoint that one rank has read, for all

Nothing of MPI is imported unless a launcher of it started this process.
"""

from __future__ import annotations

from feste.config import TrainConfig
from feste.errors import FesteError
from feste.leaves import depth
from feste.model import GPT2
from feste.optim import AdamW
from feste.parallel.apart import Apart
from feste.parallel.state import shared_checkpoint
from feste.parallel.team import LAST_WORDS_SECONDS, Alone, RankLost, Team, current, world
from feste.parallel.updates import InStep, Single

__all__ = ["LAST_WORDS_SECONDS", "Alone", "RankLost", "Team", "current", "make_update", "more_bytes",
           "require_shares", "sent_bytes", "shared_checkpoint", "world"]


def require_shares(config: TrainConfig, ranks: int) -> None:
    """FesteError unless the mini-batches of a step can be shared among so many ranks.

    In step with each other, every rank's must be a subtree of the sum: 1, 2, 4, ... of them.
    """
    count, each = config.accumulation, config.accumulation // ranks
    apart = config.sync_every > 0
    if count % ranks == 0 and (apart or ranks == 1 or each & (each - 1) == 0):
        return
    fits = [ranks * k for k in ((1, 2, 3) if apart else (1, 2, 4))]
    others = [r for r in range(1, count + 1)
              if count % r == 0 and (r == 1 or (k := count // r) & (k - 1) == 0)]
    same = config.batch_size * count
    equal = next((f"; batch_size={same // n} with accumulation={n} is a step of as many sequences" for n in fits
                  if same % n == 0), "")
    raise FesteError(f"{ranks} ranks cannot share accumulation={count} mini-batches of a step evenly: it must be "
                     f"{', '.join(map(str, fits))} ..., or the ranks {', '.join(map(str, others))}{equal}",
                     "accumulation", *["batch_size"] * bool(equal))


def make_update(team: Alone, model: GPT2, optimizer: AdamW, config: TrainConfig) -> Single:
    """The kind of update that a run is made of."""
    require_shares(config, team.size)
    if team.size == 1 and not config.sync_every:
        return Single(model, optimizer, config.accumulation)
    if config.sync_every:
        return Apart(team, model, optimizer, config)
    return InStep(team, model, optimizer, config)


def sent_bytes(team: Alone, model: GPT2, config: TrainConfig) -> float:
    """Bytes that a rank sends in a step, on average: gradients to their owners, and parameters to all."""
    one_way = (team.size - 1) / team.size * model.table.size * (2 if config.wire == "bf16" else 4)
    return 2.0 * one_way / max(1, config.sync_every)


def more_bytes(team: Alone, model: GPT2, config: TrainConfig) -> float:
    """Memory of a step beside that of one mini-batch in one process: the tree of sums, and what ranks share or need."""
    flat, each = 4 * model.table.size, config.accumulation // team.size
    more = (depth(each) - 1) * flat
    if config.sync_every:
        return more + 2 * flat
    return more - 2 * flat * (1.0 - 1.0 / team.size) + (flat / team.size if team.size > 1 else 0)
