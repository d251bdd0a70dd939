"""Files that were cut off, flipped or forged."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np

from feste import BPETokenizer, Checkpoint, find_checkpoint
from feste.params import ParameterTable
from feste.run import checkpoint
from feste.run.checkpoint import CheckpointError, verify
from feste.tokenizer import TokenizerError

from .tiny import CONFIG, Tally, save_example, tokenizer


def _try_damaged(tally: Tally, path: Path, fall_back: bool = True) -> None:
    """A damaged checkpoint must raise an error that names it, and be passed over for the whole one of step 1."""
    tally.tried += 1
    try:
        Checkpoint.load(path)
    except CheckpointError as error:
        good = str(path) in str(error)
        if fall_back:
            found, passed_over = find_checkpoint(path.parent)
            good = good and str(path) in "".join(passed_over) and verify(found) == 1
    else:
        good = False
    tally.detected += good
    tally.lost += not good


def _example(folder: Path, name: str) -> tuple[Path, bytes]:
    """A directory with a whole checkpoint of step 1; the path and bytes of one of step 2 beside it."""
    directory = folder / name
    directory.mkdir()
    save_example(directory / "checkpoint_step_1.bin", 1)
    path = directory / "checkpoint_step_2.bin"
    save_example(path, 2)
    return path, path.read_bytes()


def truncations(folder: Path, count: int) -> Tally:
    """Every cut in the first 64 bytes and around the end of the header, and `count` more."""
    tally, (path, data) = Tally("checkpoint cut off", survived=None), _example(folder, "truncated")
    header = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = {*range(64), *range(header - 16, header + 16), len(data) - 1, len(data) - 4}
    for cut in sorted(cuts | set(random.Random(1).sample(range(len(data)), count))):
        path.write_bytes(data[:cut])
        _try_damaged(tally, path)
    return tally


def bit_flips(folder: Path, header_bits: int | None, payload_bits: int) -> list[Tally]:
    """Random bits of the header (None: every one) and of the tensors are turned over, one at a time."""
    path, data = _example(folder, "flipped")
    header = 8 * (8 + struct.unpack("<Q", data[:8])[0])
    rng = random.Random(2)
    parts = (("header bit of a checkpoint flipped",
              range(header) if header_bits is None else [*range(64), *rng.sample(range(64, header), header_bits)]),
             ("tensor bit of a checkpoint flipped", rng.sample(range(header, 8 * len(data)), payload_bits)))
    tallies = []
    for fault, bits in parts:
        tally = Tally(fault, survived=None, note="every bit" if len(bits) == header else "")
        with open(path, "r+b", buffering=0) as file:
            for n, bit in enumerate(bits):
                byte = data[bit // 8]
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
                _try_damaged(tally, path, fall_back=n % 50 == 0)
                os.pwrite(file.fileno(), bytes([byte]), bit // 8)
        tallies.append(tally)
    return tallies


def _forged(data: bytes, change, checksum: bool = True) -> bytes:
    """A file whose header was changed by change(entries, metadata, config), with a checksum that fits again."""
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:8 + length])
    metadata = entries["__metadata__"]
    config = json.loads(metadata["config"])
    change(entries, metadata, config)
    if metadata["config"] == json.loads(data[8:8 + length])["__metadata__"]["config"]:
        metadata["config"] = json.dumps(config)
    if checksum and isinstance(metadata, dict) and "checksum" in metadata:
        digest, original = checkpoint._new_digest(metadata), json.loads(data[8:8 + length])
        for prefix in (checkpoint.PARAMETERS, checkpoint.FIRST, checkpoint.SECOND):
            for p in ParameterTable(CONFIG):
                begin, end = original[prefix + p.name]["data_offsets"]
                digest.update(data[8 + length + begin:8 + length + end])
        metadata["checksum"] = digest.hexdigest()
    head = json.dumps(entries).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + length:]


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def forgeries(data: bytes, marker: Path) -> dict[str, bytes]:
    """Files made to mislead, by name. Their checksums are right."""
    wte, huge = "transformer.wte.weight", 1 << 40

    def tensor(**fields):
        return lambda entries, metadata, config: entries[wte].update(fields)

    def model(**fields):
        return lambda entries, metadata, config: config.update(fields)

    def meta(**fields):
        return lambda entries, metadata, config: metadata.update(fields)

    changes = {
        "huge shape": tensor(shape=[huge, huge]), "negative shape": tensor(shape=[-300, -16]),
        "text as shape": tensor(shape="300x16"), "other dtype": tensor(dtype="F64"), "unknown dtype": tensor(dtype="O"),
        "negative offset": tensor(data_offsets=[-8, 19192]), "overlapping offsets": tensor(data_offsets=[64, 19264]),
        "huge offset": tensor(data_offsets=[0, huge]), "huge vocabulary": model(vocab_size=huge),
        "huge width": model(n_embd=huge), "a billion layers": model(n_layers=10**9),
        "huge context": model(block_size=huge), "no heads": model(n_heads=0), "width as text": model(n_embd="16"),
        "unknown field": model(evil=1), "dropout beyond 1": model(dropout=1e300),
        "a tensor too many": lambda e, m, c: e.update(extra=e[wte]), "a tensor missing": lambda e, m, c: e.pop(wte),
        "no checksum": lambda e, m, c: m.pop("checksum"), "no step": lambda e, m, c: m.pop("step"),
        "step as word": meta(step="two"), "negative step": meta(step="-2"), "step as number": meta(step=2),
        "best as list of one": meta(best="[1]"), "state as list": meta(trainer_state="[]"),
        "configuration as list": meta(train_config="[1]"), "unknown precision": meta(precision="fp1"),
        "seed as word": meta(seed="x"),
        "betas beyond 1": meta(optimizer='{"betas":[2,2],"eps":1,"weight_decay":0,"t":1}'),
        "optimizer empty": meta(optimizer="{}"), "later version": meta(feste_format_version="99"),
        "tokenizer empty": meta(tokenizer="{}"), "tokenizer nested": meta(tokenizer="[" * 100_000),
        "config nested": meta(config="[" * 100_000), "config as number": meta(config="7"),
    }
    files = {name: _forged(data, change) for name, change in changes.items()}
    length = struct.unpack("<Q", data[:8])[0]
    files |= {
        "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + data[8:],
        "header of all the file": struct.pack("<Q", len(data) - 8) + data[8:],
        "header nested": struct.pack("<Q", 100_000) + b"[" * 100_000,
        "header is a list": struct.pack("<Q", 8) + b"[]      ",
        "tensors missing": data[:8 + length], "bytes behind the end": data + b"\0" * 64, "empty": b"",
        "a pickle": pickle.dumps(_Bomb(marker)), "zeros": bytes(len(data)),
        "noise": random.Random(5).randbytes(len(data)),
    }
    return files


def forged_files(folder: Path) -> Tally:
    """Each is refused, with no more memory taken than a few times the file, and none of its code is run."""
    path, data = _example(folder, "forged")
    tally, marker, worst = Tally("forged checkpoint", survived=None), folder / "marker", 0.0
    names = []
    for name, forged in forgeries(data, marker).items():
        path.write_bytes(forged)
        tracemalloc.start()
        before = tally.lost
        _try_damaged(tally, path, fall_back=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        worst = max(worst, peak / 1e6)
        if tally.lost > before or peak > 8 * len(data) + 20 * len(forged) + 2_000_000 or marker.exists():
            tally.lost += tally.lost == before
            names.append(name)
    tally.note = f"not refused: {', '.join(names)}" if names else f"at most {worst:.1f} MB allocated"
    return tally


def damaged_tokenizers(folder: Path, count: int) -> list[Tally]:
    """Cuts and flipped bits of tokenizer.json: an error, or the very same tokenizer.

    The file is in the format of other tools and has no checksum; the copy within a checkpoint is under the
    checkpoint's.
    """
    path = folder / "tokenizer.json"
    tokenizer().save(path)
    data, rng = path.read_bytes(), random.Random(4)
    cut, flip = Tally("tokenizer.json cut off", survived=None), Tally("bit of tokenizer.json flipped")
    for length in {*range(64), *rng.sample(range(len(data)), count)}:
        path.write_bytes(data[:length])
        _try_tokenizer(cut, path)
    for bit in rng.sample(range(8 * len(data)), count):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        _try_tokenizer(flip, path)
    return [cut, flip]


def _try_tokenizer(tally: Tally, path: Path) -> None:
    tally.tried += 1
    try:
        read = BPETokenizer.load(path)
    except TokenizerError as error:
        tally.detected += str(path) in str(error)
        tally.lost += str(path) not in str(error)
        return
    same = read.tokens == tokenizer().tokens and np.array_equal(read.merges, tokenizer().merges)
    if tally.survived is not None:
        tally.survived += same
    tally.lost += not same
