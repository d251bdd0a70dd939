# ReLU squared: max(x, 0)^2. So et al. 2021 (Primer), arXiv:2109.08668.

cdef struct Relu2Forward:
    float* out
    const float* x
    Py_ssize_t n


cdef void relu2_forward_body(const void* call, const Member* me) noexcept nogil:
    cdef const Relu2Forward* k = <const Relu2Forward*>call
    cdef Share vectors = share(me, ceil_div(k.n, VL))
    cdef Py_ssize_t task, i
    cdef vf v
    for task in range(vectors.begin, vectors.end):
        i = task * VL
        v = vmax(vset(0), part(k.x + i, k.n - i))
        put(k.out + i, v * v, k.n - i)


def relu2_forward(cnp.ndarray out, cnp.ndarray x, Py_ssize_t n):
    """out (n) = max(x (n), 0)^2."""
    cdef Relu2Forward k
    cdef Arrays args
    args.n = 0
    k.out, k.x, k.n = output(&args, out, 1, n, "out"), input(&args, x, 1, n, "x"), n
    check_overlap(&args)
    run(relu2_forward_body, &k, sizeof(k), 0, n <= SERIAL)


cdef struct Relu2Backward:
    float* dx
    float* out
    const float* dout
    const float* x
    Py_ssize_t n


cdef void relu2_backward_body(const void* call, const Member* me) noexcept nogil:
    cdef const Relu2Backward* k = <const Relu2Backward*>call
    cdef Share vectors = share(me, ceil_div(k.n, VL))
    cdef Py_ssize_t task, i
    cdef vf v
    for task in range(vectors.begin, vectors.end):
        i = task * VL
        v = vmax(vset(0), part(k.x + i, k.n - i))
        put(k.out + i, v * v, k.n - i)
        # out = max(x, 0)^2   ->   dx = dout * 2 max(x, 0)
        put(k.dx + i, part(k.dout + i, k.n - i) * (v + v), k.n - i)


def relu2_backward(cnp.ndarray dx, cnp.ndarray out, cnp.ndarray dout, cnp.ndarray x, Py_ssize_t n):
    """dx (n) = dout (n) * 2 max(x (n), 0), and out (n) = max(x, 0)^2 once more, as gelu_backward does.

    dx may be dout itself.
    """
    cdef Relu2Backward k
    cdef Arrays args
    args.n = 0
    k.dx = output(&args, dx, 1, n, "dx")
    k.out = output(&args, out, 1, n, "out")
    k.dout = input(&args, dout, 1, n, "dout")
    k.x = input(&args, x, 1, n, "x")
    k.n = n
    allow_in_place(&args, "dx", "dout")
    check_overlap(&args)
    run(relu2_backward_body, &k, sizeof(k), 0, n <= SERIAL)
