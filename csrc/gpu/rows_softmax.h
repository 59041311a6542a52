// Softmax and log_softmax of a row.
#pragma once

#include "rows_row.h"

namespace detinfer {
namespace gpu {

static __device__ __forceinline__ const char* row_of(const void* base, int64_t row, int64_t step, int bytes) {
  return static_cast<const char*>(base) + row * step * bytes;
}
static __device__ __forceinline__ char* row_of(void* base, int64_t row, int64_t step, int bytes) {
  return static_cast<char*>(base) + row * step * bytes;
}

// Into rows of T or of fp32.
template <class Shape>
static __device__ __forceinline__ void store_either(const GpuRowsArgs& p, const Row<Shape>& row, int k, const float (&v)[Shape::kPack]) {
  using T = typename Shape::T;
  if (T::kPerWord == 1 || p.out_dtype == kFloat32)
    store_values<Float32, Shape::kPack, Shape::kAligned>(row_of(p.out, row.row(), p.n, 4) + row.element(k) * 4, v, row.left(k));
  else
    store_values<T, Shape::kPack, Shape::kAligned>(row_of(p.out, row.row(), p.n, T::kBytes) + row.element(k) * T::kBytes, v,
                                                   row.left(k));
}

// v - most for each value, then e^ of it: the quick way, or where one of them is too small or NaN, the other.
template <int kPack> static __device__ __forceinline__ void exponentials(float (&e)[kPack], const float (&v)[kPack], float most) {
  bool quick = true;
#pragma unroll
  for (int i = 0; i < kPack; i++) {
    e[i] = add_rn(v[i], -most);
    quick = quick && e[i] >= kQuickExp;
  }
  if (quick) {
#pragma unroll
    for (int i = 0; i < kPack; i++) e[i] = quick_exp(e[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPack; i++) e[i] = exp_of_negative(e[i]);
  }
}

template <class Shape, bool kLog>
static __global__ void __launch_bounds__(Shape::kThreads, Shape::kFewValues ? 2048 / Shape::kThreads : 0) softmax(DETINFER_PARAMETER GpuRowsArgs p) {
  using T = typename Shape::T;
  constexpr int kPack = Shape::kPack;
  __shared__ typename Row<Shape>::Shared shared[2];
  const Row<Shape> row(p.rows, p.n);
  const char* x = row_of(p.x, row.row(), p.x_row, T::kBytes);
  const float lowest = -__builtin_inff();
  const auto get = [&](int k, float(&v)[kPack]) {
    load_values<T, kPack, Shape::kAligned>(v, x + row.element(k) * T::kBytes, row.left(k), lowest);
  };
  Values<Shape, decltype(get)> values(row, get);

  float most = lowest;  // NaN is passed over: the exponentials carry it into the sum
  values.each([&](int, int, const float(&v)[kPack]) {
#pragma unroll
    for (int e = 0; e < kPack; e++) most = fmaxf(most, v[e]);
  });
  most = Row<Shape>::together(most, shared[0], [](float a, float b) { return fmaxf(a, b); });

  typename Row<Shape>::Lanes lane;
  Row<Shape>::clear(lane);
  values.each([&](int, int slot, float(&v)[kPack]) {
    float e[kPack];
    exponentials<kPack>(e, v, most);
#pragma unroll
    for (int i = 0; i < kPack; i++) {
      lane[slot][i] = add_rn(lane[slot][i], e[i]);
      if (!kLog && Shape::kHold != 0) v[i] = e[i];
    }
  });
  const float sum = Row<Shape>::halve(lane, shared[1]);

  if constexpr (kLog) {
    const float log_sum = log_of_sum(sum);
    values.each([&](int k, int, float(&v)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; i++) v[i] = add_rn(add_rn(v[i], -most), -log_sum);
      store_either<Shape>(p, row, k, v);
    });
  } else {
    const Divisor divided(sum);
    values.each([&](int k, int, float(&v)[kPack]) {
      if constexpr (Shape::kHold == 0) {
        float e[kPack];
        exponentials<kPack>(e, v, most);
#pragma unroll
        for (int i = 0; i < kPack; i++) v[i] = e[i];
      }
#pragma unroll
      for (int i = 0; i < kPack; i++) v[i] = divided(v[i]);
      store_either<Shape>(p, row, k, v);
    });
  }
}

}  // namespace gpu
}  // namespace detinfer
