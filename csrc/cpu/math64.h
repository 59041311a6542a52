// The other elementary functions: evaluated in double precision with plain multiplications and additions, then rounded
// once to fp32, so nearly every result is the correctly rounded one (largest error over every 13th input: 0.51 ULP).
//
// Plain operations rather than FMAs, because an instruction set without FMA would need a library call for each one.
// Polynomials are minimax fits of scripts/fit_polynomials.py, with relative errors of 2^-34 to 2^-45.
#pragma once

#include "math.h"

namespace detinfer {
namespace {

// A vector of fp32 lanes is two of these.
typedef double D __attribute__((vector_size(4 * DETINFER_LANES)));
typedef int64_t L __attribute__((vector_size(4 * DETINFER_LANES)));   // masks
typedef uint64_t W __attribute__((vector_size(4 * DETINFER_LANES)));  // bits
constexpr int kDoubles = DETINFER_LANES / 2;

struct Pair {
  D low, high;
};
inline Pair widen(F v) {
#if DETINFER_LANES == 16
  return {(D)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)), (D)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif DETINFER_LANES == 8
  return {(D)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)), (D)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#else
  Pair out;
  for (int i = 0; i < kDoubles; i++) {
    out.low[i] = v[i];
    out.high[i] = v[i + kDoubles];
  }
  return out;
#endif
}
inline F narrow(D low, D high) {
#if DETINFER_LANES == 16
  const __m512 half = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low));
  return (F)_mm512_insertf32x8(half, _mm512_cvtpd_ps((__m512d)high), 1);
#elif DETINFER_LANES == 8
  return (F)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)high), _mm256_cvtpd_ps((__m256d)low));
#else
  F out;
  for (int i = 0; i < kDoubles; i++) {
    out[i] = static_cast<float>(low[i]);
    out[i + kDoubles] = static_cast<float>(high[i]);
  }
  return out;
#endif
}

inline D constant(double value) { return value - D{}; }
constexpr double kInfinity = __builtin_inf();
constexpr double kNaN = __builtin_nan("");
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kMagic = 0x1.8p52;  // adding it leaves the nearest integer in the last bits of the sum

inline D absolute(D v) { return (D)((W)v & 0x7fffffffffffffffu); }
inline D with_sign_of(D magnitude, D sign) { return (D)((W)magnitude | ((W)sign & 0x8000000000000000u)); }
inline D at_least(D v, double low) {
#if DETINFER_LANES == 16
  return (D)_mm512_max_pd(_mm512_set1_pd(low), (__m512d)v);
#elif DETINFER_LANES == 8
  return (D)_mm256_max_pd(_mm256_set1_pd(low), (__m256d)v);
#else
  return v < low ? constant(low) : v;
#endif
}
inline D at_most(D v, double high) {
#if DETINFER_LANES == 16
  return (D)_mm512_min_pd(_mm512_set1_pd(high), (__m512d)v);
#elif DETINFER_LANES == 8
  return (D)_mm256_min_pd(_mm256_set1_pd(high), (__m256d)v);
#else
  return v > high ? constant(high) : v;
#endif
}

// 2^t = s (1 + p), s a power of two and |p| < 0.42.
struct Power {
  D p;
  W n;  // the exponent of s in its low bits, for shifting into place
};
inline Power power(D t) {
  const D m = t + kMagic;
  const D f = t - (m - kMagic);
  D p = f * 0x1.fde5cd7e4e17ep-17 + 0x1.445ca69cfc933p-13;
  p = p * f + 0x1.5d8a868260b4ep-10;
  p = p * f + 0x1.3b29f375868cap-7;
  p = p * f + 0x1.c6b08abf98cc7p-5;
  p = p * f + 0x1.ebfbe077adfccp-3;
  p = p * f + 0x1.62e42ff0e2158p-1;
  return {p * f, (W)m};
}

// 2^t; exactly 0 for t <= -1023 and exactly Inf for t >= 1024.
inline D exp2(D t) {
  const Power e = power(at_most(at_least(t, -1023.0), 1024.0));
  return (D)((W)(1.0 + e.p) + (e.n << 52));
}
inline D exp(D x) { return exp2(x * kLog2E); }

inline D expm1(D x) {
  const Power e = power(at_most(at_least(x * kLog2E, -100.0), 1000.0));
  const D s = (D)((W)constant(1.0) + (e.n << 52));
  return x == 0.0 ? x : (s - 1.0) + s * e.p;
}

inline D tanh(D x) {
  const D e = expm1(at_most(absolute(x), 30.0) * 2.0);
  return with_sign_of(e / (e + 2.0), x);
}

// x = 2^k m with m in [sqrt(1/2), sqrt(2)); log is log(m). For positive finite x.
struct Logarithm {
  D k, log;
};
inline Logarithm logarithm(D x) {
  const uint64_t one = 0x3ff0000000000000u, root_half = 0x3fe6a09e667f3bcdu;
  const W exponent = ((W)x + (one - root_half)) & 0x7ff0000000000000u;
  const D m = (D)((W)x - exponent + one);
  const D k = (D)((exponent >> 52) | 0x4330000000000000u) - (0x1p52 + 1023.0);
  const D f = m - 1.0;
  const D s = f / (m + 1.0);
  const D t = s * s;
  D p = t * 0x1.9112830858650p-3 + 0x1.c62b4c9c87856p-3;
  p = p * t + 0x1.2494113cecefdp-2;
  p = p * t + 0x1.999996ab05127p-2;
  p = p * t + 0x1.555555561d972p-1;
  return {k, s * (p * t + 2.0)};
}
// What every logarithm gives outside the positive finite numbers.
inline D log_edges(D x, D result) {
  result = x == kInfinity ? x : result;
  result = x == 0.0 ? constant(-kInfinity) : result;
  return x < 0.0 ? constant(kNaN) : (x == x ? result : x);
}
inline D log(D x) {
  const Logarithm l = logarithm(x);
  return log_edges(x, l.k * kLn2 + l.log);
}
inline D log2(D x) {
  const Logarithm l = logarithm(x);
  return log_edges(x, l.k + l.log * kLog2E);
}
inline D log10(D x) { return log(x) * 0x1.bcb7b1526e50ep-2; }

// log(1 + x): u = 1 + x drops low bits of x; their first-order share is added back.
inline D log1p(D x) {
  const D u = 1.0 + x;
  const D lost = (x - (u - 1.0)) / u;
  const D result = log(u) + (absolute(lost) < 1.0 ? lost : D{});  // not where u is 0 or Inf
  return x == 0.0 ? x : result;
}

// log(1 + e^(beta x)) / beta, or x where beta x is past the threshold, as max(z, 0) + log1p(e^-|z|).
inline D softplus(D x, double beta, double threshold) {
  const D z = x * beta;
  const D sum = (z > 0.0 ? z : D{}) + log1p(exp(-absolute(z)));
  return z > threshold ? x : (z == z ? sum / beta : z);
}

// erfc(z) = e^-z^2 p(u) / (z + 3), u = (z - 3) / (z + 3), for z >= 0, given z and e^-z^2.
inline D erfc_positive(D z, D e) {
  const D bounded = at_most(z, 30.0);
  const D reciprocal = 1.0 / (bounded + 3.0);
  const D u = (bounded - 3.0) * reciprocal;
  D p = u * 0x1.49e220ea31454p-15 + 0x1.8fea321e27d2ep-14;
  p = p * u - 0x1.2d8e64ee811f5p-12;
  p = p * u - 0x1.1dfb2aaf740bap-11;
  p = p * u + 0x1.8e36ee2b45980p-9;
  p = p * u - 0x1.3de02b90dfa50p-10;
  p = p * u - 0x1.b78c6444b8b04p-6;
  p = p * u + 0x1.e995eecfb7a5bp-4;
  p = p * u - 0x1.3deb1e2879527p-2;
  p = p * u + 0x1.2e32694b29aaep-1;
  p = p * u - 0x1.c44c47236f348p-1;
  p = p * u + 0x1.12f21ddd9ed2bp+0;
  return e * (p * reciprocal);
}
inline D erfc(D x) {
  const D r = erfc_positive(absolute(x), exp2(x * x * -kLog2E));
  return x < 0.0 ? 2.0 - r : r;
}

inline D erf(D x) {
  const D t = x * x;
  D p = t * -0x1.43603557af4ffp-17 + 0x1.d817e0acb12c3p-14;
  p = p * t - 0x1.bcbc3ee5d71fcp-11;
  p = p * t + 0x1.5628be21fb35ap-8;
  p = p * t - 0x1.b829a3c85f281p-6;
  p = p * t + 0x1.ce2f0772d1696p-4;
  p = p * t - 0x1.8127465f2f5e2p-2;
  p = p * t + 0x1.20dd7504002cap+0;
  const D large = 1.0 - erfc_positive(absolute(x), exp2(t * -kLog2E));
  return absolute(x) < 1.0 ? x * p : with_sign_of(large, x);
}

// x (1 + tanh(v)) / 2 with v = sqrt(2/pi) (x + 0.044715 x^3) is x / (1 + e^-2v).
inline D gelu_tanh(D x) {
  const D v = x * (x * x * 0.044715 + 1.0);
  return x / (1.0 + exp2(v * (-0x1.9884533d43651p+0 * kLog2E)));
}

// The remainder of x by pi: x = r + (n + shift) pi, with n's lowest bit in bit 0 of `odd`.
struct Remainder {
  D r;
  W odd;
};
struct LargeRemainder {
  double r;
  uint64_t odd;
};

// For one 2^20 <= |x| < 2^128, in integers: x = m 2^e, and the product of m with 96 bits of 2^e / pi (one integer bit,
// 95 fraction bits) gives x / pi mod 2. `half` is 1 for cos. What 96 bits cut off is below 2^-70.
inline LargeRemainder large_remainder(float x, int half) {
  // The bits of 1 / pi, 32 a word, after one word before the point.
  static const uint32_t kOneOverPi[] = {0u,          0x517cc1b7u, 0x27220a94u, 0xfe13abe8u, 0xfa9a6ee0u,
                                        0x6db14accu, 0x9e21c820u, 0xff28b1d5u, 0xef5de2b0u};
  const uint32_t bits = float_to_bits(x);
  const uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const int exponent = static_cast<int>((bits >> 23) & 0xffu) - 150;  // from -3 to 104
  const int first = 31 + exponent;                                    // this bit of the table weighs 2^(0 - exponent)
  unsigned __int128 window = 0;
  for (int i = 0; i < 4; i++) window = (window << 32) | kOneOverPi[(first >> 5) + i];
  window = (window << (first & 31)) >> 32;
  const unsigned __int128 one = static_cast<unsigned __int128>(1) << 95;
  const unsigned __int128 modulus = (one << 1) - 1;
  unsigned __int128 turns = (window * mantissa) & modulus;  // |x| / pi mod 2, 95 fraction bits
  const bool negative = (bits >> 31) != 0;
  if (negative) turns = (0 - turns) & modulus;
  if (half) turns = (turns - (one >> 1)) & modulus;
  const unsigned __int128 nearest = (turns + (one >> 1)) & modulus;
  const uint64_t odd = static_cast<uint64_t>(nearest >> 95) & 1u;
  const __int128 rest = static_cast<__int128>(nearest & (one - 1)) - static_cast<__int128>(one >> 1);
  return {static_cast<double>(rest) * 0x1p-95 * 0x1.921fb54442d18p+1, odd};
}

inline Remainder remainder(D x, int half) {
  const double shift = 0.5 * half;
  const D m = (x * 0x1.45f306dc9c883p-2 - shift) + kMagic;
  const D n = (m - kMagic) + shift;
  // pi in parts of 33, 33 and 53 bits: the first two products are exact up to n = 2^20.
  D r = x - n * 0x1.921fb544p+1;
  r = r - n * 0x1.0b4611a6p-33;
  r = r - n * 0x1.3198a2e037073p-68;
  return {r, (W)m};
}

// sin(r) for |r| <= pi / 2, negated where n is odd.
inline D sine(Remainder v) {
  const D t = v.r * v.r;
  D p = t * -0x1.9a68059587a5dp-26 + 0x1.71707a81a5caap-19;
  p = p * t - 0x1.a017d9757bd8dp-13;
  p = p * t + 0x1.11110c4981f73p-7;
  p = p * t - 0x1.5555554767959p-3;
  return (D)((W)(v.r * (1.0 + t * p)) ^ (v.odd << 63));
}

inline F sine_or_cosine(F x, int half) {
  const Pair wide = widen(x);
  Remainder low = remainder(wide.low, half), high = remainder(wide.high, half);
  const I large = (absolute(x) >= 0x1p20f) & (absolute(x) < broadcast(__builtin_inff()));
  if (any(large)) {
    for (int i = 0; i < kLanes; i++) {
      if (!large[i]) continue;
      const LargeRemainder one = large_remainder(x[i], half);
      Remainder& part = i < kDoubles ? low : high;
      part.r[i % kDoubles] = one.r;
      part.odd[i % kDoubles] = one.odd;
    }
  }
  // cos(r + (n + 1/2) pi) = -(-1)^n sin(r)
  low.odd += static_cast<uint64_t>(half);
  high.odd += static_cast<uint64_t>(half);
  return narrow(sine(low), sine(high));
}

// x^3: the square is exact, the product rounds once here and once to fp32.
inline D cube(D x) { return x * x * x; }

// x^y, special cases as in C99 annex F; x x where y is 2 and x x x where y is 3.
inline D pow(D x, D y) {
  const D a = absolute(x);
  const Logarithm l = logarithm(a);
  D log2_a = l.k + l.log * kLog2E;
  log2_a = a == kInfinity ? a : log2_a;
  log2_a = a == 0.0 ? constant(-kInfinity) : log2_a;
  log2_a = a == a ? log2_a : a;
  D r = exp2(y * log2_a);
  const D m = y + kMagic;
  const L small = absolute(y) < 0x1p24;  // an fp32 past this is an even integer
  const L whole = (m - kMagic == y) | ~small;
  const L negative = (L)x < 0;
  const W odd = ((W)m << 63) & (W)(small & whole & negative);
  r = (D)((W)r | odd);
  r = negative & ~whole & (a != 0.0) & (a != kInfinity) ? constant(kNaN) : r;
  r = y == 2.0 ? x * x : r;
  r = y == 3.0 ? cube(x) : r;
  r = (a == 1.0) & (absolute(y) == kInfinity) ? constant(1.0) : r;
  return (x == 1.0) | (y == 0.0) ? constant(1.0) : r;
}

}  // namespace
}  // namespace detinfer
