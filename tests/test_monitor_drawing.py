"""What the monitor draws with: pure functions of arrays, and text that a terminal may show."""

from __future__ import annotations

import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feste import terminal as text
from feste.terminal import fitted
from tools.monitor import colours, curve, numbers
from tools.monitor.curve import Axes, Series, View
from tools.monitor.numbers import smooth
from tools.monitor.runs import look_of

values = hnp.arrays(float, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32))


@given(values, st.integers(2, 60))
def test_decimation_loses_no_extreme(y, columns):
    x = np.arange(len(y), dtype=float)
    reduced = numbers.decimate(x, y, 0.0, len(y) - 1.0, columns)
    assert reduced.low.min() == y.min() and reduced.high.max() == y.max()
    assert reduced.last[-1] == y[-1] and len(reduced.place) == min(columns, len(np.unique(reduced.place)))
    assert (np.diff(reduced.place) > 0).all() and reduced.place[-1] < columns


def test_decimation_by_hand():
    reduced = numbers.decimate(np.arange(6.0), np.array([5, 1, 2, 9, 4, 3.0]), 1.0, 5.0, 2)
    assert reduced.place.tolist() == [0, 1]
    assert reduced.low.tolist() == [1, 3] and reduced.high.tolist() == [2, 9] and reduced.last.tolist() == [2, 3]


@given(values, st.floats(1, 100))
def test_ema_is_a_weighted_mean(y, span):
    """Against its definition: weights (1 - 1/span)^age, divided by their sum."""
    keep = 1 - 1 / span
    last = len(y) - 1
    weights = keep ** (last - np.arange(len(y)))
    expected = (weights * y).sum() / weights.sum()
    assert numbers.ema(y, span)[-1] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_smoothing_of_many_rows_is_that_of_all():
    y = np.random.default_rng(1).normal(size=40_000).cumsum() / 100
    x = np.arange(len(y), dtype=float)
    sx, sy = numbers.smooth(x, y, 250, 20_000, 40_000)
    assert len(sx) <= numbers.POOL_LIMIT and sx[0] >= 20_000
    whole = numbers.ema(numbers.ema(y, 125)[::-1], 125)[::-1]
    np.testing.assert_allclose(sy, whole[sx.astype(int)], atol=0.03)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(1, 12))
def test_ticks_are_round_and_in_range(low, width, most):
    made = numbers.ticks(low, low + width, most)
    assert len(made) <= most
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in made)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(allow_nan=True), st.floats(allow_nan=True)), max_size=40),
       st.integers(0, 60), st.integers(0, 20), st.booleans())
def test_draw_takes_any_numbers_and_fills_its_size(points, width, height, log):
    x, y = (np.array([point[i] for point in points], float) for i in (0, 1))
    fx, fy = numbers.finite(x, y)
    low, high = (float(fx[0]), float(fx[-1])) if len(fx) else (0.0, 1.0)
    axes = Axes(low, high, log, text.compact, levels=((3.0, "three"),), points=((low, 1.0, "★", ""),), cursor=low)
    picture = curve.draw([Series(fx, fy, "", "○")], axes, width, height)
    assert [sum(len(words) for words, _ in row) for row in picture.rows] == [width] * height


def test_draw_by_hand():
    """A falling line: the dots go from the top left to the bottom right."""
    x = np.arange(20.0)
    lines = str(curve.draw([Series(x, 20 - x, "")], Axes(0, 19, x_text=text.compact), 30, 7)).split("\n")
    plot = [line[10:] for line in lines[:5]]
    starts = [min((i for i, c in enumerate(line) if c != " "), default=None) for line in plot]
    assert starts == sorted(starts) and starts[0] == 0 and plot[4][-1] != " "
    assert "└" in lines[5] and lines[6].split()[0] == "0"


def test_points_that_are_not_joined_are_one_dot_a_row():
    y = np.where(np.arange(60) % 2, 1.0, 2.0)
    dots = []
    for joined in (False, True):
        series = Series(np.arange(60.0), y, "", joined=joined)
        text_of = str(curve.draw([series], Axes(0, 59, x_text=text.compact), 60, 12))
        dots.append(sum((ord(c) - 0x2800).bit_count() for c in text_of if 0x2800 < ord(c) < 0x2900))
    assert dots[0] == 60 and dots[1] > 10 * 60


def test_spikes_do_not_flatten_the_curve():
    y = np.linspace(3, 2, 400)
    y[200] = 1e6
    picture = curve.draw([Series(np.arange(400.0), y, "")], Axes(0, 399, x_text=text.compact), 80, 20)
    assert picture.y1 < 10


@given(st.lists(st.one_of(st.tuples(st.just("zoom"), st.floats(0.01, 100), st.one_of(st.none(), st.floats(0, 100))),
                          st.tuples(st.just("pan"), st.floats(-3, 3)))))
def test_view_stays_in_the_run(moves):
    view = View()
    for name, value, *at in moves:
        view = view.zoom(value, 0.0, 100.0, *at) if name == "zoom" else view.pan(value, 0.0, 100.0)
        x0, x1 = view.bounds(0.0, 100.0)
        assert -1e-6 <= x0 < x1 <= 100 + 1e-6


def test_zoom_holds_the_place_under_the_pointer():
    view = View().zoom(0.5, 0.0, 100.0, 30.0)
    assert view.bounds(0.0, 100.0) == (15.0, 65.0)
    assert View(20.0).bounds(0.0, 100.0) == (80.0, 100.0) and View(20.0).bounds(0.0, 200.0) == (180.0, 200.0)


def test_sparkline():
    assert numbers.sparkline(np.array([8.0, 4.0, 0.0]), 3) == "█▅▁"
    assert numbers.sparkline(np.array([math.nan, 1.0]), 5) == "▁"
    assert numbers.sparkline(np.array([]), 5) == ""
    assert len(numbers.sparkline(np.arange(1e5), 70)) == 70


@given(st.text())
def test_clean_leaves_nothing_a_terminal_acts_on(words):
    cleaned = text.clean(words)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in cleaned if c != "\n")


def test_clean_keeps_text():
    assert text.clean("a\r\nb\tc ümlaut 火 'x'") == "a\nb    c ümlaut 火 'x'"
    assert text.clean("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x1b[1;31mred\x1b[0m") == "link red"
    assert text.clean("\x1b]never ended") == "never ended"


@pytest.mark.parametrize(("seconds", "words"), [(0.5, "0.5s"), (59.7, "1m 00s"), (61, "1m 01s"), (3600, "1h 00m"),
                                                (90_000, "1d 01h"), (math.nan, "-"), (None, "-")])
def test_duration(seconds, words):
    assert text.duration(seconds) == words


# ---- colours and looks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("palette", [colours.DARK, colours.LIGHT], ids=["dark", "light"])
def test_colours_stand_out_from_their_background(palette):
    for colour in (palette.good, palette.warning, palette.bad, *palette.runs):  # names of runs are written in theirs
        assert colours.contrast(colour, palette.background) >= 4.5, colour
    assert len(set(palette.runs)) == len(palette.runs)
    assert colours.contrast("#000000", "#ffffff") == pytest.approx(21)


def test_every_run_has_a_look_of_its_own_that_it_keeps():
    names, looks = [f"run_{i}" for i in range(60)], {}
    for name in names:
        looks[name] = look_of(name, set(looks.values()))
    assert len(set(looks.values())) == 60
    assert look_of("run_7", set()) == look_of("run_7", set())
    first = {name: look_of(name, set()) for name in names[:5]}
    assert all(looks[name] == look for name, look in first.items() if list(first.values()).count(look) == 1)
    assert look_of("another", set(range(64))) in range(64)


def test_a_smooth_curve_does_not_lag():
    """While a loss falls, the mean is not above every point; and a straight line stays where it is."""
    x = np.arange(1000.0)
    y = 4 + 4 * np.exp(-x / 100)
    smoothed = smooth(x, y, 50, 0, 999)[1]
    assert abs(smoothed[40:900] - y[40:900]).max() < 0.15
    line = smooth(x, x, 50, 0, 999)[1]
    assert abs(line[150:850] - x[150:850]).max() < 0.5


@pytest.mark.parametrize(("value", "shown"), [(5.55555, "5.5556"), (55.55555, "55.556"), (248791.4, "248791"),
                                              (2.49e16, "2.5e16"), (1.234e-9, "0.0000"), (None, "-"),
                                              (-123456.7, "-1.2e5"),
                                              (float("nan"), "nan"), (float("inf"), "inf"), (9.99999, "10.000")])
def test_a_number_is_rounded_to_its_column(value, shown):
    assert fitted(value, 6) == shown
