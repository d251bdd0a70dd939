"""SIGKILL at random moments, and system calls that fail while a checkpoint is saved."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from feste import GPT2, AdamW, Checkpoint, find_checkpoint, read_rows
from feste.run import checkpoint, directory
from feste.run.checkpoint import CheckpointError, verify

from .process import arguments, start
from .tiny import CONFIG, INTERVAL, Tally, differences, history, save_example, tokenizer, train

# ---- SIGKILL -----------------------------------------------------------------------------------------------


def kills(folder: Path, count: int, seed: int = 0) -> Tally:
    """Kill a run at random moments, resume it, kill it again; then compare it with a run that was left alone."""
    tally, rng, run_dir = Tally("SIGKILL at a random moment", detected=None), random.Random(seed), folder / "killed"
    step, worst, steps = 0, 0, 400_000  # more than can be made between so many kills
    for _ in range(count):
        if step == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
        argv = ["--resume", str(run_dir)] if step else arguments(folder, run_dir, num_steps=steps)
        told = _kill_one(argv, rng)
        tally.tried += 1
        step, problem = _after_kill(run_dir, step, told)
        worst = max(worst, told - step)
        if problem:
            tally.lost += 1
            tally.note += f"{problem}; "
        else:
            tally.survived += 1
    unlike = _unlike_uninterrupted(folder, run_dir, step, steps) if step else ["no checkpoint"]
    tally.lost += bool(unlike)
    tally.note += (f"{', '.join(unlike)} differ from the uninterrupted run" if unlike else
                   f"step {step} equals the uninterrupted run to the bit; at most {worst} steps to repeat, "
                   f"one checkpoint every {INTERVAL}")
    return tally


def _kill_one(argv: list[str], rng: random.Random) -> int:
    """Start, kill, and return the last step the process told of (0: none)."""
    lines = []
    with start(argv) as process:
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.0, 0.6))  # perhaps before the first step
        else:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("step "):
                    break
            time.sleep(rng.uniform(0.0, 0.25))
        ended = process.poll()
        process.kill()
        lines += process.stdout  # not communicate(), which would miss what was read ahead
        err = process.stderr.read()
    if ended is not None:
        raise AssertionError(f"the run ended by itself with {ended}: {err or lines}")
    told = [line for line in lines if line.startswith("step ") and line.endswith("\n")]
    return int(told[-1].split()[1]) if told else 0


def _after_kill(run_dir: Path, before: int, told: int) -> tuple[int, str]:
    """The step a resumed run would go on from, and what is wrong with the directory, if anything.

    A save begins at every INTERVAL and waits for the one before it, so what is whole is less than two intervals old.
    """
    damaged = []
    for path in run_dir.glob("*.bin"):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        return before, damaged[0]
    try:
        step = Checkpoint.load(find_checkpoint(run_dir)[0]).step
    except CheckpointError as error:
        return 0, "" if before == 0 and told < 2 * INTERVAL else str(error)
    rows = [row["step"] for row in read_rows(run_dir)]
    if step < before or step <= told - 2 * INTERVAL:
        return step, f"step {told} was made and only {step} is kept"
    if rows[:step] != list(range(1, step + 1)):
        return step, f"the log does not reach the checkpoint of step {step}"
    return step, ""


class _Enough(Exception):
    pass


def _unlike_uninterrupted(folder: Path, run_dir: Path, step: int, steps: int) -> list[str]:
    def stop(record: dict) -> None:
        if record["step"] == step:
            raise _Enough

    whole = folder / "uninterrupted"
    with suppress(_Enough):
        train(whole, num_steps=steps, checkpoint_interval=step, on_step=stop)
    unlike = differences(whole / f"checkpoint_step_{step}.bin", find_checkpoint(run_dir)[0])
    return unlike + ["rows"] * (history(whole, step) != history(run_dir, step))


# ---- system calls that fail --------------------------------------------------------------------------------


@contextmanager
def failing_call(name: str, n: int, error: int) -> Iterator[list[bool]]:
    """The n-th call of os.NAME, or of the library that writes a checkpoint (save_file), fails with an error number.

    The library leaves half a file. Yields a list that tells if it came to it.
    """
    owner = checkpoint if name == "save_file" else os
    original, calls, came = getattr(owner, name), 0, []

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != n:
            return original(*args, **kwargs)
        came.append(True)
        if name != "save_file":
            raise OSError(error, os.strerror(error))
        original(*args, **kwargs)
        os.truncate(args[1], os.path.getsize(args[1]) // 2)
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(error)} (os error {error})")

    setattr(owner, name, call)
    try:
        yield came
    finally:
        setattr(owner, name, original)


def failing_calls(folder: Path) -> list[Tally]:
    """The n-th write, fsync, link, rename, change of mode and opening of a directory of a save fails, for every n."""
    return [_failing(folder, name, error) for name in ("save_file", "chmod", "fsync", "link", "replace", "open")
            for error in (errno.EIO, errno.ENOSPC)]


def _failing(folder: Path, name: str, error: int) -> Tally:
    tally = Tally(f"n-th {name} of a save fails with {errno.errorcode[error]}")
    new_state = GPT2(CONFIG, seed=2)
    optimizer = AdamW(new_state)
    for n in range(1, 1000):
        run_dir = Path(tempfile.mkdtemp(dir=folder))
        save_example(run_dir / "checkpoint_step_1.bin", 1)
        shutil.copy(run_dir / "checkpoint_step_1.bin", run_dir / "checkpoint_best.bin")
        message = ""
        with failing_call(name, n, error) as came:
            try:
                directory.write_as([run_dir / "checkpoint_step_2.bin", run_dir / "checkpoint_best.bin"],
                                   checkpoint.Snapshot(new_state, tokenizer(), optimizer, step=2))
            except CheckpointError as failure:
                message = str(failure)
        if not came:
            return tally
        tally.tried += 1
        named = "checkpoint_" in message and os.strerror(error) in message
        whole = {path.name: verify(path) for path in run_dir.iterdir()}  # raises for a torn one and for leftovers
        ok = whole["checkpoint_step_1.bin"] == 1 and whole["checkpoint_best.bin"] in (1, 2)
        tally.survived += ok
        tally.detected += named
        tally.lost += not (ok and named)
        shutil.rmtree(run_dir)
    raise AssertionError("a save makes no thousand calls")
