"""The process that trains, and what goes wrong in it. Started by process.py with an order in JSON."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import sys
import threading
from pathlib import Path

from feste import GPT2, AdamW, BPETokenizer, cli, disk, progress, trainer
from feste.run import checkpoint


def child(order: dict) -> int:
    """Train as the examples do, one line a step, with a fault in the middle.

    phase: where it comes, at: in the how manieth call of that phase; signals: those the process sends itself;
    vanish: a directory to move away; largest: bytes a file may have, which stands for a full disk. ignored: signals
    that are ignored from the start; lacks: what the surroundings lack, see `_without`; spare: bytes of memory that the
    process may take after its first step.
    """
    progress.LINE_SECONDS, cli.SAMPLE_TOKENS = 0.0, 8
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits an ignored one
    for number in order.get("ignored", ()):
        signal.signal(number, signal.SIG_IGN)
    for name, error in order.get("lacks", {}).items():
        _without(name, error)
    if "spare" in order:
        _limit_memory_after_a_step(order["spare"])
    if "largest" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
    if "phase" in order:
        _disturb(order)
    return cli.run_preset("tiny", order["argv"])


def _without(name: str, error: int) -> None:
    """A file system or a machine that lacks something: flock, link, fsync (of directories), thread."""
    def lacking(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    if name == "flock":
        disk.fcntl.flock = lacking
    elif name == "link":
        os.link = lacking
    elif name == "fsync":
        fsync = os.fsync
        os.fsync = lambda fd: lacking() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd)
    elif name == "thread":
        start = threading.Thread.start

        def refused(thread):
            if thread.name == "feste-checkpoint":
                raise RuntimeError("can't start new thread")
            start(thread)
        threading.Thread.start = refused


def _limit_memory_after_a_step(spare: int) -> None:
    """The process may take `spare` more bytes than it has when its first update is done."""
    original = AdamW.step

    def step(*args, **kwargs):
        norm = original(*args, **kwargs)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if AdamW.step is step:
            AdamW.step = original
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, resource.RLIM_INFINITY))
        return norm
    AdamW.step = step


def _disturb(order: dict) -> None:
    owner, name = {
        "tokenizing": (BPETokenizer, "train"), "step": (GPT2, "forward_backward"),
        "validation": (trainer, "mean_loss"), "sampling": (trainer, "_sample"),
        "saving": (checkpoint, "save_file"), "ending": (cli, "mean_loss"),
    }[order["phase"]]
    original, calls = getattr(owner, name), 0

    def disturbed(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == order.get("at", 1):
            for number in order.get("signals", ()):
                os.kill(os.getpid(), number)
            if "vanish" in order:
                os.rename(order["vanish"], order["vanish"] + ".elsewhere")  # at once: the writer may be at work in it
        return original(*args, **kwargs)

    setattr(owner, name, staticmethod(disturbed) if name == "train" else disturbed)


if __name__ == "__main__":
    sys.exit(child(json.loads(sys.argv[1])))
