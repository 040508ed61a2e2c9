/* The levels that were compiled and that this CPU runs; itself compiled for any CPU. */

#include <stddef.h>

#include "unet.h"

#define MOST_LEVELS 4

extern const struct level mpd_v3, mpd_v4, mpd_v4_bf16, mpd_aarch64;

/* Level `number`, from the best one on; NULL where there are not so many. */
const struct level *mpd_find_level(int64_t number) {
    const struct level *found[MOST_LEVELS] = {0};
    int64_t count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("bmi2");
    const int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
    (void)v4;
#endif
#ifdef HAS_V4_BF16
    if (v4 && __builtin_cpu_supports("avx512bf16")) found[count++] = &mpd_v4_bf16;
#endif
#ifdef HAS_V4
    if (v4) found[count++] = &mpd_v4;
#endif
#ifdef HAS_V3
    if (v3) found[count++] = &mpd_v3;
#endif
#ifdef HAS_AARCH64
    found[count++] = &mpd_aarch64;
#endif
    return number < count ? found[number] : NULL;
}
