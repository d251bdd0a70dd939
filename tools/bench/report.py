"""Results as a table in the terminal, as JSON, and as a chart."""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from feste import ops
from feste.machine import cpu_name, visible_cores

console = Console(width=None if sys.stdout.isatty() else 150)


def machine() -> dict:
    """What the figures were measured on."""
    return {"date": date.today().isoformat(), "cpu": cpu_name(), "cores": visible_cores(), "isa": ops.isa,
            "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}


def headline(title: str) -> None:
    m = machine()
    console.print(f"\n[bold]{title}[/]  ({m['date']}, {m['cores']} cores of {m['cpu']}, {m['isa']})", highlight=False)


def show(columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns[:1], box=None, pad_edge=False)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def write_json(path: str, results: dict) -> None:
    Path(path).write_text(json.dumps({"machine": machine()} | results, indent=1))


def chart(path: str, rows: list[dict]) -> None:
    """Bars of steps a second relative to the best PyTorch, one group for each model and precision."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    labels = [f"{row['size']}\n{row['precision']}" for row in rows]
    figure, axes = plt.subplots(figsize=(1.1 * len(rows) + 2, 4))
    for i, name in enumerate(("feste", "eager", "compile")):
        best = [max(row["median"].get(peer, 0) for peer in ("eager", "compile")) for row in rows]
        heights = [row["median"].get(name, 0) / b if b else 0 for row, b in zip(rows, best, strict=True)]
        places = [x + (i - 1) * 0.27 for x in range(len(rows))]
        bars = axes.bar(places, heights, 0.25, label="feste" if name == "feste" else f"PyTorch {name}")
        axes.bar_label(bars, [f"{height:.2f}" if height else "" for height in heights], fontsize=7)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(rows)), labels)
    axes.set_ylabel("steps a second / best PyTorch")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
