// RMSNorm, add + RMSNorm and LayerNorm of a row.
#pragma once

#include "rows_softmax.h"

namespace detinfer {
namespace gpu {

enum NormKind { kPlain, kAdded, kCentered };  // RMSNorm, of a sum with a residual, LayerNorm

// Elements of weight or bias, which are of the row's dtype or fp32.
template <class Shape>
static __device__ __forceinline__ void load_vector(float (&v)[Shape::kPack], const GpuRowsArgs& p, const void* base,
                                                   const Row<Shape>& row, int k) {
  using T = typename Shape::T;
  const char* at = static_cast<const char*>(base);
  if (T::kPerWord == 1 || p.weight_dtype == kFloat32)
    load_values<Float32, Shape::kPack, Shape::kAligned>(v, at + row.element(k) * 4, row.left(k), 0.0f);
  else
    load_values<T, Shape::kPack, Shape::kAligned>(v, at + row.element(k) * T::kBytes, row.left(k), 0.0f);
}

template <class Shape, int kKind>
static __global__ void __launch_bounds__(Shape::kThreads) norm(DETINFER_PARAMETER GpuRowsArgs p) {
  using T = typename Shape::T;
  constexpr int kPack = Shape::kPack, kWords = kPack / T::kPerWord;
  constexpr bool kHeld = Shape::kHold != 0;
  __shared__ typename Row<Shape>::Shared shared[2];
  const Row<Shape> row(p.rows, p.n);
  const char* x = row_of(p.x, row.row(), p.x_row, T::kBytes);
  const char* residual = row_of(p.residual, row.row(), p.residual_row, T::kBytes);
  const auto get = [&](int k, float(&v)[kPack]) {
    // Past the end: -0 for the sum of LayerNorm, 0 for squares.
    load_values<T, kPack, Shape::kAligned>(v, x + row.element(k) * T::kBytes, row.left(k), kKind == kCentered ? -0.0f : 0.0f);
    if constexpr (kKind == kAdded) {
      float r[kPack];
      load_values<T, kPack, Shape::kAligned>(r, residual + row.element(k) * T::kBytes, row.left(k), 0.0f);
#pragma unroll
      for (int i = 0; i < kPack; i++) v[i] = add_rn(v[i], r[i]);
    }
  };
  Values<Shape, decltype(get)> values(row, get);

  // A weight of the row's dtype is on its way while the row is summed.
  constexpr bool kEarly = kHeld && Shape::kAligned;
  const bool same = p.weight != nullptr && (T::kPerWord == 1 || p.weight_dtype != kFloat32);
  Pack<kWords> early[kEarly ? Shape::kHold : 1];
  if constexpr (kEarly) {
    if (same) {
#pragma unroll
      for (int k = 0; k < Shape::kHold; k++)
        if (k < row.packs())
          early[k] = *reinterpret_cast<const Pack<kWords>*>(static_cast<const char*>(p.weight) + row.element(k) * T::kBytes);
    }
  }

  // The sum is stored in the first pass; every pass over a row that is not held rounds it again.
  const bool rounds = kKind == kAdded && p.residual_mode == kRounded;
  const auto round_all = [&](float(&v)[kPack]) {
#pragma unroll
    for (int i = 0; i < kPack; i++) v[i] = rounded<T>(v[i]);
  };
  if constexpr (kKind == kAdded) {
    values.each([&](int k, int, float(&v)[kPack]) {
      char* at = row_of(p.residual_out, row.row(), p.n, T::kBytes) + row.element(k) * T::kBytes;
      store_values<T, kPack, Shape::kAligned>(at, v, row.left(k));
      if (kHeld && rounds) round_all(v);
    });
  }

  typename Row<Shape>::Lanes lane;
  float mean = 0.0f;
  if constexpr (kKind == kCentered) {
    Row<Shape>::clear(lane);
    values.each([&](int, int slot, const float(&v)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; i++) lane[slot][i] = add_rn(lane[slot][i], v[i]);
    });
    mean = div_rn(Row<Shape>::halve(lane, shared[0]), static_cast<float>(p.n));
  }
  Row<Shape>::clear(lane);
  values.each([&](int k, int slot, float(&v)[kPack]) {
    if (!kHeld && rounds) round_all(v);
#pragma unroll
    for (int i = 0; i < kPack; i++) {
      float e = v[i];
      if constexpr (kKind == kCentered) e = Shape::kAligned || i < row.left(k) ? add_rn(e, -mean) : 0.0f;
      lane[slot][i] = fma_rn(e, e, lane[slot][i]);
    }
  });
  const float r = inverse_root(Row<Shape>::halve(lane, shared[1]), p.n, static_cast<float>(p.eps));
  if (row.leads()) {
    if (p.mean != nullptr) static_cast<uint32_t*>(p.mean)[row.row()] = to_float32(mean);
    if (p.rstd != nullptr) static_cast<uint32_t*>(p.rstd)[row.row()] = to_float32(r);
  }

  // scaled(h * r, w) for every element, w from weight(k, ...).
  const auto finish = [&](const auto& weight, const auto& scaled) {
    values.each([&](int k, int, float(&v)[kPack]) {
      if (!kHeld && rounds) round_all(v);
      float w[kPack];
      weight(k, w);
#pragma unroll
      for (int i = 0; i < kPack; i++) v[i] = scaled(mul_rn(kKind == kCentered ? add_rn(v[i], -mean) : v[i], r), w[i]);
      if constexpr (kKind == kCentered) {
        if (p.bias != nullptr) {
          float b[kPack];
          load_vector<Shape>(b, p, p.bias, row, k);
#pragma unroll
          for (int i = 0; i < kPack; i++) v[i] = add_rn(v[i], b[i]);
        }
      }
      char* at = row_of(p.out, row.row(), p.n, T::kBytes) + row.element(k) * T::kBytes;
      store_values<T, kPack, Shape::kAligned>(at, v, row.left(k));
    });
  };
  const auto times = [](float v, float w) { return mul_rn(v, w); };
  const auto llama = [](float v, float w) { return mul_rn(rounded<T>(v), w); };
  const auto gemma = [](float v, float w) { return mul_rn(v, add_rn(1.0f, w)); };
  const auto any = [&](int k, float(&w)[kPack]) { load_vector<Shape>(w, p, p.weight, row, k); };
  const auto held = [&](int k, float(&w)[kPack]) {
    if constexpr (kEarly) {
#pragma unroll
      for (int i = 0; i < kPack; i++) w[i] = T::get(early[k].word[i / T::kPerWord], i % T::kPerWord);
    } else {
      load_vector<Shape>(w, p, p.weight, row, k);
    }
  };
  if (p.weight == nullptr) {
    finish([](int, float(&)[kPack]) {}, [](float v, float) { return v; });
  } else if constexpr (kKind == kCentered) {
    if (same) finish(held, times);
    else finish(any, times);
  } else if (!same) {
    finish(any, [&](float v, float w) {
      return p.weight_mode == kLlama ? llama(v, w) : p.weight_mode == kGemma ? gemma(v, w) : times(v, w);
    });
  } else if (p.weight_mode == kLlama) {
    finish(held, llama);
  } else if (p.weight_mode == kGemma) {
    finish(held, gemma);
  } else {
    finish(held, times);
  }
}

}  // namespace gpu
}  // namespace detinfer
