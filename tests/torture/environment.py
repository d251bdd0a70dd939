"""Signals, and what a file system, the memory or the process table refuses."""

from __future__ import annotations

import errno
import signal
import subprocess
from pathlib import Path

from feste import read_info
from feste.run.checkpoint import verify
from feste.run.names import FINAL

from .process import ENVIRONMENT, arguments, command, is_whole, run
from .tiny import Tally

# ---- signals -----------------------------------------------------------------------------------------------

PHASES = {"step": 7, "validation": 2, "sampling": 2, "saving": 2}  # phase -> in which of its calls


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def signals(folder: Path, numbers=STOPPING) -> Tally:
    """One signal in each phase: saved at a step boundary, exit 128 + n; resumed, the run is the uninterrupted one."""
    tally = Tally("signal in a phase of training", detected=0)
    for phase, at in PHASES.items():
        for number in numbers:
            run_dir = folder / f"{phase}_{int(number)}"
            code, _, _ = run(arguments(folder, run_dir), phase=phase, at=at, signals=[number])
            info = read_info(run_dir)
            stopped = (code == 128 + number and info.get("state") == "interrupted"
                       and info.get("reason") == signal.Signals(number).name)
            code, _, err = run(["--resume", str(run_dir)])
            same = code == 0 and is_whole(folder, run_dir)
            tally.tried += 1
            tally.detected += stopped
            tally.survived += same
            tally.lost += not (stopped and same)
            tally.note += "" if stopped and same else f"{phase} {number}: {err.strip()[-80:]}; "
    tally.note = tally.note or "exit 128 + signal; resumed, each equals the uninterrupted run to the bit"
    return tally


# ---- surroundings ------------------------------------------------------------------------------------------

WIDE = {"n_embd": 512, "n_layers": 4, "num_steps": 3}  # a model whose copy takes 150 MB
SURROUNDINGS = {  # what is lacking or sent -> the order to the process, and what it says about it in one line
    "file system without flock": ({"lacks": {"flock": errno.ENOSYS}}, "has no locks"),
    "file system out of locks": ({"lacks": {"flock": errno.ENOLCK}}, "has no locks"),
    "directories cannot be flushed": ({"lacks": {"fsync": errno.EINVAL}}, "cannot flush a directory"),
    "file system without hard links": ({"lacks": {"link": errno.EPERM}}, None),
    "none of the three": ({"lacks": {"flock": errno.ENOSYS, "fsync": errno.EINVAL, "link": errno.ENOSYS}}, "has no"),
    "no thread for saving": ({"lacks": {"thread": 0}}, "training waits for every checkpoint"),
    "no memory for the snapshot": ({"spare": 20 << 20}, "training waits for every checkpoint"),
    "signals that are ignored at the start": (
        {"ignored": [signal.SIGINT, signal.SIGHUP], "phase": "step", "at": 7,
         "signals": [signal.SIGINT, signal.SIGHUP]}, None),
}


def surroundings(folder: Path, names=tuple(SURROUNDINGS)) -> list[Tally]:
    """Each is no reason to fail: the run ends as the one that was left alone, with one line on what is lost by it."""
    return [_in_surroundings(folder, name, *SURROUNDINGS[name]) for name in names]


def _in_surroundings(folder: Path, name: str, order: dict, said: str | None) -> Tally:
    tally, run_dir = Tally(name, tried=1), folder / name.replace(" ", "_")
    settings = WIDE if "spare" in order else {}
    code, out, err = run(arguments(folder, run_dir, **settings), **order)
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    tally.detected = int(not err and (any(said in note for note in notes) if said else not notes))
    if code == 0:
        tally.survived = int(verify(run_dir / FINAL) == 3 if settings else is_whole(folder, run_dir))
    tally.lost = int(not (tally.survived and tally.detected))
    said_in_all = "; ".join(note.removeprefix("note: ") for note in notes).replace(f"{folder}/", "")
    tally.note = err.strip()[-150:] if tally.lost else said_in_all
    return tally


def simultaneous(folder: Path, count: int = 4) -> Tally:
    """Runs started at the same instant, without a name of their own for the directory."""
    tally = Tally("runs started in the same second", detected=None)
    data = arguments(folder, folder / "unused")
    at = data.index("--run-dir")
    argv = [*data[:at], *data[at + 2:]]
    place = folder / "simultaneous"
    place.mkdir()
    started = [subprocess.Popen(command(argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=ENVIRONMENT, cwd=place) for _ in range(count)]
    said = [process.communicate(timeout=120)[0] for process in started]
    tally.tried, whole = count, [run_dir for run_dir in (place / "data").iterdir() if is_whole(folder, run_dir)]
    tally.survived, tally.lost = len(whole), count - len(whole)
    tally.note = "; ".join(text.strip()[-100:] for text, process in zip(said, started, strict=True)
                           if process.returncode) or f"{len(whole)} directories"
    return tally
