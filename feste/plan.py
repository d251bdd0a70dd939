"""What a run will be, before it starts: new, or resumed from a checkpoint. The only place with rules about both.

A Plan that exists fits together: model, tokenizer, text and configuration. `trainer.train` carries it out. Errors name
fields of the configuration and arguments; what they are called on a command line is the business of `cli`.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from feste import ops, optim
from feste.config import Config, TrainConfig
from feste.data import Text
from feste.errors import FesteError
from feste.model import GPT2
from feste.optim import AdamW
from feste.pairs import Pairs
from feste.run.checkpoint import Checkpoint
from feste.run.directory import find_checkpoint, require_free, require_new
from feste.run.follow import read_info
from feste.run.names import STABLE
from feste.schedule import decay_begin, learning_rate_at, warmup_steps
from feste.tokenizer import BPETokenizer
from feste.version import __version__

# What a resumed run may change. Everything else would make it another run.
CHANGEABLE = {"num_steps", "learning_rate", "patience", "threads", "keep_last", "checkpoint_interval", "on_nan"}


@dataclass
class RunState:
    """Where a run stands: what changes from step to step beside model and optimizer."""

    step: int = 0
    train_loss: float = math.nan
    val_loss: float = math.nan
    best_val_loss: float = math.inf
    best_step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    elapsed_seconds: float = 0.0

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> RunState:
        kept = {name: checkpoint.trainer_state[name] for name in
                ("train_loss", "val_loss", "skipped", "skipped_in_a_row", "elapsed_seconds")}
        return cls(step=checkpoint.step, best_val_loss=checkpoint.best_val_loss, best_step=checkpoint.best_step, **kept)


@dataclass
class Plan:
    """A run that is ready to start.

    data: the whole text, or all pairs. state: where it begins, behind the last step of the run that it resumes.
    run_dir: None for a run that leaves nothing on the disk. origin: the directory of the run that is resumed.
    info: what run.json says beside the rest. notes: what a person should know, a line each; warned: the warnings that
    came while it was made.
    """

    model: GPT2
    tokenizer: BPETokenizer
    optimizer: AdamW
    data: Text | Pairs
    config: TrainConfig
    run_dir: Path | None = None
    state: RunState = field(default_factory=RunState)
    origin: Path | None = None
    info: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        block_size = self.model.config.block_size
        if self.config.seq_len > block_size:
            raise FesteError(f"seq_len={self.config.seq_len} is beyond the model's block_size={block_size}",
                             "seq_len", "block_size")
        self.data.require(self.config)
        if not self.config.sample_prompt:
            raise FesteError("sample_prompt must not be empty", "sample_prompt")
        self.corpus_sha256 = self.data.sha256()

    @property
    def resumed(self) -> bool:
        return self.origin is not None

    def facts(self) -> dict[str, str]:
        """What must be the same in every process that takes part in the run, by names for people."""
        config = self.model.config.to_dict() | self.config.to_dict()
        del config["threads"]
        return {"version of feste": __version__, "instruction set": ops.isa,
                "configuration": ", ".join(f"{name}={value}" for name, value in config.items()),
                "text": self.corpus_sha256, "tokenizer": hashlib.sha256(self.tokenizer.to_json().encode()).hexdigest(),
                "set of initial parameters": hashlib.sha256(self.model.flat_params).hexdigest()}


def new(model: GPT2, tokenizer: BPETokenizer, text: str | np.ndarray | Text | Pairs, config: TrainConfig,
        run_dir: Path | None = None, optimizer: AdamW | None = None, info: dict | None = None) -> Plan:
    """A run from its first step, of a model as it is: fresh, or with the parameters of another run to fine-tune.

    An optimizer that is handed over goes on with its moments; its betas, eps and weight_decay must be the run's.
    """
    if run_dir is not None:
        require_new(run_dir)
    data = data_of(model.config, tokenizer, text)
    if optimizer is None:
        optimizer = optim.make(model, config)
    elif optimizer.model is not model:
        raise FesteError("the optimizer is that of another model; make one with AdamW(model)", "optimizer")
    plan = Plan(model, tokenizer, optimizer, data, config, run_dir, info=info or {})
    model.dropout_seed = config.seed
    return plan


def checkpoint_to_resume(path: Path, run_dir: Path | None = None) -> Checkpoint:
    """The newest whole checkpoint of a run, or the one named; a warning for each damaged one that was passed over.

    A run that goes on in its own directory must not be training there: its trainer deletes old checkpoints.
    """
    directory = path if path.is_dir() else path.parent
    if run_dir is None or run_dir.resolve() == directory.resolve():
        require_free(directory)
    else:
        require_new(run_dir)
    found, passed_over = find_checkpoint(path)
    for line in passed_over:
        warnings.warn(f"passed over: {line}", stacklevel=3)
    return Checkpoint.load(found)


def resumed(checkpoint: Checkpoint, text: str | np.ndarray | Text | Pairs, config: TrainConfig,
            run_dir: Path | None = None, info: dict | None = None) -> Plan:
    """The run of a checkpoint from its next step on, to the bit. run_dir: the directory of that run, or a new one.

    config is that of the run, changed in CHANGEABLE at most. Extending the run changes num_steps, and with it the
    schedule; `notes` says what becomes of the learning rate. With schedule wsd the warm-up stays as long as it was.
    """
    saved = require_resumable(checkpoint)
    require_same_run(saved, checkpoint.model.config, config.to_dict(), {})
    if config.schedule == "wsd":
        config = replace(config, warmup_steps=warmup_steps(saved))
    data = data_of(checkpoint.model.config, checkpoint.tokenizer, text)
    plan = Plan(checkpoint.model, checkpoint.tokenizer, checkpoint.optimizer, data, config, run_dir,
                RunState.of(checkpoint), checkpoint.path and checkpoint.path.parent, info or {},
                _what_changes(saved, config, checkpoint.step))
    if checkpoint.trainer_state.get("corpus_sha256") != plan.corpus_sha256:
        raise FesteError("this is not the run of the checkpoint: the training text is another one", "data")
    _require_steps_left(checkpoint, config)
    return plan


def resumed_in(model: GPT2, tokenizer: BPETokenizer, optimizer: AdamW | None, checkpoint: Checkpoint,
               text: str | np.ndarray | Text | Pairs, config: TrainConfig, run_dir: Path | None = None,
               info: dict | None = None) -> Plan:
    """`resumed`, with the state of the checkpoint moved into a model and an optimizer that the caller holds."""
    saved = require_resumable(checkpoint)
    require_same_run(saved, checkpoint.model.config, config.to_dict(), model.config.to_dict())
    if checkpoint.tokenizer.to_json() != tokenizer.to_json():
        raise FesteError("this is not the run of the checkpoint: the tokenizer is another one", "tokenizer")
    if optimizer is None:
        optimizer = optim.make(model, config)
    plan = resumed(checkpoint, text, config, run_dir, info)
    if checkpoint.optimizer.outer is not None:
        optimizer.begin_outer()
        np.copyto(optimizer.outer, checkpoint.optimizer.outer)
    for own, held in ((model.flat_params, checkpoint.model.flat_params), (optimizer.m, checkpoint.optimizer.m),
                      (optimizer.v, checkpoint.optimizer.v)):
        np.copyto(own, held)
    model.dropout_seed, optimizer.t = checkpoint.model.dropout_seed, checkpoint.optimizer.t
    plan.model, plan.optimizer = model, optimizer
    return plan


def require_resumable(checkpoint: Checkpoint) -> TrainConfig:
    """The configuration of a checkpoint's run; FesteError for a checkpoint that training cannot continue from."""
    if checkpoint.optimizer is None or checkpoint.tokenizer is None or checkpoint.train_config is None:
        raise FesteError(f"{checkpoint.path or 'the checkpoint'} serves inference only (it lacks optimizer, tokenizer "
                         "or configuration), so training cannot continue from it; fine-tune from it as a new run")
    return TrainConfig.from_dict(checkpoint.train_config)


def require_same_run(saved: TrainConfig, saved_model: Config, config: dict, model: dict) -> None:
    """FesteError that lists what differs between a saved run and fields of its configuration and of its model."""
    before = saved.to_dict() | saved_model.to_dict()
    changed = {name: value for name, value in {**config, **model}.items()
               if before[name] != value and name not in CHANGEABLE}
    if changed:
        listed = "; ".join(f"{name} was {before[name]!r} and is {value!r}" for name, value in changed.items())
        raise FesteError(f"this is not the run of the checkpoint: {listed}. Only {', '.join(sorted(CHANGEABLE))} and "
                         "run_dir may change when a run is resumed", *changed)


def require_same_model(saved: Config, named: dict, where: str) -> None:
    """FesteError if fields of a configuration that were named are not those of a checkpoint's model."""
    differences = {name: value for name, value in named.items() if getattr(saved, name) != value}
    if differences:
        listed = "; ".join(f"{name}={getattr(saved, name)}, not {value}" for name, value in differences.items())
        raise FesteError(f"{where} is a model with {listed}; leave that out", *differences)


def _require_steps_left(checkpoint: Checkpoint, config: TrainConfig) -> None:
    if checkpoint.step >= config.num_steps:
        raise FesteError(f"the run has made all of its {checkpoint.step} steps; extend it with a larger num_steps",
                         "num_steps")
    idle = checkpoint.step - checkpoint.best_step
    stopped = checkpoint.path is not None and read_info(checkpoint.path.parent).get("state") == "early_stopped"
    if stopped and idle >= config.patience:
        raise FesteError(f"the run stopped early, after {idle} steps without a better validation loss; extend it with "
                         "a larger patience", "patience")


def _what_changes(saved: TrainConfig, config: TrainConfig, step: int) -> list[str]:
    notes = []
    if config.num_steps != saved.num_steps:
        past = range(1, step + 1)
        if all(learning_rate_at(i, config) == learning_rate_at(i, saved) for i in past):
            what = "the learning rate was the same so far, so the run goes on as if it had been planned so"
        elif config.schedule == "wsd":
            what = (f"the learning rate has been falling since step {decay_begin(saved)} and rises again; to go on as "
                    f"if it had been planned so, resume {STABLE}")
        else:
            what = ("the schedule is stretched, so the learning rate goes on at the new schedule's value for this "
                    "step, not where the old one ended")
        notes.append(f"steps {saved.num_steps} -> {config.num_steps}: {what}")
    if config.learning_rate != saved.learning_rate:
        notes.append(f"learning rate {saved.learning_rate:g} -> {config.learning_rate:g} from step {step + 1} on")
    return notes


def data_of(config: Config, tokenizer: BPETokenizer, text: str | np.ndarray | Text | Pairs) -> Text | Pairs:
    """A text, an array of token ids, or what is one of data already, as tokens that fit the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise FesteError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; "
                         "use the tokenizer the model was made for", "vocab_size")
    if isinstance(text, (Text, Pairs)):
        return text
    if isinstance(text, str):
        return Text(tokenizer.encode_to_numpy(text))
    if not isinstance(text, np.ndarray) or text.ndim != 1 or text.dtype.kind not in "iu":
        raise FesteError("text must be a str, a 1-D array of integer token ids, or Pairs", "text")
    if text.dtype.itemsize > 4 and text.size and not 0 <= text.min() <= text.max() < config.vocab_size:
        # Smaller types are left to the model, which checks every batch; these would be cut to 32 bits on the way.
        bad = text.min() if text.min() < 0 else text.max()
        raise FesteError(f"token ids must lie in 0 .. {config.vocab_size - 1}, the text has {bad}", "text")
    return Text(text)


def with_settings(config: TrainConfig | None, settings: dict) -> TrainConfig:
    """A configuration with some fields replaced; without one, num_steps, learning_rate and seq_len are needed."""
    if config is not None:
        return replace(config, **settings)
    missing = [name for name in ("num_steps", "learning_rate", "seq_len") if name not in settings]
    if missing:
        raise FesteError(f"{', '.join(missing)} must be given, or a whole TrainConfig", *missing)
    return TrainConfig(**settings)
