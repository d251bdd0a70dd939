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
from libc.math cimport log, logf, sqrt, sqrtf
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
    vf vfma(vf a, vf b, vf c)
    vf vmax(vf a, vf b)
    float vsum(vf x)
    float vpeak(vf x)
    vf vsqrt(vf x)
    vf vexp(vf x)
    vi bf16_bits(vf x)
    vi bf16_pairs(vf even, vf odd)
    vi bf16_row(vf x0, vf x1)
    vf vdot_bf16(vf acc, vi a, vi b)
    void transpose_tile(int32_t* out, Py_ssize_t ldo, const int32_t* x, Py_ssize_t ldi)
    void* workspace(size_t size)

cnp.import_array()

cdef int n_threads = omp_get_max_threads()


def set_num_threads(int n):
    """Set the number of threads of every kernel; 0 means one for each available core."""
    global n_threads
    if n < 0:
        raise ValueError(f"the number of threads must be 0 or more, got {n}")
    n_threads = n if n > 0 else omp_get_max_threads()


def get_num_threads():
    return n_threads


# ---- the door ----------------------------------------------------------------------------------------------

cdef void* _array(cnp.ndarray x, int dtype, str dtype_name, Py_ssize_t rows, Py_ssize_t cols, str name,
                  bint output) except NULL:
    if (cnp.PyArray_TYPE(x) != dtype or not cnp.PyArray_ISCARRAY_RO(x) or cnp.PyArray_NDIM(x) == 0
            or cnp.PyArray_SIZE(x) != rows * cols or cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1) != cols
            or cnp.PyArray_SIZE(x) == 0 or (output and not cnp.PyArray_ISWRITEABLE(x))):
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


cdef int32_t* index(cnp.ndarray x, Py_ssize_t rows, Py_ssize_t cols, Py_ssize_t bound, str name) except NULL:
    """Integers, each checked to lie in 0 .. bound - 1: an index out of range would write anywhere."""
    cdef int32_t* data = <int32_t*>_array(x, cnp.NPY_INT32, "int32", rows, cols, name, False)
    cdef Py_ssize_t i
    for i in range(rows * cols):
        if data[i] < 0 or data[i] >= bound:
            raise ValueError(f"{name} must lie in 0 .. {bound - 1}, got {data[i]} at position {i}")
    return data


cdef int disjoint(cnp.ndarray x, str x_name, cnp.ndarray y, str y_name) except -1:
    cdef char* a = <char*>cnp.PyArray_DATA(x)
    cdef char* b = <char*>cnp.PyArray_DATA(y)
    if a < b + cnp.PyArray_NBYTES(y) and b < a + cnp.PyArray_NBYTES(x):
        raise ValueError(f"{x_name} must not overlap {y_name}")
    return 0


cdef void* scratch(size_t size) except NULL:
    cdef void* data = workspace(size)
    if data == NULL:
        raise MemoryError(f"no memory for a work space of {size} bytes")
    return data


# ---- GEMM --------------------------------------------------------------------------------------------------
#
# c (M, N) = a (M, K) b (K, N), each operand with a row stride and a column stride, one of them 1, so that a
# transpose is a swap of strides. The loops are those of Goto and van de Geijn (2008) in the names of BLIS:
#
#   jc over N by NC, pc over K by KC    a block of b is packed into panels of NR columns, by all threads
#     ic over M by mc                   a task; packs its block of a unless rows of a serve as they lie
#       jr over panels, ir over strips  the register tile, MR x NR, in micro_kernel
#
# Each element of c is summed over k in ascending order whatever the cut in M and N; only KC decides the bits,
# and it is fixed. In bf16 two neighbours in k share a 32-bit lane ("pairs"), so panels and strips keep their
# shape and hold twice the depth.

cdef enum:
    KC = 512   # x NR floats: a b panel streams from L2 while c tiles are touched half as often as with 256
    MC = 96    # x KC floats of a: 192 KB of L2
    NC = 3072  # x KC floats of packed b: 6 MB of L3


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline void micro_kernel(float* c, Py_ssize_t ldc, const float* a, Py_ssize_t rs_a, Py_ssize_t cs_a,
                              const float* b, const float* start, Py_ssize_t ld_start, const float* bias,
                              Py_ssize_t kc) noexcept nogil:
    """c (MR, NR) = start + bias + a (MR, kc) b (kc, NR); start and bias may be NULL, start may be c."""
    cdef vf acc[MR][NV]
    cdef vf b0, b1, ai
    cdef Py_ssize_t i, k
    start_tile(acc, start, ld_start, bias)
    for k in range(kc):
        b0 = vload(b)
        b1 = vload(b + VL)
        for i in range(MR):
            ai = vset(a[i * rs_a])
            acc[i][0] = vfma(ai, b0, acc[i][0])
            acc[i][1] = vfma(ai, b1, acc[i][1])
        a += cs_a
        b += NR
    for i in range(MR):
        vstore(c + i * ldc, acc[i][0])
        vstore(c + i * ldc + VL, acc[i][1])


cdef inline void micro_kernel_bf16(float* c, Py_ssize_t ldc, const int32_t* a, Py_ssize_t rs_a, Py_ssize_t cs_a,
                                   const int32_t* b, const float* start, Py_ssize_t ld_start, const float* bias,
                                   Py_ssize_t kc) noexcept nogil:
    """The same on pairs of bfloat16; kc counts pairs."""
    cdef vf acc[MR][NV]
    cdef vi b0, b1, ai
    cdef Py_ssize_t i, k
    start_tile(acc, start, ld_start, bias)
    for k in range(kc):
        b0 = viload(b)
        b1 = viload(b + VL)
        for i in range(MR):
            ai = viset(a[i * rs_a])
            acc[i][0] = vdot_bf16(acc[i][0], ai, b0)
            acc[i][1] = vdot_bf16(acc[i][1], ai, b1)
        a += cs_a
        b += NR
    for i in range(MR):
        vstore(c + i * ldc, acc[i][0])
        vstore(c + i * ldc + VL, acc[i][1])


cdef inline void start_tile(vf (*acc)[NV], const float* start, Py_ssize_t ld_start,
                            const float* bias) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(MR):
        if start != NULL:
            acc[i][0] = vload(start + i * ld_start)
            acc[i][1] = vload(start + i * ld_start + VL)
        else:
            acc[i][0] = vset(0)
            acc[i][1] = vset(0)
    if bias != NULL:
        for i in range(MR):
            acc[i][0] = acc[i][0] + vload(bias)
            acc[i][1] = acc[i][1] + vload(bias + VL)


cdef void edge_tile(float* c, Py_ssize_t ldc, const float* tile, const float* start, Py_ssize_t ld_start,
                    const float* bias, Py_ssize_t m, Py_ssize_t n) noexcept nogil:
    """c (m, n) = start + bias + the corner of a whole tile, where the matrix ends inside the tile."""
    cdef Py_ssize_t i, j
    cdef float x
    for i in range(m):
        for j in range(n):
            x = start[i * ld_start + j] if start != NULL else 0
            c[i * ldc + j] = x + (bias[j] if bias != NULL else 0) + tile[i * NR + j]


cdef void macro_kernel(float* c, Py_ssize_t ldc, const float* a, Py_ssize_t rs_a, Py_ssize_t cs_a,
                       const float* panels, Py_ssize_t panel_stride, const float* start, Py_ssize_t ld_start,
                       const float* bias, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k, bint bf16) noexcept nogil:
    """c (m, n) = start + bias + a (m, k) b (k, n) on packed panels of b; a has whole strips of MR rows.

    In bf16, a and panels hold pairs and k counts pairs.
    """
    cdef float tile[MR * NR]
    cdef const float* b
    cdef const float* first
    cdef const float* bias_j
    cdef float* target
    cdef Py_ssize_t ib, jb, i, j, ld
    cdef bint whole
    for jb in range(ceil_div(n, NR)):
        j = jb * NR
        b = panels + j // NR * panel_stride
        for ib in range(ceil_div(m, MR)):
            i = ib * MR
            whole = i + MR <= m and j + NR <= n
            target = c + i * ldc + j if whole else tile
            ld = ldc if whole else NR
            first = start + i * ld_start + j if start != NULL and whole else NULL
            bias_j = bias + j if bias != NULL and whole else NULL
            if bf16:
                micro_kernel_bf16(target, ld, <const int32_t*>(a + i * rs_a), rs_a, cs_a, <const int32_t*>b,
                                  first, ld_start, bias_j, k)
            else:
                micro_kernel(target, ld, a + i * rs_a, rs_a, cs_a, b, first, ld_start, bias_j, k)
            if not whole:
                edge_tile(c + i * ldc + j, ldc, tile, start + i * ld_start + j if start != NULL else NULL,
                          ld_start, bias + j if bias != NULL else NULL, min(m - i, MR), min(n - j, NR))


cdef void pack_panel(float* panel, const float* b, Py_ssize_t rs_b, Py_ssize_t cs_b, Py_ssize_t kc,
                     Py_ssize_t n) noexcept nogil:
    """panel [kc][NR] = b (kc, n), n <= NR, zero beyond n."""
    cdef Py_ssize_t jb, kb, j, k, whole_k = kc // VL * VL
    if n < NR:
        memset(panel, 0, kc * NR * sizeof(float))
        for k in range(kc):
            for j in range(n):
                panel[k * NR + j] = b[k * rs_b + j * cs_b]
    elif cs_b == 1:
        for k in range(kc):
            vstore(panel + k * NR, vload(b + k * rs_b))
            vstore(panel + k * NR + VL, vload(b + k * rs_b + VL))
    else:
        for jb in range(ceil_div(NR, VL)):
            j = jb * VL
            for kb in range(ceil_div(whole_k, VL)):
                k = kb * VL
                transpose_tile(<int32_t*>(panel + k * NR + j), NR, <const int32_t*>(b + k + j * cs_b), cs_b)
        for k in range(whole_k, kc):
            for j in range(NR):
                panel[k * NR + j] = b[k + j * cs_b]


cdef inline vf part(const float* x, Py_ssize_t n) noexcept nogil:
    """The first n elements of a vector, zero beyond; n may be negative or more than VL."""
    return vload(x) if n >= VL else vload_part(x, n, 0)


cdef void pack_panel_bf16(int32_t* panel, const float* b, Py_ssize_t rs_b, Py_ssize_t cs_b, Py_ssize_t kc,
                          Py_ssize_t n) noexcept nogil:
    """panel [ceil(kc / 2)][NR] = pairs of b (kc, n), zero beyond kc and n."""
    cdef int32_t rows[VL * VL]
    cdef int32_t columns[VL * VL]
    cdef const float* x
    cdef vf odd
    cdef Py_ssize_t jb, kb, i, j, k, pairs = ceil_div(kc, 2)
    for jb in range(ceil_div(NR, VL)):
        j = jb * VL
        if cs_b == 1:
            for k in range(pairs):
                x = b + 2 * k * rs_b + j
                odd = part(x + rs_b, n - j) if 2 * k + 1 < kc else vset(0)
                vistore(panel + k * NR + j, bf16_pairs(part(x, n - j), odd))
        else:
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
                    vistore(panel + (k + i) * NR + j, viload(columns + i * VL))


cdef void pack_strips(float* strips, const float* a, Py_ssize_t rs_a, Py_ssize_t cs_a, Py_ssize_t m,
                      Py_ssize_t kc) noexcept nogil:
    """strips [m / MR][kc][MR] = a (m, kc), the last strip filled with zeros: row stride 1, column stride MR."""
    cdef Py_ssize_t ib, i, j, k
    for ib in range(ceil_div(m, MR)):
        i = ib * MR
        if i + MR <= m and rs_a == 1:
            for k in range(kc):
                memcpy(strips + k * MR, a + i + k * cs_a, MR * sizeof(float))
        else:
            for k in range(kc):
                for j in range(MR):
                    strips[k * MR + j] = a[(i + j) * rs_a + k * cs_a] if i + j < m else 0
        strips += MR * kc


cdef void pack_rows_bf16(int32_t* block, const float* a, Py_ssize_t rs_a, Py_ssize_t cs_a, Py_ssize_t m,
                         Py_ssize_t mc, Py_ssize_t kc) noexcept nogil:
    """Pairs of a (m, kc), zero up to mc rows: [mc][ceil(kc / 2)] if rows of a are contiguous, else
    [ceil(kc / 2)][mc]."""
    cdef Py_ssize_t ib, kb, i, k, pairs = ceil_div(kc, 2)
    cdef const float* x
    cdef int32_t last[VL]
    cdef vf odd
    if cs_a == 1:
        for i in range(m):
            for kb in range(ceil_div(pairs, VL)):
                k = kb * VL
                x = a + i * rs_a + 2 * k
                vistore(last, bf16_row(part(x, kc - 2 * k), part(x + VL, kc - 2 * k - VL)))
                memcpy(block + i * pairs + k, last, min(VL, pairs - k) * sizeof(int32_t))
        memset(block + m * pairs, 0, (mc - m) * pairs * sizeof(int32_t))
    else:
        for k in range(pairs):
            for ib in range(ceil_div(mc, VL)):
                i = ib * VL
                x = a + i + 2 * k * cs_a
                odd = part(x + cs_a, m - i) if 2 * k + 1 < kc else vset(0)
                vistore(last, bf16_pairs(part(x, m - i), odd))
                memcpy(block + k * mc + i, last, min(VL, mc - i) * sizeof(int32_t))


cdef struct Gemm:
    float* c                            # (M, N), rows ldc apart
    Py_ssize_t ldc
    const float* a                      # (M, K)
    Py_ssize_t rs_a, cs_a
    const float* b                      # (K, N)
    Py_ssize_t rs_b, cs_b
    const float* start                  # (M, N), rows ldc apart, or NULL: what the product is added to
    const float* bias                   # (N) or NULL
    Py_ssize_t M, N, K
    bint bf16


cdef void gemm_task(const Gemm* g, const float* panels, float* block, Py_ssize_t jc, Py_ssize_t nc, Py_ssize_t pc,
                    Py_ssize_t kc, Py_ssize_t ic, Py_ssize_t m) noexcept nogil:
    """Rows ic .. ic + m and columns jc .. jc + nc of c, for one block of K."""
    cdef const float* a = g.a + ic * g.rs_a + pc * g.cs_a
    cdef float* c = g.c + ic * g.ldc + jc
    cdef const float* start = c
    cdef const float* bias = NULL
    cdef Py_ssize_t pairs = ceil_div(kc, 2), mc = ceil_div(m, MR) * MR, whole = 0
    if pc == 0:
        start = g.start + ic * g.ldc + jc if g.start != NULL else NULL
        bias = g.bias + jc if g.bias != NULL else NULL
    if g.bf16:
        pack_rows_bf16(<int32_t*>block, a, g.rs_a, g.cs_a, m, mc, kc)
        if g.cs_a == 1:
            macro_kernel(c, g.ldc, block, pairs, 1, panels, pairs * NR, start, g.ldc, bias, m, nc, pairs, True)
        else:
            macro_kernel(c, g.ldc, block, 1, mc, panels, pairs * NR, start, g.ldc, bias, m, nc, pairs, True)
        return
    if g.cs_a == 1:  # whole strips of contiguous rows serve as they lie
        whole = m // MR * MR
        macro_kernel(c, g.ldc, a, g.rs_a, 1, panels, kc * NR, start, g.ldc, bias, whole, nc, kc, False)
    if whole < m:
        pack_strips(block, a + whole * g.rs_a, g.rs_a, g.cs_a, m - whole, kc)
        strip_product(c + whole * g.ldc, g.ldc, block, panels, start + whole * g.ldc if start != NULL else NULL,
                      g.ldc, bias, m - whole, nc, kc)


cdef void strip_product(float* c, Py_ssize_t ldc, const float* strips, const float* panels, const float* start,
                        Py_ssize_t ld_start, const float* bias, Py_ssize_t m, Py_ssize_t n,
                        Py_ssize_t k) noexcept nogil:
    """macro_kernel on packed strips. Panels outside, strips inside: a panel of b stays in L1 or L2."""
    cdef Py_ssize_t ib, jb, i, j
    for jb in range(ceil_div(n, NR)):
        j = jb * NR
        for ib in range(ceil_div(m, MR)):
            i = ib * MR
            macro_kernel(c + i * ldc + j, ldc, strips + i * k, 1, MR, panels + j * k, 0,
                         start + i * ld_start + j if start != NULL else NULL, ld_start,
                         bias + j if bias != NULL else NULL, min(MR, m - i), min(NR, n - j), k, False)


cdef int run_gemm(const Gemm* g) except -1:
    cdef Py_ssize_t jb, pb, depth = 2 * KC if g.bf16 else KC
    cdef Py_ssize_t max_kc = min(g.K, depth), max_nc = min(ceil_div(g.N, NR) * NR, NC)
    cdef Py_ssize_t strips = ceil_div(g.M, MR)
    cdef Py_ssize_t mc = MR * max(1, min(MC // MR, strips // (4 * n_threads)))
    cdef Py_ssize_t row_blocks = ceil_div(g.M, mc)
    cdef Py_ssize_t column_blocks = 1 if row_blocks >= 2 * n_threads else ceil_div(4 * n_threads, row_blocks)
    cdef Py_ssize_t block_size = MC * depth
    cdef float* panels = <float*>scratch((max_kc * max_nc + n_threads * block_size) * sizeof(float))
    cdef float* blocks = panels + max_kc * max_nc
    cdef Py_ssize_t jc, nc, pc, kc, p, n_panels, panel_size, group, task, i, j
    with nogil, parallel(num_threads=n_threads):
        for jb in range(ceil_div(g.N, NC)):
            jc = jb * NC
            nc = min(g.N - jc, NC)
            n_panels = ceil_div(nc, NR)
            group = ceil_div(n_panels, column_blocks)
            for pb in range(ceil_div(g.K, depth)):
                pc = pb * depth
                kc = min(g.K - pc, depth)
                panel_size = (ceil_div(kc, 2) if g.bf16 else kc) * NR
                for p in prange(n_panels, schedule='static'):
                    if g.bf16:
                        pack_panel_bf16(<int32_t*>(panels + p * panel_size),
                                        g.b + pc * g.rs_b + (jc + p * NR) * g.cs_b, g.rs_b, g.cs_b, kc,
                                        min(NR, nc - p * NR))
                    else:
                        pack_panel(panels + p * panel_size, g.b + pc * g.rs_b + (jc + p * NR) * g.cs_b, g.rs_b,
                                   g.cs_b, kc, min(NR, nc - p * NR))
                for task in prange(row_blocks * column_blocks, schedule='dynamic'):
                    i = task // column_blocks * mc
                    j = task % column_blocks * group * NR
                    if j < nc:
                        gemm_task(g, panels + j // NR * panel_size, blocks + threadid() * block_size, jc + j,
                                  min(group * NR, nc - j), pc, kc, i, min(mc, g.M - i))
    return 0


def gemm(cnp.ndarray c, cnp.ndarray a, cnp.ndarray b, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
         bint trans_a=False, bint trans_b=False, bint accumulate=False, bint bf16=False):
    cdef Gemm g
    g.c, g.ldc = output(c, M, N, "c"), N
    g.a = input(a, K, M, "a") if trans_a else input(a, M, K, "a")
    g.b = input(b, N, K, "b") if trans_b else input(b, K, N, "b")
    g.rs_a, g.cs_a = 1 if trans_a else K, M if trans_a else 1
    g.rs_b, g.cs_b = 1 if trans_b else N, K if trans_b else 1
    g.start, g.bias = g.c if accumulate else NULL, NULL
    g.M, g.N, g.K, g.bf16 = M, N, K, bf16
    disjoint(c, "c", a, "a")
    disjoint(c, "c", b, "b")
    run_gemm(&g)
