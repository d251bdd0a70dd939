"""Completions of the command `feste` for a shell, made out of the parsers of all commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from feste.__main__ import COMMANDS, load
from feste.arguments import Parser

PROG = "python -m tools.completion"
EXAMPLES = """
examples:
  eval "$({0} bash)"      in ~/.bashrc
  {0} zsh > _feste        in a folder of $fpath
  eval `{0} tcsh`         in ~/.cshrc
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Print completions for a shell.",
                    epilog=EXAMPLES.format(prog))
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """All commands and their flags in one parser."""
    whole = Parser(prog="feste")
    words = whole.add_subparsers(dest="command")
    for name, command in COMMANDS.items():
        own = load(command).make_parser(f"feste {name}")
        words.add_parser(name, parents=[own], add_help=False, help=command.summary)
    return whole


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    shell = make_parser(prog).parse_args(argv).shell
    try:
        import shtab
    except ImportError:
        print('error: completions need shtab; install it with: pip install "feste[completion]"', file=sys.stderr)
        return 2
    print(shtab.complete(whole_parser(), shell=shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
