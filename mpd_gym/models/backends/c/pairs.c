/* Series in bfloat16. */

#include "level.h"

#if PAIRS
/* The rows a and b in bfloat16, number by number side by side. */
INLINE void pair_vectors(const float *a, const float *b, float *pairs) {
    static const short order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                           21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(b), _mm512_loadu_ps(a));
    const __m512i mixed = _mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)both);
    _mm512_storeu_ps(pairs, (__m512)mixed);
}

/* Round rows by twos, the last one with zeros if it is alone; return how many floats they are. */
static int64_t pair_block(float *block, int64_t deep, float *pairs) {
    if (deep % 2) memset(block + deep * LANES, 0, sizeof(float) * LANES);
    for (int64_t d = 0; d < deep; d += 2)
        pair_vectors(block + d * LANES, block + (d + 1) * LANES, pairs + d / 2 * LANES);
    return ceil_div(deep, 2) * LANES;
}

/* Round series to bfloat16: channels by twos, or rows by twos. Each thread has its share of the
 * steps of time. */
static void pair(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t stride = op->source_stride;
    const int64_t end = op->length * (thread + 1) / c->threads;
    for (int64_t t = op->length * thread / c->threads; t < end; t++) {
        const float *x = c->work + op->source + t * op->source_time;
        float *y = c->work + op->target + t * op->target_time;
        if (op->kind == PAIR_CHANNELS)
            for (int64_t i = 0; i < op->rows * stride; i += LANES)
                _mm256_storeu_ps(y + i / 2, (__m256)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
        else
            for (int64_t m = 0; m < op->rows; m += 2)
                for (int64_t i = 0; i < stride; i += LANES)
                    pair_vectors(x + m * stride + i, x + (m + 1) * stride + i,
                                 y + m / 2 * stride + i);
    }
}
#else
#define pair_block(block, deep, pairs) 0
#endif
