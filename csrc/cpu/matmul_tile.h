// The inner loops: one FMA for each k and each output, k ascending; they differ in where the operands come from.
#pragma once

#include "matmul_pack.h"

namespace detinfer {
namespace {

// Memory that will be packed next, asked for while the tiles compute: `rows` rows of `bytes` bytes, `ld` bytes apart.
struct Ahead {
  const char* at;
  int64_t ld;
  int64_t bytes;
};

// c[R][kPanel] (+)= a[R][k] * b[k][kPanel]; rows of a are `ld` floats apart, b is packed. `resume` goes on from c, else
// from +0: an accumulator that is stored and loaded again keeps its bits, so k may be cut anywhere.
template <int R>
void tile(int64_t k, const float* a, int64_t ld, const float* b, float* c, bool resume, const Ahead* ahead) {
  F acc[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    acc[r][0] = resume ? load(c + r * kPanel) : F{};
    acc[r][1] = resume ? load(c + r * kPanel + kLanes) : F{};
  }
  auto step = [&] {
    const F low = load(b);
    const F high = load(b + kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
      const F x = splat(a[r * ld]);
      acc[r][0] = fma(x, low, acc[r][0]);
      acc[r][1] = fma(x, high, acc[r][1]);
    }
    a++;
    b += kPanel;
  };
  if (ahead != nullptr) {
    // Two lines of one row at each k, kPanel rows in turn.
    for (int64_t column = 0; column < ahead->bytes && k >= kPanel; column += 128, k -= kPanel) {
      const char* next = ahead->at + column;
      for (int row = 0; row < kPanel; row++, next += ahead->ld) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + 64, 0, 2);
        step();
      }
    }
  }
  for (; k > 0; k--) step();
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    store(c + r * kPanel, acc[r][0]);
    store(c + r * kPanel + kLanes, acc[r][1]);
  }
}

template <int R = kTileRows>
inline void run_tile(int rows, int64_t k, const float* a, int64_t ld, const float* b, float* c, bool resume,
                     const Ahead* ahead = nullptr) {
  if constexpr (R > 1) {
    if (rows != R) return run_tile<R - 1>(rows, k, a, ld, b, c, resume, ahead);
  }
  tile<R>(k, a, ld, b, c, resume, ahead);
}

// Rows up to which weights are used as they are transposed, and never written to scratch.
constexpr int kFewRows = kLanes == 16 ? 8 : 4;

// The share of block `index` in asking for kLanes rows at p: two lines of each row, in as many blocks as they span.
// Two lines at a time take 15% less time than one, here where memory is the limit (Intel Xeon, one row, fp32).
template <DType T> inline void ask_ahead(const typename Storage<T>::type* p, int64_t ld, int64_t index) {
  constexpr int kBytes = kBlock<T> * sizeof(*p);
  constexpr int kBlocks = kBytes >= 128 ? 1 : 128 / kBytes < kLanes ? 128 / kBytes : kLanes;
  constexpr int kRows = kLanes / kBlocks;
  const auto* row = reinterpret_cast<const char*>(p + index % kBlocks * kRows * ld) + index / kBlocks * 128;
  for (int r = 0; r < kRows; r++, row += ld * sizeof(*p)) {
    __builtin_prefetch(row, 0, 2);
    __builtin_prefetch(row + 64, 0, 2);
  }
}

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
      ask_ahead<T>(b + p * kLanes * ld + ahead, ld, done / kBlock<T>);
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
