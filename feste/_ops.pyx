# cython: binding=True
"""Every hot loop of feste: matrix products, attention, normalisation, loss, optimizer.

Conventions, shared with `reference.py`, where each function here has a twin that says what it computes:

- outputs first, then inputs, then saved statistics, then sizes; `d` prefixes a gradient;
- gradients of parameters are added to (+=), gradients of activations are written (=);
- every array is C-contiguous float32 (ids and targets int32), checked on entry; outputs overlap nothing
  unless the twin says so;
- `x_backward` stands directly below `x_forward` and quotes the line it differentiates.

Design:

- Work is cut into tiles that depend on the shapes alone, never on the number of threads, wherever the order of
  additions depends on the cut. So any number of threads gives the same bits.
- Loops run over vectors of VL floats (see _simd.h); the end of a row is read and written in part.
- The GIL is released while a kernel runs. Work space is taken before the threads start.
- A kernel is its checks and a body that each member of a team runs; it can be executed at once or recorded (_team.pxi).
- One module for each instruction set, compiled from this file with the `.pxi` files it includes, each of which holds one
  idea. They are no modules of their own: the micro-kernel must be inlined where it is called, and a kernel called from
  Python without a second lookup.

Shapes: B sequences, T tokens each, C channels, H heads of D = C / H channels, V tokens in the vocabulary; rows = B * T.
"""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport parallel, threadid
from libc.float cimport FLT_MIN
from libc.math cimport INFINITY, logf, sqrt, sqrtf
from libc.stdint cimport int32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset, strcmp
from openmp cimport omp_get_max_threads, omp_get_num_threads, omp_get_wtime

cdef extern from "_blocks.h" nogil:
    enum:  # each with its reason, and its value for every instruction set, in that file
        VL, MR, NV, NR, PAIR_WORDS, KC, NC, MC, TASK_MC, TASK_NC, HALVES_MN, MIN_TILES, TASKS_PER_THREAD, PAD, PREFETCH_ROWS
        ROW_PRODUCT_K, QUERIES, ROW_TILE, ROWS_AT_ONCE, SUM_TILE, SERIAL, SERIAL_WEIGHT

cdef extern from "_simd.h" nogil:
    ctypedef float vf    # a vector of VL floats; Cython need only know that it adds and multiplies
    ctypedef int32_t vi  # a vector of VL 32-bit integers
    vf vload(const float* p)
    void vstore(float* p, vf x)
    vi viload(const int32_t* p)
    void vistore(int32_t* p, vi x)
    vf vset(float x)
    vf vload_part(const float* p, Py_ssize_t n, float fill)
    void vstore_part(float* p, vf x, Py_ssize_t n)
    vi viset(int32_t x)
    vf vfloat(vi x)
    vf vfma(vf a, vf b, vf c)
    vf vcut(vf x, Py_ssize_t n, float fill)
    vf vmax(vf a, vf b)
    vf vwhere_positive(vf test, vf x)
    float vsum(vf x)
    float vpeak(vf x)
    vf vsqrt(vf x)
    vf vexp(vf x)
    vi bf16_bits(vf x)
    vi bf16_pairs(vf even, vf odd)
    vi bf16_row(vf x0, vf x1)
    vi bf16_half(vi pairs, int word)
    vf bf16_fma(vf acc, vi a, vi b)
    vi bf16_word(vf even, vf odd, int word)
    void prefetch_read(const float* p, Py_ssize_t n)
    void prefetch_write(const float* p, Py_ssize_t n)
    void transpose_tile(int32_t* out, Py_ssize_t ldo, const int32_t* x, Py_ssize_t ldi)
    void* workspace(size_t size)

cdef extern from "_team.h" nogil:
    ctypedef struct team_t:
        pass
    void team_open(team_t* team, int size)
    void team_close(team_t* team)
    void team_barrier(team_t* team, int size)
    void begin_tasks(team_t* team)
    Py_ssize_t take_task(team_t* team, int thread, int size, Py_ssize_t n)
    void end_after(team_t* team, Py_ssize_t call)
    bint ends_after(team_t* team, Py_ssize_t call)
    void* recording()
    void set_recording(void* recording)

cnp.import_array()

cdef enum:
    MAX_THREADS = 1024  # more than any machine has: a typing error should not start a million

TILE = SUM_TILE  # elements whose squares are one of `tile_squares`

cdef int n_threads = omp_get_max_threads()


def set_num_threads(int n):
    """Set the number of threads of every kernel; 0 means one for each available core."""
    global n_threads
    if n < 0 or n > MAX_THREADS:
        raise ValueError(f"the number of threads must lie in 0 .. {MAX_THREADS}, got {n}")
    n_threads = n if n > 0 else omp_get_max_threads()


def get_num_threads():
    """The number of threads of every kernel."""
    return n_threads


# What the kernels share
include "_team.pxi"           # the threads that run a kernel, now or later
include "_arrays.pxi"         # the arguments of a kernel, checked
include "_vectors.pxi"        # rows of any length

# Matrix products, from the innermost loop outwards
include "_microkernel.pxi"    # the register tile
include "_pack.pxi"           # panels and strips
include "_gemm.pxi"           # blocks and threads
include "_linear.pxi"         # linear layers, the product of a single row
include "_packed.pxi"         # weights that are packed once
include "_quantized.pxi"      # weights of 8 bits

# The other kernels, in the order of reference.py
include "_embedding.pxi"
include "_layernorm.pxi"
include "_rmsnorm.pxi"
include "_gelu.pxi"
include "_relu2.pxi"
include "_dropout.pxi"
include "_rope.pxi"
include "_attention.pxi"
include "_rows.pxi"
include "_cross_entropy.pxi"
include "_sums.pxi"
include "_optimizer.pxi"
include "_muon.pxi"
