# Sums of gradients: of mini-batches, and the squares that make a norm, in tiles that nobody's number of threads or of
# processes changes.

cdef struct Add:
    float* out
    float* x
    Py_ssize_t n
    bint clear


cdef void add_body(const void* call, const Member* me) noexcept nogil:
    cdef const Add* k = <const Add*>call
    cdef Share vectors = share(me, ceil_div(k.n, VL))
    cdef Py_ssize_t task, i, n
    for task in range(vectors.begin, vectors.end):
        i = task * VL
        n = k.n - i
        put(k.out + i, part(k.out + i, n) + part(k.x + i, n), n)
        if k.clear:
            put(k.x + i, vset(0), n)


def add(cnp.ndarray out, cnp.ndarray x, bint clear, Py_ssize_t n):
    """out (n) += x (n), which is zeroed on the way if clear."""
    cdef Add k
    cdef Arrays args
    args.n = 0
    k.out = output(&args, out, 1, n, "out")
    k.x = output(&args, x, 1, n, "x") if clear else input(&args, x, 1, n, "x")
    k.n, k.clear = n, clear
    check_overlap(&args)
    run(add_body, &k, sizeof(k), 0, n <= SERIAL)


cdef struct Squares:
    double* tiles            # the sum of each tile of SUM_TILE elements
    const float* x
    Py_ssize_t n


cdef void squares_body(const void* call, const Member* me) noexcept nogil:
    cdef const Squares* k = <const Squares*>call
    cdef Share tiles = share(me, ceil_div(k.n, SUM_TILE))
    cdef Py_ssize_t tile
    for tile in range(tiles.begin, tiles.end):
        k.tiles[tile] = tile_of_squares(k.x + tile * SUM_TILE, min(SUM_TILE, k.n - tile * SUM_TILE))


cdef double tile_of_squares(const float* x, Py_ssize_t n) noexcept nogil:
    """The sum of x (n) squared, n <= SUM_TILE, in two chains of float32 vectors."""
    cdef Py_ssize_t i, ib
    cdef vf acc0 = vset(0), acc1 = vset(0), v
    for ib in range(ceil_div(n, 2 * VL)):
        i = ib * 2 * VL
        v = part(x + i, n - i)
        acc0 = vfma(v, v, acc0)
        if n - i > VL:
            v = part(x + i + VL, n - i - VL)
            acc1 = vfma(v, v, acc1)
    return vsum(acc0 + acc1)


def tile_squares(cnp.ndarray out, cnp.ndarray x, Py_ssize_t n):
    """out (ceil(n / SUM_TILE)) float64 = the sum of the squares of each tile of x (n)."""
    cdef Squares k
    cdef Arrays args
    args.n = 0
    k.tiles = <double*>array(&args, out, cnp.NPY_FLOAT64, 1, ceil_div(n, SUM_TILE), "out", True)
    k.x, k.n = input(&args, x, 1, n, "x"), n
    check_overlap(&args)
    run(squares_body, &k, sizeof(k), 0, n <= SERIAL)


def sum_of_squares(cnp.ndarray x, Py_ssize_t n):
    """The sum of x (n) squared, in float64: the square of its norm."""
    cdef Squares k
    cdef Arrays args
    args.n = 0
    cdef Py_ssize_t tiles = ceil_div(n, SUM_TILE), tile
    cdef double total = 0
    k.x, k.n = input(&args, x, 1, n, "x"), n
    if recording() != NULL:
        raise RuntimeError("sum_of_squares returns a number, so it cannot be recorded")
    k.tiles = <double*>scratch(tiles * sizeof(double))
    run(squares_body, &k, sizeof(k), 0, n <= SERIAL)
    for tile in range(tiles):  # in their order, so that the bits do not depend on the threads
        total += k.tiles[tile]
    return total
