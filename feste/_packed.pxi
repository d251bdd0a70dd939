# Packed weights: the bfloat16 panels of the GEMM, made once and kept.
#
# Generation multiplies a few rows by the same weights again and again, so its speed is that of reading them. As panels of
# bfloat16 they are half the bytes, and they give the bits of linear_forward in bf16.

cpdef Py_ssize_t packed_size(Py_ssize_t K, Py_ssize_t N):
    """Elements of the int32 array that holds a packed weight (K, N): whole panels of pairs."""
    return ceil_div(N, NR) * NR * ceil_div(K, 2)


cdef struct PackWeight:
    float* packed
    Matrix weight            # (K, N)
    Py_ssize_t K, N


cdef void pack_weight_body(const void* call, const Member* me) noexcept nogil:
    cdef const PackWeight* k = <const PackWeight*>call
    cdef Share panels = share(me, ceil_div(k.N, NR))
    cdef Py_ssize_t panel, ps = NR * ceil_div(k.K, 2)
    for panel in range(panels.begin, panels.end):
        pack_panels_bf16(Panels(data=k.packed + panel * ps, ps=ps), NULL, matrix_at(k.weight, 0, panel * NR), k.K,
                         min(NR, k.N - panel * NR))


def pack_weight(cnp.ndarray packed, cnp.ndarray weight, Py_ssize_t K, Py_ssize_t N, bint transposed=False):
    """packed [ceil(N / NR)][ceil(K / 2)][NR] = pairs of weight (K, N), or of weight (N, K)^T if transposed."""
    cdef PackWeight k
    cdef Arrays args
    args.n = 0
    k.packed = <float*>array(&args, packed, cnp.NPY_INT32, 1, packed_size(K, N), "packed", True)
    if transposed:
        k.weight = transpose(rows_of_length(input(&args, weight, N, K, "weight"), K))
    else:
        k.weight = rows_of_length(input(&args, weight, K, N, "weight"), N)
    k.K, k.N = K, N
    check_overlap(&args)
    run(pack_weight_body, &k, sizeof(k), 0, K * N <= SERIAL)


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


cdef struct PackedForward:
    Output out               # (rows, N)
    Matrix x                 # (rows, K)
    float* weight            # [ceil(N / NR)][pairs][NR]
    Py_ssize_t rows, K, N


cdef void packed_forward_body(const void* call, const Member* me) noexcept nogil:
    cdef const PackedForward* k = <const PackedForward*>call
    cdef Py_ssize_t pairs = ceil_div(k.K, 2), words = PAIR_WORDS * pairs, strip, panel, j, i
    cdef float* strips = <float*>me.work  # [ceil(rows / MR)][MR][words]
    cdef Share mine = share(me, ceil_div(k.rows, MR))
    for strip in range(mine.begin, mine.end):
        i = strip * MR
        pack_rows_bf16(<int32_t*>strips + i * words, MR * words, matrix_at(k.x, i, 0), min(MR, k.rows - i), k.K)
    barrier(me)
    mine = share(me, ceil_div(k.N, NR))
    for panel in range(mine.begin, mine.end):
        j = panel * NR
        if k.rows == 1:
            packed_row(output_at(k.out, 0, j), <int32_t*>strips, <int32_t*>k.weight + j * pairs, pairs, min(NR, k.N - j))
        else:
            packed_rows(output_at(k.out, 0, j), Strips(data=strips, ps=MR * words, rs=words, cs=1),
                        Panels(data=k.weight + j * pairs, ps=0), k.rows, pairs, min(NR, k.N - j))


def packed_forward(cnp.ndarray out, cnp.ndarray x, cnp.ndarray packed, cnp.ndarray bias, cnp.ndarray residual,
                   Py_ssize_t rows, Py_ssize_t K, Py_ssize_t N):
    """out (rows, N) = residual (rows, N) + (x (rows, K) @ weight (K, N) + bias (N)) in bf16, weight as pack_weight made
    it; bias and residual may be None."""
    cdef PackedForward k
    cdef Arrays args
    args.n = 0
    k.out = Output(c=output(&args, out, rows, N, "out"), start=optional(&args, residual, rows, N, "residual"),
                   bias=optional(&args, bias, 1, N, "bias"), ld=N)
    k.x = rows_of_length(input(&args, x, rows, K, "x"), K)
    k.weight = <float*>array(&args, packed, cnp.NPY_INT32, 1, packed_size(K, N), "packed", False)
    k.rows, k.K, k.N = rows, K, N
    check_overlap(&args)
    run(packed_forward_body, &k, sizeof(k), ceil_div(rows, MR) * MR * PAIR_WORDS * ceil_div(K, 2) * sizeof(float),
        K * N <= SERIAL_WEIGHT)
