"""Files of tokens of other programs: nanoGPT's and llm.c's, as one text."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from feste import GPT2, BPETokenizer, Checkpoint, Config, TrainConfig, train_gpt2
from feste.cli import main
from feste.data import Batches, Text, windows
from feste.shards import Shards, ShardsError, has_shards, load_shards

TEXT = "What is one and one, and what is two? " * 400
TOKENIZER = BPETokenizer.train(TEXT, 270)
TOKENS = TOKENIZER.encode_to_numpy(TEXT)


def llmc(path, tokens, magic=20240520, version=1, count=None, dtype=np.uint16):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())


def nanogpt(folder, train=TOKENS[:-300], val=TOKENS[-300:]):
    folder.mkdir(exist_ok=True)
    np.asarray(train, np.uint16).tofile(folder / "train.bin")
    np.asarray(val, np.uint16).tofile(folder / "val.bin")
    return folder


def shards(folder, edges=(0, 700, 701, 1500), dtype=np.uint16, **header):
    folder.mkdir(exist_ok=True)
    for i, (a, b) in enumerate(zip(edges, [*edges[1:], len(TOKENS)], strict=True), 1):
        llmc(folder / f"text_train_{i:06}.bin", TOKENS[a:b], dtype=dtype, **header)
    return folder


@pytest.mark.parametrize("kind", ["raw", "llm.c", "llm.c uint32"])
def test_files_are_read_as_one_text(tmp_path, kind):
    if kind == "raw":
        train, held_out = load_shards(nanogpt(tmp_path))
        assert np.array_equal(np.asarray(held_out), TOKENS[-300:])
        expected = TOKENS[:-300]
    else:
        more = {"dtype": np.uint32, "magic": 20240801, "version": 7} if "32" in kind else {}
        train, held_out = load_shards(shards(tmp_path, **more))
        assert held_out is None
        expected = TOKENS
    assert has_shards(tmp_path) and len(train) == len(expected)
    assert np.array_equal(np.asarray(train), expected)


def test_shards_are_indexed_like_one_array():
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 60_000, 1000).astype(np.uint16)
    for edges in ([0, 1000], [0, 1, 2, 999, 1000], [0, 0, 400, 400, 1000], [0, 333, 500, 1000]):
        parts = Shards([whole[a:b] for a, b in pairwise(edges)])
        index = rng.integers(0, 1000, (7, 9))
        assert np.array_equal(parts[index], whole[index]) and parts[index].dtype == np.uint16
        for a, b in [(0, 1000), (-100, None), (1, 2), (300, 500), (999, 1000), (5, 5), (0, 5000), (400, 1)]:
            assert np.array_equal(np.asarray(parts[a:b]), whole[a:b]) and len(parts[a:b]) == len(whole[a:b])
            cut = parts[a:b]
            if len(cut):
                assert np.array_equal(cut[np.arange(len(cut))], whole[a:b])


def test_windows_cross_the_borders_and_a_run_resumes_across_one_to_the_bit(tmp_path):
    """The bits are those of the same tokens in one array, and of a run that was not stopped."""
    train, _ = load_shards(shards(tmp_path / "llmc"))
    for a, b in zip(windows(train, np.array([690, 700, 1490]), 20), windows(TOKENS, np.array([690, 700, 1490]), 20),
                    strict=True):
        assert np.array_equal(a, b)
    one, many = Batches(TOKENS, 16, 5), Batches(train, 16, 5)
    for step in (1, 30):
        assert all(np.array_equal(a, b) for a, b in zip(one.batch(step, 4)[0], many.batch(step, 4)[0], strict=True))
    config = TrainConfig(num_steps=12, seq_len=16, batch_size=4, checkpoint_interval=5, val_interval=4, val_windows=4)
    models = []
    for run, resume in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint_step_5.bin")):
        model = GPT2(Config(270, 16, 1, 1, 16), seed=2)
        train_gpt2(model, TOKENIZER, Text(load_shards(tmp_path / "llmc")[0]), config=config, run_dir=tmp_path / run,
                   resume=resume and Checkpoint.load(resume))
        models.append(model.flat_params.tobytes())
    plain = GPT2(Config(270, 16, 1, 1, 16), seed=2)
    train_gpt2(plain, TOKENIZER, TOKENS, config=config)
    assert models == [plain.flat_params.tobytes()] * 2


def test_the_command_line_names_the_tokenizer(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt(tmp_path / "nano")
    (tmp_path / "nano" / "meta.pkl").write_bytes(b"\x80")
    flags = ["--data", "nano", "--steps", "3", "--val-interval", "2", "--run-dir", "run"]
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert "meta.pkl may say which, but it is a pickle" in err and "--tokenizer PATH" in err and err.count("\n") == 1
    TOKENIZER.save("tok.json")
    assert main([*flags, "--tokenizer", "tok.json"]) == 0
    assert "in 1 files, 300 in files of their own held out" in capsys.readouterr().out
    assert main(["--resume", "run", "--steps", "4"]) == 0
    assert main(["--from", "run", "--data", "nano", "--steps", "2", "--run-dir", "tuned"]) == 0
    assert main(["--from", "run", "--data", "nano", "--tokenizer", "tok.json"]) == 2
    assert "brings its own tokenizer" in capsys.readouterr().err
    np.asarray([*TOKENS[:500], 7], np.uint16).tofile("nano/val.bin")
    assert main(["--resume", "run", "--steps", "6"]) == 2
    assert "the training text is another one" in capsys.readouterr().err


def test_a_tokenizer_of_ones_own_for_a_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TOKENIZER.save("tok.json")
    Path("text.txt").write_text(TEXT)
    assert main(["--data", "text.txt", "--tokenizer", "tok.json", "--steps", "2", "--run-dir", "run"]) == 0
    assert Checkpoint.load("run/checkpoint_final.bin").tokenizer.to_json() == TOKENIZER.to_json()
    assert main(["--data", "text.txt", "--tokenizer", "none.json"]) == 2
    assert "none.json" in capsys.readouterr().err


DAMAGE = {
    "cut off": (lambda d: os.truncate(d / "text_train_000002.bin", 1025), "was cut off"),
    "no header": (lambda d: (d / "other.bin").write_bytes(b"x" * 3000), "no file of tokens"),
    "short": (lambda d: (d / "other.bin").write_bytes(b""), "no file of tokens"),
    "version": (lambda d: llmc(d / "text_train_000009.bin", TOKENS, version=2), "of version 2"),
    "count": (lambda d: llmc(d / "text_train_000009.bin", TOKENS, count=-5), "says that it has -5 tokens"),
    "huge count": (lambda d: llmc(d / "text_train_000009.bin", TOKENS, count=2**31 - 1), "that it has 2,147,483,647"),
    "odd bytes": (lambda d: (d / "val.bin").write_bytes(b"123"), "no whole number"),
    "only val": (lambda d: [f.rename(d / f"val_{f.name}") for f in list(d.glob("*.bin"))], "none to train on"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_one_error(tmp_path, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TOKENIZER.save("tok.json")
    damage, reason = DAMAGE[name]
    damage(shards(tmp_path / "llmc"))
    with pytest.raises(ShardsError, match=reason):
        load_shards(tmp_path / "llmc")
    assert main(["--data", "llmc", "--tokenizer", "tok.json", "--run-dir", "run"]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1 and not Path("run").exists()


def test_ids_beyond_the_tokenizer_are_one_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TOKENIZER.save("tok.json")
    nanogpt(tmp_path / "nano", train=np.full(3000, 50_256))
    assert main(["--data", "nano", "--tokenizer", "tok.json", "--run-dir", "run"]) == 2
    assert "must lie in 0 .. 269, got 50256" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files with holes, and /proc")
def test_twenty_gigabytes_start_at_once_in_little_memory(tmp_path):
    """Files with holes: 20 GB to read, nothing on the disk."""
    for i in range(20):
        path = tmp_path / f"big_train_{i:06}.bin"
        llmc(path, [], count=500_000_000)
        os.truncate(path, 1024 + 1_000_000_000)
    TOKENIZER.save(tmp_path / "tok.json")
    script = (
        "import sys, time, resource\n"
        "from feste.cli import main\n"
        "begun = time.perf_counter()\n"
        f"assert main(['--data', {str(tmp_path)!r}, '--tokenizer', {str(tmp_path / 'tok.json')!r}, '--steps', '2',\n"
        "             '--val-interval', '2', '--seq-len', '64', '--dry-run']) == 0\n"
        "status = open('/proc/self/status').read()\n"
        "print('anonymous', int(status.split('RssAnon:')[1].split()[0]) // 1000, 'MB',\n"
        "      round(time.perf_counter() - begun, 1), 's')\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10,000,000,000 tokens in 20 files" in done.stdout
    assert int(done.stdout.split("anonymous ")[1].split()[0]) < 500
    print(done.stdout)
