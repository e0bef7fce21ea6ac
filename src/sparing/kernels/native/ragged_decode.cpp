// The entry points: dispatch to the best instruction set of this machine, threads, and the merge of partial results.

#include "ragged_decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"

namespace sparing {
namespace {

enum Isa { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

Isa best() {
#ifdef SPARING_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

ChunkFunction choose(int isa, int dim, int group, bool is_bfloat16) {
#ifdef SPARING_X86
    if (isa == AVX512) return avx512::choose(dim, group, is_bfloat16);
    if (isa == AVX2) return avx2::choose(dim, group, is_bfloat16);
#endif
    return portable::choose(dim, group, is_bfloat16);
}

struct Task {
    int lane;
    int64_t start;
    int n;
};

// Partial results of a lane's chunks -> its output: each is scaled from its own maximum to the lane's.
void merge(int first, int last, int group, int dim, const float *outs, const float *maxima, const float *totals,
           float *out, float *lse) {
    for (int g = 0; g < group; g++) {
        float most = -INFINITY;
        for (int i = first; i < last; i++) most = std::max(most, maxima[i * group + g]);
        float *target = out + static_cast<size_t>(g) * dim;
        std::memset(target, 0, sizeof(float) * dim);
        float total = 0;
        for (int i = first; i < last; i++) {
            float factor = std::exp(maxima[i * group + g] - most);
            total += factor * totals[i * group + g];
            const float *part = outs + (static_cast<size_t>(i) * group + g) * dim;
            for (int d = 0; d < dim; d++) target[d] += factor * part[d];
        }
        for (int d = 0; d < dim; d++) target[d] /= total;
        if (lse != nullptr) lse[g] = most + std::log(total);
    }
}

}  // namespace
}  // namespace sparing

extern "C" {

// The best instruction set of this machine: 0 portable, 1 AVX2, 2 AVX-512.
int sparing_best_isa() { return sparing::best(); }

// 1 if there is a kernel for these sizes.
int sparing_has_kernel(int dim, int group) { return sparing::choose(0, dim, group, false) != nullptr; }

// Attention of one query token per lane. out: (lanes, group, dim). lse: (lanes, group) log of the sum of exponentials,
// may be null. Every lane holds at least one token. Returns 0, or 1 if there is no kernel for these sizes.
int sparing_ragged_decode(int isa, int threads, int lanes, int group, int dim, int is_bfloat16, const float *queries,
                          const void *keys, const void *values, const float *bias, const int64_t *starts,
                          const int64_t *lengths, float scale, float *out, float *lse) {
    using namespace sparing;
    ChunkFunction function = choose(isa, dim, group, is_bfloat16 != 0);
    if (function == nullptr) return 1;
    static thread_local std::vector<Task> tasks;
    static thread_local std::vector<int> first;
    static thread_local std::vector<float> outs, maxima, totals;
    tasks.clear();
    first.assign(1, 0);
    for (int lane = 0; lane < lanes; lane++) {
        for (int64_t t = 0; t < lengths[lane]; t += CHUNK)
            tasks.push_back({lane, starts[lane] + t, static_cast<int>(std::min<int64_t>(CHUNK, lengths[lane] - t))});
        first.push_back(static_cast<int>(tasks.size()));
    }
    size_t per_task = static_cast<size_t>(group) * dim;
    outs.resize(tasks.size() * per_task);
    maxima.resize(tasks.size() * group);
    totals.resize(tasks.size() * group);
    Job job{queries, keys, values, bias, scale};
    // The vectors belong to this thread: workers get plain pointers.
    const Task *all = tasks.data();
    float *part = outs.data(), *most = maxima.data(), *total = totals.data();
    parallel(threads, static_cast<int>(tasks.size()), [&](int i) {
        function(job, all[i].lane, all[i].start, all[i].n, part + i * per_task, most + static_cast<size_t>(i) * group,
                 total + static_cast<size_t>(i) * group);
    });
    for (int lane = 0; lane < lanes; lane++)
        merge(first[lane], first[lane + 1], group, dim, part, most, total, out + lane * per_task,
              lse == nullptr ? nullptr : lse + static_cast<size_t>(lane) * group);
    return 0;
}
}
