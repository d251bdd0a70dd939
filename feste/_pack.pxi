# Packing: blocks of a matrix are copied into the panels and strips that the micro-kernel reads as one stream.
#
# Panels and strips are zero beyond the matrix, so the micro-kernel knows no edges. Those of bfloat16 are rounded here, to
# nearest with ties to even, and hold two neighbours in k in each 32-bit lane, the first in the lower half.

cdef struct Matrix:        # an operand as it lies in memory; one of the strides is 1
    const float* data
    Py_ssize_t rs          # from a row to the next
    Py_ssize_t cs          # from a column to the next


cdef inline Matrix rows_of_length(const float* data, Py_ssize_t columns) noexcept nogil:
    """A matrix whose rows are contiguous and follow each other."""
    return Matrix(data=data, rs=columns, cs=1)


cdef inline Matrix transpose(Matrix x) noexcept nogil:
    """The transpose: the same memory with the strides swapped."""
    return Matrix(data=x.data, rs=x.cs, cs=x.rs)


cdef inline Matrix matrix_at(Matrix x, Py_ssize_t i, Py_ssize_t j) noexcept nogil:
    """The part of a matrix that begins at row i and column j."""
    x.data += i * x.rs + j * x.cs
    return x


cdef void pack_panels(Panels out, float* sums, Matrix b, Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    """out [ceil(n / NR)][k][NR] = b (k, n).

    sums (whole panels of columns) or NULL: where rows of b are contiguous, the sums of its columns are added to it, from
    the registers through which the rows go anyway; a loop of its own would miss L1.
    """
    if b.cs == 1:
        pack_panels_by_rows(out, sums, b, k, n)
    else:
        pack_panels_by_columns(out, b, k, n)


cdef void pack_panels_by_rows(Panels out, float* sums, Matrix b, Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    """out [ceil(n / NR)][k][NR] = b (k, n), rows of b contiguous: each row is read in one go and spread over all panels."""
    cdef Py_ssize_t p, panel, i, j
    cdef const float* x
    cdef vf xi
    for p in range(k):
        x = b.data + p * b.rs
        prefetch_read(x + PREFETCH_ROWS * b.rs, n)
        for panel in range(ceil_div(n, NR)):
            for i in range(NV):
                j = panel * NR + i * VL
                xi = part(x + j, n - j)
                vstore(out.data + panel * out.ps + p * NR + i * VL, xi)
                if sums != NULL:
                    vstore(sums + j, vload(sums + j) + xi)


cdef void pack_panels_by_columns(Panels out, Matrix b, Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    """out [ceil(n / NR)][k][NR] = b (k, n), columns of b contiguous: squares of VL x VL are transposed in registers."""
    cdef Py_ssize_t jb, i, j, p, pb, column, columns, whole_k = k // VL * VL
    cdef float* panel
    cdef const float* x
    for jb in range(ceil_div(n, NR)):
        panel = out.data + jb * out.ps
        x = b.data + jb * NR * b.cs
        columns = min(NR, n - jb * NR)
        if columns < NR:  # the last panel, an element at a time
            memset(panel, 0, k * NR * sizeof(float))
            for p in range(k):
                for j in range(columns):
                    panel[p * NR + j] = x[p + j * b.cs]
            continue
        for i in range(NV):
            j = i * VL
            for pb in range(k // VL):
                p = pb * VL
                for column in range(j, j + VL):  # the same square of the next panel
                    prefetch_read(x + p + (column + NR) * b.cs, VL)
                transpose_tile(<int32_t*>(panel + p * NR + j), NR, <const int32_t*>(x + p + j * b.cs), b.cs)
        for p in range(whole_k, k):
            for j in range(NR):
                panel[p * NR + j] = x[p + j * b.cs]


cdef void pack_panels_bf16(Panels out, float* sums, Matrix b, Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    """out [ceil(n / NR)][ceil(k / 2)][NR] = pairs of b (k, n), zero beyond k and n.

    sums (whole panels of columns) or NULL: where rows of b are contiguous, the sums of its columns are added to it,
    before they are rounded to bfloat16.
    """
    if b.cs == 1:
        pack_panels_by_rows_bf16(out, sums, b, k, n)
    else:
        pack_panels_by_columns_bf16(out, b, k, n)


cdef void pack_panels_by_rows_bf16(Panels out, float* sums, Matrix b, Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    """out [ceil(n / NR)][ceil(k / 2)][NR] = pairs of b (k, n), rows of b contiguous: two rows are read side by side."""
    cdef Py_ssize_t jb, j, pair
    cdef const float* x
    cdef vf even, odd
    for pair in range(ceil_div(k, 2)):
        x = b.data + 2 * pair * b.rs
        prefetch_read(x + PREFETCH_ROWS * b.rs, n)
        prefetch_read(x + (PREFETCH_ROWS + 1) * b.rs, n)
        for jb in range(ceil_div(n, NR) * NV):
            j = jb * VL
            even = part(x + j, n - j)
            odd = part(x + b.rs + j, n - j) if 2 * pair + 1 < k else vset(0)
            vistore(<int32_t*>out.data + jb // NV * out.ps + pair * NR + jb % NV * VL, bf16_pairs(even, odd))
            if sums != NULL:
                vstore(sums + j, vload(sums + j) + (even + odd))


cdef void pack_panels_by_columns_bf16(Panels out, Matrix b, Py_ssize_t k, Py_ssize_t n) noexcept nogil:
    """out [ceil(n / NR)][ceil(k / 2)][NR] = pairs of b (k, n), columns of b contiguous: rounding makes VL columns of VL
    pairs, which are then transposed in registers."""
    cdef int32_t columns[VL * VL]  # [column][pair]
    cdef int32_t rows[VL * VL]     # [pair][column]
    cdef const float* x
    cdef int32_t* panel
    cdef Py_ssize_t jb, i, j, pb, pair, pairs = ceil_div(k, 2)
    for jb in range(ceil_div(n, NR) * NV):
        j = jb * VL
        panel = <int32_t*>out.data + jb // NV * out.ps + jb % NV * VL
        for pb in range(ceil_div(pairs, VL)):
            pair = pb * VL
            for i in range(VL):
                x = b.data + 2 * pair + (j + i) * b.cs
                if j + i < n:
                    vistore(columns + i * VL, bf16_row(part(x, k - 2 * pair), part(x + VL, k - 2 * pair - VL)))
                else:
                    vistore(columns + i * VL, viset(0))
            transpose_tile(rows, VL, columns, VL)
            for i in range(min(VL, pairs - pair)):
                vistore(panel + (pair + i) * NR, viload(rows + i * VL))


cdef void pack_strips(float* out, Py_ssize_t ps, Matrix a, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    """out [ceil(m / MR)][k][MR], strips ps apart, = a (m, k), zero beyond m."""
    cdef Py_ssize_t s, i, j, p, whole = m // MR if a.rs == 1 else 0
    cdef const float* x
    for p in range(k if whole > 0 else 0):  # all whole strips side by side, so that each row of a^T is read in one go
        x = a.data + p * a.cs
        prefetch_read(x + PREFETCH_ROWS * a.cs, whole * MR)
        for s in range(whole):
            memcpy(out + s * ps + p * MR, x + s * MR, MR * sizeof(float))
    for s in range(whole, ceil_div(m, MR)):  # the rest, an element at a time
        i = s * MR
        memset(out + s * ps, 0, k * MR * sizeof(float))
        for p in range(k):
            for j in range(min(MR, m - i)):
                out[s * ps + p * MR + j] = a.data[(i + j) * a.rs + p * a.cs]


cdef void pack_strips_bf16(int32_t* out, Py_ssize_t ps, Matrix a, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    """out [ceil(m / MR)][ceil(k / 2)][PAIR_WORDS][MR], strips ps apart, = pairs of a (m, k), columns of a contiguous.

    Zero beyond m and k. Two rows of a^T, neighbours in k, are read side by side.
    """
    cdef Py_ssize_t s, i, j, jb, pair
    cdef const float* x
    cdef vf even, odd
    cdef int word
    for pair in range(ceil_div(k, 2)):
        x = a.data + 2 * pair * a.cs
        prefetch_read(x + PREFETCH_ROWS * a.cs, m)
        prefetch_read(x + (PREFETCH_ROWS + 1) * a.cs, m)
        for s in range(ceil_div(m, MR)):
            for jb in range(ceil_div(MR, VL)):  # once, but for SSE2 and NEON, where MR is more than a vector
                j = jb * VL
                i = s * MR + j
                even = part(x + i, m - i)
                odd = part(x + a.cs + i, m - i) if 2 * pair + 1 < k else vset(0)
                for word in range(PAIR_WORDS):
                    put_words(out + s * ps + (pair * PAIR_WORDS + word) * MR + j, bf16_word(even, odd, word), MR - j)


cdef void pack_rows_bf16(int32_t* out, Py_ssize_t ps, Matrix a, Py_ssize_t m, Py_ssize_t k) noexcept nogil:
    """out [ceil(m / MR)][MR][ceil(k / 2)][PAIR_WORDS], strips ps apart, = pairs of a (m, k), rows of a contiguous.

    Zero beyond m and k. A row stays a row: it need not be transposed, because the micro-kernel takes any strides.
    """
    cdef Py_ssize_t i, p, word, block, words = PAIR_WORDS * ceil_div(k, 2)
    cdef const float* x
    cdef int32_t* row
    for i in range(ceil_div(m, MR) * MR):
        row = out + i // MR * ps + i % MR * words
        if i >= m:
            memset(row, 0, words * sizeof(int32_t))
            continue
        for block in range(ceil_div(words, VL)):
            word = block * VL
            p = word * 2 // PAIR_WORDS
            x = a.data + i * a.rs + p
            put_words(row + word, bf16_row(part(x, k - p), part(x + VL, k - p - VL)) if PAIR_WORDS == 1
                      else bf16_bits(part(x, k - p)), words - word)


cdef struct RoundBf16:
    float* out
    const float* x
    Py_ssize_t n


cdef void round_bf16_body(const void* call, const Member* me) noexcept nogil:
    cdef const RoundBf16* k = <const RoundBf16*>call
    cdef Share vectors = share(me, ceil_div(k.n, VL))
    cdef Py_ssize_t task, i
    for task in range(vectors.begin, vectors.end):
        i = task * VL
        put(k.out + i, vfloat(bf16_bits(part(k.x + i, k.n - i))), k.n - i)


def round_bf16(cnp.ndarray out, cnp.ndarray x, Py_ssize_t n):
    """out (n) = x (n) rounded to bfloat16 as packing does it, kept as float32.

    To nearest, ties to even; subnormals become zero, as in hardware.
    """
    cdef RoundBf16 k
    cdef Arrays args
    args.n = 0
    k.out, k.x, k.n = output(&args, out, 1, n, "out"), input(&args, x, 1, n, "x"), n
    check_overlap(&args)
    run(round_bf16_body, &k, sizeof(k), 0, n <= SERIAL)
