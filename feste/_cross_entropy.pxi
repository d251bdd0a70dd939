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


cdef struct CrossEntropy:
    float* losses            # of the forward pass
    float* lse
    float* dlogits           # of the backward pass
    const float* logits
    const int32_t* targets
    float scale
    Py_ssize_t rows, V


cdef void cross_entropy_forward_body(const void* call, const Member* me) noexcept nogil:
    cdef const CrossEntropy* k = <const CrossEntropy*>call
    cdef Share rows = share(me, k.rows)
    cdef Py_ssize_t i
    for i in range(rows.begin, rows.end):
        k.lse[i] = log_sum_exp(k.logits + i * k.V, k.V)
        k.losses[i] = k.lse[i] - k.logits[i * k.V + k.targets[i]]


def cross_entropy_forward(cnp.ndarray losses, cnp.ndarray lse, cnp.ndarray logits, cnp.ndarray targets,
                          Py_ssize_t rows, Py_ssize_t V):
    """losses (rows) = lse - logits[target];  lse (rows) = log(sum(exp(logits (rows, V)))), kept for the backward pass."""
    cdef CrossEntropy k
    cdef Arrays args
    args.n = 0
    k.losses = output(&args, losses, 1, rows, "losses")
    k.lse = output(&args, lse, 1, rows, "lse")
    k.logits = input(&args, logits, rows, V, "logits")
    k.targets = indices(&args, targets, 1, rows, V, "targets")
    k.rows, k.V = rows, V
    check_overlap(&args)
    run(cross_entropy_forward_body, &k, sizeof(k), 0, rows * V <= SERIAL)


cdef void softmax_gradient_row(float* dlogits, const float* logits, float lse, float scale, Py_ssize_t target,
                               Py_ssize_t V) noexcept nogil:
    """dlogits (V) = scale * (exp(logits (V) - lse) - onehot(target)); may be done in place."""
    cdef Py_ssize_t j, jb
    for jb in range(ceil_div(V, VL)):
        j = jb * VL
        put(dlogits + j, vexp(part(logits + j, V - j) - vset(lse)) * vset(scale), V - j)
    dlogits[target] -= scale


cdef void cross_entropy_backward_body(const void* call, const Member* me) noexcept nogil:
    cdef const CrossEntropy* k = <const CrossEntropy*>call
    cdef Share rows = share(me, k.rows)
    cdef Py_ssize_t i
    for i in range(rows.begin, rows.end):
        softmax_gradient_row(k.dlogits + i * k.V, k.logits + i * k.V, k.lse[i], k.scale, k.targets[i], k.V)


def cross_entropy_backward(cnp.ndarray dlogits, cnp.ndarray logits, cnp.ndarray targets, cnp.ndarray lse,
                           float scale, Py_ssize_t rows, Py_ssize_t V):
    """dlogits (rows, V) = scale * (softmax(logits (rows, V)) - onehot(targets (rows))); dlogits may be logits itself."""
    # loss = lse - logits[target], d lse / d logits = softmax(logits)   ->   dlogits = softmax(logits) - onehot(target)
    cdef CrossEntropy k
    cdef Arrays args
    args.n = 0
    k.dlogits = output(&args, dlogits, rows, V, "dlogits")
    k.logits = input(&args, logits, rows, V, "logits")
    k.targets = indices(&args, targets, 1, rows, V, "targets")
    k.lse = input(&args, lse, 1, rows, "lse")
    k.scale, k.rows, k.V = scale, rows, V
    allow_in_place(&args, "dlogits", "logits")
    check_overlap(&args)
    run(cross_entropy_backward_body, &k, sizeof(k), 0, rows * V <= SERIAL)
