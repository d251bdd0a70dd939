"""One page worth sending: the curves of runs with their values under the pointer, what differs, and samples, in a file.

The page needs no network and no other file. Its data are rows of the logs, thinned but not averaged, so every value
that it shows stands in a log; `page.js` draws them, `page.css` has a light and a dark form.
"""

from __future__ import annotations

import html
import json
import math
from datetime import date
from itertools import pairwise
from pathlib import Path
from string import Template

import numpy as np

from feste.terminal import clean
from feste.version import __version__

from ..comparison import cautions, labels, rows
from ..runs import Run

HERE = Path(__file__).parent
COLUMNS = ("train_loss", "val_loss", "grad_norm", "learning_rate", "tokens_per_second")
MOST_ROWS = 1200       # of a run
MOST_SAMPLES = 40
LONGEST_SAMPLE = 2000  # characters
OUTLIER = 2.0          # times the loss of a uniform guess: what is above does not set the scale
# (on white, on black): Okabe and Ito 2008 and neighbours of theirs, with a contrast of at least 3 to the page.
COLOURS = (("#0072B2", "#56B4E9"), ("#C65200", "#FF9248"), ("#007F5C", "#2CCF9F"), ("#A8478F", "#E58FC4"),
           ("#8A6D00", "#F0C94A"), ("#5F4B9B", "#AFA2EE"), ("#333333", "#DDDDDD"), ("#A51C30", "#FF7B8A"))
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # a second round of the colours is dashed


def make_page(runs: list[Run]) -> str:
    """The page as HTML."""
    names = labels(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    notes = "".join(f"<p>Note: {html.escape(line)}.</p>" for line in (cautions(runs) if len(runs) > 1 else []))
    text = {name: (HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return Template(text["html"]).substitute(
        title=html.escape(title), lead=html.escape(_lead(runs)), style=text["css"], script=text["js"], notes=notes,
        table=_table(runs), samples=_samples(runs, names), version=__version__, date=date.today().isoformat(),
        data=_embedded(page_data(runs, names)))


def page_data(runs: list[Run], names: list[str]) -> dict:
    """What page.js draws."""
    sizes = [run.configuration().get("vocab_size") for run in runs]
    sizes = [size for size in sizes if isinstance(size, int) and size > 1]
    return {"highest_loss": OUTLIER * math.log(max(sizes)) if sizes else None,
            "runs": [_run_data(run, name, i) for i, (run, name) in enumerate(zip(runs, names, strict=True))]}


def _run_data(run: Run, label: str, i: int) -> dict:
    light, dark = COLOURS[i % len(COLOURS)]
    columns, kept = run.columns, kept_rows(run.columns)
    found = {name: columns[name][kept] for name in ("step", *COLUMNS)}
    found["time"] = columns["elapsed_seconds"][kept]
    found["tokens"] = found["step"] * (run.summary.tokens_per_step or math.nan)
    found["val_bits_per_byte"] = found["val_loss"] * (run.bits_per_byte(1.0) or math.nan)
    every = max(1, -(-len(run.samples) // MOST_SAMPLES))
    samples = [(step, clean(text)[:LONGEST_SAMPLE]) for step, text in reversed(run.samples[::-1][::every])]
    return {"name": run.name, "label": label, "light": light, "dark": dark,
            "dash": DASHES[i // len(COLOURS) % len(DASHES)], "samples": samples,
            "columns": {name: [_value(value) for value in values.tolist()] for name, values in found.items()}}


def kept_rows(columns: dict[str, np.ndarray]) -> np.ndarray:
    """The rows of a log that the page has: the first, the last, the validated, and of neighbours two that stand out."""
    loss, count = columns["train_loss"], len(columns["step"])
    if count <= MOST_ROWS:
        return np.arange(count)
    validated = np.flatnonzero(np.isfinite(columns["val_loss"]))
    if len(validated) > MOST_ROWS // 3:
        validated = validated[np.linspace(0, len(validated) - 1, MOST_ROWS // 3).astype(int)]
    edges = np.linspace(0, count, (MOST_ROWS - len(validated)) // 2 + 1).astype(int)
    kept = {0, count - 1, *validated.tolist()}
    for begin, end in pairwise(edges.tolist()):
        part = np.where(np.isfinite(loss[begin:end]), loss[begin:end], 0.0)
        kept |= {int(begin + part.argmin()), int(begin + part.argmax())}
    return np.array(sorted(kept))


def _value(value: float) -> float | int | None:
    """As JSON has it: a whole number without a point, and null for what is missing or not finite."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def _embedded(data: dict) -> str:
    """JSON that can stand in a script element whatever the texts hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _lead(runs: list[Run]) -> str:
    """What the page is about, in a sentence."""
    if len(runs) > 1:
        return "How they learned, what differs between them, and what they wrote on the way."
    s = runs[0].summary
    best = "" if s.best_val_loss is None else f", best validation loss {s.best_val_loss:.4f} at step {s.best_step:,}"
    size = f"{s.parameters:,} parameters, " if s.parameters else ""
    return f"{size}{s.step or 0:,} steps, {s.state.replace('_', ' ')}{best}."


def _table(runs: list[Run]) -> str:
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(f"<tr><th>{html.escape(what)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
                   for what, cells in [*rows(runs), ("machine", [_machine(run) for run in runs])])
    return f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"


def _machine(run: Run) -> str:
    """Instruction set, threads and host, as far as run.json says."""
    info = run.info
    threads = f"{info['threads']} threads" if isinstance(info.get("threads"), int) else None
    ranks = f"{run.summary.ranks} ranks" if run.summary.ranks else None
    return ", ".join(str(part) for part in (info.get("isa"), threads, ranks, info.get("host")) if part) or "-"


def _samples(runs: list[Run], names: list[str]) -> str:
    """The last sample of each run, for readers that run no script."""
    found = [(name, run.samples[-1]) for run, name in zip(runs, names, strict=True) if run.samples]
    if not found:
        return "<p>None yet.</p>"
    return "".join(f'<article class="sample"><h3>{html.escape(name)}</h3><div class="at">step {step:,}</div>'
                   f"<pre>{html.escape(clean(text)[:LONGEST_SAMPLE])}</pre></article>" for name, (step, text) in found)
