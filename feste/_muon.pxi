# Muon: a matrix is updated by its momentum made orthogonal, so that all directions are learned at the same rate. Jordan
# et al. 2024, https://kellerjordan.github.io/posts/muon.
#
# X (r, c), r <= c, becomes (X X^T)^-1/2 X. There five Newton-Schulz iterations do it, some 21 products of r x r where X
# is square, of the kind of which X X^T is one. Here the inverse root is a sum of two inverses,
#
#     s^-1/2 = w0 (s + p0)^-1 + w1 (s + p1)^-1  within 15 %, for singular values from 1 down to 0.01 of X / |X|,
#
# of which each takes no more than one product: a Cholesky factor, its inverse, and the square of that. What was measured
# of this and other ways stands in docs/LEARNING.md.
#
# A task is one matrix, from its momentum to its update, so nothing depends on the number of threads. It works in tiles of
# the GEMM: squares of NR above the diagonal of what is symmetric; and a solve takes NR columns at a time, MR rows by MR
# rows: the product with the rows above, which is micro_kernel's, and a triangle of MR.

cdef enum:
    POLES = 2
    MUON_ROW = 5  # numbers of a matrix in the table of matrices

cdef float[POLES] POLE_WEIGHT = [0.04471, 0.99472]
cdef float[POLES] POLE_SHIFT = [0.0004537, 0.2245848]


cdef struct Muon:
    float* param
    float* m
    float* grad
    const int32_t* matrices  # (count, 5): offset, rows K, columns N, length of a row, offset of the momentum
    double learning_rate, momentum, weight_decay, grad_scale
    Py_ssize_t count, n
    bint cautious, zero_grad


cdef struct Momentum:        # of one matrix, as a task works on it
    Py_ssize_t offset, K, N, ld
    Py_ssize_t m_offset
    Py_ssize_t r, c          # those of X: the shorter side first
    Py_ssize_t rp            # r in whole panels
    float norm               # |X|
    float* u                 # (K, N), X or its transpose: momentum at first, the update in the end
    float* gram              # (rp, rp): X X^T / |X|^2 above the diagonal
    float* root              # (rp, rp): its inverse root
    float* lower             # (rp + MR, rp): -L below the diagonal, L L^T = gram + a pole
    float* reciprocal        # (rp): 1 / the diagonal of L
    float* panels            # [rp / NR][KC or rp + MR][NR] and a strip more: X^T, some columns of X at a time; L^-1
    float* columns           # (rp + MR, NR): some columns on their way


cdef Momentum momentum_of(const int32_t* matrix, float* work) noexcept nogil:
    """A matrix, with work (momentum_size) divided among its arrays."""
    cdef Momentum x
    x.offset, x.K, x.N, x.ld, x.m_offset = matrix[0], matrix[1], matrix[2], matrix[3], matrix[4]
    x.r, x.c, x.norm = min(x.K, x.N), max(x.K, x.N), 1
    x.rp = ceil_div(x.r, NR) * NR
    x.u = work
    x.gram = x.u + ceil_div(x.K * x.N, NR) * NR
    x.root = x.gram + x.rp * x.rp
    x.lower = x.root + x.rp * x.rp
    x.reciprocal = x.lower + (x.rp + MR) * x.rp
    x.panels = x.reciprocal + x.rp
    x.columns = x.panels + x.rp * max(KC, x.rp + MR) + MR
    return x


cdef Py_ssize_t momentum_size(Py_ssize_t K, Py_ssize_t N) noexcept nogil:
    """Floats of a task's work space."""
    cdef Py_ssize_t rp = ceil_div(min(K, N), NR) * NR
    return (ceil_div(K * N, NR) * NR + 2 * rp * rp + (rp + MR) * rp + rp + rp * max(KC, rp + MR) + MR + (rp + MR) * NR)


cdef inline Matrix x_of(const Momentum* x) noexcept nogil:
    """X (r, c): a square is transposed, so that its rows are those of [out, in]."""
    cdef Matrix u = rows_of_length(x.u, x.N)
    return transpose(u) if x.N <= x.K else u


cdef void accumulate_momentum(const Muon* k, const Momentum* x) noexcept nogil:
    """m = momentum m + (1 - momentum) g, and u, the same once more (Nesterov)."""
    cdef vf keep = vset(<float>k.momentum), take = vset(<float>((1 - k.momentum) * k.grad_scale)), g, m
    cdef Py_ssize_t i, j, jb, n, at, m_at
    for i in range(x.K):
        for jb in range(ceil_div(x.N, VL)):
            j = jb * VL
            n, at, m_at = x.N - j, x.offset + i * x.ld + j, x.m_offset + i * x.ld + j
            g = take * part(k.grad + at, n)
            m = vfma(keep, part(k.m + m_at, n), g)
            put(k.m + m_at, m, n)
            put(x.u + i * x.N + j, vfma(keep, m, g), n)
            if k.zero_grad:
                put(k.grad + at, vset(0), n)


cdef void gram_matrix(Momentum* x) noexcept nogil:
    """The upper triangle of X X^T / |X|^2 in squares of NR, and |X|."""
    cdef Py_ssize_t pb, p, kc, i, j
    cdef double trace = 0
    cdef Panels panels
    cdef Output out
    for pb in range(ceil_div(x.c, KC)):
        p = pb * KC
        kc = min(KC, x.c - p)
        panels = Panels(data=x.panels, ps=NR * kc)
        pack_panels(panels, NULL, transpose(matrix_at(x_of(x), 0, p)), kc, x.r)
        for j in range(x.rp // NR):
            for i in range(j + 1):
                out = written(x.gram + i * NR * x.rp + j * NR, x.rp)
                if pb > 0:
                    out.start = out.c
                product_of_panels(out, panels, i, j, 0, kc)
    for i in range(x.r):
        trace += x.gram[i * x.rp + i]
    if trace > FLT_MIN:
        x.norm = <float>sqrt(trace)
    for i in range(x.rp):
        scale_row(x.gram + i * x.rp, 1 / (x.norm * x.norm), x.rp)


cdef inline void product_of_panels(Output out, Panels panels, Py_ssize_t i, Py_ssize_t j, Py_ssize_t first,
                                   Py_ssize_t end) noexcept nogil:
    """c (NR, NR) = panel i (first .. end, NR)^T times panel j, rows first .. end of both."""
    macro_kernel(out, Strips(data=panels.data + i * panels.ps + first * NR, ps=MR, rs=1, cs=NR),
                 Panels(data=panels.data + j * panels.ps + first * NR, ps=0), NR, NR, end - first, False)


cdef void inverse_root(const Momentum* x) noexcept nogil:
    """root (rp, rp) = the sum of POLE_WEIGHT (gram + POLE_SHIFT)^-1, all of it."""
    cdef Py_ssize_t pole, i, j
    cdef Panels inverse = Panels(data=x.panels, ps=(x.rp + MR) * NR)
    cdef Output out
    for pole in range(POLES):
        for i in range(x.rp):
            memcpy(x.lower + i * x.rp + i, x.gram + i * x.rp + i, (x.rp - i) * sizeof(float))
            x.lower[i * x.rp + i] += POLE_SHIFT[pole]
        factorise(x)
        for j in range(x.rp // NR):
            invert_columns(inverse.data + j * inverse.ps, x, j * NR, sqrtf(POLE_WEIGHT[pole]))
            for i in range(j + 1):  # L^-T L^-1, whose columns j begin at row j
                out = written(x.root + i * NR * x.rp + j * NR, x.rp)
                if pole > 0:
                    out.start = out.c
                product_of_panels(out, inverse, i, j, j * NR, x.rp)
    for i in range(x.rp):
        for j in range(i):
            x.root[i * x.rp + j] = x.root[j * x.rp + i]


cdef void factorise(const Momentum* x) noexcept nogil:
    """L L^T = the upper triangle of lower: -L below the diagonal, and the inverse of its diagonal, NR rows at a time."""
    cdef Py_ssize_t jb, j, t, k, ld = x.rp
    cdef float* square  # the part of the diagonal
    cdef float* y = x.columns
    cdef Output out
    for jb in range(x.rp // NR):
        j = jb * NR
        square = x.lower + j * ld + j
        if j > 0:  # the rows j .. j + NR of L before that: L' L_j^T = the columns j, L' the rows above
            for k in range(j):
                memcpy(y + k * NR, x.lower + k * ld + j, NR * sizeof(float))
            solve(y, x.lower, x.reciprocal, ld, j)
            for t in range(NR):
                for k in range(j):
                    x.lower[(j + t) * ld + k] = -y[k * NR + t]
            out = written(square, ld)
            out.start = out.c
            macro_kernel(out, Strips(data=x.lower + j * ld, ps=MR * ld, rs=ld, cs=1), Panels(data=y, ps=0), NR, NR, j,
                         False)
        factorise_square(square, x.reciprocal + j, ld)


cdef void factorise_square(float* a, float* reciprocal, Py_ssize_t ld) noexcept nogil:
    """L L^T = a (NR, NR), of which the upper triangle is read: -L below the diagonal, and the inverse of its diagonal."""
    cdef Py_ssize_t t, s, v
    cdef float* row
    for t in range(NR):
        row = a + t * ld
        reciprocal[t] = 1 / sqrtf(row[t] if row[t] > FLT_MIN else FLT_MIN)
        scale_row(row, reciprocal[t], NR)  # row t of L^T; what is left of the diagonal is not read again
        for s in range(t + 1, NR):
            for v in range(NV):
                vstore(a + s * ld + v * VL, vload(a + s * ld + v * VL) - vset(row[s]) * vload(row + v * VL))
    for t in range(NR):
        for s in range(t):
            a[t * ld + s] = -a[s * ld + t]


cdef void solve(float* y, const float* lower, const float* reciprocal, Py_ssize_t ld, Py_ssize_t rows) noexcept nogil:
    """y (rows, NR) = L^-1 y, from -L (rows, ld) below the diagonal and the inverse of the diagonal; y has MR rows more."""
    cdef Py_ssize_t strip, i, t, s, v
    cdef vf acc
    cdef Output out
    for strip in range(ceil_div(rows, MR)):
        i = strip * MR
        if i > 0:
            out = written(y + i * NR, NR)
            out.start = out.c
            micro_kernel(out, Strips(data=lower + i * ld, ps=0, rs=ld, cs=1), y, i)
        for t in range(i, min(i + MR, rows)):
            for v in range(NV):
                acc = vload(y + t * NR + v * VL)
                for s in range(i, t):
                    acc = vfma(vset(lower[t * ld + s]), vload(y + s * NR + v * VL), acc)
                vstore(y + t * NR + v * VL, acc * vset(reciprocal[t]))


cdef void invert_columns(float* panel, const Momentum* x, Py_ssize_t j, float scale) noexcept nogil:
    """Columns j .. j + NR of scale * L^-1, as a panel (rp + MR, NR) whose rows above j are not written."""
    cdef Py_ssize_t t
    memset(panel + j * NR, 0, (x.rp + MR - j) * NR * sizeof(float))
    for t in range(NR):
        panel[(j + t) * NR + t] = scale
    solve(panel + j * NR, x.lower + j * x.rp + j, x.reciprocal + j, x.rp, x.rp - j)


cdef void multiply_root(const Momentum* x) noexcept nogil:
    """X = root X, some columns at a time."""
    cdef Py_ssize_t jb, i, j, n
    cdef Matrix of
    cdef float* out
    for jb in range(ceil_div(x.c, NR)):
        n, of = min(NR, x.c - jb * NR), matrix_at(x_of(x), 0, jb * NR)
        pack_panels(Panels(data=x.panels, ps=0), NULL, of, x.r, n)
        macro_kernel(written(x.columns, NR), Strips(data=x.root, ps=MR * x.rp, rs=x.rp, cs=1),
                     Panels(data=x.panels, ps=0), x.r, NR, x.r, False)
        out = <float*>of.data
        for i in range(x.r if of.cs == 1 else 0):
            memcpy(out + i * of.rs, x.columns + i * NR, n * sizeof(float))
        for j in range(n if of.cs != 1 else 0):
            for i in range(x.r):
                out[j * of.cs + i] = x.columns[i * NR + j]


cdef void apply_update(const Muon* k, const Momentum* x) noexcept nogil:
    """param = (1 - rate * decay) param - rate * sqrt(max(1, N / K)) u."""
    cdef vf rate = vset(<float>(k.learning_rate * sqrt(max(1.0, <double>x.N / x.K)) / x.norm))
    cdef vf shrink = vset(<float>(k.learning_rate * k.weight_decay)), u, p
    cdef Py_ssize_t i, j, jb, n, at
    for i in range(x.K):
        for jb in range(ceil_div(x.N, VL)):
            j = jb * VL
            n, at = x.N - j, x.offset + i * x.ld + j
            u, p = part(x.u + i * x.N + j, n), part(k.param + at, n)
            put(k.param + at, p - decayed(p, u, shrink, k.cautious) - rate * u, n)


cdef void muon_body(const void* call, const Member* me) noexcept nogil:
    cdef const Muon* k = <const Muon*>call
    cdef float* work = <float*>me.work + me.thread * muon_size(k)
    cdef Py_ssize_t task = next_task(me, k.count)
    cdef Momentum x
    while task < k.count:
        x = momentum_of(k.matrices + MUON_ROW * task, work)
        accumulate_momentum(k, &x)
        gram_matrix(&x)
        inverse_root(&x)
        multiply_root(&x)
        apply_update(k, &x)
        task = next_task(me, k.count)


cdef Py_ssize_t muon_size(const Muon* k) noexcept nogil:
    """Floats of a member's work space: that of the largest matrix, and whole cache lines."""
    cdef Py_ssize_t i, size = 0
    for i in range(k.count):
        size = max(size, momentum_size(k.matrices[MUON_ROW * i + 1], k.matrices[MUON_ROW * i + 2]))
    return ceil_div(size, 16) * 16


def muon_update(cnp.ndarray param, cnp.ndarray m, cnp.ndarray grad, cnp.ndarray matrices, double learning_rate,
                double momentum, double weight_decay, bint cautious, double grad_scale, bint zero_grad, Py_ssize_t count,
                Py_ssize_t n, Py_ssize_t n_m):
    """One Muon update of some matrices that lie in param (n), with their momentum in m (n_m), in place.

    Jordan et al. 2024. matrices (count, 5) int32: where each begins, its rows K (in) and columns N (out), the length of a
    row of the array that it is a part of, and where its momentum begins, whose rows are as long; they must not overlap.
    grad (n) is multiplied by grad_scale first and, if zero_grad, the part of it that belongs to the matrices is zeroed
    afterwards.
    """
    cdef Muon k
    cdef Arrays args
    cdef Py_ssize_t i
    args.n = 0
    k.param = output(&args, param, 1, n, "param")
    k.m = output(&args, m, 1, n_m, "m")
    k.grad = output(&args, grad, 1, n, "grad")
    k.matrices = <int32_t*>array(&args, matrices, cnp.NPY_INT32, count, MUON_ROW, "matrices", False)
    k.learning_rate, k.momentum, k.weight_decay, k.grad_scale = learning_rate, momentum, weight_decay, grad_scale
    k.count, k.n, k.cautious, k.zero_grad = count, n, cautious, zero_grad
    check_overlap(&args)
    for i in range(count):
        offset, K, N, ld, m_offset = [k.matrices[MUON_ROW * i + part] for part in range(MUON_ROW)]
        if min(offset, m_offset) < 0 or K < 1 or N < 1 or N > ld or offset + (K - 1) * ld + N > n \
                or m_offset + (K - 1) * ld + N > n_m:
            raise ValueError(f"matrix {i} of {K} x {N} elements at {offset} and {m_offset}, rows {ld} apart, does not "
                             f"lie within {n} and {n_m}")
    run(muon_body, &k, sizeof(k), n_threads * muon_size(&k) * sizeof(float), False)
