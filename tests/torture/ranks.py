"""Training on several ranks: what starts it, and SIGKILL for one of them at random moments."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from feste.run.follow import read_info
from feste.run.names import FINAL

from .process import ENVIRONMENT, ROOT, arguments
from .tiny import Tally, differences, history

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
MISSING = None if MPIEXEC and find_spec("mpi4py") else "mpi4py or mpiexec is missing: pip install 'feste[mpi]'"
# Open MPI minds root, and more ranks than cores.
MPI_ENVIRONMENT = ENVIRONMENT | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                                 "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
LONGEST_END = 10.0  # seconds from a kill to the end of the job


def mpiexec(ranks: int, argv: list[str], *program: str) -> list[str]:
    """A command that trains on so many ranks; program: what to run instead of `feste train`."""
    return [MPIEXEC, "-n", str(ranks), sys.executable, *(program or ("-m", "feste", "train")), *argv]


def run_ranks(ranks: int, argv: list[str], *program: str, timeout: float = 120.0) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a job."""
    done = subprocess.run(mpiexec(ranks, argv, *program), capture_output=True, text=True, env=MPI_ENVIRONMENT, cwd=ROOT,
                          timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def rank_kills(folder: Path, count: int, seed: int = 0) -> Tally:
    """Kill a random rank at a random moment, go on with another number of them; at last compare with a run in peace."""
    tally, rng = Tally("SIGKILL of a rank", detected=None), random.Random(seed)
    run_dir, whole, settings = folder / "ranks", folder / "peace", {"accumulation": 4, "batch_size": 1}
    ranks, steps, slowest = 4, 400, 0.0
    new = arguments(folder, run_dir, num_steps=steps, **settings)
    while tally.tried < count:
        begun = run_dir.exists() and any(run_dir.glob("*.bin"))
        if not begun:
            shutil.rmtree(run_dir, ignore_errors=True)
        seconds = _kill_one(mpiexec(ranks, ["--resume", str(run_dir)] if begun else new), run_dir, rng)
        if seconds is None or (run_dir / FINAL).exists():  # the run came to its end first
            tally.note += _unlike(run_dir, whole, folder, steps, settings)
            shutil.rmtree(run_dir)
            continue
        slowest = max(slowest, seconds)
        tally.tried += 1
        hung = seconds > LONGEST_END
        tally.lost += hung
        tally.survived += not hung
        ranks = rng.choice([other for other in (1, 2, 4) if other != ranks])
    if run_dir.exists():
        subprocess.run(mpiexec(ranks, ["--resume", str(run_dir)]), env=MPI_ENVIRONMENT, cwd=ROOT, capture_output=True,
                       check=True, timeout=300)
        tally.note += _unlike(run_dir, whole, folder, steps, settings)
    tally.lost += bool(tally.note)
    tally.note = tally.note or ("resumed on another number of ranks each time, the run equals one in peace to the bit; "
                                f"the job ended at most {slowest:.1f} s after a kill")
    return tally


def _kill_one(command: list[str], run_dir: Path, rng: random.Random) -> float | None:
    """Start a job, kill one of its ranks, and return the seconds until the job has ended; None if it ended before."""
    earlier = read_info(run_dir).get("started")
    process = subprocess.Popen(command, env=MPI_ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    info: dict = {}
    while process.poll() is None and (not info or info.get("started") == earlier):
        time.sleep(0.02)
        info = read_info(run_dir)
    time.sleep(rng.uniform(0.0, 1.0))
    pids = [rank["pid"] for rank in info.get("ranks", [])] or [info.get("pid")]
    try:
        if process.poll() is not None:
            return None
        os.kill(rng.choice(pids), signal.SIGKILL)
    except ProcessLookupError:
        process.wait(timeout=60)
        return None
    begun = time.monotonic()
    try:
        process.wait(timeout=3 * LONGEST_END)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return time.monotonic() - begun


def _unlike(run_dir: Path, whole: Path, folder: Path, steps: int, settings: dict) -> str:
    """What the run does not have in common with one of a single process that was left alone."""
    if not whole.exists():
        code, out, err = run_ranks(1, arguments(folder, whole, num_steps=steps, **settings))
        assert code == 0, err or out
    unlike = differences(run_dir / FINAL, whole / FINAL)
    if history(run_dir) != history(whole):
        unlike.append("log")
    return f"{', '.join(unlike)} differ from the run in peace; " if unlike else ""
