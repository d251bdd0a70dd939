/* The vector type behind the kernels, and the few things Cython cannot say about it.
 *
 * GCC's vector extension gives one source for SSE2, AVX2, AVX-512 and NEON: `a * b + c` on a vf is one fused
 * multiply-add where the instruction set has it. Intrinsics appear only for the bfloat16 instructions, for parts of a
 * vector and for minimum and maximum; beside each stands its portable equal, to the bit.
 */
#ifndef FESTE_SIMD_H
#define FESTE_SIMD_H

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "_blocks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_unaligned __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(4 * VL), aligned(4), may_alias));

static inline vf vload(const float *p) { return *(const vf_unaligned *)p; }
static inline void vstore(float *p, vf x) { *(vf_unaligned *)p = x; }
static inline vi viload(const int32_t *p) { return *(const vi_unaligned *)p; }
static inline void vistore(int32_t *p, vi x) { *(vi_unaligned *)p = x; }
static inline vf vset(float x) { return x - (vf){0}; }
static inline vi viset(int32_t x) { return x - (vi){0}; }
static inline vf vfloat(vi x) { return (vf)x; } /* the same bits */
static inline vf vfma(vf a, vf b, vf c) { return a * b + c; }

/* The last n < VL elements of a row, the other lanes filled; none if n is negative. What lies behind the row is not
 * touched. Without masks the vector goes through memory, and in a loop so do its neighbours. */
#if defined(__AVX512F__)
static inline __mmask16 lanes_below(ptrdiff_t n) { return (__mmask16)(n > 0 ? (1u << n) - 1 : 0); }
static inline vf vload_part(const float *p, ptrdiff_t n, float fill) {
    return (vf)_mm512_mask_loadu_ps((__m512)vset(fill), lanes_below(n), p);
}
static inline void vstore_part(float *p, vf x, ptrdiff_t n) { _mm512_mask_storeu_ps(p, lanes_below(n), (__m512)x); }
#elif defined(__AVX2__)
static inline vi lanes_below(ptrdiff_t n) { return (vi){0, 1, 2, 3, 4, 5, 6, 7} < viset((int32_t)n); }
static inline vf vload_part(const float *p, ptrdiff_t n, float fill) {
    vi mask = lanes_below(n);
    return (vf)_mm256_blendv_ps((__m256)vset(fill), _mm256_maskload_ps(p, (__m256i)mask), (__m256)mask);
}
static inline void vstore_part(float *p, vf x, ptrdiff_t n) { _mm256_maskstore_ps(p, (__m256i)lanes_below(n), (__m256)x); }
#else
static inline vf vload_part(const float *p, ptrdiff_t n, float fill) {
    vf x = vset(fill);
    for (ptrdiff_t i = 0; i < n; i++) x[i] = p[i];
    return x;
}
static inline void vstore_part(float *p, vf x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) p[i] = x[i];
}
#endif

/* n floats from p on will be wanted soon. Any address will do. */
static inline void prefetch_read(const float *p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 16) __builtin_prefetch(p + i, 0);
}
static inline void prefetch_write(const float *p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 16) __builtin_prefetch(p + i, 1);
}

static inline vf vselect(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
/* The lanes of x where test is positive, and zero elsewhere. */
static inline vf vwhere_positive(vf test, vf x) { return vselect(test > vset(0), x, vset(0)); }
/* x with every lane from n on replaced by fill, whatever it held. */
static inline vf vcut(vf x, ptrdiff_t n, float fill) {
    vi lane;
    for (int i = 0; i < VL; i++) lane[i] = i;
    return vselect(lane < (int32_t)n, x, vset(fill));
}
/* If b is NaN the result is b: pass the bound first to let NaN through. gcc does not find the one instruction. */
#if defined(__AVX512F__)
static inline vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
static inline vf vmax(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
static inline vf vmin(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
static inline vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
static inline vf vmin(vf a, vf b) { return vselect(a < b, a, b); }
#endif

static inline vf vsqrt(vf x) {
    for (int i = 0; i < VL; i++) x[i] = sqrtf(x[i]);
    return x;
}

/* The lanes together: quarters first, so that no lane goes through memory. */
typedef float quad __attribute__((vector_size(16)));
typedef union { vf whole; quad part[VL / 4]; } quads;
static inline float vsum(vf x) {
    quads q = {x};
    quad sum = q.part[0];
    for (int i = 1; i < VL / 4; i++) sum += q.part[i];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
static inline float vpeak(vf x) {
    quads q = {x};
    quad peak = q.part[0];
    for (int i = 1; i < VL / 4; i++)
        for (int l = 0; l < 4; l++) peak[l] = peak[l] > q.part[i][l] ? peak[l] : q.part[i][l];
    float low = peak[0] > peak[2] ? peak[0] : peak[2], high = peak[1] > peak[3] ? peak[1] : peak[3];
    return low > high ? low : high;
}

/* exp(x), relative error below 2e-7 for -87.3 <= x <= 88; beyond, x is held at the bound, and NaN stays NaN.
 * n = round(x / ln 2) by the rounding of a float addition, r = x - n ln 2 with ln 2 in two parts (Cody and
 * Waite 1980), exp(r) by its Taylor polynomial of degree 7 on |r| <= 0.347, and 2^n by its exponent bits. */
static inline vf vexp(vf x) {
    const vf magic = vset(12582912.0f); /* 1.5 * 2^23: adding it leaves round(x) in the low bits */
    x = vmin(vset(88.0f), vmax(vset(-87.3f), x));
    vf shifted = x * vset(1.44269504f) + magic;
    vf n = shifted - magic;
    vf r = x - n * vset(0.693145752f);
    r = r - n * vset(1.42860677e-6f);
    vf p = vset(1.98412698e-4f);
    p = p * r + vset(1.38888889e-3f);
    p = p * r + vset(8.33333333e-3f);
    p = p * r + vset(4.16666667e-2f);
    p = p * r + vset(1.66666667e-1f);
    p = p * r + vset(0.5f);
    p = p * r + vset(1.0f);
    p = p * r + vset(1.0f);
    return p * (vf)(((vi)shifted << 23) + (127 << 23));
}

/* Rounding to bfloat16, ties to even, left in the upper half of each lane. As the hardware does: subnormals
 * become zero and NaN stays NaN. */
static inline vi bf16_bits(vf x) {
    vi bits = (vi)x;
    vi rounded = bits + (0x7FFF + ((bits >> 16) & 1));
    vi exponent = bits & 0x7F800000;
    vi subnormal = exponent == 0, nan = x != x;
    rounded = (subnormal & bits & (int32_t)0x80000000) | (~subnormal & rounded);
    rounded = (nan & (bits | 0x00400000)) | (~nan & rounded);
    return rounded & (int32_t)0xFFFF0000;
}
/* Two rounded values in each lane: even in the lower half, odd in the upper. */
static inline vi bf16_pairs(vf even, vf odd) {
#if defined(__AVX512BF16__)
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    return (vi)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
    return bf16_bits(odd) | ((bf16_bits(even) >> 16) & 0xFFFF);
#endif
}
/* 2 VL values in their order, rounded: lane i holds x[2i] in its lower half and x[2i + 1] in its upper. */
static inline vi bf16_row(vf x0, vf x1) {
#if defined(__AVX512BF16__)
    return (vi)_mm512_cvtne2ps_pbh((__m512)x1, (__m512)x0);
#else
    vi low = bf16_bits(x0), high = bf16_bits(x1), pairs;
    for (int i = 0; i < VL / 2; i++) {
        pairs[i] = (int32_t)((uint32_t)low[2 * i] >> 16 | (uint32_t)low[2 * i + 1]);
        pairs[i + VL / 2] = (int32_t)((uint32_t)high[2 * i] >> 16 | (uint32_t)high[2 * i + 1]);
    }
    return pairs;
#endif
}
/* Products of pairs, acc + odd * odd + even * even, each product exact and each sum rounded once, in that order. With
 * BF16 instructions that is one step on the pairs as they are. Else it is two, on the odd (word 1) and then on the even
 * (word 0) half of the pairs of b, and on words of a that are float32. */
#if defined(__AVX512BF16__)
static inline vi bf16_half(vi pairs, int word) { return pairs; }
static inline vf bf16_fma(vf acc, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
static inline vi bf16_word(vf even, vf odd, int word) { return bf16_pairs(even, odd); }
#else
static inline vi bf16_half(vi pairs, int word) { return word ? pairs & (int32_t)0xFFFF0000 : pairs << 16; }
static inline vf bf16_fma(vf acc, vi a, vi b) { return vfma((vf)a, (vf)b, acc); }
static inline vi bf16_word(vf even, vf odd, int word) { return bf16_bits(word ? odd : even); }
#endif

/* out (SIDE x SIDE, leading dimension ldo) = the transpose of in: log2(SIDE) rounds, each swapping the
 * off-diagonal blocks of twice the size. */
enum { SIDE = VL < 8 ? VL : 8 }; /* shuffles of two vectors of 16 lanes take five times as long as those of 8 */
typedef int32_t vside __attribute__((vector_size(4 * SIDE)));
typedef int32_t vside_unaligned __attribute__((vector_size(4 * SIDE), aligned(4), may_alias));

static inline void transpose_square(int32_t *out, ptrdiff_t ldo, const int32_t *in, ptrdiff_t ldi) {
    vside row[SIDE], lane;
    for (int i = 0; i < SIDE; i++) { row[i] = *(const vside_unaligned *)(in + i * ldi); lane[i] = i; }
    for (int size = 1; size < SIDE; size *= 2) {
        const vside upper = (lane & size) != 0;
        const vside keep_i = (~upper & lane) | (upper & (lane - size + SIDE));
        const vside keep_j = (~upper & (lane + size)) | (upper & (lane + SIDE));
        for (int i = 0; i < SIDE; i++)
            if (!(i & size)) {
                vside a = row[i], b = row[i + size];
#if defined(__clang__)
                for (int l = 0; l < SIDE; l++) {
                    row[i][l] = keep_i[l] < SIDE ? a[keep_i[l]] : b[keep_i[l] - SIDE];
                    row[i + size][l] = keep_j[l] < SIDE ? a[keep_j[l]] : b[keep_j[l] - SIDE];
                }
#else
                row[i] = __builtin_shuffle(a, b, keep_i);
                row[i + size] = __builtin_shuffle(a, b, keep_j);
#endif
            }
    }
    for (int i = 0; i < SIDE; i++) *(vside_unaligned *)(out + i * ldo) = row[i];
}
/* out (VL x VL, leading dimension ldo) = the transpose of in. */
static inline void transpose_tile(int32_t *out, ptrdiff_t ldo, const int32_t *in, ptrdiff_t ldi) {
    for (int i = 0; i < VL; i += SIDE)
        for (int j = 0; j < VL; j += SIDE) transpose_square(out + j * ldo + i, ldo, in + i * ldi + j, ldi);
}

/* A work space that belongs to the calling thread, grows as needed, and is freed when the thread ends. Kernels
 * take it before they fork and divide it among their team, so running out of memory is an exception, not a
 * crash, and no step allocates. Large pages spare the matrix product its TLB misses. */
typedef struct { void *data; size_t size; } workspace_t;
static pthread_key_t workspace_key;
static pthread_once_t workspace_once = PTHREAD_ONCE_INIT;
static void workspace_free(void *held) {
    free(((workspace_t *)held)->data);
    free(held);
}
static void workspace_make_key(void) { pthread_key_create(&workspace_key, workspace_free); }

static void *workspace(size_t bytes) {
    const size_t huge = (size_t)2 << 20;
    pthread_once(&workspace_once, workspace_make_key);
    workspace_t *held = pthread_getspecific(workspace_key);
    if (!held) {
        if (!(held = calloc(1, sizeof *held))) return NULL;
        pthread_setspecific(workspace_key, held);
    }
    if (held->size < bytes) {
        bytes = (bytes + huge - 1) / huge * huge;
        free(held->data);
        held->size = 0;
        if (posix_memalign(&held->data, huge, bytes)) { held->data = NULL; return NULL; }
        held->size = bytes;
#if defined(MADV_HUGEPAGE)
        madvise(held->data, bytes, MADV_HUGEPAGE);
#endif
    }
    return held->data;
}

#endif
