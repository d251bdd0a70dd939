"""A tiny run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from feste.run.names import FINAL

from .tiny import CONFIG, SETTINGS, differences, history, text

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def arguments(folder: Path, run_dir: Path, **settings) -> list[str]:
    """The command line of a new run with the settings above."""
    data = folder / "text.txt"
    if not data.exists():
        data.write_text(text())
    flags = {"data": data, "run_dir": run_dir, **CONFIG.to_dict(), **SETTINGS, **settings}
    flags["steps"] = flags.pop("num_steps")
    flags.pop("tie_weights")
    return [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def command(argv: list[str], **order) -> list[str]:
    """What starts a training process. order: what goes wrong in it, see child.py."""
    return [sys.executable, str(Path(__file__).with_name("child.py")), json.dumps(order | {"argv": argv})]


def start(argv: list[str], *, prefix: tuple[str, ...] = (), **order) -> subprocess.Popen:
    return subprocess.Popen([*prefix, *command(argv, **order)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=ENVIRONMENT, cwd=ROOT)


def run(argv: list[str], **order) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a training process."""
    process = start(argv, **order)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def _whole(folder: Path) -> Path:
    """A run that was left alone."""
    whole = folder / "whole"
    if not whole.exists():
        code, out, err = run(arguments(folder, whole))
        assert code == 0, err or out
    return whole


def is_whole(folder: Path, run_dir: Path) -> bool:
    """Whether a run is to the bit that which was left alone."""
    whole = _whole(folder)
    return history(run_dir) == history(whole) and not differences(run_dir / FINAL, whole / FINAL)
