/* One set of instructions: all parts as one translation unit, and the threads that run a list. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "level.h"
#include "products.c"
#include "norms.c"
#include "pairs.c"
#include "training.c"

/* Between the memory of the caller, [M, L, C], and series with time first. */
static void move(const struct call *c, const struct op *op, int64_t thread) {
    const size_t size = sizeof(float) * (size_t)op->channels;
    if (thread) return;
    for (int64_t m = 0; m < op->rows; m++)
        for (int64_t t = 0; t < op->length; t++) {
            const int64_t there = (m * op->length + t) * op->channels;
            if (op->kind == LOAD)
                memcpy(c->work + op->target + t * op->target_time + m * op->target_stride,
                       c->input + there, size);
            else
                memcpy(c->output + there,
                       c->work + op->source + t * op->source_time + m * op->source_stride, size);
        }
}

/* Replace series by others, or add others to them. */
static void transfer(const struct call *c, const struct op *op, int64_t thread) {
    const int64_t width = op->rows * op->target_stride;
    if (thread) return;
    for (int64_t t = 0; t < op->length; t++) {
        const float *x = c->work + op->source + t * op->source_time;
        float *y = c->work + op->target + t * op->target_time;
        if (op->kind == COPY)
            memcpy(y, x, sizeof(float) * (size_t)width);
        else
            for (int64_t i = 0; i < width; i += LANES) *(vec *)(y + i) += *(const vec *)(x + i);
    }
}

/* A thread's share of an op. */
typedef void share(const struct call *c, const struct op *op, int64_t thread);
static share *const SHARES[KINDS] = {
    [LOAD] = move,
    [STORE] = move,
    [COPY] = transfer,
    [ADD] = transfer,
    [PRODUCT] = product,
    [NORM] = normalise,
    [NORM_CAUSAL] = normalise_causally,
    [NORM_BACKWARD] = normalise_backward,
    [WEIGHT_GRADIENT] = weight_gradient,
    [PACK] = repack,
    [UNPACK] = repack,
    [SWISH] = activate,
    [SWISH_BACKWARD] = activate,
    [FILM] = modulate_affine,
    [FILM_BACKWARD] = modulate_affine_backward,
#if PAIRS
    [PAIR_CHANNELS] = pair,
    [PAIR_ROWS] = pair,
#endif
};

struct team {
    struct call call;
    atomic_int begun, arrived, round;
};

/* Wait for all threads; a thread that waits long lets others have its core. */
static void meet(struct team *team) {
    if (team->call.threads == 1) return;
    const int round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) == team->call.threads - 1) {
        atomic_store(&team->arrived, 0);
        atomic_fetch_add(&team->round, 1);
        return;
    }
    for (int spins = 0; atomic_load(&team->round) == round; spins++)
        if (spins > 2000) sched_yield();
}

static void work_through(struct team *team, int64_t thread) {
    const struct call *c = &team->call;
    for (const struct op *op = c->ops; op < c->ops + c->count; op++) {
        SHARES[op->kind](c, op, thread);
        meet(team);
    }
}

struct member {
    struct team *team;
    int64_t thread;
};

static void *join(void *argument) {
    const struct member *member = argument;
    while (!atomic_load(&member->team->begun)) sched_yield();
    work_through(member->team, member->thread);
    return 0;
}

#define MOST_THREADS 64

/* Run the ops with as many threads as wanted, or with as many as can be started. */
static void run(const struct call *call) {
    struct team team = {.call = *call};
    pthread_t handles[MOST_THREADS];
    struct member members[MOST_THREADS];
    int64_t *threads = &team.call.threads;
    for (*threads = 1; *threads < call->threads && *threads < MOST_THREADS; ++*threads) {
        members[*threads] = (struct member){&team, *threads};
        if (pthread_create(handles + *threads, 0, join, members + *threads)) break;
    }
    atomic_store(&team.begun, 1);
    work_through(&team, 0);
    for (int64_t t = 1; t < *threads; t++) pthread_join(handles[t], 0);
}

const struct level LEVEL = {SOURCES, LEVEL_NAME, LANES, PAIRS, run};
