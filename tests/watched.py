"""Runs for the monitor to look at, and the monitor in a test."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path

from feste.run import log as run_log
from feste.run.names import COLUMNS, INFO, LOG
from feste.run.rows import record_of
from tools.monitor.app import Monitor
from tools.monitor.runs import Watch


def rows(n: int, first: int = 1, loss: float = 6.0) -> list[dict]:
    """A loss that falls, a validation every 5 steps and a sample every 10."""
    made = []
    for step in range(first, first + n):
        row = {"step": step, "timestamp": f"{step}.000", "elapsed_seconds": 0.5 * step, "learning_rate": 3e-4,
               "train_loss": loss / step ** 0.3, "train_perplexity": 2.0, "grad_norm": 1.5, "tokens_per_second": 4096.0}
        if step % 5 == 0:
            row["val_loss"] = loss / step ** 0.3 + 0.1
        if step % 10 == 0:
            row["sample"] = f"To be sample of step {step}\n" + "line\n" * 60
        made.append(row)
    return made


def csv_rows(records: list[dict], header=COLUMNS) -> list[list[str]]:
    return [[run_log._cell(r.get(name)) for name in header] for r in records]


def make_run(path: Path, records: list[dict], info: dict | None = None, header=COLUMNS) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOG, "w", encoding="utf-8", newline="") as file:
        file.writelines(map(record_of, [header, *csv_rows(records, header)]))
    if info is not None:
        (path / INFO).write_text(json.dumps(info))
    return path


def info(state: str = "running", **more) -> dict:
    return {"state": state, "host": "elsewhere", "planned_steps": 400, "started": "2026-01-01T00:00:00+00:00",
            "model": {"vocab_size": 512}, "train": {"sample_prompt": "To be"}, "parameters": 169_728} | more


def append(path: Path, records: list[dict]) -> None:
    with open(path / LOG, "a", encoding="utf-8", newline="") as file:
        file.writelines(map(record_of, csv_rows(records)))


def screen_text(app: Monitor) -> str:
    """The characters of the screen, from its picture; a cell is 12.2 units wide."""
    lines: dict[float, list[str]] = {}
    for x, y, words in re.findall(r'<text class="[^"]*-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>',
                                  app.export_screenshot()):
        line = lines.setdefault(float(y), [" "] * app.size.width)
        column, words = round(float(x) / 12.2), html.unescape(words).replace("\xa0", " ").rstrip("\n")
        line[column:column + len(words)] = words
    return "\n".join("".join(lines[y]) for y in sorted(lines))


async def until(pilot, condition) -> None:
    """Wait for what the polling thread brings; long, for the machine may be slow and shared."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        await pilot.pause(0.02)
        if condition():
            return
    raise AssertionError(f"it did not come about; the screen shows\n{screen_text(pilot.app)}")


class Shown:
    """A monitor of some paths, once it has read them."""

    def __init__(self, *paths: Path, size=(80, 34), ready=None) -> None:
        self.app = Monitor(Watch(list(paths)))
        self._context = self.app.run_test(size=size)
        self._ready = ready or (lambda: self.app.selected is not None)

    async def __aenter__(self):
        self.pilot = await self._context.__aenter__()
        await until(self.pilot, self._ready)
        await self.pilot.pause()
        return self.app, self.pilot

    async def __aexit__(self, *error) -> None:
        await self._context.__aexit__(*error)
