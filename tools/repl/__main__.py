"""Talk to a model: `python -m tools.repl CHECKPOINT_OR_RUN`, or two of them with `--compare A B`.

A line is a prompt that the model continues; a line that ends in a backslash goes on in the next one. A line that
starts with a slash is a command (`/help`), with two slashes a prompt that starts with one. If standard input or
output is no terminal, the same lines are read, only answers go to standard output, and an error ends the program.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from feste.arguments import Parser
from feste.cli import guarded
from feste.config import GENERATION_PRECISIONS
from feste.errors import FesteError
from feste.run.names import is_run

from ..runs import has_checkpoint, newest_with_checkpoint
from .answers import DIALS, LoadedModel, Settings
from .loop import COMMANDS, Repl

HISTORY_LINES = 1000
HINTS = {"runs": "name run directories, or folders of them"}


def history_path() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "feste" / "repl_history"


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Line editing, history and completion of command names, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_path()
    readline.set_completer_delims(" ")
    readline.set_completer(_complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # lines that are pasted together are one prompt
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):  # a history that cannot be read or kept is no reason not to talk
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def _complete(text: str, state: int) -> str | None:
    found = [f"/{name} " for name in COMMANDS if f"/{name}".startswith(text)] if text.startswith("/") else []
    return found[state] if state < len(found) else None


def _script_line(_: str) -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}; convert it first, for example with iconv") from None
    if not line:
        raise EOFError
    return line.removesuffix("\n")


PROG = "python -m tools.repl"
RUNS = "data"  # where runs are if nobody says so
ALIASES = {"temp": ("--temperature",), "tokens": ("--max-new-tokens",), "samples": ("--num-samples",)}
EXAMPLES = """
With a pipe for standard input, each line is a prompt (or a command), and only the answers go to standard output.

examples:
  {0} data                                  the newest run under data/
  {0} data/shakespeare_tiny_*/checkpoint_best.bin --temp 0.8
  {0} --compare data/RUN_A data/RUN_B       each prompt to two models
  echo "ROMEO:" | {0} data --tokens 50
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Talk to a model.", epilog=EXAMPLES.format(prog))
    parser.add_argument("paths", nargs="*", metavar="CHECKPOINT_OR_RUN", help="a checkpoint, or of a run its best one; "
                        "of several runs, or a folder of runs, that of the newest (default: data)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="answer each prompt from two checkpoints")
    sampling = parser.add_argument_group("how answers are made")
    for name, dial in DIALS.items():
        default = getattr(Settings, dial.field)
        sampling.add_argument(f"--{name}", *ALIASES.get(name, ()), metavar="N", dest=dial.field,
                              help=f"{dial.help} (default: {dial.unset if default is None else default})")
    parser.add_argument("--precision", choices=GENERATION_PRECISIONS,
                        help="default: that of the checkpoint; int8 reads a quarter of the bytes")
    parser.add_argument("--null", action="store_true",
                        help="end each answer with a NUL byte, since it may have line ends in it (scripts only)")
    return parser


def start(args: argparse.Namespace) -> int:
    if args.paths and args.compare:
        raise FesteError("name a checkpoint or run directories, or two with --compare A B")
    settings = _settings(args)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    models = [LoadedModel(path, args.precision) for path in args.compare or [_one_of(args.paths or [RUNS])]]
    for line in (line for loaded in models for line in loaded.passed_over):
        print(f"passed over: {line}", file=sys.stderr)
    repl = Repl(models, settings, interactive, "\0" if args.null else "\n")
    if not interactive:
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):  # not in a notebook
                stream.reconfigure(encoding="utf-8")
        return repl.run(_script_line)
    for loaded in models:
        repl.say(f"{loaded.name}: {loaded.model.num_parameters():,} parameters, step {loaded.step:,}", "bold")
    repl.say("/help lists the commands, Ctrl+C stops an answer, Ctrl+D ends")
    with line_editing():
        return repl.run(input)


def _one_of(paths: list[str]) -> Path:
    """The checkpoint or run that some paths mean: the only one, or the newest run."""
    if len(paths) == 1 and (not (path := Path(paths[0])).is_dir() or is_run(path) or has_checkpoint(path)):
        return path
    newest, count = newest_with_checkpoint(paths)
    print(f"{newest}: the newest of {count} runs" if count > 1 else f"{newest}: the only run", file=sys.stderr)
    return newest


def _settings(args: argparse.Namespace) -> Settings:
    values = {}
    for name, dial in DIALS.items():
        word = getattr(args, dial.field)
        if word is not None:
            try:
                values[dial.field] = dial.parse(word)
            except ValueError as error:
                raise ValueError(f"--{name}: {error}") from None
    return Settings(**values)


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    args = make_parser(prog).parse_args(argv)
    return guarded(lambda: _quietly(args), HINTS)


def _quietly(args: argparse.Namespace) -> int:
    """start, with the shell's code for Ctrl+C."""
    try:
        return start(args)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
