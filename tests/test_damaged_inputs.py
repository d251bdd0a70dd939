"""Damaged and forged files of others: each is one clear error or does no harm, and leaves nothing behind."""

import json
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from feste import GPT2, BPETokenizer, Checkpoint, Config
from feste.cli import main as train
from feste.tokenizer import END_OF_TEXT
from tools.export import main as export
from tools.import_model import main as import_model
from tools.prepare import main as prepare

COUNT = 50  # damages of each kind of file
TOKENIZER = BPETokenizer.train("what is one and one and what is two " * 9, 262, [END_OF_TEXT])


def directory_of_transformers(folder):
    Checkpoint.save(folder / "model.bin", GPT2(Config(262, 16, 1, 2, 32)), TOKENIZER)
    assert export([str(folder / "model.bin"), "-o", str(folder / "hf")]) == 0


def pairs(folder):
    lines = [{"prompt": f"{i} is", "completion": f" {i + 1}"} for i in range(9)]
    lines += [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}] * 9
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def shards(folder):
    (folder / "shards").mkdir()
    TOKENIZER.save(folder / "tokenizer.json")
    for name in ("a_train_0", "a_train_1", "a_val_0"):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 900
        body = np.arange(900, dtype=np.uint16) % 262
        (folder / "shards" / f"{name}.bin").write_bytes(header.tobytes() + body.tobytes())


def parquet(folder):
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    TOKENIZER.save(folder / "tokenizer.json")
    files.write_table(arrow.table({"text": [f"{i} is one" for i in range(200)]}), folder / "rows.parquet")


# kind -> (makes the files, which of them is damaged, what reads them)
KINDS = {
    "config": (directory_of_transformers, "hf/config.json", lambda: import_model(["hf", "-o", "made"])),
    "safetensors": (directory_of_transformers, "hf/model.safetensors", lambda: import_model(["hf", "-o", "made"])),
    "pairs": (pairs, "pairs.jsonl", lambda: train(["--data", "pairs.jsonl", "--steps", "1", "--run-dir", "made",
                                                   "--vocab-size", "300"])),
    "shards": (shards, "shards/a_train_1.bin", lambda: train(["--data", "shards", "--tokenizer", "tokenizer.json",
                                                              "--steps", "1", "--run-dir", "made"])),
    "parquet": (parquet, "rows.parquet", lambda: prepare(["rows.parquet", "-o", "made", "--tokenizer",
                                                          "tokenizer.json"])),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut off, or with bytes changed, left out, put in or repeated; half of the time near the beginning or the end."""
    place = rng.choice([rng.randrange(len(data)), rng.randrange(min(64, len(data))), len(data) - 1 - rng.randrange(8)])
    length = rng.choice([1, 1, 4, 40])
    kind = rng.randrange(5)
    if kind == 0:
        return data[:place]
    middle = [b"", rng.randbytes(length), rng.randbytes(length) + data[place:place + length],
              data[place:place + length] * 3][kind - 1]
    return data[:place] + middle + data[place + length:]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_one_error(tmp_path, monkeypatch, capsys, kind):
    make, name, read = KINDS[kind]
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    whole, rng, refused = Path(name).read_bytes(), random.Random(kind), 0
    assert read() == 0, capsys.readouterr().err
    for i in range(COUNT):
        shutil.rmtree("made", ignore_errors=True)
        Path("made").unlink(missing_ok=True) if Path("made").is_file() else None
        Path(name).write_bytes(damaged(whole, rng))
        capsys.readouterr()
        tracemalloc.start()
        code, (_, peak) = read(), tracemalloc.get_traced_memory()
        tracemalloc.stop()
        err = capsys.readouterr().err
        assert peak < 50e6, f"damage {i} took {peak / 1e6:.0f} MB"
        if code:
            refused += 1
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, f"damage {i}: {err}"
            if kind != "parquet":  # a preparation that stopped can be continued
                assert not Path("made").exists(), f"damage {i} left something behind: {err}"
    assert refused > COUNT // 4
