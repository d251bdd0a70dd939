"""The page: what it holds is what the logs hold, and in a real browser it shows that under the pointer."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from feste.run.follow import read_rows
from tests.test_plot_compare import ROW, synthetic
from tools import plot, report, runs
from tools.report import COLOURS, kept_rows, make_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def some_runs(folder: Path, rows: int = 40) -> list:
    """Two runs with validations, samples and one spike."""
    rng, made = np.random.default_rng(0), []
    for name, rate in (("slow", 0.1), ("fast", 0.2)):
        records = []
        for step in range(1, rows + 1):
            record = ROW | {"step": step, "elapsed_seconds": step * 0.5, "learning_rate": rate / step,
                            "train_loss": 6.0 * step ** -rate + rng.normal(0.0, 0.05), "grad_norm": 1.0 + rng.random()}
            record["val_loss"] = record["train_loss"] + 0.1 if step % 5 == 0 else None
            record["sample"] = f"{name} <b>of</b> step {step}" if step % 10 == 0 else None
            records.append(record | ({"train_loss": 1e9} if name == "fast" and step == 7 else {}))
        made.append(synthetic(folder / name, records, train={"learning_rate": rate}))
    return runs.open_runs(made)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_holds_rows_of_the_logs(tmp_path):
    found = some_runs(tmp_path)
    for run, data in zip(found, data_of(make_page(found))["runs"], strict=True):
        rows = read_rows(run.path)
        assert data["columns"]["step"] == [row["step"] for row in rows]
        for name in ("train_loss", "grad_norm", "learning_rate", "tokens_per_second"):
            assert data["columns"][name] == [row[name] for row in rows]
        assert data["columns"]["val_loss"] == [row.get("val_loss") for row in rows]
        assert [sample[0] for sample in data["samples"]] == [10, 20, 30, 40]


def test_the_page_needs_nothing_else_and_stays_small(tmp_path):
    page = make_page(some_runs(tmp_path, rows=20_000))
    assert len(page.encode()) < 1_000_000
    assert not re.search(r"""(?:src|href)=|url\((?!#|\$)|@import|fetch\(|https?://(?!www\.w3\.org)""", page)


def test_a_long_log_is_thinned_to_rows_that_stand_out(tmp_path):
    fast = some_runs(tmp_path, rows=20_000)[1]
    kept = kept_rows(fast.columns)
    assert len(kept) <= report.MOST_ROWS + 2 and kept[0] == 0 and kept[-1] == 19_999
    assert 6 in kept  # the spike
    assert np.isfinite(fast.columns["val_loss"][kept]).sum() >= report.MOST_ROWS // 3


def test_texts_cannot_end_the_script_that_holds_them(tmp_path):
    path = synthetic(tmp_path / "evil", [ROW | {"sample": "</script><script>alert(1)</script>\u2028"}])
    page = make_page(runs.open_runs([path]))
    assert "alert(1)</script>" not in page and data_of(page)["runs"][0]["samples"][0][1].startswith("</script>")


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_curves_and_words_can_be_seen_in_both_forms():
    css = (report.HERE / "page.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S))
    for form, which in ((light, 0), (dark, 1)):
        for colours in COLOURS:
            assert contrast(colours[which], form["panel"]) >= 3.0, colours
        for word in ("ink", "faint"):
            assert min(contrast(form[word], form["paper"]), contrast(form[word], form["panel"])) >= 4.5, word


# ---- in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the report of some runs, and sees that no script failed."""
    contexts, errors = [], []

    def open_page(width: int = 1200, scheme: str = "light"):
        found = some_runs(tmp_path / scheme)
        assert plot.main([*(str(run.path) for run in found), "-o", str(tmp_path / "report.html")]) == 0
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "report.html").as_uri())
        page.wait_for_selector(".panel path")
        return page, found

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def point_at(page, fraction: float, panel: int = 0) -> list[dict]:
    """The values that are shown when the pointer is there, over the width of a panel's picture."""
    box = page.locator(".panel > svg").nth(panel).bounding_box()
    page.mouse.move(box["x"] + 52 + fraction * (box["width"] - 62), box["y"] + box["height"] / 2)
    return page.evaluate("[...document.querySelectorAll('.tip:not([hidden]) .value')].map(cell => ({...cell.dataset}))")


def test_the_pointer_reads_what_the_log_says(opened):
    page, found = opened()
    rows = {run.name: {row["step"]: row for row in read_rows(run.path)} for run in found}
    for fraction in (0.0, 0.31, 0.5, 0.77, 1.0):
        values = point_at(page, fraction)
        assert {(value["run"], value["column"]) for value in values} == {
            (name, column) for name in rows for column in ("train_loss", "val_loss")}
        for value in values:
            row = rows[value["run"]][int(value["at"])]
            assert float(value["value"]) == row[value["column"]]
            near = 1 + fraction * 39
            assert value["column"] == "val_loss" or abs(int(value["at"]) - near) <= 0.51


def test_runs_are_switched_off_and_on(opened):
    page, _ = opened()
    before = page.locator(".panel path[stroke]").count()
    page.locator("#legend button").first.click()
    assert page.locator("#legend button").first.get_attribute("aria-pressed") == "false"
    assert page.locator(".panel path[stroke]").count() == before // 2
    assert {value["run"] for value in point_at(page, 0.5)} == {"fast"} and page.locator(".sample").count() == 1
    page.locator("#legend button").first.click()
    assert page.locator(".panel path[stroke]").count() == before


def test_dragging_zooms_and_a_double_click_shows_all(opened):
    page, _ = opened()
    box = page.locator(".panel > svg").first.bounding_box()
    y, inner = box["y"] + box["height"] / 2, box["width"] - 62
    page.mouse.move(box["x"] + 52 + 0.5 * inner, y)
    page.mouse.down()
    page.mouse.move(box["x"] + 52 + 0.75 * inner, y, steps=4)
    page.mouse.up()
    steps = [int(value["at"]) for fraction in (0.0, 1.0) for value in point_at(page, fraction)
             if value["column"] == "train_loss"]
    assert min(steps) >= 20 and max(steps) <= 31
    page.mouse.dblclick(box["x"] + 52 + 0.5 * inner, y)
    assert int(point_at(page, 1.0)[0]["at"]) == 40


def test_time_and_tokens_are_axes_too_and_smoothing_moves_the_line_only(opened):
    page, _ = opened()
    page.select_option("#axis", "time")
    assert float(point_at(page, 1.0)[0]["at"]) == 20.0
    page.select_option("#axis", "step")
    line = page.locator(".panel").first.locator("path[stroke-width='1.8']").first
    before, values = line.get_attribute("d"), point_at(page, 0.5)
    page.locator("#smoothing").fill("100")
    assert line.get_attribute("d") != before and point_at(page, 0.5) == values
    page.locator("#log").check()
    assert page.locator(".panel").first.locator("text", has_text="left out").count() == 1  # the spike of 1e9


def test_samples_follow_the_slider(opened):
    page, _ = opened()
    assert page.locator(".sample pre").all_inner_texts() == ["slow <b>of</b> step 40", "fast <b>of</b> step 40"]
    page.locator("#sample-step").fill("1")
    assert page.locator(".sample pre").first.inner_text() == "slow <b>of</b> step 20"


def test_it_fits_a_phone_and_has_a_dark_form(opened):
    page, _ = opened(width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator(".panel > svg").first.bounding_box()["width"] > 330
    page, _ = opened(scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
