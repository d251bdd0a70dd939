"""The table of faults.

    python -m tests.torture                the long forms, a few minutes
    python -m tests.torture --quick        the same with small counts
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import (
    Tally,
    bit_flips,
    damaged_tokenizers,
    failing_calls,
    forged_files,
    kills,
    signals,
    simultaneous,
    surroundings,
    truncations,
)
from .ranks import MISSING, rank_kills

HEADER = ("| fault | tried | survived whole | detected and named | lost | |\n"
          "|---|---:|---:|---:|---:|---|")


def torture(folder: Path, quick: bool = False) -> Iterator[Tally]:
    yield kills(folder, 10 if quick else 200)
    yield from failing_calls(folder)
    yield truncations(folder, 50 if quick else 3000)
    yield from bit_flips(folder, 500 if quick else None, 100 if quick else 1000)
    yield forged_files(folder)
    yield from damaged_tokenizers(folder, 100 if quick else 3000)
    yield signals(folder)
    yield from surroundings(folder)
    yield simultaneous(folder)
    if MISSING is None:
        yield rank_kills(folder, 3 if quick else 50)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Faults tried, survived, detected, lost.")
    parser.add_argument("--quick", action="store_true", help="small counts, under a minute")
    quick, lost = parser.parse_args(argv).quick, 0
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for tally in torture(Path(folder), quick):
            print(tally.row(), flush=True)
            lost += tally.lost
    print(f"\n{lost} lost" if lost else "\nnothing lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
