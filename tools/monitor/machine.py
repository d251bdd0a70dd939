"""The machine that is watched from: how busy each core is, its memory, and what of it a run uses."""

from __future__ import annotations

import os
from pathlib import Path

from rich.text import Text

from feste import machine
from feste import terminal as text

from . import colours

LEVELS = " ▁▂▃▄▅▆▇█"
SECONDS = 2.0  # between looks
STAT, UPTIME_FIELDS = Path("/proc/stat"), 8  # user, nice, system, idle, iowait, irq, softirq, steal


class Cores:
    """How busy each core was between the last two looks, from the kernel's counters."""

    def __init__(self) -> None:
        self._before: list[tuple[int, int, int]] = []
        self.busy: list[float] = []
        self.stolen = 0.0  # the share that other guests of the same machine took
        self.look()

    def look(self) -> None:
        """Read the counters; where there are none, nothing is known."""
        try:
            lines = [line.split() for line in STAT.read_text().splitlines() if line.startswith("cpu")]
        except OSError:
            return
        now = []
        for _, *fields in lines[1:]:
            ticks = [int(field) for field in fields[:UPTIME_FIELDS]]
            now.append((sum(ticks), ticks[3] + ticks[4], ticks[7] if len(ticks) > 7 else 0))
        if len(now) == len(self._before):
            passed = [max(1, a[0] - b[0]) for a, b in zip(now, self._before, strict=True)]
            self.busy = [1.0 - (a[1] - b[1]) / t for a, b, t in zip(now, self._before, passed, strict=True)]
            self.stolen = sum(a[2] - b[2] for a, b in zip(now, self._before, strict=True)) / sum(passed)
        self._before = now


def describe(cores: Cores, info: dict, tokens_per_second: float | None) -> Text:
    """Cores as bars, load, memory, the run's saves and its share of the peak, and what is wrong."""
    made = Text("machine ", "dim", no_wrap=True)
    if cores.busy:
        full = len(LEVELS) - 1
        bars = "".join(LEVELS[round(min(1.0, max(0.0, busy)) * full)] for busy in cores.busy)
        made.append(bars, colours.palette.runs[0])
        made.append(f" {sum(cores.busy) / len(cores.busy):.0%} of {len(cores.busy)} cores")
    if hasattr(os, "getloadavg"):
        made.append(f"  load {os.getloadavg()[0]:.1f}")
    memory = machine.memory()
    if memory is not None:
        whole, free = memory
        made.append(f"  memory {(whole - free) / 1e9:.1f} of {whole / 1e9:.1f} GB")
    saves, held_up = info.get("checkpoint_saves"), info.get("checkpoint_held_up_seconds")
    if isinstance(saves, int) and isinstance(held_up, (int, float)):
        made.append(f"  {saves} save{'s' * (saves != 1)}, waited {text.duration(held_up)}")
    share = share_of_peak(info, tokens_per_second)
    if share is not None:
        made.append(f"  {share:.0%} of the peak")
    for warning in warnings(cores, info):
        made.append(f"  ! {warning}", f"bold {colours.palette.warning}")
    return made


def share_of_peak(info: dict, tokens_per_second: float | None) -> float | None:
    """What a run makes of what its machine could do when it began; None where run.json does not tell."""
    flops, peak, ranks = info.get("flops_per_token"), info.get("peak_flops"), info.get("ranks")
    if tokens_per_second is None or not all(isinstance(value, float) and value > 0 for value in (flops, peak)):
        return None
    return tokens_per_second * flops / (peak * (len(ranks) if isinstance(ranks, list) and ranks else 1))


def warnings(cores: Cores, info: dict) -> list[str]:
    """What slows a run of this machine down."""
    if info.get("host") != machine.host() or info.get("state") != "running":
        return []
    found, threads, useful = [], info.get("threads"), machine.useful_threads()
    if isinstance(threads, int) and threads > useful:
        found.append(f"{threads} threads share {useful} cores")
    if os.getloadavg()[0] > 1.5 * useful if hasattr(os, "getloadavg") else False:
        found.append("other programs want the cores too")
    if cores.stolen > 0.1:
        found.append(f"{cores.stolen:.0%} of the time goes to other guests of this machine")
    return found
