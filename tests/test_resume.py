"""A resumed run is the uninterrupted run: parameters, moments and log rows to the bit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torture
from torture import CONFIG, differences, history, save_example, train

from feste import (
    GPT2,
    AdamW,
    BPETokenizer,
    Checkpoint,
    Config,
    TrainConfig,
    find_checkpoint,
    read_info,
    train_gpt2,
    trainer,
)
from feste.cli import run_preset
from feste.run.checkpoint import CheckpointError, verify
from feste.run.log import RunDirectoryError
from feste.run.names import periodic
from feste.schedule import learning_rate_at


def half_of(whole: Path, at: int, to: Path) -> Path:
    """The directory as a kill shortly after step `at` leaves it: later rows, one of them torn, no later checkpoint."""
    shutil.copytree(whole, to)
    for path in to.glob("checkpoint_*.bin"):
        if path.name != f"checkpoint_step_{at}.bin":
            path.unlink()
    with open(to / "training_log.csv", "ab") as file:
        file.write('999,12.5,0.1,0.001,5.5,,,,,,"torn within é'.encode()[:-1])
    return to


def assert_same_run(a: Path, b: Path) -> None:
    assert differences(a / "checkpoint_final.bin", b / "checkpoint_final.bin") == []
    assert differences(a / "checkpoint_best.bin", b / "checkpoint_best.bin") == []
    assert history(a) == history(b)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 4, 8])
@pytest.mark.parametrize("n", [1, 7, 20])
def test_two_halves_are_the_whole(tmp_path, n, accumulation, precision):
    assert CONFIG.dropout > 0.0
    settings = {"num_steps": 2 * n, "accumulation": accumulation, "checkpoint_interval": n, "keep_last": 9,
                "val_interval": 3, "sample_interval": 4, "precision": precision}
    train(tmp_path / "whole", **settings)
    halves = half_of(tmp_path / "whole", n, tmp_path / "halves")
    train(halves, resume=halves, **settings)
    assert_same_run(tmp_path / "whole", halves)
    assert len(history(halves)) == 2 * n


@pytest.mark.parametrize("first,second", [(1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2)])
def test_threads_may_change_between_the_halves(tmp_path, first, second):
    # wide enough that the kernels have work for several threads
    settings = {"config": Config(300, 64, 2, 4, 16, dropout=0.1), "num_steps": 8, "batch_size": 8,
                "checkpoint_interval": 4, "keep_last": 9}
    train(tmp_path / "whole", threads=first, **settings)
    halves = half_of(tmp_path / "whole", 4, tmp_path / "halves")
    train(halves, resume=halves, threads=second, **settings)
    assert_same_run(tmp_path / "whole", halves)


def test_a_stopped_run_resumes_from_the_step_it_stopped_at(tmp_path):
    def stop(record):
        if record["step"] == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    train(tmp_path / "whole")
    result = train(tmp_path / "halves", on_step=stop)
    assert result.state == "interrupted" and 11 <= result.step <= 12
    assert find_checkpoint(tmp_path / "halves")[0].name == f"checkpoint_step_{result.step}.bin"
    assert train(None, resume=tmp_path / "halves").run_dir == tmp_path / "halves"  # a path names the run directory
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_every_row_but_those_beyond_the_checkpoint_is_kept_as_it_is(tmp_path):
    train(tmp_path / "whole", keep_last=9)
    halves = half_of(tmp_path / "whole", 15, tmp_path / "halves")
    before = (halves / "training_log.csv").read_bytes()
    train(halves, resume=halves, keep_last=9)
    after = (halves / "training_log.csv").read_bytes()
    row_16 = before.index(b"\n16,")
    assert after[:row_16] == before[:row_16]  # wall time too


def test_a_sample_with_any_line_end_can_be_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_sample", lambda run, step: f'{step}\r,"\n\r\n\u2028\x0b')
    train(tmp_path / "whole", keep_last=9)
    halves = half_of(tmp_path / "whole", 15, tmp_path / "halves")
    train(halves, resume=halves, keep_last=9)
    assert history(halves) == history(tmp_path / "whole")
    assert history(halves)[9][-1] == '10\r,"\n\r\n\u2028\x0b'


# ---- changes -----------------------------------------------------------------------------------------------


def test_extending_a_finished_run_follows_the_new_schedule(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, num_steps=10)
    train(run_dir, resume=run_dir, num_steps=20)
    rows = history(run_dir)
    assert [int(row[0]) for row in rows] == list(range(1, 21))
    new = TrainConfig(num_steps=20, learning_rate=3e-3)
    assert [row[1] for row in rows[10:]] == [f"{learning_rate_at(step, new):.8g}" for step in range(11, 21)]


def test_learning_rate_may_change(tmp_path):
    train(tmp_path / "run", num_steps=10)
    half_of(tmp_path / "run", 5, tmp_path / "half")
    train(tmp_path / "half", resume=tmp_path / "half", num_steps=10, learning_rate=1e-3)
    assert history(tmp_path / "half")[:5] == history(tmp_path / "run")[:5]
    assert history(tmp_path / "half")[5:] != history(tmp_path / "run")[5:]


@pytest.mark.parametrize("change,named", [
    ({"seed": 4}, "seed was 3 and is 4"), ({"batch_size": 3}, "batch_size was 2 and is 3"),
    ({"accumulation": 2}, "accumulation was 1 and is 2"), ({"val_interval": 6}, "val_interval was 5 and is 6"),
    ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"), ({"beta2": 0.9}, "beta2 was 0.95 and is 0.9"),
    ({"config": Config(300, 16, 1, 2, 16, dropout=0.2)}, "dropout was 0.1 and is 0.2"),
])
def test_other_changes_are_refused_and_named(tmp_path, change, named):
    run_dir = tmp_path / "run"
    train(run_dir, num_steps=5)
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ValueError, match="this is not the run of the checkpoint") as caught:
        train(run_dir, resume=run_dir, num_steps=10, **change)
    assert named in str(caught.value)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_another_corpus_or_tokenizer_is_refused(tmp_path):
    run_dir, settings = tmp_path / "run", torture.SETTINGS | {"num_steps": 5}
    train(run_dir, num_steps=5)
    settings["num_steps"] = 10
    with pytest.raises(ValueError, match="the training text is another one"):
        train_gpt2(GPT2(CONFIG), torture.tokenizer(), torture.tokens()[:-1], run_dir=run_dir, resume=run_dir,
                   **settings)
    other = BPETokenizer.train(torture.text()[::-1], 300)
    with pytest.raises(ValueError, match="the tokenizer is another one"):
        train_gpt2(GPT2(CONFIG), other, torture.text(), run_dir=run_dir, resume=run_dir, **settings)


def test_a_checkpoint_without_moments_is_refused(tmp_path):
    Checkpoint.save(tmp_path / "weights.bin", GPT2(CONFIG), torture.tokenizer())
    with pytest.raises(ValueError, match="it lacks optimizer"):
        train(tmp_path / "run", resume=tmp_path / "weights.bin")
    assert not (tmp_path / "run").exists()


# ---- which checkpoint --------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path):
    train(tmp_path / "whole", num_steps=20, keep_last=9)
    run_dir = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run_dir)
    (run_dir / "checkpoint_best.bin").unlink()
    for name in ("checkpoint_final.bin", "checkpoint_step_20.bin"):  # two names of one file; copied, two files
        data = bytearray((run_dir / name).read_bytes())
        data[-100] ^= 1
        (run_dir / name).write_bytes(data)
    with pytest.warns(UserWarning) as said:
        train(run_dir, resume=run_dir, num_steps=20, keep_last=9)
    lines = [str(warning.message) for warning in said]
    assert any("passed over" in line and "checkpoint_final.bin is damaged" in line for line in lines)
    assert differences(tmp_path / "whole/checkpoint_final.bin", run_dir / "checkpoint_final.bin") == []
    assert history(run_dir) == history(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:the run goes on at step")
def test_going_back_sets_later_checkpoints_aside(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, num_steps=20, keep_last=9)
    later = (run_dir / "checkpoint_step_20.bin").read_bytes()
    with pytest.warns(UserWarning, match="a checkpoint of a later step is now"):
        train(run_dir, resume=run_dir / "checkpoint_step_5.bin", num_steps=8, checkpoint_interval=1, keep_last=2)
    assert find_checkpoint(run_dir)[0].name == "checkpoint_final.bin"
    assert Checkpoint.load(find_checkpoint(run_dir)[0]).step == 8
    assert [step for step, _ in periodic(run_dir)] == [7, 8]  # not pushed out by 10, 15 and 20
    assert (run_dir / "checkpoint_step_20.bin.superseded").read_bytes() == later
    assert [int(row[0]) for row in history(run_dir)] == list(range(1, 9))
    with pytest.warns(UserWarning, match=r"checkpoint_final\.bin\.superseded1"):
        train(run_dir, resume=run_dir / "checkpoint_step_7.bin", num_steps=9)
    assert verify(run_dir / "checkpoint_final.bin.superseded") == 20


def test_the_best_checkpoint_of_the_past_comes_back(tmp_path):
    """Going back sets the later best one aside; the one of then is still there under another name."""
    run_dir = tmp_path / "run"
    train(run_dir, num_steps=20, keep_last=9)
    at = Checkpoint.load(run_dir / "checkpoint_step_10.bin")
    assert at.best_step <= 10 < Checkpoint.load(run_dir / "checkpoint_best.bin").step
    with pytest.warns(UserWarning, match="a checkpoint of a later step"), pytest.raises(ZeroDivisionError):
        train(run_dir, resume=run_dir / "checkpoint_step_10.bin", num_steps=20, keep_last=9,
              on_step=lambda record: 1 / 0)
    assert verify(run_dir / "checkpoint_best.bin") == at.best_step


def test_a_run_may_go_on_in_another_directory(tmp_path):
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    train(whole, keep_last=9)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    train(copy, resume=whole / "checkpoint_step_15.bin", keep_last=9)
    assert_same_run(whole, copy)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    with pytest.raises(RunDirectoryError, match="exists; a run directory is never reused"):
        train(copy, resume=whole / "checkpoint_step_15.bin", keep_last=9)


def test_an_early_stopped_run_needs_more_patience(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert run_preset("tiny", torture.arguments(tmp_path, run_dir, learning_rate=1e-12, patience=6)) == 0
    stopped = read_info(run_dir)
    assert stopped["state"] == "early_stopped" and stopped["step"] < 30
    capsys.readouterr()
    assert run_preset("tiny", ["--resume", str(run_dir)]) == 2
    assert "extend it with a larger patience; see --patience\n" in capsys.readouterr().err
    assert run_preset("tiny", ["--resume", str(run_dir), "--patience", "100"]) == 0
    assert read_info(run_dir)["state"] == "finished"


def test_the_text_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    argv = torture.arguments(tmp_path, Path("run"), num_steps=5)
    argv[argv.index("--data") + 1] = "text.txt"
    assert run_preset("tiny", argv) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_preset("tiny", ["--resume", "../run", "--steps", "6"]) == 0


@pytest.mark.parametrize("content", [None, "{", '{"data_flags": 5}', '{"data_flags": {"data": 7}}'])
def test_a_text_that_run_json_does_not_name_is_asked_for(tmp_path, capsys, content):
    run_dir = tmp_path / "run"
    train(run_dir, num_steps=5)  # from ids: there is no text to name
    if content is not None:
        (run_dir / "run.json").write_text(content)
    assert run_preset("tiny", ["--resume", str(run_dir), "--steps", "6"]) == 2
    assert "run.json does not name the text" in capsys.readouterr().err
    torture.arguments(tmp_path, run_dir)
    assert run_preset("tiny", ["--resume", str(run_dir), "--steps", "6", "--data", str(tmp_path / "text.txt")]) == 0


def test_no_checkpoint_is_a_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        train(None, resume=tmp_path / "empty")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        train(None, resume=tmp_path / "nowhere")


def test_the_best_of_several_whole_ones_is_the_newest(tmp_path):
    for step, name in ((3, "checkpoint_step_3.bin"), (9, "checkpoint_best.bin"), (7, "checkpoint_step_7.bin")):
        save_example(tmp_path / name, step)
    assert find_checkpoint(tmp_path)[0].name == "checkpoint_best.bin"


def test_moments_and_their_count_come_back(tmp_path):
    model = GPT2(CONFIG, seed=1)
    optimizer = AdamW(model, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.2)
    model.flat_grads += 0.01
    optimizer.step(1e-3)
    Checkpoint.save(tmp_path / "c.bin", model, None, optimizer)
    read = Checkpoint.load(tmp_path / "c.bin").optimizer
    assert (read.betas, read.eps, read.weight_decay, read.t) == ((0.8, 0.9), 1e-7, 0.2, 1)
    assert read.m.tobytes() == optimizer.m.tobytes() and read.v.tobytes() == optimizer.v.tobytes()


# ---- the command line --------------------------------------------------------------------------------------


def test_a_fresh_process_resumes_with_other_threads(tmp_path):
    example = [sys.executable, str(torture.ROOT / "examples" / "train.py")]

    def run(*argv):
        return subprocess.run([*example, *argv], capture_output=True, text=True, cwd=tmp_path, timeout=120)

    new = torture.arguments(tmp_path, tmp_path / "whole", keep_last=9)
    done = run(*new)
    assert done.returncode == 0, done.stderr
    halves = half_of(tmp_path / "whole", 15, tmp_path / "halves")
    done = run("--resume", str(halves), "--threads", "2")
    assert done.returncode == 0, done.stderr
    assert "continues at step 16" in done.stdout
    assert_same_run(tmp_path / "whole", halves)
    done = run("--resume", str(halves))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "extend it with a larger --steps\n" in done.stderr
    done = run("--resume", str(halves), "--steps", "40", "--seed", "9")
    assert done.returncode == 2 and "seed was 3 and is 9" in done.stderr
    done = run("--resume", str(halves), "--steps", "40", "--seed", "3", "--dry-run")  # the same seed is no change
    assert done.returncode == 0 and "for 10 steps" in done.stdout, done.stderr
    done = run("--resume", str(halves), "--checkpoint", str(halves))
    assert done.returncode == 2 and "--checkpoint is for new runs" in done.stderr
    done = run("--resume", str(halves), "--steps", "40")
    assert done.returncode == 0 and "steps 30 -> 40: the schedule is stretched" in done.stdout
