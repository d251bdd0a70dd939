"""What is known of runs as plain text and as JSON, for scripts and for pipes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from feste import terminal as text

from ..runs import Summary
from .numbers import sparkline
from .runs import FollowedRun

SPARK_WIDTH = 60


def progress(s: Summary) -> str:
    steps = text.count(s.step) + (f" / {text.count(s.planned_steps)}" if s.planned_steps else "")
    share = f" ({100 * s.fraction:.1f} %)" if s.fraction is not None else ""
    return f"step {steps}{share}"


def times(s: Summary, both: bool = True) -> str:
    """How long it will take, as long as that is known, and how long it took."""
    left = [f"left {text.duration(s.seconds_left)}"] if s.seconds_left is not None else []
    return "  ".join(left + [f"elapsed {text.duration(s.elapsed_seconds)}"] * (both or not left))


def state(s: Summary) -> str:
    words = s.state.replace("_", " ")
    return f"{words}: {s.reason}" if s.reason else words


def losses(s: Summary) -> str:
    """Current and best losses with their perplexities and bits per byte, in one line."""
    parts = [f"train {text.number(s.train_loss)} ppl {text.perplexity(s.train_perplexity)}",
             f"val {text.number(s.val_loss)} ppl {text.perplexity(s.val_perplexity)}{_bits(s.val_bits_per_byte)}"]
    if s.best_val_loss is not None:
        parts.append(f"best {text.number(s.best_val_loss)} ppl {text.perplexity(s.best_val_perplexity)}"
                     f"{_bits(s.best_bits_per_byte)} at {text.count(s.best_step)}")
    return "  ".join(parts)


def _bits(value: float | None) -> str:
    return "" if value is None else f" bpb {value:.3f}"


def pace(s: Summary) -> str:
    ranks = f"  {s.ranks} ranks" if s.ranks else ""
    waiting = f", waiting {s.waiting:.0%}" if s.waiting is not None else ""
    return (f"{text.rate(s.steps_per_second)} steps/s  {text.rate(s.tokens_per_second)} tok/s  "
            f"lr {text.number(s.learning_rate, '.3g')}  grad norm {text.number(s.grad_norm, '.4g')}{ranks}{waiting}")


def as_text(runs: list[FollowedRun]) -> str:
    """A few lines for each run."""
    blocks = []
    for run in runs:
        s = run.summary
        lines = [f"{run.marker} {s.name}  {state(s)}",
                 f"{progress(s)}  {times(s)}",
                 losses(s), pace(s), sparkline(run.columns["train_loss"], SPARK_WIDTH)]
        lines += [f"! {problem}" for problem in s.problems]
        blocks.append("\n  ".join(line for line in lines if line))
    return "\n\n".join(blocks)


def as_json(runs: list[FollowedRun]) -> str:
    """A list with the fields of Summary; what is unknown or not finite is null."""
    return json.dumps([{name: None if isinstance(value, float) and not math.isfinite(value) else value
                        for name, value in asdict(run.summary).items()} for run in runs], indent=1)
