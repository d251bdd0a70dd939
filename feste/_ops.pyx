# cython: binding=True
"""Every hot loop of feste: matrix products, attention, normalisation, loss, optimizer.

Conventions, shared with `reference.py`, where each function here has a twin that says what it computes:

- outputs first, then inputs, then saved statistics, then sizes; `d` prefixes a gradient;
- gradients of parameters are added to (+=), gradients of activations are written (=);
- every array is C-contiguous float32 (ids and targets int32), checked at the door; outputs overlap nothing
  unless the twin says so;
- `x_backward` stands directly below `x_forward` and quotes the line it differentiates.

Design:

- Work is cut into tiles that depend on the shapes alone, never on the number of threads, wherever the order of
  additions depends on the cut. So any number of threads gives the same bits.
- Loops run over vectors of VL floats (see _simd.h); a scalar loop does the rest of a row.
- The GIL is released while a kernel runs. Work space is taken before the threads start.
"""

cimport cython
cimport numpy as cnp
from cython.parallel cimport parallel, prange, threadid
from libc.math cimport INFINITY, logf, sqrt, sqrtf
from libc.stdint cimport int32_t, uint64_t
from libc.string cimport memcpy, memset
from openmp cimport omp_get_max_threads

cdef extern from "_simd.h" nogil:
    ctypedef float vf    # a vector of VL floats; Cython need only know that it adds and multiplies
    ctypedef int32_t vi  # a vector of VL 32-bit integers
    enum: VL
    enum: MR
    enum: NV
    enum: NR
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
    float vsum(vf x)
    float vpeak(vf x)
    vf vsqrt(vf x)
    vf vexp(vf x)
    vi bf16_bits(vf x)
    vi bf16_pairs(vf even, vf odd)
    vi bf16_row(vf x0, vf x1)
    vf vdot_bf16(vf acc, vi a, vi b)
    void prefetch_read(const float* p, Py_ssize_t n)
    void prefetch_write(const float* p, Py_ssize_t n)
    void transpose_tile(int32_t* out, Py_ssize_t ldo, const int32_t* x, Py_ssize_t ldi)
    void* workspace(size_t size)

cnp.import_array()

cdef enum:
    MAX_THREADS = 1024

cdef int n_threads = omp_get_max_threads()


def set_num_threads(int n):
    """Set the number of threads of every kernel; 0 means one for each available core."""
    global n_threads
    if n < 0 or n > MAX_THREADS:
        raise ValueError(f"the number of threads must lie in 0 .. {MAX_THREADS}, got {n}")
    n_threads = n if n > 0 else omp_get_max_threads()


def get_num_threads():
    return n_threads


# ---- the door ----------------------------------------------------------------------------------------------

cdef void* _array(cnp.ndarray x, int dtype, str dtype_name, Py_ssize_t rows, Py_ssize_t cols, str name,
                  bint output) except NULL:
    if x is None:
        raise TypeError(f"{name} must be a {dtype_name} array, got None")
    if (cnp.PyArray_TYPE(x) != dtype or not cnp.PyArray_ISCARRAY_RO(x) or cnp.PyArray_NDIM(x) == 0
            or rows < 1 or cols < 1 or cnp.PyArray_SIZE(x) % cols != 0 or cnp.PyArray_SIZE(x) // cols != rows
            or (rows != 1 and cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1) != cols) or cnp.PyArray_SIZE(x) == 0
            or (output and not cnp.PyArray_ISWRITEABLE(x))):
        raise ValueError(
            f"{name} must be a C-contiguous, aligned{', writeable' if output else ''} {dtype_name} array of "
            f"{rows} x {cols} elements, got {(<object>x).dtype} of shape {(<object>x).shape}"
            f"{'' if cnp.PyArray_IS_C_CONTIGUOUS(x) else ', not C-contiguous'}"
            f"{'' if cnp.PyArray_ISWRITEABLE(x) else ', read-only'}")
    return cnp.PyArray_DATA(x)


cdef inline float* input(cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols, str name) except NULL:
    return <float*>_array(x, cnp.NPY_FLOAT32, "float32", rows, cols, name, False)


cdef inline float* output(cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols, str name) except NULL:
    return <float*>_array(x, cnp.NPY_FLOAT32, "float32", rows, cols, name, True)


cdef Py_ssize_t rows_of(cnp.ndarray x, Py_ssize_t C, str name) except -1:
    """How many rows of C elements a table has, where no argument says so."""
    if x is None:
        raise TypeError(f"{name} must be a float32 array, got None")
    if C < 1:
        raise ValueError(f"C must be at least 1, got {C}")
    return cnp.PyArray_SIZE(x) // C


cdef int32_t* index(cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t bound, str name) except NULL:
    """Integers, each checked to lie in 0 .. bound - 1: an index out of range would write anywhere."""
    cdef int32_t* data = <int32_t*>_array(x, cnp.NPY_INT32, "int32", rows, cols, name, False)
    cdef Py_ssize_t i
    for i in range(rows * cols):
        if data[i] < 0 or data[i] >= bound:
            raise ValueError(f"{name} must lie in 0 .. {bound - 1}, got {data[i]} at position {i}")
    return data


cdef int separate(tuple arrays, int n_outputs, str names, int may_be=0) except -1:
    """ValueError if one of the first n_outputs arrays overlaps another array; None stands for an array not given.

    Bit i of may_be: the first output may be the very memory of array i.
    """
    cdef char* begin[8]
    cdef char* end[8]
    cdef int i, j, n = <int>len(arrays)
    for i in range(n):
        begin[i] = end[i] = NULL
        if arrays[i] is not None:
            begin[i] = <char*>cnp.PyArray_DATA(<cnp.ndarray>arrays[i])
            end[i] = begin[i] + cnp.PyArray_NBYTES(<cnp.ndarray>arrays[i])
        for j in range(min(i, n_outputs)):
            if begin[i] < end[j] and begin[j] < end[i] and not (j == 0 and may_be >> i & 1 and begin[i] == begin[0]):
                raise ValueError(f"{names.split()[j]} must not overlap {names.split()[i]}")
    return 0


cdef void* scratch(size_t size) except NULL:
    cdef void* data = workspace(size)
    if data == NULL:
        raise MemoryError(f"no memory for a work space of {size} bytes")
    return data


# ---- rows that are no multiple of VL -----------------------------------------------------------------------

cdef enum:
    ROW_TILE = 64   # rows whose sums are added up on their own before they join the total
    SERIAL = 16384  # elements up to which a second thread costs more than it brings


cdef inline vf part(const float* x, Py_ssize_t n) noexcept nogil:
    """The next vector of a row with n elements left, zero beyond its end."""
    return vload(x) if n >= VL else vload_part(x, n, 0)


cdef inline void put(float* x, vf value, Py_ssize_t n) noexcept nogil:
    """Its way back."""
    if n >= VL:
        vstore(x, value)
    else:
        vstore_part(x, value, n)


cdef inline void put_pairs(int32_t* out, vi pairs, Py_ssize_t n) noexcept nogil:
    """The same for pairs of bfloat16."""
    cdef int32_t last[VL]
    if n >= VL:
        vistore(out, pairs)
    else:
        vistore(last, pairs)
        memcpy(out, last, n * sizeof(int32_t))


# ---- GEMM --------------------------------------------------------------------------------------------------
#
# c (M, N) = a (M, K) b (K, N), each operand with a row stride and a column stride, one of them 1, so that a
# transpose is a swap of strides. The loops are those of Goto and van de Geijn (2008) in the names of BLIS:
#
#   jc over N by NC, pc over K by KC    a block of b is packed into panels of NR columns, by all threads
#     ic over M by mc                   a task; packs its block of a into strips of MR rows unless rows of a
#                                       serve as they lie
#       jr over panels, ir over strips  the register tile, MR x NR, in micro_kernel
#
# What a task packs for itself is still in its L2 when it multiplies; what all pack for all has been to L3. So where
# b has more columns than a has rows, the roles change: gemm_by_columns.
#
# Each element of c is summed over k in ascending order whatever the cut in M and N; only KC decides the bits,
# and it is fixed. In bf16 two neighbours in k share a 32-bit lane ("pairs"), so panels and strips keep their
# shape and hold twice the depth.

cdef enum:
    KC = 512   # x NR floats: a b panel streams from L2 while c tiles are touched half as often as with 256
    MC = 3072  # x KC floats of a, or
    NC = 3072  # x KC floats of b, packed by all threads for all: 6 MB of L3
    MOST = 16  # strips, or
    GROUP = 4  # panels, packed side by side, by one thread for itself: x KC floats, up to half of L2
    LEAST = 4  # strips or panels of a task; fewer would be read too narrow, and pass over too much of the other side
    TASKS = 8  # tasks for each thread: fine enough that a thread that was held up costs the others little
    PAD = 16   # floats between strips and between panels, so that neighbours do not share a set of L1
    AHEAD = 8  # rows that are on their way while one is packed: as many as a set of L1 has ways


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline void micro_kernel(float* c, Py_ssize_t ldc, const float* a, Py_ssize_t rs_a, Py_ssize_t cs_a,
                              const float* b, const float* start, Py_ssize_t ld_start, const float* bias,
                              Py_ssize_t kc) noexcept nogil:
    """c (MR, NR) = start + (a (MR, kc) b (kc, NR) + bias); start and bias may be NULL, start may be c."""
    cdef vf acc[MR][NV]
    cdef vf b0, b1, ai
    cdef Py_ssize_t i, k
    open_tile(acc, c, ldc, start, ld_start)
    for k in range(kc):
        b0 = vload(b)
        b1 = vload(b + VL)
        for i in range(MR):
            ai = vset(a[i * rs_a])
            acc[i][0] = vfma(ai, b0, acc[i][0])
            acc[i][1] = vfma(ai, b1, acc[i][1])
        a += cs_a
        b += NR
    close_tile(c, ldc, acc, start, ld_start, bias)


cdef inline void micro_kernel_bf16(float* c, Py_ssize_t ldc, const int32_t* a, Py_ssize_t rs_a, Py_ssize_t cs_a,
                                   const int32_t* b, const float* start, Py_ssize_t ld_start, const float* bias,
                                   Py_ssize_t kc) noexcept nogil:
    """The same on pairs of bfloat16; kc counts pairs."""
    cdef vf acc[MR][NV]
    cdef vi b0, b1, ai
    cdef Py_ssize_t i, k
    open_tile(acc, c, ldc, start, ld_start)
    for k in range(kc):
        b0 = viload(b)
        b1 = viload(b + VL)
        for i in range(MR):
            ai = viset(a[i * rs_a])
            acc[i][0] = vdot_bf16(acc[i][0], ai, b0)
            acc[i][1] = vdot_bf16(acc[i][1], ai, b1)
        a += cs_a
        b += NR
    close_tile(c, ldc, acc, start, ld_start, bias)


cdef inline void open_tile(vf (*acc)[NV], const float* c, Py_ssize_t ldc, const float* start,
                           Py_ssize_t ld_start) noexcept nogil:
    """Zero; and c and start are on their way to L1 while the products are made."""
    cdef Py_ssize_t i
    for i in range(MR):
        prefetch_write(c + i * ldc, NR)
        if start != NULL and start != c:
            prefetch_read(start + i * ld_start, NR)
        acc[i][0] = acc[i][1] = vset(0)


cdef inline void close_tile(float* c, Py_ssize_t ldc, vf (*acc)[NV], const float* start, Py_ssize_t ld_start,
                            const float* bias) noexcept nogil:
    cdef Py_ssize_t i
    if bias != NULL:
        for i in range(MR):
            acc[i][0] = acc[i][0] + vload(bias)
            acc[i][1] = acc[i][1] + vload(bias + VL)
    if start != NULL:
        for i in range(MR):
            acc[i][0] = vload(start + i * ld_start) + acc[i][0]
            acc[i][1] = vload(start + i * ld_start + VL) + acc[i][1]
    for i in range(MR):
        vstore(c + i * ldc, acc[i][0])
        vstore(c + i * ldc + VL, acc[i][1])


cdef void close_edge(float* c, Py_ssize_t ldc, const float* tile, const float* start, Py_ssize_t ld_start,
                     const float* bias, Py_ssize_t m, Py_ssize_t n) noexcept nogil:
    """close_tile for the m x n elements of a tile (MR, NR) that lie inside the matrix."""
    cdef Py_ssize_t i, j
    cdef float x
    for i in range(m):
        for j in range(n):
            x = tile[i * NR + j]
            if bias != NULL:
                x = x + bias[j]
            c[i * ldc + j] = start[i * ld_start + j] + x if start != NULL else x


cdef void macro_kernel(float* c, Py_ssize_t ldc, const float* a, Py_ssize_t ps_a, Py_ssize_t rs_a, Py_ssize_t cs_a,
                       const float* b, Py_ssize_t ps_b, const float* start, Py_ssize_t ld_start, const float* bias,
                       Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, bint bf16) noexcept nogil:
    """c (m, n) = start + (a (m, k) b (k, n) + bias), a in whole strips of MR rows, ps_a apart, b in panels, ps_b apart.

    In bf16, a and panels hold pairs and k counts pairs. Where the matrix ends inside a register tile, the tile
    is made on the stack, so each element is summed in the same order wherever tiles begin.
    """
    cdef float tile[MR * NR]
    cdef float* target
    cdef const float* panel
    cdef const float* strip
    cdef const float* start_j
    cdef const float* bias_j
    cdef Py_ssize_t ib, jb, i, j, ld
    cdef bint whole
    for jb in range(ceil_div(n, NR)):
        j = jb * NR
        panel = b + jb * ps_b
        for ib in range(ceil_div(m, MR)):
            i = ib * MR
            whole = i + MR <= m and j + NR <= n
            target, ld = tile, NR
            start_j = bias_j = NULL
            if whole:
                target, ld = c + i * ldc + j, ldc
                start_j = start + i * ld_start + j if start != NULL else NULL
                bias_j = bias + j if bias != NULL else NULL
            strip = a + ib * ps_a
            if bf16:
                micro_kernel_bf16(target, ld, <const int32_t*>strip, rs_a, cs_a, <const int32_t*>panel, start_j,
                                  ld_start, bias_j, k)
            else:
                micro_kernel(target, ld, strip, rs_a, cs_a, panel, start_j, ld_start, bias_j, k)
            if not whole:
                close_edge(c + i * ldc + j, ldc, tile, start + i * ld_start + j if start != NULL else NULL, ld_start,
                           bias + j if bias != NULL else NULL, min(m - i, MR), min(n - j, NR))


cdef void pack_panels(float* panels, Py_ssize_t ps, float* sums, const float* b, Py_ssize_t rs_b, Py_ssize_t cs_b,
                      Py_ssize_t kc, Py_ssize_t n) noexcept nogil:
    """panels [ceil(n / NR)][kc][NR], ps apart, = b (kc, n), zero beyond n.

    Where rows of b are contiguous, each is read in one go, and the sums of the columns are added to sums unless it is
    NULL; it has room for whole panels.
    """
    cdef Py_ssize_t p, i, j, jb, k, kb, whole_k = kc // VL * VL
    cdef float* panel
    cdef const float* x
    cdef vf x0, x1
    if cs_b == 1:
        for k in range(kc):
            x = b + k * rs_b
            prefetch_read(x + AHEAD * rs_b, n)
            for p in range(ceil_div(n, NR)):
                j = p * NR
                x0 = part(x + j, n - j)
                x1 = part(x + j + VL, n - j - VL)
                vstore(panels + p * ps + k * NR, x0)
                vstore(panels + p * ps + k * NR + VL, x1)
                if sums != NULL:
                    vstore(sums + j, vload(sums + j) + x0)
                    vstore(sums + j + VL, vload(sums + j + VL) + x1)
        return
    for p in range(ceil_div(n, NR)):
        panel = panels + p * ps
        x = b + p * NR * cs_b
        if (p + 1) * NR <= n:
            for jb in range(NV):
                j = jb * VL
                for kb in range(kc // VL):
                    k = kb * VL
                    for i in range(VL):
                        prefetch_read(x + k + (j + i + NR) * cs_b, VL)
                    transpose_tile(<int32_t*>(panel + k * NR + j), NR, <const int32_t*>(x + k + j * cs_b), cs_b)
            for k in range(whole_k, kc):
                for j in range(NR):
                    panel[k * NR + j] = x[k + j * cs_b]
        else:
            memset(panel, 0, kc * NR * sizeof(float))
            for k in range(kc):
                for j in range(n - p * NR):
                    panel[k * NR + j] = x[k + j * cs_b]


cdef void pack_panels_bf16(int32_t* panels, Py_ssize_t ps, float* sums, const float* b, Py_ssize_t rs_b,
                           Py_ssize_t cs_b, Py_ssize_t kc, Py_ssize_t n) noexcept nogil:
    """panels [ceil(n / NR)][ceil(kc / 2)][NR], ps apart, = pairs of b (kc, n), zero beyond kc and n; sums of b before
    it is rounded."""
    cdef int32_t rows[VL * VL]
    cdef int32_t columns[VL * VL]
    cdef const float* x
    cdef int32_t* panel
    cdef vf even, odd
    cdef Py_ssize_t jb, kb, i, j, k, pairs = ceil_div(kc, 2)
    if cs_b == 1:
        for k in range(pairs):
            x = b + 2 * k * rs_b
            prefetch_read(x + 2 * AHEAD * rs_b, n)
            prefetch_read(x + (2 * AHEAD + 1) * rs_b, n)
            for jb in range(ceil_div(n, NR) * NV):
                j = jb * VL
                even = part(x + j, n - j)
                odd = part(x + rs_b + j, n - j) if 2 * k + 1 < kc else vset(0)
                vistore(panels + jb // NV * ps + k * NR + jb % NV * VL, bf16_pairs(even, odd))
                if sums != NULL:
                    vstore(sums + j, vload(sums + j) + (even + odd))
        return
    for jb in range(ceil_div(n, NR) * NV):
        j = jb * VL
        panel = panels + jb // NV * ps + jb % NV * VL
        for kb in range(ceil_div(pairs, VL)):
            k = kb * VL
            for i in range(VL):
                x = b + 2 * k + (j + i) * cs_b
                if j + i < n:
                    vistore(rows + i * VL, bf16_row(part(x, kc - 2 * k), part(x + VL, kc - 2 * k - VL)))
                else:
                    vistore(rows + i * VL, viset(0))
            transpose_tile(columns, VL, rows, VL)
            for i in range(min(VL, pairs - k)):
                vistore(panel + (k + i) * NR, viload(columns + i * VL))


cdef void pack_strips(float* strips, Py_ssize_t ps, const float* a, Py_ssize_t rs_a, Py_ssize_t cs_a, Py_ssize_t m,
                      Py_ssize_t kc) noexcept nogil:
    """strips [ceil(m / MR)][kc][MR], ps apart, = a (m, kc), zero beyond m: row stride 1, column stride MR."""
    cdef Py_ssize_t s, i, j, k, whole = m // MR if rs_a == 1 else 0
    cdef const float* x
    for k in range(kc if whole > 0 else 0):  # all strips side by side, so that each row of a^T is read in one go
        x = a + k * cs_a
        prefetch_read(x + AHEAD * cs_a, whole * MR)
        for s in range(whole):
            memcpy(strips + s * ps + k * MR, x + s * MR, MR * sizeof(float))
    for s in range(whole, ceil_div(m, MR)):
        i = s * MR
        memset(strips + s * ps, 0, kc * MR * sizeof(float))
        for k in range(kc):
            for j in range(min(MR, m - i)):
                strips[s * ps + k * MR + j] = a[(i + j) * rs_a + k * cs_a]


cdef void pack_strips_bf16(int32_t* strips, Py_ssize_t ps, const float* a, Py_ssize_t cs_a, Py_ssize_t m,
                           Py_ssize_t kc) noexcept nogil:
    """strips [ceil(m / MR)][ceil(kc / 2)][MR] = pairs of a (m, kc), columns of a contiguous, zero beyond m and kc."""
    cdef Py_ssize_t s, i, j, jb, k
    cdef const float* x
    cdef vf odd
    for k in range(ceil_div(kc, 2)):
        x = a + 2 * k * cs_a
        prefetch_read(x + 2 * AHEAD * cs_a, m)
        prefetch_read(x + (2 * AHEAD + 1) * cs_a, m)
        for s in range(ceil_div(m, MR)):
            for jb in range(ceil_div(MR, VL)):  # once, but for SSE2 and NEON
                j = jb * VL
                i = s * MR + j
                odd = part(x + cs_a + i, m - i) if 2 * k + 1 < kc else vset(0)
                put_pairs(strips + s * ps + k * MR + j, bf16_pairs(part(x + i, m - i), odd), MR - j)


cdef void pack_rows_bf16(int32_t* strips, Py_ssize_t ps, const float* a, Py_ssize_t rs_a, Py_ssize_t m,
                         Py_ssize_t kc) noexcept nogil:
    """strips [ceil(m / MR)][MR][ceil(kc / 2)] = pairs of a (m, kc), rows of a contiguous, zero beyond m and kc."""
    cdef Py_ssize_t kb, i, k, pairs = ceil_div(kc, 2)
    cdef const float* x
    cdef int32_t* row
    for i in range(ceil_div(m, MR) * MR):
        row = strips + i // MR * ps + i % MR * pairs
        if i >= m:
            memset(row, 0, pairs * sizeof(int32_t))
            continue
        for kb in range(ceil_div(pairs, VL)):
            k = kb * VL
            x = a + i * rs_a + 2 * k
            put_pairs(row + k, bf16_row(part(x, kc - 2 * k), part(x + VL, kc - 2 * k - VL)), pairs - k)


cdef struct Gemm:
    float* c                            # (M, N), rows ldc apart
    Py_ssize_t ldc
    const float* a                      # (M, K)
    Py_ssize_t rs_a, cs_a
    const float* b                      # (K, N)
    Py_ssize_t rs_b, cs_b
    const float* start                  # (M, N), rows ldc apart, or NULL: what the product is added to
    const float* bias                   # (N) or NULL
    float* column_sums                  # (N) or NULL: the sums of b's columns are added to it, ROW_TILE rows at a time
    Py_ssize_t M, N, K
    bint bf16


cdef void pack_b(const Gemm* g, float* panels, Py_ssize_t ps, Py_ssize_t j, Py_ssize_t n, Py_ssize_t pc, Py_ssize_t kc,
                 bint add_up) noexcept nogil:
    """Columns j .. j + n of b, at most GROUP panels, for one block of K; and their sums if add_up.

    ROW_TILE rows at a time, so that the rounding of the sums grows slowly.
    """
    cdef const float* b = g.b + pc * g.rs_b + j * g.cs_b
    cdef float sums[GROUP * NR]
    cdef float* tile_sums = sums if add_up and g.column_sums != NULL else NULL
    cdef Py_ssize_t tile, k, i, rows
    for tile in range(ceil_div(kc, ROW_TILE)):
        k = tile * ROW_TILE
        rows = min(ROW_TILE, kc - k)
        memset(sums, 0, sizeof(sums))
        if g.bf16:
            pack_panels_bf16(<int32_t*>panels + k // 2 * NR, ps, tile_sums, b + k * g.rs_b, g.rs_b, g.cs_b, rows, n)
        else:
            pack_panels(panels + k * NR, ps, tile_sums, b + k * g.rs_b, g.rs_b, g.cs_b, rows, n)
        if tile_sums != NULL:
            for i in range(n):
                g.column_sums[j + i] += sums[i]


cdef void pack_a(const Gemm* g, float* strips, Py_ssize_t ps, Py_ssize_t i, Py_ssize_t m, Py_ssize_t pc,
                 Py_ssize_t kc) noexcept nogil:
    """Rows i .. i + m of a for one block of K. Of contiguous float32 rows only those that make no whole strip: the
    others serve as they lie."""
    cdef const float* a = g.a + i * g.rs_a + pc * g.cs_a
    cdef Py_ssize_t whole = m // MR if g.cs_a == 1 else 0
    if g.bf16 and g.cs_a == 1:
        pack_rows_bf16(<int32_t*>strips, ps, a, g.rs_a, m, kc)
    elif g.bf16:
        pack_strips_bf16(<int32_t*>strips, ps, a, g.cs_a, m, kc)
    elif whole * MR < m:
        pack_strips(strips + whole * ps, ps, a + whole * MR * g.rs_a, g.rs_a, g.cs_a, m - whole * MR, kc)


cdef void multiply(const Gemm* g, const float* strips, Py_ssize_t ps_a, const float* panels, Py_ssize_t ps_b,
                   Py_ssize_t ic, Py_ssize_t m, Py_ssize_t jc, Py_ssize_t n, Py_ssize_t pc,
                   Py_ssize_t kc) noexcept nogil:
    """Rows ic .. ic + m and columns jc .. jc + n of c, for one block of K, from what pack_a and pack_b made of it."""
    cdef float* c = g.c + ic * g.ldc + jc
    cdef const float* start = c
    cdef const float* bias = NULL
    cdef bint packed_rows = g.bf16 and g.cs_a == 1
    cdef Py_ssize_t lanes = lanes_of(g, kc), whole = 0
    if pc == 0:
        start = g.start + ic * g.ldc + jc if g.start != NULL else NULL
        bias = g.bias + jc if g.bias != NULL else NULL
    if g.cs_a == 1 and not g.bf16:
        whole = m // MR * MR
        macro_kernel(c, g.ldc, g.a + ic * g.rs_a + pc, MR * g.rs_a, g.rs_a, 1, panels, ps_b, start, g.ldc, bias, whole,
                     n, lanes, False)
    if whole < m:
        macro_kernel(c + whole * g.ldc, g.ldc, strips + whole // MR * ps_a, ps_a, lanes if packed_rows else 1,
                     1 if packed_rows else MR, panels, ps_b, start + whole * g.ldc if start != NULL else NULL, g.ldc,
                     bias, m - whole, n, lanes, g.bf16)


cdef int run_gemm(const Gemm* g) except -1:
    if g.M == 1 and not g.bf16 and g.column_sums == NULL:
        return row_product(g)
    if g.M >= g.N:
        return gemm_by_rows(g)
    return gemm_by_columns(g)


cdef int gemm_by_rows(const Gemm* g) except -1:
    """b is packed by all threads; a task takes some rows of a, which it packs for itself where they need it."""
    cdef Py_ssize_t depth = depth_of(g), max_lanes = lanes_of(g, min(g.K, depth))
    cdef Py_ssize_t panels_size = min(ceil_div(g.N, NR), NC // NR) * (NR * max_lanes + PAD)
    cdef Py_ssize_t strips_size = MOST * (MR * max_lanes + PAD)
    cdef float* panels = <float*>scratch((panels_size + n_threads * strips_size) * sizeof(float))
    cdef float* strips = panels + panels_size
    cdef Py_ssize_t row_blocks = count_blocks(ceil_div(g.M, MR), MOST)
    cdef Py_ssize_t column_blocks = 1 if row_blocks >= 2 * n_threads else ceil_div(TASKS * n_threads, row_blocks)
    cdef Py_ssize_t jb = 0, jc = 0, nc = 0, pb = 0, pc = 0, kc = 0, groups = 0, ps_a = 0, ps_b = 0
    cdef Py_ssize_t task, i, j, m, n
    cdef float* block
    with nogil, parallel(num_threads=n_threads):
        for jb in range(ceil_div(g.N, NC)):
            jc = jb * NC
            nc = min(g.N - jc, NC)
            groups = count_blocks(ceil_div(nc, NR), GROUP)
            for pb in range(ceil_div(g.K, depth)):
                pc = pb * depth
                kc = min(g.K - pc, depth)
                ps_a, ps_b = MR * lanes_of(g, kc) + PAD, NR * lanes_of(g, kc) + PAD
                for task in prange(groups, schedule='static'):
                    j = begin_of(task, groups, nc, NR)
                    n = begin_of(task + 1, groups, nc, NR) - j
                    pack_b(g, panels + j // NR * ps_b, ps_b, jc + j, n, pc, kc, True)
                for task in prange(row_blocks * column_blocks, schedule='dynamic'):
                    block = strips + threadid() * strips_size
                    i = begin_of(task // column_blocks, row_blocks, g.M, MR)
                    m = begin_of(task // column_blocks + 1, row_blocks, g.M, MR) - i
                    j = begin_of(task % column_blocks, column_blocks, nc, NR)
                    n = begin_of(task % column_blocks + 1, column_blocks, nc, NR) - j
                    if n > 0:
                        pack_a(g, block, ps_a, i, m, pc, kc)
                        multiply(g, block, ps_a, panels + j // NR * ps_b, ps_b, i, m, jc + j, n, pc, kc)
    return 0


cdef int gemm_by_columns(const Gemm* g) except -1:
    """The roles changed: all threads pack what of a needs packing, and a task takes some columns of b, which it packs
    for itself."""
    cdef Py_ssize_t depth = depth_of(g), max_lanes = lanes_of(g, min(g.K, depth))
    cdef Py_ssize_t strips_size = min(ceil_div(g.M, MR), MC // MR) * (MR * max_lanes + PAD)
    cdef Py_ssize_t panels_size = GROUP * (NR * max_lanes + PAD)
    cdef float* strips = <float*>scratch((strips_size + n_threads * panels_size) * sizeof(float))
    cdef float* panels = strips + strips_size
    cdef Py_ssize_t column_blocks = count_blocks(ceil_div(g.N, NR), GROUP)
    cdef Py_ssize_t ib = 0, ic = 0, mc = 0, pb = 0, pc = 0, kc = 0, groups = 0, ps_a = 0, ps_b = 0
    cdef Py_ssize_t task, i, j, m, n
    cdef float* block
    with nogil, parallel(num_threads=n_threads):
        for ib in range(ceil_div(g.M, MC)):
            ic = ib * MC
            mc = min(g.M - ic, MC)
            groups = count_blocks(ceil_div(mc, MR), MOST)
            for pb in range(ceil_div(g.K, depth)):
                pc = pb * depth
                kc = min(g.K - pc, depth)
                ps_a, ps_b = MR * lanes_of(g, kc) + PAD, NR * lanes_of(g, kc) + PAD
                for task in prange(groups, schedule='static'):
                    i = begin_of(task, groups, mc, MR)
                    m = begin_of(task + 1, groups, mc, MR) - i
                    pack_a(g, strips + i // MR * ps_a, ps_a, ic + i, m, pc, kc)
                for task in prange(column_blocks, schedule='dynamic'):
                    block = panels + threadid() * panels_size
                    j = begin_of(task, column_blocks, g.N, NR)
                    n = begin_of(task + 1, column_blocks, g.N, NR) - j
                    pack_b(g, block, ps_b, j, n, pc, kc, ib == 0)
                    multiply(g, strips, ps_a, block, ps_b, ic, mc, j, n, pc, kc)
    return 0


cdef inline Py_ssize_t depth_of(const Gemm* g) noexcept nogil:
    """Rows of b in a block of K."""
    return 2 * KC if g.bf16 else KC


cdef inline Py_ssize_t lanes_of(const Gemm* g, Py_ssize_t kc) noexcept nogil:
    """32-bit lanes that hold kc neighbours in k."""
    return ceil_div(kc, 2) if g.bf16 else kc


cdef Py_ssize_t count_blocks(Py_ssize_t total, Py_ssize_t most) noexcept nogil:
    """Blocks of at most `most`, as many for every thread, and a few for each where there is enough to divide."""
    cdef Py_ssize_t wanted = max(ceil_div(total, most), min(TASKS * n_threads, ceil_div(total, LEAST)))
    if total < n_threads:
        return total
    return min(total, ceil_div(wanted, n_threads) * n_threads)


cdef inline Py_ssize_t begin_of(Py_ssize_t block, Py_ssize_t blocks, Py_ssize_t n, Py_ssize_t width) noexcept nogil:
    """The first row (or column) of a block, if n of them, in strips (or panels) of a width, are divided evenly."""
    return min(n, block * ceil_div(n, width) // blocks * width)


def gemm(cnp.ndarray c, cnp.ndarray a, cnp.ndarray b, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
         bint trans_a=False, bint trans_b=False, bint accumulate=False, bint bf16=False):
    cdef Gemm g
    g.c, g.ldc = output(c, M, N, "c"), N
    g.a = input(a, K, M, "a") if trans_a else input(a, M, K, "a")
    g.b = input(b, N, K, "b") if trans_b else input(b, K, N, "b")
    g.rs_a, g.cs_a = 1 if trans_a else K, M if trans_a else 1
    g.rs_b, g.cs_b = 1 if trans_b else N, K if trans_b else 1
    g.start, g.bias, g.column_sums = g.c if accumulate else NULL, NULL, NULL
    g.M, g.N, g.K, g.bf16 = M, N, K, bf16
    separate((c, a, b), 1, "c a b")
    run_gemm(&g)


# ---- linear layers -----------------------------------------------------------------------------------------

cdef enum:
    K_TILE = 64       # rows of the weight that a task takes when one row is multiplied by it


cdef void add_dot_rows(float* out, const float* x, const float* weight, Py_ssize_t n, Py_ssize_t K) noexcept nogil:
    """out (n) += weight (n, K) x (K), rows of weight contiguous."""
    cdef Py_ssize_t i, kb, k
    cdef vf acc0, acc1
    cdef const float* w
    for i in range(n):
        w = weight + i * K
        acc0 = acc1 = vset(0)
        for kb in range(K // (2 * VL)):
            k = kb * 2 * VL
            acc0 = vfma(vload(x + k), vload(w + k), acc0)
            acc1 = vfma(vload(x + k + VL), vload(w + k + VL), acc1)
        k = K // (2 * VL) * 2 * VL
        acc0 = vfma(part(x + k, K - k), part(w + k, K - k), acc0)
        if K - k > VL:
            acc1 = vfma(part(x + k + VL, K - k - VL), part(w + k + VL, K - k - VL), acc1)
        out[i] += vsum(acc0 + acc1)


cdef void add_scaled_rows(float* out, const float* x, const float* weight, Py_ssize_t n, Py_ssize_t K,
                          Py_ssize_t N) noexcept nogil:
    """out (n) += x (K) weight (K, n), rows of weight N apart: four rows for each pass over out."""
    cdef Py_ssize_t k, j, jb
    cdef const float* w
    cdef vf acc
    for k in range(0, K - 3, 4):
        w = weight + k * N
        for jb in range(n // VL):
            j = jb * VL
            acc = vfma(vset(x[k]), vload(w + j), vload(out + j))
            acc = vfma(vset(x[k + 1]), vload(w + N + j), acc)
            acc = vfma(vset(x[k + 2]), vload(w + 2 * N + j), acc)
            vstore(out + j, vfma(vset(x[k + 3]), vload(w + 3 * N + j), acc))
        for j in range(n // VL * VL, n):
            out[j] = out[j] + x[k] * w[j] + x[k + 1] * w[N + j] + x[k + 2] * w[2 * N + j] + x[k + 3] * w[3 * N + j]
    for k in range(K // 4 * 4, K):
        for j in range(n):
            out[j] = out[j] + x[k] * weight[k * N + j]


cdef int row_product(const Gemm* g) except -1:
    """M = 1, a token at a time: the speed is that of reading b once, in the order in which it lies in memory.

    If rows of b are contiguous, a task takes K_TILE of them, and the tasks' sums are added in their order.
    """
    cdef Py_ssize_t tiles = ceil_div(g.K, K_TILE), rows = ceil_div(g.N, K_TILE), task, j, k, t
    cdef bint parallel_ = g.K * g.N > 4 * SERIAL
    cdef float* sums = <float*>scratch(tiles * g.N * sizeof(float)) if g.rs_b != 1 else NULL
    cdef vf acc
    with nogil:
        if g.rs_b == 1:
            for task in prange(rows, schedule='static', num_threads=n_threads, use_threads_if=parallel_):
                for j in range(task * K_TILE, min(g.N, (task + 1) * K_TILE)):
                    g.c[j] = (g.start[j] if g.start != NULL else 0) + (g.bias[j] if g.bias != NULL else 0)
                add_dot_rows(g.c + task * K_TILE, g.a, g.b + task * K_TILE * g.cs_b, min(K_TILE, g.N - task * K_TILE),
                             g.K)
            return 0
        for task in prange(tiles, schedule='static', num_threads=n_threads, use_threads_if=parallel_):
            memset(sums + task * g.N, 0, g.N * sizeof(float))
            k = task * K_TILE
            add_scaled_rows(sums + task * g.N, g.a + k, g.b + k * g.N, g.N, min(K_TILE, g.K - k), g.N)
        for task in range(ceil_div(g.N, VL)):
            j = task * VL
            acc = part(g.start + j, g.N - j) if g.start != NULL else vset(0)
            if g.bias != NULL:
                acc = acc + part(g.bias + j, g.N - j)
            for t in range(tiles):
                acc = acc + part(sums + t * g.N + j, g.N - j)
            put(g.c + j, acc, g.N - j)
    return 0


def linear_forward(cnp.ndarray out, cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, cnp.ndarray residual,
                   Py_ssize_t rows, Py_ssize_t K, Py_ssize_t N, bint bf16=False):
    cdef Gemm g
    g.c, g.ldc = output(out, rows, N, "out"), N
    g.a, g.rs_a, g.cs_a = input(x, rows, K, "x"), K, 1
    g.b, g.rs_b, g.cs_b = input(weight, K, N, "weight"), N, 1
    g.bias = input(bias, 1, N, "bias")
    g.start = input(residual, rows, N, "residual") if residual is not None else NULL
    g.column_sums = NULL
    g.M, g.N, g.K, g.bf16 = rows, N, K, bf16
    separate((out, x, weight, bias, residual), 1, "out x weight bias residual")
    run_gemm(&g)


def linear_backward_input(cnp.ndarray dx, cnp.ndarray dout, cnp.ndarray weight, Py_ssize_t rows, Py_ssize_t K,
                          Py_ssize_t N, bint bf16=False):
    # out = x @ weight + bias   ->   dx = dout @ weight^T
    output(dx, rows, K, "dx")
    separate((dx, dout, weight), 1, "dx dout weight")
    gemm(dx, dout, weight, rows, K, N, trans_b=True, bf16=bf16)


def linear_backward_weight(cnp.ndarray dweight, cnp.ndarray dbias, cnp.ndarray dout, cnp.ndarray x,
                           Py_ssize_t rows, Py_ssize_t K, Py_ssize_t N, bint bf16=False):
    # out = x @ weight + bias   ->   dweight = x^T @ dout, dbias = the sum of dout over the rows
    cdef Gemm g
    g.c, g.ldc = output(dweight, K, N, "dweight"), N
    g.a, g.rs_a, g.cs_a = input(x, rows, K, "x"), 1, K
    g.b, g.rs_b, g.cs_b = input(dout, rows, N, "dout"), N, 1
    g.start, g.bias, g.column_sums = g.c, NULL, output(dbias, 1, N, "dbias")
    g.M, g.N, g.K, g.bf16 = K, N, rows, bf16
    separate((dweight, dbias, dout, x), 2, "dweight dbias dout x")
    run_gemm(&g)


# ---- packed weights ----------------------------------------------------------------------------------------
#
# Generation multiplies a few rows by the same weights again and again, so its speed is that of reading them. The
# bfloat16 panels of the GEMM, made once and kept, are half the bytes, and give the bits of the GEMM.

def packed_size(Py_ssize_t K, Py_ssize_t N):
    return ceil_div(N, NR) * NR * ceil_div(K, 2)


def pack_weight(cnp.ndarray packed, cnp.ndarray weight, Py_ssize_t K, Py_ssize_t N, bint transposed=False):
    cdef Py_ssize_t p, panel = NR * ceil_div(K, 2), n_panels = ceil_div(N, NR)
    cdef int32_t* out = <int32_t*>_array(packed, cnp.NPY_INT32, "int32", 1, panel * n_panels, "packed", True)
    cdef const float* w = input(weight, N, K, "weight") if transposed else input(weight, K, N, "weight")
    cdef Py_ssize_t rs = 1 if transposed else N, cs = K if transposed else 1
    separate((packed, weight), 1, "packed weight")
    for p in prange(n_panels, nogil=True, schedule='static', num_threads=n_threads):
        pack_panels_bf16(out + p * panel, panel, NULL, w + p * NR * cs, rs, cs, K, min(NR, N - p * NR))


cdef void packed_row(float* out, const int32_t* x, const int32_t* panel, const float* bias, const float* residual,
                     Py_ssize_t pairs, Py_ssize_t n) noexcept nogil:
    """One row against one panel of n <= NR columns: a register tile of MR rows would wait for its arithmetic."""
    cdef vf acc[NV]
    cdef vf total[NV]
    cdef Py_ssize_t pb, pc, k, j
    for pb in range(ceil_div(pairs, KC)):
        pc = pb * KC
        acc[0] = acc[1] = vset(0)
        for k in range(pc, min(pc + KC, pairs)):
            acc[0] = vdot_bf16(acc[0], viset(x[k]), viload(panel + k * NR))
            acc[1] = vdot_bf16(acc[1], viset(x[k]), viload(panel + k * NR + VL))
        for j in range(NV):
            if pb == 0 and bias != NULL:
                acc[j] = acc[j] + part(bias + j * VL, n - j * VL)
            if pb == 0 and residual != NULL:
                acc[j] = part(residual + j * VL, n - j * VL) + acc[j]
            total[j] = acc[j] if pb == 0 else total[j] + acc[j]
    for j in range(NV):
        if n > j * VL:
            put(out + j * VL, total[j], n - j * VL)


cdef void packed_rows(float* out, Py_ssize_t ldo, const float* x, const float* panel, const float* bias,
                      const float* residual, Py_ssize_t rows, Py_ssize_t pairs, Py_ssize_t n) noexcept nogil:
    """The same for several rows."""
    cdef Py_ssize_t pb, pc
    for pb in range(ceil_div(pairs, KC)):
        pc = pb * KC
        macro_kernel(out, ldo, x + pc, MR * pairs, pairs, 1, panel + pc * NR, 0, residual if pb == 0 else out, ldo,
                     bias if pb == 0 else NULL, rows, n, min(KC, pairs - pc), True)


def packed_forward(cnp.ndarray out, cnp.ndarray x, cnp.ndarray packed, cnp.ndarray bias, cnp.ndarray residual,
                   Py_ssize_t rows, Py_ssize_t K, Py_ssize_t N):
    cdef Py_ssize_t pairs = ceil_div(K, 2), n_panels = ceil_div(N, NR), padded = ceil_div(rows, MR) * MR, p, j
    cdef float* o = output(out, rows, N, "out")
    cdef const float* px = input(x, rows, K, "x")
    cdef const float* panels = <float*>_array(packed, cnp.NPY_INT32, "int32", 1, n_panels * NR * pairs, "packed", False)
    cdef const float* b = input(bias, 1, N, "bias") if bias is not None else NULL
    cdef const float* r = input(residual, rows, N, "residual") if residual is not None else NULL
    cdef const float* bias_j
    cdef const float* residual_j
    cdef float* strips = <float*>scratch(padded * pairs * sizeof(float))
    separate((out, x, packed, bias, residual), 1, "out x packed bias residual")
    with nogil:
        pack_rows_bf16(<int32_t*>strips, MR * pairs, px, K, rows, K)
        for p in prange(n_panels, schedule='static', num_threads=n_threads, use_threads_if=K * N > 4 * SERIAL):
            j = p * NR
            bias_j = b + j if b != NULL else NULL
            residual_j = r + j if r != NULL else NULL
            if rows == 1:
                packed_row(o + j, <int32_t*>strips, <int32_t*>panels + j * pairs, bias_j, residual_j, pairs,
                           min(NR, N - j))
            else:
                packed_rows(o + j, N, strips, panels + j * pairs, bias_j, residual_j, rows, pairs, min(NR, N - j))


# ---- embedding ---------------------------------------------------------------------------------------------

def embedding_forward(cnp.ndarray out, cnp.ndarray ids, cnp.ndarray wte, cnp.ndarray wpe, Py_ssize_t B,
                      Py_ssize_t T, Py_ssize_t C, Py_ssize_t position=0):
    cdef Py_ssize_t V = rows_of(wte, C, "wte"), block_size = rows_of(wpe, C, "wpe")
    cdef float* o = output(out, B * T, C, "out")
    cdef const float* te = input(wte, V, C, "wte")
    cdef const float* pe = input(wpe, block_size, C, "wpe")
    cdef const int32_t* token = index(ids, B, T, V, "ids")
    cdef Py_ssize_t i, j, jb, t
    if position < 0 or position + T > block_size:
        raise ValueError(f"positions {position} .. {position + T - 1} lie outside wpe's 0 .. {block_size - 1}")
    separate((out, ids, wte, wpe), 1, "out ids wte wpe")
    for i in prange(B * T, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=B * T * C > SERIAL):
        t = position + i % T
        for jb in range(ceil_div(C, VL)):
            j = jb * VL
            put(o + i * C + j, part(te + token[i] * C + j, C - j) + part(pe + t * C + j, C - j),
                        min(VL, C - j))


def embedding_backward(cnp.ndarray dwte, cnp.ndarray dwpe, cnp.ndarray dout, cnp.ndarray ids, Py_ssize_t B,
                       Py_ssize_t T, Py_ssize_t C):
    # out[b, t] = wte[ids[b, t]] + wpe[t]   ->   dwte[ids[b, t]] += dout[b, t], dwpe[t] += dout[b, t]
    # A token may stand anywhere in the batch, so tasks share out the channels, and each adds in token order.
    cdef Py_ssize_t V = rows_of(dwte, C, "dwte"), block_size = rows_of(dwpe, C, "dwpe")
    cdef float* te = output(dwte, V, C, "dwte")
    cdef float* pe = output(dwpe, block_size, C, "dwpe")
    cdef const float* do = input(dout, B * T, C, "dout")
    cdef const int32_t* token = index(ids, B, T, V, "ids")
    cdef Py_ssize_t task, i, j
    cdef float* row
    cdef vf grad
    if T > block_size:
        raise ValueError(f"{T} positions do not fit the {block_size} rows of dwpe")
    separate((dwte, dwpe, dout, ids), 2, "dwte dwpe dout ids")
    for task in prange(ceil_div(C, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=B * T * C > SERIAL):
        j = task * VL
        for i in range(B * T):
            grad = part(do + i * C + j, C - j)
            row = te + token[i] * C + j
            put(row, part(row, C - j) + grad, C - j)
            row = pe + i % T * C + j
            put(row, part(row, C - j) + grad, C - j)


# ---- layer normalisation -----------------------------------------------------------------------------------

cdef float LAYERNORM_EPS = 1e-5


cdef void layernorm_row(float* out, float* mean, float* rstd, const float* x, const float* weight,
                        const float* bias, Py_ssize_t C) noexcept nogil:
    cdef Py_ssize_t j, jb, blocks = ceil_div(C, 2 * VL)
    cdef vf acc0 = vset(0), acc1 = vset(0), mu, scale, x0, x1  # two chains of additions side by side
    for jb in range(blocks):
        j = jb * 2 * VL
        acc0 = acc0 + part(x + j, C - j)
        acc1 = acc1 + part(x + j + VL, C - j - VL)
    mean[0] = vsum(acc0 + acc1) / C
    mu = vset(mean[0])
    acc0 = acc1 = vset(0)
    for jb in range(blocks):
        j = jb * 2 * VL
        x0 = (vload(x + j) if j + VL <= C else vload_part(x + j, C - j, mean[0])) - mu
        x1 = (vload(x + j + VL) if j + 2 * VL <= C else vload_part(x + j + VL, C - j - VL, mean[0])) - mu
        acc0 = vfma(x0, x0, acc0)
        acc1 = vfma(x1, x1, acc1)
    rstd[0] = 1 / sqrtf(vsum(acc0 + acc1) / C + LAYERNORM_EPS)
    scale = vset(rstd[0])
    for jb in range(ceil_div(C, VL)):
        j = jb * VL
        put(out + j, vfma((part(x + j, C - j) - mu) * scale, part(weight + j, C - j), part(bias + j, C - j)), C - j)


def layernorm_forward(cnp.ndarray out, cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray x, cnp.ndarray weight,
                      cnp.ndarray bias, Py_ssize_t rows, Py_ssize_t C):
    cdef float* o = output(out, rows, C, "out")
    cdef float* mu = output(mean, 1, rows, "mean")
    cdef float* rs = output(rstd, 1, rows, "rstd")
    cdef const float* px = input(x, rows, C, "x")
    cdef const float* w = input(weight, 1, C, "weight")
    cdef const float* b = input(bias, 1, C, "bias")
    cdef Py_ssize_t i
    separate((out, mean, rstd, x, weight, bias), 3, "out mean rstd x weight bias")
    for i in prange(rows, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=rows * C > SERIAL):
        layernorm_row(o + i * C, mu + i, rs + i, px + i * C, w, b, C)


cdef void layernorm_backward_row(float* dx, float* dweight, float* dbias, const float* dout, const float* x,
                                 const float* weight, float mean, float rstd, const float* dresidual,
                                 Py_ssize_t C) noexcept nogil:
    """dx of one row; dweight and dbias are a tile's partial sums."""
    cdef Py_ssize_t j, jb, blocks = ceil_div(C, VL)
    cdef vf mu = vset(mean), scale = vset(rstd), sum_d = vset(0), sum_dx = vset(0)
    cdef vf xhat, dxhat, do, mean_d, mean_dx
    for jb in range(blocks):
        j = jb * VL
        do = part(dout + j, C - j)
        xhat = (part(x + j, C - j) - mu) * scale
        put(dweight + j, vfma(do, xhat, part(dweight + j, C - j)), C - j)
        put(dbias + j, part(dbias + j, C - j) + do, C - j)
        dxhat = do * part(weight + j, C - j)
        sum_d = sum_d + dxhat
        sum_dx = vfma(dxhat, xhat, sum_dx)
    mean_d = vset(vsum(sum_d) / C)
    mean_dx = vset(vsum(sum_dx) / C)
    for jb in range(blocks):
        j = jb * VL
        xhat = (part(x + j, C - j) - mu) * scale
        dxhat = part(dout + j, C - j) * part(weight + j, C - j)
        dxhat = scale * (dxhat - mean_d - xhat * mean_dx)
        if dresidual != NULL:
            dxhat = part(dresidual + j, C - j) + dxhat
        put(dx + j, dxhat, C - j)


def layernorm_backward(cnp.ndarray dx, cnp.ndarray dweight, cnp.ndarray dbias, cnp.ndarray dout, cnp.ndarray x,
                       cnp.ndarray weight, cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray dresidual,
                       Py_ssize_t rows, Py_ssize_t C):
    # out = (x - mean) * rstd * weight + bias
    cdef float* gx = output(dx, rows, C, "dx")
    cdef float* gw = output(dweight, 1, C, "dweight")
    cdef float* gb = output(dbias, 1, C, "dbias")
    cdef const float* do = input(dout, rows, C, "dout")
    cdef const float* px = input(x, rows, C, "x")
    cdef const float* w = input(weight, 1, C, "weight")
    cdef const float* mu = input(mean, 1, rows, "mean")
    cdef const float* rs = input(rstd, 1, rows, "rstd")
    cdef const float* gr = input(dresidual, rows, C, "dresidual") if dresidual is not None else NULL
    cdef Py_ssize_t tiles = ceil_div(rows, ROW_TILE), tile, i, j
    cdef float* partial = <float*>scratch(tiles * 2 * C * sizeof(float))
    cdef float* pw
    separate((dx, dweight, dbias, dresidual, dout, x, weight, mean), 3,
             "dx dweight dbias dresidual dout x weight mean", 1 << 3)
    separate((dx, dweight, dbias, rstd), 3, "dx dweight dbias rstd")
    for tile in prange(tiles, nogil=True, schedule='static', num_threads=n_threads):
        pw = partial + tile * 2 * C
        memset(pw, 0, 2 * C * sizeof(float))
        for i in range(tile * ROW_TILE, min(rows, (tile + 1) * ROW_TILE)):
            layernorm_backward_row(gx + i * C, pw, pw + C, do + i * C, px + i * C, w, mu[i], rs[i],
                                   gr + i * C if gr != NULL else NULL, C)
    with nogil:
        for tile in range(tiles):
            pw = partial + tile * 2 * C
            for j in range(C):
                gw[j] += pw[j]
                gb[j] += pw[C + j]


# ---- GELU --------------------------------------------------------------------------------------------------

cdef float GELU_CUBIC = 0.044715
cdef float GELU_TWICE_SCALE = 1.5957691216057308  # 2 sqrt(2 / pi): 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u))


cdef inline vf gelu_gate(vf x) noexcept nogil:
    """0.5 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    cdef vf twice_u = vset(GELU_TWICE_SCALE) * x * vfma(vset(GELU_CUBIC) * x, x, vset(1))
    return vset(1) / (vset(1) + vexp(vset(0) - twice_u))


def gelu_forward(cnp.ndarray out, cnp.ndarray x, Py_ssize_t n):
    cdef float* o = output(out, 1, n, "out")
    cdef const float* px = input(x, 1, n, "x")
    cdef Py_ssize_t task, i
    cdef vf v
    separate((out, x), 1, "out x")
    for task in prange(ceil_div(n, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=n > SERIAL):
        i = task * VL
        v = part(px + i, n - i)
        put(o + i, v * gelu_gate(v), n - i)


def gelu_backward(cnp.ndarray dx, cnp.ndarray out, cnp.ndarray dout, cnp.ndarray x, Py_ssize_t n):
    # out = x * gate(u), gate = 1 / (1 + exp(-2u))  ->  dx = dout * (gate + x * gate * (1 - gate) * 2 du/dx)
    cdef float* gx = output(dx, 1, n, "dx")
    cdef float* o = output(out, 1, n, "out")
    cdef const float* do = input(dout, 1, n, "dout")
    cdef const float* px = input(x, 1, n, "x")
    cdef Py_ssize_t task, i
    cdef vf v, gate, twice_du
    separate((dx, out, dout, x), 2, "dx out dout x", 1 << 2)
    for task in prange(ceil_div(n, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=n > SERIAL):
        i = task * VL
        v = part(px + i, n - i)
        gate = gelu_gate(v)
        put(o + i, v * gate, n - i)
        twice_du = vset(GELU_TWICE_SCALE) * vfma(vset(3 * GELU_CUBIC) * v, v, vset(1))
        put(gx + i, part(do + i, n - i) * vfma(v * gate * (vset(1) - gate), twice_du, gate), n - i)


# ---- dropout -----------------------------------------------------------------------------------------------

cdef inline float dropout_factor(uint64_t key, uint64_t i, uint64_t threshold, float kept) noexcept nogil:
    """0 or kept = 1 / (1 - p), from (key, i) alone: see reference._dropout_mask."""
    cdef uint64_t z = key + i * <uint64_t>0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    z = z ^ (z >> 31)
    return kept if (z >> 32) >= threshold else 0


cdef int check_dropout(double p) except -1:
    if not 0 <= p < 1:
        raise ValueError(f"the dropout probability must be in [0, 1), got {p}")
    return 0


cdef void dropout(float* out, const float* x, const float* residual, double p, uint64_t key,
                  Py_ssize_t n) noexcept nogil:
    cdef uint64_t threshold = <uint64_t>(p * 4294967296.0)
    cdef float kept = <float>(1 / (1 - p))
    cdef Py_ssize_t i
    for i in prange(n, schedule='static', num_threads=n_threads, use_threads_if=n > SERIAL):
        out[i] = (residual[i] if residual != NULL else 0) + x[i] * dropout_factor(key, i, threshold, kept)


def dropout_forward(cnp.ndarray out, cnp.ndarray x, cnp.ndarray residual, double p, uint64_t key, Py_ssize_t n):
    cdef float* o = output(out, 1, n, "out")
    cdef const float* px = input(x, 1, n, "x")
    cdef const float* r = input(residual, 1, n, "residual") if residual is not None else NULL
    check_dropout(p)
    separate((out, x, residual), 1, "out x residual", 1 << 1 | 1 << 2)
    with nogil:
        dropout(o, px, r, p, key, n)


def dropout_backward(cnp.ndarray dx, cnp.ndarray dout, double p, uint64_t key, Py_ssize_t n):
    # out = residual + x * mask   ->   dx = dout * mask
    cdef float* g = output(dx, 1, n, "dx")
    cdef const float* do = input(dout, 1, n, "dout")
    check_dropout(p)
    separate((dx, dout), 1, "dx dout", 1 << 1)
    with nogil:
        dropout(g, do, NULL, p, key, n)


# ---- attention ---------------------------------------------------------------------------------------------
#
# A task is one head of one sequence. Its keys and values are packed into panels once; then QUERY_STRIPS * MR
# queries at a time go through scores -> softmax -> out, so memory grows with T, not with T^2. Above the
# diagonal whole register tiles are left out; inside a tile the weights are zero.

cdef enum:
    QUERY_STRIPS = (64 + MR - 1) // MR  # a block of at least 64 queries, so that T = 64 is one block


cdef struct Heads:
    Py_ssize_t B, T, H, D
    Py_ssize_t Tp, Dp      # T and D rounded up to whole panels
    Py_ssize_t ld          # row length of a block of scores
    Py_ssize_t queries     # rows of a block
    Py_ssize_t stride      # from a token to the next in qkv: 3C
    float scale            # 1 / sqrt(D)
    double p               # attention dropout
    uint64_t key, threshold
    float kept


cdef int describe_heads(Heads* h, Py_ssize_t B, Py_ssize_t T, Py_ssize_t H, Py_ssize_t D, double p,
                        uint64_t key) except -1:
    check_dropout(p)
    h.B, h.T, h.H, h.D = B, T, H, D
    h.Tp, h.Dp = ceil_div(T, NR) * NR, ceil_div(D, NR) * NR
    h.ld = h.Tp + NR
    h.queries = QUERY_STRIPS * MR
    h.stride = 3 * H * D
    h.scale = <float>(1 / sqrt(<double>D))
    h.p, h.key, h.threshold, h.kept = p, key, <uint64_t>(p * 4294967296.0), <float>(1 / (1 - p))
    return 0


cdef void copy_rows(float* out, const float* x, Py_ssize_t stride, float scale, Py_ssize_t m, Py_ssize_t rows,
                    Py_ssize_t D) noexcept nogil:
    """out (rows, D) = scale * x (m, D), rows of x stride apart, zero beyond m."""
    cdef Py_ssize_t i, j, jb
    for i in range(m):
        prefetch_read(x + (i + AHEAD) * stride, D)
        for jb in range(ceil_div(D, VL)):
            j = jb * VL
            put(out + i * D + j, vset(scale) * part(x + i * stride + j, D - j), D - j)
    memset(out + m * D, 0, (rows - m) * D * sizeof(float))


cdef inline Py_ssize_t keys_of_strip(const Heads* h, Py_ssize_t first) noexcept nogil:
    """Keys that a strip of MR queries from `first` may see: up to its last query."""
    return min(first + MR, h.T)


cdef void score_block(float* scores, const float* q, const float* k_panels, const Heads* h, Py_ssize_t first,
                      Py_ssize_t m) noexcept nogil:
    """scores (m, ld) = q (m, D) k^T: each panel of keys, while it is in L1, for all strips of queries that see it."""
    cdef Py_ssize_t jb, j, i
    for jb in range(ceil_div(first + m, NR)):
        j = jb * NR
        i = max(0, j - first) // MR * MR
        macro_kernel(scores + i * h.ld + j, h.ld, q + i * h.D, MR * h.D, h.D, 1, k_panels + j * h.D, 0, NULL, 0,
                     NULL, ceil_div(m - i, MR) * MR, NR, h.D, False)


cdef void weighted_rows(float* out, Py_ssize_t ldo, const float* weights, const float* panels, const Heads* h,
                        Py_ssize_t first, Py_ssize_t m) noexcept nogil:
    """out (m, D), rows ldo apart, = weights (m, keys) x (keys, D), x in panels; keys up to the diagonal."""
    cdef Py_ssize_t jb, j, strip, i
    for jb in range(ceil_div(h.D, NR)):
        j = jb * NR
        for strip in range(ceil_div(m, MR)):
            i = strip * MR
            macro_kernel(out + i * ldo + j, ldo, weights + i * h.ld, 0, h.ld, 1, panels + j * h.T, 0, NULL, 0,
                         NULL, min(MR, m - i), min(NR, h.D - j), keys_of_strip(h, first + i), False)


cdef float exp_row(float* scores, Py_ssize_t n, Py_ssize_t limit, float* inverse) noexcept nogil:
    """scores (n) become exp(scores - max), zero from n to limit, and inverse 1 / their sum.

    Whole vectors are read and written, so the row has room for them. Returns log(sum(exp(scores))). The caller
    divides: a row of out is shorter than a row of scores.
    """
    cdef Py_ssize_t jb, last = ceil_div(n, VL) - 1, rest = n - last * VL
    cdef vf peak = vcut(vload(scores + last * VL), rest, -INFINITY), total, e
    cdef float top, sum_exp
    for jb in range(last):
        peak = vmax(peak, vload(scores + jb * VL))
    top = vpeak(peak)
    total = vcut(vexp(vload(scores + last * VL) - vset(top)), rest, 0)
    vstore(scores + last * VL, total)
    for jb in range(last):
        e = vexp(vload(scores + jb * VL) - vset(top))
        vstore(scores + jb * VL, e)
        total = total + e
    for jb in range(last + 1, ceil_div(limit, VL)):
        vstore(scores + jb * VL, vset(0))
    sum_exp = vsum(total)
    inverse[0] = 1 / sum_exp
    return top + logf(sum_exp)


cdef inline void scale_row(float* x, float factor, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j, jb
    for jb in range(ceil_div(n, VL)):
        j = jb * VL
        put(x + j, part(x + j, n - j) * vset(factor), n - j)


cdef inline float dot(const float* x, const float* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j, jb
    cdef vf acc = vset(0)
    for jb in range(ceil_div(n, VL)):
        j = jb * VL
        acc = vfma(part(x + j, n - j), part(y + j, n - j), acc)
    return vsum(acc)


cdef void drop_row(float* row, const Heads* h, Py_ssize_t head, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    cdef uint64_t first = (<uint64_t>head * h.T + i) * h.T
    cdef Py_ssize_t j
    for j in range(n):
        row[j] = row[j] * dropout_factor(h.key, first + j, h.threshold, h.kept)


cdef void attention_forward_head(float* out, float* lse, const float* qkv, float* work, const Heads* h,
                                 Py_ssize_t head) noexcept nogil:
    cdef Py_ssize_t C = h.H * h.D, b = head // h.H, at = head % h.H * h.D
    cdef const float* q = qkv + b * h.T * h.stride + at
    cdef float* k_panels = work
    cdef float* v_panels = k_panels + h.Tp * h.D
    cdef float* q_block = v_panels + h.Dp * h.T
    cdef float* scores = q_block + h.queries * h.D
    cdef float inverse[QUERY_STRIPS * MR]
    cdef Py_ssize_t block, first, i, m, n
    pack_panels(k_panels, h.D * NR, NULL, q + C, 1, h.stride, h.D, h.T)
    pack_panels(v_panels, h.T * NR, NULL, q + 2 * C, h.stride, 1, h.T, h.D)
    for block in range(ceil_div(h.T, h.queries)):
        first = block * h.queries
        m = min(h.queries, h.T - first)
        copy_rows(q_block, q + first * h.stride, h.stride, h.scale, m, h.queries, h.D)
        score_block(scores, q_block, k_panels, h, first, m)
        for i in range(m):
            n = first + i + 1
            lse[head * h.T + first + i] = exp_row(scores + i * h.ld, n, keys_of_strip(h, first + i // MR * MR),
                                                  inverse + i)
            if h.p > 0:
                drop_row(scores + i * h.ld, h, head, first + i, n)
        weighted_rows(out + (b * h.T + first) * C + at, C, scores, v_panels, h, first, m)
        for i in range(m):
            scale_row(out + (b * h.T + first + i) * C + at, inverse[i], h.D)


def attention_forward(cnp.ndarray out, cnp.ndarray lse, cnp.ndarray qkv, Py_ssize_t B, Py_ssize_t T, Py_ssize_t H,
                      Py_ssize_t D, double p=0.0, uint64_t key=0):
    cdef float* o = output(out, B * T, H * D, "out")
    cdef float* l = output(lse, 1, B * H * T, "lse")
    cdef const float* x = input(qkv, B * T, 3 * H * D, "qkv")
    cdef Heads h
    describe_heads(&h, B, T, H, D, p, key)
    separate((out, lse, qkv), 2, "out lse qkv")
    cdef Py_ssize_t size = h.Tp * D + h.Dp * T + h.queries * (D + h.ld), head
    cdef float* work = <float*>scratch(n_threads * size * sizeof(float))
    for head in prange(B * H, nogil=True, schedule='dynamic', num_threads=n_threads):
        attention_forward_head(o, l, x, work + threadid() * size, &h, head)


cdef void score_gradients(float* weights, float* dweights, const float* delta, const float* lse, const Heads* h,
                          Py_ssize_t head, Py_ssize_t first, Py_ssize_t m) noexcept nogil:
    """From scores and dweights (m, ld) make weights (with dropout) and dscores, in place.

    weights = exp(scores - lse) * mask;  dscores = exp(scores - lse) * (mask * dweights - delta)
    """
    cdef Py_ssize_t i, j, jb, n, whole
    cdef float* w
    cdef float* dw
    cdef float factor
    cdef vf e, ds, lse_i, delta_i
    for i in range(ceil_div(m, MR) * MR):
        w = weights + i * h.ld
        dw = dweights + i * h.ld
        n = first + i + 1 if i < m else 0
        whole = n // VL
        lse_i = vset(lse[i]) if i < m else vset(0)
        delta_i = vset(delta[i]) if i < m and h.p == 0 else vset(0)
        for jb in range(whole):
            e = vexp(vload(w + jb * VL) - lse_i)
            vstore(dw + jb * VL, (e if h.p == 0 else vset(1)) * (vload(dw + jb * VL) - delta_i))
            vstore(w + jb * VL, e)
        for jb in range(whole, ceil_div(keys_of_strip(h, first + i // MR * MR), VL)):  # room for whole vectors
            j = jb * VL
            e = vcut(vexp(vload(w + j) - lse_i), n - j, 0)
            ds = (e if h.p == 0 else vset(1)) * (vload(dw + j) - delta_i)
            vstore(w + j, e)
            vstore(dw + j, vcut(ds, n - j, 0))
        if h.p > 0:
            for j in range(n):
                factor = dropout_factor(h.key, (<uint64_t>head * h.T + first + i) * h.T + j, h.threshold, h.kept)
                dw[j] = w[j] * (factor * dw[j] - delta[i])
                w[j] = factor * w[j]


cdef void key_gradients(float* dkv, const float* weights, const float* panels, const Heads* h, Py_ssize_t first,
                        Py_ssize_t m) noexcept nogil:
    """dkv (first + m keys, D), rows 3C apart, += weights (m, keys)^T x (m, D), x in panels.

    Query i sees key j only if j <= i, so a strip of keys starts at its own query, and the keys of this block of
    queries are met for the first time.
    """
    cdef Py_ssize_t strip, j, start, n = min(first + m, h.T)
    for strip in range(ceil_div(n, MR)):
        j = strip * MR
        start = max(0, j - first)
        macro_kernel(dkv + j * h.stride, h.stride, weights + start * h.ld + j, 0, 1, h.ld, panels + start * NR,
                     h.queries * NR, dkv + j * h.stride if j < first else NULL, h.stride, NULL, min(MR, n - j), h.D,
                     m - start, False)


cdef void attention_backward_head(float* dqkv, const float* dout, const float* qkv, const float* out,
                                  const float* lse, float* work, const Heads* h, Py_ssize_t head) noexcept nogil:
    cdef Py_ssize_t C = h.H * h.D, b = head // h.H, at = head % h.H * h.D
    cdef const float* q = qkv + b * h.T * h.stride + at
    cdef const float* do = dout + b * h.T * C + at
    cdef const float* o = out + b * h.T * C + at
    cdef float* dq = dqkv + b * h.T * h.stride + at
    cdef float* dk = dq + C
    cdef float* dv = dq + 2 * C
    cdef float* kt_panels = work                              # [T / NR][D][NR]: the right side of q k^T
    cdef float* vt_panels = kt_panels + h.Tp * h.D            # the same of dout v^T
    cdef float* k_panels = vt_panels + h.Tp * h.D             # [D / NR][T][NR]: the right side of dscores k
    cdef float* q_block = k_panels + h.Dp * h.T
    cdef float* do_block = q_block + h.queries * h.D
    cdef float* q_panels = do_block + h.queries * h.D
    cdef float* do_panels = q_panels + h.queries * h.Dp
    cdef float* weights = do_panels + h.queries * h.Dp
    cdef float* dweights = weights + h.queries * h.ld
    cdef float* delta = dweights + h.queries * h.ld
    cdef Py_ssize_t block, first, i, m
    pack_panels(kt_panels, h.D * NR, NULL, q + C, 1, h.stride, h.D, h.T)
    pack_panels(vt_panels, h.D * NR, NULL, q + 2 * C, 1, h.stride, h.D, h.T)
    pack_panels(k_panels, h.T * NR, NULL, q + C, h.stride, 1, h.T, h.D)
    for block in range(ceil_div(h.T, h.queries)):
        first = block * h.queries
        m = min(h.queries, h.T - first)
        copy_rows(q_block, q + first * h.stride, h.stride, h.scale, m, h.queries, h.D)
        copy_rows(do_block, do + first * C, C, 1, m, h.queries, h.D)
        for i in range(m):
            prefetch_read(o + (first + i + AHEAD) * C, h.D)
            delta[i] = dot(do_block + i * h.D, o + (first + i) * C, h.D)
        score_block(weights, q_block, kt_panels, h, first, m)
        score_block(dweights, do_block, vt_panels, h, first, m)
        score_gradients(weights, dweights, delta, lse + head * h.T + first, h, head, first, m)
        pack_panels(q_panels, h.queries * NR, NULL, q_block, h.D, 1, h.queries, h.D)
        pack_panels(do_panels, h.queries * NR, NULL, do_block, h.D, 1, h.queries, h.D)
        key_gradients(dv, weights, do_panels, h, first, m)    # out = weights @ v    ->  dv = weights^T @ dout
        key_gradients(dk, dweights, q_panels, h, first, m)    # scores = q @ k^T     ->  dk = dscores^T @ q
        weighted_rows(dq + first * h.stride, h.stride, dweights, k_panels, h, first, m)  #   dq = dscores @ k
        for i in range(first, first + m):
            scale_row(dq + i * h.stride, h.scale, h.D)


def attention_backward(cnp.ndarray dqkv, cnp.ndarray dout, cnp.ndarray qkv, cnp.ndarray out, cnp.ndarray lse,
                       Py_ssize_t B, Py_ssize_t T, Py_ssize_t H, Py_ssize_t D, double p=0.0, uint64_t key=0):
    # scores = q @ k^T / sqrt(D), weights = softmax(scores), out = weights @ v
    cdef float* g = output(dqkv, B * T, 3 * H * D, "dqkv")
    cdef const float* do = input(dout, B * T, H * D, "dout")
    cdef const float* x = input(qkv, B * T, 3 * H * D, "qkv")
    cdef const float* o = input(out, B * T, H * D, "out")
    cdef const float* l = input(lse, 1, B * H * T, "lse")
    cdef Heads h
    describe_heads(&h, B, T, H, D, p, key)
    separate((dqkv, dout, qkv, out, lse), 1, "dqkv dout qkv out lse")
    cdef Py_ssize_t size = 2 * h.Tp * D + h.Dp * T + h.queries * (2 * D + 2 * h.Dp + 2 * h.ld + 1), head
    cdef float* work = <float*>scratch(n_threads * size * sizeof(float))
    for head in prange(B * H, nogil=True, schedule='dynamic', num_threads=n_threads):
        attention_backward_head(g, do, x, o, l, work + threadid() * size, &h, head)


cdef void attention_decode_head(float* out, float* k_cache, float* v_cache, const float* q, const float* k,
                                const float* v, float* scores, Py_ssize_t D, Py_ssize_t n) noexcept nogil:
    """One query against n cached keys, of which the last is new."""
    cdef Py_ssize_t j
    cdef float inverse
    memcpy(k_cache + (n - 1) * D, k, D * sizeof(float))
    memcpy(v_cache + (n - 1) * D, v, D * sizeof(float))
    memset(scores, 0, n * sizeof(float))
    add_dot_rows(scores, q, k_cache, n, D)
    for j in range(n):
        scores[j] = scores[j] / sqrtf(<float>D)
    exp_row(scores, n, n, &inverse)
    scale_row(scores, inverse, n)
    memset(out, 0, D * sizeof(float))
    add_scaled_rows(out, scores, v_cache, D, n, D)


def attention_decode(cnp.ndarray out, cnp.ndarray k_cache, cnp.ndarray v_cache, cnp.ndarray qkv, Py_ssize_t B,
                     Py_ssize_t H, Py_ssize_t D, Py_ssize_t position, Py_ssize_t block_size):
    cdef float* o = output(out, B, H * D, "out")
    cdef float* kc = output(k_cache, B * H * block_size, D, "k_cache")
    cdef float* vc = output(v_cache, B * H * block_size, D, "v_cache")
    cdef const float* x = input(qkv, B, 3 * H * D, "qkv")
    cdef Py_ssize_t C = H * D, size = ceil_div(block_size, VL) * VL, head, b, at
    cdef float* work = <float*>scratch(n_threads * size * sizeof(float))
    if position < 0 or position >= block_size:
        raise ValueError(f"position must lie in 0 .. {block_size - 1}, got {position}")
    separate((out, k_cache, v_cache, qkv), 3, "out k_cache v_cache qkv")
    for head in prange(B * H, nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=B * C * position > SERIAL):
        b = head // H
        at = b * 3 * C + head % H * D
        attention_decode_head(o + head * D, kc + head * block_size * D, vc + head * block_size * D, x + at,
                              x + at + C, x + at + 2 * C, work + threadid() * size, D, position + 1)


# ---- softmax cross-entropy ---------------------------------------------------------------------------------

cdef float log_sum_exp(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j, jb, blocks = ceil_div(n, VL)
    cdef vf peak = vset(-INFINITY), total = vset(0)
    cdef float top
    for jb in range(blocks):
        j = jb * VL
        peak = vmax(peak, vload(x + j) if j + VL <= n else vload_part(x + j, n - j, -INFINITY))
    top = vpeak(peak)
    for jb in range(blocks):
        j = jb * VL
        total = total + vexp((vload(x + j) if j + VL <= n else vload_part(x + j, n - j, -INFINITY)) - vset(top))
    return top + logf(vsum(total))


def cross_entropy_forward(cnp.ndarray losses, cnp.ndarray lse, cnp.ndarray logits, cnp.ndarray targets,
                          Py_ssize_t rows, Py_ssize_t V):
    cdef float* loss = output(losses, 1, rows, "losses")
    cdef float* l = output(lse, 1, rows, "lse")
    cdef const float* x = input(logits, rows, V, "logits")
    cdef const int32_t* target = index(targets, 1, rows, V, "targets")
    cdef Py_ssize_t i
    separate((losses, lse, logits, targets), 2, "losses lse logits targets")
    for i in prange(rows, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=rows * V > SERIAL):
        l[i] = log_sum_exp(x + i * V, V)
        loss[i] = l[i] - x[i * V + target[i]]


cdef void softmax_gradient_row(float* dlogits, const float* logits, float lse, float scale, Py_ssize_t target,
                               Py_ssize_t V) noexcept nogil:
    cdef Py_ssize_t j, jb
    for jb in range(ceil_div(V, VL)):
        j = jb * VL
        put(dlogits + j, vexp(part(logits + j, V - j) - vset(lse)) * vset(scale), V - j)
    dlogits[target] -= scale


def cross_entropy_backward(cnp.ndarray dlogits, cnp.ndarray logits, cnp.ndarray targets, cnp.ndarray lse,
                           float scale, Py_ssize_t rows, Py_ssize_t V):
    # loss = lse - logits[target]   ->   dlogits = softmax(logits) - onehot(target)
    cdef float* g = output(dlogits, rows, V, "dlogits")
    cdef const float* x = input(logits, rows, V, "logits")
    cdef const int32_t* target = index(targets, 1, rows, V, "targets")
    cdef const float* l = input(lse, 1, rows, "lse")
    cdef Py_ssize_t i
    separate((dlogits, logits, targets, lse), 1, "dlogits logits targets lse", 1 << 1)
    for i in prange(rows, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=rows * V > SERIAL):
        softmax_gradient_row(g + i * V, x + i * V, l[i], scale, target[i], V)


# ---- the optimizer -----------------------------------------------------------------------------------------

cdef enum:
    SUM_TILE = 8192  # elements whose squares are added in float32 lanes before they join a float64 sum


def sum_of_squares(cnp.ndarray x, Py_ssize_t n):
    cdef const float* px = input(x, 1, n, "x")
    cdef Py_ssize_t tiles = ceil_div(n, SUM_TILE), tile, i, end
    cdef double* partial = <double*>scratch(tiles * sizeof(double))
    cdef double total = 0
    for tile in prange(tiles, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=n > SERIAL):
        partial[tile] = tile_of_squares(px + tile * SUM_TILE, min(SUM_TILE, n - tile * SUM_TILE))
    for tile in range(tiles):
        total += partial[tile]
    return total


cdef double tile_of_squares(const float* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, ib
    cdef vf acc0 = vset(0), acc1 = vset(0), v
    for ib in range(ceil_div(n, 2 * VL)):
        i = ib * 2 * VL
        v = part(x + i, n - i)
        acc0 = vfma(v, v, acc0)
        if n - i > VL:
            v = part(x + i + VL, n - i - VL)
            acc1 = vfma(v, v, acc1)
    return vsum(acc0 + acc1)


def adamw_update(cnp.ndarray param, cnp.ndarray m, cnp.ndarray v, cnp.ndarray grad, double learning_rate,
                 double beta1, double beta2, double eps, double weight_decay, double grad_scale, Py_ssize_t t,
                 bint zero_grad, Py_ssize_t n):
    # One pass over memory: clipping, both moments, the update and the zeroing.
    cdef float* p = output(param, 1, n, "param")
    cdef float* pm = output(m, 1, n, "m")
    cdef float* pv = output(v, 1, n, "v")
    cdef float* g = output(grad, 1, n, "grad")
    cdef vf b1 = vset(<float>beta1), b2 = vset(<float>beta2)
    cdef vf c1 = vset(<float>(1 - beta1)), c2 = vset(<float>(1 - beta2))
    cdef vf correct1 = vset(<float>(1 / (1 - beta1 ** t))), correct2 = vset(<float>(1 / (1 - beta2 ** t)))
    cdef vf keep = vset(<float>(1 - learning_rate * weight_decay)), rate = vset(<float>learning_rate)
    cdef vf scale = vset(<float>grad_scale), small = vset(<float>eps), gi, mi, vi_
    cdef Py_ssize_t task, i
    if t < 1:
        raise ValueError(f"t counts updates from 1, got {t}")
    separate((param, m, v, grad), 4, "param m v grad")
    for task in prange(ceil_div(n, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=n > SERIAL):
        i = task * VL
        gi = part(g + i, n - i) * scale
        mi = vfma(b1, part(pm + i, n - i), c1 * gi)
        vi_ = vfma(b2, part(pv + i, n - i), c2 * gi * gi)
        put(pm + i, mi, n - i)
        put(pv + i, vi_, n - i)
        put(p + i, keep * part(p + i, n - i) - rate * (mi * correct1) / (vsqrt(vi_ * correct2) + small), n - i)
        if zero_grad:
            put(g + i, vset(0), n - i)


# ---- measuring and rounding --------------------------------------------------------------------------------

def round_bf16(cnp.ndarray out, cnp.ndarray x, Py_ssize_t n):
    cdef float* o = output(out, 1, n, "out")
    cdef const float* px = input(x, 1, n, "x")
    cdef Py_ssize_t task, i
    separate((out, x), 1, "out x")
    for task in prange(ceil_div(n, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=n > SERIAL):
        i = task * VL
        put(o + i, vfloat(bf16_bits(part(px + i, n - i))), n - i)


def peak_flops(Py_ssize_t iterations, bint bf16=False):
    """Run the register tile on data in L1 in every thread; returns the number of operations made.

    Timed from outside, it is the rate that no matrix product on this machine can pass.
    """
    cdef Py_ssize_t depth = 64, size = (MR + NR) * depth + MR * NR, thread, i
    cdef float* work = <float*>scratch(n_threads * size * sizeof(float))
    cdef float* a
    memset(work, 0, n_threads * size * sizeof(float))
    for thread in prange(n_threads, nogil=True, schedule='static', num_threads=n_threads, chunksize=1):
        a = work + thread * size
        for i in range(iterations):
            if bf16:
                micro_kernel_bf16(a + (MR + NR) * depth, NR, <int32_t*>a, 1, MR, <int32_t*>(a + MR * depth),
                                  a + (MR + NR) * depth, NR, NULL, depth)
            else:
                micro_kernel(a + (MR + NR) * depth, NR, a, 1, MR, a + MR * depth, a + (MR + NR) * depth, NR, NULL,
                             depth)
    return 2.0 * (2 if bf16 else 1) * MR * NR * depth * iterations * n_threads
