# The optimizer: the norm of a gradient, and AdamW in one pass over the four flat buffers.

def sum_of_squares(cnp.ndarray x, Py_ssize_t n):
    """The sum of x (n) squared, in float64: the square of its norm."""
    cdef Arrays args
    args.n = 0
    cdef const float* px = input(&args, x, 1, n, "x")
    cdef Py_ssize_t tiles = ceil_div(n, SUM_TILE), tile
    cdef double* partial = <double*>scratch(tiles * sizeof(double))
    cdef double total = 0
    for tile in prange(tiles, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=n > SERIAL):
        partial[tile] = tile_of_squares(px + tile * SUM_TILE, min(SUM_TILE, n - tile * SUM_TILE))
    for tile in range(tiles):  # in their order, so that the bits do not depend on the threads
        total += partial[tile]
    return total


cdef double tile_of_squares(const float* x, Py_ssize_t n) noexcept nogil:
    """The sum of x (n) squared, n <= SUM_TILE, in two chains of float32 vectors."""
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
    """One AdamW update of param (n), its moments m (n) and v (n), in place. Loshchilov and Hutter 2019, arXiv:1711.05101.

    grad (n) is multiplied by grad_scale first (clipping) and zeroed afterwards if zero_grad; t counts updates from 1. One
    pass over memory does it all, because reading and writing the four buffers is what an update costs.
    """
    cdef Arrays args
    args.n = 0
    cdef float* p = output(&args, param, 1, n, "param")
    cdef float* pm = output(&args, m, 1, n, "m")
    cdef float* pv = output(&args, v, 1, n, "v")
    cdef float* g = output(&args, grad, 1, n, "grad")
    cdef vf b1 = vset(<float>beta1), b2 = vset(<float>beta2)
    cdef vf c1 = vset(<float>(1 - beta1)), c2 = vset(<float>(1 - beta2))
    # The moments start at zero, so after t updates they are too small by a factor of 1 - beta^t.
    cdef vf correct1 = vset(<float>(1 / (1 - beta1 ** t))), correct2 = vset(<float>(1 / (1 - beta2 ** t)))
    cdef vf keep = vset(<float>(1 - learning_rate * weight_decay)), rate = vset(<float>learning_rate)
    cdef vf scale = vset(<float>grad_scale), small = vset(<float>eps), gi, mi, vi_
    cdef Py_ssize_t task, i
    if t < 1:
        raise ValueError(f"t counts updates from 1, got {t}")
    check_overlap(&args)
    for task in prange(ceil_div(n, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=n > SERIAL):
        i = task * VL
        gi = part(g + i, n - i) * scale
        mi = vfma(b1, part(pm + i, n - i), c1 * gi)        # m = beta1 m + (1 - beta1) g
        vi_ = vfma(b2, part(pv + i, n - i), c2 * gi * gi)  # v = beta2 v + (1 - beta2) g^2
        put(pm + i, mi, n - i)
        put(pv + i, vi_, n - i)
        # param = (1 - rate * decay) param - rate * m_hat / (sqrt(v_hat) + eps)
        put(p + i, keep * part(p + i, n - i) - rate * (mi * correct1) / (vsqrt(vi_ * correct2) + small), n - i)
        if zero_grad:
            put(g + i, vset(0), n - i)
