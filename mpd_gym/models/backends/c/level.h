/* Vectors of the instructions that this is compiled for, and what all parts of a level use. */

#ifndef MPD_LEVEL_H
#define MPD_LEVEL_H

#include <math.h>
#include <string.h>

#include "unet.h"

/* Products of numbers in bfloat16, two at a time, with sums in float32. */
#if defined(__AVX512BF16__)
#include <immintrin.h>
#define PAIRS 1
#else
#define PAIRS 0
#endif

/* Vectors, and rows of a tile of two vectors: its sums fill the registers. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#elif defined(__aarch64__)
#define LANES 4
#define ROWS 12
#else
#define LANES 4
#define ROWS 6
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 24")
#endif

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct range {
    int64_t begin, end;
};

/* Rows of a product, of M a step, that read a segment's series, not the zeros around it. */
INLINE struct range reading(const struct segment *input, int64_t length, int64_t rows) {
    const int64_t begin = larger(0, -input->shift);
    return (struct range){begin * rows,
                          larger(begin, smaller(length, input->length - input->shift)) * rows};
}

#endif
