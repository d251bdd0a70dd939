"""Compare runs: `python -m tools.compare RUN...` prints what differs, how each went, and samples of the same step.

With `--bits-per-byte [FILE]` the best checkpoint of each run is scored on one held-out text. A loss per token says
little across tokenizers, as longer tokens are harder to guess and there are fewer of them; bits per byte is fair:

    summed loss in nats / ln 2 / UTF-8 bytes of the predicted text
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from feste.runlog import LOG_NAME, RunReader, perplexity
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

from feste.cli import guarded
from feste.corpus import CorpusError, read_text, shakespeare_text
from feste.data import split_tokens, validation_windows, windows
from feste.terminal import shorten
from tools.repl.loop import NARROWEST
from tools.repl.voice import Voice, visible

NAMED_DIFFERENCES = 4    # fields in a label
LABEL_WIDTH = 20         # characters of a value in a label
BATCH = 8                # windows scored at a time
NARROWEST_COLUMN = 14    # characters of a run's column, if names are broken
GAP = 2                  # characters between columns
MISSING = "-"


# ---- runs and what differs ---------------------------------------------------------------------------------


@dataclass
class Run:
    """A run directory as read at one moment. name is unique among the runs that were opened together."""

    path: Path
    name: str
    reader: RunReader

    @property
    def info(self) -> dict:
        return self.reader.info

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return self.reader.columns

    def configuration(self) -> dict:
        """The fields of the model and of the training, which have different names."""
        return {**_mapping(self.info.get("model")), **_mapping(self.info.get("train"))}

    def best(self) -> tuple[float, int] | None:
        """The least validation loss and its step."""
        losses = self.columns["val_loss"]
        if not np.isfinite(losses).any():
            return None
        i = int(np.nanargmin(losses))
        return float(losses[i]), int(self.columns["step"][i])


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def open_runs(paths: Sequence[str]) -> list[Run]:
    """Read the runs, or ValueError for a directory that is none or has no step yet."""
    runs = []
    short = [Path(path).absolute().name for path in paths]
    for path, name in zip(map(Path, paths), short, strict=True):
        if not (path / LOG_NAME).is_file():
            raise ValueError(f"{path} is no run directory: it has no {LOG_NAME}")
        reader = RunReader(path)
        reader.poll()
        if not len(reader.columns["step"]):
            raise ValueError(f"{path} has no step in its {LOG_NAME} yet")
        runs.append(Run(path, visible(name if short.count(name) == 1 else str(path)), reader))
    return runs


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
    return visible(text if len(text) <= LABEL_WIDTH else text[:LABEL_WIDTH - 1] + "…")


# ---- the summary -------------------------------------------------------------------------------------------


def summary(run: Run) -> dict:
    """What came out of a run; None for what is not known. Times in seconds, losses in nats per token."""
    columns, best = run.columns, run.best()
    return {
        "state": run.reader.state, "reason": run.info.get("reason"), "parameters": run.info.get("parameters"),
        "step": int(columns["step"][-1]), "planned_steps": run.info.get("planned_steps"),
        "tokens_per_step": run.info.get("tokens_per_step"), "seconds": _last(columns["elapsed_seconds"]),
        "tokens_per_second": _median(columns["tokens_per_second"]), "train_loss": _last(columns["train_loss"]),
        "best_val_loss": best[0] if best else None, "best_step": best[1] if best else None,
    }


def _last(column: np.ndarray) -> float | None:
    finite = column[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else None


def _median(column: np.ndarray) -> float | None:
    finite = column[np.isfinite(column)]
    return float(np.median(finite)) if len(finite) else None


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
                "--bits-per-byte scores them fairly"]
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
    found, comparable = [summary(run) for run in runs], not cautions(runs)
    at = common_validation(runs)
    table = [(name, [_short(value) for value in values]) for name, values in differences(runs).items()]
    table += [
        ("state", [s["state"] for s in found]),
        ("parameters", [_number(s["parameters"], ",") for s in found]),
        ("steps", [f"{s['step']:,} of {_number(s['planned_steps'], ',')}" for s in found]),
        ("training tokens", [_number(_times(s["step"], s["tokens_per_step"]), ",") for s in found]),
        ("time", [_duration(s["seconds"]) for s in found]),
        ("tokens per second", [_number(s["tokens_per_second"], ",.0f") for s in found]),
        ("last train loss", [_number(s["train_loss"], ".4f") for s in found]),
        ("best validation loss", _starred([s["best_val_loss"] for s in found], comparable)),
        ("  its perplexity", [MISSING if s["best_val_loss"] is None else f"{perplexity(s['best_val_loss']):.2f}"
                              for s in found]),
        ("  its step", [_number(s["best_step"], ",") for s in found]),
    ]
    if at and len(runs) > 1:
        table.append((f"validation loss, step {at[0]:,}", _starred(at[1], comparable)))
    if scores is not None:
        table.append(("bits per byte", _starred(scores, True)))
    return table


def _number(value, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else MISSING


def _times(a, b) -> int | None:
    return a * b if isinstance(a, int) and isinstance(b, int) else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    minutes, rest = divmod(seconds, 60)
    return f"{rest:.1f} s" if minutes < 1 else f"{int(minutes // 60)}:{int(minutes % 60):02}:{int(rest):02}"


def _starred(values: list[float | None], comparable: bool) -> list[str]:
    finite = [value for value in values if value is not None]
    least = min(finite) if comparable and len(finite) > 1 else None
    return [_number(value, ".4f") + (" *" if value is not None and value == least else "") for value in values]


# ---- bits per byte -----------------------------------------------------------------------------------------


def bits_per_byte(voice: Voice, text: str) -> float:
    """Bits that the model needs for each UTF-8 byte of a text.

    The text is read in whole windows, end to end, as long as those of the training; every token but the first is
    predicted once, from the tokens before it in its window.
    """
    ids = voice.tokenizer.encode_to_numpy(text)
    if len(ids) < 2:
        raise ValueError(f"the held-out text has {len(ids)} tokens; at least 2 are needed to predict one")
    length = min(voice.model.config.block_size, voice.train_config.get("seq_len", voice.model.config.block_size))
    nats = 0.0
    for inputs, targets in _batches(ids, length):
        nats += voice.model.loss(inputs, targets) * inputs.size
    return nats / math.log(2.0) / len(voice.tokenizer.decode_bytes(ids[1:]))


def _batches(ids: np.ndarray, length: int):
    """(inputs, targets) of every window, BATCH at a time; the last one holds what is left."""
    whole = (len(ids) - 1) // length
    if whole:
        inputs, targets = validation_windows(ids, length)
        for i in track(range(0, whole, BATCH), "scoring", console=Console(stderr=True), transient=True):
            yield inputs[i:i + BATCH], targets[i:i + BATCH]
    rest = len(ids) - 1 - whole * length
    if rest:
        yield windows(ids, np.array([whole * length]), rest)


def held_out_text(runs: list[Run], voices: list[Voice]) -> str:
    """The end of the runs' common text that none of them was trained on; ValueError if there is no such text."""
    texts = [_training_text(run) for run in runs]
    if any(text != texts[0] for text in texts):
        raise ValueError("the runs were trained on different texts; name one that is new to all of them with "
                         "--bits-per-byte FILE")
    data = texts[0].encode()
    starts = []
    for run, voice in zip(runs, voices, strict=True):
        tokens = voice.tokenizer.encode_to_numpy(texts[0])
        if hashlib.sha256(tokens.astype(np.uint32)).hexdigest() != run.info.get("corpus_sha256"):
            raise ValueError(f"the text that {run.name} was trained on has changed since; name a held-out text with "
                             "--bits-per-byte FILE")
        # Tokenizers cut at different places, so the held-out parts begin at different bytes; the last begin counts.
        fraction = run.configuration()["val_fraction"]
        starts.append(len(voice.tokenizer.decode_bytes(split_tokens(tokens, fraction)[0])))
    return data[max(starts):].decode("utf-8", errors="ignore")  # a cut through a character drops its rest


def _training_text(run: Run) -> str:
    """The text a run was trained on, found as run.json says."""
    flags = run.info.get("data_flags")
    if not isinstance(flags, dict) or (flags.get("data") and Path(flags["data"]).is_dir()):
        raise ValueError(f"{run.name} does not tell which text it was trained on; name a held-out text with "
                         "--bits-per-byte FILE")
    try:
        text = read_text(flags["data"]) if flags.get("data") else shakespeare_text()
    except CorpusError as error:
        raise ValueError(f"the text of {run.name} is not at hand ({str(error).partition(';')[0]}); name a held-out "
                         "text with --bits-per-byte FILE") from None
    return text[:flags.get("train_chars")]


def score(runs: list[Run], file: str | None) -> list[float]:
    """Bits per byte of each run's best checkpoint, on a file or on the held-out end of the runs' common text."""
    if file is not None and Path(file).is_dir():
        raise ValueError(f"--bits-per-byte takes a text file, {file} is a directory; put the flag after the runs")
    try:
        text = read_text(file) if file is not None else None
    except CorpusError as error:
        raise ValueError(str(error).replace("--data", "--bits-per-byte")) from None
    voices = [Voice(run.path) for run in runs]
    if text is None:
        text = held_out_text(runs, voices)
    return [bits_per_byte(voice, text) for voice in voices]


# ---- the page ----------------------------------------------------------------------------------------------


def print_report(runs: list[Run], scores: list[float] | None, console: Console) -> None:
    table = rows(runs, scores)
    room = console.width - max(len(what) for what, _ in table) - GAP
    names = [run.name for run in runs]
    width = max(len(cell) for _, cells in table for cell in cells)
    if len(runs) * (max(map(len, names)) + GAP) > room:  # figures decide how many runs stand side by side, not names
        width = max(width, NARROWEST_COLUMN)
        names = [folded(name, width) for name in names]
    across = max(1, room // (max(width, *(len(line) for name in names for line in name.split("\n"))) + GAP))
    for first in range(0, len(runs), across):
        console.print(_rich_table(table, names, first, first + across))
    if any(cell.endswith("*") for _, cells in table for cell in cells):
        console.print("* the best of the runs", style="dim")
    for line in cautions(runs) if len(runs) > 1 else []:
        console.print(f"Note: {line}.", style="yellow")
    _print_samples(runs, console)


def folded(name: str, width: int) -> str:
    """A name in lines of a width, broken behind underscores and slashes where there are some."""
    lines = [""]
    for part in re.findall(rf"[^_/]{{0,{width - 1}}}[_/]|[^_/]{{1,{width}}}", name):
        if len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _rich_table(table: list[tuple[str, list[str]]], names: list[str], first: int, last: int) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    shown.add_column("")
    for name in names[first:last]:
        shown.add_column(Text(name), overflow="fold")
    for what, cells in table:
        shown.add_row(Text(what), *(Text(cell, "bold" if cell.endswith("*") else "") for cell in cells[first:last]))
    return shown


def _print_samples(runs: list[Run], console: Console) -> None:
    samples = same_step_samples(runs)
    if not any(samples):
        return
    across = max(1, min(len(runs), console.width // NARROWEST))
    width = console.width // across
    panels = []
    for run, sample in zip(runs, samples, strict=True):
        if sample:
            step = f", step {sample[0]:,}"
            panels.append(Panel(Text(visible(sample[1])), title=Text(shorten(run.name, width - len(step) - 6) + step)))
    console.print(Columns(panels, width=width, padding=0))


def as_json(runs: list[Run], scores: list[float] | None) -> str:
    samples, at = same_step_samples(runs), common_validation(runs)
    found = []
    for i, run in enumerate(runs):
        sample = samples[i]
        found.append({"path": str(run.path), "name": run.name, **summary(run),
                      "bits_per_byte": scores[i] if scores else None,
                      "common_val_loss": {"step": at[0], "val_loss": at[1][i]} if at else None,
                      "sample": {"step": sample[0], "text": sample[1]} if sample else None,
                      "configuration": run.configuration()})
    return json.dumps({"differences": differences(runs), "warnings": cautions(runs), "runs": found}, indent=1,
                      ensure_ascii=False)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description="Compare runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--bits-per-byte", nargs="?", const="", metavar="FILE", help="score the best checkpoint of "
                        "each run on a text (default: the part of their common training text that was held out)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def report(args: argparse.Namespace) -> int:
    runs = open_runs(args.runs)
    scores = None if args.bits_per_byte is None else score(runs, args.bits_per_byte or None)
    if args.json:
        print(as_json(runs, scores), flush=True)
    else:
        print_report(runs, scores, Console(highlight=False))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return guarded(lambda: report(args))
    except BrokenPipeError:  # whoever reads has enough; Python must not complain of it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
