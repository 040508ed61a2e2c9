/* A temporal U-Net as a list of steps, forward and backward; native_plan.py writes the list.
 *
 * Series are [L, M, C]: time first, then the series of a batch, channels last and padded to whole
 * vectors. Row t·M + m of such a series and the rows of its neighbours in time are at fixed
 * distances, so that a convolution is a product of rows with weights that needs no copy of its
 * windows. Vectors are those of GCC and Clang.
 */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

/* Products of numbers in bfloat16, two at a time, with sums in float32. What has tiles of its own
 * for them, as AMX has, is better served by oneDNN. */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include <immintrin.h>
#define PAIRS 1
#else
#define PAIRS 0
#endif

/* Vectors of the machine, and rows of a tile of two vectors: its sums fill the registers. */
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
#define NEAR 64 /* rows of weights, one vector each, that are fetched ahead of their use */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 24")
#endif

enum {
    LOAD,
    STORE,
    COPY,
    ADD,
    PRODUCT,
    NORM,
    NORM_CAUSAL,
    NORM_BACKWARD,
    WEIGHT_GRADIENT,
    PACK,
    UNPACK,
    PAIR_CHANNELS,
    PAIR_ROWS,
    SWISH,
    SWISH_BACKWARD,
    FILM,
    FILM_BACKWARD
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

/* One step. Places are counts of floats from the start of the work space. */
struct step {
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

struct call {
    const struct step *steps;
    int64_t count;
    float *work;
    const float *input; /* [M, L, D] */
    float *output;
    const float *scale, *shift; /* [G, film_stride] */
    int64_t film_stride, share, first;
    float *d_scale, *d_shift; /* [M, film_stride] */
    float *gradients;         /* of all weights, as PyTorch has them */
    int64_t threads;
    atomic_int begun, arrived, round;
};

/* --- products ----------------------------------------------------------------------------------- */

struct tile {
    const float *work;
    const struct segment *segments;
    int64_t count, row;
    const float *weight;
    int64_t panel;    /* floats from one vector of outputs to the next: depth · LANES */
    const float *far; /* weights that the next chunk will read */
    int64_t fetched;  /* lines of them */
};

INLINE vec add_product(const int PAIRED, vec sum, vec weights, float x) {
#if PAIRS
    if (PAIRED)
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_ps(x));
#endif
    (void)PAIRED;
    return sum + weights * x;
}

/* Add `depth` products of a number of each of R rows with V vectors: from one to the next, rows
 * move by x_step and vectors by w_step. R and V are constants where this is inlined, as are PAIRED
 * and FAR, the lines of `far` that are fetched for each. */
INLINE void accumulate(const int R, const int V, const int FAR, const int PAIRED, const float *x,
                       int64_t stride, const int64_t x_step, const float *w, int64_t panel,
                       const int64_t w_step, int64_t depth, const float *far, int64_t *fetched,
                       vec sum[2 * ROWS]) {
    for (int64_t c = 0; c < depth; c++) {
        vec weights[2];
        UNROLL for (int v = 0; v < V; v++) {
            weights[v] = *(const vec *)(w + v * panel);
            if (!FAR) __builtin_prefetch(w + v * panel + NEAR * LANES);
        }
        UNROLL for (int f = 0; f < FAR; f++, (*fetched)++)
            __builtin_prefetch(far + *fetched % 2 * panel + *fetched / 2 * LANES, 0, 2);
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int v = 0; v < V; v++)
                sum[r * V + v] = add_product(PAIRED, sum[r * V + v], weights[v], x[r * stride]);
        }
        x += x_step;
        w += w_step;
    }
}

/* Add to R rows of V vectors of outputs. */
INLINE void multiply(const int R, const int V, const int FAR, const int PAIRED, struct tile *t,
                     vec acc[2 * ROWS]) {
    vec sum[2 * ROWS];
    UNROLL for (int r = 0; r < R * V; r++) sum[r] = acc[r];
    const float *w = t->weight;
    for (int64_t s = 0; s < t->count; s++) {
        const struct segment *input = t->segments + s;
        const float *x = t->work + input->start + t->row * input->stride;
        accumulate(R, V, FAR, PAIRED, x, input->stride, 1, w, t->panel, LANES, input->channels,
                   t->far, &t->fetched, sum);
        w += input->channels * LANES;
    }
    UNROLL for (int r = 0; r < R * V; r++) acc[r] = sum[r];
}

/* One function for each width, FAR and PAIRED, which chooses by the number of rows. */
#define CASE(R)                                                                                    \
    case R:                                                                                        \
        multiply(R, V, FAR, PAIRED, t, acc);                                                       \
        break;
#define UP_TO_6 CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS == 12
#define CASES UP_TO_6 CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define CASES UP_TO_6
#endif
#define CHOICE(name, width, lines, paired)                                                         \
    static __attribute__((noinline)) void name(int64_t rows, struct tile *t,                       \
                                               vec acc[2 * ROWS]) {                                \
        enum { V = width, FAR = lines, PAIRED = paired };                                          \
        switch (rows) { CASES }                                                                    \
    }
CHOICE(one, 1, 0, 0)
CHOICE(two, 2, 0, 0)
CHOICE(two_fetch_one, 2, 1, 0)
CHOICE(two_fetch_two, 2, 2, 0)
#if PAIRS
CHOICE(one_paired, 1, 0, 1)
CHOICE(two_paired, 2, 0, 1)
CHOICE(two_paired_fetch_one, 2, 1, 1)
CHOICE(two_paired_fetch_two, 2, 2, 1)
#endif

typedef void kernel(int64_t rows, struct tile *t, vec acc[2 * ROWS]);
static kernel *const KERNELS[][4] = {
    {one, two, two_fetch_one, two_fetch_two},
#if PAIRS
    {one_paired, two_paired, two_paired_fetch_one, two_paired_fetch_two},
#endif
};

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct range {
    int64_t begin, end;
};

/* Rows of a product, of M a step, that read a segment's series, not the zeros around it. */
static struct range reading(const struct segment *input, int64_t length, int64_t rows) {
    const int64_t begin = larger(0, -input->shift);
    return (struct range){begin * rows,
                          larger(begin, smaller(length, input->length - input->shift)) * rows};
}

/* One chunk of a product for a tile of `high` rows from `row` on, and `across` vectors from `first`
 * on. The first chunk begins with the bias, others go on with what was written.
 *
 * Where weights are fetched a chunk ahead, each of the first two tiles fetches half of the next one;
 * a single tile fetches all of it. */
static void add_chunk(const struct step *s, float *work, int64_t c, int64_t row, int64_t high,
                      int64_t tile, int64_t tiles, int64_t first, int64_t across) {
    const struct chunk *chunk = s->chunks + c;
    const int64_t panel = s->depth * LANES;
    const float *weight = s->weight + first * panel;
    const int64_t next = c + 1 < s->count ? chunk[1].depth * LANES : 2 * panel;
    const int fetch = s->fetched && across == 2 && tile < 2;
    kernel *const add = KERNELS[s->paired][across == 1 ? 0 : !fetch ? 1 : tiles == 1 ? 3 : 2];
    struct tile t = {.work = work,
                     .weight = weight + chunk->depth * LANES,
                     .panel = panel,
                     .far = weight + next + tile * s->chunk_size / 2 * LANES};
    vec acc[2 * ROWS];
    float *written[ROWS]; /* rows of the result */
    int64_t time = row / s->rows, m = row % s->rows;
    for (int64_t r = 0; r < high; r++) {
        written[r] = work + s->target + time * s->target_time + m * s->target_stride;
        if (++m == s->rows) m = 0, time++;
        const float *begin = chunk->depth || s->accumulate ? written[r] : s->bias;
        for (int64_t v = 0; v < across; v++)
            acc[r * across + v] = *(const vec *)(begin + (first + v) * LANES);
    }
    /* Segments that the same rows read go together. */
    const struct segment *input = s->segments + chunk->first, *const end = input + chunk->count;
    while (input < end) {
        const struct range all = reading(input, s->length, s->rows);
        int64_t depth = 0;
        for (t.segments = input; input < end; depth += input++->channels) {
            const struct range own = reading(input, s->length, s->rows);
            if (own.begin != all.begin || own.end != all.end) break;
        }
        const int64_t from = larger(all.begin, row), to = smaller(all.end, row + high);
        t.count = input - t.segments;
        t.row = from;
        if (from < to) add(to - from, &t, acc + (from - row) * across);
        t.weight += depth * LANES;
    }
    for (int64_t r = 0; r < high; r++)
        for (int64_t v = 0; v < across; v++)
            *(vec *)(written[r] + (first + v) * LANES) = acc[r * across + v];
}

/* Panels of weights, of two vectors each, are the outer loop; a chunk of one serves all tiles. */
static void product(const struct step *s, float *work, int64_t thread, int64_t threads) {
    const int64_t rows = s->length * s->rows, vectors = ceil_div(s->channels, LANES);
    const int64_t tiles = ceil_div(rows, ROWS), high = ceil_div(rows, tiles);
    const int64_t tasks = ceil_div(vectors, 2) * tiles, end = tasks * (thread + 1) / threads;
    for (int64_t task = tasks * thread / threads; task < end;) {
        const int64_t first = task / tiles * 2, from = task % tiles;
        const int64_t to = smaller(from + end - task, tiles);
        const int64_t across = smaller(vectors - first, 2);
        for (int64_t c = 0; c < s->count; c++)
            for (int64_t tile = from; tile < to && tile * high < rows; tile++) {
                const int64_t row = tile * high;
                add_chunk(s, work, c, row, smaller(rows - row, high), tile, tiles, first, across);
            }
        task += to - from;
    }
}

/* Gradient of a product's weights: rows of inputs, transposed, times rows of gradients. Here a tile
 * is of channels of an input, and the depth is that of all rows, in parts that stay in a cache. */
INLINE void outer(const int R, const int V, const int PAIRED, const float *x, int64_t x_stride,
                  const float *y, int64_t y_stride, int64_t depth, float *out, int64_t panel,
                  int begins) {
    vec sum[2 * ROWS];
    int64_t none = 0;
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < V; v++)
            sum[r * V + v] = begins ? (vec){} : *(vec *)(out + v * panel + r * LANES);
    }
    accumulate(R, V, 0, PAIRED, x, 1, x_stride, y, LANES, y_stride, depth, 0, &none, sum);
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < V; v++) *(vec *)(out + v * panel + r * LANES) = sum[r * V + v];
    }
}

#undef CASE
#define CASE(R)                                                                                    \
    case R:                                                                                        \
        if (across == 2)                                                                           \
            outer(R, 2, PAIRED, x, x_stride, y, y_stride, depth, out, panel, begins);              \
        else                                                                                       \
            outer(R, 1, PAIRED, x, x_stride, y, y_stride, depth, out, panel, begins);              \
        break;
#define CHOICE_OUTER(name, paired)                                                                 \
    static __attribute__((noinline)) void name(                                                    \
        int64_t high, int64_t across, const float *x, int64_t x_stride, const float *y,            \
        int64_t y_stride, int64_t depth, float *out, int64_t panel, int begins) {                  \
        enum { PAIRED = paired };                                                                  \
        switch (high) { CASES }                                                                    \
    }
CHOICE_OUTER(add_outer, 0)
#if PAIRS
CHOICE_OUTER(add_outer_paired, 1)
#else
#define add_outer_paired add_outer
#endif

#define PART 128 /* rows */

static void weight_gradient(const struct step *s, float *work, float *gradients, int64_t thread,
                            int64_t threads) {
    const int64_t rows = s->length * s->rows, vectors = ceil_div(s->channels, LANES);
    const int64_t pairs = ceil_div(vectors, 2), panel = s->depth * LANES;
    const int64_t at_once = s->paired ? s->rows / 2 : s->rows;
    const float *y = work + (s->paired ? s->row_pairs : s->source);
    for (int64_t part = 0; part < s->length * at_once; part += PART) {
        int64_t task = 0, before = 0; /* of all tiles; channels of segments before */
        for (int64_t i = 0; i < s->count; i++) {
            const struct segment *input = s->segments + i;
            const struct range all = reading(input, s->length, at_once);
            const int64_t from = larger(all.begin, part);
            const int64_t depth = smaller(all.end, part + PART) - from;
            const float *x = work + input->start + from * input->stride;
            const int64_t tiles = ceil_div(input->channels, ROWS);
            const int64_t most = ceil_div(input->channels, tiles);
            for (int64_t c = 0; c < input->channels; c += most)
                for (int64_t p = 0; p < pairs; p++) {
                    if (task++ % threads != thread) continue;
                    const int64_t across = vectors - 2 * p < 2 ? 1 : 2;
                    const int64_t left = input->channels - c;
                    (s->paired ? add_outer_paired : add_outer)(
                        left < most ? left : most, across, x + c, input->stride,
                        y + from * s->source_stride + 2 * p * LANES, s->source_stride, depth,
                        s->panels + 2 * p * panel + (before + c) * LANES, panel, !part);
                }
            before += input->channels;
        }
    }
    if (thread) return;
    for (int64_t o = 0; o < s->channels; o += LANES) { /* of the bias */
        const float *gradient = work + s->source + o;
        vec sum = {0};
        for (int64_t r = 0; r < rows; r++) sum += *(const vec *)(gradient + r * s->source_stride);
        for (int64_t i = o; i < s->channels && i < o + LANES; i++)
            gradients[s->place + i] = sum[i - o] + (s->accumulate ? gradients[s->place + i] : 0);
    }
}

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
static void pair(const struct step *s, float *work, int64_t thread, int64_t threads) {
    const int64_t stride = s->source_stride;
    for (int64_t t = s->length * thread / threads; t < s->length * (thread + 1) / threads; t++) {
        const float *x = work + s->source + t * s->source_time;
        float *y = work + s->target + t * s->target_time;
        if (s->kind == PAIR_CHANNELS)
            for (int64_t i = 0; i < s->rows * stride; i += LANES)
                _mm256_storeu_ps(y + i / 2, (__m256)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
        else
            for (int64_t m = 0; m < s->rows; m += 2)
                for (int64_t i = 0; i < stride; i += LANES)
                    pair_vectors(x + m * stride + i, x + (m + 1) * stride + i,
                                 y + m / 2 * stride + i);
    }
}
#else
#define pair_block(block, deep, pairs) 0
#endif

/* Between weights as PyTorch has them and panels. Segments say where a tap begins and how many
 * inner channels it has. */
static void repack(const struct call *c, const struct step *s, int64_t thread) {
    const int64_t vectors = ceil_div(s->channels, LANES);
    for (int64_t p = thread; p < vectors; p += c->threads) {
        float *panel = s->panels + p * s->depth * LANES;
        float block[LANES * LANES] = {0}; /* of weights that are to be paired */
        const int64_t lanes = s->channels - p * LANES < LANES ? s->channels - p * LANES : LANES;
        for (int64_t i = 0; i < s->count; i++) {
            const struct segment *tap = s->segments + i;
            const int64_t start = tap->start + p * LANES * s->lane_stride;
            const float *from = s->plain + start;
            float *to = c->gradients + s->place + start;
            /* In blocks, so that lines of both sides stay in the nearest cache. */
            for (int64_t k = 0; k < tap->channels; k += LANES) {
                const int64_t deep = tap->channels - k < LANES ? tap->channels - k : LANES;
                const int64_t there = k * s->inner_stride;
                float *packed = s->paired ? block : panel;
                if (s->kind == UNPACK)
                    for (int64_t l = 0; l < lanes; l++)
                        for (int64_t d = 0; d < deep; d++)
                            to[there + l * s->lane_stride + d * s->inner_stride] =
                                panel[d * LANES + l];
                else if (s->lane_stride == 1)
                    for (int64_t d = 0; d < deep; d++)
                        memcpy(packed + d * LANES, from + there + d * s->inner_stride,
                               sizeof(float) * (size_t)lanes);
                else
                    for (int64_t l = 0; l < lanes; l++)
                        for (int64_t d = 0; d < deep; d++)
                            packed[d * LANES + l] =
                                from[there + l * s->lane_stride + d * s->inner_stride];
                panel += s->paired ? pair_block(block, deep, panel) : deep * LANES;
            }
        }
    }
}

/* --- normalisation ------------------------------------------------------------------------------ */

INLINE vec at_least(vec x, float low) {
    const ivec below = (ivec)(x < low);
    return (vec)(((ivec)(vec){} & below) | ((ivec)x & ~below)) + (vec)((ivec)((vec){} + low) & below);
}

/* 1 / (1 + exp(−x)), to two units in the last place; exp by Cody and Waite's reduction. */
INLINE vec sigmoid(vec x) {
    const float magic = 12582912.0f; /* 1.5 · 2^23: adding it rounds to a whole number */
    const vec z = at_least(-at_least(x, -87.0f), -87.0f); /* −x, where exp is a normal number */
    const vec n = (z * 1.44269504f + magic) - magic;
    const vec r = z - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const vec power = (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
    return 1.0f / (p * power + 1.0f);
}

INLINE vec swish(vec x) { return x * sigmoid(x); }

/* Factor and term of each channel of a group, by its mean and variance and the given scales. */
INLINE void modulation(const struct step *s, int64_t group, float mean, float variance,
                       const float *scale, const float *shift, float *factor, float *term) {
    const int64_t size = s->channels / s->groups;
    const float inverse = 1.0f / sqrtf(variance + (float)s->eps);
    for (int64_t i = group * size; i < (group + 1) * size; i++) {
        factor[i] = scale[i] * inverse;
        term[i] = shift[i] - mean * factor[i];
    }
}

/* Apply factors and terms to series side by side at step t, from place `begin` of that step on; add
 * a residual if there is one, and take the swish if asked for. */
INLINE void modulate(const struct step *s, float *work, int64_t t, int64_t begin, int64_t width,
                     const float *factor, const float *term) {
    const float *x = work + s->source + t * s->source_time + begin;
    float *y = work + s->target + t * s->target_time + begin;
    const float *other = work + s->residual + t * s->source_time + begin;
    for (int64_t i = 0; i < width; i += LANES) {
        vec value = *(const vec *)(x + i) * *(const vec *)(factor + i) + *(const vec *)(term + i);
        if (s->residual) value += *(const vec *)(other + i);
        *(vec *)(y + i) = s->swish ? swish(value) : value;
    }
}

/* Group normalisation over time and the channels of a group; then scale and shift of each channel.
 * Each thread has its share of the series. */
static void normalise(const struct call *c, const struct step *s, int64_t thread) {
    const int64_t M = s->rows, stride = s->source_stride, size = s->channels / s->groups;
    const int64_t from = M * thread / c->threads, to = M * (thread + 1) / c->threads;
    const int64_t begin = from * stride, width = (to - from) * stride;
    const float *x = c->work + s->source + begin;
    float *mean = c->work + s->scratch + begin, *square = mean + M * stride;

    memset(mean, 0, sizeof(float) * (size_t)width);
    memset(square, 0, sizeof(float) * (size_t)width);
    for (int64_t t = 0; t < s->length; t++)
        for (int64_t i = 0; i < width; i += LANES)
            *(vec *)(mean + i) += *(const vec *)(x + t * s->source_time + i);
    for (int64_t m = 0; m < to - from; m++)
        for (int64_t g = 0; g < s->groups; g++) {
            float *part = mean + m * stride + g * size, sum = 0;
            for (int64_t i = 0; i < size; i++) sum += part[i];
            sum /= (float)(s->length * size);
            for (int64_t i = 0; i < size; i++) part[i] = sum;
        }
    for (int64_t t = 0; t < s->length; t++)
        for (int64_t i = 0; i < width; i += LANES) {
            const vec d = *(const vec *)(x + t * s->source_time + i) - *(const vec *)(mean + i);
            *(vec *)(square + i) += d * d;
        }
    for (int64_t m = 0; m < to - from; m++) {
        const int64_t film = (c->first + from + m) / c->share * c->film_stride + s->film;
        float *factor = square + m * stride, *term = mean + m * stride;
        for (int64_t g = 0; g < s->groups; g++) {
            float sum = 0;
            for (int64_t i = g * size; i < (g + 1) * size; i++) sum += factor[i];
            sum /= (float)(s->length * size);
            if (s->moments) {
                float *moments = c->work + s->moments + (from + m) * s->groups + g;
                moments[0] = term[g * size];
                moments[M * s->groups] = 1.0f / sqrtf(sum + (float)s->eps);
            }
            modulation(s, g, term[g * size], sum, c->scale + film, c->shift + film, factor, term);
        }
        for (int64_t i = s->channels; i < stride; i++) factor[i] = term[i] = 0;
    }
    for (int64_t t = 0; t < s->length; t++) modulate(s, c->work, t, begin, width, square, mean);
}

/* Numbers of each series and channel in a backward pass, [M, C] each. */
struct sums {
    float *mean, *inverse, *scale, *shift;
    float *sum, *product; /* of g, and of g x̂; then what is added to the gradient */
};

INLINE vec normal(const float *x, const struct sums *n, int64_t i) {
    return (*(const vec *)(x + i) - *(vec *)(n->mean + i)) * *(vec *)(n->inverse + i);
}

/* Put moments, scales and shifts side by side; c's series `from` to `to`. */
static void spread(const struct call *c, const struct step *s, int64_t from, int64_t to,
                   const struct sums *n) {
    const int64_t stride = s->source_stride, size = s->channels / s->groups;
    for (int64_t m = from; m < to; m++) {
        const int64_t film = (c->first + m) / c->share * c->film_stride + s->film;
        const int64_t here = (m - from) * stride;
        const float *moments = c->work + s->moments + m * s->groups;
        for (int64_t i = 0; i < s->channels; i++) {
            n->mean[here + i] = moments[i / size];
            n->inverse[here + i] = moments[s->rows * s->groups + i / size];
            n->scale[here + i] = c->scale[film + i];
            n->shift[here + i] = c->shift[film + i];
        }
    }
}

/* Take the gradient back through swish and residual at step t, and add it to the sums. */
INLINE void take_back(const struct step *s, float *work, int64_t t, int64_t begin, int64_t width,
                      const struct sums *n) {
    const int64_t here = t * s->source_time + begin;
    const float *x = work + s->source + here, *other = work + s->residual + here;
    float *gradient = work + s->d_target + here;
    float *d_other = work + s->d_residual + here;
    for (int64_t i = 0; i < width; i += LANES) {
        const vec unit = normal(x, n, i);
        vec g = *(vec *)(gradient + i);
        if (s->swish) {
            vec value = unit * *(vec *)(n->scale + i) + *(vec *)(n->shift + i);
            if (s->residual) value += *(const vec *)(other + i);
            const vec chance = sigmoid(value);
            g *= chance * (1.0f + value * (1.0f - chance));
            *(vec *)(gradient + i) = g;
        }
        if (s->residual && s->accumulate)
            *(vec *)(d_other + i) += g;
        else if (s->residual)
            *(vec *)(d_other + i) = g;
        *(vec *)(n->sum + i) += g;
        *(vec *)(n->product + i) += g * unit;
    }
}

/* Gradients of scale and shift from the sums, which become what the gradient of x needs. */
static void finish_sums(const struct call *c, const struct step *s, int64_t m, int64_t here,
                        const struct sums *n) {
    const int64_t size = s->channels / s->groups, film = m * c->film_stride + s->film;
    float *scale = n->scale + here, *sum = n->sum + here, *product = n->product + here;
    for (int64_t g = 0; g < s->groups; g++) {
        float a = 0, b = 0;
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            c->d_shift[film + i] = sum[i];
            c->d_scale[film + i] = product[i];
            a += scale[i] * sum[i];
            b += scale[i] * product[i];
        }
        const float count = (float)(s->length * size), inverse = n->inverse[here + g * size];
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            scale[i] *= inverse;
            sum[i] = -a / count * inverse;
            product[i] = -b / count * inverse;
        }
    }
}

/* Gradients of a normalisation's series, residual, scale and shift from that of its result.
 *
 * With x̂ = (x − mean) · inverse and g the gradient before the swish, that of x is
 * inverse · (scale g − A − x̂ B), where A and B are means over a group of scale g and scale g x̂. */
static void normalise_backward(const struct call *c, const struct step *s, int64_t thread) {
    const int64_t stride = s->source_stride, all = s->rows * stride;
    const int64_t from = s->rows * thread / c->threads, to = s->rows * (thread + 1) / c->threads;
    const int64_t begin = from * stride, width = (to - from) * stride;
    float *first = c->work + s->scratch + begin;
    const struct sums n = {first,           first + all,     first + 2 * all,
                           first + 3 * all, first + 4 * all, first + 5 * all};
    for (int64_t part = 0; part < 6; part++)
        memset(first + part * all, 0, sizeof(float) * (size_t)width);
    spread(c, s, from, to, &n);
    for (int64_t t = 0; t < s->length; t++) take_back(s, c->work, t, begin, width, &n);
    for (int64_t m = from; m < to; m++) finish_sums(c, s, m, (m - from) * stride, &n);
    for (int64_t t = 0; t < s->length; t++) {
        const int64_t here = t * s->source_time + begin;
        const float *x = c->work + s->source + here;
        const float *gradient = c->work + s->d_target + here;
        float *d_x = c->work + s->d_source + here;
        for (int64_t i = 0; i < width; i += LANES)
            *(vec *)(d_x + i) = *(const vec *)(gradient + i) * *(vec *)(n.scale + i) +
                                normal(x, &n, i) * *(vec *)(n.product + i) + *(vec *)(n.sum + i);
    }
}

/* The same as `normalise` with mean and variance of the steps so far. */
static void normalise_causally(const struct call *c, const struct step *s, int64_t thread) {
    const int64_t M = s->rows, stride = s->source_stride, size = s->channels / s->groups;
    for (int64_t m = M * thread / c->threads; m < M * (thread + 1) / c->threads; m++) {
        const int64_t film = (c->first + m) / c->share * c->film_stride + s->film;
        const float *x = c->work + s->source + m * stride;
        float *mean = c->work + s->scratch + 4 * m * stride, *square = mean + stride; /* sums */
        float *factor = square + stride, *term = factor + stride;
        memset(mean, 0, sizeof(float) * (size_t)(4 * stride));
        for (int64_t t = 0; t < s->length; t++) {
            const float count = (float)(t + 1);
            for (int64_t g = 0; g < s->groups; g++) {
                float sum = 0, squares = 0;
                for (int64_t i = g * size; i < (g + 1) * size; i++) {
                    const float value = x[t * s->source_time + i];
                    sum += value;
                    squares += value * value;
                }
                mean[g] += sum / (float)size;
                square[g] += squares / (float)size;
                const float center = mean[g] / count;
                const float variance = square[g] / count - center * center;
                modulation(s, g, center, variance > 0 ? variance : 0, c->scale + film,
                           c->shift + film, factor, term);
            }
            modulate(s, c->work, t, m * stride, stride, factor, term);
        }
    }
}

/* --- modulation, in training --------------------------------------------------------------------- */

/* The swish of one step of time, or its gradient. */
static void activate(const struct step *s, float *work, int64_t thread, int64_t threads) {
    const int64_t from = s->rows * thread / threads, to = s->rows * (thread + 1) / threads;
    const float *x = work + s->source;
    float *y = work + s->target;
    for (int64_t i = from * s->source_stride; i < to * s->source_stride; i += LANES) {
        const vec value = *(const vec *)(x + i), chance = sigmoid(value);
        if (s->kind == SWISH)
            *(vec *)(y + i) = value * chance;
        else
            *(vec *)(work + s->d_source + i) =
                *(const vec *)(work + s->d_target + i) * chance * (1.0f + value * (1.0f - chance));
    }
}

/* Scales and shifts of a normalisation: those of FiLM, side by side at `source`, of what the affine
 * part makes of a series; those of the affine part alone where there is no source. */
static void modulate_affine(const struct step *s, float *work, int64_t thread, int64_t threads) {
    const float *gain = s->weight, *offset = s->bias;
    for (int64_t m = s->rows * thread / threads; m < s->rows * (thread + 1) / threads; m++) {
        const float *by = work + s->source + m * s->source_stride;
        float *scale = work + s->target + m * s->target_stride;
        float *shift = work + s->shifts + m * s->target_stride;
        for (int64_t i = 0; i < s->channels; i++) {
            scale[i] = s->source ? by[i] * gain[i] : gain[i];
            shift[i] = s->source ? by[s->channels + i] + by[i] * offset[i] : offset[i];
        }
    }
}

/* Gradients of FiLM's scales and shifts, and of the affine part; each thread has its channels. */
static void modulate_affine_backward(const struct step *s, float *work, float *gradients,
                                     int64_t thread, int64_t threads) {
    const int64_t from = s->channels * thread / threads, to = s->channels * (thread + 1) / threads;
    const float *gain = s->weight, *offset = s->bias;
    float *d_gain = gradients + s->place, *d_offset = d_gain + s->channels;
    for (int64_t i = from; i < to; i++) d_gain[i] = d_offset[i] = 0;
    for (int64_t m = 0; m < s->rows; m++) {
        const float *d_scale = work + s->d_target + m * s->target_stride;
        const float *d_shift = work + s->d_shifts + m * s->target_stride;
        const float *by = work + s->source + m * s->source_stride;
        float *d_by = work + s->d_source + m * s->source_stride;
        for (int64_t i = from; i < to; i++) {
            d_gain[i] += d_scale[i] * (s->source ? by[i] : 1.0f);
            d_offset[i] += d_shift[i] * (s->source ? by[i] : 1.0f);
            if (!s->source) continue;
            d_by[i] = d_scale[i] * gain[i] + d_shift[i] * offset[i];
            d_by[s->channels + i] = d_shift[i];
        }
    }
}

/* --- the list of steps -------------------------------------------------------------------------- */

/* Between the memory of the caller, [M, L, C], and series with time first. */
static void move(const struct call *c, const struct step *s) {
    const size_t size = sizeof(float) * (size_t)s->channels;
    for (int64_t m = 0; m < s->rows; m++)
        for (int64_t t = 0; t < s->length; t++) {
            const int64_t there = (m * s->length + t) * s->channels;
            if (s->kind == LOAD)
                memcpy(c->work + s->target + t * s->target_time + m * s->target_stride,
                       c->input + there, size);
            else
                memcpy(c->output + there,
                       c->work + s->source + t * s->source_time + m * s->source_stride, size);
        }
}

/* Take the place of series, or be added to them. */
static void transfer(const struct step *s, float *work) {
    const int64_t width = s->rows * s->target_stride;
    for (int64_t t = 0; t < s->length; t++) {
        const float *x = work + s->source + t * s->source_time;
        float *y = work + s->target + t * s->target_time;
        if (s->kind == COPY)
            memcpy(y, x, sizeof(float) * (size_t)width);
        else
            for (int64_t i = 0; i < width; i += LANES) *(vec *)(y + i) += *(const vec *)(x + i);
    }
}

/* Wait for all threads; a thread that waits long lets others have its core. */
static void meet(struct call *c) {
    if (c->threads == 1) return;
    const int round = atomic_load(&c->round);
    if (atomic_fetch_add(&c->arrived, 1) == c->threads - 1) {
        atomic_store(&c->arrived, 0);
        atomic_fetch_add(&c->round, 1);
        return;
    }
    for (int spins = 0; atomic_load(&c->round) == round; spins++)
        if (spins > 2000) sched_yield();
}

static void work_through(struct call *c, int64_t thread) {
    for (int64_t i = 0; i < c->count; i++) {
        const struct step *s = c->steps + i;
        if (s->kind == PRODUCT)
            product(s, c->work, thread, c->threads);
        else if (s->kind == NORM)
            normalise(c, s, thread);
        else if (s->kind == NORM_CAUSAL)
            normalise_causally(c, s, thread);
        else if (s->kind == NORM_BACKWARD)
            normalise_backward(c, s, thread);
        else if (s->kind == SWISH || s->kind == SWISH_BACKWARD)
            activate(s, c->work, thread, c->threads);
        else if (s->kind == FILM)
            modulate_affine(s, c->work, thread, c->threads);
        else if (s->kind == FILM_BACKWARD)
            modulate_affine_backward(s, c->work, c->gradients, thread, c->threads);
        else if (s->kind == WEIGHT_GRADIENT)
            weight_gradient(s, c->work, c->gradients, thread, c->threads);
        else if (s->kind == PACK || s->kind == UNPACK)
            repack(c, s, thread);
#if PAIRS
        else if (s->kind == PAIR_CHANNELS || s->kind == PAIR_ROWS)
            pair(s, c->work, thread, c->threads);
#endif
        else if (thread == 0) {
            if (s->kind == COPY || s->kind == ADD)
                transfer(s, c->work);
            else
                move(c, s);
        }
        meet(c);
    }
}

struct member {
    struct call *call;
    int64_t thread;
};

static void *join(void *argument) {
    const struct member *member = argument;
    while (!atomic_load(&member->call->begun)) sched_yield();
    work_through(member->call, member->thread);
    return 0;
}

#define MOST_THREADS 64

/* Run the steps with so many threads, or with as many as can be started. */
void mpd_run(const struct step *steps, int64_t count, float *work, const float *input,
             float *output, const float *scale, const float *shift, int64_t film_stride,
             int64_t share, int64_t first, float *d_scale, float *d_shift, float *gradients,
             int64_t threads) {
    struct call c = {.steps = steps,
                     .count = count,
                     .work = work,
                     .input = input,
                     .output = output,
                     .scale = scale,
                     .shift = shift,
                     .film_stride = film_stride,
                     .share = share,
                     .first = first,
                     .d_scale = d_scale,
                     .d_shift = d_shift,
                     .gradients = gradients,
                     .threads = 1};
    pthread_t handles[MOST_THREADS];
    struct member members[MOST_THREADS];
    while (c.threads < threads && c.threads < MOST_THREADS) {
        members[c.threads] = (struct member){&c, c.threads};
        if (pthread_create(handles + c.threads, 0, join, members + c.threads)) break;
        c.threads++;
    }
    atomic_store(&c.begun, 1);
    work_through(&c, 0);
    for (int64_t t = 1; t < c.threads; t++) pthread_join(handles[t], 0);
}

int64_t mpd_lanes(void) { return LANES; }
int64_t mpd_pairs(void) { return PAIRS; }
int64_t mpd_step_size(void) { return sizeof(struct step); }
