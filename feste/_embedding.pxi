# Embedding: a token's row of wte (V, C) plus, if positions are learned, its position's row of wpe (block_size, C).

cdef struct EmbeddingForward:
    float* out
    const float* wte
    const float* wpe         # or NULL
    const int32_t* ids
    Py_ssize_t B, T, C, position


cdef void embedding_forward_body(const void* call, const Member* me) noexcept nogil:
    cdef const EmbeddingForward* k = <const EmbeddingForward*>call
    cdef Share rows = share(me, k.B * k.T)
    cdef Py_ssize_t i
    for i in range(rows.begin, rows.end):
        if k.wpe == NULL:
            memcpy(k.out + i * k.C, k.wte + k.ids[i] * k.C, k.C * sizeof(float))
        else:
            embedding_row(k.out + i * k.C, k.wte + k.ids[i] * k.C, k.wpe + (k.position + i % k.T) * k.C, k.C)


def embedding_forward(cnp.ndarray out, cnp.ndarray ids, cnp.ndarray wte, cnp.ndarray wpe, Py_ssize_t B,
                      Py_ssize_t T, Py_ssize_t C, Py_ssize_t position=0):
    """out (B, T, C) = wte[ids] (V, C) + wpe[position + t] (block_size, C); ids (B, T) in 0 .. V - 1. wpe may be None."""
    cdef Py_ssize_t V = rows_of(wte, C, "wte"), block_size = position + T if wpe is None else rows_of(wpe, C, "wpe")
    cdef EmbeddingForward k
    cdef Arrays args
    args.n = 0
    k.out = output(&args, out, B * T, C, "out")
    k.wte = input(&args, wte, V, C, "wte")
    k.wpe = optional(&args, wpe, block_size, C, "wpe")
    k.ids = indices(&args, ids, B, T, V, "ids")
    k.B, k.T, k.C, k.position = B, T, C, position
    if position < 0 or position + T > block_size:
        raise ValueError(f"positions {position} .. {position + T - 1} lie outside wpe's 0 .. {block_size - 1}")
    check_overlap(&args)
    run(embedding_forward_body, &k, sizeof(k), 0, B * T * C <= SERIAL)


cdef inline void embedding_row(float* out, const float* te, const float* pe, Py_ssize_t C) noexcept nogil:
    """out (C) = te (C) + pe (C)."""
    cdef Py_ssize_t j, jb
    for jb in range(ceil_div(C, VL)):
        j = jb * VL
        put(out + j, part(te + j, C - j) + part(pe + j, C - j), C - j)


cdef struct EmbeddingBackward:
    float* dwte
    float* dwpe              # or NULL
    const float* dout
    const int32_t* ids
    Py_ssize_t B, T, C


cdef void embedding_backward_body(const void* call, const Member* me) noexcept nogil:
    """A token may stand anywhere in the batch, so that tasks which took tokens would need locks. A task takes VL channels
    of all tokens instead, in their order: no two threads write one element, and the bits do not depend on their number.
    """
    # out[b, t] = wte[ids[b, t]] + wpe[t]   ->   dwte[ids[b, t]] += dout[b, t], dwpe[t] += dout[b, t]
    cdef const EmbeddingBackward* k = <const EmbeddingBackward*>call
    cdef Share tasks = share(me, ceil_div(k.C, VL))
    cdef Py_ssize_t task, i, j
    cdef float* row
    cdef vf grad
    for task in range(tasks.begin, tasks.end):
        j = task * VL
        for i in range(k.B * k.T):
            grad = part(k.dout + i * k.C + j, k.C - j)
            row = k.dwte + k.ids[i] * k.C + j
            put(row, part(row, k.C - j) + grad, k.C - j)
            if k.dwpe != NULL:
                row = k.dwpe + i % k.T * k.C + j
                put(row, part(row, k.C - j) + grad, k.C - j)


def embedding_backward(cnp.ndarray dwte, cnp.ndarray dwpe, cnp.ndarray dout, cnp.ndarray ids, Py_ssize_t B,
                       Py_ssize_t T, Py_ssize_t C):
    """dwte[ids] (V, C) += dout (B, T, C), once for each occurrence of a token;  dwpe[t] (block_size, C) += dout.
    dwpe may be None."""
    cdef Py_ssize_t V = rows_of(dwte, C, "dwte"), block_size = T if dwpe is None else rows_of(dwpe, C, "dwpe")
    cdef EmbeddingBackward k
    cdef Arrays args
    args.n = 0
    k.dwte = output(&args, dwte, V, C, "dwte")
    k.dwpe = optional_output(&args, dwpe, block_size, C, "dwpe")
    k.dout = input(&args, dout, B * T, C, "dout")
    k.ids = indices(&args, ids, B, T, V, "ids")
    k.B, k.T, k.C = B, T, C
    if T > block_size:
        raise ValueError(f"{T} positions do not fit the {block_size} rows of dwpe")
    check_overlap(&args)
    run(embedding_backward_body, &k, sizeof(k), 0, B * T * C <= SERIAL)
