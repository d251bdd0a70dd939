"""Panes that are divided anew, curves that are switched off, and the journal of a run."""

import pytest
from watched import Shown, info, make_run, rows, screen_text, until

from feste.run.names import JOURNAL
from tools.monitor import machine, preferences
from tools.monitor.app import Monitor
from tools.monitor.pages import JournalPage
from tools.monitor.panes import LEAST, MOST
from tools.monitor.picture import Options, picture
from tools.monitor.runs import Watch
from tools.monitor.widgets import RunTable


@pytest.fixture
def folder(tmp_path):
    for n in range(12):
        make_run(tmp_path / f"run{n:02}", rows(40, loss=4.0 + n), info(started=f"2026-01-{n + 1:02}"))
    return tmp_path


def width_of(app, name: str) -> int:
    return app.query_one(name).size.width


async def test_keys_and_the_mouse_divide_the_room(folder):
    async with Shown(folder, size=(150, 40)) as (app, pilot):
        before = width_of(app, "#curve")
        await pilot.press("less_than_sign")
        await until(pilot, lambda: width_of(app, "#curve") < before)
        await pilot.mouse_down("#divider")
        await pilot.hover("#curve", offset=(50, 5))
        await pilot.mouse_up("#curve", offset=(50, 5))
        await until(pilot, lambda: abs(width_of(app, "#curve") - 50) <= 1)
        assert width_of(app, "#side") + width_of(app, "#curve") == 149
        for key, share in (("less_than_sign", LEAST), ("greater_than_sign", MOST)):
            await pilot.press(*[key] * 20)
            assert app.share == share
        await pilot.press("1")
        await until(pilot, lambda: width_of(app, "#curve") == 150)


async def test_where_the_sample_stands_below_the_heights_change(folder):
    async with Shown(folder, size=(80, 24)) as (app, pilot):
        height = app.plot.size.height
        await pilot.press(*["less_than_sign"] * 5)
        await until(pilot, lambda: app.plot.size.height < height)
        assert app.plot.size.width == 80
        await pilot.resize_terminal(150, 40)
        await until(pilot, lambda: abs(width_of(app, "#curve") - 75) <= 1)


async def test_more_runs_are_seen_and_the_selected_one_always(folder):
    async with Shown(folder, size=(100, 40)) as (app, pilot):
        table = app.query_one(RunTable)
        before = table.size.height
        await pilot.press(*["right_parenthesis"] * 4)
        await until(pilot, lambda: table.size.height == before + 4)
        await pilot.press(*["left_parenthesis"] * 30)
        await until(pilot, lambda: table.size.height == 2)
        await pilot.press(*["down"] * 7)
        await until(pilot, lambda: app.selected.name in screen_text(app).split("\n")[1])


async def test_the_division_is_kept(folder, tmp_path):
    kept = tmp_path / "kept.json"
    app = Monitor(Watch([folder]), {}, kept)
    async with app.run_test(size=(150, 40)) as pilot:
        await until(pilot, lambda: app.selected is not None)
        await pilot.press("less_than_sign", "right_parenthesis")
    choices = preferences.read(kept)
    again = Monitor(Watch([folder]), choices)
    async with again.run_test(size=(150, 40)) as pilot:
        await until(pilot, lambda: again.selected is not None)
        assert (again.share, again.rows) == (app.share, app.rows) == (choices["share"], choices["rows"])
    kept.write_text('{"share": 500, "rows": "x"}')
    assert preferences.read(kept) == {}


# ---- curves ------------------------------------------------------------------------------------------------


def test_a_curve_that_is_off_is_not_drawn_but_named(folder):
    one, two, three = Watch([folder]).read()[:3]
    drawn = picture(one, [two, three], Options(), 150, 20)
    without = picture(one, [two, three], Options(hidden=frozenset({two.key})), 150, 20)
    marks = ["".join(piece for row in made.rows for piece, _ in row) for _, made in (drawn, without)]
    assert two.marker in marks[0] and two.marker not in marks[1] and three.marker in marks[1]
    assert f"{two.marker} {two.name} (off)" in [piece for piece, _ in without[0]]
    reading = picture(one, [two, three], Options(cursor=20.0, hidden=frozenset({two.key})), 150, 20)[0]
    assert len(reading) == 3  # the step, and two runs
    everything = frozenset({one.key, two.key, three.key})
    assert picture(one, [two, three], Options(hidden=everything), 150, 20)[1].rows


async def test_a_click_on_a_name_over_the_curve_switches_it(folder):
    async with Shown(folder, size=(150, 40)) as (app, pilot):
        await pilot.press("space", "down")
        pinned = app.watch.runs[app.pinned[0]]
        await until(pilot, lambda: f"{pinned.marker} {pinned.name}" in screen_text(app).split("\n")[app.plot.region.y])
        column = screen_text(app).split("\n")[app.plot.region.y].index(pinned.name)
        await pilot.click("#curve", offset=(column + 2, 0))
        await until(pilot, lambda: pinned.key in app.plot.options.hidden)
        await until(pilot, lambda: f"{pinned.name} (off)" in screen_text(app))
        await pilot.click("#curve", offset=(column + 2, 0))
        await until(pilot, lambda: not app.plot.options.hidden)


# ---- the journal -------------------------------------------------------------------------------------------


async def test_the_journal_is_read_while_it_grows(tmp_path):
    make_run(tmp_path / "run", rows(5), info())
    log = tmp_path / "run" / JOURNAL
    log.write_text("2026-01-03T10:00:00+00:00 info    begins\n2026-01-03T10:00:09+00:00 warning passed \x1b[2Jover\n")
    async with Shown(tmp_path / "run", size=(100, 40)) as (app, pilot):
        await until(pilot, lambda: "! the program warned once: press o" in screen_text(app))
        await pilot.press("o")
        await until(pilot, lambda: isinstance(app.screen, JournalPage) and "warning: passed" in screen_text(app))
        assert "\x1b" not in app.screen.content().plain
        with open(log, "a", encoding="utf-8") as file:
            file.write("2026-01-03T11:00:00+00:00 error   failed: KeyError\n    Traceback\n")
        await until(pilot, lambda: "error: failed: KeyError" in screen_text(app) and "Traceback" in screen_text(app))
        await pilot.press("o")
        await until(pilot, lambda: not isinstance(app.screen, JournalPage))


def test_a_run_without_a_journal_says_so(tmp_path):
    make_run(tmp_path / "run", rows(5), info())
    [run] = Watch([tmp_path]).read()
    assert run.warned == "" and "no run.log" in JournalPage(run).content().plain


# ---- the machine -------------------------------------------------------------------------------------------


def test_the_share_of_the_peak():
    known = {"flops_per_token": 1e6, "peak_flops": 1e11}
    assert machine.share_of_peak(known, 5e4) == 0.5
    assert machine.share_of_peak(known | {"ranks": [{}, {}]}, 5e4) == 0.25
    assert "50% of the peak" in machine.describe(machine.Cores(), known, 5e4).plain
    for damaged in ({}, {"flops_per_token": 1e6}, known | {"peak_flops": 0.0}, known | {"peak_flops": "x"}):
        assert machine.share_of_peak(damaged, 5e4) is None
    assert machine.share_of_peak(known, None) is None
