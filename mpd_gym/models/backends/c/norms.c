/* Normalisation, modulation and swish. */

#include "level.h"

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
INLINE void modulation(const struct op *op, int64_t group, float mean, float variance,
                       const float *scale, const float *shift, float *factor, float *term) {
    const int64_t size = op->channels / op->groups;
    const float inverse = 1.0f / sqrtf(variance + (float)op->eps);
    for (int64_t i = group * size; i < (group + 1) * size; i++) {
        factor[i] = scale[i] * inverse;
        term[i] = shift[i] - mean * factor[i];
    }
}

/* Apply factors and terms to series side by side at step t, from place `begin` of that step on; add
 * a residual if there is one, and take the swish if asked for. */
INLINE void modulate(const struct op *op, float *work, int64_t t, int64_t begin, int64_t width,
                     const float *factor, const float *term) {
    const float *x = work + op->source + t * op->source_time + begin;
    float *y = work + op->target + t * op->target_time + begin;
    const float *other = work + op->residual + t * op->source_time + begin;
    for (int64_t i = 0; i < width; i += LANES) {
        vec value = *(const vec *)(x + i) * *(const vec *)(factor + i) + *(const vec *)(term + i);
        if (op->residual) value += *(const vec *)(other + i);
        *(vec *)(y + i) = op->swish ? swish(value) : value;
    }
}

/* Group normalisation over time and the channels of a group; then scale and shift of each channel.
 * Each thread has its share of the series. */
static void normalise(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t M = op->rows, stride = op->source_stride, size = op->channels / op->groups;
    const int64_t from = M * thread / c->threads, to = M * (thread + 1) / c->threads;
    const int64_t begin = from * stride, width = (to - from) * stride;
    const float *x = c->work + op->source + begin;
    float *mean = c->work + op->scratch + begin, *square = mean + M * stride;

    memset(mean, 0, sizeof(float) * (size_t)width);
    memset(square, 0, sizeof(float) * (size_t)width);
    for (int64_t t = 0; t < op->length; t++)
        for (int64_t i = 0; i < width; i += LANES)
            *(vec *)(mean + i) += *(const vec *)(x + t * op->source_time + i);
    for (int64_t m = 0; m < to - from; m++)
        for (int64_t g = 0; g < op->groups; g++) {
            float *part = mean + m * stride + g * size, sum = 0;
            for (int64_t i = 0; i < size; i++) sum += part[i];
            sum /= (float)(op->length * size);
            for (int64_t i = 0; i < size; i++) part[i] = sum;
        }
    for (int64_t t = 0; t < op->length; t++)
        for (int64_t i = 0; i < width; i += LANES) {
            const vec d = *(const vec *)(x + t * op->source_time + i) - *(const vec *)(mean + i);
            *(vec *)(square + i) += d * d;
        }
    for (int64_t m = 0; m < to - from; m++) {
        const int64_t film = (c->first + from + m) / c->share * c->film_stride + op->film;
        float *factor = square + m * stride, *term = mean + m * stride;
        for (int64_t g = 0; g < op->groups; g++) {
            float sum = 0;
            for (int64_t i = g * size; i < (g + 1) * size; i++) sum += factor[i];
            sum /= (float)(op->length * size);
            if (op->moments) {
                float *moments = c->work + op->moments + (from + m) * op->groups + g;
                moments[0] = term[g * size];
                moments[M * op->groups] = 1.0f / sqrtf(sum + (float)op->eps);
            }
            modulation(op, g, term[g * size], sum, c->scale + film, c->shift + film, factor, term);
        }
        for (int64_t i = op->channels; i < stride; i++) factor[i] = term[i] = 0;
    }
    for (int64_t t = 0; t < op->length; t++) modulate(op, c->work, t, begin, width, square, mean);
}

/* The same as `normalise` with mean and variance of the steps so far. */
static void normalise_causally(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t M = op->rows, stride = op->source_stride, size = op->channels / op->groups;
    for (int64_t m = M * thread / c->threads; m < M * (thread + 1) / c->threads; m++) {
        const int64_t film = (c->first + m) / c->share * c->film_stride + op->film;
        const float *x = c->work + op->source + m * stride;
        float *mean = c->work + op->scratch + 4 * m * stride, *square = mean + stride; /* sums */
        float *factor = square + stride, *term = factor + stride;
        memset(mean, 0, sizeof(float) * (size_t)(4 * stride));
        for (int64_t t = 0; t < op->length; t++) {
            const float count = (float)(t + 1);
            for (int64_t g = 0; g < op->groups; g++) {
                float sum = 0, squares = 0;
                for (int64_t i = g * size; i < (g + 1) * size; i++) {
                    const float value = x[t * op->source_time + i];
                    sum += value;
                    squares += value * value;
                }
                mean[g] += sum / (float)size;
                square[g] += squares / (float)size;
                const float center = mean[g] / count;
                const float variance = square[g] / count - center * center;
                modulation(op, g, center, variance > 0 ? variance : 0, c->scale + film,
                           c->shift + film, factor, term);
            }
            modulate(op, c->work, t, m * stride, stride, factor, term);
        }
    }
}
