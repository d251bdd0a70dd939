"""Whether MPI started this process, as far as can be told without MPI."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

# What launchers tell a process: MPICH and Intel MPI, Open MPI, and Slurm through PMIx, which does not tell how many.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MPI_LOCALRANKID")


def launched() -> bool:
    """Whether a launcher of MPI started this process beside others, or the program uses MPI already."""
    sizes = [os.environ[name] for name in SIZES if name in os.environ]
    if not sizes and "PMIX_RANK" in os.environ:
        sizes = [os.environ.get("SLURM_STEP_NUM_TASKS", "several")]
    return any(size != "1" for size in sizes) or "mpi4py.MPI" in sys.modules


def may_speak() -> bool:
    """Whether this process is the first rank, or alone."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """Nothing is printed within by any rank but the first: what all have to say is said once."""
    with ExitStack() as stack:
        if launched() and not may_speak():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def give_up(line: str, code: int) -> None:
    """End the program, and the whole job, before the ranks have come together: the others would wait for this one."""
    print(line, file=sys.stderr, flush=True)
    if launched():
        try:
            from mpi4py import MPI
            MPI.COMM_WORLD.Abort(code)
        except ImportError:
            pass
    sys.exit(code)
