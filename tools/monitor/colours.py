"""The colours of runs and states: one palette for a dark background, one for a light, each with contrast enough.

Text has at least 4.5 : 1 on its background and curves 3 : 1 (WCAG 2.2, success criteria 1.4.3 and 1.4.11).
"""

from __future__ import annotations

from dataclasses import dataclass

MARKERS = "●■▲◆▼◉✚✖"


@dataclass(frozen=True)
class Palette:
    """runs: told apart by most colour-blind eyes (after Okabe and Ito 2008), and by the marker without any colour."""

    background: str
    runs: tuple[str, ...]
    good: str
    warning: str
    bad: str

    def state(self, state: str) -> str:
        """How a state is written."""
        bold = {"running": self.good, "failed": self.bad, "crashed": self.bad, "stalled": self.warning}
        return f"bold {bold[state]}" if state in bold else "dim" if state in ("gone", "waiting") else ""


DARK = Palette("#121212", ("#56b4e9", "#e69f00", "#2fbf8f", "#cc79a7", "#e8dc4a", "#e2703a", "#8c9eff", "#a8a8a8"),
               good="#4ade80", warning="#facc15", bad="#ff8a80")
LIGHT = Palette("#e0e0e0", ("#00598c", "#7a4b00", "#00614a", "#8a2f66", "#5c5400", "#9a3409", "#3b45b5", "#4d4d4d"),
                good="#0b6030", warning="#6b4f00", bad="#a1160f")
palette = DARK


def use(dark: bool) -> None:
    """From now on, colours are those for a dark or a light background."""
    global palette
    palette = DARK if dark else LIGHT


def contrast(one: str, other: str) -> float:
    """The ratio of two colours' luminances, 1 to 21."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb in sRGB."""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
