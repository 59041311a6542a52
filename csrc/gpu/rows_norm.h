// RMSNorm (with or without a residual) and LayerNorm of a row.
#pragma once

#include "rows_softmax.h"

namespace detinfer {
namespace gpu {

// Elements of weight or bias, which may be of another dtype than the row.
template <class T, int kPack>
static __device__ __forceinline__ void load_vector(float (&v)[kPack], const GpuRowsArgs& p, const void* base, int64_t element,
                                                   int64_t left, bool aligned) {
  const char* at = static_cast<const char*>(base);
  if (T::kPerWord == 1 || p.weight_dtype == kFloat32) {
    if constexpr (kPack <= 4) load_values<Float32, kPack>(v, at + element * 4, left, aligned, 0.0f);
    else {
#pragma unroll
      for (int part = 0; part < kPack; part += 4) {
        float four[4] = {};
        if (left > part) load_values<Float32, 4>(four, at + (element + part) * 4, left - part, aligned, 0.0f);
#pragma unroll
        for (int i = 0; i < 4; i++) v[part + i] = four[i];
      }
    }
  } else {
    load_values<T, kPack>(v, at + element * T::kBytes, left, aligned, 0.0f);
  }
}

struct Aligned {  // to the packs of a shape, none of which runs past its row's end
  bool x, residual, weight, out;
};

template <class Shape, bool kLayer>
static __global__ void __launch_bounds__(Shape::kThreads) norm(DETINFER_PARAMETER GpuRowsArgs p, Aligned aligned) {
  using T = typename Shape::T;
  constexpr int kPack = Shape::kPack;
  __shared__ typename Row<Shape>::Shared shared[2];
  const Row<Shape> row(p.rows, p.n);
  const char* x = row_of(p.x, row.row(), p.x_row, T::kBytes);
  const char* residual = row_of(p.residual, row.row(), p.residual_row, T::kBytes);
  const bool adds = !kLayer && p.residual != nullptr;
  const auto get = [&](int64_t k, float(&v)[kPack]) {
    // Past the end: -0 for the sum of LayerNorm, 0 for squares.
    load_values<T, kPack>(v, x + row.element(k) * T::kBytes, row.left(k), aligned.x, kLayer ? -0.0f : 0.0f);
    if (!adds) return;
    float r[kPack];
    load_values<T, kPack>(r, residual + row.element(k) * T::kBytes, row.left(k), aligned.residual, 0.0f);
#pragma unroll
    for (int i = 0; i < kPack; i++) v[i] = add_rn(v[i], r[i]);
  };
  Values<Shape, decltype(get)> values(row, get);

  // The sum is stored in the first pass; every pass over a row that is not held rounds it again.
  const auto added = [&](float(&v)[kPack]) {
    if (adds && p.residual_mode == kRounded && (Shape::kHold == 0)) {
#pragma unroll
      for (int i = 0; i < kPack; i++) v[i] = rounded<T>(v[i]);
    }
  };
  if (adds) {
    values.each([&](int64_t k, int, float(&v)[kPack]) {
      char* at = row_of(p.residual_out, row.row(), p.n, T::kBytes) + row.element(k) * T::kBytes;
      store_values<T, kPack>(at, v, row.left(k), aligned.out);
      if (p.residual_mode == kRounded && Shape::kHold != 0) {
#pragma unroll
        for (int i = 0; i < kPack; i++) v[i] = rounded<T>(v[i]);
      }
    });
  }

  typename Row<Shape>::Lanes lane;
  float mean = 0.0f;
  if constexpr (kLayer) {
    Row<Shape>::clear(lane);
    values.each([&](int64_t, int slot, const float(&v)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; i++) lane[slot][i] = add_rn(lane[slot][i], v[i]);
    });
    mean = div_rn(Row<Shape>::halve(lane, shared[0]), static_cast<float>(p.n));
  }
  Row<Shape>::clear(lane);
  values.each([&](int64_t k, int slot, float(&v)[kPack]) {
    added(v);
#pragma unroll
    for (int i = 0; i < kPack; i++) {
      float e = v[i];
      if constexpr (kLayer) e = i < row.left(k) ? add_rn(e, -mean) : 0.0f;
      lane[slot][i] = fma_rn(e, e, lane[slot][i]);
    }
  });
  const float r = inverse_root(Row<Shape>::halve(lane, shared[1]), p.n, static_cast<float>(p.eps));
  if (row.leads()) {
    if (p.mean != nullptr) static_cast<uint32_t*>(p.mean)[row.row()] = to_float32(mean);
    if (p.rstd != nullptr) static_cast<uint32_t*>(p.rstd)[row.row()] = to_float32(r);
  }

  const bool llama = !kLayer && p.weight_mode == kLlama, gemma = !kLayer && p.weight_mode == kGemma;
  values.each([&](int64_t k, int, float(&v)[kPack]) {
    added(v);
#pragma unroll
    for (int i = 0; i < kPack; i++) v[i] = mul_rn(kLayer ? add_rn(v[i], -mean) : v[i], r);
    if (p.weight != nullptr) {
      float w[kPack];
      load_vector<T, kPack>(w, p, p.weight, row.element(k), row.left(k), aligned.weight);
#pragma unroll
      for (int i = 0; i < kPack; i++) v[i] = mul_rn(llama ? rounded<T>(v[i]) : v[i], gemma ? add_rn(1.0f, w[i]) : w[i]);
    }
    if (kLayer && p.bias != nullptr) {
      float b[kPack];
      load_vector<T, kPack>(b, p, p.bias, row.element(k), row.left(k), aligned.weight);
#pragma unroll
      for (int i = 0; i < kPack; i++) v[i] = add_rn(v[i], b[i]);
    }
    store_values<T, kPack>(row_of(p.out, row.row(), p.n, T::kBytes) + row.element(k) * T::kBytes, v, row.left(k), aligned.out);
  });
}

}  // namespace gpu
}  // namespace detinfer
