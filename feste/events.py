"""What happens beside a run: its figures in other people's programs, and a command that is told of its fate.

Both listen to the records of the steps. Neither can end a run: what goes wrong here is a line, and the run goes on
without it.
"""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path

from feste.errors import FesteError
from feste.run.names import COLUMNS
from feste.trainer import TrainingDiverged

Listener = Callable[[dict], None]

FIGURES = [name for name in COLUMNS if name not in ("step", "timestamp", "sample")]
STALL_FACTOR, STALL_SECONDS, FIRST_STEP_SECONDS = 20, 60.0, 900.0
COMMAND_SECONDS = 60.0


def figures(record: dict) -> dict[str, float]:
    """The numbers that a step has."""
    return {name: record[name] for name in FIGURES if record.get(name) is not None}


# ---- loggers -----------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in `tensorboard` below the run directory; a resumed run replaces the steps that it makes again."""

    def __init__(self, run_dir: Path, settings: dict) -> None:
        self._make, self._folder, self._writer = _require("tensorboardX").SummaryWriter, run_dir / "tensorboard", None

    def __call__(self, record: dict) -> None:
        step = record["step"]
        if self._writer is None:  # not before the run has its directory
            # The library names a file by the second: two runs within one would write over each other.
            self._writer = self._make(str(self._folder), purge_step=step, filename_suffix=f".{os.getpid()}.{step}")
        for name, value in figures(record).items():
            self._writer.add_scalar(name, value, step)
        if "sample" in record:
            self._writer.add_text("sample", record["sample"], step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Tracker:
    """Programs with the interface of wandb: init, log, finish. Nothing leaves the machine unless they are told to."""

    def __init__(self, module: str, run_dir: Path, settings: dict) -> None:
        self._module, self._run_dir, self._settings, self._run = _require(module), run_dir, settings, None

    def __call__(self, record: dict) -> None:
        if self._run is None:
            offline = {"mode": os.environ.get("WANDB_MODE", "offline"), "dir": str(self._run_dir)}
            self._run = self._module.init(project="feste", name=self._run_dir.name, config=self._settings,
                                          **(offline if self._module.__name__ == "wandb" else {}))
        self._module.log(figures(record), step=record["step"])

    def close(self) -> None:
        if self._run is not None:
            self._module.finish()


MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def make_logger(name: str, run_dir: Path, settings: dict) -> Listener:
    return TensorBoard(run_dir, settings) if name == "tensorboard" else Tracker(MODULES[name], run_dir, settings)


def require_loggers(names: Sequence[str]) -> None:
    """FesteError if the library of one of them is missing; to be asked before a run begins."""
    for name in names:
        _require(MODULES[name])


def _require(module: str):
    try:
        return import_module(module)
    except ImportError as error:
        raise FesteError(f"{module} cannot be imported ({error}); install it with: pip install {module}",
                         "log_to") from None


# ---- a command that is told --------------------------------------------------------------------------------


class Command:
    """Runs a shell command when the run ends, fails, meets NaN, or stalls.

    The command finds FESTE_EVENT (finished, early_stopped, interrupted, failed, nan, stalled), FESTE_RUN (the run
    directory), FESTE_STEP and FESTE_MESSAGE in its environment. A run stalls when a step takes twenty times as long as
    any before it, and a minute at least.
    """

    def __init__(self, command: str, run_dir: Path) -> None:
        self._command, self._run_dir, self._step, self._longest = command, run_dir, 0, None
        self._last, self._stalled, self._over = time.monotonic(), False, threading.Event()
        self._watch = threading.Thread(target=self._look, name="stall", daemon=True)

    def start(self) -> None:
        self._last = time.monotonic()
        self._watch.start()

    def __call__(self, record: dict) -> None:
        now = time.monotonic()
        if self._step and not self._stalled:  # the first step also takes the memory
            self._longest = max(self._longest or 0.0, now - self._last)
        self._last, self._stalled, self._step = now, False, record["step"]
        if not math.isfinite(record["train_loss"]) or not math.isfinite(record["grad_norm"]):
            self.tell("nan", f"step {self._step} was skipped: its loss or gradient is not finite")

    def tell(self, event: str, message: str = "") -> None:
        told = {"FESTE_EVENT": event, "FESTE_RUN": str(self._run_dir), "FESTE_STEP": str(self._step),
                "FESTE_MESSAGE": message}
        try:
            done = subprocess.run(self._command, shell=True, env=os.environ | told, timeout=COMMAND_SECONDS,
                                  stdin=subprocess.DEVNULL)
            trouble = f"exit code {done.returncode}" if done.returncode else ""
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            trouble = str(error)
        if trouble:
            warnings.warn(f"the command for {event} failed ({trouble}): {self._command}", stacklevel=2)

    def ended(self, error: BaseException | None, state: str | None) -> None:
        """The run is over: with an error, or in a state."""
        self._over.set()
        if error is None:
            self.tell(state or "finished")
        elif isinstance(error, TrainingDiverged):
            self.tell("nan", str(error))
        else:
            self.tell("failed", f"{type(error).__name__}: {error}")

    def patience(self) -> float:
        """Seconds without a step that are a stall."""
        return FIRST_STEP_SECONDS if self._longest is None else max(STALL_SECONDS, STALL_FACTOR * self._longest)

    def _look(self) -> None:
        while not self._over.wait(1.0):
            quiet = time.monotonic() - self._last
            if quiet > self.patience() and not self._stalled:
                self._stalled = True
                self.tell("stalled", f"no step for {quiet:.0f} seconds")


# ---- all of them -------------------------------------------------------------------------------------------


class Listeners:
    """Everyone who is told of a run, as one: called with each record, and a context that ends with the run.

    display, which has no errors of its own, comes first. state: set it to how the run ended.
    """

    def __init__(self, display: Listener, run_dir: Path, settings: dict, log_to: Sequence[str] = (),
                 on_event: str | None = None) -> None:
        self._display, self.state = display, None
        self._loggers = [make_logger(name, run_dir, settings) for name in dict.fromkeys(log_to)]
        self._command = None if on_event is None else Command(on_event, run_dir)
        self._display_context = ExitStack()

    def __enter__(self) -> Listeners:
        self._display_context.enter_context(self._display)
        if self._command is not None:
            self._command.start()
        return self

    def __call__(self, record: dict) -> None:
        self._display(record)
        for logger in list(self._loggers):
            try:
                logger(record)
            except Exception as error:  # whatever a library of others raises, the run is worth more
                self._loggers.remove(logger)
                warnings.warn(f"{type(logger).__name__} failed at step {record['step']} and gets no more figures: "
                              f"{error}", stacklevel=2)
        if self._command is not None:
            self._command(record)

    def __exit__(self, kind, error, trace) -> None:
        self._display_context.close()
        for logger in self._loggers:
            with suppress(Exception):
                logger.close()
        if self._command is not None:
            self._command.ended(error, self.state)
