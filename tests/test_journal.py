"""run.log: what the program said while it trained a run."""

import warnings

import numpy as np
import pytest

from feste import GPT2, BPETokenizer, Config, train_gpt2
from feste.cli import main
from feste.run.journal import MOST_BYTES, Entry, Journal, overheard, read_journal
from feste.run.names import JOURNAL
from feste.trainer import TrainingDiverged

TEXT = "to be, or not to be, that is the question. " * 60


@pytest.fixture
def parts():
    tokenizer = BPETokenizer.train(TEXT, 270)
    return GPT2(Config(tokenizer.vocab_size, 16, 1, 1, 8), seed=0), tokenizer


def said(directory) -> list[tuple[str, str]]:
    return [(entry.kind, entry.words.partition("\n")[0]) for entry in read_journal(directory)]


def test_a_run_tells_how_it_begins_goes_on_and_ends(tmp_path, parts):
    model, tokenizer = parts
    run = tmp_path / "run"
    train_gpt2(model, tokenizer, TEXT, 4, 1e-3, 8, run)
    train_gpt2(model, tokenizer, TEXT, 6, 1e-3, 8, resume=run)
    first, end, again, note, last = said(run)
    assert first[1].startswith("begins: 4 steps are planned") and end == ("info", "finished at step 4")
    assert again[1].startswith("goes on behind step 4: 6 steps") and note[1].startswith("steps 4 -> 6")
    assert last == ("info", "finished at step 6")


def test_warnings_are_entries_and_are_shown_as_before(tmp_path, parts):
    model, tokenizer = parts

    def warn(record) -> None:
        if record["step"] == 2:
            warnings.warn("the disk is\nslow", stacklevel=1)

    shown = warnings.showwarning
    with pytest.warns(UserWarning, match="slow"):
        train_gpt2(model, tokenizer, TEXT, 3, 1e-3, 8, tmp_path / "run", on_step=warn)
    entry = read_journal(tmp_path / "run")[1]
    assert (entry.kind, entry.words) == ("warning", "the disk is\nslow")
    assert warnings.showwarning is shown


def test_what_went_wrong_is_there_with_its_traceback(tmp_path, parts):
    model, tokenizer = parts

    def fail(record) -> None:
        if record["step"] == 2:
            raise KeyError("a defect")

    with pytest.raises(KeyError):
        train_gpt2(model, tokenizer, TEXT, 3, 1e-3, 8, tmp_path / "run", on_step=fail)
    entry = read_journal(tmp_path / "run")[-1]
    assert entry.kind == "error" and entry.words.startswith("failed: KeyError: 'a defect'\nTraceback")
    assert 'raise KeyError("a defect")' in entry.words


def test_skipped_steps_are_entries(tmp_path, parts):
    model, tokenizer = parts

    def break_it(record) -> None:
        if record["step"] == 2:
            model.flat_params[:] = np.nan

    with pytest.raises(TrainingDiverged):
        train_gpt2(model, tokenizer, TEXT, 30, 1e-3, 8, tmp_path / "run", on_step=break_it, on_nan="skip")
    skipped = [words for kind, words in said(tmp_path / "run") if kind == "warning"]
    assert skipped[0].startswith("step 3 is skipped: the loss is nan")


def test_the_command_tells_what_it_said_before_there_was_a_directory(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert main(["--data", str(text), "--steps", "2", "--seq-len", "8", "--run-dir", str(tmp_path / "run"),
                 "--val-fraction", "0.2", "--threads", "64"]) == 0
    heard = [words for kind, words in said(tmp_path / "run") if kind == "warning"]
    assert any("tokens, not the 512 asked for" in words for words in heard)
    assert any(words.startswith("64 threads have the time of") for words in heard)
    assert all(f"note: {words}" in capsys.readouterr().out for words in heard[:1])


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path, parts):
    (tmp_path / "run").mkdir()
    journal = Journal(tmp_path / "gone")
    journal.note("words")
    assert read_journal(tmp_path / "gone") == []


def test_any_file_can_be_read_as_a_journal(tmp_path):
    rng = np.random.default_rng(0)
    for content in (b"", b"\n\n", b"    indented first\n", bytes(rng.integers(0, 256, 3000, np.uint8)),
                    b"a info\nb  c\n", b"2026 warning words\r\n    more\n"):
        (tmp_path / JOURNAL).write_bytes(content)
        assert all(isinstance(entry, Entry) for entry in read_journal(tmp_path))
    assert read_journal(tmp_path) == [Entry("2026", "warning", "words\nmore")]
    (tmp_path / JOURNAL).write_text("".join(f"2026 info    {n}\n" for n in range(MOST_BYTES // 10)))
    entries = read_journal(tmp_path)
    assert entries[-1].words == str(MOST_BYTES // 10 - 1) and 100 < len(entries) < MOST_BYTES // 10


def test_one_run_in_another_does_not_leave_its_ear_behind(monkeypatch):
    first, second, third = [], [], []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *where: third.append(str(message)))
    outer, inner = overheard(first.append), overheard(second.append)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)  # the one that began first ends first
    warnings.showwarning(UserWarning("only the second hears this"), UserWarning, "file", 1)
    inner.__exit__(None, None, None)
    assert (first, second, third) == ([], ["only the second hears this"], ["only the second hears this"])
