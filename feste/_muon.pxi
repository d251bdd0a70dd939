# Muon: a matrix is updated by its momentum made orthogonal, so that all directions are learned at the same rate. Jordan
# et al. 2024, https://kellerjordan.github.io/posts/muon.
#
# There X (r, c) becomes (X X^T)^-1/2 X by five Newton-Schulz iterations, 21 products of r x r for a square matrix. Here
# it becomes L^-1 X with L L^T = X X^T (Cholesky), whose rows are as orthogonal: one product and one triangular solve.
# What was measured of both stands in docs/LEARNING.md.
#
# A task is one matrix, from its momentum to its update, so nothing depends on the number of threads. It works in tiles of
# the GEMM: the upper triangle of X X^T in squares of NR, in the lower one -L grows, and the solve takes NR columns of X
# at a time, MR rows by MR rows: the product with the rows above, which is micro_kernel's, and a triangle of MR.

cdef float MUON_DAMPING = 1e-3  # of the mean square of the rows, added to X X^T: what has no gradient is not blown up


cdef struct Muon:
    float* param
    float* m
    float* grad
    const int32_t* matrices  # (count, 4): offset, rows K, columns N, length of a row
    double learning_rate, momentum, weight_decay, grad_scale
    Py_ssize_t count, n
    bint cautious, zero_grad


cdef struct Momentum:        # of one matrix, as a task works on it
    Py_ssize_t offset, K, N, ld
    Py_ssize_t r, c          # those of X: the shorter side first
    Py_ssize_t rp            # r in whole panels
    float* u                 # (K, N), X or its transpose: momentum at first, the update in the end
    float* gram              # (rp + MR, rp): X X^T above the diagonal, -L below
    float* inverse           # (rp): 1 / the diagonal of L
    float* panels            # [rp / NR][KC][NR] and a strip more: X^T, a block of columns of X at a time
    float* solved            # (rp + MR, NR): some columns of X on their way to L^-1 X


cdef Momentum momentum_of(const int32_t* matrix, float* work) noexcept nogil:
    """A matrix, with work (momentum_size) divided among its arrays."""
    cdef Momentum x
    x.offset, x.K, x.N, x.ld = matrix[0], matrix[1], matrix[2], matrix[3]
    x.r, x.c = min(x.K, x.N), max(x.K, x.N)
    x.rp = ceil_div(x.r, NR) * NR
    x.u = work
    x.gram = x.u + ceil_div(x.K * x.N, NR) * NR
    x.inverse = x.gram + (x.rp + MR) * x.rp
    x.panels = x.inverse + x.rp
    x.solved = x.panels + x.rp * KC + MR
    return x


cdef Py_ssize_t momentum_size(Py_ssize_t K, Py_ssize_t N) noexcept nogil:
    """Floats of a task's work space."""
    cdef Py_ssize_t rp = ceil_div(min(K, N), NR) * NR
    return ceil_div(K * N, NR) * NR + (rp + MR) * rp + rp + rp * KC + MR + (rp + MR) * NR


cdef inline Matrix x_of(const Momentum* x) noexcept nogil:
    """X (r, c): a square is transposed, so that its rows are those of [out, in]."""
    cdef Matrix u = rows_of_length(x.u, x.N)
    return transpose(u) if x.N <= x.K else u


cdef void accumulate_momentum(const Muon* k, const Momentum* x) noexcept nogil:
    """m = momentum m + (1 - momentum) g, and u, the same once more (Nesterov)."""
    cdef vf keep = vset(<float>k.momentum), take = vset(<float>((1 - k.momentum) * k.grad_scale)), g, m
    cdef Py_ssize_t i, j, jb, n, at
    for i in range(x.K):
        for jb in range(ceil_div(x.N, VL)):
            j = jb * VL
            n, at = x.N - j, x.offset + i * x.ld + j
            g = take * part(k.grad + at, n)
            m = vfma(keep, part(k.m + at, n), g)
            put(k.m + at, m, n)
            put(x.u + i * x.N + j, vfma(keep, m, g), n)
            if k.zero_grad:
                put(k.grad + at, vset(0), n)


cdef void gram_matrix(const Momentum* x) noexcept nogil:
    """The upper triangle of X X^T in squares of NR, with the damping on its diagonal, and ones behind its end."""
    cdef Py_ssize_t pb, p, kc, i, j
    cdef float trace = 0
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
                macro_kernel(out, Strips(data=x.panels + i * panels.ps, ps=MR, rs=1, cs=NR),
                             Panels(data=x.panels + j * panels.ps, ps=0), NR, NR, kc, False)
    for i in range(x.r):
        trace += x.gram[i * x.rp + i]
    for i in range(x.rp):
        x.gram[i * x.rp + i] = x.gram[i * x.rp + i] + MUON_DAMPING * trace / x.r + FLT_MIN if i < x.r else 1


cdef void solve_panel(float* y, const float* lower, const float* inverse, Py_ssize_t ld, Py_ssize_t rows) noexcept nogil:
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
                vstore(y + t * NR + v * VL, acc * vset(inverse[t]))


cdef void factorise(const Momentum* x) noexcept nogil:
    """L L^T = X X^T: -L below the diagonal of gram, and the inverse of its diagonal, NR rows at a time."""
    cdef Py_ssize_t jb, j, t, k, ld = x.rp
    cdef float* square  # the part of the diagonal
    cdef float* y = x.solved
    cdef Output out
    for jb in range(x.rp // NR):
        j = jb * NR
        square = x.gram + j * ld + j
        if j > 0:  # the rows j .. j + NR of L before that: L' L_j^T = (X X^T)_j, L' the rows above
            for k in range(j):
                memcpy(y + k * NR, x.gram + k * ld + j, NR * sizeof(float))
            solve_panel(y, x.gram, x.inverse, ld, j)
            for t in range(NR):
                for k in range(j):
                    x.gram[(j + t) * ld + k] = -y[k * NR + t]
            out = written(square, ld)
            out.start = out.c
            macro_kernel(out, Strips(data=x.gram + j * ld, ps=MR * ld, rs=ld, cs=1), Panels(data=y, ps=0), NR, NR, j, False)
        factorise_square(square, x.inverse + j, ld)


cdef void factorise_square(float* a, float* inverse, Py_ssize_t ld) noexcept nogil:
    """L L^T = a (NR, NR), of which the upper triangle is read: -L below the diagonal, and the inverse of its diagonal."""
    cdef Py_ssize_t t, s, v
    cdef float* row
    for t in range(NR):
        row = a + t * ld
        inverse[t] = 1 / sqrtf(row[t] if row[t] > FLT_MIN else FLT_MIN)
        scale_row(row, inverse[t], NR)  # row t of L^T; what is left of the diagonal is not read again
        for s in range(t + 1, NR):
            for v in range(NV):
                vstore(a + s * ld + v * VL, vload(a + s * ld + v * VL) - vset(row[s]) * vload(row + v * VL))
    for t in range(NR):
        for s in range(t):
            a[t * ld + s] = -a[s * ld + t]


cdef void orthogonalise(const Momentum* x) noexcept nogil:
    """X = L^-1 X, some columns at a time."""
    cdef Py_ssize_t jb, j, i, jj, n
    cdef Matrix of
    cdef float* out
    for jb in range(ceil_div(x.c, NR)):
        j = jb * NR
        n, of = min(NR, x.c - j), matrix_at(x_of(x), 0, j)
        pack_panels(Panels(data=x.solved, ps=0), NULL, of, x.r, n)
        solve_panel(x.solved, x.gram, x.inverse, x.rp, x.r)
        out = <float*>of.data
        for i in range(x.r if of.cs == 1 else 0):
            memcpy(out + i * of.rs, x.solved + i * NR, n * sizeof(float))
        for jj in range(n if of.cs != 1 else 0):
            for i in range(x.r):
                out[jj * of.cs + i] = x.solved[i * NR + jj]


cdef void apply_update(const Muon* k, const Momentum* x) noexcept nogil:
    """param = (1 - rate * decay) param - rate * sqrt(max(1, N / K)) u."""
    cdef vf rate = vset(<float>(k.learning_rate * sqrt(max(1.0, <double>x.N / x.K))))
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
    cdef Py_ssize_t task = next_task(me)
    cdef Momentum x
    while task < k.count:
        x = momentum_of(k.matrices + 4 * task, work)
        accumulate_momentum(k, &x)
        gram_matrix(&x)
        factorise(&x)
        orthogonalise(&x)
        apply_update(k, &x)
        task = next_task(me)


cdef Py_ssize_t muon_size(const Muon* k) noexcept nogil:
    """Floats of a member's work space: that of the largest matrix, and whole cache lines."""
    cdef Py_ssize_t i, size = 0
    for i in range(k.count):
        size = max(size, momentum_size(k.matrices[4 * i + 1], k.matrices[4 * i + 2]))
    return ceil_div(size, 16) * 16


def muon_update(cnp.ndarray param, cnp.ndarray m, cnp.ndarray grad, cnp.ndarray matrices, double learning_rate,
                double momentum, double weight_decay, bint cautious, double grad_scale, bint zero_grad, Py_ssize_t count,
                Py_ssize_t n):
    """One Muon update of some matrices that lie in param (n), with their momentum in m (n), in place. Jordan et al. 2024.

    matrices (count, 4) int32: where each begins, its rows K (in) and columns N (out), and the length of a row of the
    array that it is a part of; they must not overlap. grad (n) is multiplied by grad_scale first and, if zero_grad, the
    part of it that belongs to the matrices is zeroed afterwards.
    """
    cdef Muon k
    cdef Arrays args
    cdef Py_ssize_t i
    args.n = 0
    k.param = output(&args, param, 1, n, "param")
    k.m = output(&args, m, 1, n, "m")
    k.grad = output(&args, grad, 1, n, "grad")
    k.matrices = <int32_t*>array(&args, matrices, cnp.NPY_INT32, count, 4, "matrices", False)
    k.learning_rate, k.momentum, k.weight_decay, k.grad_scale = learning_rate, momentum, weight_decay, grad_scale
    k.count, k.n, k.cautious, k.zero_grad = count, n, cautious, zero_grad
    check_overlap(&args)
    for i in range(count):
        offset, K, N, ld = [k.matrices[4 * i + part] for part in range(4)]
        if offset < 0 or K < 1 or N < 1 or N > ld or offset + (K - 1) * ld + N > n:
            raise ValueError(f"matrix {i} of {K} x {N} elements at {offset}, rows {ld} apart, does not lie within {n}")
    run(muon_body, &k, sizeof(k), n_threads * muon_size(&k) * sizeof(float), False)
