# Linear layers: out (rows, N) = x (rows, K) @ weight (K, N) + bias (N), its two gradients, and the product of a single row.

cdef int row_product(const Gemm* g) except -1:
    """M = 1, a token at a time in generation: the speed is that of reading b once, in the order in which it lies."""
    cdef bint alone = g.K * g.N <= SERIAL_WEIGHT
    if g.b.rs == 1:
        return run(row_product_by_columns, g, sizeof(Gemm), 0, alone)
    return run(row_product_by_rows, g, sizeof(Gemm), ceil_div(g.K, ROW_PRODUCT_K) * g.N * sizeof(float), alone)


cdef void row_product_by_columns(const void* call, const Member* me) noexcept nogil:
    """Columns of b are contiguous (tied weights, wte (V, C), read as the head): each element of c is a dot product."""
    cdef const Gemm* g = <const Gemm*>call
    cdef Share tasks = share(me, ceil_div(g.N, ROW_PRODUCT_K))
    cdef Py_ssize_t task, j, first, last
    for task in range(tasks.begin, tasks.end):
        first, last = task * ROW_PRODUCT_K, min(g.N, (task + 1) * ROW_PRODUCT_K)
        for j in range(first, last):
            g.out.c[j] = ((g.out.start[j] if g.out.start != NULL else 0)
                          + (g.out.bias[j] if g.out.bias != NULL else 0))
        add_dot_rows(g.out.c + first, g.a.data, g.b.data + first * g.b.cs, last - first, g.K)


cdef void row_product_by_rows(const void* call, const Member* me) noexcept nogil:
    """Rows of b are contiguous: a task adds up ROW_PRODUCT_K of them, and the tasks' sums are added in their order, so
    that the bits do not depend on the threads."""
    cdef const Gemm* g = <const Gemm*>call
    cdef Py_ssize_t tiles = ceil_div(g.K, ROW_PRODUCT_K), tile, j, jb, k
    cdef float* sums = <float*>me.work  # (tiles, N)
    cdef Share mine = share(me, tiles)
    cdef vf acc
    for tile in range(mine.begin, mine.end):
        memset(sums + tile * g.N, 0, g.N * sizeof(float))
        k = tile * ROW_PRODUCT_K
        add_scaled_rows(sums + tile * g.N, g.a.data + k, g.b.data + k * g.N, g.N, min(ROW_PRODUCT_K, g.K - k), g.N)
    barrier(me)
    mine = share(me, ceil_div(g.N, VL))
    for jb in range(mine.begin, mine.end):
        j = jb * VL
        acc = part(g.out.start + j, g.N - j) if g.out.start != NULL else vset(0)
        if g.out.bias != NULL:
            acc = acc + part(g.out.bias + j, g.N - j)
        for tile in range(tiles):
            acc = acc + part(sums + tile * g.N + j, g.N - j)
        put(g.out.c + j, acc, g.N - j)


def linear_forward(cnp.ndarray out, cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, cnp.ndarray residual,
                   Py_ssize_t rows, Py_ssize_t K, Py_ssize_t N, bint bf16=False):
    """out (rows, N) = residual (rows, N) + (x (rows, K) @ weight (K, N) + bias (N)); bias and residual may be None."""
    cdef Arrays args
    cdef Gemm g
    args.n = 0
    g.out.c, g.out.ld = output(&args, out, rows, N, "out"), N
    g.a = rows_of_length(input(&args, x, rows, K, "x"), K)
    g.b = rows_of_length(input(&args, weight, K, N, "weight"), N)
    g.out.bias = optional(&args, bias, 1, N, "bias")
    g.out.start = optional(&args, residual, rows, N, "residual")
    check_overlap(&args)
    g.column_sums, g.M, g.N, g.K, g.bf16 = NULL, rows, N, K, bf16
    run_gemm(&g)


def linear_backward_input(cnp.ndarray dx, cnp.ndarray dout, cnp.ndarray weight, Py_ssize_t rows, Py_ssize_t K,
                          Py_ssize_t N, bint bf16=False):
    """dx (rows, K) = dout (rows, N) @ weight (K, N)^T."""
    # out = x @ weight + bias   ->   dx = dout @ weight^T
    cdef Arrays args
    cdef Gemm g
    args.n = 0
    g.out = Output(c=output(&args, dx, rows, K, "dx"), start=NULL, bias=NULL, ld=K)
    g.a = rows_of_length(input(&args, dout, rows, N, "dout"), N)
    g.b = transpose(rows_of_length(input(&args, weight, K, N, "weight"), N))
    check_overlap(&args)
    g.column_sums, g.M, g.N, g.K, g.bf16 = NULL, rows, K, N, bf16
    run_gemm(&g)


def linear_backward_weight(cnp.ndarray dweight, cnp.ndarray dbias, cnp.ndarray dout, cnp.ndarray x,
                           Py_ssize_t rows, Py_ssize_t K, Py_ssize_t N, bint bf16=False):
    """dweight (K, N) += x (rows, K)^T @ dout (rows, N);  dbias (N), which may be None, += the column sums of dout."""
    # out = x @ weight + bias   ->   dweight = x^T @ dout, dbias = the sum of dout over the rows
    cdef Arrays args
    cdef Gemm g
    args.n = 0
    g.out.c, g.out.ld, g.out.bias = output(&args, dweight, K, N, "dweight"), N, NULL
    g.out.start = g.out.c
    g.column_sums = optional_output(&args, dbias, 1, N, "dbias")
    g.b = rows_of_length(input(&args, dout, rows, N, "dout"), N)
    g.a = transpose(rows_of_length(input(&args, x, rows, K, "x"), K))
    check_overlap(&args)
    g.M, g.N, g.K, g.bf16 = K, N, rows, bf16
    run_gemm(&g)
