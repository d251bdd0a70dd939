"""What happens beside a run: figures for other programs, and the command that is told of its fate."""

import struct
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from feste import cli, events, read_rows, trainer
from feste.config import PRESETS

TINY = ["--vocab-size", "300", "--n-embd", "16", "--n-layers", "1", "--block-size", "16", "--train-chars", "3000",
        "--steps", "12", "--val-interval", "4", "--sample-interval", "6", "--checkpoint-interval", "4"]


def train(tmp_path, *flags: str, name: str = "run") -> int:
    return cli.run_preset("tiny", [*TINY, "--run-dir", str(tmp_path / name), *flags])


def told(path) -> list[list[str]]:
    return [line.split("|") for line in path.read_text().splitlines()]


def telling(path) -> list[str]:
    return ["--on-event", f'echo "$FESTE_EVENT|$FESTE_STEP|$FESTE_RUN|$FESTE_MESSAGE" >> {path}']


# ---- figures -----------------------------------------------------------------------------------------------


def scalars(folder) -> dict[tuple[str, int], float]:
    """All scalars of TensorBoard's files: records of length, checksum, event, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            [length] = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12:at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found[value.tag, event.step] = value.simple_value
    return found


def logged(run_dir) -> dict[tuple[str, int], float]:
    return {(name, row["step"]): row[name] for row in read_rows(run_dir) for name in events.FIGURES
            if row.get(name) is not None}


def test_tensorboard_reads_what_the_log_says(tmp_path):
    assert train(tmp_path, "--log-to", "tensorboard") == 0
    found, expected = scalars(tmp_path / "run" / "tensorboard"), logged(tmp_path / "run")
    assert found.keys() == expected.keys() and ("val_loss", 12) in found
    for key, value in expected.items():
        assert np.isclose(found[key], value, rtol=1e-6), key  # the log has eight digits, TensorBoard float32


def test_a_resumed_run_replaces_its_steps(tmp_path):
    assert train(tmp_path, "--log-to", "tensorboard") == 0
    steps = [str(tmp_path / "run" / "checkpoint_step_8.bin"), "--steps", "12", "--log-to", "tensorboard"]
    assert cli.run_preset("tiny", ["--resume", *steps]) == 0
    found, expected = scalars(tmp_path / "run" / "tensorboard"), logged(tmp_path / "run")
    names = [key for key in expected if key[0] == "train_loss"]
    assert len(names) == 12 and all(np.isclose(found[key], expected[key], rtol=1e-6) for key in names)


def test_a_library_that_is_missing_is_one_line_before_anything(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert train(tmp_path, "--log-to", "tensorboard") == 2
    error = capsys.readouterr().err
    assert "pip install tensorboardX" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    class Full:
        def __call__(self, record):
            raise OSError("no space left")

        def close(self):
            raise OSError("no space left")

    monkeypatch.setattr(events, "make_logger", lambda *_: Full())
    assert train(tmp_path, "--log-to", "tensorboard") == 0
    said = capsys.readouterr().out
    assert said.count("Full failed at step 1 and gets no more figures: no space left") == 1


def test_trackers_get_the_same_figures(tmp_path, monkeypatch):
    calls = []

    wandb = SimpleNamespace(__name__="wandb", init=lambda **given: calls.append(("init", given)) or True,
                            log=lambda values, step: calls.append((step, values)),
                            finish=lambda: calls.append(("finish", None)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train(tmp_path, "--log-to", "wandb") == 0
    (_, given), *steps, (last, _) = calls
    assert given["mode"] == "offline" and given["dir"] == str(tmp_path / "run") and given["config"]["n_embd"] == 16
    assert [step for step, _ in steps] == list(range(1, 13)) and last == "finish"
    expected = logged(tmp_path / "run")
    assert all(np.isclose(values[name], expected[name, step], rtol=1e-6) for step, values in steps for name in values)


# ---- the command -------------------------------------------------------------------------------------------


def test_a_run_tells_its_end(tmp_path):
    assert train(tmp_path, *telling(tmp_path / "told")) == 0
    assert told(tmp_path / "told") == [["finished", "12", str(tmp_path / "run"), ""]]


def test_nan_is_told(tmp_path, monkeypatch):
    update = trainer._update

    def spoilt(run, step, learning_rate):
        loss, norm = update(run, step, learning_rate)
        return (float("nan"), norm) if step == 5 else (loss, norm)

    monkeypatch.setattr(trainer, "_update", spoilt)
    assert train(tmp_path, *telling(tmp_path / "stop")) == 1
    [[event, step, _, message]] = told(tmp_path / "stop")
    assert (event, step) == ("nan", "4") and "step 5: the loss is nan" in message
    assert train(tmp_path, "--on-nan", "skip", *telling(tmp_path / "skip"), name="skipping") == 0
    assert [line[:2] for line in told(tmp_path / "skip")] == [["nan", "5"], ["finished", "12"]]


def test_failure_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_sample", full)
    assert train(tmp_path, *telling(tmp_path / "told")) == 2
    [[event, step, _, message]] = told(tmp_path / "told")
    assert (event, step) == ("failed", "5") and "No space left" in message


def test_a_stall_is_told_once_and_told_again_after_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "STALL_SECONDS", 0.2)
    command = events.Command(telling(tmp_path / "told")[1], tmp_path)
    record = {"step": 1, "train_loss": 1.0, "grad_norm": 1.0}
    command.start()
    command(record)
    command(record | {"step": 2})
    deadline = time.monotonic() + 20
    while not (tmp_path / "told").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    command(record | {"step": 3})
    command.ended(None, "interrupted")
    events_told = [line[0] for line in told(tmp_path / "told")]
    assert events_told == ["stalled", "interrupted"]
    command._watch.join(5)
    assert not command._watch.is_alive()


def test_patience_follows_the_longest_step():
    command = events.Command("true", None)
    assert command.patience() == events.FIRST_STEP_SECONDS
    command._longest = 1.0
    assert command.patience() == events.STALL_SECONDS
    command._longest = 30.0
    assert command.patience() == 600.0


@pytest.mark.parametrize("command", ["exit 3", "no_such_program_at_all"])
def test_a_command_that_fails_is_a_line(tmp_path, capsys, command):
    assert train(tmp_path, "--on-event", command) == 0
    assert "note: the command for finished failed (exit code" in capsys.readouterr().out


def test_presets_do_not_know_of_it():
    assert not {"log_to", "on_event"} & set(PRESETS["tiny"].train.to_dict())
