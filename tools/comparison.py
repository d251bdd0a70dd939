"""What differs between runs, what came of each, and whether their losses may be compared: for tables and for plots."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from feste import terminal as text
from feste.terminal import clean_line

from .runs import Run, Summary

NAMED_DIFFERENCES = 4    # fields in a label
LABEL_WIDTH = 20         # characters of a value in a label


# ---- what differs ------------------------------------------------------------------------------------------


def differences(runs: list[Run]) -> dict[str, list]:
    """Configuration fields in which runs differ: name -> one value for each run, None where it has none."""
    configurations = [run.configuration() for run in runs]
    names = dict.fromkeys(name for configuration in configurations for name in configuration)
    values = {name: [configuration.get(name) for configuration in configurations] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def labels(runs: list[Run]) -> list[str]:
    """A short name for each run: what differs in its configuration, and its directory where that is not enough."""
    fields = differences(runs)
    named = _most_telling(fields)
    more = ", …" if len(fields) > len(named) else ""
    found = [", ".join(f"{name}={_short(fields[name][i])}" for name in named) + more for i in range(len(runs))]
    return [label if label and found.count(label) == 1 else f"{run.name}: {label}" if label else run.name
            for run, label in zip(runs, found, strict=True)]


def _most_telling(fields: dict[str, list]) -> list[str]:
    """At most NAMED_DIFFERENCES of the fields: those that together tell the most runs apart, and then the first."""
    def kinds(names: list[str]) -> int:
        return len(set(zip(*(map(repr, fields[name]) for name in names), strict=True)))

    chosen: list[str] = []
    while len(chosen) < min(NAMED_DIFFERENCES, len(fields)):
        best = max(fields, key=lambda name: kinds([*chosen, name]))
        if chosen and kinds([*chosen, best]) == kinds(chosen):
            break
        chosen.append(best)
    chosen += [name for name in fields if name not in chosen]
    return [name for name in fields if name in chosen[:NAMED_DIFFERENCES]]


def _short(value) -> str:
    text = repr(value) if isinstance(value, str) else "none" if value is None else str(value)
    return clean_line(text if len(text) <= LABEL_WIDTH else text[:LABEL_WIDTH - 1] + "…")


# ---- what came of it ----------------------------------------------------------------------------------------


def common_validation(runs: list[Run]) -> tuple[int, list[float]] | None:
    """The last step at which every run was validated, and the losses there."""
    found = [{int(step): float(loss) for step, loss in zip(run.columns["step"], run.columns["val_loss"], strict=True)
              if np.isfinite(loss)} for run in runs]
    common = set.intersection(*map(set, found))
    return (max(common), [losses[max(common)] for losses in found]) if common else None


def same_step_samples(runs: list[Run]) -> list[tuple[int, str] | None]:
    """Samples of the last step at which every run has one; without such a step, the last sample of each."""
    found = [dict(run.reader.samples) for run in runs]
    common = set.intersection(*map(set, found))
    return [(max(common), samples[max(common)]) if common else max(samples.items(), default=None) for samples in found]


def cautions(runs: list[Run]) -> list[str]:
    """Why losses per token of these runs should not be compared; empty if they may be."""
    tokenizers = {_digest(run.path / "tokenizer.json") for run in runs}
    texts = {run.info.get("corpus_sha256") for run in runs}
    if len(tokenizers) > 1:
        return ["the runs have different tokenizers, so their losses per token cannot be compared; "
                f"--bits-per-byte{' FILE' if len(texts) > 1 else ''} scores them fairly"]
    if len(texts) > 1:
        return ["the runs were validated on different texts, so their losses cannot be compared; "
                "--bits-per-byte FILE scores them on one"]
    return []


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def rows(runs: list[Run], scores: list[float] | None = None) -> list[tuple[str, list[str]]]:
    """The table: (what, one cell for each run). The best of comparable losses has a star."""
    found, comparable = [run.summary for run in runs], not cautions(runs)
    at = common_validation(runs)
    table = [(name, [_short(value) for value in values]) for name, values in differences(runs).items()]
    table += [
        ("state", [s.state for s in found]),
        ("parameters", [text.count(s.parameters) for s in found]),
        ("steps", [f"{text.count(s.step)} of {text.count(s.planned_steps)}" for s in found]),
        ("training tokens", [text.count(_tokens_seen(s)) for s in found]),
        ("time", [text.duration(s.elapsed_seconds) for s in found]),
        ("tokens per second", [text.count(s.tokens_per_second) for s in found]),
        ("last train loss", [text.number(s.train_loss) for s in found]),
        ("best validation loss", _starred([s.best_val_loss for s in found], comparable)),
        ("  in bits per byte", [text.number(s.best_bits_per_byte, ".3f") for s in found]),
        ("  its perplexity", [text.perplexity(s.best_val_perplexity) for s in found]),
        ("  its step", [text.count(s.best_step) for s in found]),
    ]
    if at and len(runs) > 1:
        table.append((f"validation loss, step {at[0]:,}", _starred(at[1], comparable)))
    if scores is not None:
        table.append(("bits per byte", _starred(scores, True)))
    return table


def _tokens_seen(s: Summary) -> int | None:
    return None if s.step is None or s.tokens_per_step is None else s.step * s.tokens_per_step


def _starred(values: list[float | None], comparable: bool) -> list[str]:
    finite = [value for value in values if value is not None]
    least = min(finite) if comparable and len(finite) > 1 else None
    return [text.number(value) + (" *" if value is not None and value == least else "") for value in values]
