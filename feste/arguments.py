"""The parser of every command: what a person typed wrong is one line, with the flag that was meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without shortened flags, that shows examples as they are written, and is brief about errors."""

    def __init__(self, **settings) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | settings)

    def error(self, message: str) -> NoReturn:
        """Exit with 2, and one line on standard error instead of argparse's usage of fifteen."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = self._nearest(unknown.split())
        print(f"{self.prog}: error: {message}; --help lists everything", file=sys.stderr)
        sys.exit(2)

    def _nearest(self, words: list[str]) -> str:
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        if not flags:
            return f"nothing is to be done with {' '.join(words)!r}"
        close = difflib.get_close_matches(flags[0], self._option_string_actions, n=1)
        return f"there is no {flags[0]}" + (f", did you mean {close[0]}?" if close else "")
