"""Windows and batches, and where the text comes from."""

import json
import os
from importlib.resources import files

import numpy as np
import pytest

from feste import (
    GPT2,
    BPETokenizer,
    Checkpoint,
    Config,
    FesteError,
    corpus,
    find_checkpoint,
    read_info,
    train_gpt2,
)
from feste.corpus import CorpusError, Source, shakespeare_text
from feste.data import Batches, Shuffle, even_starts, split_tokens, whole_starts, windows
from feste.text import TextError
from feste.tokens import load_tokens


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_a_shuffle_that_is_computed_is_a_permutation(n):
    one, other = (Shuffle(n, np.random.default_rng(seed)) for seed in (1, 2))
    orders = [[int(shuffle[i]) for i in range(n)] for shuffle in (one, other)]
    assert sorted(orders[0]) == list(range(n))
    if n > 60:
        assert orders[0] != orders[1]
        assert abs(np.corrcoef(orders[0], np.arange(n))[0, 1]) < 0.3


def test_more_windows_than_memory_holds_are_shown_once_each(monkeypatch):
    monkeypatch.setattr("feste.data.MOST_IN_MEMORY", 10)
    batches = Batches(np.arange(1000), 4, 3)
    starts = batches.starts(1, batches.windows_per_epoch)
    assert len(set(starts.tolist())) == batches.windows_per_epoch and len({start % 4 for start in starts.tolist()}) == 1


def test_the_last_part_is_held_out():
    train, val = split_tokens(np.arange(101), 0.1)
    assert train.tolist() == list(range(91)) and val.tolist() == list(range(91, 101))


@pytest.mark.parametrize(("n", "seq_len"), [(1000, 10), (1003, 16), (129, 64), (66, 64), (65, 64), (64_321, 64)])
def test_an_epoch_shows_every_window_once(n, seq_len):
    batches = Batches(np.arange(n, dtype=np.uint16), seq_len, seed=3)
    for epoch in range(3):
        starts = np.sort(batches.starts(epoch + 1, batches.windows_per_epoch))
        assert (np.diff(starts) == seq_len).all()
        assert starts[0] >= 0 and starts[-1] + seq_len + 1 <= n
        assert len(starts) == batches.windows_per_epoch
    assert batches.windows_per_epoch >= (n - 1) // seq_len - 1


def test_steps_walk_through_the_epochs_without_a_gap():
    batches = Batches(np.arange(1000, dtype=np.uint16), 10, seed=3)
    n = batches.windows_per_epoch
    walked = np.concatenate([batches.starts(step, 7) for step in range(1, n + 1)])
    expected = np.concatenate([batches.starts(epoch, n) for epoch in range(1, 8)])
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
    ids, targets = windows(tokens, even_starts(tokens, 10, 5), 10)
    assert ids[0, 0] == 0 and targets[-1, -1] == 999 and len(ids) == 5
    everything, _ = windows(tokens, whole_starts(tokens, 10), 10)
    assert np.array_equal(everything.reshape(-1), np.arange(990))
    assert np.array_equal(even_starts(tokens, 10, 500), whole_starts(tokens, 10))
    with pytest.raises(FesteError, match="has 10 tokens, but one window of seq_len=10 and its targets need 11"):
        even_starts(tokens[:10], 10, 5)


# ---- where the text comes from -----------------------------------------------------------------------------


def test_the_complete_works_come_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = shakespeare_text()
    assert len(text) == 5_057_240 and text.startswith("ALL'S WELL THAT ENDS WELL") and "\r" not in text
    assert list(tmp_path.iterdir()) == []
    assert files("feste").joinpath("shakespeare.txt.xz").stat().st_size < 2_000_000


def test_a_copy_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shakespeare.txt").write_bytes(b"my own\r\n")
    assert shakespeare_text() == "my own\n"


def test_a_damaged_copy_is_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", "0" * 64)
    with pytest.raises(CorpusError, match="is damaged; install feste again"):
        shakespeare_text()
    monkeypatch.setattr(corpus, "SHAKESPEARE_FILE", "_bpe.pyx")
    with pytest.raises(CorpusError, match="cannot be read"):
        shakespeare_text()


@pytest.mark.parametrize("name", ["lines.jsonl", "LINES.JSONL", "array.json", "lines.ndjson.gz"])
def test_json_is_not_taken_for_prose(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a"}\n' * 100)
    with pytest.raises(CorpusError, match="holds JSON") as raised:
        Source(str(tmp_path / name)).load(300)
    assert raised.value.names == ("prepare",)


def test_a_folder_of_texts_is_not_sent_in_a_circle(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CorpusError, match="is a directory without tokens") as raised:
        Source(str(tmp_path)).load(300)
    assert raised.value.names == ("prepare",)
    for name, value in (("encoding", "cp1252"), ("errors", "replace"), ("train_chars", 9)):
        with pytest.raises(CorpusError, match=f"{name} is for texts") as raised:
            Source(str(tmp_path), **{name: value})
        assert raised.value.names == (name,)


def test_run_json_keeps_how_the_text_was_read(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("Gr\xfc\xdfe ".encode("cp1252") * 400)
    with pytest.raises(TextError, match="encoding"):
        Source(str(path)).load(300)
    source = Source(str(path), encoding="cp1252", errors="replace")
    assert Source.of_run({"data_flags": source.to_dict()}) == source
    assert Source.of_run({"data_flags": {"data": None, "train_chars": 9, "tokenizer_chars": None}}) == Source(None, 9)
    assert Source.of_run({"data_flags": {"data": 7}}) is None and Source.of_run({}) is None
    assert source.text() == "Gr\xfc\xdfe " * 400


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
    with pytest.raises(FesteError, match="no finished directory of tokens"):
        load_tokens(tmp_path)


def test_tokens_that_are_cut_off_under_a_training_end_it_in_words(tmp_path):
    """A map of a file that lost its end kills the process that touches it."""
    token_directory(tmp_path, np.arange(200_000, dtype=np.uint16) % 260)
    tokens, tokenizer = load_tokens(tmp_path)
    train, held_out = split_tokens(tokens, 0.1)
    batches = Batches(train, 16, 1)
    batches.batch(1, 8)
    os.truncate(tmp_path / "tokens.bin", 100_000)
    for read in (lambda: batches.batch(2, 8), lambda: windows(held_out, np.array([5]), 16),
                 lambda: train_gpt2(GPT2(Config(260, 16, 1, 1, 16)), tokenizer, tokens, 5, 1e-3, 16)):
        with pytest.raises(FesteError, match=r"tokens\.bin was cut off while it was in use: it has 100,000 bytes"):
            read()


def test_a_run_whose_tokens_are_cut_off_keeps_its_checkpoints(tmp_path):
    token_directory(tmp_path, np.arange(200_000, dtype=np.uint16) % 260)
    tokens, tokenizer = load_tokens(tmp_path)

    def cut(record):
        if record["step"] == 12:
            os.truncate(tmp_path / "tokens.bin", 100_000)

    with pytest.raises(FesteError, match="was cut off"):
        train_gpt2(GPT2(Config(260, 16, 1, 1, 16)), tokenizer, tokens, 50, 1e-3, 16, tmp_path / "run", on_step=cut,
                   checkpoint_interval=5)
    assert read_info(tmp_path / "run")["state"] == "failed" and "cut off" in read_info(tmp_path / "run")["reason"]
    assert Checkpoint.load(find_checkpoint(tmp_path / "run")[0]).step == 10
