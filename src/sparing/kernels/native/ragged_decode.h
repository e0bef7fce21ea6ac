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

// Keys and values as codes of 8 or 4 bits in pages of `page` slots; x = zero + scale * code. A page's slots from its
// count on are empty, with finite scales and zeros.
struct CodedJob {
    const float *queries;       // (lanes, group, dim)
    const uint8_t *keys;        // (pages, page, dim * bits / 8)
    const float *key_scales;    // (pages, dim)
    const float *key_zeros;     // (pages, dim)
    const uint8_t *values;      // (pages, page, dim * bits / 8)
    const float *value_scales;  // (pages, page)
    const float *value_zeros;   // (pages, page)
    const float *bias;          // (pages, page); may be null
    const int64_t *counts;      // (pages)
    float scale;
    int page;
};

using ChunkFunction = void (*)(const Job &, int lane, int64_t start, int n, float *out, float *maximum, float *total);

// The same for the pages from `first` on that hold n slots together, at least one of them a token.
using CodedFunction = void (*)(const CodedJob &, int lane, int64_t first, int n, float *out, float *maximum,
                               float *total);

#define SPARING_DECLARE(isa)                                             \
    namespace isa {                                                      \
    ChunkFunction choose(int dim, int group, bool is_bfloat16);          \
    CodedFunction choose_coded(int dim, int group, int bits);            \
    }
SPARING_DECLARE(portable)
#ifdef SPARING_X86
SPARING_DECLARE(avx2)
SPARING_DECLARE(avx512)
#endif

}  // namespace sparing
