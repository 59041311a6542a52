// One vector of fp32 lanes for the instruction set that this file is compiled for.
//
// Everything is in an anonymous namespace: each instruction set gets its own copy and the linker can mix none of them.
#pragma once

#include <cstring>

#include "../platform.h"
#include "../types.h"

#if defined(DETINFER_LEVEL_avx512) || defined(DETINFER_LEVEL_avx512_bf16)
#define DETINFER_LANES 16
#include <immintrin.h>
#elif defined(DETINFER_LEVEL_avx2)
#define DETINFER_LANES 8
#include <immintrin.h>
#else
#define DETINFER_LANES 4
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#endif

namespace detinfer {
namespace {

constexpr int kLanes = DETINFER_LANES;
typedef float F __attribute__((vector_size(4 * DETINFER_LANES)));
typedef int32_t I __attribute__((vector_size(4 * DETINFER_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * DETINFER_LANES)));
typedef uint16_t H __attribute__((vector_size(2 * DETINFER_LANES)));

inline F broadcast(float value) { return value - F{}; }  // value - (+0): keeps -0
inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

// a * b + c with one rounding in every lane.
inline F fma(F a, F b, F c) {
#if DETINFER_LANES == 16
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DETINFER_LANES == 8
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

inline F canonical(F v) { return v == v ? v : (F)(U{} + 0x7fffffffu); }

inline F widen_bfloat16(H v) { return (F)(__builtin_convertvector(v, U) << 16); }
inline H narrow_bfloat16(F v) {
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U kept = v == v ? rounded : U{} + 0x7fffu;
  return __builtin_convertvector(kept, H);
}

inline F widen_float16(H v) {
#if DETINFER_LANES == 16
  return (F)_mm512_cvtph_ps((__m256i)v);
#elif DETINFER_LANES == 8
  return (F)_mm256_cvtph_ps((__m128i)v);
#else
  F out;
  for (int i = 0; i < kLanes; i++) out[i] = float16_to_float(v[i]);
  return out;
#endif
}
inline H narrow_float16(F v) {
  H out;
#if DETINFER_LANES == 16
  out = (H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif DETINFER_LANES == 8
  out = (H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kLanes; i++) out[i] = float_to_float16(v[i]);
#endif
  const H magnitude = out & (uint16_t)0x7fff;
  return magnitude > (uint16_t)0x7c00 ? H{} + (uint16_t)0x7fff : out;
}

// Storage element of a DType.
template <DType T> struct Storage { using type = uint16_t; };
template <> struct Storage<kFloat32> { using type = float; };

// kLanes elements at p, widened to fp32.
template <DType T> inline F load_as(const typename Storage<T>::type* p) {
  if constexpr (T == kFloat32) {
    return load(p);
  } else {
    H v;
    std::memcpy(&v, p, sizeof v);
    if constexpr (T == kBFloat16) return widen_bfloat16(v);
    else return widen_float16(v);
  }
}

// Rounds to T once, canonicalises NaN, writes kLanes elements at p.
template <DType T> inline void store_as(typename Storage<T>::type* p, F v) {
  if constexpr (T == kFloat32) {
    store(p, canonical(v));
  } else {
    const H h = T == kBFloat16 ? narrow_bfloat16(v) : narrow_float16(v);
    std::memcpy(p, &h, sizeof h);
  }
}

// The first `count` (0 < count < kLanes) elements at p; other lanes hold `fill`. Same conversions as load_as.
template <DType T> inline F load_some(const typename Storage<T>::type* p, int count, float fill) {
#if DETINFER_LANES == 16
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (T == kFloat32) {
    return (F)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, p);
  } else {
    const H h = (H)_mm256_maskz_loadu_epi16(mask, p);
    const F v = T == kBFloat16 ? widen_bfloat16(h) : widen_float16(h);
    return (F)_mm512_mask_blend_ps(mask, _mm512_set1_ps(fill), (__m512)v);
  }
#else
  if (count >= kLanes) __builtin_unreachable();
  typename Storage<T>::type lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(lanes[0]) * count);
  F v = load_as<T>(lanes);
  for (int i = count; i < kLanes; i++) v[i] = fill;
  return v;
#endif
}

template <DType T> inline void store_some(typename Storage<T>::type* p, F v, int count) {
#if DETINFER_LANES == 16
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (T == kFloat32) _mm512_mask_storeu_ps(p, mask, (__m512)canonical(v));
  else _mm256_mask_storeu_epi16(p, mask, (__m256i)(T == kBFloat16 ? narrow_bfloat16(v) : narrow_float16(v)));
#else
  if (count >= kLanes) __builtin_unreachable();
  typename Storage<T>::type lanes[kLanes];
  store_as<T>(lanes, v);
  std::memcpy(p, lanes, sizeof(lanes[0]) * count);
#endif
}

// The last halvings of row_sum (order.h): lane l adds lane l + kLanes / 2, then l + kLanes / 4, ..., then l + 1.
inline float halve(F v) {
#if defined(__SSE2__)
#if DETINFER_LANES == 16
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif DETINFER_LANES == 8
  const __m256 eight = (__m256)v;
#endif
#if DETINFER_LANES == 4
  __m128 four = (__m128)v;
#else
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#endif
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
#else
  for (int half = kLanes / 2; half >= 1; half /= 2)
    for (int i = 0; i < half; i++) v[i] = v[i] + v[i + half];
  return v[0];
#endif
}

}  // namespace
}  // namespace detinfer
