# AdamW in one pass over the four flat buffers.

cdef struct AdamW:
    float* param
    float* m
    float* v
    float* grad
    double learning_rate, beta1, beta2, eps, weight_decay, grad_scale
    Py_ssize_t t, n
    bint cautious, zero_grad


cdef inline vf decayed(vf param, vf update, vf shrink, bint cautious) noexcept nogil:
    """What decay takes of a parameter from which update will be taken; if cautious, only where both make it smaller."""
    return vwhere_positive(param * update, shrink * param) if cautious else shrink * param


cdef void adamw_body(const void* call, const Member* me) noexcept nogil:
    cdef const AdamW* k = <const AdamW*>call
    cdef vf b1 = vset(<float>k.beta1), b2 = vset(<float>k.beta2)
    cdef vf c1 = vset(<float>(1 - k.beta1)), c2 = vset(<float>(1 - k.beta2))
    # The moments start at zero, so after t updates they are too small by a factor of 1 - beta^t.
    cdef vf correct1 = vset(<float>(1 / (1 - k.beta1 ** k.t))), correct2 = vset(<float>(1 / (1 - k.beta2 ** k.t)))
    cdef vf keep = vset(<float>(1 - k.learning_rate * k.weight_decay)), rate = vset(<float>k.learning_rate)
    cdef vf scale = vset(<float>k.grad_scale), small = vset(<float>k.eps), gi, mi, vi_, param, update
    cdef vf shrink = vset(<float>(k.learning_rate * k.weight_decay))
    cdef Share vectors = share(me, ceil_div(k.n, VL))
    cdef Py_ssize_t task, i, n
    for task in range(vectors.begin, vectors.end):
        i = task * VL
        n = k.n - i
        gi = part(k.grad + i, n) * scale
        mi = vfma(b1, part(k.m + i, n), c1 * gi)        # m = beta1 m + (1 - beta1) g
        vi_ = vfma(b2, part(k.v + i, n), c2 * gi * gi)  # v = beta2 v + (1 - beta2) g^2
        put(k.m + i, mi, n)
        put(k.v + i, vi_, n)
        # param = (1 - rate * decay) param - rate * m_hat / (sqrt(v_hat) + eps)
        param, update = part(k.param + i, n), rate * (mi * correct1) / (vsqrt(vi_ * correct2) + small)
        if k.cautious:
            put(k.param + i, param - decayed(param, update, shrink, True) - update, n)
        else:
            put(k.param + i, keep * param - update, n)
        if k.zero_grad:
            put(k.grad + i, vset(0), n)


def adamw_update(cnp.ndarray param, cnp.ndarray m, cnp.ndarray v, cnp.ndarray grad, double learning_rate,
                 double beta1, double beta2, double eps, double weight_decay, bint cautious, double grad_scale,
                 Py_ssize_t t, bint zero_grad, Py_ssize_t n):
    """One AdamW update of param (n), its moments m (n) and v (n), in place. Loshchilov and Hutter 2019, arXiv:1711.05101.

    grad (n) is multiplied by grad_scale first (clipping) and zeroed afterwards if zero_grad; t counts updates from 1. If
    cautious, only what the update makes smaller decays (Chen et al. 2025, arXiv:2510.12402). One
    pass over memory does it all, because reading and writing the four buffers is what an update costs.
    """
    cdef AdamW k
    cdef Arrays args
    args.n = 0
    k.param = output(&args, param, 1, n, "param")
    k.m = output(&args, m, 1, n, "m")
    k.v = output(&args, v, 1, n, "v")
    k.grad = output(&args, grad, 1, n, "grad")
    k.learning_rate, k.beta1, k.beta2, k.eps, k.weight_decay = learning_rate, beta1, beta2, eps, weight_decay
    k.grad_scale, k.t, k.n, k.cautious, k.zero_grad = grad_scale, t, n, cautious, zero_grad
    if t < 1:
        raise ValueError(f"t counts updates from 1, got {t}")
    check_overlap(&args)
    run(adamw_body, &k, sizeof(k), 0, n <= SERIAL)
