"""The card of a run, and the line about the machine."""

import os

import pytest
from watched import info, make_run, rows

from feste import machine as this_machine
from tools.monitor import machine
from tools.monitor.app import Monitor
from tools.monitor.card import card, commands
from tools.monitor.keys import KEYS
from tools.monitor.pages import Card
from tools.monitor.picture import METRICS
from tools.monitor.runs import Watch
from tools.monitor.samples import compared


def two_runs(folder):
    """Runs that differ in their learning rate; the first has a parent, checkpoints, and two ranks."""
    known = info()
    first = known | {"train": (known.get("train") or {}) | {"learning_rate": 0.001}, "host": "elsewhere", "isa": "avx2",
                     "parent": {"checkpoint": "/runs/old/checkpoint_best.bin", "step": 7},
                     "ranks": [{"host": "a", "pid": 1, "threads": 4}, {"host": "b", "pid": 2, "threads": 4}]}
    second = known | {"train": (known.get("train") or {}) | {"learning_rate": 0.002}}
    make_run(folder / "one", rows(20), first)
    make_run(folder / "two", rows(20), second)
    (folder / "one" / "checkpoint_best.bin").write_bytes(bytes(1_500_000))
    (folder / "one" / "checkpoint_step_20.bin").write_bytes(bytes(500_000))
    return Watch([folder])


def test_the_card_begins_with_what_differs_and_has_everything(tmp_path):
    one, two = sorted(two_runs(tmp_path).read(), key=lambda run: run.name)
    page = card(one, [one, two]).plain
    assert page.index("Differs") < page.index("learning_rate       0.001 elsewhere 0.002") < page.index("Checkpoints")
    for words in ("best                1.5 MB", "step_20             0.5 MB", "step 7 of /runs/old/checkpoint_best.bin",
                  "rank 1              host b, pid 2, threads 4", "instruction set     avx2", *commands(one)):
        assert words in page
    assert "Differs" not in card(one, [one]).plain


def test_a_card_of_nothing_is_short_and_no_error(tmp_path):
    make_run(tmp_path / "bare", rows(1), {"train": [1], "ranks": "x", "parent": 3})
    [run] = Watch([tmp_path]).read()
    assert "bare" in card(run, [run]).plain


async def test_the_card_opens_copies_and_closes(tmp_path):
    app = Monitor(two_runs(tmp_path))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause(0.6)
        await pilot.press("i")
        await pilot.pause()
        assert isinstance(app.screen, Card)
        await pilot.press("r")
        assert app.clipboard == commands(app.selected)[1]
        await pilot.press("escape")
        await pilot.pause()
        assert not isinstance(app.screen, Card)


async def test_settings_that_differ_are_columns_where_there_is_room(tmp_path):
    app = Monitor(two_runs(tmp_path))
    async with app.run_test(size=(190, 30)) as pilot:
        await pilot.pause(0.8)
        table = app.query_one("#runs")
        assert "learning_rate" in {key.value for key in table.columns}
        assert {str(table.get_cell(key, "learning_rate")) for key in app.watch.runs} == {"0.001", "0.002"}
        await pilot.resize_terminal(80, 40)
        await pilot.pause(0.5)
        assert "learning_rate" not in {key.value for key in table.columns}


async def test_samples_of_two_runs_stand_beside_each_other(tmp_path):
    app = Monitor(two_runs(tmp_path))
    async with app.run_test(size=(130, 40)) as pilot:
        await pilot.pause(0.8)
        one, two = app.watch.runs.values()
        app.select(two)
        await pilot.press("space")
        app.select(one)
        await pilot.press("v")
        await pilot.pause()
        shown = str(app.query_one("#sample_text").render())
        assert f"{one.marker} one" in shown and f"{two.marker} two, step 20" in shown
        await pilot.press("v")
        await pilot.pause()
        assert "two, step" not in str(app.query_one("#sample_text").render())


def test_words_that_both_samples_have_are_dim(tmp_path):
    one, two = sorted(two_runs(tmp_path).read(), key=lambda run: run.name)
    made = compared(one, "To be or not", two, (5, "To see or not"))
    dim = {made.plain[span.start:span.end].strip() for span in made.spans if span.style == "dim"}
    assert dim == {"To", "or", "not"} and "see" in made.plain
    assert "has no sample" in compared(one, "x", two, None).plain


async def test_the_palette_has_every_action(tmp_path):
    app = Monitor(two_runs(tmp_path))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause(0.6)
        offered = {command.title: command for command in app.get_system_commands(app.screen)}
        assert len(offered) == len({key.help for key in KEYS}) - 2 + len(METRICS)  # all but up and down
        before = app.sort
        await offered["Sort the runs: newest, best loss, name"].callback()
        assert app.sort != before


# ---- the machine -------------------------------------------------------------------------------------------

BEFORE = "cpu  0 0 0 0 0 0 0 0\ncpu0 100 0 0 100 0 0 0 0 0 0\ncpu1 100 0 0 100 0 0 0 0 0 0\nintr 1\n"
AFTER = "cpu  0 0 0 0 0 0 0 0\ncpu0 190 0 0 110 0 0 0 0 0 0\ncpu1 110 0 0 150 0 0 0 40 0 0\nintr 1\n"


@pytest.fixture
def cores(tmp_path, monkeypatch):
    """Two cores of which one was busy, and the other's time went elsewhere."""
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    (tmp_path / "stat").write_text(BEFORE)
    found = machine.Cores()
    (tmp_path / "stat").write_text(AFTER)
    found.look()
    return found


def test_cores_are_told_from_the_counters(cores):
    assert cores.busy == pytest.approx([0.9, 0.5]) and cores.stolen == pytest.approx(0.2)
    assert "70% of 2 cores" in machine.describe(cores, {}, None).plain


def test_without_counters_nothing_is_said_of_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "STAT", tmp_path / "none")
    assert "cores" not in machine.describe(machine.Cores(), {}, None).plain


def test_what_slows_a_run_down_is_named(cores, monkeypatch):
    here = {"host": this_machine.host(), "state": "running", "threads": 10_000}
    monkeypatch.setattr(os, "getloadavg", lambda: (1e6, 0.0, 0.0))
    said = machine.warnings(cores, here)
    assert all(words in " ".join(said) for words in ("10000 threads share", "other programs", "20% of the time"))
    assert machine.warnings(cores, here | {"host": "another"}) == []
    assert machine.warnings(cores, here | {"state": "finished"}) == []


async def test_the_line_stands_where_there_is_room(tmp_path):
    app = Monitor(two_runs(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause(2.6)
        assert "memory" in str(app.query_one("#machine").render())
        await pilot.resize_terminal(80, 20)
        await pilot.pause()
        assert not app.query_one("#machine").display or app.query_one("#machine").size.height == 0
