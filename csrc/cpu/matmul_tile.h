// The inner loops: one FMA for each k and each output, k ascending; they differ in where the operands come from.
#pragma once

#include "matmul_pack.h"

namespace detinfer {
namespace {

// c[R][kPanel] (+)= a[k][R] * b[k][kPanel], all packed. `resume` goes on from c, else from +0: an accumulator that is
// stored and loaded again keeps its bits, so k may be cut anywhere.
template <int R> void tile(int64_t k, const float* a, const float* b, float* c, bool resume) {
  F acc[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    acc[r][0] = resume ? load(c + r * kPanel) : F{};
    acc[r][1] = resume ? load(c + r * kPanel + kLanes) : F{};
  }
  for (; k > 0; k--, a += R, b += kPanel) {
    const F low = load(b);
    const F high = load(b + kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
      const F x = splat(a[r]);
      acc[r][0] = fma(x, low, acc[r][0]);
      acc[r][1] = fma(x, high, acc[r][1]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    store(c + r * kPanel, acc[r][0]);
    store(c + r * kPanel + kLanes, acc[r][1]);
  }
}

template <int R = kTileRows>
inline void run_tile(int rows, int64_t k, const float* a, const float* b, float* c, bool resume) {
  if constexpr (R > 1) {
    if (rows != R) return run_tile<R - 1>(rows, k, a, b, c, resume);
  }
  tile<R>(k, a, b, c, resume);
}

// Rows up to which weights are used as they are transposed, and never written to scratch.
constexpr int kFewRows = kLanes == 16 ? 8 : 4;

// c[R][width] = a[k][R] * b, for P * kLanes rows of b with contiguous k, in registers from load to FMA. Several groups
// of lanes in flight hide the latency of the FMA chains. `ahead` as in pack_lanes.
template <DType T, int R, int P>
void few(int64_t k, const float* a, const typename Storage<T>::type* b, int64_t ld, int64_t ahead, float* c) {
  F acc[P][R];
#pragma GCC unroll 8
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[p][r] = F{};
  int64_t done = 0;
  for (; done + kBlock<T> <= k; done += kBlock<T>, a += kBlock<T> * R) {
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
      const typename Storage<T>::type* rows = b + p * kLanes * ld + done;
      for (int r = 0; r < kLanes; r++) __builtin_prefetch(rows + r * ld + ahead, 0, 2);
      F t[kLanes];
      load_rows<T, true>(rows, ld, kLanes - 1, t);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
#pragma GCC unroll 2
        for (int j = 0; j < kWord<T>; j++) {
          const F w = part<T>(t[i], j);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) acc[p][r] = fma(splat(a[(i * kWord<T> + j) * R + r]), w, acc[p][r]);
        }
    }
  }
  if (done < k) {
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
      F t[kLanes];
      load_rest<T>(b + p * kLanes * ld + done, ld, kLanes - 1, k - done, t);
      for (int64_t i = 0; i < k - done; i++) {
        const F w = part<T>(t[i / kWord<T>], i % kWord<T>);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[p][r] = fma(splat(a[i * R + r]), w, acc[p][r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; p++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(c + r * kPanel + p / 2 * R * kPanel + p % 2 * kLanes, acc[p][r]);
}

// c as tiles of [R][kPanel], one for each kPanel of the V * kLanes columns; columns of b contiguous, nothing to
// transpose.
template <DType T, int R, int V>
void direct(int64_t k, const float* a, const typename Storage<T>::type* b, int64_t ld, float* c) {
  F acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = F{};
  for (; k > 0; k--, a += R, b += ld) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const F w = load_as<T>(b + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][v] = fma(splat(a[r]), w, acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(c + (v / 2 * R + r) * kPanel + v % 2 * kLanes, acc[r][v]);
}

}  // namespace
}  // namespace detinfer
