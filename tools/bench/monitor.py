"""How quickly a run of a million rows is read and how much memory that takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from feste.runlog import COLUMNS, LOG_NAME

ROWS = 1_000_000
READER = """
import json, resource, sys, time
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from feste.runlog import RunReader
begun = time.perf_counter()
reader = RunReader(sys.argv[1])
reader.poll()
first = time.perf_counter() - begun
with open(sys.argv[1] + "/training_log.csv", "a") as file:
    file.write(sys.argv[2])
begun = time.perf_counter()
assert reader.poll()
again = time.perf_counter() - begun
assert len(reader.columns["step"]) == int(sys.argv[3]) + 1
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds to read all": first, "seconds to read one more": again, "peak MB": peak / 1e3}))
"""


def _row(step: int) -> str:
    val = f"{3.4:.7f}" if step % 50 == 0 else ""
    return f"{step},{1.7e9 + step:.3f},{step * 0.01:.6f},0.001,{3.5:.7f},{val},33.1,,{0.5:.6f},81234.5,\n"


def measure(rows: int = ROWS) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder, LOG_NAME), "w") as file:
            file.write(",".join(COLUMNS) + "\n")
            file.writelines(_row(step) for step in range(1, rows + 1))
        done = subprocess.run([sys.executable, "-c", READER, folder, _row(rows + 1), str(rows)], capture_output=True,
                              text=True, check=True)
        result = json.loads(done.stdout)
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tools.monitor", "--once", folder], capture_output=True, check=True)
        return result | {"seconds of `monitor --once`": time.perf_counter() - begun}
