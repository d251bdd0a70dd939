"""The command line of the monitor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from feste.arguments import Parser
from feste.progress import discard_output

from .demo import Demo
from .runs import Watch, in_order
from .summary import as_json, as_text

PROG = "python -m tools.monitor"
EXAMPLES = """
examples:
  {0}                              every run under data/
  {0} data/shakespeare_medium_*    some of them
  {0} --once                       a summary, for a pipe or a script
  {0} --demo                       made-up runs, to see what it is like
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Watch training runs in the terminal. Press ? there for "
                    "the keys.", epilog=EXAMPLES.format(prog))
    parser.add_argument("paths", nargs="*", metavar="PATH", help="run directories, or folders that hold some "
                        "(default: data)")
    parser.add_argument("--demo", action="store_true", help="show made-up runs, one of them live")
    summary = parser.add_argument_group("a summary instead of the screen")
    summary.add_argument("--once", action="store_true", help="print it and exit")
    summary.add_argument("--json", action="store_true", help="print it as JSON and exit")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if args.demo and args.paths:
        parser.error(f"--demo shows runs of its own; leave out {args.paths[0]}")
    try:
        with Demo() if args.demo else nullcontext() as demo:
            watch = Watch([demo] if demo else [Path(path) for path in args.paths or ["data"]])
            return _print(watch, args.json) if args.once or args.json else _watch(watch)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has enough; Python must not complain of it at exit
        discard_output()
        return 1


def _print(watch: Watch, json: bool) -> int:
    runs = in_order(watch.read(), "newest")
    if not runs:
        raise ValueError(f"there is no run in {', '.join(map(str, watch.paths))}; start one with `feste train`, "
                         "or see --demo")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    print(as_json(runs) if json else as_text(runs), flush=True)
    return 0


def _watch(watch: Watch) -> int:
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):  # it draws on standard error
        raise ValueError("the monitor needs a terminal; use --once or --json in a pipe")
    from . import preferences
    from .app import Monitor  # Textual takes a moment to load, which the summaries do not need
    Monitor(watch, preferences.read(preferences.path()), preferences.path(), preferences.theme_of_terminal()).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
