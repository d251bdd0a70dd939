"""Files that are replaced whole, and a lock that ends with its process.

What a file system lacks is not a failure of the write: without locks or without a flush of directories feste says
once what that costs, and goes on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

PARTIAL = ".partial"  # suffix of a file that is still being written
LACKING = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
IN_USE = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
LOCK_SECONDS = 0.5    # a reader that looks whether a lock is held holds it for an instant itself


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def advice(error: OSError) -> str:
    """What to do about an error of the file system, in a few words; stands behind a semicolon."""
    return {
        errno.ENOSPC: "free some disk space", errno.EDQUOT: "free some of the disk quota",
        errno.EFBIG: "raise the limit of file size, or choose another file system",
        errno.ENAMETOOLONG: "choose a shorter name", errno.EROFS: "choose a place that can be written",
        errno.EACCES: "choose a place you may write to", errno.EPERM: "choose a place you may write to",
        errno.ENOENT: "see that the directory is still there", errno.ENOTDIR: "choose a path without a file in it",
        errno.EMFILE: "raise the limit of open files", errno.EIO: "see to the device, which reports a fault",
        errno.ESTALE: "see to the network file system, which lost the file",
    }.get(error.errno, "choose another place")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`. At the end of the block the file there takes the place of `path`.

    At every instant `path` is the old file or the new one, whole. If the block raises, the old one stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text, in UTF-8 and with its line ends as they are."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: dict) -> None:
    """Replace a file by one that holds this JSON."""
    write_text(path, json.dumps(value, indent=1))


def second_name(source: Path, path: Path) -> None:
    """Let `path` stand for the same content as `source`: a link, or a copy where the file system has none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with replacing(path) as temporary:
            shutil.copyfile(source, temporary)
        return
    try:
        os.replace(temporary, path)  # does nothing if both are links to one file already
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    """Without this a rename may be lost with the power. Windows has no such call."""
    if os.name == "nt":
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        _say_once(f"the file system of {directory} cannot flush a directory ({error.strerror}): files are whole, but "
                  "after a power cut the last save may be missing")
    finally:
        os.close(fd)


def remove_partial(directory: Path) -> None:
    """Delete what a killed writer left behind: our temporary names, and those of the safetensors library."""
    for pattern in (f"*{PARTIAL}", f".*{PARTIAL}", ".tmp??????"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


class Held(Exception):
    """Another process holds the lock."""


class Lock:
    """An exclusive lock on a file, which is made if need be. It ends with the process, however that ends.

    `held` is False where the file system has no locks: a warning says so, and nothing keeps a second process out.
    Raises Held if another process has it.
    """

    def __init__(self, path: Path) -> None:
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.held = _lock_within(self._fd, LOCK_SECONDS)
        except BaseException:
            self.release()
            raise
        if not self.held:
            _say_once(f"the file system of {path.parent} has no locks: nothing keeps a second process out of it")

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock; None if that cannot be told."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        return False if _lock_within(fd, 0.0) else None
    except Held:
        return True
    finally:
        os.close(fd)


def _lock_within(fd: int, seconds: float) -> bool:
    """Lock an open file, trying for some seconds; False if the file system has no locks. Raises Held."""
    until = time.monotonic() + seconds
    while True:
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            return True
        except OSError as error:
            if error.errno in LACKING:
                return False
            if error.errno not in IN_USE:
                raise
        if time.monotonic() >= until:
            raise Held
        time.sleep(0.02)
