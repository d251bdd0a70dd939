"""The training loop: what happens every step, and how a run ends.

A step: the learning rate of the schedule, the mini-batches of (seed, step), their gradients added up, one clipped
AdamW update. When due, after the update: validation, a sample, a checkpoint. All of it is a function of
(configuration, tokens, step) and the state that a checkpoint holds, so a run that was stopped and resumed is the
uninterrupted run to the bit; only the columns that measure wall time differ.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from feste import ops, plan
from feste.config import TrainConfig
from feste.data import Batches, even_starts, split_tokens
from feste.errors import FesteError
from feste.evaluation import mean_loss, perplexity
from feste.model import GPT2
from feste.optim import AdamW, learning_rate_at
from feste.plan import Plan
from feste.run.checkpoint import Checkpoint
from feste.run.directory import RunDirectory
from feste.tokenizer import BPETokenizer

SAMPLE_TEMPERATURE = 0.8
MAX_SKIPPED_IN_A_ROW = 10

ADVICE = ("the learning rate may be too high: try half of it. If that does not help, look for damaged text in the "
          "corpus. The checkpoints so far are from before and stay")


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; names the step and what to try."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. state is one of run.names.END_STATES; signal is what interrupted it, or None.

    saves: checkpoints written; held_up_seconds: what training waited for them.
    """

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
    saves: int = 0
    held_up_seconds: float = 0.0


def train_gpt2(model: GPT2, tokenizer: BPETokenizer, text: str | np.ndarray, num_steps: int | None = None,
               learning_rate: float | None = None, seq_len: int | None = None,
               run_dir: str | os.PathLike | None = None, *, config: TrainConfig | None = None,
               optimizer: AdamW | None = None, resume: Checkpoint | str | os.PathLike | None = None,
               on_step: Callable[[dict], None] | None = None, info: dict | None = None, **settings) -> TrainResult:
    """Train a model on a text, or on a 1-D array of token ids.

    num_steps, learning_rate, seq_len and settings, which are the other fields of TrainConfig, replace those of config;
    without a config the three must be given. With run_dir, the run is logged and checkpointed there; info is added to
    its run.json. on_step is called with the record of every step.

    resume continues a run from its checkpoint to the bit, in this model and optimizer; if it is a path, run_dir
    defaults to the directory of that run. Another run_dir must be new: it begins with the rows up to the checkpoint,
    and the old one stays as it is. Without resume, an optimizer may be handed over to go on with its moments as a new
    run; its betas, eps and weight_decay are then the run's.

    Raises ValueError for data or settings that do not fit, before anything is written, and TrainingDiverged.
    """
    named = {"num_steps": num_steps, "learning_rate": learning_rate, "seq_len": seq_len}
    settings |= {name: value for name, value in named.items() if value is not None}
    config = plan.with_settings(config, _optimizer_settings(optimizer, settings) | {"precision": model.precision})
    run_dir = None if run_dir is None else Path(run_dir)
    if resume is None:
        return train(plan.new(model, tokenizer, text, config, run_dir, optimizer, info), on_step)
    if not isinstance(resume, Checkpoint):
        resume = plan.checkpoint_to_resume(Path(resume), run_dir)
        run_dir = resume.path.parent if run_dir is None else run_dir
    return train(plan.resumed_in(model, tokenizer, optimizer, resume, text, config, run_dir, info), on_step)


def _optimizer_settings(optimizer: AdamW | None, settings: dict) -> dict:
    """The settings, with those of an optimizer that was handed over: the run must say what it does."""
    if optimizer is None:
        return settings
    own = {"beta1": optimizer.betas[0], "beta2": optimizer.betas[1], "eps": optimizer.eps,
           "weight_decay": optimizer.weight_decay}
    for name, value in own.items():
        if settings.get(name, value) != value:
            raise FesteError(f"{name}={settings[name]}, but the optimizer has {value}", name)
    return settings | own


def train(the_plan: Plan, on_step: Callable[[dict], None] | None = None) -> TrainResult:
    """Carry out a plan. on_step is called with the record of every step, behind its checkpoint."""
    ops.set_num_threads(the_plan.config.threads)
    loop = _Loop(the_plan)
    with loop.open_directory() as directory, _StopSignals() as stop:
        return loop.run(directory, stop, on_step)


class _Loop:
    """A plan under way: its state, and the parts of a step."""

    def __init__(self, the_plan: Plan) -> None:
        self.plan, self.config, self.state = the_plan, the_plan.config, the_plan.state
        self.model, self.tokenizer, self.optimizer = the_plan.model, the_plan.tokenizer, the_plan.optimizer
        train_tokens, self.val_tokens = split_tokens(the_plan.tokens, self.config.val_fraction)
        self.batches = Batches(train_tokens, self.config.seq_len, self.config.seed)
        self.val_starts = even_starts(self.val_tokens, self.config.seq_len, self.config.val_windows)
        self.prompt = self.tokenizer.encode(self.config.sample_prompt)
        self.elapsed_before, self.started = self.state.elapsed_seconds, time.perf_counter()

    def open_directory(self) -> RunDirectory | nullcontext:
        """The run directory as a context, or None in its place for a run that leaves nothing on the disk."""
        p, state = self.plan, self.state
        if p.run_dir is None:
            return nullcontext()
        return RunDirectory(p.run_dir, self.description() | p.info, self.config, self.model, self.tokenizer,
                            self.optimizer, resumed_at=state.step if p.resumed else None, best_step=state.best_step,
                            origin=p.origin)

    def description(self) -> dict:
        """The part of run.json that does not change."""
        from feste import __version__
        return {"model": self.model.config.to_dict(), "train": self.config.to_dict(),
                "parameters": self.model.num_parameters(), "tokens": len(self.plan.tokens),
                "tokens_per_step": self.config.tokens_per_step, "planned_steps": self.config.num_steps,
                "corpus_sha256": self.plan.corpus_sha256, "feste": __version__, "isa": ops.isa,
                "threads": ops.get_num_threads(), "resumed_at": self.state.step or None,
                "skipped_steps": self.state.skipped}

    def for_checkpoint(self) -> dict:
        """What a checkpoint keeps beside model, tokenizer and optimizer."""
        self._elapsed()
        kept = asdict(self.state)
        step, best_val_loss, best_step = (kept.pop(name) for name in ("step", "best_val_loss", "best_step"))
        return {"step": step, "best_val_loss": best_val_loss, "best_step": best_step,
                "train_config": self.config.to_dict(),
                "trainer_state": kept | {"corpus_sha256": self.plan.corpus_sha256}}

    def run(self, directory: RunDirectory | None, stop: _StopSignals,
            on_step: Callable[[dict], None] | None) -> TrainResult:
        """Steps until the last one, until patience ends, or until a signal asks to stop."""
        ending, state, config = "finished", self.state, self.config
        self.model.zero_grad()
        while state.step < config.num_steps and ending == "finished":
            record = self._one_step()
            last = state.step == config.num_steps
            validated = state.step % config.val_interval == 0 or last
            if validated:
                record |= self._validate()
            if state.step % config.sample_interval == 0 or last:
                record["sample"] = self._sample()
            if validated and state.step - state.best_step >= config.patience:
                ending = "early_stopped"
            elif stop.signal is not None and not last:
                ending = "interrupted"
            if directory is not None:
                directory.write(record)
                directory.save_if_due(state.step, self.for_checkpoint(),
                                      improved=validated and state.best_step == state.step,
                                      over=last or ending == "early_stopped", interrupted=ending == "interrupted")
            if on_step is not None:  # after the save: a display whose terminal is gone must not prevent it
                on_step(record)
        return self._end(directory, ending, stop.signal)

    def _one_step(self) -> dict:
        """The next update; returns its record."""
        begun, config, state = time.perf_counter(), self.config, self.state
        state.step += 1
        learning_rate = learning_rate_at(state.step, config)
        loss = 0.0
        for i, (ids, targets) in enumerate(self.batches.batch(state.step, config.batch_size, config.accumulation)):
            key = (state.step - 1) * config.accumulation + i
            loss += self.model.forward_backward(ids, targets, 1.0 / config.accumulation, key) / config.accumulation
        grad_norm = math.nan
        if math.isfinite(loss):
            grad_norm = self.optimizer.step(learning_rate, config.clip_norm, zero_grad=True)
        state.train_loss = loss
        self._guard(loss, grad_norm)
        seconds = time.perf_counter() - begun
        return {"step": state.step, "timestamp": f"{time.time():.3f}", "elapsed_seconds": self._elapsed(),
                "learning_rate": learning_rate, "train_loss": loss, "train_perplexity": perplexity(loss),
                "grad_norm": grad_norm, "tokens_per_second": config.tokens_per_step / seconds}

    def _elapsed(self) -> float:
        """Seconds of the run so far, those before it was resumed included."""
        self.state.elapsed_seconds = self.elapsed_before + time.perf_counter() - self.started
        return self.state.elapsed_seconds

    def _guard(self, loss: float, grad_norm: float) -> None:
        """Stop, or skip the step, if the loss or the gradient is not finite; parameters are as before it."""
        state = self.state
        if math.isfinite(loss) and math.isfinite(grad_norm):
            state.skipped_in_a_row = 0
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
        if self.config.on_nan == "stop":
            raise TrainingDiverged(f"step {state.step}: {what}; {ADVICE}")
        self.model.zero_grad()
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(f"step {state.step}: {what}, the {state.skipped_in_a_row}th time in a row; {ADVICE}")

    def _validate(self) -> dict:
        """The mean loss over the fixed validation windows."""
        state, config = self.state, self.config
        state.val_loss = mean_loss(self.model, self.val_tokens, self.val_starts, config.seq_len, config.batch_size)
        if not math.isfinite(state.val_loss):
            raise TrainingDiverged(f"step {state.step}: the validation loss is {state.val_loss}; {ADVICE}")
        if state.val_loss < state.best_val_loss:
            state.best_val_loss, state.best_step = state.val_loss, state.step
        return {"val_loss": state.val_loss, "val_perplexity": perplexity(state.val_loss)}

    def _sample(self) -> str:
        ids = self.model.generate(self.prompt, self.config.sample_tokens, SAMPLE_TEMPERATURE,
                                  seed=self.config.seed + self.state.step)
        return self.tokenizer.decode(ids)

    def _end(self, directory: RunDirectory | None, ending: str, signum: int | None) -> TrainResult:
        """How the run ended, in run.json and as a result."""
        s, saves, held_up, elapsed = self.state, 0, 0.0, self._elapsed()
        if directory is not None:
            reason = signal.Signals(signum).name if signum and ending == "interrupted" else None
            best = s.best_val_loss if math.isfinite(s.best_val_loss) else None
            directory.end(ending, reason, skipped_steps=s.skipped, best_val_loss=best, best_step=s.best_step,
                          step=s.step, elapsed_seconds=elapsed)
            saves, held_up = directory.writer.saves, directory.writer.held_up_seconds
        return TrainResult(ending, s.step, s.train_loss, s.val_loss, s.best_val_loss, s.best_step, s.skipped,
                           elapsed, self.plan.run_dir, signum, saves, held_up)


class _StopSignals:
    """The first signal asks for a stop at the end of the step; a second SIGINT, SIGTERM or SIGHUP quits at once.

    Batch systems warn with SIGUSR1, SIGUSR2 or SIGXCPU, some again and again: those only ever ask. A signal that is
    ignored when the run begins stays ignored, as by nohup, or in the background of a script. SIGUSR1, SIGUSR2 and
    SIGXCPU that the program has a handler for stay its own. Only the main thread can be told of signals; elsewhere
    this does nothing.
    """

    URGENT = ("SIGINT", "SIGTERM", "SIGHUP")
    WARNINGS = ("SIGUSR1", "SIGUSR2", "SIGXCPU")

    def __init__(self) -> None:
        self.signal: int | None = None
        self._urged = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in (*self.URGENT, *self.WARNINGS):
                number = getattr(signal, name, None)  # Windows has SIGINT and SIGTERM
                before = signal.getsignal(number) if number is not None else signal.SIG_IGN
                if before == signal.SIG_DFL or (name in self.URGENT and before != signal.SIG_IGN):
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if name in self.URGENT:
            if self._urged:
                os._exit(128 + number)  # files are whole at every instant, so nothing needs to be finished
            self._urged = True
        if self.signal is None or name in self.URGENT:
            self.signal = number
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{name}: stops and saves after this step; one more Ctrl+C or SIGTERM quits at "
                            "once\n".encode())
