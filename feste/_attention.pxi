# Causal multi-head attention. Vaswani et al. 2017, arXiv:1706.03762; blocks and lse after Dao et al. 2022, arXiv:2205.14135.
#
#     scores = q k^T / sqrt(D);  weights = softmax(scores);  out = weights v        for each head of each sequence
#
# A task is one head of one sequence. Its keys and values are packed into panels once; then QUERIES queries at a time go
# through scores, exponentials and out, so a task needs QUERIES x T scores and not T x T. Above the diagonal whole
# register tiles are left out; inside a tile that the diagonal crosses, the weights are made zero. All products are
# macro_kernel's. Always float32: rounding scores, weights and their gradients on the way would cost what it gains.

cdef struct Heads:
    Py_ssize_t B, T, H, D
    Py_ssize_t C             # H * D
    Py_ssize_t Tp, Dp        # T and D rounded up to whole panels
    Py_ssize_t ld            # row length of a block of scores: Tp, and a panel more against rows in one set of L1
    Py_ssize_t stride        # from a token to the next in qkv (B, T, 3, H, D): 3C
    float scale              # 1 / sqrt(D)
    double p                 # attention dropout, and what dropout_factor needs
    uint64_t key, threshold
    float kept


cdef struct Queries:         # a block of them
    Py_ssize_t first, m      # first .. first + m, m <= QUERIES
    Py_ssize_t head          # b * H + h


cdef int describe_heads(Heads* h, Py_ssize_t B, Py_ssize_t T, Py_ssize_t H, Py_ssize_t D, double p,
                        uint64_t key) except -1:
    check_dropout(p)
    h.B, h.T, h.H, h.D, h.C = B, T, H, D, H * D
    h.Tp, h.Dp = ceil_div(T, NR) * NR, ceil_div(D, NR) * NR
    h.ld = h.Tp + NR
    h.stride = 3 * H * D
    h.scale = <float>(1 / sqrt(<double>D))
    h.p, h.key, h.threshold, h.kept = p, key, dropout_threshold(p), <float>(1 / (1 - p))
    return 0


cdef inline Queries queries_of_block(const Heads* h, Py_ssize_t head, Py_ssize_t block) noexcept nogil:
    return Queries(first=block * QUERIES, m=min(QUERIES, h.T - block * QUERIES), head=head)


cdef inline Py_ssize_t keys_of_strip(const Heads* h, Py_ssize_t first) noexcept nogil:
    """Keys that a strip of MR queries from `first` on may see: up to its last query."""
    return min(first + MR, h.T)


cdef inline Strips strips_of_rows(const float* rows, Py_ssize_t ld) noexcept nogil:
    """Contiguous rows, ld apart, as the left operand of a product."""
    return Strips(data=rows, ps=MR * ld, rs=ld, cs=1)


# ---- the products ------------------------------------------------------------------------------------------

cdef void copy_rows(float* out, const float* x, Py_ssize_t stride, float scale, Py_ssize_t m, Py_ssize_t D) noexcept nogil:
    """out (QUERIES, D) = scale * x (m, D), rows of x stride apart, zero beyond m.

    The rows are sent for before their turn, because no hardware prefetcher follows a stride of 3C.
    """
    cdef Py_ssize_t i, j, jb
    for i in range(m):
        prefetch_read(x + (i + PREFETCH_ROWS) * stride, D)
        for jb in range(ceil_div(D, VL)):
            j = jb * VL
            put(out + i * D + j, vset(scale) * part(x + i * stride + j, D - j), D - j)
    memset(out + m * D, 0, (QUERIES - m) * D * sizeof(float))


cdef void score_block(float* scores, const float* q, Panels keys, const Heads* h, Queries at) noexcept nogil:
    """scores (m, ld) = q (m, D) k^T (D, T): each panel of keys, while it is in L1, for all strips that see it.

    Written are whole tiles, up to the one that the diagonal crosses; scores and q have room for whole strips.
    """
    cdef Py_ssize_t jb, j, i
    for jb in range(ceil_div(at.first + at.m, NR)):
        j = jb * NR
        i = max(0, j - at.first) // MR * MR  # the first strip with a query that sees a key of the panel
        macro_kernel(written(scores + i * h.ld + j, h.ld), strips_of_rows(q + i * h.D, h.D),
                     Panels(data=keys.data + jb * keys.ps, ps=keys.ps), ceil_div(at.m - i, MR) * MR, NR, h.D, False)


cdef void weighted_rows(float* out, Py_ssize_t ld, const float* weights, Panels x, const Heads* h,
                        Queries at) noexcept nogil:
    """out (m, D), rows ld apart, = weights (m, keys) x (keys, D), for each strip with the keys up to its diagonal."""
    cdef Py_ssize_t jb, j, ib, i
    for jb in range(ceil_div(h.D, NR)):
        j = jb * NR
        for ib in range(ceil_div(at.m, MR)):
            i = ib * MR
            macro_kernel(written(out + i * ld + j, ld), strips_of_rows(weights + i * h.ld, h.ld),
                         Panels(data=x.data + jb * x.ps, ps=x.ps), min(MR, at.m - i), min(NR, h.D - j),
                         keys_of_strip(h, at.first + i), False)


cdef void key_gradients(float* dkv, const float* weights, Panels x, const Heads* h, Queries at) noexcept nogil:
    """dkv (first + m keys, D), rows 3C apart, += weights (m, keys)^T x (m, D): one block's share of dk or dv.

    Query i sees key j only if j <= i, so a strip of keys begins with its own first query. The keys of this block of
    queries are met for the first time: their rows are written, not added to, and nothing need be zeroed beforehand.
    """
    cdef Py_ssize_t strip, j, skipped, keys = min(at.first + at.m, h.T)
    cdef Output out
    for strip in range(ceil_div(keys, MR)):
        j = strip * MR
        skipped = max(0, j - at.first)  # queries of the block that come before the keys
        out = written(dkv + j * h.stride, h.stride)
        if j < at.first:
            out.start = out.c
        macro_kernel(out, Strips(data=weights + skipped * h.ld + j, ps=0, rs=1, cs=h.ld),
                     Panels(data=x.data + skipped * NR, ps=x.ps), min(MR, keys - j), h.D, at.m - skipped, False)


# ---- forward -----------------------------------------------------------------------------------------------

cdef float exp_row(float* scores, Py_ssize_t n, Py_ssize_t limit, float* inverse) noexcept nogil:
    """scores (n) become exp(scores - max), zero from n to limit, and inverse 1 / their sum; returns log(sum(exp(scores))).

    Whole vectors are read and written, so the row has room for them. The caller divides: a row of out (D) is shorter than
    a row of scores. The last vector goes first, because only it has lanes to cut off.
    """
    cdef Py_ssize_t jb, last = ceil_div(n, VL) - 1, rest = n - last * VL
    cdef vf peak = vcut(vload(scores + last * VL), rest, -INFINITY), total, e
    cdef float top, sum_exp
    for jb in range(last):
        peak = vmax(peak, vload(scores + jb * VL))
    top = vpeak(peak)
    total = vcut(vexp(vload(scores + last * VL) - vset(top)), rest, 0)
    vstore(scores + last * VL, total)
    for jb in range(last):
        e = vexp(vload(scores + jb * VL) - vset(top))
        vstore(scores + jb * VL, e)
        total = total + e
    for jb in range(last + 1, ceil_div(limit, VL)):
        vstore(scores + jb * VL, vset(0))
    sum_exp = vsum(total)
    inverse[0] = 1 / sum_exp
    return top + logf(sum_exp)


cdef void drop_row(float* row, const Heads* h, Py_ssize_t head, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    """row (n), the weights of query i, times their dropout factors; weight (b, h, i, j) counts ((b H + h) T + i) T + j."""
    cdef uint64_t first = (<uint64_t>head * h.T + i) * h.T
    cdef Py_ssize_t j
    for j in range(n):
        row[j] = row[j] * dropout_factor(h.key, first + j, h.threshold, h.kept)


cdef struct ForwardSpace:    # what a task works in
    Panels keys              # [Tp / NR][D][NR]: the right side of q k^T
    Panels values            # [Dp / NR][T][NR]: the right side of weights v
    float* q                 # (QUERIES, D)
    float* scores            # (QUERIES, ld)


cdef Py_ssize_t forward_size(const Heads* h) noexcept nogil:
    """Floats of a ForwardSpace."""
    return h.Tp * h.D + h.Dp * h.T + QUERIES * (h.D + h.ld)


cdef ForwardSpace forward_space(const Heads* h, float* work) noexcept nogil:
    """Divide work (forward_size) among the arrays."""
    cdef ForwardSpace w
    w.keys = Panels(data=work, ps=h.D * NR)
    w.values = Panels(data=w.keys.data + h.Tp * h.D, ps=h.T * NR)
    w.q = w.values.data + h.Dp * h.T
    w.scores = w.q + QUERIES * h.D
    return w


cdef void attention_forward_head(float* out, float* lse, const float* qkv, float* work, const Heads* h,
                                 Py_ssize_t head) noexcept nogil:
    """One head's part of out (B, T, C) and lse (B, H, T), from qkv (B, T, 3C); work holds forward_size floats."""
    cdef ForwardSpace w = forward_space(h, work)
    cdef Py_ssize_t b = head // h.H, channel = head % h.H * h.D
    cdef const float* q = qkv + b * h.T * h.stride + channel  # k and v lie C and 2C behind q
    cdef float inverse[QUERIES]
    cdef float* o
    cdef float* l
    cdef Queries at
    cdef Py_ssize_t block, i
    pack_panels(w.keys, NULL, Matrix(data=q + h.C, rs=1, cs=h.stride), h.D, h.T)
    pack_panels(w.values, NULL, Matrix(data=q + 2 * h.C, rs=h.stride, cs=1), h.T, h.D)
    for block in range(ceil_div(h.T, QUERIES)):
        at = queries_of_block(h, head, block)
        o = out + (b * h.T + at.first) * h.C + channel
        l = lse + head * h.T + at.first
        copy_rows(w.q, q + at.first * h.stride, h.stride, h.scale, at.m, h.D)  # scores = (q / sqrt(D)) k^T
        score_block(w.scores, w.q, w.keys, h, at)
        for i in range(at.m):
            l[i] = exp_row(w.scores + i * h.ld, at.first + i + 1, keys_of_strip(h, at.first + i // MR * MR), inverse + i)
            if h.p > 0:
                drop_row(w.scores + i * h.ld, h, head, at.first + i, at.first + i + 1)
        weighted_rows(o, h.C, w.scores, w.values, h, at)
        for i in range(at.m):
            scale_row(o + i * h.C, inverse[i], h.D)


cdef struct AttentionForward:
    Heads heads
    float* out
    float* lse
    const float* qkv


cdef void attention_forward_body(const void* call, const Member* me) noexcept nogil:
    cdef const AttentionForward* k = <const AttentionForward*>call
    cdef float* work = <float*>me.work + me.thread * forward_size(&k.heads)
    cdef Py_ssize_t heads = k.heads.B * k.heads.H, head = next_task(me, heads)
    while head < heads:
        attention_forward_head(k.out, k.lse, k.qkv, work, &k.heads, head)
        head = next_task(me, heads)


def attention_forward(cnp.ndarray out, cnp.ndarray lse, cnp.ndarray qkv, Py_ssize_t B, Py_ssize_t T, Py_ssize_t H,
                      Py_ssize_t D, double p=0.0, uint64_t key=0):
    """out (B, T, C) from qkv (B, T, 3C), C = H * D, with dropout p of the weights.

    lse (B, H, T) keeps log(sum(exp(scores))), all that the backward pass needs to make the weights again.
    """
    cdef AttentionForward k
    cdef Arrays args
    args.n = 0
    k.out = output(&args, out, B * T, H * D, "out")
    k.lse = output(&args, lse, 1, B * H * T, "lse")
    k.qkv = input(&args, qkv, B * T, 3 * H * D, "qkv")
    describe_heads(&k.heads, B, T, H, D, p, key)
    check_overlap(&args)
    run(attention_forward_body, &k, sizeof(k), n_threads * forward_size(&k.heads) * sizeof(float), B * H == 1)


# ---- backward ----------------------------------------------------------------------------------------------

cdef void score_gradients(float* weights, float* dweights, const float* delta, const float* lse, const Heads* h,
                          Queries at) noexcept nogil:
    """From scores and dweights (m, ld) make weights (with dropout) and dscores, in place; delta (m), lse (m).

    With dropout the loop over vectors leaves exp(scores - lse) and dweights as they are for drop_gradients_row. Rows of
    the last strip beyond m become zero, and so do the keys behind the diagonal up to the end of their strip's tiles.
    """
    # weights = exp(scores - lse) * mask;  out = weights v, dweights = dout v^T before the mask
    # ->   dscores = exp(scores - lse) * (mask * dweights - delta), delta = sum(dout * out) = sum(weights * dweights)
    cdef Py_ssize_t i, j, jb, n, whole
    cdef float* w
    cdef float* dw
    cdef vf e, ds, lse_i, delta_i
    for i in range(ceil_div(at.m, MR) * MR):
        w = weights + i * h.ld
        dw = dweights + i * h.ld
        n = at.first + i + 1 if i < at.m else 0
        whole = n // VL
        lse_i = vset(lse[i]) if i < at.m else vset(0)
        delta_i = vset(delta[i]) if i < at.m and h.p == 0 else vset(0)
        for jb in range(whole):
            e = vexp(vload(w + jb * VL) - lse_i)
            vstore(dw + jb * VL, (e if h.p == 0 else vset(1)) * (vload(dw + jb * VL) - delta_i))
            vstore(w + jb * VL, e)
        for jb in range(whole, ceil_div(keys_of_strip(h, at.first + i // MR * MR), VL)):  # room for whole vectors
            j = jb * VL
            e = vcut(vexp(vload(w + j) - lse_i), n - j, 0)
            ds = (e if h.p == 0 else vset(1)) * (vload(dw + j) - delta_i)
            vstore(w + j, e)
            vstore(dw + j, vcut(ds, n - j, 0))
        if h.p > 0 and n > 0:
            drop_gradients_row(w, dw, delta[i], h, at.head, at.first + i, n)


cdef void drop_gradients_row(float* w, float* dw, float delta, const Heads* h, Py_ssize_t head, Py_ssize_t i,
                             Py_ssize_t n) noexcept nogil:
    """For query i: dw (n) = w (n) * (mask * dw - delta) and w = mask * w, from w = exp(scores - lse) and dw = dout v^T."""
    cdef uint64_t first = (<uint64_t>head * h.T + i) * h.T
    cdef float factor
    cdef Py_ssize_t j
    for j in range(n):
        factor = dropout_factor(h.key, first + j, h.threshold, h.kept)
        dw[j] = w[j] * (factor * dw[j] - delta)
        w[j] = factor * w[j]


cdef struct BackwardSpace:   # what a task works in
    Panels keys_t            # [Tp / NR][D][NR]: the right side of q k^T
    Panels values_t          # [Tp / NR][D][NR]: the right side of dout v^T
    Panels keys              # [Dp / NR][T][NR]: the right side of dscores k
    float* q                 # (QUERIES, D)
    float* dout              # (QUERIES, D)
    Panels q_panels          # [Dp / NR][QUERIES][NR]: the right side of dscores^T q
    Panels dout_panels       # [Dp / NR][QUERIES][NR]: the right side of weights^T dout
    float* weights           # (QUERIES, ld), scores at first
    float* dweights          # (QUERIES, ld), dscores in the end
    float* delta             # (QUERIES)


cdef Py_ssize_t backward_size(const Heads* h) noexcept nogil:
    """Floats of a BackwardSpace."""
    return 2 * h.Tp * h.D + h.Dp * h.T + QUERIES * (2 * h.D + 2 * h.Dp + 2 * h.ld + 1)


cdef BackwardSpace backward_space(const Heads* h, float* work) noexcept nogil:
    """Divide work (backward_size) among the arrays."""
    cdef BackwardSpace w
    w.keys_t = Panels(data=work, ps=h.D * NR)
    w.values_t = Panels(data=w.keys_t.data + h.Tp * h.D, ps=h.D * NR)
    w.keys = Panels(data=w.values_t.data + h.Tp * h.D, ps=h.T * NR)
    w.q = w.keys.data + h.Dp * h.T
    w.dout = w.q + QUERIES * h.D
    w.q_panels = Panels(data=w.dout + QUERIES * h.D, ps=QUERIES * NR)
    w.dout_panels = Panels(data=w.q_panels.data + QUERIES * h.Dp, ps=QUERIES * NR)
    w.weights = w.dout_panels.data + QUERIES * h.Dp
    w.dweights = w.weights + QUERIES * h.ld
    w.delta = w.dweights + QUERIES * h.ld
    return w


cdef void attention_backward_block(float* dq, BackwardSpace w, const float* dout, const float* q, const float* out,
                                   const float* lse, const Heads* h, Queries at) noexcept nogil:
    """A block of queries' dq (T, D), and its share of dk and dv, C and 2C behind dq; rows 3C apart.

    dout and out (T, D) have rows C apart, q (T, D) rows 3C; lse (T). Keys and values are packed in w.
    """
    cdef Py_ssize_t i
    copy_rows(w.q, q + at.first * h.stride, h.stride, h.scale, at.m, h.D)
    copy_rows(w.dout, dout + at.first * h.C, h.C, 1, at.m, h.D)
    for i in range(at.m):
        prefetch_read(out + (at.first + i + PREFETCH_ROWS) * h.C, h.D)
        w.delta[i] = dot(w.dout + i * h.D, out + (at.first + i) * h.C, h.D)
    score_block(w.weights, w.q, w.keys_t, h, at)         # scores = (q / sqrt(D)) k^T, once more
    score_block(w.dweights, w.dout, w.values_t, h, at)   # out = weights v          ->   dweights = dout v^T
    score_gradients(w.weights, w.dweights, w.delta, lse + at.first, h, at)
    pack_panels(w.q_panels, NULL, rows_of_length(w.q, h.D), QUERIES, h.D)
    pack_panels(w.dout_panels, NULL, rows_of_length(w.dout, h.D), QUERIES, h.D)
    key_gradients(dq + 2 * h.C, w.weights, w.dout_panels, h, at)   # out = weights v                ->   dv = weights^T dout
    key_gradients(dq + h.C, w.dweights, w.q_panels, h, at)         # scores = (q / sqrt(D)) k^T     ->   dk = dscores^T q / sqrt(D)
    weighted_rows(dq + at.first * h.stride, h.stride, w.dweights, w.keys, h, at)  #                 ->   dq = dscores k / sqrt(D)
    for i in range(at.first, at.first + at.m):
        scale_row(dq + i * h.stride, h.scale, h.D)


cdef void attention_backward_head(float* dqkv, const float* dout, const float* qkv, const float* out,
                                  const float* lse, float* work, const Heads* h, Py_ssize_t head) noexcept nogil:
    """One head's part of dqkv (B, T, 3C), from dout and out (B, T, C), qkv (B, T, 3C) and lse (B, H, T); work holds
    backward_size floats."""
    cdef BackwardSpace w = backward_space(h, work)
    cdef Py_ssize_t b = head // h.H, channel = head % h.H * h.D, block
    cdef Py_ssize_t at = b * h.T * h.C + channel, at_qkv = b * h.T * h.stride + channel
    cdef const float* q = qkv + at_qkv  # k and v lie C and 2C behind q
    pack_panels(w.keys_t, NULL, Matrix(data=q + h.C, rs=1, cs=h.stride), h.D, h.T)
    pack_panels(w.values_t, NULL, Matrix(data=q + 2 * h.C, rs=1, cs=h.stride), h.D, h.T)
    pack_panels(w.keys, NULL, Matrix(data=q + h.C, rs=h.stride, cs=1), h.T, h.D)
    for block in range(ceil_div(h.T, QUERIES)):
        attention_backward_block(dqkv + at_qkv, w, dout + at, q, out + at, lse + head * h.T, h,
                                 queries_of_block(h, head, block))


cdef struct AttentionBackward:
    Heads heads
    float* dqkv
    const float* dout
    const float* qkv
    const float* out
    const float* lse


cdef void attention_backward_body(const void* call, const Member* me) noexcept nogil:
    cdef const AttentionBackward* k = <const AttentionBackward*>call
    cdef float* work = <float*>me.work + me.thread * backward_size(&k.heads)
    cdef Py_ssize_t heads = k.heads.B * k.heads.H, head = next_task(me, heads)
    while head < heads:
        attention_backward_head(k.dqkv, k.dout, k.qkv, k.out, k.lse, work, &k.heads, head)
        head = next_task(me, heads)


def attention_backward(cnp.ndarray dqkv, cnp.ndarray dout, cnp.ndarray qkv, cnp.ndarray out, cnp.ndarray lse,
                       Py_ssize_t B, Py_ssize_t T, Py_ssize_t H, Py_ssize_t D, double p=0.0, uint64_t key=0):
    """dqkv (B, T, 3C) from dout (B, T, C), with qkv (B, T, 3C), out (B, T, C) and lse (B, H, T) of attention_forward, and
    the same p and key."""
    # scores = q @ k^T / sqrt(D), weights = softmax(scores), out = weights @ v   ->   dq, dk, dv
    cdef AttentionBackward k
    cdef Arrays args
    args.n = 0
    k.dqkv = output(&args, dqkv, B * T, 3 * H * D, "dqkv")
    k.dout = input(&args, dout, B * T, H * D, "dout")
    k.qkv = input(&args, qkv, B * T, 3 * H * D, "qkv")
    k.out = input(&args, out, B * T, H * D, "out")
    k.lse = input(&args, lse, 1, B * H * T, "lse")
    describe_heads(&k.heads, B, T, H, D, p, key)
    check_overlap(&args)
    run(attention_backward_body, &k, sizeof(k), n_threads * backward_size(&k.heads) * sizeof(float), B * H == 1)


# ---- one token at a time -----------------------------------------------------------------------------------

cdef void attention_decode_head(float* out, float* k_cache, float* v_cache, const float* q, const float* k,
                                const float* v, float* scores, Py_ssize_t D, Py_ssize_t n) noexcept nogil:
    """out (D) of one query q (D) against n cached keys and values (n, D), of which the last, k (D) and v (D), are new.

    scores has room for n floats in whole vectors. Each key and value is read once, so a row at a time is as fast as memory.
    """
    cdef Py_ssize_t j
    cdef float inverse
    memcpy(k_cache + (n - 1) * D, k, D * sizeof(float))
    memcpy(v_cache + (n - 1) * D, v, D * sizeof(float))
    memset(scores, 0, n * sizeof(float))
    add_dot_rows(scores, q, k_cache, n, D)
    for j in range(n):
        scores[j] = scores[j] / sqrtf(<float>D)
    exp_row(scores, n, n, &inverse)
    scale_row(scores, inverse, n)
    memset(out, 0, D * sizeof(float))
    add_scaled_rows(out, scores, v_cache, D, n, D)


cdef struct AttentionDecode:
    float* out
    float* k_cache
    float* v_cache
    const float* qkv
    Py_ssize_t B, H, D, position, block_size


cdef inline Py_ssize_t decode_size(Py_ssize_t block_size) noexcept nogil:
    """Floats of a member's work space: a row of scores, in whole vectors."""
    return ceil_div(block_size, VL) * VL


cdef void attention_decode_body(const void* call, const Member* me) noexcept nogil:
    cdef const AttentionDecode* k = <const AttentionDecode*>call
    cdef float* work = <float*>me.work + me.thread * decode_size(k.block_size)
    cdef Share heads = share(me, k.B * k.H)
    cdef Py_ssize_t C = k.H * k.D, head, q, cached
    for head in range(heads.begin, heads.end):
        q = head // k.H * 3 * C + head % k.H * k.D
        cached = head * k.block_size * k.D
        attention_decode_head(k.out + head * k.D, k.k_cache + cached, k.v_cache + cached, k.qkv + q, k.qkv + q + C,
                              k.qkv + q + 2 * C, work, k.D, k.position + 1)


def attention_decode(cnp.ndarray out, cnp.ndarray k_cache, cnp.ndarray v_cache, cnp.ndarray qkv, Py_ssize_t B,
                     Py_ssize_t H, Py_ssize_t D, Py_ssize_t position, Py_ssize_t block_size):
    """out (B, C) from qkv (B, 3C) of one token a sequence: its k and v are stored at `position` of k_cache and v_cache
    (B, H, block_size, D), and its q attends to 0 .. position."""
    cdef AttentionDecode k
    cdef Arrays args
    args.n = 0
    k.out = output(&args, out, B, H * D, "out")
    k.k_cache = output(&args, k_cache, B * H * block_size, D, "k_cache")
    k.v_cache = output(&args, v_cache, B * H * block_size, D, "v_cache")
    k.qkv = input(&args, qkv, B, 3 * H * D, "qkv")
    k.B, k.H, k.D, k.position, k.block_size = B, H, D, position, block_size
    if position < 0 or position >= block_size:
        raise ValueError(f"position must lie in 0 .. {block_size - 1}, got {position}")
    check_overlap(&args)
    run(attention_decode_body, &k, sizeof(k), n_threads * decode_size(block_size) * sizeof(float),
        B * H * D * position <= SERIAL)
