# GEMM: c (M, N) = start + (a (M, K) b (K, N) + bias), after Goto and van de Geijn (2008), in the names of BLIS.
#
# A product is cut into blocks (sizes in _blocks.h), here as gemm_by_rows does it:
#
#   jc over N by NC, pc over K by KC    a block of b is packed into panels of NR columns, by all threads for all
#     ic over M by up to TASK_MC        a task; it packs its rows of a into strips unless they serve as they lie
#       jr over panels, ir over strips  macro_kernel, micro_kernel
#
# Rows of a that are contiguous float32 are never packed: MR streams, each used for every panel, stay in L1.
#
# The gradient of a weight, x^T dy, is cut in K as well, which there are the rows of the batch: into an earlier and a later
# half, whose sums are made apart and added in the end. A member of the team takes the half whose rows it has in its cache.

cdef struct Gemm:
    Output out             # (M, N)
    Matrix a               # (M, K)
    Matrix b               # (K, N)
    float* column_sums     # (N) or NULL: the sums of b's columns are added to it
    Py_ssize_t M, N, K
    bint bf16              # round a and b to bfloat16
    int halves             # 1, or 2 if K is cut into halves
    float* later           # (M + 1, N): the later half's product and, if wanted, its column sums, until they are added


cdef struct Block:         # a part of a product
    int half               # 0 or 1, the later one
    Py_ssize_t ic, mc      # rows ic .. ic + mc of a and c
    Py_ssize_t jc, nc      # columns jc .. jc + nc of b and c
    Py_ssize_t pc, kc      # columns pc .. pc + kc of a, rows of b


# ---- how a product is cut ----------------------------------------------------------------------------------

cdef inline Py_ssize_t lanes_of(const Gemm* g, Py_ssize_t k) noexcept nogil:
    """32-bit lanes of k neighbours in a packed column of b: a lane holds two of bfloat16."""
    return ceil_div(k, 2) if g.bf16 else k


cdef inline Py_ssize_t depth_of(const Gemm* g) noexcept nogil:
    """The most of K that a block has: KC lanes."""
    return 2 * KC if g.bf16 else KC


cdef inline Py_ssize_t words_of(const Gemm* g, Py_ssize_t k) noexcept nogil:
    """32-bit words of k neighbours in a packed row of a."""
    return PAIR_WORDS * ceil_div(k, 2) if g.bf16 else k


cdef inline Py_ssize_t strip_stride(const Gemm* g, Py_ssize_t k) noexcept nogil:
    """From a packed strip of a (MR, k) to the next."""
    return MR * words_of(g, k) + PAD


cdef inline Py_ssize_t panel_stride(const Gemm* g, Py_ssize_t k) noexcept nogil:
    """From a packed panel of b (k, NR) to the next."""
    return NR * lanes_of(g, k) + PAD


cdef Py_ssize_t count_blocks(Py_ssize_t tiles, Py_ssize_t most, int threads) noexcept nogil:
    """Into how many blocks of at most `most` strips (or panels) to divide a number of them.

    As many for every thread, and TASKS_PER_THREAD for each where that leaves MIN_TILES in a block: blocks of a round
    size would leave one of two threads with six of eleven.
    """
    cdef Py_ssize_t wanted = max(ceil_div(tiles, most), min(TASKS_PER_THREAD * threads, ceil_div(tiles, MIN_TILES)))
    if tiles < threads:
        return tiles
    return min(tiles, ceil_div(wanted, threads) * threads)


cdef inline Py_ssize_t begin_of(Py_ssize_t part, Py_ssize_t parts, Py_ssize_t n, Py_ssize_t width) noexcept nogil:
    """Where a part begins if n rows (or columns) are divided evenly into parts, in whole strips (or panels) of a width."""
    return min(n, part * ceil_div(n, width) // parts * width)


cdef Block cut_rows(Block all, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """One of so many even parts of the rows of a block."""
    cdef Py_ssize_t begin = begin_of(part, parts, all.mc, MR), end = begin_of(part + 1, parts, all.mc, MR)
    all.ic, all.mc = all.ic + begin, end - begin
    return all


cdef Block cut_columns(Block all, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """One of so many even parts of the columns of a block."""
    cdef Py_ssize_t begin = begin_of(part, parts, all.nc, NR), end = begin_of(part + 1, parts, all.nc, NR)
    all.jc, all.nc = all.jc + begin, end - begin
    return all


# ---- a block -----------------------------------------------------------------------------------------------

cdef inline bint rows_serve(const Gemm* g) noexcept nogil:
    """Whether rows of a are strips as they lie in memory."""
    return g.a.cs == 1 and not g.bf16


cdef void pack_a(const Gemm* g, float* strips, Block at) noexcept nogil:
    """Pack the rows of a block of a. Of contiguous float32 rows only those behind the last whole strip: the others serve
    as they lie."""
    cdef Matrix a = matrix_at(g.a, at.ic, at.pc)
    cdef Py_ssize_t ps = strip_stride(g, at.kc), whole = at.mc // MR if a.cs == 1 else 0
    if g.bf16 and a.cs == 1:
        pack_rows_bf16(<int32_t*>strips, ps, a, at.mc, at.kc)
    elif g.bf16:
        pack_strips_bf16(<int32_t*>strips, ps, a, at.mc, at.kc)
    elif whole * MR < at.mc:
        pack_strips(strips + whole * ps, ps, matrix_at(a, whole * MR, 0), at.mc - whole * MR, at.kc)


cdef void pack_b(const Gemm* g, float* panels, Block at, bint add_up) noexcept nogil:
    """Pack the columns of a block of b, at most TASK_NC; and add their sums to column_sums, if any, if add_up.

    ROW_TILE rows at a time, so that the rounding errors of the sums grow slowly.
    """
    cdef float sums[TASK_NC]
    cdef float* tile_sums = sums if add_up and g.column_sums != NULL else NULL
    cdef float* total = NULL
    cdef Matrix b
    cdef Panels out
    cdef Py_ssize_t tile, p, j, rows
    if tile_sums != NULL:
        total = (g.column_sums if at.half == 0 else g.later + g.M * g.N) + at.jc
        if at.half > 0 and at.pc == half_begin(g, at.half):
            memset(total, 0, at.nc * sizeof(float))
    for tile in range(ceil_div(at.kc, ROW_TILE)):
        p = tile * ROW_TILE
        rows = min(ROW_TILE, at.kc - p)
        b = matrix_at(g.b, at.pc + p, at.jc)
        out = Panels(data=panels + lanes_of(g, p) * NR, ps=panel_stride(g, at.kc))
        memset(sums, 0, sizeof(sums))
        if g.bf16:
            pack_panels_bf16(out, tile_sums, b, rows, at.nc)
        else:
            pack_panels(out, tile_sums, b, rows, at.nc)
        if tile_sums != NULL:
            for j in range(at.nc):
                total[j] += sums[j]


cdef void multiply(const Gemm* g, const float* strips, Panels panels, Block at) noexcept nogil:
    """The rows and columns of a block of c for one block of K, from what pack_a and pack_b made of it."""
    cdef Output out = output_at(g.out if at.half == 0 else written(g.later, g.N), at.ic, at.jc)
    cdef Matrix a = matrix_at(g.a, at.ic, at.pc)
    cdef Py_ssize_t lanes = lanes_of(g, at.kc), whole = 0
    cdef Strips packed = Strips(data=strips, ps=strip_stride(g, at.kc), rs=1, cs=MR)  # by pack_strips, or
    if g.bf16 and a.cs == 1:
        packed.rs, packed.cs = words_of(g, at.kc), 1                                  # by pack_rows_bf16
    if at.pc > half_begin(g, at.half):  # bias and start went into the first block; now c is what the product is added to
        out.start, out.bias = out.c, NULL
    if rows_serve(g):
        whole = at.mc // MR * MR
        macro_kernel(out, Strips(data=a.data, ps=MR * a.rs, rs=a.rs, cs=1), panels, whole, at.nc, lanes, False)
    if whole < at.mc:
        packed.data += whole // MR * packed.ps
        macro_kernel(output_at(out, whole, 0), packed, panels, at.mc - whole, at.nc, lanes, g.bf16)


# ---- the two ways to share out a product -------------------------------------------------------------------

cdef int run_gemm(Gemm* g) except -1:
    """Run a product in the way that suits its shape.

    What a task packs for itself is still in its L2 when it multiplies; what all threads pack for all goes out to L3 and
    comes back, at three times the traffic. So the larger operand is to be the one that a task packs for itself: a, if the
    product has more rows than columns, else b. The bits are the same either way.
    """
    if g.M == 1 and not g.bf16 and g.column_sums == NULL:
        return row_product(g)
    g.halves = 2 if halves_pay(g) else 1
    if g.M >= g.N:
        return run(gemm_by_rows, g, sizeof(Gemm),
                   (later_size(g) + g.halves * shared_panels_size(g) + n_threads * own_strips_size(g)) * sizeof(float), False)
    return run(gemm_by_columns, g, sizeof(Gemm),
               (later_size(g) + g.halves * shared_strips_size(g) + n_threads * own_panels_size(g)) * sizeof(float), False)


cdef inline bint halves_pay(const Gemm* g) noexcept nogil:
    """Whether to cut K into halves: where both operands come through the cache of whoever wrote them, and are more than the
    sum of a half that goes to and fro instead. What is decided here is part of the results, so it looks at the shape only."""
    return (g.a.rs == 1 and g.b.cs == 1 and g.M * g.N <= HALVES_MN
            and g.K * (g.M + g.N) >= 4 * g.M * g.N and g.K >= 2 * ROW_TILE)


cdef inline Py_ssize_t deepest(const Gemm* g) noexcept nogil:
    """The most of K that a block of this product has."""
    return min(g.K, depth_of(g))


cdef inline Py_ssize_t half_begin(const Gemm* g, Py_ssize_t half) noexcept nogil:
    """Where a half of K begins; half `halves` begins at its end."""
    return g.K if half == g.halves else half * (ceil_div(g.K, 2 * ROW_TILE) * ROW_TILE)


cdef Block block_of(const Gemm* g, int half, Py_ssize_t pb) noexcept nogil:
    """Block pb of the depth of a half, all rows and columns; its kc is 0 if a later half has a block less than the earlier."""
    cdef Py_ssize_t end = half_begin(g, half + 1), pc = min(end, half_begin(g, half) + pb * depth_of(g))
    return Block(half=half, ic=0, mc=g.M, jc=0, nc=g.N, pc=pc, kc=min(end - pc, depth_of(g)))


cdef inline Block column_block(Block all, Py_ssize_t jb) noexcept nogil:
    """Block jb of the columns of a block."""
    all.jc, all.nc = jb * NC, min(all.nc - jb * NC, NC)
    return all


cdef inline Block row_block(Block all, Py_ssize_t ib) noexcept nogil:
    """Block ib of the rows of a block."""
    all.ic, all.mc = ib * MC, min(all.mc - ib * MC, MC)
    return all


cdef void add_later(const Gemm* g, const Member* me) noexcept nogil:
    """c, and the column sums, += those of the later half."""
    cdef Share mine
    cdef Py_ssize_t i, jb, j, n
    if g.halves == 1:
        return
    barrier(me)
    mine = share(me, g.M)
    for i in range(mine.begin, mine.end):
        for jb in range(ceil_div(g.N, VL)):
            j = jb * VL
            n = g.N - j
            put(g.out.c + i * g.out.ld + j, part(g.out.c + i * g.out.ld + j, n) + part(g.later + i * g.N + j, n), n)
    if me.thread == 0 and g.column_sums != NULL:
        for j in range(g.N):
            g.column_sums[j] += g.later[g.M * g.N + j]


# Work space, in floats: the later half's sum and what all threads pack for all come first, then what each packs for itself.

cdef Py_ssize_t later_size(const Gemm* g) noexcept nogil:
    return ceil_div((g.M + 1) * g.N, PAD) * PAD if g.halves == 2 else 0


cdef Py_ssize_t shared_panels_size(const Gemm* g) noexcept nogil:
    return min(ceil_div(g.N, NR), NC // NR) * panel_stride(g, deepest(g))


cdef Py_ssize_t own_strips_size(const Gemm* g) noexcept nogil:
    return TASK_MC // MR * strip_stride(g, deepest(g))


cdef Py_ssize_t shared_strips_size(const Gemm* g) noexcept nogil:
    return min(ceil_div(g.M, MR), MC // MR) * strip_stride(g, deepest(g))


cdef Py_ssize_t own_panels_size(const Gemm* g) noexcept nogil:
    return TASK_NC // NR * panel_stride(g, deepest(g))


cdef void gemm_by_rows(const void* call, const Member* me) noexcept nogil:
    """All threads pack b for all; a task takes some rows of a, which it packs for itself where they need it.

    Where there are too few rows for all threads, the tasks of a block of rows share out its columns; each packs the rows.
    """
    cdef Gemm own = (<const Gemm*>call)[0]
    cdef const Gemm* g = &own
    cdef float* panels = <float*>me.work + later_size(g)
    cdef float* strips = panels + g.halves * shared_panels_size(g) + me.thread * own_strips_size(g)
    cdef Py_ssize_t members = ceil_div(me.size, g.halves), column_blocks = 1, jb, pb, groups, task, tasks
    cdef Py_ssize_t row_blocks = count_blocks(ceil_div(g.M, MR), TASK_MC // MR, members)
    cdef Share mine
    own.later = <float*>me.work
    if row_blocks < (2 * members if rows_serve(g) else members):
        column_blocks = min(ceil_div(TASKS_PER_THREAD * members, row_blocks), ceil_div(min(g.N, NC), NR))
    tasks = row_blocks * column_blocks  # for each half
    for jb in range(ceil_div(g.N, NC)):
        for pb in range(ceil_div(half_begin(g, 1), depth_of(g))):
            if jb > 0 or pb > 0:
                barrier(me)  # the panels are in use up to here
            groups = count_blocks(ceil_div(min(g.N - jb * NC, NC), NR), TASK_NC // NR, members)
            mine = share(me, g.halves * groups)
            for task in range(mine.begin, mine.end):
                pack_shared_panels(g, panels, column_block(block_of(g, task // groups, pb), jb), task % groups, groups)
            barrier(me)
            task = next_task(me, g.halves * tasks)
            while task < g.halves * tasks:
                multiply_rows(g, strips, panels, column_block(block_of(g, task // tasks, pb), jb),
                              task % tasks // column_blocks, row_blocks, task % column_blocks, column_blocks)
                task = next_task(me, g.halves * tasks)
    add_later(g, me)


cdef void pack_shared_panels(const Gemm* g, float* panels, Block all, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """Pack one of so many parts of the columns of a block into its place among the panels of all of them."""
    cdef Block at = cut_columns(all, part, parts)
    pack_b(g, panels + all.half * shared_panels_size(g) + (at.jc - all.jc) // NR * panel_stride(g, all.kc), at, True)


cdef void multiply_rows(const Gemm* g, float* strips, const float* panels, Block all, Py_ssize_t row, Py_ssize_t rows,
                        Py_ssize_t column, Py_ssize_t columns) noexcept nogil:
    """A task of gemm_by_rows: one of so many parts of the rows and of the columns of a block; panels hold all columns."""
    cdef Block at = cut_columns(cut_rows(all, row, rows), column, columns)
    cdef Py_ssize_t ps = panel_stride(g, at.kc)
    panels += all.half * shared_panels_size(g) + (at.jc - all.jc) // NR * ps
    if at.kc > 0 and at.nc > 0:
        pack_a(g, strips, at)
        multiply(g, strips, Panels(data=<float*>panels, ps=ps), at)


cdef void gemm_by_columns(const void* call, const Member* me) noexcept nogil:
    """All threads pack what of a needs packing for all; a task takes some columns of b, which it packs for itself."""
    cdef Gemm own = (<const Gemm*>call)[0]
    cdef const Gemm* g = &own
    cdef float* strips = <float*>me.work + later_size(g)
    cdef float* panels = strips + g.halves * shared_strips_size(g) + me.thread * own_panels_size(g)
    cdef Py_ssize_t members = ceil_div(me.size, g.halves), ib, pb, groups, task
    cdef Py_ssize_t tasks = count_blocks(ceil_div(g.N, NR), TASK_NC // NR, members)  # for each half
    cdef Share mine
    own.later = <float*>me.work
    for ib in range(ceil_div(g.M, MC)):
        for pb in range(ceil_div(half_begin(g, 1), depth_of(g))):
            if ib > 0 or pb > 0:
                barrier(me)  # the strips are in use up to here
            groups = count_blocks(ceil_div(min(g.M - ib * MC, MC), MR), TASK_MC // MR, members)
            mine = share(me, g.halves * groups)
            for task in range(mine.begin, mine.end):
                pack_shared_strips(g, strips, row_block(block_of(g, task // groups, pb), ib), task % groups, groups)
            barrier(me)
            task = next_task(me, g.halves * tasks)
            while task < g.halves * tasks:
                multiply_columns(g, strips, panels,
                                 cut_columns(row_block(block_of(g, task // tasks, pb), ib), task % tasks, tasks))
                task = next_task(me, g.halves * tasks)
    add_later(g, me)


cdef void pack_shared_strips(const Gemm* g, float* strips, Block all, Py_ssize_t part, Py_ssize_t parts) noexcept nogil:
    """Pack one of so many parts of the rows of a block into its place among the strips of all of them."""
    cdef Block at = cut_rows(all, part, parts)
    pack_a(g, strips + all.half * shared_strips_size(g) + (at.ic - all.ic) // MR * strip_stride(g, all.kc), at)


cdef void multiply_columns(const Gemm* g, const float* strips, float* panels, Block at) noexcept nogil:
    """A task of gemm_by_columns: some columns of all rows of a block; strips hold all rows.

    Columns of b are packed once for each block of M, but their sums are added up only for the first.
    """
    if at.kc > 0:
        pack_b(g, panels, at, at.ic == 0)
        multiply(g, strips + at.half * shared_strips_size(g), Panels(data=panels, ps=panel_stride(g, at.kc)), at)


def gemm(cnp.ndarray c, cnp.ndarray a, cnp.ndarray b, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
         bint trans_a=False, bint trans_b=False, bint accumulate=False, bint bf16=False):
    """c (M, N) = op(a) @ op(b), or += with accumulate.

    a is (M, K), or (K, M) with trans_a; b is (K, N), or (N, K) with trans_b; bf16 rounds both to bfloat16.
    """
    cdef Arrays args
    cdef Gemm g
    args.n = 0
    g.out = Output(c=output(&args, c, M, N, "c"), start=NULL, bias=NULL, ld=N)
    if accumulate:
        g.out.start = g.out.c
    if trans_a:
        g.a = transpose(rows_of_length(input(&args, a, K, M, "a"), M))
    else:
        g.a = rows_of_length(input(&args, a, M, K, "a"), K)
    if trans_b:
        g.b = transpose(rows_of_length(input(&args, b, N, K, "b"), K))
    else:
        g.b = rows_of_length(input(&args, b, K, N, "b"), N)
    check_overlap(&args)
    g.column_sums, g.M, g.N, g.K, g.bf16 = NULL, M, N, K, bf16
    run_gemm(&g)
