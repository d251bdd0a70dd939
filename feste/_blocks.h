/* The block sizes of every instruction set, in one table, each with its reason.
 *
 * The names are those of BLIS (Van Zee and van de Geijn 2015): a product c (M, N) = a (M, K) b (K, N) is cut into
 * blocks of MC rows, NC columns and KC of the depth; the register tile has MR rows and NR columns. What was measured on
 * the way to these numbers, and what did not pay, stands in docs/LOG.md.
 */
#ifndef FESTE_BLOCKS_H
#define FESTE_BLOCKS_H

#if defined(__AVX512F__)
#define BY_ISA(avx512, avx2, neon, other) (avx512)
#elif defined(__AVX2__)
#define BY_ISA(avx512, avx2, neon, other) (avx2)
#elif defined(__aarch64__)
#define BY_ISA(avx512, avx2, neon, other) (neon)
#else
#define BY_ISA(avx512, avx2, neon, other) (other)
#endif

enum {
    /* ---- the register tile: MR x NR elements of c stay in registers ------------------------------------------ */
    /*                AVX-512  AVX2  NEON  SSE2 */
    VL         = BY_ISA(  16,     8,     4,     4), /* float32 lanes of a vector */
    MR         = BY_ISA(   8,     6,     8,     6), /* rows. AVX-512, 32 registers: 8 x 2 accumulators hide the latency
                                              * of an FMA (4 cycles, 1 or 2 a cycle) twice over, and an even number of
                                              * rows leaves no edge at training shapes (multiples of 32). AVX2 and SSE2,
                                              * 16 registers: 6 x 2 accumulators + 2 vectors of b + 1 of a = 15. NEON,
                                              * 32 registers: 8 x 3 + 3 + 1 = 28, the tile of BLIS on ARMv8. */
    NV         = BY_ISA(   2,     2,     3,     2), /* vectors in a row: each broadcast of a serves as many FMAs. NEON's
                                              * short vectors need three: 11 loads for 24 FMAs, two of each a cycle. */
    NR         = NV * VL,                    /* columns */
    PAIR_WORDS = BY_ISA(   1,     2,     2,     2), /* 32-bit words that hold two neighbours in k of a bfloat16 strip.
                                              * BF16 instructions want them in one. Without, each is a float32 that has
                                              * the value of a bfloat16, so that the register tile takes only the pairs of
                                              * b apart, for all rows, and not those of a for each. */

    /* ---- matrix products --------------------------------------------------------------------------------------- */
    KC         = 512,                        /* depth, in 32-bit lanes: a panel of KC x NR is 64, 32, 24 or 16 KB and
                                              * streams from L2, while tiles of c are read and written half as often as
                                              * with 256. It alone decides the order of additions, so it is part of the
                                              * results. */
    NC         = 3072,                       /* columns of b that all threads pack for all: x KC floats, 6 MB of L3 */
    MC         = 3072,                       /* rows of a that all threads pack for all, where the roles are changed */
    TASK_MC    = 16 * MR,                    /* rows of a that a thread packs for itself: 16 strips x KC floats are 256
                                              * or 192 KB, up to half of L2 (1 MB or 512 KB) */
    TASK_NC    = 4 * NR,                     /* columns of b that a thread packs for itself: 4 panels x KC floats */
    HALVES_MN  = 1 << 19,                    /* elements of a weight whose gradient is made as the sum of two halves of the batch:
                                              * the later one's is 2 MB then, as much as two cores have L2 */
    MIN_TILES  = 4,                          /* strips or panels of a task at least: fewer are read in pieces shorter
                                              * than the prefetchers follow, and pass over the whole other side for
                                              * little */
    TASKS_PER_THREAD = 8,                    /* so fine that a thread which was held up costs the others little */
    PAD        = 16,                         /* floats (a cache line) between strips and between panels, so that those
                                              * written side by side do not fall into one set of L1 */
    PREFETCH_ROWS = 8,                       /* rows on their way while one is packed: a set of L1 has 8 ways */
    ROW_PRODUCT_K = 64,                      /* rows of the weight that a task takes when a single row is multiplied by
                                              * it: 64 rows are long enough to start a thread, and their partial sums
                                              * add up in an order that no number of threads changes */

    /* ---- attention ----------------------------------------------------------------------------------------------- */
    QUERIES    = (64 + MR - 1) / MR * MR,    /* queries of a block: whole strips, and at least 64, so that T = 64 is one
                                              * block; 48 were 8 % slower at T = 64, 96 bring nothing more */

    /* ---- norms --------------------------------------------------------------------------------------------------- */
    ROWS_AT_ONCE = 8,                        /* rows that take each pass of a norm together, while they are in L1: the sum of
                                              * a row is a chain of some 50 cycles, in which others can be summed */

    /* ---- sums and threads ------------------------------------------------------------------------------------------ */
    ROW_TILE   = 64,                         /* rows whose sums are added up on their own before they join the total:
                                              * rounding errors grow with 64 + rows / 64 additions and not with rows */
    SUM_TILE   = 8192,                       /* elements whose squares are added in float32 lanes before they join a sum
                                              * in float64: some 500 additions a lane with AVX-512, 2,000 with SSE2 */
    SERIAL     = 16384,                      /* elements up to which a second thread costs more than it brings: waking it
                                              * takes about a microsecond */
    SERIAL_WEIGHT = 4 * SERIAL,              /* the same for the elements of a weight that a single row is multiplied by:
                                              * they are read once, in order, and each costs one FMA */
};

#endif
