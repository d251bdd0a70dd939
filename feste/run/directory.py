"""The run directory, owned by one process: what is due, the writer in the background, what is kept, what is newest."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
import traceback as tracebacks
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from feste import disk
from feste.config import TrainConfig
from feste.model import GPT2
from feste.optim import AdamW
from feste.run.checkpoint import CheckpointError, Snapshot, cannot_write, step_of, verify, write
from feste.run.journal import ERROR, INFO, Journal
from feste.run.log import RunDirectoryError, RunLog, copy_rows, failure
from feste.run.names import BEST, FINAL, LOCK, LOG, SET_ASIDE, STABLE, TOKENIZER, periodic, periodic_name
from feste.tokenizer import BPETokenizer

# ---- which directory, which file ---------------------------------------------------------------------------


def require_new(path: Path) -> None:
    """RunDirectoryError unless a new run may begin in `path`: it is not there, or empty."""
    try:
        occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise failure(path, error) from error
    if occupied:
        raise RunDirectoryError(f"{path} exists; a run directory is never reused", "run_dir", "resume")


def require_free(path: Path) -> None:
    """RunDirectoryError if a process is training in the directory."""
    if (path / LOCK).exists():
        _lock(path).release()


def _lock(path: Path) -> disk.Lock:
    try:
        return disk.Lock(path / LOCK)
    except disk.Held:
        raise RunDirectoryError(f"{path} is in use by another training process", "run_dir") from None


def find_checkpoint(path: str | os.PathLike, prefer: str = "latest") -> tuple[Path, list[str]]:
    """The checkpoint a path means, and a line for each damaged one that was passed over.

    A file means itself. A run directory means its newest whole checkpoint, or with prefer="best" its best one.
    """
    path = Path(path)
    if path.is_file():
        return path, []
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a checkpoint nor a run directory")
    ordered = [path / FINAL, *(p for _, p in reversed(periodic(path))), path / STABLE, path / BEST]
    candidates = [p for p in ([ordered[-1], *ordered[:-1]] if prefer == "best" else ordered) if p.exists()]
    whole, passed_over = [], []
    for candidate in candidates:
        try:
            whole.append((verify(candidate), candidate))
            if prefer == "best":
                break
        except CheckpointError as error:
            passed_over.append(str(error))
    if not whole:
        raise CheckpointError(passed_over[0] if passed_over else f"{path} holds no checkpoint yet")
    return max(whole, key=lambda found: found[0])[1], passed_over


# ---- a run that is under way -------------------------------------------------------------------------------


class RunDirectory:
    """Log, run.json, journal and checkpoints of one run. A context: leaving it by an error ends the run as failed.

    info goes into run.json. A new run needs a new directory. With resumed_at, an earlier run goes on behind that step:
    rows of later steps are dropped and later checkpoints set aside. If that run is in another directory, origin, its
    files stay as they are. A start that fails leaves nothing behind.
    """

    def __init__(self, path: str | os.PathLike, info: dict, config: TrainConfig, model: GPT2,
                 tokenizer: BPETokenizer, optimizer: AdamW, *, resumed_at: int | None = None, best_step: int = 0,
                 origin: Path | None = None) -> None:
        self.path, self.config = Path(path), config
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        origin = self.path if origin is None else Path(origin)
        self._in_place = resumed_at is not None and origin.resolve() == self.path.resolve()
        self._lock, self._log, self._steps = None, None, 0
        self._journal = Journal(self.path)
        try:
            if not self._in_place:
                require_new(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            self._journal.open()
            if resumed_at is not None:
                self._go_back(resumed_at, best_step, origin)
            if not (self.path / TOKENIZER).exists():
                tokenizer.save(self.path / TOKENIZER)
            self.writer = CheckpointWriter(config.keep_last)
            self._log = RunLog(self.path, info, self._lock.held)
            self.say(self._beginning(resumed_at))
        except OSError as error:
            self._give_up()
            raise failure(self.path, error) from error
        except BaseException:
            self._give_up()
            raise

    def _go_back(self, step: int, best_step: int, origin: Path) -> None:
        """Make the directory that of a run that has made `step` steps and no more."""
        disk.remove_partial(self.path)
        copy_rows(origin / LOG, self.path / LOG, step)
        for moved in set_aside_later(self.path, step):
            warnings.warn(f"the run goes on at step {step + 1}; a checkpoint of a later step is now {moved}",
                          stacklevel=4)
        restore_best(self.path, origin, best_step)

    def _beginning(self, resumed_at: int | None) -> str:
        known = self.info
        return (f"{'begins' if resumed_at is None else f'goes on behind step {resumed_at:,}'}: "
                f"{self.config.num_steps:,} steps are planned; feste {known.get('feste')}, process {known['pid']} on "
                f"{known['host']}, threads {known.get('threads')}, {known.get('isa')}, {self.config.precision}")

    def _give_up(self) -> None:
        """Let go of a directory in which no step was made; one that was made for it goes again."""
        ours = self._lock is not None and not self._in_place
        self._journal.close()
        if self._lock is not None:
            self._lock.release()
        if ours:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with suppress(OSError):
                self.path.rmdir()  # only if it is empty

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """The first error says what went wrong, so later ones are not shown."""
        if error is not None:
            self.writer.settle()
            with suppress(RunDirectoryError):
                self._log.close("failed", f"{kind.__name__}: {error}")
            self.say(f"failed: {kind.__name__}: {error}\n"
                     + "".join(tracebacks.format_exception(kind, error, traceback)), ERROR)
            if self._steps == 0:
                self._give_up()
        self._journal.close()
        self._lock.release()

    @property
    def info(self) -> dict:
        """What run.json will say when it is written next."""
        return self._log.info

    def write(self, record: dict) -> None:
        """Append the row of a step to the log."""
        self._log.write(record)
        self._steps += 1
        if self._steps == 1:  # the step has taken the memory that training needs; what is left may serve saving
            self.writer.reserve(self.model, self.optimizer)

    def say(self, words: str, kind: str = INFO) -> None:
        """An entry in the journal, of one of its KINDS."""
        self._journal.note(words, kind)

    def note(self, **facts) -> None:
        """Put facts into run.json now."""
        self._log.info |= facts
        try:
            self._log.describe()
        except OSError as error:
            raise failure(self.path, error) from error

    def save(self, names: list[str], state: dict, moments: Callable[[tuple | None], tuple]) -> None:
        """Write a checkpoint under all of these names, which stand for one and the same file, if there are any.

        state, moments: what `Snapshot` takes beside model, tokenizer and optimizer.
        """
        if not names:
            self.writer.check()
            return
        self._log.flush()  # rows first: a resumed run keeps the rows up to its checkpoint
        self.writer.save([self.path / name for name in names], self.model, self.tokenizer, self.optimizer,
                         moments=moments, **state)

    def end(self, state: str, reason: str | None, **facts) -> None:
        """Wait for the last checkpoint and write how the run ended; facts go into run.json."""
        self.writer.wait()
        self._log.info |= facts | {"checkpoint_saves": self.writer.saves,
                                   "checkpoint_held_up_seconds": self.writer.held_up_seconds}
        self._log.close(state, reason)
        self.say(state + (f" at step {facts['step']:,}" if "step" in facts else "") + (f": {reason}" if reason else ""))
        self._lock.release()


def due_names(step: int, *, periodical: bool, over: bool, stable: bool, improved: bool) -> list[str]:
    """The names of the checkpoints that a step leaves.

    over: it is the last step of the run. stable: it is the last one before the learning rate falls.
    """
    names = {periodic_name(step): periodical, FINAL: over, STABLE: stable, BEST: improved}
    return [name for name, due in names.items() if due]


class CheckpointWriter:
    """Writes checkpoints of one run in a background thread.

    `save` waits for the save before it, copies the state into `room`, and returns: the copy is what training waits for
    (`held_up_seconds`). Where no memory was reserved, or no thread is to be had, training waits for the whole save. An
    error in the thread is raised by the next save, check or wait.
    """

    def __init__(self, keep_last: int) -> None:
        self.keep_last = keep_last
        self.saves, self.held_up_seconds = 0, 0.0
        self._room: list[np.ndarray] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def reserve(self, model: GPT2, optimizer: AdamW | None) -> None:
        """Take the memory of the copy, which is kept from save to save: fresh memory costs more than the copy."""
        try:
            self._room = Snapshot.room_for(model, optimizer)
        except MemoryError as error:
            warnings.warn(f"no memory for a copy of the state ({error}): training waits for every checkpoint",
                          stacklevel=4)

    def save(self, paths: list[Path], model: GPT2, tokenizer: BPETokenizer | None, optimizer: AdamW | None,
             **state) -> None:
        """Write one state under all of these names; the first is the file, the others links to it.

        state: what else `Snapshot` takes.
        """
        begun = time.perf_counter()
        self.wait()
        snapshot = Snapshot(model, tokenizer, optimizer, room=self._room, **state)
        if self._room is None or not self._start(paths, snapshot):
            self._run(paths, snapshot)
            self.check()
        self.saves += 1
        self.held_up_seconds += time.perf_counter() - begun

    def _start(self, paths: list[Path], snapshot: Snapshot) -> bool:
        """Begin to write in the background; False if the process may not have another thread."""
        thread = threading.Thread(target=self._run, args=(paths, snapshot), name="feste-checkpoint")
        try:
            thread.start()
        except RuntimeError as error:
            warnings.warn(f"no thread for saving ({error}): training waits for every checkpoint", stacklevel=4)
            self._room = None
            return False
        self._thread = thread
        return True

    def _run(self, paths: list[Path], snapshot: Snapshot) -> None:
        try:
            write_as(paths, snapshot)
            retain(paths[0].parent, self.keep_last)
        except BaseException as error:  # handed to the training thread
            self._error = error

    def check(self) -> None:
        """Raise the error of a finished save, if there was one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Let the save under way come to its end, whatever that is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until the save under way is done; raises its error."""
        self.settle()
        self.check()


def write_as(paths: list[Path], snapshot: Snapshot) -> None:
    """Write a snapshot under the first name, and let the others stand for the same file. CheckpointError if not."""
    write(paths[0], snapshot)
    for path in paths[1:]:
        try:
            disk.second_name(paths[0], path)
        except OSError as error:
            raise cannot_write(path, error) from error


# ---- what is kept ------------------------------------------------------------------------------------------


def retain(directory: Path, keep_last: int) -> None:
    """Delete periodic checkpoints but the last few; those with other names stay."""
    for _, path in periodic(directory)[:-keep_last]:
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise CheckpointError(f"cannot delete the old checkpoint {path}: {error.strerror or error}; make the "
                                  "directory writable, or keep more checkpoints", "keep_last") from error


def set_aside_later(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps and those without a readable header; returns their new names.

    A run that goes back to `step` is a new history: a file of the old one must not count as the newest, nor
    push a new one out of the last few. Nothing is deleted.
    """
    moved = []
    for path in [*(directory / name for name in (FINAL, BEST, STABLE)), *(path for _, path in periodic(directory))]:
        if path.exists() and step_of(path) > step:
            names = (path.with_name(f"{path.name}{SET_ASIDE}{n or ''}") for n in itertools.count())
            moved.append(next(name for name in names if not name.exists()))
            os.replace(path, moved[-1])
    return moved


def restore_best(directory: Path, origin: Path, best_step: int) -> None:
    """Give a run that goes on without its best checkpoint that file again, if it is to be found.

    It was set aside, because a later step was better, or the run goes on in another directory than `origin`.
    """
    best = directory / BEST
    for source in (origin / BEST, origin / periodic_name(best_step)):
        if not best.exists() and source.exists() and step_of(source) == best_step:
            with disk.replacing(best) as partial:
                shutil.copyfile(source, partial)
