// exp, sigmoid, silu and gelu on fp32 vectors, and the small operations that they and math64.h are made of.
//
// Everything is a fixed sequence of IEEE operations and written FMAs, so every instruction set gives the same bits.
// Polynomials are minimax fits of scripts/fit_polynomials.py. Largest errors against the true value, over all 2^32
// inputs: exp 1.01 ULP, sigmoid 1.00, silu 1.12, gelu 1.48.
#pragma once

#include "gelu_table.h"
#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace detinfer {
namespace {

inline F absolute(F v) { return (F)((U)v & 0x7fffffffu); }
inline F with_sign_of(F magnitude, F sign) { return (F)((U)magnitude | ((U)sign & 0x80000000u)); }

// The greater (lesser) of v and a constant; NaN stays NaN. x86 max and min return their second operand if either is NaN.
inline F at_least(F v, float low) {
#if DETINFER_LANES == 16
  return (F)_mm512_max_ps(_mm512_set1_ps(low), (__m512)v);
#elif DETINFER_LANES == 8
  return (F)_mm256_max_ps(_mm256_set1_ps(low), (__m256)v);
#else
  return v < low ? broadcast(low) : v;
#endif
}
inline F at_most(F v, float high) {
#if DETINFER_LANES == 16
  return (F)_mm512_min_ps(_mm512_set1_ps(high), (__m512)v);
#elif DETINFER_LANES == 8
  return (F)_mm256_min_ps(_mm256_set1_ps(high), (__m256)v);
#else
  return v > high ? broadcast(high) : v;
#endif
}

// The contract's MAX and MIN: NaN wins, +0 is greater than -0. (Equal operands differ in the sign of a zero at most.)
inline F greater(F a, F b) {
  const F r = a == b ? (F)((U)a & (U)b) : (a > b ? a : b);
  return a == a ? (b == b ? r : b) : a;
}
inline F lesser(F a, F b) {
  const F r = a == b ? (F)((U)a | (U)b) : (a < b ? a : b);
  return a == a ? (b == b ? r : b) : a;
}

inline F square_root(F v) {
#if DETINFER_LANES == 16
  return (F)_mm512_sqrt_ps((__m512)v);
#elif DETINFER_LANES == 8
  return (F)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (F)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

inline bool any(I mask) {
#if DETINFER_LANES == 16
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif DETINFER_LANES == 8
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; i++) found |= mask[i];
  return found != 0;
#endif
}

// v * 2^k, rounded once, for integers k in [-252, 254] and |v| in [0.5, 2].
inline F scale(F v, F k) {
#if DETINFER_LANES == 16
  return (F)_mm512_scalef_ps((__m512)v, (__m512)k);
#else
  // Two exact powers: the first product cannot leave the normal range, so only the second one rounds.
  const I exponent = __builtin_convertvector(k, I);
  const I half = exponent >> 1;
  return v * (F)((half + 127) << 23) * (F)((exponent - half + 127) << 23);
#endif
}

// e^(v + low) = 2^k (1 + q), for v in [-130, 130] and tiny low; q is e^r - 1 of the remainder |r| <= ln(2) / 2.
struct Exponential {
  F q, k;
};
inline Exponential exponential_of(F r, F k) {
  F c = broadcast(0x1.6a2434p-10f);
  c = fma(c, r, broadcast(0x1.1239e2p-7f));
  c = fma(c, r, broadcast(0x1.5558f2p-5f));
  c = fma(c, r, broadcast(0x1.555492p-3f));
  c = fma(c, r, broadcast(0x1.fffffcp-2f));
  return {fma(c, r * r, r), k};
}
inline F remainder_by_ln2(F v, F k) {
  const F r = fma(k, broadcast(-0x1.62e4p-1f), v);  // exact: this part of ln 2 has 15 bits
  return fma(k, broadcast(-0x1.7f7d1cp-20f), r);
}
inline F nearest_power(F v) {
  const F magic = broadcast(0x1.8p23f);  // adding it leaves the nearest integer in the last bits
  return fma(v, broadcast(0x1.715476p+0f), magic) - magic;
}
inline Exponential exponential(F v) {
  const F k = nearest_power(v);
  return exponential_of(remainder_by_ln2(v, k), k);
}
inline Exponential exponential(F v, F low) {
  const F k = nearest_power(v);
  return exponential_of(remainder_by_ln2(v, k) + low, k);
}

inline F exp(F x) {
  const Exponential e = exponential(at_most(at_least(x, -110.0f), 90.0f));
  return scale(1.0f + e.q, e.k);
}

// (n + n_low) / (1 + t) for t in [0, 1], where n_low is what the rounding of n lost: the quotient's own error is found
// with FMAs and given back, which leaves little more than the last rounding.
inline F divide_by_one_plus(F n, F n_low, F t) {
  const F d = 1.0f + t;
  const F d_low = t - (d - 1.0f);
  const F reciprocal = 1.0f / d;
  const F y = n * reciprocal;
  const F rest = fma(-y, d_low, fma(-y, d, n)) + n_low;
  return fma(rest, reciprocal, y);
}

// 1 / (1 + e^-x), as e^x / (1 + e^x) where x is negative: relative accuracy in the tail, no overflow.
inline F sigmoid(F x) {
  const Exponential e = exponential(at_least(-absolute(x), -130.0f));
  const F p = 1.0f + e.q;
  const I positive = x >= 0.0f;
  const F y = divide_by_one_plus(positive ? broadcast(1.0f) : p, positive ? F{} : e.q - (p - 1.0f), scale(p, e.k));
  return positive ? y : scale(y, e.k);
}

// x sigmoid(x). silu(-Inf) is NaN, as in torch, which computes -Inf / Inf.
inline F silu(F x) {
  const F v = at_least(-absolute(x), -130.0f);
  const Exponential e = exponential(v);
  const F product = fma(v, e.q, v);
  const F product_low = fma(v, e.q, v - product);
  const I positive = x >= 0.0f;
  const F y = divide_by_one_plus(positive ? x : product, positive ? F{} : product_low, scale(1.0f + e.q, e.k));
  const F result = with_sign_of(positive ? y : scale(y, e.k), x);  // -0 stays -0
  // Past 130 the factor is 1 or rounds to 0; the division above would make NaN of +Inf and -0 of -Inf.
  return absolute(x) > 130.0f ? (positive ? x : x * 0.0f) : result;
}

// row[i mod 32] for each lane's i.
inline F look_up(const float* row, I i) {
#if DETINFER_LANES == 16
  return (F)_mm512_permutex2var_ps(_mm512_load_ps(row), (__m512i)i, _mm512_load_ps(row + 16));
#elif DETINFER_LANES == 8
  return (F)_mm256_i32gather_ps(row, (__m256i)(i & 31), 4);
#else
  F v;
  for (int lane = 0; lane < kLanes; lane++) v[lane] = row[i[lane] & 31];
  return v;
#endif
}

// x Phi(x), Phi the normal distribution function, as max(x, 0) - a Phi(-a) with a = |x|: relative accuracy in the tail.
// Phi(-a) = e^(-a^2/2) R(a); R comes from a table of polynomials around the multiples of 1/2.
inline F gelu(F x) {
  const F a = absolute(x);
  const F v = at_most(a, 14.6f);
  const F m = fma(v, broadcast(2.0f), broadcast(0x1.8p23f));
  const I i = (I)m;  // the nearest multiple of 1/2 in its last bits
  const F s = fma(m - 0x1.8p23f, broadcast(-0.5f), v);
  F p = look_up(kGeluTail[7], i);
  for (int j = 6; j >= 2; j--) p = fma(p, s, look_up(kGeluTail[j], i));
  const F constant = look_up(kGeluTail[1], i);
  const F tail = fma(p, s, constant);
  const F tail_low = fma(p, s, constant - tail) + look_up(kGeluTail[0], i);
  const F h = v * v;
  const F h_low = fma(v, v, -h);
  const Exponential e = exponential(h * -0.5f, h_low * -0.5f);
  const F product = v * tail;
  const F product_low = fma(v, tail_low, fma(v, tail, -product));
  const F t = scale(product + fma(product, e.q, fma(product_low, e.q, product_low)), e.k);
  // Past 14.6, t rounds to 0. gelu(-Inf) is NaN, as in torch: x * 0 is -0 for all other negative numbers.
  return (x >= 0.0f ? x : x * 0.0f) - t;
}

// Both operations IEEE, never the approximate instruction.
inline F rsqrt(F x) { return 1.0f / square_root(x); }

}  // namespace
}  // namespace detinfer
