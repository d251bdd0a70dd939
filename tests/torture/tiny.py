"""A tiny run, what is compared of it, and the count of what became of a fault."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from feste import GPT2, AdamW, BPETokenizer, Checkpoint, Config, train_gpt2
from feste.run.names import COLUMNS, LOG
from feste.run.rows import cells_of, records

CONFIG = Config(300, 16, 1, 2, 16, dropout=0.1)
INTERVAL = 5  # steps between checkpoints of the runs that are killed
SETTINGS = {"num_steps": 30, "learning_rate": 3e-3, "seq_len": 16, "batch_size": 2, "val_interval": 5, "val_windows": 4,
            "sample_interval": 5, "sample_tokens": 5, "sample_prompt": "a", "checkpoint_interval": INTERVAL,
            "threads": 1, "seed": 3, "patience": 1_000_000}
WALL_TIME = ("timestamp", "elapsed_seconds", "tokens_per_second")


@dataclass
class Tally:
    """What became of some faults. survived: the state on disk was whole; detected: an error named file and reason;
    lost: neither, or a wrong result. A damaged file cannot survive, so its column stays empty (None)."""

    fault: str
    tried: int = 0
    survived: int | None = 0
    detected: int | None = 0
    lost: int = 0
    note: str = ""

    def row(self) -> str:
        cells = (self.fault, self.tried, self.survived, self.detected, self.lost, self.note)
        return "| " + " | ".join("" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell
                                 for cell in cells) + " |"


@cache
def text() -> str:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 8))) for _ in range(200)]
    return " ".join(rng.choice(words, 3000))


@cache
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(text(), CONFIG.vocab_size)


@cache
def tokens() -> np.ndarray:
    return tokenizer().encode_to_numpy(text())


def train(run_dir: Path | None, *, precision: str = "fp32", resume=None, on_step=None, config: Config = CONFIG,
          **settings):
    """A tiny run in this process. settings replace those of SETTINGS."""
    values = SETTINGS | settings
    model = GPT2(config, values["seed"], precision)
    return train_gpt2(model, tokenizer(), tokens(), run_dir=run_dir, resume=resume, on_step=on_step, **values)


def save_example(path: Path, step: int) -> None:
    """A checkpoint with all its parts, different for each step."""
    model = GPT2(CONFIG, seed=step)
    optimizer = AdamW(model)
    optimizer.m += step
    Checkpoint.save(path, model, tokenizer(), optimizer, step=step, best_val_loss=1.5, best_step=step,
                    train_config={"seed": 3}, trainer_state={"skipped": 0})


def differences(a: Path, b: Path) -> list[str]:
    """What two checkpoints do not have in common, to the bit; wall time aside."""
    one, two = Checkpoint.load(a), Checkpoint.load(b)
    state_one, state_two = ({**c.trainer_state, "elapsed_seconds": None} for c in (one, two))
    pairs = {"parameters": (one.model.flat_params.tobytes(), two.model.flat_params.tobytes()),
             "first moments": (one.optimizer.m.tobytes(), two.optimizer.m.tobytes()),
             "second moments": (one.optimizer.v.tobytes(), two.optimizer.v.tobytes()),
             "updates": (one.optimizer.t, two.optimizer.t), "step": (one.step, two.step),
             "best": ((one.best_val_loss, one.best_step), (two.best_val_loss, two.best_step)),
             "trainer state": (state_one, state_two), "tokenizer": (one.tokenizer.to_json(), two.tokenizer.to_json())}
    return [name for name, (x, y) in pairs.items() if x != y]


def history(run_dir: Path, last: int | None = None) -> list[list[str]]:
    """The cells of the log as they stand, but for the columns of wall time."""
    keep = [i for i, name in enumerate(COLUMNS) if name not in WALL_TIME]
    rows = [[row[i] for i in keep] for row in map(cells_of, list(records((run_dir / LOG).read_bytes()))[1:])]
    return rows if last is None else rows[:last]
