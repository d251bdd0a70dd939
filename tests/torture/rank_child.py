"""`feste train` on several ranks with one fault: rank_child.py FAULT FLAGS..."""

import errno
import sys

from mpi4py import MPI

import feste.cli as cli
from feste.model import GPT2
from feste.run import checkpoint

fault, *argv = sys.argv[1:]
rank, calls, real = MPI.COMM_WORLD.rank, [0], GPT2.forward_backward


def forward_backward(self, *args, **kwargs):
    """The real one, but rank 1 fails in its fifth mini-batch, which belongs to step 3."""
    calls[0] += 1
    if rank == 1 and calls[0] == 5:
        if fault == "memory":
            raise MemoryError("no room for a mini-batch")
        if fault == "defect":
            raise RuntimeError("a defect")
        if fault == "nan":
            return real(self, *args, **kwargs) * float("nan")
    return real(self, *args, **kwargs)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


GPT2.forward_backward = forward_backward
if fault == "disk" and rank == 0:
    checkpoint.save_file = no_space
sys.exit(cli.main(argv))
