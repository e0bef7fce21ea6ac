// The entry point of block-sparse prefill attention: dispatch to an instruction set, and threads.

#include "sparse_prefill.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace sparing {
namespace {

PrefillFunction choose(int isa, bool is_bfloat16) {
#ifdef SPARING_X86
    if (isa == AVX512) return avx512::choose_prefill(is_bfloat16);
    if (isa == AVX2) return avx2::choose_prefill(is_bfloat16);
#endif
    return portable::choose_prefill(is_bfloat16);
}

// The rows of a block, cut into problems of about equal size.
void cut(const PrefillJob &job, int head, int block, std::vector<Problem> &problems) {
    int first = std::max(block * job.size, job.start), last = std::min((block + 1) * job.size, job.tokens);
    int parts = (last - first + ROWS - 1) / ROWS;
    int each = ((last - first + parts - 1) / parts + 15) / 16 * 16;
    for (int at = first; at < last; at += each) problems.push_back({head, block, at, std::min(each, last - at)});
}

}  // namespace
}  // namespace sparing

extern "C" {

// Every row's attention and log-sum-exp. A row reads the keys up to its own position in its own block and in the blocks
// that are on for its block, and the columns of its block's group that lie before its block in blocks that are off.
void sparing_sparse_prefill(int isa, int threads, int is_bfloat16, const sparing::PrefillJob *job) {
    using namespace sparing;
    PrefillFunction function = choose(isa, is_bfloat16 != 0);
    std::vector<Problem> problems;
    // Head by head, so that a head's keys stay in the caches, and the blocks that see most first, so that no thread
    // begins a large problem at the end.
    for (int head = 0; head < job->query_heads; head++)
        for (int block = (job->tokens - 1) / job->size; block >= job->start / job->size; block--)
            cut(*job, head, block, problems);
    parallel(threads, static_cast<int>(problems.size()), [&](int i) { function(*job, problems[i]); });
}
}
