# Embedding: a token's row of wte (V, C) plus its position's row of wpe (block_size, C).

def embedding_forward(cnp.ndarray out, cnp.ndarray ids, cnp.ndarray wte, cnp.ndarray wpe, Py_ssize_t B,
                      Py_ssize_t T, Py_ssize_t C, Py_ssize_t position=0):
    """out (B, T, C) = wte[ids] (V, C) + wpe[position + t] (block_size, C); ids (B, T) in 0 .. V - 1."""
    cdef Py_ssize_t V = rows_of(wte, C, "wte"), block_size = rows_of(wpe, C, "wpe")
    cdef Arrays args
    args.n = 0
    cdef float* o = output(&args, out, B * T, C, "out")
    cdef const float* te = input(&args, wte, V, C, "wte")
    cdef const float* pe = input(&args, wpe, block_size, C, "wpe")
    cdef const int32_t* token = index(&args, ids, B, T, V, "ids")
    cdef Py_ssize_t i
    if position < 0 or position + T > block_size:
        raise ValueError(f"positions {position} .. {position + T - 1} lie outside wpe's 0 .. {block_size - 1}")
    check_overlap(&args)
    for i in prange(B * T, nogil=True, schedule='static', num_threads=n_threads, use_threads_if=B * T * C > SERIAL):
        embedding_row(o + i * C, te + token[i] * C, pe + (position + i % T) * C, C)


cdef inline void embedding_row(float* out, const float* te, const float* pe, Py_ssize_t C) noexcept nogil:
    """out (C) = te (C) + pe (C)."""
    cdef Py_ssize_t j, jb
    for jb in range(ceil_div(C, VL)):
        j = jb * VL
        put(out + j, part(te + j, C - j) + part(pe + j, C - j), C - j)


def embedding_backward(cnp.ndarray dwte, cnp.ndarray dwpe, cnp.ndarray dout, cnp.ndarray ids, Py_ssize_t B,
                       Py_ssize_t T, Py_ssize_t C):
    """dwte[ids] (V, C) += dout (B, T, C), once for each occurrence of a token;  dwpe[t] (block_size, C) += dout.

    A token may stand anywhere in the batch, so that tasks which took tokens would need locks. A task takes VL channels of
    all tokens instead, in their order: no two threads write one element, and the bits do not depend on their number.
    """
    # out[b, t] = wte[ids[b, t]] + wpe[t]   ->   dwte[ids[b, t]] += dout[b, t], dwpe[t] += dout[b, t]
    cdef Py_ssize_t V = rows_of(dwte, C, "dwte"), block_size = rows_of(dwpe, C, "dwpe")
    cdef Arrays args
    args.n = 0
    cdef float* te = output(&args, dwte, V, C, "dwte")
    cdef float* pe = output(&args, dwpe, block_size, C, "dwpe")
    cdef const float* do = input(&args, dout, B * T, C, "dout")
    cdef const int32_t* token = index(&args, ids, B, T, V, "ids")
    cdef Py_ssize_t task, i, j
    cdef float* row
    cdef vf grad
    if T > block_size:
        raise ValueError(f"{T} positions do not fit the {block_size} rows of dwpe")
    check_overlap(&args)
    for task in prange(ceil_div(C, VL), nogil=True, schedule='static', num_threads=n_threads,
                       use_threads_if=B * T * C > SERIAL):
        j = task * VL
        for i in range(B * T):
            grad = part(do + i * C + j, C - j)
            row = te + token[i] * C + j
            put(row, part(row, C - j) + grad, C - j)
            row = pe + i % T * C + j
            put(row, part(row, C - j) + grad, C - j)
