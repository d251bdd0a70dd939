# Dropout from a counter-based generator: the factor of element i depends on (key, i) alone, so any thread can make any
# part of the mask, and the backward pass makes it again instead of reading it.

cdef inline float dropout_factor(uint64_t key, uint64_t i, uint64_t threshold, float kept) noexcept nogil:
    """0 with probability p = threshold / 2^32, else kept = 1 / (1 - p).

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014, with its constants) over key + i * 2^64 / golden ratio; its
    upper 32 bits are compared.
    """
    cdef uint64_t z = key + i * <uint64_t>0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * <uint64_t>0x94D049BB133111EB
    z = z ^ (z >> 31)
    return kept if (z >> 32) >= threshold else 0


cdef inline uint64_t dropout_threshold(double p) noexcept nogil:
    """p * 2^32: an element whose hash is below it is dropped."""
    return <uint64_t>(p * 4294967296.0)


cdef int check_dropout(double p) except -1:
    """ValueError if p, also NaN, is no probability of dropping that leaves something."""
    if not 0 <= p < 1:
        raise ValueError(f"the dropout probability must be in [0, 1), got {p}")
    return 0


cdef struct Dropout:
    float* out
    const float* x
    const float* residual    # or NULL
    double p
    uint64_t key
    Py_ssize_t n


cdef void dropout_body(const void* call, const Member* me) noexcept nogil:
    """out (n) = residual (n) + x (n) * mask; out may be x or residual."""
    cdef const Dropout* k = <const Dropout*>call
    cdef uint64_t threshold = dropout_threshold(k.p)
    cdef float kept = <float>(1 / (1 - k.p))  # so that the expectation stays x
    cdef Share elements = share(me, k.n)
    cdef Py_ssize_t i
    for i in range(elements.begin, elements.end):
        k.out[i] = (k.residual[i] if k.residual != NULL else 0) + k.x[i] * dropout_factor(k.key, i, threshold, kept)


def dropout_forward(cnp.ndarray out, cnp.ndarray x, cnp.ndarray residual, double p, uint64_t key, Py_ssize_t n):
    """out (n) = residual (n) + x (n) * mask, 0 <= p < 1; residual may be None, and out may be x or residual itself."""
    cdef Arrays args
    args.n = 0
    cdef Dropout k
    k.out = output(&args, out, 1, n, "out")
    k.x = input(&args, x, 1, n, "x")
    k.residual = optional(&args, residual, 1, n, "residual")
    k.p, k.key, k.n = p, key, n
    check_dropout(p)
    allow_in_place(&args, "out", "x")
    allow_in_place(&args, "out", "residual")
    check_overlap(&args)
    run(dropout_body, &k, sizeof(k), 0, n <= SERIAL)


def dropout_backward(cnp.ndarray dx, cnp.ndarray dout, double p, uint64_t key, Py_ssize_t n):
    """dx (n) = dout (n) * mask, the mask of dropout_forward with the same p and key; dx may be dout itself."""
    # out = residual + x * mask   ->   dx = dout * mask
    cdef Arrays args
    args.n = 0
    cdef Dropout k
    k.out = output(&args, dx, 1, n, "dx")
    k.x = input(&args, dout, 1, n, "dout")
    k.residual, k.p, k.key, k.n = NULL, p, key, n
    check_dropout(p)
    allow_in_place(&args, "dx", "dout")
    check_overlap(&args)
    run(dropout_body, &k, sizeof(k), 0, n <= SERIAL)
