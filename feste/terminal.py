"""Numbers, durations and foreign text, as a terminal may show them."""

from __future__ import annotations

import math
import re
import unicodedata

UNKNOWN = "-"

# Sequences a terminal would act on: CSI, the string sequences (OSC, DCS, ...) with their end, and two-byte escapes.
ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
                     r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
                     r"|\x1b[ -/]*[0-~]?")


def clean(text: str) -> str:
    """A text without terminal escapes, control characters, direction overrides and lone surrogates.

    Line ends and tabs stay, as newlines and four spaces.
    """
    text = ESCAPES.sub("", text).replace("\r\n", "\n").translate({13: "\n", 9: "    ", 0x2028: "\n", 0x2029: "\n"})
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def clean_line(text) -> str:
    """Anything as one clean line."""
    return " ".join(clean(str(text)).split())


def shorten(text: str, width: int) -> str:
    """At most width characters; what is left out is in the middle, for names differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head):]


def number(value: float | None, form: str = ".4f") -> str:
    if value is None:
        return UNKNOWN
    return format(value, form) if math.isfinite(value) else str(value)


def fitted(value: float | None, width: int) -> str:
    """As many digits as fit, rounded; powers of ten where not even the whole number fits."""
    if value is None or not math.isfinite(value):
        return number(value)[:width]
    for form in (".4f", ".3f", ".2f", ".1f", ".0f", ".1e", ".0e"):
        text = format(value, form).replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
        if len(text) <= width:
            return text
    return text


def figure(value: float | None) -> str:
    """Four significant digits; from a thousand on, whole numbers."""
    return number(value, ",.0f" if value is not None and abs(value) >= 1000 else ".4g")


def perplexity(value: float | None) -> str:
    if value is None or math.isnan(value):
        return UNKNOWN
    if value < 99.95:
        return f"{value:#.3g}"
    return f"{value:,.0f}" if value < 1e5 else f"{value:.1e}"


def count(value: float | None) -> str:
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Three significant digits; from a thousand on, whole numbers."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def compact(value: float) -> str:
    """A short number for an axis: 1500 -> 1.5k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.6g}{unit}"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{rest}s"
