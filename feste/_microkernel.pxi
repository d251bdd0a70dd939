# The innermost two loops of a matrix product: the register tile (micro-kernel) and all tiles of a block (macro-kernel).
#
#     c (m, n) = start + (a (m, k) b (k, n) + bias)
#
# a is read in strips of MR rows, b in panels of NR columns (micro-panels, in BLIS). In bf16 a 32-bit lane of a panel holds
# two neighbours in k, so panels keep their shape, k counts pairs, and `float*` points to pairs; a pair of a strip has
# PAIR_WORDS words.
#
# Each element of c is summed over k in ascending order, from zero, whatever the cut in m and n; bias and start are
# added after that. So the bits depend on where k is cut (KC) and on nothing else.

cdef struct Output:
    float* c               # (m, n), rows ld apart
    const float* start     # (m, n), rows ld apart, or NULL: what the product is added to; may be c itself
    const float* bias      # (n) or NULL: added to every row
    Py_ssize_t ld


cdef struct Strips:        # the left operand; rows of a matrix that lie as they are can serve as strips
    const float* data
    Py_ssize_t ps          # from a strip to the next
    Py_ssize_t rs          # from a row to the next, within a strip
    Py_ssize_t cs          # from one k to the next


cdef struct Panels:        # the right operand: [ceil(n / NR)][k][NR], zero beyond n
    float* data
    Py_ssize_t ps          # from a panel to the next


cdef inline Output written(float* c, Py_ssize_t ld) noexcept nogil:
    """An output, rows ld apart, that is the product alone."""
    return Output(c=c, start=NULL, bias=NULL, ld=ld)


cdef inline Output output_at(Output out, Py_ssize_t i, Py_ssize_t j) noexcept nogil:
    """The part of an output that begins at row i and column j."""
    out.c += i * out.ld + j
    if out.start != NULL:
        out.start += i * out.ld + j
    if out.bias != NULL:
        out.bias += j
    return out


cdef inline void micro_kernel(Output out, Strips a, const float* b, Py_ssize_t k) noexcept nogil:
    """One register tile: c (MR, NR) = start + (a (MR, k) b (k, NR) + bias), a being one strip and b one panel."""
    cdef vf acc[MR][NV]
    cdef vf bk[NV]
    cdef vf ai
    cdef Py_ssize_t i, j, p
    open_tile(acc, out)
    for p in range(k):
        for j in range(NV):
            bk[j] = vload(b + j * VL)
        for i in range(MR):
            ai = vset(a.data[i * a.rs])
            for j in range(NV):
                acc[i][j] = vfma(ai, bk[j], acc[i][j])
        a.data += a.cs
        b += NR
    close_tile(out, acc)


cdef inline void micro_kernel_bf16(Output out, Strips a, const float* b, Py_ssize_t k) noexcept nogil:
    """One register tile on k pairs of bfloat16, of which a has PAIR_WORDS words each; the sums are float32."""
    cdef vf acc[MR][NV]
    cdef vi bk[NV]
    cdef vi ai
    cdef Py_ssize_t i, j, p
    cdef int w, word
    open_tile(acc, out)
    for p in range(k):
        for w in range(PAIR_WORDS):
            word = PAIR_WORDS - 1 - w
            for j in range(NV):
                bk[j] = bf16_half(viload(<const int32_t*>b + j * VL), word)
            for i in range(MR):
                ai = viset((<const int32_t*>a.data)[i * a.rs + word * a.cs])
                for j in range(NV):
                    acc[i][j] = bf16_fma(acc[i][j], ai, bk[j])
        a.data += PAIR_WORDS * a.cs
        b += NR
    close_tile(out, acc)


cdef inline void open_tile(vf (*acc)[NV], Output out) noexcept nogil:
    """Zero the accumulators, and send for the rows of c and start: fetched when they are needed, they would stop the
    tile; fetched now, they arrive while the products are made."""
    cdef Py_ssize_t i, j
    for i in range(MR):
        prefetch_write(out.c + i * out.ld, NR)
        if out.start != NULL and out.start != out.c:
            prefetch_read(out.start + i * out.ld, NR)
        for j in range(NV):
            acc[i][j] = vset(0)


cdef inline void close_tile(Output out, vf (*acc)[NV]) noexcept nogil:
    """c (MR, NR) = start + (acc + bias)."""
    cdef Py_ssize_t i, j
    for i in range(MR):
        for j in range(NV):
            if out.bias != NULL:
                acc[i][j] = acc[i][j] + vload(out.bias + j * VL)
            if out.start != NULL:
                acc[i][j] = vload(out.start + i * out.ld + j * VL) + acc[i][j]
            vstore(out.c + i * out.ld + j * VL, acc[i][j])


cdef void close_edge(Output out, const float* tile, Py_ssize_t m, Py_ssize_t n) noexcept nogil:
    """c (m, n) = start + (tile + bias) for the m x n elements of a tile (MR, NR) that lie inside the matrix."""
    cdef Py_ssize_t i, j
    cdef float x
    for i in range(m):
        for j in range(n):
            x = tile[i * NR + j]
            if out.bias != NULL:
                x = x + out.bias[j]
            out.c[i * out.ld + j] = out.start[i * out.ld + j] + x if out.start != NULL else x


cdef void macro_kernel(Output out, Strips a, Panels b, Py_ssize_t m, Py_ssize_t n, Py_ssize_t k,
                       bint bf16) noexcept nogil:
    """c (m, n) = start + (a (m, k) b (k, n) + bias), tile by tile; a has whole strips and b whole panels, whatever m and n.

    Where the matrix ends inside a register tile, the whole tile is made on the stack and its part inside copied, so each
    element is summed in the same order wherever tiles begin.
    """
    cdef float stack[MR * NR]
    cdef Output inside, tile
    cdef Strips strip = a
    cdef const float* panel
    cdef Py_ssize_t ib, jb, i, j
    cdef bint whole
    for jb in range(ceil_div(n, NR)):      # a panel stays in L1
        j = jb * NR
        panel = b.data + jb * b.ps
        for ib in range(ceil_div(m, MR)):  # while all strips pass by
            i = ib * MR
            whole = i + MR <= m and j + NR <= n
            inside = tile = output_at(out, i, j)
            if not whole:
                tile = Output(c=&stack[0], start=NULL, bias=NULL, ld=NR)
            strip.data = a.data + ib * a.ps
            if bf16:
                micro_kernel_bf16(tile, strip, panel, k)
            else:
                micro_kernel(tile, strip, panel, k)
            if not whole:
                close_edge(inside, stack, min(m - i, MR), min(n - j, NR))


cdef struct PeakFlops:
    Py_ssize_t iterations
    bint bf16


cdef void peak_flops_body(const void* call, const Member* me) noexcept nogil:
    cdef const PeakFlops* k = <const PeakFlops*>call
    cdef float* a = <float*>me.work + me.thread * PEAK_SIZE
    cdef float* b = a + PAIR_WORDS * MR * PEAK_DEPTH
    cdef float* c = b + NR * PEAK_DEPTH
    cdef Output out = Output(c=c, start=c, bias=NULL, ld=NR)
    cdef Strips strip = Strips(data=a, ps=0, rs=1, cs=MR)
    cdef Py_ssize_t i
    memset(a, 0, PEAK_SIZE * sizeof(float))
    for i in range(k.iterations):
        if k.bf16:
            micro_kernel_bf16(out, strip, b, PEAK_DEPTH)
        else:
            micro_kernel(out, strip, b, PEAK_DEPTH)


cdef enum:
    PEAK_DEPTH = 64  # that of a head in attention: a (MR, 64), b (64, NR) and c fit in L1
    PEAK_SIZE = (PAIR_WORDS * MR + NR) * PEAK_DEPTH + MR * NR


def peak_flops(Py_ssize_t iterations, bint bf16=False):
    """Run the register tile on data in L1 in every thread; returns the number of operations made.

    Timed from outside, it is the rate that no matrix product on this machine can pass by more than the few percent that
    deeper panels bring.
    """
    cdef PeakFlops k = PeakFlops(iterations=iterations, bf16=bf16)
    run(peak_flops_body, &k, sizeof(k), n_threads * PEAK_SIZE * sizeof(float), False)
    return 2.0 * (2 if bf16 else 1) * MR * NR * PEAK_DEPTH * iterations * n_threads
