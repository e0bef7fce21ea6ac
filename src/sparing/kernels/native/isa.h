// The instruction sets that the kernels are compiled for.
#pragma once

namespace sparing {

enum Isa { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// The best of this machine.
inline Isa best() {
#ifdef SPARING_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

}  // namespace sparing
