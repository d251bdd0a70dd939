# GELU in its tanh form: 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3). Hendrycks and Gimpel 2016,
# arXiv:1606.08415. As 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), it takes one exponential and one division.

cdef float GELU_CUBIC = 0.044715
cdef float GELU_TWICE_SCALE = 1.5957691216057308  # 2 sqrt(2 / pi)


cdef inline vf gelu_gate(vf x) noexcept nogil:
    """0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the share of x that passes."""
    cdef vf twice_u = vset(GELU_TWICE_SCALE) * x * vfma(vset(GELU_CUBIC) * x, x, vset(1))
    return vset(1) / (vset(1) + vexp(vset(0) - twice_u))


def gelu_forward(cnp.ndarray out, cnp.ndarray x, Py_ssize_t n):
    """out (n) = gelu(x (n))."""
    cdef Arrays args
    args.n = 0
    cdef float* o = output(&args, out, 1, n, "out")
    cdef const float* px = input(&args, x, 1, n, "x")
    cdef Py_ssize_t task, i
    cdef vf v
    check_overlap(&args)
    for task in prange(ceil_div(n, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=n > SERIAL):
        i = task * VL
        v = part(px + i, n - i)
        put(o + i, v * gelu_gate(v), n - i)


def gelu_backward(cnp.ndarray dx, cnp.ndarray out, cnp.ndarray dout, cnp.ndarray x, Py_ssize_t n):
    """dx (n) = dout (n) * gelu'(x (n)), and out (n) = gelu(x) once more: the next product needs it and it was not kept.

    dx may be dout itself.
    """
    cdef Arrays args
    args.n = 0
    cdef float* gx = output(&args, dx, 1, n, "dx")
    cdef float* o = output(&args, out, 1, n, "out")
    cdef const float* do = input(&args, dout, 1, n, "dout")
    cdef const float* px = input(&args, x, 1, n, "x")
    cdef Py_ssize_t task, i
    cdef vf v, gate, twice_du
    allow_in_place(&args, "dx", "dout")
    check_overlap(&args)
    for task in prange(ceil_div(n, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=n > SERIAL):
        i = task * VL
        v = part(px + i, n - i)
        gate = gelu_gate(v)
        put(o + i, v * gate, n - i)
        # 2u = 2 sqrt(2/pi) (x + 0.044715 x^3)   ->   2 du/dx = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
        twice_du = vset(GELU_TWICE_SCALE) * vfma(vset(3 * GELU_CUBIC) * v, v, vset(1))
        # out = x * gate, gate = 1 / (1 + exp(-2u))   ->   dx = dout * (gate + x * gate * (1 - gate) * 2 du/dx)
        put(gx + i, part(do + i, n - i) * vfma(v * gate * (vset(1) - gate), twice_du, gate), n - i)
