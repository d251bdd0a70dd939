"""The log carries every text: what is written comes back, through the fast reader, the slow one and a resumed run."""

import csv
import io
import sys

import numpy as np
import pytest
import torture
from hypothesis import given, settings
from hypothesis import strategies as st
from torture import history, train

from feste import BPETokenizer, RunReader, read_rows, trainer
from feste.run import rows
from feste.run.log import RunLog, copy_rows
from feste.run.names import LOG

NASTY = "\0\r\n\",'\x1b\x0b\x85\u2028\ufeff\ufffd\U0001f600 a1"
TEXTS = st.one_of(st.text(alphabet=NASTY, max_size=30), st.text(max_size=30))  # st.text() has no lone surrogates
LONG = 'he said: "\0,\r\n' * 20_000  # 280,000 characters; Python's csv module stops at 131,072


@given(st.lists(TEXTS, min_size=1, max_size=8))
@settings(deadline=None)
def test_the_cells_of_a_record_are_those_it_was_made_of(cells):
    record = rows.record_of(cells).encode()
    assert rows.record_end(record, 0) == len(record)
    if cells != [""]:
        assert rows.cells_of(record) == cells


@given(st.lists(st.lists(TEXTS, min_size=2, max_size=4), max_size=6))
@settings(deadline=None)
def test_records_are_found_one_after_another(table):
    data = b"".join(rows.record_of(cells).encode() for cells in table)
    assert [rows.cells_of(record) for record in rows.records(data + b'7,"torn')] == table


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the csv module of Python 3.10 has no NUL")
@given(st.lists(st.lists(TEXTS, min_size=2, max_size=4), max_size=6))
@settings(deadline=None)
def test_records_are_csv(table):
    text = "".join(rows.record_of(cells) for cells in table)
    assert list(csv.reader(io.StringIO(text, newline=""), strict=True)) == table


@given(st.lists(st.one_of(st.none(), TEXTS), min_size=1, max_size=12), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_every_sample_comes_back_from_the_log(tmp_path_factory, samples, chunk):
    path = tmp_path_factory.mktemp("run")
    log = RunLog(path, {}, locked=True)
    for step, sample in enumerate(samples, 1):
        log.write({"step": step, "train_loss": 1.0 / step, "sample": sample})
    log.close("finished")
    expected = [(step, sample) for step, sample in enumerate(samples, 1) if sample]
    assert [(row["step"], row["sample"]) for row in read_rows(path) if "sample" in row] == expected
    reader = RunReader(path)
    while reader.poll(chunk) or reader.behind:
        pass
    assert reader.samples == expected and reader.problems == []
    assert reader.columns["step"].tolist() == list(range(1, len(samples) + 1))
    before = (path / LOG).read_bytes()
    copy_rows(path / LOG, path / LOG, len(samples))
    assert (path / LOG).read_bytes() == before


def test_every_byte_a_tokenizer_knows_can_be_a_sample(tmp_path):
    """What a model may write: the text of any ids, also of single bytes that are no UTF-8."""
    tokenizer = torture.tokenizer()
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    texts += [tokenizer.decode(np.random.default_rng(seed).integers(0, 256, 50)) for seed in range(50)]
    log = RunLog(tmp_path, {}, locked=True)
    for step, text in enumerate(texts, 1):
        log.write({"step": step, "sample": text})
    log.close("finished")
    assert [row.get("sample", "") for row in read_rows(tmp_path)] == texts


@pytest.mark.parametrize("sample", ["\0", LONG], ids=["NUL", "long"])
def test_no_sample_ends_a_run_or_keeps_it_from_being_resumed(tmp_path, monkeypatch, sample):
    monkeypatch.setattr(trainer, "_sample", lambda run, step: f"{sample}{step}")
    train(tmp_path / "whole", keep_last=9)
    train(tmp_path / "again", resume=tmp_path / "whole" / "checkpoint_step_15.bin", keep_last=9)
    assert (read_rows(tmp_path / "again")[-1]["sample"] == f"{sample}30"
            == read_rows(tmp_path / "whole")[-1]["sample"])
    if sample == "\0" and sys.version_info >= (3, 11):
        assert history(tmp_path / "again") == history(tmp_path / "whole")
    reader = RunReader(tmp_path / "again")
    while reader.poll(100_000) or reader.behind:
        pass
    assert [text for _, text in reader.samples] == [f"{sample}{step}" for step in range(5, 31, 5)]
    assert reader.problems == []


def test_a_tokenizer_of_control_characters_trains_to_the_end(tmp_path):
    """A text of NULs, quotes and line ends: every sample of the model consists of them."""
    text = "".join(np.random.default_rng(0).choice(list("\0\r\n\",\x1b"), 4000))
    tokenizer = BPETokenizer.train(text, 300)
    from feste import GPT2, Config, train_gpt2
    model = GPT2(Config(tokenizer.vocab_size, 16, 1, 1, 16))
    result = train_gpt2(model, tokenizer, text, 20, 1e-2, 16, tmp_path / "run", sample_interval=1, sample_tokens=9,
                        sample_prompt="\0", val_interval=10)
    logged = read_rows(tmp_path / "run")
    assert result.state == "finished" and len(logged) == 20 and any("\0" in row.get("sample", "") for row in logged)
