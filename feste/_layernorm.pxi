# Layer normalisation of each row of x (rows, C) on its own. Ba, Kiros and Hinton 2016, arXiv:1607.06450.

cdef float LAYERNORM_EPS = 1e-5  # GPT-2's, added to the variance: a row of equal elements is not divided by zero


cdef inline vf centered(const float* x, Py_ssize_t n, float mean) noexcept nogil:
    """x - mean for the next vector of a row with n elements left: zero, and not -mean, beyond its end."""
    return (vload(x) if n >= VL else vload_part(x, n, mean)) - vset(mean)


cdef void layernorm_row(float* out, float* mean, float* rstd, const float* x, const float* weight,
                        const float* bias, Py_ssize_t C) noexcept nogil:
    """out (C) = (x (C) - mean) * rstd * weight (C) + bias (C), with the mean and 1 / sqrt(variance + eps) of x.

    Three passes over a row in L1: a variance from the sums of x and x^2 in one pass would cancel digits where the mean is
    large. Two chains of additions side by side: one would wait for its own latency.
    """
    cdef Py_ssize_t j, jb, blocks = ceil_div(C, 2 * VL)
    cdef vf acc0 = vset(0), acc1 = vset(0), mu, scale, x0, x1
    for jb in range(blocks):
        j = jb * 2 * VL
        acc0 = acc0 + part(x + j, C - j)
        acc1 = acc1 + part(x + j + VL, C - j - VL)
    mean[0] = vsum(acc0 + acc1) / C
    acc0 = acc1 = vset(0)
    for jb in range(blocks):
        j = jb * 2 * VL
        x0 = centered(x + j, C - j, mean[0])
        x1 = centered(x + j + VL, C - j - VL, mean[0])
        acc0 = vfma(x0, x0, acc0)
        acc1 = vfma(x1, x1, acc1)
    rstd[0] = 1 / sqrtf(vsum(acc0 + acc1) / C + LAYERNORM_EPS)
    mu, scale = vset(mean[0]), vset(rstd[0])
    for jb in range(ceil_div(C, VL)):
        j = jb * VL
        put(out + j, vfma((part(x + j, C - j) - mu) * scale, part(weight + j, C - j), part(bias + j, C - j)), C - j)


def layernorm_forward(cnp.ndarray out, cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray x, cnp.ndarray weight,
                      cnp.ndarray bias, Py_ssize_t rows, Py_ssize_t C):
    """out (rows, C) = (x (rows, C) - mean) * rstd * weight (C) + bias (C); keeps mean (rows) and rstd (rows)."""
    cdef Arrays args
    args.n = 0
    cdef float* o = output(&args, out, rows, C, "out")
    cdef float* mu = output(&args, mean, 1, rows, "mean")
    cdef float* rs = output(&args, rstd, 1, rows, "rstd")
    cdef const float* px = input(&args, x, rows, C, "x")
    cdef const float* w = input(&args, weight, 1, C, "weight")
    cdef const float* b = input(&args, bias, 1, C, "bias")
    cdef Py_ssize_t i
    check_overlap(&args)
    for i in prange(rows, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=rows * C > SERIAL):
        layernorm_row(o + i * C, mu + i, rs + i, px + i * C, w, b, C)


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


def layernorm_backward(cnp.ndarray dx, cnp.ndarray dweight, cnp.ndarray dbias, cnp.ndarray dout, cnp.ndarray x,
                       cnp.ndarray weight, cnp.ndarray mean, cnp.ndarray rstd, cnp.ndarray dresidual,
                       Py_ssize_t rows, Py_ssize_t C):
    """dx (rows, C) = the gradient of layernorm_forward + dresidual (rows, C); dweight (C) and dbias (C) are added to.

    dresidual may be None, and may be dx itself.
    """
    # out = (x - mean) * rstd * weight + bias   ->   dx, dweight += sum(dout * xhat), dbias += sum(dout), over the rows
    cdef Arrays args
    args.n = 0
    cdef float* gx = output(&args, dx, rows, C, "dx")
    cdef float* gw = output(&args, dweight, 1, C, "dweight")
    cdef float* gb = output(&args, dbias, 1, C, "dbias")
    cdef const float* do = input(&args, dout, rows, C, "dout")
    cdef const float* px = input(&args, x, rows, C, "x")
    cdef const float* w = input(&args, weight, 1, C, "weight")
    cdef const float* mu = input(&args, mean, 1, rows, "mean")
    cdef const float* rs = input(&args, rstd, 1, rows, "rstd")
    cdef const float* gr = optional(&args, dresidual, rows, C, "dresidual")
    allow_in_place(&args, "dx", "dresidual")
    check_overlap(&args)
    cdef Py_ssize_t tiles = ceil_div(rows, ROW_TILE), tile, i, j
    cdef float* sums = <float*>scratch(tiles * 2 * C * sizeof(float))  # (tiles, 2, C): dweight and dbias of each tile
    cdef float* own
    for tile in prange(tiles, nogil=True, schedule='static', num_threads=n_threads):
        own = sums + tile * 2 * C
        memset(own, 0, 2 * C * sizeof(float))
        for i in range(tile * ROW_TILE, min(rows, (tile + 1) * ROW_TILE)):
            layernorm_backward_row(gx + i * C, own, own + C, do + i * C, px + i * C, w, mu[i], rs[i],
                                   gr + i * C if gr != NULL else NULL, C)
    with nogil:
        for tile in range(tiles):  # in their order, so that the bits do not depend on the threads
            own = sums + tile * 2 * C
            for j in range(C):
                gw[j] += own[j]
                gb[j] += own[C + j]
