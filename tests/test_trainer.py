"""train_gpt2: what a run leaves behind, when it stops, and the examples' command line."""

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from feste import (
    GPT2,
    AdamW,
    BPETokenizer,
    Checkpoint,
    Config,
    TrainConfig,
    cli,
    data,
    ops,
    read_info,
    read_rows,
    train_gpt2,
)
from feste.cli import run_preset
from feste.config import PRESETS
from feste.run.log import RunDirectoryError
from feste.run.names import COLUMNS
from feste.schedule import learning_rate_at
from feste.trainer import TrainingDiverged

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{a} {verb} {b}.\n" for a in ("The king", "A fool", "My lord", "The queen", "Hamlet")
               for verb in ("loves", "hates", "knows", "sees", "is not") for b in ("the crown", "a ghost", "me", "thee")
               ) * 6
TOKENIZER = BPETokenizer.train(TEXT, 280)
CONFIG = Config(vocab_size=280, n_embd=16, n_layers=1, n_heads=2, block_size=16)
QUICK = {"num_steps": 20, "learning_rate": 1e-2, "seq_len": 16, "val_interval": 5, "sample_interval": 10,
         "checkpoint_interval": 5, "sample_tokens": 5, "val_windows": 4}


@pytest.fixture(autouse=True)
def all_threads():
    yield
    ops.set_num_threads(0)


def train(run_dir=None, model=None, text=TEXT, **changes):
    return train_gpt2(model or GPT2(CONFIG), TOKENIZER, text, run_dir=run_dir, **(QUICK | changes))


# ---- a run and its directory -------------------------------------------------------------------------------


def test_a_run_directory_is_complete(tmp_path):
    result = train(tmp_path / "run")
    assert result.state == "finished" and result.step == 20
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")) == [
        "checkpoint_best.bin", "checkpoint_final.bin", "checkpoint_step_10.bin", "checkpoint_step_15.bin",
        "checkpoint_step_20.bin", "run.json", "run.log", "tokenizer.json", "training_log.csv"]
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, 15, 20]
    assert [row["step"] for row in rows if "sample" in row] == [10, 20]
    for row in rows:
        assert row["learning_rate"] == pytest.approx(learning_rate_at(row["step"], TrainConfig(**QUICK)), rel=1e-6)
        assert row["train_perplexity"] == pytest.approx(np.exp(row["train_loss"]), rel=1e-6)
        assert row["grad_norm"] > 0 and row["tokens_per_second"] > 0
    with open(tmp_path / "run" / "training_log.csv", newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    info = read_info(tmp_path / "run")
    assert info["state"] == "finished" and info["parameters"] == GPT2(CONFIG).num_parameters()
    assert info["planned_steps"] == 20 and info["tokens_per_step"] == 128 and info["model"] == CONFIG.to_dict()
    assert BPETokenizer.load(tmp_path / "run" / "tokenizer.json").to_json() == TOKENIZER.to_json()


def test_it_learns_and_says_how_well(tmp_path):
    result = train(num_steps=150)
    assert result.best_val_loss < 3.5 < np.log(280) and result.run_dir is None


def test_loading_a_trained_model(tmp_path):
    """The guide's snippet: load, generate, continue training as a new run."""
    train(tmp_path / "run")
    checkpoint = Checkpoint.load(tmp_path / "run" / "checkpoint_best.bin")
    ids = checkpoint.tokenizer.encode("The king")
    text = checkpoint.tokenizer.decode(checkpoint.model.generate(ids, 20, 0.8))
    assert text.startswith("The king") and len(text) > len("The king")
    result = train_gpt2(checkpoint.model, checkpoint.tokenizer, TEXT, 10, 1e-3, 16, tmp_path / "continued",
                        optimizer=checkpoint.optimizer)
    assert result.state == "finished" and result.train_loss < np.log(280)


def test_the_best_checkpoint_is_the_best(tmp_path):
    result = train(tmp_path / "run", num_steps=60, learning_rate=0.3, clip_norm=100.0)
    best = Checkpoint.load(tmp_path / "run" / "checkpoint_best.bin")
    losses = {row["step"]: row["val_loss"] for row in read_rows(tmp_path / "run") if "val_loss" in row}
    assert best.step == result.best_step == min(losses, key=losses.get)
    assert best.best_val_loss == pytest.approx(min(losses.values()), rel=1e-7)


def test_early_stopping(tmp_path):
    result = train(tmp_path / "run", num_steps=500, learning_rate=1e-12, patience=10)
    assert result.state == "early_stopped" and 10 <= result.step < 60
    assert read_info(tmp_path / "run")["state"] == "early_stopped"
    assert (tmp_path / "run" / "checkpoint_final.bin").exists()


def test_a_saved_snapshot_does_not_see_later_steps(tmp_path):
    model = GPT2(CONFIG)
    at_ten = np.empty_like(model.flat_params)
    train(tmp_path / "run", model, on_step=lambda r: r["step"] == 10 and np.copyto(at_ten, model.flat_params))
    saved = Checkpoint.load(tmp_path / "run" / "checkpoint_step_10.bin").model.flat_params
    assert np.array_equal(saved, at_ten)


def test_a_run_directory_is_never_reused(tmp_path):
    train(tmp_path / "run")
    before = (tmp_path / "run" / "training_log.csv").read_bytes()
    with pytest.raises(RunDirectoryError, match="exists; a run directory is never reused"):
        train(tmp_path / "run")
    assert (tmp_path / "run" / "training_log.csv").read_bytes() == before


# ---- numerical trouble -------------------------------------------------------------------------------------


def poison_at(model: GPT2, *steps: int):
    """Make the gradient of some steps NaN, as a damaged batch would."""
    original, count = model.forward_backward, iter(range(1, 10_000))

    def forward_backward(*args, **kwargs):
        loss = original(*args, **kwargs)
        if next(count) in steps:
            model.flat_grads[0] = np.nan
        return loss
    model.forward_backward = forward_backward


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    model = GPT2(CONFIG)
    poison_at(model, 13)
    with pytest.raises(TrainingDiverged, match="step 13: the gradient norm is nan; the learning rate may be too high"):
        train(tmp_path / "run", model)
    info = read_info(tmp_path / "run")
    assert info["state"] == "failed" and "step 13" in info["reason"]
    assert Checkpoint.load(tmp_path / "run" / "checkpoint_step_10.bin").step == 10
    assert not (tmp_path / "run" / "checkpoint_final.bin").exists()


def test_a_nan_can_be_skipped(tmp_path):
    model = GPT2(CONFIG)
    poison_at(model, 3, 4, 13)
    result = train(tmp_path / "run", model, on_nan="skip")
    assert result.state == "finished" and result.skipped_steps == 3 and np.isfinite(model.flat_params).all()
    assert read_info(tmp_path / "run")["skipped_steps"] == 3
    model = GPT2(CONFIG)
    poison_at(model, *range(5, 100))
    with pytest.raises(TrainingDiverged, match=r"step 14: .*the 10th time in a row"):
        train(model=model, on_nan="skip")


def test_an_infinite_loss_is_caught():
    model = GPT2(CONFIG)
    model.params["transformer.ln_f.bias"][:] = np.inf
    with pytest.raises(TrainingDiverged, match="step 1: the loss is"):
        train(model=model)


# ---- an optimizer that is handed over ----------------------------------------------------------------------


def test_the_settings_of_an_optimizer_are_those_of_the_run(tmp_path):
    model = GPT2(CONFIG)
    train(tmp_path / "run", model, optimizer=AdamW(model, weight_decay=0.5))
    assert read_info(tmp_path / "run")["train"]["weight_decay"] == 0.5
    with pytest.raises(ValueError, match=r"weight_decay=0\.1, but the optimizer has 0\.5"):
        train(model=model, optimizer=AdamW(model, weight_decay=0.5), weight_decay=0.1)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the optimizer is that of another model"):
        train(optimizer=AdamW(GPT2(CONFIG)))


# ---- settings and data that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"seq_len": 17}, "seq_len=17 is beyond the model's block_size=16"),
    ({"text": "short"}, "held-out part .* has . tokens, but one window of seq_len=16"),
    ({"text": TEXT[:150]}, "held-out part"),
    ({"text": np.zeros((3, 3), int)}, "1-D array of integer token ids"),
    ({"num_steps": 0}, "num_steps must be a positive integer, got 0"),
    ({"learning_rate": float("nan")}, "learning_rate must be a positive number, got nan"),
    ({"on_nan": "ignore"}, "on_nan must be one of stop, skip"),
    ({"val_fraction": 1.0}, "val_fraction"),
    ({"sample_prompt": ""}, "sample_prompt must not be empty"),
])
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_an_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match="num_stepz"):
        train(num_stepz=3)


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has 280 tokens, the model only 270"):
        train(model=GPT2(Config(270, 16, 1, 2, 16)))


def test_training_on_token_ids_is_training_on_their_text():
    models = [GPT2(CONFIG), GPT2(CONFIG)]
    train(model=models[0])
    train(model=models[1], text=TOKENIZER.encode_to_numpy(TEXT))
    assert np.array_equal(models[0].flat_params, models[1].flat_params)


def test_the_hash_of_a_corpus_is_that_of_its_ids(monkeypatch):
    monkeypatch.setattr(data, "HASH_BLOCK", 7)
    ids = np.arange(50)
    expected = hashlib.sha256(ids.astype(np.uint32)).hexdigest()
    assert {data.Text(ids.astype(kind)).sha256() for kind in (np.uint16, np.int32, np.int64)} == {expected}


# ---- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 4)
    return path


TINY_FLAGS = ["--n-embd", "16", "--n-layers", "1", "--block-size", "16", "--vocab-size", "280", "--steps", "12",
              "--val-interval", "5", "--checkpoint-interval", "5", "--sample-interval", "10", "--val-windows", "4"]


def test_an_example_from_end_to_end(tmp_path, text_file, capsys):
    assert run_preset("tiny", [*TINY_FLAGS, "--data", str(text_file), "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"{ops.isa} ({ops.isa_reason})" in out and "fp32" in out
    assert "finished at step 12" in out and "loss over the whole held-out part" in out and "temperature 0.8" in out
    assert (tmp_path / "run" / "checkpoint_final.bin").exists()


def test_a_dry_run_writes_nothing(tmp_path, text_file, capsys):
    assert run_preset("tiny", [*TINY_FLAGS, "--data", str(text_file), "--run-dir", str(tmp_path / "run"),
                               "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "memory", "disk", "steps a second", "tokens a step", "no run directory"):
        assert word in out
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_text_of_ones_own_is_used_whole_and_names_the_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_text.txt").write_text("to be, or not to be " * 20_000)  # more than the preset takes of Shakespeare
    flags = [*TINY_FLAGS, "--data", "my_text.txt", "--dry-run"]
    printed = []
    for more in ([], ["--train-chars", "10000"]):
        assert run_preset("tiny", flags + more) == 0
        printed.append(capsys.readouterr().out)
    assert "data: my_text.txt: " in printed[0] and "goes to data/my_text_tiny_" in printed[0]
    assert "data: at most 10,000 characters of my_text.txt: " in printed[1]
    whole, part = (int(re.search(r": ([\d,]+) tokens, the last", text)[1].replace(",", "")) for text in printed)
    assert whole > 35 * part


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path, text_file, capsys):
    text_file.write_text(TEXT[:100])
    assert run_preset("tiny", [*TINY_FLAGS, "--data", str(text_file), "--dry-run"]) == 2
    assert "held-out part" in capsys.readouterr().err


def test_a_run_the_disk_cannot_hold_is_refused(tmp_path, text_file, capsys, monkeypatch):
    argv, free = [*TINY_FLAGS, "--data", str(text_file), "--run-dir", str(tmp_path / "run")], 2_900_000
    monkeypatch.setattr(cli, "disk_bytes", lambda plan: 3_000_000)
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    for extra in ([], ["--dry-run"]):
        assert run_preset("tiny", argv + extra) == 2
        printed = capsys.readouterr()
        assert "takes up to 3 MB of disk" in printed.out and "needs about 3 MB of disk" in printed.err
        assert not (tmp_path / "run").exists()
    free = 3_000_000
    assert run_preset("tiny", argv) == 0
    free = 2_900_000  # what is lacking is in the directory already
    assert run_preset("tiny", ["--resume", str(tmp_path / "run"), "--steps", "15"]) == 0


@pytest.mark.parametrize(("flags", "message"), [
    (["--data", "missing.txt"], "missing.txt: No such file or directory"),
    (["--data", ""], "is a directory without tokens; make a directory of tokens with `feste prepare"),
    (["--resume", ""], ". holds no checkpoint yet"),
    (["--n-embd", "100000000"], "not enough memory"),
    (["--weight-decay", "inf"], "--weight-decay must be a finite number"),
    (["--n-heads", "5"], "--n-embd must be divisible by --n-heads"),
    (["--vocab-size", "255"], "--vocab-size must be an integer of at least 256"),
    (["--seq-len", "17"], "--seq-len=17 is beyond the model's --block-size=16"),
    (["--train-chars", "30"], "tokens, but one window"),
    (["--train-chars", "0"], "--train-chars must be at least 1, got 0"),
    (["--steps", "0"], "--steps must be a positive integer"),
    (["--run-dir", "text.txt/run"], "cannot write the run directory text.txt/run: Not a directory"),
    (["--resume", "nowhere"], "nowhere is neither a checkpoint nor a run directory"),
])
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY_FLAGS, "--data", str(text_file), "--run-dir", "run", *flags]
    assert run_preset("tiny", argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path("run").exists()


def script(name: str, *flags: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "examples" / name), *flags], capture_output=True, text=True,
                          timeout=120, **kwargs)


@pytest.mark.parametrize(("flags", "message"), [
    (["--step", "3"], "there is no --step, did you mean --steps?; --help"),
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--precision", "fp16"], "invalid choice: 'fp16'"), (["--steps", "many"], "invalid int value: 'many'"),
])
def test_unknown_flags_and_presets_are_errors(flags, message):
    done = script("train.py", *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_presets_are_listed_with_their_true_sizes():
    done = script("train.py", "--list-presets")
    assert done.returncode == 0
    for name in PRESETS:
        assert name in done.stdout
    for count in ("169,728", "873,600", "4,011,520", "116,989,440"):
        assert count in done.stdout


def test_fine_tuning_starts_from_a_checkpoint_and_its_tokenizer(tmp_path, text_file):
    train(tmp_path / "first", num_steps=60)
    done = script("train.py", "--checkpoint", str(tmp_path / "first"), "--data", str(text_file), "--steps", "5",
                  "--run-dir", str(tmp_path / "second"), "--seq-len", "16")
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "second")[0]["train_loss"] < 4.5 < np.log(280)
    other = script("train.py", "--checkpoint", str(tmp_path / "first"), "--n-embd", "32", "--data", str(text_file))
    assert other.returncode == 2 and "--n-embd=16, not 32" in other.stderr


def test_tokens_of_another_tokenizer_are_refused(tmp_path, text_file, capsys):
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    other = BPETokenizer.train(TEXT, 300)
    ids = other.encode_to_numpy(TEXT * 4)
    ids.tofile(tokens / "tokens.bin")
    (tokens / "tokens.json").write_text(json.dumps({"file": "tokens.bin", "dtype": ids.dtype.name, "tokens": len(ids)}))
    other.save(tokens / "tokenizer.json")
    data, new = ["--data", str(tokens)], ["--run-dir", str(tmp_path / "run"), "--steps", "2"]
    for flags, message in ((["--vocab-size", "280"], "--vocab-size=280 is less than the 300 tokens"),
                           (["--train-chars", "9"], "--train-chars is for texts")):
        assert run_preset("tiny", [*flags, *data, *new]) == 2
        assert message in capsys.readouterr().err
    assert run_preset("tiny", [*data, *new]) == 0
    assert Checkpoint.load(tmp_path / "run" / "checkpoint_final.bin").model.config.vocab_size == 300
    train(tmp_path / "first")
    done = script("train.py", "--checkpoint", str(tmp_path / "first"), *data)
    assert done.returncode == 2 and "made with another tokenizer" in done.stderr


CLOSED_OUTPUT = """
import os, sys
from feste import cli
def enter(progress):
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    return progress
cli.Progress.__enter__ = enter
sys.exit(cli.run_preset("tiny", sys.argv[1:]))
"""


def test_output_that_nobody_reads_any_more_does_not_end_a_run(tmp_path, text_file):
    done = subprocess.run([sys.executable, "-c", CLOSED_OUTPUT, *TINY_FLAGS, "--data", str(text_file), "--run-dir",
                           str(tmp_path / "run")], capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b""
    assert read_info(tmp_path / "run")["state"] == "finished" and len(read_rows(tmp_path / "run")) == 12


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("0[5-8]*.py")))
def test_the_examples_have_the_guides_settings(name):
    size = name.removeprefix("0").split("_")[-1].removesuffix(".py")
    expected = {  # vocabulary, channels, layers, heads, context, steps, learning rate, patience, characters
        "tiny": (512, 64, 2, 1, 64, 500, 3e-3, 5000, 200_000),
        "small": (1024, 128, 3, 1, 128, 2000, 2e-3, 5000, 500_000),
        "medium": (1536, 256, 4, 4, 256, 8000, 3e-4, 3000, 2_000_000),
        "gpt2": (20534, 768, 12, 12, 512, 5000, 3e-4, 2000, None)}[size]
    p = PRESETS[size]
    m, t = p.model, p.train
    assert (m.vocab_size, m.n_embd, m.n_layers, m.n_heads, m.block_size, t.num_steps, t.learning_rate, t.patience,
            p.train_chars) == expected
    assert p.tokenizer_chars == p.train_chars and t.batch_size * t.accumulation == 8 and t.seq_len == m.block_size
    assert (t.warmup_fraction, t.clip_norm, t.val_interval, t.sample_interval, t.checkpoint_interval) == (
        0.1, 1.0, 50, 200, 250)
    assert f'run_preset("{size}"' in (ROOT / "examples" / name).read_text()


def test_run_json_says_running_until_the_end(tmp_path):
    seen = []

    def read(record):
        seen.append(json.loads((tmp_path / "run" / "run.json").read_text())["state"])
    train(tmp_path / "run", on_step=read)
    assert set(seen) == {"running"} and os.getpid() == read_info(tmp_path / "run")["pid"]


# ---- the display -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "bar"), [("xterm-256color", True), ("dumb", False), ("unknown", False)])
def test_a_terminal_that_cannot_go_back_gets_lines(tmp_path, text_file, monkeypatch, term, bar):
    """30,000 steps without a sign of life: a bar is not drawn on TERM=dumb, so there must be lines."""
    shown = Terminal()
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout", shown)
    assert run_preset("tiny", [*TINY_FLAGS, "--data", str(text_file), "--run-dir", str(tmp_path / "run")]) == 0
    steps = [line for line in shown.getvalue().splitlines() if line.startswith("step ")]
    assert bool(steps) != bar and ("\x1b[" in shown.getvalue()) == bar


class Notebook:
    """Standard output as in Jupyter: neither reconfigure, nor fileno, nor a terminal."""

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def test_a_notebook_may_run_an_example(tmp_path, text_file, monkeypatch):
    shown = Notebook()
    monkeypatch.setattr("sys.stdout", shown)
    assert run_preset("tiny", [*TINY_FLAGS, "--data", str(text_file), "--run-dir", str(tmp_path / "run")]) == 0
    assert "finished at step" in shown.written
    cli.discard_output()  # what follows when a reader goes away


def test_the_farewell_cannot_steer_a_terminal(tmp_path, capsys, monkeypatch):
    """A model of terminal logs writes window titles; they must not reach the window."""
    (tmp_path / "log.txt").write_text("\x1b]0;a title\x07$ ls\r\n\x1b[31mred\x1b[0m\n" * 400)
    quick = ["--vocab-size", "280", "--block-size", "16", "--n-embd", "16", "--steps", "40", "--learning-rate", "0.01"]
    assert run_preset("tiny", ["--data", str(tmp_path / "log.txt"), "--run-dir", str(tmp_path / "run"), *quick]) == 0
    said = capsys.readouterr().out
    assert "--- temperature" in said and not set("\x1b\x07\x9b") & set(said)


def test_progress_is_shown_if_asked_for(tmp_path, capsys):
    seen = []
    train(tmp_path / "run", num_steps=4, progress=True, on_step=lambda record: seen.append(record["step"]))
    assert "step 4  loss" in capsys.readouterr().out and seen == [1, 2, 3, 4]
    train(tmp_path / "quiet", num_steps=4)
    assert capsys.readouterr().out == ""
