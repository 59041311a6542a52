// The fixed-order reductions, written once for CPU, CUDA and HIP: over ranks, along a row, and add + RMSNorm.
//
// V is a value of fp32 (or fp64), or a vector of such; kernels choose the schedule and call these for the order. Each
// function below of one name and the suffix _rn is one IEEE operation, rounded to nearest even, whatever the compiler's
// flags for contraction say; where an FMA is meant it is written. A result is rounded to its storage type by types.h or
// cpu/vec.h, which also store the canonical NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"
#include "types.h"

namespace detinfer {

static constexpr int kMostRanks = 8;
static constexpr int kRowLanes = 1024;

// What RMSNorm does after h * r: round to T, then times w; times w; times (1 + w).
enum WeightMode : int32_t { kLlama = 0, kFp32Weight, kGemma };

// What RMSNorm normalises when a residual is given: the sum rounded to T, or the unrounded sum.
enum ResidualMode : int32_t { kRounded = 0, kUnrounded };

// ---------------------------------------------------------------------------------------------- one rounding each

template <class V> DETINFER_HD static inline V add_rn(V a, V b) { return a + b; }
template <class V> DETINFER_HD static inline V mul_rn(V a, V b) { return a * b; }
template <class V> DETINFER_HD static inline V div_rn(V a, V b) { return a / b; }

#if defined(__CUDA_ARCH__)
DETINFER_HD static inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
DETINFER_HD static inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DETINFER_HD static inline float div_rn(float a, float b) { return __fdiv_rn(a, b); }
DETINFER_HD static inline float sqrt_rn(float a) { return __fsqrt_rn(a); }
DETINFER_HD static inline float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DETINFER_HD static inline double add_rn(double a, double b) { return __dadd_rn(a, b); }
DETINFER_HD static inline double mul_rn(double a, double b) { return __dmul_rn(a, b); }
DETINFER_HD static inline double div_rn(double a, double b) { return __ddiv_rn(a, b); }
#else
DETINFER_HD static inline float sqrt_rn(float a) { return __builtin_sqrtf(a); }
DETINFER_HD static inline float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif

// ---------------------------------------------------------------------------------------------- over ranks

// rank_order: ((x_0 + x_1) + x_2) + ... + x_{N-1}, with x_r = term(r). Starts at x_0 and not at +0, so that a sum of
// -0 stays -0. Load the terms in any order; they are added in this one.
DETINFER_ANY_SIDE template <int kRanks, class V, class Term> DETINFER_HD static inline V rank_order(const Term& term) {
  V sum = term(0);
  for (int r = 1; r < kRanks; r++) sum = add_rn(sum, term(r));
  return sum;
}

// rank_tree: neighbours 2i and 2i + 1 are joined, an odd last one moves up unchanged, until one is left.
DETINFER_ANY_SIDE template <int kRanks, class V, class Term> DETINFER_HD static inline V rank_tree(const Term& term) {
  V level[kRanks];
  for (int r = 0; r < kRanks; r++) level[r] = term(r);
  for (int apart = 1; apart < kRanks; apart *= 2) {
    for (int i = 0; i + apart < kRanks; i += 2 * apart) level[i] = add_rn(level[i], level[i + apart]);
  }
  return level[0];
}

// MAX and MIN of two values: order-free, NaN wins, +0 > -0. Equal floats differ in the sign of a zero at most.
template <class T> DETINFER_HD static inline T greater_of(T a, T b) { return a > b ? a : b; }
template <class T> DETINFER_HD static inline T lesser_of(T a, T b) { return a < b ? a : b; }

template <class T, class Bits, bool kGreater> DETINFER_HD static inline T extreme_of(T a, T b) {
  if (a != a) return a;
  if (b != b) return b;
  if (a != b) return (a > b) == kGreater ? a : b;
  Bits x, y;
  __builtin_memcpy(&x, &a, sizeof x);  // std::memcpy is the host's alone
  __builtin_memcpy(&y, &b, sizeof y);
  x = kGreater ? x & y : x | y;
  __builtin_memcpy(&a, &x, sizeof a);
  return a;
}
DETINFER_HD static inline float greater_of(float a, float b) { return extreme_of<float, uint32_t, true>(a, b); }
DETINFER_HD static inline float lesser_of(float a, float b) { return extreme_of<float, uint32_t, false>(a, b); }
DETINFER_HD static inline double greater_of(double a, double b) { return extreme_of<double, uint64_t, true>(a, b); }
DETINFER_HD static inline double lesser_of(double a, double b) { return extreme_of<double, uint64_t, false>(a, b); }

// ---------------------------------------------------------------------------------------------- along a row

// row_sum. Lanes are counted from element 0: lane l takes elements l, l + 1024, l + 2048, ... ascending. Then the lanes
// are halved: lane l adds lane l + 512, then l + 256, ..., then l + 1. A missing term is -0, which changes no sum, so a
// row of n elements needs no more than the next power of two of lanes, and zeros past its end move nothing.
//
// Runs the order on vectors V of kWidth lanes. step(sum, i, count) returns `sum` with elements i, ..., i + count - 1
// taken into its first `count` lanes (a plain addition, or an FMA for sums of squares); count is kWidth except in the
// row's last vector. Returns the last kWidth lanes; the caller halves them in the same way. On a GPU V is one thread's
// float, kWidth the block's threads, and step takes element i + threadIdx.x where threadIdx.x < count.
DETINFER_ANY_SIDE template <class V, int kWidth, class Step>
DETINFER_HD static inline V row_sum(int64_t n, V missing, const Step& step) {
  constexpr int kMost = kRowLanes / kWidth;
  V lanes[kMost];
  int used = 1;
  while (used < kMost && static_cast<int64_t>(used) * kWidth < n) used *= 2;
  const int64_t whole = n / kWidth;
  const int rest = static_cast<int>(n % kWidth);
  const int first = whole < used ? static_cast<int>(whole) : used;
  for (int j = 0; j < first; j++) lanes[j] = step(missing, static_cast<int64_t>(j) * kWidth, kWidth);
  for (int j = first; j < used; j++) lanes[j] = missing;
  for (int64_t block = used; block < whole; block += used) {
    const int here = whole - block < used ? static_cast<int>(whole - block) : used;
    for (int j = 0; j < here; j++) lanes[j] = step(lanes[j], (block + j) * kWidth, kWidth);
  }
  if (rest != 0) {
    V& lane = lanes[whole % used];
    lane = step(lane, whole * kWidth, rest);
  }
  for (int half = used / 2; half >= 1; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] = add_rn(lanes[j], lanes[j + half]);
  return lanes[0];
}

// ---------------------------------------------------------------------------------------------- add + RMSNorm

// r = 1 / sqrt(squares / n + eps), of the row_sum of squares of n elements.
DETINFER_HD static inline float inverse_root(float squares, int64_t n, float eps) {
  return div_rn(1.0f, sqrt_rn(add_rn(div_rn(squares, static_cast<float>(n)), eps)));
}

// What is normalised, of total = x + residual; rounded(v) is v rounded to T and widened again. residual_out is
// RNE_T(total) in both modes.
DETINFER_ANY_SIDE template <int kMode, class V, class Round>
DETINFER_HD static inline V norm_input(V total, const Round& rounded) {
  if constexpr (kMode == kRounded) return rounded(total);
  else return total;
}

// The normalised element before its last rounding to T, of h, r and the weight w.
DETINFER_ANY_SIDE template <int kMode, class V, class Round>
DETINFER_HD static inline V norm_output(V h, V r, V w, V one, const Round& rounded) {
  if constexpr (kMode == kLlama) return mul_rn(rounded(mul_rn(h, r)), w);
  else if constexpr (kMode == kGemma) return mul_rn(mul_rn(h, r), add_rn(one, w));
  else return mul_rn(mul_rn(h, r), w);
}

}  // namespace detinfer
