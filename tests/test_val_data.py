"""A text of its own that is held out."""

import numpy as np
import pytest

from feste import BPETokenizer, Checkpoint, read_info, shakespeare_text
from feste.cli import main
from feste.evaluation import bits_per_byte
from tools.compare import main as compare

FLAGS = ["--steps", "6", "--vocab-size", "300", "--seq-len", "16", "--val-interval", "3", "--sample-interval", "100"]


@pytest.fixture
def texts(tmp_path):
    whole = shakespeare_text()
    for name, text in (("train", whole[:20_000]), ("held_out", whole[30_000:33_000]), ("other", whole[40_000:43_000]),
                       ("short", "To be")):
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def train(texts, *more, run="run") -> int:
    return main(["--data", str(texts / "train.txt"), "--run-dir", str(texts / run), *FLAGS, *more])


def test_all_of_the_text_is_learnt_from_and_the_other_is_scored(texts, capsys):
    assert train(texts, "--val-data", str(texts / "held_out.txt")) == 0
    said = capsys.readouterr().out
    tokenizer, info = BPETokenizer.load(texts / "run" / "tokenizer.json"), read_info(texts / "run")
    assert info["tokens"] == len(tokenizer.encode((texts / "train.txt").read_text()))
    held_out = len(tokenizer.encode((texts / "held_out.txt").read_text()))
    assert f"{info['tokens']:,} tokens, {held_out:,} in files of their own held out" in said

    assert compare([str(texts / "run"), "--bits-per-byte"]) == 0
    best = Checkpoint.load(texts / "run" / "checkpoint_best.bin")
    score = bits_per_byte(best.model, tokenizer, (texts / "held_out.txt").read_text(), 16)
    assert f"{score:.4f}" in capsys.readouterr().out


def test_a_run_goes_on_with_the_same_text_held_out(texts, capsys):
    held_out = texts / "held_out.txt"
    assert train(texts, "--val-data", str(held_out), "--checkpoint-interval", "3") == 0
    again = ["--resume", str(texts / "run" / "checkpoint_step_3.bin"), "--run-dir"]
    assert main([*again, str(texts / "again")]) == 0
    first, second = (Checkpoint.load(texts / name / "checkpoint_final.bin") for name in ("run", "again"))
    assert (first.model.flat_params == second.model.flat_params).all()
    assert first.best_val_loss == second.best_val_loss and np.isfinite(first.best_val_loss)
    held_out.write_text((texts / "other.txt").read_text())
    capsys.readouterr()
    assert main([*again, str(texts / "third")]) == 2
    assert "the training text is another one" in capsys.readouterr().err


def test_runs_that_hold_out_different_texts_are_not_compared(texts, capsys):
    for name in ("held_out", "other"):
        assert train(texts, "--val-data", str(texts / f"{name}.txt"), run=name) == 0
    assert compare([str(texts / "held_out"), str(texts / "other"), "--bits-per-byte"]) == 2
    assert "the runs hold out different texts" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--val-data", "held_out.txt", "--val-fraction", "0.2"], "--val-fraction=0.2 holds out the end of the text, and"),
    (["--val-data", "short.txt"], "the held-out text has 4 tokens, but one window"),
    (["--val-data", "nowhere.txt"], "nowhere.txt"),
])
def test_mistakes_are_one_line_and_nothing_is_written(texts, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(texts)
    assert train(texts, *flags) == 2
    assert message in capsys.readouterr().err and not (texts / "run").exists()


def test_a_text_is_not_held_out_of_questions_or_tokens(texts, capsys):
    pairs = texts / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "completion": " b"}\n' * 20)
    for data in (pairs, texts):
        assert main(["--data", str(data), "--val-data", str(texts / "held_out.txt")]) == 2
        assert "--val-data is for texts" in capsys.readouterr().err
