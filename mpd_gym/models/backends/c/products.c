/* Products of series with weights. */

#include "level.h"

#define NEAR 64 /* rows of weights, one vector each, that are fetched ahead of their use */

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

/* One chunk of a product for a tile of `high` rows from `row` on, and `across` vectors from `first`
 * on. The first chunk begins with the bias, others go on with what was written.
 *
 * Where weights are fetched a chunk ahead, each of the first two tiles fetches half of the next one;
 * a single tile fetches all of it. */
static void add_chunk(const struct op *op, float *work, int64_t c, int64_t row, int64_t high,
                      int64_t tile, int64_t tiles, int64_t first, int64_t across) {
    const struct chunk *chunk = op->chunks + c;
    const int64_t panel = op->depth * LANES;
    const float *weight = op->weight + first * panel;
    const int64_t next = c + 1 < op->count ? chunk[1].depth * LANES : 2 * panel;
    const int fetch = op->fetched && across == 2 && tile < 2;
    kernel *const add = KERNELS[op->paired][across == 1 ? 0 : !fetch ? 1 : tiles == 1 ? 3 : 2];
    struct tile t = {.work = work,
                     .weight = weight + chunk->depth * LANES,
                     .panel = panel,
                     .far = weight + next + tile * op->chunk_size / 2 * LANES};
    vec acc[2 * ROWS];
    float *written[ROWS]; /* rows of the result */
    int64_t time = row / op->rows, m = row % op->rows;
    for (int64_t r = 0; r < high; r++) {
        written[r] = work + op->target + time * op->target_time + m * op->target_stride;
        if (++m == op->rows) m = 0, time++;
        const float *begin = chunk->depth || op->accumulate ? written[r] : op->bias;
        for (int64_t v = 0; v < across; v++)
            acc[r * across + v] = *(const vec *)(begin + (first + v) * LANES);
    }
    /* Segments that the same rows read go together. */
    const struct segment *input = op->segments + chunk->first, *const end = input + chunk->count;
    while (input < end) {
        const struct range all = reading(input, op->length, op->rows);
        int64_t depth = 0;
        for (t.segments = input; input < end; depth += input++->channels) {
            const struct range own = reading(input, op->length, op->rows);
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
static void product(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t rows = op->length * op->rows, vectors = ceil_div(op->channels, LANES);
    const int64_t tiles = ceil_div(rows, ROWS), high = ceil_div(rows, tiles);
    const int64_t tasks = ceil_div(vectors, 2) * tiles, end = tasks * (thread + 1) / c->threads;
    for (int64_t task = tasks * thread / c->threads; task < end;) {
        const int64_t first = task / tiles * 2, from = task % tiles;
        const int64_t to = smaller(from + end - task, tiles);
        const int64_t across = smaller(vectors - first, 2);
        for (int64_t i = 0; i < op->count; i++)
            for (int64_t tile = from; tile < to && tile * high < rows; tile++) {
                const int64_t row = tile * high;
                add_chunk(op, c->work, i, row, smaller(rows - row, high), tile, tiles, first,
                          across);
            }
        task += to - from;
    }
}
