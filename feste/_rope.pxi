# Rotary positions: queries and keys are turned by angles that grow with the position, so that their products know how
# far apart they stand. Su et al. 2021, arXiv:2104.09864, in the order of Llama and GPT-NeoX: channel j of a head is
# paired with channel j + D / 2.

cdef struct Rope:
    float* qkv               # (B, T, 3, H, D)
    const float* cosine      # (block_size, D / 2)
    const float* sine
    float direction          # 1 forward, -1 back
    Py_ssize_t B, T, H, D, position


cdef inline void rotate_head(float* x, const float* cosine, const float* sine, float direction,
                             Py_ssize_t half) noexcept nogil:
    """(x1, x2) = (x1 cos - x2 sin, x2 cos + x1 sin) of the halves of one head, x (2 half)."""
    cdef Py_ssize_t j, jb
    cdef vf x1, x2, c, s
    for jb in range(ceil_div(half, VL)):
        j = jb * VL
        x1, x2 = part(x + j, half - j), part(x + half + j, half - j)
        c, s = part(cosine + j, half - j), vset(direction) * part(sine + j, half - j)
        put(x + j, x1 * c - x2 * s, half - j)
        put(x + half + j, x2 * c + x1 * s, half - j)


cdef void rope_body(const void* call, const Member* me) noexcept nogil:
    cdef const Rope* k = <const Rope*>call
    cdef Share tokens = share(me, k.B * k.T)
    cdef Py_ssize_t i, head, half = k.D // 2, at
    for i in range(tokens.begin, tokens.end):
        at = (k.position + i % k.T) * half
        for head in range(2 * k.H):  # of the queries, and then of the keys
            rotate_head(k.qkv + (i * 3 * k.H + head) * k.D, k.cosine + at, k.sine + at, k.direction, half)


cdef int rope(cnp.ndarray qkv, const char* name, cnp.ndarray cosine, cnp.ndarray sine, float direction, Py_ssize_t B,
              Py_ssize_t T, Py_ssize_t H, Py_ssize_t D, Py_ssize_t position) except -1:
    cdef Rope k
    cdef Arrays args
    cdef Py_ssize_t block_size
    if D < 2 or D % 2:
        raise ValueError(f"a head of D={D} channels has no halves to rotate")
    block_size = rows_of(cosine, D // 2, "cosine")
    args.n = 0
    k.qkv = output(&args, qkv, B * T, 3 * H * D, name)
    k.cosine = input(&args, cosine, block_size, D // 2, "cosine")
    k.sine = input(&args, sine, block_size, D // 2, "sine")
    k.direction, k.B, k.T, k.H, k.D, k.position = direction, B, T, H, D, position
    if position < 0 or position + T > block_size:
        raise ValueError(f"positions {position} .. {position + T - 1} lie outside the table's 0 .. {block_size - 1}")
    check_overlap(&args)
    return run(rope_body, &k, sizeof(k), 0, 2 * B * T * H * D <= SERIAL)


def rope_forward(cnp.ndarray qkv, cnp.ndarray cosine, cnp.ndarray sine, Py_ssize_t B, Py_ssize_t T, Py_ssize_t H,
                 Py_ssize_t D, Py_ssize_t position=0):
    """Rotate the queries and keys in qkv (B, T, 3C), C = H * D, in place; row p of cosine and sine (block_size, D / 2)
    has the angles of position p, and the first token stands at `position`."""
    rope(qkv, "qkv", cosine, sine, 1, B, T, H, D, position)


def rope_backward(cnp.ndarray dqkv, cnp.ndarray cosine, cnp.ndarray sine, Py_ssize_t B, Py_ssize_t T, Py_ssize_t H,
                  Py_ssize_t D):
    """Turn the gradient of the rotated queries and keys, dqkv (B, T, 3C), into that of the unrotated, in place."""
    # q' = R q, R a rotation   ->   dq = R^T dq', the rotation back
    rope(dqkv, "dqkv", cosine, sine, -1, B, T, H, D, 0)
