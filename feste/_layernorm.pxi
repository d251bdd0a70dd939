# Layer normalisation of each row of x (rows, C) on its own. Ba, Kiros and Hinton 2016, arXiv:1607.06450.

cdef float LAYERNORM_EPS = 1e-5  # GPT-2's, added to the variance: a row of equal elements is not divided by zero


cdef inline vf centered(const float* x, Py_ssize_t n, float mean) noexcept nogil:
    """x - mean for the next vector of a row with n elements left: zero, and not -mean, beyond its end."""
    return (vload(x) if n >= VL else vload_part(x, n, mean)) - vset(mean)


cdef inline float row_mean(const float* x, Py_ssize_t C) noexcept nogil:
    """The mean of x (C). Two chains of additions side by side: one would wait for its own latency."""
    cdef Py_ssize_t j, jb
    cdef vf acc0 = vset(0), acc1 = vset(0)
    for jb in range(ceil_div(C, 2 * VL)):
        j = jb * 2 * VL
        acc0 = acc0 + part(x + j, C - j)
        acc1 = acc1 + part(x + j + VL, C - j - VL)
    return vsum(acc0 + acc1) / C


cdef inline float row_rstd(const float* x, float mean, Py_ssize_t C) noexcept nogil:
    """1 / sqrt(variance + eps) of x (C). From the sums of x and x^2 a variance would lose digits where the mean is large."""
    cdef Py_ssize_t j, jb
    cdef vf acc0 = vset(0), acc1 = vset(0), x0, x1
    for jb in range(ceil_div(C, 2 * VL)):
        j = jb * 2 * VL
        x0 = centered(x + j, C - j, mean)
        x1 = centered(x + j + VL, C - j - VL, mean)
        acc0 = vfma(x0, x0, acc0)
        acc1 = vfma(x1, x1, acc1)
    return 1 / sqrtf(vsum(acc0 + acc1) / C + LAYERNORM_EPS)


cdef inline void normalise_row(float* out, const float* x, const float* weight, const float* bias, float mean, float rstd,
                               Py_ssize_t C) noexcept nogil:
    """out (C) = (x (C) - mean) * rstd * weight (C) + bias (C)."""
    cdef Py_ssize_t j, jb
    cdef vf mu = vset(mean), scale = vset(rstd)
    for jb in range(ceil_div(C, VL)):
        j = jb * VL
        put(out + j, vfma((part(x + j, C - j) - mu) * scale, part(weight + j, C - j), part(bias + j, C - j)), C - j)


cdef struct LayernormForward:
    float* out
    float* mean
    float* rstd
    const float* x
    const float* weight
    const float* bias
    Py_ssize_t rows, C


cdef void layernorm_forward_body(const void* call, const Member* me) noexcept nogil:
    cdef const LayernormForward* k = <const LayernormForward*>call
    cdef Share rows = share(me, k.rows)
    cdef Py_ssize_t i, group, begin, end, C = k.C
    for group in range(ceil_div(rows.end - rows.begin, ROWS_AT_ONCE)):
        begin = rows.begin + group * ROWS_AT_ONCE
        end = min(rows.end, begin + ROWS_AT_ONCE)
        for i in range(begin, end):
            k.mean[i] = row_mean(k.x + i * C, C)
        for i in range(begin, end):
            k.rstd[i] = row_rstd(k.x + i * C, k.mean[i], C)
        for i in range(begin, end):
            normalise_row(k.out + i * C, k.x + i * C, k.weight, k.bias, k.mean[i], k.rstd[i], C)


def layernorm_forward(cnp.ndarray out, cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray x, cnp.ndarray weight,
                      cnp.ndarray bias, Py_ssize_t rows, Py_ssize_t C):
    """out (rows, C) = (x (rows, C) - mean) * rstd * weight (C) + bias (C); keeps mean (rows) and rstd (rows)."""
    cdef LayernormForward k
    cdef Arrays args
    args.n = 0
    k.out = output(&args, out, rows, C, "out")
    k.mean = output(&args, mean, 1, rows, "mean")
    k.rstd = output(&args, rstd, 1, rows, "rstd")
    k.x = input(&args, x, rows, C, "x")
    k.weight = input(&args, weight, 1, C, "weight")
    k.bias = input(&args, bias, 1, C, "bias")
    k.rows, k.C = rows, C
    check_overlap(&args)
    run(layernorm_forward_body, &k, sizeof(k), 0, rows * C <= SERIAL)


cdef void layernorm_backward_row(float* dx, float* dweight, float* dbias, const float* dout, const float* x,
                                 const float* weight, float mean, float rstd, const float* dresidual,
                                 Py_ssize_t C) noexcept nogil:
    """dx (C) of one row, from dout (C) and x (C); its shares are added to a tile's dweight (C) and dbias (C).

    xhat = (x - mean) * rstd, out = xhat * weight + bias   ->   dweight += dout * xhat, dbias += dout,
    dxhat = dout * weight. mean and rstd depend on x too   ->   dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)).
    dresidual (C), or NULL, is the gradient that reaches x on its way past the layer.
    """
    cdef Py_ssize_t j, jb, blocks = ceil_div(C, VL)
    cdef vf mu = vset(mean), scale = vset(rstd), sum_d = vset(0), sum_dx = vset(0)
    cdef vf xhat, dxhat, do, mean_d, mean_dx
    for jb in range(blocks):
        j = jb * VL
        do = part(dout + j, C - j)
        xhat = (part(x + j, C - j) - mu) * scale
        put(dweight + j, vfma(do, xhat, part(dweight + j, C - j)), C - j)
        put(dbias + j, part(dbias + j, C - j) + do, C - j)
        dxhat = do * part(weight + j, C - j)  # zero beyond the end of the row, as do and weight are
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


cdef struct LayernormBackward:
    float* dx
    float* dweight
    float* dbias
    const float* dout
    const float* x
    const float* weight
    const float* mean
    const float* rstd
    const float* dresidual   # or NULL
    Py_ssize_t rows, C


cdef void layernorm_backward_body(const void* call, const Member* me) noexcept nogil:
    """Sums of ROW_TILE rows first, and then those of the tiles in their order, so that the bits do not depend on the
    threads; the work space is (tiles, 2, C), dweight and dbias of each tile."""
    cdef const LayernormBackward* k = <const LayernormBackward*>call
    cdef Py_ssize_t tiles = ceil_div(k.rows, ROW_TILE), tile, i, j, C = k.C
    cdef Share mine = share(me, tiles)
    cdef float* sums = <float*>me.work
    cdef float* own
    for tile in range(mine.begin, mine.end):
        own = sums + tile * 2 * C
        memset(own, 0, 2 * C * sizeof(float))
        for i in range(tile * ROW_TILE, min(k.rows, (tile + 1) * ROW_TILE)):
            layernorm_backward_row(k.dx + i * C, own, own + C, k.dout + i * C, k.x + i * C, k.weight, k.mean[i], k.rstd[i],
                                   k.dresidual + i * C if k.dresidual != NULL else NULL, C)
    barrier(me)
    mine = share(me, C)
    for tile in range(tiles):
        own = sums + tile * 2 * C
        for j in range(mine.begin, mine.end):
            k.dweight[j] += own[j]
            k.dbias[j] += own[C + j]


def layernorm_backward(cnp.ndarray dx, cnp.ndarray dweight, cnp.ndarray dbias, cnp.ndarray dout, cnp.ndarray x,
                       cnp.ndarray weight, cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray dresidual,
                       Py_ssize_t rows, Py_ssize_t C):
    """dx (rows, C) = the gradient of layernorm_forward + dresidual (rows, C); dweight (C) and dbias (C) are added to.

    dresidual may be None, and may be dx itself.
    """
    # out = (x - mean) * rstd * weight + bias   ->   dx, dweight += sum(dout * xhat), dbias += sum(dout), over the rows
    cdef LayernormBackward k
    cdef Arrays args
    args.n = 0
    k.dx = output(&args, dx, rows, C, "dx")
    k.dweight = output(&args, dweight, 1, C, "dweight")
    k.dbias = output(&args, dbias, 1, C, "dbias")
    k.dout = input(&args, dout, rows, C, "dout")
    k.x = input(&args, x, rows, C, "x")
    k.weight = input(&args, weight, 1, C, "weight")
    k.mean = input(&args, mean, 1, rows, "mean")
    k.rstd = input(&args, rstd, 1, rows, "rstd")
    k.dresidual = optional(&args, dresidual, rows, C, "dresidual")
    k.rows, k.C = rows, C
    allow_in_place(&args, "dx", "dresidual")
    check_overlap(&args)
    run(layernorm_backward_body, &k, sizeof(k), ceil_div(rows, ROW_TILE) * 2 * C * sizeof(float), rows * C <= SERIAL)
