"""The monitor on a run of a million rows: how soon it shows it, what a refresh costs, how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from feste.run.names import COLUMNS, LOG

ROWS = 1_000_000
REFRESHES = 20
# The whole program on a large window, headless. Its clock starts before Python does, and rows come one at a time.
WATCHER = f"""
import asyncio, json, resource, statistics, sys, time
from pathlib import Path
from ..monitor.app import Monitor
from ..monitor.runs import Watch
from ..monitor.widgets import Plot

folder, rows, row, begun = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])

def seen(app, rows):
    return app.selected is not None and len(app.selected.columns["step"]) >= rows

def refresh(app):
    begun = time.perf_counter()
    app.watch.poll()
    app.show()
    for plot in app.query(Plot):
        plot.render()
    return time.perf_counter() - begun

async def main():
    app = Monitor(Watch([Path(folder)]))
    async with app.run_test(size=(200, 60)) as pilot:
        found = {{}}
        for name, wanted in (("seconds to the first picture", 1), ("seconds to the whole run", rows)):
            while not seen(app, wanted):
                await asyncio.sleep(0.005)
            found[name] = time.time() - begun
        app._stop.set()  # the thread that reads gives way to `refresh`
        await asyncio.sleep(1.0)
        times = []
        for i in range({REFRESHES}):
            with open(Path(folder, "{LOG}"), "a") as file:
                file.write(row.replace("STEP", str(rows + 1 + i)))
            times.append(refresh(app))
            assert seen(app, rows + 1 + i)
        found["seconds a refresh"] = statistics.median(times)
    return found

found = asyncio.run(main())
print(json.dumps(found | {{"peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}}))
"""


def _row(step: int) -> str:
    val = f"{3.4:.7f}" if step % 50 == 0 else ""
    return f"{step},{1.7e9 + step:.3f},{step * 0.01:.6f},0.001,{3.5:.7f},{val},33.1,,{0.5:.6f},81234.5,\n"


def measure(rows: int = ROWS) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder, LOG), "w") as file:
            file.write(",".join(COLUMNS) + "\n")
            file.writelines(_row(step) for step in range(1, rows + 1))
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "feste", "monitor", "--once", folder], capture_output=True, check=True)
        once = time.perf_counter() - begun
        more = "STEP" + _row(0)[1:]
        done = subprocess.run([sys.executable, "-c", WATCHER, folder, str(rows), more, str(time.time())],
                              capture_output=True, text=True, check=True)
        return {"seconds of `monitor --once`": once} | json.loads(done.stdout)
