"""The command `feste`: one word for each thing that a person does with it. `python -m feste` is the same.

Each word is a module with `make_parser(prog)` and `main(argv, prog)`. The tools are the subpackage feste.tools, which
the build makes of the folder tools/; in a checkout that folder lies beside this package.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import feste

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Command:
    module: str
    summary: str


COMMANDS = {
    "train": Command("feste.cli", "train a model, fine-tune one, or go on with a run"),
    "monitor": Command("feste.tools.monitor.__main__", "watch runs live in the terminal"),
    "repl": Command("feste.tools.repl.__main__", "talk to a model"),
    "plot": Command("feste.tools.plot", "draw the curves of runs"),
    "compare": Command("feste.tools.compare", "what differs between runs, and how each went"),
    "prepare": Command("feste.tools.prepare", "make texts larger than memory into a directory of tokens"),
    "import": Command("feste.tools.import_model", "make a checkpoint of a GPT-2 from Hugging Face"),
    "export": Command("feste.tools.export", "write a model for transformers, llama.cpp, ollama"),
    "bench": Command("feste.tools.bench.__main__", "measure speed, beside PyTorch and others"),
    "doctor": Command("feste.tools.doctor", "what this machine can do and what it lacks; for bug reports"),
    "completion": Command("feste.tools.completion", "print completions for bash, zsh or tcsh"),
}

HELP = """\
usage: feste COMMAND ...

Trains GPT-2 style transformers from scratch on an ordinary CPU.

the first three things to type:
  feste train          train the tiny model on Shakespeare, some seconds
  feste monitor        watch it, in another terminal
  feste repl data      talk to it

commands:
{commands}

`feste COMMAND --help` tells the rest; `feste --version` the version."""


def help_text() -> str:
    return HELP.format(commands="\n".join(f"  {name:12} {command.summary}" for name, command in COMMANDS.items()))


def load(command: Command) -> ModuleType:
    """The module of a command."""
    if not Path(feste.__file__).with_name("tools").exists() and (ROOT / "tools").is_dir() \
            and str(ROOT) not in feste.__path__:
        feste.__path__.append(str(ROOT))  # a checkout
    return import_module(command.module)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"feste {feste.__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"error: feste has no command {name!r}; " + (f"did you mean {near[0]}?" if near else
              f"it has {', '.join(COMMANDS)}"), file=sys.stderr)
        return 2
    return load(COMMANDS[name]).main(rest, f"feste {name}")


if __name__ == "__main__":
    sys.exit(main())
