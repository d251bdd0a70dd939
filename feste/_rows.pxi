# Some rows of an array: the head is asked only for the tokens that the loss counts.

cdef struct Rows:
    float* out
    const float* x
    const int32_t* index
    Py_ssize_t n, rows, C


cdef void gather_rows_body(const void* call, const Member* me) noexcept nogil:
    cdef const Rows* k = <const Rows*>call
    cdef Share mine = share(me, k.n)
    cdef Py_ssize_t i
    for i in range(mine.begin, mine.end):
        memcpy(k.out + i * k.C, k.x + k.index[i] * k.C, k.C * sizeof(float))


def gather_rows(cnp.ndarray out, cnp.ndarray x, cnp.ndarray index, Py_ssize_t n, Py_ssize_t rows, Py_ssize_t C):
    """out (n, C) = x (rows, C)[index (n)]."""
    cdef Rows k
    cdef Arrays args
    args.n = 0
    k.out = output(&args, out, n, C, "out")
    k.x = input(&args, x, rows, C, "x")
    k.index = indices(&args, index, 1, n, rows, "index")
    k.n, k.rows, k.C = n, rows, C
    check_overlap(&args)
    run(gather_rows_body, &k, sizeof(k), 0, n * C <= SERIAL)


cdef void scatter_rows_body(const void* call, const Member* me) noexcept nogil:
    """Each member zeroes its share of the rows, and fills those of them that the index names."""
    cdef const Rows* k = <const Rows*>call
    cdef Share mine = share(me, k.rows)
    cdef Py_ssize_t i
    memset(k.out + mine.begin * k.C, 0, (mine.end - mine.begin) * k.C * sizeof(float))
    for i in range(k.n):
        if mine.begin <= k.index[i] < mine.end:
            memcpy(k.out + k.index[i] * k.C, k.x + i * k.C, k.C * sizeof(float))


def scatter_rows(cnp.ndarray out, cnp.ndarray x, cnp.ndarray index, Py_ssize_t n, Py_ssize_t rows, Py_ssize_t C):
    """out (rows, C) = 0, but out[index (n)] = x (n, C): the gradient of gather_rows where no row is named twice."""
    # kept = x[index]   ->   dx = 0, dx[index] = dkept
    cdef Rows k
    cdef Arrays args
    args.n = 0
    k.out = output(&args, out, rows, C, "out")
    k.x = input(&args, x, n, C, "x")
    k.index = indices(&args, index, 1, n, rows, "index")
    k.n, k.rows, k.C = n, rows, C
    check_overlap(&args)
    run(scatter_rows_body, &k, sizeof(k), 0, rows * C <= SERIAL)
