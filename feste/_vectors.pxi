# Rows of any length, a vector of VL floats at a time: loads and stores at their ends, and the loops that several
# kernels share.

cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline vf part(const float* x, Py_ssize_t n) noexcept nogil:
    """The next vector of a row with n elements left (any n, also negative); zero beyond its end, which is not read."""
    return vload(x) if n >= VL else vload_part(x, n, 0)


cdef inline void put(float* x, vf value, Py_ssize_t n) noexcept nogil:
    """Store the next vector of a row with n elements left; nothing beyond its end is written."""
    if n >= VL:
        vstore(x, value)
    else:
        vstore_part(x, value, n)


cdef inline void put_words(int32_t* out, vi pairs, Py_ssize_t n) noexcept nogil:
    """Store the next vector of a row with n pairs of bfloat16 left; nothing beyond its end is written."""
    put(<float*>out, vfloat(pairs), n)


cdef inline void scale_row(float* x, float factor, Py_ssize_t n) noexcept nogil:
    """x (n) *= factor."""
    cdef Py_ssize_t j, jb
    for jb in range(ceil_div(n, VL)):
        j = jb * VL
        put(x + j, part(x + j, n - j) * vset(factor), n - j)


cdef inline float dot(const float* x, const float* y, Py_ssize_t n) noexcept nogil:
    """The sum of x (n) * y (n)."""
    cdef Py_ssize_t j, jb
    cdef vf acc = vset(0)
    for jb in range(ceil_div(n, VL)):
        j = jb * VL
        acc = vfma(part(x + j, n - j), part(y + j, n - j), acc)
    return vsum(acc)


cdef void add_dot_rows(float* out, const float* x, const float* weight, Py_ssize_t n, Py_ssize_t K) noexcept nogil:
    """out (n) += weight (n, K) x (K), rows of weight contiguous: each row is read once, from its beginning to its end."""
    cdef Py_ssize_t i, kb, k
    cdef vf acc0, acc1  # two chains of additions: one would wait for its own latency
    cdef const float* w
    for i in range(n):
        w = weight + i * K
        acc0 = acc1 = vset(0)
        for kb in range(K // (2 * VL)):
            k = kb * 2 * VL
            acc0 = vfma(vload(x + k), vload(w + k), acc0)
            acc1 = vfma(vload(x + k + VL), vload(w + k + VL), acc1)
        k = K // (2 * VL) * 2 * VL
        acc0 = vfma(part(x + k, K - k), part(w + k, K - k), acc0)
        if K - k > VL:
            acc1 = vfma(part(x + k + VL, K - k - VL), part(w + k + VL, K - k - VL), acc1)
        out[i] += vsum(acc0 + acc1)


cdef void add_scaled_rows(float* out, const float* x, const float* weight, Py_ssize_t n, Py_ssize_t K,
                          Py_ssize_t N) noexcept nogil:
    """out (n) += x (K) weight (K, n), rows of weight N apart."""
    cdef Py_ssize_t k, j, jb
    cdef const float* w
    cdef vf acc
    for k in range(0, K - 3, 4):  # four rows for each pass over out, so that out is read and written a quarter as often
        w = weight + k * N
        for jb in range(n // VL):
            j = jb * VL
            acc = vfma(vset(x[k]), vload(w + j), vload(out + j))
            acc = vfma(vset(x[k + 1]), vload(w + N + j), acc)
            acc = vfma(vset(x[k + 2]), vload(w + 2 * N + j), acc)
            vstore(out + j, vfma(vset(x[k + 3]), vload(w + 3 * N + j), acc))
        for j in range(n // VL * VL, n):
            out[j] = out[j] + x[k] * w[j] + x[k + 1] * w[N + j] + x[k + 2] * w[2 * N + j] + x[k + 3] * w[3 * N + j]
    for k in range(K // 4 * 4, K):
        for j in range(n):
            out[j] = out[j] + x[k] * weight[k * N + j]
