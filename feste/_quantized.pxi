# 8-bit weights, for generation only: a token reads every weight once, so its speed is that of reading them from memory.
#
# A weight (K, N) is quantised along K, an output after the other: [N][ceil(K / 32)] blocks of 34 bytes, zero beyond K. That is
# Q8_0 of llama.cpp and GGUF, to the byte. What is multiplied by it stays float32.

cdef extern from "_q8.h" nogil:
    enum:
        Q8_BLOCK
    ctypedef struct q8_block:
        unsigned short scale
        signed char* q
    vf q8_load(const signed char* q)
    void q8_store(signed char* q, vf x)
    unsigned short half_bits(float x)
    float half_value(unsigned short half)

cdef enum:
    Q8_ROWS = 4      # rows of x for each pass over a row of weights
    Q8_AHEAD = 64    # blocks between the one that is multiplied and the one that is sent for: two kilobytes


cpdef Py_ssize_t quantized_size(Py_ssize_t K, Py_ssize_t N):
    """Bytes of a quantised weight (K, N)."""
    return N * ceil_div(K, Q8_BLOCK) * sizeof(q8_block)


cdef struct QuantizeWeight:
    q8_block* out            # [N][ceil(K / Q8_BLOCK)]
    Matrix weight            # (K, N)
    Py_ssize_t K, N


cdef void quantize_block(q8_block* out, const float* x) noexcept nogil:
    """scale = max |x (Q8_BLOCK)| / 127, and q = x / scale by the scale before it is rounded to float16."""
    cdef vf peak = vset(0), v
    cdef float scale, inverse
    cdef Py_ssize_t i
    for i in range(Q8_BLOCK // VL):
        v = vload(x + i * VL)
        peak = vmax(peak, vmax(v, vset(0) - v))
    scale = vpeak(peak) / 127
    inverse = 1 / scale if scale > 0 else 0
    out.scale = half_bits(scale)
    for i in range(Q8_BLOCK // VL):
        q8_store(out.q + i * VL, vload(x + i * VL) * vset(inverse))


cdef void copy_transposed(float* out, Matrix x, Py_ssize_t m, Py_ssize_t n) noexcept nogil:
    """out (VL, Q8_BLOCK) = x (m, n)^T, zero beyond n and m."""
    cdef Py_ssize_t i, j
    if m == Q8_BLOCK and n == VL and x.cs == 1:
        for i in range(Q8_BLOCK // VL):
            for j in range(VL):
                prefetch_read(x.data + (Q8_BLOCK + i * VL + j) * x.rs, VL)
            transpose_tile(<int32_t*>out + i * VL, Q8_BLOCK, <const int32_t*>(x.data + i * VL * x.rs), x.rs)
        return
    memset(out, 0, VL * Q8_BLOCK * sizeof(float))
    for j in range(n):
        for i in range(m):
            out[j * Q8_BLOCK + i] = x.data[i * x.rs + j * x.cs]


cdef void quantize_weight_body(const void* call, const Member* me) noexcept nogil:
    cdef const QuantizeWeight* w = <const QuantizeWeight*>call
    cdef Py_ssize_t blocks = ceil_div(w.K, Q8_BLOCK), group, block, i, j, n
    cdef Share groups = share(me, ceil_div(w.N, VL))
    cdef float columns[VL * Q8_BLOCK]
    for group in range(groups.begin, groups.end):
        j = group * VL
        n = min(VL, w.N - j)
        for block in range(blocks):
            copy_transposed(columns, matrix_at(w.weight, block * Q8_BLOCK, j), min(Q8_BLOCK, w.K - block * Q8_BLOCK), n)
            for i in range(n):
                quantize_block(w.out + (j + i) * blocks + block, columns + i * Q8_BLOCK)


def quantize_weight(cnp.ndarray quantized, cnp.ndarray weight, Py_ssize_t K, Py_ssize_t N, bint transposed=False):
    """quantized (quantized_size bytes) = weight (K, N), or weight (N, K)^T if transposed, in blocks of Q8_0."""
    cdef QuantizeWeight w
    cdef Arrays args
    args.n = 0
    w.out = <q8_block*>array(&args, quantized, cnp.NPY_UINT8, 1, quantized_size(K, N), "quantized", True)
    if transposed:
        w.weight = transpose(rows_of_length(input(&args, weight, N, K, "weight"), K))
    else:
        w.weight = rows_of_length(input(&args, weight, K, N, "weight"), N)
    w.K, w.N = K, N
    check_overlap(&args)
    run(quantize_weight_body, &w, sizeof(w), 0, K * N <= SERIAL)


cdef struct QuantizedForward:
    Output out               # (rows, N)
    const float* x           # (rows, K)
    const q8_block* weight   # [N][ceil(K / Q8_BLOCK)]
    Py_ssize_t rows, K, N


cdef inline float finished(Output out, vf acc) noexcept nogil:
    """start + (the sum of acc + bias), for one element of an output."""
    cdef float sum = vsum(acc) + (out.bias[0] if out.bias != NULL else 0)
    return out.start[0] + sum if out.start != NULL else sum


cdef void quantized_row(Output out, const float* x, const q8_block* weight, Py_ssize_t blocks) noexcept nogil:
    """An element of out = start + (x (K) weight (K) + bias), block by block."""
    cdef vf acc = vset(0), dot
    cdef Py_ssize_t block, i
    for block in range(blocks):
        dot = vset(0)
        prefetch_read(<const float*>(weight + Q8_AHEAD), 1)
        for i in range(Q8_BLOCK // VL):
            dot = vfma(q8_load(weight.q + i * VL), vload(x + i * VL), dot)
        acc = vfma(vset(half_value(weight.scale)), dot, acc)
        weight += 1
        x += Q8_BLOCK
    out.c[0] = finished(out, acc)


cdef void quantized_rows(Output out, const float* x, Py_ssize_t ld, const q8_block* weight,
                         Py_ssize_t blocks) noexcept nogil:
    """The same for Q8_ROWS rows of x, ld apart, and of out: each weight is widened to float32 once for all of them."""
    cdef vf acc[Q8_ROWS]
    cdef vf dot[Q8_ROWS]
    cdef vf w, scale
    cdef Py_ssize_t block, i, r
    for r in range(Q8_ROWS):
        acc[r] = vset(0)
    for block in range(blocks):
        for r in range(Q8_ROWS):
            dot[r] = vset(0)
        for i in range(Q8_BLOCK // VL):
            w = q8_load(weight[block].q + i * VL)
            for r in range(Q8_ROWS):
                dot[r] = vfma(w, vload(x + r * ld + i * VL), dot[r])
        scale = vset(half_value(weight[block].scale))
        for r in range(Q8_ROWS):
            acc[r] = vfma(scale, dot[r], acc[r])
        x += Q8_BLOCK
    for r in range(Q8_ROWS):
        out.c[r * out.ld] = finished(output_at(out, r, 0), acc[r])


cdef void quantized_forward_body(const void* call, const Member* me) noexcept nogil:
    """Where K is no multiple of a block, the rows of x are copied into the work space first, zero behind their end."""
    cdef const QuantizedForward* k = <const QuantizedForward*>call
    cdef Py_ssize_t blocks = ceil_div(k.K, Q8_BLOCK), ld = blocks * Q8_BLOCK, whole = k.rows // Q8_ROWS
    cdef Py_ssize_t group, i, j
    cdef const float* x = k.x
    cdef float* padded = <float*>me.work
    cdef Share mine = share(me, k.rows)
    if ld != k.K:
        for i in range(mine.begin, mine.end):
            memcpy(padded + i * ld, k.x + i * k.K, k.K * sizeof(float))
            memset(padded + i * ld + k.K, 0, (ld - k.K) * sizeof(float))
        barrier(me)
        x = padded
    mine = share(me, k.N)
    for j in range(mine.begin, mine.end):
        for group in range(whole):
            i = group * Q8_ROWS
            quantized_rows(output_at(k.out, i, j), x + i * ld, ld, k.weight + j * blocks, blocks)
        for i in range(whole * Q8_ROWS, k.rows):
            quantized_row(output_at(k.out, i, j), x + i * ld, k.weight + j * blocks, blocks)


def quantized_forward(cnp.ndarray out, cnp.ndarray x, cnp.ndarray quantized, cnp.ndarray bias, cnp.ndarray residual,
                      Py_ssize_t rows, Py_ssize_t K, Py_ssize_t N):
    """out (rows, N) = residual (rows, N) + (x (rows, K) @ weight (K, N) + bias (N)), weight as quantize_weight made it; bias
    and residual may be None."""
    cdef QuantizedForward k
    cdef Arrays args
    args.n = 0
    k.out = Output(c=output(&args, out, rows, N, "out"), start=optional(&args, residual, rows, N, "residual"),
                   bias=optional(&args, bias, 1, N, "bias"), ld=N)
    k.x = input(&args, x, rows, K, "x")
    k.weight = <const q8_block*>array(&args, quantized, cnp.NPY_UINT8, 1, quantized_size(K, N), "quantized", False)
    k.rows, k.K, k.N = rows, K, N
    check_overlap(&args)
    run(quantized_forward_body, &k, sizeof(k), rows * ceil_div(K, Q8_BLOCK) * Q8_BLOCK * sizeof(float),
        K * N <= SERIAL_WEIGHT)
