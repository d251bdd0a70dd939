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
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

from feste.arguments import Parser
from feste.cli import guarded
from feste.corpus import Source
from feste.data import split_tokens
from feste.errors import FesteError
from feste.evaluation import bits_per_byte
from feste.run.checkpoint import Checkpoint
from feste.run.directory import find_checkpoint
from feste.terminal import clean, shorten
from feste.text import ERRORS, read_text

from .comparison import cautions, common_validation, differences, rows, same_step_samples
from .runs import Run, open_runs

BATCH = 8                # windows scored at a time
NARROWEST_COLUMN = 14    # characters of a run's column, if names are broken
NARROWEST_SAMPLE = 26    # characters of a sample's column, so that three fit into 80
GAP = 2                  # characters between columns
HINTS = {"score": "name a held-out text with --bits-per-byte FILE",
         "data": "name a text file with --bits-per-byte FILE",
         "encoding": "name its encoding with --encoding", "errors": "use --errors replace",
         "prepare": "name a text file with --bits-per-byte FILE", "runs": "name run directories, or folders of them"}


# ---- bits per byte -----------------------------------------------------------------------------------------


def load_best(run: Run) -> Checkpoint:
    """The best checkpoint of a run; FesteError if it has no tokenizer."""
    checkpoint = Checkpoint.load(find_checkpoint(run.path, prefer="best")[0])
    if checkpoint.tokenizer is None:
        raise FesteError(f"{checkpoint.path} holds no tokenizer, which scoring needs")
    return checkpoint


def score(runs: list[Run], file: str | None, encoding: str | None = None, errors: str = "strict") -> list[float]:
    """Bits per byte of each run's best checkpoint, all on the same bytes: those of a file, or the held-out end of the
    text that the runs were trained on."""
    if file is not None and Path(file).is_dir():
        raise FesteError(f"--bits-per-byte takes a text file, {file} is a directory; put the flag after the runs")
    held_out = None if file is None else read_text(file, encoding, errors)
    checkpoints = [load_best(run) for run in runs]
    if held_out is None:
        held_out = held_out_text(runs, checkpoints)
    return [_bits_per_byte(checkpoint, held_out) for checkpoint in track(
        checkpoints, "scoring", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())]


def _bits_per_byte(checkpoint: Checkpoint, text: str) -> float:
    """In windows as long as those of the training."""
    block_size = checkpoint.model.config.block_size
    length = min(block_size, (checkpoint.train_config or {}).get("seq_len", block_size))
    return bits_per_byte(checkpoint.model, checkpoint.tokenizer, text, length, BATCH)


def held_out_text(runs: list[Run], checkpoints: list[Checkpoint]) -> str:
    """The end of the runs' common text that none of them was trained on, or the text that all of them hold out;
    FesteError if there is no such text."""
    apart = [_read(run, Source.val_text) for run in runs]
    if any(apart):
        if any(text != apart[0] for text in apart):
            raise FesteError("the runs hold out different texts", "score")
        return apart[0]
    texts = [_read(run, Source.text) for run in runs]
    if any(text != texts[0] for text in texts):
        raise FesteError("the runs were trained on different texts, so that none is held out of all of them", "score")
    data = texts[0].encode()
    starts = []
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        tokens = checkpoint.tokenizer.encode_to_numpy(texts[0])
        if hashlib.sha256(tokens.astype(np.uint32)).hexdigest() != run.info.get("corpus_sha256"):
            raise FesteError(f"the text that {run.name} was trained on has changed since", "score")
        # Tokenizers cut at different places, so the held-out parts begin at different bytes; the last begin counts.
        fraction = run.configuration()["val_fraction"]
        starts.append(len(checkpoint.tokenizer.decode_bytes(split_tokens(tokens, fraction)[0])))
    return data[max(starts):].decode("utf-8", errors="ignore")  # a cut through a character drops its rest


def _read(run: Run, which: Callable[[Source], str | None]) -> str | None:
    """The text a run was trained on, or the one it holds out, read as the training read it."""
    source = Source.of_run(run.info)
    if source is None or source.is_tokens:
        raise FesteError(f"{run.name} does not tell which text it was trained on", "score")
    try:
        return which(source)
    except FesteError as error:
        raise FesteError(f"the text of {run.name} is not at hand ({error})", "score") from None


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
    across = max(1, min(len(runs), console.width // NARROWEST_SAMPLE))
    width = console.width // across
    panels = []
    for run, sample in zip(runs, samples, strict=True):
        if sample:
            step = f", step {sample[0]:,}"
            panels.append(Panel(Text(clean(sample[1])), title=Text(shorten(run.name, width - len(step) - 6) + step)))
    console.print(Columns(panels, width=width, padding=0))


def as_json(runs: list[Run], scores: list[float] | None) -> str:
    """JSON with the figures of each run's summary; what is unknown or not finite is null."""
    samples, at = same_step_samples(runs), common_validation(runs)
    found = []
    for i, run in enumerate(runs):
        summary = asdict(run.summary)
        sample = samples[i]
        found.append(summary | {"seconds": summary["elapsed_seconds"], "bits_per_byte": scores[i] if scores else None,
                                "common_val_loss": {"step": at[0], "val_loss": at[1][i]} if at else None,
                                "sample": {"step": sample[0], "text": sample[1]} if sample else None,
                                "configuration": run.configuration()})
    page = {"differences": differences(runs), "warnings": cautions(runs), "runs": found}
    return json.dumps(_finite(page), indent=1, ensure_ascii=False)


def _finite(value):
    """A JSON value with null for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


PROG = "python -m tools.compare"
EXAMPLES = """
examples:
  {0} data/a data/b                    settings that differ, losses, samples
  {0} data/a data/b --bits-per-byte    scored on the same held-out bytes, whatever their tokenizers
  {0} data --json                      all runs under data/, for a script
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Compare runs.", epilog=EXAMPLES.format(prog))
    parser.add_argument("runs", nargs="*", metavar="RUN", default=["data"],
                        help="run directories, or folders that hold some (default: data)")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--bits-per-byte", nargs="?", const="", metavar="FILE", help="score the best checkpoint of "
                         "each run on a text (default: the part of their common training text that was held out)")
    scoring.add_argument("--encoding", metavar="NAME", help="of that text (default: as its mark says, else utf-8)")
    scoring.add_argument("--errors", choices=ERRORS, default="strict",
                         help="what cannot be decoded in it stops the work, or becomes U+FFFD (default: strict)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def report(args: argparse.Namespace) -> int:
    runs = open_runs(args.runs)
    scores = None if args.bits_per_byte is None else score(
        runs, args.bits_per_byte or None, args.encoding, args.errors)
    if args.json:
        print(as_json(runs, scores), flush=True)
    else:
        print_report(runs, scores, Console(highlight=False))
    return 0


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    args = make_parser(prog).parse_args(argv)
    return guarded(lambda: report(args), HINTS)


if __name__ == "__main__":
    sys.exit(main())
