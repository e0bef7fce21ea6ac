// Products of small matrices with one dimension long, in registers; for one instruction set (see vectors.h).
#pragma once

#include "vectors.h"

namespace sparing {
namespace SPARING_ISA {

// Sums of M x N registers: enough of them to hide the latency of a product, and few enough to stay in registers beside
// a row of b and a number of a. Where there is room, M divides the usual numbers of rows; measured best of 4 to 16.
constexpr int WIDE = W == 16 ? 4 : 2;  // N at most
constexpr int tall(int n) { return W == 16 ? (n == 4 ? 4 : 8) : (n == 2 ? 6 : 12); }

// sum[m][n] += the sum over k of a[m * a_row + k * a_step] * b[k * b_step + n W + lane].
template <int M, int N>
SPARING_INLINE void multiply(int depth, const float *a, size_t a_row, size_t a_step, const float *b, size_t b_step,
                             Vec (&sum)[M][N]) {
    for (int k = 0; k < depth; k++, a += a_step, b += b_step) {
        Vec x[N];
        SPARING_UNROLL for (int n = 0; n < N; n++) x[n] = load(b + n * W);
        SPARING_UNROLL for (int m = 0; m < M; m++) {
            Vec y = splat(a[m * a_row]);
            SPARING_UNROLL for (int n = 0; n < N; n++) sum[m][n] += y * x[n];
        }
    }
}

// Calls f.run<M, N>(m) for all rows m in [0, count), M at a time.
template <int M, int N, class F>
SPARING_INLINE void panels(int m, int count, const F &f) {
    for (; m + M <= count; m += M) f.template run<M, N>(m);
    if constexpr (M > 1)
        if (m < count) panels<M / 2, N>(m, count, f);
}

// The same for n registers a row, known when it runs.
template <class F>
SPARING_INLINE void panels_of(int n, int from, int count, const F &f) {
    if (n == 1) return panels<tall(1), 1>(from, count, f);
    if (n == 2) return panels<tall(2), 2>(from, count, f);
    if constexpr (WIDE == 4) {
        if (n == 3) return panels<tall(3), 3>(from, count, f);
        return panels<tall(4), 4>(from, count, f);
    }
}

// Cuts registers [from, total) into pieces of at most WIDE, as even as may be: f(first, number).
template <class F>
SPARING_INLINE void pieces(int from, int total, const F &f) {
    for (int left = (total - from + WIDE - 1) / WIDE; left > 0; left--) {
        int n = (total - from + left - 1) / left;
        f(from, n);
        from += n;
    }
}

}  // namespace SPARING_ISA
}  // namespace sparing
