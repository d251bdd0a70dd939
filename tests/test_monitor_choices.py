"""What the monitor remembers of a person's choices, and what it learns of the terminal's background."""

import json
import os
import sys

import pexpect
import pytest
from watched import info, make_run, rows

from tools.monitor import preferences
from tools.monitor.app import Monitor
from tools.monitor.picture import Options, picture
from tools.monitor.runs import Watch


@pytest.mark.parametrize(("answer", "light"), [
    (b"\x1b]11;rgb:ffff/ffff/ffff\x1b\\\x1b[?62c", True), (b"\x1b]11;rgb:0000/0000/0000\x07", False),
    (b"\x1b]11;rgb:f/f/d\x1b\\", True), (b"\x1b]11;rgba:1e/1e/2e/ff\x1b\\", False), (b"\x1b[?1;2c", None), (b"", None),
])
def test_what_a_terminal_answers(answer, light):
    assert preferences.is_light(answer) is light


@pytest.mark.parametrize(("value", "theme"), [("0;15", preferences.LIGHT), ("15;default;0", preferences.DARK),
                                              ("", preferences.DARK), ("x", preferences.DARK)])
def test_without_an_answer_the_environment_tells(monkeypatch, value, theme):
    monkeypatch.setenv("COLORFGBG", value)
    assert preferences.theme_of_terminal() == theme  # standard input is no terminal here


ASK = "from tools.monitor import preferences; print('theme', preferences.theme_of_terminal())"


@pytest.mark.parametrize(("answer", "theme"), [("\x1b]11;rgb:eeee/eeee/eeee\x1b\\\x1b[?6c", preferences.LIGHT),
                                               ("\x1b[?6c", preferences.DARK), (None, preferences.DARK)])
def test_a_terminal_is_asked_and_not_waited_for(answer, theme):
    child = pexpect.spawn(sys.executable, ["-c", ASK], env=os.environ | {"COLORFGBG": ""}, timeout=20)
    child.expect_exact("\x1b]11;?\x1b\\\x1b[c")
    if answer is not None:
        child.send(answer)
    child.expect_exact(f"theme {theme}")
    child.expect(pexpect.EOF)


def test_choices_come_back_and_nonsense_does_not(tmp_path):
    file = tmp_path / "feste" / "monitor.json"
    assert preferences.read(file) == {}
    chosen = {"theme": preferences.LIGHT, "sort": "name", "axis": "time", "log": True, "span": 50, "lines": "training"}
    preferences.write(file, chosen)
    assert preferences.read(file) == chosen
    for text in ("[1]", "{", '{"theme": "neon", "log": 1, "span": true, "sort": null, "other": 3}'):
        file.write_text(text)
        assert preferences.read(file) == {}
    preferences.write(tmp_path / "feste" / "monitor.json" / "below", chosen)  # cannot be written: no error


async def test_keys_are_remembered(tmp_path):
    make_run(tmp_path / "data" / "a", rows(20), info())
    file, watch = tmp_path / "monitor.json", Watch([tmp_path / "data"])
    app = Monitor(watch, {}, file)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause(0.5)
        assert app.theme == preferences.DARK and not file.exists()
        await pilot.press("d", "s", "x", "l", "e", "w")
        await pilot.pause()
    kept = json.loads(file.read_text())
    assert kept == {"theme": preferences.LIGHT, "sort": "best loss", "axis": "time", "log": True,
                    "span": kept["span"], "lines": "validation"}
    again = Monitor(Watch([tmp_path / "data"]), preferences.read(file), file, theme=preferences.DARK)
    async with again.run_test(size=(100, 30)) as pilot:
        await pilot.pause(0.5)
        options = again.plot.options
        assert (again.theme, again.sort, options.axis, options.log, options.lines) == (
            preferences.LIGHT, "best loss", "time", True, "validation")


async def test_a_theme_that_was_asked_for_is_not_a_choice(tmp_path):
    make_run(tmp_path / "data" / "a", rows(20), info())
    file = tmp_path / "monitor.json"
    app = Monitor(Watch([tmp_path / "data"]), {}, file, theme=preferences.LIGHT)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause(0.5)
        assert app.theme == preferences.LIGHT
        await pilot.press("s")
    assert json.loads(file.read_text()) == {"sort": "best loss"}


def test_a_panel_keeps_its_title_while_values_are_read(tmp_path):
    make_run(tmp_path / "a", rows(20), info())
    watch = Watch([tmp_path / "a"])
    [run] = watch.read()
    for metric in ("learning rate", "gradient norm", "tokens per second"):
        legend, _ = picture(run, [], Options(metric=metric, cursor=7.0), 60, 8)
        assert "".join(piece for piece, _ in legend).startswith(f"{metric}, step 7")
    legend, _ = picture(run, [], Options(cursor=7.0), 60, 8)
    assert "".join(piece for piece, _ in legend).startswith("step 7")


async def test_the_list_is_filtered_by_words_of_the_name(tmp_path):
    for name in ("shakespeare_tiny_1", "shakespeare_small_1", "novel_tiny_2"):
        make_run(tmp_path / name, rows(20), info())
    app = Monitor(Watch([tmp_path]))
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause(0.5)
        await pilot.press("slash", *"TINY")
        await pilot.pause()
        assert sorted(run.name for run in app.runs()) == ["novel_tiny_2", "shakespeare_tiny_1"]
        assert "tiny" in app.selected.name and app.screen_stack[0].query_one("#runs").row_count == 2
        assert "2 of 3 with 'TINY'" in app.screen_stack[0].query_one("#tabs").render().plain
        await pilot.press("space", *"nov", "enter")
        await pilot.pause()
        assert app.selected.name == "novel_tiny_2" and not app.filter.display
        await pilot.press("slash", "x", "y")
        await pilot.pause()
        assert app.runs() == [] and app.selected is not None  # nothing has such a name; the curve stays
        await pilot.press("escape")
        await pilot.pause()
        assert len(app.runs()) == 3
        await pilot.press("l")
        assert app.plot.options.log  # keys are keys again


@pytest.mark.parametrize(("size", "shown", "hidden"), [
    ((40, 12), ["line", "curve"], ["runs", "status", "tabs", "side"]),
    ((80, 24), ["line", "status", "tabs", "curve", "side"], ["runs", "sample_bar"]),
    ((80, 30), ["runs", "status", "tabs", "curve"], ["line", "side"]),
    ((140, 40), ["runs", "status", "tabs", "curve", "side", "sample_bar"], ["line"]),
])
async def test_a_layout_that_fits(tmp_path, size, shown, hidden):
    for name in ("a", "b"):
        make_run(tmp_path / name, rows(20), info())
    app = Monitor(Watch([tmp_path]))
    async with app.run_test(size=size) as pilot:
        await pilot.pause(0.5)
        base = app.screen_stack[0]
        visible = {name: base.query_one(f"#{name}").region.area > 0 for name in (*shown, *hidden)}
        assert visible == {name: name in shown for name in visible}
        assert base.query_one("#curve").size.height >= 8
        if "line" in shown:
            line = base.query_one("#line").render().plain
            assert line.startswith(app.selected.marker) and len(line) <= size[0] - 2
        if size == (80, 24):
            assert "2 of 2" in line or "1 of 2" in line
            assert "To be sample of step 20" in base.query_one("#sample_text").render().plain
        footer = "".join(str(key.description) for key in app.query("FooterKey").results())
        assert "Help" in footer[:20] and "Quit" in footer[:20]
