"""Never lose a run: the short forms of tests/torture, and what needs no numbers."""

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torture
from safetensors import SafetensorError
from torture import CONFIG, INTERVAL, arguments, failing_call, history, run, save_example, start, tokenizer, train

from feste import GPT2, AdamW, Checkpoint, RunReader, TrainConfig, find_checkpoint, read_info, read_rows
from feste.run import checkpoint, directory
from feste.run.checkpoint import CheckpointError, verify
from feste.run.directory import CheckpointWriter
from feste.run.log import RunDirectoryError
from feste.run.names import periodic
from feste.trainer import TrainingDiverged


def assert_nothing_lost(tallies):
    for tally in tallies if isinstance(tallies, list) else [tallies]:
        assert tally.tried and not tally.lost, tally.row()


def bins(directory):
    return sorted(path.name for path in directory.glob("*.bin"))


# ---- the harness, with small counts ------------------------------------------------------------------------


def test_sigkill_at_random_moments(tmp_path):
    assert_nothing_lost(torture.kills(tmp_path, 20, seed=1))


def test_every_system_call_of_a_save_may_fail(tmp_path):
    assert_nothing_lost(torture.failing_calls(tmp_path))


def test_truncated_checkpoints_are_detected(tmp_path):
    assert_nothing_lost(torture.truncations(tmp_path, 100))


def test_flipped_bits_of_checkpoints_are_detected(tmp_path):
    assert_nothing_lost(torture.bit_flips(tmp_path, 1500, 100))


def test_forged_checkpoints_are_refused(tmp_path):
    assert_nothing_lost(torture.forged_files(tmp_path))


def test_truncated_tokenizers_are_detected(tmp_path):
    assert_nothing_lost(torture.damaged_tokenizers(tmp_path, 100)[0])


def test_the_harness_notices_a_save_that_is_not_atomic(tmp_path, monkeypatch):
    """A fault that feste does not survive must be seen, or the counts mean nothing."""
    def write_in_place(paths, snapshot):
        try:
            for path in paths:
                checkpoint.save_file(snapshot.tensors(), path, snapshot.metadata | {"checksum": snapshot.checksum()})
        except SafetensorError as error:
            raise CheckpointError(f"{paths[0]}: {error}") from error
    monkeypatch.setattr(directory, "write_as", write_in_place)
    with pytest.raises(CheckpointError, match=r"cut off|damaged"):
        torture.failing_calls(tmp_path)


def test_the_harness_notices_a_missing_checksum(tmp_path, monkeypatch):
    class Same:
        def update(self, data):
            pass

        def hexdigest(self):
            return "0"
    monkeypatch.setattr(checkpoint, "_new_digest", lambda metadata: Same())
    assert torture.bit_flips(tmp_path, 50, 20)[1].lost == 20


# ---- saving ------------------------------------------------------------------------------------------------


def test_a_background_save_is_the_state_at_the_call(tmp_path):
    model = GPT2(CONFIG)
    optimizer, writer = AdamW(model), CheckpointWriter(3)
    writer.reserve(model, optimizer)
    for step in range(1, 6):
        before = model.flat_params.copy()
        writer.save([tmp_path / f"checkpoint_step_{step}.bin"], model, None, optimizer, step=step)
        model.flat_params += 1.0  # at once, while the file is being written
        writer.wait()
        assert np.array_equal(Checkpoint.load(tmp_path / f"checkpoint_step_{step}.bin").model.flat_params, before)


def test_saves_that_follow_each_other_at_once_do_not_mix(tmp_path):
    model = GPT2(CONFIG)
    optimizer, writer = AdamW(model), CheckpointWriter(50)
    writer.reserve(model, optimizer)
    for step in range(1, 21):
        model.flat_params.fill(step)
        paths = [tmp_path / f"checkpoint_step_{step}.bin", tmp_path / "checkpoint_best.bin"]
        writer.save(paths, model, None, optimizer, step=step)
    writer.wait()
    for step in range(1, 21):
        assert (Checkpoint.load(tmp_path / f"checkpoint_step_{step}.bin").model.flat_params == step).all()
    assert verify(tmp_path / "checkpoint_best.bin") == 20


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_hard_links_gets_a_second_file(tmp_path, error):
    paths = [tmp_path / "checkpoint_step_1.bin", tmp_path / "checkpoint_best.bin"]
    with failing_call("link", 1, error) as came:
        directory.write_as(paths, checkpoint.Snapshot(GPT2(CONFIG), None, None, step=1))
    assert came and [verify(path) for path in paths] == [1, 1] and len(list(tmp_path.iterdir())) == 2


def test_an_error_of_the_writer_stops_the_run_with_its_cause(tmp_path, monkeypatch):
    original = checkpoint.save_file

    def full(tensors, path, metadata):
        if "step_10" in path.name:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"checkpoint_step_10\.bin: No space left on device"):
        train(tmp_path / "run")
    info = read_info(tmp_path / "run")
    assert info["state"] == "failed" and "No space left on device" in info["reason"]
    assert verify(find_checkpoint(tmp_path / "run")[0]) == 5
    monkeypatch.undo()
    train(None, resume=tmp_path / "run")
    assert len(history(tmp_path / "run")) == 30 and read_info(tmp_path / "run")["state"] == "finished"


def test_retention(tmp_path):
    train(tmp_path / "run", checkpoint_interval=3, keep_last=2)
    assert [step for step, _ in periodic(tmp_path / "run")] == [27, 30]
    assert {"checkpoint_best.bin", "checkpoint_final.bin"} <= set(bins(tmp_path / "run"))


def test_nothing_is_deleted_before_the_new_one_is_safe(tmp_path):
    model = GPT2(CONFIG)
    for step in (1, 2):
        save_example(tmp_path / f"checkpoint_step_{step}.bin", step)
    writer = CheckpointWriter(keep_last=1)
    writer.reserve(model, None)
    with failing_call("fsync", 1, errno.EIO):
        writer.save([tmp_path / "checkpoint_step_3.bin"], model, None, None, step=3)
        writer.settle()
    assert bins(tmp_path) == ["checkpoint_step_1.bin", "checkpoint_step_2.bin"]
    with pytest.raises(CheckpointError):
        writer.check()
    writer.save([tmp_path / "checkpoint_step_4.bin"], model, None, None, step=4)
    writer.wait()
    assert bins(tmp_path) == ["checkpoint_step_4.bin"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_named(tmp_path):
    for step in (1, 2):
        save_example(tmp_path / f"checkpoint_step_{step}.bin", step)
    with failing_call("unlink", 1, errno.EACCES), \
            pytest.raises(CheckpointError, match=r"delete .*checkpoint_step_1\.bin"):
        directory.retain(tmp_path, 1)


def test_partial_files_are_ignored_and_removed(tmp_path):
    train(tmp_path / "run", num_steps=10)
    left = tmp_path / "run" / "checkpoint_step_15.bin.123.partial"
    left.write_bytes(b"half a save")
    assert verify(find_checkpoint(tmp_path / "run")[0]) == 10
    train(None, resume=tmp_path / "run")
    assert not left.exists()


# ---- signals -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("signals")


@pytest.mark.parametrize("phase,number", [("step", signal.SIGINT), ("validation", signal.SIGTERM),
                                          ("sampling", signal.SIGINT), ("saving", signal.SIGTERM)])
def test_a_signal_saves_at_a_step_boundary(folder, tmp_path, phase, number):
    run_dir = tmp_path / "run"
    code, out, err = run(arguments(folder, run_dir), phase=phase, at=torture.PHASES[phase], signals=[number])
    assert code == 128 + number, err
    assert f" --resume {run_dir}" in out
    assert err == (f"\n{signal.Signals(number).name}: stops and saves after this step; one more Ctrl+C or "
                   "SIGTERM quits at once\n")
    info = read_info(run_dir)
    assert (info["state"], info["reason"]) == ("interrupted", signal.Signals(number).name)
    step = verify(find_checkpoint(run_dir)[0])
    assert info["step"] == step == read_rows(run_dir)[-1]["step"]
    whole = tmp_path / "whole"
    train(whole)
    train(None, resume=run_dir)
    assert torture.differences(whole / "checkpoint_final.bin", run_dir / "checkpoint_final.bin") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_tokenizing_leaves_nothing(folder, tmp_path, number):
    code, _, err = run(arguments(folder, tmp_path / "run"), phase="tokenizing", signals=[number])
    assert code in (128 + number, -number) and "Traceback" not in err  # a shell shows both as 128 + number
    assert not (tmp_path / "run").exists()


def test_a_second_signal_quits_at_once_and_leaves_whole_files(folder, tmp_path):
    run_dir = tmp_path / "run"
    code, out, _ = run(arguments(folder, run_dir), phase="step", at=13, signals=[signal.SIGINT, signal.SIGTERM])
    assert code == 143 and "continue with" not in out
    assert all(verify(path) in (5, 10) for path in run_dir.glob("*.bin"))  # that of step 10 may still be under way
    assert find_checkpoint(run_dir)[1] == []
    reader = RunReader(run_dir)
    reader.poll()
    assert reader.state == "running"  # the log grew a moment ago
    reader.QUIET_SECONDS = 0.0
    assert reader.state == "crashed"  # run.json says running, and nobody holds the lock
    code, _, err = run(["--resume", str(run_dir)])
    assert code == 0 and len(history(run_dir)) == 30, err


def test_a_signal_at_the_last_step_is_a_finished_run(folder, tmp_path):
    code, _, _ = run(arguments(folder, tmp_path / "run"), phase="step", at=30, signals=[signal.SIGTERM])
    assert code == 0 and read_info(tmp_path / "run")["state"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_step_ends_a_finished_run(folder, tmp_path, number):
    code, out, err = run(arguments(folder, tmp_path / "run"), phase="ending", signals=[number])
    assert code in (128 + number, -number) and "Traceback" not in err  # a shell shows both as 128 + number
    assert "finished at step 30" in out or number == signal.SIGTERM  # which loses what is not flushed
    assert read_info(tmp_path / "run")["state"] == "finished"
    assert verify(tmp_path / "run" / "checkpoint_final.bin") == 30


@pytest.fixture
def not_under_nohup():
    """Processes that are started end at SIGHUP, even if the tests themselves were started under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("not_under_nohup")
def test_sighup_under_nohup_is_ignored_and_otherwise_saves(folder, tmp_path):
    code, _, _ = run(arguments(folder, tmp_path / "plain"), phase="step", at=7, signals=[signal.SIGHUP])
    assert code == 129 and verify(find_checkpoint(tmp_path / "plain")[0]) == 7
    process = start(arguments(folder, tmp_path / "nohup"), prefix=("nohup",), phase="step", at=7,
                    signals=[signal.SIGHUP])
    process.communicate(timeout=120)
    assert process.returncode == 0 and len(history(tmp_path / "nohup")) == 30


@pytest.mark.usefixtures("not_under_nohup")
def test_a_terminal_that_closes_saves(folder, tmp_path):
    argv = arguments(folder, tmp_path / "run", num_steps=100_000)
    master, slave = os.openpty()
    process = subprocess.Popen(torture.command(argv), stdin=slave, stdout=slave, stderr=slave, cwd=torture.ROOT,
                               env=torture.ENVIRONMENT, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    shown = b""
    while b"tok/s" not in shown:
        shown += os.read(master, 10_000)
    os.close(master)
    assert process.wait(timeout=120) == 129
    info = read_info(tmp_path / "run")
    assert (info["state"], info["reason"]) == ("interrupted", "SIGHUP")
    assert verify(find_checkpoint(tmp_path / "run")[0]) == info["step"]


def test_handlers_are_put_back(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    train(tmp_path / "run", num_steps=2)
    assert [signal.getsignal(number) for number in numbers] == before


# ---- the directory -----------------------------------------------------------------------------------------


def test_a_run_directory_has_one_trainer_and_the_lock_dies_with_it(folder, tmp_path):
    run_dir = tmp_path / "run"
    process = start(arguments(folder, run_dir, num_steps=100_000))
    try:
        for line in process.stdout:
            if line.startswith(f"step {2 * INTERVAL + 1} "):
                break
        code, _, err = run(["--resume", str(run_dir)])
        assert code == 2 and "in use by another training process" in err and err.count("\n") == 1
    finally:
        process.kill()
        process.communicate()
    with open_directory(run_dir, resumed_at=5):
        pass


def open_directory(path, **resumed):
    """A run directory as the trainer opens it."""
    model = GPT2(CONFIG)
    return directory.RunDirectory(path, {}, TrainConfig(), model, tokenizer(), AdamW(model), **resumed)


def test_a_failed_start_leaves_nothing_and_lets_go_of_the_lock(tmp_path):
    with failing_call("replace", 1, errno.ENOSPC), pytest.raises(RunDirectoryError, match=r"No space left.*free some"):
        open_directory(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with open_directory(tmp_path / "run") as run:
        run.write({"step": 1})
        with pytest.raises(RunDirectoryError, match="in use"):
            open_directory(tmp_path / "run", resumed_at=0)


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(GPT2, "forward_backward", lambda *args: 1 / 0)
    for _ in range(2):  # the directory is free again
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_an_empty_directory_may_be_used_and_a_full_one_not(tmp_path):
    (tmp_path / "empty").mkdir()
    train(tmp_path / "empty", num_steps=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="never reused"):
        train(tmp_path / "full", num_steps=5)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_run_json_is_the_old_one_or_the_new_one(tmp_path):
    for name in ("fsync", "replace"):
        with open_directory(tmp_path / name) as run:
            run.write({"step": 1})
            before = read_info(tmp_path / name)
            with failing_call(name, 1, errno.ENOSPC), pytest.raises(RunDirectoryError, match="No space left"):
                run.end("finished", None)
            assert read_info(tmp_path / name) == before


def test_a_close_that_fails_says_so_in_run_json(tmp_path):
    run = open_directory(tmp_path / "run")
    run.write({"step": 1})
    os.close(run._log._file.fileno())  # stands for a disk that is full when the last rows go out
    with pytest.raises(RunDirectoryError, match="cannot write the run directory"):
        run.end("finished", None)
    info = read_info(tmp_path / "run")
    assert info["state"] == "failed" and "cannot write" in info["reason"]


@pytest.mark.parametrize("largest,named", [(100, "cannot write the run directory"),
                                           (60_000, "cannot write the checkpoint")])
def test_a_full_disk_is_one_clear_error(folder, tmp_path, largest, named):
    arguments(folder, tmp_path / "run")  # the text file comes first: the limit is for every file
    code, _, err = run(arguments(folder, tmp_path / "run"), largest=largest)
    assert code == 2 and named in err and str(tmp_path / "run") in err, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert bins(tmp_path / "run") == []


def test_a_vanished_directory_is_one_clear_error(folder, tmp_path):
    run_dir = tmp_path / "run"
    code, _, err = run(arguments(folder, run_dir), phase="step", at=8, vanish=str(run_dir))
    assert code == 2 and str(run_dir) in err and "No such file or directory" in err, err
    assert err.startswith("error: ") and err.count("\n") == 1, err


def test_a_directory_that_cannot_be_made_is_one_clear_error(folder, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(arguments(folder, tmp_path / "file" / "run"))
    assert code == 2 and "Not a directory" in err and err.count("\n") == 1, err


def test_a_read_only_directory_is_one_clear_error(tmp_path):
    for step in (5, 10):
        save_example(tmp_path / f"checkpoint_step_{step}.bin", step)
    with failing_call("open", 1, errno.EROFS), pytest.raises(RunDirectoryError, match=r"Read-only.*can be written"):
        open_directory(tmp_path / "run")
    with failing_call("open", 1, errno.EROFS), pytest.raises(CheckpointError, match="Read-only file system"):
        save_example(tmp_path / "checkpoint_step_15.bin", 15)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_one_clear_error(folder, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = run(arguments(folder, tmp_path / "run"))
    tmp_path.chmod(0o700)
    assert code == 2 and "Permission denied" in err and err.count("\n") == 1


def test_nothing_stays_open(tmp_path):
    def open_files():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("counts in /proc/self/fd")
    train(tmp_path / "first", num_steps=10)
    before = open_files()
    for i in range(3):
        train(tmp_path / f"run{i}", num_steps=10)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / f"failed{i}", on_step=lambda record: 1 / 0)
    assert open_files() == before


def test_a_terminal_that_is_gone_does_not_prevent_the_save(tmp_path):
    def gone(record):
        if record["step"] == 10:
            raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        train(tmp_path / "run", on_step=gone)
    assert verify(find_checkpoint(tmp_path / "run")[0]) == 10
    assert read_info(tmp_path / "run")["state"] == "failed"


# ---- numbers that are not finite ---------------------------------------------------------------------------


def poisoned(monkeypatch, steps, where):
    """At some steps the loss, or one gradient, is NaN."""
    original, calls = GPT2.forward_backward, iter(range(1, 10_000))

    def forward_backward(model, *args, **kwargs):
        loss = original(model, *args, **kwargs)
        if next(calls) not in steps:
            return loss
        model.flat_grads[3] = np.inf
        return np.nan if where == "loss" else loss

    monkeypatch.setattr(GPT2, "forward_backward", forward_backward)


@pytest.mark.parametrize("where,said", [("loss", "the loss is nan"), ("gradient", "the gradient norm is inf")])
def test_nan_stops_the_run_at_its_step(tmp_path, monkeypatch, where, said):
    poisoned(monkeypatch, {8}, where)
    with pytest.raises(TrainingDiverged, match=f"step 8: {said}"):
        train(tmp_path / "run")
    info = read_info(tmp_path / "run")
    assert info["state"] == "failed" and "step 8" in info["reason"]
    assert verify(find_checkpoint(tmp_path / "run")[0]) == 5
    assert np.isfinite(Checkpoint.load(find_checkpoint(tmp_path / "run")[0]).model.flat_params).all()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_skips_the_step_and_counts_it(tmp_path, monkeypatch, where):
    poisoned(monkeypatch, {8, 9, 20}, where)
    result = train(tmp_path / "run", on_nan="skip")
    assert result.state == "finished" and result.skipped_steps == 3 == read_info(tmp_path / "run")["skipped_steps"]
    final = Checkpoint.load(tmp_path / "run" / "checkpoint_final.bin")
    assert final.optimizer.t == 27 and np.isfinite(final.model.flat_params).all()


def test_ten_skipped_in_a_row_stop_the_run(tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(8, 30)), "loss")
    with pytest.raises(TrainingDiverged, match=r"step 17: .* the 10th time in a row"):
        train(tmp_path / "run", on_nan="skip")
    assert read_info(tmp_path / "run")["skipped_steps"] == 10


# ---- the long forms ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_hundred_kills(tmp_path):
    assert_nothing_lost(torture.kills(tmp_path, 200, seed=int(time.time())))


@pytest.mark.long
def test_every_header_bit(tmp_path):
    assert_nothing_lost(torture.bit_flips(tmp_path, None, 1000))


@pytest.mark.long
def test_every_signal_in_every_phase(tmp_path):
    assert_nothing_lost(torture.signals(tmp_path))


def test_the_table_is_printed():
    done = subprocess.run([sys.executable, "-m", "tests.torture", "--help"], cwd=torture.ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout
    assert torture.Tally("x", 1, None, 1).row() == "| x | 1 |  | 1 | 0 |  |"
    assert tokenizer().vocab_size == CONFIG.vocab_size
