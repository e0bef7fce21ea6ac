// The entry points: dispatch to the best instruction set of this machine, threads, and the merge of partial results.

#include "ragged_decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace sparing {
namespace {

// The function of the given instruction set for these sizes, or of the next simpler one that has it; null if none has.
template <class F, class G>
F choose(int isa, const G &of) {
    F found = nullptr;
#ifdef SPARING_X86
    if (isa == AVX512) found = of(avx512::choose, avx512::choose_coded);
    if (found == nullptr && isa >= AVX2) found = of(avx2::choose, avx2::choose_coded);
#endif
    return found != nullptr ? found : of(portable::choose, portable::choose_coded);
}

ChunkFunction choose_plain(int isa, int dim, int group, bool is_bfloat16) {
    return choose<ChunkFunction>(isa, [=](auto plain, auto) { return plain(dim, group, is_bfloat16); });
}

CodedFunction choose_coded(int isa, int dim, int group, int bits) {
    return choose<CodedFunction>(isa, [=](auto, auto coded) { return coded(dim, group, bits); });
}

struct Task {
    int lane;
    int64_t start;
    int n;
};

// Partial results of a lane's chunks -> its output: each is scaled from its own maximum to the lane's. Where `lse` says
// that `out` holds the result over other tokens already, that is one more part.
void merge(int first, int last, int group, int dim, const float *outs, const float *maxima, const float *totals,
           bool is_begun, float *out, float *lse) {
    for (int g = 0; g < group; g++) {
        float most = is_begun ? lse[g] : -INFINITY;
        for (int i = first; i < last; i++) most = std::max(most, maxima[i * group + g]);
        float *target = out + static_cast<size_t>(g) * dim;
        float total = is_begun ? std::exp(lse[g] - most) : 0;
        for (int d = 0; d < dim; d++) target[d] = is_begun ? target[d] * total : 0;
        for (int i = first; i < last; i++) {
            float factor = std::exp(maxima[i * group + g] - most);
            total += factor * totals[i * group + g];
            const float *part = outs + (static_cast<size_t>(i) * group + g) * dim;
            for (int d = 0; d < dim; d++) target[d] += factor * part[d];
        }
        for (int d = 0; d < dim; d++) target[d] /= total;
        lse[g] = most + std::log(total);
    }
}

// Tasks of all lanes in order; `first` says where each lane's begin.
struct Tasks {
    std::vector<Task> all;
    std::vector<int> first;
};

// Run a function of every task, and merge its lanes.
template <class F, class J>
void decode(F function, const J &job, const Tasks &tasks, int threads, int lanes, int group, int dim, bool is_begun,
            float *out, float *lse) {
    static thread_local std::vector<float> outs, maxima, totals;
    size_t per_task = static_cast<size_t>(group) * dim, count = tasks.all.size();
    outs.resize(count * per_task);
    maxima.resize(count * group);
    totals.resize(count * group);
    // The vectors belong to this thread: workers get plain pointers.
    const Task *all = tasks.all.data();
    float *part = outs.data(), *most = maxima.data(), *total = totals.data();
    parallel(threads, static_cast<int>(count), [&](int i) {
        function(job, all[i].lane, all[i].start, all[i].n, part + i * per_task, most + static_cast<size_t>(i) * group,
                 total + static_cast<size_t>(i) * group);
    });
    for (int lane = 0; lane < lanes; lane++)
        merge(tasks.first[lane], tasks.first[lane + 1], group, dim, part, most, total, is_begun, out + lane * per_task,
              lse + static_cast<size_t>(lane) * group);
}

}  // namespace
}  // namespace sparing

extern "C" {

// The best instruction set of this machine: 0 portable, 1 AVX2, 2 AVX-512.
int sparing_best_isa() { return sparing::best(); }

// 1 if there is a kernel for these sizes.
int sparing_has_kernel(int dim, int group) {
    return sparing::choose_plain(sparing::best(), dim, group, false) != nullptr;
}

// 1 if there is a kernel for codes in pages of these sizes.
int sparing_has_coded_kernel(int dim, int group, int bits, int page) {
    return page <= sparing::CHUNK && page % 16 == 0 &&
           sparing::choose_coded(sparing::best(), dim, group, bits) != nullptr;
}

// Attention of one query token per lane. out: (lanes, group, dim). lse: (lanes, group) log of the sum of exponentials.
// Every lane holds at least one token. Returns 0, or 1 if there is no kernel for these sizes.
int sparing_ragged_decode(int isa, int threads, int lanes, int group, int dim, int is_bfloat16, const float *queries,
                          const void *keys, const void *values, const float *bias, const int64_t *starts,
                          const int64_t *lengths, float scale, float *out, float *lse) {
    using namespace sparing;
    ChunkFunction function = choose_plain(isa, dim, group, is_bfloat16 != 0);
    if (function == nullptr) return 1;
    static thread_local Tasks tasks;
    tasks.all.clear();
    tasks.first.assign(1, 0);
    for (int lane = 0; lane < lanes; lane++) {
        for (int64_t t = 0; t < lengths[lane]; t += CHUNK) {
            int n = static_cast<int>(std::min<int64_t>(CHUNK, lengths[lane] - t));
            tasks.all.push_back({lane, starts[lane] + t, n});
        }
        tasks.first.push_back(static_cast<int>(tasks.all.size()));
    }
    decode(function, Job{queries, keys, values, bias, scale}, tasks, threads, lanes, group, dim, false, out, lse);
    return 0;
}

// The same over codes; lane i has the pages from first_pages[i] up to first_pages[i + 1]. out and lse already hold the
// result over the lanes' other tokens, at least one in each, and get that over all.
int sparing_coded_decode(int isa, int threads, int lanes, int group, int dim, int bits, int page, const float *queries,
                         const uint8_t *keys, const float *key_scales, const float *key_zeros, const uint8_t *values,
                         const float *value_scales, const float *value_zeros, const float *bias, const int64_t *counts,
                         const int64_t *first_pages, float scale, float *out, float *lse) {
    using namespace sparing;
    CodedFunction function = choose_coded(isa, dim, group, bits);
    if (function == nullptr || page > CHUNK || page % 16 != 0) return 1;
    static thread_local Tasks tasks;
    tasks.all.clear();
    tasks.first.assign(1, 0);
    for (int lane = 0; lane < lanes; lane++) {
        int64_t last = first_pages[lane + 1];
        while (last > first_pages[lane] && counts[last - 1] == 0) last--;
        for (int64_t p = first_pages[lane]; p < last;) {
            int n = 0;
            int64_t begin = p, held = 0;
            for (; p < last && n + page <= CHUNK; p++, n += page) held += counts[p];
            if (held > 0) tasks.all.push_back({lane, begin, n});
        }
        tasks.first.push_back(static_cast<int>(tasks.all.size()));
    }
    CodedJob job{queries, keys, key_scales, key_zeros, values, value_scales, value_zeros, bias, counts, scale, page};
    decode(function, job, tasks, threads, lanes, group, dim, true, out, lse);
    return 0;
}
}
