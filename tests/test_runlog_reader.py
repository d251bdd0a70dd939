"""RunReader: the state after any way of delivering a file is the parse of the whole file; damage is survived."""

from __future__ import annotations

import csv
import json
import math
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feste import disk
from feste.run import follow, log, names, rows
from feste.run.follow import RunReader, read_info
from feste.run.log import RunLog
from feste.run.names import COLUMNS

SAMPLES = ["plain words", 'a "quote", a comma', "line\nbreak\n\n", '"', "ümlaut → 火", "", "ends in comma,"]


def record(step: int, sample: str | None = None, **more) -> dict:
    return {"step": step, "timestamp": f"{1000 + step:.3f}", "elapsed_seconds": 0.5 * step, "learning_rate": 6e-05,
            "train_loss": 6.0 / step, "train_perplexity": math.exp(6.0 / step), "grad_norm": 1.25,
            "tokens_per_second": 5000.0, "sample": sample} | more


def write(path, records, header=COLUMNS) -> bytes:
    path.mkdir(exist_ok=True)
    with open(path / names.LOG, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[log._cell(r.get(name)) for name in header] for r in records])
    return (path / names.LOG).read_bytes()


def some_records(n: int = 30) -> list[dict]:
    return [record(step, SAMPLES[step % len(SAMPLES)] if step % 3 == 0 else None,
                   val_loss=5.0 if step % 5 == 0 else None) for step in range(1, n + 1)]


def check(reader: RunReader, records: list[dict]) -> None:
    for name, values in reader.columns.items():
        expected = [float(log._cell(r.get(name)) or "nan") for r in records]
        np.testing.assert_array_equal(values, expected, err_msg=name)
    assert reader.samples == [(r["step"], r["sample"]) for r in records if r.get("sample")]


def read(path) -> RunReader:
    reader = RunReader(path)
    reader.poll()
    return reader


def test_reads_every_column_and_sample(tmp_path):
    records = some_records()
    write(tmp_path, records)
    reader = read(tmp_path)
    check(reader, records)
    assert reader.problems == [] and reader.found and reader.behind == 0


def test_split_at_every_byte(tmp_path):
    records = some_records(9)
    whole = write(tmp_path / "whole", records)
    path = tmp_path / "split"
    path.mkdir()
    for cut in range(len(whole)):
        path_of_log = path / names.LOG
        path_of_log.write_bytes(whole[:cut])
        reader = read(path)
        assert reader.columns["step"].tolist() == list(range(1, len(reader.columns["step"]) + 1))
        with open(path_of_log, "ab") as file:
            file.write(whole[cut:])
        reader.poll()
        check(reader, records)
        assert reader.problems == []


cells = st.one_of(st.none(), st.floats(width=32), st.sampled_from(["abc", " ", "1e5", "-inf", "0x1"]))
texts = st.one_of(st.none(), st.text(alphabet='ab,"\n\r 火', max_size=8))


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 9), cells, cells, texts), max_size=12), chunk=st.integers(1, 300))
def test_the_fast_parse_equals_the_slow_one(tmp_path_factory, rows, chunk):
    """Any steps (so any resumption), any cells, delivered in pieces of any size."""
    records = [{"step": s, "train_loss": a, "val_loss": b, "sample": text} for s, a, b, text in rows]
    path = tmp_path_factory.mktemp("run")
    write(path, records)
    fast, slow = RunReader(path), RunReader(path)
    while fast.poll(chunk):
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "parse_plain", lambda data, names: None)
        slow.poll()
    for name in RunReader.NUMERIC:
        np.testing.assert_array_equal(fast.columns[name], slow.columns[name])
    assert fast.samples == slow.samples
    assert fast.problems == slow.problems


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.floats().map(repr), st.floats(0, 1e9, width=32).map(log._cell),
                          st.integers(-10**20, 10**20).map(str), st.from_regex(r"[0-9.]{1,20}", fullmatch=True),
                          st.from_regex(r"[0-9+.e,nainf-]{1,6}", fullmatch=True))))
def test_numbers_equal_float(texts):
    texts = [text for text in texts if "," not in text]
    expected = [rows.number_of(text) for text in texts]
    numbers = rows._numbers("".join(text + "," for text in texts).encode())
    if None in expected:
        assert numbers is None
    else:
        np.testing.assert_array_equal(numbers, expected)


def test_only_the_columns_asked_for(tmp_path):
    write(tmp_path, some_records())
    reader = RunReader(tmp_path, ("step", "val_loss"))
    reader.poll()
    assert set(reader.columns) == {"step", "val_loss"}
    assert np.count_nonzero(reader.columns["val_loss"] == 5.0) == 6


def test_the_fast_parse_serves_a_log_with_samples(tmp_path, monkeypatch):
    write(tmp_path, some_records(500))
    monkeypatch.setattr(RunReader, "_take_slowly", lambda self, data: pytest.fail("the slow parse was used"))
    assert len(read(tmp_path).columns["step"]) == 500


def test_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "CHUNK_BYTES", 77)
    records = some_records(100)
    write(tmp_path, records)
    check(read(tmp_path), records)


def test_poll_reads_at_most_what_is_asked(tmp_path):
    whole = write(tmp_path, some_records())
    reader = RunReader(tmp_path)
    assert reader.poll(200) and reader.behind == len(whole) - 200
    while reader.poll(200):
        pass
    check(reader, some_records())


def test_nothing_new_is_no_change(tmp_path):
    write(tmp_path, some_records())
    reader = read(tmp_path)
    assert not reader.poll()


def test_truncated_file_is_read_afresh(tmp_path):
    write(tmp_path, some_records(30))
    reader = read(tmp_path)
    write(tmp_path, some_records(4))
    assert reader.poll()
    check(reader, some_records(4))


def test_replaced_file_is_read_afresh(tmp_path):
    write(tmp_path, some_records(30))
    reader = read(tmp_path)
    write(tmp_path / "other", [record(step, train_loss=1.0) for step in range(1, 50)])
    os.replace(tmp_path / "other" / names.LOG, tmp_path / names.LOG)
    reader.poll()
    check(reader, [record(step, train_loss=1.0) for step in range(1, 50)])


def test_file_rewritten_in_place_and_longer_is_read_afresh(tmp_path):
    """Same inode, larger, the same header: only its bytes tell."""
    write(tmp_path, some_records(10))
    reader = read(tmp_path)
    replaced = [record(step, train_loss=1.5) for step in range(1, 60)]
    write(tmp_path, replaced)
    reader.poll()
    check(reader, replaced)


def test_resumed_run_replaces_later_rows_and_samples(tmp_path):
    write(tmp_path, some_records(20))
    reader = read(tmp_path)
    again = [record(step, f"again {step}" if step % 4 == 0 else None, train_loss=0.5) for step in range(11, 31)]
    with open(tmp_path / names.LOG, "a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([[log._cell(r.get(n)) for n in COLUMNS] for r in again])
    reader.poll()
    check(reader, some_records(20)[:10] + again)


def test_missing_column(tmp_path):
    header = [name for name in COLUMNS if name not in ("val_loss", "sample")]
    write(tmp_path, some_records(5), header)
    reader = read(tmp_path)
    assert len(reader.columns["step"]) == 5 and np.isnan(reader.columns["val_loss"]).all()
    assert reader.problems == ["the log has no column val_loss, sample"]


@pytest.mark.parametrize("content", [
    b"name,age\nann,3\nbob,4\n", b"\n\n\n", b"\xff\xfe\x00\x01\n\x00", b"step\n1\n2\nx\n", b"step,train_loss\n1,2,3\n",
    b"PK\x03\x04" + bytes(range(256)) * 9, (",".join(COLUMNS) + "\n1,2,3\n" + "," * 10 + "\n").encode(),
    (",".join(COLUMNS) + "\n" + "1e999," + "," * 9 + "\nnan" + "," * 10 + "\n1.5" + "," * 10 + "\n").encode(),
    (",".join(COLUMNS) + "\n1" + "," * 10 + "x" * 200_000 + "\n").encode()])
def test_foreign_files_are_named_and_survived(tmp_path, content):
    (tmp_path / names.LOG).write_bytes(content)
    reader = read(tmp_path)
    assert reader.problems or reader._header is None or reader.samples
    assert all(np.isfinite(reader.columns["step"]))


def test_a_quote_that_never_closes_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "MAX_RECORD_BYTES", 500)
    monkeypatch.setattr(follow, "CHUNK_BYTES", 300)
    whole = write(tmp_path, [record(step) for step in range(1, 60)]).split(b"\n")
    whole[3] = whole[3] + b'"'
    (tmp_path / names.LOG).write_bytes(b"\n".join(whole))
    reader = read(tmp_path)
    assert reader.columns["step"][-1] == 59 and len(reader.columns["step"]) == 58
    assert reader.problems == ["the log has rows that are not feste's"]


def test_nan_and_inf_are_values(tmp_path):
    write(tmp_path, [record(1, train_loss=math.nan), record(2, train_loss=math.inf, grad_norm=-math.inf)])
    columns = read(tmp_path).columns
    assert math.isnan(columns["train_loss"][0]) and columns["train_loss"][1] == math.inf
    assert columns["grad_norm"][1] == -math.inf


def test_directory_that_comes_later_and_goes(tmp_path):
    reader = RunReader(tmp_path / "later")
    assert not reader.poll() and not reader.found
    write(tmp_path / "later", some_records(3))
    assert reader.poll() and reader.found
    (tmp_path / "later" / names.LOG).unlink()
    assert reader.poll() and not reader.found
    check(reader, some_records(3))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\udcff", "[" * 100_000])
def test_info_that_is_none(tmp_path, text):
    (tmp_path / names.INFO).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_info(tmp_path) == {}


@pytest.mark.parametrize(("info", "state"), [
    ({}, "unknown"), ({"state": "finished"}, "finished"), ({"state": "failed"}, "failed"), ({"state": 7}, "unknown"),
    ({"state": []}, "unknown"), ({"state": "running", "host": "elsewhere"}, "running")])
def test_states(tmp_path, info, state):
    write(tmp_path, some_records(3))
    (tmp_path / names.INFO).write_text(json.dumps(info))
    assert read(tmp_path).state == state


@pytest.mark.parametrize(("changes", "lock", "quiet", "state"), [
    ({}, "free", 60, "crashed"),                                         # it says running, and let go of its lock
    ({}, "free", 0, "running"),                                          # the log grew a moment ago
    ({}, "held", 60, "running"),                                         # it lives, whatever its pid is here
    ({"pid": 2**22 - 1}, "held", 60, "running"),                         # in a container, or of another user
    ({"host": "elsewhere", "boot": "another"}, "free", 60, "running"),   # a lock tells nothing of another machine
    ({"host": "a-container"}, "free", 60, "crashed"),                    # the kernel is the same
    ({"locked": False}, "free", 60, "running"),                          # a file system without locks
    ({"locked": None}, "free", 60, "running"),                           # a run of an earlier feste
    ({}, "missing", 60, "running")])
def test_crashed_needs_evidence(tmp_path, changes, lock, quiet, state):
    """A process that is not seen proves nothing; a lock that is free does, if the run had it and its log is quiet."""
    write(tmp_path, some_records(3))
    info = {"state": "running", "pid": 1, "locked": True, **follow.machine(), **changes}
    (tmp_path / names.INFO).write_text(json.dumps(info))
    os.utime(tmp_path / names.LOG, (time.time() - quiet,) * 2)
    if lock != "missing":
        held = disk.Lock(tmp_path / names.LOCK)
        if lock == "free":
            held.release()
    assert read(tmp_path).state == state


def test_stalled_needs_silence_beyond_the_pace(tmp_path):
    write(tmp_path, [record(step, elapsed_seconds=10.0 * step) for step in range(1, 60)])
    (tmp_path / names.INFO).write_text(json.dumps({"state": "running", "host": "elsewhere"}))
    path = tmp_path / names.LOG
    for silent, state in ((150, "running"), (250, "stalled")):  # 20 steps of 10 s
        os.utime(path, (path.stat().st_atime, os.path.getmtime(tmp_path / names.INFO) - silent))
        assert read(tmp_path).state == state


def test_reads_what_runlog_writes_while_it_writes(tmp_path):
    (tmp_path / "run").mkdir()
    writer, reader = RunLog(tmp_path / "run", {"planned_steps": 3}, locked=True), RunReader(tmp_path / "run")
    for step in range(1, 4):
        writer.write(record(step, "text", val_loss=2.0))
        reader.poll()
        assert len(reader.columns["step"]) == step
    assert reader.state == "running"
    writer.close("finished")
    reader.poll()
    assert reader.state == "finished" and reader.info["planned_steps"] == 3


@pytest.mark.long
def test_a_million_rows_take_little_memory(tmp_path):
    lines = [f"{s},1000.0,{s * 0.5},6e-05,{6 / s:.8g},,{s % 7}.5,,1.25,5000.5,\n" for s in range(1, 1_000_001)]
    (tmp_path / names.LOG).write_text(",".join(COLUMNS) + "\n" + "".join(lines))
    reader = read(tmp_path)
    assert len(reader.columns["step"]) == 1_000_000
    assert sum(column.nbytes for column in reader._data) < 1.3 * 8 * 1_000_000 * len(RunReader.NUMERIC)
