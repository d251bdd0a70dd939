"""What is called what in a run directory: files, columns of the log, and the states of a run."""

from __future__ import annotations

from pathlib import Path

LOG, INFO, JOURNAL = "training_log.csv", "run.json", "run.log"
LOCK, TOKENIZER = ".lock", "tokenizer.json"
BEST, FINAL = "checkpoint_best.bin", "checkpoint_final.bin"
STABLE = "checkpoint_stable.bin"  # of the last step at the peak rate, from which a run is prolonged; schedule wsd
SET_ASIDE = ".superseded"  # suffix of a checkpoint that the run no longer goes through

COLUMNS = ("step", "timestamp", "elapsed_seconds", "learning_rate", "train_loss", "val_loss", "train_perplexity",
           "val_perplexity", "grad_norm", "tokens_per_second", "sample")
TEXT_COLUMNS = ("timestamp", "sample")  # the others hold numbers

RUNNING = "running"
END_STATES = ("finished", "early_stopped", "interrupted", "failed")


def periodic_name(step: int) -> str:
    """The name of the periodic checkpoint of a step."""
    return f"checkpoint_step_{step}.bin"


def periodic(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the periodic checkpoints, oldest first."""
    found = [(path.stem.removeprefix("checkpoint_step_"), path) for path in directory.glob("checkpoint_step_*.bin")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def is_run(directory: Path) -> bool:
    """Whether a directory looks like that of a run."""
    return (directory / LOG).exists() or (directory / INFO).exists()
