"""Plots and comparisons: what they show is what the runs hold, and scores are those of the definition."""

import itertools
import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from feste import GPT2, BPETokenizer, Checkpoint, Config, train_gpt2
from feste.data import split_tokens
from feste.run.log import RunLog
from tools import compare, comparison, plot, runs
from tools.monitor.__main__ import main as monitor_main

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "nobler", "mind", "suffer", "naïve", "slings"]
TEXT = " ".join(np.random.default_rng(0).choice(WORDS, 2500))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs a and b with one tokenizer, c with another, on one text."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, vocab_size, learning_rate, steps in (("a", 270, 0.003, 20), ("b", 270, 0.01, 30), ("c", 300, 0.003, 20)):
        model = GPT2(Config(vocab_size=vocab_size, n_embd=16, n_layers=1, n_heads=2, block_size=16))
        train_gpt2(model, BPETokenizer.train(TEXT, vocab_size), TEXT, steps, learning_rate, 16, folder / name,
                   val_interval=5, sample_interval=10, sample_tokens=5,
                   info={"data_flags": {"data": str(folder / "text.txt"), "train_chars": None}})
    return folder


def opened(folder, *names):
    return runs.open_runs([str(folder / name) for name in names])


def synthetic(path: Path, records, model=None, train=None):
    """A run directory with these rows."""
    path.mkdir(parents=True)
    log = RunLog(path, {"model": {"vocab_size": 512} | (model or {}), "train": {"learning_rate": 0.1} | (train or {}),
                        "planned_steps": 10}, locked=False)
    for record in records:
        log.write(record)
    log.close("finished")
    return str(path)


ROW = {"step": 1, "elapsed_seconds": 1.0, "train_loss": 6.0, "val_loss": 6.5, "train_perplexity": 403.4,
       "val_perplexity": 665.1, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 50.0}


# ---- what differs ------------------------------------------------------------------------------------------


def test_only_what_differs_is_named(folder):
    assert comparison.differences(opened(folder, "a", "b")) == {"num_steps": [20, 30], "learning_rate": [0.003, 0.01]}
    assert comparison.differences(opened(folder, "a", "a")) == {}
    assert comparison.labels(opened(folder, "a", "c")) == ["vocab_size=270", "vocab_size=300"]


def test_labels_are_short_and_tell_the_runs_apart(tmp_path):
    fields = {f"field{i}": 1 for i in range(9)}
    paths = [synthetic(tmp_path / "p", [ROW], train=fields),
             synthetic(tmp_path / "q", [ROW], train={name: 2 for name in fields}),
             synthetic(tmp_path / "r", [ROW], train={name: 2 for name in fields} | {"field8": "a\x1b[1m" + "x" * 50})]
    found = comparison.labels(runs.open_runs(paths))
    assert found == ["field0=1, field1=1, field2=1, field8=1, …", "field0=2, field1=2, field2=2, field8=2, …",
                     "field0=2, field1=2, field2=2, field8='a\\x1b[1m" + "x" * 10 + "…, …"]
    paths.append(synthetic(tmp_path / "s", [ROW], train={name: 2 for name in fields}))
    assert [label.partition(":")[0] for label in comparison.labels(runs.open_runs(paths))[1::2]] == ["q", "s"]
    cell = dict(comparison.rows(runs.open_runs(paths)))["field8"][2]
    assert len(cell) <= comparison.LABEL_WIDTH and "\x1b" not in cell


def test_runs_of_one_name_are_named_by_their_paths(tmp_path):
    paths = [synthetic(tmp_path / side / "run", [ROW]) for side in ("left", "right")]
    assert [run.name for run in runs.open_runs(paths)] == paths


# ---- the table ---------------------------------------------------------------------------------------------


def test_the_table_holds_the_figures_of_the_runs(tmp_path):
    one = [ROW | {"step": i, "val_loss": loss, "tokens_per_second": speed, "elapsed_seconds": 40.0 * i}
           for i, (loss, speed) in enumerate([(6.5, 10.0), (5.25, 20.0), (5.5, 90.0)], 1)]
    other = [ROW | {"step": i, "val_loss": loss} for i, loss in enumerate([6.0, 5.75], 1)]
    found = runs.open_runs([synthetic(tmp_path / "one", one), synthetic(tmp_path / "other", other)])
    table = dict(comparison.rows(found))
    assert table["best validation loss"] == ["5.2500 *", "5.7500"]
    assert table["  its step"] == ["2", "2"] and table["  its perplexity"][0] == f"{math.exp(5.25):.0f}"
    assert table["validation loss, step 2"] == ["5.2500 *", "5.7500"]
    assert table["tokens per second"] == ["20", "50"] and table["time"] == ["2m 00s", "1s"]
    assert table["steps"] == ["3 of 10", "2 of 10"] and table["training tokens"] == ["-", "-"]


def test_losses_of_different_tokenizers_get_no_star(folder):
    runs = opened(folder, "a", "c")
    assert "different tokenizers" in comparison.cautions(runs)[0]
    assert not any("*" in cell for _, cells in comparison.rows(runs) for cell in cells)
    starred = dict(comparison.rows(runs, [2.0, 3.0]))["bits per byte"]
    assert starred == ["2.0000 *", "3.0000"]
    assert comparison.cautions(opened(folder, "a", "b")) == []


def test_samples_are_of_the_last_step_that_all_runs_have(folder):
    found = comparison.same_step_samples(opened(folder, "a", "b"))
    assert [step for step, _ in found] == [20, 20]
    assert found[1][1] == dict(opened(folder, "b")[0].reader.samples)[20]


def test_without_a_common_step_each_run_shows_its_last_sample(tmp_path):
    paths = [synthetic(tmp_path / f"{step}", [ROW | {"step": step, "sample": f"at {step}"}]) for step in (1, 2)]
    paths.append(synthetic(tmp_path / "none", [ROW]))
    assert comparison.same_step_samples(runs.open_runs(paths)) == [(1, "at 1"), (2, "at 2"), None]


def test_a_run_without_finite_figures_or_configuration_is_shown(tmp_path, capsys):
    path = synthetic(tmp_path / "bad", [{"step": 1, "train_loss": math.nan, "val_loss": math.inf}])
    (tmp_path / "bad" / "run.json").write_text('{"model": null, "train": 3}')
    assert compare.main([path, path]) == 0 and compare.main([path, "--json"]) == 0
    assert "NaN" not in capsys.readouterr().out


def test_many_runs_fit_a_narrow_window(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert compare.main([str(folder / "a")] * 9) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert sum(line.count("finished") for line in out.splitlines() if line.startswith("state")) == 9


def test_two_runs_of_an_example_stand_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"shakespeare_medium_20261125_23573{i}" for i in range(3)]
    record = ROW | {"sample": "To be"}
    assert compare.main([synthetic(tmp_path / name, [record], train={"seed": name[-1]}) for name in names]) == 0
    out = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("best validation loss") for line in out) == 1
    heads = list(itertools.takewhile(lambda parts: parts[0] != "seed", map(str.split, out)))
    assert ["".join(parts) for parts in zip(*heads, strict=True)] == names
    [titles] = [line for line in out if "step 1" in line and "╭" in line]
    assert all(f"{name[-6:]}, step 1" in titles for name in names)


@pytest.mark.parametrize("name", ["a_b", "shakespeare_tiny_20261125_235651", "x" * 40, "_" * 40, "/a/" + "b" * 17])
def test_folded_names_are_whole_and_narrow(name):
    lines = compare.folded(name, 16).split("\n")
    assert "".join(lines) == name and max(map(len, lines)) <= 16


def test_control_characters_of_a_sample_do_not_reach_the_terminal(tmp_path, capsys):
    path = synthetic(tmp_path / "x", [ROW | {"sample": "evil\x1b[2J"}])
    compare.main([path])
    assert "evil" in (out := capsys.readouterr().out) and "\x1b" not in out and "[2J" not in out


def test_json(folder, capsys):
    assert compare.main([str(folder / "a"), str(folder / "b"), "--json", "--bits-per-byte"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]["learning_rate"] == [0.003, 0.01]
    info = json.loads((folder / "b" / "run.json").read_text())
    assert found["runs"][1]["best_val_loss"] == pytest.approx(info["best_val_loss"], rel=1e-7)
    assert found["runs"][1]["step"] == 30 and found["runs"][1]["bits_per_byte"] > 0


# ---- bits per byte -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [TEXT[:700], TEXT[:9], "é" * 40], ids=["windows and a rest", "a rest", "bytes"])
def test_bits_per_byte_is_its_definition(folder, text):
    loaded = Checkpoint.load(folder / "a" / "checkpoint_best.bin")
    ids, T, bits = loaded.tokenizer.encode(text), 16, 0.0
    for start in range(0, len(ids) - 1, T):
        inputs, targets = ids[start:start + T], ids[start + 1:start + T + 1]
        logits = loaded.model.forward(np.array([inputs[:len(targets)]]))[0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        bits -= log_p[np.arange(len(targets)), targets].sum() / math.log(2)
    n_bytes = len(text.encode()) - len(loaded.tokenizer.tokens[ids[0]])
    assert compare._bits_per_byte(loaded, text) == pytest.approx(bits / n_bytes, rel=1e-5)


@pytest.mark.parametrize("vocab_size", [256, 290])
def test_a_uniform_guess_costs_log2_of_the_vocabulary_for_each_token(tmp_path, vocab_size):
    tokenizer = BPETokenizer.train(TEXT, vocab_size)
    model = GPT2(Config(vocab_size=vocab_size, n_embd=8, n_layers=1, n_heads=1, block_size=8), seed=None)
    Checkpoint.save(tmp_path / "zero.bin", model, tokenizer)
    ids = tokenizer.encode(TEXT)
    expected = (len(ids) - 1) * math.log2(vocab_size) / len(tokenizer.decode_bytes(ids[1:]))
    assert compare._bits_per_byte(Checkpoint.load(tmp_path / "zero.bin"), TEXT) == pytest.approx(expected, rel=1e-6)


def test_no_run_was_trained_on_the_held_out_text(folder):
    found = opened(folder, "a", "c")
    models = [compare.load_best(run) for run in found]
    held_out = compare.held_out_text(found, models)
    assert TEXT.endswith(held_out) and 0.05 < len(held_out) / len(TEXT) < 0.15
    begins = []
    for loaded in models:
        trained, _ = split_tokens(loaded.tokenizer.encode_to_numpy(TEXT), 0.1)
        begins.append(len(loaded.tokenizer.decode_bytes(trained)))
    assert begins[0] != begins[1]  # else this would not show which one counts
    assert len(TEXT.encode()) - len(held_out.encode()) == max(begins)


def edit_info(folder, copy, **changes):
    import shutil
    shutil.copytree(folder / "a", copy)
    info = json.loads((copy / "run.json").read_text()) | changes
    (copy / "run.json").write_text(json.dumps(info))
    return str(copy)


@pytest.mark.parametrize(("changes", "words"), [
    ({"data_flags": None}, "does not tell which text"),
    ({"data_flags": {"data": "/nowhere.txt", "train_chars": None}}, "is not at hand (cannot read /nowhere.txt"),
    ({"data_flags": {"data": "{folder}/text.txt", "train_chars": 5000}}, "different texts"),
    ({"data_flags": {"data": "{folder}", "train_chars": None}}, "does not tell which text"),
    ({"corpus_sha256": "another"}, "has changed since"),
])
def test_a_text_that_is_not_common_asks_for_a_file(folder, tmp_path, capsys, changes, words):
    flags = changes.get("data_flags")
    if flags:
        changes = {"data_flags": flags | {"data": flags["data"].format(folder=folder)}}
    copy = edit_info(folder, tmp_path / "copy", **changes)
    assert compare.main([str(folder / "b"), copy, "--bits-per-byte"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line and "--bits-per-byte FILE" in line
    assert compare.main([str(folder / "b"), copy, "--bits-per-byte", str(folder / "text.txt")]) == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["{}/text.txt"], "is not a run directory; name the directory that holds its training_log.csv"),
    (["{}/nothing"], "is no run directory: it has no training_log.csv, and no directory in it has one"),
    (["{}/a", "--bits-per-byte", "{}/none.txt"], "with --bits-per-byte"),
    (["{}/a", "--bits-per-byte", "{}/b"], "is a directory; put the flag after the runs"),
    (["{}/a", "--bits-per-byte", "{}/one.txt"], "has 1 tokens"),
    (["{}/empty"], "has no step"),
])
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, arguments, words):
    (folder / "one.txt").write_text("x")
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "nothing").mkdir(exist_ok=True)
    (folder / "empty" / "training_log.csv").write_text("step,train_loss\n")
    assert compare.main([argument.format(folder) for argument in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


# ---- plots -------------------------------------------------------------------------------------------------


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def drawn(axes, **wanted):
    """The lines of an axes that have these properties."""
    return [line for line in axes.lines if all(getattr(line, f"get_{key}")() == value for key, value in wanted.items())]


def test_the_panels_show_the_columns_of_the_runs(matplotlib, folder):
    runs = opened(folder, "a", "b")
    figure = plot.make_figure(runs)
    loss, perplexity, rate, norm = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(plot.PANELS)
    for axes, column in ((loss, "val_loss"), (perplexity, "val_perplexity")):
        for run, line in zip(runs, drawn(axes, marker="o"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), run.columns[column][np.isfinite(run.columns[column])])
            np.testing.assert_array_equal(line.get_xdata() % 5, 0)
    for run, line in zip(runs, drawn(loss, marker="*"), strict=True):
        assert (line.get_ydata()[0], line.get_xdata()[0]) == run.best()
    for axes, column in ((loss, "train_loss"), (norm, "grad_norm")):
        for run, line in zip(runs, drawn(axes, linewidth=0.6), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), run.columns[column])
    for run, line in zip(runs, rate.lines, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), run.columns["learning_rate"])
    assert any("ln 270 = 5.60" in text.get_text() for text in loss.texts)


def test_the_runs_are_named_with_their_best_loss(matplotlib, folder):
    runs = opened(folder, "a", "b")
    [legend] = plot.make_figure(runs).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [f"num_steps={n}, learning_rate={rate}  (best {run.best()[0]:.3f}, "
                     f"{run.bits_per_byte(run.best()[0]):.3f} bits per byte at step {run.best()[1]})"
                     for n, rate, run in zip((20, 30), (0.003, 0.01), runs, strict=True)]


@pytest.mark.parametrize(("longest", "name", "unit"), [(170, "seconds", 1), (180, "minutes", 60),
                                                       (90_000, "hours", 3600), (math.nan, "seconds", 1)])
def test_time_on_the_horizontal_axis_has_a_unit_that_suits(matplotlib, tmp_path, longest, name, unit):
    records = [ROW | {"step": 1, "elapsed_seconds": 2.0}, ROW | {"step": 2, "elapsed_seconds": longest}]
    found = runs.open_runs([synthetic(tmp_path / "long", records), synthetic(tmp_path / "short", records[:1])])
    axes = plot.make_figure(found, "time").axes[2]
    assert axes.get_xlabel() == name
    assert axes.lines[0].get_xdata().tolist() == [x / unit for x in (2.0, longest) if not math.isnan(x)]
    assert axes.lines[1].get_xdata().tolist() == [2.0 / unit]


@pytest.mark.parametrize(("low", "high"), [(0.45, 2.4), (1.05, 1.9), (40.0, 900.0), (1e-3, 1e4)])
def test_a_logarithmic_axis_has_enough_numbers_on_it(matplotlib, tmp_path, low, high):
    records = [ROW | {"step": 1, "grad_norm": low}, ROW | {"step": 2, "grad_norm": high}]
    axes = plot.make_figure(runs.open_runs([synthetic(tmp_path / "run", records)])).axes[3]
    bottom, top = axes.get_ylim()
    assert 3 <= sum(bottom <= tick <= top for tick in axes.get_yticks()) <= 12


def test_many_rows_keep_every_spike():
    x, y = np.arange(10_001.0), np.random.default_rng(0).standard_normal(10_001)
    y[[7, 5000, 9000]] = 90.0, -80.0, np.nan
    fine_x, fine_y = plot.extremes(x, y, 100)
    assert len(fine_x) == len(fine_y) == 100 and fine_y.max() == 90.0 and fine_y.min() == -80.0
    assert (np.diff(fine_x) >= 0).all()
    np.testing.assert_array_equal(plot.extremes(x, y, 20_000)[1], y[np.isfinite(y)])


def test_thinning_keeps_the_mean_and_leaves_out_what_is_not_finite():
    x, y = np.arange(10_001.0), np.random.default_rng(0).standard_normal(10_001)
    y[[3, 77, 5000]] = np.nan, np.inf, -np.inf
    thin_x, thin_y = plot.thin(x, y, 100)
    assert len(thin_x) == len(thin_y) == 100 and np.isfinite(thin_y).all() and (np.diff(thin_x) > 0).all()
    kept = y[np.isfinite(y)]
    assert abs(thin_y.mean() - kept.mean()) < 1e-3 and thin_y.std() < kept.std() / 5
    np.testing.assert_array_equal(plot.thin(x[:9], y[:9], 9)[0], [0, 1, 2, 4, 5, 6, 7, 8])


def test_png_and_svg(matplotlib, folder, tmp_path, capsys):
    runs = [str(folder / name) for name in "ab"]
    assert plot.main([*runs, "-o", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert plot.main([*runs, "-o", str(tmp_path / "x.SVG")]) == 0
    first = (tmp_path / "x.SVG").read_bytes()
    assert ElementTree.fromstring(first).tag.endswith("svg")
    plot.main([*runs, "-o", str(tmp_path / "x.SVG")])
    assert (tmp_path / "x.SVG").read_bytes() == first  # the same runs, the same bytes
    assert f"wrote {tmp_path / 'x.png'}" in capsys.readouterr().out


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_everything_itself_and_trusts_no_text(matplotlib, folder, tmp_path, capsys):
    evil = synthetic(tmp_path / "<script>alert(1)<", [ROW | {"sample": "<img src=x>"}])
    assert plot.main([str(folder / "a"), evil, "-o", str(tmp_path / "x.html")]) == 0
    page = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 2 and page.tags.count("table") == 1  # the data, and what draws them
    assert "img" not in page.tags and page.links == []
    assert "best validation loss" in page.text and "<script>alert(1)<" in page.text and "<img src=x>" in page.text
    outside = re.sub(r"url\((?:#|\`)", "", (tmp_path / "x.html").read_text(encoding="utf-8").replace("`url(#", ""))
    assert "url(" not in outside


@pytest.mark.parametrize("name", ["_hidden", "$x_{", "a{b}%"])
def test_names_that_mean_something_to_matplotlib(matplotlib, tmp_path, name):
    found = runs.open_runs([synthetic(tmp_path / name, [ROW]), synthetic(tmp_path / "plain", [ROW])])
    figure = plot.make_figure(found)
    assert len(figure.legends[0].get_texts()) == 2
    plot.render(figure, ".png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("records", [
    [{"step": 1}],
    [{"step": 1, "train_loss": math.nan, "val_loss": math.nan, "grad_norm": math.inf, "train_perplexity": math.inf}],
    [ROW],
    [ROW | {"step": i, "learning_rate": 0.0, "grad_norm": 0.0} for i in range(1, 5)],
], ids=["no value", "nothing finite", "one row", "zeros on a log scale"])
def test_poor_runs_can_be_drawn(matplotlib, tmp_path, records):
    found = runs.open_runs([synthetic(tmp_path / "poor", records)])
    assert plot.render(plot.make_figure(found), ".png")
    assert plot.make_page(found)


def test_a_log_of_another_program_can_be_drawn(matplotlib, tmp_path):
    (tmp_path / "training_log.csv").write_text("step,train_loss\n1,3.5\n2,3.25\n")
    found = runs.open_runs([str(tmp_path)])
    assert drawn(plot.make_figure(found).axes[0], linewidth=0.6)[0].get_ydata().tolist() == [3.5, 3.25]
    comparison.rows(found)


def test_without_matplotlib_one_line_says_how_to_get_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(folder / "a"), "-o", "x.png"]) == 2
    assert capsys.readouterr().err == "error: plots need matplotlib; install it with: pip install '.[plot]'\n"


@pytest.mark.parametrize(("output", "words"), [("x.gif", "must end in .png, .svg, .html"),
                                               ("/nowhere/x.png", "cannot write /nowhere/x.png")])
def test_a_bad_output_is_one_line(matplotlib, folder, capsys, output, words):
    assert plot.main([str(folder / "a"), "-o", output]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_names_that_are_no_unicode_are_shown(matplotlib, tmp_path, capsys):
    """File systems hold any bytes; a name in Latin-1 reaches Python as lone surrogates."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    synthetic(Path(path), [ROW | {"step": 1}, ROW | {"step": 2}])
    for suffix in (".png", ".svg", ".html"):
        assert plot.main([path, "-o", f"{path}{suffix}"]) == 0
        assert Path(f"{path}{suffix}").stat().st_size > 1000
    assert compare.main([path, path]) == 0 and compare.main([path, "--json"]) == 0
    assert monitor_main([path, "--once"]) == 0 and monitor_main([path, "--json"]) == 0
    assert "caf" in capsys.readouterr().out


def test_a_folder_of_runs_is_its_runs(tmp_path, capsys):
    for name in ("one", "two"):
        synthetic(tmp_path / name, [ROW])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "training_log.csv").write_text("step,train_loss\n")
    assert [run.name for run in runs.open_runs([tmp_path])] == ["one", "two"]
    assert compare.main([str(tmp_path), "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["one", "two"]


def test_bits_per_byte_are_of_the_same_bytes(folder, tmp_path):
    """The star is on the run that needs the fewest bits, whatever the line ends and the mark of the file."""
    (tmp_path / "plain.txt").write_text(TEXT.replace(" ", "\n"), encoding="utf-8")
    (tmp_path / "dressed.txt").write_text(TEXT.replace(" ", "\r\n"), encoding="utf-16", newline="")
    found = opened(folder, "a", "b", "c")
    scores = compare.score(found, str(tmp_path / "plain.txt"))
    assert scores == compare.score(found, str(tmp_path / "dressed.txt")) and len(set(scores)) == 3
    starred = dict(comparison.rows(found, scores))["bits per byte"]
    assert [cell.endswith("*") for cell in starred] == [score == min(scores) for score in scores]
