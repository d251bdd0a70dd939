"""A checkpoint that one rank has read, for all of them: its directory need not be theirs."""

from __future__ import annotations

from collections.abc import Callable

from feste.config import Config
from feste.model import GPT2
from feste.optim import OPTIMIZERS
from feste.parallel.team import Alone
from feste.run.checkpoint import Checkpoint
from feste.tokenizer import BPETokenizer


def shared_checkpoint(team: Alone, read: Callable[[], Checkpoint]) -> Checkpoint:
    """What `read` returns on the first rank, which alone calls it, on all of them."""
    if team.size == 1:
        return read()
    held: list[Checkpoint] = []

    def head() -> dict:
        held.append(read())
        return _head(held[0])

    told = team.on_first(head)
    checkpoint = held[0] if held else _empty(told)
    team.broadcast_array(checkpoint.model.flat_params)
    if checkpoint.optimizer is not None:
        for moment in filter(lambda moment: moment is not None,
                             (checkpoint.optimizer.m, checkpoint.optimizer.v, checkpoint.optimizer.outer)):
            team.broadcast_array(moment)
    return checkpoint


def _head(c: Checkpoint) -> dict:
    optimizer = c.optimizer and {"settings": c.optimizer.settings(), "t": c.optimizer.t,
                                 "outer": c.optimizer.outer is not None}
    return {"config": c.model.config.to_dict(), "precision": c.model.precision, "seed": c.model.dropout_seed,
            "tokenizer": c.tokenizer and c.tokenizer.to_json(), "optimizer": optimizer,
            "state": (c.step, c.best_val_loss, c.best_step, c.train_config, c.trainer_state, c.path)}


def _empty(told: dict) -> Checkpoint:
    """The checkpoint of a head, its arrays still zero."""
    model = GPT2(Config.from_dict(told["config"]), seed=None, precision=told["precision"])
    model.dropout_seed = told["seed"]
    tokenizer = told["tokenizer"] and BPETokenizer.from_json(told["tokenizer"], "the first rank's tokenizer")
    optimizer = None
    if told["optimizer"]:
        settings = told["optimizer"]["settings"]
        optimizer = OPTIMIZERS[settings["optimizer"]].of(model, settings)
        optimizer.t = told["optimizer"]["t"]
        if told["optimizer"]["outer"]:
            optimizer.begin_outer()
    return Checkpoint(model, tokenizer, optimizer, *told["state"])
