// What the instruction-set builds and the dispatcher share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparing {

constexpr int CHUNK = 256;  // tokens per task: a chunk's logits stay in the first-level cache

struct Job {
    const float *queries;    // (lanes, group, dim)
    const void *keys;        // (capacity, dim), float32 or bfloat16
    const void *values;      // (capacity, dim), likewise
    const float *bias;       // (capacity) added to the logits of each stored token; may be null
    float scale;
};

using ChunkFunction = void (*)(const Job &, int lane, int64_t start, int n, float *out, float *maximum, float *total);

namespace portable { ChunkFunction choose(int dim, int group, bool is_bfloat16); }
#ifdef SPARING_X86
namespace avx2 { ChunkFunction choose(int dim, int group, bool is_bfloat16); }
namespace avx512 { ChunkFunction choose(int dim, int group, bool is_bfloat16); }
#endif

}  // namespace sparing
