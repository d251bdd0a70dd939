"""The door to the kernels: one compiled variant of `_ops.pyx` is chosen here, once, when feste is imported.

The kernels themselves are re-exported under their own names, so `ops.gelu_forward` is the compiled function and
a call costs no Python in between; each checks its arrays' dtype, shape, layout and overlap before it writes.
What each computes stands in `reference.py` under the same name.

    ops.isa              the instruction set in use: avx512 (with BF16), avx2, neon or generic
    ops.isa_reason       why that one
    ops.available_isas   all that were built and that this CPU can run, best first

`FESTE_ISA=name` forces one, and is an ImportError if the CPU lacks it or it was not built.

`zeros` makes arrays as the kernels like them.
"""

import importlib
import importlib.util
import math
import os
import warnings
from types import ModuleType

import numpy as np

from feste.machine import useful_threads, visible_cores

try:
    from feste import _cpu
except ImportError:
    raise ImportError("feste's kernels are not compiled; run `make` in the checkout, or `pip install .`") from None

ISAS = ("avx512", "avx2", "neon", "generic")

# How long an idle thread of GNU OpenMP spins before it sleeps. Alone on the machine the default (300,000) is no
# faster; beside another busy process it makes a step up to a hundred times slower, because a spinning thread holds
# the core that the other threads wait for.
SPIN_COUNT = "1000"


# NumPy begins a large array 16 bytes into a page. There every vector of AVX-512 and every second one of AVX2 lies
# across two cache lines, and so does each row of a register tile: products that write much take a quarter longer.
CACHE_LINE = 64  # bytes


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """A C-contiguous array of zeros whose first element begins a cache line."""
    size = math.prod(shape)
    raw = np.zeros(size + CACHE_LINE // np.dtype(dtype).itemsize, dtype)
    first = -raw.ctypes.data % CACHE_LINE // raw.itemsize
    return raw[first:first + size].reshape(shape)


def load(isa: str) -> ModuleType:
    """The compiled kernels of one instruction set."""
    settings = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": SPIN_COUNT}
    if useful_threads() < visible_cores():
        settings["OMP_NUM_THREADS"] = str(useful_threads())
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)  # OpenMP reads them once, when it is loaded
    try:
        return importlib.import_module(f"feste._ops_{isa}")
    finally:
        for name in added:
            del os.environ[name]


def _is_built(isa: str) -> bool:
    return importlib.util.find_spec(f"feste._ops_{isa}") is not None


def _choose(forced: str | None) -> tuple[str, str]:
    """The instruction set and the reason for it."""
    if forced:
        if forced not in ISAS:
            raise ImportError(f"FESTE_ISA={forced} is unknown; choose one of {', '.join(ISAS)}")
        if forced not in _cpu.supported():
            raise ImportError(f"FESTE_ISA={forced}, but this CPU supports only {', '.join(_cpu.supported())}")
        if not _is_built(forced):
            raise ImportError(f"FESTE_ISA={forced} was not built; built are {', '.join(filter(_is_built, ISAS))}")
        return forced, "forced by FESTE_ISA"
    if not available_isas:
        raise ImportError("feste's kernels are not built for this CPU; run `make` or `pip install .`")
    best = available_isas[0]
    if best == _cpu.supported()[0]:
        return best, "the best this CPU supports"
    return best, f"the best that was built; this CPU also supports {_cpu.supported()[0]}"


available_isas = [isa for isa in _cpu.supported() if _is_built(isa)]
isa, isa_reason = _choose(os.environ.get("FESTE_ISA"))
_kernels = load(isa)

SUM_TILE = _kernels.TILE  # the same for every instruction set
Recording = _kernels.Recording
adamw_update = _kernels.adamw_update
add = _kernels.add
attention_backward = _kernels.attention_backward
attention_decode = _kernels.attention_decode
attention_forward = _kernels.attention_forward
cross_entropy_backward = _kernels.cross_entropy_backward
cross_entropy_forward = _kernels.cross_entropy_forward
dropout_backward = _kernels.dropout_backward
dropout_forward = _kernels.dropout_forward
embedding_backward = _kernels.embedding_backward
embedding_forward = _kernels.embedding_forward
gather_rows = _kernels.gather_rows
gelu_backward = _kernels.gelu_backward
gelu_forward = _kernels.gelu_forward
gemm = _kernels.gemm
get_num_threads = _kernels.get_num_threads
layernorm_backward = _kernels.layernorm_backward
layernorm_forward = _kernels.layernorm_forward
linear_backward_input = _kernels.linear_backward_input
linear_backward_weight = _kernels.linear_backward_weight
linear_forward = _kernels.linear_forward
muon_update = _kernels.muon_update
pack_weight = _kernels.pack_weight
packed_forward = _kernels.packed_forward
packed_size = _kernels.packed_size
peak_flops = _kernels.peak_flops
quantize_weight = _kernels.quantize_weight
quantized_forward = _kernels.quantized_forward
quantized_size = _kernels.quantized_size
relu2_backward = _kernels.relu2_backward
relu2_forward = _kernels.relu2_forward
rmsnorm_backward = _kernels.rmsnorm_backward
rmsnorm_forward = _kernels.rmsnorm_forward
rope_backward = _kernels.rope_backward
rope_forward = _kernels.rope_forward
round_bf16 = _kernels.round_bf16
scatter_rows = _kernels.scatter_rows
set_num_threads = _kernels.set_num_threads
sum_of_squares = _kernels.sum_of_squares
tile_squares = _kernels.tile_squares


def use(name: str) -> None:
    """From now on the kernels of another instruction set, by its name; ImportError if there is none for this CPU."""
    global isa, isa_reason, _kernels
    before, threads = vars(_kernels), get_num_threads()
    isa, isa_reason = _choose(name)[0], "as asked for"
    _kernels = load(isa)
    for kernel, value in list(globals().items()):
        if kernel in before and value is before[kernel] and not kernel.startswith("__"):
            globals()[kernel] = getattr(_kernels, kernel)
    set_num_threads(threads)


def _after_fork_in_child() -> None:
    """The threads of a process do not survive fork(), and GNU OpenMP would wait for them for ever."""
    if get_num_threads() > 1:
        set_num_threads(1)
        warnings.warn("feste runs with one thread in a forked process; start it with the spawn method, or call "
                      "feste.ops.set_num_threads in a new thread of it", RuntimeWarning, stacklevel=2)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
