"""train_gpt2: the loop, and what happens every step.

A step: the learning rate of the schedule, the mini-batches of (seed, step), their gradients added up, one clipped
AdamW update. When due, after the update: validation, a sample, a checkpoint. All of it is a function of
(configuration, tokens, step) and the state that a checkpoint holds, so a run that was stopped and resumed is the
uninterrupted run to the bit; only the columns that measure wall time differ.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from feste import ops
from feste.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    find_checkpoint,
    remove_partial,
    restore_best,
    set_aside_later,
)
from feste.config import TrainConfig
from feste.data import Batches, require_window, split_tokens, validation_windows
from feste.model import GPT2
from feste.optim import AdamW, learning_rate_at
from feste.runlog import RunLog, perplexity, require_free
from feste.tokenizer import BPETokenizer

SAMPLE_TEMPERATURE = 0.8
MAX_SKIPPED_IN_A_ROW = 10
HASH_BLOCK = 1 << 20  # tokens
# What a resumed run may change. Everything else would make it another run.
CHANGEABLE = {"num_steps", "learning_rate", "patience", "threads", "keep_last", "checkpoint_interval", "on_nan"}

ADVICE = ("the learning rate may be too high: try half of it. If that does not help, look for damaged text in the "
          "corpus. The checkpoints so far are from before and stay")


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; names the step and what to try."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. state is one of runlog.END_STATES; signal is what interrupted it, or None."""

    state: str
    step: int
    train_loss: float
    val_loss: float
    best_val_loss: float
    best_step: int
    skipped_steps: int
    elapsed_seconds: float
    run_dir: Path | None
    signal: int | None = None


def train_gpt2(model: GPT2, tokenizer: BPETokenizer, text: str | np.ndarray, num_steps: int, learning_rate: float,
               seq_len: int, run_dir: str | os.PathLike | None = None, *, optimizer: AdamW | None = None,
               resume: Checkpoint | str | os.PathLike | None = None, on_step: Callable[[dict], None] | None = None,
               info: dict | None = None, **settings) -> TrainResult:
    """Train a model on a text, or on a 1-D array of token ids.

    settings are the other fields of TrainConfig. With run_dir, the run is logged and checkpointed there (see
    runlog and checkpoint); info is added to its run.json. on_step is called with the record of every step.
    resume continues a run from its checkpoint to the bit; if it is a path, run_dir defaults to the directory of
    that run. Another run_dir must be new: it begins with the rows up to the checkpoint, and the old one stays as it
    is. Without resume, an optimizer may be handed over to go on with its moments as a new run; its betas, eps and
    weight_decay are then the run's.

    Raises ValueError for data or settings that do not fit, before anything is written, and TrainingDiverged.
    """
    config = TrainConfig(num_steps=num_steps, learning_rate=learning_rate, seq_len=seq_len,
                         precision=model.precision, **_optimizer_settings(model, optimizer, settings))
    tokens = _tokens(model, tokenizer, text)
    if optimizer is None:
        optimizer = AdamW(model, (config.beta1, config.beta2), config.eps, config.weight_decay)
    run = _Run(model, tokenizer, optimizer, tokens, config)
    if resume is not None:
        if not isinstance(resume, Checkpoint):
            resume = checkpoint_to_resume(resume, run_dir)
            run_dir = resume.path.parent if run_dir is None else run_dir
        run.restore(resume)
    ops.set_num_threads(config.threads)
    if run_dir is None:
        with _StopSignals() as stop:
            return run.loop(_NoFiles(), stop, on_step)
    origin = resume.path.parent if resume is not None and resume.path is not None else Path(run_dir)
    log = RunLog(run_dir, run.description() | (info or {}), None if resume is None else run.step, origin)
    with log, _StopSignals() as stop:
        return run.loop(_Files(log, run, origin), stop, on_step)


def checkpoint_to_resume(path: str | os.PathLike, run_dir: str | os.PathLike | None = None) -> Checkpoint:
    """The newest whole checkpoint of a run, or the one named; a warning for each damaged one that was passed over.

    A run that goes on in its own directory must not be training there: its trainer deletes old checkpoints.
    """
    directory = Path(path) if Path(path).is_dir() else Path(path).parent
    if run_dir is None or Path(run_dir).resolve() == directory.resolve():
        require_free(directory)
    found, passed_over = find_checkpoint(path)
    for line in passed_over:
        warnings.warn(f"passed over: {line}", stacklevel=3)
    return Checkpoint.load(found)


def _optimizer_settings(model: GPT2, optimizer: AdamW | None, settings: dict) -> dict:
    """The settings, with those of an optimizer that was handed over: the run must say what it does."""
    if optimizer is None:
        return settings
    if optimizer.model is not model:
        raise ValueError("the optimizer is that of another model; make one with AdamW(model)")
    own = {"beta1": optimizer.betas[0], "beta2": optimizer.betas[1], "eps": optimizer.eps,
           "weight_decay": optimizer.weight_decay}
    for name, value in own.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]}, but the optimizer has {value}")
    return settings | own


def _tokens(model: GPT2, tokenizer: BPETokenizer, text: str | np.ndarray) -> np.ndarray:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
                         "use the tokenizer the model was made for")
    if isinstance(text, str):
        return tokenizer.encode_to_numpy(text)
    if not isinstance(text, np.ndarray) or text.ndim != 1 or text.dtype.kind not in "iu":
        raise ValueError("text must be a str or a 1-D array of integer token ids")
    if text.dtype.itemsize > 4 and text.size and not 0 <= text.min() <= text.max() < model.config.vocab_size:
        # Smaller types are left to the model, which checks every batch; these would be cut to 32 bits on the way.
        bad = text.min() if text.min() < 0 else text.max()
        raise ValueError(f"token ids must lie in 0 .. {model.config.vocab_size - 1}, the text has {bad}")
    return text


def _sha256(tokens: np.ndarray) -> str:
    """Of the ids, whatever their type; in blocks, for they may be a file that is larger than memory."""
    digest = hashlib.sha256()
    for i in range(0, len(tokens), HASH_BLOCK):
        digest.update(np.ascontiguousarray(tokens[i:i + HASH_BLOCK], np.uint32))
    return digest.hexdigest()


class _Run:
    """The state of a run, and the parts of a step."""

    def __init__(self, model: GPT2, tokenizer: BPETokenizer, optimizer: AdamW, tokens: np.ndarray,
                 config: TrainConfig) -> None:
        if config.seq_len > model.config.block_size:
            raise ValueError(f"seq_len={config.seq_len} is beyond the model's block_size={model.config.block_size}")
        self.model, self.tokenizer, self.optimizer, self.config = model, tokenizer, optimizer, config
        train_tokens, val_tokens = split_tokens(tokens, config.val_fraction)
        require_window(val_tokens, config.seq_len, f"the held-out part ({config.val_fraction:.0%} of the text)")
        self.batches = Batches(train_tokens, config.seq_len, config.seed)
        self.val_ids, self.val_targets = validation_windows(val_tokens, config.seq_len, config.val_windows)
        self.prompt = tokenizer.encode(config.sample_prompt)
        if not self.prompt:
            raise ValueError("sample_prompt must not be empty")
        self.corpus_sha256 = _sha256(tokens)
        self.n_tokens = len(tokens)
        self.step, self.train_loss, self.val_loss = 0, math.nan, math.nan
        self.best_val_loss, self.best_step = math.inf, 0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.elapsed_before, self.started = 0.0, time.perf_counter()

    # ---- state ----------------------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.started

    def state(self) -> dict:
        """What a checkpoint keeps beside model, tokenizer and optimizer."""
        return {"step": self.step, "best_val_loss": self.best_val_loss, "best_step": self.best_step,
                "train_config": self.config.to_dict(),
                "trainer_state": {"corpus_sha256": self.corpus_sha256, "skipped": self.skipped,
                                  "skipped_in_a_row": self.skipped_in_a_row, "elapsed_seconds": self.elapsed,
                                  "train_loss": self.train_loss, "val_loss": self.val_loss}}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of this very run, or ValueError that lists what differs."""
        if checkpoint.optimizer is None or checkpoint.train_config is None:
            raise ValueError("the checkpoint holds no optimizer, so training cannot continue from it; "
                             "fine-tune from it as a new run instead")
        self._refuse_differences(checkpoint)
        if checkpoint.model is not self.model:
            np.copyto(self.model.flat_params, checkpoint.model.flat_params)
        self.model.dropout_seed = checkpoint.model.dropout_seed
        if checkpoint.optimizer is not self.optimizer:
            np.copyto(self.optimizer.m, checkpoint.optimizer.m)
            np.copyto(self.optimizer.v, checkpoint.optimizer.v)
            self.optimizer.t = checkpoint.optimizer.t
        state = checkpoint.trainer_state
        self.step, self.best_val_loss, self.best_step = checkpoint.step, checkpoint.best_val_loss, checkpoint.best_step
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.elapsed_before, self.train_loss, self.val_loss = (
            state["elapsed_seconds"], state["train_loss"], state["val_loss"])

    def _refuse_differences(self, checkpoint: Checkpoint) -> None:
        differences = []
        for title, saved, current in (("", checkpoint.train_config, self.config.to_dict()),
                                      ("model ", checkpoint.model.config.to_dict(), self.model.config.to_dict())):
            differences += [f"{title}{name} was {saved.get(name)!r} and is {value!r}" for name, value in current.items()
                            if saved.get(name) != value and name not in CHANGEABLE]
        if checkpoint.tokenizer is not None and checkpoint.tokenizer.to_json() != self.tokenizer.to_json():
            differences.append("the tokenizer is another one")
        elif checkpoint.trainer_state.get("corpus_sha256") != self.corpus_sha256:
            differences.append("the training text is another one")
        if differences:
            raise ValueError(f"this is not the run of the checkpoint: {'; '.join(differences)}. Only "
                             f"{', '.join(sorted(CHANGEABLE))} may change when a run is resumed")

    def description(self) -> dict:
        """The part of run.json that does not change."""
        from feste import __version__
        return {"model": self.model.config.to_dict(), "train": self.config.to_dict(),
                "parameters": self.model.num_parameters(), "tokens": self.n_tokens,
                "tokens_per_step": self.config.tokens_per_step, "planned_steps": self.config.num_steps,
                "corpus_sha256": self.corpus_sha256, "feste": __version__, "isa": ops.isa,
                "threads": ops.get_num_threads(), "resumed_at": self.step or None, "skipped_steps": self.skipped}

    # ---- the loop -------------------------------------------------------------------------------------------

    def loop(self, files: _Files | _NoFiles, stop: _StopSignals, on_step: Callable[[dict], None] | None) -> TrainResult:
        state = "finished"
        self.model.zero_grad()
        try:
            while self.step < self.config.num_steps and state == "finished":
                record = self._one_step()
                last = self.step == self.config.num_steps
                if self.step % self.config.val_interval == 0 or last:
                    record |= self._validate()
                if self.step % self.config.sample_interval == 0 or last:
                    record["sample"] = self._sample()
                files.log(record)
                if self.step - self.best_step >= self.config.patience and "val_loss" in record:
                    state = "early_stopped"
                elif stop.signal is not None and not last:
                    state = "interrupted"
                files.save_if_due("val_loss" in record, state, last)
                if on_step is not None:  # after the save: a display whose terminal is gone must not prevent it
                    on_step(record)
            return files.close(self._result(state, stop.signal))
        except BaseException:
            files.abandon()
            raise

    def _one_step(self) -> dict:
        """The next update; returns its record."""
        begun, config = time.perf_counter(), self.config
        self.step += 1
        learning_rate = learning_rate_at(self.step, config)
        loss = 0.0
        for i, (ids, targets) in enumerate(self.batches.batch(self.step, config.batch_size, config.accumulation)):
            key = (self.step - 1) * config.accumulation + i
            loss += self.model.forward_backward(ids, targets, 1.0 / config.accumulation, key) / config.accumulation
        grad_norm = math.nan
        if math.isfinite(loss):
            grad_norm = self.optimizer.step(learning_rate, config.clip_norm, zero_grad=True)
        self.train_loss = loss
        self._guard(loss, grad_norm)
        seconds = time.perf_counter() - begun
        return {"step": self.step, "timestamp": f"{time.time():.3f}", "elapsed_seconds": self.elapsed,
                "learning_rate": learning_rate, "train_loss": loss, "train_perplexity": perplexity(loss),
                "grad_norm": grad_norm, "tokens_per_second": config.tokens_per_step / seconds}

    def _guard(self, loss: float, grad_norm: float) -> None:
        """Stop, or skip the step, if the loss or the gradient is not finite; parameters are as before it."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
        if self.config.on_nan == "stop":
            raise TrainingDiverged(f"step {self.step}: {what}; {ADVICE}")
        self.model.zero_grad()
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(f"step {self.step}: {what}, the {self.skipped_in_a_row}th time in a row; {ADVICE}")

    def _validate(self) -> dict:
        """The mean loss over the fixed validation windows."""
        size, total = self.config.batch_size, 0.0
        for i in range(0, len(self.val_ids), size):
            ids, targets = self.val_ids[i:i + size], self.val_targets[i:i + size]
            total += self.model.loss(ids, targets) * len(ids)
        self.val_loss = total / len(self.val_ids)
        if not math.isfinite(self.val_loss):
            raise TrainingDiverged(f"step {self.step}: the validation loss is {self.val_loss}; {ADVICE}")
        if self.val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = self.val_loss, self.step
        return {"val_loss": self.val_loss, "val_perplexity": perplexity(self.val_loss)}

    def _sample(self) -> str:
        ids = self.model.generate(self.prompt, self.config.sample_tokens, SAMPLE_TEMPERATURE,
                                  seed=self.config.seed + self.step)
        return self.tokenizer.decode(ids)

    def _result(self, state: str, signum: int | None) -> TrainResult:
        return TrainResult(state, self.step, self.train_loss, self.val_loss, self.best_val_loss, self.best_step,
                           self.skipped, self.elapsed, None, signum)


class _NoFiles:
    """A run that leaves nothing on the disk."""

    def log(self, record: dict) -> None:
        pass

    def save_if_due(self, validated: bool, state: str, last: bool) -> None:
        pass

    def close(self, result: TrainResult) -> TrainResult:
        return result

    def abandon(self) -> None:
        pass


class _Files:
    """The run directory of a run: which checkpoint is due when, and how the log ends."""

    def __init__(self, log: RunLog, run: _Run, origin: Path) -> None:
        self._log, self._run = log, run
        self._writer = CheckpointWriter(run.config.keep_last)
        try:
            remove_partial(log.path)
            for path in set_aside_later(log.path, run.step):
                warnings.warn(f"the run goes on at step {run.step + 1}; a checkpoint of a later step is now {path}",
                              stacklevel=3)
            restore_best(log.path, origin, run.best_step)
            if not (log.path / "tokenizer.json").exists():
                run.tokenizer.save(log.path / "tokenizer.json")
        except OSError as error:
            raise log.error(error) from error

    def log(self, record: dict) -> None:
        self._log.log(record)

    def save_if_due(self, validated: bool, state: str, last: bool) -> None:
        """Every name that is due at this step stands for one and the same file."""
        run, names = self._run, []
        over = last or state == "early_stopped"
        if run.step % run.config.checkpoint_interval == 0 or state == "interrupted":
            names.append(f"checkpoint_step_{run.step}.bin")
        if over:
            names.append("checkpoint_final.bin")
        if validated and run.best_step == run.step:
            names.append("checkpoint_best.bin")
        if names:
            self._log.flush()  # rows first: a resumed run keeps the rows up to its checkpoint
            self._writer.save([self._log.path / name for name in names], run.model, run.tokenizer, run.optimizer,
                              **run.state())
        else:
            self._writer.check()

    def close(self, result: TrainResult) -> TrainResult:
        """Wait for the last checkpoint and write how the run ended."""
        self._writer.wait()
        reason = signal.Signals(result.signal).name if result.signal and result.state == "interrupted" else None
        self._log.update(skipped_steps=result.skipped_steps, best_val_loss=_finite(result.best_val_loss),
                         best_step=result.best_step, step=result.step, elapsed_seconds=result.elapsed_seconds,
                         checkpoint_saves=self._writer.saves, checkpoint_held_up_seconds=self._writer.held_up_seconds)
        self._log.close(result.state, reason)
        return replace(result, run_dir=self._log.path)

    def abandon(self) -> None:
        """The loop has raised: let a save under way finish. That error matters more than one of the writer."""
        self._writer.settle()
        self._log.info |= {"step": self._run.step, "skipped_steps": self._run.skipped}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _StopSignals:
    """The first SIGINT, SIGTERM or SIGHUP asks for a stop at the end of the step; the second quits at once.

    A SIGHUP that nohup has set to be ignored stays ignored. Only the main thread can be told of signals;
    elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self.signal is not None:
            os._exit(128 + number)  # files are whole at every instant, so nothing needs to be finished
        self.signal = number
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{signal.Signals(number).name}: stops and saves after this step; once more quits at "
                        "once\n".encode())
