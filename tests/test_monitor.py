"""The monitor: every key, the mouse, every fault of the files, and the drawing, which is pure functions."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from watched import Shown, append, info, make_run, rows, screen_text, until

from feste.run.follow import machine
from feste.run.names import COLUMNS, INFO, LOCK, LOG
from tools.monitor import app as app_module
from tools.monitor import summary
from tools.monitor.__main__ import main
from tools.monitor.app import POLL_SECONDS, Monitor
from tools.monitor.keys import KEYS
from tools.monitor.pages import Page
from tools.monitor.picture import Options
from tools.monitor.runs import Watch, in_order
from tools.monitor.widgets import Plot

ROOT = Path(__file__).parent.parent


# ---- runs to look at ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """New directories are looked for more often."""
    monkeypatch.setattr(app_module, "SCAN_SECONDS", 0.2)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three runs; in the order newest they are live, middle, old, by best loss middle, live, old."""
    make_run(tmp_path / "live", rows(100), info(started="2026-01-03"))
    make_run(tmp_path / "middle", rows(60, loss=3.0), info("finished", planned_steps=60, started="2026-01-02"))
    make_run(tmp_path / "old", rows(60, loss=9.0), info("failed", reason="TrainingDiverged: [red]no[/red]"))
    return tmp_path


# ---- the app in a test -------------------------------------------------------------------------------------


def state_of(app: Monitor) -> dict:
    options = app.plot.options
    base = app.screen_stack[0]
    return {"selected": app.selected.name, "pinned": tuple(Path(key).name for key in app.pinned), "sort": app.sort,
            "view": app.view, "zen": base.has_class("zen"), "theme": app.theme, "span": options.view.span,
            "end": options.view.end, "axis": options.axis, "log": options.log, "smooth": options.span,
            "lines": options.lines, "metric": options.metric, "cursor": options.cursor, "sample": app.sample_step,
            "hidden": len(options.hidden), "share": app.share, "rows": app.rows,
            "scroll": base.query_one("#sample_scroll").scroll_y, "page": type(app.screen).__name__,
            "over": not app.is_running or app._exit}


# key: (keys before it, what it changes). A value of ... is any other value than before.
EFFECTS = {
    "up": (["down", "down"], {"selected": "middle"}), "k": (["down"], {"selected": "live"}),
    "down": ([], {"selected": "middle"}), "j": (["j"], {"selected": "old"}),
    "space": (["down"], {"pinned": ("middle",)}), "u": (["space", "down", "space"], {"pinned": ()}),
    "s": ([], {"sort": "best loss"}),
    "tab": ([], {"view": "samples"}), "1": (["2"], {"view": "curve"}), "2": ([], {"view": "samples"}),
    "z": ([], {"zen": True}), "d": ([], {"theme": "textual-light"}),
    "plus": ([], {"span": 49.5}), "equals_sign": (["plus"], {"span": 24.75}), "minus": (["plus"], {"span": None}),
    "left": (["plus"], {"end": 87.625}), "h": (["plus", "left"], {"end": 75.25}),
    "right": (["plus", "left", "left"], {"end": 87.625}),
    "0": (["plus", "left"], {"span": None, "end": None}), "home": (["plus"], {"span": None}),
    "f": (["plus", "left"], {"end": None}), "end": (["plus", "left"], {"end": None}),
    "x": ([], {"axis": "time"}), "l": ([], {"log": True}), "e": ([], {"smooth": 50}),
    "w": ([], {"lines": "validation"}), "m": ([], {"metric": "learning rate"}),
    "comma": (["comma"], {"cursor": ...}), "full_stop": (["comma", "comma", "comma"], {"cursor": ...}),
    "escape": (["comma"], {"cursor": None}),
    "left_square_bracket": ([], {"sample": 90}),
    "right_square_bracket": (["left_square_bracket"] * 3, {"sample": 80}),
    "left_curly_bracket": ([], {"sample": 10}), "right_curly_bracket": (["left_square_bracket"], {"sample": None}),
    "pagedown": (["2"], {"scroll": ...}), "pageup": (["2", "pagedown"], {"scroll": 0}),
    "question_mark": ([], {"page": "Help"}), "f1": ([], {"page": "Help"}),
    "o": ([], {"page": "JournalPage"}), "i": ([], {"page": "Card"}), "enter": ([], {"page": "Card"}),
    "c": ([], {"hidden": 1}), "less_than_sign": ([], {"share": 70}), "greater_than_sign": ([], {"share": 80}),
    "left_parenthesis": ([], {"rows": 2}), "right_parenthesis": (["left_parenthesis"], {"rows": 3}),
    "q": ([], {"over": True}), "ctrl+c": ([], {"over": True}),
}


def test_every_key_has_a_test():
    assert sorted([*EFFECTS, "slash", "v"]) == sorted(key for one in KEYS for key in one.keys.split(","))


def reset(app: Monitor) -> None:
    """As at the start."""
    app.plot.options = Options()
    app.sort, app.sample_step, app.theme = "newest", None, "textual-dark"
    app.selected = in_order(app.runs(), "newest")[0]
    app.pinned.clear()
    app.share = app.rows = None
    app.screen_stack[0].remove_class("zen")
    app.action_view("both")
    app.screen_stack[0].query_one("#sample_scroll").scroll_home(animate=False)
    app.show()


async def check_key(app, pilot, key: str) -> None:
    """A key changes what it should and nothing else."""
    before_keys, expected = EFFECTS[key]
    await pilot.press(*before_keys)
    await pilot.pause()
    before = state_of(app)
    await pilot.press(key)
    await until(pilot, lambda: all(state_of(app)[name] != before[name] for name in expected))
    after = state_of(app)
    for name, value in expected.items():
        assert value is ... or after[name] == value, (key, name)
    assert {name: after[name] for name in after if name not in expected} == {
        name: before[name] for name in before if name not in expected}, key


async def test_keys(folder):
    async with Shown(folder) as (app, pilot):
        for key in EFFECTS:
            if key not in ("q", "ctrl+c"):
                await check_key(app, pilot, key)
                if isinstance(app.screen, Page):
                    await pilot.press("escape")
                reset(app)
                await pilot.pause()


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
async def test_keys_that_quit(folder, key):
    async with Shown(folder) as (app, pilot):
        await check_key(app, pilot, key)


async def test_cycles_come_round(folder):
    async with Shown(folder, size=(160, 48)) as (app, pilot):
        before = state_of(app)
        for key, times in (("s", 3), ("tab", 3), ("x", 3), ("l", 2), ("e", 4), ("w", 3), ("m", 4), ("z", 2), ("d", 2)):
            seen = set()
            for _ in range(times):
                await pilot.press(key)
                seen.add(str(state_of(app)))
            assert len(seen) == times, key
            assert state_of(app) == before, key


async def test_help_shows_every_key_and_closes(folder):
    async with Shown(folder, size=(100, 60)) as (app, pilot):
        for key in ("escape", "q", "question_mark", "f1"):
            await pilot.press("question_mark")
            await until(pilot, lambda: "Samples" in screen_text(app))
            shown = screen_text(app)
            for one in KEYS:
                assert f"{one.shown:9}{one.help}" in shown
            before = state_of(app)
            await pilot.press("tab", "s", "down")  # they do not reach what is below
            assert state_of(app) == before
            await pilot.press(key)
            assert not isinstance(app.screen, Page) and app.is_running


async def test_keys_without_any_run(tmp_path):
    keys = [key for key in EFFECTS if key not in ("q", "ctrl+c", "question_mark", "f1")]
    app = Monitor(Watch([tmp_path]))
    async with app.run_test() as pilot:
        await pilot.press(*keys)
        await until(pilot, lambda: "No run in" in screen_text(app))
        assert app.is_running


# ---- the mouse ---------------------------------------------------------------------------------------------


async def test_mouse_on_the_run_list(folder):
    async with Shown(folder) as (app, pilot):
        await pilot.click("#runs", offset=(10, 3))
        assert state_of(app)["selected"] == "old"
        await pilot.click("#runs", offset=(2, 2))
        assert state_of(app)["pinned"] == ("middle",) and state_of(app)["selected"] == "old"
        best = screen_text(app).splitlines()[0].index("best")
        await pilot.click("#runs", offset=(best + 1, 0))
        assert app.sort == "best loss"
        await until(pilot, lambda: "middle" in screen_text(app).splitlines()[1])


async def test_mouse_on_the_curve(folder):
    async with Shown(folder) as (app, pilot):
        await pilot.hover("#curve", offset=(45, 5))
        assert app.plot.options.cursor == pytest.approx(51.2, abs=0.1)
        await until(pilot, lambda: re.search(r"step 51  . train \d", screen_text(app)))
        app.plot._wheel(0.5, type("Event", (), {"x": 45, "stop": lambda self: None})())
        low, high = app.plot.options.view.bounds(1, 100)
        assert high - low == pytest.approx(49.5) and low < 50 < high
        await pilot.mouse_down("#curve", offset=(40, 5))
        await pilot.hover("#curve", offset=(60, 5))
        await pilot.mouse_up("#curve", offset=(60, 5))
        assert app.plot.options.view.bounds(1, 100)[0] < low
        moved = app.plot.options.view
        await pilot.hover("#curve", offset=(20, 5))  # the button is up
        assert app.plot.options.view == moved


async def test_mouse_on_tabs_footer_and_scrub_bar(folder):
    async with Shown(folder) as (app, pilot):
        await pilot.click("#tabs", offset=(14, 0))
        assert app.view == "samples"
        await pilot.pause()
        await pilot.click("#sample_bar", offset=(1, 0))
        assert app.sample_step == 10
        await until(pilot, lambda: "sample 1 of 10  step 10" in screen_text(app))
        sort = screen_text(app).splitlines()[-1].index("Sort")
        await pilot.click("Footer", offset=(sort + 1, 0))
        assert app.sort == "best loss"


# ---- what is on the screen ---------------------------------------------------------------------------------

SHOWN = ["live  running", "step 100 / 400 (25.0 %)", "left 2m 30s", "train 1.5071 ppl 4.51", "val 1.6071 ppl 4.99",
         "best 1.6071 ppl 4.99 at 100", "2 steps/s", "4,096 tok/s", "lr 0.0003", "grad norm 1.5", "loss █",
         "ln V = 6.24", "best 1.6071 at 100", ">◉", "★", "○", "100 %"]
LEFT_OUT = ("loss █", ">◉", "100 %")  # of a low screen, without a list

@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
async def test_everything_is_on_the_screen(folder, size):
    async with Shown(folder, size=size) as (app, pilot):
        await until(pilot, lambda: "★" in screen_text(app))
        shown = screen_text(app)
        for words in (one for one in SHOWN if size[1] >= 30 or one not in LEFT_OUT):
            assert words in shown, words
        assert "To be sample of step 100" in shown
        await pilot.press("2")
        await until(pilot, lambda: "To be sample of step 100" in screen_text(app))
        assert "sample 10 of 10  step 100  newest" in screen_text(app)


async def test_a_large_window_shows_the_other_metrics_beside_the_loss(folder):
    async with Shown(folder, size=(200, 60)) as (app, pilot):
        metrics = ("learning rate  ◉ 0.0003", "gradient norm  ◉ 1.5", "tokens per second  ◉ 4,096")
        await until(pilot, lambda: all(name in screen_text(app) for name in metrics))
        await pilot.press("m")  # the large plot and a small one change places
        await until(pilot, lambda: "learning rate  ◉ live 0.0003" in screen_text(app) and "★ best" in screen_text(app))
        await pilot.hover("#gradient_norm", offset=(40, 3))  # one reading line for all
        step = f"step {app.plot.options.cursor:,.0f}  ◉ "
        await until(pilot, lambda: screen_text(app).count(step) == 4)
        await pilot.press("1")
        await until(pilot, lambda: "gradient norm" not in screen_text(app))


@pytest.mark.parametrize("size", [(20, 5), (40, 10), (81, 3), (300, 100)])
async def test_odd_sizes(folder, size):
    async with Shown(folder, size=size) as (app, pilot):
        await pilot.press("space", "down", "tab", "z", "question_mark", "escape")
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: app.size.width == 80)
        assert app.is_running


async def test_pinned_run_stays_while_another_is_selected(folder):
    async with Shown(folder) as (app, pilot):
        await pilot.press("down", "space", "up")
        await until(pilot, lambda: "at 100  ■ middle" in screen_text(app))
        assert "■P" in screen_text(app)
        plot = "\n".join(screen_text(app).splitlines()[-12:])
        assert plot.count("■") > 2 and plot.count("◉") > 2  # told apart without colour
        await pilot.press("u")
        await until(pilot, lambda: "at 100  ■ middle" not in screen_text(app))


async def test_new_rows_come_to_the_screen(folder):
    assert POLL_SECONDS <= 0.5
    async with Shown(folder) as (app, pilot):
        append(folder / "live", rows(20, first=101))
        await until(pilot, lambda: "step 120 / 400" in screen_text(app))
        await pilot.press("2")
        await until(pilot, lambda: "sample 12 of 12  step 120" in screen_text(app))


async def test_scrubbing_stays_at_its_step(folder):
    async with Shown(folder) as (app, pilot):
        await pilot.press("2", "[")
        append(folder / "live", rows(20, first=101))
        await until(pilot, lambda: "sample 9 of 12  step 90" in screen_text(app))
        await pilot.press("down")  # another run at the same step, or the last one before it
        await until(pilot, lambda: "sample 6 of 6  step 60" in screen_text(app))


async def test_time_axis_keeps_the_part_in_view(folder):
    async with Shown(folder) as (app, pilot):
        await pilot.press("plus", "left", "x")
        view = app.plot.options.view
        assert view.end == pytest.approx(87.625 / 2) and view.span == pytest.approx(49.5 / 2)
        await until(pilot, lambda: "30s" in screen_text(app))


async def test_tokens_axis(tmp_path):
    make_run(tmp_path / "run", rows(100), info(tokens_per_step=2048))
    make_run(tmp_path / "untold", rows(100), info(started="2025"))
    async with Shown(tmp_path) as (app, pilot):
        await pilot.press("x", "x", "comma", "comma")
        await until(pilot, lambda: re.search(r"20\d,\d{3} tokens  . train 1\.5", screen_text(app)))
        assert "by tokens" in screen_text(app) and "150k" in screen_text(app)
        await pilot.press("escape", "down")  # run.json does not tell how many tokens a step has
        await until(pilot, lambda: "no values here yet" in screen_text(app))


async def test_the_reading_line_beyond_the_end_of_a_run(folder):
    async with Shown(folder) as (app, pilot):
        await pilot.press("down", "space", "up", "comma")
        await until(pilot, lambda: re.search(r"step 100  . train 1\.\d+  val 1\.\d+  ■ train -  val -",
                                             screen_text(app)))


async def test_only_what_is_noisy_is_smoothed(folder):
    async with Shown(folder) as (app, pilot):
        await pilot.press("m")
        await until(pilot, lambda: "learning rate  by step  raw" in screen_text(app))
        await pilot.press("m")
        await until(pilot, lambda: "gradient norm  by step  mean of 10" in screen_text(app))


async def test_names_as_the_examples_make_them_fit_80_columns(tmp_path):
    name = "shakespeare_medium_20261125_235736"
    make_run(tmp_path / name, rows(3), info("interrupted"))
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: f"{name} " in screen_text(app).splitlines()[1])
        ends = [[word.end() for word in re.finditer(r"\S+", line)][-4:] for line in screen_text(app).splitlines()[:2]]
        assert ends[0] == ends[1]  # figures are below the ends of their heads


async def test_colours_stay_when_a_run_comes(folder):
    async with Shown(folder) as (app, pilot):
        colours = {run.name: (run.colour, run.marker) for run in app.runs()}
        assert len(set(colours.values())) == 3
        make_run(folder / "a_new_one", rows(5), info())
        await until(pilot, lambda: len(app.runs()) == 4)
        await pilot.press("s")
        assert {run.name: (run.colour, run.marker) for run in app.runs()}.items() >= colours.items()


async def test_a_long_run_list_scrolls_to_the_selected_run(tmp_path):
    for number in range(30):
        make_run(tmp_path / f"run_{number:02}", rows(3), info())
    async with Shown(tmp_path) as (app, pilot):
        await pilot.press("s", "s", *["down"] * 40)
        await until(pilot, lambda: "run_29" in screen_text(app).splitlines()[5])
        assert app.selected.name == "run_29"
        app.screen.query_one("#runs").scroll_home(animate=False)
        app.show()  # does not take away what the wheel has brought
        await until(pilot, lambda: "run_00" in screen_text(app).splitlines()[1])


# ---- faults ------------------------------------------------------------------------------------------------


async def test_partial_last_line(tmp_path):
    run = make_run(tmp_path / "run", rows(20), info())
    whole = (run / LOG).read_bytes()
    (run / LOG).write_bytes(whole[:-100])  # in the quotes of the last sample
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: "step 19 / 400" in screen_text(app))
        (run / LOG).write_bytes(whole)
        await until(pilot, lambda: "step 20 / 400" in screen_text(app))
        assert app.selected.summary.problems == ()


async def test_truncated(tmp_path):
    run = make_run(tmp_path / "run", rows(50), info())
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: "step 50 / 400" in screen_text(app))
        await pilot.press("plus", "left", "comma", "[")  # looking at what goes away
        make_run(run, rows(8))
        await until(pilot, lambda: "step 8 / 400" in screen_text(app))
        make_run(run, [])
        await until(pilot, lambda: "no rows yet" in screen_text(app))
        (run / LOG).write_bytes(b"")
        append(run, [])
        await pilot.pause(0.1)
        make_run(run, rows(9))
        await until(pilot, lambda: "step 9 / 400" in screen_text(app))


async def test_replaced(tmp_path):
    run = make_run(tmp_path / "run", rows(50), info())
    other = make_run(tmp_path / "hidden" / "other", rows(70, loss=12.0))
    async with Shown(run) as (app, pilot):
        await until(pilot, lambda: "step 50 / 400" in screen_text(app))
        os.replace(other / LOG, run / LOG)
        await until(pilot, lambda: "step 70 / 400" in screen_text(app))
        assert app.selected.columns["train_loss"][0] == 12.0


async def test_resumed(tmp_path):
    run = make_run(tmp_path / "run", rows(50), info("interrupted", reason="SIGINT"))
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: "interrupted: SIGINT" in screen_text(app))
        append(run, rows(30, first=41))
        (run / INFO).write_text(json.dumps(info()))
        await until(pilot, lambda: "step 70 / 400" in screen_text(app) and "run  running" in screen_text(app))
        np.testing.assert_array_equal(app.selected.columns["step"], np.arange(1, 71))


@pytest.mark.parametrize("missing", ["elapsed_seconds", "train_loss", "val_loss", "sample"])
async def test_missing_column(tmp_path, missing):
    make_run(tmp_path / "run", rows(30), info(), [name for name in COLUMNS if name != missing])
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: f"! the log has no column {missing}" in screen_text(app))
        await pilot.press("x", "m", "m", "m", "m", "2", "[", "tab")
        await until(pilot, lambda: "step 30 / 400" in screen_text(app))


@pytest.mark.parametrize("content", [b"name,age\nann,3\nbob,4\n", b"step,loss\n1,2\n2,3\n", b"\x00\xff" * 500 + b"\n",
                                     b"", b"\n\n", b'"' * 999, b"step,train_loss\n1,x\n2,y\n"])
async def test_foreign_csv(tmp_path, content):
    run = make_run(tmp_path / "run", [])
    (run / LOG).write_bytes(content)
    async with Shown(tmp_path) as (app, pilot):
        await pilot.press("space", "x", "l", "m", "2", "[", "comma")
        await until(pilot, lambda: "unknown" in screen_text(app))


@pytest.mark.parametrize("content", [
    "{", "[]", json.dumps({"state": ["x"], "planned_steps": "many", "started": 3, "model": 7, "train": [], "host": {}}),
    json.dumps({"state": "running", "planned_steps": -5, "parameters": 1e99, "model": {"vocab_size": 0}, "pid": "x"}),
    json.dumps({"state": "failed", "reason": {"a": ["\x1b[2J"]}, "planned_steps": 10**30,
                "train": {"sample_prompt": 5}})])
async def test_foreign_info(tmp_path, content):
    run = make_run(tmp_path / "run", rows(30))
    (run / INFO).write_text(content)
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: "step 30" in screen_text(app))
        assert app.selected.summary.state in ("unknown", "running", "failed")
        json.loads(summary.as_json(app.runs()))


async def test_directory_that_appears_later(tmp_path):
    app = Monitor(Watch([tmp_path / "data"]))
    async with app.run_test(size=(80, 34)) as pilot:
        await until(pilot, lambda: "No run in" in screen_text(app))
        (tmp_path / "data" / "run").mkdir(parents=True)
        (tmp_path / "data" / "run" / INFO).write_text(json.dumps(info()))
        await until(pilot, lambda: "run  running" in screen_text(app))
        make_run(tmp_path / "data" / "run", rows(7))
        await until(pilot, lambda: "step 7 / 400" in screen_text(app))


async def test_directory_that_vanishes_and_returns(tmp_path):
    run = make_run(tmp_path / "data" / "run", rows(30), info())
    async with Shown(tmp_path / "data") as (app, pilot):
        shutil.rmtree(tmp_path / "data")
        await until(pilot, lambda: "run  gone" in screen_text(app))
        await pilot.press("space", "x", "2", "[", "1", "plus", "comma")
        assert "step 30" in screen_text(app)
        make_run(run, rows(12), info())
        await until(pilot, lambda: "step 12 / 400" in screen_text(app) and "run  running" in screen_text(app))


EVIL = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x1bPq#0\x1b\\e\x00\x08\x7ff\u202eg\x1b[?1049hh [red]i[/red] \udc80j"


async def test_terminal_escapes(tmp_path):
    """In samples, names and reasons; and brackets are not markup."""
    record = rows(1)[0] | {"sample": EVIL.replace("\udc80", "")}
    make_run(tmp_path / "run\x1b[2J[bold]x", [record], info("failed", reason=EVIL, train={"sample_prompt": EVIL}))
    async with Shown(tmp_path, size=(200, 50)) as (app, pilot):
        await until(pilot, lambda: "abcdefgh [red]i[/red] " in screen_text(app))
        shown = screen_text(app)
        assert "failed: abcdefgh [red]i[/red] j" in shown and "run[bold]x" in shown
        assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown if c != "\n")
        assert "\x1b" not in summary.as_text(app.runs())


async def test_nan_and_inf(tmp_path):
    records = rows(60)
    for row, value in zip(records[20:26], [math.nan, math.inf, -math.inf, 1e308, -1e308, math.nan], strict=True):
        row |= {"train_loss": value, "val_loss": value, "grad_norm": value, "elapsed_seconds": value,
                "tokens_per_second": value, "learning_rate": value}
    make_run(tmp_path / "run", [*records[:-1], records[-1] | {"train_loss": math.nan}], info())
    make_run(tmp_path / "nothing", [row | {"train_loss": math.nan, "elapsed_seconds": math.nan} for row in rows(4)])
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: "! the loss is not finite in 5 rows, last at step 60" in screen_text(app))
        for key in ("l", "x", "l", "m", "m", "m", "m", "e", "plus", "comma", "comma", "down", "0", "x", "space", "up"):
            await pilot.press(key)
            await pilot.pause()
        assert "train nan" in screen_text(app)
        json.loads(summary.as_json(app.runs()), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


async def test_nothing_new_is_not_drawn_again(folder, monkeypatch):
    shows, draws = [], []
    monkeypatch.setattr(Monitor, "on_monitor_polled", lambda app: shows.append(1))
    monkeypatch.setattr(Plot, "render", lambda plot: draws.append(plot.id) or "")
    async with Shown(folder, ready=lambda: bool(shows)) as (app, pilot):
        monkeypatch.setattr(app_module, "POLL_SECONDS", 0.01)
        app._waiting.clear()
        app.show()
        await pilot.pause(0.3)
        quiet = len(shows), len(draws)
        for _ in range(5):
            app.show()
            await pilot.pause(0.05)
        assert (len(shows), len(draws)) == quiet
        append(folder / "live", rows(20, first=101))
        await until(pilot, lambda: len(shows) > quiet[0])
        app.show()
        await until(pilot, lambda: "curve" in draws[quiet[1]:])


async def test_files_that_change_while_they_are_looked_at(tmp_path, monkeypatch):
    """Truncations, growth and resumption faster than the screen, with every part of it in use."""
    run = make_run(tmp_path / "run", rows(300), info())
    over = threading.Event()

    def disturb() -> None:
        for turn in itertools.cycle(range(4)):
            if over.wait(0.02):
                return
            (lambda: make_run(run, rows(300)), lambda: append(run, rows(200, first=250)),
             lambda: make_run(run, rows(20)), lambda: append(run, rows(30, first=11)))[turn]()

    async with Shown(tmp_path, size=(160, 40)) as (app, pilot):
        disturber = threading.Thread(target=disturb)
        monkeypatch.setattr(app_module, "POLL_SECONDS", 0.03)
        disturber.start()
        try:
            for key in ["[", "plus", "comma", "x", "w", "left", "m", "[", "m", "m", "m", "]", "l", "{"]:
                app.simulate_key(key)  # does not wait for the screen to come to rest
                await asyncio.sleep(0.06)
        finally:
            over.set()
            disturber.join()
        make_run(run, rows(33))
        await until(pilot, lambda: "step 33 / 400" in screen_text(app))


async def test_crashed_and_stalled(tmp_path):
    make_run(tmp_path / "crashed", rows(30), info(locked=True, **machine()))
    (tmp_path / "crashed" / LOCK).touch()
    os.utime(tmp_path / "crashed" / LOG, (time.time() - 60,) * 2)
    make_run(tmp_path / "stalled", rows(30), info())
    os.utime(tmp_path / "stalled" / LOG, (1, 1))
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: {run.name: run.summary.state for run in app.runs()} == {
            "crashed": "crashed", "stalled": "stalled"})
        stalled = next(run for run in app.runs() if run.name == "stalled").summary
        assert stalled.steps_per_second is None and stalled.seconds_left is None


async def test_loss_spike(tmp_path):
    make_run(tmp_path / "run", [*rows(99), rows(1, first=100)[0] | {"train_loss": 5.0}], info())
    async with Shown(tmp_path) as (app, pilot):
        await until(pilot, lambda: "! loss spike: 5, the median of recent rows is" in screen_text(app))


def test_reading_changes_nothing(folder):
    def contents():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    before = contents()
    Watch([folder]).read()
    assert contents() == before


# ---- the command line --------------------------------------------------------------------------------------


def test_once(folder, capsys):
    assert main([str(folder), "--once"]) == 0
    printed = capsys.readouterr().out
    assert "live  running\n  step 100 / 400 (25.0 %)  left 2m 30s  elapsed 50s\n" in printed
    assert "failed: TrainingDiverged: [red]no[/red]" in printed and "train 1.5071 ppl 4.51" in printed


def test_json(folder, capsys):
    assert main([str(folder / "live"), str(folder / "old" / LOG), "--json"]) == 0
    live, old = json.loads(capsys.readouterr().out)
    assert live["name"] == "live" and live["best_step"] == 100 and live["seconds_left"] == pytest.approx(150)
    assert old["state"] == "failed" and old["step"] == 60


@pytest.mark.parametrize("program", [["tools.monitor", "--json"], ["tools.monitor", "--once"], ["tools.compare"],
                                     ["tools.compare", "--json"]])
def test_a_reader_that_has_enough_is_no_error(folder, program):
    run = make_run(folder / "long", [row | {"sample": "x" * 200_000} for row in rows(1)], info(reason="y" * 200_000))
    done = subprocess.run(f"{sys.executable} -m {' '.join(program)} {run} | head -c 5", shell=True, cwd=ROOT,
                          capture_output=True)
    assert (len(done.stdout), done.stderr) == (5, b"")


@pytest.mark.parametrize("arguments", [["nowhere", "--once"], ["{}/file.csv"], ["{}"]])
def test_errors_are_one_line(tmp_path, arguments, capsys):
    (tmp_path / "file.csv").write_text("a,b\n")
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_demo(capsys):
    assert main(["--demo", "--json"]) == 0
    states = {run["name"]: run["state"] for run in json.loads(capsys.readouterr().out)}
    assert states == {"demo_medium": "running", "demo_small": "finished", "demo_hot_learning_rate": "failed",
                      "demo_killed": "crashed"}


def test_neither_model_nor_kernels_are_imported():
    code = "import sys, tools.monitor.app; print(sorted(m for m in sys.modules if m.startswith('feste.')))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "feste.run.follow" in printed
    assert not any(name in printed for name in ("model", "_ops", "ops'", "checkpoint", "trainer", "tokenizer", "optim"))


def test_sorting(folder):
    runs = Watch([folder]).read()
    assert [run.name for run in in_order(runs, "newest")] == ["live", "middle", "old"]
    assert [run.name for run in in_order(runs, "best loss")] == ["middle", "live", "old"]
