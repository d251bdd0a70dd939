"""The machine that feste runs on: its cores and memory, and what a container may use of them."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # control groups, version 2


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
             if line.startswith(("model name", "CPU part"))] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def host() -> str:
    """The name of this machine, as run.json has it."""
    return platform.node()


def visible_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """The CPUs whose time a container may use, on whichever cores; None without a limit."""
    quota, _, period = (_limit("cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def useful_threads() -> int:
    """The visible cores, or what the quota has time for: more threads than that wait for each other."""
    quota = cpu_quota()
    return visible_cores() if quota is None else min(visible_cores(), max(1, math.ceil(quota)))


def memory() -> tuple[int, int] | None:
    """Bytes of memory: all that this machine or its container has, and what is free. None if that cannot be told."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        whole, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):
        return None
    limit = _limit("memory.max")
    if limit in (None, "max"):
        return whole, free
    return min(whole, int(limit)), min(free, int(limit) - int(_limit("memory.current") or 0))


def _limit(name: str) -> str | None:
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return None
