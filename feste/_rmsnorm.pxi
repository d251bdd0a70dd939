# RMSNorm of each row of x (rows, C) on its own. Zhang and Sennrich 2019, arXiv:1910.07467.

cdef float RMSNORM_EPS = 1e-5  # Llama's, added to the mean square: a row of zeros is not divided by zero


cdef inline float rms_rstd(const float* x, Py_ssize_t C) noexcept nogil:
    """1 / sqrt(mean(x^2) + eps) of x (C). Two chains of additions: one would wait for its own latency."""
    cdef Py_ssize_t j, jb
    cdef vf acc0 = vset(0), acc1 = vset(0), x0, x1
    for jb in range(ceil_div(C, 2 * VL)):
        j = jb * 2 * VL
        x0 = part(x + j, C - j)
        x1 = part(x + j + VL, C - j - VL)
        acc0 = vfma(x0, x0, acc0)
        acc1 = vfma(x1, x1, acc1)
    return 1 / sqrtf(vsum(acc0 + acc1) / C + RMSNORM_EPS)


cdef inline void rms_normalise_row(float* out, const float* x, const float* weight, float rstd, Py_ssize_t C) noexcept nogil:
    """out (C) = x (C) * rstd * weight (C)."""
    cdef Py_ssize_t j, jb
    cdef vf scale = vset(rstd)
    for jb in range(ceil_div(C, VL)):
        j = jb * VL
        put(out + j, part(x + j, C - j) * scale * part(weight + j, C - j), C - j)


cdef struct RmsnormForward:
    float* out
    float* rstd
    const float* x
    const float* weight
    Py_ssize_t rows, C


cdef void rmsnorm_forward_body(const void* call, const Member* me) noexcept nogil:
    cdef const RmsnormForward* k = <const RmsnormForward*>call
    cdef Share rows = share(me, k.rows)
    cdef Py_ssize_t i, group, begin, end, C = k.C
    for group in range(ceil_div(rows.end - rows.begin, ROWS_AT_ONCE)):
        begin = rows.begin + group * ROWS_AT_ONCE
        end = min(rows.end, begin + ROWS_AT_ONCE)
        for i in range(begin, end):
            k.rstd[i] = rms_rstd(k.x + i * C, C)
        for i in range(begin, end):
            rms_normalise_row(k.out + i * C, k.x + i * C, k.weight, k.rstd[i], C)


def rmsnorm_forward(cnp.ndarray out, cnp.ndarray rstd, cnp.ndarray x, cnp.ndarray weight, Py_ssize_t rows,
                    Py_ssize_t C):
    """out (rows, C) = x (rows, C) * rstd * weight (C); keeps rstd (rows) = 1 / sqrt(mean(x^2) + eps)."""
    cdef RmsnormForward k
    cdef Arrays args
    args.n = 0
    k.out = output(&args, out, rows, C, "out")
    k.rstd = output(&args, rstd, 1, rows, "rstd")
    k.x = input(&args, x, rows, C, "x")
    k.weight = input(&args, weight, 1, C, "weight")
    k.rows, k.C = rows, C
    check_overlap(&args)
    run(rmsnorm_forward_body, &k, sizeof(k), 0, rows * C <= SERIAL)


cdef void rmsnorm_backward_row(float* dx, float* dweight, const float* dout, const float* x, const float* weight,
                               float rstd, const float* dresidual, Py_ssize_t C) noexcept nogil:
    """dx (C) of one row, from dout (C) and x (C); its share is added to a tile's dweight (C).

    xhat = x * rstd, out = xhat * weight   ->   dweight += dout * xhat, dxhat = dout * weight. rstd depends on x too
    ->   dx = rstd * (dxhat - xhat * mean(dxhat * xhat)). dresidual (C), or NULL, is the gradient that reaches x on its
    way past the layer.
    """
    cdef Py_ssize_t j, jb, blocks = ceil_div(C, VL)
    cdef vf scale = vset(rstd), sum_dx = vset(0), xhat, dxhat, do, mean_dx
    for jb in range(blocks):
        j = jb * VL
        do = part(dout + j, C - j)
        xhat = part(x + j, C - j) * scale
        put(dweight + j, vfma(do, xhat, part(dweight + j, C - j)), C - j)
        sum_dx = vfma(do * part(weight + j, C - j), xhat, sum_dx)
    mean_dx = vset(vsum(sum_dx) / C)
    for jb in range(blocks):
        j = jb * VL
        xhat = part(x + j, C - j) * scale
        dxhat = scale * (part(dout + j, C - j) * part(weight + j, C - j) - xhat * mean_dx)
        if dresidual != NULL:
            dxhat = part(dresidual + j, C - j) + dxhat
        put(dx + j, dxhat, C - j)


cdef struct RmsnormBackward:
    float* dx
    float* dweight
    const float* dout
    const float* x
    const float* weight
    const float* rstd
    const float* dresidual   # or NULL
    Py_ssize_t rows, C


cdef void rmsnorm_backward_body(const void* call, const Member* me) noexcept nogil:
    """Sums of ROW_TILE rows first, and then those of the tiles in their order, so that the bits do not depend on the
    threads; the work space is (tiles, C), dweight of each tile."""
    cdef const RmsnormBackward* k = <const RmsnormBackward*>call
    cdef Py_ssize_t tiles = ceil_div(k.rows, ROW_TILE), tile, i, j, C = k.C
    cdef Share mine = share(me, tiles)
    cdef float* sums = <float*>me.work
    for tile in range(mine.begin, mine.end):
        memset(sums + tile * C, 0, C * sizeof(float))
        for i in range(tile * ROW_TILE, min(k.rows, (tile + 1) * ROW_TILE)):
            rmsnorm_backward_row(k.dx + i * C, sums + tile * C, k.dout + i * C, k.x + i * C, k.weight, k.rstd[i],
                                 k.dresidual + i * C if k.dresidual != NULL else NULL, C)
    barrier(me)
    mine = share(me, C)
    for tile in range(tiles):
        for j in range(mine.begin, mine.end):
            k.dweight[j] += sums[tile * C + j]


def rmsnorm_backward(cnp.ndarray dx, cnp.ndarray dweight, cnp.ndarray dout, cnp.ndarray x, cnp.ndarray weight,
                     cnp.ndarray rstd, cnp.ndarray dresidual, Py_ssize_t rows, Py_ssize_t C):
    """dx (rows, C) = the gradient of rmsnorm_forward + dresidual (rows, C); dweight (C) is added to.

    dresidual may be None, and may be dx itself.
    """
    # out = x * rstd * weight   ->   dx, dweight += sum(dout * xhat) over the rows
    cdef RmsnormBackward k
    cdef Arrays args
    args.n = 0
    k.dx = output(&args, dx, rows, C, "dx")
    k.dweight = output(&args, dweight, 1, C, "dweight")
    k.dout = input(&args, dout, rows, C, "dout")
    k.x = input(&args, x, rows, C, "x")
    k.weight = input(&args, weight, 1, C, "weight")
    k.rstd = input(&args, rstd, 1, rows, "rstd")
    k.dresidual = optional(&args, dresidual, rows, C, "dresidual")
    k.rows, k.C = rows, C
    allow_in_place(&args, "dx", "dresidual")
    check_overlap(&args)
    run(rmsnorm_backward_body, &k, sizeof(k), ceil_div(rows, ROW_TILE) * C * sizeof(float), rows * C <= SERIAL)
