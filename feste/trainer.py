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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from feste import ops, parallel, plan
from feste.config import TrainConfig, dials
from feste.data import count_targets
from feste.errors import FesteError
from feste.evaluation import bytes_per_token, in_bits_per_byte, mean_loss, perplexity
from feste.model import GPT2
from feste.optim import AdamW
from feste.pairs import Pairs
from feste.plan import Plan
from feste.progress import Progress
from feste.run.checkpoint import Checkpoint
from feste.run.directory import RunDirectory, due_names
from feste.run.journal import INFO, WARNING, overheard
from feste.schedule import decay_begin, learning_rate_at
from feste.speed import measured_peak, training_flops
from feste.tokenizer import BPETokenizer
from feste.version import __version__

SAMPLE_TEMPERATURE = 0.8
PEAK_SECONDS = 0.02  # of measuring, at the start, what this machine could do
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


def train_gpt2(model: GPT2, tokenizer: BPETokenizer, text: str | np.ndarray | Pairs, num_steps: int | None = None,
               learning_rate: float | None = None, seq_len: int | None = None,
               run_dir: str | os.PathLike | None = None, *, config: TrainConfig | None = None,
               optimizer: AdamW | str | None = None, resume: Checkpoint | str | os.PathLike | None = None,
               on_step: Callable[[dict], None] | None = None, progress: bool = False, info: dict | None = None,
               **settings) -> TrainResult:
    """Train a model on a text, on a 1-D array of token ids, or on questions and answers (`pairs.Pairs`).

    num_steps, learning_rate, seq_len and settings, which are the other fields of TrainConfig, replace those of config;
    without a config the three must be given. With run_dir, the run is logged and checkpointed there; info is added to
    its run.json. on_step is called with the record of every step; progress shows losses, speed and the time left, as a
    bar on a terminal and as lines elsewhere.

    resume continues a run from its checkpoint to the bit, in this model and optimizer; if it is a path, run_dir
    defaults to the directory of that run. Another run_dir must be new: it begins with the rows up to the checkpoint,
    and the old one stays as it is. Without resume, an optimizer may be handed over to go on with its moments as a new
    run; its settings are then the run's. Its name, "adamw" or "muon", makes a new one.

    Under mpiexec the ranks share the work (docs/DISTRIBUTED.md): all of them call this with the same arguments, the
    first writes run_dir and shows progress, on_step is called on each. The optimizer then has a share of the moments.

    Raises ValueError for data or settings that do not fit, before anything is written, and TrainingDiverged.
    """
    if isinstance(optimizer, str):
        settings, optimizer = settings | {"optimizer": optimizer}, None
    named = {"num_steps": num_steps, "learning_rate": learning_rate, "seq_len": seq_len}
    settings |= {name: value for name, value in named.items() if value is not None}
    config = plan.with_settings(config, _optimizer_settings(optimizer, settings) | {"precision": model.precision})
    run_dir, team, warned = None if run_dir is None else Path(run_dir), parallel.world(), []
    with overheard(warned.append):
        if resume is None:
            if run_dir is not None:
                team.on_first(lambda: plan.require_new(run_dir))
            the_plan = plan.new(model, tokenizer, text, config, None, optimizer, info)
            the_plan.run_dir = run_dir
        else:
            if not isinstance(resume, Checkpoint):
                path = Path(resume)
                resume = parallel.shared_checkpoint(team, lambda: plan.checkpoint_to_resume(path, run_dir))
                run_dir = resume.path.parent if run_dir is None else run_dir
            the_plan = plan.resumed_in(model, tokenizer, optimizer, resume, text, config, run_dir, info)
    the_plan.warned = warned
    if not progress or not team.first:
        return train(the_plan, on_step, settled=on_step is not None)
    with Progress(the_plan.config, start=the_plan.state.step) as shown:
        return train(the_plan, lambda record: (shown(record), on_step and on_step(record)),
                     settled=on_step is not None)


if train_gpt2.__doc__:  # not under python -OO
    train_gpt2.__doc__ = train_gpt2.__doc__.rstrip() + dials(TrainConfig)


def _optimizer_settings(optimizer: AdamW | None, settings: dict) -> dict:
    """The settings, with those of an optimizer that was handed over: the run must say what it does."""
    if optimizer is None:
        return settings
    if not isinstance(optimizer, AdamW):
        raise FesteError(f"optimizer must be AdamW(model), Muon(model) or one of their names, got {optimizer!r:.60}",
                         "optimizer")
    if settings.get("beta2_half_life"):
        raise FesteError(f"beta2_half_life={settings['beta2_half_life']}, but the optimizer that was handed over has a "
                         "beta2 of its own", "beta2_half_life")
    own = optimizer.settings()
    for name, value in own.items():
        if settings.get(name, value) != value:
            raise FesteError(f"{name}={settings[name]}, but the optimizer has {value}", name)
    return settings | own


def train(the_plan: Plan, on_step: Callable[[dict], None] | None = None,
          loop: Callable[[Run], None] | None = None, settled: bool = False) -> TrainResult:
    """Carry out a plan. on_step is called with the record of every step, behind its checkpoint.

    settled: on_step may read the parameters, which are otherwise on their way between ranks then. loop: what happens in
    the steps, if it is not to be `training_loop`; examples/05 has one to read.
    """
    team = parallel.world()
    if loop is not None and team.size > 1:
        raise FesteError(f"this program has a training loop of its own, which knows nothing of {team.size} ranks; "
                         "start it without mpiexec, or use `feste train`")
    ops.set_num_threads(the_plan.config.threads or team.threads())
    with Run(the_plan, on_step, settled) as run, run.stop:
        (loop or training_loop)(run)
        return run.end()


def training_loop(run: Run) -> None:
    """Every step of a run: an update, and when they are due a validation and a sample."""
    for step in run.steps():
        learning_rate = learning_rate_at(step, run.config)
        record = run.record(learning_rate, *_update(run, step, learning_rate))
        if run.due(run.config.val_interval):
            record["val_loss"] = run.validation_loss()
        if run.due(run.config.sample_interval) and run.team.first:
            record["sample"] = _sample(run, step)
        run.keep(record)


def _update(run: Run, step: int, learning_rate: float) -> tuple[float, float]:
    """One update from the mini-batches of a step; its mean loss, and the gradient norm before clipping.

    A mini-batch weighs as many tokens as it has that count, so a step is that of one large batch.
    """
    count = run.config.accumulation
    batches = run.batches.batch(step, run.config.batch_size, count)
    weights = np.array([count_targets(targets) for _, targets in batches])
    loss = run.update.compute(batches, weights, (step - 1) * count, run.stop.signal)
    if not math.isfinite(loss):
        run.update.skip()
        return loss, math.nan
    return loss, run.update.step(step, learning_rate, run.config.clip_norm)


def _sample(run: Run, step: int) -> str:
    """Text of the model; it has a seed of its own, so that it does not disturb the run."""
    run.update.settle()
    ids = run.model.generate(run.prompt, run.config.sample_tokens, SAMPLE_TEMPERATURE, seed=run.config.seed + step,
                             vocab_size=run.tokenizer.vocab_size, stop_tokens=run.tokenizer.stop_tokens)
    return run.tokenizer.decode(ids)


class Run:
    """A plan under way: what a loop needs for a step, and what is kept of it. A context that ends with the run.

    team: the ranks that carry it out together, of which the first keeps the run directory. update: what they make of a
    step. batches: the mini-batches of every step; validation(): those that are held out, whose tokens have
    bytes_per_token. prompt: ids of the text that samples continue. state: where the run stands.
    """

    def __init__(self, the_plan: Plan, on_step: Callable[[dict], None] | None = None, settled: bool = False) -> None:
        self.plan, self.config, self.state, self.on_step = the_plan, the_plan.config, the_plan.state, on_step
        self.settled = settled
        self.model, self.tokenizer, self.optimizer = the_plan.model, the_plan.tokenizer, the_plan.optimizer
        self.team = parallel.world()
        self.team.require_alike(the_plan.facts())
        self.update = parallel.make_update(self.team, self.model, self.optimizer, self.config)
        self.batches = the_plan.data.batches(self.config, self.tokenizer)
        self.tokens_per_step = the_plan.data.tokens_per_step(self.config)
        self.validation = partial(the_plan.data.validation, self.config)
        self.prompt = self.tokenizer.encode(self.config.sample_prompt)
        self.bytes_per_token = bytes_per_token(self.validation(), self.tokenizer)
        self.stop, self.ending = _StopSignals(aloud=self.team.first), "finished"
        self._elapsed_before, self._started = self.state.elapsed_seconds, time.perf_counter()
        self._step_begun = self._started
        self._signal: int | None = None  # what interrupted it
        self._directory: RunDirectory | None = None  # for a run that leaves nothing on the disk

    def __enter__(self) -> Run:
        p, state = self.plan, self.state
        description = self.description() | p.info
        if p.run_dir is not None and self.team.first:
            self._directory = RunDirectory(
                p.run_dir, description, self.config, self.model, self.tokenizer, self.optimizer,
                resumed_at=state.step if p.resumed else None, best_step=state.best_step, origin=p.origin)
            for words, kind in [(note, INFO) for note in p.notes] + [(warning, WARNING) for warning in p.warned]:
                self._directory.say(words, kind)
        self.model.zero_grad()
        self.team.begin_watch()
        return self

    def __exit__(self, *error) -> None:
        self.update.close()
        if self._directory is not None:
            self._directory.info.update(step=self.state.step, skipped_steps=self.state.skipped)
            self._directory.__exit__(*error)

    def description(self) -> dict:
        """The part of run.json that does not change."""
        return {"model": self.model.config.to_dict(), "train": self.config.to_dict(),
                "parameters": self.model.num_parameters(), "tokens": len(self.plan.data),
                "tokens_per_step": self.tokens_per_step, "planned_steps": self.config.num_steps,
                "corpus_sha256": self.plan.corpus_sha256, "val_bytes_per_token": self.bytes_per_token,
                "feste": __version__, "isa": ops.isa,
                "threads": ops.get_num_threads(), "resumed_at": self.state.step or None,
                "flops_per_token": training_flops(self.model.config, self.config.seq_len),
                "peak_flops": measured_peak(self.config.precision == "bf16", PEAK_SECONDS),
                "skipped_steps": self.state.skipped, **self.team.describe(ops.get_num_threads())}

    # ---- what a loop calls, in this order -------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps from 1, or from where the run is resumed, to the last; fewer if patience or a signal ends them."""
        while self.state.step < self.config.num_steps and self.ending == "finished":
            self._step_begun = time.perf_counter()
            self.state.step += 1
            yield self.state.step

    def record(self, learning_rate: float, loss: float, grad_norm: float) -> dict:
        """The record of an update that was just made. What is not finite stops the run, or skips the step."""
        seconds = time.perf_counter() - self._step_begun
        self.state.train_loss = loss
        self._guard(loss, grad_norm)
        return {"step": self.state.step, "timestamp": f"{time.time():.3f}", "elapsed_seconds": self._elapsed(),
                "learning_rate": learning_rate, "train_loss": loss, "train_perplexity": perplexity(loss),
                "grad_norm": grad_norm, "tokens_per_second": self.tokens_per_step / seconds}

    def due(self, interval: int) -> bool:
        """Whether this step is one of every `interval`, or the last."""
        return self.state.step == self.config.num_steps or self._passes(interval)

    def validation_loss(self) -> float:
        """The mean loss of the held-out mini-batches, of which every rank computes some."""
        self.update.settle()
        return mean_loss(self.model, self.validation(), self.team)

    def keep(self, record: dict) -> None:
        """Log the record, write the checkpoints that are due, and see whether the run goes on."""
        state, last = self.state, self.state.step == self.config.num_steps
        validated = "val_loss" in record
        if validated:
            self._take_validation(record)
        if validated and state.step - state.best_step >= self.config.patience:
            self.ending = "early_stopped"
        elif self.update.agreed(self.stop.signal) is not None and not last:
            self.ending, self._signal = "interrupted", self.update.agreed(self.stop.signal)
        names = self._due_names(validated)
        if names or self.ending != "finished" or last or self.settled:
            self.update.settle()
        if self._directory is not None:
            self._directory.write(record)
            if validated and self.team.size > 1:
                self._directory.note(waiting=self._waiting())
            self._directory.save(names, self.for_checkpoint(), self.update.moments)
        elif self.plan.run_dir is not None and names:
            self.update.moments(None)  # to the first rank, which saves them
        if self.on_step is not None:  # after the save: a display whose terminal is gone must not prevent it
            self.on_step(record)

    # ---- the parts of it ------------------------------------------------------------------------------------

    def _due_names(self, validated: bool) -> list[str]:
        """The names of the checkpoints that are due behind this step, the same on every rank."""
        step, config, update = self.state.step, self.config, self.update
        return due_names(
            step, periodical=self.ending == "interrupted" or self._passes(config.checkpoint_interval),
            over=step == config.num_steps or self.ending == "early_stopped",
            improved=validated and self.state.best_step == step,
            stable=config.schedule == "wsd" and update.is_whole(step)
            and step == update.whole_before(decay_begin(config) + 1))

    def _passes(self, interval: int) -> bool:
        """Whether this step is one of every `interval`; where ranks train apart, the next that brings them together."""
        step = self.state.step
        return self.update.is_whole(step) and step // interval > self.update.whole_before(step) // interval

    def _guard(self, loss: float, grad_norm: float) -> None:
        """Stop, or skip the step, if the loss or the gradient is not finite; parameters are as before it."""
        state = self.state
        if math.isfinite(loss) and math.isfinite(grad_norm):
            state.skipped_in_a_row = 0
            return
        what = (f"the gradient norm is {grad_norm}" if math.isfinite(loss) else
                f"the loss is {loss}{self.update.where_not_finite()}")
        if self.config.on_nan == "stop":
            raise TrainingDiverged(f"step {state.step}: {what}; {ADVICE}")
        self.model.zero_grad()
        state.skipped += 1
        state.skipped_in_a_row += 1
        if self._directory is not None:
            self._directory.say(f"step {state.step:,} is skipped: {what}", WARNING)
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(f"step {state.step}: {what}, the {state.skipped_in_a_row}th time in a row; {ADVICE}")

    def _take_validation(self, record: dict) -> None:
        state, loss = self.state, record["val_loss"]
        if not math.isfinite(loss):
            raise TrainingDiverged(f"step {state.step}: the validation loss is {loss}; {ADVICE}")
        record["val_perplexity"], state.val_loss = perplexity(loss), loss
        if self.bytes_per_token is not None:
            record["val_bits_per_byte"] = in_bits_per_byte(loss, self.bytes_per_token)
        if loss < state.best_val_loss:
            state.best_val_loss, state.best_step = loss, state.step

    def _elapsed(self) -> float:
        """Seconds of the run so far, those before it was resumed included."""
        self.state.elapsed_seconds = self._elapsed_before + time.perf_counter() - self._started
        return self.state.elapsed_seconds

    def _waiting(self) -> float:
        """The share of the time that this rank has waited for others."""
        return round(self.team.waited / (time.perf_counter() - self._started), 4)

    def for_checkpoint(self) -> dict:
        """What a checkpoint keeps beside model, tokenizer and optimizer."""
        self._elapsed()
        kept = asdict(self.state)
        step, best_val_loss, best_step = (kept.pop(name) for name in ("step", "best_val_loss", "best_step"))
        return {"step": step, "best_val_loss": best_val_loss, "best_step": best_step,
                "train_config": self.config.to_dict(),
                "trainer_state": kept | {"corpus_sha256": self.plan.corpus_sha256}}

    def end(self) -> TrainResult:
        """How the run ended, in run.json and as a result."""
        s, saves, held_up, elapsed, signum = self.state, 0, 0.0, self._elapsed(), self._signal
        if self._directory is not None:
            reason = signal.Signals(signum).name if signum else None
            best = s.best_val_loss if math.isfinite(s.best_val_loss) else None
            self._directory.end(self.ending, reason, step=s.step, skipped_steps=s.skipped, best_val_loss=best,
                                best_step=s.best_step, elapsed_seconds=elapsed)
            saves, held_up = self._directory.writer.saves, self._directory.writer.held_up_seconds
        return TrainResult(self.ending, s.step, s.train_loss, s.val_loss, s.best_val_loss, s.best_step, s.skipped,
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

    def __init__(self, aloud: bool = True) -> None:
        self.signal: int | None = None
        self._urged, self._aloud = False, aloud
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
                if not self._aloud:
                    return
                os.write(2, f"\n{name}: stops and saves after this step; one more Ctrl+C or SIGTERM quits at "
                            "once\n".encode())
