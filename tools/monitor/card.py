"""The card of a run: all that is known of it, on one page, with what to type to go on with it."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.text import Text

from feste import terminal as text
from feste.run.names import BEST, FINAL, STABLE, periodic

from ..comparison import differences
from . import summary
from .runs import FollowedRun

NAME_WIDTH = 19


def commands(run: FollowedRun) -> list[str]:
    """What to type: to talk to the run, to go on with it, to see its curves."""
    path = shlex.quote(str(run.path))
    return [f"feste repl {path}", f"feste train --resume {path}", f"feste plot {path} -o report.html"]


def card(run: FollowedRun, others: list[FollowedRun]) -> Text:
    """What differs from other runs first, then everything."""
    page = Text()
    _title(page, f"{run.marker} {run.name}", run.colour)
    page.append(f"{summary.state(run.summary)}\n{summary.progress(run.summary)}  {summary.times(run.summary)}\n")
    page.append(f"{summary.losses(run.summary)}\n")
    _section(page, "To type (c copies the first, r the second)", [("", line) for line in commands(run)])
    _section(page, "Differs from other runs", _differing(run, others))
    _section(page, "Checkpoints", _checkpoints(run.path))
    _section(page, "Where and how", _machine(run.info))
    for title, part in (("Model", "model"), ("Training", "train")):
        values = run.info.get(part)
        _section(page, title, [(name, _shown(value)) for name, value in values.items()]
                 if isinstance(values, dict) else [])
    return page


def _title(page: Text, line: str, style: str = "") -> None:
    page.append(text.clean_line(line) + "\n", f"bold {style}".strip())


def _section(page: Text, title: str, rows: list[tuple[str, str]]) -> None:
    if rows:
        page.append(f"\n{title}\n", "bold underline")
        for name, value in rows:
            page.append(f"  {name:{NAME_WIDTH}} " if name else "  ", "dim")
            page.append(f"{text.clean_line(value)}\n")


def _shown(value) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _differing(run: FollowedRun, others: list[FollowedRun]) -> list[tuple[str, str]]:
    """Settings in which not all runs are alike, with those of the others behind."""
    runs = [run, *(other for other in others if other is not run)]
    found = []
    for name, (own, *rest) in differences(runs).items():
        unlike = list(dict.fromkeys(_shown(value) for value in rest if value != own))
        if unlike:
            found.append((name, f"{_shown(own)}   elsewhere {', '.join(unlike[:4])}{', …' if len(unlike) > 4 else ''}"))
    return found


def _checkpoints(path: Path) -> list[tuple[str, str]]:
    """Each file by what its name says, and its size."""
    found = []
    for file in [*(path / name for name in (BEST, FINAL, STABLE)), *(file for _, file in reversed(periodic(path)))]:
        try:
            size = file.stat().st_size
        except OSError:  # not there, or not there any more
            continue
        found.append((file.name.removeprefix("checkpoint_").removesuffix(".bin"), f"{size / 1e6:,.1f} MB"))
    return found


def _machine(info: dict) -> list[tuple[str, str]]:
    """Host, kernels, versions, text, parent: whatever run.json tells."""
    parent = info.get("parent") if isinstance(info.get("parent"), dict) else {}
    names = {"source": "text", "tokens": "its tokens", "host": "host", "isa": "instruction set", "threads": "threads",
             "feste": "feste", "python": "Python", "numpy": "NumPy", "started": "started", "ended": "ended",
             "corpus_sha256": "SHA-256 of the text"}
    rows = [(shown, str(info[name])) for name, shown in names.items() if info.get(name) is not None]
    if parent.get("checkpoint"):
        rows.insert(0, ("parent", f"step {parent.get('step')} of {parent['checkpoint']}"))
    for number, rank in enumerate(info["ranks"] if isinstance(info.get("ranks"), list) else []):
        if isinstance(rank, dict):
            rows.append((f"rank {number}", ", ".join(f"{name} {value}" for name, value in rank.items())))
    return rows
