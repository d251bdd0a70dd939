"""Draw runs: `python -m tools.plot RUN... -o loss.png`, or .svg, or .html for a page that answers to the pointer.

Losses, perplexity, learning rate and gradient norm, the runs laid over one another and named by what differs in
their configuration.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from feste.arguments import Parser
from feste.cli import guarded
from feste.terminal import compact

from .comparison import labels
from .report import make_page
from .runs import Run, open_runs

FORMATS = (".png", ".svg", ".html")
# The colours of Okabe and Ito 2008, which most eyes tell apart, without the yellow that is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")   # a second round of the colours is dashed
FINE, COARSE = 1500, 60           # points of a curve as it is, and of its average
AXES = {"step": "step", "time": "elapsed_seconds"}
TIMES = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
FEWEST_UNITS = 3                  # hours from three of them on, and so on


def horizontal(runs: list[Run], x_axis: str) -> tuple[list[np.ndarray], str]:
    """The x of each run and what it is; a time in the unit that suits the longest run."""
    found = [run.columns[AXES[x_axis]] for run in runs]
    if x_axis != "time":
        return found, x_axis
    longest = max((x[np.isfinite(x)].max(initial=0.0) for x in found), default=0.0)
    name, unit = next((one for one in TIMES if longest >= FEWEST_UNITS * one[1]), TIMES[-1])
    return [x / unit for x in found], name


def extremes(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The finite points, or where there are more than `most` of them, the least and the greatest of neighbours."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2 + 1).astype(int)[:-1]
    pairs = np.stack([np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)], axis=1)
    return np.repeat(x[edges], 2), pairs.ravel()


def thin(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The finite points, or where there are more than `most` of them, means of neighbours."""
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


# ---- panels ------------------------------------------------------------------------------------------------
#
# A panel draws one run on matplotlib's axes, in the colour and line style of the run.


def _curve(axes, x, y, style: dict) -> None:
    """A noisy curve: pale as it is, with every spike, and its average on top."""
    axes.plot(*extremes(x, y, FINE), **style | {"linestyle": "-", "linewidth": 0.6, "alpha": 0.35})
    axes.plot(*thin(x, y, COARSE), **style)


def _validation(axes, x, y, style: dict) -> None:
    axes.plot(*thin(x, y, FINE), marker="o", markersize=3.5, markerfacecolor="white", **style)


def draw_losses(axes, run: Run, x: np.ndarray, style: dict) -> None:
    _curve(axes, x, run.columns["train_loss"], style)
    _validation(axes, x, run.columns["val_loss"], style)
    if run.best():
        loss, step = run.best()
        at = x[np.searchsorted(run.columns["step"], step)]
        axes.plot([at], [loss], marker="*", markersize=11, color=style["color"], markeredgecolor="white", zorder=5)


def draw_perplexity(axes, run: Run, x: np.ndarray, style: dict) -> None:
    axes.plot(*thin(x, run.columns["train_perplexity"], COARSE), **style)
    _validation(axes, x, run.columns["val_perplexity"], style)


def draw_learning_rate(axes, run: Run, x: np.ndarray, style: dict) -> None:
    axes.plot(*thin(x, run.columns["learning_rate"], FINE), **style)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_grad_norm(axes, run: Run, x: np.ndarray, style: dict) -> None:
    _curve(axes, x, run.columns["grad_norm"], style)


PANELS = {
    "loss, nats per token": draw_losses,
    "perplexity": draw_perplexity,
    "learning rate": draw_learning_rate,
    "gradient norm before clipping": draw_grad_norm,
}
LOGARITHMIC = ("perplexity", "gradient norm before clipping")


def draw_panel(axes, title: str, runs: list[Run], names: list[str], x_axis: str) -> None:
    places, what = horizontal(runs, x_axis)
    for i, (run, name, x) in enumerate(zip(runs, names, places, strict=True)):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
                 "linewidth": 1.6, "label": name}
        PANELS[title](axes, run, x, style)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(what)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if title in LOGARITHMIC and any((line.get_ydata() > 0.0).any() for line in axes.lines):
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    if title == "loss, nats per token":
        _leave_out_outliers(axes, runs)
        _explain_losses(axes, runs)
        _add_bits_per_byte(axes, runs)


def _add_bits_per_byte(axes, runs: list[Run]) -> None:
    """The losses in bits per byte on the right, where all runs have tokens of the same length."""
    found = {run.bits_per_byte(1.0) for run in runs}
    factor = found.pop() if len(found) == 1 else None
    if factor is not None:
        right = axes.secondary_yaxis("right", functions=(lambda nats: nats * factor, lambda bits: bits / factor))
        right.set_ylabel("bits per byte", fontsize=8)
        right.tick_params(labelsize=8)


def _plain_log_ticks(axes) -> None:
    """Numbers as a person writes them: 1, 2, 5, 10; only 1, 10, 100 in a long range, and any round ones in a short."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    low, high = axes.get_ylim()
    decimal = LogLocator(10.0, subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,), numticks=12)
    inside = [value for value in decimal.tick_values(low, high) if low <= value <= high]
    axes.yaxis.set_major_locator(decimal if len(inside) >= 3 else MaxNLocator(5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: compact(value))


def _leave_out_outliers(axes, runs: list[Run]) -> None:
    """A run that diverged must not flatten the others: what is twice as high as any run began is left out, and said."""
    sizes = [run.configuration().get("vocab_size") for run in runs]
    begun = [float(y[np.isfinite(y)][0]) for y in (run.columns["train_loss"] for run in runs) if np.isfinite(y).any()]
    top = 2.0 * max([math.log(size) for size in sizes if isinstance(size, int) and size > 1] or begun, default=0.0)
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.empty(0)])
    inside = values[np.isfinite(values) & (values <= top)]
    if len(inside) and (values > top).any():
        axes.set_ylim(float(inside.min()) - 0.05 * (top - float(inside.min())), top)
        axes.annotate(f"losses above {top:.3g} are left out", (0.5, 1.0), (0, -10), xycoords="axes fraction",
                      textcoords="offset points", ha="center", fontsize=8, color="dimgrey")


def _explain_losses(axes, runs: list[Run]) -> None:
    """What the lines mean, and the loss of a uniform guess, ln V, for each size of vocabulary."""
    from matplotlib.lines import Line2D
    sizes = {run.configuration().get("vocab_size") for run in runs}
    for size in sorted(size for size in sizes if isinstance(size, int) and size > 1):
        axes.axhline(math.log(size), color="grey", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(f"ln {size} = {math.log(size):.2f}, a uniform guess", (1.0, math.log(size)), (0, 2),
                      xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8,
                      color="dimgrey")
    axes.legend(handles=[Line2D([], [], color="dimgrey", linewidth=1.6, label="training"),
                         Line2D([], [], color="dimgrey", marker="o", markerfacecolor="white", label="validation"),
                         Line2D([], [], color="dimgrey", marker="*", linestyle="", markersize=9, label="best")],
                frameon=False, fontsize=8)


def legend_names(runs: list[Run]) -> list[str]:
    """Labels with the best loss, safe for matplotlib: no mathematics, no leading underscore."""
    names = []
    for run, label in zip(runs, labels(runs), strict=True):
        best = run.best()
        bits = run.bits_per_byte(best[0]) if best else None
        said = f", {bits:.3f} bits per byte" if bits else ""
        text = f"{label}  (best {best[0]:.3f}{said} at step {best[1]:,})" if best else label
        names.append((" " + text if text.startswith("_") else text).replace("$", r"\$"))
    return names


# ---- figures -----------------------------------------------------------------------------------------------


def _matplotlib():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib; install it with: pip install '.[plot]'") from None
    return matplotlib


def make_figure(runs: list[Run], x_axis: str = "step"):
    """All panels in one matplotlib figure."""
    _matplotlib()
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    names = legend_names(runs)
    for axes, title in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        draw_panel(axes, title, runs, names, x_axis)
    _add_legend(figure, runs, names)
    return figure


def _add_legend(figure, runs: list[Run], names: list[str]) -> None:
    """The runs, one line each, below the panels."""
    from matplotlib.lines import Line2D
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
                      linewidth=2.2, label=name) for i, name in enumerate(names)]
    columns = max(1, min(len(runs), 150 // max(map(len, names))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def render(figure, suffix: str) -> bytes:
    """The figure as PNG or SVG; the same figure gives the same bytes."""
    out = io.BytesIO()
    with _matplotlib().rc_context({"svg.hashsalt": "feste"}):
        undated = {"Date": None} if suffix == ".svg" else None
        figure.savefig(out, format=suffix.removeprefix("."), dpi=120, metadata=undated)
    return out.getvalue()


PROG = "python -m tools.plot"
EXAMPLES = """
examples:
  {0} data                                all runs under data/, to loss.png
  {0} data/a data/b --x time -o two.svg   two runs against the time they took
  {0} data -o report.html                 one page: curves, a table, samples
"""


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Draw the curves of runs.", epilog=EXAMPLES.format(prog))
    parser.add_argument("runs", nargs="*", metavar="RUN", default=["data"],
                        help="run directories, or folders that hold some (default: data)")
    parser.add_argument("-o", "--output", default="loss.png", metavar="FILE",
                        help=f"{', '.join(FORMATS)} by its ending (default: loss.png)")
    parser.add_argument("--x", choices=AXES, default="step", help="what the horizontal axis of a picture counts "
                        "(default: step); a page has a switch")
    return parser


def plot(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"{output} must end in {', '.join(FORMATS)}")
    suffix = output.suffix.lower()
    if suffix != ".html":
        _matplotlib()
    runs = open_runs(args.runs)
    data = make_page(runs).encode() if suffix == ".html" else render(make_figure(runs, args.x), suffix)
    try:
        output.write_bytes(data)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror}; choose another -o") from None
    print(f"wrote {output}")
    return 0


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    args = make_parser(prog).parse_args(argv)
    return guarded(lambda: plot(args))


if __name__ == "__main__":
    sys.exit(main())
