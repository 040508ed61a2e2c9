/* What all parts share: vectors, and the lists of ops that `ops.py` writes.
 *
 * Series are [L, M, C]: time first, then the series of a batch, channels last and padded to whole
 * vectors. Row t·M + m of such a series and the rows of its neighbours in time are at fixed
 * distances, so that a convolution is a product of rows with weights that needs no copy of its
 * windows. Vectors are those of GCC and Clang.
 */

#ifndef MPD_UNET_H
#define MPD_UNET_H

#include <stdint.h>

/* Kinds of ops. */
enum {
    LOAD,
    STORE,
    COPY,
    ADD,
    PRODUCT,
    NORM,
    NORM_CAUSAL,
    PAIR_CHANNELS,
    /* training */
    PAIR_ROWS,
    NORM_BACKWARD,
    WEIGHT_GRADIENT,
    PACK,
    UNPACK,
    SWISH,
    SWISH_BACKWARD,
    FILM,
    FILM_BACKWARD,
    KINDS
};

/* Input rows of a product: row r is at work + start + r · stride. Step t of the product's time is
 * step t + shift of a series of `length` steps, with zeros around. */
struct segment {
    int64_t start, channels, stride, shift, length;
};

/* Consecutive segments of a product, as many as the nearest cache holds for a tile of rows. */
struct chunk {
    int64_t first, count, depth; /* depth: sum of the channels of all segments before */
};

/* Places are counts of floats from the start of the work space. */
struct op {
    int64_t kind;
    int64_t length, rows, channels; /* L, M, C of what is written */
    int64_t source, target;         /* first floats read and written */
    int64_t source_stride;          /* from one row to the next */
    int64_t target_stride;
    int64_t source_time; /* from one step of time to the next */
    int64_t target_time;
    /* product */
    int64_t count; /* of chunks */
    const struct segment *segments;
    const struct chunk *chunks;
    const float *weight; /* [C / LANES, K, LANES] */
    const float *bias;   /* [C / LANES, LANES] */
    int64_t depth;       /* K, sum of the segments' channels */
    int64_t fetched;     /* whether weights are fetched a chunk ahead */
    int64_t chunk_size;  /* channels of all chunks but the last */
    int64_t paired;      /* whether a float of inputs and weights is two numbers in bfloat16 */
    /* normalisation */
    int64_t groups, film, residual, swish; /* residual: its place, or 0 */
    int64_t scratch;                       /* for 4 · M · source_stride floats, 6 in training */
    double eps;
    /* training */
    int64_t d_source, d_target, d_residual, d_shifts; /* gradients of these */
    int64_t moments;    /* of a normalisation, [2, M, groups], or 0 */
    int64_t accumulate; /* whether a product, or the gradient of a residual or bias, is added */
    float *panels;      /* packed weights or their gradients, [C / LANES, K, LANES] */
    const float *plain; /* weights as PyTorch has them */
    int64_t lane_stride, inner_stride, place; /* place: of a gradient in `gradients` */
    int64_t row_pairs; /* of a gradient, where the product that needs it is paired */
    int64_t shifts;    /* beside scales, at `target` */
};

/* One run of a list of ops. */
struct call {
    const struct op *ops;
    int64_t count;
    float *work;
    const float *input; /* [M, L, D] */
    float *output;
    const float *scale, *shift;         /* [G, film_stride] */
    int64_t film_stride, share, first;  /* series `first` + m reads row (first + m) / share */
    float *d_scale, *d_shift;           /* [M, film_stride] */
    float *gradients;                   /* of all weights, as PyTorch has them */
    int64_t threads;                    /* wanted, and in a running call those that there are */
};

/* The code compiled for one set of instructions. */
struct level {
    const char *sources; /* their digest; first, to be read whatever else has changed */
    const char *name;
    int64_t lanes, pairs; /* floats in a vector; whether it multiplies in bfloat16 */
    void (*run)(const struct call *call);
};

#endif
