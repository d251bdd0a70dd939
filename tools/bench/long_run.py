"""A long run: does its memory grow, and does it leave files open?"""

from __future__ import annotations

import gc
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from feste import GPT2, BPETokenizer, train_gpt2
from feste.config import PRESETS
from feste.corpus import shakespeare_text

WARM_UP = 500  # steps: by then there were validations, a sample, and two saves


def measure(program: str, steps: int) -> dict:
    """The small example for so many steps: how far its resident memory grew after the warm-up, and files left open."""
    preset, resident = PRESETS["small"], {}
    text = shakespeare_text()[:preset.train_chars]
    tokenizer = BPETokenizer.train(text, preset.model.vocab_size)

    def on_step(record: dict) -> None:
        if record["step"] % 50 == 0:
            resident[record["step"]] = _resident_bytes()

    with tempfile.TemporaryDirectory(dir=".") as folder:
        before = _open_files()
        config = replace(preset.train, num_steps=steps, patience=steps)
        train_gpt2(GPT2(preset.model, config.seed), tokenizer, text, run_dir=Path(folder, "run"), config=config,
                   on_step=on_step)
        left_open = _open_files() - before
    later = [size for step, size in resident.items() if step > WARM_UP]
    return {"steps": steps, "warm_bytes": resident[WARM_UP], "growth_bytes": max(later) - resident[WARM_UP],
            "files_left_open": left_open}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))
