// Sums, means and extremes: of rows, and of columns that lie side by side.
#pragma once

#include "rows_softmax.h"

namespace detinfer {
namespace gpu {

static __device__ __forceinline__ void store_one(const GpuRowsArgs& p, int64_t at, float value) {
  const float pair[2] = {value, value};
  if (p.out_dtype == kFloat32) static_cast<uint32_t*>(p.out)[at] = to_float32(value);
  else static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(p.out_dtype == kBFloat16 ? BFloat16::put(pair) : Float16::put(pair));
}

// The sum of no terms is +0, as in torch.
static __device__ __forceinline__ float sum_or_mean(const GpuRowsArgs& p, float sum) {
  if (p.n == 0) sum = 0.0f;
  return p.op == kMean ? div_rn(sum, static_cast<float>(p.n)) : sum;
}

template <class Shape>
static __global__ void __launch_bounds__(Shape::kThreads) reduce_rows(DETINFER_PARAMETER GpuRowsArgs p) {
  using T = typename Shape::T;
  constexpr int kPack = Shape::kPack;
  __shared__ typename Row<Shape>::Shared shared;
  const Row<Shape> row(p.rows, p.n);
  const char* x = row_of(p.x, row.row(), p.x_row, T::kBytes);
  const bool extreme = p.op == kMax || p.op == kMin, greatest = p.op == kMax;
  const float infinity = __builtin_inff();
  const float fill = !extreme ? -0.0f : greatest ? -infinity : infinity;
  const auto get = [&](int k, float(&v)[kPack]) {
    load_values<T, kPack, Shape::kAligned>(v, x + row.element(k) * T::kBytes, row.left(k), fill);
  };
  Values<Shape, decltype(get)> values(row, get);
  float result;
  if (extreme) {
    const auto join = [=](float a, float b) { return greatest ? greater_of(a, b) : lesser_of(a, b); };
    float found = fill;
    values.each([&](int, int, const float(&v)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; i++) found = join(found, v[i]);
    });
    result = Row<Shape>::together(found, shared, join);
  } else {
    typename Row<Shape>::Lanes lane;
    Row<Shape>::clear(lane);
    values.each([&](int, int slot, const float(&v)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; i++) lane[slot][i] = add_rn(lane[slot][i], v[i]);
    });
    result = sum_or_mean(p, Row<Shape>::halve(lane, shared));
  }
  if (row.leads() || (p.n == 0 && row.row() < p.rows && threadIdx.x % (Shape::kGroup * Shape::kWarps) == 0))
    store_one(p, row.row(), result);
}

static constexpr int kColumns = 32;  // of a block
static constexpr int kStrands = 16;  // threads for one column

// x [outer, n, inner] over n. Thread (column, strand) has the lanes that are equal to its strand modulo 16: a subtree of
// the halving. It walks its lanes in the order that lets it join two partial sums as soon as both are there.
template <class T>
static __global__ void __launch_bounds__(kColumns* kStrands) reduce_columns(DETINFER_PARAMETER GpuRowsArgs p) {
  __shared__ float shared[kStrands][kColumns];
  const int strand = static_cast<int>(threadIdx.x) / kColumns, place = static_cast<int>(threadIdx.x) % kColumns;
  const int64_t across = (p.inner + kColumns - 1) / kColumns;
  const int64_t outer = blockIdx.x / across, column = blockIdx.x % across * kColumns + place;
  const bool here = column < p.inner;
  const char* x = row_of(p.x, outer, p.n * p.inner, T::kBytes) + column * T::kBytes;
  const auto at = [&](int64_t i) {
    const char* from = x + i * p.inner * T::kBytes;
    if constexpr (T::kPerWord == 1) return *reinterpret_cast<const float*>(from);
    else return T::get(*reinterpret_cast<const uint16_t*>(from), 0);
  };
  const bool extreme = p.op == kMax || p.op == kMin, greatest = p.op == kMax;
  float found = -0.0f;
  if (extreme) {
    found = greatest ? -__builtin_inff() : __builtin_inff();
    if (here)
      for (int64_t i = strand; i < p.n; i += kStrands) found = greatest ? greater_of(found, at(i)) : lesser_of(found, at(i));
  } else if (here) {
    // Lane strand + 16 j for j of 0 to 63 in bit-reversed order: neighbours in this order are joined first.
    constexpr int kBits = 6;
    float waiting[kBits + 1];
#pragma unroll
    for (int b = 0; b <= kBits; b++) waiting[b] = -0.0f;
    for (int step = 0; step < 1 << kBits; step++) {
      const int lane = strand + kStrands * static_cast<int>(__brev(static_cast<uint32_t>(step)) >> (32 - kBits));
      float sum = -0.0f;
      for (int64_t i = lane; i < p.n; i += kRowLanes) sum = add_rn(sum, at(i));
      // As many joins as the step ends in ones; those after the first that is not taken must not be taken either.
      bool joins = true;
#pragma unroll
      for (int b = 0; b < kBits; b++) {
        const bool full = joins && (step >> b & 1) != 0;
        if (full) sum = add_rn(waiting[b], sum);
        else if (joins) waiting[b] = sum;
        joins = full;
      }
      if (joins) found = sum;
    }
  }
  shared[strand][place] = found;
  __syncthreads();
  if (strand != 0 || !here) return;
  float of[kStrands];
#pragma unroll
  for (int s = 0; s < kStrands; s++) of[s] = shared[s][place];
#pragma unroll
  for (int half = kStrands / 2; half >= 1; half /= 2)
#pragma unroll
    for (int s = 0; s < kStrands / 2; s++) {
      if (s >= half) continue;
      if (extreme) of[s] = greatest ? greater_of(of[s], of[s + half]) : lesser_of(of[s], of[s + half]);
      else of[s] = add_rn(of[s], of[s + half]);
    }
  store_one(p, outer * p.inner + column, extreme ? of[0] : sum_or_mean(p, of[0]));
}

}  // namespace gpu
}  // namespace detinfer
