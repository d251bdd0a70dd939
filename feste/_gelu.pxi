# GELU in its tanh form: 0.5 x (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3). Hendrycks and Gimpel 2016,
# arXiv:1606.08415. As 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), it takes one exponential and one division.

cdef float GELU_CUBIC = 0.044715
cdef float GELU_TWICE_SCALE = 1.5957691216057308  # 2 sqrt(2 / pi)


cdef inline vf gelu_gate(vf x) noexcept nogil:
    """0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the share of x that passes."""
    cdef vf twice_u = vset(GELU_TWICE_SCALE) * x * vfma(vset(GELU_CUBIC) * x, x, vset(1))
    return vset(1) / (vset(1) + vexp(vset(0) - twice_u))


cdef struct GeluForward:
    float* out
    const float* x
    Py_ssize_t n


cdef void gelu_forward_body(const void* call, const Member* me) noexcept nogil:
    cdef const GeluForward* k = <const GeluForward*>call
    cdef Share vectors = share(me, ceil_div(k.n, VL))
    cdef Py_ssize_t task, i
    cdef vf v
    for task in range(vectors.begin, vectors.end):
        i = task * VL
        v = part(k.x + i, k.n - i)
        put(k.out + i, v * gelu_gate(v), k.n - i)


def gelu_forward(cnp.ndarray out, cnp.ndarray x, Py_ssize_t n):
    """out (n) = gelu(x (n))."""
    cdef GeluForward k
    cdef Arrays args
    args.n = 0
    k.out, k.x, k.n = output(&args, out, 1, n, "out"), input(&args, x, 1, n, "x"), n
    check_overlap(&args)
    run(gelu_forward_body, &k, sizeof(k), 0, n <= SERIAL)


cdef struct GeluBackward:
    float* dx
    float* out
    const float* dout
    const float* x
    Py_ssize_t n


cdef void gelu_backward_body(const void* call, const Member* me) noexcept nogil:
    cdef const GeluBackward* k = <const GeluBackward*>call
    cdef Share vectors = share(me, ceil_div(k.n, VL))
    cdef Py_ssize_t task, i
    cdef vf v, gate, twice_du
    for task in range(vectors.begin, vectors.end):
        i = task * VL
        v = part(k.x + i, k.n - i)
        gate = gelu_gate(v)
        put(k.out + i, v * gate, k.n - i)
        # 2u = 2 sqrt(2/pi) (x + 0.044715 x^3)   ->   2 du/dx = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2)
        twice_du = vset(GELU_TWICE_SCALE) * vfma(vset(3 * GELU_CUBIC) * v, v, vset(1))
        # out = x * gate, gate = 1 / (1 + exp(-2u))   ->   dx = dout * (gate + x * gate * (1 - gate) * 2 du/dx)
        put(k.dx + i, part(k.dout + i, k.n - i) * vfma(v * gate * (vset(1) - gate), twice_du, gate), k.n - i)


def gelu_backward(cnp.ndarray dx, cnp.ndarray out, cnp.ndarray dout, cnp.ndarray x, Py_ssize_t n):
    """dx (n) = dout (n) * gelu'(x (n)), and out (n) = gelu(x) once more: the next product needs it and it was not kept.

    dx may be dout itself.
    """
    cdef GeluBackward k
    cdef Arrays args
    args.n = 0
    k.dx = output(&args, dx, 1, n, "dx")
    k.out = output(&args, out, 1, n, "out")
    k.dout = input(&args, dout, 1, n, "dout")
    k.x = input(&args, x, 1, n, "x")
    k.n = n
    allow_in_place(&args, "dx", "dout")
    check_overlap(&args)
    run(gelu_backward_body, &k, sizeof(k), 0, n <= SERIAL)
