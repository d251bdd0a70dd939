"""Training infrastructure: a run is killed half-way, resumed, and compared with one that was left alone.

What a long run needs beside the mathematics:

1. a log: one row per step in training_log.csv, and run.json, which says what is running and how it ended;
2. checkpoints: parameters, AdamW's moments, the step and everything else that the next step depends on, in one file
   with a checksum, written in the background under another name and renamed when it is whole on the disk;
3. a pure function of (seed, step) for every batch, every dropout mask and every sample.

From these three follows what this example shows: SIGKILL, which no program can catch, costs the steps since the last
checkpoint and nothing else. The resumed run makes them again, the same to the bit.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from feste import (
    GPT2,
    BPETokenizer,
    Checkpoint,
    Config,
    find_checkpoint,
    read_info,
    read_rows,
    shakespeare_text,
    train_gpt2,
)

STEPS, KILLED_AT, INTERVAL = 60, 37, 10
WALL_TIME = {"timestamp", "elapsed_seconds", "tokens_per_second"}


def train(run_dir: Path, resume: Path | None = None, on_step=None):
    """The run of this example; dropout is on, so that its masks have to be resumed too."""
    text = shakespeare_text()[:100_000]
    tokenizer = BPETokenizer.train(text, 512)
    model = GPT2(Config(512, 64, 2, 1, 64, dropout=0.1))
    return train_gpt2(model, tokenizer, text, STEPS, 3e-3, 64, run_dir, resume=resume, on_step=on_step,
                      checkpoint_interval=INTERVAL, val_interval=20, sample_interval=20, sample_tokens=20)


def train_until_killed(run_dir: Path) -> None:
    def kill(record: dict) -> None:
        if record["step"] == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    train(run_dir, on_step=kill)


def show_directory(run_dir: Path) -> None:
    for path in sorted(run_dir.iterdir()):
        if not path.name.startswith("."):
            print(f"      {path.name:26} {path.stat().st_size:>10,} bytes")


def compare_logs(one: Path, two: Path) -> bool:
    rows = list(zip(read_rows(one), read_rows(two), strict=True))
    equal = [{k: v for k, v in a.items() if k not in WALL_TIME} == {k: v for k, v in b.items() if k not in WALL_TIME}
             for a, b in rows]
    print("\n      step   loss left alone   loss killed and resumed")
    for (a, b), same in zip(rows, equal, strict=True):
        if a["step"] in (1, 10, 20, 30, 31, KILLED_AT, KILLED_AT + 1, 40, 50, STEPS):
            print(f"      {a['step']:4}   {a['train_loss']:15.7f}   {b['train_loss']:23.7f}   "
                  f"{'equal' if same else 'DIFFERENT'}")
    print(f"\n      rows of the log          {sum(equal)} of {len(equal)} equal (all columns but wall time)")
    return all(equal)


def compare_checkpoints(one: Path, two: Path) -> bool:
    a, b = (Checkpoint.load(path / "checkpoint_final.bin") for path in (one, two))
    same = True
    for name, x, y in (("parameters", a.model.flat_params, b.model.flat_params),
                       ("first moments of AdamW", a.optimizer.m, b.optimizer.m),
                       ("second moments of AdamW", a.optimizer.v, b.optimizer.v)):
        bits = x.view(np.uint32) == y.view(np.uint32)
        print(f"      {name:24} {bits.sum():,} of {bits.size:,} equal to the bit")
        same = same and bool(bits.all())
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--until-killed", metavar="DIR", help=argparse.SUPPRESS)  # what the second process is told
    args = parser.parse_args()
    if args.until_killed:
        train_until_killed(Path(args.until_killed))
        return 1  # never reached
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "left_alone"), Path(folder, "killed")
        print(f"1. A run of {STEPS} steps is left alone.")
        result = train(alone)
        print(f"      {result.state}: training loss {result.train_loss:.4f}\n")

        print(f"2. The same run in another process, which kills itself with SIGKILL after step {KILLED_AT}.")
        process = subprocess.run([sys.executable, __file__, "--until-killed", str(killed)])
        print(f"      ended by signal {-process.returncode}; what it leaves:")
        show_directory(killed)
        print(f"      run.json still says {read_info(killed)['state']!r}: nothing was left to change it\n")

        path, _ = find_checkpoint(killed)
        print(f"3. It is resumed from {path.name}, the newest that is whole.")
        train(killed, resume=killed)
        print(f"      {read_info(killed)['state']}")
        same = compare_logs(alone, killed)
        same = compare_checkpoints(alone, killed) and same
    print("\nThe killed run and the one left alone are the same run." if same else "\nThe two runs DIFFER.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
