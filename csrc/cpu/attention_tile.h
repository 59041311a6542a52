// The inner loops of attention: chains of FMAs for several rows at a time.
#pragma once

#include "../attention.h"
#include "matmul_pack.h"

namespace detinfer {
namespace {

// Rows of a tile and vectors of its columns: as many accumulators as the register file holds.
constexpr int kRows = 6;
constexpr int kVectors = kLanes == 16 ? 4 : 2;
// Keys of a panel of K, and rows of V, that stay in the first cache while the tiles go over them.
constexpr int kKeys = 64;
constexpr int kValueRows = 96;

constexpr uint32_t kMinusZero = 0x80000000u;

// Which chains: the scores of some rows against a panel of K (from +0, multiplied by the scale at the end), or the
// outputs of some rows (going on from what is there).
enum Chains { kScoreChains, kOutputChains };

// c[r][column] = chain over s = 0 .. steps - 1, ascending, of fma(a[r][s], b[s][column], .), for V vectors of columns;
// b is widened from T as it is read.
template <DType T, int R, int V, Chains C>
void chain(int64_t steps, const float* a, int64_t a_row, const typename Storage<T>::type* b, int64_t b_row, float* c,
           int64_t c_row, float factor) {
  F acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = C == kScoreChains ? F{} : load(c + r * c_row + v * kLanes);
  for (int64_t s = 0; s < steps; s++, b += b_row) {
    F y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) y[v] = load_as<T>(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const F x = splat(a[r * a_row + s]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = fma(x, y[v], acc[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
      store(c + r * c_row + v * kLanes, C == kScoreChains ? acc[r][v] * splat(factor) : acc[r][v]);
}

// Tiles of one vector take twice the rows: it needs as many accumulators to hide the latency of an FMA.
template <int V> constexpr int kMostRows = V == 1 ? 2 * kRows : kRows;

template <DType T, int V, Chains C, int R = kMostRows<V>>
inline void chain_of(int rows, int64_t steps, const float* a, int64_t a_row, const typename Storage<T>::type* b,
                     int64_t b_row, float* c, int64_t c_row, float factor) {
  if constexpr (R > 1) {
    if (rows != R) return chain_of<T, V, C, R - 1>(rows, steps, a, a_row, b, b_row, c, c_row, factor);
  }
  chain<T, R, V, C>(steps, a, a_row, b, b_row, c, c_row, factor);
}

// The same for any number of vectors: columns are independent, so how they are cut changes nothing.
template <DType T, Chains C>
inline void chains(int rows, int64_t vectors, int64_t steps, const float* a, int64_t a_row,
                   const typename Storage<T>::type* b, int64_t b_row, float* c, int64_t c_row, float factor = 1.0f) {
  for (; vectors >= kVectors; vectors -= kVectors, b += kVectors * kLanes, c += kVectors * kLanes)
    chain_of<T, kVectors, C>(rows, steps, a, a_row, b, b_row, c, c_row, factor);
  if (kVectors > 2 && vectors >= 2) {
    chain_of<T, 2, C>(rows, steps, a, a_row, b, b_row, c, c_row, factor);
    vectors -= 2, b += 2 * kLanes, c += 2 * kLanes;
  }
  if (vectors > 0) chain_of<T, 1, C>(rows, steps, a, a_row, b, b_row, c, c_row, factor);
}

// The output chain of one row some of whose keys are masked: these have p = -0, which exp never gives, and are left
// out; multiplying by zero instead would let a NaN of V through and could change the sign of a zero.
template <DType T>
inline void chain_with_holes(int64_t vectors, int64_t steps, const float* p, const typename Storage<T>::type* v,
                             int64_t v_row, float* o) {
  for (int64_t s = 0; s < steps; s++, v += v_row) {
    if (float_to_bits(p[s]) == kMinusZero) continue;
    const F x = splat(p[s]);
    for (int64_t i = 0; i < vectors; i++)
      store(o + i * kLanes, fma(x, load_as<T>(v + i * kLanes), load(o + i * kLanes)));
  }
}

}  // namespace
}  // namespace detinfer
