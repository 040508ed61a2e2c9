/* What a training adds: gradients, and weights as they are now. */

#include "level.h"

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

static void weight_gradient(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t rows = op->length * op->rows, vectors = ceil_div(op->channels, LANES);
    const int64_t pairs = ceil_div(vectors, 2), panel = op->depth * LANES;
    const int64_t at_once = op->paired ? op->rows / 2 : op->rows;
    const float *y = c->work + (op->paired ? op->row_pairs : op->source);
    for (int64_t part = 0; part < op->length * at_once; part += PART) {
        int64_t task = 0, before = 0; /* of all tiles; channels of segments before */
        for (int64_t i = 0; i < op->count; i++) {
            const struct segment *input = op->segments + i;
            const struct range all = reading(input, op->length, at_once);
            const int64_t from = larger(all.begin, part);
            const int64_t depth = smaller(all.end, part + PART) - from;
            const float *x = c->work + input->start + from * input->stride;
            const int64_t tiles = ceil_div(input->channels, ROWS);
            const int64_t most = ceil_div(input->channels, tiles);
            for (int64_t k = 0; k < input->channels; k += most)
                for (int64_t p = 0; p < pairs; p++) {
                    if (task++ % c->threads != thread) continue;
                    const int64_t across = vectors - 2 * p < 2 ? 1 : 2;
                    const int64_t left = input->channels - k;
                    (op->paired ? add_outer_paired : add_outer)(
                        left < most ? left : most, across, x + k, input->stride,
                        y + from * op->source_stride + 2 * p * LANES, op->source_stride, depth,
                        op->panels + 2 * p * panel + (before + k) * LANES, panel, !part);
                }
            before += input->channels;
        }
    }
    if (thread) return;
    for (int64_t o = 0; o < op->channels; o += LANES) { /* of the bias */
        const float *gradient = c->work + op->source + o;
        vec sum = {0};
        for (int64_t r = 0; r < rows; r++) sum += *(const vec *)(gradient + r * op->source_stride);
        for (int64_t i = o; i < op->channels && i < o + LANES; i++)
            c->gradients[op->place + i] = sum[i - o] + (op->accumulate ? c->gradients[op->place + i] : 0);
    }
}

/* Between weights as PyTorch has them and panels. Segments say where a tap begins and how many
 * inner channels it has. */
static void repack(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t vectors = ceil_div(op->channels, LANES);
    for (int64_t p = thread; p < vectors; p += c->threads) {
        float *panel = op->panels + p * op->depth * LANES;
        float block[LANES * LANES] = {0}; /* of weights that are to be paired */
        const int64_t lanes = op->channels - p * LANES < LANES ? op->channels - p * LANES : LANES;
        for (int64_t i = 0; i < op->count; i++) {
            const struct segment *tap = op->segments + i;
            const int64_t start = tap->start + p * LANES * op->lane_stride;
            const float *from = op->plain + start;
            float *to = c->gradients + op->place + start;
            /* In blocks, so that lines of both sides stay in the nearest cache. */
            for (int64_t k = 0; k < tap->channels; k += LANES) {
                const int64_t deep = tap->channels - k < LANES ? tap->channels - k : LANES;
                const int64_t there = k * op->inner_stride;
                float *packed = op->paired ? block : panel;
                if (op->kind == UNPACK)
                    for (int64_t l = 0; l < lanes; l++)
                        for (int64_t d = 0; d < deep; d++)
                            to[there + l * op->lane_stride + d * op->inner_stride] =
                                panel[d * LANES + l];
                else if (op->lane_stride == 1)
                    for (int64_t d = 0; d < deep; d++)
                        memcpy(packed + d * LANES, from + there + d * op->inner_stride,
                               sizeof(float) * (size_t)lanes);
                else
                    for (int64_t l = 0; l < lanes; l++)
                        for (int64_t d = 0; d < deep; d++)
                            packed[d * LANES + l] =
                                from[there + l * op->lane_stride + d * op->inner_stride];
                panel += op->paired ? pair_block(block, deep, panel) : deep * LANES;
            }
        }
    }
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
static void spread(const struct call *c, const struct op *op, int64_t from, int64_t to,
                   const struct sums *n) {
    const int64_t stride = op->source_stride, size = op->channels / op->groups;
    for (int64_t m = from; m < to; m++) {
        const int64_t film = (c->first + m) / c->share * c->film_stride + op->film;
        const int64_t here = (m - from) * stride;
        const float *moments = c->work + op->moments + m * op->groups;
        for (int64_t i = 0; i < op->channels; i++) {
            n->mean[here + i] = moments[i / size];
            n->inverse[here + i] = moments[op->rows * op->groups + i / size];
            n->scale[here + i] = c->scale[film + i];
            n->shift[here + i] = c->shift[film + i];
        }
    }
}

/* Take the gradient back through swish and residual at step t, and add it to the sums. */
INLINE void take_back(const struct op *op, float *work, int64_t t, int64_t begin, int64_t width,
                      const struct sums *n) {
    const int64_t here = t * op->source_time + begin;
    const float *x = work + op->source + here, *other = work + op->residual + here;
    float *gradient = work + op->d_target + here;
    float *d_other = work + op->d_residual + here;
    for (int64_t i = 0; i < width; i += LANES) {
        const vec unit = normal(x, n, i);
        vec g = *(vec *)(gradient + i);
        if (op->swish) {
            vec value = unit * *(vec *)(n->scale + i) + *(vec *)(n->shift + i);
            if (op->residual) value += *(const vec *)(other + i);
            const vec chance = sigmoid(value);
            g *= chance * (1.0f + value * (1.0f - chance));
            *(vec *)(gradient + i) = g;
        }
        if (op->residual && op->accumulate)
            *(vec *)(d_other + i) += g;
        else if (op->residual)
            *(vec *)(d_other + i) = g;
        *(vec *)(n->sum + i) += g;
        *(vec *)(n->product + i) += g * unit;
    }
}

/* Gradients of scale and shift from the sums, which become what the gradient of x needs. */
static void finish_sums(const struct call *c, const struct op *op, int64_t m, int64_t here,
                        const struct sums *n) {
    const int64_t size = op->channels / op->groups, film = m * c->film_stride + op->film;
    float *scale = n->scale + here, *sum = n->sum + here, *product = n->product + here;
    for (int64_t g = 0; g < op->groups; g++) {
        float a = 0, b = 0;
        for (int64_t i = g * size; i < (g + 1) * size; i++) {
            c->d_shift[film + i] = sum[i];
            c->d_scale[film + i] = product[i];
            a += scale[i] * sum[i];
            b += scale[i] * product[i];
        }
        const float count = (float)(op->length * size), inverse = n->inverse[here + g * size];
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
static void normalise_backward(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t stride = op->source_stride, all = op->rows * stride;
    const int64_t from = op->rows * thread / c->threads, to = op->rows * (thread + 1) / c->threads;
    const int64_t begin = from * stride, width = (to - from) * stride;
    float *first = c->work + op->scratch + begin;
    const struct sums n = {first,           first + all,     first + 2 * all,
                           first + 3 * all, first + 4 * all, first + 5 * all};
    for (int64_t part = 0; part < 6; part++)
        memset(first + part * all, 0, sizeof(float) * (size_t)width);
    spread(c, op, from, to, &n);
    for (int64_t t = 0; t < op->length; t++) take_back(op, c->work, t, begin, width, &n);
    for (int64_t m = from; m < to; m++) finish_sums(c, op, m, (m - from) * stride, &n);
    for (int64_t t = 0; t < op->length; t++) {
        const int64_t here = t * op->source_time + begin;
        const float *x = c->work + op->source + here;
        const float *gradient = c->work + op->d_target + here;
        float *d_x = c->work + op->d_source + here;
        for (int64_t i = 0; i < width; i += LANES)
            *(vec *)(d_x + i) = *(const vec *)(gradient + i) * *(vec *)(n.scale + i) +
                                normal(x, &n, i) * *(vec *)(n.product + i) + *(vec *)(n.sum + i);
    }
}

/* The swish of one step of time, or its gradient. */
static void activate(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t from = op->rows * thread / c->threads, to = op->rows * (thread + 1) / c->threads;
    const float *x = c->work + op->source;
    float *y = c->work + op->target;
    for (int64_t i = from * op->source_stride; i < to * op->source_stride; i += LANES) {
        const vec value = *(const vec *)(x + i), chance = sigmoid(value);
        if (op->kind == SWISH)
            *(vec *)(y + i) = value * chance;
        else
            *(vec *)(c->work + op->d_source + i) =
                *(const vec *)(c->work + op->d_target + i) * chance * (1.0f + value * (1.0f - chance));
    }
}

/* Scales and shifts of a normalisation: those of FiLM, side by side at `source`, of what the affine
 * part makes of a series; those of the affine part alone where there is no source. */
static void modulate_affine(const struct call *c, const struct op *op, int64_t thread) {
    const float *gain = op->weight, *offset = op->bias;
    for (int64_t m = op->rows * thread / c->threads; m < op->rows * (thread + 1) / c->threads; m++) {
        const float *by = c->work + op->source + m * op->source_stride;
        float *scale = c->work + op->target + m * op->target_stride;
        float *shift = c->work + op->shifts + m * op->target_stride;
        for (int64_t i = 0; i < op->channels; i++) {
            scale[i] = op->source ? by[i] * gain[i] : gain[i];
            shift[i] = op->source ? by[op->channels + i] + by[i] * offset[i] : offset[i];
        }
    }
}

/* Gradients of FiLM's scales and shifts, and of the affine part; each thread has its channels. */
static void modulate_affine_backward(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t from = op->channels * thread / c->threads, to = op->channels * (thread + 1) / c->threads;
    const float *gain = op->weight, *offset = op->bias;
    float *d_gain = c->gradients + op->place, *d_offset = d_gain + op->channels;
    for (int64_t i = from; i < to; i++) d_gain[i] = d_offset[i] = 0;
    for (int64_t m = 0; m < op->rows; m++) {
        const float *d_scale = c->work + op->d_target + m * op->target_stride;
        const float *d_shift = c->work + op->d_shifts + m * op->target_stride;
        const float *by = c->work + op->source + m * op->source_stride;
        float *d_by = c->work + op->d_source + m * op->source_stride;
        for (int64_t i = from; i < to; i++) {
            d_gain[i] += d_scale[i] * (op->source ? by[i] : 1.0f);
            d_offset[i] += d_shift[i] * (op->source ? by[i] : 1.0f);
            if (!op->source) continue;
            d_by[i] = d_scale[i] * gain[i] + d_shift[i] * offset[i];
            d_by[op->channels + i] = d_shift[i];
        }
    }
}
