"""What real life does around a run: file systems that lack things, no memory, no threads, signals, other programs."""

import errno
import multiprocessing
import os
import signal
import threading
import warnings

import numpy as np
import pytest
import torture
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_reliability import assert_nothing_lost
from torture import CONFIG, INTERVAL, arguments, run, save_example, train

from feste import GPT2, Checkpoint, disk, find_checkpoint, read_info
from feste.run.checkpoint import CheckpointError, verify
from feste.run.directory import require_new
from feste.run.log import RunDirectoryError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("surroundings")


# ---- what is lacking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", torture.SURROUNDINGS)
def test_what_the_surroundings_lack_is_said_in_a_line_and_the_run_goes_on(folder, name):
    assert_nothing_lost(torture.surroundings(folder, [name]))


def test_a_lock_without_locks_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
    disk._say_once.cache_clear()
    with pytest.warns(UserWarning, match="has no locks: nothing keeps a second process out"):
        assert not disk.Lock(tmp_path / "lock").held
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk.Lock(tmp_path / "lock").release()
    assert disk.is_locked(tmp_path / "lock") is None  # a reader concludes nothing from it


def test_a_flush_that_really_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        disk.flush_directory(tmp_path)


@pytest.mark.parametrize(("number", "said"), [
    (errno.ENOSPC, "free some disk space"), (errno.EDQUOT, "quota"), (errno.ENAMETOOLONG, "shorter name"),
    (errno.EROFS, "can be written"), (errno.EACCES, "may write to"), (errno.EMFILE, "open files"),
    (errno.ENOENT, "still there"), (errno.EIO, "device"), (errno.ENXIO, "another place")])
def test_the_advice_fits_the_error(number, said):
    advice = disk.advice(OSError(number, os.strerror(number)))
    assert said in advice and ("disk space" in advice) == (number == errno.ENOSPC)


def test_a_name_that_is_too_long_is_called_that(folder, tmp_path):
    code, _, err = run(arguments(folder, tmp_path / ("x" * 300)))
    assert code == 2 and "File name too long; choose a shorter name" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_leaves_its_directory_free(folder, tmp_path):
    code, _, err = run(arguments(folder, tmp_path / "run"), largest=100)
    assert code == 2 and "cannot write the run directory" in err
    require_new(tmp_path / "run")
    code, _, err = run(arguments(folder, tmp_path / "run"))
    assert code == 0, err


# ---- other processes ---------------------------------------------------------------------------------------


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(folder):
    assert_nothing_lost(torture.simultaneous(folder))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_the_warning_of_a_batch_system_saves_and_ends_the_run(folder, tmp_path, number):
    run_dir = tmp_path / "run"
    code, out, err = run(arguments(folder, run_dir), phase="step", at=7, signals=[number, number, number])
    assert code == 128 + number and f" --resume {run_dir}" in out
    assert err.count(f"{number.name}: stops and saves after this step") == 1
    assert verify(find_checkpoint(run_dir)[0]) == 7
    assert (read_info(run_dir)["state"], read_info(run_dir)["reason"]) == ("interrupted", number.name)
    code, _, err = run(["--resume", str(run_dir)])
    assert code == 0 and torture.is_whole(folder, run_dir), err


def test_a_signal_the_program_uses_itself_stays_its_own(tmp_path):
    came = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        result = train(tmp_path / "run",
                       on_step=lambda record: record["step"] == 3 and os.kill(os.getpid(), signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1] and result.state == "finished"


def test_a_thread_may_train(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path / "run", num_steps=10)))
    thread.start()
    thread.join()
    assert results[0].state == "finished"


def _train_in(path) -> None:
    train(path, num_steps=10)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_process_of_a_pool_may_train(tmp_path, method):
    process = multiprocessing.get_context(method).Process(target=_train_in, args=(tmp_path / "run",))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and read_info(tmp_path / "run")["state"] == "finished"


# ---- other programs' files ---------------------------------------------------------------------------------


def test_the_safetensors_library_reads_every_checkpoint(tmp_path):
    """Of a run with all of its kinds of file, and one for inference only."""
    run_dir = tmp_path / "run"
    train(run_dir, precision="bf16")
    Checkpoint.save(tmp_path / "run" / "weights.bin", GPT2(CONFIG), torture.tokenizer())
    paths = sorted(run_dir.glob("*.bin"))
    assert {path.name for path in paths} > {"checkpoint_best.bin", "checkpoint_final.bin",
                                            f"checkpoint_step_{6 * INTERVAL}.bin"}
    for path in paths:
        read, tensors = Checkpoint.load(path), load_file(path)
        for prefix, flat in (("", read.model.flat_params), *((("optimizer.m.", read.optimizer.m),
                                                              ("optimizer.v.", read.optimizer.v))
                                                             if read.optimizer else ())):
            for name, view in read.model.table.views(flat).items():
                assert np.array_equal(tensors.pop(prefix + name), view), name
        assert not tensors
        with safe_open(path, framework="np") as file:
            assert file.metadata()["step"] == str(read.step)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_checkpoint_of_another_program_is_called_that(tmp_path, metadata):
    save_file({"wte": np.ones((3, 4), np.float32), "wpe": np.ones((2, 4), np.float16)}, tmp_path / "model.safetensors",
              metadata)
    for read in (Checkpoint.load, verify):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is a safetensors file of another program"):
            read(tmp_path / "model.safetensors")


def test_a_checkpoint_may_be_read_by_others_than_its_owner(tmp_path):
    save_example(tmp_path / "checkpoint_step_1.bin", 1)
    assert (tmp_path / "checkpoint_step_1.bin").stat().st_mode & 0o777 == 0o644


def test_an_occupied_path_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirectoryError, match="never reused"):
        train(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
