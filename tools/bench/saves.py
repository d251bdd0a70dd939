"""What checkpoints cost a run: the time for which a save holds the training up, beside that of its steps."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from feste import GPT2, AdamW
from feste.config import TrainConfig
from feste.run.directory import CheckpointWriter

from .inputs import batch
from .sizes import SEQUENCES, model_config
from .steps import stepper

SAVES = 3


def measure(program: str, size: str, accumulation: int) -> dict:
    """Seconds of a step and of the wait for a save, and the share of the waits in a run that saves as often as it can.

    That is at every validation, each with a new best loss; the periodic checkpoint shares the file of one of them.
    """
    config = model_config(size)
    model = GPT2(config, seed=0)
    optimizer, writer = AdamW(model), CheckpointWriter(keep_last=3)
    writer.reserve(model, optimizer)
    step, ids_and_targets, times = stepper(model, optimizer, accumulation), batch(config, SEQUENCES), []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk where runs are
        for save in range(SAVES + 1):
            if save == 1:
                writer.wait()
                writer.held_up_seconds = 0.0  # of the first save, which makes room for the copies
            for _ in range(2):
                begun = time.perf_counter()
                step(*ids_and_targets)
                times.append(time.perf_counter() - begun)
            writer.save([Path(folder, f"checkpoint_step_{save}.bin")], model, None, optimizer, step=save)
        writer.wait()
    step_seconds, save_seconds = float(np.median(times)), writer.held_up_seconds / SAVES
    return {"step_seconds": step_seconds, "save_seconds": save_seconds,
            "share": save_seconds / (save_seconds + TrainConfig().val_interval * step_seconds)}
