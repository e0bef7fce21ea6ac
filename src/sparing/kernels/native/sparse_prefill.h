// What the instruction-set builds of the block-sparse prefill kernel and its dispatcher share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparing {

constexpr int ROWS = 64;  // query rows of a problem at most: with AVX-512, four registers
constexpr int KEYS = 64;  // keys of a tile: tiles of logits, keys and values stay in the nearest caches

// Attention of the last `tokens - start` tokens of a sequence, by block. Mirrored in native/__init__.py.
struct PrefillJob {
    const void *queries;           // (query_heads, tokens - start, dim), float32 or bfloat16
    const void *keys;              // (heads, tokens, dim), likewise
    const void *values;            // (heads, tokens, value_dim), likewise
    const uint8_t *blocks;         // (query_heads, query blocks, key blocks): is the block read
    const int32_t *columns;        // positions, ascending for each head and group; null for none
    const int64_t *column_starts;  // (query_heads * groups + 1) where each list begins
    void *out;                     // (query_heads, tokens - start, value_dim), typed as the queries
    float *lse;                    // (query_heads, tokens - start) log of the sum of exponentials
    int32_t query_heads, heads, tokens, start;
    int32_t dim, value_dim;        // multiples of 16
    int32_t size;                  // tokens of a block, a multiple of 16
    int32_t groups, blocks_per_group;
    float scale, softcap;          // softcap 0: none
};

// Some neighbouring rows of one block of one query head.
struct Problem {
    int head;
    int block;  // the number of the block that holds the rows
    int first;  // the first row's position
    int rows;
};

using PrefillFunction = void (*)(const PrefillJob &, const Problem &);

#define SPARING_DECLARE(isa)                                 \
    namespace isa {                                          \
    PrefillFunction choose_prefill(bool is_bfloat16);        \
    }
SPARING_DECLARE(portable)
#ifdef SPARING_X86
SPARING_DECLARE(avx2)
SPARING_DECLARE(avx512)
#endif
#undef SPARING_DECLARE

}  // namespace sparing
