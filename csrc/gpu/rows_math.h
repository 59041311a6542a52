// exp, log and division for rows on a GPU: the operations of cpu/math.h and cpu/math64.h one by one, so that both give
// the same bytes.
#pragma once

#include "../order.h"

namespace detinfer {
namespace gpu {

static constexpr float kQuickExp = -86.0f;  // from here to 0, quick_exp is right: the result is a normal number

struct ExpParts {
  float p, m;  // e^v = p 2^k; k is in the last bits of m, which is 1.5 * 2^23 + k
};
static __device__ __forceinline__ ExpParts exp_parts(float v) {
  const float m = fma_rn(v, 0x1.715476p+0f, 0x1.8p23f);
  const float k = add_rn(m, -0x1.8p23f);
  const float r = fma_rn(k, -0x1.7f7d1cp-20f, fma_rn(k, -0x1.62e4p-1f, v));
  float c = 0x1.6a2434p-10f;
  c = fma_rn(c, r, 0x1.1239e2p-7f);
  c = fma_rn(c, r, 0x1.5558f2p-5f);
  c = fma_rn(c, r, 0x1.555492p-3f);
  c = fma_rn(c, r, 0x1.fffffcp-2f);
  return {add_rn(1.0f, fma_rn(c, mul_rn(r, r), r)), m};
}

// e^v for v in [-86, 0]. The scale is an addition to the exponent.
static __device__ __forceinline__ float quick_exp(float v) {
  const ExpParts e = exp_parts(v);
  return __uint_as_float(__float_as_uint(e.p) + (__float_as_uint(e.m) << 23));
}

// e^v for any v <= 0, and NaN.
static __device__ __forceinline__ float exp_of_negative(float v) {
  const ExpParts e = exp_parts(v < -110.0f ? -110.0f : v);
  const int exponent = static_cast<int>(add_rn(e.m, -0x1.8p23f));
  const int half = exponent >> 1;
  const float low = __uint_as_float(static_cast<uint32_t>(half + 127) << 23);
  return mul_rn(mul_rn(e.p, low), __uint_as_float(static_cast<uint32_t>(exponent - half + 127) << 23));
}

// The natural logarithm of a positive finite double; NaN stays NaN.
static __device__ __forceinline__ double log64(double x) {
  const uint64_t one = 0x3ff0000000000000u, root_half = 0x3fe6a09e667f3bcdu;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
  const uint64_t exponent = (bits + (one - root_half)) & 0x7ff0000000000000u;
  const double m = __longlong_as_double(static_cast<long long>(bits - exponent + one));
  const double k = add_rn(__longlong_as_double(static_cast<long long>((exponent >> 52) | 0x4330000000000000u)),
                          -(0x1p52 + 1023.0));
  const double s = div_rn(add_rn(m, -1.0), add_rn(m, 1.0));
  const double t = mul_rn(s, s);
  double p = add_rn(mul_rn(t, 0x1.9112830858650p-3), 0x1.c62b4c9c87856p-3);
  p = add_rn(mul_rn(p, t), 0x1.2494113cecefdp-2);
  p = add_rn(mul_rn(p, t), 0x1.999996ab05127p-2);
  p = add_rn(mul_rn(p, t), 0x1.555555561d972p-1);
  const double result = add_rn(mul_rn(k, 0x1.62e42fefa39efp-1), mul_rn(s, add_rn(mul_rn(p, t), 2.0)));
  return x == x ? result : x;
}

// log64 of a sum of exponentials, rounded to fp32: the same value by pairs of fp32, since a row waits for it and doubles are
// slow. At least 1 and finite, and where the pair is too near the middle of two floats, or NaN, log64 itself decides.
//
// The pair is log64's own polynomial to 2^-35.7 of its value (every float from 1 up was tried), so that both ends of a range
// 2^-35 to either side round to log64's float wherever they round alike: all but one sum in 1,400.
static __device__ __forceinline__ float log_of_sum(float sum) {
  const uint32_t one = 0x3f800000u, root_half = 0x3f3504f4u;  // m is the fraction that log64 takes, also at its edges
  const uint32_t bits = __float_as_uint(sum), exponent = (bits + (one - root_half)) & 0x7f800000u;
  const float m = __uint_as_float(bits - exponent + one);
  const float k = static_cast<float>(static_cast<int>(exponent >> 23) - 127);
  // s = (m - 1) / (m + 1) and t = s s: high and low parts, of which only the quotient's first digits are not exact.
  const float f = add_rn(m, -1.0f), by = add_rn(m, 1.0f), by_low = add_rn(m, -add_rn(by, -1.0f));
  const float inverse = __fdividef(1.0f, by), s = mul_rn(f, inverse);
  const float s_low = mul_rn(fma_rn(-s, by_low, fma_rn(-s, by, f)), inverse);
  const float t = mul_rn(s, s), t_low = fma_rn(mul_rn(2.0f, s), s_low, fma_rn(s, s, -t));
  float q = fma_rn(t, 0x1.911284p-3f, 0x1.c62b4cp-3f);
  q = fma_rn(q, t, 0x1.249412p-2f);
  q = fma_rn(q, t, 0x1.999996p-2f);
  const float first = 0x1.555556p-1f, first_low = -0x1.53c4d2p-26f, tq = mul_rn(t, q);
  const float p = add_rn(first, tq), p_low = add_rn(add_rn(tq, -add_rn(p, -first)), fma_rn(t_low, q, first_low));
  const float w = mul_rn(t, p), w_low = fma_rn(t, p_low, fma_rn(t_low, p, fma_rn(t, p, -w)));
  const float u = mul_rn(s, w), u_low = fma_rn(s, w_low, fma_rn(s_low, w, fma_rn(s, w, -u)));
  // k ln 2 + 2 s + u, the greater first: k times ln 2's first 16 bits is exact.
  const float whole = mul_rn(k, 0x1.62e4p-1f), twice = mul_rn(2.0f, s);
  const float near = add_rn(whole, twice), high = add_rn(near, u);
  const float low = add_rn(add_rn(add_rn(twice, -add_rn(near, -whole)), add_rn(u, -add_rn(high, -near))),
                           fma_rn(k, 0x1.7f7d1cp-20f, fma_rn(2.0f, s_low, u_low)));
  const float range = mul_rn(add_rn(high, low), 0x1p-35f);
  const float above = add_rn(high, add_rn(low, range)), below = add_rn(high, add_rn(low, -range));
  if (bits - one < 0x40000000u && above == below) return above;
  return static_cast<float>(log64(static_cast<double>(sum)));
}

// Many values in [0, 1] by one divisor of at least 1 (or NaN), each quotient correctly rounded.
class Divisor {
 public:
  explicit __device__ __forceinline__ Divisor(float by) : by_(by), inverse_(div_rn(1.0f, by)) {}
  __device__ __forceinline__ float operator()(float value) const {
    // Markstein: the first correction is within one unit of the quotient's last place, the second is the quotient. The
    // remainders are exact where nothing is subnormal.
    float q = mul_rn(value, inverse_);
    q = fma_rn(fma_rn(-q, by_, value), inverse_, q);
    q = fma_rn(fma_rn(-q, by_, value), inverse_, q);
    if (__float_as_uint(value) - 1u < 0x0d800000u) q = div_rn(value, by_);  // 0 < value <= 2^-100
    return q;
  }

 private:
  float by_, inverse_;
};

}  // namespace gpu
}  // namespace detinfer
