/* Blocks of 8-bit weights, as llama.cpp's Q8_0 has them: 32 neighbours that share a scale, weight = scale * q. */
#ifndef FESTE_Q8_H
#define FESTE_Q8_H

#include "_simd.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { Q8_BLOCK = 32 };
typedef struct {
    uint16_t scale; /* float16, never negative */
    int8_t q[Q8_BLOCK];
} q8_block;

typedef int8_t vb __attribute__((vector_size(VL)));

/* VL weights as float32, without their scale. gcc widens bytes one by one, so each instruction set is told how. */
static inline vf q8_load(const int8_t *q) {
#if defined(__AVX512F__)
    vi wide = (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q));
#elif defined(__AVX2__)
    vi wide = (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q));
#else
    int32_t four;
    memcpy(&four, q, sizeof four);
#if defined(__SSE2__)
    __m128i x = _mm_cvtsi32_si128(four);
    x = _mm_unpacklo_epi8(x, x);
    vi wide = (vi)_mm_srai_epi32(_mm_unpacklo_epi16(x, x), 24); /* each byte four times, and only its sign and it stay */
#elif defined(__ARM_NEON)
    vi wide = (vi)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
#else
    vi wide;
    for (int i = 0; i < VL; i++) wide[i] = q[i];
#endif
#endif
    return __builtin_convertvector(wide, vf);
}

/* x to the nearest integer, halves away from zero, as roundf does it; |x| <= 127. */
static inline void q8_store(int8_t *q, vf x) {
    vi whole = __builtin_convertvector(x, vi); /* towards zero, so that the rest is exact */
    vf rest = x - __builtin_convertvector(whole, vf);
    whole = whole - (rest >= vset(0.5f)) + (rest <= vset(-0.5f)); /* a comparison that holds is -1 */
    vb narrow = __builtin_convertvector(whole, vb);
    memcpy(q, &narrow, sizeof narrow);
}

/* float16 of x >= 0, to nearest, ties to even. Above 2^-14 its bits are those of float32 with a smaller exponent; below,
 * it counts units of 2^-24. */
static inline uint16_t half_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x < 6.103515625e-5f) return (uint16_t)rintf(x * 16777216.0f);
    bits += 0xFFF + ((bits >> 13) & 1);
    bits = (bits >> 13) - (112 << 10);
    return bits < 0x7C00 ? (uint16_t)bits : 0x7C00;
}

/* The float16 with these bits, >= 0 and finite, exactly: 2^112 moves the exponent, of subnormals too. */
static inline float half_value(uint16_t half) {
    uint32_t bits = (uint32_t)half << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x * 5.192296858534828e33f;
}

#endif
