# Softmax cross-entropy of logits (rows, V) with one target in 0 .. V - 1 for each row, in nats.

cdef inline vf logits_at(const float* x, Py_ssize_t n) noexcept nogil:
    """The next vector of a row with n logits left; -inf beyond its end, which neither a maximum nor a sum of exp sees."""
    return vload(x) if n >= VL else vload_part(x, n, -INFINITY)


cdef float log_sum_exp(const float* x, Py_ssize_t n) noexcept nogil:
    """log(sum(exp(x (n)))), with the maximum taken out, so that no exponential overflows."""
    cdef Py_ssize_t j, jb, blocks = ceil_div(n, VL)
    cdef vf peak = vset(-INFINITY), total = vset(0)
    cdef float top
    for jb in range(blocks):
        j = jb * VL
        peak = vmax(peak, logits_at(x + j, n - j))
    top = vpeak(peak)
    for jb in range(blocks):
        j = jb * VL
        total = total + vexp(logits_at(x + j, n - j) - vset(top))
    return top + logf(vsum(total))


def cross_entropy_forward(cnp.ndarray losses, cnp.ndarray lse, cnp.ndarray logits, cnp.ndarray targets,
                          Py_ssize_t rows, Py_ssize_t V):
    """losses (rows) = lse - logits[target];  lse (rows) = log(sum(exp(logits (rows, V)))), kept for the backward pass."""
    cdef Arrays args
    args.n = 0
    cdef float* loss = output(&args, losses, 1, rows, "losses")
    cdef float* l = output(&args, lse, 1, rows, "lse")
    cdef const float* x = input(&args, logits, rows, V, "logits")
    cdef const int32_t* target = index(&args, targets, 1, rows, V, "targets")
    cdef Py_ssize_t i
    check_overlap(&args)
    for i in prange(rows, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=rows * V > SERIAL):
        l[i] = log_sum_exp(x + i * V, V)
        loss[i] = l[i] - x[i * V + target[i]]


cdef void softmax_gradient_row(float* dlogits, const float* logits, float lse, float scale, Py_ssize_t target,
                               Py_ssize_t V) noexcept nogil:
    """dlogits (V) = scale * (exp(logits (V) - lse) - onehot(target)); may be done in place."""
    cdef Py_ssize_t j, jb
    for jb in range(ceil_div(V, VL)):
        j = jb * VL
        put(dlogits + j, vexp(part(logits + j, V - j) - vset(lse)) * vset(scale), V - j)
    dlogits[target] -= scale


def cross_entropy_backward(cnp.ndarray dlogits, cnp.ndarray logits, cnp.ndarray targets, cnp.ndarray lse,
                           float scale, Py_ssize_t rows, Py_ssize_t V):
    """dlogits (rows, V) = scale * (softmax(logits (rows, V)) - onehot(targets (rows))); dlogits may be logits itself."""
    # loss = lse - logits[target], d lse / d logits = softmax(logits)   ->   dlogits = softmax(logits) - onehot(target)
    cdef Arrays args
    args.n = 0
    cdef float* g = output(&args, dlogits, rows, V, "dlogits")
    cdef const float* x = input(&args, logits, rows, V, "logits")
    cdef const int32_t* target = index(&args, targets, 1, rows, V, "targets")
    cdef const float* l = input(&args, lse, 1, rows, "lse")
    cdef Py_ssize_t i
    allow_in_place(&args, "dlogits", "logits")
    check_overlap(&args)
    for i in prange(rows, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=rows * V > SERIAL):
        softmax_gradient_row(g + i * V, x + i * V, l[i], scale, target[i], V)
