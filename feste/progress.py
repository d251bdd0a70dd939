"""What a training script shows while it runs: a bar on a terminal, plain lines in a pipe or a notebook."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from feste.config import TrainConfig
from feste.terminal import clean

REFRESH_SECONDS = 0.1
LINE_SECONDS = 10.0


def discard_output() -> None:
    """From now on standard output goes nowhere: whoever read it has gone."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # a notebook's standard output is no file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def draws_a_bar() -> bool:
    """Whether standard output is a terminal that can go back in a line; TERM=dumb says that it cannot."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def _outlived() -> Iterator[None]:
    try:
        yield
    except OSError:
        discard_output()


class Progress:
    """Called with the record of every step. A pipe or terminal that is closed ends the display and not the run."""

    def __init__(self, config: TrainConfig, start: int = 0) -> None:
        self._validation, self._shown = "", 0.0
        self._console, self._bar = Console(), None
        if draws_a_bar():
            self._bar = RichProgress(
                BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
                TextColumn("left"), console=self._console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task("train", total=config.num_steps, completed=start, loss="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._console.show_cursor()  # a process that is killed cannot do it
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            with _outlived():
                self._bar.refresh()
                self._bar.stop()

    def __call__(self, record: dict) -> None:
        with _outlived():
            self._show(record)

    def _show(self, record: dict) -> None:
        if "val_loss" in record:
            bits = record.get("val_bits_per_byte")
            self._validation = f"  val {record['val_loss']:.4f}" + (f" ({bits:.3f} bits/byte)" if bits else "")
        now, interval = time.monotonic(), REFRESH_SECONDS if self._bar else LINE_SECONDS
        if now - self._shown < interval and not record.keys() & {"val_loss", "sample"}:
            return
        self._shown = now
        text = f"loss {record['train_loss']:.4f}{self._validation}  {record['tokens_per_second']:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], loss=text, refresh=True)
        else:
            print(f"step {record['step']}  {text}  lr {record['learning_rate']:.3g}", flush=True)
        if "sample" in record:
            lines = [f"sample of step {record['step']}:", *clean(record["sample"]).splitlines()]
            self._console.print(Text("\n  ".join(lines), "dim"), soft_wrap=self._bar is None)
