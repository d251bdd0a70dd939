# Packed weights: the bfloat16 panels of the GEMM, made once and kept.
#
# Generation multiplies a few rows by the same weights again and again, so its speed is that of reading them. As panels of
# bfloat16 they are half the bytes, and they give the bits of linear_forward in bf16.

def packed_size(Py_ssize_t K, Py_ssize_t N):
    """Elements of the int32 array that holds a packed weight (K, N): whole panels of pairs."""
    return ceil_div(N, NR) * NR * ceil_div(K, 2)


def pack_weight(cnp.ndarray packed, cnp.ndarray weight, Py_ssize_t K, Py_ssize_t N, bint transposed=False):
    """packed [ceil(N / NR)][ceil(K / 2)][NR] = pairs of weight (K, N), or of weight (N, K)^T if transposed."""
    cdef Arrays args
    args.n = 0
    cdef Py_ssize_t panel, ps = NR * ceil_div(K, 2), n_panels = ceil_div(N, NR)
    cdef float* out = <float*>array(&args, packed, cnp.NPY_INT32, 1, ps * n_panels, "packed", True)
    cdef Matrix b
    if transposed:
        b = transpose(rows_of_length(input(&args, weight, N, K, "weight"), K))
    else:
        b = rows_of_length(input(&args, weight, K, N, "weight"), N)
    check_overlap(&args)
    for panel in prange(n_panels, nogil=True, schedule='static', num_threads=n_threads):
        pack_panels_bf16(Panels(data=out + panel * ps, ps=ps), NULL, matrix_at(b, 0, panel * NR), K,
                         min(NR, N - panel * NR))


cdef void packed_row(Output out, const int32_t* x, const int32_t* panel, Py_ssize_t pairs, Py_ssize_t n) noexcept nogil:
    """c (n) = start + (x (pairs) panel (pairs, NR) + bias), n <= NR: one row, for which a register tile of MR rows would
    wait for its arithmetic.

    Summed block by block of K as the GEMM does it, so that the bits are the same.
    """
    cdef vf acc[NV]
    cdef vf total[NV]
    cdef Py_ssize_t pb, pc, k, j
    cdef int w, word
    for pb in range(ceil_div(pairs, KC)):
        pc = pb * KC
        for j in range(NV):
            acc[j] = vset(0)
        for k in range(pc, min(pc + KC, pairs)):
            for w in range(PAIR_WORDS):
                word = PAIR_WORDS - 1 - w
                for j in range(NV):
                    acc[j] = bf16_fma(acc[j], viset(x[PAIR_WORDS * k + word]),
                                      bf16_half(viload(panel + k * NR + j * VL), word))
        for j in range(NV):
            if pb == 0 and out.bias != NULL:
                acc[j] = acc[j] + part(out.bias + j * VL, n - j * VL)
            if pb == 0 and out.start != NULL:
                acc[j] = part(out.start + j * VL, n - j * VL) + acc[j]
            total[j] = acc[j] if pb == 0 else total[j] + acc[j]
    for j in range(NV):
        if n > j * VL:
            put(out.c + j * VL, total[j], n - j * VL)


cdef void packed_rows(Output out, Strips x, Panels panel, Py_ssize_t rows, Py_ssize_t pairs, Py_ssize_t n) noexcept nogil:
    """c (rows, n) = start + (x (rows, pairs) panel (pairs, NR) + bias), n <= NR, block by block of K."""
    cdef Py_ssize_t pb, lanes
    for pb in range(ceil_div(pairs, KC)):
        lanes = min(KC, pairs - pb * KC)
        macro_kernel(out, x, panel, rows, n, lanes, True)
        out.start, out.bias = out.c, NULL  # the next block is added to this one
        x.data += PAIR_WORDS * lanes
        panel.data += lanes * NR


def packed_forward(cnp.ndarray out, cnp.ndarray x, cnp.ndarray packed, cnp.ndarray bias, cnp.ndarray residual,
                   Py_ssize_t rows, Py_ssize_t K, Py_ssize_t N):
    """out (rows, N) = residual (rows, N) + (x (rows, K) @ weight (K, N) + bias (N)) in bf16, weight as pack_weight made
    it; bias and residual may be None."""
    cdef Arrays args
    args.n = 0
    cdef Py_ssize_t pairs = ceil_div(K, 2), words = PAIR_WORDS * pairs, n_panels = ceil_div(N, NR), panel, j
    cdef float* o = output(&args, out, rows, N, "out")
    cdef const float* px = input(&args, x, rows, K, "x")
    cdef float* weight = <float*>array(&args, packed, cnp.NPY_INT32, 1, n_panels * NR * pairs, "packed", False)
    cdef const float* b = optional(&args, bias, 1, N, "bias")
    cdef const float* r = optional(&args, residual, rows, N, "residual")
    cdef Output whole = Output(c=o, start=r, bias=b, ld=N)
    cdef float* strips = <float*>scratch(ceil_div(rows, MR) * MR * words * sizeof(float))  # [ceil(rows / MR)][MR][words]
    check_overlap(&args)
    with nogil:
        pack_rows_bf16(<int32_t*>strips, MR * words, rows_of_length(px, K), rows, K)
        for panel in prange(n_panels, schedule='static', num_threads=n_threads, use_threads_if=K * N > SERIAL_WEIGHT):
            j = panel * NR
            if rows == 1:
                packed_row(output_at(whole, 0, j), <int32_t*>strips, <int32_t*>weight + j * pairs, pairs, min(NR, N - j))
            else:
                packed_rows(output_at(whole, 0, j), Strips(data=strips, ps=MR * words, rs=words, cs=1),
                            Panels(data=weight + j * pairs, ps=0), rows, pairs, min(NR, N - j))
