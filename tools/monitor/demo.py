"""Made-up runs in a temporary folder: one goes on as long as the demonstration lasts, the others are over."""

from __future__ import annotations

import math
import os
import random
import tempfile
import threading
import time
from pathlib import Path

from feste.evaluation import perplexity
from feste.run.log import RunLog
from feste.run.names import LOCK, LOG

VOCABULARY, FLOOR = 1536, 1.35
STEPS, FIRST_ROWS, STEPS_PER_SECOND = 4000, 900, 20.0
VERSE = ("To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\nThe slings and "
         "arrows of outrageous fortune,\nOr to take arms against a sea of troubles\nAnd by opposing end them.\n")
LETTERS = "aehilnorstu ,\n'"


class Demo:
    """A context whose value is the folder of the runs."""

    def __enter__(self) -> Path:
        self._folder = tempfile.TemporaryDirectory(prefix="feste_demo_")
        folder = Path(self._folder.name)
        _past(folder / "demo_small", seed=1, steps=2000, rows=2000, floor=1.9, state="finished")
        _past(folder / "demo_hot_learning_rate", seed=2, steps=2000, rows=640, floor=2.6, state="failed",
              reason="TrainingDiverged: step 641: the loss is nan")
        _past(folder / "demo_killed", seed=3, steps=3000, rows=1500, floor=1.6, state="running")
        self._stop = threading.Event()
        self._log = _open(folder / "demo_medium", STEPS)
        self._rows = _Rows(4, STEPS, FLOOR)
        for _ in range(FIRST_ROWS):
            self._log.write(self._rows.next())
        self._log.flush()
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        return folder

    def _train(self) -> None:
        while self._rows.step < STEPS and not self._stop.wait(1 / STEPS_PER_SECOND):
            self._log.write(self._rows.next())

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        self._log.close("interrupted")
        self._folder.cleanup()


def _open(path: Path, steps: int) -> RunLog:
    path.mkdir()
    return RunLog(path, {"planned_steps": steps, "parameters": 4_011_520, "model": {"vocab_size": VOCABULARY},
                         "train": {"sample_prompt": "To be"}, "tokens_per_step": 2048}, locked=True)


def _past(path: Path, seed: int, steps: int, rows: int, floor: float, state: str, reason: str | None = None) -> None:
    log, made = _open(path, steps), _Rows(seed, steps, floor)
    for _ in range(rows):
        log.write(made.next())
    if state == "failed":
        log.write(made.next() | {"train_loss": math.nan, "train_perplexity": math.nan, "grad_norm": math.inf})
    log.close(state, reason)
    if state == "running":  # a lock that nobody holds, and a log that has long been quiet: it was killed
        (path / LOCK).touch()
        os.utime(path / LOG, (time.time() - 3600,) * 2)


class _Rows:
    """Rows such as training writes, without the training."""

    def __init__(self, seed: int, steps: int, floor: float) -> None:
        self._random, self._steps, self._floor, self.step = random.Random(seed), steps, floor, 0

    def next(self) -> dict:
        self.step += 1
        s, gauss = self.step, self._random.gauss
        mean = self._floor + (math.log(VOCABULARY) - self._floor) * (1 + s / 60) ** -0.7
        loss = mean + 0.06 * gauss(0, 1)
        warm = min(1.0, 10 * s / self._steps)
        row = {"step": s, "timestamp": f"{time.time():.3f}", "elapsed_seconds": s / STEPS_PER_SECOND,
               "learning_rate": 3e-4 * warm * (0.55 + 0.45 * math.cos(math.pi * s / self._steps)),
               "train_loss": loss, "train_perplexity": perplexity(loss),
               "grad_norm": 0.8 + 0.1 * gauss(0, 1) + 2 / s, "tokens_per_second": 41_000 + 900 * gauss(0, 1)}
        if s % 50 == 0:
            val = mean + 0.08 + 0.15 * s / self._steps + 0.015 * gauss(0, 1)
            row |= {"val_loss": val, "val_perplexity": perplexity(val)}
        if s % 100 == 0:
            row["sample"] = self._sample(min(1.0, (mean - self._floor) / 3))
        return row

    def _sample(self, noise: float) -> str:
        """The verse, the worse the higher the loss."""
        pick = self._random
        return "To be" + "".join(pick.choice(LETTERS) if pick.random() < noise else c for c in VERSE[5:])
