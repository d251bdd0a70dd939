"""Faults on purpose, and a count of what became of them.

    python -m tests.torture                the long forms, a few minutes, printed as a table
    python -m tests.torture --quick        the same with small counts

Each function below tries one kind of fault and returns a Tally. The tests call them with small counts.
"""

from __future__ import annotations

import argparse
import csv
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from feste import GPT2, AdamW, BPETokenizer, Checkpoint, Config, disk, find_checkpoint, read_info, read_rows, train_gpt2
from feste.params import ParameterTable
from feste.run import checkpoint, directory
from feste.run.checkpoint import CheckpointError, verify
from feste.run.names import COLUMNS, FINAL, LOG
from feste.tokenizer import TokenizerError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Config(300, 16, 1, 2, 16, dropout=0.1)
INTERVAL = 5  # steps between checkpoints of the runs that are killed
SETTINGS = {"num_steps": 30, "learning_rate": 3e-3, "seq_len": 16, "batch_size": 2, "val_interval": 5, "val_windows": 4,
            "sample_interval": 5, "sample_tokens": 5, "sample_prompt": "a", "checkpoint_interval": INTERVAL,
            "threads": 1, "seed": 3, "patience": 1_000_000}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
WALL_TIME = ("timestamp", "elapsed_seconds", "tokens_per_second")


@dataclass
class Tally:
    """What became of some faults. survived: the state on disk was whole; detected: an error named file and reason;
    lost: neither, or a wrong result. A damaged file cannot survive, so its column stays empty (None)."""

    fault: str
    tried: int = 0
    survived: int | None = 0
    detected: int | None = 0
    lost: int = 0
    note: str = ""

    def row(self) -> str:
        cells = (self.fault, self.tried, self.survived, self.detected, self.lost, self.note)
        return "| " + " | ".join("" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell
                                 for cell in cells) + " |"


# ---- a tiny run --------------------------------------------------------------------------------------------


@cache
def text() -> str:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 8))) for _ in range(200)]
    return " ".join(rng.choice(words, 3000))


@cache
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(text(), CONFIG.vocab_size)


@cache
def tokens() -> np.ndarray:
    return tokenizer().encode_to_numpy(text())


def train(run_dir: Path | None, *, precision: str = "fp32", resume=None, on_step=None, config: Config = CONFIG,
          **settings):
    """A tiny run in this process. settings replace those of SETTINGS."""
    values = SETTINGS | settings
    model = GPT2(config, values["seed"], precision)
    return train_gpt2(model, tokenizer(), tokens(), run_dir=run_dir, resume=resume, on_step=on_step, **values)


def save_example(path: Path, step: int) -> None:
    """A checkpoint with all its parts, different for each step."""
    model = GPT2(CONFIG, seed=step)
    optimizer = AdamW(model)
    optimizer.m += step
    Checkpoint.save(path, model, tokenizer(), optimizer, step=step, best_val_loss=1.5, best_step=step,
                    train_config={"seed": 3}, trainer_state={"skipped": 0})


def differences(a: Path, b: Path) -> list[str]:
    """What two checkpoints do not have in common, to the bit; wall time aside."""
    one, two = Checkpoint.load(a), Checkpoint.load(b)
    state_one, state_two = ({**c.trainer_state, "elapsed_seconds": None} for c in (one, two))
    pairs = {"parameters": (one.model.flat_params.tobytes(), two.model.flat_params.tobytes()),
             "first moments": (one.optimizer.m.tobytes(), two.optimizer.m.tobytes()),
             "second moments": (one.optimizer.v.tobytes(), two.optimizer.v.tobytes()),
             "updates": (one.optimizer.t, two.optimizer.t), "step": (one.step, two.step),
             "best": ((one.best_val_loss, one.best_step), (two.best_val_loss, two.best_step)),
             "trainer state": (state_one, state_two), "tokenizer": (one.tokenizer.to_json(), two.tokenizer.to_json())}
    return [name for name, (x, y) in pairs.items() if x != y]


def history(run_dir: Path, last: int | None = None) -> list[list[str]]:
    """The cells of the log as they stand, but for the columns of wall time."""
    keep = [i for i, name in enumerate(COLUMNS) if name not in WALL_TIME]
    with open(run_dir / LOG, encoding="utf-8", newline="") as file:
        rows = [[row[i] for i in keep] for row in list(csv.reader(file))[1:]]
    return rows if last is None else rows[:last]


# ---- a run in a process of its own -------------------------------------------------------------------------


def arguments(folder: Path, run_dir: Path, **settings) -> list[str]:
    """The command line of a new run with the settings above."""
    data = folder / "text.txt"
    if not data.exists():
        data.write_text(text())
    flags = {"data": data, "run_dir": run_dir, **CONFIG.to_dict(), **SETTINGS, **settings}
    flags["steps"] = flags.pop("num_steps")
    flags.pop("tie_weights")
    return [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def command(argv: list[str], **order) -> list[str]:
    """What starts a training process. order: what goes wrong in it, see `child`."""
    return [sys.executable, __file__, "child", json.dumps(order | {"argv": argv})]


def start(argv: list[str], *, prefix: tuple[str, ...] = (), **order) -> subprocess.Popen:
    return subprocess.Popen([*prefix, *command(argv, **order)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=ENVIRONMENT, cwd=ROOT)


def run(argv: list[str], **order) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a training process."""
    process = start(argv, **order)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def child(order: dict) -> int:
    """Train as the examples do, one line a step, with a fault in the middle.

    phase: where it comes, at: in the how manieth call of that phase; signals: those the process sends itself;
    vanish: a directory to move away; largest: bytes a file may have, which stands for a full disk. ignored: signals
    that are ignored from the start; lacks: what the surroundings lack, see `_without`; spare: bytes of memory that the
    process may take after its first step.
    """
    from feste import cli, progress
    progress.LINE_SECONDS, cli.SAMPLE_TOKENS = 0.0, 8
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits an ignored one
    for number in order.get("ignored", ()):
        signal.signal(number, signal.SIG_IGN)
    for name, error in order.get("lacks", {}).items():
        _without(name, error)
    if "spare" in order:
        _limit_memory_after_a_step(order["spare"])
    if "largest" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
    if "phase" in order:
        _disturb(order)
    return cli.run_preset("tiny", order["argv"])


def _without(name: str, error: int) -> None:
    """A file system or a machine that lacks something: flock, link, fsync (of directories), thread."""
    def lacking(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    if name == "flock":
        disk.fcntl.flock = lacking
    elif name == "link":
        os.link = lacking
    elif name == "fsync":
        fsync = os.fsync
        os.fsync = lambda fd: lacking() if stat.S_ISDIR(os.fstat(fd).st_mode) else fsync(fd)
    elif name == "thread":
        start = threading.Thread.start

        def refused(thread):
            if thread.name == "feste-checkpoint":
                raise RuntimeError("can't start new thread")
            start(thread)
        threading.Thread.start = refused


def _limit_memory_after_a_step(spare: int) -> None:
    """The process may take `spare` more bytes than it has when its first update is done."""
    original = AdamW.step

    def step(*args, **kwargs):
        norm = original(*args, **kwargs)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        if AdamW.step is step:
            AdamW.step = original
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, resource.RLIM_INFINITY))
        return norm
    AdamW.step = step


def _disturb(order: dict) -> None:
    from feste import cli, trainer
    owner, name = {
        "tokenizing": (BPETokenizer, "train"), "step": (GPT2, "forward_backward"),
        "validation": (trainer, "mean_loss"), "sampling": (trainer, "_sample"),
        "saving": (checkpoint, "save_file"), "ending": (cli, "held_out_loss"),
    }[order["phase"]]
    original, calls = getattr(owner, name), 0

    def disturbed(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == order.get("at", 1):
            for number in order.get("signals", ()):
                os.kill(os.getpid(), number)
            if "vanish" in order:
                os.rename(order["vanish"], order["vanish"] + ".elsewhere")  # at once: the writer may be at work in it
        return original(*args, **kwargs)

    setattr(owner, name, staticmethod(disturbed) if name == "train" else disturbed)


# ---- SIGKILL -----------------------------------------------------------------------------------------------


def kills(folder: Path, count: int, seed: int = 0) -> Tally:
    """Kill a run at random moments, resume it, kill it again; then compare it with a run that was left alone."""
    tally, rng, run_dir = Tally("SIGKILL at a random moment", detected=None), random.Random(seed), folder / "killed"
    step, worst, steps = 0, 0, 400_000  # more than can be made between so many kills
    for _ in range(count):
        if step == 0:
            shutil.rmtree(run_dir, ignore_errors=True)
        argv = ["--resume", str(run_dir)] if step else arguments(folder, run_dir, num_steps=steps)
        told = _kill_one(argv, rng)
        tally.tried += 1
        step, problem = _after_kill(run_dir, step, told)
        worst = max(worst, told - step)
        if problem:
            tally.lost += 1
            tally.note += f"{problem}; "
        else:
            tally.survived += 1
    unlike = _unlike_uninterrupted(folder, run_dir, step, steps) if step else ["no checkpoint"]
    tally.lost += bool(unlike)
    tally.note += (f"{', '.join(unlike)} differ from the uninterrupted run" if unlike else
                   f"step {step} equals the uninterrupted run to the bit; at most {worst} steps to repeat, "
                   f"one checkpoint every {INTERVAL}")
    return tally


def _kill_one(argv: list[str], rng: random.Random) -> int:
    """Start, kill, and return the last step the process told of (0: none)."""
    lines = []
    with start(argv) as process:
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.0, 0.6))  # perhaps before the first step
        else:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("step "):
                    break
            time.sleep(rng.uniform(0.0, 0.25))
        ended = process.poll()
        process.kill()
        lines += process.stdout  # not communicate(), which would miss what was read ahead
        err = process.stderr.read()
    if ended is not None:
        raise AssertionError(f"the run ended by itself with {ended}: {err or lines}")
    told = [line for line in lines if line.startswith("step ") and line.endswith("\n")]
    return int(told[-1].split()[1]) if told else 0


def _after_kill(run_dir: Path, before: int, told: int) -> tuple[int, str]:
    """The step a resumed run would go on from, and what is wrong with the directory, if anything.

    A save begins at every INTERVAL and waits for the one before it, so what is whole is less than two intervals old.
    """
    damaged = []
    for path in run_dir.glob("*.bin"):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        return before, damaged[0]
    try:
        step = Checkpoint.load(find_checkpoint(run_dir)[0]).step
    except CheckpointError as error:
        return 0, "" if before == 0 and told < 2 * INTERVAL else str(error)
    rows = [row["step"] for row in read_rows(run_dir)]
    if step < before or step <= told - 2 * INTERVAL:
        return step, f"step {told} was made and only {step} is kept"
    if rows[:step] != list(range(1, step + 1)):
        return step, f"the log does not reach the checkpoint of step {step}"
    return step, ""


class _Enough(Exception):
    pass


def _unlike_uninterrupted(folder: Path, run_dir: Path, step: int, steps: int) -> list[str]:
    def stop(record: dict) -> None:
        if record["step"] == step:
            raise _Enough

    whole = folder / "uninterrupted"
    with suppress(_Enough):
        train(whole, num_steps=steps, checkpoint_interval=step, on_step=stop)
    unlike = differences(whole / f"checkpoint_step_{step}.bin", find_checkpoint(run_dir)[0])
    return unlike + ["rows"] * (history(whole, step) != history(run_dir, step))


# ---- system calls that fail --------------------------------------------------------------------------------


@contextmanager
def failing_call(name: str, n: int, error: int) -> Iterator[list[bool]]:
    """The n-th call of os.NAME, or of the library that writes a checkpoint (save_file), fails with an error number.

    The library leaves half a file. Yields a list that tells if it came to it.
    """
    owner = checkpoint if name == "save_file" else os
    original, calls, came = getattr(owner, name), 0, []

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != n:
            return original(*args, **kwargs)
        came.append(True)
        if name != "save_file":
            raise OSError(error, os.strerror(error))
        original(*args, **kwargs)
        os.truncate(args[1], os.path.getsize(args[1]) // 2)
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(error)} (os error {error})")

    setattr(owner, name, call)
    try:
        yield came
    finally:
        setattr(owner, name, original)


def failing_calls(folder: Path) -> list[Tally]:
    """The n-th write, fsync, link, rename, change of mode and opening of a directory of a save fails, for every n."""
    return [_failing(folder, name, error) for name in ("save_file", "chmod", "fsync", "link", "replace", "open")
            for error in (errno.EIO, errno.ENOSPC)]


def _failing(folder: Path, name: str, error: int) -> Tally:
    tally = Tally(f"n-th {name} of a save fails with {errno.errorcode[error]}")
    new_state = GPT2(CONFIG, seed=2)
    optimizer = AdamW(new_state)
    for n in range(1, 1000):
        run_dir = Path(tempfile.mkdtemp(dir=folder))
        save_example(run_dir / "checkpoint_step_1.bin", 1)
        shutil.copy(run_dir / "checkpoint_step_1.bin", run_dir / "checkpoint_best.bin")
        message = ""
        with failing_call(name, n, error) as came:
            try:
                directory.write_as([run_dir / "checkpoint_step_2.bin", run_dir / "checkpoint_best.bin"],
                                   checkpoint.Snapshot(new_state, tokenizer(), optimizer, step=2))
            except CheckpointError as failure:
                message = str(failure)
        if not came:
            return tally
        tally.tried += 1
        named = "checkpoint_" in message and os.strerror(error) in message
        whole = {path.name: verify(path) for path in run_dir.iterdir()}  # raises for a torn one and for leftovers
        ok = whole["checkpoint_step_1.bin"] == 1 and whole["checkpoint_best.bin"] in (1, 2)
        tally.survived += ok
        tally.detected += named
        tally.lost += not (ok and named)
        shutil.rmtree(run_dir)
    raise AssertionError("a save makes no thousand calls")


# ---- damaged files -----------------------------------------------------------------------------------------


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
        for prefix in checkpoint.PREFIXES:
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


# ---- signals -----------------------------------------------------------------------------------------------

PHASES = {"step": 7, "validation": 2, "sampling": 2, "saving": 2}  # phase -> in which of its calls


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


def _whole(folder: Path) -> Path:
    """A run that was left alone."""
    whole = folder / "whole"
    if not whole.exists():
        code, out, err = run(arguments(folder, whole))
        assert code == 0, err or out
    return whole


def _is_whole(folder: Path, run_dir: Path) -> bool:
    """Whether a run is to the bit that which was left alone."""
    whole = _whole(folder)
    return history(run_dir) == history(whole) and not differences(run_dir / FINAL, whole / FINAL)


def signals(folder: Path, numbers=STOPPING) -> Tally:
    """One signal in each phase: saved at a step boundary, exit 128 + n; resumed, the run is the uninterrupted one."""
    tally = Tally("signal in a phase of training", detected=0)
    for phase, at in PHASES.items():
        for number in numbers:
            run_dir = folder / f"{phase}_{int(number)}"
            code, _, _ = run(arguments(folder, run_dir), phase=phase, at=at, signals=[number])
            info = read_info(run_dir)
            stopped = (code == 128 + number and info.get("state") == "interrupted"
                       and info.get("reason") == signal.Signals(number).name)
            code, _, err = run(["--resume", str(run_dir)])
            same = code == 0 and _is_whole(folder, run_dir)
            tally.tried += 1
            tally.detected += stopped
            tally.survived += same
            tally.lost += not (stopped and same)
            tally.note += "" if stopped and same else f"{phase} {number}: {err.strip()[-80:]}; "
    tally.note = tally.note or "exit 128 + signal; resumed, each equals the uninterrupted run to the bit"
    return tally


# ---- surroundings ------------------------------------------------------------------------------------------

WIDE = {"n_embd": 512, "n_layers": 4, "num_steps": 3}  # a model whose copy takes 150 MB
SURROUNDINGS = {  # what is lacking or sent -> the order to the process, and what it says about it in one line
    "file system without flock": ({"lacks": {"flock": errno.ENOSYS}}, "has no locks"),
    "file system out of locks": ({"lacks": {"flock": errno.ENOLCK}}, "has no locks"),
    "directories cannot be flushed": ({"lacks": {"fsync": errno.EINVAL}}, "cannot flush a directory"),
    "file system without hard links": ({"lacks": {"link": errno.EPERM}}, None),
    "none of the three": ({"lacks": {"flock": errno.ENOSYS, "fsync": errno.EINVAL, "link": errno.ENOSYS}}, "has no"),
    "no thread for saving": ({"lacks": {"thread": 0}}, "training waits for every checkpoint"),
    "no memory for the snapshot": ({"spare": 20 << 20}, "training waits for every checkpoint"),
    "signals that are ignored at the start": (
        {"ignored": [signal.SIGINT, signal.SIGHUP], "phase": "step", "at": 7,
         "signals": [signal.SIGINT, signal.SIGHUP]}, None),
}


def surroundings(folder: Path, names=tuple(SURROUNDINGS)) -> list[Tally]:
    """Each is no reason to fail: the run ends as the one that was left alone, with one line on what is lost by it."""
    return [_in_surroundings(folder, name, *SURROUNDINGS[name]) for name in names]


def _in_surroundings(folder: Path, name: str, order: dict, said: str | None) -> Tally:
    tally, run_dir = Tally(name, tried=1), folder / name.replace(" ", "_")
    settings = WIDE if "spare" in order else {}
    code, out, err = run(arguments(folder, run_dir, **settings), **order)
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    tally.detected = int(not err and (any(said in note for note in notes) if said else not notes))
    if code == 0:
        tally.survived = int(verify(run_dir / FINAL) == 3 if settings else _is_whole(folder, run_dir))
    tally.lost = int(not (tally.survived and tally.detected))
    tally.note = err.strip()[-150:] if tally.lost else "; ".join(note.removeprefix("note: ") for note in notes)
    return tally


def simultaneous(folder: Path, count: int = 4) -> Tally:
    """Runs started at the same instant, without a name of their own for the directory."""
    tally = Tally("runs started in the same second", detected=None)
    data = arguments(folder, folder / "unused")
    at = data.index("--run-dir")
    argv = [*data[:at], *data[at + 2:]]
    place = folder / "simultaneous"
    place.mkdir()
    started = [subprocess.Popen(command(argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=ENVIRONMENT, cwd=place) for _ in range(count)]
    said = [process.communicate(timeout=120)[0] for process in started]
    tally.tried, whole = count, [run_dir for run_dir in (place / "data").iterdir() if _is_whole(folder, run_dir)]
    tally.survived, tally.lost = len(whole), count - len(whole)
    tally.note = "; ".join(text.strip()[-100:] for text, process in zip(said, started, strict=True)
                           if process.returncode) or f"{len(whole)} directories"
    return tally


# ---- the table ---------------------------------------------------------------------------------------------

HEADER = ("| fault | tried | survived whole | detected and named | lost | |\n"
          "|---|---:|---:|---:|---:|---|")


def torture(folder: Path, quick: bool = False) -> Iterator[Tally]:
    yield kills(folder, 10 if quick else 200)
    yield from failing_calls(folder)
    yield truncations(folder, 50 if quick else 3000)
    yield from bit_flips(folder, 500 if quick else None, 100 if quick else 1000)
    yield forged_files(folder)
    yield from damaged_tokenizers(folder, 100 if quick else 3000)
    yield signals(folder)
    yield from surroundings(folder)
    yield simultaneous(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Faults tried, survived, detected, lost.")
    parser.add_argument("--quick", action="store_true", help="small counts, under a minute")
    quick, lost = parser.parse_args(argv).quick, 0
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for tally in torture(Path(folder), quick):
            print(tally.row(), flush=True)
            lost += tally.lost
    print(f"\n{lost} lost" if lost else "\nnothing lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(child(json.loads(sys.argv[2])) if sys.argv[1:2] == ["child"] else main())
