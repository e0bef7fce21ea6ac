// Registers of SPARING_WIDTH floats, for one instruction set.
//
// Kernels are compiled once per instruction set (see build.py) with SPARING_ISA as the namespace and SPARING_WIDTH as
// the number of floats in a register. They are written with the compiler's vector types, so the same lines serve
// AVX-512, AVX2, NEON and machines without any; the compiler picks the instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

// Loops over arrays that live in registers have to be unrolled whole.
#if defined(__clang__)
#define SPARING_UNROLL _Pragma("unroll")
#else
#define SPARING_UNROLL _Pragma("GCC unroll 16")
#endif
#define SPARING_INLINE static inline __attribute__((always_inline))

namespace sparing {
namespace SPARING_ISA {

constexpr int W = SPARING_WIDTH;

typedef float Vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(W * 4), aligned(4), may_alias));

static inline Vec splat(float x) { return x - Vec{}; }

SPARING_INLINE Vec load(const float *p) { return *reinterpret_cast<const Vec *>(p); }
SPARING_INLINE void store(float *p, Vec x) { *reinterpret_cast<Vec *>(p) = x; }

// The larger of both, lane by lane; y where one is nan.
SPARING_INLINE Vec larger(Vec x, Vec y) { return x > y ? x : y; }

}  // namespace SPARING_ISA
}  // namespace sparing
