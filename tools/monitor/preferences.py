"""What a person chose in the monitor, kept in the configuration folder; and what the terminal's background is."""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from contextlib import suppress
from pathlib import Path

from .panes import FEWEST_ROWS, LEAST, MOST, MOST_ROWS
from .picture import AXES, LINES, SPANS
from .runs import SORTS

DARK, LIGHT = "textual-dark", "textual-light"
CHOICES = {"theme": (DARK, LIGHT), "sort": SORTS, "axis": tuple(AXES), "log": (False, True), "span": tuple(SPANS),
           "lines": tuple(LINES), "share": tuple(range(LEAST, MOST + 1)),
           "rows": tuple(range(FEWEST_ROWS, MOST_ROWS + 1))}
# xterm's OSC 11. Every terminal answers the question behind it, so one that does not know the first is not waited for.
ASK_BACKGROUND = b"\x1b]11;?\x1b\\\x1b[c"
ANSWER_SECONDS = 0.3


def path() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "feste" / "monitor.json"


def read(file: Path) -> dict:
    """The choices of a file; whatever is not one, or cannot be read, is left out."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {name: kept[name] for name, values in CHOICES.items()
            if name in kept and any(type(kept[name]) is type(value) and kept[name] == value for value in values)}


def write(file: Path, choices: dict) -> None:
    """Keep the choices; a folder that cannot be written is no reason not to watch."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(choices, indent=1) + "\n", encoding="utf-8")


def theme_of_terminal() -> str:
    """The theme that suits the terminal's background, as it or COLORFGBG tells; dark if neither does."""
    light = is_light(_ask()) if sys.stdin.isatty() and sys.stdout.isatty() else None
    if light is None and (colours := os.environ.get("COLORFGBG", "").split(";"))[-1].isdigit():
        light = int(colours[-1]) in (7, 15)
    return LIGHT if light else DARK


def is_light(answer: bytes) -> bool | None:
    """Whether a terminal's answer names a light background; None if it names none."""
    found = re.search(rb"\x1b\]11;rgba?:([0-9a-fA-F]{1,4})/([0-9a-fA-F]{1,4})/([0-9a-fA-F]{1,4})", answer)
    if found is None:
        return None
    red, green, blue = (int(part, 16) / (16 ** len(part) - 1) for part in found.groups())
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5


def _ask() -> bytes:
    """What the terminal answers when it is asked for its background, up to the answer to the second question."""
    try:
        import termios
        import tty
    except ImportError:  # not on Windows
        return b""
    number, answer, until = sys.stdin.fileno(), b"", time.monotonic() + ANSWER_SECONDS
    try:
        before = termios.tcgetattr(number)
    except termios.error:
        return b""
    try:
        tty.setcbreak(number, termios.TCSANOW)
        os.write(sys.stdout.fileno(), ASK_BACKGROUND)
        while not re.search(rb"\x1b\[\?[\d;]*c", answer) and (left := until - time.monotonic()) > 0:
            if select.select([number], [], [], left)[0]:
                answer += os.read(number, 1024)
    except OSError:
        return b""
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)
    return answer
